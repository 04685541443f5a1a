"""Inputs that were damaged or made to harm, by kinds and formats: one line, what it says, and nothing else changed.

Each case is a good input of one format with one thing wrong. What the readers say of it has to name the file, hold the
words of its kind, and be one printable line; nothing that was there before may differ afterwards, nothing may be left.
"""

from __future__ import annotations

import bz2
import gzip
import json
import os
import re
import shutil
import signal
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
from _inputs import FILES, FORMATS, HDF5, MTX, NAMES, TEXT, ZARR, G, N, X, h5ad, mtx

from scvi_core import io
from scvi_core.cli import main
from scvi_core.config import InputConfig, Sample
from scvi_core.files import Decisions, UserError, sha256_file
from scvi_core.io import checks, packed, text
from scvi_core.log import one_line

CASES: dict[str, tuple[Callable[[Path], Path], str, dict]] = {}


def case(name: str, make: Callable[[Path], Path], words: str, **config) -> None:
    assert name not in CASES, name
    CASES[name] = make, words, config


# --- what is wrong with a file as a whole -----------------------------------------------------------------------------


def whole(make, change):
    def made(folder: Path) -> Path:
        path = make(folder)
        data = change(path.read_bytes())
        path.write_bytes(data)
        return path

    return made


def instead(make, put):
    """Something that is no file in the place of one."""

    def made(folder: Path) -> Path:
        path = make(folder)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        put(path)
        return path

    return made


def noise(n: int) -> bytes:
    return np.random.default_rng(n).bytes(n)


for _name, _make in FILES.items():
    case(f"{_name}-empty", whole(_make, lambda _: b""), "an empty file")
    case(f"{_name}-cut", whole(_make, lambda data: data[: len(data) // 3]), "")
    case(f"{_name}-noise", whole(_make, lambda _: b"\x07" + noise(4000)), "")
    case(f"{_name}-pickle", whole(_make, lambda _: b"\x80\x04\x95" + bytes(50)), "a Python pickle, which can run code")
    case(f"{_name}-zip", whole(_make, lambda _: b"PK\x03\x04" + bytes(50)), "a zip archive; unpack it")
    case(f"{_name}-bz2", whole(_make, bz2.compress), "packed by bzip2")
    case(f"{_name}-rds", whole(_make, lambda _: gzip.compress(b"X\n\0\0\0\3" + bytes(50))), "an R object")
    case(f"{_name}-html", whole(_make, lambda _: b"<!DOCTYPE html>\n<html></html>\n"), "a web page")
    case(f"{_name}-zeros", whole(_make, lambda data: bytes(len(data))), "")
for _name, _make in FORMATS.items():
    case(f"{_name}-fifo", instead(_make, os.mkfifo), "neither a file nor a folder")
    case(f"{_name}-missing", instead(_make, lambda path: None), "no such file")
    case(f"{_name}-dangling", instead(_make, lambda path: path.symlink_to("nowhere")), "no such file")
    case(f"{_name}-device", instead(_make, lambda path: path.symlink_to("/dev/zero")), "neither a file nor a folder")
    case(f"{_name}-loop", instead(_make, lambda path: path.symlink_to(path.name)), "")
    case(f"{_name}-empty-folder", instead(_make, lambda path: path.mkdir()), "a folder with neither matrix.mtx nor")

# --- what is wrong in an array ----------------------------------------------------------------------------------------


def put(make, key: str, change: Callable[[np.ndarray], np.ndarray | None]):
    """An HDF5 file with one array changed, or lost where there is nothing to put in its place."""

    def made(folder: Path) -> Path:
        path = make(folder)
        with h5py.File(path, "a") as file:
            old = file[key]
            values, about = old[()], dict(old.attrs)
            del file[key]
            new = change(values)
            if new is not None:
                kind = h5py.string_dtype() if new.dtype.kind == "O" else None
                file.create_dataset(key, data=new, dtype=kind).attrs.update(about)
        return path

    return made


def with_value(value, kind=np.float64):
    def change(values):
        new = values.astype(kind)
        new[(np.array(new.shape) - 1,)[0][0] // 2 if new.ndim == 1 else (0, 0)] = value
        return new

    return change


def first(value):
    def change(values):
        new = np.array([v.decode() if isinstance(v, bytes) else v for v in values.tolist()], object)
        new[0] = value
        return new

    return change


VALUES = {
    "negative": (with_value(-1), r"negative values \(such as -1"),
    "fraction": (with_value(1.5), r"not whole numbers \(such as 1\.5"),
    "nan": (with_value(np.nan), "not finite"),
    "inf": (with_value(np.inf), "not finite"),
    "huge": (with_value(2**40), "beyond what a count can be"),
    "complex": (with_value(1j, np.complex128), "not numbers|cannot be read"),
    "text": (lambda values: values.astype("S"), "not numbers|cannot be read"),
    "normalised": (lambda values: np.log1p(values.astype(np.float64)), "not whole numbers"),
    "lost": (lambda values: None, ""),
    "zeros": (lambda values: 0 * values, "all counts are zero"),
}
NAMES_OF = {
    "twice": (lambda values: np.array([values[0], *values[:-1]]), "appears more than once"),
    "empty": (first(""), "is empty or has control characters"),
    "newline": (first("a\nb"), "control characters"),
    "escape": (first("\x1b[2Ja"), "control characters"),
    "c1": (first("\x9b2Ja"), "control characters"),
    "short": (lambda values: values[:-1], "cell names|no index|but|no col_attrs"),
    "long": (lambda values: np.append(values, values[:1]), "cell names|more than once|but|no col_attrs"),
    "square": (lambda values: np.stack([values, values]), "dimensions|cell names|no col_attrs|but"),
    "lost": (lambda values: None, ""),
}
GENES_OF = {
    "newline": (first("a\nb"), "control characters"),
    "numbers": (lambda values: np.array([str(i) for i in range(G)], object), None),
    "short": (lambda values: values[:-1], "gene names|no row_attrs|same length|must match|Length|arrays"),
    "square": (lambda values: np.stack([values, values]), "dimensions|gene names|no row_attrs|but"),
    "lost": (lambda values: None, ""),
}
COLUMNS = {
    "negative": (with_value(-1, np.int64), "indices has"),
    "beyond": (with_value(10**6, np.int64), "indices has"),
    "fraction": (with_value(0.5), "indices has"),
    "text": (lambda values: values.astype("S"), ""),
    "short": (lambda values: values[:-1], "these should be one number"),
    "twice": (lambda values: np.zeros_like(values), "twice"),
    "lost": (lambda values: None, ""),
}
ENDS = {
    "falling": (lambda values: values[::-1], "does not rise from 0"),
    "shifted": (lambda values: values + 1, "does not rise from 0"),
    "beyond": (lambda values: np.append(values[:-1], values[-1] + 1), "these should be one number"),
    "full": (lambda values: np.append(values[:-1], 10**9), "entries, of"),
    "short": (lambda values: values[:-1], "has the shape"),
    "fraction": (lambda values: values + 0.5, "has the shape"),
    "wrapped": (lambda values: values.astype(np.int64) - 2**31 * (np.arange(len(values)) > 3), "does not rise"),
    "lost": (lambda values: None, ""),
}

for _name, (_make, _keys) in HDF5.items():
    for _part, _kinds in (
        ("values", VALUES), ("cells", NAMES_OF), ("genes", GENES_OF), ("columns", COLUMNS), ("ends", ENDS)
    ):  # fmt: skip
        for _kind, (_change, _words) in _kinds.items() if _part in _keys else ():
            if _words is not None and not (_name == "10x-v3" and (_part, _kind) == ("genes", "numbers")):
                case(f"{_name}-{_part}-{_kind}", put(_make, _keys[_part], _change), _words)

# --- what HDF5 itself allows ------------------------------------------------------------------------------------------


def within(make, change: Callable[[h5py.File, Path], None]):
    def made(folder: Path) -> Path:
        path = make(folder)
        with h5py.File(path, "a") as file:
            change(file, folder)
        return path

    return made


def external_link(key):
    def change(file, folder):
        with h5py.File(folder / "other.h5", "w") as other:
            file.copy(key, other, "x")
        del file[key]
        file[key] = h5py.ExternalLink("other.h5", "x")

    return change


def external_storage(key):
    def change(file, folder):
        values, about = file[key][()], dict(file[key].attrs)
        if values.dtype == object:
            values = values.astype("S")
        del file[key]
        (folder / "raw.bin").write_bytes(values.tobytes())
        file.create_dataset(
            key, values.shape, values.dtype, external=[(str(folder / "raw.bin"), 0, values.nbytes)]
        ).attrs.update(about)

    return change


def virtual(key):
    def change(file, folder):
        shape, kind = file[key].shape, file[key].dtype
        del file[key]
        layout = h5py.VirtualLayout(shape, "f4" if kind.kind == "O" else kind)
        layout[...] = h5py.VirtualSource("other.h5", "x", shape)
        file.create_virtual_dataset(key, layout)

    return change


def unwritten(key, shape, kind="f4", **more):
    def change(file, folder):
        about = dict(file[key].attrs)
        del file[key]
        file.create_dataset(key, shape, kind, **more).attrs.update(about)

    return change


def deflate_bomb(key):
    def change(file, folder):
        old = file[key]
        kind, shape, about = old.dtype, old.shape, dict(old.attrs)
        del file[key]
        new = file.create_dataset(key, shape, kind, chunks=shape, compression="gzip")
        new.attrs.update(about)
        new.id.write_direct_chunk((0,) * len(shape), zlib.compress(bytes(2**26)))

    return change


for _name, (_make, _keys) in HDF5.items():
    _key = _keys["values"]
    case(f"{_name}-external-link", within(_make, external_link(_key)), "a link to another file")
    case(f"{_name}-external-storage", within(_make, external_storage(_key)), "keeps its values in other files")
    case(f"{_name}-virtual", within(_make, virtual(_key)), "a virtual dataset")
    _shape = (2**44,) if "data" in _key else (2**22, 2**22)
    case(f"{_name}-declared", within(_make, unwritten(_key, _shape, chunks=True)), "declares")
    case(f"{_name}-long-texts", within(_make, unwritten(_keys["cells"], (N,), "S100000000")), "texts of 100,000,000")
    case(f"{_name}-deflate-bomb", within(_make, deflate_bomb(_key)), "unpacks to more than|all counts are zero")
    case(f"{_name}-link-to-itself", within(_make, lambda f, _, k=_key: (f.move(k, "x"), f.__setitem__(k, h5py.SoftLink(f"/{k}")))), "")  # noqa: E501  # fmt: skip

# --- zarr -------------------------------------------------------------------------------------------------------------


def array_file(path: Path, key: str) -> tuple[Path, Path]:
    """The metadata and a chunk of an array."""
    names = ("zarr.json", ".zarray")
    about = next(path / key / name for name in names if (path / key / name).exists())
    chunks = [p for p in (path / key).rglob("*") if p.is_file() and p.name not in (*names, ".zattrs")]
    return about, sorted(chunks)[0]


def store(make, change: Callable[[Path], None]):
    def made(folder: Path) -> Path:
        path = make(folder)
        change(path)
        return path

    return made


def edited(key: str, change: Callable[[dict], None]):
    def edit(path: Path) -> None:
        about, _ = array_file(path, key)
        told = json.loads(about.read_text())
        change(told)
        about.write_text(json.dumps(told))

    return edit


def chunk(key: str, change: Callable[[Path], None]):
    def edit(path: Path) -> None:
        change(array_file(path, key)[1])

    return edit


def repacked(key: str, codec: str, data: bytes):
    """The array's chunk, packed by another codec, and what holds too much."""

    def edit(path: Path) -> None:
        about, file = array_file(path, key)
        told = json.loads(about.read_text())
        if "codecs" in told:
            settings = {
                "name": codec,
                "configuration": {"level": 1} if codec != "zstd" else {"level": 1, "checksum": False},
            }
            told["codecs"] = [c for c in told["codecs"] if c["name"] in ("bytes", "vlen-utf8")] + [settings]
        else:
            told["compressor"] = {"id": codec} | ({"level": 1} if codec in ("zstd", "gzip", "zlib") else {})
        about.write_text(json.dumps(told))
        file.write_bytes(data)

    return edit


def zstd(data: bytes) -> bytes:
    from numcodecs import Zstd

    return bytes(Zstd(level=1).encode(data))


def blosc(nbytes: int) -> bytes:
    return struct.pack("<BBBBIII", 2, 1, 0x11, 1, nbytes, nbytes, 32) + bytes(16)


def link_out(file: Path) -> None:
    file.unlink()
    file.symlink_to("/etc/hostname")


_zeros = bytes(2**26)
for _name, _make in ZARR.items():
    _values = "X/data"
    for _key in (_values, "X/indices", "X/indptr", "obs/_index", "var/_index"):
        case(f"{_name}-lost-{_key}", store(_make, chunk(_key, Path.unlink)), "chunks are missing")
        case(f"{_name}-cut-{_key}", store(_make, chunk(_key, lambda p: p.write_bytes(p.read_bytes()[:7]))), "")
        case(f"{_name}-metadata-{_key}", store(_make, lambda path, k=_key: array_file(path, k)[0].write_text("{")), "")
    case(
        f"{_name}-fifo-chunk", store(_make, chunk(_values, lambda p: (p.unlink(), os.mkfifo(p)))), "neither a file nor"
    )
    case(f"{_name}-link-out", store(_make, chunk(_values, link_out)), "a link out of the folder")
    case(
        f"{_name}-deep",
        store(_make, lambda path: array_file(path, "X/data")[0].write_text("[" * 10**5)),
        "not valid JSON",
    )
    case(f"{_name}-shape", store(_make, edited(_values, lambda told: told.update(shape=[2**50]))), "declares")
    _long = (
        {"dtype": "|S100000000"}
        if _name == "zarr2"
        else {"data_type": {"name": "null_terminated_bytes", "configuration": {"length_bytes": 10**8}}}
    )
    case(f"{_name}-long-texts", store(_make, edited("obs/_index", lambda told, to=_long: told.update(to))), "texts of")
    case(f"{_name}-negative", store(_make, edited(_values, lambda told: told.update(shape=[-1]))), "")
    case(f"{_name}-zstd-bomb", store(_make, repacked(_values, "zstd", zstd(_zeros))), "unpacks to more than")
    case(f"{_name}-zstd-many", store(_make, repacked(_values, "zstd", 5 * zstd(_zeros[: 2**24]))), "unpacks to more")
    case(
        f"{_name}-gzip-bomb", store(_make, repacked(_values, "gzip", gzip.compress(_zeros, 1))), "unpacks to more than"
    )
    case(f"{_name}-no-codec", store(_make, repacked(_values, "pickle", b"x")), "pickled objects, which can run code")
case("zarr2-blosc-bomb", store(ZARR["zarr2"], repacked("X/data", "blosc", blosc(2**31 - 1))), "unpacks to more than")
case("zarr2-bz2-bomb", store(ZARR["zarr2"], repacked("X/data", "bz2", bz2.compress(_zeros))), "unpacks to more than")
case("zarr2-unknown", store(ZARR["zarr2"], repacked("X/data", "zfpy", b"x")), "zfpy")
case("zarr2-shape-of-group", store(ZARR["zarr2"], lambda p: (p / "X/.zattrs").write_text(
    (p / "X/.zattrs").read_text().replace(f"{N},", "1000000000,", 1))), "cell names")  # fmt: skip

# --- tables of text ---------------------------------------------------------------------------------------------------


def lines(make, change: Callable[[list[bytes]], list[bytes]]):
    def edit(data: bytes) -> bytes:
        plain = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        new = b"\n".join(change(plain.rstrip(b"\n").split(b"\n"))) + b"\n"
        return gzip.compress(new) if data[:2] == b"\x1f\x8b" else new

    return whole(make, edit)


def cell(value: bytes):
    """One count of a table is something else."""

    def change(rows: list[bytes]) -> list[bytes]:
        mark = b"," if b"," in rows[0] else b"\t"
        fields = rows[3].split(mark)
        return [*rows[:3], mark.join([*fields[:2], value, *fields[3:]]), *rows[4:]]

    return change


def in_header(value: bytes):
    def change(rows: list[bytes]) -> list[bytes]:
        mark = b"," if b"," in rows[0] else b"\t"
        fields = rows[0].split(mark)
        return [mark.join([*fields[:2], value, *fields[3:]]), *rows[1:]]

    return change


for _name, _make in TEXT.items():
    for _kind, _value, _words in (
        ("negative", b"-1", "negative values"), ("fraction", b"0.5", "not whole numbers"),
        ("word", b"x", "has 'x', not a number"), ("missing", b"", "not a number; write 0"),
        ("na", b"NA", "has 'NA', not a number; write 0"), ("hex", b"0x10", "not a number"),
        ("inf", b"inf", "not finite|not a number"), ("huge", b"1e300", "beyond what a count can be"),
        ("overflow", b"9" * 30, ""), ("nul", b"1\x00", "NUL|not a format"), ("comma", b'"1,5"', "not a number"),
        ("escape", b"\x1b[2J", "not a number"), ("two", b"1 2", "not a number"),
    ):  # fmt: skip
        case(f"{_name}-count-{_kind}", lines(_make, cell(_value)), _words)
    case(f"{_name}-header-only", lines(_make, lambda rows: rows[:1]), "no row below the header")
    case(f"{_name}-cells-twice" if _name != "tsv" else f"{_name}-genes-as-text",
         lines(_make, lambda rows: [*rows, rows[1]]) if _name != "tsv" else lines(_make, cell(b"T")),
         "appears more than once" if _name != "tsv" else "not a number")  # fmt: skip
    case(f"{_name}-short-row", lines(_make, lambda rows: [*rows[:4], rows[4].rpartition(b"\t" if b"\t" in rows[4] else b",")[0], *rows[5:]]), "")  # noqa: E501  # fmt: skip
    case(f"{_name}-long-row", lines(_make, lambda rows: [*rows[:4], rows[4] + (b"\t7" if b"\t" in rows[4] else b",7"), *rows[5:]]), "")  # noqa: E501  # fmt: skip
    case(f"{_name}-no-names", lines(_make, lambda rows: [re.sub(rb"[A-Za-z]{2,}[0-9A-Za-z-]*", b"q", row) for row in rows]), "")  # noqa: E501  # fmt: skip
    case(f"{_name}-utf16", lines(_make, lambda rows: [b"\n".join(rows).decode().encode("utf-16")]), "UTF-16 text")
    case(f"{_name}-cp1252", lines(_make, in_header("é".encode("cp1252"))), "not UTF-8 text")
    case(f"{_name}-semicolons", lines(_make, lambda rows: [row.replace(b",", b";").replace(b"\t", b";") for row in rows]), "separated by semicolons")  # noqa: E501  # fmt: skip
    case(f"{_name}-nul-late", lines(_make, lambda rows: [*rows, *(b"A" * k + rows[1] for k in range(1, 60)), b"C" + rows[1] + b"\x00"]), "NUL bytes")  # noqa: E501  # fmt: skip
    case(f"{_name}-nul-after", lines(_make, lambda rows: [*rows, bytes(5000)]), "NUL bytes|not a format")
case("csv-newline-in-name", lines(TEXT["csv"], in_header(b'"a\rb"')), "control characters|cannot be read|not a number|names in the header")  # noqa: E501  # fmt: skip
case("csv-open-quote", lines(TEXT["csv"], cell(b'"')), "")
case("csv.gz-crc", whole(TEXT["csv.gz"], lambda data: data[:-8] + bytes(4) + data[-4:]), "damaged gzip data")
case("csv.gz-tail", whole(TEXT["csv.gz"], lambda data: data + noise(64)), "")
case("csv.gz-twice", whole(TEXT["csv.gz"], gzip.compress), "")
case("csv.gz-named-h5ad", lambda folder: TEXT["csv.gz"](folder).rename(folder / "a.h5ad"), "rename it")
case("h5ad-gzipped", lambda folder: whole(h5ad, gzip.compress)(folder), "an HDF5 file that was gzipped; gunzip it")
case("h5ad-named-csv", lambda folder: h5ad(folder).rename(folder / "a.csv"), "give it its own name")

# --- matrix market ----------------------------------------------------------------------------------------------------


def part(make, name: str, change: Callable[[list[bytes]], list[bytes]]):
    def made(folder: Path) -> Path:
        path = make(folder)
        file = next(path.glob(f"{name}*"))
        whole_file = lines(lambda _: file, change)
        whole_file(folder)
        return path

    return made


def entry(value: bytes):
    return lambda rows: [*rows[:5], value, *rows[6:]]


def sizes(value: bytes):
    return lambda rows: [rows[0], value, *rows[2:]]


_n = int(np.count_nonzero(X))
for _name, _make in MTX.items():
    for _kind, _change, _words in (
        ("pattern", lambda rows: [rows[0].replace(b"integer", b"pattern"), *rows[1:]], "a matrix of type"),
        ("complex", lambda rows: [rows[0].replace(b"integer", b"complex"), *rows[1:]], "a matrix of type"),
        ("symmetric", lambda rows: [rows[0].replace(b"general", b"symmetric"), *rows[1:]], "a matrix of type"),
        ("no-sizes", lambda rows: rows[:1], "truncated before its line of sizes"),
        ("negative-sizes", sizes(b"-9 12 5"), "not whole numbers"),
        ("two-sizes", sizes(b"9 12"), "not whole numbers"),
        ("nan-sizes", sizes(b"9 12 nan"), "not whole numbers"),
        ("endless-sizes", sizes(b"9 12 1e30"), "declares|not whole"),
        ("other-sizes", sizes(b"90 12 %d" % _n), "not of one export"),
        ("cut", lambda rows: rows[:-3], "truncated"),
        ("more", lambda rows: [*rows, rows[-1]], "too long|stored twice"),
        ("row-0", entry(b"0 1 1"), "outside of"),
        ("row-beyond", entry(b"10 1 1"), "outside of"),
        ("column-beyond", entry(b"1 13 1"), "outside of"),
        ("row-huge", entry(b"99999999999999999999 1 1"), ""),
        ("row-fraction", entry(b"1.5 1 1"), "no whole number"),
        ("twice", lambda rows: [*rows[:5], rows[4], *rows[6:]], "stored twice"),
        ("fraction", entry(b"1 1 1.5"), ""),
        ("negative", entry(b"1 1 -2"), ""),
        ("nan", entry(b"1 1 nan"), ""),
        ("inf", entry(b"1 1 inf"), ""),
        ("huge", entry(b"1 1 1e20"), ""),
        ("two", entry(b"1 1"), "is not 3 numbers"),
        ("four", entry(b"1 1 1 1"), "is not 3 numbers"),
        ("comma", entry(b"1 1 1,5"), "is not 3 numbers"),
        ("word", entry(b"1 1 \x1b[2J"), "is not 3 numbers"),
        ("nul", entry(b"1 1 1\x00"), ""),
    ):  # fmt: skip
        case(f"{_name}-{_kind}", part(_make, "matrix", _change), _words)
    for _beside in ("barcodes", "features"):
        case(f"{_name}-{_beside}-short", part(_make, _beside, lambda rows: rows[:-1]), "not of one export")
        case(f"{_name}-{_beside}-long", part(_make, _beside, lambda rows: [*rows, b"z"]), "not of one export")
        case(f"{_name}-{_beside}-utf16", part(_make, _beside, lambda rows: [b"\n".join(rows).decode().encode("utf-16")]), "UTF-16 text")  # noqa: E501  # fmt: skip
        case(f"{_name}-{_beside}-bytes", part(_make, _beside, lambda rows: [b"\xff\xfe\xfd", *rows[1:]]), "UTF-16|not UTF-8")  # noqa: E501  # fmt: skip
        for _kind, _do, _words in (
            ("lost", Path.unlink, "beside it"),
            ("fifo", lambda p: (p.unlink(), os.mkfifo(p)), "neither a file nor a folder"),
            ("folder", lambda p: (p.unlink(), p.mkdir()), "beside it|not a file"),
            ("link-out", link_out, "a link out of the folder"),
            ("device", lambda p: (p.unlink(), p.symlink_to("/dev/zero")), "a link out of the folder"),
            ("empty", lambda p: p.write_bytes(b""), "an empty file"),
        ):  # fmt: skip
            case(f"{_name}-{_beside}-{_kind}", store(_make, lambda path, b=_beside, do=_do: do(next(path.glob(f"{b}*")))), _words)  # noqa: E501  # fmt: skip
    case(f"{_name}-barcodes-twice", part(_make, "barcodes", lambda rows: [rows[1], *rows[1:]]), "more than once")
    case(
        f"{_name}-barcodes-escape", part(_make, "barcodes", lambda rows: [b"\x1b[2J", *rows[1:]]), "control characters"
    )
    case(f"{_name}-features-nul", part(_make, "features", lambda rows: [b"a\x00b\tc\x00d\tGene Expression", *rows[1:]]), "control")  # noqa: E501  # fmt: skip
    case(f"{_name}-features-none-a-gene", part(_make, "features", lambda rows: [row.replace(b"Gene Expression", b"Antibody Capture") for row in rows]), "no feature is a gene")  # noqa: E501  # fmt: skip

# --- the test ---------------------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): f"-> {os.readlink(p)}" if p.is_symlink() else
        sha256_file(p) if p.is_file() else str(p.stat().st_mode)
        for p in sorted(folder.rglob("*"))
    }  # fmt: skip


@pytest.mark.parametrize("make", FORMATS.values(), ids=list(FORMATS))
def test_the_inputs_that_cases_are_made_of_are_good(tmp_path, make):
    path = make(tmp_path)
    _, decisions = io.ingest(path, tmp_path / "out.h5ad", Sample(sample="s", path=str(path), batch="b"), InputConfig())
    adata = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert sorted(adata.var["gene_name"]) == sorted(NAMES) and adata.X.sum() == X.sum()
    assert not [d for d in decisions if d.warning]


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_else(tmp_path, monkeypatch, name):
    make, words, config = CASES[name]
    monkeypatch.setattr(packed, "SLACK", 2**20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = make(tmp_path)
        before = tree(tmp_path)
        with pytest.raises(UserError, match=words) as caught:
            io.ingest(path, tmp_path / "out.h5ad", Sample(sample="s", path="x", batch="b"), InputConfig(**config))
    line = one_line(str(caught.value))
    assert line.isprintable() and len(line) < 1000 and path.name in line, line
    assert tree(tmp_path) == before


def test_blanks_at_the_end_of_a_matrix_are_nothing(tmp_path):
    path = mtx(tmp_path) / "matrix.mtx"  # scipy's reader crashed on them
    path.write_bytes(path.read_bytes().rstrip(b"\n") + b" \t ")
    assert io.read_counts(path, InputConfig(), Decisions("x")).X.sum() == X.sum()


def test_there_are_many():
    assert len(CASES) >= 300


SAMPLE = sorted(CASES)[::60]


@pytest.mark.parametrize("name", SAMPLE)
def test_the_command_says_the_same(tmp_path, monkeypatch, capsys, name):
    make, words, _ = CASES[name]
    monkeypatch.setattr(packed, "SLACK", 2**20)
    path = make(tmp_path)
    before = tree(tmp_path)
    arguments = ["ingest", str(path), "--sample", "s", "--batch", "b", "--out", str(tmp_path / "out.h5ad")]
    monkeypatch.setattr(sys, "argv", ["scvi-core", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 1 and len(told) == 1 and re.search(words, told[0]) and path.name in told[0]
    assert tree(tmp_path) == before


# --- without end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rows", "line", "comments", "barcodes", "hole"])
def test_what_has_no_end_is_bounded(tmp_path, monkeypatch, kind):
    """Packed zeros and holes of files, at a thousandth of the size that they are let."""
    monkeypatch.setattr(text, "MOST_TEXT", 2**18)
    monkeypatch.setattr(text, "MOST_LINE", 2**17)
    monkeypatch.setattr(text, "MOST_SEEN", 2**20)
    monkeypatch.setattr(checks, "BLOCK", 2**16)
    row = b"," + b",".join([b"0"] * G) + b"\n"
    if kind in ("rows", "line", "hole"):
        path, head = tmp_path / "a.csv.gz", ("," + ",".join(NAMES) + "\n").encode()
        body = {"rows": (b"ACGTACGT-1" + row) * 2**19, "line": b"9," * 2**21, "hole": b""}
        path.write_bytes(gzip.compress(head + body[kind]))
        if kind == "hole":
            path = tmp_path / "a.csv"
            path.write_bytes(head + b"".join(b"ACGTACGT-%d" % i + row for i in range(90)))
            os.truncate(path, 2**33)
    else:
        path = mtx(tmp_path, packed_up=True)
        name, body = ("matrix", b"%%MatrixMarket matrix coordinate integer general\n" + b"%x\n" * 2**21) if kind == (
            "comments"
        ) else ("barcodes", b"ACGTACGT-1\n" * 2**17)  # fmt: skip
        (path / f"{name}.{'mtx' if name == 'matrix' else 'tsv'}.gz").write_bytes(gzip.compress(body))
    with pytest.raises(UserError, match=r"unpacks to over|a line of over|bytes of text where|NUL bytes"):
        io.ingest(path, tmp_path / "out.h5ad", Sample(sample="s", path="x", batch="b"), InputConfig())
    assert not (tmp_path / "out.h5ad").exists()


CODECS = ("zstd", "gzip", "zlib", "blosc", "lz4", "bz2", "lzma")


@pytest.mark.parametrize("codec", CODECS)
def test_packed_sizes_are_told_right(codec):
    import numcodecs

    pack = {
        "zstd": numcodecs.Zstd(1), "gzip": numcodecs.GZip(1), "zlib": numcodecs.Zlib(1), "blosc": numcodecs.Blosc(),
        "lz4": numcodecs.LZ4(), "bz2": numcodecs.BZ2(1), "lzma": numcodecs.LZMA(preset=0),
    }[codec]  # fmt: skip
    rng = np.random.default_rng(1)
    for data in (bytes(2**20), rng.bytes(2**18), rng.poisson(1, 2**18).astype(np.uint8).tobytes(), b"x"):
        made = bytes(pack.encode(data))
        packed._check(made, codec, max(2**17, len(data)), "here")  # as much as it is
        if len(data) > 2**17:
            with pytest.raises(UserError, match="unpacks to more than"):
                packed._check(made, codec, len(data) // 2 - 2**17 if codec == "zstd" else len(data) - 1, "here")


@pytest.mark.parametrize("how", ["dies of SIGTERM", "runs for over 1 s"])
def test_hdf5_itself_may_crash_or_hang(tmp_path, monkeypatch, how):
    def touch(*_):
        os.kill(os.getpid(), signal.SIGTERM if "TERM" in how else 0)
        while True:
            pass

    monkeypatch.setattr(checks, "_touch", touch)
    monkeypatch.setattr(checks, "TRIAL", 1)
    with pytest.raises(UserError, match=f"a.h5ad: HDF5's own library {how} on it"):
        io.ingest(h5ad(tmp_path), tmp_path / "out.h5ad", Sample(sample="s", path="x", batch="b"), InputConfig())
