"""A family of runs: each member differs from the base in what the axis names, and a stop loses nothing."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dagman import ablation, config, recipes
from dagman.ct import phantom
from dagman.ct.prepare import prepare
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError
from dagman.train.settings import PretrainConfig


class Silent:
    """A listener that says nothing."""

    def on_start(self, step: int, total_steps: int) -> None: ...

    def on_step(self, row: Any) -> None: ...

    def on_message(self, text: str) -> None: ...


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PreparedStore:
    folder = tmp_path_factory.mktemp("ablation")
    phantom.write(folder / "phantoms", 8)
    prepare([folder / "phantoms" / "cases.csv"], folder / "prepared")
    return PreparedStore(folder / "prepared")


def base() -> PretrainConfig:
    tiny = recipes.with_length(recipes.get("dagman-tiny"), 3, None)
    return config.override(tiny, {"optimisation.batch_size": "2", "method.heads.hidden_width": "32"})


def run(store: PreparedStore, folder: Path, heard: list[str]) -> ablation.Outputs:
    return ablation.ablate(
        "hiding", base(), store, folder, seeds=[0], labelled=store, listener=lambda _: Silent(), say=heard.append
    )


def test_members_differ_in_what_the_axis_names() -> None:
    losses = ablation.family("losses", base())
    assert [vars(member.method.losses) for member in losses.values()] == [
        {"amip": 1.0, "ampd": 0.0, "aitd": 0.0, "gitd": 0.0},
        {"amip": 1.0, "ampd": 0.3, "aitd": 0.0, "gitd": 0.0},
        {"amip": 1.0, "ampd": 0.3, "aitd": 1.0, "gitd": 0.0},
        {"amip": 1.0, "ampd": 0.0, "aitd": 1.0, "gitd": 1.0},
        {"amip": 0.0, "ampd": 0.3, "aitd": 1.0, "gitd": 1.0},
        {"amip": 1.0, "ampd": 0.3, "aitd": 1.0, "gitd": 1.0},
    ]
    settings = {"optimisation.batch_size": "2"}
    encoders = ablation.family("encoder", base(), settings).values()
    assert [(one.encoder.kind, one.method.dropped_ratio) for one in encoders] == [
        ("vit", 0.0),
        ("vit", 0.3),
        ("swin", 0.0),
        ("swin", 0.3),
    ]
    assert {(one.optimisation.batch_size, one.optimisation.steps) for one in encoders} == {(2, 3)}
    hiding = [(one.method.hidden.kind, one.method.dropped_ratio) for one in ablation.family("hiding", base()).values()]
    assert hiding == [("random", 0.0), ("attended", 0.0), ("random", 0.3), ("attended", 0.3)]
    roomy = config.override(base(), {"data.crop": "64,64,64"})
    stages = ablation.family("stage", roomy).values()
    assert [member.encoder.attention.stage for member in stages] == [1, 2, 3, 4]
    for axis in ("losses", "hiding", "stage"):
        for member in ablation.family(axis, roomy).values():
            back = replace(member, method=roomy.method, encoder=roomy.encoder)
            assert back == roomy, "nothing else differs"


def test_an_unknown_axis_is_refused() -> None:
    with pytest.raises(DagmanError, match=r"E-AXIS.*did you mean hiding"):
        ablation.family("hidding", base())


def test_a_member_that_does_not_fit_is_refused_before_any_is_trained(store: PreparedStore, tmp_path: Path) -> None:
    with pytest.raises(DagmanError, match=r"E-CROP crop 32x32x32.*fewer than 8"):
        ablation.ablate("stage", base(), store, tmp_path, seeds=[0], listener=lambda _: Silent(), say=print)
    assert not (tmp_path / "runs").exists()


def test_labels_that_give_no_probe_are_refused_before_any_is_trained(store: PreparedStore, tmp_path: Path) -> None:
    rows = [json.loads(line) | {"label": None} for line in (store.folder / "manifest.jsonl").read_text().splitlines()]
    folder = tmp_path / "unlabelled"
    shutil.copytree(store.folder, folder)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DagmanError, match="E-LABEL"):
        ablation.ablate(
            "hiding",
            base(),
            store,
            tmp_path,
            seeds=[0],
            labelled=PreparedStore(folder),
            listener=lambda _: Silent(),
            say=print,
        )
    assert not (tmp_path / "runs").exists()


def test_runs_are_compared_and_done_once(store: PreparedStore, tmp_path: Path) -> None:
    heard: list[str] = []
    outputs = run(store, tmp_path, heard)
    assert outputs.complete
    assert [line.split("]")[0] for line in heard] == [f"[{n}/4" for n in range(1, 5)]
    lines = outputs.table.read_text().splitlines()
    assert lines[0].startswith("# Attended hiding and the noisy teacher (Figure 4). Here: dagman-tiny, 8 volumes")
    rows = list(csv.DictReader(lines[1:]))
    assert [(row["variant"], row["seed"]) for row in rows][:2] == [("random", "0"), ("attended", "0")]
    assert all(0 < float(row["stage 2: row entropy"]) <= 1 for row in rows)
    assert all(0 <= float(row["probe_pretrained AUC"]) <= 1 for row in rows)
    assert outputs.picture.read_bytes().startswith(b"\x89PNG")
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == 4
    before = [(one / "metrics.jsonl").read_bytes() for one in runs]
    table = outputs.table.read_text()
    run(store, tmp_path, [])
    assert [(one / "metrics.jsonl").read_bytes() for one in runs] == before, "nothing is trained twice"
    assert outputs.table.read_text() == table
    kept = json.loads((runs[0] / "scores.json").read_text())
    assert kept["scores"]["heads"]["semantic attention"]["distance_mm"]
