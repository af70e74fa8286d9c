"""What tasks ask of a language model: how likely texts are, and what it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchprune.calibration.text import LONGEST, context_of
from torchprune.study.tasks.evaluation import EvaluationError, logits_of
from torchprune.study.tasks.generations import Request, texts_written

Ids = list[int]
Scored = tuple[float, bool]
"""Log-likelihood in nats, and whether greedy decoding would have written it."""


class LanguageModel:
    """A model with its tokenizer, asked in strings.

    Any module that maps ids (batch, length) to logits (batch, length, vocabulary), bare or as
    `output.logits`, each position's from itself and those before it. Rows are padded on the right,
    which such a model does not see, so it is called with ids alone. Likelihoods are taken from
    float32 logits and summed in float64.

    Args:
        batch_size: rows in a forward pass. It changes results by rounding only.
        progress: show progress bars.
        label: what a bar says.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        batch_size: int = 8,
        progress: bool = False,
        label: str = "",
    ) -> None:
        if batch_size < 1:
            raise EvaluationError(f"batch_size must be at least 1, got {batch_size}")
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise EvaluationError(
                f"{type(model).__name__} is an encoder-decoder; tasks are for causal language "
                "models (give a function of your own: evaluate(model, {'name': f}))"
            )
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.progress, self.label = batch_size, progress, label
        self.context = context_of(model) or LONGEST
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    # -- what tasks ask ----------------------------------------------------------------------------

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """How likely each text is after its context; a context too long loses its beginning.

        Raises:
            EvaluationError: a continuation has no tokens, or is longer than the model's context.
        """
        return self._scored([self._encoded_pair(*pair) for pair in pairs])

    def whole_texts(self, texts: Sequence[str]) -> list[float]:
        """The log-likelihood of each text from its first token on, in nats.

        A text longer than the context is read in pieces that each predict as many tokens as the
        context holds, the last with the full context before what is left.
        """
        pieces, owners = [], []
        for owner, text in enumerate(texts):
            ids = self.encoded(text)
            whole = [self._first_token(), *ids]
            for start in range(0, len(ids), self.context):
                end = min(start + self.context, len(ids))
                pieces.append((whole[max(0, end - self.context) : start + 1], ids[start:end]))
                owners.append(owner)
        sums = [0.0] * len(texts)
        for owner, (nats, _) in zip(owners, self._scored(pieces), strict=True):
            sums[owner] += nats
        return sums

    @torch.no_grad()
    def written(self, prompts: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """What the model writes after each prompt, until one of the stops of its options."""
        requests = [Request.of(self.encoded(text), options) for text, options in prompts]
        return texts_written(
            self.model,
            self.tokenizer,
            requests,
            context=self.context,
            batch_size=self.batch_size,
            device=self.device,
            bar=lambda total: self._bar(total, "prompt"),
        )

    def chat(self, turns: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer's chat template writes it."""
        options: dict[str, Any] = {"continue_final_message": not add_generation_prompt}
        written = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
        return str(written)

    def encoded(self, text: str, *, special: bool | None = None) -> Ids:
        """The text's ids, special tokens as the tokenizer is used to unless it begins with one."""
        first = getattr(self.tokenizer, "bos_token", None)
        if special is None and first and text.startswith(first):
            special = False
        options = {} if special is None else {"add_special_tokens": special}
        return list(self.tokenizer.encode(text, **options))

    # -- how ---------------------------------------------------------------------------------------

    def _first_token(self) -> int:
        """Stands before a text without context."""
        for name in ("bos_token_id", "eos_token_id"):
            if (found := getattr(self.tokenizer, name, None)) is not None:
                return int(found)
        raise EvaluationError(
            "a text without context begins with the tokenizer's bos or eos token, and the "
            f"{type(self.tokenizer).__name__} has neither; set tokenizer.eos_token"
        )

    def _encoded_pair(self, context: str, text: str) -> tuple[Ids, Ids]:
        """Both in one piece, as tokens may join them; spaces at the seam go with the text."""
        if not context:
            ids, first = self.encoded(text, special=False), self._first_token()
            before, after = (ids[:1], ids[1:]) if ids[:1] == [first] else ([first], ids)
        else:
            stem = context.rstrip()
            before = self.encoded(stem)
            after = self.encoded(context + text)[len(before) :]
            before = before or [self._first_token()]
        if not after:
            raise EvaluationError(f"the answer {text!r:.60} has no tokens of its own")
        if len(after) > self.context:
            raise EvaluationError(
                f"an answer has {len(after)} tokens, the model's context is {self.context}"
            )
        return before, after

    def _scored(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Scored]:
        """Each distinct row is read once, however many answers end on it; long ones first."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for place, (before, after) in enumerate(pairs):
            read = (before + after)[-(self.context + 1) : -1]
            rows.setdefault(tuple(read), []).append(place)
        order = sorted(rows, key=lambda row: (-len(row), row))
        found: list[Scored] = [(0.0, False)] * len(pairs)
        with self._bar(len(order), "row") as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                logits = self._logits(batch)
                for row, scores in zip(batch, logits, strict=True):
                    for place in rows[row]:
                        found[place] = _score(scores[: len(row)], pairs[place][1])
                bar.update(len(batch))
        return found

    @torch.no_grad()
    def _logits(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        longest = max(map(len, rows))
        padded = [[*row, *[row[-1]] * (longest - len(row))] for row in rows]
        ids = torch.tensor(padded, device=self.device)
        return logits_of(self.model(ids), ids)

    def _bar(self, total: int, unit: str) -> tqdm[Any]:
        return tqdm(total=total, desc=self.label, unit=unit, disable=not self.progress)


def _score(logits: Tensor, answer: Ids) -> Scored:
    """Of the last tokens of a row's logits (length, vocabulary)."""
    scores = logits[-len(answer) :].float().log_softmax(-1)
    wanted = torch.tensor(answer, device=scores.device)
    nats = scores.gather(1, wanted[:, None]).double().sum()
    return float(nats), bool((scores.argmax(-1) == wanted).all())
