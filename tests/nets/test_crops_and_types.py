"""What every encoder does alike."""

import copy
import re
from dataclasses import replace

import jaxtyping
import pytest
import torch

from dagman.nets import kernel
from dagman.nets.encoder import Encoder, build
from dagman.nets.swin import AttentionConfig, SwinConfig
from dagman.nets.vit import ViTConfig

SWIN = SwinConfig(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 4), attention=AttentionConfig(num_heads=4))
PLACED = replace(SWIN, attention=AttentionConfig(num_heads=4, position="attention"), patch_norm=True)
WITHOUT = replace(SWIN, attention=None)
VIT = ViTConfig(width=48, depth=2, num_heads=4)


@pytest.fixture(params=[SWIN, PLACED, WITHOUT, VIT], ids=["swin", "placed", "without", "vit"])
def encoder(request) -> Encoder:
    torch.manual_seed(0)
    return build(request.param).eval()


@pytest.fixture(params=["kernels", "plain"], autouse=True)
def _path(request, monkeypatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(kernel, "library", lambda: None)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.15), (torch.float16, 0.02)], ids=str
)
def test_computes_in_the_type_of_its_weights(encoder, dtype, tolerance):
    images, cast = torch.rand(1, 1, 32, 32, 32), copy.deepcopy(encoder).to(dtype)
    for training, hidden in ((False, None), (True, torch.arange(8)[None] < 4)):
        with torch.set_grad_enabled(training):
            expected, found = encoder(images, hidden), cast(images.to(dtype), hidden)
        for name in ("tokens", "cls", "pooled"):
            ours, wanted = getattr(found, name), getattr(expected, name)
            if wanted is not None:
                assert ours.dtype == dtype
                torch.testing.assert_close(ours.float(), wanted, rtol=0, atol=tolerance)
    found.pooled.float().square().sum().backward()
    assert all(each.grad.isfinite().all() for each in cast.parameters() if each.grad is not None)


@pytest.mark.parametrize("shape", [(32, 32, 32), (1, 32, 32, 32), (1, 2, 32, 32, 32), (1, 1, 1, 32, 32, 32)])
def test_what_is_no_batch_of_crops_is_refused(encoder, shape, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=rf"\(batch, 1, x, y, z\), not {re.escape(str(shape))}$"):
        encoder(torch.rand(shape))
