"""Which rows that layers read come from tokens, and which from padding.

No shape and no name says so for every model. So a batch that holds padding has a shadow: the same
call with other content at the padding. The shadow runs through the same weights, before its batch.
What a layer reads of a token is then the same in both, what it reads of padding is not: rows are
told apart by looking at both. A batch without padding has no shadow and costs nothing.

Rows are compared to the bit. Where that explains little, since matrix products of other sizes round
otherwise (behind routed experts), they are compared within what rounding may explain. Where padding
reaches what the layers read of tokens, nothing can be seen: there a row counts if the mask, laid
over the rows in the order in which most of the padding differs, says that it is a token's, and
where no mask can be laid over them all rows count. The report says which layers that were.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from torchprune import modes
from torchprune.calibration.batches import Batch
from torchprune.calibration.nested import Path, mapped, tensors_in
from torchprune.calibration.own_padding import Ids, follow
from torchprune.calibration.pad_masks import PadMask, changed
from torchprune.calibration.pad_search import masks_of_all
from torchprune.calibration.row_prints import Prints, distances, found_in, nearest

_VARIANTS = 4
"""Contents tried at the padding, should a model refuse some."""

_APART = 4.0
"""How many times farther than any token's row the usual padding's is, where rounding in an unknown
precision is all that sets tokens' rows apart."""


@dataclass(eq=False)
class _Known:
    """What is known of one batch's padding.

    Attributes:
        masks: where it is.
        given: whether the user said so.
        seen: by place, what the shadow read there, visit by visit.
        visits: by place, the last visit there, of the batch and of its shadow.
        leaked: whether padding reached tokens' rows already.
        blind: whether there is no shadow.
    """

    masks: list[PadMask]
    given: bool = False
    seen: dict[Hashable, dict[int, list[Prints]]] = field(default_factory=dict)
    visits: dict[tuple[Hashable, bool], int] = field(default_factory=dict)
    leaked: bool = False
    blind: bool = False


class Padding:
    """The padding of all batches, and what became of it on the way through the model.

    Args:
        model: what the batches are for. It runs a few times where a batch leaves open which of its
            tensors is the mask.
        batches: all of them.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self._model, self._batches = model, batches
        self._known = {
            index: _Known(masks, given=batches[index].tokens is not None)
            for index, masks in masks_of_all(model, batches).items()
        }
        for known in self._known.values():
            known.blind = not any(mask.contents for mask in known.masks)
        self._by_mask: dict[str, None] = {}
        self._whole: dict[str, None] = {}

    def shadowed(self) -> list[int]:
        """The batches that have shadows."""
        return [index for index, known in self._known.items() if not known.blind]

    def shadow(self, index: int, variant: int = 0) -> Batch:
        """A batch with other content at its padding."""
        batch, new = self._batches[index], dict[Path, Tensor]()
        for mask in self._known[index].masks:
            for content in mask.contents:
                path = content.leaf.path
                x = new.get(path, content.leaf.tensor)
                new[path] = changed(x, mask, content, variant)
        args, kwargs = mapped((batch.args, batch.kwargs), lambda path, x: new.get(path, x))
        return Batch(args, kwargs)

    def run_shadow(self, index: int, forward: Callable[[Batch], object]) -> None:
        """Run a shadow; where the model refuses it, with other content."""
        known = self._known[index]
        for variant in range(_VARIANTS):
            known.seen.clear()
            known.visits = {key: last for key, last in known.visits.items() if not key[1]}
            shadow = self.shadow(index, variant)
            with ExitStack() as stack, suppress(Exception):  # a model may be particular
                for mask in list(known.masks):
                    follow(stack, self._model, _ids(mask, shadow), partial(_lengthen, known, mask))
                forward(shadow)
                return
        known.blind = True

    def visit(self, index: int, place: Hashable, *, shadow: bool) -> int:
        """How often a batch, or its shadow, was at a place before; now it is there once more."""
        known = self._known.get(index)
        if known is None:
            return 0
        count = known.visits[place, shadow] = known.visits.get((place, shadow), -1) + 1
        return count

    def note(self, index: int, place: Hashable, visit: int, rows: Sequence[Tensor]) -> None:
        """What a shadow reads: per group a (rows, cols) matrix."""
        with modes.exact():
            prints = [Prints(x).kept() for x in rows]
        self._known[index].seen.setdefault(place, {})[visit] = prints

    def forget(self, index: int | None = None, places: Sequence[Hashable] = ()) -> None:
        """Let go of what shadows read: of one, or at some places."""
        for other, known in self._known.items():
            if other == index:
                known.seen.clear()
            for place in places:
                known.seen.pop(place, None)

    def tokens(
        self,
        index: int,
        place: Hashable,
        visit: int,
        rows: Sequence[Tensor],
        name: str,
        *,
        loose: bool,
    ) -> list[Tensor | None]:
        """Which rows of what a batch reads are tokens': per group bool, None if all are.

        Args:
            name: of the layer, for the report.
            loose: whether rows that a router chose may come here, and not all of the batch's.
        """
        known = self._known.get(index)
        if known is None:
            return [None] * len(rows)
        seen = known.seen.get(place, {}).get(visit)
        if known.blind or (seen is None and not loose):
            return [self._unseen(known, len(x), name) for x in rows]
        with modes.exact():
            found = []
            for group, x in enumerate(rows):
                other = None if seen is None else seen[group]
                mine = Prints(x, None if other is None else other.scale)
                found.append(self._compared(known, mine, other, name, loose=loose))
        return found

    def notes(self) -> Iterator[str]:
        """What the report should say."""
        if self._by_mask:
            yield (
                f"{_few(list(self._by_mask))}: padding reaches what they read of tokens; which "
                "rows are tokens' was read off the mask"
            )
        if self._whole:
            yield (
                f"{_few(list(self._whole))}: all rows counted, padding too: it cannot be told from "
                "tokens there (token_mask says what is padding)"
            )

    # -- judging ---------------------------------------------------------------------------------

    def _unseen(self, known: _Known, count: int, name: str) -> Tensor | None:
        """Which rows are tokens' where there is no shadow to compare with."""
        lays = _laid(known.masks, count)
        if known.given and lays:
            return lays[0].tokens
        self._whole[name] = None
        return None

    def _compared(
        self, known: _Known, mine: Prints, other: Prints | None, name: str, *, loose: bool
    ) -> Tensor | None:
        if not len(mine):
            return None
        if other is None or len(other) != len(mine):
            none = torch.zeros_like(mine.exact, dtype=torch.bool)
            alike = none if other is None else _found(mine, other)
            if bool(alike.any()) or (loose and not known.leaked):
                return alike
            self._all(known, name)
            return None
        same, empty = mine.exact == other.exact, mine.exact == 0
        if bool(same.all()) and not bool(empty.any()):
            return None
        lays = _laid(known.masks, len(mine))
        lay = _consistent(lays, same, empty)
        if lay is not None and (bool(same.all()) or 2 * lay.shown(same, empty) > lay.padding):
            return lay.tokens
        if bool(same.all()):
            return None
        far = distances(mine, other)
        near = same | (far <= mine.tolerance)
        if lay is not None and not bool(near.all()):  # else a token that rounds may look like it
            return lay.tokens
        if (lay := _consistent(lays, near, empty)) is not None:
            return lay.tokens
        if (lay := _set_apart(lays, far)) is not None:
            return lay.tokens
        if bool(near.all()):  # nothing of padding is read here
            return None
        if loose and not lays:  # rows may have come here by other ways, in another order
            alike = same | _found(mine, other)
            if known.leaked and not bool(alike.any()):
                self._all(known, name)
                return None
            return alike
        if lays := lays or _stretched(known.masks, len(mine)):
            return self._by_item(known, lays, same, near, name)
        alike = same if 2 * int(same.sum()) >= int(near.sum()) else near
        if bool(alike.any()):
            return alike
        self._all(known, name)
        return None

    def _by_item(
        self,
        known: _Known,
        lays: Sequence[_Lay],
        same: Tensor,
        near: Tensor,
        name: str,
    ) -> Tensor:
        """Rows of all items, of which some read padding beside tokens (a convolution's at the edge)
        or, in some items, padding reached all."""
        lay = max(lays, key=lambda one: one.fit(same))
        if known.given:
            return lay.tokens
        of_all, of_same, of_near = (
            lay.by_item(rows) for rows in (lay.tokens, same & lay.tokens, near & lay.tokens)
        )
        drowned = (of_near < of_all) & (2 * of_same < of_near.clamp_min(1))
        if bool(drowned.any()):
            known.leaked = True
            self._by_mask[name] = None
        exactly = (2 * of_same >= of_near)[lay.items]
        return torch.where(drowned[lay.items], lay.tokens, torch.where(exactly, same, near))

    def _all(self, known: _Known, name: str) -> None:
        known.leaked = True
        self._whole[name] = None


def _ids(mask: PadMask, shadow: Batch) -> Iterator[Ids]:
    """The ids that a mask is of, as a shadow has them."""
    paths = dict(tensors_in((shadow.args, shadow.kwargs)))
    for content in mask.contents:
        if content.layout == "items first":
            leaf = content.leaf
            ids = Ids.of(leaf.tensor, paths[leaf.path], mask.tokens)
            if ids is not None:
                yield ids


def _lengthen(known: _Known, mask: PadMask, front: int, behind: int) -> None:
    """Note that a model has put more padding in front of a mask's rows or behind them."""
    tokens = torch.nn.functional.pad(mask.tokens, (front, behind), value=False)
    if not any(torch.equal(tokens, other.tokens) for other in known.masks):
        known.masks.append(replace(mask, tokens=tokens, contents=()))


def counted(rows: Sequence[Tensor], counts: Sequence[Tensor | None]) -> list[Tensor]:
    """The rows that count, per group; of a run of other sizes, which nothing is known of, all."""
    return [
        x if count is None or len(count) != len(x) else x[count]
        for x, count in zip(rows, counts, strict=True)
    ]


# -- masks over rows -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Lay:
    """A mask laid over the rows of a matrix in some order: which are tokens', and whose."""

    tokens: Tensor
    items: Tensor

    @property
    def padding(self) -> int:
        """How many rows are padding's."""
        return int((~self.tokens).sum())

    def shown(self, alike: Tensor, empty: Tensor) -> int:
        """How many of these can be seen to be: they are not alike, or all zeros."""
        return int((~self.tokens & (empty | ~alike)).sum())

    def by_item(self, rows: Tensor) -> Tensor:
        """How many of some rows each item has."""
        count = torch.zeros(int(self.items.max()) + 1, dtype=torch.int64, device=rows.device)
        return count.index_add_(0, self.items, rows.long())

    def fit(self, same: Tensor) -> tuple[float, int]:
        """How much of the padding differs, and how many items' tokens do all or not at all."""
        pads = ~self.tokens
        differing = float((pads & ~same).sum()) / max(1, self.padding)
        count, alike = self.by_item(self.tokens), self.by_item(self.tokens & same)
        return differing, int(((alike == 0) | (alike == count)).sum())


def _laid(masks: Sequence[PadMask], count: int) -> list[_Lay]:
    """All ways to lay masks over so many rows: item by item or position by position, and where
    there are several rows a token, in any place among these."""
    found: list[_Lay] = []
    for mask in masks:
        tokens = mask.tokens
        times, rest = divmod(count, tokens.numel())
        if rest or not times:
            continue
        items = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)
        orders = [(0, 1, 2), (1, 0, 2)]
        if times > 1:
            orders += [(0, 2, 1), (2, 0, 1), (1, 2, 0), (2, 1, 0)]
        for order in orders:
            one, two = (
                x[..., None].expand(*x.shape, times).permute(order).reshape(-1)
                for x in (tokens, items)
            )
            if not any(torch.equal(one, lay.tokens) for lay in found):
                found.append(_Lay(one, two))
    return found


def _stretched(masks: Sequence[PadMask], count: int) -> list[_Lay]:
    """Masks laid item by item over rows of which an item has more or fewer than positions."""
    found = []
    for mask in masks:
        items, length = mask.tokens.shape
        each, rest = divmod(count, items)
        if not rest and each:
            place = (2 * torch.arange(each, device=mask.tokens.device) + 1) * length // (2 * each)
            owner = torch.arange(items, device=place.device).repeat_interleave(each)
            found.append(_Lay(mask.tokens[:, place].reshape(-1), owner))
    return found


def _consistent(lays: Sequence[_Lay], alike: Tensor, empty: Tensor) -> _Lay | None:
    """The lay all of whose tokens' rows are alike, with most of the padding's that are not, or that
    are all zeros (attention gives these to a query that may attend to nothing).

    Where every row is alike, half of the padding's must be zeros.
    """
    best, most = None, 0.5 if bool(alike.all()) else 0.0
    for lay in lays:
        if bool((lay.tokens & ~alike).any()):
            continue
        share = lay.shown(alike, empty) / max(1, lay.padding)
        if share > most or (best is None and share == most):
            best, most = lay, share
    return best


def _set_apart(lays: Sequence[_Lay], far: Tensor) -> _Lay | None:
    """The lay whose padding is usually much farther than any token."""
    best, most = None, _APART
    for lay in lays:
        if not bool(lay.tokens.any()):
            continue
        gap = float(far[~lay.tokens].median() / far[lay.tokens].max().clamp_min(1e-12))
        if gap > most:
            best, most = lay, gap
    return best


def _found(mine: Prints, other: Prints) -> Tensor:
    """Rows that the other has too, to the bit or within rounding: where other rows go through the
    same products, these round otherwise."""
    same = found_in(mine, other)
    return same if bool(same.all()) else same | (nearest(mine, other) <= mine.tolerance)


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more layers"
