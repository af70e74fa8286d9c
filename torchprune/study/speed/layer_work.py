"""The layers that multiply: their names, bytes and FLOPs, and how many multiply by zeros."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from torchprune.calibration.batches import Batch
from torchprune.lowering.modules import BitmaskLinear
from torchprune.masking.matrices import is_transposed_linear
from torchprune.masking.packing import zeros_in


def is_product(module: nn.Module) -> bool:
    """Linear layers, whatever holds their weight, and convolutions."""
    kinds = (nn.Linear, _ConvNd, BitmaskLinear)
    return isinstance(module, kinds) or is_transposed_linear(module)


def products_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that multiply by name, each module once."""
    return {name: module for name, module in model.named_modules() if is_product(module)}


def parts_of(tensor: Tensor) -> list[Tensor]:
    """What a tensor is made of: itself, or the parts of a quantized or compressed one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = cast(Any, tensor).__tensor_flatten__()
    return [part for name in names for part in parts_of(getattr(tensor, name))]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors together, those that share their memory once."""
    sizes: dict[tuple[str, int], int] = {}
    for tensor in tensors:
        for part in parts_of(tensor):
            if part.numel():
                key = (str(part.device), part.data_ptr())
                sizes[key] = max(sizes.get(key, 0), part.nbytes)
    return sum(sizes.values())


def held_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers (masks among them), tied ones once."""
    return bytes_of([*model.parameters(), *model.buffers()])


def read_bytes(model: nn.Module) -> int:
    """Those that a call reads whole: all but tables of embeddings that no other module holds."""
    tables = {m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    owned = [
        tensor
        for module in model.modules()
        if module not in tables
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]
    return bytes_of(owned)


@dataclass(frozen=True)
class Flops:
    """Floating point operations of a call: two for a multiplication and the addition after it.

    Attributes:
        total: of all matrix products, convolutions and attentions.
        by_zeros: those of layers whose weight in them is zero, so that leaving them out changes
            nothing. Kernels for dense weights compute them all the same.
        layers: of each layer, by name.
    """

    total: int
    by_zeros: int
    layers: dict[str, int]

    @property
    def share(self) -> float:
        """Of all, how many are by zeros."""
        return self.by_zeros / self.total if self.total else 0.0


def flops_of(model: nn.Module, batch: Batch) -> Flops:
    """Count by `torch.utils.flop_counter`; weights are read as they are, so fold masks first.

    Weights of layers that hold several (recurrent nets, attention of torch) count among all, not
    among those by zeros.
    """
    products = products_of(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        batch.run(model)
    counted = counter.get_flop_counts()
    root = type(model).__name__
    of = {
        name: sum(counted.get(f"{root}.{name}" if name else root, {}).values()) for name in products
    }
    zeros = 0
    for name, module in products.items():
        weight = module.weight
        if isinstance(weight, Tensor) and weight.numel() and of[name]:
            zeros += round(of[name] * zeros_in(weight) / weight.numel())
    return Flops(counter.get_total_flops(), zeros, of)
