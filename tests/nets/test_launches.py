import subprocess
import sys
import weakref

import pytest
import torch

from dagman.nets import gpu, launches
from dagman.nets.swin import AttentionConfig, SwinConfig, SwinEncoder
from dagman.nets.transformer import sine_cosine_position
from dagman.nets.vit import ViTConfig, ViTEncoder
from dagman.nets.windows import merge_layout, relative_position_index

SMALL = SwinConfig(
    embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), attention=AttentionConfig(stage=2, num_heads=4)
)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The choice of what to compile as it falls on a GPU; nothing is compiled before it runs."""
    monkeypatch.setattr(gpu, "why_not", lambda _: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)


def test_without_a_gpu_nothing_is_compiled_or_recorded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with torch.device("meta"):
        swin = SwinEncoder(SMALL)
    assert launches.compile_rest(swin) == []
    assert launches.why_not_recorded(swin) == "there is no CUDA device"


def test_only_a_swin_is_recorded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with torch.device("meta"):
        swin, vit = SwinEncoder(SMALL), ViTEncoder(ViTConfig(width=48, depth=1, num_heads=4))
    assert launches.why_not_recorded(vit) == "only a Swin is recorded"
    assert launches.why_not_recorded(swin) == "meta is no CUDA device"


def test_what_is_compiled(as_on_a_gpu):
    with torch.device("meta"):
        swin = SwinEncoder(SwinConfig(depths=(1, 1, 1, 1)))
    chosen = launches.compile_rest(swin)
    kinds = sorted(type(module).__name__ for module in chosen)
    # semantic attention's own MLPs are compiled with their blocks
    assert kinds == ["GlobalBlock"] * 2 + ["MLP"] * 4 + ["PatchMerging"] * 4


COMPILES = """
import functools, torch
from dagman.nets import gpu, kernel, launches
from dagman.nets.stage import Stage

gpu.why_not = kernel.library = lambda *_: None  # as on a GPU: all is compiled, and no kernel of a CPU runs
graphs = []

def backend(graph, _):
    graphs.append(graph)
    return graph.forward

torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend=backend)
stage = Stage(6, num_heads=1, window=2, mlp_ratio=2.0, drop_paths=[])
inputs = [torch.randn(batch, 4, 2, 2, 6) for batch in range(1, 11)]
plain = [stage(x) for x in inputs]
launches.compile_rest(stage)
assert all(torch.equal(stage(x), expected) for x, expected in zip(inputs, plain))
assert len(graphs) == len(inputs), len(graphs)
names = {node.name for graph in graphs for node in graph.graph.nodes}
assert not [name for name in names if "arange" in name or "sort" in name], names
"""


def test_mergings_of_many_shapes_are_compiled_without_their_layout():
    """In a process of its own: the compiler cannot look through the shape checks of these tests."""
    done = subprocess.run([sys.executable, "-c", COMPILES], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_recording_keeps_what_caches_forget(monkeypatch):
    """A graph reads addresses, whatever lies there by then."""
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda module, given, **_: (module(*given), module)[1])
    encoder, images, device = SwinEncoder(SMALL).eval(), torch.rand(2, 1, 32, 32, 32), torch.device("cpu")
    end = launches.record(encoder, images)
    read = [each for side in (16, 8, 4, 2) for each in merge_layout(2, (side, side, side), device)]
    read += [relative_position_index(SMALL.window, device), sine_cosine_position((4, 4, 4), 48, device)]
    held = [weakref.ref(each) for each in read]
    del read
    for cache in (merge_layout, relative_position_index, sine_cosine_position):
        cache.cache_clear()
    assert all(each() is not None for each in held)
    end()


def test_a_recorded_encoder_replays_calls_like_the_first_alone(monkeypatch):
    """All but the recording itself, which only a GPU can make."""
    replayed = []

    def recorded(module, given, **_):
        module(*given)
        return lambda *tensors: (replayed.append(len(tensors)), module(*tensors))[1]

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorded)
    encoder = SwinEncoder(SMALL).eval()
    images, hidden = torch.rand(2, 1, 32, 32, 32), torch.rand(2, 64) < 0.5
    expected, whole = encoder(images, hidden, final_only=True), encoder(images)
    end = launches.record(encoder, torch.rand_like(images), hidden=~hidden, final_only=True)
    for one, other in zip(encoder(images, hidden, final_only=True)[:4], expected[:4], strict=True):
        assert torch.equal(one, other)
    assert replayed == [2]
    assert torch.equal(encoder(images).pooled, whole.pooled)
    assert len(encoder(images, hidden).pyramid) == 5
    assert encoder(images[:1], hidden[:1], final_only=True).pooled.shape == (1, 192)
    encoder.train()(images, hidden, final_only=True)
    assert replayed == [2]
    end()
    encoder.eval()(images, hidden, final_only=True)
    assert replayed == [2]
