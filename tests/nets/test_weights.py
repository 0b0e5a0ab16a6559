import io
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dagman.errors import DagmanError, ExitCode
from dagman.nets.swin import AttentionConfig, SwinConfig, SwinEncoder
from dagman.nets.weights import MODEL_FILE, export_monai, load_encoder, save_encoder
from dagman.types import Preparation

SIZES = SwinConfig(
    embed_dim=12, depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 8), attention=AttentionConfig(stage=3, num_heads=4)
)
PREPARATION = Preparation(window_hu=(-1000.0, 400.0), crop=(64, 64, 32))


@pytest.fixture
def encoder() -> SwinEncoder:
    torch.manual_seed(0)
    encoder = SwinEncoder(SIZES).eval()
    encoder.preparation = PREPARATION
    return encoder


@pytest.fixture
def saved(encoder, tmp_path) -> Path:
    path = tmp_path / "run" / "weights" / "model.safetensors"
    save_encoder(encoder, path, {"recipe": "dagman-tiny", "role": "teacher"})
    return path


@pytest.fixture(scope="module")
def unetr():
    from monai.networks.nets import SwinUNETR

    torch.manual_seed(1)
    return SwinUNETR(
        in_channels=1,
        out_channels=2,
        feature_size=12,
        depths=SIZES.depths,
        num_heads=SIZES.num_heads,
        window_size=SIZES.window,
    ).eval()


IMAGES = torch.rand(1, 1, 64, 64, 64, generator=torch.Generator().manual_seed(2))


def refusal(path, code=ExitCode.REFUSED) -> DagmanError:
    with pytest.raises(DagmanError) as error:
        load_encoder(path)
    assert error.value.exit_code == code
    assert "\n" not in str(error.value)
    return error.value


def test_a_saved_encoder_comes_back_from_run_or_file(encoder, saved):
    for path in (saved.parent.parent, saved, str(saved)):
        loaded = load_encoder(path)
        assert not loaded.training
        assert loaded.config == SIZES
        assert loaded.preparation == PREPARATION
        assert loaded.report.share == 1
        assert loaded.report.missing == loaded.report.unexpected == loaded.report.mismatched == ()
        assert "100.0% of the Swin" in str(loaded.report)
        assert "role teacher" in str(loaded.report)
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
    assert torch.equal(loaded(IMAGES).attention, encoder(IMAGES).attention)


def test_names_on_disk_are_monais_and_the_card_tells_the_rest(saved):
    card = json.loads(saved.with_name("config.json").read_text())
    assert set(card) == {"format", "recipe", "role", "network", "preparation", "file"}
    assert card["preparation"]["window_hu"] == [-1000.0, 400.0]
    names = set(load_file(saved))
    assert {name.split(".")[0] for name in names} == {"swinViT", "semantic_attention", "hidden_token"}
    assert "swinViT.layers3.0.blocks.3.attn.qkv.bias" in names
    assert "swinViT.layers4.0.downsample.reduction.weight" in names


def test_a_file_without_its_header_is_read_by_its_config(encoder, saved):
    save_file(load_file(saved), saved)
    assert load_encoder(saved).preparation == PREPARATION
    saved.with_name("config.json").unlink()
    alone = load_encoder(saved)
    assert alone.report.share == 1
    assert alone.config.attention == AttentionConfig()
    assert alone.report.kind == "MONAI"


def test_a_description_is_of_its_own_file_alone(saved):
    """An export beside our weights is none of ours, whatever lies there."""
    beside = saved.with_name("monai.safetensors")
    export_monai(saved, beside)
    assert load_encoder(beside).report.kind == load_encoder(export_elsewhere(saved)).report.kind == "MONAI"
    card = saved.with_name("config.json")
    card.write_text(json.dumps({key: value for key, value in json.loads(card.read_text()).items() if key != "file"}))
    assert load_encoder(beside).report.kind == "MONAI", "as earlier versions wrote it"
    save_file(load_file(saved), saved)
    assert load_encoder(saved).preparation == PREPARATION


def export_elsewhere(saved):
    path = saved.parents[2] / "elsewhere" / "monai.safetensors"
    export_monai(saved, path)
    return path


def test_export_is_what_swin_unetr_wants(encoder, unetr, tmp_path):
    plain = SwinEncoder(replace(SIZES, attention=None)).eval()
    plain.load_state_dict(encoder.state_dict(), strict=False)
    report = export_monai(plain, tmp_path / "plain.safetensors")
    assert "SwinUNETR(in_channels=1" in str(report)
    assert report.unexpected == ("hidden_token",)
    missing, unexpected = unetr.load_state_dict(load_file(tmp_path / "plain.safetensors"), strict=False)
    assert unexpected == []
    assert [name for name in missing if name.startswith("swinViT.")] == []
    for theirs, ours in zip(unetr.swinViT(IMAGES, normalize=True), plain(IMAGES).pyramid, strict=True):
        assert (theirs - ours).abs().max() <= 1e-5
    assert unetr(IMAGES).shape == (1, 2, 64, 64, 64)


def test_export_with_semantic_attention_says_what_differs(encoder, saved, unetr, tmp_path):
    report = export_monai(saved, tmp_path / "monai.safetensors")
    assert "the fifth level differs" in str(report)
    assert all(name.startswith("swinViT.") for name in report.loaded)
    unetr.load_state_dict(load_file(tmp_path / "monai.safetensors"), strict=False)
    differences = [
        (theirs - ours).abs().max().item()
        for theirs, ours in zip(unetr.swinViT(IMAGES), encoder(IMAGES).pyramid, strict=True)
    ]
    assert max(differences[:4]) <= 1e-5 < 1e-2 < differences[4]
    with safe_open(tmp_path / "monai.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_swin_unetr_file_loads_with_sizes_read_off_its_tensors(unetr, prefix, tmp_path):
    path = tmp_path / "unetr.safetensors"
    save_file({prefix + name: tensor.contiguous() for name, tensor in unetr.state_dict().items()}, path)
    encoder = load_encoder(path)
    assert encoder.config == replace(SIZES, attention=None)
    assert encoder.report.kind == "MONAI"
    assert encoder.report.share == 1
    assert encoder.report.missing == ("hidden_token",)
    assert "without semantic attention" in str(encoder.report)
    assert not any("swinViT" in name or "stages" in name for name in encoder.report.unexpected)
    for theirs, ours in zip(unetr.swinViT(IMAGES), encoder(IMAGES).pyramid, strict=True):
        assert (theirs - ours).abs().max() <= 1e-5
    again = load_encoder(path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in encoder.state_dict().items())


@torch.no_grad()
def test_attention_without_bias_is_one_with_a_bias_of_zero(tmp_path):
    from monai.networks.nets.swin_unetr import SwinTransformer

    theirs = SwinTransformer(1, SIZES.embed_dim, [4] * 3, [2] * 3, SIZES.depths, SIZES.num_heads, qkv_bias=False).eval()
    save_file({name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}, tmp_path / "s.safetensors")
    ours = load_encoder(tmp_path / "s.safetensors")
    for one, other in zip(theirs(IMAGES), ours(IMAGES).pyramid, strict=True):
        assert (one - other).abs().max() <= 1e-5


def test_a_swin_transformer_file_with_older_names_loads(unetr, tmp_path):
    path = tmp_path / "ssl.safetensors"
    older = {n.replace("linear1", "fc1").replace("linear2", "fc2"): t for n, t in unetr.swinViT.state_dict().items()}
    save_file({f"module.{name}": tensor.contiguous() for name, tensor in older.items()}, path)
    encoder = load_encoder(path)
    assert encoder.report.share == 1
    assert torch.equal(encoder.stages[2].blocks[1].mlp.linear2.weight, older["layers3.0.blocks.1.mlp.fc2.weight"])


def smit_tensors() -> dict[str, torch.Tensor]:
    """A state dict with the names and shapes of SMIT's encoder (12 wide, two blocks a stage), values by formula."""
    shapes = {"mask_token": (1, 1, 12), "patch_embed.proj.weight": (12, 1, 2, 2, 2), "patch_embed.proj.bias": (12,)}
    shapes |= {"patch_embed.norm.weight": (12,), "patch_embed.norm.bias": (12,)}
    for stage, (width, heads) in enumerate([(12, 2), (24, 2), (48, 4), (96, 4)]):
        parts = {"attn.relative_position_bias_table": (343, heads), "attn.qkv.weight": (3 * width, width)}
        parts |= {"attn.proj.weight": (width, width), "attn.proj.bias": (width,)}
        parts |= {"mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,)}
        parts |= {"mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,)}
        parts |= {f"norm{n}.{word}": (width,) for n in (1, 2) for word in ("weight", "bias")}
        shapes |= {f"layers.{stage}.blocks.{n}.{name}": shape for n in (0, 1) for name, shape in parts.items()}
        shapes |= {f"layers.{stage}.downsample.norm.{word}": (8 * width,) for word in ("weight", "bias")}
        shapes |= {f"layers.{stage}.downsample.reduction.weight": (2 * width, 8 * width)}
        shapes |= {f"norm{stage}.{word}": (width,) for word in ("weight", "bias")}
    return {name: by_formula(name, shape) for name, shape in shapes.items()}


def by_formula(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    values = np.sin(np.arange(np.prod(shape)) * 1.7 + len(name)) * 0.05
    values += "norm" in name and name.endswith("weight")
    return torch.from_numpy(values.reshape(shape).astype(np.float32))


@torch.no_grad()
def test_smit_weights_give_the_outputs_smits_code_means(tmp_path):
    """Golden, of the same tensors, image and mask.

    Computed with SwinTransformer_Unetr_Mask_In_Seperate of The-Veeraraghavan-Lab/SMIT, models/Trans.py at
    ff019a1ab0cdbe0b520f9900b066d57791b8fe11, its window_reverse corrected: the permutation there, (0,1,3,5,2,4,6,7),
    is that of window_partition and not its inverse, (0,1,4,2,5,3,6,7), so that tokens change places.
    """
    path = tmp_path / "smit.safetensors"
    save_file({f"module.{name}": tensor for name, tensor in smit_tensors().items()}, path)
    loaded = load_encoder(path)
    assert loaded.report.kind == "SMIT"
    assert loaded.report.share == 1
    assert set(loaded.report.unexpected) == {f"norm{n}.{word}" for n in range(4) for word in ("weight", "bias")}
    assert "hidden_token" in loaded.report.loaded
    encoder = SwinEncoder(replace(loaded.config, attention=None)).eval()
    encoder.load_state_dict(loaded.state_dict(), strict=False)
    images = torch.from_numpy((0.5 + 0.5 * np.sin(np.arange(96**3) * 0.37)).astype(np.float32)).view(1, 1, 96, 96, 96)
    hidden = torch.zeros(1, 6, 6, 6, dtype=torch.bool)
    hidden[0, 0, 1, 2] = True
    levels, _ = encoder.trunk(images, hidden.flatten(1))
    third, final = levels[3].flatten(1, 3)[0], levels[4].flatten(1, 3)[0]
    assert third.double().abs().mean().item() == pytest.approx(2.044917, abs=1e-5)
    assert final.double().abs().mean().item() == pytest.approx(0.403435, abs=1e-5)
    assert third[[0, 100, 215], [0, 50, 95]].tolist() == pytest.approx(
        [0.2729038894176483, -2.7745373249053955, 2.801792860031128], abs=1e-5
    )
    assert final[[0, 13, 26], [0, 100, 191]].tolist() == pytest.approx(
        [0.5400213003158569, 0.26668816804885864, -0.2544443905353546], abs=1e-5
    )


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("zip", "pickle"),
        ("legacy", "pickle"),
        ("plain", "pickle"),
        (b"", "damaged or no safetensors"),
        (b"not at all", "damaged or no safetensors"),
        (struct.pack("<Q", 2**62) + b"{}", "damaged or no safetensors"),
    ],
)
def test_pickles_are_refused_by_their_content_and_never_read(content, word, encoder, tmp_path):
    class Canary:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    if isinstance(content, str):
        import pickle

        buffer = io.BytesIO()
        payload = {"state_dict": Canary()}
        if content == "plain":
            pickle.dump(payload, buffer)
        else:
            torch.save(payload, buffer, _use_new_zipfile_serialization=content == "zip")
        content = buffer.getvalue()
    path = tmp_path / "renamed.safetensors"
    path.write_bytes(content)
    assert word in refusal(path).problem
    assert not (tmp_path / "executed").exists()


def test_a_large_header_is_no_pickle(encoder, tmp_path):
    """A header of 0x010280 bytes begins as a pickle of protocol 2 does."""
    path = tmp_path / "x.safetensors"
    header = b'{"__metadata__":{}}'.ljust(0x010280)
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert "no Swin transformer" in refusal(path).problem


def test_damage_nan_and_absence_are_refused(encoder, saved, tmp_path):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refusal(saved).problem
    assert "does not exist" in refusal(tmp_path, ExitCode.USAGE).problem
    assert "does not exist" in refusal(tmp_path / "no.safetensors", ExitCode.USAGE).problem
    with torch.no_grad():
        encoder.stages[1].blocks[0].norm1.bias[3] = torch.nan
    save_encoder(encoder, saved, {})
    assert "NaN or infinite values in swinViT.layers2.0.blocks.0.norm1.bias" in refusal(saved).problem


def test_a_folder_of_weights_is_taken_as_its_run_and_one_of_folds_names_them(encoder, tmp_path):
    for fold in ("fold-1", "fold-0"):
        save_encoder(encoder, tmp_path / "study" / fold / MODEL_FILE, {})
    fold = tmp_path / "study" / "fold-0"
    assert load_encoder(fold / "weights").report.source == load_encoder(fold).report.source == fold / MODEL_FILE
    refused = refusal(tmp_path / "study", ExitCode.USAGE)
    assert (refused.problem, refused.advice) == ("holds weights in folders alone", f"give {fold}")
    save_encoder(encoder, tmp_path / "probe" / "classifier" / MODEL_FILE, {})
    assert refusal(tmp_path / "probe", ExitCode.USAGE).advice == f"give {tmp_path / 'probe' / 'classifier'}"


def test_ours_with_a_tensor_missing_or_from_the_future_is_refused(saved):
    with safe_open(saved, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(saved)
    save_file({n: t for n, t in tensors.items() if "cls_token" not in n}, saved, metadata=header)
    assert "lacks semantic_attention.cls_token" in refusal(saved).problem
    card = json.loads(header["dagman"])
    save_file(tensors, saved, metadata={"dagman": json.dumps({**card, "format": 2})})
    assert "has format 2, this version reads 1" in refusal(saved).problem


def test_foreign_files_that_do_not_fit_are_refused(unetr, tmp_path):
    path = tmp_path / "x.safetensors"
    swin = {name: tensor.contiguous() for name, tensor in unetr.swinViT.state_dict().items()}
    save_file({n: t for n, t in swin.items() if "layers4.0.blocks.1" not in n and "downsample.red" not in n}, path)
    error = refusal(path)
    assert "of the Swin's parameters, less than 95%" in error.problem
    assert "stages.0.downsample.reduction.weight" in error.problem
    save_file({**swin, "patch_embed.proj.weight": torch.zeros(12, 4, 2, 2, 2)}, path)
    assert "this encoder takes (1, 2, 2, 2)" in refusal(path).problem
    save_file({**swin, "layers1c.0.conv1.weight": torch.zeros(1)}, path)
    assert "SwinUNETR-v2" in refusal(path).problem
    save_file({n: t for n, t in swin.items() if "layers4.0.blocks" not in n}, path)
    assert "no Swin of four stages" in refusal(path).problem
    save_file({"blocks.0.attn.qkv.weight": torch.zeros(3, 3)}, path)
    assert "no Swin transformer" in refusal(path).problem


def test_writing_is_atomic(encoder, saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setenv("DAGMAN_FAULT", "file.before_replace:1:enospc")
    monkeypatch.setattr("dagman.files._faults_seen", {})
    with torch.no_grad():
        encoder.hidden_token.add_(1)
    with pytest.raises(DagmanError) as error:
        save_encoder(encoder, saved, {})
    assert error.value.exit_code == ExitCode.RESOURCES
    assert saved.read_bytes() == before
    assert sorted(file.name for file in saved.parent.iterdir()) == ["config.json", "model.safetensors"]
