"""The whole path of a GPU, on a fake one (``_fake_gpu.py``): fits, recorded steps, questions, the benchmark.

In Triton's interpreter, so everything is small.
"""

import math
import os
import sys

import numpy as np
import pytest
import torch
from _data import brief, cells, packed

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import _fake_gpu
from _samples import stored
from test_gpu import benchmark  # noqa: F401 (a fixture)
from test_stream import both, fresh

import scvi_core as sv
from scvi_core import criticism, posterior, stream
from scvi_core.config import CriticismConfig, DeConfig, ModelConfig
from scvi_core.device import resolve_device
from scvi_core.files import Decisions
from scvi_core.kernels import gpu
from scvi_core.model import build
from scvi_core.train import Interrupted, recorded, train
from scvi_core.train import step as one_step

CUDA = torch.device("cuda")


@pytest.fixture
def card(monkeypatch):
    there = _fake_gpu.insert(monkeypatch)
    with there:
        yield there


def fit(device, adata=None, seed=0, model=None, **how):
    config = brief(**{"max_epochs": 2, "batch_size": 4, "precision": "float32", "early_stopping": False, **how})
    sizes = ModelConfig(n_hidden=8, n_latent=2, **(model or {}))
    given = {"categorical_covariates": ["day"], "continuous_covariates": ["age"], "holdout": [3, 8]}
    adata = cells(14, 20) if adata is None else adata
    return sv.fit(adata, "batch", model=sizes, train=config, seed=seed, device=device, progress=False, **given)


def weights(model):
    return {name: value.cpu() for name, value in model.network.state_dict().items()}


def test_an_impossible_step_is_refused(card):
    """The card itself: what a GPU or a recording would not bear."""
    here, there = torch.arange(3.0), torch.arange(3.0, device=CUDA)
    assert there.is_cuda and (there + 1).is_cuda and torch.equal((there * here[2]).cpu(), here * 2)
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(RuntimeError, match="numpy"):
        there.numpy()
    recorded = _fake_gpu.Graph()
    with pytest.raises(AssertionError, match="the same at every replay"), recorded.record():
        pass
    recorded.register_generator_state(None)
    for wait in (there.sum().item, there.cpu, there.nonzero, lambda: here.to(CUDA), lambda: there[there > 1]):
        with pytest.raises(AssertionError, match="not within a recorded step"), recorded.record():
            wait()
    recorded.tape.clear()
    with recorded.record():
        total = (there[1:] * 2).sum()
        there[:1] = total
    assert total.isnan()
    there.copy_(here)
    recorded.replay()
    assert total.item() == 6 and there.cpu().tolist() == [6.0, 1.0, 2.0]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize(
    "model",
    [
        {},
        {"likelihood": "nb", "dispersion": "gene-batch", "library": "latent"},
        {"dispersion": "gene-cell", "n_layers": 2},
        {"likelihood": "poisson", "decoder": "linear", "loadings_l1": 0.1},
    ],
)
def test_a_fit_is_that_of_the_cpu(model, precision, card):
    """Recorded steps of two sizes, with noise of their own each. TF32 is for products beside bfloat16's alone."""
    ours = fit("cuda", model=model, gradient_clip=1.0, precision=precision)
    assert card.replays == 2 * 3 and ours.card["device"] == "cuda" and ours.card["kernels"] == "triton"
    half = precision == "bf16"
    assert {on for kind, on in card.precisions if kind == torch.float32} == {half}
    assert ((torch.bfloat16, True) in card.precisions) == half and not _fake_gpu.in_tf32()
    theirs = fit("cpu", model=model, gradient_clip=1.0, precision=precision)
    columns = ["train_elbo", "validation_elbo"]
    np.testing.assert_allclose(ours.history[columns], theirs.history[columns], rtol=2e-3 if half else 1e-4)
    others = weights(theirs)
    for name, value in weights(ours).items():
        if not half and not name.endswith("linear.bias"):  # before a batch norm: moved by rounding alone
            torch.testing.assert_close(value, others[name], rtol=1e-3, atol=1e-4, msg=name)


def test_no_step_waits_for_the_device(card):
    waited = []
    for batch_size in (6, 2):
        card.waits = 0
        fit("cuda", model={"likelihood": "poisson"}, batch_size=batch_size)
        waited.append(card.waits)
    assert card.replays == 2 * (2 + 6) and waited[0] == waited[1]


def test_the_same_bits_wherever_the_counts_are_and_however_steps_run(card, monkeypatch):
    """On the device; in the computer's memory, sent while the device works; kernel by kernel, as recording fails."""
    model = {"likelihood": "poisson"}
    on_card = weights(fit("cuda", model=model, seed=3))
    with monkeypatch.context() as on_host:
        stay = lambda counts, needed, size, device: sv.counts.OnHost(**vars(counts), device=device)  # noqa: E731
        on_host.setattr(recorded, "place", stay)
        fed = weights(fit("cuda", model=model, seed=3))
    replays = card.replays
    calls = []

    def gradients(model, cells, noise, weight):
        calls.append(card.tape is not None)
        if calls[-1]:
            raise RuntimeError("operation not permitted when stream is capturing")
        return step(model, cells, noise, weight)

    step = one_step.gradients
    with monkeypatch.context() as failing:
        failing.setattr(one_step, "gradients", gradients)
        by_kernel = weights(fit("cuda", model=model, seed=3))
    assert card.replays == replays and calls.count(True) == 1  # of two sizes, the second is not tried
    for name, value in on_card.items():
        assert torch.equal(value, fed[name]) and torch.equal(value, by_kernel[name]), name


def test_a_caller_who_chose_a_precision_keeps_it(card):
    """PyTorch has two ways to say so, and does not bear both."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("PyTorch before 2.9 has one way")
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for chosen in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = chosen
            fit("cuda", model={"likelihood": "poisson"}, max_epochs=1, precision="bf16")
            assert torch.backends.cuda.matmul.fp32_precision == chosen and card.replays
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_an_interrupted_fit_goes_on_bit_for_bit(card, tmp_path):
    def go(stop=lambda: False, checkpoint=None):
        schema, counts = packed(cells(9, 20), batch_key=None)
        network = build(ModelConfig(n_hidden=8, n_latent=2, likelihood="poisson"), 20, len(schema.batches), 0, 0)
        config, rows = brief(max_epochs=2, batch_size=3, precision="float32"), np.arange(7)
        args = config, 0, CUDA, checkpoint, "x", False, stop
        train(network, counts, rows, np.arange(7, 9), *args, every=math.inf)
        return {name: value.cpu() for name, value in network.state_dict().items()}

    whole, asked = go(), iter([False] * 4 + [True] + [False] * 9)
    with pytest.raises(Interrupted):
        go(lambda: next(asked), tmp_path / "state")
    again = go(checkpoint=tmp_path / "state")
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_a_stream_from_disk_feeds_the_card(card, tmp_path, monkeypatch):
    """Blocks are read, their cells sent as they are packed, in the order in which the CPU would take them."""
    monkeypatch.setattr(stream, "BLOCK", 30)
    _, streamed = both(stored(tmp_path, cells(16, 20)), slots=3)
    assert type(streamed) is stream.Stream
    rows, held, found = np.arange(1, 16), np.arange(1), []
    for device in (CUDA, torch.device("cpu")):
        network = build(ModelConfig(n_hidden=8, n_latent=2, likelihood="poisson"), 20, 2, 0, 0)
        config = brief(max_epochs=2, batch_size=5, precision="float32")
        found.append(train(network, fresh(streamed), rows, held, config, 0, device, progress=False)["train_elbo"])
    assert card.replays == 6
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_questions_have_the_answers_of_the_cpu(card, tmp_path):
    adata = cells(24, 20)
    theirs = fit("cpu", adata)
    theirs.save(tmp_path / "model")
    ours = sv.load(tmp_path / "model", device="cuda")
    near = {"rtol": 1e-4, "atol": 1e-5}
    for name in ("latent", "latent_std", "latent_library_size", "elbo"):
        np.testing.assert_allclose(getattr(ours, name)(adata), getattr(theirs, name)(adata), **near)
    answers = [
        (
            model.marginal_log_likelihood(adata[:5], n_samples=3),
            model.normalized_expression(adata, transform_batch=["b0", "b1"]).to_numpy(),
            model.expression_samples(adata, ["G3", "G1"], n_samples=2),
            model.gene_correlation(adata, ["G0", "G1", "G2"]).to_numpy(),
        )
        for model in (ours, theirs)
    ]
    for one, other in zip(*answers, strict=True):
        np.testing.assert_allclose(one, other, **near)
    assert ours.posterior_predictive(adata).shape == (24, 20)
    for how in ({}, {"compare": "means"}, {"reference": "pairs", "delta": "auto"}, {"mode": "vanilla"}):
        config = DeConfig(groupby="kind", min_cells=2, n_samples=100, **how)
        tables = [model.differential_expression(adata, "kind", config=config) for model in (ours, theirs)]
        one, other = (table.sort_values(["group", "reference", "gene_id"]) for table in tables)
        columns = ["lfc_mean", "lfc_median", "lfc_ci_low", "proba_de", "scale_group", "raw_mean_group"]
        np.testing.assert_allclose(one[columns], other[columns], rtol=1e-3, atol=1e-3)
    counts = ours._counts(adata)
    names = adata.obs_names, ours.gene_ids, ours.gene_names, adata.obs["kind"].to_numpy()
    found = criticism.criticise(
        ours.network, counts, *names, CriticismConfig(n_replicates=19), 0, Decisions("criticism")
    )
    assert len(found.summary["checks"])


def test_counts_that_do_not_fit_stay_in_the_computers_memory(card, caplog):
    """For questions, too."""
    adata = cells(24, 20)
    model = fit("cuda", adata, model={"likelihood": "poisson"}, max_epochs=1)
    resident = model.latent(adata)
    card.free = 10**6
    caplog.clear()
    counts = model._counts(adata)
    assert type(counts) is sv.counts.OnHost and "stay in the computer's memory" in caplog.text
    np.testing.assert_array_equal(posterior.latent(model.network, counts), resident)
    with pytest.raises(
        sv.UserError, match=r"train\.batch_size: a step on \d+ cells .* needs .* lower train\.batch_size"
    ):
        fit("cuda", adata)


def test_the_benchmark_runs_on_the_card(card, benchmark, monkeypatch):  # noqa: F811
    """Its parts that are not timings, which have no `--tiny` of their own on a GPU."""
    model, counts, group_n = benchmark._source(12, torch.device("cpu"))
    benchmark._sources[12, "cuda"] = model.to(CUDA), counts.to(CUDA), group_n
    options = benchmark._options(["--tiny", "--cells", "12", "--genes", "12"])
    monkeypatch.setattr(benchmark, "ceilings", lambda *_: {"copy_gb_s": 1.0, "bf16_tflop_s": 1.0})
    short = lambda config=sv.TrainConfig, **how: config(**{"max_epochs": 1, **how})  # noqa: E731
    monkeypatch.setattr(sv, "TrainConfig", short)
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)  # which the card has not
    counts, schema, group_n = benchmark.simulated(12, 12, CUDA)
    assert counts.indptr_n.device.type == "cpu"
    told, fitted = benchmark.fitted(counts, schema, CUDA)
    assert told["kernels"] == "triton" and math.isfinite(told["validation_elbo"])
    assert benchmark.asked(fitted, counts, schema, group_n, CUDA)["groups"] > 1
    parts = benchmark.step_parts(12, CUDA, options, {"ceilings": benchmark.ceilings()})["parts"]
    assert {"likelihood and gradients, Triton", "a step, recorded", "a step, kernel by kernel"} <= set(parts)
    assert resolve_device("auto").type == "cuda" and gpu.reason() == ""
