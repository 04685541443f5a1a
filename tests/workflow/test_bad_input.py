"""Bad input, through the real commands: one line that names field, value and remedy; nothing else is touched."""

import gzip
import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import yaml
from _project import (
    BIN,
    CONFIG,
    SHEET,
    changed,
    cli,
    environment,
    frame,
    here,
    make,
    snakemake,
    tree,
    write_config,
    write_csv,
)
from pydantic import BaseModel

from _project import write_h5ad, write_mtx, write_sheet  # isort: skip

from scvi_core import cli as cli_module
from scvi_core.config import Config, load_samples
from scvi_core.files import UserError, code_sha256
from scvi_core.log import redacted


def refused(done, *words):
    """The command failed with one `error:` line that has these words."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Inputs, sheet and configuration, nothing built."""
    return make(tmp_path_factory.mktemp("bad") / "project")


# ---- configuration


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"qc": {"min_count": 5}}, ["qc.min_count", "did you mean 'qc.min_counts'"]),
        ({"sead": 1}, ["sead", "'seed'"]),
        ({"trian": {}}, ["'train'"]),
        ({"model": {"zzz": 1}}, ["model.zzz", "n_latent"]),
        ({"train": {"max_epochs": "many"}}, ["train.max_epochs", "many"]),
        ({"train": {"max_epochs": 0}}, ["train.max_epochs", "at least 1"]),
        ({"threads": "two"}, ["threads", "two"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"seed": None}, ["seed: is empty"]),
        ({"model": {"likelihood": "zimb"}}, ["model.likelihood", "zinb", "zimb"]),
        ({"cluster": {"resolutions": []}}, ["cluster.resolutions"]),
        ({"cluster": {"resolutions": "high"}}, ["cluster.resolutions", "high"]),
        ({"cluster": {"resolutions": [-1]}}, ["cluster.resolutions", "-1"]),
        ({"qc": 5}, ["qc", "5"]),
        ({"qc": {"n_mads": float("nan")}}, ["qc.n_mads", "NaN"]),
        ({"genes": {"n_top": 0}}, ["genes.n_top"]),
        ({"atlas": "../other"}, ["atlas", "../other", "letters"]),
        ({"atlas": "a b;rm -rf x"}, ["atlas", "letters"]),
        ({"results": "--help"}, ["results", "--help"]),
        ({"registry": {"name": "a/b"}}, ["registry.name", "a/b"]),
        ({"model": {"categorical_covariates": ["age"], "continuous_covariates": ["age"]}}, ["age", "keep one"]),
        ({"model": {"categorical_covariates": ["doner"]}}, ["model.categorical_covariates", "doner", "donor"]),
        ({"model": {"continuous_covariates": ["pH"]}}, ["model.continuous_covariates", "pH", "age"]),
        ({"report": {"labels": ["cell_type"]}}, ["report.labels", "cell_type", "input.metadata"]),
        ({"de": {"groupby": "clusters"}}, ["de.groupby", "clusters", "'cluster'"]),
    ],
    ids=str,
)
def test_config(project, tmp_path, config, words):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    refused(here(project, "validate", "--config", file), str(file), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"atlas: [", ["line", "not valid YAML"]),
        (b"- a\n- b\n", ["keys and values", "list"]),
        (b"", ["keys and values"]),
        (b"atlas: \xff\xfe", ["not valid YAML"]),
        (b"atlas: a\nseed: 1\natlas: b\n", ["line 3", "'atlas' is given twice"]),
        (b"de: {fdr: 0.1, fdr: 0.2}\n", ["line 1", "'fdr' is given twice"]),
        (b"a: &a [x, x]\nb: &b [*a, *a]\n", ["line 2", "alias (*a)", "write it out"]),
        (b"seed: 2020-13-45\n", ["not valid YAML", "month"]),
        (b"seed: 0001-01-01T00:00:00+23:59\n", ["config.yaml"]),
        (b"seed: " + b"9" * 5000, ["not valid YAML"]),
        (b"seed: 0x" + b"f" * 5000, ["seed"]),
        (b"seed: true\n", ["seed: give a whole number", "got true"]),
        (b"title: !!python/object/apply:os.system [ls]\n", ["not valid YAML"]),
        (b"title: !!binary '*'\n", ["config.yaml"]),
        (b"title: !!timestamp x\n", ["not valid YAML"]),
        (b"title: !!bool x\n", ["not valid YAML"]),
        (b"a: " + b"[" * 5000, ["config.yaml"]),
        (b"a: " + b"[" * 5000 + b"]" * 5000, ["nested too deeply"]),
        (b"a: \x00\n", ["not valid YAML"]),
        (b"? [a]\n: b\n", ["not valid YAML"]),
        (b"a: 1\n" * 300_000, ["1 MiB"]),
        (b"genes: {span: 0.001}\n", ["genes.span", "0.01"]),
        (b"threads: 100000\n", ["threads", "1,024"]),
        (b"model: {n_hidden: 20000}\n", ["model.n_hidden", "4,096"]),
    ],
)
def test_config_that_is_no_config(project, tmp_path, text, words):
    (tmp_path / "config.yaml").write_bytes(text)
    refused(here(project, "validate", "--config", tmp_path / "config.yaml"), "config.yaml", *words)


def test_configs_that_never_end(project, tmp_path):
    os.mkfifo(tmp_path / "fifo.yaml")
    for path in (tmp_path / "fifo.yaml", "/dev/zero"):
        refused(here(project, "validate", "--config", path), str(path), "not a file")


def test_every_number_of_the_configuration_has_bounds():
    def unbounded(model, where=""):
        for name, field in model.model_fields.items():
            for part in (field.annotation, *get_args(field.annotation)):
                if isinstance(part, type) and issubclass(part, BaseModel):
                    yield from unbounded(part, f"{where}{name}.")
            kinds = {field.annotation, *get_args(field.annotation)}
            if {int, float} & kinds and not {bool} & kinds and name not in ("n_top", "max_epochs"):  # by validators
                limits = {type(one).__name__ for one in field.metadata}
                if not ({"Ge", "Gt"} & limits and {"Le", "Lt"} & limits):
                    yield where + name

    assert list(unbounded(Config)) == []


def test_whatever_is_raised_is_one_line(project, monkeypatch):
    """Of what nobody foresaw the whole goes into a log, which the line names."""
    monkeypatch.setattr("scvi_core.times.times_table", lambda _: {}["a\nb\x1b[2J" + "x" * 5000])
    (project / "results" / "x" / "benchmarks").mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli_module.stat, "S_ISREG", lambda _: False)
        done = here(project, "times", "results/x")
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert "a fault of scvi-core's own, not yours" in line and line.isprintable() and len(line) < 1000
    log = Path(re.search(r"with (\S+\.log)", line)[1])
    assert "Traceback" in log.read_text() and "KeyError" in log.read_text()
    log.unlink()
    with pytest.MonkeyPatch.context() as patch:  # the log of a rule
        patch.setattr(cli_module.stat, "S_ISREG", lambda _: True)
        done = here(project, "times", "results/x")
    assert "Traceback" in done.stderr and done.stderr.splitlines()[-1].startswith("error: a fault of scvi-core's own")
    shutil.rmtree(project / "results")


def test_config_as_text(project):
    refused(cli(project, "validate", "--config", '{"seed": 1, "seed": 2}'), "'seed' is given twice")
    refused(here(project, "validate", "--config", '{"a":' + "[" * 10**5), "nested too deeply")
    refused(cli(project, "validate", "--config", "{bad json"), "--config", "not JSON")
    refused(cli(project, "validate", "--config", '{"sead": 1}'), "'seed'")
    refused(cli(project, "validate", "--config", "nowhere.yaml"), "nowhere.yaml", "no such")
    refused(cli(project, "validate", "--config", "config"), "config", "not a file")


# ---- sample sheet

HEADER = "sample\tpath\tbatch\n"
ROW = "s1\tdata/a.h5ad\tone\n"
NAMES = [
    "a/b",
    "..",
    "a..b",
    "a b",
    "a;rm -rf x",
    "$(touch x)",
    "`x`",
    "-a",
    "--out",
    ".a",
    "é",
    "a|b",
    "a{b}",
    "x" * 65,
]
URLS = [
    ("gopher://host/a.h5ad", "sftp://"),
    ("S3://cells/a.h5ad", "s3://"),
    ("file:///data/a.h5ad", "local path"),
    ("s3://", "bucket/folder/name"),
    ("s3://cells", "bucket/folder/name"),
    ("s3://cells/b/", "bucket/folder/name"),
    ("s3:///a.h5ad", "bucket/folder/name"),
    ("s3://cells/../../a.h5ad", "'..'"),
    ("s3://../a.h5ad", "'..'"),
    ("s3://cells/b//a.h5ad", "'//'"),
    ("https://host/?acc=1", "'?'"),
    ("s3://cells/a.h5ad#1", "'#'"),
    ("s3://cells/..\\a.h5ad", "backslash"),
    ("https://me:secret@host/a.h5ad", "user and password"),
    ("https://me:sec/ret@host/a.h5ad", "bucket/folder/name"),
]


@pytest.mark.parametrize(
    ("text", "words"),
    [(f"{HEADER}{name}\tdata/a.h5ad\tone\n", ["line 2", "sample", repr(name), "letters"]) for name in NAMES]
    + [
        (HEADER + '"a\nb"\tdata/a.h5ad\tone\n', ["line 3", "'a\\nb'", "line break"]),
        (HEADER + "\tdata/a.h5ad\tone\n", ["line 2", "sample", "empty"]),
        (HEADER + "s1\t\tone\n", ["line 2", "path", "empty"]),
        (HEADER + "s1\tdata/a.h5ad\t\n", ["line 2", "batch", "empty"]),
        (HEADER + ROW + ROW, ["line 3", "s1", "already on line 2"]),
        (HEADER + ROW + ROW.replace("s1", "S1"), ["line 3", "S1", "line 2"]),
        (HEADER.replace("\t", " ") + ROW, ["'sample'", "separated by tabs"]),
        (HEADER.replace("\t", ",") + ROW.replace("\t", ","), ["separated by tabs"]),
        ("sample\tpath\ns1\tdata/a.h5ad\n", ["no column 'batch'", "tabs"]),
        ("sample\tpath\tbatches\ns1\tx\ty\n", ["no column 'batch'", "batches"]),
        (HEADER + "s1\tdata/a.h5ad\n", ["line 2", "2 columns", "has 3"]),
        (HEADER + "s1\tdata/a.h5ad\tone\tmore\n", ["line 2", "4 columns"]),
        ("sample\tpath\tbatch\tage\tage\ns1\tx\ty\t1\t2\n", ["'age'", "twice"]),
        ("sample\tpath\tbatch\tn_counts\ns1\tx\ty\t1\n", ["'n_counts'", "rename"]),
        ("", ["empty"]),
        (HEADER, ["no samples"]),
        (HEADER + "s1\tdata/none.h5ad\tone\n", ["s1", "data/none.h5ad"]),
        (HEADER + "s1\t-x.h5ad\tone\n", ["line 2", "path", "-x.h5ad"]),
        (HEADER + "s1\tdata/{sample}.h5ad\tone\n", ["line 2", "path", "braces"]),
    ]
    + [(f"{HEADER}s1\t{url}\tone\n", ["line 2", "path", repr(redacted(url)), word]) for url, word in URLS],
    ids=lambda value: repr(value)[:40] if isinstance(value, str) else "",
)
def test_sample_sheet(project, tmp_path, text, words):
    (tmp_path / "sheet.tsv").write_text(text)
    before = tree(project)
    done = here(project, "validate", "--config", json.dumps({"samples": str(tmp_path / "sheet.tsv")}))
    refused(done, "sheet.tsv", *words)
    assert tree(project) == before


def test_urls_in_the_sample_sheet(project, tmp_path):
    """Taken by the workflow, which fetches them; no command reads one itself."""
    good = [
        "s3://cells/a.h5ad",
        "gs://cells/a b/10x",
        "https://host:8080/a%20b.csv.gz",
        "az://account/box/a.h5",
        "sftp://host/a",
    ]
    rows = "".join(f"s{i}\t{url}\tone\n" for i, url in enumerate(good))
    (tmp_path / "sheet.tsv").write_text(HEADER + rows)
    done = here(project, "validate", "--config", json.dumps({"samples": str(tmp_path / "sheet.tsv")}))
    assert done.returncode == 0, done.stderr
    assert [s.plugin for s in load_samples(tmp_path / "sheet.tsv")] == ["s3", "gcs", "http", "azure", "sftp"]
    assert {s.plugin for s in load_samples(project / "config" / "samples.tsv")} == {None}
    for command in (
        ["ingest", good[0], "--sample", "a", "--batch", "b", "--out", tmp_path / "a.h5ad"],
        ["map", good[0], "--model", tmp_path, "--out", tmp_path / "a.parquet"],
    ):
        refused(here(project, *command), "cells/a.h5ad: a URL", "sample sheet")


def test_an_image_of_other_code(project, monkeypatch):
    monkeypatch.setenv("APPTAINER_CONTAINER", "old.sif")
    monkeypatch.setenv("SCVI_CORE_CODE", "0" * 64)
    refused(
        here(project, "validate", "--config", "config/config.yaml"), "error: old.sif: holds other code", "make image"
    )
    monkeypatch.setenv("SCVI_CORE_CODE", code_sha256())
    assert here(project, "validate", "--config", "config/config.yaml").returncode == 0


def test_a_fetched_copy_is_called_by_its_url(project, tmp_path):
    (tmp_path / "copy.h5ad").write_bytes((project / "data" / "a.h5ad").read_bytes()[:1000])
    of = ["--sample", "a", "--batch", "b", "--source", "s3://cells/a.h5ad", "--out", tmp_path / "out.h5ad"]
    done = here(project, "ingest", tmp_path / "copy.h5ad", *of)
    refused(done, "error: s3://cells/a.h5ad: ")
    assert str(tmp_path) not in done.stderr


def test_sheet_and_config_together(project, tmp_path):
    (tmp_path / "sheet.tsv").write_text("sample\tpath\tbatch\tsex\ns1\tdata/a.h5ad\tone\tmale\n")
    base = {"samples": str(tmp_path / "sheet.tsv")}
    one = {**base, "model": {"dispersion": "gene-batch"}}
    refused(cli(project, "validate", "--config", json.dumps(one)), "model.dispersion", "gene-batch", "two batches")
    one = {**base, "model": {"categorical_covariates": ["sex"]}}
    refused(cli(project, "validate", "--config", json.dumps(one)), "'sex'", "one level", "male")
    refused(cli(project, "validate", "--config", '{"samples": "none.tsv"}'), "none.tsv", "no such sample sheet")


# ---- inputs


def with_value(value):
    def make_input(path):
        table = frame(0, 60).astype(float)
        table.iloc[3, 4] = value
        write_h5ad(path / "x.h5ad", table)
        return "x.h5ad"

    return make_input


def normalised(path):
    table = frame(0, 60)
    write_h5ad(path / "x.h5ad", np.log1p(table.div(table.sum(axis=1), axis=0) * 1e4))
    return "x.h5ad"


def all_zero(path):
    write_h5ad(path / "x.h5ad", frame(0, 60) * 0)
    return "x.h5ad"


def no_cells(path):
    write_h5ad(path / "x.h5ad", frame(0, 60).iloc[:0])
    return "x.h5ad"


def twice(path):
    table = frame(0, 60)
    write_csv(path / "x.csv.gz", pd.concat([table, table.iloc[:1]]))
    return "x.csv.gz"


def truncated_h5ad(path):
    write_h5ad(path / "x.h5ad", frame(0, 60))
    content = (path / "x.h5ad").read_bytes()
    (path / "x.h5ad").write_bytes(content[: len(content) // 2])
    return "x.h5ad"


def truncated_gzip(path):
    write_csv(path / "x.csv.gz", frame(0, 60))
    content = (path / "x.csv.gz").read_bytes()
    (path / "x.csv.gz").write_bytes(content[: len(content) // 2])
    return "x.csv.gz"


def truncated_mtx(path):
    write_mtx(path / "x", frame(0, 60))
    text = gzip.decompress((path / "x" / "matrix.mtx.gz").read_bytes())
    (path / "x" / "matrix.mtx.gz").write_bytes(gzip.compress(text[: len(text) // 2]))
    return "x"


def csv_named_h5ad(path):
    (path / "x.h5ad").write_text(frame(0, 60).T.to_csv())
    return "x.h5ad"


def h5ad_named_csv(path):
    write_h5ad(path / "y.h5ad", frame(0, 60))
    (path / "y.h5ad").rename(path / "x.csv")
    return "x.csv"


def empty_file(path):
    (path / "x.h5ad").touch()
    return "x.h5ad"


def empty_folder(path):
    (path / "x").mkdir()
    return "x"


def fine(path):
    write_h5ad(path / "x.h5ad", frame(0, 60))
    return "x.h5ad"


@pytest.mark.parametrize(
    ("make_input", "config", "words"),
    [
        (with_value(-1), {}, ["negative", "-1", "raw counts"]),
        (with_value(0.5), {}, ["0.5", "normalised"]),
        (with_value(np.nan), {}, ["not finite", "nan"]),
        (with_value(np.inf), {}, ["not finite", "inf"]),
        (normalised, {}, ["normalised", "raw counts"]),
        (all_zero, {}, ["all counts are zero"]),
        (no_cells, {}, ["no cells"]),
        (twice, {}, ["CELL000-1", "more than once"]),
        (truncated_h5ad, {}, ["truncated"]),
        (truncated_gzip, {}, ["truncated"]),
        (truncated_mtx, {}, ["x"]),
        (csv_named_h5ad, {}, ["named .h5ad", "rename"]),
        (h5ad_named_csv, {}, ["named .csv", "HDF5"]),
        (empty_file, {}, ["empty file"]),
        (empty_folder, {}, ["matrix.mtx"]),
        (lambda path: "none.h5ad", {}, ["none.h5ad", "no such file"]),
        (fine, {"layer": "count"}, ["count"]),
        (fine, {"metadata": ["cell_type"]}, ["input.metadata", "cell_type"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_ingest(tmp_path, make_input, config, words):
    path = make_input(tmp_path)
    (tmp_path / "earlier.h5ad").write_bytes(b"\x89HDF\r\n\x1a\n, damaged")
    before = tree(tmp_path)
    arguments = ["--sample", "s", "--batch", "b", "--config", json.dumps({"input": config}), "--out", "earlier.h5ad"]
    refused(here(tmp_path, "ingest", path, *arguments), path, *words)
    assert tree(tmp_path) == before


def test_ingest_arguments(tmp_path):
    fine(tmp_path)
    for sample in ("../s", "a b", "$(touch x)", "-s"):
        done = here(tmp_path, "ingest", "x.h5ad", "--sample", sample, "--batch", "b", "--out", "out.h5ad")
        refused(done, "--sample", sample, "letters")
    done = here(tmp_path, "ingest", "x.h5ad", "--sample", "s", "--batch", "b", "--metadata", "{", "--out", "out.h5ad")
    refused(done, "--metadata", "JSON")
    assert [p.name for p in tmp_path.iterdir()] == ["x.h5ad"]


# ---- later steps


@pytest.fixture
def steps(built, tmp_path):
    """Samples of the built project, to be changed; and a function that runs a step on them."""
    shutil.copytree(built / "results" / "small" / "samples", tmp_path / "samples")

    def run(command, *arguments, **config):
        return here(tmp_path, command, *arguments, "--config", json.dumps(changed(CONFIG, **config)))

    run.folder = tmp_path
    return run


def add_sample(steps, name, table, batch):
    write_h5ad(steps.folder / "x.h5ad", table)
    out = Path("samples", name, "counts.h5ad")
    assert steps("ingest", "x.h5ad", "--sample", name, "--batch", batch, "--out", out).returncode == 0
    done = steps("qc", out, "--out", out.with_name("qc.parquet"))
    assert done.returncode == 0, done.stderr
    return out


def test_nothing_left_after_qc(steps):
    before = tree(steps.folder)
    done = steps("qc", "samples/a/counts.h5ad", "--out", "samples/a/qc.parquet", qc__min_counts=10**6)
    refused(done, "sample a", "no cell is left", "low_counts", "qc.min_counts")
    assert tree(steps.folder) == before


def test_genes(steps):
    a, b = "samples/a/counts.h5ad", "samples/b/counts.h5ad"
    strange = add_sample(steps, "strange", frame(5, 60).rename(columns=lambda g: f"X{g}"), "one")
    solo = add_sample(steps, "solo", frame(6, 1), "three")
    (steps.folder / "genes.parquet").write_bytes(b"PAR1, damaged")
    before = tree(steps.folder)
    out = ["--out", "genes.parquet"]
    refused(steps("genes", a, b, *out, genes__n_top=1000), "genes.n_top", "1000", "300")
    refused(steps("genes", a, strange, *out), "no gene is in all", "union")
    refused(steps("genes", a, solo, *out), "'three'", "single cell")
    refused(steps("genes", a, b, *out, genes__include=["GENE10000"]), "genes.include", "GENE10000")
    refused(steps("genes", a, b, *out, genes__exclude=["@mito"]), "genes.exclude", "@mito", "@mitochondrial")
    refused(steps("genes", a, b, *out, genes__exclude=["/(/"]), "genes.exclude", "regular expression")
    refused(steps("genes", a, "samples/none/counts.h5ad", *out), "samples/none/qc.parquet")
    assert tree(steps.folder) == before


def test_design(steps):
    inputs = ["samples/a/counts.h5ad", "samples/b/counts.h5ad"]
    assert steps("genes", *inputs, "--out", "genes.parquet").returncode == 0
    assert steps("store", *inputs, "--genes", "genes.parquet", "--out", "counts.zarr").returncode == 0
    look = ["lookup", "--store", "counts.zarr", "--out", "found"]
    before = tree(steps.folder)
    refused(steps(*look, model__dispersion="gene-batch"), "gene-batch", "two batches")
    refused(steps(*look, model__loadings_l1=0.3), "model.loadings_l1", "0.3", "model.decoder: linear")
    refused(steps(*look, model__categorical_covariates=["batch"]), "'batch'", "one level")
    refused(steps(*look, model__categorical_covariates=["site"]), "'site'", "no column")
    refused(steps(*look, model__continuous_covariates=["donor"]), "'donor'", "not numbers")
    refused(steps(*look, registry__tracking_uri="http://127.0.0.1:9"), "http://127.0.0.1:9", "cannot be reached")
    refused(steps(*look, registry__tracking_uri="ftp://x"), "registry.tracking_uri", "ftp://x")
    refused(steps("lookup", "--store", "none.zarr", "--out", "found"), "none.zarr", "scvi-core store")
    uri = ["--tracking-uri", "http://127.0.0.1:9"]
    refused(here(steps.folder, "models", "list", *uri), "http://127.0.0.1:9", "cannot be reached")
    assert tree(steps.folder) == before


def test_de_and_report(built, atlas, tmp_path):
    config = json.dumps(changed(CONFIG, de__groupby="site"))
    out = ["--cells", atlas / "cells.parquet", "--config", config, "--out", "de.parquet"]
    done = here(tmp_path, "de", "--store", atlas / "counts.zarr", "--model", atlas / "model", *out)
    refused(done, "de.groupby", "site", "donor")
    done = here(tmp_path, "de", "--store", atlas / "counts.zarr", "--model", tmp_path, *out)
    refused(done)
    refused(here(tmp_path, "report", tmp_path / "none"), "cells.parquet", "no such file", "scvi-core cells")
    refused(here(tmp_path, "register", tmp_path / "none"), "manifest.json", "--config")
    refused(here(tmp_path, "register", tmp_path / "none", "--config", "{}"), "model.json")
    assert not list(tmp_path.iterdir())


# ---- what is there already


MINE = {
    "notes.txt": b"years of work",
    "table.parquet": None,
    "raw.h5ad": None,
    "data.json": b'{"a": 1}',
    "lines.jsonl": b'{"a": 1}\n',
    "plot.png": b"GIF89a",
    "results/notes.txt": b"years of work",
    "model/model.json": b'{"class_name": "Sequential"}',
    "atlas.zarr/.zattrs": b'{"encoding-type": "anndata"}',
    "atlas.zarr/X/0": b"counts",
}
FILES = ["notes.txt", "table.parquet", "raw.h5ad", "data.json", "plot.png", "results"]
FOLDERS = ["results", "notes.txt", "model", "atlas.zarr", "."]


@pytest.mark.parametrize(
    ("command", "option", "targets"),
    [
        ("ingest {data}/a.h5ad --sample a --batch one", "--out", FILES),
        ("ingest {data}/a.h5ad --sample a --batch one --out x.h5ad", "--decisions", [*FILES, "lines.jsonl"]),
        ("qc {a}/counts.h5ad", "--out", FILES),
        ("qc {a}/counts.h5ad --out x.parquet", "--figure", FILES),
        ("genes {a}/counts.h5ad {b}/counts.h5ad", "--out", FILES),
        ("store {a}/counts.h5ad {b}/counts.h5ad --genes {atlas}/genes.parquet", "--out", FOLDERS),
        ("lookup --store {atlas}/counts.zarr", "--out", FOLDERS),
        ("train --store {atlas}/counts.zarr --config {config}", "--out", FOLDERS),
        ("train --store {atlas}/counts.zarr --config {config} --out x", "--run", FILES),
        ("embed {fitted}", "--out", FILES),
        ("embed {fitted} --out x.parquet", "--uncertainty", FILES),
        ("expression {fitted} --genes GENE1", "--out", FILES),
        ("loadings --model {atlas}/model", "--out", FILES),
        ("cluster --store {atlas}/counts.zarr --latent {atlas}/latent.parquet", "--out", FILES),
        ("cells --store {atlas}/counts.zarr --clusters {atlas}/clusters.parquet", "--out", FILES),
        ("de {fitted} --cells {atlas}/cells.parquet", "--out", FILES),
        ("contrast {a}/counts.h5ad --cells {atlas}/cells.parquet --genes {atlas}/genes.parquet", "--out", FILES),
        ("criticism {fitted} --cells {atlas}/cells.parquet", "--out", FOLDERS),
        ("register {atlas}", "--out", [name for name in FILES if name != "results"]),
        ("map {data}/a.h5ad --model {atlas}/model", "--out", FILES),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_only_what_a_command_wrote_is_replaced(built, atlas, tmp_path, command, option, targets):
    for name, content in MINE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if content is not None:
            (tmp_path / name).write_bytes(content)
    frame(0, 5).to_parquet(tmp_path / "table.parquet")
    write_h5ad(tmp_path / "raw.h5ad", frame(0, 5))
    places = {"atlas": atlas, "data": built / "data", "config": built / "config" / "config.yaml"}
    places |= {s: atlas / "samples" / s for s in "ab"}
    places["fitted"] = f"--store {atlas}/counts.zarr --model {atlas}/model"
    before = tree(tmp_path)
    for target in targets:
        refused(here(tmp_path, *command.format(**places).split(), option, target), f"{target}: scvi-core writes a")
        assert tree(tmp_path) == before, target


def test_no_input_is_replaced(built, tmp_path):
    shutil.copytree(built / "results" / "small" / "samples" / "a", tmp_path / "a")
    (tmp_path / "link").symlink_to("a")
    before = tree(tmp_path)
    counts, row = "a/counts.h5ad", ["--sample", "a", "--batch", "one", "--out"]
    refused(here(tmp_path, "ingest", counts, *row, "link/counts.h5ad"), "--out link/counts.h5ad", "same command")
    refused(here(tmp_path, "genes", counts, "--out", "a/qc.parquet"), "--out a/qc.parquet", "same command")
    refused(here(tmp_path, "qc", counts, "--out", "x", "--figure", "x"), "--figure x", "same command")
    (tmp_path / "x.parquet").symlink_to("a/qc.parquet")
    refused(here(tmp_path, "qc", counts, "--out", "x.parquet"), "x.parquet: a link to", "a/qc.parquet")
    (tmp_path / "x.parquet").unlink()
    assert tree(tmp_path) == before


def test_what_stands_beside_our_figures_stays(built, tmp_path):
    shutil.copytree(built / "results" / "small", tmp_path / "small")
    figures = tmp_path / "small" / "figures"
    (figures / "mine.png").write_bytes(b"\x89PNG\r\n\x1a\nmine")
    shutil.copy(figures / "qc_a.png", figures / "qc_no_more.png")
    report = ["report", "small", "--config", json.dumps(CONFIG)]
    assert here(tmp_path, *report).returncode == 0
    assert (figures / "mine.png").exists() and not (figures / "qc_no_more.png").exists()
    (figures / "qc_a.png").write_bytes(b"mine")
    refused(here(tmp_path, *report), "figures/qc_a.png: scvi-core writes a PNG file there")
    assert (figures / "qc_a.png").read_bytes() == b"mine"


# ---- the disk


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 48 KiB with earlier results on it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("a small disk can be mounted by root only")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_full_disk(built, atlas, small_disk):
    for name in ("counts.zarr", "model"):
        (small_disk / name).mkdir()
    (small_disk / "counts.h5ad").write_bytes(b"\x89HDF\r\n\x1a\n, damaged")
    for name in ("qc.parquet", "genes.parquet", "model/history.parquet"):
        (small_disk / name).write_bytes(b"PAR1, damaged")
    (small_disk / "counts.zarr/.zgroup").write_bytes(b"earlier")
    (small_disk / "filler").write_bytes(bytes(16384))
    before = tree(small_disk)
    samples = [atlas / "samples" / s / "counts.h5ad" for s in "abc"]
    config = ["--config", json.dumps(CONFIG)]
    to = {name: ["--out", small_disk / name, *config] for name in [p.name for p in small_disk.iterdir()]}
    for command in (
        ["ingest", built / "data" / "a.h5ad", "--sample", "a", "--batch", "one", *to["counts.h5ad"]],
        ["store", *samples, "--genes", atlas / "genes.parquet", *to["counts.zarr"]],
        ["train", "--store", atlas / "counts.zarr", *to["model"]],
    ):
        refused(cli(built, *command), str(small_disk), "no space left")
        assert tree(small_disk) == before, command[0]


# ---- through Snakemake


@pytest.fixture(scope="module")
def copy(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy") / "copy"
    shutil.copytree(built, folder)
    assert cli(folder, "models", "list").returncode == 0  # a registry that moved follows once
    return folder


def test_snakemake_shows_the_line_and_keeps_earlier_results(copy):
    before = tree(copy / "results", skip=("logs", "benchmarks"))
    write_config(copy, changed(CONFIG, genes__n_top=1000))
    done = snakemake(copy)
    assert done.returncode != 0
    shown = done.stdout + done.stderr
    assert "\nerror: genes.n_top: 1000 genes asked for" in shown and "Traceback" not in shown
    assert done.stderr.splitlines()[-1].startswith("genes: genes.n_top: 1000 genes asked for")  # the last is the reason
    assert done.stderr.splitlines()[-2] == "  results/small/logs/genes.log"
    assert tree(copy / "results", skip=("logs", "benchmarks")) == before
    write_config(copy, changed(CONFIG, train__max_epochs=4, device="cuda"))
    done = snakemake(copy)
    shown = done.stdout + done.stderr
    if done.returncode:  # a machine without a GPU
        assert "\nerror: device: 'cuda'" in shown and "Traceback" not in shown
        now = tree(copy / "results", skip=("logs", "benchmarks", "lookup", "lookup.jsonl"))
        assert now == {k: v for k, v in before.items() if "lookup" not in k}
    write_config(copy, CONFIG)


@pytest.mark.parametrize(
    ("config", "sheet", "words"),
    [
        ({"qc__min_count": 5}, {}, "did you mean 'qc.min_counts'"),
        ({}, {"sample": ["a", "../b", "c"]}, "line 3: sample: use letters"),
        ({}, {"path": ["data/a.h5ad", "none", "data/c.csv.gz"]}, "sample 'b': no file none; mend"),
        ({"atlas": "new"}, {"path": ["data/a.h5ad", "none", "data/c.csv.gz"]}, "sample 'b': no file none; mend"),
        ({}, {"path": ["data/a.h5ad", "az://x/y", "data/c.csv.gz"]}, "pip install snakemake-storage-plugin-azure"),
        ({"de__groupby": "clusters"}, {}, "de.groupby"),
    ],
    ids=str,
)
def test_snakemake_refuses_before_it_runs_anything(copy, config, sheet, words):
    before = tree(copy / "results")
    write_config(copy, changed(CONFIG, **config))
    write_sheet(copy, SHEET | sheet)
    done = snakemake(copy)
    write_config(copy, CONFIG)
    write_sheet(copy, SHEET)
    assert done.returncode == 1 and words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stdout + done.stderr and tree(copy / "results") == before


def test_hostile_cells_stay_text(tmp_path):
    """Shell characters in paths, batches and metadata reach the files as they are, and nothing else happens."""
    folder = make(tmp_path / "hostile")
    path = "data/x ;$(touch escaped)`touch escaped`'\"&|*.h5ad"
    evil = "-{y} ;$(touch escaped)`touch escaped`'\"&|* \\ %s"
    shutil.copy(folder / "data" / "a.h5ad", folder / path)
    sheet = {"sample": ["a"], "path": [path], "batch": [evil], "donor": [evil], "age": ["1"]}
    (folder / "config" / "samples.tsv").write_text(
        "\t".join(sheet) + "\n" + "\t".join('"' + v[0].replace('"', '""') + '"' for v in sheet.values()) + "\n"
    )
    write_config(folder, changed(CONFIG, report__title="{sample} {wildcards.x} $(touch escaped)"))
    before = {p for p in folder.parent.rglob("*") if ".snakemake" not in p.parts}
    done = snakemake(folder, "results/small/samples/a/qc.parquet")
    assert done.returncode == 0, done.stdout + done.stderr
    counts = ad.read_h5ad(folder / "results/small/samples/a/counts.h5ad")
    assert set(counts.obs["batch"]) == {evil} and set(counts.obs["donor"]) == {evil}
    after = {p for p in folder.parent.rglob("*") if ".snakemake" not in p.parts}
    assert all((folder / "results") in (p, *p.parents) for p in after - before)
    assert snakemake(folder, "-n").returncode == 0  # braces in the title are no wildcards


def test_random_sheets_never_escape(tmp_path):
    rng = random.Random(0)
    pieces = ["a", "B1", "-", "..", "/", "\\", " ", "\t", "\n", "\r", ";", "$(x)", "`", "'", '"', "{a}", "%", "~", "*"]
    pieces += ["\x00", "\x1b[2J", "é", "\u202e", "\u2028", "..%2f", "CON", "|", "&", "<", "#", ".", "_", ":", "\ufeff"]

    def cell():
        return "".join(rng.choices(pieces, k=rng.randint(0, 4))) if rng.random() < 0.8 else rng.choice(["s1", "x", "1"])

    accepted, config = 0, Config()
    for _ in range(5000):
        header = ["sample", "path", "batch"] + [cell() for _ in range(rng.randint(0, 2))]
        rows = [
            [rng.choice(["s", "t", cell()]), cell(), cell(), *map(str, header[3:])] for _ in range(rng.randint(1, 3))
        ]
        (tmp_path / "sheet.tsv").write_text("\n".join("\t".join(row) for row in [header, *rows]), newline="")
        try:
            samples = load_samples(tmp_path / "sheet.tsv")
        except UserError as error:
            assert "\n" not in str(error) and str(tmp_path / "sheet.tsv") in str(error)
            continue
        accepted += 1
        home = (config.folder / "samples").resolve()
        places = [(home / s.sample / "counts.h5ad").resolve() for s in samples]
        assert all(place.parent.parent == home for place in places) and len(set(places)) == len(samples)
        assert all(s.sample.isascii() and s.sample[0].isalnum() for s in samples)
        assert not any(c in s.path for s in samples for c in "{}\n\r\x00\x1b")
        assert not any(s.path.startswith("-") for s in samples)
    assert 20 < accepted < 4000, accepted


def test_a_locale_of_another_encoding(project, tmp_path):
    """Names are UTF-8 whatever the locale: in arguments, in sheets and in what is written."""
    if shutil.which("localedef") is None:
        pytest.skip("localedef is not installed, which makes a locale that is not UTF-8")
    made = subprocess.run(
        ["localedef", "-i", "en_US", "-f", "ISO-8859-1", tmp_path / "en_US.ISO-8859-1"], capture_output=True
    )
    if not (tmp_path / "en_US.ISO-8859-1").exists():
        pytest.skip(f"no such locale can be made here ({made.stderr[:80]!r})")
    outside = {**environment(), "LOCPATH": str(tmp_path), "LC_ALL": "en_US.ISO-8859-1"}
    outside.pop("PYTHONUTF8", None)
    out = tmp_path / "β.h5ad"
    command = [BIN / "scvi-core", "ingest", "data/a.h5ad", "--sample", "a", "--batch", "β-µg", "--out", out]
    done = subprocess.run(command, cwd=project, env=outside, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert set(ad.read_h5ad(out).obs["batch"]) == {"β-µg"}
    (tmp_path / "s.tsv").write_text(
        "sample\tpath\tbatch\na\tdata/a.h5ad\tβ\nb\tdata/none-β.h5ad\tµ\n", encoding="utf-8"
    )
    command = [BIN / "scvi-core", "validate", "--config", json.dumps({"samples": str(tmp_path / "s.tsv")})]
    done = subprocess.run(command, cwd=project, env=outside, capture_output=True, encoding="utf-8")
    refused(done, "no file data/none-β.h5ad")


def test_one_file_decides_an_atlas(project):
    """`--configfile` takes the place of config/config.yaml: no key of that leaks into the second atlas."""
    (project / "second.yaml").write_text("atlas: second\n")
    done = snakemake(project, "-n", "-p", "--configfile", "second.yaml")
    (project / "second.yaml").unlink()
    assert done.returncode == 0, done.stderr
    assert "results/second/report.html" in done.stdout and "results/small" not in done.stdout
    assert '"max_epochs": "auto"' in done.stdout and '"n_latent": 10' in done.stdout
    assert "Small & <odd>" not in done.stdout and '"labels": ["donor"]' not in done.stdout
