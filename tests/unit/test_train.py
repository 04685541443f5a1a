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
import pandas as pd
import pytest
import torch
from _data import brief, cells, packed
from _samples import sample, write
from safetensors.torch import load_file, save_file

from scvi_core import cli
from scvi_core import train as training
from scvi_core.config import ModelConfig, TrainConfig
from scvi_core.files import UserError
from scvi_core.model import build
from scvi_core.preprocess.store import write_store
from scvi_core.train import HISTORY, Interrupted, elbo_of, kl_weight, learning_rate, n_epochs, n_steps, train

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
    total = n_epochs(config, n_cells) * n_steps(config, n_cells)
    assert kl_weight(config, total - 1, total) == 1.5
    assert kl_weight(config, math.ceil(share * total), total) == 1.5
    weights = [kl_weight(config, step, total) for step in range(0, total, max(1, total // 50))]
    assert weights == sorted(weights) and weights[0] > 0
    if share and total > 50:
        assert kl_weight(config, 0, total) < 0.1
        assert np.isclose(kl_weight(config, int(share * total / 2), total), 0.75, rtol=0.1)


def test_kl_weight_and_rate_are_on_record():
    _, history = fit(config=brief(max_epochs=8, kl_warmup=0.5, schedule="cosine", early_stopping=False))
    assert history["kl_weight"].is_monotonic_increasing and history["kl_weight"].iloc[3] == 1.0
    assert history["kl_weight"].iloc[0] == pytest.approx(0.25)
    assert history["learning_rate"].idxmax() == 0 and history["learning_rate"].iloc[-1] < 1e-3
    assert fit(config=brief(max_epochs=1, kl_warmup=1.0))[1]["kl_weight"].iloc[-1] == 1.0


def test_cosine_schedule():
    config = TrainConfig(schedule="cosine", learning_rate=0.2)
    rates = [learning_rate(config, step, 200) for step in range(200)]
    assert np.argmax(rates) in (19, 20) and max(rates) == pytest.approx(0.2) and 0 < rates[-1] < 1e-4
    assert all(np.diff(rates[:20]) > 0) and all(np.diff(rates[20:]) < 0)
    assert 0 < learning_rate(config, 0, 1) <= 0.2


@pytest.mark.parametrize("n_cells", [2, 3, 4, 5, 127, 128, 129, 130, 255, 257, 1001])
@pytest.mark.parametrize("batch_size", [2, 3, 128])
def test_minibatches_are_of_near_equal_size(n_cells, batch_size):
    steps = n_steps(TrainConfig(batch_size=batch_size), n_cells)
    sizes = [len(part) for part in np.array_split(np.arange(n_cells), steps)]
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
    assert elbo_of(network, counts, np.arange(0, 60, 6), 0) == pytest.approx(warm["validation_elbo"][best], rel=1e-12)
    # without it, all epochs run and the last weights stay
    network, history = fit(config=config.model_copy(update={"early_stopping": False, "max_epochs": 12}))
    assert len(history) == 12
    assert elbo_of(network, counts, np.arange(0, 60, 6), 0) == pytest.approx(history["validation_elbo"].iloc[-1])


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
        training.resolve_device("cuda")
    assert training.resolve_device("auto").type == training.resolve_device("cpu").type == "cpu"


# ---- a loss that is not finite


def poisoned(at_step):
    """A model whose decoder turns its output to NaN in training at one step."""
    calls = {"n": 0}

    def hook(module, inputs, output):
        if module.training:
            calls["n"] += 1
        return output * torch.nan if calls["n"] == at_step and module.training else output

    return hook


def test_loss_not_finite_names_epoch_step_and_cause(tmp_path):
    """47 cells at 16 make 3 steps an epoch; step 8 is the second of the third epoch."""
    _schema, counts = packed(cells())
    rows, held = np.arange(47), np.arange(47, 60)
    config = brief(max_epochs=6, early_stopping=False)
    path = tmp_path / "state.safetensors"
    network = build(ModelConfig(**SMALL), 25, 2, 0, 0)
    network.decoder[0].register_forward_hook(poisoned(8))
    with pytest.raises(UserError) as error:
        train(network, counts, rows, held, config, 0, CPU, path, "me", progress=False)
    message = str(error.value)
    assert re.search("not finite at epoch 3, step 2 of 3: ", message) and "\n" not in message
    assert "weights have overflowed; lower train.learning_rate (now 0.005)" in message
    assert f"{path} holds the last whole epoch" in message
    # that checkpoint loads, and goes on to what a fit without trouble gives
    assert all(torch.isfinite(v).all() for v in load_file(path).values() if v.is_floating_point())
    resumed = build(ModelConfig(**SMALL), 25, 2, 0, 0)
    train(resumed, counts, rows, held, config, 0, CPU, path, "me", progress=False)
    clean = build(ModelConfig(**SMALL), 25, 2, 0, 0)
    train(clean, counts, rows, held, config, 0, CPU, progress=False)
    assert same(resumed, clean)


def test_weights_not_finite_after_an_epochs_last_step_are_not_kept(tmp_path):
    """The loss of the last step is finite but its update is not: no checkpoint, no result."""
    _schema, counts = packed(cells())
    path = tmp_path / "state.safetensors"
    network = build(ModelConfig(**SMALL), 25, 2, 0, 0)
    steps = {"n": 0}

    def spoil(gradient):
        steps["n"] += 1
        return gradient * torch.nan if steps["n"] == 6 else gradient

    network.rho.weight.register_hook(spoil)
    with pytest.raises(UserError, match="not finite at epoch 2, step 3 of 3: weights have overflowed"):
        train(network, counts, np.arange(47), np.arange(0), brief(), 0, CPU, path, "me", progress=False)
    assert all(torch.isfinite(v).all() for v in load_file(path).values() if v.is_floating_point())


def test_a_rate_that_is_too_high():
    with pytest.raises(UserError, match=r"lower train.learning_rate .now 1e.30."):
        fit(config=brief(learning_rate=1e30, adam_eps=1e-8))


# ---- checkpoints


def build_and_train(counts, config, path=None, stop=lambda: False, identity="me"):
    network = build(ModelConfig(library="latent", **SMALL), 25, 2, 0, 0)
    rows = np.setdiff1d(np.arange(60), np.arange(0, 60, 6))
    history = train(
        network, counts, rows, np.arange(0, 60, 6), config, 0, CPU, path, identity, progress=False, stop=stop
    )
    return network, history


@pytest.mark.parametrize("early", [False, True])
def test_stopped_at_any_step_and_resumed_is_the_same_bit_for_bit(tmp_path, early):
    """Including an epoch's last step, and one step at a time all the way."""
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
                resumed, its_history = build_and_train(counts, config, path, stop)
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
    training.log.propagate = True
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
        training.log.propagate = False


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
    """SIGKILL to a real process while it trains and writes a checkpoint an epoch."""
    _, counts = packed(cells())
    config = brief(max_epochs=60, kl_warmup=0.3, early_stopping=False)
    path = tmp_path / "state.safetensors"
    inode = lambda: path.exists() and path.stat().st_ino  # noqa: E731

    def program():
        network, _ = build_and_train(counts, config, path)
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
    adata = cells(120, 30)
    parts = [sample(adata.X[i::2], f"s{i}", f"b{i}", adata.var_names) for i in (0, 1)]
    h5ads, qcs = write(tmp_path / "samples", parts)
    genes = pd.DataFrame({"gene_id": adata.var_names, "gene_name": adata.var_names, "selected": True})
    write_store(tmp_path / "counts.zarr", h5ads, qcs, genes)
    config = {
        "threads": 1,
        "device": "cpu",
        "model": {"n_hidden": 8, "n_latent": 2},
        "train": {"max_epochs": 60, "batch_size": 16, "early_stopping": False},
    }
    monkeypatch.chdir(tmp_path)
    command = ["train", "--store", "counts.zarr", "--config", json.dumps(config), "--checkpoints", "states", "--out"]
    states = lambda: list((tmp_path / "states").glob("*.safetensors"))  # noqa: E731

    def start(out):
        monkeypatch.setattr(sys, "argv", ["scvi-core", *command, out])
        return forked(cli.main, tmp_path / "said")

    process = start("stopped")
    wait_for(states, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 75 and "stopped by signal SIGTERM" in said, said
    assert states() and not (tmp_path / "stopped").exists()
    process = start("stopped")
    process.join()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 0 and "resuming at epoch" in said, said
    assert not states()  # the checkpoint goes once the model is safe
    start("whole").join()
    for name in ("model.safetensors", "model.json", "history.parquet"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
