"""What `make test` runs of a sweep over many models: a sample. `make test-all` runs every one.

A test that costs seconds a model says which models it keeps; the others carry the mark `sweep`,
which `make test` leaves out. A law is never left out whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sample(cases: Iterable[Any], *keep: str) -> list[Any]:
    """Cases for `parametrize`, of which `make test` runs those of these names."""
    cases = list(cases)
    names = [str(case) for case in cases]
    missing = [name for name in keep if name not in names]
    if missing or not keep:
        raise ValueError(f"expected some of {names} to keep, got {missing or 'nothing'}")
    return _marked(cases, [case for case, name in zip(cases, names, strict=True) if name in keep])


def share(cases: Iterable[Any], index: int, count: int) -> list[Any]:
    """Cases for `parametrize`, of which `make test` runs every count-th, from the index-th on.

    Laws that take turns (0, 1 .. count - 1) run every case between them, new ones too.
    """
    cases = list(cases)
    if not 0 <= index < min(count, len(cases)):
        raise ValueError(f"share {index} of {count} is empty for {len(cases)} cases")
    return _marked(cases, cases[index::count])


def _marked(cases: list[Any], kept: Collection[Any]) -> list[Any]:
    return [case if case in kept else pytest.param(case, marks=pytest.mark.sweep) for case in cases]


def kept(cases: Iterable[Any]) -> list[Any]:
    """The cases that `make test` runs."""
    return [case for case in cases if not hasattr(case, "marks")]
