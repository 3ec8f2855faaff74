"Shards: every image once, another order each epoch, the same bits after a stop; damaged and hostile archives"
import io, os, pickle, random, sys, tarfile, warnings
import numpy as np, pytest, torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders, Datasets
from fastai.distributed import DistributedDL
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.torch_core import set_seed
from fasttransform import Transform
from hypothesis import HealthCheck, example, given, settings, strategies as st
from PIL import Image
from torch import nn

from self_supervised_swav import shards as shards_module
from self_supervised_swav.data import look_at_images, swav_dls
from self_supervised_swav.images import duplicate_groups, image_info, read_channels, read_image
from self_supervised_swav.resume import ResumeTraining
from self_supervised_swav.sources import ImageSource
from self_supervised_swav.shards import FromShards, ShardDL, Shards, is_shards, shard_names, shard_order


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    return tmp_path/'cache'/'self_supervised_swav'/'shards'

def png(i, size=(8,6)):
    f = io.BytesIO()
    Image.new('RGB', size, (i%256,i//256,7)).save(f, 'png')
    return f.getvalue()

def write(path, members, **kwargs):
    with tarfile.open(path, 'w', **kwargs) as tar:
        for name,data in members:
            o = tarfile.TarInfo(name) if isinstance(name, str) else name
            o.size = len(data)
            tar.addfile(o, io.BytesIO(data))
    return path

def make(folder, counts=(5,7,3), labels=False):
    "Shards of so many images; image i has red value i and label i%3"
    i = 0
    for s,n in enumerate(counts):
        members = []
        for i in range(i, i+n):
            members.append((f'{i:04}.png',png(i)))
            if labels: members.append((f'{i:04}.cls',b'%d' % (i%3)))
        i += 1
        write(folder/f's-{s:03}.tar', members)
    return str(folder/f's-{{000..{len(counts)-1:03}}}.tar')

class Number(Transform):
    "The number in an image's name"
    def encodes(self, o): return int(o.key)

class Red(Transform):
    def encodes(self, o): return torch.tensor([float(read_image(o).getpixel((0,0))[0])])+.1*torch.rand(1)

def number_dl(shards, **kwargs):
    return ShardDL(Datasets(np.arange(len(shards)), [[FromShards(shards), Number()]]), **kwargs)

def epoch(dl): return [x.tolist() for x, in dl]

@pytest.mark.parametrize('workers', [0, 2, 5])
def test_each_image_once_in_another_order(tmp_path, workers):
    "5 workers are more than there are shards"
    random.seed(0)
    dl = number_dl(Shards(make(tmp_path), buffer=4), bs=2, shuffle=True, num_workers=workers)
    epochs = [epoch(dl) for _ in range(3)]
    for o in epochs: assert sorted(sum(o, [])) == list(range(15))
    assert len({str(o) for o in epochs}) == 3
    random.seed(0)
    again = number_dl(Shards(make(tmp_path), buffer=4), bs=2, shuffle=True, num_workers=0)
    assert [epoch(again) for _ in range(3)] == epochs  # the seed decides, not the number of workers

@pytest.mark.parametrize('ranks', [2, 4])
def test_ranks_share_an_epoch(tmp_path, monkeypatch, ranks):
    "Whatever the shards: no image on two ranks, and fewer left out than there are ranks"
    monkeypatch.setattr(shards_module, 'num_distrib', lambda: ranks)
    monkeypatch.setattr(DistributedDL, '_broadcast', lambda self, t, rank: t)
    seen,orders = [],[]
    for rank in range(ranks):
        random.seed(1)
        dl = number_dl(Shards(make(tmp_path)), bs=1, shuffle=True, drop_last=True, num_workers=0)
        part = DistributedDL(dl, rank=rank, world_size=ranks)
        seen.append([sum(epoch(part), []) for _ in range(2)])
    for e in range(2):
        here = sum((o[e] for o in seen), [])
        assert len(set(here)) == len(here) == 15-15%ranks
        assert len({len(o[e]) for o in seen}) == 1
        orders.append(here)
    assert orders[0] != orders[1]

class PowerCut(BaseException): pass

def fit(folder, source, cuts=(), workers=0):
    "Train with the power going off after each of `cuts` batches; weights, losses and random numbers afterwards"
    for cut in [*cuts, None]:
        set_seed(0)
        shards = Shards(source, buffer=6)
        pipelines = [FromShards(shards), Red()],[FromShards(shards), Number(), float_tensor]
        ds = Datasets(np.arange(len(shards)), pipelines)
        dl = ShardDL(ds, bs=2, shuffle=True, drop_last=True, num_workers=workers)
        dls = DataLoaders(dl, dl.new(shuffle=False, drop_last=False))
        learn = Learner(dls, nn.Linear(1, 1), MSELossFlat(), lr=1e-5, cbs=[ResumeTraining(folder/'last.pth', every=1)])
        learn.remove_cb(ProgressCallback).logger = lambda *_: None
        one_batch,left = learn.one_batch,cut
        def fused(i, b):
            nonlocal left
            if left==0: raise PowerCut
            if left is not None: left -= 1
            one_batch(i, b)
        learn.one_batch = fused
        try: learn.fit(2)
        except PowerCut: continue
    return [o.tolist() for o in learn.model.parameters()],[float(o) for o in learn.recorder.losses],random.random()

def float_tensor(o:int): return torch.tensor([float(o)])

@pytest.mark.parametrize('workers,cuts', [(0,[3,2]), (2,[4,11])])
def test_resumes_in_the_middle_with_the_same_bits(tmp_path, workers, cuts):
    source = make(tmp_path)
    for o in 'ab': (tmp_path/o).mkdir()
    assert fit(tmp_path/'a', source, cuts, workers) == fit(tmp_path/'b', source, (), workers)

def test_the_order_goes_through_few_shards_at_a_time():
    counts = [50]*40
    shard = np.repeat(np.arange(40), counts)
    order = shard_order(shard, 100, np.random.default_rng(0))
    assert sorted(order) == list(range(2000))
    place = np.empty(2000, int)
    place[order] = np.arange(2000)
    for s in range(40):  # the 50 images of a shard lie in at most 2 windows of 100, which touch each other
        mine = place[shard==s]
        assert mine.max()-mine.min() < 200
    assert not np.array_equal(order, np.sort(order))

def test_a_large_buffer_is_a_full_shuffle():
    "An image's place is uniform: with 4,000 draws the mean place of each of 10 is 4.5 within 5 standard errors"
    rng = np.random.default_rng(0)
    places = np.array([np.argsort(shard_order(np.array([0]*5+[1]*5), 1000, rng)) for _ in range(4000)])
    # a window's border falls into the sequence in 1 of 100 draws, which moves the mean by less than 10/100
    assert np.abs(places.mean(0)-4.5).max() < 5*2.88/4000**.5+.1

def test_names():
    assert shard_names('a-{000..002}.tar') == ['a-000.tar','a-001.tar','a-002.tar']
    assert shard_names('{a,b}/{1..2}.tar') == ['a/1.tar','a/2.tar','b/1.tar','b/2.tar']
    assert shard_names('{x}.tar') == ['{x}.tar']
    with pytest.raises(ValueError, match='at most 1,000,000 shards'): shard_names('{0..999999}{0..9}.tar')
    with pytest.raises(ValueError, match='count upwards'): shard_names('{0..99999999999}.tar')
    assert is_shards('x/{0..3}.tar') and is_shards(['a.tar','b.tar']) and not is_shards('photos')
    assert not is_shards(['a.tar','b.png'])

def test_missing_shards_are_named(tmp_path):
    make(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"2 of 5 shards not found: .*s-003.tar, .*s-004.tar"):
        Shards(str(tmp_path/'s-{000..004}.tar'))

def test_labels_and_keys(tmp_path):
    write(tmp_path/'a.tar', [('b/1.png',png(1)), ('b/1.json',b'{"label": "cat"}'), ('2.png',png(2)), ('2.txt',b'dog\n'),
                             ('3.png',png(3)), ('3.json',b'{"caption": "x"}'), ('3.cls',b'cat'), ('4.png',png(4)),
                             ('4.txt',b'a caption\nof two lines'), ('5.npy',b'features'), ('5.png',png(5)),
                             ('notes.txt',b'no image'), ('._6.png',b'of a Mac'), ('README',b'no dot')])
    s = Shards(tmp_path/'a.tar')
    assert s.row_names() == ['b/1','2','3','4','5']
    assert [s.class_of(i) for i in range(5)] == ['cat','dog','cat',None,None]
    assert s.vocab == ['cat','dog']
    write(tmp_path/'b.tar', [('2.png',png(9))])
    assert Shards([tmp_path/'a.tar',tmp_path/'b.tar']).row_names()[1::4] == ['a/2','b/2']

def test_members_out_of_order(tmp_path):
    "A stream would make four samples of two"
    members = [(f'{i}.{ext}',data) for i in range(4) for ext,data in (('png',png(i)), ('cls',b'%d' % (i%2)))]
    for seed in range(5):
        random.Random(seed).shuffle(members)
        s = Shards(write(tmp_path/f'{seed}.tar', members))
        assert sorted((o.key,s.class_of(o.i),o.read()) for o in s) == [(str(i),str(i%2),png(i)) for i in range(4)]

def test_two_images_of_one_key(tmp_path):
    path = write(tmp_path/'a.tar', [('trip.1.png',png(1)), ('trip.2.png',png(2)), ('x.png',png(3)), ('x.png',png(4)),
                                    ('y.png',png(5))])
    with pytest.warns(UserWarning, match=r'2 members of shards left out: .*trip \(2 images have this key: 1.png, 2'):
        assert Shards(path).row_names() == ['y']
    assert Shards(path, ext='2.png').row_names() == ['trip']

@pytest.mark.parametrize('format', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_and_names(tmp_path, format):
    names = ['a/'*60+'long', 'é ü', 'two\nlines', '=1+1', '<img onerror=x>', 'x'*90]
    if format!=tarfile.USTAR_FORMAT: names.append('y'*300)
    path = write(tmp_path/'a.tar', [(f'./{n}.png',png(i)) for i,n in enumerate(names)], format=format)
    s = Shards(path)
    assert s.row_names() == names
    assert [o.read() for o in s] == [png(i) for i in range(len(names))]

def test_a_half_written_shard_at_every_cut(tmp_path):
    data = (write(tmp_path/'whole.tar', [(f'{i}.png',png(i)) for i in range(3)])).read_bytes()
    end = 3*1024  # a header and a block of data each; then zeros
    for cut in [0, 1, 511, *range(512, end+1, 512), *range(700, end+512, 512)]:
        (tmp_path/'cut.tar').write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r'cut\.tar \(it is'): Shards(tmp_path/'cut.tar')
        n_whole = cut//1024
        if n_whole:
            with pytest.warns(UserWarning, match='skipped: 1 of 1 shard cannot be read to the end'):
                s = Shards(tmp_path/'cut.tar', skip_bad=True)
            assert [o.read() for o in s] == [png(i) for i in range(n_whole)]
    (tmp_path/'cut.tar').write_bytes(data[:end+512])  # one block of zeros, which some writers leave it at
    assert len(Shards(tmp_path/'cut.tar')) == 3

def test_skip_bad_of_dataloaders(tmp_path):
    source = make(tmp_path)
    data = (tmp_path/'s-001.tar').read_bytes()
    (tmp_path/'s-001.tar').write_bytes(data[:3*1024+600])
    with pytest.raises(ValueError, match='Pass skip_bad=True'): swav_dls(source, size=8, num_workers=0)
    with pytest.warns(UserWarning, match='skipped'):
        dls = swav_dls(source, size=8, bs=4, valid_pct=0, skip_bad=True, num_workers=0, device='cpu')
    assert len(dls.train_ds) == 5+3+3

def test_an_unreadable_image_is_named_or_skipped(tmp_path):
    write(tmp_path/'a.tar', [('1.png',png(1)), ('2.png',b'no image'), ('3.png',png(3)[:-30]), ('4.png',png(4))])
    with pytest.raises(ValueError, match=r'2 of 4 files are not readable images: .*a\.tar: 2\.png'):
        swav_dls(tmp_path/'a.tar', size=8)
    with pytest.warns(UserWarning, match='skipped: 2 of 4 files'):
        dls = swav_dls(tmp_path/'a.tar', size=8, bs=2, skip_bad=True, valid_pct=0, num_workers=0, device='cpu')
    assert sorted(dls.train_ds.items) == [0,3]

def compressed(path, kind):
    with tarfile.open(path, f'w:{kind}') as tar: tar.addfile(tarfile.TarInfo('a.png'))

@pytest.mark.parametrize('kind,name', [('gz','gzip'), ('bz2','bzip2'), ('xz','xz')])
def test_compressed_shards_are_refused(tmp_path, kind, name):
    compressed(tmp_path/'a.tar', kind)
    with pytest.raises(ValueError, match=rf'it is compressed \({name}\)'): Shards(tmp_path/'a.tar')

@pytest.mark.parametrize('data', [b'', b'<html>not found</html>', b'\0'*1024, random.Random(0).randbytes(2000),
                                  b'x'*512*3], ids=['empty','page','zeros','noise','letters'])
def test_no_archive_at_all(tmp_path, data):
    (tmp_path/'a.tar').write_bytes(data)
    with pytest.raises(ValueError, match=r'a\.tar'): Shards(tmp_path/'a.tar')

def special(name, kind, linkname='/etc/passwd'):
    o = tarfile.TarInfo(name)
    o.type,o.linkname = kind,linkname
    return o

def test_hostile_members(tmp_path):
    "Links, devices and names that lead out are left out, said, and nothing is written anywhere"
    kinds = tarfile.SYMTYPE,tarfile.LNKTYPE,tarfile.CHRTYPE,tarfile.BLKTYPE,tarfile.FIFOTYPE
    members = [(special(f'bad{i}.png', kind),b'') for i,kind in enumerate(kinds)]
    members += [('../up.png',png(1)), ('/etc/absolute.png',png(2)), ('a/../../b.png',png(3)), ('good.png',png(4)),
                ('a/.././c.png',png(6)), ('dir..name/..x/d.png',png(5))]
    path = write(tmp_path/'a.tar', members)
    before = sorted(tmp_path.rglob('*'))
    with pytest.warns(UserWarning, match=r'9 members of shards left out: .*bad0.png \(a link\)'): s = Shards(path)
    assert s.row_names() == ['good','dir..name/..x/d']
    assert {o for o in tmp_path.rglob('*') if 'cache' not in str(o)} == set(before)

def header(name, size, kind=b'0'):
    "A header that declares `size`, an integer or the field's 12 bytes"
    o = tarfile.TarInfo(name)
    o.type = kind
    b = bytearray(o.tobuf(tarfile.GNU_FORMAT)[:512])
    b[124:136] = size if isinstance(size, bytes) else tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    b[148:156] = b' '*8
    b[148:156] = b'%06o\0 ' % sum(b)
    return bytes(b)

@pytest.mark.parametrize('size', [1<<20, 1<<33, 1<<62, (1<<87)-1, -512, -1024, -(1<<60), b'not octal!!!'])
@pytest.mark.parametrize('kind', [b'0', b'L', b'x', b'g', b'K', b'S', b'5', b'2', b'\x7f'])
def test_sizes_that_lie(tmp_path, kind, size):
    "Ends at once, with an error that names the shard, and takes no memory"
    good = header('a.png', 77)+png(1).ljust(512, b'\0')
    (tmp_path/'a.tar').write_bytes(good+header('b.png', size, kind)+bytes(2048))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: s,said = Shards(tmp_path/'a.tar'),None
        except ValueError as e: s,said = None,str(e)
    if said: assert 'a.tar' in said
    else: assert [o.key for o in s] == ['a'] and kind in b'25S\x7f'  # of these tar reads no contents

def test_a_bomb_in_a_shard_is_a_bad_image(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    write(tmp_path/'a.tar', [('1.png',png(1)), ('bomb.png',png(1, (100,100)))])
    with pytest.raises(ValueError, match=r'bomb\.png \(DecompressionBombError'): swav_dls(tmp_path/'a.tar', size=8)

@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@example(at=124, data=b'7777777')
@example(at=156, data=b'L')
@given(at=st.integers(0, 4095), data=st.binary(min_size=1, max_size=8))
def test_mutated_archives(tmp_path, at, data):
    members = [header(f'{i}.png', 77)+png(i).ljust(512, b'\0') for i in range(2)]
    whole = bytearray(b''.join(members)+bytes(2048))
    whole[at:at+len(data)] = data
    (tmp_path/'a.tar').write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: s = Shards(tmp_path/'a.tar', skip_bad=True)
        except ValueError as e: assert 'no image' in str(e)
        else:
            assert len(s) <= 2
            look_at_images(s)

def test_the_index_is_kept_and_made_anew(tmp_path, cache, monkeypatch):
    source = make(tmp_path, (3,))
    made = []
    make_index = shards_module.make_index
    monkeypatch.setattr(shards_module, 'make_index', lambda *args: made.append(1) or make_index(*args))
    for _ in range(2): assert Shards(source).row_names() == ['0000','0001','0002']
    assert len(made) == 1
    kept, = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:-100])  # damaged
    assert len(Shards(source)) == 3 and len(made) == 2
    write(tmp_path/'s-000.tar', [('new.png',png(9))])
    assert Shards(source).row_names() == ['new'] and len(made) == 3
    o = os.stat(tmp_path/'s-000.tar')
    os.utime(tmp_path/'s-000.tar', ns=(o.st_atime_ns,o.st_mtime_ns+10**9))
    assert len(Shards(source)) == 1 and len(made) == 4

def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'s-000.tar'/'no folder'))
    assert len(Shards(make(tmp_path, (3,)))) == 3

def test_a_lying_index_gives_no_other_image(tmp_path):
    "Beside the shard, with its stamp: places outside are refused, others are found out by the header's checksum"
    make(tmp_path, (3,))
    path = tmp_path/'s-000.tar'
    with open(path, 'rb') as f: index = shards_module.make_index(f, path.stat().st_size)
    stamp = shards_module._LocalShard(path).stamp
    for offsets,ok in (([1<<40,1536,2560],True), ([-5,1536,2560],True), ([1536,1536,2560],False)):
        shards_module.write_index(index | dict(offsets=np.array(offsets)), stamp, f'{path}.index')
        s = Shards(path)
        if ok: assert s[0].read() == png(0)
        else:
            with pytest.raises(ValueError, match=r's-000.tar has changed'): s[0].read()
            assert s[1].read() == png(1)

def test_a_shard_that_is_replaced_during_the_training(tmp_path):
    s = Shards(make(tmp_path, (3,)))
    write(tmp_path/'s-000.tar', [(f'other{i}.png',png(i+50)) for i in range(3)])
    with pytest.raises(ValueError, match='has changed since'): s[1].read()

def test_the_same_batches_as_from_a_folder(tmp_path):
    (tmp_path/'photos').mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (40+i,50,3), dtype=np.uint8)).save(tmp_path/'photos'/f'{i}.jpg')
    files = sorted((tmp_path/'photos').iterdir())
    for s in range(2): write(tmp_path/f's{s}.tar', [(o.name,o.read_bytes()) for o in files[3*s:3*s+3]])
    a,b = (swav_dls(o, size=32, bs=2, valid_pct=.5, num_workers=0, device='cpu')
           for o in (tmp_path/'photos',str(tmp_path/'s{0..1}.tar')))
    for (x,),(y,) in zip(a.valid, b.valid): assert torch.equal(x, y)
    assert [o.name for o in a.valid_ds.items] == [f'{i}.jpg' for i in b.valid_ds.items]

def test_any_kind_of_image(tmp_path):
    "16 bits, alpha, a turned photograph, arrays: as from files"
    deep,alpha,turned = (tmp_path/o for o in ('deep.png','alpha.png','turned.jpg'))
    Image.fromarray(np.arange(48, dtype=np.uint16).reshape(6,8)*1000).save(deep)
    Image.new('RGBA', (8,6), (0,0,0,0)).save(alpha)
    im = Image.new('RGB', (8,6))
    exif = im.getexif()
    exif[274] = 6
    im.save(turned, exif=exif)
    np.save(tmp_path/'five.npy', np.random.default_rng(0).integers(0, 255, (9,7,5)).astype(np.uint16))
    np.save(tmp_path/'fortran.npy', np.asfortranarray(np.random.default_rng(0).random((9,7,5)).astype(np.float32)))
    pytest.importorskip('tifffile').imwrite(
        tmp_path/'stack.tif', np.arange(5*63, dtype=np.uint16).reshape(5,9,7), photometric='minisblack')
    files = sorted(o for o in tmp_path.iterdir() if o.suffix in ('.png','.jpg','.npy','.tif'))
    s = Shards(write(tmp_path/'a.tar', [(o.name,o.read_bytes()) for o in files]))
    assert len(s) == 6
    for o,fn in zip(s, files):
        assert image_info(o) == image_info(fn)
        if fn.suffix in ('.npy','.tif'): assert torch.equal(read_channels(o, 5, (0,1)), read_channels(fn, 5, (0,1)))
        else: assert np.array_equal(np.asarray(read_image(o)), np.asarray(read_image(fn)))

def test_arrays_that_lie(tmp_path):
    "No memory for an array that is not there, and no pickle"
    f = io.BytesIO()
    np.lib.format.write_array_header_1_0(f, dict(descr='<u2', fortran_order=False, shape=(1<<20,1<<20)))
    g = io.BytesIO()
    np.save(g, np.array([{}, 'code'], dtype=object), allow_pickle=True)
    s = Shards(write(tmp_path/'a.tar', [('big.npy',f.getvalue()+b'xx'), ('code.npy',g.getvalue())]))
    for o,why in zip(s, ('buffer is smaller','objects of Python')):
        with pytest.raises(ValueError, match=why): read_channels(o, 5)

def test_copies(tmp_path):
    s = Shards(write(tmp_path/'a.tar', [('1.png',png(1)), ('2.png',png(2)), ('3.png',png(1)), ('4.png',b'bad')]))
    assert [[o.key for o in group] for group in duplicate_groups(s)] == [['1','3']]

def test_workers_get_a_copy_by_pickle(tmp_path):
    "As where processes are spawned"
    s = Shards(make(tmp_path))
    s[0].read()
    t = pickle.loads(pickle.dumps(s))
    assert [o.read() for o in t] == [png(i) for i in range(15)] and t[3] == s[3]

def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    s = Shards(make(tmp_path, (1,)*5))
    monkeypatch.setattr(shards_module._LocalShard, 'most_open', shards_module._LocalShard.n_open+2)
    assert [o.read() for o in s] == [png(i) for i in range(5)]
    assert sum('fd' in vars(o) for o in s.files) == 2
    del s
    assert shards_module._LocalShard.n_open >= 0

def test_memory_does_not_grow_with_python_objects(tmp_path):
    "What a data set of shards keeps of an image: 32 bytes of numbers and its name"
    s = Shards(make(tmp_path, (200,)))
    arrays = [s.offsets,s.sizes,s.crcs,s.key_lens,s.labels,s.names.ends,s.names.data]
    assert sum(o.nbytes for o in arrays) <= 200*(8+8+4+4+8+8+len('0000.png'))+8
    assert not any(isinstance(o, (list,dict)) and len(o)>=200 for o in vars(s).values())

def test_loaders_that_are_made_of_it(tmp_path):
    dls = swav_dls(make(tmp_path), size=8, bs=4, num_workers=0, device='cpu')
    x, = dls.test_dl(np.array([3,5])).one_batch()
    assert x.shape == (2,3,8,8) and abs(x[0,0].mean().item()*255-3)<.01
    x, = dls.train.one_batch()
    assert x.shape == (4,3,8,8) and isinstance(dls.train.new(shuffle=True), ShardDL)

@pytest.mark.parametrize('prefix', ['memory://', 'simplecache::memory://'])
def test_addresses(tmp_path, prefix):
    fsspec = pytest.importorskip('fsspec', reason='fsspec is not installed')
    make(tmp_path)
    fs = fsspec.filesystem('memory')
    for o in tmp_path.glob('*.tar'): fs.pipe(f'/data/{o.name}', o.read_bytes())
    s = Shards(f'{prefix}data/s-{{000..002}}.tar')
    assert [o.read() for o in s] == [png(i) for i in range(15)]
    t = pickle.loads(pickle.dumps(s))
    assert t[14].read() == png(14)
    fs.pipe('/data/s-000.tar', (tmp_path/'s-001.tar').read_bytes())
    if prefix=='memory://': assert Shards('memory://data/s-000.tar').row_names()[0] == '0005'

def test_a_local_address(tmp_path):
    pytest.importorskip('fsspec', reason='fsspec is not installed')
    source = make(tmp_path)
    dls = swav_dls(f'file://{source}', size=8, bs=4, valid_pct=0, num_workers=2, device='cpu')
    assert sum(len(x) for x, in dls.train) == 12

def test_fsspec_is_optional(tmp_path, monkeypatch):
    for o in ('fsspec','fsspec.core'): monkeypatch.setitem(sys.modules, o, None)
    assert len(Shards(make(tmp_path))) == 15
    with pytest.raises(ImportError, match='pip install fsspec'): Shards('s3://bucket/a.tar')

def shapes(folder, n=48, named=True):
    "Shards of small gray pictures of two kinds, labels 0 and 1, which stand in their files' keys, too"
    rng,members = np.random.default_rng(0),[]
    for i in range(n):
        a = rng.integers(0, 60, (16,16), dtype=np.uint8)
        if i%2: a[4:12,4:12] += 180
        else: a[::4] += 180
        f = io.BytesIO()
        Image.fromarray(a).save(f, 'png')
        members += [(f'{i:03}.png',f.getvalue()), (f'{i:03}.cls',b'%d' % (i%2))]
    folder.mkdir()
    for s in range(2): write(folder/f'two-{s}.tar', members[s*n:(s+1)*n])
    return str(folder/'two-{0..1}.tar')

def test_commands(tmp_path, command, monkeypatch):
    "pretrain, stopped and resumed; embed and evaluate: rows by their keys"
    monkeypatch.chdir(tmp_path)
    source = shapes(tmp_path/'data')
    args = ['pretrain', source, '--epochs','1','--labels-from-folders','--num-workers','0','--device','cpu','--bs','16',
            '--set','encoder.layers=(1,1,1,1)','encoder.channels=(8,8,16,16)']
    code,out,err = command(*args)
    assert code==0, err
    run = tmp_path/'runs'/'two'
    assert (run/'report.html').exists() and '39 training images of 16 px, 9 held out' in out
    assert 'largest_class' in (run/'history.csv').read_text()
    code,out,err = command('pretrain', source, '--out', run, '--resume')
    assert code==0 and 'training is finished' in out, err
    code,out,err = command('embed', run, source, '-o', 'x.npy', '--num-workers', '0', '--device', 'cpu')
    assert code==0 and 'Wrote 48 features' in out, err
    assert (tmp_path/'x.csv').read_text().split()[:3] == ['file,row','000,0','001,1']
    code,out,err = command('evaluate', run, source, '--epochs', '0', '--seeds', '1', '--labels', '2', '--k', '3',
                           '--num-workers', '0', '--device', 'cpu')
    assert code==0 and 'accuracy on 9 held-out images' in out, err
    for name,out in (('explore','x.html'), ('sort','x'), ('select','x.csv'), ('label','x.html')):
        code,_,err = command(name, run, source, '-o', tmp_path/out)
        assert code==2 and 'folder must be a folder of image files here, got shards' in err, err

def test_half_written_shards_at_the_command_line(tmp_path, command):
    source = shapes(tmp_path/'data')
    (tmp_path/'data'/'two-1.tar').write_bytes((tmp_path/'data'/'two-1.tar').read_bytes()[:20000])
    code,out,err = command('pretrain', source, '--device', 'cpu', '--out', tmp_path/'run')
    assert code==2 and 'two-1.tar' in err and 'Pass --skip-bad to use' in err and not (tmp_path/'run').exists()

def test_parts_and_missing_labels(tmp_path):
    members = [(f'{part}/{i}.png',png(i)) for part in ('train','valid') for i in range(4)]
    source = ImageSource(write(tmp_path/'a.tar', members))
    assert [[source.files[i].key[:5] for i in o] for o in source.splits] == [['train']*4,['valid']*4]
    with pytest.raises(ValueError, match='each image must have its .cls beside it'): source.check_labels()
    labels = [(f'{part}/{i}.cls',b'ab'[i%2:][:1]) for part in ('train','valid') for i in range(3)]
    with pytest.raises(ValueError, match='must have a label for each image; without one: 2 images'):
        ImageSource(write(tmp_path/'b.tar', members+labels)).check_labels()
