"""NIfTI-1 and NIfTI-2, single file, plain or gzip: what the header cannot mean honestly is refused."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError

from dagman.ct import bytestream, grid
from dagman.errors import DagmanError

_TYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
_NOT_GREY = {1: "bits", 32: "complex", 128: "RGB", 1536: "float128", 1792: "complex", 2048: "complex", 2304: "RGBA"}
_EXPORT = "export the scan again"


def read(path: Path, max_voxels: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Stored numbers (x, y, z), RAS affine, slope and intercept.

    Raises:
        DagmanError: `E-FORMAT`, `E-DETACHED`, `E-DIMS`, `E-DTYPE`, `E-HEADER`, `E-SPACING`, `E-NOFORM`, `E-ORIENT`,
            `E-AFFINE`, `E-SIZE`, `E-GZIP`, `E-BOMB`.
    """
    header = _header(path)
    shape = _shape(path, header)
    dtype = _dtype(path, header)
    offset = _offset(path, header)
    packed = bytestream.is_gzip(path)
    bytestream.check_size(path, shape, dtype.itemsize, offset=offset, packed=packed, max_voxels=max_voxels)
    affine = _affine(path, header, shape)
    slope, intercept = _scaling(path, header)
    count = dtype.itemsize * shape[0] * shape[1] * shape[2]
    if packed:
        data = bytestream.inflate(path, 0, offset + count, gzip=True)[offset:]
    else:
        data = bytestream.read_plain(path, offset, count)
    return data.view(dtype).reshape(shape, order="F"), affine, slope, intercept


def _header(path: Path) -> Any:
    block = bytestream.head(path, 540)
    for magic, place, kind, size in (
        (b"n+1\0", 344, nibabel.Nifti1Header, 348),
        (b"n+2\0", 4, nibabel.Nifti2Header, 540),
    ):
        if block[place : place + 4] == magic and len(block) >= size:
            swapped = int.from_bytes(block[:4], "little") != size
            if swapped and int.from_bytes(block[:4], "big") != size:
                break
            return kind(block[:size], endianness=">" if swapped else "<", check=False)
    if block[344:348] in (b"ni1\0", b"ni2\0"):
        raise DagmanError("DETACHED", path, "keeps its voxels in another file", "save it as one .nii.gz file")
    raise DagmanError("FORMAT", path, "has no NIfTI header", _EXPORT)


def _shape(path: Path, header: Any) -> tuple[int, int, int]:
    dims = [int(d) for d in header["dim"]]
    count = dims[0]
    if not 1 <= count <= 7 or min(dims[1 : count + 1]) < 1:
        raise DagmanError("DIMS", path, f"its header declares the dimensions {dims}", _EXPORT)
    sides = dims[1 : count + 1]
    if count < 3:
        raise DagmanError("DIMS", path, f"is a {count}D image, not a volume", "give the whole scan as one 3D file")
    if any(side > 1 for side in sides[3:]):
        more = " x ".join(map(str, sides[3:]))
        raise DagmanError("DIMS", path, f"holds {more} volumes", "save the one volume you mean as a 3D file")
    return sides[0], sides[1], sides[2]


def _dtype(path: Path, header: Any) -> np.dtype[Any]:
    code = int(header["datatype"])
    if code in _NOT_GREY:
        raise DagmanError("DTYPE", path, f"holds {_NOT_GREY[code]} voxels, not one number each", _EXPORT)
    if code not in _TYPES:
        raise DagmanError("HEADER", path, f"declares the unknown data type {code}", _EXPORT)
    dtype: np.dtype[Any] = np.dtype(header.endianness + _TYPES[code])
    if int(header["bitpix"]) != dtype.itemsize * 8:
        raise DagmanError("HEADER", path, f"declares {header['bitpix']} bits for the data type {code}", _EXPORT)
    return dtype


def _offset(path: Path, header: Any) -> int:
    offset = float(header["vox_offset"])
    smallest = int(header["sizeof_hdr"]) + 4
    if not smallest <= offset <= 2**31 or not offset.is_integer():
        raise DagmanError("HEADER", path, f"declares its voxels at byte {offset:g}", _EXPORT)
    return int(offset)


def _scaling(path: Path, header: Any) -> tuple[float, float]:
    """The NIfTI rule: slope 0 means stored numbers are the values. NaN is how nibabel writes `none`."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or np.isnan(slope):
        return 1.0, 0.0
    if not np.isfinite([slope, intercept]).all():
        raise DagmanError("HEADER", path, f"scales by slope {slope:g} and intercept {intercept:g}", _EXPORT)
    return slope, intercept


def _affine(path: Path, header: Any, shape: tuple[int, int, int]) -> np.ndarray:
    spacing = np.abs(header["pixdim"][1:4].astype(float))
    grid.check_spacing(path, spacing)
    if int(header["xyzt_units"]) & 7 in (1, 3):
        raise DagmanError("SPACING", path, "is measured in metres or micrometres", "save it with its spacing in mm")
    with np.errstate(all="ignore"):
        forms = _forms(path, header)
    for affine in forms.values():
        grid.check_affine(path, affine)
    first = next(iter(forms.values()))
    if len(forms) == 2:
        _check_forms_agree(path, forms, shape)
    found = np.linalg.norm(first[:3, :3], axis=0)
    if not np.allclose(found, spacing, rtol=0.01):
        sizes = " and ".join(" x ".join(f"{s:.4g}" for s in each) for each in (spacing, found))
        raise DagmanError("SPACING", path, f"declares two voxel sizes, {sizes} mm", _EXPORT)
    return first


def _forms(path: Path, header: Any) -> dict[str, np.ndarray]:
    forms: dict[str, np.ndarray] = {}
    if int(header["sform_code"]) > 0:
        forms["sform"] = np.asarray(header.get_sform(), float)
    if int(header["qform_code"]) > 0:
        if float(header["pixdim"][0]) == 0:
            header["pixdim"][0] = 1  # the standard reads 0 as 1
        try:
            forms["qform"] = np.asarray(header.get_qform(), float)
        except (ValueError, np.linalg.LinAlgError, HeaderDataError):
            raise DagmanError("AFFINE", path, "its qform is no rotation", _EXPORT) from None
    if not forms:
        raise DagmanError(
            "NOFORM",
            path,
            "says nothing about which side is left or right (no qform, no sform)",
            "convert it again from DICOM, or set its sform if you know its orientation",
        )
    return forms


def _check_forms_agree(path: Path, forms: dict[str, np.ndarray], shape: tuple[int, int, int]) -> None:
    distance = grid.corner_distance_mm(forms["sform"], forms["qform"], shape)
    if distance > 0.1:
        s, q = (grid.axis_codes(forms[name]) for name in ("sform", "qform"))
        raise DagmanError(
            "ORIENT",
            path,
            f"its two orientations disagree: sform {s}, qform {q}, corners {distance:.3g} mm apart",
            "remove the wrong one of the two and save the file again",
        )
