"Files of every kind, changed in any place: what they hold comes back, or an error says which file it is"
import io, json, struct, tempfile, warnings, zipfile
from pathlib import Path
import torch
from hypothesis import strategies as st
from torch import nn
from fuzz import called, changes, floats, fuzz, odd_values, other_versions, tensors
from self_supervised_swav.checkpoints import encoder_settings, load_encoder, load_weights, load_whitening, save_encoder
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.published import load_swav_checkpoint
from self_supervised_swav.whitening import Whitening

warnings.simplefilter('ignore')
folder = Path(tempfile.mkdtemp())

def encoder():
    return create_encoder('resnet18', n_in=1, pretrained=False, layers=(1,1,1,1), channels=(1,1,1,1), small_images=True)

def put(name, data):
    path = folder/name
    path.write_bytes(data)
    return path

def whole_file():
    path = save_encoder(encoder(), folder/'whole.safetensors', Whitening(torch.zeros(1), torch.ones(1, 1)), size=16,
                        stats=[[.5],[.2]])
    data = path.read_bytes()
    n = struct.unpack('<Q', data[:8])[0]
    return data,json.loads(data[8:8+n]),data[8+n:]
data,header,body = whole_file()
settings = json.loads(header['__metadata__']['encoder'])

def check_encoder(path):
    res = called(load_encoder, path, names=[path.name])
    if res is not None: assert isinstance(res, nn.Module) and 'args' in res.settings
    called(encoder_settings, path, names=[path.name])
    called(load_whitening, path, names=[path.name])
    called(load_weights, encoder(), path, names=[path.name])
    called(load_swav_checkpoint, path, names=[path.name])

@fuzz(60, change=changes())
def test_bytes_of_an_encoder(change): check_encoder(put('a.safetensors', change(data)))

@fuzz(60, o=other_versions(header))
def test_header_of_an_encoder(o):
    text = json.dumps(o).encode()
    check_encoder(put('b.safetensors', struct.pack('<Q', len(text))+text+body))

@fuzz(60, o=other_versions(settings))
def test_settings_of_an_encoder(o):
    h = header | dict(__metadata__=dict(encoder=json.dumps(o)))
    text = json.dumps(h).encode()
    check_encoder(put('c.safetensors', struct.pack('<Q', len(text))+text+body))

def torch_file(o, **kwargs):
    f = io.BytesIO()
    torch.save(o, f, **kwargs)
    return f.getvalue()

def zipped(parts):
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w') as z:
        for k,v in parts.items(): z.writestr(k, v)
    return f.getvalue()

state = encoder().state_dict()
new,old = torch_file(dict(model=state)),torch_file(dict(model=state), _use_new_zipfile_serialization=False)
with zipfile.ZipFile(io.BytesIO(new)) as z: parts = {o: z.read(o) for o in z.namelist()}

def check_weights(path):
    called(load_weights, encoder(), path, names=[path.name])
    called(load_swav_checkpoint, path, names=[path.name])

@fuzz(60, change=changes(), kind=st.sampled_from(('new','old','pickle')))
def test_bytes_of_weights(change, kind):
    if kind=='pickle': bad = zipped({k: change(v) if k.endswith('.pkl') else v for k,v in parts.items()})
    else: bad = change(new if kind=='new' else old)
    check_weights(put(f'{kind}.pth', bad))

words = st.sampled_from(['module','encoder_q','heads','0','1','clf','projection_head','prototypes','prototypes0','fc',
                         'conv1','bn1','layer1','layer2','layer3','layer4','conv2','conv3','weight','bias','queue',
                         'running_mean','encoder','trunk','base_model','state_dict','','x','downsample','projector'])
names = st.lists(words, min_size=1, max_size=5).map('.'.join)

@fuzz(100, state=st.dictionaries(names, st.one_of(tensors(types=floats), odd_values), max_size=8), inner=st.booleans(),
      resnet=st.booleans())
def test_any_checkpoint(state, inner, resnet):
    if resnet: state = {f'module.{k}': v for k,v in encoder().state_dict().items()} | state
    check_weights(put('any.pth', torch_file(dict(state_dict=state) if inner else state)))
