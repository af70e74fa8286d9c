"""Which removals a model's own code refuses: found by trying, and told with module and line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torchprune.graph.groups import Structure
from torchprune.masking.plain_state import Slot
from torchprune.structure.same_outputs import Fault
from torchprune.structure.shrink_plan import Asked, Removal, ShrinkPlan, asked_of, drawn_up

Trial = Callable[[ShrinkPlan], Fault | None]
"""What is wrong with the model after a plan is carried out; the model is left as it was."""

_MANY = 16
"""More suspects than this are not tried one by one where the same line refused another."""


@dataclass(frozen=True, eq=False)
class Left:
    """A removal that cannot be: the fault when it is tried, and the sizes that the code gives."""

    removal: Removal
    fault: Fault
    asked: list[Asked]

    def __str__(self) -> str:
        r = self.removal
        text = f"{r.group.name} ({r.before} -> {r.after} {r.group.kind})"
        if not self.asked:
            return text
        own = [ask for ask in self.asked if ask.place == self.fault.place] or self.asked
        one = own[0]
        where = f" at {one.place}" if one.place else ""
        return (
            f"{text}, since the code of {one.module or 'the model'}{where} works with "
            f"{one.before}, which would become {one.after}"
        )

    def layer(self, layers: Collection[str]) -> str:
        """The path of a layer of the group, for `ignore=`; empty if it has none."""
        keys = (m.key for m in self.removal.group.members if m.key in layers)
        return next(keys, "").rpartition(".")[0]


def without_refused(
    plan: ShrinkPlan, structure: Structure, slots: Mapping[str, Slot], fault: Fault, tried: Trial
) -> tuple[ShrinkPlan, list[Left]] | None:
    """The largest part of a refused plan that was found to go, and what it leaves.

    Args:
        fault: of the whole plan.

    Returns:
        None if the model refuses even without any removal: then it is its blocks that cannot go.
    """
    search = _Search(plan, structure, slots, tried)
    return search.run(fault)


class _Search:
    def __init__(
        self, plan: ShrinkPlan, structure: Structure, slots: Mapping[str, Slot], tried: Trial
    ) -> None:
        self._plan, self._structure, self._slots, self._tried = plan, structure, slots, tried
        self._asked = {id(r): asked_of(structure, r) for r in plan.removals}
        self._kept: list[Removal] = list(plan.removals)
        self._left: list[Left] = []

    def run(self, fault: Fault) -> tuple[ShrinkPlan, list[Left]] | None:
        """Take out what is suspect until the rest goes, then put back what goes with it."""
        suspects: list[Removal] = []
        now: Fault | None = fault
        while now is not None:
            if not self._kept:
                return None
            own = self._suspects(now) or list(self._kept)
            suspects += own
            self._kept = [r for r in self._kept if all(r is not one for one in own)]
            now = self._tried(self._part(self._kept))
        self._put_back(suspects, fault)
        order = {id(removal): place for place, removal in enumerate(self._plan.removals)}
        self._left.sort(key=lambda one: order[id(one.removal)])
        return self._part(self._kept), self._left

    def _part(self, removals: Sequence[Removal]) -> ShrinkPlan:
        ordered = [r for r in self._plan.removals if any(r is one for one in removals)]
        return drawn_up(self._plan, self._structure, self._slots, ordered)

    def _suspects(self, fault: Fault) -> list[Removal]:
        """Those asked for at the line that failed; else those in its module; else any asked for."""
        if own := [r for r in self._kept if self._asked_at(r, fault.place)]:
            return own
        if fault.module:
            inside = f"{fault.module}."
            return [
                r
                for r in self._kept
                if any(ask.module == fault.module for ask in self._asked[id(r)])
                or any(m.key.startswith(inside) for m in r.group.members)
            ]
        return [r for r in self._kept if self._asked[id(r)]]

    def _asked_at(self, removal: Removal, place: str) -> bool:
        return bool(place) and any(ask.place == place for ask in self._asked[id(removal)])

    def _put_back(self, chunk: list[Removal], fault: Fault | None = None) -> None:
        """Keep as much of some removals as goes together with those that are kept."""
        if fault is None and (known := self._as_before(chunk)):
            self._left += known
            chunk = [r for r in chunk if all(r is not one.removal for one in known)]
        if not chunk:
            return
        if fault is None:
            fault = self._tried(self._part([*self._kept, *chunk]))
        if fault is None:
            self._kept += chunk
        elif len(chunk) == 1:
            self._left.append(Left(chunk[0], fault, self._asked[id(chunk[0])]))
        else:
            half = len(chunk) // 2
            self._put_back(chunk[:half])
            self._put_back(chunk[half:])

    def _as_before(self, chunk: Sequence[Removal]) -> list[Left]:
        """Of many, those for which a line asks that refused another already."""
        lines = {one.fault.place: one.fault for one in self._left if one.fault.place}
        found = []
        for removal in chunk if len(self._plan.removals) > _MANY else ():
            asked = self._asked[id(removal)]
            line = next((ask.place for ask in asked if ask.place in lines), None)
            if line is not None:
                found.append(Left(removal, lines[line], asked))
        return found


def told(name: str, fault: Fault, left: Sequence[Left], layers: Collection[str]) -> str:
    """A refusal in words: what failed where, for which groups, and how to go around it.

    Args:
        name: of the model's class.
        layers: the names of all weights that specs can mask.
    """
    groups = "; ".join(str(one) for one in left[:4])
    more = f" and {len(left) - 4} more groups" if len(left) > 4 else ""
    names = [path for one in left if (path := one.layer(layers))]
    ignore = f"ignore={tuple(names[:8])!r}" + (" and so on" if len(names) > 8 else "")
    return (
        f"the smaller {name} {fault}. What cannot go: {groups}{more}. Leave it alone with {ignore} "
        'in the spec that masked it, or let plan_shrink(..., on_refusal="ignore") do so; or let '
        "that code read its sizes from its tensors, or from an integer attribute of the module"
    )
