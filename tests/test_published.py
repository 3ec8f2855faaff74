"Published checkpoints: in each of their forms the model gives the embeddings and scores of the code that wrote them"
import hashlib, re
from itertools import groupby
import pytest, torch, torch.nn.functional as F, torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from self_supervised_swav.checkpoints import load_encoder, save_encoder
from self_supervised_swav.deepcluster import DeepClusterModel
from self_supervised_swav.models import SwAVModel
from self_supervised_swav.moco import MoCoModel
from self_supervised_swav.simclr import SimCLRModel
from self_supervised_swav.published import load_official, load_swav_checkpoint, official
import self_supervised_swav.published as published

class Written(ResNet):
    "The network of the official code: torchvision's ResNet, of any width from the first convolution on, and a head"
    def __init__(self, width=8, layers=(1,1,1,1), block=Bottleneck, n_protos=(12,), hidden=24, bn=True, **kwargs):
        super().__init__(block, layers, **kwargs)
        self.inplanes = width
        self.conv1,self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False),nn.BatchNorm2d(width)
        for i,n in enumerate(layers):
            setattr(self, f'layer{i+1}', self._make_layer(block, width*2**i, n, 1 if i==0 else 2))
        d = 8*width*block.expansion
        self.fc = nn.Identity()
        self.projection_head = nn.Sequential(nn.Linear(d, hidden), *([nn.BatchNorm1d(hidden)] if bn else []), nn.ReLU(),
                                             nn.Linear(hidden, 10))
        protos = [nn.Linear(10, n, bias=False) for n in n_protos]
        self.prototypes = protos[0] if len(protos)==1 else nn.Module()
        for i,o in enumerate(protos if len(protos)>1 else ()): setattr(self.prototypes, f'prototypes{i}', o)
        for m in self.modules():
            if isinstance(m, (nn.BatchNorm2d,nn.BatchNorm1d)):
                for o in (m.weight,m.bias): nn.init.normal_(o, .5, .1)
                m.running_mean.normal_(0, .1), m.running_var.uniform_(.5, 2)
        # the training puts prototypes on the unit sphere before each step
        for o in protos: o.weight.data = F.normalize(o.weight.data, dim=1)
        self.protos = [protos]

    def run(self, crops):
        # one pass for the crops of a resolution, as there: batch norm sees them together
        x = torch.cat([super(Written, self).forward(torch.cat(list(o))) for _,o in groupby(crops, lambda o: o.shape)])
        z = F.normalize(self.projection_head(x), dim=1)
        return z,torch.cat([o(z) for o in self.protos[0]], 1)

def bare(m): return m.state_dict()
def data_parallel(m): return {f'module.{k}': v for k,v in m.state_dict().items()}
def whole(m): return dict(epoch=3, state_dict=data_parallel(m), optimizer=dict(lr=.1))
def vissl(m):
    state = m.state_dict()
    trunk = {f'_feature_blocks.{k}': v for k,v in state.items() if not k.startswith('pro')}
    heads = {f'0.{k.replace("prototypes.prototypes","prototypes").replace("prototypes.weight","prototypes0.weight")}': v
             for k,v in state.items() if k.startswith('pro')}
    return dict(phase_idx=9, classy_state_dict=dict(base_model=dict(model=dict(trunk=trunk, heads=heads))))

def check(m, model, seed=0):
    "Equal in eval and train mode, the statistics of batch norm included"
    gen = torch.Generator().manual_seed(seed)
    crops = [torch.randn(4, 3, s, s, generator=gen) for s in (64,64,40)]
    for mode in (False,True):
        m.train(mode), model.train(mode)
        with torch.no_grad(): want,got = m.run(crops),model(crops)
        for a,b in zip(want, got): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(m.bn1.running_var, model.encoder.bn1.running_var)

@pytest.mark.parametrize('form', (bare, data_parallel, whole, vissl))
@pytest.mark.parametrize('protos', ((12,), (12,7,9)), ids=['swav','deepcluster'])
def test_forms(tmp_path, form, protos):
    m = Written(n_protos=protos)
    torch.save(form(m), tmp_path/'c.pth', _use_new_zipfile_serialization=form is whole)
    model = load_swav_checkpoint(tmp_path/'c.pth')
    assert type(model) is (SwAVModel if len(protos)==1 else DeepClusterModel)
    assert model.loaded[1:]==([],[],[]) and len(model.loaded.matched)==len(m.state_dict())
    check(m, model)

@pytest.mark.parametrize('kwargs,arch', [
    (dict(width=64, layers=(3,4,6,3)), 'resnet50'),
    (dict(width=8), 'resnet50w2'),
    *(pytest.param(dict(width=64*n), f'resnet50w{n}', marks=pytest.mark.slow) for n in (2,4,5)),
    (dict(width=64, block=BasicBlock, layers=(2,2,2,2)), 'resnet18'), (dict(bn=False), 'resnet50w2'),
    (dict(width=16), 'resnet50w2')])
def test_widths(tmp_path, kwargs, arch):
    "The widths of the official models, with one block a stage where memory demands it"

    m = Written(**kwargs)
    torch.save(data_parallel(m), tmp_path/'c.pth')
    model = load_swav_checkpoint(tmp_path/'c.pth')
    assert model.encoder.settings['arch']==arch and model.loaded.missing==[]
    check(m, model)
    if kwargs.get('width', 8)<128: # and the encoder is one of this package's
        again = load_encoder(save_encoder(model, tmp_path/'e.safetensors'))
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(again(x), model.encoder.eval()(x))

def test_full_widths():
    "The arguments of the wide networks make those of the official sizes: 94, 375 and 586 million parameters in all"
    from self_supervised_swav.encoders import create_encoder
    for n,millions in ((2,94),(4,375),(5,586)):
        with torch.device('meta'): e = create_encoder(f'resnet50w{n}', pretrained=False)
        assert e.conv1.out_channels==64*n
        # the published number rounds to millions and has the projection head in it or not
        assert abs(sum(p.numel() for p in e.parameters())/1e6-millions)<millions*.02

def test_backbones(tmp_path):
    "Torchvision's own files, with their classifier: the encoder alone, and the classifier is named"
    for name in ('resnet18','resnext50_32x4d'):
        m = torchvision.models.get_model(name, weights=None)
        torch.save(m.state_dict(), tmp_path/'c.pth')
        e = load_swav_checkpoint(tmp_path/'c.pth')
        m.fc = nn.Identity()
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(e.eval()(x), m.eval()(x), atol=1e-5, rtol=1e-5)
        assert e.loaded.unexpected==['fc.weight','fc.bias'] and e.loaded.missing==[]

def test_moco(tmp_path):
    q = torchvision.models.resnet18(num_classes=10)
    q.fc = nn.Sequential(nn.Linear(512,32), nn.ReLU(), nn.Linear(32,10))
    state = {f'module.encoder_{o}.{k}': v for o in 'qk' for k,v in q.state_dict().items()} | {
        'module.queue': torch.zeros(10, 8), 'module.queue_ptr': torch.zeros(1, dtype=torch.long)}
    torch.save(dict(epoch=200, arch='resnet18', state_dict=state), tmp_path/'c.pth')
    model = load_swav_checkpoint(tmp_path/'c.pth')
    assert isinstance(model, MoCoModel) and model.loaded.missing==[]
    x = torch.randn(2, 3, 64, 64)
    z,keys = model.eval()(x)
    torch.testing.assert_close(z, F.normalize(q.eval()(x), dim=1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(keys, z)

def moco(version):
    "The network of MoCo as its code writes it, and its file: version 1 has one linear layer, version 2 two"
    q = ResNet(Bottleneck, (1,1,1,1))
    linear = nn.Linear(2048, 128)
    q.fc = linear if version==1 else nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), linear)
    state = {f'module.encoder_{o}.{k}': v for o in 'qk' for k,v in q.state_dict().items()} | {
        'module.queue': torch.zeros(128, 64), 'module.queue_ptr': torch.zeros(1, dtype=torch.long)}
    return q,dict(epoch=200, arch='resnet50', state_dict=state)

def simclr():
    "SimCLR as VISSL writes it: a trunk, and two heads in a row"
    q = ResNet(Bottleneck, (1,1,1,1))
    trunk = {f'_feature_blocks.{k}': v for k,v in q.state_dict().items() if not k.startswith('fc.')}
    q.fc = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 128))
    heads = {f'{i}.clf.0.{k}': v for i,o in enumerate((q.fc[0],q.fc[2])) for k,v in o.state_dict().items()}
    return q,dict(phase_idx=799, classy_state_dict=dict(base_model=dict(model=dict(trunk=trunk, heads=heads))))

@pytest.mark.parametrize('name,made,kind', [
    ('moco_v1_200ep', lambda: moco(1), MoCoModel), ('moco_v2_800ep', lambda: moco(2), MoCoModel),
    ('simclr_800ep', simclr, SimCLRModel)])
def test_official_of_other_methods(tmp_path, monkeypatch, name, made, kind):
    "The ResNet-50 of MoCo and SimCLR with their projectors: equal embeddings, in train mode too, and no tensor is lost"
    q,state = made()
    for o in q.modules(): # batch norm that does something
        if isinstance(o, nn.BatchNorm2d): o.running_mean.normal_(0, .1), o.running_var.uniform_(.5, 2)
    pretend(monkeypatch, state, name, md5=None)
    model = load_official(name, tmp_path)
    assert type(model) is kind and model.loaded.missing==model.loaded.other_shape==[]
    others = len(q.state_dict())+2 if kind is MoCoModel else 0 # the momentum encoder, the queue and its pointer
    assert len(model.loaded.unexpected)==others
    x = torch.randn(4, 3, 64, 64)
    for mode in (False,True):
        q.train(mode), model.train(mode)
        with torch.no_grad(): want,got = F.normalize(q(x), dim=1),model(x)
        torch.testing.assert_close(got[0] if isinstance(got, tuple) else got, want, atol=1e-5, rtol=1e-5)

def test_classifier_of_vissl(tmp_path):
    "One head is a classifier, and no projector"
    _,state = simclr()
    heads = state['classy_state_dict']['base_model']['model']['heads']
    for k in list(heads):
        if k.startswith('1.'): del heads[k]
    torch.save(state, tmp_path/'c.pth')
    e = load_swav_checkpoint(tmp_path/'c.pth')
    assert e.settings['arch']=='resnet50' and e.loaded.unexpected==['heads.0.clf.0.weight','heads.0.clf.0.bias']

def test_encoder_only_and_table(tmp_path):
    m = Written()
    torch.save(m.state_dict() | dict(other=torch.zeros(2)), tmp_path/'c.pth')
    e = load_swav_checkpoint(tmp_path/'c.pth', encoder_only=True)
    assert e.settings['arch']=='resnet50w2' and 'other' in e.loaded.unexpected
    text = str(load_swav_checkpoint(tmp_path/'c.pth').loaded)
    assert '| part | matched | missing | unexpected | other shape |' in text and 'unexpected: other' in text

def test_incomplete(tmp_path):
    "Nothing is passed over: a missing tensor and one of another shape are errors, and counted where they are allowed"
    state = Written().state_dict()
    words = r'layer3\.0\.bn2\.weight'
    for change in (dict(), {'layer3.0.bn2.weight': torch.zeros(3)}):
        torch.save({k: v for k,v in state.items() if k!='layer3.0.bn2.weight'} | change, tmp_path/'c.pth')
        with pytest.raises(ValueError, match=f'incomplete encoder: 1 of its tensors.*{words}.*strict=False'):
            load_swav_checkpoint(tmp_path/'c.pth')
        with pytest.warns(UserWarning, match='incomplete'): model = load_swav_checkpoint(tmp_path/'c.pth', strict=False)
        assert len(model.loaded.missing)+len(model.loaded.other_shape)==1
    for bad in (dict(a=torch.zeros(1)), {'conv1.weight': torch.zeros(3)},
                {'blocks.0.attn.qkv.weight': torch.zeros(3,3)}):
        torch.save(bad, tmp_path/'c.pth')
        with pytest.raises(ValueError, match='must hold a ResNet by'): load_swav_checkpoint(tmp_path/'c.pth')

def test_no_code_is_run(tmp_path):
    class Evil:
        def __reduce__(self): return open,(str(tmp_path/'evil'),'w')
    torch.save(Written().state_dict() | dict(x=Evil()), tmp_path/'c.pth')
    with pytest.raises(ValueError, match='c.pth is neither'): load_swav_checkpoint(tmp_path/'c.pth')
    assert not (tmp_path/'evil').exists()

# --- the published list

def test_list():
    assert len({o.url for o in official.values()})==len(official)
    for o in official.values():
        assert re.match(r'https://dl\.fbaipublicfiles\.com/', o.url) and 60<o.top1<80 and o.method in (
            'swav','deepclusterv2','moco','simclr')

def pretend(monkeypatch, state, name='swav_100ep', **change):
    def download(url, dst): torch.save(state, dst)
    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    monkeypatch.setitem(published.official, name, official[name]._replace(**change))

def test_official(tmp_path, monkeypatch, capsys):
    "Downloaded once, its checksum printed; a file that changes is an error"
    pretend(monkeypatch, data_parallel(Written(width=8)), arch='resnet50w2')
    model = load_official('swav_100ep', tmp_path)
    sha = hashlib.sha256((tmp_path/'swav_100ep.pth').read_bytes()).hexdigest()
    assert sha in capsys.readouterr().out and isinstance(model, SwAVModel)
    monkeypatch.setattr(torch.hub, 'download_url_to_file', None)
    load_official('swav_100ep', tmp_path)
    torch.save(Written(width=8).state_dict(), tmp_path/'swav_100ep.pth')
    with pytest.raises(ValueError, match='is not the file that was'): load_official('swav_100ep', tmp_path)

def test_official_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="name must be one of swav_800ep, .*got 'swav'"): load_official('swav')
    def offline(*_): raise OSError('no route to host')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    with pytest.raises(RuntimeError, match='cannot be downloaded .no route to host.: fetch it .* put it at') as e:
        load_official('swav_800ep', tmp_path)
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())
    pretend(monkeypatch, Written(width=8).state_dict(), md5='0000')
    with pytest.raises(ValueError, match='is not the file'): load_official('swav_100ep', tmp_path)
    pretend(monkeypatch, Written(width=8).state_dict(), 'swav_200ep')
    with pytest.raises(ValueError, match='must hold a resnet50, got resnet50w2'): load_official('swav_200ep', tmp_path)
