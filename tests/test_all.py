"The face of the package: what a user writes, no name that hides another one, and rooms that keep to their own."
import ast, builtins, dataclasses, inspect, re
from pathlib import Path
import fastai.vision.all, pytest
import self_supervised_swav.all as face
from self_supervised_swav import args

pkg = Path(face.__file__).parent
sources = {p.stem: p.read_text(encoding='utf-8') for p in sorted(pkg.glob('*.py'))}
by_hand = {'__init__','__main__','_modidx','all'}
not_in_all = {'args','cli','images','collectives','doctor','drawings','feed','files','kmeans','pages','randomness',
              'ranks','samples'}  # for those who build on the package

def star(): return vars_after('from self_supervised_swav.all import *')
def vars_after(code):
    names = {}
    exec(code, names)
    return {k: v for k,v in names.items() if k!='__builtins__'}

def test_star_gives_the_face():
    assert sorted(star())==sorted(face.__all__) and len(set(face.__all__))==len(face.__all__)
    assert len(face.__all__)<=100, 'a name more is a name more to read: does a user write it in a notebook?'

def test_nothing_is_hidden():
    "No name of fastai's face or of Python, unless it is the very same thing"
    theirs = vars_after('from fastai.vision.all import *')
    assert [k for k,v in star().items() if hasattr(builtins, k) or k in theirs and theirs[k] is not v]==[]
    assert 'Learner' in theirs and hasattr(fastai.vision.all, 'vision_learner')  # the check has something to find

def test_every_name_says_what_it_is():
    for k,v in star().items():
        assert inspect.getdoc(v), f'{k} has no docstring'
        assert v.__module__.startswith('self_supervised_swav.'), f'{k} comes from {v.__module__}'

def example_of(f):
    return inspect.cleandoc('\n'.join(l for l in (inspect.getdoc(f) or '').splitlines() if l[:4]=='    '))

has_example = sorted(k for k,v in star().items() if example_of(v) and '(' in example_of(v))

def test_every_name_has_an_example():
    "All but a placeholder, words for a choice, what is raised, and the class that methods are made of"
    assert star().keys()-set(has_example)=={'no_targets','PoolingType','CollapseWarning','TrainingStopped','MultiView'}

def arguments_of(f):
    "The names of all arguments of `f`, where its `kwargs` are those of a command"
    found = re.search(r'\*\*kwargs *# Other arguments of `(\w+Args)`', inspect.getsource(f))
    if found: return {o.name for o in dataclasses.fields(getattr(args, found[1]))}|{*inspect.signature(f).parameters}

@pytest.mark.parametrize('name', has_example)
def test_examples_of_docstrings(name):
    "It uses the name itself, and every call of ours has arguments that exist"
    names,nodes = star(),list(ast.walk(ast.parse(example_of(star()[name]))))
    assert name in {n.id for n in nodes if isinstance(n, ast.Name)}
    for n in nodes:
        if isinstance(n, ast.Call) and (f := names.get(getattr(n.func, 'id', ''))):
            inspect.signature(f).bind(*n.args, **{k.arg: k.value for k in n.keywords})
            assert (known := arguments_of(f)) is None or {k.arg for k in n.keywords}<=known

def test_every_module_is_in_all():
    "Its patches reach the Learner only if it is imported"
    nodes = ast.walk(ast.parse(sources['all']))
    imported = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.level}
    assert imported==sources.keys()-by_hand-not_in_all

def test_every_method_has_its_report():
    from fastai.learner import Learner
    for name in ('swav','simclr','moco','deepclusterv2'):
        assert getattr(Learner, f'{name}_report') is Learner.pretrain_report

def test_old_names():
    for name in ('draw_prototypes','draw_neighbours','nearest_images','ImageSample','atomic_path'):
        with pytest.warns(DeprecationWarning, match=f'{name} is no longer in all: from self_supervised_swav'):
            assert callable(getattr(face, name))
    with pytest.raises(AttributeError, match="has no attribute 'draw_everything'"): face.draw_everything
    with pytest.raises(ImportError): exec('from self_supervised_swav.all import draw_everything')

def private_imports(source):
    "Private names that `source` takes from another module of the package, by import or by attribute"
    modules = {}
    for n in ast.walk(ast.parse(source)):
        if isinstance(n, ast.ImportFrom) and (n.level or (n.module or '').startswith('self_supervised_swav')):
            for o in n.names:
                if o.name.startswith('_') and not o.name.startswith('__'): yield f'{n.module}.{o.name}'
                modules[o.asname or o.name] = o.name
    for n in ast.walk(ast.parse(source)):
        if not (isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)): continue
        private = n.attr.startswith('_') and not n.attr.startswith('__')
        if private and modules.get(n.value.id) in sources: yield f'{modules[n.value.id]}.{n.attr}'

@pytest.mark.parametrize('mod', sources)
def test_no_private_name_crosses_a_wall(mod): assert list(private_imports(sources[mod]))==[]

@pytest.mark.parametrize('source,found', [
    ('from .data import _find_images', ['data._find_images']),
    ('from self_supervised_swav.data import _x as y', ['data._x']),
    ('from . import report\nreport._page()', ['report._page']), ('from .data import swav_dls', []),
    ('from os import _exit', []),
    ('from . import __version__', []), ('def f():\n    from .data import _x', ['data._x'])])
def test_checker(source, found):
    assert [o.removeprefix('self_supervised_swav.') for o in private_imports(source)]==found
