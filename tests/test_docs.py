"""The documentation: what the converter makes of directives and docments, and what stands in the pages that `make docs`
builds: links, descriptions, alternative texts, nothing left over"""
import ast, dataclasses, inspect, json, os, re, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
import pytest
pytest.importorskip('nbdev')
import docs
from browser import needs_browser, open_page
from runner import find_notebooks
from self_supervised_swav import all as everything

root = Path(__file__).resolve().parent.parent

# --- the converter ---------------------------------------------------------------------------------------------------
def code_cell(source, *outputs): return dict(cell_type='code', metadata={}, source=source, outputs=list(outputs))
def md_cell(source): return dict(cell_type='markdown', metadata={}, source=source)
def stream(text, name='stdout'): return dict(output_type='stream', name=name, text=text)
picture = dict(output_type='display_data', metadata={}, data={'image/png': 'aGk=', 'text/plain': '<Figure>'})

def convert(*cells, links=None):
    return docs.convert(dict(cells=list(cells)), 'nbs/21_x.ipynb', 'reference/x', links or (lambda name, page: None))

def test_hidden_cells_are_absent():
    cells,text = convert(code_cell('#| hide\nsecret = 1'), code_cell('#| default_exp x'), code_cell('shown = 1'))
    assert [o['source'] for o in cells]==['shown = 1'] and 'secret' not in text

def test_exported_code_is_folded_behind_its_signature():
    source = '#| export\ndef f(a:int=1 # A count\n)->str: # Its name\n    "Says it"\n    return str(a)'
    [cell],text = convert(code_cell(source))
    above,below = cell['source'].split('<details')
    assert cell['cell_type']=='markdown' and 'return str(a)' in below and 'return' not in above.split('| returns')[0]
    assert 'f(a=1)' in above and '| `a` | `int` | `1` | A count |' in above
    assert '| returns | `str` |  | Its name |' in above
    assert '#|' not in cell['source'] and 'Says it' in text and 'return str(a)' not in text

def test_lessons_keep_outputs_but_not_stderr():
    [cell],text = convert(code_cell('#| slow\nprint(2)', stream('2\n'), stream('warned\n', 'stderr')))
    assert cell['source']=='print(2)' and [o['text'].strip() for o in cell['outputs']]==['2']
    assert '```\n2\n```' in text and 'warned' not in text

@pytest.mark.parametrize('flag,tags,n', [('echo: false', ['remove-input'], 1), ('output: false', [], 0),
                                         ('code-fold: true', ['hide-input'], 1), ('eval: false', [], 1)])
def test_directives(flag, tags, n):
    [cell],_ = convert(code_cell(f'#| {flag}\n1', picture))
    assert cell['metadata']['tags']==tags and len(cell['outputs'])==n and cell['source']=='1'

def test_every_picture_has_a_text():
    prose = md_cell('A table:\n\n| a |\n|---|\n\nTwo `crops` of each image:')
    [_,cell],_ = convert(prose, code_cell('show()', picture))
    assert cell['metadata']['mystnb']['image']['alt']=='Two crops of each image:'
    [cell],_ = convert(code_cell('#| fig-alt: A dog\nshow()', picture))
    assert cell['metadata']['mystnb']['image']['alt']=='A dog'
    assert 'text/plain' not in cell['outputs'][0]['data']

def test_entry_of_a_class():
    [e] = docs.entries_of('''class A(B):
    "First line"
    def __init__(self,
        # Above it,
        # two lines
        a:int,
        b='#', # Beside it
        *args, # More
        c=None,
        **kwargs # For `f`
    ):
        if a<0: raise ValueError(f"a must be positive, got {a}")
    def run(self, x=1): "Runs"
    @property
    def size(self): "Its size"
    def _private(self): "No"
''')
    assert e.signature=="A(a, b='#', *args, c=None, **kwargs)"
    assert [(n,d,c) for n,_,d,c in e.args]==[
        ('a','','Above it, two lines'), ('b',"'#'",'Beside it'), ('*args','','More'), ('c','None',''),
        ('**kwargs','','For `f`')]
    assert e.errors==[('ValueError','a must be positive, got {a}')]
    assert e.methods==[('A.run(x=1)','Runs'), ('A.size','Its size')]

def test_entries_of_patches_dataclasses_and_private_names():
    a,b,c = docs.entries_of('''@patch
def grow(self:Tree,
    n:int # Leaves
):
    "Grow"
@patch(as_prop=True)
def height(self:Tree): "In meters"
@dataclass
class Seed:
    "Small"
    kind:str # Of what
    n:int = 3 # How many
def _hidden(): "No"
@patch
def silent(self:Tree): return 1
''')
    assert (a.name,a.signature,b.signature)==('Tree.grow','Tree.grow(n)','Tree.height')
    assert c.signature=='Seed(kind, n=3)' and c.args[1]==('n','int','3','How many')

links = docs.Links({'sinkhorn': ('reference/sinkhorn','sinkhorn'), 'Learner.swav_report': ('reference/report','r')})

@pytest.mark.parametrize('text,want', [
    ('`sinkhorn`', '[`sinkhorn`](sinkhorn.html#sinkhorn)'),
    ('`sinkhorn(x)`', '[`sinkhorn(x)`](sinkhorn.html#sinkhorn)'),
    ('`learn.swav_report()`', '[`learn.swav_report()`](report.html#r)'),
    ('`Learner`', 'https://docs.fast.ai/learner.html'),
    ('`nn.Linear`', 'https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html'),
    ('`torch.export`', 'https://docs.pytorch.org/docs/stable/export.html'),
    ('`timm.create_model`', 'https://huggingface.co/docs/timm'),
    ('`kornia.augmentation.RandomCrop`', 'augmentation.module.html#kornia.augmentation.RandomCrop')])
def test_names_lead_to_their_pages(text, want): assert want in docs.linked(text, 'reference/x', links)

@pytest.mark.parametrize('text', ['[`sinkhorn`](a.html)', '# `sinkhorn`', '```python\n`sinkhorn`\n```',
                                  '`no_such_name`', '``sinkhorn``', '    `sinkhorn`'])
def test_names_that_are_left_alone(text): assert docs.linked(text, 'reference/x', links)==text

def test_links_between_files_are_links_between_pages():
    def of(text): return docs.relinked(text, 'nbs/explanations/queue.ipynb', 'explanations/queue')
    assert of('[a](sinkhorn.ipynb)')=='[a](sinkhorn.html)'
    assert of('[a](../21_swav.ipynb)')=='[a](../reference/swav.html)'
    assert of('[a](../../benchmarks/README.md#x)')=='[a](../benchmarks.html#x)'
    assert of('[a](nbs)')=='[a](../reference/index.html)'
    assert of('![a](../../benchmarks/clock.png)')==of('![a](benchmarks/clock.png)')=='![a](../benchmarks/clock.png)'
    assert of('[a](../../LICENSE)')=='[a](../files/LICENSE)' and of('[a](https://b.c)')=='[a](https://b.c)'

def test_title_and_line():
    assert docs.summary_of('# A `b`\n\n> One [line](x.html)\n\nMore.')==('A b','One line')
    assert docs.summary_of('# A\n\n<!-- no -->\n\n[`f`](x.html) makes it. And more.')==('A','f makes it')
    assert docs.summary_of('No title')[0]==''

def test_reference_has_every_public_name():
    names = [n for _,group in docs.public_names() for n in group]
    assert names==everything.__all__
    where,said = docs.own_names(docs.sources())
    assert not [n for n in names if n not in where or not said[n]]

written = sorted((root/'docs').glob('*.md'))

@pytest.mark.parametrize('path', written, ids=lambda p: p.stem)
def test_python_on_hand_written_pages(path):
    "It parses, and the public names in it take the arguments that it gives"
    blocks = re.findall(r'^```python\n(.*?)^```$', path.read_text(encoding='utf-8'), re.M|re.S)
    for node in [o for b in blocks for o in ast.walk(ast.parse(b)) if isinstance(o, ast.Call)]:
        name = getattr(node.func, 'id', None)
        if name not in everything.__all__: continue
        known = inspect.signature(getattr(everything, name)).parameters
        assert {o.arg for o in node.keywords} <= known.keys(), ast.unparse(node)

def test_our_names_beside_those_of_others():
    "Each argument in a right column of `Coming from` is one that a public name or a command has"
    from self_supervised_swav import args
    text = (root/'docs'/'coming-from.md').read_text(encoding='utf-8')
    fit = everything.Learner.fit_warmup_cos
    known = {p for n in everything.__all__ if callable(f := getattr(everything, n))
             and not (isinstance(f, type) and issubclass(f, BaseException))
             for p in (n, *inspect.signature(f).parameters)}
    known |= {*inspect.signature(fit).parameters, 'fit_warmup_cos','to_fp16','to_bf16','sync_bn'}
    options = {f.name.replace('_', '-') for f in dataclasses.fields(args.PretrainArgs)} | {'set'}
    rows = re.findall(r'^\| .* \| (.*) \|$', text, re.M)
    ours = [o for r in rows if not re.match(r'-|`?swav', r) for o in re.findall(r'`([^`]+)`', r)]
    assert len(ours)>60
    for o in ours:
        if o.startswith('--'): assert o.split()[0][2:] in options, o
        elif m := re.match(r'(?:[A-Za-z]+\.)*([A-Za-z_]\w*)(?:\((.*)\))?$', o):
            if m[1] in ('swav','show','distrib_ctx','resnet50w2','Learner'): continue
            assert m[1] in known, o
            for a in re.findall(r'([a-z]\w*)(?==|,|$)', m[2] or ''): assert a in known, (o, a)

# --- the pages -------------------------------------------------------------------------------------------------------
class Reader(HTMLParser):
    "Links, anchors, pictures, description and words of a page"
    def __init__(self, text):
        super().__init__()
        self.links,self.ids,self.pictures,self.needs,self.words,self.inside = [],set(),[],[],[],[]
        self.title,self.description = '',''
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        o = dict(attrs)
        if 'id' in o: self.ids.add(o['id'])
        if tag=='a' and 'href' in o: self.links.append(o['href'])
        if tag=='img': self.pictures.append((o.get('src'), o.get('alt')))
        if tag=='meta' and o.get('name')=='description': self.description = o['content']
        if tag=='script' and 'src' in o: self.needs.append(o['src'])
        if tag=='link' and o.get('rel')=='stylesheet': self.needs.append(o['href'])
        if tag in ('title','script','style','pre','code'): self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1]==tag: self.inside.pop()

    def handle_data(self, text):
        if 'title' in self.inside: self.title += text
        if {'script','style'} & set(self.inside): return
        self.words.append((text, 'pre' in self.inside or 'code' in self.inside))

@pytest.fixture(scope='module')
def site():
    "The site, built anew; with SWAV_SITE=1 the one that `make docs` has built"
    for name in ('sphinx','myst_nb','furo'): pytest.importorskip(name, reason='`make docs` installs it')
    if not os.environ.get('SWAV_SITE'):
        res = subprocess.run([sys.executable, 'tools/docs.py'], cwd=root, capture_output=True, text=True)
        assert res.returncode==0, res.stdout+res.stderr
    return root/'_site'

@pytest.fixture(scope='module')
def pages(site): return {p: Reader(p.read_text(encoding='utf-8')) for p in sorted(site.rglob('*.html'))}

@pytest.mark.parametrize('path', find_notebooks(), ids=lambda p: p.stem)
def test_each_picture_has_its_own_text(path):
    "What a cell draws is said for those who cannot see it"
    silent = [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells']
              if any('image/png' in o.get('data', {}) for o in c.get('outputs', [])) and
              '#| fig-alt: ' not in ''.join(c['source'])]
    assert not silent

@pytest.mark.slow
def test_no_link_is_broken(site, pages):
    broken = []
    for p,page in pages.items():
        for link in [*page.links, *page.needs, *(src for src,_ in page.pictures)]:
            path,_,anchor = unquote(link).partition('#')
            if re.match(r'[a-z]+:', link): continue
            target = (p.parent/path.partition('?')[0]).resolve() if path else p
            if not target.exists(): broken.append((p.name, link))
            elif anchor and target.suffix=='.html' and anchor not in pages[target].ids: broken.append((p.name, link))
    assert not broken

@pytest.mark.slow
def test_every_page_says_what_it_is(pages):
    own = {p: o for p,o in pages.items() if p.name not in ('search.html','genindex.html')}
    assert len(own)>50
    assert not [p for p,o in own.items() if not (o.title.strip() and o.description.strip())]
    assert not [(p.name, src) for p,o in own.items() for src,alt in o.pictures if not (alt or '').strip()]

@pytest.mark.slow
def test_nothing_is_left_over(site, pages):
    "No directive, no Markdown that was not understood, no path of this machine"
    for p,page in pages.items():
        text = ''.join(o for o,_ in page.words)
        prose = ''.join(o for o,is_code in page.words if not is_code)
        assert not re.search(r'^#\|', text, re.M) and '```' not in prose and '\n:::' not in prose, p
        assert not re.search(r'\]\([\w./-]+\.html', text), p
        assert not re.search(r'\]\([\w./#-]+\)', prose), (p, re.search(r'.{40}\]\([\w./#-]+\)', prose))
        assert str(root) not in text and '/site-packages/' not in text and str(Path.home())+'/' not in text, p

@pytest.mark.slow
def test_pages_are_light(site, pages):
    "Below 1 MB with all that a page shows, on its first visit"
    def size(p, page):
        parts = [*page.needs, *(src for src,_ in page.pictures)]
        parts = {(p.parent/unquote(o).partition('?')[0]).resolve() for o in parts}
        return p.stat().st_size + sum(o.stat().st_size for o in parts)
    heavy = {p.name: size(p, page) for p,page in pages.items() if p.name not in ('search.html','genindex.html')}
    assert not {k: v for k,v in heavy.items() if v>1_000_000}

@pytest.mark.slow
def test_text_for_programs(site, pages):
    short,full = [(site/o).read_text(encoding='utf-8') for o in ('llms.txt','llms-full.txt')]
    assert short.startswith('# self_supervised_swav\n\n> ')
    listed = re.findall(r'^- \[[^\]]+\]\(([^)]+)\): .+$', short, re.M)
    assert len(listed)>50 and all((site/o).exists() for o in listed) and all(f'<!-- {o} -->' in full for o in listed)
    assert '<details' not in full and 'iVBORw0' not in full

@pytest.mark.slow
@needs_browser
def test_in_a_browser(site):
    "Nothing is asked of the network, nothing is wider than the window, text has room, and the search works from files"
    wide = """[...document.querySelectorAll('article img')].filter(o =>
        o.getBoundingClientRect().width>o.closest('article').getBoundingClientRect().width).map(o => o.src)"""
    squeezed = """[...document.querySelectorAll('td')].filter(o =>
        o.innerText.length>40 && o.getBoundingClientRect().width<100).map(o => o.innerText)"""
    for width in (390,1000,1600):
        with open_page(site/'index.html', width=width) as page:
            for path in sorted(site.rglob('*.html')):
                page.goto(path)
                assert page.ok, (path, page.errors, page.outside)
                assert page.eval('document.documentElement.scrollWidth')<=width, path
                assert page.eval(wide)==[] and page.eval(squeezed)==[], (path, width)
    with open_page(site/'search.html') as page:
        page.goto((site/'search.html').as_uri()+'?q=sinkhorn')
        page.wait('document.querySelectorAll("#search-results li").length>1', 20)
        assert page.ok, (page.errors, page.outside)
