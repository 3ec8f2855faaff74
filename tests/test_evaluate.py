"Features, votes, probes and few labels: beside scikit-learn on the same features, every source of images, errors."
import copy
import numpy as np, pytest, torch
from fastai.data.all import DataBlock, CategoryBlock, DataLoaders, RandomSplitter, parent_label, get_image_files
from fastai.interpret import ClassificationInterpretation
from fastai.learner import load_learner
from fastai.vision.all import ImageBlock, Normalize, Resize, aug_transforms, PILImage
from hypothesis import given, settings, strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from helpers import digits, small_learner
from self_supervised_swav.augment import MultiCrop, get_swav_aug_pipelines
from self_supervised_swav.evaluate import (EncoderWithHead, KNNMetric, extract_features, few_label_learner,
                                           few_label_splits, knn_accuracy,
                                           linear_probe)

pytestmark = pytest.mark.filterwarnings('ignore')

class Tiny(nn.Sequential):
    def __init__(self, n_in=1):
        super().__init__(nn.Conv2d(n_in, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())

def clusters(n=600, d=12, n_classes=7, noise=1.5, seed=0):
    "(train,valid) of features around one point a class"
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(n_classes, (n,), generator=g)
    x = torch.randn(n_classes, d, generator=g)[y]+noise*torch.randn(n, d, generator=g)
    x = x*torch.linspace(.1, 30, d)+5
    return (x[:n//2],y[:n//2]),(x[n//2:],y[n//2:])

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Three folders of ten colored images"
    path,g = tmp_path_factory.mktemp('images'),np.random.default_rng(0)
    for c,name in enumerate('abc'):
        (path/name).mkdir()
        for i in range(10):
            im = g.integers(0, 80, (20,24,3), dtype=np.uint8)
            im[...,c] += 150
            PILImage.create(im).save(path/name/f'{i}.png')
    return path

def file_dls(path, **kwargs):
    block = DataBlock((ImageBlock,CategoryBlock), get_items=get_image_files, get_y=parent_label,
                      splitter=RandomSplitter(.3, seed=0), item_tfms=Resize(16), **kwargs)
    return block.dataloaders(path, bs=4, num_workers=0, device='cpu')

# --- features ---------------------------------------------------------------------------------------------------------
def test_features_are_the_encoders():
    "In order, to the last image, normalized as the crops are, in eval mode, and nothing is changed"
    pipes = get_swav_aug_pipelines((2,1), (16,10), (.4,.1), (1.,.4), stats=([.3],[.2]))
    learn = small_learner(n=100, labeled=True, augs=pipes)
    learn.model.train()
    next(m for m in learn.model.encoder.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    modes,state = {m: m.training for m in learn.model.modules()},copy.deepcopy(learn.model.state_dict())
    x,y = extract_features(learn, learn.dls.train, progress=False)
    assert {m: m.training for m in learn.model.modules()}==modes
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, state[k]), k
    ds = learn.dls.train_ds
    with torch.no_grad(): expected = learn.model.encoder.eval()((ds.x-.3)/.2)
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(y, ds.y) and type(x) is torch.Tensor and type(y) is torch.Tensor
    # an encoder alone: the images as they come
    plain,_ = extract_features(learn.model, learn.dls.train, progress=False)
    with torch.no_grad():
        torch.testing.assert_close(plain, learn.model.encoder(ds.x.as_subclass(torch.Tensor)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(extract_features(learn.model.encoder, learn.dls.train, progress=False)[0], plain)

def test_sources_of_images(files):
    encoder = Tiny(3)
    dls = file_dls(files, batch_tfms=[*aug_transforms(size=16), Normalize.from_stats([.4]*3, [.3]*3, cuda=False)])
    (a,y),(b,_) = (extract_features(encoder, dls.train, progress=False) for _ in range(2))
    # augmentations did not run
    assert torch.equal(a, b) and len(a)==21 and torch.equal(y, torch.tensor([int(o[1]) for o in dls.train_ds]))
    loader = DataLoader(TensorDataset(torch.rand(10,3,16,16), torch.arange(10)), batch_size=4)
    x,y = extract_features(encoder, loader, progress=False)
    assert torch.equal(y, torch.arange(10)) and len(x)==10
    assert extract_features(encoder, DataLoader(torch.rand(5,3,16,16), batch_size=2), progress=False)[1] is None
    assert extract_features(Tiny(), digits(30).train, progress=False)[1] is None
    pipes = get_swav_aug_pipelines((2,1), (16,10), (.4,.1), (1.,.4))
    learn = small_learner(augs=pipes, n_in=3, dls=dls)  # a DataLoader that normalizes is not normalized again
    torch.testing.assert_close(*(extract_features(o, dls.valid, progress=False)[0]
                                 for o in (learn, learn.model.encoder)))

def test_map_on_disk(tmp_path):
    dls,encoder = digits(100, labeled=True),Tiny()
    expected = extract_features(encoder, dls.train, progress=False)[0]
    for kwargs in (dict(max_bytes=100), dict(path=tmp_path/'f.bin'), dict(max_bytes=100, path=tmp_path/'g.bin')):
        assert torch.equal(extract_features(encoder, dls.train, progress=False, **kwargs)[0], expected)
    for o in 'fg':
        assert torch.equal(torch.from_file(str(tmp_path/f'{o}.bin'), size=expected.numel()).view_as(expected), expected)
    dls.train.dataset.x[-1] = torch.nan
    with pytest.raises(FloatingPointError, match='features not finite in batch 4 of 5'):
        extract_features(encoder, dls.train, path=tmp_path/'h.bin', progress=False)
    assert not (tmp_path/'h.bin').exists() and encoder.training

def test_extract_refuses():
    with pytest.raises(TypeError, match='learn_or_encoder must be a Learner or a Module, got str'):
        extract_features('resnet18', digits(20).train)
    with pytest.raises(ValueError, match=r'features \(B,d\), got shape'):
        extract_features(nn.Conv2d(1, 2, 3), digits(20).train, progress=False)
    with pytest.raises(ValueError, match='dl must hold images'):
        extract_features(Tiny(), DataLoader(TensorDataset(torch.rand(0,1,8,8))), progress=False)

# --- beside scikit-learn ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize('k,temp,chunk', [(20,.07,4096), (1,.07,50), (5,.5,64)])
def test_knn_is_sklearns(k, temp, chunk):
    train,valid = clusters()
    reference = KNeighborsClassifier(k, metric='cosine', algorithm='brute',
                                     weights=lambda d: np.exp((1-d-1)/temp)).fit(train[0].double(), train[1])
    assert knn_accuracy(train, valid, k, temp, chunk)==pytest.approx(reference.score(valid[0].double(), valid[1]))

@pytest.mark.parametrize('n_classes', [2,7])
def test_probe_is_sklearns(n_classes):
    train,valid = clusters(n_classes=n_classes)
    scale = StandardScaler().fit(train[0])
    reference = LogisticRegression(C=.3, max_iter=1000).fit(scale.transform(train[0]), train[1])
    scores = reference.predict_proba(scale.transform(valid[0]))
    probe = linear_probe(train, valid, C=.3)
    assert probe.top1==pytest.approx(reference.score(scale.transform(valid[0]), valid[1]), abs=1/300)
    if n_classes>2: assert probe.top5==pytest.approx(top_k_accuracy_score(valid[1], scores, k=5), abs=1/300)
    torch.testing.assert_close(probe(valid[0]).softmax(1).double(), torch.tensor(scores).double(), atol=2e-3, rtol=0)

def objective(probe, x, y, C=1.):
    """What both solvers minimize, a mean over the images; weights of the standardized features, without the part that
    all classes share"""
    w = probe.weight*x.std(0, correction=0)
    return (nn.functional.cross_entropy(probe(x), y)+(w-w.mean(0)).square().sum()/2/C/len(x)).item()

@pytest.mark.parametrize('C', [1.,.01])
def test_sgd_finds_the_same_classifier(C):
    train,valid = clusters(n=2000)
    a,b = (linear_probe(train, valid, C=C, solver=o, bs=128) for o in ('sklearn','sgd'))
    assert objective(a, *train, C)-1e-6<=objective(b, *train, C)<1.005*objective(a, *train, C)
    assert abs(a.top1-b.top1)<=.01
    assert torch.equal(linear_probe(train, valid, solver='sgd', epochs=2).weight,
                       linear_probe(train, valid, solver='sgd', epochs=2).weight)

def test_probe_chooses_by_size(monkeypatch):
    import self_supervised_swav.evaluate as ev
    train,valid = clusters(n=60)
    used = []
    for o in ('_fit_sgd','_fit_sklearn'):
        monkeypatch.setattr(ev, o, lambda *a, f=getattr(ev, o), o=o, **k: used.append(o) or f(*a, **k))
    linear_probe(train, valid)
    monkeypatch.setattr(ev, '_n_sklearn', 30*12-1)
    linear_probe(train, valid)
    assert used==['_fit_sklearn','_fit_sgd']

def test_classes_that_the_training_set_lacks():
    (x,y),valid = clusters(n_classes=7)
    train = (x[y!=3],y[y!=3])
    for solver in ('sklearn','sgd'):
        probe = linear_probe(train, valid, solver=solver)
        assert (probe(valid[0]).argmax(1)!=3).all() and probe.weight.shape==(7,12)
    assert 0<knn_accuracy(train, valid)<1

def test_constant_features_do_no_harm():
    train,valid = ((torch.cat([x,torch.full((len(x),1), 1e4)], 1),y) for x,y in clusters())
    assert linear_probe(train, valid).top1==pytest.approx(linear_probe(*clusters()).top1, abs=.01)

train,valid = clusters(n=60)
nan = (train[0].clone().index_fill_(0, torch.tensor([3]), torch.nan),train[1])
@pytest.mark.parametrize('f', [knn_accuracy,linear_probe])
@pytest.mark.parametrize('args,err,match', [
    (((train[0],None),valid), ValueError, 'train must have labels'),
    ((train,(valid[0],None)), ValueError, 'valid must have labels'),
    (((train[0],torch.zeros(30).long()),valid), ValueError, 'train must have images of at least two classes, got class '
                                                            '0 alone'),
    ((nan,valid), ValueError, 'features of train must be finite'),
    ((train,nan), ValueError, 'features of valid must be finite'),
    ((train,(valid[0][:,:5],valid[1])), ValueError, 'same width, got 12 and 5'),
    ((train,(valid[0],valid[1][:5])), ValueError, 'one label for each'),
    ((train[0],valid), TypeError, 'train must be'),
    (((train[0],train[1].float()),valid), TypeError, 'must be integers')])
def test_refused(f, args, err, match):
    with pytest.raises(err, match=match): f(*args)

def test_refused_settings():
    with pytest.raises(ValueError, match="k must be between 1 and the bank's 30 rows, got 31"):
        knn_accuracy(train, valid, k=31)
    with pytest.raises(ValueError, match='C must be positive, got 0'): linear_probe(train, valid, C=0)
    with pytest.raises(ValueError, match="solver must be"): linear_probe(train, valid, solver='adam')

# --- few labels -------------------------------------------------------------------------------------------------------
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 8), st.integers(0, 5))
def test_splits_of_tensors(n, seed):
    dls = digits(200, labeled=True, bs=64)
    a,b = (few_label_splits(dls, n_per_class=n, seed=seed) for _ in range(2))
    assert torch.equal(a.train_ds.x, b.train_ds.x) and (a.train_ds.y.bincount()==n).all()
    assert a.valid is dls.valid and sum(len(o[1]) for o in a.train)>len(a.train_ds)-len(a.train)
    assert len(dls.train_ds)==160
    own = {o.numpy().tobytes() for o in dls.train_ds.x}
    assert all(o.numpy().tobytes() in own for o in a.train_ds.x)
    other = few_label_splits(dls, n_per_class=n, seed=seed+1)
    assert not torch.equal(other.train_ds.x, a.train_ds.x)

def test_splits_of_files(files):
    dls = file_dls(files)
    few = few_label_splits(dls, n_per_class=2)
    assert len(few.train_ds)==6 and sorted(int(y) for _,y in few.train_ds)==[0,0,1,1,2,2] and few.vocab==dls.vocab
    assert set(few.train_ds.items)<=set(dls.train_ds.items)
    x,y = few.one_batch()
    assert len(x)==3 and sum(1 for _ in few.train)==2  # 6 images, 4 at most a batch: two of three
    assert len(few_label_splits(dls, fraction=.01).train_ds)==3 and len(few_label_splits(dls, fraction=1.).train_ds)==21

@pytest.mark.parametrize('kw,match', [
    (dict(n_per_class=50), 'n_per_class must be at most .*, the training images of class 0, got 50'),
    (dict(n_per_class=0), 'n_per_class must be a positive whole number, got 0'),
    (dict(), 'one of n_per_class and fraction'), (dict(n_per_class=1, fraction=.1), 'one of n_per_class and fraction'),
    (dict(fraction=0.), 'fraction must be in'), (dict(fraction=1.5), 'fraction must be in')])
def test_splits_refuse(kw, match):
    with pytest.raises(ValueError, match=match): few_label_splits(digits(100, labeled=True), **kw)

def test_splits_refuse_data():
    with pytest.raises(ValueError, match='dls must have labels, got images alone'):
        few_label_splits(digits(100), n_per_class=1)
    dls = digits(100, labeled=True)
    dls.train_ds.y[:] = 4
    with pytest.raises(ValueError, match=r'at least two classes, got class \[4\] alone'):
        few_label_splits(dls, n_per_class=1)
    with pytest.raises(TypeError, match='got TensorDataset'):
        few_label_splits(DataLoaders(DataLoader(TensorDataset(torch.rand(4,1,8,8)))), n_per_class=1)

# --- fine-tuning ------------------------------------------------------------------------------------------------------
def quiet(learn):
    learn.logger = lambda *_: None
    return learn

def test_few_label_learner(files, tmp_path):
    """fine_tune, fit_one_cycle, Interpretation and export on images of files; it learns what is easy; the encoder
    stays as it was"""
    dls,encoder = file_dls(files),Tiny(3)
    before = copy.deepcopy(encoder.state_dict())
    learn = quiet(few_label_learner(encoder, dls, stats=([.4]*3,[.3]*3), path=tmp_path))
    assert len(learn.opt.param_lists)==2 and not learn.model.encoder[0].weight.requires_grad
    assert learn.model.head[1].weight.requires_grad
    with learn.no_bar():
        learn.fine_tune(4, 3e-2, freeze_epochs=4)
        learn.fit_one_cycle(2, slice(1e-4,1e-3))
        assert learn.opt.hypers[0]['lr']<learn.opt.hypers[1]['lr'] and learn.validate()[1]>.8
        interp = ClassificationInterpretation.from_learner(learn)
        assert interp.confusion_matrix().sum()==len(dls.valid_ds)==9 and interp.confusion_matrix().trace()>=7
        assert len(interp.top_losses(3, items=True)[2])==3
        interp.plot_top_losses(2)
        for k,v in encoder.state_dict().items(): assert torch.equal(v, before[k])
        assert sum(isinstance(f, Normalize) for f in learn.dls.valid.after_batch.fs)==1
        assert not any(isinstance(f, Normalize) for f in dls.train.after_batch.fs)
        learn.export('few.pkl')
        again = load_learner(tmp_path/'few.pkl')
        item = dls.valid_ds.items[0]
        with again.no_bar(): a,b = again.predict(item),learn.predict(item)
        assert a[0]==b[0]==item.parent.name
        torch.testing.assert_close(a[2], b[2])

def test_takes_normalization_from_swav():
    pipes = get_swav_aug_pipelines((2,1), (16,10), (.4,.1), (1.,.4), stats=([.3],[.2]))
    pre = small_learner(n=100, labeled=True, augs=pipes)
    learn = quiet(few_label_learner(pre, pre.dls, pretrained=False))
    torch.testing.assert_close(learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor),
                               MultiCrop(pipes).normalize(pre.dls.valid.one_batch()[0]))
    torch.testing.assert_close(extract_features(learn, learn.dls.valid, progress=False)[0],
                               extract_features(pre, pre.dls.valid, progress=False)[0])
    assert all(p.requires_grad for p in learn.model.parameters()) and isinstance(learn.model, EncoderWithHead)
    learn.fit(1)
    # without statistics nothing is added
    assert few_label_learner(small_learner(n=100, labeled=True), pre.dls).dls is pre.dls

def test_interpretation_of_tensors():
    learn = quiet(few_label_learner(Tiny(), digits(100, labeled=True)))
    with learn.no_bar():
        learn.fit(1)
        assert ClassificationInterpretation.from_learner(learn).confusion_matrix().sum()==20

def test_learner_refuses():
    with pytest.raises(ValueError, match='dls must have labels'): few_label_learner(Tiny(), digits(100))
    with pytest.raises(ValueError, match='n_out must be'):
        few_label_learner(Tiny(), digits(100, labeled=True), n_out=1)

# --- during the pretraining -------------------------------------------------------------------------------------------
def test_knn_metric():
    "In the table, equal to the measure afterwards; weights are those of a run without it"
    runs,labeled = [],digits(120, labeled=True, seed=1)
    for cbs in ([],[KNNMetric(labeled, k=5)]):
        learn = small_learner(n=100, cbs=cbs, K=24)
        learn.fit(2)
        runs.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    assert torch.equal(*runs)
    assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','knn_accuracy','largest_class','time']
    assert len(learn.metrics)==0
    pair = [extract_features(learn, o, progress=False) for o in (labeled.train,labeled.valid)]
    assert learn.recorder.values[-1][-2]==pytest.approx(knn_accuracy(*pair, k=5))
    y = pair[1][1].tolist()
    assert learn.recorder.values[-1][-1]==pytest.approx(max(map(y.count, y))/len(y))

def test_knn_metric_of_the_learners_own_labels():
    learn = small_learner(n=100, labeled=True, cbs=[KNNMetric()])
    learn.fit(1)
    assert 0<=learn.recorder.values[0][-1]<=1
    learn.validate()

@pytest.mark.parametrize('dls,k,match', [(None,5,'dls.train must have labels'), ('few',500,'k must be between 1 and '
    'the 80 labeled training images, got 500')])
def test_knn_metric_refuses_before_training(dls, k, match):
    learn = small_learner(n=100, cbs=[KNNMetric(dls and digits(100, labeled=True), k=k)])
    with pytest.raises(ValueError, match=match): learn.fit(1)

def test_without_progress_nothing_is_printed(capsys):
    extract_features(nn.Flatten(), digits(20).train, progress=False)
    assert capsys.readouterr()==('','')
