"""The settings of a pretraining run, and what its schedules give for each step."""

import math
from dataclasses import dataclass, field

from dagman.config import FREE
from dagman.ct.datasets import DataConfig
from dagman.errors import DagmanError
from dagman.nets.encoder import EncoderConfig
from dagman.pretext.codistill import Knobs
from dagman.pretext.method import MethodConfig
from dagman.train import schedules
from dagman.types import Precision


@dataclass(frozen=True, kw_only=True)
class OptimisationConfig:
    """How long and how fast to learn; the defaults are the paper's where it gives them."""

    steps: int | None = None
    """Optimizer steps. Exactly one of steps and epochs is given; all schedules scale to it."""
    epochs: int | None = None
    """Times that every volume gives one pair of views (paper: 800)."""
    batch_size: int = 8
    """Volumes, each one pair of views, for a device and forward pass (the paper's is unknown)."""
    accumulate: int = 1
    """Forward passes for one optimizer step."""
    learning_rate: float = 8e-4
    """At its peak, after the warm-up (paper: 8e-4)."""
    final_learning_rate: float = 1e-6
    """At the last step, along a cosine."""
    warmup_ratio: float = 0.1
    """Share of the run in which the learning rate rises linearly (paper: 80 of 800 epochs)."""
    weight_decay: tuple[float, float] = (0.04, 0.4)
    """At the first and last step, along a cosine (AttMask); none on biases, norms, tokens and position tables."""
    gradient_clip: float = 3.0
    """Largest norm of the whole gradient (AttMask's number; its code clips each tensor by itself)."""
    momentum: float = 0.996
    """Share of the teacher that stays at the first step; rises to 1 along a cosine over all steps (AttMask)."""
    freeze_last_layer_ratio: float = 0.02
    """The heads' last layers get no gradient for one epoch, at most for this share of the run."""
    precision: Precision = "bf16"
    """`bf16` computes in bfloat16 where that is safe; weights, losses and centers stay float32."""
    checkpointing: bool = False
    """Keep little of the forward pass and compute it again for the gradient: less memory, more time, the same run."""
    examine_every: int = field(default=100, metadata=FREE)
    """Steps between two examinations of the teacher, with probe and pictures; the first and the last step have one too.
    A run may go on with another number."""
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            given = f"steps {self.steps} and epochs {self.epochs}"
            raise DagmanError("CONFIG", "optimisation", f"has {given}", "give one of them and set the other to none")
        for name, holds, advice in (
            ("steps", self.steps is None or self.steps > 0, "give at least 1"),
            ("epochs", self.epochs is None or self.epochs > 0, "give at least 1"),
            ("batch_size", self.batch_size > 0, "give at least 1"),
            ("accumulate", self.accumulate > 0, "give at least 1"),
            ("learning_rate", self.learning_rate > 0, "give a number above 0 (paper: 8e-4)"),
            ("final_learning_rate", self.final_learning_rate >= 0, "give a number of at least 0"),
            ("warmup_ratio", 0 <= self.warmup_ratio <= 1, "choose a share from 0 to 1"),
            ("weight_decay", min(self.weight_decay) >= 0, "give two numbers of at least 0"),
            ("gradient_clip", self.gradient_clip > 0, "give a number above 0"),
            ("momentum", 0 <= self.momentum <= 1, "choose a share from 0 to 1"),
            ("examine_every", self.examine_every > 0, "give at least 1"),
            ("freeze_last_layer_ratio", 0 <= self.freeze_last_layer_ratio <= 1, "choose a share from 0 to 1"),
        ):
            if not holds:
                raise DagmanError("CONFIG", f"optimisation.{name}", f"cannot be {getattr(self, name)}", advice)

    def volumes_per_step(self, devices: int) -> int:
        """Pairs of views that one optimizer step sees."""
        return self.batch_size * self.accumulate * devices

    def steps_per_epoch(self, num_volumes: int, devices: int) -> float:
        """Optimizer steps in which every volume is seen once; below 1 where a step sees more than all volumes."""
        return num_volumes / self.volumes_per_step(devices)

    def total_steps(self, num_volumes: int, devices: int) -> int:
        """Optimizer steps of the run."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return math.ceil(self.epochs * num_volumes / self.volumes_per_step(devices))


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A whole pretraining run: what a recipe is a value of."""

    recipe: str
    """Name under which the settings are known."""
    data: DataConfig
    encoder: EncoderConfig
    method: MethodConfig
    optimisation: OptimisationConfig

    def __post_init__(self) -> None:
        self.encoder.grid(self.data.crop)  # E-CROP: a crop that the encoder cannot take
        if self.optimisation.steps is not None:
            self.check_length(self.optimisation.steps)

    def check_length(self, steps: int) -> None:
        """Refuse a run that ends before its hiding starts.

        Raises:
            DagmanError: `E-CONFIG`.
        """
        if (start := self.method.hidden.start_step) >= steps > 0:
            problem, advice = f"is {start}, and the run ends after {steps} steps", "give less, or a longer run"
            raise DagmanError("CONFIG", "method.hidden.start_step", problem, advice)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What changes from step to step."""

    learning_rate: float
    weight_decay: float
    momentum: float
    class_temperature: float
    patch_temperature: float
    attended: bool
    last_layers_frozen: bool

    @property
    def knobs(self) -> Knobs:
        """The part of it that the forward pass wants."""
        return Knobs(self.class_temperature, self.patch_temperature, self.attended)


def rates(config: PretrainConfig, step: int, total: int, steps_per_epoch: float) -> Rates:
    """The schedules at one step.

    Args:
        config: Settings of the run.
        step: Optimizer step, from 0 to `total - 1`.
        total: Optimizer steps of the run.
        steps_per_epoch: Optimizer steps in which every volume is seen once.
    """
    optimisation, method = config.optimisation, config.method
    warmup = round(optimisation.warmup_ratio * total)
    rise = schedules.temperature_steps(total, steps_per_epoch)
    waits = rise if method.patch_temperature_waits else 0
    frozen = schedules.frozen_steps(total, steps_per_epoch, optimisation.freeze_last_layer_ratio)
    return Rates(
        learning_rate=schedules.warmup_cosine(
            step, total, optimisation.learning_rate, optimisation.final_learning_rate, warmup
        ),
        weight_decay=schedules.cosine(step, total, *optimisation.weight_decay),
        momentum=schedules.cosine(step, total, optimisation.momentum, 1.0),
        class_temperature=schedules.ramp(step, 0, rise, *method.class_temperature),
        patch_temperature=schedules.ramp(step, waits, waits + rise, *method.patch_temperature),
        attended=step >= method.hidden.start_step,
        last_layers_frozen=step < frozen,
    )
