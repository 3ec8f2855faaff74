"""Families of timm: each is built, trained for a step at two resolutions, saved, loaded, and built for small images

The slow test writes docs/encoders.md, the table of what works; what does not work says so before training."""
import re, time, warnings
from pathlib import Path
import pytest, timm, torch
from fastai.callback.progress import ProgressCallback
from self_supervised_swav.checkpoints import load_encoder, save_encoder
from self_supervised_swav.data import tensor_dls
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.files import atomic_path
from self_supervised_swav.learner import swav_learner

page = Path(__file__).resolve().parent.parent/'docs'/'encoders.md'
# family, architecture, arguments that make it smaller
families = [
    ('ResNet','resnet18',{}), ('ResNeXt','resnext50_32x4d',dict(layers=(1,1,1,1))), ('ResNet-D','resnet18d',{}),
    ('SE-ResNet','seresnet18',{}), ('SKNet','skresnet18',{}), ('Res2Net','res2net50_26w_4s',dict(layers=(1,1,1,1))),
    ('ResNet V2','resnetv2_18',{}), ('RegNetX','regnetx_002',{}), ('RegNetY','regnety_002',{}),
    ('DenseNet','densenet121',dict(block_config=(2,2,2,2))), ('VGG with batch norm','vgg11_bn',{}),
    ('EfficientNet','efficientnet_lite0',{}), ('EfficientNetV2','tf_efficientnetv2_b0',{}),
    ('MobileNetV2','mobilenetv2_035',{}), ('MobileNetV3','mobilenetv3_small_050',{}),
    ('MobileNetV4','mobilenetv4_conv_small_035',{}), ('MNASNet','mnasnet_small',{}), ('GhostNet','ghostnet_050',{}),
    ('ReXNet','rexnet_100',{}), ('RepVGG','repvgg_a0',{}), ('HGNetV2','hgnetv2_b0',{}), ('NFNet','nfnet_l0',{}),
    ('ConvNeXt','convnext_atto',{}), ('ConvNeXtV2','convnextv2_atto',{}), ('InceptionNeXt','inception_next_atto',{}),
    ('PoolFormer','poolformer_s12',{}), ('EdgeNeXt','edgenext_xx_small',{}), ('FastViT','fastvit_t8',{}),
    ('MobileViT','mobilevit_xxs',{}), ('MobileViTV2','mobilevitv2_050',{}), ('EfficientViT','efficientvit_b0',{}),
    ('ViT','vit_tiny_patch16_224',dict(depth=2)), ('DeiT','deit_tiny_patch16_224',dict(depth=2)),
    ('DINOv2','vit_small_patch14_dinov2',dict(depth=1)), ('EVA02','eva02_tiny_patch14_224',dict(depth=2)),
    ('BEiT','beit_base_patch16_224',dict(depth=1)), ('CaiT','cait_xxs24_224',dict(depth=2)),
    ('XCiT','xcit_nano_12_p16_224',{}), ('PVTv2','pvt_v2_b0',{}),
    ('Swin','swin_tiny_patch4_window7_224',dict(depths=(1,1,1,1))),
    ('SwinV2','swinv2_tiny_window8_256',dict(depths=(1,1,1,1))), ('DaViT','davit_tiny',dict(depths=(1,1,1,1))),
    ('MaxViT','maxvit_rmlp_pico_rw_256',{}), ('CoAtNet','coatnet_nano_rw_224',{}), ('LeViT','levit_128s',{}),
    ('EfficientFormer','efficientformer_l1',{}), ('HRNet','hrnet_w18_small',{}), ('MLP-Mixer','mixer_s32_224',{})]
one_size = {'BEiT','CaiT','MaxViT','CoAtNet','LeViT','EfficientFormer','MLP-Mixer'}
no_small_images = {'BEiT','CaiT','XCiT','PVTv2','MaxViT','CoAtNet','LeViT','EfficientFormer','HRNet','MLP-Mixer',
                   'VGG with batch norm'}

def takes(e, size):
    try:
        with torch.no_grad(): return e.eval()(torch.zeros(1, 3, size, size)).ndim==2
    except Exception: return False

def step(e, sizes):
    "Two steps of SwAV with two crops of the first size and one of each other, as a user makes them"
    before = {k: v.clone() for k,v in e.named_parameters()}
    x = torch.randint(256, (4,3,max(sizes),max(sizes)), dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning) # about crops of few cells, and few images
        learn = swav_learner(tensor_dls(x, bs=4, valid_pct=0, device='cpu'), e, crop_sizes=sizes,
                             num_crops=(2,)+(1,)*(len(sizes)-1), min_scales=(.3,)*len(sizes),
                             max_scales=(1.,)*len(sizes), hidden_size=16, projection_size=8, n_protos=8, K=None,
                             bf16=False)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    learn.fit(2, 1e-3)
    after = dict(e.named_parameters())
    assert all(v.isfinite().all() for v in after.values())
    # Adam moves each weight that has a gradient. In the first step some have none: what stands before a batch norm that
    # begins with 0
    same = [k for k,v in after.items() if torch.equal(v, before[k])]
    assert len(same)<len(before)*.2, same
    first = next(k for k,v in before.items() if v.ndim==4)
    assert not torch.equal(after[first], before[first])

def same_after_loading(e, path, size):
    again,e = (o.eval().to(memory_format=torch.contiguous_format) for o in (load_encoder(save_encoder(e, path)),e))
    x = torch.rand(2, 3, size, size)
    with torch.no_grad(): torch.testing.assert_close(again(x), e(x))  # in one layout, and so by the same kernels

def short(e): return re.split(r'\(it says: |images of \d+ px: ', str(e))[-1].removesuffix(')').removesuffix('.')

def try_family(name, arch, kwargs, tmp_path):
    "The row of a family"
    start,e = time.process_time(),create_encoder(arch, pretrained=False, **kwargs)
    own = e.pretrained_cfg['input_size'][-1]
    assert takes(e, own)
    if name in one_size: # two resolutions do not work: that is said before training, with the reason
        assert not any(takes(e, s) for s in (64,96,112,128,160,192)) # a few pixels less may round to the same grid
        with pytest.raises(ValueError, match='crop_sizes must be sizes that the encoder takes, got 96.*says: ') as err:
            step(e.train(), (own,96))
        step(e.train(), (own,))
        size,sizes = own,f'{own} px alone; 96 px: {short(err.value)}'
    else:
        size,large = next(o for o in ((64,112),(70,112),(64,128)) if takes(e, o[0]) and takes(e, o[1]))
        step(e.train(), (large,size))
        sizes = f'{large} and {size} px'
    same_after_loading(e, tmp_path/'e.safetensors', size)
    if name in no_small_images:
        with pytest.raises(ValueError, match='small_images=True') as err:
            create_encoder(arch, pretrained=False, small_images=True, **kwargs)
        small = 'no: '+('its stem is not known' if 'is unknown' in str(err.value) else short(err.value))
    else:
        e = create_encoder(arch, pretrained=False, small_images=True, **kwargs)
        step(e.train(), (32,20))
        same_after_loading(e, tmp_path/'s.safetensors', 28)
        small = '32 and 20 px'
    return f'| {name} | `{arch}` | {sizes} | {small} |',time.process_time()-start

@pytest.mark.slow
def test_families(tmp_path):
    "Every family does all of it, or says before training what it does not do; four minutes of one thread (Intel Xeon)"
    rows = []
    for name,arch,kwargs in families:
        row,secs = try_family(name, arch, kwargs, tmp_path)
        print(f'{secs:5.1f} s {row}', flush=True)
        rows.append(row)
    text = f"""# Encoders that are tested

> {len(rows)} families of timm: what each was trained on, and what it does not take

<!-- written by tests/test_families.py -->

`create_encoder(arch)` takes every classification network of timm. The families below are tested, each by a small
member: it is built, trained with SwAV on crops of two resolutions, saved and loaded, and the same with
`small_images=True`. What does not work raises an error before training; its reason stands here. Other sizes than those
of the table work too, as far as the network takes them.

Made with timm {timm.__version__}, torch {torch.__version__.split('+')[0]}.

| family | tested by | trained with crops of | `small_images=True` |
| --- | --- | --- | --- |
"""+'\n'.join(rows)+'\n'
    with atomic_path(page) as p: p.write_text(text, encoding='utf-8')

def test_families_are_enough():
    "What the table says is what is tested, and each name is one of timm's"
    # an older timm does not know the newest
    assert len({f for f,_,_ in families})==len(families) and sum(timm.is_model(a) for _,a,_ in families)>=24
    lines = page.read_text(encoding='utf-8').split('| --- |')[-1].strip().splitlines()[1:]
    rows = [o.removeprefix('| ').split(' | ') for o in lines]
    assert [(o[0],o[1].strip('`')) for o in rows]==[(f,a) for f,a,_ in families]
    assert {o[0] for o in rows if 'px alone' in o[2]}==one_size
    assert {o[0] for o in rows if o[3].startswith('no: ')}==no_small_images
