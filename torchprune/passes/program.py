"""A copy of an exported program that passes can change."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, Node


@dataclass(frozen=True)
class Passed:
    """What a pass made.

    Attributes:
        program: a new program; it shares the tensors that the pass did not change.
        modified: names of the parameters that the pass did something about.
        left: names of those it looked at and left, with the reason.
    """

    name: str
    program: ExportedProgram
    modified: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.modified:
            shown = ", ".join(self.modified[:4])
            more = f" and {len(self.modified) - 4} more" if len(self.modified) > 4 else ""
            lines = [f"{self.name}: {len(self.modified)} changed ({shown}{more})"]
        else:
            lines = [f"{self.name}: nothing to do"]
        return "\n".join([*lines, *(f"left: {name}: {why}" for name, why in self.left.items())])


class Draft:
    """The graph, signature and tensors of a program, copied as far as they may be changed."""

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self.module = copy.deepcopy(program.graph_module)
        for new, old in zip(self.graph.nodes, program.graph_module.graph.nodes, strict=True):
            new.name = old.name  # a copy renames inputs such as "input", and specs go by name
        self.specs = list(program.graph_signature.input_specs)
        self.state: dict[str, Any] = dict(program.state_dict)
        self.constants: dict[str, Any] = dict(program.constants)

    @property
    def graph(self) -> Graph:
        """The program's outermost graph."""
        return cast(Graph, self.module.graph)

    def placeholders(self) -> dict[str, Node]:
        """The graph's inputs by their names in it."""
        return {node.name: node for node in self.graph.nodes if node.op == "placeholder"}

    def held(self, *kinds: InputKind) -> Iterator[tuple[InputSpec, Node]]:
        """The parameters, buffers or constants, each with its placeholder."""
        nodes = self.placeholders()
        for spec in list(self.specs):
            if spec.kind in kinds:
                yield spec, nodes[cast(TensorArgument, spec.arg).name]

    def value_of(self, node: object) -> Tensor | None:
        """What a placeholder stands for, if the program holds it."""
        if not isinstance(node, Node) or node.op != "placeholder":
            return None
        for spec in self.specs:
            if isinstance(spec.arg, TensorArgument) and spec.arg.name == node.name:
                found = self.state.get(str(spec.target), self.constants.get(str(spec.target)))
                return found if isinstance(found, Tensor) else None
        return None

    def add_buffer(self, target: str, tensor: Tensor) -> Node:
        """A new persistent buffer, before the first input that the user gives."""
        nodes = self.placeholders()
        at = next(
            (i for i, spec in enumerate(self.specs) if spec.kind == InputKind.USER_INPUT),
            len(self.specs),
        )
        name = self.graph._graph_namespace.create_name(f"b_{target.replace('.', '_')}", None)
        if at < len(self.specs):
            argument = cast(TensorArgument, self.specs[at].arg)
            place = self.graph.inserting_before(nodes[argument.name])
        else:
            place = self.graph.inserting_after(list(nodes.values())[-1] if nodes else None)
        with place:
            node = self.graph.placeholder(name)
        node.meta["val"] = self._fake(tensor)
        argument = TensorArgument(name=node.name)
        self.specs.insert(at, InputSpec(InputKind.BUFFER, argument, target, persistent=True))
        self.state[target] = tensor
        return node

    def drop(self, node: Node) -> None:
        """Take out a placeholder that nothing uses, and its tensor unless another name needs it."""
        spec = next(
            s for s in self.specs if isinstance(s.arg, TensorArgument) and s.arg.name == node.name
        )
        self.specs.remove(spec)
        self.graph.erase_node(node)
        if not any(other.target == spec.target for other in self.specs):
            self.state.pop(str(spec.target), None)
            self.constants.pop(str(spec.target), None)

    def replace(self, target: str, tensor: Tensor) -> None:
        """Another value under a name; the old tensor is not touched."""
        old = self.state[target]
        if isinstance(old, torch.nn.Parameter):
            tensor = torch.nn.Parameter(tensor, requires_grad=old.requires_grad)
        self.state[target] = tensor

    def finish(self) -> ExportedProgram:
        """The new program, checked."""
        self.graph.lint()
        self.module.recompile()
        before = self._program.graph_signature
        signature = ExportGraphSignature(
            input_specs=self.specs, output_specs=self._outputs(before.output_specs)
        )
        program = self._program._update(
            self.module, signature, state_dict=self.state, constants=self.constants
        )
        program.validate()
        return program

    def _outputs(self, specs: Sequence[OutputSpec]) -> list[OutputSpec]:
        """The output specs, by the names that their nodes have now."""
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        return [
            replace(spec, arg=TensorArgument(name=node.name))
            if isinstance(node, Node) and isinstance(spec.arg, TensorArgument)
            else spec
            for spec, node in zip(specs, output.args[0], strict=True)
        ]

    def _fake(self, tensor: Tensor) -> Tensor:
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch._subclasses.FakeTensor):
                return value.fake_mode.from_tensor(tensor, static_shapes=True)
        return tensor.to("meta")


def calls(graph: Graph, *operators: object) -> Iterator[Node]:
    """The nodes that call one of these operators."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in operators:
            yield node


def tied(state: Mapping[str, Any]) -> dict[str, list[str]]:
    """For every name whose values another name shares: the others."""
    by_address: dict[int, list[str]] = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.device.type != "meta" and tensor.numel():
            by_address.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    return {
        name: [n for n in names if n != name]
        for names in by_address.values()
        if len(names) > 1
        for name in names
    }
