import pytest, torch
from fastai.torch_core import TensorCategory, TensorImage
from torch.nn.functional import normalize
from self_supervised_swav.knn import linked_groups, near_duplicates, nearest_neighbors, weighted_knn

def full_votes(features, bank, labels, k, temp, n_classes):
    "The formula as written, one image at a time, in float64"
    res = torch.zeros(len(features), n_classes, dtype=torch.float64)
    sims = normalize(features.double(), dim=1) @ normalize(bank.double(), dim=1).T
    for row, sim in zip(res, sims):
        top = sim.argsort(descending=True)[:k]
        w = (sim[top]/temp).exp()
        for i, v in zip(top, w/w.sum()): row[labels[i]] += v
    return res

@pytest.mark.parametrize('n,N,k,chunk', [(1,1,1,1), (7,50,20,3), (33,64,64,16), (10,41,5,1000), (5,40,20,20)])
@pytest.mark.parametrize('temp', [.07, 1.])
def test_equals_definition(n, N, k, chunk, temp):
    g = torch.Generator().manual_seed(n)
    f, b, y = torch.randn(n, 6, generator=g), torch.randn(N, 6, generator=g), torch.randint(0, 4, (N,), generator=g)
    votes = weighted_knn(f, b, y, k=k, temp=temp, n_classes=5, chunk=chunk)
    torch.testing.assert_close(votes.double(), full_votes(f, b, y, k, temp, 5), atol=2e-6, rtol=0)

def test_an_image_is_no_neighbor_of_its_own():
    "Its row is left out wherever the blocks end; -1 leaves out nothing"
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    sims = normalize(x.double(), dim=1) @ normalize(x.double(), dim=1).T
    for chunk in (7, 25, 4096):
        own = torch.arange(50).where(torch.arange(50)%3 > 0, -1)
        want = sims.clone()
        want[own >= 0, own[own >= 0]] = -torch.inf
        got, idxs = nearest_neighbors(x, x, 9, chunk, own)
        # a float32 cosine: 6 products, two norms, none above 1
        eps = 16*torch.finfo(torch.float32).eps
        torch.testing.assert_close(got.double(), want.gather(1, idxs), atol=eps, rtol=0)
        torch.testing.assert_close(got.double(), want.topk(9, 1).values, atol=eps, rtol=0)
        assert all(len(set(o)) == 9 for o in idxs.tolist())
    assert not (nearest_neighbors(x, x, 49, own=range(50))[1] == torch.arange(50)[:, None]).any()
    with pytest.raises(ValueError, match="k must be between 1 and the bank's 49 rows but its own, got 50"):
        nearest_neighbors(x, x, 50, own=range(50))
    with pytest.raises(ValueError, match='own must hold one row number of the bank, less than 50, for each of the 50'):
        nearest_neighbors(x, x, 3, own=[1, 2])

def test_no_overflow():
    "exp(1/0.001) is no float32"
    f = torch.eye(3)
    assert torch.equal(weighted_knn(f, f, torch.arange(3), k=3, temp=1e-3), f)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    f = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    votes = weighted_knn(f, f, torch.arange(20, dtype=torch.uint8), k=3, temp=.01)
    assert votes.dtype == torch.float32 and (votes.argmax(1) == torch.arange(20)).all()

def test_memory_is_that_of_a_block(monkeypatch):
    "No product is larger than chunk x chunk"
    sizes, matmul = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, '__matmul__', lambda a, b: sizes.append(a.shape[0]*b.shape[1]) or matmul(a, b))
    nearest_neighbors(torch.randn(500, 4), torch.randn(700, 4), k=20, chunk=64)
    assert max(sizes) <= 64*64 and sum(sizes) == 500*700

def test_fastai_types():
    "Features and labels that a fastai DataLoader gave; the votes are a plain tensor"
    f, y = TensorImage(torch.randn(9, 4)), TensorCategory(torch.arange(9))
    votes = weighted_knn(f, f, y, k=3, temp=.01)
    assert type(votes) is torch.Tensor and (votes.argmax(1) == torch.arange(9)).all()

def test_no_images():
    assert weighted_knn(torch.zeros(0, 4), torch.randn(9, 4), torch.arange(9), k=3).shape == (0, 9)

ok = dict(features=torch.ones(2, 3), bank=torch.ones(4, 3), labels=torch.arange(4), k=2)
@pytest.mark.parametrize('err,msg,kw', [
    (ValueError, 'features must have 2', dict(features=torch.ones(3))),
    (ValueError, 'bank must have 2', dict(bank=torch.ones(4, 3, 1))),
    (ValueError, 'features must be finite', dict(features=torch.full((2, 3), float('nan')))),
    (ValueError, 'same width', dict(features=torch.ones(2, 4))),
    (ValueError, 'labels must hold one', dict(labels=torch.arange(3))),
    (TypeError, 'labels must be integers', dict(labels=torch.ones(4))),
    (ValueError, 'got -1', dict(labels=torch.tensor([0, 1, -1, 2]))),
    (ValueError, 'n_classes=3, got 3', dict(n_classes=3)),
    (ValueError, 'k must be', dict(k=0)), (ValueError, 'k must be', dict(k=5)),
    (ValueError, 'temp must be positive, got 0', dict(temp=0)),
    (ValueError, 'temp must be positive', dict(temp=float('nan'))),
    (ValueError, 'chunk must be positive', dict(chunk=0))])
def test_errors(err, msg, kw):
    with pytest.raises(err, match=msg): weighted_knn(**{**ok, **kw})

def near_pairs(x, threshold):
    "The definition: all pairs, in float64"
    x = normalize(x.double(), dim=1)
    return {(i, j): float(x[i] @ x[j]) for i in range(len(x)) for j in range(i+1, len(x)) if x[i] @ x[j] >= threshold}

@pytest.mark.parametrize('chunk', [1, 7, 64, 1000])
def test_near_duplicates_equal_definition(chunk):
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    x[40:50] = x[3:13]*torch.linspace(.1, 9, 10)[:, None]  # the same direction: the length does not count
    pairs, sims = near_duplicates(x, .9, chunk=chunk)
    want = near_pairs(x, .9)
    assert sorted(map(tuple, pairs.tolist())) == sorted(want) and len(want) >= 10
    eps = 16*torch.finfo(torch.float32).eps  # a float32 cosine: 5 products, two norms, none above 1
    for p, s in zip(pairs.tolist(), sims.tolist()): assert abs(want[tuple(p)]-s) <= eps
    assert (sims.diff() <= 0).all()
    best = near_duplicates(x, .9, max_pairs=3, chunk=chunk)[1]
    torch.testing.assert_close(best, sims[:3], atol=eps, rtol=0)

def test_near_duplicates_of_a_collapsed_encoder_stay_few():
    "All pairs are alike; only as many are kept as were asked for"
    pairs, sims = near_duplicates(torch.ones(300, 4), max_pairs=50, chunk=32)
    assert pairs.shape == (50, 2) and (pairs[:, 0] < pairs[:, 1]).all() and len(set(map(tuple, pairs.tolist()))) == 50
    assert len(near_duplicates(torch.zeros(5, 4))[0]) == 0, 'zero has no direction'

@pytest.mark.parametrize('msg,kw', [('threshold must be between 0 and 1, got 1', dict(threshold=1)),
    ('max_pairs must be positive, got 0', dict(max_pairs=0)), ('chunk must be positive, got 0', dict(chunk=0))])
def test_near_duplicates_errors(msg, kw):
    with pytest.raises(ValueError, match=msg): near_duplicates(torch.ones(3, 2), **kw)

def test_linked_groups():
    assert linked_groups(torch.tensor([[4, 9], [0, 1], [9, 2], [7, 8], [2, 4]])) == [[2, 4, 9], [0, 1], [7, 8]]
    assert linked_groups([]) == [] and linked_groups(torch.empty(0, 2, dtype=torch.long)) == []
