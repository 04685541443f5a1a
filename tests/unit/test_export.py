"""atlas.h5ad: its numbers against the inputs and scanpy's own, its elements against AnnData's specification."""

import json

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp

from scvi_core.cluster import _graph, cluster, leiden
from scvi_core.config import load_config
from scvi_core.export import write_h5ad
from scvi_core.files import Decisions, UserError, verify, write_json, write_parquet
from scvi_core.io.blocks import Scratch, Spool
from scvi_core.io.write import write_counts
from scvi_core.preprocess import samples
from scvi_core.report.manifest import built_with
from scvi_core.report.viewer import PALETTE

GENES = [f"ENSG{i:011d}" for i in range(40)]
# https://anndata.readthedocs.io/en/stable/fileformat-prose.html
VERSIONS = {
    "anndata": "0.1.0", "dataframe": "0.2.0", "array": "0.2.0", "csr_matrix": "0.1.0", "dict": "0.1.0",
    "string": "0.2.0", "string-array": "0.2.0", "numeric-scalar": "0.2.0", "categorical": "0.2.0",
}  # fmt: skip


def write_atlas(folder):
    """Two samples: the second has other genes in another order, and its cells are of two types and of none."""
    rng = np.random.default_rng(0)
    tables, expected = [], []
    for name, ids in (("b", GENES), ("a", [*GENES[::-1], "ENSG00000099999"])):
        rate = np.repeat(rng.gamma(0.4, 6, (3, len(ids))), 50, axis=0)
        counts = rng.poisson(rate)
        counts[3, 5] = 70_000  # does not fit into 16 bits
        cells = [f"{name}:C{i}" for i in range(len(counts))]
        obs, var = pd.DataFrame(index=cells), pd.DataFrame({"gene_name": ids}, index=ids)
        at = folder / "samples" / name
        at.mkdir(parents=True)
        with Scratch() as scratch:
            spool = Spool(scratch)
            spool.add(sp.csr_matrix(counts.astype("uint32")))
            write_counts(at / "counts.h5ad", obs, var, dict.fromkeys(("sample", "gene_ids", "organism"), name), spool)
        qc = pd.DataFrame({"cell_id": cells, "batch": name, "keep": np.arange(len(cells)) % 7 != 2})
        write_parquet(at / "qc.parquet", qc)
        kept = qc["keep"].to_numpy()
        kept[10] = False  # by `store`, as it has no selected gene
        table = pd.DataFrame({"cell_id": qc["cell_id"][kept], "sample": name, "n_counts": counts.sum(1)[kept]})
        table["type"] = np.repeat(["T10", "T2", None], 50)[kept]
        table["own"] = [f"x{i}" for i in table["cell_id"]]
        tables.append(table)
        expected.append(pd.DataFrame(counts[kept], columns=ids).reindex(columns=GENES))
    cells = pd.concat(tables, ignore_index=True)
    z = rng.normal(size=(len(cells), 3)).astype("float32")
    z[:, 0] += 6 * (np.arange(len(z)) % 3)
    config = load_config({"samples": "none.tsv", "seed": 3, "threads": 1, "cluster": {"n_neighbors": 9}})
    found = cluster(z, config.cluster, 3, 1, Decisions("cluster"))
    cells = pd.concat([cells, found.assign(tsne_1=np.float32("nan"), tsne_2=np.float32("nan"))], axis=1)
    write_parquet(folder / "cells.parquet", cells)
    latent = pd.DataFrame(z, columns=["z_0", "z_1", "z_2"])
    latent.insert(0, "cell_id", cells["cell_id"])
    write_parquet(folder / "latent.parquet", latent)
    genes = pd.DataFrame({"gene_id": GENES, "gene_name": [f"G{i}" for i in range(40)], "selected": np.arange(40) < 9})
    write_parquet(folder / "genes.parquet", genes.assign(note=["excluded"] + [""] * 39, rank=np.nan))
    card = {"fingerprint": "ab" * 32, "weights_sha256": "cd" * 32, "organism": "human"}
    write_json(folder / "model" / "model.json", card, checksum=True)
    return config, cells, pd.concat(expected).to_numpy()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    config, cells, counts = write_atlas(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "CHUNK", 500)  # so that there are many blocks
        write_h5ad(folder / "atlas.h5ad", folder, config)
    return folder, config, cells, counts


def test_counts_and_their_logarithm(made):
    folder, _, cells, counts = made
    atlas = ad.read_h5ad(folder / "atlas.h5ad")
    assert atlas.shape == counts.shape and list(atlas.var_names) == GENES and atlas.X.dtype == np.float32
    assert atlas.layers["counts"].dtype == np.int32 and (atlas.layers["counts"].toarray() == counts).all()
    by_hand = np.log1p(counts * (1e4 / cells["n_counts"].to_numpy()[:, None]))
    np.testing.assert_allclose(atlas.X.toarray(), by_hand, rtol=1e-6)
    of_b = atlas[atlas.obs["sample"] == "b"].copy()  # all its genes are in the atlas: the total is that of the row
    of_b.X = of_b.layers["counts"].astype("float32")
    sc.pp.normalize_total(of_b, target_sum=1e4)
    sc.pp.log1p(of_b)
    np.testing.assert_allclose(of_b.X.toarray(), atlas[of_b.obs_names].X.toarray(), rtol=1e-5)


def test_cells_and_genes_with_their_categories(made):
    folder, _, cells, _ = made
    atlas = ad.read_h5ad(folder / "atlas.h5ad")
    assert list(atlas.obs_names) == list(cells["cell_id"]) and atlas.obs.index.name == "cell_id"
    assert list(atlas.obs.columns) == list(cells.columns[1:]) and atlas.var.index.name == "gene_id"
    assert list(atlas.obs["type"].cat.categories) == ["T2", "T10"]
    pd.testing.assert_series_equal(
        atlas.obs["type"].astype(object).isna().reset_index(drop=True), cells["type"].isna(), check_names=False
    )
    assert list(atlas.uns["type_colors"]) == PALETTE[:2] and list(atlas.uns["sample_colors"]) == PALETTE[:2]
    assert atlas.obs["own"].dtype == object and "own_colors" not in atlas.uns
    assert list(atlas.var["gene_name"][:2]) == ["G0", "G1"] and atlas.var["selected"].sum() == 9
    assert set(atlas.obsm) == {"X_scVI", "X_umap"} and atlas.obsm["X_umap"].dtype == np.float32
    assert atlas.uns["scvi_core"]["model_uri"] == "models:/atlas" and atlas.uns["scvi_core"]["seed"] == 3


def test_the_graph_is_the_one_that_was_clustered_and_that_scanpy_finds(made, monkeypatch):
    folder, *_ = made
    atlas = ad.read_h5ad(folder / "atlas.h5ad")
    assert (atlas.obsp["distances"].getnnz(axis=1) == 8).all()  # as scanpy counts, a cell is a neighbour of its own
    graph = _graph(atlas.obsp["connectivities"])  # test_cluster holds it against scanpy's
    assert (leiden(*graph, 0.5, -1, 3) == atlas.obs["cluster"].to_numpy(object)).all()
    monkeypatch.setattr(sc.pp, "neighbors", None)  # is not needed: what is there is taken
    sc.tl.leiden(atlas, resolution=0.5, flavor="igraph", n_iterations=-1, directed=False, key_added="again")
    assert atlas.uns["again"]["params"]["resolution"] == 0.5
    sc.tl.rank_genes_groups(atlas, "cluster")
    assert len(sc.get.rank_genes_groups_df(atlas, "0")) == 40
    sc.pl.umap(atlas, color=["cluster", "G1"], gene_symbols="gene_name", show=False)
    assert list(atlas.uns["cluster_colors"]) == PALETTE[: atlas.obs["cluster"].nunique()]  # scanpy kept them


def test_every_element_is_as_the_specification_has_it(made):
    folder, *_ = made
    with h5py.File(folder / "atlas.h5ad") as file:
        seen = set()

        def look(name, element):
            parent = file[name].parent
            of = parent.attrs.get("encoding-type")
            kind = element.attrs.get("encoding-type")
            if of == "csr_matrix":
                assert kind is None and element.ndim == 1 and name.rsplit("/")[-1] in ("data", "indices", "indptr")
                return
            assert element.attrs["encoding-version"] == VERSIONS[kind], name
            seen.add(kind)
            if kind == "dataframe":
                assert {element.attrs["_index"], *element.attrs["column-order"]} == {*element}
                assert len({len(c["codes"] if isinstance(c, h5py.Group) else c) for c in element.values()}) == 1
            elif kind == "categorical":
                assert not element.attrs["ordered"] and element["codes"].dtype == np.int8
                assert element["categories"].attrs["encoding-type"] == "string-array"
                assert element["codes"][:].max() < len(element["categories"])
            elif kind == "csr_matrix":
                shape, indptr = element.attrs["shape"], element["indptr"][:]
                assert len(indptr) == shape[0] + 1 and indptr[-1] == len(element["data"]) == len(element["indices"])
                assert indptr.dtype == element["indices"].dtype == np.int32
                matrix = sp.csr_matrix((element["data"][:], element["indices"][:], indptr), shape)
                assert matrix.has_canonical_format
            elif kind in ("string", "string-array"):
                assert h5py.check_string_dtype(element.dtype).encoding == "utf-8"
                assert h5py.check_string_dtype(element.dtype).length is None

        assert file.attrs["encoding-type"] == "anndata" and file.attrs["encoding-version"] == VERSIONS["anndata"]
        assert {*file} == {"X", "layers", "obs", "obsm", "obsp", "uns", "var", "varm", "varp"}
        file.visititems(look)
        assert seen == {*VERSIONS} - {"anndata"}
        assert file["X/indices"] == file["layers/counts/indices"]  # one copy


def test_the_same_build_gives_the_same_bytes(made, tmp_path):
    folder, config, *_ = made
    first = (folder / "atlas.h5ad").read_bytes()
    verify(folder / "atlas.h5ad", "export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "CHUNK", 500)
        write_h5ad(tmp_path / "atlas.h5ad", folder, config.model_copy(update={"threads": 2}))
    assert (tmp_path / "atlas.h5ad").read_bytes() == first


def test_by_hand_it_is_the_same_file(made, tmp_path):
    """The configuration is the build's own: neighbours, seed and names."""
    config = made[1]
    with pytest.raises(UserError, match=r"manifest\.json: does not say .* name its --config"):
        built_with(tmp_path)
    write_json(tmp_path / "manifest.json", {"config": json.loads(config.model_dump_json())})
    assert built_with(tmp_path) == config


def test_selected_genes_and_counts_alone(made, tmp_path):
    folder, config, cells, counts = made
    asked = config.model_copy(update={"export": config.export.model_copy(update={"genes": "selected", "x": "counts"})})
    write_h5ad(tmp_path / "a.h5ad", folder, asked)
    atlas = ad.read_h5ad(tmp_path / "a.h5ad")
    assert (atlas.X.toarray() == counts[:, :9]).all() and (atlas.layers["counts"] != atlas.X).nnz == 0
    assert "log1p" not in atlas.uns and atlas.uns["scvi_core"]["X"] == "counts"
    asked = config.model_copy(update={"export": config.export.model_copy(update={"genes": "selected"})})
    write_h5ad(tmp_path / "b.h5ad", folder, asked)
    by_hand = np.log1p(counts[:, :9] * (1e4 / cells["n_counts"].to_numpy()[:, None]))  # of all genes' total
    np.testing.assert_allclose(ad.read_h5ad(tmp_path / "b.h5ad").X.toarray(), by_hand, rtol=1e-6)


def test_what_is_not_of_one_build_is_refused(made, tmp_path):
    folder, config, *_ = made
    for order, said in (("ab", "not those of cells.parquet"), ("b", "are in none of the samples")):
        sheet = tmp_path / f"{order}.tsv"
        sheet.write_text("".join(f"{line}\n" for line in ["sample\tpath\tbatch", *(f"{s}\tx\t{s}" for s in order)]))
        with pytest.raises(UserError, match=said):
            write_h5ad(tmp_path / "out" / "atlas.h5ad", folder, config.model_copy(update={"samples": str(sheet)}))
    assert not list((tmp_path / "out").iterdir())
