"Codes: invariants at every setting, and equality with independent implementations."
import math
import numpy as np, ot, pytest, torch
import torch.nn.functional as F
from hypothesis import strategies as st
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from fuzz import fuzz
from helpers import rounding
from self_supervised_swav import sinkhorn as module
from self_supervised_swav.sinkhorn import sinkhorn

def cosines(B, K, d=128):
    g = torch.Generator().manual_seed(B*K)
    return F.normalize(torch.randn(B, d, generator=g), dim=1)@F.normalize(torch.randn(K, d, generator=g), dim=1).T

def by_division(scores, eps, n_iters):
    "The algorithm of the paper's appendix, in double precision"
    Q = ((scores.double()-scores.double().max())/eps).exp()
    for _ in range(n_iters):
        Q = Q/Q.sum(0)
        Q = Q/Q.sum(1, keepdim=True)
    return Q

def relative_error(dtype, B, K, eps, n_iters, spread=2.):
    """How far codes in `dtype` can be from another way to compute them, relative to their size.

    An exponent of up to spread/eps is known to a few of its own roundings. Each iteration adds sums of B and of K
    positive terms and a few products; errors of earlier iterations are scaled away with the rows and columns, and do
    not grow."""
    return rounding(dtype, int(n_iters*(B+K)+4*spread/eps+20), 1.)

@pytest.mark.parametrize('B,K', [(1,1),(1,7),(5,300),(64,16),(512,3000)])
@pytest.mark.parametrize('eps', [.03,.05,.1,1.,10.])
@pytest.mark.parametrize('n_iters', [1,3,10])
def test_equals_division(B, K, eps, n_iters):
    S = cosines(B, K)
    ref = by_division(S, eps, n_iters)
    rtol = relative_error(torch.float32, B, K, eps, n_iters)
    for bound in (1., None):
        torch.testing.assert_close(sinkhorn(S, eps, n_iters, bound=bound).double(), ref, atol=1e-30, rtol=rtol)
    Q = torch.empty_like(S)
    module._careful_codes(S, eps, n_iters, None, Q)
    torch.testing.assert_close(Q.double(), ref, atol=1e-30, rtol=rtol)

@pytest.mark.parametrize('B,K', [(2,500),(500,2),(40,40)])
@pytest.mark.parametrize('n_iters', [1,2,4,6])
@pytest.mark.parametrize('kind', ['signs','one row','one column','blocks'])
def test_equals_division_at_the_edge_without_a_scale(B, K, n_iters, kind):
    "Scores that drive `u` far, at the smallest eps for which it has no common factor"
    torch.manual_seed(0)
    S = torch.randn(B, K, dtype=torch.double).sign()
    if kind=='one row': S = torch.ones(B, K).double().index_fill_(0, torch.tensor([0]), -1.)
    if kind=='one column': S = torch.ones(B, K).double().index_fill_(1, torch.tensor([0]), -1.)
    if kind=='blocks': S = 1-2.*((torch.arange(B)[:,None]<B//2)==(torch.arange(K)<K//2)).double()
    eps = 2/(67.99-n_iters*math.log(max(B, K)))
    ref = by_division(S, eps, n_iters)
    torch.testing.assert_close(sinkhorn(S.float(), eps, n_iters, bound=1.).double(), ref, atol=1e-16,
                               rtol=relative_error(torch.float32, B, K, eps, n_iters))

@pytest.mark.parametrize('eps', [1e-3,5e-3,.01,.02])
@pytest.mark.parametrize('n_iters', [1,3,4,5,8,30])
def test_equals_division_where_float32_would_underflow(eps, n_iters):
    S = cosines(48, 20).double()
    ref = by_division(S, eps, n_iters)
    if not ref.isfinite().all(): pytest.skip('double precision underflows here too')
    Q = torch.empty_like(S)
    module._careful_codes(S, eps, n_iters, None, Q)
    # the reference loses what is below 1e-308 of the largest exponential: a code that hangs on it may be off by more,
    # but is itself tiny
    torch.testing.assert_close(Q, ref, atol=1e-9, rtol=relative_error(torch.double, 48, 20, eps, n_iters))
    torch.testing.assert_close(sinkhorn(S.float(), eps, n_iters).double(), ref, atol=1e-9,
                               rtol=relative_error(torch.float32, 48, 20, eps, n_iters))

@fuzz(300, B=st.integers(1, 40), K=st.integers(1, 40), eps=st.floats(1e-4, 10),
      scale=st.sampled_from([1e-3,1.,100.,1e4]),
       dtype=st.sampled_from([torch.float16,torch.bfloat16,torch.float32,torch.float64]), n_iters=st.integers(1, 9),
       hard=st.booleans())
def test_finite_and_rows_sum_to_one(B, K, eps, scale, dtype, n_iters, hard):
    S = (torch.randn(B, K).clamp(-1, 1)*scale).to(dtype)
    codes = sinkhorn(S, eps, n_iters, hard=hard)
    assert codes.dtype==(torch.float64 if dtype==torch.float64 else torch.float32)
    assert codes.isfinite().all() and (codes>=0).all()
    # K quotients, added twice
    torch.testing.assert_close(codes.sum(1), torch.ones(B, dtype=codes.dtype), atol=rounding(codes.dtype, 2*K+4),
                               rtol=0)
    if hard: assert set(codes.unique().tolist())<={0.,1.}

finite_floats = {torch.float16: st.floats(width=16, allow_nan=False, allow_infinity=False),
                 torch.bfloat16: st.floats(-3e38, 3e38),
                 torch.float32: st.floats(width=32, allow_nan=False, allow_infinity=False),
                 torch.float64: st.floats(allow_nan=False, allow_infinity=False)}

@fuzz(300, data=st.data(), B=st.integers(1, 6), K=st.integers(1, 6), eps=st.floats(5e-324, 1e308),
       dtype=st.sampled_from(list(finite_floats)), n_iters=st.integers(1, 9))
def test_any_finite_score_and_any_eps(data, B, K, eps, dtype, n_iters):
    "From the smallest to the largest number of a type, and any positive eps"
    S = torch.tensor(data.draw(st.lists(st.lists(finite_floats[dtype], min_size=K, max_size=K), min_size=B,
                                        max_size=B)), dtype=torch.float64).to(dtype)
    codes = sinkhorn(S, eps, n_iters)
    assert codes.isfinite().all() and (codes>=0).all()
    torch.testing.assert_close(codes.sum(1), torch.ones(B, dtype=codes.dtype), atol=rounding(codes.dtype, 2*K+4),
                               rtol=0)

@pytest.mark.parametrize('value', [1e4,1e30,torch.finfo(torch.float32).max])
@pytest.mark.parametrize('eps', [1e-45,1e-10,2e-5,1e-4,.05,10.,1e30])
def test_constant_and_extreme_rows(value, eps):
    for S in (torch.zeros(4, 6), torch.full((4, 6), value), torch.tensor([[value,-value],[-value,value],[value,value]]),
              torch.eye(5)*value):
        codes = sinkhorn(S, eps)
        assert codes.isfinite().all() and (codes>=0).all()
        torch.testing.assert_close(codes.sum(1), torch.ones(len(S)), atol=rounding(torch.float32, 2*S.shape[1]+4),
                                   rtol=0)
    torch.testing.assert_close(sinkhorn(torch.full((4, 6), value), eps), torch.full((4, 6), 1/6),
                               atol=rounding(torch.float32, 3*10+4, 1/6), rtol=0)

@pytest.mark.parametrize('eps', [1e-10,1e-3])
def test_sharp_codes_find_the_assignment(eps):
    "A permutation is the even assignment of largest similarity, at any scale"
    order = torch.tensor([2,0,3,1])
    for size in (1.,1e30): assert torch.equal(sinkhorn(torch.eye(4)[order]*size, eps*size, 10).argmax(1), order)

def test_masses_become_even():
    S = cosines(60, 12)
    worst = [(sinkhorn(S, .05, n).sum(0)/5-1).abs().max().item() for n in (1,3,10,100)]
    assert worst==sorted(worst, reverse=True) and worst[-1]<1e-3

@pytest.mark.parametrize('bad', [float('nan'),float('inf'),-float('inf')])
@pytest.mark.parametrize('bound', [None,1.])
def test_not_finite(bad, bound):
    S = cosines(5, 7)
    S[3,2] = bad
    if bound is None or bad!=-float('inf'):
        with pytest.raises(ValueError, match='scores must be finite'): sinkhorn(S, bound=bound)

@pytest.mark.parametrize('dtype,score', [(torch.float32,-100), (torch.float64,-740)])
def test_a_promise_that_does_not_hold(dtype, score):
    "Scores beyond their bound whose exponentials are the last numbers above 0: 1/x is infinite"
    for shape in ((1,1),(2,3)):
        S = torch.full(shape, score, dtype=dtype)
        assert S.exp().min()>0 and S.exp().reciprocal().isinf().all()
        with pytest.raises(ValueError, match='within the bound of 1'): sinkhorn(S, eps=1, n_iters=1, bound=1.)

@pytest.mark.parametrize('eps', [.01,.05,.5])
def test_converges_to_optimal_transport(eps):
    S = torch.rand(40, 10, dtype=torch.double)
    plan = ot.sinkhorn(np.full(40, 1/40), np.full(10, 1/10), -S.numpy(), eps, method='sinkhorn_log', numItermax=100_000,
                       stopThr=1e-14)
    # POT stops at 1e-14
    np.testing.assert_allclose(sinkhorn(S, eps, 5000).numpy(), plan*40, atol=rounding(torch.double, 5000*50)+1e-12)
    # the fixed point depends on the exponents, known to a few roundings of 1/eps; each iteration corrects the errors of
    # those before it
    np.testing.assert_allclose(sinkhorn(S.float(), eps, 5000).numpy(), plan*40,
                               atol=rounding(torch.float32, int(50+10/eps)))

@pytest.mark.parametrize('B,K,eps', [(8,30,.05),(256,512,.05),(256,512,.1)])
def test_equals_lightly(B, K, eps):
    S = cosines(B, K)
    torch.testing.assert_close(sinkhorn(S, eps), lightly_sinkhorn(S, iterations=3, epsilon=eps), atol=1e-30,
                               rtol=2*relative_error(torch.float32, B, K, eps, 3))

def test_out_blocks_and_no_gradient(monkeypatch):
    S = cosines(50, 12).requires_grad_()
    whole = sinkhorn(S)
    assert not whole.requires_grad
    out = torch.empty(50, 12)
    assert sinkhorn(S, out=out) is out
    monkeypatch.setattr(module, '_N_CACHE', 7*12)  # seven rows a block, the last one short
    monkeypatch.setattr(module, '_n_whole', lambda: 0)
    monkeypatch.setattr(module, '_N_SHARED', 1)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 7)  # one row for each of seven threads
    torch.testing.assert_close(sinkhorn(S), whole, atol=1e-30, rtol=relative_error(torch.float32, 50, 12, .05, 3))
    torch.testing.assert_close(sinkhorn(S, eps=.01), by_division(S.detach(), .01, 3).float(), atol=1e-30,
                               rtol=relative_error(torch.float32, 50, 12, .01, 3))

def test_float32_under_autocast():
    S = cosines(50, 12)
    with torch.autocast('cpu', dtype=torch.bfloat16): codes = sinkhorn(S)
    torch.testing.assert_close(codes, sinkhorn(S), atol=0, rtol=0)

@pytest.mark.parametrize('kw,text', [(dict(eps=0), 'eps must be positive, got 0'), (dict(eps=float('nan')), 'eps'),
                                     (dict(n_iters=0), 'n_iters'),
                                     (dict(bound=-1), 'bound'), (dict(out=torch.empty(2, 2)), 'out must be')])
def test_errors(kw, text):
    with pytest.raises(ValueError, match=text): sinkhorn(torch.zeros(3, 4), **kw)
    with pytest.raises(ValueError, match=r'\(B,K\)'): sinkhorn(torch.zeros(3))
