"""The profile of SmolLM2-135M, half of it pruned, beside what the other benchmarks measured.

    python benchmarks/study/profiling.py [--model smollm2|mlp] [--pattern unstructured|2:4]
        [--rows 1,8,64] [--seconds 2] [--forms eager,bitmask,bitmask_int8] [--dtype float32]
        [--wall] [--output FILE.json]

Times are processor time of one thread, which other work disturbs least; `--wall` takes the clock on
the wall and all threads. Below the profile: each kernel's product on the shapes of the layers,
added up, against what the lowered model took, which checks the profile's own predictions.
"""

import argparse
import copy
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import torchprune
from torchprune import MagnitudeSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))


def smollm2(dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    """The real model, and tokens."""
    import smollm2 as source

    tokens = torch.randint(10, 20000, (1, 64), generator=torch.Generator().manual_seed(0))
    return source.load_model().to(dtype), tokens


def mlp(dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    """Products of SmolLM2's feed-forward shapes and nothing else: 24 layers, random weights."""
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Linear(576, 1536, bias=False), nn.ReLU(), nn.Linear(1536, 576, bias=False))
        for _ in range(12)
    ]
    return nn.Sequential(*blocks).eval().to(dtype), torch.randn(64, 576).to(dtype)


SOURCES = {"smollm2": smollm2, "mlp": mlp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SOURCES, default="smollm2")
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--rows", default="1,8,64", help="tokens in a call")
    parser.add_argument("--seconds", type=float, default=2.0, help="a form and number of rows")
    parser.add_argument("--forms", default="eager,bitmask,bitmask_int8")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-prospects", action="store_true")
    parser.add_argument("--wall", action="store_true", help="time on the wall, all threads")
    parser.add_argument("--output", type=Path, help="write the profile to this JSON file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")

    dense, example = SOURCES[options.model](getattr(torch, options.dtype))
    spec = MagnitudeSpec(pattern=options.pattern)
    pruned = torchprune.fold(torchprune.sparsify(copy.deepcopy(dense), spec, progress=False))
    found = torchprune.profile(
        pruned,
        example,
        against=dense,
        rows=[int(n) for n in options.rows.split(",")],
        forms=options.forms.split(","),
        seconds=options.seconds,
        prospects=not options.no_prospects,
        threads=None if options.wall else 1,
        progress=False,
        clock=time.perf_counter if options.wall else time.process_time,
    )
    print(found.to_markdown())
    for name, value in found.machine.items():
        print(f"- {name}: {value}")
    kind = "2:4" if options.pattern == "2:4" else "50 %"
    for form, kernel in (("bitmask", f"bitmask {kind}"), ("bitmask_int8", "bitmask int8 50 %")):
        for ahead in found.prospects:
            cell = next(
                (c for c in found.cells if (c.contender, c.rows) == (form, ahead.rows)), None
            )
            if ahead.kernel == kernel and cell is not None and cell.ratio is not None:
                print(f"- {ahead.rows}, {form}: added up {ahead.ratio}, measured {cell.ratio}")
    if options.output:
        found.save(options.output)


if __name__ == "__main__":
    main()
