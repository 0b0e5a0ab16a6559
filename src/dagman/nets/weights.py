"""Encoder weights on disk: safetensors, never pickle, with a report of what was loaded.

A file holds a Swin under MONAI's names, `swinViT.*`, beside `semantic_attention.*` and `hidden_token`, or a ViT under
the names it has here. What the network is and what it must be shown stands in the file's own header and, for people, in
`config.json` beside it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from dagman import config, files
from dagman.errors import DagmanError, ExitCode
from dagman.nets.encoder import Encoder, EncoderConfig, new
from dagman.nets.swin import AttentionConfig, SwinConfig, SwinEncoder
from dagman.nets.windows import relative_position_index
from dagman.types import LoadReport, Preparation

FORMAT = 1
MODEL_FILE = Path("weights", "model.safetensors")
SMALLEST_SHARE = 0.95
"""Of the Swin's parameters that must be found in a file."""
_HEADER = "dagman"
_WRAPPERS = re.compile(r"^(module\.|state_dict\.|backbone\.|transformer\.|swinViT\.)+")
_MONAI_BLOCK = re.compile(r"^layers([1-4])\.0\.")
_SMIT_BLOCK = re.compile(r"^layers\.([0-3])\.")


def save_encoder(encoder: Encoder, path: Path, card: Mapping[str, Any]) -> None:
    """Write weights, and `config.json` beside them.

    Args:
        encoder: What to save; `encoder.preparation` is written with it.
        path: Where, ending in `.safetensors`.
        card: What else a reader should know, such as `recipe` and `role`; plain JSON values.

    Raises:
        DagmanError: `E-DISK` when the disk is full or read-only.
    """
    described = {
        "format": FORMAT,
        **card,
        "network": config.to_dict(encoder.config),
        "preparation": config.to_dict(encoder.preparation),
    }
    tensors = encoder.state_dict()
    if isinstance(encoder, SwinEncoder):
        tensors = {_to_monai(name): tensor for name, tensor in tensors.items()}
    _write(path, tensors, {_HEADER: json.dumps(described, allow_nan=False)})
    files.write_json(path.with_name("config.json"), {**described, "file": path.name})


def load_encoder(path: Path | str) -> Encoder:
    """An encoder in eval mode, with its `preparation` and the `report` of what was loaded.

    Args:
        path: A run folder, the folder `weights` in it, or a safetensors file: this project's, of MONAI's
            SwinTransformer or SwinUNETR, or of SMIT. The network of a foreign file is read off the shapes of its
            tensors; it has no semantic attention.

    Raises:
        DagmanError: `E-WEIGHTS`, exit code 4, for a missing or damaged file, a pickle, NaN, or a file that fills less
            than 95 % of the Swin.
    """
    file = _find(Path(path))
    tensors, card = _read(file)
    network: EncoderConfig
    if card is None:
        named, kind, notes = _from_foreign(tensors)
        network, preparation = _infer_config(file, named), Preparation()
        if network.attention is None:
            notes += ("without semantic attention: no [CLS] token, no attention maps",)
        notes += ("how its training images were prepared is unknown, the defaults are assumed",)
    else:
        network, preparation, notes = _described(file, card)
        named, kind = tensors, "DAGMaN"
        if isinstance(network, SwinConfig):
            named = {_from_monai(name): tensor for name, tensor in tensors.items()}
    encoder = new(network, preparation)  # what the file lacks is the same each time
    report = replace(_fill(encoder, named, file, kind), notes=notes)
    if kind == "DAGMaN" and (report.missing or report.mismatched):
        raise _refused(
            file,
            f"lacks {_some(report.missing + report.mismatched)}, which its own description promises",
            "restore the file",
        )
    if report.share < SMALLEST_SHARE:
        raise _refused(
            file,
            f"fills {report.share:.1%} of the Swin's parameters, less than {SMALLEST_SHARE:.0%} "
            f"(missing: {_some(report.missing)}; of other shape: {_some(report.mismatched)})",
            "give weights of a Swin for one channel with patches of 2x2x2",
        )
    encoder.report = report
    return encoder


def export_monai(source: Encoder | Path | str, path: Path | str) -> LoadReport:
    """Write the Swin for MONAI's `SwinUNETR`, every `swinViT.*` tensor that it wants and no other.

    Args:
        source: An encoder, or what `load_encoder` takes.
        path: Where, ending in `.safetensors`.

    Raises:
        DagmanError: `E-WEIGHTS`, exit code 4, for a ViT; and as `load_encoder`.
    """
    encoder, path = load_encoder(source) if isinstance(source, (Path, str)) else source, Path(path)
    if not isinstance(encoder, SwinEncoder):
        raise _refused(
            encoder.report.source if encoder.report else path,
            "is a ViT, which MONAI's SwinUNETR has no place for",
            "export weights of a Swin, or use `dagman.load_encoder`",
        )
    network = encoder.config
    trunk = {_to_monai(name): value for name, value in encoder.state_dict().items() if _in_trunk(name)}
    index = relative_position_index(network.window, torch.device("cpu"))
    tables = [name for name in trunk if name.endswith("relative_position_bias_table")]
    buffers = {name.removesuffix("bias_table") + "index": index.clone() for name in tables}
    _write(path, {**trunk, **buffers}, {"format": "pt"})
    left = tuple(name for name in encoder.state_dict() if not _in_trunk(name))
    return LoadReport(
        source=path, kind="MONAI", loaded=tuple(trunk) + tuple(buffers), unexpected=left, notes=_export_notes(network)
    )


def _export_notes(network: SwinConfig) -> tuple[str, ...]:
    arguments = (
        f"feature_size={network.embed_dim}, depths={network.depths}, num_heads={network.num_heads}, "
        f"window_size={network.window}, mlp_ratio={network.mlp_ratio}, patch_norm={network.patch_norm}"
    )
    notes = [f"load with strict=False into SwinUNETR(in_channels=1, out_channels=..., {arguments})"]
    attention = network.attention
    if attention and attention.placement == "series":
        first = "the fifth level differs" if attention.stage >= 3 else f"levels from {attention.stage + 2} on differ"
        notes.append(f"semantic attention stays behind, so {first} from what this encoder computes")
    return tuple(notes)


def _write(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    files.write_atomic(path, lambda temporary: save_file(plain, temporary, metadata=header))


def _refused(file: Path, problem: str, advice: str) -> DagmanError:
    return DagmanError("WEIGHTS", file, problem, advice, exit_code=ExitCode.REFUSED)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


def _find(path: Path) -> Path:
    """The weights a path means: a file, or that of a run folder or of the folder `weights` in it."""
    file = path / MODEL_FILE if path.is_dir() else path
    if not file.is_file() and (path / MODEL_FILE.name).is_file():
        return path / MODEL_FILE.name
    inside = sorted(each for name in ("fold-*", "classifier") for each in path.glob(f"{name}/{MODEL_FILE}"))
    if not file.is_file() and inside:
        raise DagmanError("WEIGHTS", path, "holds weights in folders alone", f"give {inside[0].parent.parent}")
    if not file.is_file():
        raise DagmanError("WEIGHTS", file, "does not exist", "give a run folder or a .safetensors file")
    return file


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors of a file and its description, None for a foreign one."""
    tensors, header = read_tensors(file)
    return tensors, _card(file, header)


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file, never of a pickle.

    Raises:
        DagmanError: `E-WEIGHTS`, exit code 4, for a missing or damaged file, a pickle, NaN.
    """
    if not file.is_file():
        raise _refused(file, "does not exist", "give a file of weights")
    files.refuse_no_utf8(file, "WEIGHTS", "rename the folder, or move the file elsewhere")
    with file.open("rb") as stream:
        start = stream.read(9)
    # A safetensors file starts with the length of its header in eight bytes, then the header, which starts with {.
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[8:] != b"{"):
        raise _refused(
            file,
            "is a pickle, which may run code when it is read",
            "convert it once where that does no harm: safetensors.torch.save_file(torch.load(file, weights_only=True)"
            "['state_dict'], 'weights.safetensors')",
        )
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise _refused(file, f"is damaged or no safetensors file ({error})", "copy or download it again") from None
    bad = tuple(
        name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.float().isfinite().all()
    )
    if bad:
        raise _refused(file, f"holds NaN or infinite values in {_some(bad)}", "take an earlier checkpoint")
    return tensors, header


def _card(file: Path, header: Mapping[str, str]) -> dict[str, Any] | None:
    """What a file says about itself: in its header or, where a tool stripped that, in `config.json` beside it."""
    beside = file.with_name("config.json")
    if _HEADER not in header and not beside.is_file():
        return None
    try:
        card = json.loads(header[_HEADER] if _HEADER in header else beside.read_text())
    except (OSError, ValueError) as error:
        raise _refused(
            file, f"its description cannot be read ({type(error).__name__})", "restore config.json"
        ) from None
    ours = isinstance(card, dict) and all(isinstance(card.get(word), dict) for word in ("network", "preparation"))
    # Beside a description may lie files that it is not of, such as an export for MONAI.
    return card if ours and (_HEADER in header or card.get("file", MODEL_FILE.name) == file.name) else None


def _described(file: Path, card: Mapping[str, Any]) -> tuple[EncoderConfig, Preparation, tuple[str, ...]]:
    """Network and preparation of a file of ours."""
    if card.get("format") != FORMAT:
        raise _refused(file, f"has format {card.get('format')}, this version reads {FORMAT}", "update dagman")
    network: EncoderConfig = config.convert(EncoderConfig, card["network"], "network")
    preparation = config.from_dict(Preparation, card["preparation"], "preparation.")
    return network, preparation, tuple(f"{word} {card[word]}" for word in ("recipe", "role") if word in card)


def _fill(encoder: Encoder, named: Mapping[str, Tensor], file: Path, kind: str) -> LoadReport:
    """Copy what fits into the encoder."""
    wanted = encoder.state_dict()
    fitting = {name for name in wanted if name in named and named[name].shape == wanted[name].shape}
    encoder.load_state_dict({name: named[name] for name in fitting}, strict=False)
    swin = isinstance(encoder, SwinEncoder)
    counted = [name for name in wanted if _in_trunk(name) or not swin]
    return LoadReport(
        source=file,
        kind=kind,
        loaded=tuple(name for name in wanted if name in fitting),
        missing=tuple(name for name in wanted if name not in named),
        unexpected=tuple(name for name in named if name not in wanted and not name.endswith("relative_position_index")),
        mismatched=tuple(name for name in wanted if name in named and name not in fitting),
        share=sum(wanted[n].numel() for n in counted if n in fitting) / sum(wanted[n].numel() for n in counted),
        network="Swin" if swin else "ViT",
    )


def _in_trunk(name: str) -> bool:
    return name.startswith(("patch_embed.", "stages."))


def _to_monai(name: str) -> str:
    """Our name of a tensor to the one it has on disk."""
    if not _in_trunk(name):
        return name
    return "swinViT." + re.sub(r"^stages\.(\d)\.", lambda match: f"layers{int(match[1]) + 1}.0.", name)


def _from_monai(name: str) -> str:
    """MONAI's name of a tensor to ours; its releases before 0.9 called the layers of an MLP fc1 and fc2."""
    name = _MONAI_BLOCK.sub(lambda match: f"stages.{int(match[1]) - 1}.", _WRAPPERS.sub("", name))
    return re.sub(r"\.mlp\.fc([12])\.", r".mlp.linear\1.", name)


def _from_foreign(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """Tensors under our names, whose they are, and what there is to know about them."""
    stripped = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    if any(_SMIT_BLOCK.match(name) for name in stripped):
        named, kind, notes = _from_smit(stripped)
    else:
        named, kind, notes = {_from_monai(name): tensor for name, tensor in stripped.items()}, "MONAI", ()
    for name, tensor in list(named.items()):
        if name.endswith(".qkv.weight"):  # attention without a bias on queries, keys and values has one of zero
            named.setdefault(name.replace("weight", "bias"), torch.zeros(len(tensor)))
    return named, kind, notes


def _from_smit(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """SMIT's tensors so that this Swin computes what SMIT's does, were its windows returned to their places.

    Its merging takes the octants 011 and 101 in the other order. It also shifts windows on maps that are no longer than
    a window, where this Swin does not: crops with sides of 96 voxels and more have none.
    """
    named = {}
    for name, tensor in tensors.items():
        ours = re.sub(r"\.mlp\.fc([12])\.", r".mlp.linear\1.", _SMIT_BLOCK.sub(r"stages.\1.", name))
        if ".downsample." in ours and tensor.shape[-1] % 8 == 0:
            octants = list(tensor.chunk(8, dim=-1))
            octants[5], octants[6] = octants[6], octants[5]
            tensor = torch.cat(octants, dim=-1)  # noqa: PLW2901
        if ours == "mask_token":
            ours, tensor = "hidden_token", tensor.flatten()  # noqa: PLW2901
        named[ours] = tensor
    note = "SMIT's code returns windows to other places of the map (its window_reverse); here they return to their own"
    return named, "SMIT", (f"{note}, so outputs differ from what these weights were trained with",)


def _infer_config(file: Path, named: Mapping[str, Tensor]) -> SwinConfig:
    """Sizes of a foreign Swin, read off the shapes of its tensors."""
    embedding = named.get("patch_embed.proj.weight")
    if embedding is None:
        raise _refused(
            file, f"holds no Swin transformer (it has {_some(tuple(named))})", "give weights of a 3D Swin transformer"
        )
    if embedding.ndim != 5 or tuple(embedding.shape[1:]) != (1, 2, 2, 2):
        raise _refused(
            file,
            f"embeds patches of shape {tuple(embedding.shape[1:])}, this encoder takes (1, 2, 2, 2)",
            "give weights for one channel and patches of 2x2x2 voxels",
        )
    if any(re.match(r"layers[1-4]c\.", name) for name in named):
        raise _refused(
            file, "is a SwinUNETR-v2, whose convolutions this encoder lacks", "give weights made with use_v2=False"
        )
    try:
        tables = [named[f"stages.{stage}.blocks.0.attn.relative_position_bias_table"].shape for stage in range(4)]
        window = (round(tables[0][0] ** (1 / 3)) + 1) // 2
        heads = [shape[1] for shape in tables]
        hidden_width = len(named["stages.0.blocks.0.mlp.linear1.weight"])
    except (KeyError, IndexError) as error:
        raise _refused(file, f"is no Swin of four stages ({error})", "give weights of a 3D Swin transformer") from None
    blocks = [{m[1] for name in named if (m := re.match(rf"stages\.{s}\.blocks\.(\d+)\.", name))} for s in range(4)]
    return SwinConfig(
        embed_dim=len(embedding),
        depths=(len(blocks[0]), len(blocks[1]), len(blocks[2]), len(blocks[3])),
        num_heads=(heads[0], heads[1], heads[2], heads[3]),
        window=window,
        mlp_ratio=hidden_width / len(embedding),
        patch_norm="patch_embed.norm.weight" in named,
        attention=AttentionConfig() if any(name.startswith("semantic_attention.") for name in named) else None,
    )
