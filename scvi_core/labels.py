"""Cell types as data: which labels there are, how a taxonomy orders them, and which leaves each cell's label allows.

A taxonomy is a directed acyclic graph: a child may have several parents. All it does here is to give every node the
*set* of leaves that can be reached from it; the probability of a node is the sum over that set, so a parent is never
less probable than its child, and in a graph nothing is counted twice.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scvi_core.config import AnnotateConfig
from scvi_core.files import UserError, canonical_json, sha256_text
from scvi_core.log import log

MOST_LEAVES = 1000  # a column of more values holds no cell types
NO_VALUE = ("nan", "none", "na", "n/a", "<na>", "null")  # what no value becomes where it is made text
ANY = -1  # the code of a cell without a label: any leaf

Edges = Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Taxonomy:
    """Nodes, and which leaves lie under each.

    Attributes
    ----------
    names : (nodes,) the leaves, sorted; then inner nodes, those of fewer leaves first.
    edges : (child, parent) pairs among `names`, sorted.
    n_leaves : how many of `names` are leaves.
    """

    names: tuple[str, ...]
    edges: tuple[tuple[str, str], ...]
    n_leaves: int

    @staticmethod
    def of(labels: Iterable[str], edges: Edges = (), where: str = "label_tree") -> Taxonomy:
        """The part of a taxonomy that cells' labels speak of: these nodes and all their ancestors.

        A node below the labels that no cell has, at any depth, is left out: nothing could be learned of it. So a node
        whose children are all left out is a leaf. Without `edges` every label is one.

        Raises
        ------
        UserError
            For a cycle, and for labels that `edges` do not have.
        """
        labels = set(labels)
        pairs = sorted(dict.fromkeys(edges))
        if len(pairs) < len(edges):
            log.warning("%s: %d rows are there twice; each counts once", where, len(edges) - len(pairs))
        parents: dict[str, list[str]] = {name: [] for pair in pairs for name in pair}
        for child, parent in pairs:
            parents[child].append(parent)
        strangers = sorted(labels - set(parents)) if pairs else []
        if strangers:
            near = difflib.get_close_matches(strangers[0], parents, n=1, cutoff=0.8)
            hint = f"it has {near[0]!r}; " if near else ""
            raise UserError(
                f"{where}: {len(strangers)} labels of the cells are not in it (such as {strangers[0]!r}); {hint}"
                f"add a row with its parent for each, or call these cells unknown"
            )
        above = _ancestors(parents, where)
        kept = labels.union(*(above[label] for label in labels if label in above))
        pairs = [pair for pair in pairs if kept.issuperset(pair)]
        leaves = sorted(kept - {parent for _, parent in pairs})
        reach = {name: [leaf for leaf in leaves if name == leaf or name in above.get(leaf, ())] for name in kept}
        inner = sorted(kept - set(leaves), key=lambda name: (len(reach[name]), -len(above[name]), name))
        roots = [name for name in inner if not parents[name]]
        if len(roots) > 1:
            log.info("%s: %d roots (%s): no node stands for all cells", where, len(roots), ", ".join(sorted(roots)))
        unused = len(parents) - len(kept)
        if pairs and unused > 0:
            log.info("%s: %d nodes have no labelled cell under them or at them: left out", where, unused)
        return Taxonomy((*leaves, *inner), tuple(pairs), len(leaves))

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the leaves, sorted: the columns of every (cells, leaves) array."""
        return self.names[: self.n_leaves]

    @property
    def parents(self) -> dict[str, list[str]]:
        """Each node's parents, sorted."""
        return {name: [p for child, p in self.edges if child == name] for name in self.names}

    @functools.cached_property
    def reach_vy(self) -> np.ndarray:
        """(nodes, leaves) bool: whether a leaf lies under a node, or is it."""
        above = _ancestors(self.parents, "taxonomy")
        return np.array([[v == y or v in above[y] for y in self.leaves] for v in self.names], dtype=bool)

    def codes(self, labels: Sequence[str | None]) -> np.ndarray:
        """(cells,) int64 positions of the cells' labels in `names`; :data:`ANY` for None."""
        place = {name: i for i, name in enumerate(self.names)} | {None: ANY}
        return np.fromiter((place[label] for label in labels), dtype=np.int64, count=len(labels))

    def node_probabilities(self, p_ny: np.ndarray) -> np.ndarray:
        """(cells, nodes) of (cells, leaves): sums over the leaves under each; at most 1, where rounding says more."""
        return np.minimum(p_ny @ self.reach_vy.T.astype(p_ny.dtype), 1)

    def covering(self, set_ny: np.ndarray) -> np.ndarray:
        """(cells,) position of the smallest node above all leaves of a set; :data:`ANY` where there is none.

        Parameters
        ----------
        set_ny : (cells, leaves) bool, a set of leaves each.

        Notes
        -----
        The smallest is the one of the fewest leaves, and of several, the first in `names`: the deepest.
        """
        outside_nv = (set_ny.astype(np.float32) @ (~self.reach_vy).T.astype(np.float32)) > 0
        first_n = (~outside_nv).argmax(1)
        return np.where(outside_nv.all(1), ANY, first_n)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"names": list(self.names), "edges": [list(pair) for pair in self.edges], "n_leaves": self.n_leaves}

    @staticmethod
    def from_dict(value: dict[str, Any]) -> Taxonomy:
        """Rebuild it from :meth:`to_dict`."""
        edges = tuple((str(child), str(parent)) for child, parent in value["edges"])
        return Taxonomy(tuple(map(str, value["names"])), edges, int(value["n_leaves"]))


def _ancestors(parents: dict[str, list[str]], where: str) -> dict[str, frozenset[str]]:
    """All nodes above each, without recursion, as a taxonomy may be deep."""
    above: dict[str, frozenset[str]] = {}
    for start in parents:
        stack, path = [(start, iter(parents[start]))], [start]
        while stack and start not in above:
            name, rest = stack[-1]
            parent = next((p for p in rest if p not in above), None)
            if parent is None:
                above[name] = frozenset(parents[name]).union(*(above[p] for p in parents[name]))
                stack.pop()
                path.pop()
            elif parent in path:
                circle = " -> ".join((*path[path.index(parent) :], parent))
                raise UserError(f"{where}: {parent!r} is its own ancestor ({circle}); take one of these rows out")
            else:
                stack.append((parent, iter(parents[parent])))
                path.append(parent)
    return above


def read_tree(path: str | Path) -> list[tuple[str, str]]:
    """(child, parent) pairs of a file: two tab-separated columns, or the ``is_a`` part of an ontology in OBO format.

    Of a table, a header ``child``, ``parent`` and lines that begin with # are left out, and a row without a parent
    names a root. In OBO format nodes go by name.

    Raises
    ------
    UserError
        When the file is missing, is no UTF-8 text, or a row has not two columns.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else type(error).__name__
        raise UserError(f"label_tree: {path}: {reason}; give a table of two columns, child and parent") from None
    if path.suffix.lower() == ".obo":
        return _obo(text)
    pairs = []
    for number, row in enumerate(csv.reader(_lines(text), delimiter="\t", quoting=csv.QUOTE_NONE), 1):
        if (
            not row
            or row[0].startswith("#")
            or (number == 1 and [c.strip().lower() for c in row] == ["child", "parent"])
        ):
            continue
        if len(row) > 2 or not row[0].strip() or (len(row) == 1 and "," in row[0]):
            raise UserError(
                f"label_tree: {path}, line {number}: {len(row)} columns; give two, separated by a tab: child and parent"
            )
        if len(row) == 2 and row[1]:
            pairs.append((row[0], row[1]))
    if not pairs:
        raise UserError(f"label_tree: {path}: no row with a child and its parent")
    return pairs


def _lines(text: str) -> list[str]:
    """Lines as files have them: a name may hold what `str.splitlines` takes for an end, such as U+2028."""
    return re.split(r"\r\n|\r|\n", text)


def edges_of(tree: str | Path | Edges | None) -> list[tuple[str, str]]:
    """(child, parent) pairs of a file (:func:`read_tree`), or those given.

    Raises
    ------
    UserError
        For what is neither, and as :func:`read_tree`.
    """
    if isinstance(tree, str | Path):
        return read_tree(tree)
    pairs = [] if tree is None else tree
    if isinstance(pairs, list | tuple | set | frozenset):
        odd = next((p for p in pairs if not (isinstance(p, tuple | list) and [*map(type, p)] == [str, str])), None)
        if odd is None:
            return [(child, parent) for child, parent in pairs]
        told = f"{odd!r} is no pair of names"
    else:
        told = f"a {type(tree).__name__}"
    raise UserError(f"label_tree: {told}; give a file, or a list of (child, parent) pairs of text; a root has no row")


def _obo(text: str) -> list[tuple[str, str]]:
    names, above = {}, []
    for stanza in text.split("\n["):
        if not stanza.startswith("Term]"):
            continue
        told: dict[str, list[str]] = {}
        for line in _lines(stanza)[1:]:
            key, _, value = line.partition(": ")
            told.setdefault(key, []).append(value.split(" ! ")[0].split(" {")[0].strip())
        if "id" in told and "true" not in told.get("is_obsolete", ()):
            names[told["id"][0]] = told.get("name", told["id"])[0]
            above += [(told["id"][0], parent) for parent in told.get("is_a", ())]
    return [(names[child], names[parent]) for child, parent in above if child in names and parent in names]


def given_labels(column: pd.Series, unknown: str | None, where: str) -> list[str | None]:
    """What a cell column says, word for word: the label of every cell, None for `unknown` and for no value.

    Raises
    ------
    UserError
        For a column that labels no cell, one label only, or more than :data:`MOST_LEAVES`.
    """
    missing = column.isna().to_numpy()
    text = column.astype(str).to_numpy()
    labels = [None if gone or label == unknown else str(label) for gone, label in zip(missing, text, strict=True)]
    if missing.any():
        log.info("%s: %d cells have no value: they count as unlabelled", where, int(missing.sum()))
    levels = sorted({label for label in labels if label is not None})
    if not levels:
        told = "no cell has a value" if unknown is None else f"every cell is {unknown!r} or has no value"
        raise UserError(f"{where}: {told}; label some cells of two types or more")
    if len(levels) == 1:
        raise UserError(f"{where}: one label only ({levels[0]!r}); cells of two labels or more are needed")
    if len(levels) > MOST_LEAVES:
        raise UserError(
            f"{where}: {len(levels)} labels, more than {MOST_LEAVES} (such as {levels[0]!r}); does it hold cell types?"
        )
    for label in levels:
        if not label.strip():
            log.warning("%s: a label that is white space only (%r), taken as a label; is it %r?", where, label, unknown)
        elif label.strip().casefold() in NO_VALUE:
            log.warning("%s: %r is taken as a label; if it means no value, leave it out", where, label)
    twins: dict[str, str] = {}
    for label in levels:
        other = twins.setdefault(" ".join(label.split()).casefold(), label)
        if other != label:
            log.warning("%s: %r and %r differ in case or spaces only; they count as two labels", where, other, label)
    return labels


def say_batches(labels: Sequence[str | None], batch: Sequence[str], where: str) -> None:
    """Say which batches have no labelled cell, or are the only ones that have unlabelled cells."""
    known = pd.Series([label is not None for label in labels]).groupby(np.asarray(batch)).mean()
    bare, whole = list(known.index[known == 0]), list(known.index[known == 1])
    if bare:
        log.info("%s: no cell is labelled in %s", where, ", ".join(map(str, bare)))
    elif len(known) > 1 and len(whole) == len(known) - 1:
        log.info("%s: unlabelled cells are in %s alone", where, known.index[known < 1][0])


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of the cells that a model is fitted to.

    Attributes
    ----------
    node_n : (cells,) node of each, :data:`ANY` without a label.
    digest : of labels, taxonomy and configuration: part of the model's fingerprint.
    """

    taxonomy: Taxonomy
    config: AnnotateConfig
    node_n: np.ndarray
    digest: str

    @staticmethod
    def of(obs: pd.DataFrame, config: AnnotateConfig, edges: Edges, batch: Sequence[str] | None = None) -> Known:
        """Read the column `config` names, by the taxonomy that `edges` give.

        Raises
        ------
        UserError
            As :func:`given_labels` and :meth:`Taxonomy.of`; and when there is no such column.
        """
        if config.label not in obs:
            near = difflib.get_close_matches(str(config.label), map(str, obs.columns), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"columns: {', '.join(map(str, obs.columns)) or 'none'}"
            raise UserError(f"label_key: no cell column {config.label!r}; {hint}")
        where = f"label_key '{config.label}'"
        labels = given_labels(obs[config.label], config.unknown, where)
        if batch is not None:
            say_batches(labels, np.asarray(batch).astype(str), where)
        taxonomy = Taxonomy.of({label for label in labels if label is not None}, edges)
        node_n = taxonomy.codes(labels)
        how = config.model_dump(exclude_defaults=True, exclude={"label", "unknown", "tree"})
        codes = hashlib.sha256(node_n.astype("<i8").tobytes()).hexdigest()
        digest = sha256_text(canonical_json([taxonomy.to_dict(), codes, how]))
        return Known(taxonomy, config, node_n, digest)
