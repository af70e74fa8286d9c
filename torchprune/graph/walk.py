"""Graphs followed node by node: what becomes of the labels of a model's tensors."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from torchprune.graph.capture import module_of_node, place_of_node
from torchprune.graph.context import Context, Product
from torchprune.graph.handed import MARK, Entries, Handed
from torchprune.graph.labels import Choice, GroupChoice, Labels, Resolved, axes_of
from torchprune.graph.numbering import Numbering
from torchprune.graph.program_inputs import constants_of, sources_of, written
from torchprune.graph.rules import follow, tensors_in
from torchprune.graph.values import Value, fresh, sizes_of
from torchprune.masking.plain_state import slots_of, ties_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram


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


@dataclass(frozen=True, eq=False)
class Ask:
    """A number in the code that is the size of an axis: the line, and the tag on that axis."""

    module: str
    place: str
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
        unread: the parameters that no graph reads.
        untried: why the other mode, in which they may be read, could not be captured.
        asks: where the code gives sizes as numbers, in order.
        grouped: how convolutions with groups may lose channels.
        handed: arguments of modules that are narrowed on entry where units go.
    """

    axes: list[Axis]
    resolved: Resolved
    products: list[Product]
    sizes: list[Size]
    read: Tensor
    edges: list[tuple[Tensor, Tensor]] = field(repr=False)
    unread: list[str] = field(default_factory=list)
    untried: str = ""
    asks: list[Ask] = field(default_factory=list, repr=False)
    grouped: list[GroupChoice] = field(default_factory=list, repr=False)
    handed: list[Handed] = field(default_factory=list, repr=False)


class Walk:
    """The graphs of one model, followed one after the other with the same labels."""

    def __init__(
        self,
        model: nn.Module,
        turned: Collection[Choice],
        settled: Collection[Choice],
        entries: Entries,
    ) -> None:
        self.model, self.labels, self.entries = model, Labels(turned, settled), entries
        self.graphs = 0
        self.slots = slots_of(model)
        self.ties = ties_of(self.slots)
        self.axes: list[Axis] = []
        self.products: list[Product] = []
        self.sizes: list[Size] = []
        self.asks: list[Ask] = []
        self.extents: dict[str, dict[int, deque[tuple[int, Tensor]]]] = {}
        self.known: dict[str, Value] = {}
        self.counting = True

    def meet(self, program: ExportedProgram) -> None:
        """Label what a graph reads, before it is followed: the same in every walk."""
        sources, constants = sources_of(self.model, program), constants_of(program)
        for node in program.graph_module.graph.nodes:
            if node.op == "placeholder" and node.users and node.name not in constants:
                self._source(node, sources.get(node.name))

    def follow(self, program: ExportedProgram) -> None:
        """Every node of a graph; the products of the first graph are counted."""
        env: dict[Node, Any] = {}
        sources, constants = sources_of(self.model, program), constants_of(program)
        numbering = Numbering(program.graph_module.graph)
        shown = set(program.graph_signature.user_outputs)
        alive = _alive(program.graph_module.graph)
        for node in program.graph_module.graph.nodes:
            if node.op == "placeholder" and not node.users:  # export lists what is not read too
                env[node] = None
            elif node.op == "placeholder":
                data = constants.get(node.name)
                key = sources.get(node.name)
                env[node] = self._source(node, key) if data is None else written(data)
            elif node.op == "get_attr":
                env[node] = None
            elif node.op == "output":
                given = [n for n in node.all_input_nodes if n.name in shown]
                for value in _values([env.get(n) for n in given]):
                    for tag in value.held():
                        self.labels.freeze(tag, "it is an output of the model")
            elif (first := numbering.first_like(node)) is not node and _is_mask(node):
                env[node] = env[first]
            else:
                self.labels.idle = node not in alive
                self._step(env, node)
                self.labels.idle = False
        self.counting = False
        self.graphs += 1

    def unread(self) -> list[str]:
        """The parameters that no graph so far reads."""
        return [
            key
            for key, slot in self.slots.items()
            if slot.kind == "parameter" and self.ties.get(key, key) not in self.known
        ]

    def close(self) -> None:
        """Freeze what could be read by parameters that no graph reads: axes as long as theirs."""
        lengths: dict[int, str] = {}
        for key in self.unread():
            shape = self.slots[key].tensor.shape
            for size in shape:
                lengths.setdefault(size, key)
            if len(shape) == 2:  # positions may have been flattened into its inputs
                for axis in self.axes:
                    if shape[1] % len(axis.labels) == 0:
                        lengths.setdefault(len(axis.labels), key)
        for axis in self.axes:
            if len(axis.labels) > 1 and (owner := lengths.get(len(axis.labels))):
                why = f"{owner}, which no example reads and which may belong to it"
                self.labels.freeze(axis.labels, why)

    def held(self, resolved: Resolved) -> Tensor:
        """(labels,) bool, over classes: those that a tensor of the model has on an axis."""
        found = torch.zeros(len(resolved.classes), dtype=torch.bool)
        for axis in self.axes:
            found[resolved.classes[axis.labels]] = True
        return found

    def end(self) -> Trace:
        """What became of all labels."""
        resolved = self.labels.resolve()
        read = torch.zeros(len(resolved.classes), dtype=torch.bool)
        for tag in self.labels.read:
            read[tag.reshape(-1)] = True
        return Trace(
            self.axes,
            resolved,
            self.products,
            self.sizes,
            read,
            self.labels.edges,
            self.unread(),
            asks=self.asks,
            grouped=self.labels.grouped,
        )

    def _source(self, node: Node, key: str | None) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        shape = tuple(int(size) for size in value.shape)
        if key is None:
            return Value(shape)  # an input of the model, whose sizes are not ours to change
        key = self.ties.get(key, key)
        if not value.is_floating_point():  # a mask shares the labels of the weight under it
            return self.known.get(key, Value(shape, weight=True))
        if key not in self.known:
            tags = fresh(self.labels, shape, range(len(shape)))
            self.axes += [Axis(key, axes_of(tag)[0], tag.flatten()) for tag in tags]
            self.known[key] = Value(shape, tuple(tags), weight=True)
        return self.known[key]

    def _step(self, env: dict[Node, Any], node: Node) -> None:
        args = torch.fx.map_arg(node.args, env.get)
        if node.target is operator.getitem:
            held = cast(Any, args)[0]
            env[node] = held[cast(int, node.args[1])] if isinstance(held, tuple) else held
            return
        if node.target is MARK:
            x, *where = cast(Any, args)
            env[node] = self.entries.enter(self.labels, _why(node), x, *where)
            return
        kwargs = cast(dict[str, Any], torch.fx.map_arg(node.kwargs, env.get))
        shapes = [sizes_of(t) for t in tensors_in(node.meta.get("val"))]
        module = module_of_node(node)
        self.labels.at((self.graphs, node.name), module)
        products = self.products if self.counting else []
        example = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
        context = Context(self.labels, _why(node), shapes, module, products, example)
        made = follow(context, node.target, args, kwargs)
        env[node] = made
        for value in _values(made):
            for tag in value.tags:
                self.sizes += [Size(module, axis, tag) for axis in axes_of(tag)]
        known = self.extents.setdefault(module, {})
        for value in (*_values(args), *_values(made)):
            for tag in value.tags:
                for axis in axes_of(tag):
                    known.setdefault(value.shape[axis], deque(maxlen=_LATEST)).append((axis, tag))
        for size in _numbers(node) & known.keys():
            where = place_of_node(node).removeprefix(" at ")
            self.asks += [Ask(module, where, axis, tag) for axis, tag in known[size]]


def _values(nested: Any) -> Iterator[Value]:
    if isinstance(nested, Value):
        yield nested
    elif isinstance(nested, list | tuple):
        for item in nested:
            yield from _values(item)
    elif isinstance(nested, dict):
        yield from _values(list(nested.values()))


_LATEST = 8
"""Of so many axes of one length in a module, those seen last, a number may be the size."""


def _alive(graph: Graph) -> set[Node]:
    """The nodes that outputs, or what code writes, depend on: the rest only has to run."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in found or node.op == "output" or node.is_impure():
            found.update((node, *node.all_input_nodes))
    return found


def _is_mask(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _why(node: Node) -> str:
    module = module_of_node(node)
    return f"{node.target}{place_of_node(node)}" + (f" in {module}" if module else "")


def _numbers(node: Node) -> set[int]:
    """The whole numbers that a node is given, but for those that are rarely sizes."""
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    return {leaf for leaf in leaves if type(leaf) is int and leaf > 1}
