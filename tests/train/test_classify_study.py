"""A study of classification, from the store to predictions of new scans: learnt, resumed, saved, read again."""

import csv
import dataclasses
import functools
import json
import os
import shutil
import signal
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import small_study
from dagman import cli
from dagman import config as configs
from dagman.cli.starting import starting_encoder
from dagman.ct.prepare import PrepareConfig, prepare
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError, ExitCode
from dagman.nets.classifier import EncoderClassifier, ResNet50, vector, width_of
from dagman.nets.encoder import build
from dagman.nets.weights import MODEL_FILE, load_encoder, save_encoder
from dagman.tasks import classifier, embed, leakage, predictions, watching
from dagman.tasks import classify as probing
from dagman.tasks import cohort as cohorts
from dagman.tasks.case_crops import CaseCrop, CaseCrops
from dagman.tasks.origin import Origin
from dagman.tasks.protocol import Protocol
from dagman.train import classify
from dagman.train.classify import ClassifyConfig, finetune
from dagman.train.finetune import FinetuneConfig, start_of
from dagman.types import Preparation

CROP = (32, 32, 64)
QUICK = FinetuneConfig(steps=16, batch_size=4, learning_rate=1e-3, layer_decay=1.0, check_every=8)
STUDY = ClassifyConfig(finetune=QUICK, positive="bright", protocol=Protocol(folds=2))


def case(number, radius=10):
    """A ball that is brighter or darker than the body."""
    hu, mask = small_study.case(number, radius=radius)
    hu[mask > 0] += np.int16(0 if number % 2 else -400)
    return hu, mask


def write(folder, count=12, *, masks=True, split=None, radius=10, patients=None):
    cases = {f"c{number:02d}": case(number, radius) for number in range(count)}
    if not masks:
        cases = {name: (hu, None) for name, (hu, _) in cases.items()}
    table = small_study.write_cases(folder, cases, split=split)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    for number, row in enumerate(rows):
        row["label"] = "bright" if number % 2 else "dark"
        row["patient"] = f"{patients}{number}" if patients else row["patient"]
    with table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return table


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classify")
    table = write(folder / "raw")
    prepare([table], folder / "store", PrepareConfig(storage="npy"))
    return PreparedStore(folder / "store")


@pytest.fixture(scope="module")
def study(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    said = []
    result = finetune(small_study.encoder(), store, folder, STUDY, say=said.append)
    return folder, result, said


def test_a_study_learns_what_is_plain_to_see(study):
    folder, result, said = study
    assert result["auc"]["value"] > 0.9
    assert result["cases"] == 12
    assert result["protocol"] == "2 folds by patient"
    assert result["pretraining_overlap"]["known"]
    assert result["crop_mm"] == [64.0, 64.0, 128.0]
    assert any(line.startswith("fold 0: ") and "to choose the best step on" in line for line in said)
    assert {path.name for path in folder.iterdir()} >= {"fold-0", "fold-1", "predictions.csv", "result.json", "roc.png"}
    assert predictions.read(folder).auc() == predictions.Estimate(**result["auc"])


def test_patients_that_are_tested_were_not_learnt_from(study, store):
    folder = study[0]
    patient = {row["case_id"]: row["patient"] for row in store.rows}
    for number in (0, 1):
        identity = json.loads((folder / f"fold-{number}" / "result.json").read_text())["identity"]
        sides = [{patient[name] for name in identity[word]} for word in ("train", "held_out", "test")]
        assert sum(map(len, sides)) == len(set.union(*sides)) == 12


def test_a_finished_study_is_not_learnt_again_and_other_settings_are_refused(study, store):
    folder, result, _ = study
    assert finetune(small_study.encoder(), store, folder, STUDY, progress=pytest.fail)["auc"] == result["auc"]
    other = dataclasses.replace(STUDY, finetune=dataclasses.replace(QUICK, seed=1))
    with pytest.raises(DagmanError, match=r"E-RESUME.*settings.finetune.seed"):
        finetune(small_study.encoder(), store, folder, other)


def test_what_an_encoder_was_loaded_from_is_known_without_being_named(store, tmp_path):
    save_encoder(small_study.encoder(), tmp_path / "run" / "weights" / "model.safetensors", {})
    leakage.record(store.rows, tmp_path / "run")
    loaded = load_encoder(tmp_path / "run")
    result = finetune(loaded, store, str(tmp_path / "study"), STUDY)
    assert result["pretraining_overlap"]["same_voxels"]["count"] == result["cases"]
    assert start_of(small_study.encoder(), None) is None


def test_a_stopped_study_goes_on_to_the_same_bits(study, store, tmp_path):
    def stop(done, total, note):
        if done == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    shutil.copytree(study[0] / "fold-0", tmp_path / "fold-0")  # finished before the stop
    assert finetune(small_study.encoder(), store, tmp_path, STUDY, progress=stop) is None
    again = finetune(small_study.encoder(), store, tmp_path, STUDY)
    assert (tmp_path / "predictions.csv").read_bytes() == (study[0] / "predictions.csv").read_bytes()
    assert again["auc"] == study[1]["auc"]


def test_labels_of_test_cases_do_not_reach_the_fit(study, store, tmp_path, monkeypatch):
    folder = study[0]
    test = set(json.loads((folder / "fold-0" / "result.json").read_text())["identity"]["test"])
    seen = []
    original = CaseCrops.__getitem__

    def spy(self, sample):
        seen.extend(str(self.store.rows[row]["case_id"]) for row in self.rows)
        return original(self, sample)

    monkeypatch.setattr(CaseCrops, "__getitem__", spy)
    monkeypatch.setattr(classify._Study, "conclude", lambda *_: (_ for _ in ()).throw(InterruptedError))
    short = dataclasses.replace(STUDY, finetune=dataclasses.replace(QUICK, steps=4, check_every=2))
    with pytest.raises(InterruptedError):
        finetune(small_study.encoder(), store, tmp_path, short)
    assert seen
    assert not test & set(seen)


class Belief(torch.nn.Module):
    """Says the same of every image."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(2))

    def forward(self, images):
        return self.bias.expand(len(images), 2)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 20])
def test_every_class_counts_the_same_whatever_the_batch(store, batch_size):
    """Who sees no image believes in one half, of twenty cases with four positive ones."""
    numbers = torch.arange(20) % 5 // 4
    lesson = classify.ClassifyLesson(
        network=Belief(),
        dataset=CaseCrops(store, (0,), (0,), small_study.PREPARATION, 0),
        identity=None,
        store=store,
        weights=20 / (2 * torch.bincount(numbers)),
        held_out=(),
        held_out_numbers=(),
    )
    for part in numbers.split(batch_size):
        (lesson.loss(CaseCrop(torch.zeros(len(part), 1, 2, 2, 2), part)) * len(part) / 20).backward()
    assert lesson.network.bias.grad.abs().max() < 1e-7


def test_probabilities_know_how_frequent_the_classes_were(store):
    network = EncoderClassifier(small_study.encoder(), 2)
    torch.nn.init.zeros_(network.last.weight)
    lesson = classify.ClassifyLesson(
        network=network.eval(),
        dataset=CaseCrops(store, (0,), (0,), network.preparation, 0),
        identity=None,
        store=store,
        weights=torch.tensor([4 / (2 * 3), 4 / (2 * 1)]),
        held_out=(),
        held_out_numbers=(),
    )
    assert lesson.likely([0])[0].tolist() == [0.5, 0.5]
    lesson.restore_shares()
    assert lesson.likely([0])[0].tolist() == pytest.approx([0.75, 0.25])


AS_PROBE = dataclasses.replace(STUDY, head="probe", finetune=dataclasses.replace(QUICK, steps=6, check_every=3))


def begun(store, config=AS_PROBE):
    """The first part of a study, before its first step."""
    encoder = small_study.encoder()
    cohort = cohorts.cohort(cohorts.stored(store), config.protocol, positive="bright", hold_out=True)
    made = classify._Study(
        encoder=encoder,
        store=store,
        cohort=cohort,
        folder=Path("nowhere"),
        config=config,
        weights=None,
        resnet=None,
        seen=leakage.seen(store.rows, None),
    )
    return made, cohort.parts[0], made.lesson(cohort.parts[0])


def test_the_linear_layer_starts_as_a_probe_of_what_training_shows(store):
    study, part, lesson = begun(store)
    cases, learnt = len(part.train), AS_PROBE.finetune.steps * AS_PROBE.finetune.batch_size
    shown = range(learnt + -learnt % cases, learnt + -learnt % cases + classify.ALTERED * cases)
    images = torch.stack([lesson.dataset[sample].image for sample in shown])
    assert not torch.equal(images[0], images[cases])
    rows = [part.train[lesson.dataset.case(sample)] for sample in shown]
    assert sorted(rows) == sorted(classify.ALTERED * part.train)
    assert [study.cohort.numbers[row] for row in rows] == [int(lesson.dataset[sample].number) for sample in shown]
    with torch.no_grad():
        features = small_study.encoder()(images).pooled.double().numpy()  # an encoder without drop path
    expected = probing.fit_rows(study.cohort, rows, features).probabilities(features)
    assert lesson.begin()
    lesson.restore_shares()
    with torch.inference_mode():
        found = lesson.network(images).softmax(dim=1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_probe_to_start_from_meets_drop_path_where_training_does(store, monkeypatch, frozen):
    dropping = build(dataclasses.replace(small_study.SMALL, drop_path=0.5)).eval()
    dropping.preparation = small_study.PREPARATION
    monkeypatch.setattr(small_study, "encoder", lambda: dropping)
    seen, fit_rows = [], classify.fit_rows
    monkeypatch.setattr(
        classify, "fit_rows", lambda cohort, rows, features: seen.append(features) or fit_rows(cohort, rows, features)
    )
    config = dataclasses.replace(AS_PROBE, finetune=dataclasses.replace(AS_PROBE.finetune, frozen=frozen))
    for _ in range(2):
        _, part, lesson = begun(store, config)
        state = torch.random.get_rng_state()
        assert lesson.begin()
        assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(seen[0], seen[1])
    first = config.finetune.steps * config.finetune.batch_size
    first += -first % len(part.train)
    images = torch.stack([lesson.dataset[first + sample].image for sample in range(len(seen[0]))])
    with torch.inference_mode():
        tested = dropping.eval()(images).pooled.double().numpy()
    assert np.allclose(seen[0], tested, atol=1e-5) == frozen


def test_every_training_case_counts_alike_in_the_probe_to_start_from(store, monkeypatch):
    asked = []

    def noted(_, rows, __):
        asked.append(sorted(rows))
        raise InterruptedError

    monkeypatch.setattr(classify, "fit_rows", noted)
    monkeypatch.setattr(classify, "ENOUGH", 13)
    _, part, lesson = begun(store)
    with pytest.raises(InterruptedError):
        lesson.begin()
    assert 4 * len(part.train) > 13 > len(part.train)
    assert asked == [sorted(13 // len(part.train) * part.train)]


def test_a_start_as_the_probe_is_scored_and_resumes_to_the_same_bits(store, tmp_path):
    def stop(done, total, note):
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    one_part, split = dataclasses.replace(AS_PROBE, protocol=Protocol(split=True)), halves(store)
    finetune(small_study.encoder(), split, tmp_path / "whole", one_part)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "fold-0" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows if row.get("score") is not None] == [0, 3, 6]
    assert json.loads((tmp_path / "whole" / "fold-0" / "result.json").read_text())["head"] == "probe"
    assert finetune(small_study.encoder(), split, tmp_path / "stopped", one_part, progress=stop) is None
    finetune(small_study.encoder(), split, tmp_path / "stopped", one_part)
    one, other = ((tmp_path / name / "predictions.csv").read_bytes() for name in ("whole", "stopped"))
    assert one == other


def test_where_a_probe_cannot_be_fitted_or_is_not_asked_for_the_linear_layer_starts_at_random(store):
    study, part, lesson = begun(store, dataclasses.replace(AS_PROBE, head=None))
    assert lesson.probe is None
    assert not lesson.begin()
    pretrained = dataclasses.replace(study, weights=Path("run"))
    assert pretrained.starts_as_probe(part)
    assert not pretrained.starts_as_probe(dataclasses.replace(part, train=part.train[:2]))
    assert not dataclasses.replace(pretrained, config=STUDY.__class__(head="random")).starts_as_probe(part)
    with pytest.raises(DagmanError, match=r"E-CONFIG head: cannot be probe of a ResNet"):
        ClassifyConfig(network="resnet50", head="probe")


def halves(store, flip=False):
    sides = ["train"] * 6 + ["validation"] * 2 + ["test"] * 4
    split = PreparedStore(store.folder)
    split.rows = [row | {"split": side} for row, side in zip(store.rows, sides, strict=True)]
    if flip:
        other = {"bright": "dark", "dark": "bright"}
        split.rows = [row | {"label": other[row["label"]]} if row["split"] == "test" else row for row in split.rows]
    return split


@pytest.mark.parametrize("head", ["random", "probe"])
def test_other_labels_of_test_cases_change_no_prediction(store, tmp_path, head):
    quick = dataclasses.replace(QUICK, steps=4)
    config = dataclasses.replace(STUDY, protocol=Protocol(split=True), finetune=quick, head=head)
    for name, flip in (("true", False), ("flipped", True)):
        finetune(small_study.encoder(), halves(store, flip), tmp_path / name, config)
    one, other = (json.loads((tmp_path / name / "fold-0" / "result.json").read_text()) for name in ("true", "flipped"))
    assert one["probabilities"] == other["probabilities"]
    assert (one["threshold"], one["best_step"]) == (other["threshold"], other["best_step"])


def test_an_encoder_that_learnt_labels_is_not_tested_on_their_cases(study, store, tmp_path):
    folder = study[0]
    with pytest.raises(DagmanError, match=r"E-LEAK.*trained on labels of 6 of its cases"):
        finetune(load_encoder(folder / "fold-0"), store, tmp_path / "again", STUDY, weights=folder / "fold-0")
    assert not (tmp_path / "again").exists()
    arguments = ["embed", "--weights", str(folder / "fold-0"), "-i", str(store.folder), "-o", str(tmp_path / "f.csv")]
    assert cli.run(arguments) == 0
    probe = ["classify", "probe", "-i", str(tmp_path / "f.csv"), "--positive", "bright", "--folds", "2"]
    assert cli.run([*probe, "-o", str(tmp_path / "lp")]) == ExitCode.REFUSED
    assert cli.run([*arguments, "--untrained"]) == 0
    assert cli.run([*probe, "-o", str(tmp_path / "lp")]) == 0
    assert not (tmp_path / "lp" / "classifier").exists()


def test_a_finished_fold_keeps_no_checkpoints(study):
    found = {path.name for path in (study[0] / "fold-0").iterdir()}
    assert not found & {"checkpoints", "best.safetensors"}
    assert found >= {"weights", "head.safetensors", "classifier.json", "cases.jsonl", "result.json", "metrics.jsonl"}


def test_the_saved_classifiers_predict_as_the_study_did(study, store):
    folder = study[0]
    one = classifier.load(folder / "fold-0")
    assert len(one) == 1
    table, _ = classifier.predict(one, store)
    result = json.loads((folder / "fold-0" / "result.json").read_text())
    rows = [table.case_ids.index(name) for name in result["identity"]["test"]]
    np.testing.assert_allclose(table.features[rows], result["probabilities"], atol=1e-6)
    both = classifier.load(folder)
    mean, called = classifier.predict(both, store)
    parts = [classifier.predict([each], store)[0].features for each in both]
    np.testing.assert_allclose(mean.features, np.mean(parts, axis=0), atol=1e-7)
    assert set(called) <= {"bright", "dark"}
    assert load_encoder(folder / "fold-0").preparation == small_study.PREPARATION


def test_a_step_is_chosen_by_what_is_said_of_every_class_alike(store, monkeypatch):
    said = np.array([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.5, 0.5]])
    monkeypatch.setattr(classify.ClassifyLesson, "likely", lambda *_: said)
    lesson = classify.ClassifyLesson(
        network=torch.nn.Identity(),
        dataset=CaseCrops(store, [0], [0], small_study.PREPARATION, 0),
        identity=None,
        store=store,
        weights=torch.ones(2),
        held_out=(0, 1, 2, 3),
        held_out_numbers=(0, 0, 0, 1),
    )
    assert lesson.score() == pytest.approx((np.log(0.9) + np.log(0.5)) / 2)


def test_a_damaged_classifier_is_refused(study, tmp_path):
    with pytest.raises(DagmanError, match=r"E-WEIGHTS.*holds no classifier.json"):
        classifier.load(tmp_path)
    made = classifier.load(study[0] / "fold-1")[0]
    classifier.save(made, tmp_path / "copy")
    with (tmp_path / "copy" / "head.safetensors").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(DagmanError, match=r"E-WEIGHTS.*head.safetensors.*is not what was written"):
        classifier.load(tmp_path / "copy")


def test_a_fixed_split_and_a_frozen_encoder(store, tmp_path):
    split = halves(store)
    config = dataclasses.replace(
        STUDY, protocol=Protocol(split=True), finetune=dataclasses.replace(QUICK, frozen=True, steps=4, check_every=2)
    )
    result = finetune(small_study.encoder(), split, tmp_path, config)
    assert (result["cases"], result["protocol"]) == (4, "split column")
    assert result["method"].startswith("fine-tuned head")
    before, after = small_study.encoder().state_dict(), load_encoder(tmp_path / "fold-0").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_resnet_learns_and_takes_weights_from_a_file(store, tmp_path, monkeypatch):
    from monai.networks import nets

    preparation = Preparation(crop=(32, 32, 32))
    with torch.device("meta"):
        full = ResNet50(2, preparation)
    assert sum(parameter.numel() for parameter in full.parameters()) == 46_159_170
    # From here on a quarter as wide: the same layers and names, a sixteenth of the weights to write and to read.
    monkeypatch.setattr(nets, "resnet50", functools.partial(nets.resnet50, widen_factor=0.25))
    torch.manual_seed(0)
    other = ResNet50(5, preparation)
    save_file(
        {f"module.{name}": value for name, value in other.resnet.state_dict().items()}, tmp_path / "w.safetensors"
    )
    network = ResNet50(2, preparation)
    assert network.resnet.state_dict().keys() == full.resnet.state_dict().keys()
    # MedicalNet's shortcuts have no bias.
    assert not any("downsample.0.bias" in name for name in network.resnet.state_dict())
    report = network.load(tmp_path / "w.safetensors")
    assert report.share == 1.0
    assert torch.equal(network.resnet.conv1.weight, other.resnet.conv1.weight)
    save_file({"something": torch.zeros(3)}, tmp_path / "bad.safetensors")
    with pytest.raises(DagmanError, match=r"E-WEIGHTS.*fills 0.0% of a 3D ResNet-50"):
        network.load(tmp_path / "bad.safetensors")
    torch.save(other.resnet.state_dict(), tmp_path / "pickle.pth")
    with pytest.raises(DagmanError, match=r"E-WEIGHTS.*is a pickle"):
        network.load(tmp_path / "pickle.pth")
    assert network.resnet.conv1.stride == (2, 2, 2)
    with pytest.raises(DagmanError, match=r"E-CONFIG finetune.batch_size: cannot be 1"):
        ClassifyConfig(network="resnet50", finetune=dataclasses.replace(QUICK, batch_size=1))
    config = dataclasses.replace(
        STUDY,
        network="resnet50",
        protocol=Protocol(split=True),
        finetune=dataclasses.replace(QUICK, steps=1, batch_size=2, check_every=1),
    )
    result = finetune(
        small_study.encoder(preparation=preparation),
        halves(store),
        tmp_path / "study",
        config,
        resnet=tmp_path / "w.safetensors",
    )
    assert result["method"] == "fine-tuned network, resnet50"
    save_encoder(small_study.encoder(preparation=preparation), tmp_path / "run" / "weights" / "model.safetensors", {})
    leakage.record(store.rows, tmp_path / "run")
    scratch = finetune(load_encoder(tmp_path / "run"), halves(store), tmp_path / "scratch", config)
    seen = scratch["pretraining_overlap"]
    assert seen["known"]
    assert seen["same_voxels"]["count"] == 0, "of the encoder a ResNet takes the preparation alone"
    assert len(classifier.load(tmp_path / "study")) == 1


def test_the_vector_is_the_one_that_embed_gives(store):
    encoder = small_study.encoder()
    images = torch.rand(2, 1, *CROP)
    with torch.no_grad():
        features = encoder(images)
    for which in ("pooled", "cells", "cls", "all"):
        assert vector(features, which).shape == (2, width_of(encoder.config, which))
    plain = small_study.encoder(attention=False)
    with pytest.raises(DagmanError, match="E-NOCLS"):
        EncoderClassifier(plain, 2, "cls")
    table = embed.embed(encoder, store, which="cells")
    assert table.features.shape == (12, encoder.config.cell_width)


def test_samples_depend_on_their_number_alone_and_lie_near_the_mask(store):
    crops = CaseCrops(store, range(12), [0, 1] * 6, small_study.PREPARATION, seed=0)
    image, number = crops[5]
    again, same = crops[5]
    assert torch.equal(image, again)
    assert number == same
    assert image.shape == (1, *CROP)
    assert 0 <= image.min() <= image.max() <= 1
    epoch = sorted(int(crops[sample][1]) for sample in range(12))
    assert epoch == [0] * 6 + [1] * 6


def test_the_verbs_chain_from_a_table_to_predictions_of_new_scans(store, tmp_path, capfd):
    from dagman.nets.weights import save_encoder

    save_encoder(small_study.encoder(), tmp_path / "run" / "weights" / "model.safetensors", {"recipe": "small"})
    given = ["--input", str(store.folder), "--positive", "bright", "--folds", "2"]
    quick = [
        "--crop",
        "32,32,64",
        "--steps",
        "6",
        "--batch-size",
        "4",
        "--check-every",
        "3",
        "--learning-rate",
        "0.003",
    ]
    run = str(tmp_path / "run")
    assert cli.run(["classify", "finetune", "--weights", run, *given, "-o", str(tmp_path / "ft"), *quick]) == 0
    assert cli.run(["embed", "--weights", run, "-i", str(store.folder), "-o", str(tmp_path / "f.csv")]) == 0
    probe = ["classify", "probe", "-i", str(tmp_path / "f.csv"), "--positive", "bright", "--folds", "2"]
    assert cli.run([*probe, "-o", str(tmp_path / "lp")]) == 0
    shown = capfd.readouterr()
    assert "balanced accuracy" in shown.out
    assert "whether pretraining saw the tested cases is unknown" in shown.err
    result = json.loads((tmp_path / "lp" / "result.json").read_text())
    assert result["method"] == "linear probe"
    learnt = ["classify", "predict", "--weights", str(tmp_path / "lp" / "classifier"), "-i", str(store.folder)]
    assert cli.run([*learnt, "-o", str(tmp_path / "own")]) == 0
    assert "learnt from labels of 12 of these cases" in capfd.readouterr().err
    assert not (tmp_path / "own" / "tested").exists()
    few = [*probe, "-o", str(tmp_path / "few"), "--fraction", "0.7", "--draws", "2"]
    assert cli.run(few) == 0
    assert json.loads((tmp_path / "few" / "draws.json").read_text())["draws"] == 2
    assert cli.run(["compare", str(tmp_path / "ft"), str(tmp_path / "lp"), "-o", str(tmp_path / "cmp")]) == 0
    rows = list(csv.DictReader((tmp_path / "cmp" / "comparison.csv").read_text().splitlines()))
    assert [row["difference"] == "" for row in rows] == [True, False]
    shown = capfd.readouterr()
    assert "DeLong" in shown.out
    assert "of all results together: whether pretraining saw the tested cases is unknown" in shown.err
    overlap = json.loads((tmp_path / "cmp" / "comparison.json").read_text())
    assert list(overlap["pretraining_overlap_of"]) == ["ft", "lp"]
    assert (overlap["pretraining_overlap"]["known"], overlap["pretraining_overlap"]["tested"]) == (False, 12)
    assert cli.run(["compare", str(tmp_path / "ft"), str(tmp_path / "few" / "draw-0")]) == 0
    for seed in ("0", "1"):
        table = str(tmp_path / f"untrained{seed}.csv")
        embed = ["embed", "--weights", run, "-i", str(store.folder), "-o", table, "--untrained", "--seed", seed]
        assert cli.run(embed) == 0
        untrained = ["classify", "probe", "-i", table, "--positive", "bright", "--folds", "2", "-o"]
        assert cli.run([*untrained, str(tmp_path / f"untrained{seed}")]) == 0
    assert (tmp_path / "few" / "classifier").is_dir()
    assert cli.run([*untrained, str(tmp_path / "few")]) == 0
    assert not (tmp_path / "few" / "classifier").exists(), "none stands beside results of other features"
    beside = ["compare", str(tmp_path / "lp"), *(str(tmp_path / f"untrained{seed}") for seed in (0, 1))]
    capfd.readouterr()
    assert cli.run([*beside, "-o", str(tmp_path / "cmp")]) == 0
    assert "any of 2 untrained" in capfd.readouterr().out
    rows = list(csv.DictReader((tmp_path / "cmp" / "comparison.csv").read_text().splitlines()))
    assert float(rows[3]["difference"]) == pytest.approx(
        (float(rows[1]["difference"]) + float(rows[2]["difference"])) / 2
    )
    assert cli.run(beside[:3]) == 0
    assert "one untrained encoder is one draw" in capfd.readouterr().err
    assert cli.run(["embed", "--weights", run, "-i", str(store.folder), "-o", "f.csv", "--seed", "1"]) == 2
    assert "add --untrained" in capfd.readouterr().err

    scans = write(tmp_path / "new", 3)
    (tmp_path / "new" / "broken.nii.gz").write_bytes(b"no scan")
    rows = list(csv.DictReader(scans.read_text().splitlines()))
    with scans.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["case_id", "image", "mask", "patient"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows([*rows, rows[0] | {"case_id": "broken", "image": "broken.nii.gz", "mask": ""}])
    for weights in (tmp_path / "ft", tmp_path / "lp" / "classifier"):
        out = tmp_path / f"new-{weights.name}"
        code = cli.run(["classify", "predict", "--weights", str(weights), "-i", str(scans), "-o", str(out)])
        assert code == ExitCode.REJECTED
        found = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
        assert [row["case_id"] for row in found] == ["c00", "c01", "c02"]
        assert all(
            float(row["probability_bright"]) + float(row["probability_dark"]) == pytest.approx(1) for row in found
        )
    shown = capfd.readouterr().err
    assert "E-FORMAT broken: " in shown or "broken.nii.gz" in shown
    attention = next(line for line in shown.splitlines() if line.startswith("Next: dagman attention --weights "))
    load_encoder(Path(attention.split()[4]))


def test_random_starts_fit_the_store_and_can_be_like_a_run(study, store):
    like = starting_encoder(None, str(study[0] / "fold-0"), 1, store)
    tuned = load_encoder(study[0] / "fold-0")
    assert (like.config, like.preparation) == (tuned.config, tuned.preparation)
    assert not torch.equal(next(like.parameters()), next(tuned.parameters()))
    coarse = PreparedStore(store.folder)
    coarse.settings = {**store.settings, "spacing_mm": 3.0}
    assert starting_encoder(None, "dagman-tiny", 0, coarse, CROP).preparation.spacing_mm == 3.0


def test_labelled_new_cases_test_a_classifier_and_those_it_learnt_from_do_not(study, store, tmp_path, capfd):
    command = ["classify", "predict", "--weights", str(study[0])]
    assert cli.run([*command, "-i", str(store.folder), "-o", str(tmp_path / "own")]) == 0
    assert "learnt from labels of 12 of these cases" in capfd.readouterr().err
    assert not (tmp_path / "own" / "tested").exists()
    scans = write(tmp_path / "raw", 6, radius=8, patients="elsewhere")
    assert cli.run([*command, "-i", str(scans), "-o", str(tmp_path / "new")]) == 0
    said = capfd.readouterr()
    assert "6 tested cases (3 dark, 3 bright), 6 patients, frozen classifier and threshold" in said.err
    found = predictions.read(tmp_path / "new" / "tested")
    assert found.thresholds == (np.mean([one.threshold for one in classifier.load(study[0])]),)
    result = json.loads((tmp_path / "new" / "tested" / "result.json").read_text())
    assert (result["cases"], result["patients"], result["group_by"]) == (6, 6, "patient")
    assert result["auc"]["value"] == found.auc().value > 0.8


@pytest.mark.parametrize("sides", ["64,64", "64,64,x"])
def test_a_crop_has_three_sides(store, tmp_path, capfd, sides):
    given = ["--weights", "none", "-i", str(store.folder), "-o", str(tmp_path), "--crop", sides]
    assert cli.run(["classify", "finetune", *given]) == ExitCode.USAGE
    assert "give three sides, such as 64,64,64" in capfd.readouterr().err


def test_cases_with_an_empty_mask_are_left_out_and_said(tmp_path, capfd):
    table = write(tmp_path / "raw")
    path = tmp_path / "raw" / "masks" / "c03.nii.gz"
    drawn = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.zeros(drawn.shape, np.uint8), drawn.affine), path)
    prepare([table], tmp_path / "store", PrepareConfig(storage="npy"))
    with pytest.raises(DagmanError, match=r"^E-NOMASK .*: holds 1 case with an empty mask \(c03\)"):
        watching.check(PreparedStore(tmp_path / "store"), small_study.PREPARATION)
    save_encoder(small_study.encoder(), tmp_path / "weights.safetensors", {})
    given = ["--weights", str(tmp_path / "weights.safetensors"), "-i", str(tmp_path / "store"), "--positive", "bright"]
    short = ["--folds", "2", "--steps", "2", "--batch-size", "2", "--check-every", "2"]
    folder = tmp_path / "study"
    assert cli.run(["classify", "finetune", *given, *short, "-o", str(folder)]) == ExitCode.REJECTED
    assert "E-NOMASK c03: its mask is empty; draw it" in capfd.readouterr().err
    result = json.loads((folder / "result.json").read_text())
    assert (result["cases"], result["empty_masks_left_out"]) == (11, 1)
    assert set(predictions.read(folder).case_ids) == {f"c{number:02}" for number in range(12)} - {"c03"}
    for part in (json.loads(path.read_text()) for path in folder.glob("fold-*/result.json")):
        assert "c03" not in part["identity"]["train"] + part["identity"]["held_out"] + part["identity"]["test"]


def test_a_store_of_empty_masks_alone_is_refused_before_anything_is_learnt(store, tmp_path):
    drawn = PreparedStore(store.folder)
    drawn.rows = [row | {"mask": row["mask"] | {"voxels": {}}} for row in store.rows]
    with pytest.raises(DagmanError, match=r"^E-NOMASK .*: holds 12 cases with an empty mask \(c00, .* and 7 more\)"):
        finetune(small_study.encoder(), drawn, tmp_path, STUDY)
    assert not list(tmp_path.iterdir())


def test_scans_that_a_classifier_did_not_learn_from_are_said(study, store, tmp_path, capfd):
    made = classifier.load(study[0])
    assert classifier.usable(made, store) == (list(range(12)), [])
    bare = PreparedStore(store.folder)
    bare.rows = [
        {**row, "mask": None if number < 2 else {**row["mask"], "voxels": {} if number == 5 else {"1": 9}}}
        for number, row in enumerate(store.rows)
    ]
    rows, said = classifier.usable(made, bare)
    assert rows == [number for number in range(12) if number != 5]
    assert said[0].startswith("E-NOMASK c05: its mask is empty")
    assert said[1].startswith("2 of 11 scans have no mask, but this classifier learnt from crops around masks")


def test_a_probe_as_classifier_says_what_the_probe_says(store, tmp_path):
    from dagman.tasks import classify as probing
    from dagman.tasks.leakage import Seen

    encoder = small_study.encoder()
    table = embed.embed(encoder, store)
    probe, names, learnt = probing.fit_all(table, Protocol(folds=2), positive="bright", unlabelled="refuse")
    assert learnt == set(table.case_ids)
    origin = Origin(tmp_path, "pooled", store.store_id, Seen(True, {}, {}), [], 0, None, [])
    made = classifier.from_probe(probe, names, encoder, origin)
    found, _ = classifier.predict([made], store)
    np.testing.assert_allclose(found.features, probe.probabilities(table.features.astype(float)), atol=1e-5)


def test_of_cases_with_several_crops_a_probes_classifier_averages_features(tmp_path):
    prepare([write(tmp_path / "raw", masks=False)], tmp_path / "store", PrepareConfig(storage="npy"))
    plain = PreparedStore(tmp_path / "store")
    small = dataclasses.replace(small_study.PREPARATION, crop=(32, 32, 32))  # of volumes 36 voxels wide: several crops
    encoder = small_study.encoder(preparation=small)
    table = embed.embed(encoder, plain)
    probe, names, _ = probing.fit_all(table, Protocol(folds=2), positive="bright", unlabelled="refuse")
    origin = Origin(tmp_path, "pooled", plain.store_id, leakage.Seen(True, {}, {}), [], 0, None, [])
    made = classifier.from_probe(probe, names, encoder, origin)
    classifier.save(made, tmp_path / "classifier")
    found, called = classifier.predict(classifier.load(tmp_path / "classifier"), plain)
    wanted = probe.probabilities(table.features.astype(float))
    np.testing.assert_allclose(found.features, wanted, atol=1e-5)
    assert [name == "bright" for name in called] == (wanted[:, 1] >= probe.threshold).tolist()
    per_crop = classifier.probabilities(made.network, plain)
    assert np.abs(per_crop.features - wanted).max() > 1e-3  # what this test is about


def test_features_and_probes_tell_the_sides_of_their_crops(store, tmp_path, capsys):
    save_encoder(small_study.encoder(), tmp_path / "run" / MODEL_FILE, {})
    features = str(tmp_path / "features.csv")
    assert cli.run(["embed", "--weights", str(tmp_path / "run"), "-i", str(store.folder), "-o", features]) == 0
    told = "12 of them by a crop of 64x64x128 mm around the centroid of the mask"
    assert told in capsys.readouterr().err
    asked = ["--positive", "bright", "--folds", "2"]
    assert cli.run(["classify", "probe", "-i", features, "-o", str(tmp_path / "probe"), *asked]) == 0
    assert "2 folds by patient, crops of 64x64x128 mm" in capsys.readouterr().err
    result = json.loads((tmp_path / "probe" / "result.json").read_text())
    assert (result["crop_mm"], result["preparation"]["crop"]) == ([64.0, 64.0, 128.0], list(CROP))
    assert result["crops_around"] == "the centroid of the mask"


def test_draws_of_all_patients_are_no_draws(tmp_path, capsys):
    asked = ["classify", "probe", "-i", str(tmp_path / "features.csv"), "-o", str(tmp_path / "probe"), "--draws", "3"]
    assert cli.run(asked) == ExitCode.USAGE
    assert "E-USAGE --draws: is of a part of the patients; give --fraction" in capsys.readouterr().err
    assert not (tmp_path / "probe").exists()


def test_of_features_alone_what_pretraining_saw_is_unknown(tmp_path, capsys):
    lines = [f"c{number},p{number},{'ab'[number % 2]},{number % 2 + number % 5},{number % 7}" for number in range(24)]
    (tmp_path / "features.csv").write_text("\n".join(["case_id,patient,label,f0,f1", *lines]) + "\n")
    asked = ["classify", "probe", "-i", str(tmp_path / "features.csv"), "--positive", "b", "-o"]
    assert cli.run([*asked, str(tmp_path / "probe")]) == 0
    told = capsys.readouterr().err
    assert told.count("Note: whether pretraining saw the tested cases is unknown") == 1
    overlap = json.loads((tmp_path / "probe" / "result.json").read_text())["pretraining_overlap"]
    assert (overlap["known"], overlap["patients_known"], overlap["tested"]) == (False, False, 24)
    shutil.copytree(tmp_path / "probe", tmp_path / "again")
    capsys.readouterr()
    assert cli.run(["compare", str(tmp_path / "probe"), str(tmp_path / "again")]) == 0
    assert "of all results together: whether pretraining saw the tested cases is unknown" in capsys.readouterr().err


def test_what_was_cut_elsewhere_is_another_study_and_is_told_apart(study, store, tmp_path, capsys):
    identity = json.loads((study[0] / "fold-0" / "result.json").read_text())["identity"]
    before = {name: value for name, value in identity.items() if name != "crops around"}
    assert "crops around" in str(configs.difference(before, identity))
    shutil.copytree(study[0], tmp_path / "older")
    told = json.loads((tmp_path / "older" / "result.json").read_text())
    (tmp_path / "older" / "result.json").write_text(json.dumps(told | {"crops_around": None}))
    assert cli.run(["compare", str(study[0]), str(tmp_path / "older"), "-o", str(tmp_path / "older")]) == 0
    assert "shown other windows, crops or spacings" in capsys.readouterr().err
    assert "auc" in json.loads((tmp_path / "older" / "result.json").read_text())


def test_whole_scans_without_masks_are_looked_at_everywhere(tmp_path):
    prepare([write(tmp_path / "raw", 8, masks=False)], tmp_path / "store", PrepareConfig(storage="npy"))
    plain = PreparedStore(tmp_path / "store")
    config = dataclasses.replace(STUDY, finetune=dataclasses.replace(QUICK, steps=2, check_every=2))
    assert finetune(small_study.encoder(), plain, tmp_path / "study", config)["cases"] == 8


@pytest.mark.parametrize(
    ("verb", "options", "said"),
    [
        ("classify finetune", ["--recipe", "dagman-tiny"], "--recipe: is of `--weights none`"),
        ("classify finetune", ["--frozen", "--layer-decay", "0.9"], "--layer-decay: is of an encoder that learns"),
        ("classify finetune", ["--draws", "2"], "--draws: is of a part of the patients"),
        ("classify finetune", ["--network", "resnet50", "--which", "all"], "--which: goes with an encoder"),
        ("segment train", ["--recipe", "dagman-tiny"], "--recipe: is of `--weights none`"),
    ],
)
def test_options_that_would_do_nothing_are_refused(store, tmp_path, capfd, verb, options, said):
    given = ["--weights", str(tmp_path), "-i", str(store.folder), "-o", str(tmp_path / "out"), *options]
    assert cli.run([*verb.split(), *given]) == ExitCode.USAGE
    assert said.split(":")[0] in (shown := capfd.readouterr().err)
    assert said.split(": ")[1] in shown


@pytest.mark.parametrize("verb", ["classify finetune", "segment train"])
def test_a_layer_decay_of_nothing_is_refused(store, tmp_path, capfd, verb):
    given = ["--weights", "none", "-i", str(store.folder), "-o", str(tmp_path / "out"), "--layer-decay", "0"]
    assert cli.run([*verb.split(), *given, "--crop", "32,32,64"]) == ExitCode.USAGE
    assert "layer_decay: cannot be 0" in capfd.readouterr().err


def test_a_probes_classifier_wants_scans_resampled_as_its_store_was(tmp_path):
    table, run = write(tmp_path / "raw"), tmp_path / "run"
    save_encoder(small_study.encoder(), run / "weights" / "model.safetensors", {})
    prepare([table], tmp_path / "linear", PrepareConfig(storage="npy", resampling="linear"))
    features, place = str(tmp_path / "features.csv"), str(tmp_path / "lp")
    assert cli.run(["embed", "--weights", str(run), "-i", str(tmp_path / "linear"), "-o", features]) == 0
    assert cli.run(["classify", "probe", "-i", features, "-o", place, "--positive", "bright", "--folds", "2"]) == 0
    (made,) = classifier.load(tmp_path / "lp" / "classifier")
    assert made.network.preparation == dataclasses.replace(small_study.PREPARATION, resampling="linear")
