"""From a model to its structure: export, follow every node, read off what can go together.

No list of architectures: whatever `torch.export` can capture is followed operator by operator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

from torch import nn

from torchprune.errors import ShrinkError
from torchprune.graph.capture import Call, exported
from torchprune.graph.handed import Entries, Handed, Place, Role, Wanted, hindered
from torchprune.graph.labels import Choice
from torchprune.graph.more_rows import with_more_rows
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
        self._roles: Collection[Role] | None = None
        self._banned: set[Place] = set()
        self._asked: set[Place] = set()
        self._apart: set[Place] = set()

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
        if not walk.labels.hindered:
            return False
        wanted = hindered(walk.labels, walk.labels.resolve())
        if not wanted:
            return False
        before = self._programs
        try:
            self._programs = [exported(self._model, call, wanted) for call in self._calls]
        except ShrinkError:
            return False
        self._wanted = wanted
        self._choose_roles()
        walk, handed = self._fitting(None)
        resolved = walk.labels.resolve()
        free = resolved.attended & ~resolved.frozen
        if not any(len(resolved.classes[h.labels[free[h.labels]]].unique()) > 1 for h in handed):
            self._programs, self._wanted = before, {}
        return bool(self._wanted)

    def _choose_roles(self) -> None:
        """Find out which axes had better get no labels: there may be as many rows, or positions, as
        there are heads, and these would be in the way."""
        walk, _ = self._fitting(None)
        all_free, left = _free_heads(walk)
        roles = walk.entries.roles
        if not left:
            return
        freeing = [role for role in roles if self._freed([role])]
        pairs = combinations(roles, 2) if len(roles) <= _FEW else ()
        choices = [freeing] if freeing else pairs
        best = max(choices, key=self._freed, default=roles)
        self._roles = best if self._freed(best) > all_free else None
        self._banned.clear()

    def _freed(self, roles: Collection[Role]) -> int:
        """How many heads may go if only some axes have labels."""
        self._roles = roles
        self._banned.clear()
        return _free_heads(self._fitting(None)[0])[0]

    def _fitting(self, given: Mapping[Choice, bool] | None) -> tuple[Walk, list[Handed]]:
        """Programs followed, and the arguments on which units lie in a way that is known."""
        while True:
            entries = partial(Entries, self._wanted, self._banned, self._roles)
            walk = _walked(self._model, self._programs, given, entries)
            if not self._wanted:
                return walk, []
            resolved = walk.labels.resolve()
            handed = walk.entries.used(resolved, walk.held(resolved))
            if self._ask_more_rows(handed):
                continue
            unfit = {
                one.at
                for one in handed
                if not (one.inner or one.at in self._apart)
                or one.argument in walk.entries.unlike
                or sum(other.argument == one.argument for other in handed) > 1
            }
            if not unfit:
                return walk, handed
            self._banned |= unfit

    def _ask_more_rows(self, handed: Sequence[Handed]) -> bool:
        """Whether programs of examples with more rows were added, that show how units lie on axes
        which grow with these."""
        new = [one for one in handed if not one.inner and one.at not in self._asked]
        if not new:
            return False
        self._asked |= {one.at for one in new}
        stay, growing = with_more_rows(self._model, self._calls, new)
        self._apart |= stay
        before = len(self._programs)
        with suppress(ShrinkError):
            self._programs += [exported(self._model, call, self._wanted) for call in growing]
        return len(self._programs) > before


def _free_heads(walk: Walk) -> tuple[int, bool]:
    """How many heads may go, and whether some may not since they met a fixed size."""
    resolved = walk.labels.resolve()
    free = walk.held(resolved) & resolved.attended & ~resolved.frozen
    return len(resolved.classes[free].unique()), bool(hindered(walk.labels, resolved))


def _walked(
    model: nn.Module,
    programs: Sequence[ExportedProgram],
    given: Mapping[Choice, bool] | None = None,
    entries: Callable[[], Entries] | None = None,
) -> Walk:
    """Programs followed, and again where choices were made that had better be otherwise."""
    given = given or {}
    turned = {choice for choice, other in given.items() if other}
    had: dict[Choice, int] = {}
    for last in range(_WALKS, 0, -1):
        walk = Walk(model, turned, given, Entries({}) if entries is None else entries())
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

_FEW = 8
"""Of so many axes any two are tried."""
