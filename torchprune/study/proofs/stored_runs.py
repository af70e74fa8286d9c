"""The laws of what a stored model computes: folded, saved again, lowered, taken back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from torchprune.checkpoint.beside import Convert
from torchprune.checkpoint.encoding import Decoded
from torchprune.checkpoint.manifest import Manifest, read_manifest
from torchprune.checkpoint.save_load import save
from torchprune.errors import LoweringError
from torchprune.lowering.lower import lift, lower
from torchprune.masking.mask import densify, fold, masked_layers
from torchprune.masking.packing import masked
from torchprune.masking.plain_state import slots_of
from torchprune.study.proofs.proof import Breaches, Check, unchecked
from torchprune.study.proofs.seeded_inputs import outputs_of
from torchprune.study.proofs.stored_files import both_ways, differing
from torchprune.study.proofs.stored_layers import of_model

ALLOWED = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2, torch.float64: 1e-6}
"""Largest difference of a lowered model's outputs, relative to the largest output, by dtype."""


def check_fold(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Check, list[Tensor]]:
    """Fold a model, in place: effective weights and outputs stay, to the bit.

    Returns:
        the check, and the folded model's outputs.
    """
    found = Breaches()
    before = outputs_of(model, inputs) if inputs else []
    acting = {layer.key: layer.value for layer in of_model(model)}
    fold(model)
    slots = slots_of(model)
    for key, value in acting.items():
        if key not in slots or slots[key].mask is not None:
            found.add(key, "a plain weight after folding", "none")
        elif wrong := differing(slots[key].tensor.detach(), value):
            found.add(key, "the masked weight, to the bit", f"{wrong:,} weights differ")
    after = outputs_of(model, inputs) if inputs else []
    compare_bits("outputs on seeded inputs", before, after, found)
    said = "folded weights and outputs on seeded inputs bit-equal to the masked model's"
    if not inputs:
        said = "folded weights bit-equal to the masked ones; no outputs: its inputs are unknown"
    numbers = {"layers": len(acting), "outputs": sum(t.numel() for t in after)}
    return found.judge("fold", said, **numbers), after


def compare_bits(where: str, one: list[Tensor], two: list[Tensor], found: Breaches) -> None:
    """Note tensors that differ in any bit."""
    if len(one) != len(two):
        found.add(where, f"{len(one)} tensors", len(two))
        return
    for at, (want, got) in enumerate(zip(one, two, strict=True)):
        if wrong := differing(want, got):
            found.add(f"{where} ({at})", "the same bits", f"{wrong:,} of {want.numel():,} differ")


def check_round_trip(model: nn.Module, home: Path, manifest: Manifest, convert: Convert) -> Check:
    """Save a loaded model again: every tensor, mask and record comes back bit for bit."""
    found, size = Breaches(), 0
    with _scratch(home) as again:
        save(model, again)
        written = read_manifest(again)
        same_file = _same_weights(home, again, manifest)
        mine = {k for k, e in manifest.tensors.items() if e.kind != "transient"}
        theirs = {k for k, e in written.tensors.items() if e.kind != "transient"}
        for key in sorted(mine ^ theirs):
            found.add(key, "the same tensors saved again", "one more or one less")
        with (
            both_ways(home, manifest, convert) as (_, old),
            both_ways(again, written, convert) as (_, new),
        ):
            for key in sorted(mine & theirs):
                one, two = manifest.tensors[key], written.tensors[key]
                if one.record != two.record or one.to != two.to:
                    found.add(key, f"the record {one.record}", two.record)
                if one.to is not None or two.to is not None:
                    continue
                size += one.numel
                if same_file:
                    continue
                a, b = old.decode(key), new.decode(key)
                if not _same_mask(a.mask, b.mask):
                    found.add(key, "the same mask saved again", "another one")
                    continue
                if a.mask is not None:
                    a, b = _acting(a), _acting(b)
                wrong = differing(a.value, b.value)
                if a.dense is not None:
                    wrong += differing(a.dense, b.dense if b.dense is not None else a.dense[:0])
                if wrong:
                    found.add(key, "the same bits saved again", f"{wrong:,} weights differ")
        if [run.spec for run in manifest.runs] != [run.spec for run in written.runs]:
            found.add("the runs", "the same specs saved again", "others")
    said = "saved again: tensors, masks, records and specs come back bit for bit"
    if same_file:
        said += ", the weights file byte for byte"
    return found.judge("round trip", said, tensors=len(mine), values=size)


def _same_mask(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    return torch.equal(one, two)


def _acting(read: Decoded) -> Decoded:
    assert read.mask is not None
    return Decoded(masked(read.value, read.mask), None, read.dense)


def _same_weights(home: Path, again: Path, manifest: Manifest) -> bool:
    if manifest.beside:
        return False
    one, two = home / manifest.weights, again / manifest.weights
    if one.stat().st_size != two.stat().st_size:
        return False
    with one.open("rb") as first, two.open("rb") as second:
        pieces = iter(partial(first.read, 1 << 24), b"")
        return all(piece == second.read(len(piece)) for piece in pieces)


@contextmanager
def _scratch(home: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="torchprune-verify-") as made:
        yield Path(made) / home.resolve().name


def check_sizes(model: nn.Module, resized: bool) -> Check:
    """The sizes that modules state are those of their tensors."""
    if not resized:
        return unchecked("shrink", "the model has the sizes of its class and configuration")
    found, count = Breaches(), 0
    for path, module in model.named_modules():
        for name, axis in _AXES.get(type(module).__mro__[0].__name__, {}).items():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor):
                count += 1
                said, size = getattr(module, name), weight.shape[axis]
                if said != size:
                    found.add(path, f"{name} {said}", f"a weight {tuple(weight.shape)}")
    said = "what is recorded of the shrunk sizes builds the stored tensors, and modules agree"
    return found.judge("shrink", said, sizes=count)


_AXES = {
    "Linear": {"out_features": 0, "in_features": 1},
    "Conv2d": {"out_channels": 0},
    "Conv1d": {"out_channels": 0},
    "Conv1D": {"nf": 1, "nx": 0},
    "Embedding": {"num_embeddings": 0, "embedding_dim": 1},
    "BatchNorm2d": {"num_features": 0},
}


def check_lower(model: nn.Module, inputs: Mapping[str, Tensor], expected: list[Tensor]) -> Check:
    """Lower a folded model to bitmasks, in place, and lift it again.

    Args:
        expected: the folded model's outputs.
    """
    folded = {key: slot.tensor.detach() for key, slot in slots_of(model).items()}
    try:
        lower(model, "bitmask")
    except LoweringError as error:
        return unchecked("lower", f"{error!s:.200}")
    found, worst = Breaches(), 0.0
    got = outputs_of(model, inputs) if inputs else []
    for at, (one, two) in enumerate(zip(expected, got, strict=True)):
        allowed = ALLOWED.get(one.dtype, 1e-4)
        off = relative(one, two)
        worst = max(worst, off)
        if not off <= allowed:
            found.add(f"outputs ({at})", f"within {allowed:g} of the largest output", f"{off:.3g}")
    lift(model)
    changed = 0
    for key, slot in slots_of(model).items():
        changed += 1
        if key in folded and (wrong := differing(slot.tensor.detach(), folded[key])):
            found.add(key, "the folded weight after lift, to the bit", f"{wrong:,} differ")
    said = "lowered to bitmasks: outputs within the dtype's tolerance, and lifted bit for bit"
    return found.judge("lower", said, tensors=changed, difference=worst)


def relative(one: Tensor, two: Tensor) -> float:
    """Largest difference over the largest value; inf where shapes or NaNs differ."""
    if one.shape != two.shape:
        return float("inf")
    a, b = one.double(), two.double()
    if bool((a.isnan() != b.isnan()).any()):
        return float("inf")
    same = (a == b) | a.isnan()
    worst = float(torch.where(same, 0.0, (a - b).abs()).max()) if a.numel() else 0.0
    largest = float(a.nan_to_num(0.0, 0.0, 0.0).abs().max()) if a.numel() else 0.0
    return worst / largest if largest else worst


def check_densify(model: nn.Module, found: Breaches) -> int:
    """Densify a model, in place, and compare with the dense values that its masks held.

    Returns:
        how many layers came back.
    """
    kept = {
        layer.key: None if mask.dense is None else mask.dense.clone()  # densify gives it away
        for layer, mask in masked_layers(model)
    }
    acting = {layer.key: (layer.value, layer.keep) for layer in of_model(model)}
    densify(model)
    slots = slots_of(model)
    for key, dense in kept.items():
        tensor = slots[key].tensor.detach()
        if dense is not None and (wrong := differing(tensor, dense)):
            found.add(key, "the stored dense weight after densify", f"{wrong:,} differ")
        elif dense is None and (wrong := differing(tensor, *acting[key])):
            found.add(key, "kept weights unchanged by densify", f"{wrong:,} differ")
    return len(kept)
