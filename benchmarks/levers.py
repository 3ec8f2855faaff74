"""What each lever of the recipe is worth on images that no test uses: one setting changed at a time, then together.

`python benchmarks/levers.py [--only NAME ...] [--data fashion digits clipart] [--seeds 3]`. Each piece stays in
`runs/levers` and is not done again. Every figure is of a validation part of the training images; `--table` prints them.
CPU seconds of one thread are what is compared: the machine may be shared."""
import argparse, copy, json, statistics, sys, time, warnings
from functools import partial
from pathlib import Path

import kornia.augmentation as K, torch, torch.nn.functional as F
from fastai.callback import schedule  # noqa: F401  it patches Learner
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.optimizer import OptimWrapper
from fastai.torch_core import TensorImage, set_seed
from fasttransform import Pipeline, Transform
from safetensors.torch import load_file, save_file
from torch import nn

from harness import line
from selection import drawings
from self_supervised_swav.augment import BatchAugment
from self_supervised_swav.compare import AsTrained
from self_supervised_swav.data import digits_dls, fashion_mnist_dls, tensor_dls
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.evaluate import NoValidation, extract_features, few_label_idxs, knn_accuracy, linear_probe
from self_supervised_swav.learner import swav_learner
from self_supervised_swav.precision import is_fast
from self_supervised_swav.whitening import Whitening

here = Path(__file__).resolve().parent

# --- data: training images, and others of the training part to choose by ---------------------------------------------
def fashion(bs, seed, n_train=10_000, n_valid=5_000):
    "15,000 of the 60,000 training images; the 10,000 test images are not opened for the choice"
    ds = fashion_mnist_dls(n_train=n_train+n_valid, n_valid=10, bs=bs, seed=1000+seed, device='cpu').train.dataset
    return tensor_dls(ds.x, ds.y, ds.vocab, bs=bs, splits=(list(range(n_train)),list(range(n_train, n_train+n_valid))),
                      device='cpu')

def fashion_test(seed):
    "The same training images, and the 10,000 test images: for the report, once"
    train,dls = fashion(128, seed).train,fashion_mnist_dls(n_train=10, device='cpu')
    return DataLoaders(train, dls.valid)

def digits(bs, seed): return digits_dls(bs=bs, valid_pct=.3, seed=seed, device='cpu')

def clipart(bs, seed, size=64):
    "Drawings, a quarter of the training part to choose by; the test part is not opened"
    o,vocab = drawings(size)
    own = (~o['held_out']).nonzero()[:,0]
    own = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(0))]
    splits = [part.tolist() for part in own.split([len(own)-len(own)//4, len(own)//4])]
    return tensor_dls(o['x'], o['y'], vocab, bs=bs, splits=splits, device='cpu')

datasets = dict( # its DataLoaders, pixels, widths of the encoder, batch size and epochs of the comparison
    fashion=(fashion, 28, (32,64,128,256), 128, 4),
    narrow=(fashion, 28, (16,32,64,128), 128, 4),  # half of the width, for a first look at a lever
    digits=(digits, 28, (16,32,64,128), 128, 20),
    clipart=(clipart, 64, (32,64,128,256), 128, 6))

# --- callbacks of levers that are no settings -------------------------------------------------------------------------
class Average(Callback):
    "A moving average of the weights, which takes their place after the fit"
    order = 80
    def __init__(self, decay=.99): self.decay = decay
    def before_fit(self): self.mean = copy.deepcopy(self.learn.model.state_dict())
    def after_step(self):
        for m,v in zip(self.mean.values(), self.learn.model.state_dict().values()):
            if m.is_floating_point(): m.lerp_(v, 1-self.decay)
            else: m.copy_(v)
    def after_fit(self): self.learn.model.load_state_dict(self.mean)

class FirstProtos(Callback):
    "Prototypes by spherical k-means of the embeddings of some batches"
    def __init__(self, n_batches=16): self.n_batches = n_batches
    @torch.no_grad()
    def before_fit(self):
        model,xs = self.learn.model,[]
        model.train()
        state = copy.deepcopy(model.state_dict())
        for i,b in enumerate(self.dls.train):
            if i==self.n_batches: break
            xs += [model.embed([o]).float() for o in self.learn.swav.cut(b[0])[:2]]
        model.load_state_dict(state)
        x = F.normalize(torch.cat(xs), dim=1)
        c = x[torch.randperm(len(x))[:len(model.prototypes.weight)]]
        for _ in range(20):
            own = (x @ c.T).argmax(1)
            new = torch.zeros_like(c).index_add_(0, own, x)
            c = torch.where(new.norm(dim=1, keepdim=True)>0, F.normalize(new, dim=1), c)
        model.prototypes.weight.copy_(c)
FirstProtos.order = 9

class CropsFirst(Callback):
    "Crops of other settings in the first part of a fit"
    order = 9
    def __init__(self, pct=.6, **settings): self.pct,self.settings = pct,settings
    def before_fit(self):
        self.usual = self.learn.swav.aug_pipelines
        aug = self.usual[0].fs[0].aug
        settings = dict(size=self.learn.swav.views.sizes[0]) | aug.settings | self.settings
        other = BatchAugment(type(aug)(**settings))
        self.first,self.then = self.parts([Pipeline([other], split_idx=0) for _ in self.usual])
    def parts(self, others): return others,self.usual
    def before_batch(self):
        self.learn.swav.aug_pipelines = self.first if self.learn.pct_train<self.pct else self.then
    def after_fit(self): self.learn.swav.aug_pipelines = self.usual

class MoreLate(CropsFirst):
    "As many crops of other settings beside the usual ones in the last part of a fit"
    def parts(self, others): return self.usual,[*self.usual, *others]

class BatchGrows(Callback):
    "Batches of half the size in the first half of the epochs, of twice the size in the second"
    def before_fit(self): self.bs = self.dls.train.bs
    def before_epoch(self): self.dls.train.bs = 2*self.bs if self.epoch>=self.n_epoch/2 else self.bs//2
    def after_fit(self): self.dls.train.bs = self.bs

class CodesOfAverage(Callback):
    "Codes by a moving average of the model"
    order = 9  # before mixed precision wraps the `forward` of the model: a copy would call the model's
    def __init__(self, decay=.99): self.decay = decay
    def before_fit(self):
        self.mean = copy.deepcopy(self.learn.model).requires_grad_(False)
        self.learn.swav.get_codes = self.codes
    @torch.no_grad()
    def codes(self, scores):
        swav,n = self.learn.swav,len(self.learn.swav.crop_assgn_ids)
        fast = torch.autocast('cpu', torch.bfloat16, enabled=is_fast(torch.bfloat16, 'cpu'))
        with fast: slow = self.mean(self.learn.xb[0][:n])[1]
        return type(swav).get_codes(swav, slow.float().unflatten(0, (n,-1)))
    @torch.no_grad()
    def after_step(self):
        for m,v in zip(self.mean.parameters(), self.learn.model.parameters()): m.lerp_(v, 1-self.decay)
    def after_fit(self): del self.learn.swav.get_codes

class EpsOver(Callback):
    "`eps` from one value to another over the fit"
    def __init__(self, start, end): self.start,self.end = start,end
    def before_batch(self): self.learn.swav.eps = self.start+(self.end-self.start)*self.learn.pct_train

class KoLeo(Callback):
    "Prototypes that lie close push each other apart (arXiv 2410.14060)"
    def __init__(self, weight=.1): self.weight = weight
    def after_loss(self):
        c = F.normalize(self.learn.model.prototypes.weight, dim=1)
        nearest = (c @ c.T - 2*torch.eye(len(c))).max(1).values
        self.learn.loss_grad = self.learn.loss_grad - self.weight*(2-2*nearest).clamp(min=1e-6).sqrt().log().mean()

class OwnProtos(Callback):
    "Prototypes are moving means of the embeddings that they are the codes of; no gradient reaches them (2510.20108)"
    order = 5  # before they are normalized
    def __init__(self, decay=.98): self.decay = decay
    def before_step(self): self.learn.model.prototypes.weight.grad = None
    @torch.no_grad()
    def after_step(self):
        codes = self.learn.swav.codes
        embedding = self.learn.pred[0].float().unflatten(0, (-1,codes.shape[1]))[:len(codes)]
        means = F.normalize(torch.einsum('abk,abd->kd', codes, embedding), dim=1)
        self.learn.model.prototypes.weight.lerp_(means, 1-self.decay)

class Kornia(Transform):
    "An operation of kornia on crops in [0,1]: those of one channel are not normalized"
    split_idx,order = 0,100
    def __init__(self, f): self.f = f
    def encodes(self, x:TensorImage): return TensorImage(self.f(x.as_subclass(torch.Tensor)))

def muon(params, **kwargs):
    "Muon for the weights of layers, AdamW for all else"
    from timm.optim import Muon
    return OptimWrapper(params, Muon, nesterov=True, weight_decay=kwargs.pop('wd', .01), **kwargs)

def lars(params, **kwargs):
    "As in the paper: LARS, momentum, hardly any weight decay"
    from timm.optim import Lars
    kwargs.pop('wd')
    return OptimWrapper(params, Lars, momentum=.9, weight_decay=1e-6, **kwargs)

def one_cycle(learn, n, lr, **kwargs): learn.fit_one_cycle(n, lr_max=lr, **kwargs)

# --- the levers -------------------------------------------------------------------------------------------------------
small = dict(layers=(1,1,1,1))
levers = { # bs and epochs (of 4), as factors; lr as a factor of the recipe's; settings of swav_learner; callbacks
    'base': dict(set=dict(jitter_s=.5, num_crops=(2,4), crop_sizes=(28,18), gamma=False), lr=1.),  # as it was
    'jitter 2x': dict(set=dict(jitter_s=1.)),
    'jitter 3x': dict(set=dict(jitter_s=1.5)),
    'batch 64': dict(bs=.5),
    'crops 24+14': dict(set=dict(crop_sizes=(24,14)), epochs=1.5),  # epochs: for the same time
    'crops 20+14': dict(set=dict(crop_sizes=(20,14)), epochs=1.5),
    'crops 20+12': dict(set=dict(crop_sizes=(20,12)), epochs=1.75),
    'crops 16+12': dict(set=dict(crop_sizes=(16,12)), epochs=2),
    'lr 2x': dict(lr=2.),
    'lr 0.5x': dict(lr=.5),
    '2 small crops': dict(set=dict(num_crops=(2,2)), epochs=1.25),
    '8 small crops': dict(set=dict(num_crops=(2,8)), epochs=.75),
    'two crops': dict(set=dict(num_crops=(2,0)), epochs=2),
    'two crops, from a quarter': dict(set=dict(num_crops=(2,0), min_scales=(.25,.15)), epochs=2),
    'temp 0.2': dict(set=dict(temp=.2)),
    'eps 0.05': dict(set=dict(eps=.05)),
    '4x prototypes': dict(set=dict(n_protos=512)),
    'frozen less': dict(set=dict(freeze_protos_pct=.01)),
    'prototypes by k-means': dict(cbs=[FirstProtos]),
    'averaged weights': dict(cbs=[Average]),
    'milder crops': dict(set=dict(min_scales=(.5,.2), max_scales=(1.,.5))),
    'smaller crops of more': dict(set=dict(min_scales=(.25,.08), max_scales=(1.,.3))),
}

def together(*names):
    "Levers at once"
    r = dict(set=dict(levers['base']['set']))
    for n in names:
        for k,v in levers[n].items():
            if k=='set': r['set'] |= v
            elif k in ('bs','epochs','lr'): r[k] = r.get(k, 1)*v
            else: r[k] = v
    return r

# found one after the other: each name says what is changed at once
levers['j2 b64'] = together('jitter 2x', 'batch 64')
for _name in [o for o in levers if o not in ('base','jitter 2x','jitter 3x','batch 64','j2 b64')]:
    levers[f'j2 b64 {_name}'] = together('jitter 2x', 'batch 64', _name)
levers['j2 b64 crops 20+14 lr 2x'] = together('jitter 2x', 'batch 64', 'crops 20+14', 'lr 2x')
levers['two crops now'] = together('jitter 2x', 'batch 64', 'crops 20+14', 'lr 2x', 'two crops')
_now = 'jitter 2x','batch 64','crops 20+14','lr 2x','two crops'
of_two = { # what else is tried with two crops alone
    'small first': dict(cbs=[partial(CropsFirst, size=14)], epochs=1.4),
    'milder first': dict(cbs=[partial(CropsFirst, gamma_p=.4, jitter=(.2,.2,.2,.05))]),
    'with 2 small crops': dict(set=dict(num_crops=(2,2)), epochs=.67),
    'with 8 small crops': dict(set=dict(num_crops=(2,8)), epochs=.34),
    'small crops late': dict(cbs=[partial(MoreLate, size=14, scale=(.15,.51))], epochs=.84),
    'batch grows': dict(cbs=[BatchGrows]),
    'codes of an average': dict(cbs=[CodesOfAverage]),
    'eps falls': dict(cbs=[partial(EpsOver, .08, .03)]), 'eps rises': dict(cbs=[partial(EpsOver, .03, .08)]),
    'prototypes apart': dict(cbs=[KoLeo]), 'prototypes on their own': dict(cbs=[OwnProtos]),
    'lars': dict(opt=lars, lr=75.), 'lars, 4x': dict(opt=lars, lr=300.),
    'short warm-up': dict(fit=partial(one_cycle, pct_start=.1)),
    'long warm-up': dict(fit=partial(one_cycle, pct_start=.5)),
    'flat, then cosine': dict(fit=lambda learn,n,lr: learn.fit_flat_cos(n, lr)),
    'flat': dict(fit=lambda learn,n,lr: learn.fit(n, lr)),
    'warm-up, then cosine': dict(fit=lambda learn,n,lr: learn.fit_warmup_cos(n, lr)),
    'batch 256': dict(bs=4), 'float32': dict(set=dict(bf16=False)),
    'eight crops alike': dict(set=dict(num_crops=(8,0), crop_assgn_ids=[*range(8)]), bs=.5, epochs=.25),
    'batch 32': dict(bs=.5), 'batch 128': dict(bs=2), 'wd 0.1': dict(set=dict(wd=.1)), 'wd 0': dict(set=dict(wd=0.)),
    'queue': dict(set=dict(K=256)), 'eps 0.03': dict(set=dict(eps=.03)), 'temp 0.15': dict(set=dict(temp=.15)),
    'crops 22': dict(set=dict(crop_sizes=(22,14)), epochs=.83),
    'crops 16': dict(set=dict(crop_sizes=(16,14)), epochs=1.5),
    'deep projector': dict(set=dict(nlayers=3)),
    'half the prototypes': dict(set=dict(n_protos=64)), 'twice the prototypes': dict(set=dict(n_protos=256)),
    'wide projector': dict(set=dict(hidden_size=2048)),
    'four crops alike': dict(set=dict(num_crops=(4,0), crop_assgn_ids=[0,1,2,3]), bs=.5),
    'erasing': dict(set=dict(xtra_tfms=[Kornia(K.RandomErasing((.02,.2), (.5,2.), p=.5))])),
    'gamma': dict(set=dict(jitter_s=.5, xtra_tfms=[Kornia(K.RandomGamma((.4,2.5), p=.8))])),
    'gamma, jitter as it is': dict(set=dict(xtra_tfms=[Kornia(K.RandomGamma((.4,2.5), p=.8))])),
    'gamma first': dict(set=dict(jitter_s=.5, gamma=True)),
    'solarization': dict(set=dict(xtra_tfms=[Kornia(K.RandomSolarize(p=.2))])),
    'rotation': dict(set=dict(rotate=True, rotate_deg=15)),
    'muon': dict(opt=muon),
    'areas from 0.3': dict(set=dict(min_scales=(.3,.15)))}
levers |= of_two
for _name in (*of_two, 'jitter 3x', 'temp 0.2', 'eps 0.05', '4x prototypes', 'prototypes by k-means',
              'averaged weights', 'lr 2x', 'frozen less'):
    levers[f'now {_name}'] = together(*_now, _name)
    levers[f'gamma {_name}'] = together(*_now, 'gamma first', _name)
for _name in ('flat, then cosine', 'warm-up, then cosine'):
    levers[f'gamma {_name}, lr 2x'] = together(*_now, 'gamma first', _name, 'lr 2x')
levers['j3 b64 crops 20+14'] = together('jitter 3x', 'batch 64', 'crops 20+14')
levers['j2 crops 20+14'] = together('jitter 2x', 'crops 20+14')

def few_probe(train, valid, n, seed):
    (x,y),idxs = train,few_label_idxs(train[1], n, seed=seed)
    return linear_probe((x[idxs],y[idxs]), valid, C=.01).top1

def measure(dls, learn_or_encoder):
    "20-NN, whitened 20-NN, probes with 10 labels (mean of five draws) and 60 labels of each class (of two)"
    train,valid = (extract_features(learn_or_encoder, dl, progress=False) for dl in dls)
    few = dict(ten=statistics.mean(few_probe(train, valid, 10, s) for s in range(5)),
               sixty=statistics.mean(few_probe(train, valid, 60, s) for s in range(2))) if len(train[1])>5000 else {}
    white = knn_accuracy(train, valid, whiten=Whitening.fit(train[0], shrink=0.))
    return dict(knn=knn_accuracy(train, valid), white=white, **few)

class Clock(Callback):
    "CPU seconds of a fit, loading included"
    order = 95
    def before_fit(self): self.start = time.process_time()
    def after_fit(self): self.cpu = time.process_time()-self.start

def run(data, lever, seed, length=1.):
    "Train once"
    make,size,channels,bs,epochs = datasets[data]
    lever = levers[lever] if isinstance(lever, str) else lever
    bs,epochs = round(bs*lever.get('bs', 1)),max(1, round(epochs*lever.get('epochs', 1)*length))
    dls = make(bs, seed)
    settings = levers['base']['set'] | lever.get('set', {})
    settings['crop_sizes'] = tuple(round(o*size/28) for o in settings['crop_sizes'])  # given for 28 px
    set_seed(seed)
    clock = Clock()
    cbs = [NoValidation(), clock, *(f() for f in lever.get('cbs', ()))]
    if 'opt' in lever: settings['opt_func'] = partial(lever['opt'], wd=.01)
    learn = swav_learner(dls, 'resnet18', encoder=small|dict(channels=channels), cbs=cbs, **settings)
    learn.remove_cb(ProgressCallback).logger = lambda *_: None
    lever.get('fit', one_cycle)(learn, epochs, 1e-3*(bs/64)**.5*lever.get('lr', 1))
    encoder = learn.model.encoder
    return encoder,dict(cpu=clock.cpu, epochs=epochs, bs=bs,
                        loss=learn.collapse_monitor.history['loss/lnK'][-1],
                        alarms=len(learn.collapse_monitor.alarms), **measure(dls, learn))

# --- pieces that are done once ----------------------------------------------------------------------------------------
out_dir = here.parent/'runs'/'levers'

def name_of(data, lever, seed, length):
    return f"{data}-{lever}-{seed}".replace(' ', '_').replace('/', '_')+(f'-x{length:g}' if length!=1 else '')

def piece(data, lever, seed, length=1., todo=True):
    path = out_dir/(name_of(data, lever, seed, length)+'.json')
    if path.exists(): return json.loads(path.read_text())
    if not todo: return None
    start = time.time()
    if lever=='pixels': encoder,r = None,dict(cpu=0, **measure(datasets[data][0](64, seed), nn.Flatten()))
    else: encoder,r = run(data, lever, seed, length)
    if encoder is not None:
        save_file({k: v.contiguous() for k,v in encoder.state_dict().items()}, path.with_suffix('.safetensors'))
    r |= dict(wall=time.time()-start)
    tmp = path.with_suffix('.tmp')
    tmp.write_text(json.dumps(r))
    tmp.replace(path)
    return r

def fmt(values):
    mean,more = f'{100*statistics.mean(values):.1f}',len(values)>1
    return f'{mean} ± {100*statistics.stdev(values):.1f}' if more else mean

def once_more(lever, seed, length, test=False, size=None):
    "What a kept encoder of Fashion-MNIST is worth on the test images, or on images of another size"
    name = name_of('fashion', lever, seed, length)
    path,weights = out_dir/f"{name}{'-test' if test else ''}{size or ''}.json",out_dir/f'{name}.safetensors'
    if path.exists(): return piece('fashion', lever, seed, length, todo=False) | json.loads(path.read_text())
    if not weights.exists(): return None
    encoder = create_encoder('resnet18', n_in=1, pretrained=False, small_images=True, zero_init_last=False,
                             channels=datasets['fashion'][2], **small)
    encoder.load_state_dict(load_file(weights))
    dls = fashion_test(seed) if test else fashion(128, seed)
    path.write_text(json.dumps(measure(dls, AsTrained(encoder, size=size))))
    return once_more(lever, seed, length, test, size)

def table(data, seeds, length, names, get=None):
    get = get or (lambda lever, seed: piece(data, lever, seed, length, todo=False))
    keys = dict(knn='20-NN', white='whitened', ten='10 labels', sixty='60 labels')
    rows = [['lever','epochs','batch','CPU',*keys.values(),'seeds']]
    for lever in names:
        rs = [r for s in range(seeds) if (r := get(lever, s))]
        if not rs: continue
        means = [fmt([r[k] for r in rs]) if k in rs[0] else '' for k in keys]
        rows.append([lever, str(rs[0].get('epochs', '')), str(rs[0].get('bs', '')),
                     f"{statistics.mean(r['cpu'] for r in rs):.0f} s", *means, str(len(rs))])
    return '\n'.join([line(rows[0]), line(['---']*len(rows[0])), *map(line, rows[1:])])

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--only', nargs='+', default=['pixels',*levers])
    p.add_argument('--data', nargs='+', choices=list(datasets), default=['fashion'])
    p.add_argument('--seeds', type=int, default=1)
    p.add_argument('--length', type=float, default=1., help='of the fit, as a factor')
    p.add_argument('--out', type=Path, default=out_dir)
    p.add_argument('--table', action='store_true', help='only print what is done')
    p.add_argument('--test', action='store_true', help='what is kept of Fashion-MNIST, on the test images')
    p.add_argument('--size', type=int, help='the same on images scaled to so many pixels')
    args = p.parse_args(argv)
    globals()['out_dir'] = args.out
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    if args.test or args.size:
        print(table('fashion', args.seeds, args.length, args.only,
                    lambda lever,seed: once_more(lever, seed, args.length, args.test, args.size)))
        return
    for seed in range(args.seeds):
        for data in args.data:
            for lever in args.only:
                if not args.table:
                    r = piece(data, lever, seed, args.length)
                    print(f"{name_of(data, lever, seed, args.length)}: {json.dumps({k:v for k,v in r.items()})}",
                          file=sys.stderr, flush=True)
    for data in args.data: print(data, table(data, args.seeds, args.length, args.only), sep='\n\n', end='\n\n')

if __name__=='__main__': main()
