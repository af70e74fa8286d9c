"""Graphs with a cache: fed like `generate` feeds the model, they continue as it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCABULARY, causal
from sweeps import sample
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec

ort = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")

from torchprune.export import to_onnx  # noqa: E402


def gpt_neo() -> nn.Module:
    return causal(
        "GPTNeo",
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


def gpt_big_code() -> nn.Module:
    """One head of keys and values for all queries."""
    return causal(
        "GPTBigCode",
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )


def bloom() -> nn.Module:
    """ALiBi: positions follow from the mask."""
    return causal(
        "Bloom", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0
    )


def mistral() -> nn.Module:
    """A window of eight tokens, shorter than the text."""
    return causal(
        "Mistral",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        max_position_embeddings=64,
    )


MODELS = {
    **{name: FAMILIES[name].make for name in ("gpt2", "opt", "llama", "qwen3", "gemma")},
    "gpt_neo": gpt_neo,
    "gpt_big_code": gpt_big_code,
    "bloom": bloom,
    "mistral": mistral,
}


def made(name: str) -> Any:
    torch.manual_seed(3)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that argmax means something
            parameter.mul_(3.0) if parameter.dim() > 1 else None
    return torchprune.sparsify(model, MagnitudeSpec(), progress=False)


def padded() -> tuple[Tensor, Tensor]:
    """Three rows of eight tokens, of which none, three and six are padding on the left."""
    tokens = torch.randint(3, 50, (3, 8), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens)
    for row, absent in enumerate((0, 3, 6)):
        mask[row, :absent] = tokens[row, :absent] = 0
    return tokens, mask


def continued(path: Path, tokens: Tensor, mask: Tensor, count: int) -> Tensor:
    """Greedy text of the graph."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = {i.name: i.shape for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    feeds: dict[str, Any] = {
        name: np.zeros((len(tokens), shape[1], 0, shape[3]), np.float32)
        for name, shape in inputs.items()
        if name.startswith("past_key_values.")
    }
    text, seen, new = tokens.numpy(), mask.numpy(), tokens.shape[1]
    for _ in range(count):
        feeds["input_ids"], feeds["attention_mask"] = text[:, -new:], seen
        if "position_ids" in inputs:
            feeds["position_ids"] = np.maximum(seen.cumsum(-1) - 1, 0)[:, -new:]
        found = dict(zip(names, session.run(None, feeds), strict=True))
        text = np.concatenate([text, found["logits"][:, -1:].argmax(-1)], 1)
        seen, new = np.concatenate([seen, np.ones((len(seen), 1), np.int64)], 1), 1
        for name in inputs:
            if name.startswith("past_key_values."):
                feeds[name] = found[name.replace("past_key_values", "present")]
    return torch.from_numpy(text)


@pytest.mark.parametrize("name", sample(MODELS, "gpt2", "qwen3", "gpt_neo", "bloom", "mistral"))
def test_padded_rows_continue_as_generate_does(name: str, tmp_path: Path) -> None:
    model, (tokens, mask) = made(name), padded()
    expected = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    report = to_onnx(model, tmp_path / "m.onnx", tokens[:1], with_cache=True, weights="dense")
    print(report)
    found = continued(report.path, tokens, mask, 8)
    assert found.tolist() == expected.tolist()
