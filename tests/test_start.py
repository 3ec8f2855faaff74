"What an encoder starts from, and whether it became better than that: several encoders beside each other."
import json, re, sys
from functools import partial
from pathlib import Path
import pytest, torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.optimizer import SGD
from fastai.torch_core import trainable_params
from fastai.vision.augment import Normalize
from fastai.vision.core import imagenet_stats
from hypothesis import given, strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from helpers import digits, seed_all, small_encoder, small_learner, tiny_run as small
from test_resume import PowerCut, cut_after
from self_supervised_swav import compare, runs
from self_supervised_swav.checkpoints import encoder_settings, load_encoder, save_encoder
from self_supervised_swav.compare import AsTrained, compare_encoders, evaluate_run, mean_ci, percent, points
from self_supervised_swav.data import digits_dls
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.evaluate import extract_features, few_label_idxs, knn_accuracy, linear_probe
from self_supervised_swav.learner import pretrain_learner
from self_supervised_swav.multiview import methods
from self_supervised_swav.optimizer import encoder_split, lars
from self_supervised_swav.recipes import swav_recipe
from self_supervised_swav.resume import ResumeTraining
from self_supervised_swav.whitening import Whitening

pytestmark = pytest.mark.filterwarnings('ignore')
accuracies = st.lists(st.floats(0, 1), min_size=1, max_size=6)

# --- intervals --------------------------------------------------------------------------------------------------------
@given(accuracies)
def test_no_cell_says_what_cannot_be(values):
    "No interval of fewer than three, nothing below 0 or above 100, and the mean within its interval"
    for text,least in ((percent(values),0), (points([2*o-1 for o in values]),-100)):
        numbers = [float(o) for o in re.findall(r'-?\d+\.\d', text.replace('+', ''))]
        if len(values)<3: assert len(numbers)==1, text
        elif '±' in text: assert least<=numbers[0]-numbers[1]+.1 and numbers[0]+numbers[1]-.1<=100, text  # of rounding
        else: assert numbers[1]<=numbers[0]<=numbers[2], text
        assert all(least<=o<=100 for o in numbers), text

def test_two_seeds_have_no_interval():
    assert percent([.416,.626])=='52.1%' and points([.416,.626])=='+52.1'  # Student's t of two gives ± 133.4

# --- the same for all ------------------------------------------------------------------------------------------------
def table_of(text):
    "Cells of a markdown table by the name of its row"
    rows = [[c.strip() for c in l.strip('|').split('|')] for l in text.splitlines() if l[:1]=='|']
    return {r[0]: r[1:] for r in rows}

def test_figures_are_those_of_the_parts():
    "The votes and probes of each encoder by hand: its own channels, size and statistics, the same few labels"
    dls = digits(300, labeled=True)
    gray,color = small_encoder().eval(),small_encoder(3).eval()
    stats = [[.2,.3,.4],[.5,.6,.7]]
    color.settings |= dict(stats=stats, size=24)
    res = compare_encoders({'gray': gray, 'color': color}, dls, labels=[3], seeds=3, k=5)
    feats = {'raw pixels': [(ds.x.flatten(1).as_subclass(torch.Tensor),ds.y) for ds in (dls.train_ds,dls.valid_ds)]}
    feats['gray'] = [extract_features(gray, dl, progress=False) for dl in dls]
    mean,std = (torch.tensor(o).view(1,3,1,1) for o in stats)
    def wide(x): return nn.functional.interpolate(x, (24,24), mode='bilinear', antialias=True).expand(-1,3,-1,-1)
    with torch.no_grad(): feats['color'] = [(color((wide(ds.x.as_subclass(torch.Tensor))-mean)/std),ds.y)
                                            for ds in (dls.train_ds,dls.valid_ds)]
    acc = res['accuracy']
    for name,(train,valid) in feats.items():
        assert acc[f'k-NN, {name}']['all']==[knn_accuracy(train, valid, 5)]
        for seed in range(3):
            idxs = few_label_idxs(train[1], 3, seed=seed)
            few = train[0][idxs],train[1][idxs]
            whitening = Whitening.fit(train[0], shrink=min(1, 2/30**.5))
            assert acc[f'k-NN, {name}']['3'][seed]==knn_accuracy(few, valid, 5)
            assert acc[f'k-NN whitened, {name}']['3'][seed]==knn_accuracy(few, valid, 5, whiten=whitening)
            assert acc[f'linear probe, {name}']['3'][seed]==linear_probe(few, valid).top1
    assert [len(o) for o in acc['k-NN, untrained, like color'].values()]==[3,3]
    rows = table_of(str(res))
    gains = [a-b for a,b in zip(acc['k-NN, color']['3'], acc['k-NN, gray']['3'])]
    assert table_of(str(res).split('\n\n')[1])['k-NN, color'][0]==points(gains)
    assert rows['points more than gray']==['3 labels per class','all labels']
    half = mean_ci(gains)[1]
    said = next(o for o in res.verdicts)
    assert said.startswith('color beside gray: of 3 differences with an interval') and half>=0

def test_an_encoder_beside_itself_gains_nothing():
    encoder = small_encoder()
    state = torch.random.get_rng_state()
    res = compare_encoders({'a': encoder, 'b': encoder}, digits(100, labeled=True), labels=['20%'], seeds=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(set(v)=={0.} for by_label in res.gains.values() for v in by_label.values())
    assert list(res.verdicts)==['b beside a: of 3 differences with an interval, 0 say better, 0 worse, 3 neither.']
    assert 'k-NN, untrained encoder' in res['accuracy'] and not any('like' in o for o in res['accuracy'])

def test_learners_runs_and_modules(tmp_path):
    "All that an encoder can be; a module alone has no untrained twin, and is named"
    learn = small_learner(100, labeled=True)
    save_encoder(learn, tmp_path/'encoder.safetensors')
    class Flat(nn.Module):
        def forward(self, x): return x.flatten(1)
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    res = compare_encoders({'learner': learn, 'run': tmp_path, 'file': str(tmp_path/'encoder.safetensors'),
                            'flat': Flat(), 'small': AsTrained(Flat(), size=4)}, learn.dls, labels=(), seeds=1)
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k]), k
    acc = res['accuracy']
    assert acc['k-NN, learner']==acc['k-NN, run']==acc['k-NN, file']
    assert acc['k-NN, flat']==acc['k-NN, raw pixels']!=acc['k-NN, small']
    assert 'No untrained encoder is like flat or small' in res.notes and '1 seed: no intervals' in res.notes
    assert '±' not in str(res) and list(table_of(str(res)).values())[0]==['all labels']

def test_fine_tuning_of_several():
    res = compare_encoders({'a': small_encoder(), 'b': small_encoder()}, digits(60, labeled=True), [2], 1, epochs=3)
    assert list(res['accuracy'])[:3]==['trained from scratch','fine-tuned, a','fine-tuned, b']
    assert 'fine-tuned, b' in res.gains and res['accuracy']['fine-tuned, b'].keys()=={'2'}

class Nan(nn.Module):
    def forward(self, x): return x.flatten(1)*torch.nan

@pytest.mark.parametrize('encoders,kwargs,match', [
    ({}, {}, 'encoders must be a dict'), ([small_encoder()], {}, 'encoders must be a dict'),
    ({'a|b': 1}, {}, 'names in one line'), ({1: 1}, {}, 'names in one line'),
    ({'raw pixels': 0}, {}, 'different names'),
    ({'untrained encoder': 0}, {}, 'different names'), ({'a': 0}, dict(seeds=0), 'seeds must be'),
    ({'a': 0}, dict(epochs=2), 'epochs must be 0 or at least 3'), ({'a': 0}, dict(labels=['x']), 'labels must be'),
    ({'a': 0}, dict(labels=[1000]), 'n_per_class must be at most'), ({'a': 0}, dict(size=4), 'size must be'),
    ({'a': nn.Conv2d(1, 4, 3)}, {}, r"'a' must give features \(B,d\), got shape"),
    ({'a': small_encoder(4)}, {}, "'a' does not take images .*4 channels, got 1"),
    ({'a': Nan()}, {}, 'a: features not finite')])
def test_refused(encoders, kwargs, match):
    if isinstance(encoders, dict): encoders = {k: small_encoder() if v==0 else v for k,v in encoders.items()}
    with pytest.raises((ValueError,FloatingPointError), match=match):
        compare_encoders(encoders, digits(60, labeled=True), **{'labels': [2]} | kwargs)

def test_images_refused():
    encoders = {'a': small_encoder()}
    with pytest.raises(TypeError, match="encoder 'a' must be a Learner, a Module, or a run"):
        compare_encoders({'a': 3}, digits(60, labeled=True))
    with pytest.raises(ValueError, match='dls must have labels'): compare_encoders(encoders, digits(60))
    with pytest.raises(ValueError, match='no images to measure with'):
        compare_encoders(encoders, digits(60, labeled=True, valid_pct=0))
    dls = digits(60, labeled=True)
    norm = [dl.new(after_batch=[Normalize.from_stats([.5], [.5], cuda=False)]) for dl in dls]
    with pytest.raises(ValueError, match='dls must not normalize'): compare_encoders(encoders, DataLoaders(*norm))
    loader = DataLoader(TensorDataset(torch.rand(4,1,8,8), torch.arange(4)))
    with pytest.raises((TypeError,AttributeError)): compare_encoders(encoders, DataLoaders(loader, loader))

# --- swav evaluate A B C FOLDER ---------------------------------------------------------------------------------------
@pytest.fixture
def three(tmp_path):
    "Two runs and a file: gray of 16 px, color of 12 px with statistics, and a copy"
    for name,n_in,more in (('old',1,dict(size=16)), ('new',3,dict(size=12, stats=[[.5]*3,[.5]*3])),
                           ('third',1,dict(size=16))):
        (tmp_path/name).mkdir()
        torch.manual_seed(n_in)
        save_encoder(small_encoder(n_in), tmp_path/name/'encoder.safetensors', **more)
    (tmp_path/'third'/'encoder.safetensors').rename(tmp_path/'copy.safetensors')
    return tmp_path

def test_command(three, command):
    args = three/'old',three/'new',three/'copy.safetensors','digits','--labels',4,'--seeds',3,'--epochs',0,'-o',
    code,said,err = command('evaluate', *args, three/'all.json', '--device', 'cpu')
    assert code==0, err
    res = json.loads((three/'all.json').read_text())
    assert res['encoders']==['old','new','copy'] and f'Wrote {three}/all.json' in said
    assert res['accuracy']['k-NN, old']==res['accuracy']['k-NN, copy']!=res['accuracy']['k-NN, new']
    assert {'k-NN, untrained, like old and copy','k-NN, untrained, like new','k-NN whitened, raw pixels'}<=set(
        res['accuracy'])
    assert '| points more than old |' in said and 'new beside old: of 3 differences' in said
    assert not (three/'old'/'evaluation.json').exists()
    # each alone gives the same
    alone = evaluate_run(three/'new', 'digits', labels=['4'], seeds=3, epochs=0, device='cpu')
    assert alone['accuracy']['k-NN, pretrained encoder']==res['accuracy']['k-NN, new']
    assert (three/'new'/'evaluation.json').exists() and not alone.gains

def test_one_run_with_options_between(three, command):
    code,said,err = command('evaluate', three/'old', '--labels', 2, '--seeds', 1, '--epochs', 0, 'digits')
    assert code==0 and 'linear probe, pretrained encoder' in said, err

@pytest.mark.parametrize('args,match', [
    (['old','old','digits'], 'run must be different runs'), (['old','none','digits'], 'no encoder at'),
    (['old','new','nowhere'], 'source must be a folder'), (['old','digits','-o','x.csv'], '--out must be a file that')])
def test_command_refused(three, command, args, match, monkeypatch):
    monkeypatch.chdir(three)
    code,said,err = command('evaluate', *args)
    assert code==2 and match in err and 'Traceback' not in err
    assert not list(three.glob('*.json'))

def test_same_names_and_other_splits(three, monkeypatch):
    "Runs of the same name are told apart; one that held out other images has seen some of these"
    (three/'b'/'old').mkdir(parents=True)
    save_encoder(small_encoder(), three/'b'/'old'/'encoder.safetensors', size=16)
    monkeypatch.chdir(three)
    for folder,seed in (('old',42),('b/old',7)):
        (three/folder/'settings.json').write_text(json.dumps(dict(args=dict(source='digits', seed=seed, valid_pct=.3,
                                                                           n_images=None))))
    with pytest.warns(UserWarning, match='not held out in the pretraining of b/old:'):
        res = evaluate_run(['old','b/old'], 'digits', labels=['2'], seeds=1, epochs=0, device='cpu')
    assert res['encoders']==['old','b/old'] and res['n_valid']==539  # 30 % of 1797, as in the first
    dls = digits_dls(16, valid_pct=.3, seed=42, device='cpu')
    assert res['accuracy']['largest class']['all']==[dls.valid_ds.y.bincount().max().item()/539]
    assert compare.Evaluation(res).gains==res.gains

# --- trained weights to go on from ------------------------------------------------------------------------------------
tiny = dict(layers=(1,1,1,1), channels=(8,8,16,16))
head = dict(hidden_size=16, projection_size=8, n_protos=20, bf16=False)

def learner(dls, arch, method='swav', fit=None, **kwargs):
    learn = pretrain_learner(dls, arch, method, **{k: v for k,v in head.items() if method=='swav' or k!='n_protos'},
                             **kwargs)
    learn.remove_cb(learn.progress).logger = lambda *_: None
    return learn

@pytest.fixture
def published(monkeypatch):
    "A stand-in for timm's download: every weight is .01, and the number of downloads"
    loaded = []
    def load(model, *args, **kwargs):
        loaded.append(type(model).__name__)
        with torch.no_grad():
            for p in model.parameters(): p.fill_(.01)
    monkeypatch.setattr('timm.models._builder.load_pretrained', load)
    return loaded

@pytest.fixture
def old(tmp_path):
    "A run's file: an encoder of 16 px and one channel, with statistics"
    seed_all(5)
    encoder = create_encoder('resnet18', n_in=1, pretrained=False, small_images=True, **tiny)
    (tmp_path/'old').mkdir()
    save_encoder(encoder, tmp_path/'old'/'encoder.safetensors', stats=[[.3],[.25]], size=16)
    return tmp_path/'old'

@pytest.mark.parametrize('n_in,stats', [(3,list(map(list, imagenet_stats))),
                                        (1,[[sum(o)/3] for o in imagenet_stats])])
def test_published_weights(n_in, stats, published, capsys):
    "Weights, their statistics and sizes, a slower encoder; the line says so"
    learn = learner(digits(60, n_in=n_in), 'resnet18', pretrained=True, encoder=tiny)
    assert 'images of 224 px, mean ' in capsys.readouterr().out and published==['ResNet']
    r = learn.recipe
    assert all((p==.01).all() for p in learn.model.encoder.parameters())
    assert r['augs']['crop_sizes']==(96,60) and r['encoder']['small_images'] is False
    assert torch.tensor(r['augs']['stats']).allclose(torch.tensor(stats))
    assert r.reasons['augs.stats']=='what the weights know'
    assert 'zero_init_last' not in r['encoder']
    crops = learn.swav.cut(torch.zeros(2,n_in,16,16))
    for c,(m,s) in enumerate(zip(*stats)): torch.testing.assert_close(crops[0][:,c].mean(), torch.tensor(-m/s))
    same = learner(digits(60, n_in=n_in), 'resnet18', init='timm', encoder=tiny)
    assert same.recipe==r

@pytest.mark.parametrize('method', list(methods))
def test_every_method_goes_on(method, old, capsys):
    "The file's weights, two groups with a tenth of the rate, and an encoder that waits"
    weights = load_encoder(old/'encoder.safetensors')
    class Note(Callback):
        run_valid,seen = False,[]
        def after_batch(self): self.seen.append(self.learn.model.encoder.conv1.weight.detach().clone())
    note = Note()
    note.seen = []
    learn = learner(digits(100), None, method, init=old, cbs=note, freeze_encoder_pct=.5)
    assert f'{old}/encoder.safetensors: ' in capsys.readouterr().out
    for k,v in weights.state_dict().items(): assert torch.equal(learn.model.encoder.state_dict()[k], v), k
    r = learn.recipe
    assert r['encoder']['channels']==(8,8,16,16) and r['encoder']['pretrained'] is False
    assert r['augs']['stats']==([.3],[.25]) and r['start']==dict(encoder_lr_mult=.1, freeze_encoder_pct=.5)
    assert max(r['augs']['crop_sizes'])<=16  # the file's own size: nothing is enlarged
    learn.fit_one_cycle(2)
    n = len(note.seen)//2
    assert all(torch.equal(o, weights.conv1.weight) for o in note.seen[:n])
    assert not torch.equal(note.seen[n], weights.conv1.weight)
    lrs = [h['lr'] for h in learn.opt.hypers]
    assert len(lrs)==2 and lrs[0]==pytest.approx(lrs[1]/10)
    ours = {id(p) for p in learn.model.encoder.parameters()}
    groups = [list(o) for o in encoder_split(learn.model)]
    assert {id(p) for p in groups[0]}==ours and len(groups[0])+len(groups[1])==len(trainable_params(learn.model))

def test_head_alone_is_the_same_as_an_encoder_without_gradients():
    def trained(needs_grad, **kwargs):
        seed_all()
        learn = learner(digits(60), small_encoder().requires_grad_(needs_grad), init=True, **kwargs)
        learn.fit(1)
        return learn.model.state_dict()
    a,b = trained(True, freeze_encoder_pct=1.),trained(False, freeze_encoder_pct=0.)
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=0, atol=0)

def test_decay_to_the_start():
    "By hand: SGD, and after each step a share of the way back; the optimizer's own decay leaves the encoder alone"
    def trained(**kwargs):
        seed_all()
        learn = learner(digits(60), small_encoder(), init=True, opt_func=partial(SGD, wd=.5), lr=.05,
                        encoder_lr_mult=1., freeze_encoder_pct=0., crop_sizes=(12,8), **kwargs)
        start = [p.detach().clone() for p in learn.model.encoder.parameters()]
        return learn,start
    class ByHand(Callback):
        "Plain SGD of the encoder, towards `start`"
        run_valid = False
        def before_step(self):
            self.want = [(p-.05*p.grad).lerp(o, .05*2.).detach() for p,o in
                         zip(self.model.encoder.parameters(), self.first)]
        def after_step(self):
            for p,o in zip(self.model.encoder.parameters(), self.want): torch.testing.assert_close(p.detach(), o)
    check = ByHand()
    learn,check.first = trained(wd_to_start=2.)
    learn.add_cb(check)
    check.order = learn.decay_to_start.order+1
    learn.fit(2)
    far = sum((p.detach()-o).norm()**2 for p,o in zip(learn.model.encoder.parameters(), check.first))
    free,start = trained()
    free.fit(2)
    assert far<sum((p.detach()-o).norm()**2 for p,o in zip(free.model.encoder.parameters(), start))

def test_decay_to_the_start_after_a_stop(tmp_path):
    "The start is that of the first fit, not where the fit was taken up"
    def new(name):
        seed_all()
        return learner(digits(60), small_encoder(), init=True, wd_to_start=5., crop_sizes=(12,8), freeze_encoder_pct=0.,
                       cbs=ResumeTraining(tmp_path/name, every=1))
    whole = new('whole.pth')
    whole.fit(2)
    cut = new('last.pth')
    cut_after(cut, 4)
    with pytest.raises(PowerCut): cut.fit(2)
    again = new('last.pth')
    for p in again.model.encoder.parameters(): p.data.mul_(1.5)  # what it is built with does not matter
    again.fit(2)
    for a,b in zip(again.model.parameters(), whole.model.parameters()): assert torch.equal(a, b)

def test_rates_that_are_given(old):
    "A rate scales both groups; a slice, a splitter and a ratio of one are taken as they are"
    def rate(**kwargs): return learner(digits(60), None, init=old, **kwargs).lr
    assert rate(lr=.02)==slice(.002,.02) and rate(lr=.02, encoder_lr_mult=.5)==slice(.01,.02)
    assert rate(lr=slice(1e-5,1e-3))==slice(1e-5,1e-3) and rate(lr=.02, encoder_lr_mult=1.)==.02
    assert rate(lr=.02, splitter=trainable_params)==.02
    assert rate(opt_func=lars, lr=4.)==slice(.4,4.)

def test_recipes_that_are_given(old, published):
    "A recipe is followed as it is, with the weights and their statistics"
    r = swav_recipe(48, 16, 16, n_protos=20, pretrained=True)
    learn = learner(digits(60, n_in=3), 'resnet18', recipe=r, encoder=tiny)
    assert learn.recipe['start']==r['start'] and learn.recipe['augs']['crop_sizes']==r['augs']['crop_sizes']
    assert learn.recipe.reasons['augs.stats']=='what the weights know'
    r['augs']['stats'] = None
    assert learner(digits(60, n_in=3), 'resnet18', recipe=r, encoder=tiny).recipe['augs']['stats'] is None
    plain = learner(digits(60), None, recipe=swav_recipe(48, 16, 16), init=old)
    assert 'start' not in plain.recipe.keys() or not plain.recipe['start']
    assert plain.recipe['augs']['stats']==([.3],[.25])

def test_other_checkpoints(tmp_path, capsys):
    "Names below a prefix, with a classifier that is left; a part is an error"
    encoder = small_encoder()
    state = {f'module.{k}': v for k,v in encoder.state_dict().items()}
    torch.save(dict(state_dict=state | {'module.fc.weight': torch.zeros(2,16)}), tmp_path/'a.pth')
    learn = learner(digits(60), 'resnet18', init=tmp_path/'a.pth', encoder=tiny, small_images=True)
    n = len(encoder.state_dict())
    assert f'a.pth: {n} tensors taken, none missing, 1 left' in capsys.readouterr().out
    for k,v in encoder.state_dict().items(): assert torch.equal(learn.model.encoder.state_dict()[k], v), k
    torch.save({k: v for k,v in state.items() if 'layer4' not in k}, tmp_path/'b.pth')
    with pytest.raises(ValueError, match=r"b.pth does not fit 'resnet18': \d+ tensors are missing .* layer4"):
        learner(digits(60), 'resnet18', init=tmp_path/'b.pth', encoder=tiny, small_images=True)
    with pytest.raises(ValueError, match='arch must be given'): learner(digits(60), None, init=tmp_path/'a.pth')

@pytest.mark.parametrize('kwargs,match', [
    (dict(arch='resnet34'), "arch must be 'resnet18' as in .*or None, got 'resnet34'"),
    (dict(encoder=dict(layers=(2,2,2,2))), r'has layers=\(1, 1, 1, 1\), got layers=\(2, 2, 2, 2\)'),
    (dict(n_in=3), 'images must have 1 channels, as the encoder in .*, got 3'),
    (dict(init='no/such'), "init must be 'timm', a run, or a file of weights"), (dict(init=True), 'arch must be given'),
    (dict(init=None, arch='resnet18', freeze_encoder_pct=.1), 'freeze_encoder_pct is for trained weights'),
    (dict(arch=small_encoder()), 'init must be True for an encoder that is there'),
    (dict(encoder_lr_mult=2.), 'encoder_lr_mult must be more than 0 and at most 1, got 2'),
    (dict(encoder_lr_mult=0.), 'encoder_lr_mult must be more than 0 and at most 1, got 0'),
    (dict(wd_to_start=-1.), 'wd_to_start must be 0 or more, got -1'),
    (dict(freeze_encoder_pct=-1.), 'freeze_encoder_pct must be between 0 and 1, got -1')])
def test_starts_refused(kwargs, match, old):
    n_in,kwargs = kwargs.get('n_in', 1),{k: v for k,v in (dict(init=old)|kwargs).items() if k!='n_in'}
    with pytest.raises((ValueError,FileNotFoundError), match=match):
        learner(digits(60, n_in=n_in), kwargs.pop('arch', None), **kwargs)

def test_published_encoders_are_compared_as_they_were_trained(published):
    "Statistics and size of published weights are in the encoder's settings, and in its file"
    encoder = create_encoder('resnet18', n_in=1, **tiny)
    assert encoder.settings['size']==224 and encoder.settings['stats'][0]==[pytest.approx(sum(imagenet_stats[0])/3)]
    assert 'size' not in create_encoder('resnet18', small_images=True, **tiny).settings
    assert 'stats' not in create_encoder('resnet18', pretrained=False, **tiny).settings

@pytest.mark.slow
def test_init_of_the_command(photos, tmp_path, command, old):
    "From a file to a run: architecture, weights, statistics; stopped and resumed without the file"
    args = (photos,'--n-in',1,'--init',old,'--epochs',2,'--bs',16,'--every',5,'--num-workers',0,'--device','cpu',
            *small[:1],*small[2:])
    assert command('pretrain', *args, '--out', tmp_path/'whole')[0]==0
    saved = json.loads((tmp_path/'whole'/'settings.json').read_text())
    assert saved['args']['arch']=='resnet18' and saved['recipe']['encoder']['channels']==[8,8,16,16]
    stats = encoder_settings(tmp_path/'whole'/'encoder.safetensors')['stats']
    torch.testing.assert_close(torch.tensor(stats), torch.tensor([[.3],[.25]]))
    class Stop(runs.EpochHistory):
        order,name = runs.EpochHistory.order,'epoch_history'
        def before_backward(self):
            if self.train_iter==25: self.learn.resume_training.stop()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(runs, 'EpochHistory', Stop)
        code,said,_ = command('pretrain', *args, '--out', tmp_path/'cut')
    assert code!=0 and 'tensors taken, none missing' in said
    (old/'encoder.safetensors').unlink()
    code,said,err = command('pretrain', photos, '--out', tmp_path/'cut', '--resume')
    assert code==0, err
    a,b = (load_encoder(tmp_path/o/'encoder.safetensors').state_dict() for o in ('whole','cut'))
    for k in a: assert torch.equal(a[k], b[k]), k

@pytest.mark.slow
def test_timm_of_the_command(tmp_path, command, published):
    "No preset of a small network, the weights' size in the file, and no download when resumed"
    args = 'digits','--init','timm','--arch','test_resnet','--epochs',1,'--size',16,'--bs',256,'--device','cpu'
    settings = 'crop_sizes=(32,16)','num_crops=2,1','hidden_size=16','n_protos=16','bf16=False'
    code,said,err = command('pretrain', *args, '--out', tmp_path/'run', '--set', *settings)
    assert code==0 and 'trained weights: images of ' in said, err
    assert encoder_settings(tmp_path/'run'/'encoder.safetensors')['size']==32
    n = len(published)
    assert command('pretrain', 'digits', '--out', tmp_path/'run', '--resume', '--extend', 1)[0]==0
    assert len(published)==n

def test_init_of_the_command_refused(tmp_path, command, old):
    for args,match in ((['--arch','resnet34'],"arch must be 'resnet18'"),
                       (['--n-in','3'],'images must have 1 channels'),
                       (['--set','encoder.layers=2,2,2,2'],'has layers=(1, 1, 1, 1)')):
        code,_,err = command('pretrain', 'digits', '--init', old, '--out', tmp_path/'run', *args)
        assert code==2 and match in err and not (tmp_path/'run').exists()
    code,_,err = command('pretrain', 'digits', '--init', tmp_path/'none', '--out', tmp_path/'run')
    assert code==2 and "init must be 'timm', a run, or a file" in err

# --- does it pay? -----------------------------------------------------------------------------------------------------
@pytest.fixture
def continued(threads_back):
    sys.path.insert(0, str(Path(__file__).parent.parent/'benchmarks'))
    import continued
    return continued

def test_gains_are_over_the_same_seed(continued, tmp_path):
    "From pieces on disk: a mean over seeds, and what each seed gains over its own start from scratch"
    s = continued.quick['digits']
    def put(name, key, **r): (tmp_path/f'{name}.json').write_text(json.dumps(dict(r, key=key), default=list))
    for seed,(a,b) in enumerate([(.5,.6),(.7,.75)]):
        for arm,v in (('from scratch',a), ('continued',b)):
            put(f'{arm}-1-{seed}'.replace(' ', '-'), continued.key_of(s, seed, arm=arm, given=continued.arms[arm],
                                                                      target_epochs=1), knn=v, probe=v, few=v, cpu=2.)
    text = continued.main(['--quick','--table','--out',str(tmp_path)])
    assert not [o for o in text.splitlines()[4:] if o]  # nothing in the folder of quick runs
    rows = table_of(continued.report(tmp_path, s, 3))
    assert rows['from scratch'][1]=='60.0 ± 14.1' and rows['from scratch'][-1]=='2'
    assert rows['continued'][1]=='67.5 ± 10.6 (+7.5, 2 of 2)'  # the mean of 10 and 5 points

@pytest.mark.slow
def test_benchmark_runs_and_does_nothing_twice(continued, tmp_path, monkeypatch):
    text = continued.main(['--quick','--seeds','1','--out',str(tmp_path)])
    rows = table_of(text)
    assert {'untrained encoder','Fashion-MNIST, not continued',*continued.arms}<=rows.keys()
    monkeypatch.setattr(continued, 'fit', None)
    assert continued.main(['--quick','--seeds','1','--out',str(tmp_path)])==text
