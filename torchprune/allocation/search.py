"""Evolutionary search for the sparsities of layers, by the model's loss on a few batches.

As in EvoPress (Sieberling et al., arXiv 2410.14649) every layer has a ladder of masks, and a move
takes one layer up and another down by rungs of the same weight, so that every allocation tried
meets the budget to the weight. A layer's masks are nested, so that all of them are one uint8
tensor: the number of rungs on which a weight is kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchprune import modes
from torchprune.allocation.budget import Share
from torchprune.calibration.batches import Batch
from torchprune.checkpoint.checked_files import read_json
from torchprune.errors import CalibrationError, CheckpointError
from torchprune.masking.packing import masked
from torchprune.masking.targets import Target
from torchprune.specs.allocation import Search

Offsets = tuple[int, ...]
"""For each layer the rungs above (more zeros) or below its uniform count."""

FORMAT, VERSION = "torchprune search", 1

_TRIES = 100
"""Random pairs of layers tried before a move is given up."""


@dataclass(frozen=True, eq=False)
class Place:
    """A layer to be searched, its share of the budget, and its masks: count -> True = kept, in the
    weight's own shape."""

    target: Target
    share: Share
    keep: Callable[[int], Tensor]


@dataclass(frozen=True)
class Ladder:
    """One layer's allowed counts: `uniform` + rung * `spacing`, for rungs from -down to up.

    Attributes:
        weight: weights that a rung prunes.
    """

    uniform: int
    spacing: int
    weight: int
    down: int
    up: int

    def count(self, rung: int) -> int:
        return self.uniform + rung * self.spacing


@dataclass(frozen=True)
class State:
    """The best allocation so far. `uniform` is the loss of the uniform one."""

    generation: int
    offsets: Offsets
    loss: float
    uniform: float


def ladders(shares: Sequence[Share], levels: int) -> list[Ladder]:
    """A ladder a layer, of about `levels` rungs on either side of the uniform count.

    Rungs weigh powers of two times what all layers' steps divide, so that a few rungs of one layer
    weigh as much as a few of another; where that would be too coarse, whatever comes nearest.
    """
    quantum = math.lcm(*(share.step for share in shares))
    made = []
    for share in shares:
        wish = (share.high - share.low) / (2 * levels)
        if wish * share.step >= quantum:
            spacing = quantum * 2 ** int(math.log2(wish * share.step / quantum)) // share.step
        else:
            spacing = max(1, round(wish))
        down = (share.uniform - share.low) // spacing
        up = (share.high - share.uniform) // spacing
        made.append(Ladder(share.uniform, spacing, spacing * share.step, down, up))
    return made


def moved(offsets: Offsets, ladders: Sequence[Ladder], rng: random.Random) -> Offsets:
    """A copy in which one to three times, rarely three, zeros went from one layer to another."""
    rungs = list(offsets)
    for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
        for _ in range(_TRIES):
            i, j = rng.sample(range(len(rungs)), 2)
            common = math.gcd(ladders[i].weight, ladders[j].weight)
            more = rungs[i] + ladders[j].weight // common
            less = rungs[j] - ladders[i].weight // common
            if more <= ladders[i].up and less >= -ladders[j].down:
                rungs[i], rungs[j] = more, less
                break
    return tuple(rungs)


def evolve(
    judge: Callable[[Offsets], float],
    ladders: Sequence[Ladder],
    options: Search,
    problem: str = "",
    *,
    progress: bool = False,
) -> State:
    """The best allocation after all generations; uniform where no move is better.

    Each generation draws from its own random numbers, so a search that goes on from its file ends
    as one that was never interrupted.

    Args:
        judge: what is to be small; not finite is never chosen.
        problem: tells searches apart whose files must not be mixed up.

    Raises:
        CalibrationError: the uniform allocation's loss is not finite.
        CheckpointError: the file at `options.path` is damaged, or of another search.
    """
    start: Offsets = (0,) * len(ladders)
    uniform = judge(start)
    if not math.isfinite(uniform):
        raise CalibrationError(f"the loss of the uniformly pruned model is {uniform}")
    state = State(0, start, uniform, uniform)
    path = None if options.path is None else Path(options.path)
    if path is not None:
        if os.path.lexists(path):
            state = _read(path, problem, ladders, uniform)
        else:
            _write(path, problem, state)
    generations = range(state.generation, options.generations)
    if len(ladders) < 2:
        return state
    for generation in tqdm(generations, desc="search", unit="generation", disable=not progress):
        rng = random.Random(f"{options.seed}:{generation}")
        children = {moved(state.offsets, ladders, rng): 0 for _ in range(options.offspring)}
        children.pop(state.offsets, None)
        losses = [(judge(child), at, child) for at, child in enumerate(children)]
        loss, _, child = min(
            ((x, at, child) for x, at, child in losses if math.isfinite(x)),
            default=(math.inf, 0, start),
        )
        better = loss < state.loss
        offsets, least = (child, loss) if better else (state.offsets, state.loss)
        state = State(generation + 1, offsets, least, state.uniform)
        if path is not None:
            _write(path, problem, state)
    return state


def search(
    model: nn.Module,
    places: Sequence[Place],
    batches: Sequence[Batch],
    options: Search,
    *,
    progress: bool,
) -> tuple[list[int], list[str]]:
    """Counts for the layers, and a note on what was gained. The model is as it was afterwards.

    Raises:
        CalibrationError: a loss is missing, no scalar, or not finite for the uniform allocation.
        CheckpointError: the file at `options.path` is damaged, or of another search.
    """
    rungs = ladders([place.share for place in places], options.levels)
    some = batches[: options.batches]
    problem = _digest(places, rungs, some, options)
    with _masked_by(model, places, rungs, some, options) as judge:
        state = evolve(judge, rungs, options, problem, progress=progress)
    counts = [ladder.count(rung) for ladder, rung in zip(rungs, state.offsets, strict=True)]
    return counts, [
        f"searched for {state.generation} generations: loss {state.uniform:.6g} of the uniformly "
        f"pruned model -> {state.loss:.6g} on {len(some)} batches"
    ]


@contextmanager
def _masked_by(
    model: nn.Module,
    places: Sequence[Place],
    ladders: Sequence[Ladder],
    batches: Sequence[Batch],
    options: Search,
) -> Iterator[Callable[[Offsets], float]]:
    """The model's mean loss as a function of offsets, while the weights are exchanged for it."""
    from torchprune.structure.scores import default_loss, loss_on  # torch.export takes a while

    loss = options.loss or default_loss
    with modes.exact():
        kept = [_kept_rungs(p, ladder) for p, ladder in zip(places, ladders, strict=True)]
    dense = [place.target.weight.data for place in places]
    now: list[int | None] = [None] * len(places)

    def judge(offsets: Offsets) -> float:
        with modes.exact():
            for i, rung in enumerate(offsets):
                if rung != now[i]:
                    mask = kept[i] > ladders[i].down + rung
                    places[i].target.weight.data = masked(dense[i], mask)
                    now[i] = rung
        torch.clear_autocast_cache()  # it may remember other masks
        with modes.calibration_mode(model), torch.no_grad():
            return sum(float(loss_on(model, batch, loss)) for batch in batches) / len(batches)

    try:
        yield judge
    finally:
        with modes.exact():
            for place, weight in zip(places, dense, strict=True):
                place.target.weight.data = weight


def _kept_rungs(place: Place, ladder: Ladder) -> Tensor:
    """uint8, the weight's shape: on how many rungs, from the lowest, each weight is kept."""
    kept = torch.zeros_like(place.target.weight, dtype=torch.uint8)
    for rung in range(-ladder.down, ladder.up + 1):
        kept += place.keep(ladder.count(rung))
    return kept


# -- the file --------------------------------------------------------------------------------------


def _digest(
    places: Sequence[Place],
    ladders: Sequence[Ladder],
    batches: Sequence[Batch],
    options: Search,
) -> str:
    """What tells this search from others: its layers, their ladders, the data, the options."""
    layers = [[p.target.layer.key, asdict(y)] for p, y in zip(places, ladders, strict=True)]
    found = hashlib.sha256(json.dumps([layers, options.seed, options.offspring]).encode())
    for batch in batches:
        for tensor in batch.tensors():
            whole = tensor.detach().cpu().contiguous().reshape(-1)
            found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            found.update(whole.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _write(path: Path, problem: str, state: State) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"format": FORMAT, "version": VERSION, "problem": problem, **asdict(state)}
    partial = path.with_name(f".{path.name[:80]}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(data, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path, problem: str, ladders: Sequence[Ladder], uniform: float) -> State:
    """The state in a file, checked against this search.

    Raises:
        CheckpointError: it is no regular file, damaged, of another version or another search.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is no regular file; Search(path=) needs a file's path")
    data = read_json(path)
    if data.get("format") != FORMAT or data.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: no search of this torchprune wrote it (format "
            f"{data.get('format')!r:.40}, version {data.get('version')!r:.40}); use another path"
        )
    generation, offsets = data.get("generation"), data.get("offsets")
    least, at_start = data.get("loss"), data.get("uniform")
    if not (
        type(generation) is int
        and generation >= 0
        and isinstance(offsets, list)
        and all(type(rung) is int for rung in offsets)
        and isinstance(least, float)
        and isinstance(at_start, float)
        and -math.inf < least <= at_start < math.inf
    ):
        raise CheckpointError(f"{path}: damaged; remove it to begin the search anew")
    fits = len(offsets) == len(ladders) and all(
        -ladder.down <= rung <= ladder.up for rung, ladder in zip(offsets, ladders, strict=True)
    )
    if data.get("problem") != problem or not math.isclose(at_start, uniform, rel_tol=1e-4):
        raise CheckpointError(
            f"{path}: written by a search of another model, spec or data, or with another seed "
            f"(loss of the uniformly pruned model {at_start:.6g}, here {uniform:.6g}); "
            "use another path"
        )
    if not fits or sum(y.weight * rung for y, rung in zip(ladders, offsets, strict=True)):
        raise CheckpointError(f"{path}: damaged (its allocation does not meet the budget)")
    return State(generation, tuple(offsets), least, at_start)
