"""Products of an input with a weight, as torch's functions are called: what each of them reads.

A reader knows one function. Given a call of it, it says which operand is a weight (whoever watches
decides that), what the axes of that operand stand for, and which rows of the other operand it
multiplies. Functions are told apart by what they are, under every name torch has for them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchprune.calibration.equations import Terms, letters_of, terms_of
from torchprune.masking.matrices import Taps, patches
from torchprune.masking.parts import Axis, Part, Role

IsWeight = Callable[[Any], bool]
"""Whether an operand is (a part of) a parameter that is watched."""


@dataclass(frozen=True, eq=False)
class Product:
    """One product of an input with (a part of) a weight.

    Attributes:
        weight: the operand that is a weight, as the function gets it.
        part: its axes; the offset is the operand's own place in its storage.
        x: the other operand, or None where no other product can read the same.
        rows: of x, one (rows, cols) matrix for each of the part's groups.
        geometry: what makes two products read the same x as the same matrices.
    """

    weight: Tensor
    part: Part
    x: Tensor | None
    rows: Callable[[], list[Tensor]]
    geometry: Hashable


Reader = Callable[[tuple[Any, ...], Mapping[str, Any], IsWeight], "Iterator[Product]"]

_MOST_IN_BAGS = 1 << 27
"""Numbers that say how often each row of a table is in each bag."""

_ROLES: dict[str, Role] = {"g": "group", "r": "row", "c": "col"}


def part_of(weight: Tensor, roles: str) -> Part:
    """A tensor's axes, which are (g)roups, (r)ows or (c)olumns."""
    axes = zip(weight.shape, weight.stride(), roles, strict=True)
    return Part(
        int(weight.storage_offset()), tuple(Axis(n, step, _ROLES[r]) for n, step, r in axes)
    )


def _argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str, default: Any = None
) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


# -- matrices ----------------------------------------------------------------------------------


def _linear(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], is_weight: IsWeight
) -> Iterator[Product]:
    x, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
    if is_weight(weight) and x is not weight:
        roles = "rc" if weight.dim() == 2 else "c"
        yield Product(weight, part_of(weight, roles), x, lambda: [_flat(x)], "rows")


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _matmul(first: int, names: tuple[str, str]) -> Reader:
    """A reader of the product of the arguments at two places, one after the other."""

    def read(
        args: tuple[Any, ...], kwargs: Mapping[str, Any], is_weight: IsWeight
    ) -> Iterator[Product]:
        a = _argument(args, kwargs, first, names[0])
        b = _argument(args, kwargs, first + 1, names[1])
        yield from _product(a, b, is_weight)

    return read


def _swapped(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], is_weight: IsWeight
) -> Iterator[Product]:
    yield from _product(args[1], args[0], is_weight)


def _product(a: Any, b: Any, is_weight: IsWeight) -> Iterator[Product]:
    """What torch.matmul(a, b) reads."""
    if is_weight(b) and not is_weight(a):
        weight, x = b, a
        roles = "c" if b.dim() == 1 else "g" * (b.dim() - 2) + "cr"
    elif is_weight(a) and not is_weight(b):
        weight, x = a, b if b.dim() == 1 else b.mT
        roles = "c" if a.dim() == 1 else "g" * (a.dim() - 2) + "rc"
    else:
        return
    batch = tuple(weight.shape[:-2])
    turned = "rows" if weight is b or b.dim() == 1 else "columns"
    yield Product(
        weight,
        part_of(weight, roles),
        a if weight is b else b,
        lambda: _batched(x, batch),
        turned if not batch else (turned, batch),
    )


def _batched(x: Tensor, batch: Sequence[int]) -> list[Tensor]:
    """The rows of x (..., m, k) that each matrix of a stack of this batch shape multiplies."""
    if x.dim() == 1:
        x = x.unsqueeze(0)
    if not batch:
        return [_flat(x)]
    whole = torch.broadcast_shapes(x.shape[:-2], batch)
    x = x.expand(*whole, *x.shape[-2:])
    lead = len(whole) - len(batch)
    groups = [lead + i for i, size in enumerate(batch) if size > 1]
    rest = [a for a in range(len(whole)) if a not in groups]
    x = x.permute(*groups, *rest, len(whole), len(whole) + 1)
    return list(x.reshape(prod(batch), -1, x.shape[-1]).unbind(0))


def _grouped(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], is_weight: IsWeight
) -> Iterator[Product]:
    """Rows of one matrix sorted by the matrix of a stack that multiplies them."""
    x, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "mat2")
    weight = kwargs.get("mat_b", weight)
    x = kwargs.get("mat_a", x)
    ends = kwargs.get("offs", args[2] if len(args) > 2 else None)
    if not (is_weight(weight) and not is_weight(x) and weight.dim() == 3):
        return
    if x.dim() == 3:
        yield from _product(x, weight, is_weight)
    elif isinstance(ends, Tensor):

        def rows() -> list[Tensor]:
            stops = ends.tolist()
            starts = [0, *stops[:-1]]
            return [x[a:b] for a, b in zip(starts, stops, strict=True)]

        yield Product(weight, part_of(weight, "gcr"), None, rows, "grouped")


# -- equations ---------------------------------------------------------------------------------


def _einsum(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], is_weight: IsWeight
) -> Iterator[Product]:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return
    yield from _by_terms(terms_of(equation, [o.dim() for o in operands]), operands, is_weight)


def _tensordot(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], is_weight: IsWeight
) -> Iterator[Product]:
    a, b = _argument(args, kwargs, 0, "a"), _argument(args, kwargs, 1, "b")
    dims = _argument(args, kwargs, 2, "dims", 2)
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    if isinstance(dims, int):
        dims = (list(range(a.dim() - dims, a.dim())), list(range(dims)))
    yield from _by_terms(letters_of(a.dim(), b.dim(), dims), [a, b], is_weight)


def _by_terms(
    terms: Terms | None, operands: Sequence[Tensor], is_weight: IsWeight
) -> Iterator[Product]:
    which = [is_weight(o) for o in operands]
    if terms is None or sum(which) != 1:
        return
    at = which.index(True)
    weight, x = operands[at], operands[1 - at]
    mine, theirs, out = terms.inputs[at], terms.inputs[1 - at], terms.output
    roles = "".join(("g" if letter in out else "c") if letter in theirs else "r" for letter in mine)
    groups = [letter for letter, role in zip(mine, roles, strict=True) if role == "g"]
    cols = [letter for letter, role in zip(mine, roles, strict=True) if role == "c"]
    if not cols:
        return
    size = dict(zip(mine, weight.shape, strict=True))
    rest = [letter for letter in theirs if letter not in size]
    order = [theirs.index(letter) for letter in (*groups, *rest, *cols)]

    def rows() -> list[Tensor]:
        sizes = [size.get(letter, x.shape[i]) for i, letter in enumerate(theirs)]
        full = x.expand(sizes).permute(order)
        count, width = prod(size[g] for g in groups), prod(size[c] for c in cols)
        return list(full.reshape(count, -1, width).unbind(0))

    yield Product(weight, part_of(weight, roles), x, rows, (theirs, tuple(order), tuple(groups)))


# -- convolutions --------------------------------------------------------------------------------


def _convolution(space: int) -> Reader:
    def read(
        args: tuple[Any, ...], kwargs: Mapping[str, Any], is_weight: IsWeight
    ) -> Iterator[Product]:
        x, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
        if not is_weight(weight) or x is weight:
            return
        stride = _each(_argument(args, kwargs, 3, "stride", 1), space)
        padding = _argument(args, kwargs, 4, "padding", 0)
        dilation = _each(_argument(args, kwargs, 5, "dilation", 1), space)
        groups = int(_argument(args, kwargs, 6, "groups", 1))
        taps = Taps(tuple(weight.shape[2:]), stride, dilation)
        sides = _padding(padding, taps)

        def rows() -> list[Tensor]:
            batched = x.unsqueeze(0) if x.dim() == space + 1 else x
            return patches(F.pad(batched, sides), taps, groups)

        yield Product(weight, _kernel(weight, groups), x, rows, (taps, tuple(sides), groups))

    return read


def _kernel(weight: Tensor, groups: int) -> Part:
    """A kernel (out, in / groups, *taps): its columns are the taps, and at each the inputs."""
    (out, inner, *taps), (far, near, *steps) = weight.shape, weight.stride()
    axes = (
        Axis(groups, far * (out // groups), "group"),
        Axis(out // groups, far, "row"),
        *(Axis(n, step, "col") for n, step in zip(taps, steps, strict=True)),
        Axis(inner, near, "col"),
    )
    return Part(int(weight.storage_offset()), axes, inner)


def _transposed(space: int) -> Reader:
    def read(
        args: tuple[Any, ...], kwargs: Mapping[str, Any], is_weight: IsWeight
    ) -> Iterator[Product]:
        x, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
        if not is_weight(weight) or x is weight:
            return
        groups = int(_argument(args, kwargs, 6, "groups", 1))
        (inner, out, *taps), (far, near, *steps) = weight.shape, weight.stride()
        axes = (
            Axis(groups, far * (inner // groups), "group"),
            Axis(out, near, "row"),
            *(Axis(n, step, "row") for n, step in zip(taps, steps, strict=True)),
            Axis(inner // groups, far, "col"),
        )

        def rows() -> list[Tensor]:
            batched = x.unsqueeze(0) if x.dim() == space + 1 else x
            each = batched.unflatten(1, (groups, inner // groups)).movedim(2, -1).movedim(1, 0)
            return list(each.reshape(groups, -1, inner // groups).unbind(0))

        part = Part(int(weight.storage_offset()), axes)
        yield Product(weight, part, x, rows, ("positions", groups))

    return read


def _each(value: Any, space: int) -> tuple[int, ...]:
    return (
        tuple(value)
        if isinstance(value, list | tuple) and len(value) > 1
        else ((int(value[0]) if isinstance(value, list | tuple) else int(value),) * space)
    )


def _padding(padding: Any, taps: Taps) -> list[int]:
    """As F.pad wants it: both sides of each axis, the last axis first."""
    space = len(taps.kernel)
    if padding == "valid":
        padding = 0
    sides: list[tuple[int, int]]
    if padding == "same":  # as torch does it: what is odd goes to the end
        total = [d * (k - 1) for d, k in zip(taps.dilation, taps.kernel, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in _each(padding, space)]
    return [side for both in reversed(sides) for side in both]


# -- others --------------------------------------------------------------------------------------


def _bilinear(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], is_weight: IsWeight
) -> Iterator[Product]:
    """y_o = a^T W_o b: the inputs are the products of every number of a with every one of b."""
    a, b = _argument(args, kwargs, 0, "input1"), _argument(args, kwargs, 1, "input2")
    weight = _argument(args, kwargs, 2, "weight")
    if is_weight(weight) and not is_weight(a) and not is_weight(b):

        def rows() -> list[Tensor]:
            return [(_flat(a).unsqueeze(2) * _flat(b).unsqueeze(1)).flatten(1)]

        yield Product(weight, part_of(weight, "rcc"), None, rows, "bilinear")


def _bags(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], is_weight: IsWeight
) -> Iterator[Product]:
    """Sums or means of a table's rows: the inputs say how often each row is in a bag."""
    names = ("weight", "indices", "offsets", "scale_grad_by_freq", "mode", "sparse")
    named = dict(
        zip(
            (*names, "per_sample_weights", "include_last_offset", "padding_idx"), args, strict=False
        )
    )
    named |= kwargs
    weight, indices, offsets = (named[name] for name in names[:3])
    mode, last = named.get("mode", 0), named.get("include_last_offset", False)
    count = len(offsets) - bool(last)
    if not is_weight(weight) or mode == 2 or count * len(weight) > _MOST_IN_BAGS:
        return  # a maximum is no product

    def rows() -> list[Tensor]:
        ends = offsets[1:] if last else torch.cat([offsets[1:], offsets.new_tensor([len(indices)])])
        sizes = ends - offsets[:count]
        bag = torch.arange(count, device=indices.device).repeat_interleave(sizes)
        share = named.get("per_sample_weights")
        share = weight.new_ones(len(indices)) if share is None else share
        if (pad := named.get("padding_idx")) is not None and pad >= 0:
            share = share * (indices != pad)
        hot = weight.new_zeros(count, len(weight))
        hot.index_put_((bag, indices), share.to(hot.dtype), accumulate=True)
        if mode == 1:
            own = weight.new_zeros(count).index_add_(0, bag, (share != 0).to(weight.dtype))
            hot /= own.clamp_min(1).unsqueeze(1)
        return [hot]

    yield Product(weight, part_of(weight, "cr"), None, rows, "bags")


def _readers() -> dict[Any, Reader]:
    """Every callable torch offers for these products."""
    named: dict[str, Reader] = {
        "linear": _linear,
        "matmul": _matmul(0, ("input", "other")),
        "__matmul__": _matmul(0, ("input", "other")),
        "__rmatmul__": _swapped,
        "mm": _matmul(0, ("input", "mat2")),
        "bmm": _matmul(0, ("input", "mat2")),
        "mv": _matmul(0, ("input", "vec")),
        "addmm": _matmul(1, ("mat1", "mat2")),
        "addmm_": _matmul(1, ("mat1", "mat2")),
        "addbmm": _matmul(1, ("batch1", "batch2")),
        "baddbmm": _matmul(1, ("batch1", "batch2")),
        "baddbmm_": _matmul(1, ("batch1", "batch2")),
        "addmv": _matmul(1, ("mat", "vec")),
        "einsum": _einsum,
        "tensordot": _tensordot,
        "bilinear": _bilinear,
        "embedding_bag": _bags,
        "grouped_mm": _grouped,
        "_grouped_mm": _grouped,
        **{f"conv{space}d": _convolution(space) for space in (1, 2, 3)},
        **{f"conv_transpose{space}d": _transposed(space) for space in (1, 2, 3)},
    }
    owners = (torch, F, torch.Tensor, torch._C._nn, torch._C._VariableFunctions)
    return {
        getattr(owner, name): reader
        for name, reader in named.items()
        for owner in owners
        if hasattr(owner, name) and not (owner is F and name == "embedding_bag")
    }  # that one is Python, and calls torch's


READERS = _readers()
"""What reads a weight, by torch's function."""
