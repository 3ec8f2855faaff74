"""README as it stands: its Python runs, its commands exist and take those options, its links lead somewhere, its
figures are the benchmarks'"""
import json, os, re, shlex, subprocess, sys
from pathlib import Path
import pytest, yaml
import self_supervised_swav
from sandbox import python_path

root = Path(__file__).resolve().parent.parent
text = (root/'README.md').read_text(encoding='utf-8')
fenced = r'^```(\w*)\n(.*?)^```$'
blocks = [(m[1], m[2]) for m in re.finditer(fenced, text, re.M|re.S)]

# Runs the blocks of sys.argv[1] one by one, as a reader would, and prints the value that each ends on
reader = '''
import ast, json, sys
names = {}
for i, source in enumerate(json.load(open(sys.argv[1]))):
    print(f'[{i}]', flush=True)
    *body, last = ast.parse(source).body
    exec(compile(ast.Module(body, []), 'README.md', 'exec'), names)
    if not isinstance(last, ast.Expr): exec(compile(ast.Module([last], []), 'README.md', 'exec'), names)
    else:
        value = eval(compile(ast.Expression(last.value), 'README.md', 'eval'), names)
        if value is not None: print(repr(value))
'''

def test_has_blocks_of_each_kind(): assert {'python', 'sh', ''} <= {lang for lang, _ in blocks}

@pytest.mark.slow
def test_python_runs(tmp_path):
    """In an empty folder, without the cells that nbs/index.ipynb hides; a value shown below a block is the value that
    it gives, a table of a training has the same columns"""
    sources = [b for lang, b in blocks if lang == 'python']
    (tmp_path/'blocks.json').write_text(json.dumps(sources))
    env = {**os.environ, 'PYTHONPATH': python_path(root), 'MPLBACKEND': 'agg'}
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', reader, 'blocks.json'], cwd=tmp_path, env=env,
                         capture_output=True, text=True)
    assert res.returncode == 0, res.stderr[-3000:]
    said = re.split(r'^\[\d+\]\n', res.stdout, flags=re.M)[1:]
    shown = [blocks[i+1][1] if blocks[i+1:] and not blocks[i+1][0] else None
             for i, (lang, _) in enumerate(blocks) if lang == 'python']
    assert len(said) == len(shown) == len(sources) and any(shown)
    for got, want in zip(said, shown):
        if want and want.startswith('epoch'):
            assert want.split('\n')[0].split() == next(l
                                                       for l in got.split('\n') if 'epoch ' in l).strip('\r█ ').split()
        elif want: assert got.strip() == want.strip()

pages = [text, *(p.read_text(encoding='utf-8') for p in sorted((root/'docs').glob('*.md')))]
lines = list(dict.fromkeys(l for o in pages for lang, b in re.findall(fenced, o, re.M|re.S) if lang == 'sh'
                           for l in b.splitlines() if l.strip()))

@pytest.mark.parametrize('line', lines)
def test_commands_exist(line, command):
    "A target of the Makefile, pip, or a command of ours with options that its `--help` knows, after its environment"
    name, *args = shlex.split(re.sub(r'^[A-Z_]+=\S+ ', '', line), comments=True)
    if name == 'pip': assert args == ['install', '.'] and (root/'pyproject.toml').exists()
    elif name == 'make': assert all(re.search(rf'^{re.escape(o)}:', (root/'Makefile').read_text(), re.M) for o in args)
    else:
        if name == 'torchrun': name, *args = ['swav', *args[args.index('self_supervised_swav')+1:]]
        assert name == 'swav'
        if args[0] in ('--version','--help'): return
        code, said, _ = command(args[0], '--help')
        assert code == 0
        for o in args:
            if o.startswith('-'): assert re.search(rf'(?<![\w-]){re.escape(o)}(?![\w-])', said), o

def anchors(path):
    "The anchors that GitHub gives the headings of a Markdown file"
    heads = re.findall(r'^#+ (.+)$', re.sub(fenced, '', path.read_text(encoding='utf-8'), flags=re.M|re.S), re.M)
    return {re.sub(r'[^\w\- ]', '', h).strip().lower().replace(' ', '-') for h in heads}

def test_links_lead_somewhere():
    links = re.findall(r'\]\(([^)\s]+)\)', text)
    local = [l.partition('#') for l in links if not l.startswith('http')]
    assert local
    for path, _, anchor in local:
        assert (root/path).exists(), path
        if anchor: assert anchor in anchors(root/path), (path, anchor)

def test_pictures_have_a_text(): assert not re.findall(r'!\[\s*\]', text)

def test_figures_are_those_of_the_benchmarks():
    "Each accuracy in the table of few labels stands in the tables that the benchmarks wrote"
    table = next(t for t in re.split(r'\n\n', text) if '10,000 test images' in t)
    written = (root/'benchmarks'/'README.md').read_text(encoding='utf-8')
    measured = set(re.findall(r'(\d+\.\d) ±', written.split('<!-- clock, Fashion-MNIST:')[1]))
    figures = re.findall(r'(\d+\.\d)%', table)
    assert len(figures) > 10 and set(figures) <= measured

def test_figures_of_clip_art_are_those_of_the_benchmarks():
    drawings = next(o for o in re.split(r'\n\n', text) if 'drawings of clip art' in o)
    written = (root/'benchmarks'/'README.md').read_text(encoding='utf-8').split('<!-- clock, clip art:')[1]
    neighbors = [o.split('|')[2] for o in written.splitlines() if o.startswith('| ') and ' / ' in o.split('|')[2]]
    measured = {o for cell in neighbors for o in re.findall(r'(?<!± )\d+\.\d', cell)}
    figures = re.findall(r'\d+\.\d', drawings)
    assert len(figures) == 14 and set(figures) <= measured

def test_citation():
    "What GitHub and `cffconvert` require, for the version that this is"
    cff = yaml.safe_load((root/'CITATION.cff').read_text(encoding='utf-8'))
    assert {'cff-version', 'message', 'title', 'authors'} <= set(cff) and cff['title'] == 'self_supervised_swav'
    assert str(cff['version']) == self_supervised_swav.__version__
    paper = cff['preferred-citation']
    assert all(o['family-names'] in text for o in paper['authors']) and paper['title'] in text
    assert paper['url'].rsplit('/', 1)[1] in text
