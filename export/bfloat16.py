"""A bfloat16 model as the float32 model with the very same weights, for runtimes without bfloat16.

Every bfloat16 number is a float32 number, so nothing is rounded on the way. What such a copy
computes is what the weights mean: bfloat16 rounds after every step, float32 hardly.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchprune.lowering.modules import BitmaskLinear

_EXACT = (
    " The model is of bfloat16 and its graph of float32, inputs and outputs too, with the very "
    "same weights. It is compared with torch in float32, which is nearer to what the weights mean "
    "than bfloat16, which rounds every step."
)
_INT8 = (
    " The model is of bfloat16; what is not int8 in its graph is float32, inputs and outputs too."
)


def said_of(widened: bool, int8: bool) -> str:
    """What a report says of a graph of a bfloat16 model; nothing of others."""
    return (_INT8 if int8 else _EXACT) if widened else ""


def holds_bfloat16(model: nn.Module) -> bool:
    """Whether a parameter is of bfloat16, or a layer that is lowered."""
    lowered = (y.layer_dtype for y in model.modules() if isinstance(y, BitmaskLinear))
    return torch.bfloat16 in (*lowered, *(p.dtype for p in model.parameters()))


def in_float32(model: nn.Module) -> nn.Module:
    """A copy in which all that is bfloat16 is float32, tied where it was; the rest is shared.

    That is parameters, buffers and other tensors, and dtypes that modules or their configurations
    name. Float32 stays as it is.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = (module._parameters, module._buffers, vars(module))
        for tensor in (value for some in held for value in some.values()):
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = _widened(tensor)
    wide = copy.deepcopy(model, memo)
    for module in wide.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "dtype", None) is torch.bfloat16:
            config.dtype = torch.float32
        named = vars(module)
        named.update({k: torch.float32 for k, v in named.items() if v is torch.bfloat16})
    return wide


def inputs_in_float32(inputs: Any) -> Any:
    """Nested inputs whose bfloat16 tensors are float32."""
    return pytree.tree_map_only(Tensor, _widened, inputs)


def _widened(tensor: Tensor) -> Tensor:
    if tensor.dtype is not torch.bfloat16:
        return tensor
    wide = tensor.detach().float()
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(wide, tensor.requires_grad) if is_parameter else wide
