"""Linear layers of a graph with their weights packed."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from torchprune.bitmask import DTYPES, Bitmask
from torchprune.errors import LoweringError
from torchprune.passes.program import Draft, Passed, tied

_aten = torch.ops.aten

FORMATS = ("bitmask",)


def pack_linears(
    program: ExportedProgram, format: str = "bitmask", *, min_sparsity: float = 0.25
) -> Passed:
    """Let products with sparse weights read them packed. Fold masks first.

    Covers `linear`, and `mm` and `addmm` with a transposed weight, which it becomes in a decomposed
    program (but where torch makes it a `bmm`, for inputs that are not contiguous). A weight NAME
    becomes the buffers `NAME_bits`, `NAME_values` and `NAME_starts`, see
    `torchprune.bitmask.Bitmask`; the product is `torchprune::bitmask_linear`, so whoever runs the
    program must have imported torchprune.

    Args:
        format: "bitmask".
        min_sparsity: weights with a smaller share of zeros are left.

    Raises:
        LoweringError: an unknown format.
    """
    if format not in FORMATS:
        raise LoweringError(f"format must be {' or '.join(map(repr, FORMATS))}, got {format!r}")
    draft, modified, left = Draft(program), [], {}
    shared = tied(draft.state)
    for spec, node in draft.held(InputKind.PARAMETER):
        name = str(spec.target)
        weight = cast(Tensor, draft.state[name]).detach()
        if weight.dim() != 2:
            continue
        products = _products(node)
        if products is None:
            if any(u.target is _aten.linear.default or _is_transposition(u) for u in node.users):
                left[name] = "something else than a product of two matrices reads it"
            continue
        if why := _obstacle(weight, min_sparsity, shared.get(name)):
            left[name] = why
            continue
        packed = Bitmask.pack(weight)
        parts = [
            draft.add_buffer(f"{name}_{part}", getattr(packed, part))
            for part in ("bits", "values", "starts")
        ]
        for product, x, bias in products:
            with draft.graph.inserting_before(product):
                new = draft.graph.call_function(
                    torch.ops.torchprune.bitmask_linear.default,
                    (x, *parts, None, bias, packed.cols),
                )
            new.meta = dict(product.meta)
            product.replace_all_uses_with(new)
            draft.graph.erase_node(product)
        for use in list(node.users):  # transpositions
            draft.graph.erase_node(use)
        draft.drop(node)
        modified.append(name)
    return Passed("pack_linears", draft.finish(), modified, left)


def _obstacle(weight: Tensor, min_sparsity: float, others: list[str] | None) -> str | None:
    if others:
        return f"it is tied to {', '.join(others)}"
    if weight.dtype not in DTYPES:
        return f"it is {weight.dtype}"
    if weight.device.type != "cpu":
        return f"it is on {weight.device}, and the kernels are for CPUs"
    if 1 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1) < min_sparsity:
        return f"less than {min_sparsity:.0%} of it is zero (min_sparsity)"
    if not bool(weight.isfinite().all()):
        return "it holds inf or NaN"
    return None


def _products(weight: Node) -> list[tuple[Node, Node, Node | None]] | None:
    """All uses of a weight as (product, input, bias), or None if it has another use or none."""
    found: list[tuple[Node, Node, Node | None]] = []
    for use in weight.users:
        if use.target is _aten.linear.default and use.args[1] is weight:
            x, bias = use.args[0], use.args[2] if len(use.args) > 2 else None
            if x is weight:
                return None
            found.append((use, cast(Node, x), cast(Node | None, bias)))
        elif _is_transposition(use):
            for product in use.users:
                made = _transposed_product(product, use)
                if made is None:
                    return None
                found.append(made)
        else:
            return None
    return found or None


def _is_transposition(node: Node) -> bool:
    if node.target is _aten.permute.default:
        return list(cast(list[int], node.args[1])) in ([1, 0], [-1, -2], [-1, 0], [1, -2])
    return node.target is _aten.t.default


def _transposed_product(node: Node, turned: Node) -> tuple[Node, Node, Node | None] | None:
    """`mm(x, w.t())` and `addmm(bias, x, w.t())` with a bias of one dimension."""
    if node.kwargs:  # alpha or beta
        return None
    if node.target is _aten.mm.default and node.args[1] is turned and node.args[0] is not turned:
        return node, cast(Node, node.args[0]), None
    if node.target is _aten.addmm.default and node.args[2] is turned:
        bias, x = cast(Node, node.args[0]), cast(Node, node.args[1])
        if x is not turned and bias.meta["val"].dim() == 1:
            return node, x, bias
    return None
