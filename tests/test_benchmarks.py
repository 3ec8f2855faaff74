"The benchmarks' harness on tiny sizes: its figures mean what they say."
import json, sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from fastai.vision.core import imagenet_stats
from helpers import rounding

folder = Path(__file__).parent.parent/'benchmarks'
sys.path.insert(0, str(folder))
import clock, collapse, harness, kernels, load, methods, quality, selection, steps
import run as bench

pytestmark = pytest.mark.usefixtures('threads_back')
tiny = dict(arch='resnet18', bs=4, num_crops=(2,1), crop_sizes=(32,24))

def test_race_alternates_and_gives_seconds_of_one_call(monkeypatch):
    now,calls = [0.],[]
    def wait(name, s):
        calls.append(name)
        now[0] += s
    # a clock that the load of the machine does not touch
    monkeypatch.setattr(harness, 'time', SimpleNamespace(perf_counter=lambda: now[0]))
    times = harness.race(dict(a=lambda: wait('a', .02), b=lambda: wait('b', .08)), rounds=3, least=.05)
    assert times==pytest.approx(dict(a=.02, b=.08))
    assert ''.join(calls).endswith('aaabaaabaaab')  # three calls of `a` make the least seconds of a round

def test_exponent():
    assert harness.exponent((1,2,4,8), [3*n**1.5 for n in (1,2,4,8)])==pytest.approx(1.5)

def _fill(n, small=False):
    "A function that holds `n` MB for a moment"
    return lambda: torch.ones((1 if small else n)*2**18).sum()

@pytest.mark.slow
def test_peak_memory():
    # a measure that counted the inputs, or the libraries, or nothing, would be 80 MB off; the libraries' own buffers
    # are a few
    assert harness.peak_memory(_fill, 80)/2**20==pytest.approx(80, abs=20)

def test_ratio_says_how_many_times_as_long_the_peer_takes():
    row = harness.Row.of_times('x', '1', {'this package': .002, 'peer': .007}, 'peer')
    assert (row.ours,row.theirs,row.ratio)==('2 ms','7 ms','3.5x')

def test_contestants_compute_the_same():
    fs = kernels.sinkhorn_contestants(40, 20)
    # exp(score/.05): a rounded argument of up to 20 counts as 20 roundings; then three iterations of sums over 40 rows
    # and 20 columns
    close = partial(torch.testing.assert_close, atol=rounding(torch.float32, 20+3*(40+20)), rtol=0)
    for k in ('without `out`','lightly'): close(fs['this package'](), fs[k]())
    ours,theirs = (f() for f in kernels.loss_contestants(4, 8, 20).values())
    # scores/.1 are up to 10, in sums over 20 prototypes, then 8 rows and 4 crops
    for a,b in zip(ours, theirs): torch.testing.assert_close(a, b, atol=rounding(torch.float32, 10+20+8+4, 10.), rtol=0)

@pytest.mark.parametrize('N,K', [(6,None),(6,40)])
def test_contrastive_contestants_compute_the_same(N, K):
    fs = kernels.contrastive_contestants(N, K, dim=8)
    # logits up to 1/.1 = 10, sums of up to 40 terms and dot products of 8; the gradient divides by temp again. Once
    # each: lightly's memory bank moves on with every call
    for a,b in zip(*(f() for f in fs.values())):
        torch.testing.assert_close(a, b, atol=rounding(torch.float32, 60, 100.), rtol=0)

def test_momentum_contestants_move_alike():
    ours,*others = kernels.momentum_contestants('resnet18', m=.9).values()
    model,(net,*_) = ours.func.__self__,others[0].args
    with torch.no_grad():
        for p in net.parameters(): p.add_(1.)
    for f in (ours,*others): f()
    for f in others:
        for a,b in zip([*model.key_encoder.parameters(), *model.key_projector.parameters()], f.args[1].parameters()):
            # four roundings, of a product each and of their sum
            torch.testing.assert_close(a, b, atol=rounding(torch.float32, 4, 1+b.abs().max().item()), rtol=0)

def test_share_of_a_step():
    for method in ('simclr','mocov2'):
        row, = steps.share_rows(method, 1, 1, arch='resnet18', bs=4, num_crops=(2,), crop_sizes=(32,))
        assert 0<float(row.ours.strip('%'))<100 and 'loss' in row.peer

def test_parts_of_a_step():
    from multicrop import batch, photographs
    times = steps.our_step(images=batch(photographs(4)), **tiny)(2)
    assert set(times)=={'step',*steps.needed,*steps.extras}
    assert 0<sum(v for k,v in times.items() if k!='step')<times['step']

@pytest.mark.slow
def test_table_and_readme(tmp_path):
    rows = [*kernels.sinkhorn_rows(((8,30),), 1), *kernels.loss_rows(((3,8,30),), 1),
            *kernels.growth_rows((16,8), 2, 1), *steps.step_rows(1, 1, **tiny),
            *steps.epoch_rows(8, 4, 1, force=True)]
    lines = harness.table(rows).splitlines()
    assert len(lines)==2+len(rows) and len({len(o) for o in lines})==1
    readme = tmp_path/'README.md'
    readme.write_text((folder/'README.md').read_text())
    for _ in range(2): harness.write(readme, rows, 'cpu', 61)
    text = readme.read_text()
    assert text.count('## The last full run')==1 and text.endswith(lines[-1]+'\n') and text.startswith('# Benchmarks')
    # those of a GPU are kept apart
    harness.write(readme, rows, 'cuda', 61)
    head,rest = readme.read_text().split(harness.gpu_markers[0])
    gpu,tail = rest.split(harness.gpu_markers[1])
    assert lines[-1] in gpu and 'H100' not in gpu and text.startswith(head) and text.endswith(tail)

def test_command_refuses_to_keep_part_of_a_run(capsys):
    for args in (['--quick','--write'], ['--only','loss','--write'], ['--only','nothing']):
        with pytest.raises(SystemExit): bench.main(args)

@pytest.fixture(scope='module')
def quick_run(tmp_path_factory):
    out = tmp_path_factory.mktemp('quality')
    return out,quality.main(['--quick','--seeds','1','--out',str(out)])

@pytest.mark.slow
def test_quality_gives_a_table_of_all_arms(quick_run):
    out,text = quick_run
    rows = [o for o in text.splitlines() if o.startswith('|')]
    assert [r.split('|')[1].strip().split(',')[0] for r in rows[2:]]==list(quality.arms)
    assert len({r.count('|') for r in rows})==1
    assert "seed 0: lightly's last 20-NN accuracy" in text
    runs = [json.loads((out/'quick'/f'{a}-0.json').read_text()) for a in ('this-package','lightly')]
    for r in runs:
        assert len(r['epochs'])==1 and 0<r['epochs'][0]['wall']<=r['wall']<r['piece_wall']
        assert r['epochs'][0]['knn']==r['knn']
    same = ('epochs','bs','channels','data','seed')
    assert [runs[0]['key'][k] for k in same]==[runs[1]['key'][k] for k in same]

@pytest.mark.slow
def test_quality_does_nothing_twice_and_again_what_has_changed(quick_run, monkeypatch):
    out,text = quick_run
    monkeypatch.setattr(quality, 'arms', dict.fromkeys(quality.arms))   # nothing can be pretrained any more
    again = ['--quick','--seeds','1','--out',str(out)]
    assert quality.main(again)==text and quality.main([*again,'--table'])==text
    with pytest.raises(TypeError): quality.main([*again,'--epochs','2'])
    # and what was done with other settings does not count
    assert quality.main([*again,'--epochs','2','--table']).count('\n')==1

def test_arms_have_the_same_encoder():
    s = quality.quick
    learn = quality.swav_learner(quality.get_dls(s, 0), 'resnet18',
                                 encoder=dict(layers=quality.arch['layers'], channels=s['channels']))
    assert str(learn.model.encoder)==str(quality.new_encoder(s, 0))
    assert sum(p.numel() for p in quality.new_encoder(quality.full, 0).parameters())<2e6

# --- accuracy for time ---
@pytest.mark.slow
def test_clock_gives_a_row_for_each_arm_once(tmp_path, monkeypatch):
    again = ['--quick','--seeds','0','--out',str(tmp_path)]
    text = clock.main(again)
    rows = [o.split('|')[1].strip() for o in text.splitlines() if o.startswith('|')]
    arms = [*clock.baselines, *(f'{o}, 0.004 x' for o in clock.arms)]
    assert rows[:-6]==2*['features','---',*arms]  # with all labels, with few
    others = [o for o in (*clock.baselines, *clock.arms) if o!='this package']
    assert rows[-6:]==['this package is ahead of','---',*others] and text.rstrip(' |')[-6:] in ('0 of 1','1 of 1')
    for p in tmp_path.glob('quick/*-0.004-0.json'):
        r = json.loads(p.read_text())
        assert 0<len(r['points'])<=4 and r['points'][-1]['cpu']<=r['cpu'] and r['epochs']>0
        assert r['seconds']==1 and r['machine'][0] in text
    monkeypatch.setattr(clock, 'Watch', None)  # nothing can be trained any more
    for p in tmp_path.glob('quick/*.safetensors'): p.unlink()  # weights stay on the machine of a training
    assert clock.main(again)==clock.main([*again,'--table'])==text
    fig = clock.curve(tmp_path/'quick', 'digits', clock.quick['digits'], 1, [.004])
    assert [o.get_label() for o in fig.axes[0].lines]==list(clock.arms)
    readme = tmp_path/'README.md'
    readme.write_text('Before\n\n<!-- clock, digits: written by `python benchmarks/clock.py --write` -->\n'
                      '<!-- clock, digits: end -->\n\nAfter\n')
    monkeypatch.setattr(clock, 'here', tmp_path)
    clock.keep('digits', text, fig)
    assert (tmp_path/'clock-digits.png').exists() and readme.read_text().startswith('Before')
    assert '(clock-digits.png)' in readme.read_text() and text.split('\n\n')[-1] in readme.read_text()
    next(tmp_path.glob('quick/*simclr*-test.json')).unlink()  # to be measured again, by weights that are not here
    with pytest.raises(TypeError): clock.main(again)

def test_tables_of_more_measurements_stay(tmp_path, monkeypatch, capsys):
    "The pieces of a data set may have been made on a machine that is gone"
    def tables(*seeds):
        rows = '\n'.join(f'| an arm | 81.{i} | {n} |' for i,n in enumerate(seeds))
        return f'digits\n\n{rows}\n\n| 10 labels | 75.2 |'
    readme = tmp_path/'README.md'
    readme.write_text('<!-- clock, digits: written by `python benchmarks/clock.py --write` -->\n'
                      '<!-- clock, digits: end -->\n')
    monkeypatch.setattr(clock, 'here', tmp_path)
    for seeds,kept in ((1,3),True),((3,),False),((2,2),True):
        before = readme.read_text()
        clock.keep('digits', tables(*seeds), clock.plt.figure())
        assert (tables(*seeds)[8:] in readme.read_text())==kept and (readme.read_text()!=before)==kept
        assert capsys.readouterr().out==('' if kept else
                                         'digits: not written, README.md has 4 measurements and these are 3\n')

def test_a_watch_ends_after_its_time_and_keeps_the_best(monkeypatch):
    "Each look at the clock takes a quarter of a second; the second of four measurements is the best"
    now,found = iter(range(100)),iter([.5,.8,.6,.7])
    monkeypatch.setattr(clock.Watch, 'cpu_now', lambda _: next(now)/4)
    monkeypatch.setattr(clock, 'features', lambda *_: None)
    monkeypatch.setattr(clock, 'among', lambda _: next(found))
    encoder = torch.nn.Linear(1, 1)
    watch = clock.Watch(encoder, None, None, seconds=4)
    watch.start()
    for n in range(1, 50):
        with torch.no_grad(): encoder.weight.fill_(len(watch.points))
        if watch.step(): break
    assert [o['among'] for o in watch.points]==[.5,.8,.6,.7]
    assert [o['cpu'] for o in watch.points]==pytest.approx([1.25,2.25,3.25,4.25])  # one more look each
    assert watch.best[0]==.8 and watch.best[1]['weight'].item()==1

def test_an_encoder_reads_images_normalized():
    seen = []
    class Encoder(torch.nn.Module):
        def forward(self, x): return seen.append(x) or x.flatten(1)
    white = torch.utils.data.DataLoader(torch.ones(4, 3, 16, 16), batch_size=4)
    clock.features(Encoder(), white, clock.datasets['clip art'])
    mean,std = (torch.tensor(o).view(-1, 1, 1) for o in imagenet_stats)
    torch.testing.assert_close(seen[0], ((1-mean)/std).expand(4, 3, 16, 16))

def test_few_of_classes_that_have_fewer():
    y = torch.tensor([0]*5+[1]*2+[2]*9)
    idxs = clock.few_idxs(y, 4, 0)
    assert y[idxs].bincount().tolist()==[4,2,4] and len(set(idxs.tolist()))==10

def test_version_sees_what_code_does_and_not_what_it_says():
    def f(): return 1
    one = quality.version(f)
    def f():
        "Says more"
        return 1  # and more
    assert quality.version(f)==one
    def f(): return 2
    assert quality.version(f)!=one

def test_quality_table_goes_between_its_markers(tmp_path):
    readme = tmp_path/'README.md'
    readme.write_text((folder/'README.md').read_text())
    for o in ('one','two'): quality.write(readme, o)
    text,before = readme.read_text(),(folder/'README.md').read_text()
    assert 'two' in text.split(quality.begin)[1].split(quality.end)[0]
    assert text.count(quality.begin)==text.count(quality.end)==1
    assert text.split(quality.begin)[0]==before.split(quality.begin)[0]
    assert text.split(quality.end)[1]==before.split(quality.end)[1]

def test_collapse_tells_runs_that_learn_from_those_that_do_not():
    r = dict(alarms=0, last=.8, untrained=.7, trained=.75)
    assert not collapse.collapsed(r) and not collapse.collapsed(r|dict(untrained=float('nan'), trained=float('nan')))
    for bad in (dict(alarms=1), dict(last=.96), dict(trained=.65)): assert collapse.collapsed(r|bad)

@pytest.mark.slow
def test_collapse_runs_a_data_set():
    r, = collapse.main(['--seeds','1','--only','digits','--epochs','1'])
    # an epoch from random weights: the loss is still near ln K, and the accuracy of 10 classes is anything but 0 or 1
    assert r['steps']==19 and .5<r['last']<1.2 and 0<r['trained']<1

# --- the methods ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def methods_run(tmp_path_factory):
    out = tmp_path_factory.mktemp('methods')
    return out,methods.main(['--quick','--seeds','1','--out',str(out)])

@pytest.mark.slow
def test_methods_gives_a_row_for_each(methods_run):
    out,text = methods_run
    first,second = text.split('\n\n')
    rows = [o.split('|') for o in first.splitlines()]
    assert [r[1].strip() for r in rows[2:]]==['untrained encoder',*methods.arms]
    assert all(0<float(c)<=100 for r in rows[2:] for c in r[3:6]) and len({len(r) for r in rows})==1
    assert all(c in second for c,*_ in methods.claims)
    run = json.loads((out/'quick'/'SimCLR-64-0.json').read_text())
    assert 0<run['cpu']<run['piece_cpu'] and run['key']['recipe']['simclr']['temp']==.1
    same = [json.loads(o.read_text())['key'] for o in (out/'quick').glob('*-64-0.json')]
    assert len(same)==len(methods.arms)
    for k in ('epochs','channels','data','valid_pct','seed'): assert len({str(o[k]) for o in same})==1

@pytest.mark.slow
def test_methods_does_nothing_twice(methods_run, monkeypatch):
    out,text = methods_run
    monkeypatch.setattr(methods, 'training', None)  # nothing can be pretrained any more
    again = ['--quick','--seeds','1','--out',str(out)]
    assert methods.main(again)==text and methods.main([*again,'--table'])==text
    with pytest.raises(TypeError): methods.main([*again,'--epochs','2'])

def test_arms_of_methods_differ_in_what_they_say():
    given = {a: methods.differences(a, methods.full, 32, 1257)[1] for a,(_,c) in methods.arms.items() if c is not None}
    assert given['SwAV, two crops']['num_crops']==(2,) and given['SwAV, hard codes']['hard']
    assert given['SimCLR, multi-crop']['num_crops']==given['SwAV']['num_crops']==(2,4)

def test_difference_is_of_seeds():
    pairs = [(dict(knn=.9),dict(knn=.8)), (dict(knn=.7),dict(knn=.72))]
    assert methods.difference(pairs, 'knn')=='+4.0 (1 of 2)'

@pytest.mark.slow
def test_methods_memory_of_a_step():
    # embeddings, gradients and activations of 32 images of 16 px in a network of 20,000 numbers: a few megabytes
    assert 0<methods.peak_memory(methods.few_steps, 'SimCLR', dict(methods.quick, valid_pct=.3), 32)/2**20<200

def test_methods_tables_go_between_their_markers(tmp_path):
    readme = tmp_path/'README.md'
    readme.write_text((folder/'README.md').read_text())
    for o in ('one','two'): methods.write(readme, o)
    text,before = readme.read_text(),(folder/'README.md').read_text()
    assert 'two' in text.split(methods.begin)[1].split(methods.end)[0]
    assert text.split(methods.begin)[0]==before.split(methods.begin)[0]
    assert text.split(methods.end)[1]==before.split(methods.end)[1]

# --- many images ---
@pytest.mark.slow
def test_load_measures_each_piece_once(tmp_path, monkeypatch):
    again = ['--quick','--out',str(tmp_path)]
    text = load.main(again)
    rows = [[c.strip() for c in o.split('|')] for o in text.splitlines()[2:]]
    assert [r[1] for r in rows]==['prepare small','epoch folder','epoch shards','search','embed','prepare photos',
                                  'photos folder','photos shards','train, one process','train, 4 processes']
    assert rows[0][2]=='300 images' and rows[1][2]==rows[2][2]=='256 of 300 images' and rows[4][2]=='300 images'
    assert rows[-1][2]=='9 steps of 32 images'
    monkeypatch.setattr(load, 'apart', None)  # nothing can be measured any more
    monkeypatch.setattr(load.subprocess, 'Popen', None)
    assert load.main(again)==text

# --- which images to label ---
@pytest.mark.slow
def test_selection_gives_a_row_for_each_size_once(tmp_path, monkeypatch):
    again = ['--quick','--out',str(tmp_path)]
    text = selection.main(again)
    rows = [[c.strip() for c in o.split('|')] for o in text.splitlines()[2:]]
    assert [r[1:3] for r in rows[2:]]==[['probe','10'],['probe','20'],['fine-tuned','10']]
    assert len({len(r) for r in rows})==1 and all(0<float(c)<=100 for r in rows[2:] for c in r[3:6])
    monkeypatch.setattr(selection, 'swav_learner', None)  # nothing can be pretrained any more
    assert selection.main(again)==text==selection.main([*again,'--table'])

def test_selection_measures_on_other_images():
    "A draw chooses from half of the training images; the test images are none of them"
    s = selection.quick['digits']
    assert [len(dl.dataset.x) for dl in selection.get_dls('digits', s)]==[1258,539]
    x = torch.randn(40, 4)
    for method in selection.methods:
        idxs = selection.chosen(x, 5, method, 1).tolist()
        assert len(set(idxs))==5 and set(idxs)<=set(selection.pool_of(40, 1).tolist())
    assert len(selection.pool_of(40, 1))==20 and selection.pool_of(40, 1).tolist()!=selection.pool_of(40, 2).tolist()

def test_selection_says_what_is_clear():
    # ten differences of 1 ± 0.47 points: Student's 2.26 times 0.47/sqrt(10) is 0.34
    d = [.01+.0045*(-1)**i for i in range(10)]
    m,ci = selection.mean_ci(d)
    assert m==pytest.approx(1.) and ci==pytest.approx(2.262*.4743/10**.5, rel=1e-3)
    assert selection.verdict(d)=='better' and selection.verdict([-o for o in d])=='worse'
    assert selection.verdict([o-.01 for o in d])=='not clear' and selection.verdict(d[:2])==''

def test_selection_tables_go_between_their_markers(tmp_path):
    readme = tmp_path/'README.md'
    before = (folder/'README.md').read_text()
    readme.write_text(before)
    for o in ('one','two'): selection.write(readme, o)
    text = readme.read_text()
    assert text.split(selection.begin)[1].split(selection.end)[0].strip()=='two'
    assert text.split(selection.begin)[0]==before.split(selection.begin)[0]
    assert text.split(selection.end)[1]==before.split(selection.end)[1]
