"The augmentation against torchvision, Pillow and kornia, on the same images"
import copy, math, pickle, random

import kornia.augmentation as K
import numpy as np, pytest, torch, torch.nn.functional as F
import torchvision.transforms as T, torchvision.transforms.functional as TF
from fastai.torch_core import TensorCategory, TensorImage, TensorImageBW, set_seed
from fastai.vision.augment import Normalize
from fastai.vision.core import imagenet_stats
from fasttransform import Pipeline, Transform
from hypothesis import strategies as st
from kornia.enhance import adjust_gamma
from PIL import Image
from sklearn.datasets import load_sample_images

from fuzz import fuzz
from helpers import NoWait, needs_pretended_gpu, rounding
from self_supervised_swav.augment import (BatchAugment, ExactAugment, MultiCrop, get_batch_augs,
                                          get_multi_aug_pipelines,
                                          get_swav_aug_pipelines)
from self_supervised_swav.fused import FusedAugment, color_matrices, hue_matrix

n_draws = 2000
off = dict(flip_p=0., jitter_p=0., bw_p=0., blur_p=0.)

@pytest.fixture(scope='module')
def photos():
    "Two photographs of 3x256x384 in [0,1]"
    x = torch.stack([TF.to_tensor(o) for o in load_sample_images().images])
    return F.interpolate(x, (256,384), mode='bilinear', antialias=True)

@pytest.fixture(scope='module')
def tiny(photos): return F.interpolate(photos, (24,36), mode='bilinear', antialias=True)

def resize_rounding(n, taps=24):
    """How far two resizes in float32 of images in [0,1] can be apart, where positions are numbers up to `n`.

    A tap's position is rounded three times, to within e. The triangle has the slope 1/width over 2*width taps, so the
    weights of a pixel change by 2*e in all, and by as much again when they are divided by their sum: 4*e along each
    axis, and two results differ by twice that. Then come the sums over `taps` of each axis and of each axis' blur."""
    e = rounding(torch.float32, 3, n)/2
    return 2*2*4*e + rounding(torch.float32, 4*taps)

def draws(*shape, n=n_draws, **kw):
    set_seed(0)
    return FusedAugment(kw.pop('size', 32), **kw).draw((n, 3, *shape))

def same_distribution(a, b, what, shift=0., n=None):
    """Mean within 5 standard errors, quantiles 5..95 % within 5 standard errors of their rank (a Kolmogorov-Smirnov
    bound), plus `shift`.

    Five standard errors of two samples: a right program fails once in two million comparisons."""
    a,b = (np.sort(np.asarray(o, dtype=np.float64)) for o in (a,b))
    n = n or min(len(a), len(b))
    se = math.sqrt((a.var()+b.var())/n)
    said = f'{what}: means {a.mean():.5f} and {b.mean():.5f}, standard error {se:.5f}'
    assert abs(a.mean()-b.mean()) <= 5*se + shift + 1e-9, said
    for q in (.05,.25,.5,.75,.95):
        d = 5*math.sqrt(2*q*(1-q)/n)
        lo,hi = np.quantile(b, [max(q-d, 0), min(q+d, 1)])
        assert lo-shift-1e-9 <= np.quantile(a,
            q) <= hi+shift+1e-9, f'{what}: quantile {q} is {np.quantile(a, q):.5f}, not in [{lo:.5f}, {hi:.5f}]'

# -- each operation has torchvision's distribution

@pytest.mark.parametrize('shape,scale', [((256,320),(.05,.14)), ((256,320),(.25,1.)), ((60,200),(.3,1.)),
                                         ((200,50),(.5,1.)), ((8,6),(1.,1.)), ((28,28),(.05,.3))])
def test_crop_box(shape, scale):
    "Area, aspect ratio, place and size of the box, the fallback included"
    ours = draws(*shape, scale=scale)['box'].double()
    torch.manual_seed(1)
    x = torch.empty(1, *shape)
    theirs = torch.tensor([T.RandomResizedCrop.get_params(x, list(scale), [3/4,4/3]) for _ in range(n_draws)]).double()
    for name,f in dict(top=lambda b: b[:,0], left=lambda b: b[:,1], height=lambda b: b[:,2], width=lambda b: b[:,3],
                       area=lambda b: b[:,2]*b[:,3], aspect=lambda b: b[:,3]/b[:,2]).items():
        same_distribution(f(ours), f(theirs), name)
    t,l,h,w = ours.unbind(1)
    assert (t>=0).all() and (l>=0).all() and (t+h<=shape[0]).all() and (l+w<=shape[1]).all() and (h>0).all()
    assert (w>0).all()

def test_rates():
    p = draws(32, 32, rotate_p=.3)
    for name,got,want in (('flip',p['flip'],.5), ('bw',p['bw'],.2), ('blur',p['sigma']>0,.5),
                          ('jitter',p['factors'][:,0]!=1,.8), ('rotate',p['angle']!=0,.3)):
        assert abs(got.double().mean()-want) <= 5*math.sqrt(want*(1-want)/n_draws), name
    # independent of each other: no correlation beyond chance
    flags = torch.stack([p['flip'], p['bw'], p['sigma']>0, p['factors'][:,0]!=1, p['angle']!=0]).double()
    assert (torch.corrcoef(flags) - torch.eye(5)).abs().max() < 5/math.sqrt(n_draws)

def test_factors():
    p = draws(32, 32, jitter_p=1., blur_p=1.)
    jitter = T.ColorJitter(.8,.8,.8,.2)
    torch.manual_seed(1)
    theirs = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
              for _ in range(n_draws)]
    for i in range(4): same_distribution(p['factors'][:,i], [o[i+1] for o in theirs], 'factor')
    for k in range(4): # where each operation stands in the order is uniform
        counts = torch.bincount((p['order']==k).int().argmax(1), minlength=4)
        assert (counts-n_draws/4).abs().max() <= 5*math.sqrt(n_draws*3/16)
    assert (p['order'].sort(1).values==torch.arange(4)).all()
    same_distribution(p['sigma'], [T.GaussianBlur.get_params(.1, 2.) for _ in range(n_draws)], 'sigma')

def summary(y):
    "Numbers that each operation moves: brightness, contrast, colorfulness, hue balance, sharpness"
    return dict(mean=y.mean((1,2,3)), std=y.mean(1).std((1,2)), color=(y.amax(1)-y.amin(1)).mean((1,2)),
                red=(y[:,0]-y[:,2]).mean((1,2)),
                edges=(y[...,1:]-y[...,:-1]).abs().mean((1,2,3)))

jitters = dict(brightness=(.8,0,0,0), contrast=(0,.8,0,0), saturation=(0,0,.8,0))

@pytest.mark.parametrize('op', [*jitters, 'gray', 'blur', 'gamma'])
def test_effect(op, photos):
    "The pictures have torchvision's distribution of brightness, contrast, colorfulness and sharpness"
    x = F.interpolate(photos[:1,:,:,:256], (32,32), mode='bilinear', antialias=True)
    kw = dict(off, scale=(1.,1.), ratio=(1.,1.))
    if op in jitters:
        ours = FusedAugment(32, **kw|dict(jitter_p=.8, jitter=jitters[op]))
        theirs = T.RandomApply([T.ColorJitter(*jitters[op])], p=.8)
    if op=='gray': ours,theirs = FusedAugment(32, **kw|dict(bw_p=.2)),T.RandomGrayscale(.2)
    if op=='blur':
        ours,theirs = FusedAugment(32, **kw|dict(blur_p=.5)),T.RandomApply([T.GaussianBlur(23, (.1,2.))], p=.5)
    if op=='gamma':
        ours = FusedAugment(32, **kw, gamma_p=.8, gamma_range=(.4,2.5))
        theirs = T.RandomApply([lambda x: TF.adjust_gamma(x, random.uniform(.4, 2.5))], p=.8)
    set_seed(0)
    a = summary(ours(x.expand(n_draws,-1,-1,-1)))
    b = summary(torch.cat([theirs(x) for _ in range(n_draws)]))
    for k in a: same_distribution(a[k], b[k], f'{op}: {k}', shift=2e-4) # torchvision's luma weights sum to 0.9999

@pytest.mark.parametrize('exact', [False,True])
def test_hue_distribution(exact, photos):
    """Hue alone: kornia's is torchvision's. The fused turn keeps the mean of the channels where HSV keeps the largest
    and the range: these numbers and their quantiles differ by at most 0.015 on the temple, whose colors are faint, and
    by 0.045 (11 of 255 levels, in the contrast) on the flower, whose are strong"""
    aug = (ExactAugment if exact else FusedAugment)(32, **off|dict(scale=(1.,1.), ratio=(1.,1.), jitter_p=.8,
                                                                   jitter=(0,0,0,.2)))
    theirs = T.RandomApply([T.ColorJitter(hue=.2)], p=.8)
    for x,shift in zip(F.interpolate(photos[...,:256], (32,32), mode='bilinear', antialias=True), (.015,.045)):
        set_seed(0)
        a = summary(torch.cat([aug(x.expand(n_draws//20,-1,-1,-1)) for _ in range(20)]))
        b = summary(torch.stack([theirs(x) for _ in range(n_draws)]))
        for k in a: same_distribution(a[k], b[k], f'hue: {k}', shift=2e-4 if exact else shift)

def chain(x, size, scale, **kw): return T.Compose([
    T.RandomResizedCrop(size, scale, antialias=True), T.RandomHorizontalFlip(),
    T.RandomApply([T.ColorJitter(.8,.8,.8,.2)], p=.8),
    T.RandomGrayscale(.2), T.RandomApply([T.GaussianBlur(23, (.1,2.))], p=.5)])(x)

@pytest.fixture(scope='module')
def everything_of_torchvision(tiny):
    set_seed(0)
    return summary(torch.cat([chain(tiny[:1], 32, (.25,1.)) for _ in range(n_draws)]))

@pytest.mark.parametrize('exact', [False,True])
def test_everything(exact, tiny, everything_of_torchvision):
    """All operations together. The fused form may differ by 0.02 in these means and quantiles (5 of 255 levels): it
    clamps once and at the end, turns hues about the gray axis instead of in HSV space. kornia's own differs as well: it
    interpolates without antialiasing (these crops grow, so that does not show)."""
    x = tiny[:1]
    set_seed(0)
    aug = (ExactAugment if exact else FusedAugment)(32, scale=(.25,1.))
    # one order of the color operations a call in kornia: several calls
    a = summary(torch.cat([aug(x.expand(n_draws//20,-1,-1,-1)) for _ in range(20)]))
    for k in a: same_distribution(a[k], everything_of_torchvision[k], k, shift=.02)

def test_single_color_operations(photos):
    "With one operation, the fused colors are torchvision's, hue aside"
    def fused(x, f, bw=False):
        A,D = color_matrices(torch.tensor([f], dtype=torch.float64), torch.tensor([[0,1,2,3]]), torch.tensor([bw]), 3)
        return (torch.einsum('ij,jhw->ihw', A[0].float(), x) + (D[0].float()@x.mean((1,2)))[:,None,None]).clamp(0,1)
    # torchvision's weight of red is .2989, ours .299; the mean of a photograph sums all of its pixels
    luma = 1e-4 + rounding(torch.float32, photos[0,0].numel()**.5)
    for x in photos:
        for f in (.2,.7,1.3,1.8):
            for i,op in enumerate((TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)):
                assert (fused(x, [f if k==i else 1 for k in range(3)]+[0]) - op(x, f)).abs().max() < luma
        assert (fused(x, (1,1,1,0), True) - TF.rgb_to_grayscale(x, 3)).abs().max() < luma
        for h in (-.2,-.1,.1,.2): # measured: at most 0.047 apart on average where the operation moves a pixel by 0.11
            ours,theirs = fused(x, (1,1,1,h))-x,TF.adjust_hue(x, h)-x
            assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > .8
            assert (ours-theirs).abs().mean() < .05

def test_hue_is_the_best_linear_map():
    "Over colors spread evenly, the least-squares fit to HSV hue shifts is the rotation, its gain within 10 %"
    torch.manual_seed(0)
    x = torch.rand(3, 400, 400)
    for h in (-.2,.05,.1,.2):
        P,Q = x.flatten(1).double()-.5,TF.adjust_hue(x, h).flatten(1).double()-.5
        assert (Q@P.T@torch.linalg.inv(P@P.T) - hue_matrix(torch.tensor([h], dtype=torch.float64))[0]).abs().max() < .1

def test_hue_thirds():
    "A third of a turn permutes the channels, as in HSV"
    assert torch.allclose(hue_matrix(torch.tensor([1/3]))[0], torch.eye(3).roll(1, 0), rtol=0,
                          atol=rounding(torch.float32, 8, 2*math.pi))  # of an angle up to a full turn

# -- pixels

def reference(x, p, r, size):
    (t,l,h,w),s,radius = p['box'][r].tolist(),float(p['sigma'][r]),min(8, size-1)
    y = x[r%len(x)][:,t:t+h,l:l+w]
    if p['flip'][r]: y = y.flip(-1)
    y = F.interpolate(y[None], (size,size), mode='bilinear', antialias=True)
    return (TF.gaussian_blur(y, 2*radius+1, [s,s]) if s>0 and radius>0 else y)[0]

@pytest.mark.parametrize('size', [1,3,17,96,113,224])
def test_crop_flip_blur(size, photos):
    "The matrix products are torch's antialiased resize and torchvision's blur, up to their rounding"
    set_seed(0)
    aug = FusedAugment(size, jitter_p=0., bw_p=0.)
    p = aug.draw(photos.shape, 4)
    y = aug(photos, params=p)
    for r in range(8): assert (y[r]-reference(photos, p, r, size)).abs().max() < resize_rounding(384)

@pytest.mark.parametrize('size,scale', [(224,(.25,1.)), (96,(.05,.14)), (31,(.05,.14))])
def test_device_path(size, scale, photos):
    "What a GPU computes, all images at once from a window that holds any box, is what a processor computes"
    set_seed(0)
    aug = FusedAugment(size, scale)
    table = aug._table(aug.draw(photos.shape, 3), 3)
    each,batch = (torch.cat([o.clone() for o in f(photos, table)]) for f in (aug._cut_boxes, aug._cut_windows))
    assert (each-batch).abs().max() < resize_rounding(384)
    # all crops at once, or those of one view after the other
    aug.max_window_pixels = 1
    views = list(aug._cut_windows(photos, table))
    assert [len(o) for o in views]==[len(photos)]*3
    assert (torch.cat(views)-batch).abs().max() < resize_rounding(384)

def test_antialias():
    """Crops of large photographs against Pillow: below 1.5 levels of 255 at worst (Pillow rounds twice), 0.5 on
    average; without antialiasing ten times that"""
    images = [Image.fromarray(o) for o in load_sample_images().images]
    x = torch.stack([TF.to_tensor(o) for o in images])
    set_seed(0)
    aug = FusedAugment(64, (.5,1.), **off)
    y = aug(x)
    for im,got,xi,(t,l,h,w) in zip(images, y, x, aug._params['box'].tolist()):
        want = TF.to_tensor(im.crop((l, t, l+w, t+h)).resize((64,64), Image.BILINEAR))
        err = (got-want).abs()*255
        assert err.max()<1.5 and err.mean()<.5
        plain = F.interpolate(xi[None,:,t:t+h,l:l+w], (64,64), mode='bilinear')[0]
        assert (plain-want).abs().mean()*255 > 10*err.mean()

def test_rotation(photos):
    "A rotated crop is kornia's rotation of the crop"
    set_seed(0)
    aug = FusedAugment(64, rotate_p=.6, **off)
    p = aug.draw(photos.shape, 8)
    plain = aug(photos, params=dict(p, angle=torch.zeros(16)))
    turned = K.RandomRotation(30., p=1., align_corners=False)(plain,
        params=dict(degrees=p['angle'].float(), batch_prob=torch.ones(16)))
    # positions up to 64, after some 16 roundings each way, in images that change by at most 1 a pixel along two axes
    assert (aug(photos, params=p)-turned).abs().max() < 2*rounding(torch.float32, 16, 64)
    assert (p['angle']!=0).any() and (p['angle']==0).any()

def test_normalized(photos):
    set_seed(0)
    p = FusedAugment(48).draw(photos.shape, 4)
    mean,std = (.5,.4,.3),(.2,.3,.4)
    # three products of at most 1.8 each (brightness, contrast, saturation) of a color over std, and their sums
    bound = rounding(torch.float32, 12, 1.8**3/.2)
    raw,norm = FusedAugment(48)(photos, params=p),FusedAugment(48, stats=(mean,std))(photos, params=p)
    assert raw.min()>=0 and raw.max()<=1
    assert (norm - (raw-torch.tensor(mean)[:,None,None])/torch.tensor(std)[:,None,None]).abs().max() < bound

# -- random parameters

def test_own_parameters(photos):
    x = photos[:1].expand(8,-1,-1,-1)
    set_seed(0)
    for same in (False,True):
        for aug in (FusedAugment(32, same_on_batch=same), ExactAugment(32, same_on_batch=same)):
            a,b = aug.sample(x, 2)
            assert torch.allclose(a, a[:1].expand_as(a), rtol=0, atol=rounding(torch.float32, 64, 1.8**3))==same
            assert not torch.allclose(a, b) # another view has other parameters
            assert len({tuple(o.flatten()[:50].tolist())
                        for o in a})==(1 if same else 8) or isinstance(aug, ExactAugment)

def test_seed_and_replay(photos):
    aug = FusedAugment(48, rotate_p=.3)
    set_seed(3); a = aug.sample(photos, 3)
    params = aug._params
    set_seed(3); b = aug.sample(photos, 3)
    assert all(torch.equal(o,p) for o,p in zip(a,b))
    assert torch.equal(aug(photos, params=params), torch.cat(a))
    assert not torch.equal(aug(photos), a[0])

@pytest.mark.parametrize('public', [False,True])
def test_memory_is_written_again_when_nobody_holds_it(photos, public, monkeypatch):
    "Held tensors are never overwritten, also where torch does not count who holds a storage"
    if public: monkeypatch.delattr(torch._C, '_storage_Use_Count', raising=False)
    aug = FusedAugment(64)
    def places(crops): return {o.untyped_storage().data_ptr() for o in crops}
    first = aug.sample(photos, 2)
    kept,place = [o.clone() for o in first],places(first)
    assert not places(aug.sample(photos, 2)) & place
    assert all(torch.equal(o,p) for o,p in zip(first, kept))
    for hold in (lambda c: c[1][0,0,3:5], lambda c: c[0].numpy(),
                 lambda c: (c[0]*torch.ones(1, requires_grad=True)).sum(), lambda c: c[0].untyped_storage()):
        crops = aug.sample(photos, 2)
        held,place = hold(crops),places(crops)
        del crops
        assert not places(aug.sample(photos, 2)) & place
        del held
    place = places(aug.sample(photos, 2))
    assert places(aug.sample(photos, 2))==place
    with torch.inference_mode(): aug.sample(photos, 2)
    # tensors of inference mode cannot be saved for that
    (aug.sample(photos, 2)[0]*torch.ones(1, requires_grad=True)).sum().backward()
    for other in (pickle.loads(pickle.dumps(aug)), copy.deepcopy(aug)): assert other.memory.last is None

def test_switches_keep_boxes(photos):
    "The same seed cuts the same boxes whatever else is on"
    set_seed(0); a = FusedAugment(32).draw(photos.shape, 5)
    set_seed(0); b = FusedAugment(32, **off).draw(photos.shape, 5)
    assert torch.equal(a['box'], b['box'])

@pytest.mark.parametrize('c', [1,3,5])
def test_gamma(c, photos):
    "It comes before colors and normalization, with each crop's own power; black and white stay"
    x = torch.cat([photos]*2, 1)[:,:c]
    kw = dict(rotate_p=.5) | (dict(jitter_p=0., bw_p=0.) if c==5 else {})
    aug = FusedAugment(40, **kw, gamma_p=.8)
    set_seed(0)
    p = aug.draw(x.shape, 3)
    assert (p['gamma']!=1).any() and ((.4<=p['gamma']) & (p['gamma']<=2.5)).all()
    cut = FusedAugment(40, **kw | dict(jitter_p=0., bw_p=0.))(x, params={k: v for k,v in p.items() if k!='gamma'} |
                                                               dict(gamma=torch.ones(6)))
    want = torch.empty(6, c, 40, 40)
    table = aug._table(p, c)
    aug._paint(adjust_gamma(cut, p['gamma'].float()), table[:,8:], want)
    # a power, and a product with colors whose factors reach 1.8**3
    assert torch.allclose(aug(x, params=p), want, rtol=0, atol=rounding(torch.float32, 8, 1.8**3))
    ends = torch.cat([torch.zeros(2, c, 30, 30), torch.ones(2, c, 30, 30)])
    y = FusedAugment(16, **kw | dict(rotate_p=0., jitter_p=0., bw_p=0.), gamma_p=1.)(ends)
    assert (y[:2]==0).all() and torch.allclose(y[2:], torch.ones(()), rtol=0, atol=resize_rounding(30))

def test_crops_without_gamma_are_as_before(photos):
    "No number of the generator is spent on it"
    set_seed(0); a = [FusedAugment(16).sample(photos, 2) for _ in range(2)]
    set_seed(0); b = [FusedAugment(16, gamma_p=0., gamma_range=(.1,9.)).sample(photos, 2) for _ in range(2)]
    assert all(torch.equal(o,p) for x,y in zip(a,b) for o,p in zip(x,y))

def test_many_images_do_not_mix(photos):
    "Row v*B+b comes from image b, across the blocks that a processor works in"
    x = torch.linspace(0, 1, 40)[:,None,None,None].expand(40,3,40,50)
    for size in (224,16):
        for y in FusedAugment(size, jitter_p=0., bw_p=0.).sample(x, 3):
            # weights that sum to 1, over the taps of two axes and of two axes' blur
            assert torch.allclose(y, x[...,:1,:1].expand_as(y), rtol=0, atol=rounding(torch.float32, 4*24))

def test_no_small_crops(photos):
    "0 leaves a size out, and what is left is as without it"
    kw = dict(crop_sizes=(32,16), min_scales=(.5,.1), max_scales=(1.,.3))
    none,only = get_swav_aug_pipelines((2,0), **kw),get_swav_aug_pipelines((2,), **{k: v[:1] for k,v in kw.items()})
    set_seed(0); a = MultiCrop(none).cut(photos)
    set_seed(0); b = MultiCrop(only).cut(photos)
    assert len(a)==len(b)==2 and all(torch.equal(o,p) for o,p in zip(a,b))
    with pytest.raises(ValueError, match=r'num_crops\[1\] must be a whole number, at least 0, got -1'):
        get_swav_aug_pipelines((2,-1), **kw)

# -- kornia's containers

def test_containers(photos):
    aug = FusedAugment(40, rotate_p=.5)
    for box in (K.ImageSequential, K.AugmentationSequential):
        seq = box(K.RandomVerticalFlip(p=.5),
                  aug) if box is K.ImageSequential else box(K.RandomVerticalFlip(p=.5), aug, data_keys=['input'])
        y = seq(photos)
        assert y.shape==(2,3,40,40)
        assert torch.equal(seq(photos, params=seq._params), y)

def test_keypoints(photos):
    "The matrix of a crop tells where a pixel goes"
    x = torch.zeros(4, 1, 101, 131)
    x[:,:,50:55,60:65] = 1
    aug = FusedAugment(200, (.8,1.), rotate_p=1., jitter_p=0., bw_p=0., blur_p=0.)
    seq = K.AugmentationSequential(aug, data_keys=['input','keypoints'])
    set_seed(0)
    y,points = seq(x, torch.tensor([[[62.,52.]]]).expand(4,-1,-1))
    grid = torch.stack(torch.meshgrid(torch.arange(200.), torch.arange(200.), indexing='xy'), -1)
    for im,point in zip(y[:,0], points[:,0]): assert ((im[...,None]*grid).sum((0,1))/im.sum() - point).abs().max() < .2
    with pytest.raises(NotImplementedError, match='masks'): aug.transform_masks(x, aug._params, aug.flags)

# -- pipelines

def test_views_of_a_shared_transform_are_one_call(photos):
    pipes = get_swav_aug_pipelines(num_crops=(2,3), crop_sizes=(32,16))
    calls = []
    sample,aug = FusedAugment.sample,pipes[2].fs[0].aug
    aug.sample = lambda x, n=1: calls.append(n) or sample(aug, x, n)
    y = MultiCrop(pipes).cut(photos)
    assert [tuple(o.shape) for o in y]==[(2,3,32,32)]*2 + [(2,3,16,16)]*3 and calls==[3]
    assert all(p.split_idx==0 for p in pipes) and all(p is not pipes[0] for p in pipes[1:])
    assert pipes[0].fs[0] is pipes[1].fs[0] and pipes[1].fs[0] is not pipes[2].fs[0]

class Plus(Transform):
    "Made by hand: only on fastai images"
    def __init__(self, k): super().__init__(); self.k = k
    def encodes(self, x:TensorImage): return x+self.k

def test_hand_made_and_extra(photos):
    x = TensorImage(photos)
    extra = get_multi_aug_pipelines(2, 16, stats=None, xtra_tfms=[Plus(10.)])
    views = MultiCrop([Pipeline([Plus(1.)], split_idx=0), *extra])
    for images in (x, photos): # extra transforms act on plain tensors, too
        y = views.cut(images)
        assert torch.equal(y[0], photos+1) and all(o.min()>=10 and o.max()<=11 for o in y[1:])
        assert all(type(o) is torch.Tensor and not o.requires_grad for o in y)
    assert views.sizes==(None,16,16) and views.stats(3) is None
    assert [ids for ids,_,_ in views.settings()]==[[0],[1,2]]
    assert views.settings()[1][2]['xtra_tfms']==['Plus']

@pytest.mark.parametrize('exact', [False,True])
def test_what_views_say(exact):
    pipes = get_swav_aug_pipelines((2,1), (16,10), (.4,.1), (1.,.4), blur=False, exact=exact)
    views = MultiCrop(iter(pipes))
    assert len(views)==3 and views.pipelines==pipes and views.sizes==(16,16,10)
    assert views.stats(3)==tuple(list(o) for o in imagenet_stats)
    (ids,size,large),(ids2,size2,small) = views.settings()
    assert (ids,size,ids2,size2)==([0,1],16,[2],10)
    assert large['scale']==(.4,1.) and small['scale']==(.1,.4) and large['jitter']==(.8,.8,.8,.2)
    assert large['blur_p']==0 and 'blur_s' not in large and 'rotate_deg' not in large
    assert [views.strength(o) for o in ('jitter','blur','rotate','flip','bw')]==[.8,0,0,.5,.2]
    with pytest.raises(ValueError, match="name must be one of .*'jitter'.* got 'hue'"): views.strength('hue')
    other = MultiCrop([pipes[0], *get_multi_aug_pipelines(2, 8, blur_p=.7, exact=exact)])
    assert other.strength('blur')==.7

def test_normalize_and_decode(photos):
    "Whole images like crops, hand-made `Normalize` included, and back"
    mean,std = torch.tensor([.5,.4,.3]),torch.tensor([.2,.3,.4])
    own = get_multi_aug_pipelines(2, 16, stats=(mean,std))
    hand = [Pipeline([Plus(0.), Normalize.from_stats(mean.tolist(), std.tolist(), cuda=False)], split_idx=0)]*2
    want = (photos-mean[:,None,None])/std[:,None,None]
    for pipes in (own, hand):
        for x in (photos, TensorImage(photos)):
            y = MultiCrop(pipes).normalize(x)
            assert type(y) is torch.Tensor and torch.equal(y, want)
        for got,o in zip(MultiCrop(pipes).stats(3), (mean,std)): assert torch.tensor(got).equal(o)
        back = MultiCrop(pipes).decode([want,want], 1)
        # one rounding in each of -, /, *, +, of numbers of size at most 1/0.2+1: 4*6*eps
        assert all(len(o)==1 and (o-photos[:1]).abs().max()<=24*torch.finfo(torch.float32).eps for o in back)
    twice = MultiCrop(get_multi_aug_pipelines(2, 16, stats=(mean,std),
                                              xtra_tfms=[Normalize.from_stats([1.],[2.], cuda=False)]))
    y = (want-1)/2
    # the largest value is (1-.3)/.2 < 5: two roundings here, four there
    assert (twice.normalize(photos)-y).abs().max()<=6*5*torch.finfo(torch.float32).eps
    plain = MultiCrop(get_multi_aug_pipelines(2, 16, stats=None))
    assert plain.stats(3) is None and torch.equal(plain.normalize(photos), photos)
    with pytest.raises(ValueError, match='crops must be 2 tensors, one a pipeline, got 1'): plain.decode([photos])
    with pytest.raises(ValueError, match='stats must have 1 values for images of 1 channels'): MultiCrop(own).stats(1)

@pytest.mark.parametrize('exact', [False,True])
def test_types(exact):
    pipe = get_batch_augs(16, stats=None, exact=exact)
    for cls,c in ((TensorImage,3), (TensorImageBW,1), (torch.Tensor,3), (torch.Tensor,1)):
        x = torch.rand(3,c,20,24).as_subclass(cls)
        y = pipe(x)
        assert type(y) is cls and y.shape==(3,c,16,16) and y.dtype==torch.float32 and not y.requires_grad
    label = TensorCategory(torch.tensor([1,2]))
    assert torch.equal(pipe(label), label)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert pipe(torch.rand(2,3,20,20).to(dtype)).dtype==torch.float32
    with torch.autocast('cpu', dtype=torch.bfloat16): assert pipe(torch.rand(2,3,20,20)).dtype==torch.float32
    assert get_batch_augs(16, jitter=False, bw=False, stats=None, exact=exact,
                          cuda=False)(torch.rand(2,7,20,20)).shape==(2,7,16,16)

def test_one_channel_is_gray():
    "Brightness and contrast act on one channel as on a gray image of three; the rest does nothing"
    set_seed(0)
    aug = FusedAugment(24)
    x = torch.rand(4,1,40,40)
    p = aug.draw(x.shape, 8)
    gray = dict(p, factors=torch.cat([p['factors'][:,:2], torch.tensor([[1.,0.]]).expand(32,2)], 1))
    three = aug(x.expand(-1,3,-1,-1), params=gray)
    # the luma of a gray color is three products and their sum, in up to three factors of 1.8
    assert (aug(x, params=p)-three).abs().max() < rounding(torch.float32, 64, 1.8**3)

def test_pickle(photos):
    pipe = pickle.loads(pickle.dumps(get_swav_aug_pipelines()))
    set_seed(0); a = MultiCrop(pipe).cut(photos)
    set_seed(0); b = MultiCrop(get_swav_aug_pipelines()).cut(photos)
    assert all(torch.equal(o,p) for o,p in zip(a,b))

@pytest.mark.parametrize('c', [1,3])
@needs_pretended_gpu
def test_no_synchronization(c):
    "All of it runs on pretended CUDA tensors: nothing is left on the CPU, no value is waited for"
    from torch._subclasses import FakeTensorMode
    # the parameters are drawn on the CPU even where the default device is another
    with FakeTensorMode(), torch.device('cuda'), NoWait():
        x = torch.rand(8, c, 64, 80)
        pipes = get_swav_aug_pipelines(crop_sizes=(32,16), rotate=True, gamma=True, stats=((.5,)*c,(.2,)*c))
        y = MultiCrop(pipes).cut(x)
        assert [tuple(o.shape) for o in y]==[(8,c,32,32)]*2 + [(8,c,16,16)]*6 and all(o.device.type=='cuda' for o in y)

@fuzz(60, b=st.integers(0,3), c=st.sampled_from([1,3]), h=st.integers(1,40), w=st.integers(1,40),
      size=st.integers(1,40), n=st.integers(1,3),
       lo=st.floats(.01,1), same=st.booleans(), rotate=st.booleans(), gamma=st.booleans())
def test_any_shape(b, c, h, w, size, n, lo, same, rotate, gamma):
    aug = FusedAugment(size, (lo,1.), rotate_p=.5*rotate, same_on_batch=same, gamma_p=.5*gamma)
    x = torch.rand(b,c,h,w)
    ys = aug.sample(x, n)
    assert len(ys)==n
    assert all(y.shape==(b,c,size,size) and torch.isfinite(y).all() and (y>=0).all() and (y<=1).all() for y in ys)
    if b>0:
        table = aug._table(aug._params, c)
        each,batch = (torch.cat([o.clone() for o in f(x, table)]) for f in (aug._cut_boxes, aug._cut_windows))
        assert (each-batch).abs().max() < resize_rounding(40, taps=41)

# -- errors

@pytest.mark.parametrize('kw,words', [
    (dict(size=0),'size must be a positive integer, got 0'), (dict(size=2.5),'size .* 2.5'), (dict(size=True),'size'),
    (dict(resize_scale=(.5,.2)),'resize_scale .* got'), (dict(resize_scale=(0,.2)),'resize_scale'),
    (dict(resize_scale=(.1,1.2)),'resize_scale'),
    (dict(resize_ratio=(2,1)),'resize_ratio'), (dict(resize_ratio=1),'resize_ratio'), (dict(blur_s=(0,1)),'blur_s'),
    (dict(blur_s=(2,1)),'blur_s'),
    (dict(flip_p=1.1),'flip_p must be a probability between 0 and 1, got 1.1'), (dict(rotate_p=-1),'rotate_p'),
    (dict(jitter_p=None),'jitter_p'),
    (dict(bw_p='x'),'bw_p'), (dict(blur_p=float('nan')),'blur_p'), (dict(rotate_deg=-5),'rotate_deg'),
    (dict(jitter_s=-1),'jitter_s'), (dict(jitter_s=3),'jitter_s'),
    (dict(gamma_p=2),'gamma_p'), (dict(gamma_range=(0,1)),'gamma_range'), (dict(gamma_range=(2,1)),'gamma_range'),
    (dict(stats=(.5,.5)),'stats'), (dict(stats=((.5,),(0.,))),'stats'), (dict(stats=((.5,.5),(.1,))),'stats'),
    (dict(stats='imagenet'),'stats')])
def test_bad_arguments(kw, words):
    with pytest.raises(ValueError, match=words): get_batch_augs(**dict(size=32)|kw)

@pytest.mark.parametrize('kw,words', [
    (dict(num_crops=(2,6,1)),'equal lengths'),
    (dict(min_scales=(.3,.2)),r'min_scales\[1\] must be at most max_scales\[1\]=0.14, got 0.2'),
    (dict(crop_sizes=(224,-1)),r'crop_sizes\[1\] must be a positive integer, got -1'),
    (dict(num_crops=(0,6)),r'num_crops\[0\]'),
    (dict(max_scales=(1.5,.14)),r'max_scales\[0\]'), (dict(min_scales=(0,.05)),r'min_scales\[0\]'),
    (dict(num_crops=8),'num_crops'),
    (dict(resize_scale=(.1,1)),'resize_scale'), (dict(blur_p=2),'blur_p')])
def test_bad_swav_arguments(kw, words):
    with pytest.raises(ValueError, match=words): get_swav_aug_pipelines(**kw)

@pytest.mark.parametrize('exact', [False,True])
def test_bad_images(exact):
    pipe = get_batch_augs(16, exact=exact)
    with pytest.raises(TypeError, match='floating point .* torch.uint8'):
        pipe(torch.zeros(2,3,20,20, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r'\(B,C,H,W\), got \(3, 20, 20\)'): pipe(torch.rand(3,20,20))
    with pytest.raises(ValueError, match='stats must have 1 values for images of 1 channels, got 3'):
        pipe(torch.rand(2,1,20,20))
    with pytest.raises(ValueError, match='1 or 3 channels, got 4'):
        get_batch_augs(16, stats=None, exact=exact)(torch.rand(2,4,20,20))
    with pytest.raises(ValueError, match='n must be'): get_multi_aug_pipelines(0, 16)
    assert isinstance(pipe.fs[0], BatchAugment)
    with pytest.raises(TypeError, match='floating point .* torch.uint8'):
        MultiCrop([pipe]*2).cut(torch.zeros(2,3,20,20, dtype=torch.uint8))

@pytest.mark.parametrize('pipes,error,words', [
    (None, TypeError, 'aug_pipelines must be a list of fastai Pipelines.*got None'),
    ([1,2], TypeError, r'got \[1, 2\]'),
    ([], ValueError, 'at least two'), ([Pipeline([], split_idx=0)], ValueError, 'got 1'),
    ([Pipeline([], split_idx=0), Pipeline([])], ValueError, r'split_idx=0, got \[None\] at \[1\]')])
def test_bad_pipelines(pipes, error, words):
    with pytest.raises(error, match=words): MultiCrop(pipes)
