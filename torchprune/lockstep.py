"""Lockstep calibration: all batches wait at each layer while it is pruned.

Every batch runs the model's own forward as a coroutine (greenlet) that stops where a layer to be
pruned is about to read its input. The driver gathers that layer's statistics over all batches,
yields them to be pruned, and lets the batches go on through the pruned layer. So each layer
computes once per batch, sees inputs from all earlier pruned layers, and any Python forward works.

Defined behaviour at the edges:
- Where batches wait at different layers (routed experts in a ModuleList), the layer registered
  first is pruned first, on the batches that wait at it. A batch that arrives later runs through.
- A layer reached again in the same forward was pruned at its first use, on those inputs.
- A layer no batch reaches is never yielded.
- Layers foreseen to read the same tensors (see `foresight`) are yielded together. If one of them
  then reads something else, or is not called, `Unforeseen` is raised: begin again without.
- Once the last layer is pruned the waiting batches are abandoned: the model's tail is not run.
- An error in any batch ends the calibration; hooks are gone and the error is the model's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from torchprune import ambient, experts
from torchprune.activations import Held
from torchprune.batches import Batch
from torchprune.errors import CalibrationError
from torchprune.foresight import Foresight
from torchprune.moments import SAMPLE_ROWS, Moments
from torchprune.plan import Target
from torchprune.weights import ConvNd, geometry, input_rows, is_fused_experts

Stop = list[tuple[Target, Moments]]
"""Layers to prune now. Layers that read the same tensors share one `Moments` object."""

Rows = Callable[[], list[Tensor]]


@dataclass
class Usage:
    """What calibration cost and met."""

    peak_held_bytes: int = 0
    revisited: set[str] = field(default_factory=set)


@dataclass(eq=False)
class _Read:
    """One batch reading one tensor at one layer. `x` is None where nothing can be shared."""

    batch: int
    x: Tensor | None
    rows: Rows


class _Sources:
    """The very tensors, one a batch, that statistics were taken from."""

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def add(self, batch: int, x: Tensor) -> None:
        """Note a batch's tensor as it is now."""
        self._tensors[batch] = weakref.ref(x), _version(x)

    def holds(self, batch: int, x: Tensor | None) -> bool:
        """Whether this is the batch's tensor, unchanged since."""
        ref, version = self._tensors.get(batch, (None, -1))
        return x is not None and ref is not None and ref() is x and _version(x) == version

    def batches(self) -> set[int]:
        """The batches that have one."""
        return set(self._tensors)

    def alive(self) -> bool:
        """Whether the tensors may still be read by another layer."""
        return any(ref() is not None for ref, _ in self._tensors.values())


@dataclass(eq=False)
class _Gathered:
    """Statistics, what they were taken from, and the layer that was first to read it."""

    moments: Moments
    geometry: object
    first: int
    sources: _Sources = field(default_factory=_Sources)


class _AllReached(BaseException):
    """Unwinds a block's dense pass once its last layer has been reached. Not an error."""


class Unforeseen(BaseException):
    """A layer pruned by foresight reads other tensors than foreseen. Not an error of the model."""


class Calibration:
    """One run of all batches through a model. Iterate `stops()` (or `collect()`) inside `with`.

    Args:
        model: put in eval mode and hooked while the context is open, restored after.
        targets: the layers to stop at.
        batches: one coroutine each.
        gram: whether methods need the second moment, or only sums of squares.
        total: whether they need the sums themselves.
        blocks: the model's repeated blocks by name.
        twice: prune a block's targets together, on what they read in its dense pass, and run the
            block again.
        foresee: prune layers of a block together that are expected to read the same tensors.
        hold: 16-bit dtype in which waiting batches hold float32 activations, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        batches: Sequence[Batch],
        *,
        gram: bool,
        blocks: Mapping[str, nn.Module],
        twice: bool = False,
        foresee: bool = True,
        total: bool = False,
        hold: torch.dtype | None = None,
    ) -> None:
        self.model, self.targets, self.batches = model, list(targets), list(batches)
        self.total = total
        self.gram, self.blocks = gram, list(blocks.values()) if twice else []
        self.usage = Usage()
        self._held = Held(model, hold)
        self._encoder_decoder = bool(
            getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        )
        self._current = self._place = 0
        self._pausing, self._surprised = True, False
        self._done: set[int] = set()
        self._waiting: dict[int, list[int]] = {}  # place -> batches; a place is a target's index
        self._reads: dict[int, list[_Read]] = {}  # target -> reads of the batches that wait at it
        self._gathered: dict[int, _Gathered] = {}  # target -> its statistics, until it is pruned
        self._missing: dict[int, set[int]] = {}  # batch in a block's dense pass -> layers to come
        self._counted: dict[int, set[int]] = {}  # target -> batches that waited at it
        self._shareable: list[_Gathered] = []
        self._foresight = Foresight(self.targets, blocks if foresee and not twice else {})
        self._promised: dict[int, _Sources] = {}  # foreseen target -> what it is expected to read
        self._end = len(self.targets)  # the place where batches wait that nobody needs any more
        self._runs: list[greenlet.greenlet] = []
        self._stack = ExitStack()

    def __enter__(self) -> Calibration:
        self._outer = ambient.Modes.now()
        self._driver = greenlet.getcurrent()
        inside = {id(m): b for b, block in enumerate(self.blocks) for m in block.modules()}
        members: dict[int, list[int]] = {}
        self._members = {i: [i] for i in range(len(self.targets))}
        with ExitStack() as stack:
            stack.enter_context(ambient.calibration_mode(self.model))
            for index, target in enumerate(self.targets):
                block = inside.get(id(target.layer.module))
                if block is not None:
                    members.setdefault(block, []).append(index)
                self._observe(stack, index, target, pauses=block is None)
            for number, indices in members.items():
                self._members[indices[0]] = indices
                self._run_twice(stack, self.blocks[number], indices[0])
            stack.callback(self._abandon)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def stops(self) -> Iterator[Stop]:
        """Run the batches; yield whenever all wait. Whatever is yielded must be pruned at once."""
        self._runs = [greenlet.greenlet(self._forward) for _ in self.batches]
        moving = list(range(len(self._runs)))
        while True:
            self._held.new_round()
            for index in moving:
                self._resume(index)
                if self._surprised:
                    raise Unforeseen
            self._held.end_round()
            self._shareable = [g for g in self._shareable if g.sources.alive()]
            self._measure_held()
            place = min(self._waiting, default=self._end)
            if place == self._end:
                break
            moving = self._waiting.pop(place)
            ready = [i for i in self._members[place] if i in self._reads or i in self._gathered]
            stop = [(self.targets[i], self._complete(i)) for i in ready]
            stop += self._foreseen(place)
            self._done.update(self._members[place])
            for i in ready:
                del self._gathered[i]  # a second moment is large; `_shareable` keeps what is needed
            yield stop
            del stop
            if not self._needs(moving):
                break
        for index, sources in self._promised.items():
            if self._counted[index] != sources.batches():
                raise Unforeseen

    def collect(self) -> Stop:
        """Run every batch through the dense model, then give all statistics at once."""
        self._pausing = False
        for index in range(len(self.batches)):
            self._current = index
            self._forward()
            self._shareable = [g for g in self._shareable if g.sources.alive()]
        return [(self.targets[i], self._complete(i)) for i in sorted(self._gathered)]

    # -- running ---------------------------------------------------------------------------------

    def _forward(self) -> None:
        batch = self.batches[self._current]
        with torch.no_grad():
            self.model(*batch.args, **batch.kwargs)

    def _resume(self, index: int) -> None:
        run, self._current = self._runs[index], index
        torch.clear_autocast_cache()  # it may remember weights as they were before pruning
        self._held.restore(index)
        run.switch()
        if not run.dead:
            self._held.store(index, run, (self._place, self.batches[index].shapes))

    def _needs(self, batches: Sequence[int]) -> bool:
        """Whether a layer is still to be pruned, or a promise of these batches to be kept."""
        return len(self._done) < len(self.targets) or any(
            batch in sources.batches() - self._counted[index]
            for index, sources in self._promised.items()
            for batch in batches
        )

    def _pause(self, place: int) -> None:
        """In a coroutine: wait until the driver has pruned this place."""
        self._waiting.setdefault(place, []).append(self._current)
        self._place = place
        with ambient.restored(self._outer):
            self._driver.switch()

    def _abandon(self) -> None:
        for index, run in enumerate(self._runs):
            if not run.dead:
                self._held.restore(index)
                run.throw()
        self._runs = []
        self._shareable, self._reads, self._gathered = [], {}, {}

    def _measure_held(self) -> None:
        held = sum(self._held.bytes.get(i, 0) for w in self._waiting.values() for i in w)
        self.usage.peak_held_bytes = max(self.usage.peak_held_bytes, held)

    # -- observing -------------------------------------------------------------------------------

    def _observe(self, stack: ExitStack, index: int, target: Target, *, pauses: bool) -> None:
        module = target.layer.module
        if not is_fused_experts(module):

            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
                if x is not None:
                    keep = None if isinstance(module, ConvNd) else self._token_mask(target, x.shape)
                    read = _Read(self._current, x, lambda: input_rows(module, x, keep))
                    self._reached(index, read, pauses)

            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
            return

        def reach(tensor: str, inputs: list[Tensor]) -> None:
            for i, other in enumerate(self.targets):
                if other.layer.module is module and other.layer.tensor == tensor:
                    self._reached(i, _Read(self._current, None, lambda: inputs), pauses)

        if "forward" not in vars(module):  # once for all the weights of the module
            keep_rows = lambda shape: self._token_mask(target, torch.Size((*shape, 0)))  # noqa: E731
            stack.enter_context(experts.observed(module, reach, keep_rows))

    def _token_mask(self, target: Target, shape: torch.Size) -> Tensor | None:
        batch = self.batches[self._current]
        return batch.token_mask(shape[:-1], target.name, encoder_decoder=self._encoder_decoder)

    def _reached(self, index: int, read: _Read, pauses: bool) -> None:
        """A batch is about to run a layer."""
        if index in self._done:
            counted, promised = self._counted.get(index, set()), self._promised.get(index)
            if read.batch in counted:
                self.usage.revisited.add(self.targets[index].name)
            elif promised is not None:
                if not promised.holds(read.batch, read.x):
                    self._surprised = True  # a model that catches everything cannot hide it
                    raise Unforeseen
                counted.add(read.batch)
                if not self._needs([read.batch]):
                    self._pause(self._end)
            return
        if pauses and self._pausing:
            self._reads.setdefault(index, []).append(read)
            self._pause(index)
        else:
            self._add_running(index, read)
            missing = self._missing.get(read.batch)
            if missing is not None:
                missing.discard(index)
                if not missing:  # what is left of the dense pass would be thrown away
                    raise _AllReached

    def _run_twice(self, stack: ExitStack, block: nn.Module, place: int) -> None:
        """Let a block run dense to gather statistics, wait to be pruned, and run again."""
        own = vars(block).get("forward")
        forward = block.forward

        def twice(*args: Any, **kwargs: Any) -> Any:
            if place not in self._done and self._pausing:
                self._missing[self._current] = set(self._members[place])
                with suppress(_AllReached):
                    forward(*args, **kwargs)
                self._missing.pop(self._current, None)
                self._pause(place)
            return forward(*args, **kwargs)

        block.forward = twice
        if own is None:
            stack.callback(lambda: vars(block).pop("forward"))
        else:
            stack.callback(lambda: setattr(block, "forward", own))

    # -- gathering -------------------------------------------------------------------------------

    def _fresh(self, index: int) -> _Gathered:
        target = self.targets[index]
        view, device = target.view, target.weight.device
        with ambient.exact():  # a forward in inference mode must not make them inference tensors
            moments = Moments.empty(
                view.groups, view.cols, device, gram=self.gram, total=self.total
            )
        gathered = _Gathered(moments, geometry(target.layer.module), index)
        self._shareable.append(gathered)
        return gathered

    def _count(self, gathered: _Gathered, read: _Read) -> None:
        sample = 0 if self.gram else -(-SAMPLE_ROWS // len(self.batches))
        with ambient.exact():
            gathered.moments.add(read.rows(), sample)
        if read.x is not None:
            gathered.sources.add(read.batch, read.x)

    def _matching(self, index: int, reads: Sequence[_Read], *, whole: bool) -> _Gathered | None:
        """Statistics of another layer that were taken from exactly these tensors."""
        shape = geometry(self.targets[index].layer.module)
        for gathered in self._shareable:
            if (
                gathered.geometry == shape
                and all(gathered.sources.holds(r.batch, r.x) for r in reads)
                and (not whole or len(gathered.sources.batches()) == len(reads))
            ):
                return gathered
        return None

    def _complete(self, index: int) -> Moments:
        """The finished statistics of a target whose batches all wait."""
        reads = self._reads.pop(index, [])
        if reads:
            shared = self._matching(index, reads, whole=True)
            gathered = shared or self._fresh(index)
            self._gathered[index] = gathered
            self._counted[index] = {read.batch for read in reads}
            if shared is not None:
                self._foresight.learn(shared.first, index)
            else:
                for read in reads:
                    with self._held.at_hand(read.batch, self._runs[read.batch]):
                        self._count(gathered, read)
        moments = self._gathered[index].moments
        with ambient.exact():
            moments.finish()
        if not moments.is_finite():
            raise CalibrationError(
                f"{self.targets[index].name}: its inputs hold inf or NaN on the calibration data"
            )
        return moments

    def _foreseen(self, place: int) -> Stop:
        """The layers expected to read what the layer at this place reads, with its statistics."""
        gathered = self._gathered.get(place)
        if gathered is None:
            return []
        taken = self._done | self._reads.keys()  # pruned, or some batch waits at it already
        siblings = [i for i in self._foresight.siblings(place) if i not in taken]
        for index in siblings:
            self._promised[index], self._counted[index] = gathered.sources, set()
        self._done.update(siblings)
        return [(self.targets[i], gathered.moments) for i in siblings]

    def _add_running(self, index: int, read: _Read) -> None:
        """Count a read at once: the batch will not wait here."""
        gathered = self._gathered.get(index)
        if gathered is None:
            gathered = self._matching(index, [read], whole=False) or self._fresh(index)
            self._gathered[index] = gathered
        elif read.batch in gathered.sources.batches() and not gathered.sources.holds(
            read.batch, read.x
        ):
            self.usage.revisited.add(self.targets[index].name)
        if gathered.sources.holds(read.batch, read.x):
            return
        borrowed = [i for i, g in self._gathered.items() if g is gathered and i != index]
        if borrowed and read.batch in gathered.sources.batches():
            raise CalibrationError(
                f"{self.targets[index].name} reads the same tensor as "
                f"{self.targets[borrowed[0]].name} in some batches and another in others; use "
                'sequential="layer" for this model'
            )
        self._count(gathered, read)


def _version(x: Tensor) -> int:
    """How often a tensor was written in place; inference tensors do not count that."""
    return 0 if x.is_inference() else x._version
