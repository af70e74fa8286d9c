"""LoRA through peft on a 2:4 model: pruned, trained, merged, its zeros counted, saved as stock.

    python examples/lora.py              # SmolLM2-135M on Wikipedia, a few minutes
    python examples/lora.py --tiny       # a random model of two blocks, seconds

Only peft's and transformers' own calls are used after `sparsify`: the masks see to the zeros.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import calm  # noqa: F401  (before transformers)
import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import torchprune
from torchprune import WandaSpec

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A random Llama and tokens that it can learn: counting upward, modulo 64."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    starts = torch.randint(0, 64, (40, 1))
    rows = (starts + torch.arange(16)) % 64
    return LlamaForCausalLM(config), rows[:32], rows[32:]


def smollm2(windows: int, length: int = 256) -> tuple[nn.Module, Tensor, Tensor]:
    """SmolLM2-135M, with windows of Wikipedia to train on and others that are held out."""
    import smollm2 as real

    tokenizer = real.load_tokenizer()
    training, held_out = real.split(real.wikipedia_articles())
    rows = real.windows(tokenizer, training, windows, length, seed=0)
    return real.load_model(), rows, real.windows(tokenizer, held_out, 8, length, seed=1)


def train(model: nn.Module, rows: Tensor, rate: float) -> None:
    """One pass of AdamW over what the adapter trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    for batch in rows.split(4):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def of(model: nn.Module, held_out: Tensor) -> float:
    """Its perplexity on the windows that are held out."""
    return float(torchprune.perplexity(model, held_out.flatten(), seqlen=held_out.shape[1]))


def main(arguments: list[str] | None = None) -> None:
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--tiny", action="store_true", help="a random model instead of SmolLM2")
    parser.add_argument("--windows", type=int, default=64, help="windows of 256 tokens to train on")
    parser.add_argument("--output", type=Path, help="where the merged model is to be kept")
    options = parser.parse_args(arguments)
    model, rows, held_out = tiny() if options.tiny else smollm2(options.windows)

    torchprune.sparsify(model, WandaSpec(pattern="2:4"), rows[:16].split(4), progress=False)
    print(f"pruned to 2:4     perplexity {of(model, held_out):8.3f}")

    torchprune.peft_ready(model)  # masks are there, and so is peft
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS)
    adapted = peft.get_peft_model(model, config)
    train(adapted, rows, rate=2e-2 if options.tiny else 2e-4)
    adapted.eval()
    with torch.no_grad():
        unmerged = adapted(input_ids=held_out).logits

    merged = adapted.merge_and_unload()
    with torch.no_grad():
        assert torch.equal(merged(input_ids=held_out).logits, unmerged), "the merge lost something"
    print(f"with merged LoRA  perplexity {of(merged, held_out):8.3f}")
    report = torchprune.report(merged)
    assert report.sparsity == 0.5
    print(f"zeros             {report.zeros:,} of {report.size:,}, exactly half")

    with tempfile.TemporaryDirectory() as scratch:
        home = options.output or Path(scratch) / "merged"
        merged.save_pretrained(home)
        plain = AutoModelForCausalLM.from_pretrained(home).eval()  # stock: it knows no masks
        with torch.no_grad():
            assert torch.equal(plain(input_ids=held_out).logits, unmerged)
        for layer in report.layers:
            weight = plain.get_submodule(layer.name).weight
            groups = (weight != 0).view(-1, 4).sum(dim=1)
            assert int(groups.max()) == 2, f"{layer.name} is not 2:4"
    print("reloaded          the same logits, 2:4 in every projection")


if __name__ == "__main__":
    main()
