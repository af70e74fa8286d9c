"""Whether the second moments that calibration collects find room in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from torchprune.errors import CalibrationError

_COPIES = 2
"""A second moment, and what a method makes of it: its factor, at the least."""


def check_room(needs: Mapping[str, tuple[torch.device, int]]) -> None:
    """
    Args:
        needs: a layer's name -> the device of its statistics, and their bytes.

    Raises:
        CalibrationError: the largest alone takes more memory than there is.
    """
    for device in {device for device, _ in needs.values()}:
        own = {name: size for name, (where, size) in needs.items() if where == device}
        name = max(own, key=lambda name: own[name])
        there = available(device)
        if there is not None and _COPIES * own[name] > there:
            raise CalibrationError(
                f"{name}: the second moment of its inputs and a factor of it take "
                f"{_COPIES * own[name] / 1e9:,.1f} GB, and {there / 1e9:,.1f} GB of memory are "
                f"free on {device}: leave this layer out (ignore=[...]), or choose a method "
                "without second moments (such as WandaSpec, or refit=False for whole units)"
            )


def available(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device, or None where nobody knows."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu":
        return None
    found = []
    for line in _lines(Path("/proc/meminfo")):
        name, _, value = line.partition(":")
        if name == "MemAvailable" and (words := value.split()) and words[0].isdecimal():
            found.append(1024 * int(words[0]))
    found += [int(line) for line in _lines(Path("/sys/fs/cgroup/memory.max")) if line.isdecimal()]
    return min(found, default=None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
