"""Lockstep calibration: all batches wait at each layer while it is pruned.

Every batch runs the model's own forward as a coroutine (greenlet) that stops where a layer to be
pruned is about to read its input. The driver gathers that layer's statistics over all batches,
yields them to be pruned, and lets the batches go on through the pruned layer. So each layer
computes once per batch, sees inputs from all earlier pruned layers, and any Python forward works.

Defined behaviour at the edges:
- Where batches wait at different layers (routed experts in a ModuleList), the layer registered
  first is pruned first, on the batches that wait at it. A batch that arrives later runs through.
- A layer that a forward is known to read several times is pruned at its first use, on all that it
  reads in the dense model. Where nobody looked and it turns out so, `Unsurveyed` is raised: begin
  again with a look.
- A layer no batch reaches is never yielded.
- Layers foreseen to read the same tensors (see `foresight`) are yielded together. If one of them
  then reads something else, or is not called, `Unforeseen` is raised: begin again without. So it is
  where a block's layers were found to share statistics and then read something else.
- A batch that holds padding has a shadow beside it (see `padding`), which is never counted.
- Once the last layer is pruned the waiting batches are abandoned: the model's tail is not run,
  except on one batch where nobody looked, up to the output head: it may use a layer again.
- An error in any batch ends the calibration; hooks are gone and the error is the model's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from torchprune import modes
from torchprune.calibration.activations import Held
from torchprune.calibration.batches import Batch
from torchprune.calibration.block_calls import Call, Ends, Unit, floats_of, put_on
from torchprune.calibration.foresight import Foresight
from torchprune.calibration.gathering import Gathering
from torchprune.calibration.left_as_is import Containers
from torchprune.calibration.moments import Moments
from torchprune.calibration.observing import Observer
from torchprune.calibration.padding import Padding
from torchprune.calibration.replay import Replays
from torchprune.calibration.shadows import Shadows
from torchprune.calibration.sources import Gathered, Read, Sources, Unforeseen
from torchprune.calibration.twins import TwinDone, Twins
from torchprune.masking.selection import output_head
from torchprune.masking.targets import Target

Stop = list[tuple[Target, Moments]]
"""Layers to prune now. Layers that read the same tensors share one `Moments` object."""

Place = tuple[int, int]
"""(i, 0) is before layer i, (i, 1) the end of the unit whose last layer is i."""


@dataclass
class Usage:
    """What calibration cost and met."""

    peak_held_bytes: int = 0
    revisited: set[str] = field(default_factory=set)
    repeated: set[str] = field(default_factory=set)
    """Layers read several times in a forward, whose statistics are from a dense pass before."""
    unread: set[str] = field(default_factory=set)
    """Layers of which some read could not be counted."""
    notes: list[str] = field(default_factory=list)
    """What is to be said of padding."""


class _AllReached(BaseException):
    """Unwinds a pass of which nothing more is wanted. Not an error."""


@dataclass
class _DensePass:
    """A block's layers, those that are still to be reached, whether the pass ends when all were,
    and whether one was reached after that."""

    members: frozenset[int]
    missing: set[int]
    short: bool
    again: bool = False


class Unsurveyed(BaseException):
    """A weight is read in part, turned, or several times, and nobody looked how. Not an error of
    the model."""


class Calibration:
    """One run of all batches through a model. Iterate `stops()` (or `collect()`) inside `with`.

    Args:
        model: put in eval mode and hooked while the context is open, restored after.
        targets: the layers to stop at.
        batches: one coroutine each.
        gram: whether methods need the second moment, or only sums of squares.
        rows_will_do: whether, of very wide layers, rows of inputs do in its place.
        total: whether they need the sums themselves.
        blocks: the model's repeated blocks by name.
        twice: prune a block's targets together, on what they read in its dense pass, and run the
            block again.
        foresee: prune layers of a block together that are expected to read the same tensors; layers
            that are found to do so share their statistics.
        hold: 16-bit dtype in which waiting batches hold float32 activations, or None.
        cross: whether methods need the cross moment with the dense model's inputs.
        ends: what happens when all layers of a unit are pruned, or None.
        cap: of the lengths of input rows (see `Moments`), or None.
        surveyed: whether the targets say how the model reads them; if not, `Unsurveyed` is raised
            where a weight is not read once and whole.
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
        cross: bool = False,
        ends: Ends | None = None,
        cap: float | None = None,
        surveyed: bool = True,
        rows_will_do: bool = False,
    ) -> None:
        self.model, self.targets, self.batches = model, list(targets), list(batches)
        self.blocks = list(blocks.values()) if twice else []
        self._padding = Padding(model, self.batches)
        self._gathering = Gathering(
            self.targets,
            len(self.batches),
            gram=gram,
            total=total,
            cross=cross,
            cap=cap,
            share=foresee,
            rows_will_do=rows_will_do,
            tokens=partial(_tokens, self._padding, self.targets),
        )
        self.usage = Usage()
        self._held = Held(model, hold, [(batch.args, batch.kwargs) for batch in self.batches])
        self._needs_twins = cross or (ends is not None and ends.alpha > 0)
        self._ends = ends
        self._current, self._place = 0, (0, 0)
        self._pausing = True
        self._surprise: BaseException | None = None
        self._surveyed = surveyed
        self._ahead = False  # whether what runs now is the dense model, for layers read repeatedly
        self._repeated: set[int] = set()  # those layers
        self._passive = False  # whether what runs now is only run for its outputs
        self._done: set[int] = set()
        self._waiting: dict[Place, list[int]] = {}  # place -> batches
        self._units: dict[int, Unit] = {}  # those still to end, by their last layer
        self._dense: dict[int, _DensePass] = {}  # by batch
        self._met_once: set[type[nn.Module]] = set()  # blocks that met no layer after the last one
        self._counted: dict[int, set[int]] = {}  # target -> batches that waited at it
        self._foresight = Foresight(self.targets, blocks if foresee and not twice else {})
        self._promised: dict[int, Sources] = {}  # foreseen target -> what it is expected to read
        self._pauses: dict[int, bool] = {}  # target -> whether batches wait before it
        self._end = (len(self.targets), 0)  # where batches wait that nobody needs any more
        self._runs: list[greenlet.greenlet] = []
        self._twins: Twins | None = None
        self._shadows = Shadows(self._padding, self._run, self._resume)
        self._observer = Observer(
            self.targets, lambda: self._current, self._reached, self._read_strangely
        )
        self._stack = ExitStack()

    def __enter__(self) -> Calibration:
        self._gathering.check_room()
        self._outer = modes.Modes.now()
        self._driver = greenlet.getcurrent()
        self._containers = Containers(self.model)
        inside = {id(m): b for b, block in enumerate(self.blocks) for m in block.modules()}
        members: dict[int, list[int]] = {}
        self._members = {i: [i] for i in range(len(self.targets))}
        with ExitStack() as stack:
            stack.enter_context(modes.calibration_mode(self.model))
            for index, target in enumerate(self.targets):
                block = inside.get(id(target.layer.module))
                if block is not None:
                    members.setdefault(block, []).append(index)
                self._pauses[index] = block is None
            self._observer.put_on(stack)
            self._repeated = self._find_repeated(inside)
            for number, indices in members.items():
                self._members[indices[0]] = indices
                self._run_twice(stack, self.blocks[number], indices[0])
            if self._ends is not None:
                for name, module in self._ends.units.items():
                    self._stop_at_end(stack, name, module)
            stack.callback(self._abandon)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.usage.notes += self._padding.notes()
        self._stack.close()

    def stops(self) -> Iterator[Stop]:
        """Run the batches; yield whenever all wait. Whatever is yielded must be pruned at once."""
        count = len(self.batches)
        self._runs = [greenlet.greenlet(partial(self._forward, i)) for i in range(count)]
        if self._needs_twins:
            self._twins = Twins(count, self._forward, self._resume)
        if self._repeated:
            self._look_ahead()
        moving = list(range(count))
        self._advance_twins(moving, -1)
        self._held.new_round()
        self._shadows.start()
        while True:
            self._held.new_round()
            for index in moving:
                self._resume(index, self._runs[index])
                if self._surprise is not None:
                    raise self._surprise
            self._held.end_round()
            self._gathering.forget_dead()
            self._measure_held()
            place = min(self._waiting, default=self._end)
            if place == self._end:
                break
            self._shadows.catch_up(place)
            moving = self._waiting.pop(place)
            if place[1]:
                self._end_unit(place[0], moving)
            else:
                yield from self._stop(place[0], moving)
            if not self._needs(moving):
                break
            self._shadows.advance(place)
        for index in self._gathering.reached():  # read repeatedly, but not in the pruned model
            yield from self._stop(index, [])
        for index, sources in self._promised.items():
            if self._counted[index] != sources.batches():
                raise Unforeseen
        if not self._surveyed:
            self._run_on()

    def _run_on(self) -> None:
        """Let one batch go on, since it may use layers again that are pruned by now.

        The output head, which is large, comes after all others. Nobody asked for what follows the
        last layer, so errors in it are none.
        """
        index = next((i for i, run in enumerate(self._runs) if not run.dead), None)
        if index is None:
            return
        with ExitStack() as stack:
            if (head := output_head(self.model)) is not None:

                def at_head(*_: Any) -> None:
                    raise _AllReached

                stack.callback(head.register_forward_pre_hook(at_head).remove)
            self._held.new_round()
            with suppress(Exception, _AllReached):
                while not self._runs[index].dead:
                    self._resume(index, self._runs[index])
        if self._surprise is not None:
            raise self._surprise

    def _stop(self, place: int, moving: Sequence[int]) -> Iterator[Stop]:
        """Statistics of the layers at a place where batches wait."""
        ready = set(self._gathering.reached()).intersection(self._members[place])
        found = {i: self._complete(i) for i in sorted(ready)}
        stop = [(self.targets[i], gathered.moments) for i, gathered in found.items()]
        foreseen = self._foreseen(place, found)
        stop += [(self.targets[i], found[place].moments) for i in foreseen]
        fresh = {*self._members[place], *foreseen}
        self._done.update(fresh)
        self._padding.forget(places=list(fresh))
        self._advance_twins(moving, place, fresh)
        self._measure_held(moving)
        yield stop
        self._observer.find_again(fresh)

    def _end_unit(self, last: int, batches: Sequence[int]) -> None:
        assert self._ends is not None
        for batch in batches:
            self._held.restore(batch)  # calls hold activations
        unit, self._passive = self._units.pop(last), True
        try:
            self._ends.act(unit)
        finally:
            self._passive = False

    def collect(self) -> Stop:
        """Run every batch through the dense model, then give all statistics at once."""
        self._pausing = False
        self._run_through()
        reached = self._gathering.reached()
        return [(self.targets[i], self._complete(i).moments) for i in reached]

    def _look_ahead(self) -> None:
        """Count all reads of layers that are read repeatedly, in the dense model: to be pruned at
        the first of them, they must be known before it."""
        self._ahead = True
        try:
            self._run_through()
        finally:
            self._ahead = False
        self.usage.repeated |= {self.targets[i].name for i in self._repeated}

    def _run_through(self) -> None:
        for index in range(len(self.batches)):
            self._current = index
            if index in self._shadows.runs:
                self._shadows.run(index)
            self._forward(index)
            self._padding.forget(index)
            self._gathering.forget_dead()

    # -- running ---------------------------------------------------------------------------------

    def _forward(self, index: int) -> None:
        self._run(self.batches[index])

    def _run(self, batch: Batch) -> None:
        batch = batch.private()
        with ExitStack() as stack:
            if self._ends is not None:  # what units read must be fit to learn from
                stack.enter_context(torch.inference_mode(False))
                batch = batch.out_of_inference()
            stack.enter_context(torch.no_grad())  # innermost: leaving inference mode allows it
            stack.enter_context(self._observer.watching())
            self.model(*batch.args, **batch.kwargs)

    def _resume(self, index: int, run: greenlet.greenlet) -> None:
        self._current, key = index, self._key(index, run)
        torch.clear_autocast_cache()  # it may remember weights as they were before pruning
        self._held.restore(key)
        run.switch()
        if not run.dead:
            kind = key // len(self._runs)
            self._held.store(key, run, (self._place, kind, self.batches[index].shapes))

    def _key(self, index: int, run: greenlet.greenlet) -> int:
        """What a coroutine's activations are held under: twins come after the batches, and shadows
        after these."""
        if run is self._shadows.runs.get(index):
            return index + 2 * len(self._runs)
        return index if run is self._runs[index] else index + len(self._runs)

    def _advance_twins(self, moving: Sequence[int], place: int, fresh: Iterable[int] = ()) -> None:
        if self._twins is not None:
            if self._wants_twins():
                self._held.new_round()
                self._twins.advance(moving, place, fresh)
                self._held.end_round()
            for index in fresh:
                self._twins.reads.pop(index, None)

    def _wants_twins(self, batch: int | None = None) -> bool:
        """Whether twins (or one of them, at the end of a unit) have anything left to give."""
        ends = self._ends is not None and self._ends.alpha > 0
        return len(self._done) < len(self.targets) or (
            ends and any(batch not in unit.dense for unit in self._units.values())
        )

    def _needs(self, batches: Sequence[int]) -> bool:
        """Whether a layer is still to be pruned, a unit to end, or a promise of these batches to be
        kept."""
        return (
            len(self._done) < len(self.targets)
            or bool(self._units)
            or any(
                batch in sources.batches() - self._counted[index]
                for index, sources in self._promised.items()
                for batch in batches
            )
        )

    def _pause(self, place: Place) -> None:
        """In a coroutine: wait until the driver has pruned this place."""
        self._place = place
        if self._shadows.running:
            self._shadows.waits(self._current, place)
        else:
            self._waiting.setdefault(place, []).append(self._current)
        self._switch()

    def _switch(self) -> None:
        with modes.restored(self._outer):
            self._driver.switch()

    def _abandon(self) -> None:
        count, runs = len(self._runs), dict(enumerate(self._runs))
        if self._twins is not None:
            runs.update(enumerate(self._twins.runs, count))
        runs.update((2 * count + i, run) for i, run in self._shadows.runs.items())
        waiting = {key: run for key, run in runs.items() if not run.dead}
        for key, run in waiting.items():
            self._held.restore(key)
            run.throw()
        if waiting:
            self._containers.restore()
        self._runs, self._twins, self._units = [], None, {}
        self._shadows.end()
        self._observer.end()
        self._gathering.clear()

    def _measure_held(self, moving: Iterable[int] = ()) -> None:
        """Count what all batches hold, also those about to move on."""
        count = len(self._runs)
        waiting = [*moving, *(i for w in self._waiting.values() for i in w)]
        if self._twins is not None:
            waiting += [count + i for i, run in enumerate(self._twins.runs) if not run.dead]
        waiting += [2 * count + i for i, run in self._shadows.runs.items() if not run.dead]
        held = sum(self._held.bytes.get(i, 0) for i in waiting)
        for unit in self._units.values():
            held += sum(t.nbytes for tensors in unit.dense.values() for t in tensors)
        self.usage.peak_held_bytes = max(self.usage.peak_held_bytes, held)

    # -- observing -------------------------------------------------------------------------------

    def _find_repeated(self, inside: Mapping[int, int]) -> set[int]:
        """The layers read more than once in a forward, not all in one pass of a block."""
        found = set()
        for index, target in enumerate(self.targets):
            reading = target.reading
            if reading is not None and reading.reads != 1:
                block = inside.get(id(target.layer.module))
                if block is None or inside.get(id(reading.scope)) != block:
                    found.add(index)
        return found

    def _read_strangely(self, index: int) -> None:
        """In a coroutine: something is read that is none of a layer's groups."""
        if not self._surveyed:
            self._surprise = Unsurveyed()
            raise self._surprise
        self.usage.unread.add(self.targets[index].name)

    def _reached(self, index: int, read: Read) -> bool:
        """A batch is about to run a layer; whether the layer may have been pruned meanwhile."""
        if not self._passive:
            self._meet(index, read)
        return index in self._done

    def _meet(self, index: int, read: Read) -> None:
        repeated = index in self._repeated
        if self._ahead:
            if repeated and not self._shadow_reads(index, read):
                self._gathering.run_through(index, read, alone=True)
            return
        if self._twins is not None and self._twins.running:
            self._place = (index, 0)
            self._twins.reached(index, read, self._done, self._switch)
            return
        if index in self._done:
            if not self._shadows.running:
                self._reached_again(index, read)
            return
        counts = not repeated or not self._pausing  # else what it reads is counted already
        mine = counts and not self._shadow_reads(index, read)
        if self._pauses[index] and self._pausing:
            if mine:
                self._gathering.wait(index, read)
            self._pause((index, 0))
            return
        if self._pausing and not self._surveyed:
            dense = self._dense.get(self._current)
            if dense is None or index not in dense.members:  # it is another block's, or used again
                self._surprise = Unsurveyed()
                raise self._surprise
        if counts:
            reading = self.targets[index].reading
            alone = reading is not None and reading.reads != 1
            if mine and self._gathering.run_through(index, read, alone=alone):
                self.usage.revisited.add(self.targets[index].name)
            if alone:
                return  # more reads may come, so that the pass goes on to its end
        self._no_more_missing(index)

    def _shadow_reads(self, index: int, read: Read) -> bool:
        """Whether what is about to run a layer is a shadow, of which this is noted and no more."""
        shadow = self._shadows.running
        read.visit = self._padding.visit(read.batch, index, shadow=shadow)
        if shadow:
            self._padding.note(read.batch, index, read.visit, read.rows())
        return shadow

    def _reached_again(self, index: int, read: Read) -> None:
        """A batch is about to run a layer that is pruned."""
        counted, promised = self._counted.get(index, set()), self._promised.get(index)
        if read.batch in counted:
            if not self._surveyed:
                self._surprise = Unsurveyed()
                raise self._surprise
            self.usage.revisited.add(self.targets[index].name)
        elif promised is not None:
            if not promised.holds(read):
                self._surprise = Unforeseen()  # a model that catches everything cannot hide it
                raise self._surprise
            counted.add(read.batch)
            if not self._needs([read.batch]):
                self._pause(self._end)

    def _no_more_missing(self, index: int) -> None:
        """In a block's dense pass: once all layers were reached the rest would be thrown away."""
        dense = self._dense.get(self._current)
        if dense is not None:
            dense.again = dense.again or not dense.missing
            dense.missing.discard(index)
            if not dense.missing and dense.short:
                raise _AllReached

    def _run_twice(self, stack: ExitStack, block: nn.Module, place: int) -> None:
        """Let a block run dense to gather statistics, wait to be pruned, and run again."""
        forward, replays = block.forward, Replays(self.targets[place].name, block)
        kind = type(block)

        @put_on(stack, block)
        def twice(*args: Any, **kwargs: Any) -> Any:
            if place not in self._done and self._pausing and not self._ahead:
                start = replays.start(args, kwargs)
                members = frozenset(self._members[place])
                dense = _DensePass(members, set(members), short=kind in self._met_once)
                self._dense[self._current] = dense
                with suppress(_AllReached):
                    forward(*args, **kwargs)
                self._dense.pop(self._current, None)
                if not dense.missing and not dense.again:
                    self._met_once.add(kind)
                start.restore()
                self._pause((place, 0))
                out = forward(*args, **kwargs)
                if not self._surveyed and not self._shadows.running:
                    for index in members:  # what comes to these now uses them again
                        self._counted.setdefault(index, set()).add(self._current)
                return out
            return forward(*args, **kwargs)

    def _stop_at_end(self, stack: ExitStack, name: str, module: nn.Module) -> None:
        """Let a unit's forward wait at its end, and then give what its final weights give."""
        inside = {id(m) for m in module.modules()}
        members = [i for i, t in enumerate(self.targets) if id(t.layer.module) in inside]
        if not members:
            return
        assert self._ends is not None
        last, alpha, forward = members[-1], self._ends.alpha, module.forward
        self._units[last] = Unit(name, module, [self.targets[i] for i in members])
        replays = Replays(name, module)
        ended_once: set[tuple[int, bool]] = set()

        @put_on(stack, module)
        def ended(*args: Any, **kwargs: Any) -> Any:
            unit, batch = self._units.get(last), self._current
            if self._passive or self._ahead or unit is None:
                return forward(*args, **kwargs)
            if self._twins is not None and self._twins.running:
                out = forward(*args, **kwargs)
                unit.dense.setdefault(batch, [t.clone() for t in floats_of(out)])
                if not self._wants_twins(batch):
                    raise TwinDone
                return out
            shadow = self._shadows.running
            if not self._done.isdisjoint(members) or (batch, shadow) in ended_once:
                return forward(*args, **kwargs)  # not dense any more, or not its first call
            ended_once.add((batch, shadow))
            start = replays.start(args, kwargs)
            wanted = [] if alpha == 1 or shadow else floats_of(passively(*args, **kwargs))
            start.restore()
            rows = [_rows(t) for t in floats_of(forward(*args, **kwargs))]
            if shadow:
                self._padding.note(batch, (last, 1), 0, rows)
                self._pause((last, 1))
                start.restore()
                return passively(*args, **kwargs)
            if alpha and batch in unit.dense:
                dense = unit.dense.pop(batch)
                pairs = zip(wanted, dense, strict=True)
                wanted = [torch.lerp(w, d, alpha) for w, d in pairs] if wanted else dense
            if wanted:
                counts = self._padding.tokens(batch, (last, 1), 0, rows, name, loose=False)
                unit.calls.append(Call(args, kwargs, wanted, counts, batch, start))
            self._pause((last, 1))
            start.restore()
            return passively(*args, **kwargs)

        def passively(*args: Any, **kwargs: Any) -> Any:
            self._passive = True
            try:
                return forward(*args, **kwargs)
            finally:
                self._passive = False

    # -- gathering -------------------------------------------------------------------------------

    def _complete(self, index: int) -> Gathered:
        """The finished statistics of a target whose batches all wait."""
        if waiters := self._gathering.waiters(index):
            self._counted[index] = waiters
        gathered = self._gathering.take(index, self._at_hand)
        if gathered.first != index:
            self._foresight.learn(gathered.first, index)
        return gathered

    @contextmanager
    def _at_hand(self, index: int, read: Read) -> Iterator[Read | None]:
        """Have a waiting batch's activations at hand, and those of its twin if they match."""
        twins = self._twins
        with ExitStack() as stack:
            stack.enter_context(self._held.at_hand(read.batch, self._runs[read.batch]))
            twin = None if twins is None else twins.reads.get(index, {}).get(read.batch)
            alike = read.x is not None and self.batches[read.batch].is_whole(read.x)
            if twins is None or twin is None or not alike:
                yield None
                return
            key = len(self._runs) + read.batch
            stack.enter_context(self._held.at_hand(key, twins.runs[read.batch]))
            yield twin

    def _foreseen(self, place: int, found: Mapping[int, Gathered]) -> list[int]:
        """The layers expected to read what the layer at this place reads."""
        if place not in found:
            return []
        # those that are pruned, or that some batch has come to already
        taken = self._done.union(found, self._gathering.reached())
        siblings = [i for i in self._foresight.siblings(place) if i not in taken]
        for index in siblings:
            self._promised[index], self._counted[index] = found[place].sources, set()
        return siblings


def _rows(x: Tensor) -> Tensor:
    """A unit's output as a matrix."""
    return x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)


def _tokens(
    padding: Padding, targets: Sequence[Target], index: int, read: Read, rows: Sequence[Tensor]
) -> list[Tensor | None]:
    """Which of the rows that a batch reads are tokens'."""
    loose, name = read.x is None or read.x.dim() == 2, targets[index].name
    return padding.tokens(read.batch, index, read.visit, rows, name, loose=loose)
