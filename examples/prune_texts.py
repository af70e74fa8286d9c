"""Prune a language model on texts, look, and write it for stock transformers.

    python examples/prune_texts.py --model NAME --data notes.txt --output pruned
    python examples/prune_texts.py --tiny    # a random model, in seconds

Needs pip install 'torchprune[transformers]'. `NAME` is a directory or a name on the hub.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import calm  # noqa: F401  (before transformers)
import small_llama
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import torchprune
from torchprune.export import to_hf


def main(arguments: list[str] | None = None) -> None:
    """Load, prune, measure, write, and check what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a directory or a name on the hub")
    parser.add_argument("--data", type=Path, help="a file of text, documents at blank lines")
    parser.add_argument("--windows", type=int, default=32, help="how many to calibrate on")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--output", type=Path, default=Path("pruned"))
    parser.add_argument("--tiny", action="store_true", help="a random model, in seconds")
    options = parser.parse_args(arguments)
    if options.tiny:
        model, tokenizer, length = small_llama.make(), small_llama.make_tokenizer(), 32
        texts = [" ".join(f"w{i * (i + k) % 63}" for i in range(200)) for k in range(8)]
    elif options.model and options.data:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        tokenizer, length = AutoTokenizer.from_pretrained(options.model), options.length
        texts = options.data.read_text("utf-8").split("\n\n")
    else:
        parser.error("needs --model and --data, or --tiny")

    unseen = texts[len(texts) * 3 // 4 :]  # a quarter is kept to measure with
    sizes = {"samples": options.windows, "length": length}
    data = torchprune.text_batches(tokenizer, texts[: -len(unseen)], **sizes)
    judging = torchprune.text_batches(tokenizer, unseen, **sizes)

    print(f"dense: perplexity {float(torchprune.perplexity(model, judging)):.2f}")
    torchprune.sparsify(model, torchprune.BestSpec(pattern="2:4", effort="fast"), data)
    print(torchprune.report(model))
    print(f"2:4: perplexity {float(torchprune.perplexity(model, judging)):.2f}")

    to_hf(model, options.output, tokenizer=tokenizer)
    again = AutoModelForCausalLM.from_pretrained(options.output).eval()
    ids = data[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    print(f"{options.output}: stock transformers computes the same logits")


if __name__ == "__main__":
    main()
