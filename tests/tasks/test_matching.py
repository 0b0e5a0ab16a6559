"""Predictions of any tool meet their references by name, and only where both lie on one grid."""

import json

import nibabel
import numpy as np
import pytest
import SimpleITK

import small_study
from dagman.cli import run
from dagman.errors import DagmanError, ExitCode
from dagman.tasks import matching, segmentation_scores

AFFINE = np.diag([1.5, 1.5, 3.0, 1.0])
AFFINE[:3, 3] = (-20, 13, 700)
SHAPE = (40, 36, 20)
TRUTH = small_study.ball(SHAPE, (25, 15, 8), 5).astype(np.uint8)


def save(path, array=TRUTH, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def moved(**changes):
    affine = AFFINE.copy()
    for key, value in changes.items():
        affine[tuple(map(int, key[1:].split("_")))] = value
    return affine


@pytest.mark.parametrize("name", ["case_1", "case_1_seg", "case_1_pred", "CASE_1_mask"])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_names_match_without_suffixes_and_endings(tmp_path, name, suffix):
    save(tmp_path / "truth" / "case_1_gtv.nii.gz")
    save(tmp_path / "scratch.nii.gz")
    (tmp_path / "found").mkdir()
    SimpleITK.WriteImage(
        SimpleITK.ReadImage(str(tmp_path / "scratch.nii.gz")), str(tmp_path / "found" / (name + suffix))
    )
    found = matching.score([tmp_path / "found"], tmp_path / "truth")
    assert [row.scores.dice for row in found.rows] == [1.0]


ELSEWHERE = {
    "shape": (np.pad(TRUTH, [(0, 1), (0, 0), (0, 0)]), AFFINE, r"41 x 36 x 20 and 40 x 36 x 20 voxels"),
    "spacing": (TRUTH, moved(_0_0=1.6), r"voxels of 1.6 x 1.5 x 3 and 1.5 x 1.5 x 3 mm"),
    "origin": (TRUTH, moved(_2_3=701.8), r"corners lie 1.8 mm apart"),
    "direction": (
        TRUTH,
        AFFINE @ np.array([[0.996, -0.0872, 0, 0], [0.0872, 0.996, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        r"directions differ",
    ),
    "flip": (TRUTH, AFFINE @ np.diag([-1, 1, 1, 1]), r"apart \(moved or mirrored\)"),
}


@pytest.mark.parametrize("what", ELSEWHERE)
def test_what_lies_elsewhere_is_refused_by_name_and_the_rest_is_scored(tmp_path, capsys, what):
    array, affine, problem = ELSEWHERE[what]
    for name in ("a", "b"):
        save(tmp_path / "truth" / f"{name}.nii.gz")
    save(tmp_path / "found" / "a.nii.gz")
    save(tmp_path / "found" / "b.nii.gz", array, affine)
    command = ["segment", "score", "-i", str(tmp_path / "found"), "--reference", str(tmp_path / "truth")]
    assert run([*command, "-o", str(tmp_path / "out")]) == 3
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("E-MASK")]
    assert len(told) == 1
    assert "b.nii.gz" in told[0]
    import re

    assert re.search(problem, told[0])
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["cases"], len(result["not_scored"])) == (1, 1)


def test_the_same_place_in_another_order_of_axes_is_the_same(tmp_path):
    save(tmp_path / "truth" / "a.nii.gz")
    turned = AFFINE @ np.array([[-1, 0, 0, SHAPE[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    save(tmp_path / "found" / "a.nii.gz", TRUTH[::-1], turned)
    (row,) = matching.score([tmp_path / "found"], tmp_path / "truth").rows
    assert row.scores.dice == 1


def test_a_mirrored_prediction_is_suspected(tmp_path):
    save(tmp_path / "truth" / "a.nii.gz")
    save(tmp_path / "found" / "a.nii.gz", TRUTH[::-1])
    (row,) = matching.score([tmp_path / "found"], tmp_path / "truth").rows
    assert row.scores.dice < 0.1
    assert "left and right exchanged its Dice would be 1.00" in row.note


def test_a_missing_prediction_counts_as_missed_and_one_without_reference_is_told(tmp_path, capsys):
    for name in ("a", "b"):
        save(tmp_path / "truth" / f"{name}.nii.gz")
    for name in ("a", "c"):
        save(tmp_path / "found" / f"{name}.nii.gz")
    command = ["segment", "score", "-i", str(tmp_path / "found"), "--reference", str(tmp_path / "truth")]
    assert run([*command, "-o", str(tmp_path / "out")]) == 3
    told = capsys.readouterr().err
    words = (
        "1 reference has no prediction, such as b; what they hold counts as missed; mean Dice of the others: label 1 1"
    )
    assert words in told
    assert "1 prediction has no reference, such as c.nii.gz" in told
    assert "2 of 2 references were scored" in told
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["classes"]["label 1"]["states"] == {"both": 1, "neither": 0, "missed": 1, "invented": 0}
    assert result["classes"]["label 1"]["all"]["dice"]["value"] == 0.5
    assert result["without_prediction"] == ["b"]


def test_missing_predictions_alone_are_no_result(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / "truth" / f"{name}.nii.gz")
    save(tmp_path / "found" / "a.nii.gz", TRUTH, moved(_2_3=701.8))
    with pytest.raises(DagmanError, match=r"E-NODATA.*no prediction of 2 cases can be compared \(first: E-MASK"):
        matching.score([tmp_path / "found"], tmp_path / "truth")


def test_no_prediction_of_an_empty_reference_is_no_merit(tmp_path, capsys):
    for name, mask in {"a": TRUTH, "b": np.zeros_like(TRUTH)}.items():
        save(tmp_path / "truth" / f"{name}.nii.gz", mask)
    save(tmp_path / "found" / "a.nii.gz")
    found = matching.score([tmp_path / "found"], tmp_path / "truth")
    assert ([row.case_id for row in found.rows], found.missing) == (["a"], ("b",))
    command = ["segment", "score", "-i", str(tmp_path / "found"), "--reference", str(tmp_path / "truth")]
    assert run([*command, "-o", str(tmp_path / "out")]) == 3
    assert "1 of 2 references were scored" in capsys.readouterr().err


def test_pictures_bear_the_dice_that_their_cases_are_ranked_by(tmp_path, monkeypatch):
    for name, labels in {"a": (1, 2), "b": (1,), "c": (1,)}.items():
        truth = sum(label * small_study.ball(SHAPE, (12 * label, 15, 8), 5) for label in labels)
        save(tmp_path / "truth" / f"{name}.nii.gz", truth.astype(np.uint8))
        found = sum(label * small_study.ball(SHAPE, (12 * label + ord(name) % 3, 15, 8), 5) for label in labels)
        save(tmp_path / "found" / f"{name}.nii.gz", found.astype(np.uint8))
    scored = matching.score([tmp_path / "found"], tmp_path / "truth")
    drawn = []
    monkeypatch.setattr(matching.figure, "png", lambda scenes, *_: drawn.extend(scenes) or b"")
    matching.draw(scored, tmp_path)
    told = {scene.title.split(":")[0]: float(scene.title.split()[-1]) for scene in drawn}
    assert list(told) == segmentation_scores.ranked(scored.rows)
    assert sorted(told.values()) == list(told.values())
    for case, dice in told.items():
        rows = [row for row in scored.rows if row.case_id == case]
        assert dice == pytest.approx(segmentation_scores.mean_dice(rows), abs=6e-4)


def test_masks_of_a_single_slice_are_scored_and_drawn(tmp_path):
    for name in ("truth", "found"):
        save(tmp_path / name / "a.nii.gz", TRUTH[:, :, 8:9])
    scored = matching.score([tmp_path / "found"], tmp_path / "truth")
    assert matching.draw(scored, tmp_path).stat().st_size > 1000


def test_rows_of_a_table_that_cannot_be_used_are_named(tmp_path, capsys):
    table = small_study.write_cases(tmp_path / "raw", {f"c{number}": small_study.case(number) for number in range(2)})
    table.write_text(table.read_text() + "c2,c1.nii.gz,masks/gone.nii.gz,p\n")
    command = ["segment", "score", "-i", str(tmp_path / "raw" / "masks"), "--reference", str(table)]
    assert run([*command, "-o", str(tmp_path / "out")]) == 3
    told = capsys.readouterr().err
    assert "masks/gone.nii.gz does not exist" in told
    assert "2 of 3 references were scored" in told


def test_label_values_that_no_reference_holds_are_named(tmp_path, capsys):
    save(tmp_path / "truth" / "a.nii.gz")
    strange = TRUTH.copy()
    strange[0, 0, :2] = (7, 5)
    save(tmp_path / "found" / "a.nii.gz", strange)
    command = ["segment", "score", "-i", str(tmp_path / "found"), "--reference", str(tmp_path / "truth")]
    assert run([*command, "-o", str(tmp_path / "out")]) == 0
    assert "a: its prediction holds label 5, 7, which no reference does" in capsys.readouterr().err


def test_a_label_in_no_prediction_is_noted(tmp_path, capsys):
    two = TRUTH.copy()
    two[:, :, 8:] *= 2
    for name, found in {"a": TRUTH, "b": 0 * TRUTH}.items():
        save(tmp_path / "truth" / f"{name}.nii.gz", two)
        save(tmp_path / "found" / f"{name}.nii.gz", found)
    save(tmp_path / "truth" / "c.nii.gz", 3 * TRUTH)  # which has no prediction
    command = ["segment", "score", "-i", str(tmp_path / "found"), "--reference", str(tmp_path / "truth"), "-o"]
    assert run([*command, str(tmp_path / "out")]) == ExitCode.REJECTED
    note = "Note: in no prediction at all, but in references: label 2; where labels were joined, give --labels"
    assert note in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "result.json").read_text())["classes_in_no_prediction"] == ["label 2"]
    run([*command, str(tmp_path / "joined"), "--labels", "tumour=1+2"])
    assert "in no prediction at all" not in capsys.readouterr().err


def test_no_pair_at_all_and_two_files_of_one_case_are_refused(tmp_path):
    save(tmp_path / "truth" / "a.nii.gz")
    save(tmp_path / "found" / "z.nii.gz")
    with pytest.raises(DagmanError, match=r"E-NODATA.*z.nii.gz and a.nii.gz"):
        matching.score([tmp_path / "found"], tmp_path / "truth")
    save(tmp_path / "found" / "a.nii.gz")
    save(tmp_path / "found" / "a_seg.nii.gz")
    with pytest.raises(DagmanError, match="E-DUPCASE"):
        matching.score([tmp_path / "found"], tmp_path / "truth")


def test_a_table_gives_patients_and_the_ct_of_the_picture(tmp_path, capsys):
    cases = {f"c{number}": small_study.case(number) for number in range(4)}
    table = small_study.write_cases(tmp_path / "raw", cases, patients={"c0": "one", "c1": "one"})
    for name, (_, mask) in cases.items():
        save(tmp_path / "found" / f"{name}.nii.gz", np.roll(mask, 1, 0), np.diag([2.0, 2.0, 2.0, 1.0]))
    command = ["segment", "score", "-i", str(tmp_path / "found"), "--reference", str(table)]
    assert run([*command, "-o", str(tmp_path / "out")]) == 0
    assert "dice" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["cases"], result["patients"], result["group_by"], result["warning"]) == (4, 3, "patient", None)
    dice = result["classes"]["label 1"]["all"]["dice"]
    assert dice["low"] <= dice["value"] <= dice["high"]
    assert (tmp_path / "out" / "cases.png").stat().st_size > 10_000
    lines = (tmp_path / "out" / "cases.csv").read_text().splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("case_id,patient,class,state,dice,hd95_mm,nsd_2mm")


def test_without_patients_the_result_is_stamped(tmp_path):
    for number in range(3):
        save(tmp_path / "truth" / f"{number}.nii.gz")
        save(tmp_path / "found" / f"{number}.nii.gz", np.roll(TRUTH, number, 1))
    found = matching.score([tmp_path / "found"], tmp_path / "truth")
    result = segmentation_scores.summary(found.rows, group_by=found.group_by)
    assert result["patients"] is None
    assert "patients unknown" in result["warning"]


def test_labels_are_chosen_and_joined(tmp_path):
    two = TRUTH.copy()
    two[:, :, 8:] *= 2
    save(tmp_path / "truth" / "a.nii.gz", two)
    save(tmp_path / "found" / "a.nii.gz")
    rows = matching.score([tmp_path / "found"], tmp_path / "truth").rows
    assert [row.name for row in rows] == ["label 1", "label 2"]
    assert rows[1].scores.state == "missed"
    # One class of two labels: label 1 of the prediction is in it as well.
    (row,) = matching.score([tmp_path / "found"], tmp_path / "truth", labels="tumour=1+2").rows
    assert row.scores.dice == 1


def test_a_prediction_that_bears_the_name_of_one_case_is_of_no_other(tmp_path):
    cases = {name: small_study.case(number) for number, name in enumerate("bx")}
    raw = small_study.write_cases(tmp_path / "raw", cases).parent
    header, *rows = (raw / "cases.csv").read_text().splitlines()
    renamed = [",".join([name, *row.split(",")[1:]]) for name, row in zip("ab", rows, strict=True)]
    (raw / "other.csv").write_text("\n".join([header, *renamed]) + "\n")
    files_of_masks = [row.split(",")[header.split(",").index("mask")] for row in renamed]
    assert [name.partition(".")[0][-1] for name in files_of_masks] == ["b", "x"], "case a has the mask of file b"
    save(tmp_path / "found" / "b.nii.gz", cases["x"][1], np.diag([2.0, 2.0, 2.0, 1.0]))
    found = matching.score([tmp_path / "found"], raw / "other.csv")
    assert found.missing == ("a",)
    assert {row.case_id: row.scores.dice for row in found.rows} == {"a": 0.0, "b": 1.0}


def test_a_prediction_that_fits_two_cases_is_refused(tmp_path):
    for folder in ("one", "two"):
        save(tmp_path / folder / "tumour.nii.gz")
    save(tmp_path / "image.nii.gz")
    rows = [f"{folder},image.nii.gz,{folder}/tumour.nii.gz" for folder in ("one", "two")]
    (tmp_path / "cases.csv").write_text("\n".join(["case_id,image,mask", *rows]) + "\n")
    save(tmp_path / "found" / "tumour.nii.gz")
    with pytest.raises(DagmanError, match=r"E-DUPCASE.*fits 2 cases \(one, two\)"):
        matching.score([tmp_path / "found"], tmp_path / "cases.csv")


def test_a_prediction_may_bear_the_name_of_its_ct(tmp_path):
    cases = {name: small_study.case(number) for number, name in enumerate("bx")}
    table = small_study.write_cases(tmp_path / "raw", cases)
    table.write_text(table.read_text().replace("\nb,", "\nSTS_1,").replace("\nx,", "\nSTS_2,"))
    for name in "bx":
        save(tmp_path / "found" / f"{name}.nii.gz", cases[name][1], np.diag([2.0, 2.0, 2.0, 1.0]))
        (tmp_path / "raw" / "masks" / f"{name}.nii.gz").rename(tmp_path / "raw" / "masks" / f"drawn-{name}.nii.gz")
    table.write_text(table.read_text().replace("masks/", "masks/drawn-"))
    found = matching.score([tmp_path / "found"], table)
    assert {row.case_id: row.scores.dice for row in found.rows} == {"STS_1": 1.0, "STS_2": 1.0}


def test_a_prediction_named_after_a_ct_of_several_cases_is_of_none(tmp_path):
    cases = {"ct": small_study.case(0)}
    table = small_study.write_cases(tmp_path / "raw", cases)
    header, row = table.read_text().splitlines()
    save(tmp_path / "raw" / "masks" / "other.nii.gz", cases["ct"][1], np.diag([2.0, 2.0, 2.0, 1.0]))
    rows = [row.replace("ct,", "n1,", 1), row.replace("ct,", "n2,", 1).replace("masks/ct", "masks/other")]
    table.write_text("\n".join([header, *rows]) + "\n")
    for name in ("n1", "ct"):
        save(tmp_path / "found" / f"{name}.nii.gz", cases["ct"][1], np.diag([2.0, 2.0, 2.0, 1.0]))
    with pytest.raises(DagmanError, match=r"E-DUPCASE.*ct.nii.gz.*fits 2 cases \(n1, n2\)"):
        matching.score([tmp_path / "found"], table)


def test_a_prediction_named_as_its_case_is_of_it_whatever_the_name_ends_in(tmp_path):
    cases = {name: small_study.case(number) for number, name in enumerate(("left", "left_label", "right_seg"))}
    table = small_study.write_cases(tmp_path / "raw", cases)
    for name in cases:
        path = tmp_path / "raw" / "masks" / f"{name}.nii.gz"
        path.rename(path.with_name(f"drawn-{name[0]}{len(name)}.nii.gz"))
        table.write_text(table.read_text().replace(f"masks/{name}.nii.gz", f"masks/drawn-{name[0]}{len(name)}.nii.gz"))
        save(tmp_path / "found" / f"{name}.nii.gz", cases[name][1], np.diag([2.0, 2.0, 2.0, 1.0]))
    found = matching.score([tmp_path / "found"], table)
    assert (found.missing, found.unmatched) == ((), ())
    assert {row.case_id: row.scores.dice for row in found.rows} == dict.fromkeys(cases, 1.0)
    save(tmp_path / "found" / "right_seg_mask.nii.gz", cases["left"][1], np.diag([2.0, 2.0, 2.0, 1.0]))
    with pytest.raises(DagmanError, match=r"E-DUPCASE.*right_seg_mask.nii.gz.*are both of case right_seg"):
        matching.score([tmp_path / "found"], table)
