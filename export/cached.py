"""A decoder-only language model with its key-value cache as plain tensors in and out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchprune.errors import ExportError, MissingExtraError
from torchprune.export.sizes import asked_of, bounds, varies

PAST = 3
"""Tokens in the cache of the example."""

_BATCH, _NEW, _SEEN = "batch", "new", "seen"
"""What a size of a step counts: rows, new tokens, past and new tokens."""

_ROWS, _LENGTH, _TOTAL = "batch_size", "sequence_length", "total_sequence_length"
_BEFORE = "past_sequence_length"
"""What optimum and transformers.js call these sizes, and that of the past."""

_STEPS = (3, 4, 6), (2, 5, 8)
"""Batch, past and new of two steps that tell which is which."""


class _SeenError(Exception):
    """The inputs of a step are known."""


class CachedModel(nn.Module):
    """`model(input_ids, attention_mask, prepared, past)` -> logits, the cache with the new tokens.

    `prepared` are the other tensors with which `generate` calls the model, such as `position_ids`.
    `past` is a flat list, for every layer its keys and its values, (batch, heads, past, size) each;
    a past of length 0 begins a text. Layers with a sliding window keep all of their past too: what
    they may not see is masked.

    Raises:
        MissingExtraError: without transformers.
        ExportError: a model without such a cache.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        try:
            from transformers import DynamicCache, GenerationConfig
        except ImportError:
            raise MissingExtraError("transformers", "transformers", "with_cache") from None
        self.model, self._cache = model, DynamicCache
        if hasattr(model, "generation_config"):  # what a user set for texts is not for a step
            usual: Any = GenerationConfig
            model.generation_config = usual()
        self.layers, self.empty = _layers_of(model)
        self.count = max(self.layers) + 1
        first, second = (self._prepared(*self._text(None, *step), step[1])[0] for step in _STEPS)
        self.prepared = {
            name: _roles(first[name].shape, second[name].shape, name) for name in first
        }

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, prepared: list[Tensor], past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """One step over the new tokens."""
        pairs: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * self.count
        for layer, keys, values in zip(self.layers, past[::2], past[1::2], strict=True):
            pairs[layer] = keys, values
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            **dict(zip(self.prepared, prepared, strict=True)),
            past_key_values=self._cache(pairs),
            use_cache=True,
        )
        return out.logits, self._flat(out.past_key_values)

    def example(self, tokens: Tensor | None, batch: int, past: int, new: int) -> tuple[Any, ...]:
        """Inputs of a step, those that `generate` would give; some rows are padded on the left.

        Args:
            tokens: (rows, length) ids to take, again where there are too few; None for any.
            batch, past, new: sizes.
        """
        ids, mask = self._text(tokens, batch, past, new)
        prepared, cache = self._prepared(ids, mask, past)
        missing = [name for name in self.prepared if name not in prepared]
        if missing:
            raise ExportError(f"with_cache: generate gives {missing[0]} only to some steps")
        return ids[:, past:], mask, [prepared[name] for name in self.prepared], cache

    def prepared_of(self, ids: Tensor, mask: Tensor, past: int) -> list[Tensor]:
        """What `generate` gives beside (batch, past + new) ids and their mask, after that past."""
        made, _ = self._prepared(ids, mask, past)
        return [made[name] for name in self.prepared]

    def names(self) -> tuple[list[str], list[str]]:
        """Names of inputs and outputs, as is usual for such graphs."""
        parts = [f"{i}.{part}" for i in self.layers for part in ("key", "value")]
        past = [f"past_key_values.{part}" for part in parts]
        return (
            ["input_ids", "attention_mask", *self.prepared, *past],
            ["logits", *(f"present.{part}" for part in parts)],
        )

    def size_names(self) -> list[dict[int, str]]:
        """What the axes of every input count, as is usual for such graphs."""
        usual = {_BATCH: _ROWS, _NEW: _LENGTH, _SEEN: _TOTAL}
        prepared = [
            {axis: usual[role] for axis, role in roles.items()} for roles in self.prepared.values()
        ]
        past = [{0: _ROWS, 2: _BEFORE}] * (2 * len(self.layers))
        return [{0: _ROWS, 1: _LENGTH}, {0: _ROWS, 1: _TOTAL}, *prepared, *past]

    def dynamic_shapes(self, given: Any) -> tuple[Any, ...]:
        """Those given for (input_ids, attention_mask, past), or batch, new tokens and past vary.

        Sizes of what `generate` prepares follow.
        """
        if given is None:
            auto = torch.export.Dim.AUTO
            ids = mask = {0: auto, 1: auto}
            past: Any = [{0: auto, 2: auto}] * (2 * len(self.layers))
        elif isinstance(given, Sequence) and len(given) == 3:
            ids, mask, past = given
        else:
            raise ExportError(
                "with_cache: dynamic_shapes are those of (input_ids, attention_mask, [past, ...])"
            )
        of = {_BATCH: asked_of(ids, 0), _NEW: asked_of(ids, 1), _SEEN: asked_of(mask, 1)}
        prepared = [
            {axis: of[role] for axis, role in roles.items() if of[role] is not None}
            for roles in self.prepared.values()
        ]
        return ids, mask, prepared, past

    def sizes(
        self, shapes: tuple[Any, ...], example: tuple[int, int, int], wish: tuple[int, int, int]
    ) -> tuple[int, int, int]:
        """Batch, past and new as wished, within bounds, where they vary, else the example's."""
        ids, _, _, past = shapes
        dims = asked_of(ids, 0), asked_of(past[0], 2), asked_of(ids, 1)
        made = []
        for dim, old, number in zip(dims, example, wish, strict=True):
            low, high = bounds(dim)
            number = number if high is None else min(number, high)
            made.append(max(number, low) if varies(dim) else old)
        batch, before, new = made
        return batch, before, new

    @staticmethod
    def flat(shapes: tuple[Any, ...]) -> list[Any]:
        """The entry of every input, flat."""
        ids, mask, prepared, past = shapes
        return [ids, mask, *prepared, *past]

    def _text(
        self, tokens: Tensor | None, batch: int, past: int, new: int
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask, (batch, past + new) each; only what is past may be padding."""
        mask = torch.ones(batch, past + new, dtype=torch.int64)
        for row in range(batch):
            mask[row, : row % max(past, 1)] = 0
        if tokens is None:
            return torch.ones_like(mask), mask
        rows, columns = (torch.arange(n) % s for n, s in zip(mask.shape, tokens.shape, strict=True))
        return tokens.cpu()[rows][:, columns], mask

    def _prepared(
        self, ids: Tensor, mask: Tensor, past: int
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """What `generate` gives the model after the past, beside ids and mask; and the past."""
        cache, seen = self._cache(), dict[str, Any]()
        parts = [torch.zeros(len(ids), *shape, dtype=dtype) for shape, dtype in self.empty]
        if past:
            self._step(ids[:, :past], mask[:, :past], cache)
            parts = self._flat(cache)

        def stop(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            seen.update(kwargs)
            raise _SeenError

        handle = self.model.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._step(ids, mask, cache)
        except _SeenError:
            pass
        finally:
            handle.remove()
        known = ("input_ids", "attention_mask")
        tensors = {k: v for k, v in seen.items() if isinstance(v, Tensor) and k not in known}
        return tensors, parts

    def _step(self, ids: Tensor, mask: Tensor, cache: Any) -> None:
        """Let `generate` read what is new, as it does before its first token."""
        model: Any = self.model
        with torch.no_grad():
            if callable(getattr(model, "generate", None)):
                model.generate(
                    ids,
                    attention_mask=mask,
                    past_key_values=cache,
                    max_new_tokens=1,
                    do_sample=False,
                    pad_token_id=0,
                )
            else:
                past = cache.get_seq_length()
                model(
                    input_ids=ids[:, past:],
                    attention_mask=mask,
                    **_positions(model, mask, past),
                    past_key_values=cache,
                    use_cache=True,
                )

    def _flat(self, cache: Any) -> list[Tensor]:
        layers = [cache.layers[layer] for layer in self.layers]
        return [part for layer in layers for part in (layer.keys, layer.values)]


def _layers_of(model: nn.Module) -> tuple[list[int], list[tuple[tuple[int, ...], torch.dtype]]]:
    """Layers with keys and values of their own, and the shapes of both for no tokens, row by row.

    Raises:
        ExportError: the model keeps other things, or nothing.
    """
    with torch.no_grad():
        out: Any = model(torch.ones(2, PAST, dtype=torch.int64), use_cache=True)
    cache: Any = getattr(out, "past_key_values", None)
    name = type(model).__name__
    if not hasattr(cache, "layers") or not hasattr(out, "logits"):
        raise ExportError(
            "with_cache is for decoder-only language models; a "
            f"{name} gives no logits with a cache of layers"
        )
    layers: list[int] = []
    empty: list[tuple[tuple[int, ...], torch.dtype]] = []
    for at, layer in enumerate(cache.layers):
        parts: list[Any] = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        states = any(hasattr(layer, key) for key in ("conv_states", "recurrent_states"))
        if not states and not getattr(layer, "is_initialized", True):
            continue  # a layer that reads another's
        if states or any(p is None or p.dim() != 4 or p.shape[2] != PAST for p in parts):
            raise ExportError(
                f"with_cache: the cache of a {name} is not keys and values of all past tokens; "
                "export it without"
            )
        layers.append(at)
        empty += [((part.shape[1], 0, part.shape[3]), part.dtype) for part in parts]
    return layers, empty


def _positions(model: nn.Module, mask: Tensor, past: int) -> dict[str, Tensor]:
    """The rule of `generate`, for a model that has none."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]}


def _roles(first: Sequence[int], second: Sequence[int], name: str) -> dict[int, str]:
    """What the sizes of a prepared input count, from its shapes at two steps."""
    counts = dict(zip(zip(*map(_counts, _STEPS), strict=True), (_BATCH, _NEW, _SEEN), strict=True))
    roles = {}
    for axis, pair in enumerate(zip(first, second, strict=True)):
        if pair[0] != pair[1]:
            if pair not in counts:
                raise ExportError(
                    f"with_cache: axis {axis} of {name} follows neither batch nor tokens"
                )
            roles[axis] = counts[pair]
    return roles


def _counts(step: tuple[int, int, int]) -> tuple[int, int, int]:
    batch, past, new = step
    return batch, new, past + new
