"Labels that spread: the limit of the rounds, beliefs that are shares, a probe that learns from images without labels"
import math, subprocess, sys
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st

from self_supervised_swav.evaluate import few_label_idxs, linear_probe, spread_probe
from self_supervised_swav.spread import neighbor_graph, spread_labels

def crowds(n=60, d=8, n_classes=3, apart=4., seed=0):
    "Features of some classes that stand apart, and their classes"
    gen = torch.Generator().manual_seed(seed)
    y = torch.arange(n)%n_classes
    return apart*torch.eye(d)[y]+torch.randn(n, d, generator=gen),y

def few(y, n=1, seed=0):
    out = torch.full_like(y, -1)
    idxs = few_label_idxs(y, n, seed=seed)
    out[idxs] = y[idxs]
    return out

@pytest.mark.parametrize('alpha', [.1,.5,.9,.99])
def test_the_limit(alpha):
    "The rounds go to what a linear system gives; what is missing after the last one is 1e-5 of the way, and known"
    x,y = crowds()
    labels = few(y, 2)
    S = neighbor_graph(x, 5, .1).to_dense().numpy()
    first = np.eye(3)[labels.clamp(min=0)]*(labels>=0).numpy()[:,None]
    limit = np.linalg.solve(np.eye(60)-alpha*S, (1-alpha)*first)
    rounds = math.ceil(math.log(1e-5)/math.log(alpha))
    missing = np.linalg.matrix_power(alpha*S, rounds)@(limit-first)
    assert np.linalg.norm(missing, 2)<=1e-5*np.linalg.norm(limit-first, 2)
    want = torch.from_numpy(limit-missing)
    # beliefs are shares, rounded to float32; what float64 loses before is far less
    got,eps = spread_labels(x, labels, k=5, temp=.1, alpha=alpha),torch.finfo(torch.float32).eps
    torch.testing.assert_close(got.double(), want/want.sum(1, keepdim=True), atol=eps, rtol=0)

def test_graph():
    "Symmetric, no link to oneself, and nothing grows on it"
    x,_ = crowds(40)
    S = neighbor_graph(x, 6).to_dense().numpy()
    assert (S==S.T).all() and not np.diag(S).any() and ((S>0).sum(1)>=6).all()
    assert abs(np.linalg.eigvalsh(S)).max()<=1+40*np.finfo(float).eps
    assert torch.equal(neighbor_graph(x, 100).to_dense(), neighbor_graph(x, 39).to_dense())  # all others

@settings(max_examples=60, deadline=None)
@given(st.integers(2, 30), st.integers(1, 4), st.integers(1, 5), st.integers(1, 40), st.floats(.01, .99),
       st.floats(1e-4, 10), st.integers(0, 2**31), st.booleans())
def test_beliefs_are_shares(n, d, n_classes, k, alpha, temp, seed, same):
    "Of any features: equal ones, zeros, few"
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.integers(-1, 2, (n,d)) if same else rng.normal(size=(n,d))).float()
    labels = torch.from_numpy(rng.integers(-1, n_classes, n))
    labels[0] = 0
    p = spread_labels(x, labels, n_classes, k=k, temp=temp, alpha=alpha)
    assert p.shape==(n,n_classes) and p.dtype==torch.float32 and (p>=0).all()
    assert (p.sum(1)-1).abs().max()<=n_classes*torch.finfo(torch.float32).eps*2

def test_order_does_not_matter():
    x,y = crowds()
    labels,perm = few(y, 2),torch.randperm(60, generator=torch.Generator().manual_seed(1))
    a,b = spread_labels(x, labels, k=5),spread_labels(x[perm], labels[perm], k=5)
    torch.testing.assert_close(b, a[perm], atol=1e-4, rtol=0)  # similarities are rounded in another order

def test_probe_learns_from_all():
    "Where the crowds are seen, one label of each says more than to a probe; the folded whitening changes no score"
    x,y = crowds(300, d=4)
    xv,yv = crowds(90, d=4, seed=1)
    gain = []
    for seed in range(5):
        labels = few(y, seed=seed)
        by_all,idxs = spread_probe((x,labels), (xv,yv), k=10),labels>=0
        gain.append(by_all.top1-linear_probe((x[idxs],y[idxs]), (xv,yv)).top1)
        right = (by_all(xv).argmax(1)==yv).float().mean().item()
        assert abs(right-by_all.top1)<=1.5/90  # an image on the border may fall to either side
    assert min(gain)>=-1.5/90 and sum(gain)/5>.02, gain
    assert spread_probe((x,y), (xv,yv)).top1>.9  # all labels are given

def test_given_labels_are_kept():
    "A label that its neighbors outvote counts for the probe as it is"
    x,y = crowds(200, apart=8.)
    labels = y.clone()
    labels[0] = (y[0]+1)%3
    assert spread_labels(x, labels)[0].argmax()==y[0]
    wrong = spread_probe((x,labels), (x,y), C=1e4)
    assert wrong(x)[0].argmax()!=y[0]

@pytest.mark.parametrize('change,error,match', [
    (dict(alpha=0.), ValueError, 'alpha must be between 0 and 1, got 0'),
    (dict(temp=0.), ValueError, 'temp must be positive, got 0'),
    (dict(k=0), ValueError, 'k must be at least 1, got 0'),
    (dict(n_classes=2), ValueError, 'n_classes must be larger than the labels, of which one is 2, got 2'),
    (dict(labels=torch.full((60,), -2)), ValueError, 'labels must be -1 or a class from 0, got -2'),
    (dict(labels=torch.full((60,), -1)), ValueError, 'at least one class, all are -1'),
    (dict(labels=torch.rand(60)), TypeError, 'labels must be integers'),
    (dict(labels=torch.zeros(59).long()), ValueError, 'one class for each of the 60 features'),
    (dict(features=torch.zeros(1,3), labels=torch.zeros(1).long()), ValueError, '2 images or more, got 1'),
    (dict(features=torch.full((60,3), torch.nan)), ValueError, 'must be finite')])
def test_errors(change, error, match):
    x,y = crowds()
    with pytest.raises(error, match=match): spread_labels(**dict(features=x, labels=y)|change)

def test_nothing_is_warned_of():
    "torch warns once in a process of sparse tensors whose maker has not said whether to check them"
    said = ('import torch; from self_supervised_swav.spread import spread_labels; '
            'spread_labels(torch.eye(5), torch.tensor([0,1,-1,-1,-1]))')
    subprocess.run([sys.executable,'-W','error','-c',said], check=True)
