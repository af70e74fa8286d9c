"""One short test of a pretrained model: what the tiny ones cannot show."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import torchprune

pytestmark = pytest.mark.model

LENGTH = 128
TARGETS = [f"model.layers.{i}.self_attn" for i in range(10, 16)]


@pytest.fixture
def smollm2(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "examples"))
    return importlib.import_module("smollm2")


def test_wanda_beats_magnitude_and_survives_saving(smollm2, tmp_path):
    model, tokenizer = smollm2.load_model(), smollm2.load_tokenizer()
    mine, held_out = smollm2.split(smollm2.news_articles())
    windows = smollm2.windows(tokenizer, mine, 4, LENGTH, seed=0)
    tokens = smollm2.tokens(tokenizer, held_out)[: 6 * LENGTH]

    def measured() -> torchprune.study.tasks.evaluation.Perplexity:
        return torchprune.perplexity(model, tokens, seqlen=LENGTH, batch_size=3)

    def pruned(spec: type, data: list[torch.Tensor] | None) -> None:
        torchprune.sparsify(model, spec(pattern="2:4", targets=TARGETS), data, progress=False)
        masks = torchprune.masks(model)
        assert len(masks) == 24
        assert all(int(mask.sum()) * 2 == mask.numel() for mask in masks.values())

    before = {k: v.clone() for k, v in model.state_dict().items()}
    dense = measured()
    pruned(torchprune.MagnitudeSpec, None)
    magnitude = measured()
    torchprune.densify(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    pruned(torchprune.WandaSpec, list(windows.split(1)))
    wanda = measured()
    assert math.isfinite(wanda.nats_per_token)
    assert dense.perplexity < wanda.perplexity < magnitude.perplexity

    torchprune.save(model, tmp_path / "saved", tokenizer=tokenizer)
    model = torchprune.load(tmp_path / "saved")
    assert measured() == wanda
