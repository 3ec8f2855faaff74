"Half precision in the model, float32 from the scores to the loss; accumulated gradients are those of the larger batch."
import copy
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.vision.all import GradientAccumulation, Learner, SGD
from torch import nn
from helpers import digits, seed_all, small_augs, small_encoder, small_learner
from self_supervised_swav import precision
from self_supervised_swav.data import digits_dls
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.evaluate import extract_features, knn_accuracy
from self_supervised_swav.learner import swav_learner
from self_supervised_swav.models import create_swav_model
from self_supervised_swav.precision import DeviceMixedPrecision, is_fast
from self_supervised_swav.swav import SWAV

class Watch(Callback):
    "Types on the way, and whether autocast is on where it must not be"
    order = 50
    def before_fit(self): self.types,self.outside = {},[]
    def before_batch(self): self.outside.append(torch.is_autocast_enabled('cpu'))
    def after_pred(self): self.types |= dict(embedding=self.pred[0].dtype, scores=self.pred[1].dtype)
    def after_loss(self):
        self.types |= dict(codes=self.swav.codes.dtype, loss=self.loss.dtype)
        self.outside.append(torch.is_autocast_enabled('cpu'))
        assert torch.isfinite(self.swav.codes).all()

class Inside(nn.Module):
    "Notes the type that a module gives inside the model"
    def __init__(self, module): super().__init__(); self.module,self.types = module,set()
    def forward(self, x):
        x = self.module(x)
        self.types.add(x.dtype)
        return x

class Small(nn.Sequential):
    "A convolution and a linear layer: float16 is slow on most CPUs"
    def __init__(self):
        super().__init__(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Linear(32, 16))

def resnet():
    return create_encoder('resnet18', n_in=1, pretrained=False, small_images=True, layers=(1,1,1,1),
                          channels=(16,32,32,64))

def train(cb=None, n_epoch=6, encoder=None):
    """Not too small a model: in one of 16 channels rounding decides what is learned first, and a smoothed loss may
    part by 0.8 %; in this by 0.25 %"""
    seed_all()
    model = create_swav_model(encoder or small_encoder(), hidden_size=64, projection_size=32, n_protos=20)
    learn = Learner(digits(400, bs=64), model, cbs=[SWAV(small_augs(), K=64, queue_start_pct=.3), Watch()])
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    seed_all()
    model.encoder = Inside(model.encoder)
    if cb: learn.add_cb(cb)
    learn.fit(n_epoch, 1e-3)
    return learn

# a ResNet takes long in a type that the processor does not have
@pytest.mark.parametrize('encoder,mode,dtype,kwargs', [
    (Small, 'bf16', torch.bfloat16, {}), pytest.param(resnet, 'bf16', torch.bfloat16, {}, marks=pytest.mark.slow),
    pytest.param(Small, 'fp16', torch.float16, dict(init_scale=1024.), marks=pytest.mark.slow)])
def test_loss_is_float32s(encoder, mode, dtype, kwargs):
    "30 steps, the loss at each within 1 % of that in float32"
    def seeded():
        seed_all()
        return encoder()
    ref,learn = train(encoder=seeded()),train(DeviceMixedPrecision(mode, force=True, **kwargs), encoder=seeded())
    assert dtype in learn.model.encoder.types and ref.model.encoder.types=={torch.float32}
    assert set(learn.watch.types.values())=={torch.float32} and not any(learn.watch.outside)
    a,b = (np.array([float(o) for o in l.recorder.losses]) for l in (ref,learn))
    assert len(a)==30 and not np.array_equal(a, b) and np.abs(b/a-1).max()<.01
    assert all(p.dtype==torch.float32 for p in learn.model.parameters())

class Forwards(Callback):
    "Which convolutions have a forward of their own during the training"
    def before_batch(self): self.own = [m for m in self.model.modules() if 'forward' in vars(m)]

@pytest.mark.parametrize('layout', [torch.channels_last,torch.contiguous_format])
@pytest.mark.parametrize('kernel,stride,groups', [(1,2,1),(3,2,1),(3,2,8),(3,4,1),(4,4,1),(5,2,1),(5,4,1),(7,2,1),
                                                  (7,4,1)])
def test_gradients_on_the_smallest_maps(kernel, stride, groups, layout):
    """Those of float32, with the output and the gradient rounded to bfloat16. Memory is filled with nan before: where a
    stride is larger than the map, oneDNN leaves what it finds"""
    pad,n_images = kernel//2,8
    for size in range(max(1, kernel-2*pad), 6):
        conv = nn.Conv2d(8, 16, kernel, stride, pad, groups=groups, bias=False).to(memory_format=layout)
        with torch.no_grad(): conv.weight.copy_(conv.weight.bfloat16())
        x = torch.randn(n_images, 8, size, size).bfloat16().float().to(memory_format=layout)
        y = conv(x)
        expected, = torch.autograd.grad(y.square().sum(), conv.weight)
        sum_of_abs = torch.nn.grad.conv2d_weight(x.abs(), conv.weight.shape, 2*y.abs(), stride, pad, groups=groups)
        assert precision._guard_convs(conv)==[conv]
        with torch.autocast('cpu', dtype=torch.bfloat16): y = conv(x)
        found = [torch.full((conv.weight.numel(),), torch.nan, dtype=t) for t in (torch.bfloat16,torch.float32)*20]
        del found
        grad, = torch.autograd.grad(y.float().square().sum(), conv.weight)
        # a rounding is off by 2**-8 at most: one of the output, and of the sum one after each image on old processors
        assert ((grad-expected).abs()<=(1+n_images)*2**-8*sum_of_abs).all(), size

def test_a_copy_of_a_guarded_model_is_its_own():
    conv = nn.Conv2d(2, 2, 3, 2, 1)
    guarded,other = precision._guard_convs(conv),copy.deepcopy(conv)
    with torch.no_grad(): other.weight.zero_()
    assert guarded==[conv] and other(torch.ones(1, 2, 1, 1)).equal(other.bias.view(1, 2, 1, 1))

def test_convolutions_get_their_forward_back():
    learn = small_learner(cbs=[DeviceMixedPrecision(force=True),Forwards()])
    learn.fit(1)
    assert any(isinstance(m, nn.Conv2d) for m in learn.forwards.own)
    assert not any('forward' in vars(m) for m in learn.model.modules())

def test_methods_come_and_go():
    learn = small_learner()
    assert learn.to_bf16(force=True) is learn and learn.mixed_precision.amp_mode==AMPMode.BF16
    assert learn.mixed_precision.force
    learn.to_fp32()
    assert not hasattr(learn, 'mixed_precision') and not any(isinstance(cb, MixedPrecision) for cb in learn.cbs)
    learn.model.encoder = Small()
    learn.to_fp16(force=True, init_scale=8.)
    learn.fit(1)
    assert learn.mixed_precision.kwargs['init_scale']==8.
    assert np.isfinite([float(o) for o in learn.recorder.losses]).all()
    assert 'forward' not in vars(learn.model)

def test_without_the_hardware_nothing_changes(monkeypatch):
    ref = train(n_epoch=1)
    monkeypatch.setattr(precision, 'is_fast', lambda *_: False)
    with pytest.warns(UserWarning, match='stays in float32.*no hardware for torch.bfloat16'):
        learn = train(DeviceMixedPrecision('bf16'), n_epoch=1)
    assert [float(o) for o in learn.recorder.losses]==[float(o) for o in ref.recorder.losses]
    assert learn.model.encoder.types=={torch.float32}

def test_the_machine_is_asked(monkeypatch):
    for flag in ('_is_amx_tile_supported','_is_avx512_bf16_supported'):
        for f in ('_is_amx_tile_supported','_is_avx512_bf16_supported'):
            monkeypatch.setattr(torch.cpu, f, lambda f=f: f==flag, raising=False)
        assert is_fast(torch.bfloat16)
        monkeypatch.setattr(torch.cpu, flag, lambda: False)
        assert not is_fast(torch.bfloat16)
    monkeypatch.delattr(torch.cpu, '_is_amx_fp16_supported', raising=False)  # an older torch
    assert not is_fast(torch.float16)

@pytest.mark.parametrize('exc', [RuntimeError,KeyboardInterrupt])
def test_autocast_is_off_after_an_error(exc):
    learn = small_learner().to_bf16(force=True)
    class Break(nn.Module):
        def forward(self, x):
            if not torch.is_grad_enabled(): return x
            raise exc('in the middle of the forward pass')
    encoder = learn.model.encoder
    learn.model.encoder = nn.Sequential(encoder, Break())
    with pytest.raises(exc): learn.fit(1)
    assert not torch.is_autocast_enabled('cpu')
    learn.model.encoder = encoder
    learn.fit(1)
    assert 'forward' not in vars(learn.model) and not torch.is_autocast_enabled('cpu')
    assert np.isfinite([float(o) for o in learn.recorder.losses]).all()

def test_errors():
    with pytest.raises(ValueError): DeviceMixedPrecision('int8')
    with pytest.raises(ValueError, match='dtype must be torch.bfloat16 or torch.float16, got torch.int8'):
        is_fast(torch.int8)

# --- accumulation -----------------------------------------------------------------------------------------------------
class Gradients(Callback):
    "Gradients at each step, with codes that do not depend on how images are batched"
    order = 9
    def before_fit(self): self.grads,self.steps = [],[]
    def after_pred(self):
        if self.training: self.swav.get_codes = lambda scores: (scores[:2]*3).softmax(-1)  # of each image by itself
    def before_step(self):
        self.grads.append(torch.cat([p.grad.flatten().clone() for p in self.model.parameters()]))
        self.steps.append(self.train_iter)

class EvalMode(Callback):
    order = 20
    def before_batch(self): self.model.eval()

def gradients(bs, acc=None, precision=None):
    "Of two steps from the same weights, fixed crops, batch norm in eval mode"
    cbs = [Gradients(), EvalMode(), *([GradientAccumulation(acc)] if acc else []), *([precision] if precision else [])]
    learn = small_learner(bs=bs, freeze_protos_pct=0., cbs=cbs, learner=dict(opt_func=SGD))
    learn.model.encoder = (torch.manual_seed(1), Small())[1]
    learn.dls.train = learn.dls.train.new(shuffle=False, drop_last=False)
    learn.swav.cut = lambda x: [o.as_subclass(torch.Tensor) for o in (x, x.flip(-1), x[...,:10,:10])]
    learn.fit(1, 0.)
    return learn.gradients

@pytest.mark.parametrize('precision', [None,'fp16'])
def test_accumulated_gradient_is_the_larger_batchs(precision):
    amp = DeviceMixedPrecision(precision, force=True, init_scale=1.) if precision else None
    large = gradients(40)
    small = gradients(8, acc=40, precision=amp)
    assert large.steps==[0,1] and small.steps==[4,9]
    for a,b in zip(large.grads, small.grads):
        torch.testing.assert_close(b, a, atol=(5e-3 if precision else 1e-5)*a.abs().max().item(), rtol=0)

def test_codes_are_of_the_small_batch():
    "What accumulation cannot do: codes share prototypes within a small batch, and the queue is the remedy"
    learn,seen = small_learner(bs=8, cbs=[GradientAccumulation(40)]),[]
    class Look(Callback):
        order = 50
        def after_loss(self): seen.append(self.swav.codes.shape)
    learn.add_cb(Look())
    learn.fit(1)
    assert set(seen[:10])=={(2,8,20)}

@pytest.mark.slow
@pytest.mark.skipif(not is_fast(torch.bfloat16, 'cpu'), reason='needs a CPU with bfloat16 units')
def test_knn_is_float32s():
    """What is learnt in bfloat16 is worth as much: 20-NN accuracy on held-out digits, 4 seeds, within the noise
    between seeds"""
    accs = {False: [], True: []}
    for bf16 in (False,True):
        for seed in range(4):
            seed_all(seed)
            dls = digits_dls(size=16, bs=64, valid_pct=.3, seed=0, device='cpu')
            learn = swav_learner(dls, 'resnet18', encoder=dict(layers=(1,1,1,1), channels=(16,32,64,128)), flip_p=0.,
                                 n_classes=10, bf16=bf16)
            learn.remove_cb(learn.progress)
            learn.logger = lambda *_: None
            learn.fit_one_cycle(12)
            assert hasattr(learn, 'mixed_precision')==bf16 or hasattr(learn, 'device_mixed_precision')==bf16
            assert learn.recorder.losses[-1]<.95*learn.swav.chance_loss[0]  # it has learned something
            parts = [extract_features(learn.model.encoder, dl, progress=False) for dl in dls]
            accs[bf16].append(knn_accuracy(*parts))
    a,b = (torch.tensor(accs[o]) for o in (False,True))
    noise = (a.var()/len(a)+b.var()/len(b)).sqrt()
    print(f'float32 {a.mean():.4f} ± {a.std():.4f}, bfloat16 {b.mean():.4f} ± {b.std():.4f}: {accs}')
    assert a.mean()-b.mean()<max(3*noise, .005)
