"""What a file is by its content, and of a DICOM file the little that sorts it: nothing else of a header leaves here."""

import hmac
from pathlib import Path
from typing import Any

from dagman.ct import bytestream, dicom, pixels
from dagman.errors import DagmanError

_DETACHED = {".mhd", ".nhdr", ".hdr", ".img"}
_NAMED = (".nii", ".nii.gz", ".nrrd", ".mha", ".dcm")
_ADVICE = "give a .nii, .nii.gz, .nrrd or .mha file or DICOM images"
_MODALITIES = (
    " ANN AR ASMT AU BI BMD CR CT CTPROTOCOL DG DMS DOC DX ECG EPS ES FID GM HC HD IO IOL IVOCT IVUS KER KO LEN LS MG "
    "MR M3D NM OAM OCT OP OPM OPT OPV OSS OT PA PLAN PR PT PX REG RESP RF RG RTDOSE RTIMAGE RTINTENT RTPLAN RTRAD "
    "RTRECORD RTSEGANN RTSTRUCT RWV SEG SM SMR SR SRF STAIN TEXTUREMAP TG US VA XA XC "
)
"""The standard's words (CS 0008,0060): any other text in that place could be anything."""
_DICOMDIR = "1.2.840.10008.1.3.10"


def sniff(path: Path, key: bytes) -> dict[str, Any]:
    """Kind of one file, and a few facts of a DICOM one.

    Args:
        path: A regular file.
        key: For the keyed hashes of PatientID and UIDs.

    Returns:
        `kind` (`nifti`, `nrrd`, `mha`, `dicom`, or `other` for what does not claim to be a scan); for DICOM also
        `series`, `patient` (hashes), `modality`, `localizer`.

    Raises:
        DagmanError: `E-FORMAT`, `E-DETACHED`, `E-GZIP`, `E-DICOM` for a file that claims to be a scan and is none.
    """
    suffix = path.suffix.lower()
    if suffix in _DETACHED:
        raise DagmanError(
            "DETACHED", path, f"is one of a pair of files ({suffix})", "save it as one .nii.gz or .mha file"
        )
    claims = path.name.lower().endswith(_NAMED)
    try:
        kind, start = _kind(path)
    except DagmanError:
        if claims:
            raise
        return {"kind": "other"}
    if kind == "dicom":
        return _dicom_facts(path, key)
    if kind != "other":
        return {"kind": kind}
    if claims:
        raise DagmanError("FORMAT", path, f"looks like {_looks_like(start)}", _ADVICE)
    return {"kind": "other"}


def _kind(path: Path) -> tuple[str, bytes]:
    start = bytestream.head(path, 540)
    if start[344:348] in (b"n+1\0", b"ni1\0") or start[4:8] in (b"n+2\0", b"ni2\0"):
        return "nifti", start
    with path.open("rb") as stream:
        start = stream.read(540)
    if start.startswith(b"NRRD000"):
        return "nrrd", start
    if start[128:132] == b"DICM" or _bare_dicom(start):
        return "dicom", start
    if start.lstrip().startswith((b"ObjectType", b"NDims")):
        return "mha", start
    return "other", start


def _bare_dicom(start: bytes) -> bool:
    """A data set without preamble: begins with a short element of group 0008, or with the length of group 0002."""
    first = start[:2] == b"\x08\0" and start[2:4] in (b"\0\0", b"\x05\0", b"\x08\0", b"\x16\0")
    return len(start) > 132 and (first or start[:6] == b"\x02\0\0\0UL")


def _looks_like(start: bytes) -> str:
    if not start:
        return "an empty file"
    for magic, name in (
        (b"<", "an HTML or XML page"),
        (b"\x1f\x8b", "gzip of something else"),
        (b"PK", "a zip archive"),
    ):
        if start.lstrip().startswith(magic):
            return name
    return "text" if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in start[:200]) else "no format known here"


def _dicom_facts(path: Path, key: bytes) -> dict[str, Any]:
    header = dicom.open_header(path)
    sop_class = str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or "")
    if sop_class == _DICOMDIR or "DirectoryRecordSequence" in header:
        return {"kind": "other"}
    modality = pixels.word(header, "Modality")
    image_type = header.get("ImageType")
    words = [image_type] if isinstance(image_type, str) else list(image_type or [])
    patient = str(header.get("PatientID") or "").strip()
    series = str(header.get("SeriesInstanceUID") or "").strip()
    return {
        "kind": "dicom",
        "series": hmac.new(key, series.encode(), "sha256").hexdigest()[:10] if series else "",
        "patient": hmac.new(key, patient.encode(), "sha256").hexdigest()[:12] if patient else None,
        "modality": modality if f" {modality} " in _MODALITIES else "unknown",
        "localizer": "LOCALIZER" in [str(item).upper() for item in words],
    }
