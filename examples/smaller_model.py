"""Heads and neurons that are really gone: mask them, plan, remove, and compare with the masked.

    python examples/smaller_model.py                 # a random Llama, seconds
    python examples/smaller_model.py --model NAME    # a directory or a name on the hub

Channels of a CNN: cnn_channels.py.
"""

from __future__ import annotations

import argparse

import calm  # noqa: F401  (before transformers)
import small_llama
import torch
from transformers import AutoModelForCausalLM

import torchprune
from torchprune import HeadSpec, NeuronSpec


def main(arguments: list[str] | None = None) -> None:
    """Mask, plan, shrink, generate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a directory or a name on the hub")
    parser.add_argument("--tiny", action="store_true", help="what happens without a name")
    options = parser.parse_args(arguments)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    else:
        model = small_llama.make()
    windows = small_llama.written_by(model, 16)  # better: text of yours, as in prune_texts.py
    data = list(windows.split(4))

    torchprune.sparsify(model, NeuronSpec(0.25), data)
    torchprune.sparsify(model, HeadSpec(0.5), data)
    with torch.no_grad():
        masked = model(windows[:2]).logits

    plan = torchprune.plan_shrink(model, windows[:2])
    print(plan)
    torchprune.shrink(model, plan)
    with torch.no_grad():
        small = model(windows[:2]).logits
    assert torch.allclose(small, masked, atol=1e-4 * float(masked.abs().max()))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, the masked model's outputs")
    print(model.generate(windows[:1, :4], max_new_tokens=8, do_sample=False)[0].tolist())


if __name__ == "__main__":
    main()
