"""Every other adapter of peft on masked layers: right, or refused with what to call instead."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from families import FAMILIES, tokens
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.errors import MaskError
from torchprune.masking.mask import masked_layers
from torchprune.training import MaskLoRA, add_mask_lora

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of peft, which has many
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

TARGETS = {"target_modules": ["q_proj", "k_proj"]}

KEEP: dict[str, dict[str, Any]] = {
    "IA3Config": {**TARGETS, "feedforward_modules": []},
    "HiraConfig": {**TARGETS, "r": 4},
    "LNTuningConfig": {"target_modules": ["input_layernorm"]},
}
"""What scales a layer, or leaves it alone: a merge keeps its zeros."""

FILL: dict[str, dict[str, Any]] = {
    "AdaLoraConfig": {**TARGETS, "total_step": 10},
    "BOFTConfig": {**TARGETS, "boft_block_size": 4},
    "C3AConfig": {**TARGETS, "block_size": 8},
    "DeloraConfig": TARGETS,
    "FourierFTConfig": {**TARGETS, "n_frequency": 16},
    "HRAConfig": TARGETS,
    "LoHaConfig": {**TARGETS, "r": 4},
    "LoKrConfig": {**TARGETS, "r": 4},
    "OFTConfig": {**TARGETS, "oft_block_size": 4, "r": 0},
    "RandLoraConfig": {**TARGETS, "r": 4},
    "ShiraConfig": {**TARGETS, "r": 4},
    "VBLoRAConfig": {**TARGETS, "vector_length": 8, "num_vectors": 8, "topk": 2},
    "VeraConfig": {**TARGETS, "r": 4},
}
"""What fills zeros when it is merged."""

PROMPTS = ["PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig"]


def masked() -> Any:
    model = FAMILIES["llama"].make()
    return torchprune.sparsify(model, MagnitudeSpec(), progress=False)


def run(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=tokens()[0]).logits
    return logits


def made(name: str, options: dict[str, Any]) -> Any:
    if not hasattr(peft, name):
        pytest.skip(f"this peft has no {name}")
    return getattr(peft, name)(**options)


def stirred(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    return model.eval()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("name", KEEP)
def test_what_only_scales_is_merged(name: str) -> None:
    model = masked()
    kept = torchprune.masks(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*masked layers")
        adapted = stirred(peft.get_peft_model(model, made(name, KEEP[name])))
    torchprune.peft_ready(adapted)
    trained = run(adapted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(run(merged), trained)
    after = torchprune.masks(merged)
    assert all(torch.equal(after[key], mask) for key, mask in kept.items())


@pytest.mark.parametrize("name", FILL)
def test_what_fills_zeros_works_beside_them_and_is_not_merged(name: str) -> None:
    model = masked()
    dense = run(model)
    with pytest.warns(UserWarning, match="use LoraConfig"):
        adapted = peft.get_peft_model(model, made(name, FILL[name]))
    stirred(adapted)
    trained, state = run(adapted), state_of(adapted)
    assert not torch.equal(trained, dense)
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(MaskError, match=r"would be filled .* use LoraConfig"):
            merge()
        assert same(state_of(adapted), state)
        assert torch.equal(run(adapted), trained)
    layer = next(m for m in adapted.modules() if getattr(m, "merged_adapters", None) is not None)
    with pytest.raises(MaskError, match="would be filled"):
        layer.merge()
    assert torch.equal(run(adapted), trained)
    with pytest.raises(MaskError, match="cannot be merged into its layer's zeros"):
        torchprune.peft_ready(adapted)
    plain = adapted.unload()
    assert torch.equal(run(plain), dense)


def test_all_layers_are_merged_or_none() -> None:
    """Of two adapters the first could be merged."""
    model = masked()
    adapted = peft.PeftMixedModel(model, peft.LoraConfig(r=4, target_modules=["q_proj"]), "lora")
    with pytest.warns(UserWarning, match="masked layers"):
        adapted.add_adapter("loha", peft.LoHaConfig(r=4, target_modules=["up_proj"]))
    adapted.set_adapter(["lora", "loha"])
    stirred(adapted)
    state, trained = state_of(adapted), run(adapted)
    with pytest.raises(MaskError, match="would be filled"):
        adapted.merge_adapter()
    assert same(state_of(adapted), state)
    assert torch.equal(run(adapted), trained)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_touch_no_layer(name: str) -> None:
    model = masked()
    kept = torchprune.masks(model)
    options = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(model, made(name, options))
    run(adapted).sum().backward()
    after = torchprune.masks(adapted.get_base_model())
    assert all(torch.equal(after[key], mask) for key, mask in kept.items())


@pytest.mark.parametrize("option", ["alora_invocation_tokens", "velora_config"])
def test_variants_of_lora_that_are_not_known(option: str) -> None:
    options = {
        "alora_invocation_tokens": {"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"},
        "velora_config": {"velora_config": getattr(peft, "VeloraConfig", dict)()},
    }[option]
    try:
        config = peft.LoraConfig(r=4, init_lora_weights=False, **TARGETS, **options)
    except TypeError:
        pytest.skip(f"this peft has no {option}")
    with pytest.warns(UserWarning, match="masked layers"):
        adapted = peft.get_peft_model(masked(), config)
    state = state_of(adapted)
    with pytest.raises((MaskError, NotImplementedError)):
        adapted.merge_adapter()
    assert same(state_of(adapted), state)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


def test_packed_attention_is_refused_when_it_is_added() -> None:
    model, x = Attends(), torch.randn(2, 3, 16)
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    before, modules = model(x), [type(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(MaskError, match="MaskLoRA"):
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=2, target_modules=["inner", "attention"]), model
        )
    assert [type(m) for m in model.modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model(x), before)


def test_grouped_convolutions_are_left_to_peft() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU())  # of names that masks have, too
    torchprune.sparsify(model, MagnitudeSpec(targets="0"), progress=False)
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    x = torch.randn(2, 4, 6, 6)
    trained = adapted(x)
    with pytest.raises((NotImplementedError, MaskError)):
        adapted.merge_adapter()
    assert torch.equal(adapted(x), trained)


def test_factors_of_both_kinds_are_not_mixed() -> None:
    config = peft.LoraConfig(r=4, **TARGETS)
    model = masked()
    add_mask_lora(model, MaskLoRA(targets="*.q_proj"))
    before = run(model)
    with pytest.raises(MaskError, match="merge_mask_lora"):
        peft.get_peft_model(model, config)
    assert torch.equal(run(model), before)
    adapted = peft.get_peft_model(masked(), config)
    with pytest.raises(MaskError, match="merge_and_unload"):
        add_mask_lora(adapted)


def test_biases_and_embeddings_are_peft_s_own() -> None:
    model = masked()
    config = peft.LoraConfig(
        r=4, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, config)
    trained = run(adapted)
    torch.testing.assert_close(run(adapted.merge_and_unload()), trained)


def test_a_folded_model_is_filled_as_before_and_a_masked_copy_is_not() -> None:
    """Zeros alone are nothing that anybody could know of: `peft_ready(model, zeros=True)` is."""
    masked_model = masked()
    folded = torchprune.fold(copy.deepcopy(masked_model))
    config = peft.LoraConfig(r=4, init_lora_weights=False, **TARGETS)
    zeros = []
    for model in (masked_model, folded):
        merged = peft.get_peft_model(model, config).merge_and_unload()
        weight = merged.model.layers[0].self_attn.q_proj.weight
        zeros.append(int((weight == 0).sum()))
    assert zeros == [512, 0]
    assert next(masked_layers(folded), None) is None


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchprune.training.ready.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"torchprune\[peft\]"):
        torchprune.peft_ready(masked())
