"""Ways to disturb a build that runs, and what it has to give all the same."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from _project import BIN, ROOT, environment, snakemake, tree

ALL = bool(os.environ.get("SCVI_CORE_PLATFORM"))  # as `make faults` sets it
slow = pytest.mark.skipif(not ALL, reason="takes minutes: `make faults` runs it (SCVI_CORE_PLATFORM=1)")
IMAGE = Path(os.environ.get("SCVI_CORE_IMAGE", ROOT / "containers" / "scvi-core.sif")).resolve()
VARIES = ["logs", "benchmarks", "decisions", "model_ref.json", ".checkpoints", "report.html", "figures", "lookup"]


def artefacts(folder):
    """Digests of all that the same build has to give again; a killed process may leave temporary files."""
    made = tree(folder / "results" / "small", VARIES)
    return {name: digest for name, digest in made.items() if ".tmp/" not in name}


def start(folder, *arguments):
    """A build that runs on, in a session of its own; what it says goes to the file `said`."""
    command = [BIN / "snakemake", "-s", ROOT / "Snakefile", "--directory", folder, *arguments]
    if "--profile" not in arguments:
        command += ["--cores", "2"]
    with open(folder / "said", "a") as said:
        return subprocess.Popen(
            command, cwd=folder, env=environment(), stdout=said, stderr=said, start_new_session=True
        )


def kill_all(process):
    """The whole session at once, as when a machine is lost."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(folder, *arguments):
    """The same command again, to the end; the lock is one that a killed build has left."""
    assert snakemake(folder, "--unlock").returncode == 0
    done = snakemake(folder, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def processes():
    """pid → (parent, arguments) of all that run, from /proc."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            found[int(path.name)] = parent, (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
    return found


def below(process):
    """(pid, arguments) of all processes below one."""
    running, found, frontier = processes(), [], {process.pid}
    while frontier:
        frontier = {pid for pid, (parent, _) in running.items() if parent in frontier}
        found += [(pid, running[pid][1]) for pid in sorted(frontier)]
    return found


def until(condition, seconds=120, what="it"):
    """Wait; gives what came true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what} did not come about within {seconds} s")


def run(*command, **keywords):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **keywords)


def inside(*command, options=(), **keywords):
    return run("apptainer", "exec", *options, IMAGE, *command, **keywords)
