"""Which layers choose or weigh experts, told from how a model is built.

A layer beside a stack of experts that has as many outputs as there are experts routes tokens to
them; one with a single output weighs an expert that all tokens go through. What only shows when
tokens pass is told by `calibration/routers.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn
from torch.nn.modules.conv import _ConvNd

from torchprune.masking.mask import original_of
from torchprune.masking.matrices import View
from torchprune.masking.selection import every_layer


def gates_of(
    model: nn.Module, blocks: Mapping[str, nn.Module], views: Mapping[int, View]
) -> dict[int, str]:
    """id of a parameter -> what it does, for the routers and gates of a model.

    Args:
        views: id of a parameter -> how it reads, of all that multiply.

    A list of like modules is a stack of experts only inside a repeated block: in a whole model it
    may as well be its depth, and what stands beside it a head of as many classes.
    """
    found: dict[int, str] = {}
    for block in blocks.values() or [model]:
        for module in block.modules():
            for count, inside in _stacks(module, lists=bool(blocks)):
                found |= _beside(module, count, inside, views)
    return found


def _beside(
    module: nn.Module, count: int, inside: set[int], views: Mapping[int, View]
) -> dict[int, str]:
    """The routers and gates in a module that holds so many experts, made of these parameters.

    Where a layer of the same parent reads as many inputs, it reads that layer: a shared expert may
    by chance be as wide as experts are many (512 both in Qwen3-Next).
    """
    found = {}
    own: dict[int, dict[int, View]] = {}
    """id of a module -> id of a parameter that it is a layer of -> how that reads."""
    for layer in every_layer(module):
        weight = original_of(layer.module, layer.tensor)
        if weight.dim() > 1 and id(weight) in views and id(weight) not in inside:
            own.setdefault(id(layer.module), {})[id(weight)] = views[id(weight)]
    for parts in ([module], *(list(m.children()) for m in module.modules())):
        together = [v for m in parts for v in own.get(id(m), {}).items()]
        read = {view.cols for _, view in together}
        for key, view in together:
            if (outputs := view.groups * view.rows) == count and count not in read:
                found[key] = f"a router: it has one output for each of {count} experts"
            elif outputs == 1:
                found[key] = "a gate: it has one output, and stands beside experts"
    return found


def _stacks(module: nn.Module, *, lists: bool) -> Iterator[tuple[int, set[int]]]:
    """How many experts stand directly below a module, and the ids of their parameters."""
    for child in module.children():
        counts = {len(p) for p in _stacked(child)}
        if lists and not isinstance(child, nn.Sequential) and (count := alike(child)) > 1:
            counts.add(count)
        for count in counts:
            yield count, {id(p) for p in child.parameters()}
    own = _stacked(module)
    for count in {len(p) for p in own}:
        yield count, {id(p) for p in own}


def _stacked(module: nn.Module) -> list[nn.Parameter]:
    """A module's own stacks of matrices."""
    own = () if isinstance(module, _ConvNd) else module._parameters.values()
    return [p for p in own if p is not None and p.dim() == 3 and min(p.shape) > 1]


def alike(module: nn.Module) -> int:
    """How many copies of one module a list, dict or sequence of modules holds; 1 if they differ.

    Members without weights do not count.
    """
    if not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return 1
    kinds = [kind for child in module.children() if (kind := _kind(child))[1]]
    return len(kinds) if len(set(kinds)) == 1 else 1


def _kind(module: nn.Module) -> tuple[type, tuple[tuple[str, tuple[int, ...]], ...]]:
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return type(module), shapes


def copies_of(block: nn.Module) -> dict[int, int]:
    """id of a module in a block -> of how many like copies it is one (experts in a list)."""
    copies: dict[int, int] = {}

    def visit(module: nn.Module, times: int) -> None:
        copies[id(module)] = times
        times *= alike(module)
        for child in module.children():
            visit(child, times)

    visit(block, 1)
    return copies
