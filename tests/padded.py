"""Models and batches with padding, as users have them, for the law that padding does not count."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from families import VOCABULARY, bert, decoder, gpt2, llama, mixtral, t5, tokens
from torch import Tensor, nn

import torchprune

LENGTHS = (12, 7, 4)
PAD = 0

Batch = dict[str, Any]


def padded(side: str = "right", seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> Batch:
    """Sequences of several lengths in one batch."""
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        text = tokens(seed + row, 1, rows=1, length=length)[0][0]
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place], mask[row, place] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def embedding_of(model: nn.Module) -> nn.Embedding:
    """The embedding of tokens."""
    return next(m for m in model.modules() if isinstance(m, nn.Embedding))


def with_pad_of(model: nn.Module, scale: float) -> nn.Module:
    """A copy in which the padding's embedding is random, of some scale."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(int(1000 * scale))
        seen = set()
        for module in model.modules():
            if not isinstance(module, nn.Embedding) or len(module.weight) != VOCABULARY:
                continue
            if id(module.weight) not in seen:
                seen.add(id(module.weight))
                usual = module.weight.float().std()
                noise = torch.randn(module.weight.shape[1]) * scale * usual * 5
                module.weight[PAD] = noise.to(module.weight.dtype)
    return model


def pruned(model: nn.Module, data: list[Any], spec: Any, **options: Any) -> nn.Module:
    """A copy, pruned."""
    model = copy.deepcopy(model)
    torchprune.sparsify(model, spec, data, progress=False, **options)
    return model


def agreeing(one: nn.Module, two: nn.Module) -> float:
    """The share of mask entries that are the same."""
    first, second = torchprune.masks(one), torchprune.masks(two)
    assert first
    assert first.keys() == second.keys()
    same = sum(int((first[name] == second[name]).sum()) for name in first)
    return same / sum(mask.numel() for mask in first.values())


REAL = sum(LENGTHS)


def assert_nothing_leaks(
    model: nn.Module, data: list[Any], spec: Any, at_least: float = 1.0, **options: Any
) -> nn.Module:
    """Masks are the same whatever the embedding of padding is."""
    one, two = (pruned(with_pad_of(model, s), data, spec, **options) for s in (0.02, 1.0))
    assert agreeing(one, two) >= at_least
    return one


def counted(model: nn.Module) -> dict[str, int | None]:
    return {layer.name: layer.tokens for layer in torchprune.report(model).layers}


# -- models ---------------------------------------------------------------------------------------


def deepseek() -> nn.Module:
    """Latent attention and, from the second block on, routed experts."""
    return decoder(
        "DeepseekV3",
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
    )


def qwen3_moe() -> nn.Module:
    return decoder(
        "Qwen3Moe", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    )


class Attention(nn.Module):
    """Attention by linear layers, in which a mask of padding counts or does not."""

    def __init__(self, size: int, causal: bool = False) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(size, size), nn.Linear(size, size)
        self.value, self.out = nn.Linear(size, size), nn.Linear(size, size)
        self.causal = causal

    def forward(self, x: Tensor, mask: Tensor | None, source: Tensor | None = None) -> Tensor:
        source = x if source is None else source
        scores = self.query(x) @ self.key(source).mT / x.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask.bool()[:, None, :], -1e30)
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -1e30)
        result: Tensor = self.out(scores.softmax(-1) @ self.value(source))
        return result


class Small(nn.Module):
    """Two blocks of attention and of what `mixer` makes."""

    def __init__(self, mixer: Callable[[], nn.Module], *, causal: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.place = nn.Embedding(64, 16)
        self.attend = nn.ModuleList(Attention(16, causal) for _ in range(2))
        self.mix = nn.ModuleList(mixer() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(4))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids) + self.place(torch.arange(input_ids.shape[1]))
        for i, (attend, mix) in enumerate(zip(self.attend, self.mix, strict=True)):
            x = x + attend(self.norms[2 * i](x), attention_mask)
            x = x + mix(self.norms[2 * i + 1](x))
        return x


class SequenceFirst(nn.Module):
    """Works on (length, batch, size)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.up(x.transpose(0, 1)).relu()).transpose(0, 1)
        return result


class Convolved(nn.Module):
    """Convolutions over tokens, of one and of three at a time."""

    def __init__(self, wide: int = 1) -> None:
        super().__init__()
        self.up = nn.Conv1d(16, 32, wide, padding=wide // 2)
        self.down = nn.Conv1d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.up(x.mT).relu()).mT
        return result


class ByHead(nn.Module):
    """A layer that reads every head of every token by itself, heads outermost."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (4, 4)).transpose(1, 2)
        y: Tensor = self.two(self.one(heads).relu())
        return y.transpose(1, 2).flatten(-2)


class Listed(nn.Module):
    """Routed experts, each a module in a list that only its tokens are sent to."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(16, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        shares, chosen = self.gate(rows).softmax(-1).topk(2)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, slot = (chosen == number).nonzero(as_tuple=True)
            if len(row):
                out.index_add_(0, row, (expert(rows[row]) * shares[row, slot, None]).to(out.dtype))
        return out.view_as(x)


class Flat(nn.Module):
    """Works on tokens without padding: gathered first, put back in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.up(x.flatten(0, 1)).relu()).view_as(x)
        return result


def small(mixer: Callable[[], nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: Small(mixer, **options)


def seq2seq(name: str, **changes: Any) -> nn.Module:
    import transformers

    settings = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "decoder_start_token_id": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "forced_eos_token_id": None,
        **changes,
    }
    config = getattr(transformers, f"{name}Config")(**settings)
    model: nn.Module = getattr(transformers, f"{name}Model")(config)
    return model


def pairs(side: str, decoder: tuple[int, ...] = (5, 9, 2)) -> Batch:
    """Two padded sequences, each with its mask."""
    target = padded(side, seed=9, lengths=decoder)
    return {**padded(side), **{f"decoder_{name}": value for name, value in target.items()}}


@dataclass(frozen=True)
class Case:
    """A model and how to pad for it."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[str], Batch] = padded
    exact: bool = True

    def make(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build().eval()

    def data(self, side: str) -> list[Batch]:
        return [self.batch(side)]

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("llama", llama),
    Case("deepseek", deepseek),
    Case("gpt2", gpt2),
    Case("bert", bert),
    Case("sequence first", small(SequenceFirst)),
    Case("convolved", small(Convolved)),
    Case("convolved wide", small(lambda: Convolved(3))),
    Case("by head", small(ByHead)),
    Case("flat", small(Flat, causal=True)),
    Case("t5", t5, pairs),
    Case("bart", lambda: seq2seq("Bart"), pairs),
    Case("marian", lambda: seq2seq("Marian"), pairs),
    Case("t5 as long", t5, lambda side: pairs(side, (3, 12, 6))),
    Case("bart as long", lambda: seq2seq("Bart"), lambda side: pairs(side, (3, 12, 6))),
    Case("listed", small(Listed), exact=False),
    Case("mixtral", mixtral, exact=False),
    Case("qwen3_moe", qwen3_moe, exact=False),
]
