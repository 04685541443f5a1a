"""Fit a model: the loop (``loop.py``), one step of it (``step.py``), and what they keep."""

from scvi_core.train.loop import HISTORY, Interrupted, elbo_of, train
from scvi_core.train.schedule import Schedule, hold_out

__all__ = ["HISTORY", "Interrupted", "Schedule", "elbo_of", "hold_out", "train"]
