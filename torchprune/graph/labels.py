"""Labels: which indices of which axes stand or fall together.

Every index of every axis of every weight gets a label of its own. Following a model's graph, labels
are joined (two indices that meet in one element of some tensor can only go together) or frozen
(something reads them in a way that would not survive their absence). What is connected in the end,
and not frozen, is a unit that can be removed.

A *tag* says how a tensor's elements depend on labels: an int64 tensor with the dimensions of the
tensor it belongs to, of size 1 along the axes on which the label does not depend. After a view
splits features into heads, one tag varies along two axes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprune.graph.components import components

UNLABELLED = 0
"""The label of what can never go."""


def axes_of(tag: Tensor) -> tuple[int, ...]:
    """The axes along which a tag varies, outermost first."""
    return tuple(axis for axis, size in enumerate(tag.shape) if size > 1)


def collapsed(tag: Tensor) -> Tensor:
    """The tag with size 1 along every axis on which it does not really vary."""
    for axis in axes_of(tag):
        first = tag.narrow(axis, 0, 1)
        if bool((tag == first).all()):
            tag = first
    return tag


@dataclass(frozen=True)
class Resolved:
    """What became of all labels.

    Attributes:
        classes: (labels,) int64, the connected class of each label, named by its smallest member.
        frozen: (labels,) bool, whether the label's class can never go.
        reasons: class -> why it is frozen, for those that some operator froze.
        attended: (labels,) bool, whether attention keeps the label's class apart as a head.
    """

    classes: Tensor
    frozen: Tensor
    reasons: dict[int, str]
    attended: Tensor


Choice = tuple[object, int]
"""Where a choice was made: the node, and which of its choices; or what has groups of channels, and
the first label of its weight."""


@dataclass(frozen=True, eq=False)
class GroupChoice:
    """How the channels of a convolution with groups may go.

    Attributes:
        reads: (groups, inputs of a group) labels.
        makes: (groups, outputs of a group) labels; (1, outputs of a group) where these are one for
            all groups anyway.
        whole: whether whole groups go; else the same places of all groups do.
    """

    choice: Choice
    reads: Tensor
    makes: Tensor
    whole: bool


class Labels:
    """The labels of one graph while it is followed.

    Where (copies, features) meet what has a say in the copies alone, either can give way: the
    copies stay what may go and the features of each are one, as heads are; or the features are the
    same in all copies. The first is chosen, unless this choice is among `turned`.

    Of groups of channels the same places of all go, or whole groups where this choice is among
    `turned`.

    Args:
        settled: choices about groups that are not to be regretted.
    """

    def __init__(self, turned: Collection[Choice] = (), settled: Collection[Choice] = ()) -> None:
        self._turned, self._settled = turned, settled
        self.grouped: list[GroupChoice] = []
        """The choices about groups of channels, in the order of the graph."""
        self._choices: list[tuple[Choice, Tensor, int]] = []
        self._summed: list[tuple[Tensor, int]] = []
        self._asked = 0
        self._at: object = None
        self._module = ""
        self.hindered: list[tuple[str, Tensor]] = []
        """Where labels are frozen since they meet what has a fixed size: module, (size,) labels."""
        self._count = 1
        self._repeating: list[tuple[int, int]] = []
        self.edges: list[tuple[Tensor, Tensor]] = []
        """Labels that were joined: pairs of flat tensors, element by element."""
        self._frozen: list[tuple[Tensor, str]] = []
        self._grids: list[Tensor] = []
        self._cuts: list[Tensor] = []
        self._attended: list[tuple[Tensor, tuple[int, ...]]] = []
        self.read: list[Tensor] = []
        """Labels of weights' input indices: where what they carry is consumed."""
        self.idle = False
        """Whether what follows is not heard: nothing that it computes is read by anything."""

    def new(self, count: int) -> Tensor:
        """(count,) fresh labels."""
        self._count += count
        return torch.arange(self._count - count, self._count)

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """What is new inside is of one value, repeated."""
        start = self._count
        yield
        self._repeating.append((start, self._count))

    def repeats(self, tag: Tensor, *, unmet: bool = False) -> bool:
        """Whether a tag is of one value repeated.

        Args:
            unmet: and nothing else has met it yet.
        """
        low, high = int(tag.min()), int(tag.max())
        single = any(start <= low and high < end for start, end in self._repeating)
        if unmet and single:
            ends = (torch.cat(pair) for pair in self.edges)
            return not any(bool(((low <= end) & (end <= high)).any()) for end in ends)
        return single or (
            not unmet
            and all(
                any(start <= label < end for start, end in self._repeating)
                for label in tag.unique().tolist()
            )
        )

    def at(self, node: object, module: str = "") -> None:
        """What follows is about this node, which the code of a module makes."""
        self._at, self._module, self._asked = node, module, 0

    def _turns(self, tag: Tensor) -> bool:
        """Whether features win over the copies on a tag's outermost axis."""
        choice = self._at, self._asked
        self._asked += 1
        self._choices.append((choice, tag, tag.shape[axes_of(tag)[0]]))
        return choice in self._turned

    def whole_groups(self, owner: Tensor, reads: Tensor, makes: Tensor) -> bool:
        """Whether whole groups of channels go, and not the same places of all groups.

        Args:
            owner: labels of the weight that has the groups, the same in all graphs.
            reads, makes: as in `GroupChoice`.
        """
        choice = "groups", int(owner.min())
        if self.idle or choice[1] == UNLABELLED or not bool((reads != UNLABELLED).any()):
            return False  # nothing to choose
        whole = choice in self._turned
        self.grouped.append(GroupChoice(choice, reads, makes, whole))
        return whole

    @property
    def chose(self) -> bool:
        """Whether there was any choice that could be regretted."""
        sizes = {size for _, _, size in self._choices} & {size for _, size in self._summed}
        return bool(sizes or self.grouped)

    def summed(self, tag: Tensor, axes: Iterable[int]) -> None:
        """Remember that a tag was read as a whole along some axes."""
        if not self.idle:
            self._summed += [(tag, tag.shape[axis]) for axis in axes]

    def regretted(self, resolved: Resolved, had: dict[Choice, int] | None = None) -> set[Choice]:
        """The choices that had better be the other way.

        Args:
            had: of groups, how many places there were to choose from when whole ones were tried
                instead; gains those that are to be tried now.
        """
        found = self._groups_regretted(resolved, {} if had is None else had)
        return found | self._copies_regretted(resolved)

    def _groups_regretted(self, resolved: Resolved, had: dict[Choice, int]) -> set[Choice]:
        """Groups of which less may go than if they were cut the other way.

        Within groups there are to be some places to choose from, of inputs and outputs; of what
        hangs together the last is turned first. Whole groups are to be more than these, or have
        to wait for what is turned now.
        """
        found: set[Choice] = set()
        touched = torch.zeros(self._count, dtype=torch.bool)
        within = [one for one in self.grouped if not one.whole]
        for one in (*reversed(within), *(one for one in self.grouped if one.whole)):
            sides = [resolved.classes[labels].unique() for labels in (one.reads, one.makes)]
            free = [int((~resolved.frozen[side]).sum()) for side in sides]
            both, least = torch.cat(sides), free[0] if one.whole else min(free)
            if one.choice in self._settled or bool(touched[both].any()):
                continue
            if one.whole and least <= had.get(one.choice, 1):
                found.add(one.choice)
            elif not one.whole and one.choice not in had and least < min(_FEW, len(one.reads)):
                found.add(one.choice)
                had[one.choice] = max(1, least)
                touched[both] = True
        return found

    def _copies_regretted(self, resolved: Resolved) -> set[Choice]:
        """Choices of copies that are read as a whole later, so that none can go alone."""
        extents: dict[int, Tensor] = {}
        for tag, extent in self._summed:
            seen = extents.setdefault(extent, torch.zeros(self._count, dtype=torch.bool))
            seen[resolved.classes[tag]] = True
        found = set()
        for choice, tag, extent in self._choices:
            own = resolved.classes[tag]
            whole = extent in extents and bool(extents[extent][own].any())
            if choice not in self._turned and whole and not bool(resolved.attended[own].any()):
                found.add(choice)
        return found

    def join(self, a: Tensor, b: Tensor) -> None:
        """Two tags of broadcastable shapes: elements that meet go together."""
        a, b = torch.broadcast_tensors(a, b)
        if not self.idle:
            self.edges.append((a.reshape(-1), b.reshape(-1)))

    def freeze(self, tag: Tensor, why: str) -> None:
        """Nothing of this may go."""
        if not self.idle:
            self._frozen.append((tag.reshape(-1), why))

    def watch(self, tag: Tensor) -> Tensor:
        """Remember a tag of several axes: whatever goes must leave a rectangle of it."""
        if len(axes_of(tag)) > 1 and not self.idle:
            self._grids.append(tag)
        return tag

    def moved(self, before: Tensor, after: Tensor) -> None:
        """A view has the labels of one tag lie on other axes; of these tags they are full.

        Where an axis is cut into rows, which later lie on one axis the other way round, channels
        are shuffled: there are as many rows as the code says, and the same goes from all.
        """
        one, other = _without_ones(before), _without_ones(after)
        if (one.dim(), other.dim()) == (1, 2):
            self._cuts.append(other)
        elif (one.dim(), other.dim()) == (2, 1):
            for cut in self._cuts:
                if cut.shape == one.mT.shape and torch.equal(cut, one.mT):
                    self.united(cut, [0])

    def attend(self, tag: Tensor, apart: Collection[int]) -> None:
        """Mark labels as heads of attention, which lie on some of a tag's axes."""
        if not self.idle:
            self._attended.append((tag, tuple(a for a in axes_of(tag) if a not in apart)))

    def united(self, tag: Tensor, axes: Iterable[int]) -> Tensor:
        """The tag after its labels are joined along some axes."""
        for axis in axes:
            if tag.shape[axis] > 1:
                first = tag.narrow(axis, 0, 1)
                self.join(tag, first)
                tag = first
        return tag

    def bounded(self, tag: Tensor, fixed: Iterable[int], why: str) -> Tensor:
        """The tag where some axes must keep their size: frozen, or joined along those axes; gone,
        if it is of one value repeated.

        The outermost axis is the one that can shrink (heads, then what is inside a head), or what
        is the same in all copies.
        """
        own = axes_of(tag)
        bound = [axis for axis in own if axis in set(fixed)]
        if not bound:
            return tag
        if own[0] in bound and (len(bound) == len(own) or not self._turns(tag)):
            repeated = self.repeats(tag)
            self.freeze(tag, why)
            if not self.idle:
                self.hindered.append((self._module, tag.movedim(own[0], 0).flatten(1)[:, 0]))
            return tag.new_full((1,) * tag.dim(), UNLABELLED) if repeated else tag
        return self.united(tag, bound)

    def merged(self, tags: Sequence[Tensor], why: str) -> list[Tensor]:
        """Tags of one tensor made disjoint: those that vary along a common axis become one.

        Tags of the same axes are joined index by index. Otherwise the outermost axis decides: with
        (heads, features) meets (heads), each head becomes one; with (heads, features) meets
        (features), as where one norm serves all heads, the features are frozen.
        """
        done: list[Tensor] = []
        todo = list(tags)
        while todo:
            tag = todo.pop(0)
            other = next((t for t in done if set(axes_of(t)) & set(axes_of(tag))), None)
            if other is None:
                if axes_of(tag):
                    done.append(tag)
                continue
            done = [t for t in done if t is not other]
            if axes_of(other) == axes_of(tag):
                self.join(other, tag)
                todo.insert(0, other)
                continue
            outermost = min(axes_of(other) + axes_of(tag))
            both = [other, tag]
            inner = set(axes_of(other)) ^ set(axes_of(tag))
            if self._turns(other if outermost in axes_of(other) else tag):
                for t in both:
                    if axes_of(t) == (outermost,):
                        self.freeze(t, why)
                todo[:0] = [self.united(t, [outermost]) for t in both]
            elif all(outermost in axes_of(t) for t in both):
                todo[:0] = [self.united(t, inner) for t in both]
            else:
                low = next(t for t in both if outermost not in axes_of(t))
                self.freeze(low, why)
                high = other if low is tag else tag
                todo.insert(0, self.united(high, axes_of(low)))
        return done

    def resolve(self) -> Resolved:
        """Connect all that was joined, until whatever goes leaves rectangles."""
        classes = self._classes()
        while self._straighten(classes):
            classes = self._classes()
        frozen = torch.zeros(self._count, dtype=torch.bool)
        frozen[UNLABELLED] = True
        reasons: dict[int, str] = {}
        for tag, why in self._frozen:
            own = classes[tag]
            frozen[own] = True
            for name in own.unique().tolist():
                reasons.setdefault(name, why)
        return Resolved(classes, frozen[classes], reasons, self._marked(classes)[classes])

    def _marked(self, classes: Tensor) -> Tensor:
        """(labels,) bool, over classes: heads of attention."""
        found = torch.zeros(self._count, dtype=torch.bool)
        for tag, _ in self._attended:
            found[classes[tag]] = True
        return found

    def _classes(self, more: Sequence[tuple[Tensor, Tensor]] = ()) -> Tensor:
        """(labels,) what was joined, and some more."""
        edges = [*self.edges, *more]
        if not edges:
            return torch.arange(self._count)
        one, two = (torch.cat(ends) for ends in zip(*edges, strict=True))
        return components(self._count, one, two)

    def _heads(self) -> Tensor:
        """(labels,) the classes if each head were one."""
        joined = []
        for tag, inner in self._attended:
            for axis in inner:
                first = tag.narrow(axis, 0, 1).expand(tag.shape)
                joined.append((tag.reshape(-1), first.reshape(-1)))
        return self._classes(joined)

    def _straighten(self, classes: Tensor) -> bool:
        """Join what would leave a tensor without its corners. Whether there was any."""
        found = False
        inside = torch.zeros(self._count, dtype=torch.bool)
        for one in self.grouped:
            if not one.whole:
                inside[classes[torch.cat([one.reads.flatten(), one.makes.flatten()])]] = True
        attended = self._marked(classes)
        heads = self._heads() if bool(attended.any()) else classes
        for grid in self._grids:
            now = collapsed(classes[grid])
            axes = axes_of(now)
            if len(axes) > 1:
                parts = axes_of(collapsed(heads[grid]))[:-1] if attended[now].all() else ()
                rows_stay = bool((inside & ~attended)[now].any())  # where groups do
                # from several parts the same heads go, and there are as many parts
                self.united(now, parts or (axes[:-1] if rows_stay else axes[1:]))
                found = True
        return found


def _without_ones(tag: Tensor) -> Tensor:
    return tag.reshape([size for size in tag.shape if size > 1])


_FEW = 4
"""With fewer places in a group than this, and more groups, whole groups leave more choice."""
