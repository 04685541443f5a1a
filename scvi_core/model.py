"""The model of Lopez et al. (Nature Methods 2018), in plain PyTorch.

Generative process, for cell n and gene g:

    z_n ~ Normal(0, I)                                latent state
    l_n ~ LogNormal(m_s, v_s), or the observed total  library size; m_s, v_s of the cell's batch s
    rho_n = softmax(f(z_n, s_n))                      expected share of each gene
    x_ng ~ ZINB(l_n rho_ng, theta_g, pi_ng)           counts; pi = sigmoid(h(z_n, s_n)); or NB, or Poisson

f and h are a network with two heads or, with the linear decoder (Svensson et al., Bioinformatics 2020), a matrix each:

    rho_n = softmax(a + W z_n + B s_n)                each column of W a factor's loadings on the genes

q(z_n | x_n) and q(l_n | x_n) are diagonal Gaussians (of log l_n) whose moments a network gives. Only what the
chosen likelihood reads is built. Suffixes give shapes: n cells, g genes, k latent, h hidden, s batches, c covariates.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from torch import nn

from scvi_core import kernels
from scvi_core.config import ModelConfig
from scvi_core.counts import Minibatch
from scvi_core.kernels import Nonzeros
from scvi_core.parallel import BatchNorm

NORMS = {
    "batch": lambda n: BatchNorm(n, momentum=0.01, eps=1e-3),
    "layer": lambda n: nn.LayerNorm(n, elementwise_affine=False),
    "none": lambda n: nn.Identity(),
}


class Noise:
    """The random numbers of one minibatch. They depend on the seed alone, so that a resumed fit is the same.

    Parameters
    ----------
    seed, device : of the generator.
    n_cells, mine : cells of the whole minibatch, and which of them are here, where several processes share it: the
        numbers are those that one process would draw.
    """

    def __init__(
        self, seed: int, device: torch.device | str = "cpu", n_cells: int | None = None, mine: slice = slice(None)
    ):
        self.generator = torch.Generator(device).manual_seed(int(seed))
        self.n_cells, self.mine = n_cells, mine

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        """Standard normal numbers, (cells, ...) as `like`."""
        return like.new_empty(self.n_cells or len(like), *like.shape[1:]).normal_(generator=self.generator)[self.mine]

    def kept(self, like: torch.Tensor, dropout: float) -> torch.Tensor:
        """True with probability 1 - dropout, to the 1/65,536th, (cells, ...) as `like`."""
        n_cells = self.n_cells or len(like)
        numel = n_cells * like[0].numel()
        words = torch.empty(-(-numel // 4), dtype=torch.int64, device=like.device)
        bits = words.random_(-(2**63), None, generator=self.generator).view(torch.int16)[:numel]  # 4 numbers a word
        kept = bits < min(round((1 - dropout) * 65_536) - 32_768, 32_767)
        return kept.view(n_cells, *like.shape[1:])[self.mine]


class LinearOfCounts(nn.Module):
    """Linear in log(1 + counts), by the non-zeros alone, as zeros add nothing; and in the design, where it is seen."""

    def __init__(self, n_genes: int, n_design: int, n_out: int):
        super().__init__()
        bound = 1 / math.sqrt(n_genes + n_design)  # as nn.Linear draws them
        self.weight_gh = nn.Parameter(torch.empty(n_genes, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_out).uniform_(-bound, bound))
        if n_design:
            self.weight_hc = nn.Parameter(torch.empty(n_out, n_design).uniform_(-bound, bound))
        self.out_features = n_out

    def forward(self, x: Nonzeros, design_nc: torch.Tensor | None = None) -> torch.Tensor:
        """Counts of some cells -> (cells, out)."""
        h = kernels.linear_of_counts(x, self.weight_gh)
        return h + (self.bias if design_nc is None else kernels.linear(design_nc, self.weight_hc, self.bias))


class Linear(nn.Linear):
    """Linear in its input and, beside it, in the design, where it is seen."""

    def forward(self, x: torch.Tensor, design_nc: torch.Tensor | None = None) -> torch.Tensor:
        """(cells, in) -> (cells, out)."""
        x = x if design_nc is None else torch.cat([x, design_nc], 1)
        return kernels.linear(x, self.weight, self.bias)


class Layer(nn.Module):
    """Linear, norm, ReLU, dropout."""

    def __init__(self, linear: Linear | LinearOfCounts, norm: str, dropout: float):
        super().__init__()
        self.linear, self.norm, self.dropout = linear, NORMS[norm](linear.out_features), dropout

    def forward(
        self, x: torch.Tensor | Nonzeros, design_nc: torch.Tensor | None = None, noise: Noise | None = None
    ) -> torch.Tensor:
        """What its linear part takes -> (cells, out)."""
        a_nh = self.linear(x, design_nc)
        kept_nh = noise.kept(a_nh, self.dropout) if self.training and self.dropout else None
        return kernels.hidden(a_nh, self.norm, kept_nh, self.dropout)


class Gaussian(nn.Module):
    """Counts -> mean and variance of a diagonal Gaussian: q(z | x), or q(log l | x)."""

    def __init__(self, config: ModelConfig, n_genes: int, n_design: int, n_layers: int, n_out: int):
        super().__init__()
        n_hidden, deep = config.n_hidden, n_design if config.covariates_in == "every" else 0
        first = LinearOfCounts(n_genes, n_design, n_hidden)
        further = [Linear(n_hidden + deep, n_hidden) for _ in range(n_layers - 1)]
        self.layers = nn.ModuleList(Layer(each, config.encoder_norm, config.dropout) for each in (first, *further))
        self.mean = Linear(n_hidden, n_out)
        self.log_variance = Linear(n_hidden, n_out)
        self.n_seeing = 0 if not n_design else len(self.layers) if deep else 1  # layers that see the design

    def forward(
        self, x: Nonzeros, design_nc: torch.Tensor | None, noise: Noise | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts of some cells -> (cells, out) means and variances."""
        h = x
        for i, layer in enumerate(self.layers):
            h = layer(h, design_nc if i < self.n_seeing else None, noise)
        return self.mean(h), self.log_variance(h).exp() + 1e-4


@dataclasses.dataclass
class Posterior:
    """q(z, log l | x) of some cells: means and variances. The library's are None where it is observed."""

    mean_nk: torch.Tensor
    variance_nk: torch.Tensor
    library_mean_n: torch.Tensor | None
    library_variance_n: torch.Tensor | None


class SCVI(nn.Module):
    """The generative model and its inference networks.

    Parameters
    ----------
    config : likelihood, dispersion, library, sizes.
    n_genes, n_batches, n_covariates : columns of the counts, of the batch's and of the covariates' design.
    library_mean_s, library_variance_s : (batches,) moments of log library size within each batch: the prior of l.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_genes: int,
        n_batches: int,
        n_covariates: int,
        library_mean_s: torch.Tensor,
        library_variance_s: torch.Tensor,
    ):
        super().__init__()
        self.config, self.n_batches, self.n_covariates = config, n_batches, n_covariates
        # a single batch tells the decoder nothing
        n_design = (n_batches if n_batches > 1 else 0) + n_covariates
        n_encoded = n_design if config.encode_covariates else 0
        self.encoder = Gaussian(config, n_genes, n_encoded, config.n_layers, config.n_latent)
        if config.library == "latent":
            self.library_encoder = Gaussian(config, n_genes, n_encoded, 1, 1)
            self.register_buffer("library_mean_s", library_mean_s.float())
            self.register_buffer("library_variance_s", library_variance_s.float())
        # no hidden layer, no batch norm: the linear decoder's heads read z and the design themselves
        widths = [config.n_latent] + [config.n_hidden] * (config.n_layers if config.decoder == "network" else 0)
        self.n_seeing = len(widths) - 1 if config.covariates_in == "every" else 1  # layers of the decoder
        self.decoder = nn.ModuleList(
            Layer(Linear(a + n_design * (i < self.n_seeing), b), config.decoder_norm, 0.0)
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        )
        n_hidden = config.n_hidden if self.decoder else config.n_latent + n_design
        self.half = False  # whether the heads multiply in bfloat16 while training
        self.rho = Linear(n_hidden, n_genes)
        if config.likelihood == "zinb":
            self.dropout_logit = Linear(n_hidden, n_genes)
        if config.likelihood != "poisson":
            if config.dispersion == "gene-cell":
                self.log_theta = Linear(n_hidden, n_genes)
            else:
                rows = n_batches if config.dispersion == "gene-batch" else 1
                self.log_theta_sg = nn.Parameter(torch.randn(rows, n_genes))

    def encode(self, cells: Minibatch, noise: Noise | None = None) -> Posterior:
        """q(z, log l | x)."""
        design_nc = self.design(cells.batch_n, cells.covariates_nc) if self.config.encode_covariates else None
        mean_nk, variance_nk = self.encoder(cells.x, design_nc, noise)
        if self.config.library == "observed":
            return Posterior(mean_nk, variance_nk, None, None)
        mean_n1, variance_n1 = self.library_encoder(cells.x, design_nc, noise)
        return Posterior(mean_nk, variance_nk, mean_n1[:, 0], variance_n1[:, 0])

    def design(self, batch_n: torch.Tensor, covariates_nc: torch.Tensor) -> torch.Tensor:
        """(cells, columns) what layers see besides their input: one-hot batch, covariates."""
        if self.n_batches == 1:
            return covariates_nc
        batch_ns = nn.functional.one_hot(batch_n, self.n_batches).to(covariates_nc.dtype)
        return torch.cat([batch_ns, covariates_nc], 1)

    def hidden(self, z_nk: torch.Tensor, batch_n: torch.Tensor, covariates_nc: torch.Tensor) -> torch.Tensor:
        """(cells, hidden) input of the decoder's heads; with the linear decoder z and the design, side by side."""
        h, design_nc = z_nk, self.design(batch_n, covariates_nc)
        for i, layer in enumerate(self.decoder):
            h = layer(h, design_nc if i < self.n_seeing else None)
        return h if self.decoder else torch.cat([h, design_nc], 1)

    @property
    def loadings_gk(self) -> torch.Tensor:
        """(genes, latent) the linear decoder's W: a view of the weights, without their gradient."""
        return self.rho.weight.detach()[:, : self.config.n_latent]

    def log_rho(self, hidden_nh: torch.Tensor) -> torch.Tensor:
        """(cells, genes) log of the expected shares: log softmax over genes."""
        return torch.log_softmax(self.rho(hidden_nh), 1)

    def log_likelihood(self, cells: Minibatch, z_nk: torch.Tensor, log_library_n: torch.Tensor) -> torch.Tensor:
        """Log p(x_n | z_n, l_n, s_n), (cells,), summed over genes."""
        config, hidden_nh = self.config, self.hidden(z_nk, cells.batch_n, cells.covariates_nc)
        log_theta_rg = row_n = None
        if config.likelihood != "poisson":
            log_theta_rg = self.log_theta(hidden_nh) if config.dispersion == "gene-cell" else self.log_theta_sg
            row_n = cells.batch_n if config.dispersion == "gene-batch" else None
        pi = self.dropout_logit if config.likelihood == "zinb" else None
        half = self.half and self.training
        # the equations stand in scvi_core.kernels.likelihood, and these are they
        return kernels.reconstruction(cells.x, hidden_nh, log_library_n, self.rho, pi, log_theta_rg, row_n, half)

    def sample(self, cells: Minibatch, q: Posterior, noise: Noise) -> tuple[torch.Tensor, torch.Tensor]:
        """One draw of (z_nk, log l_n) from q, reparameterised; log l_n is the observed one where it is observed."""
        z_nk = q.mean_nk + q.variance_nk.sqrt() * noise.normal(q.mean_nk)
        if q.library_mean_n is None:
            return z_nk, cells.library_n.log()
        return z_nk, q.library_mean_n + q.library_variance_n.sqrt() * noise.normal(q.library_mean_n)

    def elbo_terms(self, cells: Minibatch, noise: Noise) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The evidence lower bound in its parts, (cells,) nats each, by one draw from q.

        Returns
        -------
        reconstruction_n : log p(x | z, l, s).
        kl_z_n : KL(q(z) || p(z)).
        kl_l_n : KL(q(log l) || p(log l | s)), zero where the library size is observed.
        """
        q = self.encode(cells, noise)
        z_nk, log_library_n = self.sample(cells, q, noise)
        reconstruction_n = self.log_likelihood(cells, z_nk, log_library_n)
        kl_z_n = 0.5 * (q.mean_nk**2 + q.variance_nk - 1 - q.variance_nk.log()).sum(1)
        return reconstruction_n, kl_z_n, self.kl_library(cells, q)

    def kl_library(self, cells: Minibatch, q: Posterior) -> torch.Tensor:
        """KL(q(log l) || p(log l | s)), (cells,); zero where the library size is observed."""
        if q.library_mean_n is None:
            return torch.zeros_like(q.mean_nk[:, 0])
        mean_n, variance_n = self.library_mean_s[cells.batch_n], self.library_variance_s[cells.batch_n]
        ratio_n = q.library_variance_n / variance_n
        return 0.5 * (ratio_n + (q.library_mean_n - mean_n) ** 2 / variance_n - 1 - ratio_n.log())

    def loss(
        self, cells: Minibatch, noise: Noise, kl_weight: float | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What training minimises the mean of, and what it reports: (cells,) nats each.

        Returns
        -------
        loss_n : kl_weight × KL(z) + KL(l) - reconstruction. A model with other terms overrides this, or
            :meth:`elbo_terms`, in any operations of PyTorch's and of :mod:`scvi_core.kernels`.
        elbo_n : the evidence lower bound, KL weight 1.
        """
        reconstruction_n, kl_z_n, kl_l_n = self.elbo_terms(cells, noise)
        return kl_weight * kl_z_n + kl_l_n - reconstruction_n, reconstruction_n - kl_z_n - kl_l_n


def build(config: ModelConfig, n_genes: int, n_batches: int, n_covariates: int, seed: int) -> SCVI:
    """A model with fresh weights, the same for the same seed; the library prior is to be filled by the trainer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SCVI(config, n_genes, n_batches, n_covariates, torch.zeros(n_batches), torch.ones(n_batches))
