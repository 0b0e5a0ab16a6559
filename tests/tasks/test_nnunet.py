"""The folder that nnU-Net is given: its own documented shape, our folds, and its predictions come back."""

import json
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

import small_study
from dagman.cli import run
from dagman.ct import read as ct
from dagman.ct.index import index
from dagman.errors import DagmanError
from dagman.tasks import matching, nnunet, study
from dagman.tasks.protocol import Protocol


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nnunet")
    cases = {f"c{number}": small_study.case(number, radius=5, labels=2) for number in range(6)}
    patients = {f"c{number}": f"p{number // 2}" for number in range(6)}
    turned = np.diag([-2.0, 2.0, -2.5, 1.0])
    table = small_study.write_cases(folder / "raw", cases, patients=patients, affine=turned)
    assert run(["prepare", "-i", str(table), "-o", str(folder / "store")]) == 0
    return folder


@pytest.fixture
def series_with_structures(tmp_path):
    """A DICOM series, and an RTSTRUCT of two boxes drawn on it."""
    sys.path.append(str(Path(__file__).parents[1] / "corpus"))
    sys.path.append(str(Path(__file__).parents[1] / "ct"))
    import make_corpus
    import test_segments

    (tmp_path / "series").mkdir()
    for k, data in enumerate(make_corpus.slices()):
        make_corpus.save(data, tmp_path / "series" / f"{k:02d}.dcm")
    [scan] = index([tmp_path / "series"])[0]
    path = test_segments.rtstruct(tmp_path / "rt.dcm", ct.read(scan), test_segments.TWO)
    return tmp_path / "series", path


def read(path):
    image = nibabel.load(path)
    return np.asarray(image.dataobj), image.affine


@pytest.mark.parametrize("kind", ["store", "raw/cases.csv"])
def test_it_has_the_documented_shape(source, tmp_path, kind, capsys):
    command = ["segment", "export-nnunet", "-i", str(source / kind), "-o", str(tmp_path / "nnUNet_raw")]
    assert run([*command, "--number", "7", "--name", "BALLS", "--labels", "dark=2"]) == 0
    assert "nnUNetv2_plan_and_preprocess -d 7" in capsys.readouterr().err
    folder = tmp_path / "nnUNet_raw" / "Dataset007_BALLS"
    described = json.loads((folder / "dataset.json").read_text())
    assert described == {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "dark": 1},
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    names = [f"c{number}" for number in range(6)]
    assert sorted(path.name for path in (folder / "imagesTr").iterdir()) == [f"{name}_0000.nii.gz" for name in names]
    assert sorted(path.name for path in (folder / "labelsTr").iterdir()) == [f"{name}.nii.gz" for name in names]
    for name in names:
        image, place = read(folder / "imagesTr" / f"{name}_0000.nii.gz")
        labels, same = read(folder / "labelsTr" / f"{name}.nii.gz")
        assert image.shape == labels.shape
        assert np.array_equal(place, same)
        assert set(np.unique(labels)) == {0, 1}
        assert image[labels == 1].mean() < -80 < image[labels == 0].max()
    # nnU-Net keeps patients together only where its splits say so: ours do.
    splits = json.loads((folder / "splits_final.json").read_text())
    assert sorted(case for split in splits for case in split["val"]) == names
    for split in splits:
        assert sorted([*split["train"], *split["val"]]) == names
        assert not {int(case[1]) // 2 for case in split["train"]} & {int(case[1]) // 2 for case in split["val"]}


@pytest.fixture(scope="module")
def layouts(source):
    """The same cases as other tools keep them, each beside what its labels are called there."""
    names, called = [f"c{number}" for number in range(6)], {"0": "background", "1": "bright", "2": "dark"}
    pairs = [{"image": f"./{name}.nii.gz", "label": f"./masks/{name}.nii.gz"} for name in names]
    raw = source / "raw"
    (raw / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}, "labels": called, "training": pairs}))
    patients = [{**pair, "patient": f"p{number // 2}"} for number, pair in enumerate(pairs)]
    (raw / "list.json").write_text(json.dumps({"training": patients}))
    given = nnunet.export(raw / "cases.csv", source, number=99, labels="bright=1,dark=2")
    return {"msd": raw, "datalist": raw / "list.json", "csv": raw / "cases.csv", "nnunet": given}


@pytest.mark.parametrize("kind", ["msd", "datalist", "csv", "nnunet"])
def test_data_sets_go_to_nnunet_as_they_lie_and_its_predictions_are_scored_against_them(
    layouts, tmp_path, kind, capsys
):
    known = kind in ("datalist", "csv")
    command = ["segment", "export-nnunet", "-i", str(layouts[kind]), "-o", str(tmp_path)]
    assert run([*command, *([] if known else ["--group-by", "case"])]) == 0
    folder = tmp_path / "Dataset501_CT"
    named = ["bright", "dark"] if kind in ("msd", "nnunet") else ["label 1", "label 2"]
    assert json.loads((folder / "dataset.json").read_text())["labels"] == {"background": 0, named[0]: 1, named[1]: 2}
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 6
    # What nnUNetv2_predict leaves in its folder, beside its label maps.
    (folder / "labelsTr").rename(tmp_path / "predicted")
    for name in ("dataset.json", "plans.json", "predict_from_raw_data_args.json"):
        (tmp_path / "predicted" / name).write_text((folder / "dataset.json").read_text())
    command = ["segment", "score", "-i", str(tmp_path / "predicted"), "--reference", str(layouts[kind])]
    assert run([*command, "-o", str(tmp_path / "scores")]) == 0
    result = json.loads((tmp_path / "scores" / "result.json").read_text())
    assert (result["cases"], result["group_by"]) == (6, "patient" if known else "case")
    assert {name: found["all"]["dice"]["value"] for name, found in result["classes"].items()} == dict.fromkeys(named, 1)


def test_what_no_prediction_is_of_is_left_out_by_split(source, tmp_path, capsys):
    table = tmp_path / "cases.csv"
    rows = [line.split(",") for line in (source / "raw" / "cases.csv").read_text().splitlines()]
    moved = [
        [name, *(f"{source}/raw/{cell}" for cell in files), patient, "test" if name in ("c0", "c1") else "train"]
        for name, *files, patient in rows[1:]
    ]
    table.write_text("\n".join(",".join(row) for row in [[*rows[0], "split"], *moved]) + "\n")
    folder = nnunet.export(table, tmp_path, protocol=Protocol(split=True))
    command = ["segment", "score", "-i", str(folder / "labelsTs"), "-o", str(tmp_path / "scores")]
    for reference in (folder, table):
        assert run([*command, "--reference", str(reference)]) == 0
        assert "4 references of the split train are left out: no prediction is of that" in capsys.readouterr().err
        result = json.loads((tmp_path / "scores" / "result.json").read_text())
        assert (result["cases"], result["splits_without_prediction"]) == (2, {"train": 4})


def test_a_list_of_which_nothing_can_be_used_says_why(source, tmp_path):
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "gone.nii.gz", "label": "gone.nii.gz"}]}))
    with pytest.raises(DagmanError, match=r"E-LAYOUT.*training\[0\].*gone.nii.gz does not exist"):
        matching.score([source / "raw" / "masks"], tmp_path / "list.json")


@pytest.mark.parametrize("kind", ["store", "raw/cases.csv"])
def test_nnunets_own_check_passes(source, tmp_path, kind, capfd, monkeypatch):
    pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    folder = nnunet.export(source / kind, tmp_path)
    verify_dataset_integrity(str(folder), 1)
    told = capfd.readouterr().out
    assert "verify_dataset_integrity Done" in told
    assert not any(word in told.lower() for word in ("mismatch", "unexpected", "error:", "warning"))
    # It does look: a label that dataset.json does not name is found.
    image = nibabel.load(folder / "labelsTr" / "c0.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj) * 9, image.affine), folder / "labelsTr" / "c0.nii.gz")
    with pytest.raises(RuntimeError, match="unexpected labels"):
        verify_dataset_integrity(str(folder), 1)


def test_store_and_table_get_the_folds_of_segment_train(source, tmp_path):
    made = [
        nnunet.export(source / kind, tmp_path, number=number, labels="1")
        for number, kind in enumerate(("store", "raw/cases.csv"), 1)
    ]
    splits = [json.loads((folder / "splits_final.json").read_text()) for folder in made]
    from dagman import PreparedStore

    store = PreparedStore(source / "store")
    plan = study.study(store.folder, study.stored(store), labels="1")
    ours = [sorted(store.rows[row]["case_id"] for row in part.test) for part in study.parts(plan, Protocol())]
    assert splits[0] == splits[1]
    assert [split["val"] for split in splits[0]] == ours


def test_a_fraction_takes_the_patients_that_segment_train_takes(source, tmp_path):
    from dagman import PreparedStore

    few = Protocol(fraction=0.5)
    folder = nnunet.export(source / "store", tmp_path, number=7, labels="1", protocol=few)
    store = PreparedStore(source / "store")
    parts = study.parts(study.study(store.folder, study.stored(store), labels="1"), few)
    learnt = [sorted(store.rows[row]["case_id"] for row in (*part.train, *part.held_out)) for part in parts]
    assert [split["train"] for split in json.loads((folder / "splits_final.json").read_text())] == learnt
    assert all(len(cases) < len(store) / 2 for cases in learnt)


def test_voxels_of_a_table_stay_and_predictions_are_scored_by_patient(source, tmp_path):
    folder = nnunet.export(source / "raw" / "cases.csv", tmp_path)
    image, place = read(folder / "imagesTr" / "c3_0000.nii.gz")
    given, turned = read(source / "raw" / "c3.nii.gz")
    np.testing.assert_array_equal(image, given[::-1, :, ::-1])
    np.testing.assert_allclose((place @ [35, 0, 35, 1])[:3], turned[:3, 3], atol=1e-4)
    found = matching.score([folder / "labelsTr"], folder / "cases.csv")
    assert (found.group_by, len(found.scored)) == ("patient", 6)
    assert all(row.scores.dice == 1 for row in found.rows)
    # Its labels lie over the masks of the scans as well.
    assert all(row.scores.dice == 1 for row in matching.score([folder / "labelsTr"], source / "raw" / "masks").rows)


def test_test_cases_of_a_split_column_stay_where_nnunet_does_not_look(tmp_path, capsys):
    cases = {f"c{number}": small_study.case(number) for number in range(5)}
    table = small_study.write_cases(
        tmp_path / "raw", cases, split={name: "test" if name in ("c1", "c4") else "train" for name in cases}
    )
    command = ["segment", "export-nnunet", "-i", str(table), "-o", str(tmp_path), "--split"]
    assert run([*command, "--group-by", "case"]) == 0
    folder = tmp_path / "Dataset501_CT"
    assert f"nnUNetv2_predict -i {folder / 'imagesTs'}" in capsys.readouterr().err
    for part, names in {"Tr": ("c0", "c2", "c3"), "Ts": ("c1", "c4")}.items():
        assert sorted(path.name[:2] for path in (folder / f"images{part}").iterdir()) == [*names]
        assert sorted(path.name[:2] for path in (folder / f"labels{part}").iterdir()) == [*names]
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 3
    (split,) = json.loads((folder / "splits_final.json").read_text())
    assert sorted([*split["train"], *split["val"]]) == ["c0", "c2", "c3"]
    assert split["val"]
    # Patients were not said to be known, so none is made up.
    found = matching.score([folder / "labelsTs"], folder / "cases.csv")
    assert (found.group_by, sorted(found.scored), found.missing) == ("case", ["c1", "c4"], ())


def test_an_interrupted_export_does_not_block(source, tmp_path):
    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nnunet.export(source / "store", tmp_path, progress=stop)
    assert not (tmp_path / "Dataset501_CT").exists()
    folder = nnunet.export(source / "store", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_structures_of_a_table_are_read_with_their_ct(tmp_path, series_with_structures):
    table = tmp_path / "cases.csv"
    image, structures = series_with_structures
    rows = [f"c{number},{image},{structures}#{name},p{number}" for number, name in enumerate(("GTV-1", "Lung"))]
    table.write_text("\n".join(["case_id,image,mask,patient", *rows]) + "\n")
    folder = nnunet.export(table, tmp_path, protocol=Protocol(folds=2))
    found = matching.score([folder / "labelsTr"], table)
    assert [row.scores.dice for row in found.rows] == [1, 1]
    assert not found.rejected


def test_an_existing_data_set_is_left_alone(source, tmp_path):
    nnunet.export(source / "store", tmp_path)
    with pytest.raises(DagmanError, match="E-OUTPUT"):
        nnunet.export(source / "store", tmp_path)
