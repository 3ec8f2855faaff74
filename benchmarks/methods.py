"""The methods beside each other: the same encoder, images, epochs and optimizer, three seeds, batches of 32 and of 256.
Every piece that is done stays in `runs/methods` and is not done again: stop it when you like, and start it again.
`--quick` in seconds, `--write` keeps the table in README.md."""
import copy, statistics, time, warnings
from functools import partial
from pathlib import Path

import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import combined_cos
from fastai.torch_core import set_seed
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead, SimCLRProjectionHead
from lightly.models.utils import update_momentum
from lightly.transforms import MoCoV2Transform, SimCLRTransform
from torch import nn
from torch.utils.data import DataLoader

from harness import do_pieces, line, made_on, parse_pieces, parser_of_pieces, peak_memory, write_between
from quality import Crops, few_probe, features, fmt, piece, quiet, version
from self_supervised_swav.data import digits_dls, fashion_mnist_dls
from self_supervised_swav.deepcluster import DeepClusterV2
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.evaluate import NoValidation, few_label_splits, knn_accuracy, linear_probe
from self_supervised_swav.learner import pretrain_learner
from self_supervised_swav.moco import MoCo, MoCoModel
from self_supervised_swav.multiview import method_named
from self_supervised_swav.simclr import SimCLR
from self_supervised_swav.swav import SWAV

here = Path(__file__).resolve().parent
full = dict(data='digits', size=16, valid_pct=.3, epochs=20, batches=(32,256), channels=(16,32,64,128), labels=10)
quick = dict(full, valid_pct=.8, epochs=1, batches=(64,), channels=(4,8,8,16), labels=4)
fashion = dict(full, data='fashion-mnist', size=28, epochs=8, channels=(32,64,128,256))
arch = dict(layers=(1,1,1,1), zero_init_last=False, small_images=True)

def get_dls(s, bs, seed):
    "Images to learn from, and others to measure on; labels are used for measuring alone"
    set_seed(seed)  # the order of the batches, too
    if s['data']=='digits':
        return digits_dls(size=s['size'], bs=bs, valid_pct=s['valid_pct'], seed=seed, device='cpu')
    return fashion_mnist_dls(n_train=10_000, n_valid=10_000, bs=bs, seed=seed, device='cpu')

def new_encoder(s, seed):
    set_seed(seed)
    return create_encoder('resnet18', n_in=1, pretrained=False, channels=s['channels'], **arch)

# --- the arms: a method, and what differs from its recipe -------------------------------------------------------------
def two_crops(r): return dict(num_crops=(2,), **{k: r['augs'][k][:1] for k in ('crop_sizes','min_scales','max_scales')})
def swav_crops(r):
    "Multi-crop, at sizes below 24 px too, where the recipe has large crops alone"
    return dict(num_crops=(2,4), **{k: r['augs'][k] for k in ('crop_sizes','min_scales','max_scales')})
def hard_codes(r): return swav_crops(r) | dict(hard=True)

def own_recipe(method, s, bs, n):
    return method_named(method).recipe(n_images=n, bs=bs, image_size=s['size'])

def differences(arm, s, bs, n):
    "Method and settings of an arm"
    method,change = arms[arm]
    base = own_recipe('swav' if change is swav_crops else method, s, bs, n)
    given = change(base) if callable(change) else change
    return method,given | (dict(flip_p=0.) if s['data']=='digits' else {})

arms = {'SwAV': ('swav',swav_crops), 'SwAV, two crops': ('swav',two_crops), 'SwAV, hard codes': ('swav',hard_codes),
        'SimCLR': ('simclr',{}), 'SimCLR, multi-crop': ('simclr',swav_crops), 'MoCo v2': ('mocov2',{}),
        'DeepCluster-v2': ('deepclusterv2',{}), 'lightly SimCLR': ('simclr',None), 'lightly MoCo v2': ('mocov2',None)}
# what a step does; the formulas below it are held to their definitions by tests
parts = dict(swav=[SWAV.view_loss], simclr=[SimCLR.view_loss], mocov2=[MoCo.view_loss,MoCo.after_step,MoCoModel],
             deepclusterv2=[DeepClusterV2._fill_memory,DeepClusterV2._cluster,DeepClusterV2.view_loss])

class Stop(Callback):
    "Ends a fit after `n` batches"
    order = 99
    def __init__(self, n): self.n = n
    def after_batch(self):
        if self.train_iter>=self.n: raise CancelFitException

def train_ours(arm, s, bs, seed, n_steps=None):
    "A function that pretrains, and the encoder"
    dls = get_dls(s, bs, seed)
    encoder = new_encoder(s, seed)
    method,given = differences(arm, s, bs, len(dls.train.dataset))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = quiet(pretrain_learner(dls, encoder, method, bf16=False, cbs=NoValidation(), **given))
    if n_steps: learn.add_cb(Stop(n_steps))
    return partial(learn.fit_one_cycle, s['epochs']),encoder

# --- lightly ----------------------------------------------------------------------------------------------------------
class LightlySimCLR(nn.Module):
    "Encoder, head and loss, put together as in lightly's example"
    def __init__(self, encoder, width, r):
        super().__init__()
        self.net = nn.Sequential(encoder, SimCLRProjectionHead(width, r['model']['hidden_size'], 128))
        self.criterion = NTXentLoss(r['simclr']['temp'])
    def forward(self, a, b): return self.criterion(self.net(a), self.net(b))
    def after_step(self): pass

class LightlyMoCo(nn.Module):
    "The same with a momentum encoder and a memory bank"
    def __init__(self, encoder, width, r):
        super().__init__()
        self.net = nn.Sequential(encoder, MoCoProjectionHead(width, r['model']['hidden_size'], 128,
                                                             batch_norm=r['model'].get('bn', False)))
        self.keys = copy.deepcopy(self.net).requires_grad_(False)
        self.m,self.criterion = r['mocov2']['m'],NTXentLoss(r['mocov2']['temp'], (r['mocov2']['K'],128))
    def forward(self, a, b):
        with torch.no_grad(): keys = self.keys(b)
        return self.criterion(self.net(a), keys)
    def after_step(self): update_momentum(self.net, self.keys, self.m)

def train_lightly(arm, s, bs, seed, n_steps=None):
    "lightly's modules, with the crops, the learning rate and the schedule of this package's recipe"
    dls,encoder = get_dls(s, bs, seed),new_encoder(s, seed)
    x = dls.train.dataset.x
    method = arms[arm][0]
    r = own_recipe(method, s, bs, len(x))
    tfm,model = dict(simclr=(SimCLRTransform,LightlySimCLR), mocov2=(MoCoV2Transform,LightlyMoCo))[method]
    strength = r['augs']['jitter_s'] if method=='simclr' else 1.  # MoCoV2Transform has the half strength already
    tfm = tfm(input_size=s['size'], min_scale=r['augs']['min_scales'][0], hf_prob=0. if s['data']=='digits' else .5,
              gaussian_blur=0., cj_strength=strength, normalize=None)
    loader = DataLoader(Crops(x, tfm), batch_size=bs, shuffle=True, drop_last=True)
    model = model(encoder, s['channels'][-1], r).train()
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=r['fit']['lr'], betas=(.9,.99),
                            eps=1e-5, weight_decay=r['opt']['wd'])
    lr,total = r['fit']['lr'],s['epochs']*len(loader)
    lrs,moms = combined_cos(.25, lr/25, lr, lr/1e5),combined_cos(.25, .95, .85, .95)  # as `fit_one_cycle`
    def run():
        i = 0
        for _ in range(s['epochs']):
            for crops in loader:
                opt.param_groups[0].update(lr=lrs(i/total), betas=(moms(i/total),.99))
                model(*crops).backward()
                opt.step()
                opt.zero_grad()
                model.after_step()
                i += 1
                if i==n_steps: return
    return run,encoder

def training(arm, *args, **kwargs):
    f = train_ours if arms[arm][1] is not None else train_lightly
    return f(arm, *args, **kwargs)

def few_steps(arm, s, bs, small=False):
    "A function that makes two steps, to see what memory they take"
    return training(arm, dict(s, epochs=1), 8 if small else bs, 0, n_steps=2)[0]

# --- pieces that are done once ----------------------------------------------------------------------------------------
# read when they are imported: a file that changes during a run is not what runs
versions = {arm: version(get_dls, new_encoder, *((train_ours,two_crops,swav_crops,*parts[k]) if change is not None else
                                                 (train_lightly,LightlySimCLR,LightlyMoCo)))
            for arm,(k,change) in arms.items()}

def key_of(arm, s, bs, seed):
    "What a piece depends on: settings, the recipe's values, and the code of the method"
    method,n = arms[arm][0],len(get_dls(s, bs, seed).train.dataset)
    given = differences(arm, s, bs, n)[1] if arms[arm][1] is not None else {}
    return dict({k:v for k,v in s.items() if k!='batches'}, arm=arm, bs=bs, seed=seed, arch=arch, given=given,
                recipe=dict(own_recipe(method, s, bs, n)), version=versions[arm], torch=torch.__version__)

def judged(dls, encoder, s, bs, seed):
    "What labels say about the features"
    fs = features(dls, encoder)
    few = features(few_label_splits(get_dls(s, bs, seed), n_per_class=s['labels'], seed=seed), encoder)
    return dict(knn=knn_accuracy(*fs), probe=linear_probe(*fs).top1, few=few_probe(*few, seed))

def pretrained(out, arm, s, bs, seed, todo=True):
    "One pretraining, its time, and what labels say about it"
    def f():
        run,encoder = training(arm, s, bs, seed)
        wall,cpu = time.perf_counter(),time.process_time()
        run()
        r = dict(wall=(time.perf_counter()-wall)/s['epochs'], cpu=(time.process_time()-cpu)/s['epochs'])
        return r|judged(get_dls(s, bs, seed), encoder, s, bs, seed)
    return piece(out, f'{arm}-{bs}-{seed}', key_of(arm, s, bs, seed), f if todo else None)

def untrained(out, s, seed, todo=True):
    bs = s['batches'][0]
    key = {k:v for k,v in s.items() if k not in ('batches','epochs')}
    key |= dict(seed=seed, arch=arch, torch=torch.__version__)
    def f(): return judged(get_dls(s, bs, seed), new_encoder(s, seed), s, bs, seed)
    return piece(out, f'untrained-{seed}', key, f if todo else None)

def memory(out, arm, s, bs, todo=True):
    key = key_of(arm, s, bs, 0)
    def f(): return dict(peak=peak_memory(few_steps, arm, s, bs)/2**20)
    return piece(out, f'memory-{arm}-{bs}', key, f if todo else None)

# --- the table --------------------------------------------------------------------------------------------------------
signs = ('knn','probe','few')

def rows(out, s, seeds):
    "The rows of the table, from the pieces that there are"
    base = [r for i in range(seeds) if (r := untrained(out, s, i, todo=False))]
    def judged(rs): return [fmt([r[k] for r in rs]) for k in signs]
    if base: yield ['untrained encoder','',*judged(base),'','',str(len(base))]
    for arm in arms:
        for bs in s['batches']:
            runs = [r for i in range(seeds) if (r := pretrained(out, arm, s, bs, i, todo=False))]
            if not runs: continue
            m = memory(out, arm, s, bs, todo=False)
            times = f"{statistics.median(r['cpu'] for r in runs):.2f} s"
            yield [arm,str(bs),*judged(runs),times,f"{m['peak']:.0f} MB" if m else '',str(len(runs))]

# what the articles say, and the two arms that show it: the first is said to be better
claims = [('multi-crop helps SwAV','SwAV','SwAV, two crops'), ('multi-crop helps SimCLR','SimCLR, multi-crop','SimCLR'),
          ('soft codes beat hard ones online','SwAV','SwAV, hard codes'),
          ('SwAV beats SimCLR','SwAV','SimCLR'),
          ('SwAV without a memory bank beats MoCo with one','SwAV','MoCo v2'),
          ('clustering online is as good as offline','SwAV','DeepCluster-v2')]

def difference(pairs, k):
    "Mean difference in points over seeds, and in how many of them the first is better"
    d = [100*(a[k]-b[k]) for a,b in pairs]
    return f'{statistics.mean(d):+.1f} ({sum(o>0 for o in d)} of {len(d)})'

def claim_rows(out, s, seeds):
    "Claims of the articles beside what is measured, seed by seed"
    def runs(arm, bs): return {i: r for i in range(seeds) if (r := pretrained(out, arm, s, bs, i, todo=False))}
    small,large = s['batches'][0],s['batches'][-1]
    cases = [(text,f'{a} - {b}',str(bs),runs(a, bs),runs(b, bs)) for text,a,b in claims for bs in s['batches']]
    if small!=large:
        text = 'SwAV is less sensitive to the batch than SimCLR'
        cases += [(text,f'{arm}: large - small batch',f'{large}, {small}',runs(arm, large),runs(arm, small))
                  for arm in ('SwAV','SwAV, two crops','SimCLR')]
    for *said,x,y in cases:
        pairs = [(x[i],y[i]) for i in x if i in y]
        if pairs: yield [*said,*(difference(pairs, k) for k in signs)]

def report(out, s, seeds):
    "Both tables in Markdown"
    def markdown(names, rs): return '\n'.join([line(names), line(['---']*len(names)), *map(line, rs)])
    judges = '20-NN','linear probe',f"{s['labels']} labels a class: probe"
    text = markdown(['method','batch',*judges,'CPU time of an epoch','peak memory of a step','seeds'],
                    list(rows(out, s, seeds)))
    said = list(claim_rows(out, s, seeds))
    return f"{text}\n\n{markdown(['claim','difference','batch',*judges], said)}" if said else text

begin,end = '<!-- methods: written by `make bench-methods` -->','<!-- methods: end -->'

def write(path, text):
    "Keep the tables in the file"
    write_between(path, begin, end, text)

def main(argv=None):
    p = parser_of_pieces(__doc__, 'methods')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--only', nargs='+', choices=list(arms), default=list(arms))
    p.add_argument('--data', choices=['digits','fashion-mnist'], default='digits')
    p.add_argument('--epochs', type=int, help=f"(default: {full['epochs']}; fashion-mnist: {fashion['epochs']})")
    args = parse_pieces(p, argv)
    s = dict(quick if args.quick else full if args.data=='digits' else fashion)
    if args.epochs: s['epochs'] = args.epochs
    out = args.out/('quick' if args.quick else s['data'])
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # CPU times of one thread compare on a machine that does other things
    todo = [partial(untrained, out, s, i) for i in range(args.seeds)]
    cases = [(arm,s,bs) for arm in args.only for bs in s['batches']]
    todo += [partial(pretrained, out, *o, i) for i in range(args.seeds) for o in cases]
    if not args.quick: todo += [partial(memory, out, *o) for o in cases]
    do_pieces([] if args.table else todo, args.minutes)
    text = report(out, s, args.seeds)
    print(text)
    if args.write: write(here/'README.md', made_on(more=f", {s['epochs']} epochs") + f'\n\n{text}')
    return text

if __name__=='__main__': main()
