"""`BudgetSpec`: how much of a model may stay, whatever kinds of units go for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from torchprune.errors import SpecError
from torchprune.specs.options import Checked, Reconstruct
from torchprune.structure.specs import HeadSpec, LayerSpec, NeuronSpec, StructuredSpec

Kinds = StructuredSpec | LayerSpec
Runtime = Literal["torch", "onnx"] | Callable[[nn.Module, tuple[Any, ...]], float]

AMOUNTS = ("parameters", "flops", "latency_ms")


@dataclass(frozen=True)
class BudgetSpec(Checked):
    """One budget over several kinds of units: neurons, heads, channels, whole blocks.

    What goes is chosen by what the model's outputs lose, in nats of KL from the dense model's, for
    each parameter, operation or millisecond saved: predicted for every group, and measured on the
    model as it would become for several numbers of blocks. After `torchprune.shrink` the budget is
    met, and no step that went could stay. Exactly one of the three amounts is given.

    Args:
        parameters: the share of the model's parameters that may stay, 0 < parameters < 1.
        flops: likewise of the floating point operations of all products on the first batch.
        latency_ms: milliseconds that the model may take on the first batch. Its layers are measured
            at a few widths, and what else it does is taken to stay as it is.
        over: what may go: `NeuronSpec`, `HeadSpec`, `ChannelSpec`, `LayerSpec`, each a class or an
            instance with options of its own (score, refit, reconstruct, round_to, targets, ...).
            Their amounts (sparsity, drop, allocation) and `LayerSpec`'s score are not used: the
            budget decides. Kinds that the model has not are left out.
        runtime: what serves the model, for `latency_ms`: "torch"; "onnx", its layers in ONNX
            Runtime, what is no layer as torch takes; or a callable (module, inputs) ->
            milliseconds that runs a module, for a device of your own.

    Raises:
        SpecError: for contradictions, values out of range and misspelt options.
    """

    parameters: float | None = None
    flops: float | None = None
    latency_ms: float | None = None
    over: tuple[Kinds | type[Kinds], ...] = (NeuronSpec, HeadSpec, LayerSpec)
    runtime: Runtime = "torch"

    method: ClassVar[str] = "budget"
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        given = [name for name in AMOUNTS if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise SpecError(f"BudgetSpec: give exactly one of {', '.join(AMOUNTS)}, got {got}")
        value, share = getattr(self, given[0]), given[0] != "latency_ms"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SpecError(f"BudgetSpec: {given[0]} must be a number, got {value!r}")
        if not 0 < value < (1 if share else math.inf):
            what = "the share that may stay, below 1" if share else "milliseconds"
            raise SpecError(f"BudgetSpec: {given[0]} must be {what} and above 0, got {value!r}")
        if self.runtime not in ("torch", "onnx") and not callable(self.runtime):
            raise SpecError(
                'BudgetSpec: runtime must be "torch", "onnx" or a callable (module, inputs) -> '
                f"milliseconds, got {self.runtime!r}"
            )
        object.__setattr__(self, "over", _made(self.over))

    @property
    def amount(self) -> str:
        """Which of the amounts is given."""
        return next(name for name in AMOUNTS if getattr(self, name) is not None)

    @property
    def kinds(self) -> tuple[Kinds, ...]:
        """What `over` holds, all of them instances."""
        return tuple(spec for spec in self.over if not isinstance(spec, type))

    @property
    def units(self) -> tuple[StructuredSpec, ...]:
        """The specs of units."""
        return tuple(spec for spec in self.kinds if isinstance(spec, StructuredSpec))

    @property
    def layers(self) -> LayerSpec | None:
        """The spec of whole blocks, if they may go."""
        return next((spec for spec in self.kinds if isinstance(spec, LayerSpec)), None)


def _made(over: object) -> tuple[Kinds, ...]:
    """The specs, classes among them made."""
    accepted = "NeuronSpec, HeadSpec, ChannelSpec and LayerSpec, as classes or instances"
    given = list(over) if isinstance(over, tuple | list) else [over]
    specs: list[Kinds] = []
    for one in given:
        made = one() if isinstance(one, type) and issubclass(one, Kinds) else one
        if not isinstance(made, Kinds) or type(made) is StructuredSpec:
            raise SpecError(f"BudgetSpec: over holds {accepted}, got {one!r}")
        if any(made.method == other.method for other in specs):
            raise SpecError(f"BudgetSpec: over names {made.method} twice")
        specs.append(made)
    if not specs:
        raise SpecError(f"BudgetSpec: over is empty; it holds {accepted}")
    training: list[Reconstruct] = []
    for spec in specs:
        if isinstance(spec, StructuredSpec) and isinstance(spec.reconstruct, Reconstruct):
            training.append(spec.reconstruct)
    if any(options != training[0] for options in training):
        raise SpecError(
            "BudgetSpec: a block is trained once, for all kinds together; the reconstruct= of the "
            "specs in over must be the same where given"
        )
    return tuple(specs)
