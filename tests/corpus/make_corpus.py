"""The fault catalogue, written from code: small CT files and DICOM series, each wrong in one way.

`FILES` and `SERIES` map a name to the code that must be reported ("" where the scan must be read and equal
`PHANTOM_HU`) and to what writes it. `python tests/corpus/make_corpus.py FOLDER` writes all of them.
"""

import gzip
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

Write = Callable[[Path], None]
CANARY = "Zebra^Quagga"
SPACING_MM = (2.0, 2.5, 3.0)


def phantom() -> np.ndarray:
    """Air, fat, soft tissue, an off-centre bone and a lung: no axis is like another, no flip is hidden."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (22, 18, 16)), indexing="ij")
    hu = np.full(x.shape, -1000.0)
    hu[x**2 + y**2 < 0.95] = -100
    hu[x**2 + y**2 < 0.7] = 40
    hu[(x - 0.3) ** 2 + (y - 0.2) ** 2 + (z + 0.3) ** 2 < 0.12] = -850
    hu[(x + 0.5) ** 2 + (y + 0.1) ** 2 + (z - 0.4) ** 2 < 0.06] = 700
    return np.rint(hu + np.random.default_rng(7).normal(0, 8, x.shape)).clip(-1020).astype(np.int16)


PHANTOM_HU = phantom()
AFFINE = np.diag([*SPACING_MM, 1.0])
AFFINE[:3, 3] = -20, -15, 30
FILES: dict[str, tuple[str, Write]] = {}
SERIES: dict[str, tuple[str, Write]] = {}

# ---------------------------------------------------------------------------------------------- NIfTI


def nifti(array: np.ndarray = PHANTOM_HU, affine: np.ndarray = AFFINE, **fields: Any) -> bytes:
    """A NIfTI-1 file as bytes; `fields` overwrite header fields afterwards, `pixdim_1=0` one of several."""
    image = nibabel.Nifti1Image(array, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    header = image.header
    for name in ("descrip", "aux_file", "intent_name", "db_name"):
        header[name] = CANARY
    header["vox_offset"], header["scl_slope"], header["scl_inter"] = 352, 1, 0
    for name, value in fields.items():
        field, _, place = name.rpartition("_")
        if place.isdigit() and field in header.keys():  # noqa: SIM118
            header[field][int(place)] = value
        else:
            header[name] = value
    return header.binaryblock + bytes(4) + array.tobytes(order="F")


def packed(**fields: Any) -> bytes:
    """The same, gzipped."""
    return gzip.compress(nifti(**fields), mtime=0)


def file(name: str, code: str, data: Callable[[], bytes]) -> None:
    """Register a single file."""
    FILES[name] = code, lambda path: path.write_bytes(data()) and None


def turned(degrees: float) -> np.ndarray:
    """The phantom's affine, rotated about z."""
    angle = np.radians(degrees)
    rotation = np.eye(4)
    rotation[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return rotation @ AFFINE


def bits_flipped(index: int) -> bytes:
    """One bit wrong, somewhere behind the gzip header."""
    data = bytearray(packed())
    place = 12 + (len(data) - 14) * index // 20
    data[place] ^= 1 << index % 8
    return bytes(data)


def bomb(header: bytes) -> bytes:
    """Gzip of `header` and then 256 MB of zeros, in members."""
    return gzip.compress(header) + gzip.compress(bytes(32 << 20)) * 8


def changed(index: tuple[int, ...], value: float, dtype: str = "f4") -> np.ndarray:
    """The phantom with one other value."""
    array = PHANTOM_HU.astype(dtype)
    array[index] = value
    return array


def raw(slope: float = 1, offset: float = 1024) -> np.ndarray:
    """What scanners store before rescaling, or windowing leaves."""
    return np.clip((PHANTOM_HU + offset) * slope, 0, None).astype(np.float32)


def windowed(top: float) -> np.ndarray:
    """A soft-tissue window on 0..top."""
    return (np.clip((PHANTOM_HU + 160) / 400, 0, 1) * top).astype(np.float32)


def register_nifti() -> None:
    """I01 to I19, what concerns NIfTI."""
    file("good.nii.gz", "", packed)
    file("good.nii", "", nifti)
    file("plain-named-gz.nii.gz", "", nifti)
    file("gz-named-plain.nii", "", packed)
    file("good-big-endian.nii", "", big_endian)
    file("good-two-members.nii.gz", "", lambda: gzip.compress(nifti()[:5000]) + gzip.compress(nifti()[5000:]))
    file("good-noise-1e-5.nii", "", lambda: nifti(srow_x_3=-20 + 1e-5))
    file("good-4d-of-one.nii", "", lambda: nifti(PHANTOM_HU[..., None]))
    file("good-slope-0.nii", "", lambda: nifti(scl_slope=0, scl_inter=-1024))
    file("good-slope-nan.nii", "", lambda: nifti(scl_slope=np.nan, scl_inter=np.nan))
    file("good-inter.nii", "", lambda: nifti((PHANTOM_HU + 1024).astype("u2"), scl_slope=1, scl_inter=-1024))
    file("good-slope-half.nii", "", lambda: nifti((PHANTOM_HU * 2).astype("i2"), scl_slope=0.5))
    file("good-int32.nii", "", lambda: nifti(PHANTOM_HU.astype("i4")))
    file("good-float64.nii", "", lambda: nifti(PHANTOM_HU.astype("f8")))
    file("good-shear-1e-4.nii", "", lambda: nifti(srow_x_1=2e-4))
    for cut in (1, 10, 352):
        file(f"cut-to-{cut}.nii.gz", "GZIP" if cut == 352 else "FORMAT", lambda cut=cut: packed()[:cut])

    file("cut-half.nii.gz", "GZIP", lambda: packed()[: len(packed()) // 2])
    for cut in (1, 4, 8):
        file(f"cut-last-{cut}.nii.gz", "GZIP", lambda cut=cut: packed()[:-cut])
    for index in range(20):
        file(f"bit-{index:02d}.nii.gz", "GZIP|FORMAT|SIZE", lambda index=index: bits_flipped(index))
    file("one-byte-less.nii", "SIZE", lambda: nifti()[:-1])
    file("one-byte-more.nii", "SIZE", lambda: nifti() + b"\0")
    file("half.nii", "SIZE", lambda: nifti()[: len(nifti()) // 2])
    file("more-inside.nii.gz", "SIZE", lambda: gzip.compress(nifti() + bytes(3)))
    file("less-inside.nii.gz", "SIZE", lambda: gzip.compress(nifti()[:-2]))
    file("magic.nii", "FORMAT", lambda: nifti(magic=b"xyz"))
    file("page.nii.gz", "FORMAT", lambda: b"<html><body>404 not found</body></html>" * 20)
    file("empty.nii.gz", "FORMAT", lambda: b"")
    file("random.nii", "FORMAT", lambda: np.random.default_rng(1).bytes(4000))
    file("words.nrrd", "FORMAT", lambda: b"this is no image\n" * 40)
    file("gz-of-words.nii.gz", "FORMAT", lambda: gzip.compress(b"this is no image\n" * 400))
    file("pair.hdr", "DETACHED", lambda: nifti(magic=b"ni1")[:348])
    file("pair-magic.nii", "DETACHED", lambda: nifti(magic=b"ni1"))
    register_nifti_headers()
    register_nifti_values()


def register_nifti_headers() -> None:
    """I06 to I11, I15, I16, I33."""
    for name, fields in {
        "zero": {"dim_1": 0}, "negative": {"dim_2": -48}, "nine": {"dim_0": 9}, "none": {"dim_0": 0},
        "huge": {"dim_1": 32767, "dim_2": 32767, "dim_3": 32767},
    }.items():  # fmt: skip
        file(f"dim-{name}.nii", "DIMS", lambda fields=fields: nifti(**fields))
    file("dim-overflow.nii.gz", "DIMS", lambda: packed(dim=[7, *[32767] * 7]))
    file("dim-more-than-file.nii", "SIZE", lambda: nifti(dim_3=4000))
    for name, value in {"negative": -352, "huge": 1e12, "nan": np.nan, "zero": 0, "fraction": 352.5}.items():
        file(f"offset-{name}.nii", "HEADER", lambda value=value: nifti(vox_offset=value))
    file("datatype-unknown.nii", "HEADER", lambda: nifti(datatype=77))
    file("bitpix.nii", "HEADER", lambda: nifti(bitpix=32))
    file("slope-inf.nii", "HEADER", lambda: nifti(scl_slope=np.inf))
    file("inter-nan.nii", "HEADER", lambda: nifti(scl_slope=1, scl_inter=np.nan))
    for name, value in {"0": 0, "nan": np.nan, "inf": np.inf, "1e-6": 1e-6, "1e4": 1e4}.items():
        file(f"pixdim-{name}.nii", "SPACING", lambda value=value: nifti(pixdim_1=value))
    file("pixdim-other-than-sform.nii", "SPACING", lambda: nifti(pixdim_3=4, qform_code=0))
    file("in-metres.nii", "SPACING", lambda: nifti(xyzt_units=1))
    file("no-form.nii", "NOFORM", lambda: nifti(qform_code=0, sform_code=0))
    file("mirror.nii", "ORIENT", lambda: nifti(srow_x=[-2, 0, 0, 22]))
    file("shift-5-mm.nii", "ORIENT", lambda: nifti(srow_z_3=35))
    file("quaternion.nii", "AFFINE", lambda: nifti(sform_code=0, quatern_b=2))
    file("sheared.nii", "AFFINE", lambda: nifti(srow_x_1=0.2))
    file("singular.nii", "SPACING|AFFINE", lambda: nifti(srow_z=[0, 0, 0, 1], qform_code=0))
    file("flat.nii", "AFFINE|SPACING", lambda: nifti(srow_z=[2, 0, 0, 1], qform_code=0))
    file("nan-affine.nii", "AFFINE", lambda: nifti(srow_x_3=np.nan))
    file("four-volumes.nii", "DIMS", lambda: nifti(np.stack([PHANTOM_HU] * 4, -1)))
    file("two-d.nii", "DIMS", lambda: nifti(PHANTOM_HU[:, :, 0], dim=[2, 22, 18, 1, 1, 1, 1, 1]))
    file("rgb.nii", "DTYPE", lambda: nifti(datatype=128, bitpix=24))
    file("complex.nii", "DTYPE", lambda: nifti(datatype=32, bitpix=64))
    small = nifti()
    file("bomb-declared-small.nii.gz", "BOMB", lambda: bomb(small))
    file("bomb-declared.nii.gz", "BOMB", lambda: packed(dim=[3, 1100, 1100, 1100, 1, 1, 1, 1]))


def register_nifti_values() -> None:
    """I13, I14, I17 to I19."""
    file("one-nan.nii", "NONFINITE", lambda: nifti(changed((3, 4, 5), np.nan)))
    file("one-inf.nii", "NONFINITE", lambda: nifti(changed((3, 4, 5), np.inf)))
    file("all-nan.nii.gz", "NONFINITE", lambda: gzip.compress(nifti(np.full((22, 18, 16), np.nan, "f4"))))
    file("constant.nii", "EMPTY", lambda: nifti(np.full((22, 18, 16), -7, "i2")))
    file("zeros.nii", "EMPTY", lambda: nifti(np.zeros((22, 18, 16), "i2")))
    file("three-slices.nii", "SMALL", lambda: nifti(PHANTOM_HU[:, :, :3]))
    file("one-voxel.nii", "SMALL", lambda: nifti(PHANTOM_HU[:1, :1, :1]))
    file("raw-0-4095.nii", "NOTHU", lambda: nifti(raw()))
    file("raw-with-padding.nii", "NOTHU", lambda: nifti(np.where(PHANTOM_HU < -990, -2000, raw()).astype("i2")))
    file("raw-air-near-0.nii", "NOTHU", lambda: nifti((PHANTOM_HU + 1000).astype("i2")))
    file("raw-air-at-1000.nii", "NOTHU", lambda: nifti((PHANTOM_HU + 2000).astype("i2")))
    file("shifted-twice.nii", "NOTHU", lambda: nifti((PHANTOM_HU - 1024).astype("i2")))
    file("windowed-255.nii", "NOTHU", lambda: nifti(windowed(255)))
    file("windowed-1.nii", "NOTHU", lambda: nifti(windowed(1)))
    file("z-scored.nii", "NOTHU", lambda: nifti(((PHANTOM_HU + 300) / 400).astype("f4")))
    file("labels.nii", "NOTHU", lambda: nifti((PHANTOM_HU > 300).astype("u1")))
    for value in (-2000, -3024, -32768, 30000):
        file(f"padding-{value}.nii", "read", lambda value=value: nifti(changed((0, 0, 0), value, "i2")))
    file("uint16-65535.nii", "read", lambda: nifti((changed((0, 0, 0), 64511) + 1024).astype("u2"), scl_inter=-1024))
    file("int32-1e9.nii", "RANGE", lambda: nifti(changed((0, 0, 0), 1e9, "i4")))
    file("float64-1e300.nii", "RANGE", lambda: nifti(changed((0, 0, 0), 1e300, "f8")))


def big_endian() -> bytes:
    """The good file, byte-swapped."""
    little = nibabel.Nifti1Header(nifti()[:348], endianness="<", check=False)
    return little.as_byteswapped(">").binaryblock + bytes(4) + PHANTOM_HU.astype(">i2").tobytes(order="F")


# ---------------------------------------------------------------------------------- NRRD and MetaImage


def nrrd(extra: str = "", **fields: str | None) -> bytes:
    """A raw NRRD file; `None` removes a field, `_` in names are blanks."""
    flip = np.diag([-1.0, -1.0, 1.0]) @ AFFINE[:3]
    values: dict[str, str | None] = {
        "content": CANARY, "type": "short", "dimension": "3", "space": "left-posterior-superior", "sizes": "22 18 16",
        "space_directions": " ".join(f"({','.join(map(str, flip[:, i]))})" for i in range(3)),
        "endian": "little", "encoding": "raw", "space_origin": f"({','.join(map(str, flip[:, 3]))})",
        **fields,
    }  # fmt: skip
    lines = [f"{name.replace('_', ' ')}: {value}" for name, value in values.items() if value is not None]
    body = PHANTOM_HU.tobytes(order="F")
    if values["encoding"] == "gzip":
        body = gzip.compress(body)
    return ("NRRD0004\n" + "\n".join(lines) + extra + "\n\n").encode() + body


def mha(compress: bool = False, **fields: str | None) -> bytes:
    """A MetaImage file; `None` removes a field."""
    body = PHANTOM_HU.tobytes(order="F")
    body = zlib.compress(body) if compress else body
    values: dict[str, str | None] = {
        "ObjectType": "Image", "Comment": CANARY, "NDims": "3", "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
        "CompressedData": str(compress), "TransformMatrix": "-1 0 0 0 -1 0 0 0 1", "Offset": "20 15 30",
        "ElementSpacing": "2 2.5 3", "DimSize": "22 18 16", "ElementType": "MET_SHORT", "ElementDataFile": "LOCAL",
        **fields,
    }  # fmt: skip
    values["ElementDataFile"] = values.pop("ElementDataFile")
    return ("\n".join(f"{k} = {v}" for k, v in values.items() if v is not None) + "\n").encode() + body


def register_text_headers() -> None:
    """I03, I15, I33, I34 for NRRD and MetaImage."""
    file("good.nrrd", "", nrrd)
    file("good-gzip.nrrd", "", lambda: nrrd(encoding="gzip"))
    file("good.mha", "", mha)
    file("good-zlib.mha", "", lambda: mha(compress=True))
    file("cut.nrrd", "SIZE", lambda: nrrd()[:-1])
    file("cut-gzip.nrrd", "GZIP", lambda: nrrd(encoding="gzip")[:-9])
    file("no-end.nrrd", "HEADER", lambda: nrrd()[:90])
    file("no-space.nrrd", "NOFORM", lambda: nrrd(space=None))
    file("no-directions.nrrd", "NOFORM", lambda: nrrd(space_directions=None, spacings="2 2.5 3"))
    file("elsewhere.nrrd", "DETACHED", lambda: nrrd(data_file="/etc/passwd"))
    file("elsewhere-list.nrrd", "DETACHED", lambda: nrrd(datafile="LIST"))
    file("skip.nrrd", "HEADER", lambda: nrrd(byte_skip="-1"))
    file("blocks.nrrd", "DTYPE", lambda: nrrd(type="block"))
    file("four-d.nrrd", "DIMS", lambda: nrrd(dimension="4", sizes="22 18 16 1"))
    file("huge.nrrd", "DIMS", lambda: nrrd(sizes="100000 100000 100000"))
    file("elsewhere.nhdr", "DETACHED", lambda: nrrd(data_file="../x.raw"))
    file("elsewhere.mhd", "DETACHED", lambda: mha(ElementDataFile="/etc/passwd"))
    file("elsewhere.mha", "DETACHED", lambda: mha(ElementDataFile="/etc/passwd"))
    file("pattern.mha", "DETACHED", lambda: mha(ElementDataFile="x%03d.raw 1 9 1"))
    file("cut.mha", "SIZE", lambda: mha()[:-1])
    file("cut-zlib.mha", "GZIP", lambda: mha(compress=True)[:-3])
    file("no-matrix.mha", "NOFORM", lambda: mha(TransformMatrix=None))
    file("vector.mha", "DTYPE", lambda: mha(ElementNumberOfChannels="3"))
    file("quadrillion.mha", "DIMS", lambda: mha(DimSize="100000 100000 100000"))
    file("spacing-0.mha", "SPACING", lambda: mha(ElementSpacing="0 1 1"))
    file("singular.mha", "AFFINE|SPACING", lambda: mha(TransformMatrix="1 0 0 1 0 0 0 0 1"))


# ---------------------------------------------------------------------------------------------- DICOM

UID = "1.2.826.0.1.3680043.8.498.7"


def slices(count: int = 16) -> list[Dataset]:
    """A clean axial series of the phantom, patient text full of canaries."""
    return [one_slice(k) for k in range(count)]


def one_slice(k: int) -> Dataset:
    """Slice k of the phantom, lowest first."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = CTImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"{UID}.9.{k + 1}"
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = f"{UID}.1", f"{UID}.2", f"{UID}.3"
    data.Modality, data.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.PatientName, data.PatientID, data.PatientComments = CANARY, CANARY, CANARY
    data.SeriesDescription = data.StudyDescription = data.InstitutionName = CANARY
    data.add_new(0x00091010, "LO", CANARY)
    data.InstanceNumber = k + 1
    data.Rows, data.Columns, data.SamplesPerPixel = 18, 22, 1
    data.PhotometricInterpretation = "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.RescaleSlope, data.RescaleIntercept, data.RescaleType = 1, -1024, "HU"
    data.PixelSpacing = [SPACING_MM[1], SPACING_MM[0]]
    data.ImageOrientationPatient = [-1, 0, 0, 0, -1, 0]
    data.ImagePositionPatient = [20, 15, 30 + SPACING_MM[2] * k]
    data.GantryDetectorTilt = 0
    data.PixelData = (PHANTOM_HU[:, :, k].T + 1024).astype("<i2").tobytes()
    return data


def save(data: Dataset, path: Path) -> None:
    """Write one DICOM file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def series(name: str, code: str, change: Callable[[list[Dataset]], Any] = lambda _: None) -> None:
    """Register a series: the clean slices after `change` (in place, or a new list)."""

    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        clean = slices()
        for k, data in enumerate(change(clean) or clean):
            save(data, folder / f"s{k:03d}.dcm")

    SERIES[name] = code, write


def each(**values: Any) -> Callable[[list[Dataset]], None]:
    """Set tags in every slice."""

    def change(data: list[Dataset]) -> None:
        for item in data:
            for name, value in values.items():
                setattr(item, name, value)

    return change


def one(k: int, **values: Any) -> Callable[[list[Dataset]], None]:
    """Set tags in slice k; None removes one."""

    def change(data: list[Dataset]) -> None:
        for name, value in values.items():
            if value is None:
                del data[k][name]
            else:
                setattr(data[k], name, value)

    return change


def moved(k: int, *by: float) -> Callable[[list[Dataset]], None]:
    """Shift slice k."""

    def change(data: list[Dataset]) -> None:
        data[k].ImagePositionPatient = [a + b for a, b in zip(data[k].ImagePositionPatient, by, strict=True)]

    return change


def sheared(degrees: float) -> Callable[[list[Dataset]], None]:
    """What a tilted gantry gives: slices lean, the table moves along z."""

    def change(data: list[Dataset]) -> None:
        angle = np.radians(degrees)
        for item in data:
            item.ImageOrientationPatient = [-1, 0, 0, 0, -round(np.cos(angle), 9), round(np.sin(angle), 9)]

    return change


def removed(*places: int) -> Callable[[list[Dataset]], list[Dataset]]:
    """Leave slices out."""
    return lambda data: [item for k, item in enumerate(data) if k not in {p % len(data) for p in places}]


def compressed(syntax: str) -> Callable[[list[Dataset]], None]:
    """Compress every slice without loss."""

    def change(data: list[Dataset]) -> None:
        for item in data:
            item.compress(syntax, generate_instance_uid=False)

    return change


def in_syntax(syntax: str) -> Callable[[list[Dataset]], None]:
    """Another plain transfer syntax."""

    def change(data: list[Dataset]) -> None:
        for item in data:
            item.file_meta.TransferSyntaxUID = syntax
            if syntax == ExplicitVRBigEndian:
                item.PixelData = np.frombuffer(item.PixelData, "<i2").astype(">i2").tobytes()

    return change


def per_slice_rescale(data: list[Dataset]) -> None:
    """Slope and intercept differ between slices, HU stay the same."""
    for k, item in enumerate(data):
        slope, intercept = (0.5, -1024) if k % 2 else (1, -1000 - k)
        stored = (PHANTOM_HU[:, :, k].T - intercept) / slope
        item.RescaleSlope, item.RescaleIntercept = slope, intercept
        item.PixelData = stored.astype("<i2").tobytes()


def overlay_bits(data: list[Dataset]) -> None:
    """12 bits stored, rubbish above them."""
    for k, item in enumerate(data):
        item.BitsStored, item.HighBit, item.PixelRepresentation = 12, 11, 0
        item.PixelData = ((PHANTOM_HU[:, :, k].T + 1024).astype("<u2") | 0x5000).tobytes()


def enhanced(data: list[Dataset], step: Callable[[int], float] = lambda k: SPACING_MM[2] * k) -> Dataset:
    """The series as one enhanced multi-frame object."""
    whole = data[0]
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    shared, measures, orientation, values = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, orientation.ImageOrientationPatient = whole.PixelSpacing, whole.ImageOrientationPatient
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 1, -1024, "HU"
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([measures]), Sequence([orientation])
    shared.PixelValueTransformationSequence = Sequence([values])
    frames = []
    for k in range(len(data)):
        position, frame = Dataset(), Dataset()
        position.ImagePositionPatient = [20, 15, 30 + step(k)]
        frame.PlanePositionSequence = Sequence([position])
        frames.append(frame)
    whole.SharedFunctionalGroupsSequence = Sequence([shared])
    whole.PerFrameFunctionalGroupsSequence = Sequence(frames)
    whole.NumberOfFrames = len(data)
    whole.PixelData = b"".join(item.PixelData for item in data)
    for name in ("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope"):
        del whole[name]
    return whole


def localizer(data: list[Dataset]) -> list[Dataset]:
    """A scout image in the series."""
    scout = one_slice(0)
    scout.SOPInstanceUID = scout.file_meta.MediaStorageSOPInstanceUID = f"{UID}.8"
    scout.ImageType, scout.ImageOrientationPatient = ["ORIGINAL", "PRIMARY", "LOCALIZER"], [1, 0, 0, 0, 0, -1]
    return [*data, scout]


def register_series() -> None:
    """I20 to I32."""
    series("good", "")
    series("good-reversed", "", lambda data: data[::-1])
    series("good-shuffled", "", lambda data: [data[i] for i in np.random.default_rng(3).permutation(len(data))])
    series("good-same-file-twice", "", lambda data: [*data, one_slice(4)])
    series("good-localizer", "", localizer)
    series("good-jitter", "", moved(5, 0, 0, 1e-4))
    series("good-rescale-per-slice", "", per_slice_rescale)
    series("good-overlay-bits", "", overlay_bits)
    series("good-implicit", "", in_syntax(ImplicitVRLittleEndian))
    series("good-deflated", "", in_syntax(DeflatedExplicitVRLittleEndian))
    series("good-rle", "", compressed(RLELossless))
    series("good-enhanced", "", lambda data: [enhanced(data)])
    SERIES["good-big-endian"] = "", big_endian_series
    SERIES["good-no-preamble"] = "", no_preamble
    series("gap-1", "GAP", removed(7))
    series("gap-2", "GAP", removed(7, 8))
    series("gap-last-but-one", "GAP", removed(-2))
    series("gap-irregular", "GAP", moved(5, 0, 0, 0.2))
    series("gap-enhanced", "GAP", lambda data: [enhanced(data, lambda k: 3 * k + (k > 9) * 3)])
    series("two-phases", "DUPPOS", lambda data: [*data, *again(data)])
    series("same-identity-other-pixels", "DUPPOS", lambda data: [*data, other_pixels()])
    series("mixed-spacing", "MIXED", one(3, PixelSpacing=[2.5, 2.1]))
    series("mixed-orientation", "MIXED", one(3, ImageOrientationPatient=[1, 0, 0, 0, 0, -1]))
    series("mixed-matrix", "MIXED", one(3, Rows=16, PixelData=bytes(16 * 22 * 2)))
    series("mixed-study", "MIXED", one(9, StudyInstanceUID=f"{UID}.1.1"))
    series("mixed-frame-of-reference", "MIXED", one(9, FrameOfReferenceUID=f"{UID}.3.1"))
    series("good-patient-missing-once", "", one(15, PatientID=None))
    series("good-enhanced-copied", "", lambda data: [enhanced(data)] * 2)
    SERIES["good-meta-without-preamble"] = "", meta_alone
    series("mixed-rescale-type", "NOTHU", one(3, RescaleType="US"))
    series("tilt-1", "TILT", sheared(1))
    series("tilt-13.5", "TILT", sheared(13.5))
    series("tilt-minus-13.5", "TILT", sheared(-13.5))
    series("tilt-tag-alone", "TILT", each(GantryDetectorTilt=13.5))
    series("good-tilt-0.05", "read", sheared(0.05))
    series("one-slice-aside", "TILT", moved(6, 4, 0, 0))
    series("no-rescale", "RESCALE", lambda data: [item for item in data if not delattr(item, "RescaleSlope")])
    series("no-intercept", "RESCALE", one(2, RescaleIntercept=None))
    series("slope-0", "RESCALE", one(2, RescaleSlope=0))
    series("truncated-slice", "SLICE", one(4, PixelData=PHANTOM_HU[:, :, 4].T.tobytes()[:-90]))
    series("longer-slice", "SLICE", one(4, PixelData=bytes(22 * 18 * 2 + 500)))
    series("no-pixels", "SLICE", one(4, PixelData=None))
    series("good-many-tags", "", many_tags)
    series("good-deep-sequences", "", deep)
    SERIES["undefined-length"] = "SLICE", undefined_length
    SERIES["file-cut"] = "SLICE", cut_file
    SERIES["good-rle-known-length"] = "", known_length
    series("unknown-codec", "CODEC", encapsulated("1.2.840.10008.1.2.4.53"))
    series("broken-j2k", "SLICE", encapsulated(JPEG2000Lossless))
    series("mr", "MODALITY", each(Modality="MR"))
    series("pet", "MODALITY", each(Modality="PT"))
    series("rtdose", "MODALITY", each(Modality="RTDOSE"))
    series("secondary-capture", "MODALITY", each(Modality="OT"))
    series("burned-in", "BURNEDIN", each(BurnedInAnnotation="YES"))
    series("colour", "DTYPE", each(PhotometricInterpretation="RGB", SamplesPerPixel=3))
    series("single-slice", "SMALL", lambda data: data[:1])
    series("thin", "SMALL", lambda data: data[:6])
    series("no-position", "NOFORM", one(3, ImagePositionPatient=None))
    series("no-orientation", "NOFORM", each(ImageOrientationPatient=[]))
    series("spacing-0", "SPACING", each(PixelSpacing=[0, 0]))
    series("orientation-oblique-pair", "AFFINE", each(ImageOrientationPatient=[1, 0, 0, 0.5, 1, 0]))
    series("rows-65535", "DIMS", each(Rows=65535, Columns=65535))
    series("frames-1000", "MULTIFRAME", each(NumberOfFrames=1000))
    series("raw-values", "NOTHU", each(RescaleIntercept=0))


def deep(data: list[Dataset]) -> None:
    """A private sequence 200 levels deep in one slice."""
    outer = Dataset()
    for _ in range(200):
        inner, outer = outer, Dataset()
        outer.PatientComments = CANARY
        outer.RequestAttributesSequence = Sequence([inner])
    data[3].RequestAttributesSequence = Sequence([outer])


def many_tags(data: list[Dataset]) -> None:
    """Twenty thousand private elements in one slice."""
    for number in range(20_000):
        data[3].add_new(0x00110000 + 0x1000 + (number % 0xE000) + (number // 0xE000) * 0x20000, "LO", "x")


def undefined_length(folder: Path) -> None:
    """Native pixels of undefined length, never ended."""
    SERIES["good"][1](folder)
    path = folder / "s004.dcm"
    data = path.read_bytes()
    place = data.rindex(b"\xe0\x7f\x10\x00OW") + 8
    path.write_bytes(data[:place] + b"\xff\xff\xff\xff" + data[place + 4 :])


def known_length(folder: Path) -> None:
    """Compressed pixels whose length is told, which the standard does not allow and some archives write."""
    SERIES["good-rle"][1](folder)
    for path in folder.iterdir():
        data = path.read_bytes()
        place = data.rindex(b"\xe0\x7f\x10\x00OB") + 8
        pixels = data[place + 4 :].removesuffix(b"\xfe\xff\xdd\xe0\x00\x00\x00\x00")
        path.write_bytes(data[:place] + len(pixels).to_bytes(4, "little") + pixels)


def again(data: list[Dataset]) -> list[Dataset]:
    """A second phase at the same places."""
    copies = [one_slice(k) for k in range(len(data))]
    for k, item in enumerate(copies):
        item.SOPInstanceUID = item.file_meta.MediaStorageSOPInstanceUID = f"{UID}.5.{k + 1}"
    return copies


def other_pixels() -> Dataset:
    """Slice 4 once more under the same identity, with other pixels."""
    item = one_slice(4)
    item.PixelData = one_slice(5).PixelData
    return item


def encapsulated(syntax: str) -> Callable[[list[Dataset]], None]:
    """Compressed, as the header says, and rubbish."""

    def change(data: list[Dataset]) -> None:
        for item in data:
            item.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8" + bytes(100) + b"\xff\xd9"])
            item.file_meta.TransferSyntaxUID = syntax
            item["PixelData"].VR = "OB"

    return change


def big_endian_series(folder: Path) -> None:
    """Explicit VR big endian."""
    folder.mkdir(parents=True)
    clean = slices()
    in_syntax(ExplicitVRBigEndian)(clean)
    for k, item in enumerate(clean):
        pydicom.dcmwrite(folder / f"s{k}.dcm", item, little_endian=False, implicit_vr=False, enforce_file_format=True)


def no_preamble(folder: Path) -> None:
    """Data sets without preamble and file meta information, as old archives give them."""
    folder.mkdir(parents=True)
    for k, item in enumerate(slices()):
        del item.file_meta
        pydicom.dcmwrite(folder / f"s{k}.dcm", item, little_endian=True, implicit_vr=True, enforce_file_format=False)


LAST_SLICE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "zeros": lambda data: bytes(len(data)),
    "cut-at-140": lambda data: data[:140],
    "cut-at-300": lambda data: data[:300],
    "not-dicom": lambda _: b"<html>not found</html>",
}
"""What an interrupted copy leaves of a file: whoever passed over it would shorten the scan."""


def meta_alone(folder: Path) -> None:
    """Files that begin with their meta information, without preamble."""
    SERIES["good"][1](folder)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[132:])


def cut_file(folder: Path) -> None:
    """One file of the series cut short by 300 bytes."""
    SERIES["good"][1](folder)
    path = folder / "s004.dcm"
    path.write_bytes(path.read_bytes()[:-300])


register_nifti()
register_text_headers()
register_series()


def write_all(folder: Path) -> None:
    """Write every file and series of the catalogue."""
    for name, (_, write) in FILES.items():
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / name)
    for name, (_, write) in SERIES.items():
        write(folder / "series" / name)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    write_all(target)
    print(len(FILES), "files,", len(SERIES), "series,", sum(f.stat().st_size for f in target.rglob("*.*")), "bytes")
