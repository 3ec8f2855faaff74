"Run every check of the project, whatever fails on the way, and count: `python tools/test.py [words that name notebooks or tests]`"
import os, subprocess, sys, tempfile, time
os.environ.update(OMP_NUM_THREADS='1', MPLBACKEND='agg')  # two workers of one thread each: before torch is imported
from pathlib import Path
from xml.etree import ElementTree

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')]))
n_workers, n_slowest = 2, 8

def say(name, passed, failed, secs, note=''):
    print(f'{name}: {passed} passed, {failed} failed{note} in {secs:.0f} s\n', flush=True)
    return passed, failed

def show_slowest(times):
    for name, secs in sorted(times, key=lambda o: -o[1])[:n_slowest]: print(f'  {secs:6.1f} s  {name}')

def checks():
    "The package and README are what the notebooks give, and pyflakes has no complaint"
    start = time.time()
    lint = [d for d in ('self_supervised_swav', 'tests', 'tools', 'benchmarks') if (root/d).exists()]
    cmds = {'drift': ['tools/drift.py'], 'ruff': ['-m', 'ruff', 'check', '-q', *lint]}
    failed = [nm for nm, cmd in cmds.items() if subprocess.run([sys.executable, *cmd], cwd=root).returncode]
    for nm in failed: print(f'FAILED {nm}')
    return say('checks', len(cmds)-len(failed), len(failed), time.time()-start)

def notebooks(words):
    "Every notebook under nbs/ runs from top to bottom"
    from fastcore.parallel import parallel
    from nbdev.config import get_config
    from nbdev.test import test_nb
    start, flags = time.time(), get_config(root).tst_flags
    if isinstance(flags, str): flags = flags.split()
    nbs = [p for p in sorted((root/'nbs').rglob('*.ipynb')) if not any(o[0] in '._' for o in p.relative_to(root).parts)
           and (not words or any(w in p.name for w in words))]
    # long ones first, so that no worker is left alone with one at the end
    nbs.sort(key=lambda p: -p.stat().st_size)
    results = list(parallel(test_nb, nbs, skip_flags=flags, basepath=root, n_workers=min(n_workers, len(nbs)),
                            return_exceptions=True)) if nbs else []
    # an exception is no result of the notebook's cells: it could not be read, or its process died
    results = [(False, 0., repr(r)) if isinstance(r, BaseException) else (*r, '') for r in results]
    show_slowest((p.relative_to(root), secs) for p, (_, secs, _) in zip(nbs, results))
    failed = [(p.relative_to(root), err) for p, (ok, _, err) in zip(nbs, results) if not ok]
    if not (nbs or words): failed = [('nbs/', 'no notebook found')]
    for p, err in failed: print(f'FAILED {p} {err}')
    return say('notebooks', sum(ok for ok, *_ in results), len(failed), time.time()-start)

def tests(words):
    "Every test in tests/ that is not marked slow"
    start = time.time()
    with tempfile.TemporaryDirectory() as tmp:
        xml = Path(tmp)/'tests.xml'
        select = ['-k', ' or '.join(words)] if words else []
        ret = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-rfEs', '--tb=short', '--disable-warnings', '-m', 'not slow', f'-n{n_workers}',
                              '--dist=worksteal', f'--durations={n_slowest}', '--durations-min=1', f'--junitxml={xml}',
                              *select, 'tests'], cwd=root).returncode
        suite = ElementTree.parse(xml).getroot().find('testsuite') if xml.exists() else {}
    n, bad, skipped = (sum(int(suite.get(k, 0)) for k in ks) for ks in (['tests'], ['failures', 'errors'], ['skipped']))
    if ret == 5 and words: ret = 0      # the words named notebooks only
    if ret and not bad: bad, n = 1, n+1 # no test found, or pytest itself came to nothing
    return say('tests', n-bad-skipped, bad, time.time()-start, f' ({skipped} skipped)' if skipped else '')

def main(words=()):
    parts = [checks(), notebooks(words), tests(words)]
    passed, failed = map(sum, zip(*parts))
    print(f'{passed} passed, {failed} failed')
    return bool(failed)

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
