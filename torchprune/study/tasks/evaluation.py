"""Perplexity by the field's protocol: consecutive windows, mean next-token cross-entropy, `exp`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from torchprune.calibration.text import LONGEST, context_of
from torchprune.errors import TorchpruneError
from torchprune.modes import eval_mode, without_caches
from torchprune.study.tasks.paired import stderr_of

ACCEPTED_TOKENS = (
    "tokens must be the token ids of one text: a whole-number tensor (n,) or (1, n), or a list of "
    'ints such as tokenizer("\\n\\n".join(articles))["input_ids"]; or what text_batches gives'
)


class EvaluationError(TorchpruneError, ValueError):
    """The text or the model cannot give a perplexity."""


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text. `float(result)` is the perplexity.

    Attributes:
        nats_per_token: mean cross-entropy of the predicted tokens, natural logarithm.
        windows, seqlen: how many windows were read, and the tokens in each.
        tokens: how many tokens were predicted: windows * (seqlen - 1).
        window_nats: the sum of each window's cross-entropies, () where it was not kept.
        window_ids: a digest of each window's tokens, likewise.
    """

    nats_per_token: float
    windows: int
    seqlen: int
    window_nats: tuple[float, ...] = field(default=(), repr=False, compare=False)
    window_ids: tuple[str, ...] = field(default=(), repr=False, compare=False)

    @property
    def tokens(self) -> int:
        return self.windows * (self.seqlen - 1)

    @property
    def bits_per_token(self) -> float:
        return self.nats_per_token / math.log(2)

    @property
    def perplexity(self) -> float:
        """`exp(nats_per_token)`, infinite where a float cannot hold it."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    @property
    def stderr(self) -> float:
        """The perplexity's standard error over windows; NaN with fewer than two of them."""
        weights = [float(self.seqlen - 1)] * len(self.window_nats)
        return stderr_of(self.window_nats, weights, "exp") if self.window_nats else math.nan

    def __float__(self) -> float:
        return self.perplexity

    def __str__(self) -> str:
        error = "" if math.isnan(self.stderr) else f" ± {self.stderr:.2g}"
        return (
            f"perplexity {self.perplexity:.4g}{error} ({self.bits_per_token:.4f} bits/token over "
            f"{self.tokens:,} tokens in {self.windows:,} windows of {self.seqlen:,})"
        )


def perplexity(
    model: nn.Module,
    tokens: Tensor | Sequence[int] | Sequence[Mapping[str, Tensor]],
    *,
    seqlen: int | None = None,
    batch_size: int = 1,
    progress: bool = False,
) -> Perplexity:
    """Perplexity of a causal language model on one text.

    The text is one row of tokens: articles joined by blank lines and tokenised once. It is cut
    into consecutive windows of `seqlen`, the tail is dropped, each window is read by itself and
    its last `seqlen - 1` tokens are predicted. The mean is over all of them; the loss is computed
    in float32 whatever the model's dtype and summed in float64.

    Args:
        model: a transformers causal language model, or any module that maps (batch, length) ids
            to logits (batch, length, vocabulary), bare or as `output.logits`. It is evaluated in
            eval mode without caches; its training flags are as before afterwards.
        tokens: (n,) or (1, n) ids, on any device. Or the batches that `text_batches` made of
            held-out texts: each is a window, good for a before and after of one model; only the
            whole text is comparable with others' figures.
        seqlen: tokens per window; the default is the model's context, at most 2048, or the length
            of the batches.
        batch_size: windows per forward pass. It changes results by rounding only.
        progress: show a progress bar over the windows.

    Raises:
        EvaluationError: fewer tokens than a window, ids the model does not know, an output that
            is no logits, or a loss that is not finite.
    """
    if given := _as_windows(tokens):
        tokens, seqlen = torch.cat(given), len(given[0]) if seqlen is None else seqlen
        if any(len(window) != seqlen for window in given):
            found = sorted({len(window) for window in given})
            raise EvaluationError(f"seqlen is {seqlen}, and the batches are of {found} tokens")
    ids = _as_ids(tokens)
    seqlen = _checked_seqlen(model, default_seqlen(model) if seqlen is None else seqlen)
    if batch_size < 1:
        raise EvaluationError(f"batch_size must be at least 1, got {batch_size}")
    count = len(ids) // seqlen
    if not count:
        raise EvaluationError(
            f"the text has {len(ids)} tokens, one window needs {seqlen}; use a longer text or a "
            "smaller seqlen"
        )
    windows = ids[: count * seqlen].view(count, seqlen)
    _check_vocabulary(model, windows)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    total, nats = 0.0, list[float]()
    with (
        evaluating(model),
        tqdm(total=count, desc="perplexity", unit="window", disable=not progress) as bar,
    ):
        for start in range(0, count, batch_size):
            batch = windows[start : start + batch_size].to(device)
            for i, loss in enumerate(_losses(model, batch).double().sum(1).tolist(), start):
                if not math.isfinite(loss):
                    raise EvaluationError(f"the loss of window {i} is {loss}")
                total += loss
                nats.append(loss)
            bar.update(len(batch))
            so_far = Perplexity(total / (len(nats) * (seqlen - 1)), len(nats), seqlen)
            bar.set_postfix(perplexity=f"{so_far.perplexity:.4g}")
    return replace(so_far, window_nats=tuple(nats), window_ids=tuple(map(_digest, windows)))


def _digest(window: Tensor) -> str:
    return hashlib.sha256(window.cpu().numpy().tobytes()).hexdigest()[:12]


def default_seqlen(model: nn.Module) -> int:
    """The model's context, at most `LONGEST`."""
    return min(context_of(model) or LONGEST, LONGEST)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients and no key-value caches for a while; all restored at the end."""
    with eval_mode(model), without_caches(model), torch.no_grad():
        yield


def _losses(model: nn.Module, windows: Tensor) -> Tensor:
    """(windows, seqlen - 1) float32 cross-entropies of each next token."""
    logits = logits_of(model(windows), windows)[:, :-1].float()
    targets = windows[:, 1:]
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(
        targets.shape
    )


def logits_of(output: Any, windows: Tensor) -> Tensor:
    """A model's logits (batch, length, vocabulary) for ids (batch, length).

    Raises:
        EvaluationError: the output is something else.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise EvaluationError(
            f"the model returned a {type(output).__name__} without logits; perplexity needs a "
            "causal language model (transformers: AutoModelForCausalLM)"
        )
    if found.dim() != 3 or found.shape[:2] != windows.shape:
        raise EvaluationError(
            f"expected logits ({windows.shape[0]}, {windows.shape[1]}, vocabulary) for ids "
            f"{tuple(windows.shape)}, got {tuple(found.shape)}"
        )
    return found


def _as_windows(tokens: Any) -> list[Tensor]:
    """The ids of each batch (length,), or none where tokens are no batches."""
    if not isinstance(tokens, list | tuple):
        return []
    alone = [b for b in tokens if isinstance(b, Mapping) and b.keys() == {"input_ids"}]
    found = [batch["input_ids"] for batch in alone]
    rows = [ids[0] for ids in found if isinstance(ids, Tensor) and ids.dim() == 2 and len(ids) == 1]
    return rows if len(rows) == len(tokens) else []


def _as_ids(tokens: Any) -> Tensor:
    """(n,) int64."""
    try:
        ids = tokens if isinstance(tokens, Tensor) else torch.tensor(tokens)
    except (TypeError, ValueError, RuntimeError):
        raise EvaluationError(f"got a {type(tokens).__name__}; {ACCEPTED_TOKENS}") from None
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        if not ids.numel():
            raise EvaluationError(f"the text has no tokens; {ACCEPTED_TOKENS}")
        raise EvaluationError(f"got {ids.dtype} {tuple(ids.shape)}; {ACCEPTED_TOKENS}")
    return ids.long()


def _checked_seqlen(model: nn.Module, seqlen: int) -> int:
    context = context_of(model)
    if seqlen < 2:
        raise EvaluationError(f"seqlen must be at least 2 to predict a token, got {seqlen}")
    if context is not None and seqlen > context:
        raise EvaluationError(f"seqlen {seqlen} is longer than the model's context of {context}")
    return seqlen


def _check_vocabulary(model: nn.Module, windows: Tensor) -> None:
    getter = getattr(model, "get_input_embeddings", None)
    size = getattr(getter() if callable(getter) else None, "num_embeddings", None)
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or (size is not None and high >= size):
        raise EvaluationError(
            f"the text holds token id {low if low < 0 else high}, the model knows "
            f"{size if size is not None else 'none below 0'}; is this the model's own tokenizer?"
        )
