"""Small count data and models, made by code."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scvi_core.config import TrainConfig
from scvi_core.counts import Schema, pack
from scvi_core.kernels import native


def cells(n=60, g=25, seed=0, n_batches=2, rate=0.8):
    """AnnData of raw counts with columns batch, kind (three groups that differ), day and age; no empty cell."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, n)
    effect = np.exp(np.random.default_rng(99).normal(size=(3, g)) * 0.8)
    x = rng.poisson(rng.gamma(2.0, 0.5, (n, g)) * effect[kind] * rate)
    x[:, 0] += 1
    obs = pd.DataFrame(
        {
            "batch": np.array([f"b{i % n_batches}" for i in range(n)]),
            "kind": np.array(["T", "B", "NK"])[kind],
            "day": np.array([f"d{i // 2 % 3}" for i in range(n)]),
            "age": rng.normal(50, 10, n),
        },
        index=[f"cell{i}" for i in range(n)],
    )
    var = pd.DataFrame({"gene_name": [f"Name{i}" for i in range(g)]}, index=[f"G{i}" for i in range(g)])
    return ad.AnnData(sp.csr_matrix(x), obs, var)


def packed(adata, categorical=(), continuous=(), batch_key="batch"):
    """(schema, packed counts)."""
    schema = Schema.of(adata, batch_key, categorical, continuous)
    return schema, pack(adata, schema)


def brief(**more):
    """A training configuration of a second or less, whatever the defaults are."""
    settings = {"max_epochs": 4, "batch_size": 16, "learning_rate": 5e-3, "schedule": "constant", "kl_weight": 1.0}
    return TrainConfig(**{**settings, "kl_warmup": 0.5, "early_stopping": True, "patience": 45, **more})


def choose(how, monkeypatch):
    """Have the compiled kernels do the work, or the plain PyTorch that stands in for them."""
    if how == "plain":
        monkeypatch.setattr(native, "library", None)
    elif native.library is None:
        pytest.skip(f"no compiled kernels: {native.reason}")
