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
