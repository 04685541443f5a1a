"""How far what is packed expands, looked at before a library unpacks it into memory.

A chunk of an array has a size that its metadata declare, and unpacks to no more than that. What a chunk's bytes say, or
what unpacking them up to that size shows, is compared here; libraries unpack whatever they are given.
"""

from __future__ import annotations

import bz2
import json
import lzma
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py

from scvi_core.files import UserError

SLACK = 2**24  # bytes that any chunk may have: most a library's own buffers
DEFLATE = 1032  # how far deflate packs at best
# codecs that leave the number of bytes as it is, or nearly
PLAIN = {
    "bytes", "transpose", "crc32c", "crc32", "adler32", "fletcher32", "shuffle", "delta", "bitround", "vlen-utf8",
    "vlen-bytes", "fixedscaleoffset", "quantize", "astype",
}  # fmt: skip
_HDF5 = {1: "gzip", 32001: "blosc", 32015: "zstd", 32026: "blosc2"}  # filters that pack; others are bounded


def check_hdf5(item: h5py.Dataset, where: str) -> None:
    """Refuse a dataset of which a chunk unpacks to far more than its shape.

    Raises
    ------
    UserError
        One line that names the dataset.
    """
    if item.chunks is None:
        return
    plist = item.id.get_create_plist()
    codecs = [_HDF5[code] for i in range(plist.get_nfilters()) if (code := plist.get_filter(i)[0]) in _HDF5]
    most = _most(math.prod(item.chunks) * item.dtype.itemsize)
    _check_codecs(codecs, where)
    todo: list[tuple[int, ...]] = []

    def look(info: Any) -> None:
        if codecs and (codecs != ["gzip"] or info.size * DEFLATE > most):
            todo.append(info.chunk_offset)

    item.id.chunk_iter(look)
    for offset in todo:
        _, data = item.id.read_direct_chunk(offset)
        _check(bytes(data), codecs[0], most, where)


def check_zarr(folder: Path, where: str) -> None:
    """The same of an array of a zarr folder (format 2 or 3), also of the chunks in its shards."""
    if (folder / "zarr.json").is_file():
        about = json.loads((folder / "zarr.json").read_text("utf-8"))
        shape, names = about["chunk_grid"]["configuration"]["chunk_shape"], about["codecs"]
        shards = names[0]["configuration"] if len(names) == 1 and names[0]["name"] == "sharding_indexed" else None
        if shards:
            inner, names = math.prod(shards["chunk_shape"]), shards["codecs"]
            at_end = shards.get("index_location", "end") == "end"
            if [codec["name"] for codec in shards["index_codecs"]] not in (["bytes"], ["bytes", "crc32c"]):
                raise UserError(f"{where}: an index of its shards that is not known here; write it without shards")
        size = about["data_type"] if isinstance(about["data_type"], str) else "object"
        codecs = [str(codec["name"]).removeprefix("numcodecs.") for codec in names]
    else:
        about = json.loads((folder / ".zarray").read_text("utf-8"))
        shape, shards, size = about["chunks"], None, str(about["dtype"])
        codecs = [codec["id"] for codec in [*(about.get("filters") or ()), about.get("compressor")] if codec]
    codecs = [codec for codec in codecs if codec not in PLAIN]
    _check_codecs(codecs, where)
    if not codecs:
        return
    most = _most((inner if shards else math.prod(shape)) * _itemsize(size))
    for path in folder.rglob("*"):
        if path.name not in ("zarr.json", ".zarray", ".zattrs") and path.is_file():
            for part in _parts(path, math.prod(shape) // max(1, inner), at_end, where) if shards else [None]:
                if codecs == ["gzip"] and (part[1] if part else path.stat().st_size) * DEFLATE <= most:
                    continue
                with path.open("rb") as handle:
                    handle.seek(part[0] if part else 0)
                    _check(handle.read(part[1] if part else -1), codecs[0], most, where)


def _parts(path: Path, n: int, at_end: bool, where: str) -> Iterator[tuple[int, int]]:
    """Offset and length of the chunks in a shard, by its index: two 64 bit integers each, all ones where none is."""
    size = path.stat().st_size
    if size < 16 * n:
        raise UserError(f"{where}: a shard ({path.name}) is too short for its index; copy the whole store again")
    with path.open("rb") as handle:
        for back in (4, 0):  # with and without its checksum
            handle.seek(max(0, size - 16 * n - back) if at_end else 0)
            index = handle.read(16 * n)
            pairs = [
                (int.from_bytes(index[i : i + 8], "little"), int.from_bytes(index[i + 8 : i + 16], "little"))
                for i in range(0, len(index), 16)
            ]
            pairs = [pair for pair in pairs if pair != (2**64 - 1, 2**64 - 1)]
            if all(start + length <= size for start, length in pairs):
                yield from pairs
                return
    raise UserError(f"{where}: the index of a shard ({path.name}) is damaged; copy the whole store again")


def _itemsize(dtype: str) -> int:
    """Bytes of a value, by the name of its type; texts of any length are given room."""
    if dtype in ("string", "object", "variable_length_bytes") or "O" in dtype:
        return 1024
    digits = "".join(c for c in dtype if c.isdigit())
    if dtype[:1] in "<>|":
        return int(digits or 1) * (4 if "U" in dtype else 1)
    return max(1, int(digits or 8) // 8)


def _most(declared: int) -> int:
    return max(SLACK, 2 * declared)


def _check_codecs(codecs: list[str], where: str) -> None:
    known = {"gzip", "zlib", "zstd", "blosc", "blosc2", "lz4", "bz2", "lzma"}
    if odd := [codec for codec in codecs if codec not in known]:
        raise UserError(f"{where} is packed by {odd[0]!r}, which is not read here; write it with zstd, blosc or gzip")
    if len(codecs) > 1:
        raise UserError(f"{where} is packed more than once ({', '.join(codecs)}); write it with one of them")


def _check(data: bytes, codec: str, most: int, where: str) -> None:
    expands = {"gzip": _inflated, "zlib": _inflated, "zstd": _zstd, "bz2": _bunzipped, "lzma": _unlzma}.get(codec)
    size = expands(data, most) if expands else _told(data, codec)
    if size > most:
        raise UserError(
            f"{where}: a chunk of {len(data):,} bytes unpacks to more than {most:,}, twice what its shape holds; it is "
            "damaged or was made to harm; fetch or write it again"
        )


def _told(data: bytes, codec: str) -> int:
    """What blosc and lz4 write in front, which is what is allocated."""
    at = {"blosc": 4, "blosc2": 4, "lz4": 0}[codec]
    return int.from_bytes(data[at : at + 4], "little")


def _inflated(data: bytes, most: int) -> int:
    total = 0
    while data and total <= most:
        unpack = zlib.decompressobj(47)  # either head
        try:
            total += len(unpack.decompress(data, most - total + 1))
        except zlib.error:  # its reader says so
            return total
        data = unpack.unused_data
        if not unpack.eof:
            break
    return total


def _streams(data: bytes, most: int, begin: Callable[[], Any]) -> int:
    total = 0
    while data and total <= most:
        unpack = begin()
        try:
            total += len(unpack.decompress(data, most - total + 1))
        except (OSError, EOFError, lzma.LZMAError):
            return total
        if not unpack.eof:
            break
        data = unpack.unused_data
    return total


def _bunzipped(data: bytes, most: int) -> int:
    return _streams(data, most, bz2.BZ2Decompressor)


def _unlzma(data: bytes, most: int) -> int:
    return _streams(data, most, lambda: lzma.LZMADecompressor(memlimit=2**28))


def _zstd(data: bytes, most: int) -> int:
    """At most as many bytes as these frames unpack to, by the heads of their blocks (RFC 8878), or as they say."""
    at, total = 0, 0
    while at + 5 <= len(data) and total <= most:
        magic = int.from_bytes(data[at : at + 4], "little")
        if magic & 0xFFFFFFF0 == 0x184D2A50:  # a frame to skip
            at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
            continue
        if magic != 0xFD2FB528:
            return total
        head = data[at + 4]
        single, flag = head >> 5 & 1, head >> 6
        at += 5 + (not single) + (0, 1, 2, 4)[head & 3]
        size = (single, 2, 4, 8)[flag]
        told = int.from_bytes(data[at : at + size], "little") + (256 if size == 2 else 0)
        at, held = at + size, 0
        while at + 3 <= len(data) and total + held <= most:
            block = int.from_bytes(data[at : at + 3], "little")
            last, kind, length = block & 1, block >> 1 & 3, block >> 3
            held += 2**17 if kind == 2 else length
            at += 3 + (1 if kind == 1 else length)
            if last:
                break
        at += 4 * (head >> 2 & 1)
        total += max(held if not size else min(held, told) if told <= most else told, 0)
    return total
