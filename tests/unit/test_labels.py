"""Taxonomies and labels: laws on random graphs, what files may hold, and one clear line for what cannot be."""

import logging

import numpy as np
import pandas as pd
import pytest

from scvi_core.config import AnnotateConfig
from scvi_core.files import UserError
from scvi_core.labels import ANY, Known, Taxonomy, edges_of, given_labels, read_tree

TREE = [("CD4", "T"), ("CD8", "T"), ("T", "lymphoid"), ("B", "lymphoid"), ("lymphoid", "cell"), ("mono", "cell")]


def random_graph(rng, n=30):
    """A DAG: every node but the first has one to three parents among those before it."""
    return [(f"n{i}", f"n{p}") for i in range(1, n) for p in set(rng.integers(0, i, rng.integers(1, 4)).tolist())]


@pytest.mark.parametrize("seed", range(10))
def test_laws_of_random_graphs(seed):
    """Reach is that of paths; the sum over leaves is 1; no child is more probable than its parent."""
    rng = np.random.default_rng(seed)
    edges = random_graph(rng)
    labels = {f"n{i}" for i in rng.choice(30, 12, replace=False)}
    taxonomy = Taxonomy.of(labels, edges)
    assert labels <= set(taxonomy.names) and set(taxonomy.leaves) <= labels
    step = np.array([[(a, b) in set(taxonomy.edges) for b in taxonomy.names] for a in taxonomy.names])
    paths = np.linalg.matrix_power((step | np.eye(len(step), dtype=bool)).astype(float), len(step)) > 0
    assert np.array_equal(taxonomy.reach_vy, paths[: taxonomy.n_leaves].T)
    p_ny = rng.dirichlet(np.ones(taxonomy.n_leaves) * 0.3, 50)
    node_nv = p_ny @ taxonomy.reach_vy.T
    place = {name: v for v, name in enumerate(taxonomy.names)}
    for child, parent in taxonomy.edges:
        assert (node_nv[:, place[parent]] >= node_nv[:, place[child]] - 1e-12).all()
    sets = rng.random((50, taxonomy.n_leaves)) < 0.2
    for members, v in zip(sets, taxonomy.covering(sets), strict=True):
        above = [u for u in range(len(taxonomy.names)) if (taxonomy.reach_vy[u] | ~members).all()]
        size = taxonomy.reach_vy.sum(1)
        assert (v == ANY and not above) or size[v] == min(size[above])


def test_leaves_are_the_deepest_labels():
    """A node that no cell names, with nothing under it, is no leaf: nothing could be learned of it."""
    taxonomy = Taxonomy.of({"T", "B", "mono"}, TREE)
    assert taxonomy.leaves == ("B", "T", "mono") and taxonomy.names[3:] == ("lymphoid", "cell")
    taxonomy = Taxonomy.of({"T", "CD4", "mono"}, TREE)
    assert taxonomy.leaves == ("CD4", "mono")
    assert taxonomy.covering(np.array([[True, False], [True, True]])).tolist() == [0, taxonomy.names.index("cell")]
    assert Taxonomy.from_dict(taxonomy.to_dict()) == taxonomy
    flat = Taxonomy.of({"b", "a"})
    assert flat.names == ("a", "b") and flat.covering(np.ones((1, 2), dtype=bool)).tolist() == [ANY]


def test_a_deep_taxonomy():
    edges = [(f"n{i}", f"n{i + 1}") for i in range(3000)]
    assert len(Taxonomy.of({"n0"}, edges).names) == 3001


@pytest.mark.parametrize(
    ("labels", "edges", "match"),
    [
        ({"CD4"}, [*TREE, ("cell", "T")], r"own ancestor \(.* -> .*\)"),
        ({"CD4"}, [("CD4", "CD4")], "own ancestor"),
        ({"CD4", "plasma"}, TREE, r"'plasma'\); add a row"),
        ({"CD4", "cell "}, TREE, r"'cell '\); it has 'cell'; add a row"),
    ],
)
def test_what_is_no_taxonomy_of_the_labels(labels, edges, match):
    with pytest.raises(UserError, match=match):
        Taxonomy.of(labels, edges)


def test_rows_twice_and_two_roots_are_said(caplog):
    caplog.set_level(logging.INFO, "scvi_core")
    Taxonomy.of({"a", "b"}, [("a", "x"), ("a", "x"), ("b", "y")])
    assert "1 rows are there twice" in caplog.text and "2 roots (x, y)" in caplog.text


def test_files(tmp_path):
    path = tmp_path / "tree.tsv"
    path.write_text("child\tparent\n# a remark\nCD4 T\tT\nT\tcell\ncell\t\n\n")
    assert read_tree(path) == [("CD4 T", "T"), ("T", "cell")]
    path.write_text("a\u2028b\tx\x0by\r\nc\tx\x0by\n", newline="")
    assert read_tree(path) == edges_of(path) == [("a\u2028b", "x\x0by"), ("c", "x\x0by")]
    for text, match in (("a,b\n", "two, separated by a tab"), ("a\tb\tc\n", "line 1: 3 columns"), ("", "no row")):
        path.write_text(text)
        with pytest.raises(UserError, match=match):
            read_tree(path)
    with pytest.raises(UserError, match="no such file"):
        read_tree(tmp_path / "none.tsv")
    obo = tmp_path / "cl.obo"
    obo.write_text(
        "format-version: 1.2\n\n[Term]\nid: CL:1\nname: cell\n\n[Term]\nid: CL:2\nname: T cell\nis_a: CL:1 ! cell\n\n"
        "[Term]\nid: CL:3\nname: gone\nis_obsolete: true\nis_a: CL:1\n\n[Typedef]\nid: part_of\nis_a: CL:1\n"
    )
    assert read_tree(obo) == [("T cell", "cell")]


def test_a_node_is_as_probable_as_its_children_or_more_and_no_more_than_certain():
    names = [f"l{i}" for i in range(40)]
    edges = [(name, f"n{i % 7}") for i, name in enumerate(names)] + [(f"n{i}", "all") for i in range(7)]
    tree, p_ny = Taxonomy.of(names, edges), np.random.default_rng(0).dirichlet(np.full(40, 0.05), 2000)
    node_nv, at = tree.node_probabilities(p_ny), {name: i for i, name in enumerate(tree.names)}
    assert (p_ny.sum(1) > 1).any() and node_nv.max() == 1
    assert all((node_nv[:, at[parent]] >= node_nv[:, at[child]]).all() for child, parent in edges)


def test_pairs_by_hand():
    assert edges_of(None) == [] and edges_of([["a", "b"], ("c", "b")]) == [("a", "b"), ("c", "b")]
    for tree in ({"a": "b"}, pd.DataFrame([["a", "b"]]), ["ab"], [("a", "b", "c")], [("a", None)], [(1, 2)], 3):
        with pytest.raises(UserError, match=r"label_tree: .* give a file, or a list of"):
            edges_of(tree)


def test_labels_are_taken_word_for_word(caplog):
    labels = given_labels(pd.Series(["T", "t", " T", "unknown", None, "B "]), "unknown", "here")
    assert labels == ["T", "t", " T", None, None, "B "]
    assert "' T' and 't' differ in case" in caplog.text
    given_labels(pd.Series(["a", " "]), "unknown", "here")
    assert "white space only (' ')" in caplog.text
    assert given_labels(pd.Series(["a", "nan", "unknown"]), None, "here") == ["a", "nan", "unknown"]
    assert "'nan' is taken as a label" in caplog.text


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (["unknown", None], "every cell is 'unknown' or has no value"),
        (["T", "T", "unknown"], r"one label only \('T'\)"),
        ([f"cell{i}" for i in range(5000)], "5000 labels, more than 1000"),
    ],
)
def test_columns_that_label_nothing(values, match):
    with pytest.raises(UserError, match=match):
        given_labels(pd.Series(values), "unknown", "label_key 'x'")


def test_known_says_which_batches_are_bare_and_digests_what_decides(caplog):
    caplog.set_level(logging.INFO, "scvi_core")
    obs = pd.DataFrame({"kind": ["a", "b", "unknown", "unknown"], "batch": ["x", "x", "y", "y"]})
    known = Known.of(obs, AnnotateConfig(label="kind"), (), obs["batch"])
    assert known.node_n.tolist() == [0, 1, ANY, ANY] and "no cell is labelled in y" in caplog.text
    other = Known.of(obs, AnnotateConfig(label="kind", coverage=0.8), ())
    renamed = Known.of(obs.replace("b", "c"), AnnotateConfig(label="kind"), ())
    assert len({known.digest, other.digest, renamed.digest}) == 3
    with pytest.raises(UserError, match="no cell column 'kin'; did you mean 'kind'"):
        Known.of(obs, AnnotateConfig(label="kin"), ())
