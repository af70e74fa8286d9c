"""Which settings count heads is told by what the class makes of them, whatever they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import tokens
from structures import close, outputs
from torch import Tensor, nn

import torchprune
from torchprune import HeadSpec, NeuronSpec, plan_shrink, shrink
from torchprune.export import to_hf
from torchprune.structure.config import is_native

transformers = pytest.importorskip("transformers")


class LanesConfig(transformers.PretrainedConfig):
    model_type = "lanes"

    def __init__(
        self,
        width: int = 16,
        lanes: int = 4,
        shared: int = 2,
        lane: int | None = None,
        places: int = 4,
        deep: int = 2,
        **more: Any,
    ) -> None:
        self.width, self.lanes, self.shared, self.lane = width, lanes, shared, lane
        self.places, self.deep = places, deep
        super().__init__(**more)


class Lanes(transformers.PreTrainedModel):
    """Attention with grouped queries, whose configuration calls nothing a head."""

    config_class = LanesConfig

    def __init__(self, config: LanesConfig) -> None:
        super().__init__(config)
        self.size = config.lane or config.width // config.lanes
        self.times = config.lanes // config.shared
        self.layers = nn.ModuleList()
        for _ in range(config.deep):
            q, kv = (nn.Linear(config.width, n * self.size) for n in (config.lanes, config.shared))
            value = nn.Linear(config.width, config.shared * self.size)
            out = nn.Linear(config.lanes * self.size, config.width)
            self.layers.append(nn.ModuleList([q, kv, value, out]))
        self.table = nn.Embedding(config.places, config.width)
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table.weight.sum(0)
        for q, k, v, out in self.layers:
            parts = (layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (q, k, v))
            one, two, three = parts
            y = F.scaled_dot_product_attention(one, two, three, enable_gqa=True)
            x = x + out(y.transpose(1, 2).flatten(2))
        return x


@pytest.mark.parametrize("lane", [None, 4, 6])
def test_what_counts_heads_may_be_called_anything(lane: int | None) -> None:
    torch.manual_seed(0)
    model, x = Lanes(LanesConfig(lane=lane)).double().eval(), torch.randn(2, 5, 16).double()
    torchprune.sparsify(model, HeadSpec(0.5, refit=False), [x], progress=False)
    want = outputs(model, x)
    shrink(model, plan_shrink(model, x))
    config = model.config
    assert (config.lanes, config.shared, config.lane) == (2, 1, lane or 4)
    assert (config.width, config.places, config.deep) == (16, 4, 2)
    assert is_native(model)
    assert close(outputs(model, x), want, 1e-12)


def test_a_size_that_follows_from_the_number_of_heads_is_no_setting(tmp_path: Path) -> None:
    """MPNet's biases alone could say fewer heads, which the class would make wider."""
    torch.manual_seed(0)
    config = transformers.MPNetConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
    )
    model = transformers.MPNetForMaskedLM(config).double().eval()
    batch = {"input_ids": tokens(count=1)[0]}
    torchprune.sparsify(model, HeadSpec(0.5, refit=False), [batch], progress=False)
    want = outputs(model, batch)
    shrink(model, plan_shrink(model, batch))
    assert model.config.num_attention_heads == 4
    torchprune.save(model, tmp_path / "own")
    assert close(outputs(torchprune.load(tmp_path / "own"), batch), want, 1e-10)


def mamba2() -> tuple[nn.Module, Any]:
    """The size of its states is the number of its heads, and their width too."""
    config = transformers.Mamba2Config(
        vocab_size=61,
        hidden_size=32,
        expand=2,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=8,
        num_hidden_layers=2,
        conv_kernel=4,
        chunk_size=8,
    )
    return transformers.Mamba2ForCausalLM(config), {"input_ids": tokens(count=1)[0]}


def llava(**text: int) -> tuple[nn.Module, Any]:
    """A text and a vision model of the same numbers."""
    both = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    vision = transformers.CLIPVisionConfig(**both, image_size=16, patch_size=8, projection_dim=32)
    language = transformers.LlamaConfig(**{**both, **text}, vocab_size=61, num_key_value_heads=4)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=language, image_token_index=3, vision_feature_layer=-1
    )
    batch = tokens(count=1)[0].clamp(min=4)
    batch[:, 1:5] = 3
    return transformers.LlavaForConditionalGeneration(config), {
        "input_ids": batch,
        "pixel_values": torch.randn(2, 3, 16, 16),
    }


@pytest.mark.parametrize("of", ["text", "vision"])
@pytest.mark.parametrize("spec", [NeuronSpec, HeadSpec])
def test_equal_numbers_of_configurations_inside_it_are_told_apart(
    of: str, spec: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, batch = llava()
    model = model.eval()
    selected = "*language_model*" if of == "text" else "*vision*"
    torchprune.sparsify(model, spec(0.5, refit=False, targets=selected), [batch], progress=False)
    want = outputs(model, batch)
    shrink(model, plan_shrink(model, batch))
    changed = {
        name: [getattr(one, what) for what in ("intermediate_size", "num_attention_heads")]
        for name, one in (
            ("text", model.config.text_config),
            ("vision", model.config.vision_config),
        )
    }
    smaller = [24, 4] if spec is NeuronSpec else [48, 2]
    if of == "vision" and spec is HeadSpec:  # CLIP has no setting for the size of a head
        smaller = [48, 4]
    assert changed[of] == smaller
    assert changed["vision" if of == "text" else "text"] == [48, 4]
    if is_native(model):
        to_hf(model, tmp_path / "stock")
        again = type(model).from_pretrained(tmp_path / "stock")
    else:
        torchprune.save(model, tmp_path / "own")
        again = torchprune.load(tmp_path / "own")
    assert close(outputs(again, batch), want, 1e-4)


def test_states_as_large_as_there_are_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = mamba2()
    model = model.eval()
    torchprune.sparsify(model, HeadSpec(0.5, refit=False), [batch], progress=False)
    want = outputs(model, batch)
    shrink(model, plan_shrink(model, batch))
    mixer: Any = model.backbone.layers[0].mixer
    assert (mixer.num_heads, mixer.n_groups, mixer.ssm_state_size) == (4, 4, 8)
    assert close(outputs(model, batch), want, 1e-4)
    torchprune.save(model, tmp_path / "own")
    assert close(outputs(torchprune.load(tmp_path / "own"), batch), want, 1e-4)
