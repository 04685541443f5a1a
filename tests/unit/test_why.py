"""What is said of a build that stopped: told by logs and benchmarks alone."""

import os
import re
import subprocess
import sys

import pytest

from scvi_core.why import failures, interrupted, why


@pytest.fixture
def atlas(tmp_path):
    """A step that ended well, one that did not, and one that was killed; each a second after the one before."""
    clock = iter(range(1_000_000_000, 2_000_000_000))

    def write(path, text):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        now = next(clock)
        os.utime(path, (now, now))

    write(tmp_path / "benchmarks" / "genes.tsv", "s\n1\n")
    write(tmp_path / "logs" / "ingest.a.log", "INFO fine\n")
    write(tmp_path / "benchmarks" / "ingest.a.tsv", "s\n1\n")
    write(tmp_path / "logs" / "ingest.b.c.log", "INFO read\nerror: x.h5: no counts; name a layer\nleft over\n")
    write(tmp_path / "logs" / "genes.log", "INFO genes: 5 of 10 cells read\n\n")
    return tmp_path


def test_steps_that_did_not_end_well_are_told_with_sample_log_and_reason(atlas):
    first, second = failures(atlas)
    assert (first.step, first.sample, first.log.name) == ("ingest", "b.c", "ingest.b.c.log")
    assert str(first) == "ingest, sample b.c: x.h5: no counts; name a layer"
    assert second.step == "genes" and second.sample is None and not second.told
    assert str(second).endswith("its log ends with: INFO genes: 5 of 10 cells read")
    lines = why(atlas).split("\n")
    assert lines[0].startswith("2 steps did not end well.") and lines[1:3] == [f"  {f.log}" for f in (first, second)]
    assert lines[3:] == [str(first), str(second)]
    assert f"and 1 more: scvi-core why {atlas}" in why(atlas, most=1) and "killed" not in why(atlas, most=1)


def test_what_an_earlier_build_left_is_not_told(atlas):
    assert why(atlas, since=1_000_001_000.0) == ""


def test_ctrl_c_ends_in_two_lines(atlas):
    (atlas / "logs" / "ingest.b.c.log").write_text("Traceback (most recent call last):\nKeyboardInterrupt\n")
    assert interrupted(atlas) == (
        "Interrupted at genes, ingest.\nWhat was made is kept, and the same command goes on from there."
    )
    (atlas / ".checkpoints").mkdir()
    (atlas / ".checkpoints" / "f.safetensors").touch()
    assert interrupted(atlas).endswith("goes on from there; training goes on from its checkpoint.")
    assert interrupted(atlas, since=1e12).startswith("Interrupted between two steps.\n")


def test_a_fault_before_ctrl_c_is_told_too(atlas):
    lines = interrupted(atlas).split("\n")
    assert lines[:2] == ["ingest, sample b.c: x.h5: no counts; name a layer", "Interrupted at genes."]


def test_the_last_line_is_red_on_a_terminal_only(atlas):
    pty = pytest.importorskip("pty")
    command = [sys.executable, "-m", "scvi_core.cli", "why", "none"]
    for extra, red in (({}, True), ({"NO_COLOR": "1"}, False)):
        ours, theirs = pty.openpty()
        subprocess.run(command, stderr=theirs, env=os.environ | extra, check=False)
        said = os.read(ours, 10_000).decode().strip()
        assert re.fullmatch(r"\x1b\[1;31merror: none: .*\x1b\[0m" if red else r"error: none: .*", said), said
        os.close(ours), os.close(theirs)
