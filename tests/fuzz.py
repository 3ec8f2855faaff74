"""Any argument that a type allows: tensors of any shape, type, layout and content, and what may come of them.

    @fuzz(x=tensors(), eps=numbers)
    def test_f(x, eps):
        res = called(f, x, eps=eps)           # None where an error named an argument
        if res is not None: assert res.isfinite().all()

A test runs with `n` examples in `make test`, always the same, and with 10,000 in `make test-slow`, each time others."""
import inspect, os, traceback
import pytest, torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
import self_supervised_swav

n_slow = int(os.environ.get('SWAV_EXAMPLES', 10_000))

def fuzz(n, /, **strategies):
    "A decorator: the test runs with `n` examples, and as a slow test with `n_slow`"
    def wrap(f):
        @pytest.mark.parametrize('n_examples', [n, pytest.param(n_slow, marks=pytest.mark.slow)])
        def test(n_examples):
            how = settings(max_examples=n_examples, deadline=None, derandomize=n_examples==n, database=None,
                           suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])
            how(given(**strategies)(f))()
        test.__name__,test.__doc__,test.__module__ = f.__name__,f.__doc__,f.__module__
        return test
    return wrap

# --- errors -----------------------------------------------------------------------------------------------------------
_own = os.path.dirname(self_supervised_swav.__file__)

def complaint(e, names):
    "What is wrong with the error `e` as an answer to bad arguments; None: it names one of `names` or says which file"
    if not isinstance(e, (ValueError,TypeError,OSError)): return 'it is none of those foreseen'
    last = traceback.extract_tb(e.__traceback__)[-1]
    if not last.filename.startswith(_own) and not isinstance(e, OSError): return f'it comes from {last.filename}'
    if not any(o in str(e) for o in names): return f"it names none of {', '.join(names)}"

def called(f, *args, names=(), **kwargs):
    "The result of `f`, None where it raises an error that names an argument (or one of `names`)"
    try: return f(*args, **kwargs)
    except Exception as e:
        wrong = complaint(e, [*inspect.signature(f).parameters, *names])
        if wrong: raise AssertionError(f'{type(e).__name__}: {e}: {wrong}') from e

# --- tensors ----------------------------------------------------------------------------------------------------------
floats = torch.float16,torch.bfloat16,torch.float32,torch.float64
dtypes = *floats,torch.int64,torch.uint8,torch.bool,torch.complex64
contents = 'normal','unit','equal','zero','large','tiny','edge','nan','inf','-inf'

def _content(kind, shape, dtype, size):
    real = dtype if dtype.is_floating_point else torch.float32
    x = torch.randn(shape, dtype=torch.float64)
    if kind=='unit': x = torch.nn.functional.normalize(x, dim=-1) if x.ndim else x.sign()
    if kind=='equal': x = torch.full(shape, float(size), dtype=torch.float64)
    if kind=='zero': x = torch.zeros(shape, dtype=torch.float64)
    if kind=='large': x = x*10.**size
    if kind=='tiny': x = x*10.**-size
    if kind=='edge': x = x.sign()*torch.finfo(real).max
    if kind in ('nan','inf','-inf') and x.numel(): x.view(-1)[size%x.numel()] = float(kind)
    if dtype in (torch.int64,torch.uint8): x = x.nan_to_num(0, 100, -100).clamp(-1e15, 1e15)
    return x.to(dtype)

def _laid_out(x, layout):
    "The same values in memory of another order, with gaps, or as a part of more"
    if layout=='transposed' and x.ndim>1: return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout=='gaps' and x.ndim: return x.repeat_interleave(2, -1)[...,::2]
    if layout=='part': return torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(x.shape)
    if layout=='expanded' and x.ndim and len(x): return x[:1].expand(x.shape)
    return x

@st.composite
def tensors(draw, ndim=None, shape=None, most=6, types=dtypes, kinds=contents):
    "A tensor of `shape`, or of `ndim` (most often) or any number of dimensions of up to `most`"
    if shape is None:
        n = ndim if ndim is not None and draw(st.integers(0, 9)) else draw(st.integers(0, 4))
        shape = tuple(draw(st.lists(st.integers(0, most) if draw(st.integers(0, 5))==0 else st.integers(1, most),
                                    min_size=n, max_size=n)))
    dtype,kind = draw(st.sampled_from(types)),draw(st.sampled_from(kinds))
    torch.manual_seed(draw(st.integers(0, 1000)))
    x = _content(kind, shape, dtype, draw(st.integers(0, 30)))
    return _laid_out(x, draw(st.sampled_from(('plain','transposed','gaps','part','expanded'))))

numbers = st.one_of(st.floats(.01, 10), st.floats(), st.integers(-3, 10), st.sampled_from([1e-30,1e-300,5e-324,1e308]))
counts = st.one_of(st.integers(1, 6), st.integers(-2, 9), st.sampled_from([0,1.5,True,float('nan')]))

# --- files ------------------------------------------------------------------------------------------------------------
@st.composite
def changes(draw, most=4):
    "A function that changes some bytes: flips, cuts, doubles, takes out, or writes what numbers and texts have"
    edits = draw(st.lists(st.tuples(st.sampled_from(('flip','cut','double','drop','write')), st.floats(0, 1),
                                    st.integers(0, 255), st.integers(1, 40)), min_size=1, max_size=most))
    def change(data):
        b = bytearray(data)
        for what,place,value,n in edits:
            i = int(place*len(b))
            if what=='flip' and b: b[min(i, len(b)-1)] ^= 1<<value%8
            if what=='cut': del b[i:]
            if what=='double': b[i:i] = b[i:i+n]
            if what=='drop': del b[i:i+n]
            if what=='write': b[i:i+n] = bytes([value])*n
        return bytes(b)
    return change

odd_values = st.one_of(st.none(), st.booleans(), st.integers(), st.sampled_from([-1,0,1,2**31,2**63,10**30]),
                       st.floats(), st.text(max_size=5), st.lists(st.integers(-2, 3), max_size=3), st.just({}),
                       st.sampled_from(['resnet18','timm','hf-hub:a/b','/etc/passwd','../x']))

def paths(o, at=()):
    "The places in nested dicts and lists"
    yield at
    if isinstance(o, (dict,list,tuple)):
        for k in (o if isinstance(o, dict) else range(len(o))): yield from paths(o[k], (*at,k))

def changed_at(o, at, value, remove=False):
    "A copy of nested dicts and lists with another value, or none, at a place"
    if not at: return value
    if isinstance(o, dict):
        rest = {k: v for k,v in o.items() if k!=at[0]}
        return rest if remove and len(at)==1 else rest | {at[0]: changed_at(o[at[0]], at[1:], value, remove)}
    return type(o)(changed_at(v, at[1:], value, remove) if i==at[0] else v for i,v in enumerate(o))

@st.composite
def other_versions(draw, o, values=odd_values):
    "`o`, nested dicts and lists, with one to three values changed or taken out"
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(list(paths(o))))
        o = changed_at(o, at, draw(values), draw(st.booleans()))
    return o
