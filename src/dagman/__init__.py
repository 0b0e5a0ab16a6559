"""DAGMaN: self-supervised pretraining for CT, and what the encoder is for.

Names below are imported when they are first used, so that `import dagman` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dagman.ct.prepare import PrepareConfig, prepare
    from dagman.ct.read import read
    from dagman.ct.store import PreparedStore
    from dagman.errors import DagmanError
    from dagman.nets.swin import SwinConfig, SwinEncoder
    from dagman.nets.vit import ViTConfig, ViTEncoder
    from dagman.nets.weights import export_monai, load_encoder
    from dagman.run import Run
    from dagman.tasks.attention import attention_map
    from dagman.tasks.classify import probe
    from dagman.tasks.cluster import cluster
    from dagman.tasks.diversity import head_diversity
    from dagman.tasks.embed import embed
    from dagman.train.classify import finetune
    from dagman.train.pretrain import PretrainConfig, pretrain

__version__ = "0.1.0"

_HOMES = {
    "DagmanError": "dagman.errors",
    "PrepareConfig": "dagman.ct.prepare",
    "PreparedStore": "dagman.ct.store",
    "PretrainConfig": "dagman.train.pretrain",
    "Run": "dagman.run",
    "SwinConfig": "dagman.nets.swin",
    "SwinEncoder": "dagman.nets.swin",
    "ViTConfig": "dagman.nets.vit",
    "ViTEncoder": "dagman.nets.vit",
    "attention_map": "dagman.tasks.attention",
    "cluster": "dagman.tasks.cluster",
    "embed": "dagman.tasks.embed",
    "export_monai": "dagman.nets.weights",
    "finetune": "dagman.train.classify",
    "head_diversity": "dagman.tasks.diversity",
    "load_encoder": "dagman.nets.weights",
    "prepare": "dagman.ct.prepare",
    "pretrain": "dagman.train.pretrain",
    "probe": "dagman.tasks.classify",
    "read": "dagman.ct.read",
}
__all__ = [
    "DagmanError",
    "PrepareConfig",
    "PreparedStore",
    "PretrainConfig",
    "Run",
    "SwinConfig",
    "SwinEncoder",
    "ViTConfig",
    "ViTEncoder",
    "attention_map",
    "cluster",
    "embed",
    "export_monai",
    "finetune",
    "head_diversity",
    "load_encoder",
    "prepare",
    "pretrain",
    "probe",
    "read",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dagman' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted([*__all__, "__version__"])
