"""A hundred steps of this engine against a plain PyTorch loop that follows the paper's Algorithm 1 and its training
script"""
import math
from functools import partial

import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.vision.core import TensorImage
from fasttransform import Pipeline, Transform
from torch import nn

from helpers import rounding
from self_supervised_swav.models import create_swav_model
from self_supervised_swav.optimizer import lars
from self_supervised_swav.swav import SWAV

bs,n_batches,n_epochs = 8,5,20                                        # 100 steps
warmup,start_lr,lr,final_lr,wd,mom,trust = 4,0.3,4.8,0.0048,1e-6,0.9,1e-3
temp,eps,n_iters,n_protos,K = 0.1,0.05,3,12,24
frozen_steps,queue_step = 15,50
# top, left, size: two large crops, three small ones
boxes = [(0, 0, 12), (3, 4, 12), (0, 8, 8), (5, 5, 8), (8, 0, 8)]

class Cut(Transform):
    def __init__(self, top, left, size): self.at = ...,slice(top, top+size),slice(left, left+size)
    def encodes(self, x:TensorImage): return x[self.at]

class Watch(Callback):
    run_valid = False
    def __init__(self): self.seen = []
    def after_batch(self): self.seen.append((self.learn.loss.item(), self.opt.hypers[-1]['lr']))

def fixed():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                            nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(),
                            nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = create_swav_model(encoder, hidden_size=16, projection_size=8, n_protos=n_protos)
    return model.double(),F.avg_pool2d(torch.rand(bs*n_batches, 1, 32, 32, dtype=torch.float64), 2)

def plain_sinkhorn(scores):
    "Algorithm 1: exp, then rows and columns in turn"
    Q = torch.exp(scores/eps).T
    Q /= Q.sum()
    for _ in range(n_iters):
        Q /= Q.sum(1, keepdim=True)*Q.shape[0]
        Q /= Q.sum(0, keepdim=True)*Q.shape[1]
    return (Q/Q.sum(0, keepdim=True)).T

def plain_loop(model, images, frozen_steps=frozen_steps, queue_step=queue_step, warmup=warmup):
    "Losses and learning rates of every step"
    encoder,projector,C = model.encoder,model.projector,model.prototypes.weight
    params = [*encoder.parameters(), *projector.parameters(), C]
    velocity,queue,seen = {},torch.zeros(2, 0, 8, dtype=torch.float64),[]
    T,W = n_batches*(n_epochs-warmup),n_batches*warmup
    rates = np.concatenate([np.linspace(start_lr, lr, W),
                            [final_lr+0.5*(lr-final_lr)*(1+math.cos(math.pi*t/T)) for t in range(T)]])
    model.train()
    for step,rate in enumerate(rates):
        x = images.split(bs)[step%n_batches]
        crops = [x[..., i:i+s, j:j+s] for i,j,s in boxes]
        with torch.no_grad(): C.copy_(F.normalize(C, dim=1))
        z = F.normalize(projector(torch.cat([encoder(torch.cat(crops[:2])), encoder(torch.cat(crops[2:]))])), dim=1)
        z,scores = z.chunk(len(crops)),(z @ C.T).chunk(len(crops))
        loss = 0
        for a in range(2):
            with torch.no_grad():
                rows = [scores[a], queue[a] @ C.T] if queue.shape[1]==K and step>=queue_step else [scores[a]]
                q = plain_sinkhorn(torch.cat(rows))[:bs]
            others = [v for v in range(len(crops)) if v!=a]
            loss = loss - sum((q*F.log_softmax(scores[v]/temp, dim=1)).sum(1).mean() for v in others)/len(others)/2
        queue = torch.cat([torch.stack(z[:2]).detach(), queue], 1)[:, :K]
        for p in params: p.grad = None
        loss.backward()
        if step<frozen_steps: C.grad = None
        with torch.no_grad():
            for p in params:
                if p.grad is None: continue
                g,w = p.grad,p.norm()
                if w>0 and g.norm()>0: g = (g+wd*p)*trust*w/(g.norm()+wd*w+1e-8)
                velocity[p] = mom*velocity[p]+g if p in velocity else g.clone()
                p -= rate*velocity[p]
        seen.append((loss.item(), rate))
    return seen

@pytest.fixture(scope='module')
def engine():
    "Losses and learning rates of the engine's 100 steps"
    model,images = fixed()
    dls = DataLoaders(*[TfmdDL([(o,) for o in images], bs=bs, shuffle=False, num_workers=0) for _ in range(2)])
    swav,watch = SWAV([Pipeline([Cut(*b)], split_idx=0) for b in boxes], K=K, queue_start_pct=queue_step/100,
                      freeze_protos_pct=frozen_steps/100,
                temp=temp, eps=eps, n_sinkh_iter=n_iters),Watch()
    learn = Learner(dls, model, lambda *_: None, cbs=[swav, watch],
                    opt_func=partial(lars, mom=mom, wd=wd, trust_coeff=trust))
    learn.remove_cb(ProgressCallback).logger = lambda *_: None
    learn.fit_warmup_cos(n_epochs, lr, warmup=warmup, start_lr=start_lr, final_lr=final_lr)
    return watch.seen

# The weights are float64: a step rounds at 1e-16, and a hundred steps of a network that learns amplify that by less
# than a million. The losses are told in float32, where a loss below 4 is rounded by 1.2e-7.
alike = 1e-10 + rounding(torch.float32, 1, 4)

def test_every_step(engine):
    want = plain_loop(*fixed())
    assert len(engine) == len(want) == 100
    np.testing.assert_allclose(engine, want, rtol=0, atol=alike)
    losses = np.array(engine)[:, 0]
    # something was learnt, so the agreement means something
    assert losses[-5:].mean() < losses[:5].mean()-0.1

@pytest.mark.parametrize('change,first', [(dict(frozen_steps=0), 1), (dict(frozen_steps=16), 16),
                                          (dict(queue_step=100), 50), (dict(queue_step=51), 50),
    (dict(warmup=3), 2)], ids=['never_frozen','frozen_a_step_longer','no_queue','queue_a_step_later','other_warmup'])
def test_every_part_counts(engine, change, first):
    "Leave a part out of the loop, and the losses part at the very step where it begins"
    off = np.abs(np.array(engine)-plain_loop(*fixed(), **change))[:, 0]
    assert off[:first].max() < alike and off[first:].max() > 1e-3 and off[first] > 2*alike
