"The benchmarks' harness on tiny sizes: its figures mean what they say."
import sys, time
from pathlib import Path
import pytest, torch

folder = Path(__file__).parent.parent/'benchmarks'
sys.path.insert(0, str(folder))
import harness, kernels, steps
import run as bench

tiny = dict(arch='resnet18', bs=4, num_crops=(2,1), crop_sizes=(32,24))

def test_race_alternates_and_gives_seconds_of_one_call():
    calls = []
    def wait(name, s): calls.append(name); time.sleep(s)
    times = harness.race(dict(a=lambda: wait('a', .02), b=lambda: wait('b', .08)), rounds=3, least=.06)
    assert .0199<times['a']<.0599 and .0799<times['b']  # three calls of `a` a round, one of `b`
    assert ''.join(calls).endswith('aaabaaabaaab')

def test_exponent():
    assert harness.exponent((1,2,4,8), [3*n**1.5 for n in (1,2,4,8)])==pytest.approx(1.5)

def _fill(n, small=False):
    "A function that holds `n` MB for a moment"
    return lambda: torch.ones((1 if small else n)*2**18).sum()

def test_peak_memory():
    assert harness.peak_memory(_fill, 80)/2**20==pytest.approx(80, abs=4)

def test_ratio_says_how_many_times_as_long_the_peer_takes():
    row = harness.Row.of_times('x', '1', {'this package': .002, 'peer': .007}, 'peer')
    assert (row.ours,row.theirs,row.ratio)==('2 ms','7 ms','3.5x')

def test_contestants_compute_the_same():
    fs = kernels.sinkhorn_contestants(40, 20)
    for k in ('without `out`','lightly'): torch.testing.assert_close(fs['this package'](), fs[k](), atol=1e-6, rtol=0)
    ours,plain,theirs = (f() for f in kernels.loss_contestants(4, 8, 20).values())
    for a,b in zip(ours, theirs): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

def test_parts_of_a_step():
    from multicrop import batch, photographs
    times = steps.our_step(images=batch(photographs(4)), **tiny)(2)
    assert set(times)=={'step',*steps.needed,*steps.extras}
    assert 0<sum(v for k,v in times.items() if k!='step')<times['step']

def test_table_and_readme(tmp_path):
    rows = [*kernels.sinkhorn_rows(((8,30),), 1), *kernels.loss_rows(((3,8,30),), 1), *kernels.growth_rows((16,8), 2, 1), *steps.step_rows(1, 1, **tiny),
            *steps.epoch_rows(8, 4, 1, force=True)]
    lines = harness.table(rows).splitlines()
    assert len(lines)==2+len(rows) and len({len(o) for o in lines})==1
    readme = tmp_path/'README.md'
    readme.write_text((folder/'README.md').read_text())
    for _ in range(2): harness.write(readme, rows, 'cpu', 61)
    text = readme.read_text()
    assert text.count('## The last full run')==1 and text.endswith(lines[-1]+'\n') and text.startswith('# Benchmarks')

def test_command_refuses_to_keep_part_of_a_run(capsys):
    for args in (['--quick','--write'], ['--only','loss','--write'], ['--only','nothing']):
        with pytest.raises(SystemExit): bench.main(args)
