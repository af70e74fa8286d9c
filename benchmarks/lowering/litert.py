"""A MobileNet-like CNN in LiteRT, 1x1 convolutions and head pruned: what XNNPACK makes of it.

Three files of `to_litert` in turns: without zeros, with zeros stored as they are, and packed.
XNNPACK takes its sparse kernels on ARM, and on x86 without AVX only; so the same files are run once
more in a process that sees such a processor, by `qemu-x86_64 -cpu Nehalem` of Debian's qemu-user,
if it is there. Its seconds are an emulator's: they tell which kernels run, not how fast they are.

    python benchmarks/lowering/litert.py --sparsity 0.8 0.9
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

SIZE = 224
FILES = ("full", "zeros", "packed")


def mobile(width: int) -> Any:
    """MobileNetV1's body with a small head; random weights."""
    import torch
    from torch import nn

    torch.manual_seed(0)

    def block(inner: int, out: int, stride: int = 1) -> list[nn.Module]:
        deep = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner)
        return [deep, nn.ReLU6(), nn.Conv2d(inner, out, 1), nn.ReLU6()]

    w = width
    steps = [(w, 2 * w, 1), (2 * w, 4 * w, 2), (4 * w, 4 * w, 1), (4 * w, 8 * w, 2)]
    steps += [(8 * w, 8 * w, 1), (8 * w, 16 * w, 2), *[(16 * w, 16 * w, 1)] * 5]
    steps += [(16 * w, 32 * w, 2), (32 * w, 32 * w, 1)]
    body = [layer for step in steps for layer in block(*step)]
    start = nn.Conv2d(3, w, 3, 2, padding=1)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32 * w, 1000)
    return nn.Sequential(start, nn.ReLU6(), *body, *head).eval()


def write(folder: Path, sparsity: float, width: int) -> dict[str, int]:
    """The three files, and their bytes."""
    import torch

    import torchprune
    from torchprune import MagnitudeSpec
    from torchprune.export import to_litert

    x = torch.randn(1, 3, SIZE, SIZE)
    full = mobile(width)
    to_litert(full, folder / "full.tflite", x, weights="dense")
    sizes = {n: getattr(m, "kernel_size", (1, 1)) for n, m in full.named_modules()}
    some = [
        n
        for n, size in sizes.items()
        if size == (1, 1) and hasattr(full.get_submodule(n), "weight")
    ]
    spec = MagnitudeSpec(sparsity, targets=some)
    model = torchprune.sparsify(full, spec, progress=False)
    to_litert(model, folder / "zeros.tflite", x, weights="dense")
    print(to_litert(model, folder / "packed.tflite", x), file=sys.stderr)
    return {name: (folder / f"{name}.tflite").stat().st_size for name in FILES}


def run(folder: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds of processor time a call by file, in turns, one thread; and how far apart."""
    from ai_edge_litert.interpreter import Interpreter

    x = np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE), np.float32)
    held, outputs = {}, {}
    for name in FILES:
        held[name] = Interpreter(str(folder / f"{name}.tflite"), num_threads=1)
        held[name].allocate_tensors()
        held[name].set_tensor(held[name].get_input_details()[0]["index"], x)
        held[name].invoke()
        outputs[name] = held[name].get_tensor(held[name].get_output_details()[0]["index"])
    times: dict[str, list[float]] = {name: [] for name in FILES}
    for at in range(rounds):
        for name in FILES[at % 3 :] + FILES[: at % 3]:
            start = time.process_time()
            held[name].invoke()
            times[name].append(1e3 * (time.process_time() - start))
    apart = float(np.abs(outputs["packed"] - outputs["zeros"]).max())
    return {name: median(some) for name, some in times.items()} | {"apart": apart}


def emulated(folder: Path, rounds: int) -> dict[str, Any] | None:
    """`run` in a process that sees no AVX, or None where there is no emulator."""
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        return None
    command = [emulator, "-cpu", "Nehalem", os.path.realpath(sys.executable), __file__]
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [*command, "--run", str(folder), "--rounds", str(rounds)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print a row for each sparsity and processor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8, 0.9])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--run", type=Path, help="only run the files of a folder")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(options.run, options.rounds)))
        return
    print("| zeros | processor | full, ms | zeros, ms | packed, ms | packed / full | MB |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for sparsity in options.sparsity:
        with tempfile.TemporaryDirectory() as folder:
            sizes = write(Path(folder), sparsity, options.width)
            size = f"{sizes['packed'] / 1e6:.1f} of {sizes['full'] / 1e6:.1f}"
            rows = {"this one": run(Path(folder), options.rounds)}
            if (found := emulated(Path(folder), 2)) is not None:
                rows["emulated, without AVX"] = found
        for name, row in rows.items():
            cells = [f"{row[file]:.1f}" for file in FILES]
            ratio = row["packed"] / row["full"]
            print(f"| {sparsity:.0%} | {name} | {' | '.join(cells)} | {ratio:.2f} | {size} |")


if __name__ == "__main__":
    main()
