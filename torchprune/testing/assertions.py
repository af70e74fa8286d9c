"""Whether tensors and models are as sparse as they ought to be, place by place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from torchprune.errors import SpecError, TargetError
from torchprune.masking.mask import masked_layers
from torchprune.masking.matrices import view_of
from torchprune.masking.packing import zeros_in
from torchprune.masking.targets import make_plan
from torchprune.methods.magnitude import MagnitudeSpec
from torchprune.specs.patterns import NM, Block, Pattern, check_shape, prune_count

_SCOPES = (None, "row", "layer", "global")


def assert_sparsity(
    tensor_or_module: Tensor | nn.Module,
    pattern: str | Pattern,
    sparsity: float | None = None,
    *,
    scope: str | None = None,
    exact: bool = True,
) -> None:
    """Assert that weights are zero as a pattern says, to the weight.

    Args:
        tensor_or_module: a matrix (out, in), a stack of matrices (groups, out, in), or a module:
            then every masked layer is checked, or, if it carries no masks, every layer that
            `sparsify` would choose by default. Convolutions, transformers' Conv1D and fused
            experts are read as the matrices they multiply by. Masked layers are counted by their
            masks; folded ones and tensors by their zeros.
        pattern: as for specs.
        sparsity: share of zeros; default one half, or what an n:m pattern implies.
        scope: "row" (each row has the count), "layer" (each matrix has it), "global" (all layers
            together), or None: each matrix by rows or as a whole. n:m groups are their own scope.
        exact: counts must be met; otherwise there may be more zeros (weights that were zero
            anyway).

    Raises:
        AssertionError: naming the layer, the row, group or tile, the count and what was expected.
        SpecError: the arguments contradict each other.
    """
    goal = MagnitudeSpec(sparsity, pattern).goal
    if scope not in _SCOPES:
        raise SpecError(
            f'scope {scope!r} is not understood; accepted: "row", "layer", "global" or None'
        )
    found = list(_matrices(tensor_or_module))
    if isinstance(goal.pattern, NM):
        for matrix in found:
            _check_groups(matrix, goal.pattern, exact=exact)
        return
    if isinstance(goal.pattern, Block):
        found = [_tiles_of(matrix, goal.pattern, exact=exact) for matrix in found]
    if scope == "global":
        zeros, size = sum(m.zeros for m in found), sum(m.size for m in found)
        _check_count("all layers together", zeros, size, goal.sparsity, found[0].unit, exact=exact)
        return
    for matrix in found:
        _check_matrix(matrix, goal.sparsity, scope, exact=exact)


@dataclass(frozen=True)
class _Matrix:
    """Where one matrix (of weights, or of tiles) is zero.

    Attributes:
        label: what errors call it.
        zero: (rows, cols) bool.
        axis: length of the input axis along which n:m groups run.
        unit: what an entry is called.
    """

    label: str
    zero: Tensor
    axis: int
    unit: str = "weights"

    @property
    def zeros(self) -> int:
        return int(torch.count_nonzero(self.zero))

    @property
    def size(self) -> int:
        return self.zero.numel()


def _matrices(tensor_or_module: Tensor | nn.Module) -> Iterator[_Matrix]:
    if isinstance(tensor_or_module, nn.Module):
        for name, zero, module in _layers(tensor_or_module):
            view = view_of(module, zero.shape)
            yield from _stack(name, view.to_matrix(zero), view.axis)
        return
    tensor = tensor_or_module.detach()
    if tensor.dim() not in (2, 3):
        raise SpecError(
            f"a matrix (out, in) or a stack of them is needed, got shape {tuple(tensor.shape)}; "
            "pass the module instead of its weight"
        )
    stack = tensor.reshape(-1, *tensor.shape[-2:])
    yield from _stack("tensor", stack == 0, tensor.shape[-1])


def _stack(name: str, zero: Tensor, axis: int) -> Iterator[_Matrix]:
    for number, matrix in enumerate(zero):
        yield _Matrix(name if len(zero) == 1 else f"{name}[{number}]", matrix, axis)


def _layers(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module]]:
    """Name, places of zeros in the weight's own layout, and module of every layer to check."""
    masked = [(y, m) for y, m in masked_layers(model) if y.tensor != "bias"]
    for layer, mask in masked:
        zero = ~mask.mask
        _check_masked(layer.name, ~zero, getattr(layer.module, layer.tensor))
        yield layer.name, zero, layer.module
    if masked:
        return
    try:
        plan = make_plan(model, MagnitudeSpec())
    except TargetError as error:
        raise AssertionError(f"nothing here could be sparse: {error}") from None
    for target in plan.targets:
        yield target.name, target.weight.detach() == 0, target.layer.module


def _check_masked(name: str, mask: Tensor, weight: Tensor) -> None:
    pruned = weight[~mask]
    wrong = pruned.numel() - zeros_in(pruned)
    if wrong:
        raise AssertionError(f"{name}: {wrong} weights are not zero though masked")


def _check_shape(matrix: _Matrix, pattern: Pattern) -> None:
    rows, cols = matrix.zero.shape
    try:
        check_shape(pattern, rows, matrix.axis if isinstance(pattern, NM) else cols, matrix.label)
    except SpecError as error:
        raise AssertionError(str(error)) from None


def _check_groups(matrix: _Matrix, pattern: NM, *, exact: bool) -> None:
    _check_shape(matrix, pattern)
    kept = (~matrix.zero).unflatten(1, (-1, pattern.m)).sum(2)
    wrong = kept != pattern.n if exact else kept > pattern.n
    if bool(wrong.any()):
        row, group = wrong.nonzero()[0].tolist()
        start = group * pattern.m
        raise AssertionError(
            f"{matrix.label}: row {row}, group {group} (columns {start} to "
            f"{start + pattern.m - 1}) keeps {int(kept[row, group])} of {pattern.m} weights, "
            f"expected {'exactly' if exact else 'at most'} {pattern.n}"
            f"{_others(int(wrong.sum()), wrong.numel(), 'groups')}"
        )


def _tiles_of(matrix: _Matrix, pattern: Block, *, exact: bool) -> _Matrix:
    """The matrix of tiles that are zero throughout; with `exact` no tile may be so in part."""
    _check_shape(matrix, pattern)
    tiles = matrix.zero.unflatten(1, (-1, pattern.cols)).unflatten(0, (-1, pattern.rows))
    zeros, size = tiles.sum((1, 3)), pattern.rows * pattern.cols
    torn = (zeros != 0) & (zeros != size)
    if exact and bool(torn.any()):
        row, col = torn.nonzero()[0].tolist()
        raise AssertionError(
            f"{matrix.label}: the tile at row {row * pattern.rows}, column {col * pattern.cols} "
            f"has {int(zeros[row, col])} of {size} weights zero, expected none or all"
            f"{_others(int(torn.sum()), torn.numel(), 'tiles')}"
        )
    return _Matrix(matrix.label, zeros == size, matrix.axis, f"{pattern} tiles")


def _check_matrix(
    matrix: _Matrix, sparsity: float | Fraction, scope: str | None, *, exact: bool
) -> None:
    rows, cols = matrix.zero.shape
    per_row = matrix.zero.sum(1)
    wanted = prune_count(cols, sparsity)
    wrong = per_row != wanted if exact else per_row < wanted
    if scope is None:
        total = prune_count(matrix.size, sparsity)
        if not bool(wrong.any()) or matrix.zeros == total or (matrix.zeros > total and not exact):
            return
    if scope == "row":
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            _check_count(
                f"{matrix.label}: row {row}",
                int(per_row[row]),
                cols,
                sparsity,
                matrix.unit,
                exact=exact,
                more=_others(int(wrong.sum()), rows, "rows"),
            )
        return
    _check_count(matrix.label, matrix.zeros, matrix.size, sparsity, matrix.unit, exact=exact)


def _check_count(
    what: str,
    zeros: int,
    size: int,
    sparsity: float | Fraction,
    unit: str,
    *,
    exact: bool,
    more: str = "",
) -> None:
    wanted = prune_count(size, sparsity)
    if zeros == wanted or (zeros > wanted and not exact):
        return
    raise AssertionError(
        f"{what}: {zeros} of {size} {unit} are zero, expected "
        f"{'exactly' if exact else 'at least'} {wanted} (sparsity {float(sparsity):.6g}){more}"
    )


def _others(wrong: int, total: int, unit: str) -> str:
    return f"; {wrong} of {total} {unit} are wrong" if wrong > 1 else ""
