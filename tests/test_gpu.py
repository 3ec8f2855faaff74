"""What else runs on pretended CUDA tensors, for real: `make test-gpu`, which sets SWAV_DEVICE=cuda.
`SWAV_DEVICE=cpu` tries the tests themselves.

Bounds: convolutions and products in float32 (TF32 off) add the terms of a sum in another order than a CPU; results are
compared with float64 on the CPU."""
import copy, os
import pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision

from helpers import method_cases, method_learner, rounding, small_encoder, small_learner
from test_resume import PowerCut, cut_after
from self_supervised_swav.augment import MultiCrop, get_swav_aug_pipelines
from self_supervised_swav.contrastive import info_nce, nt_xent
from self_supervised_swav.deepcluster import FeatureMemory
from self_supervised_swav.fused import FusedAugment
from self_supervised_swav.losses import swapped_loss
from self_supervised_swav.models import create_swav_model
from self_supervised_swav.queue import FeatureQueue
from self_supervised_swav.resume import ResumeTraining
from self_supervised_swav.sinkhorn import sinkhorn

pytestmark = pytest.mark.gpu
device = torch.device(os.environ.get('SWAV_DEVICE', 'cuda'))
on_cuda = pytest.mark.skipif(device.type!='cuda', reason='about CUDA alone')
f32 = torch.float32

@pytest.fixture(autouse=True)
def _exact():
    "float32 is to mean float32"
    old = torch.backends.cuda.matmul.allow_tf32,torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32,torch.backends.cudnn.allow_tf32 = old

def cosines(*shape, d=64):
    *batch,K = shape
    a,b = torch.randn(*batch, d, dtype=torch.double),torch.randn(K, d, dtype=torch.double)
    return F.normalize(a, dim=-1)@F.normalize(b, dim=1).T

def value_and_grad(f, x):
    x = x.detach().clone().requires_grad_()
    y = f(x)
    return y.detach(),torch.autograd.grad(y, x)[0]

# --- mathematics ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('B,K', [(1,1), (8,30), (512,3000), (5000,300)])
@pytest.mark.parametrize('eps,bound', [(.05,1.), (.05,None), (.003,None)])  # plain, looked at, where float32 underflows
def test_sinkhorn(B, K, eps, bound):
    S = cosines(B, K).float()
    codes = sinkhorn(S.to(device), eps=eps, bound=bound)
    assert codes.device.type==device.type and codes.dtype==f32
    # exponents of up to 2/eps, and three iterations of sums over B and K positive terms
    tol = dict(rtol=rounding(f32, 2*3*(B+K+int(24/eps)+8)), atol=torch.finfo(f32).tiny*(B*K)**3)
    torch.testing.assert_close(codes.double().cpu(), sinkhorn(S.double(), eps=eps), **tol)
    assert torch.equal(sinkhorn(S.to(device), eps=eps, bound=bound, hard=True).sum(1).cpu(), torch.ones(B))

@pytest.mark.parametrize('V,B,K', [(2,1,3), (8,32,300), (8,256,3000)])
@pytest.mark.parametrize('bound', [1., None])
def test_swapped_loss(V, B, K, bound):
    S,codes = cosines(V, B, K),torch.rand(2, B, K, dtype=torch.double).mul_(5).softmax(-1)
    want = value_and_grad(lambda s: swapped_loss(s, codes, (0,1)), S)
    q = codes.float().to(device)
    got = value_and_grad(lambda s: swapped_loss(s, q, (0,1), bound=bound), S.float().to(device))
    for a,b in zip(got, want):  # sums of K terms, exponents of up to 10
        torch.testing.assert_close(a.double().cpu(), b, rtol=rounding(f32, K+60),
                                   atol=rounding(f32, K+60, b.abs().max().item()))

@pytest.mark.parametrize('N', [4, 300])
@pytest.mark.parametrize('name', ['nt_xent','info_nce'])
def test_contrastive_losses(name, N):
    z,keys,queue = (F.normalize(torch.randn(*s, dtype=torch.double), dim=-1) for s in ((2,N,32), (N,32), (500,32)))
    def loss_and_grad(cast):
        if name=='nt_xent': return value_and_grad(lambda x: nt_xent(x, .1), cast(z))
        return value_and_grad(lambda x: info_nce(x, cast(keys), cast(queue), .1), cast(z[0]))
    got,want = loss_and_grad(lambda x: x.float().to(device)),loss_and_grad(lambda x: x)
    for a,b in zip(got, want):  # scores are sums of 32 products over a temperature, a row has at most 800 of them
        torch.testing.assert_close(a.double().cpu(), b, rtol=rounding(f32, 2000),
                                   atol=rounding(f32, 2000, b.abs().max().item()))

@on_cuda
def test_memory_of_deepcluster():
    "Embeddings that are still on the way are there when somebody asks"
    memory,x = FeatureMemory(2, 50, 4),torch.randn(2, 50, 4)
    for i,idxs in enumerate(torch.randperm(50).split(8)):
        memory.put(idxs, x[:,idxs].to(device).mul_(1.))
        if i==2: assert torch.equal(memory.get(1)[1], x[1,memory.seen])
    assert memory.seen.all() and torch.equal(memory.features, x)

def test_queue():
    queue,want = FeatureQueue(2, 7, 3).to(device),FeatureQueue(2, 7, 3)
    for n in (3,5,0,20):
        x = torch.randn(2, n, 3)
        queue.push(x.to(device))
        want.push(x)
    assert torch.equal(queue.features.cpu(), want.features) and queue.full

# --- crops ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('c,size,rotate,gamma', [(3,64,0.,0.), (1,16,0.,.8), (3,33,.5,0.)])
def test_crops_are_the_cpus(c, size, rotate, gamma):
    "The same parameters give the same crops"
    x = torch.rand(8, c, 80, 100)
    aug = FusedAugment(size, rotate_p=rotate, stats=([.5]*c, [.25]*c), gamma_p=gamma, gamma_range=(1.,2.5))
    params = aug.draw(x.shape, 2)
    want,got = aug(x, params=copy.deepcopy(params)),aug(x.to(device), params=params)
    assert got.device.type==device.type
    # a pixel is two weighted sums of at most 100 pixels, a blur's of 33, and a product with colors whose factors reach
    # 1.8**3 and 1/std; a rotation reads at coordinates that are rounded, and a pixel's neighbor can be 1 away
    # a power of a number below 1 has a slope of at most 2.5
    size = 1.8**3/.25*(1 if rotate==0 else 100)*(1 if gamma==0 else 2.5)
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=rounding(f32, 300, size))

def test_multi_crop():
    views = MultiCrop(get_swav_aug_pipelines(num_crops=(2,4), crop_sizes=(64,32)))
    crops = views.cut(torch.rand(16, 3, 96, 96, device=device))
    assert [tuple(o.shape[-2:]) for o in crops]==[(64,64)]*2+[(32,32)]*4
    assert all(o.device.type==device.type and o.isfinite().all() for o in crops)

# --- fits -------------------------------------------------------------------------------------------------------------
def on_device(learn):
    "The same Learner with its data on the device; fastai moves the model"
    learn.dls.to(device)
    return learn

def finite(learn): return all(p.isfinite().all() for p in learn.model.parameters())

@pytest.mark.parametrize('case', method_cases)
def test_fit(case):
    learn = on_device(method_learner(case))
    before = [p.clone() for p in learn.model.parameters()]
    learn.fit(2, 1e-3)
    assert finite(learn) and {p.device.type for p in learn.model.parameters()}=={device.type}
    assert any(not torch.equal(a.to(device), b) for a,b in zip(before, learn.model.parameters()))
    assert torch.isfinite(torch.stack(learn.recorder.losses)).all()

def test_step_is_the_cpus():
    "The same crops and weights give the same loss and gradient"
    model = create_swav_model(small_encoder().double().eval(), hidden_size=16, projection_size=8, n_protos=20, bn=False)
    crops = [torch.rand(6, 1, 16, 16) for _ in range(2)] + [torch.rand(6, 1, 10, 10)]
    def run(model, crops):
        scores = model(crops)[1].unflatten(0, (3,-1))
        loss = swapped_loss(scores, sinkhorn(scores[0].detach())[None], (0,))
        loss.backward()
        return [loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])]
    want = run(copy.deepcopy(model), [o.double() for o in crops])
    got = run(model.float().to(device), [o.to(device) for o in crops])
    # ten layers of sums of at most 16*9 products there and back, and one of at most 6*3*64 terms for each weight
    for a,b in zip(got, want):
        torch.testing.assert_close(a.double().cpu(), b, rtol=0,
                                   atol=rounding(f32, 20*16*9+6*3*64, b.abs().max().item()))

@pytest.mark.parametrize('precision', [pytest.param('fp16', marks=on_cuda), 'bf16'])
@pytest.mark.parametrize('K', [None,24])
def test_mixed_precision(precision, K):
    class Look(Callback):
        order = 50
        def before_fit(self): self.types = set()
        def after_loss(self): self.types |= {self.swav.codes.dtype,self.loss.dtype,self.pred[1].dtype}
    learn = on_device(small_learner(K=K, queue_start_pct=0., cbs=[Look()]))
    if device.type=='cuda': learn.add_cb(MixedPrecision(amp_mode=precision))
    learn.fit(2, 1e-3)
    assert learn.look.types=={f32} and finite(learn)

@on_cuda
def test_compiled_encoder():
    learn = on_device(small_learner())
    learn.model.to(device)
    learn.model.encoder = torch.compile(learn.model.encoder)
    learn.fit(1, 1e-3)
    assert finite(learn)

@pytest.mark.parametrize('K', [None,24])
def test_resume(tmp_path, K, monkeypatch):
    "Stopping and resuming gives the same bits on one device, where the device's own algorithms do"
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    def make(name):
        return on_device(small_learner(K=K, queue_start_pct=0., cbs=[ResumeTraining(tmp_path/name, every=2)]))
    whole = make('whole')
    whole.fit(3, 1e-3)
    first = make('cut')
    cut_after(first, len(first.dls.train)+len(first.dls.valid)+3)
    with pytest.raises(PowerCut): first.fit(3, 1e-3)
    again = make('cut')
    again.fit(3, 1e-3)
    a,b = whole.model.state_dict(),again.model.state_dict()
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

class NoSync(Callback):
    "From the crops to the optimizer's step, nothing waits for the device"
    order = -100
    def before_batch(self):
        if self.train_iter>1: torch.cuda.set_sync_debug_mode('error')

class SyncAgain(Callback):
    "Before fastai's Recorder, which reads the loss"
    order = 49
    def after_batch(self): torch.cuda.set_sync_debug_mode('default')

@on_cuda
@pytest.mark.parametrize('case', method_cases)
def test_no_synchronization(case):
    learn = on_device(method_learner(case, cbs=[NoSync(), SyncAgain()]))
    try: learn.fit(1, 1e-3)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert finite(learn)

# --- several GPUs -----------------------------------------------------------------------------------------------------
@pytest.mark.skipif(torch.cuda.device_count()<2, reason='needs two GPUs')
@pytest.mark.parametrize('K', [None,20])
def test_ranks_equal_one_process(K, tmp_path):
    from test_distributed import check_fit
    check_fit([4,8], K, None, tmp_path, device='cuda')
