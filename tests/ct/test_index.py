"""Indexing: every source, every junk, names and patients, and nothing private kept."""

import csv
import os
import random
import re
import socket
import sys
import time
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from dagman.ct.index import index
from dagman.ct.read import read
from dagman.ct.survey import Problem
from dagman.errors import DagmanError

sys.path.append(str(Path(__file__).parents[1] / "corpus"))
import make_corpus
from make_corpus import AFFINE, CANARY, FILES, LAST_SLICE, PHANTOM_HU, SERIES


def rejected(problems: list[Problem]) -> list[str]:
    return sorted(problem.code for problem in problems if not problem.ignored)


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        FILES["good.mha" if name.endswith("mha") else "good.nii.gz"][1](path)


def series(folder: Path, uid: str, *, value: int = 0, patient: str = CANARY, prefix: str = "s") -> None:
    """A clean series of its own, all HU shifted by `value`."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, data in enumerate(make_corpus.slices()):
        data.SeriesInstanceUID = f"{make_corpus.UID}.{uid}"
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"{make_corpus.UID}.{uid}.{k}"
        data.PatientID = patient
        data.RescaleIntercept = -1024 + value
        make_corpus.save(data, folder / f"{prefix}{k:02d}")


def test_folder_with_everything_gives_every_scan_once(tmp_path: Path) -> None:
    write(tmp_path, "a.nii.gz", "sub/b.mha", "sub/deeper/c.nii.gz")
    series(tmp_path / "dicom", "5")
    (tmp_path / "thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" * 100)
    (tmp_path / "README.md").write_text("words")
    (tmp_path / "dicom" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "._a.nii.gz").write_bytes(b"resource fork")
    scans, problems = index([tmp_path])
    assert [(scan.kind, len(scan.files)) for scan in scans] == [("nifti", 1), ("mha", 1), ("nifti", 1), ("dicom", 16)]
    assert [scan.case_id for scan in scans][:3] == ["a", "b", "c"]
    assert re.fullmatch(r"ct-[0-9a-f]{10}", scans[3].case_id)
    assert rejected([p for p in problems if "DICOMDIR" not in p.source]) == []


def test_interleaved_series_are_never_mixed(tmp_path: Path) -> None:
    for value, uid in ((0, "5"), (30, "6"), (60, "7")):
        series(tmp_path / "x", uid, value=value, prefix=f"{uid}_")
    names = sorted((tmp_path / "x").iterdir())
    random.Random(0).shuffle(names)
    for number, path in enumerate(names):
        path.rename(path.with_name(f"IM{number:04d}"))
    scans, problems = index([tmp_path])
    assert rejected(problems) == []
    found = sorted(int(np.unique(read(scan).hu - PHANTOM_HU).item()) for scan in scans)
    assert found == [0, 30, 60]


def test_one_series_spread_over_folders_is_one_case(tmp_path: Path) -> None:
    series(tmp_path / "all", "5")
    for number, path in enumerate(sorted((tmp_path / "all").iterdir())):
        (tmp_path / "split" / str(number % 3)).mkdir(parents=True, exist_ok=True)
        path.rename(tmp_path / "split" / str(number % 3) / path.name)
    (scan,) = index([tmp_path])[0]
    assert np.array_equal(read(scan).hu, PHANTOM_HU)


def test_one_series_given_as_several_sources_is_one_case(tmp_path: Path) -> None:
    series(tmp_path / "all", "5")
    files = sorted((tmp_path / "all").iterdir())
    (scan,), problems = index(files)
    assert rejected(problems) == []
    assert np.array_equal(read(scan).hu, PHANTOM_HU)
    for number, path in enumerate(files):
        (tmp_path / str(number % 2)).mkdir(exist_ok=True)
        path.rename(tmp_path / str(number % 2) / path.name)
    (again,), _ = index([tmp_path / "0", tmp_path / "1"])
    assert again.case_id == scan.case_id
    assert np.array_equal(read(again).hu, PHANTOM_HU)


def test_series_without_uid_in_two_sources_are_two_cases(tmp_path: Path) -> None:
    for name, value in (("p1", 0), ("p2", 300)):
        series(tmp_path / name / "CT", "5", value=value, patient="")
        for path in (tmp_path / name / "CT").iterdir():
            data = pydicom.dcmread(path)
            del data.SeriesInstanceUID
            data.save_as(path)
    for sources in ([tmp_path / "p1" / "CT", tmp_path / "p2" / "CT"], [tmp_path]):
        scans, problems = index(sources)
        assert rejected(problems) == []
        assert [len(scan.files) for scan in scans] == [16, 16]
        assert len({scan.case_id for scan in scans}) == 2


def test_same_series_uid_of_two_patients_is_two_cases(tmp_path: Path) -> None:
    series(tmp_path / "a", "5", patient="one")
    series(tmp_path / "b", "5", patient="two")
    scans, _ = index([tmp_path])
    assert len({scan.case_id for scan in scans}) == len({scan.patient for scan in scans}) == len(scans) == 2


@pytest.mark.parametrize("ending", [".dcm", ""])
@pytest.mark.parametrize("ill", LAST_SLICE)
def test_a_series_whose_last_file_is_damaged_is_refused_not_shortened(tmp_path: Path, ill: str, ending: str) -> None:
    """A gap in the middle would be seen; here nothing but the file tells that a slice is missing."""
    SERIES["good"][1](tmp_path / "s")
    *_, last = sorted((tmp_path / "s").iterdir())
    last.write_bytes(LAST_SLICE[ill](last.read_bytes()))
    for path in (tmp_path / "s").iterdir():
        path.rename(path.with_suffix(ending))
    series(tmp_path / "other", "5", prefix="t")
    scans, problems = index([tmp_path])
    assert [scan.files[0].parent.name for scan in scans] == ["other"], "the rest goes on"
    (told,) = [problem for problem in problems if problem.code == "SLICE"]
    assert told.source == str(last.with_suffix(ending))
    assert "may be a slice of ct-" in told.problem


def flat(folder: Path, names: dict[str, list[str]]) -> None:
    """Series in one folder, each under the names given."""
    for number, (patient, given) in enumerate(names.items()):
        series(folder / "new", str(number + 5), patient=patient)
        for path, name in zip(sorted((folder / "new").iterdir()), given, strict=True):
            path.rename(folder / name)
    (folder / "new").rmdir()


@pytest.mark.parametrize(
    ("damaged", "kept"),
    [("IM000005", "bc"), ("IM000015", "c"), ("IM000047", "ab"), ("IM000048", "ab")],
    ids=["middle of a", "last of a or first of b", "last of c", "after c"],
)
def test_in_a_flat_folder_a_damaged_file_costs_the_series_beside_it(tmp_path: Path, damaged: str, kept: str) -> None:
    tmp_path.joinpath("x").mkdir()
    flat(tmp_path / "x", {who: [f"IM{place * 16 + k:06d}" for k in range(16)] for place, who in enumerate("abc")})
    patients = {scan.case_id: scan.patient for scan in index([tmp_path / "x"])[0]}
    wanted = [scan for scan in index([tmp_path / "x"])[0] if scan.files[0].name[2:] in {"000000", "000016", "000032"}]
    (tmp_path / "x" / damaged).write_bytes(b"")
    scans, _ = index([tmp_path / "x"])
    owners = dict(zip([scan.patient for scan in sorted(wanted, key=lambda scan: scan.files[0])], "abc", strict=True))
    assert sorted(owners[patients[scan.case_id]] for scan in scans) == sorted(kept)


@pytest.mark.parametrize(
    "name",
    ["A{:07X}", "{:08x}-ab12-4cde-9f01-0123456789ab", "1.2.840.{}", "P001_S1_{:04d}.dcm"],
    ids=["media", "uuid", "uid", "named"],
)
def test_a_last_slice_is_missed_however_files_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").mkdir()
    flat(tmp_path / "x", {"a": [name.format(k) for k in range(16)]})
    (tmp_path / "x" / name.format(15)).write_bytes(b"")
    assert index([tmp_path / "x"])[0] == []


def test_any_sign_in_a_name_can_be_sorted(tmp_path: Path) -> None:
    series(tmp_path / "s", "5")
    (tmp_path / "s" / "s1\u00b2").touch()
    assert len(index([tmp_path / "s"])[0]) == 1


def test_where_names_of_series_mix_a_damaged_file_may_be_of_any(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    flat(tmp_path / "x", {who: [f"IM{2 * k + place:03d}" for k in range(16)] for place, who in enumerate("ab")})
    (tmp_path / "x" / "IM032").write_bytes(b"")
    assert index([tmp_path / "x"])[0] == []


def test_a_link_to_a_slice_that_was_not_fetched_is_a_slice_that_is_missing(tmp_path: Path) -> None:
    series(tmp_path / "s", "5")
    (tmp_path / "s" / "s16").symlink_to(tmp_path / "elsewhere")
    scans, problems = index([tmp_path / "s"])
    assert scans == []
    assert "s16" in next(problem.source for problem in problems if problem.code == "SLICE")


def test_an_object_of_another_kind_without_series_costs_none(tmp_path: Path) -> None:
    series(tmp_path / "s", "5")
    other = make_corpus.one_slice(0)
    other.Modality = "MR"
    del other.SeriesInstanceUID
    make_corpus.save(other, tmp_path / "s" / "s16")
    assert len(index([tmp_path / "s"])[0]) == 1


def test_masks_of_totalsegmentator_beside_their_ct_are_no_scans(tmp_path: Path) -> None:
    for case in ("s0001", "s0002"):
        write(tmp_path / case, "ct.nii.gz", "segmentations/liver.nii.gz", "segmentations/spleen.nii.gz")
    scans, problems = index([tmp_path])
    assert sorted(scan.case_id for scan in scans) == ["s0001_ct", "s0002_ct"]
    assert rejected(problems) == []
    assert "2 entries are passed over (masks as TotalSegmentator writes them)" in problems[0].problem
    assert len(index([tmp_path / "s0001" / "segmentations"])[0]) == 2, "asked for by name"


def test_empty_files_of_other_names_cost_no_series(tmp_path: Path) -> None:
    series(tmp_path / "s", "5")
    for name in ("_SUCCESS", "VERSION", "done.txt"):
        (tmp_path / "s" / name).touch()
    (scan,), problems = index([tmp_path])
    assert len(scan.files) == 16
    assert rejected(problems) == []


def test_other_modalities_are_listed_once_with_counts(tmp_path: Path) -> None:
    series(tmp_path / "ct", "5")
    for name in ("mr", "pet", "rtdose", "secondary-capture"):
        SERIES[name][1](tmp_path / name)
    scans, problems = index([tmp_path])
    assert len(scans) == 1
    texts = sorted(p.problem for p in problems if p.code == "MODALITY")
    assert texts == [f"a series of 16 {name} objects, not CT" for name in ("MR", "OT", "PT", "RTDOSE")]


def test_localizers_are_left_out_and_counted(tmp_path: Path) -> None:
    SERIES["good-localizer"][1](tmp_path / "s")
    (scan,), problems = index([tmp_path])
    assert len(scan.files) == 16
    assert "1 localizer image is left out of a series of 17" in problems[0].problem
    assert problems[0].ignored


def test_result_does_not_depend_on_the_order_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "b/ct.nii.gz", "a/ct.nii.gz", "c.mha")
    series(tmp_path / "z", "5")
    series(tmp_path / "y", "6")
    expected = index([tmp_path])
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: sorted(listed(folder), key=lambda name: hash((name, "x"))))
    assert index([tmp_path]) == expected


def test_case_ids_are_unique_safe_and_the_same_elsewhere(tmp_path: Path) -> None:
    names = ["p1/ct.nii.gz", "p2/ct.nii.gz", "Case 1.nii.gz", "-rf.nii.gz", "ä.nii.gz", "x" * 230 + ".nii.gz"]
    hostile = ["<img src=x onerror=alert(1)>.nii.gz", "new\nline.nii.gz", "plain.nii.gz", "PLAIN.nii.gz", "%2e.nii.gz"]
    for place in ("one", "two"):
        write(tmp_path / place / "data", *names, *hostile)
        with (Path(os.fsdecode(os.fsencode(tmp_path / place / "data") + b"/\xff\xfe.nii.gz"))).open("wb") as stream:
            stream.write(make_corpus.packed())
    ids = [[scan.case_id for scan in index([tmp_path / place / "data"])[0]] for place in ("one", "two")]
    assert ids[0] == ids[1]
    assert len({case_id.lower() for case_id in ids[0]}) == len(ids[0]) == len(names) + len(hostile) + 1
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", case_id) for case_id in ids[0])
    for scan in index([tmp_path / "one"])[0]:
        assert np.array_equal(read(scan).hu, PHANTOM_HU)


def test_scans_of_one_name_take_that_of_their_folder(tmp_path: Path) -> None:
    write(tmp_path / "d", "pat1/ct.nii.gz", "pat2/CT.nii.gz", "pat3/one.nii.gz", "pat 4/ct.nii.gz", "ct.nii.gz")
    named = {scan.files[0].relative_to(tmp_path / "d").as_posix(): scan.case_id for scan in index([tmp_path / "d"])[0]}
    assert named.pop("pat 4/ct.nii.gz").startswith("ct-")
    expected = {"pat1/ct.nii.gz": "pat1_ct", "pat2/CT.nii.gz": "pat2_CT", "pat3/one.nii.gz": "one", "ct.nii.gz": "d_ct"}
    assert named == expected
    for sources in (["pat1/ct.nii.gz", "pat2"], ["pat2/CT.nii.gz", "pat1"], ["pat1", "pat2"]):
        scans, _ = index([tmp_path / "d" / source for source in sources])
        assert [scan.case_id for scan in scans] == ["pat1_ct", "pat2_CT"], "however they are given"
    assert [scan.case_id for scan in index([tmp_path / "d" / "pat1"])[0]] == ["ct"]


def test_where_folders_tell_nothing_apart_a_hash_does(tmp_path: Path) -> None:
    write(tmp_path, "a/p/ct.nii.gz", "b/p/ct.nii.gz", "q/ct.nii.gz", "r/ct.nii.gz", "r_ct.nii.gz")
    ids = sorted(scan.case_id for scan in index([tmp_path])[0])
    assert [re.sub("-[0-9a-f]{8}$", "-#", each) for each in ids] == ["ct-#", "ct-#", "ct-#", "q_ct", "r_ct-#"]
    (tmp_path / "t.csv").write_text("case_id,image\nQ_ct,r_ct.nii.gz\n")
    ids = [scan.case_id for scan in index([tmp_path / "t.csv", tmp_path / "q", tmp_path / "r"])[0]]
    assert (ids[0], ids[1][:3], ids[2]) == ("Q_ct", "ct-", "r_ct")


def test_links_pipes_and_devices_are_passed_over_quickly(tmp_path: Path) -> None:
    write(tmp_path, "a.nii.gz")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self.nii.gz").symlink_to("self.nii.gz")
    (tmp_path / "gone.nii.gz").symlink_to("nowhere")
    os.link(tmp_path / "a.nii.gz", tmp_path / "hard.nii.gz")
    (tmp_path / "soft.nii.gz").symlink_to("a.nii.gz")
    os.mkfifo(tmp_path / "pipe.nii.gz")
    (tmp_path / "zero.nii.gz").symlink_to("/dev/zero")
    (tmp_path / "random.nii").symlink_to("/dev/urandom")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(tmp_path)
        listener.bind("socket.nii")
        os.chdir(here)
        start = time.monotonic()
        scans, problems = index([tmp_path])
    assert time.monotonic() - start < 5
    assert [scan.case_id for scan in scans] == ["a"]
    reasons = {p.problem.split("(")[1].split(")")[0]: int(p.problem.split()[0]) for p in problems}
    assert reasons == {
        "already seen under another name": 3,
        "link to nothing or unreadable": 2,
        "no regular file": 4,
    }
    assert all(problem.ignored for problem in problems)


def test_pipe_as_a_source_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.nii")
    scans, problems = index([tmp_path / "pipe.nii"])
    assert scans == []
    assert rejected(problems) == ["SKIPPED"]


def test_overlapping_sources_give_a_scan_once(tmp_path: Path) -> None:
    write(tmp_path, "a.nii.gz", "b.nii.gz")
    assert len(index([tmp_path, tmp_path / "a.nii.gz", tmp_path])[0]) == 2


def test_missing_source_is_refused_and_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DagmanError, match=r"E-GONE .*nowhere"):
        index([tmp_path / "nowhere"])
    scans, (problem,) = index([tmp_path])
    assert not scans
    assert str(problem).startswith(f"E-NODATA {tmp_path}: holds no file")


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_dicomdir_and_tag_values_are_never_paths(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    series(outside, "9")
    inside = tmp_path / "in"
    series(inside, "5", patient="../../outside")
    directory = make_corpus.one_slice(0)
    directory.file_meta.MediaStorageSOPClassUID = directory.SOPClassUID = "1.2.840.10008.1.3.10"
    record = pydicom.Dataset()
    record.ReferencedFileID = ["..", "outside", "s00"]
    directory.DirectoryRecordSequence = [record]
    make_corpus.save(directory, inside / "DICOMDIR")
    (scan,), _ = index([inside])
    assert all(path.parent == inside for path in scan.files)


def test_deflated_bomb_costs_its_own_file_only(tmp_path: Path) -> None:
    write(tmp_path, "good.nii.gz")
    make_corpus.SERIES["good-deflated"][1](tmp_path / "s")
    file = tmp_path / "s" / "s003.dcm"
    head = file.read_bytes()[:1000]
    start = 132 + 12 + int.from_bytes(head[140:144], "little")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = [head[:start], packer.compress(b"\x09\0\x10\x10OB\0\0" + (3 << 28).to_bytes(4, "little"))]
    bomb += [packer.compress(bytes(1 << 26)) for _ in range(12)]
    file.write_bytes(b"".join([*bomb, packer.flush()]))
    assert file.stat().st_size < 1e6
    scans, problems = index([tmp_path])
    assert rejected(problems) == ["BOMB", "SLICE"]
    assert "s003.dcm" in next(p for p in problems if p.code == "BOMB").source
    assert "good" in [scan.case_id for scan in scans]


# -------------------------------------------------------------------------------------- patients and privacy


def test_patient_is_a_keyed_hash(tmp_path: Path) -> None:
    series(tmp_path / "a", "5", patient="P-1")
    series(tmp_path / "b", "6", patient="P-1 ")
    series(tmp_path / "c", "7", patient="P-2")
    series(tmp_path / "d", "8", patient="")
    by_folder = {scan.source.name: scan.patient for scan in index([tmp_path])[0]}
    other_key = {scan.source.name: scan.patient for scan in index([tmp_path], key="secret")[0]}
    assert by_folder["a"] == by_folder["b"] != by_folder["c"]
    assert by_folder["d"] is None
    assert re.fullmatch("[0-9a-f]{12}", by_folder["a"])
    assert by_folder["a"] != other_key["a"] == other_key["b"]


def test_no_text_of_a_header_leaves_the_reader(tmp_path: Path) -> None:
    """Every text tag holds the canary, also nested and private; so do a NIfTI's text fields."""
    for number, name in enumerate(["good", "gap-1", "mr", "good-localizer", "no-rescale", "truncated-slice"]):
        SERIES[name][1](tmp_path / name)
        for path in (tmp_path / name).iterdir():
            data = pydicom.dcmread(path)
            nested = pydicom.Dataset()
            nested.PatientName = nested.CodeMeaning = CANARY
            data.RequestAttributesSequence = [nested]
            for keyword in ("StationName", "ProtocolName", "ImageComments", "AccessionNumber", "StudyID"):
                setattr(data, keyword, CANARY)
            data.SeriesInstanceUID = f"{make_corpus.UID}.{number}"
            data.save_as(path)
    write(tmp_path, "a.nii.gz", "b.mha")
    (tmp_path / "bad.nii").write_bytes(make_corpus.nifti(dim_1=-1))
    assert CANARY.encode() in (tmp_path / "bad.nii").read_bytes()
    scans, problems = index([tmp_path])
    texts = repr(scans) + repr(problems)
    for scan in scans:
        try:
            texts += repr(read(scan).affine)
        except DagmanError as error:
            texts += str(error) + repr(error) + repr(error.__cause__) + repr(error.__context__)
    assert len(scans) >= 6
    for word in CANARY.split("^"):
        assert word not in texts


# ---------------------------------------------------------------------------------------------------- tables


def table(path: Path, rows: list[dict[str, str]]) -> Path:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_table_gives_files_folders_labels_masks_and_patients(tmp_path: Path) -> None:
    write(tmp_path, "images/a.nii.gz")
    series(tmp_path / "dicom" / "x", "5")
    nibabel.save(nibabel.Nifti1Image((PHANTOM_HU > 0).astype("u1"), AFFINE), tmp_path / "m.nii.gz")
    rows = [
        {
            "case_id": "one",
            "image": "images/a.nii.gz",
            "label": "1",
            "mask": "m.nii.gz",
            "split": "train",
            "patient": "7",
        },
        {"case_id": "two", "image": "dicom/x", "label": "", "mask": "", "split": "test", "patient": "8"},
    ]
    scans, problems = index([table(tmp_path / "t.csv", rows), tmp_path])
    assert rejected(problems) == []
    assert [(s.case_id, s.kind, s.label, s.split, s.patient) for s in scans] == [
        ("one", "nifti", "1", "train", "7"),
        ("two", "dicom", None, "test", "8"),
    ]
    assert scans[0].mask == tmp_path / "m.nii.gz"
    assert len(scans[1].files) == 16


def test_one_image_with_two_masks_is_two_cases_and_the_same_row_twice_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "ct.nii.gz", "nodule1.nii.gz", "nodule2.nii.gz")
    series(tmp_path / "dicom", "1.2.3")
    rows = [
        {"case_id": f"{image}-{number}", "image": image, "mask": f"nodule{number}.nii.gz"}
        for image in ("ct.nii.gz", "dicom")
        for number in (1, 2)
    ]
    scans, problems = index([table(tmp_path / "t.csv", [*rows, {**rows[0], "case_id": "again"}])])
    assert [scan.case_id for scan in scans] == ["ct.nii.gz-1", "ct.nii.gz-2", "dicom-1", "dicom-2"]
    assert [problem.problem for problem in problems] == ["image and mask are the same as in row 2 of t.csv"]


def test_ragged_rows_and_names_used_by_two_tables_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.nii.gz", "b.nii.gz")
    (tmp_path / "1.csv").write_text(
        "case_id,image,label,patient\nx,a.nii.gz,lung, left,P1\ny,b.nii.gz,m\nz,a.nii.gz,0,P\n"
    )
    (tmp_path / "2.csv").write_text(f"case_id,image\nz,b.nii.gz\nlong,{'n' * 300}.nii.gz\nq,b.nii.gz\n")
    scans, problems = index([tmp_path / "1.csv", tmp_path / "2.csv"])
    assert [scan.case_id for scan in scans] == ["q", "z"]
    assert [problem.problem for problem in problems] == [
        "holds more or fewer cells than the header",
        "holds more or fewer cells than the header",
        "case_id is the same as in row 4 of 1.csv",
        "names a path that cannot be looked at",
    ]


def test_every_bad_row_is_named_by_its_number(tmp_path: Path) -> None:
    write(tmp_path, "a.nii.gz", "b.nii.gz", "c.nii.gz", "d.nii.gz")
    series(tmp_path / "two", "5")
    series(tmp_path / "two", "6", prefix="t")
    (tmp_path / "none").mkdir()
    (tmp_path / "cut.nii.gz").write_bytes(make_corpus.packed()[:10])
    rows = [
        {"case_id": "good", "image": "a.nii.gz", "patient": "1"},
        {"case_id": "", "image": "b.nii.gz", "patient": "1"},
        {"case_id": "x3", "image": "", "patient": "1"},
        {"case_id": "good", "image": "c.nii.gz", "patient": "1"},
        {"case_id": "x5", "image": "a.nii.gz", "patient": "1"},
        {"case_id": "x6", "image": "missing.nii.gz", "patient": "1"},
        {"case_id": "../x7", "image": "d.nii.gz", "patient": "1"},
        {"case_id": "x8", "image": "two", "patient": "1"},
        {"case_id": "x9", "image": "none", "patient": "1"},
        {"case_id": "x10", "image": "d.nii.gz", "patient": ""},
        {"case_id": "x11", "image": "cut.nii.gz", "patient": "1"},
        {"case_id": "x12", "image": "b.nii.gz", "patient": "1", "mask": "nomask.nii.gz"},
    ]
    path = table(tmp_path / "t.csv", rows)
    scans, problems = index([path])
    assert [scan.case_id for scan in scans] == ["good"]
    numbers = [int(p.source.rpartition(":")[2]) for p in problems if p.code == "TABLE"]
    assert numbers == [3, 4, 5, 6, 7, 8, 9, 10, 11, 13]
    assert [p.source for p in problems if p.code == "FORMAT"] == [str(tmp_path / "cut.nii.gz")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "case_id\n1\n",
        "case_id;image\n1;2\n",
        "case_id,image,lable\n1,2,3\n",
        "case_id,image,labl\n1,2,3\n",
        "case_id,image,LABEL\n1,2,3\n",
        "case_id,image,age,patient_id\n1,2,3,4\n",
        "case_id,image,image\n1,2,3\n",
        "\xff\xfe",
    ],
)
def test_what_is_no_table_of_scans_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DagmanError, match=r"E-TABLE .*t.csv"):
        index([tmp_path / "t.csv"])


@pytest.mark.parametrize(("sign", "told"), [(";", "';'"), ("\t", "tabs")])
def test_a_table_with_other_separators_says_so(tmp_path: Path, sign: str, told: str) -> None:
    (tmp_path / "t.csv").write_text(f"case_id{sign}image\n1{sign}a.nii.gz\n", encoding="utf-8-sig")
    problem = rf"^E-TABLE .*t.csv: has its columns separated by {told}; save it comma-separated"
    with pytest.raises(DagmanError, match=problem):
        index([tmp_path / "t.csv"])


def test_other_columns_are_left_alone_and_noted(tmp_path: Path) -> None:
    """Also those of an index without a name, and one like a column that is there."""
    write(tmp_path, "a.nii.gz")
    (tmp_path / "t.csv").write_text(",case_id,image,patient,patient_id,age,note,\n0,q,a.nii.gz,P1,17,61,,\n")
    [scan], [note] = index([tmp_path / "t.csv"])
    assert (scan.case_id, scan.patient) == ("q", "P1")
    assert (note.code, note.ignored, note.told) == ("TABLE", True, True)
    assert note.problem == "5 columns are not used (one without a name, patient_id, age, note, one without a name)"


def test_two_tables_of_one_name_are_two_tables(tmp_path: Path) -> None:
    """Rows are told apart by where their table lies, and one image may stand in tables of two folders."""
    write(tmp_path, "site1/a.nii.gz", "site1/m.nii.gz", "site2/b.nii.gz", "site2/n.nii.gz")
    for site, image, mask in (("site1", "a", "m"), ("site2", "b", "n")):
        row = {"case_id": "case1", "image": f"{image}.nii.gz", "mask": f"{mask}.nii.gz"}
        table(tmp_path / site / "cases.csv", [row])
    scans, problems = index([tmp_path / site / "cases.csv" for site in ("site1", "site2")])
    assert [scan.files[0].name for scan in scans] == ["a.nii.gz"]
    told = f"case_id is the same as in row 2 of cases.csv ({tmp_path / 'site1'})"
    assert [problem.problem for problem in problems] == [told]
    row = {"case_id": "other", "image": "../site1/a.nii.gz", "mask": "n.nii.gz"}
    scans, problems = index([tmp_path / "site1" / "cases.csv", table(tmp_path / "site2" / "cases.csv", [row])])
    assert [scan.case_id for scan in scans] == ["case1", "other"]
    assert problems == []


def test_three_data_sets_of_one_name_keep_all_their_cases(tmp_path: Path) -> None:
    """Names do not depend on where the first two lie."""
    told = '{"channel_names": {"0": "CT"}, "labels": {"background": 0}, "numTraining": 1, "file_ending": ".nii.gz"}'
    for site in ("site1", "site2", "site3"):
        write(tmp_path / site / "Dataset001_X", "imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz")
        (tmp_path / site / "Dataset001_X" / "dataset.json").write_text(told)
    sources = [tmp_path / site / "Dataset001_X" for site in ("site1", "site2", "site3")]
    scans, problems = index(sources)
    assert problems == []
    assert len({scan.case_id for scan in scans}) == len(scans) == 3
    (tmp_path / "elsewhere").mkdir()
    moved = [path.parent.rename(tmp_path / "elsewhere" / path.parent.name) / path.name for path in sources]
    kept = {scan.case_id for scan in scans} & {scan.case_id for scan in index(moved)[0]}
    assert len(kept) == 2


def test_table_from_a_spreadsheet_with_byte_order_mark(tmp_path: Path) -> None:
    write(tmp_path, "a.nii.gz")
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfcase_id,image\r\nq,a.nii.gz\r\n,,\r\n")
    scans, problems = index([tmp_path / "t.csv"])
    assert [scan.case_id for scan in scans] == ["q"]
    assert problems == []


# ------------------------------------------------------------------------------------------------- real data


def test_real_tree_is_indexed_without_decoding(real_data: Path) -> None:
    scans, problems = index([real_data / "ct_corpus", real_data / "sts", real_data / "dicom_series"])
    kinds = [scan.kind for scan in scans]
    assert (kinds.count("nifti"), kinds.count("dicom")) == (92, 2)
    assert rejected(problems) == []
    assert [p.problem for p in problems if p.source.endswith("dicom_series")] == [
        "39 files are no scans (1 .csv, 38 .xml)"
    ]
