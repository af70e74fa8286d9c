"""Parts of parameters: the view in which reads are whole groups, against plain indices."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from torchprune.masking.matrices import View
from torchprune.masking.parts import Axis, Part, Role, covered, view_of_parts


def part_of(parameter: Tensor, operand: Tensor, roles: str) -> Part:
    names: dict[str, Role] = {"g": "group", "r": "row", "c": "col"}
    axes = zip(operand.shape, operand.stride(), roles, strict=True)
    return Part(
        operand.storage_offset() - parameter.storage_offset(),
        tuple(Axis(size, step, names[role]) for size, step, role in axes),
    )


def matrices(operand: Tensor, roles: str) -> Tensor:
    """(groups, rows, cols) of an operand, by its own order."""
    order = [a for role in "grc" for a, r in enumerate(roles) if r == role]
    sizes = [1, 1, 1]
    for a, role in enumerate(roles):
        sizes["grc".index(role)] *= operand.shape[a]
    return operand.permute(order).reshape(sizes)


def check(parameter: Tensor, reads: list[tuple[Tensor, str]]) -> View:
    parts = [part_of(parameter, operand, roles) for operand, roles in reads]
    view = view_of_parts(parameter, parts)
    assert view is not None
    stack = view.to_matrix(parameter)
    assert torch.equal(view.from_matrix(stack, parameter.shape), parameter)
    for part, (operand, roles) in zip(parts, reads, strict=True):
        own = matrices(operand, roles)
        found = covered(view, part)
        assert found is not None
        rows: dict[tuple[int, int], list[Tensor]] = {}
        for one in found:
            rows.setdefault((one.own, one.start), []).append(stack[one.group])
        seen = torch.zeros_like(own, dtype=torch.bool)
        for (mine, start), some in rows.items():
            columns = slice(start, start + view.cols)
            assert torch.equal(torch.cat(some), own[mine][:, columns])
            seen[mine][:, columns] = True
        assert seen.all()
    return view


def numbers(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def test_a_whole_weight_and_its_transpose() -> None:
    w = numbers(6, 4)
    view = check(w, [(w, "rc")])
    assert (view.groups, view.rows, view.cols) == (1, 6, 4)
    view = check(w, [(w.t(), "rc")])
    assert (view.groups, view.rows, view.cols) == (1, 4, 6)


def test_chunks_of_rows_in_unequal_parts() -> None:
    w = numbers(10, 3)
    q, k, v = w.split([6, 2, 2])
    view = check(w, [(q, "rc"), (k, "rc"), (v, "rc")])
    assert (view.groups, view.rows, view.cols) == (5, 2, 3)


def test_a_stack_read_one_by_one_and_as_one() -> None:
    w = numbers(4, 3, 2)
    assert check(w, [(w[i], "rc") for i in range(4)]).groups == 4
    assert check(w, [(w, "gcr")]).groups == 4
    flat = numbers(12, 2)
    assert check(flat, [(flat.view(4, 3, 2)[i].t(), "cr") for i in range(4)]).groups == 4


def test_columns_cut() -> None:
    w = numbers(4, 6)
    view = check(w, [(w[:, :4], "rc"), (w[:, 4:], "rc")])
    assert (view.groups, view.rows, view.cols) == (3, 4, 2)


def test_heads_in_an_einsum() -> None:
    w = numbers(4, 3, 8)  # heads, size, model
    assert check(w, [(w, "ccr")]).cols == 12
    assert check(w, [(w, "rrc")]).rows == 12
    assert check(w, [(w, "grc")]).groups == 4


def test_rows_of_one_product_that_are_columns_of_another() -> None:
    w = numbers(4, 6)
    assert view_of_parts(w, [part_of(w, w, "rc"), part_of(w, w, "cr")]) is None


@given(st.data())
def test_any_slice_of_any_view(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=3))
    w = numbers(*sizes)
    assume(w.numel() > 1)
    axis = data.draw(st.integers(0, len(sizes) - 1))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, sizes[axis] - 1)), max_size=2)))
    cuts = [c for c in cuts if c < sizes[axis]]
    bounds = [0, *cuts, sizes[axis]]
    parts = [w.narrow(axis, a, b - a) for a, b in pairwise(bounds)]
    order = data.draw(st.permutations(range(len(sizes))))
    roles = data.draw(st.permutations(["r", "c", *"grc"[: len(sizes) - 2]]))
    reads = [(part.permute(order), "".join(roles)) for part in parts]
    layout = [part_of(w, operand, names) for operand, names in reads]
    view = view_of_parts(w, layout)
    if view is None or any(covered(view, part) is None for part in layout):
        assert len(parts) > 1  # a whole tensor always has one
        assume(False)  # columns that do not follow one another
    check(w, reads)


def test_a_view_is_written_in_a_line_and_read_again() -> None:
    views = [
        View.of("linear", (6, 4), [], [0], [1]),
        View.of("parts", (3, 2, 4, 5), [0, 3], [1], [2], axis=2),
        View.of("conv", (2, 4, 3, 3, 3), [0], [1], [3, 4, 2], axis=3),
    ]
    for view in views:
        assert View.read(view.text()) == view
    for text in ("", "linear", "a|1,2|0|1||2|3", "a|2,2|0|0|1|2", "a|x|0|||1", "a|0,2||0|1|2"):
        with pytest.raises(ValueError, match=r"describes no|invalid literal"):
            View.read(text)
