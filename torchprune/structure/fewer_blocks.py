"""The settings by which a class of transformers makes a model without some of its blocks.

No family is known by name. What settings may mean is proposed, the class builds the model from the
proposal, and only settings by which it is alike in every module are taken.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchprune.errors import ShrinkError
from torchprune.structure.block_proposals import (
    Lists,
    Place,
    any_number,
    changed,
    counts_fewer,
    fewer,
    held,
    kinds_in_use,
    leaves,
    parted,
)
from torchprune.structure.resize import drop_blocks
from torchprune.structure.stock import (
    CLASS,
    Real,
    Settings,
    Trait,
    Traits,
    make,
    read,
    settings_of,
    traits_of,
    unlike,
)

_LAYERS = re.compile(r".*(layers?|blocks?|depths?)")
"""How a count of blocks is mostly called: such a setting is tried first, not alone."""

Parts = dict[Trait, tuple[int, int, list[int]]]

_PERIOD = 8
_STARTS = 24
_MOST = 300
"""Models built at most, each without memory."""


@dataclass(frozen=True)
class Found:
    """Settings, and what the class makes of them.

    Attributes:
        settings: as a file holds them.
        wrong: where the model differs from the one without the blocks; empty if they say it.
        follows: attributes that count blocks, and their values then.
        parts: tensors with a part for each block: axis, length of a part, blocks that stay.
        distance: how much is wrong: a block that is missing is worse than another in its place.
        why: what the class says if it makes no model.
    """

    settings: Settings
    wrong: list[Trait] = field(default_factory=list)
    follows: dict[Trait, Any] = field(default_factory=dict)
    parts: Parts = field(default_factory=dict)
    distance: int = 0
    why: str = ""

    @property
    def fits(self) -> bool:
        """Whether the settings say that the blocks are gone."""
        return not self.why and not self.wrong

    @property
    def rank(self) -> tuple[bool, int, int]:
        """Smaller is better."""
        return bool(self.why), self.distance, len(self.follows) + len(self.parts)


class Search:
    """For settings by which a model's class makes it without some blocks.

    Args:
        model: it is not changed, and its blocks may be gone already: its class and its
            configuration say what it was.
        blocks: names of what goes.
        config: the configuration that makes it with its blocks.

    Raises:
        ShrinkError: the class makes no model with these blocks.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], config: Any) -> None:
        self.model, self.blocks, self.config = model, blocks, config
        self._settings = settings_of(config)
        self._judged: dict[str, Found] = {}
        self.reduced = self.whole()
        before = traits_of(self.reduced)
        self.lists: Lists = drop_blocks(self.reduced, blocks)
        self.want: Traits = traits_of(self.reduced)
        self._ordered = _ordered(before, self.lists)

    def whole(self, *, buffers: bool = False) -> nn.Module:
        """The model with all its blocks, as its class makes it."""
        name = type(self.model).__name__
        try:
            made = make(self.model, read(self.config, self._settings), buffers=buffers)
        except Exception as error:  # whatever its class makes of its own configuration
            raise ShrinkError(
                f"{', '.join(self.blocks)}: the class of the {name} makes no model of its "
                f"configuration ({said(error)}), so that it cannot say that blocks are gone"
            ) from None
        names = {path for path, _ in made.named_modules()}
        if missing := [block for block in self.blocks if block not in names]:
            raise ShrinkError(
                f"{', '.join(missing)}: the configuration of the {name} makes no such blocks, so "
                "that it cannot say that they are gone"
            )
        return made

    def nearest(self, *, far: bool = True) -> list[Found]:
        """The settings whose model differs least; several, if some make no difference that can be
        seen: those that change fewest first.

        Args:
            far: try also what a setting hardly says, where nothing likelier does.
        """
        best = self._start()
        for options in (self._likely, *((self._scaled, self._far, self._pairs) if far else ())):
            better = True
            while better and not best.fits and len(self._judged) < _MOST:
                best, better = self._climb(best, options)
        least = self._least(best)
        return [least] if least.settings == best.settings else [least, best]

    def judge(self, settings: Settings) -> Found:
        """What the class makes of settings."""
        key = json.dumps(settings, sort_keys=True, default=repr)
        if key not in self._judged:
            self._judged[key] = self._compared(settings)
        return self._judged[key]

    def _compared(self, settings: Settings) -> Found:
        try:
            got = traits_of(self.made(settings))
        except Exception as error:  # of settings that contradict each other
            return Found(settings, why=said(error))
        wrong, follows, parts = self.apart(self.want, got)
        distance = sum(1 if (path, CLASS) in got else 3 for path, _ in wrong)
        return Found(settings, wrong, follows, parts, distance)

    def made(self, settings: Settings) -> nn.Module:
        """What the class makes of settings, without memory."""
        return make(self.model, read(self.config, settings))

    def apart(self, want: Traits, got: Traits) -> tuple[list[Trait], dict[Trait, Any], Parts]:
        """Where a model differs from what is wanted, where it only counts what went, and which
        tensors hold a part for each block."""
        differs = unlike(want, got)
        parts: Parts = {}
        for trait in differs:
            one, two = want.get(trait), got.get(trait)
            sizes = isinstance(one, torch.Size) and isinstance(two, torch.Size)
            if sizes and not _inside(trait[0], self.lists):
                parts |= {trait: part} if (part := parted(one, two, self.lists)) else {}
        sized = {outer for path, _ in parts for outer in _outwards(path)}
        ordered = self._ordered.kept(got)
        wrong, follows = [], {}
        for trait in differs:
            one, two = want.get(trait, _ABSENT), got.get(trait, _ABSENT)
            if trait[0] in sized and type(one) is int and type(two) is int:
                told = parted((one,), (two,), self.lists) is not None
            elif _inside(trait[0], self.lists):
                told = False
            else:  # what the whole model keeps of kinds, of which some may be of no block now
                unused = two is _ABSENT and not isinstance(one, torch.Size) and trait[1] != CLASS
                told = unused or kinds_in_use(one, two) or (_are_names(one) and _are_names(two))
            if told or trait in ordered or counts_fewer(one, two, self.lists):
                follows[trait] = two
            elif trait not in parts:
                wrong.append(trait)
        return wrong, follows, parts

    # -- what is tried -----------------------------------------------------------------------------

    def _start(self) -> Found:
        """All lists made shorter, with each number that may be the length of a list of blocks."""
        best = self.judge(self._settings)
        for new in itertools.islice(self._starts(), _STARTS):
            found = self.judge(changed(self._settings, new))
            if found.rank < best.rank or best.settings == self._settings:
                best = found
            if found.fits:
                break
        return best

    def _starts(self) -> Iterator[dict[Place, Any]]:
        found = list(leaves(self._settings))
        other = [(at, fewer(value, self.lists)) for at, value in found if type(value) is not int]
        lists = {at: new[0] for at, new in other if new}
        words = {at: new for at, new in lists.items() if not _are_numbers(new)}
        counts = [
            [(at, before - len(gone)) for at, v in _by_likelihood(found) if _is(v, before)]
            for before, gone in self.lists.values()
        ]
        for also in (lists, words, {}) if lists else ({},):
            for chosen in itertools.product(*filter(None, counts)):
                yield {**also, **dict(chosen)}

    def _likely(self, best: Found) -> Iterator[list[dict[Place, Any]]]:
        now = dict(leaves(best.settings))
        for at, value in _by_likelihood(list(leaves(self._settings))):
            yield [{at: new} for new in (*fewer(value, self.lists), value) if new != now.get(at)]

    def _scaled(self, best: Found) -> Iterator[list[dict[Place, Any]]]:
        """Where only a factor differs that follows from how many blocks there are, another one."""
        got = {} if best.why else traits_of(self.made(best.settings))
        ratios = {_ratio(self.want.get(trait), got.get(trait)) for trait in best.wrong}
        if len(ratios) == 1 and (ratio := ratios.pop()) is not None:
            for at, value in leaves(best.settings):
                if type(value) is float and value:
                    yield [{at: value * ratio.value}]

    def _far(self, best: Found) -> Iterator[list[dict[Place, Any]]]:
        for at, value in leaves(best.settings):
            yield [{at: new} for new in any_number(value, self._longest)]

    def _pairs(self, best: Found) -> Iterator[list[dict[Place, Any]]]:
        """Two numbers at once that blocks follow from, as a period and where it begins."""
        told = {}
        for at, value in leaves(best.settings):
            near = any_number(value, min(self._longest, _PERIOD))
            if near and self.judge(changed(best.settings, {at: near[0]})).wrong != best.wrong:
                told[at] = [*near, value]
        for one, two in itertools.combinations(told, 2):
            for values in itertools.product(told[one], told[two]):
                yield [dict(zip((one, two), values, strict=True))]

    @property
    def _longest(self) -> int:
        return max(before for before, _ in self.lists.values())

    def _climb(self, best: Found, options: Any) -> tuple[Found, bool]:
        """One change after the other, each kept that makes the model more alike."""
        better = False
        for changes in options(best):
            start = best
            for change in changes:
                if best.fits or len(self._judged) >= _MOST:
                    return best, better
                found = self.judge(changed(start.settings, change))
                if found.rank < best.rank:
                    best, better = found, True
                elif not found.why and found.wrong == start.wrong:
                    break  # nothing of the blocks follows from it
        return best, better

    def _least(self, best: Found) -> Found:
        """Numbers that make no difference are as they were."""
        for at, value in leaves(self._settings):
            if held(best.settings, at) != value and _are_numbers(value):
                found = self.judge(changed(best.settings, {at: value}))
                if found.rank <= best.rank:
                    best = found
        return best


_ABSENT = object()


def _ratio(want: Any, got: Any) -> Real | None:
    """Of two floats that modules keep."""
    if isinstance(want, Real) and isinstance(got, Real) and got.value:
        return Real(want.value / got.value)
    return None


def _outwards(path: str) -> Iterator[str]:
    """A module, and those that it lies in but the outermost."""
    parts = path.split(".")
    return (".".join(parts[:count]) for count in range(len(parts), 0, -1))


def _are_names(value: Any) -> bool:
    """Whether it is names of tensors alone, which follow from the names of blocks."""
    if isinstance(value, tuple):
        return all(map(_are_names, value))
    return isinstance(value, str) and "." in value


def _inside(path: str, lists: Iterable[str]) -> bool:
    return any(path.startswith(f"{outer}.") for outer in lists)


def _are_numbers(value: Any) -> bool:
    """Whether it is a number, or numbers alone: what is no list of kinds."""
    if isinstance(value, list | dict):
        return isinstance(value, dict) or all(map(_are_numbers, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is(value: Any, number: int) -> bool:
    return type(value) is int and value == number


def _by_likelihood(found: Sequence[tuple[Place, Any]]) -> list[tuple[Place, Any]]:
    return sorted(found, key=lambda leaf: _LAYERS.fullmatch(str(leaf[0][-1])) is None)


def said(error: Exception) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason"]
    return f"{type(error).__name__}: {lines[-1]:.200}"


# -- numbers that order blocks ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Ordered:
    """Attributes by which blocks of a list are told in their order: (list, module, name)."""

    names: set[tuple[str, str, str]]

    def kept(self, got: Traits) -> set[Trait]:
        """The traits of a model that tell its blocks in order, as they did before."""
        found: set[Trait] = set()
        for key, values in _by_block(got, {name[0] for name in self.names}).items():
            if key in self.names and _rises([value for _, value in values]):
                found |= {trait for trait, _ in values}
        return found


def _ordered(traits: Traits, lists: Lists) -> _Ordered:
    by_block = _by_block(traits, set(lists))
    return _Ordered(
        {key for key, values in by_block.items() if _rises([value for _, value in values])}
    )


def _rises(values: Sequence[Any]) -> bool:
    return all(type(v) is int for v in values) and list(values) == sorted(set(values))


def _by_block(
    traits: Traits, lists: set[str]
) -> Mapping[tuple[str, str, str], list[tuple[Trait, Any]]]:
    """What the blocks of lists keep under one name, in the order of the blocks."""
    found: dict[tuple[str, str, str], list[tuple[Trait, Any]]] = {}
    for (path, name), value in traits.items():
        for outer in lists:
            if path.startswith(f"{outer}."):
                _, _, inside = path[len(outer) + 1 :].partition(".")
                found.setdefault((outer, inside, name), []).append(((path, name), value))
    return found
