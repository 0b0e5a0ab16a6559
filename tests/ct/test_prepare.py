"""Preparation end to end: real files through the real readers, killed, resumed, fanned out, and told apart."""

import ast
import dataclasses
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest
import SimpleITK as sitk  # noqa: N813

from dagman import files
from dagman.ct import case
from dagman.ct import prepare as prepare_module
from dagman.ct.index import index
from dagman.ct.prepare import PrepareConfig, prepare, prepare_volume
from dagman.ct.read import read, read_mask
from dagman.ct.store import MANIFEST, SETTINGS, PreparedStore
from dagman.errors import DagmanError, ExitCode
from dagman.types import Volume

LANDMARK_MM = np.array([12.0, -9.0, 21.0])


def phantom(seed=0, shape=(52, 44, 36), spacing_mm=(1.5, 1.5, 2.0)) -> Volume:
    """A lopsided body with a lung, a bone and a bright landmark, some noise, air around."""
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = (-38.0, -33.0, -15.0)
    x, y, z = affine[:3, :3] @ np.indices(shape).reshape(3, -1) + affine[:3, 3:]
    hu = np.random.default_rng(seed).normal(-1000, 8, x.shape)
    hu[(x / 30) ** 2 + (y / 25) ** 2 < 1] += 1040
    hu[((x + 12) / 9) ** 2 + (y / 12) ** 2 + ((z - 10) / 20) ** 2 < 1] = -800
    hu[((x - 5) ** 2 + (y - 14) ** 2 < 20) & (z < 30)] = 600
    hu[np.abs(np.stack([x, y, z]) - LANDMARK_MM[:, None]).max(axis=0) <= 2.6] = 2500
    return Volume(hu=hu.reshape(shape).astype(np.int16), affine=affine)


def save(path: Path, volume: Volume, order=(0, 1, 2), flips=()) -> Path:
    """Write NIfTI with its axes in another order and direction; the anatomy stays where it is."""
    image = nib.Nifti1Image(volume.hu, volume.affine)
    directions = [[axis, -1 if axis in flips else 1] for axis in range(3)]
    orientation = np.array([directions[axis] for axis in np.argsort(order)])
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image.as_reoriented(orientation), path)
    return path


def sources(folder: Path) -> Path:
    """Three scans, one with a mask, named in a CSV."""
    lines = ["case_id,image,mask,patient,label"]
    for number, name in enumerate("abc"):
        volume = phantom(number)
        save(folder / f"{name}.nii.gz", volume)
        lines.append(f"case_{name},{name}.nii.gz,{'b_mask.nii.gz' if name == 'b' else ''},p{number},{number % 2}")
    save(folder / "b_mask.nii.gz", Volume(hu=(phantom(1).hu > 2000).astype(np.int16), affine=phantom(1).affine))
    (folder / "scans.csv").write_text("\n".join(lines) + "\n")
    return folder / "scans.csv"


def content(store: Path) -> dict[str, str]:
    """Everything a store holds, without `seconds`; leftovers would show up."""
    found = {}
    for path in sorted(store.rglob("*")):
        if path.is_dir() or path.name in {".lock", ".done.jsonl"}:
            continue
        data = path.read_bytes()
        if path.name == "manifest.jsonl":
            rows = [json.loads(line) for line in data.splitlines()]
            assert all(row.pop("seconds") > 0 for row in rows)
            data = json.dumps(rows).encode()
        found[str(path.relative_to(store))] = hashlib.sha256(data).hexdigest()
    return found


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def whole(table, tmp_path_factory) -> Path:
    """The store of an undisturbed run."""
    output = tmp_path_factory.mktemp("whole") / "store"
    summary = prepare([table], output, workers=1)
    assert (summary.stored, summary.rejected, summary.exit_code) == (3, 0, ExitCode.OK)
    return output


# What is stored -----------------------------------------------------------------------------------------------------


def test_a_row_says_what_was_stored_and_where_it_came_from(table, whole):
    store = PreparedStore(whole)
    store.verify()
    row = store.rows[1]
    image = nib.load(table.parent / "b.nii.gz")
    assert (row["case_id"], row["patient"], row["label"], row["split"]) == ("case_b", "p1", "1", None)
    assert row["source"] == "b.nii.gz"
    assert row["source_sha256"] == hashlib.sha256((table.parent / "b.nii.gz").read_bytes()).hexdigest()
    assert row["source_shape"] == list(image.shape)
    np.testing.assert_allclose(row["source_spacing_mm"], image.header.get_zooms(), atol=1e-5)
    np.testing.assert_allclose(row["source_affine"], image.affine, atol=1e-5)
    hu = store.hu(1)
    assert row["shape"] == list(hu.shape)
    assert row["spacing_mm"] == [2.0, 2.0, 2.0]
    for share, value in row["hu_percentiles"].items():
        assert value == np.percentile(hu, int(share), method="inverted_cdf")
    mask = store.mask(1)
    assert mask.shape == hu.shape
    assert row["mask"]["voxels"] == {"1": int(mask.sum())}
    own = nib.load(index([table])[0][1].mask)
    there = own.affine @ [*np.argwhere(np.asarray(own.dataobj)).mean(axis=0), 1]
    np.testing.assert_allclose(np.array(row["affine"]) @ [*row["mask"]["centroid"], 1], there, atol=1e-4)
    assert (hu[mask == 1] > 1000).all()
    np.testing.assert_array_equal(store.drawn(1), read_mask(table.parent / "b_mask.nii.gz").hu)
    assert store.drawn(0) is None
    assert store.rows[0]["mask"] is None
    # Patients' and labels' columns are all that is taken from a table.
    assert "case_id,image" not in (whole / "manifest.jsonl").read_text()


def test_what_tasks_prepare_in_memory_is_what_is_stored(table, whole):
    scan = index([table])[0][1]
    volume = read(scan)
    prepared = prepare_volume(volume, PrepareConfig(), read_mask(scan.mask, volume).hu)
    store = PreparedStore(whole)
    np.testing.assert_array_equal(prepared.hu, store.hu(1))
    np.testing.assert_array_equal(prepared.mask, store.mask(1))
    np.testing.assert_allclose(prepared.affine, store.rows[1]["affine"], atol=1e-6)


def test_48_axis_orders_are_stored_equal_and_the_landmark_stays_in_place(tmp_path):
    volume = phantom(shape=(40, 36, 34), spacing_mm=(1.7, 1.5, 1.3))
    flips = [axes for count in range(4) for axes in itertools.combinations(range(3), count)]
    for number, (order, mirrored) in enumerate(itertools.product(itertools.permutations(range(3)), flips)):
        path = save(tmp_path / "in" / f"{number:02d}.nii", volume, order, mirrored)
        if number == 47:
            assert nib.load(path).affine.tolist() != volume.affine.tolist()
    summary = prepare([tmp_path / "in"], tmp_path / "out", workers=1)
    store = PreparedStore(tmp_path / "out")
    assert summary.stored == len(store) == 48
    assert len({row["voxel_sha256"] for row in store.rows}) == 1
    for row in store.rows:
        np.testing.assert_allclose(row["affine"], store.rows[0]["affine"], atol=1e-3)
    assert summary.duplicates == (tuple(row["case_id"] for row in store.rows),)
    hu = store.hu(0)
    bright = np.argwhere(hu > 1200)
    found = np.array(store.rows[0]["affine"]) @ [*bright.mean(axis=0), 1]
    assert np.abs(found[:3] - LANDMARK_MM).max() <= 1.0


def test_an_oblique_scan_keeps_its_rotation_and_its_place(tmp_path):
    volume, angle = phantom(), np.deg2rad(17)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    save(tmp_path / "in" / "oblique.nii.gz", Volume(hu=volume.hu, affine=turn @ volume.affine))
    prepare([tmp_path / "in"], tmp_path / "out", workers=1)
    store = PreparedStore(tmp_path / "out")
    affine = np.array(store.rows[0]["affine"])
    np.testing.assert_allclose(affine[:3, :3] / 2, turn[:3, :3], atol=1e-5)
    found = affine @ [*np.argwhere(store.hu(0) > 1200).mean(axis=0), 1]
    assert np.abs(found - turn @ [*LANDMARK_MM, 1]).max() <= 1.0


def test_padding_below_air_is_air_and_is_counted():
    volume = phantom()
    hu = volume.hu.copy()
    hu[:4] = -3024
    prepared = prepare_volume(Volume(hu=hu, affine=volume.affine), PrepareConfig())
    assert prepared.clipped_ratio == pytest.approx(4 / 52, abs=0.01)
    assert prepared.hu.min() == -1024
    # The padding does not darken the tissue beside it.
    assert prepared.hu.max() > 1500


def test_a_label_too_small_for_the_grid_keeps_the_voxel_at_its_centre():
    volume = phantom(spacing_mm=(0.5, 0.5, 0.5))
    mask = np.zeros(volume.hu.shape, np.int16)
    mask[10:30, 10:30, 10:30] = 1
    mask[4, 4, 4] = 2
    prepared = prepare_volume(volume, PrepareConfig(), mask)
    assert prepared.tiny_labels == (2,)
    assert (prepared.mask == 1).sum() * 8 == 20**3 * 0.5**3
    found = prepared.affine @ [*np.argwhere(prepared.mask == 2)[0], 1]
    assert np.abs(found - volume.affine @ [4, 4, 4, 1]).max() <= 1.0, "within half a voxel"
    mask[5, 4, 4] = 3
    with pytest.raises(DagmanError, match=r"E-MASKLOST label 2: shares its only voxel"):
        prepare_volume(volume, PrepareConfig(), mask)


def test_the_crop_never_cuts_a_mask_off():
    volume = phantom()
    mask = np.zeros(volume.hu.shape, np.int16)
    mask[0:2, 0:2, 0:2] = 3
    mask[-2:, -2:, -2:] = 3
    prepared = prepare_volume(volume, PrepareConfig(), mask)
    assert prepared.mask[0, 0, 0] == prepared.mask[-1, -1, -1] == 3


@pytest.mark.parametrize("name", ["ct_corpus/rider_pilot_0117.nii.gz", "sts/STS_002_ct.nii.gz"])
def test_real_scans_agree_with_an_independent_resampling(real_data, tmp_path, name):
    """SimpleITK, asked for the stored grid in world coordinates, finds the stored HU within 1."""
    path = real_data / name
    prepare([path], tmp_path / "out", PrepareConfig(resampling="linear", storage="npy"), workers=1)
    store = PreparedStore(tmp_path / "out")
    affine, hu = np.array(store.rows[0]["affine"]), store.hu(0)
    lps = np.diag([-1.0, -1.0, 1.0])
    grid = sitk.Image([*hu.shape], sitk.sitkFloat32)
    grid.SetOrigin((lps @ affine[:3, 3]).tolist())
    grid.SetDirection((lps @ affine[:3, :3] / 2).ravel().tolist())
    grid.SetSpacing((2.0, 2.0, 2.0))
    image = sitk.Clamp(sitk.ReadImage(str(path)), sitk.sitkFloat32, -1024, 32767)
    independent = sitk.Resample(image, grid, sitk.Transform(), sitk.sitkLinear, -9999)
    expected = sitk.GetArrayFromImage(independent).transpose(2, 1, 0)
    known = expected > -5000
    assert known.mean() > 0.9
    assert np.abs(hu[known] - expected[known]).max() <= 1


# One bad scan never stops the others --------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_bad_scans_are_rejected_by_name_and_the_good_ones_stored(tmp_path):
    folder = tmp_path / "in"
    sources(folder)
    good = folder / "a.nii.gz"
    (folder / "cut.nii.gz").write_bytes(good.read_bytes()[:-2000])
    (folder / "page.nii").write_text("<!DOCTYPE html><html>not here</html>")
    save(folder / "same.nii.gz", Volume(hu=np.full((40, 40, 40), 7, np.int16), affine=np.diag([2.0, 2, 2, 1])))
    scans = folder / "scans.csv"
    scans.write_text(scans.read_text() + "cut,cut.nii.gz,,p3,\npage,page.nii,,p3,\nsame,same.nii.gz,,p3,\n")
    shifted = phantom(0)
    shifted.affine[0, 3] += 5
    shutil.copy(good, folder / "d.nii.gz")
    save(folder / "shifted_mask.nii.gz", Volume(hu=(shifted.hu > 2000).astype(np.int16), affine=shifted.affine))
    scans.write_text(scans.read_text() + "shifted,d.nii.gz,shifted_mask.nii.gz,p3,\n")
    before = tree(folder)
    told = []
    summary = prepare([scans], tmp_path / "out", workers=1, progress=lambda *args: told.append(args))
    assert tree(folder) == before
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {(row["source"], row["code"]) for row in rejected} >= {("cut.nii.gz", "GZIP"), ("same.nii.gz", "EMPTY")}
    assert {row["source"] for row in rejected} >= {"cut.nii.gz", "page.nii", "same.nii.gz"}
    assert "MASK" in summary.codes
    assert all(row["problem"] and row["advice"] for row in rejected)
    assert (summary.stored, summary.rejected, summary.exit_code) == (3, 4, ExitCode.REJECTED)
    assert len(PreparedStore(tmp_path / "out")) == 3
    assert told[-1][0] == told[-1][1]
    assert any("E-GZIP" in note for _, _, note in told)


def test_nothing_usable_is_said_so(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "page.nii").write_text("<!DOCTYPE html>")
    summary = prepare([tmp_path / "in"], tmp_path / "out", workers=1)
    assert summary.exit_code == ExitCode.NOTHING_USABLE
    assert sum(summary.codes.values()) == summary.rejected > 0
    assert len(PreparedStore(tmp_path / "out")) == 0


# Fan-out ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_workers():
    """Processes that see this test's environment, and nobody else's."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True, kill_workers=True)
    yield
    get_reusable_executor().shutdown(wait=True, kill_workers=True)


def test_two_workers_and_another_order_of_files_store_the_same(table, whole, tmp_path, fresh_workers):
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in sorted(table.parent.iterdir(), reverse=True):
        shutil.copy2(path, moved / path.name)
    prepare([moved / "scans.csv"], tmp_path / "out", workers=2)
    assert content(tmp_path / "out") == content(whole)


def test_a_case_that_ends_two_workers_is_rejected_and_costs_no_other(
    table, whole, tmp_path, fresh_workers, monkeypatch
):
    monkeypatch.setenv("DAGMAN_FAULT", "prepare.before_mask:1:kill")
    summary = prepare([table], tmp_path / "out", workers=2)
    assert (summary.stored, summary.codes) == (2, {"MEMORY": 1})
    row = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())
    assert row["case_id"] == "case_b"
    assert "ended its process twice" in row["problem"]
    monkeypatch.delenv("DAGMAN_FAULT")
    summary = prepare([table], tmp_path / "out", workers=1)
    assert (summary.stored, summary.already_there) == (1, 2)
    assert content(tmp_path / "out") == content(whole)


# Killed, and run again ----------------------------------------------------------------------------------------------

KILLS = [
    *[("file.before_fsync", visit) for visit in (2, 4)],
    *[("file.before_replace", visit) for visit in (1, 2, 3, 4, 5, 6, 7, 8)],
    *[("file.after_replace", visit) for visit in (1, 2, 5, 6, 8)],
    *[("log.before_fsync", visit) for visit in (1, 3)],
    *[("prepare.before_store", visit) for visit in (1, 3)],
    ("prepare.before_mask", 1),
    *[("prepare.before_journal", visit) for visit in (1, 2, 3)],
    *[("prepare.after_case", visit) for visit in (1, 3)],
    ("prepare.after_manifest", 1),
]


def killed(table: Path, output: Path, fault: str) -> int:
    """Prepare in a fork that a fault ends; how it ended."""
    child = os.fork()
    if child == 0:
        os.environ["DAGMAN_FAULT"] = fault
        try:
            prepare([table], output, workers=1)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check_finishes_as(whole: Path, table: Path, output: Path) -> None:
    """A second run takes what is finished, adds the rest, and ends as if nothing had happened."""
    if (output / "manifest.jsonl").exists():
        PreparedStore(output).verify()
    journal = output / ".done.jsonl"
    finished = {row["case_id"]: row for row in files.read_lines(journal)}
    times = {name: path.stat().st_mtime_ns for name in finished for path in output.glob(f"volumes/{name}.*")}
    summary = prepare([table], output, workers=1)
    assert summary.already_there == len(finished)
    assert summary.stored == 3 - len(finished)
    assert times == {name: path.stat().st_mtime_ns for name in finished for path in output.glob(f"volumes/{name}.*")}
    assert content(output) == content(whole)


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: f"{kill[0]}-{kill[1]}")
def test_killed_anywhere_a_second_run_ends_the_same(table, whole, tmp_path, kill):
    assert killed(table, tmp_path / "out", f"{kill[0]}:{kill[1]}:kill") == -signal.SIGKILL
    check_finishes_as(whole, table, tmp_path / "out")


def test_every_fault_point_of_preparation_is_in_the_kill_matrix():
    points = {
        node.args[0].value
        for module in (case, prepare_module)
        for node in ast.walk(ast.parse(Path(module.__file__).read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "fault_point"
    }
    assert points == {point for point, _ in KILLS if point.startswith("prepare.")}
    assert len(KILLS) >= 24


def test_killed_at_random_moments_a_last_run_ends_the_same(table, whole, tmp_path):
    draws = random.Random(0)
    for _ in range(5):
        child = os.fork()
        if child == 0:
            try:
                prepare([table], tmp_path / "out", workers=1)
            finally:
                os._exit(0)
        time.sleep(draws.uniform(0.05, 0.9))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    check_finishes_as(whole, table, tmp_path / "out")


def test_a_torn_journal_line_and_planted_leftovers_do_no_harm(table, whole, tmp_path):
    output = tmp_path / "out"
    killed(table, output, "prepare.after_case:2:kill")
    journal = output / ".done.jsonl"
    journal.write_bytes(journal.read_bytes()[:-40])
    for name in (".x.1.tmp.b2nd", "volumes/.case_c.9.tmp.b2nd", "volumes/other.b2nd", "masks/.y.2.tmp.b2nd"):
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_bytes(b"half")
    check_finishes_as(whole, table, output)


STOPPED = """
import sys
from pathlib import Path
from dagman.ct.prepare import prepare
from dagman.errors import DagmanError
if __name__ == "__main__":
    try:
        prepare([Path(sys.argv[1])], Path(sys.argv[2]), workers=2, progress=lambda *told: print(*told, flush=True))
    except DagmanError as error:
        print(error, file=sys.stderr)
        sys.exit(int(error.exit_code))
"""


def test_a_folder_without_scans_is_an_error_and_leaves_no_store(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("no scan")
    with pytest.raises(DagmanError, match=r"E-NODATA .*in: holds no scan") as caught:
        prepare([tmp_path / "in"], tmp_path / "out")
    assert caught.value.exit_code == ExitCode.NOTHING_USABLE
    assert not (tmp_path / "out" / "manifest.jsonl").exists()


def signalled(folder: Path, number: int) -> tuple[int, str]:
    """Prepare with two workers, send a signal after the first case; exit code and last words. No process may stay."""
    program = folder / "program.py"
    program.write_text(STOPPED)
    command = [sys.executable, str(program), str(folder / "in"), str(folder / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        before, now = (int(process.stdout.readline().split()[0]) for _ in range(2))
        assert before < now < 8
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2
        started = time.monotonic()
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert time.monotonic() - started < 10
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    return process.returncode, said


def test_sigkill_and_sigterm_end_every_worker_and_the_same_command_continues(tmp_path):
    for i in range(8):
        save(tmp_path / "in" / f"{i:02d}.nii", phantom(i, shape=(80, 70, 60)))
    code, _ = signalled(tmp_path, signal.SIGKILL)
    assert code == -signal.SIGKILL
    code, said = signalled(tmp_path, signal.SIGTERM)
    assert code == ExitCode.STOPPED
    assert said.startswith("E-STOPPED")
    assert "run the same command to continue" in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out" / "manifest.jsonl").exists()
    summary = prepare([tmp_path / "in"], tmp_path / "out", workers=1)
    assert 2 <= summary.already_there < 8
    assert summary.stored == 8 - summary.already_there
    PreparedStore(tmp_path / "out").verify()


CTRL_C = """
import os, signal, sys
from pathlib import Path
from dagman.ct.prepare import prepare
from dagman.errors import DagmanError
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
try:
    prepare([Path(sys.argv[1])], Path(sys.argv[2]), workers=1, progress=lambda *_: os.kill(os.getpid(), signal.SIGINT))
except DagmanError as error:
    sys.exit(error.exit_code)
"""


def test_ctrl_c_stops_one_worker_cleanly(table, whole, tmp_path):
    ended = subprocess.run([sys.executable, "-c", CTRL_C, str(table), str(tmp_path / "out")], check=False)
    assert ended.returncode == ExitCode.STOPPED
    check_finishes_as(whole, table, tmp_path / "out")


@pytest.mark.parametrize("fault", ["file.before_fsync:3", "log.before_fsync:2", "file.before_replace:6"])
def test_a_full_disk_stops_the_run_and_keeps_what_is_there(table, whole, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(files, "_faults_seen", {})
    monkeypatch.setenv("DAGMAN_FAULT", f"{fault}:enospc")
    with pytest.raises(DagmanError, match=r"E-DISK .*No space left") as caught:
        prepare([table], tmp_path / "out", workers=1)
    assert caught.value.exit_code == ExitCode.RESOURCES
    monkeypatch.delenv("DAGMAN_FAULT")
    prepare([table], tmp_path / "out", workers=1)
    assert content(tmp_path / "out") == content(whole)


def test_too_little_space_is_said_before_the_work(table, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100))
    with pytest.raises(DagmanError, match=r"E-DISK .*3 scans need") as caught:
        prepare([table], tmp_path / "out", workers=1)
    assert caught.value.exit_code == ExitCode.RESOURCES
    assert not (tmp_path / "out" / "volumes").exists()


# Run again on something else ----------------------------------------------------------------------------------------


@pytest.fixture
def mine(table, whole, tmp_path) -> tuple[Path, Path]:
    """A copy of sources and store to change."""
    shutil.copytree(table.parent, tmp_path / "in")
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "in" / "scans.csv", tmp_path / "out"


def test_sources_that_moved_are_already_there(mine, whole):
    summary = prepare([mine[0]], mine[1], workers=1)
    assert (summary.stored, summary.already_there) == (0, 3)
    assert content(mine[1]) == content(whole)


def test_a_changed_source_is_prepared_anew_and_only_it(mine, whole):
    scans, output = mine
    prepare([scans], output, workers=1)
    save(scans.parent / "a.nii.gz", phantom(7))
    summary = prepare([scans], output, workers=1)
    assert (summary.stored, summary.already_there) == (1, 2)
    store = PreparedStore(output)
    store.verify()
    before = {row["case_id"]: row["voxel_sha256"] for row in PreparedStore(whole).rows}
    changed = [row["case_id"] for row in store.rows if row["voxel_sha256"] != before[row["case_id"]]]
    assert changed == ["case_a"]


def test_a_source_that_became_unusable_leaves_the_store(mine):
    scans, output = mine
    prepare([scans], output, workers=1)
    (scans.parent / "b.nii.gz").write_bytes((scans.parent / "b.nii.gz").read_bytes()[:-3000])
    summary = prepare([scans], output, workers=1)
    assert (summary.stored, summary.already_there, summary.rejected) == (0, 2, 1)
    assert [row["case_id"] for row in PreparedStore(output).rows] == ["case_a", "case_c"]
    assert sorted(path.name for path in output.glob("*/*")) == ["case_a.b2nd", "case_c.b2nd"]


def test_a_changed_label_needs_no_reading(mine):
    scans, output = mine
    scans.write_text(scans.read_text().replace("p0,0", "p9,5"))
    summary = prepare([scans], output, workers=1)
    assert summary.stored == 0
    row = PreparedStore(output).rows[0]
    assert (row["patient"], row["label"]) == ("p9", "5")


def test_a_damaged_file_deleted_is_made_again_and_only_it(mine, whole):
    scans, output = mine
    prepare([scans], output, workers=1)
    PreparedStore(output).path(1, "masks").unlink()
    with pytest.raises(DagmanError, match=r"E-CHECKSUM .*case_b"):
        PreparedStore(output).verify()
    assert prepare([scans], output, workers=1).stored == 1
    assert content(output) == content(whole)


def test_new_sources_are_added_and_old_ones_kept(mine, tmp_path):
    _, output = mine
    save(tmp_path / "more" / "d.nii.gz", phantom(9))
    summary = prepare([tmp_path / "more"], output, workers=1)
    assert (summary.stored, summary.kept) == (1, 3)
    assert [row["case_id"] for row in PreparedStore(output).rows] == ["case_a", "case_b", "case_c", "d"]


def test_another_scan_of_the_same_name_is_refused_and_the_first_kept(mine, tmp_path):
    _, output = mine
    save(tmp_path / "more" / "case_a.nii.gz", phantom(9))
    summary = prepare([tmp_path / "more"], output, workers=1)
    assert summary.codes == {"DUPCASE": 1}
    PreparedStore(output).verify()
    assert len(PreparedStore(output)) == 3


def test_a_scan_that_has_another_name_now_is_in_the_store_once(tmp_path):
    save(tmp_path / "one" / "ct.nii.gz", phantom(1))
    save(tmp_path / "two" / "ct.nii.gz", phantom(2))
    output = tmp_path / "out"
    prepare([tmp_path / "one"], output, workers=1)
    assert [row["case_id"] for row in PreparedStore(output).rows] == ["ct"]
    summary = prepare([tmp_path / "one", tmp_path / "two"], output, workers=1)
    assert (summary.stored, summary.kept, summary.duplicates) == (2, 0, ())
    store = PreparedStore(output)
    store.verify()
    assert [row["case_id"] for row in store.rows] == ["one_ct", "two_ct"]
    assert len({row["voxel_sha256"] for row in store.rows}) == len(store) == 2
    assert [note for note in summary.notes if "was ct" in note] == [summary.notes[-1]]
    assert sorted(path.name for path in output.glob("volumes/*")) == [f"{row['case_id']}.b2nd" for row in store.rows]
    assert prepare([tmp_path / "one"], output, workers=1).kept == 1
    assert len({row["voxel_sha256"] for row in PreparedStore(output).rows}) == 2
    os.utime(tmp_path / "one" / "ct.nii.gz", (1e9, 1e9))
    assert prepare([tmp_path / "one", tmp_path / "two"], output, workers=1).duplicates == ()
    assert len(PreparedStore(output)) == 2


def test_a_scan_that_an_earlier_version_named_by_a_hash_is_in_the_store_once(tmp_path):
    save(tmp_path / "one" / "ct.nii.gz", phantom(1))
    save(tmp_path / "two" / "ct.nii.gz", phantom(2))
    output, both = tmp_path / "out", [tmp_path / "one", tmp_path / "two"]
    prepare(both, output, workers=1)
    old = {"one_ct": "ct-0123abcd", "two_ct": "ct-4567cdef"}
    for name in (prepare_module.JOURNAL, MANIFEST):
        text = (output / name).read_text()
        assert "folder" not in text, "people's names are in names of folders"
        (output / name).write_text(re.sub("one_ct|two_ct", lambda match: old[match[0]], text))
    for path in output.glob("volumes/*"):
        path.rename(path.with_name(path.name.replace(path.stem, old[path.stem])))
    assert prepare(both[:1], tmp_path / "out", workers=1).kept == 1
    assert prepare(both, output, workers=1).duplicates == ()
    assert [row["case_id"] for row in PreparedStore(output).rows] == ["one_ct", "two_ct"]


def test_names_that_hold_their_folders_name_are_taken_over_too(tmp_path):
    """`P1/P1_ct.nii.gz`, of two data sets."""
    for seed, place in enumerate(("one", "two")):
        save(tmp_path / place / "P1" / "P1_ct.nii.gz", phantom(seed))
    output, both = tmp_path / "out", [tmp_path / "one", tmp_path / "two"]
    prepare(both[:1], output, workers=1)
    assert [row["case_id"] for row in PreparedStore(output).rows] == ["P1_ct"]
    assert prepare(both, output, workers=1).duplicates == ()
    assert len(PreparedStore(output)) == 2


def test_a_stop_between_two_names_leaves_no_scan_twice(tmp_path):
    for seed, name in enumerate(("one", "two", "three")):
        save(tmp_path / name / "ct.nii.gz", phantom(seed))
    (tmp_path / "three" / "ct.nii.gz").rename(tmp_path / "three" / "third.nii.gz")
    output, both = tmp_path / "out", [tmp_path / "one", tmp_path / "two"]
    prepare(both[:1], output, workers=1)

    def stop(done, _total, _note):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(DagmanError, match="E-STOPPED"):
        prepare(both, output, workers=1, progress=stop)
    assert prepare([tmp_path / "three"], output, workers=1).duplicates == ()
    assert len(PreparedStore(output)) == 2
    assert prepare(both, output, workers=1).duplicates == ()
    store = PreparedStore(output)
    store.verify()
    assert len({row["voxel_sha256"] for row in store.rows}) == len(store) == 3


def test_a_name_that_a_table_gave_stays(mine):
    scans, output = mine
    summary = prepare([scans.parent / "a.nii.gz"], output, workers=1)
    assert (summary.stored, summary.kept) == (1, 3)
    assert summary.duplicates == (("a", "case_a"),)
    before = {row["case_id"]: row for row in PreparedStore(output).rows}
    assert (before["case_a"]["patient"], before["a"]["patient"]) == ("p0", None)


def test_a_scan_that_was_moved_is_made_anew_where_its_mask_is_another(tmp_path):
    """Of the same bytes it is not; names of labels are taken from what is given now."""

    def written(folder, label, names=("a", "b")):
        save(folder / "a.nii.gz", phantom())
        mask = np.zeros(phantom().hu.shape, np.uint8)
        mask[5:15, 5:15, 5:15] = label
        save(folder / "m.nii.gz", dataclasses.replace(phantom(), hu=mask))
        (folder / "t.csv").write_text("case_id,image,mask\nc,a.nii.gz,m.nii.gz\n")
        return folder / "t.csv"

    first, second = written(tmp_path / "v1", 1), written(tmp_path / "v2", 2)
    output = tmp_path / "out"
    assert prepare([first], output, workers=1).stored == 1
    assert prepare([written(tmp_path / "v3", 1)], output, workers=1).stored == 0
    assert prepare([second], output, workers=1).stored == 1
    assert set(PreparedStore(output).rows[0]["mask"]["voxels"]) == {"2"}
    assert prepare([second], output, workers=1).stored == 0
    assert prepare([tmp_path / "v2" / "a.nii.gz"], tmp_path / "bare", workers=1).stored == 1
    (tmp_path / "v2" / "t.csv").write_text("case_id,image,mask\na,a.nii.gz,m.nii.gz\n")
    assert prepare([second], tmp_path / "bare", workers=1).stored == 1
    assert set(PreparedStore(tmp_path / "bare").rows[0]["mask"]["voxels"]) == {"2"}


def test_a_mask_of_the_same_name_and_time_from_another_folder_is_another(tmp_path):
    save(tmp_path / "a.nii", phantom())
    for folder, label in (("r1", 1), ("r2", 2)):
        mask = np.zeros(phantom().hu.shape, np.uint8)
        mask[5:15, 5:15, 5:15] = label
        save(tmp_path / folder / "m.nii", dataclasses.replace(phantom(), hu=mask))
        os.utime(tmp_path / folder / "m.nii", (1e9, 1e9))
    for folder, label in (("r1", "1"), ("r2", "2")):
        (tmp_path / "t.csv").write_text(f"case_id,image,mask\nc,a.nii,{folder}/m.nii\n")
        assert prepare([tmp_path / "t.csv"], tmp_path / "out", workers=1).stored == 1
        assert set(PreparedStore(tmp_path / "out").rows[0]["mask"]["voxels"]) == {label}


def test_corrected_names_of_labels_reach_the_store(tmp_path):
    for folder, name in (("imagesTr", "c_0000.nii"), ("labelsTr", "c.nii")):
        hu = (
            phantom().hu
            if folder == "imagesTr"
            else np.pad(np.ones((9, 9, 9), np.uint8), [(0, n - 9) for n in phantom().hu.shape])
        )
        save(tmp_path / "Dataset001_X" / folder / name, dataclasses.replace(phantom(), hu=hu))
    for name in ("tumour", "liver"):
        told = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, name: 1},
            "numTraining": 1,
            "file_ending": ".nii",
        }
        (tmp_path / "Dataset001_X" / "dataset.json").write_text(json.dumps(told))
        prepare([tmp_path / "Dataset001_X"], tmp_path / "out", workers=1)
        assert PreparedStore(tmp_path / "out").rows[0]["mask"]["names"] == {"1": name}


def test_one_store_hashes_its_patients_with_one_key(real_data, tmp_path, monkeypatch):
    series = real_data / "dicom_series" / "lung_dx_A0002_B40f"
    output = tmp_path / "out"
    monkeypatch.setenv("DAGMAN_PATIENT_KEY", "secret")
    prepare([series], output, workers=1)
    assert "secret" not in (output / SETTINGS).read_text()
    key = json.loads((output / SETTINGS).read_text())["patient_key"]
    assert [row["patient_key"] for row in PreparedStore(output).rows] == [key]
    prepare([series], output, workers=1)
    monkeypatch.delenv("DAGMAN_PATIENT_KEY")
    with pytest.raises(DagmanError, match=r"E-SETTINGS .*another DAGMAN_PATIENT_KEY") as caught:
        prepare([series], output, workers=1)
    assert caught.value.exit_code == ExitCode.REFUSED
    assert len(PreparedStore(output)) == 1


def test_a_mistyped_source_leaves_nothing(tmp_path):
    with pytest.raises(DagmanError, match=r"E-GONE .*nowhere"):
        prepare([tmp_path / "nowhere"], tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()


def test_settings_of_a_store_without_any_case_bind_nobody(tmp_path):
    (tmp_path / "empty").mkdir()
    summary = prepare([tmp_path / "empty"], tmp_path / "prepared", PrepareConfig(spacing_mm=3.0), workers=1)
    assert summary.exit_code == ExitCode.NOTHING_USABLE
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bad.nii.gz").write_bytes(b"\x1f\x8b no")
    summary = prepare([tmp_path / "bad"], tmp_path / "prepared", PrepareConfig(spacing_mm=1.0), workers=1)
    assert (summary.stored, summary.rejected) == (0, 1)
    save(tmp_path / "scans" / "a.nii.gz", phantom())
    prepare([tmp_path / "scans"], tmp_path / "prepared", PrepareConfig(spacing_mm=2.5), workers=1)
    assert PreparedStore(tmp_path / "prepared").settings["spacing_mm"] == 2.5
    with pytest.raises(DagmanError, match="E-SETTINGS"):
        prepare([tmp_path / "scans"], tmp_path / "prepared", PrepareConfig(spacing_mm=2.0), workers=1)


@pytest.mark.parametrize("values", [{"spacing_mm": 1.5}, {"resampling": "linear"}, {"storage": "npy"}])
def test_other_settings_are_refused_with_the_difference(table, mine, values):
    (name, value), *_ = values.items()
    with pytest.raises(DagmanError, match=rf"E-SETTINGS .*{name}: .* -> {value}") as caught:
        prepare([table], mine[1], PrepareConfig(**values), workers=1)
    assert caught.value.exit_code == ExitCode.REFUSED


def test_the_second_preparer_is_told_who_holds_the_output(table, tmp_path):
    with files.folder_lock(tmp_path / "out"), pytest.raises(DagmanError, match=rf"E-LOCKED .*process {os.getpid()} on"):
        prepare([table], tmp_path / "out", workers=1)


def test_output_and_source_may_not_hold_each_other(table, tmp_path):
    for given, output in (([table.parent], table.parent / "out"), ([table], table.parent), ([tmp_path], tmp_path)):
        with pytest.raises(DagmanError, match="E-OUTPUT") as caught:
            prepare(given, output, workers=1)
        assert caught.value.exit_code == ExitCode.REFUSED


def test_a_source_that_changes_while_it_is_read_is_refused(table, tmp_path, monkeypatch):
    def changing(scan):
        volume = read(scan)
        os.utime(scan.files[0])
        return volume

    shutil.copytree(table.parent, tmp_path / "in")
    monkeypatch.setattr(case.read, "read", changing)
    summary = prepare([tmp_path / "in" / "scans.csv"], tmp_path / "out", workers=1)
    assert summary.codes == {"CHANGED": 3}
