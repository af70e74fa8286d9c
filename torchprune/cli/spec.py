"""What `torchprune prune` is asked for, as a spec: the method and the options that better it."""

from __future__ import annotations

from enum import StrEnum
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

from torchprune.cli.console import typer

if TYPE_CHECKING:
    from torchprune.specs.goals import Override
    from torchprune.specs.spec import Spec

_BETTER = "Better quality"


class Method(StrEnum):
    """How weights are chosen."""

    magnitude = "magnitude"
    wanda = "wanda"
    ria = "ria"
    sparsegpt = "sparsegpt"
    admm = "admm"
    best = "best"


class Effort(StrEnum):
    """The levels of `BestSpec`, and of `recover`."""

    fast = "fast"
    balanced = "balanced"
    max = "max"


class Refine(StrEnum):
    """What may follow a method in each layer."""

    pcg = "pcg"
    swaps = "swaps"


class Quantize(StrEnum):
    """Grids that SparseGPT may round to in its sweep."""

    int8 = "int8"
    int4 = "int4"


class Allocation(StrEnum):
    """How layers share the zeros."""

    uniform = "uniform"
    owl = "owl"
    error = "error"
    sensitivity = "sensitivity"
    search = "search"


MethodOption = Annotated[
    Method,
    typer.Option(
        metavar="METHOD",
        help="magnitude needs no data; wanda and ria keep weights as they are; sparsegpt, and "
        "slower and better admm, update those that stay; best is admm and more (--effort).",
    ),
]
EffortOption = Annotated[
    Effort | None,
    typer.Option(
        help="How much to spend. prune --method best: fast takes about 3 times as long as "
        "sparsegpt; balanced trains each block, about 8 times; max has the model write more text "
        "for that, 40 times. recover: one, three or ten passes over the data. Default: balanced.",
        rich_help_panel=_BETTER,
        show_default=False,
    ),
]
RefineOption = Annotated[
    Refine | None,
    typer.Option(
        help="pcg refits what a mask keeps, as admm and best do anyway; swaps betters the masks "
        "of magnitude, wanda and ria.",
        rich_help_panel=_BETTER,
        show_default=False,
    ),
]
AlphaOption = Annotated[
    float | None,
    typer.Option(
        help="For updated weights: how far, 0 to 1, they reach for the dense model's outputs; "
        "every window also runs dense. Default: 0; for best 0.25, or 0 if balanced.",
        rich_help_panel=_BETTER,
        show_default=False,
    ),
]
ReconstructOption = Annotated[
    bool,
    typer.Option(
        "--reconstruct",
        help="Train what each block keeps to the outputs it had; many windows help.",
        rich_help_panel=_BETTER,
    ),
]
PermuteOption = Annotated[
    bool,
    typer.Option(
        "--permute",
        help="For N:M: first put neurons in an order in which more survives.",
        rich_help_panel=_BETTER,
    ),
]
QuantizeOption = Annotated[
    Quantize | None,
    typer.Option(
        help="For --method sparsegpt: round what is kept in the same sweep, to eight bits by row "
        "or to four in groups of 32.",
        rich_help_panel=_BETTER,
        show_default=False,
    ),
]
AllocationOption = Annotated[
    Allocation,
    typer.Option(
        help="Share the same total of zeros among layers by outliers (owl), by the layers' errors, "
        "by what the outputs lose (sensitivity) or by a search on the model's loss. Not for N:M.",
        rich_help_panel=_BETTER,
    ),
]


def spec_of(method: Method) -> type[Spec]:
    """The spec in the method's own file. torch, which takes a while to import, comes with it."""
    home = import_module(f"torchprune.methods.{method.value}")
    kinds = (kind for kind in vars(home).values() if isinstance(kind, type))
    return next(kind for kind in kinds if getattr(kind, "method", None) == method.value)


def better_options(
    method: Method,
    effort: Effort | None,
    refine: Refine | None,
    alpha: float | None,
    reconstruct: bool,
    permute: bool,
    allocation: Allocation,
    quantize: Quantize | None,
) -> dict[str, Any]:
    """Those that were given, by their words; the others stay the spec's own defaults.

    Raises:
        typer.BadParameter: an effort for another method than `best`, or a grid for another than
            `sparsegpt`.
    """
    if quantize is not None and method is not Method.sparsegpt:
        raise typer.BadParameter(
            f"{quantize.value} is rounded to by --method sparsegpt, and the method is "
            f"{method.value}; add --method sparsegpt, or leave --quantize out",
            param_hint="--quantize",
        )
    if effort is not None and method is not Method.best:
        raise typer.BadParameter(
            f"{effort.value} is a level of --method best, and the method is {method.value}; "
            "add --method best, or leave --effort out",
            param_hint="--effort",
        )
    given: dict[str, Any] = {}
    for name, choice in (("effort", effort), ("refine", refine), ("quantize", quantize)):
        if choice is not None:
            given[name] = choice.value
    if alpha is not None:
        given["alpha"] = alpha
    given |= {k: True for k, on in (("reconstruct", reconstruct), ("permute", permute)) if on}
    if allocation is not Allocation.uniform:
        given["allocation"] = allocation.value
    return given


def as_values(options: dict[str, Any]) -> dict[str, Any]:
    """Options by their words as specs take them: grids become values. torch comes with it."""
    words = {member.value for member in Quantize}
    if options.get("quantize") not in words:
        return options
    from torchprune.specs.quantize import Int4, Int8

    kinds = {Quantize.int4: Int4, Quantize.int8: Int8}
    return {**options, "quantize": kinds[Quantize(options["quantize"])]()}


def override_of(item: str) -> tuple[str, Override]:
    """`NAME=VALUE` as a selector and what `Spec.overrides` accepts.

    Raises:
        typer.BadParameter: it is not of that form.
    """
    name, found, text = item.rpartition("=")
    if not (name and found and text):
        raise typer.BadParameter(f"{item!r} is not NAME=VALUE", param_hint="--override")
    pattern, pair, share = text.partition(",")
    try:
        return name, ((pattern, float(share)) if pair else float(text))
    except ValueError:
        if pair:
            raise typer.BadParameter(
                f"{item!r}: {share!r} is no sparsity", param_hint="--override"
            ) from None
        return name, text
