"`swav_recipe` over the whole range of its arguments: what its rules promise, and what it refuses."
import math
import pytest
from hypothesis import strategies as st
from fuzz import fuzz
from self_supervised_swav.augment import get_swav_aug_pipelines
from self_supervised_swav.learner import setting_groups
from self_supervised_swav.multiview import method_named
from self_supervised_swav.recipes import Recipe, paper_recipe, swav_recipe
from self_supervised_swav.swav import SWAV

@st.composite
def arguments(draw):
    n = draw(st.integers(2, 3_000_000))
    size = draw(st.one_of(st.integers(8, 1000), st.tuples(st.integers(8, 1000), st.integers(8, 1000))))
    world_size = draw(st.integers(1, min(64, n//2)))
    return dict(n_images=n, bs=draw(st.integers(2, max(2, min(8192, n//world_size)))), image_size=size,
                n_classes=draw(st.one_of(st.none(), st.integers(1, 30_000))), world_size=world_size)

@fuzz(300, args=arguments())
def test_rules_hold_for_any_data(args):
    r,n,B = swav_recipe(**args),args['n_images'],args['bs']*args['world_size']
    K,protos,size = r['swav']['K'] or 0,r['model']['n_protos'],args['image_size']
    if isinstance(size, tuple): size = min(size)
    assert K%B==0 and 4*K<n and K<=15*B
    assert (K>0)==(protos>2*B)                 # a queue only where the batch is small against the prototypes
    assert 2<=protos<=2*(B+K)                  # never far beyond what shares them
    if args['n_classes']: assert protos<=max(16, 10*args['n_classes'])
    assert r['swav']['queue_start_pct']>=.2 and 0<r['swav']['freeze_protos_pct']<=.5
    large,small = r['augs']['crop_sizes']
    assert 0<small<large<=min(size, 224)
    if size>=128: assert small>=32             # the stride of most networks
    if size>=16: assert small>=8               # the stride of small_images
    measured = 5000<=n<100_000 and 24<=size<64 # crops of fewer pixels than the images, whose size features keep
    reduced = 64<=size<128                     # and of far fewer
    assert (large<min(size, 224))==(measured or reduced)==('features' in r)
    if measured: assert r['features']['size']==size
    if reduced: assert r['features']['size']==size//8*8  # whole patches of a ViT
    assert (r['augs']['num_crops'][1]==0)==(measured or reduced or size<24)
    assert ('gamma' in r['augs'])==measured
    assert r['encoder']['small_images']==(size<128)
    SWAV(get_swav_aug_pipelines(**r['augs']), **r['swav'])   # every setting is one that they accept
    assert {f'{g}.{k}' for g,d in r.items() for k in d}==set(r.reasons) and all(r.reasons.values())

def test_ten_prototypes_for_a_class():
    assert [swav_recipe(50_000, 256, 32, n)['model']['n_protos'] for n in (1,10,40,1000)]==[16,100,400,3000]

def test_more_images_more_prototypes_and_no_jump():
    ns = [swav_recipe(n, 1024, 64)['model']['n_protos'] for n in (1024,4096,16_384,65_536,10**6,10**8)]
    assert ns==sorted(ns) and ns[0]>=32 and ns[-1]<=3000

def test_learning_rate_follows_the_root_of_all_images_of_a_step():
    lr = lambda **kw: swav_recipe(10**6, image_size=224, **kw)['fit']['lr']
    assert lr(bs=256)==pytest.approx(2*lr(bs=64), rel=.05)
    assert lr(bs=64, world_size=4)==lr(bs=256)

def test_the_reason_of_a_rate_says_where_it_ends():
    r = {bs: swav_recipe(10_000, bs, 28) for bs in (16,64,512)}
    assert [o['fit']['lr'] for o in r.values()]==pytest.approx([1e-3,2e-3,4e-3])
    assert ['at most' in o.reasons['fit.lr'] for o in r.values()]==[False,False,True]

def test_processes_share_prototypes_and_queue():
    one,four = swav_recipe(10**5, 256, 64, 100),swav_recipe(10**5, 64, 64, 100, world_size=4)
    for g,k in (('model','n_protos'),('swav','K'),('fit','n_epoch')): assert one[g][k]==four[g][k]
    assert four['dls']['bs']==64

def test_given_prototypes_bring_their_queue():
    assert swav_recipe(100_000, 64, 96)['swav']['K'] is None or swav_recipe(100_000, 64, 96)['model']['n_protos']>128
    r = swav_recipe(100_000, 64, 96, n_protos=600)
    assert r['model']['n_protos']==600 and r['swav']['K']==768 and r.reasons['model.n_protos']=='given'
    assert 'batches' in r.reasons['swav.K'] and '600' in r.reasons['swav.K']

def test_reasons_hold_the_runs_numbers():
    r = swav_recipe(12_345, 48, 40, n_classes=7)
    expected = {'dls.bs': ('48','257'), 'model.n_protos': ('7 classes',), 'encoder.small_images': ('40 px',),
                'swav.eps': ('12,345',), 'augs.crop_sizes': ('40 px',)}
    for k,words in expected.items():
        for w in words: assert w in r.reasons[k], (k, r.reasons[k])

@pytest.mark.parametrize('changed,text', [
    (dict(n_images=1), 'n_images must be a whole number, at least 2, got 1'), (dict(n_images=10.), 'n_images must be'),
    (dict(bs=1), 'bs must be a whole number, at least 2, got 1'),
    (dict(bs=101), 'bs must be at most n_images/world_size = 100, got 101'),
    (dict(bs=51, world_size=2), 'at most n_images/world_size = 50, got 51'),
    *((dict(image_size=o), 'image_size must be .* got ') for o in (7,(28,),'28')),
    *((dict(n_classes=o), 'n_classes must be') for o in (0,True)),
    (dict(world_size=0), 'world_size must be'), (dict(n_protos=1), 'n_protos must be')])
def test_refuses_by_name(changed, text):
    with pytest.raises(ValueError, match=text): swav_recipe(**dict(n_images=100, bs=16, image_size=28)|changed)

def test_table_shows_every_setting_with_its_reason():
    r = Recipe().put('swav', 'eps', .02, 'few <images>').put('model', 'n_protos', 64, 'why not')
    lines = [o.split(maxsplit=2) for o in str(r).splitlines()]
    assert lines==[['swav.eps','0.02','few <images>'],['model.n_protos','64','why not']]
    assert 'few &lt;images&gt;' in r._repr_html_() and r._repr_html_().count('<tr>')==3
    assert r==dict(swav=dict(eps=.02), model=dict(n_protos=64))
    assert str(Recipe())=='' and str(Recipe(paper_recipe(256))).count('\n')+1==sum(map(len, paper_recipe(256).values()))

def test_override_leaves_the_original_alone():
    r = swav_recipe(1000, 16, 28)
    s = r.override(swav=dict(eps=.5), model=dict(nlayers=3))
    assert r['swav']['eps']!=.5 and 'nlayers' not in r['model'] and r.reasons['swav.eps']!='given'
    assert (s['swav']['eps'],s['model']['nlayers'])==(.5, 3)
    assert s.reasons['swav.eps']==s.reasons['model.nlayers']=='given'
    assert math.isclose(s['fit']['lr'], r['fit']['lr'])

# --- the papers' ------------------------------------------------------------------------------------------------------
papers = 'swav','simclr','mocov1','mocov2','deepclusterv2'

@pytest.mark.parametrize('method', papers)
def test_paper_settings_are_those_of_the_functions(method):
    r,groups,parts = paper_recipe(method),setting_groups(method),method_named(method)
    assert {'dls','model','augs',method,'opt','fit'}<=set(r)<={*groups,'dls','opt','fit'}
    for g in groups: assert set(r.get(g, ()))<=set(groups[g]), g
    parts.callback(parts.get_aug_pipelines(**r['augs']), **r[method])
    # whether the images of a step are enough for the queue is asked in the fit
    if 'K' in r[method] and r[method]['K']: assert r[method]['K']%r['dls']['bs']==0

def test_paper_settings_of_swav_are_what_they_were():
    old = paper_recipe(4096, 400)
    assert old==paper_recipe('swav', 4096, 400)==paper_recipe(4096, n_epochs=400)
    assert old==paper_recipe(batch_size=4096, n_epochs=400)
    assert old['fit']==dict(n_epoch=400, lr=4.8, warmup=10, start_lr=.3, final_lr=.0048)
    assert paper_recipe()==paper_recipe(256)==paper_recipe('swav') and paper_recipe()['fit']['n_epoch']==400

def test_rate_grows_with_the_batch():
    assert [paper_recipe('simclr', o)['fit']['lr'] for o in (256,4096)]==pytest.approx([.3,4.8])
    assert [paper_recipe('mocov2', o)['fit']['lr'] for o in (128,256)]==[.015,.03]

@pytest.mark.parametrize('args,text', [
    (('dino',), "method must be one of 'swav'.*got 'dino'"),
    (('simclr',100), 'batch_size must be 256, 512.* or 8192, got 100'),
    (('mocov2',64), 'batch_size must be 128 or 256, got 64'),
    (('deepclusterv2',256), 'batch_size must be 4096, got 256'),
    (('simclr',4096,5), 'n_epochs must be at least 10, got 5'),
    (('mocov1',256,0), 'n_epochs must be at least 1, got 0'),
    (('deepclusterv2',4096,9), 'n_epochs must be at least 10, got 9')])
def test_papers_refuse_by_name(args, text):
    with pytest.raises(ValueError, match=text): paper_recipe(*args)
