"""Without some blocks a transformers model has a configuration that says so, or is as it was."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import sample
from torch import Tensor, nn
from zoo import VARIANTS, Built, Variant, built_as, floats

import torchprune
from torchprune import LayerSpec
from torchprune.errors import ShrinkError
from torchprune.export import to_hf
from torchprune.masking.selection import repeated_blocks
from torchprune.structure.plan import ShrinkPlan, idle_blocks_plan

transformers = pytest.importorskip("transformers")


def deep(kind: str, layers: int = 4) -> Built:
    """A tiny model of a family with blocks enough to tell one place from another."""
    for variant in (Variant(layers=layers), Variant(layers=6), *VARIANTS):
        try:
            return built_as(kind, variant)
        except Exception:
            continue
    pytest.skip(f"no tiny {kind} runs, with all its blocks")


def outputs(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        torch.manual_seed(0)
        return next(floats(model(**copy.deepcopy(batch))))


def masked(built: Built, *blocks: str) -> tuple[nn.Module, Any]:
    model, batch = copy.deepcopy(built.model), built.data(1)[0]
    spec = LayerSpec(len(blocks), targets=list(blocks))
    torchprune.sparsify(model, spec, [batch], progress=False)
    return model, batch


def plan_of(model: nn.Module, batch: Any, *blocks: str) -> ShrinkPlan:
    """Of whole blocks alone: without an export, which takes longer than all else here."""
    plan = idle_blocks_plan(model, batch)
    assert sorted(plan.blocks) == sorted(blocks)
    return plan


FAMILIES = {
    "qwen2_moe": ["model.layers.1"],
    "qwen3_moe": ["model.layers.0", "model.layers.2"],
    "qwen3_next": ["model.layers.1"],
    "deepseek_v2": ["model.layers.0"],
    "deepseek_v3": ["model.layers.1"],
    "glm4_moe": ["model.layers.0"],
    "llama4_text": ["model.layers.1"],
    "mixtral": ["model.layers.2"],
    "gpt_oss": ["model.layers.0"],
    "jamba": ["model.layers.0"],
    "bamba": ["model.layers.0"],
    "falcon_h1": ["model.layers.3"],
    "nemotron_h": ["model.layers.0"],
    "granitemoehybrid": ["model.layers.0"],
    "zamba": ["model.layers.0"],
    "zamba2": ["model.layers.2"],
    "lfm2": ["model.layers.0"],
    "lfm2_moe": ["model.layers.0", "model.layers.1"],
    "gemma3_text": ["model.layers.0"],
    "gemma4_text": ["model.layers.0"],
    "gemma4_unified_text": ["model.layers.1"],
    "cohere2": ["model.layers.1"],
    "smollm3": ["model.layers.2"],
    "lfm3": ["model.layers.2"],
    "minicpm3": ["model.layers.1"],
    "gpt_neo": ["transformer.h.1"],
    "esm": ["esm.encoder.layer.1"],
    "beit": ["beit.layers.1"],
    "dinov2": ["dinov2.encoder.layer.3"],
    "bigbird_pegasus": ["model.encoder.layers.0", "model.decoder.layers.2"],
    "qwen3_5": ["model.layers.0"],
    "gemma3": ["model.language_model.layers.1"],
}
"""Families of every way to say what a block is, and what goes."""


@pytest.mark.parametrize("kind", sample(FAMILIES, "qwen3_moe", "jamba", "gemma4_text", "beit"))
def test_stock_transformers_loads_the_smaller_model(kind: str, tmp_path: Path) -> None:
    built, blocks = deep(kind), FAMILIES[kind]
    model, batch = masked(built, *blocks)
    want = outputs(model, batch)
    torchprune.shrink(model, plan_of(model, batch, *blocks))
    torch.testing.assert_close(outputs(model, batch), want, rtol=1e-4, atol=1e-5)
    torchprune.save(model, tmp_path / "own")
    to_hf(model, tmp_path / "stock")
    stock: Any = type(model)
    for again in (
        stock.from_pretrained(tmp_path / "stock", attn_implementation="eager").eval(),
        torchprune.load(tmp_path / "own"),
    ):
        assert type(again) is type(model)
        assert again.config.to_dict().keys() == model.config.to_dict().keys()
        torch.testing.assert_close(outputs(again, batch), want, rtol=1e-4, atol=1e-5)


REFUSED = {
    "diffllama": ("model.layers.1", r"layers\.2\.self_attn\.lambda_init is 0\.35"),
    "esmc": ("esmc.layers.0", r"scaling_factor is 0\.28.* instead of 0\.33"),
    "jamba": ("model.layers.2", "What it can say: without model"),
    "gemma4_text": ("model.layers.3", "layer_type is 'full_attention' instead of 'sliding"),
}


@pytest.mark.parametrize("kind", sample(REFUSED, "diffllama"))
def test_what_no_configuration_says_is_refused(kind: str) -> None:
    """A block that its place makes another one would be another one in the file."""
    block, why = REFUSED[kind]
    model, batch = masked(deep(kind), block)
    before = copy.deepcopy(model.config.to_dict()), list(model.state_dict())
    with pytest.raises(ShrinkError, match=f"{block}.*cannot say that these blocks are gone.*{why}"):
        torchprune.shrink(model, plan_of(model, batch, block))
    assert (model.config.to_dict(), list(model.state_dict())) == before


# -- what numbers mean is told by what the class makes of them -------------------------------------


class OddConfig(transformers.PreTrainedConfig):  # type: ignore[misc, name-defined]
    """Equal numbers with different meanings, rules by period, lists that are not about blocks."""

    model_type = "odd"

    width: int = 4
    heads: int = 4
    steps: int = 4
    ends: list[int] | None = None
    wide_every: int = 2
    wide_from: int = 1
    early: int = 2
    biases: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.ends = [1, 2, 3, 5] if self.ends is None else self.ends
        self.biases = [0, 3] if self.biases is None else self.biases
        super().__post_init__(**kwargs)

    @property
    def tall(self) -> int:
        """Without a setter, and of a name that a number of blocks may have."""
        return self.heads


class OddBlock(nn.Module):
    def __init__(self, config: OddConfig, place: int) -> None:
        super().__init__()
        wide = place % config.wide_every == config.wide_from
        inner = config.width * (3 if wide else 2)
        self.up = nn.Linear(config.width, inner, bias=place in (config.biases or ()))
        self.down = nn.Linear(inner, config.width, bias=False)
        self.early, self.heads = place < config.early, config.heads

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return x + self.down(h.sin() if self.early else h.cos())


class Odd(transformers.PreTrainedModel):  # type: ignore[misc, name-defined]
    config_class = OddConfig
    main_input_name = "x"

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(OddBlock(config, i) for i in range(config.steps))
        self.mix = nn.Linear(config.heads, config.width)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
            if module.bias is not None:
                nn.init.normal_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.mix(x)


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        ([3], {"steps": 3}),
        ([0], {"steps": 3, "wide_from": 0, "early": 1, "biases": [2]}),
        ([0, 1], {"steps": 2, "early": 0, "biases": [1]}),
        ([1, 2], {"steps": 2, "early": 1, "biases": [0, 1]}),
        ([0, 2], {"steps": 2, "wide_every": 1, "wide_from": 0, "early": 1, "biases": [1]}),
        ([2], None),
    ],
    ids=str,
)
def test_settings_follow_by_what_they_do(
    gone: list[int], says: dict[str, Any] | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Odd(OddConfig()).eval(), torch.randn(2, 3, 4)
    blocks = [f"blocks.{i}" for i in gone]
    torchprune.sparsify(model, LayerSpec(len(gone), targets=blocks), [x], progress=False)
    want = model(x)
    before = copy.deepcopy(model.config.to_dict())
    if says is None:
        with pytest.raises(ShrinkError, match=r"blocks\.\d\.up"):
            torchprune.shrink(model, plan_of(model, x, *blocks))
        assert model.config.to_dict() == before
        return
    torchprune.shrink(model, plan_of(model, x, *blocks))
    assert model.config.to_dict() == {**before, **says}
    to_hf(model, tmp_path / "stock")
    torch.testing.assert_close(Odd.from_pretrained(tmp_path / "stock")(x), want)


def test_a_class_that_makes_nothing_of_its_configuration_is_refused() -> None:
    model, x = Odd(OddConfig()).eval(), torch.randn(2, 3, 4)
    torchprune.sparsify(model, LayerSpec(1, targets="blocks.3"), [x], progress=False)
    model.config.steps = "four"
    with pytest.raises(ShrinkError, match="makes no model of its configuration"):
        torchprune.shrink(model, plan_of(model, x, "blocks.3"))
    assert len(model.blocks) == 4


def test_tables_that_count_blocks_are_refused() -> None:
    class Sloped(Odd):
        """A table outside the file that follows from the place of a block."""

        def __init__(self, config: OddConfig) -> None:
            super().__init__(config)
            for place, block in enumerate(self.blocks):
                block.register_buffer("slope", torch.tensor(1.0 + place), persistent=False)

    model, x = Sloped(OddConfig(biases=[])).eval(), torch.randn(2, 3, 4)
    torchprune.sparsify(model, LayerSpec(2, targets=["blocks.0", "blocks.1"]), [x], progress=False)
    plan = plan_of(model, x, "blocks.0", "blocks.1")
    with pytest.raises(ShrinkError, match=r"blocks\.0\.slope"):
        torchprune.shrink(model, plan)
    assert len(model.blocks) == 4


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_where_a_model_was_loaded_from_is_no_part_of_it(kind: str, tmp_path: Path) -> None:
    built = deep(kind)
    built.model.save_pretrained(tmp_path / "dense")
    model = type(built.model).from_pretrained(tmp_path / "dense").eval()
    block = next(reversed(repeated_blocks(model)))
    model, batch = masked(dataclasses.replace(built, model=model), block)
    want = outputs(model, batch)
    torchprune.shrink(model, plan_of(model, batch, block))
    model.save_pretrained(tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small").eval()
    torch.testing.assert_close(outputs(again, batch), want, rtol=1e-4, atol=1e-5)
