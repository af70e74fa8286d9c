"""The laws that every family obeys. Each gives what is wrong, or an empty string."""

from __future__ import annotations

import copy
import inspect
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from plain_wanda import Sums, blocks_of, difference, sums_by_block, sums_by_layer
from torch import Tensor, nn
from zoo import EXPERTS, VOCABULARY, Built, leaves

import torchprune
from torchprune import LayerSpec, WandaSpec
from torchprune.errors import ShrinkError, TargetError
from torchprune.export import to_hf
from torchprune.masking.selection import repeated_blocks
from torchprune.structure.plan import idle_blocks_plan

Law = Callable[[Built], str]


def pruned(built: Built, data: list[Any], **options: Any) -> nn.Module:
    """A copy with masks."""
    model = copy.deepcopy(built.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torchprune.sparsify(model, WandaSpec(**options), data, progress=False)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def _folded(built: Built, masks: dict[str, Tensor]) -> nn.Module:
    """The dense model with weights set to zero, by nothing of the library."""
    model = copy.deepcopy(built.model)
    own = weights_of(model)
    with torch.no_grad():
        for name, mask in masks.items():
            own[name].mul_(mask)
    return model


def _eager(model: nn.Module) -> nn.Module:
    """Experts one by one, in products that are seen; no caches, with which some do otherwise."""
    for module in model.modules():
        if getattr(getattr(module, "config", None), "use_cache", None) is True:
            cast(Any, module).config.use_cache = False
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def _compared(built: Built, masks: dict[str, Tensor], sums: dict[str, Sums], pattern: Any) -> str:
    dense = weights_of(built.model)
    wrong = {}
    for name, mask in masks.items():
        why = difference(dense[name], mask, sums[name], pattern) if name in sums else ""
        if why and not why.endswith("never multiplied"):  # nothing is known of what nobody read
            wrong[name] = why
    few = [f"{name}: {why}" for name, why in list(wrong.items())[:2]]
    return f"{len(wrong)} of {len(masks)} masks: " + "; ".join(few) if wrong else ""


def by_layer(built: Built, **options: Any) -> str:
    """Masks are the plain loop's, layer after layer."""
    data = built.data()
    model = pruned(built, data, sequential="layer", **options)
    masks = _matrices(model)
    final, often = _eager(_folded(built, masks)), _read_often(model, masks)
    sums = sums_by_layer(final, [name for name in masks if name not in often], data)
    sums |= sums_by_layer(_eager(copy.deepcopy(built.model)), often, data)
    return _compared(built, masks, sums, (2, 4) if options else 0.5)


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    return {name: mask for name, mask in torchprune.masks(model).items() if mask.dim() > 1}


def _read_often(model: nn.Module, masks: dict[str, Tensor]) -> list[str]:
    """What the report says is read more than once in a forward."""
    notes = [note for note in torchprune.report(model).notes if " is read more than once " in note]
    said = {note.partition(" ")[0] for note in notes}
    return [name for name in masks if name in said or name.removesuffix(".weight") in said]


def headline(built: Built) -> str:
    """So they are of 2:4."""
    return by_layer(built, pattern="2:4")


def by_block(built: Built) -> str:
    """Masks are the plain loop's, block after block."""
    if not blocks_of(built.model):
        return ""
    data = built.data()
    model = pruned(built, data, sequential="block")
    masks = _matrices(model)
    dense, often = _eager(copy.deepcopy(built.model)), _read_often(model, masks)
    sums = sums_by_layer(dense, often, data)
    single = [name for name in masks if name not in often]
    sums |= sums_by_block(dense, _folded(built, masks), single, data, often)
    return _compared(built, masks, sums, 0.5)


def padding(built: Built) -> str:
    """Masks stay when the embedding of padding changes."""
    tokens = built.data(1)[0]
    names = inspect.signature(built.model.forward).parameters
    if "input_ids" not in tokens or "attention_mask" not in names:
        return "skip: takes no padding"
    ids, seen = tokens["input_ids"].clone(), torch.ones_like(tokens["input_ids"])
    pad = 0
    ids[1, -4:], seen[1, -4:] = pad, 0
    batch = {**tokens, "input_ids": ids, "attention_mask": seen}
    try:
        table = built.model.get_input_embeddings()
    except NotImplementedError:
        return "skip: no table of embeddings"
    if not hasattr(table, "weight"):
        return "skip: no table of embeddings"
    row = torch.randn(table.weight.shape[1], generator=torch.Generator().manual_seed(3))
    masks, outs = [], []
    for scale in (0.02, 1.0):
        twin = copy.deepcopy(built)
        own = twin.model.get_input_embeddings().weight
        with torch.no_grad():
            own[pad] = row * scale
            try:
                out = next(leaves(twin.model(**copy.deepcopy(batch))))
            except Exception as error:  # the tiny model's own, before anything is pruned
                return f"skip: it takes no mask ({type(error).__name__})"
        outs.append(out)
        masks.append(torchprune.masks(pruned(twin, [batch])))
    if "decoder_input_ids" in batch:
        real = torch.ones(outs[0].shape[:2], dtype=torch.bool)
    else:
        real = seen.bool()
    if outs[0].shape[:2] != real.shape:
        return f"skip: outputs {tuple(outs[0].shape)} are not tokens"
    one, two = (o[real] for o in outs)
    if one.shape[-1] >= VOCABULARY:  # a head tied to the embeddings tells padding otherwise
        one, two = one[..., pad + 1 :], two[..., pad + 1 :]
    if not torch.allclose(one, two, rtol=1e-4, atol=1e-5):
        return f"skip: the model itself reads padding ({float((one - two).abs().max()):.2g})"
    apart = {k: int((m != masks[1][k]).sum()) for k, m in masks[0].items()}
    bits = sum(mask.numel() for mask in masks[0].values())
    wrong = [k for k, count in apart.items() if count]
    if not wrong:
        return ""
    return (
        f"{len(wrong)} of {len(apart)} masks change with padding "
        f"({sum(apart.values()) / bits:.2%} of their bits): {wrong[:3]}"
    )


def coverage(built: Built) -> str:
    """Most of the weights that multiply in the blocks carry masks, routers do not."""
    data = built.data()
    masks = torchprune.masks(pruned(built, data))
    blocks = blocks_of(built.model)
    names = [
        name
        for name, p in built.model.named_parameters()
        if p.dim() > 1 and (not blocks or any(name.startswith(f"{b}.") for b in blocks))
    ]
    sums = sums_by_layer(_eager(copy.deepcopy(built.model)), names, data)
    own = weights_of(built.model)
    inside = {name: own[name] for name in names if bool((sums[name].row >= 0).any())}
    total = sum(p.numel() for p in inside.values())
    bare = {k: p.numel() for k, p in inside.items() if k not in masks}
    share = 1 - sum(bare.values()) / total if total else 1.0
    few = {1, EXPERTS} if built.variant.experts == EXPERTS else {1}  # no other size is five
    routers = [k for k in masks if k in inside and inside[k].dim() == 2 and len(inside[k]) in few]
    found = []
    if share < 0.9:
        most = sorted(bare, key=lambda k: -bare[k])[:3]
        found.append(f"covers {share:.0%}: not {[(k, tuple(inside[k].shape)) for k in most]}")
    if routers:
        found.append(f"routers pruned: {routers[:2]}")
    return "; ".join(found)


def saved(built: Built) -> str:
    """Saved and loaded to the bit; stock transformers gives the same logits."""
    data = built.data()
    model = pruned(built, data)
    with tempfile.TemporaryDirectory() as folder:
        torchprune.save(model, Path(folder, "own"))
        other = torchprune.load(Path(folder, "own"))
        one, two = torchprune.masks(model), torchprune.masks(other)
        if one.keys() != two.keys() or any(not torch.equal(one[k], two[k]) for k in one):
            return "masks differ after load"
        state, again = (torchprune.fold(copy.deepcopy(m)).state_dict() for m in (model, other))
        if state.keys() != again.keys():
            return f"names differ after load: {sorted(state.keys() ^ again.keys())[:3]}"
        if wrong := [k for k in state if not torch.equal(state[k], again[k])]:
            return f"{len(wrong)} tensors differ after load: {wrong[:3]}"
        if why := _logits(model, other, data[0]):
            return f"loaded: {why}"
        try:
            to_hf(model, Path(folder, "stock"))
        except torchprune.CheckpointError as error:
            return f"to_hf: {str(error)[:200]}"
        stock: Any = type(built.model)
        other = stock.from_pretrained(Path(folder, "stock"), attn_implementation="eager").eval()
        if why := _logits(model, other, data[0]):
            return f"stock: {why}"
    return ""


def shortened(built: Built) -> str:
    """Without a block of each list, stock transformers gives the same logits, or it is refused."""
    blocks, lists = repeated_blocks(built.model), {}
    for name in blocks:
        lists.setdefault(name.rpartition(".")[0], []).append(name)
    for names in lists.values():
        model, batch = copy.deepcopy(built.model), built.data(1)[0]
        gone = names[len(built.kind) % len(names)]
        try:
            torchprune.sparsify(model, LayerSpec(1, targets=gone), [batch], progress=False)
            torchprune.shrink(model, idle_blocks_plan(model, batch))
        except (ShrinkError, TargetError):
            continue
        with tempfile.TemporaryDirectory() as folder:
            to_hf(model, Path(folder, "stock"))
            stock: Any = type(built.model)
            other = stock.from_pretrained(Path(folder, "stock"), attn_implementation="eager")
            torchprune.save(model, Path(folder, "own"))
            for again in (other.eval(), torchprune.load(Path(folder, "own"))):
                if why := _logits(model, again, batch):
                    return f"without {gone}: {why}"
    return ""


def _logits(model: nn.Module, other: nn.Module, batch: dict[str, Any]) -> str:
    with torch.no_grad():
        torch.manual_seed(0)
        one = next(t for t in leaves(model(**copy.deepcopy(batch))) if t.is_floating_point())
        torch.manual_seed(0)
        two = next(t for t in leaves(other(**copy.deepcopy(batch))) if t.is_floating_point())
    if one.shape != two.shape or not torch.allclose(one, two, rtol=1e-5, atol=1e-6):
        return f"outputs differ by {float((one - two).abs().max()):.2g}"
    return ""


LAWS: dict[str, Law] = {
    "by_layer": by_layer,
    "by_block": by_block,
    "headline": headline,
    "padding": padding,
    "coverage": coverage,
    "saved": saved,
    "shortened": shortened,
}


_TIED = "its depths share a block by tying parameters of several modules, which carry no masks"

EXEMPT: dict[tuple[str, str], str] = {
    ("cpmant", "padding"): "rows of its prompt, which are no tokens, read padding",
    ("zamba", "coverage"): _TIED,
    ("zamba2", "coverage"): _TIED,
}
"""What cannot hold, and why; what begins to hold is to be taken off."""


def broken(built: Built) -> dict[str, str]:
    """The laws that a family breaks, and how."""
    found = {}
    for name, law in LAWS.items():
        if (built.kind, name) in EXEMPT:
            if not law(built):
                found[name] = "holds now: take it off the exempt ones"
            continue
        try:
            why = law(built)
        except Exception as error:  # one law's failure must not hide another's
            why = f"{type(error).__name__}: {error}"
        if why and not why.startswith("skip"):
            found[name] = why
    return found
