"""The voxel bytes of one file: exactly as many as its header declares, checksums verified, nothing more."""

import os
import zlib
from pathlib import Path

import numpy as np

from dagman.errors import DagmanError

LARGEST_RATIO = 1100
"""Deflate cannot expand more than about 1032 times."""
_CHUNK = 1 << 20
_AGAIN = "copy or export the file again"


def head(path: Path, count: int) -> bytes:
    """The first `count` bytes, after gunzipping where the file is gzip."""
    with path.open("rb") as stream:
        data = stream.read(count + 4096)
    if data[:2] != b"\x1f\x8b":
        return data[:count]
    try:
        return zlib.decompressobj(31).decompress(data, count)
    except zlib.error:
        raise DagmanError("GZIP", path, "is damaged at its very beginning", _AGAIN) from None


def is_gzip(path: Path) -> bool:
    """Whether the file begins as gzip does."""
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def check_size(
    path: Path, shape: tuple[int, ...], itemsize: int, *, offset: int, packed: bool, max_voxels: int
) -> None:
    """Refuse a header that declares more than this file can hold, before anything is allocated.

    Args:
        path: The file.
        shape: Declared voxels per axis.
        itemsize: Bytes per voxel.
        offset: Bytes before the first voxel, in the (unpacked) file.
        packed: Whether the voxels are compressed.
        max_voxels: The most voxels that are read.

    Raises:
        DagmanError: `E-DIMS`, `E-BOMB` or `E-SIZE`.
    """
    voxels = 1
    for side in shape:
        voxels *= side
    size = path.stat().st_size
    declared = offset + voxels * itemsize
    if min(shape) < 1 or voxels > max_voxels:
        sides = " x ".join(map(str, shape))
        raise DagmanError("DIMS", path, f"declares {sides} voxels, the most is {max_voxels:.3g}", _AGAIN)
    if packed and declared > LARGEST_RATIO * size:
        raise DagmanError(
            "BOMB", path, f"declares {declared} bytes, which {size} compressed bytes cannot hold", "remove the file"
        )
    if not packed and declared != size:
        raise DagmanError("SIZE", path, f"has {size} bytes where its header declares {declared}", _AGAIN)


def read_plain(path: Path, offset: int, count: int) -> np.ndarray:
    """`count` bytes from `offset` on."""
    data = np.fromfile(path, np.uint8, count=count, offset=offset)
    if data.size != count:
        raise DagmanError("SIZE", path, f"ended after {data.size} of {count} voxel bytes", _AGAIN)
    return data


def check_deflated(path: Path, offset: int, limit: int) -> None:
    """Refuse a raw deflate stream that unpacks to more than `limit` bytes, without keeping what it unpacks to.

    Raises:
        DagmanError: `E-BOMB`.
    """
    unpack = zlib.decompressobj(-15)
    size = 0
    with path.open("rb") as stream:
        stream.seek(offset)
        data = stream.read(_CHUNK)
        while data and not unpack.eof:
            size += len(unpack.decompress(data, _CHUNK))
            if size > limit:
                raise DagmanError("BOMB", path, f"unpacks to more than {limit} bytes of DICOM", "remove the file")
            data = unpack.unconsumed_tail or stream.read(_CHUNK)


def inflate(path: Path, offset: int, count: int, *, gzip: bool) -> np.ndarray:
    """Exactly `count` bytes from a gzip or zlib stream that begins at `offset`, read to its end.

    Raises:
        DagmanError: `E-GZIP` (cut short, checksum), `E-SIZE` (more or fewer bytes) or `E-BOMB` (far more bytes).
    """
    result = np.empty(count, np.uint8)
    filled = 0
    bits = 31 if gzip else 15
    unpack = zlib.decompressobj(bits)
    with path.open("rb") as stream:
        stream.seek(offset)
        data = stream.read(_CHUNK)
        while data or not unpack.eof:
            if not data:
                position = os.fstat(stream.fileno()).st_size
                raise DagmanError("GZIP", path, f"ends early at byte {position}", _AGAIN)
            try:
                piece = unpack.decompress(data, _CHUNK)
            except zlib.error:
                where = f"a checksum or a code is wrong near byte {stream.tell() - len(data)}"
                raise DagmanError("GZIP", path, f"is damaged ({where})", _AGAIN) from None
            fits = max(min(len(piece), count - filled), 0)
            result[filled : filled + fits] = np.frombuffer(piece, np.uint8, fits)
            filled += len(piece)
            if filled > count + 2 * _CHUNK:
                raise DagmanError("BOMB", path, f"unpacks to far more than the {count} bytes declared", "remove it")
            data = unpack.unconsumed_tail
            if unpack.eof:
                data = unpack.unused_data or stream.read(_CHUNK)
                if not data.strip(b"\0"):
                    data = b""
                else:
                    unpack = zlib.decompressobj(bits)
            elif not data:
                data = stream.read(_CHUNK)
    if filled != count:
        raise DagmanError("SIZE", path, f"unpacks to {filled} bytes where its header declares {count}", _AGAIN)
    return result
