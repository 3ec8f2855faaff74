"Small things that several tests share: quiet fastai, one thread, seeds."
import os, sys
os.environ.setdefault('MPLBACKEND', 'agg')
import matplotlib.pyplot as plt, pytest, torch
from fastcore import script
from helpers import small_learner
from self_supervised_swav import cli
from self_supervised_swav.monitor import CollapseMonitor

@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield

@pytest.fixture
def command(monkeypatch, capsys):
    "Run a command as the console script does, in this process: exit code, stdout, stderr"
    def run(name, *args):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, args)])
        try: code = script._run_cli(getattr(cli, name.replace('-', '_')).__wrapped__, False) or 0
        except SystemExit as e: code = e.code
        return code,*capsys.readouterr()
    return run

@pytest.fixture
def closed_figures():
    yield
    plt.close('all')

@pytest.fixture(scope='module')
def trained():
    "A monitored Learner after two epochs with a queue, for pictures and reports"
    learn = small_learner(n=80, labelled=True, cbs=[CollapseMonitor()], K=16, queue_start_pct=.5)
    learn.fit(2, 3e-3)
    return learn
