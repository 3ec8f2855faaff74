"Encoders in other tools give the same features"
import pytest, timm, torch
from PIL import Image
from fastai.interpret import Interpretation
from fastai.learner import load_learner
from fastai.vision.core import PILImageBW
from fastai.vision.data import ImageDataLoaders
from fastai.vision.learner import vision_learner

from helpers import digits, small_encoder
from self_supervised_swav.checkpoints import save_encoder
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.export import encoder_arch, export_encoder

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
    with pytest.raises(ValueError, match='its own stem'): export_encoder(small_encoder(), tmp_path/'s.pth', 'timm')
    with pytest.raises(ValueError, match="format must be one of .*'pt'"): export_encoder(e, tmp_path/'s.pth', 'pt')

@pytest.mark.parametrize('normalize', (False,True))
def test_onnx(tmp_path, normalize):
    ort = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    e = create_encoder('resnet18', **small).eval()
    save_encoder(e, tmp_path/'e.safetensors', stats=([.1,.2,.3],[.5,.6,.7]), size=32)
    path = export_encoder(tmp_path/'e.safetensors', tmp_path/'e.onnx', 'onnx', normalize=normalize)
    x = torch.rand(5,3,32,32)
    got = torch.from_numpy(ort.InferenceSession(path.read_bytes()).run(None, {'images': x.numpy()})[0])
    mean,std = (torch.tensor(o).view(1,3,1,1) for o in ((.1,.2,.3),(.5,.6,.7)))
    torch.testing.assert_close(got, e((x-mean)/std if normalize else x), atol=1e-4, rtol=1e-4)

def test_missing_libraries(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'onnx', None)
    with pytest.raises(ImportError, match='pip install onnx onnxruntime onnxscript'):
        export_encoder(small_encoder(), tmp_path/'e.onnx', 'onnx', size=16)
    assert not (tmp_path/'e.onnx').exists()
