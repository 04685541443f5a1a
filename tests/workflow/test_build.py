"""A real build: the files it leaves, what re-runs when something changes, the same bytes elsewhere, models reused."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from _project import (
    CONFIG,
    GENES,
    N_CELLS,
    SHEET,
    changed,
    cli,
    frame,
    here,
    snakemake,
    tree,
    write_config,
    write_h5ad,
    write_mtx,
    write_sheet,
)  # fmt: skip

from scvi_core.files import Claim, sha256_file

CELLS = (
    "cell_id barcode sample batch n_counts n_genes pct_mito doublet_score cluster umap_1 umap_2 donor age s_score "
    "g2m_score cycle_phase predicted_doublet tsne_1 tsne_2"
)
DE = (
    "group reference gene_id gene_name lfc_mean lfc_median lfc_std lfc_ci_low lfc_ci_high proba_de proba_not_de "
    "bayes_factor scale_group scale_reference raw_mean_group raw_mean_reference nonzero_group nonzero_reference "
    "is_de rank"
)
GENE_TABLE = (
    "gene_id gene_name n_samples n_cells mean variance variances_norm highly_variable_rank "
    "highly_variable_nbatches note selected"
)
QC = (
    "cell_id barcode sample batch n_counts n_genes pct_mito pct_ribo pct_hb pct_top50 doublet_score "
    "predicted_doublet flags keep reason s_score g2m_score cycle_phase"
)


def types(path):
    """Column → type name, in order."""
    return {field.name: str(field.type).removeprefix("large_") for field in pq.read_schema(path)}


def columns(path):
    return " ".join(types(path))


# ---- the files of a build


def test_cells(atlas):
    assert columns(atlas / "cells.parquet") == CELLS
    found = types(atlas / "cells.parquet")
    assert found["n_counts"] == "int64" and found["n_genes"] == "int32" and found["age"] == "int64"
    assert {found[c] for c in ("pct_mito", "doublet_score", "umap_1", "umap_2", "tsne_1", "tsne_2")} == {"float"}
    assert {found[c] for c in ("cell_id", "sample", "batch", "cluster", "donor")} == {"string"}
    cells = pd.read_parquet(atlas / "cells.parquet")
    assert cells["cell_id"].is_unique and (cells["cell_id"].str.split(":").str[0] == cells["sample"]).all()
    assert list(cells["sample"].unique()) == ["a", "b", "c"]  # the sheet's order
    assert np.isfinite(cells[["umap_1", "umap_2", "tsne_1", "tsne_2"]]).all(axis=None)
    assert cells["cluster"].value_counts().is_monotonic_decreasing
    totals = frame(0).sum(axis=1)
    of_a = cells[cells["sample"] == "a"].set_index("cell_id")["n_counts"]
    assert (of_a == totals[[c.removeprefix("a:") for c in of_a.index]].to_numpy()).all()  # of all genes


def test_latent_is_in_the_order_of_cells(atlas):
    assert types(atlas / "latent.parquet") == {"cell_id": "string"} | {f"z_{k}": "float" for k in range(5)}
    latent, cells = (pd.read_parquet(atlas / f"{name}.parquet") for name in ("latent", "cells"))
    assert latent["cell_id"].equals(cells["cell_id"])
    assert np.isfinite(latent.drop(columns="cell_id")).all(axis=None)


def test_genes_and_qc(atlas):
    assert columns(atlas / "genes.parquet") == GENE_TABLE
    genes = pd.read_parquet(atlas / "genes.parquet")
    assert list(genes["gene_id"]) == GENES and genes["selected"].sum() == 100 and genes["selected"].dtype == bool
    for sample in "abc":
        assert columns(atlas / "samples" / sample / "qc.parquet") == QC
        qc = pd.read_parquet(atlas / "samples" / sample / "qc.parquet")
        assert len(qc) == N_CELLS and ((qc["reason"] == "") == qc["keep"]).all()
        counts = ad.read_h5ad(atlas / "samples" / sample / "counts.h5ad")
        assert (counts.X.toarray() == frame("abc".index(sample)).to_numpy()).all()  # all three formats


def test_store(atlas):
    store = ad.read_zarr(atlas / "counts.zarr")
    cells, genes = (pd.read_parquet(atlas / f"{name}.parquet") for name in ("cells", "genes"))
    assert list(store.obs_names) == list(cells["cell_id"])
    assert list(store.var_names) == list(genes["gene_id"][genes["selected"]])
    assert store.X.format == "csr" and store.X.dtype == np.min_scalar_type(int(store.X.max()))
    barcodes = [c.removeprefix("c:") for c in store.obs_names if c.startswith("c:")]
    expected = frame(2).loc[barcodes, list(store.var_names)].to_numpy()
    assert (store[store.obs["sample"] == "c"].X.toarray() == expected).all()


def test_whole_atlas_as_one_file(atlas):
    whole, cells = ad.read_h5ad(atlas / "atlas.h5ad"), pd.read_parquet(atlas / "cells.parquet")
    assert list(whole.obs_names) == list(cells["cell_id"]) and list(whole.var_names) == GENES
    barcodes = [c.removeprefix("c:") for c in whole.obs_names if c.startswith("c:")]
    assert (whole[whole.obs["sample"] == "c"].layers["counts"].toarray() == frame(2).loc[barcodes].to_numpy()).all()
    assert {*whole.obsm} == {"X_scVI", "X_umap", "X_tsne"} and {*whole.obsp} == {"connectivities", "distances"}


def test_de(atlas):
    assert columns(atlas / "de.parquet") == DE
    found = types(atlas / "de.parquet")
    assert {found[c] for c in ("group", "reference", "gene_id", "gene_name")} == {"string"}
    assert found["is_de"] == "bool" and found["rank"].startswith("int")
    assert {t for c, t in found.items() if c.startswith(("lfc", "proba", "bayes", "scale"))} <= {"float", "double"}
    de, cells = pd.read_parquet(atlas / "de.parquet"), pd.read_parquet(atlas / "cells.parquet")
    assert not de.duplicated(["group", "gene_id"]).any()
    assert len(de) == cells["cluster"].nunique() * 100
    assert np.isfinite(de.select_dtypes("number")).all(axis=None)


def test_model_and_reference(atlas):
    card = json.loads((atlas / "model" / "model.json").read_text())
    needed = "format_version model train seed gene_ids gene_names batches software fingerprint metrics weights_sha256"
    assert set(needed.split()) <= set(card)
    genes = pd.read_parquet(atlas / "genes.parquet")
    assert card["gene_ids"] == list(genes["gene_id"][genes["selected"]]) and card["batches"] == ["one", "two"]
    assert card["model"]["n_latent"] == 5 and card["train"]["max_epochs"] == 5 and card["seed"] == 0
    assert card["weights_sha256"] == sha256_file(atlas / "model" / "model.safetensors")
    assert columns(atlas / "model" / "history.parquet").startswith("epoch train_elbo validation_elbo kl_weight")
    reference = json.loads((atlas / "model_ref.json").read_text())
    assert set(reference) == {"registered_name", "version", "run_id", "fingerprint", "reused", "tracking_uri"}
    assert reference["reused"] is False and reference["registered_name"] == "small"
    assert reference["fingerprint"] == card["fingerprint"]


def test_manifest_is_true(atlas):
    manifest = json.loads((atlas / "manifest.json").read_text())
    assert {"files", "software", "config", "seed"} <= set(manifest)
    named = {"cells.parquet", "genes.parquet", "latent.parquet", "de.parquet", "counts.zarr", "model/model.safetensors"}
    named |= {"model/model.json", "model/history.parquet", "metrics.json", "decisions.jsonl", "report.html"}
    named |= {f"samples/{s}/{file}" for s in "abc" for file in ("counts.h5ad", "qc.parquet")}
    named |= {f"criticism/{file}" for file in ("cells.parquet", "checks.json", "de.parquet", "genes.parquet")}
    named |= {"criticism/groups.parquet", "atlas.h5ad"}
    assert set(manifest["files"]) == named
    for name, entry in manifest["files"].items():
        path = atlas / name
        if path.is_dir():
            inside = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
            lines = "".join(f"{sha256_file(p)}  {n}\n" for n, p in sorted(inside.items()))
            assert entry["tree_sha256"] == hashlib.sha256(lines.encode()).hexdigest()
        else:
            assert entry["sha256"] == sha256_file(path) and entry["size"] == path.stat().st_size
    assert str(atlas) not in (atlas / "manifest.json").read_text()


def test_metrics_and_decisions(atlas):
    metrics = json.loads((atlas / "metrics.json").read_text())
    cells = pd.read_parquet(atlas / "cells.parquet")
    assert (metrics["cells"]["before"], metrics["cells"]["after"]) == (3 * N_CELLS, len(cells))
    for column in ("n_counts", "n_genes"):
        assert metrics["cells"][f"median_{column}"] == cells[column].median()
    made = [json.loads(line) for line in (atlas / "decisions.jsonl").read_text().splitlines()]
    steps = list(dict.fromkeys(d["step"] for d in made))
    assert steps[:4] == ["ingest", "qc", "genes", "store"] and all(d["reason"] for d in made)


def test_report_stands_alone(atlas):
    page = (atlas / "report.html").read_text()
    assert "Small &amp; &lt;odd&gt;" in page and "Small & <odd>" not in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)
    assert not re.search(r"@import|url\(\s*['\"]?(?:https?:)?//|\bfetch\(|XMLHttpRequest", page)
    assert set(re.findall(r"""\bsrc\s*=\s*["']?(\w+:)""", page)) <= {"data:"}


# ---- what re-runs


def rerun(folder):
    """Rule → number of jobs that a build would run now."""
    done = snakemake(folder, "-n")
    assert done.returncode == 0, done.stdout + done.stderr
    stats = re.search(r"^job +count\n-.*\n((?:\w+ +\d+\n)*)", done.stdout + done.stderr, re.MULTILINE)
    rows = stats[1].split("\n")[:-1] if stats else []
    return {rule: int(n) for rule, n in map(str.split, rows) if rule not in ("all", "atlas", "total")}


LATE = ["cluster", "cells", "criticism", "de", "export", "register", "report"]
FROM_LOOKUP = ["lookup", "train", "embed", *LATE]
FROM_GENES = ["genes", "store", *FROM_LOOKUP]


def test_a_second_run_does_nothing(built):
    before = tree(built / "results")
    done = snakemake(built)
    assert done.returncode == 0 and "Nothing to be done" in done.stdout + done.stderr
    assert tree(built / "results") == before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"report__title": "Other"}, ["report"]),
        ({"de__fdr": 0.1}, ["de", "report"]),
        ({"registry__name": "other"}, ["export", "register", "report"]),
        ({"export__x": "counts"}, ["export", "report"]),
        ({"registry__tracking_uri": "sqlite:///elsewhere/mlflow.db"}, ["register", "report"]),
        ({"cluster__resolutions": [0.5, 1.0]}, LATE),
        ({"model__n_latent": 4}, FROM_LOOKUP),
        ({"model__decoder": "linear"}, [*FROM_LOOKUP, "loadings"]),
        ({"model__reuse": "never"}, FROM_LOOKUP),
        ({"genes__n_top": 90}, FROM_GENES),
        ({"input__genes": "union"}, FROM_GENES),
        ({"qc__min_counts": 60}, ["qc", *FROM_GENES]),
        ({"input__layer": "raw"}, ["ingest", "qc", *FROM_GENES]),
    ],
    ids=str,
)
def test_a_changed_value_reruns_what_depends_on_it(as_built, change, expected):
    write_config(as_built, changed(CONFIG, **change))
    jobs = rerun(as_built)
    assert sorted(jobs) == sorted(expected)
    assert all(n == (3 if rule in ("ingest", "qc") else 1) for rule, n in jobs.items())


def test_another_name_reruns_what_shows_it(as_built, tmp_path):
    names = tmp_path / "names.tsv"
    names.write_text("cluster\tname\n0\tB cell\n")
    older(names)
    named = changed(CONFIG, annotations=str(names))
    write_config(as_built, named)
    assert rerun(as_built) == {"cells": 1, "export": 1, "report": 1}
    write_config(as_built, changed(named, de__groupby="annotation"))
    assert rerun(as_built) == dict.fromkeys(["cells", "criticism", "de", "export", "report"], 1)


def test_one_samples_metadata_reruns_from_its_ingest(as_built):
    sheet = {column: list(values) for column, values in SHEET.items()}
    sheet["donor"][1] = "d9"
    write_sheet(as_built, sheet)
    assert rerun(as_built) == dict.fromkeys(["ingest", "qc", *FROM_GENES], 1)


@pytest.fixture
def copy(built, tmp_path):
    return shutil.copytree(built, tmp_path / "copy", symlinks=True)


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        ("samples/b/qc.png", ["qc", *FROM_GENES]),
        ("counts.zarr", FROM_GENES[1:]),
        ("model/history.parquet", FROM_LOOKUP),
        ("figures", ["report"]),
    ],
)
def test_a_lost_output_is_made_again(copy, lost, expected):
    path = copy / "results" / "small" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert rerun(copy) == dict.fromkeys(expected, 1)


def older(path):
    """As `cp -p` and `rsync -t` leave what they bring."""
    os.utime(path, (1.6e9, 1.6e9))


def in_the_future(path):
    os.utime(path, (4e9, 4e9))


@pytest.mark.parametrize("change", ["file", "folder", "future"])
def test_another_input_is_noticed_whatever_its_time(copy, change):
    if change == "file":
        write_h5ad(copy / "data" / "a.h5ad", frame(7), cell_type=[f"type{i % 3}" for i in range(N_CELLS)])
        older(copy / "data" / "a.h5ad")
    elif change == "folder":
        write_mtx(copy / "data" / "b", frame(7))  # in place: the folder's own time stays
        older(copy / "data" / "b")
    else:
        for path in (copy / "results").rglob("*"):
            in_the_future(path)
        assert rerun(copy) == {}
        write_h5ad(copy / "data" / "a.h5ad", frame(7), cell_type=[f"type{i % 3}" for i in range(N_CELLS)])
    assert rerun(copy) == dict.fromkeys(["ingest", "qc", *FROM_GENES], 1)


def test_a_flipped_bit_between_two_steps_is_refused_by_name(copy):
    at, rng = "results/small", np.random.default_rng(0)
    counts = [f"{at}/samples/{s}/counts.h5ad" for s in "abc"]
    store, model, out = ["--store", f"{at}/counts.zarr"], ["--model", f"{at}/model"], ["--out", "out"]
    steps = {
        "samples/a/counts.h5ad": ["qc", counts[0], *out],
        "samples/b/qc.parquet": ["genes", *counts, *out],
        "genes.parquet": ["store", *counts, "--genes", f"{at}/genes.parquet", *out],
        "counts.zarr/X/data/0": ["lookup", *store, *out],
        "counts.zarr/obs/n_counts/.zarray": ["embed", *store, *model, *out],
        "model/model.json": ["embed", *store, *model, *out],
        "model/model.safetensors": ["register", at, *out],
        "model/history.parquet": ["register", at, *out],
        "logs/train_run.json": ["register", at, *out],
        "latent.parquet": ["cluster", *store, "--latent", f"{at}/latent.parquet", *out],
        "clusters.parquet": ["cells", *store, "--clusters", f"{at}/clusters.parquet", *out],
        "cells.parquet": ["de", *store, *model, "--cells", f"{at}/cells.parquet", *out],
        "de.parquet": ["report", at, "--config", "config/config.yaml"],
        "criticism/checks.json": ["report", at, "--config", "config/config.yaml"],
        "decisions/qc.a.jsonl": ["report", at, "--config", "config/config.yaml"],
    }
    for name, command in steps.items():
        path = copy / at / name
        content = path.read_bytes()
        bit = int(rng.integers(8 * len(content)))
        path.write_bytes(content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :])
        before = tree(copy)
        done = here(copy, *command)
        assert done.returncode == 1 and tree(copy) == before, (name, bit)
        line = done.stderr.splitlines()[-1]
        file = "counts.zarr" if name.startswith("counts.zarr") else name
        assert line.startswith("error: ") and Path(file).name in line, (name, bit, line)
        assert re.search("remove it and run again: `scvi-core [a-z]+` makes it anew", line), (name, bit, line)
        path.write_bytes(content)


def test_another_build_of_the_same_folder_is_told(as_built):
    write_config(as_built, changed(CONFIG, report__title="Other"))
    before = tree(as_built / "results")
    claim = Claim(as_built / "results" / "small")
    try:
        done = snakemake(as_built)
    finally:
        claim.release()
    assert done.returncode == 1 and tree(as_built / "results") == before
    told = f"results/small: another build is writing into it .*process {os.getpid()} in .*wait for it"
    assert re.search(told, done.stdout + done.stderr)


def test_secrets_of_an_address_are_shown_and_kept_nowhere(copy):
    write_config(copy, changed(CONFIG, registry__tracking_uri="http://me:TOPSECRET@127.0.0.1:9/?token=ALSOSECRET"))
    done = snakemake(copy, "--printshellcmds")
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "error: http://***@127.0.0.1:9/?token=***" in said
    kept = [
        p.read_text(errors="replace") for at in (".snakemake", "results") for p in (copy / at).rglob("*") if p.is_file()
    ]
    assert not [text for text in [said, *kept] if "TOPSECRET" in text or "ALSOSECRET" in text]


# ---- names

ODD = [
    "T cell\x85 unsure",  # str.splitlines and some editors end a line here, and here
    "a\u2028b\u2029c",
    'it\'s "quoted" `x` $(touch pwned) ${HOME}',
    "{sample} {{x}} %s \\n \\",
    "</script><img src=x onerror=alert(1)>",
    "\u202eright\u200b\ufeff",
    "=1+1;#|&*?~!",
    "é \U0001d518 \U0001f600 zo\u0308e",
]


def test_any_text_in_any_name_survives_the_whole_build(tmp_path):
    data = tmp_path / "data"
    paths = [data / "a.h5ad", data / "b.h5ad", data / "c ü'$(x) [1].h5ad"]
    for seed, path in enumerate(paths):
        table = frame(seed, 90)
        table.columns = [f"{gene} {ODD[i]}" if i < len(ODD) else gene for i, gene in enumerate(table.columns)]
        table.index = [f"{cell} {ODD[i % len(ODD)]}" for i, cell in enumerate(table.index)]
        write_h5ad(path, table, **{"cell type": [ODD[3 * (seed % 2) + i % 3] for i in range(90)]})
    names = {"path": [str(path.relative_to(tmp_path)) for path in paths], "batch": [ODD[2], ODD[2], ODD[4]]}
    write_sheet(tmp_path, {"sample": ["a", "b", "c"], **names, "donor x": [ODD[3], ODD[5], ODD[6]]})
    asked = {"input__metadata": ["cell type"], "report__labels": ["cell type", "donor x"], "de__groupby": "cell type"}
    asked |= {"registry__organism": ODD[2], "registry__experiment": ODD[2], "report__title": " ".join(ODD)}
    asked |= {"cluster__tsne": False, "train__max_epochs": 2, "genes__include": [f"{GENES[0]} {ODD[0]}"]}
    write_config(tmp_path, changed(CONFIG, **asked))
    done = snakemake(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    atlas = tmp_path / "results" / "small"
    assert {"cell type", "donor x"} <= set(pd.read_parquet(atlas / "cells.parquet"))
    assert set(pd.read_parquet(atlas / "cells.parquet")["cell type"]) == set(ODD[:6])
    assert set(pd.read_parquet(atlas / "de.parquet")["group"]) == set(ODD[:6])
    assert f"{GENES[0]} {ODD[0]}" in set(pd.read_parquet(atlas / "genes.parquet")["gene_id"])
    assert all(json.loads(line) for line in (atlas / "decisions.jsonl").read_text().split("\n") if line)
    page = (atlas / "report.html").read_text()
    assert "<img src=x" not in page and "&lt;/script&gt;" in page
    assert not list(tmp_path.rglob("pwned")) and "Nothing to be done" in str(snakemake(tmp_path))


# ---- the same bytes, and models taken from the registry


def artefacts(folder):
    """Digests of what must not differ between two builds of the same."""
    atlas = folder / "results" / "small"
    paths = [*atlas.rglob("*.parquet"), atlas / "model" / "model.safetensors", atlas / "manifest.json"]
    return {str(p.relative_to(atlas)): sha256_file(p) for p in paths}


def test_the_same_build_elsewhere_gives_the_same_bytes(builds):
    built, twin = builds
    assert artefacts(twin) == artefacts(built)
    assert json.loads((twin / "results/small/model_ref.json").read_text())["reused"] is False


@pytest.fixture(scope="module")
def second(built, tmp_path_factory):
    """The project elsewhere, as far as the store."""
    folder = tmp_path_factory.mktemp("second") / "second"
    shutil.copytree(built, folder)
    for path in (folder / "results").iterdir():
        if path.name != "small":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in ("model", "latent.parquet", "cells.parquet", "de.parquet", "model_ref.json", "manifest.json"):
        path = folder / "results" / "small" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def test_a_build_elsewhere_takes_the_registered_model(built, second):
    uri = f"sqlite:///{built}/results/mlflow.db"
    write_config(second, changed(CONFIG, registry__tracking_uri=uri))
    done = snakemake(second)
    assert done.returncode == 0, done.stdout + done.stderr
    mine, first = (json.loads((f / "results/small/model_ref.json").read_text()) for f in (second, built))
    assert mine["reused"] is True and first["reused"] is False
    assert {k: mine[k] for k in ("version", "run_id", "fingerprint")} == {
        k: first[k] for k in ("version", "run_id", "fingerprint")
    }
    assert "epoch" not in (second / "results/small/logs/train.log").read_text().replace("epochs", "")
    assert json.loads((second / "results/small/logs/train_run.json").read_text())["reused"] is True
    assert artefacts(second) == artefacts(built)


def test_require_without_a_model_fails_and_leaves_results(built, tmp_path):
    store, config = (
        built / "results/small/counts.zarr",
        json.dumps(changed(CONFIG, model__reuse="require", results="r")),
    )
    done = here(tmp_path, "lookup", "--store", store, "--config", config, "--out", "found")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"^error: .*require.*no model.*exact", done.stderr, re.MULTILINE)
    assert not (tmp_path / "found").exists() and not (tmp_path / "r").exists()
    config = json.dumps(changed(CONFIG, model__reuse="require", results=str(built / "results")))
    done = here(tmp_path, "lookup", "--store", store, "--config", config, "--out", "found")
    assert done.returncode == 0 and (tmp_path / "found" / "model" / "model.safetensors").exists()


def test_never_trains_again(built, tmp_path):
    store, config = built / "results/small/counts.zarr", changed(CONFIG, model__reuse="never", train__max_epochs=2)
    common = ["--store", store, "--config", json.dumps(config)]
    assert here(tmp_path, "lookup", *common, "--out", "found").returncode == 0
    assert json.loads((tmp_path / "found" / "lookup.json").read_text())["found"] is None
    done = cli(tmp_path, "train", *common, "--found", "found", "--out", "model", "--run", "run.json")
    assert done.returncode == 0 and "epoch 2/2" in done.stderr
    assert json.loads((tmp_path / "run.json").read_text())["reused"] is False


# ---- others use the model


@pytest.fixture(scope="module")
def tracking_uri(built):
    return f"sqlite:///{built}/results/mlflow.db"


def test_pyfunc_embeds_as_the_atlas_did(built, atlas, tracking_uri, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    mlflow.set_tracking_uri(tracking_uri)
    model = mlflow.pyfunc.load_model("models:/small/1")
    latent = pd.read_parquet(atlas / "latent.parquet")
    expected = latent[latent["cell_id"].str.startswith("a:")].drop(columns="cell_id").to_numpy()
    kept = latent["cell_id"][latent["cell_id"].str.startswith("a:")].str.removeprefix("a:")
    cells = frame(0).loc[list(kept)]
    for given in (cells, ad.AnnData(cells.astype(np.float32)), str(built / "data" / "a.h5ad")):
        predicted = model.predict(given)
        assert list(predicted.columns) == list(latent.columns)
        predicted = predicted.set_index("cell_id").loc[list(kept)].to_numpy()
        np.testing.assert_allclose(predicted, expected, atol=1e-6)


@pytest.mark.parametrize(("sample", "path"), [("a", "data/a.h5ad"), ("c", "data/c.csv.gz")])
def test_map_equals_the_atlas(built, atlas, tracking_uri, tmp_path, sample, path):
    model = atlas / "model" if sample == "a" else "models:/small/latest"
    query = ["map", built / path, "--model", model, "--tracking-uri", tracking_uri, "--config", json.dumps(CONFIG)]
    run = cli if sample == "a" else here
    done = run(tmp_path, *query, "--out", "latent.parquet")
    assert done.returncode == 0, done.stderr
    mapped, latent = pd.read_parquet(tmp_path / "latent.parquet"), pd.read_parquet(atlas / "latent.parquet")
    assert types(tmp_path / "latent.parquet") == types(atlas / "latent.parquet")
    latent = latent[latent["cell_id"].str.startswith(f"{sample}:")]
    mapped = mapped.set_index("cell_id").loc[latent["cell_id"].str.removeprefix(f"{sample}:")]
    np.testing.assert_allclose(mapped.to_numpy(), latent.drop(columns="cell_id").to_numpy(), atol=1e-6)


def test_map_refuses_strangers(atlas, tmp_path):
    write_h5ad(tmp_path / "x.h5ad", frame(0).rename(columns=lambda g: f"X{g}"))
    done = here(tmp_path, "map", "x.h5ad", "--model", atlas / "model", "--out", "latent.parquet")
    assert done.returncode == 1 and "genes are missing" in done.stderr and "Traceback" not in done.stderr
    for folder, words in ((tmp_path, "no such registry"), (atlas.parents[1], "which of its versions: models:/small/1")):
        done = here(folder, "map", tmp_path / "x.h5ad", "--model", "models:/small", "--out", tmp_path / "z.parquet")
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_models_list_show_promote(built, atlas):
    fingerprint = json.loads((atlas / "model_ref.json").read_text())["fingerprint"]
    done = here(built, "models", "list")  # the default URI is the project's own
    assert done.returncode == 0 and re.search(r"\bsmall\s+1\b", done.stdout) and fingerprint[:8] in done.stdout
    assert here(built, "models", "promote", "small", "1", "--alias", "champion").returncode == 0
    shown = json.loads(here(built, "models", "show", "small", "champion").stdout)
    assert shown["version"] == "1" and shown["aliases"] == ["champion"] and shown["metrics"]
    assert str(shown["organism"]) == "human" and int(shown["n_genes"]) == 100
    for arguments in (("show", "nobody"), ("show", "small", "7"), ("promote", "small", "7"), ("show", "small", "@x")):
        done = here(built, "models", *arguments)
        assert done.returncode == 1 and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
