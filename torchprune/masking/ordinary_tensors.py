"""Models made under `torch.inference_mode`, and calls made under it.

Such tensors can be neither written in place nor trained, for ever, and what is computed under that
mode is such a tensor. So what changes a model leaves the mode first and makes the model's tensors
ordinary ones: the same objects with the same values, tied as they were.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from torchprune.errors import TorchpruneError
from torchprune.masking.shards import free_gathered

F = TypeVar("F", bound=Callable[..., Any])


def on_ordinary_tensors(function: F) -> F:
    """Have a function of a model work, and leave the model, as if there were no inference mode."""

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        model = args[0] if args else kwargs.get("model")
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            if isinstance(model, nn.Module):
                make_ordinary(model)
                free_gathered(model)
            return function(*args, **kwargs)

    return cast(F, outside)


def make_ordinary(model: nn.Module) -> None:
    """Put ordinary tensors in the place of a model's inference tensors, in the same objects.

    Raises:
        TorchpruneError: something refers to such a tensor weakly, as compiled code does. Nothing
            is changed then.
    """
    found = {
        id(tensor): (f"{path}.{name}" if path else name, tensor)
        for path, module in model.named_modules()
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None and tensor.is_inference()
    }
    for name, tensor in found.values():
        if weakref.getweakrefcount(tensor):
            raise TorchpruneError(
                f"{name} was made under torch.inference_mode and cannot be written; what refers to "
                "it (compiled code, for one) keeps it from being replaced: build or load the model "
                "outside of that mode"
            )
    storages: dict[tuple[torch.device, int], torch.UntypedStorage] = {}
    for _, tensor in found.values():
        torch.utils.swap_tensors(tensor, _twin(tensor, storages))


def _twin(tensor: Tensor, storages: dict[tuple[torch.device, int], torch.UntypedStorage]) -> Tensor:
    """An ordinary tensor of the same values, layout, kind and attributes."""
    with torch.inference_mode(False), torch.no_grad():
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            twin = tensor.detach().clone()
        else:
            held = tensor.untyped_storage()
            place = tensor.device, held.data_ptr()
            if place not in storages:
                storages[place] = held.clone()
            twin = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            twin.set_(storages[place], tensor.storage_offset(), tensor.shape, tensor.stride())
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, tensor.requires_grad)
    twin.__class__ = type(tensor)
    vars(twin).update(vars(tensor))
    return twin
