"What goes wrong in the middle of a training: each fault is named, what was written stays, and the run goes on after it"
import errno, os, signal, time
from contextlib import nullcontext
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from helpers import tiny_run
from self_supervised_swav import cli, files
from self_supervised_swav.checkpoints import load_encoder
from self_supervised_swav.data import Skipped, swav_dls

def folder_of(path, n=40):
    path.mkdir()
    for i in range(n):
        x = np.random.default_rng(i).integers(0, 256, (16,16), dtype=np.uint8)
        Image.fromarray(x).save(path/f'{i:02}.png')
    return path

# --- images -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('num_workers', [0,2])
def test_an_image_turns_unreadable(tmp_path, num_workers):
    "Another is taken in its place, counted over all loader processes; an error names it unless that was asked for"
    photos = folder_of(tmp_path/'photos')
    kwargs = dict(size=16, n_in=1, bs=4, valid_pct=0, num_workers=num_workers, device='cpu')
    careful,other = (swav_dls(photos, skip_bad=o, **kwargs) for o in (True,False))
    assert [len(b[0]) for b in careful.train]==[4]*10 and careful.skipped.news() is None and other.skipped is None
    for i in (3,17,18): (photos/f'{i:02}.png').write_bytes(b'gone')
    assert [len(b[0]) for b in careful.train]==[4]*10
    text = careful.skipped.news()
    assert text.startswith('3 images could not be read in this epoch, such as ') and '.png: others were' in text
    assert careful.skipped.news() is None
    with pytest.raises(ValueError, match=r'(03|17|18)\.png is not a readable image'):
        for _ in other.train: pass

def test_all_images_turn_unreadable(tmp_path):
    "Then the last one that was read, before the training, stands for all: the count says so"
    photos = folder_of(tmp_path/'photos', 8)
    dls = swav_dls(photos, size=16, n_in=1, bs=4, valid_pct=0, num_workers=0, device='cpu', skip_bad=True)
    for o in photos.iterdir(): o.write_bytes(b'')
    batches = torch.cat([b[0] for b in dls.train])
    assert torch.equal(batches, batches[:1].expand_as(batches)) and dls.skipped.news().startswith('8 images')

def test_names_of_skipped_images():
    def read(file): raise OSError('gone')
    s = Skipped()
    s.last = 'image'
    assert s.open('a'*3000+'.png', read)=='image' and s.news().count('a')>=900
    assert s.open('b\n\udcff.png', read)=='image'
    assert 'such as b' in s.news() and '\n' not in s.name.numpy().tobytes().decode()

def arguments(photos, out, num_workers=0):
    "Of a run of three epochs; the rest of them are in its settings"
    return 'pretrain', photos, '--out', out, '--device', 'cpu', '--num-workers', num_workers

new_run = ('--bs', 8, '--epochs', 3, '--no-knn', '--every', 2)
def run_of(command, photos, out, num_workers=0, *args):
    return command(*arguments(photos, out, num_workers), *new_run, *args, *tiny_run)

def same_weights(*outs):
    a,b = (load_encoder(o/'encoder.safetensors').state_dict() for o in outs)
    return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# --- disks ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def photos(tmp_path_factory): return folder_of(tmp_path_factory.mktemp('faults')/'photos')

@pytest.fixture(scope='module')
def whole(photos, tmp_path_factory):
    "The run without a fault"
    out = tmp_path_factory.mktemp('whole')/'run'
    assert run_of(lambda *args: cli.main(args), photos, out)==0
    return out

def goes_on(command, photos, out, whole, err):
    "The error says how to go on, and what comes out has the bits of the run without a fault"
    assert 'Traceback' not in err and f'swav pretrain {photos}' in err and '--resume' in err, err
    code,_,err = command(*arguments(photos, out), '--resume')
    assert code==0, err
    assert same_weights(out, whole)

@pytest.mark.parametrize('kind,n_good', [
    ('ENOSPC',1), ('EROFS',3), *(pytest.param(*o, marks=pytest.mark.slow) for o in
                                 (('ENOSPC',3), ('ENOSPC',6), ('EROFS',1), ('EROFS',6), ('EDQUOT',3)))])
def test_a_disk_fails(command, photos, whole, tmp_path, monkeypatch, kind, n_good):
    "A disk that is full, or turns read-only, after some checkpoints"
    out,left,flush = tmp_path/'run',n_good,files._flush
    def failing(path, flags):
        nonlocal left
        left -= Path(path).name=='last.pth.tmp'
        if left<0: raise OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))
        flush(path, flags)
    with monkeypatch.context() as m:
        m.setattr(files, '_flush', failing)
        code,_,err = run_of(command, photos, out)
    assert code==2 and os.strerror(getattr(errno, kind)) in err and 'last.pth' in err, err
    assert (out/'last.pth').exists() and not list(out.glob('*.tmp'))
    goes_on(command, photos, out, whole, err)

@pytest.mark.parametrize('every', [2,None])
def test_a_disk_has_no_room_for_a_checkpoint(command, photos, tmp_path, monkeypatch, every):
    "The first one fails: that is the error, and nothing is left but an encoder that was written before it"
    out,flush = tmp_path/'run',files._flush
    def failing(path, flags):
        if Path(path).name=='last.pth.tmp': raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(path, flags)
    monkeypatch.setattr(files, '_flush', failing)
    every = ['--every', every] if every else []
    code,_,err = command(*arguments(photos, out), '--bs', 8, '--epochs', 3, '--no-knn', *every, *tiny_run)
    assert code==2 and os.strerror(errno.ENOSPC) in err and 'last.pth' in err and 'Traceback' not in err, err
    if every: assert not out.exists()
    else:
        assert sorted(o.name for o in out.iterdir())==['encoder.safetensors']
        load_encoder(out/'encoder.safetensors')

# --- loaders, clock, Ctrl-C -------------------------------------------------------------------------------------------
def test_a_loader_dies(command, photos, whole, tmp_path, monkeypatch):
    "Killed by the system, for example for its memory"
    from self_supervised_swav import data
    out,read = tmp_path/'run',data.read_image
    def deadly(o, *args, **kwargs):
        if torch.utils.data.get_worker_info() and (out/'last.pth').exists(): os.kill(os.getpid(), signal.SIGKILL)
        return read(o, *args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(data, 'read_image', deadly)
        code,_,err = run_of(command, photos, out, 1)
    assert code==2 and "a process that loads images was ended by the system" in err, err
    assert 'Traceback' not in err and '--resume' in err, err
    code,_,err = command('pretrain', photos, '--out', out, '--device', 'cpu', '--resume')
    assert code==0, err

@pytest.mark.parametrize('num_workers,skip', [(0,True), (1,False), *(pytest.param(*o, marks=pytest.mark.slow)
                                                                     for o in ((0,False), (1,True)))])
def test_an_image_is_gone_in_the_middle(command, photos, whole, tmp_path, monkeypatch, num_workers, skip):
    "It is named, and the run goes on when it is back; or skipped, and counted"
    from self_supervised_swav import data
    out,read = tmp_path/'run',data.read_image
    def gone(o, *args, **kwargs):
        if Path(o).stem in ('05','21','30') and (out/'last.pth').exists(): raise OSError('stale file handle')
        return read(o, *args, **kwargs)
    told = pytest.warns(UserWarning, match='images could not be read in this epoch, such as .*.png: others were taken')
    with monkeypatch.context() as m, told if skip else nullcontext():
        m.setattr(data, 'read_image', gone)
        code,_,err = run_of(command, photos, out, num_workers, *['--skip-bad']*skip)
    assert 'Traceback' not in err, err
    if skip: assert code==0, err
    else:
        assert code==2 and '.png is not a readable image: stale file handle' in err.splitlines()[0], err
        code,_,err = command(*arguments(photos, out, num_workers), '--resume')
        assert code==0 and (num_workers or same_weights(out, whole)), err

def test_the_clock_jumps(command, photos, whole, tmp_path, monkeypatch):
    out,n,now = tmp_path/'run',iter(range(10**6)),time.time
    monkeypatch.setattr(time, 'time', lambda: now()+(-1)**next(n)*86400*next(n))
    code,_,err = run_of(command, photos, out)
    assert code==0 and same_weights(out, whole), err

@pytest.mark.parametrize('where', ['report','encoder'])
def test_ctrl_c_while_the_results_are_written(command, photos, whole, tmp_path, monkeypatch, where):
    "What is there stays, and the same run with --resume writes the rest"
    from self_supervised_swav import checkpoints, report
    out = tmp_path/'run'
    def interrupted(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        if where=='report': m.setattr(report, '_page', interrupted)
        else: m.setattr(checkpoints, 'save', interrupted)
        code,_,err = run_of(command, photos, out)
    assert code==130, err
    goes_on(command, photos, out, whole, err)
    assert (out/'report.html').exists()
