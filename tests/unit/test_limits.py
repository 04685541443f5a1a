"""The default limits drop damaged cells and no type: cells of known types, one of them changed."""

import numpy as np
import pytest
from _samples import sample, write_sample

from scvi_core.config import QcConfig
from scvi_core.preprocess.qc import qc

MITO = [f"MT-{name}" for name in "ND1 ND2 ND3 ND4 ND5 ND6 CO1 CO2 CO3 ATP6 ATP8 CYB ND4L".split()]  # noqa: SIM905
PLAIN = QcConfig(doublets=False, cell_cycle=False)
RARE = 20


def tissue(seed=0, n=400, n_genes=11_000, total=3000):
    """(counts, names, whether of the rare type): four types of `n` cells, the last of `RARE`."""
    rng = np.random.default_rng(seed)
    names = np.array([*MITO, "HBA1", "HBA2", "HBB", "MALAT1", *(f"RPL{i}" for i in range(3, 23))])
    names = np.append(names, [f"G{i}" for i in range(n_genes - len(names))])
    rates = rng.gamma(0.3, 1, n_genes) * np.exp(rng.normal(0, 1, (4, n_genes)) * (rng.random((4, n_genes)) < 0.2))
    rates[:, :13] = 0
    rates /= rates.sum(axis=1, keepdims=True)
    kind = np.minimum(np.arange(n) % 3 + 3 * (np.arange(n) >= n - RARE), 3)
    X = rng.poisson(rates[kind] * rng.lognormal(np.log(total), 0.3, (n, 1)))
    X[:, :13] = rng.poisson(X.sum(axis=1)[:, None] * rng.lognormal(np.log(0.03 / 13), 0.3, (n, 1)), (n, 13))
    return X, names, kind == 3


def judged(tmp_path, X, names, config=PLAIN):
    write_sample(tmp_path / "counts.h5ad", sample(X, gene_ids=names))
    frame, made = qc(tmp_path / "counts.h5ad", config, 0)
    return frame, {d.what: d for d in made}


def damage(X, rng, share=0.1):
    """Take over half of what is not mitochondrial from some cells, so that the mitochondria's share rises; which."""
    hurt = rng.random(len(X)) < share
    left = rng.uniform(0.1, 0.4, len(X))
    X[hurt, 13:] = rng.binomial(X[hurt, 13:], left[hurt, None])
    X[hurt, :13] *= 3
    return hurt


def secretory(X, rng):
    total = X.sum(axis=1)
    X[:, 13:] = rng.binomial(X[:, 13:], 0.3)
    X[:, 50:55] = rng.multinomial(1, np.ones(5) / 5) + rng.poisson(0.14 * total[:, None], (len(X), 5))


def red(X, rng):
    X[:] = rng.binomial(X, 60 / 3000)
    X[:, 13:16] = rng.poisson(400, (len(X), 3))


def large(X, rng):
    X *= 8


def small(X, rng):
    X[:] = rng.binomial(X, 1 / 9)


def heart(X, rng):
    X[:, :13] *= 12


@pytest.mark.parametrize("change", [secretory, red, large, small, heart])
def test_a_rare_type_is_kept_and_the_damaged_go(tmp_path, change):
    X, names, rare = tissue()
    rng = np.random.default_rng(1)
    X = X.astype(np.int64)
    part = X[rare]
    change(part, rng)
    X[rare] = part
    common = X[~rare]
    hurt = damage(common, rng)
    X[~rare] = common
    frame, made = judged(tmp_path, X, names)
    keep = frame["keep"].to_numpy()
    assert keep[rare].mean() >= 0.8
    assert keep[~rare][~hurt].mean() >= 0.99 and keep[~rare][hurt].mean() <= 0.1
    flag = {secretory: "high_top50", large: "high_counts"}.get(change)
    assert flag is None or frame["flags"][rare].str.contains(flag).mean() > 0.8
    assert (change is heart) == ("rich_in_mitochondria" in made)


def test_a_users_own_limit_spares_none(tmp_path):
    X, names, rare = tissue()
    X[rare, :13] *= 12
    frame, _ = judged(tmp_path, X, names, PLAIN.model_copy(update={"max_pct_mito": 10.0}))
    assert not frame["keep"][rare].any() and frame["keep"][~rare].all()


def test_a_panels_limits_are_scaled_and_said(tmp_path):
    X, names, _ = tissue()
    genes = np.arange(100, 600)
    frame, made = judged(tmp_path, X[:, genes], names[genes])
    measured = int((X[:, genes].sum(axis=0) > 0).sum())
    assert made["panel"].value == measured
    assert made["low_counts.min_counts"].value == pytest.approx(200 * measured / 10_000)
    assert frame["n_counts"].median() < 200 and frame["keep"].mean() > 0.99


def test_nuclei_are_recognised_and_cells_are_not(tmp_path):
    X, names, _ = tissue(total=1200)
    assert "nuclei" not in judged(tmp_path, X, names)[1]
    X[:, :13] = np.random.default_rng(0).binomial(X[:, :13], 0.1)
    X = np.random.default_rng(0).binomial(X, 0.25)
    X[:, names == "MALAT1"] = 20
    X[0, :13] = 20  # cytoplasm
    frame, made = judged(tmp_path, X, names)
    scale = min(1, (X.sum(axis=0) > 0).sum() / 10_000)
    assert made["nuclei"].value is True and made["low_counts.min_counts"].value == pytest.approx(100 * scale, abs=1e-3)
    assert frame["keep"][1:].all() and "high_mito" in frame["flags"][0]


def test_a_median_of_many_mitochondria_is_warned_of(tmp_path):
    X, names, _ = tissue()
    X[:, :13] *= 15
    _, made = judged(tmp_path, X, names)
    assert made["mitochondrial_share"].warning and made["mitochondrial_share"].value > 20


def test_preview_shows_what_each_limit_takes_and_of_which_labels(tmp_path, capsys):
    from scvi_core.cli import app

    X, names, rare = tissue()
    X[rare, :13] = 400
    data = sample(X, gene_ids=names, kind_of_cell=np.where(rare, "odd", "plain"))
    data.write_h5ad(tmp_path / "own.h5ad")  # not as ingest writes it
    before = sorted(tmp_path.iterdir())
    config = '{"qc": {"max_pct_mito": 30}}'
    words = ["qc", str(tmp_path / "own.h5ad"), "--preview", "--by", "kind_of_cell", "--config", config]
    app(words, standalone_mode=False)
    said = capsys.readouterr().out
    assert "380 of 400 cells would be kept" in said and sorted(tmp_path.iterdir()) == before
    rows = {words[0]: words[1:] for line in said.splitlines() if (words := line.split())}
    assert rows["high_mito.max_pct_mito"] == ["30.0000", "20", "0", "yes"]  # none alone: high_top50, too
    assert rows["odd"][:3] == ["20", "20", "100.0"] and rows["plain"][:3] == ["380", "0", "0.0"]
