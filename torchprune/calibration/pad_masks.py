"""Which tensors of a batch say where its padding is, and which tensors hold what they mask.

A mask is found by its values: zeros and ones (or a bias of zeros and large negative numbers) of a
shape that other tensors of the batch begin with. What more than one tensor could be, or could be
read in two ways, is decided by trying; see `probe`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchprune.calibration.batches import Batch
from torchprune.calibration.nested import Path, tensors_in

_SHUT = -1e3
"""A bias on attention scores at or below which nothing is attended."""

_IGNORED = -100
"""The label that torch's losses leave out unless told otherwise."""


@dataclass(frozen=True, eq=False)
class Leaf:
    """A tensor of a batch, how its caller names it, and its place in the model's own order."""

    path: Path
    name: str
    order: int
    tensor: Tensor


@dataclass(frozen=True, eq=False)
class Content:
    """A tensor that holds a masked sequence: how its axes are laid out beside the mask's.

    Attributes:
        layout: "items first", "length first", "flat" (items and length are one axis), "pixels"
            (the last two axes are the length) or "stretched" (an axis as long as the mask, or one
            that it must be stretched to).
        axis: of the length, where "stretched".
    """

    leaf: Leaf
    layout: str
    axis: int = 1


@dataclass(frozen=True, eq=False)
class PadMask:
    """One reading of one tensor as a mask of padding.

    Attributes:
        path: of the tensor, () where the user gave the mask himself.
        inverted: whether its ones are the padding.
        tokens: (items, length) bool, False at padding.
        contents: the tensors that hold what it masks, the first one above all.
    """

    path: Path
    name: str
    inverted: bool
    tokens: Tensor
    contents: Sequence[Content] = ()

    @property
    def key(self) -> tuple[Path, bool]:
        """What makes it the same mask in another batch."""
        return self.path, self.inverted

    @property
    def is_plain(self) -> bool:
        """Whether it is called a mask, its zeros are the padding, and lie as padding does."""
        return self.is_named and not self.inverted and self.is_padding

    @property
    def is_named(self) -> bool:
        """Whether the caller calls it a mask."""
        return "mask" in self.name.lower()

    @property
    def is_padding(self) -> bool:
        """Whether in every item the tokens are one run that begins or ends with the item; of pixels
        there are many runs."""
        return any(c.layout == "pixels" for c in self.contents) or _is_padding(self.tokens)


def leaves_of(batch: Batch, forward: Callable[..., Any]) -> list[Leaf]:
    """The tensors of a batch."""
    try:
        names = list(inspect.signature(forward).parameters)
    except (TypeError, ValueError):
        names = []
    found: list[Leaf] = []
    for path, tensor in tensors_in((batch.args, batch.kwargs)):
        kind, first, *inner = path
        spoken = [key for key in (first, *inner) if isinstance(key, str)]
        if kind == 0 and not inner and first < len(names):
            spoken = [names[first]]
        name = spoken[-1] if spoken else ""
        order = names.index(name) if not inner and name in names else len(names) + len(found)
        found.append(Leaf(path, name, order, tensor))
    return sorted(found, key=lambda leaf: leaf.order)


def readings_of(leaves: Sequence[Leaf]) -> list[PadMask]:
    """Every way to read a tensor as a mask of padding, with the tensors that it would mask.

    Readings that the batch holds nothing for to be masked are left out, and those of tensors that
    nobody calls a mask, unless their zeros lie as padding does.
    """
    pixels = list(_of_pixels(leaves))
    taken = {mask.path for mask in pixels}
    found = [
        PadMask(leaf.path, leaf.name, inverted, tokens)
        for leaf in leaves
        if leaf.path not in taken
        for inverted, tokens in _readings(leaf.tensor)
        if "mask" in leaf.name.lower() or (bool(tokens.any()) and _is_padding(tokens))
    ]
    named = taken | {mask.path for mask in found if mask.is_named}
    kept = []
    for mask in found:
        others = [leaf for leaf in leaves if leaf.path != mask.path and leaf.path not in named]
        whole = with_contents(mask, others, found)
        if not whole.contents and mask.is_named:
            whole = _of_the_last(mask, others)
        if whole.contents or (whole.is_plain and not bool(whole.tokens.all())):
            kept.append(whole)
    return [*kept, *pixels, *_ignored(leaves)]


def _of_pixels(leaves: Sequence[Leaf]) -> Iterator[PadMask]:
    """Masks (..., height, width) of images (..., channels, height, width)."""
    for leaf in (leaf for leaf in leaves if "mask" in leaf.name.lower()):
        *lead, height, width = (0, 0, *leaf.tensor.shape)[-max(2, leaf.tensor.dim()) :]
        wanted = tuple(lead), (height, width)
        for other in leaves:
            shape = tuple(other.tensor.shape)
            of_images = other.tensor.is_floating_point() and len(shape) == len(lead) + 3
            if lead and of_images and (shape[:-3], shape[-2:]) == wanted:
                for inverted, seen in _opened(leaf.tensor):
                    tokens = seen.reshape(-1, height * width)
                    if not inverted and _is_frame(seen.reshape(-1, height, width)):
                        content = Content(other, "pixels")
                        yield PadMask(leaf.path, leaf.name, False, tokens, (content,))
                break


def _ignored(leaves: Sequence[Leaf]) -> Iterator[PadMask]:
    """Labels that no loss counts, for models that make a decoder's input of labels."""
    for leaf in leaves:
        x = leaf.tensor
        if x.dim() == 2 and x.dtype == torch.int64 and bool((x < 0).any()):
            tokens = x != _IGNORED
            if bool((x.clamp_max(0) == torch.where(tokens, 0, x)).all()):
                content = Content(leaf, "items first")
                yield PadMask(leaf.path, leaf.name, False, tokens, (content,))


def with_contents(mask: PadMask, leaves: Sequence[Leaf], rivals: Sequence[PadMask] = ()) -> PadMask:
    """A mask and the tensors whose padding it marks.

    Args:
        leaves: those that may be.
        rivals: other masks, which may have more of a claim to a tensor by its name.
    """
    near = [leaf for leaf in leaves if leaf.path[1:-1] == mask.path[1:-1]]  # one container
    for some in (near, leaves) if mask.path else (leaves,):
        fitting = _fitting(mask.tokens, some)
        mine = [
            c
            for c in fitting
            if not any(
                _alike(r.name, c.leaf.name) > _alike(mask.name, c.leaf.name)
                for r in rivals
                if r.path != mask.path
            )
        ]
        mine.sort(key=lambda c: (-_alike(mask.name, c.leaf.name), c.leaf.order))
        if chosen := _chosen(mine):
            items = chosen[0].leaf.tensor.shape[0]
            tokens = mask.tokens
            if len(tokens) == 1 < items and chosen[0].layout == "items first":
                tokens = tokens.expand(items, -1)
            return replace(mask, contents=chosen, tokens=tokens)
    return mask


def _of_the_last(mask: PadMask, leaves: Sequence[Leaf]) -> PadMask:
    """A mask of what a cache holds too, cut to what the batch holds: the last positions."""
    items, length = mask.tokens.shape
    for leaf in leaves:
        shape = leaf.tensor.shape
        if len(shape) > 1 and shape[0] == items and shape[1] < length:
            last = replace(mask, tokens=mask.tokens[:, -shape[1] :])
            return last if bool(last.tokens.all()) else with_contents(last, leaves)
    return mask


def _readings(tensor: Tensor) -> Iterator[tuple[bool, Tensor]]:
    """(whether ones are padding, (items, length) bool tokens) for what a tensor may mean."""
    if not 2 <= tensor.dim() <= 4 or tensor.shape[-1] < 2 or not tensor.numel():
        return
    for inverted, one in _opened(tensor):
        tokens = one if one.dim() == 2 else one.flatten(1, -2).any(1)
        if not bool(tokens.all()):
            yield inverted, tokens


def _opened(tensor: Tensor) -> list[tuple[bool, Tensor]]:
    """(whether ones are masked, where nothing is) for what a tensor may mean."""
    if tensor.dtype == torch.bool:
        return [(False, tensor), (True, ~tensor)]
    if tensor.dtype.is_complex or not tensor.numel():
        return []
    if bool(((tensor == 0) | (tensor == 1)).all()):
        return [(False, tensor != 0)]
    if tensor.is_floating_point() and bool(((tensor == 0) | (tensor <= _SHUT)).all()):
        return [(False, tensor == 0)]
    return []


def _is_padding(tokens: Tensor) -> bool:
    """Whether every item's tokens are one run that begins or ends with the item."""
    return bool((tokens.int().diff(dim=1).ne(0).sum(1) <= 1).all())


def _is_frame(images: Tensor) -> bool:
    """Whether every (height, width) is one rectangle in a corner, and not all of it in each."""
    down, across = images.any(2), images.any(1)
    whole = bool((images == down[:, :, None] & across[:, None, :]).all())
    return whole and _is_padding(down) and _is_padding(across) and not bool(images.all())


def _fitting(tokens: Tensor, leaves: Sequence[Leaf]) -> list[Content]:
    """The tensors of the first layout that any has."""
    items, length = tokens.shape
    able = [x for x in leaves if x.tensor.dtype != torch.bool and not x.tensor.is_complex()]
    shapes = [(leaf, tuple(leaf.tensor.shape)) for leaf in able]
    if same := [Content(x, "items first") for x, s in shapes if s[:2] == (items, length)]:
        return same
    if turned := [Content(x, "length first") for x, s in shapes if s[:2] == (length, items)]:
        return turned
    if flat := [Content(x, "flat") for x, s in shapes if s and s[0] == items * length]:
        return flat
    if items == 1 and (
        wide := [Content(x, "items first") for x, s in shapes if len(s) > 1 and s[1] == length]
    ):
        return wide
    floats = [(x, s) for x, s in shapes if x.tensor.is_floating_point()]
    if inner := [
        Content(x, "stretched", s.index(length, 1))
        for x, s in floats
        if s and s[0] == items and length in s[1:]
    ]:
        return inner
    return [
        Content(x, "stretched", max(range(1, len(s)), key=s.__getitem__))
        for x, s in floats
        if len(s) > 1 and s[0] == items
    ]


def _chosen(contents: Sequence[Content]) -> list[Content]:
    """The first tensor of numbers that stand for something, and the first of each kind of vectors.

    Other integers (positions, kinds, labels, another sequence of that length) only add to what the
    first ones stand for, or are no business of this mask.
    """
    whole = [c for c in contents if not c.leaf.tensor.is_floating_point()][:1]
    vectors: dict[tuple[int, ...], Content] = {}
    for content in contents:
        if content.leaf.tensor.is_floating_point():
            vectors.setdefault(tuple(content.leaf.tensor.shape[2:]), content)
    return [*whole, *vectors.values()]


def _alike(one: str, two: str) -> int:
    """How many words two names begin with together."""
    count = 0
    for a, b in zip(one.split("_"), two.split("_"), strict=False):
        if a != b:
            break
        count += 1
    return count


# -- other content ---------------------------------------------------------------------------------


def opened(x: Tensor, mask: PadMask) -> Tensor:
    """A mask that masks nothing, of two axes as it was."""
    return (
        torch.zeros_like(x)
        if mask.inverted or (x.is_floating_point() and bool((x < 0).any()))
        else torch.ones_like(x)
    )


def changed(x: Tensor, mask: PadMask, content: Content, variant: int) -> Tensor:
    """A tensor with other content at its padding: what it holds at tokens.

    Args:
        variant: which of several choices.
    """
    x = x.detach().clone()
    items, length = mask.tokens.shape
    seen = x  # a view with the mask's two axes first
    pads = ~mask.tokens.to(x.device)
    if content.layout == "length first":
        seen = x.movedim(0, 1)
    elif content.layout == "flat":
        seen = x.view(items, length, *x.shape[1:])
    elif content.layout == "pixels":
        seen = x.view(items, -1, length).movedim(2, 1)
    elif content.layout == "stretched":
        seen = x.movedim(content.axis, 1)
        place = torch.arange(seen.shape[1], device=x.device) * length // seen.shape[1]
        pads = pads[:, place]
    old = seen[pads]
    seen[pads] = _other(old, seen[~pads], variant)
    return x


def _other(old: Tensor, pool: Tensor, variant: int) -> Tensor:
    """(pads, ...) values that differ from the old ones, from a pool of (tokens, ...)."""
    generator = torch.Generator().manual_seed(variant)
    whole = not old.is_floating_point()
    if whole and pool.dim() == 1:
        pool = _seldom(pool, variant)
    if not len(pool):
        pool = old
    shape, device = old.shape, old.device
    old, pool = old.reshape(len(old), -1), pool.reshape(len(pool), -1)
    new = old.clone()
    same = torch.ones(len(old), dtype=torch.bool, device=device)
    for _ in range(8):
        pick = torch.randint(len(pool), (len(old),), generator=generator).to(device)
        new = torch.where(same[:, None], pool[pick], new)
        same = (new == old).all(1)
        if not bool(same.any()):
            return new.reshape(shape)
    if whole:
        moved = torch.where(old > 0, old - 1, old + 1)
    else:
        noise = torch.randn(old.shape, generator=generator).to(device)
        moved = (old + noise * old.float().std(correction=0).clamp_min(1e-2)).to(old.dtype)
    return torch.where(same[:, None], moved, new).reshape(shape)


def _seldom(ids: Tensor, variant: int) -> Tensor:
    """Of token ids those that occur least: what occurs often may stand for a part of an image, or
    for the end of a text, which a model counts. A later variant takes one id alone."""
    counted = torch.unique(ids[ids >= 0], return_counts=True)
    values: Tensor = counted[0]
    if not len(values) or not variant:
        return values[counted[1] == counted[1].amin()] if len(values) else values
    values = values[counted[1].argsort(stable=True)]
    place = (variant * 7919) % len(values)
    return values[place : place + 1]
