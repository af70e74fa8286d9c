"""From a model to its structure: export, follow every node, read off what can go together.

No list of architectures: whatever `torch.export` can capture is followed operator by operator.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from torchprune.errors import ShrinkError
from torchprune.graph.capture import Call, exported
from torchprune.graph.handed import Entries, Handed, Place, Wanted, hindered
from torchprune.graph.labels import Choice
from torchprune.graph.layouts import Layout, layouts
from torchprune.graph.walk import Trace, Walk

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def trace(model: nn.Module, calls: Sequence[Call], *, closed: bool = False) -> Trace:
    """Follow the labels of a model's tensors through its graphs, one for each call.

    Where they leave parameters unread, the other mode is followed too, if it can be captured: a
    head that only training uses.

    Args:
        closed: freeze what parameters that no call reads may have to do with.

    Raises:
        ShrinkError: the model cannot be exported, with what torch says about it.
    """
    return Captured(model, calls).trace(closed=closed)


def trace_program(model: nn.Module, program: ExportedProgram) -> Trace:
    """`trace` of a model that `exported` gave this program of."""
    return _walked(model, [program]).end()


class Captured:
    """The graphs of a model, to be followed once or in several ways.

    Raises:
        ShrinkError: the model cannot be exported, with what torch says about it.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call]) -> None:
        self._model, self._calls = model, list(calls)
        self._programs = [exported(model, call) for call in calls]
        self._untried: str | None = None
        self._wanted: Wanted = {}
        self._banned: set[Place] = set()
        self._layouts: dict[Place, Layout] = {}

    def trace(self, *, closed: bool = False, given: Mapping[Choice, bool] | None = None) -> Trace:
        """As the function.

        Args:
            given: of choices about groups, whether whole ones go; the others are made as always.
        """
        walk, handed = self._fitting(given)
        if self._untried is None:
            self._untried = ""
            if walk.unread() and len({call.training for call in self._calls}) == 1:
                self._add_the_other_mode()
                walk, handed = self._fitting(given)
            if self._mark(walk):
                walk, handed = self._fitting(given)
        if closed:
            walk.close()
        return replace(walk.end(), untried=self._untried, handed=handed)

    def _add_the_other_mode(self) -> None:
        for call in list(self._calls):
            other = replace(call, training=not call.training)
            try:
                self._programs.append(exported(self._model, other))
            except ShrinkError as error:
                self._untried = str(error)
            else:
                self._calls.append(other)

    def _mark(self, walk: Walk) -> bool:
        """Whether heads that met a fixed size may go if arguments are narrowed on entry; from now
        on programs have marks then."""
        wanted = hindered(walk.labels, walk.labels.resolve())
        if not wanted:
            return False
        before = self._programs
        try:
            self._programs = [exported(self._model, call, wanted) for call in self._calls]
        except ShrinkError:
            return False
        self._wanted = wanted
        self._let_pass()
        walk, handed = self._fitting(None)
        resolved = walk.labels.resolve()
        if not any(bool(resolved.attended[one.labels].any()) for one in handed):
            self._programs, self._wanted = before, {}
        return bool(self._wanted)

    def _let_pass(self) -> None:
        """Find out which axes must have no labels so that heads may go: there may be as many rows
        as there are heads."""
        walk, _ = self._fitting(None)
        free, left = _free_heads(walk)
        places = walk.entries.places
        for role in sorted({(name, axis) for (_, name), axis in places}):
            if not left:
                return
            banned = self._banned
            self._banned = banned | {at for at in places if (at[0][1], at[1]) == role}
            now, still = _free_heads(self._fitting(None)[0])
            if now > free:
                free, left = now, still
            else:
                self._banned = banned

    def _fitting(self, given: Mapping[Choice, bool] | None) -> tuple[Walk, list[Handed]]:
        """Programs followed, and the arguments on which units lie in a way that is known."""
        while True:
            walk = _walked(self._model, self._programs, given, self._wanted, self._banned)
            resolved = walk.labels.resolve()
            held = walk.held(resolved)
            handed = walk.entries.used(resolved, held)
            known = self._known(handed)
            unfit = walk.entries.useless(resolved, held) | {
                one.at
                for one in handed
                if known[one.at] == "unknown"
                or one.argument in walk.entries.unlike
                or sum(other.argument == one.argument for other in handed) > 1
            }
            if not unfit:
                return walk, [replace(one, inner=known[one.at] == "inner") for one in handed]
            self._banned |= unfit

    def _known(self, handed: Sequence[Handed]) -> dict[Place, Layout]:
        """How units lie on axes; found out where an example does not show it."""
        self._layouts |= {one.at: "inner" for one in handed if one.inner}
        if new := [one for one in handed if one.at not in self._layouts]:
            self._layouts |= layouts(self._model, self._calls, new)
        return self._layouts


def _free_heads(walk: Walk) -> tuple[int, bool]:
    """How many heads may go, and whether some may not since they met a fixed size."""
    resolved = walk.labels.resolve()
    free = walk.held(resolved) & resolved.attended & ~resolved.frozen
    return len(resolved.classes[free].unique()), bool(hindered(walk.labels, resolved))


def _walked(
    model: nn.Module,
    programs: Sequence[ExportedProgram],
    given: Mapping[Choice, bool] | None = None,
    wanted: Wanted | None = None,
    banned: Collection[Place] = (),
) -> Walk:
    """Programs followed, and again where choices were made that had better be otherwise.

    Args:
        wanted, banned: as of `Entries`.
    """
    given = given or {}
    turned = {choice for choice, other in given.items() if other}
    had: dict[Choice, int] = {}
    for last in range(_WALKS, 0, -1):
        walk = Walk(model, turned, given, Entries(wanted or {}, banned))
        for program in programs:
            walk.meet(program)
        for program in programs:
            walk.follow(program)
        if last == 1 or not walk.labels.chose:
            break
        regretted = walk.labels.regretted(walk.labels.resolve(), had)
        if last == 2:  # what was turned in vain is turned back at least
            regretted &= turned
        if not regretted:
            break
        turned ^= regretted
    return walk


_WALKS = 8
