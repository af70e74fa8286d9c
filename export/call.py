"""A model made ready to be exported, and the call that shows what it takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchprune.errors import ExportError
from torchprune.export.cached import CachedModel
from torchprune.export.hf import folded_copy
from torchprune.lowering.lower import lift


@dataclass(frozen=True)
class Call:
    """A plain module, an example of its inputs, and which of their sizes vary.

    `names` are those of the graph's inputs and outputs, where the format has names.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any
    names: tuple[list[str] | None, list[str] | None] = (None, None)


def prepare(
    model: nn.Module, example_inputs: Any, *, with_cache: bool, dynamic_shapes: Any, vary: bool
) -> Call:
    """Fold a copy of the model and read the example; see `to_onnx` for the arguments.

    Args:
        vary: let sizes vary where `dynamic_shapes` says nothing; else all are as in the example.

    Raises:
        ExportError: the example is no call, or does not fit `with_cache`.
    """
    plain = _exportable(lift(folded_copy(model)).eval())
    args, kwargs = _as_call(example_inputs)
    if with_cache:
        cached = CachedModel(plain)
        args = cached.example(_tokens_of(args, kwargs))
        if dynamic_shapes is None and vary:
            dynamic_shapes = cached.dynamic_shapes()
        return Call(cached, args, {}, dynamic_shapes, cached.names())
    _without_cache(plain)
    if dynamic_shapes is None and vary:
        dynamic_shapes = _vary(kwargs or args)
    return Call(plain, args, kwargs, dynamic_shapes)


def dtype_of(model: nn.Module, accepted: Sequence[torch.dtype], where: str) -> torch.dtype:
    """The dtype of all floating parameters.

    Raises:
        ExportError: there are several, or one that is not accepted.
    """
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(found) != 1 or not found <= set(accepted):
        known = " or all ".join(str(d).removeprefix("torch.") for d in accepted)
        raise ExportError(
            f"{where} writes models whose floating parameters are all {known}, got "
            f"{', '.join(sorted(str(d) for d in found)) or 'none'}: model.float() or model.half()"
        )
    return found.pop()


def folder_of(target: Path) -> Path:
    """The directory that a file goes to, made if need be.

    Raises:
        ExportError: the target is a directory itself.
    """
    if target.is_dir():
        raise ExportError(f"{target} is a directory, and a file is to be written")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent


def reason_of(error: BaseException) -> str:
    """What lies behind an error, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


def file_bytes(*files: str | os.PathLike[str] | None) -> int:
    """Bytes of some files together."""
    return sum(Path(file).stat().st_size for file in files if file is not None)


def _as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, Sequence) and not isinstance(example, str):
        return tuple(example), {}
    raise ExportError(
        "example_inputs must be a tensor, a tuple of positional or a mapping of keyword inputs, "
        f"got {type(example).__name__}"
    )


def _exportable(model: nn.Module) -> nn.Module:
    """Routed experts by batched products, which ONNX has, where transformers offers the choice."""
    choose = getattr(model, "set_experts_implementation", None)
    if callable(choose):
        choose("batched_mm")
    return model


def _without_cache(model: nn.Module) -> None:
    """No key-value caches among the outputs of a transformers model."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False


def _tokens_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        raise ExportError("with_cache needs token ids (batch, length) as the example")
    return tokens


def _vary(inputs: Any) -> Any:
    """Sizes that may vary: batches, and lengths of token sequences."""
    auto = torch.export.Dim.AUTO

    def sizes(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return None
        tokens = leaf.dim() > 1 and not leaf.is_floating_point()
        return {0: auto, 1: auto} if tokens else {0: auto}

    return pytree.tree_map(sizes, inputs)
