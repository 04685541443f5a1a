"""Files as the field writes them: each gives the right counts, genes and cells, or one line that says what it is."""

import gzip
import json
import zipfile

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scvi_core import io
from scvi_core.config import InputConfig, QcConfig, Sample, check_columns, level_text, load_config, load_samples
from scvi_core.files import Decisions, UserError
from scvi_core.io.identity import guess_organism
from scvi_core.preprocess.qc import in_group, qc
from scvi_core.preprocess.store import typed

N, G = 40, 60
MITO = ["ND1", "ND2", "CO1", "CO2", "ATP8", "ATP6", "CO3", "ND3", "ND4L", "ND4", "ND5", "ND6", "CYB"]
NAMES = [f"MT-{gene}" for gene in MITO] + ["ACTB", "GAPDH", "B2M"] + [f"LOC{i}" for i in range(G - 16)]
IDS = [f"ENSG{i:011d}" for i in range(G)]
_rng = np.random.default_rng(0)
X = _rng.poisson(_rng.gamma(0.6, 2.0, (1, G)), (N, G))
X[:, 0] += 1  # no cell is empty
BARCODES = ["".join(_rng.choice(list("ACGT"), 16)) + "-1" for _ in range(N)]


def read(path, sample=None, **config):
    """What ingest makes of an input: genes by name, cells, counts; and its decisions by what they are about."""
    sample = sample or Sample(sample="s", path=str(path), batch="b")
    out = path.parent / f"{path.name}.counts.h5ad"
    _, decisions = io.ingest(path, out, sample, InputConfig(**config))
    return anndata.read_h5ad(out), {d.what: d for d in decisions}


def right(path, names=NAMES, x=X, barcodes=BARCODES, **config):
    adata, decisions = read(path, **config)
    assert list(adata.var["gene_name"]) == list(names)
    assert list(adata.obs["barcode"]) == list(barcodes)
    np.testing.assert_array_equal(adata.X.toarray(), x)
    return decisions


def refused(path, match, **config):
    (path.parent / f"{path.name}.counts.h5ad").unlink(missing_ok=True)
    with pytest.raises(UserError, match=match) as caught:
        read(path, **config)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
    assert not (path.parent / f"{path.name}.counts.h5ad").exists()


def h5ad(path, x=X, var=None, obs=None, raw=None, **more):
    var = pd.DataFrame(index=NAMES) if var is None else var
    obs = pd.DataFrame(index=BARCODES) if obs is None else obs
    adata = anndata.AnnData(sp.csr_matrix(np.asarray(x, np.float32)), obs=obs, var=var, **more)
    if raw is not None:
        adata.raw = anndata.AnnData(sp.csr_matrix(raw), obs=obs, var=var)
    (adata.write_zarr if path.suffix == ".zarr" else adata.write_h5ad)(path)
    return path


def mtx(
    folder, values=None, head="integer", features=None, barcodes=None, names=("matrix", "features", "barcodes"), x=X
):
    """A folder of three files; `values` writes a count."""
    folder.mkdir()
    entries = sp.coo_matrix(x.T)
    write = values or str
    lines = [f"{i + 1} {j + 1} {write(v)}" for i, j, v in zip(entries.row, entries.col, entries.data, strict=True)]
    body = [f"%%MatrixMarket matrix coordinate {head} general", f"{x.shape[1]} {x.shape[0]} {entries.nnz}", *lines]
    features = [f"{i}\t{n}\tGene Expression" for i, n in zip(IDS, NAMES, strict=True)] if features is None else features
    ends = [".mtx", ".tsv", ".tsv"] if "." not in names[1] else [".mtx", "", ""]
    for name, end, content in zip(names, ends, (body, features, barcodes or BARCODES), strict=True):
        (folder / f"{name}{end}").write_text("\n".join(content) + "\n")
    return folder


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["integer", "real"])
def test_numbers_are_parsed_whole_whatever_the_header(tmp_path, head):
    big = X.copy()
    big[3, 20] = 100_000
    right(mtx(tmp_path / "e", lambda v: f"{v:.0e}" if v == 100_000 else str(v), head, x=big), x=big)
    right(mtx(tmp_path / "point", lambda v: f"{v}.0", head))
    right(mtx(tmp_path / "plus", lambda v: f"+{v}", head))
    refused(mtx(tmp_path / "half", lambda v: f"{v}.5", head), r"\.5\), so these are not counts")
    for name, write in (("comma", "{},5"), ("word", "{}x"), ("more", "{} 7"), ("thousand", "1'{}"), ("hex", "0x{}")):
        refused(mtx(tmp_path / name, write.format, head), "Line 3: .* is not 3 numbers")
    one = mtx(tmp_path / "one", head=head)
    text = (one / "matrix.mtx").read_text().splitlines()
    text[40] = text[40].rpartition(" ")[0] + " 1.75"
    (one / "matrix.mtx").write_text("\n".join(text))
    refused(one, r"such as 1\.75")
    text[40] = text[40].rpartition(" ")[0]
    (one / "matrix.mtx").write_text("\n".join(text))
    refused(one, "Line 41: .* is not 3 numbers")


def test_sizes_as_r_writes_them(tmp_path):
    folder = mtx(tmp_path / "m")
    head, sizes, *lines = (folder / "matrix.mtx").read_text().splitlines()
    keep = lines[: 10 ** int(np.log10(len(lines)))]
    for told in (f"{G} {N} {len(keep):.0e}", f"{G:.1e} {N}.0 {len(keep)}"):
        (folder / "matrix.mtx").write_text("\n".join([head, told, *keep]))
        assert read(folder)[0].X.sum() == sum(int(line.split()[2]) for line in keep)
    (folder / "matrix.mtx").write_text("\n".join([head, sizes.replace(str(G), f"{G}.5"), *lines]))
    refused(folder, "not whole numbers")


@pytest.mark.parametrize("kind", ["sparse", "dense", "float32"])
def test_noise_is_rounded_and_counted(tmp_path, kind):
    noisy = X * (1 + 1e-7 * np.sign(_rng.normal(size=X.shape)))
    noisy[X == 0] = -1e-17
    noisy = np.expm1(np.log1p(X.astype(np.float32))) if kind == "float32" else noisy
    adata = anndata.AnnData(noisy, obs=pd.DataFrame(index=BARCODES), var=pd.DataFrame(index=NAMES))
    adata.X = sp.csr_matrix(noisy) if kind == "sparse" else noisy
    adata.write_h5ad(tmp_path / "a.h5ad")
    decisions = right(tmp_path / "a.h5ad")
    off = (noisy != np.rint(noisy)).sum() if kind != "float32" else np.count_nonzero(noisy != X)
    assert decisions["rounded"].value == off > 0 and decisions["rounded"].warning
    for wrong, said in ((2.9998, "2.9998"), (1e6 + 0.25, "1000000.25"), (-0.001, "-0.001")):
        bad = noisy.astype(np.float64)
        bad[2, 2] = wrong
        adata.X = bad
        adata.write_h5ad(tmp_path / "b.h5ad")
        refused(tmp_path / "b.h5ad", f"such as {said}")


# --- what identifies a gene -------------------------------------------------------------------------------------------


def test_numbers_identify_no_gene(tmp_path):
    order = _rng.permutation(G)
    for name, numbers in (("a", range(G)), ("r", [f"X{i}" for i in range(G)]), ("f", [f"{i}.0" for i in range(G)])):
        var = pd.DataFrame({"whatever": NAMES, "chromosome": "chr1"}, index=[str(i) for i in numbers]).iloc[order]
        decisions = right(h5ad(tmp_path / f"{name}.h5ad", X[:, order], var), np.array(NAMES)[order], X[:, order])
        assert decisions["gene_names"].warning
    var["another"] = [f"n{i}" for i in range(G)]
    path = h5ad(tmp_path / "two.h5ad", var=var)
    refused(path, r"genes are only numbered.*set input\.gene_names.*another.*whatever")
    right(h5ad(tmp_path / "said.h5ad", X[:, order], var), np.array(NAMES)[order], X[:, order], gene_names="whatever")
    refused(path, "did you mean 'whatever'", gene_names="whateva")
    refused(h5ad(tmp_path / "none.h5ad", var=pd.DataFrame(index=[str(i) for i in range(G)])), "only numbered")


def test_ids_and_symbols_wherever_they_are(tmp_path):
    other = pd.DataFrame({"gene_symbols": IDS, "gene_ids": NAMES}, index=[str(i) for i in range(G)])  # swapped
    joined = pd.DataFrame(index=[f"{i}_{n}" for i, n in zip(IDS, NAMES, strict=True)])
    turned = pd.DataFrame(index=[f"{n}|{i}.7" for i, n in zip(IDS, NAMES, strict=True)])
    quoted = pd.DataFrame({"id": [f'"{i}"' for i in IDS]}, index=[f"'{n}'" for n in NAMES])
    prefixed = pd.DataFrame({"id": [f"GRCh38_{i}" for i in IDS]}, index=[f"GRCh38_{n}" for n in NAMES])
    hg19 = pd.DataFrame({"id": IDS}, index=[f"hg19___{n}" for n in NAMES])
    for name, var in (("o", other), ("j", joined), ("t", turned), ("q", quoted), ("p", prefixed), ("h", hg19)):
        right(h5ad(tmp_path / f"{name}.h5ad", var=var))
        adata, _ = read(tmp_path / f"{name}.h5ad")
        assert list(adata.var_names) == IDS and adata.uns["gene_ids"] == "ensembl"


def test_what_stands_beside_ids(tmp_path):
    for name, before in (("gff", "gene:"), ("human", "human_"), ("pre", "GRCh38_premrna_")):
        var = pd.DataFrame({"gene_name": NAMES}, index=[before + i for i in IDS])
        right(h5ad(tmp_path / f"{name}.h5ad", var=var))
        assert list(read(tmp_path / f"{name}.h5ad")[0].var_names) == IDS
    right(mtx(tmp_path / "m", features=[f"gene:{i}\t{n}\tGene Expression" for i, n in zip(IDS, NAMES, strict=True)]))
    for k, joined in enumerate(("{}__{}", "{}_{}", "{1}-{0}", "{1}.{0}", "{1} ({0})")):
        names = [joined.format(i, n) for i, n in zip(IDS, NAMES, strict=True)]
        right(h5ad(tmp_path / f"{k}.h5ad", var=pd.DataFrame(index=names)))
    names[7] = f"{IDS[7]}_"
    right(h5ad(tmp_path / "empty.h5ad", var=pd.DataFrame(index=names)), [*NAMES[:7], IDS[7], *NAMES[8:]])
    for before in ("Mmul_10_", "GRCh38-2020-A_", "mRatBN7.2_"):
        right(h5ad(tmp_path / f"{before}.h5ad", var=pd.DataFrame(index=[before + n for n in NAMES])))
    right(h5ad(tmp_path / "bytes.h5ad", var=pd.DataFrame(index=[f"b'{n}'" for n in NAMES])))
    numbered = [f"gene_{i}" for i in range(G)]
    right(h5ad(tmp_path / "n.h5ad", var=pd.DataFrame({"External gene name": NAMES}, index=numbered)))
    right(h5ad(tmp_path / "made.h5ad", var=pd.DataFrame(index=numbered)), numbered)  # of data made by code
    right(h5ad(tmp_path / "t.h5ad", var=pd.DataFrame({"name": NAMES}, index=[f"ENST{i:011d}" for i in range(G)])))


def test_orthologs_are_not_the_genes(tmp_path):
    mouse = [f"ENSMUSG{i:011d}" for i in range(G - 2)] + ["EGFP", "tdTomato"]
    var = pd.DataFrame({"human_ortholog": [IDS[i // 2] for i in range(G)], "gene_name": NAMES}, index=mouse)
    assert right(h5ad(tmp_path / "a.h5ad", var=var))["ids_of_two_species"].warning
    assert list(read(tmp_path / "a.h5ad")[0].var_names) == mouse
    for name in ("human_homolog", "of_man"):
        var = pd.DataFrame({name: [IDS[i // 2] if i % 4 else "" for i in range(G)]}, index=NAMES)
        right(h5ad(tmp_path / f"{name}.h5ad", var=var))
        assert list(read(tmp_path / f"{name}.h5ad")[0].var_names) == NAMES
    var = pd.DataFrame({"of_mouse": mouse, "gene_ids": IDS}, index=NAMES)
    right(h5ad(tmp_path / "c.h5ad", var=var))
    assert list(read(tmp_path / "c.h5ad")[0].var_names) == IDS


def test_words_in_place_of_a_name(tmp_path):
    for word in ("nan", "NA", "-", "protein_coding", "None"):
        names = [*NAMES[:-6], *[word] * 6]
        path = h5ad(tmp_path / f"{word}.h5ad", var=pd.DataFrame(index=names))
        assert right(path, NAMES[:-6], X[:, :-6])["genes_without_name"].value == 6
        path = h5ad(tmp_path / f"{word}2.h5ad", var=pd.DataFrame({"gene_name": names}, index=IDS))
        right(path, [*NAMES[:-6], *IDS[-6:]])
    right(h5ad(tmp_path / "fly.h5ad", var=pd.DataFrame(index=["nan", *NAMES[1:]])), ["nan", *NAMES[1:]])
    names = [*NAMES[:-6], *["Y_RNA"] * 6]
    decisions = read(h5ad(tmp_path / "y.h5ad", var=pd.DataFrame(index=names)))[1]
    assert decisions["genes_merged"].warning and "Y_RNA has most of them, 6" in decisions["genes_merged"].reason


def test_ids_of_fly_and_worm(tmp_path):
    ids = [f"FBgn{i:07d}" for i in range(G)]
    ids[::5] = [f"FBti{i:07d}" for i in range(0, G, 5)]  # Ensembl takes the fly's transposons, too
    fly = [n.replace("MT-", "mt:") for n in NAMES]
    right(h5ad(tmp_path / "f.h5ad", var=pd.DataFrame({"feature_name": fly}, index=ids)), fly)
    features = [f"{i}\t{n}\tGene Expression" for i, n in zip(ids, fly, strict=True)]
    right(mtx(tmp_path / "f", features=features), fly)
    right(h5ad(tmp_path / "w.h5ad", var=pd.DataFrame(index=[f"WBGene{i:08d}" for i in range(G)])), None or [
        f"WBGene{i:08d}" for i in range(G)
    ])  # fmt: skip


def test_two_genomes_stay_apart(tmp_path):
    names = [f"{'GRCh38' if i % 2 else 'mm10'}_{n.title() if i % 2 == 0 else n}" for i, n in enumerate(NAMES)]
    adata, _ = read(h5ad(tmp_path / "a.h5ad", var=pd.DataFrame(index=names)))
    assert list(adata.var["gene_name"]) == names
    assert in_group("mitochondrial", np.array(names), np.array(names)).sum() == len(MITO)


def test_names_that_a_spreadsheet_damaged(tmp_path):
    names = [*NAMES[:-4], "1-Mar", "1-Mar", "Sep-07", "2.31E+13"]
    adata, decisions = read(h5ad(tmp_path / "a.h5ad", var=pd.DataFrame(index=names)))
    assert adata.n_vars == G and decisions["spreadsheet_names"].n_genes == 4 and decisions["spreadsheet_names"].warning
    np.testing.assert_array_equal(adata.X.toarray(), X)
    assert not {d for d in decisions if d == "genes_merged"}
    made = ["44256", "44256", "3/1/2021", "1-Mar-21", "#NAME?", "#REF!", "1. Mrz", "01-Okt", "SEP-07"]
    decisions = read(h5ad(tmp_path / "b.h5ad", var=pd.DataFrame(index=[*NAMES[: G - len(made)], *made])))[1]
    assert decisions["spreadsheet_names"].n_genes == len(made)


# --- what is no gene --------------------------------------------------------------------------------------------------


def with_proteins(kind="feature_types", types=("Gene Expression", "Antibody Capture"), names=("CD3", "ACTB", "HTO1")):
    x = np.hstack([X, np.full((N, len(names)), 900)])
    var = pd.DataFrame({kind: [types[0]] * G + [types[1]] * len(names)}, index=[*NAMES, *names])
    return x, var


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("kind", ["feature_types", "feature_type", "modality"])
def test_proteins_by_type(tmp_path, suffix, kind):
    for i, types in enumerate(
        (("Gene Expression", "Antibody Capture"), ("rna", "ADT"), ("GEX", "Multiplexing Capture"))
    ):
        x, var = with_proteins(kind, types)
        var[kind] = pd.Categorical(var[kind])
        decisions = right(h5ad(tmp_path / f"{i}{suffix}", x, var))  # ACTB the antibody is not added to ACTB the gene
        assert decisions["features_dropped"].n_genes == 3


def test_others_by_name(tmp_path):
    others = [
        "CD3_TotalSeqB",
        "ADT_CD4",
        "HTO_1",
        "Hashtag1",
        "chr1:100-2000",
        "chr2-5-900",
        "sgRNA_TP53",
        "ERCC-00002",
    ]
    others += ["Mouse-IgG2a_control", "CD45-ADT", "non-targeting_1", "__no_feature", "N_unmapped", "AC012345.1:20-400"]
    x = np.hstack([X, np.full((N, len(others)), 900)])
    path = h5ad(tmp_path / "a.h5ad", x, pd.DataFrame(index=[*NAMES, *others]))
    decisions = right(path)
    assert (
        decisions["features_dropped_by_name"].n_genes == len(others) and decisions["features_dropped_by_name"].warning
    )
    adata, _ = read(path, not_genes=())
    assert adata.n_vars == G + len(others)
    adata, decisions = read(path, not_genes=("/^LOC/", "ADT_CD4"))
    assert adata.n_vars == 16 + len(others) - 1 and not decisions["features_dropped_by_name"].warning
    like = [
        "HLA-A",
        "adt-1",
        "AB019441.29",
        "IGHG1",
        "HTR1A",
        "GUIDE1",
        "SGCE",
        "NTC2",
        "CD4",
        "mir-1-2",
        "T-bet",
        "NKX2-1",
    ]
    names = [*NAMES[:-12], *like]
    assert list(read(h5ad(tmp_path / "b.h5ad", var=pd.DataFrame(index=names)))[0].var_names) == names


OTHERS = [
    "Hu.CD3-UCHT1",
    "A0034-anti-human-CD3",
    "GL000194.1:10-20",
    "CD3|CD3E|AH0001|pAbO",
    "CD4.stAbO",
    "CMO301",
    "adt_CD4",
    "hto_1",
    "prot_x",
    "CD4_protein",
    "CD3-CTCATTGTAACTCCT",
    "unmapped",
    "sgTP53",
    "sgNT-1",
    "TP53_sg2",
    "ERCC.00002",
    "ercc_00003",
    "no_feature",
    "not_aligned",
    "NegControlProbe_00042",
    "BLANK_0001",
    "NegPrb1",
    "IgG1",
    "Rat-IgG2a",
    "UnassignedCodeword_0012",
]


def test_others_by_the_names_of_more_tools(tmp_path):
    x = np.hstack([X, np.full((N, len(OTHERS)), 900)])
    var = pd.DataFrame(index=[*NAMES, *OTHERS])
    assert right(h5ad(tmp_path / "a.h5ad", x, var))["features_dropped_by_name"].n_genes == len(OTHERS)
    quoted = pd.DataFrame(index=[f'"GRCh38_{name}"' for name in var.index])
    right(h5ad(tmp_path / "q.h5ad", x, quoted))
    numbered = var.reset_index(names="whatever").set_index(pd.Index([str(i) for i in range(len(var))]))
    right(h5ad(tmp_path / "n.h5ad", x, numbered))
    ids = pd.DataFrame({"Gene Name": var.index}, [*IDS, *(f"x{i}" for i in range(len(OTHERS)))])
    ids["location"] = [f"chr1:{i}-{i + 100}" for i in range(len(var))]  # says where, not what
    right(h5ad(tmp_path / "c.h5ad", x, ids))
    adata, decisions = read(tmp_path / "c.h5ad", not_genes=("CD33", "/^none/"))
    assert adata.n_vars == len(var) and decisions["features_dropped_by_name"].warning
    like = ["adt-1", "sgg", "HLA-A", "SGTA", "dec-7", "apr-1", "IGHG1", "NEGR1", "Hex-A"]
    right(h5ad(tmp_path / "like.h5ad", var=pd.DataFrame(index=[*NAMES[:-9], *like])), [*NAMES[:-9], *like])
    assert "spreadsheet_names" not in read(tmp_path / "like.h5ad")[1]


def test_any_column_of_types_tells_of_others(tmp_path):
    x, var = with_proteins("feature_biotype", ("gene", "gene"))
    var["feature_types"] = ["Gene Expression"] * G + ["Surface Protein", "Antibody-derived tag", ""]
    decisions = right(h5ad(tmp_path / "a.h5ad", x, var))
    assert decisions["features_dropped"].n_genes == 3 and decisions["features_dropped"].warning
    var["feature_biotype"], var["feature_types"] = ["protein_coding"] * len(var), ["Transcriptome"] * len(var)
    assert read(h5ad(tmp_path / "b.h5ad", x, var))[0].n_vars == len(set(var.index))  # ACTB is one gene


def test_a_third_column_that_is_no_type(tmp_path):
    for name, third in (
        ("u", ["unknown"] * G),
        ("b", ["protein_coding", "lncRNA"] * (G // 2)),
        ("c", [f"c{i}" for i in range(G)]),
    ):
        features = [f"{i}\t{n}\t{t}" for i, n, t in zip(IDS, NAMES, third, strict=True)]
        assert right(mtx(tmp_path / name, features=features))["column feature_type"].value == "ignored"


def test_spliced_and_unspliced_are_summed(tmp_path):
    usa = [*IDS, *(f"{i}-U" for i in IDS), *(f"{i}-A" for i in IDS)]
    x = np.hstack([X, 2 * X, X])
    folder = tmp_path / "alevin"
    mtx(folder, features=usa, names=("quants_mat", "quants_mat_cols.txt", "quants_mat_rows.txt"), x=x)
    decisions = right(folder, IDS, 4 * X)
    assert decisions["spliced_unspliced_summed"].warning
    some = [*IDS, *(f"{i}-I" for i in IDS[:12])]  # not every gene has introns
    x_some = np.hstack([X, X[:, :12]])
    mtx(tmp_path / "some", features=some, x=x_some)
    right(tmp_path / "some", IDS, np.hstack([2 * X[:, :12], X[:, 12:]]))
    var = pd.DataFrame({"feature_types": ["spliced"] * G + ["unspliced"] * G + ["ambiguous"] * G}, index=3 * NAMES)
    right(h5ad(tmp_path / "t.h5ad", x, var), NAMES, 4 * X)


# --- layers, cells, columns -------------------------------------------------------------------------------------------


def test_the_layer_with_counts_is_found(tmp_path):
    log = np.log1p(X / X.sum(1, keepdims=True) * 1e4)
    assert right(h5ad(tmp_path / "raw.h5ad", log, raw=X))["layer"].value == "raw"
    assert right(h5ad(tmp_path / "layer.h5ad", log, layers={"counts": X, "scaled": log}))["layer"].value == "counts"
    assert right(h5ad(tmp_path / "odd.h5ad", log, layers={"mine": X}))["layer"].value == "mine"
    right(h5ad(tmp_path / "x.h5ad"))
    assert right(h5ad(tmp_path / "velo.h5ad", layers={"spliced": X // 2, "unspliced": X // 3}))["layer"].value == "X"
    for name, empty in (("ones", (X > 0).astype(int)), ("zeros", 0 * X), ("bool", X > 0)):
        path = h5ad(tmp_path / f"{name}.h5ad", log, layers={"counts": empty, "mine": X})
        assert right(path)["layer"].value == "mine"
        assert right(h5ad(tmp_path / f"{name}_x.h5ad", layers={"counts": empty}))["layer"].value == "X"
    assert right(h5ad(tmp_path / "upper.h5ad", log, layers={"Counts": X, "n": X + 1}))["layer"].value == "Counts"
    refused(h5ad(tmp_path / "two.h5ad", log, layers={"mine": X, "yours": X + 1}), "several layers.*mine, yours")
    right(tmp_path / "two.h5ad", layer="mine")
    refused(h5ad(tmp_path / "none.h5ad", log, layers={"more": log}), "no layer holds counts")
    with pytest.raises(UserError, match=r"only one matrix.*sample sheet"):
        read(mtx(tmp_path / "m"), layer="L2/3")


def test_totals_are_looked_at(tmp_path):
    millions = np.rint(1e6 * X / X.sum(1, keepdims=True))
    assert right(h5ad(tmp_path / "a.h5ad", millions), x=millions)["equal_totals"].warning
    assert "equal_totals" not in right(h5ad(tmp_path / "b.h5ad"))
    half = X * (np.arange(N) % 2)[:, None]
    decisions = right(h5ad(tmp_path / "c.h5ad", layers={"counts": half}), x=half)
    assert decisions["cells_without_counts"].n_cells == N // 2 and decisions["cells_without_counts"].warning


def test_loom_names_and_layers(tmp_path):
    with h5py.File(tmp_path / "a.loom", "w") as file:
        file["matrix"], file["layers/counts"] = np.log1p(X.T), X.T
        file["row_attrs/gene_names"], file["row_attrs/ensembl_ids"] = np.array(NAMES, "S"), np.array(IDS, "S")
        file["col_attrs/cell_names"] = np.array(BARCODES, "S")
    assert right(tmp_path / "a.loom")["layer"].value == "counts"
    assert list(read(tmp_path / "a.loom")[0].var_names) == IDS


def test_organisms_by_what_is_there(tmp_path):
    def guess(names):
        return guess_organism(np.array(names), np.array(names))

    pig = [f"ENSSSCG{i:011d}" for i in range(12)]
    assert guess([*NAMES[:13], *(f"GENE{c}A" for c in "ABCDEFGHIJKLMNOP"), *pig]) == "pig"
    assert guess([f"{a}{b}c1" for a in "abcde" for b in "fghij"] + [f"ABC{c}" for c in "DEFGHIJKLMNOP"]) == "unknown"


def test_raw_without_columns_takes_those_of_var(tmp_path):
    x, var = with_proteins()
    var["gene_ids"] = [*IDS, "CD3", "ACTB", "HTO1"]
    path = h5ad(tmp_path / "a.h5ad", np.log1p(x), var.rename(index={"ACTB": "ACTB"}), raw=x)
    with h5py.File(path, "a") as file:
        for column in ("feature_types", "gene_ids"):
            del file[f"raw/var/{column}"]
        file["raw/var"].attrs["column-order"] = np.array([], "S1")
    assert right(path)["features_dropped"].n_genes == 3 and list(read(path)[0].var_names) == IDS


def test_a_row_of_the_sheet_says_how_its_sample_is_read(tmp_path):
    sheet = tmp_path / "s.tsv"
    sheet.write_text("sample\tpath\tbatch\tlayer\tmetadata\tage\na\ta.h5ad\tb\traw\tx,y\t3\nb\tb.h5ad\tb\t\t\t4\n")
    first, second = load_samples(sheet)
    config = InputConfig(layer="counts", metadata=("z",))
    assert first.reads(config).layer == "raw" and first.reads(config).metadata == ("x", "y")
    assert second.reads(config) == config and first.metadata == {"age": "3"}
    sheet.write_text("sample\tpath\tbatch\torientation\na\ta.csv\tb\tsideways\n")
    with pytest.raises(UserError, match=r"s\.tsv line 2: orientation: .*cells_as_rows"):
        load_samples(sheet)


def test_batches_and_samples_of_one_file(tmp_path):
    donors = pd.DataFrame(
        {"donor": pd.Categorical([f"D{i % 3}" for i in range(N)]), "lane": np.arange(N) // 20}, BARCODES
    )
    path = h5ad(tmp_path / "a.h5ad", obs=donors)
    adata, _ = read(path, batch_column="donor", sample_column="lane")
    assert list(adata.obs["batch"]) == list(donors["donor"])
    assert list(adata.obs["sample"]) == [str(lane) for lane in donors["lane"]]
    assert adata.obs_names[0] == f"0:{BARCODES[0]}" and adata.uns["sample"] == "s"
    refused(path, "cell column 'donro'.*did you mean 'donor'", batch_column="donro")
    twice = donors.set_index(pd.Index(BARCODES[:20] * 2))
    path = h5ad(tmp_path / "lanes.h5ad", obs=twice)
    refused(path, r"more than once.*input\.sample_column \(found donor, lane\)")
    adata, _ = read(path, sample_column="lane")
    assert adata.obs_names.is_unique
    donors["gap"] = ["", *["x"] * (N - 1)]
    refused(h5ad(tmp_path / "gap.h5ad", obs=donors), "cell column 'gap' has ''", batch_column="gap")


def test_levels_are_one_only_if_they_are_whole_numbers(tmp_path):
    for value, level in ((24, "24"), (24.0, "24"), ("24.0", "24"), (" 3.", "3"), ("-3", "-3"), (0.5, "0.5")):
        assert level_text(value) == level
    for name in ("01", "1_1", "1E1", "1.10", "Infinity", "12345678901234567", "٣", "1e400"):
        assert level_text(name) == name
    wells = [("1E1", "10", "12345678901234567", "12345678901234568")[i % 4] for i in range(N)]
    adata, _ = read(h5ad(tmp_path / "a.h5ad", obs=pd.DataFrame({"well": wells}, BARCODES)), batch_column="well")
    assert list(adata.obs["batch"]) == wells
    for given, columns in (("x", ("x",)), ("x, y,", ("x", "y")), ("", ())):
        assert InputConfig(metadata=given).metadata == columns


def test_levels_of_the_sheet_are_those_of_the_store():
    doses = ["0.00", "0.00", "0.50", "0.50"]
    samples = [Sample(sample=f"s{i}", path="x", batch="b", metadata={"dose": d}) for i, d in enumerate(doses)]

    def asked(group):
        tests = [{"column": "dose", "group": group, "reference": 0}]
        check_columns(
            load_config({"contrast": {"tests": tests, "min_replicates": 2}, "de": {"groupby": "dose"}}), samples
        )

    stored = typed("dose", pd.Series(doses), False, Decisions("store"))
    assert sorted({level_text(dose) for dose in stored}) == ["0", "0.5"]
    asked(0.50)
    with pytest.raises(UserError, match=r"no sample has dose '0\.50' .*there are 0, 0\.5$"):
        asked("0.50")


def test_qc_is_by_sample_within_a_file(tmp_path):
    x = np.vstack([X, 50 * X])
    obs = pd.DataFrame({"donor": ["poor"] * N + ["rich"] * N}, [f"{b}{i}" for i in (1, 2) for b in BARCODES])
    x[5] //= 8
    x[N + 5] //= 50  # an outlier among the rich alone
    read(h5ad(tmp_path / "a.h5ad", x, obs=obs), sample_column="donor")
    frame, decisions = qc(tmp_path / "a.h5ad.counts.h5ad", QcConfig(min_counts=1, min_genes=1, doublets=False), 0)
    flagged = frame["flags"].str.contains("low_counts").to_numpy()
    assert flagged[N + 5] and not flagged[[i for i in range(2 * N) if i not in (5, N + 5)]].any()
    assert {d.sample for d in decisions if d.what.startswith("low_counts")} == {"poor", "rich"}


def test_what_nobody_asked_for_may_be_broken(tmp_path):
    path = h5ad(tmp_path / "a.h5ad", obs=pd.DataFrame({"good": "x", "bad": "y"}, BARCODES))
    with h5py.File(path, "a") as file:
        del file["obs/bad"]
        file["obs/bad"] = np.arange(3)
        file["obs/bad"].attrs["encoding-type"] = "of-the-future"
        file["obs/bad"].attrs["encoding-version"] = "9"
        file["uns/odd"] = np.arange(3)
        file["uns/odd"].attrs["encoding-type"] = "of-the-future"
        file["var/odd"] = np.arange(3)
        file["var/odd"].attrs["encoding-type"] = "of-the-future"
    decisions = right(path, metadata=("good",))
    assert decisions["var/odd"].warning
    refused(path, "obs/bad cannot be read", metadata=("bad",))


def test_tables_of_converters_without_encodings(tmp_path):
    path = h5ad(tmp_path / "a.h5ad", np.log1p(X), raw=X)
    with h5py.File(path, "a") as file:
        for key in ("var", "raw/var"):
            del file[key]
            file.create_group(key)["_index"] = np.array(NAMES, "S")
    assert right(path)["layer"].value == "raw"


def test_filters_that_are_not_installed_are_named(tmp_path, monkeypatch):
    path = h5ad(tmp_path / "a.h5ad")
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda code: False)
    with h5py.File(path, "a") as file:
        values = file["X/data"][:]
        del file["X/data"]
        file["X"].create_dataset("data", data=values, compression="gzip")
    refused(
        path, "X/data is compressed by the HDF5 filter deflate, which is not installed here: `pip install hdf5plugin`"
    )


def test_parts_of_a_zarr_that_were_lost(tmp_path):
    obs = pd.DataFrame({"kind": pd.Categorical(["a", "b"] * (N // 2)), "same": pd.Categorical(["x"] * N)}, BARCODES)
    for i, (part, asked) in enumerate(
        (("X/data", ()), ("X/indices", ()), ("obs/kind/codes", ("kind",)), ("obs/_index", ()))
    ):
        path = h5ad(tmp_path / f"{i}.zarr", obs=obs)
        right(path, metadata=("kind", "same"))  # of `same` zarr writes no chunk, as all its codes are 0
        lost = [
            p for p in (path / part).rglob("*") if p.is_file() and not p.name.startswith(".") and p.name != "zarr.json"
        ]
        lost[0].unlink()
        refused(path, f"{part}: 1 of 1 chunks are missing", metadata=asked)


def test_links_and_pipes_in_a_folder(tmp_path):
    import os

    secret = tmp_path / "secret"
    secret.write_text("\n".join(BARCODES))
    folder = mtx(tmp_path / "m")
    (folder / "barcodes.tsv").unlink()
    (folder / "barcodes.tsv").symlink_to(secret)
    refused(folder, "barcodes.tsv is a link out of the folder")
    (folder / "barcodes.tsv").unlink()
    os.mkfifo(folder / "barcodes.tsv")
    refused(folder, "neither a file nor a folder")


# --- layouts of pipelines ---------------------------------------------------------------------------------------------


def test_layouts_of_pipelines(tmp_path):
    plain = [f"{i}\t{n}" for i, n in zip(IDS, NAMES, strict=True)]
    for i, names in enumerate(
        (
            ("GSM1_S1_matrix", "GSM1_S1_features", "GSM1_S1_barcodes"),
            ("GSM1_matrix_S1", "GSM1_genes_S1", "GSM1_barcodes_S1"),
            ("GSM1_S1-matrix", "GSE9_features", "GSM1_S1-barcodes"),
            ("cells_x_genes", "cells_x_genes.genes.txt", "cells_x_genes.barcodes.txt"),
            ("S.quants_mat", "S.quants_mat_cols.txt", "S.quants_mat_rows.txt"),
        )
    ):
        right(mtx(tmp_path / str(i), features=plain, names=names))
    parse = tmp_path / "DGE_filtered"
    features = ["gene_id,gene_name,genome", *(f"{i},{n},hg38" for i, n in zip(IDS, NAMES, strict=True))]
    cells = ["bc_wells,sample", *(f"{b},all-well" for b in BARCODES)]
    mtx(parse, features=features, barcodes=cells, names=("DGE", "all_genes.csv", "cell_metadata.csv"))
    right(parse)
    right(mtx(tmp_path / "geo", features=plain, names=("GSM2_S1_counts", "GSM2_S1_genes", "GSM2_S1_barcodes")))
    unknown = mtx(tmp_path / "unknown", features=["ensgene\tof_hgnc", *plain], barcodes=["droplet", *BARCODES])
    assert right(unknown)["headers"].value == 2
    for mark in ";, ":
        folder = mtx(tmp_path / f"split{ord(mark)}", features=[line.replace("\t", mark) for line in plain])
        refused(folder, f"features.tsv: its columns are separated by '{mark}'")
    outs = tmp_path / "outs"
    outs.mkdir()
    mtx(outs / "filtered_feature_bc_matrix")
    refused(outs, "name one of the folders in it that have one: filtered_feature_bc_matrix")


def test_rhapsody_tables_and_starsolo_multimappers(tmp_path):
    path = tmp_path / "x_RSEC_MolsPerCell.csv"
    body = pd.DataFrame(X, pd.Index(range(7000, 7000 + N), name="Cell_Index"), NAMES).to_csv()
    path.write_text("## BD Rhapsody\n## more\n" + body)
    right(path, barcodes=[str(i) for i in range(7000, 7000 + N)])
    folder = mtx(tmp_path / "raw")
    text = (folder / "matrix.mtx").read_text().replace("integer", "float")
    (folder / "UniqueAndMult-EM.mtx").write_text(
        "\n".join(f"{line}.25" if i > 1 else line for i, line in enumerate(text.splitlines()))
    )
    right(folder)
    with pytest.raises(UserError, match=r"such as .*\.25.*take matrix.mtx beside it"):
        read(folder / "UniqueAndMult-EM.mtx")


def test_mudata(tmp_path):
    with h5py.File(tmp_path / "a.h5mu", "w") as file:
        for name, source in (("rna", h5ad(tmp_path / "r.h5ad")), ("prot", h5ad(tmp_path / "p.h5ad", X + 7))):
            with h5py.File(source) as one:
                one.copy("/", file.require_group("mod"), name)
        for table in ("obs", "var"):
            file.create_group(table)
    assert right(tmp_path / "a.h5mu")["modality"].value == "rna"
    with h5py.File(tmp_path / "a.h5mu", "a") as file:
        file.move("mod/rna", "mod/first")
    refused(tmp_path / "a.h5mu", "MuData with the modalities first, prot")


def test_content_decides_what_is_packed(tmp_path):
    for name, packed in (("plain", False), ("packed", True)):
        folder = mtx(tmp_path / name)
        for file in list(folder.iterdir()):
            content = file.read_bytes()
            file.unlink()
            (folder / (file.name if packed else f"{file.name}.gz")).write_bytes(
                gzip.compress(content) if packed else content
            )
        right(folder)


@pytest.mark.parametrize("wrapped", ["fields", "rows", "numbers", "header", "all"])
def test_tables_as_r_writes_them(tmp_path, wrapped):
    def write(rows):
        rows = [row.split("\t") for row in rows]
        if wrapped in ("numbers", "all"):
            rows = [[str(i + 1), *row] for i, row in enumerate(rows)]
        if wrapped in ("header", "all"):
            rows = [["x"] if len(rows[0]) == 1 else [f"V{i}" for i in range(1, 1 + len(rows[0]))], *rows]
        if wrapped == "rows":
            return [f'"{chr(9).join(row)}"' for row in rows]
        return ["\t".join(f'"{field}"' for field in row) for row in rows]

    features = write([f"{i}\t{n}\tGene Expression" for i, n in zip(IDS, NAMES, strict=True)])
    right(mtx(tmp_path / "m", features=features, barcodes=write(BARCODES)))


def test_tables_beside_with_numbers_and_headers_of_their_own(tmp_path):
    rows = [f"{7 * k + 2},x{k % 3},{i},{n}" for k, (i, n) in enumerate(zip(IDS, NAMES, strict=True))]
    features = ["row,strand,gene_id,gene_name", *rows]
    cells = ["sample,n,bc_wells", *(f"all,{i},{b}" for i, b in enumerate(BARCODES))]
    names = ("DGE", "all_genes.csv", "cell_metadata.csv")
    folder = mtx(tmp_path / "a", features=features, barcodes=cells, names=names)
    right(folder)
    assert list(read(folder)[0].var_names) == IDS
    gaps = [f"{7 * k + 2}\t{n}" for k, n in enumerate(NAMES)]
    right(mtx(tmp_path / "b", features=gaps, barcodes=[f"{3 * k}\t{b}" for k, b in enumerate(BARCODES)]))
    numbered = ["", *(f"{k},{i},{n}" for k, (i, n) in enumerate(zip(IDS, NAMES, strict=True)))]
    numbered[0] = ",gene_id,gene_name"
    right(mtx(tmp_path / "c", features=numbered, names=("DGE", "all_genes.csv", "cell_metadata.csv")))


def test_a_square_matrix_is_as_its_pipeline_writes_it(tmp_path):
    x, plain = X[:, :N], [f"{i}\t{n}" for i, n in zip(IDS[:N], NAMES, strict=False)]
    right(mtx(tmp_path / "tenx", features=plain, x=x), NAMES[:N], x)
    for i, names in enumerate(
        (
            ("cells_x_genes", "cells_x_genes.genes.txt", "cells_x_genes.barcodes.txt"),
            ("quants_mat", "quants_mat_cols.txt", "quants_mat_rows.txt"),
            ("DGE", "all_genes.tsv", "cell_metadata.tsv"),
        )
    ):
        right(mtx(tmp_path / str(i), features=plain, names=names, x=x.T), NAMES[:N], x)


def test_two_tables_beside_have_to_be_the_same(tmp_path):
    folder = mtx(tmp_path / "m")
    text = (folder / "features.tsv").read_text()
    (folder / "features.tsv.gz").write_bytes(gzip.compress(text.encode()))
    right(folder)
    for name in ("features.tsv.gz", "genes.tsv"):
        (folder / name).write_text("\n".join(text.splitlines()[::-1]))
        refused(folder, rf"m.*features\.tsv.* and .*{name[:5]}.* differ; take out the wrong one")
        (folder / name).unlink()


def test_a_table_beside_that_is_damaged_is_named(tmp_path):
    folder = mtx(tmp_path / "m")
    packed = gzip.compress("\n".join(BARCODES).encode())
    for content, match in (
        ("\n".join(BARCODES).encode("utf-16"), r"barcodes\.tsv: UTF-16 text"),
        ("é\n".join(BARCODES).encode("cp1252"), r"barcodes\.tsv: not UTF-8 text"),
        (packed[: len(packed) // 2], r"barcodes\.tsv: truncated or damaged gzip"),
    ):
        (folder / "barcodes.tsv").write_bytes(content)
        refused(folder, match)


def test_tables_of_another_export_are_not_headers(tmp_path):
    refused(mtx(tmp_path / "m", barcodes=[*BARCODES, "AAAA-1"]), "not of one export")


# --- tables of text ---------------------------------------------------------------------------------------------------


def test_columns_of_annotation(tmp_path):
    frame = pd.DataFrame(X.T, pd.Index(NAMES, name="Geneid"), BARCODES)
    for i, column in enumerate(("Chr", "Start", "Length")):
        frame.insert(i, column, ["chr1"] * G if column == "Chr" else range(1000, 1000 + G))
    frame.insert(3, "gene_name", NAMES)
    frame.reset_index().assign(Geneid=IDS).to_csv(tmp_path / "counts.tsv", sep="\t", index=False)
    decisions = right(tmp_path / "counts.tsv")
    assert decisions["annotation_columns"].value == 4 and decisions["annotation_columns"].warning
    cells = pd.DataFrame(X, BARCODES, NAMES).assign(nUMI=7, seurat_clusters=3, cell_type="T")
    cells.to_csv(tmp_path / "cells.csv")
    decisions = right(tmp_path / "cells.csv", metadata=("cell_type",))
    assert decisions["orientation"].value == "cells_as_rows"
    frame = pd.DataFrame(X.T, NAMES, BARCODES).assign(Whole=7)
    frame.to_csv(tmp_path / "whole.csv")
    adata, decisions = read(tmp_path / "whole.csv")
    assert adata.n_obs == N + 1 and "Whole" in decisions["odd_cells"].reason and decisions["odd_cells"].warning


SUMS = ["Total", "nCount_RNA", "nFeature_ADT", "n_genes", "nUMI", "RNA_snn_res.0.5", "percent.ribo", "total_counts_mt"]
SUMS += ["pct_counts_mt", "Unnamed: 0", "entrezgene_id", "Gene.Length", "GeneLen", "width", "orig.ident", "Mean", "SUM"]


def test_columns_and_rows_of_sums(tmp_path):
    cells = pd.DataFrame(X, BARCODES, NAMES)
    for i, frame in enumerate((cells, cells.T)):
        beside = pd.DataFrame(7.5, frame.index, SUMS)
        pd.concat([beside, frame], axis=1).to_csv(tmp_path / f"c{i}.csv")
        assert right(tmp_path / f"c{i}.csv")["annotation_columns"].value == len(SUMS)
        pd.concat([frame, pd.DataFrame(7.5, SUMS, frame.columns)]).to_csv(tmp_path / f"r{i}.csv")
        decisions = right(tmp_path / f"r{i}.csv")
        assert decisions["annotation_rows"].value == len(SUMS) and decisions["annotation_rows"].warning


def test_long_tables_are_refused(tmp_path):
    gene, cell = np.nonzero(X.T)
    frame = pd.DataFrame({"geneID": np.array(NAMES)[gene], "x": cell, "y": cell + 3, "MIDCount": X.T[gene, cell]})
    frame.to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    refused(tmp_path / "a.tsv", "a long table of one count a row; write it with one column a cell")
    frame = frame.assign(x=np.array(BARCODES)[cell]).drop(columns="y").set_axis(["gene", "cell", "count"], axis=1)
    frame.to_csv(tmp_path / "b.tsv", sep="\t", index=False)
    refused(tmp_path / "b.tsv", "column 'cell' has .* one column a cell .*a long table")


def test_lines_in_front_and_lines_that_do_not_fit(tmp_path):
    text = pd.DataFrame(X.T, pd.Index(NAMES, name="Geneid"), BARCODES).to_csv(sep="\t")
    for name, front in (
        ("f", '# Program:featureCounts v2.0.1; Command:"featureCounts" "-a"'),
        ("d", "#DGE\tv\ty\n#x\ty"),
    ):
        (tmp_path / f"{name}.txt").write_text(f"{front}\n{text}")
        right(tmp_path / f"{name}.txt")
    (tmp_path / "h.tsv").write_text(f"#{text}")
    right(tmp_path / "h.tsv")
    lines = text.splitlines()
    (tmp_path / "t.tsv").write_text("\n".join([lines[0], *(f"{line}\t" for line in lines[1:])]))
    (tmp_path / "a.tsv").write_text("\n".join(f"{line}\t" for line in lines))  # in the header, too
    right(tmp_path / "a.tsv")
    refused(tmp_path / "t.tsv", "40 names in the header, 41 values in the row of 'MT-ND1'")
    for name, wrong in (("s", lines[20].rpartition("\t")[0]), ("l", f"{lines[20]}\t7")):
        (tmp_path / f"{name}.tsv").write_text("\n".join([*lines[:20], wrong, *lines[21:]]))
        refused(tmp_path / f"{name}.tsv", "line 20|row 'LOC3'")


def test_orientation_by_names(tmp_path):
    panel = ["CD3E", "CD19", "EPCAM", *(f"P{i}" for i in range(G - 3))]  # no housekeeping gene among them
    numbered = [str(700000 + i) for i in range(N)]
    for name, frame in (("a", pd.DataFrame(X, numbered, panel)), ("b", pd.DataFrame(X.T, panel, numbered))):
        frame.to_csv(tmp_path / f"{name}.csv")
        right(tmp_path / f"{name}.csv", panel, barcodes=numbered)
    wrong = "genes_as_rows"
    refused(tmp_path / "a.csv", "set input.orientation to cells_as_rows", orientation=wrong)
    pd.DataFrame(X, [f"c{i}" for i in range(N)], [f"g{i}" for i in range(G)]).to_csv(tmp_path / "c.csv")
    refused(tmp_path / "c.csv", "neither rows nor columns have names that are known")
    adata, _ = read(tmp_path / "c.csv", orientation="cells_as_rows")
    assert adata.shape == (N, G)


def test_files_of_spreadsheets_are_named(tmp_path):
    frame = pd.DataFrame(X.T, NAMES, BARCODES)
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w") as archive:
        archive.writestr("xl/workbook.xml", "<x/>")
    refused(tmp_path / "a.xlsx", "an Excel workbook; save")
    (tmp_path / "u.txt").write_text(frame.to_csv(sep="\t"), encoding="utf-16")
    refused(tmp_path / "u.txt", "UTF-16 text")
    (tmp_path / "s.csv").write_text(frame.to_csv(sep=";"))
    refused(tmp_path / "s.csv", "separated by semicolons")
    (tmp_path / "w.csv").write_bytes(frame.rename(index={"ACTB": "ACTÉ"}).to_csv().encode("cp1252"))
    refused(tmp_path / "w.csv", "not UTF-8 text .*Windows-1252")
    (tmp_path / "n.csv").write_text(frame.astype(object).where(X.T > 0, "NA").to_csv())
    refused(tmp_path / "n.csv", "has 'NA', not a number; write 0")


def test_sheets_of_spreadsheets(tmp_path):
    sheet = tmp_path / "s.tsv"
    text = "sample\tpath\tbatch\tage\tkind\t\t\r\na\tx\tb\t34\tβ cell\t\t\r\nb\ty\tb\tNA\tn/a\t\t\r\n\t\t\t\t\t\t\r\n"
    sheet.write_bytes(b"\xef\xbb\xbf" + text.encode())
    first, second = load_samples(sheet)
    assert first.metadata == {"age": "34", "kind": "β cell"} and second.metadata == {"age": "", "kind": ""}
    for content, match in (
        (text.encode("utf-16"), "UTF-16"),
        (text.replace("β", "é").encode("cp1252"), "line 2: not UTF-8 text .*Windows-1252"),
        (b"PK\x03\x04...", "Excel workbook"),
        (text.replace("\t", ",").encode(), "separated by tabs, not ','"),
        (text.replace("\tb\t34", "\tNA\t34").encode(), "line 2: batch: is empty"),
    ):
        sheet.write_bytes(content)
        with pytest.raises(UserError, match=match):
            load_samples(sheet)
    with pytest.raises(UserError, match="not a file"):
        load_samples(tmp_path)


# --- mitochondrial genes ----------------------------------------------------------------------------------------------


def test_mitochondrial_genes_of_other_species(tmp_path):
    def found(names, ids=None, **config):
        ids = names if ids is None else ids
        return in_group("mitochondrial", np.array(ids), np.array(names), config.get("given")).sum()

    bare = [n.removeprefix("MT-") for n in NAMES]
    assert found(bare) == 13 and found([n.lower() for n in bare]) == 13  # pig, macaque, chicken
    assert found(["ND1", "COX1", *NAMES[13:]]) == 0  # too few to tell
    ids = ["ENSMMUG00000065372", *(f"x{i}" for i in range(4)), *NAMES[13:]]
    assert found([ids[0], "ND2", "COX1", "CYTB", "ATP8", *NAMES[13:]], ids) == 5  # one without a symbol
    assert found([n.replace("-", "_") for n in NAMES]) == found([n.replace("-", "") for n in NAMES]) == 13
    assert found(["MTND1P23", "MTF1", "MTCO1P2"]) == 0
    assert found(["nduo-1", "nduo-2", "ctc-1", "ctc-2", "ctb-1", "atp-6", "act-1"]) == 6
    assert found([f"GRCh38_{n}" for n in NAMES]) == 13 and found([f"hg19-{n}" for n in NAMES]) == 13
    for ids in (
        ["ENSSSCG00000018065"],
        ["ENSMMUG00000065372"],
        ["FBgn0013679"],
        ["WBGene00010959"],
        ["ENSGALG00000043768"],
    ):
        assert found(["x"], ids) == 1
    assert found(["ATMG00160", "AT1G01010"]) == 1
    assert found(bare, given=("ND1", "/^CO/", "IDX")) == 4


def test_genes_given_in_the_configuration(tmp_path):
    path = tmp_path / "mito.txt"
    path.write_text("# mine\nLOC1\nLOC2\n\n")
    for given, expected in ((str(path), ("LOC1", "LOC2")), ("/^MT/", ("/^MT/",)), (["LOC3"], ("LOC3",))):
        config = load_config({"qc": {"mitochondrial": given}})
        assert config.qc.mitochondrial == expected
    assert load_config(json.dumps(config.model_dump(mode="json"))) == config
    for given, match in (("none.txt", "no list of genes in a file"), (["/(/"], "not a regular expression")):
        with pytest.raises(UserError, match=match):
            load_config({"qc": {"mitochondrial": given}})
    read(h5ad(tmp_path / "a.h5ad"))
    counts = tmp_path / "a.h5ad.counts.h5ad"
    frame, _ = qc(counts, QcConfig(mitochondrial=("LOC1", "LOC2"), doublets=False, min_counts=1, min_genes=1), 0)
    share = 100 * X[:, [NAMES.index("LOC1"), NAMES.index("LOC2")]].sum(1) / X.sum(1)
    np.testing.assert_allclose(frame["pct_mito"], share, rtol=1e-5)
    none = QcConfig(mitochondrial=("ABC",), doublets=False, min_counts=1, min_genes=1)
    warned = [d for d in qc(counts, none, 0)[1] if d.what == "mitochondrial_genes"]
    assert warned[0].warning and "qc.mitochondrial" in warned[0].reason


def test_warnings_are_logged_as_such(caplog):
    Decisions("x", "s").add("a", 1, "look", warn=True)
    assert caplog.records[0].levelname == "WARNING"


# --- more of what public reports tell ---------------------------------------------------------------------------------


def test_controls_and_guides_of_screens_by_their_family(tmp_path):
    for k, controls in enumerate(
        (
            ["NTC_1", "NTC_2", "NTC_17"],
            [f"neg_ctrl_{i}" for i in range(1, 5)],
            [f"non-targeting_0{i}" for i in range(3)],
            [f"NegCtrl-{i}_sg1"[:9] for i in range(1, 6)],
            [f"scramble{i}" for i in (1, 2, 3)],
            [f"safe-targeting-{i}" for i in range(4)],
            [f"ONE_NON-GENE_SITE_{i}" for i in range(3)],
        )
    ):
        others = [*controls, "ACTB_1", "ACTB_2", "B2M_g1", "LOC7_sg2", "AAAS_+_53715438.23-P1P2"]
        x = np.hstack([X, np.full((N, len(others)), 900)])
        path = h5ad(tmp_path / f"{k}.h5ad", x, pd.DataFrame(index=[*NAMES, *others]))
        dropped = right(path)["features_dropped_by_name"]
        assert dropped.n_genes == len(others) and dropped.warning
        assert read(path, not_genes=())[0].n_vars == G + len(others)
    like = ["NTC2", "CTRL", "NEGR1", "NT5E", "NT_1", "NT_2", "ACTB_1", "SAFB", "SCRIB1", "NEG1"]  # two are no family
    right(h5ad(tmp_path / "like.h5ad", var=pd.DataFrame(index=[*NAMES[:-10], *like])), [*NAMES[:-10], *like])
    x, var = with_proteins(names=("NTC_1", "NTC_2", "NTC_3"))
    var["feature_types"] = "Gene Expression"  # as the file itself says
    assert read(h5ad(tmp_path / "typed.h5ad", x, var))[0].n_vars == G + 3


def test_chromosomes_behind_names(tmp_path):
    places = [f"chr{i % 22 + 1}" if i > 12 else "chrM" for i in range(G)]
    places[20], places[21] = "chrX", "chrUn_KI270742v1"
    names = [f"{n}__{c}" for n, c in zip(NAMES, places, strict=True)]
    assert right(h5ad(tmp_path / "a.h5ad", var=pd.DataFrame(index=names)))["chromosomes_cut"].value == G
    pd.DataFrame(X.T, names, BARCODES).to_csv(tmp_path / "a.tsv", sep="\t")
    right(tmp_path / "a.tsv")
    twice = [*names[:-1], f"{NAMES[30]}__chrY"]  # one gene at two places
    assert right(
        h5ad(tmp_path / "b.h5ad", var=pd.DataFrame(index=twice)),
        NAMES[:-1],
        np.hstack([X[:, :30], X[:, 30:31] + X[:, -1:], X[:, 31:-1]]),
    )["genes_merged"]
    mixed = [*NAMES[:-1], "LOC43__chr7"]
    right(h5ad(tmp_path / "c.h5ad", var=pd.DataFrame(index=mixed)), mixed)


def test_barcodes_that_were_bytes_or_in_quotes(tmp_path):
    for k, wrap in enumerate(("b'{}'", 'b"{}"', '"{}"')):
        obs = pd.DataFrame(index=[wrap.format(b) for b in BARCODES])
        decisions = right(h5ad(tmp_path / f"{k}.h5ad", obs=obs))
        assert decisions["barcodes"].warning and decisions["barcodes"].n_cells == N
    frame = pd.DataFrame(X, [f"b'{b}'" for b in BARCODES], NAMES)
    frame.to_csv(tmp_path / "t.csv")
    assert right(tmp_path / "t.csv")["barcodes"].warning
    assert "barcodes" not in right(h5ad(tmp_path / "plain.h5ad"))


def test_kb_writes_ids_and_names_in_two_tables(tmp_path):
    names = ("cells_x_genes", "cells_x_genes.genes.txt", "cells_x_genes.barcodes.txt")
    folder = mtx(tmp_path / "counts_unfiltered", features=IDS, names=names)
    right(folder, IDS)
    symbols = ["nan", *NAMES[1:]]
    (folder / "cells_x_genes.genes.names.txt").write_text("\n".join(symbols) + "\n")
    right(folder, [IDS[0], *NAMES[1:]])
    assert list(read(folder)[0].var_names) == IDS
    (folder / "cells_x_genes.genes.names.txt").write_text("\n".join(NAMES[:-2]) + "\n")
    refused(folder, r"genes\.names\.txt: 58 names, but 60 genes")
    (tmp_path / "kb" / "run").mkdir(parents=True)
    folder.rename(tmp_path / "kb" / "run" / "counts_unfiltered")
    refused(tmp_path / "kb", "name one of the folders in it that have one: run/counts_unfiltered")


def test_parts_of_what_was_counted_are_told(tmp_path):
    names = ("spliced", "spliced.genes.txt", "spliced.barcodes.txt")
    folder = mtx(tmp_path / "lamanno", features=IDS, names=names)
    assert right(folder, IDS)["molecules"].warning
    (folder / "unspliced.mtx").write_bytes((folder / "spliced.mtx").read_bytes())
    refused(folder, r"several matrices \(spliced\.mtx, unspliced\.mtx\); take the export of all molecules .*GeneFull")
    star = mtx(tmp_path / "Velocyto", lambda v: f"{v} 0 1")
    refused(star, "Line 3: three counts an entry, as STARsolo writes .*take its folder Gene or GeneFull")


def test_the_expression_atlas_has_rows_and_columns_beside(tmp_path):
    stem = "E-HCAD-4.aggregated_filtered_counts"
    folder = mtx(tmp_path / "scxa", features=[f"{i}\t{i}" for i in IDS], names=(stem, f"{stem}.mtx_rows", "c"))
    (folder / "c").rename(folder / f"{stem}.mtx_cols")
    right(folder, IDS)
    (folder / f"{stem}.mtx_cols").unlink()
    refused(folder, rf"no .*{stem}\.mtx_cols")


def test_numbered_raw_beside_named_var(tmp_path):
    path = h5ad(tmp_path / "a.h5ad", np.log1p(X), raw=X)
    numbered = pd.DataFrame(index=[str(i) for i in range(G)])
    with h5py.File(path, "a") as file:
        del file["raw/var"]
        anndata.io.write_elem(file, "raw/var", numbered)
    decisions = right(path)
    assert decisions["raw/var"].warning and decisions["layer"].value == "raw"
    with h5py.File(path, "a") as file:  # a column says it, as SeuratDisk has it
        del file["raw/var"]
        anndata.io.write_elem(file, "raw/var", numbered.assign(features=NAMES[::-1]))
    right(path, NAMES[::-1])
    more = np.hstack([X, X[:, :1]])
    raw = anndata.AnnData(sp.csr_matrix(more), var=pd.DataFrame(index=[str(i) for i in range(G + 1)]))
    adata = anndata.AnnData(np.log1p(X), obs=pd.DataFrame(index=BARCODES), var=pd.DataFrame(index=NAMES))
    adata.raw = raw
    adata.write_h5ad(path)
    refused(path, "genes are only numbered")  # which of the 61 are the 60 that have names?


def test_loom_without_counts_in_its_matrix(tmp_path):
    def loom(name, matrix, **layers):
        with h5py.File(tmp_path / name, "w") as file:
            file["matrix"] = matrix.T
            for layer, values in layers.items():
                file[f"layers/{layer}"] = values.T
            file["row_attrs/Gene"], file["col_attrs/CellID"] = np.array(NAMES, "S"), np.array(BARCODES, "S")
        return tmp_path / name

    assert right(loom("one.loom", 0 * X, raw_umis=X))["layer"].value == "raw_umis"
    assert right(loom("named.loom", 0.0 * X, counts=X, other=X + 1))["layer"].value == "counts"
    path = loom("two.loom", 0 * X, spliced=X, unspliced=X + 1)
    refused(path, r"several layers hold whole numbers \(spliced, unspliced\); set input\.layer")
    right(path, layer="spliced")
    refused(loom("none.loom", 0 * X), "all counts are zero")
    with h5py.File(loom("kb.loom", X), "a") as file:  # as kb writes it
        file.move("row_attrs/Gene", "row_attrs/gene_names")
        file.move("col_attrs/CellID", "col_attrs/barcode")
        file["row_attrs/gene_ids"] = np.array(IDS, "S")
    right(tmp_path / "kb.loom")


def test_formats_of_others_are_named_with_a_remedy(tmp_path):
    import bz2
    import lzma

    text = pd.DataFrame(X.T, NAMES, BARCODES).to_csv().encode()
    for name, content, match in (
        ("a.csv.bz2", bz2.compress(text), "packed by bzip2; bunzip2 it"),
        ("a.csv.xz", lzma.compress(text), "packed by xz; unxz it"),
        ("a.csv.zst", b"\x28\xb5\x2f\xfd" + text, "packed by zstd; unzstd it"),
        ("a.rds", gzip.compress(b"X\n\x00\x00\x00\x03" + bytes(99)), r"an R object .*write10xCounts"),
        ("b.rds", gzip.compress(b"A\n3\n262400\n"), "an R object"),
        ("a.RData", gzip.compress(b"RDX3\nX\n" + bytes(99)), "an R object"),
        ("c.rds", bz2.compress(b"X\n\x00\x00\x00\x03"), "packed by bzip2"),
        ("a.qs", b"\x0b\x0e\x0a\x0c" + bytes(99), "an R object"),
        ("a.parquet", b"PAR1" + bytes(99), "a Parquet table; write its counts as h5ad"),
        ("a.feather", b"ARROW1\x00\x00" + bytes(99), "a Feather table"),
        ("a.npy", b"\x93NUMPY" + bytes(99), "no names of genes and cells"),
        ("output.bus", b"BUS\x00" + bytes(99), "kb count"),
        ("a.bam", gzip.compress(b"BAM\x01" + bytes(99)), r"aligned reads \(BAM\); count them first"),
        ("a.db", b"SQLite format 3\x00" + bytes(99), "an SQLite database"),
        ("a.csv", b"<!DOCTYPE html><html>Not found</html>", "a web page, not what it should be"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c" + bytes(99), "a 7z archive; unpack it"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, match)
    for name, keys, match in (
        ("a.h5Seurat", ("assays", "cell.names", "meta.data"), r"an h5Seurat file; .*dest = 'h5ad'"),
        ("molecule_info.h5", ("barcode_idx", "feature_idx", "umi"), r"molecule_info\.h5; take filtered_feature_bc"),
        ("latents.h5", ("droplet_latents", "metadata"), "CellBender's latents"),
    ):
        with h5py.File(tmp_path / name, "w") as file:
            for key in keys:
                file.create_group(key)
        refused(tmp_path / name, match)
    folder = mtx(tmp_path / "m")
    (folder / "matrix.mtx.bz2").write_bytes(bz2.compress((folder / "matrix.mtx").read_bytes()))
    (folder / "matrix.mtx").unlink()
    refused(folder, r"unpack matrix\.mtx\.bz2")


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_turned_matrices_are_refused(tmp_path, suffix):
    adata = anndata.AnnData(X.T, obs=pd.DataFrame(index=NAMES), var=pd.DataFrame(index=BARCODES))
    (adata.write_zarr if suffix == ".zarr" else adata.write_h5ad)(tmp_path / f"a{suffix}")
    refused(tmp_path / f"a{suffix}", "its cells are called as genes are .*the matrix is turned")


def test_sums_where_names_say_nothing(tmp_path):
    rate = np.random.default_rng(3).gamma(0.1, 1.0, 400)
    x = np.random.default_rng(4).poisson(rate, (60, 400))
    x[:, 0] += 1
    cells, genes = [f"c{i}" for i in range(60)], [f"g{i}" for i in range(400)]
    pd.DataFrame(x, cells, genes).to_csv(tmp_path / "a.csv")
    assert "turned?" not in right(tmp_path / "a.csv", genes, x, cells, orientation="cells_as_rows")
    decisions = right(tmp_path / "a.csv", cells, x.T, genes, orientation="genes_as_rows")  # as told, with a warning
    assert decisions["turned?"].warning and "see input.orientation" in decisions["turned?"].reason
    pd.DataFrame(x, BARCODES + [f"{b}2" for b in BARCODES[:20]], genes).to_csv(tmp_path / "b.csv")
    assert "turned?" not in read(tmp_path / "b.csv")[1]


def test_probes_of_a_panel_are_summed_to_genes(tmp_path):
    with h5py.File(tmp_path / "raw_probe_bc_matrix.h5", "w") as file:
        cells = sp.csr_matrix(np.hstack([X, X]))
        matrix = file.create_group("matrix")
        matrix["data"], matrix["indices"], matrix["indptr"] = cells.data, cells.indices, cells.indptr
        matrix["shape"], matrix["barcodes"] = [2 * G, N], np.array(BARCODES, "S")
        probes = [f"{i}|{n}|{k:07x}" for k in (1, 2) for i, n in zip(IDS, NAMES, strict=True)]
        features = {"id": probes, "name": probes, "feature_type": ["Gene Expression"] * 2 * G}
        features |= {"gene_id": IDS * 2, "gene_name": NAMES * 2}
        for name, values in features.items():
            matrix[f"features/{name}"] = np.array(values, "S")
    right(tmp_path / "raw_probe_bc_matrix.h5", x=2 * X)
    assert list(read(tmp_path / "raw_probe_bc_matrix.h5")[0].var_names) == IDS


def test_integers_that_ran_over_are_refused(tmp_path):
    path = h5ad(tmp_path / "a.h5ad")
    with h5py.File(path, "a") as file:
        ends = file["X/indptr"][:].astype(np.int64)
        ends[20:] -= 2**31  # as after 2^31 entries in 32 bits
        del file["X/indptr"]
        file["X/indptr"] = ends
    refused(path, "indptr does not rise from 0")
    wrapped = X.astype(np.int16)
    wrapped[3, 3] = -536  # 65000 in 16 bits
    adata = anndata.AnnData(wrapped, obs=pd.DataFrame(index=BARCODES), var=pd.DataFrame(index=NAMES))
    adata.write_h5ad(tmp_path / "b.h5ad")
    refused(tmp_path / "b.h5ad", r"negative values \(such as -536\)")


def test_counts_in_a_layer_where_there_is_no_x(tmp_path):
    adata = anndata.AnnData(obs=pd.DataFrame(index=BARCODES), var=pd.DataFrame({"Symbol": NAMES}, index=IDS))
    adata.layers["counts"], adata.layers["logcounts"] = sp.csr_matrix(X), np.log1p(X)  # as zellkonverter may write it
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert right(tmp_path / "a.h5ad")["layer"].value == "counts"


def test_joined_names_of_the_cell_browser(tmp_path):
    frame = pd.DataFrame(X.T, pd.Index([f"{i}|{n}" for i, n in zip(IDS, NAMES, strict=True)], name="gene"), BARCODES)
    with gzip.open(tmp_path / "exprMatrix.tsv.gz", "wt") as handle:
        handle.write(frame.to_csv(sep="\t"))
    right(tmp_path / "exprMatrix.tsv.gz")
    assert list(read(tmp_path / "exprMatrix.tsv.gz")[0].var_names) == IDS


def test_a_symbol_says_more_than_an_id_of_the_mitochondrion():
    ids = [f"FBgn{13650 + i:07d}" for i in range(G)]  # some of them are mitochondrial genes' in FlyBase
    names = [*(f"mt:{n}" for n in MITO), *(f"CG{i}" for i in range(G - 13))]
    assert in_group("mitochondrial", np.array(ids), np.array(names)).sum() == 13
    assert in_group("mitochondrial", np.array(ids), np.array(ids)).sum() > 5
    zebrafish = [*(f"mt-{n.lower()}" for n in MITO), "NC_002333.4", "actb1"]
    real = [*(f"x{i}" for i in range(13)), "ENSDARG00000083480", "y"]
    assert in_group("mitochondrial", np.array(real), np.array(zebrafish)).sum() in (13, 14)


def test_names_that_were_made_unique_are_warned_of(tmp_path):
    names = [*NAMES[:-4], "ACTB-1", "B2M-1", "LOC3.1", "LOC4.2"]
    decisions = right(h5ad(tmp_path / "a.h5ad", var=pd.DataFrame(index=names)), names)
    assert decisions["names_made_unique"].value == 4 and decisions["names_made_unique"].warning
    var = pd.DataFrame({"gene_ids": IDS}, index=names)  # ids say which is which
    assert "names_made_unique" not in right(h5ad(tmp_path / "b.h5ad", var=var), names)
    like = [*NAMES[:-4], "NKX2-1", "HLA-A", "MIR1-2", "AC1.1"]
    assert "names_made_unique" not in right(h5ad(tmp_path / "c.h5ad", var=pd.DataFrame(index=like)), like)
