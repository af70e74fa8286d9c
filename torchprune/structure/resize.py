"""Modules whose tensors changed their sizes: what they say about themselves, made true again."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

from torchprune.masking.matrices import ConvNd, is_transposed_linear
from torchprune.structure.fewer_heads import STATED, with_its_heads
from torchprune.structure.weight_shape import weight_shape

Attributes = dict[str, dict[str, int]]
"""Module path -> attribute -> value."""

_HEADS = re.compile(
    r"(num|n|nr)_?((attention|attn|key_value|kv|query|q|local|total)_?)*heads?|heads|nheads?"
)
_WIDTHS = re.compile(
    r"(embed_dim|embedding_dim|all_head_size|inner_dim|split_size|inner_size|inner_features|"
    r"(q|kv|qkv|k|v|attn|attention|hidden|mlp|ffn|expanded|intermediate)_?(dim|size|features|width"
    r"|channels)|(in|out)_(channels|features))"
)
_NEVER = re.compile(
    r"(.*_)?(idx|index|id|seed|stride|padding|dilation|kernel_size)|head_dim|d_head"
)
_REPEATS = ("num_key_value_groups", "n_rep", "num_kv_groups", "num_queries_per_kv")


def restate(module: nn.Module, groups: int | None = None) -> None:
    """Let a module of torch say the sizes that its tensors have.

    Args:
        groups: of a convolution, where there are others now; shapes do not tell.
    """
    owner: Any = module
    _recompute(module)
    if isinstance(module, nn.Linear):
        owner.out_features, owner.in_features = weight_shape(module)
    elif is_transposed_linear(module):
        owner.nx, owner.nf = weight_shape(module)
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        inputs, outputs = weight_shape(module)[:2]
        owner.groups = groups or module.groups
        owner.in_channels, owner.out_channels = inputs, outputs * module.groups
    elif isinstance(module, ConvNd):
        outputs, inputs = weight_shape(module)[:2]
        owner.groups = groups or module.groups
        owner.out_channels, owner.in_channels = outputs, inputs * module.groups
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        owner.num_embeddings, owner.embedding_dim = weight_shape(module)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        owner.num_features = _length(module, module.num_features)
    elif isinstance(module, nn.GroupNorm):
        channels = _length(module, module.num_channels)
        owner.num_groups = module.num_groups * channels // module.num_channels
        owner.num_channels = channels
    elif isinstance(module, nn.PReLU):
        owner.num_parameters = weight_shape(module)[0]
    elif isinstance(module, nn.RNNBase):
        owner.input_size = weight_shape(module, "weight_ih_l0")[1]
        width = weight_shape(module, "weight_hh_l0")[1]
        if module.proj_size:
            owner.proj_size, owner.hidden_size = width, weight_shape(module, "weight_hr_l0")[1]
        else:
            owner.hidden_size = width
        if "_flat_weights" in vars(module):  # what its forward reads; with masks, a property
            names = module._flat_weights_names
            owner._flat_weights = [getattr(module, name, None) for name in names]
    elif isinstance(module, nn.RNNCellBase):
        owner.input_size = weight_shape(module, "weight_ih")[1]
        owner.hidden_size = weight_shape(module, "weight_hh")[1]
    with_its_heads(module)


def _recompute(module: nn.Module) -> None:
    """Weights that a hook makes of others before each call (`torch.nn.utils.weight_norm`)."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            hook(module, ())


def _length(module: nn.Module, otherwise: int) -> int:
    for name in ("weight", "running_mean"):
        tensor = getattr(module, name, None)
        if isinstance(tensor, Tensor):
            return len(tensor)
    return otherwise


def told_by_none(
    modules: Mapping[str, nn.Module], sizes: Mapping[str, Mapping[int, set[int]]]
) -> Attributes:
    """What norms without any tensor are to say of the channels that they get.

    Args:
        sizes: module -> sizes of what it makes -> what becomes of them.
    """
    found: Attributes = {}
    for path, changes in sizes.items():
        module = modules.get(path)
        name = "num_channels" if isinstance(module, nn.GroupNorm) else "num_features"
        before = getattr(module, name, 0)
        if (
            not isinstance(module, _NORMS)
            or _length(module, 0)
            or len(changes.get(before, ())) != 1
        ):
            continue
        (after,) = changes[before]
        found[path] = {name: after}
        if isinstance(module, nn.GroupNorm):
            found[path]["num_groups"] = module.num_groups * after // before
    return found


_NORMS = (nn.GroupNorm, nn.modules.batchnorm._NormBase)


def guesses(
    modules: Mapping[str, nn.Module],
    sizes: Mapping[str, Mapping[int, set[int]]],
    shared_key: Collection[str],
) -> Iterator[Attributes]:
    """Attributes by which modules may ask for the sizes that changed, the likeliest first.

    Each guess holds the values to set; the caller tries the model with it. Most modules of
    transformers need none: they leave the number of heads to `view(..., -1, head_dim)`.

    Args:
        shared_key: modules with one key head for all queries: the number of queries for each key
            is their number of heads, and else stays.
    """
    yield from _guesses(modules, sizes, shared_key)
    yield from _guesses(modules, _with_owners(sizes), shared_key)


def _guesses(
    modules: Mapping[str, nn.Module],
    sizes: Mapping[str, Mapping[int, set[int]]],
    shared_key: Collection[str],
) -> Iterator[Attributes]:
    named: Attributes = {}
    wide: Attributes = {}
    for path, changes in sizes.items():
        module = modules.get(path)
        if module is None or type(module).__module__.startswith("torch.nn."):
            continue
        for name, value in vars(module).items():
            if type(value) is not int or value not in changes or _NEVER.fullmatch(name):
                continue
            if name in STATED and isinstance(module, nn.MultiheadAttention):
                continue
            new = min(changes[value])
            if name in _REPEATS:
                if path in shared_key:
                    named.setdefault(path, {})[name] = new
                continue
            if _HEADS.fullmatch(name) or _WIDTHS.fullmatch(name):
                named.setdefault(path, {})[name] = new
            wide.setdefault(path, {})[name] = new
    both = {path: {**wide.get(path, {}), **named.get(path, {})} for path in {**wide, **named}}
    yield named
    yield {}
    yield both
    names = sorted({name for values in both.values() for name in values})
    # one number may stand for the width of the input too
    few = len(names) <= _TRIED
    for size in range(1, len(names)) if few else (len(names) - 1, len(names) - 2):
        for some in combinations(names, size) if len(names) <= _MANY else ():
            chosen = {p: {n: v for n, v in own.items() if n in some} for p, own in both.items()}
            yield {path: values for path, values in chosen.items() if values}


def _with_owners(sizes: Mapping[str, Mapping[int, set[int]]]) -> dict[str, dict[int, set[int]]]:
    """Each module's sizes, and those of all modules inside it.

    Of a value that is cut, export may say that it was made by the module that first reads a piece.
    """
    found: dict[str, dict[int, set[int]]] = {}
    for path, changes in sizes.items():
        names = path.split(".")
        for owner in {".".join(names[:n]) for n in range(len(names) + 1)}:
            own = found.setdefault(owner, {})
            for before, after in changes.items():
                own[before] = own.get(before, set()) | after
    return found


_TRIED = 5
"""Of so many names every choice is tried."""

_MANY = 12
"""Of so many, all but one or two of them."""


def key_heads(module: nn.Module) -> int | None:
    """How many key-value heads a module says it has."""
    for holder in (module, getattr(module, "config", None)):
        for name in ("num_key_value_heads", "num_kv_heads", "n_kv_heads"):
            if type(found := getattr(holder, name, None)) is int:
                return found
    return None


def set_attributes(modules: Mapping[str, nn.Module], attributes: Attributes) -> None:
    """Set what a guess says."""
    for path, values in attributes.items():
        for name, value in values.items():
            setattr(cast(Any, modules[path]), name, value)


def drop_blocks(model: nn.Module, blocks: Sequence[str]) -> dict[str, tuple[int, set[int]]]:
    """Take blocks out of their lists and count the others anew. Names that are no numbers stay.

    Returns:
        for each list its length before, and the places of what went.

    What counts blocks follows, whatever it is called: numbers in their modules that are each
    block's own place, and lists beside them that have an entry for each.
    """
    before: dict[str, tuple[int, set[int]]] = {}
    gone: dict[str, set[str]] = {}
    for name in blocks:
        parent, _, last = name.rpartition(".")
        gone.setdefault(parent, set()).add(last)
    for parent, names in gone.items():
        held = model.get_submodule(parent)
        places = {at for at, name in enumerate(held._modules) if name in names}
        before[parent] = len(held._modules), places
        counters = _counters(held)
        kept = [
            (at, child) for at, (k, child) in enumerate(held._modules.items()) if k not in names
        ]
        _shorten_lists(model.get_submodule(parent.rpartition(".")[0]), len(held._modules), kept)
        old = list(held._modules)
        numbered = all(name.isdecimal() for name in old)
        held._modules.clear()
        for index, (place, child) in enumerate(kept):
            held._modules[str(index) if numbered else old[place]] = child
            for module in child.modules() if child is not None else ():
                for attribute, value in list(vars(module).items()):
                    if type(value) is int and counters.get(attribute) == value - place:
                        setattr(module, attribute, value - place + index)
    return before


def _counters(held: nn.Module) -> dict[str, int]:
    """Attributes of the modules in a list by which each knows its block's place in it, as key-value
    caches do, and what they count from."""
    offsets: dict[str, set[int]] = {}
    places: dict[str, set[int]] = {}
    for place, child in enumerate(held._modules.values()):
        for module in child.modules() if child is not None else ():
            for name, value in vars(module).items():
                if type(value) is int:
                    offsets.setdefault(name, set()).add(value - place)
                    places.setdefault(name, set()).add(place)
    found = {name: min(values) for name, values in offsets.items() if len(values) == 1}
    few = len(held._modules) < _COUNTED  # two numbers in a row may be anything
    return {
        name: first
        for name, first in found.items()
        if len(places[name]) > 1 and (first in (0, 1) or not few)
    }


_COUNTED = 3


def _shorten_lists(owner: nn.Module, before: int, kept: Sequence[tuple[int, Any]]) -> None:
    """The lists of a module that have an entry for each of its blocks, without those that go."""
    for name, value in list(vars(owner).items()):
        if not name.startswith("_") and type(value) in (list, tuple) and len(value) == before:
            setattr(owner, name, type(value)(value[place] for place, _ in kept))
