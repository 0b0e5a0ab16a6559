"""What is not finite never gets into the network; alarms name what rows of metrics and recorded curves show."""

import json
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_run import small, write_store
from test_resume import rows

from dagman import files, recipes
from dagman.ct.datasets import DataConfig, ViewsDataset
from dagman.ct.store import MANIFEST, PreparedStore
from dagman.errors import DagmanError, ExitCode
from dagman.nets.weights import load_encoder
from dagman.pretext import examination
from dagman.pretext.codistill import CoDistillation, Knobs, Outcome
from dagman.run import Run
from dagman.tasks import classify
from dagman.tasks.embed import embed
from dagman.train import checkpoints
from dagman.train import pretrain as training
from dagman.train.health import ALARMS, Watch
from dagman.train.job import note_labelled
from dagman.train.pretrain import pretrain
from dagman.types import Views

pytestmark = pytest.mark.usefixtures("few_examined")

MEASURED = 2
"""Forward passes before the first step, which measure what a pair takes."""


@pytest.fixture
def poison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a NaN or an infinity into the second step: its batch, loss, one gradient, or the teacher's means."""
    place, value = request.param
    calls = 0
    forward = CoDistillation.forward

    def poisoned(self: CoDistillation, views: Views, knobs: Knobs, generator: torch.Generator) -> Outcome:
        nonlocal calls
        calls += 1
        if calls != MEASURED + 2:
            return forward(self, views, knobs, generator)
        if place == "batch":
            views = views._replace(u=views.u * value)
        if place == "gradient":
            hook = self.student.encoder.hidden_token.register_hook(lambda gradient: gradient * value)
            request.addfinalizer(hook.remove)
        outcome = forward(self, views, knobs, generator)
        if place == "gradient":
            # The next step's forward comes after this one's backward.
            monkeypatch.setattr(CoDistillation, "forward", removing(hook))
        if place == "loss":
            return outcome._replace(losses=outcome.losses._replace(total=outcome.losses.total * value))
        if place == "means":
            return outcome._replace(means={name: mean * value for name, mean in outcome.means.items()})
        return outcome

    def removing(hook: torch.utils.hooks.RemovableHandle) -> Any:
        def clean(*arguments: Any) -> Outcome:
            hook.remove()
            return forward(*arguments)

        return clean

    monkeypatch.setattr(CoDistillation, "forward", poisoned)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "poison",
    [
        ("batch", float("nan")),
        ("loss", float("inf")),
        ("gradient", float("nan")),
        ("means", float("nan")),
    ],
    indirect=True,
    ids=str,
)
def test_a_value_that_is_not_finite_skips_the_step_and_nothing_else(
    store: PreparedStore, tmp_path: Path, poison: None
) -> None:
    run = Run(tmp_path / "run")
    config = small(steps=3)
    assert pretrain(config, store, run.folder, checkpoint_every=1, keep=3).status == "finished"
    assert [row["skipped"] for row in run.metrics()] == [0, 1, 1]
    assert [row["skipped_in_a_row"] for row in run.metrics()] == [0, 1, 0]
    saved = [checkpoints._read(path, _identity(path))[1] for path in sorted(run.checkpoints.iterdir())]
    assert all(bool(tensor.isfinite().all()) for state in saved for tensor in state.values())
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert any(not torch.equal(saved[1][name], saved[2][name]) for name in saved[1] if "student" in name)
    line = next(line for line in run.log_file.read_text().splitlines() if "skipped" in line)
    assert "step 2 skipped, not finite: " in line
    assert "volumes case-" in line


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("poison", [("loss", float("nan"))], indirect=True, ids=str)
def test_a_skipped_step_names_the_volumes_of_all_its_batches(
    store: PreparedStore, tmp_path: Path, poison: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    following = training._next

    def noting(*arguments: Any) -> Any:
        pairs = following(*arguments)
        taken.extend(store.rows[row]["case_id"] for row in pairs.rows.tolist())
        return pairs

    monkeypatch.setattr(training, "_next", noting)
    pretrain(small(steps=1, accumulate=5), store, tmp_path / "run", workers=1)
    line = next(line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if "skipped" in line)
    assert len(set(taken)) > 2
    assert line.endswith(f"volumes {', '.join(taken)}")


def _identity(path: Path) -> str:
    return str(json.loads((path / "manifest.json").read_text())["run"])


def test_steps_skipped_in_a_row_end_the_run_and_keep_the_last_checkpoint(
    store: PreparedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = CoDistillation.forward, []

    def poisoned(self: CoDistillation, views: Views, *arguments: Any) -> Outcome:
        calls.append(1)
        return forward(
            self, views._replace(v=views.v * float("nan")) if len(calls) > MEASURED + 1 else views, *arguments
        )

    monkeypatch.setattr(CoDistillation, "forward", poisoned)
    with pytest.raises(DagmanError, match="E-UNHEALTHY") as caught:
        pretrain(small(steps=20), store, tmp_path / "run", checkpoint_every=1)
    assert caught.value.exit_code is ExitCode.UNHEALTHY
    assert "6 steps in a row up to step 7" in caught.value.problem
    assert [row["skipped"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3, 4, 5, 6]
    assert Run(tmp_path / "run").progress_file.is_file(), "whoever looks why finds the curves"
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    tensors = checkpoints._read(newest, _identity(newest))[1]
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


@pytest.mark.usefixtures("undrawn")
def test_validation_and_test_cases_are_not_trained_on(
    store: PreparedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []
    read = ViewsDataset.__getitem__

    def noted(self: ViewsDataset, sample: int) -> Any:
        found = read(self, sample)
        seen.append(("training" if len(self) == 2 else "validation", int(found.rows)))
        return found

    monkeypatch.setattr(ViewsDataset, "__getitem__", noted)
    split = write_store(tmp_path / "store", ["validation", None, "train", "test"])
    pretrain(small(steps=4), split, tmp_path / "run", checkpoint_every=2)
    assert {row for what, row in seen if what == "training"} == {1, 2}
    assert {row for what, row in seen if what == "validation"} == {0}
    values = [row.get("validation_amip") for row in rows(tmp_path / "run")]
    assert [value is not None for value in values] == [False, True, False, True]
    assert all(0 < value < 1 for value in values if value)


@pytest.mark.usefixtures("undrawn")
def test_small_numbers_are_flushed_in_training_only(store: PreparedStore, tmp_path: Path) -> None:
    seen: list[float] = []

    class Looking(Listening):
        def on_step(self, row: Mapping[str, Any]) -> None:
            seen.append(float(torch.tensor(1e-39) * 0.5))

    pretrain(small(steps=1), store, tmp_path / "run", listeners=[Looking()])
    assert seen == [0.0]
    assert float(torch.tensor(1e-39) * 0.5) > 0


def test_a_store_without_training_cases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DagmanError, match="E-NODATA") as caught:
        pretrain(small(), write_store(tmp_path / "store", ["validation", "test"]), tmp_path / "run")
    assert caught.value.exit_code is ExitCode.NOTHING_USABLE


class Listening:
    """Hears of a run and does nothing."""

    def on_start(self, step: int, total_steps: int) -> None: ...

    def on_step(self, row: Mapping[str, Any]) -> None: ...

    def on_message(self, text: str) -> None: ...


def healthy(step: int) -> dict[str, Any]:
    values = {"pooled_spread": 0.4, "tokens_spread": 0.5, "image_error_ratio": 0.8, "attention_entropy": 0.98}
    return {"step": step, **values, **{f"{term}_teacher_entropy": 0.7 for term in ("aitd", "ampd", "gitd")}}


@pytest.mark.parametrize("alarm", ALARMS, ids=lambda alarm: f"{alarm.name} {alarm.column}")
def test_each_alarm_rings_once_within_50_steps_of_the_onset(alarm: Any) -> None:
    bad = next(value for value in (0.0, 2.0, 1.0, 99.0) if alarm.is_bad(value))
    watch, onset = Watch(400), 250
    there = range(onset + 1, 401) if alarm.column not in examination.MEANINGS else (300, 400)
    rang = [
        (step, message)
        for step in range(1, 401)
        for message in watch.see(healthy(step) | ({alarm.column: bad} if step in there else {}))
    ]
    assert len(rang) == 1
    step, message = rang[0]
    assert onset < step <= onset + 50
    assert message.startswith(f"ALARM {alarm.name}: {alarm.column} is ")


def test_what_is_examined_at_the_end_of_a_short_run_rings() -> None:
    watch = Watch(100)
    nothing = {"aitd_image_nats": 0.0, "ampd_image_share": 0.1}
    rang = [m for step in range(1, 101) for m in watch.see(healthy(step) | (nothing if step in (1, 100) else {}))]
    assert [message.split(":")[0] for message in rang] == [
        "ALARM targets tell nothing",
        "ALARM patch targets are positions",
    ]


RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "learning"


def rang_on(recorded: str, *, columns: Container[str] | None = None) -> set[str]:
    """Names of the alarms that a recorded curve raises; its points stand for the steps since the last."""
    result = json.loads((RECORDED / f"{recorded}.json").read_text())
    watch, last, messages = Watch(result["steps"]), 0, []
    for point in result["curve"]:
        seen = {name: value for name, value in point.items() if columns is None or name in columns}
        often = {name: value for name, value in seen.items() if name not in examination.MEANINGS}
        for step in range(last + 1, point["step"] + 1):
            messages += watch.see({**(seen if step == point["step"] else often), "step": step})
        last = point["step"]
    return {message.split(":")[0].removeprefix("ALARM ") for message in messages}


@pytest.mark.parametrize(
    ("recorded", "named"),
    [
        ("real-factor-rate-1e-3-seed0", {"features collapsed", "no signal", "targets tell nothing"}),
        ("real-factor-no-warm-up-seed0", {"features collapsed", "targets tell nothing"}),
        ("real-factor-centering-seed0", {"features collapsed", "targets tell nothing"}),
        ("real-factor-paper-seed0", {"hiding follows the noise"}),
        ("real-factor-noisy-guide-seed0", {"hiding follows the noise"}),
        ("real-factor-paper-temperature-seed0", {"no signal", "targets tell nothing"}),
        ("real-factor-as-it-is-seed0", {"no signal"}),
        ("real-factor-position-in-residual-seed0", {"patch targets are positions"}),
        ("real-factor-overlap-half-seed0", {"features in few directions"}),
    ],
)
def test_states_that_were_met_ring_by_name(recorded: str, named: set[str]) -> None:
    assert named <= rang_on(recorded)


LEARNT = sorted(
    path.stem
    for corpus in ("phantoms", "real")
    for name in ("tiny", "learned-token")
    for path in RECORDED.glob(f"{corpus}-{name}-seed*.json")
)


@pytest.mark.parametrize("recorded", LEARNT)
def test_runs_that_learnt_ring_nothing(recorded: str) -> None:
    assert rang_on(recorded) == set()


def test_there_are_runs_that_learnt() -> None:
    assert len(LEARNT) >= 6


RANG = {
    "real-dagman-vit-tiny-seed0": {"targets tell nothing", "no signal"},
    "real-dagman-vit-tiny-seed2": {"no signal", "attention uniform"},
    **{f"real-attmask-vit-tiny-seed{seed}": {"attention uniform"} for seed in range(3)},
    "real-attmask-vit-tiny-1000-seed0": {"attention uniform"},
}
"""What the runs of the twelve recipes ring; the others ring nothing."""
OF_RECIPES = [
    f"real-{'dagman-tiny' if name == 'dagman-swin' else f'{name}-tiny'}-seed{seed}"
    for name in recipes.METHODS
    for seed in range(3)
] + sorted(path.stem for path in RECORDED.glob("real-*-tiny-1000-seed*.json"))


@pytest.mark.parametrize("recorded", OF_RECIPES)
def test_runs_of_the_recipes_ring_what_they_are_known_for(recorded: str) -> None:
    assert rang_on(recorded) == RANG.get(recorded, set())


def test_attention_that_is_nearly_uniform_rings_in_these_runs_and_no_others() -> None:
    factors = ("centering", "momentum-.996", "paper", "query-gain-1", "rate-1e-3")
    rang = {path.stem for path in RECORDED.glob("*.json") if rang_on(path.stem, columns=["attention_entropy"])}
    assert rang == {
        *(recorded for recorded, names in RANG.items() if "attention uniform" in names),
        *(f"real-factor-{factor}-seed0" for factor in factors),
        *(f"real-today-{name}-seed0" for name in ("centering", "centering-warmer")),
    }


def test_the_last_level_of_either_encoder_is_watched() -> None:
    of_swin = {"level3_effective_rank": 1.0, "level4_effective_rank": 9.0}
    of_vit = {"level3_effective_rank": 1.0}
    assert Watch(100).see({"step": 100, **of_swin}) == []
    [message] = Watch(100).see({"step": 100, **of_vit})
    assert message.startswith("ALARM features in few directions: level3_effective_rank is 1, below 2.2")


@pytest.mark.parametrize("name", ["no signal", "targets tell nothing", "teacher one-hot"])
def test_what_balancing_decides_advises_balancing_first(name: str) -> None:
    advices = {alarm.advice for alarm in ALARMS if alarm.name == name}
    assert all(advice.startswith("with method.balance centering take sinkhorn") for advice in advices)


def test_a_bad_spell_that_passes_rings_nothing() -> None:
    watch = Watch(1000)
    assert not [m for step in range(1, 1000) for m in watch.see(healthy(step) | {"pooled_spread": 0.3 * (step % 19)})]


def test_an_alarm_rings_again_where_its_state_comes_back() -> None:
    watch = Watch(1000)
    well = [*range(61, 400)]
    rang = [
        step
        for step in range(1, 1001)
        for message in watch.see(healthy(step) | ({} if step in well else {"pooled_spread": 0.0}))
        if "features collapsed" in message
    ]
    assert rang == [20, 419]


def test_a_value_missing_from_a_skipped_step_neither_adds_nor_forgives() -> None:
    watch = Watch(1000)
    messages = [watch.see({"step": step, "pooled_spread": None if step % 2 else 0.0}) for step in range(1, 41)]
    assert [bool(message) for message in messages] == [False] * 39 + [True]


@pytest.mark.usefixtures("undrawn")
def test_a_probe_on_labelled_cases_watches_the_run(tmp_path: Path) -> None:
    folder = write_store(tmp_path / "prepared", [None] * 8).folder
    cases = enumerate(files.read_lines(folder / MANIFEST))
    said = [row | {"patient": f"p{case}", "label": ("benign", "malignant")[case % 2]} for case, row in cases]
    files.write_text(folder / MANIFEST, "".join(map(files.json_line, said)))
    labelled = PreparedStore(folder)
    config = replace(small(steps=3), data=DataConfig(crop=(32, 32, 32)))
    pretrain(config, labelled, tmp_path / "run", labelled=labelled)
    table = embed(load_encoder(tmp_path / "run"), labelled, which="all")
    auc = classify.probe(table, positive="malignant").auc()
    first, between, last = Run(tmp_path / "run").metrics()
    assert "probe_auc" not in between
    assert (last["probe_auc"], last["probe_low"], last["probe_high"]) == pytest.approx((auc.value, auc.low, auc.high))
    assert first["probe_low"] <= first["probe_auc"] <= first["probe_high"]
    told = [line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if "the probe's AUC is" in line]
    assert [
        f"step {step}: the probe's AUC is {row['probe_auc']:.3f} (" in line
        for step, row, line in zip((1, 3), (first, last), told, strict=True)
    ] == [True, True]
    heard: list[str] = []
    again: Any = SimpleNamespace(run=Run(tmp_path / "run"), say=heard.append)
    note_labelled(again, labelled, 3)
    assert not heard
    files.write_text(folder / MANIFEST, "".join(files.json_line(row | {"label": "benign"}) for row in said))
    for _ in range(2):
        note_labelled(again, PreparedStore(folder), 3)
    assert heard == ["the cases that are probed are others than before: probes up to step 3 are not of these"]
