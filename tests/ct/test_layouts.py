"""Data sets as they lie: nnU-Net, the Decathlon, MONAI datalists; each read, each broken in every way, and prepared."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from dagman.cli import run
from dagman.ct.index import index
from dagman.ct.prepare import PrepareConfig, prepare
from dagman.ct.store import PreparedStore

sys.path.append(str(Path(__file__).parents[1] / "corpus"))
from make_corpus import AFFINE, PHANTOM_HU

LABELS = (PHANTOM_HU > -500).astype(np.uint8) + 2 * (PHANTOM_HU > 300).astype(np.uint8)
NNUNET = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}


def image(path: Path, array: np.ndarray = PHANTOM_HU) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, AFFINE), path)


def nnunet(folder: Path, content: dict[str, Any] = NNUNET) -> Path:
    """Two training cases, one test case."""
    for number, name in enumerate(("lung_001", "lung_002")):
        image(folder / "imagesTr" / f"{name}_0000.nii.gz", PHANTOM_HU + np.int16(number))
        image(folder / "labelsTr" / f"{name}.nii.gz", LABELS)
    image(folder / "imagesTs" / "lung_003_0000.nii.gz", PHANTOM_HU + np.int16(5))
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def msd(folder: Path, *, suffix: str = "", **changes: Any) -> Path:
    nnunet(folder)
    for path in folder.glob("images*/*"):
        path.rename(path.with_name(path.name.replace("_0000", suffix)))
    pairs = [
        {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
        for name in ("lung_001", "lung_002")
    ]
    content = {"modality": {"0": "CT"}, "training": pairs, "test": ["./imagesTs/lung_003.nii.gz"], **changes}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def datalist(folder: Path, **lists: Any) -> Path:
    for name in ("a", "b", "c"):
        image(folder / "ct" / f"{name}.nii.gz")
        image(folder / "seg" / f"{name}.nii.gz", LABELS)
    path = folder / "list.json"
    path.write_text(json.dumps(lists))
    return path


def rows(*sources: Path) -> list[tuple[Any, ...]]:
    scans, problems = index(sources)
    assert [str(problem) for problem in problems if not problem.ignored] == []
    return [(scan.case_id, scan.files[0].name, scan.mask and scan.mask.name, scan.split, scan.label) for scan in scans]


def lost(*sources: Path) -> tuple[list[str], list[str]]:
    """Cases that are used, and what is said of the others."""
    scans, problems = index(sources)
    return [scan.case_id for scan in scans], [str(problem) for problem in problems if not problem.ignored]


def test_nnunet_folder(tmp_path: Path) -> None:
    assert rows(nnunet(tmp_path / "Dataset007_Lung")) == [
        ("lung_001", "lung_001_0000.nii.gz", "lung_001.nii.gz", "train", None),
        ("lung_002", "lung_002_0000.nii.gz", "lung_002.nii.gz", "train", None),
        ("lung_003", "lung_003_0000.nii.gz", None, "test", None),
    ]


def test_nnunet_test_labels_are_masks_where_they_are_given(tmp_path: Path) -> None:
    image(nnunet(tmp_path) / "labelsTs" / "lung_003.nii.gz", LABELS)
    assert rows(tmp_path)[2] == ("lung_003", "lung_003_0000.nii.gz", "lung_003.nii.gz", "test", None)


def test_decathlon_folder(tmp_path: Path) -> None:
    assert rows(msd(tmp_path / "Task06_Lung")) == [
        ("lung_001", "lung_001.nii.gz", "lung_001.nii.gz", "train", None),
        ("lung_002", "lung_002.nii.gz", "lung_002.nii.gz", "train", None),
        ("lung_003", "lung_003.nii.gz", None, "test", None),
    ]


def test_old_nnunet_task_lists_cases_without_their_channel(tmp_path: Path) -> None:
    found = rows(msd(tmp_path / "Task506_Lung", suffix="_0000"))
    assert [row[:3] for row in found[:1]] == [("lung_001", "lung_001_0000.nii.gz", "lung_001.nii.gz")]
    assert len(found) == 3


def test_a_folder_of_data_sets_beside_loose_scans(tmp_path: Path) -> None:
    nnunet(tmp_path / "Dataset001_A")
    msd(tmp_path / "Dataset002_B")
    image(tmp_path / "loose.nii.gz", PHANTOM_HU + np.int16(9))
    found = rows(tmp_path)
    assert len(found) == 7
    assert len({row[0] for row in found}) == 7
    assert sum(row[2] is not None for row in found) == 4


def test_the_json_itself_is_the_same_source(tmp_path: Path) -> None:
    assert rows(nnunet(tmp_path) / "dataset.json") == rows(tmp_path)


def test_datalist_with_masks_classes_words_and_folds(tmp_path: Path) -> None:
    source = datalist(
        tmp_path,
        training=[
            {"image": "ct/a.nii.gz", "label": "seg/a.nii.gz", "fold": 3, "patient": 12},
            {"image": ["ct/b.nii.gz"], "label": 1.0},
        ],
        validation=[{"image": "ct/c.nii.gz", "label": "benign"}],
    )
    assert rows(source) == [
        ("a", "a.nii.gz", "a.nii.gz", "fold-3", None),
        ("b", "b.nii.gz", None, "train", "1"),
        ("c", "c.nii.gz", None, "validation", "benign"),
    ]
    assert [scan.patient for scan in index([source])[0]] == ["12", None, None]


def test_an_item_may_have_a_class_and_a_mask(tmp_path: Path) -> None:
    items = [{"image": "ct/a.nii.gz", "label": 1, "mask": "seg/a.nii.gz"}, {"image": "ct/b.nii.gz", "label": 0}]
    source = datalist(tmp_path, training=items)
    assert rows(source) == [
        ("a", "a.nii.gz", "a.nii.gz", "train", "1"),
        ("b", "b.nii.gz", None, "train", "0"),
    ]


def test_keys_that_are_not_used_are_noted_and_near_ones_refused(tmp_path: Path) -> None:
    item = {"image": "ct/a.nii.gz", "label": 1}
    source = datalist(tmp_path, training=[item | {"spacing": 1}], test=[{"image": "ct/b.nii.gz", "age": 3}])
    scans, problems = index([source])
    assert [scan.case_id for scan in scans] == ["a", "b"]
    assert [(problem.ignored, problem.problem) for problem in problems] == [
        (True, "2 keys of its items are not used (spacing, age)")
    ]
    of_both = [item | {"folder": "a"}, {"image": "ct/b.nii.gz", "label": ["seg/b.nii.gz"], "mask": "seg/a.nii.gz"}]
    scans, problems = index([datalist(tmp_path, training=of_both)])
    assert [scan.mask and scan.mask.name for scan in scans] == [None, "b.nii.gz"]
    assert [problem.problem for problem in problems] == [
        "2 keys of its items are not used (folder, mask beside a label that is a file)"
    ]
    for key, like in (("patient_id", "patient"), ("Mask", "mask"), ("folds", "fold")):
        cases, told = lost(datalist(tmp_path, training=[item | {key: "x"}]))
        assert cases == []
        assert len(told) == 1
        assert f"has items with {key}, which is nearly {like}; name it {like}" in told[0]


def test_a_label_that_names_structures_of_a_file_is_a_mask(tmp_path: Path) -> None:
    """Without a slash in it: the ending stands in front of the names. That file does not exist."""
    _, problems = lost(datalist(tmp_path, training=[{"image": "ct/a.nii.gz", "label": "rt.dcm#GTV-1|Lung"}]))
    assert len(problems) == 1
    assert "rt.dcm does not exist" in problems[0]


def test_cases_listed_by_name_are_refused_by_name(tmp_path: Path) -> None:
    """nnU-Net's second version reads them in place of its folders."""
    named = {"dataset": {"k": {"images": ["a.nii.gz"], "label": "b.nii.gz"}}}
    for folder in (tmp_path / "one", tmp_path / "two"):
        nnunet(folder, {**NNUNET, **named})
    shutil.rmtree(tmp_path / "two" / "imagesTr")
    for folder in (tmp_path / "one", tmp_path / "two"):
        cases, problems = lost(folder)
        assert cases == []
        assert len(problems) == 1
        assert "lists its cases under dataset, by name" in problems[0]


def test_other_things_called_dataset_are_no_list_of_cases(tmp_path: Path) -> None:
    source = datalist(tmp_path, dataset={"name": "x", "version": 1}, training=[{"image": "ct/a.nii.gz"}])
    assert [row[0] for row in rows(source)] == ["a"]
    image(tmp_path / "loose" / "b.nii.gz")
    (tmp_path / "loose" / "dataset.json").write_text(json.dumps({"dataset": {"name": "x", "url": "y"}}))
    assert [row[0] for row in rows(tmp_path / "loose")] == ["b"]


def test_one_image_with_two_masks_is_two_cases_and_equal_stems_stay_apart(tmp_path: Path) -> None:
    image(tmp_path / "other" / "a.nii.gz", PHANTOM_HU + np.int16(1))
    names = [("ct/a.nii.gz", "seg/a.nii.gz"), ("ct/a.nii.gz", "seg/b.nii.gz"), ("other/a.nii.gz", "seg/c.nii.gz")]
    found = rows(datalist(tmp_path, training=[{"image": one, "label": mask} for one, mask in names]))
    assert len({row[0] for row in found}) == 3
    assert all(row[0].startswith("a-") for row in found)
    assert sorted(row[2] for row in found) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]


def test_a_datalist_may_lead_out_of_its_folder_as_a_table_may(tmp_path: Path) -> None:
    datalist(tmp_path)
    (tmp_path / "lists").mkdir()
    source = tmp_path / "lists" / "x.json"
    source.write_text(json.dumps({"training": [{"image": "../ct/a.nii.gz"}, {"image": str(tmp_path / "ct/b.nii.gz")}]}))
    assert [row[0] for row in rows(source)] == ["a", "b"]


@pytest.mark.parametrize("path", ["../secret.nii.gz", "imagesTr/../../secret.nii.gz", "{}/secret.nii.gz"])
def test_a_downloaded_list_may_not(tmp_path: Path, path: str) -> None:
    image(tmp_path / "secret.nii.gz")
    pair = {"image": path.format(tmp_path)}
    cases, problems = lost(msd(tmp_path / "set", training=[pair]))
    assert cases == ["lung_003"]
    assert len(problems) == 1
    assert "E-LAYOUT" in problems[0]
    assert "leads out" in problems[0]


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (7, "is no item"),
        ({}, "names no image"),
        ({"image": ["ct/a.nii.gz", "ct/b.nii.gz"]}, "has 2 images"),
        ({"image": "ct/none.nii.gz"}, "does not exist"),
        ({"image": "ct/a.nii.gz", "label": "seg/none.nii.gz"}, "does not exist"),
        ({"image": "ct/a.nii.gz", "label": "seg/"}, "is no file"),
        ({"image": "ct/a.nii.gz", "label": [1, 0]}, "neither a number nor a word"),
        ({"image": "ct/a.nii.gz", "label": True}, "neither a number nor a word"),
        ({"image": "ct/a.nii.gz", "fold": {}}, "fold"),
        ({"image": "x" * 5000 + ".nii.gz"}, "cannot be looked at"),
        ({"image": "seg"}, "holds 3 scans"),
        ({"image": "ct/b.nii.gz"}, "the same as in training[0] of list.json"),
    ],
)
def test_a_bad_item_is_named_and_the_others_are_used(tmp_path: Path, item: Any, words: str) -> None:
    cases, problems = lost(datalist(tmp_path, training=[{"image": "ct/b.nii.gz"}, item]))
    assert [case.partition("-")[0] for case in cases] == ["b"]
    assert len(problems) == 1
    assert "list.json:training[1]" in problems[0]
    assert words in problems[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 10**6, "cannot be read as JSON"),
        ("[1]", "is no JSON object"),
        ('{"a": 1}', "none of the keys"),
        ('{"training": {}, "test": []}', "no list under training"),
    ],
)
def test_a_damaged_list_is_one_problem(tmp_path: Path, text: str, words: str) -> None:
    source = datalist(tmp_path)
    source.write_text(text)
    cases, problems = lost(source, tmp_path / "ct")
    assert len(cases) == 3
    assert len(problems) == 1
    assert words in problems[0]


def test_more_than_one_channel_is_refused_by_name(tmp_path: Path) -> None:
    content = {**NNUNET, "channel_names": {"0": "CT", "1": "PET"}}
    assert lost(nnunet(tmp_path, content))[0] == []
    assert "declares 2 channels (CT, PET)" in lost(tmp_path)[1][0]


def test_a_case_with_an_undeclared_channel_is_left_out_alone(tmp_path: Path) -> None:
    image(nnunet(tmp_path) / "imagesTr" / "lung_002_0001.nii.gz")
    cases, problems = lost(tmp_path)
    assert cases == ["lung_001", "lung_003"]
    assert len(problems) == 1
    assert "imagesTr/lung_002" in problems[0]


def test_other_modalities_and_endings_are_refused(tmp_path: Path) -> None:
    assert "E-MODALITY" in lost(msd(tmp_path / "heart", modality={"0": "MRI"}))[1][0]
    assert ".png" in lost(nnunet(tmp_path / "png", {**NNUNET, "file_ending": ".png"}))[1][0]


def test_a_dataset_json_of_another_kind_stands_among_the_files(tmp_path: Path) -> None:
    image(tmp_path / "a.nii.gz")
    (tmp_path / "dataset.json").write_text('{"name": "mine"}')
    assert [row[0] for row in rows(tmp_path)] == ["a"]


def test_a_missing_label_map_is_a_problem_of_its_case(tmp_path: Path) -> None:
    (nnunet(tmp_path) / "labelsTr" / "lung_001.nii.gz").unlink()
    cases, problems = lost(tmp_path)
    assert cases == ["lung_002", "lung_003"]
    assert "labelsTr/lung_001.nii.gz does not exist" in problems[0]


def test_a_pipe_is_no_mask(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.nii.gz")
    cases, problems = lost(datalist(tmp_path, training=[{"image": "ct/a.nii.gz", "label": "pipe.nii.gz"}]))
    assert cases == []
    assert "is no file" in problems[0]


@pytest.mark.parametrize("make", [nnunet, msd])
def test_prepare_keeps_label_maps_and_splits(tmp_path: Path, make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source = make(tmp_path / "Dataset001_Lung")
    assert run(["check", str(source)]) == 0
    assert "3 scans can be used; 0 problems" in capsys.readouterr().err
    assert run(["prepare", "-i", str(source), "-o", str(tmp_path / "store"), "--workers", "1"]) == 0
    store = PreparedStore(tmp_path / "store")
    assert [row["split"] for row in store.rows] == ["train", "train", "test"]
    assert [sorted(row["mask"]["voxels"]) if row["mask"] else None for row in store.rows] == [["1", "3"]] * 2 + [None]


def test_prepare_takes_a_datalist_and_says_what_is_wrong(tmp_path: Path) -> None:
    source = datalist(
        tmp_path, training=[{"image": "ct/a.nii.gz", "label": 0}], validation=[{"image": "ct/none.nii.gz", "label": 1}]
    )
    output = tmp_path / "store"
    assert run(["prepare", "-i", str(source), "-o", str(output), "--workers", "1"]) == 3
    assert [(row["case_id"], row["label"], row["split"]) for row in PreparedStore(output).rows] == [("a", "0", "train")]
    assert '"code": "LAYOUT"' in (output / "rejected.jsonl").read_text()


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({"background": 0, "liver": 1, "ignore": 0}, {"1": "liver"}),
        ({"background": "0", "liver": "1"}, {"1": "liver"}),
        ({"0": "background", "1": "liver", "2": "tumour"}, {"1": "liver", "2": "tumour"}),
        ("none", None),
    ],
)
def test_labels_keep_their_names_in_the_store(tmp_path: Path, labels: Any, names: dict[str, str] | None) -> None:
    folder = nnunet(tmp_path / "data", {**NNUNET, "labels": labels})
    prepare([folder], tmp_path / "store", PrepareConfig(storage="npy"))
    masks = [row["mask"] for row in PreparedStore(tmp_path / "store").rows]
    assert [mask and mask.get("names") for mask in masks] == [names, names, None]


def test_regions_are_said_to_be_not_used_and_their_numbers_are_classes(tmp_path: Path) -> None:
    folder = nnunet(tmp_path / "data", {**NNUNET, "labels": {"background": 0, "whole": [1, 2], "core": 2}})
    scans, [problem] = index([folder])
    assert problem.ignored
    assert problem.told
    assert "whole=1+2" in problem.problem
    assert [scan.label_names for scan in scans] == [((2, "core"),)] * len(scans)


@pytest.mark.parametrize("make", [nnunet, msd])
@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"background": 0, "liver": 1, "ignore": 3}, "a label to ignore (3)"),
        ({"background": "0", "liver": "1", "Ignore": "255"}, "a label to ignore (255)"),
        ({"0": "background", "1": "liver", "3": "ignore"}, "a label to ignore (3)"),
    ],
)
def test_a_label_to_ignore_is_refused_before_its_masks_are_read(
    tmp_path: Path, make: Any, labels: dict[str, Any], words: str
) -> None:
    """Not as a class without name; nor are label maps taken for scans where the data set lies in a folder."""
    folder = make(tmp_path / "Dataset001_Lung")
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "labels": labels}))
    for source in (folder, tmp_path):
        cases, [problem] = lost(source)
        assert cases == []
        assert problem.startswith(f"E-LAYOUT {folder / 'dataset.json'}: declares {words}, which is not supported")
        assert "drop the entry" in problem
    assert len(index([folder / "imagesTr"])[0]) == 2
