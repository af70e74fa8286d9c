"""Grids of whole numbers that weights may be rounded to: codes times a scale, zero at code 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torchprune.errors import MissingExtraError
from torchprune.specs.options import Checked, check_whole


@dataclass(frozen=True)
class Int8(Checked):
    """Eight-bit weights: codes from -128 to 127 times a scale, by row or by group (`quantize=`).

    Args:
        group: weights of a row, side by side along its inputs, that share a scale; None is the
            whole row.
    """

    group: int | None = None

    bits: ClassVar[int] = 8

    def __post_init__(self) -> None:
        _check_group(self)

    def __str__(self) -> str:
        return _said(self)

    def torchao(self) -> Any:
        """The config with which `torchao.quantization.quantize_` gives the same codes and scales.

        On a folded model that is on this grid it changes no weight.

        Raises:
            MissingExtraError: torchao is not installed.
        """
        return _torchao_config(self)


@dataclass(frozen=True)
class Int4(Checked):
    """Four-bit weights: codes from -8 to 7 times a scale, by group or by row (`quantize=`).

    Args:
        group: weights of a row, side by side along its inputs, that share a scale; None is the
            whole row. Smaller groups round less and hold more scales; 32, 64 and 128 are usual.
    """

    group: int | None = 32

    bits: ClassVar[int] = 4

    def __post_init__(self) -> None:
        _check_group(self)

    def __str__(self) -> str:
        return _said(self)

    def torchao(self) -> Any:
        """The config with which `torchao.quantization.quantize_` gives the same codes and scales.

        On a folded model that is on this grid it changes no weight.

        Raises:
            MissingExtraError: torchao is not installed.
        """
        return _torchao_config(self)


Grid = Int8 | Int4


def misfit_of(grid: Grid, cols: int) -> str | None:
    """Why rows of so many weights cannot be cut into a grid's groups, or None."""
    if grid.group is None or cols % grid.group == 0:
        return None
    return f"its rows have {cols} weights, which groups of {grid.group} ({grid!r}) do not divide"


def _check_group(grid: Grid) -> None:
    if grid.group is not None:
        check_whole(type(grid).__name__, "group", grid.group)


def _said(grid: Grid) -> str:
    by = "by row" if grid.group is None else f"in groups of {grid.group}"
    return f"int{grid.bits} {by}"


def _torchao_config(grid: Grid) -> Any:
    try:
        import torch
        from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup
        from torchao.quantization.quant_primitives import MappingType
    except ImportError as error:
        raise MissingExtraError("torchao", "quant", f"{type(grid).__name__}.torchao") from error
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{grid.bits}"),
        granularity=PerAxis(0) if grid.group is None else PerGroup(grid.group),
        # torchao's plain "symmetric" divides by 7.5 (127.5), which no code reaches: by quantizing
        # what is quantized already every weight would shrink, by up to 7 % in four bits.
        mapping_type=MappingType.SYMMETRIC_NO_CLIPPING_ERR,
    )
