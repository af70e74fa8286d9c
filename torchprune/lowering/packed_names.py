"""What packed weights are called whose parts have names, as graphs give them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

_PREFERRED = (1, 3, 0, 2)
"""Parts that tell weights apart, best first: values, scales, bits, starts."""


def weight_names(products: Iterable[Sequence[str]]) -> Iterator[str]:
    """For each product the name of its weight, each once as far as names go round.

    A graph may hold equal parts of several weights once, under the name of one of them: of two
    layers with one mask the second has bits of the first, and values of its own.

    Args:
        products: names of bits, values, starts and perhaps scales: NAME_bits of a weight, or
            LAYER.bits of a layer that was lowered.
    """
    used: set[str] = set()
    for parts in products:
        names = [_weight_of(parts[at]) for at in _PREFERRED if at < len(parts)]
        name = next((name for name in names if name not in used), names[0])
        used.add(name)
        yield name


def _weight_of(part: str) -> str:
    for kind in ("bits", "values", "starts", "scales"):
        if part.endswith(f"_{kind}"):
            return part.removesuffix(f"_{kind}")
        if part.endswith(f".{kind}"):
            return f"{part.removesuffix(kind)}weight"
    return part
