"""Make zeros pay on a CPU: bitmask weights, and tokens a second before and after, in turns.

    python examples/lower_and_decode.py --model NAME    # a directory or a name on the hub
    python examples/lower_and_decode.py --tiny          # too small to be faster, seconds

Zeros by magnitude stand for any masks; kernels are compiled on first use.
"""

from __future__ import annotations

import argparse
import copy

import calm  # noqa: F401  (before transformers)
import small_llama
import torch
from decoding import InTorch, race
from transformers import AutoModelForCausalLM

import torchprune
from torchprune import MagnitudeSpec


def main(arguments: list[str] | None = None) -> None:
    """Prune, fold, lower, and let all decode."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a directory or a name on the hub")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="a random model, in seconds")
    options = parser.parse_args(arguments)
    if options.tiny == bool(options.model):
        parser.error("needs --model or --tiny")
    if options.tiny:
        dense = small_llama.make()
    else:
        dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()

    folded = copy.deepcopy(dense)
    torchprune.fold(torchprune.sparsify(folded, MagnitudeSpec(), progress=False))
    print(torchprune.plan_lowering(folded, "bitmask"))  # what is lowered, what is left and why
    lowered = torchprune.lower(copy.deepcopy(folded), "bitmask")

    prompt = torch.tensor([[1, 2, 3, 4]])
    models = {"dense": dense, "folded": folded, "bitmask": lowered}
    contenders = [InTorch(model, prompt) for model in models.values()]
    tokens = 4 if options.tiny else options.tokens
    for name, seconds in zip(models, race(contenders, tokens), strict=True):
        print(f"{name:8} {1 / seconds:8.1f} tokens/s")

    torchprune.lift(lowered)
    same = all(map(torch.equal, lowered.state_dict().values(), folded.state_dict().values()))
    print(f"lifted: the folded weights, bit for bit: {same}")
    assert same


if __name__ == "__main__":
    main()
