"""The letters of an einsum equation, and the equation of a tensordot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_letters


@dataclass(frozen=True)
class Terms:
    """One letter an axis, of both inputs and of the output; no letter twice in one of them."""

    inputs: tuple[str, str]
    output: str


def terms_of(equation: str, dims: Sequence[int]) -> Terms | None:
    """The terms of an equation of two operands, with letters in place of an ellipsis.

    Args:
        dims: how many axes each operand has.

    Returns:
        None for what is no product of two matrices: a diagonal, another number of operands.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if len(inputs) != 2 or len(dims) != 2:
        return None
    spare = [letter for letter in ascii_letters if letter not in equation]
    hidden = max(
        (d - len(t.replace("...", "")) for t, d in zip(inputs, dims, strict=True) if "..." in t),
        default=0,
    )
    names = "".join(spare[:hidden])
    if not arrow:
        letters = "".join(inputs).replace(".", "")
        right = "..." * bool(hidden) + "".join(
            sorted(letter for letter in set(letters) if letters.count(letter) == 1)
        )
    filled = []
    for term, count in zip(inputs, dims, strict=True):
        own = count - len(term.replace("...", ""))
        filled.append(term.replace("...", names[hidden - own :] if own else ""))
    terms = Terms((filled[0], filled[1]), right.replace("...", names))
    if any(len(set(t)) < len(t) for t in terms.inputs):
        return None
    return terms if all(len(t) == d for t, d in zip(filled, dims, strict=True)) else None


def letters_of(first: int, second: int, dims: Sequence[Sequence[int]]) -> Terms:
    """The terms of a tensordot of operands of so many axes over these axes of each."""
    a = list(ascii_letters[:first])
    b = list(ascii_letters[first : first + second])
    for mine, theirs in zip(dims[0], dims[1], strict=True):
        b[theirs] = a[mine]
    shared = {a[axis] for axis in dims[0]}
    output = [letter for letter in (*a, *b) if letter not in shared]
    return Terms(("".join(a), "".join(b)), "".join(output))
