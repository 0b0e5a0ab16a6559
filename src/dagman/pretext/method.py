"""The settings of the pretext task: which losses count, what is hidden from whom, sizes and temperatures."""

from dataclasses import dataclass
from typing import Literal

from dagman.errors import DagmanError
from dagman.nets.encoder import EncoderConfig
from dagman.nets.swin import SwinConfig
from dagman.pretext import hiding


def _require(holds: bool, field: str, value: object, advice: str) -> None:
    if not holds:
        raise DagmanError("CONFIG", f"method.{field}", f"cannot be {value}", advice)


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """How much each loss counts in the total; one of weight 0 builds no head. Defaults: paper, appendix A."""

    amip: float = 1.0
    """Attention-guided masked image prediction."""
    ampd: float = 0.1
    """Attention-guided masked patch distillation."""
    aitd: float = 0.1
    """Attention-guided image token distillation."""
    gitd: float = 0.1
    """Global image token distillation."""

    def __post_init__(self) -> None:
        weights = vars(self)
        for name, weight in weights.items():
            _require(weight >= 0, f"losses.{name}", weight, "give a weight of at least 0")
        _require(any(weights.values()), "losses", "0 altogether", "give one a weight above 0")


@dataclass(frozen=True, kw_only=True)
class HidingConfig:
    """What is hidden from the student."""

    kind: Literal["attended", "unattended", "random", "blocks"] = "attended"
    """`attended`: the cells that the teacher attends to most; `unattended`: those it attends to least (MST); `random`:
    any (SMIT); `blocks`: boxes of cells (iBOT)."""
    ratio: float = 0.7
    """r, share of a view's cells to hide, or to rank for hiding (paper: 0.7)."""
    lowest_ratio: float | None = None
    """Where given, r is drawn evenly from here to `ratio`: once a batch where attention guides (AttMask), else for each
    view (iBOT)."""
    hint_ratio: float = 0.1
    """s, share of a view's cells that stay visible as hints (paper: 0.1). For `attended` only."""
    hints: hiding.Hints = "top"
    """`top` (paper), `attmask` (a random part of the top), `shift` (hide as many as without hints) or `none`."""
    probability: float = 1.0
    """Chance that a view is hidden at all (AttMask: 0.5)."""
    start_step: int = 0
    """Before this step guided hiding is random, while the attention is still arbitrary; blocks hide nothing (iBOT)."""

    def __post_init__(self) -> None:
        _require(0 <= self.ratio <= 1, "hidden.ratio", self.ratio, "choose a share from 0 to 1 (paper: 0.7)")
        _require(0 <= self.least <= self.ratio, "hidden.lowest_ratio", self.lowest_ratio, "give at most hidden.ratio")
        _require(0 <= self.probability <= 1, "hidden.probability", self.probability, "choose a share from 0 to 1")
        _require(self.start_step >= 0, "hidden.start_step", self.start_step, "give 0 or more")
        if self.kind != "attended" or self.hints == "none":
            return
        most = 1 - self.ratio if self.hints == "shift" else self.least
        _require(
            0 <= self.hint_ratio <= most + hiding.ROUNDING,
            "hidden.hint_ratio",
            self.hint_ratio,
            f"choose a share from 0 to {most:.3g} for hints {self.hints} and ratio {self.ratio}",
        )

    @property
    def least(self) -> float:
        """The smallest r that is drawn."""
        return self.ratio if self.lowest_ratio is None else self.lowest_ratio

    @property
    def guided(self) -> bool:
        """Whether the teacher's attention decides what is hidden."""
        return self.kind in ("attended", "unattended")

    @property
    def sentence(self) -> str:
        """How what is hidden is chosen, for the eye."""
        hints = " What is attended to most of all may stay visible, as a hint." * (self.hints != "none")
        return {
            "attended": f"Hidden from the student: what is attended to most.{hints}",
            "unattended": "Hidden from the student: what is attended to least.",
            "random": "Hidden from the student: any cells.",
            "blocks": "Hidden from the student: boxes of cells.",
        }[self.kind] + " Some views are left whole." * (self.probability < 1)

    def most(self, cells: int, *, attended: bool) -> int:
        """The largest number of cells of a view that are hidden, where it is hidden at all.

        Args:
            cells: N, cells of a view.
            attended: Whether there is attention to follow at this step.
        """
        if self.kind == "random" or (self.guided and not attended):
            return hiding.ceil_count(self.ratio, cells)
        shown = 0.0
        if self.kind == "attended":
            shown = {"top": self.hint_ratio, "attmask": self.hint_ratio * self.least}.get(self.hints, 0.0)
        return hiding.floor_count(self.ratio, cells) - hiding.floor_count(shown, cells)


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Shape and sizes of the projection heads (iBOT's; K from the SMIT authors' code, the paper gives none)."""

    kind: Literal["mlp", "linear", "none"] = "mlp"
    """`mlp`: three layers to a unit vector and its cosines with K prototypes (DINO, iBOT); `linear`: one layer to K;
    `none`: the features themselves are the logits."""
    shared: bool = False
    """One head for [CLS] and cells, each with a center of its own: `--shared_head true` of iBOT's and AttMask's
    published commands."""
    num_prototypes: int = 8192
    """K, outputs of a head. Small data wants 512 to 4096."""
    hidden_width: int = 2048
    bottleneck_width: int = 256

    def __post_init__(self) -> None:
        sizes = (self.num_prototypes, self.hidden_width, self.bottleneck_width)
        _require(min(sizes) > 1, "heads", sizes, "give sizes of at least 2")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """One point of the space of methods; the defaults are DAGMaN."""

    losses: LossWeights = LossWeights()
    hidden: HidingConfig = HidingConfig()
    dropped_ratio: float = 0.7
    """r_t, share of each view's cells dropped from the teacher (paper: 0.7); 0 is a clean teacher."""
    dropped_by: Literal["cell", "patch"] = "cell"
    """What is dropped as one: a cell, or a patch of the embedding."""
    guide: Literal["noisy", "clean"] = "noisy"
    """Whose attention guides hiding: the noisy teacher's (paper), or one clean pass more."""
    pooled_stage: Literal[3, 4] = 4
    """Stage of a Swin whose output tokens GITD pools (paper: 4; SMIT: 3)."""
    heads: HeadConfig = HeadConfig()
    student_temperature: float = 0.1
    """tau_s (DINO, iBOT)."""
    class_temperature: tuple[float, float] = (0.04, 0.07)
    """tau_t of the [CLS] and pooled heads, at the start and after its rise (iBOT)."""
    patch_temperature: tuple[float, float] = (0.04, 0.07)
    """tau_t of the patch head, at the start and after its rise."""
    patch_temperature_waits: bool = True
    """Its rise begins when the other's has ended (SMIT's published settings); false: they rise together (iBOT's and
    AttMask's on a ViT)."""
    patch_centers: Literal["shared", "position"] = "shared"
    """One center for all cells (iBOT), or one for each position of the grid, which takes from the teacher's targets
    what the place of a cell alone decides."""
    balance: Literal["centering", "sinkhorn"] = "centering"
    """What keeps the teacher from naming the same prototypes for everything: moving centers (paper), or Sinkhorn-Knopp
    over the batch of each process (SwAV), for batches too small for centers to learn from."""
    center_momentum: float = 0.9
    """Share of a center that stays at each step (DINO)."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.dropped_ratio < 1, "dropped_ratio", self.dropped_ratio, "choose a share below 1 (paper: 0.7)"
        )
        _require(0 <= self.center_momentum < 1, "center_momentum", self.center_momentum, "choose a share below 1")
        temperatures = (self.student_temperature, *self.class_temperature, *self.patch_temperature)
        _require(min(temperatures) > 0, "temperatures", temperatures, "give values above 0")


def check_fit(encoder: EncoderConfig, method: MethodConfig) -> None:
    """Refuse an encoder that lacks what the method needs.

    Raises:
        DagmanError: `E-CONFIG`.
    """
    last = method.losses.amip + (method.losses.gitd if method.pooled_stage == 4 else 0)
    _require(
        not isinstance(encoder, SwinConfig) or encoder.cell_stage == 4 or last > 0,
        "losses.amip and losses.gitd",
        "both 0" if method.pooled_stage == 4 else "0 and on stage 3",
        "set losses.gitd to 0.1 with pooled_stage 4: nothing else trains the last stage of the Swin",
    )
    _require(
        isinstance(encoder, SwinConfig) or method.pooled_stage == 4,
        "pooled_stage",
        "3 with a ViT, which has no stages",
        "set pooled_stage to 4: the mean of the last tokens",
    )
    _require(
        not method.heads.shared or min(method.losses.ampd, method.losses.aitd) > 0,
        "heads.shared",
        "true without both AMPD and AITD",
        "set heads.shared to false or give both losses a weight",
    )
    if not encoder.has_cls:
        _require(
            not method.losses.aitd,
            "losses.aitd",
            f"{method.losses.aitd} without semantic attention",
            "set losses.aitd to 0 or give the encoder semantic attention",
        )
        _require(
            not method.hidden.guided,
            "hidden.kind",
            f"{method.hidden.kind} without semantic attention",
            "set hidden.kind to random or blocks, or give the encoder semantic attention",
        )
    elif isinstance(encoder, SwinConfig) and encoder.attention and encoder.attention.placement == "branch":
        _require(
            method.losses.ampd + method.losses.aitd > 0,
            "losses.ampd and losses.aitd",
            "both 0 with semantic attention as a branch",
            "give one a weight, or put it in series: nothing else would train it",
        )


def without_effect(encoder: EncoderConfig, method: MethodConfig) -> dict[str, str]:
    """Settings, by their dotted names, that would change nothing here, and why."""
    weights, hidden, found = method.losses, method.hidden, dict[str, str]()

    def inert(holds: object, why: str, *names: str) -> None:
        if holds:
            found.update(dict.fromkeys(names, why))

    inert(hidden.kind != "attended", f"hiding is {hidden.kind}", "method.hidden.hints", "method.hidden.hint_ratio")
    inert(hidden.hints == "none", "there are no hints", "method.hidden.hint_ratio")
    inert(hidden.kind == "random", "hiding is random from the first step", "method.hidden.start_step")
    inert(not hidden.guided, f"no attention guides hiding: it is {hidden.kind}", "method.guide")
    inert(not method.dropped_ratio, "the teacher is clean", "method.guide", "method.dropped_by")
    inert(encoder.cell_side == encoder.patch_side, "a cell is a patch", "method.dropped_by")
    last = "optimisation.freeze_last_layer_ratio"
    inert(method.heads.kind == "none", "there are no heads", "method.heads.num_prototypes", last)
    sizes = ("method.heads.hidden_width", "method.heads.bottleneck_width")
    inert(method.heads.kind != "mlp", f"heads are {method.heads.kind}", *sizes)
    patches = ("method.patch_temperature", "method.patch_temperature_waits", "method.patch_centers")
    inert(not weights.ampd, "AMPD does not count", *patches)
    inert(not (weights.aitd or weights.gitd), "neither AITD nor GITD counts", "method.class_temperature")
    inert(not weights.gitd, "GITD does not count", "method.pooled_stage")
    one_center = not weights.ampd or method.patch_centers == "shared"
    inert(method.balance == "sinkhorn" and one_center, "Sinkhorn-Knopp cancels centers", "method.center_momentum")
    heads = [
        f"method.heads.{name}" for name in ("kind", "shared", "num_prototypes", "hidden_width", "bottleneck_width")
    ]
    targets = ("method.balance", "method.center_momentum", "method.student_temperature")
    inert(not (weights.ampd or weights.aitd or weights.gitd), "no loss distils", *heads, *targets, last)
    if isinstance(encoder, SwinConfig):
        inert(encoder.attention, "cells are those of semantic attention", "encoder.plain_cell_stage")
    return found
