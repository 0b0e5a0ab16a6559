"""What pretraining has seen is found by voxels and by patient, and said; what is not known is not called none."""

import dataclasses
from pathlib import Path

import pytest

import small_study
from dagman import files
from dagman.errors import DagmanError, ExitCode
from dagman.tasks import leakage
from dagman.types import Scan


def made(tmp_path, count=6):
    cases = {f"c{number}": small_study.case(number) for number in range(count)}
    return small_study.store(tmp_path, cases, patients={f"c{number}": f"p{number // 2}" for number in range(count)})


def test_two_planted_cases_and_their_patients_are_found(tmp_path):
    store = made(tmp_path)
    leakage.record([store.rows[0], store.rows[3]], tmp_path / "run")
    files.write_text(tmp_path / "run" / "weights" / "model.safetensors", "")
    for weights in (tmp_path / "run", tmp_path / "run" / "weights" / "model.safetensors"):
        seen = leakage.seen(store.rows, weights)
        assert seen == (True, {"c0": "voxels", "c1": "patient", "c2": "patient", "c3": "voxels"}, {}, True)
    report = leakage.report(seen, ["c1", "c3", "c5"])
    assert report["same_voxels"] == {"count": 1, "cases": ["c3"]}
    assert report["same_patient"] == {"count": 1, "cases": ["c1"]}
    assert "saw 1 of the 3 tested cases, and other CTs of the patients of 1 more (c3, c1)" in leakage.line(report)


def test_another_name_does_not_hide_the_same_voxels(tmp_path):
    store = made(tmp_path / "a", 2)
    leakage.record(store.rows[:1], tmp_path / "run")
    other = small_study.store(tmp_path / "b", {"new_name": small_study.case(0)}, patients={"new_name": "elsewhere"})
    assert leakage.seen(other.rows, tmp_path / "run").how == {"new_name": "voxels"}


def test_without_a_list_it_is_unknown_and_without_pretraining_none(tmp_path):
    store = made(tmp_path, 2)
    unknown = leakage.report(leakage.seen(store.rows, tmp_path / "weights.safetensors"), ["c0"])
    assert not unknown["known"]
    assert "unknown" in leakage.line(unknown)
    none = leakage.report(leakage.seen(store.rows, None), ["c0"])
    assert leakage.line(none) == "pretraining saw none of the 1 tested cases"


def test_weights_that_learnt_labels_of_a_study_cannot_be_tested_in_it(tmp_path):
    store = made(tmp_path)
    leakage.record(store.rows[:1], tmp_path / "run")
    leakage.record(store.rows[2:4], tmp_path / "tuned", task="classification", start=tmp_path / "run")
    seen = leakage.seen(store.rows, tmp_path / "tuned")
    assert seen.known
    assert seen.learnt == {"c2": ["classification"], "c3": ["classification"]}
    patients = {row["case_id"]: row["patient"] for row in store.rows}
    with pytest.raises(
        DagmanError, match=r"E-LEAK.*labels of 2 of its cases, or of their patients \(c2, c3\).*start from pretrained"
    ) as caught:
        leakage.refuse(seen, [], patients, "classification")
    assert caught.value.exit_code == ExitCode.REFUSED
    leakage.refuse(seen, [], patients, "segmentation")
    leakage.refuse(leakage.seen(store.rows, tmp_path / "run"), [], patients, "classification")
    assert "with labels of 2 of them" in leakage.line(leakage.report(seen, patients))


def test_what_a_head_learnt_its_encoder_did_not(tmp_path):
    store = made(tmp_path)
    leakage.record(store.rows[:1], tmp_path / "run")
    leakage.record(store.rows[2:4], tmp_path / "probe", task="classification", start=tmp_path / "run", head=True)
    alone, whole = (leakage.seen(store.rows, tmp_path / "probe", head=head) for head in (False, True))
    assert (alone.how, alone.learnt) == (leakage.seen(store.rows, tmp_path / "run").how, {})
    assert set(whole.learnt) == {"c2", "c3"}
    leakage.record([], tmp_path / "tuned", start=tmp_path / "probe")
    assert leakage.seen(store.rows, tmp_path / "tuned", head=True).learnt == {}


def test_scans_are_known_by_their_files(tmp_path):
    store = made(tmp_path, 2)
    scans = [
        Scan(case_id="other_name", files=(tmp_path / "raw" / "c0.nii.gz",), kind="nifti", patient="new"),
        Scan(case_id="again", files=(tmp_path / "raw" / "c0.nii.gz",), kind="nifti", patient=store.rows[1]["patient"]),
    ]
    leakage.record(store.rows[:1], tmp_path / "run")
    found = leakage.seen(leakage.scan_rows(scans), tmp_path / "run")
    assert found.how == {"other_name": "voxels", "again": "voxels"}
    leakage.record(store.rows[1:], tmp_path / "run")
    assert leakage.seen(leakage.scan_rows(scans), tmp_path / "run").how == {"again": "patient"}
    (tmp_path / "raw" / "c0.nii.gz").unlink()
    gone = leakage.scan_rows(scans)
    assert [row["source_sha256"] for row in gone] == [None, None]
    assert leakage.seen(gone, tmp_path / "run").how == {"again": "patient"}


def test_what_started_from_weights_without_a_list_is_not_known(tmp_path):
    store = made(tmp_path, 2)
    leakage.record(store.rows, tmp_path / "tuned", task="classification", start=tmp_path / "weights.safetensors")
    seen = leakage.seen(store.rows, tmp_path / "tuned")
    assert not seen.known
    assert set(seen.learnt) == {"c0", "c1"}


def test_one_ct_under_two_patients_is_refused(tmp_path):
    cases = {name: small_study.case(number) for name, number in {"a": 0, "again": 0, "b": 1}.items()}
    store = small_study.store(tmp_path, cases, patients={"a": "p0", "again": "elsewhere", "b": "p1"})
    same = leakage.twins(store)
    assert same == [["a", "again"]]
    nothing = leakage.seen(store.rows, None)
    with pytest.raises(DagmanError, match=r"E-LEAK.*1 CTs stand in it under several names.* \(a, again\)"):
        leakage.refuse(nothing, same, {row["case_id"]: row["patient"] for row in store.rows}, "classification")
    leakage.refuse(nothing, same, {"a": "p0", "again": "p0", "b": "p1"}, "classification")
    leakage.refuse(nothing, same, {"a": "p0", "b": "p1"}, "classification")


def test_a_list_elsewhere_is_not_that_of_a_folder_of_weights(tmp_path):
    store = made(tmp_path, 2)
    leakage.record(store.rows, tmp_path / "run")
    (tmp_path / "run" / "study" / "fold-0").mkdir(parents=True)
    assert not leakage.seen(store.rows, tmp_path / "run" / "study" / "fold-0").known


def test_the_list_of_a_run_is_that_of_the_weights_in_it(tmp_path, monkeypatch):
    store = made(tmp_path, 2)
    leakage.record(store.rows, tmp_path / "run")
    file = tmp_path / "run" / "weights" / "model.safetensors"
    file.parent.mkdir()
    file.touch()
    monkeypatch.chdir(file.parent)
    for weights in (tmp_path / "run", file.parent, file, Path(), Path(file.name)):
        assert leakage.seen(store.rows, weights).known


def test_rows_without_hash_or_patient_match_nothing(tmp_path):
    store = made(tmp_path, 2)
    plain = [
        {name: row[name] for name in row if name not in ("voxel_sha256", "source_sha256", "patient")}
        for row in store.rows
    ]
    store.rows = plain
    leakage.record(store.rows, tmp_path / "run")
    assert leakage.seen(store.rows, tmp_path / "run").how == {}
    assert dataclasses.asdict(small_study.PREPARATION)["crop"] == (32, 32, 64)


@pytest.mark.parametrize("patient", [None, "0123456789ab"], ids=["none", "a hash of DICOM"])
def test_patients_that_cannot_tell_are_not_called_none(tmp_path, patient):
    store = made(tmp_path, 2)
    leakage.record([{"case_id": "other", "patient": patient, "voxel_sha256": "ff"}], tmp_path / "run")
    report = leakage.report(leakage.seen(store.rows, tmp_path / "run"), ["c0"])
    assert report["known"]
    assert not report["patients_known"]
    assert "saw none of the 1 tested cases; whether it saw other CTs of their patients is unknown" in leakage.line(
        report
    )


@pytest.mark.parametrize(
    ("theirs", "known"),
    [
        (["11111111"], True),
        (["22222222"], False),
        ([None], True),
        (["11111111", None], True),
        (["11111111", "22222222"], False),
        ([None, "22222222"], False),
        (["11111111", "a name"], False),
    ],
)
def test_patients_hashed_with_another_key_cannot_be_told(tmp_path, theirs, known):
    store = made(tmp_path, 2)
    store.rows = [
        {**row, "patient": f"0123456789a{row['patient'][-1]}", "patient_key": "11111111"} for row in store.rows
    ]
    other = {"case_id": "other", "patient": "ffffffffffff", "voxel_sha256": "ff"}
    rows = [other | ({"patient": key} if key == "a name" else {"patient_key": key}) for key in theirs]
    leakage.record(rows, tmp_path / "run")
    assert leakage.seen(store.rows, tmp_path / "run").patients_known is known


def test_labels_learnt_in_another_preparation_or_of_another_ct_of_the_patient_are_told(tmp_path):
    store = made(tmp_path, 6)
    again = [{**store.rows[0], "voxel_sha256": "resampled otherwise", "source_sha256": "a"}]
    store.rows[0]["source_sha256"] = "a"
    leakage.record(again, tmp_path / "tuned", task="classification")
    seen = leakage.seen(store.rows, tmp_path / "tuned")
    assert seen.how == {"c0": "voxels", "c1": "patient"}
    assert seen.learnt == {"c0": ["classification"], "c1": ["classification"]}
    patients = {row["case_id"]: row["patient"] for row in store.rows}
    with pytest.raises(
        DagmanError,
        match=r"of 2 of its cases, or of their patients \(1 by the name of the patient\) \(c0, c1\).*rename patients",
    ):
        leakage.refuse(seen, [], patients, "classification")
    del patients["c0"]
    with pytest.raises(DagmanError, match=r"\(1 by the name of the patient\) \(c1\)"):
        leakage.refuse(seen, [], patients, "classification")
    assert "with labels of 1 of them" in leakage.line(leakage.report(seen, ["c1"]))


def test_results_together_have_seen_what_any_has_seen():
    voxels, patient = leakage.VOXELS, leakage.PATIENT
    one = leakage.report(leakage.Seen(True, {"a": voxels, "b": patient}, {}), "abcd")
    other = leakage.report(leakage.Seen(True, {"b": voxels, "c": patient}, {"c": ["classification"]}), "abcd")
    found = leakage.together([one, other], "abcd")
    assert found["same_voxels"] == {"count": 2, "cases": ["a", "b"]}
    assert found["same_patient"] == {"count": 1, "cases": ["c"]}
    assert found["same_labels"] == {"count": 1, "cases": ["c"]}
    assert (found["known"], found["patients_known"], found["tested"]) == (True, True, 4)
    assert leakage.line(found).startswith("pretraining saw 2 of the 4 tested cases, and other CTs of the patients of 1")
    assert not leakage.together([one, None], "abcd")["known"]


def test_reports_of_earlier_versions_are_not_taken_for_less_than_they_say():
    old = {"known": True, "tested": 9, **{f"same_{word}": {"count": 0, "cases": []} for word in ("patient", "labels")}}
    old["same_voxels"] = {"count": 7, "cases": ["a", "b"]}  # the list was cut short, patients were not compared
    found = leakage.together([old, old], "abcdefghi")
    assert found["same_voxels"] == {"count": 7, "cases": ["a", "b"]}
    assert (found["known"], found["patients_known"]) == (True, False)
