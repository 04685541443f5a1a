import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from _data import brief, cells, packed
from _samples import stored

import scvi_core as sv
from scvi_core import cli, parallel
from scvi_core.config import ModelConfig
from scvi_core.files import UserError, write_json
from scvi_core.model import Noise, build
from scvi_core.train import Interrupted, elbo_of, loop, train
from scvi_core.train.loop import _set_library_prior
from scvi_core.train.step import gradients

CPU = torch.device("cpu")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


@pytest.fixture(autouse=True)
def loopback(monkeypatch):
    if sys.platform.startswith("linux"):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def forked(function, said):
    """Run `function` in a process of its own (forked, so that nothing is imported again); stderr goes to `said`."""

    def run():
        torch.set_num_threads(1)
        sys.stderr = open(said, "w", buffering=1)  # noqa: SIM115 (ends with the process)
        os.dup2(sys.stderr.fileno(), 2)  # of its own children too
        function()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def together(world, function, folder, seconds=90):
    """What `function` of the rank answers in each of some processes that have joined."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(exist_ok=True)

    def member(rank):
        def run():
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            assert parallel.started() and parallel.join(CPU) == CPU
            assert (parallel.world(), parallel.rank()) == (world, rank)
            torch.save(function(rank), folder / f"{rank}.pt")
            parallel.leave()

        return run

    members = [forked(member(rank), folder / f"said{rank}") for rank in range(world)]
    until = time.monotonic() + seconds
    for process in members:
        process.join(max(0.0, until - time.monotonic()))
        if process.exitcode is None:
            process.kill()
    said = "\n".join((folder / f"said{rank}").read_text()[-2000:] for rank in range(world))
    assert all(process.exitcode == 0 for process in members), said
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_are_all_cells_once_and_of_near_equal_size(world, monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: world)
    for n in (0, 1, 2, 7, 128, 129):
        parts = []
        for rank in range(world):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            parts.append(list(range(n))[parallel.share(n)])
        assert [i for part in parts for i in part] == list(range(n)) and max(map(len, parts)) - min(
            map(len, parts)
        ) <= 1


def test_alone():
    assert (parallel.world(), parallel.rank(), parallel.started()) == (1, 0, False)
    one = torch.ones(3)
    assert parallel.summed(one) is one and parallel.sum_gradients([one], True, False) == (True, False)
    parallel.leave()


# ---- a step


SETTINGS = [
    {"n_layers": 2, "dropout": 0.3},
    {"library": "latent", "dropout": 0.3},
    {"library": "latent", "likelihood": "nb", "dispersion": "gene-batch"},
    {"likelihood": "poisson", "n_layers": 2},
    {"dispersion": "gene-cell", "half": True},
    {"decoder": "linear"},
]


def step(half=False, n=23, **how):
    """Gradients and statistics of a minibatch, by this process and those it has joined, summed."""
    schema, counts = packed(cells(40), ("day",), ("age",))
    model = build(ModelConfig(n_hidden=16, n_latent=3, **how), 25, len(schema.batches), 4, 0)
    _set_library_prior(model, counts, np.arange(40))
    model.half = half
    model.train()
    mine = parallel.share(n)
    rows_n = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:n][mine]
    elbo_n = gradients(model, counts.gather(rows_n), Noise(5, CPU, n, mine), 0.7)
    flags = parallel.sum_gradients([p.grad for p in model.parameters()], parallel.rank() == 1, False)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    return elbo_n, found, {name: value.clone() for name, value in model.state_dict().items()}, flags


@pytest.mark.parametrize("world", [2, 3])
def test_a_shared_minibatch_has_the_gradient_of_the_whole(tmp_path, world):
    """Its ELBO and the running moments of its batch norms too; and all members hold the same bits."""
    found = together(world, lambda _: [step(**how) for how in SETTINGS], tmp_path)
    for i, how in enumerate(SETTINGS):
        half = how.get("half", False)  # heads round to 8 bits, and may round the other way
        elbo_n, gradients, state, _ = step(**how)
        torch.testing.assert_close(torch.cat([f[i][0] for f in found]), elbo_n, rtol=1e-3 if half else 1e-5, atol=1e-5)
        for name, expected in gradients.items():
            unit = gradients[name.replace("linear.bias", "norm.bias")].abs().max()  # no linear.bias has a gradient
            assert (found[0][i][1][name] - expected).abs().max() <= (2**-7 if half else 1e-5) * unit, (how, name)
        for name, expected in state.items():
            torch.testing.assert_close(found[0][i][2][name], expected, rtol=1e-5, atol=1e-6, msg=f"{how} {name}")
        for other in found[1:]:
            for mine, same in zip(found[0][i][1:3], other[i][1:3], strict=True):
                assert all(torch.equal(mine[name], same[name]) for name in mine), how
        assert all(f[i][3] == (True, False) for f in found)  # raised by one, known to all


# ---- a fit


def fit(how=None, checkpoint=None, stop=lambda: False, n=60, every=30.0, held=None, **config):
    """(state, history without times, its ELBO in small blocks) of a fit, alone or together."""
    schema, counts = packed(cells(n))
    network = build(ModelConfig(**{"n_hidden": 8, "n_latent": 2, **(how or {})}), 25, len(schema.batches), 0, 0)
    held = np.arange(0, n, 6) if held is None else held
    config = brief(**{"max_epochs": 5, "precision": "float32", **config})
    rows = np.setdiff1d(np.arange(n), held)
    history = train(
        network, counts, rows, held, config, 0, CPU, checkpoint, "me", progress=False, stop=stop, every=every
    )
    elbo = [elbo_of(network, counts.subset(np.arange(17)), 0, block) for block in (4, 8, 1024)]  # 17: one is left over
    state = {name: value.clone() for name, value in network.state_dict().items()}
    return state, history.drop(columns="seconds").to_numpy(), elbo


def near(ours, theirs, validation=1e-4):
    """But for the biases before a batch norm, which rounding moves and nothing reads but the norm's running mean."""
    for name, value in ours[0].items():
        if not name.endswith(("linear.bias", "running_mean")):
            torch.testing.assert_close(value, theirs[0][name], rtol=1e-4, atol=1e-5, msg=name)
    assert ours[1].shape == theirs[1].shape
    np.testing.assert_allclose(ours[1][:, [0, 1, 3, 4]], theirs[1][:, [0, 1, 3, 4]], rtol=1e-5)
    np.testing.assert_allclose(ours[1][:, 2], theirs[1][:, 2], rtol=validation)
    np.testing.assert_allclose(ours[2], theirs[2], rtol=validation)


def alike(found):
    """All members hold the same bits."""
    for other in found[1:]:
        assert all(torch.equal(value, other[0][name]) for name, value in found[0][0].items())
        np.testing.assert_array_equal(found[0][1], other[1])
        assert found[0][2] == other[2]


STALLING = {"max_epochs": 80, "patience": 3, "learning_rate": 0.05, "kl_warmup": 0.05}
FITS = [
    {"how": {"n_layers": 2}},
    {"how": {"library": "latent"}},
    {"how": {"decoder": "linear", "loadings_l1": 0.3}},
    {"held": np.arange(1)},  # one cell for two processes to validate on
    {"gradient_clip": 1.0, "schedule": "cosine"},
    STALLING,
]


def test_two_processes_find_what_one_finds(tmp_path):
    """Weights up to rounding, the course of the ELBO, and the epoch at which it stalls; the first alone writes."""

    def members(rank):
        return [fit(**how, checkpoint=tmp_path / f"{rank}-{i}", every=0) for i, how in enumerate(FITS)]

    found = together(2, members, tmp_path / "members")
    for i, how in enumerate(FITS):
        alike([f[i] for f in found])
        alone = fit(**how)
        near(found[0][i], alone, 5e-3 if "library" in how.get("how", {}) else 1e-4)
        assert (tmp_path / f"0-{i}").exists() and not (tmp_path / f"1-{i}").exists()
    assert 5 < len(alone[1]) < 80  # that one stalled


def test_stopping_going_on_and_failing_together(tmp_path, monkeypatch):
    """A stop that one process is asked for stops all; 1 goes on from 2, 2 from 1; a loss that one meets, all refuse."""
    path = tmp_path / "state"
    calls = iter(range(1, 99))
    with pytest.raises(Interrupted):
        fit(checkpoint=tmp_path / "alone", stop=lambda: next(calls) == 6)

    class Spoilt(Noise):
        def normal(self, like):
            return super().normal(like) * (torch.nan if self.generator.initial_seed() == 4 else 1.0)

    def members(rank):
        steps = iter(range(1, 99))
        try:
            fit(checkpoint=path, stop=lambda: next(steps) == 6 and rank == 1)
            stopped = 0
        except Interrupted:
            stopped = next(steps) - 1
        resumed = fit(checkpoint=tmp_path / "alone")
        if rank == 1:
            monkeypatch.setattr(loop, "Noise", Spoilt)
        try:
            failed = fit(every=0, checkpoint=tmp_path / f"spoilt{rank}")
        except UserError as error:
            failed = str(error)
        monkeypatch.setattr(loop, "Noise", Noise)
        try:
            few = fit(batch_size=1 + 1)[0]
        except UserError as error:
            few = str(error)
        return stopped, resumed, failed, few

    found = together(2, members, tmp_path / "members")
    whole = fit()
    alike([f[1] for f in found])
    near(found[0][1], whole)
    assert [f[0] for f in found] == [6, 6]
    near(fit(checkpoint=path), whole)
    for f in found:
        assert "not finite at epoch 2, step 1 of 4" in f[2], f[2]
        assert isinstance(f[3], dict)  # two cells for two processes are enough


def test_more_processes_than_cells_of_a_minibatch(tmp_path):
    def member(_):
        with pytest.raises(UserError) as error:
            fit(batch_size=2)
        return str(error.value)

    for said in together(3, member, tmp_path / "members"):
        assert said == (
            "train: 3 processes for minibatches of 2 cells; ask for fewer --devices or raise train.batch_size"
        )


# ---- the command


@pytest.fixture
def place(tmp_path, monkeypatch):
    stored(tmp_path, cells(120, 30))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def command(place, monkeypatch, out, devices, epochs=4, more=(), **settings):
    """(process, what it has said so far) of `scvi-core train`, begun."""
    config = {
        "threads": 1,
        "device": "cpu",
        "model": {"n_hidden": 8, "n_latent": 2},
        "train": {"max_epochs": epochs, "batch_size": 40, "precision": "float32", **settings},
    }
    arguments = ["train", "--store", "counts.zarr", "--config", json.dumps(config), "--checkpoints", "states"]
    arguments += ["--out", out, "--devices", str(devices), *more]
    monkeypatch.setattr(sys, "argv", ["scvi-core", *arguments])
    log = place / f"said-{out}-{devices}"
    log.unlink(missing_ok=True)
    return forked(cli.main, log), lambda: log.read_text() if log.exists() else ""


def children(pid):
    """Process ids of its living children."""
    with contextlib.suppress(OSError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def rank_of(pid):
    with contextlib.suppress(OSError):
        found = re.search(rb"\0RANK=(\d)", b"\0" + Path(f"/proc/{pid}/environ").read_bytes())
        return int(found[1]) if found else None


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def wait_for(condition, process, seconds=60):
    until = time.monotonic() + seconds
    while not condition() and process.is_alive() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


def test_the_command_on_two_devices(place, monkeypatch):
    """Its model is near that of one, with the same files, once each; one that `lookup` found is taken as well."""
    more = ["--run", "run.json", "--decisions", "decisions.jsonl"]
    process, said = command(place, monkeypatch, "two", 2, more=more)
    process.join()
    assert process.exitcode == 0, said()
    assert said().count("process 1 of 2 on cpu") == 1 and said().count("kernels = ") == 1, said()
    for name in ("run.json", "decisions.jsonl"):
        assert (place / name).exists()
    one, said = command(place, monkeypatch, "one", 1)
    one.join()
    assert one.exitcode == 0, said()
    assert not list(place.rglob("*.tmp")) and not list((place / "states").iterdir())
    two, one = sv.load("two"), sv.load("one")
    assert two.fingerprint == one.fingerprint
    np.testing.assert_allclose(two.history["train_elbo"], one.history["train_elbo"], rtol=1e-5)
    theirs = one.network.state_dict()
    for name, value in two.network.state_dict().items():
        if not name.endswith(("linear.bias", "running_mean")):
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5, msg=name)
    # one that lookup found is taken as well, and written by the first process alone
    one.save("found/model")
    about = {"fingerprint": one.fingerprint, "found": {"name": "m", "version": "1", "run_id": "r"}}
    write_json(place / "found" / "lookup.json", about, checksum=True)
    process, said = command(place, monkeypatch, "again", 2, more=["--found", "found"])
    process.join()
    assert process.exitcode == 0 and said().count("training = skipped") == 1, said()
    assert (place / "again/model.safetensors").read_bytes() == (place / "one/model.safetensors").read_bytes()
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    process, said = command(place, monkeypatch, "second", 2, more=["--found", "found"])
    process.join(30)
    assert process.exitcode == 0 and not (place / "second").exists(), said()


@linux
@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_is_killed(place, monkeypatch, rank):
    """The command ends soon, says so in one line, and leaves no process behind."""
    process, said = command(place, monkeypatch, "killed", 2, epochs=100_000)
    assert wait_for(lambda: "matrix products" in said(), process), said()
    time.sleep(0.3)
    workers = {rank_of(pid): pid for pid in children(process.pid)}
    assert set(workers) == {0, 1}
    os.kill(workers[rank], signal.SIGKILL)
    began = time.monotonic()
    process.join(15)
    assert process.exitcode not in (0, 75, None) and time.monotonic() - began < 15, said()
    assert not any(alive(pid) for pid in workers.values())
    errors = [line for line in said().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"process {rank + 1} of 2 was killed by SIGKILL" in errors[0], said()
    assert "Traceback" not in said()
    assert not (place / "killed").exists()


@linux
def test_sigterm_and_going_on_with_one_device(place, monkeypatch):
    process, said = command(place, monkeypatch, "stopped", 2, epochs=400)
    assert wait_for(lambda: "matrix products" in said(), process), said()
    time.sleep(0.5)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 75 and said().count("stopped by signal") == 1, said()
    assert "error" not in said() and "Traceback" not in said(), said()
    assert len(workers) == 2 and not any(alive(pid) for pid in workers)
    assert len(list((place / "states").iterdir())) == 1 and not (place / "stopped").exists()
    process, said = command(place, monkeypatch, "stopped", 1, epochs=400)
    process.join()
    assert process.exitcode == 0 and "resuming at epoch" in said(), said()
    assert len(sv.load("stopped").history) == 400 and not list((place / "states").iterdir())


@linux
def test_sigterm_before_training_has_begun(place, monkeypatch):
    """While the processes are still starting: as when it has begun, the same command is to be run again."""
    process, said = command(place, monkeypatch, "early", 2, epochs=100_000)
    assert wait_for(lambda: len(children(process.pid)) == 2, process), said()
    workers = children(process.pid)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    process.join(15)
    assert process.exitcode == 75 and "Traceback" not in said(), (process.exitcode, said())
    assert not any(alive(pid) for pid in workers) and not (place / "early").exists()


def test_an_error_is_said_once(place, monkeypatch):
    """One that all of the processes meet."""
    process, said = command(place, monkeypatch, "few", 3, batch_size=2)
    process.join()
    assert process.exitcode == 1
    lines = [line for line in said().splitlines() if not line.startswith("INFO ")]
    assert lines == [
        "error: train: 3 processes for minibatches of 2 cells; ask for fewer --devices or raise train.batch_size"
    ]
