"Groups of images: found where they are, each image in one folder, originals and finished work untouched."
import csv, os
import numpy as np, pytest, torch, torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from helpers import small_encoder
from self_supervised_swav.args import ExploreArgs, SortArgs
from self_supervised_swav.checkpoints import save_encoder
from self_supervised_swav.deepcluster import create_deepcluster_model
from self_supervised_swav.embed import folder_features
from self_supervised_swav.files import write_state
from self_supervised_swav.grouping import default_n_groups, directions, group_folder, group_images, sort_images
from self_supervised_swav.images import unescape_name
from self_supervised_swav.models import create_swav_model

here = dict(num_workers=0, device='cpu')

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "24 images in nested folders, two of the same name, one with a name that is hard to write; and a run"
    root = tmp_path_factory.mktemp('sort')
    names = ['a/x.png','b/x.png','new\nline.png',"a, \"b\".png",'z'*250+'.png',*(f'c/{i}.png' for i in range(19))]
    for i,name in enumerate(names):
        (root/'photos'/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((load_digits().images[i]*255/16).astype('uint8')).save(root/'photos'/name)
    torch.manual_seed(0)
    model = create_swav_model(small_encoder(), hidden_size=16, projection_size=8, n_protos=6).eval()
    save_encoder(model.encoder, root/'run'/'encoder.safetensors', size=16)
    write_state(dict(model=model.state_dict()), root/'run'/'last.pth')
    return root,names,model

def clusters(sizes, d=32, noise=.02, seed=0):
    "Tight clusters around random directions, far from the origin; and the cluster of each row, in random order"
    gen = torch.Generator().manual_seed(seed)
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    y = y[torch.randperm(len(y), generator=gen)]
    return 10+torch.randn(len(sizes), d, generator=gen)[y]+noise*torch.randn(len(y), d, generator=gen),y

def test_directions_start_at_the_mean():
    x = torch.randn(50, 8)*3+100
    z = directions(x)
    torch.testing.assert_close(z, F.normalize((x.double()-x.double().mean(0)), dim=1).float(), atol=1e-4, rtol=0)
    assert not directions(torch.full((5,3), .1)).any()                     # equal images have no direction

@pytest.mark.parametrize('method', ['kmeans','hdbscan'])
def test_clusters_are_found(method):
    "Largest first, whatever the scale"
    sizes = [60,40,25,12]
    x,y = clusters(sizes)
    for scale in (1,1e-3):
        groups = group_images(x*scale, k=4 if method=='kmeans' else None, method=method)
        assert groups.sizes.tolist()==sizes
        assert torch.equal(groups.groups, y)                              # they were numbered by size
        own = (directions(x*scale)*groups.centers[groups.groups]).sum(1)
        torch.testing.assert_close(groups.distances, 1-own, atol=1e-5, rtol=0)

def test_members_begin_with_the_typical():
    x,_ = clusters([30,20], noise=.3)
    groups = group_images(x, k=2)
    for g in range(2):
        d = groups.distances[groups.members(g)]
        assert (d.diff()>=0).all() and len(d)==groups.sizes[g]

def test_noise_belongs_to_no_group():
    "HDBSCAN gives a group to what is nearer to it than groups are to each other; the rest has none"
    x,y = clusters([60,50,40,30,30,30])
    far = 10+torch.randn(8, 32, generator=torch.Generator().manual_seed(9))
    groups = group_images(torch.cat([x, far]), method='hdbscan', min_size=10)
    own,outside = groups.groups[:len(x)],groups.groups[len(x):]
    assert all(own[y==g].unique().numel()==1 for g in range(6)) and own.unique().numel()==6
    assert (outside==-1).sum()>=4 and groups.name(-1)=='no_group' and 'in none' in repr(groups)
    none = group_images(torch.randn(20, 4), method='hdbscan', min_size=20)
    assert len(none.groups)==20 and none.distances.isfinite().all()

@pytest.mark.parametrize('n,k', [(1,1), (2,1), (8,2), (300,12), (8000,63), (20_000,100), (10**6,100)])
def test_default_number(n, k): assert default_n_groups(n)==k

def test_few_and_equal_images():
    assert group_images(torch.randn(1, 4)).groups.tolist()==[0]
    assert group_images(torch.ones(6, 4), k=3).groups.unique().numel()<=3
    x = torch.randn(9, 4)
    assert group_images(x, k=9).sizes.tolist()==[1]*9                      # as many groups as images: one each

def test_centers_are_only_looked_up():
    x,centers = torch.randn(40, 5),torch.randn(7, 5)
    groups = group_images(x, centers=centers)
    cosines = F.normalize(x.double(), dim=1)@F.normalize(centers.double(), dim=1).T
    assert torch.equal(groups.groups, cosines.argmax(1)) and len(groups.sizes)==7
    torch.testing.assert_close(groups.distances.double(), 1-cosines.max(1).values, atol=1e-6, rtol=0)

@pytest.mark.parametrize('kwargs,error', [
    (dict(method='color'), "method must be 'kmeans' or 'hdbscan', got 'color'"),
    (dict(k=0), 'k must be a whole number, at least 1, got 0'),
    (dict(k=31), 'k must be at most the number of images, 30, got 31'),
    (dict(centers=torch.ones(2, 3)), r'must be \(n,d\) and \(k,d\), got \(30, 4\) and \(2, 3\)'),
    (dict(method='hdbscan', min_size=31), 'hdbscan needs at least 31 images, got 30')])
def test_wrong_arguments(kwargs, error):
    with pytest.raises(ValueError, match=error): group_images(torch.randn(30, 4), **kwargs)

def test_features_must_be_finite():
    for kwargs in (dict(), dict(centers=torch.ones(2, 4))):
        with pytest.raises(ValueError, match='features must be finite'):
            group_images(torch.full((5,4), torch.nan), **kwargs)

def listed(path):
    "The rows, each name as `open` takes it"
    with open(path, newline='', encoding='utf-8') as f:
        return [{k: unescape_name(v) for k,v in row.items()} for row in csv.DictReader(f)]

@pytest.mark.parametrize('copy', [False,True])
def test_each_image_once(place, tmp_path, copy):
    "Links or copies of all images, originals untouched, the table in step with folders, neighbors and distances"
    root,names,_ = place
    before = {p: (p.read_bytes(),p.stat().st_mtime_ns) for p in (root/'photos').rglob('*.png')}
    groups = sort_images(root/'run', root/'photos', tmp_path/'out', groups=4, copy=copy, neighbors=3, **here)
    made = list((tmp_path/'out').rglob('*.png'))
    assert len(made)==len(names)==len(groups.groups) and all(p.is_symlink()!=copy for p in made)
    assert sorted(p.read_bytes() for p in made)==sorted(o for o,_ in before.values())
    assert {p: (p.read_bytes(),p.stat().st_mtime_ns) for p in before}==before
    assert sorted(p.name for p in (tmp_path/'out').iterdir())==[*(f'group_0{g}' for g in range(4)),'groups.csv']
    rows = listed(tmp_path/'out'/'groups.csv')
    x,files = folder_features(root/'run', root/'photos', **here)
    z = directions(x).double()
    cosines = (z@z.T).fill_diagonal_(-2)
    at = {r['file']: i for i,r in enumerate(rows)}
    assert len(at)==len(rows)==len(files)
    for i,r in enumerate(rows):
        assert r['group']==str(int(groups.groups[i])) and abs(float(r['distance'])-groups.distances[i])<=.5e-4+1e-6
        near = [at[r[f'neighbor_{j}']] for j in (1,2,3)]
        torch.testing.assert_close(cosines[i,near], cosines[i].topk(3).values, atol=1e-5, rtol=0)
        own = tmp_path/'out'/r['sorted_as']
        assert own.read_bytes()==files[i].read_bytes() and int(own.name.split('_')[0])==int(r['rank'])
        assert len(os.fsencode(own.name))<=255
    assert set(at)==set(names) and {'new\nline.png','a, "b".png'}<=set(at)

@pytest.mark.skipif(os.name!='posix', reason='file names are bytes on POSIX only')
def test_names_that_are_not_utf8(place, tmp_path):
    (tmp_path/'photos').mkdir()
    for i,name in enumerate((b'caf\xe9.png',b'b.png')):
        try: f = open(os.fsencode(tmp_path/'photos')+b'/'+name, 'wb')
        except OSError: pytest.skip('this file system takes UTF-8 only')
        with f: Image.fromarray((load_digits().images[i]*16).astype(np.uint8)).save(f, 'png')
    sort_images(place[0]/'run', tmp_path/'photos', tmp_path/'out', **here)
    assert [r['file'] for r in listed(tmp_path/'out'/'groups.csv')]==['b.png','caf\udce9.png']
    assert all(p.exists() for p in (tmp_path/'out').rglob('*.png'))

def test_all_or_nothing(place, tmp_path, monkeypatch):
    "What is there stays; what fails halfway leaves no trace"
    root,_,_ = place
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'note.txt').write_text('keep')
    with pytest.raises(FileExistsError, match='mine exists already: choose another folder'):
        sort_images(root/'run', root/'photos', tmp_path/'mine', **here)
    with pytest.raises(ValueError, match='out must lie outside of the folder of images'):
        sort_images(root/'run', root/'photos', root/'photos'/'new'/'sorted', **here)
    def full(*_, **__): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m, pytest.raises(OSError, match='No space'):
        m.setattr('self_supervised_swav.grouping.write_csv', full)
        sort_images(root/'run', root/'photos', tmp_path/'out', **here)
    assert sorted(p.name for p in tmp_path.iterdir())==['mine'] and os.listdir(tmp_path/'mine')==['note.txt']
    (tmp_path/'empty').mkdir()
    sort_images(root/'run', root/'photos', tmp_path/'empty', **here)
    assert (tmp_path/'empty'/'groups.csv').exists()

def test_prototypes_of_a_run(place, tmp_path):
    "The group of an image is the prototype that the model scores highest"
    root,_,model = place
    _,files,groups = group_folder(SortArgs(str(root/'run'), str(root/'photos'), by='prototypes', **here))
    x = torch.stack([torch.tensor(np.array(Image.open(o).resize((16,16), Image.BILINEAR))) for o in files])
    features,_ = folder_features(root/'run', root/'photos', **here)
    with torch.no_grad(): scores = model.prototypes(F.normalize(model.projector(features), dim=1))
    assert torch.equal(groups.groups, scores.argmax(1)) and len(groups.centers)==6 and len(x)==len(files)
    torch.testing.assert_close(groups.distances, 1-scores.max(1).values, atol=1e-5, rtol=0)
    save_encoder(model.encoder, tmp_path/'run'/'encoder.safetensors', size=16)
    with pytest.raises(FileNotFoundError, match='prototypes are in the last checkpoint of a run, and there is no'):
        sort_images(tmp_path/'run', root/'photos', tmp_path/'out', by='prototypes', **here)
    write_state(dict(model=model.encoder.state_dict()), tmp_path/'run'/'last.pth')
    with pytest.raises(ValueError, match='has no prototypes: group by kmeans or hdbscan'):
        sort_images(tmp_path/'run', root/'photos', tmp_path/'out', by='prototypes', **here)

def test_first_of_several_heads(place, tmp_path):
    "DeepCluster-v2 clusters several times: its groups are the first head's"
    root,_,swav = place
    torch.manual_seed(1)
    model = create_deepcluster_model(swav.encoder, hidden_size=16, projection_size=8, n_protos=(5,7,5)).eval()
    save_encoder(model.encoder, tmp_path/'run'/'encoder.safetensors', size=16)
    write_state(dict(model=model.state_dict()), tmp_path/'run'/'last.pth')
    _,files,groups = group_folder(SortArgs(str(tmp_path/'run'), str(root/'photos'), by='prototypes', **here))
    features,_ = folder_features(tmp_path/'run', root/'photos', **here)
    with torch.no_grad(): scores = model.heads[0](F.normalize(model.projector(features), dim=1))
    assert torch.equal(groups.groups, scores.argmax(1)) and len(groups.centers)==5
    other = ExploreArgs(str(tmp_path/'run'), str(root/'photos'), by='prototypes', **here)
    assert torch.equal(group_folder(other)[2].groups, groups.groups)

def test_command(place, tmp_path, command):
    root,names,_ = place
    args = 'sort',root/'run',root/'photos','-o',tmp_path/'out','--device','cpu','--num-workers','0'
    code,out,err = command(*args, '--groups', '3')
    assert (code,err)==(0,'') and f'{len(names)} images in 3 groups' in out
    code,_,err = command(*args, '--groups', '3')
    assert code==2 and 'exists already' in err and err.count('\n')==1
    code,_,err = command(*args, '--by', 'hdbscan', '--groups', '3')
    assert code==2 and 'groups is for by=kmeans' in err.replace('--', '').replace('by kmeans','by=kmeans')
