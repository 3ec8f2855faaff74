"The types that signatures promise are those that the code takes: nothing but the hints is read here"
import importlib, inspect, pkgutil, re, types, typing
from collections import Counter
from pathlib import Path
import pytest
import self_supervised_swav

not_read = ('all', 'args')  # in `args` a hint says what the text of a command line becomes

def compiled_modules():
    names = (o.name for o in pkgutil.iter_modules(self_supervised_swav.__path__) if o.name not in not_read
             and o.name[0]!='_')
    return (importlib.import_module(f'self_supervised_swav.{o}') for o in names)

functions = {k: getattr(mod, k) for mod in compiled_modules()
             for k in getattr(mod, '__all__', ()) if callable(getattr(mod, k, None))}

def admits(hint, value):
    "Is `value` one of `hint`, as far as a class can tell?"
    if hint in (typing.Any, inspect.Parameter.empty): return True
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(admits(o, value) for o in typing.get_args(hint))
    if hint is None or hint is type(None): return value is None
    hint = typing.get_origin(hint) or hint
    if hint is float: hint = (int,float)
    return isinstance(value, hint) if isinstance(hint, (type,tuple)) else True

def wrong_defaults(f):
    "Arguments of `f` whose default is not of the type that their hint promises"
    try: params = inspect.signature(f, eval_str=True).parameters.values()
    except (ValueError, TypeError): return []  # a class of C, say
    code = getattr(f.__init__ if isinstance(f, type) else f, '__code__', None)
    own = code.co_varnames if code else ()  # not the arguments that `delegates` brings from fastai
    return [f'{p.name}:{p.annotation}={p.default!r}' for p in params
            if p.name in own and p.default is not p.empty and not admits(p.annotation, p.default)]

def test_something_is_found(): assert {'SWAV','sinkhorn','swav_dls','create_encoder'}<=set(functions)

@pytest.mark.parametrize('name', functions)
def test_defaults_are_of_their_types(name): assert wrong_defaults(functions[name])==[]

def test_checker():
    def f(a:int=None, b:int|None=None, c:float=1, d:str|list='x', e:tuple=[], g=None, h:list[int]=(),
          i:typing.Callable=len): pass
    assert [o.split(':')[0] for o in wrong_defaults(f)]==['a','e','h']

def test_every_public_name_is_used_with_its_types():
    "What mypy reads (tests/typed_usage.py) calls each name of `all`"
    used = Counter(re.findall(r'\w+', (Path(__file__).parent/'typed_usage.py').read_text()))
    names = importlib.import_module('self_supervised_swav.all').__all__
    assert not [o for o in names if used[o]<2]  # imported, and called
