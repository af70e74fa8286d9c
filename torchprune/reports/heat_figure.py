"""A heat map by matplotlib, without its global state."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torchprune.errors import MissingExtraError
from torchprune.reports.pieces import Heat

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_figure(maps: Sequence[Heat], path: str | os.PathLike[str] | None, asker: str) -> Figure:
    """Heat maps above each other, each with its own scale.

    Args:
        path: where to save it, in the format its suffix names, or None.
        asker: what draws, for the error.

    Raises:
        MissingExtraError: the extra "figure" is absent.
    """
    try:
        from matplotlib import colors
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "figure", asker) from None
    height = sum(1.2 + 0.22 * len(each.rows) for each in maps)
    width = 3.0 + 0.26 * max((len(each.columns) for each in maps), default=1)
    size = (min(max(width, 5.0), 16.0), min(height, 40.0))
    figure = Figure(figsize=size, layout="constrained")
    for axes, each in zip(figure.subplots(len(maps), squeeze=False)[:, 0], maps, strict=True):
        values = [[float("nan") if v is None else v for v in row] for row in each.values]
        known = [v for row in each.values for v in row if v is not None]
        if each.logarithmic:
            known = [v for v in known if v > 0]
            values = [[v if v > 0 else float("nan") for v in row] for row in values]
        low, high = min(known, default=0.0), max(known, default=1.0)
        norm = (
            colors.LogNorm(low, high) if each.logarithmic and known else colors.Normalize(low, high)
        )
        image = axes.imshow(values, aspect="auto", cmap="viridis", norm=norm)
        axes.set_title(each.title, fontsize="medium")
        axes.set_xticks(range(len(each.columns)), each.columns, fontsize="x-small")
        axes.set_yticks(range(len(each.rows)), each.rows, fontsize="x-small")
        figure.colorbar(image, ax=axes, label=each.unit)
    if path is not None:
        figure.savefig(path, format=Path(path).suffix[1:].lower(), dpi=150)
    return figure
