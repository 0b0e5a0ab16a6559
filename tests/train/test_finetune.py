import json
import os
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from dagman.errors import DagmanError, ExitCode
from dagman.nets.encoder import build, layers
from dagman.nets.swin import AttentionConfig, SwinConfig
from dagman.nets.vit import ViTConfig
from dagman.train import engine, finetune
from dagman.train.finetune import FinetuneConfig, fit

SMALL = SwinConfig(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), attention=AttentionConfig(stage=2))
PLAIN = FinetuneConfig(steps=6, batch_size=2, check_every=2, learning_rate=0.01)


class Points(Dataset):
    def __getitem__(self, sample):
        draws = engine.torch_generator(0, "points", sample)
        x = torch.randn(3, generator=draws)
        return x, (x[0] > 0).float()


class Line:
    """A line between two clouds; `scores` are what the checks say, one after the other."""

    def __init__(self, scores=(), stop_at=None):
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.dataset = Points()
        self.identity = ["line"]
        self.scores = list(scores)
        self.steps = 0
        self.stop_at = stop_at

    def begin(self):
        return False

    def loss(self, batch):
        self.steps += 1
        if self.steps == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        x, y = batch
        return nn.functional.binary_cross_entropy_with_logits(self.network(x)[:, 0], y)

    def score(self):
        assert not self.network.training
        return self.scores.pop(0) if self.scores else None


def weights(lesson):
    return {name: value.clone() for name, value in lesson.network.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_leaves_a_network_in_eval_mode(tmp_path):
    lesson = Line()
    assert fit(lesson, FinetuneConfig(steps=60, learning_rate=0.05), tmp_path).finished
    assert not lesson.network.training
    x = torch.randn(200, 3, generator=engine.torch_generator(1, "test"))
    assert ((lesson.network(x)[:, 0] > 0) == (x[:, 0] > 0)).float().mean() > 0.85


def test_a_stopped_training_goes_on_bit_for_bit(tmp_path):
    whole = Line([0.1, 0.2, 0.3])
    fit(whole, PLAIN, tmp_path / "whole")
    stopped = Line([0.1, 0.2, 0.3], stop_at=3)
    ended = fit(stopped, PLAIN, tmp_path / "parts")
    assert (ended.finished, ended.step) == (False, 3)
    again = Line([0.2, 0.3])
    assert fit(again, PLAIN, tmp_path / "parts").finished
    assert same(weights(whole), weights(again))
    losses = [[row["loss"] for row in finetune.Run(tmp_path / name).metrics()] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_a_stop_at_the_last_step_leaves_what_comes_after_to_the_next_call(tmp_path):
    whole, stopped, again = Line(), Line(stop_at=PLAIN.steps), Line()
    fit(whole, PLAIN, tmp_path / "whole")
    ended = fit(stopped, PLAIN, tmp_path / "parts")
    assert (ended.finished, ended.step) == (False, PLAIN.steps)
    assert fit(again, PLAIN, tmp_path / "parts").finished
    assert again.steps == 0
    assert same(weights(whole), weights(again))


def test_a_finished_training_is_not_done_again(tmp_path):
    first = Line()
    fit(first, PLAIN, tmp_path)
    second = Line()
    fit(second, PLAIN, tmp_path)
    assert second.steps == 0
    assert same(weights(first), weights(second))


def test_the_best_check_decides_the_weights_and_the_earlier_of_equals_wins(tmp_path):
    after_four = Line()
    fit(after_four, FinetuneConfig(**vars(PLAIN) | {"check_every": 4}), tmp_path / "four")
    lesson = Line([0.1, 0.9, 0.9])
    ended = fit(lesson, PLAIN, tmp_path / "best")
    assert (ended.best_step, ended.best_score) == (4, 0.9)
    last = Line()
    fit(last, PLAIN, tmp_path / "last")
    assert not same(weights(lesson), weights(last))


def test_other_settings_are_refused_with_the_difference(tmp_path):
    fit(Line(), PLAIN, tmp_path)
    with pytest.raises(DagmanError, match=r"E-RESUME.*finetune.seed"):
        fit(Line(), FinetuneConfig(**vars(PLAIN) | {"seed": 1}), tmp_path)


def test_a_loss_that_is_not_finite_ends_with_one_line(tmp_path):
    lesson = Line()
    with torch.no_grad():
        lesson.network[0].weight.fill_(float("nan"))
    with pytest.raises(DagmanError, match=r"E-UNHEALTHY.*lower learning rate"):
        fit(lesson, PLAIN, tmp_path)


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("layer_decay", 0.0), ("learning_rate", -1.0)])
def test_settings_that_cannot_be_are_refused(field, value):
    with pytest.raises(DagmanError, match=f"finetune.{field}"):
        FinetuneConfig(**{field: value})


class Headed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.encoder = build(config)
        self.head = nn.Linear(config.final_width, 1)

    def forward(self, x):
        return self.head(self.encoder(x).pooled)


class Crops(Dataset):
    def __getitem__(self, sample):
        return torch.rand(1, 32, 32, 32, generator=engine.torch_generator(0, "crops", sample))


class Images(Line):
    def __init__(self, config):
        super().__init__()
        torch.manual_seed(0)
        self.network, self.dataset = Headed(config), Crops()

    def begin(self):
        return False

    def loss(self, batch):
        return (self.network(batch) - 1).square().mean()


def test_a_frozen_encoder_stays_as_it_is(tmp_path):
    lesson = Images(SMALL)
    before = weights(lesson)
    fit(lesson, FinetuneConfig(steps=2, batch_size=1, frozen=True), tmp_path)
    after = weights(lesson)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"head.weight", "head.bias"}


@pytest.mark.parametrize("config", [SMALL, ViTConfig(width=24, depth=2, num_heads=2)])
def test_every_parameter_is_in_one_layer_and_later_ones_learn_faster(config):
    encoder = build(config)
    found = layers(encoder)
    names = {id(each): name for name, each in encoder.named_parameters()}
    assert sorted(names[id(each)] for layer in found for each in layer) == sorted(names.values())
    assert any("patch_embed" in names[id(each)] for each in found[0])
    optimizer = finetune._optimizer(Headed(config), FinetuneConfig(layer_decay=0.5))
    finetune.engine.set_rates(optimizer, 1.0, 0.05)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert rates["head.weight"] == 1.0
    assert rates["encoder.patch_embed.proj.weight"] == 0.5 ** len(found)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}


def test_semantic_attention_learns_between_its_stage_and_the_next():
    encoder = build(SMALL)
    names = {id(each): name for name, each in encoder.named_parameters()}
    order = [names[id(layer[0])] for layer in layers(encoder)]
    assert [name.split(".")[0] for name in order[1:]] == [
        "stages",
        "stages",
        *["semantic_attention"] * 2,
        "stages",
        "stages",
    ]


class Damaged(Points):
    """The fourth step meets what cannot be read."""

    def __getitem__(self, sample):
        if sample == 6:
            raise DagmanError("CHECKSUM", "six", "is damaged", "prepare again", exit_code=ExitCode.REFUSED)
        return super().__getitem__(sample)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_read_loses_no_step_that_is_done(tmp_path, workers):
    whole, lesson = Line(), Line()
    lesson.dataset = Damaged()
    with pytest.raises(DagmanError, match="E-CHECKSUM six"):
        fit(lesson, PLAIN, tmp_path / "run", device="cpu", workers=workers)
    again = Line()
    assert fit(again, PLAIN, tmp_path / "run", device="cpu").finished
    assert again.steps == PLAIN.steps - 3
    fit(whole, PLAIN, tmp_path / "whole", device="cpu")
    assert same(weights(again), weights(whole))


def test_a_signal_that_ended_those_who_read_too_is_a_stop(tmp_path, monkeypatch):
    """As `scancel` sends it to all of a step."""
    begun = engine.batches

    def batches(*what, **how):
        source = begun(*what, **how)
        yield from (next(source) for _ in range(3))
        os.kill(os.getpid(), signal.SIGTERM)
        raise DagmanError("READER", "data", "reading stopped", "see", exit_code=ExitCode.STOPPED)

    monkeypatch.setattr(engine, "batches", batches)
    ended = fit(Line(), PLAIN, tmp_path / "run", device="cpu")
    assert (ended.finished, ended.step) == (False, 3)
    monkeypatch.undo()
    again = Line()
    assert fit(again, PLAIN, tmp_path / "run", device="cpu").finished
    assert again.steps == PLAIN.steps - 3


def test_settings_can_be_written_as_json():
    json.dumps(finetune.configs.to_dict(FinetuneConfig()))
