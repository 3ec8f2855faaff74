"The signs of a run: definitions in float64, limits, shapes, and no waiting for the device."
import math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch._subclasses import FakeTensorMode
from helpers import rounding
from self_supervised_swav.sinkhorn import sinkhorn
from self_supervised_swav.stats import (
    code_entropy, code_overlap, effective_rank, feature_spread, mean_code_entropy, prototype_usage)

def entropy(p): return -sum(x*math.log(x) for x in p if x>0)

def entropy_bound(n, k):
    """How far the entropy of a mean over n codes of k prototypes can be from another calculation of it.

    A mean is a sum of n values and a division; a term -p ln p changes by |ln p+1| of what p changes, together
    entropy+1 <= ln k+1; k terms are added.
    """
    return rounding(torch.float32, n+k+4, math.log(k)+1)

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(2, 50), st.floats(.01, 3.), st.integers(0, 99))
def test_definitions(n, k, eps, seed):
    codes = sinkhorn(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)), eps)
    rows = codes.double().tolist()
    single,mean = code_entropy(codes).item(),mean_code_entropy(codes).item()
    bound = entropy_bound(n, k)
    assert single==pytest.approx(np.mean([entropy(r) for r in rows]), abs=bound)
    assert mean==pytest.approx(entropy(np.mean(rows, 0)), abs=bound)
    # entropy is concave: that of a mean is at least the mean of entropies (rows sum to 1 up to rounding)
    assert -bound<=single<=mean+2*bound and mean<=math.log(k)+2*bound
    assert prototype_usage(codes).item()==pytest.approx(len({int(np.argmax(r)) for r in rows})/k)

@pytest.mark.parametrize('n,d', [(5,3), (3,5), (200,16), (1,4)])
def test_features(n, d):
    x = torch.randn(n, d)*torch.linspace(.1, 3, d)
    z = x.double()/x.double().norm(dim=1, keepdim=True)
    # a norm of d terms and a mean of n move each distance by that much; the root of a mean of squares by no more
    bound = rounding(torch.float32, 2*(n+d)+4)
    assert feature_spread(x).item()==pytest.approx(max(0, 1-z.mean(0).square().sum().item())**.5, abs=bound)
    s = torch.linalg.svdvals(x.double())
    # eigenvalues of x'x are right to about d eps of the largest, singular values to that over their own size;
    # the result is float32
    smallest = s[:min(n, d)].min()/s[0]
    bound = rounding(torch.float32)+(rounding(torch.float64, n*d)/smallest**2).item()
    assert effective_rank(x).item()==pytest.approx(math.exp(entropy((s/s.sum()).tolist())), rel=bound)
    assert effective_rank(x*8).item()==pytest.approx(effective_rank(x).item(), rel=bound)  # 8: no rounding of x

def test_rank_of_constant_features_is_one():
    "However wide they are: roots of rounding errors must not add up"
    n = 512
    # eigenvalues that ought to be 0 are at most n eps of the largest: n singular values of share p, each with an
    # entropy of -p ln p
    p = math.sqrt(n*torch.finfo(torch.float64).eps)
    bound = math.exp(-n*p*math.log(p))-1
    assert bound<.01  # in float32 they would make a rank of more than 2
    assert effective_rank(torch.randn(1, 2048).expand(n, -1)).item()==pytest.approx(1, abs=bound)
    assert effective_rank(torch.zeros(4, 4)).item()==1

def test_overlap_of_independent_batches_is_one_on_average():
    means = torch.eye(100)[torch.randint(100, (4000,8))].mean(1)  # 8 sharp codes a batch, for 100 prototypes
    # 64 pairs meet in one of 100 prototypes: 0.64 times on average, with a deviation of 0.8; the mean over 4000 is
    # within 7 deviations
    overlaps = torch.stack([code_overlap(a, b) for a,b in zip(means, means[1:])])
    assert overlaps.mean().item()==pytest.approx(1, abs=7*.8/.64/4000**.5)
    # a batch with itself is not independent: 8 codes of 1/8
    assert code_overlap(means[0], means[0]).item()>=100/8*(1-rounding(torch.float32, 100))

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float64])
def test_dtypes_and_leading_dimensions(dtype):
    x = torch.rand(2,6,5).softmax(-1).to(dtype)
    for f in (code_entropy,mean_code_entropy,prototype_usage,feature_spread,effective_rank):
        assert f(x).ndim==0 and torch.equal(f(x), f(x.flatten(0,1)))
        # 12 rows of 5: rounding of the entropies, as above, and of a rank of at most 5
        bound = max(entropy_bound(12, 5), rounding(torch.float32, 4, 5))
        assert f(x).item()==pytest.approx(f(x.double()).item(), abs=bound)

def test_no_step_waits_for_the_device():
    with FakeTensorMode(), torch.device('cuda'):
        codes,z,mean = torch.rand(2,8,16),torch.rand(16,4),torch.rand(16)
        of_codes = [f(codes) for f in (code_entropy,mean_code_entropy,prototype_usage)]
        for o in (*of_codes, feature_spread(z), code_overlap(mean, mean)): assert o.device.type=='cuda'

@pytest.mark.parametrize('f', [code_entropy,mean_code_entropy,prototype_usage,feature_spread,effective_rank])
@pytest.mark.parametrize('shape', [(3,), (0,3), (3,0)])
def test_shapes_refused(f, shape):
    with pytest.raises(ValueError, match='must have the shape'): f(torch.ones(shape))

def test_overlap_refuses():
    with pytest.raises(ValueError, match='same shape'): code_overlap(torch.ones(3), torch.ones(4))
