"""What zeros bring in an exported file: its bytes and milliseconds beside the same without zeros.

The other side is the model with every zero of its sparse weights filled by a random number, written
in the same way and run by the same runtime, in turns.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchprune.errors import TorchpruneError
from torchprune.lowering.lower import lift
from torchprune.masking.mask import fold
from torchprune.study.speed.spreads import Latency, Ratio, latency_of, ratio_of
from torchprune.study.speed.turns import Pace, take_turns


@dataclass(frozen=True)
class FileGains:
    """What zeros bring in a file. Print it.

    Attributes:
        bytes, dense_bytes: of all its files, and of those of the model without zeros.
        latency, dense_latency: seconds a call of the example, in turns; None where none was run.
        ratio: of the two, with its interval.
        kernels: of `torchprune.export.loaded_files.Kernels`: which of them left zeros out, by the
            runtime's own profile; None where it has none.
        why: there are no times.
    """

    bytes: int
    dense_bytes: int
    latency: Latency | None = None
    dense_latency: Latency | None = None
    ratio: Ratio | None = None
    kernels: Any = None
    why: str = ""

    def __str__(self) -> str:
        share = self.bytes / max(1, self.dense_bytes)
        lines = [f"bytes: {self.bytes:,} instead of {self.dense_bytes:,} ({share:.3f})"]
        if self.latency and self.dense_latency and self.ratio:
            verdict = "" if self.ratio.known else "; that may be noise"
            lines.append(
                f"time: {1e3 * self.latency.median:.3g} ms a call instead of "
                f"{1e3 * self.dense_latency.median:.3g}, {self.ratio} in "
                f"{self.latency.rounds} turns{verdict}"
            )
        else:
            lines.append(f"time: not measured: {self.why}")
        if self.kernels is not None:
            names, count = self.kernels.sparse, self.kernels.count
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            which = f"{len(names)} ({', '.join(names[:3])}{more})" if names else "none"
            lines.append(
                f"kernels that leave zeros out: {which} of {count}, by {self.kernels.source}"
            )
        elif self.latency:
            lines.append("kernels that leave zeros out: its runtime does not tell")
        return "what zeros bring, beside the same model without any:\n  " + "\n  ".join(lines)


def file_gains(
    write: Callable[..., Any],
    model: nn.Module,
    report: Any,
    example_inputs: Any,
    *,
    seconds: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
    **options: Any,
) -> FileGains:
    """Measure a file that was just written.

    Args:
        write: what wrote it: one of `torchprune.export.to_*`.
        model, example_inputs, options: what it was given. The model is not changed.
        report: what it gave.
        seconds: for each of the two.
        clock: of seconds, for tests.

    Raises:
        ExportError: the model without zeros cannot be written.
    """
    files = import_module("torchprune.export.loaded_files")
    other = {**options, "weights": "dense"} if "weights" in options else options
    with tempfile.TemporaryDirectory() as folder:
        full = write(without_zeros(model), Path(folder) / report.path.name, example_inputs, **other)
        found = report.bytes, full.bytes
        try:
            example = files.example_of(
                report, model, example_inputs, with_cache=options.get("with_cache", False)
            )
            ours = files.loaded_file(report, example)
            theirs = files.loaded_file(full, example)
        except TorchpruneError as error:
            return FileGains(*found, why=str(error))
        return _in_turns(found, ours, theirs, seconds, clock)


def _in_turns(
    found: tuple[int, int],
    ours: Any,
    theirs: Any,
    seconds: float,
    clock: Callable[[], float],
) -> FileGains:
    runs = {"ours": ours.run, "dense": theirs.run}
    turns = take_turns(runs, Pace(seconds=seconds), clock=clock)
    if turns.failed:
        return FileGains(*found, why="; ".join(turns.failed.values()))
    times, dense = turns.seconds["ours"], turns.seconds["dense"]
    return FileGains(
        *found,
        latency=latency_of(times, turns.repeats["ours"]),
        dense_latency=latency_of(dense, turns.repeats["dense"]),
        ratio=ratio_of(times, dense),
        kernels=None if ours.kernels is None else ours.kernels(),
    )


_SPARSE = 0.05
"""Share of zeros from which a weight counts as pruned."""


def without_zeros(model: nn.Module) -> nn.Module:
    """A copy whose pruned weights have random numbers, as large as their others, for zeros."""
    full = fold(lift(copy.deepcopy(model)))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in full.parameters():
            zeros = weight == 0
            if not weight.is_floating_point() or weight.dim() < 2:
                continue
            if zeros.sum() > _SPARSE * weight.numel():
                noise = torch.randn(weight.shape, generator=draw).to(weight)
                noise = noise.where(noise != 0, torch.ones_like(noise))
                size = weight.float().square().sum().div((~zeros).sum().clamp_min(1)).sqrt()
                size = size if size > 0 else torch.ones_like(size)
                weight.copy_(torch.where(zeros, noise * size.to(weight.dtype), weight))
    return full
