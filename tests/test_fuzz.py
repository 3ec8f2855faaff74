"Formulas, queue and k-means with any arguments: the invariants hold, or an error names the argument"
import math
import torch, torch.nn.functional as F
from hypothesis import strategies as st
from fuzz import called, counts, fuzz, numbers, tensors
from helpers import rounding
from self_supervised_swav.contrastive import info_nce, nt_xent
from self_supervised_swav.kmeans import spherical_kmeans
from self_supervised_swav.losses import swapped_loss
from self_supervised_swav.queue import FeatureQueue
from self_supervised_swav.sinkhorn import sinkhorn

def is_codes(q):
    return q.isfinite().all() and (q>=0).all() and ((q.sum(1)-1).abs()<=rounding(q.dtype, 2*q.shape[1]+4)).all()


@fuzz(200, scores=tensors(2, most=9), eps=numbers, n_iters=counts, hard=st.booleans(),
      bound=st.one_of(st.none(), numbers))
def test_sinkhorn(scores, eps, n_iters, hard, bound):
    before = scores.clone()
    codes = called(sinkhorn, scores, eps, n_iters, hard, bound)
    assert torch.equal(scores.nan_to_num(7), before.nan_to_num(7))
    if codes is None: return
    assert codes.dtype==(torch.float64 if scores.dtype==torch.float64 else torch.float32)
    assert codes.shape==scores.shape and is_codes(codes)
    if bound is None: assert scores.isfinite().all()
    else: assert scores.isfinite().logical_or(codes==0).all()   # with a bound nobody looks: -inf is a code of zero

def softmax_loss(scores, codes, ids, temp):
    "The definition, in float64"
    log_p,q = (scores.double()/temp).log_softmax(-1),codes.double()
    pairs = [-(q[i]*log_p[v]).sum(-1).mean() for i,a in enumerate(ids) for v in range(len(scores)) if v!=a]
    return sum(pairs)/len(pairs)

@st.composite
def swapped(draw):
    V,B,K = (draw(st.integers(int(draw(st.integers(0, 9))>0), 5)) for _ in range(3))
    ids = draw(st.lists(st.integers(-1, 5), max_size=4)) if draw(st.integers(0, 4))==0 else list(range(max(1, V-1)))
    scores = draw(tensors(shape=(V,B,K)) if draw(st.integers(0, 5)) else tensors(3))
    codes = draw(tensors(shape=(len(ids),B,K)) if draw(st.integers(0, 5)) else tensors(3))
    if draw(st.booleans()) and codes.is_floating_point() and codes.numel():
        codes = codes.float().nan_to_num().clamp(-9, 9).softmax(-1)
    return scores,codes,ids

@fuzz(200, args=swapped(), temp=numbers, bound=st.one_of(st.none(), numbers))
def test_swapped_loss(args, temp, bound):
    scores,codes,ids = args
    if scores.is_floating_point(): scores.requires_grad_()
    loss = called(swapped_loss, scores, codes, ids, temp, bound)
    if loss is None: return
    dtype = torch.float64 if scores.dtype==torch.float64 else torch.float32
    assert loss.ndim==0 and loss.dtype==dtype
    if not (scores.isfinite().all() and codes.isfinite().all()): return
    most = scores.detach().double().abs().max().item()
    if bound is not None and bound<most: return               # what was promised does not hold
    want = softmax_loss(scores.detach(), codes, ids, temp)
    size = max(1., most/temp, math.log(scores.shape[2]))*max(1, codes.double().abs().sum(-1).max().item())*len(ids)
    if size<torch.finfo(dtype).max/1e3: assert abs(loss.double()-want)<=rounding(dtype, 4*sum(scores.shape)+20, size)
    steepest = 2*codes.double().abs().sum(-1).max().item()*len(ids)/temp  # which the type may not hold
    if scores.requires_grad and size<1e30 and steepest<torch.finfo(scores.dtype).max:
        loss.backward()
        assert scores.grad.isfinite().all() and scores.grad.dtype==scores.dtype

@st.composite
def contrasted(draw):
    V,B,d,A,K = (draw(st.integers(int(draw(st.integers(0, 9))>0), 5)) for _ in range(5))
    def any_of(*shape): return draw(tensors(shape=shape) if draw(st.integers(0, 6)) else tensors(len(shape)))
    ids = draw(st.lists(st.integers(-1, 5), max_size=4)) if draw(st.integers(0, 3))==0 else None
    flat = draw(st.integers(0, 4))==0
    q,k,n = (any_of(B,d),any_of(B,d),any_of(K,d)) if flat else (any_of(V,B,d),any_of(A,B,d),any_of(A,K,d))
    def unit(o): return F.normalize(o.float().nan_to_num(), dim=-1) if o.is_floating_point() else o
    if draw(st.booleans()): k,n = unit(k),unit(n)
    return q,k,n,ids

def has_finite_grad(x, temp):
    "Where its type can hold it: the cosine of a row r changes by up to 1/|r|, and the loss by twice that over `temp`"
    least = torch.where(x==0, torch.inf, x.detach().double().abs()).min().item()  # a row of zeros: torch takes 1e-12
    if (x==0).all(-1).any(): least = 1e-12
    return x.grad.isfinite().all() or 2*len(x)/min(temp, 1)/min(least, 1)>torch.finfo(x.dtype).max

def is_unit(x): return x.is_floating_point() and ((x.double().norm(dim=-1)-1).abs()<1e-2).all()

@fuzz(200, args=contrasted(), temp=numbers)
def test_info_nce(args, temp):
    q,k,n,ids = args
    if q.is_floating_point(): q.requires_grad_()
    loss = called(info_nce, q, k, n, temp, ids)
    if loss is None: return
    assert loss.ndim==0 and loss.dtype==(torch.float64 if q.dtype==torch.float64 else torch.float32)
    if not (q.isfinite().all() and is_unit(k) and is_unit(n)): return
    if temp>1e-30: assert loss.isfinite() and loss>=0
    loss.backward()
    assert has_finite_grad(q, temp)

@fuzz(200, args=contrasted(), temp=numbers)
def test_nt_xent(args, temp):
    z,_,_,ids = args
    if z.is_floating_point(): z.requires_grad_()
    loss = called(nt_xent, z, temp, (0,1) if ids is None else ids)
    if loss is None: return
    assert loss.ndim==0 and loss.dtype==(torch.float64 if z.dtype==torch.float64 else torch.float32)
    if not z.isfinite().all(): return
    if temp>1e-30: assert loss.isfinite() and loss>=0
    loss.backward()
    assert has_finite_grad(z, temp)

@fuzz(200, x=tensors(2, most=9), k=counts, n_iters=counts, given=st.booleans(), init=tensors(2, most=9),
      seed=st.integers(0, 9))
def test_kmeans(x, k, n_iters, given, init, seed):
    if given and type(k) is int and k>0 and x.ndim==2:
        init = torch.randn(k, x.shape[1])
    res = called(spherical_kmeans, x, k, n_iters, init if given else None, seed)
    if res is None: return
    protos,nearest,cosines = res
    assert protos.shape==(k,x.shape[1]) and nearest.shape==cosines.shape==(len(x),) and x.isfinite().all()
    assert not len(x) or 0<=nearest.min() and nearest.max()<k
    if is_unit(x) and not given: assert protos.isfinite().all() and cosines.abs().max()<1.1

@fuzz(200, sizes=st.tuples(counts, counts, counts), pushes=st.lists(tensors(3), max_size=4), fitting=st.booleans())
def test_queue(sizes, pushes, fitting):
    q = called(FeatureQueue, *sizes)
    if q is None: return
    for x in pushes:
        if fitting: x = torch.randn(sizes[0], x.shape[0] if x.ndim else 0, sizes[2])
        before,n = q.features.clone(),q.n_pushed
        called(q.push, x)
        fits = x.ndim==3 and x.shape[::2]==before.shape[::2] and q.length>0 and not x.is_complex()
        assert q.n_pushed==n+(x.shape[1] if fits else 0)
        if not fits: torch.testing.assert_close(q.features, before, rtol=0, atol=0, equal_nan=True)
    assert q.features.shape==tuple(sizes)
