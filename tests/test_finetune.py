"From labels to a classifier: honest folds, errors that name what is wrong, and the same answers from every file"
import csv, json
from collections import Counter
from pathlib import Path
import numpy as np, pytest, torch
from fastai.learner import load_learner
from hypothesis import given, strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from self_supervised_swav import data, finetune as finetune_module
from self_supervised_swav.args import FinetuneArgs
from self_supervised_swav.checkpoints import load_encoder, save_encoder
from self_supervised_swav.finetune import (_label_folds, count_chosen, finetune_labels, fit_temperature, labeled_files,
                                           predict_images, wilson_interval)
from self_supervised_swav.images import read_image
from self_supervised_swav.select import write_labels
from helpers import small_encoder

kinds = ['=zero','on,e','"two"']  # names that a careless CSV file would break

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Digits of three kinds in a folder, labels of some of them, and an encoder"
    root = tmp_path_factory.mktemp('photos')
    rows = {}
    for i,(x,y) in enumerate(zip(*load_digits(n_class=3, return_X_y=True))):
        if i==75: break
        name = f'=a {i:03}.png' if i%2 else f'b/{i:03}.png'
        (root/'images'/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((x.reshape(8,8)*255/16).astype('uint8')).resize((16,16)).save(root/'images'/name)
        rows[name] = kinds[y]
    write_labels(root/'labels.csv', dict(list(rows.items())[:45]))
    torch.manual_seed(0)
    save_encoder(small_encoder(), root/'encoder.safetensors', size=16)
    return root,rows

quick = dict(device='cpu', num_workers=0, bs=16)

def finetune(photos, out, **kwargs):
    root,_ = photos
    return finetune_labels(root/'encoder.safetensors', root/'labels.csv', out, folder=str(root/'images'), folds=3,
                           **quick|kwargs)

@pytest.mark.parametrize('method', ['probe','spread','finetune','finetune+spread'])
def test_whole_way(photos, tmp_path, method):
    "The accuracy is that of images not learned from; predictions, export and files agree"
    root,rows = photos
    result = finetune(photos, tmp_path/'c', method=method, epochs=2)
    assert list(result.accuracies)==[method] and result.n==45 and result.kept==method and f'{method} ' in str(result)
    lo,hi = result.interval(method)
    assert 0<=lo<=result.accuracies[method]/45<=hi<=1
    counts = predict_images(tmp_path/'c', root/'images', tmp_path/'p.csv', **quick)
    assert sum(counts.values())==75
    with open(tmp_path/'p.csv', newline='', encoding='utf-8') as f: table = list(csv.DictReader(f))
    sure = [float(o['probability']) for o in table]
    assert len(table)==75 and sure==sorted(sure)
    assert not any(c.startswith(('=','+','-','@')) for o in table for c in o.values())
    assert all(abs(sum(float(v) for k,v in o.items() if k.startswith('p('))-1)<=3*5e-5+1e-9 for o in table)  # 4 digits
    # fastai's file gives the same probabilities, read by itself
    learn = load_learner(tmp_path/'c'/'export.pkl')
    name = 'b/000.png'
    probs = learn.predict(root/'images'/name)[2]
    row = next(o for o in table if o['file']==name)
    want = torch.tensor([float(v) for k,v in row.items() if k.startswith('p(')])
    torch.testing.assert_close(probs, want, atol=1e-4+1e-5, rtol=0)  # written with 4 digits
    # the encoder's file is one that everything else reads
    assert load_encoder(tmp_path/'c'/'encoder.safetensors')(torch.rand(2,1,16,16)).shape==(2,16)
    assert json.loads((tmp_path/'c'/'classifier.json').read_text())['classes']==sorted(kinds)

@pytest.mark.parametrize('in_memory', [True,False])
def test_images_are_opened_once(photos, tmp_path, monkeypatch, in_memory):
    "An image is looked at, read for its features, and read once more for all epochs; some are for the export"
    opened = Counter()
    def count(file, *args, **kwargs):
        opened[Path(file).name] += 1
        return read_image(file, *args, **kwargs)
    monkeypatch.setattr(data, 'read_image', count)
    if not in_memory: monkeypatch.setattr(finetune_module, '_max_bytes', 0)
    result = finetune(photos, tmp_path/'c', method='finetune', epochs=4)
    assert result.n==45 and (sorted(opened.values())[len(opened)//2]<=3)==in_memory

def test_large_images_are_shrunk(photos, tmp_path):
    "What is kept of a large image just covers the size of the encoder"
    root,_ = photos
    Image.fromarray(np.zeros((90,60,3), np.uint8)).save(tmp_path/'a.png')
    args = FinetuneArgs(str(root/'encoder.safetensors'), 'labels.csv', out='c', **quick)
    two = finetune_module.LabeledFiles([tmp_path/'a.png', root/'images'/'b'/'000.png'], torch.tensor([0,1]),
                                       np.arange(2), ['a','b'], tmp_path)
    trainer = finetune_module._Trainer(args, two)
    assert not trainer.unlabeled  # there is no other image
    assert [o.size for o in trainer.images]==[(16,24),(16,16)]

def test_better_one_is_kept(photos, tmp_path):
    result = finetune(photos, tmp_path/'c', epochs=2)
    assert list(result.accuracies)==['probe','spread','finetune','finetune+spread']
    assert result.accuracies[result.kept]==max(result.accuracies.values())
    # the accuracy that is told is that of the choice, which no part made for itself
    told = json.loads((tmp_path/'c'/'classifier.json').read_text())
    assert told['accuracy']==result.accuracy==result.chosen/45 and tuple(told['interval'])==result.interval()
    assert 0<=result.chosen<=result.accuracies[result.kept]
    assert f'The classifier: {result.accuracy:.1%}' in str(result)
    assert f"always {result.largest[0]!r}" in str(result) and result.largest[1]>=1/3

def test_images_without_labels(photos, tmp_path, monkeypatch):
    "Those of the folder that have none, readable, no more than asked for; without any there are two ways"
    root,rows = photos
    def others(**kwargs):
        args = FinetuneArgs(str(root/'encoder.safetensors'), 'labels.csv', out='c', **quick|kwargs)
        return finetune_module._Trainer(args, labeled_files(root/'labels.csv', root/'images')).unlabeled
    unlabeled = sorted(root/'images'/n for n in list(rows)[45:])
    assert sorted(others())==unlabeled and len(others(n_unlabeled=7))==7 and set(others(n_unlabeled=7))<set(unlabeled)
    assert others(n_unlabeled=7)==others(n_unlabeled=7)!=others(n_unlabeled=7, seed=1)
    assert others(method='both')==others(method='probe')==others(n_unlabeled=0)==[]
    monkeypatch.setattr(finetune_module, '_max_bytes', 2*16*16*5)
    assert len(others())==5
    monkeypatch.undo()
    bad = root/'images'/'bad.png'
    bad.write_bytes(b'no image')
    with pytest.warns(UserWarning, match='bad.png'): assert sorted(others())==unlabeled
    bad.unlink()
    result = finetune(photos, tmp_path/'c', epochs=2, n_unlabeled=0)
    assert list(result.accuracies)==['probe','finetune']
    with pytest.raises(ValueError, match='images without labels, there are none'):
        finetune(photos, tmp_path/'d', method='spread', n_unlabeled=0)
    assert not (tmp_path/'d').exists()

def test_held_out_images_take_no_part():
    "The features of a labeled image that is tested change nothing in the head"
    gen = torch.Generator().manual_seed(0)
    y = torch.arange(12)%3
    x = 6*torch.eye(4)[torch.arange(60)%3]+torch.randn(60, 4, generator=gen)
    idxs = np.arange(9)
    weight,bias = finetune_module._spread_head(x, y, idxs, 4)
    x[9:12] = 1e6
    other = finetune_module._spread_head(x, y, idxs, 4)
    assert torch.equal(weight, other[0]) and torch.equal(bias, other[1])
    assert bias[3]==-30 and (torch.nn.functional.linear(x[12:], weight, bias).argmax(1)==torch.arange(12, 60)%3).all()

@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=2, max_size=4))
def test_no_part_chooses_for_itself(right):
    "A part is counted with what is best without it, whatever its own answers; so the best of all is never surpassed"
    ways = {str(i): v for i,v in enumerate(right)}
    kept,n = count_chosen(ways)
    assert n<=sum(ways[kept])==max(map(sum, right))
    others = [[v[:i]+v[i+1:] for v in right] for i in range(3)]
    best = [max(range(len(right)), key=lambda w: sum(o[w])) for o in others]
    assert n==sum(right[w][i] for i,w in enumerate(best))
    one = {'a': right[0]}
    assert count_chosen(one)==('a',sum(right[0]))

def test_groups_stay_together():
    "Images that were labeled together are never on both sides"
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 12, 60)
    y = torch.tensor(groups%3)
    folds = _label_folds(y, groups, 3, 0)
    assert sorted(i for _,b in folds for i in b.tolist())==list(range(60))
    for a,b in folds: assert not set(groups[a]) & set(groups[b])

def test_errors(photos, tmp_path):
    root,rows = photos
    def file(labels, **kwargs):
        write_labels(tmp_path/'l.csv', labels, **kwargs)
        return tmp_path/'l.csv'
    names = list(rows)
    with pytest.raises(FileNotFoundError, match=r"1 of 2 files .* such as '\\u003dgone.png'"):
        labeled_files(file({names[0]: 'a', '=gone.png': 'b'}), root/'images')
    with pytest.raises(ValueError, match="at least two classes, got 'a' alone"):
        labeled_files(file({names[0]: 'a', names[1]: 'a'}), root/'images')
    with pytest.raises(ValueError, match='no labels'): labeled_files(file({names[0]: ''}), root/'images')
    with pytest.raises(ValueError, match='at least 2 images .* too few: b'):
        labeled_files(file({names[0]: 'a', names[1]: 'a', names[2]: 'b'}), root/'images')
    with pytest.raises(ValueError, match='too few: a, b'):  # two images, labeled as one
        labeled_files(file({names[0]: 'a', names[1]: 'a', names[2]: 'b'}, groups={names[1]: names[0]}), root/'images')
    with pytest.raises(FileNotFoundError, match='no classifier in'): predict_images(tmp_path/'none', root/'images')
    assert not (tmp_path/'c').exists()

def test_command(photos, tmp_path, command):
    root,_ = photos
    few = ['--bs','16','--num-workers','0','--device','cpu']
    code,said,err = command('finetune', root/'encoder.safetensors', root/'labels.csv', '--folder', root/'images',
                            '--method', 'probe', '--folds', '2', '-o', tmp_path/'c', *few)
    assert code==0 and 'probe' in said and 'swav predict' in said, err
    code,said,err = command('predict', tmp_path/'c', root/'images', '-o', tmp_path/'p.csv', *few)
    assert code==0 and (tmp_path/'p.csv').exists(), err
    code,_,err = command('finetune', root/'encoder.safetensors', root/'labels.csv', '-o', tmp_path/'c', *few)
    assert code==2 and 'holds a classifier already' in err

def test_interval_covers():
    "Of many draws, about 95 % of the intervals hold the true share: 5 standard errors of 2,000 draws"
    rng = np.random.default_rng(0)
    for p,n in ((.5,30), (.9,50), (.97,200)):
        held = [lo<=p<=hi for lo,hi in (wilson_interval(k, n) for k in rng.binomial(n, p, 2000))]
        assert abs(np.mean(held)-.95)<=5*(.05*.95/2000)**.5+.02  # answers are whole numbers: up to 0.02 off
    for bad in ((1,0), (-1,3), (4,3)):
        with pytest.raises(ValueError, match='k must be between 0 and n'): wilson_interval(*bad)

def test_temperature_is_the_best():
    torch.manual_seed(0)
    y = torch.randint(5, (500,))
    s = 4*torch.randn(500, 5) + 6*torch.nn.functional.one_hot(y, 5)
    t = fit_temperature(s, y)
    def nll(t): return torch.nn.functional.cross_entropy(s.double()/t, y)
    assert nll(t)<=min(nll(t*1.1), nll(t/1.1), nll(1.))
