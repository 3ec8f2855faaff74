"Whitening against scikit-learn's PCA, and the features that it cannot be fitted to"
import pytest, torch
from sklearn.decomposition import PCA
from safetensors.torch import load_file, save_file
from safetensors import safe_open
from torch import nn
from helpers import small_encoder
from self_supervised_swav.checkpoints import load_encoder, load_weights, load_whitening, save_encoder
from self_supervised_swav.whitening import Whitening, as_whitening

def features(n=300, d=6, seed=0, mean=3.):
    "Turned features whose variances are 1, 1/2, 1/4, ..."
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]
    return (torch.randn(n, d, generator=g, dtype=torch.float64)*2.**(-torch.arange(d)/2)) @ turn + mean

def rounding(x):
    """What float64 leaves of a whitened feature: an eigenvector turns by the covariance's rounding over the gap to the
    next variance, and is scaled by one over its deviation"""
    var = torch.linalg.eigvalsh(x.T.cov())
    eps = torch.finfo(torch.float64).eps
    largest = (x-x.mean(0)).abs().max()
    turned = len(x)*largest**2*eps/var.diff().min()
    return (turned*largest*x.shape[1]/var.min().sqrt()).item()

@pytest.mark.parametrize('n', [1, 5, 6, None])
@pytest.mark.parametrize('N', [30, 300, 20_000])
def test_equals_sklearn(n, N):
    x,new = features(N),features(50, seed=1)
    want = torch.tensor(PCA(n, whiten=True, svd_solver='full').fit(x.numpy()).transform(new.numpy()))
    got = Whitening.fit(x, n, 0.)(new)
    assert got.dtype==torch.float64 and rounding(x)<1e-5
    torch.testing.assert_close(got.abs(), want.abs(), atol=rounding(x), rtol=0)  # the sign means nothing

def test_shrinks_towards_the_mean_variance():
    x = features()
    var = torch.linalg.eigvalsh(x.T.cov()).flip(0)
    for s in (0., .3, 1.):
        got = Whitening.fit(x, shrink=s)(x).T.cov()
        want = (var/((1-s)*var+s*var.mean())).diag()
        torch.testing.assert_close(got, want, atol=rounding(x), rtol=0)
    assert torch.equal(Whitening.fit(x).weight, Whitening.fit(x, shrink=2/300**.5).weight)
    y = Whitening.fit(x, shrink=1.)(x)  # a turn and one scale for all: distances stay as they were
    torch.testing.assert_close(torch.cdist(y, y)*var.mean().sqrt(), torch.cdist(x, x), atol=1e3*rounding(x), rtol=0)

def test_direction_by_its_largest_entry():
    w = Whitening.fit(features()).weight
    assert (w.gather(1, w.abs().argmax(1, keepdim=True))>0).all()

@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_few_images_and_constant_features(dtype):
    "N images vary in N-1 directions; constant, doubled and merely rounded features add none"
    x = features(6, 12).to(dtype)
    w = Whitening.fit(x)
    assert w.out_features==5 and w.weight.dtype==torch.float32
    g = torch.Generator().manual_seed(0)
    a = torch.randn(400, 2, generator=g)
    x = torch.cat([a, a, torch.full((400,1), 1000.)], 1).to(dtype)
    assert Whitening.fit(x).out_features==2
    with pytest.raises(ValueError, match='n must be at most 5, the directions in which these 6 features of width 12'):
        Whitening.fit(features(6, 12), 6)

@pytest.mark.parametrize('x,text', [
    (torch.ones(5, 3), 'features must differ between images, got 5 equal rows'),
    (torch.ones(1, 3), 'features must hold 2 images or more, got 1'), (torch.ones(0, 3), '2 images or more, got 0'),
    (torch.ones(3), r'2 dimensions, images and features, got \(3,\)'), ([1.], 'got list'),
    (torch.tensor([[1.,2.],[torch.nan,3.]]), 'features must be finite')])
def test_refuses_features(x, text):
    with pytest.raises(ValueError, match=text): Whitening.fit(x)

def test_refuses_arguments():
    x = features()
    with pytest.raises(TypeError, match='floating point, got torch.int64'): Whitening.fit(x.long())
    for n in (0,True,2.5):
        with pytest.raises(ValueError, match='n must be a positive whole number'): Whitening.fit(x, n)
    with pytest.raises(ValueError, match=r'shrink must be between 0 and 1, got 1\.5'): Whitening.fit(x, shrink=1.5)
    with pytest.raises(ValueError, match='width 6 of those that the whitening was fitted to, got 3'):
        Whitening.fit(x)(x[:,:3])
    with pytest.raises(TypeError, match="whiten must be True, False, a number of directions or a Whitening, got 'yes'"):
        as_whitening('yes', x)

def test_appended_to_an_encoder_it_is_one_linear_layer():
    x = features().float()
    w = Whitening.fit(x, 4)
    assert not list(w.parameters()) and set(w.state_dict())=={'mean','weight'}  # nothing that training would change
    layer = nn.Sequential(nn.Identity(), w.linear())
    # d products of a scaled direction with a feature, in float32, once with the mean taken off before and once after
    eps = 4*x.shape[1]*torch.finfo(torch.float32).eps*(w.weight.abs().max()*x.abs().max()).item()
    torch.testing.assert_close(layer(x), w(x), atol=eps, rtol=0)
    assert isinstance(layer[1], nn.Linear) and as_whitening(w, x) is w and as_whitening(None, x) is None
    assert as_whitening(3, x).out_features==3 and as_whitening(True, x).out_features==6

def test_saved_with_its_encoder(tmp_path):
    w,encoder = Whitening.fit(features()),small_encoder()
    path = save_encoder(encoder, tmp_path/'e.safetensors', whitening=w, size=16)
    again,x = load_whitening(path),features(seed=2)
    assert torch.equal(again(x), w(x))
    plain = load_encoder(save_encoder(encoder, tmp_path/'plain.safetensors', size=16))
    assert all(torch.equal(a, b) for a,b in zip(load_encoder(path).state_dict().values(), plain.state_dict().values()))
    load_weights(small_encoder(), path)
    assert load_whitening(tmp_path/'plain.safetensors') is None

@pytest.mark.parametrize('change,text', [
    (lambda o: o.pop('whitening:mean'), "must hold a whitening's mean"),
    (lambda o: o.update({'whitening:mean': torch.zeros(3)}), r"got \{.*'mean': \(3,\)"),
    (lambda o: o['whitening:weight'].fill_(torch.inf), 'must hold a finite whitening')])
def test_a_file_that_lies(tmp_path, change, text):
    path = save_encoder(small_encoder(), tmp_path/'e.safetensors', whitening=Whitening.fit(features()), size=16)
    tensors = load_file(path)
    with safe_open(path, 'pt') as f: metadata = f.metadata()
    change(tensors)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=text): load_whitening(path)
