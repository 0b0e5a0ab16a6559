"""Stored pixel values of one DICOM file, before any rescaling."""

import contextlib
import mmap
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pydicom
from pydicom.filereader import read_partial
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian, RLELossless

from dagman.ct import bytestream
from dagman.errors import DagmanError

Decode: TypeAlias = Callable[[int], np.ndarray]
"""Frame number, from 0, to stored values (rows, columns)."""
_THROUGH_SIMPLEITK = {
    f"1.2.840.10008.1.2.4.{code}" for code in ("50", "51", "57", "70", "80", "81", "90", "91")
}  # JPEG, JPEG-LS, JPEG 2000
_DESCRIBING = (
    "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel",
    "PhotometricInterpretation", "PixelData",
)  # fmt: skip
_PIXEL_DATA = 0x7FE00010
_PIXELS = (_PIXEL_DATA, 0x7FE00008, 0x7FE00009)
"""Whole numbers, and the two kinds of real ones."""
_UNDEFINED = 0xFFFFFFFF
_ITEM = bytes.fromhex("feff00e0")
"""How a compressed frame begins."""
_DEFLATED_BYTES = 2**28
_DECOMPRESS = "decompress the series, for example with `gdcmconv --raw`"
_COPY = "copy or export this slice again"


@contextlib.contextmanager
def parsing(code: str, path: Path, problem: str, advice: str) -> Iterator[None]:
    """Turn whatever a parser throws into a coded error that quotes nothing but the error's type."""
    try:
        yield
    except (DagmanError, OSError, MemoryError):
        raise
    except Exception as error:
        raise DagmanError(code, path, f"{problem} ({type(error).__name__})", advice) from None


class File(NamedTuple):
    """One DICOM file."""

    data: Any
    """Its data set, as pydicom gives it; pixels of a fixed length stay on disk."""
    place: tuple[int, int] | None
    """Where such pixels lie in the file: first byte, number of bytes declared."""


def parse(path: Path, *, header_only: bool) -> File:
    """What one file holds up to its pixels, not what follows them; compressed pixels too, unless `header_only`.

    Read through a memory map, which hands out no more than the file has, whatever length an element claims.
    """
    with path.open("rb") as stream:
        start = stream.read(1024)
    deflated = start[128:132] == b"DICM" and DeflatedExplicitVRLittleEndian.encode() in start
    if deflated:
        bytestream.check_deflated(path, 144 + int.from_bytes(start[140:144], "little"), _DEFLATED_BYTES)
    place: list[tuple[int, int]] = []
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:

        def stop(tag: int, _vr: str | None, length: int) -> bool:
            start, native = mapped.tell(), tag == _PIXEL_DATA and length != _UNDEFINED and not deflated
            fixed = native and mapped[start : start + 4] != _ITEM  # compressed ones with a length are read whole
            if fixed:
                place.append((start, length))
            return fixed or (header_only and tag in _PIXELS)

        data = read_partial(mapped, stop, force=True)
    return File(data, place[0] if place else None)


def word(header: Any, name: str) -> str:
    """A coded value (CS) in capitals, empty where there is none."""
    value = header.get(name)
    return value.strip().upper() if isinstance(value, str) else ""


def open_file(path: Path, file: File | None = None) -> Decode:
    """Parse a whole file, and return what reads and decodes its frames.

    Args:
        path: The file.
        file: What `parse` gave for it, where that was done before.

    Raises:
        DagmanError: `E-SLICE` when it is cut short or broken, `E-CODEC` when its compression cannot be decoded here.
    """
    with parsing("SLICE", path, "is cut short or broken", _COPY):
        file = parse(path, header_only=False) if file is None else file
        data = file.data
        syntax = data.file_meta.get("TransferSyntaxUID")
        stored = None if file.place else data.get("PixelData")
    if not file.place and not isinstance(stored, bytes):
        raise DagmanError("SLICE", path, "has no pixels", _COPY)
    with parsing("SLICE", path, "its pixels are badly described", _COPY):
        if syntax is None or not syntax.is_compressed:
            return _native(path, file)
        if file.place:
            raise DagmanError("SLICE", path, "says that its pixels are compressed, but they are not", _COPY)
        if syntax == RLELossless:
            return _run_length(path, data)
        if syntax in _THROUGH_SIMPLEITK:
            return _simpleitk(path, data)
        name = syntax if syntax.name != syntax else "something unknown"
        raise DagmanError("CODEC", path, f"is compressed as {name}", _DECOMPRESS)


def _native(path: Path, file: File) -> Decode:
    data = file.data
    rows, columns, frames = int(data.Rows), int(data.Columns), int(data.get("NumberOfFrames") or 1)
    allocated, signed = int(data.BitsAllocated), int(data.PixelRepresentation) == 1
    if allocated not in (8, 16, 32):
        raise DagmanError("SLICE", path, f"allocates {allocated} bits a pixel", _COPY)
    each = rows * columns * allocated // 8
    held = min(file.place[1], path.stat().st_size - file.place[0]) if file.place else len(data.PixelData)
    if held not in (each * frames, each * frames + each * frames % 2):
        raise DagmanError("SLICE", path, f"has {held} pixel bytes where {each * frames} are declared", _COPY)
    syntax = data.file_meta.get("TransferSyntaxUID")
    order = ">" if syntax is not None and not syntax.is_little_endian else "<"
    dtype = np.dtype(f"{order}{'i' if signed else 'u'}{allocated // 8}")

    def decode(frame: int) -> np.ndarray:
        with parsing("SLICE", path, "is cut short or broken", _COPY):
            if file.place:
                values = np.fromfile(path, dtype, rows * columns, offset=file.place[0] + frame * each)
            else:
                values = np.frombuffer(data.PixelData, dtype, rows * columns, frame * each)
            values = values.reshape(rows, columns)
        return _used_bits(path, data, values)

    return decode


def _used_bits(path: Path, data: Any, values: np.ndarray) -> np.ndarray:
    """Values without what some scanners keep in the bits above BitsStored (overlays)."""
    stored, allocated = int(data.get("BitsStored") or 0), int(data.BitsAllocated)
    if not 1 <= stored <= allocated or data.get("HighBit") != stored - 1:
        raise DagmanError("SLICE", path, f"stores {stored} of {allocated} bits in an order nobody uses", _COPY)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    shift = allocated - stored
    if shift:
        values = np.left_shift(values, shift)
        values >>= shift
    return values


def _run_length(path: Path, data: Any) -> Decode:
    def decode(frame: int) -> np.ndarray:
        from pydicom.pixels import get_decoder

        with parsing("SLICE", path, "its pixels cannot be decoded", _COPY):
            values, _ = get_decoder(RLELossless).as_array(data, index=frame, raw=True)
        return _used_bits(path, data, values)

    return decode


def _simpleitk(path: Path, data: Any) -> Decode:
    """JPEG, JPEG-LS and JPEG 2000 by GDCM, shown nothing but the pixels and what describes them."""
    if int(data.get("NumberOfFrames") or 1) != 1:
        problem = "is a compressed multi-frame file"
        raise DagmanError("CODEC", path, problem, _DECOMPRESS)
    bare = pydicom.Dataset()
    bare.file_meta = pydicom.dataset.FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = data.file_meta.TransferSyntaxUID
    bare.SOPClassUID = bare.file_meta.MediaStorageSOPClassUID = CTImageStorage
    bare.SOPInstanceUID = bare.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    bare.RescaleSlope, bare.RescaleIntercept = 1, 0
    for name in _DESCRIBING:
        if name in data:
            bare[name] = data[name]

    def decode(frame: int) -> np.ndarray:
        import SimpleITK

        with tempfile.TemporaryFile() as stream:
            pydicom.dcmwrite(stream, bare, enforce_file_format=True)
            stream.seek(0)
            with parsing("SLICE", path, "its compressed pixels cannot be decoded", _COPY):
                image = SimpleITK.ReadImage(f"/dev/fd/{stream.fileno()}", imageIO="GDCMImageIO")
        values: np.ndarray = SimpleITK.GetArrayFromImage(image)[frame]
        return values

    return decode
