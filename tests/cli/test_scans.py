"""The verbs about scans and stores, as a user calls them."""

import json

import nibabel
import numpy as np

from dagman.cli import run
from dagman.ct.prepare import prepare


def save(path, seed=0):
    hu = np.full((40, 36, 34), -1000, np.int16)
    hu[4:-4, 4:-4, 3:-3] = 30 + np.random.default_rng(seed).integers(-40, 40, (32, 28, 28))
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(hu, np.diag([2.0, 2.0, 2.0, 1.0])), path)


def test_what_is_rightly_passed_over_is_a_note(tmp_path, capsys):
    scans = tmp_path / "scans"
    save(scans / "a.nii.gz")
    (scans / "notes.txt").write_text("no scan")
    (scans / ".hidden").write_text("")
    assert run(["check", str(scans)]) == 0
    said = capsys.readouterr()
    assert f"Note: {scans}: 1 file is no scan (1 .txt); give .nii, .nii.gz, .nrrd, .mha or DICOM" in said.out
    assert f"Note: {scans}: 1 entry is passed over (hidden), such as .hidden; " in said.out
    assert "E-" not in said.out
    assert said.err.startswith("1 scan can be used; 0 problems; 2 notes\n")
    (scans / "more.txt").write_text("no scan")
    save(scans / "b.nii.gz", 1)
    assert run(["check", str(scans)]) == 0
    said = capsys.readouterr()
    assert "2 files are no scans (2 .txt)" in said.out
    assert said.err.startswith("2 scans can be used; ")
    assert run(["check", str(scans / "more.txt")]) == 5
    assert "E-FORMAT" in capsys.readouterr().out


def test_patients_that_nobody_named_are_not_counted(tmp_path, capsys):
    save(tmp_path / "scans" / "a.nii.gz")
    prepare([tmp_path / "scans"], tmp_path / "prepared", workers=1)
    assert run(["info", str(tmp_path / "prepared")]) == 0
    assert capsys.readouterr().out.startswith("1 prepared case, patients not named, 0 with a label, store ")


def test_prepare_says_which_labels_it_found(tmp_path, capsys):
    rows = ["case_id,image,label"]
    for seed, label in enumerate(("metastasis", "none", "metastasis")):
        save(tmp_path / "scans" / f"{seed}.nii.gz", seed)
        rows.append(f"c{seed},{seed}.nii.gz,{label}")
    (tmp_path / "scans" / "cases.csv").write_text("\n".join(rows))
    assert run(["check", str(tmp_path / "scans" / "cases.csv")]) == 0
    assert "\nlabels: 2 metastasis, 1 without (none says that there is none)\n" in capsys.readouterr().err
    assert run(["prepare", "-i", str(tmp_path / "scans" / "cases.csv"), "-o", str(tmp_path / "store")]) == 0
    assert "labels: 2 metastasis, 1 without (none says that there is none)" in capsys.readouterr().err


def test_check_names_empty_masks(tmp_path, capsys):
    save(tmp_path / "a.nii.gz")
    image = nibabel.load(tmp_path / "a.nii.gz")
    for name, label in (("empty", 0), ("full", 1)):
        mask = np.zeros(image.shape, np.uint8)
        mask[10:20, 10:20, 10:20] = label
        nibabel.save(nibabel.Nifti1Image(mask, image.affine), tmp_path / f"{name}.nii")
    (tmp_path / "t.csv").write_text("case_id,image,mask\ne,a.nii.gz,empty.nii\nf,a.nii.gz,full.nii\n")
    assert run(["check", str(tmp_path / "t.csv")]) == 0
    assert "Note: 1 mask is empty (e): no crop can be cut around an empty mask\n" in capsys.readouterr().err
    assert run(["check", "--json", str(tmp_path / "t.csv")]) == 0
    assert [row["mask"] for row in json.loads(capsys.readouterr().out)["scans"]] == [{}, {"1": 1000}]


def test_columns_of_a_table_that_are_not_used_are_said_once(tmp_path, capsys):
    save(tmp_path / "a.nii.gz")
    table = tmp_path / "cases.csv"
    table.write_text("case_id,image,age,sex,label\na,a.nii.gz,61,F,tumour\n")
    assert run(["check", str(table)]) == 0
    said = capsys.readouterr()
    assert f"Note: {table}: 2 columns are not used (age, sex); those that are used are case_id," in said.out
    assert said.err.startswith("1 scan can be used; 0 problems; 1 note\n")
    assert run(["prepare", "-i", str(table), "-o", str(tmp_path / "store"), "--workers", "1"]) == 0
    assert capsys.readouterr().err.count(f"{table}: 2 columns are not used (age, sex)") == 1
