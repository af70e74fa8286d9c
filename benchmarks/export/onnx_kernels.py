"""What `to_onnx(weights="kernels")` brings: bytes, memory and milliseconds in ONNX Runtime.

    python benchmarks/export/onnx_kernels.py [--model smollm2|layer] [--sparsity 0.5] [--rounds 20]
                                             [--threads 1] [--keep FOLDER]

"smollm2" is a step of SmolLM2-135M with 64 tokens in its cache, for one new token and for 64, its
blocks pruned by `MagnitudeSpec` (embeddings and head stay dense). "layer" is one product of
4096 x 4096 in float32, beside the same kernels in torch. Contenders take turns; times are of the
processor, and ratios are medians of those within a turn. The peak is resident memory beyond what a
process of its own had before it opened the file, the median of three.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from opening import opened
from torch import nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.export import to_onnx
from torchprune.export.onnx_model import library_of
from torchprune.study.speed.turns import Pace, take_turns

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

PAST = 64
SIZE = 4096

FORMS: dict[str, dict[str, Any]] = {
    "dense": {"weights": "dense"},
    "packed": {},
    "kernels": {"weights": "kernels"},
    "int8 of ONNX Runtime": {"int8": True, "int8_ignore": ["*.down_proj.*"]},
    "kernels int8": {"weights": "kernels", "int8": True},
}


def session_of(path: Path, library: Path | None, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def smollm2_files(home: Path, sparsity: float) -> dict[str, Path]:
    import smollm2

    model = smollm2.load_model().float()
    torchprune.sparsify(model, MagnitudeSpec(sparsity), progress=False)
    paths = {}
    for name, form in FORMS.items():
        paths[name] = home / f"smollm2 {name}.onnx"
        if not paths[name].exists():
            example = torch.ones(2, 8, dtype=torch.int64)
            print(name, to_onnx(model, paths[name], example, with_cache=True, **form), flush=True)
    return paths


def step_of(session: Any, new: int) -> Callable[[], object]:
    """A step of one row of new tokens."""
    sizes = {"batch_size": 1, "sequence_length": new, "past_sequence_length": PAST}
    given = {}
    for value in session.get_inputs():
        shape = [
            size if isinstance(size, int) else sizes.get(size, PAST + new) for size in value.shape
        ]
        if value.name.startswith("past"):
            given[value.name] = np.zeros((1, shape[1], PAST, shape[3]), np.float32)
        elif value.name == "attention_mask":
            given[value.name] = np.ones((1, PAST + new), np.int64)
        else:
            given[value.name] = np.arange(new, dtype=np.int64)[None] + PAST
    return lambda: session.run(None, given)


def measured(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of each, and their ratio to the first's."""
    pace = Pace(least=rounds, most=rounds, seconds=1e9)
    turns = take_turns(runs, pace, clock=time.process_time)
    base = turns.seconds[next(iter(runs))]
    return {
        name: (
            1e3 * statistics.median(some),
            statistics.median(one / other for one, other in zip(some, base, strict=True)),
        )
        for name, some in turns.seconds.items()
    }


def smollm2_table(home: Path, asked: argparse.Namespace) -> None:
    paths = smollm2_files(home, asked.sparsity)
    rounds = [{name: opened(path) for name, path in paths.items()} for _ in range(3)]
    costs = {
        n: {k: statistics.median(r[n][k] for r in rounds) for k in rounds[0][n]} for n in paths
    }
    beside = {n: library_of(p) if library_of(p).exists() else None for n, p in paths.items()}
    sessions = {n: session_of(p, beside[n], asked.threads) for n, p in paths.items()}
    times = [
        measured({n: step_of(s, new) for n, s in sessions.items()}, asked.rounds)
        for new in (1, PAST)
    ]
    times_of = [cell for what in ("one token", "64") for cell in (f"{what}, ms", "of dense")]
    print("| " + " | ".join(["file", "MB", "of dense", "peak, GB", "kept, GB", *times_of]) + " |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    sizes = {n: sum(f.stat().st_size for f in (p, beside[n]) if f) / 1e6 for n, p in paths.items()}
    for name in paths:
        cells = [name, f"{sizes[name]:.1f}", f"{sizes[name] / sizes['dense']:.2f}"]
        cells += [f"{costs[name][key]:.2f}" for key in ("peak, GB", "kept, GB")]
        for found in times:
            cells += [f"{found[name][0]:.1f}", f"{found[name][1]:.2f}"]
        print("| " + " | ".join(cells) + " |")


def layer_table(home: Path, asked: argparse.Namespace) -> None:
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE)).eval()
    torchprune.sparsify(model, MagnitudeSpec(asked.sparsity), progress=False)
    sessions = {}
    for name in ("dense", "kernels", "kernels int8"):
        report = to_onnx(model, home / f"{name}.onnx", torch.randn(2, SIZE), **FORMS[name])
        sessions[name] = session_of(report.path, report.library, asked.threads)
    lowered = torchprune.lower(torchprune.fold(model), "bitmask")
    print("| rows | " + " | ".join([*sessions, "kernels in torch"]) + " |")
    print("| ---: |" + " ---: |" * (len(sessions) + 1))
    for rows in (1, 4, 8, 64, 512):
        x = torch.randn(rows, SIZE)
        runs: dict[str, Callable[[], object]] = {
            name: lambda s=s, x=x: s.run(None, {s.get_inputs()[0].name: x.numpy()})
            for name, s in sessions.items()
        }

        def in_torch(x: torch.Tensor = x) -> object:
            with torch.inference_mode():
                return lowered(x)

        found = measured(runs | {"torch": in_torch}, asked.rounds)
        told = [f"{ms:.2f} ({ratio:.2f})" for ms, ratio in found.values()]
        print("| " + " | ".join([str(rows), *told]) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["smollm2", "layer"], default="smollm2")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a folder for the files")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as other:
        home = asked.keep or Path(other)
        home.mkdir(exist_ok=True)
        (smollm2_table if asked.model == "smollm2" else layer_table)(home, asked)


if __name__ == "__main__":
    main()
