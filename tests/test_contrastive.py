"NT-Xent and InfoNCE against their definitions in float64, against lightly, across processes, and at extremes."
import math
import pytest, torch, torch.nn.functional as F
from hypothesis import strategies as st
from lightly.loss import NTXentLoss
from torch._subclasses import FakeTensorMode
from fuzz import fuzz
from helpers import NoWait, needs_pretended_gpu, rounding
from self_supervised_swav.collectives import world
from self_supervised_swav.contrastive import info_nce, nt_xent
from test_distributed import run_ranks

def unit(*shape, dtype=torch.double): return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)

def value_and_grads(f, *xs):
    xs = [x.detach().clone().requires_grad_() for x in xs]
    loss = f(*xs)
    return loss.detach(), torch.autograd.grad(loss, xs)

def check_equal(mine, theirs, atol):
    torch.testing.assert_close(mine[0], theirs[0], atol=atol, rtol=atol)
    for a,b in zip(mine[1], theirs[1]): torch.testing.assert_close(a, b, atol=atol, rtol=atol)

# --- definitions ----------------------------------------------------------------------------------------------------
def cross_entropy_of_pair(q, positive, negatives, temp):
    return -(torch.cat([(q@positive)[None], negatives@q])/temp).log_softmax(0)[0]

def nt_xent_by_pairs(z, temp, ids):
    z = F.normalize(z, dim=-1)
    V,B,_ = z.shape
    losses = []
    for b in range(B):
        negatives = torch.cat([z[a,[i for i in range(B) if i!=b]] for a in ids])
        losses += [cross_entropy_of_pair(z[v,b], z[a,b], negatives, temp) for v in range(V) for a in ids if a!=v]
    return torch.stack(losses).mean()

def info_nce_by_pairs(q, k, queue, temp, ids):
    q = F.normalize(q, dim=-1)
    V,B,_ = q.shape
    return torch.stack([cross_entropy_of_pair(q[v,b], k[a,b], queue[a], temp) for a,
                        i in enumerate(ids) for v in range(V) if v!=i for b in range(B)]).mean()

@fuzz(60, V=st.integers(2, 5), B=st.integers(2, 7), d=st.integers(1, 9), temp=st.floats(.005, 2), data=st.data())
def test_nt_xent_is_its_definition(V, B, d, temp, data):
    ids = data.draw(st.lists(st.integers(0, V-1), min_size=1, max_size=V, unique=True))
    z = torch.randn(V, B, d, dtype=torch.double)
    # scores up to 1/temp = 200; sums of up to V*B*d terms; the gradient divides by temp again
    atol = rounding(torch.double, V*B*d+20, 200/temp)
    check_equal(value_and_grads(lambda z: nt_xent(z, temp, ids), z),
                value_and_grads(lambda z: nt_xent_by_pairs(z, temp, ids), z), atol)

@fuzz(60, V=st.integers(2, 5), B=st.integers(1, 7), K=st.integers(1, 40), d=st.integers(1, 9), temp=st.floats(.005, 2),
       data=st.data())
def test_info_nce_is_its_definition(V, B, K, d, temp, data):
    ids = data.draw(st.lists(st.integers(0, V-1), min_size=1, max_size=V, unique=True))
    A = len(ids)
    q,k,queue = torch.randn(V, B, d, dtype=torch.double),unit(A, B, d),unit(A, K, d)
    atol = rounding(torch.double, K*d+20, 200/temp)
    check_equal(value_and_grads(lambda q: info_nce(q, k, queue, temp, ids), q),
                value_and_grads(lambda q: info_nce_by_pairs(q, k, queue, temp, ids), q), atol)

@pytest.mark.parametrize('temp', [.09,.1,.109375,.2])
def test_far_from_the_key(temp):
    "A key on the other side and one negative beside the query: ln(1+e^(2/temp)), to the last digits of float64"
    q,k = torch.ones(1, 1, dtype=torch.double),-torch.ones(1, 1, dtype=torch.double)
    loss = info_nce(q, k, -k, temp)
    # an exponent of up to 23 and its rounding, a logarithm
    assert abs(loss.item()-math.log1p(math.exp(2/temp)))<=rounding(torch.double, 20, 2/temp)

def test_gradcheck():
    z = torch.randn(4, 3, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: nt_xent(z, .3, (0,2)), z)
    k,queue = unit(2, 3, 5),unit(2, 6, 5)
    assert torch.autograd.gradcheck(lambda z: info_nce(z, k, queue, .3, (0,2)), z)

@pytest.mark.parametrize('block', [1,7,64])
def test_any_block(block, monkeypatch):
    "Blocks of one row, of a part of a crop, of several crops: the same"
    from self_supervised_swav import contrastive
    z,k,queue = torch.randn(5, 6, 4, dtype=torch.double),unit(2, 6, 4),unit(2, 11, 4)
    fs = [lambda z: nt_xent(z, .1), lambda z: info_nce(z, k, queue, .1, (0,1)),
          lambda z: info_nce(z, k, queue, .01, (0,1))]
    whole = [value_and_grads(f, z) for f in fs]
    monkeypatch.setattr(contrastive, '_n_block', block)
    for f,w in zip(fs, whole): check_equal(value_and_grads(f, z), w, rounding(torch.double, 5*6*4+20, 1e4))

def simclr_by_pseudo_code(z, temp):
    "The algorithm of SimCLR: views 2k-1 and 2k are of image k; s, then l(i,j), then the mean over all 2N"
    N = z.shape[1]
    z = z.transpose(0, 1).reshape(2*N, -1)
    s = torch.stack([torch.stack([zi@zj/(zi.norm()*zj.norm()) for zj in z]) for zi in z])
    def l(i, j): return -torch.log((s[i,j]/temp).exp()/sum((s[i,k]/temp).exp() for k in range(2*N) if k!=i))
    return sum(l(2*k, 2*k+1)+l(2*k+1, 2*k) for k in range(N))/(2*N)

@pytest.mark.parametrize('temp', [.1,.5])
def test_nt_xent_is_the_pseudo_code(temp):
    check_equal(*(value_and_grads(lambda z: f(z, temp), torch.randn(2, 5, 6, dtype=torch.double,
                                                                    generator=torch.Generator().manual_seed(0)))
                  for f in (nt_xent,simclr_by_pseudo_code)), rounding(torch.double, 100, 10/temp))

# --- lightly --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('temp', [.07,.1,.5])
def test_equals_lightly(temp):
    z = torch.randn(2, 16, 12)
    loss = NTXentLoss(temp)
    check_equal(value_and_grads(lambda z: nt_xent(z, temp), z), value_and_grads(lambda z: loss(z[0], z[1]), z), 1e-5)

@pytest.mark.parametrize('temp', [.07,.2])
def test_equals_lightly_with_memory_bank(temp):
    q,k = torch.randn(8, 12),unit(8, 12, dtype=torch.float32)
    loss = NTXentLoss(temp, memory_bank_size=(64,12))
    loss(q, k)  # makes its bank
    queue = loss.memory_bank.bank.T.clone() if loss.memory_bank.bank.shape[0]==12 else loss.memory_bank.bank.clone()
    check_equal(value_and_grads(lambda q: info_nce(q, k, queue, temp), q), value_and_grads(lambda q: loss(q, k), q),
                1e-5)

# --- processes ------------------------------------------------------------------------------------------------------
def _uneven(size): return [3,5,1,4][:size]
def _embeddings(n): return torch.randn(4, n, 6, dtype=torch.double, generator=torch.Generator().manual_seed(1))

def _part(rank, size, told):
    n = _uneven(size)
    part = slice(sum(n[:rank]), sum(n[:rank+1]))
    z = _embeddings(sum(n))[:,part].clone().requires_grad_()
    loss = nt_xent(z, .2, (0,1), world(), n if told else None)
    (loss*(n[rank]*size/sum(n))).backward()  # the weight that `MultiView` gives to uneven batches
    return loss.detach(), z.grad/size        # DistributedDataParallel takes the mean over ranks

@pytest.mark.parametrize('size,told', [pytest.param(2, True, marks=pytest.mark.slow), (3,False)])
def test_processes_equal_one(size, told, tmp_path):
    got,n = run_ranks(_part, size, tmp_path, told),_uneven(size)
    loss,(grad,) = value_and_grads(lambda z: nt_xent(z, .2), _embeddings(sum(n)))
    torch.testing.assert_close(sum(l*m for (l,_),m in zip(got, n))/sum(n), loss)
    torch.testing.assert_close(torch.cat([g for _,g in got], 1), grad)

# --- extremes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float32,torch.float64])
@pytest.mark.parametrize('temp', [1e-3,.1,100.])
def test_finite(dtype, temp):
    "Equal, opposite and enormous embeddings"
    x = torch.ones(3, 4, 5, dtype=dtype)
    x[:,1] = -1
    x[1] *= torch.finfo(dtype).max/8
    for f in (lambda z:
        nt_xent(z, temp), lambda z: info_nce(z, F.normalize(x[:1].double(), dim=-1), unit(1, 9, 5), temp, (0,))):
        loss,(grad,) = value_and_grads(f, x)
        assert loss.dtype==(torch.float64 if dtype==torch.float64 else torch.float32) and grad.dtype==dtype
        assert loss.isfinite() and grad.isfinite().all() and loss>=0

@pytest.mark.parametrize('dtype', [torch.float32,torch.float64])
@pytest.mark.parametrize('power', [-1,1])
def test_length_does_not_matter(dtype, power):
    "Only directions count, also where squares overflow or vanish"
    x = torch.randn(3, 4, 5, dtype=dtype)
    size = torch.finfo(dtype).max**(power*.9)
    # a score is a sum of d products of unit vectors; the loss adds exponents up to 1/temp = 10
    torch.testing.assert_close(nt_xent(x*size), nt_xent(x), atol=rounding(dtype, 5+20, 20), rtol=0)

def test_chance():
    "Where all is alike the loss is the logarithm of the number of candidates"
    z = torch.ones(3, 5, 4, dtype=torch.double)
    torch.testing.assert_close(nt_xent(z, .1).item(), math.log(2*4+1))
    torch.testing.assert_close(info_nce(z, z[:1]/2, z[:1].repeat(1,3,1)/2, .1, (0,)).item(), math.log(15+1))

def test_constants_have_no_gradient():
    q,k,queue = (torch.randn(n, 5, requires_grad=True) for n in (4,4,6))
    info_nce(q, k, queue).backward()
    assert q.grad is not None and k.grad is None and queue.grad is None

def test_peak_is_one_matrix():
    "No second (N,M) matrix: with small blocks, what is allocated stays below one"
    V,B,d = 2,512,8
    z = torch.randn(V, B, d, requires_grad=True)
    from torch.profiler import profile, ProfilerActivity
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: nt_xent(z, .1).backward()
    largest = max((o.self_cpu_memory_usage for o in prof.events()), default=0)
    assert largest <= 4*V*B*V*B

@pytest.mark.parametrize('f,says', [
    (lambda: nt_xent(torch.randn(2,3,4), temp=0), 'temp must be positive, from 1e-30 to 1e30, got 0'),
    (lambda: nt_xent(torch.randn(3,4)), r'embeddings must be floating point of the shape \(V,B,d\)'),
    (lambda: nt_xent(torch.randn(1,3,4), large_ids=(0,)), 'at least two crops of each image, got 1'),
    (lambda: nt_xent(torch.randn(2,1,4)), 'at least two images'),
    (lambda: nt_xent(torch.randn(2,3,4), large_ids=(0,2)), 'large_ids must be different indices of the 2 crops'),
    (lambda: nt_xent(torch.ones(2,3,4, dtype=torch.long)), 'floating point'),
    (lambda: info_nce(torch.randn(3,4), torch.randn(2,4), torch.randn(5,4)), 'keys must have the shape'),
    (lambda: info_nce(torch.randn(3,4), torch.randn(3,4), torch.randn(0,4)), 'queue must have the shape'),
    (lambda: info_nce(torch.randn(2,3,4), torch.randn(1,3,4), torch.randn(1,5,4), key_ids=(0,1)), 'key_ids must name '
                                                                                                  'the crops'),
    (lambda: info_nce(torch.randn(2,3,4), torch.randn(1,3,4), torch.randn(1,5,4), temp=-1),
     'temp must be positive, .* got -1')])
def test_bad_settings(f, says):
    with pytest.raises(ValueError, match=says): f()

# --- the device, without one ------------------------------------------------------------------------------------------
@pytest.mark.parametrize('ids', [(0,1), (2,0)])
@needs_pretended_gpu
def test_no_wait_on_a_pretended_gpu(ids):
    with FakeTensorMode(), torch.device('cuda'), NoWait():
        assert nt_xent(torch.rand(3, 8, 4), large_ids=ids).device.type=='cuda'
        assert info_nce(torch.rand(3, 8, 4), torch.rand(2, 8, 4), torch.rand(2, 20, 4), key_ids=ids).device.type=='cuda'
