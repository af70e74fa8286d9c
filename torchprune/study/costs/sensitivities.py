"""What `sensitivity` found, as text, JSON, a figure and a page."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchprune.allocation.cost_curves import FORMAT
from torchprune.checkpoint.whole_files import write_whole
from torchprune.reports.figure import SUFFIXES
from torchprune.reports.heat_figure import heat_figure
from torchprune.reports.page import save_page
from torchprune.reports.pieces import Page
from torchprune.reports.tables import by_rich, plain
from torchprune.study.costs.costs import Cost, Costs, SensitivityError
from torchprune.study.costs.damage import Estimate
from torchprune.study.costs.sensitivity_page import heats, layer_table, page_of, title_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SensitivityResult(Costs):
    """What each trial cost. `print(result)` shows the costliest.

    `overrides`, `allocation`, `kinds` and `costs` are asked of it; `save` writes a page, JSON or a
    figure.
    """

    def __str__(self) -> str:
        columns, rows, rest = layer_table(self)
        table = by_rich(columns, rows) or plain(columns, rows) + "\n"
        lines = [title_of(self), "", table.rstrip(), *([rest] if rest else []), *self.notes]
        return "\n".join(lines)

    def figure(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Heat maps by kind and depth, or by level and layer where there is no depth.

        Raises:
            MissingExtraError: the extra "figure" is absent.
            SensitivityError: the path's suffix is none of .png, .svg, .pdf.
        """
        if path is not None and Path(path).suffix.lower() not in SUFFIXES:
            raise SensitivityError(f"{path}: a figure is one of {', '.join(SUFFIXES)}")
        return heat_figure(heats(self), path, "SensitivityResult.figure")

    def page(self) -> Page:
        """All of it as a page."""
        return page_of(self, json.loads(self.to_json()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page (.html), the result (.json) or the figure (.png, .svg, .pdf).

        Raises:
            SensitivityError: the suffix is none of these.
        """
        suffix = Path(path).suffix.lower()
        if suffix == ".html":
            save_page(self.page(), path)
        elif suffix == ".json":
            write_whole(path, self.to_json() + "\n")
        elif suffix in SUFFIXES:
            self.figure(path)
        else:
            raise SensitivityError(f"{path}: expected .html, .json, {', '.join(SUFFIXES)}")

    # -- JSON --------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """All of it, floats in full."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str) -> SensitivityResult:
        """What `to_json` gave.

        Raises:
            SensitivityError: it is something else, or damaged.
        """
        try:
            data = json.loads(text)
            if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
                raise TypeError("written by something else")
            rows = tuple(_read_cost(row) for row in _as(list, data.pop("rows")))
            for name in ("levels", "notes"):
                data[name] = tuple(_as(str, item) for item in _as(list, data[name]))
            for name in ("metric", "units", "mode", "spec", "problem"):
                _as(str, data[name])
            return SensitivityResult(rows=rows, **data)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise SensitivityError(f"no sensitivity, or damaged ({error!s:.120})") from None


def _read_cost(found: Any) -> Cost:
    item = _as(dict, found)
    if set(item) != {f.name for f in fields(Cost)}:
        raise TypeError(f"a row of {sorted(item)!s:.60}")
    values: dict[str, Any] = {name: _as(str, item[name]) for name in ("name", "kind", "level")}
    values |= {name: _as(int, item[name]) for name in ("zeros", "size", "step")}
    values["depth"] = None if item["depth"] is None else _as(int, item["depth"])
    for name in ("error", "squared", "predicted", "taylor"):
        values[name] = None if item[name] is None else _number(item[name])
    for name in ("loss", "kl", "change"):
        values[name] = None if item[name] is None else _read_estimate(item[name])
    return Cost(**values)


def _read_estimate(found: Any) -> Estimate:
    error = _as(dict, found)["error"]
    return Estimate(_number(found["mean"]), None if error is None else _number(error))


def _number(value: Any) -> float:
    number = float(value if type(value) is int else _as(float, value))
    if not math.isfinite(number):
        raise TypeError(f"{number} is not finite")
    return number


def _as(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {value!r:.60}")
    return value
