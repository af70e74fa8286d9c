"""Batches of so many rows, made from one example or given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchprune.calibration.batches import Batch, read_batches
from torchprune.calibration.nested import mapped
from torchprune.calibration.text import context_of
from torchprune.errors import CalibrationError
from torchprune.study.speed.profile_records import ProfileError

_LIKE_TOKENS = ("attention_mask", "token_type_ids")


@dataclass(frozen=True)
class RowBatches:
    """Calls of a model by their number of rows.

    Attributes:
        unit: what a row is: "token" for language models, "row" for others.
        missing: rows that no batch could be made of, and why.
    """

    unit: str
    batches: dict[int, Batch]
    missing: dict[int, str]


def row_batches(model: nn.Module, inputs: Any, rows: Sequence[int] | None) -> RowBatches:
    """Read `inputs` of `profile`: one example, or a mapping of rows -> batch.

    Of an example for a language model (`input_ids`), n rows are n tokens: one text of n, or several
    as long as the model's context. Of another, n rows are n items of the first axis of its tensors.
    Items are taken in order and begin anew.

    Raises:
        ProfileError: rows are no numbers, or no batch is there or can be made.
    """
    given = isinstance(inputs, Mapping) and bool(inputs) and all(type(k) is int for k in inputs)
    wanted = checked_rows(rows, sorted(inputs) if given else (1, 8, 64, 512))
    if given:
        if absent := [n for n in wanted if n not in inputs]:
            raise ProfileError(
                f"inputs has batches of {', '.join(map(str, sorted(inputs)))} rows, and none of "
                f"{', '.join(map(str, absent))}; leave rows= out, or give one example"
            )
        made = {n: _read(model, inputs[n]) for n in wanted}
        return RowBatches("token" if _tokens_at(model, made[wanted[0]]) else "row", made, {})
    example = _read(model, inputs)
    at = _tokens_at(model, example)
    found = RowBatches("row" if at is None else "token", {}, {})
    for n in wanted:
        try:
            made_of = _of_items(example, n) if at is None else _of_tokens(model, example, at, n)
            found.batches[n] = made_of
        except ProfileError as error:
            found.missing[n] = str(error)
    if not found.batches:
        raise ProfileError("; ".join(dict.fromkeys(found.missing.values())))
    return found


def checked_rows(rows: Any, usual: Sequence[int]) -> list[int]:
    """Rows in order, each once.

    Raises:
        ProfileError: they are no whole numbers of 1 and more, or none.
    """
    some = list(usual if rows is None else [rows] if type(rows) is int else rows)
    if not some or any(type(n) is not int or n < 1 for n in some):
        raise ProfileError(
            f"rows must be whole numbers of 1 and more, such as (1, 8), got {rows!r}"
        )
    return sorted(set(some))


def _read(model: nn.Module, inputs: Any) -> Batch:
    try:
        return read_batches([inputs], model, 1).batches[0]
    except CalibrationError as error:
        raise ProfileError(f"inputs cannot be used: {error}") from None


def _tokens_at(model: nn.Module, batch: Batch) -> int | str | None:
    """Where a batch holds token ids (texts, length): a keyword, the place 0, or nowhere."""

    def are_ids(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()

    if are_ids(batch.kwargs.get("input_ids")):
        return "input_ids"
    first = next(iter(inspect.signature(model.forward).parameters), "")
    return 0 if batch.args and first == "input_ids" and are_ids(batch.args[0]) else None


def _of_tokens(model: nn.Module, batch: Batch, at: int | str, n: int) -> Batch:
    others = [k for k in batch.kwargs if k not in ("input_ids", *_LIKE_TOKENS)]
    others = [k for k in others if isinstance(batch.kwargs[k], Tensor)]
    if others or len(batch.args) > 1:
        what = ", ".join(others) or "its second input"
        raise ProfileError(
            f"no batch of {n} tokens can be made of an example with {what}; give batches: "
            "inputs={rows: batch}"
        )
    context = context_of(model)
    length = n if context is None else min(n, context)
    if n % length:
        raise ProfileError(f"{n} tokens are no whole texts of the model's context, {context}")
    ids = batch.args[0] if at == 0 else batch.kwargs["input_ids"]
    flat = ids.reshape(-1)
    made = flat[torch.arange(n, device=flat.device) % len(flat)].view(-1, length)
    if at == 0:
        return Batch((made,), dict(batch.kwargs))
    kwargs = {k: made if k == "input_ids" else _like(k, v, made) for k, v in batch.kwargs.items()}
    return Batch((), kwargs)


def _like(name: str, value: Any, ids: Tensor) -> Any:
    """A mask of ones and types of zeros, as a text without padding has them."""
    if not isinstance(value, Tensor):
        return value
    fill = 1 if name == "attention_mask" else 0
    return torch.full_like(ids, fill, dtype=value.dtype)


def _of_items(batch: Batch, n: int) -> Batch:
    count = next((len(t) for t in batch.tensors() if t.dim()), 0)
    if not count:
        raise ProfileError("inputs holds no tensor with a first axis to make rows of")

    def taken(_: object, value: Tensor) -> Tensor:
        if not value.dim() or len(value) != count:
            return value
        return value[torch.arange(n, device=value.device) % count]

    args, kwargs = mapped((batch.args, batch.kwargs), taken)
    return Batch(args, kwargs)
