"One line to a Learner: what it finds out by itself, and that each of it can be overridden."
import pytest, torch
from fastai.callback.progress import ProgressCallback
from self_supervised_swav import learner, precision
from self_supervised_swav.learner import swav_learner
from helpers import digits, seed_all

small = dict(small_images=True, layers=(1,1,1,1), channels=(8,8,16,16))
def make(n_in=1, bf16=None, **kwargs):
    seed_all()
    augs = dict(num_crops=(2,1)) | kwargs.pop('augs', {})
    learn = swav_learner(digits(60, n_in=n_in), 'resnet18', encoder=small, model=dict(n_protos=12, hidden_size=16, projection_size=8),
                         augs=augs, bf16=bf16, **kwargs)
    learn.remove_cb(ProgressCallback).logger = lambda *_: None
    return learn

@pytest.mark.parametrize('n_in', [1,3])
def test_finds_channels_and_size(n_in):
    learn = make(n_in, swav=dict(K=20, temp=.2), lr=.01)
    assert [c.shape for c in learn.swav.cut(learn.dls.one_batch()[0])]==[(16,n_in,16,16)]*2 + [(16,n_in,7,7)]
    assert learn.swav.K==20 and learn.swav.temp==.2 and learn.lr==.01
    assert (learn.swav.aug_pipelines[0].fs[0].aug.stats is None)==(n_in==1)
    learn.fit(1)
    assert torch.stack(learn.recorder.losses).isfinite().all()
    assert [c.shape[-1] for c in make(augs=dict(crop_sizes=(12,8))).swav.cut(learn.dls.one_batch()[0][:,:1])]==[12,12,8]

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
