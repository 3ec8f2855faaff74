"Codes: invariants at every setting, and equality with independent implementations."
import numpy as np, ot, pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
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

@pytest.mark.parametrize('B,K', [(1,1),(1,7),(5,300),(64,16),(512,3000)])
@pytest.mark.parametrize('eps', [.03,.05,.1,1.,10.])
@pytest.mark.parametrize('n_iters', [1,3,10])
def test_equals_division(B, K, eps, n_iters):
    S = cosines(B, K)
    ref = by_division(S, eps, n_iters)
    for bound in (1., None): torch.testing.assert_close(sinkhorn(S, eps, n_iters, bound=bound).double(), ref, atol=1e-6, rtol=0)
    Q = torch.empty_like(S)
    module._stable(S, eps, n_iters, 0., None, Q)
    torch.testing.assert_close(Q.double(), ref, atol=1e-6, rtol=0)

@pytest.mark.parametrize('eps', [1e-3,5e-3,.01,.02])
@pytest.mark.parametrize('n_iters', [1,3,4,5,8,30])
def test_equals_division_where_float32_would_underflow(eps, n_iters):
    S = cosines(48, 20).double()
    ref = by_division(S, eps, n_iters)
    if not ref.isfinite().all(): pytest.skip('double precision underflows here too')
    Q = torch.empty_like(S)
    module._stable(S, eps, n_iters, 0., None, Q)
    torch.testing.assert_close(Q, ref, atol=1e-9, rtol=0)
    # float32 scores are themselves only known to 6e-8, which eps multiplies
    torch.testing.assert_close(sinkhorn(S.float(), eps, n_iters).double(), ref, atol=6e-8*4/eps, rtol=0)

@given(B=st.integers(1, 40), K=st.integers(1, 40), eps=st.floats(1e-4, 10), scale=st.sampled_from([1e-3,1.,100.,1e4]),
       dtype=st.sampled_from([torch.float16,torch.bfloat16,torch.float32,torch.float64]), n_iters=st.integers(1, 9), hard=st.booleans())
@settings(max_examples=300, deadline=None)
def test_finite_and_rows_sum_to_one(B, K, eps, scale, dtype, n_iters, hard):
    S = (torch.randn(B, K).clamp(-1, 1)*scale).to(dtype)
    codes = sinkhorn(S, eps, n_iters, hard=hard)
    assert codes.dtype==(torch.float64 if dtype==torch.float64 else torch.float32)
    assert codes.isfinite().all() and (codes>=0).all()
    torch.testing.assert_close(codes.sum(1), torch.ones(B, dtype=codes.dtype), atol=1e-5, rtol=0)
    if hard: assert set(codes.unique().tolist())<={0.,1.}

def test_constant_and_extreme_rows():
    for S in (torch.zeros(4, 6), torch.full((4, 6), 1e4), torch.tensor([[1e4,-1e4],[-1e4,1e4],[1e4,1e4]])):
        for eps in (1e-4,.05,10):
            codes = sinkhorn(S, eps)
            assert codes.isfinite().all()
            torch.testing.assert_close(codes.sum(1), torch.ones(len(S)))

@pytest.mark.parametrize('eps', [.01,.05,.5])
def test_converges_to_optimal_transport(eps):
    S = torch.rand(40, 10, dtype=torch.double)
    plan = ot.sinkhorn(np.full(40, 1/40), np.full(10, 1/10), -S.numpy(), eps, method='sinkhorn_log', numItermax=100_000, stopThr=1e-14)
    np.testing.assert_allclose(sinkhorn(S, eps, 5000).numpy(), plan*40, atol=1e-10)
    np.testing.assert_allclose(sinkhorn(S.float(), eps, 5000).numpy(), plan*40, atol=1e-6*max(1, 1/eps))

@pytest.mark.parametrize('B,K,eps', [(8,30,.05),(256,512,.05),(256,512,.1)])
def test_equals_lightly(B, K, eps):
    S = cosines(B, K)
    torch.testing.assert_close(sinkhorn(S, eps), lightly_sinkhorn(S, iterations=3, epsilon=eps), atol=1e-6, rtol=0)

def test_out_blocks_and_no_gradient(monkeypatch):
    S = cosines(50, 12).requires_grad_()
    whole = sinkhorn(S)
    assert not whole.requires_grad
    out = torch.empty(50, 12)
    assert sinkhorn(S, out=out) is out
    monkeypatch.setattr(module, '_N_CACHE', 7*12)  # seven rows a block, the last one short
    monkeypatch.setattr(module, '_N_WHOLE', 0)
    torch.testing.assert_close(sinkhorn(S), whole, atol=1e-7, rtol=0)
    torch.testing.assert_close(sinkhorn(S, eps=.01), by_division(S.detach(), .01, 3).float(), atol=1e-4, rtol=0)

def test_float32_under_autocast():
    S = cosines(50, 12)
    with torch.autocast('cpu', dtype=torch.bfloat16): codes = sinkhorn(S)
    torch.testing.assert_close(codes, sinkhorn(S), atol=0, rtol=0)

@pytest.mark.parametrize('kw,text', [(dict(eps=0), 'eps must be positive, got 0'), (dict(eps=float('nan')), 'eps'), (dict(n_iters=0), 'n_iters'),
                                     (dict(bound=-1), 'bound'), (dict(out=torch.empty(2, 2)), 'out must be')])
def test_errors(kw, text):
    with pytest.raises(ValueError, match=text): sinkhorn(torch.zeros(3, 4), **kw)
    with pytest.raises(ValueError, match=r'\(B,K\)'): sinkhorn(torch.zeros(3))
