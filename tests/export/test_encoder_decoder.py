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
onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
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


def session(path: Path) -> Any:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def written(folder: Path, given: dict[str, Tensor], start: int, count: int) -> list[list[int]]:
    """Greedy texts by the graphs: the source once, then token by token."""
    encoder = session(folder / "encoder_model.onnx")
    merged = folder / "decoder_model_merged.onnx"
    if merged.exists():
        first = after = session(merged)
    else:
        first, after = (
            session(folder / f"{name}.onnx")
            for name in ("decoder_model", "decoder_with_past_model")
        )
    arrays = {name: tensor.numpy() for name, tensor in given.items()}
    (states,) = encoder.run(["last_hidden_state"], arrays)
    ids = np.full((len(states), 1), start)
    held = {"encoder_hidden_states": states, "use_cache_branch": np.array([False])}
    if "attention_mask" in arrays:
        held["encoder_attention_mask"] = arrays["attention_mask"]
    for value in after.get_inputs():  # before there is a past, what transformers.js gives for one
        if value.name.startswith("past_key_values"):
            shape = [size if isinstance(size, int) else 0 for size in value.shape]
            held[value.name] = np.zeros(shape, np.float32)
    text, decoder = ids, first
    for _ in range(count):
        wanted = [i.name for i in decoder.get_inputs()]
        feeds = {name: {**held, "input_ids": ids}[name] for name in wanted}
        found = dict(
            zip([o.name for o in decoder.get_outputs()], decoder.run(None, feeds), strict=True)
        )
        ids = found.pop("logits")[:, -1:].argmax(-1)
        text = np.concatenate([text, ids], 1)
        held |= {k.replace("present", "past_key_values"): v for k, v in found.items()}
        held["use_cache_branch"] = np.array([True])
        decoder = after
    return text.tolist()


def greedy(model: Any, given: dict[str, Tensor]) -> list[list[int]]:
    from transformers import GenerationMixin

    found: Any = GenerationMixin.generate(
        model, **given, max_new_tokens=9, min_new_tokens=9, do_sample=False, eos_token_id=None
    )
    return found.tolist()


@pytest.mark.parametrize("name", sample(MODELS, "bart"))
@pytest.mark.parametrize(
    "merged", [True, pytest.param(False, marks=pytest.mark.sweep)], ids=["merged", "apart"]
)
def test_texts_are_those_of_generate(name: str, merged: bool, tmp_path: Path) -> None:
    model, given = made(name), source(name)
    start = model.config.decoder_start_token_id
    expected = greedy(model, given)
    example = {k: v[:2] for k, v in given.items()}
    (tmp_path / "graphs").mkdir()
    for former in ("decoder_model", "decoder_with_past_model", "decoder_model_merged"):
        (tmp_path / "graphs" / f"{former}.onnx").write_bytes(b"of an earlier model")
    report = to_onnx(model, tmp_path / "graphs", example, with_cache=True, merged=merged)
    decoders = ["decoder_model_merged"] if merged else ["decoder_model", "decoder_with_past_model"]
    names = [f"{decoder}.onnx" for decoder in (*decoders, "encoder_model")]
    assert sorted(p.name for p in report.path.iterdir()) == names
    assert report.bytes == sum(p.stat().st_size for p in report.path.iterdir())
    assert report.packed
    assert not report.unmoved
    first, after = report.parts[decoders[0]], report.parts[decoders[-1]]
    mask = [] if name == "whisper" else ["encoder_attention_mask"]
    kinds = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")
    parts = [f"{i}.{kind}" for i in range(LAYERS[name]) for kind in kinds]
    past = [f"past_key_values.{part}" for part in parts]
    sizes = {
        value.name: [size.dim_param for size in value.type.tensor_type.shape.dim]
        for value in onnx.load(after.path).graph.input
    }
    assert sizes["input_ids"] == ["batch_size", "decoder_sequence_length"]
    assert sizes[past[0]] == ["batch_size", "", "past_decoder_sequence_length", ""]
    if merged:
        both = [*mask, "input_ids", "encoder_hidden_states", *past, "use_cache_branch"]
        assert first.inputs == both
        assert first.sizes.keys() == set(both) - {"use_cache_branch"}
        if mask:  # which ties them in torch's eyes
            assert first.sizes["encoder_hidden_states"][0] == first.sizes["input_ids"][0]
    else:
        assert first.inputs == [*mask, "input_ids", "encoder_hidden_states"]
        assert after.inputs == [*mask, "input_ids", *past]
        assert after.outputs == ["logits", *(f"present.{p}" for p in parts if "decoder" in p)]
    assert first.outputs == ["logits", *(f"present.{part}" for part in parts)]
    assert written(report.path, given, start, 9) == expected
    if name != "whisper":  # a source of another length
        alone = {k: v[1:2, :5] for k, v in given.items()}
        assert written(report.path, alone, start, 9) == expected[1:2]


def test_a_merged_decoder_holds_its_weights_once(tmp_path: Path) -> None:
    model, given = made("bart"), source("bart")
    report = to_onnx(model, tmp_path / "graphs", given, with_cache=True, int8=True)
    decoder = report.parts["decoder_model_merged"]
    held = onnx.load(decoder.path).graph.initializer
    large = [value.raw_data for value in held if len(value.raw_data) > 256]
    assert len(large) > 8
    assert len(large) == len(set(large))
    texts = written(report.path, given, model.config.decoder_start_token_id, 9)
    assert [len(text) for text in texts] == [10] * 3


def test_two_reports_of_sizes_speak_in_the_same_letters() -> None:
    from torchprune.export.merged_decoder import same_letters

    first = {
        "sizes": {"ids": ("a", "b"), "states": ("a", "c", 8), "both": ("b + c",)},
        "bounds": {"c": (2, 9)},
        "unmoved": ["x"],
    }
    past = {f"past{i}": ("c", letter) for i, letter in enumerate("abdefghijklmnopqrstuvwxyz")}
    after = {"sizes": {"ids": ("c", 1), **past}, "bounds": {"d": (0, 5)}, "unmoved": ["x", "y"]}
    made = same_letters(first, after)
    states, both = ("c", "bb", 8), ("aa + bb",)
    assert made["sizes"] == {"ids": ("c", 1), "states": states, "both": both, **past}
    assert made["sizes"]["states"][1] in made["bounds"]
    assert made["bounds"]["d"] == (0, 5)
    assert made["unmoved"] == ["x", "y"]


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
