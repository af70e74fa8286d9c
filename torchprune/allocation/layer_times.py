"""How long a model takes on its first batch, as its layers get narrower and its blocks go.

Each layer whose width may change is measured at a few widths, between which its time is
interpolated; what else a block does, and the model around the blocks, takes what it takes now.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchprune import modes
from torchprune.allocation.stopwatches import Stopwatch
from torchprune.calibration.batches import Batch
from torchprune.calibration.replay import private
from torchprune.masking.matrices import ConvNd, is_transposed_linear
from torchprune.masking.selection import repeated_blocks
from torchprune.structure.conv_groups import cuts_within, groups_by_rows
from torchprune.structure.ledger import Item, Ledger, Use, Worth
from torchprune.structure.offers import Offers

WIDTHS = (0.25, 0.5, 0.75, 1.0)
"""At these shares of each axis that may get shorter."""


class OneCall(nn.Module):
    """A call of a module, to be repeated."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.module, self.args, self.kwargs = module, args, kwargs

    def forward(self) -> Any:
        """What the module gives."""
        return self.module(*self.args, **self.kwargs)


@dataclass
class _Seen:
    """What modules were called with: layers the shapes of each call, blocks one whole call."""

    shapes: dict[str, list[torch.Size]] = field(default_factory=dict)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)


def times_of(offers: Offers, batch: Batch, layers: Stopwatch, around: Stopwatch) -> Ledger:
    """Milliseconds, over the groups of the offers.

    Args:
        layers: measures layers; `around` the model, its blocks and, to tell what else they do, the
            layers in them.
    """
    model, parameters = offers.model, offers.ledger("parameters")
    found = dict(model.named_modules())
    changing = {use.item for uses in parameters.uses for use in uses}
    owners: dict[int, str] = {}
    for number in changing:
        key = parameters.items[number].places[0]
        path = key.removesuffix(".weight")
        if path != key and path in found and _can_be_made(found[path]):
            owners[number] = path
    blocks = repeated_blocks(model)
    with modes.calibration_mode(model), torch.no_grad():
        seen = _watched({found[p]: p for p in owners.values()}, blocks, model, batch)
        bench = _Bench(found, seen, layers, around, _cut_within(offers, found))
        items, moved = list[Item](), dict[int, int]()
        for number, path in owners.items():
            axes = {u.axis for uses in parameters.uses for u in uses if u.item == number}
            moved[number] = len(items)
            whole = parameters.items[number]
            items.append(Item(whole.lengths, whole.places, bench.worth(path, sorted(axes))))
        left = bench.around(OneCall(model, batch.args, batch.kwargs)) - sum(
            map(bench.full, owners.values())
        )
        for name, block in blocks.items():
            if name in seen.calls:
                inside = [p for p in owners.values() if p.startswith(f"{name}.")]
                own = max(0.0, bench.block(block, name) - sum(map(bench.full, inside)))
                items.append(Item((), (name,), _constant(own)))
                left -= own
    items.append(Item((), ("",), _constant(max(0.0, left))))
    uses = [
        [Use(moved[u.item], u.axis, u.spans) for u in some if u.item in moved]
        for some in parameters.uses
    ]
    return Ledger(items, uses)


def _cut_within(offers: Offers, modules: Mapping[str, nn.Module]) -> set[str]:
    """The convolutions with groups that have as many when they are narrower."""
    found = set()
    for member in (m for group in offers.structure.groups for m in group.members):
        path = member.key.removesuffix(".weight")
        module: Any = modules.get(path)
        grouped = path != member.key and isinstance(module, ConvNd) and module.groups > 1
        if grouped and member.axis == 0 and cuts_within(member.units, module):
            found.add(path)
    return found


def time_of(model: nn.Module, batch: Batch, watch: Stopwatch) -> float:
    """Milliseconds of a model for a batch."""
    with modes.calibration_mode(model), torch.no_grad():
        return watch(OneCall(model, batch.args, batch.kwargs), ())


def _can_be_made(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) or is_transposed_linear(
        module
    )


def _constant(value: float) -> Worth:
    def worth(now: Sequence[Tensor]) -> Tensor:
        return torch.full((1,), value, dtype=torch.float64)

    return worth


def _watched(
    layers: dict[nn.Module, str], blocks: dict[str, nn.Module], model: nn.Module, batch: Batch
) -> _Seen:
    seen = _Seen()

    def layer(path: str) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.shapes.setdefault(path, []).append(args[0].shape)

        return look

    def block(name: str) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            own = tuple(private(v) for v in args), {k: private(v) for k, v in kwargs.items()}
            seen.calls.setdefault(name, own)

        return look

    with ExitStack() as stack:
        for module, path in layers.items():
            stack.callback(module.register_forward_pre_hook(layer(path)).remove)
        for name, module in blocks.items():
            handle = module.register_forward_pre_hook(block(name), with_kwargs=True)
            stack.callback(handle.remove)
        batch.run(model)
    return seen


class _Bench:
    """Layers and blocks under stopwatches; what is alike is measured once."""

    def __init__(
        self,
        modules: dict[str, nn.Module],
        seen: _Seen,
        layers: Stopwatch,
        around: Stopwatch,
        within: Collection[str],
    ) -> None:
        self._modules, self._seen, self._within = modules, seen, within
        self._layers, self._around = layers, around
        self._known: dict[Any, float] = {}

    def around(self, call: OneCall) -> float:
        return self._around(call, ())

    def block(self, block: nn.Module, name: str) -> float:
        """One call of a block."""
        args, kwargs = self._seen.calls[name]
        shapes = tuple(v.shape for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        parts = tuple(
            (type(m).__name__, *map(_shape, m._parameters.values())) for m in block.modules()
        )
        key = "block", type(block), shapes, parts
        if key not in self._known:
            self._known[key] = self.around(OneCall(block, args, kwargs))
        return self._known[key]

    def full(self, path: str) -> float:
        """A layer as it is, in the runtime of what is around it."""
        weight = self._modules[path].weight
        assert isinstance(weight, Tensor)
        return self._measured(path, tuple(weight.shape), around=True)

    def worth(self, path: str, axes: Sequence[int]) -> Worth:
        """A layer's time at the lengths of its weight's axes, of which some vary."""
        weight = self._modules[path].weight
        assert isinstance(weight, Tensor)
        sizes = tuple(weight.shape)
        grid = [sorted({max(1, round(sizes[a] * share)) for share in WIDTHS}) for a in axes]
        times = []
        for lengths in itertools.product(*grid):
            shape = list(sizes)
            for axis, length in zip(axes, lengths, strict=True):
                shape[axis] = length
            times.append(self._measured(path, tuple(shape)))
        table = torch.tensor(times, dtype=torch.float64).reshape([len(g) for g in grid])
        for dim in range(table.dim()):
            table = table.cummax(dim).values  # noise does not make a wider layer faster
        return _interpolated(table, grid, axes)

    def _measured(self, path: str, shape: tuple[int, ...], *, around: bool = False) -> float:
        """All calls of a layer whose weight has this shape."""
        module = self._modules[path]
        total = 0.0
        for given in self._seen.shapes.get(path, ()):
            groups = self._groups(path, shape)
            key = type(module), shape, given, _settings(module), groups, around
            if key not in self._known:
                layer, x = _made(module, shape, given, groups)
                watch = self._around if around else self._layers
                self._known[key] = watch(layer, (x,))
            total += self._known[key]
        return total

    def _groups(self, path: str, shape: tuple[int, ...]) -> int:
        """Of a convolution whose weight has this shape."""
        module: Any = self._modules[path]
        groups: int = getattr(module, "groups", 1)
        if groups == 1 or path in self._within:
            return groups
        return groups_by_rows(module, shape[0])


def _shape(tensor: Tensor | None) -> tuple[int, ...]:
    return () if tensor is None else tuple(tensor.shape)


def _settings(module: Any) -> tuple[Any, ...]:
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    return module.bias is not None, *(str(getattr(module, name, None)) for name in names)


def _made(
    module: Any, shape: tuple[int, ...], given: torch.Size, groups: int
) -> tuple[nn.Module, Tensor]:
    """A layer of the same kind with a weight of that shape, and an input for it."""
    like = {"device": module.weight.device, "dtype": module.weight.dtype}
    biased = module.bias is not None
    if isinstance(module, nn.Linear) or is_transposed_linear(module):
        wide, tall = shape[::-1] if isinstance(module, nn.Linear) else shape
        return nn.Linear(wide, tall, biased, **like), torch.randn(*given[:-1], wide, **like)
    tall = max(1, shape[0] // groups) * groups
    layer = type(module)(
        shape[1] * groups,
        tall,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        groups,
        biased,
        module.padding_mode,
        **like,
    )
    space = given[len(given) - len(shape) + 2 :]
    batch = given[: len(given) - len(shape) + 1]
    return layer, torch.randn(*batch, shape[1] * groups, *space, **like)


def _interpolated(table: Tensor, grid: Sequence[Sequence[int]], axes: Sequence[int]) -> Worth:
    """Linear between the points of a grid, and on along its first two below it."""
    points = [torch.tensor(g, dtype=torch.float64) for g in grid]

    def worth(now: Sequence[Tensor]) -> Tensor:
        lengths = [now[axis].double() for axis in axes]
        total = torch.zeros((), dtype=torch.float64)
        places = []
        for point, length in zip(points, lengths, strict=True):
            if len(point) == 1:
                places.append([(torch.zeros_like(length).long(), torch.ones_like(length))])
                continue
            low = (torch.searchsorted(point, length) - 1).clamp(0, len(point) - 2)
            part = (length - point[low]) / (point[low + 1] - point[low])
            places.append([(low, 1 - part), (low + 1, part)])
        for corner in itertools.product(*places):
            weight = torch.ones((), dtype=torch.float64)
            for _, share in corner:
                weight = weight * share
            total = total + table[tuple(at for at, _ in corner)] * weight
        return total.clamp_min(0).reshape(-1)

    return worth
