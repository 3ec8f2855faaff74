"Files are written whole or not at all: a disk that is full, a folder that cannot be written to, damage of every kind"
import errno, os, subprocess, sys
import pytest
from self_supervised_swav.checkpoints import atomic_path as old_place
from self_supervised_swav.files import atomic_path, check_writable, has_state, read_state, write_json, write_state

def test_old_place(): assert old_place is atomic_path

@pytest.mark.parametrize('keep_prev', [False, True])
def test_error_keeps_what_was_there(tmp_path, keep_prev):
    with atomic_path(tmp_path/'new'/'a.txt') as p: p.write_text('old')
    with pytest.raises(KeyboardInterrupt):
        with atomic_path(tmp_path/'new'/'a.txt', keep_prev) as p:
            p.write_text('half')
            raise KeyboardInterrupt
    assert [(o.name, o.read_text()) for o in (tmp_path/'new').iterdir()] == [('a.txt', 'old')]

def test_prev(tmp_path):
    for i in range(3):
        with atomic_path(tmp_path/'a', keep_prev=True) as p: p.write_text(str(i))
    assert {o.name: o.read_text() for o in tmp_path.iterdir()} == {'a': '2', 'a.prev': '1'}

def test_folder_that_cannot_be_flushed(tmp_path, monkeypatch):
    "Some network file systems answer EINVAL; the file itself is on the disk"
    fsync = os.fsync
    def refuse(fd):
        if os.path.isdir(f'/proc/self/fd/{fd}'): raise OSError(errno.EINVAL, 'Invalid argument')
        fsync(fd)
    monkeypatch.setattr(os, 'fsync', refuse)
    write_json([1], tmp_path/'a.json')
    assert (tmp_path/'a.json').read_text() == '[\n 1\n]\n'

def test_no_state(tmp_path): assert not has_state(tmp_path/'x') and read_state(tmp_path/'x') is None

def test_state_that_cannot_be_written_is_no_error_of_the_disk(tmp_path):
    write_state(dict(i=0), tmp_path/'x.pth')
    with pytest.raises(Exception) as e: write_state(dict(i=(o for o in ())), tmp_path/'x.pth')
    assert not isinstance(e.value, OSError) and read_state(tmp_path/'x.pth') == dict(i=0)

full = '''
import resource, sys
import torch
from self_supervised_swav.files import write_json, write_state
path,size = sys.argv[1],int(sys.argv[2])
write_state(dict(w=torch.zeros(10)), path)
resource.setrlimit(resource.RLIMIT_FSIZE, (size,size))     # Python ignores the signal, so a write says EFBIG
for write,o in ((write_state, dict(w=torch.ones(100_000))), (write_json, ['x'*500_000])):
    try: write(o, path)
    except OSError as e: print(e.errno, e.filename)
'''

@pytest.mark.skipif(os.name!='posix', reason='limits of the file size are a thing of POSIX')
@pytest.mark.parametrize('size', [0, 1000, 100_000, 399_000])
def test_full_disk(tmp_path, size):
    "Wherever the disk becomes full, the error says of which file, and the last good one stays"
    path = tmp_path/'last.pth'
    p = subprocess.run([sys.executable, '-c', full, path, str(size)], capture_output=True, text=True, check=True)
    assert p.stdout.split('\n')[:2] == [f'{errno.EFBIG} {path}']*2
    assert read_state(path)['w'].eq(0).all() and [o.name for o in tmp_path.iterdir()] == ['last.pth']

read_only = '''
import os, sys
from pathlib import Path
import torch
from self_supervised_swav.files import check_writable, write_json, write_state
folder = Path(sys.argv[1])
write_state(dict(w=torch.zeros(10)), folder/'last.pth')
os.chmod(folder, 0o555)
if os.geteuid()==0: os.setuid(65534)                        # root may write anywhere
for f in (lambda: write_state({}, folder/'last.pth'), lambda: write_json({}, folder/'a.json'),
          lambda: check_writable(folder), lambda: write_json({}, folder/'new'/'a.json')):
    try: f()
    except PermissionError as e: print(e)
'''

@pytest.mark.skipif(os.name!='posix', reason='permissions as on POSIX')
def test_read_only_folder(tmp_path):
    for o in (tmp_path, *tmp_path.parents[:3]): os.chmod(o, 0o755)
    folder = tmp_path/'run'
    folder.mkdir()
    p = subprocess.run([sys.executable, '-c', read_only, folder], capture_output=True, text=True, check=True)
    os.chmod(folder, 0o755)
    said = p.stdout.splitlines()
    assert len(said) == 4 and all(str(folder) in o for o in said)
    assert read_state(folder/'last.pth')['w'].eq(0).all() and [o.name for o in folder.iterdir()] == ['last.pth']

def test_check_writable(tmp_path):
    (tmp_path/'file').write_text('')
    check_writable(tmp_path/'a'/'b')
    assert not (tmp_path/'a').exists()
    for o in ('file', 'file/below/it'):
        with pytest.raises(NotADirectoryError, match='is a file'): check_writable(tmp_path/o)
