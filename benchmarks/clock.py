"""Accuracy for time: this package beside raw pixels and lightly's SwAV and SimCLR, on Fashion-MNIST, clip art and
digits, each after as many seconds as four epochs of the first recipe took, and after five times that. Everything is
chosen on training images; the test images are looked at once, by the encoder that was chosen. Every piece that is done
stays in `benchmarks/clock`, with the machine that did it, and is not done again: a data set can be begun on one machine
and finished on another. `--quick` in seconds, `--write` keeps the tables in README.md."""
import copy, math, re, statistics, time, warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt, torch, torch.nn.functional as F
from fastai.callback import schedule  # noqa: F401  it patches Learner
from fastai.callback.core import Callback, CancelFitException
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from fastai.vision.core import imagenet_stats
from lightly.loss import NTXentLoss, SwaVLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform, SwaVTransform
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

from harness import do_pieces, line, machine, parse_pieces, parser_of_pieces, split_at, write_between
from quality import (Watch as Stopwatch, Crops, LightlyModel, accuracy_of, few_probe, fmt, piece, quiet, reader,
                     tuned_learner, version)
from selection import clipart
from self_supervised_swav.data import digits_dls, fashion_mnist_dls, subset
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.evaluate import (NoValidation, extract_features, few_label_idxs, knn_accuracy, linear_probe,
                                           spread_probe)
from self_supervised_swav.grid import grid_features, stage_features
from self_supervised_swav.learner import swav_learner
from self_supervised_swav.machine import processor_name
from self_supervised_swav.precision import to_channels_last
from self_supervised_swav.recipes import swav_recipe
from self_supervised_swav.whitening import Whitening

here = Path(__file__).resolve().parent

# --- data -------------------------------------------------------------------------------------------------------------
class Data(NamedTuple):
    "Images, the width of the network, and how few labels are tried for how many epochs of fine-tuning"
    make:object; size:int; n_in:int; channels:tuple=(32,64,128,256); labels:tuple=((10,60),(60,40)); bs:int=64

def fashion(s, seed, n=10_000): return fashion_mnist_dls(n_train=n, bs=s.bs, seed=seed, device='cpu')
def drawings(s, seed): return clipart(s.size, s.bs)
def digits(s, seed): return digits_dls(size=s.size, bs=s.bs, valid_pct=.3, seed=seed, device='cpu')

datasets = {'Fashion-MNIST': Data(fashion, 28, 1), 'clip art': Data(drawings, 64, 3), 'digits': Data(digits, 28, 1)}
quick = {'digits': Data(digits, 16, 1, (4,8,8,16), ((2,4),(1,1)))}
titles = {'Fashion-MNIST': '10,000 images without labels, 10,000 test images',
          'clip art': '5,958 drawings of 64 px in 22 folders without labels, 2,160 test images',
          'digits': '1,258 digits, scaled from 8 to 28 px, without labels, 539 test images'}

def new_encoder(s, seed):
    "The network that `swav_learner` makes of these widths"
    set_seed(seed)
    asked = swav_recipe(n_images=2, bs=2, image_size=s.size)['encoder']
    return create_encoder('resnet18', n_in=s.n_in, layers=(1,1,1,1), channels=s.channels, **asked)

def features(encoder, dl, s):
    net = to_channels_last(reader(copy.deepcopy(encoder), s.n_in))  # a copy: how the arm trains stays its own
    return extract_features(net, dl, progress=False)

class Pixels(nn.Module):
    "Colors of an image as they are, of a large one as its thumbnail of 16x16"
    def forward(self, x): return (F.adaptive_avg_pool2d(x, 16) if x.shape[-1]>32 else x).flatten(1)

def pixels(dl): return extract_features(Pixels(), dl, progress=False)

def among(fs):
    "20-NN of one half of the training images, drawn once, among the other: what everything is chosen by"
    x,y = fs
    idxs = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    one,other = ((x[i],y[i]) for i in idxs.chunk(2))
    return knn_accuracy(one, other)

# --- time -------------------------------------------------------------------------------------------------------------
class Watch(Stopwatch):
    "Training time of one thread, loading included and measuring not; the accuracy at each quarter, the best encoder"
    def __init__(self, encoder, dl, s, seconds, quarters=4):
        super().__init__(encoder, dl)
        self.s,self.seconds,self.marks,self.points,self.best = s,seconds,quarters,[],None
    def step(self):
        "Call it after each step; says whether the time is over"
        if self.cpu+self.cpu_now()-self.c<self.seconds*(len(self.points)+1)/self.marks: return False
        self.stop()
        self.measure()
        self.start()
        return len(self.points)>=self.marks
    def measure(self):
        knn = among(features(self.encoder, self.dls, self.s))
        if self.best is None or knn>=self.best[0]: self.best = knn,copy.deepcopy(self.encoder.state_dict())
        self.points.append(dict(cpu=self.cpu, wall=self.wall, among=knn))

class FitWatch(Callback):
    "The watch of a fit, which ends by its schedule"
    order,run_valid = 95,False
    def __init__(self, watch): self.watch = watch
    def after_batch(self):
        if len(self.watch.points)<self.watch.marks-1: self.watch.step()

class Few(Callback):
    "Ends a fit after `n` steps beyond five, and notes their time"
    order,run_valid = 95,False
    def __init__(self, n): self.n = n
    def after_batch(self):
        if self.train_iter==5: self.start = time.process_time()
        if self.train_iter==5+self.n:
            self.secs = (time.process_time()-self.start)/self.n
            raise CancelFitException

def secs_per_step(learn, n=20):
    few = Few(n)
    learn.fit(math.ceil((n+6)/len(learn.dls.train)), cbs=few)
    return few.secs

first_recipe = dict(jitter_s=.5, num_crops=(2,4), crop_sizes=(28,18))  # of 28 px, in batches of 128

def budget(out, todo=True):
    """Seconds of four epochs of the first recipe on 10,000 images of Fashion-MNIST, by one thread of this processor

    Measured once: a package that became faster since does more in the same time."""
    if out.name=='quick': return dict(seconds=250.)
    name = 'budget-'+re.sub(r'\W+', '-', processor_name()).strip('-').lower()
    s = datasets['Fashion-MNIST']._replace(bs=128)
    def f():
        set_seed(0)
        dls = fashion(s, 0)
        secs = statistics.median(secs_per_step(our_learner(dls, s, gamma=False, **first_recipe)) for _ in range(3))
        return dict(seconds=4*len(dls.train)*secs)
    return piece(out, name, dict(first=first_recipe), f if todo else None)

# --- the arms: functions that train for a time ------------------------------------------------------------------------
ours = 'augment encoders learner losses models multiview optimizer precision queue recipes sinkhorn swav'.split()

def our_learner(dls, s, **settings):
    return quiet(swav_learner(dls, 'resnet18', encoder=dict(layers=(1,1,1,1), channels=s.channels),
                              cbs=NoValidation(), **settings))

def this_package(s, seed, seconds, **settings):
    "`swav_learner` and fastai's usual schedule; as many whole epochs as the time has"
    dls = s.make(s, seed)
    set_seed(seed)
    secs = secs_per_step(our_learner(dls, s, **settings))
    n_epoch = max(1, int(seconds/secs/len(dls.train)))
    set_seed(seed)
    learn = our_learner(dls, s, **settings)
    watch = Watch(learn.model.encoder, dls.train, s, seconds)
    learn.add_cb(FitWatch(watch))
    watch.start()
    learn.fit_one_cycle(n_epoch, learn.lr)
    watch.stop()
    watch.measure()
    return watch,dict(epochs=n_epoch, loss=learn.collapse_monitor.history['loss/lnK'][-1],
                      alarms=len(learn.collapse_monitor.alarms))

def loader(dls, tfm, bs):
    "Crops of PIL images, as lightly makes them"
    x = dls.train.dataset.x
    return DataLoader(Crops(x, tfm), batch_size=min(bs, len(x)), shuffle=True, drop_last=True)

def lightly(s, seed, seconds, crops, bs, model, opt, loss_of, before=lambda model: None):
    "A loop as in lightly's examples, until the time is over"
    dls = s.make(s, seed)
    model = model(new_encoder(s, seed)).train()
    opt,batches,n = opt(model.parameters()),loader(dls, crops, bs),0
    watch = Watch(model.backbone, dls.train, s, seconds)
    watch.start()
    while True:
        for views in batches:
            before(model)
            loss = loss_of(model, views)
            loss.backward()
            opt.step()
            opt.zero_grad()
            n += 1
            if watch.step(): return watch,dict(epochs=n/len(batches), loss=loss.item())

def normalize(s):
    return dict(zip(('mean','std'), imagenet_stats)) if s.n_in==3 else None

def lightly_swav(s, seed, seconds):
    "lightly's example: 512 prototypes, Adam at 0.001, batches of 128; its crops of 224 and 96 px to scale"
    criterion = SwaVLoss()
    def loss_of(model, views):
        scores = [model(o) for o in views]
        return criterion(scores[:2], scores[2:])
    return lightly(s, seed, seconds, SwaVTransform(crop_sizes=(s.size,round(s.size*96/224)), normalize=normalize(s)),
                   128, lambda e: LightlyModel(e, s.channels[-1]), lambda p: torch.optim.Adam(p, lr=1e-3), loss_of,
                   lambda model: model.prototypes.normalize())

class SimCLR(nn.Module):
    "Encoder and head, put together as in lightly's example"
    def __init__(self, backbone, width):
        super().__init__()
        self.backbone,self.projection_head = backbone,SimCLRProjectionHead(width, 512, 128)
    def forward(self, x): return self.projection_head(self.backbone(x).flatten(start_dim=1))

def lightly_simclr(s, seed, seconds):
    "lightly's example: SGD at 0.06, batches of 256, temperature 0.5"
    criterion = NTXentLoss()
    return lightly(s, seed, seconds, SimCLRTransform(input_size=s.size, normalize=normalize(s)), 256,
                   lambda e: SimCLR(e, s.channels[-1]), lambda p: torch.optim.SGD(p, lr=.06),
                   lambda model,views: criterion(model(views[0]), model(views[1])))

arms = {'this package': this_package, 'lightly SwAV': lightly_swav, 'lightly SimCLR': lightly_simclr}
baselines = 'raw pixels','untrained encoder'

# --- pieces that are done once ----------------------------------------------------------------------------------------
def in_file_name(s): return s.replace(' ', '-').lower()

def file_name(data, arm, seed, length): return in_file_name(f'{data}-{arm}-{length:g}-{seed}')

def weights_file(out, *of): return out/(file_name(*of)+'.safetensors')

def pretrained(out, data, s, arm, seed, length, todo=True):
    """The curve of a training of `length` budgets; the encoder that is best among the training images is kept

    It is done again where its weights are missing: they stay on the machine that trained them."""
    path = weights_file(out, data, arm, seed, length)
    def f():
        seconds = length*budget(out)['seconds']
        watch,r = arms[arm](s, seed, seconds)
        save_file({k: v.contiguous() for k,v in watch.best[1].items()}, path)
        return r|dict(points=watch.points, cpu=watch.cpu, wall=watch.wall, seconds=seconds, machine=[*machine('cpu')])
    own = [LightlyModel,Crops,SimCLR,lightly,loader] if arm.startswith('lightly') else ours
    key = dict(data=data, s=list(s[1:]), seed=seed, length=length,
               version=version(arms[arm], s.make, new_encoder, *own, 'data'))
    return piece(out, path.stem, key, f if todo else None, anew=todo and not path.exists())

def base_key(out, data, s, arm, seed, length):
    "What a measurement starts from; None where its training is still to do"
    if arm not in arms: return [seed, list(s[1:])]
    return (pretrained(out, data, s, arm, seed, length, todo=False) or {}).get('key')

def neighbors(train, valid, more=''):
    "20-NN, plain and whitened"
    return {f'knn{more}': knn_accuracy(train, valid), f'white{more}': knn_accuracy(train, valid, whiten=True)}

def measured(out, data, s, arm, seed, length, todo=True):
    """What the test images say: 20-NN, plain and whitened, of whole images and of the quarters of each, of the last
    stage and of three side by side; a probe on all labels; and few labels"""
    base = base_key(out, data, s, arm, seed, length)
    if base is None: return None
    def f():
        dls,encoder = s.make(s, seed),None if arm=='raw pixels' else new_encoder(s, seed)
        if arm in arms: encoder.load_state_dict(load_file(weights_file(out, data, arm, seed, length)))
        def fs(dl): return pixels(dl) if encoder is None else features(encoder, dl, s)
        train,valid = map(fs, dls)
        r = neighbors(train, valid)|dict(probe=linear_probe(train, valid).top1)
        r['wholly'] = knn_accuracy(train, valid, whiten=Whitening.fit(train[0], shrink=0.))
        for grid,stages in ((1,3),(2,1),(2,3)) if encoder is not None else ():
            with grid_features(encoder, grid), stage_features(encoder, stages):
                r |= neighbors(*map(fs, dls), more=f' {grid}x{grid}, {stages}')
        for n,epochs in zip(*s.labels):
            idxs = few_idxs(train[1], n, seed)
            some = torch.full_like(train[1], -1)
            some[idxs] = train[1][idxs]
            r[f'probe {n}'] = few_probe((train[0][idxs],train[1][idxs]), valid, seed)
            r[f'spread {n}'] = spread_probe((train[0],some), valid).top1
            if encoder is None: continue
            set_seed(seed)
            labeled = with_labels(s.make(s, seed), idxs)
            learn = tuned_learner(reader(encoder, s.n_in), labeled, epochs, arm in arms)
            r[f'tuned {n}'] = accuracy_of(learn)
            (x,_),tuned_valid = (extract_features(learn.model.encoder, dl, progress=False) for dl in dls)
            r[f'both {n}'] = spread_probe((x,some), tuned_valid).top1
        return r|dict(machine=[*machine('cpu')])
    key = dict(base=base, arm=arm, version=version(measured, few_probe, tuned_learner, Pixels, 'evaluate', 'grid',
                                                   'spread', 'whitening'))
    return piece(out, file_name(data, arm, seed, length)+'-test', key, f if todo else None)

def train_and_measure(out, data, s, arm, seed, length):
    "Unless it was done, here or on another machine"
    of = out,data,s,arm,seed,length
    if measured(*of, todo=False): return
    if arm in arms: pretrained(*of)
    measured(*of)

def few_idxs(y, n, seed):
    "`n` images of each class, or all where there are fewer"
    rows = [(y==c).nonzero()[:,0] for c in y.unique()]
    small = torch.cat([o for o in rows if len(o)<n] or [y.new_empty(0)])
    large = torch.cat([o for o in rows if len(o)>=n])
    return torch.cat([small, large[few_label_idxs(y[large], n, seed=seed)]]).sort().values

def with_labels(dls, idxs):
    "The few for training, in whole batches"
    n = len(idxs)
    bs = n//math.ceil(n/dls.train.bs)
    train = dls.train.new(dataset=subset(dls.train.dataset, idxs.tolist()), n=n, bs=bs, shuffle=True, drop_last=True)
    return DataLoaders(train, *dls.loaders[1:], device=dls.device)

# --- the tables -------------------------------------------------------------------------------------------------------
whole = {'20-NN / whitened': ('knn','white'), '3 stages': ('knn 1x1, 3','white 1x1, 3'),
         '2x2': ('knn 2x2, 1','white 2x2, 1'), '2x2, 3 stages': ('knn 2x2, 3','white 2x2, 3'),
         'linear probe on all labels': ('probe',)}
few_ways = dict(probe='probe', spread='spread', tuned='trained', both='trained, spread')

def of_table(head, rows): return '\n'.join([line(head), line(['---']*len(head)), *map(line, rows)])

def rows(out, data, s, seeds, lengths):
    "(name, length, results of the seeds) of what there is"
    for arm,length in [(a,0) for a in baselines]+[(a,n) for n in lengths for a in arms]:
        rs = [(pretrained(out, data, s, arm, i, length, todo=False) if arm in arms else {}, t)
              for i in range(seeds) if (t := measured(out, data, s, arm, i, length, todo=False))]
        if rs: yield arm,length,rs

def table(out, data, s, seeds, lengths):
    "Two in Markdown, from the pieces that there are: with all labels and the costs, and with few"
    few = {f'{n} labels: {v}': (f'{k} {n}',) for n in s.labels[0] for k,v in few_ways.items()}
    tables = [[['features',*whole,'epochs','CPU','wall','seeds']], [['features',*few]]]
    for arm,length,rs in rows(out, data, s, seeds, lengths):
        def cell(of): return ' / '.join(fmt([t[k] for _,t in rs]) for k in of if all(k in t for _,t in rs))
        name = f'{arm}, {length:g} x' if length else arm
        means = [statistics.mean(b[k] for b,_ in rs) for k in ('epochs','cpu','wall')] if length else []
        times = [f'{o:.0f}' if o>=10 else f'{o:.1f}' for o in means] or ['']*3
        costs = [times[0], *(f'{o} s' if o else '' for o in times[1:]), str(len(rs))]
        tables[0].append([name, *map(cell, whole.values()), *costs])
        tables[1].append([name, *map(cell, few.values())])
    return '\n\n'.join(of_table(t[0], t[1:]) for t in tables)

def ahead(out, data, s, seeds, lengths):
    "In how many of the seeds that both have this package is ahead of each other arm, at the best way with few labels"
    def best(n, t): return max(t[k] for w in few_ways if (k := f'{w} {n}') in t)
    figures = {'20-NN': lambda t: t['knn'], 'whitened': lambda t: t['white'],
               **{f'{n} labels': partial(best, n) for n in s.labels[0]}}
    def tests(arm, length): return [measured(out, data, s, arm, i, length, todo=False) for i in range(seeds)]
    lines,mine = [],'this package'
    for length in lengths:
        for arm in (o for o in (*baselines,*arms) if o!=mine):
            pairs = zip(tests(mine, length), tests(arm, length if arm in arms else 0))
            pairs = [o for o in pairs if all(o)]
            if not pairs: continue
            wins = [sum(f(a)>f(b) for a,b in pairs) for f in figures.values()]
            lines.append([arm, f'{length:g} x', *(f'{n} of {len(pairs)}' for n in wins)])
    return of_table(['this package is ahead of','after',*figures], lines) if lines else ''

def report(out, data, s, seeds, lengths):
    "Where and when, the tables; empty where nothing was done"
    found = [(length,*r) for _,length,rs in rows(out, data, s, seeds, lengths) for r in rs]
    if not found: return ''
    pieces = [o for _,*r in found for o in r if o]
    days = sorted({o['date'] for o in pieces})
    units = sorted({round(trained['seconds']/length) for length,trained,_ in found if trained})
    text = [f'{data}: {titles[data]}', ' to '.join(sorted({days[0],days[-1]})),
            '\n'.join(f'- {o}' for o in dict.fromkeys(o for r in pieces for o in r['machine']))]
    if units: text.append(f"1 x is {' or '.join(map(str, units))} s of one thread.")
    return '\n\n'.join([*text, *filter(None, (f(out, data, s, seeds, lengths) for f in (table,ahead)))])

def curve(out, data, s, seeds, lengths):
    "20-NN over seconds: a line for each training"
    fig,ax = plt.subplots(figsize=(6,3.8))
    for color,arm in zip(('C0','C1','C2'), arms):
        found = [r for n in lengths for i in range(seeds) if (r := pretrained(out, data, s, arm, i, n, todo=False))]
        for k,r in enumerate(found):
            ax.plot([o['cpu'] for o in r['points']], [100*o['among'] for o in r['points']], '.-', color=color, lw=1,
                    label=arm if k==0 else None)
    ax.set(title=data, xlabel='CPU seconds of training', ylabel='20-NN among training images, %')
    ax.spines[['top','right']].set_visible(False)
    fig.tight_layout(rect=(0,.08,1,1))
    fig.legend(loc='lower center', ncols=3, frameon=False)
    return fig

def n_measured(text):
    "Measurements in its tables: the sum of the column `seeds`"
    return sum(map(int, re.findall(r'\| (\d+) \|$', text, flags=re.M)))

def keep(data, text, fig):
    """The tables of a data set between its markers in README.md, its picture beside it

    Tables of more measurements stay: their pieces may be on another machine."""
    readme,path = here/'README.md',here/f'clock-{in_file_name(data)}.png'
    mark = f'<!-- clock, {data}: '
    begin,end = f'{mark}written by `python benchmarks/clock.py --write` -->',f'{mark}end -->'
    there,new = n_measured(split_at(readme, begin, end)[1]),n_measured(text)
    if new<there: return print(f'{data}: not written, README.md has {there} measurements and these are {new}')
    fig.savefig(path, dpi=80)
    head,rest = text.split('\n\n', 1)
    alt = f'{data}: accuracy over seconds of training, a line for each training of this package and of lightly'
    write_between(readme, begin, end, f'{head}\n\n![{alt}]({path.name})\n\n{rest}')

def main(argv=None):
    p = parser_of_pieces(__doc__, 'clock')
    p.set_defaults(out=here/'clock')
    p.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    p.add_argument('--data', nargs='+', choices=list(datasets), default=list(datasets))
    p.add_argument('--only', nargs='+', choices=[*baselines,*arms], default=[*baselines,*arms])
    p.add_argument('--lengths', type=float, nargs='+', default=[1.,5.], help='of a training, in budgets')
    args = parse_pieces(p, argv)
    sets = quick if args.quick else {k: datasets[k] for k in args.data}
    out,lengths = args.out/('quick' if args.quick else ''),[.004] if args.quick else args.lengths
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    todo = [] if args.table else [(data,s,arm,seed,length) for seed in args.seeds for data,s in sets.items()
                                  for arm in args.only for length in ([0] if arm in baselines else lengths)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        do_pieces([partial(train_and_measure, out, *o) for o in todo], args.minutes)
    texts = {k: t for k,s in sets.items() if (t := report(out, k, s, max(args.seeds)+1, lengths))}
    text = '\n\n'.join(texts.values())
    print(text)
    if args.write:
        for k,t in texts.items(): keep(k, t, curve(out, k, sets[k], max(args.seeds)+1, lengths))
    return text

if __name__=='__main__': main()
