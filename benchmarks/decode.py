"""Tokens a second of a language model that decodes on the CPU: dense, masked, lowered, int8.

    python benchmarks/decode.py [--model smollm2|1b] [--tokens 48] [--compile] [--onnx]
                                [--output FILE]

All contenders hold the same weights (the dense ones before pruning) and decode side by side, one
token each in turn, after a context of 64 tokens, with their key-value caches: a busy machine hurts
them alike. "smollm2" is the real SmolLM2-135M; "1b" has the shape of a one-billion Llama and random
weights, which decode as fast as trained ones. "ours dense" is the bitmask product without zeros.
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

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import torchprune
from torchprune import MagnitudeSpec, kernels

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

CONTEXT = 64

Step = Callable[[Tensor], Tensor]


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


class Contender:
    """A model that decodes greedily, one token a call."""

    def __init__(self, model: nn.Module, context: Tensor) -> None:
        self.model, self.bytes = model, weight_bytes(model)
        out = model(context, use_cache=True)
        self.cache, self.token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        self.seconds: list[float] = []

    def step(self) -> None:
        start = time.perf_counter()
        out = self.model(self.token, past_key_values=self.cache, use_cache=True)
        self.token = out.logits[:, -1:].argmax(-1)
        self.seconds.append(time.perf_counter() - start)


class InRuntime:
    """The same in ONNX Runtime, from a file with a cache as inputs and outputs."""

    def __init__(self, model: nn.Module, context: Tensor) -> None:
        import onnxruntime

        from torchprune.export import to_onnx

        with tempfile.TemporaryDirectory() as folder:
            report = to_onnx(model, Path(folder) / "model.onnx", context[:, :8], with_cache=True)
            self.session = onnxruntime.InferenceSession(
                report.path, providers=["CPUExecutionProvider"]
            )
        self.names, self.bytes = report.inputs, report.bytes
        shapes = [i.shape for i in self.session.get_inputs()[2:]]
        self.past = [np.zeros((1, heads, 0, size), np.float32) for _, heads, _, size in shapes]
        self.token, self.length = context.numpy(), 0
        self.seconds: list[float] = []
        self.step()

    def step(self) -> None:
        start = time.perf_counter()
        self.length += self.token.shape[1]
        mask = np.ones((1, self.length), np.int64)
        inputs = dict(zip(self.names, [self.token, mask, *self.past], strict=True))
        logits, *self.past = self.session.run(None, inputs)
        self.token = logits[:, -1:].argmax(-1)
        self.seconds.append(time.perf_counter() - start)


def in_int8(model: nn.Module) -> nn.Module:
    """Quantized by torchao: weights in int8 with a scale a row."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def compiled(model: nn.Module) -> nn.Module:
    """By inductor, for a cache that grows."""
    model.forward = torch.compile(model.forward, dynamic=True)
    return model


def contenders(
    dense: nn.Module, context: Tensor, with_compile: bool, with_onnx: bool
) -> dict[str, Contender | InRuntime]:
    sparse = torchprune.sparsify(copy.deepcopy(dense), MagnitudeSpec())
    folded = torchprune.fold(copy.deepcopy(sparse))
    folded_wide = copy.deepcopy(folded).float() if with_onnx else folded

    def bitmask(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return torchprune.lower(copy.deepcopy(model), "bitmask", dtype=dtype, min_sparsity=0.0)

    made: dict[str, Callable[[], nn.Module]] = {
        "transformers bfloat16": lambda: dense,
        "transformers float32": lambda: copy.deepcopy(dense).float(),
        "masked bfloat16 (not folded)": lambda: sparse,
        "ours dense bfloat16": lambda: bitmask(dense),
        "bitmask bfloat16 50 %": lambda: bitmask(folded),
        "torchao int8 weight-only": lambda: in_int8(copy.deepcopy(dense)),
        "ours dense int8": lambda: bitmask(dense, torch.int8),
        "bitmask int8 50 %": lambda: bitmask(folded, torch.int8),
    }
    if with_compile:
        made["compiled bfloat16"] = lambda: compiled(copy.deepcopy(dense))
        made["compiled bitmask bfloat16 50 %"] = lambda: compiled(bitmask(folded))
    found = {}
    for name, make in made.items():
        try:
            found[name] = Contender(make(), context)
        except Exception as error:  # one that does not run here is left out, and said
            print(f"{name}: left out: {type(error).__name__}: {str(error).splitlines()[0]}")
    if with_onnx:
        found["ONNX Runtime float32, packed file"] = InRuntime(folded_wide, context)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("smollm2", "1b"), default="smollm2")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--compile", action="store_true", help="inductor too: minutes a model")
    parser.add_argument("--onnx", action="store_true", help="ONNX Runtime too")
    parser.add_argument("--output", type=Path, help="write the medians to this JSON file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    dense = real() if options.model == "smollm2" else one_billion()
    context = torch.randint(10, 20000, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        all_of_them = contenders(dense, context, options.compile, options.onnx)
        for turn in range(-3, options.tokens):
            for contender in all_of_them.values():
                if turn == 0:
                    contender.seconds.clear()
                contender.step()
    print(
        f"{options.model}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"{kernels.native()}\n"
    )
    eager = median(all_of_them["transformers bfloat16"].seconds)
    size = all_of_them["transformers bfloat16"].bytes
    print("| contender | ms a token | tokens/s | times bfloat16 | weights MB | of bfloat16 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    found = {}
    for name, contender in all_of_them.items():
        now = median(contender.seconds)
        found[name] = {"seconds": now, "bytes": contender.bytes}
        print(
            f"| {name} | {now * 1e3:.1f} | {1 / now:.1f} | {eager / now:.2f} | "
            f"{contender.bytes / 1e6:.0f} | {contender.bytes / size:.3f} |"
        )
    if options.output:
        options.output.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
