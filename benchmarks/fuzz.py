"""Fuzzing of every reader: small good inputs, changed at random, 10^5 a format.

    python benchmarks/fuzz.py [FORMAT ...] [--inputs 100000] [--seconds 3600] [--seed 0] [--keep FOLDER]

Reading has to end in a result or in a `UserError` whose line is printable and short, within 20 seconds and 2 GiB beyond
what the process had. Anything else is a finding: another exception, a crash of a library, an endless loop. What is read
is determined by format, seed and number, so `--first N --inputs 1` repeats one. Files of our own but HDF5 get their
checksum anew after they were changed, so that what reads them behind it is tried too.
"""

from __future__ import annotations

import argparse
import faulthandler
import gzip
import json
import logging
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "unit"))
import _data
import _inputs
import _samples
import pandas as pd

import scvi_core
from scvi_core import io
from scvi_core.config import InputConfig, ModelConfig, TrainConfig, load_config, load_samples
from scvi_core.files import UserError, read_decisions, read_json, read_parquet, write_json, write_parquet
from scvi_core.files.checksum import BLANK, seal
from scvi_core.files.decisions import Decisions
from scvi_core.io import checks
from scvi_core.log import one_line
from scvi_core.preprocess import samples, store

SECONDS, MEMORY = 20, 2 * 2**30
WORDS = (
    b"0", b"-1", b"1e400", b"nan", b"NA", b"%", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b"\t", b",", b'"',
    b"{", b"[", b"&a", b"*a", b"!!python/object:x", b"null", b"9" * 30, b"1_0", b"0x", b"\x1b[2J", "ü".encode(), b"../",
)  # fmt: skip
INTEGERS = (0, 1, -1, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)


# --- what is read: a good one, and the reader -------------------------------------------------------------------------


def _counts(path: Path) -> None:
    io.read_counts(path, InputConfig(), Decisions("fuzz"))


def _sample(path: Path) -> None:
    obs, _, _ = samples.read_tables(path, ("barcode", "batch"))
    for _ in samples.read_chunks(path, obs.index.notna()):
        pass


def _make_sample(folder: Path) -> Path:
    _samples.write_sample(folder / "counts.h5ad", _samples.sample(_inputs.X, "a"))
    return folder / "counts.h5ad"


def _make_store(folder: Path) -> Path:
    made = _samples.stored(folder / "made", _data.cells(12, 9))
    return Path(shutil.move(made, folder / "counts.zarr"))


def _make_model(folder: Path) -> Path:
    adata = _data.cells(40, 12)
    of = {"model": ModelConfig(n_latent=2, n_hidden=4), "train": TrainConfig(max_epochs=1)}
    model = scvi_core.fit(adata, batch_key="batch", device="cpu", progress=False, **of)
    model.save(folder / "model")
    return folder / "model"


def _make_json(folder: Path) -> Path:
    write_json(folder / "a.json", {"a": [1, 2.5, None, "x"], "b": {"c": True}}, checksum=True)
    return folder / "a.json"


def _make_lines(folder: Path) -> Path:
    made = Decisions("qc", "a")
    made.add("x", 1, "because")
    made.add("y", [1, "z"], "since", n_cells=3)
    made.write(folder / "a.jsonl")
    return folder / "a.jsonl"


def _make_parquet(folder: Path) -> Path:
    frame = pd.DataFrame({"cell_id": [f"c{i}" for i in range(40)], "n": range(40), "kind": ["T", "B"] * 20})
    write_parquet(folder / "a.parquet", frame)
    return folder / "a.parquet"


def _make_text(name: str, text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return make


YAML = "atlas: small\nseed: 3\nqc: {min_counts: 5, mitochondrial: [A, /^MT-/]}\ncluster:\n  resolutions: [0.5, 1.0]\n"
SHEET = "sample\tpath\tbatch\tage\tlayer\na\tx.h5ad\tone\t31\t\nb\ts3://cells/y.h5\ttwo\tNA\traw\n"
READERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    **{name: (make, _counts) for name, make in _inputs.FORMATS.items()},
    "sample": (_make_sample, _sample),
    "store": (_make_store, store.read_store),
    "model": (_make_model, scvi_core.load),
    "parquet": (_make_parquet, lambda path: read_parquet(path, "qc", ["cell_id", "n"])),
    "json": (_make_json, lambda path: read_json(path, "register")),
    "jsonl": (_make_lines, lambda path: read_decisions(path, "qc")),
    "config": (_make_text("config.yaml", YAML), load_config),
    "config-text": (
        _make_text("config.json", '{"seed": 3, "qc": {"n_mads": 4.5}}'),
        lambda p: load_config(_as_text(p)),
    ),
    "sheet": (_make_text("samples.tsv", SHEET), load_samples),
}


def _as_text(path: Path) -> str:
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    return "{" + text.lstrip("{")  # else it is the name of a file


# --- how it is changed ------------------------------------------------------------------------------------------------


def changed(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one to a few things wrong."""
    new = bytearray(data)
    for _ in range(1 + int(rng.expovariate(0.8))):
        at = rng.randrange(len(new) + 1)
        length = min(len(new) - at, 1 + int(rng.expovariate(0.1)))
        how = rng.randrange(9)
        if how == 0 and at < len(new):
            new[at] ^= 1 << rng.randrange(8)
        elif how == 1 and at < len(new):
            new[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif how == 2:
            del new[at : at + length]
        elif how == 3:
            new[at:at] = new[at : at + length] * rng.choice((1, 2, 50))
        elif how == 4:
            new[at:at] = rng.choice(WORDS)
        elif how == 5:
            new[at : at + length] = rng.choice(WORDS)
        elif how == 6:
            size = rng.choice((1, 2, 4, 8))
            new[at : at + size] = struct.pack("<Q", rng.choice(INTEGERS) % 2**64)[:size]
        elif how == 7:
            other = rng.randrange(len(new) + 1)
            new[at : at + length] = new[other : other + length]
        elif how == 8 and rng.random() < 0.2:
            del new[at:]
    return bytes(new)


def spoil(path: Path, rng: random.Random) -> None:
    """Change one file of an input: of packed ones what is in it, half of the time; of ours the checksum, too."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    file = rng.choice(files)
    data = file.read_bytes()
    if data[:2] == b"\x1f\x8b" and rng.random() < 0.5:
        file.write_bytes(gzip.compress(changed(gzip.decompress(data), rng), 1, mtime=0))
        return
    at = data.rfind(b"sha256:")
    if at < 0 or data.startswith(io.HDF5) or rng.random() < 0.1:  # on HDF5 that is not as it was, its library may hang
        file.write_bytes(changed(data, rng))
    else:
        end = at + len(BLANK)
        file.write_bytes(changed(data[:at], rng) + BLANK.encode() + data[end:])
        seal(file)
    if (path / ".zattrs").is_file() and path.name == "counts.zarr":
        about = json.loads((path / ".zattrs").read_bytes()) if file != path / ".zattrs" else None
        if about:
            (path / ".zattrs").write_text(json.dumps(about | {"content_sha256": store._digest(path)}))
    if path.name == "model" and file.name == "model.safetensors":
        card = json.loads((path / "model.json").read_bytes())
        del card["checksum"]
        write_json(path / "model.json", card | {"weights_sha256": scvi_core.files.sha256_file(file)}, checksum=True)


# --- the runs ---------------------------------------------------------------------------------------------------------


class TooLong(BaseException):
    pass


def _alarm(*_: object) -> None:
    raise TooLong


def one(name: str, good: Path, work: Path, seed: int, number: int) -> str | None:
    """Read one changed input; what was wrong with that, or None."""
    rng = random.Random(f"{name} {seed} {number}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    path = work / good.name
    shutil.copytree(good, path) if good.is_dir() else shutil.copy(good, path)
    spoil(path, rng)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True)  # where a library does not come back at all
    try:
        READERS[name][1](path)
    except UserError as error:
        line = one_line(str(error))
        if not line.isprintable() or not line or len(line) > 1100:
            return f"its line is not printable or too long: {line[:200]!r}"
    except TooLong:
        return f"took over {SECONDS} s"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    return None


def run(name: str, inputs: int, seed: int = 0, first: int = 0, seconds: float = 1e9) -> tuple[int, list[str]]:
    """How many inputs were read, and what was found; a child does the work, as a library may crash."""
    found, number, until = [], first, time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "good").mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
            good = READERS[name][0](home / "good")
        while number < first + inputs and time.monotonic() < until:
            for line in _child(name, good, home / "work", seed, range(number, first + inputs), until):
                number = line[0] + 1
                if line[1]:
                    found.append(f"{name} --seed {seed} --first {line[0]}: {line[1]}")
    logging.disable(logging.NOTSET)
    return number - first, found


def _child(
    name: str, good: Path, work: Path, seed: int, numbers: range, until: float
) -> Iterator[tuple[int, str | None]]:
    """What a forked process says of each input, up to its end; if it is killed, that is what is said of the last."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        signal.signal(signal.SIGALRM, _alarm)
        had = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (had + MEMORY, had + MEMORY))
        warnings.simplefilter("ignore")
        checks.TRIAL = 1  # of a file of this size
        for number in numbers:
            if time.monotonic() > until:
                break
            os.write(writing, f"{number}\n".encode())
            told = one(name, good, work, seed, number)
            os.write(writing, f"{number} {json.dumps(told)}\n".encode())
        os._exit(0)
    os.close(writing)
    begun = done = None
    with os.fdopen(reading) as lines:
        for line in lines:
            number, _, told = line.rstrip("\n").partition(" ")
            begun = int(number)
            if told:
                done = begun
                yield begun, json.loads(told)
    _, status = os.waitpid(child, 0)
    if begun is not None and begun != done:
        yield begun, f"the process ended by {status}: a crash of a library"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("formats", nargs="*", default=list(READERS), help="default: all of " + ", ".join(READERS))
    parser.add_argument("--inputs", type=int, default=100_000, help="a format")
    parser.add_argument("--seconds", type=float, default=1e9, help="a format, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    given = parser.parse_args()
    bad = 0
    for of in given.formats:
        began = time.monotonic()
        n, findings = run(of, given.inputs, given.seed, given.first, given.seconds)
        print(f"{of}: {n:,} inputs in {time.monotonic() - began:.0f} s, {len(findings)} findings", flush=True)
        print(*findings[:50], sep="\n", end="\n" * bool(findings), flush=True)
        bad += len(findings)
    raise SystemExit(bad > 0)
