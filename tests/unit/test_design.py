"""What is said of a design before anything runs: as the step would refuse it, and what it cannot tell."""

import pandas as pd
import pytest

from scvi_core import design
from scvi_core.config import Config, Sample, load_config
from scvi_core.files import UserError

TEST = {"column": "condition", "group": "stim", "reference": "ctrl"}


def sheet(batch="sample", given=None, **columns):
    """Three donors, each with a control and a stimulated sample."""
    rows = []
    for i, (donor, condition) in enumerate((d, c) for d in ("d1", "d2", "d3") for c in ("ctrl", "stim")):
        own = {"donor": donor, "condition": condition, "age": ["31", "31", "45", "45", "62", "62"][i]}
        own |= {name: values[i] for name, values in columns.items()}
        rows.append(Sample(sample=f"s{i}", path="x", batch=own.get(batch, f"s{i}"), metadata=own))
    return design.sheet_table(rows, load_config(given or {}))


def config(*tests, de=None, **contrast) -> Config:
    return load_config({"contrast": {"tests": list(tests or [TEST]), **contrast}, "de": de or {}})


def test_types_are_those_of_the_cells():
    table = sheet(dose=["1", "1.0", "2", "2", "1e+1", "10"], plate=["01", "01", "02", "02", "03", "03"])
    assert list(table["dose"]) == [1, 1, 2, 2, 10, 10] and list(table["age"][:2]) == [31, 31]
    assert list(table["plate"]) == ["01", "01", "02", "02", "03", "03"]
    wells = ["1E1", "1E2", "1E3", "2E1", "2E2", "2E3"]  # names of wells, not numbers
    assert list(sheet(well=wells)["well"]) == wells


@pytest.mark.parametrize(
    ("columns", "test", "more", "words"),
    [
        ({"sex": ["f", "m", "NA", "f", "m", "f"]}, {"categorical_covariates": ["sex"]}, {}, "'s2' has no 'sex'"),
        ({"sex": ["f", "m", "", "f", "m", "f"]}, {"categorical_covariates": ["sex"]}, {}, "'s2' has no 'sex'"),
        ({"bmi": ["20", "21", "NA", "30", "22", "25"]}, {"continuous_covariates": ["bmi"]}, {}, "'s2' has no 'bmi'"),
        ({"bmi": ["20", "21", "fat", "30", "22", "25"]}, {"continuous_covariates": ["bmi"]}, {}, "such as 'fat'"),
        ({"lab": ["a", "b"] * 3}, {"categorical_covariates": ["lab"]}, {}, "'lab' decides 'condition'"),
        ({"who": list("abcdef")}, {"categorical_covariates": ["who"]}, {}, "'who' decides 'condition'"),
        ({}, {}, {"replicate": "donor"}, "'condition' has several values"),
        ({"day": ["1", "x", "1.0", "x", "2", "2"]}, {"column": "day", "group": "2", "reference": "1"}, {}, None),
        ({"day": ["1", "3", "1.0", "3", "2", "2"]}, {"column": "day", "group": "2", "reference": 1.0}, {}, None),
        ({"day": ["1", "3", "4", "3", "2", "2"]}, {"column": "day", "group": "2", "reference": "1"}, {}, "'1' has 1"),
    ],
    ids=str,
)  # fmt: skip
def test_refused_as_the_step_would(columns, test, more, words):
    asked = config({**TEST, **test}, **more)
    if words is None:
        design.check(sheet(**columns), asked)
        return
    with pytest.raises(UserError, match=words) as caught:
        design.check(sheet(**columns), asked)
    assert "\n" not in str(caught.value)


def test_columns_that_only_the_inputs_have_are_left_to_the_step():
    design.check(sheet(), config({**TEST, "column": "treatment"}))
    design.check(sheet(), config(replicate="well"))
    assert design.remarks(sheet(), config({**TEST, "column": "treatment"})) == []


def test_batches_that_only_the_inputs_know_are_not_judged():
    table = sheet("donor", {"input": {"batch_column": "well"}})
    assert "batch" not in table and not any("batch" in said for said in design.remarks(table, config()))
    design.check(table, config())
    table = sheet("donor", {"input": {"sample_column": "well"}})[:1]  # one file, of many samples
    design.check(table, config())
    assert "sample" not in table and design.remarks(table, config()) == []


def test_a_batch_that_spans_the_levels():
    """Donor as batch: the model corrects nothing between conditions, and clusters may split by them."""
    (said,) = [s for s in design.remarks(sheet("donor"), config()) if "clusters may split" in s]
    assert "batch d1, d2, d3 hold 'stim' and 'ctrl' of condition" in said and "give each sample its own batch" in said
    assert not any("batch" in s for s in design.remarks(sheet("sample"), config()))


def test_levels_that_are_batches():
    (said,) = [s for s in design.remarks(sheet("condition"), config()) if "batch" in s]
    assert "a level's samples are all one batch" in said and "cannot be told from 'stim' and 'ctrl'" in said


def test_pairs_and_few_replicates():
    (said,) = design.remarks(sheet(), config())
    assert "each 'donor' has one sample of either level; name it in categorical_covariates" in said
    assert design.remarks(sheet(), config({**TEST, "categorical_covariates": ["donor"]})) == []
    said = design.remarks(sheet()[:4], config({**TEST, "categorical_covariates": ["donor"]}))
    assert len(said) == 1 and "only 2 samples of one condition; with fewer than 3" in said[0]


def test_groups_that_are_batches():
    asked = config(de={"groupby": "condition"})
    table = sheet()
    said = [s for s in design.remarks(table, asked) if "de.groupby" in s]
    assert len(said) == 1 and "No batch holds two groups of 'condition'" in said[0]
    assert not [s for s in design.remarks(sheet("donor"), asked) if "de.groupby" in s]
    assert not [s for s in design.remarks(table, config(de={"groupby": "condition", "batches": "own"})) if "de.g" in s]
    cells = pd.concat([table] * 3)  # a row a cell says the same
    assert design.remarks(cells, asked) == design.remarks(table, asked)
