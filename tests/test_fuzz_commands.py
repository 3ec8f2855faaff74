"Command lines and settings of any text: taken, or refused in one line that names the argument"
import math, warnings
from dataclasses import fields
from functools import cache, partial
from hypothesis import strategies as st
from fuzz import called, fuzz
import self_supervised_swav.all  # noqa: F401 (registers all methods)
from self_supervised_swav import cli
from self_supervised_swav.cli import commands, flag_of
from self_supervised_swav.learner import check_settings, setting_groups
from self_supervised_swav.multiview import methods
from self_supervised_swav.runs import parse_settings

warnings.simplefilter('ignore')
texts = st.one_of(st.text(max_size=6), st.integers(-3, 70).map(str), st.integers().map(str), st.floats().map(str),
                  st.sampled_from(['auto','','cpu','meta','cuda:99','-1','1%','nan%','inf','nan','1e400','x.csv','x.html',
                                   'x.json','kmeans','prototypes','typical','both','onnx','swav','=','a=','a=b','\0',
                                   '9'*400,'10000000000','timm','pca','torch.export','x.onnx','١٢']))

@st.composite
def command_lines(draw):
    name = draw(st.sampled_from(list(commands)))
    argv = [name]
    for f in fields(commands[name][0]):
        many = f.metadata.get('nargs')
        n = many if isinstance(many, int) else draw(st.integers(1, 3)) if many else 0 if f.type is bool else 1
        is_positional = f.default is f.default_factory
        if is_positional or draw(st.integers(0, 4))==0:
            flag = f"--no-{flag_of(f)[2:]}" if f.type is bool and f.default else flag_of(f)
            argv += [*([] if is_positional else [flag]), *(draw(texts) for _ in range(n))]
    return argv

parser_of = cache(cli.create_parser)              # the comments of the arguments are read from the source

@fuzz(150, argv=command_lines())
def test_command_lines(argv):
    given,(cls,run),start = [],commands[argv[0]],cli._start_ranks
    commands[argv[0]] = cls,given.append
    cli.create_parser,cli._start_ranks = parser_of,lambda argv, args: given.append(args) or 0
    try: code = cli.main(argv)
    except SystemExit as e: code = e.code
    finally: commands[argv[0]],cli.create_parser,cli._start_ranks = (cls,run),parser_of.__wrapped__,start
    assert code==(0 if given else 2)
    for args in given:
        for f in fields(args):
            v = getattr(args, f.name)
            if isinstance(v, float): assert math.isfinite(v)
            if f.name=='seed': assert 0<=v<2**32

literals = st.one_of(texts, st.sampled_from(['None','True','()','(1,2)','[1','{}','{{}:1}','('*300,'-'*5000,'"a',
                                            '(2,1)','64','.5','1e-3','(16,8)','-0.1','0','1_0','lambda: 1',
                                            '__import__("os")']))
quick = dict(layers=(1,1,1,1), channels=(8,8,16,16))

@st.composite
def settings_of(draw):
    method = draw(st.sampled_from(list(methods)))
    # pretrained weights would have to be downloaded
    known = [o for names in setting_groups(method).values() for o in names if o!='pretrained']
    names = st.one_of(st.sampled_from(known), st.sampled_from(known), st.text(max_size=5),
                      st.sampled_from(['encoder.drop_rate','encoder.layers','encoder.','encoder.n_in','encoder.x']))
    return method,[f'{draw(names)}={draw(literals)}' for _ in range(draw(st.integers(1, 2)))]

@fuzz(150, o=settings_of())
def test_settings(o):
    method,texts = o
    parsed = called(parse_settings, texts)
    if parsed is None: return
    encoder,given = parsed
    if {'dls','arch','method','encoder','init','bs','image_size','n_in'}&set(given): return   # those of the command
    names = [*given, *encoder, 'encoder', method, *(o for names in setting_groups(method).values() for o in names)]
    called(partial(check_settings, 'resnet18', method, quick | encoder, 32, **given), names=names)
