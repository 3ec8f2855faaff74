"""Files of every kind, changed in any place: what they hold comes back, or an error says which file it is.

`tools/fuzz_bytes.py` changes the same files in search of code that no test has reached."""
import importlib.util, io, json, struct, subprocess, sys, tarfile, tempfile, warnings, zipfile
from dataclasses import fields
from pathlib import Path
import numpy as np, pytest, torch
from fastai.vision.core import PILImage
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from fuzz import called, changes, floats, fuzz, odd_values, other_versions, tensors
from self_supervised_swav.args import PretrainArgs
from self_supervised_swav.checkpoints import encoder_settings, load_encoder, load_weights, load_whitening, save_encoder
from self_supervised_swav.data import OpenChannels, OpenImage
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.files import read_state
from self_supervised_swav.images import image_info
from self_supervised_swav.published import load_swav_checkpoint
from self_supervised_swav.runs import configured
from self_supervised_swav.select import read_labels
from self_supervised_swav.shards import Shards, make_index, read_index, write_index
from self_supervised_swav.whitening import Whitening

warnings.simplefilter('ignore')
pytestmark = pytest.mark.filterwarnings('ignore') # pytest sets its own for each test
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

# --- what else reads bytes --------------------------------------------------------------------------------------------
def in_memory(write, *args, **kwargs):
    f = io.BytesIO()
    write(f, *args, **kwargs)
    return f.getvalue()

picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8,8,3))
pixels = np.arange(320, dtype=np.uint16).reshape(5,8,8)

def shard_bytes():
    def write(f):
        with tarfile.open(fileobj=f, mode='w') as t:
            for name,o in (('a.png',in_memory(picture.save, 'png')), ('a.cls',b'1'),
                           ('b.jpg',in_memory(picture.save, 'jpeg'))):
                member = tarfile.TarInfo(name)
                member.size = len(o)
                t.addfile(member, io.BytesIO(o))
    return in_memory(write)

def check_picture(path):
    res = called(OpenImage(PILImage), path, names=[path.name])
    assert res is None or res.mode=='RGB'

def check_array(path):
    try: n = image_info(path).channels
    except Exception: return check_picture(path)  # which says whose error it is
    called(OpenChannels(min(n, 8)), path, names=[path.name])
    check_picture(path)

def check_shard(path):
    shards = called(Shards, str(path), names=[path.name])
    for o in shards or (): called(OpenImage(PILImage), o, names=[path.name])

shard = put('whole.tar', shard_bytes())
with open(shard, 'rb') as f: write_index(make_index(f, shard.stat().st_size), 'now', folder/'whole.npz')

def check_index(path):
    with open(path, 'rb') as f: o = read_index(f, shard.stat().st_size, 'now')
    assert o is None or len(o['sizes'])==len(o['labels'])

run = dict(args=dict(source='digits', bs=32, epochs=2, settings=['temp=.1']), recipe=dict(swav=dict(temp=.1)))
def check_config(path):
    names = [path.name, *(f.name for f in fields(PretrainArgs))]
    res = called(configured, PretrainArgs('digits', config=str(path)), names=names)
    if res is not None: called(res[0].check, names=names)

readers = {  # name of a file, what it holds, and what reads it
    'encoder': ('a.safetensors', data, check_encoder),
    'weights': ('a.pth', new, check_weights),
    'old weights': ('b.pth', old, check_weights),
    'checkpoint': ('last.pth', new, lambda path: called(read_state, path, False, names=[path.name])),
    'PNG': ('a.png', in_memory(picture.save, 'png'), check_picture),
    'JPEG': ('a.jpg', in_memory(picture.save, 'jpeg'), check_picture),
    'TIFF': ('a.tif', in_memory(picture.save, 'tiff'), check_array),
    'array': ('a.npy', in_memory(np.save, pixels), check_array),
    'shard': ('a.tar', shard.read_bytes(), check_shard),
    'index': ('a.npz', (folder/'whole.npz').read_bytes(), check_index),
    'labels': ('labels.csv', b'file,class,group\na.png,cat,\n"b,c.png","a ""dog""",a.png\n',
               lambda path: called(read_labels, path, names=[path.name])),
    'settings': ('settings.json', json.dumps(run).encode(), check_config)}

def read(reader, data): readers[reader][2](put(readers[reader][0], data))

@pytest.mark.parametrize('reader', readers)
def test_whole(reader): read(reader, readers[reader][1])

others = [o for o in readers if o not in ('encoder','weights','old weights')]

@fuzz(200, change=changes(), reader=st.sampled_from(others))
def test_bytes_of_others(change, reader): read(reader, change(readers[reader][1]))

@pytest.mark.slow
@pytest.mark.parametrize('reader', readers)
def test_guided(reader):
    "What reaches new code is changed further"
    if importlib.util.find_spec('atheris') is None: pytest.skip('needs atheris: pip install atheris')
    tool = Path(__file__).resolve().parent.parent/'tools'/'fuzz_bytes.py'
    res = subprocess.run([sys.executable,tool,reader,'--seconds','15'], capture_output=True, text=True)
    assert res.returncode==0, res.stdout+res.stderr[-4000:]
