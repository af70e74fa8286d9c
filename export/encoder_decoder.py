"""An encoder-decoder with its key-value cache as three calls with plain tensors in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchprune.errors import ExportError, MissingExtraError
from torchprune.export.bfloat16 import holds_bfloat16, in_float32, inputs_in_float32
from torchprune.export.call import Call, Sample, as_call, plain_of, run
from torchprune.export.promises import promised

ENCODER, FIRST, NEXT = "encoder_model", "decoder_model", "decoder_with_past_model"
"""Names of the three graphs, as optimum and transformers.js know them."""

MERGED = "decoder_model_merged"
"""What the second and the third are called in one."""

SWITCH = "use_cache_branch"
"""Its input that says whether there is a past: bool, (1,)."""

_PARTS = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")

_UNUSUAL, _CHECKED = (5, 7, 3, 6), ((1, 4, 1, 1), (3, 9, 2, 4))
"""Rows, length of the source, new and past tokens: to export with, to check at."""

_USUAL = (2, 3)
"""New and past tokens of the example."""


class Encoder(nn.Module):
    """`encoder(source, attention_mask)` -> `last_hidden_state`; audio has no mask."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.get_encoder()
        self.source = model.main_input_name

    def forward(self, source: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(batch, length) ids or (batch, channels, frames) -> (batch, source length, size)."""
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        given = {self.source: source, **mask}
        return self.encoder(**given, return_dict=True).last_hidden_state


class FirstStep(nn.Module):
    """`first(encoder_attention_mask, input_ids, encoder_hidden_states)` -> logits, the cache.

    The cache is a flat list, for every layer keys and values of the decoder's tokens, then those of
    the source, (batch, heads, length, size) each.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, encoder_attention_mask: Tensor | None, input_ids: Tensor, states: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The first tokens of a text."""
        out = _decoded(self.model, encoder_attention_mask, input_ids, states, None)
        return out.logits, _flat(out.past_key_values)


class NextStep(nn.Module):
    """`next(encoder_attention_mask, input_ids, past)` -> logits, keys and values of the decoder.

    Those of the source do not change, so they are not given again.
    """

    def __init__(self, model: Any, width: int) -> None:
        super().__init__()
        self.model, self.width = model, width

    def forward(
        self, encoder_attention_mask: Tensor | None, input_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """One step over the new tokens."""
        from transformers import DynamicCache, EncoderDecoderCache

        own = DynamicCache(list(zip(past[::4], past[1::4], strict=True)))
        source = DynamicCache(list(zip(past[2::4], past[3::4], strict=True)))
        cache = EncoderDecoderCache(own, source)
        keys = past[2]  # states of the source are read through these alone
        states = keys.new_zeros(keys.shape[0], keys.shape[2], self.width)
        out = _decoded(self.model, encoder_attention_mask, input_ids, states, cache)
        flat = _flat(out.past_key_values)
        return out.logits, [part for at, part in enumerate(flat) if at % 4 < 2]


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether it is a transformers model of an encoder and a decoder that writes texts."""
    config: Any = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and hasattr(model, "get_encoder")


def prepare_three(
    model: nn.Module,
    example_inputs: Any,
    accept: Callable[[nn.Module], object],
    *,
    packed: bool = False,
) -> dict[str, Call]:
    """The three calls, by the names of their graphs; a bfloat16 model's are in float32.

    Args:
        example_inputs: with what the encoder reads: ids (batch, length), or features (batch, ...),
            of which only the batch may vary. Other inputs are not read.
        accept, packed: as for `prepare`.

    Raises:
        MissingExtraError: without transformers.
        ExportError: no such example, or a model without such a cache.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise MissingExtraError("transformers", "transformers", "with_cache") from None
    plain: Any = plain_of(model, packed=packed)
    accept(plain)
    widened = holds_bfloat16(plain)
    if widened:
        plain, example_inputs = in_float32(plain), inputs_in_float32(example_inputs)
    args, kwargs = as_call(example_inputs)
    given = kwargs.get(plain.main_input_name, args[0] if args else None)
    if not isinstance(given, Tensor) or given.dim() < 2:
        raise ExportError(f"with_cache needs {plain.main_input_name} of a batch as the example")
    with promised(f"with_cache: a {type(plain).__name__} cannot take steps with a cache"):
        calls = _calls_of(plain, given.contiguous())
    return {name: replace(call, widened=widened) for name, call in calls.items()}


def _calls_of(model: Any, example: Tensor) -> dict[str, Call]:
    text = not example.is_floating_point()
    encoder, first = Encoder(model).eval(), FirstStep(model).eval()
    start = example[:1], *([torch.ones_like(example[:1])] if text else [])
    with torch.no_grad():
        width = encoder(*start).shape[-1]
    after = NextStep(model, width).eval()
    source = _Source(example, encoder)
    _, cache = first(source.mask(1, 4), torch.ones(1, 1, dtype=torch.int64), source.states(1, 4))
    layers = range(len(cache) // 4)
    past = [f"{i}.{part}" for i in layers for part in _PARTS]
    own = [f"present.{i}.{part}" for i in layers for part in _PARTS[:2]]
    auto = torch.export.Dim.AUTO
    row: dict[int, Any] = {0: auto}
    tokens: dict[int, Any] = {0: auto, 1: auto}
    keys = {0: auto, 2: auto} if text else row
    pasts = [{0: auto, 2: auto} if at % 4 < 2 else keys for at in range(len(past))]
    rows, new, length = "batch_size", "decoder_sequence_length", "encoder_sequence_length"
    before = {0: rows, 2: "past_decoder_sequence_length"}
    sourced, named = {0: rows, 1: length}, [{0: rows, 1: new}]
    masks = [sourced] if text else []
    kept = [before if at % 4 < 2 else {0: rows, 2: length} for at in range(len(past))]
    masked = {"encoder_attention_mask": tokens} if text else {}
    states = {"encoder_hidden_states": tokens if text else row}

    def made(rows: int, length: int, new: int, before: int) -> tuple[Any, ...]:
        """Arguments of the three."""
        mask, ids = source.mask(rows, length), source.ids(rows, new)
        hidden = source.states(rows, length)
        with torch.no_grad():
            _, cache = first(mask, source.ids(rows, before), hidden)
        given = (source.given(rows, length), *([mask] if text else []))
        return given, (mask, ids, hidden), (mask, ids, cache)

    usual = (len(example), example.shape[1] if text else 0, *_USUAL)
    sizes = [usual, _UNUSUAL, *_CHECKED]
    args = [made(*size) for size in sizes]
    main = {encoder.source: tokens if text else row}
    encoded = {**main, **({"attention_mask": tokens} if text else {})}
    names = (list(encoded), ["last_hidden_state"])
    none = () if text else (None,)
    return {
        ENCODER: _call(
            encoder,
            [a[0] for a in args],
            names,
            tuple(encoded.values()),
            encoded,
            [sourced if text else {0: rows}, *masks],
        ),
        FIRST: _call(
            first,
            [a[1] for a in args],
            ([*masked, "input_ids", *states], ["logits", *(f"present.{name}" for name in past)]),
            (*none, *masked.values(), tokens, *states.values()),
            {**masked, "input_ids": tokens, **states},
            [*masks, *named, sourced if text else {0: rows}],
        ),
        NEXT: _call(
            after,
            [a[2] for a in args],
            ([*masked, "input_ids", *(f"past_key_values.{n}" for n in past)], ["logits", *own]),
            (*none, *masked.values(), tokens, pasts),
            {**masked, "input_ids": tokens, **dict(zip(past, pasts, strict=True))},
            [*masks, *named, *kept],
        ),
    }


class _Source:
    """What an encoder reads and gives, at any size: of the example, again where it ends."""

    def __init__(self, example: Tensor, encoder: nn.Module) -> None:
        self._example, self._encoder = example, encoder
        self._text = not example.is_floating_point()

    def given(self, rows: int, length: int) -> Tensor:
        made = self._example[torch.arange(rows) % len(self._example)]
        return made[:, torch.arange(length) % made.shape[1]] if self._text else made

    def mask(self, rows: int, length: int) -> Tensor | None:
        """Some rows are padded on the right; None for what has no mask."""
        if not self._text:
            return None
        kept = length - torch.arange(rows)[:, None] % max(length - 1, 1)
        return (torch.arange(length) < kept).long()

    def ids(self, rows: int, count: int) -> Tensor:
        return (torch.arange(rows)[:, None] + torch.arange(count)) % 7 + 1

    def states(self, rows: int, length: int) -> Tensor:
        mask = self.mask(rows, length)
        given = (self.given(rows, length), *([] if mask is None else [mask]))
        with torch.no_grad():
            found: Tensor = self._encoder(*given)
        return found


def _call(
    module: nn.Module,
    args: list[tuple[Any, ...]],
    names: tuple[list[str], list[str]],
    shapes: tuple[Any, ...],
    wanted: Mapping[str, Mapping[int, Any]],
    size_names: list[dict[int, str]],
) -> Call:
    samples = [Sample(one, {}, run(module, one, {})) for one in args]
    return Call(
        module,
        args[1],
        {},
        shapes,
        samples=[samples[0], *samples[2:]],
        inputs=names[0],
        wanted=[set(dims) for dims in wanted.values()],
        names=names,
        size_names=size_names,
    )


def _decoded(model: Any, mask: Tensor | None, ids: Tensor, states: Tensor, cache: Any) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return model(
        decoder_input_ids=ids,
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        **({} if mask is None else {"attention_mask": mask}),
        past_key_values=cache,
        use_cache=True,
    )


def _flat(cache: Any) -> list[Tensor]:
    """
    Raises:
        ExportError: it is no cache of a decoder's tokens and a source.
    """
    try:
        own, source = cache.self_attention_cache.layers, cache.cross_attention_cache.layers
        pairs = [(y.keys, y.values, z.keys, z.values) for y, z in zip(own, source, strict=True)]
    except (AttributeError, ValueError):
        raise ExportError(
            "with_cache: the model keeps no keys and values of its tokens and of the source"
        ) from None
    return [part for layer in pairs for part in layer]
