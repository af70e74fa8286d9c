"""Eight-bit floating weights and the scales beside them: a weight is a code times its scale.

Codes of different blocks cannot be compared, so everything that ranks weights takes their values.
A scale is told by what it is: a floating tensor on the weight's own module, nowhere negative, whose
shape gives one number to the whole weight, or to each of its rows or blocks. Masks are of codes: a
masked code is zero, whatever its scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchprune.errors import SpecError


def is_coded(weight: Tensor) -> bool:
    """Whether a weight is of an eight-bit floating dtype."""
    return weight.is_floating_point() and weight.element_size() == 1


@dataclass(frozen=True, eq=False)
class Scale:
    """A weight's scale: its name on the module, and how many weights along each axis share one."""

    name: str
    tensor: Tensor
    spans: tuple[int, ...]

    def over(self, shape: Sequence[int]) -> Tensor:
        """The scale of every single weight, float32, or one that broadcasts to them."""
        scale = self.tensor.detach().float()
        scale = scale.reshape(*scale.shape, *[1] * (len(shape) - scale.dim()))
        for axis, (span, size) in enumerate(zip(self.spans, shape, strict=True)):
            if scale.shape[axis] > 1 and span > 1:
                scale = scale.repeat_interleave(span, axis).narrow(axis, 0, size)
        return scale


def values_of(module: nn.Module, tensor: str, weight: Tensor) -> Tensor:
    """A weight's values: itself, or what eight-bit codes stand for, as float32."""
    if not is_coded(weight):
        return weight
    scale = scale_of(module, tensor, weight)
    return weight.float() if scale is None else weight.float() * scale.over(weight.shape)


def scale_of(module: nn.Module, tensor: str, weight: Tensor) -> Scale | None:
    """The scale of an eight-bit weight, None if there is none beside it; of others, None.

    Raises:
        SpecError: more than one tensor could be it.
    """
    found = list(_candidates(module, tensor, weight)) if is_coded(weight) else []
    if len(found) > 1:  # scales of inputs stand there too: take what is called after the weight
        found = [scale for scale in found if scale.name.startswith(tensor)] or found
    if len(found) > 1:  # one number for all changes no order inside a layer, so finer ones tell
        found = [scale for scale in found if scale.tensor.numel() > 1] or found
    if len(found) > 1:
        which = ", ".join(f"{s.name} over {'x'.join(map(str, s.spans))}" for s in found)
        raise SpecError(
            f"its {tensor} is {weight.dtype}, and more than one scale fits: {which}; give the "
            "module a block_size, or dequantize it first"
        )
    return found[0] if found else None


def scales_of(module: nn.Module) -> set[int]:
    """The ids of the tensors of a module that could be scales of its own eight-bit weights."""
    own = [(name, p) for name, p in module._parameters.items() if p is not None]
    if parametrize.is_parametrized(module):  # masked ones stand elsewhere
        chains = cast(nn.ModuleDict, module.parametrizations).items()
        own += [(name, p) for name, chain in chains for p in chain.parameters(recurse=False)]
    coded = [(name, p) for name, p in own if is_coded(p)]
    return {id(s.tensor) for name, p in coded for s in _candidates(module, name, p)}


def _candidates(module: nn.Module, tensor: str, weight: Tensor) -> Iterator[Scale]:
    for table in (module._parameters, module._buffers):
        for name, other in table.items():
            if name in (tensor, "bias") or other is None or not other.is_floating_point():
                continue
            if other.is_meta or other.numel() == 0 or other.numel() >= max(2, weight.numel()):
                continue
            spans = _spans(module, other.shape, weight.shape)
            values = other.detach().float()
            if spans and bool((values > 0).any()) and not bool((values < 0).any()):
                yield from (Scale(name, other, each) for each in spans)


def _spans(module: nn.Module, scale: Sequence[int], weight: Sequence[int]) -> list[tuple[int, ...]]:
    """How many weights along each axis may share a scale of this shape.

    The last block of an axis may be short, so that its length does not follow from the shapes: the
    module says it (a pair of numbers that fits, such as `block_size`), or blocks divide the axes,
    or are as long as they are wide.
    """
    if set(scale) <= {1}:
        return [tuple(weight)]
    if len(scale) != len(weight):
        leading = list(scale) == list(weight[: len(scale)])
        return [(*[1] * len(scale), *weight[len(scale) :])] if leading else []
    exact = [size // n if size % n == 0 else 0 for size, n in zip(weight, scale, strict=True)]
    said = [(*exact[:-2], *pair) for pair in _pairs(module)]
    even = [tuple(exact), *((*exact[:-2], span, span) for span in exact[-2:])]
    for choices in (said, even):
        fitting = [spans for spans in choices if all(spans) and _cover(spans, scale, weight)]
        if fitting:
            return list(dict.fromkeys(fitting))
    return []


def _pairs(module: nn.Module) -> Iterator[tuple[int, int]]:
    """Pairs of numbers that a module has as attributes."""
    for value in vars(module).values():
        if isinstance(value, tuple | list) and len(value) == 2:
            rows, cols = value
            if type(rows) is int and type(cols) is int and rows > 0 and cols > 0:
                yield rows, cols


def _cover(spans: Sequence[int], counts: Sequence[int], sizes: Sequence[int]) -> bool:
    return all(-(-size // span) == n for span, n, size in zip(spans, counts, sizes, strict=True))
