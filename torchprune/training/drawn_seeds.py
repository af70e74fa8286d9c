"""Seeds of their own for each part of a run, so that a part gives the same whenever it runs."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def drawn_seed(*parts: int | str) -> int:
    """A seed below 2^32 that these parts alone determine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Global generators (torch's on every device, numpy's, Python's) begin at `seed`, and are as
    they were after the block."""
    held, numpys = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
    finally:
        random.setstate(held)
        np.random.set_state(numpys)
