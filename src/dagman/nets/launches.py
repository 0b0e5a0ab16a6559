"""Fewer launches on a GPU: small modules compiled, and an encoder's whole pass recorded once and replayed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dagman.nets import gpu
from dagman.nets.heads import ProjectionHead
from dagman.nets.mlp import MLP
from dagman.nets.stage import PatchMerging
from dagman.nets.swin import SwinEncoder
from dagman.nets.transformer import GlobalBlock, sine_cosine_position
from dagman.nets.windows import merge_layout, relative_position_index
from dagman.types import Features

MOST_SHAPES = 64
"""That a module of each kind is compiled for: four widths, with a gradient and without, in training and examinations.

Past PyTorch's 8 all modules of the kind would run as they were before.
"""


def compile_rest(network: nn.Module) -> list[nn.Module]:
    """Compile in place what no kernel of ours covers: mergings, semantic attention, wide MLPs, heads.

    Weights keep their names; an MLP that a kernel covers is never called, and so never compiled. Where Triton does not
    run nothing is compiled: on CPUs it does not pay.

    Returns:
        The modules that will be compiled when they first run.
    """
    if gpu.why_not(next(network.parameters()).device) is not None:
        return []
    inside = {id(part) for module in network.modules() if isinstance(module, GlobalBlock) for part in module.modules()}
    chosen: list[nn.Module] = [
        module
        for module in network.modules()
        if isinstance(module, GlobalBlock | PatchMerging) or (isinstance(module, MLP) and id(module) not in inside)
    ]
    chosen += [module.layers for module in network.modules() if isinstance(module, ProjectionHead)]
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
    for module in chosen:
        module.compile(dynamic=False)
    return chosen


def why_not_recorded(encoder: nn.Module) -> str | None:
    """What keeps an encoder from being recorded; None where it can be."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not isinstance(encoder, SwinEncoder):
        return "only a Swin is recorded"
    config = encoder.config
    widest = max(config.embed_dim * 2**stage // heads for stage, heads in enumerate(config.num_heads))
    if widest > gpu.MOST_HEAD_WIDTH or config.window**3 > gpu.MOST_TOKENS:
        return "some of its heads or windows are wider than Triton's kernels take"
    return gpu.why_not(next(encoder.parameters()).device)


def _cached(encoder: SwinEncoder, images: Tensor) -> list[Any]:
    """What a pass reads from caches: a graph knows addresses alone, and caches forget."""
    config, device, (batch, _, x, y, z) = encoder.config, images.device, images.shape
    grids = [(x >> stage, y >> stage, z >> stage) for stage in range(1, 5)]
    held: list[Any] = [relative_position_index(config.window, device)]
    held += [merge_layout(batch, grid, device) for grid in grids]
    if config.attention:
        held.append(sine_cosine_position(config.grid((x, y, z)), config.cell_width, device))
    return held


def record(
    encoder: SwinEncoder,
    images: Tensor,
    *,
    hidden: Tensor | None = None,
    dropped: Tensor | None = None,
    final_only: bool = False,
    autocast: torch.dtype | None = None,
) -> Callable[[], None]:
    """From now on replay the encoder's pass, forward and backward, as CUDA graphs where a call is like this one.

    What a step of a small batch waits for is the host, which launches a thousand kernels; a graph is one launch.
    Calls of another shape, or with other arguments given, run as before. What a call returns is overwritten by the
    next. Only on the Triton path: the plain one counts blank windows, which a recording cannot.

    Args:
        encoder: On a CUDA device, in the mode it will be used in.
        images: Crops like those to come, (batch, 1, x, y, z).
        hidden: As for the encoder; None where calls give none.
        dropped: Likewise.
        final_only: Likewise.
        autocast: The type of matrix products, None without autocast.

    Returns:
        Ends the recording's use.
    """
    given = [each.clone() for each in (images, hidden, dropped) if each is not None]
    names = [name for name, each in (("hidden", hidden), ("dropped", dropped)) if each is not None]
    plain, shape, training = encoder.forward, images.shape, encoder.training
    layout: list[Features] = []

    class Pass(nn.Module):
        """Tensors in, tensors out, as a recording needs it."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder
            self.read = _cached(encoder, images)

        def forward(self, images: Tensor, *masks: Tensor) -> tuple[Tensor, ...]:
            features = plain(images, **dict(zip(names, masks, strict=True)), final_only=final_only)
            layout[:] = [features]
            return tuple(each for each in (*features[:4], *features.pyramid) if each is not None)

    device = images.device.type
    with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None, cache_enabled=False):
        replay: Any = torch.cuda.make_graphed_callables(Pass().train(training), tuple(given), allow_unused_input=True)
    wanted, masks = final_only, [hidden is not None, dropped is not None]
    present = [each is not None for each in layout.pop()[:4]]

    def forward(
        images: Tensor, hidden: Tensor | None = None, dropped: Tensor | None = None, *, final_only: bool = False
    ) -> Features:
        alike = images.shape == shape and encoder.training == training and final_only == wanted
        if not alike or [hidden is not None, dropped is not None] != masks:
            return plain(images, hidden, dropped, final_only=final_only)
        tensors = iter(replay(*(each for each in (images, hidden, dropped) if each is not None)))
        first = [next(tensors) if there else None for there in present]
        tokens, cls, attention, pooled = first
        return Features(tokens, cls, attention, pooled, tuple(tensors))  # type: ignore[arg-type]

    encoder.forward = forward  # type: ignore[method-assign]

    def end() -> None:
        del encoder.forward

    return end
