"""Texts that a causal language model writes after prompts, until a stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchprune.study.tasks.evaluation import EvaluationError, logits_of

NEW_TOKENS = 256
"""Tokens that are written at most where a task does not say."""

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Request:
    """A prompt's ids, and how to go on: the stops, how many tokens, what `generate` is told."""

    prompt: tuple[int, ...]
    stops: tuple[str, ...] = ()
    new_tokens: int = NEW_TOKENS
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, prompt: Sequence[int], options: Mapping[str, Any]) -> Request:
        """From a task's options: `until`, one of the names of the limit, and others."""
        rest = dict(options)
        until = rest.pop("until", None) or ()
        limits = [rest.pop(name, None) for name in _LIMITS]
        most = next((int(n) for n in limits if n is not None), NEW_TOKENS)
        sampled = rest.pop("do_sample", None)
        if sampled is None:
            sampled = float(rest.get("temperature") or 0.0) > 0
        if not sampled:
            rest = {k: v for k, v in rest.items() if k not in ("temperature", "top_p", "top_k")}
        stops = (until,) if isinstance(until, str) else tuple(until)
        return cls(tuple(prompt), stops, most, {**rest, "do_sample": bool(sampled)})


def texts_written(
    model: nn.Module,
    tokenizer: Any,
    requests: Sequence[Request],
    *,
    context: int,
    batch_size: int,
    device: torch.device,
    bar: Callable[[int], Any],
) -> list[str]:
    """What the model writes for each request, cut before the first stop.

    Prompts of equal length go together, so nothing is padded. A transformers model writes by its
    own `generate`; any other module greedily, reading everything anew for each token.

    Raises:
        EvaluationError: no room for a prompt in the context, or sampling from a plain module.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    cut = [_cut(request, context) for request in requests]
    for place, request in enumerate(cut):
        options = repr(sorted(request.options.items()))
        key = (-len(request.prompt), request.stops, request.new_tokens, options)
        groups.setdefault(key, []).append(place)
    texts = [""] * len(requests)
    with bar(len(requests)) as shown:
        for key in sorted(groups):
            for start in range(0, len(groups[key]), batch_size):
                places = groups[key][start : start + batch_size]
                first = cut[places[0]]
                ids = torch.tensor([cut[place].prompt for place in places], device=device)
                for place, text in zip(places, _texts(model, tokenizer, ids, first), strict=True):
                    texts[place] = text
                shown.update(len(places))
    return texts


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to where the first of the stops begins.

    >>> before_stop("four. Q: five", ["Q:", "."])
    'four'
    """
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text


def _cut(request: Request, context: int) -> Request:
    room = context - request.new_tokens
    if room < 1:
        raise EvaluationError(
            f"the task asks for {request.new_tokens} new tokens, the model's context is {context}; "
            "give it a smaller max_gen_toks in its generation_kwargs"
        )
    prompt = request.prompt[-room:]
    if not prompt:
        raise EvaluationError("a prompt has no tokens")
    return Request(prompt, request.stops, request.new_tokens, request.options)


def _texts(model: nn.Module, tokenizer: Any, ids: Tensor, request: Request) -> list[str]:
    last = getattr(tokenizer, "eos_token_id", None)
    start = ids.shape[1]
    kept = set(request.stops) & set(getattr(tokenizer, "all_special_tokens", ()))

    def text_of(row: Tensor) -> str:
        new = row[start:].tolist()
        new = new[: new.index(last)] if last in new else new
        return str(tokenizer.decode(new, skip_special_tokens=not kept))

    def done(rows: Tensor) -> Tensor:
        """(batch,), of rows with what was written so far."""
        ended = [
            last in row[start:].tolist()
            or any(stop and stop in text_of(row) for stop in request.stops)
            for row in rows
        ]
        return torch.tensor(ended, device=rows.device)

    native = callable(getattr(model, "generate", None)) and hasattr(model, "generation_config")
    rows = (_by_generate if native else _greedily)(model, ids, request, last, done)
    return [before_stop(text_of(row), request.stops) for row in rows]


def _by_generate(
    model: Any,
    ids: Tensor,
    request: Request,
    last: int | None,
    done: Callable[[Tensor], Tensor],
) -> Tensor:
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Done(StoppingCriteria):
        def __call__(self, rows: Tensor, _: Any, **__: Any) -> Tensor:
            return done(rows)

    rows: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request.new_tokens,
        pad_token_id=0 if last is None else last,
        stopping_criteria=StoppingCriteriaList([Done()]),
        use_cache=True,
        **request.options,
    )
    return rows


def _greedily(
    model: nn.Module,
    ids: Tensor,
    request: Request,
    _: int | None,
    done: Callable[[Tensor], Tensor],
) -> Tensor:
    others = {k for k, v in request.options.items() if v}
    if others:
        raise EvaluationError(
            f"a {type(model).__name__} has no `generate`, so it writes greedily; the task asks for "
            f"{', '.join(sorted(others))}"
        )
    for _step in range(request.new_tokens):
        logits = logits_of(model(ids), ids)[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        if bool(done(ids).all()):
            break
    return ids
