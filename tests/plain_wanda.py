"""Wanda by a plain loop that shares nothing with the library: the oracle of the families.

A dispatch mode sees every product of a forward. Which elements of which parameter an operand holds
is followed by tensors of element numbers, also through views and copies; so it does not matter what
module a weight belongs to, or whether that module is called. What a weight is multiplied by, and so
its sum of squares, is the derivative of the product of squared inputs by that weight.

In layer mode each layer is pruned on what it reads when all earlier ones are pruned: that is what
it reads in the finished model. In block mode a block's layers are pruned on what they read in the
block's first dense run, after the blocks before it were pruned. A weight that a forward reads more
than once is pruned at the first of its uses, on what all of them read in the dense model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

_COPIES = {
    "clone", "_to_copy", "contiguous", "index", "index_select", "gather", "cat", "stack",
    "_unsafe_view", "_reshape_copy", "constant_pad_nd", "roll", "flip", "repeat", "copy",
}  # fmt: skip


@dataclass(frozen=True)
class Sums:
    """What was seen of a parameter: by element, flat in its own order.

    Attributes:
        squares: float64 sums of squares of what each weight is multiplied by.
        row: which output each weight belongs to, any number; -1 where it was never multiplied.
        place: what orders a row: memory, but for kernels, whose channels come first.
    """

    squares: Tensor
    row: Tensor
    place: Tensor


class Products(TorchDispatchMode):
    """Sums of squares of all that multiplies some parameters, while `counting`."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.counting = True
        self._known: dict[int, Tensor] = {}
        self._alive: list[Tensor] = []
        self._spans: dict[str, slice] = {}
        total = 0
        for name, parameter in parameters.items():
            span = slice(total, total + parameter.numel())
            numbers = torch.arange(span.start, span.stop)
            self._spans[name], total = span, span.stop
            storage = parameter.untyped_storage()
            self._known[storage.data_ptr()] = _whole(parameter, numbers)
        self._squares = torch.zeros(total, dtype=torch.float64)
        self._row = torch.full((total,), -1)
        self._place = torch.zeros(total, dtype=torch.long)
        self.unknown: set[str] = set()

    def new_forward(self) -> None:
        """What follows is another forward."""
        for tensor in self._alive:
            self._known.pop(tensor.untyped_storage().data_ptr(), None)
        self._alive.clear()

    def of(self, name: str) -> Sums:
        """What was seen of one parameter."""
        span = self._spans[name]
        return Sums(self._squares[span], self._row[span], self._place[span])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in _COPIES:
            self._follow(func, args, kwargs or {}, out)
        elif self.counting:
            with torch._C._DisableTorchDispatch():
                self._count(name, args, out)
        return out

    def _numbers(self, tensor: Any) -> Tensor | None:
        """The element numbers of a parameter's view or copy."""
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return None
        known = self._known.get(tensor.untyped_storage().data_ptr())
        if known is None:
            return None
        return known.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        found = [False]

        def numbered(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(numbered(v) for v in value)
            numbers = self._numbers(value)
            found[0] = found[0] or numbers is not None
            return value if numbers is None else numbers

        with torch._C._DisableTorchDispatch():
            new = numbered(args)
            if not found[0] or not isinstance(out, Tensor):
                return
            options = {k: v for k, v in kwargs.items() if k in ("memory_format", "dim")}
            copied = new[0].clone() if func._schema.name == "aten::_to_copy" else None
            if copied is None:
                copied = func(*new, **options)
            if copied.shape == out.shape and copied.dtype == torch.long:
                self._known[out.untyped_storage().data_ptr()] = _whole(out, copied)
                self._alive.append(out)

    def _count(self, name: str, args: Any, out: Any) -> None:
        if name in ("addmm", "baddbmm", "addmv"):
            args, name = args[1:], {"addmm": "mm", "baddbmm": "bmm", "addmv": "mv"}[name]
        if name in ("mm", "bmm", "mv"):
            for side in (0, 1):
                if (numbers := self._numbers(args[side])) is not None:
                    self._matrix(numbers, args[1 - side], side)
        elif name == "linear":
            if (numbers := self._numbers(args[1])) is not None:
                self._matrix(numbers.t(), args[0].reshape(-1, args[0].shape[-1]), 1)
        elif name in ("convolution", "_convolution", "mkldnn_convolution"):
            if (numbers := self._numbers(args[1])) is not None and not args[6]:
                self._convolution(numbers, args, out)
        elif name not in _NO_PRODUCTS and any(self._numbers(a) is not None for a in args):
            self.unknown.add(name)

    def _matrix(self, numbers: Tensor, other: Tensor, side: int) -> None:
        """A factor of a (batched) matrix product: `side` 1 is (in, out), 0 is (out, in)."""
        if side == 0:
            numbers = numbers.mT
            other = other.unsqueeze(0) if other.dim() == 1 else other.mT
        # numbers (..., in, out), other (..., n, in)
        squares = other.double().square().sum(-2)[..., None].expand(numbers.shape)
        rows = numbers[..., :1, :].expand(numbers.shape)
        self._add(numbers, squares, rows, numbers)  # einsum sums over axes in an order of its own

    def _convolution(self, numbers: Tensor, args: Any, out: Tensor) -> None:
        x, weight, _, stride, padding, dilation, transposed, extra, groups = args[:9]
        squares = aten.convolution_backward(
            torch.ones_like(out, dtype=torch.float64), x.double().square(), weight.double(), None,
            stride, padding, dilation, transposed, extra, groups, [False, True, False],
        )[1]  # fmt: skip
        rows = numbers.flatten(1)[:, 0].reshape(-1, *[1] * (numbers.dim() - 1))
        inputs = weight.shape[1]
        taps = torch.arange(weight[0, 0].numel()).reshape(weight.shape[2:])
        channels = torch.arange(inputs).reshape(inputs, *[1] * taps.dim())
        places = (taps * inputs + channels).expand(numbers.shape)
        self._add(numbers, squares, rows.expand(numbers.shape), places)

    def _add(self, numbers: Tensor, squares: Tensor, rows: Tensor, places: Tensor) -> None:
        at = numbers.reshape(-1)
        self._squares.index_add_(0, at, squares.reshape(-1))
        self._row[at] = rows.reshape(-1)
        self._place[at] = places.reshape(-1)


_NO_PRODUCTS = {
    "detach", "t", "transpose", "view", "slice", "select", "split", "split_with_sizes", "unbind",
    "permute", "expand", "unsqueeze", "squeeze", "alias", "embedding", "chunk", "as_strided",
    "lift_fresh", "sym_size", "is_same_size", "numel", "narrow", "unfold", "diagonal",
}  # fmt: skip


def _whole(tensor: Tensor, numbers: Tensor) -> Tensor:
    """Element numbers as flat as a tensor's storage."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    flat = torch.full((size,), -1)
    flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(
        numbers.reshape(tensor.shape)
    )
    return flat


# -- the loop -------------------------------------------------------------------------------------


class _Enough(BaseException):
    """The block that is looked at has run."""


def sums_by_layer(
    model: nn.Module, names: Sequence[str], batches: Sequence[Mapping[str, Any]]
) -> dict[str, Sums]:
    """What weights are multiplied by in a model as it is: the finished one, or the dense one for
    weights that are read more than once in a forward."""
    products = Products(_named(model, names))
    for batch in batches:
        products.new_forward()
        with torch.no_grad(), products:
            model(**copy.deepcopy(dict(batch)))
    return {name: products.of(name) for name in names}


def sums_by_block(
    dense: nn.Module,
    pruned: nn.Module,
    names: Sequence[str],
    batches: Sequence[Mapping[str, Any]],
    others: Sequence[str] = (),
) -> dict[str, Sums]:
    """What weights are multiplied by in the first run of their block, dense, after pruned ones.

    Args:
        others: weights that are pruned with their blocks, but on something else.
    """
    blocks = blocks_of(dense)
    order = _order(dense, blocks, batches)
    found = {}
    model = copy.deepcopy(dense)
    weights, final = dict(model.named_parameters()), dict(pruned.named_parameters())
    for block in order:
        inside = [n for n in names if n.startswith(f"{block}.")]
        products = Products({n: weights[n] for n in inside})
        for batch in batches:
            products.new_forward()
            inner = model.get_submodule(block)
            with torch.no_grad(), products, _only(products, inner), suppress(_Enough):
                model(**copy.deepcopy(dict(batch)))
        found.update({n: products.of(n) for n in inside})
        with torch.no_grad():
            for name in [*inside, *(n for n in others if n.startswith(f"{block}."))]:
                weights[name].copy_(final[name])
    return found


def blocks_of(model: nn.Module) -> list[str]:
    """The outermost modules of lists that are made of modules themselves, and can be called."""
    found: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{block}.") for block in found):
            continue
        children = {k: c for k, c in module.named_children() if any(c.children())}
        kinds = [type(child) for child in children.values()]
        if isinstance(module, nn.ModuleList) or (
            isinstance(module, nn.Sequential | nn.ModuleDict) and len(set(kinds)) < len(kinds)
        ):
            found += [
                f"{name}.{key}" if name else key
                for key, child in children.items()
                if not isinstance(child, nn.ModuleList | nn.ModuleDict)
                and any(p.dim() > 1 for p in child.parameters())
            ]
    return found


def _order(
    model: nn.Module, blocks: Sequence[str], batches: Sequence[Mapping[str, Any]]
) -> list[str]:
    """The blocks that run, as they do."""
    order: dict[str, None] = {}
    with ExitStack() as stack:
        for name in blocks:
            block = model.get_submodule(name)

            def noted(*args: Any, _name: str = name, _own: Any = block.forward, **kw: Any) -> Any:
                order.setdefault(_name)
                return _own(*args, **kw)

            stack.enter_context(_forward(block, noted))
        for batch in batches:
            with torch.no_grad():
                model(**copy.deepcopy(dict(batch)))
    return list(order)


@contextmanager
def _only(products: Products, block: nn.Module) -> Iterator[None]:
    """Count in a block's first call, then end the forward with `_Enough`."""
    own = block.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        products.counting = True
        own(*args, **kwargs)
        raise _Enough

    products.counting = False
    with _forward(block, counted):
        yield
    products.counting = False


@contextmanager
def _forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    module.forward = function
    try:
        yield
    finally:
        del module.forward


def _named(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    own = dict(model.named_parameters(remove_duplicate=False))
    return {name: own[name] for name in names}


# -- the verdict ----------------------------------------------------------------------------------


def difference(weight: Tensor, mask: Tensor, sums: Sums, pattern: tuple[int, int] | float) -> str:
    """How a mask differs from Wanda's, where scores do not tie within rounding; empty if not.

    Args:
        weight: as it was.
        mask: True where kept.
        pattern: (n, m), or the share of each row to prune.
    """
    if bool((sums.row < 0).all()):
        return "never multiplied"
    reached = sums.row >= 0
    if not bool(reached.all()):
        return f"{int((~reached).sum())} of {mask.numel()} weights never multiplied"
    scores = weight.detach().double().abs().reshape(-1) * sums.squares.sqrt()
    order = torch.argsort(sums.place, stable=True)
    order = order[torch.argsort(sums.row[order], stable=True)]
    rows = int(torch.unique(sums.row).numel())
    scores, kept = scores[order].reshape(rows, -1), mask.reshape(-1)[order].reshape(rows, -1)
    if isinstance(pattern, tuple):
        keep, size = pattern
        scores, kept = scores.reshape(-1, size), kept.reshape(-1, size)
        if not bool((kept.sum(1) == keep).all()):
            return f"counts {kept.sum(1).unique().tolist()}, not {keep} of {size}"
    else:
        gone = int(scores.shape[1] * pattern)
        counts = (~kept).sum(1)
        if not bool((counts == gone).all()):
            return f"prunes {counts.unique().tolist()[:5]} of {scores.shape[1]}, not {gone}"
    most = scores.masked_fill(kept, -1).amax(1)
    least = scores.masked_fill(~kept, float("inf")).amin(1)
    wrong = most > least * (1 + 1e-4) + 1e-12
    if bool(wrong.any()):
        first = wrong.nonzero()[0, 0]
        return (
            f"{int(wrong.sum())} of {len(wrong)} groups keep the wrong weights (one pruned at "
            f"{most[first]:.4g}, one kept at {least[first]:.4g})"
        )
    return ""
