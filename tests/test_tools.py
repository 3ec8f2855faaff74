"The test runner fails for each kind of failure and names it; README is rendered as it should be"
import base64, json, os, shutil, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
nb_head = ['#| default_exp mod', "#| export\ndef double(x):\n    \"Twice `x`\"\n    return 2*x"]
png = base64.b64encode(b'\x89PNG a picture').decode()

def write_nb(path, cells):
    "A notebook of `cells`: strings of code, or tuples of a cell type, its source and its outputs"
    cells = [('code', c, []) if isinstance(c, str) else c for c in cells]
    path.write_text(json.dumps(dict(metadata={}, nbformat=4, nbformat_minor=5, cells=[
        dict(cell_type=t, id=f'c{i}', metadata={}, source=s, **(dict(execution_count=None, outputs=o) if t == 'code' else {}))
        for i, (t, s, o) in enumerate(cells)]), indent=1, sort_keys=True)+'\n')

def run(project, *cmd):
    env = {k: v for k, v in os.environ.items() if not k.startswith('PYTEST')}
    return subprocess.run([sys.executable, *cmd], cwd=project, env={**env, 'PYTHONPATH': str(project)}, capture_output=True, text=True)

@pytest.fixture(scope='module')
def project(tmp_path_factory):
    "A project of one module and one test, with our tools"
    path = tmp_path_factory.mktemp('project')
    shutil.copytree(root/'tools', path/'tools', ignore=shutil.ignore_patterns('__pycache__'))
    for nm in ('settings.ini', 'setup.py', 'pyproject.toml'): shutil.copy(root/nm, path)
    for d in ('nbs', 'tests', 'self_supervised_swav'): (path/d).mkdir()
    (path/'self_supervised_swav'/'__init__.py').write_text('__version__ = "0.1.0"\n')
    (path/'tests'/'test_a.py').write_text('def test_a(): pass\n')
    write_nb(path/'nbs'/'00_mod.ipynb', [*nb_head, 'assert double(2) == 4'])
    write_nb(path/'nbs'/'index.ipynb', [('markdown', '# Title\n\nAbout `double` and `Learner`', []), '#| hide\n1', (
        'code', '#| eval: false\ndouble(2)', [dict(output_type='display_data', metadata={}, data={'image/png': png, 'text/plain': 'fig'}),
                                             dict(output_type='stream', name='stdout', text='four\n'),
                                             dict(output_type='stream', name='stderr', text='a warning\n')])])
    made = run(path, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()\nfrom nbdev.clean import nbdev_clean; nbdev_clean()')
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
    mod, old, pic = project/'self_supervised_swav'/'mod.py', project/'self_supervised_swav'/'old.py', project/'docs/images/index_2.png'
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
    assert res.returncode == 0 and lines[-1] == '5 passed, 0 failed', res.stdout+res.stderr
    assert any(l.startswith('notebooks: 2 passed, 0 failed') for l in lines)
    assert any(l.startswith('tests: 1 passed, 0 failed') for l in lines)

def test_runner_fails(project):
    "Everything fails at once, and each failure is found, named and counted"
    bad = project/'nbs'/'02_bad.ipynb', project/'nbs'/'03_syntax.ipynb', project/'tests'/'test_bad.py', project/'tools'/'bad.py'
    try:
        write_nb(bad[0], ['#| slow\nraise Exception', 'assert 1 == 2'])
        write_nb(bad[1], ['{'])
        bad[2].write_text('import pytest\ndef test_b(): assert 1 == 2\n@pytest.mark.skip\ndef test_c(): pass\n')
        bad[3].write_text('import os\n')   # ruff: an import that nobody uses
        (project/'README.md').write_text('edited by hand')
        res = run(project, 'tools/test.py')
        assert res.returncode == 1 and res.stdout.splitlines()[-1] == '3 passed, 5 failed', res.stdout+res.stderr
        for s in ('FAILED drift', 'README.md', 'FAILED ruff', 'checks: 0 passed, 2 failed', 'FAILED nbs/02_bad.ipynb',
                  'FAILED nbs/03_syntax.ipynb', 'notebooks: 2 passed, 2 failed', 'test_bad.py::test_b', 'tests: 1 passed, 1 failed (1 skipped)'):
            assert s in res.stdout, s
    finally:
        for p in bad: p.unlink(missing_ok=True)
        run(project, 'tools/readme.py')

def test_nothing_found(project, tmp_path):
    "No notebook and no test is a failure, not a success"
    empty = tmp_path/'empty'
    shutil.copytree(project, empty, ignore=shutil.ignore_patterns('*.ipynb', 'test_*.py'))
    res = run(empty, 'tools/test.py')
    assert res.returncode == 1 and res.stdout.splitlines()[-1] == '1 passed, 3 failed', res.stdout+res.stderr

def test_progress_bars_as_a_terminal_shows_them(project):
    nb = project/'nbs'/'04_bar.ipynb'
    try:
        write_nb(nb, ["print('epoch\\n[#   ]\\r[##  ]\\r0  0.5\\r')", "print('\\r  \\r', end='')", "print('in /home/me/site-packages/a/b.py:1')"])
        assert run(project, 'tools/run_nb.py', str(nb)).returncode == 0
        outs = [c['outputs'] for c in json.loads(nb.read_text())['cells']]
        assert [''.join(o['text']) for o in outs[0]] == ['epoch\n0  0.5\n'] and outs[1] == []
        assert ''.join(outs[2][0]['text']) == 'in a/b.py:1\n'
        write_nb(nb, ['1/0'])
        assert run(project, 'tools/run_nb.py', str(nb)).returncode == 1
    finally: nb.unlink()

@pytest.mark.parametrize('nb', sorted((root/'nbs').rglob('*.ipynb')), ids=lambda p: p.stem)
def test_outputs_name_no_place(nb):
    "What a notebook shows is the same on every machine: no path of the one that ran it"
    outputs = json.dumps([c.get('outputs', []) for c in json.loads(nb.read_text())['cells']])
    assert str(root) not in outputs and str(Path.home()) + '/' not in outputs and 'site-packages' not in outputs
