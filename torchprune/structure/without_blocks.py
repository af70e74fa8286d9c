"""A transformers model without some of its blocks, and its configuration, which says so."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from torchprune.errors import ShrinkError
from torchprune.masking.plain_state import slots_of
from torchprune.structure.cuts import Cut, cut
from torchprune.structure.fewer_blocks import Found, Search, said
from torchprune.structure.resize import drop_blocks
from torchprune.structure.snapshot import Snapshot
from torchprune.structure.stock import (
    CLASS,
    Trait,
    Traits,
    make,
    read,
    settings_of,
    tables_of,
    traits_of,
    unlike,
)

_TOLD = 3
_OFFERED = 40
"""Runs of blocks that are tried, to say what could go instead."""


def drop_configured(model: nn.Module, blocks: Sequence[str], problem_of: Callable[[], str]) -> None:
    """Take blocks out of a transformers model; its configuration says so afterwards.

    The law: the class makes of the new configuration, read from its file, a model that is alike in
    every module: classes, sizes of tensors, plain attributes and computed tables.

    Args:
        problem_of: how the model computes otherwise than it should, or an empty string. It decides
            between settings that no module tells apart.

    Raises:
        ShrinkError: no configuration of the class says that these blocks are gone. The model may be
            changed in part.
    """
    search = Search(model, blocks, copy.deepcopy(model.config))
    several = search.nearest()
    if not several[0].fits:
        raise ShrinkError(_refusal(search, several[0]))
    for found in several:
        before, last = Snapshot(model), found is several[-1]
        try:
            drop_blocks(model, blocks)
            _take_over(model, search, found)
            _check_file(model, search, found)
        except ShrinkError:
            if last:
                raise
        else:
            if last or not problem_of():
                return
        before.restore()


def _take_over(model: nn.Module, search: Search, found: Found) -> None:
    """Set what counts blocks, on modules and in every configuration that they hold."""
    old = dict(search.reduced.named_modules())
    new = dict(search.made(found.settings).named_modules())
    modules = dict(model.named_modules())
    for path, name in found.follows:
        if path in modules and path in new and name in vars(new[path]):
            modules[path].__dict__[name] = copy.deepcopy(vars(new[path])[name])
    cuts = []
    for (path, name), (axis, part, blocks) in found.parts.items():
        keep = torch.cat([torch.arange(part) + at * part for at in blocks])
        whole = search.want[path, name][axis]
        cuts.append(Cut(f"{path}.{name}" if path else name, axis, whole, keep))
    cut(slots_of(model), cuts)
    seen: set[int] = set()
    for path, module in modules.items():
        holders = (module, old.get(path), new.get(path))
        own, before, after = (getattr(holder, "config", None) for holder in holders)
        if all(hasattr(config, "to_dict") for config in (own, before, after)):
            _change(own, before, after, seen)


def _change(config: Any, before: Any, after: Any, seen: set[int]) -> None:
    """Change a configuration as another one differs from what it was before."""
    if id(config) in seen:
        return
    seen.add(id(config))
    held, old, new = config.__dict__, before.__dict__, after.__dict__
    for name in {**old, **new}:
        one, two = old.get(name), new.get(name)
        if hasattr(one, "to_dict") and hasattr(two, "to_dict"):
            if hasattr(held.get(name), "to_dict"):
                _change(held[name], one, two, seen)
        elif name not in new:
            held.pop(name, None)
        elif name not in old or one != two:
            held[name] = copy.deepcopy(two)


def _told_by_files(model: nn.Module, search: Search, traits: Sequence[Trait]) -> list[Trait]:
    """Those that are no others for the model with all its blocks read from its own file: where a
    model was loaded from is none of them."""
    if not traits:
        return []
    own = make(model, read(search.config, settings_of(search.config, whole=False)))
    anyway = unlike(traits_of(search.whole()), traits_of(own))
    return [trait for trait in traits if trait not in anyway]


def _check_file(model: nn.Module, search: Search, found: Found) -> None:
    """Compare what is made of the configuration's file, tables computed, with what is wanted."""
    name = type(model).__name__
    try:
        again = make(
            model, read(model.config, settings_of(model.config, whole=False)), buffers=True
        )
    except Exception as error:  # whatever its class makes of its own file
        raise ShrinkError(
            f"{', '.join(search.blocks)}: a {name} without them has a configuration that cannot be "
            f"read from its file ({said(error)}); drop others with LayerSpec(ignore=...)"
        ) from None
    reduced = search.whole(buffers=True)
    drop_blocks(reduced, search.blocks)
    wrong, follows, parts = search.apart(traits_of(reduced), traits_of(again))
    apart = (follows.keys() ^ found.follows.keys()) | (parts.keys() ^ found.parts.keys())
    if other := _told_by_files(model, search, [*wrong, *sorted(apart)]):
        raise ShrinkError(
            f"{', '.join(search.blocks)}: read from a file, the configuration of a {name} without "
            f"them makes {'.'.join(filter(None, other[0]))} otherwise; drop others with "
            "LayerSpec(ignore=...)"
        )
    want, got = tables_of(reduced), tables_of(again)
    for key, table in want.items():
        unused = key not in got and not any(key.startswith(f"{name}.") for name in search.lists)
        if not unused and (key not in got or not torch.equal(table, got[key])):
            raise ShrinkError(
                f"{', '.join(search.blocks)}: {key} of a {name} follows from how many blocks stand "
                "before it, and would be another without them; drop the last ones, or those of "
                "other kinds"
            )


# -- refusing --------------------------------------------------------------------------------------


def _refusal(search: Search, found: Found) -> str:
    name = type(search.model).__name__
    gone = ", ".join(search.blocks)
    if found.why:
        why = f"its class refuses the settings that would ({found.why})"
    else:
        got = traits_of(search.made(found.settings))
        told = [_difference(search, got, trait) for trait in _outermost(found)]
        more = f" and {len(told) - _TOLD} more" if len(told) > _TOLD else ""
        why = f"with what comes nearest {'; '.join(told[:_TOLD])}{more}"
    return (
        f"{gone}: the configuration of a {name} cannot say that these blocks are gone: {why}. "
        f"{_offer(search)}"
    )


def _outermost(found: Found) -> list[Trait]:
    """What differs, without what lies inside a module that is another one or is none."""
    other = {path for path, name in found.wrong if name == CLASS}
    inside = [t for t in found.wrong if any(_within(t[0], path) for path in other)]
    whole = [t for t in found.wrong if t[1] == CLASS or t[0] not in other]
    return [trait for trait in whole if trait not in inside]


def _within(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}.") or (outer == "" and path != "")


def _difference(search: Search, made: Traits, trait: Trait) -> str:
    """One difference, by the name that the block had."""
    path, name = trait
    want: Any = search.want.get(trait)
    got: Any = made.get(trait)
    what = f"{_old_name(search, path)}{'' if name == CLASS else f'.{name}'}"
    if trait not in search.want:
        return f"there is {what}, which belongs to none that stays"
    if trait not in made:
        return f"there is no {what}"
    if name == CLASS:
        return f"{what} is a {got.__name__} instead of a {want.__name__}"
    return f"{what} is {got!r:.60} instead of {want!r:.60}"


def _old_name(search: Search, path: str) -> str:
    for held, (before, gone) in search.lists.items():
        if path.startswith(f"{held}."):
            place, _, inside = path[len(held) + 1 :].partition(".")
            kept = [at for at in range(before) if at not in gone]
            if place.isdecimal() and int(place) < len(kept):
                return ".".join(filter(None, (held, str(kept[int(place)]), inside)))
    return path or "the model"


def _offer(search: Search) -> str:
    """Which blocks in a row could go instead."""
    found = list(itertools.islice(_sayable(search), 4))
    if not found:
        return "No blocks of this list can be named in it that could go instead"
    return f"What it can say: without {', or without '.join(found)} (LayerSpec(targets=[...]))"


def _sayable(search: Search) -> Iterator[str]:
    for held, (before, gone) in search.lists.items():
        names = list(search.model.get_submodule(held)._modules)
        tried = 0
        for count in dict.fromkeys((len(gone), *range(1, before))):
            for start in range(before - count, -1, -1):
                if (tried := tried + 1) > _OFFERED:
                    return
                run = [f"{held}.{name}" for name in names[start : start + count]]
                other = Search(search.model, run, search.config).nearest(far=False)
                if other[0].fits:
                    yield run[0] if count == 1 else f"{run[0]} to {run[-1]}"
