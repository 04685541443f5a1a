"""The neighbour graph, clusters and pictures, at sizes on both sides of every number at which something changes."""

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestNeighbors

from scvi_core import cluster as module
from scvi_core.cluster import cluster, connectivities, layout, neighbors
from scvi_core.config import ClusterConfig
from scvi_core.files import Decisions, UserError


def latent(n, seed=0, n_groups=8, n_latent=10):
    """Cells of a few groups of different size, as an embedding has them."""
    rng = np.random.default_rng(seed)
    centre = 1.5 * rng.normal(size=(n_groups, n_latent))
    group = rng.choice(n_groups, n, p=np.arange(1, n_groups + 1) / np.arange(1, n_groups + 1).sum())
    return (centre[group] + 0.5 * rng.normal(size=(n, n_latent))).astype(np.float32), group


def made(decisions):
    return {d.what: d for d in decisions}


@pytest.fixture
def early(monkeypatch):
    """What changes with size does so at sizes that tests can afford; the real ones are seen in tests/workflow."""
    monkeypatch.setattr(module, "EXACT_CELLS", 2_000)
    monkeypatch.setattr(module, "LANDMARKS", 500)
    monkeypatch.setattr(module, "TSNE_CELLS", 2_000)
    monkeypatch.setattr(module, "BLOCK", 1_700)


@pytest.mark.parametrize("n", [300, 3000])
def test_neighbors_are_the_nearest(n):
    z, _ = latent(n)
    near, distance = neighbors(z, 14, 0, 1, Decisions("cluster"))
    true_distance, true = NearestNeighbors(n_neighbors=15, algorithm="kd_tree").fit(z.astype(float)).kneighbors()
    assert (near != np.arange(n)[:, None]).all()
    np.testing.assert_allclose(distance, true_distance[:, :14], rtol=1e-5)
    assert (near == true[:, :14]).mean() > 0.999


def test_cells_on_one_spot():
    z, _ = latent(100)
    z[:40] = z[0]
    near, distance = neighbors(z, 14, 0, 1, Decisions("cluster"))
    assert (near != np.arange(100)[:, None]).all()
    assert (distance[:40] == 0).all()
    weights = connectivities(near, distance)
    assert np.isfinite(weights.data).all()
    found = cluster(z, ClusterConfig(tsne=False), 0, 1, Decisions("cluster"))
    assert np.isfinite(found[["umap_1", "umap_2"]]).all(axis=None)


def test_many_cells_find_their_neighbors_within_the_recall():
    z, _ = latent(24_000)
    decisions = Decisions("cluster")
    near, distance = neighbors(z, 14, 0, 2, decisions)
    rows = np.arange(0, 24_000, 24)
    true = NearestNeighbors(n_neighbors=15, algorithm="brute").fit(z).kneighbors(z[rows])[1][:, 1:]
    recall = np.mean([len(np.intersect1d(a, b)) / 14 for a, b in zip(near[rows], true, strict=True)])
    assert recall >= module.RECALL
    assert "neighbours of 500 cells are found" in made(decisions)["neighbors"].reason
    assert (np.diff(distance) >= 0).all()
    again = neighbors(z, 14, 0, 1, Decisions("cluster"))
    np.testing.assert_array_equal(near, again[0])
    np.testing.assert_array_equal(distance, again[1])


def test_connectivities_are_those_of_scanpy():
    z, _ = latent(2000)
    adata = ad.AnnData(np.zeros((len(z), 1), np.float32), obsm={"latent": z})
    sc.pp.neighbors(adata, n_neighbors=15, use_rep="latent")
    ours = connectivities(*neighbors(z, 14, 0, 1, Decisions("cluster")))
    difference = abs(ours - adata.obsp["connectivities"])
    assert ours.nnz == pytest.approx(adata.obsp["connectivities"].nnz, rel=1e-3)
    assert difference.max() < 1e-3
    assert difference.sum() / ours.sum() < 1e-5


def test_large_and_small_path_agree(early, monkeypatch):
    """The same cells with every switch of size set below and above their number."""
    z, group = latent(6_000)
    config = ClusterConfig(resolutions=(0.3,), tsne="auto")
    decisions = Decisions("cluster")
    large = cluster(z, config, 0, 2, decisions)
    assert {"neighbors", "umap_start", "tsne"} <= set(made(decisions))
    assert large[["tsne_1", "tsne_2"]].isna().all(axis=None)
    monkeypatch.setattr(module, "EXACT_CELLS", 10**9)
    monkeypatch.setattr(module, "LANDMARKS", 10**9)
    decisions = Decisions("cluster")
    small = cluster(z, config, 0, 2, decisions)
    assert not {"neighbors", "umap_start"} & set(made(decisions))
    assert adjusted_rand_score(large["cluster"], small["cluster"]) > 0.9
    assert adjusted_rand_score(large["cluster"], group) > 0.9
    for found in (large, small):  # groups lie apart in the picture
        places = found[["umap_1", "umap_2"]].to_numpy()
        near = NearestNeighbors(n_neighbors=15).fit(places).kneighbors()[1]
        assert (group[near] == group[:, None]).mean() > 0.95


@pytest.mark.parametrize("n", [1_000, 5_000])
def test_the_same_for_any_number_of_threads(early, n):
    z, _ = latent(n)
    config = ClusterConfig(resolutions=(0.5,), tsne=False)
    one, two = (cluster(z, config, 3, threads, Decisions("cluster")) for threads in (1, 2))
    assert one.equals(two)


def test_clusters_are_numbered_by_size_and_pictures_by_the_seed():
    z, group = latent(1200)
    config = ClusterConfig(resolutions=(0.5, 2.0), tsne=True)
    found = cluster(z, config, 0, 1, Decisions("cluster"))
    for name in ("cluster", "cluster_r2"):
        sizes = found[name].value_counts()
        assert list(sizes.sort_index(key=lambda i: i.astype(int))) == sorted(sizes, reverse=True)
    assert adjusted_rand_score(found["cluster"], group) > 0.9
    assert found.equals(cluster(z, config, 0, 1, Decisions("cluster")))
    assert not found["umap_1"].equals(cluster(z, config, 1, 1, Decisions("cluster"))["umap_1"])


def test_a_start_is_taken():
    z, _ = latent(500)
    near, distance = neighbors(z, 14, 0, 1, Decisions("cluster"))
    start = np.stack([np.linspace(-10, 10, 500), np.zeros(500)], axis=1)
    assert not np.array_equal(layout(near, distance, start, 0.5, 0, 1), layout(near, distance, None, 0.5, 0, 1))


def test_pictures_only_where_asked_for():
    z, _ = latent(200)
    found = cluster(z, ClusterConfig(umap=False, tsne=False), 0, 1, Decisions("cluster"))
    assert found[["umap_1", "umap_2", "tsne_1", "tsne_2"]].isna().all(axis=None)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_places_that_are_not_finite_are_refused(value):
    z, _ = latent(300)
    z[7, 3] = value
    with pytest.raises(UserError, match="1 of 300 cells have values that are not finite"):
        cluster(z, ClusterConfig(), 0, 1, Decisions("cluster"))


@pytest.mark.parametrize("z", [np.zeros((60, 5)), np.linspace(0, 1, 60)[:, None]], ids=["one spot", "one dimension"])
def test_a_latent_space_without_two_dimensions(z):
    found = cluster(z.astype(np.float32), ClusterConfig(), 0, 1, Decisions("cluster"))
    assert np.isfinite(found[["umap_1", "umap_2", "tsne_1", "tsne_2"]]).all(axis=None)


def test_more_neighbors_than_landmarks(early):
    z, _ = latent(2_200)
    found = cluster(z, ClusterConfig(n_neighbors=600, tsne=False), 0, 2, Decisions("cluster"))
    assert np.isfinite(found[["umap_1", "umap_2"]]).all(axis=None)


def test_fewer_cells_than_neighbors():
    with pytest.raises(UserError, match=r"cluster\.n_neighbors: 15 neighbours of 15 cells"):
        cluster(latent(15)[0], ClusterConfig(), 0, 1, Decisions("cluster"))
    assert len(cluster(latent(16)[0], ClusterConfig(), 0, 1, Decisions("cluster"))) == 16


def test_a_resolution_that_seeds_agree_on_is_suggested(monkeypatch):
    """Groups far apart are found by every seed; beyond them a split is chance."""
    z = 1.5 * latent(800, n_groups=4)[0]
    told = Decisions("cluster")
    found = cluster(z, ClusterConfig(resolutions=[0.5], umap=False, tsne=False), 0, 1, told)
    at = made(told)["stability"].value
    assert list(at) == ["0.2", "0.3", "0.5", "0.7", "1", "1.4", "2"]
    assert at["0.2"]["agreement"] > 0.99 and at["2"]["agreement"] < 0.95 and at["2"]["clusters"] > at["0.2"]["clusters"]
    best = made(told)["suggested resolution"]
    assert best.value == max(float(r) for r in at if at[r]["agreement"] >= 0.95) and "finest" in best.reason
    monkeypatch.setattr(module, "STABILITY_CELLS", 300)
    again = Decisions("cluster")
    few = cluster(z, ClusterConfig(resolutions=[0.5], umap=False, tsne=False), 0, 1, again)
    assert few.equals(found) and "of 300 random cells" in made(again)["stability"].reason
    monkeypatch.setattr(module, "STABLE", 1.1)
    none = Decisions("cluster")
    cluster(z, ClusterConfig(umap=False, tsne=False), 0, 1, none)
    assert "seeds agree nowhere" in made(none)["suggested resolution"].reason
    off = Decisions("cluster")
    cluster(z, ClusterConfig(umap=False, tsne=False, stability=False), 0, 1, off)
    assert "stability" not in made(off)
