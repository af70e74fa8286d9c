"""A Llama so small that examples take seconds, with text that it wrote itself."""

from __future__ import annotations

import calm  # noqa: F401  (before transformers)
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 64


def make(blocks: int = 2) -> LlamaForCausalLM:
    """Random weights, large enough that it has opinions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


def written_by(model: LlamaForCausalLM, windows: int = 40, length: int = 32) -> Tensor:
    """Windows (windows, length) of tokens that it samples."""
    starts = torch.randint(VOCABULARY, (windows, 1))
    sizes = {"max_length": length, "min_length": length, "pad_token_id": 0}
    return model.generate(starts, do_sample=True, **sizes)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words `w0` to `w62`, split at spaces."""
    words = {word: i for i, word in enumerate(["<unk>", *(f"w{i}" for i in range(63))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
