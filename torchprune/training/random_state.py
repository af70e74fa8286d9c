"""Random choices on the side, which change none of those that come after."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def same_chances() -> Iterator[None]:
    """Whatever random numbers are drawn inside, those after it are as if nothing had been.

    Of torch, Python, and NumPy where it is in use.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    numpy: Any = sys.modules.get("numpy")
    own = random.getstate(), None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(own[0])
            if numpy is not None:
                numpy.random.set_state(own[1])
