"""The workflow and the library as others find them: formatted, documented, importable, light to start."""

import re
import subprocess
import sys

import pytest
from _project import BIN, ROOT, cli, environment, here, make, snakemake

COMMANDS = [
    "validate",
    "ingest",
    "qc",
    "genes",
    "store",
    "lookup",
    "train",
    "embed",
    "annotate",
    "cluster",
    "de",
    "register",
]
COMMANDS += ["expression", "loadings", "contrast", "criticism", "report", "export", "times", "map"]
MODELS = ["list", "show", "promote"]


def run(*command, cwd=ROOT):
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment(), capture_output=True, text=True, check=False
    )


def python(code):
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "command",
    [
        "snakemake --lint --configfile config/demo/config.yaml",
        "snakemake --lint -s workflow/Snakefile --configfile config/demo/config.yaml",
        "snakefmt --check Snakefile workflow",
        "ruff check .",
        "ruff format --check .",
    ],
)
def test_clean(command):
    tool, *arguments = command.split()
    done = run(BIN / tool, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def test_schemas_are_those_of_the_configuration(tmp_path):
    assert cli(tmp_path, "validate", "--schemas", "schemas").returncode == 0
    for name in ("config.schema.yaml", "samples.schema.yaml"):
        assert (tmp_path / "schemas" / name).read_text() == (ROOT / "workflow" / "schemas" / name).read_text()


@pytest.mark.parametrize("command", [[], ["models"], *([c] for c in COMMANDS), *(["models", c] for c in MODELS)])
def test_help(command, tmp_path):
    done = here(tmp_path, *command, "--help")
    assert done.returncode == 0 and not done.stderr
    if command in ([], ["models"]):
        assert all(name in done.stdout for name in (MODELS if command else COMMANDS))
    else:
        assert f"Example: scvi-core {' '.join(command)}" in done.stdout


# ---- what imports what


def test_imports_go_one_way():
    for path in (ROOT / "scvi_core").rglob("*.py"):
        assert "import snakemake" not in path.read_text() and "from snakemake" not in path.read_text(), path
    heavy = {"mlflow", "scanpy", "matplotlib", "snakemake"}
    for module in ("model", "train"):
        loaded = python(f"import sys, scvi_core.{module}; print(*sorted({heavy} & set(sys.modules)))")
        assert not loaded, module


def test_the_configuration_is_light():
    heavy = {"torch", "pandas", "numpy", "anndata", "scanpy", "mlflow"}
    loaded = python(f"import sys, scvi_core, scvi_core.config, scvi_core.cli; print(*({heavy} & set(sys.modules)))")
    assert not loaded


# ---- snakemake's own ways in


@pytest.mark.parametrize("name", ["out.html", "out.zip"])
def test_snakemake_report(built, tmp_path, name):
    done = snakemake(built, "--report", tmp_path / name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / name).stat().st_size > 100_000


def test_workflow_as_a_module(tmp_path):
    folder = make(tmp_path / "other")
    (folder / "Snakefile").write_text(
        f"""
import yaml

with open("config/config.yaml") as handle:
    settings = yaml.safe_load(handle)


module atlas:
    snakefile:
        "{ROOT}/workflow/Snakefile"
    config:
        settings


use rule * from atlas as atlas_*


rule mine:
    default_target: True
    input:
        rules.atlas_all.input,
    output:
        "mine.txt",
    shell:
        "cp {{input}} {{output}}"
"""
    )
    done = snakemake(folder, "-n", snakefile=folder / "Snakefile")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"atlas_{rule}" in done.stdout + done.stderr for rule in ("ingest", "train", "register", "report"))
    target = "results/small/samples/a/counts.h5ad"
    done = snakemake(folder, target, snakefile=folder / "Snakefile")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / target).exists()


def test_root_and_workflow_snakefile_are_one(built):
    for snakefile in (ROOT / "Snakefile", ROOT / "workflow" / "Snakefile"):
        done = snakemake(built, "-n", snakefile=snakefile)
        assert "Nothing to be done" in done.stdout + done.stderr, done.stdout + done.stderr


def test_readme_names_every_key_of_the_configuration():
    from pydantic import BaseModel

    from scvi_core.config import Config

    text = (ROOT / "config/README.md").read_text("utf-8")

    def keys(model):
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                assert f"### `{name}`" in text
                yield from keys(field.annotation)
            else:
                yield name, field.description

    missing = [
        name
        for name, told in keys(Config)
        if not re.search(rf"^\| `{name}` \|.*{re.escape(told or '')}", text.replace("\\|", "|"), re.M)
    ]
    assert not missing
