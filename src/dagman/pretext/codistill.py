"""Co-distillation with attention-guided hiding and a noisy teacher: `Views` in, `Losses` out (figure 1 of the paper).

The methods it is compared with differ from it only in what is hidden from whom and in which losses count.
"""

import copy
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed, nn

from dagman.nets.encoder import EncoderConfig
from dagman.nets.heads import VoxelHead, moved
from dagman.nets.swin import SwinEncoder
from dagman.pretext import diagnostics, hiding, losses
from dagman.pretext.comparison import Compared, Heads, Rows, compare
from dagman.pretext.method import MethodConfig, check_fit
from dagman.pretext.network import Network
from dagman.pretext.shadow import Shadow
from dagman.types import Features, Losses, Views


class Knobs(NamedTuple):
    """What the schedules give for one step."""

    class_temperature: float
    patch_temperature: float
    attended: bool
    """False before `hidden.start_step`: guided hiding is then random, and blocks hide nothing."""


class Outcome(NamedTuple):
    """What one forward pass returns."""

    losses: Losses
    means: dict[str, Tensor]
    """Mean teacher logits over all tokens of this batch by head, for `move_centers` once the step is accepted."""
    diagnostics: dict[str, Tensor]
    """Detached scalars; the names are those of `diagnostics.MEANINGS`."""


class Targets(NamedTuple):
    """What the teacher says about a batch."""

    bottlenecks: dict[str, Tensor]
    """By head; those of `ampd` for every cell."""
    means: dict[str, Tensor]
    attention: Tensor | None
    """Of the pass that guides hiding, (batch, cells)."""
    dropped: Tensor | None
    """Cells that the teacher did not see, where whole cells are dropped."""


class Look(NamedTuple):
    """What one pass of the pretext task does to crops."""

    attention: Float[Tensor, "batch cells"] | None
    """That guides hiding."""
    hidden: Bool[Tensor, "batch cells"]
    dropped: Bool[Tensor, "batch cells"] | None
    """None for a clean teacher, or one from which patches are dropped one by one."""
    prediction: Float[Tensor, "batch 1 x y z"] | None
    """Of the student's voxel head; None without an image term."""


class CoDistillation(nn.Module):
    """A student that fills in what is hidden from it, and a teacher, its slow average, that guides the hiding.

    Args:
        encoder: Sizes of the encoder of both.
        method: What is hidden from whom and which losses count.
        mean_intensity: Of the training data in [0, 1]; the voxel head's prediction before training.
        crop: Sides of the views in voxels (x, y, z).

    Raises:
        DagmanError: `E-CROP` for a crop the encoder cannot take; `E-CONFIG` where encoder and method do not fit.

    Reference: section 3.2, figure 1.
    """

    def __init__(
        self, encoder: EncoderConfig, method: MethodConfig, *, mean_intensity: float, crop: tuple[int, int, int]
    ) -> None:
        super().__init__()
        check_fit(encoder, method)
        self.method = method
        self.grid = encoder.grid(crop)
        self.cell_side, self.patch_side = encoder.cell_side, encoder.patch_side
        self.final_only = method.pooled_stage == 4
        self.student = Network(encoder, method)
        swin = self.student.encoder
        if isinstance(swin, SwinEncoder) and encoder.has_cls and not (method.losses.ampd or method.losses.aitd):
            # Only those losses see past this norm; DDP wants a gradient for whatever needs one.
            swin.semantic_attention.norm.requires_grad_(requires_grad=False)
        self.teacher = copy.deepcopy(self.student).requires_grad_(requires_grad=False).eval()
        self._look_at = Shadow(self.teacher.encoder)
        if method.losses.amip:
            self.student.voxel_head = VoxelHead(
                encoder.final_width, cell_side=encoder.final_side, mean_intensity=mean_intensity
            )
        for name in self.student.heads:
            places = (math.prod(self.grid),) if self._has_places(name) else ()
            self.register_buffer(f"center_{name}", torch.zeros(*places, self.student.num_prototypes[name]))

    def _has_places(self, name: str) -> bool:
        """Whether a head has a center for each position of the grid."""
        return name == "ampd" and self.method.patch_centers == "position"

    def train(self, mode: bool = True) -> "CoDistillation":
        """Set the student's mode; the teacher is always in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, views: Views, knobs: Knobs, generator: torch.Generator) -> Outcome:
        """The losses of one batch of pairs; nothing of the module changes.

        Args:
            views: Two crops of each volume.
            knobs: This step's temperatures.
            generator: On the CPU; draws all that is hidden. Drop-path draws from torch's own generator.
        """
        images = torch.cat([views.u, views.v])
        teacher = self._teach(images, generator)
        attention = teacher.attention if knobs.attended else None
        hidden = self._hide(attention, len(images), generator, begun=knobs.attended)
        hidden = hidden.to(images.device, non_blocking=True)
        student = self.student.encoder(images, hidden, final_only=self.final_only)
        compared = self._distil(student, teacher, hidden, knobs)
        values = {name: one.loss for name, one in compared.items()}
        watched = diagnostics.of_features(student) | diagnostics.of_hiding(hidden, teacher.dropped, attention)
        watched["padding_ratio"] = views.padding.mean()
        for name, one in compared.items():
            watched |= {f"{name}_{what}": value for what, value in one.watched.items()}
            if self.method.balance == "centering" or self._has_places(name):  # balancing takes a shared center away
                size = diagnostics.size(self.center(name)) / diagnostics.size(teacher.means[name])
                watched[f"{name}_center_size"] = size
            some = hidden.any(dim=1).float().mean() if name == "ampd" else 1.0
            watched[f"{name}_loss_ratio"] = one.loss.detach() / some / math.log(self.center(name).shape[-1])
        if self.student.voxel_head is not None:
            values["amip"], watched["image_error_ratio"] = self._predict(student.pyramid[-1], images, hidden)
        return Outcome(self._weigh(values), teacher.means, watched)

    @torch.inference_mode()
    def _teach(self, images: Tensor, generator: torch.Generator) -> Targets:
        """The teacher's pass over both views, in the midst of its noise."""
        dropped = self.draw_dropped(len(images), generator, images.device)
        features = self._look_at(images, None, dropped, final_only=self.final_only)
        guide = features
        if self.method.guide == "clean" and dropped is not None and self.method.hidden.guided:
            guide = self._look_at(images, final_only=True)
        bottlenecks = {
            name: self.teacher.head(name).project(self.head_input(name, features)) for name in self.teacher.heads
        }
        means = {
            name: self.teacher.logits(
                name, losses.at_least_single(bottleneck).flatten(0, 0 if self._has_places(name) else -2).mean(dim=0)
            )
            for name, bottleneck in bottlenecks.items()
        }
        attention = guide.attention if self.method.hidden.guided else None
        return Targets(bottlenecks, means, attention, dropped if self.method.dropped_by == "cell" else None)

    def draw_dropped(
        self, batch: int, generator: torch.Generator, device: torch.device
    ) -> Bool[Tensor, "batch places"] | None:
        """Cells, or patches, that the noisy teacher does not see; None for a clean one."""
        if not self.method.dropped_ratio:
            return None
        places = math.prod(self.grid)
        if self.method.dropped_by == "patch":
            places *= (self.cell_side // self.patch_side) ** 3
        count = hiding.floor_count(self.method.dropped_ratio, places)
        return hiding.random(batch, places, count=count, generator=generator).to(device, non_blocking=True)

    @torch.no_grad()
    def look(self, images: Float[Tensor, "batch 1 x y z"], knobs: Knobs, generator: torch.Generator) -> Look:
        """Hide, drop and fill in as a training step does, but leave no crop whole; nothing of the module changes.

        Args:
            images: Crops in [0, 1].
            knobs: Of the step.
            generator: On the CPU; draws all that is hidden.
        """
        teacher = self._teach(images, generator)
        attention = teacher.attention if knobs.attended else None
        hidden = self._hide(attention, len(images), generator, begun=knobs.attended, leave_whole=False)
        hidden = hidden.to(images.device)
        head = self.student.voxel_head
        prediction = None if head is None else head(self.student.encoder(images, hidden, final_only=True).pyramid[-1])
        return Look(attention, hidden, teacher.dropped, prediction)

    def _hide(
        self,
        attention: Tensor | None,
        batch: int,
        generator: torch.Generator,
        *,
        begun: bool = True,
        leave_whole: bool = True,
    ) -> Bool[Tensor, "batch cells"]:
        """What the student does not see; random without attention to follow, nothing before blocks are begun."""
        config, cells = self.method.hidden, math.prod(self.grid)
        if config.kind == "blocks" and not begun:
            return torch.zeros(batch, cells, dtype=torch.bool)
        touched = torch.rand(batch, 1, generator=generator) < (config.probability if leave_whole else 1.0)

        def ratios(num: int) -> list[float]:
            """As many r as asked for; nothing is drawn where r is fixed."""
            if config.lowest_ratio is None:
                return [config.ratio] * num
            drawn = torch.rand(num, dtype=torch.float64, generator=generator)
            return (config.least + drawn * (config.ratio - config.least)).tolist()

        if config.kind == "attended" and attention is not None:
            ratio, reveal_ratio = ratios(2)
            hidden = hiding.attended(
                attention,
                ratio=ratio,
                hint_ratio=config.hint_ratio,
                hints=config.hints,
                reveal_ratio=reveal_ratio,
                generator=generator,
            )
        elif config.kind == "unattended" and attention is not None:
            hidden = hiding.unattended(attention, ratio=ratios(1)[0])
        elif config.kind == "blocks":
            hidden = torch.stack(
                [hiding.blocks(self.grid, ratio=ratio, generator=generator) for ratio in ratios(batch)]
            )
        else:
            counts = torch.tensor([hiding.ceil_count(ratio, cells) for ratio in ratios(batch)])
            hidden = hiding.random(batch, cells, count=counts, generator=generator)
        return hidden & touched.to(hidden.device, non_blocking=True)

    def _distil(self, student: Features, teacher: Targets, hidden: Tensor, knobs: Knobs) -> dict[str, Compared]:
        """AITD and GITD across the views, AMPD on each view's hidden cells (equations 2 to 4)."""
        found, said = {}, teacher.bottlenecks
        if "aitd" in said:
            assert student.cls is not None
            found["aitd"] = self._compare("aitd", student.cls, _swap_views(said["aitd"]), knobs.class_temperature)
        if "ampd" in said:
            # As many cells are picked as can be hidden, hidden ones first, without waiting for the device to count
            # them; `mean_over_hidden` leaves out those that are not.
            count = self.method.hidden.most(hidden.shape[1], attended=knobs.attended)
            picked = hidden.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]
            tokens, targets = _pick(student.tokens, picked), _pick(said["ampd"], picked)
            center = self.center("ampd")
            found["ampd"] = self._compare(
                "ampd",
                tokens,
                targets,
                knobs.patch_temperature,
                center=center[picked] if self._has_places("ampd") else center,
                hidden=hidden.gather(1, picked),
            )
        if "gitd" in said:
            pooled = self.head_input("gitd", student)
            found["gitd"] = self._compare("gitd", pooled, _swap_views(said["gitd"]), knobs.class_temperature)
        return found

    def _compare(
        self,
        name: str,
        features: Tensor,
        bottleneck: Tensor,
        temperature: float,
        *,
        center: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Compared:
        """Cross-entropy of the student's features against what the teacher says, through the heads of that name."""
        teacher, center = bottleneck.flatten(0, -2), self.center(name) if center is None else center
        rows = Rows(
            student=self.student.head(name).project(features).flatten(0, -2),
            teacher=teacher,
            center=center.expand(len(teacher), -1) if center.ndim == 1 else center.flatten(0, -2),
            counted=None if hidden is None else hidden.flatten(),
        )
        heads = Heads(
            logits=functools.partial(self.student.logits, name),
            targets=lambda said, center, counted: self.targets(name, said, temperature, center, counted),
            temperature=self.method.student_temperature,
            balanced=self.method.balance != "centering",
        )
        values, watched = compare(heads, rows)
        values = values.view(features.shape[:-1])
        return Compared(values.mean() if hidden is None else losses.mean_over_hidden(values, hidden), watched)

    def head_input(self, name: str, features: Features) -> Tensor:
        """What a head works on: [CLS] tokens, cell tokens or pooled tokens."""
        pooled = features.pooled if self.final_only else features.pyramid[3].mean(dim=(2, 3, 4))
        value = {"aitd": features.cls, "ampd": features.tokens, "gitd": pooled}[name]
        assert value is not None
        return value

    def targets(
        self,
        name: str,
        bottleneck: Float[Tensor, "*rows bottleneck"],
        temperature: float,
        center: Tensor | None = None,
        counted: Bool[Tensor, "*rows"] | None = None,
    ) -> Float[Tensor, "*rows prototypes"]:
        """What the teacher says about rows of a head: distributions over its prototypes.

        Args:
            name: The head's loss.
            bottleneck: From the teacher's head.
            temperature: tau_t.
            center: One for each row, where the rows are not the whole grid; else the head's own.
            counted: Rows that a loss asks about; all without it.
        """
        logits, center = self.teacher.logits(name, bottleneck), self.center(name) if center is None else center
        if self.method.balance == "centering":
            return losses.sharpen(logits, center, temperature)
        return losses.balanced(logits, center, temperature, counted=counted)

    def _predict(self, final: Tensor, images: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """AMIP, each view against itself (equation 5), and its ratio to the error of the visible means, or NaN."""
        assert self.student.voxel_head is not None
        hidden = hidden.view(len(hidden), *self.grid)
        known = hidden.cpu()  # a GPU is waited for once, here, and not at each count
        cells, picked = hiding.cut(images, self.cell_side), moved(known.nonzero(as_tuple=True), images.device)
        truth = cells[picked]
        loss = _mean_of_views(self.student.voxel_head.predict_cells(final, known), truth, known)
        with torch.no_grad():
            means = diagnostics.visible_mean(cells, hidden)[picked[0]]
            baseline = _mean_of_views(means.view(-1, 1, 1, 1).expand(truth.shape), truth, known)
            return loss, loss / torch.where(baseline > 1e-6, baseline, torch.nan)

    def _weigh(self, values: Mapping[str, Tensor]) -> Losses:
        """The total of section 3.2; a loss that does not count is 0."""
        total = torch.stack([getattr(self.method.losses, name) * value for name, value in values.items()]).sum()
        absent = torch.zeros_like(total)
        return Losses(total=total, **{name: values.get(name, absent) for name in ("amip", "ampd", "aitd", "gitd")})

    def center(self, name: str) -> Float[Tensor, "*cells prototypes"]:
        """The center of a head's teacher logits, or one for each position of the grid."""
        center: Tensor = getattr(self, f"center_{name}")
        return center

    @torch.no_grad()
    def move_centers(self, *means: Mapping[str, Tensor]) -> None:
        """Move the centers towards the mean logits of an accepted step.

        Args:
            means: `Outcome.means` of each micro-batch. Every process must call this: the means are averaged over all.
        """
        for name in self.student.heads:
            mean = torch.stack([part[name] for part in means]).mean(dim=0)
            if distributed.is_available() and distributed.is_initialized():
                distributed.all_reduce(mean)
                mean /= distributed.get_world_size()
            center = self.center(name)
            center.copy_(losses.moved_center(center, mean, self.method.center_momentum))

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Average the student into the teacher, after an accepted step.

        Args:
            momentum: lambda_m, share of the teacher that stays; 1 leaves it bit for bit, 0 copies the student.

        Reference: section 3.2, theta_t = lambda_m theta_t + (1 - lambda_m) theta_s.
        """
        students = dict(self.student.named_parameters())
        pairs = [(mine, students[name]) for name, mine in self.teacher.named_parameters()]
        torch._foreach_lerp_([mine for mine, _ in pairs], [student for _, student in pairs], 1 - momentum)

    def freeze_last_layers(self) -> None:
        """Take away the gradients of the heads' last layers: call between backward and the optimizer step.

        Reference: DINO and iBOT do so in the first epoch.
        """
        for name in self.student.heads:
            prototypes = self.student.head(name).prototypes
            if prototypes is not None:
                prototypes.grad = None


def _swap_views(values: Tensor) -> Tensor:
    """Rows of u in place of those of v, and the other way round."""
    return values.roll(len(values) // 2, dims=0)


def _pick(tokens: Tensor, picked: Tensor) -> Tensor:
    """The picked cells' tokens of each view."""
    return tokens.gather(1, picked[:, :, None].expand(-1, -1, tokens.shape[-1]))


def _mean_of_views(prediction: Tensor, truth: Tensor, hidden: Tensor) -> Tensor:
    """The image term of u and that of v, averaged; the rows are the hidden cells of all views."""
    ends = [int(half.sum()) for half in hidden.chunk(2)]
    pairs = zip(torch.split(prediction, ends), torch.split(truth, ends), strict=True)
    return torch.stack([losses.masked_l1(*view) for view in pairs]).mean()
