"""Files of every kind, changed in search of code that is not reached yet: `pip install atheris`, then
`python tools/fuzz_bytes.py shard [--seconds 60]`; the readers are those of tests/test_fuzz_files.py. An error that does
not name the file ends it, and the file that did it stays where the last lines say."""
import argparse, os, resource, sys, tempfile
os.environ.setdefault('OMP_NUM_THREADS', '1')
from pathlib import Path
import atheris

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root/'tests'), str(root/'tools')]
import sandbox
sandbox.enter()
with atheris.instrument_imports(include=['self_supervised_swav']): import test_fuzz_files as files

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('reader', choices=list(files.readers))
    p.add_argument('--seconds', type=int, default=60)
    args = p.parse_args()
    corpus = Path(tempfile.mkdtemp())
    (corpus/'whole').write_bytes(files.readers[args.reader][1])
    found = f'{tempfile.mkdtemp()}/'
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024  # Linux counts that of the process that started it
    how = [f'-max_total_time={args.seconds}', '-timeout=20', f'-rss_limit_mb={peak+4096}', '-max_len=65536',
           '-print_final_stats=1', f'-artifact_prefix={found}', '-verbosity=0']
    atheris.Setup([sys.argv[0], *how, str(corpus)], lambda data: files.read(args.reader, data))
    atheris.Fuzz()

if __name__ == '__main__': main()
