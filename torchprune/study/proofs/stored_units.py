"""Whole units: that masks prune nothing but whole lines, so many, and the same in their layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchprune.study.proofs.proof import Breaches
from torchprune.study.proofs.stored_demands import Demand, Units
from torchprune.study.proofs.stored_layers import StoredLayer

_FUSED = (1, 3, 2)
"""How many times a layer's axis may hold all units side by side: q, k and v, gate and up."""


@dataclass
class UnitLaws:
    """Units as layers pass.

    Attributes:
        dropped: names of tensors of blocks that are gone whole.
    """

    dropped: list[str] = field(default_factory=list)
    _sets: dict[tuple[str, Units], tuple[str, frozenset[int]]] = field(default_factory=dict)
    _differ: list[tuple[str, str, str]] = field(default_factory=list)

    def see(self, layer: StoredLayer, demand: Demand, count: Breaches, pattern: Breaches) -> None:
        """Look at a layer whose units were pruned."""
        keep = layer.keep
        if demand.units[0].kind == "blocks":
            self.dropped.append(layer.key)
            if bool(keep.any()):
                kept = int(torch.count_nonzero(keep))
                pattern.add(layer.key, "a block that is gone whole", f"{kept:,} weights kept")
            return
        dead = dead_lines(keep)
        if not demand.exact:  # an earlier run may have pruned anything besides
            return
        whole = torch.ones_like(keep)
        for axis, lines in enumerate(dead):
            shape = [len(lines) if a == axis else 1 for a in range(keep.dim())]
            whole &= ~lines.view(shape)
        if not torch.equal(whole, keep) and bool(keep.any()):
            torn = int(torch.count_nonzero(whole & ~keep))
            pattern.add(
                layer.key, "whole units pruned", f"{torn:,} pruned weights in no whole unit"
            )
            return
        self._counts(layer.key, dead, demand.units, count, pattern)

    def _counts(
        self,
        key: str,
        dead: Sequence[Tensor],
        units: Sequence[Units],
        count: Breaches,
        pattern: Breaches,
    ) -> None:
        shares = [one.gone / one.count for one in units if one.count]
        found = [float(lines.sum()) / len(lines) for lines in dead]
        fits = [share for share in found if share]
        low, high = min(shares, default=0.0), max(shares, default=0.0)
        wrong = [s for s in fits if not low - 1e-9 <= s <= high + 1e-9]
        if wrong or (low > 0 and not fits):
            said = ", ".join(f"{one.gone} of {one.count} {one.kind}" for one in units)
            axes = ", ".join(f"{int(d.sum())} of {len(d)}" for d in dead)
            count.add(key, f"{said} pruned", f"{axes} lines by axis")
            return
        lines = [d for d in dead if bool(d.any())]
        if len(units) == 1 and len(lines) == 1 and units[0].kind != "channels":
            self._remember(key, lines[0], units[0], pattern)

    def _remember(self, key: str, lines: Tensor, units: Units, pattern: Breaches) -> None:
        """Keep which units are gone, to compare with the other layers of their module."""
        gone = units_gone(lines, units.count)
        if gone is None:
            pattern.add(key, f"whole {units.kind} pruned", f"{int(lines.sum())} lines of several")
            return
        path = key.rpartition(".")[0].rpartition(".")
        if path[2].isdigit():
            return
        first = self._sets.setdefault((path[0], units), (key, gone))
        if first[1] != gone:
            self._differ.append((key, first[0], f"{sorted(gone ^ first[1])[:6]}"))

    def finish(self, pattern: Breaches) -> None:
        """Note layers of one module from which different units went."""
        for key, other, which in self._differ:
            pattern.add(key, f"the same units gone as in {other}", f"others: {which} differ")


def dead_lines(keep: Tensor) -> list[Tensor]:
    """For every axis (size,) bool: where nothing at that place is kept."""
    if keep.dim() < 2:
        return [~keep]
    axes = range(keep.dim())
    return [~keep.any(dim=[a for a in axes if a != axis]) for axis in axes]


def units_gone(lines: Tensor, count: int) -> frozenset[int] | None:
    """Which of so many units are gone of an axis that holds them in order; None if one is torn."""
    for times in _FUSED:
        if len(lines) % (times * count):
            continue
        parts = lines.view(times, count, -1)
        whole = parts.all(2)
        if torch.equal(whole, parts.any(2)) and bool((whole == whole[:1]).all()):
            return frozenset(whole[0].nonzero().flatten().tolist())
    return None


def blocks_named(keys: Sequence[str]) -> set[str]:
    """The repeated blocks that tensors are of: their names up to the first number."""
    found = set()
    for key in keys:
        parts = key.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        found.add(".".join(parts[: at + 1]))
    return found
