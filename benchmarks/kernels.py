"Codes, losses and the momentum update against lightly's, and against the machine"
import copy
from functools import partial

import torch, torch.nn.functional as F
from lightly.loss import NTXentLoss, SwaVLoss
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from lightly.models.utils import update_momentum

from harness import Row, exponent, fmt_time, peak_memory, race
from self_supervised_swav.contrastive import info_nce, nt_xent
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.losses import swapped_loss
from self_supervised_swav.moco import create_moco_model
from self_supervised_swav.sinkhorn import sinkhorn

def cosines(*shape, device='cpu', dim=128):
    "Scores of random unit vectors: (...,B,K)"
    torch.manual_seed(0)
    *batch,K = shape
    return F.normalize(torch.randn(*batch, dim, device=device),
                       dim=-1)@F.normalize(torch.randn(K, dim, device=device), dim=1).T

# --- codes ------------------------------------------------------------------------------------------------------------
def sinkhorn_contestants(B, K, device='cpu', limit=True):
    """Codes as the callback computes them, into a buffer that is there already, and as a plain call; lightly's; memory
    traffic alone"""
    S = cosines(B, K, device=device)
    Q = torch.empty_like(S)
    def stream():
        """As often through memory as three turns must: scores in, exponentials out, read for each further turn, scaled
        in place"""
        Q.copy_(S)
        for _ in range(2): Q.sum()
        Q.mul_(1.)
    fs = {'this package': lambda: sinkhorn(S, bound=1., out=Q), 'without `out`': lambda: sinkhorn(S, bound=1.),
          'lightly': lambda: lightly_sinkhorn(S)}
    return fs|({'memory alone': stream} if limit else {})

def sinkhorn_rows(sizes=((8,30),(512,3000),(4096,3000),(16384,3000)), rounds=9, device='cpu'):
    for B,K in sizes:
        big = B*K>1e6
        times,size = race(sinkhorn_contestants(B, K, device, big), rounds, device),f'{B}x{K}'
        yield Row.of_times('Sinkhorn into a buffer', size, times, 'lightly',
                           '2x (4x)' if (B,K) in ((512,3000),(4096,3000)) else '')
        yield Row.of_times('Sinkhorn, plain call', size, times, 'lightly', ours='without `out`')
        if big: yield Row.of_times('Sinkhorn into a buffer', size, times, 'memory alone')

# --- loss -------------------------------------------------------------------------------------------------------------
class NoSinkhorn(SwaVLoss):
    "lightly's loss for codes that are given"
    def forward(self, scores, codes):
        total = 0.
        for i,q in enumerate(codes):
            total = total + sum(self.subloss(s, q) for v,s in enumerate(scores) if v!=i)/(len(scores)-1)
        return total/len(codes)

def loss_and_grad(name, V, B, K, device='cpu', small=False):
    "A function that computes one of the losses of `V` crops, two with codes, and its gradient"
    if small: V,B,K = 3,2,4
    scores = cosines(V, B, K, device=device)
    codes,theirs = torch.rand(2, B, K, device=device).mul_(5).softmax(-1),NoSinkhorn()
    def ours_(s): return swapped_loss(s, codes, (0,1), bound=1.)
    def theirs_(s): return theirs(s.unbind(), codes)
    f = theirs_ if name=='lightly' else ours_
    def run():
        s = scores.detach().requires_grad_()
        loss = f(s)
        return loss.detach(),torch.autograd.grad(loss, s)[0]
    return run

def loss_contestants(*size, device='cpu'):
    return {k: loss_and_grad(k, *size, device=device) for k in ('this package','lightly')}

def loss_rows(sizes=((8,8,30),(8,256,3000)), rounds=9, device='cpu', memory=True):
    for V,B,K in sizes:
        fs,size = loss_contestants(V, B, K, device=device),f'{V} crops, {B}x{K}'
        yield Row.of_times('loss + gradient', size, race(fs, rounds, device, least=.1), 'lightly',
                           '4x (6x)' if B==256 else '')
        if B*K<1e5: continue
        yield Row.of_times('loss + gradient, caches cold', size, race(fs, rounds, device, least=0), 'lightly')
        if not memory: continue
        a,b = (peak_memory(loss_and_grad, n, V, B, K, device, device=device)/2**20 for n in ('this package','lightly'))
        yield Row('loss + gradient: peak memory', size, f'{a:.0f} MB', 'lightly', f'{b:.0f} MB', f'1/{b/a:.1f}',
                  '1/2 (1/3)')

# --- contrastive losses and the momentum encoder ----------------------------------------------------------------------
def _value_and_grad(f, x):
    "A function that computes `f` and its gradient"
    def run():
        z = x.detach().requires_grad_()
        loss = f(z)
        return loss.detach(),torch.autograd.grad(loss, z)[0]
    return run

def contrastive_contestants(N, K=None, device='cpu', dim=128):
    "NT-Xent of two crops of `N` images, or InfoNCE of `N` queries with a queue of `K`"
    torch.manual_seed(0)
    if K is None:
        z,theirs = torch.randn(2, N, dim, device=device),NTXentLoss(.1)
        return {'this package': _value_and_grad(lambda z: nt_xent(z, .1), z),
                'lightly': _value_and_grad(lambda z: theirs(z[0], z[1]), z)}
    q,keys = torch.randn(N, dim, device=device),F.normalize(torch.randn(N, dim, device=device), dim=1)
    theirs = NTXentLoss(.2, (K,dim)).to(device)
    queue = theirs.memory_bank.bank.clone()  # lightly's moves on with each call, as in training
    return {'this package': _value_and_grad(lambda q: info_nce(q, keys, queue, .2), q),
            'lightly': _value_and_grad(lambda q: theirs(q, keys), q)}

def contrastive_rows(sizes=((256,None),(4096,None),(32,4096),(256,65536),(4096,65536)), rounds=9, device='cpu'):
    for N,K in sizes:
        large = N*(K or 2*N)>1e7
        times = race(contrastive_contestants(N, K, device), min(3, rounds) if large else rounds, device)
        what = 'NT-Xent (SimCLR) + gradient' if K is None else 'InfoNCE (MoCo) + gradient'
        yield Row.of_times(what, f'{N} images'+(f', {K:,} keys' if K else ', 2 crops'), times, 'lightly',
                           '1.5x' if K in (None,65536) else '')

@torch.no_grad()
def update_one_by_one(net, ema, m):
    for k,q in zip(ema.parameters(), net.parameters()): k.mul_(m).add_(q, alpha=1-m)

def momentum_contestants(arch='resnet50', device='cpu', m=.999):
    "A step of the momentum encoder: one fused call, lightly's two, and parameter by parameter"
    model = create_moco_model(create_encoder(arch, pretrained=False).to(device), 2048)
    net = torch.nn.ModuleList([model.encoder,model.projector])
    return {'this package': partial(model.update_keys, m),
            'lightly': partial(torch.no_grad()(update_momentum), net, copy.deepcopy(net), m),
            'one by one': partial(update_one_by_one, net, copy.deepcopy(net), m)}

def momentum_rows(archs=('resnet18','resnet50'), rounds=9, device='cpu'):
    for arch in archs:
        times = race(momentum_contestants(arch, device), rounds, device)
        for k in ('lightly','one by one'): yield Row.of_times('momentum update', arch, times, k)

# --- growth -----------------------------------------------------------------------------------------------------------
def growth_rows(base=(512,768), crops=4, rounds=5, device='cpu'):
    "Each cost at 1, 2, 4, 8 times the size, and the power of the size it grows with"
    B,K = base
    cases = {('Sinkhorn',f'batch {B}..{8*B}, {K} prototypes'): lambda n: sinkhorn_contestants(n*B, K, device, False),
             ('Sinkhorn',f'batch {B}, {K}..{8*K} prototypes'): lambda n: sinkhorn_contestants(B, n*K, device, False),
             ('loss + gradient',f'batch {B//8}..{B}, {K} prototypes, {crops} crops'): lambda n: loss_contestants(crops,
                 n*B//8, K, device=device),
             ('loss + gradient',
              f'batch {B//8}, {K}..{8*K} prototypes, {crops} crops'): lambda n: loss_contestants(crops, B//8, n*K,
                  device=device),
             ('loss + gradient',
              f'batch {B//8}, {K} prototypes, {crops}..{8*crops} crops'): lambda n: loss_contestants(n*crops, B//8, K,
                  device=device)}
    for (what,size),make in cases.items():
        times = [race({k:f for k,f in make(n).items() if k in ('this package','lightly')}, rounds, device)
                 for n in (1,2,4,8)]
        yield growth_row(what, size, times, 'lightly')

def growth_row(what, size, times, peer):
    "The row for times at 1, 2, 4, 8 times the size"
    def cell(k): return ', '.join(fmt_time(t[k]) for t in times)
    p,q = (exponent((1,2,4,8), [t[k] for t in times]) for k in ('this package',peer))
    return Row(f'{what}: growth at 1x 2x 4x 8x', size, cell('this package'), peer, cell(peer), f'n^{p:.2f} : n^{q:.2f}')
