"The queue against a plain list"
import pytest, torch
from hypothesis import strategies as st
from fuzz import fuzz
from self_supervised_swav.queue import FeatureQueue

@fuzz(300, n_crops=st.integers(1, 3), length=st.integers(1, 12), dim=st.integers(1, 3),
       pushes=st.lists(st.integers(0, 30), max_size=12),
       dtype=st.sampled_from([torch.float32, torch.float64, torch.half]))
def test_is_the_last_rows(n_crops, length, dim, pushes, dtype):
    "After any pushes: the last `length` rows that came, as a set in the order of a ring; full when as many have come"
    queue,came = FeatureQueue(n_crops, length, dim),torch.zeros(n_crops, 0, dim)
    for i,n in enumerate(pushes):
        x = torch.arange(n_crops*n*dim, dtype=dtype).view(n_crops, n, dim)+100*i
        if i%2: x = x.flip(1)
        queue.push(x)
        came = torch.cat([came, x.float()], 1)
        assert queue.full==(came.shape[1]>=length)
    want,n = torch.zeros(n_crops, length, dim),came.shape[1]
    for i in range(max(0, n-length), n): want[:,i%length] = came[:,i]
    assert torch.equal(queue.features, want)
    again = FeatureQueue()
    again.load_state_dict(queue.state_dict())
    assert torch.equal(again.features, want) and again.full==queue.full

def test_resize_forgets_only_another_size():
    queue = FeatureQueue(1, 4, 2)
    queue.push(torch.ones(1, 4, 2))
    queue.resize(1, 4, 2)
    assert queue.full and queue.features.all()
    queue.resize(1, 4, 3)
    assert not queue.full and not queue.features.any()

@pytest.mark.parametrize('x', [torch.zeros(2,3), torch.zeros(2,3,4), torch.zeros(1,3,5), torch.zeros(2,3,4,1)])
def test_wrong_shapes(x):
    with pytest.raises(ValueError, match=r'x must have the shape \(2,B,5\)'): FeatureQueue(2, 6, 5).push(x)
    with pytest.raises(ValueError, match='length must be a whole number, at least 0, got -1'):
        FeatureQueue().resize(1, -1, 2)
