"""Parity with scvi-tools at equal weights: committed values always, itself where it is installed. See ``parity.py``."""

import parity
import pytest
import torch
from parity import in_our_names

from scvi_core.kernels import native

SINGLE, DOUBLE = 1e-5, 1e-9
each_case = pytest.mark.parametrize("case", parity.CASES, ids=str)
sharp_too = pytest.mark.parametrize("case", parity.CASES + parity.SHARP, ids=str)


def beyond(deviations, tolerance):
    """What deviates more than it may, NaN too."""
    return {name: value for name, value in deviations.items() if not value <= tolerance}


@each_case
@pytest.mark.parametrize("kernels", ["compiled", "plain"])
def test_ours_is_what_scvi_tools_gave(case, kernels, monkeypatch):
    if kernels == "plain":
        monkeypatch.setattr(native, "library", None)
    elif native.library is None:
        pytest.skip(f"compiled kernels: {native.reason}")
    cells, state, peer = parity.read(case)
    got = parity.ours(case, state, cells, torch.float32)
    assert not beyond(parity.deviations(case, got, in_our_names(case, peer)), SINGLE)


@sharp_too
def test_ours_is_the_float64_reference(case):
    cells, state, _ = parity.read(case)
    exact = in_our_names(case, parity.reference(case, state, cells))
    for dtype, tolerance in ((torch.float32, SINGLE), (torch.float64, DOUBLE)):
        got = parity.ours(case, state, cells, dtype)
        assert not beyond(parity.deviations(case, got, exact), tolerance), dtype


@sharp_too
def test_scvi_tools_is_the_reference_and_its_constant(case):
    """What it adds in its logs and its rounding are all that sets it apart from the equations."""
    cells, state, peer = parity.read(case)
    with_eps = parity.reference(case, state, cells, parity.EPS)
    assert not beyond(parity.deviations(case, *(in_our_names(case, v) for v in (peer, with_eps))), SINGLE)


@pytest.mark.parametrize("case", parity.SHARP, ids=str)
def test_where_scvi_tools_constant_is_felt(case):
    """Not a defect of ours: there both are as far apart as the constant drives the reference, and no further."""
    cells, state, peer = parity.read(case)
    exact, with_eps = (in_our_names(case, parity.reference(case, state, cells, eps)) for eps in (0.0, parity.EPS))
    got = parity.ours(case, state, cells, torch.float32)
    apart = parity.deviations(case, got, in_our_names(case, peer))
    by_constant = parity.deviations(case, exact, with_eps)
    assert max(apart.values()) > 10 * SINGLE
    assert apart == pytest.approx(by_constant, rel=0, abs=SINGLE)


def test_a_wrong_weight_is_noticed():
    """The measure is not blind: no weight can be off by a part in a thousand without a term or gradient telling."""
    case = parity.Case("zinb", "gene-batch", "latent", train=True)
    cells, state, peer = parity.read(case)
    for name in filter(parity.is_parameter, state):
        if ".0.bias" in name and "fc_layers" in name:
            continue  # batch norm takes it away
        other = state | {name: state[name] * 1.001}
        got = parity.ours(case, other, cells, torch.float32)
        assert beyond(parity.deviations(case, got, in_our_names(case, peer)), SINGLE), name


def test_scvi_tools_itself():
    """It gives the committed values, and ours are its: in every case, Poisson's dispersions too."""
    pytest.importorskip("scvi", reason="scvi-tools is not installed (pip install 'scvi-core[peer]')")
    for case in parity.CASES + parity.SHARP:
        cells, state, committed = parity.read(case)
        live = in_our_names(case, parity.theirs(case, state, cells))
        assert not beyond(parity.deviations(case, live, in_our_names(case, committed)), SINGLE), case
        if case in parity.CASES:
            got = parity.ours(case, state, cells, torch.float32)
            assert not beyond(parity.deviations(case, got, live), SINGLE), case
