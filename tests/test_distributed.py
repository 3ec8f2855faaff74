"""Two, three and four processes do what one does with their joined batches: codes, loss, gradient, queue, weights; and
none waits for a rank that is gone.

The ranks are forked from a server that has imported everything once. Whole scripts under `torchrun` are at the end."""
import os, signal, subprocess, sys, time
from datetime import timedelta
from pathlib import Path
import multiprocessing as mp, numpy as np, pytest, torch
import torch.distributed as dist
from fastai.vision.all import Callback, DataLoaders, GradientAccumulation, Learner, Pipeline, SGD, Transform
from torch import nn
from helpers import rounding
from self_supervised_swav.collectives import exchange, gather_rows, leave, share, world
from self_supervised_swav.data import tensor_dls
from self_supervised_swav.distributed import DistributedDL
from self_supervised_swav.models import create_swav_model
from self_supervised_swav.queue import FeatureQueue
from self_supervised_swav.sinkhorn import sinkhorn
from self_supervised_swav.swav import SWAV

# --- ranks ------------------------------------------------------------------------------------------------------------
ctx = mp.get_context('forkserver')
ctx.set_forkserver_preload(['self_supervised_swav.all', 'self_supervised_swav.distributed', 'helpers'])

def _rank(f, rank, size, folder, args, device):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
                      MASTER_ADDR='127.0.0.1', OMP_NUM_THREADS='1')
    torch.set_num_threads(1)
    if device=='cuda':
        torch.cuda.set_device(rank)
        torch.backends.cudnn.allow_tf32 = False  # float32 is to mean float32
    dist.init_process_group('nccl' if device=='cuda' else 'gloo', init_method=f'file://{folder}/store',
                            rank=rank, world_size=size, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    torch.save(f(rank, size, *args), f'{folder}/{rank}.pth')
    dist.barrier()
    leave()

def start(f, size, folder, *args, device='cpu'):
    ps = [ctx.Process(target=_rank, args=(f, r, size, folder, args, device)) for r in range(size)]
    for p in ps: p.start()
    return ps

def run_ranks(f, size, folder, *args, device='cpu'):
    "What `f(rank, size, *args)` returns on each of `size` ranks"
    ps = start(f, size, folder, *args, device=device)
    for p in ps: p.join(100)
    codes = [p.exitcode for p in ps]
    for p in ps: p.kill()
    assert codes==[0]*size, codes
    return [torch.load(f'{folder}/{r}.pth', weights_only=False, map_location='cpu') for r in range(size)]

# --- messages, codes, queue -------------------------------------------------------------------------------------------
def _uneven(size): return [3,5,1,4][:size]
def _scores(): return torch.linspace(-1, 1, 13*6).mul(37).sin().view(13, 6)

def _pieces(rank, size):
    group,n = world(),_uneven(size)
    mine = slice(sum(n[:rank]), sum(n[:rank+1]))
    rows = gather_rows(_scores()[None,mine], n, group)
    queue = FeatureQueue(1, 7, 6)
    if rank==0: queue.push(torch.ones(1, 3, 6))
    queue.share_first(group)
    for sizes in (n, None): queue.push(_scores()[None,mine], group, sizes)
    codes = {(eps,hard,bound): sinkhorn(_scores()[mine], eps=eps, hard=hard, bound=bound, group=group)
             for eps in (1e-3,.05,1.) for hard in (False,True) for bound in (None,1.)}
    return dict(said=exchange(rank, rank**2, device='cpu', group=group), rows=rows, share=share(10, group),
                queue=queue.features, n_pushed=queue.n_pushed, codes=codes)

@pytest.mark.parametrize('size', [2,3])
def test_pieces(size, tmp_path):
    got,n = run_ranks(_pieces, size, tmp_path),_uneven(size)
    rows = _scores()[:sum(n)]
    queue = FeatureQueue(1, 7, 6)
    for x in (torch.ones(3, 6), rows, rows): queue.push(x[None])
    for g in got:
        assert g['said']==[[r,r**2] for r in range(size)]
        assert torch.equal(g['rows'][0], rows)
        assert torch.equal(g['queue'], queue.features) and g['n_pushed']==queue.n_pushed
    assert [i for g in got for i in range(10)[g['share']]]==list(range(10))
    for (eps,hard,bound),_ in got[0]['codes'].items():
        codes = torch.cat([g['codes'][eps,hard,bound] for g in got])
        # exponents up to 2/eps, then three iterations of sums over 13 rows and 6 columns
        tol = rounding(torch.float32, int(2/eps)+3*(13+6))
        torch.testing.assert_close(codes, sinkhorn(rows, eps=eps, hard=hard, bound=bound), atol=tol, rtol=0)

# --- whole fits -------------------------------------------------------------------------------------------------------
class Cut(Transform):
    "The same part of every image"
    split_idx = 0
    def __init__(self, i, size): self.part = (slice(None), slice(None), slice(i, i+size), slice(i, i+size))
    def encodes(self, x:torch.Tensor): return x[self.part]

class Parts(DistributedDL):
    "Ranks that hold `sizes` rows of each batch"
    def __init__(self, dl, sizes, rank):
        super().__init__(dl.new(bs=sizes[rank], shuffle=False, drop_last=False), rank, len(sizes))
        self.sizes = sizes
    def __len__(self): return len(self.dl.dataset)//sum(self.sizes)
    def get_idxs(self):
        n,first = self.sizes[self.rank],sum(self.sizes[:self.rank])
        return [s*sum(self.sizes)+first+i for s in range(len(self)) for i in range(n)]

class Watch(Callback):
    "What each step saw"
    order = 100
    def before_fit(self): self.seen = []
    def after_loss(self):
        if not self.training: return
        self.seen.append(dict(codes=self.swav.codes.clone(), loss=self.learn.to_detach(self.loss),
                              used=self.swav.uses_queue))
    def before_step(self):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.model.parameters()]
        if self.training: self.seen[-1]['grad'] = torch.cat([g.flatten().clone() for g in grads])

def ranks_learner(sizes, rank=0, K=None, cbs=(), n=60, device='cpu', dtype=torch.float32):
    "Deterministic crops, batches of `sum(sizes)` in a fixed order, no batch norm"
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Conv2d(6, 8, 3), nn.Tanh(),
                            nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = create_swav_model(encoder, hidden_size=16, projection_size=8, n_protos=12, bn=False).to(dtype)
    x = torch.linspace(0, 1, n*144, dtype=dtype).mul(99991).sin().abs().view(n, 1, 12, 12)
    dls = tensor_dls(x, bs=sum(sizes), splits=(range(48), range(48,60)), device=device, num_workers=0)
    def part(dl):
        return Parts(dl, sizes, rank) if len(sizes)>1 else dl.new(bs=sum(sizes), shuffle=False, drop_last=False)
    augs = [Pipeline([Cut(i, s)], split_idx=0) for i,s in ((0,10),(2,10),(3,7))]
    swav = SWAV(augs, K=K, queue_start_pct=.3, freeze_protos_pct=.25, eps=.1)
    learn = Learner(DataLoaders(*map(part, dls.loaders), device=device), model, opt_func=SGD, lr=.05,
                    cbs=[swav, Watch(), *cbs])
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn

def fit_result(learn):
    return dict(seen=learn.watch.seen, queue=learn.model.queue.features, n_pushed=learn.model.queue.n_pushed,
                losses=torch.stack(learn.recorder.losses), valid=learn.recorder.values[-1],
                weights=torch.cat([p.detach().flatten() for p in learn.model.parameters()]))

def _fit(rank, size, sizes, K, acc, device):
    cbs = [GradientAccumulation(acc*sizes[rank])] if acc else []
    learn = ranks_learner(sizes, rank, K, cbs, device=f'cuda:{rank}' if device=='cuda' else device,
                          dtype=torch.float64)
    with learn.distrib_ctx(sync_bn=False):
        learn.fit(1)
        learn.fit(1)
        res = fit_result(learn)
    return res | dict(unwrapped=type(learn.model).__name__, trainer=hasattr(learn, 'distributed_trainer'))

# values that one step adds up for one of its results, one sum after the other: two convolutions (9 and 54 terms) and a
# mean over at most 64 pixels, twice because of the backward pass; layers of 8, 16 and 8 inputs, three crops of at most
# 13 images, 3 iterations of Sinkhorn over 13+20 rows and 12 columns after exponents up to 1/eps
terms_of_a_step = 2*(9+54+64) + 8+16+8 + 3*13 + 3*(33+12) + 10

def close_after(steps, a, b, name):
    """Do `a` and `b` differ by no more than the rounding of `steps` steps, in proportion to the largest value? A step
    may pass on an error of the one before it to several weights: room for a factor of ten, little in float64"""
    a,b = (torch.as_tensor(o).cpu() for o in (a,b))
    if a.numel()==b.numel()==0: return
    size = b.abs().max().item()
    tol = rounding(torch.float64, 10*terms_of_a_step*steps, size)
    if b.dtype==torch.float32: tol += rounding(torch.float32, 3*steps, size)  # fastai's Recorder keeps float32
    torch.testing.assert_close(a, b, atol=tol, rtol=0, check_dtype=False, msg=lambda m: f'{name}: {m}')

def check_fit(sizes, K, acc, tmp_path, device='cpu'):
    one = ranks_learner([sum(sizes)], K=K, device=device, dtype=torch.float64,
                        cbs=[GradientAccumulation(acc*sum(sizes))] if acc else [])
    one.fit(1)
    one.fit(1)
    one,got = fit_result(one),run_ranks(_fit, len(sizes), tmp_path, sizes, K, acc, device, device=device)
    assert [s['used'] for s in one['seen']]==[s['used'] for s in got[0]['seen']] and one['seen'][-1]['used']==bool(K)
    n_steps = 2*len(one['seen'])  # of both fits; `seen` has those of the second
    for g in got:
        assert g['unwrapped']=='SwAVModel' and not g['trainer'] and g['n_pushed']==one['n_pushed']
        for k in ('queue','losses','weights','valid'): close_after(n_steps, g[k], one[k], f'{k} of {sizes}')
        assert g['queue'].dtype==g['weights'].dtype==torch.float64
    for i,s in enumerate(one['seen']):
        steps = n_steps//2+i+1
        close_after(steps, torch.cat([g['seen'][i]['codes'] for g in got], 1), s['codes'], f'codes of step {i}')
        for g in got:
            close_after(steps, g['seen'][i]['loss'], s['loss'].mean(), f'loss of step {i}')
            if 'grad' in s: close_after(steps, g['seen'][i]['grad'], s['grad'], f'gradient of step {i}')

@pytest.mark.parametrize('sizes,K', [
    *(pytest.param(o, k, marks=pytest.mark.slow) for o in ([4,8],[4,4,4],[3,3,3,3]) for k in (None,20)),
    *((o, 20) for o in ([6,6],[2,7,3],[1,4,2,5])), ([2,7,3], None)], ids=str)
def test_ranks_equal_one_process(sizes, K, tmp_path): check_fit(sizes, K, None, tmp_path)

def test_ranks_accumulate(tmp_path): check_fit([6,6], 20, 2, tmp_path)

# --- a rank that goes wrong -------------------------------------------------------------------------------------------
def _not_finite(rank, size, where):
    learn = ranks_learner([6]*size, rank, K=20)
    weight = learn.model.encoder[0].weight
    class Break(Callback):
        "Something is wrong on the last rank, in the third step"
        order = {'images': 0, 'loss': 55}[where]  # before the crops are cut; after the loss is there
        def before_batch(self):
            if where=='images' and self.train_iter==2 and rank==size-1: self.learn.xb = (self.xb[0]*float('nan'),)
        def after_loss(self):
            if where=='loss' and self.training and self.train_iter==2 and rank==size-1:
                self.learn.loss_grad = self.loss_grad*float('inf')
    before = []
    with learn.distrib_ctx(sync_bn=False):
        with learn.added_cbs([Break()]), pytest.raises(FloatingPointError) as e: learn.fit(1)
        before.append(weight.detach().clone())
        learn.fit(1)
    return dict(message=str(e.value), weights=before, losses=learn.recorder.losses, model=type(learn.model).__name__,
                dl=type(learn.dls.train).__name__)

@pytest.mark.parametrize('where', ['images','loss'])
def test_ranks_stop_together(where, tmp_path):
    well,ill = run_ranks(_not_finite, 2, tmp_path, where)
    assert 'another rank not finite in batch 2 of epoch 0' in well['message']
    assert f'{where} ' in ill['message'] and 'not finite in batch 2 of epoch 0' in ill['message']
    for r in (well,ill): assert np.isfinite(r['losses']).all() and r['model']=='SwAVModel' and r['dl']=='Parts'
    assert torch.equal(well['weights'][0], ill['weights'][0])

def _die(rank, size, how):
    learn = ranks_learner([4]*size, rank, K=20)
    class Die(Callback):
        def after_pred(self):
            if not (self.train_iter==2 and rank==1): return
            if how=='killed': os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError('broken')
    learn.add_cb(Die())
    with learn.distrib_ctx(sync_bn=False): learn.fit(100)

@pytest.mark.parametrize('how', ['killed', pytest.param('raises', marks=pytest.mark.slow)])
def test_rank_that_dies_ends_the_others(how, tmp_path):
    "No launcher watches here: the others notice by themselves"
    ps = start(_die, 3, tmp_path, how)
    ps[1].join(60)
    died = time.time()
    for p in ps: p.join(max(0, died+60-time.time()))
    codes = [p.exitcode for p in ps]
    for p in ps: p.kill()
    assert codes[1]==(-signal.SIGKILL if how=='killed' else 1) and codes[0]==codes[2]==1, codes

# --- scripts, as users run them ---------------------------------------------------------------------------------------
script = '''
import atexit, os, signal, sys
sys.path.insert(0, {tests!r})
from fastai.vision.all import *
from fastai.callback.progress import CSVLogger
from helpers import digits, small_augs, small_encoder
from self_supervised_swav.all import *
from self_supervised_swav.distributed import *

model = create_swav_model(small_encoder(), hidden_size=16, projection_size=8, n_protos=20)
swav = SWAV(small_augs(), K=24, queue_start_pct=.2, print_augs=True)
learn = Learner(digits(200), model, path={path!r}, cbs=[swav, CSVLogger()])
def count_threads():
    names = [p.read_text().strip() for p in Path('/proc/self/task').glob('*/comm')]
    (learn.path/f'threads{{rank_distrib()}}').write_text(str(sum('gloo' in o for o in names)))
class Die(Callback):
    def after_step(self):
        if self.train_iter==3 and rank_distrib()==1: os.kill(os.getpid(), signal.SIGKILL)
if 'die' in sys.argv: learn.add_cb(Die())
if Path('/proc/self/task').exists(): atexit.register(count_threads)  # called after what the package registers
with learn.distrib_ctx():
    crops = torch.rand(3)
    learn.fit(50 if 'die' in sys.argv else 2)
    learn.save('a')
    learn.load('a')
    axes = learn.swav.show(1)
state = torch.cat([o.flatten().double() for o in [*learn.model.parameters(), learn.model.queue.features]])
losses = [float(o) for o in learn.recorder.losses]
torch.save(dict(crops=crops, state=state, losses=losses), learn.path/f'{{rank_distrib()}}.pth')
'''

def _torchrun(folder, *args):
    (folder/'script.py').write_text(script.format(tests=str(Path(__file__).parent), path=str(folder)))
    env = os.environ|dict(OMP_NUM_THREADS='1', MPLBACKEND='agg', PYTHONWARNINGS='ignore')
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    return subprocess.run([*cmd, str(folder/'script.py'), *args], env=env, capture_output=True, text=True, timeout=110)

@pytest.mark.slow
def test_torchrun(tmp_path):
    res = _torchrun(tmp_path)
    assert res.returncode==0, res.stderr[-3000:]
    a,b = [torch.load(tmp_path/f'{r}.pth') for r in range(2)]
    assert torch.equal(a['state'], b['state']) and a['losses']==b['losses'] and len(a['losses'])==10
    assert not torch.equal(a['crops'], b['crops'])
    # one header of the table, one print of each pipeline
    assert res.stdout.count('train_loss')==1 and res.stdout.count('Pipeline')==3
    assert len((tmp_path/'history.csv').read_text().splitlines())==3 and (tmp_path/'models'/'a.pth').exists()
    # a process that ends beside gloo's threads is aborted now and then
    assert all(o.read_text()=='0' for o in tmp_path.glob('threads*'))

@pytest.mark.slow
def test_torchrun_ends_when_a_rank_dies(tmp_path):
    started = time.time()
    res = _torchrun(tmp_path, 'die')
    assert res.returncode and 'SIGKILL' in res.stderr and time.time()-started<90
