"""Calibration data: any iterable of batches, read, checked and moved to the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from torchprune.calibration.items import as_call, as_example, columns_of, is_dataset
from torchprune.calibration.nested import mapped, tensors_in
from torchprune.calibration.replay import private
from torchprune.calibration.token_masks import TokenMask, token_mask_of
from torchprune.errors import CalibrationError

ACCEPTED_DATA = (
    "data must be an iterable of batches, each a tensor (passed positionally), a tuple or list "
    "(positional) or a mapping (keywords): a DataLoader, a list of token tensors, a generator, or "
    "a datasets.Dataset, each row of which is a batch of one"
)

TEXTS_NEED_A_TOKENIZER = (
    "texts need the model's tokenizer: sparsify(model, spec, texts, tokenizer=tokenizer), or make "
    "batches of them first: torchprune.text_batches(tokenizer, texts)"
)


@dataclass(frozen=True)
class Batch:
    """One call of the model.

    Attributes:
        tokens: (items, length) bool, which tokens count; None where that is to be found out.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tokens: Tensor | None = None

    def tensors(self) -> Iterator[Tensor]:
        """The tensors the batch was made of."""
        yield from (tensor for _, tensor in tensors_in((self.args, self.kwargs)))

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """The shapes of those tensors."""
        return tuple(tensor.shape for tensor in self.tensors())

    def private(self) -> Batch:
        """The batch with copies of what a call of the model may change, such as caches."""
        kwargs = {key: private(value) for key, value in self.kwargs.items()}
        return Batch(tuple(private(value) for value in self.args), kwargs)

    def run(self, model: Callable[..., Any]) -> Any:
        """What a model gives for the batch, which stays as it is."""
        own = self.private()
        return model(*own.args, **own.kwargs)

    def out_of_inference(self) -> Batch:
        """The batch with ordinary tensors in place of those made in inference mode."""

        def ordinary(_: object, value: Tensor) -> Tensor:
            return value.clone() if value.is_inference() else value

        args, kwargs = mapped((self.args, self.kwargs), ordinary)
        return Batch(args, kwargs, self.tokens)

    def is_whole(self, x: Tensor) -> bool:
        """Whether a layer's input has a row for everything in the batch, and in its order.

        A matrix whose rows are not as many as the batch's items, or its tokens, holds what a router
        chose: another run may choose otherwise, and its rows do not correspond.
        """
        if x.dim() != 2:
            return True
        leading = (shape[:k] for shape in self.shapes for k in range(1, len(shape) + 1))
        return any(part.numel() == len(x) for part in leading)


@dataclass(frozen=True)
class Taken:
    """What was read of the data.

    Attributes:
        batches: on the model's device.
        more: whether more were offered than were to be read.
        strangers: columns that the model does not take.
    """

    batches: list[Batch]
    more: bool
    strangers: tuple[str, ...] = ()


def read_batches(
    data: Iterable[Any], model: nn.Module, max_batches: int, token_mask: TokenMask = None
) -> Taken:
    """Up to `max_batches` batches on the model's device.

    Raises:
        CalibrationError: data is no iterable of batches, or is empty; or a token mask does not
            belong to them.
    """
    if isinstance(data, Tensor):
        raise CalibrationError(
            f"data is one tensor {tuple(data.shape)}; {ACCEPTED_DATA} (for one batch: [data])"
        )
    if isinstance(data, str | PathLike):
        raise CalibrationError(f"data is a {type(data).__name__}; {TEXTS_NEED_A_TOKENIZER}")
    if isinstance(data, bytes | Mapping) or not isinstance(data, Iterable):
        raise CalibrationError(f"data is a {type(data).__name__}; {ACCEPTED_DATA}")
    if max_batches < 1:
        raise CalibrationError(f"max_batches must be at least 1, got {max_batches}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    takes, rows = columns_of(model, token_mask), is_dataset(data)
    batches: list[Batch] = []
    strangers: dict[str, None] = {}
    for item in islice(iter(data), max_batches + 1):
        if len(batches) == max_batches:
            return Taken(batches, True, tuple(strangers))
        tokens = token_mask_of(token_mask, item, len(batches))
        whole = as_call(as_example(item) if rows else item, model)
        batch = _as_batch(whole, device, tokens)
        unknown = [name for name, value in batch.kwargs.items() if not takes(name, value)]
        if len(unknown) < len(batch.kwargs):  # else the model says best what it takes
            for name in unknown:
                batch.kwargs.pop(name, None)
            strangers.update(dict.fromkeys(unknown))
        batches.append(batch)
    if not batches:
        raise CalibrationError("data holds no batches (an exhausted generator?)")
    return Taken(batches, False, tuple(strangers))


def _as_batch(item: Any, device: torch.device, tokens: Tensor | None) -> Batch:
    if _is_text(item):
        raise CalibrationError(f"a batch is text ({type(item).__name__}); {TEXTS_NEED_A_TOKENIZER}")

    def moved(_: object, value: Tensor) -> Tensor:
        return value.to(device)

    tokens = None if tokens is None else tokens.to(device)
    if isinstance(item, Tensor):
        return Batch((item.to(device),), {}, tokens)
    if isinstance(item, Mapping):
        return Batch((), {str(k): mapped(v, moved) for k, v in item.items()}, tokens)
    if isinstance(item, tuple | list):
        return Batch(tuple(mapped(v, moved) for v in item), {}, tokens)
    raise CalibrationError(f"a batch is a {type(item).__name__}; {ACCEPTED_DATA}")


def _is_text(item: Any) -> bool:
    """Whether an item holds texts and no tensor: a string, strings, a row, a conversation."""
    if isinstance(item, Mapping):
        item = list(item.values())
    if isinstance(item, list | tuple):
        texts = any(map(_is_text, item))
        return texts and not any(isinstance(value, Tensor) for value in item)
    return isinstance(item, str)
