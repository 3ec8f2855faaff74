"Render README.md from nbs/index.ipynb, its pictures into docs/images/: `python tools/readme.py [--check]`"
import ast, re, sys
from base64 import b64decode
from pathlib import Path
from run_nb import as_shown

root = Path(__file__).resolve().parent.parent
images = Path('docs')/'images'

def linker():
    """A lookup that links names in backticks: the package's own to the notebooks they are explained in, fastai's to
    its documentation"""
    from nbdev.doclinks import NbdevLookup
    idx = root/'self_supervised_swav'/'_modidx.py'
    syms = ast.literal_eval(idx.read_text().split('d = ', 1)[1])['syms'] if idx.exists() else {}
    nbs = {re.sub(r'^\d+_', '', p.stem): p.relative_to(root).as_posix() for p in (root/'nbs').glob('*.ipynb')}
    res = NbdevLookup(strip_libs='fastai')
    for mod, names in syms.items():
        mod_name = mod.split('.')[-1]
        for nm in names: res.syms[nm.removeprefix(f'{mod}.')] = nbs.get(mod_name)
    return res

def fence(text, lang=''): return f'```{lang}\n{text.rstrip()}\n```'

def render_output(o, add_image, alt=''):
    if o.output_type == 'stream': return fence(as_shown(o.text)) if o.name == 'stdout' else ''
    data = o.get('data', {})
    if 'image/png' in data: return f'![{alt}]({add_image(data["image/png"])})'
    if 'text/markdown' in data: return data['text/markdown'].strip()
    if 'text/html' in data: return re.sub(r'<style>.*?</style>', '', data['text/html'], flags=re.S).strip()
    return fence(data['text/plain']) if 'text/plain' in data else ''

def render(path):
    "The text of README.md and {picture's path: its bytes}"
    from fastcore.nbio import read_nb
    lookup, parts, pics = linker(), [], {}
    def add_image(b64):
        fn = images/f'{path.stem}_{len(pics)+1}.png'
        pics[fn] = b64decode(b64)
        return fn.as_posix()
    for cell in read_nb(path).cells:
        flags = set(re.findall(r'^#\|\s*(.+?)\s*$', cell.source, re.M))
        src = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
        if 'hide' in flags: continue
        # what a picture shows, for those who cannot see it
        alt = next((o.partition(':')[2].strip() for o in flags if o.startswith('fig-alt:')), '')
        if cell.cell_type == 'markdown': parts.append(lookup.linkify(src))
        if cell.cell_type == 'code':
            if src and 'echo: false' not in flags: parts.append(fence(src, 'python'))
            if 'output: false' not in flags:
                parts += [render_output(o, add_image, alt) for o in cell.get('outputs', [])]
    head = f'<!-- made from {path.relative_to(root).as_posix()} by tools/readme.py: edit that -->\n\n'
    return head + '\n\n'.join(filter(None, parts)) + '\n', pics

def main(check=False):
    text, pics = render(root/'nbs'/'index.ipynb')
    want = {Path('README.md'): text.encode(), **pics}
    stale = {p.relative_to(root) for p in (root/images).glob('index_*.png')} - set(want)
    wrong = sorted(stale | {p for p, b in want.items() if not (root/p).exists() or (root/p).read_bytes() != b})
    for p in wrong:
        if check: print(f'{p} is not what nbs/index.ipynb gives: run `make readme` and commit')
        elif p in stale: (root/p).unlink()
        else:
            (root/p).parent.mkdir(parents=True, exist_ok=True)
            (root/p).write_bytes(want[p])
    return len(wrong) if check else 0

if __name__ == '__main__': sys.exit(bool(main('--check' in sys.argv)))
