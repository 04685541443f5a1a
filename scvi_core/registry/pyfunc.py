"""What ``mlflow.pyfunc.load_model`` runs: the installed scvi_core on a bundle of safetensors and JSON.

MLflow stores the name of this module in the model, not code and not pickles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scvi_core.mapping import embed

if TYPE_CHECKING:
    import pandas as pd

    from scvi_core.api import Model


class Embedder:
    """A registered model as MLflow wants it: an object with ``predict``."""

    def __init__(self, model: Model):
        self.model = model

    def predict(self, model_input: Any) -> pd.DataFrame:
        """Embed new cells; see :func:`scvi_core.mapping.embed`."""
        return embed(self.model, model_input)


def _load_pyfunc(data_path: str) -> Embedder:
    """Entry point that MLflow calls with the bundle's folder (the name is MLflow's)."""
    from scvi_core.api import load

    return Embedder(load(data_path))
