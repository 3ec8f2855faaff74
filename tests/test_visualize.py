"Pictures of a Learner say what its tensors say, and leave it alone."
import random, sys, types
import matplotlib.pyplot as plt, numpy as np, pytest, torch, torch.nn.functional as F
from fastai.callback.schedule import *  # noqa: F403  fit_one_cycle
from fastai.learner import Learner
from matplotlib.figure import Figure
from helpers import digits, rounding, small_augs, small_encoder, small_learner
from self_supervised_swav.evaluate import extract_features
from self_supervised_swav.knn import nearest_neighbors
from self_supervised_swav.multiview import MultiView
from self_supervised_swav.visualize import (
    _running_mean, draw_embedding, draw_neighbors, draw_neighbours, draw_training, nearest_images, project_features)

pytestmark = pytest.mark.usefixtures('closed_figures')

f32,f64 = torch.float32,torch.float64

def test_pictures_change_nothing(trained):
    model = trained.model
    model.train()
    next(model.encoder.children()).eval()
    modes = [m.training for m in model.modules()]
    weights = {k: v.clone() for k,v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    def states():
        numpy = np.random.get_state()[1].tolist()
        return torch.get_rng_state().tolist(),random.getstate(),numpy,trained.dls.train.rng.getstate()
    before = states()
    trained.sample_images(), trained.show_codes(), trained.show_prototypes(2, 2), trained.show_neighbors([0], 2)
    assert states()==before and [m.training for m in model.modules()]==modes
    assert all(torch.equal(v, model.state_dict()[k]) for k,v in weights.items())

def test_features_not_finite():
    learn = small_learner(n=40)
    next(learn.model.encoder.parameters()).data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match='features not finite'): learn.show_prototypes(2, 2)
    with pytest.raises(ValueError, match='scores must be finite'): learn.show_codes()
    with pytest.raises(ValueError, match='features must be finite'): project_features(torch.full((4,3), torch.inf))

def test_scores_of_prototypes_are_the_models(trained):
    s = trained.sample_images()
    trained.model.eval()
    with torch.no_grad(): wanted = trained.model(trained.dls.train_ds.x)[1]
    # the features once more, in other batches: a dozen layers of sums of at most 9*16 terms; the scores are at most 1
    bound = rounding(f32, 12*9*16)
    torch.testing.assert_close(trained.swav.proto_scores(s.features), wanted, atol=bound, rtol=0)
    assert (wanted-wanted.roll(1, 0)).abs().max()>10*bound  # another image's scores would not pass

# --- curves ---
def test_curves(trained):
    axes = trained.plot_training()
    assert [ax.get_ylabel() for ax in axes]==['loss (nats)','entropy / ln K','share',
                                              'learning rate'] and axes[-1].get_xlabel()=='step'
    m,n = trained.collapse_monitor,len(trained.dls.train)
    for ax,ys in zip(axes, (m.losses, m.history['code_entropy'], m.history['proto_usage'], trained.recorder.lrs)):
        assert list(ax.lines[0].get_ydata())==[float(o) for o in ys]
    labels = axes[0].get_legend_handles_labels()[1]
    assert {'ln 20 = 3.00: chance', 'validation', f'prototypes begin to learn: step {n}',
            f'queue is used: step {n}'}<=set(labels)
    ends = next(o for o in axes[0].lines if o.get_label()=='validation').get_xdata()
    assert list(ends)==[n-1, 2*n-1]

def test_curves_without_a_monitor():
    learn = small_learner(n=40)
    with pytest.raises(ValueError, match='learn has no curves'): learn.plot_training()
    learn.fit(1)
    axes = learn.plot_training()
    assert len(axes)==2 and 'training, smoothed' in axes[0].get_legend_handles_labels()[1]
    assert list(axes[0].lines[0].get_ydata())==[float(o) for o in learn.recorder.losses]

def test_curves_without_a_method():
    learn = Learner(digits(40, labeled=True), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10)),
                    loss_func=F.cross_entropy)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert [ax.get_ylabel() for ax in learn.plot_training()]==['loss (nats)','learning rate']

class Agree(MultiView):
    "A method with numbers of its own, and without a known loss of predicting nothing"
    signs,curves = ('spread',),{'spread of something': {'spread': 'of the first crop'}}
    def view_loss(self, pred): return pred.var()
    def health(self, pred): return {'spread': pred.detach().std()}

def test_curves_of_a_new_method():
    "What a method calls its numbers is what is drawn: nothing here knows it"
    from self_supervised_swav.monitor import CollapseMonitor
    class OnList(torch.nn.Module):
        def __init__(self): super().__init__(); self.encoder = small_encoder()
        def forward(self, x): return torch.cat([self.encoder(o) for o in (x if isinstance(x, list) else [x])])
    learn = Learner(digits(40), OnList(), cbs=[Agree(small_augs()), CollapseMonitor()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    axes = learn.plot_training()
    assert [ax.get_ylabel() for ax in axes]==['loss (nats)','spread of something','learning rate']
    assert axes[1].get_legend_handles_labels()[1]==['of the first crop']
    for f,what in ((learn.show_codes,'codes'), (learn.show_prototypes,'prototypes')):
        with pytest.raises(ValueError, match=f'learn must have a method with {what}, such as SWAV, got Agree'): f()

def test_long_curves_are_thinned():
    losses = torch.rand(10_000)
    line = draw_training(losses, chance=(3.4,'ln 30'))[0].lines[0]
    assert len(line.get_xdata())<=1500 and line.get_label()=='training (mean of 7 steps)'
    assert line.get_ydata()[3]==pytest.approx(losses[21:28].double().mean().item(),
                                              abs=rounding(f64, 7)) and line.get_xdata()[3]==24

def test_running_mean():
    ys = torch.rand(20, dtype=f64)
    wanted = torch.stack([ys[max(0, i-2):i+3].mean() for i in range(20)])
    # the difference of two running sums of at most 20 values below 1
    torch.testing.assert_close(_running_mean(ys, 5), wanted, atol=rounding(f64, 2*20, 20), rtol=0)

# --- map ---
@pytest.mark.parametrize('n,d', [(40,6), (5,30), (2,3), (9,1)])
def test_principal_components(n, d):
    x = torch.randn(n, d)
    xy,names = project_features(x, 'pca')
    z = F.normalize(x.double(), dim=1)
    u,s,_ = torch.linalg.svd(z-z.mean(0), full_matrices=False)
    wanted = F.pad((u*s)[:,:2], (0, 2-min(2, len(s))))
    var = s[0]**2
    gaps = F.pad(s, (0,2))[:2]**2-F.pad(s, (0,2))[1:3]**2
    gap = gaps[gaps>1e-9*var].min()  # vectors turn by rounding/gap
    # a variance that is zero comes out as the rounding of the largest, and is drawn as its root
    bound = rounding(f32, 1, 2)+rounding(f64, n+d, var*var/gap)+rounding(f64, n+d, var)**.5
    torch.testing.assert_close(xy.double().abs(), wanted.abs(), atol=float(bound), rtol=0)
    assert names[0]==f'component 1 ({var/s.square().sum():.0%} of variance)'

def test_constant_features_have_a_map():
    xy,_ = project_features(torch.ones(10, 4), 'pca')
    assert torch.equal(xy, torch.zeros(10, 2))  # ten times 1/2: their mean is exact
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
    torch.testing.assert_close(xy, F.normalize(x, dim=1)[:,:2], atol=rounding(f32, 4+2),
                               rtol=0)  # four squares, root and quotient
    monkeypatch.setitem(sys.modules, 'umap', None)
    assert project_features(x)[1][0].startswith('component 1')
    with pytest.raises(ImportError, match='umap-learn'): project_features(x, 'umap')
    with pytest.raises(ValueError, match='method must be'): project_features(x, 'tsne')

@pytest.mark.parametrize('n_classes', [2, 15, 40])
def test_map_colors(n_classes):
    labels = torch.arange(120)%n_classes
    ax = draw_embedding(torch.rand(120, 2), labels)
    legend = ax.get_legend()
    assert (legend is None)==(n_classes>20)
    if legend: assert [t.get_text() for t in legend.get_texts()]==[str(i) for i in range(n_classes)]
    assert len(np.unique(ax.collections[0].get_facecolors(), axis=0))==n_classes

def test_legend_shows_names_as_they_are():
    "Matplotlib would read $ as a formula, leave out a name that begins with _, and stop at a byte that is not UTF-8"
    names = ['$x_1$', '$$', '_other', 'a\nb', b'\xe9'.decode(errors='surrogateescape'), '<b>&amp;']
    ax = draw_embedding(torch.rand(12, 2), torch.arange(12)%6, names)
    ax.figure.canvas.draw()
    texts = ax.get_legend().get_texts()
    assert [t.get_text() for t in texts]==['$x_1$', '$$', '_other', r'a\nb', r'\xe9', '<b>&amp;']
    assert not any(t.get_parse_math() for t in texts)

def test_map_needs_labels(trained):
    bare = trained.sample_images(labels=False)
    with pytest.raises(ValueError, match='labels=True needs a sample with labels'):
        trained.plot_embedding(sample=bare, labels=True)
    assert trained.plot_embedding('pca', sample=bare).get_legend() is None

# --- neighbors ---
def test_neighbors_drawn(trained):
    s = trained.sample_images(max_images=30)
    axes = trained.show_neighbors([s.idxs[4]], 5, sample=s)
    own,first = s.names[4],nearest_neighbors(s.features[4:5], s.features, 5, own=[4])[1][0]
    assert len(axes)==6 and axes[0].get_title()==f'{own}\nimage'
    for ax,j in zip(axes[1:], first.tolist()):
        assert ax.get_title().split('\n')[0]==('' if s.names[j]==own else '≠ ')+s.names[j]
        np.testing.assert_allclose(ax.images[0].get_array(), s.images[j,0].numpy()/255, atol=rounding(f32), rtol=0)

def test_neighbors_of_images_outside_the_sample(trained):
    for part,n in ((0,64),(1,16)):  # of the sample's own data set
        s = trained.sample_images(part, max_images=n//2)
        outside = [i for i in range(n) if i not in s.idxs][-2:]
        axes = trained.show_neighbors([*outside, s.idxs[4]], 5, sample=s)
        for ax,i in zip(axes[::6], [*outside, s.idxs[4]]):
            np.testing.assert_allclose(ax.images[0].get_array(), trained.dls[part].dataset.x[i,0].numpy(),
                                       atol=.5/255+rounding(f32, 2), rtol=0)
        wanted = nearest_neighbors(extract_features(trained, trained.dls[part], progress=False)[0][outside[:1]],
                                   s.features, 1)[0]
        # two digits are shown; features of another batch differ by rounding, as in the test of the scores
        assert abs(float(axes[1].get_title().split('\n')[-1])-wanted.item())<=.005+rounding(f32, 12*9*16)
    assert len(trained.show_neighbors(trained.dls.valid_ds.x[0], 3))==4
    with pytest.raises(ValueError, match='index from 0 to 63, got 64'): trained.show_neighbors(64)

def test_names_beside_neighbors():
    x = torch.rand(2,3,4,4)
    assert draw_neighbors(x[:1], x, torch.rand(1,2), torch.tensor([[1,0]]))[1].get_title()
    names = ['$a name$ that is much longer than its picture is wide', 'short\n']
    axes = draw_neighbors(x[:1], x, torch.rand(1,1), torch.tensor([[1]]), names[:1], names, query_files=['in/a.png'],
                          files=['in/a.png','in/$b$.png'])
    first,second = (ax.get_title().split('\n')[0] for ax in axes)
    assert first.startswith('$a name') and first.endswith('…') and second=='≠ short\\n'
    assert [ax.get_label() for ax in axes]==['in/a.png',
                                             'in/$b$.png'] and [ax.texts[-1].get_text() for ax in axes]==['a.png',
                                                                                                          '$b$.png']
    axes[0].figure.canvas.draw()

# --- the Learner's methods ---
def test_codes_of_a_learner(trained):
    axes = trained.show_codes(5)
    assert len(axes)==6 and 'training image 5' in axes[0].figure.get_suptitle()
    assert trained.show_codes(5)[1].patches[0].get_height()==axes[1].patches[0].get_height()
    with pytest.raises(ValueError, match='image must be an index from 0 to 63, got 64'): trained.show_codes(64)
    assert small_learner(n=40).show_codes()  # before any fit

def test_learners_that_lack_something(trained):
    plain = Learner(digits(40, labeled=True), trained.model, loss_func=F.cross_entropy)
    for f in (plain.show_codes, plain.show_prototypes):
        with pytest.raises(ValueError, match='learn must have a method such as SWAV among its callbacks'): f()
    with pytest.raises(ValueError, match='n must be a whole number from 1 to 20, the prototypes, got 21'):
        trained.show_prototypes(21)
    assert plain.plot_embedding('pca') and plain.show_neighbors(0, 3)

def test_figures_given_are_drawn_in(trained):
    before = plt.get_fignums()
    draws = (trained.show_codes, trained.plot_training, lambda fig: trained.plot_embedding('pca', fig=fig),
             lambda fig: trained.show_prototypes(2, 2, fig=fig), lambda fig: trained.show_neighbors(0, 2, fig=fig),
             lambda fig: trained.swav.show(2, fig=fig))
    for draw in draws:
        fig = Figure()
        draw(fig=fig)
        assert fig.axes
    assert plt.get_fignums()==before

def test_old_names(trained):
    x = torch.randn(9, 4)
    with pytest.warns(DeprecationWarning, match='nearest_images is now nearest_neighbors'):
        sims,idxs = nearest_images(x, x, 2, list(range(9)))
    wanted = nearest_neighbors(x, x, 2, own=range(9))
    assert torch.equal(idxs, wanted[1]) and torch.equal(sims, wanted[0])
    with pytest.warns(DeprecationWarning, match='draw_neighbours is now draw_neighbors'):
        draw_neighbours(torch.rand(1,1,4,4), torch.rand(9,1,4,4), sims[:1], idxs[:1])
    with pytest.warns(DeprecationWarning, match='show_neighbours is now learn.show_neighbors'):
        assert len(trained.show_neighbours(0, k=3))==4
