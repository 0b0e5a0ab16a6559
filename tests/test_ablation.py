"""A family of runs: members are what their names say, what is known stays, and a failure stops nobody else.

Trainings are stood in for by encoders with random weights, but for one family that is trained.
"""

import csv
import json
import shutil
import signal
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import small_study
from dagman import ablation, cli, config, ct, files, recipes
from dagman.ablation import axes, loop, scores
from dagman.ct.store import FORMAT, MANIFEST, SETTINGS, PreparedStore, array_path, write_array
from dagman.errors import DagmanError, ExitCode
from dagman.figures import ablation as figure
from dagman.nets.encoder import new
from dagman.nets.weights import MODEL_FILE, load_encoder, save_encoder
from dagman.run import Run
from dagman.tasks import attention, cluster, diversity, family, leakage, predictions
from dagman.tasks.embed import untrained
from dagman.train.classify import ClassifyConfig, finetune
from dagman.train.pretrain import Result, pretrain
from dagman.train.settings import PretrainConfig
from dagman.types import Preparation, Scan

SMALL = {
    "encoder.embed_dim": "12",
    "encoder.depths": "1,1,1,1",
    "encoder.num_heads": "1,1,2,4",
    "method.heads.hidden_width": "32",
    "optimisation.batch_size": "1",
}


class Silent:
    """A listener that says nothing."""

    def on_start(self, step: int, total_steps: int) -> None: ...

    def on_step(self, row: Any) -> None: ...

    def on_message(self, text: str) -> None: ...


def base(**settings: str) -> PretrainConfig:
    return config.override(recipes.with_length(recipes.get("dagman-tiny"), 2, None), SMALL | settings)


def made(folder: Path, cases: range) -> PreparedStore:
    """Noise in two classes; a volume is one crop."""
    rows = []
    for case in cases:
        hu = np.random.default_rng(case).normal(-300, 200, (32, 32, 32)).astype(np.int16)
        path = array_path(folder, "volumes", f"case{case}", "npy")
        write_array(path, hu)
        rows.append(
            {
                "case_id": f"case{case}",
                "patient": f"p{case}",
                "label": "large" if case % 2 else "small",
                "shape": list(hu.shape),
                "affine": np.diag([2.0, 2.0, 2.0, 1.0]).tolist(),
                "bytes": path.stat().st_size,
                "sha256": files.sha256_file(path),
                "voxel_sha256": f"voxels{case}",
                "mask": None,
            }
        )
    settings = {"format": FORMAT, "storage": "npy", "spacing_mm": 2.0, "resampling": "antialiased"}
    files.write_json(folder / SETTINGS, settings)
    files.write_text(folder / MANIFEST, "".join(map(files.json_line, rows)))
    return PreparedStore(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PreparedStore:
    return made(tmp_path_factory.mktemp("prepared"), range(4))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> PreparedStore:
    """Twelve cases of which the training store holds one."""
    return made(tmp_path_factory.mktemp("labelled") / "nodules", range(3, 15))


class Trainings:
    """In place of `pretrain`: each gives an encoder whose random weights its settings decide."""

    def __init__(self) -> None:
        self.done: list[tuple[PretrainConfig, dict[str, Any]]] = []
        self.fails: dict[int, Exception | str] = {}
        """Number of a training to what it raises, or to its status."""

    def __call__(self, config: PretrainConfig, store: PreparedStore, folder: Path, **where: Any) -> Result:
        outcome = self.fails.get(len(self.done), "finished")
        self.done.append((config, where))
        if isinstance(outcome, Exception):
            raise outcome
        if outcome == "finished":
            seed = zlib.crc32(str(config.method).encode()) + config.optimisation.seed
            look = Preparation(crop=config.data.crop, window_hu=config.data.window_hu)
            save_encoder(new(config.encoder, look, seed), folder / MODEL_FILE, {})
            leakage.record(store.rows, folder)
            error = 1 + config.optimisation.seed / 10 - (config.method.hidden.kind == "attended") / 2
            Run(folder).add({"step": 1, "image_error_ratio": error}, durable=False)
        return Result(status=outcome, step=1, total_steps=1, folder=folder, stop_asked=outcome == "stopped")  # type: ignore[arg-type]


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    stand_in = Trainings()
    monkeypatch.setattr(loop, "pretrain", stand_in)
    monkeypatch.setattr(
        scores, "heads", lambda *_: {"stage 1: distance_mm": 3.0, "stage 1: distance_entropy_ratio": 0.9}
    )
    return stand_in


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of tables: the picture is blank, where drawing would take most of their time."""
    monkeypatch.setattr(figure, "draw", lambda *_, **__: Figure(figsize=(1, 1)))


def run(
    store: PreparedStore, folder: Path, axis: str = "hiding", seeds: Any = (0,), start: Any = None, **more: Any
) -> ablation.Outputs:
    start = start or base()
    return ablation.ablate(axis, start, store, folder, seeds=seeds, listener=lambda _: Silent(), say=str, **more)


def read(path: Path) -> tuple[str, list[dict[str, str]]]:
    """Heading and rows."""
    first, *lines = path.read_text().splitlines()
    return first, list(csv.DictReader(lines))


def test_members_are_what_their_names_say() -> None:
    losses = ablation.members_of("losses", base())
    assert [vars(member.method.losses) for member in losses.values()] == [
        {"amip": 1.0, "ampd": 0.0, "aitd": 0.0, "gitd": 0.0},
        {"amip": 1.0, "ampd": 0.3, "aitd": 0.0, "gitd": 0.0},
        {"amip": 1.0, "ampd": 0.3, "aitd": 1.0, "gitd": 0.0},
        {"amip": 1.0, "ampd": 0.0, "aitd": 1.0, "gitd": 1.0},
        {"amip": 0.0, "ampd": 0.3, "aitd": 1.0, "gitd": 1.0},
        {"amip": 1.0, "ampd": 0.3, "aitd": 1.0, "gitd": 1.0},
    ]
    settings = {"optimisation.batch_size": "2"}
    tiny = config.override(recipes.get("dagman-tiny"), settings)
    encoders = ablation.members_of("encoder", tiny, settings).values()
    assert [(one.recipe, one.encoder.kind, one.method.dropped_ratio) for one in encoders] == [
        ("smit-vit-tiny", "vit", 0.0),
        ("dagman-vit-tiny", "vit", 0.3),
        ("smit-swin-tiny", "swin", 0.0),
        ("dagman-tiny", "swin", 0.3),
    ]
    assert {one.optimisation.batch_size for one in encoders} == {2}
    for size in ("", "-tiny"):
        start = config.override(recipes.get(f"dagman-vit{size}"), settings)
        methods = ablation.members_of("methods", start, settings)
        assert list(methods) == list(recipes.METHODS)
        for name, member in methods.items():
            assert member == config.override(recipes.get(name + size), settings)
    members = ablation.members_of("hiding", base()).values()
    assert [(one.method.hidden.kind, one.method.dropped_ratio) for one in members] == [
        ("random", 0.0),
        ("attended", 0.0),
        ("random", 0.3),
        ("attended", 0.3),
    ]
    roomy = base(**{"data.crop": "64,64,64"})
    stages = ablation.members_of("stage", roomy).values()
    assert [member.encoder.attention.stage for member in stages] == [1, 2, 3, 4]
    for axis in ("losses", "hiding", "stage"):
        for member in ablation.members_of(axis, roomy).values():
            back = replace(member, method=roomy.method, encoder=roomy.encoder)
            assert back == roomy, "nothing else differs"


@pytest.mark.parametrize("name", sorted(recipes.RECIPES.keys() - set(axes.BASES)))
def test_what_is_not_dagman_is_not_taken_apart(name: str) -> None:
    with pytest.raises(
        DagmanError, match=rf"^E-RECIPE {name}: is not DAGMaN.*; give dagman-swin, .* or dagman-vit-tiny$"
    ):
        ablation.members_of("losses", recipes.get(name))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method.hidden.kind": "random"}, "hidden: attended -> random"),
        ({"method.hidden.hints": "none"}, "hints: True -> False"),
        ({"method.dropped_ratio": "0"}, "noisy teacher: True -> False"),
        ({"method.losses.gitd": "0"}, "gitd: True -> False"),
        ({"encoder.kind": "vit"}, "encoder: swin -> vit"),
    ],
)
def test_settings_that_make_it_another_method_are_refused(settings: dict[str, str], told: str) -> None:
    changed = config.override(recipes.get("dagman-swin"), settings)
    with pytest.raises(DagmanError, match=rf"^E-RECIPE dagman-swin: .*{told}"):
        ablation.members_of("hiding", changed)


def test_members_with_recipes_of_their_own_stay_what_they_are() -> None:
    settings = {"method.dropped_ratio": "0.5"}
    with pytest.raises(DagmanError, match=r"^E-RECIPE smit-vit: .*noisy teacher: False -> True"):
        ablation.members_of("encoder", config.override(recipes.get("dagman-swin"), settings), settings)


def test_a_setting_that_a_member_does_not_have_names_the_member() -> None:
    with pytest.raises(DagmanError, match=r"^E-CONFIG encoder.embed_dim: is not known in smit-vit, a member"):
        ablation.members_of("encoder", recipes.get("dagman-swin"), {"encoder.embed_dim": "24"})


def test_hiding_that_starts_after_the_run_is_refused(store: PreparedStore, tmp_path: Path) -> None:
    late: dict[str, object] = {"method.hidden.start_step": 10}
    with pytest.raises(
        DagmanError, match=r"^E-CONFIG method.hidden.start_step: is 10, and the run ends after 10 steps"
    ):
        config.override(recipes.with_length(recipes.get("dagman-tiny"), 10, None), late)
    assert config.override(recipes.with_length(recipes.get("dagman-tiny"), 11, None), late)
    long = config.override(recipes.with_length(recipes.get("dagman-tiny"), None, 1), late)
    with pytest.raises(DagmanError, match=r"^E-CONFIG method.hidden.start_step: is 10"):
        pretrain(long, store, tmp_path / "run", device="cpu")


def test_a_vit_has_no_stages_and_none_of_the_numbers_of_the_paper_s_swin() -> None:
    vit = recipes.get("dagman-vit-tiny")
    with pytest.raises(DagmanError, match=r"^E-RECIPE dagman-vit-tiny: is a ViT, which has no stages"):
        ablation.members_of("stage", vit)
    assert not any(axes.papers("losses", vit).values())
    assert all(axes.papers("encoder", vit).values())


def test_an_unknown_axis_is_refused() -> None:
    with pytest.raises(DagmanError, match=r"E-AXIS.*did you mean hiding"):
        ablation.members_of("hidding", base())


def test_facts_tell_the_cells_of_each_stage() -> None:
    members = ablation.members_of("stage", recipes.get("dagman-swin"))
    told = [axes.facts(member, 2.0) for member in members.values()]
    assert [one["cells"] for one in told] == [32768, 4096, 512, 64]
    assert [one["cell_mm"] for one in told] == [8, 16, 32, 64]
    assert [(one["hidden cells"], one["hints"]) for one in told][2:] == [(307, 51), (38, 6)]
    random = ablation.members_of("hiding", recipes.get("dagman-swin"))["random"]
    assert (axes.facts(random, 2.0)["hidden cells"], axes.facts(random, 2.0)["hints"]) == (359, 0)


def test_a_member_that_does_not_fit_is_refused_before_any_is_trained(
    store: PreparedStore, tmp_path: Path, trainings: Trainings
) -> None:
    with pytest.raises(DagmanError, match=r"E-CROP crop 32x32x32.*fewer than 8"):
        run(store, tmp_path, "stage")
    assert not trainings.done


def test_labels_that_cannot_be_probed_are_refused_before_any_is_trained(
    store: PreparedStore, labelled: PreparedStore, tmp_path: Path, trainings: Trainings
) -> None:
    for name, change, code in (
        ("unlabelled", {"label": None}, "LABEL"),
        ("twins", {"voxel_sha256": "the same"}, "LEAK"),
    ):
        folder = tmp_path / name
        files.write_json(folder / SETTINGS, labelled.settings)
        files.write_text(folder / MANIFEST, "".join(files.json_line({**row, **change}) for row in labelled.rows))
        with pytest.raises(DagmanError, match=f"E-{code}"):
            run(store, tmp_path / "out", labelled=PreparedStore(folder))
    three = PreparedStore(labelled.folder)
    three.rows = [row | {"label": "abc"[place % 3]} for place, row in enumerate(labelled.rows)]
    with pytest.raises(DagmanError, match=r"E-LABEL.*labels of 3 classes"):
        run(store, tmp_path / "out", labelled=three)
    assert not trainings.done


def test_a_family_is_trained_scored_and_done_once(
    store: PreparedStore, labelled: PreparedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = tuple(one for one in axes.AXES["hiding"].variants if one.noisy)
    monkeypatch.setitem(axes.AXES, "hiding", replace(axes.AXES["hiding"], variants=two))
    short = base(**{"optimisation.steps": "1"})
    monkeypatch.setattr("dagman.train.pretrain.EXAMINED", 4)
    for drawing in ("draw", "draw_crops"):
        monkeypatch.setattr(f"dagman.train.pretrain.{drawing}", lambda *_: None)
    outputs = run(store, tmp_path, start=short, labelled=labelled, finetune=1)
    assert (outputs.complete, outputs.failed) == (True, 0)
    heading, rows = read(outputs.table)
    assert heading.startswith(
        "# Attended hiding and the noisy teacher (Figure 4). Here: dagman-tiny; 4 volumes, 1 steps"
    )
    for said in (
        "all features (pooled, cells and [CLS])",
        "'small' (the positive class) against 'large', 12 cases of 12 patients in the store '",
        "/nodules'. The training store holds 1 of these cases (8%)",
        "another quantity",
        "Fine-tuned: all layers and a linear one on pooled features, 1 steps of 16 crops in each of the probe's folds",
        "Not computed here: organ clusters (`--organs STORE`).",
    ):
        assert said in heading
    assert [(row["variant"], row["seed"], row["status"]) for row in rows] == [
        ("random, noisy teacher", "0", "scored"),
        ("attended, noisy teacher", "0", "scored"),
        ("untrained", "", "untrained"),
    ]
    assert all(0 <= float(row["probe AUC"]) <= 1 for row in rows)
    first, new = tmp_path / "runs" / rows[0]["run"], next((tmp_path / "untrained").iterdir())
    for place, encoder, weights, row in (
        (first, load_encoder(first), first, rows[0]),
        (new, untrained(load_encoder(first)), None, rows[2]),
    ):
        learning = replace(ClassifyConfig().finetune, steps=1, layer_decay=0.75 if weights else 1.0)
        how = ClassifyConfig(finetune=learning, positive="small", unlabelled="leave_out")
        expected = finetune(encoder, labelled, tmp_path.parent / place.name, how, weights=weights)
        for end, name in (("value", ""), ("low", " low"), ("high", " high")):
            assert float(row[f"fine-tuned AUC{name}"]) == expected["auc"][end]
        (tuned,) = (place / "finetuned").iterdir()
        (probe,) = [one.parent for one in place.rglob("probe.json")]
        predictions.check_comparable(predictions.read(probe), predictions.read(tuned))
    assert all(0 < float(row["clean_attention_entropy"]) <= 1 for row in rows[:2]), "random hiding has it too"
    looks = diversity.head_diversity(load_encoder(tmp_path / "runs" / rows[0]["run"]), store)
    (first, *_) = diversity.summary({"run": looks})
    assert float(rows[0]["stage 1: distance_entropy"]) == pytest.approx(first["distance_entropy"]["value"])
    assert outputs.picture.read_bytes().startswith(b"\x89PNG")
    before = [(path, path.read_bytes()) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    monkeypatch.setattr(loop, "pretrain", None)
    monkeypatch.setattr(scores, "probe", None)
    monkeypatch.setattr(scores, "finetune", None)
    run(store, tmp_path, start=short, labelled=labelled, finetune=1)
    assert [(path, path.read_bytes()) for path, _ in before] == before


@pytest.mark.usefixtures("undrawn")
def test_the_paper_s_tables_are_in_the_csv(store: PreparedStore, tmp_path: Path, trainings: Trainings) -> None:
    _, rows = read(run(store, tmp_path, "losses").table)
    terms = ("AMIP", "AMPD", "AITD", "GITD")
    found = [("".join(row[term] or "-" for term in terms), row["paper: AUC, malignancy, fine-tuned"]) for row in rows]
    assert found == [
        ("x---", "0.859"),
        ("xx--", "0.869"),
        ("xxx-", "0.878"),
        ("x-xx", "0.865"),
        ("-xxx", "0.829"),
        ("xxxx", "0.895"),
    ]
    heading, rows = read(run(store, tmp_path, "encoder", start=recipes.get("dagman-tiny")).table)
    assert "smit-vit-tiny, dagman-vit-tiny, smit-swin-tiny, dagman-tiny" in heading
    names = ("AUC, malignancy, linear probe", "AUC, malignancy, fine-tuned")
    names += tuple(f"cluster distance, {what}" for what in ("intra-cluster", "intra-cluster SD", "inter-cluster"))
    assert [[row["recipe"], *(float(row[f"paper: {name}"]) for name in names)] for row in rows] == [
        ["smit-vit-tiny", 0.643, 0.816, 1.30, 0.51, 6.44],
        ["dagman-vit-tiny", 0.662, 0.847, 1.15, 0.41, 6.59],
        ["smit-swin-tiny", 0.629, 0.859, 1.53, 0.45, 3.73],
        ["dagman-tiny", 0.642, 0.895, 1.28, 0.57, 5.93],
    ]
    assert [row["AITD"] for row in rows] == ["", "x", "", "x"]


@pytest.mark.usefixtures("undrawn")
def test_a_stop_leaves_a_table_that_says_so_and_goes_on(
    store: PreparedStore, tmp_path: Path, trainings: Trainings
) -> None:
    trainings.fails = {2: "stopped"}
    outputs = run(store, tmp_path)
    heading, rows = read(outputs.table)
    assert not outputs.complete
    assert heading.startswith("# Attended hiding and the noisy teacher (Figure 4), 2 of 4 runs.")
    assert [row["variant"] for row in rows] == ["random", "attended"]
    outputs = run(store, tmp_path)
    heading, rows = read(outputs.table)
    assert outputs.complete
    assert "of 4 runs" not in heading
    assert len(rows) == 4
    assert len(trainings.done) == 5, "what was finished is not trained again"


class StopAt(Silent):
    """Asks for a stop, by a signal, while a step is recorded."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, row: Any) -> None:
        if row["step"] == self.step:
            signal.raise_signal(signal.SIGINT)


def test_a_stop_that_comes_too_late_for_a_run_starts_no_other(
    store: PreparedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dagman.train.pretrain.EXAMINED", 4)
    for drawing in ("draw", "draw_crops"):
        monkeypatch.setattr(f"dagman.train.pretrain.{drawing}", lambda *_: None)
    monkeypatch.setattr(scores, "heads", lambda *_: {"stage 1: distance_mm": 3.0})
    given = ("hiding", base(**{"optimisation.steps": "1"}), store, tmp_path)
    outputs = ablation.ablate(*given, seeds=(0,), listener=lambda _: StopAt(1), say=str)
    assert not outputs.complete
    heading, rows = read(outputs.table)
    assert "1 of 4 runs" in heading
    assert [(row["variant"], row["status"]) for row in rows] == [("random", "scored")], "it counts as finished"
    assert len(list((tmp_path / "runs").iterdir())) == 1
    started = []
    outputs = ablation.ablate(*given, seeds=(0,), listener=lambda name: started.append(name) or Silent(), say=str)
    assert outputs.complete
    assert started == ["attended", "random, noisy teacher", "attended, noisy teacher"]


def test_a_stop_in_the_step_that_ends_a_run_as_unhealthy_starts_no_other(
    store: PreparedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dagman.train.pretrain.EXAMINED", 4)
    for drawing in ("draw", "draw_crops"):
        monkeypatch.setattr(f"dagman.train.pretrain.{drawing}", lambda *_: None)
    diverges = {"optimisation.learning_rate": "1e30", "optimisation.warmup_ratio": "0", "optimisation.steps": "20"}
    given = ("hiding", base(**diverges), store, tmp_path)
    outputs = ablation.ablate(*given, seeds=(0,), listener=lambda _: StopAt(7), say=str)
    assert (outputs.complete, outputs.failed) == (False, 1)
    assert [(row["variant"], row["status"]) for row in read(outputs.table)[1]] == [("random", "failed: E-UNHEALTHY")]
    assert len(list((tmp_path / "runs").iterdir())) == 1


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the members of the family."""
    noisy = tuple(one for one in axes.AXES["hiding"].variants if one.noisy)
    monkeypatch.setitem(axes.AXES, "hiding", replace(axes.AXES["hiding"], variants=noisy))


@pytest.mark.usefixtures("two")
def test_a_stop_while_fine_tuning_ends_the_call_and_the_next_goes_on(
    store: PreparedStore, labelled: PreparedStore, tmp_path: Path, trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[figure.Panel]] = []
    monkeypatch.setattr(figure, "draw", lambda _, panels, *__, **___: drawn.append(panels) or Figure(figsize=(1, 1)))
    steps: list[int] = []

    def stop(done: int, total: int, note: str) -> None:
        steps.append(done)
        if len(steps) == 3:  # the first of the second fold
            signal.raise_signal(signal.SIGINT)

    asked: dict[str, Any] = {"labelled": labelled, "finetune": 2}
    outputs = run(store, tmp_path, **asked, progress=stop)
    assert (outputs.complete, outputs.failed, len(trainings.done)) == (False, 0, 1)
    heading, rows = read(outputs.table)
    assert [(row["status"], bool(row["probe AUC"]), "fine-tuned AUC" in row) for row in rows] == [
        ("scored", True, False),
        ("untrained", True, False),
    ]
    assert "AUC after fine-tuning" in heading
    outputs = run(store, tmp_path, **asked, progress=stop)
    assert outputs.complete
    assert steps[3:] == [2, *[1, 2] * 7], "the second fold goes on, the first is not learnt again"
    first, (_, rows) = outputs.table.read_text(), read(outputs.table)
    assert [bool(row["fine-tuned AUC"]) for row in rows] == [True] * 3
    _, lines = read(outputs.summary)
    (line,) = [one for one in lines if one["measure"] == "fine-tuned AUC" and one["minus full: mean"]]
    places = [next((tmp_path / "runs" / row["run"] / "finetuned").iterdir()) for row in rows[:2]]
    expected = predictions.difference(*map(predictions.read, places))
    assert float(line["minus full: mean"]) == pytest.approx(expected.value)
    assert (float(line["minus full: low"]), float(line["minus full: high"])) == (expected.low, expected.high)
    panels = {panel.title: panel for panel in drawn[-1]}
    names = ["random, noisy teacher", "attended, noisy teacher"]
    assert panels["fine-tuned, AUC (here)"].points == {
        name: {0: float(row["fine-tuned AUC"])} for name, row in zip(names, rows, strict=False)
    }
    assert panels["fine-tuned, AUC (here)"].baselines == dict.fromkeys(names, float(rows[2]["fine-tuned AUC"]))
    assert panels[f"fine-tuned AUC less that of '{names[1]}'"].bars == {names[0]: (expected.low, expected.high)}
    steps.clear()
    monkeypatch.setattr(scores, "probe", None)

    def note(done: int, total: int, text: str) -> None:
        steps.append(done)

    others = run(store, tmp_path, labelled=labelled, finetune=1, progress=note).table.read_text()
    assert (steps, others != first, len(trainings.done)) == ([1] * 9, True, 2), "other steps ask fine-tuning alone"
    assert run(store, tmp_path, **asked, progress=note).table.read_text() == first
    assert run(store, tmp_path).table.read_text() == first, "without, those of the last call"
    assert len(steps) == 9


@pytest.mark.usefixtures("undrawn", "two")
def test_fine_tuning_that_fails_is_a_row_and_mirrors_no_sides(
    store: PreparedStore, labelled: PreparedStore, tmp_path: Path, trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = tmp_path / "sides"
    files.write_json(sides / SETTINGS, labelled.settings)
    renamed = [row | {"label": "left" if row["label"] == "small" else "right"} for row in labelled.rows]
    files.write_text(sides / MANIFEST, "".join(map(files.json_line, renamed)))
    (sides / "volumes").symlink_to(labelled.folder / "volumes")
    asked: dict[str, Any] = {"labelled": PreparedStore(sides), "finetune": 1}
    with monkeypatch.context() as patched:
        error = DagmanError("UNHEALTHY", "run", "diverged", "lower the rate", exit_code=ExitCode.UNHEALTHY)
        calls = iter([error])

        def fails_once(*given: Any, **how: Any) -> Any:
            for error in calls:
                raise error
            return finetune(*given, **how)

        patched.setattr(scores.classify, "finetune", fails_once)
        outputs = run(store, tmp_path / "family", **asked)
    assert (outputs.complete, outputs.failed) == (True, 1)
    _, rows = read(outputs.table)
    assert [row["status"] for row in rows] == ["failed: E-UNHEALTHY", "scored", "untrained"]
    assert [bool(row["probe AUC"]) for row in rows] == [True] * 3
    assert [bool(row["fine-tuned AUC"]) for row in rows] == [False, True, True]
    outputs = run(store, tmp_path / "family", **asked)
    assert [(row["status"], bool(row["fine-tuned AUC"])) for row in read(outputs.table)[1]][:2] == [
        ("scored", True)
    ] * 2
    assert (outputs.failed, len(trainings.done)) == (0, 2)
    told = json.loads(next((tmp_path / "family" / "runs").glob("*/finetuned/*/result.json")).read_text())
    assert told["settings"]["keep_sides"]


@pytest.mark.parametrize(("steps", "with_labels", "code"), [(5, False, "USAGE --finetune"), (0, True, "CONFIG")])
def test_fine_tuning_that_cannot_be_is_refused_before_any_training(
    store: PreparedStore,
    labelled: PreparedStore,
    tmp_path: Path,
    trainings: Trainings,
    steps: int,
    with_labels: bool,
    code: str,
) -> None:
    asked: dict[str, Any] = {"labelled": labelled if with_labels else None, "finetune": steps}
    with pytest.raises(DagmanError, match=f"^E-{code}"):
        run(store, tmp_path, **asked)
    with pytest.raises(DagmanError, match=f"^E-{code}"):
        ablation.left("hiding", base(), store, tmp_path, seeds=(0,), **asked)
    assert not trainings.done


def test_the_comparison_is_written_after_every_run(store: PreparedStore, tmp_path: Path, trainings: Trainings) -> None:
    trainings.fails = {1: RuntimeError("killed")}
    with pytest.raises(RuntimeError, match="killed"):
        run(store, tmp_path)
    heading, rows = read(tmp_path / "hiding.csv")
    assert "1 of 4 runs" in heading
    assert [row["variant"] for row in rows] == ["random"]
    assert (tmp_path / "hiding.png").exists()
    assert (tmp_path / "hiding-summary.csv").exists()


def test_a_failed_member_is_a_row_and_stops_nobody(store: PreparedStore, tmp_path: Path, trainings: Trainings) -> None:
    trainings.fails = {1: DagmanError("UNHEALTHY", "run", "diverged", "lower the rate", exit_code=ExitCode.UNHEALTHY)}
    outputs = run(store, tmp_path)
    heading, rows = read(outputs.table)
    assert (outputs.complete, outputs.failed) == (True, 1)
    assert "3 of 4 runs" in heading
    assert [row["status"] for row in rows] == ["scored", "failed: E-UNHEALTHY", "scored", "scored"]
    assert [bool(row["image_error_ratio"]) for row in rows] == [True, False, True, True]
    outputs = run(store, tmp_path)
    assert outputs.failed == 0
    assert [row["status"] for row in read(outputs.table)[1]] == ["scored"] * 4


def test_what_lies_beside_the_runs_is_no_run(store: PreparedStore, tmp_path: Path, trainings: Trainings) -> None:
    """What `pretrain --fresh` moved aside, and a copy."""
    run(store, tmp_path)
    member = next((tmp_path / "runs").glob("*-seed0"))
    for ending in (".20261129-111749", " (copy)"):
        shutil.copytree(member, member.with_name(member.name + ending))
    assert [row["status"] for row in read(run(store, tmp_path).table)[1]] == ["scored"] * 4


def test_what_would_meet_every_member_ends_the_call(store: PreparedStore, tmp_path: Path, trainings: Trainings) -> None:
    trainings.fails = {1: DagmanError("DISK", "run", "is full", "make room", exit_code=ExitCode.RESOURCES)}
    with pytest.raises(DagmanError, match="E-DISK"):
        run(store, tmp_path)
    assert len(trainings.done) == 2


def test_what_is_left_is_counted_and_measured(store: PreparedStore, tmp_path: Path, trainings: Trainings) -> None:
    trainings.fails = {1: DagmanError("UNHEALTHY", "run", "diverged", "lower the rate", exit_code=ExitCode.UNHEALTHY)}
    run(store, tmp_path)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    left = ablation.left("hiding", base(), store, tmp_path, seeds=(0,))
    assert [(one.finished, one.runs, one.run_seconds > 0) for one in left] == [
        (1, 0, False),
        (0, 1, True),
        (1, 0, False),
        (1, 0, False),
    ]
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    with pytest.raises(DagmanError, match="E-RESUME"):
        ablation.left("hiding", base(**{"optimisation.steps": "3"}), store, tmp_path, seeds=(0,))
    assert len(trainings.done) == 4


@pytest.mark.usefixtures("undrawn")
def test_later_calls_keep_seeds_and_scores(
    store: PreparedStore, labelled: PreparedStore, tmp_path: Path, trainings: Trainings
) -> None:
    outputs = run(store, tmp_path, seeds=(0, 1), labelled=labelled)
    _, rows = read(outputs.table)
    assert [row["seed"] for row in rows] == ["0"] * 4 + ["1"] * 4 + [""]
    before = outputs.table.read_text(), outputs.summary.read_text()
    run(store, tmp_path, seeds=(0,))
    assert (outputs.table.read_text(), outputs.summary.read_text()) == before, "fewer seeds, no labels: all is kept"
    others = made(tmp_path / "others", range(20, 32))
    probed = [row["probe AUC"] for row in read(run(store, tmp_path, labelled=others).table)[1]]
    assert [bool(value) for value in probed] == [True] * 4 + [False] * 4 + [True]
    run(store, tmp_path, labelled=labelled)
    assert (outputs.table.read_text(), outputs.summary.read_text()) == before, "scores are kept for each set of labels"
    assert len(trainings.done) == 8


@pytest.fixture
def plain_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two columns in place of a UMAP, whose import takes seconds."""
    monkeypatch.setattr(cluster, "require_umap", lambda: None)
    monkeypatch.setattr(cluster, "lay_out", lambda features, *, seed: features[:, :2])


@pytest.mark.usefixtures("undrawn", "plain_map")
def test_organs_are_laid_out_once_a_run_and_kept(
    store: PreparedStore, tmp_path: Path, trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = {f"c{number}": small_study.case(number, labels=2) for number in range(3)}
    organs, folder = small_study.store(tmp_path / "organs", cases), tmp_path / "family"
    asked = ablation.Organs(store=organs, names={1: "bright", 2: "dark"})
    outputs = run(store, folder, organs=asked)
    heading, rows = read(outputs.table)
    assert "Organs: 24 crops of 6 structures, 2 classes, in 3 patients of the store 'store'; pooled" in heading
    assert "Not computed here: AUC after fine-tuning (`--finetune STEPS`)." in heading
    found = cluster.compare({"run": load_encoder(folder / "runs" / rows[0]["run"])}, organs, asked.places)
    for name, meaning in cluster.MEANINGS.items():
        told = [row[meaning] for row in rows]
        assert len(set(told[:4])) == 4 or name == "knn", "every run has its own"
        estimate = found["run"].estimate(name)
        assert float(told[0]) == pytest.approx(estimate.value)
        kept = json.loads(next((folder / "runs" / rows[0]["run"]).rglob("clusters.json")).read_text())
        assert kept["measures"][meaning] == vars(estimate)
        assert float(told[4]) == pytest.approx(found["untrained"].estimate(name).value)
    drawn: list[Any] = []
    monkeypatch.setattr(ablation.comparison.clusters_figure, "png", lambda panels: drawn.append(panels) or b"")
    before = outputs.table.read_text()
    monkeypatch.setattr(scores, "clusters", lambda *_: pytest.fail("what is known is asked again"))
    assert run(store, folder, seeds=(0,), organs=asked).table.read_text() == before
    run(store, folder)
    assert outputs.table.read_text() == before, "without organs, those of the last call"
    first = [f"{name}, seed 0" for name in ablation.members_of("hiding", base())]
    assert [panel.title for panel in drawn[-1]] == [*first, "untrained"]
    np.testing.assert_allclose(drawn[-1][0].map, found["run"].map, atol=1e-3)
    assert drawn[-1][0].labels == list(found["run"].table.labels)
    assert set(drawn[-1][0].labels) == {"bright", "dark"}


@pytest.mark.usefixtures("undrawn", "plain_map")
def test_a_variant_s_first_seed_with_organs_is_drawn(
    store: PreparedStore, tmp_path: Path, trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = {f"c{number}": small_study.case(number, labels=2) for number in range(3)}
    organs = ablation.Organs(store=small_study.store(tmp_path / "organs", cases))
    drawn: list[Any] = []
    monkeypatch.setattr(ablation.comparison.clusters_figure, "png", lambda panels: drawn.append(panels) or b"")
    trainings.fails = {1: DagmanError("UNHEALTHY", "run", "diverged", "lower the rate", exit_code=ExitCode.UNHEALTHY)}
    run(store, tmp_path / "family", seeds=(0, 1), organs=organs)
    assert [panel.title for panel in drawn[-1]][:2] == ["random, seed 0", "attended, seed 1"]


def test_organs_are_others_with_other_patients_labels_or_names(tmp_path: Path) -> None:
    made = small_study.store(tmp_path, {f"c{number}": small_study.case(number, labels=2) for number in range(2)})
    identities = {ablation.Organs(store=made).identity, ablation.Organs(store=made, names={1: "a"}).identity}
    for change in ({"patient": "one"}, {"label": "x"}, {"mask": made.rows[0]["mask"] | {"names": {"1": "a"}}}):
        other = PreparedStore(made.folder)
        other.rows = [row | change for row in made.rows]
        identities.add(ablation.Organs(store=other).identity)
    assert len(identities) == 5


@pytest.mark.usefixtures("undrawn", "plain_map")
def test_whole_cases_without_patients_are_laid_out_and_stamped(
    store: PreparedStore, tmp_path: Path, trainings: Trainings
) -> None:
    cases = made(tmp_path / "cases", range(3, 9))
    cases.rows = [row | {"patient": None} for row in cases.rows]
    outputs = run(store, tmp_path / "family", organs=ablation.Organs(store=cases))
    heading, rows = read(outputs.table)
    assert (
        "Organs: 6 crops of whole cases, 2 classes, in 6 cases of the store 'cases', which knows no patients" in heading
    )
    assert all(row[cluster.MEANINGS["silhouette"]] for row in rows)


@pytest.mark.usefixtures("plain_map")
def test_what_cannot_be_asked_is_refused_before_any_training(
    store: PreparedStore, tmp_path: Path, trainings: Trainings
) -> None:
    one = small_study.store(tmp_path / "one", {f"c{number}": small_study.case(number) for number in range(2)})
    without = small_study.store(tmp_path / "none", {"c": (small_study.case(0)[0], None)})
    broken = tmp_path / "ct.nii.gz"
    nibabel.save(nibabel.Nifti1Image(small_study.case(0)[0], np.eye(4)), broken)
    broken.write_bytes(broken.read_bytes()[:9000])
    asked: list[tuple[dict[str, Any], str]] = [
        ({"organs": ablation.Organs(store=one)}, "LABEL"),
        ({"organs": ablation.Organs(store=without)}, "LABEL"),
        ({"organs": ablation.Organs(store=one, names={})}, "NOMASK"),
        ({"scan": Scan(case_id="ct", files=(broken,), kind="nifti")}, "GZIP"),
    ]
    for question, code in asked:
        with pytest.raises(DagmanError, match=f"^E-{code}"):
            run(store, tmp_path / "family", **question)
        with pytest.raises(DagmanError, match=f"^E-{code}"):
            ablation.left("hiding", base(), store, tmp_path / "family", seeds=(0,), **question)
    assert not trainings.done


@pytest.mark.usefixtures("undrawn")
def test_a_ct_shows_where_each_variant_that_has_attention_looks(
    store: PreparedStore, tmp_path: Path, trainings: Trainings
) -> None:
    path, folder = tmp_path / "ct.nii.gz", tmp_path / "family"
    nibabel.save(nibabel.Nifti1Image(small_study.case(0)[0], np.diag([2.0, 2.0, 2.0, 1.0])), path)
    settings = {"optimisation.batch_size": "1"}
    start = config.override(recipes.with_length(recipes.get("dagman-tiny"), 2, None), settings)
    said: list[str] = []
    scan = Scan(case_id="ct", files=(path,), kind="nifti")
    more: dict[str, Any] = {"settings": settings, "listener": lambda _: Silent(), "say": said.append, "scan": scan}
    outputs = ablation.ablate("encoder", start, store, folder, seeds=(1, 0), **more)
    assert outputs.failed == 0
    maps = folder / "encoder-attention"
    written = [maps / name for name in ("ct_attention.png", "attention.csv", "result.json")]
    assert said[-1] == f"wrote {', '.join(map(str, written))}"
    assert "attention maps" not in read(outputs.table)[0], "the heading knows of the maps that this call drew"
    with (maps / "attention.csv").open() as stream:
        assert {row["weights"] for row in csv.DictReader(stream)} == {
            f"{name}, seed 0" for name in ("SMIT, ViT", "DAGMaN, ViT", "DAGMaN, Swin")
        }
    runs = {row["variant"]: row["run"] for row in read(outputs.table)[1] if row["seed"] == "0"}
    volume = ct.read.read(scan)
    for name in ("SMIT, ViT", "DAGMaN, ViT", "DAGMaN, Swin"):
        expected = attention.attention_map(load_encoder(folder / "runs" / runs[name]), volume)
        shown = nibabel.load(maps / f"ct_{name.replace(', ', '_')}_seed_0_attention.nii.gz").get_fdata()
        np.testing.assert_allclose(shown, expected, atol=1e-5)
    (folder / "runs" / runs["SMIT, ViT"] / MODEL_FILE).unlink()
    said.clear()
    assert ablation.ablate("encoder", start, store, folder, seeds=(0,), **more).failed == 0
    assert any(line.startswith("E-WEIGHTS") for line in said)
    with (maps / "attention.csv").open() as stream:
        assert "SMIT, ViT, seed 1" in {row["weights"] for row in csv.DictReader(stream)}, "the next seed stands in"


@pytest.mark.usefixtures("undrawn")
def test_axes_share_runs_and_a_folder_compares_one_base(
    store: PreparedStore, tmp_path: Path, trainings: Trainings
) -> None:
    run(store, tmp_path)
    run(store, tmp_path, "losses")
    assert len(trainings.done) == 4 + 6 - 1
    with pytest.raises(DagmanError, match=r"^E-RESUME .*hiding.json: .*optimisation.steps: 2 -> 3") as caught:
        run(store, tmp_path, start=base(**{"optimisation.steps": "3"}))
    assert caught.value.exit_code == ExitCode.REFUSED
    run(store, tmp_path, start=base(**{"optimisation.examine_every": "7"}))
    assert len(trainings.done) == 9, "how often they are examined makes no other runs"
    run(store, tmp_path, start=base(**{"optimisation.seed": "7"}))
    assert len(trainings.done) == 9, "the seed of the base means nothing"


@pytest.mark.usefixtures("undrawn")
def test_devices_and_workers_reach_the_training(store: PreparedStore, tmp_path: Path, trainings: Trainings) -> None:
    run(store, tmp_path, device="cpu", devices=2, workers=3)
    asked = [{name: where[name] for name in ("device", "devices", "workers")} for _, where in trainings.done]
    assert asked == [{"device": "cpu", "devices": 2, "workers": 3}] * 4


def test_summaries_pair_seeds_and_draw_patients_again(
    store: PreparedStore, labelled: PreparedStore, tmp_path: Path, trainings: Trainings
) -> None:
    outputs = run(store, tmp_path, seeds=(0, 1), labelled=labelled)
    _, rows = read(outputs.table)
    _, lines = read(outputs.summary)
    found = {(line["measure"], line["variant"]): line for line in lines}
    error = found["image_error_ratio", "random"]
    assert [float(error[name]) for name in ("seeds", "mean", "lowest", "highest")] == pytest.approx([2, 1.05, 1.0, 1.1])
    assert [float(error[f"minus full: {name}"]) for name in ("seeds", "mean")] == pytest.approx([2, 0.5])
    assert error["minus full: low"] == ""
    auc = found["probe AUC", "random"]
    full = "attended, noisy teacher"
    places = {
        (row["variant"], row["seed"]): next((tmp_path / "runs" / row["run"] / "probes").iterdir()) for row in rows[:8]
    }
    pairs = [tuple(predictions.read(places[name, seed]) for name in ("random", full)) for seed in "01"]
    expected = predictions.mean_difference(pairs)
    assert [float(auc[f"minus full: {name}"]) for name in ("mean", "low", "high")] == pytest.approx(
        [expected.value, expected.low, expected.high]
    )
    singles = [predictions.difference(*pair).value for pair in pairs]
    assert expected.value == pytest.approx(np.mean(singles))
    assert [float(auc[f"minus full: {name}"]) for name in ("lowest", "highest")] == pytest.approx(
        [min(singles), max(singles)]
    )
    assert found["probe AUC", full]["minus full: mean"] == ""
    one = family.summaries([family.Row(variant="a", seed=0, status="scored", measures={"x": 1.0})], "a")
    assert one[0].note == "one seed: no range"


def test_the_figure_names_its_axes_and_keeps_legends_outside_the_data() -> None:
    names = ["one", "two", "three"]
    points = {name: {0: 0.6 + 0.1 * number, 1: 0.7} for number, name in enumerate(names)}
    panels = [
        figure.Panel("probe", points, baselines={"one": 0.5, "two": 0.5, "three": 0.55}),
        figure.Panel("difference", points, bars={"one": (0.1, 0.9)}, zero=True),
        figure.Panel("nothing", {}),
    ]
    papers = {"AUC, tuned": {"one": 0.9}, "AUC, probed": {"two": 0.6}, "Dice, tuned": {"three": 0.4}}
    heads = {"how far": {"stage 1": points, "stage 2": points}}
    drawn = figure.draw(names, panels, papers, heads, title="All of it, 2 of 6 runs", notes=["A note.", "Another."])
    titles = [panel.get_title() for panel in drawn.axes]
    assert titles == ["probe", "difference", "nothing", "the paper: AUC", "the paper: Dice", "how far"]
    for panel in drawn.axes[:5]:
        assert [label.get_text() for label in panel.get_xticklabels()] == names
    assert [label.get_text() for label in drawn.axes[5].get_xticklabels()] == ["stage\n1", "stage\n2"]
    assert [text.get_text() for text in drawn.axes[2].texts] == ["not measured"]
    assert [text.get_text() for text in drawn.texts] == ["All of it, 2 of 6 runs", "A note.\nAnother."]
    dashed = [line for line in drawn.axes[0].lines if line.get_linestyle() == "--"]
    assert [list(line.get_xdata()) for line in dashed] == [[-0.4, 1.4], [1.6, 2.4]], "one line for each new encoder"
    joined = [line for line in drawn.axes[0].lines if len(line.get_xdata()) == 3]
    assert [list(line.get_ydata()) for line in joined] == [pytest.approx([0.6, 0.7, 0.8]), [0.7, 0.7, 0.7]]
    assert len({to_hex(line.get_color()) for line in joined}) == 2, "a colour for each seed"
    drawn.draw_without_rendering()
    right = max(panel.get_window_extent().x1 for panel in drawn.axes)
    edge = drawn.bbox.x1
    for legend in drawn.legends:
        box = legend.get_window_extent()
        assert right <= box.x0 <= box.x1 <= edge
    said = [text.get_text().replace("\n", " ") for text in drawn.legends[0].get_texts()]
    assert said == [
        *("seed 0", "seed 1", "mean over seeds", "95 % interval over patients", "the same encoder untrained"),
        *(f"paper: {name}" for name in papers),
    ]


def test_twelve_methods_have_twelve_marks() -> None:
    names = list(recipes.METHODS)
    points = {name: {0: 0.5 + number / 100} for number, name in enumerate(names)}
    drawn = figure.draw(names, [figure.Panel("AUC", points)], {}, {"heads": {"stage 1": points}}, title="", notes=[])
    marks = [line for line in drawn.axes[1].lines if line.get_markersize() == 8]
    assert len({(line.get_color(), line.get_marker()) for line in marks}) == len(names) == 12


@pytest.mark.parametrize(
    ("complete", "failed", "code"),
    [(True, 0, ExitCode.OK), (True, 1, ExitCode.REJECTED), (False, 1, ExitCode.STOPPED)],
)
def test_the_verb_passes_its_options_and_says_how_it_ended(
    store: PreparedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complete: bool, failed: int, code: ExitCode
) -> None:
    heard: dict[str, Any] = {}

    def ablate(axis: str, base: PretrainConfig, *_: Any, **more: Any) -> ablation.Outputs:
        heard.update(more, axis=axis, base=base)
        paths = {name: tmp_path / name for name in ("table", "summary", "picture", "clusters")}
        return ablation.Outputs(**paths, complete=complete, failed=failed)

    monkeypatch.setattr(ablation, "ablate", ablate)
    words = ["ablate", "dagman-tiny", "--axis", "hiding", "--data", str(store.folder), "-o", str(tmp_path)]
    ct = tmp_path / "ct.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 8), np.int16), np.eye(4)), ct)
    more = ["--epochs", "5", "--seeds", "2", "--devices", "2", "--workers", "1", "--device", "cpu"]
    more += ["--labelled", str(store.folder), "--finetune", "7"]
    assert cli.run([*words, *more, "--organs", str(store.folder), "--scan", str(ct)]) == code
    assert (heard["organs"].store.folder, heard["organs"].names, heard["scan"].files) == (store.folder, None, (ct,))
    assert (heard["labelled"].folder, heard["finetune"]) == (store.folder, 7)
    assert cli.run([*words, "--finetune", "7", "--dry-run"]) == ExitCode.USAGE, "no labels"
    assert cli.run([*words, "--names", str(ct)]) == ExitCode.USAGE, "names of no organs"
    assert cli.run([*words, "--scan", str(store.folder)]) == ExitCode.USAGE, "no CT"
    assert cli.run([*words, "--optimisation.seed", "5"]) == ExitCode.USAGE, "seeds are --seeds"
    assert (heard["devices"], heard["workers"], heard["device"], list(heard["seeds"])) == (2, 1, "cpu", [0, 1])
    assert (heard["base"].optimisation.epochs, heard["base"].optimisation.steps) == (5, None)


def test_the_verb_refuses_another_method_in_one_line(
    store: PreparedStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--axis", "losses", "--data", str(store.folder), "-o", str(tmp_path)]
    assert cli.run(["ablate", "smit-swin-tiny", *words]) == ExitCode.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("E-RECIPE smit-swin-tiny: is not DAGMaN")
