"SimCLR, MoCo and DeepCluster-v2: what is theirs alone. What every method goes through is in test_swav.py."
import copy
import pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.vision.all import DataLoaders, Pipeline, SGD
from torch import nn
from helpers import digits, method_learner, rounding, seed_all, small_encoder
from self_supervised_swav.contrastive import info_nce, nt_xent
from self_supervised_swav.data import tensor_dls
from self_supervised_swav.deepcluster import DeepClusterV2, create_deepcluster_model, get_deepcluster_aug_pipelines
from self_supervised_swav.kmeans import spherical_kmeans
from self_supervised_swav.moco import MoCo, create_moco_model, get_moco_aug_pipelines
from self_supervised_swav.resume import ResumeTraining, TrainingStopped
from self_supervised_swav.simclr import SimCLR, create_simclr_model
from test_distributed import Cut, Parts, run_ranks

class Keep(Callback):
    "What a step saw and what it made of it"
    order = 90
    def before_fit(self): self.steps = []
    def after_loss(self):
        if not self.training: return
        pred = self.pred if isinstance(self.pred, tuple) else (self.pred,)
        self.steps.append(dict(pred=[o.detach().clone() for o in pred], loss=self.loss.detach().clone()))

# --- SimCLR ---------------------------------------------------------------------------------------------------------
def test_simclr_loss_of_a_fit():
    learn = method_learner('simclr', cbs=[Keep])
    learn.fit(1)
    for step in learn.keep.steps:
        z = step['pred'][0].unflatten(0, (2,-1))
        torch.testing.assert_close(step['loss'], nt_xent(z.double(), learn.simclr.temp).float(),
                                   atol=rounding(torch.float32, 200, 10.), rtol=0)

def test_simclr_multi_crop():
    learn = method_learner('simclr', num_crops=(2,2), crop_sizes=(16,10), min_scales=(.4,.1), max_scales=(1.,.4),
                           cbs=[Keep])
    learn.fit(1)
    assert learn.simclr.n_views==4 and learn.keep.steps[0]['pred'][0].shape[0]==4*16

# --- MoCo -----------------------------------------------------------------------------------------------------------
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
        def after_step(self): self.wanted = [.9*k+.1*q.detach() for k,
                                             q in zip(self.keys, [*self.model.encoder.parameters(),
                                                                  *self.model.projector.parameters()])]
        def after_batch(self):
            if self.training:
                for k,w in zip(self.key_params(), self.wanted):
                    torch.testing.assert_close(k, w, atol=rounding(torch.float32, 4, k.abs().max().item()), rtol=0)
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
        assert len(q)==len(k)  # the key crop is no query: the trained encoder does not see it
        logits = torch.cat([(q*k).sum(1, keepdim=True), q@queue[0].T], 1)/.2
        # 41 logits up to 1/0.2, each a dot product of 8 terms
        torch.testing.assert_close(step['loss'], F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long)),
                                   atol=rounding(torch.float32, 60, 10.), rtol=0)
        for row in k:
            queue[0,at%40] = row
            at += 1
    torch.testing.assert_close(learn.model.queue.features, queue)

def test_every_crop_is_a_query_where_another_one_has_a_key():
    model = create_moco_model(small_encoder(), 16, 8)
    for key_ids,wanted in (((1,),[0,2]), ((0,),[1,2]), ((0,1),[0,1,2])):
        model.key_ids = key_ids
        queries,keys = model([torch.rand(4, 1, 16, 16)]*3)
        assert model.query_ids(3)==wanted and len(queries)==4*len(wanted) and len(keys)==4*len(key_ids)
    learn = method_learner('mocov2', key_ids=(0,1), cbs=[Keep], monitor=True)
    learn.fit(1)
    assert learn.keep.steps[0]['pred'][0].shape[0]==2*16

def test_keys_have_no_gradient_and_own_statistics():
    learn = moco_learner()
    learn.fit(1)
    model = learn.model
    assert all(p.grad is None and not p.requires_grad
               for p in [*model.key_encoder.parameters(), *model.key_projector.parameters()])
    stats = [next(m for m in e.modules() if isinstance(m, nn.BatchNorm2d)).running_mean
             for e in (model.encoder, model.key_encoder)]
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

@pytest.mark.parametrize('make', [lambda augs: SimCLR(augs, large_ids=(0,)), lambda augs: MoCo(augs, key_ids=(0,))])
def test_one_view_is_refused(make):
    with pytest.raises(ValueError, match='aug_pipelines must hold at least two.*got 1'):
        make(get_moco_aug_pipelines(16, stats=None)[:1])

def test_moco_is_its_pseudo_code():
    "The paper's loop, line by line in float64, beside the callback's parts: loss, weights of both encoders, queue"
    seed_all(0)
    f_q = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16, 12), nn.Tanh())
    model = create_moco_model(f_q, hidden_size=9, projection_size=6).double()
    ours = model.eval()  # no batch norm here
    q_net = nn.Sequential(copy.deepcopy(model.encoder), copy.deepcopy(model.projector))
    k_net = copy.deepcopy(q_net)
    N,K,m,t = 4,12,.9,.2
    queue = F.normalize(torch.randn(K, 6, dtype=torch.double), dim=1)
    ours.queue.resize(1, K, 6)
    ours.queue.features = ours.queue.features.double()
    ours.queue.features.copy_(queue[None])
    opts = [torch.optim.SGD(p, lr=.1) for p in ([*model.encoder.parameters(), *model.projector.parameters()],
                                               q_net.parameters())]
    for step in range(7):  # more batches than the queue holds
        x_q,x_k = torch.randn(2, N, 1, 4, 4, dtype=torch.double)
        q = F.normalize(q_net(x_q), dim=1)
        k = F.normalize(k_net(x_k), dim=1).detach()
        l_pos = torch.bmm(q.view(N, 1, 6), k.view(N, 6, 1)).view(N, 1)
        l_neg = q@queue.T
        loss = F.cross_entropy(torch.cat([l_pos, l_neg], 1)/t, torch.zeros(N, dtype=torch.long))
        # its forward gives float32
        embedding,keys = ours.projector(ours.encoder(x_q)),F.normalize(ours.key_projector(ours.key_encoder(x_k)), dim=1)
        mine = info_nce(embedding[None], keys.detach()[None], ours.queue.features, t)
        torch.testing.assert_close(mine, loss)
        for o,l in zip(opts, (mine,loss)):
            o.zero_grad()
            l.backward()
            o.step()
        for a,b in zip(k_net.parameters(), q_net.parameters()): a.data = m*a.data+(1-m)*b.data
        ours.update_keys(m)
        queue = torch.cat([queue, k])[N:]
        ours.queue.push(keys.detach()[None])
        # the same keys, in another order: a queue is a ring there and a list here
        torch.testing.assert_close(ours.queue.features[0].roll(-(step+1)*N, 0), queue)
    for a,b in zip((ours.encoder,ours.projector,ours.key_encoder,ours.key_projector), (*q_net,*k_net)):
        for x,y in zip(a.parameters(), b.parameters()): torch.testing.assert_close(x, y)

@pytest.mark.parametrize('kwargs,says', [(dict(m=1.5),r'm must be in \[0,1\]'), (dict(m=-.1),r'm must be in \[0,1\]'),
                                         (dict(K=0),'K must be a positive'),
    (dict(temp=0.),'temp must be positive'), (dict(version=3),'version must be 1 or 2'), (dict(key_ids=(2,)),'key_ids '
                                                                                          'must be different indices')])
def test_moco_refuses(kwargs, says):
    with pytest.raises(ValueError, match=says): moco_learner(**kwargs)

def test_moco_refuses_before_training():
    with pytest.raises(ValueError, match='K must be larger than the batch of 16 images, got 16'):
        moco_learner(K=16).fit(1)
    with pytest.raises(TypeError, match='model must be a MoCoModel'):
        Learner(digits(40), small_encoder(), cbs=[MoCo(get_moco_aug_pipelines(16, stats=None), K=40)]).fit(1)
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.AdaptiveAvgPool2d(1),
                            nn.Flatten())
    with pytest.raises(ValueError, match='running statistics'): create_moco_model(encoder)

# --- DeepCluster-v2 -------------------------------------------------------------------------------------------------
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
                chosen = idxs[torch.randperm(len(idxs), generator=torch.Generator().manual_seed(1000*self.epoch
                                                                                                +h))[:len(head.weight)]]
                prototypes,labels,_ = spherical_kmeans(x, len(head.weight), 10,
                                                       F.normalize(m.memory.features[h%2,chosen], dim=1))
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

@pytest.mark.parametrize('kwargs,says',
                         [(dict(temp=-1.),'temp must be positive'), (dict(n_kmeans_iter=0),'n_kmeans_iter must be'),
                          (dict(crop_assgn_ids=[]),'crop_assgn_ids must be')])
def test_deepcluster_refuses(kwargs, says):
    with pytest.raises(ValueError, match=says): DeepClusterV2(get_deepcluster_aug_pipelines((2,1), (16,10), stats=None),
                                                              **kwargs)

def test_more_clusters_than_images():
    model = create_deepcluster_model(small_encoder(), 16, 8, n_protos=200)
    with pytest.raises(ValueError, match='n_protos must be at most the number of training images, 80'):
        Learner(digits(100), model,
                cbs=[DeepClusterV2(get_deepcluster_aug_pipelines((2,1), (16,10), stats=None))]).fit(1)

# --- all: several processes, uneven batches -------------------------------------------------------------------------
def _fixed_learner(name, sizes, rank=0):
    """Deterministic crops, batches of `sum(sizes)` in a fixed order, no batch norm.

    Images and features are so different that no cluster hangs on a rounding."""
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Conv2d(6, 8, 3), nn.Tanh(), nn.AdaptiveMaxPool2d(2),
                            nn.Flatten())
    with torch.no_grad():
        for m in encoder:
            if isinstance(m, nn.Conv2d): m.weight.mul_(4)
    create,method = dict(simclr=(create_simclr_model, SimCLR),
                         moco=(create_moco_model, lambda augs: MoCo(augs, K=30, m=.8, temp=.5)),
                         deepcluster=(lambda e,*a,**k: create_deepcluster_model(e, *a, n_protos=(5,7), **k),
                                      DeepClusterV2))[name]
    x = torch.rand(60, 1, 12, 12, generator=torch.Generator().manual_seed(2))
    dls = tensor_dls(x, bs=sum(sizes), splits=(range(48), range(48,60)), device='cpu', num_workers=0)
    loaders = [Parts(dl, sizes, rank) if len(sizes)>1 else dl.new(bs=sum(sizes), shuffle=False, drop_last=False)
               for dl in dls.loaders]
    augs = [Pipeline([Cut(i, s)], split_idx=0) for i,s in ((0,10),(2,10),(3,7))]
    learn = Learner(DataLoaders(*loaders, device='cpu'), create(encoder, 16, 8, bn=False), opt_func=SGD, lr=.05,
                    cbs=[method(augs)])
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn

def _outcome(learn):
    learn.fit(2)
    queue = getattr(learn.model, 'queue', None)
    assigned = learn.deepclusterv2.assigned if hasattr(learn, 'deepclusterv2') else None
    return dict(weights=torch.cat([p.detach().flatten() for p in learn.model.parameters()]),
                losses=torch.stack(learn.recorder.losses),
                queue=torch.zeros(1) if queue is None else queue.features,
                assigned=torch.zeros(1) if assigned is None else assigned)

def _fit_of_rank(rank, size, name, sizes):
    learn = _fixed_learner(name, sizes, rank)
    with learn.distrib_ctx(sync_bn=False): return _outcome(learn)

@pytest.mark.parametrize('sizes', [[6,6],[2,7,3]], ids=str)
@pytest.mark.parametrize('name', ['simclr','moco','deepcluster'])
def test_ranks_equal_one_process(name, sizes, tmp_path):
    one,got = _outcome(_fixed_learner(name, [sum(sizes)])),run_ranks(_fit_of_rank, len(sizes), tmp_path, name, sizes)
    for g in got:
        for k in one: torch.testing.assert_close(g[k], one[k], atol=1e-5*max(1., one[k].abs().max().item()), rtol=0,
                                                 msg=lambda m: f'{k} of {name}: {m}')

# --- all: stopped and resumed, bit for bit --------------------------------------------------------------------------
class StopAt(Callback):
    order = 80
    def __init__(self, epoch, batch): self.place = epoch,batch
    def before_batch(self):
        if self.training and (self.epoch,self.iter)==self.place: self.resume_training.stop()

@pytest.mark.filterwarnings('error:You are shadowing')
@pytest.mark.parametrize('at', [(0,1),(1,3)])
@pytest.mark.parametrize('case', ['simclr','mocov1','mocov2','deepclusterv2'])
def test_resume(case, at, tmp_path):
    whole = method_learner(case, monitor=True)
    whole.fit(3)
    stopped = method_learner(case, monitor=True, cbs=[ResumeTraining(tmp_path/'last.pth', every=1), StopAt(*at)])
    with pytest.raises(TrainingStopped): stopped.fit(3)
    resumed = method_learner(case, monitor=True, seed=7,
                             cbs=[ResumeTraining(tmp_path/'last.pth', every=1), StopAt(9, 9)])
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
