"The commands: what they write, what they refuse and with which exit code, and that a stopped run goes on bit for bit"
import json, os, signal, subprocess, sys, time, warnings
from pathlib import Path
import numpy as np, pyarrow.parquet as pq, pytest, torch
from PIL import Image
from fastai.data.core import TfmdDL

from self_supervised_swav import cli, compare, embed, resume, runs
from self_supervised_swav.checkpoints import load_encoder, load_whitening, save_encoder
from self_supervised_swav.data import digits_dls, no_targets
from self_supervised_swav.evaluate import extract_features, few_label_idxs, knn_accuracy, linear_probe
from self_supervised_swav.whitening import Whitening
from helpers import small_encoder, small_learner, tiny_run as tiny
from sandbox import python_path

root = Path(__file__).resolve().parent.parent

def start(*args):
    "`swav ARGS` as a process of its own"
    return subprocess.Popen([sys.executable, '-u', '-m', 'self_supervised_swav', *map(str, args)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, 'PYTHONPATH': python_path(root)})

def test_help():
    "A page that names the commands; a page for each with defaults; all without waiting for torch"
    code = "import sys; from self_supervised_swav.cli import main; " \
           "sys.addaudithook(lambda e, a: e=='import' and a[0]=='torch' and sys.exit('torch')); main(sys.argv[1:])"
    def out(*args):
        res = subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True,
                             env={**os.environ, 'PYTHONPATH': python_path(root)})
        assert res.returncode==0, res.stderr
        return ' '.join(res.stdout.split())
    for o in ('pretrain Pretrain an encoder on images without labels','evaluate','embed','Exit codes: 0 done; 2'):
        assert o in out('--help')
    for o in ('(default: 64)','--resume','(default: 42)','--set NAME=VALUE','Leave out the k-NN accuracy'):
        assert o in out('pretrain', '--help')
    for o in ('(default: 1% 10%)','(default: 5)'): assert o in out('evaluate', '--help')
    # Python 3.13 writes the value once
    assert any(o in out('embed', '--help') for o in ('-o FILE, --out FILE', '-o, --out FILE'))
    assert all(o in out('--version') for o in ('Python 3','torch 2','fastai 2'))

def test_old_names(tmp_path, monkeypatch, capsys):
    "`swav-embed` says what to write instead, and works"
    monkeypatch.setattr(sys, 'argv', ['swav-embed','no run',str(tmp_path)])
    with pytest.raises(SystemExit) as e: cli.swav_embed()
    assert e.value.code==2
    old,err = capsys.readouterr().err.splitlines()
    assert old=='swav-embed is deprecated: use `swav embed`' and err.startswith('swav embed: error: no encoder at')

@pytest.mark.parametrize('args', [(), ('pretrain',), ('train','digits'), ('pretrain','digits','--epoch-count','3')])
def test_usage(args, command):
    "What the parser does not understand ends with code 2 and the usage"
    code,said,err = command(*args)
    assert code==2 and said=='' and err.startswith('usage: swav')

def test_stopped_runs_go_on(photos, tmp_path, command, monkeypatch):
    "Ctrl-C, then SIGTERM, then to the end: the same bytes as without"
    args = [photos,'--epochs',3,'--bs',12,'--every',7,'--num-workers',0,*tiny]
    whole,out = tmp_path/'whole',tmp_path/'cut'
    code,said,_ = command('pretrain', *args, '--out', whole)
    assert code==0 and 'swav.eps' in said and 'Wrote' in said
    assert {o.name for o in whole.iterdir()}>={'settings.json','encoder.safetensors','last.pth','history.csv',
                                               'report.html'}
    p = start('pretrain', *args, '--out', out)
    while not ((f := out/'history.csv').exists() and len(f.read_text().splitlines())>=2):
        assert p.poll() is None, p.communicate()
        time.sleep(.02)
    p.send_signal(signal.SIGINT)
    _,err = p.communicate(timeout=60)
    assert p.returncode==130 and f'continue with: swav pretrain {photos} --out {out} --resume' in err
    assert 'Traceback' not in err
    class Terminated(runs.EpochHistory):
        order,name = runs.EpochHistory.order,'epoch_history'
        def before_backward(self):
            if self.train_iter==60: os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as m:
        m.setattr(runs, 'EpochHistory', Terminated)
        code,_,err = command('pretrain', photos, '--out', out, '--resume')
    assert code==143 and 'continue with' in err
    assert load_encoder(out/'encoder.safetensors')(torch.zeros(2,1,16,16)).isfinite().all()
    assert not (out/'report.html').exists()
    code,said,_ = command('pretrain', photos, '--out', out, '--resume')
    assert code==0 and 'going on at epoch' in said
    assert (out/'encoder.safetensors').read_bytes()==(whole/'encoder.safetensors').read_bytes()
    a,b = ([l.rsplit(',', 1)[0] for l in (o/'history.csv').read_text().splitlines()] for o in (out,whole))
    assert a==b and len(a)==4
    code,_,err = command('pretrain', *args, '--out', out)
    assert code==2 and 'holds a run already' in err
    code,_,err = command('pretrain', photos, '--bs', 32, '--out', out, '--resume')
    assert code==2 and 'bs is 12' in err
    before = (out/'last.pth').read_bytes()
    # finished
    assert command('pretrain', photos, '--out', out, '--resume')[0]==0 and (out/'last.pth').read_bytes()==before

@pytest.mark.parametrize('method,title', [
    ('simclr','SimCLR'), *(pytest.param(*o, marks=pytest.mark.slow) for o in
                           (('mocov1','MoCo'), ('mocov2','MoCo'), ('deepclusterv2','DeepCluster-v2')))])
def test_another_method(method, title, tmp_path, command):
    drop = ('num_crops',) if method=='deepclusterv2' else ('n_protos','num_crops')
    code,said,err = command('pretrain', 'digits', '--method', method, '--epochs', 1, '--out', tmp_path/'run',
                             *(o for o in tiny if not o.startswith(drop)))
    assert code==0 and f'{method}.temp' in said, err
    assert f'{title}: digits' in (tmp_path/'run'/'report.html').read_text()

def test_a_finished_run_is_extended(photos, tmp_path, command, monkeypatch):
    "More epochs, also when they are interrupted; a larger --epochs says which option does it"
    out = tmp_path/'run'
    go = lambda *args: command('pretrain', photos, '--out', out, *args)
    lines = lambda: (out/'history.csv').read_text().splitlines()[1:]
    code,_,err = command('pretrain', 'digits', '--extend', 1)
    assert code==2 and '--extend needs --resume' in err
    assert go('--epochs', 1, '--num-workers', 0, *tiny)[0]==0
    first = lines()
    code,_,err = go('--resume', '--epochs', 3)
    assert code==2 and '--epochs is 1 in' in err and 'It is finished: --extend 2 adds epochs' in err
    class Terminated(runs.TimeLeft):
        name = 'time_left'
        def before_batch(self):
            if self.epoch==2: os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as m:
        m.setattr(runs, 'TimeLeft', Terminated)
        code,said,err = go('--resume', '--extend', 2)
    assert code==143 and err.splitlines()[-1].endswith('--resume') and len(lines())==2
    assert 'The finished 1 epochs go on with 2 more: the learning rate rises and falls once more' in said
    code,_,err = go('--resume', '--extend', 2)
    assert code==2 and '--extend is for a finished run, but' in err and 'at epoch 2 of 3' in err
    assert go('--resume')[0]==0 and lines()[0]==first[0] and len(lines())==3
    assert [o['to'] for o in json.loads((out/'settings.json').read_text())['extended']]==[3]
    saved = torch.load(out/'last.pth', weights_only=True)
    assert saved['finished'] and saved['settings']['n_epoch']==3

@pytest.mark.parametrize('args', [
    ['--set','eps=-1'], ['--arch','resnet_18'], ['--method','dino'], ['--set','n_proto=3'], ['--device','foo'],
    ['--set','encoder.layer=3'], ['--set','hidden_size=0']])
def test_arguments_are_checked_before_the_images(args, photos, command, monkeypatch, tmp_path):
    def scan(*_): raise AssertionError('images were read')
    monkeypatch.setattr(runs, 'ImageSource', scan)
    monkeypatch.setattr(scan, 'own', (), raising=False)
    code,_,err = command('pretrain', photos, '--out', tmp_path/'run', *args)
    assert code==2 and len(err.splitlines())==1

def test_device(command, photos, tmp_path):
    for args in (['pretrain',photos], ['embed','run',photos], ['evaluate','run',photos]):
        for device in ('foo','meta','cpu:x'):
            code,_,err = command(*args, '--device', device)
            assert code==2 and err.startswith(f'swav {args[0]}: error: --device must be one of this machine (cpu')
            assert err.endswith(f"got '{device}'\n") and len(err.splitlines())==1

def test_messages_are_in_the_words_of_the_command_line():
    said = cli.in_options("K=9 is too much. Try n_protos=4 (now 8); bs=32; lr=0.1. Or skip_bad=True", cli.PretrainArgs)
    assert said=="K=9 is too much. Try --set n_protos=4 (now 8); --bs 32; --set lr=0.1. Or --skip-bad"

def test_links_out_of_a_folder(command, tmp_path):
    "Every command that reads images of a folder takes what they lead to, where it is told to"
    for i in range(8):
        path = tmp_path/('photos' if i<4 else 'elsewhere')/f'{i}.png'
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((16,16), 60).save(path)
    (tmp_path/'photos'/'link').symlink_to(tmp_path/'elsewhere')
    (tmp_path/'run').mkdir()
    save_encoder(small_encoder(), tmp_path/'run'/'encoder.safetensors', size=16)
    (tmp_path/'labels.csv').write_text('file,class\n'+''.join(f'{i}.png,{"ab"[i%2]}\n' for i in range(4)))
    here = '--device','cpu','--num-workers',0
    code,_,err = command('finetune', tmp_path/'run', tmp_path/'labels.csv', '--folder', tmp_path/'photos', '--method',
                         'probe', '--folds', 2, '-o', tmp_path/'classifier', *here)
    assert code==0, err
    for name,out in dict(embed='x.csv', sort='sorted', explore='map.html', select='s.csv', label='label.html',
                         predict='p.csv').items():
        run = tmp_path/('classifier' if name=='predict' else 'run')
        more = ['--projection','pca'] if name=='explore' else []
        code,_,err = command(name, run, tmp_path/'photos', '-o', tmp_path/out, *more, *here, '--follow-links')
        assert code==0, err
        written = [*(tmp_path/out).rglob('*.csv')] if name=='sort' else [tmp_path/out]
        assert all(f'link/{i}.png' in written[0].read_text() for i in range(4, 8)), name
    code,_,err = command('select', tmp_path/'run', tmp_path/'photos', '--labels', tmp_path/'labels.csv', *here)
    assert code==2 and '--labels must leave an image without a class' in err  # the four without those of the links

def test_values_that_are_not_finite(command, tmp_path):
    "One line, without fastai's words about the callback"
    code,_,err = command('pretrain', 'digits', '--epochs', 1, '--out', tmp_path/'run', *tiny, 'lr=1e30')
    assert code==2 and 'not finite in batch' in err and 'Exception occured' not in err and len(err.splitlines())==1
    kept = tmp_path/'run'/'nan_batch.pt'
    assert err.endswith(f'Its batch is kept: swav replay {kept}\n')
    code,said,_ = command('replay', kept)
    assert code==0 and said.startswith('not finite, in this order: ')
    state = torch.load(kept, weights_only=True)
    assert len(state['images'])==64 and [o.shape[-1] for o in state['crops']]==[16,16,10]
    # a batch that is not finite itself is the first that is named; one that is finite is said to be so
    good = command('pretrain', 'digits', '--epochs', 1, '--out', tmp_path/'good', *tiny)[0]
    model = torch.load(tmp_path/'good'/'last.pth', weights_only=True)['model']
    torch.save(state | dict(model=model), tmp_path/'fine.pt')
    assert good==0 and command('replay', tmp_path/'fine.pt')[1]=='everything is finite on this machine\n'
    state['crops'][1][0,0,0,0] = torch.nan
    torch.save(state | dict(model=model), tmp_path/'nan.pt')
    assert command('replay', tmp_path/'nan.pt')[1].startswith('not finite, in this order: crop 1, output of encoder.')
    assert command('replay', tmp_path/'good'/'last.pth')[0]==command('replay', tmp_path/'none.pt')[0]==2

def test_reasons(tmp_path):
    "What was given says so, what was not does not"
    settings = [o for o in tiny[1:]]
    run = runs.PretrainRun('digits', tmp_path/'a', epochs=2, settings=settings)
    reasons = run.learn.recipe.reasons
    assert run.epochs==run.learn.recipe['fit']['n_epoch']==2 and reasons['fit.n_epoch']=='given'
    assert not reasons['dls.bs'].startswith('given')
    run = runs.PretrainRun('digits', tmp_path/'a', settings=settings)
    assert run.epochs==run.learn.recipe['fit']['n_epoch']>2 and run.learn.recipe.reasons['fit.n_epoch']!='given'

def test_config_and_log(tmp_path, command):
    "The settings of a run make the same run again, but for what is given; TensorBoard gets what the table has"
    events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    a,b = tmp_path/'a',tmp_path/'b'
    assert command('pretrain', 'digits', '--epochs', 1, '--out', a, '--log', 'tensorboard', *tiny)[0]==0
    code,said,err = command('pretrain', 'digits', '--config', a/'settings.json', '--out', b)
    assert code==0 and f'from {a}/settings.json' in said, err
    assert (a/'encoder.safetensors').read_bytes()==(b/'encoder.safetensors').read_bytes()
    saved,again = (json.loads((o/'settings.json').read_text()) for o in (a,b))
    assert saved['args']==again['args'] and saved['recipe']==again['recipe']
    run = runs.PretrainRun('digits', tmp_path/'c', config=str(a), epochs=3, bs=16, settings=['eps=.07'])
    assert run.learn.recipe['dls']['bs']==16 and run.learn.recipe.reasons['dls.bs']=='given'
    assert run.epochs==3 and run.learn.swav.eps==.07 and len(run.learn.model.prototypes.weight)==16
    timed,_ = runs.configured(cli.PretrainArgs('digits', config=str(a), hours=.5))
    assert timed.hours==.5 and timed.epochs is None and timed.settings==again['args']['settings']
    names,values = (l.split(',') for l in (a/'history.csv').read_text().splitlines())
    record, = map(json.loads, (a/'history.jsonl').read_text().splitlines())
    assert list(record)==[*names,'data_wait'] and [str(record[o]) for o in names]==values and 0<=record['data_wait']<1
    events = events.EventAccumulator(str(a/'tensorboard')).Reload()
    for o in names[1:-1]: assert events.Scalars(f'epoch/{o}')[0].value==pytest.approx(record[o], rel=1e-6)  # float32
    assert [o.step for o in events.Scalars('step/loss')]==list(range(1, 23))

@pytest.mark.parametrize('args,match', [
    (['--log','wandb'], '--log wandb needs the package wandb: pip install wandb'),
    (['--log','foo'], '--log must be one of'),
    (['--config','junk.json'], '--config must be the settings.json of a run, got junk.json'),
    (['--config','missing.json'], 'No such file')])
def test_config_and_log_refused(tmp_path, command, monkeypatch, args, match):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, 'wandb', None)
    (tmp_path/'junk.json').write_text('{"args": 3}')
    code,_,err = command('pretrain', 'digits', '--out', 'run', *args)
    assert code==2 and match in err and len(err.splitlines())==1 and not (tmp_path/'run').exists()

class FakeTool:
    "A stand-in for wandb, trackio and mlflow, by the calls that their documentation names"
    def __init__(self): self.calls,self.values = [],[]
    def init(self, project, name, config):
        self.calls.append((project,name))
        return self
    def log(self, values, step): self.values.append((step,values))
    def finish(self): self.calls.append('end')
    def set_experiment(self, name): self.calls.append(name)
    def start_run(self, run_name): self.calls.append(run_name)
    def log_params(self, params): assert params['source']=='digits'
    def log_metrics(self, values, step): self.log(values, step)
    end_run = finish

@pytest.mark.parametrize('name', ['wandb','trackio','mlflow'])
def test_other_loggers(tmp_path, monkeypatch, name):
    tool = FakeTool()
    monkeypatch.setitem(sys.modules, name, tool)
    learn = small_learner(n=40, cbs=[runs.RunLogger(name, tmp_path/'run', config=dict(source='digits'))])
    learn.fit(2)
    assert tool.calls[-1]=='end' and 'run' in str(tool.calls[:-1])
    n = len(learn.recorder.losses)
    assert [o for o,values in tool.values if 'step/loss' in values]==list(range(1, n+1))
    assert [values['epoch/train_loss'] for o,values in tool.values if 'epoch/train_loss' in values]==\
        [float(o[0]) for o in learn.recorder.values]

def test_waiting_for_images_is_told(tmp_path, monkeypatch):
    "Once, from a fifth of the time; by a clock that images and steps move on"
    clock = [0.]
    monkeypatch.setattr(resume.time, 'perf_counter', lambda: clock[0])
    class Slow:
        def __init__(self, x, secs): self.x,self.secs = x,secs
        def __len__(self): return len(self.x)
        def __getitem__(self, i):
            clock[0] += self.secs
            return self.x[i],
    class Step(runs.Callback):
        def after_batch(self): clock[0] += self.training
    def fit(secs):
        x = torch.rand(26, 1, 16, 16)
        dls = runs.DataLoaders(*(TfmdDL(Slow(x, secs), bs=2, num_workers=0) for _ in range(2)), device='cpu')
        learn = small_learner(dls=dls, cbs=[runs.ResumeTraining(tmp_path/f'{secs}.pth'), runs.TellDataWait(), Step()],
                              learner=dict(loss_func=no_targets))
        learn.fit(2)
        return learn.resume_training.data_wait
    with pytest.warns(UserWarning, match='4[678]% of the training time is spent waiting for images') as w:
        # of 13 batches the first is not counted, its step is; an item may be loaded ahead
        assert 11/(11+13)<=fit(.5)<=12/(12+13)
    assert len([o for o in w if 'waiting' in str(o.message)])==1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert 1.1/(1.1+13)<=fit(.05)<=1.2/(1.2+13)+1e-9

def test_hours_and_batch_size(tmp_path, monkeypatch, capsys):
    "As many epochs as fit into the time; a batch that grows as long as it pays and fits"
    monkeypatch.setattr(runs, 'secs_per_step', lambda learn: 2.)
    kwargs = dict(knn=False, settings=tiny[1:])
    run = runs.PretrainRun('digits', tmp_path/'a', hours=1., **kwargs)
    n,steps = run.epochs,22+6/2  # 1,438 and 359 images in batches of 64; validation has no backward pass
    assert n*steps*2+20<=3600<(n+1)*steps*2+20+.05*3600 and not (tmp_path/'a').exists()
    assert run.learn.recipe.reasons['fit.n_epoch']=='1 h, at 2 s a step as measured' and run.args.epochs==n
    with pytest.raises(ValueError, match='hours must be at least 0.02.* for one epoch on this machine, got 0.01'):
        runs.PretrainRun('digits', tmp_path/'a', hours=.01, **kwargs)
    with pytest.raises(ValueError, match='hours must be positive, got 0'): runs.epochs_in(run.learn, 0)
    secs = {32: 1., 64: 1.5, 128: 2.4, 256: 4.7}
    monkeypatch.setattr(runs, 'secs_per_step', lambda learn: secs[learn.dls.train.bs])
    assert runs.PretrainRun('digits', tmp_path/'a', bs='auto', **kwargs).learn.dls.train.bs==128  # 53 to 54 an s
    def full(learn):
        if learn.dls.train.bs>64: raise torch.OutOfMemoryError('full')
        return 1.
    monkeypatch.setattr(runs, 'secs_per_step', full)
    run = runs.PretrainRun('digits', tmp_path/'a', bs='auto', **kwargs)
    assert run.args.bs==run.learn.dls.train.bs==64 and 'bs 64' in capsys.readouterr().out
    same = runs.PretrainRun('digits', tmp_path/'a', bs=64, **kwargs)  # measuring changes nothing
    for a,b in zip(run.learn.model.parameters(), same.learn.model.parameters()): assert torch.equal(a, b)

def test_hours_and_batch_size_refused(command):
    for args,match in ((['--hours','0'],'--hours must be positive, got 0.0'),
                       (['--bs','few'],"invalid int_or_auto value"),
                       (['--hours','1','--epochs','3'],'--hours 1.0 and --epochs 3 cannot be given both')):
        code,_,err = command('pretrain', 'digits', *args)
        assert code==2 and match in err
    code,_,err = command('embed', 'run', 'photos', '--bs', 'auto')
    assert code==2 and "--bs must be a whole number, at least 1, got 'auto'" in err

def test_time_of_a_step(monkeypatch):
    learn,clock = small_learner(n=100),[0.]
    class Tick(runs.Callback):
        def before_batch(self): clock[0] += 3 if self.training else 100
    learn.add_cb(Tick())
    monkeypatch.setattr(runs.time, 'monotonic', lambda: clock[0])
    assert runs.secs_per_step(learn, 3)==3

def test_time_left(capsys, monkeypatch):
    "Of the whole fit, from the time of the steps that were done"
    learn,clock = small_learner(n=100, cbs=[runs.TimeLeft(after=2.)]),[0.]
    class Tick(runs.Callback):
        order = runs.TimeLeft.order-1
        def before_batch(self): clock[0] += self.training
    monkeypatch.setattr(runs.time, 'monotonic', lambda: clock[0])
    said = []
    learn.logger = lambda _: said.append(learn.time_left.left)
    learn.fit(3, cbs=Tick())  # 3 epochs of 5 batches, a second each
    assert said==[10.,5.,0.] and '0:00:11 left in all' in capsys.readouterr().out

def test_folders_are_labels_on_request(tmp_path, photos, command):
    "Classes of the same name in several folders are told; chance stands beside the accuracy"
    merged = tmp_path/'photos'
    for i,f in enumerate(sorted(photos.rglob('*.png'))):
        to = merged/('train' if i%4 else 'valid')/('b' if i<100 else 'a')/('0' if i<120 else '1')/f.name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(f.read_bytes())
    args = ['pretrain',merged,'--epochs',1,'--arch','resnet18','--num-workers',0,*tiny,'encoder.layers=1,1,1,1']
    code,said,err = command(*args, '--out', tmp_path/'plain')
    assert code==0 and 'knn_accuracy' not in said
    assert 'no labels to color it by' in (tmp_path/'plain'/'report.html').read_text()
    with pytest.warns(UserWarning, match="1 class of several folders with the same name: '0' is a/0, b/0"):
        code,said,_ = command(*args, '--out', tmp_path/'labels', '--labels-from-folders')
    names,values = (l.split() for l in said.splitlines() if 'knn_accuracy' in l or l.strip().startswith('0  '))
    valid = [f.parent.name for f in (merged/'valid').rglob('*.png')]
    share = max(valid.count(o) for o in '01')/len(valid)
    assert values[names.index('largest_class')]==f'{share:.4f}'
    (tmp_path/'flat').mkdir()
    for f in list(photos.rglob('*.png'))[:20]: (tmp_path/'flat'/f.name).write_bytes(f.read_bytes())
    code,_,err = command('pretrain', tmp_path/'flat', '--out', tmp_path/'no', '--labels-from-folders')
    assert code==2 and 'has no labels' in err and not (tmp_path/'no').exists()

@pytest.mark.parametrize('args,match', [
    (['nowhere'], 'source must be a folder'), (['empty'], 'no image files found in'),
    (['junk'], 'not a readable image'),
    (['junk','--skip-bad'], 'no readable image in'),
    (['digits','--resume'], 'no checkpoint in'), (['digits','--arch','resnet_18'], 'close ones: resnet18'),
    (['digits','--set','n_proto=3'], "did you mean 'n_protos'"),
    (['digits','--set','encoder.layer=3'], "--arch 'resnet18' takes no argument 'layer'"),
    (['digits','--set','eps'], 'name=value'), (['digits','--set','eps=-1'], 'eps must be positive'),
    (['digits','--epochs','0'], '--epochs must be a whole number, at least 1'),
    (['digits','--method','dino'], "must be one of 'swav'"),
    (['digits','--n-in','3'], '--n-in must be 1 for digits'), (['digits','--valid-pct','1.5'], '--valid-pct must be')])
def test_refused(tmp_path, monkeypatch, command, args, match):
    "A line on stderr, exit code 2, and nothing written"
    monkeypatch.chdir(tmp_path)
    for o in ('empty','junk'): (tmp_path/o).mkdir()
    (tmp_path/'junk'/'a.png').write_text('no image')
    code,_,err = command('pretrain', *args, '--out', 'run', *([] if '--set' in args else tiny))
    assert code==2 and match in err and err.startswith('swav pretrain: error: ') and len(err.splitlines())==1, err
    assert not (tmp_path/'run').exists()

def test_bad_files_are_listed(tmp_path, monkeypatch, command):
    "Whole, where the error has room for five"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'junk').mkdir()
    for i in range(7): (tmp_path/'junk'/f'{i}.png').write_text('no image')
    code,_,err = command('pretrain', 'junk', '--out', 'run')
    assert code==2 and 'and 2 more. Pass --skip-bad to leave them out. bad_files.txt lists all of them' in err
    lines = (tmp_path/'bad_files.txt').read_text().splitlines()
    assert [Path(o.split('\t')[0]).name for o in lines]==[f'{i}.png' for i in range(7)]
    (tmp_path/'bad_files.txt').unlink()
    (tmp_path/'bad_files.txt').mkdir()  # it cannot be written
    code,_,err = command('pretrain', 'junk', '--out', 'run')
    assert code==2 and err.rstrip().endswith('to leave them out')

def test_folder_not_writable(tmp_path, command):
    (tmp_path/'file').write_text('mine')
    for out in (tmp_path/'file',tmp_path/'file'/'run'):
        code,_,err = command('pretrain', 'digits', '--out', out)
        assert code==2 and 'cannot be a folder' in err
    (tmp_path/'run').mkdir()
    assert command('pretrain', 'digits', '--out', tmp_path/'run', '--resume')[0]==2
    assert not list((tmp_path/'run').iterdir())

def test_unexpected_errors_keep_their_traceback(monkeypatch, command):
    def broken(*_): raise ValueError('a bug')
    monkeypatch.setattr(runs, 'PretrainRun', broken)
    with pytest.raises(ValueError, match='a bug'): command('pretrain', 'digits')

def test_python_calls_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match='no encoder at'): compare.evaluate_run(tmp_path, 'digits')
    with pytest.raises(TypeError, match='epoch_count'): runs.PretrainRun('digits', tmp_path, epoch_count=3)

def test_failed_run_leaves_nothing(tmp_path, command, monkeypatch):
    "What goes wrong before the first checkpoint"
    monkeypatch.setattr(runs.ResumeTraining, '_begin', lambda self: (_ for _ in ()).throw(RuntimeError('early')))
    with pytest.raises(RuntimeError, match='early'):
        command('pretrain', 'digits', '--epochs', 1, '--out', tmp_path/'run', *tiny)
    assert not (tmp_path/'run').exists()

def test_folder_of_images(tmp_path, photos, command):
    "Size, channels and labels are found; evaluation holds out what pretraining held out"
    out = tmp_path/'run'
    code,said,err = command('pretrain', photos, '--epochs', 1, '--arch', 'resnet18', '--num-workers', 0, '--n-images',
                            200, '--out', out, '--labels-from-folders', *tiny, 'encoder.layers=1,1,1,1')
    assert code==0 and '200 training images of 16 px' in said and 'knn_accuracy' in said, err
    saved = json.loads((out/'settings.json').read_text())
    assert saved['args']['source']==str(photos) and saved['recipe']['encoder']['n_in']==1
    assert load_whitening(out/'encoder.safetensors').in_features==16  # for swav embed --whiten
    code,said,err = command('evaluate', out, photos, '--labels', 3, '--seeds', 2, '--epochs', 0, '--num-workers', 0)
    res = json.loads((out/'evaluation.json').read_text())
    assert code==0 and '| linear probe, pretrained encoder | ' in said and 'scratch' not in said, err
    assert res['n_train']==200 and res['n_valid']==72

def test_evaluation_is_what_it_says(tmp_path):
    "The figures in the table, computed by hand"
    encoder = small_encoder()
    save_encoder(encoder, tmp_path/'encoder.safetensors', size=16)
    res = compare.evaluate_run(tmp_path, 'digits', labels=['4','2%'], seeds=2, epochs=0, device='cpu')
    dls = digits_dls(16, device='cpu')
    train,valid = (extract_features(encoder, dl, progress=False) for dl in dls)
    idxs = few_label_idxs(dls.train_ds.y, 4, seed=1)
    few = train[0][idxs],train[1][idxs]
    acc = res['accuracy']
    assert acc['k-NN, pretrained encoder']['all']==[knn_accuracy(train, valid)]
    assert acc['k-NN, pretrained encoder']['4'][1]==knn_accuracy(few, valid)
    whitening = Whitening.fit(train[0], shrink=2/40**.5)  # by the 40 that vote
    assert acc['k-NN whitened, pretrained encoder']['4'][1]==knn_accuracy(few, valid, whiten=whitening)
    assert acc['k-NN whitened, pretrained encoder']['all']==[knn_accuracy(train, valid, whiten=True)]
    assert acc['linear probe, pretrained encoder']['4'][1]==linear_probe(few, valid).top1
    pixels = (dls.train_ds.x.flatten(1),dls.train_ds.y),(dls.valid_ds.x.flatten(1),dls.valid_ds.y)
    assert acc['k-NN, raw pixels']['all']==[knn_accuracy(*pixels)]
    assert len(set(acc['k-NN, untrained encoder']['all']))==2
    assert [len(o) for o in acc['linear probe, raw pixels'].values()]==[1,2,2]
    assert acc['largest class']['4']==acc['largest class']['all']==[dls.valid_ds.y.bincount().max().item()/359]
    assert json.loads((tmp_path/'evaluation.json').read_text())['accuracy']==acc

def test_mean_ci():
    from scipy.stats import bootstrap
    x = np.random.default_rng(0).normal(.8, .02, 40)
    m,ci = compare.mean_ci(x)
    lo,hi = bootstrap((x,), np.mean, rng=0, n_resamples=2000).confidence_interval
    assert m==x.mean() and (m-ci,m+ci)==pytest.approx((lo,hi), abs=.002)

@pytest.mark.parametrize('source,args,match', [
    ('flat', [], 'has no labels'), ('one', [], 'at least two classes'),
    ('digits', ['--labels','200'], 'n_per_class must be at most'),
    ('digits', ['--labels','x%'], '--labels must be numbers'), ('digits', ['--labels','0%'], '--labels must be'),
    ('digits', ['--seeds','0'], '--seeds must be'),
    ('digits', ['--k','0'], '--k must be a whole number, at least 1')])
def test_evaluation_refused(tmp_path, photos, command, source, args, match):
    for o,there in dict(flat='', one='cats').items():
        (tmp_path/o/there).mkdir(parents=True)
        for p in list((photos/'0').iterdir())[:9]: (tmp_path/o/there/p.name).write_bytes(p.read_bytes())
    save_encoder(small_encoder(), tmp_path/'run'/'encoder.safetensors', size=16)
    code,_,err = command('evaluate', tmp_path/'run', source if source=='digits' else tmp_path/source, '--epochs', 0,
                         '--num-workers', 0, *args)
    assert code==2 and match in err and len(err.splitlines())==1, err
    assert [o.name for o in (tmp_path/'run').iterdir()]==['encoder.safetensors']

def test_features_not_finite(tmp_path, photos, command):
    encoder = small_encoder()
    encoder.conv1.weight.data[0] = torch.nan
    save_encoder(encoder, tmp_path/'encoder.safetensors', size=16)
    for name,args in (('evaluate',['digits']), ('embed',[photos,'-o',tmp_path/'f.npy','--num-workers',0])):
        code,_,err = command(name, tmp_path, *args)
        assert code==2 and 'features not finite' in err
    assert [o.name for o in tmp_path.iterdir()]==['encoder.safetensors']

def test_embed(tmp_path, photos, command):
    encoder = small_encoder()
    save_encoder(encoder, tmp_path/'encoder.safetensors', size=16)
    code,said,err = command('embed', tmp_path, photos, '-o', tmp_path/'f.npy', '--num-workers', 0)
    assert code==0 and '360 features of width 16' in said, err
    names,x = [o.split(',')[0] for o in (tmp_path/'f.csv').read_text().split()[1:]],np.load(tmp_path/'f.npy')
    assert names==sorted(names) and len(names)==len(x)==360
    im = torch.tensor(np.array(Image.open(photos/names[200])))[None,None]/255
    with torch.no_grad(): assert x[200]==pytest.approx(encoder.eval()(im)[0].numpy(), abs=1e-5)
    (tmp_path/'one').mkdir()
    (tmp_path/'one'/'a.png').write_bytes((photos/names[200]).read_bytes())
    assert command('embed', tmp_path, tmp_path/'one', '-o', tmp_path/'one.npy', '--num-workers', 0)[0]==0
    assert np.load(tmp_path/'one.npy')[0]==pytest.approx(x[200], abs=1e-5)

def test_embed_refused(tmp_path, photos, command, monkeypatch):
    save_encoder(small_encoder(), tmp_path/'encoder.safetensors', size=16)
    monkeypatch.setattr(embed, 'find_spec', lambda _: None)
    for out,match in (('f.txt','--out must be a file that ends in .npy, .csv or .parquet'),
                      ('f.parquet','pip install pyarrow')):
        code,_,err = command('embed', tmp_path, photos, '-o', tmp_path/out)
        assert code==2 and match in err
    assert command('embed', tmp_path, tmp_path/'none')[0]==2

def test_parquet(tmp_path, photos, command):
    save_encoder(small_encoder(), tmp_path/'encoder.safetensors', size=16)
    assert command('embed', tmp_path, photos, '-o', tmp_path/'f.parquet', '--num-workers', 0)[0]==0
    t = pq.read_table(tmp_path/'f.parquet').to_pydict()
    assert len(t['file'])==360 and len(t['features'][0])==16
