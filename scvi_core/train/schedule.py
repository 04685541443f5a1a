"""How long a fit goes on, its rates, and which cells it leaves out: all that is known before it begins."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from scvi_core.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Epochs and minibatches, and the rates of every step.

    Attributes
    ----------
    epochs : at most. steps : minibatches an epoch, of nearly equal size, so that the last is never a single cell.
    size : cells of the largest.
    rate_t : (epochs × steps,) learning rate of each step. kl_weight_t : weight of the KL term in its loss.
    """

    epochs: int
    steps: int
    size: int
    rate_t: tuple[float, ...]
    kl_weight_t: tuple[float, ...]

    @staticmethod
    def of(config: TrainConfig, n_cells: int) -> Schedule:
        """Of a fit to so many cells.

        ``auto`` epochs are 60 up to 2,000 cells and then fall with the root of their number, so that a large atlas
        takes more steps than a small one but fewer looks at each cell; never under 10. ``auto`` minibatches have 128
        cells at most, up to 20,000 cells, and more with the root of their number beyond: an atlas takes more steps than
        a small data set, but not in proportion, as each is then less noisy.
        """
        epochs, size = config.max_epochs, config.batch_size
        if epochs == "auto":
            epochs = max(10, round(60 * math.sqrt(2000 / max(2000, n_cells))))
        if size == "auto":
            size = round(128 * max(1.0, math.sqrt(n_cells / 20_000)))
        steps = max(1, min(math.ceil(n_cells / size), n_cells // 2))
        total = epochs * steps
        rates = tuple(_rate(config, step, total) for step in range(total))
        weights = tuple(_kl_weight(config, step, total) for step in range(total))
        return Schedule(epochs, steps, -(-n_cells // steps), rates, weights)


def _rate(config: TrainConfig, step: int, total: int) -> float:
    """Constant, or a linear rise over the first tenth of all steps and a half cosine down to zero."""
    if config.schedule == "constant":
        return config.learning_rate
    rise = 0.1 * total
    if step < rise:
        return config.learning_rate * min(1.0, (step + 1) / rise)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))


def _kl_weight(config: TrainConfig, step: int, total: int) -> float:
    """A linear rise over the warm-up's share of all steps, then full."""
    warmup = config.kl_warmup * total
    return config.kl_weight * min(1.0, (step + 1) / warmup) if warmup else config.kl_weight


def hold_out(config: TrainConfig, n_cells: int, seed: int) -> np.ndarray:
    """Positions of the cells set aside for validation, drawn at random, sorted: the share asked for, 10,000 at most."""
    order = np.random.default_rng([seed, 2**31]).permutation(n_cells)
    return np.sort(order[: min(10_000, round(config.validation_fraction * n_cells))])
