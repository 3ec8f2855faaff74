"The callback in real fits: everything that fastai users do with a Learner, the queue's life, errors, and the device."
import inspect, json, os, shutil, warnings
from collections import Counter
from contextlib import nullcontext
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.vision.all import (
    ChannelsLast, CSVLogger, DataBlock, EarlyStoppingCallback, GradientAccumulation, GradientClip, ImageBlock,
    MixedPrecision, Normalize, PILImage, Pipeline, SaveModelCallback, ShortEpochCallback, ShowGraphCallback,
    get_image_files, load_learner, noop, tuplify)
from torch import nn
from helpers import (NoWait, digits, method_cases, method_learner, needs_pretended_gpu, rounding, small_augs,
                     small_encoder, small_learner)
from self_supervised_swav.learner import setting_groups
from self_supervised_swav.models import Prototypes, SwAVModel, create_mlp_module, create_swav_model, in_eval
from self_supervised_swav.multiview import method_of, methods
from self_supervised_swav.resume import ResumeTraining, TrainingStopped
from self_supervised_swav.sinkhorn import sinkhorn
from self_supervised_swav.swav import SWAV

def norms(learn): return learn.model.prototypes.weight.norm(dim=1)
def finite(learn): return np.isfinite([float(o) for o in learn.recorder.losses]).all() and len(learn.recorder.losses)>0

class CountSteps(Callback):
    order = 100
    def before_fit(self): self.n_taken = 0
    def after_step(self): self.n_taken += 1

# --- what each method goes through, by its name -----------------------------------------------------------------------
# version 1 of MoCo is version 2 with another head and other crops: the same code runs
each_method = pytest.mark.parametrize('case', [pytest.param(o, marks=pytest.mark.slow) if o=='mocov1' else o
                                               for o in method_cases])

def with_methods(name, values):
    """Parameters `name` and `case`: each value with SwAV and its queue, and with one of the other methods in turn. All
    other pairs are slow: what fastai does in a fit does not know the method"""
    values,others = list(values),[o for o in method_cases if o not in ('swav-queue','mocov1')]
    quick = {(v,c) for i,v in enumerate(values) for c in ('swav-queue',others[i%len(others)])}
    def param(v, c):
        words = '-'.join(map(str, v if isinstance(v, tuple) else (v,)))
        return pytest.param(v, c, id=f'{words}-{c}', marks=[] if (v,c) in quick else pytest.mark.slow)
    return pytest.mark.parametrize(f'{name},case', [param(v, c) for v in values for c in method_cases])

def weights_of(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

fits = dict(
    fit=lambda l: l.fit(1), fit_one_cycle=lambda l: l.fit_one_cycle(1), fit_flat_cos=lambda l: l.fit_flat_cos(1),
    fit_warmup_cos=lambda l: l.fit_warmup_cos(1), validate=lambda l: l.validate(),
    lr_find=lambda l: l.lr_find(num_it=8, show_plot=False), twice=lambda l: (l.fit(1), l.fit(1)))

@with_methods('how', [*((o,False) for o in fits), ('fit',True)])
def test_fits(how, case):
    how,labeled = how
    learn = method_learner(case, labeled=labeled, cbs=[CountSteps])
    own,before = learn.loss_func,weights_of(learn)
    fits[how](learn)
    assert learn.loss_func is own
    if how in ('validate','lr_find'): assert torch.equal(weights_of(learn), before)
    else: assert not torch.equal(weights_of(learn), before)
    if how!='validate': assert finite(learn)
    assert np.isfinite(learn.validate()[0])

cbs = dict(
    accumulate=lambda p: [GradientAccumulation(40)], clip=lambda p: [GradientClip(1.)],
    short=lambda p: [ShortEpochCallback(.3)], csv=lambda p: [CSVLogger(p/'log.csv')],
    save=lambda p: [SaveModelCallback(monitor='valid_loss')],
    stop=lambda p: [EarlyStoppingCallback(monitor='valid_loss', patience=0)], graph=lambda p: [ShowGraphCallback()],
    channels_last=lambda p: [ChannelsLast()], fp16=lambda p: [MixedPrecision('fp16')],
    bf16=lambda p: [MixedPrecision('bf16')])

@pytest.mark.filterwarnings('ignore')
@with_methods('name', cbs)
def test_with_callbacks(name, case, tmp_path):
    learn = method_learner(case, cbs=[*cbs[name](tmp_path), CountSteps], path=tmp_path)
    own = learn.loss_func
    if name=='graph':
        from fastai.callback.progress import ProgressCallback
        learn.add_cb(ProgressCallback)
    learn.fit(2)
    assert learn.loss_func is own and (finite(learn) or name=='short')
    # 5 batches of 16 an epoch: 40 are reached after 3, 6 and 9 of the 10; a short epoch has 3
    n = dict(accumulate=3, short=6).get(name)
    if n: assert learn.count_steps.n_taken==n
    if name=='csv': assert len((tmp_path/'log.csv').read_text().splitlines())==3
    if name=='save': assert (tmp_path/'models'/'model.pth').exists()
    plt.close('all')

def outputs(learn, dl, **kwargs): return tuplify(learn.get_preds(dl=dl, **kwargs)[0])

@each_method
def test_whole_images_saved_and_exported(case, tmp_path):
    learn = method_learner(case, path=tmp_path)
    learn.fit(1)
    with in_eval(learn.model): batches = [tuplify(learn.model(b[0])) for b in learn.dls.valid]
    expected = [torch.cat(o) for o in zip(*batches, strict=True)]
    for o,e in zip(outputs(learn, learn.dls.valid), expected, strict=True): assert torch.equal(o, e)
    learn.save('a')
    other = method_learner(case, seed=1, path=tmp_path)
    other.load('a')
    assert torch.equal(weights_of(other), weights_of(learn))
    assert all(str(v)==str(learn.model.state_dict()[k]) for k,v in other.model.state_dict().items())
    other.fit(1)
    learn.export('e.pkl')
    again = load_learner(tmp_path/'e.pkl')
    for o,e in zip(outputs(again, digits(100).valid), expected, strict=True): assert torch.equal(o, e)
    learn.dls = digits(100)
    learn.fit(1)

@each_method
def test_the_same_seed_twice_and_looking_changes_nothing(case):
    runs = []
    class Show(Callback):
        def after_epoch(self): method_of(self.learn).show(1), self.learn.sample_images(max_images=10)
    for look in (False,False,True):
        learn = method_learner(case, n=60, cbs=[Show] if look else [], monitor=look)
        if look: method_of(learn).show(2)
        with learn.no_logging(): learn.fit_one_cycle(3)
        runs.append(weights_of(learn))
        plt.close('all')
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])

@each_method
@pytest.mark.parametrize('at', [4,6])
def test_stopped_and_resumed_is_as_not_stopped(case, at, tmp_path):
    def make(name): return method_learner(case, n=60, cbs=ResumeTraining(tmp_path/name, every=100), monitor=True)
    whole = make('whole.pth')
    whole.fit(3)
    cut = make('cut.pth')
    one_batch = cut.one_batch
    def stopping(i, b):
        if cut.training and cut.train_iter==at-1: cut.resume_training.stop()
        one_batch(i, b)
    cut.one_batch = stopping
    with pytest.raises(TrainingStopped): cut.fit(3)
    again = make('cut.pth')
    again.fit(3)
    assert len(cut.recorder.losses)==at and torch.equal(weights_of(again), weights_of(whole))
    assert again.recorder.values==whole.recorder.values
    assert again.collapse_monitor.history==whole.collapse_monitor.history

@each_method
def test_what_a_method_says_of_itself(case):
    "Every answer is of the kind that monitor, report and pictures take"
    learn = method_learner(case, n=300, monitor=True)
    cb,m = method_of(learn),learn.collapse_monitor
    assert isinstance(cb.title, str)
    learn.fit(2)
    assert list(m.history)==list(cb.signs) and all(len(v)==30 and np.isfinite(v).all() for v in m.history.values())
    assert list(m.epoch_values)==list(cb.columns) and all(isinstance(v, float) for v in m.epoch_values.values())
    assert cb.chance_loss is None or 0<cb.chance_loss[0]<np.inf and isinstance(cb.chance_loss[1], str)
    assert set().union(*cb.curves.values())<=set(cb.signs)
    assert all(isinstance(k, str) and isinstance(v, str) for k,v in cb.model_settings().items())
    assert 'encoder' in cb.model_settings()
    arguments = inspect.signature(type(cb).__init__).parameters
    assert cb.settings() and set(cb.settings())<set(arguments) and json.dumps(cb.settings())
    assert all(isinstance(k, str) and 0<=v<=30 for k,v in cb.marks(m.history).items())
    assert cb.judge(m.history, m.patience) is None or isinstance(cb.judge(m.history, m.patience), str)
    assert all(isinstance(o, str) for o in cb.concerns(400, 16))
    sample = learn.sample_images(max_images=30)
    for o in cb.pictures(sample):
        fig = plt.figure()
        assert o.draw(fig=fig) and o.title and o.alt and o.caption
    plt.close('all')

def test_a_setting_of_two_functions_means_the_same_in_both():
    for name in methods:
        groups = setting_groups(name)
        counts = Counter(o for names in groups.values() for o in names)
        for shared in (o for o,n in counts.items() if n>1):
            recipe = method_learner(name, monitor=True, **{shared: 1}).recipe
            assert all(recipe[g][shared]==1 for g,names in groups.items() if shared in names), (name,shared)

# --- ways out, of each method -----------------------------------------------------------------------------------------
@with_methods('moment', [(e,o) for e in ('before_batch','after_pred','after_loss','before_step','after_batch')
                         for o in (-1,60)])
def test_own_loss_is_back_on_every_way_out(moment, case):
    event,order = moment
    learn,order_ = method_learner(case, n=40),order
    own = learn.loss_func
    class Out(Callback):
        order = order_
    for exc in (CancelBatchException,CancelFitException,RuntimeError,KeyboardInterrupt):
        if event=='after_batch' and exc is CancelBatchException: continue  # fastai lets it through
        setattr(Out, event, lambda self: (_ for _ in ()).throw(exc('out')))
        cb = Out()
        learn.add_cb(cb)
        cancels = issubclass(exc, (CancelBatchException,CancelFitException))
        with nullcontext() if cancels else pytest.raises(exc): learn.fit(1)
        if cancels or event!='after_pred' or order==-1: assert learn.loss_func is own, exc
        learn.remove_cb(cb)
        learn.fit(1)
        assert learn.loss_func is own and finite(learn), exc

@each_method
@pytest.mark.parametrize('where,name', [('images','images'),('weights','')])
def test_not_finite(case, where, name):
    learn = method_learner(case)
    learn.fit(1)
    state = {k:v.clone() for k,v in learn.model.state_dict().items() if isinstance(v, torch.Tensor)}
    if where=='images': learn.dls.train.dataset.x[33] = float('inf')
    else: next(p for p in learn.model.projector.parameters()).data[0] = float('nan')
    with pytest.raises(FloatingPointError, match=rf'{name}.* not finite in batch \d of epoch 0'): learn.fit(1)
    if where=='images': learn.dls.train.dataset.x[33] = 0
    learn.model.load_state_dict(state, strict=False)
    learn.fit(1)
    assert finite(learn)

# --- the training of SwAV ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize('K', [None,24])
def test_prototypes_have_unit_norm(K):
    learn = small_learner(K=K, queue_start_pct=0.)
    learn.fit(1)
    # a norm is the root of a sum of 8 squares
    assert (norms(learn)-1).abs().max()<=rounding(torch.float32, 8+2)

@pytest.mark.parametrize('how', ['channels_last', pytest.param('compiled', marks=[pytest.mark.slow,
    pytest.mark.skipif(not shutil.which(os.environ.get('CXX', 'g++')), reason='torch.compile needs a C++ compiler')])])
def test_encoder_in_another_layout_or_compiled_trains_alike(how):
    losses = []
    for changed in (False,True):
        learn = small_learner(K=24, cbs=[ChannelsLast()] if changed and how=='channels_last' else [])
        if changed and how=='compiled': learn.model.encoder = torch.compile(learn.model.encoder)
        learn.fit(1)
        losses.append([float(o) for o in learn.recorder.losses])
    np.testing.assert_allclose(*losses, rtol=2e-3)

@pytest.mark.parametrize('dtype', [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_float32_from_scores_to_loss_under_autocast(dtype):
    learn = small_learner(K=24, queue_start_pct=0.)
    seen = {}
    class Look(Callback):
        order = 50
        def after_pred(self): seen.update(scores=self.pred[1].dtype)
        def after_loss(self): seen.update(loss=self.loss.dtype, codes=self.swav.codes.dtype)
    learn.add_cb(Look())
    with torch.autocast('cpu', dtype=dtype): learn.fit(1)
    assert set(seen.values())=={torch.float32} and finite(learn)

@pytest.mark.parametrize('K', [None,24])
@pytest.mark.parametrize('dtype', [torch.float64,torch.float32,torch.bfloat16])
def test_weights_of_any_type(dtype, K):
    learn = small_learner(K=K, queue_start_pct=0.)
    learn.model.to(dtype)
    learn.fit(2)
    assert finite(learn) and {p.dtype for p in learn.model.parameters()}=={dtype} and learn.swav.uses_queue==bool(K)
    # a row's norm is a sum of 8 squares, and then each entry is rounded to the type of the weights
    bound = rounding(dtype, 2)+rounding(torch.float32, 8+2)
    learn.model.double()
    assert (norms(learn)-1).abs().max()<=bound
    assert learn.get_preds()[0][1].isfinite().all()

def test_last_batch_may_be_shorter():
    learn = small_learner(n=60, bs=16, K=20, queue_start_pct=0., dls=digits(60, bs=16))
    learn.dls.train.drop_last = False
    assert [len(b[0]) for b in learn.dls.train]==[16,16,16]
    learn.dls.train = learn.dls.train.new(bs=20, drop_last=False)
    learn.fit(1)
    assert len(learn.recorder.losses)==3 and finite(learn) and learn.model.queue.n_pushed==48

def test_queue_travels(tmp_path):
    "A Learner without a queue, or with one of another length, loads the file too"
    learn = small_learner(K=24, learner=dict(path=tmp_path))
    learn.fit(1)
    learn.save('a')
    for K in (24,None,30):
        other = small_learner(seed=1, K=K, learner=dict(path=tmp_path))
        other.load('a')
        assert torch.equal(other.model.queue.features, learn.model.queue.features)
        other.fit(1)

# --- what a step computes ---------------------------------------------------------------------------------------------
def test_loss_is_the_method():
    "The loss of a step from its parts: model, plain Sinkhorn over scores and queue, swapped prediction"
    learn = small_learner(K=24, queue_start_pct=0., eps=.1, temp=.2)
    seen = []
    class Look(Callback):
        order = 50
        def before_batch(self): self.before = self.model.queue.features.clone()
        def after_loss(self):
            z,scores = (o.detach().unflatten(0, (3,-1)) for o in self.pred)
            codes = []
            for a in (0,1):
                rows = scores[a]
                if self.model.queue.n_pushed>24+16:
                    rows = torch.cat([rows, self.before[a]@self.model.prototypes.weight.T])
                codes.append(sinkhorn(rows, .1, 3)[:len(scores[a])])
            pairs = [(a,v) for a in (0,1) for v in range(3) if a!=v]
            by_hand = sum(-(codes[a]*(scores[v]/.2).log_softmax(1)).sum(1).mean() for a,v in pairs)/len(pairs)
            seen.append((self.loss.item(), by_hand.item()))
    learn.add_cb(Look())
    learn.fit(1)
    ours,by_hand = map(np.array, zip(*seen[:5]))
    # scores of 8 terms become exponents of up to 1/eps=10 and 1/temp=5; three iterations with sums over 40 rows and
    # 20 prototypes; the loss is below 10
    np.testing.assert_allclose(ours, by_hand, atol=rounding(torch.float32, 8*15+3*(40+20)+20, 10), rtol=0)

def test_thirty_seeded_steps_twice():
    runs = []
    for _ in range(2):
        learn = small_learner(K=24, queue_start_pct=.2, augs=small_augs(blur=True))
        learn.fit_one_cycle(6)
        runs.append([float(o) for o in learn.recorder.losses])
    assert len(runs[0])==30 and runs[0]==runs[1]

# --- queue and frozen prototypes --------------------------------------------------------------------------------------
def test_queue_changes_in_training_steps_alone():
    learn = small_learner(K=24, queue_start_pct=.5)
    learn.validate()
    assert learn.model.queue.n_pushed==0
    learn.fit(1)
    n,features = learn.model.queue.n_pushed,learn.model.queue.features.clone()
    assert n==80 and learn.model.queue.features.norm(dim=2).sub(1).abs().max()<1e-5
    learn.validate(), learn.get_preds(act=noop), learn.swav.show(1), learn.lr_find(num_it=6, show_plot=False)
    assert learn.model.queue.n_pushed==n and torch.equal(learn.model.queue.features, features)
    learn.fit(1)
    assert learn.model.queue.n_pushed==160  # it is not lost between two fits
    plt.close('all')

@pytest.mark.parametrize('K,pct,first', [(24,.5,5),(24,0.,2),(70,0.,5),(24,1.,None)])
def test_queue_is_used_when_full_and_wanted(K, pct, first):
    learn = small_learner(K=K, queue_start_pct=pct)
    used = []
    class Look(Callback):
        def after_pred(self):
            if self.training: used.append(self.swav.uses_queue)
    learn.add_cb(Look())
    learn.fit(2)
    assert used==[first is not None and i>=first for i in range(10)]

@pytest.mark.parametrize('pct,n_frozen', [(None,5),(0.,0),(.3,3),(1.,10)])
def test_frozen_prototypes(pct, n_frozen):
    learn = small_learner(freeze_protos_pct=pct)
    weights = []
    class Look(Callback):
        order = 100
        def before_fit(self): weights.append(self.model.prototypes.weight.detach().clone())
        def after_step(self): weights.append(self.model.prototypes.weight.detach().clone())
    learn.add_cb(Look())
    learn.fit(2)
    moved = [not torch.allclose(a, b, atol=1e-6) for a,b in zip(weights, weights[1:])]
    assert moved==[i>=n_frozen for i in range(10)]

# --- values that are not finite ---------------------------------------------------------------------------------------
@pytest.mark.parametrize('where,name', [('images','images'),('weights','embedding'),('prototypes','scores')])
def test_not_finite_is_named(where, name):
    learn = small_learner()
    learn.fit(1)
    before = {k:v.clone() for k,v in learn.model.state_dict().items() if isinstance(v, torch.Tensor)}
    if where=='images': learn.dls.train.dataset.x[33] = float('inf')
    broken = dict(weights=learn.model.projector[0], prototypes=learn.model.prototypes).get(where)
    if broken is not None: broken.weight.data[0] = float('nan')
    with pytest.raises(FloatingPointError, match=rf'{name} not finite in batch \d of epoch 0'): learn.fit(1)
    if where=='images': learn.dls.train.dataset.x[33] = 0
    else: learn.model.load_state_dict(before, strict=False)
    learn.fit(1)
    assert finite(learn)

# --- errors -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kw,exc,text', [
    (dict(crop_assgn_ids=[0,3]), ValueError, 'crop_assgn_ids .*3 crops.*got'),
    *((dict(crop_assgn_ids=o), ValueError, 'crop_assgn_ids') for o in ([],[-1],[0,0])),
    *((dict(aug_pipelines=o), ValueError, 'at least two') for o in (small_augs()[:1],[])),
    *((dict(aug_pipelines=o), TypeError, 'aug_pipelines') for o in (None,[1,2])),
    (dict(aug_pipelines=[Pipeline([noop])]*2), ValueError, 'split_idx=0'),
    (dict(eps=0), ValueError, 'eps must be positive, got 0'), (dict(temp=-.1), ValueError, 'temp must be positive'),
    *((dict(K=o), ValueError, f'K must be .*got {o}') for o in (0,-3,2.5)),
    (dict(queue_start_pct=1.1), ValueError, 'queue_start_pct must be in'),
    (dict(freeze_protos_pct=-.1), ValueError, 'freeze_protos_pct must be in'),
    (dict(n_sinkh_iter=0), ValueError, 'n_sinkh_iter')])
def test_argument_errors(kw, exc, text):
    with pytest.raises(exc, match=text): SWAV(**(dict(aug_pipelines=small_augs())|kw))

class Flat(nn.Module):
    "An encoder that forgets to pool"
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(1, 4, 3)
    def forward(self, x): return self.conv(x)

def test_errors_before_the_first_step():
    def fails(learn, exc, text):
        before = torch.cat([p.detach().flatten().clone() for p in learn.model.parameters()])
        with pytest.raises(exc, match=text): learn.fit(1)
        assert torch.equal(before, torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    fails(small_learner(K=80), ValueError, 'K must be smaller than the training set of 80 images, got 80')
    fails(small_learner(dls=digits(100, n_in=3)), ValueError, 'images must have .*1 channel.*got 3')
    learn = small_learner()
    learn.model = nn.Sequential(small_encoder(), nn.Linear(16, 4))
    fails(learn, TypeError, 'prototypes')
    with pytest.raises(ValueError, match=r'\(2,n\)'): create_swav_model(Flat())
    with pytest.raises(ValueError, match='num_crops.*crop_sizes'): small_augs(num_crops=(2,1,1))
    learn = small_learner()
    learn.model.encoder = nn.Sequential(nn.Conv2d(1, 16, 13), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    fails(learn, ValueError, r'crop_sizes .*got \(10, 10\)')
    learn = small_learner(dls=digits(100))
    learn.dls.train.dataset.x = (learn.dls.train.dataset.x*255).byte()
    fails(learn, TypeError, 'floating point')

def test_the_class_instead_of_a_callback():
    with pytest.raises(TypeError, match=r'write cbs=\[SWAV\(augs\)\], not cbs=\[SWAV\]'): small_learner(cbs=[SWAV])

def test_warns_of_codes_for_small_crops():
    augs = small_augs()
    with pytest.warns(UserWarning, match=r'gives codes to crops of 10 px, while others have 16 px'): SWAV(augs[::-1])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        SWAV(augs), SWAV(augs, crop_assgn_ids=[0]), SWAV(augs[1:]), SWAV([Pipeline([noop], split_idx=0)]*2)

@pytest.mark.parametrize('change,text', [
    (lambda x: x*255, r'must be in \[0,1\], got 0 to 255: divide them'),
    (lambda x: (x-.5)/.25, r'got -2 to 2: they look normalized already'),
    (lambda x: x*float('nan'), 'images not finite')])
def test_range_of_images(change, text):
    learn = small_learner(dls=digits(100))
    x = learn.dls.train.dataset.x
    learn.dls.train.dataset.x = change(x)
    with pytest.raises((ValueError,FloatingPointError), match=text): learn.fit(1)
    learn.dls.train.dataset.x = x*1.2-.1  # resizing may go a little beyond
    learn.fit(1)

def image_files(path, n=20, **kwargs):
    "DataLoaders as fastai makes them from a folder of images without labels"
    for i,(x,*_) in enumerate(digits(n, n_in=3).train.dataset):
        PILImage.create((x.permute(1,2,0)*255).byte().numpy()).save(path/f'{i}.png')
    block = DataBlock((ImageBlock,), get_items=get_image_files, **kwargs)
    return block.dataloaders(path, bs=8, num_workers=0, device='cpu')

def test_plain_fastai_data(tmp_path):
    learn = small_learner(n_in=3, dls=image_files(tmp_path), learner=dict(loss_func=noop))
    learn.fit(1)
    assert finite(learn)

def test_batches_that_are_normalized_are_named(tmp_path):
    dls = image_files(tmp_path, batch_tfms=Normalize.from_stats([.5]*3, [10.]*3))  # in [0,1], but normalized
    learn = small_learner(n_in=3, dls=dls, learner=dict(loss_func=noop))
    with pytest.raises(ValueError, match='`Normalize` in batch_tfms has normalized them; leave it out'): learn.fit(1)

def test_no_batch_to_train_on():
    learn = small_learner()
    learn.dls.train.bs = 90
    text = 'dls.train must have batches to train on, got none: bs=90 and 80 training images'
    with pytest.raises(ValueError, match=text): learn.fit(1)
    assert np.isfinite(learn.validate()[0])

@pytest.mark.parametrize('labeled', [False,True])
def test_predict_and_show_results_say_what_to_use(labeled):
    learn = small_learner(labeled=labeled)
    own = learn.loss_func
    image = torch.rand(1, 16, 16)
    wrong = (learn.show_results,{}),(learn.predict,dict(item=image)),(learn.get_preds,dict(with_decoded=True))
    for f,args in wrong:
        with pytest.raises(ValueError, match=r'predicts no labels: extract_features.*learn.swav.show\(\)'): f(**args)
        assert learn.loss_func is own
    embedding,scores = learn.get_preds()[0]  # no activation of a classifier's loss
    assert learn.loss_func is own and embedding.shape==(20,8) and scores.abs().max()<=1+1e-6
    learn.fit(1)

# --- pictures ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('n_in', [1,3])
def test_show_before_during_after(n_in):
    learn = small_learner(n_in=n_in, dls=digits(100, n_in=n_in), augs=small_augs((2,2)))
    def look(n):
        axes = learn.swav.show(n=n)
        assert len(axes)==4*n and [ax.images[0].get_array().shape[0] for ax in axes[:4]]==[16,16,10,10]
        a = np.asarray(axes[0].images[0].get_array())
        assert a.shape==((16,16) if n_in==1 else (16,16,3)) and 0<=a.min() and a.max()<=1
        plt.close('all')
        return a
    assert not np.array_equal(look(2), look(1))
    class Look(Callback):
        order = 50
        def after_pred(self): look(1)
    learn.add_cb(Look())
    learn.fit(1)
    look(3)
    with pytest.raises(ValueError, match='n must be at least 1, got 0'): learn.swav.show(0)

@pytest.mark.skipif(torch.cuda.is_available(), reason='there the allocator keeps the memory')
def test_crops_use_memory_again():
    "A step's crops are written where the last step's were, unless somebody keeps those"
    class Keep(Callback):
        def before_fit(self): self.kept,self.places = [],[]
        def before_backward(self):
            crop = self.xb[0][0]
            self.places.append(crop.data_ptr())
            if self.train_iter%2: self.kept.append((crop,crop.clone()))
    learn = small_learner(n=100, cbs=[Keep()])
    learn.fit(1)
    a,b,c,d,_ = learn.keep.places # five steps, of which the second and the fourth are kept
    assert a==b!=c==d
    assert len(learn.keep.kept)==2 and all(torch.equal(x,y) for x,y in learn.keep.kept)

def test_print_augs(capsys):
    SWAV(small_augs(), print_augs=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines)==3 and 'size=16' in lines[0] and 'size=10' in lines[2] and 'scale=(0.1, 0.4)' in lines[2]

# --- the device, without one ------------------------------------------------------------------------------------------
@pytest.mark.parametrize('K', [None,24])
@pytest.mark.parametrize('hard', [False,True])
@needs_pretended_gpu
def test_whole_step_on_a_pretended_gpu(K, hard):
    "Crops, model, codes, queue and loss touch no other device and wait for nothing: each would raise here"
    from torch._subclasses import FakeTensorMode
    from types import SimpleNamespace
    with FakeTensorMode(), torch.device('cuda'):
        model = SwAVModel(small_encoder(), create_mlp_module(16, 16, 8), Prototypes(8, 20))
        cb = SWAV(small_augs(), K=K, queue_start_pct=0., hard=hard)
        cb.learn = SimpleNamespace(model=model, training=True, pct_train=.5, n_epoch=2, train_iter=7,
                                   dls=SimpleNamespace(train=range(5)))
        if K: model.queue.resize(2, K, 8)
        with NoWait():
            for _ in range(3):
                cb.images = torch.rand(16, 1, 16, 16)
                assert cb._is_time_to_look is False
                crops = cb.cut(cb.images)
                assert all(c.device.type=='cuda' for c in crops)
                pred = model(crops)
                loss = cb.learn.loss = cb.view_loss(pred)
                health = cb.health(pred)
        assert loss.device.type=='cuda' and loss.dtype==torch.float32
        assert all(o.device.type=='cuda' and o.ndim==0 for o in health.values())
        assert cb.uses_queue==bool(K)
