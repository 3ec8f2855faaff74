"Small things that several tests share: quiet fastai, one thread, seeds."
import os, sys
os.environ.setdefault('MPLBACKEND', 'agg')
import pytest, torch
from fastcore import script
from self_supervised_swav import cli

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
