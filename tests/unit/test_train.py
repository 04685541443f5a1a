import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import time

import numpy as np
import pytest
import torch
from _data import brief, cells, packed
from _samples import stored
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scvi_core import api, cli
from scvi_core.config import ModelConfig, TrainConfig
from scvi_core.device import resolve_device
from scvi_core.files import UserError
from scvi_core.kernels import native
from scvi_core.log import log
from scvi_core.model import Noise, build
from scvi_core.train import HISTORY, Interrupted, Schedule, elbo_of, loop, train
from scvi_core.train import step as one_step
from scvi_core.train.state import State

CPU = torch.device("cpu")
SMALL = {"n_hidden": 8, "n_latent": 2}


def fit(adata=None, config=None, seed=0, holdout=range(0, 60, 6), model=None, **more):
    """(network, history) of a fit to small data."""
    schema, counts = packed(cells() if adata is None else adata)
    network = build(ModelConfig(**{**SMALL, **(model or {})}), 25, len(schema.batches), 0, seed)
    held = np.array(list(holdout), dtype=np.int64)
    rows = np.setdiff1d(np.arange(len(counts)), held)
    history = train(network, counts, rows, held, config or brief(), seed, CPU, progress=False, **more)
    return network, history


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "model", [{}, {"library": "latent"}, {"dispersion": "gene-batch", "likelihood": "nb"}, {"dispersion": "gene-cell"}]
)
def test_the_seed_decides_the_weights(model):
    torch.manual_seed(1)
    first, history = fit(model=model)
    torch.manual_seed(2)
    again, _ = fit(model=model)
    other, _ = fit(seed=1, model=model)
    assert same(first, again) and not same(first, other)
    assert list(history.columns) == HISTORY and list(history["epoch"]) == [1, 2, 3, 4]
    assert history.drop(columns="seconds").notna().all(axis=None) and not first.training


def test_it_learns():
    _, history = fit(config=brief(max_epochs=30, early_stopping=False))
    assert history["validation_elbo"].iloc[-1] > history["validation_elbo"].iloc[0] + 5
    assert history["train_elbo"].iloc[-1] > history["train_elbo"].iloc[0] + 5


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("n_cells", [2, 3, 129, 20_000, 1_300_000])
@pytest.mark.parametrize("epochs", [1, "auto"])
def test_kl_warmup_always_completes(share, n_cells, epochs):
    config = TrainConfig(max_epochs=epochs, kl_warmup=share, kl_weight=1.5)
    schedule = Schedule.of(config, n_cells)
    kl_weight, total = schedule.kl_weight_t, schedule.epochs * schedule.steps
    assert len(kl_weight) == len(schedule.rate_t) == total
    assert kl_weight[total - 1] == 1.5
    assert kl_weight[min(math.ceil(share * total), total - 1)] == 1.5
    weights = list(kl_weight[:: max(1, total // 50)])
    assert weights == sorted(weights) and weights[0] > 0
    if share and total > 50:
        assert kl_weight[0] < 0.1
        middle = kl_weight[int(share * total / 2)]
        assert abs(middle - 0.75) <= 1.5 / (share * total) + 1e-9  # half way, to within a step


def test_kl_weight_and_rate_are_on_record():
    _, history = fit(config=brief(max_epochs=8, kl_warmup=0.5, schedule="cosine", early_stopping=False))
    assert history["kl_weight"].is_monotonic_increasing and history["kl_weight"].iloc[3] == 1.0
    assert history["kl_weight"].iloc[0] == pytest.approx(0.25)
    assert history["learning_rate"].idxmax() == 0 and history["learning_rate"].iloc[-1] < 1e-3
    assert fit(config=brief(max_epochs=1, kl_warmup=1.0))[1]["kl_weight"].iloc[-1] == 1.0


def test_cosine_schedule():
    config = TrainConfig(schedule="cosine", learning_rate=0.2, max_epochs=20, batch_size=10)
    rates = Schedule.of(config, 100).rate_t
    assert len(rates) == 200
    assert np.argmax(rates) in (19, 20) and max(rates) == pytest.approx(0.2) and 0 < rates[-1] < 1e-4
    assert all(np.diff(rates[:20]) > 0) and all(np.diff(rates[20:]) < 0)
    (alone,) = Schedule.of(config.model_copy(update={"max_epochs": 1}), 3).rate_t
    assert 0 < alone <= 0.2


@pytest.mark.parametrize("n_cells", [2, 3, 4, 5, 127, 128, 129, 130, 255, 257, 1001])
@pytest.mark.parametrize("batch_size", [2, 3, 128])
def test_minibatches_are_of_near_equal_size(n_cells, batch_size):
    schedule = Schedule.of(TrainConfig(batch_size=batch_size), n_cells)
    sizes = [len(part) for part in np.array_split(np.arange(n_cells), schedule.steps)]
    assert max(sizes) == schedule.size
    assert min(sizes) >= 2 and max(sizes) - min(sizes) <= 1 and max(sizes) <= max(batch_size, 3)


@pytest.mark.parametrize(("n", "batch_size"), [(3, 2), (3, 128), (129, 128), (2, 2), (33, 16)])
def test_last_minibatch_of_any_size(n, batch_size):
    _, history = fit(cells(n), brief(batch_size=batch_size, max_epochs=2), holdout=[])
    assert len(history) == 2 and history["train_elbo"].notna().all() and history["validation_elbo"].isna().all()


def test_too_few_cells():
    with pytest.raises(UserError, match="1 cells to train on; at least 2"):
        fit(cells(5), holdout=range(4))
    with pytest.raises(UserError, match="1 training cells; a latent library size needs 2"):
        fit(cells(5), holdout=[1], model={"library": "latent"})


def test_early_stopping_restores_the_best_weights():
    config = brief(max_epochs=200, patience=5, learning_rate=0.05, adam_eps=1e-8, kl_warmup=0.02)
    network, history = fit(config=config)
    assert len(history) < 200
    warm = history[history["kl_weight"] == 1.0]
    best = warm["validation_elbo"].idxmax()
    assert history["epoch"].iloc[-1] - history["epoch"][best] == 5
    _schema, counts = packed(cells())
    held = counts.subset(np.arange(0, 60, 6))
    assert elbo_of(network, held, 0) == pytest.approx(warm["validation_elbo"][best], rel=1e-12)
    # without it, all epochs run and the last weights stay
    network, history = fit(config=config.model_copy(update={"early_stopping": False, "max_epochs": 12}))
    assert len(history) == 12
    assert elbo_of(network, held, 0) == pytest.approx(history["validation_elbo"].iloc[-1])


def test_held_out_cells_are_never_trained_on():
    adata, held = cells(), np.arange(0, 60, 6)
    config = brief(early_stopping=False)
    for library in ("observed", "latent"):
        network, history = fit(adata, config, model={"library": library})
        other = adata.copy()
        other.X = other.X.toarray()
        other.X[held] = np.random.default_rng(5).poisson(9, (len(held), 25)) + 1
        changed, changed_history = fit(other, config, model={"library": library})
        assert same(network, changed)
        assert (history["train_elbo"] == changed_history["train_elbo"]).all()
        assert (history["validation_elbo"] != changed_history["validation_elbo"]).all()


def test_prior_of_the_library_size():
    adata = cells()
    network, _ = fit(adata, holdout=range(0, 60, 6), model={"library": "latent"})
    rows = np.setdiff1d(np.arange(60), np.arange(0, 60, 6))
    log_library = np.log(np.asarray(adata.X.sum(1)).ravel())[rows]
    for s in (0, 1):
        mine = log_library[(rows % 2) == s]
        assert network.library_mean_s[s] == pytest.approx(mine.mean(), rel=1e-6)
        assert network.library_variance_s[s] == pytest.approx(mine.var(ddof=1), rel=1e-5)


def test_cuda_is_never_silently_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device; use device: cpu or auto"):
        resolve_device("cuda")
    assert resolve_device("auto").type == resolve_device("cpu").type == "cpu"
    monkeypatch.setenv("SLURM_JOB_GPUS", "3")
    with pytest.raises(UserError, match="Slurm gave this job GPU 3 but PyTorch sees none"):
        resolve_device("auto")
    assert resolve_device("cpu").type == "cpu"


# ---- a loss that is not finite


@pytest.fixture(params=["compiled", "plain"])
def way(request, monkeypatch):
    """Compiled kernels, or PyTorch's operations."""
    if request.param == "plain":
        monkeypatch.setattr(native, "library", None)
    elif native.library is None:
        pytest.skip(f"no compiled kernels: {native.reason}")


def spoil(monkeypatch, at_step, how):
    """Have a training step (counted from 1) meet noise that is not finite, or leave such a gradient."""
    if how == "noise":

        class Spoilt(Noise):
            def normal(self, like):
                return super().normal(like) * (math.nan if self.generator.initial_seed() == at_step - 1 else 1.0)

        monkeypatch.setattr(loop, "Noise", Spoilt)
        return
    steps = iter(range(1, 1000))

    def spoilt(model, *rest, of=one_step.gradients):
        elbo_n = of(model, *rest)
        if next(steps) == at_step:
            model.rho.weight.grad[3, 1] = math.nan
        return elbo_n

    monkeypatch.setattr(one_step, "gradients", spoilt)


@pytest.mark.parametrize("every", [0, 30])
def test_loss_not_finite_names_epoch_step_and_cause(tmp_path, monkeypatch, way, every):
    """47 cells at 16 make 3 steps an epoch; step 8 is the second of the third epoch."""
    _schema, counts = packed(cells())
    rows, held = np.arange(47), np.arange(47, 60)
    config = brief(max_epochs=6, early_stopping=False)
    path = tmp_path / "state.safetensors"
    network = build(ModelConfig(**SMALL), 25, 2, 0, 0)
    with monkeypatch.context() as patch:
        spoil(patch, 8, "noise")
        with pytest.raises(UserError) as error:
            train(network, counts, rows, held, config, 0, CPU, path, "me", progress=False, every=every)
    message = str(error.value)
    assert re.search("not finite at epoch 3, step 2 of 3: ", message) and "\n" not in message
    assert "weights have overflowed; lower train.learning_rate (now 0.005)" in message
    assert (f"{path} holds the last sound state" in message) == path.exists() == (every == 0)
    if every:
        return
    # that checkpoint loads, and goes on to what a fit without trouble gives
    assert all(torch.isfinite(v).all() for v in load_file(path).values() if v.is_floating_point())
    assert scalars(path)["step"] == 7
    resumed = build(ModelConfig(**SMALL), 25, 2, 0, 0)
    train(resumed, counts, rows, held, config, 0, CPU, path, "me", progress=False)
    clean = build(ModelConfig(**SMALL), 25, 2, 0, 0)
    train(clean, counts, rows, held, config, 0, CPU, progress=False)
    assert same(resumed, clean)


def test_weights_not_finite_after_an_epochs_last_step_are_not_kept(tmp_path, monkeypatch, way):
    """The loss of the last step is finite but its update is not: no checkpoint, no result."""
    _schema, counts = packed(cells())
    path = tmp_path / "state.safetensors"
    network = build(ModelConfig(**SMALL), 25, 2, 0, 0)
    spoil(monkeypatch, 6, "gradient")
    with pytest.raises(UserError, match="not finite at epoch 2, step 3 of 3: weights have overflowed"):
        train(network, counts, np.arange(47), np.arange(0), brief(), 0, CPU, path, "me", progress=False, every=0)
    assert all(torch.isfinite(v).all() for v in load_file(path).values() if v.is_floating_point())
    assert scalars(path)["step"] == 5


@pytest.mark.parametrize("stopped", [False, True])
def test_weights_not_finite_are_not_kept_at_a_stop(tmp_path, monkeypatch, way, stopped):
    """Nor is the state that a signal asks for, at the very step that spoils it."""
    _schema, counts = packed(cells())
    path = tmp_path / "state.safetensors"
    network = build(ModelConfig(**SMALL), 25, 2, 0, 0)
    spoil(monkeypatch, 2, "gradient")
    calls = iter(range(1, 99))
    stop = lambda: stopped and next(calls) == 2  # noqa: E731
    with pytest.raises(UserError, match=f"not finite at epoch 1, step {2 if stopped else 3} of 3: weights have overfl"):
        train(network, counts, np.arange(47), np.arange(0), brief(), 0, CPU, path, "me", progress=False, stop=stop)
    assert not path.exists()


def test_a_rate_that_is_too_high():
    with pytest.raises(UserError, match=r"lower train.learning_rate .now 1e.30."):
        fit(config=brief().model_copy(update={"learning_rate": 1e30, "adam_eps": 1e-8}))


# ---- checkpoints


def scalars(path):
    """What a checkpoint says besides its tensors."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["state"])["scalars"]


def build_and_train(counts, config, path=None, stop=lambda: False, identity="me", every=30.0):
    network = build(ModelConfig(library="latent", **SMALL), 25, 2, 0, 0)
    held = np.arange(0, 60, 6)
    rows = np.setdiff1d(np.arange(60), held)
    history = train(network, counts, rows, held, config, 0, CPU, path, identity, progress=False, stop=stop, every=every)
    return network, history


@pytest.mark.parametrize("early", [False, True])
def test_stopped_at_any_step_and_resumed_is_the_same_bit_for_bit(tmp_path, early):
    """Including an epoch's last step, and one step at a time all the way; checkpoints between make no difference."""
    _, counts = packed(cells())
    config = brief(max_epochs=8, patience=2, early_stopping=early, kl_warmup=0.3, schedule="cosine")
    whole, history = build_and_train(counts, config)
    rng = random.Random(0)
    for trial, stride in enumerate((lambda: 1, lambda: 4, lambda: rng.randint(1, 9), lambda: rng.randint(1, 20))):
        path = tmp_path / f"{trial}.safetensors"
        for _ in range(1000):
            left = [stride()]

            def stop(left=left):
                left[0] -= 1
                return left[0] == 0

            torch.manual_seed(rng.randint(0, 99))
            try:
                resumed, its_history = build_and_train(counts, config, path, stop, every=30 * (trial % 2))
                break
            except Interrupted:
                assert path.exists()
        assert same(whole, resumed)
        assert its_history.drop(columns="seconds").equals(history.drop(columns="seconds"))
        # a fit that had ended, resumed from its last checkpoint, ends at once and alike
        resumed, its_history = build_and_train(counts, config, path)
        assert same(whole, resumed) and len(its_history) == len(history)


def test_torn_and_foreign_checkpoints_are_said_and_left(tmp_path, caplog):
    _, counts = packed(cells())
    config = brief()
    path = tmp_path / "state.safetensors"
    whole, _ = build_and_train(counts, config, path)
    content = path.read_bytes()
    caplog.set_level("WARNING", "scvi_core")
    log.propagate = True
    try:
        cases = {
            "torn": (content[: len(content) // 2], "not a whole checkpoint"),
            "header": (content[:50], "not a whole checkpoint"),
            "empty": (b"", "not a whole checkpoint"),
            "noise": (b"not a checkpoint at all" * 9, "not a whole checkpoint"),
            "other": (content, "a checkpoint of another fit"),
        }
        for name, (damaged, match) in cases.items():
            path.write_bytes(damaged)
            caplog.clear()
            network, history = build_and_train(counts, config, path, identity="other" if name == "other" else "me")
            assert same(whole, network) and len(history) == 4
            assert any(match in r.getMessage() and str(path) in r.getMessage() for r in caplog.records), name
        save_file({"x": torch.zeros(3)}, path)  # someone else's safetensors
        caplog.clear()
        network, _ = build_and_train(counts, config, path)
        assert same(whole, network) and "another fit" in caplog.records[0].getMessage()
    finally:
        log.propagate = False


def test_flipped_bytes_are_found(tmp_path, caplog):
    """One damaged byte anywhere in a checkpoint: it is left alone, and the fit begins anew and ends alike."""
    _, counts = packed(cells())
    config, path = brief(), tmp_path / "state.safetensors"
    stops = iter([False] * 9 + [True])
    with pytest.raises(Interrupted):
        build_and_train(counts, config, path, lambda: next(stops))
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    whole, _ = build_and_train(counts, config)
    caplog.set_level("WARNING", "scvi_core")
    log.propagate = True
    try:
        for at in (header, header + 1001, len(content) - 1):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            caplog.clear()
            network, history = build_and_train(counts, config, path)
            assert any("not a whole checkpoint" in r.getMessage() for r in caplog.records), at
            assert same(whole, network) and len(history) == 4
        rng = np.random.default_rng(0)
        network = build(ModelConfig(library="latent", **SMALL), 25, 2, 0, 0)
        fresh = {k: v.clone() for k, v in network.state_dict().items()}
        for at in [*rng.choice(header, 700, replace=False), *rng.integers(header, len(content), 100)]:
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << rng.integers(0, 8))]) + content[at + 1 :])
            state = State.of(network)
            state.resume(path, "me")
            assert not (state.step or state.history or any(mean.any() for mean in state.means)), content[
                max(0, at - 20) : at + 5
            ]
            assert all(torch.equal(fresh[k], v) for k, v in network.state_dict().items()), at
    finally:
        log.propagate = False


def test_checkpoints_are_some_seconds_apart(tmp_path, monkeypatch):
    """None while training is younger than that, one at the end; one a step if so asked; all alike in their outcome."""
    _, counts = packed(cells())
    written = []

    def save(state, *rest, of=State.save):
        written.append(state.step)
        of(state, *rest)

    monkeypatch.setattr(State, "save", save)
    path = tmp_path / "state.safetensors"
    often, _ = build_and_train(counts, brief(), path, every=0)
    assert written == list(range(1, 17))
    path.unlink()
    written.clear()
    rarely, _ = build_and_train(counts, brief(), path)
    assert written == [16] and same(often, rarely)


def forked(function, said):
    """Run `function` in a process of its own (forked, so that nothing is imported again); stderr goes to `said`."""

    def run():
        torch.set_num_threads(1)
        sys.stderr = open(said, "w", buffering=1)  # noqa: SIM115 (ends with the process)
        function()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def wait_for(condition, process, seconds=60):
    until = time.monotonic() + seconds
    while not condition() and process.is_alive() and time.monotonic() < until:
        time.sleep(0.002)


def test_killed_at_random_moments_and_rerun_is_the_same_bit_for_bit(tmp_path):
    """SIGKILL to a real process while it trains and writes a checkpoint a step."""
    _, counts = packed(cells())
    config = brief(max_epochs=60, kl_warmup=0.3, early_stopping=False)
    path = tmp_path / "state.safetensors"
    inode = lambda: path.exists() and path.stat().st_ino  # noqa: E731

    def program():
        network, _ = build_and_train(counts, config, path, every=0)
        save_file(network.state_dict(), tmp_path / "done.safetensors")

    killed = 0
    for trial in range(12):
        before = inode()
        process = forked(program, tmp_path / "said")
        if trial < 5:
            wait_for(lambda before=before: inode() != before, process)  # a checkpoint of its own
            time.sleep(random.uniform(0, 0.06))
            process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            break
    assert process.exitcode == 0 and killed >= 1
    if killed < 5:  # the machine was quick; the last run still began where a killed one ended
        assert "resuming at epoch" in (tmp_path / "said").read_text()
    process = forked(lambda: save_file(build_and_train(counts, config)[0].state_dict(), tmp_path / "whole"), os.devnull)
    process.join()
    assert (tmp_path / "done.safetensors").read_bytes() == (tmp_path / "whole").read_bytes()


def test_sigterm_to_the_command_and_rerun(tmp_path, monkeypatch):
    """`scvi-core train` exits with 75 on SIGTERM; the same command then ends with the same file."""
    stored(tmp_path, cells(120, 30))
    config = {
        "threads": 1,
        "device": "cpu",
        "model": {"n_hidden": 8, "n_latent": 2},
        "train": {"max_epochs": 200, "batch_size": 16, "early_stopping": False},
    }
    monkeypatch.chdir(tmp_path)
    command = ["train", "--store", "counts.zarr", "--config", json.dumps(config), "--checkpoints", "states", "--out"]
    states = lambda: list((tmp_path / "states").glob("*.safetensors"))  # noqa: E731
    log = tmp_path / "said"
    said = lambda: log.read_text() if log.exists() else ""  # noqa: E731

    def start(out):
        monkeypatch.setattr(sys, "argv", ["scvi-core", *command, out])
        return forked(cli.main, log)

    process = start("stopped")
    wait_for(lambda: "epoch 20/200" in said(), process)
    assert not states(), "checkpoints are half a minute apart"
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 75 and "stopped by signal" in said(), said()
    assert states() and not (tmp_path / "stopped").exists()
    process = start("stopped")
    process.join()
    resumed = re.search(r"resuming at epoch (\d+)", said())
    assert process.exitcode == 0 and resumed and int(resumed[1]) > 20, said()
    assert not states()  # the checkpoint goes once the model is safe
    start("whole").join()
    for name in ("model.safetensors", "model.json", "history.parquet"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_signal_while_the_model_is_written_comes_too_late(tmp_path, monkeypatch):
    """The fit is done: an exit that looks like a failure would have Snakemake delete what it has made."""
    stored(tmp_path, cells(120, 30))
    config = {"threads": 1, "device": "cpu", "model": {"n_hidden": 8, "n_latent": 2}, "train": {"max_epochs": 2}}
    monkeypatch.chdir(tmp_path)
    command = ["train", "--store", "counts.zarr", "--config", json.dumps(config), "--checkpoints", "states"]
    monkeypatch.setattr(sys, "argv", ["scvi-core", *command, "--out", "model"])
    save = api.Model.save

    def signalled(model, path):
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        save(model, path)

    monkeypatch.setattr(api.Model, "save", signalled)
    process = forked(cli.main, tmp_path / "said")
    process.join()
    assert process.exitcode == 0, (tmp_path / "said").read_text()
    assert (tmp_path / "model" / "model.safetensors").exists() and not list((tmp_path / "states").iterdir())
