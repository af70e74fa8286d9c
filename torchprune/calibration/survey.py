"""A survey: a batch watched before anything is decided, to see which weights multiply, and how.

Linear layers and convolutions whose forward is torch's own need none. What else holds weights is
looked at: raw parameters, attention's packed projections, stacks of experts, modules with a forward
of their own, layers that are called several times. Where a batch leaves raw parameters untouched,
as a router may that sends its tokens elsewhere, some more are watched for these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchprune import modes
from torchprune.calibration.batches import Batch
from torchprune.calibration.operations import Product
from torchprune.calibration.routers import Routers
from torchprune.calibration.watch import Operand, Watch, Weights
from torchprune.masking.mask import original_of
from torchprune.masking.matrices import (
    is_fused_experts,
    is_stock,
    prunable_names,
    view_of,
)
from torchprune.masking.parts import Part, covered, view_of_parts
from torchprune.masking.reading import Reading
from torchprune.masking.selection import is_table, parameter_names, repeated_blocks


def is_plain(model: nn.Module) -> bool:
    """Whether every weight of two or more axes is read once, whole, by a forward of torch's own,
    and no block chooses among parts of it."""
    for module in model.modules():
        own = [p for p in module._parameters.values() if p is not None and p.dim() >= 2]
        kind = parametrize.type_before_parametrizations(module)
        if is_fused_experts(module) or (
            own
            and not is_stock(module)
            and not issubclass(kind, nn.Embedding | nn.modules.batchnorm._NormBase)
        ):
            return False
    return not any(
        isinstance(inner, nn.ModuleList | nn.ModuleDict) and any(inner.children())
        for block in repeated_blocks(model).values()
        for inner in block.modules()
    )


@dataclass(frozen=True)
class Survey:
    """What was seen, by the identity of parameters (those behind masks).

    Attributes:
        readings: how they are read, of those that multiply. One whose rows in one product are
            columns in another is as its first product reads it.
        gates: why one is a router or a gate.
    """

    readings: Mapping[int, Reading] = field(default_factory=dict)
    gates: Mapping[int, str] = field(default_factory=dict)


MOST_BATCHES = 8
"""That are watched for what the first of them did not read."""


def survey(model: nn.Module, batches: Sequence[Batch]) -> Survey:
    """Run the first batch, or a few, and see which parameters multiply, and how.

    Raises:
        Exception: whatever the model raises.
    """
    surveyor = _Surveyor(model)
    for batch in batches[:MOST_BATCHES]:
        surveyor.run(batch)
        if not surveyor.misses_any():
            break
    return surveyor.survey()


Call = tuple[nn.Module, int]
"""A module, and which call of it."""


@dataclass
class _Seen:
    """What was seen of one parameter: the parts read, by how many products, in which calls."""

    parts: list[Part] = field(default_factory=list)
    reads: int = 0
    calls: list[tuple[Call, ...]] = field(default_factory=list)


class _Surveyor:
    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._owner: dict[int, tuple[nn.Module, str]] = {}
        for module in model.modules():
            for name in parameter_names(module):
                weight = original_of(module, name)
                if isinstance(weight, Tensor) and weight.dim() >= 2 and not weight.is_meta:
                    self._owner.setdefault(id(weight), (module, name))
        self._weights = {key: original_of(*place) for key, place in self._owner.items()}
        self._readings: dict[int, Reading | None] = {}
        self._gates: dict[int, str] = {}
        self._touched: set[int] = set()
        self._seen: dict[int, _Seen] = {}  # in this batch, as all that follows
        self._stack: list[Call] = []
        self._calls: Counter[nn.Module] = Counter()

    def run(self, batch: Batch) -> None:
        """Watch one batch for what was not read before."""
        self._seen, self._calls = {}, Counter()
        routers = Routers()

        def saw(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
            routers.saw(func, args, kwargs, result)
            made = result if isinstance(result, tuple | list) else (result,)
            if any(isinstance(one, Tensor) for one in made):  # not its shape or dtype
                given = {id(value) for value in (*args, *kwargs.values())}
                self._touched |= given & self._owner.keys()

        watch = Watch(Weights(self._weights.values()), self._reached, saw)
        with ExitStack() as stack:
            stack.enter_context(modes.calibration_mode(self._model))
            for module in self._model.modules():
                stack.callback(module.register_forward_pre_hook(self._enter).remove)
                leave = module.register_forward_hook(self._leave, always_call=True)
                stack.callback(leave.remove)
            stack.enter_context(torch.no_grad())
            stack.enter_context(watch)
            batch.run(self._model)
        used = {key: self._reading(key, seen) for key, seen in self._seen.items()}
        for key, (module, name) in self._owner.items():
            known = name in prunable_names(module) and not is_fused_experts(module)
            if key not in used and known and self._calls[module]:
                view = view_of(module, self._weights[key].shape)
                used[key] = Reading(view, self._calls[module], hooked=True)
        self._readings = {**used, **self._readings}
        self._gates = {**routers.found, **self._gates}

    def misses_any(self) -> bool:
        """Whether a parameter was not touched that its module does not tell of, and that looks
        like matrices of its block."""
        blocks = repeated_blocks(self._model).values() or [self._model]
        inside = {id(m) for block in blocks for m in block.modules()}
        return any(
            key not in self._touched
            and id(module) in inside
            and not is_table(module)
            and name not in prunable_names(module)
            and sum(size > 1 for size in self._weights[key].shape) > 1
            for key, (module, name) in self._owner.items()
        )

    def survey(self) -> Survey:
        """What was seen in all batches."""
        readings = {key: reading for key, reading in self._readings.items() if reading is not None}
        return Survey(readings, self._gates)

    def _enter(self, module: nn.Module, *_: Any) -> None:
        self._calls[module] += 1
        self._stack.append((module, self._calls[module]))

    def _leave(self, *_: Any) -> None:
        self._stack.pop()

    def _reached(self, product: Product, operand: Operand) -> bool:
        seen = self._seen.setdefault(id(operand.parameter), _Seen())
        if operand.part not in seen.parts:
            seen.parts.append(operand.part)
        seen.reads += 1
        seen.calls.append(tuple(self._stack))
        return False

    def _reading(self, key: int, seen: _Seen) -> Reading | None:
        weight, (module, name) = self._weights[key], self._owner[key]
        parts, view = seen.parts, None
        if is_fused_experts(module):  # observed expert by expert
            return Reading(view_of(module, weight.shape))
        if name in prunable_names(module):
            view = view_of(module, weight.shape)
            if any(covered(view, part) is None for part in parts):
                view = None
        view = view or view_of_parts(weight, parts) or view_of_parts(weight, parts[:1])
        if view is None:
            return None
        if seen.reads == 1:
            return Reading(view)
        found = [one.group for part in parts for one in covered(view, part) or ()]
        once = seen.reads == len(parts) and sorted(found) == list(range(view.groups))
        return Reading(view, seen.reads if once or view.groups == 1 else None, self._scope(seen))

    def _scope(self, seen: _Seen) -> nn.Module:
        """The innermost module that is called once, with all reads in that call."""
        scope = self._model
        for same in zip(*seen.calls, strict=False):
            if len(set(same)) > 1:
                break
            module, _ = same[0]
            if self._calls[module] == 1:
                scope = module
        return scope
