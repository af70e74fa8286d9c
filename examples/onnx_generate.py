"""From a pruned model to text in ONNX Runtime: sparsify, write a packed file, generate.

    python examples/onnx_generate.py [--prompt TEXT] [--tokens 24] [--output artifacts/smollm2.onnx]

SmolLM2-135M loses half of its weights to Wanda, is written with its key-value cache as inputs and
outputs, and ONNX Runtime alone then continues a prompt. The file is smaller; the speed is that of
the dense model, because the runtime unpacks the weights when it loads them.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import onnxruntime
import smollm2
import torch

import torchprune
from torchprune import WandaSpec
from torchprune.export import to_onnx


def generate(session: onnxruntime.InferenceSession, tokens: list[int], count: int) -> list[int]:
    """Greedy continuation: every step feeds the new tokens and what the last one cached."""
    names = [i.name for i in session.get_inputs()]
    shapes = [i.shape for i in session.get_inputs()[2:]]
    past = [np.zeros((1, heads, 0, size), np.float32) for _, heads, _, size in shapes]
    new = np.array([tokens], np.int64)
    for _ in range(count):
        mask = np.ones((1, len(tokens)), np.int64)
        logits, *past = session.run(None, dict(zip(names, [new, mask, *past], strict=True)))
        new = logits[:, -1:].argmax(-1)
        tokens = [*tokens, int(new[0, 0])]
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--output", type=Path, default=Path("artifacts/smollm2.onnx"))
    options = parser.parse_args()

    model, tokenizer = smollm2.load_model(), smollm2.load_tokenizer()
    articles, _ = smollm2.split(smollm2.wikipedia_articles())
    data = smollm2.windows(tokenizer, articles, 16, 512, 0)
    torchprune.sparsify(model, WandaSpec(), [window[None] for window in data])

    print(to_onnx(model, options.output, data[:2, :8], with_cache=True))

    session = onnxruntime.InferenceSession(options.output, providers=["CPUExecutionProvider"])
    tokens = tokenizer(options.prompt).input_ids
    start = time.perf_counter()
    text = generate(session, tokens, options.tokens)
    speed = options.tokens / (time.perf_counter() - start)
    print(f"{tokenizer.decode(text)}\n({speed:.1f} tokens a second)")

    expected = model.generate(
        torch.tensor([tokens]), max_new_tokens=options.tokens, do_sample=False, eos_token_id=None
    )
    assert text == expected[0].tolist(), "ONNX Runtime and transformers continue alike"


if __name__ == "__main__":
    main()
