"""The folder of an ablation: which run stands where, how each ended, and the tables and picture of all of them."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dagman import config as configs
from dagman import files
from dagman.ablation import notes, scores
from dagman.ablation.axes import AXES, facts, papers
from dagman.ablation.scores import Organs
from dagman.ct.read import read
from dagman.ct.store import PreparedStore, refuse_inside
from dagman.errors import DagmanError, ExitCode
from dagman.figures import ablation as figure
from dagman.figures import clusters as clusters_figure
from dagman.figures import image
from dagman.nets.encoder import Encoder
from dagman.nets.weights import load_encoder
from dagman.tasks import attention, classify, cluster, family, leakage, pointing, watching
from dagman.tasks.embed import untrained
from dagman.tasks.family import Judged, Row
from dagman.train.job import split_rows
from dagman.train.settings import PretrainConfig
from dagman.types import Preparation, Scan

TITLES = {
    "image_error_ratio": "image error / that of the visible mean",
    scores.ATTENTION: "attention without noise, entropy / ln N",
    "pooled_spread": "spread of pooled features",
}
"""What is drawn beside the probe."""
CLUSTERS = {cluster.MEANINGS[name]: f"organs, {cluster.MEANINGS[name]}" for name in ("map_ratio", "knn")}
"""What is drawn of clusters of organs, where they were asked for."""
HEADS = {
    "distance_entropy_ratio": "entropy of heads' distances / ln(heads), 1 where all look equally far",
    "distance_mm": "how far heads look: attention-weighted distance, mm",
}
_LAID_OUT = set(cluster.MEANINGS.values())
_SCORES = "scores.json"
_KEY = 12
"""Digits of a hash that name a folder."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """A family in its folder."""

    axis: str
    base: PretrainConfig
    store: PreparedStore
    folder: Path
    devices: int
    members: Mapping[str, PretrainConfig]

    @property
    def table(self) -> Path:
        """One line a run."""
        return self.folder / f"{self.axis}.csv"

    @property
    def summary(self) -> Path:
        """One line a variant and measure."""
        return self.folder / f"{self.axis}-summary.csv"

    @property
    def picture(self) -> Path:
        """The figure."""
        return self.folder / f"{self.axis}.png"

    @property
    def clusters(self) -> Path:
        """The maps of crops of organs, of the first seed of each variant."""
        return self.folder / f"{self.axis}-clusters.png"

    @property
    def maps(self) -> Path:
        """Folder of attention maps on a CT."""
        return self.folder / f"{self.axis}-attention"

    @property
    def _settings(self) -> Path:
        return self.folder / f"{self.axis}.json"

    @property
    def full(self) -> str:
        """The member that is the base itself: all others are compared with it."""
        return next(name for name, member in self.members.items() if _seedless(member) == _seedless(self.base))

    def run(self, name: str, seed: int) -> Path:
        """Folder of a run: the same for the same settings, store and devices, whatever the axis."""
        return self.folder / "runs" / f"{self._key(name)}-seed{seed}"

    def _key(self, name: str) -> str:
        member = self.members[name]
        settings = configs.deciding(_seedless(member))
        return f"{member.recipe}-{_hash(settings, self.store.store_id, self.devices)}"

    def _new(self, name: str) -> Path:
        """Of the probes of a member's encoder with new weights: one for all members that share its sizes."""
        member = self.members[name]
        sizes = configs.to_dict(member.encoder), configs.to_dict(member.data)
        return self.folder / "untrained" / _hash(*sizes, self.store.store_id)

    def begin(
        self, labelled: PreparedStore | None, finetune: int | None, organs: Organs | None, scan: Scan | None
    ) -> None:
        """Note what is compared and with which cases, where `check` finds nothing against it."""
        before, now = scores.kept(self._settings), self.check(labelled, finetune, organs, scan)
        files.write_json(self._settings, now)
        if now["organs"] != before.get("organs"):
            self.clusters.unlink(missing_ok=True)

    def check(
        self, labelled: PreparedStore | None, finetune: int | None, organs: Organs | None, scan: Scan | None
    ) -> dict[str, object]:
        """What is compared and with which cases; that this is what the folder compares, and can be asked of its runs.

        Raises:
            DagmanError: `E-OUTPUT`, exit code 4, for a folder in a prepared store; `E-RESUME` (4) for another base,
                store or number of devices; `E-GRID`, `E-LABEL`, `E-PATIENT`, `E-FOLDS` and `E-LEAK` for cases that
                cannot be probed; `E-USAGE` for fine-tuning without such cases, `E-CONFIG` for fine-tuning of no steps;
                `E-UMAP`, `E-NOMASK`, `E-LABEL` and `E-GRID` for organs that cannot be laid out; as `ct.read.read` for
                the scan.
        """
        refuse_inside(self.folder)
        base = configs.deciding(_seedless(self.base))
        now = {"base": base, "store": self.store.store_id, "devices": self.devices}
        before = scores.kept(self._settings)
        if lines := configs.difference(before["compared"], json.loads(json.dumps(now))) if before else []:
            raise DagmanError(
                "RESUME",
                self._settings,
                f"compares runs of other settings ({'; '.join(lines)})",
                "give the old settings again, or choose another output folder",
                exit_code=ExitCode.REFUSED,
            )
        look = Preparation(spacing_mm=float(self.store.settings["spacing_mm"]), crop=self.base.data.crop)
        if labelled is not None:
            study = watching.check(labelled, look)
            if (count := len(study.classes.names)) != 2:
                problem = f"has labels of {count} classes, and a comparison asks about two"
                raise DagmanError("LABEL", labelled.folder, problem, "give a store with labels of two classes")
            nothing = leakage.Seen(known=True, how={}, learnt={})
            leakage.refuse(nothing, leakage.twins(labelled), study.together, classify.TASK)
        if finetune is not None:
            scores.tuning(finetune)
            if labelled is None:
                problem = "was asked for without labelled cases to learn from"
                raise DagmanError("USAGE", "--finetune", problem, "give --labelled too")
        if scan is not None:
            read(scan)
        return {
            "compared": now,
            "labelled": before.get("labelled") if labelled is None else _identity(labelled),
            "finetune": before.get("finetune") if finetune is None else finetune,
            "organs": organs.check(look) if organs else before.get("organs"),
        }

    def scored(self, run: Path) -> bool:
        """Whether a run is finished and how it ended is known."""
        return "measures" in scores.kept(run / _SCORES)

    def score(
        self,
        name: str,
        run: Path,
        labelled: PreparedStore | None,
        organs: Organs | None,
        *,
        device: str,
        say: Callable[[str], None],
    ) -> None:
        """Find out how a finished run ended, probe it, lay out its organs; what is known is not asked again."""
        if not self.scored(run):
            say("measuring its attention heads")
            measures = scores.ends(run) | scores.heads(load_encoder(run), self.store, device)
            files.write_json(run / _SCORES, {"measures": measures})
        if labelled is not None:
            place, new = (where / _identity(labelled) for where in (run / "probes", self._new(name)))
            if scores.probed(place) is None:
                say("probing it")
                scores.probe(load_encoder(run), labelled, place, run, device)
            if scores.probed(new) is None:
                say("probing its encoder untrained")
                scores.probe(untrained(load_encoder(run)), labelled, new, run, device)
        if organs is not None:
            place, new = (where / organs.identity for where in (run / "clusters", self._new(name) / "clusters"))
            if scores.clustered(place) is None:
                say("laying out organs")
                scores.clusters(load_encoder(run), organs, place, device)
            if scores.clustered(new) is None:
                say("laying out organs, untrained")
                scores.clusters(untrained(load_encoder(run)), organs, new, device)
        known = scores.kept(run / _SCORES)
        if "failed" in known:
            files.write_json(run / _SCORES, {"measures": known["measures"]})

    def finetune(
        self,
        name: str,
        run: Path,
        labelled: PreparedStore | None,
        steps: int | None,
        *,
        say: Callable[[str], None],
        **how: Any,
    ) -> bool:
        """Fine-tune a finished run and its encoder untrained, where it is asked for and not done yet.

        Returns:
            False where a stop was asked for; the same call continues.
        """
        if labelled is None or steps is None:
            return True
        for weights, where in ((run, run), (None, self._new(name))):
            place = where / _tuned_in(_identity(labelled), steps)
            if scores.tuned(place) is None:
                say(f"fine-tuning {'this run' if weights else 'its encoder untrained'}: {place}")
                encoder = load_encoder(run) if weights else untrained(load_encoder(run))
                if not scores.finetune(encoder, labelled, place, steps, weights=weights, say=say, **how):
                    return False
        return True

    def note_failure(self, run: Path, error: DagmanError) -> None:
        """Keep why a run failed, beside what is known of it, until it succeeds."""
        files.write_json(run / _SCORES, scores.kept(run / _SCORES) | {"failed": f"E-{error.code}"})

    def rows(self) -> list[Row]:
        """Every run of the axis in the folder that was scored or failed, seed by seed."""
        asked = scores.kept(self._settings)
        found: dict[tuple[int, int], Row] = {}
        for number, name in enumerate(self.members):
            for run in self.folder.glob(f"runs/{self._key(name)}-seed*"):
                seed = run.name.rpartition("-seed")[2]  # no number of runs that `--fresh` moved aside, and of copies
                if seed.isdigit() and (known := scores.kept(run / _SCORES)):
                    organs = self._organs(run, asked)
                    found[int(seed), number] = Row(
                        variant=name,
                        seed=int(seed),
                        status=f"failed: {known['failed']}" if "failed" in known else "scored",
                        run=run.name,
                        measures=known.get("measures", {}) | (organs[0] if organs else {}),
                        probed=scores.probed(run / "probes" / asked["labelled"]) if asked.get("labelled") else None,
                        tuned=_tuned(run, asked),
                    )
        return [found[place] for place in sorted(found)]

    def _organs(self, place: Path, asked: Mapping[str, Any]) -> tuple[dict[str, float], clusters_figure.Panel] | None:
        """Clusters of the organs that were last asked for, of a run or of an untrained encoder in its folder."""
        return scores.clustered(place / "clusters" / asked["organs"]["identity"]) if asked.get("organs") else None

    def untrained(self) -> dict[tuple[str, ...], Row]:
        """Members that share an encoder to its row with new weights, where it was asked anything."""
        asked = scores.kept(self._settings)
        places: dict[Path, list[str]] = {}
        for name in self.members:
            places.setdefault(self._new(name), []).append(name)
        found = {}
        for place, names in places.items():
            probed = scores.probed(place / asked["labelled"]) if asked.get("labelled") else None
            organs, tuned = self._organs(place, asked), _tuned(place, asked)
            if probed or organs or tuned:
                found[tuple(names)] = Row(
                    variant="untrained" if len(places) == 1 else f"untrained: {', '.join(names)}",
                    seed=None,
                    status="untrained",
                    measures=organs[0] if organs else {},
                    probed=probed,
                    tuned=tuned,
                )
        return found

    def laid_out(self, rows: Sequence[Row], new: Mapping[tuple[str, ...], Row]) -> list[clusters_figure.Panel]:
        """Crops of organs as the first seed of each variant that did lays them out, then as untrained encoders do."""
        asked, places = scores.kept(self._settings), dict[str, tuple[str, Path]]()
        for row in rows:
            if _LAID_OUT & row.measures.keys():
                places.setdefault(row.variant, (f"{row.variant}, seed {row.seed}", self.folder / "runs" / row.run))
        places = {name: places[name] for name in self.members if name in places}
        places |= {row.variant: (row.variant, self._new(names[0])) for names, row in new.items()}
        known = [(title, self._organs(place, asked)) for title, place in places.values()]
        return [organs[1]._replace(title=title) for title, organs in known if organs]

    def write(self, planned: Sequence[tuple[str, int]]) -> None:
        """Write tables and picture of all that is known.

        Args:
            planned: Variant and seed of the runs that this call was asked for.
        """
        rows, new = self.rows(), self.untrained()
        if not rows:
            return
        title, sentences = self.heading(rows, planned)
        note = " ".join([title, *sentences])
        every = [*rows, *new.values()]
        found = family.summaries(every, self.full)
        spacing_mm, reported = float(self.store.settings["spacing_mm"]), papers(self.axis, self.base)
        told = {name: facts(member, spacing_mm) for name, member in self.members.items()}
        family.write_runs(every, told, reported, self.table, note=note)
        family.write_summary(found, self.summary, note=note)
        baselines = {
            auc: {name: row.values[auc] for names, row in new.items() for name in names if auc in row.values}
            for auc in family.TITLES
        }
        laid_out = self.laid_out(rows, new)
        titles = TITLES | (CLUSTERS if laid_out else {})
        drawn = family.panels(rows, found, titles, full=self.full, baselines=baselines)
        heads = {label: family.by_place(rows, reading) for reading, label in HEADS.items()}
        by_measure = {
            measure: {name: paper[measure] for name, paper in reported.items() if measure in paper}
            for measure in dict.fromkeys(measure for paper in reported.values() for measure in paper)
            if not measure.endswith("SD")
        }
        picture = image.png(figure.draw(list(self.members), drawn, by_measure, heads, title=title, notes=sentences))
        files.write_bytes(self.picture, picture)
        if laid_out:
            files.write_bytes(self.clusters, clusters_figure.png(laid_out))

    def look(self, scan: Scan, device: str, say: Callable[[str], None]) -> None:
        """Show on one CT where the first seed of each variant that has [CLS] looks; one without weights is told of.

        Raises:
            DagmanError: As `ct.read.read`.

        Reference:
            Figure 6.
        """
        encoders = dict[str, Encoder]()
        shown = set[str]()
        for row in self.rows():
            if row.variant in shown or row.status != "scored" or not self.members[row.variant].encoder.has_cls:
                continue
            try:
                encoders[f"{row.variant}, seed {row.seed}"] = load_encoder(self.folder / "runs" / row.run)
                shown.add(row.variant)
            except DagmanError as error:
                say(str(error))
        if encoders:
            say(f"attention of {len(encoders)} variants on {scan.case_id}")
            found = attention.explain(encoders, scan, self.maps, device=device)
            points = pointing.write([look.pointing for look in found.looks.values()], self.maps)
            say(f"wrote {', '.join(map(str, [found.picture, *points]))}")

    def heading(self, rows: Sequence[Row], planned: Sequence[tuple[str, int]]) -> tuple[str, list[str]]:
        """What was run, how far that is from what the paper ran, and how to read it: a title and sentences."""
        axis, length = AXES[self.axis], self.base.optimisation
        done = {(row.variant, row.seed) for row in rows if row.status == "scored"} & set(planned)
        part = "" if len(done) == len(planned) else f", {len(done)} of {len(planned)} runs"
        steps = f"{length.steps} steps" if length.steps else f"{length.epochs} epochs"
        recipes = dict.fromkeys(member.recipe for member in self.members.values())
        crop = "x".join(map(str, self.base.data.crop))
        here = f"{', '.join(recipes)}; {len(split_rows(self.store)[0])} volumes, {steps}, crops of {crop} voxels"
        known, tuned = scores.kept(self._settings), any(row.tuned for row in rows)
        numbers = any(papers(self.axis, self.base).values())
        laid_out = any(_LAID_OUT & row.measures.keys() for row in rows)
        asked = {
            "clusters": ("organ clusters (`--organs STORE`)", laid_out),
            "maps": ("attention maps (`--scan CT`)", self.maps.exists()),
        }
        missing = [*axis.elsewhere, *([] if tuned else [notes.TUNING])]
        missing += [asked[one][0] for one in axis.pictures if not asked[one][1]]
        said = [
            f"Here: {here}. {notes.PAPER}; {notes.NUMBERS if numbers else notes.NO_NUMBERS}",
            notes.probe([row.probed for row in rows if row.probed]),
            *([notes.tuned(known["finetune"])] if tuned else []),
            *([notes.organs(known["organs"])] if laid_out else []),
            f"Differences: variant less '{self.full}', mean and range over the seeds that both have. {notes.INTERVALS}",
            axis.note,
            *([f"Not computed here: {', '.join(missing)}."] if missing else []),
        ]
        return f"{axis.title} ({axis.source}){part}.", said


def _seedless(config: PretrainConfig) -> PretrainConfig:
    return replace(config, optimisation=replace(config.optimisation, seed=0))


def _hash(*values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:_KEY]


def _tuned_in(labelled: str, steps: int) -> Path:
    """Where fine-tuning on these cases lies in the folder of a run: another place for other settings of ours."""
    return Path("finetuned") / f"{steps}-steps-{_hash(labelled, configs.to_dict(scores.tuning(steps)))}"


def _tuned(place: Path, asked: Mapping[str, Any]) -> Judged | None:
    """After the fine-tuning that was last asked for, of a run or of an untrained encoder in its folder."""
    if not asked.get("labelled") or not asked.get("finetune"):
        return None
    return scores.tuned(place / _tuned_in(asked["labelled"], asked["finetune"]))


def _identity(labelled: PreparedStore) -> str:
    return watching.identity(labelled)[:_KEY]
