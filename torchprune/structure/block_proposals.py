"""What a setting may say of blocks, and what it says then without some of them.

A number may be how many blocks there are, or how many of the first or last are of a kind; a list
may have an entry for each block, name places of blocks, or count those of several stages. Nothing
here decides which: the class that reads the setting does.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch

from torchprune.structure.stock import Settings, Table

Place = tuple[str | int, ...]
"""Where a setting stands: keys of settings inside settings."""

Lists = Mapping[str, tuple[int, Set[int]]]
"""Lists of blocks -> their lengths before, and the places of what goes."""

_NUMBERED = re.compile(r"(.*\D)(\d+)")


def leaves(settings: Settings, at: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every setting that holds no other settings, with its place."""
    for name, value in settings.items():
        if isinstance(value, dict) and not _by_place(value):
            yield from leaves(value, (*at, name))
        else:
            yield (*at, name), value


def held(settings: Settings, at: Place) -> Any:
    """A setting by its place."""
    found: Any = settings
    for name in at:
        found = found[name]
    return found


def changed(settings: Settings, new: Mapping[Place, Any]) -> Settings:
    """A copy with some other values."""
    made = copy.deepcopy(settings)
    for (*path, last), value in new.items():
        held(made, tuple(path))[last] = copy.deepcopy(value)
    return made


def fewer(value: Any, lists: Lists) -> list[Any]:
    """What a setting may become when blocks go, the likeliest first; never what it is."""
    found: list[Any] = []
    for before, gone in lists.values():
        if type(value) is int:
            found += _fewer_of(value, before, gone)
        elif isinstance(value, list | tuple):
            found += (type(value)(new) for new in _shorter(value, before, gone))
        elif isinstance(value, dict) and _by_place(value) and max(map(int, value)) < before:
            kept = {int(name): v for name, v in value.items() if int(name) not in gone}
            found.append({str(at - _below(at, gone)): v for at, v in kept.items()})
    return _others(found, value)


def _by_place(value: Mapping[str, Any]) -> bool:
    """Whether settings are called by numbers, as those of single blocks are."""
    return bool(value) and all(name.isdecimal() for name in value)


def _others(found: Sequence[Any], value: Any) -> list[Any]:
    distinct: list[Any] = []
    for new in found:
        if new != value and new not in distinct:
            distinct.append(new)
    return distinct


def _fewer_of(value: int, before: int, gone: Set[int]) -> list[int]:
    """A count of all blocks, of the first ones, or of the last ones."""
    if not 0 < value <= before:
        return []
    return [
        value - sum(at < value for at in gone),
        value - sum(at >= before - value for at in gone),
    ]


def _shorter(value: Sequence[Any], before: int, gone: Set[int]) -> Iterator[list[Any]]:
    if len(value) == before:
        yield [entry for at, entry in enumerate(value) if at not in gone]
    if value and all(type(entry) is int for entry in value):
        yield from _other_numbers(value, before, gone)
    yield from _by_name(value, before, gone)
    yield from _by_pattern(value, before, gone)


def _other_numbers(value: Sequence[int], before: int, gone: Set[int]) -> Iterator[list[int]]:
    """Places of blocks counted anew, from zero or from one, or a stage that has fewer."""
    if list(value) == sorted(set(value)) and value[0] >= 0 and value[-1] <= before:
        if value[-1] < before:
            yield [at - _below(at, gone) for at in value if at not in gone]
        if value[0] > 0:
            yield [at - _below(at, gone) for at in value]
            yield [at - _below(at, gone) for at in value if at - 1 not in gone]
    for stage, count in enumerate(value):
        if count == before:
            yield [*value[:stage], before - len(gone), *value[stage + 1 :]]


def _below(value: int, gone: Set[int]) -> int:
    return sum(at < value for at in gone)


def _by_name(value: Sequence[Any], before: int, gone: Set[int]) -> Iterator[list[str]]:
    """Blocks called by a word and a number that counts from one (`stage4`)."""
    named = [_NUMBERED.fullmatch(entry) if isinstance(entry, str) else None for entry in value]
    if not any(named) or not all(isinstance(entry, str) for entry in value):
        return
    new = []
    for entry, match in zip(value, named, strict=True):
        number = int(match[2]) if match else 0
        if number > before:
            return
        new.append(f"{match[1]}{number - _below(number, gone)}" if match else entry)
    yield list(dict.fromkeys(new))


def _by_pattern(value: Sequence[Any], before: int, gone: Set[int]) -> Iterator[list[Any]]:
    """Patterns with how often each is repeated: one pattern then, of what is left."""
    written: list[Any] = []
    for part in value:
        if not (isinstance(part, list | tuple) and len(part) == 2):
            return
        pattern, times = part
        if not isinstance(pattern, list | tuple) or type(times) is not int or times > before:
            return
        written += list(pattern) * times
    if len(written) == before:
        yield [[[entry for at, entry in enumerate(written) if at not in gone], 1]]


def any_number(value: Any, most: int) -> list[int]:
    """All small numbers instead of one, those near it first: periods, and where they begin."""
    if type(value) is not int or not 0 <= value <= most:
        return []
    return sorted((n for n in range(most + 1) if n != value), key=lambda n: abs(n - value))


def kinds_in_use(want: Any, got: Any) -> bool:
    """Whether a list of kinds names fewer of them, as if some are of no block any more."""
    if not isinstance(want, tuple) or type(got) is not type(want) or isinstance(want, torch.Size):
        return False
    if isinstance(want, Table):
        return all(a == b or kinds_in_use(a, b) for a, b in zip(want, got, strict=True))
    return set(got) <= set(want)


def parted(want: Any, got: Any, lists: Lists) -> tuple[int, int, list[int]] | None:
    """Whether a tensor has an equal part for each block: its axis, the length of a part, and the
    blocks whose parts stay."""
    if len(want) != len(got):
        return None
    apart = [axis for axis, (old, new) in enumerate(zip(want, got, strict=True)) if old != new]
    for before, gone in lists.values():
        left = before - len(gone)
        if len(apart) == 1 and want[apart[0]] % before == 0:
            part = want[apart[0]] // before
            if got[apart[0]] == part * left:
                return apart[0], part, [at for at in range(before) if at not in gone]
    return None


def counts_fewer(want: Any, got: Any, lists: Lists) -> bool:
    """Whether a value that a module keeps differs by what went alone: a count of all blocks, or a
    list about them."""
    for before, gone in lists.values():
        if type(want) is int and want == before and got == before - len(gone):
            return True
    if not isinstance(want, tuple) or type(got) is not type(want):
        return False
    if isinstance(want, Table):
        return all(a == b or counts_fewer(a, b, lists) for a, b in zip(want, got, strict=True))
    shortened = any(got == want[: len(want) - len(gone)] for _, gone in lists.values())
    return shortened or got in fewer(want, lists)
