"""The padding masks of all batches; what the batches leave open is decided by trying.

What other content at the padding does not reach is right: of several readings that a batch allows,
the mask is the one under which the rows of tokens stay as they are when the padding changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchprune import modes
from torchprune.calibration.batches import Batch
from torchprune.calibration.nested import Path, mapped, tensors_in
from torchprune.calibration.pad_masks import (
    PadMask,
    changed,
    leaves_of,
    opened,
    readings_of,
    with_contents,
)
from torchprune.calibration.row_prints import Prints, distances

_Seen = list[tuple[torch.Size, Prints]]
_Decided = dict[tuple[object, ...], set[tuple[Path, bool]]]
"""What trying one batch told, for others of its form."""


def masks_of_all(model: nn.Module, batches: Sequence[Batch]) -> dict[int, list[PadMask]]:
    """The masks of every batch that holds padding, by its number."""
    found: dict[int, list[PadMask]] = {}
    decided: _Decided = {}
    for index, batch in enumerate(batches):
        masks = _given(model, batch) if batch.tokens is not None else _found(model, batch, decided)
        if masks:
            found[index] = _different(masks)
    return found


def _given(model: nn.Module, batch: Batch) -> list[PadMask]:
    assert batch.tokens is not None
    tokens = batch.tokens
    if bool(tokens.all()):
        return []
    leaves = leaves_of(batch, model.forward)
    masked = {m.path for m in readings_of(leaves)}
    rest = [leaf for leaf in leaves if leaf.path not in masked]
    return [with_contents(PadMask((), "", False, tokens), rest)]


def _found(model: nn.Module, batch: Batch, decided: _Decided) -> list[PadMask]:
    readings = readings_of(leaves_of(batch, model.forward))
    together: dict[Path, list[PadMask]] = {}
    for mask in readings:
        if mask.contents:
            together.setdefault(mask.contents[0].leaf.path, []).append(mask)
    if not together:  # there is padding, of something that nobody sees
        return readings[:1]
    masks = []
    for path, rivals in together.items():
        plain = [mask for mask in rivals if mask.is_plain]
        key = (path, *(mask.key for mask in rivals))
        if all(mask in plain for mask in rivals) and len(_different(plain)) == 1:
            masks.append(plain[0])
            continue
        if key not in decided:
            best = _tried(model, batch, rivals)
            decided[key] = set() if best is None else {best.key}
        masks += [mask for mask in rivals if mask.key in decided[key]]
    return [_with_its_own(model, batch, mask, decided) for mask in masks]


def _with_its_own(model: nn.Module, batch: Batch, mask: PadMask, decided: _Decided) -> PadMask:
    """A mask with the first of its contents and those others that it masks too.

    Vectors of as many positions may be an image's.
    """
    first, *others = mask.contents
    if not others:
        return mask
    key = ("contents", mask.key, first.leaf.path, *(c.leaf.path for c in others))
    if key not in decided:
        usual = _seen(model, batch)
        decided[key] = set()
        for content in others:
            new = {content.leaf.path: changed(content.leaf.tensor, mask, content, 0)}
            good, bad = _borne_out(mask.tokens, usual, _seen_with(model, batch, new))
            if good and not bad:
                decided[key].add((content.leaf.path, False))
    own = [c for c in others if (c.leaf.path, False) in decided[key]]
    return replace(mask, contents=(first, *own))


def _different(masks: Sequence[PadMask]) -> list[PadMask]:
    """Masks without those that say what one before them says of the same tensors."""
    kept: list[PadMask] = []
    for mask in masks:
        if not any(
            torch.equal(mask.tokens, other.tokens)
            and {c.leaf.path for c in mask.contents} <= {c.leaf.path for c in other.contents}
            for other in kept
        ):
            kept.append(mask)
    return kept


def _tried(model: nn.Module, batch: Batch, rivals: Sequence[PadMask]) -> PadMask | None:
    """The reading that changed padding bears out best, or None."""
    usual = _seen(model, batch)
    best: PadMask | None = None
    most: tuple[object, ...] = ()
    for mask in rivals:
        new = {c.leaf.path: changed(c.leaf.tensor, mask, c, 0) for c in mask.contents}
        good, bad = _borne_out(mask.tokens, usual, _seen_with(model, batch, new))
        named = mask.is_named
        if not good or (bad and not (named and mask.is_padding)):
            continue
        # Where nothing comes after padding but what may not attend to it, or nothing before it but
        # what may not look ahead, either reading bears out: then what is masked must matter.
        masks = len(rivals) > 1 and _matters(model, batch, mask, usual)
        score = (not bad, masks, good - bad, named, not mask.inverted)
        if best is None or score > most:
            best, most = mask, score
    return best


def _matters(model: nn.Module, batch: Batch, mask: PadMask, usual: _Seen) -> bool:
    """Whether tokens' rows change when nothing is masked."""
    x = dict(tensors_in((batch.args, batch.kwargs)))[mask.path]
    if x.dim() > 2:
        return False
    return (
        _borne_out(mask.tokens, usual, _seen_with(model, batch, {mask.path: opened(x, mask)}))[1]
        > 0
    )


def _seen_with(model: nn.Module, batch: Batch, new: Mapping[Path, Tensor]) -> _Seen:
    """What the model reads of a batch with other tensors; nothing if it refuses them."""
    args, kwargs = mapped((batch.args, batch.kwargs), lambda path, x: new.get(path, x))
    try:
        return _seen(model, Batch(args, kwargs))
    except Exception:  # whatever it has against them, they bear nothing out
        return []


def _seen(model: nn.Module, batch: Batch) -> _Seen:
    """Prints of what the innermost modules read and of what the model gives."""
    found: _Seen = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.extend(_prints((args, kwargs)))

    with modes.calibration_mode(model), torch.no_grad(), ExitStack() as stack:
        for module in model.modules():
            if next(module.children(), None) is None:
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        found.extend(_prints(batch.run(model)))
    return found


def _prints(value: Any) -> Iterator[tuple[torch.Size, Prints]]:
    for _, x in tensors_in(value):
        if x.is_floating_point() and x.dim() > 1 and x.numel():
            with modes.exact():
                unscaled = torch.ones(x.shape[-1], device=x.device)
                yield x.shape, Prints(x.reshape(-1, x.shape[-1]), unscaled).kept()


def _borne_out(tokens: Tensor, usual: _Seen, other: _Seen) -> tuple[int, int]:
    """At how many places only padding changed, and at how many tokens did too."""
    good = bad = 0
    for (shape, one), (other_shape, two) in zip(usual, other, strict=False):
        if shape != other_shape or len(one) % tokens.numel():
            continue
        differ = (one.exact != two.exact) & (distances(two, one) > one.tolerance)
        if not bool(differ.any()):
            continue
        times = len(one) // tokens.numel()
        rows = [t.repeat_interleave(times) for t in (tokens.reshape(-1), tokens.t().reshape(-1))]
        fits = any(not bool((differ & row).any()) for row in rows)
        good, bad = good + fits, bad + (not fits)
    return good, bad
