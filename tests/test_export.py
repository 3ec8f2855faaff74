"Encoders in other tools give the same features"
import pytest, timm, torch, torchvision
from PIL import Image
from fastai.interpret import Interpretation
from fastai.learner import load_learner
from fastai.vision.core import PILImageBW
from fastai.vision.data import ImageDataLoaders
from fastai.vision.learner import vision_learner

from helpers import digits, small_encoder
from self_supervised_swav.checkpoints import load_whitening, save_encoder
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.export import encoder_arch, export_encoder
from self_supervised_swav.whitening import Whitening

small = dict(pretrained=False, layers=(1,1,1,1), channels=(8,8,16,16))

def test_vision_learner(tmp_path, closed_figures):
    "All that fastai does with a Learner of its own"
    e = small_encoder()
    path = save_encoder(e, tmp_path/'e.safetensors')
    for i in range(24):
        (tmp_path/'images'/'ab'[i%2]).mkdir(parents=True, exist_ok=True)
        Image.new('L', (16,16), 10*i).save(tmp_path/'images'/'ab'[i%2]/f'{i}.png')
    dls = ImageDataLoaders.from_folder(tmp_path/'images', valid_pct=.5, seed=0, bs=4, num_workers=0, device='cpu',
                                       img_cls=PILImageBW)
    learn = vision_learner(dls, encoder_arch(path), path=tmp_path)
    assert torch.equal(learn.model[0][0].encoder.conv1.weight, e.conv1.weight)
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(1)
        preds = learn.get_preds()[0]
        learn.model_dir = '.'
        learn.export('learner.pkl')
        learn.show_results()
        Interpretation.from_learner(learn).plot_top_losses(2)
        learn.predict(dls.valid_ds.items[0])
    again = load_learner(tmp_path/'learner.pkl')
    with again.no_bar(): torch.testing.assert_close(again.get_preds(dl=dls.valid)[0], preds)

def test_other_networks_and_statistics(tmp_path):
    "Transformers too; images are normalized as the file says"
    e = create_encoder('vit_tiny_patch16_224', pretrained=False, depth=1)
    path = save_encoder(e, tmp_path/'e.safetensors', stats=([.1,.2,.3],[.5,.6,.7]))
    learn = vision_learner(digits(60, labeled=True, n_in=3), encoder_arch(path), concat_pool=False)
    assert learn.dls.after_batch.fs[-1].mean.flatten().tolist()==pytest.approx([.1,.2,.3])
    assert learn.model(torch.rand(2,3,16,16)).shape[0]==2

def test_timm(tmp_path):
    e = create_encoder('resnet18', **small).eval()
    path = export_encoder(e, tmp_path/'e.pth', 'timm')
    again = timm.create_model('resnet18', checkpoint_path=str(path), num_classes=0, layers=(1,1,1,1),
                              channels=(8,8,16,16))
    x = torch.rand(2,3,64,64)
    torch.testing.assert_close(again.eval()(x), e(x))
    for other in (small_encoder(), torch.nn.Linear(2,2), create_encoder(torchvision.models.resnet18, pretrained=False),
                  create_encoder('resnet50w2', pretrained=False, layers=(1,1,1,1), channels=(8,16,32,64))):
        with pytest.raises(ValueError, match='its own stem'): export_encoder(other, tmp_path/'s.pth', 'timm')
    assert not (tmp_path/'s.pth').exists()

@pytest.mark.parametrize('arch', ('resnet18','resnet34','resnet50','resnet101','resnet152','resnext50_32x4d',
                                  'resnext101_32x8d','resnext101_64x4d','wide_resnet50_2','wide_resnet101_2'))
def test_torchvision_names(arch):
    "timm's networks have the tensors of torchvision's, by the same names"
    with torch.device('meta'): a,b = create_encoder(arch, pretrained=False),torchvision.models.get_model(arch)
    b.fc = torch.nn.Identity()
    assert {k: v.shape for k,v in a.state_dict().items()}=={k: v.shape for k,v in b.state_dict().items()}

@pytest.mark.parametrize('arch', ('resnet18.a1_in1k','resnet50','resnext50_32x4d',torchvision.models.resnet18))
def test_torchvision(tmp_path, arch):
    e = create_encoder(arch, pretrained=False)
    for o in e.modules(): # batch norm that does something
        if isinstance(o, torch.nn.BatchNorm2d): o.running_mean.normal_(0, .1), o.running_var.uniform_(.5, 2.)
    random_state = torch.get_rng_state()
    path = export_encoder(e, tmp_path/'e.pth', 'torchvision')
    assert torch.equal(torch.get_rng_state(), random_state)
    net = torchvision.models.get_model(getattr(arch, '__name__', str(arch).split('.')[0]))
    net.fc = torch.nn.Identity()
    net.load_state_dict(torch.load(path))
    x = torch.rand(2,3,64,64)
    with torch.no_grad(): torch.testing.assert_close(net.eval()(x), e.eval()(x), atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('arch,kwargs,match', [
    ('vit_tiny_patch16_224', dict(depth=1), "is for resnet18, .*, got 'vit_tiny_patch16_224'; use 'safetensors'"),
    ('resnet18d', {}, "is for resnet18, .*, wide_resnet101_2, got 'resnet18d'"),
    ('resnet18', dict(n_in=1), "torchvision's own resnet18, for 3 channels.*conv1.weight differs"),
    ('resnet18', dict(layers=(1,1,1,1)), 'layer1.1.conv1.weight differs'),
    ('resnet18', dict(small_images=True), 'conv1.weight differs'),
    ('resnet18', dict(pool_type='catavgmax'), r"other features than the encoder, \(2, 512\) and not \(2, 1024\)"),
    ('resnet18', dict(pool_type='max'), r'resnet18 gives other features than the encoder, .* apart')])
def test_torchvision_refuses(tmp_path, arch, kwargs, match):
    with pytest.raises(ValueError, match=match) as e:
        export_encoder(create_encoder(arch, pretrained=False, **kwargs), tmp_path/'e.pth', 'torchvision')
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())

def run_onnx(path, x):
    ort = pytest.importorskip('onnxruntime')
    return torch.from_numpy(ort.InferenceSession(path.read_bytes()).run(None, {'images': x.numpy()})[0])

def test_onnx(tmp_path):
    "Any batch, any height and width, the normalization inside"
    pytest.importorskip('onnxscript')
    e = create_encoder('resnet18', **small).eval()
    save_encoder(e, tmp_path/'e.safetensors', stats=([.1,.2,.3],[.5,.6,.7]), size=32)
    path = export_encoder(tmp_path/'e.safetensors', tmp_path/'e.onnx', 'onnx', normalize=True)
    mean,std = (torch.tensor(o).view(1,3,1,1) for o in ((.1,.2,.3),(.5,.6,.7)))
    for shape in ((5,3,32,32),(1,3,40,72)):
        x = torch.rand(shape)
        torch.testing.assert_close(run_onnx(path, x), e((x-mean)/std), atol=1e-4, rtol=1e-4)

def tiny_net():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
                               torch.nn.Flatten()).eval()

def test_onnx_without_normalization(tmp_path):
    pytest.importorskip('onnxscript')
    e = tiny_net()
    path,x = export_encoder(e, tmp_path/'e.onnx', 'onnx', size=16),torch.rand(3,3,20,17)
    torch.testing.assert_close(run_onnx(path, x), e(x), atol=1e-4, rtol=1e-4)

class OneSize(torch.nn.Module):
    "A network of one size, as a transformer with fixed positions"
    def __init__(self):
        super().__init__()
        self.conv,self.fc = torch.nn.Conv2d(3, 4, 3, 2, 1),torch.nn.Linear(4*8*8, 5)
    def forward(self, x): return self.fc(self.conv(x).flatten(1))

def test_one_size(tmp_path):
    "A network that takes images of one size does so in the file, for any batch, and a warning says it"
    e = OneSize().eval()
    with pytest.warns(UserWarning, match='takes images of 16 x 16 px only: this network'):
        path = export_encoder(e, tmp_path/'e.pt2', 'torch.export', size=16)
    x = torch.rand(7,3,16,16)
    torch.testing.assert_close(torch.export.load(path).module()(x), e(x))

def test_onnx_that_is_wrong(tmp_path, monkeypatch):
    "A file whose features are others is not left on the disk"
    pytest.importorskip('onnxscript')
    ort = pytest.importorskip('onnxruntime')
    run = ort.InferenceSession.run
    monkeypatch.setattr(ort.InferenceSession, 'run', lambda *args: [run(*args)[0]+1e-2])
    (tmp_path/'e.onnx').write_text('old')
    with pytest.raises(ValueError, match='onnx gives other features than the encoder, 1.0e-02 apart: nothing was'):
        export_encoder(tiny_net(), tmp_path/'e.onnx', 'onnx', size=16)
    assert [(o.name,o.read_text()) for o in tmp_path.iterdir()]==[('e.onnx','old')]

def test_safetensors(tmp_path):
    "The whole file, its whitening too"
    white = Whitening(torch.zeros(16), torch.eye(16))
    path = save_encoder(small_encoder(), tmp_path/'encoder.safetensors', whitening=white, stats=([.1],[.2]))
    again = export_encoder(tmp_path, tmp_path/'again.safetensors')
    assert again.read_bytes()==path.read_bytes() and torch.equal(load_whitening(again).weight, white.weight)

@pytest.mark.parametrize('kwargs,match', [
    (dict(format='pt'), "format must be one of safetensors, .*'pt'"), (dict(size=0), 'size must be at least 1, got 0'),
    (dict(format='timm', size=32), "size is for 'onnx' and 'torch.export', got format='timm'"),
    (dict(format='safetensors', normalize=True), "normalize is for 'onnx'"),
    (dict(normalize=True), 'normalize=True needs an encoder that was trained on normalized images')])
def test_errors(tmp_path, kwargs, match):
    with pytest.raises(ValueError, match=match):
        export_encoder(small_encoder(), tmp_path/'e', **dict(format='torch.export')|kwargs)

def test_missing_libraries(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'onnx', None)
    with pytest.raises(ImportError, match='pip install onnx onnxruntime onnxscript'):
        export_encoder(small_encoder(), tmp_path/'e.onnx', 'onnx', size=16)
    assert not (tmp_path/'e.onnx').exists()

def test_command(tmp_path, command, monkeypatch):
    "`swav export RUN`: a file that opens, and every error in one line"
    e = small_encoder().eval()
    save_encoder(e, tmp_path/'encoder.safetensors', stats=([.1],[.2]), size=16)
    out = tmp_path/'e.pt2'
    code,said,err = command('export', tmp_path, '--format', 'torch.export', '-o', out, '--normalize')
    assert (code,said)==(0,f'Wrote {out}\n') and err==''
    x = torch.rand(3,1,16,40)
    torch.testing.assert_close(torch.export.load(out).module()(x), e((x-.1)/.2), atol=1e-5, rtol=1e-5)
    monkeypatch.setitem(__import__('sys').modules, 'onnxscript', None)
    for args,said in ((['-o',tmp_path/'e.onnx'], ': pip install onnx onnxruntime onnxscript'),
                      (['-o',tmp_path/'e.pt2'], '--out must be a file that ends in .onnx, for onnx, got'),
                      (['--format','tflite'], "--format must be one of safetensors, timm, torchvision, onnx, torch"),
                      (['--format','timm','--size','32'], '--size 32 is for onnx and torch.export, got --format timm'),
                      (['--format','torchvision','-o',tmp_path/'e.pth'], "torchvision's own resnet18, for 3 channels")):
        code,_,err = command('export', tmp_path, *args)
        assert code==2 and err.startswith('swav export: error: ') and said in err and err.count('\n')==1
    assert sorted(o.name for o in tmp_path.iterdir())==['e.pt2','encoder.safetensors']
