"""The numeric tests and the notebooks that train, as other machines would run them: `python tools/machines.py [words
that name settings]`

Each setting makes torch and its libraries compute in another order, with other instructions, or with less knowledge of
the processor. A bound that only holds in one of them is what one machine happened to give. Without words: three
machines that have all of the settings among them; `parts` has each alone."""
import os, re, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from runner import Count, close, find_notebooks, notebooks, root, say, tests

settings = {
    'old processor, one thread': dict(ATEN_CPU_CAPABILITY='default', ONEDNN_MAX_CPU_ISA='AVX2', OMP_NUM_THREADS='1',
                                      SWAV_PRETEND='caches,bfloat16', SWAV_ORDER='1'),
    'AVX2, two threads': dict(ATEN_CPU_CAPABILITY='avx2', ONEDNN_MAX_CPU_ISA='AVX512_CORE', OMP_NUM_THREADS='2',
                              SWAV_ORDER='2'),
    'MKL as on any processor, four threads': dict(MKL_CBWR='COMPATIBLE', OMP_NUM_THREADS='4'),
}

# each part alone, to find which of them a failure comes from
parts = {
    'ATen without vector instructions': dict(ATEN_CPU_CAPABILITY='default'),
    'ATen with AVX2': dict(ATEN_CPU_CAPABILITY='avx2'),
    'oneDNN with AVX2': dict(ONEDNN_MAX_CPU_ISA='AVX2'),
    'oneDNN with AVX-512': dict(ONEDNN_MAX_CPU_ISA='AVX512_CORE'),
    'MKL as on any processor': dict(MKL_CBWR='COMPATIBLE'),
    '1 thread': dict(OMP_NUM_THREADS='1'),
    '2 threads': dict(OMP_NUM_THREADS='2'),
    '4 threads': dict(OMP_NUM_THREADS='4'),
    'tests in another order': dict(SWAV_ORDER='1'),
    'cache sizes unknown': dict(SWAV_PRETEND='caches'),
    'no bfloat16': dict(SWAV_PRETEND='bfloat16'),
}

# the same in two runs, for `make test`: an old processor, and a new one with two threads
short_settings = {
    'old processor': dict(ATEN_CPU_CAPABILITY='default', ONEDNN_MAX_CPU_ISA='AVX2', MKL_CBWR='COMPATIBLE',
                          SWAV_PRETEND='caches,bfloat16', SWAV_ORDER='1'),
    'AVX2, two threads': settings['AVX2, two threads'],
}

def training_notebooks():
    return [p for p in find_notebooks() if re.search(r'\.(fit|fit_\w+|fine_tune)\(', p.read_text(encoding='utf-8'))]

def numeric_tests(short=False):
    """Files of tests that compare numbers; `short`: those of the mathematics alone, floor 0 without the processes of
    `test_ranks`, which wait more than they compute"""
    found = [p for p in sorted((root/'tests').glob('test_*.py'))
             if re.search(r'assert_close|allclose|approx\(|losses|accuracy', p.read_text(encoding='utf-8'))]
    if short:
        return [p for p in found if p.stem != 'test_ranks' and
                [*(root/'nbs').glob(f'0[0-8]_{p.stem.removeprefix("test_")}.ipynb')]]
    return [p for p in found if p.stem not in ('test_tools', 'test_benchmarks')]  # about the tools, about time

def run_here(short):
    "Run in this process' environment; the last line counts"
    files = numeric_tests(short)
    # `short` runs its machines side by side, and leaves out processes here, too
    how = ['-n0', '-k', 'not test_processes_equal_one'] if short else []
    count = tests(*how, *files) if files else say('numeric tests (none found)', Count(failed=1), time.time())
    if not short: count += notebooks(training_notebooks())
    print(count.to_json())

def run_setting(name, env, short=False):
    "Run in the environment `env` and say in a line how it went; all of the output where something failed"
    start = time.time()
    res = subprocess.run([sys.executable, __file__, '--here', *(['--short'] if short else [])], env=os.environ | env,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    *lines, last = res.stdout.splitlines() or ['']
    count = Count.from_json(last) if res.returncode == 0 else Count(failed=1)
    if count.failed: print(res.stdout)
    return say(f'machines: {name}', count, start)

def short():
    "A part in under a minute: all machines at the same time"
    with ThreadPoolExecutor() as pool:
        counts = pool.map(lambda o: run_setting(*o, short=True), short_settings.items())
        return sum(counts, Count())

def main(*words):
    chosen = settings if not words else {k: v for k, v in (settings | parts).items() if any(w in k for w in words)}
    if not chosen: sys.exit(f"no setting named so; there are: {', '.join(settings | parts)}")
    return close(sum((run_setting(k, v) for k, v in chosen.items()), Count()))

if __name__ == '__main__':
    if '--here' in sys.argv: run_here('--short' in sys.argv)
    else: sys.exit(main(*sys.argv[1:]))
