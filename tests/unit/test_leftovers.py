import pytest

from scvi_core.cli import main
from scvi_core.config import load_config, load_samples
from scvi_core.files import Claim, UserError
from scvi_core.leftovers import leftovers

OURS = [
    "cells.parquet", "criticism/checks.json", "decisions/criticism.jsonl", "decisions/qc.a.jsonl", "logs/criticism.log",
    "samples/a/counts.h5ad", "samples/a/qc.parquet", "counts.zarr/.zattrs", "counts.zarr/X/data/0", "model_ref.json",
]  # fmt: skip
GONE = ["samples/b.2/counts.h5ad", "samples/b.2/qc.png", "decisions/ingest.b.2.jsonl", "benchmarks/qc.b.2.tsv"]
OFF = [
    "contrast.parquet", "pseudobulk.parquet", "logs/contrast.log", "labels.parquet", "loadings.parquet",
    "benchmarks/loadings.tsv",
]  # fmt: skip
USERS = ["samples/b.2/notes.txt", "thesis.docx", "figures/mine.png", "contrast.xlsx", "samples/b.2.txt", "logs/own.log"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples.tsv").write_text("sample\tpath\tbatch\na\ta.h5ad\tone\n")
    (tmp_path / "config.yaml").write_text("{atlas: small, samples: samples.tsv}")
    for name in (*OURS, *GONE, *OFF, *USERS):
        path = tmp_path / "results/small" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def found(project, **config):
    settings = load_config({"atlas": "small", **config})
    return {path.relative_to("results/small").as_posix() for path in leftovers(settings.folder, settings, ["a"])}


def test_what_no_longer_belongs(project):
    assert found(project) == {*GONE, *OFF}
    assert found(project, model={"decoder": "linear"}) == {*GONE, *OFF[:4]}
    off = {"criticism/checks.json", "decisions/criticism.jsonl", "logs/criticism.log"}
    assert found(project, criticism={"enabled": False}) == {*GONE, *OFF, *off}
    (project / "results/small/counts.zarr/.zattrs").unlink()  # as Snakemake's --delete-all-output leaves a store
    assert found(project) == {*GONE, *OFF, "counts.zarr/X/data/0"}


def test_removed_only_when_asked(project, monkeypatch, capsys):
    def run(*options):
        monkeypatch.setattr("sys.argv", ["scvi-core", "leftovers", "--config", "config.yaml", *options])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, capsys.readouterr()

    code, said = run()
    assert code == 0 and set(said.out.split()) == {f"results/small/{name}" for name in (*GONE, *OFF)}
    assert "10 files of earlier builds: listed; --remove" in said.err
    claim = Claim("results/small")
    code, said = run("--remove")
    assert code == 1 and "another build is writing into it" in said.err and len(found(project)) == 10
    claim.release()
    assert run("--remove")[0] == 0
    top = project / "results/small"
    assert {p.relative_to(top).as_posix() for p in top.rglob("*") if p.is_file()} == {*OURS, *USERS}
    assert "0 files of earlier builds" in run()[1].err
    (project / "results/small/samples/b.2/notes.txt").unlink()
    (project / "results/small/samples/b.2/qc.png").write_text("")
    run("--remove")
    assert not (project / "results/small/samples/b.2").exists() and (project / "results/small/samples/a").exists()


# ---- the sheet, whose unused columns pass


def test_columns_that_nothing_uses_pass(tmp_path, caplog):
    sheet = tmp_path / "samples.tsv"
    names = ["sample", "path", "batch", "BMI (kg/m²)", "Körpergröße", "viable %", "", "day of life", ".zattrs", "2nd"]
    sheet.write_text("\t".join(names) + "\n" + "\t".join("abcdefghij") + "\n", "utf-8")
    [row] = load_samples(sheet)
    assert row.metadata == {"day of life": "h"} and (row.sample, row.path, row.batch) == ("a", "b", "c")
    assert "left out for their names: 'BMI (kg/m²)', 'Körpergröße', 'viable %', '', '.zattrs', '2nd'" in caplog.text


def test_a_sample_that_looks_like_a_comment_is_told(tmp_path, caplog):
    sheet = tmp_path / "samples.tsv"
    sheet.write_text("# of March\nsample\tpath\tbatch\n#1\tx\ty\n2\tx\ty\n")
    assert [row.sample for row in load_samples(sheet)] == ["2"]
    assert "line 3: '#1' begins with '#': skipped" in caplog.text and "of March" not in caplog.text
    sheet.write_text("#sample\tpath\tbatch\n1\tx\ty\n")
    with pytest.raises(UserError, match="line 1: the header begins with '#', as comments do; write 'sample'"):
        load_samples(sheet)
