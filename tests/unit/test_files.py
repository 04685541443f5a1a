"""Files that are whole or absent."""

import fcntl
import os
import platform
import shutil

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from scvi_core import files
from scvi_core.files import (
    BLANK,
    Decisions,
    UserError,
    alone,
    read_decisions,
    read_json,
    read_parquet,
    replacing,
    seal,
    write_json,
    write_parquet,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_whole_or_as_before(tmp_path):
    path = tmp_path / "table"
    path.write_text("earlier")
    with pytest.raises(ValueError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ValueError
    assert path.read_text() == "earlier" and names(tmp_path) == ["table"]
    with replacing(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole" and names(tmp_path) == ["table"]


def test_a_folder_replaces_a_folder(tmp_path):
    for content in ("one", "two"):
        with replacing(tmp_path / "tree", "LOOKUP") as temporary:
            (temporary / "model").mkdir(parents=True)
            (temporary / "model" / ("model.json" if content == "two" else "model.safetensors")).write_text(content)
    assert names(tmp_path) == ["tree"] and names(tmp_path / "tree" / "model") == ["model.json"]


OURS = {
    "MODEL": {"model.safetensors": b"w", "model.json": b'{\n  "batches": []\n}\n', "history.parquet": b"PAR1"},
    "LOOKUP": {"lookup.json": b'{\n  "found": null\n}\n', "model/model.safetensors": b"w"},
    "CRITICISM": {"checks.json": b'{\n  "checks": []\n}\n', "de.parquet": b"PAR1"},
    "STORE": {".zgroup": b"{}", ".zattrs": b'{"content_sha256": ""}', "X/data/0": b"1", "obs/_index/.zarray": b"{}"},
}


def write(folder, content):
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("kind", OURS)
def test_only_a_folder_of_ours_is_replaced(tmp_path, kind):
    path, first = tmp_path / "out", next(iter(OURS[kind]))
    write(tmp_path, {"aim": b"x", "other/notes.txt": b"x"})
    for mine, content in [
        ("notes.txt", b"x"),
        ("raw/0", b"x"),  # but in a store
        (f"{first}.bak", b"x"),
        (".notes", b""),
        ("X/notes.txt", b"x"),
        ("model.json", b'{"class_name": "Sequential"}'),
        (".zattrs", b'{"encoding-type": "anndata"}'),
    ]:
        if kind == "STORE" and mine == "raw/0":
            continue
        write(path, OURS[kind] | {mine: content})
        before = tree(tmp_path)
        message = f"out: scvi-core writes a {kind} folder there, but {mine} in it is no"
        with pytest.raises(UserError, match=message), replacing(path, kind) as temporary:
            temporary.mkdir()
        assert tree(tmp_path) == before
        shutil.rmtree(path)
    for name, aim in ((first, "../aim"), ("linked", "../other")):
        write(path, OURS[kind])
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(aim)
        with pytest.raises(UserError, match=f"but {name} in it"), replacing(path, kind) as temporary:
            temporary.mkdir()
        assert (path / name).is_symlink()
        shutil.rmtree(path)
    for earlier in (OURS[kind], {first: b""}, {first: OURS[kind][first], ".snakemake_timestamp": b""}):
        path.mkdir(exist_ok=True)  # and an empty folder
        for _ in range(2):
            with replacing(path, kind) as temporary:
                write(temporary, earlier)
        assert sorted(tree(path)) == sorted(earlier)
    assert names(tmp_path) == ["aim", "other", "out"] and names(tmp_path / "other") == ["notes.txt"]


def test_what_comes_while_we_write_stays(tmp_path):
    with pytest.raises(UserError, match=r"notes\.txt"), replacing(tmp_path / "out", "MODEL") as temporary:
        write(temporary, OURS["MODEL"])
        write(tmp_path / "out", {"notes.txt": b"x"})
    assert names(tmp_path / "out") == ["notes.txt"]


def test_only_a_file_of_ours_is_replaced(tmp_path):
    frame = pd.DataFrame({"a": [1, 2]})
    write_parquet(tmp_path / "ours", frame)
    frame.to_parquet(tmp_path / "pandas")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "arrow")
    write(tmp_path, {"notes": b"x", "compact": b'{"a":1}', "damaged": b"PAR1...", "empty": b"", "folder/x": b"x"})
    (tmp_path / "link").symlink_to("ours")
    write_json(tmp_path / "json", {"a": 1})
    with h5py.File(tmp_path / "raw", "w") as file:
        file["uns/organism"] = "human"
    for name in ("pandas", "arrow", "notes", "json", "folder", "link", "raw"):
        before = tree(tmp_path)
        with pytest.raises(UserError, match=f"{name}: "):
            write_parquet(tmp_path / name, frame)
        assert tree(tmp_path) == before
    for name in ("ours", "pandas", "notes", "compact", "folder", "link"):
        before = tree(tmp_path)
        with pytest.raises(UserError, match=f"{name}: "):
            write_json(tmp_path / name, {"a": 1})
        with pytest.raises(UserError, match=f"{name}: "), replacing(tmp_path / name) as temporary:
            write_json(temporary, {"a": 1})  # what is written tells its kind
        assert tree(tmp_path) == before
    for name in ("ours", "damaged", "empty", "none"):
        write_parquet(tmp_path / name, frame)
    write_json(tmp_path / "json", {"a": 2})
    assert (tmp_path / "link").is_symlink()


def test_a_place_that_cannot_be(tmp_path, monkeypatch):
    write(tmp_path, {"file": b"x", "model/notes.txt": b"x"})
    for path in (tmp_path / "file" / "a.json", tmp_path / ("x" * 250)):
        with pytest.raises(UserError, match=r"cannot be written .*name another path"):
            write_json(path, {})
    monkeypatch.chdir(tmp_path / "model")
    for path in (".", "..", tmp_path / "model" / "."):
        with pytest.raises(UserError, match=r"notes\.txt in it|but file in it"), replacing(path, "MODEL") as temporary:
            temporary.mkdir()
    assert sorted(tree(tmp_path)) == ["file", "model/notes.txt"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    """But not what another process is at, nor what is new, of another file, of another machine, or no folder."""
    here = platform.node()
    old = [f".a.json.{here}.killed.tmp", f".a.json.{here}.at_work.tmp", ".a.json.other.1.tmp", f".b.json.{here}.1.tmp"]
    for name in [*old, f".a.json.{here}.new.tmp"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("{")
        if name in old:
            os.utime(tmp_path / name, (0, 0))
    os.mkfifo(tmp_path / f".a.json.{here}.fifo.tmp")
    os.utime(tmp_path / f".a.json.{here}.fifo.tmp", (0, 0))
    before = names(tmp_path)
    handle = os.open(tmp_path / old[1], os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    write_json(tmp_path / "a.json", {})
    os.close(handle)
    assert names(tmp_path) == sorted({*before, "a.json"} - {old[0]})


def test_killed_between_two_renames(tmp_path, caplog):
    """The folder is put back if nothing has taken its place, unless the process is still at it."""
    path, left = tmp_path / "criticism", tmp_path / f".criticism.{platform.node()}.1.tmp"
    (left / "earlier").mkdir(parents=True)
    (left / "earlier/checks.json").write_text('{\n  "earlier": 1\n}\n')
    (left / "criticism").mkdir()
    handle = os.open(left, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    fail = pytest.raises(ValueError)
    with fail, replacing(path, "CRITICISM"):
        raise ValueError
    assert names(tmp_path) == [left.name]
    os.close(handle)
    with caplog.at_level("WARNING"), fail, replacing(path, "CRITICISM"):
        raise ValueError
    assert names(tmp_path) == ["criticism"] and "earlier" in (path / "checks.json").read_text()
    assert "criticism: put back" in caplog.text
    (left / "earlier").mkdir(parents=True)  # killed after both
    with fail, replacing(path, "CRITICISM"):
        raise ValueError
    assert names(tmp_path) == ["criticism"] and names(path) == ["checks.json"]


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    with replacing(tmp_path / "tree") as temporary:
        temporary.mkdir()
        save_file({"a": torch.zeros(1)}, temporary / "a.safetensors")  # made for its owner alone
    with replacing(tmp_path / "b.safetensors") as temporary:
        save_file({"a": torch.zeros(1)}, temporary)
    umask = os.umask(0)
    os.umask(umask)
    for path in (tmp_path / "tree" / "a.safetensors", tmp_path / "b.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(UserError, match=r"a.json: cannot be written \(Permission denied\); check"):
        write_json(tmp_path / "a.json", {})


def test_alone_says_who_waited(tmp_path):
    with alone(tmp_path / "deep" / "lock") as waited:
        assert not waited and names(tmp_path / "deep") == ["lock"]
    assert names(tmp_path / "deep") == []


# ---- checksums

NAMES = [BLANK, "T cell\x85 unsure", "a\u2028b", '"}', "}", "\\", "{}", "\n", "\r", ""]
FRAME = pd.DataFrame({"cell_id": NAMES, "z_0": np.arange(len(NAMES), dtype=np.float32)})
ABOUT = {"names": NAMES, "deep": {"checksum": BLANK}}


def write_h5(path):
    with replacing(path, "H5AD") as temporary:
        with h5py.File(temporary, "w") as file:
            file["uns/content_sha256"], file["X"] = BLANK, np.arange(9)
        seal(temporary, append=True)


def write_choices(path, names=NAMES):
    made = Decisions("qc")
    for name in names:
        made.add("kept", [name], name)
    made.write(path)


SEALED = {  # how each is written, and read
    "parquet": (lambda path: write_parquet(path, FRAME), lambda path: read_parquet(path, "embed")),
    "no rows": (lambda path: write_parquet(path, FRAME.head(0)), lambda path: read_parquet(path, "embed")),
    "json": (lambda path: write_json(path, ABOUT, checksum=True), lambda path: read_json(path, "train")),
    "{}": (lambda path: write_json(path, {}, checksum=True), lambda path: read_json(path, "train")),
    "jsonl": (write_choices, lambda path: read_decisions(path, "qc")),
    "no lines": (lambda path: write_choices(path, []), lambda path: read_decisions(path, "qc")),
    "h5ad": (write_h5, lambda path: files.verify(path, "ingest")),
}


def test_a_checksum_changes_nothing_of_what_is_read(tmp_path):
    for kind in SEALED:
        SEALED[kind][0](tmp_path / kind)
        before = (tmp_path / kind).read_bytes()
        SEALED[kind][0](tmp_path / kind)
        assert (tmp_path / kind).read_bytes() == before, kind
    pd.testing.assert_frame_equal(read_parquet(tmp_path / "parquet", "embed"), FRAME)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "parquet"), FRAME)
    assert list(read_parquet(tmp_path / "parquet", "embed", ["z_0"])) == ["z_0"]
    assert read_json(tmp_path / "json", "train") == ABOUT and read_json(tmp_path / "{}", "train") == {}
    assert [d["reason"] for d in read_decisions(tmp_path / "jsonl", "qc")] == NAMES
    assert read_decisions(tmp_path / "no lines", "qc") == []
    with h5py.File(tmp_path / "h5ad") as file:
        assert file["X"][8] == 8


@pytest.mark.parametrize("kind", SEALED)
def test_every_flipped_bit_is_seen(tmp_path, kind):
    write_, read = SEALED[kind]
    path = tmp_path / "out"
    write_(path)
    content = path.read_bytes()
    bits = range(8 * len(content))
    for bit in bits if len(bits) < 10_000 else np.random.default_rng(0).choice(bits, 10_000, replace=False):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(
            UserError, match=r"out: damaged, .* remove it and run again: `scvi-core \w+` makes it anew$"
        ):
            read(path)
    for cut in (b"", content[:-1], content[: len(content) // 2], content + b"\0", content + BLANK.encode()):
        path.write_bytes(cut)
        with pytest.raises(UserError, match=r"out: damaged"):
            read(path)
    path.write_bytes(content)
    read(path)


def test_what_is_no_file_of_ours(tmp_path, caplog):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name, why in (("fifo", "not a file"), ("folder", "not a file"), ("none", "no such file"), ("loop", "no such")):
        with pytest.raises(UserError, match=f"{name}: {why}.*`scvi-core embed`"):
            read_parquet(tmp_path / name, "embed")
    FRAME.to_parquet(tmp_path / "mine")  # of a user's own, which a command may be given
    with caplog.at_level("WARNING"):
        pd.testing.assert_frame_equal(read_parquet(tmp_path / "mine", "cluster"), FRAME)
    assert "mine: not a table of scvi-core's" in caplog.text
    with pytest.raises(UserError, match="mine: no column 'cluster'; name a table that `scvi-core cluster` wrote"):
        read_parquet(tmp_path / "mine", "cluster", ["cell_id", "cluster"])


# ---- what inputs are known by


def test_stamp_tells_inputs_apart_whatever_their_time(tmp_path):
    path = tmp_path / "a.h5ad"
    for size in (0, 1, files.checksum.SMALL, files.SMALL + 1, 20 * files.SMALL):
        content = bytearray(np.random.default_rng(size).bytes(size))
        seen = set()
        for place in (None, 0, -1) if size else (None,):
            if place is not None:
                content[place] ^= 2 + place
            path.write_bytes(content)
            os.utime(path, (1e9, 1e9))
            # of a large one some pieces are looked at, the last among them
            if place != 0 or size <= files.checksum.SMALL:
                seen.add(files.stamp(path))
        assert len(seen) == (1 if not size else 3 if size <= files.checksum.SMALL else 2), size
        before = files.stamp(path)
        os.utime(path, ns=(10**18, 10**18 + 1))
        assert (files.stamp(path) == before) == (size <= files.checksum.SMALL)  # known by its content
    assert files.stamp(tmp_path / "none") == files.stamp("/dev/null") == ""


def test_stamp_of_a_folder_is_that_of_all_its_files(tmp_path):
    write(tmp_path / "one", {"b/0": b"x" * 999, "b/1": b"", "a": b"y"})
    write(tmp_path / "two", {"b/1": b"", "a": b"y", ".DS_Store": b"z", "b/0": b"x" * 999})
    os.mkfifo(tmp_path / "two" / "fifo")
    assert files.stamp(tmp_path / "one") == files.stamp(tmp_path / "two")
    seen = {files.stamp(tmp_path / "one")}
    for change in ({"a": b"z"}, {"b/1": b"x", "b/0": b"x" * 998}, {"c": b""}):
        write(tmp_path / "one", change)
        seen.add(files.stamp(tmp_path / "one"))
    (tmp_path / "one" / "c").rename(tmp_path / "one" / "d")
    assert len(seen | {files.stamp(tmp_path / "one")}) == 5
    write(tmp_path / "two", {f"c/{k}": bytes(files.checksum.SMALL) for k in range(3)})  # by pieces now, and times
    before = files.stamp(tmp_path / "two")
    content = bytearray(files.checksum.SMALL)
    content[-1] = 1
    for k in range(3):
        about = (tmp_path / f"two/c/{k}").stat()
        (tmp_path / f"two/c/{k}").write_bytes(content)
        os.utime(tmp_path / f"two/c/{k}", ns=(about.st_atime_ns, about.st_mtime_ns))
    assert files.stamp(tmp_path / "two") != before


# ---- one build at a time, and what is left


def test_a_folder_is_one_builds(tmp_path):
    claim = files.Claim(tmp_path / "atlas")
    with pytest.raises(UserError, match=rf"another build is writing into it \(.*process {os.getpid()} in .*wait"):
        files.Claim(tmp_path / "atlas")
    claim.release()
    assert names(tmp_path / "atlas") == []
    (tmp_path / "atlas" / ".lock").write_text("one that was killed")
    files.Claim(tmp_path / "atlas").release()
    (tmp_path / "atlas" / ".lock").symlink_to("elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        files.Claim(tmp_path / "atlas")


def test_what_killed_processes_left_is_swept(tmp_path):
    here, inside = platform.node(), tmp_path / "samples" / "a"
    inside.mkdir(parents=True)
    old = [f".qc.parquet.{here}.abcdefgh.tmp", ".qc.parquet.far.abcdefgh.tmp", ".a.b.tmp", ".notes.tmp"]
    for name in [*old, f".qc.parquet.{here}.a_t_work.tmp", f".qc.parquet.{here}.new_ones.tmp"]:
        (inside / name).mkdir()
        if "new" not in name:
            os.utime(inside / name, (0, 0))
    handle = os.open(inside / f".qc.parquet.{here}.a_t_work.tmp", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert files.sweep(tmp_path) == sorted(inside / name for name in old[:2])
    os.close(handle)
    stay = [f".qc.parquet.{here}.a_t_work.tmp", f".qc.parquet.{here}.new_ones.tmp"]
    assert names(inside) == sorted([*old[2:], *stay])


def test_a_folder_is_there_at_every_moment(tmp_path, monkeypatch):
    """Where the system exchanges two at one stroke; else the earlier one is put back, as above."""
    path = tmp_path / "criticism"
    write(path, {"checks.json": b'{\n  "earlier": 1\n}\n'})
    real = os.rename

    def watching(*paths):
        raise AssertionError("renamed")

    monkeypatch.setattr(os, "rename", watching)
    with replacing(path, "CRITICISM") as temporary:
        write(temporary, {"checks.json": b'{\n  "later": 1\n}\n'})
    assert "later" in (path / "checks.json").read_text() and names(tmp_path) == ["criticism"]
    monkeypatch.setattr(os, "rename", real)
    monkeypatch.setattr(files.whole, "_exchange", lambda *_: False)
    with replacing(path, "CRITICISM") as temporary:
        write(temporary, {"checks.json": b'{\n  "last": 1\n}\n'})
    assert "last" in (path / "checks.json").read_text() and names(tmp_path) == ["criticism"]
