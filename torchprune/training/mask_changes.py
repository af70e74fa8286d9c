"""The masks that a spec gives a model that learns, and how they change: less, or other weights."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from torchprune.calibration.data import Data
from torchprune.errors import MaskError, SpecError
from torchprune.masking.keeper import values_of
from torchprune.masking.mask import Mask, Record, attach, detach, put_on
from torchprune.masking.packing import unpack_bits
from torchprune.masking.parametrization import Listener
from torchprune.masking.shards import is_managed, local_of, part_of
from torchprune.masking.targets import Target
from torchprune.methods.decide import scope_of
from torchprune.modes import exact
from torchprune.reports.report import RunRecord, keep_runs, runs_of
from torchprune.sparsify import Way, plan_of, prune_on_the_way
from torchprune.specs.goals import Goal
from torchprune.specs.method import GroupMoments
from torchprune.specs.spec import Spec
from torchprune.training.processes import first_decides, summed
from torchprune.training.regrowth import SET, Exchange, MagnitudeRegrowth, Regrowth, RigL, exchanged
from torchprune.training.straight_through import LearningMask, StraightThrough

Changed = list[tuple[Tensor, Tensor]]
"""Parameters whose masks changed, each with a bool of its shape: kept before and after."""


class MaskChanges:
    """The masks of one `Pruner`. They are attached when this is made, and keep everything then.

    Args:
        model: the user's own module.
        spec: what becomes of it in the end.
        data: for specs that need it.
        regrow: what lets pruned weights come back.
        reversible: whether masks keep the values under zeros.
        together: whether all processes train one model.
        seed: of random choices.

    Attributes:
        targets: the layers.
        final: the share of zeros in the end.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: Spec,
        data: Data,
        regrow: Regrowth | None,
        *,
        reversible: bool,
        together: bool,
        seed: int,
    ) -> None:
        self._model, self._spec, self._data, self._regrow = model, spec, data, regrow
        self._together, self._seed = together, seed
        self._reversible = reversible or isinstance(regrow, MagnitudeRegrowth)
        self.final = float(spec.goal.sparsity)
        self._way = Way(0.0, self.final)
        self._run: RunRecord | None = None
        self._warned: set[str] = set()
        plan, run = plan_of(model, spec, data)
        self.targets = plan.targets
        _check_masks(self.targets, regrow)
        self._fresh = [t for t in self.targets if t.mask is None]
        try:
            with exact():
                for target in self._fresh:
                    self._attach(target)
            self._remember(run)
        except BaseException:
            self.take_off()
            raise
        if isinstance(regrow, RigL):
            for target in self.targets:
                mask_on(target).listener = Listener()

    def take_off(self) -> None:
        """Undo what was attached: the model is as before."""
        for target in self._fresh:
            if target.mask is not None:
                detach(target.layer.module, target.layer.tensor)
        keep_runs(self._model, [one for one in runs_of(self._model) if one is not self._run])

    def weights(self) -> list[Tensor]:
        """The parameters behind the masks, as they are now."""
        return [target.weight for target in self.targets]

    def versions(self) -> int:
        """Another number after each write to one of them: but for those that `fully_shard` gathers
        and frees, of which others stand there from time to time."""
        return sum(t.weight._version for t in self.targets if not is_managed(t.layer.module))

    # -- changes -----------------------------------------------------------------------------------

    def become(self, level: float, progress: float, step: int) -> Changed:
        """Have so many zeros.

        Args:
            level: share of zeros, at most `final`.
            progress: how much of the schedule is gone, for what regrows.
            step: the optimizer step, for what is random.

        Raises:
            CalibrationError and others of `sparsify`: nothing is changed then.
        """
        before = [mask_on(target).mask for target in self.targets]
        if self._regrow is None:
            self._prune(level)
        else:
            self._exchange(level, progress, step)
        if self._together:
            self._agree()
        changed: Changed = []
        for target, old in zip(self.targets, before, strict=True):
            new = mask_on(target).mask
            if not torch.equal(old, new):
                changed.append((target.weight, old & new))
        return changed

    def _prune(self, level: float) -> None:
        """Fewer weights, by the spec's own method."""
        way = Way(level, self.final, dict(self._way.goals))
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices):  # to read data shuffles them
            run = prune_on_the_way(
                self._model, self._spec, self._data, way, reversible=self._reversible
            )
        if self._spec.uneven is not None:
            self._way = way
        self._remember(run)

    def _exchange(self, level: float, progress: float, step: int) -> None:
        """Other weights, as many as the level leaves, by scores that need no data."""
        goals = [target.goal.on_the_way(level, self.final) for target in self.targets]
        everything = range(len(goals))
        groups = [everything] if self._spec.scope == "global" else [[i] for i in everything]
        with exact():
            chosen: dict[int, Tensor] = {}
            for some in groups:
                masks = self._chosen(
                    [self.targets[i] for i in some], goals[some[0]], progress, step
                )
                chosen |= dict(zip(some, masks, strict=True))
            for i, keep in chosen.items():
                self._put(self.targets[i], keep, goals[i])

    def _chosen(
        self, targets: Sequence[Target], goal: Goal, progress: float, step: int
    ) -> list[Tensor]:
        """New masks, of the weights' shapes, of layers that share a goal."""
        kept: list[Tensor] = []
        worth: list[Tensor] = []
        promise: list[Tensor | None] = []
        for target in targets:
            mask, moments = mask_on(target), GroupMoments(target.name)
            whole = target.view.to_matrix(mask.restored(target.weight))
            worth += [self._spec.scores(matrix, moments) for matrix in whole]
            kept += list(target.view.to_matrix(mask.mask))
            promise += self._promise(target, step)
        scope = scope_of(self._spec, targets[0]) or "layer"
        if isinstance(self._regrow, Exchange):
            share = self._regrow.share(progress)
            found = exchanged(worth, promise, kept, goal, scope, share)
        else:  # all weights, kept or not, are ranked anew
            found = exchanged(worth, worth, [torch.zeros_like(k) for k in kept], goal, scope, 0.0)
        rest = iter(found)
        return [
            target.view.from_matrix(
                torch.stack([next(rest) for _ in range(target.view.groups)]), target.weight.shape
            )
            for target in targets
        ]

    def _promise(self, target: Target, step: int) -> list[Tensor | None]:
        """What pruned weights would be good for, a matrix a group; None where that is not known."""
        view = target.view
        if isinstance(self._regrow, SET):
            # By the layer's name too, lest layers of one shape grow alike.
            seed = _number(f"{self._seed} {step} {target.layer.key}")
            draw = torch.Generator().manual_seed(seed)
            chances = torch.rand((view.groups, view.rows, view.cols), generator=draw)
            return list(chances.to(target.weight.device))
        if isinstance(self._regrow, RigL):
            listener = mask_on(target).listener
            heard = None if listener is None else listener.take()
            if self._together:
                heard = summed(heard, target.weight)
            if heard is not None:
                return list(view.to_matrix(heard))
        return [None] * view.groups

    def _put(self, target: Target, keep: Tensor, goal: Goal) -> None:
        mask, weight = mask_on(target), target.weight
        comes = keep & ~mask.mask
        note = f"regrown by {type(self._regrow).__name__}"
        record = Record(self._spec.label, str(goal), view=target.view_text, note=note)
        mask.change(weight, keep, record, reversible=mask.reversible)
        if isinstance(self._regrow, Exchange):
            local_of(weight).masked_fill_(part_of(comes, weight), 0)

    def _agree(self) -> None:
        """Have what the first process decided in all of them.

        Processes that calibrate on data of their own decide differently, and what one of them
        pruned the first may keep.
        """
        for target in self.targets:
            mask, weight = mask_on(target), target.weight
            bits = mask.bits.clone()
            if first_decides(bits):
                keep = unpack_bits(bits, mask.shape)
                mask.change(weight, keep, mask.record, reversible=mask.reversible)
            if self._spec.needs_data and first_decides(values_of(weight)):
                mask.put_on(weight)

    def decay(self, optimizer: torch.optim.Optimizer) -> None:
        """Draw pruned weights that go on learning to zero, by their gradients."""
        assert isinstance(self._regrow, StraightThrough)
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        with torch.no_grad():
            for target in self.targets:
                mask = target.mask
                if isinstance(mask, LearningMask) and id(target.weight) in trained:
                    mask.decay(target.weight, self._regrow.decay)

    # -- what is heard, said and saved -------------------------------------------------------------

    def listen(self, awake: bool) -> None:
        """Hear gradients from now on, or do not, where growth is by them."""
        if not isinstance(self._regrow, RigL):
            return
        for target in self.targets:
            listener = mask_on(target).listener
            if listener is not None and listener.awake != awake:
                listener.awake, listener.heard = awake, None

    def _attach(self, target: Target) -> None:
        """Give a layer a mask that keeps everything."""
        layer, weight = target.layer, target.weight
        everything = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
        record = Record(self._spec.label, "nothing yet", view=target.view_text)
        if isinstance(self._regrow, StraightThrough):
            learning = LearningMask(everything, record)
            put_on(layer.module, layer.tensor, learning)
        else:
            attach(layer.module, layer.tensor, everything, record, reversible=self._reversible)

    def _remember(self, run: RunRecord) -> None:
        """Keep the last change's record on the model, in the place of the one before."""
        own = [one for one in runs_of(self._model) if one is not self._run]
        keep_runs(self._model, [*own, run])
        self._run = run
        for warning in run.warnings:
            if warning not in self._warned:
                self._warned.add(warning)
                warnings.warn(warning, stacklevel=5)

    def levels(self) -> dict[str, float]:
        """What each layer gets in the end, by key, where a budget was shared unevenly."""
        goals = self._way.goals if self._spec.uneven is not None else {}
        return {key: float(goal.sparsity) for key, goal in goals.items()}

    def take_levels(self, levels: Mapping[str, float]) -> None:
        """Go on with levels that `levels` gave.

        Raises:
            SpecError: they are of other layers.
        """
        goals = {target.layer.key: target.goal for target in self.targets}
        if levels and set(levels) != set(goals):
            raise SpecError(
                "the saved levels are of other layers than this model's: "
                f"{sorted(set(levels) ^ set(goals))[0]!r} is in one of them alone"
            )
        own = {key: Goal(goals[key].pattern, level) for key, level in levels.items()}
        self._way = Way(0.0, self.final, own)


def mask_on(target: Target) -> Mask:
    """The mask of a layer that has one.

    Raises:
        MaskError: it was taken off.
    """
    mask = target.mask
    if mask is None:
        raise MaskError(f"{target.name}: its mask is gone; make a new Pruner after fold or densify")
    return mask


def _check_masks(targets: Sequence[Target], regrow: Regrowth | None) -> None:
    """Refuse masks from before that the regrowth cannot live with."""
    for target in targets:
        mask = target.mask
        if mask is None:
            continue
        if isinstance(regrow, StraightThrough) != isinstance(mask, LearningMask):
            raise SpecError(
                f"{target.name}: it carries a mask of another kind already: weights learn under "
                "those of StraightThrough and under no others; torchprune.densify(model) or "
                "torchprune.fold(model) first"
            )
        if isinstance(regrow, MagnitudeRegrowth) and not mask.reversible:
            raise SpecError(
                f"{target.name}: the values under its mask are gone, and MagnitudeRegrowth brings "
                "them back; prune with reversible=True, or use RigL or SET"
            )


def _number(text: str) -> int:
    """A seed of 63 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
