"""From a model to its structure: export, follow every node, read off what can go together.

No list of architectures: whatever `torch.export` can capture is followed operator by operator.
"""

from __future__ import annotations

import operator
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from torchprune import modes
from torchprune.calibration.batches import Batch, read_batches
from torchprune.errors import ShrinkError
from torchprune.graph.context import Context, Product
from torchprune.graph.labels import Labels, Resolved, axes_of
from torchprune.graph.left_as_is import left_as_is
from torchprune.graph.rules import follow
from torchprune.graph.values import Value, filled
from torchprune.masking.plain_state import slots_of, ties_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_PARAMETRIZED = re.compile(r"(.*?)(?:^|\.)parametrizations\.(\w+)\.original$")
_MASK = re.compile(r"(.*?)(?:^|\.)parametrizations\.(\w+)\.\d+\.\w+$")


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of one of the model's tensors, and the label of each of its indices."""

    key: str
    axis: int
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Size:
    """A size that the code of a module asks for, and the tag on that axis of what it makes."""

    module: str
    axis: int
    tag: Tensor


@dataclass
class Trace:
    """A graph followed to its end.

    Attributes:
        axes: of every parameter and buffer that the graph reads, tied ones once.
        resolved: what became of all labels.
        products: the contractions, for counting.
        sizes: what views and cuts ask for, by module.
        read: (labels,) bool, whether a label is an input index of a weight in some product.
        edges: pairs of flat tensors: labels that were joined, element by element.
    """

    axes: list[Axis]
    resolved: Resolved
    products: list[Product]
    sizes: list[Size]
    read: Tensor
    edges: list[tuple[Tensor, Tensor]] = field(repr=False)


@dataclass
class _Walk:
    labels: Labels = field(default_factory=Labels)
    axes: list[Axis] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    env: dict[Node, Any] = field(default_factory=dict)


def as_batch(model: nn.Module, example_inputs: Any) -> Batch:
    """Example inputs as one call: a tensor, a tuple or list (positional), a mapping (keywords)."""
    return read_batches([example_inputs], model, 1).batches[0]


def trace(model: nn.Module, example: Batch) -> Trace:
    """Follow the labels of a model's tensors through its graph.

    Raises:
        ShrinkError: the model cannot be exported, with what torch says about it.
    """
    return trace_program(model, exported(model, example))


def trace_program(model: nn.Module, program: ExportedProgram) -> Trace:
    """`trace` of a model that `exported` gave this program of."""
    slots = slots_of(model)
    ties = ties_of(slots)
    walk = _Walk()
    sources = sources_of(program)
    closed = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for name in module._parameters
    }
    known: dict[str, Value] = {}
    for node in program.graph_module.graph.nodes:
        if node.op == "placeholder":
            key = sources.get(node.name)
            walk.env[node] = _source(walk, node, key, ties, known)
            if key in closed:
                for tag in walk.env[node].tags:
                    walk.labels.freeze(tag, "nn.MultiheadAttention, which has one size for all")
        elif node.op == "get_attr":
            walk.env[node] = None
        elif node.op == "output":
            for value in _values(torch.fx.map_arg(node.args, walk.env.get)):
                for tag in value.tags:
                    walk.labels.freeze(tag, "it is an output of the model")
        else:
            _follow(walk, node)
    resolved = walk.labels.resolve()
    read = torch.zeros(len(resolved.classes), dtype=torch.bool)
    for tag in walk.labels.read:
        read[tag.reshape(-1)] = True
    return Trace(walk.axes, resolved, walk.products, walk.sizes, read, walk.labels.edges)


def sources_of(program: ExportedProgram) -> dict[str, str]:
    """The parameters and buffers of a program: placeholder -> name in the plain `state_dict`."""
    from torch.export.graph_signature import InputKind  # torch.export takes a while to import

    return {
        cast(Any, spec.arg).name: _plain(str(spec.target))
        for spec in program.graph_signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)
    }


def exported(model: nn.Module, example: Batch) -> ExportedProgram:
    """A model's graph, before anything is decomposed.

    Raises:
        ShrinkError: the model cannot be exported, with what torch says about it.
    """
    try:
        with (
            left_as_is(model),
            modes.calibration_mode(model),
            torch.no_grad(),
            warnings.catch_warnings(),
        ):
            # of what a forward keeps, which is taken back
            warnings.filterwarnings("ignore", "The tensor attributes? ", UserWarning)
            return torch.export.export(model, example.args, example.kwargs, strict=False)
    except Exception as error:
        where = _place_of(error)
        raise ShrinkError(
            f"torch.export cannot capture this {type(model).__name__}{where}: "
            f"{type(error).__name__}: {_first_line(error)}. Structures are read off the exported "
            "graph: make that line exportable (no branches on values, no data-dependent shapes), "
            "or give other example inputs"
        ) from error


def _place_of(error: BaseException) -> str:
    """The innermost line of the model's own code on the way to an error."""
    walk = traceback.walk_tb(error.__traceback__)
    lines = [(frame.f_code.co_filename, line) for frame, line in walk]
    return _place([line for line in lines if _of_the_model(line[0])])


def _place(lines: Sequence[tuple[str, object]]) -> str:
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


def _plain(name: str) -> str:
    """A tensor's name in the plain model; of a mask, that of the weight under it."""
    if found := _PARAMETRIZED.match(name) or _MASK.match(name):
        return f"{found[1]}.{found[2]}" if found[1] else found[2]
    return name


def _source(
    walk: _Walk, node: Node, key: str | None, ties: dict[str, str], known: dict[str, Value]
) -> Any:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    shape = tuple(int(size) for size in value.shape)
    if key is None:
        return Value(shape)  # an input of the model, whose sizes are not ours to change
    key = ties.get(key, key)
    if not value.is_floating_point():  # a mask shares the labels of the weight under it
        return known.get(key, Value(shape, weight=True))
    if key not in known:
        tags = filled(walk.labels, shape, range(len(shape)))
        walk.axes += [Axis(key, axes_of(tag)[0], tag.flatten()) for tag in tags]
        known[key] = Value(shape, tuple(tags), weight=True)
    return known[key]


def _follow(walk: _Walk, node: Node) -> None:
    args = torch.fx.map_arg(node.args, walk.env.get)
    if node.target is operator.getitem:
        held = cast(Any, args)[0]
        walk.env[node] = held[cast(int, node.args[1])] if isinstance(held, tuple) else held
        return
    kwargs = cast(dict[str, Any], torch.fx.map_arg(node.kwargs, walk.env.get))
    shapes = [tuple(int(s) for s in t.shape) for t in _tensors(node.meta.get("val"))]
    context = Context(walk.labels, _why(node), shapes, _module_of(node), walk.products)
    made = follow(context, node.target, args, kwargs)
    walk.env[node] = made
    for value in _values(made):
        for tag in value.tags:
            walk.sizes += [Size(_module_of(node), axis, tag) for axis in axes_of(tag)]


def _tensors(val: Any) -> Iterator[Tensor]:
    if isinstance(val, Tensor):
        yield val
    elif isinstance(val, list | tuple):
        for item in val:
            yield from _tensors(item)


def _values(nested: Any) -> Iterator[Value]:
    if isinstance(nested, Value):
        yield nested
    elif isinstance(nested, list | tuple):
        for item in nested:
            yield from _values(item)
    elif isinstance(nested, dict):
        yield from _values(list(nested.values()))


def _module_of(node: Node) -> str:
    """The path of the module whose code runs a node."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    return re.sub(r"@\d+$", "", paths[-1]) if paths else ""


def _why(node: Node) -> str:
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    module = _module_of(node)
    return f"{node.target}{_place(lines)}" + (f" in {module}" if module else "")
