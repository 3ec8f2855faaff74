"Pictures say what the tensors say, and leave the Learner alone."
import random, re, sys, types
import matplotlib.pyplot as plt, numpy as np, pytest, torch, torch.nn.functional as F
from fastai.callback.schedule import *  # noqa: F403  fit_one_cycle
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import get_image_files, parent_label
from fastai.learner import Learner
from fastai.vision.augment import Normalize
from fastai.vision.data import ImageBlock
from PIL import Image
from helpers import digits, seed_all, small_augs, small_learner
from self_supervised_swav.data import tensor_dls
from self_supervised_swav.evaluate import extract_features
from self_supervised_swav.models import create_swav_model
from self_supervised_swav.swav import SWAV
from self_supervised_swav.visualize import (
    _drawable, _running_mean, _scores, draw_codes, draw_embedding, draw_neighbours, draw_prototypes, draw_training, nearest_images, project_features)

pytestmark = pytest.mark.usefixtures('closed_figures')

def texts(ax): return [t.get_text() for t in ax.texts]

# --- the sample -----------------------------------------------------------------------------------------------------------
def test_sample_is_what_the_encoder_saw(trained):
    s = trained.sample_images(max_images=20, seed=3)
    ds = trained.dls.train_ds
    assert len(set(s.idxs))==20 and s.idxs!=list(range(20)) and s.note=='20 of 64 images, at random'
    torch.testing.assert_close(s.images.float()/255, ds.x[s.idxs], atol=.5/255+1e-6, rtol=0)
    assert s.labels.tolist()==ds.y[s.idxs].tolist() and s.vocab==[str(i) for i in range(10)]
    torch.testing.assert_close(s.features, extract_features(trained, trained.dls.train, progress=False)[0][s.idxs], atol=1e-5, rtol=1e-5)
    assert trained.sample_images().note=='all 64 images' and trained.sample_images(ds_idx=1).n_total==16

def test_sample_changes_nothing(trained):
    trained.model.train()
    trained.model.encoder[0].eval() if hasattr(trained.model.encoder, '__getitem__') else None
    modes = [m.training for m in trained.model.modules()]
    weights = {k: v.clone() for k,v in trained.model.state_dict().items() if isinstance(v, torch.Tensor)}
    state = torch.get_rng_state(),random.getstate(),np.random.get_state()[1].tolist(),trained.dls.train.rng.getstate()
    trained.sample_images(), trained.show_codes(), trained.show_prototypes(2, 2), trained.show_neighbours([0], 2)
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate()==state[1] and np.random.get_state()[1].tolist()==state[2]
    assert trained.dls.train.rng.getstate()==state[3] and [m.training for m in trained.model.modules()]==modes
    assert all(torch.equal(v, trained.model.state_dict()[k]) for k,v in weights.items())

def test_labels_of_a_sample(trained):
    names = ['even' if int(o)%2==0 else 'odd' for o in trained.dls.train_ds.y]
    s = trained.sample_images(max_images=10, labels=names)
    assert [s.vocab[i] for i in s.labels]==[names[i] for i in s.idxs]
    assert trained.sample_images(max_images=10, labels=False).labels is None
    bare = small_learner(n=40)
    assert bare.sample_images().labels is None
    with pytest.raises(ValueError, match='labels=True needs data with one class for each image, got none'): bare.sample_images(labels=True)
    with pytest.raises(ValueError, match='one for each of the 64 images of the data set, got 3'): trained.sample_images(labels=[1,2,3])
    with pytest.raises(ValueError, match='max_images must be a positive whole number, got 0'): trained.sample_images(max_images=0)

def test_sample_of_a_folder_with_normalize(tmp_path):
    gen = torch.Generator().manual_seed(0)
    for i in range(12):
        (tmp_path/'ab'[i%2]).mkdir(exist_ok=True)
        Image.fromarray(torch.randint(0, 256, (16,24,3), dtype=torch.uint8, generator=gen).numpy()).save(tmp_path/'ab'[i%2]/f'{i}.png')
    block = DataBlock((ImageBlock,CategoryBlock), get_items=get_image_files, get_y=parent_label, batch_tfms=Normalize.from_stats([.5]*3, [.2]*3, cuda=False))
    dls = block.dataloaders(tmp_path, bs=4, device='cpu', num_workers=0)
    seed_all()
    from helpers import small_encoder
    learn = Learner(dls, create_swav_model(small_encoder(3), hidden_size=16, projection_size=8, n_protos=6), cbs=SWAV(small_augs()))
    s = learn.sample_images()
    for j,i in enumerate(s.idxs):
        pixels = torch.from_numpy(np.array(Image.open(dls.train_ds.items[i]))).permute(2,0,1)
        assert (s.images[j].int()-pixels.int()).abs().max()<=1
        assert s.vocab[s.labels[j]]==parent_label(dls.train_ds.items[i])
    axes = learn.show_neighbours(dls.train_ds.items[0], k=3)  # a file, which its own image in the sample equals
    assert axes[1].get_title().endswith('1.00')

def test_sample_of_another_loader(trained):
    x = torch.rand(30, 1, 16, 16)
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8)
    s = trained.sample_images(dl=dl, max_images=20)
    assert s.note=='the first 20 images' and s.labels is None
    torch.testing.assert_close(s.images.float()/255, x[:20], atol=.5/255+1e-6, rtol=0)

def test_thumbnails_are_small():
    learn = small_learner(dls=tensor_dls(torch.rand(8, 1, 120, 240), bs=4, device='cpu'))
    assert learn.sample_images().images.shape[1:]==(1,48,96)

def test_features_not_finite():
    learn = small_learner(n=40)
    next(learn.model.encoder.parameters()).data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match='features not finite'): learn.show_prototypes(2, 2)
    with pytest.raises(ValueError, match='scores must be finite'): learn.show_codes()
    for f in (lambda x: project_features(x), lambda x: nearest_images(x, x, 1)):
        with pytest.raises(ValueError, match='features must be finite'): f(torch.full((4,3), torch.inf))

# --- drawing --------------------------------------------------------------------------------------------------------------
def test_prototypes_by_hand():
    "Prototype 0 is used by images 0, 1, 2, prototype 2 by image 3, prototype 1 by none"
    scores = torch.tensor([[.9,.1,.03],[.8,.2,.02],[.7,.3,.01],[0,.35,.6]])
    images = torch.arange(4).view(4,1,1,1).expand(4,1,2,2)/4
    axes = draw_prototypes(images, scores, n=3, k=2)
    drawn = [float(ax.images[0].get_array()[0,0])*4 for ax in axes]
    assert drawn==[0,1, 3,0, 3,2]  # nearest to 0, to 2, to 1
    assert [re.sub('cosine.*', '', texts(ax)[0]).split() for ax in axes[::2]]==[
        'most used 75.0% of images prototype 0'.split(), '25.0% of images prototype 2'.split(), 'least used 0.0% of images prototype 1'.split()]
    assert 'cosine 0.90 to 0.80' in texts(axes[0])[0] and '2 of 3 prototypes' in axes[0].figure.get_suptitle()

@pytest.mark.parametrize('n,k,said', [(4,1,'n must be a whole number from 1 to 3, the prototypes, got 4'), (0,1,'n must be'), (True,1,'n must be'), (1,5,'k must be a whole number from 1 to 4, the images, got 5')])
def test_prototypes_asked_for(n, k, said):
    with pytest.raises(ValueError, match=said): draw_prototypes(torch.rand(4,1,2,2), torch.rand(4,3), n, k)

@pytest.mark.parametrize('n_in,shown', [(1,1), (2,1), (3,3), (5,3)])
def test_any_channels(n_in, shown):
    x = torch.rand(4, n_in, 6, 6)
    assert _drawable(x).shape==(4,shown,6,6)
    draw_prototypes(x, torch.rand(4, 3), 2, 2)[0].figure.canvas.draw()
    with pytest.raises(ValueError, match='shape'): _drawable(x[0])

def test_scores_are_the_models(trained):
    s = trained.sample_images()
    trained.model.eval()
    with torch.no_grad(): wanted = trained.model(trained.dls.train_ds.x)[1]
    torch.testing.assert_close(_scores(trained.model, s.features), wanted, atol=1e-5, rtol=1e-4)

def test_curves(trained):
    axes = trained.plot_training()
    assert len(axes)==4 and axes[-1].get_xlabel()=='step'
    h = trained.collapse_monitor.history
    np.testing.assert_allclose(axes[0].lines[0].get_ydata(), np.array(h['loss/lnK'])*np.log(20), rtol=1e-6)
    np.testing.assert_allclose(axes[1].lines[0].get_ydata(), h['code_entropy'], rtol=1e-6)
    np.testing.assert_allclose(axes[3].lines[0].get_ydata(), trained.recorder.lrs, rtol=1e-6)
    labels = axes[0].get_legend_handles_labels()[1]
    assert 'ln 20 = 3.00: predicts nothing' in labels and 'validation' in labels
    assert f'prototypes begin to learn: step {len(trained.dls.train)}' in labels and f'queue is used: step {len(trained.dls.train)}' in labels
    ends = next(o for o in axes[0].lines if o.get_label()=='validation').get_xdata()
    assert list(ends)==[len(trained.dls.train)-1, 2*len(trained.dls.train)-1]

def test_curves_without_a_monitor():
    learn = small_learner(n=40)
    with pytest.raises(ValueError, match='learn has no curves'): learn.plot_training()
    learn.fit(1)
    axes = learn.plot_training()
    assert len(axes)==2 and 'training, smoothed' in axes[0].get_legend_handles_labels()[1]
    np.testing.assert_allclose(axes[0].lines[0].get_ydata(), [float(o) for o in learn.recorder.losses], rtol=1e-6)

def test_long_curves_are_thinned():
    losses = torch.rand(10_000)
    line = draw_training(losses, n_protos=30)[0].lines[0]
    assert len(line.get_xdata())<=1500 and line.get_label()=='training (mean of 7 steps)'
    assert line.get_ydata()[3]==pytest.approx(losses[21:28].double().mean().item()) and line.get_xdata()[3]==24

def test_running_mean():
    ys = torch.rand(20, dtype=torch.float64)
    wanted = [ys[max(0, i-2):i+3].mean() for i in range(20)]
    torch.testing.assert_close(_running_mean(ys, 5), torch.stack(wanted))

@pytest.mark.parametrize('n,d', [(40,6), (5,30), (2,3), (9,1)])
def test_principal_components(n, d):
    x = torch.randn(n, d)
    xy,names = project_features(x, 'pca')
    z = F.normalize(x.double(), dim=1)
    u,s,_ = torch.linalg.svd(z-z.mean(0), full_matrices=False)
    wanted = F.pad((u*s)[:,:2], (0, 2-min(2, len(s))))
    torch.testing.assert_close(xy.double().abs(), wanted.abs(), atol=1e-6, rtol=1e-4)
    assert names[0]==f'principal component 1 ({s[0]**2/s.square().sum():.0%} of the variance)'

def test_constant_features_have_a_map():
    xy,_ = project_features(torch.ones(10, 4), 'pca')
    assert torch.equal(xy, torch.zeros(10, 2)) or xy.abs().max()<1e-6
    draw_embedding(xy).figure.canvas.draw()

def test_umap_where_installed(monkeypatch):
    asked = {}
    class UMAP:
        def __init__(self, **kwargs): asked.update(kwargs)
        def fit_transform(self, x): return x[:,:2]
    x = torch.randn(30, 4)
    monkeypatch.setitem(sys.modules, 'umap', types.SimpleNamespace(UMAP=UMAP))
    xy,names = project_features(x, seed=3)
    assert names==('UMAP 1','UMAP 2') and asked['random_state']==3
    torch.testing.assert_close(xy, F.normalize(x, dim=1)[:,:2])
    monkeypatch.setitem(sys.modules, 'umap', None)
    assert project_features(x)[1][0].startswith('principal')
    with pytest.raises(ImportError, match='umap-learn'): project_features(x, 'umap')
    with pytest.raises(ValueError, match='method must be'): project_features(x, 'tsne')

@pytest.mark.parametrize('n_classes', [2, 15, 40])
def test_map_colours(n_classes):
    labels = torch.arange(120)%n_classes
    ax = draw_embedding(torch.rand(120, 2), labels)
    legend = ax.get_legend()
    assert (legend is None)==(n_classes>20)
    if legend: assert [t.get_text() for t in legend.get_texts()]==[str(i) for i in range(n_classes)]
    assert len(np.unique(ax.collections[0].get_facecolors(), axis=0))==n_classes

def test_map_needs_labels(trained):
    bare = trained.sample_images(labels=False)
    with pytest.raises(ValueError, match='labels=True needs a sample with labels'): trained.plot_embedding(sample=bare, labels=True)
    assert trained.plot_embedding('pca', sample=bare).get_legend() is None

def test_neighbours_by_definition():
    x,q = torch.randn(50, 6),torch.randn(4, 6)
    sims,idxs = nearest_images(q, x, 7)
    wanted = F.cosine_similarity(q[:,None], x[None], dim=2).sort(dim=1, descending=True)
    torch.testing.assert_close(sims, wanted.values[:,:7])
    assert torch.equal(idxs, wanted.indices[:,:7])
    assert not (nearest_images(x, x, 49, torch.arange(50))[1]==torch.arange(50)[:,None]).any()
    with pytest.raises(ValueError, match='k must be a whole number from 1 to 49, the images to choose from, got 50'): nearest_images(x, x, 50, torch.arange(50))

def test_neighbours_drawn(trained):
    s = trained.sample_images(max_images=30)
    axes = trained.show_neighbours([s.idxs[4]], 5, sample=s)
    own,first = str(int(s.labels[4])),nearest_images(s.features[4:5], s.features, 5, [4])[1][0]
    assert len(axes)==6 and axes[0].get_title()==f'{own}\nimage'
    for ax,j in zip(axes[1:], first.tolist()):
        assert ax.get_title().split('\n')[0]==('' if str(int(s.labels[j]))==own else '≠ ')+str(int(s.labels[j]))
        np.testing.assert_allclose(ax.images[0].get_array(), s.images[j,0].numpy()/255, atol=1e-6)
    for part,n in ((0,64),(1,16)):  # images outside the sample, of the sample's own data set
        s = trained.sample_images(part, max_images=n//2)
        outside = [i for i in range(n) if i not in s.idxs][-2:]
        axes = trained.show_neighbours([*outside, s.idxs[4]], 5, sample=s)
        for ax,i in zip(axes[::6], [*outside, s.idxs[4]]):
            np.testing.assert_allclose(ax.images[0].get_array(), trained.dls[part].dataset.x[i,0].numpy(), atol=.5/255+1e-6)
        wanted = nearest_images(extract_features(trained, trained.dls[part], progress=False)[0][outside[:1]], s.features, 1)[0]
        assert axes[1].get_title().endswith(f'{wanted.item():.2f}')
    assert len(trained.show_neighbours(trained.dls.valid_ds.x[0], 3))==4
    with pytest.raises(ValueError, match='index from 0 to 63, got 64'): trained.show_neighbours(64)
    assert draw_neighbours(torch.rand(1,3,4,4), torch.rand(5,3,4,4), torch.rand(1,2), torch.tensor([[1,2]]))[1].get_title()
    long = ['a name that is long', 'short']
    axes = draw_neighbours(torch.rand(1,3,4,4), torch.rand(2,3,4,4), torch.rand(1,1), torch.tensor([[1]]), long[:1], long)
    assert [ax.get_title().split('\n')[0] for ax in axes]==['a name tha…', '≠ short']

def test_codes_by_hand():
    codes,preds = torch.tensor([[.5,.5,0.],[1,0,0]]),torch.tensor([[.2,.2,.6],[.25,.25,.5],[.5,.25,.25]])
    axes = draw_codes([torch.rand(1,4,4)]*3, codes, preds, [0,1], n_top=2)
    assert [t.get_text() for t in axes[-1].get_xticklabels()]==['0','1'] and len(axes)==6
    assert [[round(b.get_height(), 3) for b in ax.patches] for ax in axes[1::2]]==[[.5,.5,.2,.2],[1,0,.25,.25],[.5,.25]]
    loss = [-np.log(.2), -(np.log(.25)+np.log(.25))/2, (-np.log(.5)-(np.log(.5)+np.log(.25))/2)/2]
    assert [float(texts(ax)[0].split()[-1]) for ax in axes[1::2]]==[round(o, 2) for o in loss]

def test_codes_of_a_learner(trained):
    axes = trained.show_codes(5)
    assert len(axes)==6 and 'training image 5' in axes[0].figure.get_suptitle()
    assert trained.show_codes(5)[1].patches[0].get_height()==axes[1].patches[0].get_height()
    with pytest.raises(ValueError, match='image must be an index from 0 to 63, got 64'): trained.show_codes(64)
    assert small_learner(n=40).show_codes()  # before any fit

def test_learners_that_lack_something(trained):
    plain = Learner(digits(40, labelled=True), trained.model, loss_func=F.cross_entropy)
    with pytest.raises(ValueError, match='learn must have SWAV among its callbacks'): plain.show_codes()
    with pytest.raises(ValueError, match='model with prototypes'): Learner(digits(40, labelled=True), trained.model.encoder, loss_func=F.cross_entropy).show_prototypes()
    with pytest.raises(ValueError, match='n must be a whole number from 1 to 20, the prototypes, got 21'): trained.show_prototypes(21)
    assert plain.plot_embedding('pca') and plain.show_neighbours(0, 3) and plain.show_prototypes(2, 3)

def test_figures_given_are_drawn_in(trained):
    from matplotlib.figure import Figure
    before = plt.get_fignums()
    for f in (trained.show_codes, trained.plot_training, lambda fig: trained.plot_embedding('pca', fig=fig), lambda fig: trained.show_prototypes(2, 2, fig=fig), lambda fig: trained.swav.show(2, fig=fig)):
        fig = Figure()
        f(fig=fig)
        assert fig.axes
    assert plt.get_fignums()==before
