"""Tokens a second of a language model that decodes on the CPU: dense, masked, lowered, int8.

    python benchmarks/lowering/decode.py [--model smollm2|1b] [--tokens 48] [--compile] [--onnx]
                                [--only REGEX] [--output FILE]

All contenders hold the same weights (the dense ones before pruning) and decode side by side, one
token each in turn, after a context of 64 tokens, with their key-value caches: a busy machine hurts
them alike. "smollm2" is the real SmolLM2-135M; "1b" has the shape of a one-billion Llama and random
weights, which decode as fast as trained ones. "ours dense" is the bitmask product without zeros.
"""

import argparse
import copy
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import torchprune
from torchprune import MagnitudeSpec, kernels

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from decoding import Contender, InRuntime, InTorch, race

CONTEXT = 64
BASE = "transformers bfloat16"


def one_billion() -> LlamaForCausalLM:
    """The shape of a small Llama 3, with a smaller vocabulary and a head of its own."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def real() -> nn.Module:
    """SmolLM2-135M in bfloat16."""
    import smollm2

    return smollm2.load_model().to(torch.bfloat16).eval()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers in the repeated blocks and the head, tied ones once."""
    seen: dict[int, int] = {}
    embedding = model.get_input_embeddings().weight
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor is not embedding:
            parts = [tensor]
            if hasattr(tensor, "__tensor_flatten__"):
                parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
            for part in parts:
                seen[part.data_ptr()] = part.nbytes
    return sum(seen.values())


@dataclass
class Entry:
    """A contender and the bytes of its weights."""

    runs: Contender
    bytes: int


def in_torch(model: nn.Module, context: Tensor) -> Entry:
    return Entry(InTorch(model, context), weight_bytes(model))


def in_runtime(model: nn.Module, context: Tensor) -> Entry:
    from torchprune.export import to_onnx

    with tempfile.TemporaryDirectory() as folder:
        report = to_onnx(model, Path(folder) / "model.onnx", context[:, :8], with_cache=True)
        return Entry(InRuntime(report.path, context), report.bytes)


def in_int8(model: nn.Module) -> nn.Module:
    """Quantized by torchao: weights in int8 with a scale a row."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def compiled(model: nn.Module) -> nn.Module:
    """By inductor, for a cache that grows."""
    # All contenders run the same code objects, each with graphs of its own.
    torch._dynamo.config.recompile_limit = 64
    model.forward = torch.compile(model.forward, dynamic=True)
    return model


def contenders(
    dense: nn.Module, context: Tensor, only: re.Pattern[str], with_compile: bool, with_onnx: bool
) -> dict[str, Entry]:
    sparse = torchprune.sparsify(copy.deepcopy(dense), MagnitudeSpec())
    folded = torchprune.fold(copy.deepcopy(sparse))
    folded_wide = copy.deepcopy(folded).float() if with_onnx else folded

    def bitmask(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return torchprune.lower(copy.deepcopy(model), "bitmask", dtype=dtype, min_sparsity=0.0)

    made: dict[str, Callable[[], nn.Module]] = {
        BASE: lambda: dense,
        "transformers float32": lambda: copy.deepcopy(dense).float(),
        "masked bfloat16 (not folded)": lambda: sparse,
        "ours dense bfloat16": lambda: bitmask(dense),
        "bitmask bfloat16 50 %": lambda: bitmask(folded),
        "torchao int8 weight-only": lambda: in_int8(copy.deepcopy(dense)),
        "ours dense int8": lambda: bitmask(dense, torch.int8),
        "bitmask int8 50 %": lambda: bitmask(folded, torch.int8),
    }
    if with_compile:
        made |= {
            "compiled bfloat16": lambda: compiled(copy.deepcopy(dense)),
            "compiled bitmask bfloat16 50 %": lambda: compiled(bitmask(folded)),
            "compiled torchao int8": lambda: compiled(in_int8(copy.deepcopy(dense))),
            "compiled ours dense int8": lambda: compiled(bitmask(dense, torch.int8)),
            "compiled bitmask int8 50 %": lambda: compiled(bitmask(folded, torch.int8)),
        }
    found = {}
    for name, make in made.items():
        if name != BASE and not only.search(name):
            continue
        try:
            found[name] = in_torch(make(), context)
        except Exception as error:  # one that does not run here is left out, and said
            print(f"{name}: left out: {type(error).__name__}: {str(error).splitlines()[0]}")
    if with_onnx:
        found["ONNX Runtime float32, packed file"] = in_runtime(folded_wide, context)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("smollm2", "1b"), default="smollm2")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--compile", action="store_true", help="inductor too: minutes a model")
    parser.add_argument("--only", default="", help="leave out other names than this finds")
    parser.add_argument("--onnx", action="store_true", help="ONNX Runtime too")
    parser.add_argument("--output", type=Path, help="write the medians to this JSON file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    dense = real() if options.model == "smollm2" else one_billion()
    context = torch.randint(10, 20000, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        only = re.compile(options.only)
        entries = contenders(dense, context, only, options.compile, options.onnx)
    medians = race([entry.runs for entry in entries.values()], options.tokens)
    print(
        f"{options.model}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"{kernels.native()}\n"
    )
    size, eager = entries[BASE].bytes, medians[0]
    print("| contender | ms a token | tokens/s | times bfloat16 | weights MB | of bfloat16 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    found = {}
    for (name, entry), now in zip(entries.items(), medians, strict=True):
        found[name] = {"seconds": now, "bytes": entry.bytes}
        print(
            f"| {name} | {now * 1e3:.1f} | {1 / now:.1f} | {eager / now:.2f} | "
            f"{entry.bytes / 1e6:.0f} | {entry.bytes / size:.3f} |"
        )
    if options.output:
        options.output.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
