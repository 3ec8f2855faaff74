"A sample says truly which images it holds, and reading it changes nothing."
import os
import numpy as np, pytest, torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import get_image_files, parent_label
from fastai.learner import Learner
from fastai.vision.augment import Normalize
from fastai.vision.data import ImageBlock
from PIL import Image
from helpers import rounding, seed_all, small_augs, small_encoder, small_learner
from self_supervised_swav.data import swav_dls, tensor_dls
from self_supervised_swav.evaluate import extract_features
from self_supervised_swav.models import create_swav_model
from self_supervised_swav.samples import ImageSample, batch_with, image_query
from self_supervised_swav.swav import SWAV

def test_sample_is_what_the_encoder_saw(trained):
    s = trained.sample_images(max_images=20, seed=3)
    ds = trained.dls.train_ds
    assert len(set(s.idxs))==20 and s.idxs!=list(range(20)) and s.note=='20 of 64 images, at random'
    torch.testing.assert_close(s.images.float()/255, ds.x[s.idxs], atol=.5/255+rounding(torch.float32, 2), rtol=0)
    assert s.labels.tolist()==ds.y[s.idxs].tolist() and s.vocab==[str(i) for i in range(10)]
    wanted = extract_features(trained, trained.dls.train, progress=False)[0][s.idxs]
    # the same in other batches: a dozen layers of sums of at most 9*16 terms
    bound = rounding(torch.float32, 12*9*16, wanted.abs().max().item())
    torch.testing.assert_close(s.features, wanted, atol=bound, rtol=0)
    assert (wanted-wanted.roll(1, 0)).abs().max()>10*bound  # features in another order would not pass
    assert trained.sample_images().note=='all 64 images' and trained.sample_images(ds_idx=1).n_total==16

def test_labels_of_a_sample(trained):
    names = ['even' if int(o)%2==0 else 'odd' for o in trained.dls.train_ds.y]
    s = trained.sample_images(max_images=10, labels=names)
    assert [s.vocab[i] for i in s.labels]==[names[i] for i in s.idxs]
    assert trained.sample_images(max_images=10, labels=False).labels is None
    bare = small_learner(n=40)
    assert bare.sample_images().labels is None
    with pytest.raises(ValueError, match='labels=True needs data with one class for each image, got none'):
        bare.sample_images(labels=True)
    with pytest.raises(ValueError, match='one for each of the 64 images of the data set, got 3'):
        trained.sample_images(labels=[1,2,3])
    with pytest.raises(ValueError, match='max_images must be a positive whole number, got 0'):
        trained.sample_images(max_images=0)

def test_sample_of_a_folder_with_normalize(tmp_path):
    gen = torch.Generator().manual_seed(0)
    for i in range(12):
        (tmp_path/'ab'[i%2]).mkdir(exist_ok=True)
        Image.fromarray(torch.randint(0, 256, (16,24,3), dtype=torch.uint8,
                                      generator=gen).numpy()).save(tmp_path/'ab'[i%2]/f'{i}.png')
    block = DataBlock((ImageBlock,CategoryBlock), get_items=get_image_files, get_y=parent_label,
                      batch_tfms=Normalize.from_stats([.5]*3, [.2]*3, cuda=False))
    dls = block.dataloaders(tmp_path, bs=4, device='cpu', num_workers=0)
    seed_all()
    learn = Learner(dls, create_swav_model(small_encoder(3), hidden_size=16, projection_size=8, n_protos=6),
                    cbs=SWAV(small_augs()))
    s = learn.sample_images()
    for j,i in enumerate(s.idxs):
        pixels = torch.from_numpy(np.array(Image.open(dls.train_ds.items[i]))).permute(2,0,1)
        assert (s.images[j].int()-pixels.int()).abs().max()<=1
        assert s.vocab[s.labels[j]]==parent_label(dls.train_ds.items[i])
    axes = learn.show_neighbors(dls.train_ds.items[0], k=3)  # a file, which its own image in the sample equals
    assert axes[1].get_title().endswith('1.00')

def test_sample_of_another_loader(trained):
    x = torch.rand(30, 1, 16, 16)
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8)
    s = trained.sample_images(dl=dl, max_images=20)
    assert s.note=='the first 20 images' and s.labels is None
    torch.testing.assert_close(s.images.float()/255, x[:20], atol=.5/255+rounding(torch.float32, 2), rtol=0)

def test_thumbnails_are_small():
    learn = small_learner(dls=tensor_dls(torch.rand(8, 1, 120, 240), bs=4, device='cpu'))
    assert learn.sample_images().images.shape[1:]==(1,48,96)

def test_names_of_files(tmp_path):
    "Files keep their names, whatever these are, from the folder that all share; images in memory have none"
    odd = ['<img src=x>.png', '$x$ & y.png', 'two\nlines.png', os.fsdecode(b'caf\xe9.png')]
    for i,name in enumerate(odd):
        folder = tmp_path/'ab'[i%2]
        folder.mkdir(exist_ok=True)
        Image.new('RGB', (16,16), (60*i,0,0)).save(folder/name)
    learn = small_learner(dls=swav_dls(tmp_path, size=16, bs=2, valid_pct=0., num_workers=0, device='cpu'), n_in=3)
    s = learn.sample_images()
    assert sorted(s.file_names)==sorted(f"{'ab'[i%2]}/{name}" for i,name in enumerate(odd))
    for i,o in enumerate(s.files): assert s.images[i,0,0,0]==Image.open(o).getpixel((0,0))[0]
    assert image_query(learn, s.idxs[1], s)[4]==s.file_names[1] and image_query(learn, s.files[1],
                                                                                s)[4]==s.files[1].name
    assert ImageSample(*s)._replace(files=s.files[:1]).file_names==[s.files[0].name]
    assert ImageSample(*s)._replace(files=['x/a.png','/y/b.png']).file_names==['x/a.png',
                                                                               '/y/b.png']  # no folder in common
    assert small_learner(n=40).sample_images().file_names is None

def test_a_batch_of_the_sample(trained):
    s = trained.sample_images(max_images=10)
    x,image = s.batch(3)
    ds = trained.dls.train_ds
    assert image==s.idxs[3] and len(x)==trained.dls.train.bs and torch.equal(x[0].as_subclass(torch.Tensor),
                                                                             ds.x[image])
    assert torch.equal(s.batch(3)[0], x) and not torch.equal(s.batch(3, seed=1)[0][1:], x[1:])
    assert len({tuple(o.flatten().tolist()) for o in x})>1
    with pytest.raises(ValueError, match='image must be an index from 0 to 63, got 64'):
        batch_with(trained.dls.train, 64)
    plain = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(5, 1, 16, 16)), batch_size=4)
    x,image = batch_with(plain)
    assert image==0 and torch.equal(x, plain.dataset.tensors[0][:4])
