"""Run every check of the project, whatever fails on the way, and count: `python tools/test.py [words that name
notebooks or tests]`"""
import subprocess, sys, time
import machines
from runner import Count, close, find_notebooks, notebooks, root, say, tests

usage = 'tests/typed_usage.py'  # calls of the public API with their types

def start_checks():
    "The package and README are what the notebooks give, and neither ruff nor mypy has a complaint about what they read"
    lint = [d for d in ('self_supervised_swav', 'nbs', 'tests', 'tools', 'benchmarks') if (root/d).exists()]
    cmds = {'drift': ['tools/drift.py'], 'ruff': ['-m', 'ruff', 'check', '-q', *lint]}
    if (root/usage).exists(): cmds['mypy'] = ['-m', 'mypy', '--no-error-summary', usage]
    return {nm: subprocess.Popen([sys.executable, *cmd], cwd=root) for nm, cmd in cmds.items()}

def end_checks(running, start):
    failed = [nm for nm, p in running.items() if p.wait()]
    for nm in failed: print(f'FAILED {nm}')
    return say('checks beside notebooks', Count(len(running)-len(failed), len(failed)), start)

def main(words=()):
    start, running, nbs = time.time(), start_checks(), find_notebooks(words)
    count = notebooks(nbs) if nbs or words else say('notebooks (none found)', Count(failed=1), time.time())
    count += end_checks(running, start)
    count += tests('-k', ' or '.join(words), 'tests', may_be_none=True) if words else tests()
    if not words: count += machines.short()
    return close(count)

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
