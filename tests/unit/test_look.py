"""What `validate` and `init` see of inputs: sizes, organisms, droplets, faults; by a sample where files are large."""

import gzip
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
import yaml
from typer.testing import CliRunner

from scvi_core import look as module
from scvi_core.cli import app
from scvi_core.config import InputConfig, Sample, load_config, load_samples
from scvi_core.files import Claim, UserError
from scvi_core.look import check_inputs, lines, look, needs, together
from scvi_core.start import begin, choose, sample_names, stem

HUMAN = ["ACTB", "GAPDH", "MALAT1", "CD3D", "CD3E", "CD4", "MT-CO1", "RPS3", "RPL5", *(f"GENE{i}" for i in range(40))]
MOUSE = [name.capitalize() for name in HUMAN]


def counts(n_cells=60, seed=0, rate=3.0, n_genes=49):
    return sp.csr_matrix(np.random.default_rng(seed).poisson(rate, (n_cells, n_genes)).astype(np.float32))


def write(path, x=None, genes=HUMAN, **obs):
    x = counts() if x is None else x
    path.parent.mkdir(parents=True, exist_ok=True)
    index = [f"{i:04d}ACGTACGT-1" for i in range(x.shape[0])]
    ad.AnnData(x, pd.DataFrame(obs, index=index), pd.DataFrame(index=list(genes))).write_h5ad(path)
    return path


def write_mtx(folder, x, genes=HUMAN, before=""):
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / f"{before}matrix.mtx.gz", "wb") as handle:
        scipy.io.mmwrite(handle, sp.coo_matrix(x.T), field="integer")
    tables = {
        "features": [f"{g}\t{g}\tGene Expression" for g in genes],
        "barcodes": [f"C{i}-1" for i in range(x.shape[0])],
    }
    for name, rows in tables.items():
        (folder / f"{before}{name}.tsv.gz").write_bytes(gzip.compress("".join(f"{r}\n" for r in rows).encode()))
    return folder


def test_a_file_is_known_by_its_content(tmp_path):
    x = counts()
    seen = look(write(tmp_path / "a.h5ad", x, donor=["d"] * 60), "a", InputConfig())
    assert (seen.format, seen.n_cells, seen.n_genes, seen.organism) == ("AnnData h5ad", 60, 49, "human")
    assert seen.counts == np.median(np.asarray(x.sum(1))) and seen.genes == np.median(np.diff(x.indptr))
    assert seen.whole and seen.columns == ("donor",) and seen.remarks == ()
    assert lines([seen]).split("\n")[1].split("  ")[0] == "a"


@pytest.mark.parametrize("form", ["mtx", "csc", "csv"])
def test_of_large_inputs_of_other_orders_a_part_is_read(tmp_path, monkeypatch, form):
    monkeypatch.setattr(module, "ENTRIES", 20_000)
    monkeypatch.setattr("scvi_core.io.checks.BLOCK", 40_000)
    x = counts(2000)
    if form == "csc":
        path = write(tmp_path / "a.h5ad", x.tocsc())
    elif form == "mtx":
        path = write_mtx(tmp_path / "a", x)
    else:
        path = tmp_path / "a.csv"
        pd.DataFrame(x.toarray().astype(int).T, index=HUMAN, columns=[f"C{i}" for i in range(2000)]).to_csv(path)
    seen = look(path, "a", InputConfig())
    assert seen.n_cells == 2000 and seen.organism == "human"
    assert seen.counts is None or seen.counts == pytest.approx(147, abs=10)


def test_droplets_are_told_from_cells(tmp_path):
    x = sp.vstack([counts(100, rate=3), counts(12_000, rate=0.02)]).tocsr()
    seen = look(write(tmp_path / "raw.h5ad", x), "a", InputConfig())
    assert "look like all droplets" in seen.remarks[0]


@pytest.mark.parametrize(
    ("x", "genes", "told"),
    [
        (counts().log1p(), HUMAN, "not whole numbers .* normalised"),
        (sp.csr_matrix((60, 49), dtype=np.float32), HUMAN, "zero"),
    ],
)
def test_what_are_no_counts_is_refused_with_its_sample(tmp_path, x, genes, told):
    path = write(tmp_path / "a.h5ad", x, genes)
    sheet = tmp_path / "s.tsv"
    sheet.write_text(f"sample\tpath\tbatch\none\t{path}\tb\ntwo\t{path}\tb\n")
    with pytest.raises(UserError, match=f"sample 'one': .*{told}.*2 inputs have faults"):
        check_inputs(load_samples(sheet), load_config({"samples": str(sheet)}))


def test_a_turned_matrix_and_a_missing_column_are_refused(tmp_path):
    ad.AnnData(
        counts().T.tocsr(), pd.DataFrame(index=HUMAN), pd.DataFrame(index=[f"C{i}" for i in range(60)])
    ).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(UserError, match="the matrix is turned"):
        look(tmp_path / "a.h5ad", "a", InputConfig())
    with pytest.raises(UserError, match="'donor' is asked for"):
        look(write(tmp_path / "b.h5ad"), "b", InputConfig(metadata=("donor",)))


def test_what_only_several_say(tmp_path):
    human, mouse = (look(write(tmp_path / f"{g[0]}.h5ad", genes=g), g[0], InputConfig()) for g in (HUMAN, MOUSE))
    few = look(write(tmp_path / "few.h5ad", counts(n_genes=20), HUMAN[:20]), "few", InputConfig())
    assert list(together([human, human], "intersection")) == []
    (told,) = together([human, few], "intersection")
    assert told.startswith("20 genes are in all samples, of up to 49 in one (few has fewest: 20)")
    assert list(together([human, few], "union")) == []
    with pytest.raises(UserError, match="no gene is in all 2 samples"):
        list(together([human, mouse], "intersection"))
    assert "human (ACTB), mouse (Actb)" in next(together([human, mouse], "union"))


def test_what_a_build_needs_is_what_was_measured():
    assert needs(1_300_000, 13) == "about 44 min on two cores and 3.9 GB of memory"  # benchmarks/README.md
    assert needs(260_000, 10) == "about 10 min on two cores and 1.7 GB of memory"


def test_more_genes_than_there_are_is_said_before_the_build(tmp_path):
    sample = Sample(sample="a", path=str(write(tmp_path / "a.h5ad")), batch="b")
    with pytest.raises(UserError, match=r"genes\.n_top: 50 genes asked for, and a sample has 49; lower it"):
        check_inputs([sample], load_config({"genes": {"n_top": 50}}))
    assert "about 63 s on two cores" in check_inputs([sample], load_config({"genes": {"n_top": 49}}))


def test_remote_inputs_are_left_where_they_are():
    remote = Sample(sample="a", path="s3://bucket/a.h5ad", batch="b")
    assert check_inputs([remote], load_config({})) == "1 of 1 inputs are remote, and were not fetched"


# ---- the first configuration


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_of_runs(here):
    for donor in ("donor1", "donor2"):
        write_mtx(here / f"data/{donor}/outs/filtered_feature_bc_matrix", counts())
        write_mtx(here / f"data/{donor}/outs/raw_feature_bc_matrix", counts(80))
    write_mtx(here / "data/geo", counts(), before="GSM1_liver_")
    write_mtx(here / "data/geo", counts(), before="GSM2_lung_")
    (here / "data/notes.txt").write_text("hello\nworld\n")
    said = begin(here / "data", here / "config/mine")
    rows = load_samples(here / "config/mine/samples.tsv")
    assert [row.sample for row in rows] == ["donor1", "donor2", "GSM1_liver", "GSM2_lung"]
    assert [row.batch for row in rows] == [row.sample for row in rows]
    assert rows[0].path.endswith("donor1/outs/filtered_feature_bc_matrix") and rows[2].path.endswith(
        "GSM1_liver_matrix.mtx.gz"
    )
    config = load_config(here / "config/mine/config.yaml")
    assert config.atlas == "mine" and config.samples == str(here / "config/mine/samples.tsv")
    assert (
        [line.split(" ")[0] for line in said[:3]] == ["left"] * 3
        and "all droplets" in said[0]
        and "notes.txt" in said[2]
    )
    assert said[3] == "found 4 matrices (4 10x mtx), 240 cells; human, by their genes"
    assert said[-2].strip().startswith("scvi-core validate --config")
    before = (here / "config/mine/samples.tsv").read_bytes()
    with pytest.raises(UserError, match="is there already, and is left as it is"):
        begin(here / "data", here / "config/mine")
    assert (here / "config/mine/samples.tsv").read_bytes() == before


def test_one_file_of_many_donors(here):
    path = write(here / "atlas.h5ad", donor_id=["a", "b"] * 30, cell_type=["B", "T", "NK"] * 20, score=np.arange(60))
    said = begin(path, here / "config/mine")
    settings = yaml.safe_load((here / "config/mine/config.yaml").read_text())
    assert settings["input"] == {"batch_column": "donor_id", "metadata": ["cell_type"]}
    assert settings["report"] == {"labels": ["cell_type"]}
    assert "batches by the column 'donor_id', as one file holds them all" in said


def test_two_files_of_several_samples_say_so_in_the_sheet(here):
    write(here / "data/a.h5ad", **{"orig.ident": ["x", "y"] * 30})
    write(here / "data/b.h5ad")
    begin(here / "data", here / "config/mine")
    rows = load_samples(here / "config/mine/samples.tsv")
    assert rows[0].reading == {"sample_column": "orig.ident", "batch_column": "orig.ident"} and rows[1].reading == {}


def test_nothing_to_begin_with(here):
    (here / "data").mkdir()
    for folder, told in (("none", "no such folder"), ("data", "no count matrix that can be read in it")):
        with pytest.raises(UserError, match=told):
            begin(here / folder, here / "config/mine")
    assert not (here / "config").exists()


def test_names_of_samples_come_from_where_they_lie(tmp_path):
    names = {
        "run1/outs/filtered_feature_bc_matrix.h5": "run1",
        "run2/outs/per_sample_outs/S2/count/sample_filtered_feature_bc_matrix.h5": "S2",
        "GSM9_a b_filtered_feature_bc_matrix.h5": "GSM9_a_b",
        "x/counts.csv.gz": "x",
        "y/counts.csv.gz": "y",
        "p/s1.h5ad": "p_s1",
        "q/s1.h5ad": "q_s1",
        "Solo.out/Gene/filtered/matrix.mtx": tmp_path.name,
    }
    found = sample_names([tmp_path / name for name in names], tmp_path)
    assert found[:-1] == list(names.values())[:-1] and len(set(found)) == len(names)
    assert stem(tmp_path / "a.csv.gz") == "a"


def test_of_raw_and_filtered_the_cells_are_taken(tmp_path):
    pairs = [
        "o/raw_feature_bc_matrix.h5",
        "o/filtered_feature_bc_matrix.h5",
        "b_cellbender.h5",
        "b_cellbender_filtered.h5",
    ]
    taken, passed = choose([tmp_path / name for name in [*pairs, "rawlins.h5ad"]])
    assert [path.relative_to(tmp_path).as_posix() for path in taken] == [pairs[1], pairs[3], "rawlins.h5ad"]
    assert [path.relative_to(tmp_path).as_posix() for path, _ in passed] == [pairs[0], pairs[2]]


def test_run_is_snakemake_with_the_workflow_of_the_clone(here, monkeypatch):
    ran = []
    monkeypatch.setattr("os.execv", lambda _, command: ran.append(command))
    (here / "c.yaml").write_text("atlas: a\n")
    assert CliRunner().invoke(app, ["run", "--config", "c.yaml", "--cores", "2", "-n", "--until", "qc"]).exit_code == 0
    root = Path(module.__file__).parents[1]
    options = ["--snakefile", str(root / "Snakefile"), "--configfile", "c.yaml", "--cores", "2", "-n", "--until", "qc"]
    assert ran == [[sys.executable, "-m", "snakemake", *options]]
    done = CliRunner().invoke(app, ["run", "--config", "none.yaml"])
    assert isinstance(done.exception, UserError) and len(ran) == 1


def test_run_says_who_else_builds(here, monkeypatch):
    ran = []
    monkeypatch.setattr("os.execv", lambda _, command: ran.append(command))
    (here / "c.yaml").write_text("atlas: a\n")
    claim = Claim("results/a")
    done = CliRunner().invoke(app, ["run", "--config", "c.yaml"])
    assert isinstance(done.exception, UserError) and "results/a: another build is writing" in str(done.exception)
    assert not ran and CliRunner().invoke(app, ["run", "--config", "c.yaml", "-n"]).exit_code == 0
    claim.release()
    (here / "results/a/.lock").write_text("one that was killed")
    assert CliRunner().invoke(app, ["run", "--config", "c.yaml"]).exit_code == 0 and len(ran) == 2
