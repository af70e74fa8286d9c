"""`profile`: what a model costs in each form, beside the dense one, and what would bring more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from torchprune.calibration.batches import Batch
from torchprune.masking.packing import zeros_in
from torchprune.study.speed.forms import (
    FORMS,
    Form,
    Ready,
    chosen_forms,
    copied,
    device_of,
    made_ready,
    plain,
)
from torchprune.study.speed.layer_turns import watch_layers
from torchprune.study.speed.layer_work import flops_of, products_of
from torchprune.study.speed.machine_facts import machine_facts
from torchprune.study.speed.peak_memory import HOW, peak_of
from torchprune.study.speed.profile_records import (
    Cell,
    Contender,
    FlopCount,
    Inside,
    LayerTime,
    ProfileError,
    Prospect,
)
from torchprune.study.speed.profile_results import Profile
from torchprune.study.speed.prospects import layers_to_change, prospects_at, shapes_of
from torchprune.study.speed.row_batches import RowBatches, row_batches
from torchprune.study.speed.speed_verdicts import judged
from torchprune.study.speed.spreads import latency_of, ratio_of
from torchprune.study.speed.turns import Pace, Turns, reason_of, take_turns

Clock = Callable[[], float]


def profile(
    model: nn.Module,
    inputs: Any,
    *,
    against: nn.Module | None = None,
    rows: Sequence[int] | int | None = None,
    forms: Sequence[str] | str | None = None,
    against_forms: Sequence[str] | str = "eager",
    seconds: float = 1.0,
    per_layer: bool = False,
    prospects: bool = True,
    threads: int | None = None,
    seed: int = 0,
    progress: bool = True,
    clock: Clock = time.perf_counter,
) -> Profile:
    """Measure a model in every form it can run in, by rows of input, beside the dense model.

    >>> from torchprune import MagnitudeSpec, fold, sparsify
    >>> dense = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> model = sparsify(fold(dense), MagnitudeSpec(), progress=False)
    >>> found = profile(model, torch.randn(4, 64), rows=(1, 8), forms=("eager", "bitmask"),
    ...     seconds=0.01, prospects=False, progress=False)
    >>> found.rows, [c.name for c in found.contenders]
    ([1, 8], ['eager', 'bitmask'])
    >>> found.flops[0].total, found.flops[0].by_zeros  # two for each weight and row
    (9216, 4608)

    All forms are made from copies and held at once, since they take turns: after a warm-up every
    form runs once a round, in an order that changes, so that a busy machine hurts them alike.
    Ratios are of medians, with the bootstrap's 95 % interval over paired rounds. Models run in eval
    mode, without gradients and key-value caches.

    Args:
        model: masked, folded, lowered or dense; any module. It is not changed.
        inputs: one example (a tensor, a tuple of positional or a mapping of keyword inputs), of
            which batches with so many rows are made; or a mapping of rows -> batch. A language
            model's rows are tokens, those of others the items of a batch.
        against: the dense model, which is not changed either. Without one the base of all ratios
            is the model itself, folded, in eager mode.
        rows: by default 1, 8, 64 and 512, or those of the mapping.
        forms: "masked" (as it is), "eager" (folded), "compile", "bitmask", "bitmask_int8", "int8"
            and "int8_dynamic" (torchao), "semi_structured", "onnx", "openvino"; None is all.
            Those that cannot be had here are lines with the reason. Compiling and writing ONNX
            take a minute or more for a language model.
        against_forms: in which the dense model runs; "eager" is always among them.
        seconds: for each form and number of rows; at least five rounds are measured.
        per_layer: also the seconds of each linear layer and convolution, by hooks, in the forms
            that run layer by layer in torch.
        prospects: on CPUs, time bitmask and int8 kernels on the shapes of the model's layers and
            add up what they would bring.
        threads: of all contenders; None is what torch has now.
        seed: of the orders of turns.
        clock: of seconds, for tests.

    Returns:
        print it, `save` it as .html, .json, .md or a figure.

    Raises:
        ProfileError: something is no module, cannot be copied, the inputs cannot be used, a form
            is unknown, or the base does not run.
    """
    chosen = chosen_forms(forms)
    beside = [] if against is None else chosen_forms(against_forms)
    _check(model, against, seconds, threads)
    with (
        _quiet_state(threads),
        tqdm(
            desc="profiling", disable=not progress, bar_format="{desc}{postfix}", leave=False
        ) as bar,
    ):
        bench = _Bench(model, against, Pace(seconds), clock, seed, bar)
        bench.batches = row_batches(model, inputs, None if rows is None else _as_rows(rows))
        bench.prepare(chosen, beside)
        for n, batch in bench.batches.batches.items():
            bench.measure(n, batch)
        bench.check_base()
        bench.look_inside(per_layer)
        if prospects:
            bench.look_ahead()
        return judged(bench.result())


def _as_rows(rows: Sequence[int] | int) -> list[int]:
    return [rows] if isinstance(rows, int) else list(rows)


def _check(model: Any, against: Any, seconds: float, threads: int | None) -> None:
    for what, given in (("model", model), ("against", against)):
        if not isinstance(given, nn.Module) and not (what == "against" and given is None):
            raise ProfileError(f"{what} must be a Module, got {type(given).__name__}")
    if not seconds > 0:
        raise ProfileError(f"seconds must be above 0, got {seconds!r}")
    if threads is not None and threads < 1:
        raise ProfileError(f"threads must be at least 1, got {threads!r}")
    if against is not None and device_of(against) != device_of(model):
        raise ProfileError(
            f"model is on {device_of(model)} and against on {device_of(against)}; move one of them"
        )


@contextmanager
def _quiet_state(threads: int | None) -> Iterator[None]:
    """The threads asked for, and random numbers that go on afterwards as if nothing had been."""
    before = torch.get_num_threads()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        with torch.random.fork_rng(devices):
            yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _Bench:
    """The contenders, and what was measured of them so far."""

    model: nn.Module
    against: nn.Module | None
    pace: Pace
    clock: Clock
    seed: int
    bar: Any
    batches: RowBatches = field(init=False)
    contenders: list[Contender] = field(default_factory=list)
    ready: dict[str, Ready] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    rounds: dict[int, list[float]] = field(default_factory=dict)
    inside: list[Inside] = field(default_factory=list)
    layers: list[LayerTime] = field(default_factory=list)
    ahead: list[Prospect] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folded = plain(copied(self.model))
        self.device = device_of(self.model)
        self.facts = machine_facts(self.device)  # the load before we add to it

    @property
    def base(self) -> str:
        """To whose time ratios are."""
        return "eager" if self.against is None else "dense"

    def settle(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def say(self, text: str) -> None:
        """At the bar."""
        self.bar.set_postfix_str(text)

    def prepare(self, chosen: Sequence[Form], beside: Sequence[Form]) -> None:
        """Make every contender, the base first.

        Raises:
            ProfileError: the base cannot be made.
        """
        if self.against is not None:
            self._make("dense", FORMS["eager"], self.against)
            for form in beside:
                if form.name != "eager":
                    self._make(f"dense {form.name}", form, self.against)
        elif FORMS["eager"] not in chosen:
            chosen = [FORMS["eager"], *chosen]
        for form in chosen:
            self._make(form.name, form, self.model)
        first = next(c for c in self.contenders if c.name == self.base)
        if first.missing:
            raise ProfileError(f"{self.base} cannot be run: {first.missing}")

    def _make(self, name: str, form: Form, model: nn.Module) -> None:
        self.say(f"making {name}")
        started = time.perf_counter()
        example = next(iter(self.batches.batches.values()))
        made = made_ready(form, model, example)
        took = time.perf_counter() - started
        one = Contender(name, form.name, form.what, form.skips_zeros)
        if isinstance(made, str):
            self.contenders.append(replace(one, missing=made))
            return
        self.ready[name] = made
        self.contenders.append(
            replace(one, held=made.held, read=made.read, prepare_seconds=took, note=made.note)
        )

    def measure(self, rows: int, batch: Batch) -> None:
        """All contenders at one number of rows, in turns."""
        runs: dict[str, Callable[[], object]] = {}
        failed: dict[str, str] = {}
        for name, ready in self.ready.items():
            try:
                runs[name] = ready.bind(batch)
            except Exception as error:
                failed[name] = reason_of(error)
        turns = take_turns(
            runs,
            self.pace,
            clock=self.clock,
            settle=self.settle,
            seed=self.seed,
            resting=lambda name: self.say(f"{rows} {self.batches.unit}s, {name}"),
        )
        turns.failed |= failed
        base = turns.seconds.get(self.base)
        if base is not None:
            self.rounds[rows] = base
        for one in self.contenders:
            self.cells.append(self._cell(one, rows, turns, base, runs))

    def _cell(
        self,
        one: Contender,
        rows: int,
        turns: Turns,
        base: list[float] | None,
        runs: dict[str, Callable[[], object]],
    ) -> Cell:
        seconds = turns.seconds.get(one.name)
        if seconds is None:
            why = one.missing or turns.failed.get(one.name, "")
            return Cell(one.name, rows, missing=why or f"the model does not take {rows}")
        peak = None
        if self.ready[one.name].read is not None:  # computed by torch
            peak = peak_of(runs[one.name], self.device)
        return Cell(
            one.name,
            rows,
            latency_of(seconds, turns.repeats[one.name]),
            None if base is None or one.name == self.base else ratio_of(seconds, base),
            peak,
        )

    def check_base(self) -> None:
        """
        Raises:
            ProfileError: the base ran at no number of rows.
        """
        if not self.rounds:
            reasons = [c.missing for c in self.cells if c.contender == self.base]
            raise ProfileError(f"{self.base} does not run: {'; '.join(dict.fromkeys(reasons))}")

    def look_inside(self, per_layer: bool) -> None:
        """Where the time goes: shares of the base, or every layer of all that can be watched."""
        watched = {name: r.module for name, r in self.ready.items() if r.module is not None}
        if not per_layer:
            watched = {k: v for k, v in watched.items() if k == self.base}
        elif hidden := [name for name in self.ready if name not in watched]:
            self.notes.append(f"{', '.join(hidden)}: no layer by layer, it runs as one program")
        for rows in self.rounds:
            self.say(f"{rows} {self.batches.unit}s, layer by layer")
            batch = self.batches.batches[rows]
            runs = {
                name: (module, self.ready[name].bind(batch))
                for name, module in watched.items()
                if module is not None and self._runs_at(name, rows)
            }
            pace = self.pace if per_layer else replace(self.pace, seconds=self.pace.seconds / 4)
            found = watch_layers(runs, pace, clock=self.clock, settle=self.settle, seed=self.seed)
            if shares := found[self.base].inside:
                self.inside.append(Inside(rows, latency_of(shares).median))
            if per_layer:
                flops = flops_of(self.folded, batch).layers
                for name, one in found.items():
                    kinds = products_of(runs[name][0])
                    self.layers += [
                        LayerTime(
                            layer,
                            type(kinds[layer]).__name__,
                            name,
                            rows,
                            latency_of(times),
                            flops.get(layer, 0),
                        )
                        for layer, times in one.layers.items()
                    ]

    def _runs_at(self, name: str, rows: int) -> bool:
        return any((c.contender, c.rows) == (name, rows) and c.latency for c in self.cells)

    def look_ahead(self) -> None:
        """What other kernels would bring."""
        if self.device.type != "cpu":
            self.notes.append(
                f"no kernels of other forms were timed: they are the CPU's, not {self.device}'s"
            )
            return
        names = layers_to_change(self.folded)
        base = self.ready[self.base].module
        if base is None or not names:
            return
        known = dict(self.folded.named_modules())
        pace = replace(self.pace, seconds=self.pace.seconds / 4)
        for rows, whole in self.rounds.items():
            shapes = shapes_of(
                self.folded, [n for n in names if n in known], self.batches.batches[rows]
            )
            self.ahead += prospects_at(
                rows,
                whole,
                shapes,
                pace,
                clock=self.clock,
                resting=partial(self._told, rows),
            )

    def _told(self, rows: int, shape: str) -> None:
        self.say(f"{rows} {self.batches.unit}s, kernels of {shape}")

    def result(self) -> Profile:
        """All of it, without verdicts."""
        flops = []
        for rows, batch in self.batches.batches.items():
            if rows in self.rounds:
                self.say(f"{rows} {self.batches.unit}s, FLOPs")
                counted = flops_of(self.folded, batch)
                flops.append(FlopCount(rows, counted.total, counted.by_zeros))
        for rows, why in self.batches.missing.items():
            self.cells += [Cell(one.name, rows, missing=why) for one in self.contenders]
        weights = [p for p in self.folded.parameters() if p.dim() > 1]
        return Profile(
            model=type(self.model).__name__,
            unit=self.batches.unit,
            base=self.base,
            parameters=sum(p.numel() for p in self.folded.parameters()),
            zeros=sum(map(zeros_in, weights)),
            contenders=tuple(self.contenders),
            cells=tuple(self.cells),
            flops=tuple(flops),
            inside=tuple(self.inside),
            layers=tuple(self.layers),
            prospects=tuple(self.ahead),
            notes=tuple(self.notes),
            machine=self.facts,
            peak_how=HOW.get(self.device.type, "not measured on this device"),
        )
