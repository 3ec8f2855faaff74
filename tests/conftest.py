"Small things that several tests share: no network, an order of the tests, seeds, commands, a trained Learner."
import os, random, signal, sys
from pathlib import Path
os.environ.setdefault('MPLBACKEND', 'agg')
if 'SWAV_DEVICE' not in os.environ: os.environ['CUDA_VISIBLE_DEVICES'] = ''  # bounds and places are those of a CPU
# in the background of a shell Ctrl-C is ignored, and would be by all that tests start
if signal.getsignal(signal.SIGINT)==signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'tools'))
import sandbox
sandbox.enter()  # before the package reads anything about the processor
import matplotlib.pyplot as plt, pytest, torch
from PIL import Image
from sklearn.datasets import load_digits
from helpers import small_learner, words_for
from self_supervised_swav import cli, report
from self_supervised_swav.monitor import CollapseMonitor

n_threads = torch.get_num_threads()

def pytest_collection_modifyitems(items):
    """Shuffle the files, and the tests in each, by the seed SWAV_ORDER; a file's tests stay together because they
    share fixtures"""
    if not (seed := os.environ.get('SWAV_ORDER')): return
    rng,files = random.Random(seed),{}
    for item in items: files.setdefault(item.path, []).append(item)
    groups = list(files.values())
    rng.shuffle(groups)
    for group in groups: rng.shuffle(group)
    items[:] = [item for group in groups for item in group]

@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield

@pytest.fixture(autouse=True)
def _as_many_threads():
    "A test file or a test that sets another number of threads decides how all that come after it are computed"
    yield
    n = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    assert n==n_threads, f'{n} threads are left behind, {n_threads} were there at the start'

@pytest.fixture
def threads_back():
    "For a test that sets the number of threads of its process, as benchmarks do"
    yield
    torch.set_num_threads(n_threads)

@pytest.fixture(autouse=True)
def _no_network():
    "A test fails if anything in it asks for the network, even if the error was caught"
    sandbox.attempts.clear()
    yield
    assert not sandbox.attempts, f'the network was asked for: {sandbox.attempts}'

@pytest.fixture
def command(capsys, monkeypatch):
    """Run `swav ARGS`, in this process: exit code, stdout, stderr. The report of a run has words in place of pictures,
    which take as long as a short training; tests/test_report.py and the notebooks draw them"""
    monkeypatch.setattr(report, '_figure', words_for)
    def run(*args):
        try: code = cli.main(args)
        except SystemExit as e: code = e.code
        return code,*capsys.readouterr()
    return run

@pytest.fixture
def closed_figures():
    yield
    plt.close('all')

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Two kinds of digits in a folder each"
    path = tmp_path_factory.mktemp('photos')
    for i,(x,y) in enumerate(zip(*load_digits(n_class=2, return_X_y=True))):
        (path/f'{y}').mkdir(exist_ok=True)
        Image.fromarray((x.reshape(8,8)*255/16).astype('uint8')).resize((16,16)).save(path/f'{y}'/f'{i:03}.png')
    return path

@pytest.fixture(scope='module')
def trained():
    "A monitored Learner after two epochs with a queue, for pictures and reports"
    learn = small_learner(n=80, labeled=True, cbs=[CollapseMonitor()], K=16, queue_start_pct=.5)
    learn.fit(2, 3e-3)
    return learn
