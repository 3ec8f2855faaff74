"The swapped loss against its definition, against lightly, and its gradient."
import pytest, torch
from hypothesis import strategies as st
from lightly.loss import SwaVLoss
from fuzz import fuzz
from helpers import rounding
from self_supervised_swav import losses
from self_supervised_swav.losses import swapped_loss
from self_supervised_swav.sinkhorn import sinkhorn

def by_pairs(scores, codes, ids, temp):
    logp = (scores/temp).log_softmax(-1)
    pairs = [(a,v) for a,i in enumerate(ids) for v in range(len(scores)) if v!=i]
    return sum(-(codes[a]*logp[v]).sum(-1).mean() for a,v in pairs)/len(pairs)

def loss_and_grad(f, scores):
    s = scores.clone().requires_grad_()
    loss = f(s)
    loss.backward()
    return loss.detach(),s.grad

@fuzz(100, V=st.integers(2, 6), B=st.integers(1, 9), K=st.integers(1, 20), temp=st.floats(.01, 2),
      bounded=st.booleans(), data=st.data())
def test_equals_pairs(V, B, K, temp, bounded, data):
    ids = data.draw(st.lists(st.integers(0, V-1), min_size=1, max_size=V, unique=True))
    # rows need not sum to 1
    scores,codes = torch.randn(V, B, K, dtype=torch.double),torch.rand(len(ids), B, K, dtype=torch.double)
    bound = scores.abs().max().item() if bounded else None
    for a,b in zip(loss_and_grad(lambda s: swapped_loss(s, codes, ids, temp, bound), scores),
                   loss_and_grad(lambda s: by_pairs(s, codes, ids, temp), scores)):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)

@pytest.mark.parametrize('V,ids', [(2,[0,1]),(2,[1]),(3,[2]),(4,[3,0]),(3,[0,1,2])])
def test_gradcheck(V, ids):
    scores = torch.randn(V, 3, 5, dtype=torch.double, requires_grad=True)
    codes = torch.rand(len(ids), 3, 5, dtype=torch.double).softmax(-1)
    assert torch.autograd.gradcheck(lambda s: swapped_loss(s, codes, ids, .3), scores)

@pytest.mark.parametrize('n_queue', [0,40])
def test_equals_lightly(n_queue):
    "Same codes (1e-6), loss and gradient (1e-5) on the same scores, queue rows included"
    V,B,K = 5,16,24
    scores,queue = torch.rand(V, B, K)*2-1,[torch.rand(n_queue, K)*2-1 for _ in range(2)]
    ref = SwaVLoss(temperature=.1, sinkhorn_iterations=3, sinkhorn_epsilon=.05)
    def theirs(s): return ref([s[0],s[1]], list(s[2:]), queue_outputs=queue if n_queue else None).squeeze()
    def ours(s):
        codes = torch.stack([sinkhorn(torch.cat([s[i].detach(), queue[i]]))[:B] for i in (0,1)])
        return swapped_loss(s, codes, (0,1), .1)
    # scores/temp up to 10, sums of K terms
    for a,b in zip(loss_and_grad(ours, scores), loss_and_grad(theirs, scores)):
        torch.testing.assert_close(a, b.view_as(a), atol=rounding(torch.float32, K+20, 1/.1), rtol=0)

def test_retained_graph_and_second_derivative():
    scores,codes = torch.randn(4, 10, 6),torch.rand(2, 10, 6).softmax(-1)
    s = scores.clone().requires_grad_()
    loss = swapped_loss(s, codes, (0,1))
    first, = torch.autograd.grad(loss, s, retain_graph=True)
    again, = torch.autograd.grad(2*loss, s)
    torch.testing.assert_close(again, 2*first)
    g, = torch.autograd.grad(swapped_loss(s, codes, (0,1)), s, create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative'): g.sum().backward()

@pytest.mark.parametrize('temp', [.02,.025,.1])  # e^50 is past the range in which the bound helps, e^40 is its end
def test_bound_is_as_exact(temp):
    "Scores at both ends of the bound, in float32, against float64"
    scores,codes = torch.rand(4, 10, 300)*2-1,torch.rand(2, 10, 300).mul_(5).softmax(-1)
    scores[0,0],scores[1,1] = -1.,1.
    scores[2,2] = -1.
    scores[2,2,0] = 1.
    want = loss_and_grad(lambda s: by_pairs(s, codes.double(), (0,1), temp), scores.double())
    for bound in (None,1.):
        got = loss_and_grad(lambda s: swapped_loss(s, codes, (0,1), temp, bound), scores)
        # exponents up to 1/temp are known to a few of their roundings, and there are sums of 300 terms
        for a,b in zip(got, want):
            torch.testing.assert_close(a.double(), b, atol=1e-7, rtol=rounding(torch.float32, int(300+4/temp+20)))

def test_float32_from_half_and_no_gradient_to_codes():
    scores,codes = torch.randn(3, 4, 5),torch.rand(2, 4, 5, requires_grad=True)
    s = scores.half().requires_grad_()
    loss = swapped_loss(s, codes, (0,1))
    assert loss.dtype==torch.float32
    loss.backward()
    assert s.grad.dtype==torch.float16 and codes.grad is None
    assert swapped_loss(torch.full((2,1,3), 1e4), torch.rand(2,1,3), (0,1), temp=.01).isfinite()

@pytest.mark.parametrize('kw,text', [(dict(temp=0), 'temp must be positive, at least 1e-30, got 0'),
                                     (dict(assign_ids=[0,0]), 'different'), (dict(assign_ids=[0,5]), 'indices'),
                                     (dict(assign_ids=[]), 'indices'), (dict(bound=0), 'bound must be positive, got 0'),
                                     (dict(assign_ids=[0]), 'codes must have the shape')])
def test_errors(kw, text):
    kw = dict(scores=torch.zeros(3,2,4), codes=torch.ones(2,2,4), assign_ids=[0,1])|kw
    with pytest.raises(ValueError, match=text): swapped_loss(**kw)
    with pytest.raises(ValueError, match='at least two crops'): swapped_loss(torch.zeros(1,2,4), torch.ones(1,2,4), [0])
    for shape in ((3,0,4),(3,2,0)):
        with pytest.raises(ValueError, match='at least one image and one prototype'):
            swapped_loss(torch.zeros(shape), torch.ones(2, *shape[1:]), [0,1])
    with pytest.raises(ValueError, match='real numbers'):
        swapped_loss(torch.zeros(3, 2, 4, dtype=torch.cfloat), torch.ones(2,2,4), [0,1])

@fuzz(200, V=st.integers(2, 5), B=st.integers(1, 7), K=st.integers(1, 9), log_temp=st.floats(-30, 30),
       log_size=st.floats(-30, 30), dtype=st.sampled_from([torch.float32, torch.float64]),
       strided=st.booleans(), equal=st.booleans(), data=st.data())
def test_any_scores(V, B, K, log_temp, log_size, dtype, strided, equal, data):
    "Scores and temperatures of any size: the definition's value in float64, and inf only where float32 ends"
    ids = data.draw(st.lists(st.integers(0, V-1), min_size=1, max_size=V, unique=True))
    size,temp = 10**log_size,10**log_temp
    scores = torch.zeros(V, B, K, dtype=dtype) if equal else torch.randn(V, B, K, dtype=dtype)*size
    codes = torch.rand(len(ids), B, K, dtype=dtype)
    codes = codes/codes.sum(-1, keepdim=True)
    if strided: scores = scores.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    got = swapped_loss(scores, codes, ids, temp)
    want = by_pairs(scores.double(), codes.double(), ids, temp)
    # a difference of two sums of scores, in which each is known to K+V roundings; divided by temp
    error = rounding(dtype, 4*(K+V+4), max(1., scores.abs().max().item()/temp)*len(ids))
    # of one image a difference of two scores over temp is a float, and of all the sum
    largest = max(want+error, 2*scores.double().abs().max().item()/temp)
    if largest<torch.finfo(dtype).max/V: assert abs(got.double()-want)<=error
    assert not got.isnan()

@pytest.mark.parametrize('ids', [[0],[1],[0,1]])
def test_scores_beyond_float32(ids):
    "Scores over the temperature are no float any more: the loss is inf or what the other crop says, and never nan"
    scores = torch.tensor([[[0.,1e19]],[[1e19,-1e19]]])
    codes = torch.tensor([[[.3,.7]],[[.6,.4]]])[:len(ids)]
    for temp in (1e-21,1e-30): assert swapped_loss(scores, codes, ids, temp)==torch.inf
    # a mean near float32's end, whose sum over images, crops and codes is beyond it
    many,sure = scores.repeat(1, 99, 1)*2e18,torch.tensor([.3,.7]).expand(len(ids), 99, 2)
    want = by_pairs(many.double(), sure.double(), ids, 1.)
    assert want<torch.finfo(torch.float32).max<99*want
    assert abs(swapped_loss(many, sure, ids, 1.)-want)<=rounding(torch.float32, 250, 4e37)  # scores are up to 2e37
    same = scores[:1].expand(2, 1, 2)
    sure = torch.tensor([[[0.,1.]]]).expand(len(ids), 1, 2)
    assert swapped_loss(same, sure, ids, 1e-21)==0

@pytest.mark.parametrize('B', [1,7,64])
def test_blocks(B, monkeypatch):
    "Images in blocks of any size: the same loss and gradient"
    scores,codes = torch.randn(4, B, 20),torch.rand(2, B, 20).softmax(-1)
    whole = loss_and_grad(lambda s: swapped_loss(s, codes, (0,2)), scores)
    for n in (1,300,4*20*B-1):
        monkeypatch.setattr(losses, '_N_ENTRIES', n)
        loss,grad = loss_and_grad(lambda s: swapped_loss(s, codes, (0,2)), scores)
        # B*V terms are added in another order; a row's own sums may be, too
        torch.testing.assert_close(loss, whole[0], rtol=rounding(torch.float32, 4*B+40), atol=0)
        torch.testing.assert_close(grad, whole[1], rtol=rounding(torch.float32, 40, 10),
                                   atol=rounding(torch.float32, 40, 10/B))
