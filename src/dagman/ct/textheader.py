"""NRRD and MetaImage (.mha), single file: a text header, then one block of voxels, plain or compressed."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dagman.ct import bytestream, grid
from dagman.errors import DagmanError

_HEADER_BYTES = 1 << 20
_EXPORT = "save it again as NIfTI or with a complete header"
_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])
_SPACES = {
    "left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1),
    "right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1),
}  # fmt: skip
_NRRD_TYPES = {
    "signed char": "i1", "int8": "i1", "int8_t": "i1", "uchar": "u1", "unsigned char": "u1", "uint8": "u1",
    "uint8_t": "u1", "short": "i2", "short int": "i2", "signed short": "i2", "int16": "i2", "int16_t": "i2",
    "ushort": "u2", "unsigned short": "u2", "uint16": "u2", "uint16_t": "u2", "int": "i4", "signed int": "i4",
    "int32": "i4", "int32_t": "i4", "uint": "u4", "unsigned int": "u4", "uint32": "u4", "uint32_t": "u4",
    "longlong": "i8", "long long": "i8", "long long int": "i8", "signed long long": "i8",
    "signed long long int": "i8", "int64": "i8", "int64_t": "i8", "ulonglong": "u8", "unsigned long long": "u8",
    "unsigned long long int": "u8", "uint64": "u8", "uint64_t": "u8",
    "float": "f4", "double": "f8",
}  # fmt: skip
_MHA_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip


class _Block(NamedTuple):
    shape: tuple[int, int, int]
    dtype: np.dtype[np.generic]
    affine: np.ndarray
    packing: str
    offset: int


def read(path: Path, max_voxels: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Stored numbers (x, y, z), RAS affine, slope 1 and intercept 0.

    Raises:
        DagmanError: `E-FORMAT`, `E-DETACHED`, `E-HEADER`, `E-DIMS`, `E-DTYPE`, `E-NOFORM`, `E-AFFINE`, `E-SPACING`,
            `E-SIZE`, `E-GZIP`, `E-BOMB`.
    """
    with path.open("rb") as stream:
        start = stream.read(_HEADER_BYTES)
    block = _nrrd(path, start) if start.startswith(b"NRRD000") else _mha(path, start)
    grid.check_affine(path, block.affine)
    packed = block.packing != "raw"
    size = block.dtype.itemsize
    bytestream.check_size(path, block.shape, size, offset=block.offset, packed=packed, max_voxels=max_voxels)
    count = block.shape[0] * block.shape[1] * block.shape[2] * size
    if packed:
        data = bytestream.inflate(path, block.offset, count, gzip=block.packing == "gzip")
    else:
        data = bytestream.read_plain(path, block.offset, count)
    return data.view(block.dtype).reshape(block.shape, order="F"), block.affine, 1.0, 0.0


def _nrrd(path: Path, start: bytes) -> _Block:
    end = re.search(rb"\r?\n\r?\n", start)
    if end is None:
        raise DagmanError("HEADER", path, "its NRRD header has no end", _EXPORT)
    fields = {}
    for line in start[: end.start()].decode("latin-1").splitlines()[1:]:
        name, colon, value = line.partition(":")
        if colon and not value.startswith("=") and not line.startswith("#"):
            fields[name.strip().lower()] = value.strip()
    if "data file" in fields or "datafile" in fields:
        raise DagmanError("DETACHED", path, "keeps its voxels in another file", "save it as one .nrrd file")
    if any(fields.get(name, "0") != "0" for name in ("byte skip", "byteskip", "line skip", "lineskip")):
        raise DagmanError("HEADER", path, "skips bytes before its voxels", _EXPORT)
    units = set(re.findall(r'"([^"]*)"', fields.get("space units", "")))
    if units - {"mm", ""}:
        raise DagmanError("SPACING", path, "does not give its voxel size in mm", _EXPORT)
    shape = _sides(path, fields.get("dimension", ""), fields.get("sizes", ""))
    kind = _NRRD_TYPES.get(fields.get("type", "").lower())
    if kind is None:
        raise DagmanError("DTYPE", path, "its voxels are not plain numbers", _EXPORT)
    packing = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}.get(fields.get("encoding", "").lower())
    if packing is None:
        raise DagmanError("HEADER", path, "is neither raw nor gzip", "save it again with raw or gzip encoding")
    if kind[1] != "1" and fields.get("endian") not in ("little", "big"):
        raise DagmanError("HEADER", path, "does not say its byte order", _EXPORT)
    dtype = np.dtype((">" if fields.get("endian") == "big" else "<") + kind)
    return _Block(shape, dtype, _nrrd_affine(path, fields), packing, end.end())


def _nrrd_affine(path: Path, fields: dict[str, str]) -> np.ndarray:
    signs = _SPACES.get(fields.get("space", "").lower())
    directions = _numbers(fields.get("space directions", ""))
    origin = _numbers(fields.get("space origin", ""))
    if signs is None or len(directions) != 9 or len(origin) != 3:
        raise _no_form(path)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(directions, (3, 3)).T
    affine[:3, 3] = origin
    affine[:3] *= np.array(signs, float)[:, None]
    return affine


def _mha(path: Path, start: bytes) -> _Block:
    end = re.search(rb"^ElementDataFile[ \t]*=[ \t]*([^\r\n]*)\r?\n", start, re.MULTILINE)
    if end is None:
        raise DagmanError("HEADER", path, "its MetaImage header has no end", _EXPORT)
    if end.group(1).strip() != b"LOCAL":
        raise DagmanError("DETACHED", path, "keeps its voxels in another file", "save it as one .mha file")
    fields = {}
    for line in start[: end.start()].decode("latin-1").splitlines():
        name, _, value = line.partition("=")
        fields[name.strip()] = value.strip()
    _refuse_other_values(path, fields)
    shape = _sides(path, fields.get("NDims", ""), fields.get("DimSize", ""))
    kind = _MHA_TYPES.get(fields.get("ElementType", ""))
    if kind is None or fields.get("ElementNumberOfChannels", "1") != "1":
        raise DagmanError("DTYPE", path, "its voxels are not one plain number each", _EXPORT)
    if fields.get("HeaderSize", "0") != "0" or fields.get("BinaryData", "True").lower() != "true":
        raise DagmanError("HEADER", path, "is not plain binary after its header", _EXPORT)
    big = fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False")).lower() == "true"
    packing = "zlib" if fields.get("CompressedData", "False").lower() == "true" else "raw"
    return _Block(shape, np.dtype((">" if big else "<") + kind), _mha_affine(path, fields), packing, end.end())


def _refuse_other_values(path: Path, fields: dict[str, str]) -> None:
    """Fields that would change what the stored numbers mean are refused, not ignored."""
    if fields.get("DistanceUnits", "mm").lower() not in ("mm", "?", ""):
        raise DagmanError("SPACING", path, "does not give its voxel size in mm", _EXPORT)
    slope, offset = (_numbers(fields.get(f"ElementToIntensityFunction{word}", "")) for word in ("Slope", "Offset"))
    if slope not in ([], [1.0]) or offset not in ([], [0.0]):
        raise DagmanError(
            "RESCALE", path, "asks for its numbers to be rescaled", "save it with Hounsfield units as they are"
        )
    if fields.get("Modality", "").removeprefix("MET_MOD_") not in ("", "CT", "UNKNOWN", "OTHER"):
        raise DagmanError("MODALITY", path, "says that it is no CT", "give CT images, or leave it out")


def _mha_affine(path: Path, fields: dict[str, str]) -> np.ndarray:
    def numbers(*names: str) -> list[float]:
        return _numbers(next((fields[name] for name in names if name in fields), ""))

    matrix = numbers("TransformMatrix", "Rotation", "Orientation")
    origin = numbers("Offset", "Position", "Origin")
    spacing = numbers("ElementSpacing")
    if len(matrix) != 9 or len(origin) != 3 or len(spacing) != 3:
        raise _no_form(path)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(matrix, (3, 3)).T * np.array(spacing)
    affine[:3, 3] = origin
    affine[:3] *= _LPS_TO_RAS[:, None]
    return affine


def _no_form(path: Path) -> DagmanError:
    return DagmanError("NOFORM", path, "does not say where its voxels lie in the patient", _EXPORT)


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in re.split(r"[\s,()]+", text) if word]
    except ValueError:
        return []


def _sides(path: Path, dimension: str, sizes: str) -> tuple[int, int, int]:
    numbers = _numbers(sizes)
    if dimension != "3" or len(numbers) != 3 or not all(n.is_integer() for n in numbers):
        raise DagmanError("DIMS", path, "is not one 3D volume", "save the one volume you mean as a 3D file")
    x, y, z = (int(n) for n in numbers)
    return x, y, z
