"""Steps with a cache: fed like `generate` feeds the model, they continue as it does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCABULARY, causal, llama
from sweeps import sample
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.errors import ExportError
from torchprune.export import load_pt2, to_onnx, to_pt2
from torchprune.export.cached import CachedModel
from torchprune.export.call import run

Step = Callable[[Tensor, Tensor, list[Tensor], list[Tensor]], tuple[Tensor, list[Tensor]]]
"""ids, mask, what else is prepared, past -> logits, the cache."""


def gpt_neo() -> nn.Module:
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    return GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=4,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def gpt_big_code() -> nn.Module:
    """One head of keys and values for all queries."""
    return causal(
        "GPTBigCode",
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=1,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )


def bloom() -> nn.Module:
    """ALiBi: positions follow from the mask."""
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0)
    )


def mistral() -> nn.Module:
    """A window of eight tokens, shorter than the text."""
    return causal(
        "Mistral",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        max_position_embeddings=64,
    )


def falcon() -> nn.Module:
    return causal(
        "Falcon", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )


def mpt() -> nn.Module:
    return causal("Mpt", vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: FAMILIES[name].make for name in ("gpt2", "opt", "llama", "qwen3", "gemma", "mixtral")},
    "gpt_neo": gpt_neo,
    "gpt_big_code": gpt_big_code,
    "bloom": bloom,
    "mpt": mpt,
    "falcon": falcon,
    "mistral": mistral,
}


def made(name: str) -> Any:
    torch.manual_seed(3)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that the largest means much
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model


def padded() -> tuple[Tensor, Tensor]:
    """Three rows of eight tokens, of which none, three and six are padding on the left."""
    tokens = torch.randint(3, 50, (3, 8), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens)
    for row, absent in enumerate((0, 3, 6)):
        mask[row, :absent] = tokens[row, :absent] = 0
    return tokens, mask


def generated(model: Any, tokens: Tensor, mask: Tensor, count: int) -> list[list[int]]:
    found = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return found.tolist()


def continued(
    step: Step, past: list[Tensor], positions: bool, tokens: Tensor, mask: Tensor, count: int
) -> list[list[int]]:
    """Greedy texts, step by step."""
    text, new = tokens, tokens.shape[1]
    for _ in range(count):
        prepared = [(mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]] if positions else []
        logits, past = step(text[:, -new:], mask, prepared, past)
        text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
        mask, new = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), 1
    return text.tolist()


@pytest.mark.parametrize("name", sample(MODELS, "gpt2", "qwen3", "bloom"))
def test_padded_rows_continue_as_generate_does(name: str) -> None:
    model, (tokens, mask) = made(name), padded()
    expected = generated(model, tokens, mask, 8)
    cached = CachedModel(model)
    assert list(cached.prepared) == ([] if name in ("bloom", "mpt") else ["position_ids"])
    past = cached.example(tokens, 3, 0, 8)[-1]
    with torch.no_grad():
        found = continued(cached, past, bool(cached.prepared), tokens, mask, 8)
    assert found == expected


@pytest.mark.parametrize("name", ["gpt_big_code", "mistral"])
def test_so_they_do_in_onnx_runtime(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ort = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "examples"))
    from decoding import no_past, step_inputs
    from onnx_generate import generate

    model, (tokens, mask) = made(name), padded()
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    expected = generated(model, tokens, mask, 8)
    with caplog.at_level(logging.WARNING):
        report = to_onnx(model, tmp_path / "m.onnx", tokens[:1], with_cache=True)
    assert not [r for r in caplog.records if "torchvision" in r.getMessage()]
    assert report.inputs[:4] == [
        "input_ids", "attention_mask", "position_ids", "past_key_values.0.key",
    ]  # fmt: skip
    assert report.outputs[:3] == ["logits", "present.0.key", "present.0.value"]
    graph = onnx.load(report.path, load_external_data=False).graph
    sizes = {
        value.name: [size.dim_param for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert sizes["input_ids"] == ["batch_size", "sequence_length"]
    assert sizes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert sizes["past_key_values.0.key"] == ["batch_size", "", "past_sequence_length", ""]
    assert sizes["present.0.key"][2] == "past_sequence_length + sequence_length"
    session = ort.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])

    def step(ids: Tensor, mask: Tensor, _: Any, past: list[Any]) -> tuple[Tensor, list[Any]]:
        inputs = step_inputs(session, ids.numpy(), mask.numpy(), past)
        logits, *past = session.run(None, inputs)
        return torch.from_numpy(logits), past

    for rows in (slice(None), slice(1)):  # all, and the one that is not padded
        some = tokens[rows], mask[rows]
        assert continued(step, no_past(session, len(some[0])), True, *some, 8) == expected[rows]
    prompts = [row[keep.bool()].tolist() for row, keep in zip(tokens, mask, strict=True)]
    texts = generate(session, prompts, 8)
    assert [text[-8:] for text in texts] == [text[-8:] for text in expected]


def test_a_loaded_program_takes_steps_of_any_length(tmp_path: Path) -> None:
    model, (tokens, _) = llama(num_hidden_layers=1).eval(), padded()
    report = to_pt2(model, tmp_path / "m.pt2", tokens[:1], with_cache=True, weights="dense")
    assert not report.unmoved
    assert not report.bounds
    program, cached = load_pt2(report.path).module(), CachedModel(model)
    for size in ((1, 0, 1), (1, 1, 1), (2, 0, 7), (4, 20, 1)):
        step = cached.example(tokens, *size)
        for found, expected in zip(run(program, step, {}), run(cached, step, {}), strict=True):
            torch.testing.assert_close(found, expected)


def test_other_caches_are_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(ExportError, match="gives no logits with a cache of layers"):
        CachedModel(mamba)
    sizes = ("head_dim", "linear_key_head_dim", "linear_value_head_dim", "moe_intermediate_size")
    numbers = ("linear_num_key_heads", "linear_num_value_heads", "num_experts_per_tok")
    half = Qwen3NextForCausalLM(
        Qwen3NextConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=4,  # every fourth has keys and values
            num_experts=4,
            shared_expert_intermediate_size=16,
            **dict.fromkeys(sizes, 8),
            **dict.fromkeys(numbers, 2),
        )
    )
    with pytest.raises(ExportError, match="not keys and values of all past tokens"):
        CachedModel(half)
