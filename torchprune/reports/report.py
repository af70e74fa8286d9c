"""What pruning did to a model: counted from its tensors now, beside how it came about."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchprune.calibration.lockstep import Usage
from torchprune.masking.coverage import Coverage, coverage_of
from torchprune.masking.mask import Mask, masked_layers, original_of
from torchprune.masking.packing import zeros_in
from torchprune.masking.shards import is_shard
from torchprune.reports.figure import draw_layers
from torchprune.reports.layer_report import (
    ERROR,
    LayerReport,
    dense_section,
    kind_of,
    layer_sections,
)
from torchprune.reports.page import Shown, joined, save_result
from torchprune.reports.pieces import Fact, Page, Pairs, Prose, Section
from torchprune.reports.spec_calls import sparsify_call
from torchprune.reports.tables import Column, by_rich
from torchprune.reports.wording import PageError, number, percent
from torchprune.reports.wording import size as bytes_told
from torchprune.specs.options import Checked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RUNS = "_torchprune_runs"
_SOURCE = "_torchprune_source"

_COLUMNS = [
    Column("layer", fold=True),
    *(Column(head) for head in ("shape", "dtype", "method", "pattern")),
    *(Column(head, right=True) for head in ("zeros", "sparsity", "error")),
    Column("note", fold=True),
]


@dataclass
class RunRecord:
    """One call of `sparsify`: its spec, what it left dense and why, what calibration cost."""

    spec: Checked
    skipped: dict[str, str] = field(default_factory=dict)
    batches: int = 0
    peak_held_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def finish(self, batches: int, usage: Usage) -> None:
        """Note what calibration used."""
        self.batches, self.peak_held_bytes = batches, usage.peak_held_bytes
        self.notes += usage.notes
        for name in sorted(usage.repeated):
            self.notes.append(
                f"{name} is read more than once in a forward pass: its statistics are from every "
                "use, in the model before it was pruned"
            )
        for name in sorted(usage.unread):
            self.notes.append(f"{name}: some of what it multiplies could not be counted")
        for name in sorted(usage.revisited - usage.repeated):
            self.notes.append(
                f"{name} is used more than once in a forward pass: its statistics are from "
                + ("every use" if getattr(self.spec, "sequential", "") != "layer" else "the first")
            )


def remember_run(model: nn.Module, run: RunRecord) -> None:
    """Keep a run's record on the model; a deepcopy takes it along."""
    keep_runs(model, [*runs_of(model), run])


def keep_runs(model: nn.Module, runs: list[RunRecord]) -> None:
    """Put a model's whole history of runs on it."""
    setattr(model, _RUNS, runs)


def runs_of(model: nn.Module) -> list[RunRecord]:
    """The records of every `sparsify` call on this model."""
    return list(getattr(model, _RUNS, []))


def remember_source(model: nn.Module, note: str | None) -> None:
    """Keep what is to be said of the file that a model came from; saves do not pass it on."""
    vars(model).pop(_SOURCE, None)
    if note is not None:
        setattr(model, _SOURCE, note)


@dataclass(frozen=True)
class Report:
    """The layers with masks, the layers left dense with reasons, and calibration's notes.

    `coverage` is how much of what multiplies in the model's repeated blocks carries a mask, or in
    the whole model where nothing repeats: `coverage.share`, and what is `bare`.

    `print(report)` shows a table (with the `cli` extra's rich; a short text without it);
    `report.save("report.html")` writes a page.

    Attributes:
        model: the name of the model's class.
        calls: the Python of every `sparsify` that the model went through.
    """

    layers: Sequence[LayerReport]
    skipped: dict[str, str]
    parameters: int
    peak_held_bytes: int
    notes: Sequence[str]
    warnings: Sequence[str]
    coverage: Coverage
    model: str = ""
    calls: Sequence[str] = ()

    @property
    def zeros(self) -> int:
        """Exact zeros in all masked layers."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def size(self) -> int:
        """Weights in all masked layers."""
        return sum(layer.size for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Share of zeros over all masked layers; 0.0 if there are none."""
        return self.zeros / self.size if self.size else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts (JSON-ready)."""
        total = {"zeros": self.zeros, "size": self.size, "sparsity": self.sparsity}
        total["parameters"] = self.parameters
        total["covered"] = self.coverage.share
        return {
            "layers": [
                {**asdict(y), "shape": list(y.shape), "sparsity": y.sparsity} for y in self.layers
            ],
            "total": total,
            "skipped": dict(self.skipped),
            "peak_held_bytes": self.peak_held_bytes,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }

    def page(self) -> Page:
        """All of it for a reader: warnings, sizes, the layers, what stayed dense and why."""
        sections = layer_sections(self.layers) if self.layers else []
        bare = {layer.name: count for layer, count in self.coverage.bare.items()}
        notes = list(self.notes)
        if self.peak_held_bytes:
            notes.append(f"Waiting batches held at most {bytes_told(self.peak_held_bytes)}.")
        last = [Section("Notes", [Prose(note) for note in notes])] if notes else []
        return Page(
            title=f"Pruning report{': ' if self.model else ''}{self.model}",
            lead=self._lead(),
            sections=[*sections, dense_section(self.skipped, bare), *last],
            facts=self._facts(),
            warnings=self.warnings,
            command="\n".join(self.calls),
            data={**self.to_dict(), "model": self.model, "calls": list(self.calls)},
        )

    def save(self, path: str | os.PathLike[str], *beside: Page | Shown | Section | Pairs) -> None:
        """Write the page (.html), its data (.json) or a figure (.png, .svg, .pdf).

        Args:
            beside: for a page or its data, what else is to be on it: other results with a `page()`
                (a comparison, a profile), sections, generations side by side.

        Raises:
            PageError: another suffix.
            MissingExtraError: the extra "page", or for a figure "figure", is absent.
            OSError: it cannot be written; what was there before stays.
        """
        page = self.page()
        save_result(path, joined(page.title, page, *beside) if beside else page, self.figure)

    def figure(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Sparsity and error by layer, in the order of the model, for a paper.

        Returns:
            a `matplotlib.figure.Figure`.

        Raises:
            PageError: no layer has a mask.
            MissingExtraError: the extra "figure" is absent.
        """
        if not self.layers:
            raise PageError("no layer has a mask: there is nothing to draw")
        return draw_layers(
            [kind_of(y.name) for y in self.layers],
            {
                "sparsity": [y.sparsity for y in self.layers],
                ERROR: [y.error for y in self.layers],
            },
            path=path,
        )

    def _lead(self) -> str:
        if not self.layers:
            return "No layer of the model has a mask: all its weights are dense."
        methods = " and ".join(dict.fromkeys(y.method for y in self.layers))
        patterns = " and ".join(dict.fromkeys(y.pattern for y in self.layers))
        kept, dense = self._sizes()
        return (
            f"{percent(self.sparsity)} of the weights in {len(self.layers):,} layers are zero, "
            f"chosen by {methods} in the pattern {patterns}. Stored as kept values and one bit a "
            f"weight, these layers take {bytes_told(kept)} instead of {bytes_told(dense)}."
        )

    def _sizes(self) -> tuple[int, int]:
        return sum(y.kept_bytes for y in self.layers), sum(y.dense_bytes for y in self.layers)

    def _facts(self) -> list[Fact]:
        share = self.zeros / self.parameters if self.parameters else 0.0
        kept, dense = self._sizes()
        found = [
            Fact(
                "zeros",
                percent(self.sparsity),
                f"{self.zeros:,} of {self.size:,} weights in {len(self.layers):,} layers",
            ),
            Fact("of the model", percent(share), f"of all {self.parameters:,} parameters"),
        ]
        if self.layers:
            note = f"kept values and bits of these layers; {bytes_told(dense)} dense"
            found.append(Fact("size", bytes_told(kept), note))
            if self.coverage.size:
                covered = percent(self.coverage.share)
                found.append(Fact("covered", covered, f"of {self.coverage.where}"))
        if errors := sorted((y.error, y.name) for y in self.layers if y.error is not None):
            middle, (worst, where) = errors[len(errors) // 2][0], errors[-1]
            note = f"median {ERROR} of an output; most {number(worst)} in {where}"
            found.append(Fact("layer error", number(middle), note))
        return found

    def __str__(self) -> str:
        rows = [
            (
                y.name,
                "x".join(map(str, y.shape)),
                y.dtype,
                y.method,
                y.pattern,
                f"{y.zeros:,}",
                f"{y.sparsity:.2%}",
                "" if y.error is None else f"{y.error:.3g}",
                y.note,
            )
            for y in self.layers
        ]
        total = ("total", "", "", "", "", f"{self.zeros:,}", f"{self.sparsity:.2%}", "", "")
        table = by_rich(_COLUMNS, rows, total)
        return self._plain() if table is None else table + "\n".join(self._remarks())

    def _remarks(self) -> list[str]:
        lines = [
            f"{self.zeros:,} of {self.size:,} weights in {len(self.layers)} masked layers are zero "
            f"({self.parameters:,} parameters in the model)"
        ]
        if self.layers and self.coverage.size:
            lines.append(str(self.coverage))
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            lines.append(f"dense: {shown}: {reason}")
        if self.peak_held_bytes:
            lines.append(f"waiting batches held at most {self.peak_held_bytes / 2**20:,.1f} MiB")
        lines += self.notes
        lines += [f"warning: {w}" for w in self.warnings]
        return lines

    def _plain(self) -> str:
        layers = [f"{y.name}: {y.method} {y.pattern}, {y.sparsity:.2%} zero" for y in self.layers]
        hint = "(a table with pip install 'torchprune[cli]')"
        return "\n".join([*layers, *self._remarks(), hint, json.dumps(self.to_dict()["total"])])


def report(model: nn.Module) -> Report:
    """Count the zeros of every masked layer and tell how they came about.

    Counts are of the effective weights as they are now, not of what was asked for. Of weights that
    are sharded over processes they are the masks', so that each process may ask by itself.
    """
    layers = []
    for layer, mask in masked_layers(model):
        original = original_of(layer.module, layer.tensor)
        record = mask.record
        layers.append(
            LayerReport(
                name=layer.name,
                shape=tuple(original.shape),
                dtype=str(original.dtype).removeprefix("torch."),
                method=record.method,
                pattern=record.pattern,
                zeros=_zeros_of(mask, original),
                size=original.numel(),
                error=record.error,
                tokens=record.tokens,
                note=record.note,
            )
        )
    runs = runs_of(model)
    masked = {y.name for y in layers}
    skipped = dict(runs[-1].skipped) if runs else {}
    return Report(
        layers=layers,
        skipped={k: why for k, why in skipped.items() if k not in masked},
        parameters=sum(p.numel() for p in model.parameters()),
        peak_held_bytes=max((run.peak_held_bytes for run in runs), default=0),
        notes=[*(note for run in runs for note in run.notes), *_source_notes(model)],
        warnings=[warning for run in runs for warning in run.warnings],
        coverage=coverage_of(model),
        model=type(model).__name__,
        calls=[sparsify_call(run.spec, data=run.batches > 0) for run in runs],
    )


def _zeros_of(mask: Mask, original: Tensor) -> int:
    if is_shard(original):
        return mask.shape.numel() - int(torch.count_nonzero(mask.mask))
    with torch.no_grad():
        return zeros_in(mask(original))


def _source_notes(model: nn.Module) -> list[str]:
    note = getattr(model, _SOURCE, None)
    return [note] if isinstance(note, str) else []
