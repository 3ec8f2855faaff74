"The demo runs from the command line, beats nothing in one epoch, and saves what it promises"
import os, subprocess, sys
from pathlib import Path
import pytest
from safetensors.torch import load_file

root = Path(__file__).resolve().parent.parent

def test_demo(tmp_path):
    res = subprocess.run([sys.executable, 'tools/demo.py', '--epochs', '1', '--out', str(tmp_path)], cwd=root, capture_output=True, text=True,
                         env={**os.environ, 'PYTHONPATH': str(root)})
    assert res.returncode == 0, res.stderr
    for row in ('raw pixels', 'untrained encoder', 'pretrained encoder'): assert f'| {row} | ' in res.stdout
    assert all((tmp_path/nm).read_bytes().startswith(b'\x89PNG') for nm in ('crops.png', 'loss.png'))
    assert load_file(tmp_path/'encoder.safetensors')['conv1.weight'].shape == (64, 1, 3, 3)

@pytest.mark.slow
def test_pretraining_pays(tmp_path):
    "Minutes: the pretrained encoder beats the untrained one and the pixels, whatever the seed"
    sys.path.insert(0, str(root/'tools'))
    from demo import main
    for seed in (0, 1):
        rows = main(40, seed, tmp_path)
        (pix, pix_few), (un, un_few), (pre, pre_few) = rows['raw pixels'], rows['untrained encoder'], rows['pretrained encoder']
        assert pre > un+.02 and pre > pix-.01 and pre_few > un_few+.1 and pre_few > pix_few+.03
