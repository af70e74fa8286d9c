"""OpenVINO in eight bits, and what zeros bring there: float32, int8, and int8 with sparse weights.

Products of a transformer's sizes, rows of input as asked. Processor time of one thread, contenders
in turns; "of float32" is the median over rounds of the ratio within a round. The last contender
differs on processors with AMX alone, and how many products ran without zeros is read off OpenVINO's
own profile.

    python benchmarks/lowering/openvino_int8.py --sparsity 0.5 0.8 0.9 --rows 1 64
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import median

import openvino
import torch
from torch import nn

import torchprune
from torchprune import MagnitudeSpec, export
from torchprune.export.openvino_int8 import SPARSE
from torchprune.study.speed.turns import Pace, take_turns

WIDTHS = (1024, 4096, 1024, 4096, 1024)
ONE = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}


def main() -> None:
    """Print a row for each sparsity and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8, 0.9])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("AMX" if torch.cpu.get_capabilities().get("amx_int8") else "no AMX")
    heads = ["zeros", "rows", "float32, ms", "int8, ms", "of float32", "sparse int8, of int8"]
    print(f"| {' | '.join(heads)} | products without zeros | MB |")
    print("|" + " ---: |" * (len(heads) + 2))
    for share in options.sparsity:
        for rows in options.rows:
            print(row(share, rows, options.rounds), flush=True)


def row(share: float, rows: int, rounds: int) -> str:
    """Measure one sparsity at one number of rows."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS)))
    torchprune.sparsify(model, MagnitudeSpec(share), progress=False)
    x = torch.randn(rows, WIDTHS[0])
    with tempfile.TemporaryDirectory() as home:
        plain, eight = Path(home) / "plain.xml", Path(home) / "int8.xml"
        large = export.to_openvino(model, plain, x).bytes
        small = export.to_openvino(model, eight, x, int8=True).bytes
        core, given = openvino.Core(), [x.numpy()]
        exact = {**ONE, "INFERENCE_PRECISION_HINT": "f32"}
        made = [
            core.compile_model(path, "CPU", how)
            for path, how in ((plain, exact), (eight, exact), (eight, {**exact, **SPARSE}))
        ]
        watched = core.compile_model(eight, "CPU", {**exact, **SPARSE, "PERF_COUNT": True})
        request = watched.create_infer_request()
        request.infer(given)
        sparse = [x for x in request.profiling_info if "sparse" in x.exec_type.lower()]
        contenders = {str(n): partial(one, given) for n, one in enumerate(made)}
        turns = take_turns(contenders, Pace(least=rounds, most=rounds), clock=time.process_time)
    times = list(zip(*(turns.seconds[name] for name in contenders), strict=True))
    first, second = (1e3 * median(some[i] for some in times) for i in (0, 1))
    by_int8 = median(some[1] / some[0] for some in times)
    by_zeros = median(some[2] / some[1] for some in times)
    cells = [f"{share:.0%}", f"{rows}", f"{first:.2f}", f"{second:.2f}", f"{by_int8:.2f}"]
    cells += [f"{by_zeros:.2f}", f"{len(sparse)} of {len(WIDTHS) - 1}"]
    return f"| {' | '.join(cells)} | {small / 1e6:.1f} of {large / 1e6:.1f} |"


if __name__ == "__main__":
    main()
