"""The modules that lowering puts in the place of a model's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchprune.errors import LoweringError
from torchprune.lowering.bitmask import Bitmask
from torchprune.masking.matrices import View


class BitmaskLinear(nn.Module):
    """A linear layer whose weight is a bitmask and its packed nonzeros. For inference.

    Gradients flow through it to its input and its bias; the weight has none.

    Attributes:
        bits, values, starts, scales: as in `Bitmask`; buffers, so `state_dict` holds them.
        bias: (out_features,) parameter or None, the layer's own.
        in_features, out_features: as before.
    """

    bits: Tensor
    values: Tensor
    starts: Tensor
    scales: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, packed: Bitmask, origin: nn.Module, view: View) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.cols, packed.rows
        for name in ("bits", "values", "starts", "scales"):
            self.register_buffer(name, getattr(packed, name))
        self.register_parameter("bias", cast(nn.Parameter | None, origin.bias))
        # The module that stood here, without its weight: what it becomes again. Not a child.
        weight = cast(nn.Parameter, origin.weight)
        self.__dict__["_origin"] = origin
        self.__dict__["_was"] = (view, weight.shape, weight.dtype, weight.requires_grad)
        origin._parameters["weight"] = None
        self.train(origin.training)

    @property
    def packed(self) -> Bitmask:
        """The weight."""
        return Bitmask(self.bits, self.values, self.starts, self.scales, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The weight, unpacked anew in the shape and dtype that the layer's own had."""
        view, shape, dtype, _ = self.__dict__["_was"]
        dense = self.packed.unpack()
        if self.values.dtype == torch.int8:
            dense = dense.to(dtype)
        return cast(Tensor, view.from_matrix(dense.unsqueeze(0), shape))

    def lifted(self) -> nn.Module:
        """The module that stood here, with the weight unpacked."""
        origin: nn.Module = self.__dict__["_origin"]
        weight = nn.Parameter(self.weight, requires_grad=self.__dict__["_was"][3])
        origin._parameters["weight"] = weight
        origin._parameters["bias"] = self.bias
        return origin.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the input's dtype, summed in float32."""
        if torch.is_grad_enabled() and (x.requires_grad or self._trains_bias()):
            product = cast(Tensor, _Product.apply(x, self))  # type: ignore[no-untyped-call]
            return product if self.bias is None else product + self.bias
        return torch.ops.torchprune.bitmask_linear(  # type: ignore[no-any-return]
            x, self.bits, self.values, self.starts, self.scales, self.bias, self.in_features
        )

    def extra_repr(self) -> str:
        """What `print` shows."""
        share = 1 - int(self.starts[-1]) / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, values={self.values.dtype}, zeros={share:.1%}"
        )

    def _trains_bias(self) -> bool:
        return self.bias is not None and self.bias.requires_grad

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BitmaskLinear:
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if (
            scales is not None and self.scales is not None
        ):  # the scale of int8 stays as fine as it was
            self.scales = scales.to(self.scales.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **options: Any
    ) -> None:
        """As many nonzeros as the file holds, which need not be as many as before."""
        parts = {n: state_dict.get(prefix + n) for n in ("bits", "values", "starts")}
        tensors = [part for part in parts.values() if isinstance(part, Tensor)]
        if len(tensors) == len(parts):
            bits, values, starts = tensors
            scales = state_dict.get(prefix + "scales")
            packed = Bitmask(bits, values, starts, scales, self.in_features)
            name = f"{prefix.rstrip('.')} of the state dict"
            packed.check(name, rows=self.out_features)
            if values.dtype != self.values.dtype or (scales is None) != (self.scales is None):
                raise LoweringError(
                    f"{name}: expected values of {self.values.dtype}, got {values.dtype}"
                )
            self.values = self.values.new_empty(values.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest, **options)


class _Product(torch.autograd.Function):
    """x W^T, differentiable in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: BitmaskLinear) -> Tensor:
        ctx.layer = layer
        return torch.ops.torchprune.bitmask_linear(  # type: ignore[no-any-return]
            x, layer.bits, layer.values, layer.starts, layer.scales, None, layer.in_features
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        (grad,) = grads
        return grad @ ctx.layer.packed.unpack().to(grad.dtype), None
