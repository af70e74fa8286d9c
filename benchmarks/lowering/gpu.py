"""Time of 2:4 products on a CUDA device against dense ones, over numbers of rows of input.

    python benchmarks/lowering/gpu.py [--shape 4096x4096] [--rows 1,16,64,256,1024,4096] [--compile]
                             [--dtype bfloat16] [--kernel cusparselt|cutlass] [--output FILE]

Both sides hold the same 2:4 weights and take turns; a sample is one product with each of several
weights, so that the cache does not answer for the memory, between two CUDA events, queued while the
device still waits, so that it is the device's time and not Python's. Medians are compared. The
results are compared too: a fast wrong product is no product.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor

import torchprune
from torchprune import MagnitudeSpec

SETS = 4
"""Copies of a weight: with 4096x4096 bfloat16 values they exceed the cache of an H100."""

WAIT = 2_000_000
"""Cycles that the device sleeps before a sample: a millisecond or so, enough to queue it."""


def layers(shape: tuple[int, int], dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Dense layers that hold 2:4 weights, and the same lowered."""
    rows, cols = shape
    made = [nn.Linear(cols, rows, bias=False, dtype=dtype, device="cuda") for _ in range(SETS)]
    dense = torchprune.fold(
        torchprune.sparsify(nn.ModuleList(made), MagnitudeSpec(pattern="2:4"), progress=False)
    )
    return dense, torchprune.lower(copy.deepcopy(dense), "semi_structured")


def compiled(some: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """The layers, each by inductor."""
    return [torch.compile(layer, mode="max-autotune-no-cudagraphs") for layer in some]


def sample(some: list[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    """Milliseconds of a product on the device, the mean over the layers."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(WAIT)
    start.record()
    for layer in some:
        layer(x)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / len(some)


def compare(
    dense: list[Callable[[Tensor], Tensor]],
    sparse: list[Callable[[Tensor], Tensor]],
    x: Tensor,
    repeats: int,
) -> dict[str, float]:
    """Median milliseconds of both, and the largest difference relative to the largest output."""
    expected, found = dense[0](x), sparse[0](x)
    difference = float((found - expected).abs().max() / expected.abs().max())
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    for turn in range(-5, repeats):
        for some, taken in ((dense, times["dense"]), (sparse, times["sparse"])):
            milliseconds = sample(some, x)
            if turn >= 0:
                taken.append(milliseconds)
    medians = {name: median(taken) for name, taken in times.items()}
    return {"rows": len(x), **medians, "difference": difference}


def table(found: list[dict[str, float]]) -> str:
    """Rows of Markdown, and from how many rows of input on the 2:4 product is the faster one."""
    lines = ["| rows | dense ms | 2:4 ms | times dense | difference |", "|" + " ---: |" * 5]
    lines += [
        f"| {r['rows']:.0f} | {r['dense']:.4f} | {r['sparse']:.4f} | "
        f"{r['dense'] / r['sparse']:.2f} | {r['difference']:.1e} |"
        for r in found
    ]
    ahead = [r["rows"] for r in found if r["sparse"] < r["dense"]]
    behind = [r["rows"] for r in found if r["sparse"] >= r["dense"]]
    if not ahead:
        told = "2:4 is not faster at any of these"
    elif not behind:
        told = "2:4 is faster at all of these"
    else:
        told = f"2:4 is faster at {', '.join(f'{rows:.0f}' for rows in ahead)} rows of input"
    return "\n".join([*lines, "", told])


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 without a CUDA device or if a product is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="4096x4096", help="of the weight: out x in")
    parser.add_argument("--rows", default="1,16,64,256,1024,4096", help="of input")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--kernel", choices=("cusparselt", "cutlass"), help="default: torch's")
    parser.add_argument("--compile", action="store_true", help="both sides by inductor")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "benchmarks/lowering/gpu.py needs a CUDA device, and torch finds none", file=sys.stderr
        )
        return 1
    if options.kernel:
        SparseSemiStructuredTensor._FORCE_CUTLASS = options.kernel == "cutlass"
    out, inner = (int(n) for n in options.shape.split("x"))
    dtype, found = getattr(torch, options.dtype), []
    dense, sparse = layers((out, inner), dtype)
    steps = (compiled(dense), compiled(sparse)) if options.compile else (list(dense), list(sparse))
    with torch.inference_mode():
        for rows in (int(n) for n in options.rows.split(",")):
            x = torch.randn(rows, inner, dtype=dtype, device="cuda")
            found.append(compare(*steps, x, options.repeats))
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, {options.dtype}, weight {options.shape}\n")
    print(table(found))
    if options.output:
        options.output.write_text(json.dumps({"device": name, "rows": found}, indent=2))
    wrong = [r["rows"] for r in found if not r["difference"] < 2e-2]
    if wrong:
        print(f"FAILED: the products differ at {wrong} rows of input", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
