"""AOTInductor's packages of a language model beside the same model in eager torch: bytes and time.

    python benchmarks/lowering/aoti.py [--model llama|smollm2] [--dtype bfloat16] [--rounds 40]
                                [--output FILE]

Half of the weights are zero; the packed contenders read them as bits and nonzeros, in eager lowered
layers, in a package by the library beside it. One call is one row of one token without a past: what
a step of decoding reads of the weights. Contenders take turns, so that a busy machine hurts them
alike, and "of eager" is the median over rounds of the time over that of dense eager in the same
round. "llama" has 122 million random weights in its blocks, "smollm2" is the real SmolLM2-135M.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import torchprune
from torchprune import MagnitudeSpec, kernels
from torchprune.export import to_aoti

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

BASE = "eager, dense"


def llama() -> nn.Module:
    """A random Llama of moderate size, with a small vocabulary."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=8000,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def smollm2() -> nn.Module:
    """SmolLM2-135M."""
    import smollm2 as real

    model: nn.Module = real.load_model()
    return model


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def contenders(model: nn.Module, folder: Path) -> dict[str, tuple[Callable[[Tensor], Any], int]]:
    """Name -> what runs tokens, and its bytes: of its tensors, or of its files."""
    folded = torchprune.fold(torchprune.sparsify(model, MagnitudeSpec(), progress=False))
    lowered = torchprune.lower(copy.deepcopy(folded), "bitmask")
    eight = torchprune.lower(copy.deepcopy(folded), "bitmask", dtype=torch.int8)
    found: dict[str, tuple[Callable[[Tensor], Any], int]] = {}
    for name, held in ((BASE, folded), ("eager, packed", lowered), ("eager, packed int8", eight)):
        found[name] = (held, weight_bytes(held))
    tokens = torch.randint(10, 100, (2, 8))
    for name, held, weights in (
        ("package, dense", folded, "dense"),
        ("package, packed", lowered, "packed"),
        ("package, packed int8", eight, "packed"),
    ):
        start = time.perf_counter()
        report = to_aoti(held, folder / f"{len(found)}.pt2", tokens, weights=weights)
        print(
            f"{name}: made in {time.perf_counter() - start:.0f} s, loaded in "
            f"{report.load_seconds:.2f} s, {report.relative:.1g} from eager"
        )
        package = torch._inductor.aoti_load_package(str(report.path))
        found[name] = (package, report.bytes)
    return found


def race(runs: list[Callable[[Tensor], Any]], rounds: int) -> list[list[float]]:
    """Seconds of a call of each, in every round, one after the other."""
    token, times = torch.tensor([[42]]), []
    with torch.inference_mode():
        for now in range(-3, rounds):
            taken = []
            for run in runs:
                start = time.perf_counter()
                run(token)
                taken.append(time.perf_counter() - start)
            if now >= 0:
                times.append(taken)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("llama", "smollm2"), default="llama")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    model = {"llama": llama, "smollm2": smollm2}[options.model]()
    model = model.to(getattr(torch, options.dtype)).eval()
    model.config.use_cache = False
    with tempfile.TemporaryDirectory() as folder:
        entries = contenders(model, Path(folder))
        times = race([run for run, _ in entries.values()], options.rounds)
    print(
        f"\n{options.model}, {options.dtype}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}; {kernels.native()}\n"
    )
    print("| contender | MB | of dense | ms a call | of eager |")
    print("| --- | ---: | ---: | ---: | ---: |")
    dense, found = entries[BASE][1], {}
    for at, (name, (_, size)) in enumerate(entries.items()):
        seconds = median(taken[at] for taken in times)
        ratio = median(taken[at] / taken[0] for taken in times)
        found[name] = {"bytes": size, "seconds": seconds, "of_eager": ratio}
        print(
            f"| {name} | {size / 1e6:.1f} | {size / dense:.3f} | {seconds * 1e3:.2f} "
            f"| {ratio:.2f} |"
        )
    if options.output:
        options.output.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
