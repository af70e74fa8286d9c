"""Exporting to transformers: stock loaders read it, and the model does not notice."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, llama, mixtral, tokens
from safetensors.torch import load_file
from saved import HUGGING, Crash, bits, contents, crash, net, output, plain, prune, raw, ties
from torch import nn

import torchprune
from torchprune import MagnitudeSpec, SparseGPTSpec
from torchprune.errors import CheckpointError, MissingExtraError
from torchprune.export import to_hf

AUTO = {
    "bert": "AutoModel",
    "t5": "AutoModelForSeq2SeqLM",
    "vit": "AutoModelForImageClassification",
    "resnet": "AutoModelForImageClassification",
}


def reloaded(directory: Path, family: str = "llama") -> Any:
    import transformers

    return getattr(transformers, AUTO.get(family, "AutoModelForCausalLM")).from_pretrained(
        directory
    )


@pytest.mark.parametrize("family", HUGGING, ids=str)
def test_stock_loaders_give_equal_outputs(family: Family, tmp_path: Path) -> None:
    model = prune(family.make(), MagnitudeSpec(0.6))
    before, config, batch = raw(model), model.config.to_dict(), family.data()[0]
    to_hf(model, tmp_path)
    assert raw(model) == before
    assert model.config.to_dict() == config
    back = reloaded(tmp_path, family.name)
    assert type(back) is type(model)
    assert not torchprune.masks(back)
    expected = {k: bits(v) for k, v in plain(model).state_dict().items()}
    assert {k: bits(v) for k, v in back.state_dict().items()} == expected
    assert ties(back) == ties(model)
    assert torch.equal(output(back, batch), output(model, batch))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_and_ties(tie: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    config = llama(tie_word_embeddings=tie).config
    model = prune(LlamaForCausalLM._from_config(config, dtype=dtype).eval())
    to_hf(model, tmp_path)
    back = reloaded(tmp_path)
    assert back.dtype == dtype
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == tie
    assert torch.equal(output(back, tokens()[0]), output(model, tokens()[0]))


def test_experts_are_written_as_others_read_them(tmp_path: Path) -> None:
    model = prune(mixtral().eval(), SparseGPTSpec(pattern="2:4"), tokens())
    to_hf(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in stored
    assert not any("parametrizations" in key or "gate_up_proj" in key for key in stored)
    assert torch.equal(output(reloaded(tmp_path), tokens()[0]), output(model, tokens()[0]))


def test_zeros_are_plain_zeros(tmp_path: Path) -> None:
    model = prune(llama().eval(), MagnitudeSpec(0.5))
    mask = torchprune.masks(model)["model.layers.0.mlp.up_proj.weight"]
    original = model.model.layers[0].mlp.up_proj.parametrizations.weight.original
    original.data[~mask] = float("nan")
    to_hf(model, tmp_path)
    weight = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert not weight[~mask].view(torch.int32).any()
    assert bool(weight[mask].all())


def test_the_copy_shares_what_it_can() -> None:
    from torchprune.export.hf import folded_copy

    model = prune(llama().eval(), MagnitudeSpec(0.5, targets="*.mlp.*"))
    copied = folded_copy(model)
    shared = model.model.layers[0].self_attn.q_proj.weight
    assert copied.model.layers[0].self_attn.q_proj.weight is shared
    assert not torchprune.masks(copied)
    assert list(copied.state_dict()) == list(llama().state_dict())


def test_unmasked_and_folded_models_are_written_too(tmp_path: Path) -> None:
    model = torchprune.fold(prune(llama().eval()))
    to_hf(model, tmp_path)
    assert torch.equal(output(reloaded(tmp_path), tokens()[0]), output(model, tokens()[0]))


@pytest.mark.parametrize("dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lowered_models_are_written_dense_and_stay_lowered(
    name: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    model = torchprune.lower(prune(family.make()), "bitmask", dtype=dtype)
    before, batch = raw(model), family.data()[0]
    expected = output(torchprune.lift(copy.deepcopy(model)), batch)
    to_hf(model, tmp_path)
    assert raw(model) == before
    back = reloaded(tmp_path, name)
    assert type(back) is type(model)
    assert torch.equal(output(back, batch), expected)
    assert ties(back) == ties(family.make())


def test_an_earlier_export_is_replaced_and_noted(tmp_path: Path) -> None:
    to_hf(prune(FAMILIES["gpt2"].make()), tmp_path / "out")
    model = prune(llama().eval())
    to_hf(model, tmp_path / "out")
    assert torch.equal(output(reloaded(tmp_path / "out"), tokens()[0]), output(model, tokens()[0]))
    note = json.loads((tmp_path / "out" / "torchprune.json").read_text())
    assert note["report"] == torchprune.report(model).to_dict()


def test_other_directories_are_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "dense")
    torchprune.save(llama(), tmp_path / "saved")
    before = contents(tmp_path)
    for name in ("dense", "saved"):
        with pytest.raises(CheckpointError, match="something other than an export"):
            to_hf(llama(), tmp_path / name)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "where", ["torchprune.checkpoint.whole_files._exchange", "torchprune.export.hf.report"]
)
def test_a_failure_midway_leaves_the_old_one(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_hf(llama(), tmp_path / "out")
    before, model = contents(tmp_path), prune(llama().eval())
    weights = raw(model)
    monkeypatch.setattr(where, crash)
    with pytest.raises(Crash):
        to_hf(model, tmp_path / "out")
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert raw(model) == weights


def test_a_tokenizer_is_saved_along(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, directory: str) -> None:
            (Path(directory) / "tokenizer.json").write_text("{}")

    to_hf(llama(), tmp_path, tokenizer=Tokenizer())
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"got a Net; torchprune\.save writes any"):
        to_hf(net(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_masked_tie_is_refused(tmp_path: Path) -> None:
    model = prune(llama(tie_word_embeddings=False).eval(), MagnitudeSpec(targets="lm_head"))
    model.model.embed_tokens.weight = model.lm_head.parametrizations.weight.original
    before = raw(model)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is tied to .*, and masked"):
        to_hf(model, tmp_path / "out")
    assert raw(model) == before


def test_without_transformers_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"torchprune\[transformers\]"):
        to_hf(nn.Linear(2, 2), tmp_path / "out")


def test_the_core_imports_neither_export_nor_transformers() -> None:
    code = (
        "import sys, torchprune\n"
        "bad = {'torchprune.export', 'transformers'} & sys.modules.keys()\n"
        "assert not bad, bad\n"
        "import torchprune.export\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_copies_of_copies_stay_apart() -> None:
    from torchprune.export.hf import folded_copy

    model = prune(llama().eval())
    twin = copy.deepcopy(model)
    before = raw(model)
    folded_copy(twin)
    assert raw(model) == before
    assert torchprune.masks(twin).keys() == torchprune.masks(model).keys()
