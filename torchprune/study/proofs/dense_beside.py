"""The law of the dense model: what only masks leaves kept weights as they were, to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from torchprune.masking.mask import masked_layers
from torchprune.masking.parametrization import Record
from torchprune.masking.plain_state import slots_of
from torchprune.reports.report import RunRecord
from torchprune.specs.spec import Spec
from torchprune.structure.specs import LayerSpec
from torchprune.study.proofs.proof import Breaches, Check, unchecked
from torchprune.study.proofs.stored_files import differing
from torchprune.study.proofs.stored_layers import StoredLayer


def check_dense(
    dense: nn.Module,
    layers: Iterable[StoredLayer],
    others: Mapping[str, Tensor],
    runs: Sequence[RunRecord],
    *,
    resized: bool,
) -> Check:
    """Compare an artifact with the dense model that it was pruned from.

    Args:
        dense: unpruned; where its dtype differs it is cast to the artifact's.
        layers: the artifact's pruned layers.
        others: its other parameters, by name.
        resized: whether the artifact is shrunk.
    """
    why = why_not(runs, resized)
    if why:
        return unchecked("dense", why)
    if next(masked_layers(dense), None) is not None:
        return unchecked("dense", "the model given as dense carries masks itself")
    slots = slots_of(dense)
    found, count, weights, changed = Breaches(), 0, 0, 0
    for layer in layers:
        if layer.key not in slots:
            found.add(layer.key, "a tensor of the dense model", "none")
            continue
        was = _cast(slots[layer.key].tensor, layer.value)
        if layer.dense is not None:
            count += 1
            if wrong := differing(layer.dense, was):
                found.add(layer.key, "stored dense weights as the model's", f"{wrong:,} differ")
        if not keeps_values(layer.record, runs):
            changed += 1
            continue
        count += layer.dense is None
        weights += int(torch.count_nonzero(layer.keep))
        if wrong := differing(layer.value, was, layer.keep):
            found.add(layer.key, "kept weights bit-equal to the dense model's", f"{wrong:,} differ")
    if not changes_others(runs) and not changed:
        for key, value in others.items():
            if key not in slots:
                found.add(key, "a tensor of the dense model", "none")
            elif wrong := differing(value, _cast(slots[key].tensor, value)):
                found.add(key, "unpruned, as in the dense model", f"{wrong:,} differ")
    if not count and not found.count:
        return unchecked("dense", "every pruned layer is of a method that changes kept weights")
    said = "kept weights of methods that only mask, and stored dense values, the dense model's"
    if changed:
        said += f"; {changed} layers are of methods that change them"
    return found.judge("dense", said, layers=count, kept=weights)


def why_not(runs: Sequence[RunRecord], resized: bool) -> str | None:
    """Why kept weights may differ though the method only masks, or None."""
    if resized:
        return "the model is shrunk: what is left has other sizes"
    for run in runs:
        method = getattr(run.spec, "method", "")
        if method == "recover":
            return "it was trained after the pruning (recover)"
        if getattr(run.spec, "permute", False):
            return "permute put channels in another order"
    return None


def keeps_values(record: Record, runs: Sequence[RunRecord]) -> bool:
    """Whether what a mask keeps has the dense values: no run, not an earlier one either, changed
    them."""
    return not record.updates_weights and not (len(runs) > 1 and changes_others(runs))


def changes_others(runs: Sequence[RunRecord]) -> bool:
    """Whether what carries no mask may differ from the dense model, such as refitted biases."""
    return any(
        spec.changes_weights if isinstance(spec, Spec) else not isinstance(spec, LayerSpec)
        for spec in (run.spec for run in runs)
    )


def _cast(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.detach().to(device=like.device, dtype=like.dtype)


MASKS_ONLY = ("magnitude", "wanda", "ria", "given", "zeros", "layers")
"""Methods whose name alone says that kept weights stay, where a record says no more."""


def plain_record(method: str, pattern: str, note: str) -> Record:
    """The record that an export's report makes of a layer."""
    return Record(method, pattern, updates_weights=method not in MASKS_ONLY, note=note)
