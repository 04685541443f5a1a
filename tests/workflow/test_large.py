"""A build of 24,000 cells: every size at which something changes is passed, by the defaults but of training."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from _project import CONFIG, GENES, changed, counts, snakemake, write_config, write_h5ad, write_sheet

from scvi_core.cluster import EXACT_CELLS, LANDMARKS, TSNE_CELLS

N_SAMPLES, SIZE = 3, 8_000
N_CELLS = N_SAMPLES * SIZE
MEMORY_GB = 0.0065  # counts of 24,000 cells and 250 genes take more, so they are streamed


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    names = [f"s{i}" for i in range(N_SAMPLES)]
    for i, name in enumerate(names):
        table = pd.DataFrame(counts(i, SIZE, 6)[0], index=[f"CELL{j}" for j in range(SIZE)], columns=GENES)
        write_h5ad(folder / "data" / f"{name}.h5ad", table, cell_type=[f"type{j % 6}" for j in range(SIZE)])
    write_sheet(folder, {"sample": names, "path": [f"data/{n}.h5ad" for n in names], "batch": names})
    config = changed(
        CONFIG,
        atlas="large",
        threads=2,
        genes__n_top=250,
        train__max_epochs=2,
        train__validation_fraction=0.5,
        train__memory_gb=MEMORY_GB,
        input__metadata=["cell_type"],
        report__labels=["cell_type"],
    )
    write_config(folder, config)
    done = snakemake(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "results" / "large", done


def decisions(folder):
    lines = (folder / "decisions.jsonl").read_text().splitlines()
    return {(d["step"], d["what"]): d for d in map(json.loads, lines)}


def test_every_size_at_which_something_changes_is_passed(large):
    folder, _ = large
    cells = pd.read_parquet(folder / "cells.parquet")
    assert 0.95 * N_CELLS < len(cells) <= N_CELLS
    assert len(cells) > max(8_191, EXACT_CELLS, 2 * LANDMARKS, TSNE_CELLS)
    made = decisions(folder)
    assert made["cluster", "neighbors"]["value"] == "inverted file"
    assert made["cluster", "umap_start"]["value"] == "landmarks"
    assert made["cluster", "tsne"]["value"] == "off"
    assert made["criticism", "cells examined"]["value"] == 10_000  # of as many that training held out
    assert json.loads((folder / "model" / "model.json").read_text())["metrics"]["n_validation"] == 10_000
    assert "counts streamed from" in (folder / "logs" / "train.log").read_text()


def test_cells_of_a_type_lie_together(large):
    folder, _ = large
    cells = pd.read_parquet(folder / "cells.parquet")
    assert np.isfinite(cells[["umap_1", "umap_2"]]).all(axis=None)
    assert cells[["tsne_1", "tsne_2"]].isna().all(axis=None)
    assert json.loads((folder / "metrics.json").read_text())["labels"]["cell_type"]["ari"] > 0.5
    assert len(pd.read_parquet(folder / "latent.parquet")) == len(cells)


def test_the_page_thins_what_it_draws(large):
    folder, _ = large
    page = (folder / "report.html").read_text()
    assert page.count("<img") > 5
    assert not (folder / "figures" / "tsne_cluster.png").exists()


def test_the_end_says_where_the_time_went_and_where_the_page_is(large):
    _, done = large
    shown = done.stdout + done.stderr
    assert "Where the time went" in shown and re.search(r"The page is \S+/report.html; open", shown)
