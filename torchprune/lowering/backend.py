"""`torch.compile(model, backend="torchprune")`: masks folded and weights packed as it compiles.

What dynamo hands over is a graph whose parameters are inputs. Without gradients, every masked
weight in it is computed once instead of at each call, and linear layers with enough zeros read
theirs as a bitmask; the rest goes to another backend. The model itself keeps its masks and weights.

Each call looks whether a mask or weight was changed since it was prepared (by its version counter
and address) and if so prepares it again: new masks take effect without recompiling. One compiled
graph may serve many modules, as repeated blocks do, in many threads; each has its own prepared
weights. A change by `tensor.data` in place leaves no trace to look for: call
`torch.compiler.reset()` after one. Inference tensors have no version counter, so weights and masks
that were made in inference mode are read anew at each call, as they are: nothing is prepared.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.fx import Graph, GraphModule, Node
from torch.utils.weak import WeakIdKeyDictionary

from torchprune.lowering.backend_options import Options
from torchprune.lowering.bitmask import SLACK, Bitmask, obstacle
from torchprune.lowering.kernels import operators as kernels
from torchprune.masking.keeper import Guarded

log = logging.getLogger(__name__)

_LINEAR = (torch._C._nn.linear, torch.nn.functional.linear)


def compile_graph(
    graph_module: GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend: what `backend="torchprune"` stands for.

    With gradients, masks stay in the graph, so that they reach the kept weights only, and nothing
    is packed. The mode, and options that are not this backend's, go on to the inner one.

    Raises:
        LoweringError: an unknown option or mode.
    """
    asked = Options.read(options, mode)
    inner = asked.inner()
    wants_gradient = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in example_inputs
    )
    found = [] if wants_gradient else _weights_of(graph_module.graph, example_inputs)
    packs = [asked.lower == "bitmask" and _can_pack(w, example_inputs, asked) for w in found]
    chosen = [(w, p) for w, p in zip(found, packs, strict=True) if p or w.masking is not None]
    seen = [(w, p) for w, p in chosen if w.tells_of_changes(example_inputs)]
    if len(seen) < len(chosen):
        log.warning(
            "%d weights are left as they are, neither packed nor folded: they or their masks are "
            "inference tensors, which do not tell when they change",
            len(chosen) - len(seen),
        )
    chosen = seen
    if not chosen:
        log.info("nothing to fold or pack in this graph; it goes on as it is")
        return cast(Callable[..., Any], inner(graph_module, example_inputs))
    packed = sum(p for _, p in chosen)
    log.info("%d weights packed, %d masks folded besides", packed, len(chosen) - packed)
    return _compiled(graph_module, example_inputs, chosen, inner)


def _can_pack(weight: _Weight, example_inputs: Sequence[Any], options: Options) -> bool:
    """Whether a weight becomes a bitmask. What it holds now decides, also for later masks."""
    if not weight.products or kernels.native().form is None:
        return False
    mask = None if weight.mask_place is None else example_inputs[weight.mask_place]
    with torch.no_grad():
        dense = weight.effective(example_inputs[weight.place], mask)
    return obstacle(dense, options.min_sparsity) is None


# -- what the graph holds -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Product:
    """A linear layer in the graph: `node` is `x` times a weight, plus `bias`.

    `turned` says that the weight is (in, out), as in `addmm(bias, x, weight)`.
    """

    node: Node
    x: Node
    bias: Node | None
    turned: bool


@dataclass(frozen=True)
class _Weight:
    """A weight that can be prepared before the graph runs.

    Attributes:
        place, mask_place: where it and its mask are among the graph's inputs.
        result: the node that the rest of the graph reads: the masked weight, or the input itself.
        masking: computes the result from weight and mask; None without a mask.
        products: its uses, if all are linear layers, and the same way round; else empty.
    """

    place: int
    mask_place: int | None
    result: Node
    masking: GraphModule | None
    products: list[_Product]

    @property
    def turned(self) -> bool:
        """Whether its linear layers hold it as (in, out)."""
        return self.products[0].turned

    def tells_of_changes(self, inputs: Sequence[Any]) -> bool:
        """Whether writing to it, or to its mask, leaves a trace."""
        places = [p for p in (self.place, self.mask_place) if p is not None]
        return not any(inputs[p].is_inference() for p in places)

    def effective(self, weight: Tensor, mask: Tensor | None) -> Tensor:
        """What the rest of the graph reads."""
        return weight if self.masking is None else cast(Tensor, self.masking(weight, mask))


def _weights_of(graph: Graph, example_inputs: Sequence[Any]) -> list[_Weight]:
    """Masked weights, and plain ones that only linear layers read, in the graph's order."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    place = {node: i for i, node in enumerate(inputs)}
    value = {node: example_inputs[i] for node, i in place.items()}
    held = {node for node in inputs if _is_held(node) and _is_plain(value[node])}
    origins = _origins(graph, held)
    found: list[_Weight] = []
    pairs = dict.fromkeys(origin for origin in origins.values() if len(origin) == 2)
    for pair in pairs:
        weight, mask = sorted(pair, key=lambda node: not value[node].is_floating_point())
        w, m = value[weight], value[mask]
        if not w.is_floating_point() or m.dtype not in (torch.bool, torch.uint8):
            continue
        inside = {node for node, origin in origins.items() if origin and origin <= pair}
        results = [node for node in inside if any(user not in inside for user in node.users)]
        if any(origins[node] != pair or not _is_like(node, w) for node in results):
            continue  # something reads the weight or the mask otherwise
        for result in results:
            masking = _extracted(result, (weight, mask))
            uses = _products(result)
            found.append(_Weight(place[weight], place[mask], result, masking, uses))
        held -= pair
    for weight in held:
        if products := _products(weight):
            found.append(_Weight(place[weight], None, weight, None, products))
    order = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda weight: order[weight.result])


def _is_held(node: Node) -> bool:
    """Whether an input of dynamo's graph is a parameter or a buffer of a module."""
    return bool(node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"))


def _is_plain(example: object) -> bool:
    return type(example) in (Tensor, nn.Parameter, Guarded)


def _origins(graph: Graph, held: set[Node]) -> dict[Node, frozenset[Node]]:
    """For every node that computes from held tensors alone, without changing any: which ones.

    None of them for what counts up numbers, as the unpacking of a mask's bits does.
    """
    origins = {node: frozenset([node]) for node in held}
    for node in graph.nodes:
        reads = node.all_input_nodes
        if node.op not in ("call_function", "call_method") or _writes(node):
            continue
        if not reads and node.target is not torch.arange:
            continue
        if all(read in origins for read in reads):
            origins[node] = frozenset[Node]().union(*(origins[read] for read in reads))
    return origins


def _writes(node: Node) -> bool:
    """Whether a node may change its inputs."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "setitem" or "out" in node.kwargs


def _is_like(node: Node, weight: Tensor) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and (value.shape, value.dtype) == (weight.shape, weight.dtype)


def _extracted(result: Node, inputs: tuple[Node, ...]) -> GraphModule:
    """The part of a graph that computes one node from its origins."""
    graph = Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}

    def copy(node: Node) -> Node:
        if node not in copies:
            for read in node.all_input_nodes:
                copy(read)
            copies[node] = graph.node_copy(node, copies.__getitem__)
        return copies[node]

    graph.output(copy(result))
    return GraphModule({}, graph)


def _products(weight: Node) -> list[_Product]:
    found = [_product(node, weight) for node in weight.users]
    uses = [use for use in found if use is not None and weight not in (use.x, use.bias)]
    alike = len(uses) == len(found) and len({use.turned for use in uses}) == 1
    return uses if alike else []


def _product(node: Node, weight: Node) -> _Product | None:
    if node.op != "call_function":
        return None
    if node.target in _LINEAR and len(node.args) >= 2 and node.args[1] is weight:
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        return _Product(node, cast(Node, node.args[0]), cast("Node | None", bias), turned=False)
    if node.target is torch.addmm and not node.kwargs and node.args[2] is weight:
        bias, x = cast(Node, node.args[0]), cast(Node, node.args[1])
        shape = getattr(bias.meta.get("example_value"), "shape", ())
        if len(shape) == 1:
            return _Product(node, x, bias, turned=True)
    return None


# -- what runs ------------------------------------------------------------------------------------


@dataclass
class _Prepared:
    """A weight in its prepared form, and of what it was made.

    `aliases` hold the storages it was made from, so that their addresses are not given out again.
    """

    weight: weakref.ref[Tensor]
    mask: weakref.ref[Tensor] | None
    stamp: tuple[int, ...] | None
    aliases: list[Tensor]
    parts: list[Tensor]

    def is_of(self, weight: Tensor, mask: Tensor | None) -> bool:
        """Whether it was made of these, as they are now."""
        return (
            self.weight() is weight
            and (self.mask is None or self.mask() is mask)
            and self.stamp is not None
            and self.stamp == _stamp(weight, mask)
        )


class _Slot:
    """A weight of the graph, prepared for each module that the graph runs for.

    Threads may call for several modules at once. What a call takes it holds itself: the slot
    remembers for the next one, and is read once.
    """

    def __init__(self, weight: _Weight, *, packs: bool) -> None:
        self._weight, self._packs = weight, packs
        self._made = WeakIdKeyDictionary()
        self._last: _Prepared | None = None

    def parts(self, args: Sequence[Any]) -> list[Tensor]:
        """The prepared tensors, for these inputs of the graph: the dense weight, or its bitmask."""
        weight, place = args[self._weight.place], self._weight.mask_place
        mask = None if place is None else args[place]
        found = self._last
        if found is None or not found.is_of(weight, mask):
            found = self._made.get(weight)
            if found is None or not found.is_of(weight, mask):
                found = self._made[weight] = self._prepare(weight, mask)
            self._last = found
        return found.parts

    def _prepare(self, weight: Tensor, mask: Tensor | None) -> _Prepared:
        stamp = _stamp(weight, mask)
        with torch.inference_mode(False), torch.no_grad():
            dense = self._weight.effective(weight, mask)
            parts = [dense]
            if self._packs:
                packed = Bitmask.pack(dense.t() if self._weight.turned else dense)
                # Room for any mask, so that the graph's inputs keep their sizes: what no value
                # needs is never written, and takes no memory.
                room = packed.values.new_empty(weight.numel() + SLACK)
                room[: len(packed.values)] = packed.values
                parts = [packed.bits, room, packed.starts]
            aliases = [t.detach() for t in (weight, mask) if t is not None]
        return _Prepared(
            weakref.ref(weight), None if mask is None else weakref.ref(mask), stamp, aliases, parts
        )


def _stamp(*tensors: Tensor | None) -> tuple[int, ...] | None:
    """What differs after a change; None where a change would not show."""
    stamp: list[int] = []
    for tensor in tensors:
        if tensor is not None:
            if tensor.is_inference():
                return None
            stamp += (tensor._version, tensor.data_ptr())
    return tuple(stamp)


class _Compiled:
    """A compiled graph that reads prepared weights."""

    def __init__(self, slots: list[_Slot], kept: list[int], run: Callable[..., Any]) -> None:
        self._slots, self._kept, self._run = slots, kept, run

    def __call__(self, *args: Any) -> Any:
        prepared = [part for slot in self._slots for part in slot.parts(args)]
        return self._run(*[args[i] for i in self._kept], *prepared)


def _compiled(
    module: GraphModule,
    example_inputs: Sequence[Any],
    chosen: Sequence[tuple[_Weight, bool]],
    inner: Callable[..., Any],
) -> _Compiled:
    """Copy the graph, let it read prepared weights (packed or not), and compile that."""
    graph, copies = Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(module.graph, copies))  # the original stays dynamo's
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    slots, examples = list[_Slot](), list[Any]()
    fake_mode, last = detect_fake_mode(), inputs[-1]
    for weight, packs in chosen:
        slots.append(_Slot(weight, packs=packs))
        result, parts = copies[weight.result], []
        for i, part in enumerate(slots[-1].parts(example_inputs)):
            with graph.inserting_after(last):
                last = graph.placeholder(f"{result.name}_prepared_{i}")
            fake = part if fake_mode is None else fake_mode.from_tensor(part, static_shapes=True)
            last.meta["example_value"] = fake
            examples.append(fake)
            parts.append(last)
        if not packs:
            result.replace_all_uses_with(parts[0])
        for use in weight.products if packs else []:
            old = copies[use.node]
            x, bias = copies[use.x], None if use.bias is None else copies[use.bias]
            cols = example_inputs[weight.place].shape[0 if use.turned else 1]
            with graph.inserting_before(old):
                product = graph.call_function(
                    torch.ops.torchprune.bitmask_linear.default, (x, *parts, None, bias, cols)
                )
            product.meta = dict(old.meta)
            old.replace_all_uses_with(product)
            graph.erase_node(old)
            copies[use.node] = product
    kept = _without_unused(graph, inputs, {copies[weight.result] for weight, _ in chosen})
    graph.lint()
    run = inner(GraphModule(module, graph), [*(example_inputs[i] for i in kept), *examples])
    return _Compiled(slots, kept, run)


def _without_unused(graph: Graph, inputs: list[Node], results: set[Node]) -> list[int]:
    """Erase masking that nobody reads any more, and its inputs; the places of those that stay."""
    gone = set[Node]()
    waiting = list(results)
    while waiting:
        node = waiting.pop()
        if node in gone or node.users:
            continue
        waiting += node.all_input_nodes
        graph.erase_node(node)
        gone.add(node)
    return [i for i, node in enumerate(inputs) if node not in gone]
