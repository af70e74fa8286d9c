"""An exported program as coremltools' front end knows it: the bridge between its torch and ours.

coremltools 9 was written for torch 2.7. Three things are done to a program before it reads it:

- operators that it has no translation for (`diff`, `where` with a number, ...) are decomposed into
  those that torch's own tables give, until it knows all of them;
- what depends on no input (masks and positions of a fixed size) is computed here and stored, and
  checks of metadata, aliases and unused tables are dropped;
- batch norms are folded into the convolutions before them, so that the weight in the file is known
  to the bit: zeros stay zero. coremltools' own passes that scale weights are left out.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram, default_decompositions
from torch.export.graph_signature import InputKind

from torchprune.errors import ExportError

LEFT_OUT = (
    "common::fuse_conv_scale",
    "common::fuse_conv_batchnorm",
    "common::canonicalize_inplace_pattern",
)
"""Passes of coremltools that would multiply weights by something, or fail on several states."""

_LARGEST = 1 << 22
"""Elements of a constant that may be stored though it is larger than what it is made of."""

_ROUNDS = 8
"""Times that unknown operators are decomposed, at most."""

_aten = torch.ops.aten
_NORM: Any = _aten._native_batch_norm_legit_no_training.default
_PASSED_ON: tuple[Any, ...] = (
    _aten.alias.default,
    _aten.detach.default,
    _aten.lift_fresh_copy.default,
)
_SAYS_NOTHING: tuple[Any, ...] = (
    _aten._assert_tensor_metadata.default,
    _aten._assert_scalar.default,
)


@dataclass(frozen=True)
class Bridged:
    """A program to convert, and its weights.

    Attributes:
        weights: the tensors that its graph reads, by the name of the node that reads them.
        names: what the model calls those of them that are its parameters, norms folded or not.
    """

    program: ExportedProgram
    weights: dict[str, Tensor]
    names: dict[str, str]


def bridge(program: ExportedProgram) -> Bridged:
    """Make a program one that coremltools reads. The given one stays as it was.

    Raises:
        ExportError: operators that coremltools knows neither whole nor in parts, or an output that
            is an input.
    """
    program = _decomposed(program)
    graph = _Constants(program)
    _drop(graph.nodes)
    graph.fold_norms()
    graph.fold()
    graph.nodes.eliminate_dead_code()
    _name_outputs(program)
    program.graph_module.recompile()
    read = {node.name: graph.values[node.name] for node in graph.readers()}
    names = {name: label for name, label in graph.names.items() if name in read}
    return Bridged(program, read, names)


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    known, tried = _known(), set[Any]()
    table: Any = {}
    with torch.no_grad():
        program = program.run_decompositions(table)
        whole: Any = default_decompositions()
        for _ in range(_ROUNDS):
            unknown = {node.target for node in _calls(program.graph) if not known(node.target)}
            table = {target: whole[target] for target in unknown if target in whole}
            if not set(table) - tried:
                break
            tried |= set(table)
            program = program.run_decompositions(table)
    if unknown:
        raise ExportError(
            "coremltools has no translation of these operators, and torch none into others: "
            f"{', '.join(sorted(map(str, unknown)))}"
        )
    return program


def _known() -> Callable[[Any], bool]:
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY
    from coremltools.converters.mil.frontend.torch.utils import sanitize_op_kind

    known = _TORCH_OPS_REGISTRY.name_to_func_mapping

    def knows(target: Any) -> bool:
        if target in _PASSED_ON or target in _SAYS_NOTHING:
            return True
        name = target.name() if hasattr(target, "name") else target.__name__
        return sanitize_op_kind(name) in known

    return knows


def _calls(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op == "call_function")


def _drop(graph: fx.Graph) -> None:
    """Take out what computes nothing."""
    for node in list(_calls(graph)):
        if node.target in _PASSED_ON:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        if node.target in _PASSED_ON or node.target in _SAYS_NOTHING:
            graph.erase_node(node)


def _name_outputs(program: ExportedProgram) -> None:
    """Let the signature name those nodes that the graph now gives.

    Raises:
        ExportError: one of them is an input.
    """
    (end,) = program.graph.find_nodes(op="output")
    inputs = set(program.graph_signature.user_inputs)
    for spec, node in zip(program.graph_signature.output_specs, end.args[0], strict=True):
        if isinstance(node, fx.Node):
            spec.arg.name = node.name
            if node.name in inputs:
                raise ExportError(
                    f"the model gives its input {node.name} back as it came, which coremltools "
                    "cannot name as an output; leave it out"
                )


class _Constants:
    """A program's graph, the tensors it holds, and new ones that take the place of nodes."""

    def __init__(self, program: ExportedProgram) -> None:
        self.module = program.graph_module
        self.nodes = self.module.graph
        self.values: dict[str, Tensor] = {}
        self.names: dict[str, str] = {}
        mutated = set(program.graph_signature.buffers_to_mutate.values())
        for spec in program.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT or spec.target in mutated:
                continue
            held = program.constants if spec.kind is InputKind.CONSTANT_TENSOR else None
            label = str(spec.target)
            value = held[label] if held is not None else _held(program, label)
            self.values[spec.arg.name] = value.detach()
            if spec.kind is InputKind.PARAMETER:
                self.names[spec.arg.name] = label

    def readers(self) -> list[fx.Node]:
        """The nodes that stand for constants and are read."""
        return [node for node in self.nodes.nodes if node.name in self.values and node.users]

    def put(self, node: fx.Node, value: Tensor, label: str | None = None) -> fx.Node:
        """A constant that stands before a node, which is replaced with it if it has no label."""
        name = f"constant_{len(self.values)}"
        self.module.register_buffer(name, value.contiguous())
        with self.nodes.inserting_before(node):
            made = self.nodes.create_node("get_attr", name, name=name)
        made.meta["val"] = value
        self.values[made.name] = value
        if label is not None:
            self.names[made.name] = label
        return made

    def fold(self) -> None:
        """Compute what depends on constants alone, where it is not much larger than they are."""
        known = dict(self.values)
        for node in list(_calls(self.nodes)):
            inputs = node.all_input_nodes
            if any(source.name not in known for source in inputs) or not _is_pure(node):
                continue
            value = node.meta.get("val")
            sizes = [known[source.name].numel() for source in inputs]
            if not isinstance(value, Tensor) or not _is_fixed(value):
                continue
            if value.numel() > max([_LARGEST, *sizes]):
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: known[n.name])
            with torch.no_grad():
                known[node.name] = node.target(*args, **kwargs)  # type: ignore[operator]
        for node in list(_calls(self.nodes)):
            if node.name in known and any(user.name not in known for user in node.users):
                sources = self._labels(node)
                made = self.put(node, known[node.name], sources[0] if len(sources) == 1 else None)
                node.replace_all_uses_with(made)

    def _labels(self, node: fx.Node) -> list[str]:
        """The parameters that a constant is made of."""
        found, left, seen = set[str](), [node], set[str]()
        while left:
            at = left.pop()
            if at.name in seen:
                continue
            seen.add(at.name)
            if at.name in self.names:
                found.add(self.names[at.name])
            left += at.all_input_nodes
        return sorted(found)

    def fold_norms(self) -> None:
        """Fold batch norms into the convolutions whose only readers they are."""
        for node in list(_calls(self.nodes)):
            if node.target is not _NORM:
                continue
            made = self._folded_convolution(node)
            taken = [user for user in node.users if user.target is operator.getitem]
            if made is None or any(user.args[1] != 0 for user in taken if user.users):
                continue
            for user in taken:
                user.replace_all_uses_with(made)

    def _folded_convolution(self, norm: fx.Node) -> fx.Node | None:
        conv = norm.args[0]
        if not isinstance(conv, fx.Node) or len(conv.users) != 1:
            return None
        if conv.target not in (_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default):
            return None
        _, weight, *rest = conv.args
        bias = rest[0] if rest else None
        parts = [weight, bias, *norm.args[1:5]]
        if any(isinstance(p, fx.Node) and p.name not in self.values for p in parts):
            return None
        w, b, gamma, beta, mean, var = (
            self.values[p.name].double() if isinstance(p, fx.Node) else None for p in parts
        )
        assert w is not None
        assert mean is not None
        assert var is not None
        scale = (var + norm.args[6]).rsqrt()  # type: ignore[operator]
        scale = scale if gamma is None else scale * gamma
        shift = -mean if b is None else b - mean
        shift = shift * scale if beta is None else shift * scale + beta
        dtype = self.values[weight.name].dtype  # type: ignore[union-attr]
        shaped = scale.reshape(-1, *[1] * (w.dim() - 1))
        new = torch.where(w == 0, 0.0, w * shaped).to(dtype)
        label = self.names.get(weight.name)  # type: ignore[union-attr]
        made = self.put(conv, new, label), self.put(conv, shift.to(dtype))
        conv.args = (conv.args[0], *made, *rest[1:])
        return conv


def _held(program: ExportedProgram, name: str) -> Tensor:
    value = program.state_dict.get(name)
    return program.constants[name] if value is None else value  # type: ignore[return-value]


def _is_pure(node: fx.Node) -> bool:
    target: Any = node.target
    if target is operator.getitem:
        return False
    schema = getattr(target, "_schema", None)
    random = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
    return schema is not None and not schema.is_mutable and not random


def _is_fixed(value: Tensor) -> bool:
    return all(isinstance(size, int) for size in value.shape)
