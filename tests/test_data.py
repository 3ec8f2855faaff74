import gzip, os, struct
import numpy as np, pytest, torch
from pathlib import Path
from PIL import Image
from torch import nn
import fastai.callback.progress  # noqa: F401  no_bar
from fastai.callback.core import Callback
from fastai.data.block import DataBlock
from fastai.data.transforms import RandomSplitter, get_image_files
from fastai.learner import Learner, load_learner
from fastai.torch_core import TensorImage, TensorImageBW
from fastai.vision.augment import Resize
from fastai.vision.core import PILImageBW
from fasttransform import Transform
from self_supervised_swav.data import (OpenImage, UnlabeledImageBlock, check_images, digits_dls, fashion_mnist_dls,
                                       no_targets,
                                       read_idx, swav_dls, tensor_dls)

rng = np.random.default_rng(0)
def noise(h, w, *c): return rng.integers(0, 256, (h, w, *c), dtype=np.uint8)

@pytest.fixture
def folder(tmp_path):
    "Ten images in nested folders: sizes, modes and formats mixed"
    ims = [noise(50, 40, 3), noise(30, 90, 3), noise(64, 64), noise(40, 40, 4), noise(33, 47, 3), noise(20, 20, 3),
           noise(80, 81), noise(48, 64, 3)]
    for i, im in enumerate(ims):
        fn = tmp_path/'deep'/f'd{i%3}'/f'{i}.{("png", "jpg", "bmp")[i%3]}'
        fn.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(im if i%3 != 1 or im.ndim == 2 else im[..., :3]).save(fn)
    Image.fromarray(noise(30, 30, 3)).convert('P').save(tmp_path/'palette.png')
    Image.fromarray(noise(30, 30, 3)).convert('CMYK').save(tmp_path/'cmyk.jpg')
    (tmp_path/'notes.txt').write_text('no image, and does not claim to be one')
    return tmp_path

def add_bad(folder):
    "A text that is called an image, an empty file, and a JPEG and a PNG whose ends are missing"
    bad = [folder/'bad'/nm for nm in ('text.jpg', 'empty.png', 'cut.jpg', 'cut.png')]
    bad[0].parent.mkdir()
    bad[0].write_text('text')
    bad[1].touch()
    for fn in bad[2:]:
        Image.fromarray(noise(90, 90, 3)).save(fn)
        fn.write_bytes(fn.read_bytes()[:-2000])
    return bad

@pytest.mark.parametrize('n_in,cls', [(3, TensorImage), (1, TensorImageBW)])
@pytest.mark.parametrize('method', ['crop', 'squish', 'pad'])
def test_folder(folder, n_in, cls, method):
    dls = swav_dls(folder, size=(24, 32), bs=4, valid_pct=.2, n_in=n_in, method=method, num_workers=0)
    assert (len(dls.train_ds), len(dls.valid_ds)) == (8, 2)
    for dl in dls:
        for b in dl:
            assert len(b) == 1 and type(b[0]) is cls and b[0].shape[1:] == (n_in, 24, 32)
            assert b[0].dtype == torch.float32
            assert 0 <= b[0].min() and .5 < b[0].max() <= 1
    dls.show_batch()

def test_split(folder):
    state = torch.get_rng_state()
    names = [[[o.name for o in dl.items] for dl in swav_dls(folder, size=8, bs=2, valid_pct=.3, seed=s, num_workers=0)]
             for s in (1, 1, 2)]
    assert torch.equal(state, torch.get_rng_state()), 'the split took from the global random state'
    assert names[0] == names[1] != names[2]
    assert len({*names[0][0], *names[0][1]}) == 10

def test_order_of_files_does_not_matter(folder, monkeypatch):
    dls = swav_dls(folder, size=8, bs=2, num_workers=0)
    scandir = os.scandir
    class Backwards(list):
        def __enter__(self): return self
        def __exit__(self, *_): pass
    monkeypatch.setattr(os, 'scandir', lambda top: Backwards(list(scandir(top))[::-1]))
    assert swav_dls(folder, size=8, bs=2, num_workers=0).train.items == dls.train.items

def test_list_of_files(folder):
    dls = swav_dls([str(folder/'palette.png'), folder/'cmyk.jpg'], size=8, bs=2, valid_pct=0, num_workers=0)
    assert dls.one_batch()[0].shape == (2, 3, 8, 8)

@pytest.mark.filterwarnings('error')
def test_bs_larger_than_folder(folder):
    with pytest.warns(UserWarning, match='bs=64 is more than the 10 training images: using bs=10'):
        dls = swav_dls(folder, size=8, valid_pct=0, num_workers=0)
    assert [len(b[0]) for b in dls.train] == [10]

def test_bad_files(folder):
    bad = add_bad(folder)
    with pytest.raises(ValueError, match='4 of 14 files') as e: swav_dls(folder)
    assert all(str(fn) in str(e.value) for fn in bad)
    with pytest.warns(UserWarning, match='skipped: 4 of 14 files'):
        dls = swav_dls(folder, size=8, bs=2, skip_bad=True, num_workers=0)
    assert len(dls.train_ds)+len(dls.valid_ds) == 10
    for fn in bad:
        with pytest.raises(ValueError, match=f'1 of 2 .*{fn.name}'): swav_dls([folder/'palette.png', fn])
        with pytest.raises(ValueError, match=fn.name): OpenImage()(fn)
    assert set(check_images(bad, decode=False)) == set(bad[:2]), 'headers are whole where the end is missing'
    with pytest.raises(ValueError, match='gone.png'): swav_dls([folder/'palette.png', folder/'gone.png'])

def test_file_that_broke_after_the_check_is_named(folder):
    dls = swav_dls([folder/'palette.png', folder/'cmyk.jpg'], size=8, bs=2, valid_pct=0, num_workers=0)
    (folder/'cmyk.jpg').write_text('broken')
    with pytest.raises(ValueError, match='cmyk.jpg is not a readable image'): dls.one_batch()

@pytest.mark.parametrize('msg,kw', [('n_in must be a number of channels, .* got 0', dict(n_in=0)),
    ('it has 3 channels, n_in is 2', dict(n_in=2)),
    ('size must be positive, got 0', dict(size=0)), ('bs must be positive, got 0', dict(bs=0)),
    ('valid_pct must .* got 1', dict(valid_pct=1)), ('valid_pct must .* got -0.1', dict(valid_pct=-.1)),
    ('check must be .* got True', dict(check=True)),
    ('skip_bad=True needs', dict(skip_bad=True, check=None)), ('2 images or more, got 1', dict(valid_pct=.95))])
def test_errors(folder, msg, kw):
    with pytest.raises(ValueError, match=msg): swav_dls(folder, **kw)

def test_no_images(tmp_path):
    with pytest.raises(ValueError, match=f'no image files found in {tmp_path}'): swav_dls(tmp_path)
    with pytest.raises(ValueError, match='nowhere is not a folder'): swav_dls(tmp_path/'nowhere')
    with pytest.raises(ValueError, match='empty list'): swav_dls([])

def test_large_jpeg_decoded_small(tmp_path):
    "A JPEG is decoded no larger than needed, never smaller, and gives the same picture"
    yy, xx = np.mgrid[:600, :900]
    Image.fromarray(np.stack([yy/600, xx/900, (np.sin(xx/30)+1)/2],
                             -1).__mul__(255).astype(np.uint8)).save(tmp_path/'big.jpg', quality=95)
    small, full = OpenImage(min_size=(150, 150))(tmp_path/'big.jpg'), OpenImage()(tmp_path/'big.jpg')
    assert small.size == (225, 150) and full.size == (900, 600)
    assert np.abs(np.asarray(full.resize((225, 150), Image.BOX), float)-np.asarray(small)).mean() < 1.5
    assert OpenImage(min_size=(151, 150))(tmp_path/'big.jpg').size == (225, 150)
    assert OpenImage(min_size=(226, 150))(tmp_path/'big.jpg').size == (450, 300)

class TakeTarget(Callback):
    "A stand-in for a method that needs no targets"
    def after_pred(self): self.learn.yb, self.learn.loss_func = self.xb, lambda p, x: (p-x).pow(2).mean()

def test_learner(folder, tmp_path):
    dls = DataBlock(UnlabeledImageBlock(PILImageBW), get_items=get_image_files, splitter=RandomSplitter(.2, seed=0),
                    item_tfms=Resize(16)).dataloaders(folder, bs=4, num_workers=0)
    learn = Learner(dls, nn.Conv2d(1, 1, 3, padding=1), cbs=TakeTarget(), path=tmp_path)
    assert learn.loss_func is no_targets
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.recorder.losses
    with pytest.raises(TypeError, match='SWAV'): no_targets(None)
    learn.remove_cb(TakeTarget)
    learn.loss_func = no_targets
    learn.export('m.pkl')
    assert load_learner(tmp_path/'m.pkl').dls.n_inp == 1

def test_digits_are_the_digits():
    from sklearn.datasets import load_digits
    x, y = load_digits(return_X_y=True)
    dls = digits_dls(size=8, bs=2000, valid_pct=0)
    b = dls.one_batch()
    assert type(b[0]) is TensorImageBW and b[0].shape == (1797, 1, 8, 8) and dls.c == 10 and len(dls.vocab) == 10
    key = lambda x, y: sorted(map(tuple, np.concatenate([x.reshape(len(x), -1), y[:, None]], 1).tolist()))
    assert key(b[0].numpy()*16, b[1].numpy()) == key(x, y)

def test_digits_split():
    a, b = digits_dls(size=8), digits_dls(size=8, labeled=False)
    assert (len(a.train_ds), len(a.valid_ds)) == (1438, 359)
    assert torch.equal(a.valid_ds.x, b.valid_ds.x) and len(b.one_batch()) == 1 and b.train_ds.loss_func is no_targets
    assert not torch.equal(a.valid_ds.x, digits_dls(size=8, seed=1).valid_ds.x)
    b.show_batch(max_n=2)

def small_dls(**kw):
    x = torch.arange(20, dtype=torch.uint8).view(-1, 1, 1, 1).expand(20, 3, 4, 4)
    return tensor_dls(x, torch.arange(20)%3, vocab=list('abc'), bs=4, valid_pct=.25, **kw)

def test_epoch_holds_every_image_once():
    dls = small_dls()
    first = [torch.cat([b[0][:, 0, 0, 0] for b in dls.train]).mul(255).round() for _ in range(2)]
    assert len(first[0]) == 12 and len(set(first[0].tolist())) == 12, 'bs 4 of 15: the last three are dropped'
    assert not torch.equal(*first), 'no shuffling'
    valid = torch.cat([b[0][:, 0, 0, 0] for b in dls.valid]).mul(255).round()
    assert torch.equal(valid, dls.valid_ds.x[:, 0, 0, 0].float())

def test_whole_batches_equal_items():
    "The same batches, types and targets come out when an item transform makes `TensorDL` collate"
    fast, slow = small_dls(), small_dls()
    slow.add_tfms([Transform(lambda x: x)], 'after_item')
    for a, b in zip(fast.valid, slow.valid):
        assert [type(o) for o in a] == [type(o) for o in b]
        for o, p in zip(a, b): assert torch.equal(o, p)

def test_item_transforms_are_used():
    dls = small_dls()
    class Twice(Transform):
        def encodes(self, o:TensorImage): return o*2
    dls.add_tfms([Twice()], 'after_item', 'valid')
    assert torch.equal(dls.valid.one_batch()[0], dls.valid_ds.x[:4].float()*2/255)

def test_workers():
    dls = small_dls(num_workers=2)
    assert torch.equal(torch.cat([b[1] for b in dls.valid]), dls.valid_ds.y)

def test_labeled_learner(tmp_path):
    "Predictions come in order; export holds no images; a new tensor can be predicted, alone or in a batch"
    dls = small_dls()
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(48, dls.c)), path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        preds, targs = learn.get_preds()
        assert torch.equal(targs, dls.valid_ds.y) and preds.shape == (5, 3)
        learn.show_results()
        learn.export('m.pkl')
    new = load_learner(tmp_path/'m.pkl')
    assert len(new.dls.train_ds) == 0
    with new.no_bar():
        assert torch.allclose(new.get_preds(dl=new.dls.test_dl(dls.valid_ds.x))[0], preds)
        assert torch.allclose(new.predict(dls.valid_ds.x[0])[2], preds[0])
        assert new.predict(dls.valid_ds.x[0])[0] == 'abc'[preds[0].argmax()]

def test_export_is_small(tmp_path):
    learn = Learner(digits_dls(), nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), path=tmp_path)
    learn.export('m.pkl')
    assert (tmp_path/'m.pkl').stat().st_size < 200_000, 'images were exported'

@pytest.mark.parametrize('err,msg,args', [(ValueError, 'x must have 4', (torch.ones(3, 8, 8),)),
                                          (TypeError, 'x must be uint8 or', (torch.ones(3, 1, 8, 8).long(),)),
    (ValueError, 'y must hold one class', (torch.ones(3, 1, 8, 8), torch.arange(4)))])
def test_tensor_errors(err, msg, args):
    with pytest.raises(err, match=msg): tensor_dls(*args)

def write_fashion(path, n_train=30, n_valid=12):
    path.mkdir(parents=True, exist_ok=True)
    for part, n, start in (('train', n_train, 0), ('t10k', n_valid, 100)):
        x = (np.arange(n)+start).astype(np.uint8)
        for kind, a in (('images-idx3', np.broadcast_to(x[:, None, None], (n, 28, 28))), ('labels-idx1', x%10)):
            with gzip.open(path/f'{part}-{kind}-ubyte.gz', 'wb') as f:
                f.write(struct.pack(f'>HBB{a.ndim}I', 0, 8, a.ndim, *a.shape)+a.tobytes())

@pytest.mark.parametrize('labeled', [True, False])
def test_fashion(tmp_path, labeled):
    write_fashion(tmp_path)
    dls = fashion_mnist_dls(path=tmp_path, n_train=20, bs=8, labeled=labeled)
    assert (len(dls.train_ds), len(dls.valid_ds)) == (20, 12)
    ids = [ds.x[:, 0, 0, 0].long() for ds in (dls.train_ds, dls.valid_ds)]
    assert len(ids[0].unique()) == 20 and ids[0].max() < 30 and set(ids[1].tolist()) == set(range(100,
        112)), 'the own split was not kept'
    if labeled: assert dls.c == 10 and all(torch.equal(ds.y, i%10) for ds, i in zip((dls.train_ds, dls.valid_ds), ids))
    x = dls.valid.one_batch()[0]
    assert x.shape == (8, 1, 28, 28) and torch.allclose(x[:, 0, 0, 0], ids[1][:8]/255)
    assert torch.equal(fashion_mnist_dls(path=tmp_path, n_train=20).train_ds.x, dls.train_ds.x)
    with pytest.raises(ValueError, match='n_train must be between 1 and 30, got 31'):
        fashion_mnist_dls(path=tmp_path, n_train=31)

def test_fashion_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match='apt install dataset-fashion-mnist') as e:
        fashion_mnist_dls(path=tmp_path)
    assert str(tmp_path) in str(e.value) and 'download=True' in str(e.value)

def test_fashion_download(tmp_path, monkeypatch):
    "A download goes where the next call looks; it is asked for once"
    calls = []
    monkeypatch.setattr('self_supervised_swav.data.fastai_path', lambda o: tmp_path)
    monkeypatch.setattr('self_supervised_swav.data._debian_path', tmp_path/'none')
    monkeypatch.setattr('torchvision.datasets.FashionMNIST',
                        lambda root, download: calls.append(root) or write_fashion(Path(root)/'FashionMNIST'/'raw'))
    for _ in range(2): assert len(fashion_mnist_dls(download=True).train_ds) == 30
    assert calls == [tmp_path]
    assert len(fashion_mnist_dls().train_ds) == 30

def test_not_idx(tmp_path):
    (tmp_path/'a.idx').write_text('text')
    with pytest.raises(ValueError, match='a.idx is not an idx file'): read_idx(tmp_path/'a.idx')

debian = Path('/usr/share/datasets/fashion-mnist')
@pytest.mark.skipif(not debian.exists(), reason='needs Debian\'s package dataset-fashion-mnist')
def test_real_fashion():
    dls = fashion_mnist_dls()
    assert (len(dls.train_ds), len(dls.valid_ds)) == (60_000, 10_000)
    assert torch.bincount(dls.train_ds.y).tolist() == [6000]*10 and torch.bincount(dls.valid_ds.y).tolist() == [1000]*10
    assert abs(dls.train_ds.x.float().mean()/255-.2860) < 1e-4, 'the published mean of its pixels'
