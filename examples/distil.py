"""Distillation: a pruned SmolLM2 learns from the dense one, and its zeros stay zeros.

2:4 by SparseGPT, a few minutes of `recover` with the dense model as the teacher, perplexity on
held-out articles after each. The weights and texts are those of `smollm2.py`.

    python examples/distil.py --minutes 5
    python examples/distil.py --tiny  # a random model, in seconds
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence

import small_llama
import smollm2
import torch
from transformers import LlamaForCausalLM

import torchprune
from torchprune import SparseGPTSpec
from torchprune.training import KL


def tiny() -> tuple[LlamaForCausalLM, torch.Tensor, torch.Tensor]:
    """A random model, and windows (windows, 32) that it wrote: to learn from, and to judge by."""
    model = small_llama.make()
    windows = small_llama.written_by(model, 48)
    return model, windows[:40], windows[40:]


def real() -> tuple[LlamaForCausalLM, torch.Tensor, torch.Tensor]:
    """SmolLM2, and windows of 512 tokens of Wikipedia: of articles to learn from, and of others."""
    model, tokenizer = smollm2.load_model(), smollm2.load_tokenizer()
    learnt, held_out = smollm2.split(smollm2.wikipedia_articles())
    windows = smollm2.windows(tokenizer, learnt, 256, 512, 0)
    return model, windows, smollm2.consecutive_windows(tokenizer, held_out, 512)[:20]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune, recover, and say what each did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--tiny", action="store_true", help="a random model, in seconds")
    options = parser.parse_args(arguments)
    dense, windows, judging = tiny() if options.tiny else real()
    data = list(windows.split(1))

    def perplexity(model: torch.nn.Module) -> float:
        length = judging.shape[1]
        return float(torchprune.perplexity(model, judging.flatten(), seqlen=length))

    print(f"dense      {perplexity(dense):.2f}")
    model = torchprune.sparsify(copy.deepcopy(dense), SparseGPTSpec(pattern="2:4"), data[:32])
    pruned = perplexity(model)
    print(f"pruned     {pruned:.2f}")
    how = {"effort": "max", "rate": 0.01} if options.tiny else {"minutes": options.minutes}
    torchprune.recover(model, data, teacher=dense, objective=KL(), **how)
    recovered = perplexity(model)
    print(f"recovered  {recovered:.2f}")
    print(torchprune.report(model).notes[-1])
    gone = (pruned - recovered) / (pruned - perplexity(dense))
    zeros = torchprune.report(model).sparsity
    print(f"{gone:.0%} of the loss is made up for, {zeros:.0%} of the weights are zero")
    assert zeros == 0.5
    assert math.isfinite(recovered)


if __name__ == "__main__":
    main()
