"""Calibration data: any iterable of batches, read, checked and moved to the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from torchprune.calibration.replay import private
from torchprune.errors import CalibrationError

ACCEPTED_DATA = (
    "data must be an iterable of batches, each a tensor (passed positionally), a tuple or list "
    "(positional) or a mapping (keywords): a DataLoader, a list of token tensors, a generator"
)

TEXTS_NEED_A_TOKENIZER = (
    "texts need the model's tokenizer: sparsify(model, spec, texts, tokenizer=tokenizer), or make "
    "batches of them first: torchprune.text_batches(tokenizer, texts)"
)


@dataclass(frozen=True)
class Batch:
    """One call of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> Iterator[Tensor]:
        """The tensors the batch was made of."""
        yield from (v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor))

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

        def ordinary(value: Any) -> Any:
            made_there = isinstance(value, Tensor) and value.is_inference()
            return value.clone() if made_there else value

        kwargs = {key: ordinary(value) for key, value in self.kwargs.items()}
        return Batch(tuple(ordinary(value) for value in self.args), kwargs)

    def is_whole(self, x: Tensor) -> bool:
        """Whether a layer's input has a row for everything in the batch, and in its order.

        A matrix whose rows are not as many as the batch's items, or its tokens, holds what a router
        chose: another run may choose otherwise, and its rows do not correspond.
        """
        if x.dim() != 2:
            return True
        leading = (shape[:k] for shape in self.shapes for k in range(1, len(shape) + 1))
        return any(part.numel() == len(x) for part in leading)

    def token_mask(
        self, shape: torch.Size, module_name: str, *, encoder_decoder: bool
    ) -> Tensor | None:
        """Which rows of a layer's input are tokens and not padding.

        The batch's `attention_mask` (batch, length), or in the decoder of an encoder-decoder its
        `decoder_attention_mask`, if it fits the input's leading shape (batch, length) or
        (batch * length).

        Args:
            shape: the input's shape without its last axis.

        Returns:
            bool of that shape, or None if every row counts.
        """
        in_decoder = (
            encoder_decoder
            and any("decoder" in part for part in module_name.split("."))
            and not _reads_encoder(module_name)
        )
        mask = self.kwargs.get("decoder_attention_mask" if in_decoder else "attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        if tuple(shape) not in (tuple(mask.shape), (mask.numel(),)):
            return None
        return mask.to(torch.bool).reshape(shape)


def _reads_encoder(module_name: str) -> bool:
    """Whether a decoder's layer projects the encoder's states (cross-attention keys, values)."""
    *path, last = module_name.split(".")
    crossing = any("EncDec" in p or "encoder_attn" in p or "crossattention" in p for p in path)
    return crossing and last in ("k", "v", "k_proj", "v_proj", "key", "value")


def read_batches(
    data: Iterable[Any], model: nn.Module, max_batches: int
) -> tuple[list[Batch], bool]:
    """Up to `max_batches` batches on the model's device, and whether more were offered.

    Raises:
        CalibrationError: data is no iterable of batches, or is empty.
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
    taken = islice(iter(data), max_batches + 1)
    batches: list[Batch] = []
    for item in taken:
        if len(batches) == max_batches:
            return batches, True
        batches.append(_as_batch(item, device))
    if not batches:
        raise CalibrationError("data holds no batches (an exhausted generator?)")
    return batches, False


def _as_batch(item: Any, device: torch.device) -> Batch:
    if _is_text(item):
        raise CalibrationError(f"a batch is text ({type(item).__name__}); {TEXTS_NEED_A_TOKENIZER}")
    if isinstance(item, Tensor):
        return Batch((_moved(item, device),), {})
    if isinstance(item, Mapping):
        return Batch((), {str(k): _moved(v, device) for k, v in item.items()})
    if isinstance(item, tuple | list):
        return Batch(tuple(_moved(v, device) for v in item), {})
    raise CalibrationError(f"a batch is a {type(item).__name__}; {ACCEPTED_DATA}")


def _is_text(item: Any) -> bool:
    """Whether an item holds texts and no tensor: a string, strings, a row, a conversation."""
    if isinstance(item, Mapping):
        item = list(item.values())
    if isinstance(item, list | tuple):
        texts = any(map(_is_text, item))
        return texts and not any(isinstance(value, Tensor) for value in item)
    return isinstance(item, str)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
