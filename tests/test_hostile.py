"Files of somebody who wishes harm, given to every loader and every command: refused, and nothing in them runs"
import io, pickle
import numpy as np, pytest, torch
from PIL import Image
from helpers import small_encoder
from self_supervised_swav import cli
from self_supervised_swav.checkpoints import load_encoder, load_weights, load_whitening, save_encoder
from self_supervised_swav.files import read_state
from self_supervised_swav.images import read_image
from self_supervised_swav.published import load_swav_checkpoint
from self_supervised_swav.resume import fit_progress
from self_supervised_swav.replay import replay_batch
from self_supervised_swav.select import read_csv, read_labels

class Planted:
    "A pickle that makes a file"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open,(self.path,'w')

def pickles(mark):
    "Files that would make the file `mark`, by how they are written"
    def of_torch(**kwargs):
        f = io.BytesIO()
        torch.save(dict(settings={}, model={}, crops=[], state_dict={}, x=Planted(mark)), f, **kwargs)
        return f.getvalue()
    def of_numpy():
        f = io.BytesIO()
        np.save(f, np.array([Planted(mark)], dtype=object))
        return f.getvalue()
    return dict(torch=of_torch(), old=of_torch(_use_new_zipfile_serialization=False), plain=pickle.dumps(Planted(mark)),
                numpy=of_numpy())

loaders = dict(load_encoder=load_encoder, load_whitening=load_whitening, load_swav_checkpoint=load_swav_checkpoint,
               load_weights=lambda p: load_weights(small_encoder(), p), read_state=read_state,
               fit_progress=fit_progress, replay=replay_batch, read_csv=read_csv, read_labels=read_labels,
               read_image=read_image)

@pytest.mark.parametrize('kind', ['torch','old','plain','numpy'])
@pytest.mark.parametrize('name', loaders)
def test_no_loader_runs_a_pickle(tmp_path, name, kind):
    data = pickles(tmp_path/'ran')[kind]
    for end in ('pth','safetensors','npy','csv','png'):
        path = tmp_path/f'bad.{end}'
        path.write_bytes(data)
        with pytest.raises((ValueError,OSError)) as e: loaders[name](path)
        assert 'bad' in str(e.value) or name=='read_image'  # whose errors `OpenImage` completes
    assert not (tmp_path/'ran').exists()

def test_the_plant_works(tmp_path):
    "The same files, read without care, do run: the tests above would see it"
    pickle.loads(pickles(tmp_path/'ran')['plain'])
    assert (tmp_path/'ran').exists()

@pytest.fixture
def place(tmp_path):
    "A run with an encoder, images, and each other file of a run as a pickle that would make the file `ran`"
    bad = pickles(tmp_path/'ran')
    for i in range(6):
        (tmp_path/'photos').mkdir(exist_ok=True)
        Image.effect_noise((24,24), 60).convert('RGB').save(tmp_path/'photos'/f'{i}.png')
    (tmp_path/'bad.pth').write_bytes(bad['torch'])
    (tmp_path/'bad.csv').write_bytes(bad['plain'])
    for run in ('run','whole'):
        (tmp_path/run).mkdir()
        for o in ('last.pth','last.pth.prev','nan_batch.pt','settings.json','classifier.json','head.safetensors',
                  'evaluation.json'):
            (tmp_path/run/o).write_bytes(bad['torch'])
    (tmp_path/'run'/'encoder.safetensors').write_bytes(bad['torch'])
    save_encoder(small_encoder(3), tmp_path/'whole'/'encoder.safetensors', size=24)
    return tmp_path

lines = [f'{o} run photos' for o in ('embed','sort','explore','select','label')] + [
    'evaluate run digits --epochs 0 --seeds 1', 'export run', 'predict run photos', 'replay bad.pth',
    'pretrain photos --out run --resume', 'pretrain photos --config bad.pth --out new',
    'pretrain photos --init bad.pth --arch resnet18 --out new', 'pretrain photos --init run --out new',
    'sort whole photos --by prototypes', 'export whole --card README.md', 'predict whole photos',
    'pretrain photos --out whole --resume', 'select whole photos --labels bad.csv',
    'label whole photos --files bad.csv', 'label whole photos --labels bad.csv', 'finetune whole bad.csv']

@pytest.mark.parametrize('line', lines)
def test_no_command_runs_a_pickle(place, line, command, monkeypatch):
    monkeypatch.chdir(place)
    before = {o for o in place.rglob('*')}
    code,_,err = command(*line.split())
    assert code==2 and err.startswith(f'swav {line.split()[0]}: ') and 'weights_only' not in err
    assert not (place/'ran').exists()
    assert {o.name for o in place.rglob('*') if o not in before}<={'new'}

def test_every_command_is_tried():
    "`doctor` and `prepare` read no such files"
    assert {o.split()[0] for o in lines}=={*cli.commands}-{'doctor','prepare'}
