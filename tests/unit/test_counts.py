import dataclasses

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from _data import cells, choose, packed

from scvi_core import criticism
from scvi_core.counts import Counts, Schema, content_digest, pack, unsigned
from scvi_core.files import UserError
from scvi_core.kernels import native


@pytest.fixture(params=["compiled", "plain"])
def how(request, monkeypatch):
    choose(request.param, monkeypatch)
    return request.param


def adata_of(x, batch=None):
    n, g = x.shape
    obs = pd.DataFrame({"batch": batch or ["a"] * n}, index=[f"c{i}" for i in range(n)])
    return ad.AnnData(x, obs, pd.DataFrame(index=[f"G{i}" for i in range(g)]))


def bare(adata):
    return pack(adata, Schema.of(adata, None))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("form", ["csr", "csc", "coo", "dense", "float"])
def test_gather_is_the_dense_rows(seed, form, how):
    rng = np.random.default_rng(seed)
    n, g = rng.integers(1, 60), rng.integers(1, 50)
    x = rng.poisson(rng.choice([0.1, 1, 5], (n, g)))
    x[np.arange(n), rng.integers(0, g, n)] += 1
    sparse = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "coo": lambda v: sp.csr_matrix(sp.coo_matrix(v))}
    counts = bare(adata_of(sparse.get(form, lambda v: v.astype(float) if form == "float" else v)(x)))
    rows = rng.integers(0, n, 30)  # any order, some twice
    minibatch = counts.gather(torch.from_numpy(rows))
    dense = minibatch.x.dense()
    assert dense.dtype == torch.float32 and np.array_equal(dense.numpy(), x[rows])
    assert minibatch.library_n.dtype == torch.float32
    assert np.array_equal(minibatch.library_n.numpy(), x[rows].sum(1))
    assert counts.library_n.dtype == torch.float64
    assert np.array_equal(counts.library_n.numpy(), x.sum(1)) and len(counts) == n
    place_m = minibatch.x.rows() * g + minibatch.x.genes_m
    assert np.array_equal(np.sort(place_m.numpy()), np.flatnonzero(x[rows])) and (minibatch.x.x_m > 0).all()
    assert len(minibatch.x) == 30 and np.array_equal(minibatch.x.totals().numpy(), x[rows].sum(1))
    dtypes = [t.dtype for t in (minibatch.x.indptr_n, minibatch.x.genes_m, minibatch.x.x_m)]
    assert dtypes == [torch.int64, torch.int32, torch.float32]
    assert minibatch.covariates_nc.shape == (30, 0)
    none = counts.gather(torch.arange(0))
    assert none.x.dense().shape == (0, g) and none.library_n.shape == (0,) and none.covariates_nc.shape == (0, 0)


@pytest.mark.parametrize("genes", [torch.int16, torch.int32])
@pytest.mark.parametrize("values", [torch.uint8, torch.int16, torch.int32])
def test_gather_of_every_type(genes, values, monkeypatch):
    """Compiled and plain alike, to the ends of the types; rows repeated, cells empty, nothing selected."""
    choose("compiled", monkeypatch)
    rng = np.random.default_rng(0)
    n_genes = 2**16 if genes == torch.int16 else 70_001  # 16-bit numbers have no sign
    lengths = np.array([0, 3, 1, 0, 0, 257, 40, 0])
    column = np.concatenate([np.sort(rng.choice(n_genes, k, replace=False)) for k in lengths])
    column[2], column[3] = n_genes - 1, 0
    most = 2**16 - 1 if values == torch.int16 else torch.iinfo(values).max
    value = rng.integers(1, most, len(column), endpoint=True)
    value[[0, 3, -1]] = most
    n = len(lengths)
    counts = Counts(
        indptr_n=torch.from_numpy(np.concatenate([[0], lengths.cumsum()])),
        genes_m=torch.from_numpy(column).to(genes),
        values_m=torch.from_numpy(value).to(values),
        library_n=torch.arange(n, dtype=torch.float64),
        batch_n=torch.arange(n),
        categories_nc=torch.zeros(n, 0, dtype=torch.int64),
        continuous_nc=torch.zeros(n, 0),
        n_genes=n_genes,
        levels=(),
    )
    expected = sp.csr_matrix((value.astype(np.float32), column, counts.indptr_n.numpy()), shape=(n, n_genes))
    for rows in ([5, 1, 5, 5, 0, 7, 2, 6], [0], [3, 4], [7], [5], [], list(range(n)), rng.integers(0, n, 500)):
        rows_n = torch.tensor(rows, dtype=torch.int64)
        compiled = counts.gather(rows_n)
        with monkeypatch.context() as without:
            without.setattr(native, "library", None)
            plain = counts.gather(rows_n)
            some = counts.subset(rows)
        for name in ("indptr_n", "genes_m", "x_m"):
            ours, theirs = getattr(compiled.x, name), getattr(plain.x, name)
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
        ours = counts.subset(rows)
        assert ours.genes_m.dtype == genes and ours.values_m.dtype == values
        assert all(torch.equal(t, getattr(some, name)) for name, t in vars(ours).items() if isinstance(t, torch.Tensor))
        assert torch.equal(ours.gather(torch.arange(len(rows))).x.x_m, compiled.x.x_m)
        assert torch.equal(compiled.library_n, rows_n.float()) and torch.equal(compiled.batch_n, rows_n)
        small = counts.n_genes * len(rows_n) < 10**6
        assert not small or np.array_equal(compiled.x.dense().numpy(), expected[rows_n.numpy()].toarray())


@pytest.mark.parametrize(
    ("top", "dtype"), [(255, torch.uint8), (256, torch.int16), (65_535, torch.int16), (65_536, torch.int32)]
)
def test_smallest_integers_that_hold_the_counts(top, dtype, how):
    x = np.array([[1, 0, top], [0, 2, 0]])
    for kind in (np.int64, np.float32, np.uint32):
        counts = bare(adata_of(sp.csr_matrix(x.astype(kind))))
        assert counts.values_m.dtype == dtype and counts.genes_m.dtype == torch.int16
        assert np.array_equal(counts.gather(torch.arange(2)).x.dense().numpy(), x)


@pytest.mark.parametrize(("n_genes", "dtype"), [(2**16, torch.int16), (2**16 + 1, torch.int32)])
def test_smallest_integers_that_hold_the_genes(n_genes, dtype, how):
    """The last gene is found again, at the last number that two bytes hold and one beyond."""
    x = sp.csr_matrix(([5, 1, 2], ([0, 0, 1], [n_genes - 1, 0, n_genes - 1])), shape=(2, n_genes))
    counts = bare(adata_of(x))
    assert counts.genes_m.dtype == dtype
    assert np.array_equal(counts.gather(torch.tensor([1, 0])).x.dense().numpy(), x.toarray()[[1, 0]])


def test_numbers_of_16_bits_have_no_sign_for_any_reader():
    x = sp.csr_matrix(([40_000, 1, 65_535], ([0, 0, 1], [39_999, 3, 39_998])), shape=(2, 40_000))
    adata = adata_of(x)
    counts = bare(adata)
    wide = dataclasses.replace(counts, genes_m=unsigned(counts.genes_m), values_m=unsigned(counts.values_m))
    assert counts.values_m.dtype == counts.genes_m.dtype == torch.int16 and wide.values_m.dtype == torch.int32
    assert content_digest(adata, counts) == content_digest(adata, wide)
    assert (criticism._matrix(counts) != x).nnz == 0 and counts.subset([1]).gather(torch.arange(1)).x.x_m == 65_535


def test_subsets_by_mask_and_by_any_whole_numbers():
    counts = bare(adata_of(sp.csr_matrix(np.arange(1, 13).reshape(4, 3))))
    for rows in (np.array([True, False, False, True]), [0, 3], np.array([0, 3], dtype=np.int32)):
        taken = counts.subset(rows)
        assert taken.library_n.tolist() == [6.0, 33.0] and taken.values_m.tolist() == [1, 2, 3, 10, 11, 12]
    with pytest.raises(IndexError):
        counts.subset([4])


def test_untidy_sparse_input(how):
    """Unsorted indices, duplicates (which add up, beyond their type), explicit zeros: counted, not written to."""
    data = np.array([3, 200, 100, 0, 7], dtype=np.uint8)
    x = sp.csr_matrix((data, np.array([2, 0, 0, 1, 1]), np.array([0, 4, 5])), shape=(2, 3))
    before = x.data.copy(), x.indices.copy()
    counts = bare(adata_of(x))
    assert np.array_equal(counts.gather(torch.arange(2)).x.dense().numpy(), [[300, 0, 3], [0, 7, 0]])
    assert counts.indptr_n.tolist() == [0, 2, 3] and (counts.values_m > 0).all()
    assert np.array_equal(x.data, before[0]) and np.array_equal(x.indices, before[1])


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (-1.0, "negative counts"),
        (0.5, "not whole numbers .such as 0.5.: they look normalised"),
        (np.nan, "not finite"),
        (np.inf, "not finite"),
        (2.0**31, "beyond 2"),
    ],
)
@pytest.mark.parametrize("dense", [True, False])
def test_what_is_not_a_count_is_refused(value, match, dense):
    x = np.ones((3, 4))
    x[1, 2] = value
    with pytest.raises(UserError, match=match) as error:
        bare(adata_of(x if dense else sp.csr_matrix(x)))
    assert "\n" not in str(error.value)


def test_other_refusals():
    adata = cells(20)
    schema, _ = packed(adata, ("day",), ("age",))
    with pytest.raises(UserError, match=r"2 of the model's 25 genes are missing .such as 'G3'"):
        pack(adata[:, ~adata.var_names.isin(["G3", "G7"])].copy(), schema)
    twice = adata.copy()
    twice.var_names = ["G0", *adata.var_names[:-1]]
    with pytest.raises(UserError, match="gene names repeat"):
        pack(twice, schema)
    with pytest.raises(UserError, match="no layer 'raw'"):
        pack(adata, schema, layer="raw")
    empty = adata.copy()
    empty.X = empty.X.toarray()
    empty.X[4] = 0
    with pytest.raises(UserError, match=r"1 cells have no counts in the model's genes .such as 'cell4'"):
        pack(empty, schema)
    with pytest.raises(UserError, match="no column 'bach'; did you mean 'batch'"):
        Schema.of(adata, "bach")
    for column, change, match in (
        ("batch", "b9", "'b9' is not one the model was trained on .b0, b1"),
        ("day", "d9", "'d9' is not one the model was trained on"),
        ("batch", None, "1 cells have no value"),
        ("age", np.inf, "not finite"),
    ):
        other = adata.copy()
        other.obs[column] = other.obs[column].astype(object if change is None else other.obs[column].dtype)
        other.obs.loc["cell3", column] = change
        with pytest.raises(UserError, match=match):
            pack(other, schema)
    with pytest.raises(UserError, match="not numbers"):
        Schema.of(adata, None, (), ("day",))
    same = adata.copy()
    same.obs["age"] = 3.0
    with pytest.raises(UserError, match="same value in every cell"):
        Schema.of(same, None, (), ("age",))


def test_codes_are_the_schemas_whatever_cells_come():
    adata = cells(30)
    schema, counts = packed(adata, ("day",), ("age",))
    assert schema.batches == ("b0", "b1") and schema.categorical == {"day": ("d0", "d1", "d2")}
    mean, spread = schema.continuous["age"]
    assert np.isclose(mean, adata.obs["age"].mean()) and np.isclose(spread, adata.obs["age"].std(ddof=0))
    # fewer levels, as categories in another order: same codes
    some = adata[(adata.obs["day"] != "d0").to_numpy()].copy()
    some.obs["day"] = pd.Categorical(some.obs["day"], categories=["d2", "d1"])
    some.obs["batch"] = pd.Categorical(some.obs["batch"], categories=["b1", "b0"])
    rows = np.flatnonzero((adata.obs["day"] != "d0").to_numpy())
    again = pack(some, schema)
    for name in ("batch_n", "categories_nc", "continuous_nc"):
        assert torch.equal(getattr(again, name), getattr(counts, name)[rows])
    covariates = counts.gather(torch.arange(30)).covariates_nc
    assert covariates.shape == (30, 4) and (covariates[:, :3].sum(1) == 1).all()
    assert [f"d{i}" for i in covariates[:, :3].argmax(1)] == list(adata.obs["day"])
    np.testing.assert_allclose(covariates[:, 3].numpy(), (adata.obs["age"] - mean) / spread, rtol=1e-5, atol=1e-6)
    # numbers as batches are text, and JSON brings a schema back
    adata.obs["batch"] = np.arange(30) % 3
    schema = Schema.of(adata, "batch", ("day",), ("age",))
    assert schema.batches == ("0", "1", "2") and Schema.from_dict(dataclasses.asdict(schema)) == schema


def test_unseen_batches_where_they_do_not_matter():
    adata = cells(20)
    schema, _ = packed(adata)
    other = adata.copy()
    other.obs["batch"] = "elsewhere"
    assert pack(other, schema, design=False).batch_n.tolist() == [0] * 20
    del other.obs["batch"]
    assert pack(other, schema, design=False).batch_n.tolist() == [0] * 20
    with pytest.raises(UserError, match="no column 'batch'"):
        pack(other, schema)


def test_genes_in_any_order_and_more_of_them():
    adata = cells(20)
    schema, counts = packed(adata)
    more = ad.concat([adata, adata[:, :3].copy()[:, [2, 1, 0]]], axis=1, merge="same", index_unique=None)
    more.var_names = [*adata.var_names, "X0", "X1", "X2"]
    more.obs = adata.obs
    order = np.random.default_rng(0).permutation(28)
    again = pack(more[:, order].copy(), schema)
    assert torch.equal(again.gather(torch.arange(20)).x.dense(), counts.gather(torch.arange(20)).x.dense())
    view = pack(more[:, order], schema)  # a view does as well
    assert torch.equal(view.values_m, again.values_m) and torch.equal(view.genes_m, again.genes_m)


def test_digests():
    adata = cells(20)
    schema, counts = packed(adata)
    digest = content_digest(adata, counts)
    wide = adata.copy()
    wide.X = wide.X.astype(np.float64)
    assert content_digest(wide, pack(wide, schema)) == digest
    for change in ("name", "count", "batch"):
        other = adata.copy()
        if change == "name":
            other.obs_names = ["renamed", *adata.obs_names[1:]]
        elif change == "count":
            other.X.data[0] += 1
        else:
            other.obs["batch"] = ["b1", *adata.obs["batch"][1:]]
        assert content_digest(other, pack(other, schema)) != digest, change
