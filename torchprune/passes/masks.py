"""Masks as nodes of a graph, and baked into its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.fx import Node

from torchprune.errors import MaskError, did_you_mean
from torchprune.masking.mask import laid_out_like
from torchprune.masking.packing import masked
from torchprune.passes.program import Draft, Passed, calls, tied

_aten = torch.ops.aten


def insert_masks(program: ExportedProgram, masks: Mapping[str, Tensor]) -> Passed:
    """Put masks on a program's parameters: every use reads `where(mask, weight, 0)`.

    The masks are buffers, named `NAME_mask`; changing their values changes the pruning.

    Args:
        masks: as `torchprune.masks` returns them: parameter name -> bool of its shape, True = kept.

    Raises:
        MaskError: an unknown name, a wrong shape or dtype, a tied or an already masked weight.
    """
    draft = Draft(program)
    found = {str(spec.target): node for spec, node in draft.held(InputKind.PARAMETER)}
    shared = tied(draft.state)
    for name, mask in masks.items():
        if name not in found:
            raise MaskError(f"{name!r} is no parameter of the program{did_you_mean(name, found)}")
        weight = draft.state[name]
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape:
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise MaskError(f"{name}: expected a bool mask {tuple(weight.shape)}, got {got}")
        if name in shared:
            raise MaskError(f"{name} cannot carry a mask: it is tied to {', '.join(shared[name])}")
        if any(_masking(draft, use) for use in found[name].users):
            raise MaskError(f"{name} carries a mask already; fold_masks first")
    for name, mask in masks.items():
        node, weight = found[name], draft.state[name]
        own = mask.detach().to(weight.device, copy=True)
        buffer = draft.add_buffer(f"{name}_mask", laid_out_like(own, weight))
        first = next(n for n in draft.graph.nodes if n.op != "placeholder")
        with draft.graph.inserting_before(first):
            where = draft.graph.call_function(_aten.where.ScalarOther, (buffer, node, 0))
        where.meta["val"] = node.meta["val"]
        for use in list(node.users):
            if use is not where:
                use.replace_input_with(node, where)
    return Passed("insert_masks", draft.finish(), list(masks))


def fold_masks(program: ExportedProgram) -> Passed:
    """Bake masks into the weights, in a program with masks of `insert_masks` or of `sparsify`.

    The law: outputs are bit-equal. Weights keep their names; masks are gone.
    """
    draft = Draft(program)
    names = {
        cast(TensorArgument, spec.arg).name: str(spec.target)
        for spec in draft.specs
        if spec.kind == InputKind.PARAMETER
    }
    shared, modified, left = tied(draft.state), [], {}
    for node in calls(draft.graph, _aten.where.ScalarOther, _aten.where.self):
        parts = _masking(draft, node)
        if parts is None:
            continue
        mask, weight = parts
        name = names.get(weight.name)
        if name is None or set(weight.users) != {node} or name in shared:
            left[name or weight.name] = "something else reads it without the mask"
            continue
        own = cast(Tensor, draft.value_of(mask))
        draft.replace(name, masked(draft.state[name], laid_out_like(own, draft.state[name])))
        zero = node.args[2]
        node.replace_all_uses_with(weight)
        draft.graph.erase_node(node)
        if isinstance(zero, Node) and not zero.users:
            draft.graph.erase_node(zero)
        if not mask.users:
            draft.drop(mask)
        modified.append(name)
    return Passed("fold_masks", draft.finish(), modified, left)


def _masking(draft: Draft, node: Node) -> tuple[Node, Node] | None:
    """Mask and weight, if a node is `where(mask, weight, 0)` of tensors that the program holds."""
    if node.target not in (_aten.where.ScalarOther, _aten.where.self):
        return None
    mask, weight, zero = node.args
    if isinstance(zero, Node):
        is_zero = zero.target is _aten.scalar_tensor.default and zero.args[0] == 0
    else:
        is_zero = zero == 0
    held, value = draft.value_of(mask), draft.value_of(weight)
    if not is_zero or held is None or value is None or held.dtype != torch.bool:
        return None
    return (cast(Node, mask), cast(Node, weight)) if held.shape == value.shape else None
