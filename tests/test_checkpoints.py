"What is saved comes back; what does not fit is named, counted, and changes nothing"
import json, os, socket, stat, time, warnings, zipfile
import pytest, torch
from fastai.vision.core import imagenet_stats
from fastai.vision.models.xresnet import xresnet18
from safetensors.torch import load_file, save_file
from torch import nn

from helpers import small_augs, small_encoder, small_learner
from self_supervised_swav.checkpoints import atomic_path, encoder_settings, load_encoder, load_weights, save_encoder
from self_supervised_swav.encoders import create_encoder

tiny = dict(layers=(1,1,1,1), channels=(8,8,16,16))
def same(a, b):
    return all(torch.equal(x, y) for x,y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

@pytest.mark.parametrize('arch,kwargs', [
    ('resnet18', dict(n_in=1, small_images=True, pool_type='catavgmax', **tiny)), (xresnet18, dict(n_in=3)),
    ('vit_tiny_patch16_224', dict(small_images=True, depth=1)),
    ('mobilenet_v3_small', dict(n_in=1))], ids=['timm','function','vit','torchvision'])
def test_round_trip(tmp_path, arch, kwargs):
    encoder = create_encoder(arch, pretrained=False, **kwargs)
    path = save_encoder(encoder, tmp_path/'new'/'e.safetensors', size=32)
    again,x = load_encoder(path),torch.randn(2, kwargs.get('n_in', 3), 32, 32)
    assert same(again, encoder) and torch.equal(again(x), encoder.eval()(x)) and not again.training
    assert encoder_settings(path)['args']['n_in']==x.shape[1] and again.settings['size']==32
    assert stat.S_IMODE(os.stat(path).st_mode)==0o666 & ~_umask()
    assert same(load_encoder(save_encoder(again, tmp_path/'e2.safetensors')), encoder)

def _umask():
    old = os.umask(0)
    os.umask(old)
    return old

def test_learner(tmp_path):
    "From a Learner: the encoder alone, with what its images were normalized with and the size of its crops"
    learn = small_learner(n_in=3, augs=small_augs(crop_sizes=(24,10)))
    for p in learn.swav.aug_pipelines: p.fs[0].aug.flags['stats'] = imagenet_stats
    settings = encoder_settings(save_encoder(learn, tmp_path/'e.safetensors', note='x'))
    assert settings['size']==24 and settings['note']=='x'
    for got,want in zip(settings['stats'], imagenet_stats): assert got==pytest.approx(want, abs=1e-5)
    assert same(load_encoder(tmp_path/'e.safetensors'), learn.model.encoder)
    assert encoder_settings(save_encoder(small_learner(), tmp_path/'gray.safetensors'))['stats'] is None

def test_odd_encoders(tmp_path):
    "Channels last, tied weights, arguments that JSON does not have, no settings at all"
    e = small_encoder().to(memory_format=torch.channels_last)
    assert same(load_encoder(save_encoder(e, tmp_path/'a.safetensors')), e)
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    save_encoder(tied, tmp_path/'b.safetensors')
    with pytest.raises(ValueError, match='must say what made the encoder'): load_encoder(tmp_path/'b.safetensors')
    assert len(load_weights(tied, tmp_path/'b.safetensors').matched)==2
    odd = create_encoder('resnet18', pretrained=False, n_in=1, act_layer=nn.LeakyReLU, **tiny)
    save_encoder(odd, tmp_path/'c.safetensors')
    with pytest.raises(ValueError, match='act_layer.*load_weights'): load_encoder(tmp_path/'c.safetensors')
    with pytest.raises(TypeError, match='must be a Learner or a Module, got str'):
        save_encoder('resnet18', tmp_path/'d.safetensors')
    assert not (tmp_path/'d.safetensors').exists()

def test_compiled(tmp_path):
    e = small_encoder()
    assert same(load_encoder(save_encoder(torch.compile(e, backend='eager'), tmp_path/'a.safetensors')), e)

@pytest.mark.parametrize('name,data,match', [
    ('junk.safetensors', lambda b: b'junk'*100, 'is no safetensors file'),
    ('cut.safetensors', lambda b: b[:-10], 'is no safetensors file, or a part of one'),
    ('head.safetensors', lambda b: b[:100], 'is no safetensors file, or a part of one'),
    ('junk.pth', lambda b: b'junk', 'neither safetensors nor weights')])
def test_broken_files(tmp_path, name, data, match):
    whole,e = save_encoder(small_encoder(), tmp_path/'whole.safetensors'),small_encoder()
    (tmp_path/name).write_bytes(data(whole.read_bytes()))
    before = {k: v.clone() for k,v in e.state_dict().items()}
    for f in (load_encoder,) if name.endswith('safetensors') else ():
        with pytest.raises(ValueError, match=match): f(tmp_path/name)
    with pytest.raises(ValueError, match=match): load_weights(e, tmp_path/name)
    assert all(torch.equal(v, before[k]) for k,v in e.state_dict().items())

def test_missing_file(tmp_path):
    for f in (load_encoder, lambda p: load_weights(small_encoder(), p)):
        with pytest.raises(FileNotFoundError): f(tmp_path/'none.safetensors')
    with pytest.raises(FileNotFoundError): load_weights(small_encoder(), tmp_path/'none.pth')

def test_changed_file(tmp_path):
    "A file whose tensors are not those of its settings"
    path = save_encoder(small_encoder(), tmp_path/'e.safetensors')
    state = {k: v.clone() for k,v in load_file(path).items()}  # no longer mapped to the file, which is written again
    text = json.dumps(encoder_settings(path))
    save_file({k: v for k,v in state.items() if k!='conv1.weight'}, path, metadata=dict(encoder=text))
    with pytest.raises(ValueError, match='77 of 78 tensors matched; missing: conv1.weight'): load_encoder(path)
    save_file(state, path)
    with pytest.raises(ValueError, match='says nothing of its encoder'): load_encoder(path)
    assert len(load_weights(small_encoder(), path).matched)==78

def test_prefixes(tmp_path):
    "Whole models, data-parallel ones, files of Learner and of ResumeTraining: the longest common beginning goes"
    learn = small_learner()
    want = learn.model.encoder
    states = [{f'module.{k}': v for k,v in want.state_dict().items()} | {'module.prototypes.weight': torch.zeros(3, 2)},
              dict(state_dict={f'module.encoder.{k}': v for k,v in want.state_dict().items()}),
              dict(model=learn.model.state_dict(), opt={}), learn.model.state_dict()]
    for i,o in enumerate(states):
        torch.save(o, tmp_path/f'{i}.pth')
        fresh = small_encoder()
        assert not same(fresh, want) or i==0
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert len(load_weights(fresh, tmp_path/f'{i}.pth').matched)==78
        assert same(fresh, want)
    torch.save(dict(a=1), tmp_path/'x.pth')
    with pytest.raises(ValueError, match='must hold tensors by name'): load_weights(fresh, tmp_path/'x.pth')

def test_half_precision_file(tmp_path):
    "Weights take the encoder's own type"
    e = small_encoder()
    save_encoder(small_encoder().half(), tmp_path/'h.safetensors')
    load_weights(e, tmp_path/'h.safetensors')
    assert e.conv1.weight.dtype==torch.float32

def test_atomic(tmp_path, monkeypatch):
    "A save that fails leaves the old file and nothing beside it"
    path = save_encoder(small_encoder(), tmp_path/'e.safetensors')
    old = path.read_bytes()
    monkeypatch.setattr(os, 'replace', lambda *_: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'): save_encoder(small_encoder(), path)
    assert path.read_bytes()==old and [o.name for o in tmp_path.iterdir()]==['e.safetensors']
    with pytest.raises(OSError):
        with atomic_path(path/'below') as p: p.write_text('')

@pytest.mark.parametrize('change,words', [
    (dict(arch='hf-hub:somebody/model'), 'must name a known architecture'),
    (dict(arch='local-dir:/tmp'), 'known architecture'),
    (dict(arch='no_such_net'), 'must name a known architecture'),
    (dict(args=dict(checkpoint_path='/etc/x')), 'checkpoint_path'),
    (dict(args=dict(pretrained_cfg=dict(url='http://x'))), 'pretrained_cfg'),
    (dict(args=dict(act_layer=dict(a=1))), 'plain'),
    (dict(args=dict(n_in=1, small_images=True, layers=[1]*4, channels=[16384]*4)), 'does not fit its own settings'),
    (dict(args=dict(n_in=1, layers=[10**9]*4)), 'plain')])
def test_a_file_that_lies(tmp_path, change, words):
    "Refused by a line that names it; no network (the tests' guard sees to it), no memory of the size it claims"
    path = save_encoder(small_encoder(), tmp_path/'e.safetensors')
    save_file(load_file(path), path, metadata=dict(encoder=json.dumps(encoder_settings(path) | change)))
    with pytest.raises(ValueError, match=words): load_encoder(path)

@pytest.mark.parametrize('change,words', [
    (dict(library='pickle'), 'known architecture'), (dict(arch='xdumps', library='fastai'), 'known architecture'),
    (dict(arch=['resnet18']), 'known architecture'), (dict(args=dict(depth=3)), "no saved 'resnet18' has: 'depth'"),
    (dict(args=dict(device='cuda')), "'device'"), (dict(args=dict(cache_dir='/')), "'cache_dir'"),
    (dict(args=dict(layers=[[[[10**30]]]])), 'plain'), (dict(args=None), 'by name'),
    (dict(args=dict(layers=[90_000]*4)), 'many more than its 78'), (dict(args=dict(layers='x')), 'cannot be made'),
    (dict(size=10**9), 'size of images'), (dict(size='224'), 'size of images'), (dict(stats=[[1.],[0.]]), 'standard'),
    (dict(stats=[[1.],[1.,2.]]), 'standard deviation'), (dict(stats=3), 'standard'),
    (dict(arch='swin_tiny_patch4_window7_224', args=dict(img_size=22400)), 'does not fit its own')])
def test_settings_that_nothing_writes(tmp_path, change, words):
    path = save_encoder(small_encoder(), tmp_path/'e.safetensors')
    save_file(load_file(path), path, metadata=dict(encoder=json.dumps(encoder_settings(path) | change)))
    start = time.perf_counter()
    with pytest.raises(ValueError, match=words) as e: load_encoder(path)
    assert 'e.safetensors' in str(e.value) and '\n' not in str(e.value)
    # no more than the building of some hundred modules without memory; the second
    assert time.perf_counter()-start<5

def test_text_of_settings(tmp_path):
    path = tmp_path/'e.safetensors'
    for text in ('{', '['*100_000, '[1]'):
        save_file(dict(a=torch.zeros(1)), path, metadata=dict(encoder=text))
        with pytest.raises(ValueError, match=r'e\.safetensors must hold settings'): load_encoder(path)

def test_tables_that_are_not_saved(tmp_path):
    "The table of positions of an EVA follows from the size of its images and is not in the file: it counts"
    small = dict(embed_dim=64, depth=1, num_heads=1, use_abs_pos_emb=False, dynamic_img_size=False)
    e = create_encoder('eva02_tiny_patch14_224', pretrained=False, **small)
    path = save_encoder(e, tmp_path/'e.safetensors')
    assert same(load_encoder(path), e)
    settings = encoder_settings(path)
    settings['args']['img_size'] = 14*2000
    save_file(load_file(path), path, metadata=dict(encoder=json.dumps(settings)))
    with pytest.raises(ValueError, match='does not fit its own settings: they ask for far more memory'):
        load_encoder(path)

@pytest.mark.parametrize('arch', ('regnet_y_400mf','mobilenet_v2','vit_tiny_patch16_224','xresnet18'))
def test_everything_can_be_checked_before_it_takes_memory(tmp_path, arch):
    "Also networks that read numbers from tensors while they are built"
    e = create_encoder(arch, pretrained=False)
    assert same(load_encoder(save_encoder(e, tmp_path/'e.safetensors')), e)

class Huge:
    "A pickle that asks for a gigabyte of zeros"
    def __reduce__(self): return bytearray,(10**9,)

def larger_than_itself(path):
    "A file of torch whose pickle names a storage of a thousand times its numbers"
    torch.save(dict(a=torch.zeros(250)), path)
    with zipfile.ZipFile(path) as z: parts = {o: z.read(o) for o in z.namelist()}
    with zipfile.ZipFile(path, 'w') as z:
        # the number of elements, a two-byte integer in the pickle, becomes a four-byte one
        for k,v in parts.items(): z.writestr(k, v.replace(b'M\xfa\x00', b'J\x90\xd0\x03\x00').replace(
            b'K\xfa', b'J\x90\xd0\x03\x00') if k.endswith('data.pkl') else v)

def zipped_small(path):
    torch.save(dict(a=torch.zeros(10**6)), path)
    with zipfile.ZipFile(path) as z: parts = {o: z.read(o) for o in z.namelist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for k,v in parts.items(): z.writestr(k, v)

def old_format(path):
    torch.save(dict(a=torch.zeros(10**5)), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:3000])

far_ahead = b'\x80\x02}r\xff\xff\xff\x0f.'  # an empty dict, kept as object 268,435,455
def numbered_far_ahead(path):
    with zipfile.ZipFile(path, 'w') as z: z.writestr('c/data.pkl', far_ahead)

@pytest.mark.parametrize('write', (larger_than_itself, zipped_small, old_format, numbered_far_ahead,
    lambda p: p.write_bytes(far_ahead*4),
    lambda p: torch.save(dict(a=Huge()), p),
    lambda p: torch.save(dict(a=Huge()), p, _use_new_zipfile_serialization=False)))
def test_checkpoints_that_are_larger_than_they_are(tmp_path, write):
    e = small_encoder()
    write(tmp_path/'c.pth')
    with pytest.raises(ValueError, match='c.pth asks for more memory than its own size'):
        load_weights(e, tmp_path/'c.pth')

def test_checkpoints_that_go_round(tmp_path):
    o = {}
    o['model'] = o
    torch.save(o, tmp_path/'c.pth')
    with pytest.raises(ValueError, match='must hold tensors by name'): load_weights(small_encoder(), tmp_path/'c.pth')

def test_old_files_of_torch(tmp_path):
    "The format before torch 1.6, in which the official weights were published; views of one storage; half precision"
    want,got = small_encoder(),small_encoder()
    big = torch.randn(100)
    state = want.state_dict() | dict(a=big[:50], b=big[50:], c=torch.zeros(3, dtype=torch.bfloat16))
    torch.save(dict(state_dict=state, epoch=3, best=.5), tmp_path/'c.pth.tar', _use_new_zipfile_serialization=False)
    assert len(load_weights(got, tmp_path/'c.pth.tar').matched)==78 and same(got, want)

def test_reading_a_file_asks_for_no_network(tmp_path, monkeypatch):
    "With sockets that cannot even be made"
    path = save_encoder(small_encoder(), tmp_path/'e.safetensors')
    torch.save(small_encoder().state_dict(), tmp_path/'c.pth')
    lies = [dict(arch=o) for o in ('hf-hub:a/b','local-dir:/tmp','a/b','resnet18.a1_in1k')] + [
        dict(args=dict(pretrained=True)), dict(args=dict(pretrained_cfg_overlay=[1]))]
    class NoSocket:
        def __init__(self, *_, **__): raise AssertionError('a socket was asked for')
    monkeypatch.setattr(socket, 'socket', NoSocket)
    monkeypatch.setattr(socket, 'getaddrinfo', NoSocket)
    load_encoder(path), load_weights(small_encoder(), path), load_weights(small_encoder(), tmp_path/'c.pth')
    for change in lies:
        save_file(load_file(path), tmp_path/'l.safetensors',
                  metadata=dict(encoder=json.dumps(encoder_settings(path) | change)))
        try: load_encoder(tmp_path/'l.safetensors')
        except ValueError: assert change!=dict(arch='resnet18.a1_in1k')
