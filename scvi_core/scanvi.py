"""scANVI (Xu et al., Molecular Systems Biology 2021): scVI whose latent state knows labels, here with a taxonomy.

Above scVI's z stands another latent state u, and the label y:

    u_n ~ Normal(0, I),  y_n ~ Uniform(leaves)          z_n ~ Normal(m(u_n, y_n), v(u_n, y_n)), then as in scVI

q(y | z) = softmax(c(z)) is the classifier, q(u | z, y) a diagonal Gaussian. With pi = q(y | z), one draw of z, one of u
for every label, and the weight w of divergences, which the warm-up raises, training minimises the mean over cells of

    - log p(x | z, l, s) + log q(z | x) - sum_y pi_y log p(z | u_y, y)
    + w [ sum_y pi_y KL(q(u | z, y) || p(u)) + KL(pi || p(y)) + KL(l) ]

plus `alpha` times the mean over labelled cells of - log sum_{y under the label} softmax(c(E[z | x]))_y. For a leaf that
is the cross-entropy; for an inner node of the taxonomy it says no more than the label does. In the first part a cell
labelled with an inner node is marginalised over that node's leaves alone; one labelled with a leaf, as in scANVI, and
one without a label, over all. Suffixes: n cells, y leaves, v nodes of the taxonomy, k latent, h hidden.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import nn

from scvi_core import kernels
from scvi_core.config import ModelConfig, TrainConfig
from scvi_core.counts import Counts, Minibatch
from scvi_core.model import SCVI, Layer, Linear, Noise
from scvi_core.train import Schedule, train


class GaussianByLabel(nn.Module):
    """A latent state and each label in turn -> mean and log variance of a diagonal Gaussian over another such state."""

    def __init__(self, config: ModelConfig, n_labels: int, norm: str, dropout: float):
        super().__init__()
        self.n_labels, seen = n_labels, n_labels if n_labels > 1 else 0  # a single label tells nothing
        widths = [config.n_latent] + [config.n_hidden] * config.n_layers
        self.layers = nn.ModuleList(
            Layer(Linear(width + seen, config.n_hidden), norm, dropout) for width in widths[:-1]
        )
        self.mean, self.log_variance = (Linear(config.n_hidden, config.n_latent) for _ in range(2))

    def forward(self, state_nyk: torch.Tensor, noise: Noise | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(cells, labels, latent) states, one for each label -> means and log variances, of the same shape."""
        n_cells = len(state_nyk)
        label_my = torch.eye(self.n_labels, device=state_nyk.device, dtype=state_nyk.dtype).repeat(n_cells, 1)
        h = state_nyk.flatten(0, 1)
        for layer in self.layers:
            a_mh = layer.linear(h, label_my if self.n_labels > 1 else None)
            kept_mh = None
            if layer.training and layer.dropout:
                kept_mh = noise.kept(a_mh.view(n_cells, self.n_labels, -1), layer.dropout).flatten(0, 1)
            h = kernels.hidden(a_mh, layer.norm, kept_mh, layer.dropout)
        return self.mean(h).view_as(state_nyk), self.log_variance(h).view_as(state_nyk)


class SCANVI(SCVI):
    """scVI with labels.

    Parameters
    ----------
    config ... library_variance_s : as :class:`scvi_core.model.SCVI`.
    reach_vy : (nodes, leaves) bool, the leaves under each node, leaves first: ``Taxonomy.reach_vy``.
    weight_v : (nodes,) weight of each label's cells in the classifier's loss; None weighs all cells the same.
    linear : whether the classifier is one matrix; else it has the encoder's hidden layers.
    alpha : weight of the classifier's loss.

    Notes
    -----
    Minibatches carry ``label_n``, (cells,) positions of nodes, or -1 for cells without a label.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_genes: int,
        n_batches: int,
        n_covariates: int,
        library_mean_s: torch.Tensor,
        library_variance_s: torch.Tensor,
        reach_vy: torch.Tensor,
        weight_v: torch.Tensor | None = None,
        linear: bool = True,
        alpha: float = 50.0,
    ):
        super().__init__(config, n_genes, n_batches, n_covariates, library_mean_s, library_variance_s)
        n_nodes, n_labels = reach_vy.shape
        self.alpha, self.n_labels = alpha, n_labels
        n_layers = 0 if linear else config.n_layers
        widths = [config.n_latent] + [config.n_hidden] * n_layers
        self.classifier = nn.ModuleList(
            Layer(Linear(width, config.n_hidden), config.encoder_norm, config.dropout) for width in widths[:-1]
        )
        self.label_logit = Linear(widths[-1], n_labels)
        self.upper_encoder = GaussianByLabel(config, n_labels, config.encoder_norm, config.dropout)
        self.upper_decoder = GaussianByLabel(config, n_labels, config.decoder_norm, 0.0)
        # a last row, which -1 finds: of cells without a label
        bare, everywhere = torch.zeros(1), torch.ones(1, n_labels, dtype=torch.bool)
        weight_v = torch.ones(n_nodes) if weight_v is None else weight_v.float()
        self.register_buffer("weight_v", torch.cat([weight_v, bare]))
        self.register_buffer("reach_vy", torch.cat([reach_vy, everywhere]))

    def logits(self, z_nk: torch.Tensor, noise: Noise | None = None) -> torch.Tensor:
        """(cells, leaves): c(z)."""
        h = z_nk
        for layer in self.classifier:
            h = layer(h, None, noise)
        return self.label_logit(h)

    def label_terms(self, cells: Minibatch, noise: Noise) -> dict[str, torch.Tensor]:
        """The loss in its parts, (cells,) nats each, by one draw of z and of every u.

        Returns
        -------
        ``reconstruction``: log p(x | z, l, s); ``entropy``: log q(z | x); ``prior``: sum of pi log p(z | u, y);
        ``kl_u``, ``kl_y``, ``kl_l``: divergences; ``cross_entropy``: the classifier's, 0 without a label.
        """
        q = self.encode(cells, noise)
        z_nk, log_library_n = self.sample(cells, q, noise)
        reach_ny = self.reach_vy[cells.label_n]
        inner_n = cells.label_n >= self.n_labels
        logit_ny = self.logits(z_nk, noise).masked_fill(inner_n[:, None] & ~reach_ny, -math.inf)
        log_pi_ny = torch.log_softmax(logit_ny, 1)
        pi_ny = log_pi_ny.exp()
        allowed_n = torch.where(inner_n, reach_ny.sum(1), self.n_labels).to(z_nk.dtype)

        z_nyk = z_nk[:, None].expand(-1, self.n_labels, -1)
        mean_nyk, log_variance_nyk = self.upper_encoder(z_nyk, noise)
        variance_nyk = log_variance_nyk.exp() + 1e-4
        u_nyk = mean_nyk + variance_nyk.sqrt() * noise.normal(mean_nyk)
        kl_u_ny = 0.5 * (mean_nyk**2 + variance_nyk - 1 - variance_nyk.log()).sum(2)
        prior_mean_nyk, prior_log_variance_nyk = self.upper_decoder(u_nyk, noise)
        prior_ny = _log_normal(z_nyk, prior_mean_nyk, prior_log_variance_nyk).sum(2)

        known_ny = torch.log_softmax(self.logits(q.mean_nk, noise), 1).masked_fill(~reach_ny, -math.inf)
        return {
            "reconstruction": self.log_likelihood(cells, z_nk, log_library_n),
            "entropy": _log_normal(z_nk, q.mean_nk, q.variance_nk.log()).sum(1),
            "prior": (pi_ny * prior_ny).sum(1),
            "kl_u": (pi_ny * kl_u_ny).sum(1),
            "kl_y": (pi_ny * log_pi_ny.masked_fill(pi_ny == 0, 0.0)).sum(1) + allowed_n.log(),
            "kl_l": self.kl_library(cells, q),
            "cross_entropy": -torch.logsumexp(known_ny, 1),
        }

    def loss(
        self, cells: Minibatch, noise: Noise, kl_weight: float | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`scvi_core.model.SCVI.loss`; the lower bound leaves the classifier's loss out."""
        t = self.label_terms(cells, noise)
        bound_n = t["reconstruction"] - t["entropy"] + t["prior"]
        divergence_n = t["kl_u"] + t["kl_y"] + t["kl_l"]
        classified_n = self.alpha * self.weight_v[cells.label_n] * t["cross_entropy"]
        return kl_weight * divergence_n - bound_n + classified_n, bound_n - divergence_n


def _log_normal(x: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    return -0.5 * ((x - mean) ** 2 * (-log_variance).exp() + log_variance + math.log(2 * math.pi))


def like(network: SCVI, reach_vy: np.ndarray, node_n: np.ndarray | None = None) -> SCANVI:
    """A scANVI with the weights of a scVI; those of its own are drawn anew, the same for the same shapes.

    Labels weigh by the root of their number of cells, `node_n`, which is between all cells counting the same and all
    labels counting the same; on average over all cells, with those that have no label, a cell weighs 1.
    """
    n_v = np.bincount(node_n[node_n >= 0], minlength=len(reach_vy)) if node_n is not None else np.ones(len(reach_vy))
    weight_v = torch.from_numpy(1 / np.sqrt(np.maximum(n_v, 1)))
    if node_n is not None:
        weight_v *= len(node_n) / float((weight_v * torch.from_numpy(n_v)).sum())
    n_covariates = network.n_covariates
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        moments = torch.zeros(network.n_batches), torch.ones(network.n_batches)
        model = SCANVI(
            network.config, network.rho.out_features, network.n_batches, n_covariates, *moments,
            torch.from_numpy(reach_vy), weight_v,
        )  # fmt: skip
    model.load_state_dict(network.state_dict(), strict=False)
    return model


def supervised(
    start: SCVI,
    counts: Counts,
    node_n: np.ndarray,
    reach_vy: np.ndarray,
    config: TrainConfig,
    method: str,
    rows: np.ndarray,
    held: np.ndarray,
    seed: int,
    device: torch.device,
) -> SCANVI:
    """Train scANVI on cells with these labels: ``two-stage`` from a fitted scVI, ``joint`` from the start.

    From a fitted scVI it takes a fifth of the epochs, and the best of them is not sought: what the labels improve is
    not the held-out lower bound.
    """
    model = like(start, reach_vy, node_n)
    counts = dataclasses.replace(counts, label_n=torch.from_numpy(node_n).to(counts.batch_n.device))
    epochs = Schedule.of(config, len(rows)).epochs
    update = {"early_stopping": False, "max_epochs": max(5, epochs // 5) if method == "two-stage" else epochs}
    train(model, counts, rows, held, config.model_copy(update=update), seed, device, progress=False)
    return model
