"""The verbs that look into encoders, as a user calls them."""

import csv
import json
import shutil

import nibabel
import numpy as np
import pytest

from dagman.cli import run, watching
from dagman.errors import DagmanError, ExitCode
from dagman.tasks import cluster as clusters
from dagman.tasks import leakage


def rows_of(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_diversity_writes_heads_crops_result_and_a_picture(organ_store, two_runs, tmp_path, capsys):
    folder = tmp_path / "out"
    arguments = ["--weights", *map(str, two_runs), "-i", str(organ_store.folder), "-o", str(folder), "--crops", "3"]
    leakage.record(organ_store.rows, two_runs[1])
    assert run(["diversity", *arguments]) == 0
    (two_runs[1] / leakage.CASES).unlink()
    said = capsys.readouterr()
    assert "3 crops of 3 cases, seed 0" in said.err
    assert len(said.out.splitlines()) == 10
    heads = rows_of(folder / "heads.csv")
    assert {row["weights"] for row in heads} == {"first", "second"}
    assert len(heads) == 2 * (4 + 4 + 8 + 8 + 8)
    assert all(0 < float(row["row_entropy"]) <= 1 for row in heads)
    assert len(rows_of(folder / "crops.csv")) == 2 * 3 * 5
    result = json.loads((folder / "result.json").read_text())
    assert (result["crops"], result["cases"]) == (3, 3)
    mean = sum(float(row["distance_mm"]) for row in heads[:4]) / 4
    assert result["rows"][0]["distance_mm"]["value"] == pytest.approx(mean)
    looked = sorted({row["case_id"] for row in rows_of(folder / "crops.csv")})
    assert result["pretraining_overlap"]["second"]["same_patient"] == {"count": 3, "cases": looked}
    assert not result["pretraining_overlap"]["first"]["known"]
    assert "second: pretraining saw 0 of the 3 tested cases, and other CTs of the patients of 3 more" in said.err
    assert (folder / "diversity.png").read_bytes().startswith(b"\x89PNG")


def test_weights_are_named_as_shortly_as_they_can_be_told_apart(tmp_path):
    one, two, three = tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c" / "w.safetensors"
    assert watching.short_names([one]) == ["run"]
    assert watching.short_names([one, two, three]) == ["a-run", "b-run", "c-w"]
    with pytest.raises(DagmanError, match="twice"):
        watching.short_names([one, one])


def test_no_two_weights_have_one_name_and_none_has_a_baselines(tmp_path):
    spaced, scored = tmp_path / "my run", tmp_path / "my_run"
    assert len(set(watching.short_names([spaced, scored]))) == 2
    assert watching.short_names([tmp_path / "untrained"], taken=["untrained"]) == [f"{tmp_path.name}-untrained"]
    assert watching.short_names([tmp_path / "raw_voxels"], taken=["raw voxels"]) == [f"{tmp_path.name}-raw_voxels"]


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A table of two small scans of two patients with masks, one without mask, and one that is broken."""
    folder = tmp_path_factory.mktemp("scans")
    lines = ["case_id,image,mask,patient,age"]
    for number in range(3):
        draws = np.random.default_rng(number)
        hu = np.full((40, 36, 34), -1000, np.int16)
        hu[4:-4, 4:-4, 3:-3] = 30 + draws.integers(-40, 40, (32, 28, 28))
        mask = np.zeros(hu.shape, np.uint8)
        mask[10:16, 12:18, 12:18] = 1
        for kind, array in (("image", hu), ("mask", mask)):
            nibabel.save(nibabel.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0])), folder / f"{kind}{number}.nii.gz")
        lines.append(
            f"c{number},image{number}.nii.gz,{f'mask{number}.nii.gz' if number < 2 else ''},p{number},{number}"
        )
    (folder / "broken.nii.gz").write_bytes((folder / "image0.nii.gz").read_bytes()[:900])
    lines.append("broken,broken.nii.gz,,p9,")
    (folder / "cases.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_attention_of_two_runs_with_heads_and_gains(scans, two_runs, tmp_path, capsys):
    arguments = ["--weights", *map(str, two_runs), "-i", str(scans / "cases.csv"), "-o", str(tmp_path), "--heads"]
    assert run(["attention", *arguments]) == 3, "the broken scan is named and the rest goes on"
    said = capsys.readouterr()
    assert "E-GZIP" in said.err
    assert said.err.count("1 column is not used (age)") == 1
    assert said.out.startswith("first, 2 masks: gain ")
    for case in ("c0", "c1", "c2"):
        for name in ("first", "second"):
            assert nibabel.load(tmp_path / f"{case}_{name}_attention.nii.gz").shape == (40, 36, 34)
        assert (tmp_path / f"{case}_attention.png").stat().st_size > 10_000
        assert (tmp_path / f"{case}_heads.png").stat().st_size > 10_000
    rows = rows_of(tmp_path / "attention.csv")
    assert [(row["case_id"], row["weights"]) for row in rows[:2]] == [("c0", "first"), ("c0", "second")]
    assert [row["why"] for row in rows] == ["", "", "", "", "no mask", "no mask"]
    gains = [float(row["gain"]) for row in rows[:4:2]]
    first, second = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert first["gain"]["value"] == pytest.approx(sum(gains) / 2)
    assert first["gain"]["low"] <= first["gain"]["value"] <= first["gain"]["high"]
    assert "gain_above_first" in second
    assert "Note: second: whether pretraining saw the tested cases is unknown" in said.err


def test_attention_of_one_run_keeps_its_short_name_and_takes_a_mask(scans, two_runs, tmp_path, capsys):
    image, mask = scans / "image2.nii.gz", scans / "mask2.nii.gz"
    weights = ["--weights", str(two_runs[0])]
    assert run(["attention", *weights, "-i", str(image), "--mask", str(mask), "-o", str(tmp_path)]) == 0
    assert (tmp_path / "image2_attention.nii.gz").exists()
    assert not (tmp_path / "image2_heads.png").exists()
    said = capsys.readouterr()
    assert "interval n/a: patients unknown" in said.out
    assert "--group-by case draws cases" in said.err


def test_no_map_replaces_that_of_another_scan(scans, two_runs, tmp_path, capsys):
    sources, output = [], tmp_path / "out"
    for number in (0, 1):
        sources.append(tmp_path / f"pat{number}" / "ct.nii.gz")
        sources[-1].parent.mkdir()
        shutil.copy(scans / f"image{number}.nii.gz", sources[-1])
    command = ["attention", "--weights", str(two_runs[0]), "-o", str(output), "-i"]
    assert run([*command, str(sources[0])]) == 0
    written = output / "ct_attention.nii.gz"
    before = written.read_bytes()
    capsys.readouterr()
    assert run([*command, str(sources[1])]) == ExitCode.REFUSED
    told = f"E-DUPCASE {sources[1]}: is not the scan that {output / 'ct_attention.png'} was made from, {sources[0]}; "
    assert told in capsys.readouterr().err
    assert run([*command, str(sources[1]), str(scans / "image2.nii.gz")]) == ExitCode.REJECTED
    assert [row["case_id"] for row in rows_of(output / "attention.csv")] == ["image2"]
    two = ["attention", "--weights", *map(str, two_runs), "-o", str(output), "-i"]
    assert run([*two, str(sources[1])]) == ExitCode.REFUSED, "whatever the weights"
    assert written.read_bytes() == before
    assert run([*two, str(sources[0])]) == run([*command, str(sources[0])]) == 0
    assert [row["case_id"] for row in rows_of(output / "attention.csv")] == ["ct"]


def test_sources_without_a_scan_are_told(organ_store, two_runs, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no scan")
    command = ["attention", "--weights", str(two_runs[0]), "-o", f"{tmp_path}-out", "-i"]
    assert run([*command, str(tmp_path)]) == ExitCode.NOTHING_USABLE
    assert f"E-NODATA {tmp_path}: holds no scan; see what each file is with" in capsys.readouterr().err
    assert run([*command, str(organ_store.folder)]) == ExitCode.NOTHING_USABLE
    told = f"E-NODATA {organ_store.folder}: is a prepared store, which holds no scan as it was made; "
    assert f"{told}give the scans themselves" in capsys.readouterr().err


def test_attention_draws_cases_where_that_is_said(scans, two_runs, tmp_path, capsys):
    table = tmp_path / "cases.csv"
    lines = [f"c{n},{scans}/image{n}.nii.gz,{scans}/mask{n}.nii.gz" for n in (0, 1)]
    table.write_text("\n".join(["case_id,image,mask", *lines]) + "\n")
    arguments = ["--weights", str(two_runs[0]), "-i", str(table), "-o", str(tmp_path), "--group-by", "case"]
    assert run(["attention", *arguments]) == 0
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["group_by"], found["interval"].split()[-1]) == ("case", "cases")
    gain = found["rows"][0]["gain"]
    assert gain["low"] <= gain["value"] <= gain["high"]


def test_a_folder_is_no_mask(scans, two_runs, tmp_path, capsys):
    image, weights = scans / "image2.nii.gz", str(two_runs[0])
    asked = ["attention", "--weights", weights, "-i", str(image), "--mask", str(scans), "-o", str(tmp_path)]
    assert run(asked) == ExitCode.NOTHING_USABLE
    assert f"E-FORMAT {scans}: is a folder; give one file" in capsys.readouterr().err


def test_cluster_writes_embeddings_crops_result_and_a_picture(organ_store, two_runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(clusters, "require_umap", lambda: None)
    monkeypatch.setattr(clusters, "lay_out", lambda features, *, seed: features[:, :2])
    (tmp_path / "names.csv").write_text("label,name\n1,lung\n2,liver\n3,bone\n4,speck\n")
    arguments = ["--weights", *map(str, two_runs), "-i", str(organ_store.folder), "-o", str(tmp_path / "out")]
    assert run(["cluster", *arguments, "--names", str(tmp_path / "names.csv"), "--crops-each", "2"]) == 0
    said = capsys.readouterr()
    assert "30 crops of 15 structures of 3 classes in 5 cases; 5 structures too small (speck 5)" in said.err
    assert "30 crops, 3 classes, 4 patients" in said.err
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["classes"] == {"bone": 10, "liver": 10, "lung": 10}
    assert result["too_small"] == {"speck": 5}
    crops = rows_of(tmp_path / "out" / "crops.csv")
    assert len(crops) == 4 * 30
    silhouettes = [float(row["silhouette"]) for row in crops[:30]]
    assert result["rows"][0]["silhouette"]["value"] == pytest.approx(sum(silhouettes) / 30)
    assert len(rows_of(tmp_path / "out" / "embeddings-first.csv")) == 30
    assert (tmp_path / "out" / "clusters.png").stat().st_size > 10_000


def test_whole_cases_are_clustered_by_their_label(organ_store, two_runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(clusters, "require_umap", lambda: None)
    monkeypatch.setattr(clusters, "lay_out", lambda features, *, seed: features[:, :2])
    arguments = ["--weights", str(two_runs[0]), "-i", str(organ_store.folder), "-o", str(tmp_path)]
    leakage.record(organ_store.rows[:2], two_runs[0])
    assert run(["cluster", *arguments, "--of", "cases", "--group-by", "case"]) == 0
    (two_runs[0] / leakage.CASES).unlink()
    said = capsys.readouterr().err
    assert "Note: not grouped by patient" in said
    assert "first: pretraining saw 0 of the 5 tested cases, and other CTs of the patients of 2 more" in said
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["cases"], result["classes"]) == (5, {"even": 3, "odd": 2})
    names = sorted(row["case_id"] for row in organ_store.rows[:2])
    assert result["pretraining_overlap"]["first"]["same_patient"] == {"count": 2, "cases": names}


def test_no_verb_writes_over_what_another_one_made(organ_store, two_runs, tmp_path, capsys):
    looks = ["diversity", "--weights", str(two_runs[0]), "-i", str(organ_store.folder), "--crops", "1", "-o"]
    assert run([*looks, str(tmp_path / "looked")]) == 0
    assert run([*looks, str(tmp_path / "looked")]) == 0, "its own it may make again"
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    for name in ("metrics.jsonl", "config.yaml"):
        (tmp_path / "run" / name).touch()
    (tmp_path / "predicted").mkdir()
    (tmp_path / "predicted" / "predictions.csv").touch()
    attention = ["attention", "--weights", str(two_runs[0]), "-i", "gone.nii.gz", "-o"]
    capsys.readouterr()
    for folder, why in (
        (tmp_path / "looked", "holds the result of `dagman diversity`"),
        (organ_store.folder, "is a prepared store"),
        (organ_store.folder / "inside", "lies inside the prepared store"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "predicted", "holds the result of `dagman classify predict`"),
        (tmp_path / "run", "is a pretraining run"),
    ):
        assert run([*attention, str(folder)]) == 4
        said = capsys.readouterr().err
        assert said.startswith("E-OUTPUT")
        assert why in said
