"""What is known of a tensor of the graph, and the view-like operators on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchprune.graph.labels import UNLABELLED, Labels, axes_of, collapsed

UNKNOWN = -1
"""A size that depends on the values of the input."""


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the graph.

    Attributes:
        shape: its sizes on the example inputs; `UNKNOWN` where values decide.
        tags: how its elements depend on labels; no two tags vary along the same axis. An axis of
            more than one index on which no tag varies has a fixed size.
        weight: whether it is made of parameters, buffers and constants alone.
    """

    shape: tuple[int, ...]
    tags: tuple[Tensor, ...] = ()
    weight: bool = False

    @property
    def dim(self) -> int:
        return len(self.shape)

    def held(self) -> tuple[Tensor, ...]:
        """Every tag on which what it holds depends."""
        return self.tags

    def tagged(self) -> set[int]:
        """The axes on which some tag varies."""
        return {axis for tag in self.tags for axis in axes_of(tag)}

    def fixed(self) -> set[int]:
        """The axes of more than one index on which none does."""
        return {a for a, size in enumerate(self.shape) if size > 1} - self.tagged()

    def on(self, axis: int) -> Tensor | None:
        """The tag that varies on an axis, or None."""
        return next((tag for tag in self.tags if tag.shape[axis] > 1), None)

    def permuted(self, order: Sequence[int]) -> Value:
        order = [axis % self.dim for axis in order]
        shape = tuple(self.shape[axis] for axis in order)
        tags = tuple(tag.permute(order) for tag in self.tags)
        return replace(self, shape=shape, tags=tags)

    def inserted(self, axis: int) -> Value:
        """With a new axis of size 1."""
        axis %= self.dim + 1
        shape = (*self.shape[:axis], 1, *self.shape[axis:])
        tags = tuple(tag.unsqueeze(axis) for tag in self.tags)
        return replace(self, shape=shape, tags=tags)

    def widened(self, dim: int) -> Value:
        """With leading axes of size 1, up to `dim` in all."""
        missing = (1,) * (dim - self.dim)
        tags = tuple(tag.reshape(*missing, *tag.shape) for tag in self.tags)
        return replace(self, shape=(*missing, *self.shape), tags=tags)


@dataclass(frozen=True, eq=False)
class Constant(Value):
    """Numbers that stand in the code.

    Attributes:
        data: the tensor itself.
    """

    data: Tensor | None = None


def reshaped(labels: Labels, value: Value, shape: Sequence[int], why: str) -> Value:
    """The value under a view: labels go where the elements go.

    Axes that vary apart may become one. Then only one of them may still shrink: the outermost, or
    the first that is not the repetition of one value.
    """
    spans = _spans(value.shape, shape)
    made: list[Tensor] = []
    for tag in sorted(
        value.tags, key=lambda tag: (labels.repeats(tag, unmet=True), axes_of(tag)[:1])
    ):
        before, after = _moved(tag, value.shape, shape, spans)
        labels.moved(before, after)
        new = collapsed(after)
        if any({*axes_of(new)} & {*axes_of(other)} for other in made):
            labels.freeze(tag, why)
        elif axes_of(new):
            made.append(labels.watch(new))
    return Value(tuple(shape), tuple(made), value.weight)


def _moved(
    tag: Tensor,
    old: Sequence[int],
    new: Sequence[int],
    spans: Sequence[tuple[list[int], list[int]]],
) -> tuple[Tensor, Tensor]:
    """A tag of a tensor of an old shape, expanded to the axes that a view brings together with
    those on which it varies; and as it is in the new shape."""
    full, sizes = list(tag.shape), list[int]()
    for sources, targets in spans:
        varies = any(tag.shape[a] > 1 for a in sources)
        for axis in sources:
            full[axis] = old[axis] if varies else 1
        sizes += [new[a] if varies else 1 for a in targets]
    wide = tag.expand(full)
    return wide, wide.reshape(sizes)


def _spans(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The finest runs of axes of equal products, in order: (axes of old, axes of new)."""
    spans: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        sources, targets = [], []
        left = right = 1
        if i < len(old):
            sources, left, i = [i], old[i], i + 1
        if j < len(new) and not (left == 1 and new[j] > 1 and sources):
            targets, right, j = [j], new[j], j + 1
        while left != right:
            if left < right:
                sources.append(i)
                left, i = left * old[i], i + 1
            else:
                targets.append(j)
                right, j = right * new[j], j + 1
        spans.append((sources, targets))
    return spans


def filled(labels: Labels, shape: Sequence[int], axes: Iterable[int]) -> list[Tensor]:
    """Tags of axes along which one value is repeated, as often as the code asks for."""
    with labels.repeating():
        return fresh(labels, shape, axes)


def fresh(labels: Labels, shape: Sequence[int], axes: Iterable[int]) -> list[Tensor]:
    """Tags with labels of their own, one for each of some axes."""
    return [
        labels.new(shape[axis]).reshape([n if a == axis else 1 for a, n in enumerate(shape)])
        for axis in axes
        if shape[axis] > 1
    ]


def expanded(labels: Labels, value: Value, shape: Sequence[int]) -> Value:
    """The value repeated along axes of size 1, and along new leading ones."""
    wide = value.widened(len(shape))
    new = filled(labels, shape, [a for a, size in enumerate(wide.shape) if size == 1])
    return replace(wide, shape=tuple(shape), tags=(*wide.tags, *new))


def indexed(value: Value, axis: int, index: Tensor) -> Value:
    """The value at some indices of one axis."""
    axis %= value.dim
    tags = (t.index_select(axis, index) if t.shape[axis] > 1 else t for t in value.tags)
    shape = (*value.shape[:axis], len(index), *value.shape[axis + 1 :])
    kept = (collapsed(tag) for tag in tags)
    return replace(value, shape=shape, tags=tuple(tag for tag in kept if axes_of(tag)))


def selected(value: Value, axis: int, index: int) -> Value:
    """The value at one index of one axis, without the axis."""
    axis %= value.dim
    one = indexed(value, axis, torch.tensor([index % value.shape[axis]]))
    tags = tuple(tag.squeeze(axis) for tag in one.tags)
    shape = (*one.shape[:axis], *one.shape[axis + 1 :])
    return replace(one, shape=shape, tags=tags)


def parted(labels: Labels, value: Value, axis: int, sizes: Sequence[int]) -> tuple[Value, ...]:
    """The value cut along an axis. Equal parts stay equal: their n-th indices go together."""
    axis %= value.dim
    tag = value.on(axis)
    if tag is not None and len(sizes) > 1 and len(set(sizes)) == 1:
        first, *others = tag.split(sizes[0], axis)
        for other in others:
            labels.join(first, other)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(
        indexed(value, axis, torch.arange(start, start + size))
        for start, size in zip(starts, sizes, strict=True)
    )


def joined(labels: Labels, values: Sequence[Value], axis: int, why: str) -> Value:
    """Values laid end to end along an axis. Along the others they meet as in a pointwise result."""
    axis %= values[0].dim
    shape = list(values[0].shape)
    shape[axis] = sum(v.shape[axis] for v in values)
    kept = [_beside(labels, v, values, axis, why) for v in values]
    along = {a for tags in kept for t in tags if t.shape[axis] > 1 for a in axes_of(t)}
    parts, others = [], []
    for v, tags in zip(values, kept, strict=True):
        inside = sorted((t for t in tags if along & {*axes_of(t)}), key=lambda t: axes_of(t)[0])
        others += [t for t in tags if not along & {*axes_of(t)}]
        for tag in inside[1:]:
            labels.freeze(tag, why)
        one = inside[0] if inside else torch.full((1,) * v.dim, UNLABELLED)
        parts.append(one.expand([s if a in along else 1 for a, s in enumerate(v.shape)]))
    made = labels.merged(others, why)
    if along:
        whole = collapsed(torch.cat(parts, axis))
        made.append(labels.watch(whole))
    tags = labels.merged(made, why)
    return Value(tuple(shape), tuple(tags), all(v.weight for v in values))


def _beside(
    labels: Labels, value: Value, values: Sequence[Value], axis: int, why: str
) -> list[Tensor]:
    """A value's tags as far as the others' fixed axes, but this one, leave them."""
    fixed = {a for other in values if other is not value for a in other.fixed()} - {axis}
    return [labels.bounded(tag, fixed, why) for tag in value.tags]


def met(labels: Labels, values: Sequence[Value], why: str) -> Value:
    """The pointwise result of values that broadcast together.

    An index that carries a label in one value and meets a fixed index in another cannot go.
    """
    dim = max(v.dim for v in values)
    wide = [v.widened(dim) for v in values]
    tags: list[Tensor] = []
    for v in wide:
        fixed = {a for other in wide if other is not v for a in other.fixed()}
        tags += [labels.bounded(tag, fixed, why) for tag in v.tags]
    shape = tuple(max(sizes) for sizes in zip(*(v.shape for v in wide), strict=True))
    return Value(shape, tuple(labels.merged(tags, why)), all(v.weight for v in wide))


def reduced_to_one(value: Value, tags: Sequence[Tensor], axes: Sequence[int]) -> Value:
    """Reduced to size 1 along some axes, where the tags do not vary any more."""
    shape = tuple(1 if a in axes else s for a, s in enumerate(value.shape))
    return Value(shape, tuple(tags), value.weight)


def turned(value: Value) -> Value:
    order = [*range(value.dim)]
    order[-2:] = order[-1], order[-2]
    return value.permuted(order)


def sizes_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor of the graph, `UNKNOWN` where values decide."""
    return tuple(size if type(size) is int else UNKNOWN for size in tensor.shape)


def squeezed(x: Value, axes: Sequence[int]) -> Value:
    for axis in sorted(axes, reverse=True):
        x = selected(x, axis, 0)
    return x
