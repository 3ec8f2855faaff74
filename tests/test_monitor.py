"The monitor on runs made to collapse and on healthy ones; what it records; that it stays out of the way."
import csv, math, warnings
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from torch import nn
from helpers import rounding, small_augs, small_learner
from self_supervised_swav.evaluate import KNNMetric
from self_supervised_swav.models import create_swav_model
from self_supervised_swav.monitor import CollapseMonitor, CollapseWarning, EpochColumns
from self_supervised_swav.multiview import MultiView
from self_supervised_swav.resume import ResumeTraining, TrainingStopped
from self_supervised_swav.stats import code_entropy, effective_rank, feature_spread, mean_code_entropy
from test_distributed import ranks_learner, run_ranks

columns = ['loss/lnK','code_entropy','mean_code_entropy','proto_usage','feature_spread','effective_rank']
plain = dict(jitter=False, blur=False, flip_p=0.)

class Constant(nn.Module):
    "The same features for every image"
    def __init__(self):
        super().__init__()
        self.conv,self.features = nn.Conv2d(1, 1, 1),nn.Parameter(torch.randn(16))
    def forward(self, x): return self.features+0*self.conv(x).mean((1,2,3)).unsqueeze(1)

class Tiny(nn.Sequential):
    "An encoder that takes milliseconds"
    def __init__(self):
        super().__init__(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten())

def learner(encoder=None, n=400, bs=16, n_protos=20, augs=None, cbs=(), **kwargs):
    learn = small_learner(n=n, bs=bs, n_protos=n_protos, augs=augs or small_augs(**plain), cbs=[*cbs], **kwargs)
    torch.manual_seed(0)
    learn.model = create_swav_model(encoder or Tiny(), hidden_size=32, projection_size=16, n_protos=n_protos)
    return learn

def fit(learn, n_epoch=2, lr=3e-3):
    "The warnings of a fit"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        learn.fit(n_epoch, lr)
    return [str(o.message) for o in told if issubclass(o.category, CollapseWarning)]

# --- told, or not -----------------------------------------------------------------------------------------------------
def test_constant_encoder_is_told_once():
    learn = learner(Constant(), cbs=[CollapseMonitor()])
    told = fit(learn, 4, 1e-2)
    assert len(told)==1 and len(learn.recorder.values)==4
    assert learn.collapse_monitor.alarms[0][0]<=2*len(learn.dls.train)
    for o in ('every image has got the same code', 'ln(20) = 3.00', 'for 20 steps', 'eps=0.03 (now 0.05)',
              'lr=0.001 (now 0.01)', 'freeze_protos_pct=0.5 (now 0.25)'): assert o in told[0], o
    assert 'n_protos' in told[0] and '(now 20, more than the 16 samples' in told[0] and 'jitter' not in told[0]
    assert len(fit(learn, 2, 1e-2))==1  # another fit, told again

def test_stop_ends_the_fit_with_whole_epochs():
    learn = learner(Constant(), cbs=[CollapseMonitor(stop=True)])
    told = fit(learn, 6, 1e-2)
    assert len(told)==1 and told[0].endswith('The fit ends here.') and len(learn.recorder.values)==1
    assert len(learn.recorder.values[0])==len(learn.recorder.metric_names)-2 and None not in learn.recorder.values[0]
    assert len(learn.validate())>=1  # and does not end what comes after

def test_stop_within_an_epoch():
    learn = learner(Constant(), n=1000, cbs=[CollapseMonitor(stop=True, every=5)])
    learn.collapse_monitor.min_patience = 20
    assert len(learn.dls.train)==50 and len(fit(learn, 3))==1 and learn.collapse_monitor.n_steps==50

def test_far_too_high_learning_rate_is_told():
    learn = learner(n_protos=16, bs=32, n=640, cbs=[CollapseMonitor()], augs=small_augs())
    learn.model = create_swav_model(Tiny(), hidden_size=32, projection_size=16, n_protos=16, bn=False)
    told = fit(learn, 4, 3.)
    assert len(told)==1 and 'lr=0.3 (now 3)' in told[0] and 'jitter=False, blur=False' in told[0]

def test_queue_too_large_is_told():
    learn = learner(n=1400, bs=64, n_protos=64, K=1000, queue_start_pct=.2, cbs=[CollapseMonitor()])
    told = fit(learn, 8)
    assert len(told)==1
    for o in ('The queue is unstable', 'K=280 (now 1000, of 1120 training images)', 'up to 16 steps old'):
        assert o in told[0], o

@pytest.mark.parametrize('kwargs,lr', [
    (dict(), 1e-2), (dict(K=64, queue_start_pct=.25), 1e-2), (dict(n_protos=64), 1e-2), (dict(), 1e-5),
    (dict(eps=.03), 3e-3)])
def test_no_false_alarm(kwargs, lr):
    learn = learner(n=700, bs=32, cbs=[CollapseMonitor()], **kwargs)
    assert fit(learn, 5, lr)==[]

# --- what is recorded -------------------------------------------------------------------------------------------------
def test_numbers_are_those_of_stats():
    learn,seen,used = learner(n=100, cbs=[CollapseMonitor(every=2)]),[],[]
    class Look(Callback):
        order,run_valid = 90,False
        def after_loss(self):
            codes,z = self.swav.codes,self.pred[0].detach().unflatten(0, (3,-1))[:2].flatten(0,1)
            used.append(set(codes.argmax(-1).flatten().tolist()))
            means = codes.flatten(0,1).mean(0)
            nats = self.loss,code_entropy(codes),mean_code_entropy(codes)
            overlap = (means@self.last).item()*20 if hasattr(self, 'last') else None
            in_use = len(set.union(*used[-5:]))/20
            seen.append([*(o.item()/math.log(20) for o in nats), in_use, feature_spread(z).item(), overlap, 0.])
            self.last,self.z = means,z
    look = Look()
    learn.add_cb(look)
    fit(learn, 3)
    m = learn.collapse_monitor
    assert all(len(v)==15 for v in m.history.values())
    for i,row in enumerate(seen):
        for n,v in zip(m.history, row):
            # at most 32 codes of 20 prototypes are added, and the overlap is a sum times 20
            bound = rounding(torch.float32, 32+20+4, 20 if n=='code_overlap' else 4)
            if v is not None: assert m.history[n][i]==pytest.approx(v, abs=bound), (n,i)
    last = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    for n in columns[:3]+['feature_spread']: assert last[n]==pytest.approx(sum(m.history[n][10:])/5)
    assert last['proto_usage']==m.history['proto_usage'][-1]
    assert last['effective_rank']==pytest.approx(effective_rank(look.z).item(), rel=rounding(torch.float32))

def test_columns_of_table_and_csv(tmp_path):
    cbs = [CollapseMonitor(),CSVLogger(tmp_path/'log.csv')]
    learn = learner(n=100, cbs=cbs, learner=dict(path=tmp_path, metrics=[]))
    fit(learn, 2); fit(learn, 2)
    assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss',*columns,'time']
    rows = list(csv.DictReader((tmp_path/'log.csv').open()))
    assert [float(r['loss/lnK']) for r in rows]==[pytest.approx(v[2]) for v in learn.recorder.values]
    assert len(learn.metrics)==0

def test_tensorboard(tmp_path):
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = learner(n=100, cbs=[CollapseMonitor(), TensorBoardCallback(tmp_path, trace_model=False, log_preds=False)])
    fit(learn, 2)
    events = EventAccumulator(str(tmp_path)).Reload()
    for i,n in enumerate(columns):
        assert [e.value for e in events.Scalars(n)]==[pytest.approx(v[2+i]) for v in learn.recorder.values]

def test_stays_out_of_the_way(tmp_path):
    "Watching changes no weight; lr_find, validate and get_preds leave the history alone; export works"
    runs = []
    for cbs in ([],[CollapseMonitor()]):
        learn = learner(n=100, cbs=cbs, K=24, queue_start_pct=0., learner=dict(path=tmp_path))
        fit(learn, 2)
        runs.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    assert torch.equal(*runs)
    before = {k:list(v) for k,v in learn.collapse_monitor.history.items()}
    learn.validate(), learn.lr_find(num_it=8, show_plot=False), learn.get_preds(act=lambda x: x)
    assert learn.collapse_monitor.history==before and len(learn.metrics)==0
    learn.export('e.pkl')

def test_fit_of_its_own_and_after_an_error():
    learn = learner(n=100)
    learn.fit(1, cbs=CollapseMonitor())
    assert len(learn.recorder.values[0])==8
    class Fail(Callback):
        def after_step(self): raise RuntimeError('broken')
    learn = learner(n=100, cbs=[CollapseMonitor()])
    with pytest.raises(RuntimeError, match='broken'): learn.fit(1, cbs=Fail())
    learn.fit(1)
    assert list(learn.recorder.metric_names).count('code_entropy')==1

def test_no_look_between_looks(monkeypatch):
    "Reading numbers is what makes a host wait: it happens at looks alone"
    learn,looks = learner(n=400, cbs=[CollapseMonitor(every=7)]),[]
    tolist = torch.Tensor.tolist
    def watched(x):
        if type(x) is torch.Tensor: looks.append(tuple(x.shape))  # a subclass comes by once more, as a plain tensor
        return tolist(x)
    monkeypatch.setattr(torch.Tensor, 'tolist', watched)
    fit(learn, 1)
    n = 1+len(learn.swav.signs)  # the loss and the signs; a batch of crops reads tables of (any number,4)
    assert [s for s in looks if s in ((n,6),(n,7))]==[(n,7),(n,7),(n,6)]

@pytest.mark.parametrize('at', [3, 7, 9, 12])
def test_goes_on_where_the_fit_does(tmp_path, at):
    "Stopped within an epoch of 5 steps or at its end, and resumed: the same record, the same columns"
    def make(path):
        cbs = [CollapseMonitor(every=2),KNNMetric(k=3),ResumeTraining(path, every=100)]
        return learner(n=100, labeled=True, cbs=cbs)
    whole = make(tmp_path/'whole.pth')
    whole.fit(3, 3e-3)
    cut = make(tmp_path/'cut.pth')
    one_batch = cut.one_batch
    def asking(i, b):
        if cut.training and cut.train_iter==at-1: cut.resume_training.stop()
        one_batch(i, b)
    cut.one_batch = asking
    with pytest.raises(TrainingStopped): cut.fit(3, 3e-3)
    assert len(cut.recorder.losses)==at
    again = make(tmp_path/'cut.pth')
    again.fit(3, 3e-3)
    assert again.collapse_monitor.history==whole.collapse_monitor.history
    assert len(whole.collapse_monitor.history['code_entropy'])==15
    assert again.recorder.values==whole.recorder.values and None not in whole.recorder.values[-1]

def test_refused():
    with pytest.raises(ValueError, match='every must be a positive whole number, got 0'): CollapseMonitor(every=0)
    learn = learner(n=100, cbs=[CollapseMonitor()])
    learn.remove_cb(learn.swav)
    with pytest.raises(ValueError, match='must have a method'): learn.fit(1)

def test_epoch_columns_with_other_metrics():
    class Two(EpochColumns):
        def after_train(self): self.epoch_values.update(a=1., b=self.epoch)
    learn = learner(n=100, cbs=[Two(['a','b'])])
    learn.fit(2)
    assert list(learn.recorder.metric_names[3:5])==['a','b']
    assert [list(v[2:]) for v in learn.recorder.values]==[[1.,0],[1.,1]]

# --- another method, which the monitor does not know ------------------------------------------------------------------
class Agree(MultiView):
    "Embeddings of an image's first two crops should point the same way, and nothing keeps all of them apart"
    signs,columns = ('distance','spread'),('distance','last_spread')
    @property
    def chance_loss(self): return 1.,'one'
    def _pair(self, pred): return nn.functional.normalize(pred[0], dim=1).unflatten(0, (self.n_views,-1))[:2]
    def view_loss(self, pred):
        a,b = self._pair(pred)
        return (1-(a*b).sum(1)).mean()
    def health(self, pred):
        self.seen['n'] = self.seen.get('n', 0)+1
        return dict(spread=feature_spread(self._pair(pred)), distance=self.learn.loss.detach())
    def epoch_health(self, history): return super().epoch_health(history) | dict(last_spread=history['spread'][-1])
    def judge(self, history, n):
        if max(history['spread'][-n:])<1e-3: return f'All embeddings are the same for {n} steps.'

def other_method(*cbs, encoder=None):
    learn = learner(encoder, n=400, cbs=cbs)
    learn.remove_cb(learn.swav)
    learn.add_cb(Agree(small_augs(**plain)))
    return learn

def test_another_methods_signs_columns_and_judgment():
    learn = other_method(CollapseMonitor(every=3))
    assert fit(learn, 2)==[]
    m = learn.collapse_monitor
    assert list(m.history)==['distance','spread'] and len(m.history['spread'])==len(m.losses)==40
    assert m.history['distance']==m.losses
    assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','distance','last_spread','time']
    last = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert last['distance']==pytest.approx(sum(m.losses[20:])/20) and last['last_spread']==m.history['spread'][-1]
    assert m.verdict()=='Nothing amiss in 40 steps.' and learn.agree.seen=={}
    learn = other_method(CollapseMonitor(stop=True), encoder=Constant())
    assert fit(learn, 4)==['All embeddings are the same for 20 steps. The fit ends here.']
    assert learn.collapse_monitor.n_steps==20

def test_another_method_goes_on_where_the_fit_does(tmp_path):
    def make(path): return other_method(CollapseMonitor(every=7), ResumeTraining(path, every=100))
    whole = make(tmp_path/'whole.pth')
    whole.fit(2, 3e-3)
    cut = make(tmp_path/'cut.pth')
    one_batch = cut.one_batch
    def asking(i, b):
        if cut.training and cut.train_iter==24: cut.resume_training.stop()
        one_batch(i, b)
    cut.one_batch = asking
    with pytest.raises(TrainingStopped): cut.fit(2, 3e-3)
    again = make(tmp_path/'cut.pth')
    again.fit(2, 3e-3)
    assert again.collapse_monitor.history==whole.collapse_monitor.history
    assert again.recorder.values==whole.recorder.values

# --- the verdict ------------------------------------------------------------------------------------------------------
def test_verdict():
    m = CollapseMonitor()
    assert m.verdict()=='No step was recorded.'
    learn = learner(n=50, cbs=[CollapseMonitor()])
    learn.fit(1)
    assert learn.collapse_monitor.verdict()=='Too short to judge: 2 steps, and 20 are needed.'
    learn = learner(Constant(), cbs=[CollapseMonitor()])
    fit(learn, 2, 1e-2)
    assert learn.collapse_monitor.verdict().startswith('Step 20: This run does not learn')
    learn = learner(n=400, cbs=[CollapseMonitor()])
    learn.collapse_monitor.min_patience = 5
    fit(learn, 1, 0.)  # weights that nothing changes: predictions stay confident and wrong
    for o in ('but the loss of the last 20', 'ln 20 = 3.00'): assert o in learn.collapse_monitor.verdict(), o

# --- several processes ------------------------------------------------------------------------------------------------
def _rank(rank, size):
    learn = ranks_learner([6]*size, rank, cbs=[CollapseMonitor(stop=True, every=3)])
    learn.collapse_monitor.min_patience = 4
    learn.model.encoder = Constant8()
    with learn.distrib_ctx(sync_bn=False): told = fit(learn, 5)
    m = learn.collapse_monitor
    return dict(told=told, n_steps=m.n_steps, history=m.history, alarms=m.alarms)

class Constant8(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Parameter(torch.linspace(-1, 1, 8))
    def forward(self, x): return self.features+0*x.mean((1,2,3)).unsqueeze(1)

def test_ranks_stop_together_and_one_speaks(tmp_path):
    a,b = run_ranks(_rank, 2, tmp_path)
    assert a['history']==b['history'] and a['alarms']==b['alarms'] and a['n_steps']==b['n_steps']<20
    assert len(a['told'])==1 and b['told']==[] and 'the 12 samples' not in a['told'][0]
