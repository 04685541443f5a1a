"""The page's section on cell types: what was found, how far to trust it, and labels that the model doubts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scvi_core.config import Config
from scvi_core.files import read_parquet
from scvi_core.labels import Taxonomy

N_DOUBTED = 25  # suspected mislabels in the page's table
N_CONFUSED = 15  # pairs of labels
N_ROWS = 2000  # of the table of labels


def read_celltypes(folder: Path, cells: pd.DataFrame, model: dict[str, Any], config: Config) -> dict[str, Any] | None:
    """What the section is made of; None where `annotate.label` is not set.

    Returns
    -------
    quality : of ``model.json``; labels : ``labels.parquet``, with ``n_found`` cells and the ``depth`` at which a
    node is shown, as rows in the order of the taxonomy; confused : pairs of a given and another found label, most
    cells first; calls : ``annotation.parquet``; doubted : cells whose label as given is improbable, the least
    probable first, and n_doubted of them in all.
    """
    if config.annotate.label is None:
        return None
    calls = read_parquet(folder / "annotation.parquet", "annotate")
    about, table = model["annotation"], read_parquet(folder / "labels.parquet", "annotate")
    taxonomy, quality = Taxonomy.from_dict(about["taxonomy"]), about["quality"]
    n_found = calls["label"].value_counts()
    leaf_p = read_parquet(folder / "label_probabilities.parquet", "annotate").iloc[:, 1:].to_numpy(float)
    found_y = np.array([n_found.get(name, 0) for name in taxonomy.leaves])
    table["n_found"] = taxonomy.reach_vy @ found_y
    shown, rows = table.set_index("label"), []
    children = {name: [child for child, parent in taxonomy.edges if parent == name] for name in taxonomy.names}

    parents = taxonomy.parents
    stack = [(name, 0) for name in reversed(taxonomy.names) if not parents[name]]
    while stack and len(rows) < N_ROWS:  # of a node with several parents a row under each
        name, depth = stack.pop()
        rows.append({"label": name, "depth": min(depth, 12), **shown.loc[name].to_dict()})
        stack += [(child, depth + 1) for child in reversed(children[name])]
    confusion_yy = np.array(quality["confusion_yy"])
    confused = [
        {"given": taxonomy.leaves[i], "found": taxonomy.leaves[j], "n": int(confusion_yy[i, j]),
         "share": confusion_yy[i, j] / confusion_yy[i].sum()}
        for i, j in np.argwhere(confusion_yy > 0) if i != j
    ]  # fmt: skip
    given, place = cells[config.annotate.label].astype(str), {name: v for v, name in enumerate(taxonomy.names)}
    node_n = given.map(place)
    labelled = np.flatnonzero(node_n.notna() & cells[config.annotate.label].notna())
    node_p = taxonomy.node_probabilities(leaf_p)
    p_given = node_p[labelled, node_n.to_numpy()[labelled].astype(int)]
    doubted = pd.DataFrame(
        {
            "cell_id": cells["cell_id"].to_numpy()[labelled],
            "batch": cells["batch"].astype(str).to_numpy()[labelled],
            "given": given.to_numpy()[labelled],
            "p_given": p_given,
            "found": calls["label"].to_numpy()[labelled],
            "p_found": calls["probability"].to_numpy()[labelled],
            "novelty": calls["novelty"].to_numpy()[labelled],
        }
    ).sort_values("p_given", kind="stable")
    doubted = doubted[doubted["p_given"] < 0.1]
    return {
        "quality": quality,
        "labels": rows,
        "confused": sorted(confused, key=lambda row: (-row["n"], row["given"], row["found"]))[:N_CONFUSED],
        "calls": calls,
        "n_novel": int(calls["is_novel"].sum()),
        "n_safe": int(calls["safe_label"].notna().sum()),
        "n_given": len(labelled),
        "n_doubted": len(doubted),
        "doubted": doubted.head(N_DOUBTED).to_dict("records"),
    }
