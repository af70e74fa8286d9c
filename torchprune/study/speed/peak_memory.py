"""The most memory that one call of a model allocates, by torch's own allocators."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

HOW = {
    "cpu": "torch's CPU allocator, every allocation of one call recorded by its profiler",
    "cuda": "torch.cuda.max_memory_allocated over one call",
}
"""By device: how `peak_of` measures."""


def peak_of(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one call holds at most beyond what was held before; None for other devices.

    Weights and inputs are there before and do not count. What other libraries allocate by
    themselves (ONNX Runtime, scratch space of a product's library) is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before)
    if device.type != "cpu":
        return None
    return highest(_allocations(run))


def highest(steps: Iterable[int]) -> int:
    """The highest that a running sum gets.

    >>> highest([4, 4, -4, 1, -5])
    8
    """
    total = most = 0
    for step in steps:
        total += step
        most = max(most, total)
    return most


def _allocations(run: Callable[[], object]) -> list[int]:
    """Bytes taken (positive) and given back (negative) by a call, in order."""
    from torch.profiler import ProfilerActivity, profile

    with _kineto_silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as kept:
        result = run()
    events = kept.profiler.kineto_results.events()
    del result  # what a call gives counts: it was there when the call ended
    some = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return [size for _, size in sorted(some, key=lambda pair: pair[0])]


@contextmanager
def _kineto_silent() -> Iterator[None]:
    """Without its notes on standard error; it reads this when first used."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = before or "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]
