"""Commands among several processes: they write once, end together, go on together; a rank that is lost is named.

The ranks are forked from a server that has imported everything once, and find each other as `torchrun` lets them. What
`torchrun` itself does (`--gpus`, restarts) is at the end, and slow."""
import os, signal, socket, subprocess, sys, time
from pathlib import Path
import multiprocessing as mp, pytest, torch
from PIL import Image
from sklearn.datasets import load_digits
from self_supervised_swav import cli, runs

os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')  # as the command does before it imports torch
ctx = mp.get_context('forkserver')
ctx.set_forkserver_preload(['self_supervised_swav.all', 'self_supervised_swav.distributed', 'self_supervised_swav.runs',
                            'self_supervised_swav.compare', 'self_supervised_swav.embed', 'helpers'])
tiny = ['--set', 'encoder.channels=8,8,16,16', 'hidden_size=16', 'n_protos=16', 'num_crops=2,1', 'bf16=False']

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
def _hang(rank, which, step):
    if rank==which: at_step(step, lambda: time.sleep(300))
def _raise(rank, which, step):
    def broken(): raise OSError('the disk has gone')
    if rank==which: at_step(step, broken)

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Two kinds of digits in a folder each"
    path = tmp_path_factory.mktemp('photos')
    for i,(x,y) in enumerate(zip(*load_digits(n_class=2, return_X_y=True))):
        (path/f'{y}').mkdir(exist_ok=True)
        Image.fromarray((x.reshape(8,8)*255/16).astype('uint8')).resize((16,16)).save(path/f'{y}'/f'{i:03}.png')
    return path

# --- pretrain ---------------------------------------------------------------------------------------------------------
def weights(out): return (out/'encoder.safetensors').read_bytes()
def epochs(out): return [l.rsplit(',', 1)[0] for l in (out/'history.csv').read_text().splitlines()]

@pytest.mark.parametrize('numbers', [[1], pytest.param([3,4], marks=pytest.mark.slow)])
def test_pretrain(numbers, photos, tmp_path):
    "One writer; the ranks end together when one is told to; the same number goes on bit for bit, another at an epoch"
    args = ['pretrain',photos,'--bs',32,'--num-workers',0]
    settings,whole,cut = ['--epochs',3,'--every',4,*tiny],tmp_path/'whole',tmp_path/'cut'
    codes,out,err = on_ranks(tmp_path, 2, [*args,*settings,'--out',whole])
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
    codes,out,_ = on_ranks(tmp_path, 2, [*args,'--out',cut,'--resume'])
    assert codes==[0,0] and 'going on at epoch 1, batch' in out[0]
    assert weights(cut)==weights(whole) and epochs(cut)==epochs(whole)

# --- a rank is lost ---------------------------------------------------------------------------------------------------
short = ['pretrain','digits','--epochs',20,'--every',5,'--no-knn',*tiny]

@pytest.mark.parametrize('which', [0,1])
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
    assert err[1].strip()=='rank 1: swav pretrain: error: the disk has gone'
    assert 'rank 1 (' in err[0] and 'OSError: ' in err[0] and 'the disk has gone' in err[0]
    assert all(len(o.splitlines())==1 for o in err)

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
