"""Biases and tables for each head go with their heads, also where positions are gathered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tokens
from structures import close, outputs
from torch import nn

import torchprune
from torchprune import HeadSpec, plan_shrink, shrink

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def made(name: str, **settings: Any) -> Callable[[], nn.Module]:
    kind, config = (getattr(transformers, name + end) for end in ("Model", "Config"))
    return lambda: kind(config(**SIZES, **settings))


RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
MODELS = {
    "deberta": made("Deberta", **RELATIVE),
    "deberta-v2": made("DebertaV2", **RELATIVE, position_buckets=8, share_att_key=True),
    "layoutlmv3": made(
        "LayoutLMv3", visual_embed=False, coordinate_size=6, shape_size=4, rel_pos_bins=4
    ),
    "bert": made("Bert", position_embedding_type="relative_key_query"),
}


@pytest.mark.parametrize("name", MODELS)
def test_heads_go_with_their_biases_and_files_hold_them(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: nn.Module = MODELS[name]().eval()
    batch = {"input_ids": tokens(count=1)[0]}
    torchprune.sparsify(model, HeadSpec(0.5, refit=False), [batch], progress=False)
    want = outputs(model, batch)
    plan = plan_shrink(model, batch)
    assert {(r.group.kind, r.before, r.after) for r in plan.removals} == {("heads", 4, 2)}
    shrink(model, plan)
    assert close(outputs(model, batch), want, 1e-4)
    torchprune.save(model, tmp_path / "own")
    assert close(outputs(torchprune.load(tmp_path / "own"), batch), want, 1e-4)
