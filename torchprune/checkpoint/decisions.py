"""What a call of `sparsify` has decided so far, in a directory: a run that was killed goes on.

Waiting batches live in the model's own code, which no file can hold. But what they compute follows
from the weights: so a run that goes on has them walk through the model again, and wherever it
decided something before, what was kept stands in for deciding. The law: it ends with the same bits
as a run that was never interrupted.

Every decision is a directory of its own, numbered and written whole: the goals of an uneven
allocation, the masks and values of layers that were solved together, the weights of a block that
was trained. Each also holds torch's random numbers as they were after it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchprune.checkpoint.progress import Facts, Progress
from torchprune.errors import CheckpointError
from torchprune.masking.packing import (
    pack_bits,
    pack_values,
    put_values,
    unpack_bits,
    unpack_values,
)
from torchprune.masking.parametrization import Record
from torchprune.masking.targets import Plan, Target
from torchprune.masking.transaction import Change
from torchprune.methods.reconstruct import Gain

PRUNING = Progress("torchprune.pruning", "progress of a pruning run")
DECISION = Progress("torchprune.pruning.decision", "decision of a pruning run")

_RUN, _RANDOM = "run", "random"

Found = TypeVar("Found")
Trained = Sequence[tuple[Tensor, Tensor]]
"""Parameters, each with a bool mask of its shape."""


class Decisions:
    """The decisions of one call, in their order. Without a path they are only made.

    Args:
        path: a directory, or None.
        problem: what tells this call from others: the model, the data, the options.

    Raises:
        CheckpointError: the directory holds something else, another call's, or is damaged.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, problem: str = "") -> None:
        self._path = None if path is None else Path(path)
        self._known = self._next = self._attempt = 0
        self._problem, self._begun_with = problem, torch.get_rng_state()
        earlier = None if self._path is None else _run_in(self._path)
        if self._path is None or earlier is None:
            return
        tensors, facts = earlier
        if facts.get("problem") != problem:
            raise CheckpointError(
                f"{self._path} holds the progress of another run: of another model, spec, data or "
                "other options; choose another directory, or delete it"
            )
        self._known = self._count()
        torch.set_rng_state(tensors[_RANDOM])

    def begin(self) -> None:
        """All batches begin anew: what comes now is decided by itself, and not what came before."""
        self._attempt += 1

    def allocation(
        self, plan: Plan, make: Callable[[], tuple[Plan, list[str]]]
    ) -> tuple[Plan, list[str]]:
        """The plan in which layers share their zeros unevenly, and notes on it."""
        earlier = self._earlier("allocation", [t.layer.key for t in plan.targets])
        if earlier is None:
            made, notes = make()
            uneven = {
                t.layer.key: str(t.goal.sparsity)
                for t in made.targets
                if isinstance(t.goal.sparsity, Fraction)
            }
            self._keep({}, {"sparsities": uneven, "notes": notes})
            return made, notes
        with self._trusted():
            shares = {key: Fraction(share) for key, share in earlier[1]["sparsities"].items()}
            targets = [
                replace(t, goal=replace(t.goal, sparsity=shares.get(t.layer.key, t.goal.sparsity)))
                for t in plan.targets
            ]
            return replace(plan, targets=targets), list(earlier[1]["notes"])

    def changes(
        self, targets: Sequence[Target], make: Callable[[], list[Change]], warnings: list[str]
    ) -> list[Change]:
        """The changes of layers that are solved together.

        Args:
            warnings: to which `make` adds what the user must know.
        """
        earlier = self._earlier("changes", [t.layer.key for t in targets])
        if earlier is not None:
            tensors, facts = earlier
            with self._trusted():
                told = enumerate(zip(targets, facts["records"], strict=True))
                found = [_change(target, tensors, f"{i}.", record) for i, (target, record) in told]
                warnings += facts["warnings"]
                return found
        before = len(warnings)
        made = make()
        tensors = {}
        for i, change in enumerate(made):
            tensors[f"{i}.bits"] = pack_bits(change.mask)
            if change.values is not None:
                tensors[f"{i}.values"] = pack_values(change.values, change.mask)
        records = [asdict(change.record) for change in made]
        self._keep(tensors, {"records": records, "warnings": warnings[before:]})
        return made

    def training(self, unit: str, weights: Trained, train: Callable[[], Gain]) -> Gain:
        """What training a block gained; its weights are then the trained ones."""
        earlier = self._earlier("training", [unit])
        if earlier is not None:
            tensors, facts = earlier
            with self._trusted(), torch.no_grad():
                for i, (weight, mask) in enumerate(weights):
                    put_values(weight.data, mask, tensors[f"{i}.values"].to(weight.device))
                return Gain(**facts["gain"])
        gain = train()
        values = {f"{i}.values": pack_values(w, mask) for i, (w, mask) in enumerate(weights)}
        self._keep(values, {"gain": asdict(gain)})
        return gain

    # -- the directory -----------------------------------------------------------------------------

    def _earlier(self, kind: str, of: Sequence[str]) -> tuple[dict[str, Tensor], Facts] | None:
        """What was decided the last time; None where it is to be decided now."""
        self._next += 1
        self._asked: Facts = {"kind": kind, "attempt": self._attempt, "of": list(of)}
        if self._path is None or self._next > self._known:
            return None
        found = _decision(self._path, self._next)
        said = {name: found[1].get(name) for name in self._asked}
        if said != self._asked:
            raise CheckpointError(
                f"{_place(self._path, self._next)}: expected {_told(self._asked)}, got "
                f"{_told(said)}: the model does not run as it did when that was kept; delete "
                f"{self._path} to begin anew"
            )
        torch.set_rng_state(found[0][_RANDOM])
        return found

    @contextmanager
    def _trusted(self) -> Iterator[None]:
        """What was read, its checksums right, is taken for what it should be."""
        assert self._path is not None
        try:
            yield
        except (KeyError, TypeError, ValueError) as error:
            place = _place(self._path, self._next)
            raise CheckpointError(
                f"{place}: damaged ({type(error).__name__}: {error!s:.200}); delete {self._path} "
                "to begin anew"
            ) from None

    def _keep(self, tensors: dict[str, Tensor], facts: Facts) -> None:
        if self._path is not None:
            if self._next == 1:  # not before: a call that is refused leaves nothing
                begun = {_RANDOM: self._begun_with}
                PRUNING.write(self._path / _RUN, begun, {"problem": self._problem})
            whole = {**tensors, _RANDOM: torch.get_rng_state()}
            DECISION.write(_place(self._path, self._next), whole, {**self._asked, **facts})

    def _count(self) -> int:
        """How many decisions there are, each of them whole.

        Raises:
            CheckpointError: one is damaged or missing.
        """
        assert self._path is not None
        numbers = {int(p.name) for p in self._path.iterdir() if p.name.isdigit()}
        for number in range(1, max(numbers, default=0) + 1):
            _decision(self._path, number)
        return len(numbers)


def forget_decisions(directory: str | os.PathLike[str]) -> None:
    """Delete what a run has kept, once it is not needed."""
    place = Path(directory)
    if place.is_dir() and PRUNING.holds(place / _RUN):
        for one in place.iterdir():
            if one.name == _RUN or one.name.isdigit() or one.name.startswith("."):
                shutil.rmtree(one)
        if not any(place.iterdir()):
            place.rmdir()


def _run_in(path: Path) -> tuple[dict[str, Tensor], Facts] | None:
    """What tells the run in a directory; None where there is no such directory, or an empty one."""
    if not os.path.lexists(path):
        return None
    if path.is_dir() and (earlier := PRUNING.read(path / _RUN)) is not None:
        return earlier
    if not path.is_dir() or any(not one.name.startswith(".") for one in path.iterdir()):
        raise CheckpointError(f"{path} holds no {PRUNING.what}; choose a new directory")
    return None


def _place(path: Path, number: int) -> Path:
    return path / f"{number:06d}"


def _decision(path: Path, number: int) -> tuple[dict[str, Tensor], Facts]:
    place = _place(path, number)
    found = DECISION.read(place)
    if found is None:
        raise CheckpointError(f"{place} is missing; delete {path} to begin anew")
    return found


def _told(asked: Facts) -> str:
    return f"{asked['kind']} of {', '.join(asked['of'])}"


def _change(target: Target, tensors: dict[str, Tensor], prefix: str, record: Any) -> Change:
    shape, device = target.weight.shape, target.weight.device
    mask = unpack_bits(tensors[f"{prefix}bits"], shape)
    kept = tensors.get(f"{prefix}values")
    values = None if kept is None else unpack_values(kept, mask).to(device)
    return Change(target, mask.to(device), Record(**record), values)
