"""The kernels for GPUs through Triton's interpreter, on the CPU, and the recorded step, run without a graph.

Needs Triton, which PyTorch's builds for CUDA bring along; a GPU it does not need.
"""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _data import brief, cells, packed

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import _fake_gpu
import test_likelihood as reference
import test_step

from scvi_core import cli, kernels
from scvi_core.config import ModelConfig
from scvi_core.counts import Counts, tensor_of
from scvi_core.device import resolve_precision
from scvi_core.files import UserError
from scvi_core.kernels import Nonzeros, gpu, native
from scvi_core.model import build
from scvi_core.train import recorded, train

KINDS = ("zinb", "nb", "poisson")
CPU = torch.device("cpu")


@pytest.fixture
def interpreted(monkeypatch):
    _fake_gpu.interpret(monkeypatch)
    monkeypatch.setattr(native, "library", None)
    monkeypatch.setattr(gpu, "serves", lambda tensor: tensor.dtype == torch.float32)  # of the CPU, too


def exactly(x, logits, log_library_n, log_theta_ng, outer_n):
    """Value and gradients by the reference, in float64, each cell times its `outer_n`."""
    kind = "poisson" if log_theta_ng is None else KINDS[2 - len(logits)]
    rho, pi = logits[0], logits[-1]
    theta = torch.zeros(1, 1) if log_theta_ng is None else log_theta_ng
    leaves = [t.detach().double().requires_grad_() for t in (rho, log_library_n, theta, pi)]
    value_n = reference.equations(kind, x.dense().double(), *leaves)
    used = leaves[: reference.USED[kind]]
    return value_n.detach(), torch.autograd.grad((value_n * outer_n).sum(), used)


# The likelihood.


@pytest.mark.parametrize("theta_rows", ["1", "n"])
@pytest.mark.parametrize("kind", KINDS)
def test_likelihood_and_gradients_are_the_references(kind, theta_rows, interpreted):
    """Float32, with an upstream gradient of its own for every cell: within 3e-6 of the largest."""
    x, leaves = reference.tile(torch.float32, theta_rows, n=4, g=40)
    exact = [leaf.detach().double() for leaf in leaves]
    got_all = reference.answer(reference.kernel, kind, x, leaves)
    for got, expected in zip(got_all, reference.answer(reference.equations, kind, x.double(), exact), strict=True):
        assert got.dtype == torch.float32 and got.shape == expected.shape
        assert (got - expected).abs().max() <= 3e-6 * expected.abs().max()
    if kind == "nb":
        with torch.no_grad():
            assert torch.equal(reference.kernel(kind, x, *leaves), got_all[0])


@pytest.mark.parametrize("kind", KINDS)
def test_an_exponential_as_the_hardwares_is_good_enough(kind, interpreted, monkeypatch):
    """2 to the power of the argument times log2 e, rounded to float32, and off by 2^-22: the same bounds hold."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    exact, used = InterpreterBuilder.create_exp, []

    def approximate(self, x):
        if x.data.dtype != np.float32:
            return exact(self, x)
        used.append(x.data.size)
        off = 2**-22 * np.cos(1e6 * x.data.astype(np.float64))  # of any sign, the same for the same number
        power = np.exp2((x.data * np.float32(math.log2(math.e))).astype(np.float64))
        return TensorHandle((power * (1 + off)).astype(np.float32), x.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_exp", approximate)
    test_likelihood_and_gradients_are_the_references(kind, "n", None)
    assert used
    if kind != "poisson":
        test_gradients_at_hard_corners(kind, None, monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_read_where_they_lie_and_bfloat16_is_rounded_once(kind, interpreted):
    """Packed counts of other cells around, 16-bit genes, bytes; logits without their biases, tiles as they are."""
    _, counts = packed(cells(12, 50))
    assert counts.genes_m.dtype == torch.int16 and counts.values_m.dtype == torch.uint8
    rows_n = torch.tensor([7, 2, 11, 0])
    x = gpu.Rows(counts.indptr_n[rows_n], counts.indptr_n[rows_n + 1], counts.genes_m, counts.values_m, 50)
    gathered, generator = counts.gather(rows_n).x, torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    n_heads = 2 if kind == "zinb" else 1
    logits, biases = [normal(4, 50).bfloat16() for _ in range(n_heads)], [normal(50) for _ in range(n_heads)]
    log_theta_1g = None if kind == "poisson" else normal(1, 50)
    log_library_n = gathered.totals().log().float()
    given = log_library_n, log_theta_1g, None, True
    value_n, tiles, theta_ng, library_n = gpu.tile(x, logits, biases, *given)
    whole = [logit.float() + bias for logit, bias in zip(logits, biases, strict=True)]
    expected_n, expected = exactly(gathered, whole, log_library_n, log_theta_1g, 1.0)
    torch.testing.assert_close(value_n.double(), expected_n, rtol=1e-6, atol=0)
    torch.testing.assert_close(library_n.double(), expected[1], rtol=1e-5, atol=1e-5)
    of_logits = [expected[0], *expected[3:]]
    outer_n = torch.full((4,), -0.25)
    for tile_ng, wanted_ng in zip(tiles, of_logits, strict=True):
        assert tile_ng.dtype == torch.bfloat16
        size_ng = wanted_ng.abs() + 1e-5 * wanted_ng.abs().max()
        # the interpreter cuts digits off where a GPU rounds
        assert ((tile_ng.double() - wanted_ng).abs() <= 2**-7 * size_ng).all()
        (sum_g,) = gpu.sums(tile_ng, outer_n, None, 1)
        assert sum_g.dtype == torch.float32
        assert ((sum_g + wanted_ng.sum(0) / 4).abs() <= 2**-7 * size_ng.sum(0)).all()
    if kind != "poisson":
        sum_theta_1g = gpu.sums(theta_ng, outer_n, None, 1)
        assert ((sum_theta_1g + expected[2] / 4).abs() <= 2**-7 * expected[2].abs().max()).all()
    again = gpu.tile(gathered, logits, biases, *given)
    assert torch.equal(value_n, again[0])
    assert all(torch.equal(a, b) for a, b in zip(tiles, again[1], strict=True))
    torch.testing.assert_close(x.log1p(), gathered.dense().log1p(), rtol=3e-7, atol=0)


def test_numbers_of_16_bits_have_no_sign(interpreted, monkeypatch):
    """65,536 genes and counts to 65,535, as they are packed: what the same numbers of 32 bits give."""
    monkeypatch.setattr(gpu, "BLOCK", 2**16)
    genes, values = torch.tensor([3, 40_000, 2**16 - 1]), torch.tensor([40_000, 1, 2**16 - 1])
    narrow = [tensor_of(t.numpy(), np.uint16) for t in (genes, values)]
    assert all(t.dtype == torch.int16 for t in narrow)
    ends = torch.tensor([0]), torch.tensor([3])
    packed_x, x = gpu.Rows(*ends, *narrow, 2**16), gpu.Rows(*ends, genes.int(), values.int(), 2**16)
    assert torch.equal(packed_x.log1p(), x.log1p()) and x.log1p()[0, genes].equal(values.float().log1p())
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 2**16, generator=generator) for _ in range(3)]
    ask = given[::2], None, torch.tensor([11.5]), given[1], None, True
    answers = [gpu.tile(of, *ask) for of in (packed_x, x)]
    flat = [(value, *tiles, theta, library) for value, tiles, theta, library in answers]
    assert all(torch.equal(one, other) for one, other in zip(*flat, strict=True))


@pytest.mark.parametrize("logit", [None, -200.0, -4.0, 30.0, 200.0])
def test_values_at_hard_corners(logit, interpreted):
    """A single gene: counts to 1e6, means 1e-8 to 1e6, theta 1e-4 to 1e6, as exact arithmetic has them."""
    x, log_mu, log_theta = reference.corners(torch.float32)
    some = torch.arange(0, len(x), 25)
    x, log_mu, log_theta = x[some], log_mu[some], log_theta[some]
    pi = None if logit is None else torch.full_like(x, logit)
    got = kernels.log_likelihood(Nonzeros.of(x), torch.zeros_like(x), log_mu[:, 0], log_theta, pi)
    exact = []
    for k, m, t in zip(x[:, 0].int().tolist(), log_mu[:, 0].tolist(), log_theta[:, 0].tolist(), strict=True):
        h = logit if k else max(logit or 0, -80.0)
        exact.append(reference.nb_exact(k, m, t) if logit is None else reference.zinb_exact(k, m, t, h))
    exact = torch.tensor([float(v) for v in exact], dtype=torch.float64)
    slack = 6e-15 * x[:, 0].double()  # x times a log, 1e7, cancels to less
    reference.assert_within(got, exact, 2e-6 + 2e-6 * exact.abs() + slack)


@pytest.mark.parametrize("kind", ["nb", "zinb"])
def test_gradients_at_hard_corners(kind, interpreted, monkeypatch):
    """All corners as the genes of one cell, whose means are its share of the library: none is lost."""
    monkeypatch.setattr(gpu, "BLOCK", 512)
    monkeypatch.setattr(gpu, "SOME", 512)
    x, log_mu, log_theta = (t.T.contiguous() for t in reference.corners(torch.float32))
    for logit in (-200.0, -4.0, 30.0) if kind == "zinb" else (0.0,):
        log_library = log_mu.double().exp().sum(1).log().float()
        leaves = [log_mu, log_library, log_theta, torch.full_like(x, logit)]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        got_all = reference.answer(reference.kernel, kind, x, leaves)
        exact = [leaf.detach().double() for leaf in leaves]
        exact[3] = exact[3].where(x.double() > 0, exact[3].clamp(min=-80))
        # the first cell's upstream gradient is -1
        expected_all = reference.answer(reference.equations, kind, x.double(), exact)
        mu = log_mu.double().exp()
        size = x.double() + mu
        sizes = [expected_all[0].abs(), size + mu * size.sum() / mu.sum(), size.sum(1), size, torch.ones_like(size)]
        for got, expected, unit in zip(got_all, expected_all, sizes, strict=False):
            assert torch.isfinite(got).all()
            reference.assert_within(got, expected, 1e-7 + 3e-6 * (expected.abs() + unit), logit)


def test_what_is_no_number_stays_none(interpreted):
    """A guard looks at the sums: what is lost must not vanish in a maximum."""
    x, leaves = reference.tile(torch.float32, "1", n=1, g=20)
    for i in range(4):
        spoiled = [leaf.detach().clone() for leaf in leaves]
        spoiled[i].view(-1)[-1] = math.nan
        value_n = reference.kernel("zinb", x, *(leaf.requires_grad_() for leaf in spoiled))
        assert value_n.isnan().any(), i


@pytest.mark.parametrize(("n", "g"), [(0, 5), (1, 1), (2, 31), (2, 32), (2, 33)])
def test_shapes(n, g, interpreted):
    x, leaves = reference.tile(torch.float32, "n", n, g)
    exact = [leaf.detach().double() for leaf in leaves]
    expected_all = reference.answer(reference.equations, "zinb", x.double(), exact)
    for got, expected in zip(reference.answer(reference.kernel, "zinb", x, leaves), expected_all, strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got.double(), expected, rtol=3e-6, atol=3e-6 * float(expected.abs().sum()))


# A step.


@pytest.mark.parametrize(
    "how",
    [
        {"likelihood": "zinb", "dropout": 0.3, "n_layers": 2},
        {"likelihood": "zinb", "dispersion": "gene-cell", "library": "latent"},
        {"likelihood": "nb", "dispersion": "gene-batch"},
        {"likelihood": "poisson", "decoder": "linear"},
    ],
)
@pytest.mark.parametrize("half", [False, True])
def test_gradients_are_autograds(how, half, interpreted, monkeypatch):
    ours = test_step.step(n=5, half=half, **how)
    monkeypatch.setattr(gpu, "serves", lambda tensor: False)
    theirs = test_step.step(n=5, half=half, **how)
    if half:
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=0)
        ours = (theirs[0], *ours[1:])
    # the interpreter cuts bfloat16 off where GPUs, and PyTorch, round
    test_step.compare(ours, theirs, 2**-5 if half else 2e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_adam_is_adam(interpreted, monkeypatch, masked):
    one, other = ([torch.linspace(-1, 1, 70), *torch.zeros(2, 70)] for _ in range(2))
    for step in range(1, 5):
        gradient = torch.randn(70, generator=torch.Generator().manual_seed(step))
        numbers, mask = kernels.corrected(0.01, step), torch.arange(70) % 3 > 0 if masked else None
        for of, rates in ((one, numbers), (other, torch.tensor(numbers))):
            monkeypatch.setattr(gpu, "serves", lambda tensor, of=of: of is other)
            kernels.adam(*([part] for part in (of[0], gradient, *of[1:], mask)), rates, 1e-4, 1e-3)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def fit(model=None, **train_how):
    """(weights, history) of two epochs of three steps, of two sizes: 7 cells and 2 held out."""
    schema, counts = packed(cells(9, 20), batch_key=None)
    config = ModelConfig(n_hidden=8, n_latent=2, **{"likelihood": "poisson", **(model or {})})
    network = build(config, 20, len(schema.batches), 0, 0)
    config = brief(max_epochs=2, batch_size=3, precision="float32")
    config = config.model_copy(update=train_how)  # unchecked: one test asks for a rate that no user may
    rows, held = np.arange(7), np.arange(7, 9)
    history = train(network, counts, rows, held, config, 0, CPU, progress=False)
    return network.state_dict(), history.drop(columns="seconds")


@pytest.mark.parametrize(
    "how",
    [
        {"gradient_clip": 1.0, "weight_decay": 1e-2, "model": {"likelihood": "zinb"}},
        {"model": {"decoder": "linear", "loadings_l1": 0.3}, "precision": "bf16"},
    ],
)
def test_recorded_steps_are_the_loops(how, interpreted, monkeypatch):
    recorded = fit(**how)
    monkeypatch.setattr(gpu, "serves", lambda tensor: False)
    plain = fit(**how)
    near = 1e-2 if "precision" in how else 1e-4  # six steps of Adam, on bfloat16's products or float32's
    for name, value in plain[0].items():
        torch.testing.assert_close(recorded[0][name], value, rtol=near, atol=near, msg=name)
    np.testing.assert_allclose(recorded[1], plain[1], rtol=near)


def test_a_loss_that_is_lost_is_seen(interpreted):
    with pytest.raises(UserError, match=r"not finite at epoch 1.*learning_rate"):
        fit(learning_rate=1e30)


# Without Triton, and without enough memory.


def test_without_triton_the_reason_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "scvi_core.kernels.triton_kernels", None)
    monkeypatch.delattr("scvi_core.kernels.triton_kernels", raising=False)
    gpu._triton.cache_clear()
    tensor = SimpleNamespace(dtype=torch.float32, is_cuda=True, device=torch.device("cuda"))
    try:
        assert not gpu.serves(tensor) and gpu.reason().startswith("Triton cannot be used (")
        assert kernels.kind(tensor) == ("plain", gpu.reason())
    finally:
        gpu._triton.cache_clear()


def test_the_budget_is_known_before_training(monkeypatch, caplog):
    schema, counts = packed(cells(60, 25))
    model = build(ModelConfig(), 25, len(schema.batches), 0, 0)
    taken, needed, meta = counts.nbytes, recorded.bytes_to_train(model, 128, fused=True), torch.device("meta")
    assert needed < recorded.bytes_to_train(model, 128, fused=False) < recorded.bytes_to_train(model, 4096, fused=False)
    for free, fits in ((taken + needed, True), (taken + needed - 1, False)):
        monkeypatch.setattr(gpu, "free_bytes", lambda device, free=free: free)
        caplog.clear()
        placed = recorded.place(counts, needed, 128, meta)
        assert (placed.indptr_n.device == meta) == fits
        assert ("on the device" if fits else "stay in the computer's memory") in caplog.text
    assert placed.gather(torch.arange(3)).x.x_m.device == meta
    assert type(placed.to(CPU)) is Counts and placed.to(CPU).genes_m is counts.genes_m
    monkeypatch.setattr(gpu, "free_bytes", lambda device: needed - 1)
    with pytest.raises(UserError, match=r"^train\.batch_size: a step on 128 cells x 25 genes needs .* lower train\."):
        recorded.place(counts, needed, 128, CPU)


def test_running_out_of_memory_names_the_settings():
    message = r"ran out of memory .*lower train\.batch_size .*train\.memory_gb"
    with pytest.raises(UserError, match=message), recorded.naming_memory(128):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_a_question_that_fills_the_gpu_ends_in_one_line(monkeypatch, capsys):
    def fill():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(cli, "app", fill)
    with pytest.raises(SystemExit):
        cli.main()
    message = "error: the GPU ran out of memory (CUDA out of memory); free it, lower genes.n_top"
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(("major", "half"), [(7, False), (9, True)])
def test_bfloat16_is_taken_where_the_gpu_multiplies_in_it(major, half, monkeypatch):
    """A GPU of before 2020 has it by emulation alone, which is slower than float32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert resolve_precision("auto", torch.device("cuda")) == half


@pytest.fixture
def benchmark(monkeypatch):
    """benchmarks/gpu.py, whose name is also that of a module here."""
    path = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("benchmark_gpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_runs_on_toy_sizes(benchmark, tmp_path, capsys):
    arguments = ["--tiny", "--cells", "40", "--genes", "12", "--json", str(tmp_path / "gpu.json")]
    found = benchmark.run(benchmark._options(arguments))
    names = {"ceilings", "correct", "kernels 12", "fit 12", "de 12", "stream 12", "peer 12"}
    assert set(found) - {"about", "missing"} == names - set(found["missing"])
    assert set(found["missing"]) <= {"peer 12"}  # scvi-tools need not be here
    assert json.loads((tmp_path / "gpu.json").read_text())["fit 12"]["cells"] == 40
    assert found["correct"]["zinb, float32"]["gradient"] < 1e-5
    assert "fit 12: cells 40" in capsys.readouterr().out


def test_the_benchmark_tells_what_it_could_not_do(benchmark, monkeypatch, tmp_path):
    """JSON has no number for a gradient that is lost: it is told all the same, and so is what no time was left for."""
    monkeypatch.setattr(benchmark, "ceilings", lambda *_: {"copy_gb_s": math.inf})
    monkeypatch.setattr(benchmark, "correct", lambda *_: {"zinb, bf16": {"elbo": math.nan, "gradient": math.nan}})
    clock = iter([0.0] * 5 + [1e6] * 99)  # two parts' time
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    benchmark.run(benchmark._options(["--tiny", "--genes", "12", "--json", str(tmp_path / "gpu.json")]))
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert told["correct"]["zinb, bf16"]["gradient"] == "nan" and told["ceilings"]["copy_gb_s"] == "inf"
    assert told["missing"]["peer 12"] == "no time was left"


def test_the_benchmark_times_recorded_steps(benchmark, request, monkeypatch):
    benchmark._source(12, CPU)  # while kernels are quick
    request.getfixturevalue("interpreted")
    monkeypatch.setattr(gpu, "BLOCK", 4096)
    options = benchmark._options(["--tiny", "--cells", "2"])
    found = benchmark.step_parts(12, CPU, options, {"ceilings": {"copy_gb_s": 1.0, "bf16_tflop_s": 1.0}})
    assert {"likelihood and gradients, Triton", "a step, recorded", "a step, kernel by kernel"} <= set(found["parts"])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """Down to the machine code of an H100, with Triton's own assembler; nothing is run."""
    code = """
from gpu_count import compiled
from scvi_core.kernels import triton_kernels

for given in ((2, True, "*i16", "*u8"), (1, False, "*i32", "*i16"), (0, True, "*i16", "*fp32")):
    for name in [name for name in vars(triton_kernels) if name.endswith("_kernel")]:
        assert compiled(name, *given).asm["cubin"], name
"""
    paths = [str(Path(__file__).parents[2] / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_step_is_counted(tmp_path):
    """Instructions for an H100 and bytes of a step, by benchmarks/gpu_count.py, on no GPU."""
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_count.py"
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(script), "--cells", "64", "--genes", "500"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = dict(re.findall(r"^\| (\w+) \| (.+) \|$", done.stdout, re.MULTILINE))
    registers, spilled, what, instructions, _ = rows["nonzeros"].split(" | ")
    assert 16 < int(registers) < 255 and spilled == "0" and what == "non-zero" and int(instructions) > 100
    assert float(rows["zeros_gradient_kernel"]) >= 10 and float(rows["all"]) > 40  # two tiles read, three written
