"Images a second through eight augmented crops: this package, torchvision, lightly and kornia"
import argparse, os, statistics, time
from functools import partial

import numpy as np, torch, kornia.augmentation as K
from fastai.vision.core import imagenet_stats
from lightly.transforms import SwaVTransform
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms as T

from self_supervised_swav.augment import MultiCrop, get_swav_aug_pipelines

sizes = dict(num_crops=(2,6), crop_sizes=(224,96), min_scales=(.25,.05), max_scales=(1.,.14))

def photographs(n, h=256, w=320):
    "`n` PIL images cut from scikit-learn's two photographs, shrunk to twice the size first"
    big = [Image.fromarray(o).resize((2*w,2*h), Image.BICUBIC) for o in load_sample_images().images]
    rng = np.random.default_rng(0)
    boxes = [(int(rng.integers(w+1)), int(rng.integers(h+1))) for _ in range(n)]
    return [big[i%2].crop((x, y, x+w, y+h)) for i,(x,y) in enumerate(boxes)]

def batch(images): return torch.stack([T.functional.to_tensor(o) for o in images])

class Crops(Dataset):
    "All crops of one image per item, as a data loader of torchvision or lightly makes them"
    def __init__(self, images, tfm): self.images,self.tfm = images,tfm
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return self.tfm(self.images[i])

def pil_blur(img, lo=.1, hi=2.):
    "Pillow's blur, as in the official code: torchvision's own takes a 23x23 convolution and several times as long"
    return img.filter(ImageFilter.GaussianBlur(radius=float(torch.empty(1).uniform_(lo, hi))))

class TorchvisionCrops:
    "The official multi-crop augmentations in torchvision's operations on PIL images"
    def __init__(self, num_crops, crop_sizes, min_scales, max_scales):
        def crop(size, scale): return T.Compose([
            T.RandomResizedCrop(size, scale=scale), T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(.8,.8,.8,.2)], p=.8), T.RandomGrayscale(.2),
            T.RandomApply([pil_blur], p=.5), T.ToTensor(), T.Normalize(*imagenet_stats)])
        self.tfms = [t for n,size,*scale in zip(num_crops, crop_sizes, min_scales, max_scales)
                     for t in [crop(size, tuple(scale))]*n]
    def __call__(self, x): return [t(x) for t in self.tfms]

class KorniaCrops(nn.Module):
    "The same as a plain chain of kornia's modules on a batch"
    def __init__(self, num_crops, crop_sizes, min_scales, max_scales):
        super().__init__()
        def crop(size, scale): return nn.Sequential(
            K.RandomResizedCrop((size,size), scale=scale), K.RandomHorizontalFlip(),
            K.ColorJitter(.8,.8,.8,.2, p=.8), K.RandomGrayscale(p=.2),
            K.RandomGaussianBlur((23,23), (.1,2.), p=.5), K.Normalize(*(torch.tensor(o) for o in imagenet_stats)))
        self.tfms = [t for n,size,*scale in zip(num_crops, crop_sizes, min_scales, max_scales)
                     for t in [crop(size, tuple(scale))]*n]
    def forward(self, x): return [t(x) for t in self.tfms]

def loaded(tfm, images, bs, workers):
    "A function that starts a loader and gives one that waits for its next batch: no worker outlives its run"
    dl = DataLoader(Crops(images, tfm), batch_size=bs, num_workers=workers,
                    sampler=RandomSampler(images, replacement=True, num_samples=10**7))
    def start():
        it = iter(dl)
        return partial(next, it)
    return start

n_workers = os.cpu_count()  # what a peer on PIL images may use: all of them

def contestants(bs=32, sizes=sizes, workers=n_workers, device='cpu'):
    "Name to a function that gives a function that makes one batch of crops"
    images = photographs(bs)
    x,pipes = batch(images).to(device),get_swav_aug_pipelines(**sizes)
    n,s,lo,hi = sizes.values()
    lightly = SwaVTransform(crop_counts=n, crop_sizes=s, crop_min_scales=lo, crop_max_scales=hi)
    return {'this package': lambda: partial(MultiCrop(pipes).cut, x),
            'kornia chain': lambda: partial(KorniaCrops(**sizes).to(device), x),
            f'torchvision PIL, {workers} workers': loaded(TorchvisionCrops(**sizes), images, bs, workers),
            f'lightly PIL, {workers} workers': loaded(lightly, images, bs, workers)}

def images_per_second(contestants, bs, rounds=5, steps=2*n_workers, warmup=n_workers, device='cpu'):
    """Median images a second of each of `contestants`, in alternating runs. Loaders begin with a batch from each worker
    at once, so that whole turns of all workers are timed, after the first"""
    rates = {k:[] for k in contestants}
    def finish():
        if device!='cpu': torch.cuda.synchronize()
    for _ in range(rounds):
        for name,start in contestants.items():
            f = start()
            for _ in range(warmup): f()
            finish()
            t = time.perf_counter()
            for _ in range(steps): f()
            finish()
            rates[name].append(bs*steps/(time.perf_counter()-t))
            del f
    return {k:statistics.median(v) for k,v in rates.items()}

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--bs', type=int, default=32)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--small', action='store_true', help='2x96 + 4x48 instead of 2x224 + 6x96')
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    crops = dict(sizes, num_crops=(2,4), crop_sizes=(96,48)) if args.small else sizes
    rates = images_per_second(contestants(args.bs, crops), args.bs, args.rounds)
    print(f"{args.bs} images of 3x256x320, crops {crops['num_crops']} of {crops['crop_sizes']}, "
          f"{args.threads} threads, torch {torch.__version__}")
    for k,v in rates.items(): print(f"{k:28} {v:7.1f} images/s   this package: {rates['this package']/v:.2f}x")

if __name__=='__main__': main()
