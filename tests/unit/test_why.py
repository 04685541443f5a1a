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


SAID = """[Thu Nov 26 12:00:00 2026]
Error in rule {step}:
    message: None
    jobid: 3
    output: {out}
    log: {log}, {theirs} (check log file(s) for error details)
    shell:
        scvi-core {step} ... 2> {log}
        (command exited with non-zero exit code)
    external_jobid: 12

SLURM-job '12' failed, SLURM status is: '{status}'. Detailed failure reason unavailable (status command is not 'sacct').
SLURM-job '13' failed, SLURM status is: 'CANCELLED'.
"""


@pytest.mark.parametrize(
    ("status", "theirs", "told"),
    [
        ("OUT_OF_MEMORY", "", r"ran out of memory \(it had 654 MB\); give it more: --set-resources genes:mem_mb="),
        ("FAILED", "slurmstepd: error: Detected 1 oom_kill event in StepId=12.0", "ran out of memory .it had 654 MB"),
        ("TIMEOUT", "", "reached its time limit; give it more: --set-resources genes:runtime=MINUTES"),
        (
            "FAILED",
            "slurmstepd: error: *** JOB 12 ON n1 CANCELLED AT ... DUE TO TIME LIMIT ***",
            "reached its time limit",
        ),
        ("NODE_FAIL", "", "lost its node; run the same command again"),
        ("FAILED", "*** JOB 12 ON n1 CANCELLED AT 12:00 DUE TO NODE FAILURE ***", "lost its node"),
        ("FAILED", "FATAL:   could not open image /x/scvi-core.sif: no such file", "cannot run the image; make image"),
        ("FAILED", "sbatch: error: Requested node configuration is not available", "asks for a GPU, or a node, that"),
        ("FAILED", "sbatch: error: invalid partition specified: gpu", "could not be submitted; name your site's"),
        (
            "FAILED",
            "CalledProcessError: ... returned non-zero exit status 137.",
            "was killed, as a step is that takes more",
        ),
        ("CANCELLED", "", "was cancelled; run the same command again"),
        ("FAILED", "nothing known", "ended without an error line"),
    ],
)
@pytest.mark.parametrize("began", [True, False])
def test_what_slurm_says_of_a_job_is_told(atlas, tmp_path, status, theirs, told, began):
    log, slurm = atlas / "logs" / "genes.log", tmp_path / "slurm_logs" / "rule_genes" / "12.log"
    slurm.parent.mkdir(parents=True)
    slurm.write_text(f"Building DAG of jobs...\n{theirs}\n")
    log.write_text("INFO genes begins on n1, Slurm job 12, 654 MB\nINFO genes: 5 of 10 cells read\n")
    (atlas / "benchmarks" / "genes.tsv").unlink()
    if not began:
        log.unlink()
        told = told.partition(" (it had")[0].partition(" \\(it had")[0].partition(" .it had")[0]
        told = told.replace(
            "ended without an error line", "did not begin; what Snakemake or Slurm says: .*SLURM-job '12'"
        )
    head = tmp_path / "head.log"
    head.write_text(SAID.format(step="genes", out="x", log=log, theirs=slurm, status=status))
    [failure] = [one for one in failures(atlas, logs=[head]) if one.step == "genes"]
    assert re.match(f"genes: {told}", str(failure)), str(failure)
    assert str(failure) in why(atlas, logs=[head])


def test_a_line_of_ones_own_goes_before_what_slurm_says(atlas, tmp_path):
    head = tmp_path / "head.log"
    head.write_text(SAID.format(step="ingest", out="x", log=atlas / "logs/ingest.b.c.log", theirs="", status="FAILED"))
    assert str(failures(atlas, logs=[head])[0]) == "ingest, sample b.c: x.h5: no counts; name a layer"
    other = tmp_path / "other.log"  # of a sample whose job never began
    other.write_text(SAID.format(step="qc", out="x", log=atlas / "logs/qc.b.c.log", theirs="", status="TIMEOUT"))
    assert str(failures(atlas, logs=[other])[-1]).startswith("qc, sample b.c: reached its time limit")


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
