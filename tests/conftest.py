"Small things that several tests share: quiet fastai, one thread, seeds."
import os
os.environ.setdefault('MPLBACKEND', 'agg')
import pytest, torch

@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
