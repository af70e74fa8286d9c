"""Which layers are pruned: by default in every family, and by every kind of selector."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from families import FAMILIES, llama
from torch import nn
from torch.nn.utils import parametrize

import torchprune
from torchprune import MagnitudeSpec, WandaSpec
from torchprune.errors import SpecError, TargetError
from torchprune.masking.selection import layers_of, repeated_blocks, tied_to
from torchprune.masking.targets import Plan, make_plan
from torchprune.specs.patterns import NM


def plan(model: nn.Module, **options: Any) -> Plan:
    return make_plan(model, MagnitudeSpec(**options))


def names(model: nn.Module, **options: Any) -> list[str]:
    return [target.name for target in plan(model, **options).targets]


# -- defaults -------------------------------------------------------------------------------------

DEFAULTS = {
    # family: what a chosen layer's name matches, how many there are, what is left dense
    "llama": (
        r"model\.layers\.\d\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
        14,
        ["lm_head"],
    ),
    "qwen3": (
        r"model\.layers\.\d\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
        14,
        ["lm_head"],
    ),
    "gemma": (
        r"model\.layers\.\d\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
        14,
        ["lm_head"],
    ),
    "mixtral": (
        r"model\.layers\.\d\.(self_attn\.[qkvo]_proj|mlp\.experts\.(gate_up|down)_proj)",
        12,
        ["lm_head", *(f"model.layers.{i}.mlp.gate.weight" for i in range(2))],
    ),
    "opt": (r"model\.decoder\.layers\.\d\.(self_attn\.\w+_proj|fc[12])", 12, ["lm_head"]),
    "gpt2": (r"transformer\.h\.\d\.(attn|mlp)\.c_\w+", 8, ["lm_head"]),
    "bert": (r"encoder\.layer\.\d\..*(query|key|value|dense)", 12, ["pooler.dense"]),
    "t5": (r"(encoder|decoder)\.block\.\d\.layer\.\d\.\w+\.(q|k|v|o|wi|wo)", 32, ["lm_head"]),
    "vit": (
        r"vit\.layers\.\d\.(attention\.\w+|mlp\.fc[12])",
        12,
        ["vit.embeddings.patch_embeddings.projection", "classifier"],
    ),
    "resnet": (
        r"resnet\.encoder\.stages\.\d\.layers\.\d\..*convolution",
        14,
        ["resnet.embedder.embedder.convolution", "classifier.1"],
    ),
    "mlp": (r"[024]", 3, []),
    "torch_encoder": (r"layers\.\d\.(linear[12]|self_attn\.(in_proj_weight|out_proj))", 8, []),
}


@pytest.mark.parametrize("family", DEFAULTS)
def test_default_targets(family: str) -> None:
    pattern, count, dense = DEFAULTS[family]
    found = plan(FAMILIES[family].make())
    chosen = [target.name for target in found.targets]
    assert len(chosen) == len(set(chosen)) == count
    assert [name for name in chosen if not re.fullmatch(pattern, name)] == []
    assert list(found.skipped) == dense
    unseen = ("outside the repeated blocks", "nothing is known of how it multiplies")
    assert all(why.startswith(unseen) for why in found.skipped.values())


def test_routers_embeddings_and_norms_are_never_chosen() -> None:
    for family in ("mixtral", "qwen2_moe"):
        model = FAMILIES[family].make()
        chosen = {f"{name}." for name in names(model, targets="*", ignore="lm_head")}
        assert not any("embed" in n or "norm" in n or n.endswith(".gate.") for n in chosen)


def test_a_model_without_blocks_is_taken_whole() -> None:
    assert names(nn.Linear(4, 4)) == ["weight"]
    assert names(FAMILIES["mlp"].make()) == ["0", "2", "4"]
    model = nn.Module()
    model.one, model.two = nn.Conv2d(4, 4, 3), nn.Linear(4, 4)
    assert names(model) == ["one", "two"]


def test_blocks_are_the_outermost_repetition() -> None:
    assert list(repeated_blocks(FAMILIES["llama"].make())) == ["model.layers.0", "model.layers.1"]
    assert list(repeated_blocks(FAMILIES["resnet"].make())) == [
        "resnet.encoder.stages.0",
        "resnet.encoder.stages.1",
    ]
    assert repeated_blocks(FAMILIES["mlp"].make()) == {}
    # A list of bare layers, or of modules without weights, is no repetition of blocks.
    assert repeated_blocks(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])) == {}
    stack = nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2)])
    assert list(repeated_blocks(stack)) == ["0", "1"]


@pytest.mark.parametrize(
    "outer", [nn.ModuleList, lambda xs: nn.ModuleDict(zip("ab", xs, strict=True))]
)
def test_of_lists_of_lists_the_blocks_are_what_is_called(outer: Any) -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    stages = outer([nn.ModuleList([block(), block()]), nn.ModuleList([block()])])
    keys = list(stages._modules)
    assert list(repeated_blocks(stages)) == [f"{keys[0]}.0", f"{keys[0]}.1", f"{keys[1]}.0"]


def test_blocks_of_raw_parameters_alone_are_blocks_too() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.weight = nn.LayerNorm(4), nn.Parameter(torch.randn(4, 4))

    stack = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([Raw(), Raw()]))
    assert list(repeated_blocks(stack)) == ["1.0", "1.1"]


def test_a_shared_module_is_one_layer() -> None:
    same = nn.Linear(4, 4)
    model = nn.Sequential(same, nn.ReLU(), same)
    assert names(model) == ["0"]
    assert tied_to(model) == {}


# -- tied weights and the head --------------------------------------------------------------------


def test_blocks_that_share_tied_weights_are_told_of() -> None:
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(3)))
    blocks[2][0].weight = blocks[0][0].weight
    (warning,) = plan(blocks).warnings
    assert warning.startswith("covered 80% of the blocks' weights: 20% stay dense")
    assert "0.0.weight: its weight is tied to 2.0.weight" in warning


def test_tied_weights_are_skipped_with_a_reason() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6), "up": nn.Linear(4, 4)}
    )
    model["head"].weight = model["embed"].weight
    found = plan(model)
    assert [t.name for t in found.targets] == ["up"]
    assert found.skipped == {"head": "its weight is tied to embed.weight"}


def test_a_tied_weight_cannot_be_asked_for_by_name() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    for name in ("b", "b.weight"):
        with pytest.raises(
            TargetError, match=r"'b' cannot be pruned: its weight is tied to a\.weight"
        ):
            plan(model, targets=["c", name])
    assert names(model, targets="*") == ["c"]


def test_parts_of_one_storage_are_tied() -> None:
    both = torch.randn(8, 4)
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["a"].weight, model["b"].weight = nn.Parameter(both[:4]), nn.Parameter(both[4:])
    with pytest.raises(TargetError, match="tied to"):
        plan(model)


def test_a_head_is_pruned_only_by_its_own_name() -> None:
    model = FAMILIES["llama"].make()
    assert "lm_head" not in names(model, targets=nn.Linear)
    assert "lm_head" not in names(model, targets="*")
    assert "output head" in plan(model, targets="*").skipped["lm_head"]
    assert names(model, targets="lm_head") == ["lm_head"]


def test_a_tied_head_stays_dense_even_by_name() -> None:
    model = llama(tie_word_embeddings=True)
    with pytest.raises(
        TargetError, match=r"'lm_head' cannot be pruned.*model\.embed_tokens\.weight"
    ):
        plan(model, targets="lm_head")


# -- selectors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "count"),
    [
        ("model.layers.1.mlp.up_proj", 1),
        ("model.layers.1.mlp.up_proj.weight", 1),
        ("model.layers.1.mlp", 3),
        ("model.layers.0", 7),
        ("*.q_proj", 2),
        ("*.[qk]_proj", 4),
        ("model.layers.?.self_attn", 8),
        (r"re:.*\.(gate|up)_proj", 4),
        (["*.q_proj", "*.k_proj", "*.q_proj"], 4),
        (("*.q_proj", "re:.*v_proj"), 4),
        (nn.Linear, 14),
        (lambda module, name: module.in_features == 48, 2),
        (lambda module, name: "layers.0" in name, 7),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_selectors(selector: Any, count: int) -> None:
    model = FAMILIES["llama"].make()
    assert len(names(model, targets=selector)) == count
    if count < 14:
        assert len(names(model, ignore=selector)) == 14 - count


def test_ignoring_everything_leaves_nothing() -> None:
    with pytest.raises(TargetError, match=r"nothing to prune.*ignored"):
        plan(FAMILIES["llama"].make(), ignore=nn.Linear)


def test_types_select_subclasses_and_transformers_own() -> None:
    from transformers.pytorch_utils import Conv1D

    assert len(names(FAMILIES["gpt2"].make(), targets=Conv1D)) == 8
    assert names(nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1)), targets=nn.Conv1d) == ["1"]


def test_fused_experts_have_a_name_for_each_tensor() -> None:
    model = FAMILIES["mixtral"].make()
    one = "model.layers.0.mlp.experts.down_proj"
    assert names(model, targets=one) == [one]
    assert len(names(model, targets="*.experts")) == 4
    assert len(names(model, targets="*.down_proj")) == 2


def test_layers_come_in_the_order_of_the_model() -> None:
    model = FAMILIES["llama"].make()
    order = [layer.name for layer in layers_of(model)]
    assert names(model, targets=["*.v_proj", "*.q_proj"]) == [
        n for n in order if n.endswith(("q_proj", "v_proj"))
    ]


# -- selectors that fit nothing -------------------------------------------------------------------


@pytest.mark.parametrize("what", ["targets", "ignore"])
def test_an_unknown_name_is_refused_with_a_hint(what: str) -> None:
    with pytest.raises(TargetError) as error:
        plan(FAMILIES["llama"].make(), **{what: "model.layers.1.mlp.up_prj"})
    text = str(error.value)
    assert text.startswith(f"{what}: 'model.layers.1.mlp.up_prj' matches none")
    assert "did you mean" in text
    assert "'model.layers.1.mlp.up_proj'" in text


@pytest.mark.parametrize("selector", ["*.query", "re:nothing.*", nn.Conv2d, lambda m, n: False])
def test_a_selector_that_matches_nothing_is_refused(selector: Any) -> None:
    for what in ("targets", "ignore"):
        with pytest.raises(TargetError, match=f"{what}: .*matches none of the model's 15 prunable"):
            plan(FAMILIES["llama"].make(), **{what: ["*.q_proj", selector]})


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.norm", "model.layers.0.mlp.act_fn"])
def test_a_module_that_cannot_be_pruned_is_refused_by_name(name: str) -> None:
    model = FAMILIES["llama"].make()
    kind = type(model.get_submodule(name)).__name__
    with pytest.raises(TargetError, match=f"'{name}' is a {kind}, which holds nothing"):
        plan(model, targets=["*.q_proj", name])


@pytest.mark.parametrize("bad", [3, 2.5, [3], [None]])
def test_what_is_no_selector(bad: Any) -> None:
    with pytest.raises(TargetError, match="is not a selector; accepted: an exact name, a glob"):
        plan(FAMILIES["mlp"].make(), targets=bad)


def test_a_broken_regular_expression() -> None:
    with pytest.raises(TargetError, match=r"'re:\(' is not a valid regular expression"):
        plan(FAMILIES["mlp"].make(), targets="re:(")


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Embedding(3, 3), nn.Sequential(nn.LayerNorm(3))])
def test_models_without_prunable_weights(model: nn.Module) -> None:
    with pytest.raises(TargetError, match="nothing to prune in this"):
        plan(model)


# -- weights that cannot carry a mask -------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(model[0], "weight", Doubled())


def quantized(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)


def on_meta(model: nn.Module) -> None:
    model[0].to("meta")


def computed(model: nn.Module) -> None:
    del model[0].weight
    model[0].weight = torch.ones(4, 4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (parametrized, "already has another parametrization"),
        (quantized, r"is torch\.int8; prune before quantizing"),
        (on_meta, "is on the meta device"),
        (computed, "is a Tensor, not a Parameter"),
    ],
)
def test_weights_that_cannot_carry_a_mask(change: Any, reason: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    change(model)
    found = plan(model)
    assert [t.name for t in found.targets] == ["1"]
    assert re.search(reason, found.skipped["0"])
    with pytest.raises(TargetError, match=rf"'0' cannot be pruned: its weight {reason}"):
        plan(model, targets=["0", "1"])


# -- overrides ------------------------------------------------------------------------------------


def test_overrides_decide_layer_by_layer() -> None:
    model = FAMILIES["llama"].make()
    spec = WandaSpec(
        0.5,
        overrides={
            "model.layers.0.mlp.down_proj": "dense",
            "*.down_proj": "2:4",
            "model.layers.1": 0.25,
            "*.o_proj": ("block:2x4", 0.75),
        },
    )
    found = {t.name: t.goal for t in make_plan(model, spec).targets}
    assert "model.layers.0.mlp.down_proj" not in found
    assert found["model.layers.1.mlp.down_proj"].pattern == NM(2, 4)  # the first key decides
    assert found["model.layers.1.self_attn.o_proj"].sparsity == 0.25
    assert str(found["model.layers.0.self_attn.o_proj"]) == "block:2x4 0.75"
    assert found["model.layers.0.self_attn.q_proj"].sparsity == 0.5
    skipped = make_plan(model, spec).skipped["model.layers.0.mlp.down_proj"]
    assert skipped == "dense by overrides['model.layers.0.mlp.down_proj']"


def test_an_override_that_matches_nothing_is_refused() -> None:
    with pytest.raises(TargetError, match=r"overrides: 'model\.layer\.0' matches none"):
        plan(FAMILIES["llama"].make(), overrides={"model.layer.0": "dense"})


def test_all_dense_leaves_nothing() -> None:
    with pytest.raises(TargetError, match=r"nothing to prune.*dense by overrides"):
        plan(FAMILIES["mlp"].make(), overrides={"*": "dense"})


def test_overrides_act() -> None:
    model = FAMILIES["mlp"].make()
    spec = MagnitudeSpec(0.5, overrides={"0": "dense", "2": 0.75, "4": "1:4"})
    torchprune.sparsify(model, spec)
    kept = {k: m.float().mean().item() for k, m in torchprune.masks(model).items()}
    assert kept == {"2.weight": 0.25, "4.weight": 0.25}
    assert set(
        torchprune.masks(model)["4.weight"].unflatten(1, (-1, 4)).sum(2).flatten().tolist()
    ) == {1}


def test_a_global_budget_needs_one_goal() -> None:
    for overrides in ({"0": 0.7}, {"0": "block:2x2"}):
        with pytest.raises(SpecError, match='scope "global" shares one budget'):
            plan(FAMILIES["mlp"].make(), scope="global", overrides=overrides)
    with pytest.raises(SpecError, match="same unstructured or block goal, got 2:4"):
        plan(FAMILIES["mlp"].make(), scope="global", pattern="2:4")
    assert len(names(FAMILIES["mlp"].make(), scope="global", overrides={"0": "dense"})) == 2


def test_a_plan_prints_what_becomes_what() -> None:
    text = str(plan(FAMILIES["llama"].make(), overrides={"*.q_proj": "2:4"}))
    assert "model.layers.0.self_attn.q_proj  1x32x32  2:4" in text
    assert "model.layers.0.mlp.down_proj  1x32x48  unstructured 0.5" in text
    assert "lm_head  dense: outside the repeated blocks" in text


def test_planning_touches_nothing() -> None:
    model = FAMILIES["llama"].make()
    before = {k: (id(v), v.clone()) for k, v in model.named_parameters()}
    plan(model, targets="*", overrides={"*.q_proj": "2:4"})
    assert all(
        before[k][0] == id(v) and torch.equal(before[k][1], v) for k, v in model.named_parameters()
    )
