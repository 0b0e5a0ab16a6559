"""Schedules in closed form: end values exact, shapes as the paper and its predecessors have them."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import small

from dagman.errors import DagmanError
from dagman.train import schedules
from dagman.train.pretrain import OptimisationConfig
from dagman.train.settings import rates


@given(total=st.integers(2, 5000), start=st.floats(0, 1), end=st.floats(0, 1))
def test_cosine_meets_its_ends_exactly_and_never_turns_back(total: int, start: float, end: float) -> None:
    values = [schedules.cosine(step, total, start, end) for step in {0, 1, total // 3, total // 2, total - 1}]
    assert schedules.cosine(0, total, start, end) == start
    assert schedules.cosine(total - 1, total, start, end) == end
    assert all(min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12 for value in values)


def test_cosine_is_the_closed_form() -> None:
    for step in range(11):
        expected = 1 - 0.5 * (1 - 0.996) * (1 + math.cos(math.pi * step / 10))
        assert schedules.cosine(step, 11, 0.996, 1.0) == pytest.approx(expected, rel=1e-14)
    assert schedules.cosine(5, 11, 0.0, 1.0) == pytest.approx(0.5)


def test_warm_up_is_a_line_to_the_peak_then_a_cosine_to_the_end() -> None:
    values = [schedules.warmup_cosine(step, 100, 8e-4, 1e-6, 10) for step in range(100)]
    assert values[:10] == pytest.approx([8e-5 * (step + 1) for step in range(10)])
    assert values[9] == max(values) == 8e-4
    assert values[-1] == 1e-6
    assert all(later < earlier for earlier, later in itertools.pairwise(values[9:]))


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (2, 1), (5, 5), (5, 0)])
def test_the_shortest_runs_have_a_learning_rate(total: int, warmup: int) -> None:
    values = [schedules.warmup_cosine(step, total, 1.0, 0.1, warmup) for step in range(total)]
    assert all(0.1 <= value <= 1 for value in values)


def test_ramp_is_flat_then_straight_then_flat() -> None:
    assert [schedules.ramp(step, 2, 6, 0.04, 0.08) for step in (0, 2, 4, 6, 9)] == pytest.approx(
        [0.04, 0.04, 0.06, 0.08, 0.08]
    )


def test_temperatures_rise_over_30_epochs_or_30_percent_of_a_short_run() -> None:
    assert schedules.temperature_steps(800 * 50, 50.0) == 30 * 50
    assert schedules.temperature_steps(100 * 50, 50.0) == 30 * 50
    assert schedules.temperature_steps(99 * 50, 50.0) == 1485
    assert schedules.temperature_steps(10, 1000.0) == 3
    assert schedules.temperature_steps(195, 12 / 8) == 45, "130 epochs of 12 volumes, 8 a step"
    assert schedules.temperature_steps(100, 1 / 8) == 4, "800 epochs of one volume, 8 a step"


def test_last_layers_are_frozen_for_an_epoch_and_at_most_two_percent() -> None:
    assert schedules.frozen_steps(40000, 50.0, 0.02) == 50
    assert schedules.frozen_steps(1000, 50.0, 0.02) == 20
    assert schedules.frozen_steps(49, 50.0, 0.02) == 0


def test_all_rates_of_a_run_start_and_end_where_the_paper_says() -> None:
    config = replace(small(), optimisation=OptimisationConfig(epochs=800))
    total, per_epoch = config.optimisation.total_steps(80, 1), config.optimisation.steps_per_epoch(80, 1)
    assert (total, per_epoch) == (8000, 10)
    first, peak, last = (rates(config, step, total, per_epoch) for step in (0, 799, 7999))
    assert first.learning_rate == pytest.approx(8e-4 / 800)
    assert peak.learning_rate == 8e-4
    assert last.learning_rate == 1e-6
    assert (first.weight_decay, last.weight_decay) == (0.04, 0.4)
    assert (first.momentum, last.momentum) == (0.996, 1.0)
    assert (first.class_temperature, first.patch_temperature) == (0.04, 0.04)
    assert (last.class_temperature, last.patch_temperature) == (0.07, 0.07)
    assert rates(config, 300, total, per_epoch).class_temperature == 0.07
    assert rates(config, 300, total, per_epoch).patch_temperature == 0.04
    assert rates(config, 600, total, per_epoch).patch_temperature == 0.07
    assert first.last_layers_frozen
    assert rates(config, 9, total, per_epoch).last_layers_frozen
    assert not rates(config, 10, total, per_epoch).last_layers_frozen


def test_epochs_count_a_partial_step_and_all_devices() -> None:
    config = OptimisationConfig(epochs=3, batch_size=2, accumulate=2)
    assert config.volumes_per_step(2) == 8
    assert config.total_steps(10, 2) == 4
    assert config.total_steps(10, 1) == 8
    assert config.steps_per_epoch(3, 1) == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({}, "steps None and epochs None"),
        ({"steps": 5, "epochs": 5}, "steps 5 and epochs 5"),
        ({"steps": 0}, "optimisation.steps"),
        ({"steps": 5, "momentum": 1.5}, "optimisation.momentum"),
        ({"steps": 5, "gradient_clip": 0.0}, "optimisation.gradient_clip"),
        ({"steps": 5, "accumulate": 0}, "optimisation.accumulate"),
        ({"steps": 5, "examine_every": 0}, "optimisation.examine_every"),
    ],
)
def test_impossible_settings_are_refused_by_name(wrong: dict[str, float], named: str) -> None:
    with pytest.raises(DagmanError, match=named):
        OptimisationConfig(**wrong)  # type: ignore[arg-type]
