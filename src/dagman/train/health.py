"""The collapse watch: named alarms when a run's diagnostics have been bad for long enough, with what to change."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, eq=False)
class Alarm:
    """A diagnostic that must not stay on the wrong side of a limit."""

    name: str
    column: str
    """Of `metrics.jsonl`."""
    otherwise: str | None = None
    """Column that stands for it in rows without it."""
    is_bad: Callable[[float], bool]
    limit: str
    """The condition in words."""
    steps: int
    """How many rows in a row raise the alarm; an examination is a row every `optimisation.examine_every` steps."""
    first_ratio: float = 0.0
    """Share of the run before which nothing is counted."""
    first_step: int = 1
    """Step before which nothing is counted, however short the run is."""
    advice: str


_GENTLER = (
    "lower optimisation.learning_rate or raise optimisation.warmup_ratio; with method.balance centering take sinkhorn"
)
_UNIFORM = "lower that head's teacher temperature, take fewer prototypes, or more volumes a step"
_SIGNAL = (
    "with method.balance centering take sinkhorn; else lower optimisation.momentum or that head's teacher temperature, "
    "take more steps (some hundred are few) or more volumes a step, halve optimisation.learning_rate or raise "
    "optimisation.warmup_ratio"
)
_ONE_HOT = (
    "with method.balance centering take sinkhorn; else raise that head's teacher temperature, or take more prototypes"
)

COLLAPSED = "features collapsed"

ALARMS = (
    *(
        Alarm(
            name=COLLAPSED,
            column=column,
            is_bad=lambda value: value < 0.03,
            limit="below 0.03 (random directions: 1)",
            steps=20,
            advice=_GENTLER,
        )
        for column in ("pooled_spread", "tokens_spread", "cls_spread")
    ),
    *(
        alarm
        for term in ("aitd", "ampd", "gitd")
        for alarm in (
            Alarm(
                name="teacher uniform",
                column=f"{term}_teacher_entropy",
                is_bad=lambda value: value > 0.999,
                limit="above 0.999 of ln K: the term teaches nothing",
                steps=30,
                advice=_UNIFORM,
            ),
            Alarm(
                name="teacher one-hot",
                column=f"{term}_teacher_entropy",
                is_bad=lambda value: value < 0.005,
                limit="below 0.005 of ln K: each output names one prototype",
                steps=50,
                advice=_ONE_HOT,
            ),
            Alarm(
                name="teacher constant",
                column=f"{term}_teacher_variety",
                # Not 0: the centers of places are off by .9^n of what they were, and say something by themselves.
                is_bad=lambda value: value < 1e-4,
                limit="below 1e-4: it says the same of everything",
                steps=20,
                advice=_GENTLER,
            ),
            Alarm(
                name="head dead",
                column=f"{term}_student_variety",
                is_bad=lambda value: value < 1e-5,
                limit="below 1e-5: the student's head says the same of everything",
                steps=30,
                advice="lower optimisation.learning_rate; where it does not wake, start anew with another "
                "optimisation.seed",
            ),
            Alarm(
                name="center runaway",
                column=f"{term}_center_size",
                is_bad=lambda value: value > 10,
                limit="above 10: the center is far from the logits it is the mean of",
                steps=40,
                advice="lower method.center_momentum",
            ),
            Alarm(
                name="no signal",
                column=f"{term}_loss_ratio",
                is_bad=lambda value: value > 0.985,
                limit="above 0.985 of ln K: the student finds nothing of what the teacher says",
                steps=50,
                first_ratio=0.5,
                advice=_SIGNAL,
            ),
            Alarm(
                name="targets tell nothing",
                column=f"{term}_image_nats",
                is_bad=lambda value: value < 0.1,
                limit="below 0.1: the teacher says nearly the same of every image",
                steps=1,
                first_ratio=0.05,
                first_step=100,
                advice=_SIGNAL,
            ),
        )
    ),
    Alarm(
        name="features in few directions",
        column="tokens_effective_rank",
        is_bad=lambda value: value < 2.5,
        limit="below 2.5 effective directions",
        steps=20,
        first_ratio=0.3,
        advice=_GENTLER,
    ),
    Alarm(
        name="features in few directions",
        # The last level of a Swin, or of a ViT, which has one less and begins at 2.7 to 3.
        column="level4_effective_rank",
        otherwise="level3_effective_rank",
        is_bad=lambda value: value < 2.2,
        limit="below 2.2 effective directions",
        steps=1,
        first_ratio=0.3,
        first_step=100,
        advice=_GENTLER,
    ),
    Alarm(
        name="image term does not learn",
        column="image_error_ratio",
        is_bad=lambda value: value > 1,
        limit="above 1: worse than predicting each view's visible mean",
        steps=50,
        first_ratio=0.5,
        advice="lower optimisation.learning_rate, or take more steps",
    ),
    Alarm(
        name="patch targets are positions",
        column="ampd_image_share",
        is_bad=lambda value: value < 0.5,
        limit="below 0.5: the teacher's distributions tell where a cell lies rather than what it shows",
        steps=1,
        first_ratio=0.05,
        first_step=100,
        advice="set method.patch_centers position and, of a Swin, encoder.attention.position attention",
    ),
    Alarm(
        name="hiding follows the noise",
        column="hidden_dropped_excess",
        is_bad=lambda value: not 0.87 < value < 1.15,
        limit="above 1.15 or below 0.87: what the teacher had dropped by chance decides what is hidden",
        steps=50,
        first_ratio=0.1,
        advice="set method.guide clean",
    ),
    Alarm(
        name="attention uniform",
        column="attention_entropy",
        is_bad=lambda value: value > 0.993,
        limit="above 0.993 of ln N: what it hides is arbitrary, and a picture of it is noise",
        steps=50,
        first_ratio=0.5,
        advice="raise encoder.attention.query_gain (of a Swin), lower optimisation.momentum, set encoder.hidden_token "
        "zero, or take more steps or more volumes a step",
    ),
)


class Watch:
    """Sees each row of the metrics and says what is wrong, each thing once until it has been well again as long.

    All it knows comes from the rows, so that a resumed run shows it the old ones again.

    Args:
        total_steps: Of the run.
    """

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._in_a_row = dict.fromkeys(ALARMS, 0)
        self._ringing: set[Alarm] = set()

    def see(self, row: Mapping[str, Any]) -> list[str]:
        """Alarms that this row raises. A value that is missing (a skipped step) neither adds nor forgives."""
        raised = []
        for alarm in ALARMS:
            column = alarm.column if alarm.column in row else alarm.otherwise or alarm.column
            value = row.get(column)
            if value is None or row["step"] <= max(alarm.first_ratio * self._total, alarm.first_step - 1):
                continue
            rang = alarm in self._ringing
            # Rows in a row that speak for a change: bad ones until it rings, good ones from then on.
            self._in_a_row[alarm] = self._in_a_row[alarm] + 1 if alarm.is_bad(value) != rang else 0
            if self._in_a_row[alarm] < alarm.steps:
                continue
            self._in_a_row[alarm] = 0
            self._ringing ^= {alarm}
            if not rang:
                lasting = f"for {alarm.steps} rows " if alarm.steps > 1 else ""
                raised.append(f"ALARM {alarm.name}: {column} is {value:.4g}, {lasting}{alarm.limit}; {alarm.advice}")
        return raised

    def ringing(self) -> set[str]:
        """Names of the alarms whose state lasts."""
        return {alarm.name for alarm in self._ringing}


def ringing(rows: Iterable[Mapping[str, Any]], total_steps: int) -> set[str]:
    """Names of the alarms that ring at the end of a run of these rows."""
    watch = Watch(total_steps)
    for row in rows:
        watch.see(row)
    return watch.ringing()
