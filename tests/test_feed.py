"A pass over a DataLoader that stops after any batch goes on with the same bits"
import random
import numpy as np, pytest, torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.torch_core import set_seed
from helpers import Noisy
from self_supervised_swav.feed import ResumableFeed, get_pass_start, get_rng_state, set_pass_start, set_rng_state

def jitter(x:torch.Tensor): return x+torch.randn_like(x)

class InBatchesOfItsOwn(TfmdDL):
    "A loader that makes its batches in another way: backwards"
    def create_batches(self, samps): return super().create_batches(reversed(list(samps)))

def make_dls(n=22, bs=4, workers=0, cls=TfmdDL, shuffle=True, drop_last=False):
    if cls is torch.utils.data.DataLoader: kwargs = dict(batch_size=bs)
    else: kwargs = dict(bs=bs, after_batch=jitter)
    kwargs |= dict(shuffle=shuffle, drop_last=drop_last, num_workers=workers)
    return DataLoaders(*[cls(Noisy(n), **kwargs) for _ in range(2)])

def run(feed, stop_after=None):
    "Batches as lists, and the position after `stop_after` of the whole pass"
    res,position = [],None
    for i,b in enumerate(feed, feed.done+1):
        res.append(b.tolist())
        if i==stop_after:
            position = feed.position(i)
            break
    return res,position

torch_loader = torch.utils.data.DataLoader
loaders = {'plain': dict(), 'in order': dict(shuffle=False), 'drop last': dict(drop_last=True),
           '1 worker': dict(workers=1), '2 workers': dict(workers=2), '3 workers': dict(workers=3, drop_last=True),
           'torch': dict(cls=torch_loader), 'torch, 1 worker': dict(cls=torch_loader, workers=1),
           'own way': dict(cls=InBatchesOfItsOwn)}

@pytest.mark.parametrize('kwargs', loaders.values(), ids=loaders.keys())
def test_stop_anywhere_twice(kwargs):
    set_seed(0)
    dls = make_dls(**kwargs)
    start = get_pass_start(dls)
    whole,_ = run(ResumableFeed(dls, track_workers=True))
    after = get_rng_state()
    assert len(whole) == len(dls.train)
    for i in range(1, len(whole)):
        set_pass_start(dls, start)
        first,position = run(ResumableFeed(dls, track_workers=True), i)
        set_seed(i)                                           # whoever goes on knows nothing but the position
        then,position = run(ResumableFeed(other := make_dls(**kwargs), position, track_workers=True), i+1)
        set_seed(i+1)
        rest,_ = run(ResumableFeed(other, position, track_workers=True))
        assert first+then+rest == whole
        assert str(get_rng_state()) == str(after)             # and the pass after this one is the same, too

def test_what_is_done_is_not_loaded():
    dls = make_dls(n=20)
    _,position = run(ResumableFeed(dls), 3)
    dls.train.dataset.loaded.clear()
    run(ResumableFeed(dls, position))
    assert len(dls.train.dataset.loaded) == 20-3*4

def test_the_loader_is_left_as_it_was():
    dls = make_dls(workers=2)
    _,position = run(ResumableFeed(dls, track_workers=True), 2)
    before = set(vars(dls.train)) | set(vars(dls.train.fake_l))
    run(ResumableFeed(dls, position, track_workers=True))
    assert (set(vars(dls.train)) | set(vars(dls.train.fake_l))) == before

def test_a_position_is_plain_data(tmp_path):
    "It can be read without running code"
    _,position = run(ResumableFeed(make_dls(workers=2), track_workers=True), 3)
    torch.save(position, tmp_path/'position.pth')
    back = torch.load(tmp_path/'position.pth', weights_only=True)
    assert str(back) == str(position)

def test_rng_state():
    def draw(): return random.random(),np.random.rand(),torch.rand(1).item()
    state = get_rng_state()
    numbers = draw()
    assert draw() != numbers
    set_rng_state(state)
    assert draw() == numbers
