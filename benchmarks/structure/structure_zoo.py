"""How much of many nets goes, by us and by Torch-Pruning 1.6: half the channels, or the neurons.

    pip install --no-deps --target .cache/zoo torch-pruning==1.6.0 timm==1.0.31 torchvision==0.28.0
    python benchmarks/structure/structure_zoo.py --output zoo.json [--only "UNet,timm resnet10t"]

Random weights; what goes is what has the least weights. Ours: `sparsify`, `plan_shrink`, `shrink`,
and the largest difference of the outputs from the masked model's. Of the peer, which has no masks
to compare with, whether the smaller net runs and gives outputs of the right shape. Each in a
process of its own that may take so many seconds. What is in the output is not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchprune
from torchprune import ChannelSpec, NeuronSpec
from torchprune.checkpoint.whole_files import write_whole
from torchprune.errors import TargetError

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / ".cache" / "zoo"))

from zoo_nets import CHANNELS, NEURONS, Net

EXACT = 1e-4
"""Of the largest output; float32 sums of other lengths differ by so much at most."""


def outputs(model: nn.Module, given: tuple[Any, ...]) -> Tensor:
    """The first tensor that it gives."""
    with torch.no_grad():
        found = model(*given)
    while not isinstance(found, Tensor):
        found = found[0] if isinstance(found, list | tuple) else next(iter(found.values()))
    return found


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def ours(make: Callable[[], Net], neurons: bool) -> dict[str, Any]:
    """Ours: parameters that stay, and how far the outputs are from the masked model's."""
    model, given = make()
    for spec in (NeuronSpec,) if neurons else (ChannelSpec, NeuronSpec):
        with nullcontext() if neurons else suppress(TargetError):  # a net may have one kind alone
            half = spec(0.5, score="l2", refit=False, round_to=1)
            torchprune.sparsify(model, half, [given], progress=False)
    masked = outputs(model, given)
    torchprune.shrink(model, torchprune.plan_shrink(model, given))
    off = (outputs(model, given) - masked).abs().max() / masked.abs().max()
    return {"left": size(model), "off": float(off)}


def peers(make: Callable[[], Net], neurons: bool) -> dict[str, Any]:
    """Torch-Pruning's: parameters that stay. Of neurons, only what widens within an MLP is cut."""
    import torch_pruning as tp

    model, given = make()
    before = outputs(model, given).shape
    last = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv1d)][-1:]
    ignored = [m for m in model.modules() if getattr(m, "out_features", None) == 1000] or last
    if neurons:
        widened = [m for m in model.modules() if isinstance(m, nn.Linear) and wide(m, model)]
        ignored = [m for m in model.modules() if not list(m.children()) and m not in widened]
    pruner = tp.pruner.BasePruner(
        model,
        given if len(given) > 1 else given[0],
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=ignored,
    )
    pruner.step()
    after = outputs(model, given).shape
    assert after == before, f"its outputs are {tuple(after)} now"
    return {"left": size(model)}


def wide(layer: nn.Linear, model: nn.Module) -> bool:
    """Whether it widens, and is no head."""
    inside = getattr(getattr(model, "config", None), "intermediate_size", None)
    width = inside or 2 * layer.in_features
    return layer.out_features in (width, 2 * width) and layer.out_features != 1000


def guarded(what: Callable[..., dict[str, Any]], *given: Any, send: Any) -> None:
    """Its result, or the error in a line, with the seconds."""
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    start = time.process_time()
    try:
        found = what(*given)
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        found = {"error": f"{type(error).__name__}: {error} ({Path(at.filename).name})"[:300]}
    send.send(found | {"seconds": round(time.process_time() - start, 2)})


def apart(what: Callable[..., dict[str, Any]], *given: Any, limit: float) -> dict[str, Any]:
    """In a process of its own."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(False)
    child = context.Process(target=guarded, args=(what, *given), kwargs={"send": send})
    child.start()
    found = receive.recv() if receive.poll(limit) else {"error": f"not within {limit:.0f} s"}
    child.kill()
    child.join()
    return found


def torchvision_without_kernels() -> None:
    """Let torchvision be imported where its compiled operators do not load: nets need none."""
    global _DECLARED
    _DECLARED = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        _DECLARED.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: parameters left as shares of the dense model's."""
    lines = [
        "| net | what goes | parameters | ours | Torch-Pruning | off by | seconds, ours and its |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        cells = [share(row, side) for side in ("ours", "peer")]
        off = row["ours"].get("off")
        lines.append(
            f"| {name} | {row['what']} | {row['parameters'] / 1e6:.2f} M | {cells[0]} | {cells[1]} "
            f"| {'' if off is None else f'{off:.0e}'} | "
            f"{row['ours']['seconds']:.1f}, {row['peer'].get('seconds', float('nan')):.1f} |"
        )
    return "\n".join(lines)


def share(row: dict[str, Any], side: str) -> str:
    left = row[side].get("left")
    return f"{left / row['parameters']:.1%}" if left else "fails"


def main() -> None:
    """Run what the output does not hold yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names, by commas")
    parser.add_argument("--limit", type=float, default=120, help="seconds for each")
    parser.add_argument("--output", type=Path, help="JSON of all rows so far")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torchvision_without_kernels()
    import timm  # noqa: F401  (once, before processes fork)
    import torch_pruning  # noqa: F401
    import torchvision  # noqa: F401
    import transformers

    transformers.logging.set_verbosity_error()
    rows: dict[str, dict[str, Any]] = {}
    if options.output and options.output.is_file():
        rows = json.loads(options.output.read_text("utf-8"))
    nets = {**dict.fromkeys(CHANNELS, "channels"), **dict.fromkeys(NEURONS, "neurons")}
    for name, what in nets.items():
        if name in rows or (options.only and name not in options.only.split(",")):
            continue
        make, neurons = {**CHANNELS, **NEURONS}[name], what == "neurons"
        row: dict[str, Any] = {"what": what, "parameters": size(make()[0])}
        row["ours"] = apart(ours, make, neurons, limit=options.limit)
        row["peer"] = apart(peers, make, neurons, limit=options.limit)
        rows[name] = row
        print(name, row, flush=True)
        if options.output:
            write_whole(options.output, json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    for name, row in rows.items():
        for side in ("ours", "peer"):
            if "error" in row[side]:
                print(f"- {name}, {side}: {row[side]['error']}")
        if row["ours"].get("off", 0) > EXACT:
            print(f"- {name}: NOT EXACT, {row['ours']['off']:.1e}")


if __name__ == "__main__":
    main()
