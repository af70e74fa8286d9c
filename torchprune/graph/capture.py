"""A model's code captured as graphs: one for each way of calling it that is to go on working."""

from __future__ import annotations

import logging
import re
import sys
import traceback
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Node

from torchprune import modes
from torchprune.calibration.batches import Batch, read_batches
from torchprune.calibration.left_as_is import left_as_is
from torchprune.errors import ShrinkError
from torchprune.graph.handed import marks_on

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_MODES = ("eval", "train")


@dataclass(frozen=True)
class Call:
    """A way of calling a model: inputs, and whether it trains."""

    batch: Batch
    training: bool = False


def as_batch(model: nn.Module, example_inputs: Any) -> Batch:
    """Example inputs as one call: a tensor, a tuple (positional), a mapping (keywords)."""
    return read_batches([example_inputs], model, 1).batches[0]


def as_calls(
    model: nn.Module, example_inputs: Any, modes_asked: Sequence[str] = ("eval",)
) -> list[Call]:
    """Example inputs in every mode; a list holds several examples.

    Raises:
        ShrinkError: no example, or no such mode.
    """
    asked = [modes_asked] if isinstance(modes_asked, str) else list(modes_asked)
    if not asked or not set(asked) <= set(_MODES):
        raise ShrinkError(f'modes must be some of "eval" and "train", got {modes_asked!r}')
    examples = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    if not examples:
        raise ShrinkError("there is no example input: give a tensor, a tuple or a mapping")
    batches = [as_batch(model, example) for example in examples]
    return [Call(batch, mode == "train") for mode in asked for batch in batches]


def exported(model: nn.Module, call: Call, marked: Collection[str] = ()) -> ExportedProgram:
    """A model's graph, before anything is decomposed.

    Args:
        marked: the modules whose arguments have marks in it.

    Raises:
        ShrinkError: the model cannot be exported, with what torch says about it.
    """
    try:
        with (
            marks_on(model, marked),
            left_as_is(model),
            modes.calibration_mode(model, training=call.training),
            torch.no_grad(),
            warnings.catch_warnings(),
            _errors_said_once(),
        ):
            # of what a forward keeps, which is taken back
            warnings.filterwarnings("ignore", "The tensor attributes? ", UserWarning)
            program = torch.export.export(model, call.batch.args, call.batch.kwargs, strict=False)
            return program.run_decompositions({}) if _writes_parts(program) else program
    except Exception as error:
        where = place_of(error)
        raise ShrinkError(
            f"torch.export cannot capture this {type(model).__name__}{where}: "
            f"{type(error).__name__}: {_first_line(error)}. Structures are read off the exported "
            "graph: make that line exportable (no branches on values, no data-dependent shapes), "
            "or give other example inputs"
        ) from error


@contextmanager
def _errors_said_once() -> Iterator[None]:
    """Without the log that torch writes, with a traceback, of an error that it raises too."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def _writes_parts(program: ExportedProgram) -> bool:
    """Whether code writes into a view of a tensor, or over one, so that others see it."""
    for node in program.graph_module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            held = node.args[0] if node.args else None
            if node.target.overloadpacket not in _WHOLE or _is_view(held):
                return True
    return False


def _is_view(held: Any) -> bool:
    schema = getattr(getattr(held, "target", None), "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


_WHOLE = {
    getattr(torch.ops.aten, name)
    for name in (
        *("relu_", "silu_", "elu_", "leaky_relu_", "hardtanh_", "hardswish_", "hardsigmoid_"),
        *("add_", "sub_", "mul_", "div_", "clamp_", "masked_fill_", "dropout_"),
    )
}
"""In-place operators on a whole tensor: the same to labels as what they are in place of."""


def place_of(error: BaseException) -> str:
    """The innermost line of the model's own code on the way to an error."""
    walk = traceback.walk_tb(error.__traceback__)
    lines = [(frame.f_code.co_filename, line) for frame, line in walk]
    return place([line for line in lines if _of_the_model(line[0])])


def place_of_node(node: Node) -> str:
    """The innermost line of the model's own code that made a node; of torch's, if it is all."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return place([line for line in lines if _of_the_model(line[0])] or lines)


def module_of_node(node: Node) -> str:
    """The path of the module whose code runs a node."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    return re.sub(r"@\d+$", "", paths[-1]) if paths else ""


def place(lines: Sequence[tuple[str, object]]) -> str:
    """The last of some lines of code, as it is named in a message."""
    return f" at {Path(lines[-1][0]).name}:{lines[-1][1]}" if lines else ""


def _of_the_model(file: str) -> bool:
    """Whether code is the user's: of no folder of torch or of this package, wherever they lie."""
    packages = (sys.modules.get(name) for name in ("torch", "torchprune", "torchprune.export"))
    folders = [folder for package in packages if package for folder in package.__path__]
    return not file.startswith("<") and not any(map(Path(file).is_relative_to, folders))


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0].strip() if lines else "no reason given"
