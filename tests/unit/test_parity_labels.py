"""scANVI at parity with scvi-tools: committed values always, itself where it is installed. See ``parity_labels.py``."""

import parity
import parity_labels
import pytest
import torch
from test_parity import SINGLE, beyond

from scvi_core.kernels import native

each_case = pytest.mark.parametrize("case", parity_labels.CASES, ids=str)
CELLS = parity.simulate()


def told(case, deviations):
    """Those that are to be small. Batch norm takes a bias away: its gradient is a sum of rounding errors in both."""
    lost = {k: v for k, v in deviations.items() if case.train and k.endswith("linear.bias")}
    assert not beyond(lost, 1e-4)
    return {k: v for k, v in deviations.items() if k not in lost}


@each_case
@pytest.mark.parametrize("kernels", ["compiled", "plain"])
def test_ours_is_what_scvi_tools_gave(case, kernels, monkeypatch):
    if kernels == "plain":
        monkeypatch.setattr(native, "library", None)
    elif native.library is None:
        pytest.skip(f"compiled kernels: {native.reason}")
    state, (parts, gradients) = parity_labels.read(case)
    expected = parts, parity_labels.transfer(case, gradients)
    for dtype, tolerance in ((torch.float32, SINGLE), (torch.float64, SINGLE / 10)):
        got = parity_labels.ours(case, state, CELLS, dtype)
        assert not beyond(told(case, parity_labels.deviations(case, got, expected)), tolerance)


def test_a_wrong_weight_of_the_labels_part_is_noticed():
    case = parity_labels.Case("mlp", "zinb", 14, False)
    state, (parts, gradients) = parity_labels.read(case)
    expected = parts, parity_labels.transfer(case, gradients)
    for name in state:
        if name.startswith(("classifier", "encoder_z2", "decoder_z1")) and parity.is_parameter(name):
            got = parity_labels.ours(case, state | {name: state[name] * 1.01}, CELLS, torch.float32)
            assert beyond(parity_labels.deviations(case, got, expected), SINGLE), name


def test_scvi_tools_itself():
    """It gives the committed values."""
    pytest.importorskip("scvi", reason="scvi-tools is not installed (pip install 'scvi-core[peer]')")
    for case in parity_labels.CASES:
        state, committed = parity_labels.read(case)
        live = parity_labels.theirs(case, state, CELLS)
        for one, other in zip(live, committed, strict=True):
            assert all(torch.allclose(one[k], other[k], rtol=1e-6, atol=1e-9) for k in other)
