"""Prune a language model while transformers' Trainer trains it, and go on from a checkpoint.

    python examples/trainer.py                       # a small Llama from scratch, on this README
    python examples/trainer.py --model NAME --text FILE

Needs pip install 'torchprune[transformers]'.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import calm  # noqa: F401  (before transformers)
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import torchprune
from torchprune import MagnitudeSpec
from torchprune.training import Cubic, PruningCallback


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows of a text's tokens, each of the same length."""

    def __init__(self, ids: list[int], length: int) -> None:
        self.windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[i], "labels": self.windows[i]}


def model_and_tokens(name: str | None, text: str) -> tuple[torch.nn.Module, list[int]]:
    """A model of the hub and its tokens; without a name a small one that reads bytes."""
    if name is not None:
        ids = AutoTokenizer.from_pretrained(name)(text)["input_ids"]
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), ids
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config), list(text.encode())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name on the hub or a directory")
    parser.add_argument("--text", type=Path, default=Path(__file__).parent.parent / "README.md")
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--directory", help="where checkpoints go; by default nowhere for long")
    parser.add_argument("--tiny", action="store_true", help="six steps, to see that it runs")
    options = parser.parse_args(arguments)
    steps = 6 if options.tiny else options.steps
    with tempfile.TemporaryDirectory() as scratch:
        directory = options.directory or scratch

        def trainer() -> Trainer:
            model, ids = model_and_tokens(options.model, options.text.read_text("utf-8"))
            spec = MagnitudeSpec(options.sparsity)
            schedule = Cubic(
                0.0, options.sparsity, start=steps // 10, end=steps * 2 // 3, every=steps // 6
            )
            settings = TrainingArguments(
                directory,
                max_steps=steps,
                save_steps=steps // 2,
                logging_steps=max(1, steps // 10),
                per_device_train_batch_size=8,
                learning_rate=1e-3 if options.model is None else 2e-5,
                report_to="none",
                disable_tqdm=True,
                use_cpu=options.tiny,
            )
            return Trainer(
                model,
                settings,
                train_dataset=Windows(ids, 64),
                callbacks=[PruningCallback(spec, schedule)],
            )

        whole = trainer()
        whole.train()
        print(torchprune.report(whole.model))
        # A process that was stopped half way goes on, to the bit, as if it had not been.
        again = trainer()
        again.train(resume_from_checkpoint=f"{directory}/checkpoint-{steps // 2}")
        same = all(
            torch.equal(value, whole.model.state_dict()[name])
            for name, value in again.model.state_dict().items()
        )
        print(f"resumed from step {steps // 2}: the same bits: {same}")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
