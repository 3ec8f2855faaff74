"Spherical k-means against scikit-learn, against itself in several processes, and where clusters are empty."
import numpy as np, pytest, torch, torch.nn.functional as F
from sklearn.cluster import KMeans
from helpers import rounding
from self_supervised_swav.collectives import world
from self_supervised_swav.kmeans import spherical_kmeans
from test_distributed import run_ranks

def groups(n=20, k=5, d=16, spread=.05, seed=0, dtype=torch.double):
    "`k` groups of `n` unit vectors each, in a random order, and the group of each"
    gen = torch.Generator().manual_seed(seed)
    centers = torch.linalg.qr(torch.randn(d, d, dtype=dtype, generator=gen))[0][:k]
    x = F.normalize(centers.repeat_interleave(n, 0)+spread*torch.randn(n*k, d, dtype=dtype, generator=gen), dim=1)
    order = torch.randperm(n*k, generator=gen)
    return x[order],torch.arange(k).repeat_interleave(n)[order]

def inertia(x, labels):
    "Squared distances to the means of the clusters"
    return sum((x[labels==c]-x[labels==c].mean(0)).square().sum() for c in labels.unique()).item()

@pytest.mark.parametrize('seed', range(5))
def test_equals_sklearn(seed):
    "The same start on separated groups: the same partition, and so the same inertia"
    x,_ = groups(seed=seed)
    init = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:5]]
    ref = KMeans(5, init=init.numpy(), n_init=1, max_iter=1, algorithm='lloyd').fit(x.numpy())
    one = spherical_kmeans(x, 5, n_iters=1, init=init)[0]
    counts = np.bincount(KMeans(5, init=init.numpy(), n_init=1, max_iter=1).fit_predict(x.numpy()), minlength=5)
    assert counts.min()>0
    # one step: the same sums, scaled to unit norm instead of to means; n terms of size 1 each
    torch.testing.assert_close(one, F.normalize(torch.tensor(ref.cluster_centers_), dim=1),
                               atol=rounding(torch.double, 2*len(x), 1.), rtol=0)

@pytest.mark.parametrize('seed', range(5))
def test_finds_groups(seed):
    x,truth = groups(seed=seed)
    start = torch.stack([x[truth==c][0] for c in range(5)])
    prototypes,labels,cosines = spherical_kmeans(x, 5, init=start)
    ref = KMeans(5, init=start.numpy(), n_init=1).fit(x.numpy())
    assert torch.equal(labels, torch.tensor(ref.labels_).long())
    assert inertia(x, labels)==pytest.approx(ref.inertia_, rel=1e-5)
    torch.testing.assert_close((x*prototypes[labels]).sum(1), cosines)

def test_mean_cosine_never_falls():
    x = F.normalize(torch.randn(300, 8, dtype=torch.double), dim=1)
    means = [spherical_kmeans(x, 12, n_iters=n, seed=3)[2].mean().item() for n in range(1, 15)]
    # a mean of n cosines, each a dot product of d terms
    assert all(b>=a-rounding(torch.double, 300+8) for a,b in zip(means, means[1:]))

def test_empty_clusters_are_seeded_again():
    x,truth = groups()
    prototypes,labels,_ = spherical_kmeans(x, 5, init=x[:1].repeat(5,1))
    assert len(labels.unique())==5 and torch.allclose(prototypes.norm(dim=1), torch.ones(5, dtype=torch.double))

def test_vectors_that_cancel_out():
    x = torch.tensor([[1.,0],[-1,0]])
    prototypes,labels,_ = spherical_kmeans(x, 1, init=torch.tensor([[0.,1]]))
    assert prototypes.isfinite().all() and prototypes.tolist()==[[0.,1.]]

def test_any_block(monkeypatch):
    from self_supervised_swav import kmeans
    x,_ = groups(dtype=torch.float32)
    whole = spherical_kmeans(x, 7)
    monkeypatch.setattr(kmeans, '_n_block', 20)
    for a,b in zip(spherical_kmeans(x, 7), whole): torch.testing.assert_close(a, b)

def _uneven(size): return [30,50,20][:size]

def _start(k, n_empty, n):
    """Prototypes to begin with, `n_empty` of them with no vector near; None for vectors at random.

    Each group has a prototype of its own; the others point away from a group, so that no cosine is close to another."""
    if not n_empty: return None
    x,truth = groups(n=n)
    own = torch.stack([x[truth==c][0] for c in range(5)])
    return torch.cat([own, -own[:n_empty]])

def _part(rank, size, k, n_empty):
    n = _uneven(size)
    x,_ = groups(n=sum(n)//5)
    part = x[sum(n[:rank]):sum(n[:rank+1])]
    return spherical_kmeans(part, k, init=_start(k, n_empty, sum(n)//5), seed=1, group=world())

@pytest.mark.parametrize('size,k,n_empty', [
    (2,5,0), (3,7,2), *(pytest.param(*o, marks=pytest.mark.slow) for o in ((3,12,0), (2,6,1)))])
def test_processes_equal_one(size, k, n_empty, tmp_path):
    "Uneven parts, with and without empty clusters, which begin anew at the same vectors on every rank"
    got,n = run_ranks(_part, size, tmp_path, k, n_empty),_uneven(size)
    x,_ = groups(n=sum(n)//5)
    init = _start(k, n_empty, sum(n)//5)
    if n_empty: assert len((x@init.T).argmax(1).unique())==k-n_empty
    prototypes,labels,cosines = spherical_kmeans(x, k, init=init, seed=1)
    if n_empty: assert len(labels.unique())==k
    for p,*_ in got: torch.testing.assert_close(p, prototypes, atol=1e-5, rtol=0)
    for p,*_ in got: assert torch.equal(p, got[0][0])
    assert torch.equal(torch.cat([o[1] for o in got]), labels)
    torch.testing.assert_close(torch.cat([o[2] for o in got]), cosines, atol=1e-5, rtol=0)

@pytest.mark.parametrize('kwargs,says', [(dict(k=0),'k must be a whole number between'),
                                         (dict(k=9),'number of vectors, 8, got 9'),
                                         (dict(k=2,n_iters=0),'n_iters must be a whole number, at least 1'),
    (dict(k=2,init=torch.zeros(3,4)),r'init must have the shape \(2, 4\)')])
def test_bad_settings(kwargs, says):
    with pytest.raises(ValueError, match=says): spherical_kmeans(F.normalize(torch.randn(8, 4), dim=1), **kwargs)
