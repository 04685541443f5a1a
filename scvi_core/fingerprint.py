"""What decides the weights of a fit, and the digest of it, by which a registry knows a model before it is made."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from scvi_core.config import ModelConfig, TrainConfig
from scvi_core.counts import Schema
from scvi_core.files import canonical_json, sha256_text

# Version of the numerics. Raise it when the same inputs no longer give the same weights, or a default changes: models
# of before are then trained anew. tests/unit/test_fingerprint.py fails where that was forgotten.
NUMERICS = 1


def fingerprint(
    schema: Schema,
    data: Any,
    model: ModelConfig,
    train: TrainConfig,
    seed: int,
    holdout: np.ndarray | None = None,
) -> str:
    """SHA-256 of the canonical JSON of everything that decides the weights.

    Parameters
    ----------
    schema : genes in order, batches and covariates.
    data : digests of the counts and of the kept barcodes (JSON-able).
    model, train : how it is fitted.
    seed : of initialisation, sampler and noise.
    holdout : positions of the cells held out, where the caller chose them.

    Notes
    -----
    Of the configuration only what is not at its default goes in, so that a new setting changes no fingerprint. Device
    and library versions are left out: they decide the last bits of the weights, not the model, and one who looks a
    model up on a laptop should find what a GPU has trained. They are on record in ``model.json``.
    """
    own = {key: getattr(model, key) for key in ModelConfig.model_fields}  # of a workflow's section, the model's part
    return sha256_text(
        canonical_json(
            {
                "numerics": NUMERICS,
                "schema": dataclasses.asdict(schema),
                "data": data,
                "model": ModelConfig(**own).model_dump(exclude_defaults=True),
                "train": train.model_dump(exclude_defaults=True),
                "seed": seed,
                "holdout": None if holdout is None else holdout.tolist(),
            }
        )
    )
