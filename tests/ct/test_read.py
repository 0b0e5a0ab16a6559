"""Reading: the fault catalogue, geometry against independent readers, and the guard around both."""

import gzip
import itertools
import os
import signal
import sys
import threading
import time
from pathlib import Path

import nibabel
import numpy as np
import psutil
import pydicom
import pytest
import SimpleITK

from dagman.ct import guard, hounsfield, pixels
from dagman.ct.index import index
from dagman.ct.read import Limits, check, read, read_mask
from dagman.ct.survey import Problem
from dagman.errors import DagmanError
from dagman.types import Scan, Volume

sys.path.append(str(Path(__file__).parents[1] / "corpus"))
import make_corpus
from make_corpus import AFFINE, CANARY, FILES, PHANTOM_HU, SERIES

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def outcome(path: Path, limits: Limits | None = None) -> Volume | Problem:
    """What becomes of one source: its volume, or its first problem."""
    scans, problems = index([path])
    refused = [problem for problem in problems if not problem.ignored]
    if refused:
        return refused[0]
    (scan,) = scans
    assert CANARY not in repr(scan)
    found = attempt(scan, limits)
    return Problem.of(found) if isinstance(found, DagmanError) else found


def attempt(scan: Scan, limits: Limits | None = None) -> Volume | DagmanError:
    """The volume, or why not; any other exception fails the test."""
    try:
        return read(scan, limits)
    except DagmanError as error:
        return error


def same_scan(volume: Volume) -> bool:
    return np.array_equal(volume.hu, PHANTOM_HU) and np.allclose(volume.affine, AFFINE, atol=1e-3)


@pytest.mark.parametrize("name", FILES)
def test_file_of_the_catalogue(name: str, tmp_path: Path) -> None:
    code, write = FILES[name]
    write(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    judge(outcome(tmp_path / name), code, name)
    assert (tmp_path / name).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_paths_count_from_the_folder_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that reads began in another: a notebook changes its folder."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        FILES["good.nii.gz"][1](tmp_path / name / f"{name}.nii.gz")
        monkeypatch.chdir(tmp_path / name)
        (scan,), problems = index([Path(f"{name}.nii.gz")])
        assert problems == []
        assert read(scan).hu.shape


@pytest.mark.parametrize("name", SERIES)
def test_series_of_the_catalogue(name: str, tmp_path: Path) -> None:
    code, write = SERIES[name]
    write(tmp_path / name)
    judge(outcome(tmp_path / name), code, name)


def judge(found: Volume | Problem, code: str, name: str) -> None:
    if isinstance(found, Volume):
        assert code in ("", "read")
        assert code == "read" or same_scan(found)
        return
    text = str(found)
    assert found.code in code.split("|"), text
    assert name in found.source
    assert "\n" not in text
    assert CANARY not in text
    assert len(found.advice.split()) >= 2


def test_padding_and_metal_stay_exact(tmp_path: Path) -> None:
    for value in (-2000, -3024, -32768, 30000):
        FILES[f"padding-{value}.nii"][1](tmp_path / "a.nii")
        volume = outcome(tmp_path / "a.nii")
        assert volume.hu.dtype == np.int16
        assert volume.hu[0, 0, 0] == value
        assert np.array_equal(volume.hu[1:], PHANTOM_HU[1:])


@pytest.mark.parametrize(("stored", "padding", "hu"), [(63536, 63536, -1024), (4095, 4095, 3071), (1024, 1024, 0)])
def test_padding_of_dicom_is_air_unless_it_is_a_value_of_the_body(
    stored: int, padding: int, hu: int, tmp_path: Path
) -> None:
    """Unsigned values: what SimpleITK gives as 62512 HU. The tags of the others name what is metal or water as well."""
    shown = (PHANTOM_HU + 1024).astype(np.uint16)
    shown[:4] = stored
    for k, data in enumerate(make_corpus.slices()):
        data.PixelRepresentation, data.PixelPaddingValue = 0, padding
        data.PixelData = shown[:, :, k].T.astype("<u2").tobytes()
        make_corpus.save(data, tmp_path / "s" / f"s{k:03d}.dcm")
    volume = outcome(tmp_path / "s")
    assert isinstance(volume, Volume)
    wanted = PHANTOM_HU.copy()
    wanted[:4] = hu
    assert np.array_equal(volume.hu, wanted)


def test_two_exports_of_one_series_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in "ab":
        SERIES["good"][1](tmp_path / "s" / folder)
    for path in (tmp_path / "s" / "b").iterdir():
        data = pydicom.dcmread(path)
        data.PatientComments = "exported again"
        make_corpus.save(data, path)
    assert "such as a/s000.dcm and b/s000.dcm at" in str(outcome(tmp_path / "s"))


def test_values_beyond_int16_do_not_wrap(tmp_path: Path) -> None:
    FILES["uint16-65535.nii"][1](tmp_path / "a.nii")
    volume = outcome(tmp_path / "a.nii")
    assert volume.hu[0, 0, 0] == 64511
    assert np.array_equal(volume.hu[1:], PHANTOM_HU[1:])


ORDERS = [(p, s) for p in itertools.permutations(range(3)) for s in itertools.product((1, -1), repeat=3)]


@pytest.mark.parametrize(("order", "signs"), ORDERS)
def test_all_48_axis_orders_land_equal(order: tuple[int, ...], signs: tuple[int, ...], tmp_path: Path) -> None:
    array, affine = PHANTOM_HU.transpose(order), AFFINE[:, [*order, 3]].copy()
    for axis, sign in enumerate(signs):
        if sign < 0:
            array = np.flip(array, axis)
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(array), affine), tmp_path / "a.nii.gz")
    assert same_scan(outcome(tmp_path / "a.nii.gz"))


@pytest.mark.parametrize("degrees", [17, -40, 100])
def test_oblique_scan_keeps_every_voxel_in_its_place(degrees: float, tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    affine = make_corpus.turned(degrees)
    nibabel.save(nibabel.Nifti1Image(PHANTOM_HU, affine), path)
    volume = outcome(path)
    for voxel in np.random.default_rng(0).integers(0, PHANTOM_HU.shape, (20, 3)):
        world = affine @ [*voxel, 1]
        there = np.linalg.solve(volume.affine, world)[:3]
        assert np.abs(there - np.rint(there)).max() < 1e-3
        assert volume.hu[tuple(np.rint(there).astype(int))] == PHANTOM_HU[tuple(voxel)]


@pytest.mark.parametrize("dtype", [np.int16, np.int64])
def test_metaimage_and_nrrd_agree_with_simpleitk_when_rotated(dtype: type, tmp_path: Path) -> None:

    image = SimpleITK.GetImageFromArray(PHANTOM_HU.T.astype(dtype))
    rotation = SimpleITK.VersorRigid3DTransform()
    rotation.SetRotation((0.2, 0.3, 0.9), 0.5)
    image.SetDirection(rotation.GetMatrix())
    image.SetSpacing((2.0, 2.5, 3.0))
    image.SetOrigin((5, 6, 7))
    for name in ("a.mha", "b.nrrd", "c.nii.gz"):
        SimpleITK.WriteImage(image, str(tmp_path / name), useCompression=True)
        agree_with_simpleitk(outcome(tmp_path / name), image)


def agree_with_simpleitk(volume: Volume, image: SimpleITK.Image) -> None:
    """Within 1e-3 mm at every corner, within 1 HU at every voxel."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    stored = nibabel.Nifti1Image(SimpleITK.GetArrayFromImage(image).T.astype(np.float32), LPS_TO_RAS @ affine)
    agree_with_nibabel(volume, stored)


def agree_with_nibabel(volume: Volume, image: nibabel.Nifti1Image) -> None:
    reference = nibabel.as_closest_canonical(image)
    assert volume.hu.shape == reference.shape
    corners = np.array([[*c, 1] for c in itertools.product(*((0, n) for n in volume.hu.shape))]).T
    assert np.abs(volume.affine @ corners - reference.affine @ corners).max() < 1e-3
    assert np.abs(volume.hu - np.asanyarray(reference.dataobj)).max() < 1


def test_order_of_slices_does_not_matter(tmp_path: Path) -> None:
    SERIES["good"][1](tmp_path / "s")
    files = sorted((tmp_path / "s").iterdir())
    for seed in range(20):
        shuffled = tuple(files[i] for i in np.random.default_rng(seed).permutation(len(files)))
        assert same_scan(read(Scan(case_id="a", files=shuffled, kind="dicom")))


def test_file_that_vanishes_is_named(tmp_path: Path) -> None:
    FILES["good.nii"][1](tmp_path / "a.nii")
    (scan,) = index([tmp_path])[0]
    (tmp_path / "a.nii").unlink()
    with pytest.raises(DagmanError, match=r"E-GONE .*a.nii"):
        read(scan)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    FILES["good.nii"][1](tmp_path / "a.nii")
    (tmp_path / "a.nii").chmod(0)
    assert outcome(tmp_path / "a.nii").code == "PERM"


# --------------------------------------------------------------------------------------------------- masks


def mask_file(path: Path, affine: np.ndarray = AFFINE, dtype: str = "u1", value: float = 1) -> Path:
    nibabel.save(nibabel.Nifti1Image((np.where(PHANTOM_HU > 300, value, 0)).astype(dtype), affine), path)
    return path


@pytest.mark.parametrize("dtype", ["u1", "i4", "f8"])
def test_mask_lies_on_its_image(dtype: str, tmp_path: Path) -> None:
    FILES["good.nii.gz"][1](tmp_path / "ct.nii.gz")
    image = outcome(tmp_path / "ct.nii.gz")
    mask = read_mask(mask_file(tmp_path / "m.nii.gz", dtype=dtype, value=3), image)
    assert mask.hu.dtype == np.int16
    assert np.array_equal(mask.hu, np.where(PHANTOM_HU > 300, 3, 0))


def shifted(*by: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[:3, 3] += by
    return affine


@pytest.mark.parametrize(
    "options",
    [
        {"affine": shifted(1.2, 0, 0)},
        {"affine": AFFINE * [[-1], [1], [1], [1]]},
        {"affine": AFFINE @ np.diag([1, 1, 1.01, 1])},
        {"affine": make_corpus.turned(2)},
        {"dtype": "f4", "value": 0.5},
        {"dtype": "i2", "value": -1},
        {"dtype": "f8", "value": 1e12},
    ],
)
def test_mask_that_lies_elsewhere_is_refused(options: dict, tmp_path: Path) -> None:
    FILES["good.nii.gz"][1](tmp_path / "ct.nii.gz")
    image = outcome(tmp_path / "ct.nii.gz")
    with pytest.raises(DagmanError, match=r"E-MASK .*m.nii.gz"):
        read_mask(mask_file(tmp_path / "m.nii.gz", **options), image)


def test_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    FILES["good.nii.gz"][1](tmp_path / "ct.nii.gz")
    image = outcome(tmp_path / "ct.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.ones((22, 18, 15), "u1"), AFFINE), tmp_path / "m.nii.gz")
    with pytest.raises(DagmanError, match="22 x 18 x 15 and 22 x 18 x 16"):
        read_mask(tmp_path / "m.nii.gz", image)


# ------------------------------------------------------------------------------------------------- the guard


def test_hanging_read_is_ended_in_time_and_the_next_one_works(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.nii")
    FILES["good.nii"][1](tmp_path / "good.nii")
    start = time.monotonic()
    with pytest.raises(DagmanError, match=r"E-TIMEOUT .*pipe.nii.* 0.5 s"):
        read(Scan(case_id="a", files=(tmp_path / "pipe.nii",), kind="nifti"), Limits(seconds=0.5))
    assert time.monotonic() - start < 5
    assert same_scan(outcome(tmp_path / "good.nii"))


def test_read_beyond_its_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.nii"
    path.write_bytes(make_corpus.nifti(dim=[3, 1000, 1000, 700, 1, 1, 1, 1]))
    os.truncate(path, 352 + 2 * 1000 * 1000 * 700)
    with pytest.raises(DagmanError, match=r"E-MEMORY .*large.nii"):
        read(Scan(case_id="a", files=(path,), kind="nifti"), Limits(memory_bytes=2**30))


@pytest.mark.parametrize(("ended_by", "code"), [(signal.SIGKILL, "MEMORY"), (signal.SIGSEGV, "CRASH")])
@pytest.mark.usefixtures("one_server")
def test_killed_read_costs_only_its_scan(ended_by: int, code: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.nii")
    FILES["good.nii"][1](tmp_path / "good.nii")
    assert same_scan(outcome(tmp_path / "good.nii"))

    def kill() -> None:
        with (tmp_path / "pipe.nii").open("wb"):  # comes back when the read has begun
            guard_process().children()[0].send_signal(ended_by)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(DagmanError, match=f"E-{code} .*pipe.nii"):
        read(Scan(case_id="a", files=(tmp_path / "pipe.nii",), kind="nifti"), Limits(seconds=20.0))
    thread.join()
    assert same_scan(outcome(tmp_path / "good.nii"))


@pytest.fixture
def one_server() -> None:
    """No server of an earlier test is idle, so that the next read starts the only one."""
    guard.close()


def guard_process() -> psutil.Process:
    (found,) = [p for p in psutil.Process().children() if "dagman.ct.guard" in p.cmdline()]
    return found


@pytest.mark.usefixtures("one_server")
def test_lost_server_is_replaced(tmp_path: Path) -> None:
    FILES["good.nii"][1](tmp_path / "good.nii")
    scan = index([tmp_path / "good.nii"])[0][0]
    guard_process().kill()
    with pytest.raises(DagmanError, match="E-CRASH"):
        read(scan)
    assert same_scan(read(scan))


@pytest.mark.usefixtures("one_server")
def test_no_descriptor_and_no_process_is_left_over(tmp_path: Path) -> None:
    FILES["good.nii.gz"][1](tmp_path / "good.nii.gz")
    FILES["cut-half.nii.gz"][1](tmp_path / "bad.nii.gz")
    scans = index([tmp_path])[0]
    for repeat in range(12):
        assert [getattr(attempt(scan), "code", "read") for scan in scans] == ["GZIP", "read"]
        if repeat == 1:
            before = psutil.Process().num_fds()
    assert psutil.Process().num_fds() <= before
    assert len(guard_process().children()) == 1


@pytest.mark.usefixtures("one_server")
def test_a_process_reads_on_until_a_read_fails_and_is_replaced_where_it_ended_idle(tmp_path: Path) -> None:
    FILES["good.nii.gz"][1](tmp_path / "good.nii.gz")
    FILES["cut-half.nii.gz"][1](tmp_path / "bad.nii.gz")
    bad, good = index([tmp_path])[0]

    def reader() -> psutil.Process:
        (found,) = guard_process().children()
        return found

    assert same_scan(read(good))
    first = reader()
    assert same_scan(read(good))
    assert reader() == first
    with pytest.raises(DagmanError, match="E-GZIP"):
        read(bad)
    assert same_scan(read(good))
    assert reader() != first
    reader().kill()
    assert same_scan(read(good))


@pytest.mark.usefixtures("one_server")
def test_a_process_killed_before_it_takes_up_a_scan_costs_nothing(tmp_path: Path) -> None:
    FILES["good.nii.gz"][1](tmp_path / "good.nii.gz")
    (good,) = index([tmp_path])[0]
    read(good)
    (idle,) = guard_process().children()
    idle.suspend()
    killed = threading.Timer(0.5, idle.kill)
    killed.start()
    assert same_scan(read(good))
    killed.join()


@pytest.mark.usefixtures("one_server")
def test_a_reading_process_keeps_no_scan(tmp_path: Path) -> None:
    FILES["good.nii.gz"][1](tmp_path / "good.nii.gz")
    (good,) = index([tmp_path])[0]
    read(good)
    (reader,) = guard_process().children()
    assert not [fd for fd in Path(f"/proc/{reader.pid}/fd").iterdir() if "memfd" in str(fd.readlink())]


def test_works_in_threads_and_in_joblib_workers(tmp_path: Path) -> None:
    import joblib

    FILES["good.nii.gz"][1](tmp_path / "a.nii.gz")
    SERIES["good"][1](tmp_path / "s")
    scans = index([tmp_path])[0]
    volumes = joblib.Parallel(n_jobs=2)(joblib.delayed(read)(scan) for scan in scans * 2)
    volumes += joblib.Parallel(n_jobs=2, backend="threading")(joblib.delayed(read)(scan) for scan in scans * 4)
    guard.close()
    assert len(volumes) == 12
    assert all(same_scan(volume) for volume in volumes)


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_fork_of_a_reader_gets_its_own_server(tmp_path: Path) -> None:
    FILES["good.nii"][1](tmp_path / "a.nii")
    (scan,) = index([tmp_path])[0]
    child = os.fork()
    if child == 0:
        os._exit(0 if same_scan(read(scan)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same_scan(read(scan))


def test_killed_caller_leaves_no_process_behind(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.nii")
    program = (
        "from pathlib import Path; from dagman.types import Scan; from dagman.ct.read import read;"
        f"read(Scan(case_id='a', files=(Path({str(tmp_path / 'pipe.nii')!r}),), kind='nifti'))"
    )
    caller = psutil.Popen([sys.executable, "-c", program])
    while len(family := caller.children(recursive=True)) < 2:
        time.sleep(0.05)
    caller.kill()
    caller.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def test_detached_file_is_never_opened(tmp_path: Path) -> None:
    secret = tmp_path / "secret.raw"
    secret.write_bytes(PHANTOM_HU.tobytes(order="F"))
    os.utime(secret, (1, 1))
    for name, data in {
        "a.mha": make_corpus.mha(ElementDataFile="secret.raw"),
        "b.mhd": make_corpus.mha(ElementDataFile="secret.raw"),
        "c.nrrd": make_corpus.nrrd(data_file="secret.raw"),
    }.items():
        (tmp_path / name).write_bytes(data)
        assert outcome(tmp_path / name).code == "DETACHED"


# --------------------------------------------------------------------------------------------------- fuzzing


def mutated(data: bytes, seed: int, header: int) -> bytes:
    """One or two changes to the first `header` bytes: bits, extreme numbers, runs removed or doubled."""
    draw = np.random.default_rng(seed)
    result = bytearray(data)
    for _ in range(draw.integers(1, 3)):
        place = int(draw.integers(0, header))
        kind = draw.integers(0, 4)
        if kind == 0:
            result[place] ^= 1 << int(draw.integers(0, 8))
        elif kind == 1:
            value = [b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\0\x80"]
            result[place : place + 4] = value[int(draw.integers(0, 6))]
        elif kind == 2:
            del result[place : place + int(draw.integers(1, 9))]
        else:
            result[place:place] = result[place : place + int(draw.integers(1, 9))]
    return bytes(result)


def survives(scans: list[Scan], problems: list[Problem]) -> int:
    """Read all; only `DagmanError` may leave. Returns how many were read."""
    count = 0
    for problem in problems:
        assert CANARY not in str(problem)
    for scan in scans:
        found = attempt(scan, Limits(seconds=20.0, memory_bytes=2 * 2**30))
        if isinstance(found, DagmanError):
            assert found.code not in ("TIMEOUT", "MEMORY"), str(found)
            assert CANARY not in str(found)
            assert "\n" not in str(found)
        else:
            count += 1
            assert np.isfinite(found.hu).all()
            assert np.isfinite(found.affine).all()
    return count


def test_250_mutated_nifti_headers(tmp_path: Path) -> None:
    good = make_corpus.nifti()
    for seed in range(200):
        (tmp_path / f"{seed}.nii").write_bytes(mutated(good, seed, 352))
    for seed in range(200, 250):
        (tmp_path / f"{seed}.nii.gz").write_bytes(gzip.compress(mutated(good, seed, 352)))
    assert 10 < survives(*index([tmp_path])) < 200


def test_150_mutated_dicom_headers(tmp_path: Path) -> None:
    SERIES["good"][1](tmp_path / "good")
    files = sorted((tmp_path / "good").iterdir())
    good = files[5].read_bytes()
    header = good.index(pydicom.dcmread(files[5]).PixelData)
    scans, problems = [], []
    for seed in range(150):
        path = tmp_path / f"{seed}.dcm"
        path.write_bytes(mutated(good, seed, header))
        problems += index([path])[1] if seed % 4 == 0 else []
        scans.append(Scan(case_id=str(seed), files=(*files[:5], path, *files[6:]), kind="dicom"))
    assert 10 < survives(scans, problems) < 140


# ------------------------------------------------------------------------------------------------- real data


def test_real_nifti_agrees_with_nibabel(real_data: Path) -> None:
    scans, problems = index([real_data / "ct_corpus"])
    assert len(scans) == 12
    assert all(problem.ignored for problem in problems)
    for scan in scans:
        agree_with_nibabel(read(scan), nibabel.load(scan.source))


def test_real_sarcomas_and_their_masks_agree_with_nibabel(real_data: Path) -> None:
    cts = sorted((real_data / "sts").glob("*_ct.nii.gz"))
    assert len(cts) == 40
    for path in cts:
        image = outcome(path)
        agree_with_nibabel(image, nibabel.load(path))
        mask = read_mask(path.with_name(path.name.replace("_ct", "_gtv")), image)
        assert mask.hu.any()


def wrong_units(hu: np.ndarray) -> dict[str, np.ndarray]:
    """The same scan as it is found when nobody rescaled it, or somebody rescaled it for a network."""
    return {
        "stored": hu + 1024,
        "air at 0": hu + 1000,
        "subtracted twice": hu - 1024,
        "soft tissue window on 0..255": np.clip((hu + 160) / 400, 0, 1) * 255,
        "wide window in whole numbers": np.rint(np.clip((hu + 1000) / 1400, 0, 1) * 255),
        "-1..1": np.clip((hu + 160) / 200 - 1, -1, 1),
        "standardised": (hu - hu.mean()) / hu.std(),
        "thousandths": hu / 1000,
    }


def test_real_scans_in_wrong_units_are_refused_and_their_crops_accepted(real_data: Path) -> None:
    draw = np.random.default_rng(0)
    for scan in index([real_data / "ct_corpus"])[0]:
        volume = read(scan)
        hu = volume.hu[::4, ::4].astype(np.float32)
        for name, values in wrong_units(hu).items():
            with pytest.raises(DagmanError, match="E-NOTHU"):
                hounsfield.check_hu(Path(name), values)
        size = [min(round(64 / mm), side) for mm, side in zip(volume.spacing_mm, volume.hu.shape, strict=True)]
        crops = 0
        while crops < 4:
            start = [draw.integers(0, side - n + 1) for side, n in zip(volume.hu.shape, size, strict=True)]
            crop = volume.hu[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]
            if np.mean(crop > -500) > 0.5:
                hounsfield.check_hu(Path(scan.case_id), crop)
                crops += 1


def test_other_real_formats_agree_with_simpleitk(real_data: Path) -> None:
    for name in ("cip_ct-64.nrrd", "elastix_3DCT_lung_baseline_small.mha"):
        path = real_data / "seg_other" / name
        agree_with_simpleitk(outcome(path), SimpleITK.ReadImage(str(path)))
    for name in ("cip_lm-64.nrrd", "elastix_3DCT_lung_baseline_mask.mha", "4d_lung_113_p40_labels.nii.gz"):
        assert outcome(real_data / "seg_other" / name).code == "NOTHU"
        assert read_mask(real_data / "seg_other" / name).hu.any()


def series_by_simpleitk(folder: Path) -> SimpleITK.Image:
    files = sorted(folder.iterdir(), key=lambda f: float(pydicom.dcmread(f).ImagePositionPatient[2]))
    return SimpleITK.ReadImage([str(file) for file in files])


def series_by_pydicom(folder: Path) -> nibabel.Nifti1Image:
    """Axial series only."""
    data = sorted((pydicom.dcmread(f) for f in folder.iterdir()), key=lambda d: float(d.ImagePositionPatient[2]))
    first, last = (np.array(data[i].ImagePositionPatient, float) for i in (0, -1))
    row, column = np.reshape(np.array(data[0].ImageOrientationPatient, float), (2, 3))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * data[0].PixelSpacing[1], column * data[0].PixelSpacing[0]
    affine[:3, 2], affine[:3, 3] = (last - first) / (len(data) - 1), first
    hu = np.stack([d.pixel_array.T * float(d.RescaleSlope) + float(d.RescaleIntercept) for d in data], -1)
    return nibabel.Nifti1Image(hu.astype(np.float32), LPS_TO_RAS @ affine)


@pytest.mark.parametrize(
    ("folder", "min_extent_mm"),
    [
        ("dicom_series/lung_dx_A0002_B40f", 32.0),
        ("dicom_series/lidc_idri_0003_substack", 20.0),
        ("dicom_edge/cip_ct64_dicom", 32.0),
        ("dicom_edge/totalseg_ct_dicom", 32.0),
    ],
)
def test_real_series_agree_with_simpleitk_and_pydicom(real_data: Path, folder: str, min_extent_mm: float) -> None:
    volume = outcome(real_data / folder, Limits(min_extent_mm=min_extent_mm))
    agree_with_simpleitk(volume, series_by_simpleitk(real_data / folder))
    agree_with_nibabel(volume, series_by_pydicom(real_data / folder))


def test_11_slices_of_2_5_mm_are_too_thin_by_default(real_data: Path) -> None:
    found = outcome(real_data / "dicom_series" / "lidc_idri_0003_substack")
    assert found.code == "SMALL"
    assert "27.5 mm where 32 mm are needed" in found.problem


EDGE = {
    "dicom2nifti_compressed": {"MODALITY": 1},
    "dicom2nifti_failing/gantrytilting": {"TILT": 1},
    "dicom2nifti_failing/notavolume": {"DUPPOS": 1},
    "dicom2nifti_failing/slicecount": {"MODALITY": 1},
    "dicom2nifti_failing/sliceincrement": {"GAP": 1},
    "dicom2nifti_failing/sliceorientation": {"MODALITY": 1},
    "missing_slice_tcga_lihc": {"GAP": 1},
    "panimg_4d": {"SMALL": 19},
    "rt_utils": {"SMALL": 1, "MODALITY": 2},
    "pydicom_data": {"MODALITY": 4, "NOTHU": 1, "SMALL": 2},
    "highdicom": {"SMALL": 1, "MODALITY": 22},
    "transfer_syntaxes": {"DUPPOS": 1, "SMALL": 2, "NOTHU": 1},
}
"""True reasons: MR, SEG, SR, SM, DX, NM and parametric maps are no CT; perfusion maps (eCT, CT0012) are CT but no HU;
one image in 16 encodings lies 16 times in one place; `notavolume` is one bolus-tracking position; the rest are single
slices, two slices, or 2 x 2 pixels."""


@pytest.mark.parametrize("folder", EDGE)
def test_every_edge_file_is_rejected_for_its_true_reason(real_data: Path, folder: str) -> None:
    rows, problems = check([real_data / "dicom_edge" / folder])
    found: dict[str, int] = {}
    for problem in problems:
        if not problem.ignored:
            found[problem.code] = found.get(problem.code, 0) + 1
    assert rows == []
    assert found == EDGE[folder], [str(problem) for problem in problems]


def test_table_of_edge_folders_is_complete(real_data: Path) -> None:
    shown = {*EDGE, "cip_ct64_dicom", "totalseg_ct_dicom"}
    for file in (real_data / "dicom_edge").rglob("*"):
        if file.is_file() and file.name != "index.csv":
            place = file.relative_to(real_data / "dicom_edge").as_posix()
            assert any(place.startswith(f"{folder}/") for folder in shown), place


def test_transfer_syntaxes_decode_alike(real_data: Path) -> None:
    decoded, refused = 0, []
    for path in sorted((real_data / "dicom_edge" / "transfer_syntaxes").iterdir()):
        header = pydicom.dcmread(path)
        if "RescaleSlope" not in header:
            continue
        try:
            stored = pixels.open_file(path)(0)
        except DagmanError as error:
            refused.append(error.code)
            continue
        hu = stored * float(header.RescaleSlope) + float(header.RescaleIntercept)
        reference = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))[0]
        assert np.abs(hu - reference).max() <= 1, path.name
        decoded += 1
    assert decoded >= 14
    assert refused == ["CODEC"] * len(refused)


def test_check_lists_scans_and_problems_and_writes_nothing(tmp_path: Path) -> None:
    source = tmp_path / "in"
    SERIES["good"][1](source / "dicom")
    SERIES["gap-1"][1](source / "gap")
    for path in (source / "gap").iterdir():  # of its own: slices that the other has would fill its gap
        data = pydicom.dcmread(path)
        data.SeriesInstanceUID += ".9"
        data.save_as(path)
    for name in ("good.nii.gz", "cut-half.nii.gz", "raw-0-4095.nii"):
        FILES[name][1](source / name)
    (source / "notes.txt").write_text(CANARY)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    rows, problems = check([source / "dicom", source / "gap", source], num_workers=2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert [(row["format"], row["shape"], row["spacing_mm"]) for row in rows] == [
        ("dicom", [22, 18, 16], [2.0, 2.5, 3.0]),
        ("nifti", [22, 18, 16], [2.0, 2.5, 3.0]),
    ]
    codes = sorted(problem.code for problem in problems if not problem.ignored)
    assert codes == ["GAP", "GZIP", "NOTHU"]
    assert all(problem.case_id for problem in problems if problem.code in codes)
    assert CANARY not in repr(rows) + repr(problems)
