"Stopping and resuming gives the same bits as not stopping"
import multiprocessing, os, random, subprocess, sys, time, warnings
from functools import partial
from contextlib import suppress
from pathlib import Path

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import ParamScheduler
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, ShortEpochCallback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.metrics import mae
from fastai.optimizer import Adam, OptimWrapper, ranger
from fastai.torch_core import set_seed
from torch import nn

from helpers import Noisy, digits, method_learner, seed_all, small_augs, small_learner
from test_distributed import ctx, run_ranks
from self_supervised_swav import files
from self_supervised_swav.feed import get_rng_state
from self_supervised_swav.files import read_state, write_state
from self_supervised_swav.optimizer import lars
from self_supervised_swav.resume import ResumeTraining, TrainingStopped, fit_progress


class NoisyPairs(Noisy):
    "With something to predict"
    def __getitem__(self, i):
        x = super().__getitem__(i)
        return x,x.sum(0, keepdim=True)/10

def jitter(x:torch.Tensor): return x+0.1*torch.randn_like(x)+random.random()+np.random.rand()

def make_dls(n=26, bs=4, nw=0, torch_dl=False):
    def loader(train):
        kwargs = dict(shuffle=train, drop_last=train, num_workers=nw)
        if torch_dl: return torch.utils.data.DataLoader(NoisyPairs(n), bs, **kwargs)
        return TfmdDL(NoisyPairs(n), bs=bs, after_batch=jitter, **kwargs)
    return DataLoaders(loader(True), loader(False))

def make_net(width=6):
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 1))

def make(path, seed=0, every=2, cbs=(), net=make_net, extend=False, **kwargs):
    set_seed(seed)
    dl_kwargs = {k: kwargs.pop(k) for k in ('n','bs','nw','torch_dl') if k in kwargs}
    learn = Learner(make_dls(**dl_kwargs), net(), MSELossFlat(), path=Path(path).parent, metrics=mae,
                    cbs=[*cbs, ResumeTraining(path, every=every, extend=extend)], **{'lr': 0.01, **kwargs})
    learn.logger = lambda *_: None
    return learn.remove_cb(ProgressCallback)

def flat(o):
    "Everything in `o`, comparable with =="
    if isinstance(o, torch.Tensor): return o.detach().numpy().tobytes()
    if isinstance(o, dict): return {k: flat(v) for k,v in o.items()}
    if isinstance(o, (str,int,float,type(None))): return o
    return [flat(v) for v in o]

def result(learn):
    rec = learn.recorder
    return dict(weights=flat(learn.model.state_dict()), opt=flat(learn.opt.state_dict()), rng=flat(get_rng_state()),
                losses=flat(rec.losses), lrs=flat(rec.lrs), values=flat(rec.values), iters=flat(rec.iters),
                hps=flat(getattr(rec, 'hps', {})),
                loaders=[flat(getattr(dl, 'rng', random).getstate()) for dl in learn.dls.loaders])

class PowerCut(BaseException): pass

def cut_after(learn, n):
    "The power goes off after `n` batches, of training or validation"
    one_batch = learn.one_batch
    def fused(i, b):
        nonlocal n
        if n==0: raise PowerCut()
        n -= 1
        one_batch(i, b)
    learn.one_batch = fused

def assert_resumes(tmp_path, fit, cuts, **kwargs):
    "`fit`, cut off after each number of batches in turn, ends like `fit` left alone"
    path = tmp_path/'whole'/'last.pth'
    whole = make(path, **kwargs); fit(whole)
    want = result(whole)
    path = tmp_path/'cut'/'last.pth'
    for i,n in enumerate(cuts):
        learn = make(path, seed=i, **kwargs)          # once there is a file, the seed must not matter
        cut_after(learn, n)
        with pytest.raises(PowerCut): fit(learn)
    learn = make(path, seed=99, **kwargs); fit(learn)
    got = result(learn)
    assert not [k for k in want if got[k] != want[k]]
    again = make(path, seed=98, **kwargs); fit(again) # finished: nothing is trained
    got = result(again)
    assert not [k for k in want if got[k] != want[k]]
    return learn


# an epoch is 6 batches to train and 7 to validate
@pytest.mark.parametrize('fit', [
    lambda l: l.fit(3), lambda l: l.fit_one_cycle(3, 0.02), lambda l: l.fit_flat_cos(3, 0.02),
    lambda l: l.fit_warmup_cos(3, 0.02, warmup=1)], ids=['fit','fit_one_cycle','fit_flat_cos','fit_warmup_cos'])
@pytest.mark.parametrize('every', [None, 1, 4])
def test_fits(tmp_path, fit, every):
    assert_resumes(tmp_path, fit, cuts=[15, 10, 8] if every else [15, 16], every=every)

@pytest.mark.parametrize('every,cuts', [(1, [3, 2, 2, 9]), (3, [16, 5])])
def test_workers(tmp_path, every, cuts):
    "Also twice within one epoch, and where a worker had not delivered yet"
    assert_resumes(tmp_path, lambda l: l.fit_one_cycle(3), cuts, every=every, nw=2)

def stop_in(learn, n):
    "Ask it to stop during batch `n` (from 1) of training or validation"
    one_batch = learn.one_batch
    def asking(i, b):
        nonlocal n
        n -= 1
        if n==0: learn.resume_training.stop()
        one_batch(i, b)
    learn.one_batch = asking

@pytest.mark.parametrize('every,asked', [(5, [(3,3), (9,6), (24,None)]), (None, [(3,6), (9,12), (10,None)])])
def test_stop(tmp_path, every, asked):
    "Asked in training or in validation, it stops at the next place that it can go on from bit for bit, or else ends"
    def fit(learn): learn.fit_one_cycle(3, 0.02)
    whole = make(tmp_path/'whole.pth', every=every); fit(whole)
    for seed,(n,n_done) in enumerate(asked):
        learn = make(tmp_path/'cut.pth', seed=seed, every=every)
        stop_in(learn, n)
        if n_done is None: fit(learn)
        else:
            with pytest.raises(TrainingStopped, match='is written'): fit(learn)
            assert len(learn.recorder.losses)==n_done
    got,want = result(learn),result(whole)
    assert not [k for k in want if got[k] != want[k]]

def test_more_workers_than_batches_done(tmp_path): assert_resumes(tmp_path, lambda l: l.fit(1), [2, 1], every=1, nw=3)

@pytest.mark.parametrize('kwargs', [
    dict(cbs=[GradientAccumulation(12)], every=1), dict(cbs=[GradientAccumulation(12)], every=1, opt_func=lars, lr=0.6),
    dict(opt_func=lars, lr=0.6), dict(opt_func=ranger), dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)),
    dict(opt_func=Adam, splitter=lambda m: [list(m[0].parameters()), list(m[1:].parameters())], lr=slice(1e-3, 1e-2)),
    dict(torch_dl=True), dict(torch_dl=True, nw=1),
], ids=['accumulation','accumulation_lars','lars','ranger','adamw','groups','torch_dl','torch_dl_worker'])
def test_engines(tmp_path, kwargs): assert_resumes(tmp_path, lambda l: l.fit(2), [9, 4], **{'every': 2, **kwargs})

class CPUMixed(MixedPrecision):
    "fp16's loss scaling, on a CPU: the scale starts at 2^17 and grows every three steps"
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', torch.bfloat16)
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=2.**17, growth_interval=3)

def test_mixed_precision(tmp_path):
    learn = assert_resumes(tmp_path, lambda l: l.fit(2), [9, 4], cbs=[CPUMixed()])
    assert learn.recorder.losses[-1].isfinite()

def test_mixed_precision_keeps_its_scale(tmp_path):
    scales = []
    class Watch(Callback):
        order = 99
        def after_step(self): scales.append(self.learn.scaler.get_scale())
    fit = lambda l: l.fit(2)
    fit(make(tmp_path/'a', cbs=[CPUMixed(), Watch()])); whole,scales = scales,[]
    learn = make(tmp_path/'b', cbs=[CPUMixed(), Watch()], every=1); cut_after(learn, 5)
    with pytest.raises(PowerCut): fit(learn)
    fit(make(tmp_path/'b', cbs=[CPUMixed(), Watch()], every=1))
    assert scales == whole and len(set(whole)) > 2

@pytest.mark.parametrize('cuts', [[27], [16, 14, 4], [9]])
def test_best_model(tmp_path, cuts):
    "The best value so far survives, and the best weights are those of the whole fit"
    def fit(l): l.fit_one_cycle(4, 0.05)
    for o in ('whole','cut'): (tmp_path/o).mkdir()
    assert_resumes(tmp_path, fit, cuts, cbs=[SaveModelCallback()])

def test_early_stopping(tmp_path):
    "Stops at the same epoch; a fit that was stopped early is finished"
    def fit(l): l.fit(12, 0.5)
    cbs = [EarlyStoppingCallback(patience=2), ReduceLROnPlateau(patience=1)]
    learn = assert_resumes(tmp_path, fit, [16, 14], cbs=cbs)
    assert len(learn.recorder.values) < 12

def test_recorder(tmp_path):
    def fit(l):
        l.recorder.train_metrics = True
        l.fit(2)
    learn = assert_resumes(tmp_path, fit, [17, 3], every=1)
    assert len(learn.recorder.metric_names) == 6

def test_short_epochs(tmp_path):
    assert_resumes(tmp_path, lambda l: l.fit(4), [6], every=1, cbs=[ShortEpochCallback(0.4)])

class Counter(Callback):
    "State of its own making, kept by the protocol"
    def __init__(self): self.seen = torch.zeros(2)
    def after_batch(self): self.seen[int(self.training)] += 1
    def state_dict(self): return dict(seen=self.seen)
    def load_state_dict(self, state): self.seen = state['seen']

def test_own_state(tmp_path):
    fit = lambda l: l.fit(2)
    learn = make(tmp_path/'last.pth', cbs=[Counter()]); cut_after(learn, 17)
    with pytest.raises(PowerCut): fit(learn)
    learn = make(tmp_path/'last.pth', cbs=[Counter()]); fit(learn)
    assert learn.counter.seen.tolist() == [14, 12]

def test_several_fits(tmp_path):
    "One callback for all fits of a script; the ones that are done are passed over"
    split = lambda m: [list(m[0].parameters()), [p for l in m[1:] for p in l.parameters()]]
    assert_resumes(tmp_path, lambda l: l.fine_tune(2, 0.01, freeze_epochs=1), [9, 20, 9, 3], splitter=split)

def test_second_fit_of_a_session_trains(tmp_path):
    learn = make(tmp_path/'last.pth'); learn.fit(1); before = learn.model[0].weight.detach().clone()
    learn.fit(1)
    assert not torch.equal(learn.model[0].weight, before)

def test_done_images_are_not_loaded_again(tmp_path):
    learn = make(tmp_path/'last.pth', every=1); cut_after(learn, 4)
    with pytest.raises(PowerCut): learn.fit(1)
    learn = make(tmp_path/'last.pth', every=1); learn.dls.train_ds.loaded.clear(); learn.fit(1)
    assert len(learn.dls.train_ds.loaded) == 26-4*4+1  # the one is fastai's look at what a batch holds

def test_the_loader_is_left_as_it_was(tmp_path):
    learn = make(tmp_path/'last.pth', every=1, nw=2); cut_after(learn, 4)
    with pytest.raises(PowerCut): learn.fit(1)
    learn = make(tmp_path/'last.pth', every=1, nw=2)
    dl = learn.dls.train
    before = set(vars(dl)) | set(vars(dl.fake_l))
    learn.fit(1)
    assert (set(vars(dl)) | set(vars(dl.fake_l)))-before <= {'_n_inp','_types','_DataLoader__idxs'}
    assert '_with_events' not in vars(learn)

def test_callback_does_not_change_the_run(tmp_path):
    "With and without it: the same random numbers, the same bits"
    for nw in (0, 2):
        a = make(tmp_path/f'{nw}.pth', every=1, nw=nw); a.fit(2); want = result(a)
        b = make(tmp_path/'none.pth', nw=nw); b.remove_cb(b.resume_training); b.fit(2)
        got = result(b)
        assert not [k for k in want if got[k] != want[k]]
    assert not (tmp_path/'none.pth').exists()

def test_other_uses_of_a_learner_are_left_alone(tmp_path, monkeypatch):
    path = tmp_path/'last.pth'
    learn = make(path); learn.fit(2)
    weights,written = flat(learn.model.state_dict()),path.read_bytes()
    monkeypatch.setattr('fastai.callback.schedule.plt', type('plt', (), {}), raising=False)
    learn.validate(); learn.get_preds(); learn.lr_find(num_it=6, show_plot=False)
    assert path.read_bytes() == written and flat(learn.model.state_dict()) == weights
    other = make(path); other.validate()
    assert flat(other.model.state_dict()) != weights
    assert learn.resume_training.feed is None               # an exported Learner must not take its data along

def test_a_crash_leaves_the_learner_usable(tmp_path):
    learn = make(tmp_path/'last.pth'); handle = learn.model.register_forward_hook(lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): learn.fit(1)
    handle.remove()
    assert '_with_events' not in vars(learn)
    learn.fit(1)
    assert len(learn.recorder.values) == 1


def make_swav(path, seed=0, every=2, extend=False):
    "SwAV on digits: random crops, a queue in use from the middle of the second epoch, prototypes frozen for the first"
    seed_all(seed)
    return small_learner(seed=seed, dls=digits(100, bs=16), n_protos=12,
                         K=20, queue_start_pct=0.5, freeze_protos_pct=1/3,
                         cbs=[ResumeTraining(path, every=every, extend=extend)],
                         learner=dict(path=Path(path).parent, opt_func=lars, lr=0.6))

@pytest.mark.parametrize('every,cuts', [(1, [4, 6, 2]), (None, [8, 13])])
def test_swav(tmp_path, monkeypatch, every, cuts):
    monkeypatch.setitem(globals(), 'make', make_swav)
    learn = assert_resumes(tmp_path, lambda l: l.fit_warmup_cos(3, 0.6, warmup=1), cuts, every=every)
    assert learn.model.queue.n_pushed == 3*5*16 and learn.recorder.losses[-1].isfinite()

def test_swav_with_other_crops_is_refused(tmp_path):
    learn = make_swav(tmp_path/'last.pth'); cut_after(learn, 3)
    with pytest.raises(PowerCut): learn.fit(1)
    learn = make_swav(tmp_path/'last.pth')
    learn.swav.aug_pipelines = small_augs(crop_sizes=(16, 8)); learn.swav.temp = 0.2
    said = r'(?s)swav.aug_pipelines.2.: .*size=10.*size=8.*swav.temp: 0.1 in the file, 0.2 here'
    with pytest.raises(ValueError, match=said): learn.fit(1)


# ---- more epochs

def extend(path, n_epoch=4, fit='fit_one_cycle', cut=None, **kwargs):
    "A fit of two epochs, then another script that extends it to `n_epoch`"
    first = make(path, **kwargs)
    getattr(first, fit)(2, 0.02)
    learn = make(path, seed=5, **kwargs, extend=True)
    if cut: cut_after(learn, cut)
    getattr(learn, fit)(n_epoch, 0.02)
    return learn

def test_extending_is_another_fit_of_the_same_learner(tmp_path):
    "Weights, momentum and random numbers go on; a constant rate stays"
    learn = extend(tmp_path/'last.pth', fit='fit')
    twice = make(tmp_path/'other.pth')
    twice.remove_cb(twice.resume_training)
    for _ in range(2): twice.fit(2, 0.02)
    assert flat(learn.model.state_dict()) == flat(twice.model.state_dict())
    assert flat(learn.opt.state_dict()) == flat(twice.opt.state_dict())
    assert len(learn.recorder.losses) == 4*6 and len(learn.recorder.values) == 4

@pytest.mark.parametrize('fit', ['fit_one_cycle','fit_warmup_cos'])
def test_schedule_of_an_extension(tmp_path, fit):
    "It runs once more, from its low beginning to its low end, over the added epochs"
    learn = extend(tmp_path/'last.pth', fit=fit)
    one = make(tmp_path/'other.pth'); getattr(one, fit)(2, 0.02)
    first,second = learn.recorder.lrs[:12],learn.recorder.lrs[12:]
    assert first == one.recorder.lrs and learn.recorder.hps['lr'] == learn.recorder.lrs
    # the shares of the cycle are sums of 12 terms in one fit and quotients in the other, so they differ by less
    # than 12 eps of float64; the steepest part of the schedule multiplies that by less than 100
    if fit=='fit_one_cycle': np.testing.assert_allclose(second, first, rtol=0, atol=0.02*100*12*np.finfo(float).eps)
    assert second[0] < 0.002 and max(second) > 0.018 and second[-1] < 0.002

def test_an_extension_that_is_stopped(tmp_path):
    "It resumes bit for bit, with and without `extend`, and is finished once it is finished"
    whole = extend(tmp_path/'whole.pth', every=1)
    with pytest.raises(PowerCut): extend(tmp_path/'cut.pth', every=1, cut=9)
    for seed,again in enumerate((True,False)):
        learn = make(tmp_path/'cut.pth', seed=seed, every=1, extend=again)
        if again: cut_after(learn, 8)
        if again:
            with pytest.raises(PowerCut): learn.fit_one_cycle(4, 0.02)
        else: learn.fit_one_cycle(4, 0.02)
    got,want = result(learn),result(whole)
    assert not [k for k in want if got[k] != want[k]]
    written = (tmp_path/'cut.pth').read_bytes()
    for again in (True,False):
        learn = make(tmp_path/'cut.pth', seed=7, every=1, extend=again)
        learn.fit_one_cycle(4, 0.02)
        got = result(learn)
        assert not [k for k in want if got[k] != want[k]] and (tmp_path/'cut.pth').read_bytes() == written

def test_extending_twice(tmp_path):
    extend(tmp_path/'last.pth')
    learn = make(tmp_path/'last.pth', seed=8, extend=True)
    learn.fit_one_cycle(5, 0.01)                              # a lower rate, too
    lrs = learn.recorder.lrs
    assert len(lrs) == 30 and 0.018 < max(lrs[12:24]) and 0.008 < max(lrs[24:]) <= 0.01

def test_schedules_are_left_as_they_were(tmp_path):
    sched = ParamScheduler({'lr': lambda pct: 0.01*(1-pct)})
    learn = make(tmp_path/'a.pth', cbs=[sched]); learn.fit(1)
    scheds,learn = sched.scheds,make(tmp_path/'a.pth', cbs=[sched], extend=True)
    learn.fit(2)
    # shares of the fit are sums of 6 terms in the first fit, quotients in the second
    lrs = learn.recorder.lrs
    assert sched.scheds is scheds and lrs[6:] == pytest.approx(lrs[:6], rel=0, abs=0.01*6*np.finfo(float).eps)

def test_swav_extension(tmp_path):
    "The queue stays in use and the prototypes stay free, although their shares of the longer fit are not reached yet"
    path,used,frozen = tmp_path/'last.pth',[],[]
    def fit(n_epoch):
        learn = make_swav(path, extend=path.exists())
        class Watch(Callback):
            def after_loss(self):
                if self.training: used.append(self.swav.uses_queue)
            def after_step(self): frozen.append(self.learn.model.prototypes.weight.grad is None)
        learn.fit_warmup_cos(n_epoch, 0.6, cbs=Watch())
    fit(3)
    # of 15 steps: a half, rounded to an even number, and a third
    assert used == [False]*8+[True]*7 and frozen == [True]*5+[False]*10
    fit(12)
    assert used[15:] == [True]*45 and frozen[15:] == [False]*45

@pytest.mark.parametrize('first,n_epoch,kwargs,said', [
    (None, 4, {}, 'extend=True needs a finished fit, but there is no '),
    ('cut', 4, {}, 'is at epoch 1 of 2: let it finish with n_epoch=2 first'),
    ('done', 1, {}, 'n_epoch must be more than the 2 epochs that are done in .*, got 1'),
    ('done', 4, dict(bs=5), 'batch_size: 4 in the file, 5 here'),
    ('done', 4, dict(net=partial(make_net, 7)), 'model.0.weight'),
], ids=['nothing','not finished','fewer','batch size','model'])
def test_extensions_that_are_refused(tmp_path, first, n_epoch, kwargs, said):
    path = tmp_path/'last.pth'
    if first:
        learn = make(path)
        if first=='cut': cut_after(learn, 15)
        try: learn.fit_one_cycle(2, 0.02)
        except PowerCut: pass
    learn = make(path, seed=3, **kwargs, extend=True)
    weights,written = flat(learn.model.state_dict()),path.exists() and path.read_bytes()
    with pytest.raises(ValueError, match=said): learn.fit_one_cycle(n_epoch, 0.02)
    assert flat(learn.model.state_dict()) == weights and (path.exists() and path.read_bytes()) == written

def test_more_epochs_without_extend_says_how(tmp_path):
    make(tmp_path/'last.pth').fit(2)
    with pytest.raises(ValueError, match='extend=True goes on from its 2 epochs to 4'): make(tmp_path/'last.pth').fit(4)

def test_extension_of_a_fit_that_was_stopped_early(tmp_path):
    cbs = lambda: [EarlyStoppingCallback(min_delta=1e9)]       # nothing is good enough
    make(tmp_path/'last.pth', cbs=cbs()).fit(5)
    assert fit_progress(tmp_path/'last.pth') == (2, 0, 5, True)
    learn = make(tmp_path/'last.pth', cbs=cbs(), extend=True)
    learn.early_stopping.run = False
    learn.fit(7)
    assert 2 < len(learn.recorder.values) <= 7

def test_progress(tmp_path):
    path = tmp_path/'last.pth'
    assert fit_progress(path) is None
    learn = make(path); cut_after(learn, 17)
    with pytest.raises(PowerCut): learn.fit(3)
    assert fit_progress(path) == (1, 4, 3, False)
    make(path).fit(3)
    assert fit_progress(path) == (3, 0, 3, True)
    torch.save({'model': {}}, path)
    with pytest.warns(UserWarning, match='not a file of ResumeTraining: going on from'):
        assert fit_progress(path) == (3, 0, 3, False)
    (tmp_path/'last.pth.prev').unlink()
    with pytest.raises(ValueError, match='not a file of ResumeTraining'): fit_progress(path)


# ---- several processes

def fit_on_ranks(rank, size, path, seed, cut):
    "What a fit on this rank ends with, or nothing if it was cut off after `cut` batches"
    learn = make(path, seed=seed+rank, every=1, n=52)
    if cut: cut_after(learn, cut)
    try:
        with learn.distrib_ctx(sync_bn=False): learn.fit_one_cycle(2, 0.02)
    except PowerCut: return
    return {k: v for k,v in result(learn).items() if k!='loaders'}

def test_ranks(tmp_path):
    "Every rank finds its own random numbers; the first one writes for all"
    def run(name, seed, cut=None):
        folder = tmp_path/f'{name}{seed}'
        folder.mkdir()
        return run_ranks(fit_on_ranks, 2, folder, tmp_path/name/'last.pth', seed, cut)
    want = run('whole', 0)
    for seed,cut in enumerate((4, 5)): run('cut', 10*seed, cut)
    got = run('cut', 20)
    assert want[0]['weights'] and want[0]['rng'] != want[1]['rng']
    assert not [(r,k) for r in range(2) for k in want[r] if got[r][k] != want[r][k]]


# ---- refusing

@pytest.mark.parametrize('change,fit,said', [
    (dict(net=partial(make_net, 7)), None, r'model.0.weight: \(6, 4\) torch.float32 in the file, \(7, 4\)'),
    (dict(), lambda l: l.fit(4), 'n_epoch: 3 in the file, 4 here'),
    (dict(bs=5), None, 'batch_size: 4 in the file, 5 here'),
    (dict(n=30), None, 'items: 26 in the file, 30 here'),
    (dict(nw=1), None, 'num_workers: 0 in the file, 1 here'),
    (dict(lr=0.02), None, 'opt.lr of group 0: 0.01 in the file, 0.02 here'),
    (dict(wd=0.1), None, 'opt.wd of group 0'),
    (dict(opt_func=lars), None, 'opt: Optimizer in the file, Lars here'),
    (dict(cbs=[GradientAccumulation(8)]), None, 'gradient_accumulation.n_acc: absent in the file, 8 here'),
    (dict(), lambda l: l.fit_one_cycle(3, 0.01), 'param_scheduler'),
], ids=['net','n_epoch','bs','items','workers','lr','wd','opt','callback','schedule'])
def test_other_settings_are_refused(tmp_path, change, fit, said):
    path = tmp_path/'last.pth'
    learn = make(path); cut_after(learn, 10)
    with pytest.raises(PowerCut): learn.fit(3)
    before = path.read_bytes()
    other = make(path, **change); weights = flat(other.model.state_dict())
    with pytest.raises(ValueError, match=said): (fit or (lambda l: l.fit(3)))(other)
    assert path.read_bytes() == before and flat(other.model.state_dict()) == weights

@pytest.mark.parametrize('a,b', [(dict(pct_start=0.3), dict(pct_start=0.4)), (dict(lr_max=0.1), dict(lr_max=0.2)),
                                 (dict(moms=(0.9, 0.8, 0.9)), dict())])
def test_other_schedules_are_refused(tmp_path, a, b):
    make(tmp_path/'last.pth').fit_one_cycle(1, **a)
    learn = make(tmp_path/'last.pth')
    with pytest.raises(ValueError, match=r' at \d+ %: \[?[0-9.e-]+\]? in the file'): learn.fit_one_cycle(1, **b)

def test_every_and_progress_may_change(tmp_path):
    learn = make(tmp_path/'last.pth', every=1); cut_after(learn, 4)
    with pytest.raises(PowerCut): learn.fit(1)
    learn = make(tmp_path/'last.pth', every=None).add_cb(ProgressCallback()); learn.create_mbar = False
    learn.fit(1)
    assert len(learn.recorder.losses) == 6

@pytest.mark.parametrize('bad', [dict(every=0), dict(every=-1), dict(every=1.5)])
def test_bad_arguments(tmp_path, bad):
    with pytest.raises(ValueError, match='every must be'): ResumeTraining(tmp_path/'x', **bad)
    with pytest.raises(ValueError, match='path must be a file'): ResumeTraining(tmp_path)

def test_another_kind_of_file(tmp_path):
    torch.save({'model': {}}, tmp_path/'x.pth')
    with pytest.raises(ValueError, match='not a file of ResumeTraining'): make(tmp_path/'x.pth').fit(1)


# ---- the file

def test_file_is_plain(tmp_path):
    make(tmp_path/'last.pth', cbs=[SaveModelCallback(), GradientAccumulation(8)], opt_func=ranger).fit_one_cycle(2)
    for o in ('last.pth','last.pth.prev'): assert torch.load(tmp_path/o, weights_only=True)['epoch'] == 2
    assert not (tmp_path/'last.pth.tmp').exists()

def test_damage_anywhere_is_noticed(tmp_path):
    "A byte changed or a tail cut off gives one of the two checkpoints that were written, never something else"
    path = tmp_path/'x.pth'
    states = [dict(settings={}, w=torch.full((500,), float(i)), i=i) for i in range(2)]
    for s in states: write_state(s, path)
    good,prev = path.read_bytes(),(tmp_path/'x.pth.prev').read_bytes()
    rnd,fell_back = random.Random(0),0
    for trial in range(80):
        data = bytearray(good)
        if trial%2: data[rnd.randrange(len(data))] ^= 1+rnd.randrange(255)
        else: del data[rnd.randrange(len(data)):]
        path.write_bytes(data); (tmp_path/'x.pth.prev').write_bytes(prev)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            s = read_state(path)
        assert s['i'] in (0, 1) and torch.equal(s['w'], states[s['i']]['w'])
        fell_back += s['i']==0
    assert fell_back > 50

def test_fit_falls_back_with_a_warning(tmp_path):
    path = tmp_path/'last.pth'
    whole = make(tmp_path/'whole.pth'); whole.fit(2)
    learn = make(path, every=1); cut_after(learn, 4)
    with pytest.raises(PowerCut): learn.fit(2)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(UserWarning, match='cannot be read'): (learn := make(path, every=1)).fit(2)
    assert flat(learn.model.state_dict()) == flat(whole.model.state_dict()) and (tmp_path/'last.pth.bad').exists()

def test_a_file_of_another_kind_is_set_aside(tmp_path):
    "The one before it is used, and this is said; without one, the fit says what the file is not"
    path = tmp_path/'last.pth'
    whole = make(tmp_path/'whole.pth'); whole.fit(2)
    learn = make(path, every=1); cut_after(learn, 4)
    with pytest.raises(PowerCut): learn.fit(2)
    for o in ({'model': {}}, [], {}, torch.zeros(3), dict(settings={}, epoch='1')):
        torch.save(o, path)
        with pytest.raises(PowerCut), pytest.warns(UserWarning, match='not a file of ResumeTraining: going on from'):
            (learn := make(path, every=1)); cut_after(learn, 2); learn.fit(2)
        assert (tmp_path/'last.pth.bad').exists()
    (learn := make(path, every=1)).fit(2)
    assert flat(learn.model.state_dict()) == flat(whole.model.state_dict())
    for o in ({'model': {}}, [], {}, torch.zeros(3)):
        torch.save(o, tmp_path/'alone.pth')
        with pytest.raises(ValueError, match='not a file of ResumeTraining'): make(tmp_path/'alone.pth').fit(1)

def test_parts_that_are_missing_are_told(tmp_path):
    "A checkpoint whose tensors and settings are those of another version or a mistake"
    path = tmp_path/'last.pth'
    learn = make(path, every=1); cut_after(learn, 4)
    with pytest.raises(PowerCut): learn.fit(2)
    ckpt = read_state(path)
    for k in ('model','opt','places','grads','train_iter','pct_train'):
        for f in (path, Path(f'{path}.prev')): f.unlink(missing_ok=True)
        lacks = k in ('grads','train_iter','pct_train')
        write_state({a: b for a,b in ckpt.items() if a!=k} | ({} if lacks else {k: type(ckpt[k])()}), path)
        said = 'is not a file of' if lacks else 'does not hold the state of this fit'
        with pytest.raises(ValueError, match=rf'last\.pth {said}'): make(path, every=1).fit(2)

def test_nothing_whole_is_an_error(tmp_path):
    (tmp_path/'last.pth').write_bytes(b'nothing')
    with pytest.raises(OSError, match='delete it to start anew'): make(tmp_path/'last.pth').fit(1)

def test_dying_between_any_two_calls_of_the_system(tmp_path, monkeypatch):
    "Whatever call to the system is the last one, the file read next is the old one or the new one"
    path = tmp_path/'x.pth'
    for i in range(2): write_state(dict(settings={}, i=i), path)
    calls,died = ('open','fsync','replace','close'),[]
    for n in range(100):
        left = n
        def dying(call, real):
            def run(*args, **kwargs):
                nonlocal left
                left -= 1
                if left == -1:
                    died.append(call)
                    raise PowerCut()
                return real(*args, **kwargs)
            return run
        i += 1
        with monkeypatch.context() as m:
            m.setattr(Path, 'unlink', lambda *_, **__: None)      # the dead delete nothing
            for call in calls: m.setattr(files.os, call, dying(call, getattr(os, call)))
            try: write_state(dict(settings={}, i=i), path)
            except PowerCut: pass
        if len(died) == n: break                                  # it came through
        assert read_state(path)['i'] in (i-1, i)
        write_state(dict(settings={}, i=i), path)
    assert died == ['open','fsync','close','replace','replace','open','fsync','close']


# ---- kill -9

def run(path, out, nw=0):
    "A fit of a second or so, with a queue-like buffer, noise everywhere and checkpoints inside epochs"
    torch.set_num_threads(1)
    multiprocessing.set_start_method('fork', force=True)            # of the loader's processes, as in a script
    learn = make(path, every=2, nw=nw, n=50, opt_func=lars, lr=0.6, cbs=[SaveModelCallback(), GradientAccumulation(8)])
    learn.model.register_forward_hook(lambda *_: time.sleep(0.004))
    with open(os.devnull, 'w') as null:
        sys.stdout = null
        learn.fit_warmup_cos(4, 0.6, warmup=1)
    torch.save(result(learn), out)

def kill_until_done(start, path, out, seconds, n_kills, seed):
    """`start` a process and kill it, `n_kills` times; then let it end. Every other time the random moment is counted
    from the process's first checkpoint on, so that, however busy the machine, half of the kills come during new work"""
    prev = Path(f'{path}.prev')
    def written():
        "When the newest checkpoint was: while one takes the place of another, there is only the one before it"
        times = [0]
        for o in (prev,path):
            with suppress(FileNotFoundError): times.append(o.stat().st_mtime_ns)
        return max(times)
    rnd,killed,n_new = random.Random(seed),0,0
    while killed < n_kills:
        before,p = written(),start()
        while killed%2 and written() == before and p.poll() is None: time.sleep(0.002)
        time.sleep(rnd.uniform(0, seconds))
        if p.poll() is None:
            p.kill(); p.wait()
            killed += 1
            n_new += written()!=before
        else:                                                       # it was done before it was killed: from the start
            assert p.poll() == 0
            for f in (path, prev, out): f.unlink()
    assert n_new >= n_kills//2
    p = start(); p.wait()
    assert p.poll() == 0
    return torch.load(out, weights_only=True)

class Forked:
    "A process that need not import everything again"
    def __init__(self, *args):
        # of a server without threads: a fork of this process might hang or fail in autograd
        self.p = ctx.Process(target=run, args=args)
        self.p.start()
    def poll(self): return self.p.exitcode
    def kill(self): self.p.kill()
    def wait(self): self.p.join()

def test_kill(tmp_path):
    for nw,n_kills in ((0, 10), (2, 4)):
        for o in ('whole','cut'): (tmp_path/f'{o}{nw}').mkdir()
        t = time.time()
        p = Forked(tmp_path/f'whole{nw}'/'last.pth', tmp_path/f'whole{nw}.out', nw); p.wait()
        t = time.time()-t
        path,out = tmp_path/f'cut{nw}'/'last.pth',tmp_path/f'cut{nw}.out'
        got = kill_until_done(lambda: Forked(path, out, nw), path, out, t/6, n_kills, seed=nw)
        want = torch.load(tmp_path/f'whole{nw}.out', weights_only=True)
        assert not [k for k in want if got[k] != want[k]]

class Steps(Callback):
    "Adds the number of steps to a file as they are done: a file that is written anew is empty for a moment"
    order,watches_only = -100,True
    def __init__(self, path): self.path = path
    def after_batch(self):
        if self.training:
            with open(self.path, 'a') as f: f.write(f'{self.learn.train_iter}\n')

def run_moco(path, out, every=2):
    "MoCo with its queue, momentum encoder, schedule and monitor, and a checkpoint after every other step"
    torch.set_num_threads(1)
    seed_all()  # Python seeds `random` anew after a fork, and the DataLoaders draw their own seed from it
    cbs = [ResumeTraining(path, every=every), Steps(Path(f'{path}.steps'))]
    learn = method_learner('mocov2', cbs=cbs, monitor=True, K=32, dls=digits(100))
    with open(os.devnull, 'w') as null, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        sys.stdout = null
        learn.fit_warmup_cos(3, 0.01, warmup=1)
    torch.save(result(learn) | dict(monitor=flat(learn.collapse_monitor.state_dict())), out)

class ForkedMoCo(Forked):
    def __init__(self, *args):
        self.p = ctx.Process(target=run_moco, args=args)
        self.p.start()

@pytest.mark.slow
@pytest.mark.parametrize('n_kills', [3,50])
def test_kill_moco(tmp_path, n_kills):
    "Queue, momentum encoder, schedule and monitor go on; no more is lost than `every` says"
    rnd,path,every,lost = random.Random(n_kills),tmp_path/'last.pth',2,[]
    p,t = ForkedMoCo(tmp_path/'whole.pth', tmp_path/'whole.out'),time.time()
    p.wait()
    assert p.poll()==0
    t,steps = time.time()-t,Path(f'{path}.steps')
    while len(lost)<n_kills:
        steps.unlink(missing_ok=True)
        p = ForkedMoCo(path, tmp_path/'cut.out')
        while not steps.exists() and p.poll() is None: time.sleep(.001)
        time.sleep(rnd.uniform(0, t/8))
        if p.poll() is None:
            p.kill(); p.wait()
            done,kept = max([0,*map(int, steps.read_text().split('\n')[:-1])]),fit_progress(path)
            lost.append(done-(0 if kept is None else 5*kept.epoch+kept.batch))
        else:                                                       # it was done before it was killed: from the start
            assert p.poll()==0
            for f in (path, Path(f'{path}.prev')): f.unlink()
    # a write may be under way when the next step is counted, and a step under way is not counted
    assert max(lost)<=every and min(lost)>=-1
    p = ForkedMoCo(path, tmp_path/'cut.out'); p.wait()
    assert p.poll()==0
    got,want = (torch.load(tmp_path/o, weights_only=True) for o in ('cut.out','whole.out'))
    assert not [k for k in want if got[k] != want[k]]

@pytest.mark.slow
@pytest.mark.parametrize('nw', [0, 2])
def test_kill_scripts(tmp_path, nw):
    "The same with a whole script, run anew after each kill"
    def start(name):
        args = [sys.executable, __file__, tmp_path/name/'last.pth', tmp_path/f'{name}.out', nw]
        p = subprocess.Popen([str(o) for o in args], stdout=subprocess.PIPE, text=True)
        p.stdout.readline()                                         # everything is imported
        return p
    for o in ('whole','cut'): (tmp_path/o).mkdir()
    p,t = start('whole'),time.time()
    p.wait()
    t,path,out = time.time()-t,tmp_path/'cut'/'last.pth',tmp_path/'cut.out'
    got = kill_until_done(lambda: start('cut'), path, out, t/6, 12, seed=nw)
    want = torch.load(tmp_path/'whole.out', weights_only=True)
    assert not [k for k in want if got[k] != want[k]]

if __name__ == '__main__':
    print('ready', flush=True)
    run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
