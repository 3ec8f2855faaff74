"Fits that would train nothing, and Learners that would answer nonsense, say so instead"
import pytest, torch
from PIL import Image
from torch import nn
from fastai.callback.core import Callback
from fastai.data.block import DataBlock
from fastai.data.transforms import get_image_files
from fastai.learner import Learner
from fastai.vision.data import ImageBlock
from self_supervised_swav.data import no_targets, swav_dls
from self_supervised_swav.learner import swav_learner
from self_supervised_swav.swav import SWAV
from helpers import digits, small_augs, small_encoder, small_learner

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('images')
    for i in range(12): Image.new('RGB', (16,16), (i*20,0,0)).save(path/f'{i}.png')
    return path

def plain_dls(folder, bs=4):
    "Images of fastai's own block, which has no loss function"
    dblock = DataBlock((ImageBlock,), get_items=get_image_files)
    return dblock.dataloaders(folder, bs=bs, num_workers=0, device='cpu')

class TakeTarget(Callback):
    "A stand-in for a method of somebody else: an autoencoder"
    def after_pred(self): self.learn.yb,self.learn.loss_func = self.xb,nn.MSELoss()

@pytest.mark.parametrize('loss', [None, nn.MSELoss()])
def test_fit_without_a_method(folder, loss):
    "An error before the first step, not a table of nan over unchanged weights"
    dls = swav_dls(folder, 16, bs=4, num_workers=0, device='cpu')
    learn = Learner(dls, nn.Conv2d(3, 3, 3, padding=1), loss_func=loss)
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(TypeError, match='train with a callback that brings one'): learn.fit(1)
        assert learn.train_iter==0
        assert len(learn.get_preds(act=nn.Identity())[0])==len(dls.valid_ds)  # needs no loss
        learn.fit(1, cbs=TakeTarget())
    assert learn.recorder.losses

def test_guard_leaves_other_learners_alone(folder):
    "A Learner that is exported must not need this package to be loaded"
    assert not hasattr(Learner(digits(20, labeled=True), nn.Linear(1, 1)), 'no_targets_guard')
    assert not hasattr(small_learner(20), 'no_targets_guard')

def test_no_whole_batch(folder):
    "More images in a batch than in the data set, in plain DataLoaders: an error before the first epoch"
    learn = Learner(plain_dls(folder, 999), small_learner(n_in=3).model, cbs=SWAV(small_augs()))
    with learn.no_bar(), pytest.raises(ValueError, match='bs=999 and 10 training images'): learn.fit(1)

def test_plain_image_block(folder):
    "fastai's own block has no loss function, which a Learner asks for"
    with pytest.warns(UserWarning): learn = swav_learner(plain_dls(folder), small_encoder(3), n_protos=400)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert torch.stack(learn.recorder.losses).isfinite().all()
    dls,model,method = plain_dls(folder),small_learner(n_in=3).model,SWAV(small_augs())
    own = nn.MSELoss()
    assert Learner(dls, model, own, cbs=method).loss_func is own
    assert Learner(digits(20, labeled=True), model, cbs=method).loss_func is not no_targets
    for cbs in (None,[TakeTarget]):
        with pytest.raises(AssertionError, match='loss function'): Learner(dls, model, cbs=cbs)
    with pytest.raises(TypeError, match=r'write cbs=\[SWAV\(augs\)\]'): Learner(dls, model, cbs=[SWAV])
    with pytest.raises(TypeError, match="'model'"): Learner(dls)
    learn = Learner(dls, model, None, cbs=method)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.loss_func is no_targets and torch.stack(learn.recorder.losses).isfinite().all()

@pytest.mark.parametrize('labeled', [False,True])
def test_predictions_of_a_pretraining(labeled):
    learn = small_learner(20, labeled=labeled)
    with learn.no_bar():
        for ask in (lambda: learn.predict(torch.rand(1,16,16)), lambda: learn.show_results()):
            with pytest.raises(ValueError, match=r'extract_features\(learn, dl\) returns features'): ask()
