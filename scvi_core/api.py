"""What a notebook calls: ``fit``, ``load``, and the fitted :class:`Model` with its questions."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import platform
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from scvi_core import celltypes, de, kernels, posterior, scanvi
from scvi_core import train as training
from scvi_core._version import __version__
from scvi_core.celltypes import Annotator
from scvi_core.config import AnnotateConfig, DeConfig, ModelConfig, TrainConfig
from scvi_core.counts import Counts, Schema, content_digest, pack
from scvi_core.device import resolve_device
from scvi_core.files import (
    UserError,
    alone,
    read_json,
    read_parquet,
    replacing,
    sha256_file,
    sha256_text,
    write_json,
    write_parquet,
)
from scvi_core.fingerprint import fingerprint
from scvi_core.labels import Known, edges_of
from scvi_core.log import log
from scvi_core.model import SCVI, build

if TYPE_CHECKING:
    from anndata import AnnData

FORMAT_VERSION = (
    5  # 5: labels; 4: checksums; 3: norms, and what the encoder sees; 2: the encoder's first layer as (genes, hidden)
)
ANNOTATION = "annotation."  # prefix of the annotator's tensors among the weights
BUNDLE = ("model.safetensors", "model.json", "history.parquet")


@dataclasses.dataclass
class Model:
    """A fitted model and all that is needed to use it on other cells.

    Attributes
    ----------
    network : the weights, in eval mode.
    schema : genes, batches and covariates in order.
    model, train : the configuration it was fitted with.
    seed : of the fit.
    history : a row an epoch: epoch, seconds (NaN once loaded), train_elbo, validation_elbo, kl_weight, learning_rate.
    gene_names : names to show for the schema's gene ids.
    card : what else ``model.json`` says: fingerprint, metrics, samples, organism, device, software; ``stopped``, the
        step and the steps there would have been, of a fit that Ctrl-C ended.
    layer : where `fit` found the counts, so that the questions look there too.
    annotator : cell types, of a model that was fitted with labels.
    """

    network: SCVI
    schema: Schema
    model: ModelConfig
    train: TrainConfig
    seed: int
    history: pd.DataFrame
    gene_names: list[str]
    card: dict[str, Any]
    layer: str | None = None
    annotator: Annotator | None = None

    def __repr__(self) -> str:
        cells, genes = self.card["n_cells"], len(self.gene_ids)
        part = ", stopped at step {step} of {steps}".format(**self.card["stopped"]) if "stopped" in self.card else ""
        told = f"{self.model.likelihood}, {cells} cells x {genes} genes{part}"
        return f"<scVI, {told}, fingerprint {self.fingerprint[:12]}>"

    @property
    def gene_ids(self) -> list[str]:
        """Identifiers of the model's genes, in order."""
        return list(self.schema.gene_ids)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decided the weights."""
        return self.card["fingerprint"]

    def _counts(
        self, adata: AnnData, design: bool = True, seed: Any = 0, n_samples: Any = 1, new_batches: bool = False
    ) -> Counts:
        """The cells packed; before anything long begins, a question's other arguments are looked at.

        `new_batches`: whether the question decodes cells under other batches than their own.
        """
        check_arguments(adata, seed, n_samples)
        layer = self.layer if self.layer in adata.layers else None
        if layer != self.layer:
            log.warning("adata has no layer '%s', where the model's counts were; taking X", self.layer)
        counts = pack(adata, self.schema, layer, design, new_batches and not self.model.encode_covariates)
        return counts.to(next(self.network.parameters()).device)

    def latent(self, adata: AnnData) -> np.ndarray:
        """Posterior means of z, (cells, latent) float32. Any batch will do, but for ``model.encode_covariates``."""
        return posterior.latent(self.network, self._counts(adata, self.model.encode_covariates))

    def latent_std(self, adata: AnnData) -> np.ndarray:
        """Posterior standard deviations of z, (cells, latent) float32; those of the prior are 1."""
        return posterior.latent_std(self.network, self._counts(adata, self.model.encode_covariates))

    def latent_library_size(self, adata: AnnData) -> np.ndarray:
        """Posterior means of the library size, (cells,) float64, in counts; the totals, where the model observes it."""
        return posterior.latent_library(self.network, self._counts(adata, self.model.encode_covariates))

    def elbo(self, adata: AnnData, n_samples: int = 10, seed: int = 0) -> np.ndarray:
        """(cells,) float64, nats: reconstruction - KL, KL weight 1, averaged over `n_samples` draws."""
        return posterior.elbo(self.network, self._counts(adata, True, seed, n_samples), n_samples, seed)

    def marginal_log_likelihood(self, adata: AnnData, n_samples: int = 1000, seed: int = 0) -> np.ndarray:
        """(cells,) float64, nats: log p(x) by importance sampling with the posterior as proposal."""
        return posterior.marginal_log_likelihood(
            self.network, self._counts(adata, True, seed, n_samples), n_samples, seed
        )

    def normalized_expression(
        self,
        adata: AnnData,
        genes: Sequence[str] | None = None,
        library_size: float | None = 1e4,
        transform_batch: str | Sequence[str] | None = None,
        n_samples: int = 10,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Posterior mean of rho × library size, a row a cell and a column a gene, float32.

        The frame is dense: for many cells ask for the genes you need, or use ``scvi-core expression``, which streams.

        Parameters
        ----------
        genes : ids or names wanted; None gives all.
        library_size : counts a cell is scaled to; None gives each cell its own.
        transform_batch : decode every cell under this batch, or under each of several and average, all weighing the
            same (``model.schema.batches`` for all); None means its own. With batches named, cells may be of batches
            that the model never met, as z does not depend on it (but for ``model.encode_covariates``).
        n_samples : posterior samples a cell.

        Raises
        ------
        UserError
            For genes or batches that the model does not know, and sizes or numbers that are not positive.
        """
        wanted = self.gene_ids if genes is None else [genes] if isinstance(genes, str) else list(genes)
        places, batches = self.places(wanted), self.batch_codes(transform_batch)
        counts = self._counts(adata, True, seed, n_samples, batches is not None)
        values = posterior.normalized_expression(self.network, counts, places, library_size, batches, n_samples, seed)
        return pd.DataFrame(values, index=adata.obs_names, columns=wanted)

    def expression_samples(
        self,
        adata: AnnData,
        genes: Sequence[str],
        library_size: float | None = 1e4,
        transform_batch: str | Sequence[str] | None = None,
        n_samples: int = 10,
        seed: int = 0,
    ) -> np.ndarray:
        """The samples whose mean is :meth:`normalized_expression`, (samples, cells, genes) float32."""
        places, batches = self.places(genes), self.batch_codes(transform_batch)
        counts = self._counts(adata, True, seed, n_samples, batches is not None)
        return posterior.expression_samples(self.network, counts, places, library_size, batches, n_samples, seed)

    def gene_correlation(
        self,
        adata: AnnData,
        genes: Sequence[str],
        transform_batch: str | Sequence[str] | None = None,
        n_samples: int = 10,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Denoised correlation between genes: Pearson's, of log rho, over posterior samples of the cells; float64.

        Parameters as :meth:`normalized_expression`; two cells or more.

        See Also
        --------
        scvi_core.posterior.gene_correlation : why log rho, why samples, and what batches do.
        """
        if adata.n_obs < 2:
            raise UserError(f"adata: {adata.n_obs} cells; a correlation needs two or more")
        places, batches = self.places(genes), self.batch_codes(transform_batch)
        counts = self._counts(adata, True, seed, n_samples, batches is not None)
        values = posterior.gene_correlation(self.network, counts, places, batches, n_samples, seed)
        names = [genes] if isinstance(genes, str) else list(genes)
        return pd.DataFrame(values, index=names, columns=names)

    def places(self, genes: Sequence[str]) -> np.ndarray:
        """Positions of genes among the model's, int64; by ids or names.

        Ids win over names, and the first of several genes of one name over the others.

        Raises
        ------
        UserError
            When the model has no such gene.
        """
        named = reversed([*enumerate(self.gene_ids), *enumerate(self.gene_names)])
        place = {gene: i for i, gene in named}
        wanted = [genes] if isinstance(genes, str) else list(genes)
        for gene in wanted:
            if gene not in place:
                raise UserError(f"genes: {gene!r} is not one of the model's {len(self.gene_ids)} genes")
        return np.array([place[gene] for gene in wanted], dtype=np.int64)

    def batch_codes(self, transform_batch: str | Sequence[str] | None) -> list[int] | None:
        """Positions of one or several batches among the model's; None for None.

        Raises
        ------
        UserError
            When the model has no such batch, or none is named.
        """
        if transform_batch is None:
            return None
        several = isinstance(transform_batch, Iterable) and not isinstance(transform_batch, str)
        codes = {name: self.schema.batch_code(name) for name in (transform_batch if several else [transform_batch])}
        for name, code in codes.items() or [("", None)]:
            if code is None:
                raise UserError(f"transform_batch: {str(name)!r} is not one of {', '.join(self.schema.batches)}")
        return list(codes.values())

    def posterior_predictive(self, adata: AnnData, seed: int = 0) -> sp.csr_matrix:
        """One replicate of the cells' counts, drawn from the fitted model: (cells, genes of the model) int32.

        For each cell z and l from its posterior, then counts from the likelihood.
        """
        return posterior.posterior_predictive(self.network, self._counts(adata, True, seed), seed)

    def differential_expression(
        self,
        adata: AnnData,
        groupby: str | None = None,
        seed: int = 0,
        config: DeConfig | None = None,
        cells: Sequence[bool] | np.ndarray | None = None,
        reference: Sequence[bool] | np.ndarray | None = None,
    ) -> pd.DataFrame:
        """Groups of a cell column against the rest or each other, or any cells against any; as ``de.parquet``.

        Parameters
        ----------
        groupby : cell column; its groups are compared as `config.reference` says.
        config : how; None takes the defaults.
        cells, reference : (cells,) masks, instead of `groupby`: one comparison, of ``group`` against ``reference``.
            Without `reference`, all other cells. Of a pandas Series the index counts, not the order; it must be that
            of ``adata.obs``.

        Cells of batches that the model never met can be compared where all are decoded under the model's
        (``config.batches``: ``all``), but for ``model.encode_covariates``.

        Raises
        ------
        UserError
            For a column that is not there, a mask that does not say of each cell whether it is meant, and as the
            method's own.

        See Also
        --------
        scvi_core.de.differential_expression : the method.

        Examples
        --------
        >>> model.differential_expression(adata, "cell_type")
        >>> model.differential_expression(adata, "cell_type", config=DeConfig(reference="pairs"))
        >>> model.differential_expression(adata, cells=adata.obs["day"] == 3, reference=adata.obs["day"] == 0)
        """
        if (groupby is None) == (cells is None):
            raise UserError("differential_expression: give groupby, or a mask of cells (and one of the reference)")
        if groupby is not None and reference is not None:
            raise UserError("reference: goes with a mask of cells; with groupby, config.reference says what it is")
        check_arguments(adata, seed)
        if cells is None:
            if not isinstance(groupby, str) or groupby not in adata.obs:
                columns = ", ".join(map(str, adata.obs.columns))
                raise UserError(f"groupby: no cell column '{groupby}' (columns: {columns})")
            config, groups = config or DeConfig(groupby=groupby), adata.obs[groupby]
        else:
            config = (config or DeConfig()).model_copy(update={"reference": "pairs"})
            groups = pd.Series(_two_groups(adata, cells, reference), adata.obs_names, name="cells and reference")
        return de.differential_expression(
            self.network,
            self._counts(adata, True, seed, new_batches=True),
            groups,
            self.gene_ids,
            self.gene_names,
            config,
            seed,
        )

    def annotate(self, adata: AnnData) -> pd.DataFrame:
        """The cell type of every cell, how sure it is, and whether it is any of those known.

        Any batch will do, but for ``model.encode_covariates``.

        Returns
        -------
        pandas.DataFrame
            A row a cell, index as ``adata.obs_names``:

            ``label`` : the most probable leaf. ``probability`` : its probability; among cells of a batch that the model
            did not see and that is like those it saw, a share of that size is right. It is calibrated on average over
            cells, not for each label, and given that the cell is of one of the known types.
            ``label_set`` : a list of leaves, which holds the true one for a share ``annotate.coverage`` of such cells.
            It may be empty: where no leaf is as probable as the true one is for all but 1 - coverage of them.
            ``safe_label`` : the smallest node of the taxonomy above all leaves of the set; of an empty set, the
            smallest whose probability is ``coverage`` or more; None where there is none.
            ``safe_probability`` : its probability, the sum over its leaves.
            ``novelty`` : 0..1, the share of held-out cells of known types that seem less strange, by how unsure the
            label is and by how far expression, averaged over a cell and the four nearest to it among the cells given
            of its batch, is from what the labels explain. So it depends on which cells are given together, and needs
            some tens of them.
            ``is_novel`` : whether novelty is above 1 - ``annotate.max_false_novel``, which is as often as that so for
            cells of known types; how often for others depends on how they differ.

        Raises
        ------
        UserError
            When the model was fitted without labels.
        """
        p_ny, novelty_n, annotator = self._annotated(adata)
        return annotator.calls(p_ny, novelty_n, adata.obs_names)

    def label_probabilities(self, adata: AnnData, level: str = "leaf") -> pd.DataFrame:
        """Calibrated probabilities, float64: cells x leaves, whose sum is 1, or at level ``all`` every node's.

        A node's probability is the sum over the set of leaves under it, so a parent is as probable as its child or
        more. What a probability means: see :meth:`annotate`.
        """
        if level not in ("leaf", "all"):
            raise UserError(f"level: {level!r}; give 'leaf' or 'all'")
        p_ny, _, annotator = self._annotated(adata)
        return annotator.node_probabilities(p_ny, level, adata.obs_names)

    def _annotated(self, adata: AnnData) -> tuple[np.ndarray, np.ndarray, Annotator]:
        """Probabilities and novelty of the cells, and who gave them."""
        if self.annotator is None:
            raise UserError("the model was fitted without labels; fit it with label_key to have cell types")
        counts = self._counts(adata, self.model.encode_covariates)
        key = self.schema.batch_key
        if key is not None and key not in adata.obs:
            log.warning("adata has no column '%s': novelty takes all cells given for those of one batch", key)
        batch_n = adata.obs[key].astype(str).to_numpy() if key in adata.obs else np.zeros(adata.n_obs)
        return *self.annotator.probabilities(posterior.latent(self.network, counts), counts, batch_n), self.annotator

    def loadings(self) -> pd.DataFrame:
        """The linear decoder's matrix, a row a gene in the model's order; columns as ``loadings.parquet``.

        Returns
        -------
        pandas.DataFrame
            ``gene_id``, ``gene_name``, then a factor a column: ``z_0`` ... float32, the columns of ``latent``. A
            loading is the change of the log of the gene's expected share, beside the other genes', per unit of z (whose
            prior is a standard normal). The softmax is blind to a number added to all genes of a factor; so each factor
            has mean zero over genes, or, with ``loadings_l1``, stays where that prior put it and keeps its zeros. Order
            and sign of factors are arbitrary.

        Raises
        ------
        UserError
            When the decoder is a network, which has no loadings.
        """
        if self.model.decoder != "linear":
            raise UserError("model.decoder: 'network' has no loadings; fit a model with model.decoder: linear")
        loadings_gk = self.network.loadings_gk.cpu()
        if not self.model.loadings_l1:
            loadings_gk = loadings_gk - loadings_gk.mean(0)
        frame = pd.DataFrame(loadings_gk.numpy(), columns=[f"z_{k}" for k in range(loadings_gk.shape[1])])
        frame.insert(0, "gene_name", self.gene_names)
        frame.insert(0, "gene_id", self.gene_ids)
        return frame

    def save(self, path: str | Path) -> None:
        """Write the bundle: ``model.safetensors``, ``model.json``, ``history.parquet``. Whole, or not at all."""
        with replacing(path, "MODEL") as folder:
            folder.mkdir()
            weights = {k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}
            tensors, labels = self.annotator.save() if self.annotator else ({}, None)
            weights |= {f"{ANNOTATION}{name}": value for name, value in tensors.items()}
            save_file(weights, folder / "model.safetensors")
            write_parquet(folder / "history.parquet", self.history.drop(columns="seconds"))
            schema = dataclasses.asdict(self.schema)
            about = {
                "format_version": FORMAT_VERSION,
                "package_version": __version__,
                "model": self.model.model_dump(),
                "train": self.train.model_dump(),
                "seed": self.seed,
                "gene_ids": schema.pop("gene_ids"),
                "gene_names": self.gene_names,
                "batches": schema.pop("batches"),
                "batch_key": schema.pop("batch_key"),
                "covariates": schema,
                "n_genes": len(self.gene_ids),
                "layer": self.layer,
                "annotation": labels,
                "weights_sha256": sha256_file(folder / "model.safetensors"),
            }
            write_json(folder / "model.json", self.card | about, checksum=True)


def read_card(folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """What a bundle's model.json and history.parquet say, by their checksums; those of formats 2 and 3 have none.

    Raises
    ------
    UserError
        When one of the two is missing or damaged.
    """
    card, history = folder / "model.json", folder / "history.parquet"
    try:
        about = json.loads(card.read_bytes())
        if about["format_version"] in (2, 3) and "checksum" not in about:
            log.warning("%s: of a format that had no checksums; save the model anew", folder)
            return about, pd.read_parquet(history)
    except (ValueError, KeyError, TypeError, RecursionError, OSError):
        pass  # which of these it is, is told below
    return read_json(card, "train"), read_parquet(history, "train")


def load(path: str | Path, device: str = "cpu") -> Model:
    """Load a bundle that :meth:`Model.save` wrote: safetensors and JSON, nothing that could run code.

    Raises
    ------
    UserError
        When a file is missing or not whole, the weights are not those that ``model.json`` names, or the format is
        newer than this version of scvi-core.
    """
    path = Path(path)
    for name in BUNDLE:
        if not (path / name).is_file():
            raise UserError(f"{path}: no {name}; a model is a folder with {', '.join(BUNDLE)}")
    about, history = read_card(path)
    try:
        if about["format_version"] > FORMAT_VERSION:
            raise UserError(
                f"{path}/model.json: format {about['format_version']} is newer than this scvi-core {__version__} "
                f"reads ({FORMAT_VERSION}); upgrade scvi-core"
            )
        if about["format_version"] < 2:
            raise UserError(
                f"{path}/model.json: format {about['format_version']} is older than this scvi-core {__version__} reads "
                f"(2 and later); train the model again, or use the version in its package_version"
            )
        if sha256_file(path / "model.safetensors") != about["weights_sha256"]:
            raise UserError(
                f"{path}/model.safetensors: not the weights that model.json names; fetch the model again, or remove it "
                "and run `scvi-core train`"
            )
        schema = Schema.from_dict({k: about[k] for k in ("gene_ids", "batch_key", "batches")} | about["covariates"])
        model, fitted = ModelConfig(**about["model"]), TrainConfig(**about["train"])
        labels, weights = about.get("annotation"), load_file(path / "model.safetensors")
        tensors = {k.removeprefix(ANNOTATION): weights.pop(k) for k in list(weights) if k.startswith(ANNOTATION)}
        annotator = Annotator.load(tensors, labels) if labels else None
        network = _network(model, schema, about["seed"])
        if annotator is not None and annotator.config.method != "frozen":
            network = scanvi.like(network, annotator.taxonomy.reach_vy)
        odd = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
        if odd:
            raise UserError(
                f"{path}/model.safetensors: {odd[0]} is not finite (NaN or infinite); train the model again"
            )
        network.load_state_dict(weights)
        gene_names = list(about["gene_names"])
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, OSError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a whole model ({reason}); fetch or train it again") from error
    history.insert(1, "seconds", np.nan)
    known = {"model", "train", "seed", "gene_ids", "gene_names", "batches", "batch_key", "covariates", "layer"}
    known.add("annotation")
    card = {k: v for k, v in about.items() if k not in known}
    network.eval().to(resolve_device(device) if device != "cpu" else "cpu")
    layer = about.get("layer")
    return Model(network, schema, model, fitted, about["seed"], history, gene_names, card, layer, annotator)


def fit(
    adata: AnnData,
    batch_key: str | None = None,
    layer: str | None = None,
    categorical_covariates: Sequence[str] = (),
    continuous_covariates: Sequence[str] = (),
    model: ModelConfig | None = None,
    train: TrainConfig | None = None,
    holdout: Sequence[int] | np.ndarray | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
    checkpoints: str | Path | None = None,
    label_key: str | None = None,
    unknown_label: str | None = "unknown",
    label_tree: str | Path | Sequence[tuple[str, str]] | None = None,
    annotate: AnnotateConfig | None = None,
) -> Model:
    """Fit scVI to raw counts; with `label_key`, learn cell types too.

    Ctrl-C, a notebook's stop button, ends it after the step it is at: the model is returned as it is then, with a
    warning, ``card["stopped"]`` and a fingerprint of its own. Cell types are still learned, on the model as it is: what
    comes then, the first does not stop. A second one interrupts at once.

    Parameters
    ----------
    adata : cells × genes with raw counts in ``X`` or in `layer`.
    batch_key : cell column that holds the batch to correct for.
    categorical_covariates, continuous_covariates : further cell columns that the decoder sees.
    model, train : configuration; None takes the defaults.
    holdout : positions of cells never trained on, which serve for validation; None sets
        ``train.validation_fraction`` of the cells aside at random.
    seed : of everything random. The same seed, data and configuration give the same weights on the same machine.
    device : ``auto``, ``cpu`` or ``cuda``.
    label_key : cell column that holds the types of some cells, word for word: leaves of the taxonomy or inner nodes.
    unknown_label : its value for cells without a label; no value says the same. None: no value alone.
    label_tree : the taxonomy: a file of two tab-separated columns, child and parent, an ontology's ``.obo``, or pairs.
    annotate : how cell types are learned; None takes the defaults. Its ``label``, ``unknown`` and ``tree`` are those
        given here.
    checkpoints : folder that keeps the state of an unfinished fit, written every half minute and when it is stopped;
        the same call goes on from there, to the weights of a fit that was not stopped. Removed when it is done.

    Raises
    ------
    UserError
        For arguments that cannot be, counts that are none, and a loss that is not finite.

    Examples
    --------
    >>> model = sv.fit(adata, batch_key="donor")
    >>> adata.obsm["X_scvi"] = model.latent(adata)
    >>> model = sv.fit(adata, batch_key="donor", label_key="cell_type")
    >>> adata.obs["found"] = model.annotate(adata)["label"]
    """
    check_arguments(adata, seed)
    seed = int(seed)
    if batch_key is not None and not isinstance(batch_key, str):
        raise UserError(f"batch_key: {batch_key!r}; give the name of one cell column")
    kinds = ("model", model, ModelConfig), ("train", train, TrainConfig), ("annotate", annotate, AnnotateConfig)
    for name, given, kind in kinds:
        if not isinstance(given, kind | None):
            raise UserError(f"{name}: a {type(given).__name__}; give a {kind.__name__}, such as {kind.__name__}()")
    model = model or ModelConfig()
    given = {"categorical_covariates": categorical_covariates, "continuous_covariates": continuous_covariates}
    update = {key: (names,) if isinstance(names, str) else tuple(names) for key, names in given.items() if names}
    model = model.model_copy(update=update)
    schema = Schema.of(adata, batch_key, model.categorical_covariates, model.continuous_covariates)
    counts, train = pack(adata, schema, layer), train or TrainConfig()
    names = adata.var.get("gene_name", adata.var_names)
    known = None
    if label_key is not None:
        for name, value in (("label_key", label_key), ("unknown_label", unknown_label)):
            if not isinstance(value, str) and (value is not None):
                raise UserError(f"{name}: {value!r}; give one text" + ("" if name == "label_key" else ", or None"))
        edges = edges_of(label_tree)
        given = {"label": label_key, "unknown": unknown_label, "tree": None}
        config = AnnotateConfig(**((annotate or AnnotateConfig()).model_dump() | given))
        known = Known.of(adata.obs, config, edges, adata.obs.get(batch_key))
    elif label_tree is not None or annotate is not None:
        name = "annotate" if label_tree is None else "label_tree"
        raise UserError(f"{name}: given without label_key, the cell column that holds the labels")
    data, held = {"cells": content_digest(adata, counts)}, _positions(holdout, len(counts))
    if known is not None:
        data["labels"] = known.digest
    with contextlib.ExitStack() as stack:
        checkpoint = None
        if checkpoints is not None:
            checkpoint = _made(checkpoints) / f"{fingerprint(schema, data, model, train, seed, held)}.safetensors"
            stack.enter_context(alone(checkpoint.with_suffix(".lock")))
        fitted = fit_counts(
            counts,
            schema,
            [str(name) for name in names],
            data,
            model,
            train,
            held,
            seed,
            resolve_device(device),
            progress,
            checkpoint=checkpoint,
            stop=stack.enter_context(_asked_to_stop()),
            keep=True,
            known=known,
        )
        if "stopped" in fitted.card:
            later = (
                f"{checkpoint} is kept, and the same call goes on" if checkpoint else "checkpoints=FOLDER lets it go on"
            )
            log.warning(
                "fit: stopped at step {step} of {steps}: the model is as far as it came; %s".format(
                    **fitted.card["stopped"]
                ),
                later,
            )
        elif checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
    fitted.layer = layer
    return fitted


def _made(folder: str | Path) -> Path:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"checkpoints: {folder}: cannot be made ({error.strerror}); name a folder") from None
    return Path(folder)


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Tell whether Ctrl-C came. Where others, or no one, take it, it is left to them."""
    before, seen = signal.getsignal(signal.SIGINT), []

    def note(number: int, _frame: Any) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)  # the second one

    ours = threading.current_thread() is threading.main_thread() and before is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def fit_counts(
    counts: Counts,
    schema: Schema,
    gene_names: list[str],
    data: Any,
    model: ModelConfig,
    train: TrainConfig,
    holdout: Sequence[int] | np.ndarray | None,
    seed: int,
    device: torch.device,
    progress: bool = True,
    checkpoint: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    about: dict[str, Any] | None = None,
    keep: bool = False,
    known: Known | None = None,
) -> Model:
    """Fit to packed counts: what :func:`fit` and ``scvi-core train`` share.

    Parameters
    ----------
    data : digests of the counts, and of the labels where there are any, for the fingerprint.
    checkpoint, stop, keep : see :func:`scvi_core.train.train`; a model that is kept though its fit was stopped says so
        in its card.
    about : further entries of the model card, such as samples and organism.
    known : the cells' labels.
    """
    check_design(model, schema)
    if not 0 <= seed < 2**31:
        raise UserError(f"seed: {seed} is not within 0..{2**31 - 1}")
    held = _positions(holdout, len(counts))
    identity = fingerprint(schema, data, model, train, seed, held)
    if held is None:
        held = training.hold_out(train, len(counts), seed)
    train_rows = np.setdiff1d(np.arange(len(counts)), held)
    network = _network(model, schema, seed)
    about = dict(about or {})
    try:
        history = training.train(
            network, counts, train_rows, held, train, seed, device, checkpoint, identity, progress, stop, keep=keep
        )
    except training.Interrupted as error:
        if error.history is None:
            raise
        history, about["stopped"] = error.history, {"step": error.step, "steps": error.steps}
        identity = sha256_text(f"{identity} stopped at step {error.step}")  # other weights than those of the whole fit
    kept = len(history) - 1
    warm = history["kl_weight"] == train.kl_weight
    if train.early_stopping and len(held) and warm.any():  # as training chose: the best from the end of warm-up on
        kept = history["validation_elbo"].where(warm).idxmax()
    last = history.iloc[-1]
    final = training.elbo_of(network, counts.subset(held).to(device), seed) if len(held) else math.nan
    metrics = {
        "epochs": int(last["epoch"]),
        "train_elbo": round(float(last["train_elbo"]), 4),
        "validation_elbo": round(final, 4) if len(held) else None,
        "kept_epoch": int(history["epoch"].iloc[kept]),
        "n_train": len(train_rows),
        "n_validation": len(held),
        "n_parameters": sum(p.numel() for p in network.parameters()),
        "kl_weight_final": float(last["kl_weight"]),
    }
    python = ".".join(platform.python_version_tuple()[:2])  # a patch release changes no number
    card = {
        "fingerprint": identity,
        "metrics": metrics,
        "n_cells": len(counts),
        "device": device.type,
        "kernels": kernels.kind(network.rho.weight)[0],
        "precision": "bf16" if network.half else "float32",
        "software": {"python": python, "torch": torch.__version__, "numpy": np.__version__},
    } | about
    fitted = Model(network, schema, model, train, seed, history, gene_names, card)
    if known is not None:
        fitted.network, fitted.annotator = _annotated(fitted, counts, known, train_rows, held, device)
    return fitted


def _annotated(
    fitted: Model, counts: Counts, known: Known, rows: np.ndarray, held: np.ndarray, device: torch.device
) -> tuple[SCVI, Annotator]:
    """The network, shown the labels where the method says so, and the annotator on its latent space."""
    first, method, seed, networks = fitted.network, known.config.method, fitted.seed, []
    if method == "frozen":
        z_nk = posterior.latent(first, counts.to(device))

    def latents(node_n: np.ndarray) -> np.ndarray:
        if method == "frozen":
            return z_nk
        start = first if method == "two-stage" else _network(fitted.model, fitted.schema, fitted.seed)
        networks.append(
            scanvi.supervised(
                start, counts, node_n, known.taxonomy.reach_vy, fitted.train, method, rows, held, seed, device
            )
        )
        return posterior.latent(networks[-1], counts.to(device))

    annotator = celltypes.learn(latents, counts, known.node_n, known.taxonomy, known.config, seed)
    return networks[0] if networks else first, annotator


def check_arguments(adata: Any, seed: Any = 0, n_samples: Any = 1) -> None:
    """Refuse what is no AnnData, no seed and no number of samples; numpy's integers are as good as Python's.

    Raises
    ------
    UserError
        Naming the argument and its value.
    """
    from anndata import AnnData

    if not isinstance(adata, AnnData):
        raise UserError(f"adata: a {type(adata).__name__}; give an anndata.AnnData, such as AnnData(frame)")
    if torch.get_default_dtype() != torch.float32:
        raise UserError(
            f"torch's default dtype is {str(torch.get_default_dtype()).removeprefix('torch.')}, and scVI computes in "
            "float32; call torch.set_default_dtype(torch.float32) first"
        )
    for name, value, least in (("seed", seed, 0), ("n_samples", n_samples, 1)):
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or not least <= value < 2**31:
            raise UserError(f"{name}: {value!r}; give a whole number from {least} up")


def check_design(model: ModelConfig, schema: Schema) -> None:
    """Refuse a model that the data or its own settings cannot bear.

    Raises
    ------
    UserError
        For per-batch dispersion with one batch, a covariate of one level, a prior on loadings that are not there.
    """
    if model.dispersion == "gene-batch" and len(schema.batches) < 2:
        raise UserError("model.dispersion: 'gene-batch' needs two batches or more; this data has one; use 'gene'")
    if model.loadings_l1 and model.decoder != "linear":
        raise UserError(
            f"model.loadings_l1: {model.loadings_l1:g}, but a network decoder has no loadings; "
            "set model.decoder: linear or leave it out"
        )
    for column, levels in schema.categorical.items():
        if len(levels) < 2:
            raise UserError(f"model.categorical_covariates: '{column}' has one level ({levels[0]!r}); leave it out")
        if column in schema.continuous or column == schema.batch_key:
            raise UserError(f"model.categorical_covariates: '{column}' is also asked for in another role; keep one")


def _network(model: ModelConfig, schema: Schema, seed: int) -> SCVI:
    n_covariates = sum(len(levels) for levels in schema.categorical.values()) + len(schema.continuous)
    return build(model, len(schema.gene_ids), len(schema.batches), n_covariates, seed)


def _positions(holdout: Any, n_cells: int) -> np.ndarray | None:
    """Positions of the cells to hold out, int64, each once and in rising order; None for None.

    Raises
    ------
    UserError
        For what are no positions of cells.
    """
    if holdout is None:
        return None
    if isinstance(holdout, pd.Series):  # of a column that says 0 or 1, the first two cells would be taken
        raise UserError(
            f"holdout: a Series; give positions of cells, such as np.flatnonzero(adata.obs[{holdout.name!r}])"
        )
    held = np.unique(np.atleast_1d(holdout))
    if len(held) and held.dtype.kind not in "iu":
        raise UserError(f"holdout: {held.dtype} values; give positions of cells, such as np.flatnonzero(mask)")
    held = held.astype(np.int64)
    if len(held) and (held[0] < 0 or held[-1] >= n_cells):
        raise UserError(f"holdout: positions must lie in 0..{n_cells - 1}")
    return held


def _two_groups(adata: AnnData, cells: Any, reference: Any) -> np.ndarray:
    """(cells,) "group", "reference", or None for the cells of neither mask."""
    group_n = _mask(adata.obs_names, cells, "cells")
    reference_n = ~group_n if reference is None else _mask(adata.obs_names, reference, "reference")
    if both := int((group_n & reference_n).sum()):
        raise UserError(f"cells, reference: {both} cells are in both; take them out of one")
    return np.where(group_n, "group", np.where(reference_n, "reference", None))


def _mask(cell_ids: pd.Index, given: Any, name: str) -> np.ndarray:
    """(cells,) bool: a mask, in the order of the cells: by the index of a Series, else as it comes.

    Raises
    ------
    UserError
        When the index is not that of the cells, or a cell has neither True nor False.
    """
    if isinstance(given, pd.Series) and not given.index.equals(cell_ids):
        given = given.set_axis(given.index.map(str))
        absent = cell_ids.difference(given.index)
        if len(absent) or len(given) != len(cell_ids) or cell_ids.has_duplicates:
            such = f" ({absent[0]!r} is not in it)" if len(absent) else ""
            raise UserError(
                f"{name}: its index is not that of adata.obs{such}; take {name}[adata.obs_names], or "
                f"{name}.to_numpy() where its order is that of the cells"
            )
        given = given[cell_ids]
    if isinstance(given, np.ma.MaskedArray):
        given = np.where(np.ma.getmaskarray(given), None, given.data)
    values_n = np.asarray(given, dtype=object)
    if values_n.shape != (len(cell_ids),) or not all(isinstance(v, bool | np.bool_) or pd.isna(v) for v in values_n):
        raise UserError(f"{name}: give True or False for each of the {len(cell_ids)} cells")
    if n := int(pd.isna(values_n).sum()):
        raise UserError(f"{name}: {n} cells have neither True nor False (NA); fill them, or drop these cells")
    return values_n.astype(bool)


def bundle_bytes(model: Model) -> bytes:
    """The weights' file as bytes; two fits are the same when these are."""
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model")
        return (Path(folder) / "model" / "model.safetensors").read_bytes()
