"The test runner fails for each kind of failure and names it; README is rendered as it should be"
import base64, io, json, os, shutil, socket, subprocess, sys
from pathlib import Path
import numpy as np, pytest
import sandbox

root = Path(__file__).resolve().parent.parent
nb_head = ['#| default_exp mod', "#| export\ndef double(x):\n    \"Twice `x`\"\n    return 2*x"]
numeric_test = """import pytest
def test_numbers(): assert 2*.5 == pytest.approx(1)
def test_two(): pass
"""
png = base64.b64encode(b'\x89PNG a picture').decode()

def write_nb(path, cells):
    "A notebook of `cells`: strings of code, or tuples of a cell type, its source and its outputs"
    cells = [('code', c, []) if isinstance(c, str) else c for c in cells]
    path.write_text(json.dumps(dict(metadata={}, nbformat=4, nbformat_minor=5, cells=[
        dict(cell_type=t, id=f'c{i}', metadata={}, source=s,
             **(dict(execution_count=None, outputs=o) if t == 'code' else {}))
        for i, (t, s, o) in enumerate(cells)]), indent=1, sort_keys=True)+'\n')

def run(project, *cmd):
    env = {k: v for k, v in os.environ.items() if not k.startswith('PYTEST')}
    quick = {'PYTHONPATH': str(project), 'PYTEST_ADDOPTS': '-p no:hypothesispytest -p no:hydra_pytest'}
    return subprocess.run([sys.executable, *cmd], cwd=project, env=env | quick,
                          capture_output=True, text=True)

@pytest.fixture(scope='module')
def project(tmp_path_factory):
    "A project of one module and one test, with our tools"
    path = tmp_path_factory.mktemp('project')
    shutil.copytree(root/'tools', path/'tools', ignore=shutil.ignore_patterns('__pycache__'))
    for nm in ('settings.ini', 'setup.py', 'pyproject.toml'): shutil.copy(root/nm, path)
    for d in ('nbs', 'tests', 'self_supervised_swav'): (path/d).mkdir()
    (path/'self_supervised_swav'/'__init__.py').write_text('__version__ = "0.1.0"\n')
    (path/'tests'/'test_mod.py').write_text(numeric_test)
    write_nb(path/'nbs'/'00_mod.ipynb', [*nb_head, 'assert double(2) == 4'])
    write_nb(path/'nbs'/'index.ipynb', [('markdown', '# Title\n\nAbout `double` and `Learner`', []), '#| hide\n1', (
        'code', '#| eval: false\ndouble(2)',
        [dict(output_type='display_data', metadata={}, data={'image/png': png, 'text/plain': 'fig'}),
                                             dict(output_type='stream', name='stdout', text='four\n'),
                                             dict(output_type='stream', name='stderr', text='a warning\n')])])
    made = run(path, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()\n'
                           'from nbdev.clean import nbdev_clean; nbdev_clean()')
    assert made.returncode == 0, made.stderr
    assert run(path, 'tools/readme.py').returncode == 0
    return path

def test_readme(project):
    text = (project/'README.md').read_text()
    assert 'About [`double`](nbs/00_mod.ipynb) and [`Learner`](https://docs.fast.ai/' in text
    assert text.endswith('```python\ndouble(2)\n```\n\n![](docs/images/index_1.png)\n\n```\nfour\n```\n')
    assert (project/'docs/images/index_1.png').read_bytes() == b'\x89PNG a picture'

def test_drift(project):
    assert run(project, 'tools/drift.py').returncode == 0
    mod = project/'self_supervised_swav'/'mod.py'
    old = project/'self_supervised_swav'/'old.py'
    pic = project/'docs/images/index_2.png'
    source = mod.read_text()
    try:
        mod.write_text(source.replace('2*x', '3*x'))
        old.write_text(source)             # its notebook is gone
        pic.write_bytes(b'')               # its cell is gone
        res = run(project, 'tools/drift.py')
        assert res.returncode and all(str(p.relative_to(project)) in res.stdout for p in (mod, old, pic)), res.stdout
        assert run(project, 'tools/readme.py', '--check').returncode
    finally:
        mod.write_text(source)
        old.unlink(), pic.unlink()

def test_runner(project):
    res = run(project, 'tools/test.py')
    lines = res.stdout.splitlines()
    # 2 checks, 2 notebooks, 2 tests, and the latter as two other machines run them
    assert res.returncode == 0 and lines[-1] == '10 passed, 0 failed, 0 skipped', res.stdout+res.stderr
    for s in ('notebooks: 2 passed, 0 failed', 'tests: 2 passed, 0 failed',
              *(f'machines: {k}: 2 passed, 0 failed' for k in ('old processor', 'AVX2, two threads'))):
        assert any(l.startswith(s) for l in lines), s

def test_runner_fails(project):
    "Everything fails at once, and each failure is found, named and counted"
    bad = [project/o for o in ('nbs/02_bad.ipynb', 'nbs/03_syntax.ipynb', 'tests/test_bad.py', 'tools/bad.py')]
    try:
        write_nb(bad[0], ['#| slow\nraise Exception', 'assert 1 == 2'])
        write_nb(bad[1], ['{'])
        bad[2].write_text('import pytest\ndef test_b(): assert 1 == 2\n@pytest.mark.skip\ndef test_c(): pass\n'
                          '@pytest.mark.skip(reason="no camera")\ndef test_d(): pass\n')
        bad[3].write_text('import os\n')   # ruff: an import that nobody uses
        (project/'README.md').write_text('edited by hand')
        res = run(project, 'tools/test.py')
        assert res.returncode == 1 and res.stdout.splitlines()[-3:] == [
            '1 skipped: no camera', '1 skipped: unconditional skip',
            '8 passed, 5 failed, 2 skipped'], res.stdout+res.stderr
        for s in ('FAILED drift', 'README.md', 'FAILED ruff', 'checks beside notebooks: 0 passed, 2 failed',
                  'FAILED nbs/02_bad.ipynb', 'FAILED nbs/03_syntax.ipynb', 'notebooks: 2 passed, 2 failed',
                  'test_bad.py::test_b', 'tests: 2 passed, 1 failed, 2 skipped'):
            assert s in res.stdout, s
    finally:
        for p in bad: p.unlink(missing_ok=True)
        run(project, 'tools/readme.py')

def test_notebooks_in_one_process(project, tmp_path):
    "What one notebook does to warnings does not reach the next"
    write_nb(tmp_path/'a.ipynb', ["import warnings\nwarnings.simplefilter('error')"])
    write_nb(tmp_path/'b.ipynb', ["import warnings\nwith warnings.catch_warnings(record=True) as told:\n"
                                  "    warnings.warn('look')\nassert len(told) == 1"])
    res = run(project, '-c', "import sys\nsys.path.insert(0, 'tools')\nfrom pathlib import Path\n"
              f"import runner\nprint([runner.run_notebook(Path(r'{tmp_path}')/o)[0] for o in ('a.ipynb', 'b.ipynb')])")
    assert res.stdout.splitlines()[-1] == '[True, True]', res.stdout+res.stderr

@pytest.mark.slow
def test_nothing_found(project, tmp_path):
    "No notebook and no test is a failure, not a success"
    empty = tmp_path/'empty'
    shutil.copytree(project, empty, ignore=shutil.ignore_patterns('*.ipynb', 'test_*.py'))
    res = run(empty, 'tools/test.py')
    assert res.returncode == 1 and res.stdout.splitlines()[-1] == '1 passed, 5 failed, 0 skipped', res.stdout+res.stderr

@pytest.mark.slow
def test_machines(project):
    "Each setting reaches the tests; where one fails, it is named, and what the tests said is shown"
    numeric = project/'tests'/'test_mod.py'
    try:
        numeric.write_text(f'import os\n{numeric_test}'
                           "def test_setting(): assert os.environ['OMP_NUM_THREADS'] != '4'\n")
        res = run(project, 'tools/machines.py', '1 thread', '4 threads')
        assert [l.split(' in ')[0] for l in res.stdout.splitlines() if l.startswith('machines: ')] == [
            'machines: 1 thread: 3 passed, 0 failed, 0 skipped',
            'machines: 4 threads: 2 passed, 1 failed, 0 skipped'], res.stdout+res.stderr
    finally: numeric.write_text(numeric_test)

def test_machines_together_have_every_part():
    sys.path.insert(0, str(root/'tools'))
    try: import machines
    finally: sys.path.pop(0)
    def has(env, part): return all(v in env.get(k, '').split(',') or env.get(k)==v for k,v in part.items())
    alone = {k: v for k,v in machines.parts.items() if 'SWAV_ORDER' not in v}
    assert [k for k,v in alone.items() if not any(has(o, v) for o in machines.settings.values())] == []
    assert len({o.get('SWAV_ORDER') for o in machines.settings.values()}) == 3  # three orders of the tests

sandbox_probe = """
import os, socket, sys
sys.path.insert(0, 'tools')
import sandbox
sandbox.enter()
for host in ('localhost', '127.0.0.1', socket.gethostname()): socket.getaddrinfo(host, 80)
with socket.create_server(('localhost', 0)) as server: socket.create_connection(server.getsockname()).close()
for ask in (lambda: socket.create_connection(('example.com', 80)), lambda: socket.create_connection(('192.0.2.1', 80)),
            lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 53)),
            lambda: os.listdir('/sys/devices/system/cpu')):
    try: ask()
    except OSError as e: print(type(e).__name__, e)
import torch
print(len(sandbox.attempts), torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported())
"""

def test_sandbox(monkeypatch):
    "No way out of the machine, ways inside it; and what SWAV_PRETEND names is hidden"
    monkeypatch.setenv('SWAV_PRETEND', 'caches,bfloat16')
    res = run(root, '-c', sandbox_probe)
    assert [o.split(':')[0] for o in res.stdout.splitlines()] == [
        "OSError socket.getaddrinfo to 'example.com'", "OSError socket.getaddrinfo to '192.0.2.1'",
        "OSError socket.sendto to ('192.0.2.1', 53)", 'PermissionError /sys/devices/system/cpu',
        '3 False False'], res.stdout+res.stderr
    monkeypatch.setenv('SWAV_PRETEND', 'legs')
    res = run(root, '-c', sandbox_probe)
    assert 'ValueError: SWAV_PRETEND must name some of caches, bfloat16, got legs' in res.stderr

def test_network_is_closed_here():
    "In this process, too: libraries that catch the error do not hide the attempt"
    with pytest.raises(OSError, match='no network'): socket.create_connection(('example.com', 80))
    assert [o[1] for o in sandbox.attempts] == ['example.com']
    sandbox.attempts.clear()

def test_network_is_closed_in_what_tests_start():
    code = "import socket; socket.create_connection(('example.com', 80))"
    for env in (os.environ, os.environ|dict(PYTHONPATH=sandbox.python_path(root))):
        res = subprocess.run([sys.executable,'-c',code], env=env, capture_output=True, text=True)
        assert res.returncode and 'OSError: socket.getaddrinfo' in res.stderr and 'no network' in res.stderr

def test_progress_bars_as_a_terminal_shows_them(project):
    nb = project/'nbs'/'04_bar.ipynb'
    try:
        write_nb(nb, ["print('epoch\\n[#   ]\\r[##  ]\\r0  0.5\\r')", "print('\\r  \\r', end='')",
                      "print('in /home/me/site-packages/a/b.py:1')"])
        assert run(project, 'tools/run_nb.py', str(nb)).returncode == 0
        outs = [c['outputs'] for c in json.loads(nb.read_text())['cells']]
        assert [''.join(o['text']) for o in outs[0]] == ['epoch\n0  0.5\n'] and outs[1] == []
        assert ''.join(outs[2][0]['text']) == 'in a/b.py:1\n'
        write_nb(nb, ['1/0'])
        assert run(project, 'tools/run_nb.py', str(nb)).returncode == 1
    finally: nb.unlink()

def test_pictures_are_small_and_true():
    "A chart keeps every pixel, a photograph its colors where one looks at more than a dot; transparency is left alone"
    from PIL import Image
    from run_nb import smaller
    def encoded(im):
        f = io.BytesIO()
        im.save(f, 'png', dpi=(144,144))
        return base64.b64encode(f.getvalue()).decode()
    def decoded(text): return Image.open(io.BytesIO(base64.b64decode(text)))
    y,x = np.mgrid[:240,:320]
    chart = np.full((240,320,3), 255, np.uint8)
    chart[abs(y-x*.7)<2] = 200,30,30
    chart[y==120] = 0
    photo = np.stack([x*150/319, y*150/239, (x+y)*150/558], 2)+np.random.default_rng(0).uniform(30, 70, (240,320,3))
    photo = photo.astype(np.uint8)
    for pixels in (chart,photo):
        before = encoded(Image.fromarray(pixels))
        after = smaller(before)
        im = decoded(after)
        assert im.mode=='P' and len(after)<len(before) and round(im.info['dpi'][0])==144
        off = np.asarray(im.convert('RGB')).astype(float)-pixels
        if pixels is chart: assert not off.any()
        # errors go on to the neighbors: of 20x20 pixels those of the 80 at the edge remain, of some 24 levels each; in
        # the mean, for colors outside of the 256 keep theirs
        else: assert abs(off.reshape(12,20,16,20,3).mean((1,3))).mean()<24*80/400
    seen_through = encoded(Image.new('RGBA', (50,50), (255,0,0,99)))
    assert smaller(seen_through)==seen_through

@pytest.mark.parametrize('nb', sorted((root/'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_outputs_name_no_place(nb):
    "What a notebook shows is the same on every machine: no path of the one that ran it"
    outputs = json.dumps([c.get('outputs', []) for c in json.loads(nb.read_text())['cells']])
    assert str(root) not in outputs and str(Path.home()) + '/' not in outputs and 'site-packages' not in outputs

@pytest.mark.slow
def test_gpu_tests_are_right():
    "The tests for a GPU, tried on a CPU: a part that is quick"
    env = dict(os.environ, SWAV_DEVICE='cpu')
    res = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-m', 'gpu', 'tests/test_gpu.py', '-k',
                          'queue or sinkhorn or crops or contrastive or resume', '-p', 'no:cacheprovider'],
                         cwd=root, env=env, capture_output=True, text=True)
    assert res.returncode==0, res.stdout
