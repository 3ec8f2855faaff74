"""Run notebooks and keep their outputs, progress bars as a terminal shows them in the end and pictures as small as they
can be: `python tools/run_nb.py [--slow] nbs/index.ipynb ...`"""
import base64, io, os, re, sys, warnings
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

def smaller(picture):
    """A PNG (base64) with at most 256 colors, where that makes it smaller: a chart has few, and can be sharp at a third
    of the size; of photographs the colors are mixed from dots, or they would have steps"""
    from PIL import Image, ImageChops
    im = Image.open(io.BytesIO(base64.b64decode(picture)))
    if im.mode == 'RGBA' and im.getextrema()[3] != (255, 255): return picture
    f = io.BytesIO()
    im, info = im.convert('RGB'), im.info
    few = im.quantize(256, dither=Image.Dither.NONE)
    if max(hi for _, hi in ImageChops.difference(im, few.convert('RGB')).getextrema()) > 24:
        few = im.quantize(palette=few, dither=Image.Dither.FLOYDSTEINBERG)
    few.save(f, 'png', optimize=True, **({'dpi': info['dpi']} if 'dpi' in info else {}))
    found = base64.b64encode(f.getvalue()).decode()
    return found if len(found) < len(picture) else picture

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
            elif png := o.get('data', {}).get('image/png'): o.data['image/png'] = smaller(''.join(png))
        if outputs: cell.outputs = [o for o in outputs if o.output_type != 'stream' or ''.join(o.text).strip()]
    write_nb(nb, path)
    nbdev_clean(str(path))
    return True

if __name__ == '__main__':
    sys.exit(not all([run(Path(p).resolve(), '--slow' in sys.argv) for p in sys.argv[1:] if p != '--slow']))
