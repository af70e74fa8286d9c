"""Which number of a configuration says a width is told by what moves with it, not by its value."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import decoder, tokens
from torch import Tensor, nn

import torchprune
from torchprune import HeadSpec, NeuronSpec
from torchprune.errors import CheckpointError
from torchprune.export import to_hf

transformers = pytest.importorskip("transformers")


def shrunk(model: nn.Module, spec: Any, batch: Any) -> Tensor:
    """The masked model's logits; afterwards it is shrunk."""
    torchprune.sparsify(model, spec, [batch], progress=False)
    want = logits(model, batch)
    torchprune.shrink(model, torchprune.plan_shrink(model, batch))
    return want


def logits(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        out = model(**copy.deepcopy(batch)) if isinstance(batch, dict) else model(batch)
    found: Tensor = out.logits
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {name: after[name] for name in after if after[name] != before.get(name)}


@pytest.mark.parametrize(
    "equal",
    [{"hidden_size": 48, "head_dim": 8}, {"vocab_size": 48}, {"max_position_embeddings": 48}],
)
def test_equal_numbers_are_not_confused(equal: dict[str, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = decoder("Llama", **equal).eval()
    batch = tokens(count=1)[0] % 48
    before = model.config.to_dict()
    want = shrunk(model, NeuronSpec(sparsity=0.5, refit=False), batch)
    assert changes(before, model.config.to_dict()) == {"intermediate_size": 24}
    to_hf(model, tmp_path / "stock")
    again = type(model).from_pretrained(tmp_path / "stock")
    torch.testing.assert_close(logits(again, batch), want, rtol=1e-4, atol=1e-5)


def test_a_size_that_cannot_be_set_is_left_alone(tmp_path: Path) -> None:
    """Falcon's head size is a property without a setter."""
    torch.manual_seed(0)
    model = transformers.FalconForCausalLM(
        transformers.FalconConfig(
            vocab_size=61,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
        )
    ).eval()
    batch, before = tokens(count=1)[0], model.config.to_dict()
    want = shrunk(model, HeadSpec(sparsity=0.5, refit=False), batch)
    assert changes(before, model.config.to_dict()) == {}
    with pytest.raises(CheckpointError, match="cannot say the sizes"):
        to_hf(model, tmp_path / "stock")
    torchprune.save(model, tmp_path / "own")
    torch.testing.assert_close(logits(torchprune.load(tmp_path / "own"), batch), want)
