"""Train masked weights as they will be once they are quantized.

The forward pass sees every masked weight on its grid, the gradient passes straight through the
rounding to the weight behind it, and through the mask to kept weights alone (Jacob et al., arXiv
1712.05877; Bengio et al., arXiv 1308.3432). A zero is the code 0 of every grid, so zeros stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchprune.errors import MaskError, SpecError
from torchprune.masking.mask import Mask, beside, masked_layers, original_of
from torchprune.masking.matrices import View, view_of
from torchprune.masking.selection import Layer, as_selectors, matches
from torchprune.methods.grid import plain_scale, rounded
from torchprune.specs.quantize import Grid, Int4, Int8, misfit_of
from torchprune.specs.spec import Selectors


class Rounded(nn.Module):
    """A parametrization that stands on a mask: the weight's nearest values on a grid.

    It holds no tensors, so a `state_dict` is that of the masked model.
    """

    ends_by = "leave the block of quantized_aware first"
    """What is said of a mask that cannot be taken off below it."""

    def __init__(self, grid: Grid, view: View) -> None:
        super().__init__()
        self.grid, self.view = grid, view

    def forward(self, weight: Tensor) -> Tensor:
        apply: Any = _Straight.apply
        return cast(Tensor, apply(weight, self.grid, self.view))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        return str(self.grid)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, grid: Grid, view: View) -> Tensor:
        matrix = view.to_matrix(weight.detach()).reshape(-1, view.cols).contiguous()
        values = rounded(matrix, plain_scale(matrix, grid, weight.dtype), grid).to(weight.dtype)
        stack = values.view(view.groups, view.rows, view.cols)
        return view.from_matrix(stack, weight.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


@contextmanager
def quantized_aware(model: nn.Module, grid: Grid, *, ignore: Selectors = ()) -> Iterator[nn.Module]:
    """For a while, let every masked weight act quantized; train the model meanwhile.

    Scales follow the weights at every step, and clip nothing. When the block ends well each weight
    is what it acted as, in its own dtype: values of the grid, and exact zeros. Then
    `torchprune.fold(model)` and `torchao.quantization.quantize_(model, grid.torchao())` change no
    output but by how the runtime adds up. If it ends by an error the weights are left as they were
    trained, not rounded. Parameters are the same objects throughout, so optimizers made before and
    within the block both work.

    A model that came from `SparseGPTSpec(..., quantize=grid)` begins just as it is.

    Args:
        grid: `Int8(...)` or `Int4(...)`.
        ignore: masked layers that stay as they are, by names, patterns, types or callables.

    Yields:
        the same model.

    Raises:
        MaskError: nothing is masked, or weights are being trained so already.
        SpecError: a layer's rows do not divide into the grid's groups, or the grid is none. Nothing
            was touched.
    """
    if not isinstance(grid, Int8 | Int4):
        raise SpecError(f"quantized_aware: grid must be an Int8(...) or Int4(...), got {grid!r}")
    chosen = _chosen(model, grid, ignore)
    for layer, _, view in chosen:
        parametrize.register_parametrization(
            layer.module, layer.tensor, Rounded(grid, view), unsafe=True
        )
    try:
        yield model
    except BaseException:
        _take_off(chosen)
        raise
    with torch.no_grad():
        for layer, mask, _ in chosen:
            weight = original_of(layer.module, layer.tensor)
            values = getattr(layer.module, layer.tensor)
            weight.copy_(torch.where(mask.mask, values, weight))
            _note(mask, grid)
    _take_off(chosen)


def _chosen(model: nn.Module, grid: Grid, ignore: Selectors) -> list[tuple[Layer, Mask, View]]:
    spared = as_selectors(ignore)
    found = []
    for layer, mask in masked_layers(model):
        if any(matches(selector, layer) for selector in spared):
            continue
        if why := beside(layer.module, layer.tensor):
            raise MaskError(f"quantized_aware: {layer.name}: {why}")
        text, weight = mask.record.view, original_of(layer.module, layer.tensor)
        view = View.read(text) if text else view_of(layer.module, weight.shape)
        if why := misfit_of(grid, view.cols):
            raise SpecError(f"quantized_aware: {layer.name}: {why}; ignore it, or use other groups")
        found.append((layer, mask, view))
    if not found:
        raise MaskError(
            "quantized_aware: no layer carries a mask; prune the model first, and fold it after"
        )
    return found


def _take_off(chosen: list[tuple[Layer, Mask, View]]) -> None:
    for layer, _, _ in chosen:
        chain = cast(Any, layer.module.parametrizations)[layer.tensor]
        for place in reversed([i for i, step in enumerate(chain) if isinstance(step, Rounded)]):
            del chain[place]


def _note(mask: Mask, grid: Grid) -> None:
    said = f"quantized to {grid}"
    if said not in mask.record.note:
        note = "; ".join(filter(None, [mask.record.note, said]))
        mask.record = replace(mask.record, note=note)
