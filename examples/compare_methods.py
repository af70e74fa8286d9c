"""Methods, patterns and sparsities side by side: a table, and a figure beside it.

    python examples/compare_methods.py [--output DIR]
    python examples/compare_methods.py --model NAME --data notes.txt --text held-out.txt

By default on a tiny random Llama, in seconds and without downloads, to show the form; what the
methods are worth shows only on a trained model (`--model`: a directory or a name on the hub).
A second run with the same DIR goes on where the first was stopped. The figure needs
pip install 'torchprune[figure]'.
"""

import argparse
import copy
import sys
from pathlib import Path

import calm  # noqa: F401  (before transformers)
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import torchprune
from torchprune.calibration.text import draw_windows, tokenise
from torchprune.cli.documents import read_documents
from torchprune.cli.models import device_of, import_transformers, load_model, load_tokenizer

METHODS = {
    "magnitude": torchprune.MagnitudeSpec,
    "wanda": torchprune.WandaSpec,
    "sparsegpt": torchprune.SparseGPTSpec,
    "admm": torchprune.ADMMSpec,
}
SPECS = {
    **{f"{name} {s:.0%}": spec(sparsity=s) for name, spec in METHODS.items() for s in (0.5, 0.7)},
    **{f"{name} 2:4": spec(pattern="2:4") for name, spec in METHODS.items()},
}


def tiny() -> tuple[nn.Module, Tensor, Tensor]:
    """A random Llama, and random tokens to calibrate on and to measure with."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval(), *torch.randint(3, 100, (2, 2000))


def named(options: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor]:
    """The model of a name, the tokens of the calibration text and of the other."""
    transformers = import_transformers(bars=sys.stderr.isatty())
    model = load_model(transformers, options.model, None, device_of("auto"))
    tokenizer = load_tokenizer(transformers, options.model, required=True)
    return model, *(tokenise(tokenizer, read_documents(t)) for t in (options.data, options.text))


def main(arguments: list[str] | None = None) -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a directory or a name on the hub; needs the two texts")
    parser.add_argument("--data", metavar="FILE|DATASET", help="text to calibrate on")
    parser.add_argument("--text", metavar="FILE|DATASET", help="text to measure with")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of a draw")
    parser.add_argument("--windows", type=int, default=16, help="windows to measure with")
    parser.add_argument(
        "--length", type=int, help="tokens in a window: 512, or 32 for the tiny one"
    )
    parser.add_argument("--draws", type=int, default=2, help="different calibration windows")
    parser.add_argument("--output", type=Path, default=Path("comparison"), metavar="DIR")
    options = parser.parse_args(arguments)
    if options.model and not (options.data and options.text):
        parser.error("--model needs --data and --text")

    dense, seen, unseen = named(options) if options.model else tiny()
    length = options.length or (512 if options.model else 32)
    draws = {
        f"seed {seed}": draw_windows(seen, options.samples, length, seed).split(4)
        for seed in range(options.draws)
    }
    judged = unseen[: options.windows * length]
    probe = judged[None, :length].to(next(dense.parameters()).device)
    with torch.no_grad():
        expected = dense(probe).logits.float()

    def measure(model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            off = model(probe).logits.float() - expected
        return {
            "perplexity": float(torchprune.perplexity(model, judged, seqlen=length)),
            "logit error": float(off.square().sum() / expected.square().sum()),
        }

    found = torchprune.compare(
        lambda: copy.deepcopy(dense),
        SPECS,
        draws,
        measure,
        progress=sys.stderr.isatty(),
        path=options.output / "comparison.json",
    )
    print(found)
    print("\nlogit error, as a share of SparseGPT's at 50 % (mean, least to greatest):")
    for label, ratio in found.ratio("logit error", "sparsegpt 50%").items():
        print(f"  {label}: {ratio}")
    (options.output / "comparison.md").write_text(found.to_markdown() + "\n", "utf-8")
    try:
        found.figure("perplexity", options.output / "comparison.svg")
    except ImportError as error:
        print(f"no figure: {error}")


if __name__ == "__main__":
    main()
