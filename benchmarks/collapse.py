"""Does `swav_learner(dls, arch).fit(n)` learn on small data, with nothing chosen by hand?

`python benchmarks/collapse.py [--seeds 5] [--only digits]`"""
import argparse, math, time, warnings
from functools import partial

import numpy as np, torch
from fastai.callback.progress import ProgressCallback
from fastai.torch_core import set_seed
from sklearn.datasets import load_sample_images
from harness import line
from levers import clipart
from self_supervised_swav.data import digits_dls, fashion_mnist_dls, tensor_dls
from self_supervised_swav.evaluate import extract_features, knn_accuracy
from self_supervised_swav.learner import swav_learner
from self_supervised_swav.monitor import CollapseWarning
from self_supervised_swav.evaluate import NoValidation

def photo_dls(n=2000, size=64, bs=64, seed=0, **kwargs):
    "DataLoaders of `n` random squares of scikit-learn's two photographs"
    rng = np.random.default_rng(seed)
    photos = [torch.tensor(o).permute(2,0,1) for o in load_sample_images().images]
    def square(i):
        y,x = (int(rng.integers(n-size+1)) for n in photos[i].shape[1:])
        return photos[i][:,y:y+size,x:x+size]
    return tensor_dls(torch.stack([square(i%2) for i in range(n)]), bs=bs, seed=seed, **kwargs)

small = dict(layers=(1,1,1,1))
datasets = dict( # its DataLoaders, the widths of the encoder, epochs
    digits=(partial(digits_dls, size=16, valid_pct=.3), (16,32,64,128), 40),
    fashion=(partial(fashion_mnist_dls, n_train=10_000, n_valid=5_000, bs=64), (32,64,128,256), 2),
    drawings=(lambda seed, device: clipart(64, seed), (32,64,128,256), 5),
    photos=(photo_dls, (32,64,128,256), 5))

def accuracy(learn):
    "20-NN accuracy of the features, where there are labels"
    if len(learn.dls.train.dataset[0])<2: return math.nan
    return knn_accuracy(*(extract_features(learn, dl, progress=False) for dl in learn.dls))

def run(name, seed, epochs=None):
    "Loss as a share of ln K in the first and the last epoch, accuracies before and after, number of alarms, seconds"
    make,channels,n = datasets[name]
    set_seed(seed)
    dls = make(seed=seed, device='cpu')
    learn = swav_learner(dls, 'resnet18', encoder=small|dict(channels=channels), cbs=NoValidation())
    learn.remove_cb(ProgressCallback).logger = lambda *_: None
    before,start = accuracy(learn),time.time()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', CollapseWarning)
        learn.fit(epochs or n)
    seconds,losses = time.time()-start,learn.collapse_monitor.history['loss/lnK']
    steps = len(learn.dls.train)
    first,last = (sum(o)/steps for o in (losses[:steps],losses[-steps:]))
    return dict(
        data=name, seed=seed, epochs=epochs or n, steps=len(losses), protos=learn.recipe['model']['n_protos'],
        first=first, last=last, untrained=before, trained=accuracy(learn),
        alarms=len(learn.collapse_monitor.alarms), seconds=seconds)

def collapsed(r):
    "An alarm, a loss that stays at ln K, or features that know no more than before"
    return r['alarms']>0 or r['last']>=.95 or r['trained']<=r['untrained']

columns = ('data','seed','epochs','steps','prototypes','loss/ln K, first epoch','last epoch',
           '20-NN untrained','trained','alarms','seconds','collapsed')
def row(r):
    acc = ['' if math.isnan(r[k]) else f'{r[k]:.3f}' for k in ('untrained','trained')]
    losses = [f'{r[k]:.3f}' for k in ('first','last')]
    counts = [str(r[k]) for k in ('data','seed','epochs','steps','protos')]
    return line([*counts, *losses, *acc, str(r['alarms']), f"{r['seconds']:.0f}", 'YES' if collapsed(r) else 'no'])

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--first', type=int, default=0, help='the first seed')
    p.add_argument('--only', nargs='+', choices=list(datasets), default=list(datasets))
    p.add_argument('--epochs', type=int, help='instead of those of each data set')
    args = p.parse_args(argv)
    print(line(columns), line(['---']*len(columns)), sep='\n', flush=True)
    results = []
    for name in args.only:
        for seed in range(args.first, args.first+args.seeds):
            results.append(run(name, seed, args.epochs))
            print(row(results[-1]), flush=True)
    print(f'\n{sum(map(collapsed, results))} of {len(results)} collapsed')
    return results

if __name__=='__main__': main()
