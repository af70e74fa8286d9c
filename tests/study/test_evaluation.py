"""Perplexity against a float64 computation by hand, and everything it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import torchprune
from torchprune.study.tasks.evaluation import (
    EvaluationError,
    Perplexity,
    context_of,
    default_seqlen,
    perplexity,
)

SEQLEN = 16


def tiny_llama(**options: object) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,  # far from uniform predictions
        **options,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(7)
    return tiny_llama()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(61, (5 * SEQLEN + 9,))  # the last nine are no window


def nats_by_hand(model: nn.Module, tokens: Tensor, seqlen: int) -> float:
    """The protocol, one token at a time, its arithmetic in Python's floats."""
    losses = []
    for start in range(0, len(tokens) - seqlen + 1, seqlen):
        window = tokens[start : start + seqlen]
        with torch.no_grad():
            logits = model(window[None]).logits[0].double()
        for place in range(seqlen - 1):
            row = logits[place].tolist()
            top = max(row)
            log_sum = top + math.log(math.fsum(math.exp(x - top) for x in row))
            losses.append(log_sum - row[int(window[place + 1])])
    return math.fsum(losses) / len(losses)


class Logits(nn.Module):
    """A model whose output is given."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, ids: Tensor) -> object:
        return self.output(ids) if callable(self.output) else self.output


def test_it_is_what_a_computation_by_hand_gives(llama, tokens):
    expected = nats_by_hand(llama, tokens, SEQLEN)
    result = perplexity(llama, tokens, seqlen=SEQLEN)
    assert result.nats_per_token == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.bits_per_token == pytest.approx(expected / math.log(2), rel=1e-6)
    assert (result.windows, result.seqlen, result.tokens) == (5, SEQLEN, 5 * (SEQLEN - 1))
    assert float(result) == result.perplexity


def test_the_oracle_can_fail(llama, tokens):
    """Windows shifted by one token, or one more target each, are something else."""
    expected = perplexity(llama, tokens, seqlen=SEQLEN).nats_per_token
    assert nats_by_hand(llama, tokens[1:], SEQLEN) != pytest.approx(expected, rel=1e-4)
    assert nats_by_hand(llama, tokens, SEQLEN + 1) != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("batch_size", [2, 4, 5, 100])
def test_batches_change_it_by_rounding_only(llama, tokens, batch_size):
    one = perplexity(llama, tokens, seqlen=SEQLEN)
    many = perplexity(llama, tokens, seqlen=SEQLEN, batch_size=batch_size)
    assert many.nats_per_token == pytest.approx(one.nats_per_token, rel=1e-6)
    assert many.windows == one.windows


def test_rows_lists_and_other_integers_are_the_same_text(llama, tokens):
    expected = perplexity(llama, tokens, seqlen=SEQLEN)
    for same in (tokens[None], tokens.tolist(), tokens.int(), tokens[: 5 * SEQLEN]):
        assert perplexity(llama, same, seqlen=SEQLEN) == expected


def test_uniform_logits_give_the_vocabulary():
    model = Logits(lambda ids: torch.zeros(*ids.shape, 50))
    assert float(perplexity(model, [3] * 20, seqlen=10)) == pytest.approx(50)


def test_the_loss_is_computed_in_float32():
    """bfloat16 logits are read exactly; bfloat16 arithmetic would be off by per cents."""
    logits = torch.randn(1, 10, 500, dtype=torch.bfloat16)
    ids = torch.randint(500, (10,))
    expected = nn.functional.cross_entropy(logits[0, :-1].double(), ids[1:]).item()
    result = perplexity(Logits(logits), ids, seqlen=10)
    assert result.nats_per_token == pytest.approx(expected, rel=1e-6)


def test_the_model_is_left_as_it_was(llama, tokens):
    model = tiny_llama(attention_dropout=0.5)
    model.model.layers[0].train()
    expected = perplexity(model, tokens, seqlen=SEQLEN)
    assert perplexity(model, tokens, seqlen=SEQLEN) == expected  # no dropout
    assert model.model.layers[0].training
    assert not model.model.layers[1].training
    assert model.config.use_cache is True
    assert torch.is_grad_enabled()


def test_masks_count_as_zeros(tokens):
    model = tiny_llama()
    torchprune.sparsify(model, torchprune.MagnitudeSpec(pattern="2:4"), progress=False)
    masked = perplexity(model, tokens, seqlen=SEQLEN)
    assert perplexity(torchprune.fold(model), tokens, seqlen=SEQLEN) == masked


def test_the_default_window_is_the_context(llama):
    assert perplexity(llama, torch.randint(61, (130,))).seqlen == context_of(llama) == 64
    long = GPT2Config(vocab_size=8, n_positions=4096, n_embd=4, n_layer=1, n_head=1)
    assert default_seqlen(GPT2LMHeadModel(long)) == 2048
    assert default_seqlen(nn.Linear(2, 2)) == 2048


def test_an_overflow_is_infinite():
    assert Perplexity(800.0, 1, 2).perplexity == math.inf
    assert "perplexity inf" in str(Perplexity(800.0, 1, 2))


def test_progress_is_silent_unless_asked(llama, tokens, capsys):
    perplexity(llama, tokens, seqlen=SEQLEN)
    assert capsys.readouterr() == ("", "")
    perplexity(llama, tokens, seqlen=SEQLEN, progress=True)
    assert "5/5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([1] * 15, {}, "15 tokens, one window needs 16"),
        ([], {}, "no tokens"),
        ([1] * 16, {"seqlen": 1}, "seqlen must be at least 2"),
        ([1] * 99, {"seqlen": 65}, "longer than the model's context of 64"),
        ([1] * 16, {"batch_size": 0}, "batch_size must be at least 1"),
        ([1.5] * 16, {}, "got torch.float32 (16,)"),
        ([[1] * 16] * 2, {}, "got torch.int64 (2, 16)"),
        ([True] * 16, {}, "got torch.bool"),
        ({"input_ids": [1]}, {}, "got a dict"),
        ("text", {}, "got a str"),
        ([61] * 16, {}, "token id 61, the model knows 61"),
        ([-1] * 16, {}, "token id -1"),
    ],
)
def test_bad_input_is_refused(llama, tokens, options, message):
    with pytest.raises(EvaluationError) as refusal:
        perplexity(llama, tokens, **{"seqlen": SEQLEN, **options})
    assert message in str(refusal.value)
    assert isinstance(refusal.value, torchprune.TorchpruneError)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"hidden": 1}, "returned a dict without logits"),
        (torch.zeros(1, 16), "expected logits (1, 16, vocabulary)"),
        (torch.zeros(1, 15, 8), "got (1, 15, 8)"),
        (torch.full((1, 16, 8), torch.nan), "the loss of window 0 is nan"),
    ],
)
def test_models_without_usable_logits_are_refused(output, message):
    with pytest.raises(EvaluationError) as refusal:
        perplexity(Logits(output), [1] * 16, seqlen=16)
    assert message in str(refusal.value)


def test_the_window_with_the_bad_loss_is_named():
    def logits(ids: Tensor) -> Tensor:
        return torch.where(ids[..., None] == 7, torch.inf, torch.zeros(*ids.shape, 9))

    with pytest.raises(EvaluationError, match="window 2 is nan"):
        perplexity(Logits(logits), [1] * 20 + [7] * 10, seqlen=10, batch_size=2)
