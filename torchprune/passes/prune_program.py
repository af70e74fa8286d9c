"""Pruning an exported program: calibration steps through its graph node by node.

All batches stop at a layer without coroutines here: a graph has no control flow, so the driver runs
each node for every batch before it goes on to the next. A layer is a node that multiplies by a
parameter; its name, and so what selectors and defaults make of it, is the parameter's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.fx import Interpreter, Node
from tqdm import tqdm

from torchprune import modes
from torchprune.calibration.batches import Batch
from torchprune.calibration.moments import SAMPLE_ROWS, Moments
from torchprune.calibration.padding import Padding, counted
from torchprune.errors import CalibrationError, SpecError
from torchprune.masking.matrices import TransposedLinear, geometry, input_rows
from torchprune.masking.packing import masked
from torchprune.masking.targets import Target, make_plan
from torchprune.masking.transaction import Change
from torchprune.methods.decide import Decider, decider_for, without_data
from torchprune.passes.linears import product_of
from torchprune.passes.masks import insert_masks
from torchprune.passes.program import Draft, tied
from torchprune.specs.spec import Spec

_aten = torch.ops.aten
_CONVS = (_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default)

Env = dict[Node, Any]
"""What the nodes gave for one batch, while somebody still reads it."""


@dataclass(frozen=True)
class _Place:
    """A layer's first use in the graph: the node that multiplies, what it reads, and the weight.

    `through` are transpositions and repetitions of the weight between them.
    """

    node: Node
    input: Node
    weight: Node
    through: tuple[Node, ...] = ()
    turned: bool = False

    def replace(self, env: Env, weight: Tensor) -> None:
        """Let a batch go on with another weight, and with what was made of the old one already."""
        env[self.weight] = weight
        matrix = weight if self.turned or not self.through else weight.t()
        for node in self.through:
            if node in env:
                env[node] = matrix.expand(env[node].shape)


@dataclass(frozen=True)
class _Use:
    """A target and its place."""

    target: Target
    place: _Place

    @property
    def node(self) -> Node:
        """The node that calibration stops at."""
        return self.place.node


def prune_program(
    program: ExportedProgram, spec: Spec, batches: Sequence[Batch], *, progress: bool
) -> tuple[ExportedProgram, list[str]]:
    """A new program with masks, and the decider's warnings. The given one is left as it is.

    Args:
        batches: calibration, unused where the spec needs none.

    Raises:
        SpecError, TargetError: the spec does not fit the program's layers.
        CalibrationError: a layer's statistics are not finite.
        Exception: whatever a node raises on a batch.
    """
    if spec.alpha or spec.reconstruct:
        raise SpecError(
            f"{type(spec).__name__}: alpha and reconstruct run parts of a model again, which a "
            "program has none of: sparsify the model, then export it"
        )
    if spec.uneven is not None:
        raise SpecError(
            f"{type(spec).__name__}: allocation runs the whole model for its statistics, so it "
            "needs a module: sparsify the model, then export it"
        )
    if spec.permute:
        raise SpecError(
            f"{type(spec).__name__}: permute reorders a module's own weights, and a program's are "
            "left as they are: sparsify the model, then export it"
        )
    running = _functional(program)
    layers, places = _layers_of(running)
    plan = make_plan(layers, spec)
    changes: list[Change] = []
    warnings: list[str] = []
    with torch.no_grad():
        if not spec.needs_data:
            with modes.exact():
                changes += without_data(plan.targets, spec)
        else:
            decider = decider_for(spec, plan.targets, len(batches))
            found = [_Use(t, places[t.layer.key]) for t in plan.targets]
            blocks = [tuple(name.split(".")) for name in plan.blocks]
            run = _Run(running, found, batches, decider, blocks)
            with tqdm(total=len(found), desc=spec.label, unit="layer", disable=not progress) as bar:
                for change in run.changes(spec.sequential or "layer"):
                    changes.append(change)
                    bar.update()
            warnings = decider.warnings
    draft = Draft(program)
    for change in changes:
        if change.values is not None:
            draft.replace(change.target.layer.key, masked(change.values, change.mask))
    masks = {change.target.layer.key: change.mask for change in changes}
    return insert_masks(draft.finish(), masks).program, warnings


def _functional(program: ExportedProgram) -> ExportedProgram:
    """The program without writes in place: some of its nodes run twice on the same tensors."""
    writes = any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for node in program.graph_module.graph.nodes
    )
    return program.run_decompositions({}) if writes else program


# -- layers of a graph ----------------------------------------------------------------------------


def _layers_of(program: ExportedProgram) -> tuple[nn.Module, dict[str, _Place]]:
    """A tree of modules that hold the program's weights, and where each is first used.

    The modules never run: selection and plans read them as they read a model.
    """
    names = {
        cast(TensorArgument, spec.arg).name: str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind == InputKind.PARAMETER
    }
    shared, root = tied(program.state_dict), nn.Module()
    places: dict[str, _Place] = {}
    for node in program.graph_module.graph.nodes:
        product = product_of(node)
        if product is not None:
            place = _Place(node, product.x, product.weight, product.through, product.turned)
        elif _is_conv(node):
            place = _Place(node, node.args[0], node.args[1])
        else:
            continue
        name = names.get(place.weight.name)
        if name is None or not name.endswith(".weight") or name in places or name in shared:
            continue
        module = _module_of(place, cast(Tensor, program.state_dict[name]))
        places[name] = place
        _put(root, name.removesuffix(".weight").split("."), module)
    return _listed(root), places


def _module_of(place: _Place, weight: Tensor) -> nn.Module:
    """The module that a product is the forward of, with the program's own weight."""
    made: nn.Module
    if _is_conv(place.node):
        made = _conv_of(place.node, weight)
    elif place.turned:
        made = TransposedLinear()
    else:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return made


def _is_conv(node: Node) -> bool:
    decomposed = node.target is _aten.convolution.default and not node.args[6]  # transposed
    return node.target in _CONVS or decomposed


def _conv_of(node: Node, weight: Tensor) -> nn.Module:
    options = [*node.args[3:], *[None] * 7]
    if node.target is _aten.convolution.default:
        options[3] = options[5]  # transposed and output_padding stand before the groups
    space = weight.dim() - 2
    stride, padding, dilation = (
        tuple(cast(Sequence[int], given)) if given else (usual,) * space
        for given, usual in zip(options[:3], (1, 0, 1), strict=True)
    )
    groups = int(cast(int, options[3] or 1))
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[space - 1]
    made: nn.Module = kind(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride,
        padding,
        dilation,
        groups,
        bias=False,
        device="meta",
    )
    return made


def _put(root: nn.Module, path: Sequence[str], module: nn.Module) -> None:
    for name in path[:-1]:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = cast(nn.Module, root._modules[name])
    root.add_module(path[-1], module)


def _listed(module: nn.Module) -> nn.Module:
    """The tree with a ModuleList wherever all children are numbered, as blocks of a model are."""
    children = {name: _listed(child) for name, child in module.named_children()}
    if children and all(name.isdecimal() for name in children):
        listed = nn.ModuleList()
        listed._modules.update(children)
        return listed
    module._modules.update(children)
    return module


# -- running --------------------------------------------------------------------------------------


class _Run:
    """The batches in the graph, each with its environment: values by node, while needed."""

    def __init__(
        self,
        program: ExportedProgram,
        uses: Sequence[_Use],
        batches: Sequence[Batch],
        decider: Decider,
        blocks: Sequence[tuple[str, ...]],
    ) -> None:
        self._program, self._decider, self._batches = program, decider, batches
        self._spec = decider.spec
        self._padding = Padding(program.module(), batches)
        self._nodes = [n for n in program.graph_module.graph.nodes if n.op != "output"]
        self._at = {node: i for i, node in enumerate(self._nodes)}
        self._uses = sorted(uses, key=lambda use: self._at[use.node])
        self._blocks = blocks
        self._interpreter = Interpreter(program.graph_module, garbage_collect_values=False)
        last: dict[Node, Node] = {}
        for node in self._nodes:
            for read in node.all_input_nodes:
                last[read] = node
        self._dying: dict[Node, list[Node]] = defaultdict(list)
        for read, node in last.items():
            self._dying[node].append(read)

    def changes(self, sequential: str) -> Iterator[Change]:
        """The changes of all layers, in the order of the graph."""
        envs = [self._begin(batch) for batch in self._batches]
        shadows = {i: self._begin(self._padding.shadow(i)) for i in self._padding.shadowed()}
        at = 0
        for group in self._groups(sequential):
            first = self._at[group[0].node]
            for env in (*envs, *shadows.values()):
                self._advance(env, at, first)
            at = first
            stop = self._statistics(envs, shadows, group)
            with modes.exact():
                for change in self._decider.changes(stop):
                    use = next(u for u in group if u.target is change.target)
                    weight = change.target.weight if change.values is None else change.values
                    new = masked(weight.to(change.target.weight.dtype), change.mask)
                    for env in (*envs, *shadows.values()):
                        use.place.replace(env, new)
                    yield change

    def _groups(self, sequential: str) -> list[list[_Use]]:
        """Layers that are pruned on the same dense pass."""
        if sequential == "none":
            return [self._uses]
        if sequential == "layer":
            return [[use] for use in self._uses]
        groups: dict[tuple[str, ...], list[_Use]] = {}
        for use in self._uses:
            path = tuple(use.target.layer.key.split("."))
            own = next((b for b in self._blocks if path[: len(b)] == b), path)
            groups.setdefault(own, []).append(use)
        return list(groups.values())

    def _statistics(
        self, envs: Sequence[Env], shadows: Mapping[int, Env], group: Sequence[_Use]
    ) -> list[tuple[Target, Moments]]:
        """What the layers of a group read, from copies of the environments that run on to each."""
        spec, shared = self._spec, dict[tuple[Node, object], Moments]()
        moments: dict[Node, Moments] = {}
        for use in group:
            key = use.place.input, geometry(use.target.layer.module)
            if key not in shared:
                view, device = use.target.view, use.target.weight.device
                with modes.exact():
                    shared[key] = Moments.empty(
                        view.groups,
                        view.cols,
                        device,
                        gram=spec.needs_gram,
                        total=spec.needs_mean,
                        cap=spec.token_cap,
                    )
            moments[use.node] = shared[key]
        sample = 0 if spec.needs_gram else -(-SAMPLE_ROWS // len(self._batches))
        first_of = {id(moments[use.node]): use for use in reversed(group)}
        for index, env in enumerate(envs):
            if index in shadows:
                for use, x in self._ahead(shadows[index], group):
                    if first_of[id(moments[use.node])] is use:
                        rows = input_rows(use.target.layer.module, x)
                        self._padding.note(index, use.node, 0, rows)
            for use, x in self._ahead(env, group):
                if first_of[id(moments[use.node])] is use:
                    self._count(moments[use.node], use, x, index, sample)
            self._padding.forget(index)
        for use in group:
            own = moments[use.node]
            with modes.exact():
                own.finish()
            if not own.is_finite():
                raise CalibrationError(
                    f"{use.target.name}: its inputs hold inf or NaN on the calibration data"
                )
        return [(use.target, moments[use.node]) for use in group]

    def _ahead(self, env: Env, group: Sequence[_Use]) -> Iterator[tuple[_Use, Tensor]]:
        """What each layer of a group reads, from a copy of an environment that runs on to it."""
        ahead, at = dict(env), self._at[group[0].node]
        for use in group:
            self._advance(ahead, at, self._at[use.node])
            at = self._at[use.node]
            yield use, ahead[use.place.input]

    def _count(self, moments: Moments, use: _Use, x: Tensor, batch: int, sample: int) -> None:
        loose, name = x.dim() == 2, use.target.name
        rows = input_rows(use.target.layer.module, x)
        counts = self._padding.tokens(batch, use.node, 0, rows, name, loose=loose)
        with modes.exact():
            moments.add(counted(rows, counts), sample)

    def _begin(self, batch: Batch) -> Env:
        flat = self._program._graph_module_flat_inputs(batch.args, batch.kwargs)
        inputs = [node for node in self._nodes if node.op == "placeholder"]
        return dict(zip(inputs, flat, strict=True))

    def _advance(self, env: Env, start: int, stop: int) -> None:
        """Run the nodes [start, stop) on one batch; forget what nobody needs any more."""
        self._interpreter.env = env
        for node in self._nodes[start:stop]:
            if node.op != "placeholder":
                env[node] = self._interpreter.run_node(node)
            for read in self._dying[node]:
                env.pop(read, None)
