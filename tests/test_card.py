"Model cards: the hub reads them, their code runs, nothing private is in them, and nothing is sent without being asked"
import json, re, sys
from pathlib import Path
import pytest, torch, yaml
from helpers import small_encoder
from self_supervised_swav.card import model_card, push_to_hub, write_card
from self_supervised_swav.checkpoints import encoder_settings, load_whitening, save_encoder
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.whitening import Whitening

odd = 'a|b: #`c`\n---\n<script>'

def make_run(path, encoder=None, source='/home/someone/secret/leaves', evaluated=True, **settings):
    "The files of a run"
    path.mkdir()
    white = Whitening(torch.zeros(16), torch.eye(16)) if encoder is None else None
    save_encoder(encoder or small_encoder(), path/'encoder.safetensors', white, source=source, **settings)
    (path/'settings.json').write_text(json.dumps(dict(
        args=dict(source=source, method='swav', epochs=3),
        recipe=dict(swav=dict(eps=.03), fit=dict(n_epoch=3, lr=.001)),
        images=dict(n_train=1200, n_valid=300), versions=dict(Python='3.11.1', torch='2.9.0'))))
    acc = {'linear probe, pretrained encoder': {'10': [.5,.6,.7], 'all': [.9]}, 'k-NN, raw pixels': {'10': [.2,.2,.2]}}
    if evaluated: (path/'evaluation.json').write_text(json.dumps(dict(
        source=source, n_train=1200, n_valid=300, labels=['10','all'], seeds=3, accuracy=acc)))
    return path

def head(text): return yaml.safe_load(text.split('\n---\n')[0].removeprefix('---\n'))

def test_the_hub_reads_it(tmp_path):
    "By its own reader: license, task, and the means of the figures with their data"
    hub = pytest.importorskip('huggingface_hub')
    text = model_card(make_run(tmp_path/'run'), 'cc-by-4.0')
    data = hub.ModelCard(text).data
    assert (data.license,data.library_name)==('cc-by-4.0','self_supervised_swav')
    assert data.pipeline_tag=='image-feature-extraction'
    assert {'self-supervised-learning','swav','resnet18'}<={*data.tags} and data.metrics==['accuracy']
    got = [(o.metric_name,o.metric_value,o.metric_type,o.dataset_name,o.task_type) for o in data.eval_results]
    assert got==[(f'linear probe, pretrained encoder, {labels}',value,'accuracy','leaves','image-classification')
                 for labels,value in (('10 labels per class',.6),('all labels',.9))]
    # the card that the hub would write of this data has the same data
    assert yaml.safe_load(data.to_yaml())==head(text)

def test_what_people_read(tmp_path):
    text = model_card(make_run(tmp_path/'run', stats=([.1],[.2]), size=32, window=[0,4095]))
    for o in ('# run','pretrained by SwAV','| trained on | 1,200 |','| held out | 300 |','| images | leaves |',
              '| height and width | 32 px |','| values of black and white | [0, 4095] |','| swav | eps=0.03 |',
              '| fit | n_epoch=3, lr=0.001 |','| torch | 2.9.0 |','| k-NN, raw pixels | 20.0 ± 0.0% |',
              'normalized: `(x - mean) / std` with mean [0.1] and std [0.2]'): assert o in text, o
    assert head(text)['license']=='unknown' and 'someone' not in text and 'secret' not in text

def test_what_is_not_known(tmp_path):
    "Nothing is made up: no figures before they are measured, and a file alone has no recipe"
    run = make_run(tmp_path/'run', evaluated=False)
    text = model_card(run)
    assert 'Not measured: `swav evaluate' in text and 'model-index' not in head(text) and 'metrics' not in head(text)
    (run/'settings.json').unlink()
    text = model_card(run/'encoder.safetensors')
    assert '## Training' not in text and 'trained on |' not in text and '| images | leaves |' in text
    with pytest.raises(FileNotFoundError, match='no encoder at'): model_card(tmp_path)

def test_odd_names(tmp_path):
    "A name is text: it ends no metadata, no cell and no line, and is no markup"
    text = model_card(make_run(tmp_path/'odd|run <b>', source=f'/data/{odd}'))
    assert head(text)['model-index'][0]['results'][0]['dataset']['name']==odd.split('/')[-1]
    body = text.split('\n---\n', 1)[1]
    assert '<script>' not in body and '<b>' not in body
    for line in body.splitlines():
        if line.startswith('| images'): assert len(re.findall(r'(?<!\\)\|', line))==3

@pytest.mark.parametrize('format,arch,kwargs', [
    ('safetensors','resnet18',dict(n_in=1, layers=(1,1,1,1), channels=(8,8,16,16), small_images=True)),
    ('timm','resnet18',dict(n_in=1, layers=(1,1,1,1), channels=(8,8,16,16), pool_type='max')),
    ('torchvision','resnet18',{}),
    ('torch.export','resnet18',dict(layers=(1,1,1,1), channels=(8,8,16,16)))])
def test_its_code_runs(tmp_path, command, monkeypatch, format, arch, kwargs):
    "`swav export --card`: the code on the card makes the encoder of the file beside it"
    e = create_encoder(arch, pretrained=False, **kwargs).eval()
    run = make_run(tmp_path/'run', e)
    monkeypatch.chdir(tmp_path)
    code,said,err = command('export', run, '--format', format, '--card', 'README.md', '--license', 'mit')
    assert code==0 and said.splitlines()[-1]=='Wrote README.md', err
    text,names = (tmp_path/'README.md').read_text(),{}
    exec(re.search('```python\n(.*?)```', text, re.S)[1], names)
    x = torch.rand(2, kwargs.get('n_in', 3), 64, 64)
    with torch.no_grad(): torch.testing.assert_close(names['encoder'](x), e(x), atol=1e-5, rtol=1e-5)
    assert head(text)['license']=='mit'

def test_own_words_stay(tmp_path, command):
    "A card that exists is not written over, and that is said before the work"
    run,page = make_run(tmp_path/'run'),tmp_path/'README.md'
    page.write_text('mine')
    for args,said in ((['--card',page], 'README.md exists and may hold words of your own'),
                      (['--card',tmp_path/'b.md','--license','My license'], "--license must be a name of the hub")):
        code,_,err = command('export', run, '--format', 'torch.export', '-o', tmp_path/'e.pt2', *args)
        assert code==2 and said in err and err.count('\n')==1
    with pytest.raises(FileExistsError): write_card(run, page)
    assert page.read_text()=='mine' and sorted(o.name for o in tmp_path.iterdir())==['README.md','run']

def test_push_to_hub(tmp_path, monkeypatch):
    "A stand-in of the hub gets a private repository, the card, and the encoder without the path of its images"
    hub,calls = pytest.importorskip('huggingface_hub'),[]
    class Api:
        def __init__(self, token=None): calls.append(('token',token))
        def create_repo(self, repo_id, **kwargs): calls.append((repo_id,kwargs))
        def upload_folder(self, repo_id, folder_path, commit_message):
            files = {o.name: o.read_bytes() for o in Path(folder_path).iterdir()}
            calls.append((repo_id,files,commit_message))
            return 'done'
    monkeypatch.setattr(hub, 'HfApi', Api)
    run = make_run(tmp_path/'run')
    assert push_to_hub(run, 'me/leaves', 'mit', token='t')=='done'
    (_,token),repo,(name,files,message) = calls
    assert token=='t' and repo==('me/leaves',dict(private=True, exist_ok=True)) and name=='me/leaves' and message
    assert files.keys()=={'README.md','encoder.safetensors'}
    assert files['README.md'].decode()==model_card(run, 'mit') and b'someone' not in files['encoder.safetensors']
    (tmp_path/'got.safetensors').write_bytes(files['encoder.safetensors'])
    own = encoder_settings(run/'encoder.safetensors')
    assert encoder_settings(tmp_path/'got.safetensors')==own|dict(source='leaves')
    assert load_whitening(tmp_path/'got.safetensors') is not None

def test_push_errors(tmp_path, monkeypatch):
    "Before anything is sent"
    run = make_run(tmp_path/'run')
    with pytest.raises(ValueError, match="repo_id must be owner/name, got 'leaves'"): push_to_hub(run, 'leaves')
    with pytest.raises(ValueError, match='license must be a name of the hub'): push_to_hub(run, 'me/leaves', 'My own')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ImportError, match='push_to_hub needs huggingface_hub: pip install huggingface_hub'):
        push_to_hub(run, 'me/leaves')
