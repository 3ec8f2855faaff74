"""Does it pay to go on from the weights of other images? Pretrained on Fashion-MNIST, continued on handwritten digits;
pretrained on clip art, continued on photographs of things; beside a start from random weights that takes as many steps,
which cost the same. Three splits, one thread.
Every piece that is done stays in `runs/continued` and is not done again: stop it when you like, and start it again.
`--quick` in seconds, `--write` keeps the table in README.md."""
import contextlib, io, statistics, time, warnings
from functools import cache, partial
from pathlib import Path

import torch
from fastai.torch_core import set_seed

from harness import do_pieces, line, made_on, parse_pieces, parser_of_pieces, write_between
from quality import few_probe, features, fmt, piece, quiet, version
from selection import clipart, on_white
from self_supervised_swav.checkpoints import load_encoder, save_encoder
from self_supervised_swav.data import digits_dls, fashion_mnist_dls, tensor_dls
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.evaluate import NoValidation, few_label_splits, knn_accuracy, linear_probe
from self_supervised_swav.learner import pretrain_learner

here = Path(__file__).resolve().parent
full = {
    'digits': dict(source='Fashion-MNIST', n_source=5_000, source_epochs=4, sources=1, size=16, valid_pct=.65,
                   epochs=(5,), channels=(8,16,32,64), small_images=True, labels=10, bs=64, augs=dict(flip_p=0.)),
    'photographs': dict(source='clip art', source_epochs=5, sources=1, size=64, valid_pct=.5, epochs=(20,60),
                        channels=(16,32,64,128), small_images=False, labels=5, bs=32, augs={})}
quick = {'digits': dict(full['digits'], n_source=200, source_epochs=1, valid_pct=.8, epochs=(1,), channels=(4,8,8,16),
                        labels=4)}
arch = dict(layers=(1,1,1,1), zero_init_last=False)
# what each start gives to the learner; from random weights where it is None
arms = {'from scratch': None, 'continued': {},
        'continued, one rate': dict(encoder_lr_mult=1.),
        'continued, a third of the rate': dict(encoder_lr_mult=.3),
        'continued, not frozen': dict(freeze_encoder_pct=0.),
        'continued, one rate, not frozen': dict(freeze_encoder_pct=0., encoder_lr_mult=1.),
        'continued, decay to the start': dict(wd_to_start=10.)}

stamps = Path('/usr/share/tuxpaint/stamps')  # Debian's tuxpaint-stamps-default
kinds = 'animals','food','hobbies','household','plants','space','sports'  # the folders that hold photographs, mostly

@cache
def photographs(size):
    "Photographs of things on white, and the folders that they are in"
    files = [f for o in kinds for f in sorted((stamps/o).rglob('*.png'))]
    x = torch.stack([on_white(f, size) for f in files])
    return x,torch.tensor([kinds.index(f.relative_to(stamps).parts[0]) for f in files])

def get_dls(s, seed):
    "Images to learn from and others to measure on"
    set_seed(seed)  # the order of the batches, too
    if s['source']=='Fashion-MNIST':
        return digits_dls(size=s['size'], bs=s['bs'], valid_pct=s['valid_pct'], seed=seed, device='cpu')
    x,y = photographs(s['size'])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).tolist()
    n = int(s['valid_pct']*len(x))
    return tensor_dls(x, y, kinds, bs=s['bs'], splits=(order[n:],order[:n]), device='cpu')

def source_dls(s, seed):
    if s['source']=='clip art': return clipart(s['size'], s['bs'])
    return fashion_mnist_dls(n_train=s['n_source'], n_valid=100, bs=s['bs'], labeled=False, seed=seed, device='cpu')

def new_encoder(s, seed):
    set_seed(seed)
    return create_encoder('resnet18', n_in=1 if s['source']=='Fashion-MNIST' else 3, pretrained=False,
                          channels=s['channels'], small_images=s['small_images'], **arch)

def fit(dls, encoder, epochs, **kwargs):
    "Pretrain; CPU seconds of the training alone"
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        learn = quiet(pretrain_learner(dls, encoder, bf16=False, cbs=NoValidation(), **kwargs))
    start = time.process_time()
    learn.fit_one_cycle(epochs)
    return learn,time.process_time()-start

def judged(s, seed, encoder):
    "What labels say about the features of the target's images"
    fs = features(get_dls(s, seed), encoder)
    few = features(few_label_splits(get_dls(s, seed), n_per_class=s['labels'], seed=seed), encoder)
    return dict(knn=knn_accuracy(*fs), probe=linear_probe(*fs).top1, few=few_probe(*few, seed))

made = version(get_dls, source_dls, photographs, new_encoder, fit, on_white, clipart)

def key_of(s, seed, *but, **more):
    return dict({k: v for k,v in s.items() if k not in ('epochs',*but)}, seed=seed, arch=arch, version=made,
                torch=torch.__version__, **more)

def source_file(out, s, seed): return out/f"source-{seed%s['sources']}.safetensors"

def source(out, s, seed, todo=True):
    "The encoder of the source in its file: a training for each of the first `sources` seeds"
    i = seed%s['sources']
    def f():
        set_seed(i)
        dls = source_dls(s, i)
        learn,cpu = fit(dls, new_encoder(s, i), s['source_epochs'])
        save_encoder(learn, source_file(out, s, i), size=dls.one_batch()[0].shape[-1])
        return dict(cpu=cpu)
    return piece(out, f'source-{i}', key_of(s, i, 'sources', 'valid_pct', 'labels', 'augs'), f if todo else None)

def as_it_is(out, s, seed, todo=True):
    "What the encoder of the source knows of the target's images"
    def f(): return judged(s, seed, load_encoder(source_file(out, s, seed)))
    return piece(out, f'as-it-is-{seed}', key_of(s, seed), f if todo else None)

def untrained(out, s, seed, todo=True):
    def f(): return judged(s, seed, new_encoder(s, seed))
    return piece(out, f'untrained-{seed}', key_of(s, seed), f if todo else None)

def target(out, arm, epochs, s, seed, todo=True):
    "A pretraining on the target's images"
    def f():
        dls,given = get_dls(s, seed),arms[arm]
        encoder = new_encoder(s, seed) if given is None else load_encoder(source_file(out, s, seed)).train()
        set_seed(seed)
        learn,cpu = fit(dls, encoder, epochs, **s['augs'], **({} if given is None else dict(init=True)|given))
        return dict(cpu=cpu, **judged(s, seed, learn.model.encoder))
    return piece(out, f'{arm}-{epochs}-{seed}', key_of(s, seed, arm=arm, given=arms[arm], target_epochs=epochs),
                 f if todo else None)

# --- the table --------------------------------------------------------------------------------------------------------
signs = ('knn','probe','few')

def found(f, seeds): return {i: r for i in range(seeds) if (r := f(i, todo=False))}

def report(out, s, seeds):
    "Accuracies, and beside each what it gains over the start from scratch that took as many steps"
    rows = []
    def add(name, epochs, rs, than=None):
        if not rs: return
        cells = []
        for k in signs:
            gains = [100*(r[k]-than[i][k]) for i,r in rs.items() if i in than] if than else []
            more = f' ({statistics.mean(gains):+.1f}, {sum(o>0 for o in gains)} of {len(gains)})' if gains else ''
            cells.append(fmt([r[k] for r in rs.values()])+more)
        cpu = f"{statistics.median(r['cpu'] for r in rs.values()):.0f} s" if 'cpu' in next(iter(rs.values())) else ''
        rows.append([name,str(epochs),*cells,cpu,str(len(rs))])
    add('untrained encoder', 0, found(partial(untrained, out, s), seeds))
    add(f"{s['source']}, not continued", 0, found(partial(as_it_is, out, s), seeds))
    for epochs in s['epochs']:
        scratch = found(partial(target, out, 'from scratch', epochs, s), seeds)
        for arm in arms:
            add(arm, epochs, found(partial(target, out, arm, epochs, s), seeds),
                None if arm=='from scratch' else scratch)
    names = ['start','epochs','20-NN','linear probe',f"{s['labels']} labels a class: probe",'CPU time','seeds']
    text = '\n'.join([line(names), line(['---']*len(names)), *map(line, rows)])
    if not (before := source(out, s, 0, todo=False)): return text
    return (f"{text}\n\nIn brackets: points more than from scratch with as many epochs, and in how many seeds it is "
            f"more. The pretraining on {s['source']} took {before['cpu']:.0f} s, which are not in the table.")

begin,end = '<!-- continued: written by `python benchmarks/continued.py --write` -->','<!-- continued: end -->'

def main(argv=None):
    p = parser_of_pieces(__doc__, 'continued')
    p.add_argument('--data', nargs='+', choices=list(full), default=list(full))
    p.add_argument('--seeds', type=int, default=3)
    args = parse_pieces(p, argv)
    settings,end = quick if args.quick else {k: full[k] for k in args.data},time.time()+60*args.minutes
    torch.set_num_threads(1)  # CPU times of one thread compare on a machine that does other things
    texts = []
    for name,s in settings.items():
        out = args.out/('quick' if args.quick else 'full')/name
        out.mkdir(parents=True, exist_ok=True)
        todo = [partial(f, out, s, i) for i in range(args.seeds) for f in (untrained,source,as_it_is)]
        todo += [partial(target, out, arm, epochs, s, i) for i in range(args.seeds) for epochs in s['epochs']
                 for arm in arms]
        do_pieces([] if args.table else todo, (end-time.time())/60)
        texts.append(f"{s['source']} → {name}\n\n{report(out, s, args.seeds)}")
    text = '\n\n'.join(texts)
    print(text)
    if args.write: write_between(here/'README.md', begin, end, f'{made_on()}\n\n{text}')
    return text

if __name__=='__main__': main()
