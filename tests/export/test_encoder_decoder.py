"""Encoder-decoders with a cache: fed like `generate` feeds the model, they write as it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCABULARY
from sweeps import sample
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.errors import ExportError
from torchprune.export import to_onnx

ort = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # while exporting, of third parties

_SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(**_SIZES, max_position_embeddings=64, forced_eos_token_id=None)
    return BartForConditionalGeneration(config)


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"max_source_positions": 10, "max_target_positions": 64, "num_mel_bins": 8}
    return WhisperForConditionalGeneration(WhisperConfig(**_SIZES, **sizes))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "t5": FAMILIES["t5"].make,
    "bart": bart,
    "whisper": whisper,
}


LAYERS = {"t5": 2, "bart": 1, "whisper": 1}


def made(name: str) -> Any:
    torch.manual_seed(3)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that the largest means much
            if parameter.dim() > 1:
                parameter.mul_(2.0)
    return torchprune.sparsify(model, MagnitudeSpec(), progress=False)


def source(name: str) -> dict[str, Tensor]:
    """Three sources, of which two are padded where they may be."""
    generator = torch.Generator().manual_seed(5)
    if name == "whisper":
        return {"input_features": torch.randn(3, 8, 20, generator=generator)}
    ids = torch.randint(3, 50, (3, 8), generator=generator)
    mask = (torch.arange(8) < torch.tensor([8, 5, 2])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def written(folder: Path, given: dict[str, Tensor], start: int, count: int) -> list[list[int]]:
    """Greedy texts by the three graphs: the source once, then token by token."""
    encoder, first, after = (
        ort.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("encoder_model", "decoder_model", "decoder_with_past_model")
    )
    arrays = {name: tensor.numpy() for name, tensor in given.items()}
    (states,) = encoder.run(["last_hidden_state"], arrays)
    ids = np.full((len(states), 1), start)
    held = {"encoder_hidden_states": states}
    if "attention_mask" in arrays:
        held["encoder_attention_mask"] = arrays["attention_mask"]
    text, session = ids, first
    for _ in range(count):
        wanted = [i.name for i in session.get_inputs()]
        feeds = {name: {**held, "input_ids": ids}[name] for name in wanted}
        found = dict(
            zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True)
        )
        ids = found.pop("logits")[:, -1:].argmax(-1)
        text = np.concatenate([text, ids], 1)
        held |= {k.replace("present", "past_key_values"): v for k, v in found.items()}
        session = after
    return text.tolist()


@pytest.mark.parametrize("name", sample(MODELS, "t5"))
def test_texts_are_those_of_generate(name: str, tmp_path: Path) -> None:
    from transformers import GenerationMixin

    model, given = made(name), source(name)
    start = model.config.decoder_start_token_id
    expected = GenerationMixin.generate(
        model, **given, max_new_tokens=9, min_new_tokens=9, do_sample=False, eos_token_id=None
    ).tolist()
    report = to_onnx(
        model, tmp_path / "graphs", {k: v[:2] for k, v in given.items()}, with_cache=True
    )
    names = ["decoder_model.onnx", "decoder_with_past_model.onnx", "encoder_model.onnx"]
    assert sorted(p.name for p in report.path.iterdir()) == names
    assert report.bytes == sum(p.stat().st_size for p in report.path.iterdir())
    assert report.packed
    assert not report.unmoved
    first, after = (report.parts[name] for name in ("decoder_model", "decoder_with_past_model"))
    mask = [] if name == "whisper" else ["encoder_attention_mask"]
    assert first.inputs == [*mask, "input_ids", "encoder_hidden_states"]
    kinds = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")
    parts = [f"{i}.{kind}" for i in range(LAYERS[name]) for kind in kinds]
    assert first.outputs == ["logits", *(f"present.{part}" for part in parts)]
    assert after.inputs == [*mask, "input_ids", *(f"past_key_values.{part}" for part in parts)]
    assert after.outputs == ["logits", *(f"present.{p}" for p in parts if "decoder" in p)]
    assert written(report.path, given, start, 9) == expected
    if name != "whisper":  # a source of another length
        alone = {k: v[1:2, :5] for k, v in given.items()}
        assert written(report.path, alone, start, 9) == expected[1:2]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    model, given = made("t5"), source("t5")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match="go to a folder"):
        to_onnx(model, tmp_path / "file", given, with_cache=True)
    with pytest.raises(ExportError, match="needs input_ids of a batch"):
        to_onnx(model, tmp_path / "new", {"ids": given["input_ids"]}, with_cache=True)
    with pytest.raises(ExportError, match="sizes are found"):
        to_onnx(model, tmp_path / "new", given, with_cache=True, dynamic_shapes={})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
