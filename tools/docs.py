"""Build the documentation into `_site/`: `python tools/docs.py`. Notebooks are converted, as nbdev's directives say, to
notebooks that myst-nb shows with the outputs they keep; nothing is run and nothing is downloaded"""
import ast, json, posixpath, re, shutil, sys, tokenize
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path, PurePosixPath
from readme import images

root = Path(__file__).resolve().parent.parent
made,site = root/'build'/'docs',root/'_site'
package = 'self_supervised_swav'
# Markdown that becomes pages as it is: file, page, and the line that describes it where the file has none
files = {'benchmarks/README.md': ('benchmarks', 'Speed, memory and accuracy beside other packages, with how each was '
                                  'measured'),
         'CHANGELOG.md': ('changelog', 'What each version brought, and what it broke'),
         'DEV.md': ('contributing', 'Where everything lives, what must always hold, how to add a method'),
         'SECURITY.md': ('security', 'What is trusted, what is not, and how to report')}

# --- names and links -------------------------------------------------------------------------------------------------
def page_of(path):
    "The page, without ending, that a source becomes; None if it becomes none: `reference/swav` for nbs/21_swav.ipynb"
    path = PurePosixPath(path)
    if path.as_posix() in files: return files[path.as_posix()][0]
    if path.parts[:1]==('docs',) and path.suffix=='.md': return path.relative_to('docs').with_suffix('').as_posix()
    if path.parts[:1]!=('nbs',) or path.suffix!='.ipynb': return None
    own = path.relative_to('nbs').with_suffix('')
    return re.sub(r'^\d+_', 'reference/', own.as_posix())

# Where others explain their names; a pattern for the whole name, and the address
_known = [(r'torch\.nn\.functional\.\w+|torch\.(nn\.)?\w+', 'https://docs.pytorch.org/docs/stable/generated/{}.html'),
          (r'kornia\.augmentation\.\w+', 'https://kornia.readthedocs.io/en/latest/augmentation.module.html#{}'),
          (r'timm\.(create_model|list_models)', 'https://huggingface.co/docs/timm/reference/models'),
          (r'timm\.optim\.\w+', 'https://huggingface.co/docs/timm/reference/optimizers')]
_pages = 'torch.{}', 'https://docs.pytorch.org/docs/stable/{}.html', ('export','hub','distributed','compile')

class Links:
    "What a name in backquotes leads to; `own` has `name: (page, anchor)`"
    def __init__(self, own): self.own,self._fastai = own,None

    def fastai(self, name):
        if self._fastai is None:
            from nbdev.doclinks import NbdevLookup
            self._fastai = NbdevLookup(incl_libs='fastai', strip_libs='fastai')
        return self._fastai.doc(name)

    def __call__(self, text, page):
        "The address for what stands between backquotes on `page`, or None"
        m = re.fullmatch(r'([A-Za-z_][\w.]*)(\(.*\))?', text)
        if m is None: return None
        name = re.sub(r'^learn\.(?=\w+$)', 'Learner.', m[1])
        name = re.sub(r'^F\.(?=\w+$)', 'torch.nn.functional.', re.sub(r'^nn\.(?=\w+$)', 'torch.nn.', name))
        if name in self.own: return relative(page, *self.own[name])
        if name.startswith('torch.') and name[6:] in _pages[2]: return _pages[1].format(name[6:])
        for pattern,address in _known:
            if re.fullmatch(pattern, name): return address.format(name)
        return self.fastai(name) if '.' in name or name[0].isupper() or '_' in name else None

def relative(page, other, anchor=''):
    "The link from a page to another"
    path = '' if other==page else posixpath.relpath(f'{other}.html', posixpath.dirname(page) or '.')
    return path + (f'#{anchor}' if anchor else '')

def anchor_of(name): return name.replace('_', '-').lower().replace('.', '-')

def outside_code(text, change):
    "`change` applied to the parts of Markdown that are not in a fence, nor indented as code"
    parts = re.split(r'(^```.*?^```[^\n]*$|^ {4}[^\n]*$)', text, flags=re.M|re.S)
    return ''.join(o if i%2 else change(o) for i,o in enumerate(parts))

def linked(text, page, links):
    "Names in backquotes as links, where they are not in a link or a heading already"
    def name(m):
        url = m[1] and links(m[1], page)
        return f'[{m[0]}]({url})' if url else m[0]
    # a link or a heading is passed over whole
    def change(part): return re.sub(r'\[[^\]\n]*\]\([^)\n]*\)|^#+ .*$|(?<!`)`([^`\n]+)`(?!`)', name, part, flags=re.M)
    return outside_code(text, change)

def relinked(text, source, page):
    "Links to files of the repository as links to their pages; to a file without a page, as its name"
    def change(part): return re.sub(r'(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)', one, part)
    def one(m):
        for base in (PurePosixPath(source).parent, PurePosixPath('.')):
            target = posixpath.normpath((base/m[3]).as_posix())
            if m[1]:
                if target.startswith('benchmarks/'): return f'![{m[2]}]({"../"*page.count("/")}{target})'
                continue
            if other := ('reference/index' if target=='nbs' else page_of(target)):
                if (root/target).exists(): return f'[{m[2]}]({relative(page, other, (m[4] or "#")[1:])})'
            if (root/target).is_file(): return f'[{m[2]}]({"../"*page.count("/")}files/{target})'
        return m[0] if m[1] or (made/page).parent.joinpath(m[3]).exists() or m[3].endswith('.html') else m[2]
    return outside_code(text, change)

# --- what a cell of exported code shows ------------------------------------------------------------------------------
def comments_of(source):
    "Line to its comment, and the lines that hold nothing else"
    found,alone = {},set()
    for o in tokenize.generate_tokens(StringIO(source).readline):
        if o.type==tokenize.COMMENT:
            found[o.start[0]] = o.string.lstrip('# ').rstrip()
            if not o.line[:o.start[1]].strip(): alone.add(o.start[0])
    return found,alone

def comment_at(line, first, found, alone):
    "The comment beside an argument that ends on `line`, or on the lines above its first"
    if line in found and line not in alone: return found[line]
    above = []
    while (first := first-1) in alone: above.insert(0, found[first])
    return ' '.join(above)

def errors_of(node):
    "(class, message) of each error that a function raises itself"
    found = []
    for o in ast.walk(node):
        if isinstance(o, ast.Raise) and isinstance(o.exc, ast.Call) and o.exc.args:
            text = o.exc.args[0]
            if isinstance(text, ast.JoinedStr):
                text = ''.join(v.value if isinstance(v, ast.Constant) else f'{{{ast.unparse(v.value)}}}'
                               for v in text.values)
            elif isinstance(text, ast.Constant): text = str(text.value)
            else: continue
            found.append((ast.unparse(o.exc.func), re.sub(r'\s+', ' ', text)))
    return list(dict.fromkeys(found))

@dataclass
class Entry:
    "What is known of a function or class from its source"
    name:str
    kind:str
    signature:str
    doc:str
    args:list = field(default_factory=list) # (name, type, default, comment)
    returns:tuple = ()
    errors:list = field(default_factory=list)
    methods:list = field(default_factory=list) # (signature, first line)

def _args(f, found, alone, skip_first):
    a = f.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None]*(len(plain)-len(a.defaults))+a.defaults
    rows = [*zip(plain, defaults)] + ([(a.vararg,None)] if a.vararg else []) + [*zip(a.kwonlyargs, a.kw_defaults)]
    rows += [(a.kwarg,None)] if a.kwarg else []
    stars = {id(a.vararg): '*', id(a.kwarg): '**'}
    return [(stars.get(id(o), '')+o.arg, ast.unparse(o.annotation) if o.annotation else '',
             ast.unparse(d) if d else '', comment_at((d or o).end_lineno, o.lineno, found, alone))
            for o,d in rows[skip_first:]]

def _call(name, args):
    return f'{name}(' + ', '.join(n+(f'={d}' if d else '') for n,_,d,_ in args) + ')'

def _is(node, name): return any(ast.unparse(d).split('(')[0].split('.')[-1]==name for d in node.decorator_list)

def entries_of(source, values=()):
    """Entries of the public functions, classes and patches that a cell defines, for which there is something to say,
    and of the assignments to `values`"""
    from nbdev.doclinks import patch_name
    found,alone = comments_of(source)
    entries,tree = [],ast.parse(source)
    docs = {o.name: ast.get_docstring(o) or '' for o in tree.body if isinstance(o, (ast.FunctionDef,ast.ClassDef))}
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in values:
            name = ast.unparse(node.targets[0])
            made_by = ast.unparse(node.value).split('(')[0]
            entries.append(Entry(name, 'value', ast.unparse(node), found.get(node.lineno) or docs.get(made_by, '')))
        if not isinstance(node, (ast.FunctionDef,ast.ClassDef)): continue
        names = patch_name(node)
        name = names if isinstance(names, str) else names[0]
        if any(o.startswith('_') for o in name.split('.')): continue
        doc = ast.get_docstring(node) or ''
        if isinstance(node, ast.ClassDef):
            init = next((o for o in node.body if isinstance(o, ast.FunctionDef) and o.name=='__init__'), None)
            if init: args = _args(init, found, alone, 1)
            else: args = [(o.target.id, ast.unparse(o.annotation), ast.unparse(o.value) if o.value else '',
                           comment_at(o.end_lineno, o.lineno, found, alone))
                          for o in node.body if isinstance(o, ast.AnnAssign) and isinstance(o.target, ast.Name)]
            e = Entry(name, 'class', _call(name, args), doc, args, errors=errors_of(init) if init else [])
            for o in node.body:
                if isinstance(o, ast.FunctionDef) and not o.name.startswith('_') and ast.get_docstring(o):
                    own = _args(o, found, alone, 0 if _is(o, 'staticmethod') else 1)
                    sig = f'{name}.{o.name}' if _is(o, 'property') else _call(f'{name}.{o.name}', own)
                    e.methods.append((sig, ast.get_docstring(o).split('\n\n')[0].replace('\n', ' ')))
        else:
            args = _args(node, found, alone, int(name!=node.name))
            end = node.body[0].lineno
            said = next((found[i] for i in range(end-1, node.lineno-1, -1) if i in found
                         and i not in alone and i>max([0]+[o.end_lineno for o in ast.walk(node.args)
                                                           if hasattr(o, 'end_lineno')])), '')
            returns = (ast.unparse(node.returns) if node.returns else '', said)
            prop = any('as_prop' in ast.unparse(d) for d in node.decorator_list) or _is(node, 'property')
            e = Entry(name, 'property' if prop else 'function', name if prop else _call(name, args), doc, args,
                      returns if any(returns) else (), errors_of(node))
        if e.doc or any(o[3] for o in e.args): entries.append(e)
    return entries

def _cell(text): return text.replace('\n', ' ').replace('|', '\\|')

def code(text): return f'`{text}`' if text else ''

def as_markdown(e, page, links, level=3):
    "An entry as Markdown: heading with its anchor, signature, docstring, tables"
    def say(text): return linked(text, page, links)
    sig = e.signature if len(e.signature)<=88 else (
        e.signature.split('(')[0]+'(\n    '+',\n    '.join(n+(f'={d}' if d else '') for n,_,d,_ in e.args)+')')
    parts = [f'({anchor_of(e.name)})=\n{"#"*level} `{e.name}`', f'```python\n{sig}\n```']
    if e.doc: parts.append(say(e.doc))
    rows = [(code(n), code(t), code(d), say(c)) for n,t,d,c in e.args if c or t]
    if e.returns: rows.append(('returns', code(e.returns[0]), '', say(e.returns[1])))
    if rows:
        parts.append('| argument | type | default | |\n|---|---|---|---|\n' +
                     '\n'.join('| '+' | '.join(map(_cell, r))+' |' for r in rows))
    if e.methods:
        parts.append('| method | |\n|---|---|\n' + '\n'.join(f'| {_cell(code(s))} | {_cell(say(t))} |'
                                                             for s,t in e.methods))
    if e.errors:
        parts.append('| error | says |\n|---|---|\n' + '\n'.join(f'| {code(k)} | {_cell(code(t.replace("`", "")))} |'
                                                                 for k,t in e.errors))
    return '\n\n'.join(parts)

# --- a notebook ------------------------------------------------------------------------------------------------------
def split_directives(source):
    "`({'hide': '', 'fig-alt': 'text'}, source without them)`"
    found = dict((k, v.strip()) for k,v in re.findall(r'^#\|[ ]*([\w-]+)[ :]*(.*)$', source, re.M))
    return found, re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip('\n')

def summary_of(text):
    "The title and the `> one line` of a page; without such a line, its first sentence"
    title = re.search(r'^# (.+)$', text, re.M)
    rest = text[title.end():] if title else text
    line = re.search(r'^> (.+)$', rest, re.M) or re.search(r'^((?=\w|`|\[\S)[^\n]+?)(?:\.(?=\s)|\n|$)', rest, re.M)
    plain = re.sub(r'`|\*\*', '', re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', line[1])) if line else ''
    return title[1].strip().replace('`', '') if title else '', plain

def plain_words(md):
    "The last paragraph of some Markdown as plain text, for a picture that has no text of its own"
    paras = [o for o in re.split(r'\n\s*\n', md) if o.strip() and not re.match(r'[#|>`<$]', o.strip())]
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)|[`*$\\]', r'\1', paras[-1]) if paras else ''
    return re.sub(r'\s+', ' ', re.sub(r'^[-\d.]+ ', '', text)).strip()[:220]

def as_text(outputs):
    "What the outputs say, for readers without pictures"
    from run_nb import as_shown
    texts = []
    for o in outputs:
        if o['output_type']=='stream': texts.append(''.join(o['text']) if o.get('name')=='stdout' else '')
        elif 'text/plain' in o.get('data', {}) and 'image/png' not in o['data']:
            texts.append(''.join(o['data']['text/plain']))
    return as_shown('\n'.join(o.rstrip() for o in texts if o.strip()))

def cleaned(outputs):
    "Outputs without what is said to stderr, without the object that a picture came from, and without empty ones"
    from run_nb import as_shown
    kept = []
    for o in outputs:
        if o['output_type']=='stream':
            if o.get('name')!='stdout' or not ''.join(o['text']).strip(): continue
            o = o | dict(text=as_shown(''.join(o['text'])))
        elif 'image/png' in (data := o.get('data', {})): o = o | dict(data={'image/png': data['image/png']})
        elif 'text/html' in data:
            html = re.sub(r'<style.*?</style>\s*', '', ''.join(data['text/html']), flags=re.S)
            o = o | dict(data=data | {'text/html': html})
        kept.append(o)
    return kept

def convert(nb, source, page, links, values=()):
    "The cells of a page, and the page as plain Markdown"
    cells,text,level,before = [],[],1,''
    def md(s): cells.append(dict(cell_type='markdown', metadata={}, source=s))
    for cell in nb['cells']:
        flags,src = split_directives(''.join(cell['source']))
        if 'hide' in flags or 'default_exp' in flags or not src.strip(): continue
        if cell['cell_type']=='markdown':
            src = linked(relinked(src, source, page), page, links)
            heads = re.findall(r'^(#+) ', re.sub(r'^```.*?^```', '', src, flags=re.M|re.S), re.M)
            level,before = len(heads[-1]) if heads else level,plain_words(src) or before
            md(src)
            text.append(src)
        elif {'export','exporti'} & set(flags):
            entries = entries_of(src, values)
            shown = [as_markdown(e, page, links, min(level+1, 4)) for e in entries]
            names = [o.name for o in ast.parse(src).body if isinstance(o, (ast.FunctionDef,ast.ClassDef))]
            what = 'Code' if entries else f'Code: {", ".join(names)}' if names else 'Imports' if re.match(
                r'(import|from) ', src) else 'Code'
            fold = f'<details class="code"><summary>{what}</summary>\n\n```python\n{src}\n```\n\n</details>'
            md('\n\n'.join([*shown, fold]))
            text += shown
        else:
            outputs = [] if flags.get('output')=='false' else cleaned(cell.get('outputs', []))
            tags = ['remove-input'] if flags.get('echo')=='false' else ['hide-input']*('code-fold' in flags)
            alt = flags.get('fig-alt') or before or f'What {src.splitlines()[-1]} draws'
            cells.append(dict(cell_type='code', metadata=dict(tags=tags, mystnb=dict(image=dict(alt=alt))),
                              execution_count=None, source=src, outputs=outputs))
            if 'remove-input' not in tags: text.append(f'```python\n{src}\n```')
            if said := as_text(outputs): text.append(f'```\n{said}\n```')
    return cells,'\n\n'.join(text)

# --- the site --------------------------------------------------------------------------------------------------------
def public_names():
    "The groups of `all.__all__`: (heading, names), from the comments in it"
    source = (root/package/'all.py').read_text(encoding='utf-8')
    block,groups = source.split('__all__ = [')[1].split(']')[0],[]
    for line in block.splitlines():
        if m := re.match(r'\s*# (.+)', line): groups.append((m[1], []))
        elif line.strip(): groups[-1][1].extend(re.findall(r"'(\w+)'", line))
    return groups

def own_names(nbs):
    "`{name: (page, anchor)}` and `{name: first line}` for what the notebooks define; names of the modules, too"
    where,said = {},{}
    values = {n for _,names in public_names() for n in names}
    for path,nb in nbs.items():
        page = page_of(path)
        for cell in nb['cells']:
            flags,src = split_directives(''.join(cell['source']))
            if cell['cell_type']!='code' or not {'export','exporti'} & set(flags): continue
            for e in entries_of(src, values):
                # the commands' functions have names of everyday words
                if page=='reference/cli' and e.name!='main': continue
                where.setdefault(e.name, (page, anchor_of(e.name)))
                said.setdefault(e.name, e.doc.split('\n\n')[0].replace('\n', ' '))
    return where,said

def reference_index(where, said, pages):
    "The page on which every public name is, in the order in which data passes through them"
    out = ['# Reference', '> Every public name, in the order in which images pass through the package, and every '
           'module below', '`from self_supervised_swav.all import *` brings these names. `name?` in a notebook, and '
           'the pages below, tell the arguments.']
    for head,names in public_names():
        rows = []
        for n in names:
            page,anchor = where[n]
            rows.append(f'| [`{n}`]({relative("reference/index", page, anchor)}) | {_cell(said[n])} |')
        out += [f'## {head[0].upper()+head[1:]}', '| | |\n|---|---|\n'+'\n'.join(rows)]
    rows = [f'| [`{p.split("/")[1]}`]({relative("reference/index", p)}) | {_cell(d)} |' for p,(_,d) in pages]
    out += ['## Modules', 'From formulas to the command line: a module uses only those above it.',
            '| | |\n|---|---|\n'+'\n'.join(rows)]
    return '\n\n'.join(out)

def toctree(caption, pages):
    return f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n' + '\n'.join(pages) + '\n```'

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')

def sources():
    "Notebooks of the site, as `{path: content}`, in their order"
    paths = [p for p in sorted((root/'nbs').rglob('*.ipynb')) if not any(o[0] in '._' for o in p.parts[-2:])]
    return {p.relative_to(root).as_posix(): json.loads(p.read_text(encoding='utf-8')) for p in paths}

def prepare():
    "Write what Sphinx reads into build/docs, and return (page, title, description, text) of each page"
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(root/'docs', made, ignore=shutil.ignore_patterns(images.name))
    shutil.copytree(root/images, made/images.name)
    (made/'benchmarks').mkdir()
    for picture in (root/'benchmarks').glob('*.png'): shutil.copy(picture, made/'benchmarks')
    nbs = sources()
    where,said = own_names(nbs)
    links,pages = Links(where),[]
    values = {n for _,names in public_names() for n in names}
    for src in (root/'docs').rglob('*.md'):
        rel = src.relative_to(root).as_posix()
        add_markdown(src.read_text(encoding='utf-8'), rel, page_of(rel), links, pages)
    for rel,(page,line) in files.items():
        text = (root/rel).read_text(encoding='utf-8')
        if not summary_of(text)[1]: text = re.sub(r'^(# .+)$', rf'\1\n\n> {line}', text, count=1, flags=re.M)
        add_markdown(text, rel, page, links, pages)
    for path,nb in nbs.items():
        cells,text = convert(nb, path, page_of(path), links, values)
        add_page(page_of(path), text, pages)
        if page_of(path)=='index': home = cells
        else: write_notebook(page_of(path), cells)
    found = {p: (t, d) for p,t,d,_ in pages}
    modules = [(page_of(p), found[page_of(p)]) for p in nbs if page_of(p).startswith('reference/')]
    text = reference_index(where, said, modules)
    write(made/'reference'/'index.md', text+'\n\n'+toctree('Modules', [p.split('/')[1] for p,_ in modules]))
    add_page('reference/index', text, pages)
    def of(folder): return sorted(p for p in found if p.startswith(folder+'/'))
    by_hand = {page_of(f'docs/{p.name}') for p in (root/'docs').glob('*.md')}
    pages_of_docs = [o for o in ('how-to','encoders','coming-from') if o in found]
    pages_of_docs += sorted(by_hand-{'start',*pages_of_docs})
    first = [o for o in ('folder_to_answer','your_own_images','few_labels','large_scale') if f'tutorials/{o}' in found]
    tutorials = [*(f'tutorials/{o}' for o in first), *(o for o in of('tutorials') if o.split('/')[1] not in first)]
    trees = [('Start', ['start']), ('Tutorials', tutorials), ('How-to', pages_of_docs),
             ('Explanations', of('explanations')), ('Reference', ['reference/index']),
             ('Benchmarks', ['benchmarks']), ('Project', ['changelog','contributing','security'])]
    home += [dict(cell_type='markdown', metadata={}, source=toctree(c, o)) for c,o in trees if o]
    write_notebook('index', home)
    order = ['index', *(p for _,o in trees for p in o), *(p for p,_ in modules)]
    return sorted(pages, key=lambda o: order.index(o[0]))

def write_notebook(page, cells):
    meta = dict(kernelspec=dict(display_name='python3', language='python', name='python3'),
                language_info=dict(name='python'))
    cells = [o | dict(id=f'c{i}') for i,o in enumerate(cells)]
    write(made/f'{page}.ipynb', json.dumps(dict(cells=cells, metadata=meta, nbformat=4, nbformat_minor=5)))

def add_markdown(text, rel, page, links, pages):
    text = linked(relinked(text, rel, page), page, links)
    write(made/f'{page}.md', text)
    add_page(page, text, pages)

def add_page(page, text, pages):
    title,line = summary_of(text)
    if not (title and line): raise ValueError(f"{page} must begin with `# title` and `> one line`, got {text[:80]!r}")
    pages.append((page, title, line, text))

def llms(pages):
    "`llms.txt` (https://llmstxt.org) and all pages in one text"
    title,line = next((t, d) for p,t,d,_ in pages if p=='index')
    short = f'# {title}\n\n> {line}\n\n' + '\n'.join(f'- [{t}]({p}.html): {d}' for p,t,d,_ in pages) + '\n'
    def anchors_out(text): return re.sub(r'^\([\w-]+\)=\n', '', text, flags=re.M)
    full = '\n\n'.join(f'<!-- {p}.html -->\n\n{anchors_out(text)}' for p,_,_,text in pages) + '\n'
    return short,full

def main():
    from sphinx.cmd.build import build_main
    pages = prepare()
    write(made/'descriptions.json', json.dumps({p: d for p,_,d,_ in pages}))
    for o in map(root.joinpath, ('LICENSE','CITATION.cff','settings.ini','docs/cluster/slurm.sh',
                                 'docs/cluster/pytorchjob.yaml')):
        write(made/'extra'/'files'/o.relative_to(root), o.read_text(encoding='utf-8'))
    # doctrees too: labels of an older version would count as doubles
    for o in (site, root/'build'/'html', root/'build'/'doctrees'): shutil.rmtree(o, ignore_errors=True)
    built = root/'build'/'html'  # myst-nb writes a folder beside it
    rc = build_main(['-q', '-W', '--keep-going', '-d', str(root/'build'/'doctrees'), str(made), str(built)])
    if rc: return rc
    built.rename(site)
    for name,text in zip(('llms.txt','llms-full.txt'), llms(pages)): write(site/name, text)
    write(site/'.nojekyll', '')
    shutil.rmtree(site/'_sources', ignore_errors=True)
    print(f'Wrote {site.relative_to(root)}: {len(pages)} pages; open {site.relative_to(root)}/index.html')

if __name__ == '__main__': sys.exit(main())
