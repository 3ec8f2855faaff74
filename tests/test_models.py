"The SwAV model: what its forward computes, on which device and in which precision, and what building it leaves alone"
import inspect, pickle, random, warnings
from copy import deepcopy

import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.vision.models.xresnet import xresnet18
from torch import nn
from torch._subclasses import FakeTensorMode
from helpers import needs_pretended_gpu, rounding
from self_supervised_swav.encoders import PoolingType, create_encoder, create_fastai_encoder
from self_supervised_swav.models import Prototypes, SwAVModel, create_mlp_module, create_swav_model

def small_encoder(arch='test_resnet', **kwargs): return create_encoder(arch, pretrained=False, **kwargs)
def small_model(encoder=None, **kwargs):
    if encoder is None: encoder = small_encoder()
    return create_swav_model(encoder, **{**dict(hidden_size=32, projection_size=16, n_protos=50), **kwargs})
def crops(sizes=(48,48,32,32,32), bs=3, n_in=3): return [torch.randn(bs,n_in,s,s) for s in sizes]

def randomize_bn(model):
    "Batch-norm statistics that are not the initial ones, so that a change shows"
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(0, .1)
            m.running_var.uniform_(.5, 2)
    return model

# --- the documented examples

def test_documented_example():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # timm's note that the name is a legacy one
        encoder = create_encoder("tf_efficientnet_b0_ns", n_in=3, pretrained=False, pool_type=PoolingType.CatAvgMax)
    model = create_swav_model(encoder, hidden_size=2048, projection_size=128, n_protos=3000)
    multi_view_inputs = [torch.randn(2,3,224,224) for i in range(2)] + [torch.randn(2,3,96,96) for i in range(4)]
    with torch.no_grad(): embedding, output = model(multi_view_inputs)
    assert embedding.shape == (12,128) and output.shape == (12,3000)
    torch.testing.assert_close(model.prototypes.weight.data.norm(dim=1), torch.ones(3000))

def test_documented_fastai_example():
    fastai_encoder = create_fastai_encoder(xresnet18, n_in=1, pretrained=False)
    model = create_swav_model(fastai_encoder, hidden_size=2048, projection_size=128)
    embedding, output = model(crops((28,28,16,16,16,16,16,16), bs=2, n_in=1))
    assert embedding.shape == (16,128) and output.shape == (16,3000)

def test_signature():
    defaults = {n:p.default for n,p in inspect.signature(create_swav_model).parameters.items()}
    assert defaults.pop('encoder') is inspect._empty
    assert defaults == dict(hidden_size=256, projection_size=128, n_protos=3000, bn=True, nlayers=2)

# --- forward

def test_one_encoder_forward_per_resolution():
    model, seen = small_model(), []
    model.encoder.register_forward_hook(lambda m,i,o: seen.append(tuple(i[0].shape)))
    model(crops((48,48,32,32,32)))
    assert seen == [(6,3,48,48), (9,3,32,32)]
    seen.clear()
    model(crops((32,48,48,32)))
    assert seen == [(3,3,32,32), (6,3,48,48), (3,3,32,32)]  # order is kept: only neighbors go together
    seen.clear()
    model([torch.randn(3,3,32,48), torch.randn(3,3,48,48)])
    assert len(seen) == 2

def test_rows_are_the_crops_in_order():
    "Embedding and scores equal encoding each crop alone, by the definition"
    # in float64, where a batch of crops and one crop differ by far less than crops that are mixed up
    model, xs = randomize_bn(small_model()).double().eval(), [x.double() for x in crops((32,48,48,32))]
    embedding, output = model(xs)
    expected = torch.cat([F.normalize(model.projector(model.encoder(x)), dim=1) for x in xs])
    torch.testing.assert_close(embedding, expected)
    torch.testing.assert_close(output, expected @ model.prototypes.weight.T)
    torch.testing.assert_close(model(xs[0])[1], output[:3])  # one tensor is one crop
    torch.testing.assert_close(model(tuple(xs))[1], output)

def test_projector_sees_all_crops_at_once():
    "In training, its batch norm normalizes over the crops of every resolution together"
    model = small_model()
    seen = []
    model.projector.register_forward_hook(lambda m,i,o: seen.append(len(i[0])))
    model(crops((48,48,32,32,32)))
    assert seen == [15]

def test_gradients_reach_every_part():
    model = small_model()
    embedding, output = model(crops())
    (output*torch.randn_like(output)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(m.weight.grad.abs().sum() > 0 for m in (model.encoder.conv1[0], model.projector[0], model.prototypes))

def test_channels_last():
    model, xs = small_model().to(memory_format=torch.channels_last).eval(), crops()
    seen = []
    last = dict(memory_format=torch.channels_last)
    model.encoder.register_forward_hook(lambda m,i,o: seen.append(i[0].is_contiguous(**last)))
    out = model([x.to(**last) for x in xs])
    assert seen == [True,True]
    # another order of the sums: float32's rounding through a network of ten layers, as unit vectors and cosines
    torch.testing.assert_close(out, model(xs), rtol=0, atol=rounding(torch.float32, 10*128))

def test_pickle_and_copy():
    model, xs = small_model(small_encoder('test_vit')).eval(), crops((64,32))
    for twin in (pickle.loads(pickle.dumps(model)), deepcopy(model)): torch.testing.assert_close(twin(xs), model(xs))

def test_compiled_encoder():
    "A compiled encoder is a part as good as any other ('eager' compiles nothing, but traces everything)"
    encoder = small_encoder()
    model = small_model(torch.compile(encoder, backend='eager')).eval()
    xs = crops((32,32), bs=2)
    torch.testing.assert_close(model(xs), SwAVModel(encoder, model.projector, model.prototypes)(xs))

# --- precision and device

@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
def test_float32_under_autocast(dtype):
    "The encoder runs in `dtype`, normalization and scores in float32, as if the features were float32"
    model, xs, seen = small_model().eval(), crops(), []
    model.projector.register_forward_hook(lambda m,i,o: seen.append(o))
    with torch.autocast('cpu', dtype=dtype): embedding, output = model(xs)
    assert seen[0].dtype == dtype and embedding.dtype == output.dtype == torch.float32
    torch.testing.assert_close(embedding, F.normalize(seen[0].float(), dim=1), rtol=0, atol=0)
    # products of unit vectors
    torch.testing.assert_close(output, embedding @ model.prototypes.weight.T, rtol=0,
                               atol=rounding(torch.float32, embedding.shape[1]))
    assert not torch.is_autocast_enabled('cpu')

def test_half_precision_model():
    "A model that was cast as a whole still scores in float32"
    embedding, output = small_model().bfloat16().eval()([x.bfloat16() for x in crops()])
    assert embedding.dtype == output.dtype == torch.float32
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(15))

@pytest.mark.parametrize('arch', ('test_resnet', 'mobilenetv3_small_050', 'test_efficientnet', xresnet18))
@needs_pretended_gpu
def test_all_on_one_device_without_a_wait(arch):
    "On pretended CUDA tensors: a part on the CPU, or a value read back from the device, raises"
    with FakeTensorMode():
        torch.set_default_device('cuda')
        try:
            model = small_model(small_encoder(arch))
            embedding, output = model(crops((64,64,32,32)))
            model.prototypes.normalize_()
            assert {t.device.type for t in (embedding, output, *model.parameters(), *model.buffers())} == {'cuda'}
            assert output.shape == (12,50)
        finally: torch.set_default_device(None)

def test_meta_device():
    "A kind of device without autocast"
    model = small_model().to('meta')
    assert model([torch.empty(2,3,32,32, device='meta')])[1].shape == (2,50)

# --- prototypes

def test_prototypes_start_on_the_sphere_evenly():
    torch.manual_seed(0)
    w = Prototypes(64, 4000).weight.detach()
    torch.testing.assert_close(w.norm(dim=1), torch.ones(4000), rtol=0, atol=rounding(torch.float32, 64+4))
    cov = w.T @ w / 4000  # directions drawn evenly have covariance I/dim
    assert (64*cov - torch.eye(64)).abs().max() < .1
    assert Prototypes(8, 3).bias is None

@pytest.mark.parametrize('dtype', (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize('dim', (2,128,2048))
def test_normalize(dtype, dim):
    "Rows of any length come back, a second call changes no bit"
    protos = Prototypes(dim, 500).to(dtype)
    weight = protos.weight
    with torch.no_grad(): weight.mul_(torch.logspace(-3, 1, 500, dtype=dtype)[:,None])
    direction = F.normalize(weight.detach().double(), dim=1)
    assert protos.normalize_() is protos and protos.weight is weight and weight.requires_grad and weight.grad_fn is None
    eps = torch.finfo(dtype).eps
    assert (weight.detach().double().norm(dim=1)-1).abs().max() < 4*eps
    torch.testing.assert_close(weight.detach().double(), direction, rtol=0, atol=4*eps)
    once = weight.detach().clone()
    assert torch.equal(protos.normalize_().weight, once)

def test_a_step_off_the_sphere_is_undone():
    protos = Prototypes(16, 100)
    opt = torch.optim.SGD(protos.parameters(), lr=1e-3)
    protos(torch.randn(8,16)).square().sum().backward()
    opt.step()
    moved = protos.weight.detach().clone()
    assert (moved.norm(dim=1)-1).abs().max() > 1e-5
    torch.testing.assert_close(protos.normalize_().weight.detach(), F.normalize(moved, dim=1), rtol=0,
                               atol=rounding(torch.float32, 16+4))

def test_state_dict():
    "Rows are normalized when loaded, unit rows come back bit for bit, the dict stays as it was"
    model, twin = small_model(), small_model()
    state = deepcopy(model.state_dict())
    twin.load_state_dict(state)
    assert all(torch.equal(a,b) for a,b in zip(model.state_dict().values(), twin.state_dict().values()))
    state['prototypes.weight'] *= 3
    kept = state['prototypes.weight'].clone()
    twin.load_state_dict(state)
    torch.testing.assert_close(twin.prototypes.weight, model.prototypes.weight, rtol=0,
                               atol=rounding(torch.float32, model.prototypes.weight.shape[1]+4))
    assert torch.equal(state['prototypes.weight'], kept)
    with pytest.raises(RuntimeError, match='size mismatch'): small_model(n_protos=40).load_state_dict(state)

# --- projector

def test_projector():
    kinds = lambda m: [type(o).__name__ for o in m]
    mlp = create_mlp_module(512, 64, 16)
    assert kinds(mlp) == ['Linear', 'BatchNorm1d', 'ReLU', 'Linear']  # as in the paper's published weights
    assert [tuple(o.weight.shape) for o in mlp if isinstance(o, nn.Linear)] == [(64,512), (16,64)]
    assert kinds(create_mlp_module(512, 64, 16, bn=False, nlayers=3)) == ['Linear', 'ReLU', 'Linear', 'ReLU', 'Linear']
    assert kinds(create_mlp_module(512, 64, 16, nlayers=1)) == ['Linear']
    model = small_model(bn=False, nlayers=3)
    assert kinds(model.projector) == ['Linear', 'ReLU', 'Linear', 'ReLU', 'Linear']

# --- what building a model leaves alone

def test_encoder_is_left_as_it_was():
    encoder = randomize_bn(small_encoder())
    encoder.bn1.eval()  # a frozen layer in a network that trains
    modes, state = [m.training for m in encoder.modules()], deepcopy(encoder.state_dict())
    model = small_model(encoder)
    assert model.encoder is encoder and [m.training for m in encoder.modules()] == modes
    assert all(torch.equal(state[n], v) for n,v in encoder.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in encoder.parameters())
    model.eval()
    assert not small_model(encoder).encoder.training

def test_modes_come_back_after_a_failure():
    encoder = nn.Sequential(nn.Conv2d(3,4,3), nn.Conv2d(8,4,3))
    with pytest.raises(ValueError, match='took none of the image sizes'): create_swav_model(encoder)
    assert encoder.training and encoder[0].training

def test_random_state_is_left_as_it_was_and_decides_the_weights():
    encoder = small_encoder()
    torch.manual_seed(1); np.random.seed(1); random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = small_model(encoder)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]
    weights = lambda m: torch.cat([p.flatten() for p in (*m.projector.parameters(), *m.prototypes.parameters())])
    torch.rand(1)
    assert not torch.equal(weights(small_model(encoder)), weights(first))
    torch.manual_seed(1)
    assert torch.equal(weights(small_model(encoder)), weights(first))

# --- encoders of all kinds

@pytest.mark.parametrize('arch,kwargs,sizes,width', [
    ('resnet10t', dict(pool_type='catavgmax'), (48,32), 1024), ('test_convnext', {}, (64,32), 64),
    ('test_efficientnet', dict(n_in=1), (48,32), 256), ('mobilenetv3_small_050', {}, (64,32), 1024),
    ('test_vit', {}, (64,32), 64),
    ('vit_tiny_patch16_224', dict(depth=1, dynamic_img_size=False, img_size=96), (96,), 192),
    ('vit_tiny_patch16_224', dict(depth=1, small_images=True), (28,16), 192),
    ('mobilenetv2_035', dict(n_in=5, small_images=True), (28,16), 1280)])
def test_encoders(arch, kwargs, sizes, width):
    model = small_model(small_encoder(arch, **kwargs))
    assert model.projector[0].in_features == width and model.n_in == kwargs.get('n_in', 3)
    assert model(crops(sizes, n_in=model.n_in))[1].shape == (3*len(sizes), 50)

def test_encoders_without_convolution():
    for shape in ((3,32,32), (1,28,28)):
        model = small_model(nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 20)))
        assert model(torch.randn(4, *shape))[0].shape == (4,16) and model.n_in == shape[0]
    no_parameters = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    assert small_model(no_parameters).projector[0].in_features == 12

def test_encoder_in_half_precision():
    model = small_model(small_encoder().bfloat16())
    assert model.projector[0].weight.dtype == torch.bfloat16 and model.prototypes.weight.dtype == torch.float32
    assert model([x.bfloat16() for x in crops()])[1].dtype == torch.float32

class Wrong(nn.Module):
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x): return self.f(x)

@pytest.mark.parametrize('error,match,encoder,kwargs', [
    (TypeError, 'encoder must be a Module, got str', 'resnet18', {}),
    (ValueError, r'shape \(2,n\), got \(2, 4, 62, 62\)', nn.Conv2d(3,4,3), {}),
    (ValueError, r'shape \(2,n\), got tuple', Wrong(lambda x: (x.mean((2,3)), x)), {}),
    (ValueError, r'shape \(2,n\), got \(1, 12\)', Wrong(lambda x: torch.zeros(1,12)), {}),
    (ValueError, 'took none of the image sizes.*expected input', nn.Sequential(nn.Conv2d(3,4,3), nn.Conv2d(8,4,3)), {}),
    (ValueError, 'hidden_size must be a positive whole number, got 0', nn.Flatten(), dict(hidden_size=0)),
    (ValueError, 'projection_size must be a positive whole number, got -1', nn.Flatten(), dict(projection_size=-1)),
    (ValueError, 'n_protos must be a positive whole number, got 2.5', nn.Flatten(), dict(n_protos=2.5)),
    (ValueError, 'n_protos must be at most 1,000,000, got 2147483648', nn.Flatten(), dict(n_protos=2**31)),
    (ValueError, 'nlayers must be at most 100, got 5000', nn.Flatten(), dict(nlayers=5000)),
    (ValueError, 'nlayers must be a positive whole number, got 0', nn.Flatten(), dict(nlayers=0)),
])
def test_errors(error, match, encoder, kwargs):
    with pytest.raises(error, match=match): create_swav_model(encoder, **kwargs)

def test_forward_errors():
    model = small_model()
    with pytest.raises(ValueError, match=r"the encoder's 3 channel\(s\), got crop 1 of \(2, 1, 32, 32\)"):
        model([torch.randn(2,3,32,32), torch.randn(2,1,32,32)])
    with pytest.raises(ValueError, match='empty list'): model([])
