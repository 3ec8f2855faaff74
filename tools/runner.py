"""Run notebooks and tests, and count what passed, what failed, and why how much was skipped: `python tools/runner.py
[arguments of pytest]`"""
import json, os, subprocess, sys, tempfile, time, warnings
os.environ.setdefault('OMP_NUM_THREADS', '1')  # two workers of one thread each: before torch is imported
os.environ.setdefault('MPLBACKEND', 'agg')
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root/'tools')]
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')]))
n_slowest = 8

class Count(NamedTuple):
    "How many passed and failed, and why how many were skipped"
    passed:int = 0
    failed:int = 0
    skipped:Counter = Counter()
    def __add__(self, o): return Count(self.passed+o.passed, self.failed+o.failed, self.skipped+o.skipped)
    def to_json(self): return json.dumps(self)
    @classmethod
    def from_json(cls, text):
        passed, failed, skipped = json.loads(text)
        return cls(passed, failed, Counter(skipped))
    def __str__(self): return f'{self.passed} passed, {self.failed} failed, {self.skipped.total()} skipped'

def n_workers(): return max(1, 2//int(os.environ['OMP_NUM_THREADS']))  # more threads than cores make each other wait

def say(name, count, start):
    print(f'{name}: {count} in {time.time()-start:.0f} s\n', flush=True)
    return count

def show_slowest(times):
    for name, secs in sorted(times, key=lambda o: -o[1])[:n_slowest]: print(f'  {secs:6.1f} s  {name}')

def find_notebooks(words=()):
    """Notebooks under nbs/ with one of `words` in their names, the long ones first, so that no worker is left alone
    with one at the end"""
    nbs = [p for p in (root/'nbs').rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(root).parts)]
    return sorted((p for p in nbs if not words or any(w in p.name for w in words)),
                  key=lambda p: (-p.stat().st_size, p.name))

def run_notebook(path, **kwargs):
    """Run one notebook without a network: did it pass, in how many seconds, and what else there is to say. What it
    does to warnings ends with it: the next one runs in the same process"""
    from nbdev.test import test_nb
    import sandbox
    sandbox.enter()
    sandbox.attempts.clear()
    with warnings.catch_warnings(): ok, secs = test_nb(path, basepath=root, **kwargs)
    return (False, secs, f'it asked for the network: {sandbox.attempts}') if sandbox.attempts else (ok, secs, '')

def notebooks(nbs):
    "Each of the notebooks `nbs` runs from top to bottom"
    from fastcore.parallel import parallel
    from nbdev.config import get_config
    start, flags = time.time(), get_config(root).tst_flags
    if isinstance(flags, str): flags = flags.split()
    results = list(parallel(run_notebook, nbs, skip_flags=flags, n_workers=min(n_workers(), len(nbs)),
                            return_exceptions=True)) if nbs else []
    # an exception is no result of the notebook's cells: it could not be read, or its process died
    results = [(False, 0., repr(r)) if isinstance(r, BaseException) else r for r in results]
    show_slowest((p.relative_to(root), secs) for p, (_, secs, _) in zip(nbs, results))
    failed = [(p.relative_to(root), err) for p, (ok, _, err) in zip(nbs, results) if not ok]
    for p, err in failed: print(f'FAILED {p} {err}')
    return say('notebooks', Count(len(nbs)-len(failed), len(failed)), start)

def read_counts(xml):
    "The counts in a report of pytest"
    suite = ElementTree.parse(xml).getroot().find('testsuite')
    skipped = Counter(o.get('message') for o in suite.iter('skipped'))
    failed = sum(int(suite.get(k, 0)) for k in ('failures', 'errors'))
    return Count(int(suite.get('tests'))-failed-skipped.total(), failed, skipped)

def tests(*args, may_be_none=False, marked='not slow and not gpu'):
    "Tests that are `marked` so, those that the arguments for pytest select"
    start = time.time()
    with tempfile.TemporaryDirectory() as tmp:
        xml = Path(tmp)/'tests.xml'
        how = ['-q', '-rfE', '--tb=short', '--disable-warnings', f'-n{n_workers()}', '--dist=worksteal',
               f'--durations={n_slowest}', '--durations-min=1']
        ret = subprocess.run([sys.executable, '-m', 'pytest', *how, '-m', marked, f'--junitxml={xml}',
                              *(args or ['tests'])], cwd=root).returncode
        count = read_counts(xml) if xml.exists() else Count()
    if ret == 5 and may_be_none: ret = 0
    if ret and not count.failed: count += Count(failed=1)  # no test found, or pytest itself came to nothing
    return say('tests', count, start)

def close(count):
    "The last lines: why tests were skipped, and the totals"
    for why, n in sorted(count.skipped.items()): print(f'{n} skipped: {why}')
    print(count)
    return bool(count.failed)

if __name__ == '__main__': sys.exit(close(tests(*sys.argv[1:])))
