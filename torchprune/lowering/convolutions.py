"""Convolutions whose weight is a bitmask and its packed nonzeros."""

from __future__ import annotations

import math
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from torchprune.lowering.bitmask import Bitmask
from torchprune.lowering.modules import BitmaskLinear
from torchprune.masking.matrices import ConvNd, View

_FEW = 64
"""Positions up to which a product over unfolded inputs is faster than a dense convolution."""

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def convolves(kind: type[nn.Module]) -> bool:
    """Whether a class of module is a convolution of torch's own."""
    return kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def objection(module: nn.Module) -> str | None:
    """Why such a module cannot be a `BitmaskConv`, or None."""
    groups = cast(ConvNd, module).groups
    return (
        f"it has {groups} groups, and the kernels multiply whole matrices" if groups > 1 else None
    )


class BitmaskConv(BitmaskLinear):
    """A convolution with one group whose weight is a bitmask and its packed nonzeros.

    A call with at most 64 output positions, all of its batch together, is a product over unfolded
    inputs that never unpacks the weight. One with more unpacks it and convolves as the dense layer
    does, which costs that layer's time and the unpacking. (Three-dimensional kernels always do.)

    Attributes:
        bits, values, starts, scales, bias: as of `BitmaskLinear`, of the matrix (out_channels,
            kernel * in_channels), a kernel's places first.
    """

    groups = 1

    def __init__(self, packed: Bitmask, origin: nn.Module, view: View) -> None:
        super().__init__(packed, origin, view)
        conv: Any = origin
        self.in_channels: int = conv.in_channels
        self.out_channels: int = conv.out_channels
        self.kernel_size: tuple[int, ...] = conv.kernel_size
        self.stride: tuple[int, ...] = conv.stride
        self.dilation: tuple[int, ...] = conv.dilation
        self.padding: tuple[int, ...] | str = conv.padding
        self.padding_mode: str = conv.padding_mode
        self.__dict__["_pad"] = tuple(conv._reversed_padding_repeated_twice)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, *sizes), or without a batch, as the convolution that stood here."""
        space = len(self.kernel_size)
        if x.dim() == space + 1:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if any(pad := self.__dict__["_pad"]):
            x = F.pad(x, pad, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        sizes = [
            (size - step * (kernel - 1) - 1) // stride + 1
            for size, kernel, step, stride in zip(
                x.shape[2:], self.kernel_size, self.dilation, self.stride, strict=True
            )
        ]
        if x.shape[0] * math.prod(sizes) > _FEW or not (space < 3 or self._is_point()):
            weight = self._dense().to(x.dtype)
            bias = None if self.bias is None else self.bias.to(weight.dtype)
            made: Tensor = _CONVOLVE[space](
                x, weight, bias, self.stride, 0, self.dilation, self.groups
            )
        else:
            rows = super().forward(self._unfolded(x))
            made = rows.reshape(x.shape[0], *sizes, self.out_features).movedim(-1, 1)
        return made

    def _is_point(self) -> bool:
        return math.prod(self.kernel_size) == 1

    def _unfolded(self, x: Tensor) -> Tensor:
        """(batch * positions, kernel * in_channels): what each position reads."""
        if self._is_point():
            for axis, stride in enumerate(self.stride, 2):
                x = x[(slice(None),) * axis + (slice(None, None, stride),)]
            return x.flatten(2).transpose(1, 2).flatten(0, 1)
        one = (1,) * (2 - len(self.kernel_size))
        flat = x if x.dim() == 4 else x.unsqueeze(2)
        found = F.unfold(
            flat,
            (*one, *self.kernel_size),
            (*one, *self.dilation),
            0,
            (*one, *self.stride),
        )
        parts: Tensor = found.unflatten(
            1, (self.in_channels, -1)
        )  # (batch, channel, kernel, position)
        return parts.permute(0, 3, 2, 1).flatten(2).flatten(0, 1)

    def extra_repr(self) -> str:
        """What `print` shows."""
        told = super().extra_repr().partition("bias=")[2]
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, bias={told}"
        )
