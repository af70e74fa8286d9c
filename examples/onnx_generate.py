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
from decoding import no_past, step_inputs

import torchprune
from torchprune import WandaSpec
from torchprune.export import to_onnx


def generate(
    session: onnxruntime.InferenceSession, prompts: list[list[int]], count: int
) -> list[list[int]]:
    """Greedy continuations: every step feeds the new tokens and what the last one cached.

    Prompts may be of different lengths: shorter ones are padded on the left.
    """
    length = max(map(len, prompts))
    new = np.array([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = np.array([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    texts, past = [list(prompt) for prompt in prompts], no_past(session, len(prompts))
    for _ in range(count):
        logits, *past = session.run(None, step_inputs(session, new, mask, past))
        new = logits[:, -1:].argmax(-1)
        mask = np.concatenate([mask, np.ones_like(new)], 1)
        for text, token in zip(texts, new[:, 0], strict=True):
            text.append(int(token))
    return texts


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
    (text,) = generate(session, [tokens], options.tokens)
    speed = options.tokens / (time.perf_counter() - start)
    print(f"{tokenizer.decode(text)}\n({speed:.1f} tokens a second)")

    expected = model.generate(
        torch.tensor([tokens]), max_new_tokens=options.tokens, do_sample=False, eos_token_id=None
    )
    assert text == expected[0].tolist(), "ONNX Runtime and transformers continue alike"


if __name__ == "__main__":
    main()
