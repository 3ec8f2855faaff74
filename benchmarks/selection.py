"""What it is worth to choose the images that are labeled: `select_to_label` beside random images, 10 to 500 labels in
all, on Fashion-MNIST and on clip art. One pretraining for each, without labels; then every draw chooses from another
random half of the pretraining images, and test images say how good a classifier the labels make. Every piece that is
done stays in `runs/selection` and is not done again. `--quick` on digits in seconds, `--write` keeps the tables in
README.md."""
import hashlib, math, statistics, warnings
from functools import cache, partial
from pathlib import Path

import torch
from fastai.torch_core import set_seed
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import t as student

from harness import do_pieces, line, made_on, parse_pieces, parser_of_pieces, write_between
from quality import piece, quiet, reader, tuned, version
from self_supervised_swav.data import digits_dls, fashion_mnist_dls, tensor_dls
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.evaluate import NoValidation, extract_features, largest_share, linear_probe
from self_supervised_swav.learner import swav_learner
from self_supervised_swav import select as _select
from self_supervised_swav.select import select_to_label

here = Path(__file__).resolve().parent
sizes = 10,20,30,50,100,200,500
methods = 'typical','coverage','random'
tuned_draws = dict.fromkeys(sizes, 10)  # of fine-tuning, for each number of labels
full = {'fashion-mnist': dict(size=28, n_in=1, bs=128, epochs=4, channels=(32,64,128,256), small_images=True,
                              sizes=sizes, draws=10, tuned=tuned_draws, n_tune_test=2000),
        'clipart': dict(size=64, n_in=3, bs=128, epochs=5, channels=(32,64,128,256), small_images=False,
                        sizes=sizes, draws=10, tuned=tuned_draws, n_tune_test=2000)}
quick = {'digits': dict(size=16, n_in=1, bs=32, epochs=1, channels=(4,8,8,16), small_images=True, sizes=(10,20),
                        draws=2, tuned={10: 1}, n_tune_test=100)}

# --- images -----------------------------------------------------------------------------------------------------------
clipart_root = Path('/usr/share/openclipart/png')

def is_test(name, share=.25):
    "Is a drawing held out? By a hash of its name, the same everywhere"
    return int(hashlib.sha1(name.encode()).hexdigest()[:8], 16)<share*2**32

def on_white(path, size):
    "A drawing, in the middle of a white square"
    with Image.open(path) as im: im = im.convert('RGBA')
    im = Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im).convert('RGB')
    im.thumbnail((size,size), Image.Resampling.LANCZOS)
    square = Image.new('RGB', (size,size), 'white')
    square.paste(im, ((size-im.width)//2,(size-im.height)//2))
    return torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size,size,3).permute(2,0,1)

@cache
def drawings(size):
    "8,000 drawings, their folders, and which are held out; kept in one file after the first time"
    path = here.parent/'runs'/'selection'/f'clipart-{size}.safetensors'
    vocab = sorted(o.name for o in clipart_root.iterdir() if o.is_dir())
    if not path.exists():
        rows = []
        for f in sorted(clipart_root.rglob('*.png')):
            try: x = on_white(f, size)
            except Exception: continue  # three files do not open
            rows.append((x, vocab.index(f.relative_to(clipart_root).parts[0]), is_test(f.name)))
        x,y,held_out = zip(*rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(x=torch.stack(x), y=torch.tensor(y), held_out=torch.tensor(held_out)), path)
    return load_file(path),vocab

def clipart(size, bs):
    "The folder is the class; three quarters to pretrain on"
    o,vocab = drawings(size)
    splits = [(o['held_out']==part).nonzero()[:,0].tolist() for part in (False,True)]
    return tensor_dls(o['x'], o['y'], vocab, bs=bs, splits=splits, device='cpu')

def get_dls(data, s):
    "Images to pretrain on and to choose from, and others to measure on; labels are used for measuring alone"
    if data=='digits': return digits_dls(size=s['size'], bs=s['bs'], valid_pct=.3, seed=0, device='cpu')
    if data=='clipart': return clipart(s['size'], s['bs'])
    return fashion_mnist_dls(n_train=10_000, n_valid=10_000, bs=s['bs'], seed=0, device='cpu')

# --- one pretraining, and its features --------------------------------------------------------------------------------
def encoder_args(s): return dict(layers=(1,1,1,1), channels=s['channels'], small_images=s['small_images'])

def new_encoder(s):
    return create_encoder('resnet18', n_in=s['n_in'], pretrained=False, zero_init_last=False, **encoder_args(s))

def pretrained(out, data, s, todo=True):
    "`swav_learner` with nothing chosen by hand; the features of all images"
    path = out/f'{data}.safetensors'
    def f():
        dls = get_dls(data, s)
        set_seed(0)
        learn = quiet(swav_learner(dls, 'resnet18', encoder=encoder_args(s), cbs=NoValidation()))
        learn.fit_one_cycle(s['epochs'])
        encoder = learn.model.encoder
        save_file({k: v.contiguous() for k,v in encoder.state_dict().items()}, path)
        parts = [extract_features(learn, dl, progress=False) for dl in dls]
        save_file({f'{part}-{k}': v.contiguous() for part,o in zip(('train','test'), parts) for k,v in zip('xy', o)},
                  path.with_name(f'{data}-features.safetensors'))
        return dict(all_labels=linear_probe(*parts).top1, largest=largest_share(parts[1][1]))
    key = {k: s[k] for k in ('size','bs','epochs','channels','small_images')}
    key |= dict(version=version(new_encoder, reader, on_white, is_test, get_dls), torch=torch.__version__)
    return piece(out, data, key, f if todo else None)

@cache
def features(out, data):
    "((features, classes), (features, classes)) of training and test images"
    o = load_file(out/f'{data}-features.safetensors')
    return tuple((o[f'{part}-x'],o[f'{part}-y']) for part in ('train','test'))

# --- one draw ---------------------------------------------------------------------------------------------------------
def pool_of(n, draw):
    "The random half of the training images that a draw chooses from"
    return torch.randperm(n, generator=torch.Generator().manual_seed(draw))[:n//2]

def chosen(x, n, method, draw):
    "Indices into `x` of `n` images from the draw's half"
    pool = pool_of(len(x), draw)
    return pool[select_to_label(x[pool], n, method, seed=draw)]

def probe_accuracy(train, test, idxs):
    "Of a linear probe on the labels of these images; a class that is not among them is never right"
    (x,y),(xv,yv) = train,test
    return linear_probe((x[idxs],y[idxs]), (xv,yv), C=.1).top1

def probes(out, data, s, method, draw, todo=True):
    "Accuracy of the probe, and the number of classes seen, at every size"
    base = pretrained(out, data, s, todo=False)
    def f():
        train,test = features(out, data)
        res = {}
        for n in s['sizes']:
            idxs = chosen(train[0], n, method, draw)
            res[str(n)] = dict(top1=probe_accuracy(train, test, idxs), classes=len(train[1][idxs].unique()))
        return dict(at=res)
    if base is None: return None
    key = dict(base=base['key'], sizes=s['sizes'], method=method, draw=draw,
               version=version(chosen, probe_accuracy, pool_of, *parts[method]))
    return piece(out, f'{data}-{method}-{draw}', key, f if todo else None)

def tuning(out, data, s, method, draw, n, todo=True):
    "Accuracy after fine-tuning the whole encoder on `n` labels, on a part of the test images"
    base = pretrained(out, data, s, todo=False)
    def f():
        dls = get_dls(data, s)
        train,_ = features(out, data)
        x = [torch.as_tensor(ds.x) for ds in (dls.train.dataset,dls.valid.dataset)]
        part = torch.randperm(len(x[1]), generator=torch.Generator().manual_seed(0))[:s['n_tune_test']]
        idxs = chosen(train[0], n, method, draw)
        set_seed(draw)  # the order of the batches, too
        few = tensor_dls(torch.cat([x[0][idxs],x[1][part]]), torch.cat([train[1][idxs],dls.valid.dataset.y[part]]),
                         vocab=dls.train.dataset.vocab, bs=min(64, n), splits=(range(n),range(n, n+len(part))),
                         device='cpu')
        encoder = new_encoder(s)
        encoder.load_state_dict(load_file(out/f'{data}.safetensors'))
        return dict(at={str(n): tuned(reader(encoder, s['n_in']), few, 60, pretrained=True)})
    if base is None: return None
    key = dict(base=base['key'], labels=n, n_test=s['n_tune_test'], method=method, draw=draw,
               version=version(chosen, tuned, pool_of, *parts[method]))
    return piece(out, f'{data}-{method}-{draw}-tuned-{n}', key, f if todo else None)

parts = dict(typical=[_select._typical,_select._typicality,_select._cluster],
             coverage=[_select._coverage,_select._covering], random=[])

# --- the tables -------------------------------------------------------------------------------------------------------
def mean_ci(values):
    "Mean and half width of its 95 % interval, in points"
    values = [100*v for v in values]
    if len(values)<3: return statistics.mean(values),None
    return statistics.mean(values),student.ppf(.975, len(values)-1)*statistics.stdev(values)/math.sqrt(len(values))

def cell(values, sign=False):
    m,ci = mean_ci(values)
    return f'{m:+.1f}' if sign and ci is None else (f'{m:+.1f} ± {ci:.1f}' if sign else f'{m:.1f} ± {ci:.1f}'
                                                    if ci is not None else f'{m:.1f}')

def verdict(differences):
    "Does the interval of the differences say who is better?"
    m,ci = mean_ci(differences)
    if ci is None: return ''
    return 'better' if m-ci>0 else 'worse' if m+ci<0 else 'not clear'

def rows_of(get, draws, what):
    "A row for each size in `draws`: the accuracy of each method, and what choosing gains, paired by the draw"
    for n,n_draws in draws.items():
        by = {m: {d: r['at'][str(n)] for d in range(n_draws) if (r := get(m, d, n))} for m in methods}
        common = set.intersection(*map(set, by.values()))  # the draws that all methods have
        if not common: continue
        by = {m: {d: v[d] for d in sorted(common)} for m,v in by.items()}
        top = {m: {d: o['top1'] if isinstance(o, dict) else o for d,o in v.items()} for m,v in by.items()}
        gains = []
        for m in methods[:-1]:
            diff = [top[m][d]-top['random'][d] for d in common]
            gains.append(f'{cell(diff, sign=True)} {verdict(diff)}'.strip())
        seen = [f"{statistics.mean(o['classes'] for o in v.values()):.1f}" if isinstance(next(iter(v.values())), dict)
                else '' for v in by.values()]
        yield [what, str(n), *(cell(list(v.values())) for v in top.values()), *gains, ' / '.join(filter(None, seen)),
               str(len(common))]

def report(out, settings):
    "A table for each data set, from the pieces that there are"
    head = ['classifier','labels',*methods,*(f'{m} - random' for m in methods[:-1]),
            'classes seen: '+' / '.join(methods),'draws']
    texts = []
    for data,s in settings.items():
        base = pretrained(out, data, s, todo=False)
        if base is None: continue
        rows = [*rows_of(lambda m,d,n: probes(out, data, s, m, d, todo=False), dict.fromkeys(s['sizes'], s['draws']),
                         'probe'),
                *rows_of(lambda m,d,n: tuning(out, data, s, m, d, n, todo=False), s['tuned'], 'fine-tuned')]
        said = (f"{data}: {base['all_labels']:.1%} with the labels of all training images (probe), "
                f"{base['largest']:.1%} for the largest class always.")
        texts.append('\n'.join([said, '', line(head), line(['---']*len(head)), *map(line, rows)]))
    return '\n\n'.join(texts)

begin,end = '<!-- selection: written by `benchmarks/selection.py --write` -->','<!-- selection: end -->'

def write(path, text):
    "Keep the tables in the file"
    write_between(path, begin, end, text)

def main(argv=None):
    p = parser_of_pieces(__doc__, 'selection')
    p.add_argument('--data', nargs='+', choices=list(full), default=list(full))
    args = parse_pieces(p, argv)
    settings = quick if args.quick else {k: full[k] for k in args.data}
    out = args.out/'quick' if args.quick else args.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # CPU times of one thread compare on a machine that does other things
    todo = [(pretrained,data,s) for data,s in settings.items()]
    todo += [(probes,data,s,m,d) for data,s in settings.items() for d in range(s['draws']) for m in methods]
    todo += sorted([(tuning,data,s,m,d,n) for data,s in settings.items() for n,n_draws in s['tuned'].items()
                    for d in range(n_draws) for m in methods], key=lambda o: o[-1])
    if args.table: todo = []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        do_pieces([partial(f, out, *more) for f,*more in todo], args.minutes)
    text = report(out, settings)
    print(text)
    if args.write: write(here/'README.md', f'{made_on()}\n\n{text}')
    return text

if __name__=='__main__': main()
