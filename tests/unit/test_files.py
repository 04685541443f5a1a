"""Files that are whole or absent."""

import fcntl
import os
import platform

import pytest
import torch
from safetensors.torch import save_file

from scvi_core.files import UserError, alone, replacing, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


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
        with replacing(tmp_path / "tree") as temporary:
            (temporary / "inner").mkdir(parents=True)
            (temporary / "inner" / content).write_text(content)
    assert names(tmp_path) == ["tree"] and names(tmp_path / "tree" / "inner") == ["two"]


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
    (tmp_path / f".a.json.{here}.renaming.tmp" / "earlier").mkdir(parents=True)  # killed between two renames
    os.utime(tmp_path / f".a.json.{here}.renaming.tmp", (0, 0))
    before = names(tmp_path)
    handle = os.open(tmp_path / old[1], os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    write_json(tmp_path / "a.json", {})
    os.close(handle)
    assert names(tmp_path) == sorted({*before, "a.json"} - {old[0]})


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
