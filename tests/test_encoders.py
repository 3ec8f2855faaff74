"Encoders: one table of architectures, stems for small images, pooling, names and errors"
import inspect, pickle

import pytest, timm, torch
from fastai.vision.models import resnet18, vit_b_16
from fastai.vision.models.xresnet import xresnet18, xresnet34, xse_resnext18
from self_supervised_swav.encoders import PoolingType, create_encoder, create_fastai_encoder, create_timm_encoder

vit, swin = dict(depth=1), dict(depths=(1,1), num_heads=(3,6))  # two of timm's fixed-size transformers, made small
archs = [('test_resnet',{}), ('resnet10t',{}), ('test_convnext',{}), ('test_efficientnet',{}),
         ('mobilenetv3_small_050',{}), ('test_vit',{}), ('vit_tiny_patch16_224',vit),
         ('swin_tiny_patch4_window7_224',swin), ('xresnet18',{}), (xresnet18,{}), (resnet18,{})]
ids = [a if isinstance(a,str) else f'{a.__name__}()' for a,_ in archs]

def first_conv(encoder): return next(m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d))

@pytest.mark.parametrize('small', (False,True))
@pytest.mark.parametrize('n_in', (1,3,5))
@pytest.mark.parametrize('arch,kwargs', archs, ids=ids)
def test_architectures(arch, kwargs, n_in, small):
    "Every family takes any number of channels and two crop sizes, forward and backward, with both stems"
    encoder = create_encoder(arch, n_in=n_in, pretrained=False, small_images=small, **kwargs)
    widths = set()
    for size in (16,32) if small else (32,64):
        features = encoder(torch.randn(2, n_in, size, size))
        assert features.ndim == 2 and len(features) == 2 and features.isfinite().all()
        (features*torch.randn_like(features)).sum().backward()
        widths.add(features.shape[1])
    assert len(widths) == 1
    assert first_conv(encoder).in_channels == n_in and first_conv(encoder).weight.grad.abs().sum() > 0

def test_signatures():
    for f in (create_encoder, create_timm_encoder, create_fastai_encoder):
        names = ['arch', 'n_in', 'pretrained', 'pool_type', 'small_images', 'kwargs']
        assert list(inspect.signature(f).parameters) == names
        assert inspect.signature(f).parameters['pretrained'].default is True

# --- pooling

@pytest.mark.parametrize('arch', ('resnet10t', xresnet18))
def test_pooling(arch):
    encoders = {p: create_encoder(arch, pretrained=False, pool_type=p).eval() for p in (None, *PoolingType)}
    state, x = encoders[None].state_dict(), torch.randn(2,3,64,64)
    for e in encoders.values(): e.load_state_dict(state)
    with torch.no_grad(): out = {p: e(x) for p,e in encoders.items()}
    avg,mx = out[PoolingType.Avg],out[PoolingType.Max]
    assert not torch.allclose(avg, mx)
    torch.testing.assert_close(out[None], avg)
    torch.testing.assert_close(out[PoolingType.AvgMax], (avg+mx)/2)
    torch.testing.assert_close(out[PoolingType.CatAvgMax], torch.cat([avg,mx], 1))

def test_pooling_by_string_or_by_architecture():
    for pool_type,name in ((None,'token'), ('avg','avg'), (PoolingType.Max,'max')):
        encoder = create_encoder('vit_tiny_patch16_224', pretrained=False, pool_type=pool_type, **vit)
        assert encoder.global_pool == name

# --- stems

def stride(encoder, size=128):
    "How many times smaller than the image the last feature map of a convolutional `encoder` is"
    sizes = []
    for m in encoder.modules():
        if isinstance(m, torch.nn.Conv2d): m.register_forward_hook(lambda m,i,o: sizes.append(o.shape[-1]))
    with torch.no_grad(): encoder.eval()(torch.zeros(1,3,size,size))
    return size // min(s for s in sizes if s > 1) # pooled maps have one position

@pytest.mark.parametrize('arch,large,small', [
    ('resnet18',32,8), ('resnet10t',32,8), ('resnetblur50',32,8), ('resnetv2_18',32,8), ('resnetv2_50x1_bit',32,8),
    (resnet18,32,8), (xresnet18,32,8), (xse_resnext18,32,8),
    ('test_convnext',32,8), ('convnext_atto_ols',32,8), ('convnext_tiny',32,8),
    ('tf_efficientnet_b0_ns',32,16), ('mobilenetv2_035',32,16), ('mobilenet_v2',32,16)])
def test_small_stem_keeps_the_resolution(arch, large, small):
    "A stem of stride 4 (ResNet, ConvNeXt) or 2 (EfficientNet, MobileNet) gets stride 1, the stages keep theirs"
    assert [stride(create_encoder(arch, pretrained=False, small_images=o)) for o in (False,True)] == [large, small]

@pytest.mark.parametrize('arch', ('resnet18', 'resnet10t', 'test_convnext', 'test_efficientnet', resnet18, xresnet18))
def test_small_stem_is_3x3_without_pooling(arch):
    encoder = create_encoder(arch, pretrained=False, small_images=True)
    conv = first_conv(encoder)
    assert (conv.kernel_size, conv.stride, conv.weight.shape[-2:]) == ((3,3), (1,1), (3,3)) and conv.weight.std() > 0
    assert not any(isinstance(m, torch.nn.MaxPool2d) for m in encoder.modules())

@pytest.mark.parametrize('arch,fresh', (
    ('resnet18',['conv1.weight']), ('resnet10t',[]), ('test_efficientnet',[]), ('test_convnext',['stem.0.weight'])))
def test_small_stem_keeps_the_weights_it_can(arch, fresh, monkeypatch):
    "All pretrained weights stay, but a convolution of another shape; an untrained network plays the download"
    real = timm.create_model
    source = real(arch, num_classes=0).state_dict()
    def pretend(name, pretrained, dynamic_img_size=None, **kwargs):
        model = real(name, **kwargs)
        model.load_state_dict(source)
        return model
    monkeypatch.setattr(timm, 'create_model', pretend)
    got = create_encoder(arch, small_images=True).state_dict()
    assert got.keys() == source.keys()
    assert [n for n in source if got[n].shape != source[n].shape or not torch.equal(got[n], source[n])] == fresh

def test_small_patches_keep_the_grid():
    for arch,patch,grid,kwargs in (
        ('vit_tiny_patch16_224',4,(14,14),vit), ('vit_small_patch14_dinov2',4,(37,37),vit),
        ('swin_tiny_patch4_window7_224',1,(56,56),swin)):
        patches = create_encoder(arch, pretrained=False, small_images=True, **kwargs).patch_embed
        assert patches.patch_size == (patch,patch) and patches.grid_size == grid
    own = create_encoder('vit_tiny_patch16_224', pretrained=False, small_images=True, depth=1, patch_size=7)
    assert own.patch_embed.patch_size == (7,7)

def test_small_resnet_by_arguments():
    encoder = create_encoder('resnet18', n_in=1, small_images=True, pretrained=False,
                             layers=(1,1,1,1), channels=(32,64,128,256))
    assert encoder(torch.randn(2,1,28,28)).shape == (2,256)
    assert sum(isinstance(m, timm.models.resnet.BasicBlock) for m in encoder.modules()) == 4

# --- names and errors

def test_names():
    assert isinstance(create_encoder('resnet18', pretrained=False), timm.models.resnet.ResNet)
    assert create_encoder('resnet18.a1_in1k', pretrained=False).pretrained_cfg['tag'] == 'a1_in1k'
    with pytest.warns(UserWarning, match='tf_efficientnet_b0.ns_jft_in1k'):
        create_encoder('tf_efficientnet_b0_ns', pretrained=False)
    for f in (create_timm_encoder, create_fastai_encoder):
        with pytest.raises(ValueError, match='close ones: .*resnet18'): f('resnet_18')

@pytest.mark.parametrize('error,match,args', [
    (ValueError, 'close ones: .*resnet18', dict(arch='resnet_18')),
    (ValueError, "arch='qqqq' is no known architecture", dict(arch='qqqq')),
    (TypeError, 'got 18', dict(arch=18)),
    (ValueError, 'n_in must be a positive whole number, got 0', dict(arch='resnet18', n_in=0)),
    (ValueError, 'n_in must be a positive whole number, got 1.5', dict(arch=resnet18, n_in=1.5)),
    (ValueError, 'n_in must be at most 10,000, got 51817', dict(arch='resnet18', n_in=51817)),
    (ValueError, "pool_type must be None or one of .*catavgmax.*got 'sum'", dict(arch='resnet18', pool_type='sum')),
    (ValueError, "pool_type='catavgmax' does not exist for 'test_vit'", dict(arch='test_vit', pool_type='catavgmax')),
    (ValueError, "stem of 'vgg11_bn' is unknown", dict(arch='vgg11_bn', small_images=True)),
    (ValueError, "stem of 'xcit_nano_12_p16_224' is unknown", dict(arch='xcit_nano_12_p16_224', small_images=True)),
    (ValueError, "'vit_b_16' has no pooling to cut at", dict(arch=vit_b_16)),
    *((TypeError, f"arch='{a}' takes no argument 'layer'", dict(arch=o, layer=1))
      for a,o in dict(resnet18='resnet18', vit_tiny_patch16_224='vit_tiny_patch16_224', xresnet34=xresnet34,
                      vit_b_16=vit_b_16).items()),
])
def test_errors(error, match, args):
    with pytest.raises(error, match=match): create_encoder(pretrained=False, **args)

@pytest.mark.parametrize('arch,loader', (
    ('resnet10t', 'timm.models._builder.load_pretrained'),
    (resnet18, 'torchvision.models.resnet.ResNet18_Weights.get_state_dict'),
    (xresnet18, 'fastai.vision.models.xresnet.load_state_dict_from_url')))
def test_no_pretrained_weights(arch, loader, monkeypatch):
    "Without a connection the error says what to do"
    def offline(*args, **kwargs): raise OSError('no route to host')
    monkeypatch.setattr(loader, offline)
    with pytest.raises(RuntimeError, match='no route to host.*pretrained=False'): create_encoder(arch)

def test_pickle():
    for arch in ('test_resnet', 'test_vit', xresnet18):
        encoder, x = create_encoder(arch, pretrained=False, small_images=True).eval(), torch.randn(2,3,32,32)
        torch.testing.assert_close(pickle.loads(pickle.dumps(encoder))(x), encoder(x))

@pytest.mark.parametrize('arch', ('levit_128s','efficientformer_l1','coatnet_0_224','hrnet_w18_small'))
def test_small_images_that_cannot_work(arch):
    with pytest.raises(ValueError, match=f"small_images=True does not exist for '{arch}': its later layers"):
        create_encoder(arch, pretrained=False, small_images=True)
