import dataclasses
import random
import shutil

import numpy as np
import pytest
import torch
import zarr
from _data import brief, cells, choose
from _samples import stored

from scvi_core import stream
from scvi_core.config import Config, ModelConfig
from scvi_core.counts import Counts, Schema, pack, unsigned
from scvi_core.files import UserError
from scvi_core.model import build
from scvi_core.preprocess import store as store_files
from scvi_core.preprocess.store import read_store
from scvi_core.steps import plan
from scvi_core.stream import Stream, open_counts
from scvi_core.train import Interrupted, train

FIELDS = [field.name for field in dataclasses.fields(Counts)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Some 80 non-zeros a block, 7 cells or so; in chunks of another size."""
    monkeypatch.setattr(stream, "BLOCK", 80)
    monkeypatch.setattr(store_files, "ZARR_CHUNK", 64)


@pytest.fixture(params=["compiled", "plain"])
def how(request, monkeypatch):
    choose(request.param, monkeypatch)


def described(path):
    """A store's cells without counts, and their schema."""
    adata = read_store(path, counts=False)
    return adata, Schema.of(adata, "batch")


def both(path, slots=6):
    """The same counts, in memory and as a stream of so many slots."""
    adata, schema = described(path)
    whole = pack(read_store(path), schema)
    bytes_each = whole.genes_m.element_size() + whole.values_m.element_size()
    slot_size = open_counts(path, adata, schema, (len(whole.genes_m) * bytes_each - 1) / 1e9).slot_size
    return whole, open_counts(path, adata, schema, (slots * slot_size * bytes_each + 1) / 1e9)


def assert_same_fields(ours, theirs):
    for name in FIELDS:
        a, b = getattr(ours, name), getattr(theirs, name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), name
        else:
            assert a == b, name


def assert_same_cells(ours, theirs):
    for a, b in ((ours, theirs), (ours.x, theirs.x)):
        for field in dataclasses.fields(a):
            mine, other = getattr(a, field.name), getattr(b, field.name)
            if isinstance(mine, torch.Tensor):
                assert mine.dtype == other.dtype and torch.equal(mine, other), field.name


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_files, "ZARR_CHUNK", 64)
        return stored(tmp_path_factory.mktemp("kept"), cells(150, 30))


@pytest.fixture
def path(tmp_path, kept):
    return shutil.copytree(kept, tmp_path / "counts.zarr")


@pytest.mark.parametrize("top", [1, 200, 256, 300, 2**15 - 1, 2**15, 2**16, 10**6])
def test_in_memory_it_is_what_pack_makes(tmp_path, top):
    """Field by field, for counts of every width."""
    adata = cells(40, 30)
    adata.X[3, 2] = adata.X[39, 29] = top
    path = stored(tmp_path, adata)
    kind = np.min_scalar_type(max(top, int(adata.X.max())))
    assert zarr.open_group(path)["X"]["data"].dtype == kind
    opened = open_counts(path, *described(path), 8.0)
    assert type(opened) is Counts
    assert_same_fields(opened, pack(read_store(path), described(path)[1]))
    assert int(unsigned(opened.values_m).max()) == max(top, int(adata.X.max()))
    whole, streamed = both(path, slots=4)
    rows_n = torch.randperm(40)[:12].sort().values
    assert type(streamed) is Stream
    for part in rows_n.split(4):
        assert_same_cells(streamed.gather(part), whole.gather(part))


def test_covariates_and_one_cell_a_block(tmp_path, monkeypatch):
    adata = cells(60, 30)
    monkeypatch.setattr(stream, "BLOCK", 3)  # fewer than most cells have
    path = stored(tmp_path, adata)
    told, _ = described(path)
    told.obs["day"], told.obs["age"] = adata.obs["day"].to_numpy(), adata.obs["age"].to_numpy()
    schema = Schema.of(told, "batch", ("day",), ("age",))
    full = read_store(path)
    full.obs = told.obs
    whole, slots = pack(full, schema), 5
    top = int(whole.indptr_n.diff().max())
    streamed = open_counts(path, told, schema, slots * top * 3.01 / 1e9)
    assert len(streamed.genes_m) == slots * top and len(streamed.first_b) == 61
    for rows_n in torch.randperm(60).split(5):
        assert_same_cells(streamed.gather(rows_n), whole.gather(rows_n))


def test_any_rows_in_any_order(path, how):
    """Many random gathers, of rows that repeat too: what was evicted is read anew, never served stale."""
    whole, streamed = both(path, slots=6)
    n_blocks, n_slots = len(streamed.first_b) - 1, len(streamed.genes_m) // streamed.slot_size
    assert n_blocks > 20 and n_slots == 6 and len(streamed.genes_m) < len(whole.genes_m) / 3
    block_n = np.repeat(np.arange(n_blocks), np.diff(streamed.first_b))
    rng = np.random.default_rng(0)
    for _ in range(150):
        blocks = rng.choice(n_blocks, rng.integers(1, 7), replace=False)
        rows = rng.choice(np.flatnonzero(np.isin(block_n, blocks)), rng.integers(1, 30))
        rows_n = torch.from_numpy(rows)
        assert_same_cells(streamed.gather(rows_n), whole.gather(rows_n))
        assert len(streamed.slot_b) <= n_slots and sorted(streamed.slot_b.values()) == list(range(len(streamed.slot_b)))
    assert len(streamed.genes_m) == len(streamed.values_m) == n_slots * streamed.slot_size  # no more memory than that


def test_more_blocks_at_once_than_fit(path):
    """They are read in turns: the same cells, in the order asked for, and no more memory."""
    whole, streamed = both(path, slots=3)
    rng = np.random.default_rng(0)
    for rows in (streamed.first_b[:-1], rng.permutation(len(whole)), rng.integers(0, len(whole), 200)):
        rows_n = torch.from_numpy(rows.copy())
        assert_same_cells(streamed.gather(rows_n), whole.gather(rows_n))
        assert len(streamed.slot_b) <= 3


def reads_of(streamed, monkeypatch):
    read = []

    def of(self, block, was=Stream._read):
        read.append(block)
        was(self, block)

    monkeypatch.setattr(Stream, "_read", of)
    return read


@pytest.mark.parametrize(("slots", "batch_size"), [(2, 2), (3, 2), (4, 5), (7, 5), (12, 5)])
def test_an_epoch_mixes_blocks_and_reads_each_once(path, slots, batch_size, monkeypatch):
    whole, streamed = both(path, slots=slots)
    rows = np.setdiff1d(np.arange(150), np.arange(0, 150, 11))
    read = reads_of(streamed, monkeypatch)
    n_blocks = len(streamed.first_b) - 1
    for epoch in range(4):
        read.clear()
        order = streamed.order(rows, np.random.default_rng([0, epoch]))
        assert np.array_equal(np.sort(order), rows)
        assert np.array_equal(order, streamed.order(rows, np.random.default_rng([0, epoch])))
        assert not np.array_equal(order, streamed.order(rows, np.random.default_rng([0, epoch + 1])))
        for part in np.array_split(order, len(order) // batch_size):
            rows_n = torch.from_numpy(part)
            assert_same_cells(streamed.gather(rows_n), whole.gather(rows_n))
        assert len(read) <= n_blocks and len(set(read)) == len(read)
    # a window's cells are shuffled: the next cell is of another block about as often as chance has it
    if slots > 3:
        block_n = np.searchsorted(streamed.first_b, order, side="right")
        assert (np.diff(block_n) != 0).mean() > 0.6 * (1 - 1 / (slots // 2))


def test_a_last_block_of_one_cell(tmp_path):
    """A minibatch then reaches into three windows."""
    adata = cells(61, 30)
    x = adata.X.toarray()
    x[:, :] = 0
    x[:, :8] = 1 + np.arange(8)  # 8 non-zeros a cell, 10 cells a block, and one cell over
    adata.X = x
    path = stored(tmp_path, adata)
    whole, streamed = both(path, slots=2)
    assert type(streamed) is Stream
    for epoch in range(20):
        order = streamed.order(np.arange(61), np.random.default_rng(epoch))
        for part in np.array_split(order, 61 // 4):
            rows_n = torch.from_numpy(part)
            assert_same_cells(streamed.gather(rows_n), whole.gather(rows_n))


@pytest.mark.parametrize("slots", [2, 5])
def test_subset(path, slots):
    """Of rows of more blocks than fit, such as those held out."""
    whole, streamed = both(path, slots=slots)
    for rows in (np.arange(0, 150, 7), np.arange(150), np.array([149, 3, 77, 4]), np.array([5])):
        taken = streamed.subset(rows)
        assert type(taken) is Counts
        assert_same_fields(taken, whole.subset(rows))
    assert_same_cells(taken.gather(torch.tensor([0])), whole.gather(torch.tensor([5])))


def test_memory_allowed(path):
    told = described(path)
    whole = open_counts(path, *told, 8.0)
    assert whole.genes_m.dtype == torch.int16 and whole.values_m.dtype == torch.uint8
    size = len(whole.genes_m)
    assert type(open_counts(path, *told, 3 * size / 1e9)) is Counts
    streamed = open_counts(path, *told, (3 * size - 1) / 1e9)
    assert type(streamed) is Stream and stream.BLOCK / 2 < streamed.slot_size < stream.BLOCK * 2
    least = 6 * streamed.slot_size
    assert type(open_counts(path, *told, (least + 0.1) / 1e9)) is Stream
    for memory_gb in ((least - 1) / 1e9, 1e-9):
        with pytest.raises(
            UserError, match=r"train.memory_gb: .* is less than two blocks of .*counts.zarr; allow 0\.0"
        ):
            open_counts(path, *told, memory_gb)


# ---- fits


def fit(counts, checkpoint=None, stop=lambda: False):
    network = build(ModelConfig(n_hidden=8, n_latent=2, library="latent"), 30, 2, 0, 0)
    held = np.arange(0, 150, 9)
    config = brief(max_epochs=3, batch_size=16, kl_warmup=0.3)
    history = train(
        network, counts, np.setdiff1d(np.arange(150), held), held, config, 0, torch.device("cpu"), checkpoint, "me",
        progress=False, stop=stop,
    )  # fmt: skip
    return network, history.drop(columns="seconds")


def fresh(streamed):
    """The same with nothing read."""
    empty = {name: torch.zeros_like(getattr(streamed, name)) for name in ("genes_m", "values_m")}
    return dataclasses.replace(streamed, slot_b={}, **empty)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[k], b[k]) for k in a)


def test_a_fit_from_a_stream(path, tmp_path):
    """The same bits again, and when interrupted at any step; as good as from memory, though in another order."""
    whole, streamed = both(path)
    first, history = fit(streamed)
    again, _ = fit(fresh(streamed))
    used, _ = fit(streamed)  # what its slots hold does not matter
    assert same(first, again) and same(first, used)
    from_memory, its_history = fit(whole)
    assert not same(first, from_memory)
    assert history["validation_elbo"].iloc[-1] == pytest.approx(its_history["validation_elbo"].iloc[-1], rel=0.03)
    rng = random.Random(0)
    for stride in (lambda: 1, lambda: rng.randint(2, 9)):
        checkpoint = tmp_path / "state.safetensors"
        checkpoint.unlink(missing_ok=True)
        for _ in range(200):
            left = [stride()]

            def stop(left=left):
                left[0] -= 1
                return left[0] == 0

            try:
                resumed, resumed_history = fit(fresh(streamed), checkpoint, stop)
                break
            except Interrupted:
                continue
        assert same(first, resumed) and resumed_history.equals(history)


def test_a_window_of_all_cells_is_a_fit_from_memory(path):
    """Where half the slots hold all blocks, the order is that of counts in memory."""
    whole, streamed = both(path)
    n_blocks = len(streamed.first_b) - 1
    wide = dataclasses.replace(
        streamed,
        genes_m=streamed.genes_m.new_empty(2 * n_blocks * streamed.slot_size),
        values_m=streamed.values_m.new_empty(2 * n_blocks * streamed.slot_size),
        slot_b={},
    )
    ours, theirs = fit(wide), fit(whole)
    assert same(ours[0], theirs[0]) and ours[1].equals(theirs[1])


# ---- damage


def rewrite(name):
    def damage(path, change):
        array = zarr.open_group(path, mode="r+")["X"][name]
        values = array[:]
        change(values)
        array[:] = values

    return damage


def shift(values):
    values[5] += 40


def cut(path, name):
    file = path / "X" / name
    file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2])


def put(at, value):
    def change(values):
        values[at] = value

    return change


DAMAGES = {
    "lost data": lambda p: (p / "X/data/3").unlink(),
    "lost genes": lambda p: (p / "X/indices/0").unlink(),
    "lost last genes": lambda p: max((p / "X/indices").glob("[0-9]*"), key=lambda f: int(f.name)).unlink(),
    "lost indptr": lambda p: (p / "X/indptr/1").unlink(),
    "lost first indptr": lambda p: (p / "X/indptr/0").unlink(),
    "lost array": lambda p: shutil.rmtree(p / "X/data"),
    "lost indptr array": lambda p: shutil.rmtree(p / "X/indptr"),
    "lost X": lambda p: shutil.rmtree(p / "X"),
    "zeroed data": lambda p: (p / "X/data/3").write_bytes(bytes(len((p / "X/data/3").read_bytes()))),
    "zeroed genes": lambda p: (p / "X/indices/2").write_bytes(bytes(len((p / "X/indices/2").read_bytes()))),
    "zeroed indptr": lambda p: (p / "X/indptr/0").write_bytes(bytes(len((p / "X/indptr/0").read_bytes()))),
    "cut data": lambda p: cut(p, "data/3"),
    "cut genes": lambda p: cut(p, "indices/3"),
    "empty data": lambda p: (p / "X/data/3").write_bytes(b""),
    "zero count": lambda p: rewrite("data")(p, put(500, 0)),
    "gene beyond": lambda p: rewrite("indices")(p, put(500, 30)),
    "gene below": lambda p: rewrite("indices")(p, put(500, -1)),
    "gene twice": lambda p: rewrite("indices")(p, lambda v: put(20, v[19])(v)),
    "indptr shifted": lambda p: rewrite("indptr")(p, shift),
    "indptr not from 0": lambda p: rewrite("indptr")(p, put(0, 1)),
    "indptr too long": lambda p: rewrite("indptr")(p, put(-1, 10**6)),
    "indptr too short": lambda p: rewrite("indptr")(p, lambda v: put(-1, v[-1] - 3)(v)),
    "empty cell": lambda p: rewrite("indptr")(p, lambda v: put(9, v[10])(v)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_stores_are_refused_in_one_line(path, damage):
    told = described(path)
    DAMAGES[damage](path)
    for memory_gb in (8.0, 1.5e-6):
        with pytest.raises(UserError) as error:
            open_counts(path, *told, memory_gb)
        message = str(error.value)
        assert "\n" not in message and f"{path}: not a whole store" in message
        assert message.endswith("run `scvi-core store` again")


def test_a_whole_store_is_not_refused(path):
    assert type(open_counts(path, *described(path), 1.5e-6)) is Stream


def test_no_plan_of_a_damaged_store(path):
    """Nor a `lookup`, which makes no more: no model is taken, or registered, for data that are not what was written."""
    before = plan(path, Config())
    assert before.cells.X is None and before.cells.shape == (150, 30)
    chunk = path / "X" / "data" / "0"
    content = bytearray(chunk.read_bytes())
    content[-1] ^= 1
    chunk.write_bytes(content)
    for reading in (lambda: plan(path, Config()), lambda: read_store(path), lambda: read_store(path, counts=False)):
        with pytest.raises(UserError, match=r"counts.zarr: damaged, .* does not have its checksum"):
            reading()


def test_tables_are_checked_without_counts(path):
    shutil.rmtree(path / "obs" / "n_counts")
    with pytest.raises(UserError, match=r"counts.zarr: damaged"):
        read_store(path, counts=False)
