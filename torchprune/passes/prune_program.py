"""Pruning an exported program: calibration steps through its graph node by node.

All batches stop at a layer without coroutines here: a graph has no control flow, so the driver runs
each node for every batch before it goes on to the next. A layer is a node that multiplies by a
parameter; its name, and so what selectors and defaults make of it, is the parameter's.
"""

from __future__ import annotations

from collections import ChainMap, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node
from torch.fx.node import map_arg
from tqdm import tqdm

from torchprune import modes
from torchprune.calibration.batches import Batch
from torchprune.calibration.moments import SAMPLE_ROWS, Moments
from torchprune.calibration.padding import Padding, counted
from torchprune.calibration.survey import is_plain
from torchprune.errors import CalibrationError, SpecError
from torchprune.masking.packing import masked
from torchprune.masking.parts import covered
from torchprune.masking.targets import Target, make_plan
from torchprune.masking.transaction import Change
from torchprune.methods.decide import Decider, decider_for, without_data
from torchprune.passes.layers import Layers, layers_of
from torchprune.passes.masks import insert_masks
from torchprune.passes.program import Draft
from torchprune.passes.reads import Read
from torchprune.passes.watched_run import gates_in
from torchprune.specs.spec import Spec

Env = dict[Node, Any]
"""What the nodes gave for one batch, while somebody still reads it."""


class _Use:
    """A target, and the products that read its weight, in the graph's order."""

    def __init__(self, target: Target, reads: Sequence[Read]) -> None:
        self.target, self.reads = target, reads
        self._spans = [tuple(covered(target.view, read.part) or ()) for read in reads]

    @property
    def source(self) -> Hashable:
        """Equal for targets with the same statistics."""
        view, pairs = self.target.view, zip(self.reads, self._spans, strict=True)
        return view.groups, view.cols, tuple((read.source, span) for read, span in pairs)

    def rows(self, number: int, env: Env) -> list[Tensor]:
        """What a read's product is about to multiply, by the groups of the target."""
        read, view = self.reads[number], self.target.view
        found = read.rows(env)
        stack = [found[0].new_empty(0, view.cols)] * view.groups
        for one in self._spans[number]:
            stack[one.group] = found[one.own][:, one.start : one.start + view.cols]
        return stack

    def replace(self, env: Env, weight: Tensor) -> None:
        """Let a batch go on with another weight, and with what was made of the old one already."""
        for read in self.reads:
            env[read.piece.parameter] = weight
            made = ChainMap[Node, Any]({read.piece.parameter: weight}, env)
            for node in read.piece.through:
                args, kwargs = map_arg((node.args, node.kwargs), made.get)
                made[node] = cast(Any, node.target)(*args, **kwargs)
                if node in env:
                    env[node] = made[node]


def prune_program(
    program: ExportedProgram, spec: Spec, batches: Sequence[Batch], *, progress: bool
) -> tuple[ExportedProgram, list[str]]:
    """A new program with masks, and what its user must know. The given one is left as it is.

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
    layers = layers_of(running)
    plan = make_plan(layers.root, spec, layers.readings, _gates(running, layers, batches))
    changes: list[Change] = []
    warnings = list(plan.warnings)
    with torch.no_grad():
        if not spec.needs_data:
            with modes.exact():
                changes += without_data(plan.targets, spec)
        else:
            decider = decider_for(spec, plan.targets, len(batches))
            read = [t for t in plan.targets if t.layer.key in layers.reads]
            changes += [decider.unreached(t) for t in plan.targets if t not in read]
            found = [_Use(t, layers.reads[t.layer.key]) for t in read]
            blocks = [tuple(name.split(".")) for name in plan.blocks]
            run = _Run(running, found, batches, decider, blocks)
            with tqdm(total=len(found), desc=spec.label, unit="layer", disable=not progress) as bar:
                for change in run.changes(spec.sequential or "layer"):
                    changes.append(change)
                    bar.update()
            warnings += decider.warnings
    draft = Draft(program)
    for change in changes:
        if change.values is not None:
            draft.replace(change.target.layer.key, masked(change.values, change.mask))
    masks = {change.target.layer.key: change.mask for change in changes}
    return insert_masks(draft.finish(), masks).program, warnings


def _gates(program: ExportedProgram, layers: Layers, batches: Sequence[Batch]) -> dict[int, str]:
    """Why weights are routers or gates, of those that are seen to be; as for modules, a program
    that is plain is not looked at."""
    if not batches or is_plain(layers.root):
        return {}
    return {
        id(layers.weights[name]): why
        for name, why in gates_in(program, batches[0]).items()
        if name in layers.weights
    }


def _functional(program: ExportedProgram) -> ExportedProgram:
    """The program without writes in place: some of its nodes run twice on the same tensors."""
    writes = any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for node in program.graph_module.graph.nodes
    )
    return program.run_decompositions({}) if writes else program


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
        self._spec, self._blocks = decider.spec, blocks
        self._padding = Padding(program.module(), batches)
        self._shadows: dict[int, Env] = {}
        self._nodes = [n for n in program.graph_module.graph.nodes if n.op != "output"]
        self._at = {node: i for i, node in enumerate(self._nodes)}
        self._uses = sorted(uses, key=lambda use: self._at[use.reads[0].node])
        self._interpreter = Interpreter(program.graph_module, garbage_collect_values=False)
        self._dying = self._deaths()

    def changes(self, sequential: str) -> Iterator[Change]:
        """The changes of all layers, in the order of the graph: each before its first product."""
        envs = [self._begin(batch) for batch in self._batches]
        self._shadows = {i: self._begin(self._padding.shadow(i)) for i in self._padding.shadowed()}
        groups = self._groups(sequential)
        known = self._ahead(envs, self._repeated(groups))
        at = 0
        for group in groups:
            first = self._at[group[0].reads[0].node]
            for env in (*envs, *self._shadows.values()):
                self._advance(env, at, first)
            at = first
            found = self._statistics(envs, at, group, known)
            with modes.exact():
                for change in self._decider.changes(found):
                    use = next(u for u in group if u.target is change.target)
                    weight = change.target.weight if change.values is None else change.values
                    new = masked(weight.to(change.target.weight.dtype), change.mask)
                    for env in (*envs, *self._shadows.values()):
                        use.replace(env, new)
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

    def _repeated(self, groups: Sequence[Sequence[_Use]]) -> list[_Use]:
        """The layers read more than once, not all in one pass of a block."""
        found = []
        for use in self._uses:
            start, stop = (self._at[use.reads[i].node] for i in (0, -1))
            own = next(group for group in groups if use in group)
            others = (
                read for group in groups if group is not own for u in group for read in u.reads
            )
            within = any(start < self._at[read.node] < stop for read in others)
            if len(use.reads) > 1 and (len(own) == 1 or within):
                found.append(use)
        return found

    def _ahead(self, envs: Sequence[Env], uses: Sequence[_Use]) -> dict[_Use, Moments]:
        """All that some layers read in the dense program: to be pruned before the first product
        they must be known then."""
        moments = {use: self._fresh(use) for use in uses}
        self._pass(envs, 0, [(use, moments[use]) for use in uses])
        return moments

    def _statistics(
        self, envs: Sequence[Env], at: int, group: Sequence[_Use], known: Mapping[_Use, Moments]
    ) -> list[tuple[Target, Moments]]:
        """What the layers of a group read, from here on with none of them pruned."""
        shared: dict[Hashable, Moments] = {}
        moments: dict[_Use, Moments] = {}
        counting = []
        for use in group:
            if use in known:
                moments[use] = known[use]
            elif use.source in shared:
                moments[use] = shared[use.source]
            else:
                moments[use] = shared[use.source] = self._fresh(use)
                counting.append((use, moments[use]))
        self._pass(envs, at, counting)
        for use in group:
            own = moments[use]
            with modes.exact():
                own.finish()
            own.batches = len(envs)  # however many products there are
            if not own.is_finite():
                raise CalibrationError(
                    f"{use.target.name}: its inputs hold inf or NaN on the calibration data"
                )
        return [(use.target, moments[use]) for use in group]

    def _pass(
        self, envs: Sequence[Env], start: int, counting: Sequence[tuple[_Use, Moments]]
    ) -> None:
        """Let copies of the environments run on from a node, and count what these layers read."""
        places = [
            (self._at[read.node], use, number, moments)
            for use, moments in counting
            for number, read in enumerate(use.reads)
        ]
        places.sort(key=lambda place: place[0])
        for index, env in enumerate(envs):
            for shadow in (True, False) if index in self._shadows else (False,):
                ahead, at = dict(self._shadows[index] if shadow else env), start
                for place, use, number, moments in places:
                    self._advance(ahead, at, place)
                    at = place
                    self._count(moments, use, number, ahead, index, shadow=shadow)
            self._padding.forget(index)

    def _count(
        self, moments: Moments, use: _Use, number: int, env: Env, index: int, *, shadow: bool
    ) -> None:
        rows, place = use.rows(number, env), (use, number)
        if shadow:
            self._padding.note(index, place, 0, rows)
            return
        x = use.reads[number].x
        loose, name = x is None or env[x].dim() == 2, use.target.name
        counts = self._padding.tokens(index, place, 0, rows, name, loose=loose)
        sample = 0 if self._spec.needs_gram else -(-SAMPLE_ROWS // len(self._batches))
        with modes.exact():
            moments.add(counted(rows, counts), sample)

    def _fresh(self, use: _Use) -> Moments:
        spec, view = self._spec, use.target.view
        with modes.exact():
            return Moments.empty(
                view.groups,
                view.cols,
                use.target.weight.device,
                gram=spec.needs_gram,
                total=spec.needs_mean,
                cap=spec.token_cap,
            )

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

    def _deaths(self) -> dict[Node, list[Node]]:
        """For each node the values that nobody reads after it.

        What a piece of a weight is made with lives as long as the piece, which may be made again.
        """
        last: dict[Node, Node] = {}
        for node in self._nodes:
            last |= dict.fromkeys(node.all_input_nodes, node)
        made = {node for use in self._uses for read in use.reads for node in read.piece.through}
        for node in reversed(self._nodes):
            for read in node.all_input_nodes if node in made else ():
                last[read] = max(last[read], last.get(node, node), key=self._at.__getitem__)
        dying: dict[Node, list[Node]] = defaultdict(list)
        for read, node in last.items():
            dying[node].append(read)
        return dying
