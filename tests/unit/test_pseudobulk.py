import warnings

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from _samples import sample, write
from scipy import stats

from scvi_core.config import ContrastConfig, load_config
from scvi_core.files import UserError, write_parquet
from scvi_core.preprocess import samples as sample_files
from scvi_core.pseudobulk import COLUMNS, IS_GROUP, contrast, deseq2, design_matrix, replicate_table, sum_counts

SIX = pd.DataFrame(
    {"condition": ["control"] * 3 + ["treated"] * 3, "sex": list("fmffmm"), "age": [30.0, 41, 55, 33, 47, 62]},
    index=[f"s{i}" for i in range(6)],
)
TEST = {"column": "condition", "group": "treated", "reference": "control"}


def settings(*tests, **more):
    return ContrastConfig.model_validate({"tests": tests or [TEST], **more})


def project(folder, counts, sheet=SIX, clusters=None, genes=None, keeps=None):
    """Samples on disk, cells.parquet and genes.parquet; `counts`: a matrix (cells, genes) a sample."""
    parts = [
        sample(X, name, "b", gene_ids=None if genes is None else genes[i])
        for i, (name, X) in enumerate(zip(sheet.index, counts, strict=True))
    ]
    h5ads, qcs = write(folder, parts, keeps)
    tables = []
    for i, part in enumerate(parts):
        kept = np.ones(part.n_obs, bool) if keeps is None else np.asarray(keeps[i], bool)
        label = ["0"] * part.n_obs if clusters is None else clusters[i]
        table = pd.DataFrame({"cell_id": part.obs_names, "sample": sheet.index[i], "cluster": label})[kept]
        tables.append(table.assign(**sheet.iloc[i].to_dict()))
    ids = list(dict.fromkeys(g for part in parts for g in part.var_names))
    table = pd.DataFrame({"gene_id": ids, "gene_name": [g.lower() for g in ids]})
    return h5ads, qcs, pd.concat(tables, ignore_index=True), table


def simulate(seed, lfc_g, n_cells=50, n_replicates=3, spread=0.35):
    """Counts of 2 x n_replicates samples: gene-wise log-normal differences between samples, Poisson cells.

    Parameters
    ----------
    lfc_g : (genes,) log2 fold change of the second half of the samples.
    spread : standard deviation of log expression between samples of one condition.
    """
    rng = np.random.default_rng(seed)
    base = rng.lognormal(0, 1.2, len(lfc_g))
    out = []
    for i in range(2 * n_replicates):
        rate = base * np.exp(rng.normal(0, spread, len(lfc_g)) + (i >= n_replicates) * lfc_g * np.log(2))
        out.append(rng.poisson(rate * rng.lognormal(0, 0.3, (n_cells, 1)) * rng.uniform(0.5, 1.5)))
    return out


def decided(decisions, what):
    return [d for d in decisions if d.what.endswith(what)]


# ---- the sums


def test_sums_are_those_of_a_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_files, "CHUNK", 60)
    rng = np.random.default_rng(0)
    counts = [rng.poisson(2, (n, 8)) for n in (12, 9, 15, 7)]
    genes = [[f"G{i}" for i in range(8)]] * 2 + [
        [f"G{i}" for i in (7, 2, 0, 1, 3, 4, 5, 6)],
        [f"G{i}" for i in range(1, 9)],
    ]
    clusters = [rng.choice(["0", "2", "10"], len(X)) for X in counts]
    keeps = [rng.random(len(X)) < 0.8 for X in counts]
    sheet = pd.DataFrame({"donor": ["x", "x", "y", "z"]}, index=list("abcd"))
    h5ads, qcs, cells, table = project(tmp_path, counts, sheet, clusters, genes, keeps)
    cells = cells.drop(index=[0, 5]).sample(frac=1, random_state=1)  # any order; some cells are not in the store
    cells.loc[cells.index[3], "cluster"] = None
    made = []
    bulks = sum_counts(h5ads, qcs, cells, table, settings(replicate="donor"), _Said(made))
    assert list(dict.fromkeys(bulks.units["cell_group"])) == ["0", "2", "10"]
    assert made[0][:2] == ("cells left out", 1)
    for u, unit in bulks.units.iterrows():
        total, n = np.zeros(len(table), int), 0
        for name, X, ids in zip("abcd", counts, genes, strict=True):
            mine = cells[(cells["sample"] == name) & (cells["donor"] == unit["replicate"])]
            mine = mine[mine["cluster"] == unit["cell_group"]]
            for cell_id in mine["cell_id"]:
                row = dict(zip(ids, X[int(cell_id.split(":c")[1])], strict=True))
                total += [row.get(gene, 0) for gene in table["gene_id"]]
                n += 1
        assert unit["n_cells"] == n
        assert np.array_equal(bulks.counts_ug[u].toarray()[0], total)
    assert bulks.units["n_cells"].sum() == len(cells) - 1
    measured = bulks.measured_rg
    assert not measured.loc["z", "G0"] and not measured.loc["x", "G8"] and measured.loc[:, "G1":"G7"].all(axis=None)
    long = bulks.table()
    assert len(long) == bulks.counts_ug.nnz and (long["count"] > 0).all()
    wide = long.pivot_table("count", ["cell_group", "replicate"], "gene_id", "sum", 0, observed=True)
    assert wide.to_numpy().sum() == bulks.counts_ug.sum()


class _Said(list):
    def __init__(self, made):
        self.made = made

    def add(self, *what, **more):
        self.made.append(what)


def test_cells_of_no_sample(tmp_path):
    counts = simulate(0, np.zeros(30), 12)
    h5ads, qcs, cells, table = project(tmp_path, counts)
    with pytest.raises(UserError, match=r"12 of its cells are in none of the samples"):
        contrast(h5ads[1:], qcs[1:], cells, table, settings())


# ---- the test


def direct(counts, sheet, formula, fdr=0.05):
    """PyDESeq2 as its own documentation calls it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pydeseq2.dds import DeseqDataSet
        from pydeseq2.ds import DeseqStats

        frame = pd.DataFrame(counts, index=sheet.index, columns=[f"g{i}" for i in range(counts.shape[1])])
        fitted = DeseqDataSet(counts=frame, metadata=sheet, design=formula, quiet=True, n_cpus=1)
        fitted.deseq2()
        found = DeseqStats(fitted, ["condition", "treated", "control"], alpha=fdr, quiet=True, n_cpus=1)
        found.summary()
    return found.results_df.to_numpy()


@pytest.mark.parametrize(
    ("covariates", "formula"),
    [({}, "~condition"), ({"categorical_covariates": ["sex"]}, "~condition + sex")],
    ids=["plain", "sex"],
)
def test_same_numbers_as_pydeseq2_itself(tmp_path, covariates, formula):
    lfc = np.repeat([0.0, 2.0], [60, 10])
    counts = simulate(3, lfc, 30)
    sums = np.array([X.sum(axis=0) for X in counts])
    theirs = direct(sums, SIX, formula)
    frame, bulks, _ = contrast(*project(tmp_path, counts), settings({**TEST, **covariates}, min_counts=1))
    assert np.array_equal(bulks.counts_ug.toarray(), sums)
    tested = (sums >= 1).sum(axis=0) >= 3
    assert tested.all() and len(frame) == len(lfc)
    ours = frame[["base_mean", "lfc", "lfc_se", "stat", "p_value", "p_adjusted"]].to_numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert list(frame["gene_name"][:2]) == ["g0", "g1"]


def test_numbers_as_covariates(tmp_path):
    chosen = SIX.assign(**{IS_GROUP: SIX["condition"] == "treated"})
    one = settings({**TEST, "categorical_covariates": ["sex"], "continuous_covariates": ["age"]}).tests[0]
    design = design_matrix(chosen, one)
    assert list(design) == ["intercept", "contrast", "sex[m]", "age[sd]"]
    assert np.allclose(design["age[sd]"], stats.zscore(SIX["age"])) and list(design["sex[m]"]) == [0, 1, 0, 0, 1, 1]
    assert list(design_matrix(chosen.assign(sex="f"), one)) == ["intercept", "contrast", "age[sd]"]


def test_truth_of_a_simulation(tmp_path):
    lfc = np.zeros(200)
    lfc[:20], lfc[20:40] = 2.0, -2.0
    false = found = 0
    errors = []
    for seed in range(2):
        frame, _, _ = contrast(*project(tmp_path / str(seed), simulate(seed, lfc, n_replicates=3)), settings())
        truth = lfc[frame["gene_id"].str[1:].astype(int)]
        called = frame["is_de"].to_numpy()
        false += int((called & (truth == 0)).sum())
        found += int((called & (np.sign(frame["lfc"]) == np.sign(truth)) & (truth != 0)).sum())
        errors.append(np.median(frame["lfc"][truth == 2.0]) - np.median(frame["lfc"][truth == 0]))
    assert found > 0.6 * 80
    assert false / (false + found) < 0.12
    assert abs(np.mean(errors) - 2) < 0.25


def test_cells_are_no_replicates(tmp_path):
    """The point of it: samples that differ by nothing but their donors."""
    counts = simulate(7, np.zeros(250), n_cells=60)
    frame, _, _ = contrast(*project(tmp_path, counts), settings())
    cells = np.concatenate([np.log1p(1e4 * X / X.sum(axis=1, keepdims=True)) for X in counts])
    p = stats.mannwhitneyu(cells[: 3 * 60], cells[3 * 60 :], axis=0).pvalue
    by_cells = int((stats.false_discovery_control(p) < 0.05).sum())
    assert by_cells > 80
    assert frame["is_de"].sum() <= 4
    assert 0.01 < (frame["p_value"] < 0.05).mean() < 0.12  # p-values near uniform


def test_an_outlying_sample_has_no_p_value(tmp_path):
    counts = simulate(1, np.zeros(60))
    counts[4][:, 7] += 400
    frame, _, _ = contrast(*project(tmp_path, counts), settings())
    row = frame[frame["gene_id"] == "G7"].iloc[0]
    assert np.isnan(row["p_value"]) and np.isnan(row["p_adjusted"]) and not row["is_de"]
    assert row["rank"] > frame.loc[frame["p_value"].notna(), "rank"].max()
    assert sorted(frame["rank"]) == list(range(1, len(frame) + 1))
    ordered = frame[frame["p_value"].notna()].sort_values("rank")
    assert ordered["p_value"].is_monotonic_increasing


def test_few_genes_everywhere(capfd):
    """Where every gene has a zero, size factors come from non-zero counts, and that is told."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.lognormal(3, 1, 120) * rng.lognormal(0, 0.3, (6, 120)))
    counts[np.arange(120) % 6, np.arange(120)] = 0
    chosen = SIX.assign(**{IS_GROUP: SIX["condition"] == "treated"})
    found = deseq2(counts, design_matrix(chosen, settings().tests[0]), 0.05)
    assert "size factors" in found.attrs["notes"] and found["stat"].notna().mean() > 0.9
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["copies", "poisson", "one gene", "two genes"])
def test_data_without_overdispersion(kind):
    """Too even or too small for a trend of dispersions: still an answer, never an exception."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.lognormal(3, 1, 80) * np.ones((6, 1)))
    counts = {"copies": np.tile(counts[:1], (6, 1)), "one gene": counts[:, :1], "two genes": counts[:, :2]}.get(
        kind, counts
    )
    chosen = SIX.assign(**{IS_GROUP: SIX["condition"] == "treated"})
    found = deseq2(counts, design_matrix(chosen, settings().tests[0]), 0.05)
    assert (found["p_adjusted"].fillna(1) > 0.05).all()


# ---- what is left out, and said so


def test_groups_that_cannot_be_tested(tmp_path):
    counts = simulate(2, np.zeros(20), 40)
    clusters = [["0"] * 20 + ["1"] * 15 + ["2"] * 5 for _ in counts]
    clusters[0] = ["0"] * 40  # without cluster 1: still two of control
    clusters[4] = clusters[5] = ["0"] * 25 + ["3"] * 15  # 1 has one treated sample left, 3 no control
    frame, bulks, made = contrast(*project(tmp_path, counts, clusters=clusters), settings())
    assert list(frame["cell_group"].unique()) == ["0"]
    left = {d.value: d for d in decided(made, "cell group not tested")}
    assert set(left) == {"1", "2", "3"}
    assert "1 of 'treated', 2 of 'control'" in left["1"].reason and left["1"].n_cells == 45
    assert "0 of 'treated', 0 of 'control'" in left["2"].reason
    (small,) = decided(made, "pseudobulks left out")
    assert (small.value, small.n_cells) == (3, 15) and len(bulks.units) == 6 + 3 + 3 + 2
    (called,) = decided(made, "genes called")
    assert called.value == {"0": int(frame["is_de"].sum())}
    row = frame.iloc[0]
    assert (row["n_replicates_group"], row["n_cells_group"], row["n_cells_reference"]) == (
        3,
        20 + 25 + 25,
        40 + 20 + 20,
    )


def test_nothing_can_be_tested(tmp_path):
    frame, _, made = contrast(*project(tmp_path, simulate(2, np.zeros(20), 5)), settings())
    assert list(frame.columns) == list(COLUMNS) and frame.empty
    assert [d.value for d in decided(made, "cell group not tested")] == ["0"]
    write_parquet(tmp_path / "empty.parquet", frame)
    assert pd.read_parquet(tmp_path / "empty.parquet")["lfc"].dtype == np.float64


@pytest.mark.parametrize(
    "covariates", [{"categorical_covariates": ["sex"]}, {"continuous_covariates": ["age"]}, {}], ids=str
)
def test_a_group_without_an_eligible_sample_takes_no_other_along(tmp_path, covariates):
    counts = simulate(2, np.zeros(20), 30)
    clusters = [["0"] * 26 + ["rare"] * 4 for _ in counts]
    frame, _, made = contrast(*project(tmp_path, counts, clusters=clusters), settings({**TEST, **covariates}))
    assert list(frame["cell_group"].unique()) == ["0"]
    (left,) = decided(made, "cell group not tested")
    assert (left.value, left.n_cells) == ("rare", 0) and "0 of 'treated', 0 of 'control'" in left.reason


def test_a_replicate_without_counts_is_left_out(tmp_path):
    """In group `rare` gene 19 alone is counted, and not in every sample: those without it have no size factor."""
    rng = np.random.default_rng(0)
    counts = simulate(2, np.zeros(20), 50)
    for X in counts:
        X[30:] = 0
        X[30:, 19] = rng.poisson(6, 20)
    clusters = [["0"] * 30 + ["rare"] * 20 for _ in counts]
    counts[0][30:] = 0
    frame, _, made = contrast(*project(tmp_path / "five", counts, clusters=clusters), settings())
    assert set(frame["cell_group"]) == {"0", "rare"}
    rare = frame[frame["cell_group"] == "rare"]
    assert list(rare["gene_id"]) == ["G19"] and (rare["n_replicates_reference"] == 2).all()
    (left,) = decided(made, "replicates left out")
    assert left.value == ["s0"] and "cluster rare: no count of any gene" in left.reason
    counts[1][30:] = 0
    frame, _, made = contrast(*project(tmp_path / "four", counts, clusters=clusters), settings())
    assert set(frame["cell_group"]) == {"0"}
    (left,) = decided(made, "cell group not tested")
    assert (
        left.value == "rare" and "samples with enough cells and counts: 3 of 'treated', 1 of 'control'" in left.reason
    )


def test_a_fit_that_fails_takes_no_other_along(tmp_path, monkeypatch):
    counts = simulate(2, np.zeros(20), 40)
    clusters = [["0"] * 20 + ["1"] * 20 for _ in counts]
    deaf = iter([ValueError("Input y contains\nNaN"), None])

    def fit(*given):
        error = next(deaf)
        if error:
            raise error
        return deseq2(*given)

    monkeypatch.setattr("scvi_core.pseudobulk.deseq2", fit)
    frame, _, made = contrast(*project(tmp_path, counts, clusters=clusters), settings())
    assert list(frame["cell_group"].unique()) == ["1"]
    (left,) = decided(made, "cell group not tested")
    assert (left.value, left.n_cells) == ("0", 120) and "cannot fit it (Input y contains NaN)" in left.reason


def test_all_cells_as_one_group(tmp_path):
    counts = simulate(2, np.zeros(20), 20)
    clusters = [["0"] * 10 + ["1"] * 10 for _ in counts]
    frame, bulks, _ = contrast(*project(tmp_path, counts, clusters=clusters), settings(within=None))
    assert list(frame["cell_group"].unique()) == ["all"] and list(bulks.units["n_cells"]) == [20] * 6


def test_a_gap_is_no_zero(tmp_path):
    """A gene that a sample's annotation lacks is not tested, whatever it looks like as zeros."""
    counts = simulate(2, np.zeros(20), 30)
    ids = [f"G{i}" for i in range(20)]
    counts[5], fewer = counts[5][:, :-1], ids[:-1]
    frame, _, made = contrast(*project(tmp_path, counts, genes=[ids] * 5 + [fewer]), settings())
    assert "G19" not in set(frame["gene_id"]) and "1 genes are not measured" in decided(made, "genes tested")[0].reason


def test_levels_that_are_numbers(tmp_path):
    sheet = SIX.assign(hour=[0, 0, 0, 24, 24, 24])
    one = {"column": "hour", "group": 24, "reference": "0"}
    frame, _, _ = contrast(*project(tmp_path, simulate(2, np.zeros(20), 30), sheet), settings(one))
    assert set(frame["contrast"]) == {"hour_24_vs_0"} and (frame["n_replicates_group"] == 3).all()


# ---- one clear line


@pytest.mark.parametrize(
    ("test", "more", "words"),
    [
        ({"column": "conditoin"}, {}, "no column 'conditoin'"),
        ({}, {"within": "cell_type"}, "no column 'cell_type'"),
        ({}, {"replicate": "donor"}, "no column 'donor'"),
        ({"column": "cluster", "group": "0", "reference": "1"}, {}, "'cluster' has several values .*one value a"),
        ({"group": "Treated"}, {}, "no sample has condition 'Treated'; there are control, other, treated"),
        ({"group": "other"}, {}, "'other' has 1 sample; a test across replicates needs 2"),
        ({"categorical_covariates": ["lab"]}, {}, "'lab' decides 'condition'.*take 'lab' out of categorical"),
        ({"continuous_covariates": ["dose"]}, {}, "'dose' decides 'condition'"),
        ({"categorical_covariates": ["sex", "sex2"]}, {}, "'condition', 'sex', 'sex2' determine one another"),
        ({"categorical_covariates": ["donor6"]}, {}, "'donor6' decides 'condition'"),
        ({"categorical_covariates": ["pair", "sex"], "continuous_covariates": ["age"]}, {}, "6 .* cannot carry"),
        ({"continuous_covariates": ["sex"]}, {}, "'sex' is not all numbers .*name it in categorical"),
        ({"categorical_covariates": ["gap"]}, {}, "sample 's2' has no 'gap'"),
    ],
    ids=str,
)  # fmt: skip
def test_errors(test, more, words):
    sheet = SIX.assign(
        lab=["l1", "l1", "l2", "l3", "l3", "l3"],
        dose=[0.0, 0, 0, 2, 2, 2],
        sex2=["F" if s == "f" else "M" for s in SIX["sex"]],
        donor6=list("abcdef"),
        pair=list("abcabc"),
        gap=["x", "y", None, "x", "y", "x"],
        cluster="0",
    )
    sheet.loc["s6"] = sheet.loc["s0"]
    sheet.loc["s6", "condition"] = "other"
    cells = sheet.reset_index(names="sample").loc[np.repeat(np.arange(7), 3)].reset_index(drop=True)
    cells["cell_id"] = [f"c{i}" for i in range(21)]
    cells.loc[1, "cluster"] = "1"
    with pytest.raises(UserError, match=words) as caught:
        contrast([], [], cells, pd.DataFrame({"gene_id": [], "gene_name": []}), settings({**TEST, **test}, **more))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"tests": [{**TEST, "colum": "x"}]}, "contrast.tests.0.colum'; did you mean 'contrast.tests.0.column'"),
        ({"tests": [{"column": "condition", "group": "a"}]}, "contrast.tests.0.reference"),
        ({"tests": [{**TEST, "group": "control"}]}, "group and reference are both 'control'"),
        ({"tests": [TEST, TEST]}, "two contrasts are named 'condition_treated_vs_control'"),
        ({"tests": [{**TEST, "categorical_covariates": ["condition"]}]}, "'condition' is named twice"),
        ({"min_replicates": 1}, "contrast.min_replicates"),
    ],
    ids=str,
)
def test_configuration(section, words):
    with pytest.raises(UserError) as caught:
        load_config({"contrast": section})
    assert words in str(caught.value)


def test_replicates_are_one_row_each():
    cells = pd.DataFrame({"sample": ["b", "a", "b"], "cluster": "0", "condition": ["y", "x", "y"]})
    table = replicate_table(cells, settings())
    assert list(table.index) == ["a", "b"] and list(table["condition"]) == ["x", "y"]


# ---- in the report


def test_rows_of_the_report():
    from scvi_core.report import contrasts

    genes = [("G1", 2.0, True, 2), ("G2", -1.0, True, 3), ("G3", 3.0, True, 1), ("G4", 9.0, False, 4)]
    names = {"G1": "a", "G2": "b", "G3": "c", "G4": "d"}
    frame = pd.DataFrame(genes, columns=["gene_id", "lfc", "is_de", "rank"])
    frame = frame.assign(contrast="t_vs_c", cell_group="0", n_replicates_group=3, n_replicates_reference=4)
    (row,) = contrasts(frame, names)
    assert row == {
        "contrast": "t_vs_c", "cell_group": "0", "n_genes": 4, "n_replicates_group": 3, "n_replicates_reference": 4,
        "n_up": 2, "n_down": 1, "up": ["c", "a"], "down": ["b"],
    }  # fmt: skip
    assert contrasts(frame.head(0), names) == []


# ---- as a command


def test_command(tmp_path, monkeypatch):
    from scvi_core.cli import main

    h5ads, _, cells, genes = project(tmp_path / "in", simulate(5, np.repeat([0.0, 3.0], [40, 6]), 20))
    write_parquet(tmp_path / "cells.parquet", cells)
    write_parquet(tmp_path / "genes.parquet", genes)
    written = []
    for run in ("one", "two"):
        out = tmp_path / run
        arguments = ["contrast", *h5ads, "--cells", tmp_path / "cells.parquet", "--genes", tmp_path / "genes.parquet"]
        arguments += [
            "--config",
            settings_json(),
            "--out",
            out / "contrast.parquet",
            "--pseudobulk",
            out / "sums.parquet",
        ]
        monkeypatch.setattr("sys.argv", ["scvi-core", *map(str, arguments), "--decisions", str(out / "d.jsonl")])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        written.append({p.name: p.read_bytes() for p in out.iterdir()})
    assert written[0] == written[1] and set(written[0]) == {"contrast.parquet", "sums.parquet", "d.jsonl"}
    schema = pq.read_schema(tmp_path / "one" / "contrast.parquet")
    kinds = {"object": "string", "float64": "double"}
    assert {f.name: str(f.type) for f in schema} == {
        c: kinds.get(np.dtype(k).name, np.dtype(k).name) for c, k in COLUMNS.items()
    }
    frame = pd.read_parquet(tmp_path / "one" / "contrast.parquet")
    assert frame.loc[frame["gene_id"].isin([f"G{i}" for i in range(40, 46)]), "is_de"].all()
    sums = pq.read_schema(tmp_path / "one" / "sums.parquet")
    assert {f.name: str(f.type) for f in sums} == {
        "replicate": "string", "cell_group": "string", "n_cells": "int64", "gene_id": "string", "count": "int64",
    }  # fmt: skip


def settings_json():
    return load_config({"contrast": {"tests": [TEST]}}).model_dump_json(include={"contrast"})
