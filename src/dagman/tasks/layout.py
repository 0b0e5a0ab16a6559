"""A map of features in two dimensions: UMAP, compiled once for all processes."""

import atexit
import contextlib
import importlib
import os
import tempfile
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from dagman import randomness

MAP_NEIGHBOURS = 15
"""UMAP's default."""


def lay_out(features: Float[np.ndarray, "crops width"], *, seed: int) -> Float[np.ndarray, "crops 2"]:
    """UMAP in two dimensions with the settings of its authors; the same seed gives the same map.

    Reference:
        McInnes et al., UMAP, JOSS 2018.
    """
    threads = torch.get_num_threads()
    with warnings.catch_warnings(), contextlib.ExitStack() as afterwards:
        afterwards.callback(torch.set_num_threads, threads)  # numba sets OpenMP's threads for the whole process
        warnings.simplefilter("ignore")  # of parts that are not installed, and of small or disconnected data
        umap = _imported()
        _keep_compiled()
        layout = umap.UMAP(
            n_neighbors=min(MAP_NEIGHBOURS, len(features) - 1),
            random_state=randomness.torch_seed(seed, "cluster.map") % 2**31,
            n_jobs=1,
        )
        drawn: np.ndarray = layout.fit_transform(features.astype(np.float32))
    return drawn.astype(np.float64)


def _imported() -> ModuleType:
    """UMAP; numba, which fails where it can keep nothing that it compiles, then has a folder that goes at the end."""
    try:
        return importlib.import_module("umap")
    except RuntimeError:
        numba: Any = importlib.import_module("numba")
        folder = tempfile.TemporaryDirectory(prefix="dagman-numba-")
        atexit.register(folder.cleanup)
        os.environ["NUMBA_CACHE_DIR"] = folder.name
        numba.config.reload_config()
        return importlib.import_module("umap")


def _keep_compiled() -> None:
    """Let numba keep what it compiles of UMAP, as it does of the library that UMAP finds neighbours with.

    Every process compiles it anew otherwise, which takes far longer than a map of some hundred crops. Nothing is kept
    where no folder can be written to.
    """
    from numba.core.registry import CPUDispatcher

    for name in ("umap.distances", "umap.layouts", "umap.umap_", "umap.utils"):
        for function in vars(importlib.import_module(name)).values():
            if isinstance(function, CPUDispatcher) and function.py_func.__module__ == name:
                with contextlib.suppress(RuntimeError):
                    function.enable_caching()
