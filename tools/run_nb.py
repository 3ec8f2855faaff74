"""Run notebooks and keep their outputs, progress bars as a terminal shows them in the end: `python tools/run_nb.py
[--slow] nbs/index.ipynb ...`"""
import os, re, sys, warnings
os.environ.setdefault('OMP_NUM_THREADS', '2')
warnings.filterwarnings('ignore', '`torch.jit', FutureWarning)  # on import of kornia: not the reader's concern
from pathlib import Path

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))

def as_shown(text):
    """What a terminal shows of `text`: a carriage return goes back to the start of the line, and what follows
    overwrites it; paths of packages are short"""
    lines = []
    for line in text.split('\n'):
        shown = ''
        for part in line.split('\r'): shown = part + shown[len(part):]
        lines.append(shown.rstrip())
    return re.sub(r'\S*/site-packages/', '', '\n'.join(lines))  # where a package lies is nobody's business

def run(path, slow=False):
    "Run `path`, cells marked slow only if asked to, and save it; False if a cell failed"
    from fastcore.nbio import read_nb, write_nb
    from nbdev.clean import nbdev_clean
    from nbdev.config import get_config
    from nbdev.test import test_nb
    flags = get_config(root).tst_flags
    flags = [o for o in (flags.split() if isinstance(flags, str) else flags) if not (slow and o == 'slow')]
    ok, _ = test_nb(path, skip_flags=flags, basepath=root, save=True, cell_timeout=None if slow else 600)
    if not ok: return False
    nb = read_nb(path)
    for cell in nb.cells:
        outputs = cell.get('outputs', [])
        for o in outputs:
            if o.output_type == 'stream': o.text = as_shown(''.join(o.text)).splitlines(keepends=True)
        if outputs: cell.outputs = [o for o in outputs if o.output_type != 'stream' or ''.join(o.text).strip()]
    write_nb(nb, path)
    nbdev_clean(str(path))
    return True

if __name__ == '__main__':
    sys.exit(not all([run(Path(p).resolve(), '--slow' in sys.argv) for p in sys.argv[1:] if p != '--slow']))
