"What an encoder starts from, and whether it became better than that: several encoders beside each other."
import json, re
import pytest, torch
from fastai.data.core import DataLoaders
from fastai.vision.augment import Normalize
from hypothesis import given, strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from helpers import digits, small_encoder, small_learner
from self_supervised_swav import compare
from self_supervised_swav.checkpoints import save_encoder
from self_supervised_swav.compare import AsTrained, compare_encoders, evaluate_run, mean_ci, percent, points
from self_supervised_swav.data import digits_dls
from self_supervised_swav.evaluate import extract_features, few_label_idxs, knn_accuracy, linear_probe
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
def runs(tmp_path):
    "Two runs and a file: gray of 16 px, color of 12 px with statistics, and a copy"
    for name,n_in,more in (('old',1,dict(size=16)), ('new',3,dict(size=12, stats=[[.5]*3,[.5]*3])),
                           ('third',1,dict(size=16))):
        (tmp_path/name).mkdir()
        torch.manual_seed(n_in)
        save_encoder(small_encoder(n_in), tmp_path/name/'encoder.safetensors', **more)
    (tmp_path/'third'/'encoder.safetensors').rename(tmp_path/'copy.safetensors')
    return tmp_path

def test_command(runs, command):
    args = runs/'old',runs/'new',runs/'copy.safetensors','digits','--labels',4,'--seeds',3,'--epochs',0,'-o',
    code,said,err = command('evaluate', *args, runs/'all.json', '--device', 'cpu')
    assert code==0, err
    res = json.loads((runs/'all.json').read_text())
    assert res['encoders']==['old','new','copy'] and f'Wrote {runs}/all.json' in said
    assert res['accuracy']['k-NN, old']==res['accuracy']['k-NN, copy']!=res['accuracy']['k-NN, new']
    assert {'k-NN, untrained, like old and copy','k-NN, untrained, like new','k-NN whitened, raw pixels'}<=set(
        res['accuracy'])
    assert '| points more than old |' in said and 'new beside old: of 3 differences' in said
    assert not (runs/'old'/'evaluation.json').exists()
    # each alone gives the same
    alone = evaluate_run(runs/'new', 'digits', labels=['4'], seeds=3, epochs=0, device='cpu')
    assert alone['accuracy']['k-NN, pretrained encoder']==res['accuracy']['k-NN, new']
    assert (runs/'new'/'evaluation.json').exists() and not alone.gains

def test_one_run_with_options_between(runs, command):
    code,said,err = command('evaluate', runs/'old', '--labels', 2, '--seeds', 1, '--epochs', 0, 'digits')
    assert code==0 and 'linear probe, pretrained encoder' in said, err

@pytest.mark.parametrize('args,match', [
    (['old','old','digits'], 'run must be different runs'), (['old','none','digits'], 'no encoder at'),
    (['old','new','nowhere'], 'source must be a folder'), (['old','digits','-o','x.csv'], '--out must be a file that')])
def test_command_refused(runs, command, args, match, monkeypatch):
    monkeypatch.chdir(runs)
    code,said,err = command('evaluate', *args)
    assert code==2 and match in err and 'Traceback' not in err
    assert not list(runs.glob('*.json'))

def test_same_names_and_other_splits(runs, monkeypatch):
    "Runs of the same name are told apart; one that held out other images has seen some of these"
    (runs/'b'/'old').mkdir(parents=True)
    save_encoder(small_encoder(), runs/'b'/'old'/'encoder.safetensors', size=16)
    monkeypatch.chdir(runs)
    for folder,seed in (('old',42),('b/old',7)):
        (runs/folder/'settings.json').write_text(json.dumps(dict(args=dict(source='digits', seed=seed, valid_pct=.3,
                                                                           n_images=None))))
    with pytest.warns(UserWarning, match='not held out in the pretraining of b/old:'):
        res = evaluate_run(['old','b/old'], 'digits', labels=['2'], seeds=1, epochs=0, device='cpu')
    assert res['encoders']==['old','b/old'] and res['n_valid']==539  # 30 % of 1797, as in the first
    dls = digits_dls(16, valid_pct=.3, seed=42, device='cpu')
    assert res['accuracy']['largest class']['all']==[dls.valid_ds.y.bincount().max().item()/539]
    assert compare.Evaluation(res).gains==res.gains
