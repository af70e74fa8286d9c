"""What to prune, and how far: each layer alone, and a budget spent by what was found.

    python examples/sensitivity.py [--exact] [--output DIR]

On a tiny random Llama, in seconds and without downloads, to show the form; what layers are worth
shows only on a trained model. The figure needs pip install 'torchprune[figure]'.
"""

import argparse
import sys
from pathlib import Path

import calm  # noqa: F401  (before transformers)
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import torchprune


def tiny() -> tuple[LlamaForCausalLM, list[torch.Tensor]]:
    """A random Llama and random tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval(), list(torch.randint(3, 100, (3, 2, 16)))


def main(arguments: list[str] | None = None) -> None:
    """Measure, show, and prune by it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exact", action="store_true", help="prune each layer in turn")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--output", type=Path, default=Path("sensitivity"), metavar="DIR")
    options = parser.parse_args(arguments)

    model, batches = tiny()
    found = torchprune.sensitivity(
        model,
        batches,
        torchprune.WandaSpec(),
        mode="exact" if options.exact else "cheap",
        path=options.output / "sensitivity.json",
        progress=sys.stderr.isatty(),
    )
    print(found)
    try:
        found.save(options.output / "sensitivity.svg")
    except ImportError as error:
        print(f"no figure: {error}")

    spec = torchprune.WandaSpec(options.sparsity, overrides=found.overrides(options.sparsity))
    torchprune.sparsify(model, spec, batches, progress=False)
    print(torchprune.report(model))


if __name__ == "__main__":
    main()
