"""What the steps of a build share: the plan of a fit, the tables they write, the record of a training run."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from scvi_core import api, kernels, parallel, posterior, registry, tables
from scvi_core.config import Config, ModelConfig
from scvi_core.counts import Counts, Schema, pack
from scvi_core.criticism import choose_cells, criticise
from scvi_core.de import differential_expression
from scvi_core.device import resolve_device, use_threads
from scvi_core.files import (
    Decisions,
    UserError,
    alone,
    canonical_json,
    parquet_writer,
    read_json,
    read_parquet,
    replacing,
    sha256_text,
    write_json,
    write_parquet,
)
from scvi_core.fingerprint import fingerprint
from scvi_core.labels import Known, read_tree
from scvi_core.log import log, redacted
from scvi_core.preprocess.store import read_store
from scvi_core.stream import open_counts
from scvi_core.train import Interrupted, hold_out

if TYPE_CHECKING:
    from anndata import AnnData

OBSERVED = "the count total determines a cell's size to within a few per cent; a latent l adds an encoder, not fit"
LATENT = "as in the paper: log-normal prior by batch; the posterior of l is inferred"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A fit before it is made.

    Attributes
    ----------
    cells : the store's cells and genes, without counts.
    schema, gene_names, model : what is fitted, and how its columns are coded.
    data : digests of samples and used columns.
    about : entries of the model card: samples, organism, data_sha256.
    fingerprint : of the weights that will come of it.
    known : the cells' types, where `annotate.label` names them.
    """

    cells: AnnData
    schema: Schema
    gene_names: list[str]
    model: ModelConfig
    data: dict[str, Any]
    about: dict[str, Any]
    fingerprint: str
    known: Known | None


def plan(store: Path, settings: Config) -> Plan:
    """What a fit of this store by this configuration is made of."""
    adata = read_store(store, counts=False)
    model = ModelConfig(**{key: getattr(settings.model, key) for key in ModelConfig.model_fields})
    schema = Schema.of(adata, "batch", model.categorical_covariates, model.continuous_covariates)
    api.check_design(model, schema)
    samples = json.loads(adata.uns["samples"])
    used = ["batch", *model.categorical_covariates, *model.continuous_covariates]
    columns = {name: sha256_text("\n".join(adata.obs[name].astype(str))) for name in used}
    data = {"samples": samples, "columns": columns}
    about = {
        "samples": {name: entry["n_cells"] for name, entry in samples.items()},
        "organism": str(adata.uns["organism"]),
        "data_sha256": sha256_text(canonical_json(data)),
    }
    names = [str(name) for name in adata.var["gene_name"]]
    known = None
    if settings.annotate.label is not None:
        edges = read_tree(settings.annotate.tree) if settings.annotate.tree else ()
        known = Known.of(adata.obs, settings.annotate, edges, adata.obs["batch"].astype(str))
        data["labels"] = known.digest
    digest = fingerprint(schema, data, model, settings.train, settings.seed)
    return Plan(adata, schema, names, model, data, about, digest, known)


def lookup(store: Path, settings: Config, out: Path) -> Decisions:
    """Look in the registry for a model of the same fingerprint; write what was found, and the model, into a folder.

    Raises
    ------
    UserError
        When `model.reuse` is `require` and there is none that can be had.
    """
    reuse, wanted = settings.model.reuse, plan(store, settings).fingerprint
    found = None if reuse == "never" else registry.find(settings.tracking_uri, wanted)
    if found is None and reuse == "require":
        raise UserError(
            f"model.reuse: 'require', but {redacted(settings.tracking_uri)} has no model of fingerprint "
            f"{wanted[:12]}...; set model.reuse: exact to train one"
        )
    made = Decisions("lookup")
    with replacing(out, "LOOKUP") as folder:
        folder.mkdir()
        gone = None
        if found is not None:
            try:
                registry.fetch(settings.tracking_uri, found, folder / "model")
            except registry.Gone as error:
                if reuse == "require":
                    raise UserError(f"model.reuse: 'require', but the model cannot be had: {error}") from error
                found, gone = None, error
        if found is not None:
            why = "a registered model has the same fingerprint, so it is taken instead of training"
        elif reuse == "never":
            why = "model.reuse: never, so the registry was not asked"
        elif gone is not None:
            why = f"a registered model has this fingerprint, but cannot be had, so one is trained: {gone}"
        else:
            why = "no registered model has this fingerprint, so one is trained"
        made.add("model", "registered model" if found else "to be trained", why, warn=gone is not None)
        about = {"name": found.name, "version": str(found.version), "run_id": found.run_id} if found else None
        write_json(folder / "lookup.json", {"fingerprint": wanted, "found": about, "reuse": reuse}, checksum=True)
    return made


def train(
    store: Path,
    settings: Config,
    out: Path,
    found: Path | None = None,
    run: Path | None = None,
    checkpoints: Path | None = None,
    devices: int = 1,
    decisions: Path | None = None,
) -> int:
    """Fit the model, or take the registered one that :func:`lookup` found; write its folder.

    Parameters
    ----------
    found : folder that :func:`lookup` wrote.
    run, decisions : where to write the record of this run and the choices made.
    checkpoints : folder that keeps the state of an unfinished fit; the same call goes on.
    devices : processes that share each minibatch.

    Returns
    -------
    int
        Exit code: 0, or :data:`scvi_core.parallel.RUN_AGAIN` after SIGTERM, SIGUSR1 or Ctrl-C (a checkpoint was
        written), or :data:`scvi_core.parallel.LOST`, or that of the processes it has started.
    """
    planned = plan(store, settings)
    checkpoint = None if checkpoints is None else checkpoints / f"{planned.fingerprint}.safetensors"
    looked = {"found": None} if found is None else read_json(found / "lookup.json", "lookup")
    with contextlib.ExitStack() as held:
        if checkpoint is not None and not parallel.started():
            waited = held.enter_context(alone(checkpoint.with_suffix(".lock")))
            written = [out / name for name in api.BUNDLE] + [path for path in (run, decisions) if path is not None]
            kept = waited or (looked.get("reuse", "never") != "never" and not looked["found"])
            done = not checkpoint.exists() and all(path.exists() for path in written)
            if kept and done and is_model_of(out, planned.fingerprint):  # by a job whose Snakemake was killed
                log.info("train: %s has this fingerprint already, and is kept", out)
                for path in written:
                    path.touch()
                return 0
        if devices > 1 and not parallel.started():
            return parallel.launch(devices, sys.argv[1:])
        use_threads(max(1, settings.threads // devices))
        made, began = Decisions("train"), time.time()
        if looked["found"]:
            if looked["fingerprint"] != planned.fingerprint:
                raise UserError(
                    f"{found}: was looked up for another store or configuration; run `scvi-core lookup` again"
                )
            model, code = api.load(found / "model"), 0
            made.add("training", "skipped", f"the registered model has the fingerprint {planned.fingerprint[:12]}")
        else:
            model, code = _fit(planned, store, settings, checkpoint, made)
        if model is None or not parallel.first():
            return code
        model.save(out)
        if run is not None:
            write_run(run, began, model, reused=bool(looked["found"]))
        made.write(decisions)
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
            if others := len(list(checkpoint.parent.glob("*.safetensors"))):
                log.info("train: %s keeps %d unfinished trainings of other configurations", checkpoint.parent, others)
    return 0


def _fit(
    planned: Plan, store: Path, settings: Config, checkpoint: Path | None, made: Decisions
) -> tuple[api.Model | None, int]:
    """The fitted model, or None and the exit code where it was stopped."""
    observed = settings.model.library == "observed"
    made.add("library", settings.model.library, OBSERVED if observed else LATENT)
    stopping: list[str] = []  # names of the signals that came
    signals = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
    for number in signals:
        signal.signal(number, lambda got, _: stopping.append(signal.Signals(got).name))
    device = resolve_device(settings.device)
    if parallel.started():
        device = parallel.join(device)
    if checkpoint is not None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    try:
        model = api.fit_counts(
            open_counts(store, planned.cells, planned.schema, settings.train.memory_gb),
            planned.schema,
            planned.gene_names,
            planned.data,
            planned.model,
            settings.train,
            None,
            settings.seed,
            device,
            checkpoint=checkpoint,
            stop=lambda: bool(stopping) or parallel.abandoned(),
            about=planned.about,
            known=planned.known,
        )
    except Interrupted:
        log.warning("train: stopped by signal; %s", f"{checkpoint} is kept" if checkpoint else "nothing is kept")
        return None, parallel.RUN_AGAIN
    except parallel.LostError as error:
        log.warning("train: lost contact with another process (%s)", error)
        return None, parallel.LOST
    finally:
        parallel.leave()
    if parallel.first():  # a signal that comes now would make a success look like a failure, whose outputs Snakemake
        for number in signals:  # deletes: what is left is to write them
            signal.signal(number, signal.SIG_IGN)
    numbers = model.card["metrics"]
    made.add("device", model.card["device"], f"asked for: {settings.device}")
    reason = {"compiled": "built when scvi-core was installed", "triton": "compiled for this GPU as training began"}
    which, why_plain = kernels.kind(model.network.rho.weight)
    made.add("kernels", model.card["kernels"], reason.get(which, why_plain))
    made.add("precision", model.card["precision"], f"asked for: {settings.train.precision}")
    made.add("epochs", numbers["epochs"], f"the weights of epoch {numbers['kept_epoch']} are kept")
    return model, 0


def is_model_of(folder: Path, fingerprint: str) -> bool:
    """Whether a folder holds a whole model of this fingerprint."""
    try:
        return api.load(folder, "cpu").fingerprint == fingerprint
    except (UserError, OSError):
        return False


def embed(store: Path, model: Path, settings: Config, out: Path, uncertainty: Path | None = None) -> None:
    """Write latent.parquet and, where asked for, each cell's posterior standard deviations."""
    use_threads(settings.threads)
    fitted = api.load(model, settings.device)
    cell_ids, counts = open_store(store, fitted, settings.train.memory_gb, design=False)
    write_parquet(out, tables.latent_table(cell_ids, posterior.latent(fitted.network, counts)))
    if uncertainty is not None:
        std_nk = posterior.latent_std(fitted.network, counts)
        write_parquet(uncertainty, tables.uncertainty_table(cell_ids, posterior.uncertainty(std_nk), std_nk))


def expression(
    store: Path,
    model: Path,
    settings: Config,
    out: Path,
    genes: Sequence[str] | None,
    batches: Sequence[str] | None,
    library_size: float | None,
    samples: int,
) -> None:
    """Write denoised expression: posterior means of rho x library size.

    Parameters
    ----------
    genes : ids or names; None: all.
    batches : as if measured in these, and the mean over them; None: each cell's own.
    library_size : counts to scale each cell to; None: its own.
    samples : of the posterior, a cell.

    Raises
    ------
    UserError
        When a gene or batch is unknown, or a gene is asked for twice.
    """
    use_threads(settings.threads)
    fitted = api.load(model, settings.device)
    places = fitted.places(fitted.gene_ids if genes is None else genes)
    codes = fitted.batch_codes(batches)
    ids = [fitted.gene_ids[i] for i in places]
    if len(set(ids)) < len(ids):
        twice = next(gene for gene in ids if ids.count(gene) > 1)
        raise UserError(f"--genes: {twice!r} is asked for twice, perhaps by its id and its name; name it once")
    cell_ids, counts = open_store(store, fitted, settings.train.memory_gb, new_batches=codes is not None)
    made = posterior.expression_blocks(fitted.network, counts, places, library_size, codes, samples, settings.seed)
    write_expression(out, cell_ids, ids, made)


def de(store: Path, model: Path, cells: Path, settings: Config, out: Path) -> Decisions:
    """Test the groups of `de.groupby` against each other or the rest; write de.parquet.

    Raises
    ------
    UserError
        When the table of cells lacks that column, or is of another store.
    """
    use_threads(settings.threads)
    table, groupby = read_cells(cells, settings)
    fitted = api.load(model, settings.device)
    cell_ids, counts = open_store(store, fitted, settings.train.memory_gb, new_batches=True)
    if list(table["cell_id"]) != list(cell_ids):
        raise UserError(f"{cells}: its cells are not those of {store}; run `scvi-core cells` again")
    made = Decisions("de")
    names = fitted.gene_ids, fitted.gene_names
    frame = differential_expression(fitted.network, counts, table[groupby], *names, settings.de, settings.seed, made)
    against = "the rest" if settings.de.reference == "rest" else "each other"
    n_groups = len({*frame["group"], *(frame["reference"] if settings.de.reference == "pairs" else ())})
    made.add("groups compared", n_groups, f"groups of '{groupby}' against {against}")
    called = f"at most {settings.de.fdr:g} of the calls are expected to be false"
    made.add(
        "genes called", int(frame["is_de"].sum()), f"genes, summed over groups ({settings.de.mode} mode); {called}"
    )
    write_parquet(out, frame)
    return made


def annotate(store: Path, model: Path, settings: Config, out: Path, probabilities: Path, labels: Path) -> Decisions:
    """Annotate the store's cells by a model that was fitted with labels; write its three tables.

    Raises
    ------
    UserError
        When the model was fitted without labels.
    """
    use_threads(settings.threads)
    fitted = api.load(model, settings.device)
    if fitted.annotator is None:
        raise UserError(f"{model}: fitted without labels; set annotate.label and run `scvi-core train` again")
    cell_ids, counts = open_store(store, fitted, settings.train.memory_gb, design=False)
    batch_n = read_store(store, counts=False).obs["batch"].astype(str).to_numpy()
    p_ny, novelty_n = fitted.annotator.probabilities(posterior.latent(fitted.network, counts), counts, batch_n)
    calls = fitted.annotator.calls(p_ny, novelty_n, cell_ids)
    made, ids = Decisions("annotate"), [str(c) for c in cell_ids]
    config, covered = fitted.annotator.config, int(calls["safe_label"].notna().sum())
    why = f"of {len(calls)} cells; sets of labels hold the true one in {config.coverage:g} of cells"
    made.add("safe labels", covered, why)
    why = f"at a threshold that {config.max_false_novel:g} of cells of known types pass"
    made.add("novel", int(calls["is_novel"].sum()), why)
    calls.insert(0, "cell_id", ids)
    frame = fitted.annotator.node_probabilities(p_ny, "leaf", cell_ids).astype(np.float32)
    frame.insert(0, "cell_id", ids, allow_duplicates=True)
    write_parquet(labels, fitted.annotator.table())
    write_parquet(probabilities, frame.reset_index(drop=True))
    write_parquet(out, calls.reset_index(drop=True))
    return made


def criticism(store: Path, model: Path, cells: Path, settings: Config, out: Path) -> Decisions:
    """Hold counts that the model makes against those measured; write the folder of checks and their tables.

    Raises
    ------
    UserError
        When the store's genes are not the model's, or the table of cells lacks the column `de.groupby`.
    """
    use_threads(settings.threads)
    fitted = api.load(model, settings.device)
    adata = read_store(store, counts=False)
    if list(adata.var_names) != fitted.gene_ids:
        raise UserError(f"{model}: its genes are not those of {store}; give the store that it was trained on")
    table, groupby = read_cells(cells, settings)
    group = table.set_index("cell_id")[groupby].reindex(adata.obs_names)
    made = Decisions("criticism")
    trained_here = fitted.card["n_cells"] == adata.n_obs
    held = hold_out(fitted.train, adata.n_obs if trained_here else 0, fitted.seed)
    rows = choose_cells(adata.n_obs, held, settings.criticism, settings.seed, made)
    counts = open_counts(store, adata, fitted.schema, settings.train.memory_gb).subset(rows)
    found = criticise(
        fitted.network,
        counts.to(next(fitted.network.parameters()).device),
        adata.obs_names[rows],
        fitted.gene_ids,
        fitted.gene_names,
        group.astype(object).where(group.notna(), None).iloc[rows].map(str, na_action="ignore").to_numpy(),
        settings.criticism,
        settings.seed,
        made,
    )
    found.save(out)
    return made


def read_cells(path: Path, settings: Config) -> tuple[pd.DataFrame, str]:
    """The table of cells, and the name of its column that `de.groupby` asks for."""
    table, groupby = read_parquet(path, "cells"), settings.de.groupby
    if groupby not in table:
        raise UserError(f"de.groupby: no column '{groupby}' in {path} (columns: {', '.join(table.columns)})")
    return table, groupby


def write_expression(
    path: Path, cell_ids: Sequence[str], gene_ids: Sequence[str], blocks: Iterable[tuple[slice, np.ndarray]]
) -> None:
    """expression.parquet: ``cell_id``, then a float32 column a gene; row groups of about 10^6 values, one in memory.

    Parameters
    ----------
    blocks : (place of the cells, (cells, genes) float32), from first to last cell.
    """
    import pyarrow as pa

    schema = pa.schema([("cell_id", pa.string()), *((gene, pa.float32()) for gene in gene_ids)])
    least = max(1, 10**6 // len(gene_ids))
    with parquet_writer(path, schema) as writer:
        start, held = 0, []
        for at, values_ng in blocks:
            held.append(values_ng)
            if at.stop - start >= least or at.stop == len(cell_ids):
                values_gn = np.ascontiguousarray(np.concatenate(held).T)
                ids = [str(c) for c in cell_ids[start : at.stop]]
                writer.write_table(pa.table([pa.array(ids, pa.string()), *map(pa.array, values_gn)], schema=schema))
                start, held = at.stop, []


def open_store(
    path: Path, model: api.Model, memory_gb: float, design: bool = True, new_batches: bool = False
) -> tuple[pd.Index, Counts]:
    """Ids of a store's cells, and their counts for a fitted model, streamed where they are larger than `memory_gb`.

    Parameters
    ----------
    design : False leaves batch and covariates out, where the encoder does not see them, as
        :func:`scvi_core.counts.pack` does.
    new_batches : whether cells are decoded under other batches than their own, which then need not be the model's.
    """
    new_batches = new_batches and not model.model.encode_covariates
    adata, schema, device = read_store(path, counts=False), model.schema, next(model.network.parameters()).device
    if tuple(map(str, adata.var_names)) != schema.gene_ids:
        log.warning("%s: its genes are not the model's, in its order; so its counts are read whole", path)
        seen = design or model.model.encode_covariates
        return adata.obs_names, pack(read_store(path), schema, None, seen, new_batches).to(device)
    if not (design or model.model.encode_covariates):
        schema = dataclasses.replace(schema, batch_key=None, batches=("all",), categorical={}, continuous={})
    return adata.obs_names, open_counts(path, adata, schema, memory_gb, new_batches).to(device)


def write_run(path: Path, began: float, model: api.Model, reused: bool) -> None:
    """Record what differs between two runs of one training, for MLflow; the results hold none of it.

    Parameters
    ----------
    path : the JSON file. began : when, in seconds since 1970. reused : whether training was skipped.
    """
    epochs = [] if reused else [round(float(s), 4) for s in model.history["seconds"]]
    n_train = model.card["metrics"]["n_train"]
    write_json(
        path,
        {
            "started": datetime.datetime.fromtimestamp(began, datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - began, 2),
            "seconds_per_epoch": epochs,
            "cells_per_second": round(n_train * len(epochs) / max(sum(epochs), 1e-9)) if epochs else None,
            "host": platform.node(),
            "device": model.card["device"],
            "threads": torch.get_num_threads(),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "git_revision": _git_revision(),
            "reused": reused,
        },
        checksum=True,
    )


def _git_revision() -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
