"""Counter-based random numbers: what is drawn depends on (seed, purpose, index) and on nothing else.

The same batches come out for any number of workers or processes, and a resumed run draws what an uninterrupted one
would.
"""

import hashlib

import numpy as np


def generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """A NumPy generator keyed by `(seed, purpose, *index)` (Philox)."""
    return np.random.Generator(np.random.Philox(key=_key(seed, purpose, index)))


def torch_seed(seed: int, purpose: str, *index: int) -> int:
    """A 63-bit seed for `torch.Generator.manual_seed`, keyed as `generator`."""
    return _key(seed, purpose, index) & (2**63 - 1)


def _key(seed: int, purpose: str, index: tuple[int, ...]) -> int:
    words = ":".join([str(seed), purpose, *map(str, index)])
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:16], "little")
