"""`Pruner`: masks that follow a schedule while a model learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from torchprune.calibration.data import Data
from torchprune.calibration.token_masks import TokenMask
from torchprune.errors import SpecError
from torchprune.specs.options import Swaps
from torchprune.specs.patterns import NM
from torchprune.specs.spec import Spec
from torchprune.training.mask_changes import MaskChanges
from torchprune.training.optimizer_state import Steps, forget
from torchprune.training.regrowth import Regrowth, RigL
from torchprune.training.schedules import Constant, OneShot, Schedule
from torchprune.training.straight_through import StraightThrough


class Pruner:
    """Prunes a model step by step while it learns: one line in a plain loop.

    >>> import torch, torchprune
    >>> from torchprune.training import Cubic
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> spec = torchprune.MagnitudeSpec(0.75)
    >>> pruner = torchprune.Pruner(model, spec, Cubic(0.0, 0.75, start=2, end=10, every=4))
    >>> for _ in range(10):
    ...     model(torch.randn(3, 8)).square().mean().backward()
    ...     optimizer.step()
    ...     _ = pruner.step(optimizer)
    ...     optimizer.zero_grad()
    >>> torchprune.report(model).sparsity
    0.75

    At once, all weights that the spec picks get masks that keep everything, so nothing that holds
    on to the model's parameters or buffers is upset later: masks change in place. Zeros are exact
    after every step of any `torch.optim` optimizer, whatever it remembers or decays.

    What an optimizer remembers of a weight that goes is zeroed, so what regrows begins afresh.

    Where `torch.distributed` runs, every process must call `step` likewise, and all take what the
    first decides; gradients for RigL are summed over all.

    Args:
        model: any module, before or after an optimizer or `torch.compile` was given it, on any
            device, wrapped or not. Masks that it has already stay.
        spec: which weights, in which pattern, by which score. Its sparsity is the schedule's last;
            layers with `overrides` of their own get there in proportion. Specs that need data
            calibrate anew at each change.
        schedule: optimizer step -> share of zeros, one of `torchprune.training`'s or any callable.
            Default: `OneShot` of the spec's sparsity, at once.
        data: for specs that need it, as `sparsify` takes it; a `DataLoader` is read from its start
            at each change, with random generators as they were before.
        regrow: `RigL(...)`, `SET(...)`, `MagnitudeRegrowth()` or `StraightThrough(...)` let pruned
            weights come back, for specs without data. By default they never do.
        tokenizer, max_batches, token_mask: as `sparsify`'s, for data.
        reversible: keep the values under zeros, as they were when they went, for `densify`.
        together: with `torch.distributed` running, whether all processes train one model. False
            where each has its own.
        seed: of SET's choices and of texts.
        state: what `state_dict` gave, to go on from there. The model has that step's masks then, or
            gets them after this; without, they become what the schedule asks for at step 0.

    Raises:
        SpecError, TargetError: the spec does not fit the model or the schedule. The model is as it
            was.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: Spec,
        schedule: Callable[[int], float] | None = None,
        *,
        data: Iterable[Any] | None = None,
        regrow: Regrowth | None = None,
        tokenizer: Any = None,
        max_batches: int = 128,
        token_mask: TokenMask = None,
        reversible: bool = False,
        together: bool = True,
        progress: bool = False,
        seed: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        _check_spec(spec)
        final = float(spec.goal.sparsity)
        schedule = OneShot(final) if schedule is None else schedule
        _check_schedule(spec, schedule, regrow)
        self.model, self.spec, self.schedule, self.regrow = plain_of(model), spec, schedule, regrow
        self._step, self._asked, self._shown = 0, 0.0, False
        given = Data(data, tokenizer, max_batches, seed, progress, token_mask)
        self._masks = MaskChanges(
            self.model, spec, given, regrow, reversible=reversible, together=together, seed=seed
        )
        decays = isinstance(regrow, StraightThrough) and regrow.decay > 0
        self._steps = Steps(self._masks.weights, self._masks.decay if decays else None)
        try:
            if state is None:
                self._go_to(0)
            else:
                self.load_state_dict(state)
        except BaseException:
            self._masks.take_off()
            raise

    # -- what users see ----------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """The optimizer steps that were counted, or the last one that was named."""
        return self._step

    @property
    def sparsity(self) -> float:
        """The share of zeros that the schedule asks for now."""
        return self._asked

    def step(self, *optimizers: Any, at: int | None = None) -> bool:
        """Tell of an optimizer's step, right after it; change masks if they are due.

        Without a new step since the last call nothing happens, so calls between the steps of
        accumulated gradients do no harm.

        Args:
            optimizers: those that train the model; what they remember of weights that go is
                zeroed. Not needed where they are `torch.optim`'s, which are seen at work.
            at: the number of the step, if it is not one more than the last one's.

        Returns:
            whether masks changed.

        Raises:
            SpecError: `at` lies before the last step.
            CalibrationError: as of `sparsify`. The model and this pruner are as before then.
        """
        known = [o for o in map(_unwrapped, optimizers) if isinstance(o, torch.optim.Optimizer)]
        for optimizer in known:
            self._steps.know(optimizer)
        step = self._next(bool(known)) if at is None else self._named(at)
        if step is None:
            return False
        return self._go_to(step)

    def state_dict(self) -> dict[str, Any]:
        """What to save beside the model's and the optimizer's state: numbers and strings."""
        return {"step": self._step, "sparsity": self._asked, "levels": self._masks.levels()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. The masks themselves are part of the model's state.

        Raises:
            SpecError: it is not what `state_dict` gives.
        """
        step, asked, levels = (state.get(key) for key in ("step", "sparsity", "levels"))
        if not (
            isinstance(step, int) and isinstance(asked, int | float) and isinstance(levels, Mapping)
        ):
            raise SpecError(
                "Pruner.load_state_dict: expected what Pruner.state_dict() gave, got "
                f"{dict(state)!r:.200}"
            )
        self._masks.take_levels(levels)
        self._step, self._asked = step, float(asked)
        self._look()

    def __repr__(self) -> str:
        return (
            f"Pruner({self.spec.label}, {self.schedule!r}, step {self._step}, "
            f"sparsity {self._asked:.4g})"
        )

    # -- when --------------------------------------------------------------------------------------

    def _next(self, seen_to: bool) -> int | None:
        """The number of the step that was just made, or None if none was.

        What shows one: that an optimizer says so, or that weights were written (compiled optimizers
        say nothing). A loop in which neither was ever seen is believed.
        """
        marks = self._marks()
        made = marks != self._versions
        self._shown = self._shown or made
        return self._step + 1 if made or not (seen_to or self._shown) else None

    def _named(self, at: int) -> int | None:
        if isinstance(at, bool) or not isinstance(at, int) or at < self._step:
            raise SpecError(
                f"Pruner.step: at is the number of an optimizer step, not before the last one, "
                f"{self._step}; got {at!r}"
            )
        return at if at > self._step else None

    def _marks(self) -> tuple[int, int]:
        """Differs after an optimizer's step from what it was before."""
        return self._steps.count, self._masks.versions()

    def _due(self, last: int, step: int) -> bool:
        """Whether masks are to change on the way from one step to a later one."""
        if isinstance(self.schedule, Schedule):
            latest = self.schedule.last_change(step)
            return latest is not None and (latest > last or last == step == latest)
        return _level(self.schedule, step, self._masks.final) != self._asked

    def _go_to(self, step: int) -> bool:
        """Be at a step, with the masks that it asks for; whether they changed."""
        level = _level(self.schedule, step, self._masks.final)
        changed = False
        if self._due(self._step, step) and (level != self._asked or (self.regrow and level > 0)):
            with torch.no_grad():
                changes = self._masks.become(level, self._progress(step), step)
            self._asked, changed = level, bool(changes)
            if not isinstance(self.regrow, StraightThrough):  # whose weights all go on learning
                for optimizer in self._steps.optimizers:
                    for weight, stays in changes:
                        forget(optimizer, weight, stays)
        self._step = step
        self._look()
        return changed

    def _progress(self, step: int) -> float:
        end = getattr(self.schedule, "end", None)
        return step / end if end else 0.0

    def _look(self) -> None:
        """Remember what the weights look like, and hear gradients in the step before a change."""
        self._versions = self._marks()
        if self.regrow is not None:
            self._masks.listen(self._due(self._step, self._step + 1))


def plain_of(model: nn.Module) -> nn.Module:
    """The user's own module, without what DistributedDataParallel and torch.compile put around."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer inside those that only pass its steps on, as accelerate's do."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def _level(schedule: Callable[[int], float], step: int, final: float) -> float:
    """What a schedule asks for.

    Raises:
        SpecError: no share of zeros, or more than the spec's.
    """
    level = schedule(step)
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0 <= level < 1:
        raise SpecError(f"schedule({step}) must be a share of zeros in [0, 1), got {level!r}")
    if math.isclose(level, final):
        return final
    if level > final:
        raise SpecError(
            f"schedule({step}) is {level:.4g} and the spec's sparsity {final:.4g}: write the "
            "schedule's last sparsity into the spec"
        )
    return float(level)


def _check_spec(spec: object) -> None:
    if not isinstance(spec, Spec):
        got = f"the class {spec.__name__}" if isinstance(spec, type) else type(spec).__name__
        raise SpecError(
            "Pruner takes a spec of single weights, such as MagnitudeSpec or WandaSpec, got "
            f"{got}; to prune whole units while training use torchprune.prune_iteratively, then "
            "torchprune.shrink"
        )


def _check_schedule(spec: Spec, schedule: Callable[[int], float], regrow: Regrowth | None) -> None:
    final, own = float(spec.goal.sparsity), isinstance(schedule, Schedule)
    if not callable(schedule):
        raise SpecError(f"schedule must be a callable step -> sparsity, got {schedule!r}")
    if isinstance(schedule, Schedule) and not math.isclose(schedule.final, final):
        raise SpecError(
            f"the schedule ends at {schedule.final:.4g} and the spec's sparsity is {final:.4g}: "
            "say the same in both"
        )
    _check_groups(spec, schedule)
    if regrow is None:
        return
    if not isinstance(regrow, Regrowth):
        raise SpecError(
            "regrow must be RigL(...), SET(...), MagnitudeRegrowth(), StraightThrough(...) or "
            f"None, got {regrow!r}"
        )
    name = type(regrow).__name__
    if spec.needs_data:
        raise SpecError(
            f"{name} chooses by scores that weights alone give, and {spec.label} needs data here; "
            "use MagnitudeSpec"
        )
    if not own:
        raise SpecError(
            f"{name} changes masks when the schedule says so: give it one of torchprune.training's "
            f"schedules, such as Constant({final:.4g}, end=1000, every=100), got {schedule!r}"
        )
    if isinstance(regrow, RigL) and getattr(schedule, "end", None) is None:
        raise SpecError(
            "RigL exchanges fewer weights the nearer the schedule's end is: give it one, such as "
            f"Constant({final:.4g}, end=1000, every=100)"
        )


def _check_groups(spec: Spec, schedule: Callable[[int], float]) -> None:
    """Refuse n:m patterns bit by bit with a method that decides on whole groups."""
    if isinstance(schedule, OneShot | Constant):
        return
    if not (spec.chooses_weights or isinstance(spec.refine, Swaps)):
        return
    goals = [spec.goal, *map(spec.override_goal, spec.overrides)]
    pattern = next((g.pattern for g in goals if g and isinstance(g.pattern, NM)), None)
    if pattern is not None:
        raise SpecError(
            f"{spec.label} decides on whole groups of {pattern}, so its zeros cannot come bit by "
            "bit; use OneShot, or MagnitudeSpec or WandaSpec"
        )
