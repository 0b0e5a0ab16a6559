"""Write the tables of README and docs from `benchmarks/results/*.json`; no figure is typed by hand.

A document marks a table with `<!-- table: NAME -->` and `<!-- end -->`; `make docs` fills what stands between.
"""

import functools
import re
from collections.abc import Callable

import ablation
import alarms
import asking
import contract
import factors
import learning
import speed
import tiny
import uses
from common import RESULTS, ROOT, interval, load, machine, rows

DOCUMENTS = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in (
            "learning",
            "learning-factors",
            "ablation",
            "uses",
            "classification",
            "segmentation",
            "performance",
            "paper-to-code",
        )
    ),
)

READINGS = {
    "image_error_ratio": "image error / that of predicting each view's visible mean",
    "pooled_spread": "spread of the pooled features",
    "aitd_teacher_entropy": "teacher entropy of [CLS] / ln K",
    "attention_entropy": "attention entropy / ln N",
    "attention_peak": "attention peak, times uniform",
    "ampd_image_nats": "nats about the image in the teacher's targets for cells",
    "ampd_position_nats": "nats about the cell's place in them",
    "gitd_image_nats": "nats about the image in its pooled targets",
}


def demo() -> str:
    """The probe of `make demo`."""
    result = load("demo")
    body = [
        [
            row["features"],
            interval(row["auc"]),
            interval(row["sensitivity"]),
            interval(row["specificity"]),
            interval(row["first_minus_this"]),
        ]
        for row in result["probe"]
    ]
    first = result["probe"][0]
    steps = f"{result['training']['steps']} steps of pretraining"
    note = (
        f"Malignant or benign nodule, {first['cases']} phantoms of {first['patients']} patients, "
        f"{first['folds']} folds by patient, {steps}. Untrained: the AUC is of one encoder, the difference from any of "
        f"three. {machine(result)}."
    )
    return rows(["features", "AUC", "sensitivity", "specificity", "AUC of pretrained minus this"], body) + "\n\n" + note


def demo_training() -> str:
    """How the demo's pretraining ended."""
    training = load("demo")["training"]
    names = [name for name in READINGS if name in training]
    return rows(
        ["at the end of the demo's pretraining", ""], [[READINGS[name], f"{training[name]:.3f}"] for name in names]
    )


def tour() -> str:
    """What the verbs print."""
    return f"```\n{(RESULTS / 'tour.txt').read_text()}```"


TABLES: dict[str, Callable[[], str]] = {
    "ablation-clusters": ablation.clusters,
    "ablation-hiding": ablation.hiding,
    "ablation-losses": ablation.losses,
    "ablation-encoder": ablation.encoder,
    "ablation-diversity": ablation.diversity,
    "ablation-stage": ablation.stage,
    "contract": contract.contract,
    "demo": demo,
    "bench": speed.bench,
    "threads": speed.threads,
    "gpu-aims": speed.gpu_aims,
    "gpu-clocks": speed.gpu_clocks,
    "gpu-proofs": speed.gpu_proofs,
    "gpu-steps": speed.gpu_steps,
    "gpu-kernels": speed.gpu_kernels,
    "learning-factors": factors.learning_factors,
    "learning-long": factors.learning_long,
    "learning-older": factors.learning_older,
    "tiny-settings": tiny.tiny_settings,
    "learning-broken": factors.learning_broken,
    "learning-alarms": alarms.learning_alarms,
    "learning-attention": asking.learning_attention,
    "learning-half": asking.learning_half,
    "learning-heads": learning.learning_heads,
    "learning-far": learning.learning_far,
    "learning-limits": alarms.learning_limits,
    "learning-look": learning.learning_look,
    "learning-methods": factors.learning_methods,
    "learning-methods-auc": factors.learning_methods_auc,
    "learning-methods-short": functools.partial(factors.learning_methods, factors.SHORT),
    "learning-methods-short-auc": functools.partial(factors.learning_methods_auc, factors.SHORT),
    "learning-levels": asking.learning_levels,
    "learning-side": asking.learning_side,
    "learning-pairs": asking.learning_pairs,
    "learning-parts": learning.learning_parts,
    "learning-probes": learning.learning_probes,
    "learning-reach": learning.learning_reach,
    "demo-training": demo_training,
    "step": speed.step,
    "others": speed.others,
    "step-ladder": speed.step_ladder,
    "step-parts": speed.step_parts,
    "step-targets": speed.step_targets,
    "store": speed.store,
    "tour": tour,
    "uses-attention": uses.uses_attention,
    "learning-answer": asking.learning_answer,
    "learning-claims": learning.learning_claims,
    "learning-null": learning.learning_null,
    "learning-size": asking.learning_size,
    "learning-short": learning.learning_short,
    "learning-today": factors.learning_today,
    "learning-when": learning.learning_when,
    "input": speed.input_rates,
    "scaling": speed.scaling,
    "uses-classify": uses.uses_classify,
    "uses-cluster": uses.uses_cluster,
    "uses-diversity": uses.uses_diversity,
    "uses-segment": uses.uses_segment,
}


def filled(text: str) -> str:
    """A document with its tables written anew."""
    return re.sub(
        r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text()))
        print(f"wrote {document.relative_to(ROOT)}")
