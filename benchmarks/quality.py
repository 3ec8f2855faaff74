"""What the features of Fashion-MNIST are worth: raw pixels, an untrained encoder, this package's defaults, lightly's
SwAV. Every piece that is done stays in `runs/quality` and is not done again: stop it when you like, and start it again.
`--quick` on digits in seconds, `--write` keeps the table in README.md."""
import ast, hashlib, importlib.metadata, inspect, json, math, os, statistics, sys, textwrap, time, warnings
from datetime import date
from functools import partial
from pathlib import Path

import torch, torch.nn.functional as F
from fastai.callback import schedule  # noqa: F401  it patches Learner
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.torch_core import set_seed
from fastai.vision.core import imagenet_stats
from lightly.loss import SwaVLoss
from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes
from lightly.transforms import SwaVTransform
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.model_selection import StratifiedKFold
from torch import nn
from torch.utils.data import DataLoader, Dataset

import self_supervised_swav
from harness import do_pieces, line, made_on, parse_pieces, parser_of_pieces, write_between
from self_supervised_swav.augment import get_batch_augs
from self_supervised_swav.compare import AsTrained
from self_supervised_swav.data import digits_dls, fashion_mnist_dls
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.evaluate import (extract_features, few_label_learner, few_label_splits, knn_accuracy,
                                           linear_probe)
from self_supervised_swav.learner import swav_learner
from self_supervised_swav.evaluate import NoValidation
from self_supervised_swav.whitening import Whitening

here = Path(__file__).resolve().parent
full = dict(data='fashion-mnist', size=28, bs=128, epochs=4, channels=(32,64,128,256), labels=(10,60),
            tune_epochs=(60,40), threads=2)
quick = dict(full, data='digits', size=16, bs=32, epochs=1, channels=(4,8,8,16), labels=(2,4), tune_epochs=(1,1),
             threads=1)
arch = dict(layers=(1,1,1,1), zero_init_last=False, small_images=True)

def get_dls(s, seed):
    "10,000 images to learn from and 10,000 to measure on; labels are used for measuring alone"
    if s['data']=='digits': return digits_dls(size=s['size'], bs=s['bs'], valid_pct=.8, seed=seed, device='cpu')
    return fashion_mnist_dls(n_train=10_000, n_valid=10_000, bs=s['bs'], seed=seed, device='cpu')

def new_encoder(s, seed):
    set_seed(seed)
    return create_encoder('resnet18', n_in=1, pretrained=False, channels=s['channels'], **arch)

# --- measuring --------------------------------------------------------------------------------------------------------
def quiet(learn):
    learn.remove_cb(ProgressCallback).logger = lambda *_: None
    return learn

def reader(encoder, n_in):
    "An encoder of images in [0,1] of their own size, which it normalizes as the recipe does"
    return AsTrained(encoder, stats=imagenet_stats if n_in==3 else None)

def features(dls, encoder=None):
    "(features, labels) of both parts; of pixels where there is no encoder"
    return [extract_features(nn.Flatten() if encoder is None else encoder, dl, progress=False) for dl in dls]

def few_probe(train, valid, seed):
    "Linear probe on few labels, its penalty by cross-validation among them"
    x,y = train
    least = int(min(n for n in y.bincount() if n))
    folds = list(StratifiedKFold(min(5, max(2, least)), shuffle=True, random_state=seed).split(x, y))
    def score(C): return statistics.mean(linear_probe((x[a],y[a]), (x[b],y[b]), C=C).top1 for a,b in folds)
    return linear_probe(train, valid, C=max((1e-3,1e-2,1e-1,1.), key=score)).top1

def tuned_learner(encoder, dls, epochs, pretrained):
    "An encoder and a new head, trained on few labels: head first, then all; all at once from scratch"
    aug = get_batch_augs(dls.train.one_batch()[0].shape[-1], jitter=False, bw=False, blur=False, resize_scale=(.5,1.),
                         stats=None)
    dls.train.after_batch.add(aug[0])
    dls.train.after_batch.split_idx = 0
    learn = quiet(few_label_learner(encoder, dls, pretrained=pretrained, cbs=NoValidation()).to_bf16())
    if pretrained: learn.fine_tune(epochs, base_lr=4e-3, freeze_epochs=epochs//4, lr_mult=4)
    else: learn.fit_one_cycle(epochs+epochs//4, 4e-3)
    return learn

def tuned(encoder, dls, epochs, pretrained): return accuracy_of(tuned_learner(encoder, dls, epochs, pretrained))

def accuracy_of(learn):
    learn.model.eval()
    with torch.no_grad(): right = [(learn.model(x).argmax(1)==y).float() for x,y in learn.dls.valid]
    return torch.cat(right).mean().item()

# --- the arms ---------------------------------------------------------------------------------------------------------
class Watch:
    "Wall and CPU time (of this process and of its workers) of training alone, and the accuracy on the way"
    def __init__(self, encoder, dls): self.encoder,self.dls,self.wall,self.cpu,self.epochs = encoder,dls,0.,0.,[]
    def cpu_now(self): return sum(os.times()[:4])
    def start(self): self.t,self.c = time.perf_counter(),self.cpu_now()
    def stop(self):
        self.wall += time.perf_counter()-self.t
        self.cpu += self.cpu_now()-self.c
    def measure(self):
        self.epochs.append(dict(knn=knn_accuracy(*features(self.dls, self.encoder)), wall=self.wall, cpu=self.cpu))
    def result(self): return dict(epochs=self.epochs, wall=self.wall, cpu=self.cpu)

class EpochWatch(Callback):
    "Leaves the measuring out of the time of a fit"
    order = 90
    def __init__(self, watch): self.watch = watch
    def after_train(self):
        self.watch.stop()
        self.watch.measure()
        self.watch.start()

def pretrain_ours(s, seed):
    "`swav_learner` and fastai's usual schedule, nothing chosen by hand"
    dls = get_dls(s, seed)
    set_seed(seed)
    learn = quiet(swav_learner(dls, 'resnet18', encoder=dict(layers=arch['layers'], channels=s['channels']),
                               cbs=NoValidation()))
    watch = Watch(learn.model.encoder, dls)
    learn.add_cb(EpochWatch(watch))
    watch.start()
    learn.fit_one_cycle(s['epochs'])
    watch.stop()
    return learn.model.encoder,watch.result()|dict(loss=learn.collapse_monitor.history['loss/lnK'][-1],
                                                   recipe=str(learn.recipe))

class Crops(Dataset):
    "lightly's crops of one image per item"
    def __init__(self, x, tfm):
        x = x if x.dtype==torch.uint8 else (x*255).round().byte()
        self.images,self.tfm = [Image.fromarray(o) for o in x.permute(0,2,3,1).squeeze(-1).numpy()],tfm
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return self.tfm(self.images[i])

class LightlyModel(nn.Module):
    "SwAV put together as in lightly's example"
    def __init__(self, backbone, width):
        super().__init__()
        self.backbone = backbone
        self.projection_head = SwaVProjectionHead(width, 512, 128)
        self.prototypes = SwaVPrototypes(128, n_prototypes=512)
    def forward(self, x):
        return self.prototypes(F.normalize(self.projection_head(self.backbone(x).flatten(start_dim=1)), dim=1, p=2))

def pretrain_lightly(s, seed):
    "lightly's example: its crops scaled from 224 and 96 px, 512 prototypes, Adam at 1e-3, two loader processes"
    dls,encoder = get_dls(s, seed),new_encoder(s, seed)
    small = round(s['size']*96/224)
    crops = Crops(dls.train.dataset.x, SwaVTransform(crop_sizes=(s['size'],small), normalize=None))
    loader = DataLoader(crops, batch_size=s['bs'], shuffle=True, drop_last=True, num_workers=2)
    model,criterion = LightlyModel(encoder, s['channels'][-1]),SwaVLoss()
    opt,watch = torch.optim.Adam(model.parameters(), lr=1e-3),Watch(encoder, dls)
    model.train()
    for _ in range(s['epochs']):
        watch.start()
        for crops in loader:
            model.prototypes.normalize()
            scores = [model(o) for o in crops]
            loss = criterion(scores[:2], scores[2:])
            loss.backward()
            opt.step()
            opt.zero_grad()
        watch.stop()
    watch.measure()
    return encoder,watch.result()|dict(loss=loss.item()/math.log(512))

def untrained(s, seed): return new_encoder(s, seed),dict(wall=0., cpu=0.)
def pixels(s, seed): return None,dict(wall=0., cpu=0.)
arms = {'raw pixels': pixels, 'untrained encoder': untrained, 'this package': pretrain_ours,
        'lightly': pretrain_lightly}

# --- pieces that are done once ----------------------------------------------------------------------------------------
_ours = 'augment encoders learner losses models multiview optimizer precision queue recipes sinkhorn swav'.split()
modules = {'raw pixels': ['data'], 'untrained encoder': ['data','encoders'], 'this package': ['data',*_ours],
           'lightly': ['data','encoders']}

# read when they are imported: a file that changes during a run is not what runs
sources = {o.stem: o.read_text(encoding='utf-8') for o in Path(self_supervised_swav.__file__).parent.glob('*.py')}

def version(*objects):
    "A hash of what functions and modules do: comments and docstrings do not count"
    h = hashlib.sha1()
    for o in objects:
        tree = ast.parse(sources[o] if isinstance(o, str) else textwrap.dedent(inspect.getsource(o)))
        for node in ast.walk(tree):
            body = getattr(node, 'body', None)
            if isinstance(body, list):
                node.body = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
        h.update(ast.dump(tree).encode())
    return h.hexdigest()[:12]

def piece(out, name, key, f, anew=False):
    "What `f` gives, from the file of the last time where `key` is the same, unless `anew`"
    path = out/f"{name.replace(' ', '-')}.json"
    old = json.loads(path.read_text()) if path.exists() and not anew else {}
    if old.get('key')==json.loads(json.dumps(key)): return old
    if f is None: return None
    print(f'{name} ...', file=sys.stderr, flush=True)
    start,cpu = time.perf_counter(),sum(os.times()[:4])
    r = dict(f(), key=key)
    r |= dict(piece_wall=time.perf_counter()-start, piece_cpu=sum(os.times()[:4])-cpu, date=str(date.today()),
              load=os.getloadavg()[0])
    tmp = path.with_suffix('.tmp')
    tmp.write_text(json.dumps(r, indent=1))
    tmp.replace(path)
    return r

def pretrained(out, arm, s, seed, todo=True):
    "Pretraining, and what all labels say about it"
    def f():
        encoder,r = arms[arm](s, seed)
        if encoder is not None: save_file({k: v.contiguous() for k,v in encoder.state_dict().items()}, path)
        fs = features(get_dls(s, seed), encoder)
        return r|dict(knn=knn_accuracy(*fs), probe=linear_probe(*fs).top1)
    path = out/f"{arm.replace(' ', '-')}-{seed}.safetensors"
    own = {'this package': [pretrain_ours], 'lightly': [pretrain_lightly,LightlyModel,Crops]}.get(arm, [])
    key = dict(s, arch=arch, seed=seed, arm=arm, version=version(get_dls, new_encoder, *own, *modules[arm]),
               torch=torch.__version__, lightly=importlib.metadata.version('lightly'))
    return piece(out, f'{arm}-{seed}', key, f if todo else None)

def few_labels(out, arm, s, seed, i, todo=True):
    "The same features, and the same encoder, with few labels"
    n,base = s['labels'][i],pretrained(out, arm, s, seed, todo=False)
    def f():
        encoder = None if arm=='raw pixels' else new_encoder(s, seed)
        if encoder is not None: encoder.load_state_dict(load_file(out/f"{arm.replace(' ', '-')}-{seed}.safetensors"))
        dls = few_label_splits(get_dls(s, seed), n_per_class=n, seed=seed)
        r = dict(probe=few_probe(*features(dls, encoder), seed))
        if arm=='raw pixels': return r
        set_seed(seed)
        return r|dict(tuned=tuned(encoder, dls, s['tune_epochs'][i], arm!='untrained encoder'))
    if base is None: return None
    key = dict(s, base=base['key'], n=n, version=version(few_probe, tuned_learner, 'evaluate'))
    return piece(out, f'{arm}-{seed}-{n}', key, f if todo else None)

def whitened(out, arm, s, seed, todo=True):
    "The vote in whitened features, fitted to the training images without labels: the baseline of pixels gains too"
    base = pretrained(out, arm, s, seed, todo=False)
    def f():
        encoder = None if arm=='raw pixels' else new_encoder(s, seed)
        if encoder is not None: encoder.load_state_dict(load_file(out/f"{arm.replace(' ', '-')}-{seed}.safetensors"))
        fs = features(get_dls(s, seed), encoder)
        wholly = Whitening.fit(fs[0][0], shrink=0.)
        return dict(knn=knn_accuracy(*fs, whiten=True), knn_wholly=knn_accuracy(*fs, whiten=wholly))
    if base is None: return None
    key = dict(s, base=base['key'], version=version('whitening'))
    return piece(out, f'{arm}-{seed}-whitened', key, f if todo else None)

# --- the table --------------------------------------------------------------------------------------------------------
def fmt(values, digits=1):
    "Mean and standard deviation of percentages"
    values = [100*v for v in values]
    return f'{statistics.mean(values):.{digits}f}' + (f' ± {statistics.stdev(values):.{digits}f}' if len(values)>1
                                                      else '')

def seconds_to(run, knn, key='wall'):
    "Training time after which the accuracy is at least `knn`; None if it never is"
    return next((e[key] for e in run['epochs'] if e['knn']>=knn), None)

def report(out, s, seeds):
    "The table in Markdown, from the pieces that there are"
    a,b = s['labels']
    columns = ['features','20-NN','20-NN, whitened','linear probe',
               *(f'{n} labels a class: {k}' for n in (a,b) for k in ('probe','trained')),'training, wall','CPU','seeds']
    rows = []
    for arm in arms:
        base = [r for i in range(seeds) if (r := pretrained(out, arm, s, i, todo=False))]
        if not base: continue
        white = [r['knn'] for i in range(seeds) if (r := whitened(out, arm, s, i, todo=False))]
        few = [[r for i in range(seeds) if (r := few_labels(out, arm, s, i, k, todo=False))] for k in range(2)]
        cells = [fmt([r[k] for r in f]) if f and k in f[0] else '' for f in few for k in ('probe','tuned')]
        times = [f"{statistics.mean(r[k] for r in base):.0f} s" if base[0]['wall'] else '' for k in ('wall','cpu')]
        rows.append([arm + (', trained: from scratch' if arm=='untrained encoder' else ''),
                     fmt([r['knn'] for r in base]), fmt(white) if white else '', fmt([r['probe'] for r in base]),
                     *cells, *times, str(len(base))])
    text = '\n'.join([line(columns), line(['---']*len(columns)), *map(line, rows)])
    pairs = [(o,t) for i in range(seeds) if (o := pretrained(out, 'this package', s, i, todo=False))
             and (t := pretrained(out, 'lightly', s, i, todo=False))]
    return '\n'.join([text, *([''] if pairs else []), *(race_line(i, o, t) for i,(o,t) in enumerate(pairs))])

def race_line(seed, ours, theirs):
    "When this package's features are as good as lightly's last"
    knn = theirs['knn']
    x = [seconds_to(ours, knn, k) for k in ('wall','cpu')]
    when = 'is not reached'
    if x[0] is not None:
        when = (f"is reached after {x[0]:.0f} s of its {theirs['wall']:.0f} s ({x[0]/theirs['wall']:.0%}; "
                f"CPU time {x[1]/theirs['cpu']:.0%})")
    curve = ' '.join(f"{100*e['knn']:.1f}" for e in ours['epochs'])
    return f"- seed {seed}: lightly's last 20-NN accuracy, {knn:.1%}, {when}. After each epoch: {curve}"

begin,end = '<!-- quality: written by `make bench-quality` -->','<!-- quality: end -->'

def write(path, text):
    "Keep the table in the file"
    write_between(path, begin, end, text)

def main(argv=None):
    p = parser_of_pieces(__doc__, 'quality')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--only', nargs='+', choices=list(arms), default=list(arms))
    p.add_argument('--epochs', type=int, help=f"of pretraining (default: {full['epochs']})")
    args = parse_pieces(p, argv)
    s = dict(quick if args.quick else full)
    if args.epochs: s['epochs'] = args.epochs
    out = args.out/'quick' if args.quick else args.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(s['threads'])
    todo = [] if args.table else [partial(f, out, arm, s, seed, *more) for seed in range(args.seeds)
                                  for arm in args.only for f,*more in ((pretrained,), (whitened,), (few_labels,0),
                                                                       (few_labels,1))]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        do_pieces(todo, args.minutes)
    text = report(out, s, args.seeds)
    print(text)
    if args.write: write(here/'README.md', f'{made_on()}\n\n{text}')
    return text

if __name__=='__main__': main()
