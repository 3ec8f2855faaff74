"The signs of a run: definitions in float64, limits, shapes, and no waiting for the device."
import math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch._subclasses import FakeTensorMode
from self_supervised_swav.sinkhorn import sinkhorn
from self_supervised_swav.stats import code_entropy, code_overlap, effective_rank, feature_spread, mean_code_entropy, prototype_usage

def H(p): return -sum(x*math.log(x) for x in p if x>0)

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(2, 50), st.floats(.01, 3.), st.integers(0, 99))
def test_definitions(n, k, eps, seed):
    codes = sinkhorn(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)), eps)
    rows = codes.double().tolist()
    single,mean = code_entropy(codes).item(),mean_code_entropy(codes).item()
    assert single==pytest.approx(np.mean([H(r) for r in rows]), abs=2e-6)
    assert mean==pytest.approx(H(np.mean(rows, 0)), abs=2e-6)
    assert -1e-6<=single<=mean+2e-6 and mean<=math.log(k)+2e-6
    assert prototype_usage(codes).item()==pytest.approx(len({int(np.argmax(r)) for r in rows})/k)

@pytest.mark.parametrize('n,d', [(5,3), (3,5), (200,16), (1,4)])
def test_features(n, d):
    x = torch.randn(n, d)*torch.linspace(.1, 3, d)
    z = x.double()/x.double().norm(dim=1, keepdim=True)
    assert feature_spread(x).item()==pytest.approx(max(0, 1-z.mean(0).square().sum().item())**.5, abs=2e-6)
    s = torch.linalg.svdvals(x.double())
    assert effective_rank(x).item()==pytest.approx(math.exp(H((s/s.sum()).tolist())), rel=1e-6)
    assert effective_rank(x*7).item()==pytest.approx(effective_rank(x).item(), rel=1e-6)

def test_rank_of_constant_features_is_one():
    "However wide they are: roots of rounding errors must not add up"
    assert effective_rank(torch.randn(1, 2048).expand(512, -1)).item()==pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.zeros(4, 4)).item()==1

def test_overlap_of_independent_batches_is_one_on_average():
    means = torch.eye(100)[torch.randint(100, (4000,8))].mean(1)  # 8 sharp codes a batch, for 100 prototypes
    assert torch.stack([code_overlap(a, b) for a,b in zip(means, means[1:])]).mean().item()==pytest.approx(1, abs=.15)
    assert code_overlap(means[0], means[0]).item()>5  # a batch with itself is not

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float64])
def test_dtypes_and_leading_dimensions(dtype):
    x = torch.rand(2,6,5).softmax(-1).to(dtype)
    for f in (code_entropy,mean_code_entropy,prototype_usage,feature_spread,effective_rank):
        assert f(x).ndim==0
        torch.testing.assert_close(f(x), f(x.flatten(0,1)))
        torch.testing.assert_close(f(x).double(), f(x.double()).double(), atol=1e-5, rtol=1e-5)

def test_no_step_waits_for_the_device():
    with FakeTensorMode(), torch.device('cuda'):
        codes,z,mean = torch.rand(2,8,16),torch.rand(16,4),torch.rand(16)
        for o in (code_entropy(codes), mean_code_entropy(codes), prototype_usage(codes), feature_spread(z), code_overlap(mean, mean)): assert o.device.type=='cuda'

@pytest.mark.parametrize('f', [code_entropy,mean_code_entropy,prototype_usage,feature_spread,effective_rank])
@pytest.mark.parametrize('shape', [(3,), (0,3), (3,0)])
def test_shapes_refused(f, shape):
    with pytest.raises(ValueError, match='must have the shape'): f(torch.ones(shape))

def test_overlap_refuses():
    with pytest.raises(ValueError, match='same shape'): code_overlap(torch.ones(3), torch.ones(4))
