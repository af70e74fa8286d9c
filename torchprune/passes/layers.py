"""An exported program's weights as the layers of a model, which selectors and plans read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.fx import Node

from torchprune.masking.matrices import TransposedLinear, View, prunable_names, view_of
from torchprune.masking.parts import Part, covered, view_of_parts
from torchprune.masking.reading import Reading
from torchprune.passes.program import tied
from torchprune.passes.reads import Read, reads_in


@dataclass
class Layers:
    """The layers of a program.

    Attributes:
        root: a tree of modules that hold the program's weights. They never run.
        readings: how each of the tree's parameters is read, by its identity.
        weights: those parameters, by their names in the program.
        reads: the products with each, by its name, in the graph's order.
    """

    root: nn.Module = field(default_factory=nn.Module)
    readings: dict[int, Reading] = field(default_factory=dict)
    weights: dict[str, nn.Parameter] = field(default_factory=dict)
    reads: dict[str, list[Read]] = field(default_factory=dict)


def layers_of(program: ExportedProgram) -> Layers:
    """The weights that a program's products read, in the order in which they first do, and behind
    them those that none does."""
    names = {
        cast(TensorArgument, spec.arg).name: str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind == InputKind.PARAMETER
    }
    graph, shared, layers = program.graph_module.graph, tied(program.state_dict), Layers()
    held = {
        node: cast(Tensor, program.state_dict[names[node.name]])
        for node in graph.nodes
        if node.op == "placeholder" and node.name in names
    }
    for node, reads in reads_in(graph, held).items():
        name, weight = names[node.name], nn.Parameter(held[node].detach(), requires_grad=False)
        if name in shared or not weight.is_floating_point() or weight.dim() < 2:
            continue
        *path, tensor = name.split(".")
        module = _module_of(reads[0], weight) if tensor == "weight" else nn.Module()
        view = _view_of(module, tensor, weight, [read.part for read in reads])
        if view is None:
            continue
        module.register_parameter(tensor, weight)
        layers.root = _grafted(layers.root, path, module)
        layers.readings[id(weight)] = Reading(
            view, len(reads), feeds_back=any(read.feeds_back for read in reads)
        )
        layers.weights[name], layers.reads[name] = weight, reads
    for node, value in held.items():
        name = names[node.name]
        if name not in (*layers.reads, *shared) and value.is_floating_point() and value.dim() > 1:
            *path, own = name.split(".")
            holder = _unread(node, own)
            holder.register_parameter(own, nn.Parameter(value.detach(), requires_grad=False))
            layers.root = _grafted(layers.root, path, holder)
    layers.root = _listed(layers.root)
    return layers


def _unread(weight: Node, tensor: str) -> nn.Module:
    """What holds a weight that no product was seen to read: it counts among what stays dense."""
    looked_up = any(user.target is torch.ops.aten.embedding.default for user in weight.users)
    return nn.Embedding(1, 1, device="meta") if looked_up and tensor == "weight" else nn.Module()


def _view_of(module: nn.Module, tensor: str, weight: Tensor, parts: Sequence[Part]) -> View | None:
    """The matrices that these parts of a weight are, or that the first is."""
    if tensor in prunable_names(module):
        view = view_of(module, weight.shape)
        if all(covered(view, part) is not None for part in parts):
            return view
    plain = torch.empty(weight.shape, device="meta")
    return view_of_parts(plain, parts) or view_of_parts(plain, parts[:1])


def _module_of(read: Read, weight: Tensor) -> nn.Module:
    """The module whose forward a product with a weight is, or one that only holds it."""
    shape, kind = tuple(weight.shape), _KINDS.get(read.function)
    if kind is nn.Bilinear:
        return nn.Bilinear(shape[1], shape[2], shape[0], **_EMPTY)
    if kind is not None:
        groups = read.part.axes[0].size
        sizes = (shape[1] * groups, shape[0])
        into, out = sizes[::-1] if issubclass(kind, nn.modules.conv._ConvTransposeNd) else sizes
        made: nn.Module = kind(into, out, shape[2:], groups=groups, **_EMPTY)
        return made
    if weight.dim() != 2:
        return nn.Module()
    inmost = min(read.part.axes, key=lambda axis: axis.step)
    turned = 1 not in shape and inmost.role != "col"
    return TransposedLinear() if turned else nn.Linear(shape[1], shape[0], **_EMPTY)


_EMPTY: dict[str, Any] = {"bias": False, "device": "meta"}
_KINDS: dict[Any, Any] = {
    F.bilinear: nn.Bilinear,
    F.conv1d: nn.Conv1d,
    F.conv2d: nn.Conv2d,
    F.conv3d: nn.Conv3d,
    F.conv_transpose1d: nn.ConvTranspose1d,
    F.conv_transpose2d: nn.ConvTranspose2d,
    F.conv_transpose3d: nn.ConvTranspose3d,
}


def _grafted(tree: nn.Module, path: Sequence[str], module: nn.Module) -> nn.Module:
    """The tree with a module in it, and what stood there as a part of that."""
    if path:
        branch = tree._modules.get(path[0])
        tree.add_module(path[0], _grafted(branch or nn.Module(), path[1:], module))
        return tree
    holder, other = (tree, module) if type(module) is nn.Module else (module, tree)
    holder._parameters.update(other._parameters)
    holder._modules.update(other._modules)
    return holder


def _listed(module: nn.Module) -> nn.Module:
    """The tree with a ModuleList wherever all children are numbered, as blocks of a model are."""
    children = {name: _listed(child) for name, child in module.named_children()}
    if children and all(map(str.isdecimal, children)) and not module._parameters:
        listed = nn.ModuleList()
        listed._modules.update(children)
        return listed
    module._modules.update(children)
    return module
