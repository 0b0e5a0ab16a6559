"""What pretraining has seen is found by voxels and by patient, and said; what is not known is not called none."""

import dataclasses

import small_study
from dagman import files
from dagman.tasks import leakage


def made(tmp_path, count=6):
    cases = {f"c{number}": small_study.case(number) for number in range(count)}
    return small_study.store(tmp_path, cases, patients={f"c{number}": f"p{number // 2}" for number in range(count)})


def test_two_planted_cases_and_their_patients_are_found(tmp_path):
    store = made(tmp_path)
    leakage.record(store, [0, 3], tmp_path / "run")
    files.write_text(tmp_path / "run" / "weights" / "model.safetensors", "")
    for weights in (tmp_path / "run", tmp_path / "run" / "weights" / "model.safetensors"):
        seen = leakage.seen(store, weights)
        assert seen == (True, {"c0": "voxels", "c1": "patient", "c2": "patient", "c3": "voxels"})
    report = leakage.report(seen, ["c1", "c3", "c5"])
    assert report["same_voxels"] == {"count": 1, "cases": ["c3"]}
    assert report["same_patient"] == {"count": 1, "cases": ["c1"]}
    assert "saw 1 of the 3 tested cases, and other CTs of the patients of 1 more (c3, c1)" in leakage.line(report)


def test_another_name_does_not_hide_the_same_voxels(tmp_path):
    store = made(tmp_path / "a", 2)
    leakage.record(store, [0], tmp_path / "run")
    other = small_study.store(tmp_path / "b", {"new_name": small_study.case(0)}, patients={"new_name": "elsewhere"})
    assert leakage.seen(other, tmp_path / "run").how == {"new_name": "voxels"}


def test_without_a_list_it_is_unknown_and_without_pretraining_none(tmp_path):
    store = made(tmp_path, 2)
    unknown = leakage.report(leakage.seen(store, tmp_path / "weights.safetensors"), ["c0"])
    assert not unknown["known"]
    assert "unknown" in leakage.line(unknown)
    none = leakage.report(leakage.seen(store, None), ["c0"])
    assert leakage.line(none) == "pretraining saw none of the 1 tested cases"


def test_rows_without_hash_or_patient_match_nothing(tmp_path):
    store = made(tmp_path, 2)
    plain = [{name: row[name] for name in row if name not in ("voxel_sha256", "patient")} for row in store.rows]
    store.rows = plain
    leakage.record(store, [0, 1], tmp_path / "run")
    assert leakage.seen(store, tmp_path / "run").how == {}
    assert dataclasses.asdict(small_study.PREPARATION)["crop"] == (32, 32, 64)
