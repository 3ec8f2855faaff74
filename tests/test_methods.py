"SimCLR, MoCo and DeepCluster-v2: what is theirs alone. What every method goes through is in test_swav.py."
import copy
import pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import Learner
from torch import nn
from helpers import digits, method_learner, rounding, seed_all, small_encoder
from self_supervised_swav.contrastive import info_nce, nt_xent
from self_supervised_swav.deepcluster import DeepClusterV2, FeatureMemory, create_deepcluster_model, get_deepcluster_aug_pipelines
from self_supervised_swav.evaluate import extract_features, knn_accuracy
from self_supervised_swav.kmeans import spherical_kmeans
from self_supervised_swav.learner import pretrain_learner
from self_supervised_swav.moco import MoCo, create_moco_model, get_moco_aug_pipelines
from self_supervised_swav.multiview import method_of
from self_supervised_swav.resume import ResumeTraining, TrainingStopped
from self_supervised_swav.simclr import SimCLR, create_simclr_model, get_simclr_aug_pipelines

class Keep(Callback):
    "What a step saw and what it made of it"
    order = 90
    def before_fit(self): self.steps = []
    def after_loss(self):
        if not self.training: return
        pred = self.pred if isinstance(self.pred, tuple) else (self.pred,)
        self.steps.append(dict(pred=[o.detach().clone() for o in pred], loss=self.loss.detach().clone()))

# --- SimCLR --------------------------------------------------------------------------------------------------------------
def test_simclr_loss_of_a_fit():
    learn = method_learner('simclr', cbs=[Keep])
    learn.fit(1)
    for step in learn.keep.steps:
        z = step['pred'][0].unflatten(0, (2,-1))
        torch.testing.assert_close(step['loss'], nt_xent(z.double(), learn.simclr.temp).float(), atol=rounding(torch.float32, 200, 10.), rtol=0)

def test_simclr_multi_crop():
    learn = method_learner('simclr', num_crops=(2,2), crop_sizes=(16,10), min_scales=(.4,.1), max_scales=(1.,.4), cbs=[Keep])
    learn.fit(1)
    assert learn.simclr.n_views==4 and learn.keep.steps[0]['pred'][0].shape[0]==4*16

# --- MoCo ----------------------------------------------------------------------------------------------------------------
def moco_learner(n=100, K=40, m=.9, bn_splits=1, cbs=(), seed=0, **kwargs):
    seed_all(seed)
    model = create_moco_model(small_encoder(), 16, 8, bn_splits=bn_splits)
    augs = get_moco_aug_pipelines(16, flip_p=0., jitter=False, blur=False, stats=None)
    learn = Learner(digits(n), model, cbs=[MoCo(augs, K=K, m=m, **kwargs), *cbs])
    learn.remove_cbs(learn.progress)
    learn.logger = lambda *_: None
    return learn

def test_momentum_by_hand():
    class ByHand(Callback):
        "The update of the paper, parameter by parameter; it runs before the callback's own"
        order,worst = MoCo.order-1,0.
        def before_step(self): self.keys = [p.detach().clone() for p in self.key_params()]
        def after_step(self): self.wanted = [.9*k+.1*q.detach() for k,q in zip(self.keys, [*self.model.encoder.parameters(), *self.model.projector.parameters()])]
        def after_batch(self):
            if self.training:
                for k,w in zip(self.key_params(), self.wanted): torch.testing.assert_close(k, w, atol=rounding(torch.float32, 4, k.abs().max().item()), rtol=0)
        def key_params(self): return [*self.model.key_encoder.parameters(), *self.model.key_projector.parameters()]
    learn = moco_learner(cbs=[ByHand])
    before = [p.clone() for p in learn.model.key_encoder.parameters()]
    learn.fit(2)
    assert any(not torch.equal(a, b) for a,b in zip(before, learn.model.key_encoder.parameters()))

@pytest.mark.parametrize('m', [0.,1.])
def test_momentum_at_its_ends(m):
    learn = moco_learner(m=m)
    before = copy.deepcopy(learn.model)
    learn.fit(1)
    wanted = before.encoder if m==1. else learn.model.encoder
    for a,b in zip(learn.model.key_encoder.parameters(), wanted.parameters()): assert torch.equal(a, b)

def test_moco_loss_and_queue_by_hand():
    learn = moco_learner(cbs=[Keep], K=40)
    learn.fit(1)
    queue = F.normalize(torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(0)), dim=2)
    at = 0
    for step in learn.keep.steps:
        q,k = step['pred']
        q = q.unflatten(0, (2,-1))[0]
        logits = torch.cat([(q*k).sum(1, keepdim=True), q@queue[0].T], 1)/.2
        # 41 logits up to 1/0.2, each a dot product of 8 terms
        torch.testing.assert_close(step['loss'], F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long)), atol=rounding(torch.float32, 60, 10.), rtol=0)
        for row in k:
            queue[0,at%40] = row
            at += 1
    torch.testing.assert_close(learn.model.queue.features, queue)

def test_keys_have_no_gradient_and_own_statistics():
    learn = moco_learner()
    learn.fit(1)
    model = learn.model
    assert all(p.grad is None and not p.requires_grad for p in [*model.key_encoder.parameters(), *model.key_projector.parameters()])
    stats = [next(m for m in e.modules() if isinstance(m, nn.BatchNorm2d)).running_mean for e in (model.encoder, model.key_encoder)]
    assert not torch.equal(*stats)
    own = {id(p) for p in [*model.key_encoder.parameters(), *model.key_projector.parameters()]}
    assert not any(id(p) in own for p in learn.opt.all_params().map(lambda o: o[0]))

def test_split_batch_norm_keeps_the_order():
    "Every group is embedded as if it were alone"
    seed_all(0)
    model = create_moco_model(small_encoder(), 16, 8, bn_splits=3).train()
    x = torch.rand(9, 1, 16, 16)
    keys = model.embed_keys([x])
    alone = copy.deepcopy(model)
    alone.bn_splits = 1
    for i in range(3): assert torch.equal(keys[i::3], alone.embed_keys([x[i::3]]))

@pytest.mark.parametrize('kwargs,says', [(dict(m=1.5),r'm must be in \[0,1\]'), (dict(m=-.1),r'm must be in \[0,1\]'), (dict(K=0),'K must be a positive'),
    (dict(temp=0.),'temp must be positive'), (dict(version=3),'version must be 1 or 2'), (dict(key_ids=(2,)),'key_ids must be different indices')])
def test_moco_refuses(kwargs, says):
    with pytest.raises(ValueError, match=says): moco_learner(**kwargs)

def test_moco_refuses_before_training():
    with pytest.raises(ValueError, match='K must be larger than the batch of 16 images, got 16'): moco_learner(K=16).fit(1)
    with pytest.raises(TypeError, match='model must be a MoCoModel'):
        Learner(digits(40), small_encoder(), cbs=[MoCo(get_moco_aug_pipelines(16, stats=None), K=40)]).fit(1)
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match='running statistics'): create_moco_model(encoder)

# --- DeepCluster-v2 ----------------------------------------------------------------------------------------------------------
def test_targets_are_the_clusters_of_the_images():
    "Every image of a batch is found again, in any order, with workers or without"
    class Look(Callback):
        order,n_right = 90,0
        def before_batch(self): self.images = self.x if isinstance(self.x, torch.Tensor) else None
        def after_loss(self):
            if not self.training: return
            m = self.deepclusterv2
            idxs = m._idxs_of_batch(self.iter, len(m.images))
            assert torch.equal(m.images.as_subclass(torch.Tensor), self.dls.train.dataset.x[idxs])
            self.n_right += len(idxs)
    learn = method_learner('deepclusterv2', cbs=[Look])
    learn.fit(2)
    assert learn.look.n_right==2*80

def test_clustering_by_hand():
    class Check(Callback):
        order = 90
        def before_train(self):
            m = self.deepclusterv2
            for h,head in enumerate(self.model.heads):
                idxs,x = m.memory.get(h%2)
                prototypes,labels,_ = spherical_kmeans(x, len(head.weight), 10, seed=1000*self.epoch+h)
                assert torch.equal(head.weight, prototypes) and torch.equal(m.assigned[h,idxs], labels)
    learn = method_learner('deepclusterv2', n_protos=(5,7,5), cbs=[Check])
    learn.fit(2)
    assert learn.model.n_protos==[5,7,5] and not any(p.requires_grad for p in learn.model.heads.parameters())

def test_memory_in_a_file(tmp_path):
    learns = []
    for path in (None, tmp_path/'memory'):
        learns.append(method_learner('deepclusterv2', memory_path=path))
        learns[-1].fit(2)
    assert (tmp_path/'memory').stat().st_size==2*80*8*4
    for a,b in zip(*(o.model.parameters() for o in learns)): assert torch.equal(a, b)

def test_loader_is_given_back():
    learn = method_learner('deepclusterv2')
    learn.fit(1)
    assert 'get_idxs' not in vars(learn.dls.train) and learn.deepclusterv2.memory is None

@pytest.mark.parametrize('kwargs,says', [(dict(temp=-1.),'temp must be positive'), (dict(n_kmeans_iter=0),'n_kmeans_iter must be'), (dict(crop_assgn_ids=[]),'crop_assgn_ids must be')])
def test_deepcluster_refuses(kwargs, says):
    with pytest.raises(ValueError, match=says): DeepClusterV2(get_deepcluster_aug_pipelines((2,1), (16,10), stats=None), **kwargs)

def test_more_clusters_than_images():
    model = create_deepcluster_model(small_encoder(), 16, 8, n_protos=200)
    with pytest.raises(ValueError, match='n_protos must be at most the number of training images, 80'):
        Learner(digits(100), model, cbs=[DeepClusterV2(get_deepcluster_aug_pipelines((2,1), (16,10), stats=None))]).fit(1)

# --- all: stopped and resumed, bit for bit ---------------------------------------------------------------------------------------
class StopAt(Callback):
    order = 80
    def __init__(self, epoch, batch): self.place = epoch,batch
    def before_batch(self):
        if self.training and (self.epoch,self.iter)==self.place: self.resume_training.stop()

@pytest.mark.parametrize('at', [(0,1),(1,3)])
@pytest.mark.parametrize('case', ['simclr','mocov1','mocov2','deepclusterv2'])
def test_resume(case, at, tmp_path):
    whole = method_learner(case, monitor=True)
    whole.fit(3)
    stopped = method_learner(case, monitor=True, cbs=[ResumeTraining(tmp_path/'last.pth', every=1), StopAt(*at)])
    with pytest.raises(TrainingStopped): stopped.fit(3)
    resumed = method_learner(case, monitor=True, seed=7, cbs=[ResumeTraining(tmp_path/'last.pth', every=1), StopAt(9, 9)])
    resumed.fit(3)
    a,b = (o.model.state_dict() for o in (whole,resumed))
    for k in a:
        if isinstance(a[k], torch.Tensor): assert torch.equal(a[k], b[k]), k
    assert whole.collapse_monitor.history==resumed.collapse_monitor.history

@pytest.mark.parametrize('case', ['simclr','mocov1','mocov2','deepclusterv2'])
def test_monitor_sees_collapse(case):
    "Embeddings that are all alike from the first step on"
    learn = method_learner(case, n=60, monitor=True, cbs=[])
    last = [m for m in learn.model.projector.modules() if isinstance(m, nn.Linear)][-1]
    class Same(Callback):
        order = -20
        def before_batch(self):
            with torch.no_grad(): last.weight.zero_(); last.bias.fill_(1.)
    learn.add_cb(Same())
    with pytest.warns(UserWarning, match='does not learn'): learn.fit(12)
    assert len(learn.collapse_monitor.alarms)==1
