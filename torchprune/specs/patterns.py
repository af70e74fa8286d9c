"""Sparsity patterns: frozen values that say which sets of weights may be zero together.

A pattern knows its own arithmetic and nothing else; `projection.project` turns a score and a
pattern into a mask. Strings are read once, by `parse_pattern`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from torchprune.errors import SpecError

ACCEPTED = (
    '"unstructured", "n:m" such as "2:4" (keeps n of every m), "block:RxC" such as "block:4x4"'
)


@dataclass(frozen=True)
class Unstructured:
    """Any weight may be zero."""

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NM:
    """At most `n` nonzeros in every `m` contiguous weights along the input axis.

    `NM(2, 4)` is NVIDIA's 2:4. Note that Wanda's reference code counts the *pruned* ones
    (`prune_n`), which differs for 1:4 and 3:4.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (0 < self.n < self.m):
            raise SpecError(
                f"NM(n={self.n}, m={self.m}): n weights are kept of every m, so 0 < n < m is needed"
            )

    @property
    def sparsity(self) -> Fraction:
        """The share of zeros the pattern implies, exactly."""
        return Fraction(self.m - self.n, self.m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Block:
    """Whole tiles of `rows` x `cols` weights (output x input axis) are zero or kept."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise SpecError(f"Block(rows={self.rows}, cols={self.cols}): both must be at least 1")

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.cols}"


Pattern = Unstructured | NM | Block


def parse_pattern(pattern: str | Pattern) -> Pattern:
    """The pattern a string names; a pattern value is returned as it is.

    >>> parse_pattern("2:4")
    NM(n=2, m=4)
    >>> parse_pattern("block:4x8")
    Block(rows=4, cols=8)

    Raises:
        SpecError: for anything else, showing the accepted forms.
    """
    if isinstance(pattern, Unstructured | NM | Block):
        return pattern
    if isinstance(pattern, str):
        text = pattern.strip().lower()
        if text == "unstructured":
            return Unstructured()
        if found := re.fullmatch(r"(\d+):(\d+)", text):
            return NM(int(found[1]), int(found[2]))
        if found := re.fullmatch(r"block:(\d+)x(\d+)", text):
            return Block(int(found[1]), int(found[2]))
    raise SpecError(f"pattern {pattern!r} is not understood; accepted: {ACCEPTED}")


def prune_count(total: int, sparsity: float | Fraction) -> int:
    """How many of `total` are pruned: floor(total * sparsity), for the decimal that was written.

    A float is read as the shortest decimal that prints it, so that 29 % of 100 is 29 and not the
    28 which `int(100 * 0.29)` gives.

    >>> prune_count(100, 0.29)
    29
    """
    share = sparsity if isinstance(sparsity, Fraction) else Fraction(repr(float(sparsity)))
    return total * share.numerator // share.denominator


def misfit(pattern: Pattern, rows: int, cols: int) -> str | None:
    """Why a rows x cols matrix cannot hold the pattern, or None."""
    if isinstance(pattern, NM) and cols % pattern.m:
        return (
            f"pattern {pattern} needs an input width divisible by {pattern.m}, got {cols} "
            f"(matrix {rows} x {cols})"
        )
    if isinstance(pattern, Block) and (rows % pattern.rows or cols % pattern.cols):
        return (
            f"pattern {pattern} needs rows divisible by {pattern.rows} and columns by "
            f"{pattern.cols}, got {rows} x {cols}"
        )
    return None


def check_shape(pattern: Pattern, rows: int, cols: int, name: str) -> None:
    """Raise SpecError, naming the layer, if a rows x cols matrix cannot hold the pattern."""
    if why := misfit(pattern, rows, cols):
        raise SpecError(f"{name}: {why}; ignore the layer or override its pattern")
