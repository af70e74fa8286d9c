"""What a file's own words ask of a mask: its record, and the runs that it is of."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from torchprune.masking.parametrization import Record
from torchprune.masking.request import Request
from torchprune.masking.selection import Layer
from torchprune.reports.report import RunRecord
from torchprune.specs.goals import Goal
from torchprune.specs.patterns import NM, Pattern, parse_pattern, prune_count
from torchprune.specs.spec import Spec
from torchprune.structure.specs import StructuredSpec

_SHARED = re.compile(r"(unstructured|block:\d+x\d+) (\d\.?\d*(?:e-\d+)?)")
_GROUPS = re.compile(r"(\d+:\d+)(?:, (\d\.?\d*(?:e-\d+)?) of it)?")
_UNITS = re.compile(r"(.{1,200}) (\d{1,12})/(\d{1,12}) (heads|neurons|channels)(?: of (\d{1,12}))?")
BY_ROW = "each row keeps its share"
"""What a record's note says of a layer whose rows have counts of their own though it need not."""


@dataclass(frozen=True)
class Units:
    """So many of so many whole units are gone, each of so many channels."""

    gone: int
    count: int
    kind: str
    width: int = 1


@dataclass(frozen=True)
class Demand:
    """What one layer's zeros are to be.

    Attributes:
        pattern: of single weights, or None where whole units go.
        low, high: the share of zeros; they differ where the file says it in four digits only.
        scope: where the count is exact; None is either by rows or by matrices.
        exact: False where an earlier run may have pruned more of some row.
        share: of what an n:m pattern prunes, how much goes: below 1 on the way there.
        run: the number of the run that asked, or None.
        uneven: whether a budget was shared unevenly among the run's layers.
        units: of whole units.
        clash: how the record and its run contradict each other, or "".
    """

    pattern: Pattern | None = None
    low: float | Fraction = 0.0
    high: float | Fraction = 0.0
    scope: str | None = None
    exact: bool = True
    share: float = 1.0
    run: int | None = None
    uneven: bool = False
    units: Sequence[Units] = ()
    clash: str = ""

    def counts(self, total: int) -> tuple[int, int]:
        """The least and the greatest count of zeros among so many."""
        return prune_count(total, self.low), prune_count(total, self.high)


def demand_of(key: str, record: Record, runs: Sequence[RunRecord]) -> Demand | str:
    """What is asked of the mask on a tensor, or why the file does not say."""
    layer = _layer(key)
    text = record.pattern
    if record.method == "given":
        return "masks were given by hand, and no count was asked"
    if text == "nothing yet":
        return "nothing is pruned yet"
    if text == "refitted":
        return "nothing of it is pruned"
    if record.method == "layers":
        return Demand(units=(Units(1, 1, "blocks"),))
    if units := _units_of(text):
        return _of_units(units, record, runs)
    read = _read(text)
    if read is None:
        return f"its record says {text!r:.60}, which names no pattern"
    return _of_weights(read, layer, record, runs)


def _layer(key: str) -> Layer:
    """The layer as selectors see it; they are strings in a file, so no module is asked."""
    path, _, last = key.rpartition(".")
    name = path if last == "weight" and path else key
    return Layer(name, key, nn.Module(), last)


def _read(text: str) -> Demand | None:
    """What a record's pattern says by itself."""
    if found := _GROUPS.fullmatch(text):
        pattern = parse_pattern(found[1])
        share = float(found[2]) if found[2] else 1.0
        assert isinstance(pattern, NM)
        return Demand(pattern, pattern.sparsity, pattern.sparsity, share=share)
    if found := _SHARED.fullmatch(text):
        share = float(found[2])
        if not 0 <= share <= 1:
            return None
        away = 0.5 * 10 ** (math.floor(math.log10(share)) - 3) if share else 0.0
        return Demand(parse_pattern(found[1]), max(share - away, 0.0), min(share + away, 1.0))
    return None


def _units_of(text: str) -> tuple[Units, ...]:
    parts = [_UNITS.fullmatch(part) for part in text.split(", ")]
    if not all(part is not None and 0 <= int(part[2]) <= int(part[3]) for part in parts):
        return ()
    return tuple(Units(int(p[2]), int(p[3]), p[4], int(p[5] or 1)) for p in parts if p is not None)


def _of_weights(read: Demand, layer: Layer, record: Record, runs: Sequence[RunRecord]) -> Demand:
    asked = [(at, run.spec) for at, run in enumerate(runs) if _picks(run.spec, layer)]
    mine = [at for at, spec in asked if _is_by(spec, record)]
    if not mine:
        return Demand(read.pattern, read.low, read.high, None, len(asked) < 2, read.share, None)
    at = mine[-1]
    spec = runs[at].spec
    assert isinstance(spec, Spec)
    request = Request.of(spec)
    goal = request.goal_of(layer)
    assert goal is not None
    scope = "row" if spec.scope == "layer" and BY_ROW in record.note else spec.scope
    uneven = spec.uneven is not None and request.override(layer) is None
    earlier = any(other < at for other, _ in asked) or any(
        isinstance(run.spec, StructuredSpec) for run in runs[:at]
    )
    clash = "" if uneven or str(goal) == record.pattern else _clash(goal, record, at)
    low, high = (read.low, read.high) if uneven or clash else (goal.sparsity, goal.sparsity)
    return Demand(read.pattern, low, high, scope, not earlier, read.share, at, uneven, clash=clash)


def _clash(goal: Goal, record: Record, at: int) -> str:
    return f"{goal} by the spec of run {at + 1}|{record.pattern} by the layer's own record"


def _picks(spec: object, layer: Layer) -> bool:
    if not isinstance(spec, Spec):
        return False
    request = Request.of(spec)
    return (
        request.picks(layer) and not request.ignores(layer) and request.goal_of(layer) is not None
    )


def _is_by(spec: object, record: Record) -> bool:
    """Whether a run is the one that a record is of; what no batch reached went by magnitude."""
    unreached = record.method == "magnitude" and "no calibration batch reached" in record.note
    return isinstance(spec, Spec) and (spec.label == record.method or unreached)


def _of_units(units: tuple[Units, ...], record: Record, runs: Sequence[RunRecord]) -> Demand:
    """The record's units; one run alone that shares evenly says how many there are to be."""
    mine = [
        (at, run.spec)
        for at, run in enumerate(runs)
        if isinstance(run.spec, StructuredSpec) and run.spec.method == record.method
    ]
    if len(mine) != 1 or mine[0][1].allocation != "uniform":
        return Demand(units=units, exact=len(runs) < 2)
    at, spec = mine[0]
    clash = ""
    for one in units:
        wanted = one.count - spec.kept(one.count, one.width)
        if one.kind == spec.kind and one.gone != wanted:
            clash = (
                f"{wanted} of {one.count} {one.kind} gone by the spec of run {at + 1}|"
                f"{one.gone} by the layer's own record"
            )
    return Demand(units=units, exact=len(runs) < 2, run=at, clash=clash)
