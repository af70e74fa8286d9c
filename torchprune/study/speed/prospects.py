"""What other kernels would make of a model: timed here, on the shapes of its layers, and summed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchprune.calibration.batches import Batch
from torchprune.errors import LoweringError
from torchprune.lowering.bitmask import Bitmask
from torchprune.lowering.lower import plan_lowering
from torchprune.study.speed.layer_work import bytes_of
from torchprune.study.speed.profile_records import Prospect
from torchprune.study.speed.spreads import changed_sum
from torchprune.study.speed.turns import Pace, take_turns

BEYOND_CACHES = 1 << 28
"""Bytes of one shape's weights that are enough to come from memory."""

MOST_SHAPES = 8

DENSE = "dense"


@dataclass(frozen=True)
class Shape:
    """Of a linear layer's product: its weight (outputs, inputs), dtype, and rows of its input."""

    outputs: int
    inputs: int
    dtype: torch.dtype
    rows: int


@dataclass(frozen=True)
class Kernel:
    """A way to compute a layer's product.

    Attributes:
        pack: a dense weight -> the tensors to be read.
        product: an input (rows, inputs), these tensors and the number of inputs -> the output.
    """

    name: str
    pack: Callable[[Tensor], list[Tensor]]
    product: Callable[[Tensor, list[Tensor], int], Tensor]


def kernels_for_cpu() -> list[Kernel]:
    """The dense product of torch, and what may be faster."""
    return [
        Kernel(DENSE, lambda w: [w], _dense),
        Kernel("bitmask 50 %", lambda w: _packed(w * _random_mask(w, 0.5)), _by_bits),
        Kernel("bitmask 70 %", lambda w: _packed(w * _random_mask(w, 0.7)), _by_bits),
        Kernel("bitmask 80 %", lambda w: _packed(w * _random_mask(w, 0.8)), _by_bits),
        Kernel("bitmask 2:4", lambda w: _packed(w * _two_of_four(w)), _by_bits),
        Kernel("bitmask int8 0 %", lambda w: _packed(*_in_int8(w)), _by_bits),
        Kernel(
            "bitmask int8 50 %", lambda w: _packed(*_in_int8(w * _random_mask(w, 0.5))), _by_bits
        ),
        Kernel("half of the outputs removed", lambda w: [w[: max(1, len(w) // 2)].clone()], _dense),
    ]


def layers_to_change(folded: nn.Module) -> list[str]:
    """The layers that lowering takes: the sparse ones, or where none is, all that it could take."""
    for least in (0.25, 0.0):
        try:
            plan = plan_lowering(folded, "bitmask", min_sparsity=least)
        except LoweringError:
            return []
        if plan.layers:
            return [layer.name for layer in plan.layers]
    return []


def shapes_of(model: nn.Module, names: Sequence[str], batch: Batch) -> Counter[Shape]:
    """How often a call of the model computes each shape, in the layers of these names."""
    found: Counter[Shape] = Counter()
    with ExitStack() as stack, torch.no_grad():
        for name in names:
            stack.enter_context(_counting(model.get_submodule(name), found))
        batch.run(model)
    return found


@contextmanager
def _counting(module: nn.Module, found: Counter[Shape]) -> Iterator[None]:
    def note(_: nn.Module, __: object, output: Tensor) -> None:
        weight = module.weight
        if isinstance(weight, Tensor) and output.numel():
            outputs = output.shape[-1]
            rows = output.numel() // outputs
            found[Shape(outputs, weight.numel() // outputs, weight.dtype, rows)] += 1

    handle = module.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


def prospects_at(
    rows: int,
    whole: Sequence[float],
    shapes: Counter[Shape],
    pace: Pace,
    *,
    clock: Callable[[], float],
    kernels: Sequence[Kernel] | None = None,
    resting: Callable[[str], None] = lambda _: None,
) -> list[Prospect]:
    """What each kernel would make of the whole: what it takes, less the dense products, and theirs.

    Both products are timed by themselves, in turns, with weights from memory where the model has
    more of them than caches hold. The largest `MOST_SHAPES` shapes are exchanged, others stay.

    Args:
        whole: seconds of the base's rounds.
    """
    some = kernels_for_cpu() if kernels is None else kernels
    largest = sorted(shapes, key=lambda s: -s.outputs * s.inputs * shapes[s])[:MOST_SHAPES]
    times: dict[Shape, dict[str, list[float]]] = {}
    sizes: dict[str, int] = {kernel.name: 0 for kernel in some}
    for shape in largest:
        resting(f"{shape.outputs}x{shape.inputs}")
        runs, bytes_here = _contenders(shape, shapes[shape], some)
        times[shape] = take_turns(runs, pace, clock=clock).seconds
        for name, size in bytes_here.items():
            sizes[name] += size * shapes[shape]
    found = []
    for kernel in some:
        if kernel.name == DENSE or not all(kernel.name in t and DENSE in t for t in times.values()):
            continue
        parts = {
            str(shape): (shapes[shape], t[kernel.name], t[DENSE]) for shape, t in times.items()
        }
        ratio = changed_sum(whole, parts)
        layers = sum(shapes[shape] for shape in times)
        found.append(Prospect(rows, kernel.name, ratio, layers, sizes[kernel.name] / sizes[DENSE]))
    return found if times else []


def _contenders(
    shape: Shape, times: int, kernels: Sequence[Kernel]
) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """A run for each kernel, whose weights rotate through as many sets as the model has."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.outputs, shape.inputs, generator=generator).to(shape.dtype)
    x = torch.randn(shape.rows, shape.inputs, generator=generator).to(shape.dtype)
    sets = max(1, min(times, BEYOND_CACHES // max(1, weight.nbytes)))
    runs: dict[str, Callable[[], object]] = {}
    sizes = {}
    for kernel in kernels:
        parts = kernel.pack(weight)
        some = [parts, *([part.clone() for part in parts] for _ in range(sets - 1))]
        runs[kernel.name] = _rotating(kernel, some, x)
        sizes[kernel.name] = bytes_of(parts)
    return runs, sizes


def _rotating(kernel: Kernel, sets: Sequence[list[Tensor]], x: Tensor) -> Callable[[], object]:
    turn = count()

    def run() -> object:
        with torch.no_grad():
            return kernel.product(x, sets[next(turn) % len(sets)], x.shape[1])

    return run


def _dense(x: Tensor, parts: list[Tensor], _: int) -> Tensor:
    return F.linear(x, parts[0])


def _by_bits(x: Tensor, parts: list[Tensor], cols: int) -> Tensor:
    bits, values, starts, *scales = parts
    found: Tensor = torch.ops.torchprune.bitmask_linear(
        x, bits, values, starts, scales[0] if scales else None, None, cols
    )
    return found


def _packed(weight: Tensor, scales: Tensor | None = None) -> list[Tensor]:
    packed = Bitmask.pack(weight, scales)
    parts = (packed.bits, packed.values, packed.starts, packed.scales)
    return [part for part in parts if part is not None]


def _in_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded, with a scale a row."""
    scales = weight.float().abs().amax(1).clamp_min(1e-12) / 127
    return (weight.float() / scales[:, None]).round().to(torch.int8), scales


def _random_mask(weight: Tensor, share: float) -> Tensor:
    """Exactly this share of every row is zero, at random places."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(weight.shape, generator=generator).argsort(1)
    return (order >= int(share * weight.shape[1])).to(weight.dtype)


def _two_of_four(weight: Tensor) -> Tensor:
    """Two of every four along a row; what is left over at its end stays."""
    groups = weight.shape[1] // 4
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(len(weight), groups, 4, generator=generator).argsort(-1)
    mask = torch.ones_like(weight)
    mask[:, : 4 * groups] = (order >= 2).reshape(len(weight), -1).to(weight.dtype)
    return mask
