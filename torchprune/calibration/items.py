"""One item of calibration data, in the forms users have, as what a model can be called with.

A row of a dataset is one example without an axis for a batch; token ids may be lists or one text's
vector; a table has columns that are not the model's.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn


def is_dataset(data: Any) -> bool:
    """Whether iterating gives rows of a table (a `datasets.Dataset`, also a streamed one)."""
    return not isinstance(data, Mapping) and hasattr(data, "column_names")


def as_example(row: Any) -> Any:
    """A table's row with an axis for the batch, which is of one."""
    if not isinstance(row, Mapping):
        return row
    whole = {key: _tensor(value) for key, value in row.items()}
    ids = whole.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() > 1:  # rows that are batches themselves
        return whole
    return {k: v.unsqueeze(0) if isinstance(v, Tensor) else v for k, v in whole.items()}


def as_call(item: Any, model: nn.Module) -> Any:
    """An item with token ids of (batch, length), where these are what the model takes.

    A list of numbers is token ids for any model, since nothing else is called with it.
    """
    if isinstance(item, list) and item and _numbers(item) is not None:
        item = _tensor(item)
        return item if item.dim() > 1 else item.unsqueeze(0)
    if getattr(getattr(model, "module", model), "main_input_name", "") != "input_ids":
        return item
    if isinstance(item, Tensor):
        return item.unsqueeze(0) if item.dim() == 1 else item
    if not isinstance(item, Mapping):
        return item
    whole = {key: _tensor(value) for key, value in item.items()}
    ids = whole.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() == 1:
        return {k: v.unsqueeze(0) if isinstance(v, Tensor) else v for k, v in whole.items()}
    return whole


def columns_of(model: nn.Module, masking: object = None) -> Callable[[str, Any], bool]:
    """Tells whether a model takes a value under a name, as its forward is declared.

    Args:
        masking: a column that says which tokens count: left out unless it is declared.
    """
    forward = getattr(type(model), "forward", None)
    if forward is None or forward is nn.Module.forward:
        return lambda name, value: name != masking
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return lambda name, value: name != masking
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for rest in (p for p in parameters if p.kind is p.VAR_KEYWORD):
        listed = typing.get_args(rest.annotation)
        if typing.get_origin(rest.annotation) is not typing.Unpack or not listed:
            return lambda name, value: name in names or not (name == masking or _is_words(value))
        names |= set(listed[0].__annotations__)
    return lambda name, value: name in names


def _is_words(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_is_words, value))
    return isinstance(value, str | bytes)


def _numbers(value: Any) -> Tensor | None:
    """Numbers in lists of one length, as a tensor."""
    first = value
    while isinstance(first, list) and first:
        first = first[0]
    if not isinstance(first, Number):
        return None
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _tensor(value: Any) -> Any:
    """Arrays, numbers and lists of numbers as tensors; other things as they are."""
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "__array__") and not isinstance(value, list | tuple):
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            return value
    if isinstance(value, list) and value and all(isinstance(one, Tensor) for one in value):
        shapes = {one.shape for one in value}
        return torch.stack(value) if len(shapes) == 1 else value
    if isinstance(value, list | Number):
        made = _numbers(value)
        return value if made is None else made
    return value
