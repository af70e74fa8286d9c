"""Every prunable weight as a stack of matrices: (groups, rows, cols).

Rows are outputs, cols are inputs. A Linear is one group; a grouped convolution has one matrix a
group; fused mixture-of-experts weights have one an expert. Each group has inputs, and therefore
statistics, of its own. The same view reads a layer's input as token rows in the order of `cols`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

ConvNd = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class View:
    """How one weight tensor reads as matrices.

    Attributes:
        kind: "linear", "transposed" (stored as (in, out)), "conv", "experts" (a stack of matrices)
            or "parts" (of one tensor that is read in parts).
        groups, rows, cols: the stack's shape.
        axis: length of the input axis an n:m group runs along (for convolutions the input
            channels at one kernel position, so that groups never straddle positions).
        shape: the weight's axes, cut where an axis holds several of the above.
        order: those axes, first the groups', then the rows', then the columns'.
        lead: how many of them are the groups'.
    """

    kind: str
    groups: int
    rows: int
    cols: int
    axis: int
    shape: tuple[int, ...]
    order: tuple[int, ...]
    lead: int

    @staticmethod
    def of(
        kind: str,
        shape: Sequence[int],
        groups: Sequence[int],
        rows: Sequence[int],
        cols: Sequence[int],
        axis: int | None = None,
    ) -> View:
        """A view by what each axis of the (cut) weight stands for."""
        count, height, width = (prod(shape[a] for a in axes) for axes in (groups, rows, cols))
        order = (*groups, *rows, *cols)
        inner = width if axis is None else axis
        return View(kind, count, height, width, inner, tuple(shape), order, len(groups))

    def to_matrix(self, weight: Tensor) -> Tensor:
        """(groups, rows, cols) view or copy of a weight in its module's own layout."""
        cut = weight if weight.shape == self.shape else weight.reshape(self.shape)
        return cut.permute(self.order).reshape(self.groups, self.rows, self.cols)

    def from_matrix(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `to_matrix`, contiguous in the weight's own `shape`."""
        cut = matrix.reshape([self.shape[a] for a in self.order])
        weight = cut.permute(inverse(self.order)).reshape(tuple(shape))
        if self.kind == "conv":
            # Copied into a fresh tensor: `contiguous` would leave one-by-one kernels the strides
            # of another layout, which convolutions round differently in.
            return torch.empty(tuple(shape), dtype=weight.dtype, device=weight.device).copy_(weight)
        return weight.contiguous()


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The permutation that takes back a permutation of axes."""
    return tuple(order.index(axis) for axis in range(len(order)))


class TransposedLinear(nn.Module):
    """Stands for a product of a graph with an (in, out) weight. It never runs."""


def is_transposed_linear(module: nn.Module) -> bool:
    """A linear layer that stores its weight as (in, out): transformers' Conv1D (GPT-2)."""
    return isinstance(module, TransposedLinear) or any(
        c.__name__ == "Conv1D" and c.__module__.startswith("transformers.")
        for c in type(module).__mro__
    )


def is_stock(module: nn.Module) -> bool:
    """Whether a forward of torch's own reads the module's weight once, whole."""
    kind = parametrize.type_before_parametrizations(module)
    return kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) or is_transposed_linear(module)


def is_fused_experts(module: nn.Module) -> bool:
    """transformers' stacked expert weights: 3-D parameters (experts, out, in) on one module."""
    return (
        hasattr(module, "is_transposed")
        and hasattr(module, "_apply_gate")
        and getattr(getattr(module, "down_proj", None), "dim", lambda: 0)() == 3
    )


def prunable_names(module: nn.Module) -> tuple[str, ...]:
    """The parameters of this module (not of its children) that can be pruned."""
    if is_fused_experts(module):
        return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    if isinstance(module, nn.Linear | ConvNd) or is_transposed_linear(module):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return tuple(name for name in names if getattr(module, name) is not None)
    if isinstance(module, nn.RNNBase):
        return tuple(name for name in module._flat_weights_names if name.startswith("weight"))
    if isinstance(module, nn.RNNCellBase):
        return ("weight_ih", "weight_hh")
    return ()


def feeds_back(module: nn.Module, tensor: str) -> bool:
    """Whether what a weight gives comes back to it a step later: those of recurrent nets do, but
    for the ones that read the input."""
    if isinstance(module, nn.RNNBase):
        return tensor.startswith("weight") and all(tensor != own[0] for own in module._all_weights)
    return isinstance(module, nn.RNNCellBase) and tensor == "weight_hh"


def is_asked_for(module: nn.Module) -> bool:
    """Whether the weight of a module of torch's own is pruned only where it is asked for by name:
    lookups, products of two inputs, and convolutions that spread their input."""
    return isinstance(
        module, nn.Embedding | nn.EmbeddingBag | nn.Bilinear | nn.modules.conv._ConvTransposeNd
    )


def view_of(module: nn.Module, shape: Sequence[int]) -> View:
    """The matrix view of a parameter of this `shape`, by the module that it belongs to.

    Where the module does not tell, the first axis is taken for the outputs.
    """
    if isinstance(module, ConvNd):
        out, inner, *kernel = shape
        cut = (module.groups, out // module.groups, inner, *kernel)
        return View.of("conv", cut, [0], [1], [*range(3, len(cut)), 2], axis=inner)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        inner, *outer = shape
        cut = (module.groups, inner // module.groups, *outer)
        return View.of("parts", cut, [0], [*range(2, len(cut))], [1])
    if is_fused_experts(module) and len(shape) == 3:
        turned = getattr(module, "is_transposed", False)
        return View.of("experts", shape, [0], [2 if turned else 1], [1 if turned else 2])
    if is_transposed_linear(module) or isinstance(module, nn.EmbeddingBag):
        return View.of("transposed", shape, [], [1], [0])
    return View.of("linear", shape, [], [0], [*range(1, len(shape))])


def input_rows(module: nn.Module, x: Tensor) -> list[Tensor]:
    """A layer's input as one (tokens, cols) matrix a group, in the order of `View.cols`.

    Args:
        module: a linear or convolution layer.
        x: its input, (..., in) for linear layers, (batch, in, *space) or unbatched for
            convolutions.
    """
    if isinstance(module, ConvNd):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        # torch keeps the padding of "same" and of integers alike in the order F.pad wants.
        space = len(module.kernel_size)
        x = x.unsqueeze(0) if x.dim() == space + 1 else x
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        return patches(x, Taps(module.kernel_size, module.stride, module.dilation), module.groups)
    return [x.reshape(-1, x.shape[-1])]


@dataclass(frozen=True)
class Taps:
    """Where a convolution's kernel reads: its size, steps and spacing by axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]


def patches(x: Tensor, taps: Taps, groups: int) -> list[Tensor]:
    """What every output position of a convolution reads, (batch * positions, kernel * in/groups) a
    group.

    Args:
        x: (batch, in, *space), padded.
    """
    space = len(taps.kernel)
    extent = [d * (k - 1) + 1 for d, k in zip(taps.dilation, taps.kernel, strict=True)]
    for axis in range(space):
        x = x.unfold(2 + axis, extent[axis], taps.stride[axis])
    for axis, step in enumerate(taps.dilation):
        taken = torch.arange(0, extent[axis], step, device=x.device)
        x = x.index_select(2 + space + axis, taken)  # (batch, in, *positions, *kernel)
    batch, channels = x.shape[:2]
    positions = int(torch.Size(x.shape[2 : 2 + space]).numel())
    x = x.reshape(batch, groups, channels // groups, positions, prod(taps.kernel))
    x = x.permute(1, 0, 3, 4, 2).reshape(groups, batch * positions, -1)
    return list(x.unbind(0))


def geometry(module: nn.Module) -> object:
    """What makes two layers read the same tensor as the same matrix."""
    if isinstance(module, ConvNd):
        return (
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.padding_mode,
        )
    return "rows"
