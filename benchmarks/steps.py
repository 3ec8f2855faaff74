"A whole training step: where its time goes, and the same step in lightly's modules"
import time
from functools import partial

import torch, torch.nn.functional as F
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner, Recorder
from fastai.optimizer import OptimWrapper
from lightly.loss import SwaVLoss
from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes
from lightly.transforms import SwaVTransform
from torch import nn

from harness import Row, fmt_time, race
from multicrop import batch, loaded, n_workers, photographs
from self_supervised_swav.augment import get_swav_aug_pipelines
from self_supervised_swav.data import fashion_mnist_dls, tensor_dls
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.models import create_swav_model
from self_supervised_swav.multiview import method_named, method_of
from self_supervised_swav.precision import is_fast
from self_supervised_swav.evaluate import NoValidation
from self_supervised_swav.swav import SWAV

settings = dict(
    resnet18=dict(arch='resnet18', bs=64, num_crops=(2,4), crop_sizes=(96,48)),
    resnet50=dict(arch='resnet50', bs=8, num_crops=(2,6), crop_sizes=(224,96)),
    gpu=dict(arch='resnet50', bs=256, num_crops=(2,6), crop_sizes=(224,96)))
scales = dict(min_scales=(.25,.05), max_scales=(1.,.14))
hidden,dim,n_protos = 2048,128,3000
own_sizes = dict(swav=dict(n_protos=n_protos))
lr,sgd = .01,partial(torch.optim.SGD, momentum=.9, weight_decay=1e-6)

class Stopwatch:
    "Adds up the time of named parts; on a GPU the parts are measured by events, and nothing waits for them"
    def __init__(self, device): self.device,self.parts = device,{}
    def now(self):
        if self.device=='cpu': return time.perf_counter()
        e = torch.cuda.Event(enable_timing=True)
        e.record()
        return e
    def add(self, name, start): self.parts.setdefault(name, []).append((start,self.now()))
    def totals(self):
        "Name to seconds"
        if self.device=='cpu': return {k: sum(b-a for a,b in v) for k,v in self.parts.items()}
        torch.cuda.synchronize()
        return {k: sum(a.elapsed_time(b) for a,b in v)/1e3 for k,v in self.parts.items()}

    def wrap(self, obj, method, name):
        "Time every call of a method"
        f = getattr(obj, method)
        def timed(*args, **kwargs):
            start = self.now()
            out = f(*args, **kwargs)
            self.add(name, start)
            return out
        setattr(obj, method, timed)

    def watch_backward(self, encoder):
        "The encoder's backward starts when the first gradient reaches its output: whatever comes later belongs to it"
        def arrived(grad):
            if self.began is None: self.began = self.now()
        def hook(module, args, out):
            self.began = None
            if out.requires_grad: out.register_hook(arrived)
        encoder.register_forward_hook(hook)

class Watch(NoValidation):
    """Ends the encoder's share of the backward pass; leaves out the first step of a fit, in which the callback looks
    at the model"""
    order = 99
    def __init__(self, watch): self.watch = watch
    def before_train(self):
        if self.epoch==1: self.watch.parts.clear()
    def after_backward(self): self.watch.add('encoder backward', self.watch.began)

needed = ('encoder forward','encoder backward','optimizer')  # what a step cannot do without
extras = ('crops','codes and loss')

def our_step(arch, bs, num_crops, crop_sizes, images, device='cpu', cbs=(), compiled=False, method='swav'):
    "A function that makes `n` steps of a Learner, and gives the seconds a step and its parts took"
    torch.manual_seed(0)
    parts = method_named(method)
    model = parts.create_model(create_encoder(arch, pretrained=False).to(device), hidden_size=hidden,
                               projection_size=dim, **own_sizes.get(method, {}))
    if compiled: model.encoder = torch.compile(model.encoder)
    augs = parts.get_aug_pipelines(num_crops=num_crops, crop_sizes=crop_sizes,
                                   **{k: v[:len(num_crops)] for k,v in scales.items()})
    dls = tensor_dls(images.repeat(2, 1, 1, 1), bs=bs, splits=(range(bs),range(bs, 2*bs)), device=device)  # one batch
    watch = Stopwatch(device)
    learn = Learner(dls, model, lr=lr, opt_func=partial(OptimWrapper, opt=sgd),
                    cbs=[parts.callback(augs),Watch(watch),*cbs])
    learn.remove_cbs([ProgressCallback,Recorder])
    learn.create_opt()
    watch.watch_backward(model.encoder)
    for obj,method,name in ((learn,'one_batch','step'), (model.encoder,'forward',needed[0]),
                            (learn.opt,'step',needed[2]), (learn.opt,'zero_grad',needed[2]),
                            (method_of(learn),'cut',extras[0]),
                            (method_of(learn),'view_loss',extras[1])): watch.wrap(obj, method, name)
    if hasattr(model, 'key_encoder'): watch.wrap(model.key_encoder, 'forward', needed[0])
    def run(n):
        learn.fit(n+1)
        return {k: v/n for k,v in watch.totals().items()}
    return run

class LightlyModel(nn.Module):
    "SwAV put together as lightly's documentation does"
    def __init__(self, backbone, width):
        super().__init__()
        self.backbone = backbone
        self.projection_head = SwaVProjectionHead(width, hidden, dim)
        self.prototypes = SwaVPrototypes(dim, n_protos)
    def forward(self, x):
        return self.prototypes(F.normalize(self.projection_head(self.backbone(x).flatten(start_dim=1)), dim=1, p=2))

def lightly_step(arch, bs, num_crops, crop_sizes, images, device='cpu', workers=n_workers, fast=False):
    """The same for lightly's modules; its crops come from a loader, or are made once where there are no `workers`.
    `fast`: bfloat16 and channels_last"""
    torch.manual_seed(0)
    encoder = create_encoder(arch, pretrained=False)
    model = LightlyModel(encoder, encoder.eval()(torch.zeros(1, 3, 64, 64)).shape[1]).to(device).train()
    criterion,opt = SwaVLoss(),sgd(model.parameters(), lr=lr)
    tfm = SwaVTransform(crop_counts=num_crops, crop_sizes=crop_sizes, crop_min_scales=scales['min_scales'],
                        crop_max_scales=scales['max_scales'])
    start = loaded(tfm, images, bs, workers)
    crops = None if workers else [o.to(device) for o in start()()]
    layout = dict(memory_format=torch.channels_last) if fast else {}
    model.to(**layout)
    def step(batch):
        model.prototypes.normalize()
        with torch.autocast(device, torch.bfloat16, enabled=fast):
            scores = [model(o.to(device, **layout)) for o in batch]
        scores = [o.float() for o in scores]
        criterion(scores[:num_crops[0]], scores[num_crops[0]:]).backward()
        opt.step()
        opt.zero_grad()
    def run(n):
        watch,take = Stopwatch(device),start() if workers else lambda: crops
        for _ in range(max(1, workers)): step(take())
        begin = watch.now()
        for _ in range(n): step(take())
        watch.add('step', begin)
        return {k: v/n for k,v in watch.totals().items()}
    return run

def race_steps(runs, rounds, n):
    "Name to the times of its median step and the parts of that one, in alternating runs of `n` steps"
    times = {k: [] for k in runs}
    for _ in range(rounds):
        for k,run in runs.items(): times[k].append(run(n))
    # the median step, with its own parts
    return {k: sorted(v, key=lambda o: o['step'])[len(v)//2] for k,v in times.items()}

def _size(arch, bs, num_crops, crop_sizes):
    return f'{arch}, batch {bs}, ' + ' + '.join(f'{n}x{s}' for n,s in zip(num_crops, crop_sizes))

def step_rows(rounds=3, n=None, device='cpu', **setting):
    "The step of one of the `settings`, where its time goes, and lightly's"
    if n is None: n = 2 if device=='cpu' else 2*n_workers  # whole turns of its workers, where they are the slow part
    photos = photographs(setting['bs'])
    runs = {'this package': our_step(images=batch(photos), device=device, **setting),
            'with its crops': lightly_step(images=photos, device=device, **setting),
            'lightly': lightly_step(images=photos, device=device, workers=0, **setting)}
    times,size = race_steps(runs, rounds, n),_size(**setting)
    ours = times['this package']
    def share(*names): return sum(ours[k] for k in names)/ours['step']
    def listed(names): return ', '.join(f'{k} {share(k):.1%}' for k in names)
    whole = {k: v['step'] for k,v in times.items()}
    peer = f'lightly, {n_workers} workers'
    yield Row.of_times('training step, crops included', size, {**whole, peer: whole['with its crops']}, peer)
    yield Row.of_times('training step, crops given', size, {**whole, 'this package': ours['step']-ours['crops']},
                       'lightly')
    yield Row('share of the step in encoder and optimizer', size, f'{share(*needed):.1%}', listed(needed), '')
    yield Row('share of the step outside of them', size, f'{1-share(*needed):.1%}', listed(extras), '', '',
              '15 % (8 %)' if setting['arch']=='resnet18' else '')

def share_rows(method='simclr', rounds=3, n=2, device='cpu', **setting):
    "What a step of another method spends outside of its encoders: projector, crops, loss, callbacks, optimizer"
    setting = setting or dict(settings['resnet18'], num_crops=(2,), crop_sizes=(96,))
    run = our_step(images=batch(photographs(setting['bs'])), device=device, method=method, **setting)
    times = race_steps({'this package': run}, rounds, n)['this package']
    inside = sum(times[k] for k in needed[:2])/times['step']
    others = ', '.join(f"{k} {times[k]/times['step']:.1%}" for k in (needed[2],'crops'))
    others += f", loss {times[extras[1]]/times['step']:.1%}"
    yield Row(f'share of a {method_named(method).callback.title} step outside of the encoder', _size(**setting),
              f'{1-inside:.1%}', others, '', '', '8 %' if method=='simclr' else '')

def gpu_rows(rounds=3, n=5, device='cuda', **setting):
    "Where the time of a large step goes on a GPU, in bfloat16 and channels_last"
    cbs = [ChannelsLast(),MixedPrecision(amp_mode='bf16')]
    photos = photographs(setting['bs'])
    run = our_step(images=batch(photos), device=device, cbs=cbs, **setting)
    peer = lightly_step(images=photos, device=device, workers=0, fast=True, **setting)
    both = race_steps({'this package': run, 'lightly': peer}, rounds, n)
    times = both['this package']
    size = _size(**setting)+', bfloat16, channels_last'
    whole = {k: v['step'] for k,v in both.items()}
    yield Row('training step, crops included', size, fmt_time(whole['this package']), '', '')
    yield Row.of_times('training step, crops given', size, whole|{'this package': times['step']-times['crops']},
                       'lightly')
    outside = 1-sum(times[k] for k in needed)/times['step']
    yield Row('share of the step outside encoder and optimizer', size, f'{outside:.1%}',
              ', '.join(f"{k} {times[k]/times['step']:.1%}" for k in extras), '', '', '(8 %)')

def variant_rows(variants, rounds=3, n=2, device='cpu', **setting):
    "The step with other arguments of `our_step`"
    x = batch(photographs(setting['bs']))
    runs = {k: our_step(images=x, device=device, **setting, **v) for k,v in ({'without': {}}|variants).items()}
    times = {k: v['step'] for k,v in race_steps(runs, rounds, n).items()}
    for k in variants: yield Row.of_times(f'training step, {k}', _size(**setting), times, 'without', ours=k)

# --- an epoch in bfloat16 ---------------------------------------------------------------------------------------------
def epoch_learner(dls):
    "A small ResNet, as 28 px images want it"
    torch.manual_seed(0)
    encoder = create_encoder('resnet18', n_in=1, pretrained=False, small_images=True, layers=(1,1,1,1),
                             channels=(32,64,128,256))
    model = create_swav_model(encoder.to(dls.device), hidden_size=512, projection_size=dim, n_protos=256)
    augs = get_swav_aug_pipelines(num_crops=(2,4), crop_sizes=(28,18), min_scales=(.3,.12), max_scales=(1.,.4),
                                  stats=None)
    learn = Learner(dls, model, lr=1e-3, cbs=[SWAV(augs),NoValidation()])
    learn.remove_cbs([ProgressCallback,Recorder])
    return learn

def epoch_rows(n=1024, bs=256, rounds=3, device='cpu', force=False):
    "A whole epoch in bfloat16 and in float32, where the device has the hardware and the machine has the images"
    what,size = 'epoch of a small ResNet, bfloat16',f'{n} of Fashion-MNIST, batch {bs}, 2x28 + 4x18'
    if not (force or is_fast(torch.bfloat16, device)): return [Row(what, size, 'no hardware', 'float32', '')]
    try: dls = fashion_mnist_dls(n, bs, bs=bs, labeled=False, device=device)
    except FileNotFoundError: return [Row(what, size, 'no images', 'float32', '')]
    runs = {'this package': epoch_learner(dls).to_bf16(force=force), 'float32': epoch_learner(dls)}
    times = race({k: partial(o.fit, 1) for k,o in runs.items()}, rounds, device, least=0.)
    return [Row.of_times(what, size, times, 'float32', '1.8x (2.5x)')]
