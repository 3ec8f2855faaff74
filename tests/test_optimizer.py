"`lars` against the rule as the official code computes it, and `fit_warmup_cos` against its arrays"
import copy, math, pickle
from functools import partial

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.training import ShortEpochCallback
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.optimizer import SGD
from fastai.test_utils import synth_dbunch
from torch import nn

from helpers import rounding
from self_supervised_swav.optimizer import _look_up, lars, warmup_cos
from self_supervised_swav.recipes import paper_recipe


class SGDInLARC:
    "What the official script runs: apex's LARC (scaling, not clipping) around torch's SGD"
    def __init__(self, params, lr, wd=1e-6, trust=1e-3):
        self.opt,self.wd,self.trust = torch.optim.SGD(params, lr=lr, momentum=0.9),wd,trust

    @torch.no_grad()
    def step(self):
        for p in self.opt.param_groups[0]['params']:
            if p.grad is None: continue
            w,g = p.norm(),p.grad.norm()
            if w == 0 or g == 0: continue
            p.grad = (p.grad + self.wd*p) * (self.trust*w / (g + w*self.wd + 1e-8))
        self.opt.step()


def some_params(seed=0):
    g = torch.Generator().manual_seed(seed)
    def draw(*shape): return torch.randn(*shape, generator=g, dtype=torch.float64)
    zeros,tiny = torch.zeros(5, dtype=torch.float64),1e-6*draw(4)
    return [nn.Parameter(o) for o in (draw(8, 3, 3, 3), draw(16, 8), draw(16), zeros, tiny, draw(3))]


@pytest.mark.parametrize('wd', [0., 1e-6, 0.1])
@pytest.mark.parametrize('foreach', [False, True])
def test_steps_follow_the_official_rule(wd, foreach):
    ours,theirs = some_params(),some_params()
    a,b = lars(ours, lr=4.8, wd=wd),SGDInLARC(theirs, lr=4.8, wd=wd)
    a.opt.param_groups[0]['foreach'] = foreach
    g = torch.Generator().manual_seed(1)
    for step in range(20):
        for i,(p,q) in enumerate(zip(ours, theirs)):
            frozen = i == len(ours)-1 and step < 10
            p.grad = None if frozen else torch.randn(p.shape, generator=g, dtype=torch.float64)
            q.grad = None if frozen else p.grad.clone()
        a.step(); b.step()
        # norms over up to 216 numbers, a dozen roundings more a step, added up over the steps
        bound = rounding(torch.float64, (step+1)*(216+12))
        for p,q in zip(ours, theirs): torch.testing.assert_close(p, q, rtol=bound, atol=bound*q.abs().max().item())
    start = some_params()
    assert not torch.equal(ours[3], start[3]), 'a zero parameter must move'
    assert not torch.equal(ours[-1], start[-1]), 'a parameter frozen for a while must move afterwards'


def test_frozen_parameter_keeps_its_momentum():
    p = nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
    opt = lars([p], lr=1.)
    opt.step()
    before,mom = p.detach().clone(),opt.opt.state[p]['momentum_buffer'].clone()
    p.grad = None
    opt.step()
    assert torch.equal(p, before) and torch.equal(opt.opt.state[p]['momentum_buffer'], mom)


def net(): return nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
def halves(m): return [list(m[0].parameters()), [p for l in m[1:] for p in l.parameters()]]

def learner(n_train=10, **kwargs):
    torch.manual_seed(0)
    learn = Learner(synth_dbunch(n_train=n_train), net(), MSELossFlat(), **{'opt_func': lars, 'lr': 0.6, **kwargs})
    learn.logger = lambda *_: None
    return learn.remove_cb(learn.progress)


@pytest.mark.parametrize('fit', ['fit', 'fit_one_cycle', 'fit_flat_cos', 'fit_warmup_cos', 'fit_sgdr'])
def test_fits_take_the_steps_of_the_rule(fit):
    "The weights after a fit are those of the rule with the learning rates and momenta that the fit's schedule gave"
    steps = []
    class Watch(Callback):
        order = 99
        def before_step(self):
            h = self.opt.hypers[0]
            steps.append((h['lr'], h['mom'], [p.grad.clone() for p in self.model.parameters()]))
    learn = learner(n_train=4)
    ref = [p.detach().clone() for p in learn.model.parameters()]
    getattr(learn, fit)(*((2, 1) if fit == 'fit_sgdr' else (3,)), cbs=Watch())
    moms = [None]*len(ref)
    for lr,m,grads in steps:
        for i,(p,g) in enumerate(zip(ref, grads)):
            w,n = p.norm(),g.norm()
            g = (g + 1e-6*p) * (1e-3*w / (n + 1e-6*w + 1e-8) if w > 0 and n > 0 else 1.)
            moms[i] = g if moms[i] is None else m*moms[i] + g
            ref[i] = p - lr*moms[i]
    assert len(steps) == 12
    assert len({lr for lr,*_ in steps}) == {'fit': 1, 'fit_flat_cos': 3, 'fit_sgdr': 9}.get(fit, 12)
    assert len({m for _,m,_ in steps}) == (12 if fit == 'fit_one_cycle' else 1)
    # 12 steps, each with norms over 8 numbers and a dozen roundings
    bound = rounding(torch.float32, 12*(8+12))
    for p,q in zip(learn.model.parameters(), ref):
        torch.testing.assert_close(p.data, q, rtol=bound, atol=bound*q.abs().max().item())


def test_hypers_have_fastai_names_and_defaults():
    learn = learner(splitter=halves); learn.create_opt()
    for h in learn.opt.hypers:
        assert (h['lr'], h['mom'], h['wd'], h['trust_coeff'], h['trust_clip'],
                h['nesterov']) == (0.6, 0.9, 1e-6, 1e-3, False, False)
    learn.opt.set_hyper('lr', slice(0.1, 1.)); learn.opt.set_hyper('wd', [0., 1e-4]); learn.opt.set_hyper('mom', 0.5)
    assert [(h['lr'], h['wd'], h['mom']) for h in learn.opt.hypers] == [(0.1, 0., 0.5), (pytest.approx(1.), 1e-4, 0.5)]
    assert [g['weight_decay'] for g in learn.opt.opt.param_groups] == [0., 1e-4]
    learn = learner(opt_func=partial(lars, lr=2.)); learn.create_opt()
    assert learn.lr == 2.
    learn = learner(wd=1e-3); learn.fit(1)
    assert learn.opt.hypers[0]['wd'] == 1e-3


def test_decay_takes_biases_and_norms_too():
    "fastai's `do_wd` cannot reach a torch optimizer: said in the notebook, the paper's rule anyway"
    for wd_bn_bias in (False, True):
        learn = learner(wd_bn_bias=wd_bn_bias); learn.create_opt(); learn.opt.set_hyper('wd', 1e3)
        norm = learn.model[1].weight
        for p in learn.model.parameters(): p.grad = torch.full_like(p, 1e-3)
        learn.opt.step()
        assert norm.max() < 1


def test_freeze_to():
    learn = learner(splitter=halves)
    learn.freeze()
    first,last = learn.model[0].weight.detach().clone(),learn.model[3].weight.detach().clone()
    learn.fit(1)
    assert torch.equal(learn.model[0].weight, first) and not torch.equal(learn.model[3].weight, last)
    learn.unfreeze(); learn.fit(1)
    assert not torch.equal(learn.model[0].weight, first)


def test_save_and_load_continue_with_the_momentum(tmp_path):
    learn = learner(path=tmp_path); learn.fit(1)
    file = learn.save('lars', with_opt=True)
    other = learner(path=tmp_path); other.create_opt()
    other.load('lars', with_opt=True)
    assert file.exists() and len(other.opt.opt.state) == len(list(net().parameters()))
    for p,q in zip(learn.model.parameters(), other.model.parameters()):
        assert torch.equal(p, q)
        assert torch.equal(learn.opt.opt.state[p]['momentum_buffer'], other.opt.opt.state[q]['momentum_buffer'])
    assert pickle.loads(pickle.dumps(partial(lars, lr=2.))).keywords == {'lr': 2.}   # `learn.export` pickles it


# ---- the schedule

def official_schedule(n_iter, epochs, base, final, warmup, start):
    "The arrays of main_swav.py"
    warm = np.linspace(start, base, n_iter*warmup)
    T = n_iter*(epochs-warmup)
    return np.concatenate((warm, [final + 0.5*(base-final)*(1+math.cos(math.pi*t/T)) for t in range(T)]))

@pytest.mark.parametrize('n_iter,epochs,base,final,warmup,start', [
    (7, 9, 0.6, 0.0006, 0, 0.), (7, 9, 4.8, 0.0048, 3, 0.3), (13, 6, 1., 0., 6, 0.), (1, 40, 4.8, 0.0048, 10, 0.3),
    (3, 1, 1., 0., 0, 0.5)])
def test_every_step_is_the_official_one(n_iter, epochs, base, final, warmup, start):
    learn = learner(n_train=n_iter)
    learn.fit_warmup_cos(epochs, lr=base, warmup=warmup, start_lr=start, final_lr=final)
    np.testing.assert_allclose(learn.recorder.lrs, official_schedule(n_iter, epochs, base, final, warmup, start),
                               rtol=0, atol=1e-12)
    assert learn.recorder.hps['lr'] == learn.recorder.lrs

@pytest.mark.parametrize('bs', [256, 4096])
def test_recipe_schedule_at_full_length(bs):
    fit = paper_recipe(bs)['fit']
    n_iter = 1_281_167//bs//8                  # an eighth of ImageNet: 150,000 steps
    ours = warmup_cos(n_iter*fit['n_epoch'], n_iter*fit['warmup'], fit['lr'], fit['start_lr'], fit['final_lr'])
    np.testing.assert_allclose(ours, official_schedule(n_iter, fit['n_epoch'], fit['lr'], fit['final_lr'],
                                                       fit['warmup'], fit['start_lr']),
                               rtol=0, atol=1e-12)

def test_steps_survive_the_rounding_of_pct_train():
    "`pct_train` is summed up in floating point; no step may be missed or doubled over a long fit"
    n_epoch,n_iter = 800,313
    table = list(range(n_epoch*n_iter))
    sched = _look_up(table)
    seen = []
    for epoch in range(n_epoch):
        pct = epoch/n_epoch
        for _ in range(n_iter): seen.append(sched(pct)); pct += 1./(n_iter*n_epoch)
    assert seen == table

def test_share_of_the_fit():
    learn = learner(n_train=10)
    learn.fit_warmup_cos(3, lr=1., warmup=0.25)                                     # 7.5 of 30 steps: 8, to the even
    lrs = learn.recorder.lrs
    assert lrs[0] == 0 and lrs[7] == lrs[8] == 1. and lrs[9] < 1. and 1e-3 < lrs[-1] < 0.01

def test_groups_each_have_their_rate():
    learn = learner(n_train=4, splitter=halves)
    learn.fit_warmup_cos(2, lr=slice(0.1, 1.), warmup=1, start_lr=0.05)
    np.testing.assert_allclose(learn.recorder.lrs, official_schedule(4, 2, 1., 1e-3, 1, 0.05), atol=1e-12)
    assert learn.opt.hypers[0]['lr'] == pytest.approx(official_schedule(4, 2, 0.1, 1e-4, 1, 0.05)[-1])

def test_start_epoch_and_short_epochs_keep_their_place():
    full = official_schedule(10, 4, 1., 1e-3, 1, 0.)
    learn = learner(n_train=10); learn.fit_warmup_cos(4, lr=1., warmup=1, start_epoch=2)
    np.testing.assert_allclose(learn.recorder.lrs, full[20:], atol=1e-12)
    learn = learner(n_train=10); learn.fit_warmup_cos(4, lr=1., warmup=1, cbs=ShortEpochCallback(0.2))
    np.testing.assert_allclose(learn.recorder.hps['lr'], [full[10*e+i] for e in range(4) for i in range(2)], atol=1e-12)

@pytest.mark.parametrize('warmup', [4, -1, 1., 1.5, -0.1, float('nan')])
def test_bad_warmup(warmup):
    learn = learner(n_train=2)
    with pytest.raises(ValueError, match='warmup'): learn.fit_warmup_cos(3, lr=1., warmup=warmup)
    assert learn.opt is None

@pytest.mark.parametrize('bad', [dict(batch_size=512), dict(batch_size=4096, n_epochs=9), dict(n_epochs=0)])
def test_bad_recipe(bad):
    with pytest.raises(ValueError, match=f'{list(bad)[-1]} must be'): paper_recipe(**bad)

def test_short_recipe_never_starts_its_queue():
    assert paper_recipe(256, n_epochs=10)['swav']['queue_start_pct'] == 1.

# --- MoCo's schedule and optimizer ------------------------------------------------------------------------------------
@pytest.mark.parametrize('n_iter,epochs,milestones', [(3,200,(120,160)), (7,20,(12,16)), (1,5,(1,2,4))])
def test_steps_are_those_of_moco(n_iter, epochs, milestones):
    "A rate that falls to a tenth at each milestone, an epoch's number"
    learn = learner(n_train=n_iter)
    learn.fit_steps(epochs, lr=.03, drops=[o/epochs for o in milestones])
    wanted = [.03*.1**sum(e>=m for m in milestones) for e in range(epochs) for _ in range(n_iter)]
    np.testing.assert_allclose(learn.recorder.lrs, wanted, rtol=1e-12)

def test_steps_keep_their_place_and_refuse_epochs():
    learn = learner(n_train=3)
    learn.fit_steps(10, lr=1., start_epoch=7)
    np.testing.assert_allclose(learn.recorder.lrs, np.repeat([.1,.01,.01], 3), rtol=1e-12)
    for name,bad in (('drops',(3,)), ('drops',()), ('factor',0)):
        with pytest.raises(ValueError, match=f'{name} must be'): learn.fit_steps(10, **{name: bad})

def test_sgd_of_the_moco_recipe_is_that_of_torch():
    "Momentum and a decay inside the gradient, of biases and batch norm too"
    r = paper_recipe('mocov2')
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)).double()
    twin,x = copy.deepcopy(model),torch.randn(5, 6, 3, dtype=torch.double)
    ours = SGD(list(model.parameters()), lr=.03, **r['opt']|dict(wd=.1))
    theirs = torch.optim.SGD(twin.parameters(), lr=.03, momentum=.9, weight_decay=.1)
    for b in x:
        for m,o in ((model,ours),(twin,theirs)):
            m(b).square().sum().backward()
            o.step()
            o.zero_grad()
    for a,b in zip(model.parameters(), twin.parameters()): torch.testing.assert_close(a, b)
