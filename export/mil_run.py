"""An ML program run step by step, as far as that is possible where Core ML is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchprune.errors import ExportError
from torchprune.export import mil_shapes as mil_shapes  # registers its operators
from torchprune.export.coreml_file import MLProgram, Step, is_constexpr, unpacked
from torchprune.export.mil_steps import STEPS

_OURS = ("const", "read_state", "write_state")

_FLOATS = {np.float16: torch.float16, np.float32: torch.float32, np.float64: torch.float32}


class MILRun:
    """A program and its states between calls; floats are rounded to their type after each step.

    Raises:
        ExportError: it has operators that are not known here.
    """

    def __init__(self, program: MLProgram) -> None:
        self._program = program
        unknown = {
            step.kind
            for step in program.steps
            if not (step.kind in STEPS or step.kind in _OURS or is_constexpr(step))
        }
        if unknown:
            raise ExportError(
                "the Core ML program has operators whose results cannot be checked here: "
                f"{', '.join(sorted(unknown))}"
            )
        self._constants: dict[str, Any] = {}
        held: dict[str, list[Any]] = {}
        for step in program.steps:
            if step.kind == "const":
                held[step.outputs[0][0]] = [step.inputs["val"][0]]
            elif is_constexpr(step):
                made = unpacked(step, held)
                held |= {n: [v] for (n, _), v in zip(step.outputs, made, strict=True)}
        self._constants = {name: _in_torch(value[0]) for name, value in held.items()}
        self._steps = [s for s in program.steps if s.kind != "const" and not is_constexpr(s)]
        self.forget()

    def forget(self) -> None:
        """Empty the states."""
        self._states = {
            name: torch.zeros(shape, dtype=_FLOATS[dtype])
            for name, (dtype, shape) in self._program.states.items()
        }

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for inputs in the program's order.

        Raises:
            ExportError: their number is another, or a step fails.
        """
        wanted = self._program.inputs
        if len(inputs) != len(wanted):
            raise ExportError(
                f"the program takes {len(wanted)} inputs, and {len(inputs)} were given"
            )
        values = dict(self._constants)
        for (name, (dtype, _)), given in zip(wanted.items(), inputs, strict=True):
            values[name] = _as(given.detach().cpu(), dtype)
        for step in self._steps:
            try:
                made = self._made(step, values)
                for (name, dtype), value in zip(step.outputs, made, strict=True):
                    values[name] = _as(value, dtype)
            except Exception as error:
                name = step.outputs[0][0] if step.outputs else ""
                raise ExportError(f"step {name} ({step.kind}) fails: {error}") from error
        return [values[name] for name in self._program.outputs]

    def _made(self, step: Step, values: dict[str, Any]) -> Sequence[Tensor]:
        if step.kind == "read_state":
            return [self._states[str(step.inputs["input"][0])]]
        if step.kind == "write_state":
            (state,), (data,) = step.inputs["input"], step.inputs["data"]
            self._states[state] = values[data].to(self._states[state].dtype)
            return []
        given: dict[str, Any] = {}
        for key, bound in step.inputs.items():
            found = [_wide(values[b] if isinstance(b, str) else _in_torch(b)) for b in bound]
            given[key] = found if key == "values" else found[0]
        made = STEPS[step.kind](given)
        return made if isinstance(made, list) else [made]


def _in_torch(value: Any) -> Any:
    """An array as a tensor, integers as int64; a string as it is."""
    if value.dtype.kind in "US":
        return str(value)
    kind = np.int64 if value.dtype.kind in "iu" else value.dtype
    return torch.from_numpy(np.array(value, kind))


def _wide(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype == torch.float16
    return value.float() if half else value


def _as(value: Tensor, dtype: Any) -> Tensor:
    """A value as the type that a program gives it."""
    if dtype in _FLOATS:
        return value.to(_FLOATS[dtype])
    return value.bool() if dtype is np.bool_ else value.long()
