"""Routers and gates are found by what becomes of their outputs, in any spelling; else nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, decoder, tokens
from sweeps import sample
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchprune.calibration.routers import Routers
from torchprune.masking.selection import layers_of

WIDTH, EXPERTS = 32, 4


class Watch(TorchFunctionMode):
    """Hands every torch function of a forward pass to a `Routers`."""

    def __init__(self) -> None:
        super().__init__()
        self.routers = Routers()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.routers.saw(func, args, kwargs or {}, result)
        return result


def found(model: nn.Module, batch: Any) -> dict[str, str]:
    """Name of a parameter -> why it is a router or a gate."""
    watch = Watch()
    with torch.random.fork_rng(), torch.no_grad(), watch:
        torch.manual_seed(0)
        model(**batch) if isinstance(batch, dict) else model(batch)
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[key]: why for key, why in watch.routers.found.items()}


# -- in plain modules ------------------------------------------------------------------------------


class Block(nn.Module):
    """Experts that are chosen or mixed by `how`, between projections that are nothing special."""

    def __init__(self, how: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, 8)
        self.chooser = nn.Linear(WIDTH, EXPERTS)
        self.noise = nn.Linear(WIDTH, EXPERTS)
        self.raw = nn.Parameter(torch.randn(WIDTH, EXPERTS))
        self.conv = nn.Conv1d(WIDTH, EXPERTS, 1)
        self.one = nn.Linear(WIDTH, 1)
        self.steer = nn.Linear(EXPERTS, EXPERTS)
        self.down = nn.Linear(8 * WIDTH, WIDTH)
        self.specialists = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, WIDTH))
            for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.before(x)
        keys = self.key(x)
        x = x + (keys @ keys.mT).softmax(-1) @ x
        return self.after(x + self.how(self, F.layer_norm(x, (WIDTH,))))

    def outputs(self, x: Tensor) -> Tensor:
        """(.., experts, width): what all of them say."""
        return torch.stack([expert(x) for expert in self.specialists], -2)

    def chosen(self, x: Tensor, index: Tensor, weights: Tensor | None = None) -> Tensor:
        picked = self.outputs(x).gather(-2, index.unsqueeze(-1).expand(*index.shape, WIDTH))
        return (picked if weights is None else picked * weights.unsqueeze(-1)).sum(-2)


def over_softmax(b: Block, x: Tensor) -> Tensor:
    weights, index = torch.topk(F.softmax(b.chooser(x), dim=-1, dtype=torch.float32), 2, dim=-1)
    return b.chosen(x, index, weights)


def over_scores(b: Block, x: Tensor) -> Tensor:
    weights, index = b.chooser(x).topk(2)
    return b.chosen(x, index, weights.softmax(-1))


def corrected(b: Block, x: Tensor) -> Tensor:
    scores = F.linear(x.view(-1, WIDTH).double(), b.chooser.weight.double()).sigmoid()
    groups = (scores + torch.randn(EXPERTS)).view(-1, 2, EXPERTS // 2).topk(1, dim=-1)[0].sum(-1)
    mask = groups > groups.mean()
    mask = mask.unsqueeze(-1).expand(-1, 2, EXPERTS // 2).reshape(-1, EXPERTS)
    index = scores.masked_fill(~mask, 0.0).topk(2, dim=-1, sorted=False)[1]
    return b.chosen(x, index.view(*x.shape[:-1], 2))


def noisy(b: Block, x: Tensor) -> Tensor:
    clean = b.chooser(x)
    scores = clean + torch.randn_like(clean) * F.softplus(b.noise(x))
    return b.chosen(x, scores.sort(descending=True)[1][..., :2])


def largest(b: Block, x: Tensor) -> Tensor:
    return b.chosen(x, b.chooser(x).argmax(-1, keepdim=True))


def place_of_maximum(b: Block, x: Tensor) -> Tensor:
    return b.chosen(x, b.chooser(x).max(dim=-1, keepdim=True)[1])


def drawn(b: Block, x: Tensor) -> Tensor:
    shares = b.chooser(x).softmax(-1)
    return b.chosen(x, torch.multinomial(shares.view(-1, EXPERTS), 1).view(*x.shape[:-1], 1))


def gumbel(b: Block, x: Tensor) -> Tensor:
    one = F.gumbel_softmax(b.chooser(x), hard=True, dim=-1)
    return torch.einsum("bte,bted->btd", one, b.outputs(x))


def chosen_by_experts(b: Block, x: Tensor) -> Tensor:
    shares = b.chooser(x).softmax(-1).transpose(1, 2)
    index = shares.topk(3, dim=-1)[1]
    taken = x.gather(1, index.reshape(len(x), -1, 1).expand(-1, -1, WIDTH))
    return torch.zeros_like(x).index_add_(1, torch.arange(EXPERTS * 3) % x.shape[1], taken)


def raw_product(b: Block, x: Tensor) -> Tensor:
    return b.chosen(x, (x @ b.raw).topk(2)[1])


def turned_product(b: Block, x: Tensor) -> Tensor:
    scores = torch.matmul(b.chooser.weight, x.transpose(1, 2))
    return b.chosen(x, scores.topk(2, dim=1)[1].transpose(1, 2))


def contracted(b: Block, x: Tensor) -> Tensor:
    return b.chosen(x, torch.einsum("btd,de->bte", x, b.raw).topk(2)[1])


def added(b: Block, x: Tensor) -> Tensor:
    scores = torch.addmm(b.chooser.bias, x.reshape(-1, WIDTH), b.chooser.weight.t())
    return b.chosen(x, scores.view(*x.shape[:2], EXPERTS).topk(2)[1])


def convolved(b: Block, x: Tensor) -> Tensor:
    return b.chosen(x, b.conv(x.transpose(1, 2)).transpose(1, 2).topk(2)[1])


def reshaped(b: Block, x: Tensor) -> Tensor:
    """Copies, after which the axis of experts lies between others."""
    image = x.mT.reshape(*x.mT.shape[:2], 2, -1)
    scores = F.conv2d(image, b.chooser.weight[..., None, None])
    scores = scores.permute(0, 1, 3, 2).reshape(len(x), EXPERTS, -1)
    return b.chosen(x, scores.topk(2, dim=1)[1].mT)


def mixed(b: Block, x: Tensor) -> Tensor:
    return (b.chooser(x).softmax(-1).unsqueeze(-2) @ b.outputs(x)).squeeze(-2)


def weighed(b: Block, x: Tensor) -> Tensor:
    return (b.chooser(x).softmax(-1)[..., None] * b.outputs(x)).sum(-2)


def in_place(b: Block, x: Tensor) -> Tensor:
    scores = b.chooser(x)
    scores.sub_(scores.mean(-1, keepdim=True)).exp_().clamp_(max=9)
    return b.chosen(x, scores.kthvalue(2, dim=-1, keepdim=True)[1])


def gated(b: Block, x: Tensor) -> Tensor:
    return torch.sigmoid(b.one(x)) * b.specialists[0](x)


def steered(b: Block, x: Tensor) -> Tensor:
    """Few numbers make the gates of several streams, as in Gemma 3n's AltUp."""
    gates = b.steer(b.chooser(x).float().tanh().type_as(x)) + 1
    streams = torch.stack([expert(x) for expert in b.specialists])
    return (streams * gates.permute(2, 0, 1).unsqueeze(-1)).sum(0)


def gated_residual(b: Block, x: Tensor) -> Tensor:
    """A layer that writes to the residual stream makes no gate, though one reads the stream."""
    return b.specialists[0](x) * b.one(x + b.down(x.repeat(1, 1, 8))).sigmoid()


ROUTING = {
    over_softmax: {"chooser.weight"},
    over_scores: {"chooser.weight"},
    corrected: {"chooser.weight"},
    noisy: {"chooser.weight", "noise.weight"},
    largest: {"chooser.weight"},
    place_of_maximum: {"chooser.weight"},
    drawn: {"chooser.weight"},
    gumbel: {"chooser.weight"},
    chosen_by_experts: {"chooser.weight"},
    raw_product: {"raw"},
    turned_product: {"chooser.weight"},
    contracted: {"raw"},
    added: {"chooser.weight"},
    convolved: {"conv.weight"},
    reshaped: {"chooser.weight"},
    mixed: {"chooser.weight"},
    weighed: {"chooser.weight"},
    in_place: {"chooser.weight"},
    gated: {"one.weight"},
    steered: {"chooser.weight", "steer.weight"},
    gated_residual: {"one.weight"},
}


@pytest.mark.parametrize("how", ROUTING, ids=lambda how: how.__name__)
def test_whatever_chooses_or_weighs_is_found(how: Any) -> None:
    torch.manual_seed(0)
    for rows, length in ((2, 6), (EXPERTS, EXPERTS)):  # also where no size tells axes apart
        assert set(found(Block(how), torch.randn(rows, length, WIDTH))) == ROUTING[how]


# -- what looks like it, and is none ---------------------------------------------------------------


def squeezed(b: Block, x: Tensor) -> Tensor:
    """A channel gate, with as many outputs as channels."""
    return x * b.after(b.before(x.mean(1)).relu()).sigmoid()[:, None]


def made_sparse(b: Block, x: Tensor) -> Tensor:
    """The largest of a wide layer's activations; no experts."""
    wide = F.linear(x, torch.cat([b.before.weight, b.after.weight]))
    values, index = F.linear(x, nn.Parameter(torch.randn(64, WIDTH))).topk(8)
    return torch.zeros_like(wide).scatter(-1, index, values)[..., :WIDTH]


def sparse_code(b: Block, x: Tensor) -> Tensor:
    """The same of a layer with as many outputs as inputs."""
    values, index = b.before(x).topk(8)
    return torch.zeros_like(x).scatter(-1, index, values)


def largest_values(b: Block, x: Tensor) -> Tensor:
    return x * b.chooser(x).max(-1, keepdim=True)[0]


def strongest_in_time(b: Block, x: Tensor) -> Tensor:
    return F.pad(b.key(x).topk(1, dim=1)[0], (0, WIDTH - 8))


def swish(b: Block, x: Tensor) -> Tensor:
    return F.pad(F.silu(b.key(x)) * b.key(x), (0, WIDTH - 8))


def attention(b: Block, x: Tensor) -> Tensor:
    scores = b.key(x) @ b.key(x).mT
    index = scores.topk(2)[1]
    kept = torch.full_like(scores, -9.0).scatter(-1, index, scores.gather(-1, index))
    return kept.softmax(-1) @ x


def fused_attention(b: Block, x: Tensor) -> Tensor:
    said = F.scaled_dot_product_attention(b.key(x), b.key(x), b.key(x))
    return x.gather(-1, said.topk(WIDTH // 8)[1]).repeat(1, 1, 8)


def conditioned(b: Block, x: Tensor) -> Tensor:
    """A scale for each of many channels, from somewhat more inputs."""
    return (x.view(*x.shape[:2], 8, -1) * b.key(x).unsqueeze(-1)).flatten(2)


@pytest.mark.parametrize(
    "how",
    [
        squeezed,
        made_sparse,
        sparse_code,
        largest_values,
        strongest_in_time,
        swish,
        attention,
        fused_attention,
        conditioned,
    ],
    ids=lambda how: how.__name__,
)
def test_what_chooses_no_expert_is_none(how: Any) -> None:
    torch.manual_seed(0)
    for rows, length in ((2, 6), (8, 8)):
        assert found(Block(how), torch.randn(rows, length, WIDTH)) == {}


def test_nothing_is_held_after_the_pass() -> None:
    watch = Watch()
    model = Block(over_softmax)
    with torch.no_grad(), watch:
        model(torch.randn(2, 6, WIDTH))
    assert not len(watch.routers._outputs)
    assert not len(watch.routers._weights)


def test_masked_weights_are_told_by_the_parameter_behind_them() -> None:
    import torchprune

    model = Block(over_softmax)
    torchprune.apply_masks(model, {"chooser.weight": torch.rand(EXPERTS, WIDTH) > 0.5})
    found_now = found(model, torch.randn(2, 6, WIDTH))
    assert set(found_now) == {"chooser.parametrizations.weight.original"}


# -- in families of transformers -------------------------------------------------------------------

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}

TRANSFORMERS: dict[str, tuple[dict[str, Any], str]] = {
    "Mixtral": (LOCAL, "mlp.gate"),
    "Qwen2Moe": ({**MOE, "shared_expert_intermediate_size": 32}, "mlp.gate mlp.shared_expert_gate"),
    "Qwen3Moe": ({**MOE, "head_dim": 8}, "mlp.gate"),
    "DeepseekV3": (LATENT, "mlp.gate"),
    "Phimoe": (LOCAL, "mlp.router"),
    "GraniteMoe": (LOCAL, "block_sparse_moe.router"),
    "HunYuanMoEV1": ({"num_experts": 4, "moe_topk": 2, "head_dim": 8}, "mlp.gate.wg"),
    "Ernie4_5_Moe": (
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
        "mlp.gate",
    ),
    "GptOss": ({**LOCAL, "head_dim": 8}, "mlp.router"),
}


@pytest.mark.parametrize("name", sample(TRANSFORMERS, "Mixtral", "DeepseekV3", "Phimoe"))
def test_routers_of_families(name: str) -> None:
    settings, routers = TRANSFORMERS[name]
    check_routers(decoder(name, **settings), routers, tokens(count=1)[0])


def llama4() -> nn.Module:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    return Llama4ForCausalLM(
        Llama4TextConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            intermediate_size_mlp=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=4,
            interleave_moe_layer_step=1,
            pad_token_id=0,
        )
    )


def switch() -> nn.Module:
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    return SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            vocab_size=61,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            num_experts=4,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            decoder_start_token_id=0,
        )
    )


def gemma3n() -> nn.Module:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    return Gemma3nForCausalLM(
        Gemma3nTextConfig(
            vocab_size=61,
            vocab_size_per_layer_input=61,
            hidden_size=32,
            hidden_size_per_layer_input=8,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_kv_shared_layers=0,
            laurel_rank=4,
            layer_types=["sliding_attention", "full_attention"],
            activation_sparsity_pattern=[0.0, 0.0],
            pad_token_id=0,
        )
    )


def nllb() -> nn.Module:
    from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

    return NllbMoeForConditionalGeneration(
        NllbMoeConfig(
            vocab_size=61,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_experts=4,
            encoder_sparse_step=1,
            decoder_sparse_step=1,
            max_position_embeddings=64,
        )
    )


@pytest.mark.parametrize(
    ("make", "router"),
    [
        (llama4, "feed_forward.router"),
        (gemma3n, "altup.modality_router altup.correction_coefs"),
        pytest.param(switch, "router.classifier", marks=pytest.mark.sweep),
        pytest.param(nllb, "router.classifier", marks=pytest.mark.sweep),
    ],
)
def test_routers_of_other_families(make: Callable[[], nn.Module], router: str) -> None:
    ids = tokens(count=1)[0]
    batch = {"input_ids": ids} | ({"decoder_input_ids": ids} if make in (switch, nllb) else {})
    check_routers(make(), router, batch)


def check_routers(model: nn.Module, routers: str, batch: Any) -> None:
    """The parameters whose names end so are found, and no others."""
    wanted = {
        key
        for key, _ in model.named_parameters()
        if any(key.endswith(f".{router}.weight") for router in routers.split())
    }
    assert wanted
    assert set(found(model.eval(), batch)) == wanted


DENSE = [name for name in FAMILIES if name not in ("mixtral", "qwen2_moe")]


@pytest.mark.parametrize("name", sample(DENSE, "llama", "t5", "resnet"))
def test_dense_families_have_none(name: str) -> None:
    family = FAMILIES[name]
    model = family.make()
    layers = {layer.key for layer in layers_of(model)}
    assert layers.isdisjoint(found(model, family.data(count=1)[0]))
