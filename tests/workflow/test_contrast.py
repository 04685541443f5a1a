"""Contrasts in the workflow: there where they are asked for, and only there; refused before anything runs."""

import pytest
from _project import CONFIG, SHEET, changed, here, make, snakemake, write_config

TEST = {"column": "condition", "group": "treated", "reference": "control"}
FOUR = {
    "sample": ["a", "b", "c", "d"],
    "path": ["data/a.h5ad", "data/b", "data/c.csv.gz", "data/a.h5ad"],
    "batch": ["one", "two", "one", "two"],
    "donor": ["d1", "d2", "d3", "d4"],
    "condition": ["treated", "treated", "control", "control"],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make(tmp_path_factory.mktemp("contrast") / "project", sheet=FOUR)


def planned(folder):
    done = snakemake(folder, "-n")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_rule_runs_where_a_contrast_is_named(project):
    write_config(project, CONFIG)
    assert "rule contrast:" not in planned(project)
    write_config(project, changed(CONFIG, contrast__tests=[TEST]))
    plan = planned(project)
    assert "rule contrast:" in plan
    assert "results/small/contrast.parquet, results/small/pseudobulk.parquet" in plan  # inputs of the report too


@pytest.mark.parametrize(
    ("contrast", "words"),
    [
        ({"tests": [{**TEST, "column": "conditoin"}]}, "contrast.tests.0: no cell column 'conditoin'; did you"),
        ({"tests": [{**TEST, "group": "Treated"}]}, "contrast.tests.0.group: no sample has condition 'Treated'"),
        ({"tests": [{**TEST, "column": "donor", "group": "d1", "reference": "d2"}]}, "has 1 sample of donor 'd1'"),
        ({"tests": [{**TEST, "categorical_covariates": ["sex"]}]}, "no cell column 'sex'"),
        ({"tests": [{**TEST, "categorical_covariates": ["donor"]}]}, "'donor' decides 'condition'"),
        ({"tests": [TEST], "replicate": "batch"}, "'condition' has several values"),
        ({"tests": [TEST], "within": "cell_type"}, "contrast.within: no cell column 'cell_type'"),
        ({"tests": [TEST], "replicate": "doner"}, "contrast.replicate: no cell column 'doner'; did you mean 'donor'"),
    ],
    ids=str,
)  # fmt: skip
def test_refused_at_once(project, contrast, words):
    write_config(project, {**CONFIG, "contrast": contrast})
    done = here(project, "validate")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1 and len(errors) == 1 and words in errors[0], done.stderr


def test_what_a_design_cannot_tell_is_said_at_once(project):
    write_config(project, changed(CONFIG, contrast__tests=[TEST]))
    done = here(project, "validate")
    assert done.returncode == 0 and "valid: atlas" in done.stderr
    assert "WARNING design: Contrast condition_treated_vs_control: batch one, two hold" in done.stderr
    assert (
        "give each sample its own batch" in done.stderr
        and "with fewer than 3 of each, few genes can be found" in done.stderr
    )


def test_batches_and_numbers_are_columns_too(project):
    tests = [{"column": "batch", "group": "one", "reference": "two"}]
    write_config(project, changed(CONFIG, contrast__tests=tests))
    assert here(project, "validate").returncode == 0
    assert "condition" not in SHEET  # the other tests' sheet has no contrast to make
