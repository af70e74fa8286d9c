"""Products with bitmask and 2:4 weights on a CUDA device against cuBLAS, over rows of input.

    python benchmarks/lowering/gpu.py [--shapes 4096x4096,11008x4096] [--rows 1,2,4,8,16,32,1024]
                             [--zeros 50,70] [--kernel cusparselt|cutlass] [--no-tuning]
                             [--repeats 25] [--output FOLDER]

In order, and all of it in a few minutes: products against float64; the tiles of the bitmask kernels
tried on this device; medians, in bfloat16; and a model under `torch.compile(mode=
"reduce-overhead")` and in a CUDA graph against itself. What stands so far is written after each
part, as JSON and as a table.

All sides take turns; a sample is one product with each of several weights, so that the cache does
not answer for the memory, between two CUDA events, queued while the device still waits, so that it
is the device's time and not Python's. A fast wrong product is no product: all are compared.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.sparse import SparseSemiStructuredTensor

import torchprune
from torchprune import MagnitudeSpec
from torchprune.lowering import few_rows, semi_structured
from torchprune.lowering.bitmask import Bitmask
from torchprune.lowering.kernels import launching
from torchprune.lowering.kernels.launching import Tiles

Product = Callable[[Tensor], Tensor]

AWAY = 200 << 20
"""Bytes of all copies of a weight together: several times the cache of an H200."""

WAIT = 400_000
"""Cycles that the device sleeps for each product of a sample: enough to queue it."""

DENSE = "cuBLAS"

APIECE = [(2, 32, 4), (4, 16, 4), (8, 8, 4), (4, 32, 4), (4, 32, 8), (4, 16, 2), (1, 64, 4)]
BLOCKS = [(16, 2, 2, 8), (16, 2, 2, 4), (16, 2, 2, 16), (16, 4, 4, 4), (16, 4, 4, 8), (32, 2, 4, 8)]
"""Rows of weight, words of 32 columns a step, warps, and steps of blocks: what is tried."""


def copies(bytes_each: int) -> int:
    """How many weights a sample goes through."""
    return max(4, -(-AWAY // bytes_each))


def random(rows: int, cols: int, zeros: float, device: str) -> Tensor:
    """A bfloat16 matrix of which about this share is zero."""
    weight = torch.randn(rows, cols, device=device)
    return weight.mul_(torch.rand(rows, cols, device=device) >= zeros).bfloat16()


def two_of_four(rows: int, cols: int) -> Tensor:
    """The same with the two larger of every four."""
    weight = random(rows, cols, 0.0, "cuda")
    groups = weight.view(rows, -1, 4)
    groups.scatter_(-1, groups.float().abs().argsort(-1)[..., :2], 0)
    return weight


def packed(weight: Tensor, *, int8: bool = False) -> Bitmask:
    """A matrix as a bitmask; int8: rounded, with a scale for each row."""
    if not int8:
        return Bitmask.pack(weight)
    scales = weight.float().abs().amax(1).clamp_min(1e-30) / 127
    return Bitmask.pack((weight.float() / scales[:, None]).round().to(torch.int8), scales)


def clones(it: Bitmask, count: int) -> list[Bitmask]:
    """The same weight elsewhere in memory."""
    parts = [(it.bits.clone(), it.values.clone(), it.starts.clone()) for _ in range(count)]
    return [Bitmask(*part, it.scales, it.cols) for part in parts]


def multiply(it: Bitmask, x: Tensor, **how: Any) -> Tensor:
    """The operator's product; with tiles named, the kernel's itself."""
    given = (x, it.bits, it.values, it.starts, it.scales, None, it.cols)
    if how:
        return launching.product(*given, **how)
    found: Tensor = torch.ops.torchprune.bitmask_linear(*given)
    return found


def contenders(
    shape: tuple[int, int], zeros: Sequence[float], device: str = "cuda", count: int | None = None
) -> tuple[dict[str, list[Product]], dict[str, Tensor]]:
    """Products to compare, each with several weights, and the dense weight of each."""
    rows, cols = shape
    dense = random(rows, cols, 0.0, device)
    ways: dict[str, list[Product]] = {}
    weights = {DENSE: dense}
    for n in range(count or copies(dense.nbytes)):
        weight = dense if n == 0 else dense.clone()
        ways.setdefault(DENSE, []).append(lambda x, w=weight: F.linear(x, w))
    for share in zeros:
        weight = random(rows, cols, share, device)
        for kind in ("bfloat16", "int8"):
            it = packed(weight, int8=kind == "int8")
            name = f"bitmask {kind} {share:.0%}"
            weights[name] = it.unpack()
            some = clones(it, count or copies(it.nbytes))
            ways[name] = [lambda x, it=it: multiply(it, x) for it in some]
    if device == "cuda":
        weights["2:4"] = two = two_of_four(rows, cols)
        each, kind = copies(semi_structured.compressed_bytes(two)), semi_structured.backend()
        some_two = [semi_structured.compress(two, kind) for _ in range(each)]
        ways["2:4"] = [lambda x, w=w: F.linear(x, w) for w in some_two]
        few = [it for it in map(few_rows.parts_of, some_two) if it is not None]
        if few:  # what `lower(model, "semi_structured")` takes for up to 15 rows
            weights["2:4 by its bits"] = two
            ways["2:4 by its bits"] = [lambda x, it=it: multiply(it, x) for it in few]
    return ways, weights


def sample(products: Sequence[Product], x: Tensor) -> float:
    """Microseconds of a product on the device, the mean over the weights."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(WAIT * len(products))
    start.record()
    for product in products:
        product(x)
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end) / len(products)


def turns(
    ways: dict[str, list[Product]],
    x: Tensor,
    repeats: int,
    clock: Callable[[Sequence[Product], Tensor], float] = sample,
) -> tuple[dict[str, float], dict[str, str]]:
    """Median microseconds of each, and why some have none."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    failed: dict[str, str] = {}
    for turn in range(-3, repeats):
        for name, products in ways.items():
            if name in failed:
                continue
            try:
                taken = clock(products, x)
            except Exception as error:  # one that does not run is no reason to lose the others
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            if turn >= 0:
                times[name].append(taken)
    return {name: median(taken) for name, taken in times.items() if taken}, failed


def error_of(found: Tensor, x: Tensor, weight: Tensor) -> float:
    """The largest difference from float64, relative to the largest output."""
    expected = x.double() @ weight.double().T
    return float((found.double() - expected).abs().max() / expected.abs().max())


def checks(device: str = "cuda") -> dict[str, float]:
    """Errors of small, odd products in every dtype; NaN, or more than a few roundings, is wrong."""
    found = {}
    for kind in (torch.float32, torch.float16, torch.bfloat16, torch.int8):
        for wide in (torch.float32, torch.float16, torch.bfloat16):
            weight = random(67, 200, 0.5, device)
            it = packed(weight, int8=kind == torch.int8)
            if kind != torch.int8:
                it = Bitmask.pack(weight.to(kind))
            for batch in (1, 2, 3, 16, 17):
                x = torch.randn(batch, 200, device=device).to(wide)
                told = f"{kind} values, {wide} input, {batch} rows".replace("torch.", "")
                error = error_of(multiply(it, x), x, it.unpack())
                found[told] = error / torch.finfo(wide).eps
    return found


def tuned(shape: tuple[int, int], batch: int, repeats: int) -> dict[str, Any]:
    """Microseconds of the bitmask kernels with each of the tiles, at half the weights zero."""
    it = packed(random(*shape, 0.5, "cuda"))
    some = clones(it, copies(it.nbytes))
    ways: dict[str, list[Product]] = {}
    for blocks, tiles in candidates(batch):
        name = f"{'blocks' if blocks else 'apiece'} {tiles.rows}x{tiles.words} {tiles.warps} warps"
        name += f" {tiles.steps} steps" if blocks else ""
        ways[name] = [lambda x, it=it, h=(tiles, blocks): _tried(it, x, *h) for it in some]
    ways["chosen"] = [lambda x, it=it: multiply(it, x) for it in some]
    x = torch.randn(batch, shape[1], device="cuda", dtype=torch.bfloat16)
    medians, failed = turns(ways, x, repeats)
    return {"shape": shape, "rows": batch, "microseconds": medians, "failed": failed}


def _tried(it: Bitmask, x: Tensor, tiles: Tiles, blocks: bool) -> Tensor:
    return multiply(it, x, tiles=tiles, blocks=blocks)


def candidates(batch: int) -> list[tuple[bool, Tiles]]:
    """Kernels (blocks or not) and tiles for so many rows of input."""
    together = 1 if batch == 1 else 2 if batch == 2 else 4
    found = [(True, Tiles(*tile, 16 * -(-batch // 16), steps)) for *tile, steps in BLOCKS]
    if batch <= 4:
        found += [(False, Tiles(*tile, together)) for tile in APIECE]
    return found


def composed() -> dict[str, Any]:
    """A lowered model compiled, with CUDA graphs, and captured by hand, against itself."""
    from torch._dynamo.utils import counters

    model: nn.Module = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024))
    model = torchprune.sparsify(model.to("cuda", torch.bfloat16), MagnitudeSpec(), progress=False)
    told = str(torchprune.plan_lowering(model, "bitmask")).splitlines()[-1]
    model = torchprune.lower(model, "bitmask")
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    differences = {}
    with torch.no_grad():
        for batch in (1, 4, 32):
            for _ in range(4):  # warm up, record, replay
                x = torch.randn(batch, 1024, device="cuda", dtype=torch.bfloat16)
                torch.compiler.cudagraph_mark_step_begin()
                found = step(x).clone()
            expected = model(x)
            differences[f"compiled, {batch} rows"] = _apart(found, expected)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = model(x)
            x.copy_(torch.randn_like(x))
            graph.replay()
            differences[f"captured, {batch} rows"] = _apart(out, model(x))
    skips = counters["inductor"].get("cudagraph_skips", 0)
    return {"runs_on": told, "differences": differences, "cudagraph_skips": skips}


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def table(shape: tuple[int, int], found: Sequence[dict[str, Any]]) -> str:
    """Markdown: microseconds, and how many times as fast as cuBLAS, for each number of rows."""
    names = list(dict.fromkeys(name for row in found for name in row["microseconds"]))
    heads = [f"{row['rows']} row{'s' if row['rows'] > 1 else ''}" for row in found]
    lines = [f"{shape[0]}x{shape[1]}, microseconds (times {DENSE}):", ""]
    lines += [f"| | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(found)]
    for name in names:
        cells = []
        for row in found:
            own, dense = row["microseconds"].get(name), row["microseconds"].get(DENSE)
            cells.append("-" if own is None else f"{own:.1f} ({dense / own:.2f})" if dense else "?")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tuning_table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: the fastest three tiles and the chosen ones, for each shape and number of rows."""
    lines = ["| weight | rows | chosen | fastest |", "| --- | ---: | ---: | --- |"]
    for row in found:
        own = dict(row["microseconds"])
        chosen = own.pop("chosen", float("nan"))
        best = sorted(own, key=own.__getitem__)[:3]
        told = ", ".join(f"{name} {own[name]:.1f}" for name in best)
        shape = "x".join(map(str, row["shape"]))
        lines.append(f"| {shape} | {row['rows']} | {chosen:.1f} | {told} |")
    return "\n".join(lines)


def written(folder: Path | None, found: dict[str, Any]) -> str:
    """The report so far, also as `gpu.json` and `gpu.md` in the folder."""
    parts = [f"{found['device']}, torch {torch.__version__}, {found['runs_on']}"]
    parts += [table(tuple(each["shape"]), each["rows"]) for each in found.get("medians", [])]
    parts += [tuning_table(found["tuning"])] if found.get("tuning") else []
    if composes := found.get("composed"):
        told = ", ".join(f"{name}: {value:.1e}" for name, value in composes["differences"].items())
        parts.append(f"composed ({composes['cudagraph_skips']} skipped): {told}")
    parts += [f"FAILED: {line}" for line in found["wrong"]]
    text = "\n\n".join(parts) + "\n"
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(found, indent=2))
        (folder / "gpu.md").write_text(text)
    return text


def measured(
    shape: tuple[int, int], options: argparse.Namespace, zeros: Sequence[float], wrong: list[str]
) -> dict[str, Any]:
    """All contenders at one shape."""
    ways, weights = contenders(shape, zeros)
    rows = []
    for batch in options.rows:
        x = torch.randn(batch, shape[1], device="cuda", dtype=torch.bfloat16)
        medians, failed = turns(ways, x, options.repeats)
        wrong += [f"{name} at {batch} rows: {why}" for name, why in failed.items()]
        for name in medians:
            if not (error := error_of(ways[name][0](x), x, weights[name])) < 2e-2:
                wrong.append(f"{name} at {batch} rows of {shape}: differs by {error:.1e}")
        rows.append({"rows": batch, "microseconds": medians})
    return {"shape": shape, "rows": rows}


def arguments_of(given: list[str] | None) -> argparse.Namespace:
    """What was asked for."""

    def numbers(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="4096x4096,11008x4096", help="of weights: out x in")
    parser.add_argument("--rows", type=numbers, default=[1, 2, 4, 8, 16, 32, 1024], help="of input")
    parser.add_argument("--zeros", type=numbers, default=[50, 70], help="per cent of the weights")
    parser.add_argument("--kernel", choices=("cusparselt", "cutlass"), help="default: torch's")
    parser.add_argument("--no-tuning", action="store_true", help="try no tiles")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--output", type=Path, help="write gpu.json and gpu.md to this folder")
    return parser.parse_args(given)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 without a CUDA device or if a product is wrong."""
    options = arguments_of(arguments)
    if not torch.cuda.is_available():
        print(
            "benchmarks/lowering/gpu.py needs a CUDA device, and torch finds none", file=sys.stderr
        )
        return 1
    if options.kernel:
        SparseSemiStructuredTensor._FORCE_CUTLASS = options.kernel == "cutlass"
    shapes = [tuple(int(n) for n in shape.split("x")) for shape in options.shapes.split(",")]
    zeros, began = [share / 100 for share in options.zeros], time.monotonic()
    native = torchprune.kernels.native("cuda")
    wrong: list[str] = [] if native.form else [str(native)]
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "runs_on": str(native)}
    found |= {"wrong": wrong, "medians": [], "tuning": []}

    def done(part: str) -> None:
        written(options.output, found)
        print(f"{part}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    with torch.no_grad():
        found["checks"] = checks()
        wrong += [f"{name}: {e:.1f} eps" for name, e in found["checks"].items() if not e < 8]
        done("checks")
        for shape in shapes:
            found["medians"].append(measured(shape, options, zeros, wrong))
            torch.cuda.empty_cache()
            done(f"medians of {shape}")
        for shape in shapes if native.form and not options.no_tuning else []:
            for batch in (n for n in options.rows if n <= 64):
                found["tuning"].append(tuned(shape, batch, options.repeats))
                done(f"tiles of {shape}, {batch} rows")
    try:
        found["composed"] = composed()
        apart = found["composed"]["differences"].items()
        wrong += [f"composed, {name}: {value:.1e}" for name, value in apart if not value < 2e-2]
    except Exception as error:
        wrong.append(f"composed: {type(error).__name__}: {error}"[:500])
    done("composed")
    print(written(options.output, found))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
