"""The modules that lowering puts in the place of a model's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchprune.errors import LoweringError
from torchprune.lowering.bitmask import Bitmask
from torchprune.lowering.kernels.gradients import is_followed
from torchprune.lowering.unpacked import Unpacked, refusal
from torchprune.masking.matrices import View
from torchprune.masking.parametrization import is_watched

_PARTS = ("bits", "values", "starts", "scales")


class BitmaskLinear(nn.Module):
    """A linear layer whose weight is a bitmask and its packed nonzeros. For inference.

    Gradients flow through it to its input and its bias; the weight has none. Its parts are one
    thing: `load_state_dict` checks whatever it is given of them together with those that stay, and
    changes all or nothing. What is copied into a part alone shows at the next call, as an error.

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

    _torchprune_packed = True

    def __init__(self, packed: Bitmask, origin: nn.Module, view: View) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.cols, packed.rows
        for name in _PARTS:
            self.register_buffer(name, getattr(packed, name))
        self.register_parameter("bias", cast(nn.Parameter | None, origin.bias))
        # The module that stood here, without its weight: what it becomes again. Not a child.
        weight = cast(nn.Parameter, origin.weight)
        self.__dict__["_origin"] = origin
        self.__dict__["_was"] = (view, weight.shape, weight.requires_grad)
        self.__dict__["_dtype"] = weight.dtype  # of the layer, whatever that of its values is
        origin._parameters["weight"] = None
        self.train(origin.training)

    @property
    def packed(self) -> Bitmask:
        """The weight."""
        return Bitmask(self.bits, self.values, self.starts, self.scales, self.in_features)

    @property
    def layer_dtype(self) -> torch.dtype:
        """Of the layer, as it was and `.to()` has changed it since, whatever its values' is."""
        return cast(torch.dtype, self.__dict__["_dtype"])

    @property
    def weight(self) -> Tensor:
        """The weight, unpacked anew in the shape that the layer's own had, and the layer's dtype.

        That is the dtype of the weight that was lowered, as `.to()` has changed it since. It is a
        copy to be read: writing to it raises `LoweringError`, as setting it does.
        """
        if is_watched():
            return self._dense()
        with torch.inference_mode(False):  # whose tensors do not tell of writes
            return self._dense().as_subclass(Unpacked)

    @weight.setter
    def weight(self, value: object) -> None:
        raise refusal()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of any module, but not in the packed weight's place."""
        if name == "weight":
            raise refusal()
        super().register_parameter(name, param)

    def _dense(self) -> Tensor:
        view, shape, _ = self.__dict__["_was"]
        dense = self.packed.unpack().to(self.__dict__["_dtype"])
        return cast(Tensor, view.from_matrix(dense.unsqueeze(0), shape))

    def lifted(self) -> nn.Module:
        """The module that stood here, with the weight unpacked.

        Raises:
            LoweringError: its parts contradict each other, which only a CPU's kernels refuse.
        """
        if self.bits.is_cuda:
            self.packed.check("a lowered layer", rows=self.out_features)
        origin: nn.Module = self.__dict__["_origin"]
        weight = nn.Parameter(self._dense(), requires_grad=self.__dict__["_was"][2])
        origin._parameters["weight"] = weight
        origin._parameters["bias"] = self.bias
        return origin.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the input's dtype, summed in float32.

        Under autocast the input is cast, as for a Linear, and the output is of autocast's dtype.
        """
        parts = (self.bits, self.values, self.starts, self.scales)
        if is_followed(x) or (self._trains_bias() and torch.is_grad_enabled()):
            return torch.ops.torchprune.bitmask_linear(  # type: ignore[no-any-return]
                x, *parts, self.bias, self.in_features
            )
        with torch._C._AutoDispatchBelowAutograd():  # what would look for gradients takes longer
            return torch.ops.torchprune.bitmask_linear(  # type: ignore[no-any-return]
                x, *parts, self.bias, self.in_features
            )

    def extra_repr(self) -> str:
        """What `print` shows."""
        size = max(1, self.in_features * self.out_features)
        told = type(self.starts) in (Tensor, nn.Parameter) and not self.starts.is_meta
        told = told and not torch._C._functorch.is_functorch_wrapped_tensor(self.starts)
        zeros = f"{1 - int(self.starts[-1]) / size:.1%}" if told else "unknown"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, values={self.values.dtype}, zeros={zeros}"
        )

    def _trains_bias(self) -> bool:
        return self.bias is not None and self.bias.requires_grad

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BitmaskLinear:
        fixed = {name: self._buffers[name] for name in ("bits", "starts", "scales")}
        probe = fn(torch.empty(0, dtype=self.__dict__["_dtype"], device=self.values.device))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.__dict__["_dtype"] = probe.dtype
        for name, old in fixed.items():  # whole numbers, and scales as fine as they were
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As many nonzeros as the file holds, which need not be as many as before.

        Raises:
            LoweringError: the parts, given and staying, do not make a matrix of this layer's.
        """
        name = f"{prefix.rstrip('.')} of the state dict"
        given = {n: state_dict[prefix + n] for n in _PARTS if prefix + n in state_dict}
        if given and all(isinstance(part, Tensor) for part in given.values()):
            self._check(name, given)
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        buffers, bias = dict(self._buffers), self.bias
        said, loaded = len(error_msgs), False
        try:
            # What is loaded lands in tensors of its own, and takes its place if all of it came.
            with torch.inference_mode(False):
                for part, tensor in given.items():
                    old = buffers[part]
                    if old is not None and isinstance(tensor, Tensor):
                        shape, dtype = tensor.shape, old.dtype
                        self._buffers[part] = torch.empty(shape, dtype=dtype, device=old.device)
                if bias is not None and prefix + "bias" in state_dict:
                    fresh = torch.empty_like(bias, requires_grad=False)
                    self._parameters["bias"] = nn.Parameter(fresh, bias.requires_grad)
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
            loaded = len(error_msgs) == said  # keys that are missing are the caller's affair
            if loaded and bias is not None and self.bias is not bias and not assign:
                with torch.no_grad():
                    bias.copy_(cast(Tensor, self.bias))
        except BaseException:
            loaded = False
            raise
        finally:
            if not loaded:
                self._buffers.update(buffers)
            if not loaded or not assign:
                self._parameters["bias"] = bias
        if loaded and assign:
            for part, buffer in self._buffers.items():
                self._buffers[part] = None if buffer is None else buffer.contiguous()
            if self.bias is not None:
                self.__dict__["_dtype"] = self.bias.dtype

    def _check(self, name: str, given: dict[str, Tensor]) -> None:
        """See that the parts of a state dict fit this layer, and those of its own that stay."""
        parts = {part: given.get(part, self._buffers[part]) for part in _PARTS}
        Bitmask(**cast(Any, parts), cols=self.in_features).check(name, rows=self.out_features)
        values, scales = cast(Tensor, parts["values"]), parts["scales"]
        if values.dtype != self.values.dtype or (scales is None) != (self.scales is None):
            raise LoweringError(
                f"{name}: expected values of {self.values.dtype}, got {values.dtype}"
            )
