import hashlib
import json
import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from _samples import sample, split, write

from scvi_core.config import GenesConfig, InputConfig
from scvi_core.files import UserError, sha256_text
from scvi_core.preprocess import samples as sample_files
from scvi_core.preprocess import store
from scvi_core.preprocess.genes import select_genes
from scvi_core.preprocess.store import read_store, write_store


def make(n, name, batch="b", seed=0, top=5, **more):
    return sample(np.random.default_rng(seed).poisson(0.7, (n, 40)) * top, name, batch, **more)


def table(selected=range(10, 30), g=40):
    ids = [f"G{i}" for i in range(g)]
    return pd.DataFrame(
        {"gene_id": ids, "gene_name": [f"N{i}" for i in range(g)], "selected": np.isin(range(g), selected)}
    )


def tree(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def two(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_files, "CHUNK", 150)
    monkeypatch.setattr(store, "ZARR_CHUNK", 100)
    extra = {"age": ["07"] * 30, "dose": ["1.5"] * 30, "site": pd.Categorical(["lung"] * 30), "score": np.arange(30.0)}
    first = make(30, "s2", "x", **extra)
    # other gene order, another sample's columns
    order = [f"G{i}" for i in reversed(range(40))]
    extra = {"age": ["8"] * 20, "dose": ["2"] * 20, "site": ["gut"] * 20, "score": np.arange(20.0), "label": ["1"] * 20}
    second = make(20, "s1", "y", seed=1, top=400, **extra)[:, order].copy()
    second.X.sort_indices()
    keeps = [np.arange(30) % 3 > 0, np.arange(20) != 5]
    return [first, second], keeps, write(tmp_path / "samples", [first, second], keeps)


def test_store_holds_kept_cells_and_selected_genes(tmp_path, two):
    adatas, keeps, (h5ads, qcs) = two
    decisions = write_store(tmp_path / "counts.zarr", h5ads, qcs, table(), metadata=("score", "label"))
    made = ad.read_zarr(tmp_path / "counts.zarr")
    kept = [a[k] for a, k in zip(adatas, keeps, strict=True)]
    assert list(made.obs_names) == [i for a in kept for i in a.obs_names]
    assert list(made.var_names) == [f"G{i}" for i in range(10, 30)] and list(made.var["gene_name"][:2]) == [
        "N10",
        "N11",
    ]
    expected = np.vstack([a[:, made.var_names].X.toarray().astype(int) for a in kept])
    assert made.X.format == "csr" and made.X.dtype == np.uint16 and (made.X.toarray() == expected).all()
    assert made.X.has_sorted_indices
    totals = np.concatenate([np.asarray(a.X.astype(int).sum(axis=1)).ravel() for a in kept])
    assert (made.obs["n_counts"] == totals).all() and made.obs["n_counts"].dtype == np.int64
    assert list(made.obs.columns) == [
        *(*store.FIXED_OBS, "age", "dose", "site", "score", "label"),
        *store.JUDGED_OBS,
    ]
    assert list(made.obs["batch"].cat.categories) == ["x", "y"] and list(made.obs["sample"].cat.categories) == [
        "s2",
        "s1",
    ]
    assert made.obs["dose"].dtype == np.float64 and made.obs["score"].dtype == np.float64
    assert made.obs["age"].dtype == "category" and set(made.obs["age"]) == {"07", "8"}  # 07 is a name
    assert made.obs["label"].dtype == "category" and made.obs["label"].isna().sum() == 20
    assert {d.what for d in decisions} >= {"column dose", "column label", "stored_as"}
    samples = json.loads(made.uns["samples"])
    assert list(samples) == ["s2", "s1"] and made.uns["organism"] == "human"
    assert samples["s2"] == {
        "content_sha256": adatas[0].uns["content_sha256"],
        "kept_sha256": sha256_text("\n".join(kept[0].obs_names)),
        "n_cells": 20,
        "n_cells_total": 30,
    }
    again = read_store(tmp_path / "counts.zarr")
    assert (again.X != made.X).nnz == 0 and again.obs.equals(made.obs)


def test_same_input_same_bytes(tmp_path, two):
    _, _, (h5ads, qcs) = two
    for name in "ab":
        write_store(tmp_path / name, h5ads, qcs, table())
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_smallest_type_is_of_what_is_stored(tmp_path):
    X = np.ones((5, 40), int)
    X[0, 0] = 70000  # of a gene that is not selected
    h5ads, qcs = write(tmp_path, [sample(X, "s")])
    write_store(tmp_path / "z", h5ads, qcs, table())
    assert read_store(tmp_path / "z").X.dtype == np.uint8


def test_cells_without_selected_genes_are_left_out_and_said(tmp_path):
    X = np.random.default_rng(0).poisson(1, (12, 40)) + 1
    X[[2, 11], 10:30] = 0
    h5ads, qcs = write(tmp_path, [sample(X, "s")])
    decisions = write_store(tmp_path / "z", h5ads, qcs, table())
    made = read_store(tmp_path / "z")
    assert made.n_obs == 10 and not {"s:c2", "s:c11"} & set(made.obs_names)
    said = next(d for d in decisions if d.what == "cells_without_selected_genes")
    assert (said.sample, said.n_cells) == ("s", 2)
    record = json.loads(made.uns["samples"])["s"]
    assert record["n_cells"] == 10 and record["kept_sha256"] == sha256_text("\n".join(made.obs_names))


def test_refusals_leave_the_earlier_store(tmp_path):
    h5ads, qcs = write(tmp_path / "in", [make(9, "s1"), make(9, "s2", "y", seed=1)])
    write_store(tmp_path / "z", h5ads, qcs, table())
    before = tree(tmp_path / "z")
    with pytest.raises(UserError, match="no gene is selected"):
        write_store(tmp_path / "z", h5ads, qcs, table([]))
    X = np.zeros((9, 40), int)
    X[:, 0] = 1
    h5ads, qcs = write(tmp_path / "other", [make(9, "s1"), sample(X, "s2")])
    with pytest.raises(UserError, match="sample s2: no kept cell has a count of a selected gene"):
        write_store(tmp_path / "z", h5ads, qcs, table())
    X[0, 20] = 1
    h5ads, qcs = write(tmp_path / "lone", [make(9, "s1"), sample(X, "s2", "lone")])
    with pytest.raises(UserError, match="batch 'lone': a single cell is left"):
        write_store(tmp_path / "z", h5ads, qcs, table())
    assert tree(tmp_path / "z") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "lone", "other", "z"]


def test_organism(tmp_path):
    parts = [make(5, "s1"), make(5, "s2", organism="unknown"), make(5, "s3", organism="mouse")]
    h5ads, qcs = write(tmp_path, parts)
    write_store(tmp_path / "z", h5ads[:2], qcs[:2], table())
    assert read_store(tmp_path / "z").uns["organism"] == "human"
    decisions = write_store(tmp_path / "z", h5ads, qcs, table())
    assert read_store(tmp_path / "z").uns["organism"] == "unknown" and any(d.what == "organism" for d in decisions)


@pytest.mark.parametrize(
    "damage", ["absent", "empty", "X/data/0", "X/data/1", "X/indices/0", "X/indptr/0", "obs/n_counts", "uns"]
)
def test_damaged_store_is_refused(tmp_path, two, damage):
    _, _, (h5ads, qcs) = two
    path = tmp_path / "z"
    write_store(path, h5ads, qcs, table())
    if damage in ("absent", "empty"):
        shutil.rmtree(path)
        if damage == "empty":
            path.mkdir()
    elif (path / damage).is_dir():
        shutil.rmtree(path / damage)
    else:
        (path / damage).unlink()
    remedy = r"z: (no such store; run|damaged, .* remove it and run again:) `scvi-core store`"
    with pytest.raises(UserError, match=remedy):
        read_store(path)


def test_real_data(tmp_path, real_data):
    parts = split(ad.read_h5ad(real_data("baron_human_pancreas.h5ad")), "batch")
    h5ads, qcs = write(tmp_path, parts)
    genes, _ = select_genes(h5ads, qcs, InputConfig(), GenesConfig(n_top=500))
    write_store(tmp_path / "z", h5ads, qcs, genes)
    made = read_store(tmp_path / "z")
    assert made.shape == (2142, 500)
    assert (made.X.astype(int) != ad.concat(parts)[:, made.var_names].X.astype(int)).nnz == 0
