"""Every class of transformers for a task, saved, loads: today's sample of them in CI."""

from __future__ import annotations

import copy
import datetime
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import VARIANTS, shrunk

import torchprune

transformers = pytest.importorskip("transformers")

A_DAY = 12
_MOST = 5_000_000


def task_classes() -> list[str]:
    """The classes that the library's mappings name, of every task."""
    from transformers.models.auto import modeling_auto as auto

    found: set[str] = set()
    for name in dir(auto):
        if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES"):
            for own in getattr(auto, name).values():
                found.update([own] if isinstance(own, str) else own)
    return sorted(found)


def cases() -> list[Any]:
    """All of them, of which those of today are not marked."""
    names = task_classes()
    today = datetime.datetime.now(datetime.UTC).date().toordinal()
    drawn = set(random.Random(today).sample(names, A_DAY))
    return [n if n in drawn else pytest.param(n, marks=pytest.mark.family) for n in names]


def tiny(name: str) -> Any:
    """A tiny model of a class; where transformers builds none by itself, the test is skipped."""
    try:
        owner: Any = getattr(transformers, name)
        kind = owner.config_class
    except (AttributeError, ImportError) as error:
        pytest.skip(f"{name} needs what is not here: {error!s:.80}")
    why = "no configuration"
    for variant in VARIANTS[:6] if kind is not None else ():
        try:
            config = kind(**shrunk(kind, variant))
            with torch.device("meta"):
                size = sum(p.numel() for p in owner(copy.deepcopy(config)).parameters())
            if size > _MOST:
                raise ValueError("too large")
            return owner(config).eval()
        except Exception as error:  # of the class itself, before anything is saved
            why = f"{type(error).__name__}: {error!s:.80}"
    pytest.skip(f"no tiny {name}: {why}")


def assert_comes_back(model: Any, folder: Path) -> None:
    torchprune.save(model, folder)
    again: Any = torchprune.load(folder)
    assert type(again) is type(model)
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)


@pytest.mark.parametrize("name", cases())
def test_what_save_accepts_loads(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        assert_comes_back(tiny(name), tmp_path / "saved")


@pytest.mark.parametrize("how", [None, "eager"], ids=["its own", "eager"])
@pytest.mark.parametrize("name", ["DetrModel", "DetrForObjectDetection", "MaskFormerModel"])
def test_a_model_with_a_backbone_loads(name: str, how: str | None, tmp_path: Path) -> None:
    """The backbone refuses attention that the model around it takes by itself."""
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    sizes = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "num_queries": 4,
    }
    detr = transformers.DetrConfig(**sizes, use_timm_backbone=False, backbone_config=backbone)
    config = detr
    if name.startswith("MaskFormer"):
        config = transformers.MaskFormerConfig(
            backbone_config=backbone, decoder_config=detr, fpn_feature_size=32, mask_feature_size=32
        )
    if how is not None:
        config._attn_implementation = how
    model: Any = getattr(transformers, name)(config)
    assert_comes_back(model.eval(), tmp_path / "saved")
    again: Any = torchprune.load(tmp_path / "saved")
    assert again.config._attn_implementation == model.config._attn_implementation
