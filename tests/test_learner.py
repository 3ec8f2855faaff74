"One line to a Learner: what it finds out by itself, that each of it can be overridden, and what it refuses."
import inspect, warnings
from functools import partial
import pytest, torch, torchvision
from fastai.callback.progress import ProgressCallback
from fastai.optimizer import Adam, SGD
from self_supervised_swav import learner, precision
from self_supervised_swav.checkpoints import encoder_settings, save_encoder
from self_supervised_swav.data import tensor_dls
from self_supervised_swav.encoders import create_encoder
from self_supervised_swav.learner import (deepcluster_learner, moco_learner, pretrain_learner, simclr_learner,
                                          swav_learner)
from self_supervised_swav.monitor import CollapseMonitor
from self_supervised_swav.optimizer import lars
from self_supervised_swav.recipes import paper_recipe, swav_recipe
from self_supervised_swav.swav import SWAV
from helpers import digits, seed_all

small = dict(layers=(1,1,1,1), channels=(8,8,16,16))
quick = dict(n_protos=12, hidden_size=16, projection_size=8, num_crops=(2,1))
def make(n_in=1, arch='resnet18', n=60, bs=16, **kwargs):
    seed_all()
    if arch=='resnet18' and not callable(arch): kwargs['encoder'] = small|kwargs.get('encoder', {})
    learn = pretrain_learner(digits(n, n_in=n_in, bs=bs), arch, **quick|kwargs)
    learn.remove_cb(ProgressCallback).logger = lambda *_: None
    return learn

@pytest.fixture(autouse=True)
def no_warnings():
    "Settings that go together are no reason for a warning"
    with warnings.catch_warnings():
        warnings.filterwarnings('error', category=UserWarning, module='test_learner')
        yield

@pytest.mark.parametrize('n_in', [1,3])
def test_finds_channels_and_size(n_in):
    learn = make(n_in, temp=.2, lr=.01)
    assert [c.shape for c in learn.swav.cut(learn.dls.one_batch()[0])]==[(16,n_in,16,16)]*2 + [(16,n_in,10,10)]
    assert learn.swav.temp==.2 and learn.lr==.01
    assert (learn.swav.aug_pipelines[0].fs[0].aug.stats is None)==(n_in==1)
    learn.fit(1)
    assert torch.stack(learn.recorder.losses).isfinite().all()

def test_without_overrides_everything_is_the_recipes():
    seed_all()
    dls = digits(300)
    learn = swav_learner(dls, 'resnet18', encoder=small)
    r = swav_recipe(len(dls.train.dataset), 16, 16)
    for g,settings in r.items():
        for n,v in settings.items():
            assert learn.recipe[g][n]==v and learn.recipe.reasons[f'{g}.{n}']==r.reasons[f'{g}.{n}']
    assert {k: getattr(learn.swav, k) for k in r['swav']}==r['swav']
    assert learn.model.prototypes.weight.shape==(r['model']['n_protos'], 128)
    assert learn.model.projector[0].out_features==r['model']['hidden_size']
    assert [p.fs[0].aug.flags['size'] for p in learn.swav.aug_pipelines]==[16]*2  # below 24 px
    assert learn.lr==r['fit']['lr'] and hasattr(learn, 'collapse_monitor') and isinstance(learn.loss_func, object)
    learn.create_opt()
    assert learn.opt.hypers[0]['wd']==r['opt']['wd'] and learn.opt.hypers[0]['lr']==learn.lr
    assert not learn.model.encoder.layer1[0].bn2.weight.eq(0).any()   # zero_init_last=False

@pytest.mark.parametrize('fit', ['fit','fit_one_cycle','fit_flat_cos','fit_warmup_cos'])
def test_every_fit_starts_from_the_recipes_rate(fit):
    learn = make(lr=7e-4)
    getattr(learn, fit)(1)
    assert max(learn.recorder.lrs)<=7e-4*1.001 and max(learn.recorder.lrs)>=5e-4

def test_names_and_dicts_are_the_same():
    flat = make(eps=.04, nlayers=3, flip_p=0., jitter=False, wd=.3, pool_type='max')
    dicts = make(callback=dict(eps=.04), model=dict(nlayers=3), augs=dict(flip_p=0., jitter=False), wd=.3,
                 encoder=dict(pool_type='max'))
    assert flat.recipe==dicts.recipe and flat.recipe['swav']['eps']==flat.swav.eps==.04
    assert flat.recipe.reasons['augs.flip_p']=='given' and str(flat.model)==str(dicts.model)
    assert flat.wd==.3 and sum(isinstance(m, torch.nn.Linear) for m in flat.model.projector)==3

def test_every_setting_is_known_by_one_name():
    names = [n for ns in learner.setting_groups('swav').values() for n in ns]
    assert len(names)==len(set(names))
    assert {'n_protos','eps','K','crop_sizes','blur','flip_p','small_images','pretrained','lr','opt_func'}<=set(names)
    assert set(names)<=set(inspect.signature(swav_learner).parameters)

@pytest.mark.parametrize('wrong,close', [
    ('n_proto','n_protos'),('crop_size','crop_sizes'),('epsilon',''),('ndclasses','n_classes'),
    ('freeze_pct','freeze_protos_pct')])
def test_unknown_names_are_errors_that_know_the_right_one(wrong, close):
    with pytest.raises(TypeError, match=f"no setting '{wrong}'.*{close}"): make(**{wrong: 1})

def test_wrong_name_in_a_group_is_an_error():
    with pytest.raises(TypeError, match='n_protoss'): make(model=dict(n_protoss=3))

def test_classes_make_prototypes_and_prototypes_a_queue():
    quiet = {k:v for k,v in quick.items() if k!='n_protos'}
    seed_all()
    learn = swav_learner(digits(400, bs=32), 'resnet18', encoder=small, n_classes=5, **quiet)
    assert learn.recipe['model']['n_protos']==50
    r = swav_learner(digits(1000, bs=16), 'resnet18', encoder=small, **quiet, n_protos=100).recipe
    assert r['swav']['K']==128 and '100 prototypes' in r.reasons['swav.K']

def test_own_callbacks_and_monitor():
    m = CollapseMonitor(stop=True)
    assert make(cbs=m).collapse_monitor is m
    for cbs in ([CollapseMonitor],[m]):
        assert [type(c) for c in make(cbs=cbs).cbs if isinstance(c, (SWAV,CollapseMonitor))]==[SWAV,CollapseMonitor]

def test_optimizers():
    learn = make(opt_func=partial(SGD, mom=.8))
    learn.create_opt()
    assert learn.recipe['opt']=={} and 'lr' not in learn.recipe['fit']
    # its own, not those of the recipe for Adam
    assert learn.lr==1e-3 and learn.opt.hypers[0]['mom']==.8 and learn.opt.hypers[0]['wd']==0.
    learn = make(opt_func=SGD, lr=.3, wd=.2)
    assert learn.lr==learn.recipe['fit']['lr']==.3 and learn.wd==learn.recipe['opt']['wd']==.2
    assert learn.recipe.reasons['opt.wd']=='given'
    learn = make(moms=(.9,.8,.9))
    assert learn.moms==(.9,.8,.9) and learn.opt_func.func is Adam

def test_paper_recipe():
    r = paper_recipe(256, n_epochs=20)
    learn = make(recipe=r, opt_func=lars, K=None, small_images=True, crop_sizes=(16,10), min_scales=(.5,.3),
                 max_scales=(1.,.5))
    learn.create_opt()
    assert learn.opt.hypers[0]['wd']==1e-6 and learn.opt.hypers[0]['mom']==.9
    assert learn.lr==.6 and learn.swav.queue_start_pct==.75
    assert learn.recipe['fit']==r['fit'] and r['model']['n_protos']==3000
    learn.fit_warmup_cos(1, lr=.01)

@pytest.mark.parametrize('method,opt,fit', [
    ('simclr',lars,'fit_warmup_cos'), ('mocov1',SGD,'fit_steps'), ('mocov2',SGD,'fit_warmup_cos'),
    ('deepclusterv2',lars,'fit_warmup_cos')])
def test_paper_recipe_of_every_method(method, opt, fit):
    r = paper_recipe(method)
    n_sizes = len(r['augs']['crop_sizes'])
    small_ones = dict(crop_sizes=(16,10)[:n_sizes], min_scales=(.5,.3)[:n_sizes], max_scales=(1.,.5)[:n_sizes])
    if 'moco' in method: small_ones |= dict(K=32, blur=False)
    if method=='deepclusterv2': small_ones['n_protos'] = 5
    seed_all()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = pretrain_learner(digits(60), 'resnet18', method, encoder=small, recipe=r, opt_func=opt, bf16=False,
                                 small_images=True, hidden_size=16, projection_size=8, **small_ones)
    assert learn.lr==r['fit']['lr'] and learn.wd_bn_bias==('moco' in method)
    with learn.no_bar(), learn.no_logging(): getattr(learn, fit)(**r['fit']|dict(n_epoch=10), start_epoch=9)
    # what the optimizer is told: momentum and decay inside the gradient, as in the papers' code
    assert learn.opt.hypers[0]['wd']==r['opt']['wd'] and learn.opt.hypers[0]['mom']==.9
    assert torch.stack(learn.recorder.losses).isfinite().all()

def test_recipe_of_another_method_is_refused():
    with pytest.raises(ValueError, match='recipe must be one of mocov1, got one of mocov2'):
        moco_learner(digits(60), 'resnet18', version=1, recipe=paper_recipe('mocov2'))

@pytest.mark.parametrize('function,method,given', [
    (simclr_learner,'simclr',dict(temp=.3)), (moco_learner,'mocov2',dict(m=.5)),
    (partial(moco_learner, version=1),'mocov1',dict(m=.5)),
    (deepcluster_learner,'deepclusterv2',dict(n_kmeans_iter=3))])
def test_every_method_has_a_learner(function, method, given):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        a = function(digits(60), 'resnet18', encoder=small, **given)
        b = pretrain_learner(digits(60), 'resnet18', method, encoder=small, callback=given)
    group = method.removesuffix('v2').removesuffix('v1')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        c = function(digits(60), 'resnet18', encoder=small, **{group: given})
    assert str(a.recipe)==str(b.recipe)==str(c.recipe) and a.recipe[method].items()>=given.items()
    known = [n for ns in learner.setting_groups(method).values() for n in ns]
    assert {*known,group}<=set(inspect.signature(function).parameters)
    with pytest.raises(TypeError, match=f"{group}_learner has no setting 'tempp': did you mean 'temp'"):
        function(digits(60), 'resnet18', tempp=1)

def test_recipe_of_another_run_is_taken_whole():
    r = swav_recipe(10_000, 256, 28, n_classes=2).override(swav=dict(eps=.07))
    learn = make(recipe=r, crop_sizes=(16,10))
    assert learn.swav.eps==.07 and learn.lr==r['fit']['lr']==4e-3
    assert learn.recipe['model']['n_protos']==12 and r['model']['n_protos']==20

@pytest.mark.parametrize('arch,sizes', [
    ('vit_tiny_patch16_224',(16,8)), (torchvision.models.resnet18,(16,10)), ('xresnet18',(16,10)),
    ('convnext_atto',(16,10))])
def test_architectures_get_crops_and_arguments_that_they_take(arch, sizes):
    learn = make(arch=arch)
    assert learn.recipe['augs']['crop_sizes']==sizes
    learn._split(learn.dls.one_batch())
    assert learn.model.eval()([c[:2] for c in learn.swav.cut(learn.dls.one_batch()[0])])[1].shape==(6,12)
    assert 'zero_init_last' not in learn.recipe['encoder'] and 'encoder.zero_init_last' not in learn.recipe.reasons

def test_arguments_that_were_given_are_never_dropped():
    with pytest.raises(TypeError, match='zero_init_last'): make(arch='convnext_atto', encoder=dict(zero_init_last=True))
    with pytest.raises(ValueError, match='small_images'): make(arch='vgg11', small_images=True, crop_sizes=(64,32))

def test_takes_an_encoder():
    enc = create_encoder('resnet18', n_in=1, pretrained=False, small_images=True, **small)
    learn = make(arch=enc)
    assert learn.model.encoder is enc and learn.recipe['encoder']=={}
    learn.fit(1)

@pytest.mark.parametrize('kwargs,text', [
    (dict(K=48), 'K must be smaller than the training set of 48 images, got 48'),
    (dict(arch='vit_tiny_patch16_224', crop_sizes=(16,10)), 'crop_sizes must be sizes that the encoder takes, got 10'),
    (dict(eps=0), 'eps must be positive, got 0'), (dict(n_protos=0), 'n_protos must be'),
    (dict(n_classes=0), 'n_classes must be'), (dict(method='dino'), "method must be one of 'swav'.*got 'dino'")])
def test_refuses_what_cannot_work(kwargs, text):
    with pytest.raises(ValueError, match=text): make(**kwargs)

def test_refuses_what_does_not_belong_together():
    enc = create_encoder('resnet18', n_in=1, pretrained=False, small_images=True, **small)
    with pytest.raises(ValueError, match='n_classes is for swav_recipe'): make(recipe=paper_recipe(256), n_classes=3)
    with pytest.raises(ValueError, match='need the name of an architecture.*pretrained'):
        make(arch=enc, pretrained=True)
    with pytest.raises(ValueError, match="images must have the encoder's 1 channels, got 3"): make(n_in=3, arch=enc)

def test_refuses_a_batch_larger_than_the_data():
    dls = digits(60)
    dls.train.bs = 64
    with pytest.raises(ValueError, match='dls must have batches.*bs=64 and 48 training images'):
        swav_learner(dls, 'resnet18', encoder=small)

@pytest.mark.parametrize('kwargs,text', [
    (dict(K=16), 'K=16 is more than a quarter of the 48 training images'),
    (dict(n_protos=500, K=None), r'n_protos=500 is far more than the 16 rows.*ln\(500\)'),
    (dict(small_images=False),
     r"crop_sizes=\(16, 10\) has crops smaller than the encoder's stride of 32 px.*small_images=True"),
    (dict(crop_sizes=(20,6)), 'stride of 8 px.*Try crops of 8 px'),
    (dict(crop_sizes=(64,10)), 'more than twice the 16 px of the images')])
def test_warns_of_what_disappoints(kwargs, text):
    with pytest.warns(UserWarning, match=text) as caught: make(**kwargs)
    assert caught[0].filename.endswith(('test_learner.py','learner.py'))

def test_model_and_random_state_are_left_alone_by_looking():
    enc = create_encoder('resnet18', n_in=1, pretrained=False, small_images=True, **small)
    before,state = {k: v.clone() for k,v in enc.state_dict().items()},torch.get_rng_state()
    assert learner._stride_at(enc, 16, 1)==8 and enc.training and not any(m._forward_hooks for m in enc.modules())
    assert all(v.equal(before[k]) for k,v in enc.state_dict().items()) and torch.get_rng_state().equal(state)

@pytest.mark.parametrize('fast', [False,True])
@pytest.mark.parametrize('bf16', [None,False,True])
def test_bf16_where_it_is_fast_unless_told(fast, bf16, monkeypatch):
    for m in (learner, precision): monkeypatch.setattr(m, 'is_fast', lambda *_: fast)
    on = fast if bf16 is None else bf16
    learn = make(bf16=bf16)
    assert hasattr(learn, 'mixed_precision')==on
    dtypes = set()
    learn.model.encoder.register_forward_hook(lambda m, x, y: dtypes.add(y.dtype) if m.training else None)
    learn.fit(1)
    assert dtypes=={torch.bfloat16 if on else torch.float32}
    assert torch.stack(learn.recorder.losses).isfinite().all()

def test_features_are_meant_for_whole_images(tmp_path):
    "The recipe's crops are smaller than the images, which the file remembers; larger crops of one's own count"
    dls = tensor_dls(torch.rand(6300, 1, 28, 28), bs=64, device='cpu')
    for given,size in (({}, 28), (dict(crop_sizes=(16,10)), 28), (dict(crop_sizes=(32,16)), 32)):
        learn = swav_learner(dls, 'resnet18', encoder=small, n_protos=12, **given)
        assert learn.recipe['augs']['crop_sizes']==given.get('crop_sizes', (20,14))
        assert encoder_settings(save_encoder(learn, tmp_path/'e.safetensors'))['size']==size

@pytest.mark.parametrize('arch,given,sizes,features', [
    ('resnet18', {}, (24,15), 64), ('vit_tiny_patch16_224', {}, (24,16), 64),  # strides of 8 and 4 px
    ('resnet18', dict(small_images=False), (64,40), None), ('vgg11', {}, (64,40), None),  # strides of 32 px
    ('resnet18', dict(small_images=False, crop_sizes=(24,16)), (24,16), 64)])
def test_smaller_crops_of_images_of_64_px_only_where_the_encoder_sees_them(arch, given, sizes, features):
    x = torch.randint(0, 255, (40,3,64,64), dtype=torch.uint8)
    dls = tensor_dls(x, torch.zeros(40, dtype=torch.long), ['a'], bs=8, device='cpu')
    with warnings.catch_warnings():
        if 'crop_sizes' in given: warnings.simplefilter('ignore')  # that it disappoints
        learn = swav_learner(dls, arch, n_protos=8, **given)
    r = learn.recipe
    assert r['augs']['crop_sizes']==sizes and r['augs']['num_crops']==(2,0)
    assert r.get('features', {}).get('size')==features
    assert [tuple(o.shape[-2:]) for o in learn.swav.cut(learn.dls.one_batch()[0])]==[(sizes[0],)*2]*2
