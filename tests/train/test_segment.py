"""A study of segmentation, from the store to its scores: learnt, resumed, saved, read again, or refused."""

import contextlib
import copy
import json
import os
import shlex
import signal
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch

import small_study
from dagman import files, load_encoder
from dagman.cli import run
from dagman.ct.index import index
from dagman.ct.prepare import PrepareConfig, prepare
from dagman.ct.store import PreparedStore, write_array
from dagman.errors import DagmanError, ExitCode
from dagman.nets.encoder import new
from dagman.nets.weights import save_encoder
from dagman.tasks import leakage, matching, segment, segmentation_comparison, segmenter
from dagman.tasks.classes import choose
from dagman.tasks.embed import suited
from dagman.tasks.protocol import Protocol
from dagman.train import parts
from dagman.train import segment as training
from dagman.train.finetune import FinetuneConfig
from dagman.train.segment import SegmentConfig

SHORT = SegmentConfig(finetune=FinetuneConfig(steps=2, batch_size=1, check_every=2, learning_rate=3e-3))


def assert_same_scores(ours, theirs):
    """To 1e-5: the manifest keeps places to a nanometre."""
    found, wanted = ({row.case_id: vars(row.scores) for row in rows} for rows in (ours, theirs))
    assert found.keys() == wanted.keys()
    for case, scores in found.items():
        assert scores["state"] == wanted[case]["state"]
        numbers = [name for name in scores if name != "state"]
        assert [scores[name] for name in numbers] == pytest.approx([wanted[case][name] for name in numbers], rel=1e-5)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    cases = {f"c{number}": small_study.case(number) for number in range(6)}
    return small_study.store(tmp_path_factory.mktemp("study"), cases)


@pytest.fixture(scope="module")
def short(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("short")
    result = training.train(small_study.encoder(), store, folder / "out", SHORT)
    return folder / "out", result


def test_every_case_is_tested_once_and_no_patient_stands_on_two_sides(short):
    folder, result = short
    folds = [json.loads((folder / f"fold-{number}" / "result.json").read_text()) for number in range(3)]
    tested = [case for fold in folds for case in fold["identity"]["test"]]
    assert sorted(tested) == [f"c{number}" for number in range(6)]
    for fold in folds:
        sides = [set(fold["identity"][word]) for word in ("train", "held_out", "test")]
        assert sum(map(len, sides)) == 6 == len(set.union(*sides))
    assert result["cases"] == 6
    assert result["classes"]["label 1"]["all"]["cases"] == 6
    assert (folder / "cases.png").stat().st_size > 5000


def test_finished_folds_are_not_learnt_again_and_other_settings_are_refused(short, store):
    folder, result = short
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("fold-*/result.json")}
    again = training.train(small_study.encoder(), store, folder, SHORT)
    assert again == result
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.glob("fold-*/result.json")}
    other = replace(SHORT, finetune=replace(SHORT.finetune, steps=6))
    with pytest.raises(DagmanError, match=r"E-RESUME.*finetune.steps: 2 -> 6"):
        training.train(small_study.encoder(), store, folder, other)


def test_a_saved_segmenter_gives_what_was_scored_and_its_encoder_is_one(short, store):
    folder, _ = short
    fold = json.loads((folder / "fold-1" / "result.json").read_text())
    (loaded,) = segmenter.load(folder / "fold-1")
    assert loaded.card["store"] == store.store_id
    assert load_encoder(folder / "fold-1").preparation == small_study.PREPARATION
    names = [row["case_id"] for row in store.rows]
    for row in fold["rows"]:
        likely = segment.probabilities(loaded.network, store.hu(names.index(row["case_id"])))
        mask = store.mask(names.index(row["case_id"]))
        ours = likely.argmax(axis=0) == 1
        dice = 2 * (ours & (mask == 1)).sum() / max(1, ours.sum() + (mask == 1).sum())
        assert row["scores"]["dice"] == pytest.approx(dice, abs=1e-6)


def test_test_cases_that_pretraining_saw_are_listed(short, store, tmp_path):
    folder, result = short
    assert result["pretraining_overlap"]["same_voxels"] == {"count": 0, "cases": []}
    leakage.record([store.rows[1], store.rows[4]], tmp_path)
    found = training.train(small_study.encoder(), store, folder, SHORT, weights=tmp_path)
    assert found["pretraining_overlap"]["same_voxels"] == {"count": 2, "cases": ["c1", "c4"]}
    unknown = training.train(small_study.encoder(), store, folder, SHORT, weights=tmp_path / "elsewhere" / "a" / "b")
    assert not unknown["pretraining_overlap"]["known"]


def test_what_an_encoder_was_loaded_from_is_known_without_being_named(store, tmp_path):
    save_encoder(small_study.encoder(), tmp_path / "run" / "weights" / "model.safetensors", {})
    leakage.record(store.rows[:2], tmp_path / "run")
    loaded = load_encoder(tmp_path / "run")
    result = training.train(loaded, store, str(tmp_path / "study"), SHORT, only=[0])
    assert result["source"] == [str(tmp_path / "run" / "weights" / "model.safetensors")]
    named = training.train(loaded, store, tmp_path / "named", SHORT, only=[0], weights=str(tmp_path / "run"))
    assert result["pretraining_overlap"] == named["pretraining_overlap"]
    listed = files.read_lines(tmp_path / "study" / "fold-0" / "cases.jsonl")
    assert [row["case_id"] for row in listed[:2]] == ["c0", "c1"]
    assert not any(row.get("task") for row in listed[:2])


def test_a_segmenter_wants_scans_resampled_as_its_store_was(tmp_path):
    cases = {f"c{number}": small_study.case(number) for number in range(6)}
    table = small_study.write_cases(tmp_path / "raw", cases)
    prepare([table], tmp_path / "linear", PrepareConfig(storage="npy", resampling="linear"))
    store = PreparedStore(tmp_path / "linear")
    training.train(small_study.encoder(), store, tmp_path / "study", SHORT, only=[0])
    (made,) = segmenter.load(tmp_path / "study" / "fold-0")
    assert made.preparation.resampling == "linear"
    assert suited(store, small_study.PREPARATION).resampling == "linear"


def test_one_ct_with_two_masks_is_refused(store, tmp_path):
    rows = [dict(row) for row in store.rows]
    rows[1] |= {name: rows[0][name] for name in ("voxel_sha256", "source_sha256", "patient")}
    twice = copy.copy(store)
    twice.rows = rows
    with pytest.raises(DagmanError, match=r"E-MASK.*one CT has several rows with other masks \(c0, c1\)"):
        training.train(small_study.encoder(), twice, tmp_path, SHORT)


@pytest.mark.parametrize("moved", [0, 1])
def test_one_mask_packed_by_two_versions_is_one_truth(tmp_path, moved):
    store = small_study.store(tmp_path, {name: small_study.case(0) for name in ("a", "b")})
    path = store.path(1, "masks")
    write_array(path, np.roll(np.load(path), moved, axis=0).astype(np.int64))
    store.rows[1]["mask"] |= {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)}
    same = leakage.twins(store)
    assert same == [["a", "b"]]
    with pytest.raises(DagmanError, match=r"E-MASK.*\(a, b\)") if moved else contextlib.nullcontext():
        training._refuse_two_truths(store, same)


def test_a_study_predicts_with_all_folds_and_says_what_it_learnt_from(short, tmp_path, capsys):
    table = small_study.write_cases(tmp_path / "raw", {f"c{number}": small_study.case(number) for number in range(2)})
    loaded = segmenter.load(short[0])
    assert [each.card["fold"] for each in loaded] == [0, 1, 2]
    command = ["segment", "predict", "--weights", str(short[0]), "-i", str(table), "-o", str(tmp_path / "out")]
    assert run(command) == 0
    said = capsys.readouterr().err
    assert "with 3 networks" in said
    assert "it learnt from masks of 2 of these scans or their patients (c0, c1): they test nothing" in said


@pytest.mark.parametrize(("labels", "told"), [("ball (2)=2+1", "'ball (2)=2+1'"), ("2", "2"), (None, None)])
def test_the_score_that_comes_next_joins_labels_as_the_segmenter_does(tmp_path, capsys, labels, told):
    cases = {f"c{number}": small_study.case(number, labels=2) for number in range(6)}
    store = small_study.store(tmp_path, cases)
    once = replace(SHORT, labels=labels, finetune=replace(SHORT.finetune, steps=1, check_every=1))
    training.train(small_study.encoder(), store, tmp_path / "study", once, only=[0])
    command = ["segment", "predict", "--weights", str(tmp_path / "study"), "-i", str(tmp_path / "raw" / "c0.nii.gz")]
    assert run([*command, "-o", str(tmp_path / "found")]) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    score = f"Next: dagman segment score -i {tmp_path / 'found'} --reference MASKS -o {tmp_path / 'found-scores'}"
    assert last == score + (f" --labels {told}" if told else "")
    words = shlex.split(last.removeprefix("Next: dagman ").replace("MASKS", str(tmp_path / "raw" / "masks")))
    assert run(words) == ExitCode.REJECTED  # five references have no prediction
    scored = json.loads((tmp_path / "found-scores" / "result.json").read_text())["labels"]
    [learnt] = segmenter.load(tmp_path / "study")
    assert scored == dict(zip(learnt.classes.names, map(list, learnt.classes.labels), strict=True))


def test_files_of_two_segmenters_are_not_mixed(short, tmp_path):
    import shutil

    folder, _ = short
    shutil.copytree(folder / "fold-0", tmp_path / "mixed")
    shutil.copy(folder / "fold-1" / "decoder.safetensors", tmp_path / "mixed")
    with pytest.raises(DagmanError, match=r"E-WEIGHTS.*not what was written"):
        segmenter.load(tmp_path / "mixed")
    with pytest.raises(DagmanError, match=r"E-WEIGHTS.*holds no segmenter.json.*or a fold of it"):
        segmenter.load(tmp_path)


def test_a_stopped_study_goes_on_bit_for_bit(short, store, tmp_path):
    stops = iter([3])

    def progress(done, total, note):
        if total == 2 and done == 1 and note.startswith("loss") and next(stops, None):
            os.kill(os.getpid(), signal.SIGTERM)

    assert training.train(small_study.encoder(), store, tmp_path, SHORT, only=[1], progress=progress) is None
    assert not (tmp_path / "fold-1" / "result.json").exists()
    training.train(small_study.encoder(), store, tmp_path, SHORT, only=[1])
    for name in ("decoder.safetensors", "weights/model.safetensors"):
        assert (tmp_path / "fold-1" / name).read_bytes() == (short[0] / "fold-1" / name).read_bytes()


def test_a_fold_that_another_process_learns_meanwhile_is_in_the_result(store, tmp_path):
    told = []

    def say(line):
        if line.startswith("fold 1:") and not told:
            training.train(small_study.encoder(), store, tmp_path, SHORT, only=[0])
        told.append(line)

    result = training.train(small_study.encoder(), store, tmp_path, SHORT, only=[1], say=say)
    assert result["folds_finished"] == [0, 1]
    assert json.loads((tmp_path / "result.json").read_text())["cases"] == 4
    assert told[-1] == "1 fold is not finished yet, of 3"


def test_it_learns_and_a_frozen_encoder_stays(store, tmp_path):
    config = SegmentConfig(
        finetune=FinetuneConfig(
            steps=20, batch_size=1, check_every=20, learning_rate=1e-2, frozen=True, warmup_ratio=0.05
        )
    )
    start = small_study.encoder()
    result = training.train(start, store, tmp_path, config, only=[0])
    assert result["folds_finished"] == [0]
    assert result["classes"]["label 1"]["all"]["dice"]["value"] > 0.6
    kept = load_encoder(tmp_path / "fold-0").state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in start.state_dict().items())


def test_mirrored_crops_would_swap_sides(store, tmp_path):
    sided = replace(SHORT, labels="kidney_left=1")
    with pytest.raises(DagmanError, match=r"E-CONFIG keep_sides.*kidney_left.*--keep-sides"):
        training.train(small_study.encoder(), store, tmp_path, sided)
    done = training.train(small_study.encoder(), store, tmp_path, replace(sided, keep_sides=True), only=[0])
    assert list(done["classes"]) == ["kidney_left"]


def test_predictions_lie_on_the_source_grid(short):
    folder, _ = short
    for path in folder.glob("fold-*/predictions/*.nii.gz"):
        image = nibabel.load(path)
        assert image.shape == (36, 36, 36)
        np.testing.assert_allclose(image.affine, np.diag([2.0, 2.0, 2.0, 1.0]), atol=1e-6)


def test_the_verbs_in_a_row(tmp_path, capsys):
    cases = {f"c{number}": small_study.case(number) for number in range(4)}
    table = small_study.write_cases(tmp_path / "raw", cases, affine=np.diag([-1.6, 1.6, 2.5, 1.0]))
    save_encoder(small_study.encoder(), tmp_path / "run" / "weights" / "model.safetensors", {"recipe": "small"})
    study, fold = tmp_path / "out", tmp_path / "out" / "fold-0"
    common = ["--steps", "2", "--folds", "2", "--check-every", "2", "--batch-size", "1"]
    assert run(["prepare", "-i", str(table), "-o", str(tmp_path / "store")]) == 0
    train = ["segment", "train", "-i", str(tmp_path / "store"), "-o", str(study), *common]
    assert run([*train, "--weights", str(tmp_path / "run")]) == 0
    told = capsys.readouterr()
    assert "label 1: 4 cases" in told.out
    assert f"Next: dagman segment predict --weights {study} " in told.err
    predict = ["segment", "predict", "--weights", str(fold), "-i", str(tmp_path / "raw" / "c0.nii.gz")]
    assert run([*predict, "-o", str(tmp_path / "found")]) == 0
    capsys.readouterr()
    assert run([*predict, str(tmp_path / "raw" / "c1.nii.gz"), "-o", str(tmp_path / "found")]) == 0
    said = capsys.readouterr().err
    assert "c0.nii.gz is there already, from the same scan and weights" in said
    assert "c1.nii.gz: label 1" in said
    (tmp_path / "found" / "c1.nii.gz").write_bytes(b"cut off")
    assert run([*predict, str(tmp_path / "raw" / "c1.nii.gz"), "-o", str(tmp_path / "found")]) == 0
    assert "c1.nii.gz: label 1" in capsys.readouterr().err, "what is damaged is done anew"
    other = [str(study / "fold-1") if word == str(fold) else word for word in predict]
    assert run([*other, "-o", str(tmp_path / "found")]) == 0
    assert "already" not in capsys.readouterr().err, "and what other weights gave"
    source, found = (nibabel.load(tmp_path / name / "c0.nii.gz") for name in ("raw", "found"))
    assert np.array_equal(source.affine, found.affine)
    for path in study.glob("fold-*/predictions/*.nii.gz"):  # In the files' own order, although they run from left.
        assert np.array_equal(nibabel.load(path).affine, source.affine)
    score = ["segment", "score", "-i", *map(str, sorted(study.glob("fold-*/predictions")))]
    assert run([*score, "--reference", str(table), "-o", str(tmp_path / "scores")]) == 0
    result = json.loads((tmp_path / "scores" / "result.json").read_text())
    assert (result["cases"], result["patients"], result["not_scored"]) == (4, 4, [])
    ours = json.loads((study / "result.json").read_text())
    assert (ours["grid"], result["grid"]) == ("native", "native")
    assert_same_scores(*(segmentation_comparison.read(folder) for folder in (study, tmp_path / "scores")))
    assert run([*train, "--weights", str(tmp_path / "run"), "--seed", "1"]) == 4
    assert "E-RESUME" in capsys.readouterr().err
    assert (
        run(
            [
                "attention",
                "--weights",
                str(fold),
                "-i",
                str(tmp_path / "raw" / "c0.nii.gz"),
                "-o",
                str(tmp_path / "looked"),
            ]
        )
        == 0
    )


def test_a_study_scores_what_predict_and_score_would_on_the_scans_own_voxels(real_data, tmp_path):
    """Sarcomas of 0.98 x 0.98 x 3.27 mm: what the study says of its test cases is what its users would measure."""
    names = ("STS_002", "STS_003")
    rows = [f"{name},{real_data}/sts/{name}_ct.nii.gz,{real_data}/sts/{name}_gtv.nii.gz,{name}" for name in names]
    table = tmp_path / "cases.csv"
    table.write_text("\n".join(["case_id,image,mask,patient", *rows]) + "\n")
    prepare([table], tmp_path / "store")
    store = PreparedStore(tmp_path / "store")
    assert max(store.rows[0]["source_spacing_mm"]) > 1.5 * min(store.rows[0]["source_spacing_mm"])
    config = replace(SHORT, protocol=Protocol(folds=2))
    result = training.train(small_study.encoder(), store, tmp_path / "out", config)
    assert result["grid"] == "native"
    scans, _ = index([table])
    for number in range(2):
        fold = tmp_path / "out" / f"fold-{number}"
        (case,) = json.loads((fold / "result.json").read_text())["identity"]["test"]
        (scan,) = [scan for scan in scans if scan.case_id == case]
        segment.predict(segmenter.load(fold), scan, tmp_path / "found")
    ours = segmentation_comparison.read(tmp_path / "out")
    assert_same_scores(ours, matching.score([tmp_path / "found"], table).rows)
    assert any(row.scores.dice > 0 for row in ours)


def test_a_store_that_keeps_no_masks_as_drawn_is_scored_on_its_own_voxels_and_says_so(tmp_path):
    cases = {f"c{number}": small_study.case(number) for number in range(2)}
    store = small_study.store(tmp_path, cases, affine=np.diag([1.6, 1.6, 2.5, 1.0]))
    for row in store.rows:
        del row["mask"]["drawn"]
    told = []
    config = replace(SHORT, protocol=Protocol(folds=2))
    result = training.train(small_study.encoder(), store, tmp_path / "out", config, say=told.append)
    assert "2 of 2 cases will be scored on the store's voxels of 2 mm, not on their own" in told[0]
    assert result["grid"] == "store"
    lines = (tmp_path / "out" / "cases.csv").read_text().splitlines()
    assert [dict(zip(lines[0].split(","), line.split(","), strict=True))["grid"] for line in lines[1:]] == ["store"] * 2


def test_no_prediction_replaces_what_it_is_made_from(short, tmp_path, capsys, monkeypatch):
    table = small_study.write_cases(tmp_path / "raw", {"c0": small_study.case(0)})
    scan, mask = tmp_path / "raw" / "c0.nii.gz", tmp_path / "raw" / "masks" / "c0.nii.gz"
    before = scan.read_bytes(), mask.read_bytes()
    monkeypatch.chdir(tmp_path / "raw")
    for source, output in ((scan.name, "."), (".", "."), (".", "out"), (str(table), "masks")):
        command = ["segment", "predict", "--weights", str(short[0] / "fold-0"), "-i", source, "-o", output]
        assert run(command) == ExitCode.REFUSED
        assert "E-OUTPUT" in capsys.readouterr().err
    (found,), _ = index([scan])
    with pytest.raises(DagmanError, match=r"E-OUTPUT .*c0.nii.gz: is one of the inputs"):
        segment.predict(segmenter.load(short[0] / "fold-0"), found, scan.parent)
    assert (scan.read_bytes(), mask.read_bytes()) == before
    assert sorted(path.name for path in scan.parent.iterdir()) == ["c0.nii.gz", "cases.csv", "masks"]


def test_a_store_is_no_scan_to_predict(short, store, tmp_path, capsys):
    command = ["segment", "predict", "--weights", str(short[0] / "fold-0"), "-i", str(store.folder)]
    assert run([*command, "-o", str(tmp_path / "out")]) == ExitCode.NOTHING_USABLE
    assert f"E-NODATA {store.folder}: is a prepared store" in capsys.readouterr().err


def test_ctrl_c_between_two_scans_loses_nothing_and_says_so(short, tmp_path, capsys, monkeypatch):
    small_study.write_cases(tmp_path / "raw", {f"c{number}": small_study.case(number) for number in range(2)})
    scans = [str(tmp_path / "raw" / f"c{number}.nii.gz") for number in range(2)]
    command = ["segment", "predict", "--weights", str(short[0] / "fold-0"), "-i", *scans, "-o", str(tmp_path / "out")]
    plain = segment.predict

    def interrupted(*given, **more):
        made = plain(*given, **more)
        signal.raise_signal(signal.SIGINT)
        return made

    monkeypatch.setattr(segment, "predict", interrupted)
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # as a shell's background job may have set it
    assert run(command) == ExitCode.STOPPED
    signal.signal(signal.SIGINT, ignored)
    assert "stopped; run the same command" in capsys.readouterr().err
    monkeypatch.setattr(segment, "predict", plain)
    assert run(command) == ExitCode.OK
    said = capsys.readouterr().err
    assert "c0.nii.gz is there already" in said
    assert "c1.nii.gz: label 1" in said


def test_from_scratch_a_plain_swinunetr_and_test_masks_that_nobody_opens_before_the_end(store, tmp_path, monkeypatch):
    opened, fit, mask = set(), parts.fit, type(store).mask

    def watched(lesson, *given, **more):
        monkeypatch.setattr(type(store), "mask", lambda self, row, *rest: opened.add(row) or mask(self, row, *rest))
        ended = fit(lesson, *given, **more)
        monkeypatch.setattr(type(store), "mask", mask)
        return ended

    monkeypatch.setattr(parts, "fit", watched)
    plain = new(replace(small_study.SMALL, attention=None), small_study.PREPARATION, 0)
    result = training.train(plain, store, tmp_path, SHORT, only=[0])
    assert result["source"] == ["new random weights"]
    assert not any("semantic" in name for name in load_encoder(tmp_path / "fold-0").state_dict())
    tested = json.loads((tmp_path / "fold-0" / "result.json").read_text())["identity"]["test"]
    assert opened
    assert not {store.rows[row]["case_id"] for row in opened} & set(tested)


def test_predicting_nothing_on_empty_cases_is_no_merit(tmp_path):
    hu, mask = small_study.case(0)
    cases = {"full": (hu, mask), "bare": (hu, np.zeros_like(mask)), "next": (hu + np.int16(1), mask)}
    store = small_study.store(tmp_path, cases)
    names = [row["case_id"] for row in store.rows]

    class Nothing(training.SegmentationNetwork):
        def forward(self, images):
            return torch.stack([torch.ones_like(images[:, 0]), torch.zeros_like(images[:, 0])], dim=1)

    network = Nothing(small_study.encoder(), 2).eval()
    lesson = training.SegmentLesson(
        network=network,
        dataset=torch.utils.data.TensorDataset(torch.zeros(1)),
        identity=None,
        store=store,
        classes=choose(None, [1]),
        held_out=(names.index("full"), names.index("bare")),
    )
    assert lesson.score() == 0
    lesson.held_out = (names.index("bare"),)
    assert lesson.score() is None


@pytest.mark.parametrize("only", [[7], [-1], []])
def test_a_fold_that_is_not_there_is_refused_in_one_line(store, tmp_path, only):
    with pytest.raises(DagmanError, match=r"E-CONFIG fold: cannot be .*there are 3 folds, numbered from 0"):
        training.train(small_study.encoder(), store, tmp_path / "out", SHORT, only=only)
    assert not (tmp_path / "out").exists()


def test_a_crop_of_one_final_token_is_refused_before_work(store, tmp_path):
    with pytest.raises(DagmanError, match=r"E-CROP.*single final token"):
        training.train(small_study.encoder(), store, tmp_path, replace(SHORT, crop=(32, 32, 32)))


def test_an_empty_mask_counts_and_a_case_without_mask_is_told(tmp_path):
    cases = {f"c{number}": small_study.case(number) for number in range(5)}
    cases["empty"] = (small_study.case(7)[0], np.zeros_like(cases["c0"][1]))
    cases["bare"] = (small_study.case(9)[0], None)
    split = {name: "test" if name in ("empty", "c0") else "train" for name in cases}
    store = small_study.store(tmp_path, cases, split=split)
    one = replace(SHORT, protocol=Protocol(split=True))
    result = training.train(small_study.encoder(), store, tmp_path / "out", one)
    states = result["classes"]["label 1"]["states"]
    assert (result["cases"], result["folds"], result["protocol"]) == (2, 1, "split column")
    assert states["neither"] + states["invented"] == 1
    assert result["classes"]["label 1"]["with_reference"]["cases"] == 1
    assert result["left_out"] == {"no mask": 1}
