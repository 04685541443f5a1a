import collections
import json
import re
from html.parser import HTMLParser

import anndata
import numpy as np
import pandas as pd
import pytest
from _samples import sample as make_sample
from _samples import write_sample
from matplotlib.figure import Figure

from scvi_core import report
from scvi_core.config import load_config
from scvi_core.files import Decisions, UserError, read_json, write_json, write_parquet
from scvi_core.labels import Taxonomy
from scvi_core.preprocess.qc import FLAGS
from scvi_core.report import expression, figures, sentences, style, viewer
from scvi_core.report.viewer import MISSING, PALETTE, levels

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "β-Zellen & $\\frac{",
    "_leading",
    "线粒体",
]


def write_atlas(folder, n_cells=240, n_clusters=5, labels=HOSTILE, n_genes=120, n_epochs=30):
    """Write a results folder as the contracts describe it: three samples, names meant to break out of the page."""
    rng = np.random.default_rng(1)
    samples = ["donor1", "donor.2", "d3-x"]
    kept, qc_rows, counts = [], {}, {}
    ids = [f"ENSG{i:011d}" for i in range(n_genes)]
    names = [HOSTILE[0] if i == 3 else f"GENE{i}" for i in range(n_genes)]
    for i, sample in enumerate(samples):
        n = n_cells // 3
        qc = pd.DataFrame(
            {
                "cell_id": [f"{sample}:B{j}" for j in range(n)],
                "barcode": [f"B{j}" for j in range(n)],
                "sample": sample,
                "batch": HOSTILE[0] if i == 0 else "b2",
                "n_counts": rng.lognormal(8 + i / 4, 0.6, n).astype("int64"),
                "n_genes": rng.lognormal(7, 0.4, n).astype("int32"),
                "pct_mito": rng.gamma(2, 2, n).astype("float32"),
                "pct_ribo": rng.gamma(9, 2, n).astype("float32"),
                "pct_hb": np.zeros(n, "float32"),
                "pct_top50": rng.normal(35, 6, n).astype("float32"),
                "doublet_score": np.full(n, np.nan, "float32") if i == 2 else rng.beta(1, 9, n).astype("float32"),
                "predicted_doublet": rng.random(n) < 0.05,
            }
        )
        high = qc["pct_mito"] > 9
        qc["flags"] = np.where(high & qc["predicted_doublet"], "high_mito,doublet", np.where(high, "high_mito", ""))
        qc["keep"], qc["reason"] = ~high, np.where(high, "high_mito", "")
        qc_rows[sample] = qc
        write_parquet(folder / f"samples/{sample}/qc.parquet", qc)
        counts[sample] = rng.poisson(0.4, (n, n_genes))
        counts[sample][:, 0] += 5 * np.arange(n) % 7
        of = pd.Categorical(np.where(high, labels[1], labels[0]))
        adata = make_sample(counts[sample], sample, gene_ids=ids, gene_names=names, **{"cell type": of})
        adata.obs_names = list(qc["cell_id"])
        write_sample(folder / f"samples/{sample}/counts.h5ad", adata)
        d = Decisions("qc", sample)
        d.add("low_counts.mad", 800.0, "median - 5 MAD")
        d.add("high_mito.mad", 9.0, "median + 5 MAD, within the fixed limit")
        d.add("dropped", int(high.sum()), "flags listed in qc.drop", n_cells=int(high.sum()))
        d.write(folder / f"decisions/qc.{sample}.jsonl")
        kept.append(qc[qc["keep"]])
    cells = pd.concat(kept, ignore_index=True)
    cells = cells[["cell_id", "sample", "batch", "n_counts", "n_genes", "pct_mito", "doublet_score"]]
    group = rng.integers(0, n_clusters, len(cells))
    angle = group / n_clusters * 6.283
    cells["cluster"] = group.astype(str)
    cells["umap_1"] = (np.cos(angle) * 8 + rng.normal(0, 1, len(cells))).astype("float32")
    cells["umap_2"] = (np.sin(angle) * 8 + rng.normal(0, 1, len(cells))).astype("float32")
    cells["cell type"] = [None if rng.random() < 0.1 else labels[g % len(labels)] for g in group]
    cells["age"] = rng.normal(50, 9, len(cells))
    write_parquet(folder / "cells.parquet", cells)
    latent = pd.DataFrame(rng.normal(size=(len(cells), 4)).astype("float32"), columns=[f"z_{i}" for i in range(4)])
    latent.insert(0, "cell_id", cells["cell_id"])
    write_parquet(folder / "latent.parquet", latent)
    mean = rng.lognormal(-2, 2, n_genes)
    genes = pd.DataFrame(
        {
            "gene_id": ids,
            "gene_name": names,
            "n_samples": np.full(n_genes, 3, "int32"),
            "n_cells": rng.integers(0, len(cells), n_genes),
            "mean": mean,
            "variance": mean + mean**2 * rng.lognormal(0, 1, n_genes),
            "variances_norm": rng.lognormal(0, 0.5, n_genes),
            "highly_variable_rank": np.where(np.arange(n_genes) % 2, np.nan, np.arange(n_genes)),
            "highly_variable_nbatches": np.full(n_genes, 2, "int32"),
            "note": np.where(np.arange(n_genes) == 1, "excluded: @mitochondrial", ""),
            "selected": np.arange(n_genes) % 2 == 0,
        }
    )
    write_parquet(folder / "genes.parquet", genes)
    chosen = genes[genes["selected"]].reset_index(drop=True)
    frames = []
    for g in range(n_clusters):
        lfc = rng.normal(-1, 1, len(chosen))
        lfc[g * 4 : g * 4 + 4] = 4
        scale = np.exp2(lfc) / 1000
        de = pd.DataFrame({"group": str(g), "reference": "rest", "gene_id": chosen["gene_id"]})
        de["gene_name"] = chosen["gene_name"]
        de["lfc_mean"], de["lfc_median"], de["lfc_std"] = lfc, lfc, 0.5
        de["lfc_ci_low"], de["lfc_ci_high"] = lfc - 1, lfc + 1
        de["proba_de"] = np.clip(np.abs(lfc) / 4, 0, 1)
        de["proba_not_de"] = 1 - de["proba_de"]
        de["bayes_factor"] = 1.0
        de["scale_group"], de["scale_reference"] = scale, 0.001
        de["raw_mean_group"], de["raw_mean_reference"] = scale * 1000, 1.0
        de["nonzero_group"], de["nonzero_reference"] = np.clip(lfc / 5 + 0.2, 0.01, 1), 0.2
        de["is_de"] = (de["proba_de"] > 0.9) & (g != n_clusters - 1)
        de["rank"] = (-lfc).argsort().argsort() + 1
        frames.append(de)
    write_parquet(folder / "de.parquet", pd.concat(frames, ignore_index=True))
    epochs = np.arange(1, n_epochs + 1)
    elbo = -900 - 600 * np.exp(-epochs / 6)
    history = pd.DataFrame({"epoch": epochs, "train_elbo": elbo, "validation_elbo": elbo - 12})
    history["kl_weight"], history["learning_rate"] = np.minimum(1, epochs / 15), 1e-3
    (folder / "model").mkdir()
    write_parquet(folder / "model/history.parquet", history)
    (folder / "model/model.safetensors").write_bytes(b"weights")
    config = load_config(
        {"atlas": "test", "samples": "nowhere.tsv", "report": {"labels": ["cell type"], "title": "A & <b>"}}
    )
    model = {
        "format_version": 1, "package_version": "0", "fingerprint": "ab" * 32, "seed": 0, "device": "cpu",
        "model": config.model.model_dump(mode="json", exclude={"reuse"}), "train": config.train.model_dump(mode="json"),
        "gene_ids": list(chosen["gene_id"]), "gene_names": list(chosen["gene_name"]),
        "batches": [HOSTILE[0], "b2"], "covariates": {}, "organism": "human",
        "samples": {s: int((cells["sample"] == s).sum()) for s in samples}, "n_cells": len(cells),
        "n_genes": len(chosen), "weights_sha256": "cd" * 32,
        "metrics": {"validation_elbo": -912.0, "train_elbo": -900.0, "kept_epoch": 28, "epochs": 30},
        "software": {"torch": "2"},
    }  # fmt: skip
    write_json(folder / "model/model.json", model, checksum=True)
    write_json(folder / "model_ref.json", {"version": "VERSION-7", "run_id": "RUN-ID", "reused": False})
    (folder / "counts.zarr/X").mkdir(parents=True)
    (folder / "counts.zarr/X/0").write_bytes(b"chunk")
    for step, what, value in (("genes", "n_top", 60), ("train", "device", "cpu"), ("register", "version", "VERSION-7")):
        d = Decisions(step)
        d.add(what, value, f"because {HOSTILE[1]}", n_genes=60 if step == "genes" else None)
        if step == "train":
            d.add("training", "skipped", "VERSION-7 found in the registry")
        d.write(folder / f"decisions/{step}.jsonl")
    return config


class Page(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.links, self.handlers, self.images = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        if tag == "script":
            self.scripts.append(attrs)
        if tag == "img":
            self.images.append(attrs)
        self.links += [v for k, v in attrs.items() if k in ("src", "href", "srcset", "action")]
        self.handlers += [k for k in attrs if k.startswith("on")]


@pytest.fixture(scope="module", autouse=True)
def _small_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "DPI", 40)
        yield


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a") / "results" / "test"
    config = write_atlas(folder)
    report.build_report(folder, config)
    return folder, config


def test_page_stands_alone_and_strangers_names_stay_text(atlas):
    folder, _ = atlas
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.scripts == [{"type": "application/json", "id": "viewer-data"}, {}]
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not page.handlers
    assert all(image["alt"] and image["src"].startswith("data:image/png;base64,") for image in page.images)
    assert "alert(1)" in text and "<script>alert" not in text and "<img src=x" not in text
    assert "A &amp; &lt;b&gt;" in text
    ids = set(re.findall(r'<section id="(\w+)"', text))
    assert ids == {link[1:] for link in page.links if link.startswith("#")} and len(ids) == 12


def test_viewer_data_are_those_of_the_table(atlas):
    import base64

    folder, _ = atlas
    text = (folder / "report.html").read_text()
    data = json.loads(re.search(r'id="viewer-data">(.*?)</script>', text, re.DOTALL)[1])
    cells = pd.read_parquet(folder / "cells.parquet").set_index("cell_id").loc[data["ids"]]
    column = {c["name"]: c for c in data["columns"]}
    label = column["cell type"]
    codes = np.frombuffer(base64.b64decode(label["codes"]), "<u2")
    assert [label["names"][i] for i in codes] == cells["cell type"].fillna(MISSING).tolist()
    assert label["names"][-1] == MISSING and sum(label["counts"]) == len(cells)
    x = np.frombuffer(base64.b64decode(data["spaces"][0]["x"]), "<u2").astype(float)
    assert np.corrcoef(x, cells["umap_1"])[0, 1] > 0.9999
    assert {"age", "n_counts", "sample", "batch", "cluster"} <= set(column) and "values" in column["age"]


def test_many_cells_are_thinned_and_said_to_be():
    n = viewer.SHOWN_CELLS + 10_000
    rng = np.random.default_rng(0)
    cells = pd.DataFrame(rng.normal(size=(n, 2)), columns=["umap_1", "umap_2"])
    cells["cluster"] = pd.Categorical(rng.choice(["0", "1", "2"], n))
    cells["sample"] = cells["batch"] = pd.Categorical(rng.choice(["a", "b"], n))
    made = Decisions("report")
    flags = pd.Series(pd.Categorical([None] * n))
    data = viewer.viewer_data(cells, (), made, flags, {})  # without cell_id: beyond NAMED_CELLS it is not read
    assert data["n"] == n and data["shown"] == viewer.SHOWN_CELLS and data["ids"] is None
    assert [d.what for d in made] == ["cells_in_viewer"]
    assert sum(data["columns"][0]["counts"]) == n


def test_a_map_of_many_cells_says_how_many_it_shows(monkeypatch):
    monkeypatch.setattr(figures, "SHOWN_ON_MAP", 50)
    cells = pd.DataFrame({"umap_1": np.arange(60.0), "umap_2": 0.0, "cluster": ["0", "1"] * 30})
    figure = figures.umap_figure(cells, "cluster")
    assert len(figure.axes[0].collections[0].get_offsets()) == 50
    assert figure.axes[0].get_xlabel() == "UMAP 1 (50 cells at random)"


def test_thinned_violins_keep_their_peaks():
    rng = np.random.default_rng(0)
    values = rng.choice([3.0, 3.4], 30_000) + rng.normal(0, 0.05, 30_000)
    axes = Figure().subplots()
    figures._violins(axes, [values], False, "light")
    place, width = np.abs(axes.collections[0].get_paths()[0].vertices).T
    between = width[np.abs(place - 3.2) < 0.02].max()
    assert between < 0.012 * width.max()  # smoothed as 2,001 values would be, it is twice that


def test_pictures_are_the_same_by_any_number_of_processes(atlas):
    folder, config = atlas
    data = report.read_atlas(folder, config)
    jobs = [(figures.umap_figure, data["cells"], column) for column in ("cluster", "batch", "sample")]
    assert list(report._drawn(jobs, 1)) == list(report._drawn(jobs, 2))


def test_policy_names_the_hash_of_the_script(atlas):
    import base64
    import hashlib

    text = (atlas[0] / "report.html").read_text()
    script = text[text.rindex("<script>") + 8 : text.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and "default-src 'none'" in text


def test_same_build_in_another_folder_gives_the_same_bytes(atlas, tmp_path):
    folder, config = atlas
    other = tmp_path / "elsewhere" / "test"
    write_atlas(other)
    write_json(other / "model_ref.json", {"version": "8", "run_id": "other", "reused": True})
    settings = config.model_dump(mode="json") | {"results": str(tmp_path / "elsewhere")}
    settings["registry"]["tracking_uri"] = "http://elsewhere"
    report.build_report(other, load_config(settings))
    for name in ("report.html", "metrics.json", "decisions.jsonl", "manifest.json", "figures/umap_cluster.png"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    text = (folder / "report.html").read_text() + (folder / "manifest.json").read_text()
    assert "VERSION-7" not in text and "RUN-ID" not in text and str(folder) not in text


def test_metrics_and_decisions(atlas):
    folder, config = atlas
    m = json.loads((folder / "metrics.json").read_text())
    assert m == report.metrics(folder, config)
    assert m["cells"]["before"] == 240 and m["cells"]["after"] == len(pd.read_parquet(folder / "cells.parquet"))
    assert sum(s["reasons"].get("high_mito", 0) for s in m["samples"].values()) == 240 - m["cells"]["after"]
    assert m["labels"]["cell type"]["ari"] == 1 and m["labels"]["cell type"]["levels"] == 5
    assert m["de"]["upregulated"] == {"0": 4, "1": 4, "2": 4, "3": 4, "4": 0}
    lines = [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]
    assert [d["sample"] for d in lines if d["step"] == "qc"] == [
        s for s in ("donor1", "donor.2", "d3-x") for _ in range(3)
    ]
    assert [d["what"] for d in lines if d["step"] != "qc"] == ["n_top", "library", "device", "epochs"]


def test_manifest_lists_every_file_with_its_digest(atlas):
    from scvi_core.files import sha256_file, sha256_text

    folder, _ = atlas
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert files["report.html"]["sha256"] == sha256_file(folder / "report.html")
    chunk = sha256_file(folder / "counts.zarr/X/0")
    assert files["counts.zarr"] == {"tree_sha256": sha256_text(f"{chunk}  X/0\n"), "size": 5, "n_files": 1}
    assert "model_ref.json" not in files and "model/model.safetensors" in files and "samples/d3-x/qc.parquet" in files


def test_factors_of_a_linear_decoder(atlas, tmp_path):
    folder, config = tmp_path / "test", atlas[1]
    write_atlas(folder)
    model = json.loads((folder / "model/model.json").read_text())
    loadings = pd.DataFrame({"gene_id": model["gene_ids"], "gene_name": model["gene_names"]})
    for k in range(4):
        loadings[f"z_{k}"] = np.where(np.arange(60) < 3 * k, 1.25 - np.arange(60), 0).astype("float32")
    write_parquet(folder / "loadings.parquet", loadings)
    settings = config.model_dump(mode="json")
    settings["model"] |= {"decoder": "linear", "loadings_l1": 0.3}
    report.build_report(folder, load_config(settings))
    text = (folder / "report.html").read_text()
    section = text[text.index('<section id="factors">') :].split("</section>")[0]
    rows = [re.sub(r"<[^>]+>", "|", row).split("|") for row in section.split("<tr>")[2:]]
    rows = [[cell for cell in row if cell.strip()] for row in rows]
    assert [row[0] for row in rows] == ["z_0", "z_1", "z_2", "z_3"] and [row[2] for row in rows] == list("0369")
    assert rows[0][3:5] == ["-", "-"]
    assert rows[1][3:] == ["GENE0 ", "+1.25", ", GENE2 ", "+0.25", "GENE4 ", "-0.75"]
    assert rows[3][7:9] == ["GENE16 ", "-6.75"]  # the strongest first
    assert '<a href="#factors">' in text and "factors" not in (atlas[0] / "report.html").read_text()
    assert "loadings.parquet" in json.loads((folder / "manifest.json").read_text())["files"]
    (folder / "loadings.parquet").unlink()
    with pytest.raises(UserError, match=r"loadings\.parquet: no such file; run `scvi-core loadings`"):
        report.build_report(folder, load_config(settings))


def told(folder, config):
    """The summary's sentences, nothing drawn."""
    data = report.read_atlas(folder, config)
    return sentences.verdicts(report.metrics(folder, config), data, config)


def test_what_a_contrast_could_test_stands_first(tmp_path):
    folder = tmp_path / "test"
    config = write_atlas(folder).model_dump(mode="json")
    cells = pd.read_parquet(folder / "cells.parquet")
    cells["condition"] = np.where(cells["cell_id"].str[-1].isin(list("02468")), "stim", "ctrl")
    cells["batch"], cells["sample_of"] = cells["sample"], cells["sample"] + cells["condition"]
    write_parquet(folder / "cells.parquet", cells)
    contrast = {"tests": [{"column": "condition", "group": "stim", "reference": "ctrl"}], "replicate": "sample_of"}
    genes = pd.DataFrame(
        {"gene_id": ["ENSG00000000000", "ENSG00000000001"], "lfc": [2.0, -1.0], "is_de": True, "rank": [1, 2]}
    )
    genes = genes.assign(contrast="condition_stim_vs_ctrl", n_replicates_group=3, n_replicates_reference=3)
    write_parquet(folder / "contrast.parquet", genes.assign(cell_group="3"))
    first = told(folder, load_config(config | {"contrast": contrast}))[:2]
    assert [kind for kind, _ in first] == ["look", "look"]
    assert "was tested in 1 of 5 clusters: 2 genes differ. The table of decisions says why" in first[0][1]
    assert "hold 'stim' and 'ctrl' of condition" in first[1][1] and "give each sample its own batch" in first[1][1]
    whole = pd.concat([genes.assign(cell_group=str(k)) for k in range(5)])
    write_parquet(folder / "contrast.parquet", whole)
    kinds = dict((text, kind) for kind, text in told(folder, load_config(config | {"contrast": contrast})))
    (text,) = [text for text in kinds if "in 5 of 5 clusters" in text]
    assert kinds[text] == "good" and "10 genes" in text


def test_a_label_of_samples_is_no_cell_type(tmp_path):
    folder = tmp_path / "test"
    config = write_atlas(folder).model_dump(mode="json") | {"report": {"labels": ["cell type", "sex", "noise"]}}
    cells = pd.read_parquet(folder / "cells.parquet")
    cells["sex"] = cells["sample"].map({"donor1": "f", "donor.2": "m", "d3-x": "f"})
    cells["noise"] = np.random.default_rng(0).choice(["a", "b"], len(cells))
    write_parquet(folder / "cells.parquet", cells)
    said = told(folder, load_config(config))
    assert not any("sex" in text for _, text in said)
    assert [kind for kind, text in said if "agree with the labels in cell type" in text] == ["good"]
    assert [kind for kind, text in said if "differ from the labels in noise" in text] == ["look"]
    cells["cluster"] = cells["sex"]
    write_parquet(folder / "cells.parquet", cells)
    assert [kind for kind, text in told(folder, load_config(config)) if "Clusters follow sex" in text] == ["look"]


@pytest.mark.parametrize(("used", "kind"), [(0.5, "good"), (1.0, "look")])
def test_the_resolution_is_held_against_others(tmp_path, used, kind):
    folder = tmp_path / "test"
    config = write_atlas(folder).model_dump(mode="json") | {"cluster": {"resolutions": [used]}}
    made = Decisions("cluster")
    made.add("stability", {r: {"clusters": 5, "agreement": a} for r, a in (("1", 0.8), ("0.5", 0.97), ("2", 0.7))}, "x")
    made.add("suggested resolution", 0.5, "x")
    made.write(folder / "decisions/cluster.jsonl")
    config = load_config(config)
    (said,) = [(of, text) for of, text in told(folder, config) if "other random seeds" in text]
    assert said[0] == kind and ("0.5 is the finest" in said[1]) == (used == 1.0)
    data = report.read_atlas(folder, config)
    numbers = report.metrics(folder, config)
    pictures = {name: {"light": "", "dark": ""} for name in report.draw(folder, data, config)}
    text = report.render(data, config, numbers, None, pictures)
    rows = re.findall(r'<th scope="row" class="r">([^<]*)</th>', text[text.index("Which resolution?") :])
    assert [row.split(" ")[0] for row in rows[:3]] == ["0.5", "1", "2"] and "(suggested)" in rows[0]


@pytest.mark.parametrize(("lost", "said"), [(4.0, 0), (40.0, 1)])
def test_a_curve_that_falls_says_what_to_do(tmp_path, lost, said):
    folder = tmp_path / "test"
    config = write_atlas(folder)
    history = pd.read_parquet(folder / "model/history.parquet")
    history["validation_elbo"] = -912 - lost * np.abs(history["epoch"] - 12) / 18
    write_parquet(folder / "model/history.parquet", history)
    found = [text for kind, text in told(folder, config) if kind == "look" and "by heart" in text]
    assert len(found) == said
    assert all("best at epoch 12 and has fallen by 40.0 nats" in t and "train.early_stopping: true" in t for t in found)


def test_phases_of_the_cell_cycle_by_cluster(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "png", lambda figure: b"picture")
    folder = tmp_path / "test"
    config = write_atlas(folder)
    cells = pd.read_parquet(folder / "cells.parquet")
    cells["s_score"] = cells["g2m_score"] = np.linspace(-1, 1, len(cells), dtype="float32")
    for phases, shown in ((np.resize(["G1", "S", "G2M"], len(cells)), True), ("", False)):
        cells["cycle_phase"], cells["predicted_doublet"] = phases, np.where(cells.index % 9 == 0, str(shown), "False")
        write_parquet(folder / "cells.parquet", cells)
        report.build_report(folder, config)
        text = (folder / "report.html").read_text()
        assert (" cycle_phase</h3>" in text) == ("Tirosh et al. 2016" in text) == shown
        assert (" called doublet</h3>" in text) == ("Cells called doublets, and kept" in text) == shown
        assert ('title="doublet">doublet</th>' in text) == shown


def test_cell_types_on_the_page(tmp_path):
    """The taxonomy with its numbers, confusions, and the labels that are doubted; strangers' names stay text."""
    config = write_atlas(tmp_path, n_cells=90)
    cells = pd.read_parquet(tmp_path / "cells.parquet")
    names = sorted(cells["cell type"].dropna().unique())
    taxonomy = Taxonomy.of(set(names), [(name, "all <i>") for name in names])
    p_ny = np.random.default_rng(0).dirichlet(np.full(len(names), 0.1), len(cells))
    calls = pd.DataFrame({"cell_id": cells["cell_id"], "label": np.array(names)[p_ny.argmax(1)]})
    calls["probability"], calls["safe_label"], calls["safe_probability"] = p_ny.max(1), None, 1.0
    calls["label_set"], calls["novelty"], calls["is_novel"] = [[] for _ in p_ny], 0.5, False
    write_parquet(tmp_path / "annotation.parquet", calls)
    probabilities = pd.DataFrame(p_ny, columns=names)
    probabilities.insert(0, "cell_id", cells["cell_id"])
    write_parquet(tmp_path / "label_probabilities.parquet", probabilities)
    table = pd.DataFrame({"label": taxonomy.names, "parent": None, "is_leaf": True, "n_cells": 7})
    for column in ("precision", "recall", "f1", "median_probability"):
        table[column] = 0.5
    write_parquet(tmp_path / "labels.parquet", table)
    quality = {
        "held_out": "cells", "n_folds": 5, "n_cells": 80, "n_apart": 0, "macro_f1": 0.5, "accuracy": 0.5, "ece": 0.1,
        "brier": 0.4, "coverage": 0.9, "reliability": [[0.3, 0.2, 40], [0.8, 0.7, 40]],
        "confusion_yy": (np.ones((len(names), len(names)), dtype=int) + 5 * np.eye(len(names), dtype=int)).tolist(),
    }  # fmt: skip
    model = read_json(tmp_path / "model/model.json", "train")
    model["annotation"] = {"quality": quality, "taxonomy": taxonomy.to_dict(), "temperature": 1.0}
    write_json(tmp_path / "model/model.json", model, checksum=True)
    config = load_config({**config.model_dump(mode="json"), "annotate": {"label": "cell type"}})
    report.build_report(tmp_path, config)
    page = (tmp_path / "report.html").read_text()
    assert 'id="celltypes"' in page and "all &lt;i&gt;" in page and "Labels are in one batch" in page
    place = {name: y for y, name in enumerate(names)}
    given = cells["cell type"].map(place)
    doubted = sum(p_ny[n, int(y)] < 0.1 for n, y in enumerate(given) if y == y)
    assert f"<p>{doubted} cells have a given label" in page
    files = json.loads((tmp_path / "manifest.json").read_text())["files"]
    assert {"annotation.parquet", "label_probabilities.parquet", "labels.parquet"} <= set(files)


def test_few_markers_are_no_proof_of_anything(atlas):
    folder, config = atlas
    (few,) = [text for kind, text in told(folder, config) if "Fewer than three" in text]
    assert "markers: clusters 4." in few and "group of its own" not in few


def test_genes_are_called_by_name_and_told_apart():
    ids = ["ENSG1", "ENSG2", "ENSG3", "ENSG4", "ENSG5", "X_ENSG00000000001"]
    names = ["A", "", "B", "B", "ENSG5", "X_ENSG00000000001"]
    found = expression.gene_labels(pd.DataFrame({"gene_id": ids, "gene_name": names}))
    assert list(found.values()) == ["A", "ENSG2", "B (ENSG3)", "B (ENSG4)", "ENSG5", "X"]
    both = pd.DataFrame({"gene_id": ["X", "X_ENSG00000000001"], "gene_name": ["X", "X_ENSG00000000001"]})
    assert list(expression.gene_labels(both).values()) == ["X", "X_ENSG00000000001"]


def test_values_of_genes_are_those_of_the_cells_that_are_drawn(atlas, monkeypatch):
    folder, config = atlas
    asked = load_config(config.model_dump(mode="json") | {"report": {"genes": ["GENE0", "ENSG00000000007"]}})
    monkeypatch.setattr(viewer, "SHOWN_CELLS", 50)
    found = report.read_atlas(folder, asked)["expression"]
    cells = pd.read_parquet(folder / "cells.parquet")
    assert len(found.rows) == 50 and found.shown == ["ENSG00000000000", "ENSG00000000007"]
    assert [found.names[gene] for gene in found.shown] == ["GENE0", "GENE7"]
    for k in (0, 7):
        for at, row in list(enumerate(found.rows))[::7]:
            cell = cells.iloc[row]
            sample = anndata.read_h5ad(folder / f"samples/{cell['sample']}/counts.h5ad")
            count = sample[cell["cell_id"]].X.toarray()[0, k]
            value = found.of(f"ENSG{k:011d}")[at]
            assert value == pytest.approx(np.log1p(1e4 * count / cell["n_counts"]), rel=1e-5)
    wrong = load_config(config.model_dump(mode="json") | {"report": {"genes": ["gene0"]}})
    with pytest.raises(UserError, match=r"report\.genes: no gene 'gene0' in genes\.parquet; did you mean 'GENE0'\?"):
        report.read_atlas(folder, wrong)


def test_what_was_dropped_by_label_and_which_flags_are_left(atlas, monkeypatch):
    folder, config = atlas
    monkeypatch.setattr(sentences, "ENOUGH", 10)
    rows = report.metrics(folder, config)["dropped"]["cell type"]
    n = {row["label"]: row for row in rows}
    assert n[HOSTILE[1]]["dropped"] == n[HOSTILE[1]]["n"] and n[HOSTILE[0]]["dropped"] == 0
    assert n[HOSTILE[1]]["reason"] == "high mitochondrial share"
    (said,) = [text for kind, text in told(folder, config) if kind == "look" and "barcodes labelled" in text]
    assert "100% of the barcodes labelled </script>" in said


def test_flags_that_kept_cells_bear(tmp_path):
    for name, flags in (("a", ["", "doublet", "low_counts"]), ("b", ["high_counts,doublet", "doublet", ""])):
        qc = pd.DataFrame({"cell_id": [f"{name}:{i}" for i in range(3)], "flags": flags, "keep": [True, True, False]})
        write_parquet(tmp_path / f"samples/{name}/qc.parquet", qc)
    write_parquet(tmp_path / "cells.parquet", pd.DataFrame({"cell_id": ["a:0", "a:1", "b:1"]}))  # b:0 was left out
    found = report.cell_flags(tmp_path, ["a", "b"], 3)
    assert list(found.astype(object).fillna("")) == ["", "doublet", "doublet"]
    none = report.cell_flags(tmp_path, [], 3)
    assert none.isna().all() and not len(none.cat.categories)


def test_limits_and_flags_as_words(atlas):
    folder, _ = atlas
    assert sentences.in_words("high_mito,doublet") == "high mitochondrial share, doublet"
    text = (folder / "report.html").read_text()
    assert "Dashed: the limits. counts: 800 (outliers of this sample); mitochondrial: 9 % (outliers" in text


@pytest.mark.parametrize(
    ("score", "kind", "how"), [(0.9, "good", "well"), (0.6, "look", "partly"), (0.2, "look", "poor")]
)
def test_mixing_has_a_verdict(score, kind, how):
    clusters = {"one_batch": [], "sizes": {"0": 60, "1": 30, "2": 10}}
    ((of, text),) = sentences._mixing({"mixing": {"score": score, "by_cluster": {"0": score}}, "clusters": clusters})
    assert "too few cells of two batches: cluster 1, 2 (40% of cells)." in text
    assert of == kind and f"Batches are {how}" in text and f"{score:.0%} as often as by chance" in text
    assert ("Least in cluster 0" in text) == (score <= 0.5)


@pytest.mark.parametrize(("asked", "told"), [(10, True), (30, False), ("auto", False)])
def test_a_fit_of_few_epochs_is_told(asked, told):
    config = load_config(json.dumps({"train": {"max_epochs": asked}}))
    data = {"model": {}, "history": pd.DataFrame({"validation_elbo": [np.nan]})}
    said = sentences._training({"epochs": asked, "n_train": 1400}, data, config)
    assert [of for of, text in said if "by default it would be 60" in text] == ["look"] * told


def test_names_of_clusters_do_not_count_as_agreement():
    agrees = {"ari": 0.9, "of_samples": False}
    numbers = {
        "clusters": {"n": 2, "sizes": {"0": 9, "1": 8}, "stability": {}},
        "labels": {"annotation": agrees, "cell_type": agrees},
    }
    said = [text for _, text in sentences._clusters(numbers, load_config("{}"))]
    assert [text.split(" (")[0] for text in said[1:]] == ["Clusters agree with the labels in cell_type"]


def test_clusters_of_one_condition_are_named():
    cells = pd.DataFrame({"cluster": ["0"] * 20 + ["1"] * 20 + ["10"] * 10, "condition": ["a", "b"] * 10 + ["b"] * 30})
    asked = {"column": "condition", "group": "b", "reference": "a"}
    config = load_config(json.dumps({"contrast": {"tests": [asked]}}))
    ((of, text),) = sentences._conditions(cells, config)
    assert of == "look" and "cluster 1, 10 have one value of condition" in text and "a contrast misses" in text
    assert not sentences._conditions(cells[cells["cluster"] == "0"], config)
    assert not sentences._conditions(cells, load_config("{}"))


def test_conditions_are_columns_that_samples_share(atlas):
    folder, config = atlas
    cells = pd.read_parquet(folder / "cells.parquet")
    cells["sex"] = cells["sample"].map({"donor1": "f", "donor.2": "m", "d3-x": "f"})
    cells["own"] = cells["sample"] + "!"
    assert report.by_condition(cells, config) == ["sex"]
    assert isinstance(expression.conditions(cells, "sex"), Figure)


def test_many_samples_fold(atlas, monkeypatch):
    folder, config = atlas
    data, numbers = report.read_atlas(folder, config), report.metrics(folder, config)
    pictures = collections.defaultdict(lambda: {"light": "", "dark": ""})
    assert '<details class="fold">' not in report.render(data, config, numbers, None, pictures)
    monkeypatch.setattr(report, "FOLDED", 2)
    text = report.render(data, config, numbers, None, pictures)
    assert text.count('<details class="fold"><summary>Show all 3 samples') == 2 and "tr:nth-child(n+3)" in text


def test_bad_input_is_one_line(atlas, tmp_path):
    folder, config = atlas
    wrong = load_config(config.model_dump(mode="json") | {"report": {"labels": ["celltype"]}})
    with pytest.raises(UserError, match=r"report\.labels: no column 'celltype'"):
        report.build_report(folder, wrong)
    with pytest.raises(UserError, match=r"cells\.parquet: no such file; run `scvi-core cells`"):
        report.build_report(tmp_path, config)


def test_no_embedding_no_labels_one_cluster(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "png", lambda figure: b"picture")  # drawn, not rendered
    folder = tmp_path / "r"
    config = write_atlas(folder, n_cells=30, n_clusters=1, n_epochs=1)
    cells = pd.read_parquet(folder / "cells.parquet")
    cells[["umap_1", "umap_2"]] = np.nan
    write_parquet(folder / "cells.parquet", cells)
    history = pd.read_parquet(folder / "model/history.parquet")
    write_parquet(folder / "model/history.parquet", history.assign(validation_elbo=np.nan))
    report.build_report(folder, load_config(config.model_dump(mode="json") | {"report": {}}))
    text = (folder / "report.html").read_text()
    assert "Neither UMAP nor t-SNE" in text and 'id="viewer-data"' not in text


def test_levels_order_and_missing():
    names, codes = levels(pd.Series(["10", "2", None, "a", "", "2", "1" * 5000]))
    assert names == ["2", "10", "1" * 5000, "a", MISSING] and codes.tolist() == [1, 0, 4, 3, 4, 0, 2]
    assert levels(pd.Series([1.0, np.nan]).astype("Int64"))[0] == ["1", MISSING]
    assert len(set(PALETTE)) == 36 == len(figures.colours([str(i) for i in range(36)]))


def test_figures_are_figures_with_fixed_bytes(atlas):
    folder, _ = atlas
    cells = pd.read_parquet(folder / "cells.parquet")
    many = cells.assign(**{"_x": [f"_{HOSTILE[i % 5]}{i % 90}" for i in range(len(cells))]})
    figure = figures.umap_figure(many, "_x")
    assert isinstance(figure, Figure) and figures.png(figure) == figures.png(figures.umap_figure(many, "_x"))
    assert b"Software" not in figures.png(figure) and b"tEXt" not in figures.png(figure)
    qc = pd.read_parquet(folder / "samples/d3-x/qc.parquet")
    limits = Decisions("qc", "d3-x")
    limits.add("high_mito.max_pct_mito", 9.0, "x")
    limits.add("low_counts.min_counts", 100, "x")
    assert figures.thresholds(limits) == {"pct_mito": [9.0], "n_counts": [100.0]}
    many = pd.concat([qc] * (figures.SHOWN // len(qc) + 1))
    for rows in (qc, qc.head(1), qc.head(0), many):
        assert figures.png(figures.qc_figure(rows, limits))[:4] == b"\x89PNG"
    both = cells.assign(tsne_1=cells["umap_2"], tsne_2=np.nan)
    assert figures.png(figures.umap_figure(both, "cluster", "tsne", theme="dark"))
    history = pd.read_parquet(folder / "model/history.parquet")
    assert figures.png(figures.training_figure(history, None, theme="dark"))


def test_every_flag_has_words():
    assert list(sentences.FLAGS) == list(FLAGS)
