"""Every prunable weight as a stack of matrices: (groups, rows, cols).

Rows are outputs, cols are inputs. A Linear is one group; a grouped convolution has one matrix a
group; fused mixture-of-experts weights have one an expert. Each group has inputs, and therefore
statistics, of its own. The same view reads a layer's input as token rows in the order of `cols`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ConvNd = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class View:
    """How one weight tensor reads as matrices.

    Attributes:
        kind: "linear", "transposed" (transformers' Conv1D), "conv", "experts" or
            "experts_transposed".
        groups, rows, cols: the stack's shape.
        axis: length of the input axis an n:m group runs along (for convolutions the input
            channels at one kernel position, so that groups never straddle positions).
    """

    kind: str
    groups: int
    rows: int
    cols: int
    axis: int

    def to_matrix(self, weight: Tensor) -> Tensor:
        """(groups, rows, cols) view or copy of a weight in its module's own layout."""
        if self.kind == "transposed":
            return weight.t().unsqueeze(0)
        if self.kind == "experts_transposed":
            return weight.transpose(1, 2)
        if self.kind == "conv":
            last = weight.movedim(1, -1)  # (out, *kernel, in/groups)
            return last.reshape(self.groups, self.rows, self.cols)
        return weight.reshape(self.groups, self.rows, self.cols)

    def from_matrix(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `to_matrix`, contiguous in the weight's own `shape`."""
        if self.kind == "transposed":
            return matrix.squeeze(0).t().contiguous()
        if self.kind == "experts_transposed":
            return matrix.transpose(1, 2).contiguous()
        if self.kind == "conv":
            out, inner, *kernel = shape
            # Copied into a fresh tensor: `contiguous` would leave one-by-one kernels the strides
            # of another layout, which convolutions round differently in.
            weight = matrix.reshape(out, *kernel, inner).movedim(-1, 1)
            return torch.empty(tuple(shape), dtype=weight.dtype, device=weight.device).copy_(weight)
        return matrix.reshape(tuple(shape)).contiguous()


class TransposedLinear(nn.Module):
    """Stands for a product of a graph with an (in, out) weight. It never runs."""


def is_transposed_linear(module: nn.Module) -> bool:
    """A linear layer that stores its weight as (in, out): transformers' Conv1D (GPT-2)."""
    return isinstance(module, TransposedLinear) or any(
        c.__name__ == "Conv1D" and c.__module__.startswith("transformers.")
        for c in type(module).__mro__
    )


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
    return ()


def view_of(module: nn.Module, shape: Sequence[int]) -> View:
    """The matrix view of a parameter of this `shape` that `prunable_names` gave."""
    if len(shape) == 3 and not isinstance(module, nn.Conv1d):
        experts, rows, cols = shape
        if module.is_transposed:
            return View("experts_transposed", experts, cols, rows, rows)
        return View("experts", experts, rows, cols, cols)
    if isinstance(module, ConvNd):
        out, inner, *kernel = shape
        cols = inner * int(torch.Size(kernel).numel())
        return View("conv", module.groups, out // module.groups, cols, inner)
    if is_transposed_linear(module):
        return View("transposed", 1, shape[1], shape[0], shape[0])
    return View("linear", 1, shape[0], shape[1], shape[1])


def input_rows(module: nn.Module, x: Tensor) -> list[Tensor]:
    """A layer's input as one (tokens, cols) matrix a group, in the order of `View.cols`.

    Args:
        module: a linear or convolution layer.
        x: its input, (..., in) for linear layers, (batch, in, *space) or unbatched for
            convolutions.
    """
    if isinstance(module, ConvNd):
        return list(_patches(module, x).unbind(0))
    return [x.reshape(-1, x.shape[-1])]


def _patches(conv: ConvNd, x: Tensor) -> Tensor:
    """(groups, batch * positions, kernel * in/groups): what every output position reads."""
    space = len(conv.kernel_size)
    if x.dim() == space + 1:
        x = x.unsqueeze(0)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    # torch keeps the padding of "same" and of integers alike in the order F.pad wants.
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    dilation, kernel = list(conv.dilation), list(conv.kernel_size)
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    for axis in range(space):
        x = x.unfold(2 + axis, extent[axis], conv.stride[axis])
    for axis, step in enumerate(dilation):
        taken = torch.arange(0, extent[axis], step, device=x.device)
        x = x.index_select(2 + space + axis, taken)  # (batch, in, *positions, *kernel)
    batch, channels = x.shape[:2]
    positions = int(torch.Size(x.shape[2 : 2 + space]).numel())
    taps = int(torch.Size(kernel).numel())
    x = x.reshape(batch, conv.groups, channels // conv.groups, positions, taps)
    return x.permute(1, 0, 3, 4, 2).reshape(conv.groups, batch * positions, -1)


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
