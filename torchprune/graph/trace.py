"""From a model to its structure: export, follow every node, read off what can go together.

No list of architectures: whatever `torch.export` can capture is followed operator by operator.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from torchprune.errors import ShrinkError
from torchprune.graph.capture import Call, exported, module_of_node, place_of_node
from torchprune.graph.context import Context, Product
from torchprune.graph.labels import Choice, GroupChoice, Labels, Resolved, axes_of
from torchprune.graph.numbering import Numbering
from torchprune.graph.rules import follow, tensors_in
from torchprune.graph.values import Constant, Value, fresh, sizes_of
from torchprune.masking.mask import mask_of
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


def trace(model: nn.Module, calls: Sequence[Call], *, closed: bool = False) -> Trace:
    """Follow the labels of a model's tensors through its graphs, one for each call.

    Where they leave parameters unread, the other mode is followed too, if it can be captured: a
    head that only training uses.

    Args:
        closed: freeze what parameters that no call reads may have to do with.

    Raises:
        ShrinkError: the model cannot be exported, with what torch says about it.
    """
    return Captured(model, calls).trace(closed=closed)


def trace_program(model: nn.Module, program: ExportedProgram) -> Trace:
    """`trace` of a model that `exported` gave this program of."""
    return _walked(model, [program]).end()


class Captured:
    """The graphs of a model, to be followed once or in several ways.

    Raises:
        ShrinkError: the model cannot be exported, with what torch says about it.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call]) -> None:
        self._model, self._calls = model, calls
        self._programs = [exported(model, call) for call in calls]
        self._untried: str | None = None

    def trace(self, *, closed: bool = False, given: Mapping[Choice, bool] | None = None) -> Trace:
        """As the function.

        Args:
            given: of choices about groups, whether whole ones go; the others are made as always.
        """
        walk = _walked(self._model, self._programs, given)
        if self._untried is None:
            self._untried = ""
            if walk.unread() and len({call.training for call in self._calls}) == 1:
                others = self._in_the_other_mode()
                self._programs += others
                walk = _walked(self._model, self._programs, given) if others else walk
        if closed:
            walk.close()
        return replace(walk.end(), untried=self._untried)

    def _in_the_other_mode(self) -> list[ExportedProgram]:
        found = []
        for call in self._calls:
            try:
                found.append(exported(self._model, replace(call, training=not call.training)))
            except ShrinkError as error:
                self._untried = str(error)
        return found


def _walked(
    model: nn.Module,
    programs: Sequence[ExportedProgram],
    given: Mapping[Choice, bool] | None = None,
) -> _Walk:
    """Programs followed, and again where choices were made that had better be otherwise."""
    given = given or {}
    turned = {choice for choice, other in given.items() if other}
    had: dict[Choice, int] = {}
    for last in range(_WALKS, 0, -1):
        walk = _Walk(model, turned, given)
        for program in programs:
            walk.meet(program)
        for program in programs:
            walk.follow(program)
        if last == 1 or not walk.labels.chose:
            break
        regretted = walk.labels.regretted(walk.labels.resolve(), had)
        if last == 2:  # what was turned in vain is turned back at least
            regretted &= turned
        if not regretted:
            break
        turned ^= regretted
    return walk


_WALKS = 8


class _Walk:
    """The graphs of one model, followed one after the other with the same labels."""

    def __init__(
        self, model: nn.Module, turned: Collection[Choice], settled: Collection[Choice]
    ) -> None:
        self.model, self.labels = model, Labels(turned, settled)
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
        kwargs = cast(dict[str, Any], torch.fx.map_arg(node.kwargs, env.get))
        self.labels.at((self.graphs, node.name))
        shapes = [sizes_of(t) for t in tensors_in(node.meta.get("val"))]
        module = module_of_node(node)
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


def sources_of(model: nn.Module, program: ExportedProgram) -> dict[str, str]:
    """The parameters and buffers of a model's program: placeholder -> name in the plain
    `state_dict`; what belongs to a mask answers to the name of the weight under it.
    """
    from torch.export.graph_signature import InputKind  # torch.export takes a while to import

    masked = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in getattr(module, "parametrizations", ())
        if mask_of(module, name) is not None
    }

    def plain(name: str) -> str:
        owner, _, inner = name.rpartition("parametrizations.")
        key = owner + inner.partition(".")[0]
        return key if key in masked else name

    return {
        cast(Any, spec.arg).name: plain(str(spec.target))
        for spec in program.graph_signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)
    }


def constants_of(program: ExportedProgram) -> dict[str, Tensor]:
    """The tensors that a program's code makes of numbers: placeholder -> tensor."""
    from torch.export.graph_signature import InputKind  # as above

    found = {
        cast(Any, spec.arg).name: program.constants.get(str(spec.target))
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.CONSTANT_TENSOR
    }
    return {name: data for name, data in found.items() if isinstance(data, Tensor)}


def written(data: Tensor) -> Constant:
    """What is known of such a tensor."""
    return Constant(sizes_of(data), weight=True, data=data)


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
