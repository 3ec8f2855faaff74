"""Commands among several processes: they write once, end together, go on together; a rank that is lost is named.

The ranks are forked from a server that has imported everything once, and find each other as `torchrun` lets them. What
`torchrun` itself does (`--gpus`, restarts) is at the end, and slow."""
import json, os, shlex, signal, socket, subprocess, sys, time
from pathlib import Path
import multiprocessing as mp, pytest, torch, yaml
import torch.distributed as dist
from fastai.callback.core import Callback
from helpers import tiny_run as tiny, words_for
from sandbox import python_path
from test_distributed import ranks_learner, run_ranks
from torch.distributed.run import get_args_parser
from self_supervised_swav import cli, report, runs
from self_supervised_swav.checkpoints import save_encoder
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.prepare import prepare_shards
from self_supervised_swav.ranks import check_rank_device

os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')  # as the command does before it imports torch
ctx = mp.get_context('forkserver')
ctx.set_forkserver_preload(['self_supervised_swav.all', 'self_supervised_swav.distributed', 'self_supervised_swav.runs',
                            'self_supervised_swav.compare', 'self_supervised_swav.embed', 'helpers'])
docs = Path(__file__).resolve().parent.parent/'docs'

# --- ranks ------------------------------------------------------------------------------------------------------------
def _free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def _rank(rank, size, port, folder, argv, before):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
                      MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), OMP_NUM_THREADS='1')
    for fd,name in ((1,'out'), (2,'err')): os.dup2(os.open(f'{folder}/{rank}.{name}', os.O_WRONLY|os.O_CREAT), fd)
    torch.set_num_threads(1)
    if before: before[0](rank, *before[1:])
    sys.exit(cli.main(argv))

class Ranks:
    "`swav ARGV` on `size` ranks; `argv` may be a list for each"
    def __init__(self, folder, size, argv, before=None):
        self.folder,port = Path(folder)/f'ranks{time.monotonic_ns()}',_free_port()
        self.folder.mkdir(parents=True)
        argvs = argv if isinstance(argv[0], (list,tuple)) else [argv]*size
        argvs = [[*map(str, o), *([] if '--device' in o else ['--device','cpu'])] for o in argvs]
        self.ps = [ctx.Process(target=_rank, args=(r, size, port, self.folder, argvs[r], before)) for r in range(size)]
        for p in self.ps: p.start()

    def end(self, secs=120):
        "Exit codes, and what each has written to stdout and stderr"
        until = time.monotonic()+secs
        for p in self.ps: p.join(max(0, until-time.monotonic()))
        codes = [p.exitcode for p in self.ps]
        for p in self.ps: p.kill()
        return codes,*([(self.folder/f'{r}.{o}').read_text() for r in range(len(self.ps))] for o in ('out','err'))

def on_ranks(*args, **kwargs): return Ranks(*args, **kwargs).end()

def at_step(step, f):
    "Let `f` be called in training step `step` of this process"
    def before_backward(self):
        if self.train_iter==step and self.training: f()
    runs.TimeLeft.before_backward = before_backward

def _signal(rank, which, step, num):
    if rank==which: at_step(step, lambda: os.kill(os.getpid(), num))
def _no_report(rank): runs.PretrainRun._finish = lambda self: None
def _no_pictures(rank): report._figure = words_for
def _hang(rank, which, step):
    if rank==which: at_step(step, lambda: time.sleep(300))
def _raise(rank, which, step):
    def broken(): raise OSError('the disk has gone')
    if rank==which: at_step(step, broken)

# --- pretrain ---------------------------------------------------------------------------------------------------------
def weights(out): return (out/'encoder.safetensors').read_bytes()
def epochs(out): return [l.rsplit(',', 1)[0] for l in (out/'history.csv').read_text().splitlines()]

@pytest.mark.parametrize('numbers', [[1], pytest.param([3,4], marks=pytest.mark.slow)])
def test_pretrain(numbers, photos, tmp_path):
    "One writer; the ranks end together when one is told to; the same number goes on bit for bit, another at an epoch"
    args = ['pretrain',photos,'--bs',32,'--num-workers',0]
    settings,whole,cut = ['--epochs',3,'--every',4,*tiny],tmp_path/'whole',tmp_path/'cut'
    codes,out,err = on_ranks(tmp_path, 2, [*args,*settings,'--out',whole], before=(_no_pictures,))
    assert codes==[0,0], err
    assert '2 processes x 16 images' in out[0] and f'Wrote {whole}' in out[0] and out[1]==err[0]==err[1]==''
    assert {o.name for o in whole.iterdir()}=={'settings.json','encoder.safetensors','last.pth','last.pth.prev',
                                               'history.csv','history.jsonl','report.html'}
    saved = torch.load(whole/'last.pth', weights_only=True)
    assert saved['settings']['processes']==len(saved['places'])==2 and saved['settings']['batch_size']==16
    assert len(saved['callbacks']['recorder']['losses'])==3*9
    # only the second rank gets the signal, in the second of three epochs of 9 batches
    codes,_,err = on_ranks(tmp_path, 2, [*args,*settings,'--out',cut], before=(_signal,1,12,signal.SIGTERM))
    assert codes==[143,143], err
    assert f'continue with: torchrun ... -m self_supervised_swav pretrain {photos} --out {cut} --resume' in err[0]
    assert err[1]=='' and not (cut/'report.html').exists()
    for n in numbers:
        other = tmp_path/f'on{n}'
        subprocess.run(['cp','-r',cut,other], check=True)
        codes,out,err = on_ranks(tmp_path, n, [*args,'--out',other,'--resume'], before=(_no_report,))
        assert codes==[0]*n, err
        n_done = torch.load(cut/'last.pth', weights_only=True)['batch']
        assert (f"going on at epoch 2, batch 0 (written by 2 processes, {n} now; epoch 1, of which {n_done} batches "
                "were done, is left there)") in out[0]
        assert [o.split(',')[0] for o in epochs(other)]==['epoch','0','2']
    codes,out,_ = on_ranks(tmp_path, 2, [*args,'--out',cut,'--resume'], before=(_no_pictures,))
    assert codes==[0,0] and 'going on at epoch 1, batch' in out[0]
    assert weights(cut)==weights(whole) and epochs(cut)==epochs(whole)

@pytest.mark.slow
@pytest.mark.parametrize('stopped', [False,True])
def test_pretrain_on_shards(stopped, photos, tmp_path):
    "Ranks share them, with no image left to validate; a run that was stopped goes on bit for bit"
    prepare_shards(photos, tmp_path/'shards', size=16)
    args = ['pretrain',tmp_path/'shards','--bs',32,'--num-workers',1]
    settings,whole,cut = ['--epochs',1+stopped,'--valid-pct',0,'--every',2,*tiny],tmp_path/'whole',tmp_path/'cut'
    codes,out,err = on_ranks(tmp_path, 2, [*args,*settings,'--out',whole], before=(_no_report,))
    assert codes==[0,0], err
    saved = torch.load(whole/'last.pth', weights_only=True)
    assert len(saved['callbacks']['recorder']['losses'])==(1+stopped)*(360//32)
    if not stopped: return
    codes,_,err = on_ranks(tmp_path, 2, [*args,*settings,'--out',cut], before=(_signal,1,15,signal.SIGTERM))
    assert codes==[143,143], err
    codes,out,_ = on_ranks(tmp_path, 2, [*args,'--out',cut,'--resume'], before=(_no_report,))
    assert codes==[0,0] and 'going on at epoch 1, batch' in out[0]
    assert weights(cut)==weights(whole) and epochs(cut)==epochs(whole)

# --- a rank is lost ---------------------------------------------------------------------------------------------------
short = ['pretrain','digits','--epochs',20,'--every',5,'--no-knn',*tiny]

@pytest.mark.parametrize('which', [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_is_killed(which, tmp_path):
    "The first one holds the store, so without it the other knows only that"
    ps = Ranks(tmp_path, 2, [*short,'--out',tmp_path/'run'], before=(_signal,which,12,signal.SIGKILL))
    ps.ps[which].join(100)
    died = time.monotonic()
    codes,_,err = ps.end(60)
    assert codes[which]==-signal.SIGKILL and codes[1-which]==2 and time.monotonic()-died<60, err
    said = err[1-which].splitlines()
    assert len(said)==1 and (f'rank {which} (' in said[0] and 'is lost' in said[0] if which else 'store' in said[0])
    assert (tmp_path/'run'/'last.pth').exists()

@pytest.mark.slow
def test_a_rank_hangs(tmp_path):
    ps = Ranks(tmp_path, 2, [*short,'--patience',4,'--out',tmp_path/'run'], before=(_hang,1,12))
    codes,_,err = ps.end(60)
    assert codes==[2,2], err
    # `sleep` is not Python's: the frame is that of whoever called it
    assert all('rank 1 (' in o and 'hangs: it has been in <lambda> of test_ranks.py, line' in o for o in err)

def test_a_rank_has_an_error(tmp_path):
    "The others say whose error it is, and not that a connection was closed"
    codes,_,err = on_ranks(tmp_path, 2, [*short,'--out',tmp_path/'run'], before=(_raise,1,12))
    assert codes==[2,2]
    first,again = err[1].strip().splitlines()
    assert first=='rank 1: swav pretrain: error: the disk has gone' and again.endswith('--resume')
    assert 'rank 1 (' in err[0] and 'OSError: ' in err[0] and 'the disk has gone' in err[0]
    assert len(err[0].splitlines())==1

# --- a rank was given something else ----------------------------------------------------------------------------------
@pytest.mark.parametrize('change,said', [
    (lambda p: (p/'0'/'001.png').unlink(missing_ok=True) or (p/'0'/'000.png').unlink(), 'lacks is'),
    (lambda p: (p/'0'/'000.png').write_bytes((p/'1'/'001.png').read_bytes()+b' '), '0/000.png'),
], ids=['a file less','another file'])
def test_a_rank_has_other_images(change, said, photos, tmp_path):
    other = tmp_path/'photos'
    subprocess.run(['cp','-r',photos,other], check=True)
    change(other)
    args = ['--epochs',1,'--out',tmp_path/'run',*tiny]
    codes,_,err = on_ranks(tmp_path, 2, [['pretrain',o,*args] for o in (photos,other)])
    assert codes==[2,2] and err[1]==''
    assert 'all ranks must have the same images: rank 1 has others in' in err[0] and '0/000.png' in err[0]
    assert not (tmp_path/'run').exists()

def test_what_all_ranks_must_agree_on(tmp_path):
    "Arguments; and what is wrong with all is said once"
    args = ['pretrain','digits','--out',tmp_path/'run',*tiny]
    codes,_,err = on_ranks(tmp_path, 2, [[*args,'--seed',r] for r in range(2)])
    assert codes==[2,2] and 'rank 1 (' in err[0] and 'has --seed 1, rank 0 has 0' in err[0] and err[1]==''
    codes,_,err = on_ranks(tmp_path, 2, [*args,'--bs',33])
    assert codes==[2,2] and '--bs must be a multiple of the 2 processes that share it, got 33' in err[0]
    codes,_,err = on_ranks(tmp_path, 2, [*args,'--resume'])
    assert codes==[2,2] and 'no checkpoint in' in err[0] and err[1]==''
    codes,_,err = on_ranks(tmp_path, 2, ['doctor'])
    assert codes==[2,2] and 'must be one of pretrain, embed, evaluate, got doctor' in err[0]

# --- embed and evaluate -----------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp('run')
    torch.manual_seed(0)
    encoder = create_encoder('resnet18', n_in=1, pretrained=False, small_images=True, layers=(1,1,1,1),
                             channels=(8,8,16,16))
    save_encoder(encoder, path/'encoder.safetensors', size=16)
    return path

def _bytes(*paths): return [p.read_bytes() for p in paths]

@pytest.fixture
def one_thread(threads_back):
    "In this process as in the ranks: another number adds up in another order"
    torch.set_num_threads(1)

@pytest.mark.parametrize('more', [[], pytest.param(['--whiten'], marks=pytest.mark.slow)], ids=['', 'whitened'])
def test_embed(more, run, photos, tmp_path, one_thread):
    "The bytes of one process, where the last rank has less, and where there are more ranks than batches"
    args = ['embed',run,photos,'--num-workers',0,'--device','cpu',*more]
    assert cli.main([*map(str, [*args,'--bs',50,'-o',tmp_path/'one.npy'])])==0
    whole = _bytes(tmp_path/'one.npy', tmp_path/'one.csv')
    codes,out,err = on_ranks(tmp_path, 3, [*args,'--bs',50,'-o',tmp_path/'three.npy'])
    assert codes==[0]*3 and 'Wrote 360 features of width' in out[0] and out[1]==out[2]=='', err
    assert _bytes(tmp_path/'three.npy', tmp_path/'three.csv')==whole
    assert cli.main([*map(str, [*args,'--bs',400,'-o',tmp_path/'a.npy'])])==0
    codes,_,err = on_ranks(tmp_path, 2, [*args,'--bs',400,'-o',tmp_path/'b.npy'])
    assert codes==[0,0] and _bytes(tmp_path/'a.npy')==_bytes(tmp_path/'b.npy'), err

@pytest.mark.slow
def test_evaluate(run, photos, tmp_path, one_thread):
    "The figures of one process: features are shared by images, trainings by turns"
    args = ['evaluate',run,photos,'--num-workers',0,'--device','cpu','--labels',5,'--seeds',3,'--epochs',3]
    def read(name): return {k: v for k,v in json.loads((tmp_path/name).read_text()).items() if k!='secs'}
    assert cli.main([*map(str, [*args,'-o',tmp_path/'one.json'])])==0
    codes,out,err = on_ranks(tmp_path, 2, [*args,'-o',tmp_path/'two.json'])
    assert codes==[0,0] and 'accuracy on 72 held-out images' in out[0] and out[1]=='', err
    assert read('one.json')==read('two.json')

def test_another_encoder(run, photos, tmp_path):
    other = tmp_path/'other'
    other.mkdir()
    torch.manual_seed(1)  # the run's has the seed 0
    encoder = create_encoder('resnet18', n_in=1, pretrained=False, small_images=True, layers=(1,1,1,1),
                              channels=(8,8,16,16))
    save_encoder(encoder, other/'encoder.safetensors', size=16)
    codes,_,err = on_ranks(tmp_path, 2, [['embed',o,photos,'-o',tmp_path/'x.npy'] for o in (run,other)])
    assert codes==[2,2] and 'all ranks must have the same encoder: rank 1 (' in err[0]
    assert not (tmp_path/'x.npy').exists()

# --- bytes ------------------------------------------------------------------------------------------------------------
def _count_bytes(rank, size, sizes):
    "What this rank puts into each message of each step: sums, gathered rows, gradients"
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    steps,grads,now = [],[],{'all_reduce': [], 'all_gather': [], 'broadcast': []}
    for name,arg in (('all_reduce',0), ('all_gather',1), ('broadcast',0)):
        def counted(*args, f=getattr(dist, name), name=name, arg=arg, **kwargs):
            if not kwargs.get('async_op'): now[name].append(args[arg].numel()*args[arg].element_size())
            return f(*args, **kwargs)
        setattr(dist, name, counted)
    def hook(state, bucket):
        grads.append(bucket.buffer().numel()*bucket.buffer().element_size())
        return allreduce_hook(state, bucket)
    learn = ranks_learner(sizes, rank, K=24, dtype=torch.float32)
    class Count(Callback):
        order = -100
        def before_train(self): self.learn.model.register_comm_hook(None, hook)
        def before_batch(self):
            for o in (*now.values(),grads): o.clear()
        def after_step(self): steps.append({k: list(v) for k,v in now.items()} | dict(gradients=sum(grads)))
    learn.add_cb(Count())
    with learn.distrib_ctx(sync_bn=False): learn.fit(1)
    return steps,sum(p.numel() for p in learn.model.parameters() if p.requires_grad)

@pytest.mark.parametrize('sizes', [[6,6],[2,3,3]], ids=str)
def test_bytes_of_a_step(sizes, tmp_path):
    "Sums for the codes: K floats for each crop and iteration, whatever the batch, as in the tutorial on large scale"
    for steps,n_params in run_ranks(_count_bytes, len(sizes), tmp_path, sizes):
        assert len(steps)==48//sum(sizes)
        for s in steps:
            assert s['all_reduce']==[4*12]*(2*3)  # 12 prototypes, 2 assigned crops, 3 iterations
            # two looks at 3 numbers in float64, the second one at the loss; rows of the longest part, 2 crops, 8 wide;
            # and the loss, which the `Watch` of these tests asks for
            assert sorted(s['all_gather'])==sorted([3*8,3*8,4*2*max(sizes)*8,4])
            assert s['broadcast']==[] and s['gradients']==4*n_params

# --- files for clusters -----------------------------------------------------------------------------------------------
def test_files_for_clusters():
    "They are those that the page shows, and their commands are understood"
    page = (docs/'several-gpus.md').read_text()
    slurm,k8s = ((docs/'cluster'/o).read_text() for o in ('slurm.sh','pytorchjob.yaml'))
    assert f'```bash\n{slurm}```' in page and f'```yaml\n{k8s}```' in page
    subprocess.run(['bash','-n',docs/'cluster'/'slurm.sh'], check=True)
    worker = yaml.safe_load(k8s)['spec']['pytorchReplicaSpecs']['Worker']['template']['spec']['containers'][0]
    job = [*worker['command'],*worker['args']]
    line = next(o for o in slurm.replace('\\\n', '').splitlines() if o.startswith('srun')).rstrip('& ')
    line = line.replace('$SLURM_NNODES', '4').replace(' "${RESUME[@]}"', ' --resume')
    parser = get_args_parser()
    for words in (job[1:], shlex.split(line)[3:]):
        # the page says that older versions do not know it
        if '--shutdown-timeout' not in parser.format_usage(): words.remove('--shutdown-timeout=120')
        args = parser.parse_args(words)
        assert args.module and args.training_script=='self_supervised_swav'
        given = cli.create_parser('pretrain').parse_args(args.training_script_args)
        assert given.bs==4096 and given.num_workers==7

# --- GPUs, without any -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize('device,n_gpus,fits', [(None,1,False), ('cuda',1,False), ('cuda',2,True), ('cpu',1,True),
                                                (None,0,True)])
def test_a_gpu_for_each_rank(monkeypatch, device, n_gpus, fits):
    "Else nccl would say: duplicate GPU"
    for k,v in dict(RANK='0', WORLD_SIZE='2', LOCAL_WORLD_SIZE='2').items(): monkeypatch.setenv(k, v)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: n_gpus>0)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: n_gpus)
    if fits: return check_rank_device(device)
    with pytest.raises(ValueError, match=r"device must be 'cpu' for 2 processes on a machine with 1 GPU\(s\)"):
        check_rank_device(device)

def test_more_processes_than_the_processor_can_share(command, photos, tmp_path):
    code,_,err = command('pretrain', photos, '--gpus', 4000, '--device', 'cpu', '--out', tmp_path/'run')
    assert code==2 and '--gpus must be at most' in err and 'without a GPU, got 4000' in err

# --- torchrun itself --------------------------------------------------------------------------------------------------
def _swav(*args, **kwargs):
    env = os.environ|dict(OMP_NUM_THREADS='1', PYTHONPATH=python_path(docs.parent))
    return subprocess.Popen([sys.executable, '-u', '-m', 'self_supervised_swav', *map(str, args)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)

def _when(ready, p):
    while not ready():
        assert p.poll() is None, p.communicate()
        time.sleep(.05)

def _written(path):
    "When; 0 between the moments in which the old file is renamed and the new one is there"
    try: return path.stat().st_mtime
    except FileNotFoundError: return 0

def _children(pid):
    "Processes that `pid` has started"
    found = subprocess.run(['ps','--ppid',str(pid),'-o','pid='], capture_output=True, text=True).stdout.split()
    return [int(o) for o in found]

@pytest.mark.slow
def test_gpus(photos, tmp_path):
    "`--gpus 2`: a killed rank, a restart from the checkpoint, Ctrl-C, and the end"
    out,args = tmp_path/'run',['pretrain',photos,'--bs',32,'--num-workers',0,'--gpus',2]
    p = _swav(*args, '--out', out, '--epochs', 30, '--every', 3, '--max-restarts', 1, '--no-knn', *tiny)
    _when((out/'last.pth').exists, p)
    os.kill(_children(p.pid)[1], signal.SIGKILL)
    _when(lambda: (out/'history.csv').exists() and len((out/'history.csv').read_text().splitlines())>8, p)
    p.send_signal(signal.SIGINT)
    said,err = p.communicate(timeout=100)
    assert p.returncode==130, err
    assert 'no GPU is used: 2 processes share the processor' in err
    assert said.count('the launcher has started this run again')==1 and said.count('going on at epoch')==1
    assert f'continue with: swav pretrain {photos} --out {out} --resume --gpus 2' in err and 'Traceback' not in err
    # nothing is left to restart: the exit code is that of the rank
    p = _swav(*args, '--out', out, '--resume')
    _when(lambda: len(_children(p.pid))==2, p)
    before = _written(out/'last.pth')
    _when(lambda: _written(out/'last.pth')>before, p)
    os.kill(_children(p.pid)[1], signal.SIGKILL)
    _,err = p.communicate(timeout=100)
    assert p.returncode==128+signal.SIGKILL and 'was ended by SIGKILL' in err and 'rank 1 (' in err, err

@pytest.mark.slow
@pytest.mark.parametrize('method', ['simclr','mocov1','mocov2','deepclusterv2'])
def test_other_methods(method, photos, tmp_path):
    "Each method stops and goes on among ranks, bit for bit"
    small = [o for o in tiny if not o.startswith('num_crops' if method=='deepclusterv2' else ('num_crops','n_protos'))]
    args = ['pretrain',photos,'--method',method,'--bs',32,'--num-workers',0]
    settings = ['--epochs',3,'--every',4,'--no-knn',*small]
    codes,_,err = on_ranks(tmp_path, 2, [*args,*settings,'--out',tmp_path/'whole'], before=(_no_report,))
    assert codes==[0,0], err
    codes,_,err = on_ranks(tmp_path, 2, [*args,*settings,'--out',tmp_path/'cut'], before=(_signal,1,13,signal.SIGINT))
    assert codes==[130,130], err
    codes,_,err = on_ranks(tmp_path, 2, [*args,'--out',tmp_path/'cut','--resume'], before=(_no_report,))
    assert codes==[0,0], err
    assert weights(tmp_path/'cut')==weights(tmp_path/'whole') and epochs(tmp_path/'cut')==epochs(tmp_path/'whole')

def _freeze(rank, which, step):
    if rank==which: at_step(step, lambda: os.kill(os.getpid(), signal.SIGSTOP))

@pytest.mark.slow
def test_a_rank_is_frozen(tmp_path):
    "It says nothing any more: within a minute the others end"
    ps = Ranks(tmp_path, 2, [*short,'--out',tmp_path/'run'], before=(_freeze,1,12))
    ps.ps[0].join(100)
    codes,_,err = ps.end(1)
    assert codes==[2,None] and 'rank 1 (' in err[0] and 'is lost: no word from it for 3' in err[0]
