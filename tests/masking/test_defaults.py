"""What stays dense unless it is named: the rule, its reasons, and how to overrule it."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, causal, decoder, tokens
from sweeps import sample
from torch import Tensor, nn

import torchprune
from torchprune import ADMMSpec, MagnitudeSpec, RIASpec, SparseGPTSpec, WandaSpec
from torchprune.errors import SpecError, TargetError
from torchprune.masking.defaults import surroundings_of, why_dense
from torchprune.masking.mask import original_of
from torchprune.masking.matrices import view_of
from torchprune.masking.selection import layers_of, repeated_blocks
from torchprune.masking.targets import Plan, make_plan
from torchprune.specs.patterns import NM


def plan(model: nn.Module, **options: Any) -> Plan:
    return make_plan(model, MagnitudeSpec(**options))


def names(model: nn.Module, **options: Any) -> list[str]:
    return [target.name for target in plan(model, **options).targets]


class Mixer(nn.Module):
    """A block of the kinds that stay dense, beside ordinary ones."""

    def __init__(self, width: int = 16, experts: int = 6) -> None:
        super().__init__()
        self.taps = nn.Conv1d(width, width, 3, padding=1, groups=width)
        self.many = nn.Conv1d(width, 2 * width, 3, padding=1, groups=width)
        self.grouped = nn.Conv1d(width, width, 3, padding=1, groups=4)
        self.wide = nn.Linear(width, 2 * width)
        self.odd = nn.Linear(2 * width, width - 2)
        self.back = nn.Linear(width - 2, width)
        self.volume = nn.Linear(width, 1)
        self.mind = nn.ModuleDict(
            {
                "who": nn.Linear(width, experts),
                "minds": nn.ModuleList([nn.Linear(width, width) for _ in range(experts)]),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.taps(x.mT) + self.many(x.mT)[:, ::2]).mT
        x = self.back(self.odd(self.wide(x))) * self.volume(x).sigmoid()
        shares = self.mind["who"](x).softmax(-1)
        said = torch.stack([mind(x) for mind in self.mind["minds"]], -1)
        return (said * shares.unsqueeze(-2)).sum(-1)


def mixers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Mixer() for _ in range(2)])


DENSE = {
    "taps": "depthwise",
    "many": "depthwise",
    "volume": "one output",
    "mind.who": "router",
}
PRUNED = ["grouped", "wide", "odd", "back", *(f"mind.minds.{i}" for i in range(6))]


# -- the rule --------------------------------------------------------------------------------------


def test_what_stays_dense_by_default() -> None:
    found = plan(mixers())
    assert [t.name for t in found.targets] == [f"{b}.{n}" for b in (0, 1) for n in PRUNED]
    assert set(found.skipped) == {f"{b}.{name}" for b in (0, 1) for name in DENSE}
    for name, why in DENSE.items():
        assert why in found.skipped[f"0.{name}"]


@pytest.mark.parametrize("spec", [MagnitudeSpec, WandaSpec, RIASpec, SparseGPTSpec, ADMMSpec])
@pytest.mark.parametrize("pattern", ["unstructured", "block:2x2"])
def test_the_rule_is_the_same_for_every_method_and_pattern(spec: Any, pattern: str) -> None:
    dense = {f"{b}.{name}" for b in (0, 1) for name in DENSE}
    assert set(make_plan(mixers(), spec(0.5, pattern=pattern)).skipped) == dense


@pytest.mark.parametrize(
    "selector",
    ["0.taps", "0.taps.weight", "0.volume", "*.taps", "re:.*\\.who", lambda m, n: "many" in n],
    ids=lambda s: s if isinstance(s, str) else "function",
)
def test_who_names_nothing_else_means_just_that(selector: Any) -> None:
    chosen = names(mixers(), targets=selector)
    assert chosen
    assert all(name.split(".", 1)[1] in DENSE for name in chosen)
    assert len(names(mixers(), targets=["*.wide", selector])) == len(chosen) + 2


@pytest.mark.parametrize("selector", ["*", "0", nn.Module, nn.Conv1d, lambda m, n: True])
def test_who_picks_much_does_not_mean_that(selector: Any) -> None:
    assert {name.split(".", 1)[1] for name in names(mixers(), targets=selector)}.isdisjoint(DENSE)


def test_an_exact_override_names_a_layer() -> None:
    found = plan(mixers(), overrides={"0.taps": 0.25, "*.many": 0.25})
    assert "0.taps" in [t.name for t in found.targets]
    assert {"1.taps", "0.many", "1.many"} <= set(found.skipped)


def test_if_nothing_else_is_there_reasons_are_given() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=4))
    with pytest.raises(TargetError, match=r"nothing to prune.*0: a depthwise.*name it in targets"):
        plan(model)
    assert names(model, targets="0") == ["0"]


def test_what_was_seen_at_work_stays_dense() -> None:
    model = mixers()
    watched = {id(model[1].wide.weight): "a router: its outputs are ranked by topk"}
    found = make_plan(model, WandaSpec(), watched=watched)
    assert found.skipped["1.wide"] == "a router: its outputs are ranked by topk"
    assert "0.wide" in [t.name for t in found.targets]
    named = make_plan(model, WandaSpec(targets="1.wide"), watched=watched)
    assert [t.name for t in named.targets] == ["1.wide"]


def test_as_many_outputs_as_experts_tell_only_beside_them() -> None:
    """The last layer of a whole model, or of a list that is depth, has the same shape by chance."""
    hidden = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
    deep = nn.ModuleDict({"hidden": hidden, "classes": nn.Linear(8, 2)})
    assert names(deep) == ["hidden.0", "hidden.1", "classes"]
    single = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    assert names(single) == ["0", "1"]
    inside = mixers()
    inside[0].mind["minds"][0] = nn.Linear(16, 6)  # an expert with as many outputs; no stack now
    assert "0.mind.who" in names(inside)


def test_a_layer_that_another_reads_is_no_router() -> None:
    """A shared expert may by chance be as wide as experts are many (Qwen3-Next: 512 both)."""
    blocks = mixers()
    for block in blocks:
        shared = {"up": nn.Linear(16, 6), "down": nn.Linear(6, 16)}
        block.mind["shared"] = nn.ModuleDict(shared)
    found = plan(blocks)
    assert {"0.mind.shared.up", "0.mind.shared.down"} <= {t.name for t in found.targets}
    assert "router" in found.skipped["0.mind.who"]


class Stack(nn.Module):
    """Experts in one tensor, under no known name."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.Parameter(torch.randn(5, 8, 8))


def test_routers_stand_beside_stacked_tensors_too() -> None:
    blocks = nn.Sequential(
        *[
            nn.ModuleDict({"up": nn.Linear(8, 8), "by": nn.Linear(8, 5), "of": Stack()})
            for _ in "ab"
        ]
    )
    found = plan(blocks)
    assert [t.name for t in found.targets] == ["0.up", "1.up"]
    assert found.skipped["0.by"] == "a router: it has one output for each of 5 experts"


class Hashed(nn.Module):
    """A router of raw numbers that only weighs: which expert it is says a table."""

    def __init__(self, experts: nn.Module, turned: bool) -> None:
        super().__init__()
        self.up, self.experts, self.turned = nn.Linear(8, 8), experts, turned
        self.gate = nn.Parameter(torch.randn(8, 5) if turned else torch.randn(5, 8))
        self.more = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x) @ self.more
        shares = (x @ self.gate if self.turned else F.linear(x, self.gate)).sigmoid()
        table = torch.arange(x.shape[1]).expand(x.shape[:2]).remainder(5)
        shares = shares.gather(-1, table.unsqueeze(-1))
        own = self.experts
        each = own.all if isinstance(own, Stack) else [expert.weight for expert in own]
        said = torch.stack([F.linear(x, weight) for weight in each], -2)
        chosen = said.gather(-2, table[..., None, None].expand(*x.shape[:2], 1, 8))
        return chosen.squeeze(-2) * shares


@pytest.mark.filterwarnings("ignore:covered")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_router_may_be_a_raw_tensor_that_ranks_nothing(stacked: bool, turned: bool) -> None:
    def experts() -> nn.Module:
        return Stack() if stacked else nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    torch.manual_seed(0)
    model = nn.Sequential(*(Hashed(experts(), turned) for _ in range(2)))
    torchprune.sparsify(model, WandaSpec(), [torch.randn(2, 10, 8)], progress=False)
    skipped = torchprune.report(model).skipped
    assert set(skipped) == {"0.gate", "1.gate"}
    assert all(
        why == "a router: it has one output for each of 5 experts" for why in skipped.values()
    )
    assert {"0.more", "1.more"} <= set(torchprune.masks(model))


# -- at the sizes that people have -----------------------------------------------------------------


def real(name: str, **settings: Any) -> nn.Module:
    """A model of a real size that holds no values."""
    with torch.device("meta"):
        return causal(name, **settings)


def dense_by_rule(model: nn.Module) -> dict[str, str]:
    layers = list(layers_of(model))
    blocks = repeated_blocks(model)
    inside = {id(m) for block in blocks.values() for m in block.modules()}
    views = {y.key: view_of(y.module, original_of(y.module, y.tensor).shape) for y in layers}
    around = surroundings_of(model, layers, blocks, views)
    found = {}
    for layer in layers:
        view = view_of(layer.module, original_of(layer.module, layer.tensor).shape)
        if id(layer.module) in inside and (why := why_dense(layer, view, around)):
            found[re.sub(r"^.*?\d+\.", "", layer.name)] = why
    return found


REAL: dict[str, tuple[dict[str, Any], set[str]]] = {
    # the smallest projections that are none of the rule's: keys and values of 405B and of 2B
    "Llama": (
        {
            "hidden_size": 16384,
            "intermediate_size": 53248,
            "num_attention_heads": 128,
            "num_key_value_heads": 8,
        },
        set(),
    ),
    "Gemma": (
        {
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 256,
        },
        set(),
    ),
    "Mamba": ({"hidden_size": 2560}, {"mixer.conv1d"}),
    "FalconMamba": ({"hidden_size": 4096}, {"mixer.conv1d"}),
    "Mamba2": ({}, {"mixer.conv1d"}),
    "Qwen3Next": (
        {"layer_types": ["linear_attention", "full_attention"]},
        {"linear_attn.conv1d", "mlp.shared_expert_gate"},
    ),
    "DeepseekV3": ({}, set()),
}


@pytest.mark.parametrize("name", sample(REAL, "Llama", "Mamba", "Qwen3Next"))
def test_at_real_sizes(name: str) -> None:
    settings, dense = REAL[name]
    model = real(name, num_hidden_layers=2, **settings)
    assert set(dense_by_rule(model)) == dense


def test_decays_of_each_head_are_tiny_at_real_sizes() -> None:
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    kinds = ["linear_attention", "full_attention"]
    with torch.device("meta"):
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(num_hidden_layers=2, layer_types=kinds))
    found = dense_by_rule(model)
    assert set(found) == {"linear_attn.conv1d", "linear_attn.in_proj_a", "linear_attn.in_proj_b"}
    assert found["linear_attn.in_proj_a"] == "tiny: 0.06% of its block's weights"


def test_first_layers_of_convolutional_nets_are_pruned() -> None:
    layers: list[nn.Module] = []
    for inner, outer in ((3, 64), (64, 128), (128, 256), (256, 512), (512, 512)):
        layers += [nn.Conv2d(inner, outer, 3), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))
    assert names(model)[0] == "0"
    assert len(names(model)) == 6


# -- what does not fit the pattern -----------------------------------------------------------------

HYBRIDS: dict[str, dict[str, Any]] = {
    "Mamba": {"num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4},
    "Mamba2": {
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 32,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "Jamba": {
        "num_hidden_layers": 4,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 4,
    },
    "FalconH1": {
        "head_dim": 16,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "Qwen3Next": {
        "head_dim": 16,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
    },
}


@pytest.mark.parametrize("name", sample(HYBRIDS, "Mamba", "Qwen3Next"))
@pytest.mark.filterwarnings("ignore:.*no calibration batch reached it")  # read without a forward
def test_the_headline_call_on_hybrids(name: str) -> None:
    model = decoder(name, hidden_size=128, intermediate_size=96, **HYBRIDS[name]).eval()
    torchprune.sparsify(model, WandaSpec(pattern="2:4"), tokens(count=4), progress=False)
    report = torchprune.report(model)
    assert {layer.pattern for layer in report.layers} == {"2:4"}
    assert report.sparsity == 0.5
    kernels = [k for k in report.skipped if k.endswith("conv1d")]
    assert kernels
    assert all("depthwise" in report.skipped[k] for k in kernels)
    model(tokens(count=1)[0])


def test_what_cannot_take_the_pattern_stays_dense() -> None:
    found = plan(mixers(), pattern="2:4")
    assert "0.back" not in [t.name for t in found.targets]
    assert found.skipped["0.back"] == (
        "pattern 2:4 needs an input width divisible by 4, got 14 (matrix 16 x 14)"
    )
    assert "0.odd" in [t.name for t in found.targets]
    tiled = plan(mixers(), pattern="block:8x8", sparsity=0.5)
    assert "rows divisible by 8" in tiled.skipped["0.odd"]
    assert "rows divisible by 8" in tiled.skipped["0.grouped"]


@pytest.mark.parametrize(
    "options",
    [
        {"targets": ["*.wide", "0.back"]},
        {"targets": "0.back.weight"},
        {"overrides": {"0.back": NM(2, 4)}},
        {"overrides": {"0.taps": NM(2, 4)}},
    ],
)
def test_who_names_what_cannot_take_the_pattern_is_told(options: dict[str, Any]) -> None:
    layer = "0.taps" if "0.taps" in str(options) else "0.back"
    with pytest.raises(SpecError, match=rf"^{layer}: pattern 2:4 needs an input width divisible"):
        plan(mixers(), **{"pattern": "2:4", **options})


def test_a_pattern_for_some_fits_where_it_fits() -> None:
    found = plan(mixers(), overrides={"*.back": "2:4", "*.odd": "dense"})
    assert found.skipped["0.back"].startswith("pattern 2:4")
    assert found.skipped["0.odd"] == "dense by overrides['*.odd']"
    glob = plan(mixers(), pattern="2:4", targets=["*.wide", "*.back"])
    assert [t.name for t in glob.targets] == ["0.wide", "1.wide"]
    with pytest.raises(
        SpecError, match=r"^0\.back: pattern.*; 1\.back: .*nothing is left to prune"
    ):
        plan(mixers(), pattern="2:4", targets="*.back")


def test_a_global_budget_takes_what_fits() -> None:
    model = mixers()
    with pytest.warns(UserWarning, match="covered"):
        torchprune.sparsify(model, MagnitudeSpec(0.5, pattern="block:8x8", scope="global"))
    assert torchprune.report(model).sparsity == 0.5


# -- weights that cannot carry a mask --------------------------------------------------------------


def stack_of(*widths: int) -> nn.Module:
    return nn.Sequential(*[nn.Linear(8, width) for width in widths])


def test_what_cannot_carry_a_mask_is_told() -> None:
    model = stack_of(8, 8, 8, 8)
    model[1].to("meta")
    quantized = torch.ones(8, 8, dtype=torch.int8)
    model[2].weight = nn.Parameter(quantized, requires_grad=False)
    model[3] = nn.Linear(8, 16)
    text = "2 layers with 40% of the weights to prune cannot carry a mask: 1: its weight is on the "
    (warning,) = plan(model).warnings
    assert warning.startswith(text)
    assert "2: its weight is torch.int8; prune before quantizing" in warning
    with pytest.warns(UserWarning, match=re.escape(text)):
        torchprune.sparsify(model, MagnitudeSpec())
    assert any(text in w for w in torchprune.report(model).warnings)


def test_more_than_half_that_cannot_is_an_error() -> None:
    model = stack_of(8, 8, 7)
    model[0].to("meta")
    assert "35%" in plan(model).warnings[0]
    model[1].to("meta")
    with pytest.raises(TargetError, match=r"2 layers with 70% .*load the model whole.*ignore"):
        torchprune.sparsify(model, MagnitudeSpec())
    assert not torchprune.masks(model)
    assert names(model, ignore=["0", "1"]) == ["2"]
    assert plan(model, ignore=["0", "1"]).warnings == []


def test_normalised_weights_are_told_whatever_the_normalisation() -> None:
    from torch.nn.utils.parametrizations import spectral_norm, weight_norm

    for norm in (weight_norm, spectral_norm):
        model = stack_of(8, 8, 16)
        norm(model[1])
        assert "1 layer with 25% " in plan(model).warnings[0]
        norm(model[2])
        with pytest.raises(TargetError, match="already has another parametrization"):
            plan(model)


def test_tied_weights_are_not_lost() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(99, 8), "up": nn.Linear(8, 8)})
    model["head"] = nn.Linear(8, 99, bias=False)
    model["head"].weight = model["embed"].weight
    found = plan(model)
    assert "tied" in found.skipped["head"]
    assert found.warnings == []


# -- what is covered -------------------------------------------------------------------------------


class Hidden(nn.Module):
    """A block most of whose weights belong to no layer."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(8)
        self.own = nn.Parameter(torch.randn(rows, 8))
        self.table = nn.Embedding(50, 8)
        self.scale = nn.Parameter(torch.ones(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.up(x)[..., :8] @ self.own.T @ self.own * self.scale


def hidden(rows: int) -> nn.Module:
    return nn.ModuleDict(
        {"blocks": nn.Sequential(Hidden(rows), Hidden(rows)), "head": nn.Linear(8, 99)}
    )


def pruned(model: nn.Module, **options: Any) -> list[str]:
    """What sparsify warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torchprune.sparsify(model, MagnitudeSpec(**options))
    return [str(w.message) for w in caught]


def test_the_report_counts_what_is_covered() -> None:
    model = hidden(16)  # in a block, 128 weights of a layer and 128 of none
    (said,) = pruned(model)
    assert said.startswith("covered 50% of the blocks' weights: 50% stay dense")
    assert "the largest of them blocks.0.own (and 1 more)" in said
    report = torchprune.report(model)
    assert report.coverage.share == 0.5
    assert {y.key: n for y, n in report.coverage.bare.items()} == {
        "blocks.0.own": 128,
        "blocks.1.own": 128,
    }
    assert "covered 50% of the blocks' weights" in str(report)
    assert report.to_dict()["total"]["covered"] == 0.5
    assert report.warnings == [said]


def test_little_is_no_warning() -> None:
    assert pruned(hidden(0)) == []
    model = hidden(2)
    model["blocks"][0].up, model["blocks"][1].up = nn.Linear(8, 64), nn.Linear(8, 64)
    assert pruned(model) == []
    assert torchprune.report(model).coverage.share == pytest.approx(64 / 66)
    assert "covered 97% of the blocks' weights" in str(torchprune.report(model))


def test_what_the_user_leaves_out_is_no_warning() -> None:
    assert pruned(hidden(16), targets="*.up") == []
    assert pruned(FAMILIES["llama"].make(), ignore="*.mlp.*") == []
    assert pruned(FAMILIES["llama"].make(), overrides={"*.mlp.*": "dense"}) == []
    model = FAMILIES["llama"].make()
    assert pruned(model, targets="*.q_proj") == []
    assert torchprune.report(model).coverage.share < 0.2


def test_what_the_user_wanted_and_did_not_get_is_one() -> None:
    said = pruned(mixers(), pattern="2:4", targets=["*.wide", "*.back", "*.grouped"])
    assert len(said) == 1
    assert "0.back.weight" in said[0]
    assert "pattern 2:4 needs" in said[0]
    assert pruned(mixers(), pattern="2:4", targets="*.wide") == []


def test_a_whole_model_counts_where_nothing_repeats() -> None:
    model = FAMILIES["mlp"].make()
    assert pruned(model) == []
    assert "covered 100% of the model's weights" in str(torchprune.report(model))
    torchprune.fold(model)
    assert torchprune.report(model).coverage.share == 0
    assert "covered" not in str(torchprune.report(model))


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "t5", "vit", "resnet"])
def test_known_families_are_covered(family: str) -> None:
    found = FAMILIES[family]
    model = found.make()
    torchprune.sparsify(model, MagnitudeSpec())
    coverage = torchprune.report(model).coverage
    routers = sum(p.numel() for n, p in model.named_parameters() if n.endswith("mlp.gate.weight"))
    assert sum(coverage.bare.values()) == routers
    assert coverage.size > 0
