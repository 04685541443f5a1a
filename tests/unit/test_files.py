"""Files that are whole or absent."""

import fcntl
import os

import pytest

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
    """But not what another process is at, nor what is of another file."""
    killed, at_work, new, other = (
        tmp_path / f".{name}.tmp" for name in ("a.json.1", "a.json.2", "a.json.3", "b.json.1")
    )
    for folder in (killed, at_work, new, other):
        folder.mkdir()
        (folder / "half").write_text("{")
        if folder != new:
            os.utime(folder, (0, 0))
    handle = os.open(at_work, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    write_json(tmp_path / "a.json", {})
    os.close(handle)
    assert names(tmp_path) == [".a.json.2.tmp", ".a.json.3.tmp", ".b.json.1.tmp", "a.json"]


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
