"""Tiny models of the families people prune, from their configurations: no downloads, seeded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 61
"""A prime, so that a layer which must stay dense (the head) could hold no n:m pattern."""


@dataclass(frozen=True)
class Family:
    """How to build one tiny model and its calibration data.

    Attributes:
        build: makes the module, under a fixed seed (use `make`).
        batches: (seed, count) -> calibration batches.
        generates: whether `generate` works on it.
    """

    name: str
    build: Callable[[], nn.Module]
    batches: Callable[[int, int], list[Any]]
    generates: bool = False

    def make(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """The model, in eval mode; the same bits for the same seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.build().to(dtype).eval()

    def data(self, dtype: torch.dtype = torch.float32, seed: int = 1, count: int = 3) -> list[Any]:
        """Calibration batches whose floating tensors have the model's dtype."""
        return [_cast(batch, dtype) for batch in self.batches(seed, count)]

    def __str__(self) -> str:
        return self.name


def _cast(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    return {k: _cast(v, dtype) for k, v in batch.items()}


def tokens(seed: int = 1, count: int = 3, rows: int = 2, length: int = 12) -> list[Tensor]:
    """Random token ids, `count` batches of (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (rows, length), generator=generator) for _ in range(count)]


def _images(seed: int, count: int, size: int = 32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"pixel_values": torch.randn(2, 3, size, size, generator=generator)} for _ in range(count)
    ]


def _vectors(seed: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 16, generator=generator) for _ in range(count)]


def _sequences(seed: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 7, 16, generator=generator) for _ in range(count)]


def _pairs(seed: int, count: int) -> list[dict[str, Tensor]]:
    targets = tokens(seed + 1, count, length=6)
    return [
        {"input_ids": source, "decoder_input_ids": target}
        for source, target in zip(tokens(seed, count), targets, strict=True)
    ]


_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def causal(name: str, **settings: Any) -> nn.Module:
    """A causal language model of transformers, by the name that its classes begin with."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**settings)
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    return model


def decoder(name: str, **changes: Any) -> nn.Module:
    """A Llama, or one of the many models that are configured like it."""
    return causal(name, **{**_DECODER, **changes})


def llama(**changes: Any) -> nn.Module:
    """A Llama with grouped-query attention."""
    return decoder("Llama", **changes)


def qwen3() -> nn.Module:
    return decoder("Qwen3", head_dim=8)


def gemma() -> nn.Module:
    return decoder("Gemma", head_dim=8)


def mixtral(**changes: Any) -> nn.Module:
    """Fused experts: 3-D parameters, two of four experts a token."""
    return decoder("Mixtral", **{"num_local_experts": 4, "num_experts_per_tok": 2, **changes})


def qwen2_moe() -> nn.Module:
    """Fused experts beside a shared one."""
    return decoder(
        "Qwen2Moe",
        moe_intermediate_size=16,
        shared_expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
    )


def opt() -> nn.Module:
    return causal(
        "OPT",
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
    )


def gpt2() -> nn.Module:
    """transformers' Conv1D: weights are (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    )


def t5() -> nn.Module:
    """An encoder-decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=32,
            patch_size=8,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_labels=5,
        )
    )


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=8,
            hidden_sizes=[16, 32],
            depths=[2, 2],
            layer_type="bottleneck",
            num_labels=5,
        )
    )


def mlp() -> nn.Module:
    """No repeated blocks: everything is chosen."""
    return nn.Sequential(
        nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 20), nn.GELU(), nn.Linear(20, 8)
    )


def torch_encoder() -> nn.Module:
    """torch's own encoder; its attention multiplies by weights without calling their modules."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", llama, tokens, generates=True),
        Family("qwen3", qwen3, tokens, generates=True),
        Family("gemma", gemma, tokens, generates=True),
        Family("mixtral", mixtral, tokens, generates=True),
        Family("qwen2_moe", qwen2_moe, tokens, generates=True),
        Family("opt", opt, tokens, generates=True),
        Family("gpt2", gpt2, tokens, generates=True),
        Family("bert", bert, tokens),
        Family("t5", t5, _pairs, generates=True),
        Family("vit", vit, _images),
        Family("resnet", resnet, _images),
        Family("mlp", mlp, _vectors),
        Family("torch_encoder", torch_encoder, _sequences),
    )
}
