"""Linear layers of a graph with their weights packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from torchprune.errors import LoweringError
from torchprune.lowering.bitmask import Bitmask, obstacle
from torchprune.passes.linears import Product, product_of, products_in
from torchprune.passes.program import Draft, Passed, calls, tied

FORMATS = ("bitmask",)


def pack_linears(
    program: ExportedProgram,
    format: str = "bitmask",
    *,
    min_sparsity: float = 0.25,
    min_saving: int = 1,
) -> Passed:
    """Let products with sparse weights read them packed. Fold masks first.

    Covers `linear`, and the `mm`, `addmm` and `bmm` that it is decomposed to and that transformers'
    Conv1D is. A weight NAME becomes the buffers `NAME_bits`, `NAME_values` and `NAME_starts`, see
    `torchprune.lowering.bitmask.Bitmask`; the product is `torchprune::bitmask_linear`, so whoever
    runs the program must have imported torchprune.

    Args:
        format: "bitmask".
        min_sparsity: weights with a smaller share of zeros are left.
        min_saving: weights of which packing saves fewer bytes are left, as narrow ones may be.

    Raises:
        LoweringError: an unknown format.
    """
    if format not in FORMATS:
        raise LoweringError(f"format must be {' or '.join(map(repr, FORMATS))}, got {format!r}")
    draft, modified, left = Draft(program), [], {}
    shared, products = tied(draft.state), products_in(draft.graph)
    for spec, node in draft.held(InputKind.PARAMETER):
        name, uses = str(spec.target), products.get(node)
        if uses is None:
            continue
        weight = cast(Tensor, draft.state[name]).detach()
        if why := _readers(node, uses) or _obstacle(weight, min_sparsity, shared.get(name)):
            left[name] = why
            continue
        matrix = weight.t() if uses[0].turned else weight
        if why := _loss(matrix, min_saving):
            left[name] = why
            continue
        packed = Bitmask.pack(matrix)
        parts = [
            draft.add_buffer(f"{name}_{part}", getattr(packed, part))
            for part in ("bits", "values", "starts")
        ]
        for found in uses:
            # Read anew: what feeds it may be a product that was replaced since it was found.
            use = cast(Product, product_of(found.node))
            with draft.graph.inserting_before(use.node):
                new = draft.graph.call_function(
                    torch.ops.torchprune.bitmask_linear.default,
                    (use.x, *parts, None, use.bias, packed.cols),
                )
            new.meta = dict(use.node.meta)
            use.node.replace_all_uses_with(new)
            for old in (use.node, *reversed(use.through)):
                if not old.users:
                    draft.graph.erase_node(old)
        draft.drop(node)
        modified.append(name)
    return Passed("pack_linears", draft.finish(), modified, left)


def check_packed(program: ExportedProgram) -> None:
    """See that the packed weights that a program holds are whole: check what comes from a file.

    Raises:
        LoweringError: the parts of one contradict each other; running it would raise.
    """
    draft = Draft(program)
    operator = torch.ops.torchprune.bitmask_linear.default
    for node in calls(draft.graph, operator):
        given = dict(zip(_ARGUMENTS, node.args, strict=False)) | dict(node.kwargs)
        parts = {part: draft.value_of(given.get(part)) for part in _ARGUMENTS[1:5]}
        cols = given.get("cols")
        if all(parts[part] is not None for part in ("bits", "values", "starts")):
            packed = Bitmask(**cast(Any, parts), cols=cast(int, cols))
            packed.check(f"the packed weight of {node.name}", rows=len(packed.bits))


_ARGUMENTS = ("x", "bits", "values", "starts", "scales", "bias", "cols")


def _obstacle(weight: Tensor, min_sparsity: float, others: list[str] | None) -> str | None:
    return f"it is tied to {', '.join(others)}" if others else obstacle(weight, min_sparsity)


def _loss(matrix: Tensor, min_saving: int) -> str | None:
    """Why a matrix is not to be packed though it can be, or None."""
    rows, cols = matrix.shape
    packed = Bitmask.bytes_of(rows, cols, int(torch.count_nonzero(matrix)), matrix.dtype)
    if matrix.nbytes - packed >= min_saving:
        return None
    return f"packed it takes {packed:,} bytes and dense {matrix.nbytes:,}"


def _readers(weight: Node, products: Sequence[Product]) -> str | None:
    """Why the products cannot read a weight packed, or None."""
    between = {node for product in products for node in product.through}
    known = between | {product.node for product in products}
    operands = {node for product in products for node in (product.x, product.bias)}
    others = any(user not in known for node in (weight, *between) for user in node.users)
    if others or operands & {weight, *between}:
        return "something else than linear layers reads it"
    if len({product.turned for product in products}) > 1:
        return "linear layers read it both ways round"
    return None
