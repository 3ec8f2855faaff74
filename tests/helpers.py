"A small Learner on a part of the digits: every test that needs training starts from it."
import random, warnings
from functools import cache
import numpy as np, pytest, torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastcore.xml import P
from sklearn.datasets import load_digits
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from self_supervised_swav.augment import get_swav_aug_pipelines
from self_supervised_swav.data import tensor_dls
from self_supervised_swav.encoders import create_encoder
import self_supervised_swav.all  # noqa: F401 (registers all methods)
from self_supervised_swav.learner import pretrain_learner, setting_groups
from self_supervised_swav.models import create_swav_model
from self_supervised_swav.multiview import methods
from self_supervised_swav.swav import SWAV

def seed_all(seed=0): random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)

@cache
def _digits():
    "16 px: read from their file once"
    x,y = map(torch.tensor, load_digits(return_X_y=True))
    return (x.float()/16).view(-1,1,8,8).repeat_interleave(2,2).repeat_interleave(2,3),y

def digits(n, labeled=False, bs=16, seed=0, n_in=1, **kwargs):
    "DataLoaders of the first `n` digits, four fifths of them for training"
    x,y = _digits()
    y = y[:n].clone() if labeled else None
    return tensor_dls(x[:n].repeat(1,n_in,1,1), y, bs=bs, seed=seed, device='cpu', **kwargs)

def small_augs(num_crops=(2,1), crop_sizes=(16,10), **kwargs):
    "Pipelines for gray 16 px images"
    return get_swav_aug_pipelines(num_crops=num_crops, crop_sizes=crop_sizes, min_scales=(.4,.1), max_scales=(1.,.4),
                                  stats=None, **kwargs)

def small_encoder(n_in=1):
    return create_encoder('resnet18', n_in=n_in, pretrained=False, small_images=True, layers=(1,1,1,1),
                          channels=(8,8,16,16))

def quick_encoder():
    "Two convolutions, for 16 px images: where it does not matter what is trained"
    def block(n_in, n_out):
        return nn.Conv2d(n_in, n_out, 3, stride=2, padding=1, bias=False),nn.BatchNorm2d(n_out),nn.ReLU()
    return nn.Sequential(*block(1, 8), *block(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def small_learner(n=100, labeled=False, bs=16, augs=None, n_in=1, n_protos=20, seed=0, cbs=(), dls=None, learner={},
                  **swav_kwargs):
    "A Learner with `SWAV`, quiet and seeded"
    seed_all(seed)
    model = create_swav_model(small_encoder(n_in), hidden_size=16, projection_size=8, n_protos=n_protos)
    learn = Learner(dls or digits(n, labeled, bs, n_in=n_in), model,
                    cbs=[SWAV(augs or small_augs(), **swav_kwargs), *cbs], **learner)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    return learn

# every registered method with its own defaults, and more settings of some: what a method has to stand is tested with
# each
method_cases = {name: dict(method=name)
                for name in methods} | {'swav-queue': dict(method='swav', K=24, queue_start_pct=0.)}

def method_learner(case, n=100, labeled=False, seed=0, cbs=(), dls=None, monitor=False, **kwargs):
    "A Learner with the method and the settings of a case, quiet, seeded, as fast as possible"
    seed_all(seed)
    given = method_cases[case]
    n_sizes = len(methods[given['method']].recipe(n_images=80, bs=16, image_size=16)['augs']['crop_sizes'])
    quick = dict(hidden_size=16, projection_size=8, n_protos=20, num_crops=(2,1)[:n_sizes], jitter=False)
    known = [o for names in setting_groups(given['method']).values() for o in names]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # a queue of a quarter of the images, and the like
        settings = {k:v for k,v in quick.items() if k in known} | given | kwargs
        learn = pretrain_learner(dls or digits(n, labeled), quick_encoder(), cbs=cbs, bf16=False, **settings)
    if not monitor: learn.remove_cb(learn.collapse_monitor)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    return learn

def rounding(dtype, n=1, size=1.):
    """How far two results can be apart that differ in rounding alone: each is the outcome of `n` roundings of values up
    to `size`.

    A rounding changes a value by at most eps/2 of it, so `n` in a row by at most g = (n*eps/2)/(1-n*eps/2), and two
    results differ by twice that. A sum or dot product of n terms, added in any order: `n` terms and `size` the sum of
    their absolute values. """
    half = n*torch.finfo(dtype).eps/2
    if half>=1: raise ValueError(f"{n} roundings in {dtype} leave no digit that is certain")
    return 2*half/(1-half)*size

def _pretends_gpu():
    "Can modules be made on CUDA tensors that are only pretended? Older versions of torch (2.6) ask for a real GPU"
    try:
        with FakeTensorMode(), torch.device('cuda'): torch.nn.Linear(2, 2)
    except Exception: return False
    return True

needs_pretended_gpu = pytest.mark.skipif(not _pretends_gpu(),
                                         reason='this version of torch cannot pretend that there is a GPU')

class NoWait(TorchDispatchMode):
    """On pretended CUDA tensors, what a real GPU would be waited for raises: copies between devices, those of an index
    like `x[[0,1]]` too"""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__=='_to_copy' and not (kwargs or {}).get('non_blocking'):
            a,b = args[0].device.type,out.device.type
            if a!=b: raise RuntimeError(f'a tensor {tuple(out.shape)} of {a} is copied to {b}: the step waits for it')
        return out

class Noisy:
    "Items with noise of all three generators, which notes what is loaded"
    def __init__(self, n): self.n,self.loaded = n,[]
    def __len__(self): return self.n
    def __getitem__(self, i):
        self.loaded.append(i)
        return torch.tensor([float(i), torch.rand(1).item(), random.random(), np.random.rand()])

def words_for(picture):
    "In place of a picture of a report, whose drawing takes as long as a short training"
    return P(picture.title, picture.alt, picture.caption)

# settings of a `swav pretrain` of seconds
tiny_run = ['--set', 'encoder.layers=1,1,1,1', 'encoder.channels=8,8,16,16', 'hidden_size=16', 'n_protos=16',
            'num_crops=2,1', 'bf16=False']
