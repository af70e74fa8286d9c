"""`sparsify` for whole blocks: which of them change least, and masks on everything in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchprune import modes
from torchprune.calibration.batches import Batch
from torchprune.calibration.left_as_is import left_as_is
from torchprune.calibration.lockstep import Usage
from torchprune.calibration.padding import Padding
from torchprune.calibration.replay import private
from torchprune.errors import CalibrationError, ShrinkError, TargetError
from torchprune.masking.mask import Record, attach, obstacle, original_of
from torchprune.masking.selection import (
    Layer,
    as_selectors,
    check_used,
    every_layer,
    layers_of,
    maskable_of,
    matches,
    repeated_blocks,
    tied_to,
)
from torchprune.reports.report import RunRecord
from torchprune.structure.scores import default_loss, loss_on
from torchprune.structure.specs import LayerSpec


def prune_blocks(
    model: nn.Module,
    spec: LayerSpec,
    batches: Sequence[Batch],
    run: RunRecord,
    *,
    progress: bool,
    reversible: bool,
) -> None:
    """Mask whole blocks of a model, in place.

    Raises:
        TargetError: there are not so many blocks to choose from, or a selector matches nothing.
        ShrinkError: a chosen block would not hand on its input if its weights were zero.
        CalibrationError: a loss is missing, or not finite.
    """
    blocks, idle = droppable(model, spec, batches[0], run)
    spare = sum(min(len(own), size - 1) for own, size in _lists(model, blocks))
    if spec.drop > spare:
        why = "; ".join(f"{k}: {v}" for k, v in list(run.skipped.items())[:3])
        kind = ShrinkError if not blocks and run.skipped else TargetError
        raise kind(
            f"LayerSpec: {spec.drop} blocks to drop, but only {spare} of this "
            f"{type(model).__name__} can be (one of each list stays)" + (f"; {why}" if why else "")
        )
    choose = _by_cosine if spec.score == "cosine" else _by_loss
    with tqdm(total=len(batches), desc="layers", unit="batch", disable=not progress) as bar:
        scores = choose(model, blocks, batches, spec, run, bar)
    run.finish(batches=len(batches), usage=Usage())
    with modes.exact():
        for name, note in scores.items():
            record = Record("layers", f"block dropped by {spec.score}", note=note)
            mask_whole(idle[name], record, reversible=reversible)


def mask_whole(layers: Sequence[Layer], record: Record, *, reversible: bool) -> None:
    """Put masks on layers that keep nothing."""
    for layer in layers:
        weight = original_of(layer.module, layer.tensor)
        keep = torch.zeros_like(weight, dtype=torch.bool)
        attach(layer.module, layer.tensor, keep, record, reversible=reversible)


def droppable(
    model: nn.Module, spec: LayerSpec, example: Batch, run: RunRecord
) -> tuple[dict[str, nn.Module], dict[str, list[Layer]]]:
    """The blocks that may go, by name, and the layers that are zero then; what may not is noted."""
    blocks = _candidates(model, spec, run)
    ties = tied_to(model)
    inside = {name: [y for y in _inside(model, name) if not obstacle(y, ties)] for name in blocks}
    idle, failed = _passing(model, blocks, inside, example)
    for name in [name for name in blocks if name not in idle]:
        run.skipped[name] = failed.get(name, "with zero weights it would not hand on its input")
        del blocks[name]
    return blocks, idle


def _candidates(model: nn.Module, spec: LayerSpec, run: RunRecord) -> dict[str, nn.Module]:
    blocks = repeated_blocks(model)
    known = list(layers_of(model))
    layers = known if _are_in(known, blocks) else list(every_layer(model))
    targets, ignore = as_selectors(spec.targets), as_selectors(spec.ignore)
    for what, selectors in (("targets", targets), ("ignore", ignore)):
        for selector in selectors:
            check_used(what, selector, model, layers)
    ties = tied_to(model)
    found = {}
    for name, block in blocks.items():
        inside = [y for y in layers if y.key.startswith(f"{name}.")]
        if targets and not any(matches(s, y) for s in targets for y in inside):
            continue
        if any(matches(s, y) for s in ignore for y in inside):
            run.skipped[name] = "ignored"
        elif problem := next((p for y in inside if (p := obstacle(y, ties))), None):
            run.skipped[name] = problem
        else:
            found[name] = block
    return found


def _are_in(layers: Sequence[Layer], blocks: dict[str, nn.Module]) -> bool:
    """Whether blocks are made of layers that their modules tell of, not of raw parameters alone."""
    return any(y.key.startswith(f"{name}.") for name in blocks for y in layers)


def _lists(model: nn.Module, blocks: dict[str, nn.Module]) -> Iterator[tuple[list[str], int]]:
    """The candidates of each list of blocks, and how many blocks are in it."""
    every = [name.rpartition(".")[0] for name in repeated_blocks(model)]
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in blocks):
        own = [name for name in blocks if name.rpartition(".")[0] == parent]
        yield own, every.count(parent)


def _inside(model: nn.Module, block: str) -> Iterator[Layer]:
    for layer in maskable_of(model):
        if layer.key.startswith(f"{block}."):
            yield layer


# -- blocks as functions ---------------------------------------------------------------------------


def given_to(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)


def first_of(out: Any) -> Any:
    return out[0] if isinstance(out, tuple | list) else out


def _passing(
    model: nn.Module,
    blocks: dict[str, nn.Module],
    inside: dict[str, list[Layer]],
    example: Batch,
) -> tuple[dict[str, list[Layer]], dict[str, str]]:
    """The blocks that would hand on their input if all in them that multiplies were zero, or all
    that their modules tell of, and what that is; why others cannot be asked."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def hook(name: str) -> Callable[..., None]:
        def run(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in calls:
                calls[name] = _kept(args), dict(zip(kwargs, _kept(kwargs.values()), strict=True))

        return run

    with modes.calibration_mode(model), torch.no_grad(), ExitStack() as stack:
        for name, block in blocks.items():
            handle = block.register_forward_pre_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        example.run(model)
    found: dict[str, list[Layer]] = {}
    failed = {name: "the example does not reach it" for name in blocks if name not in calls}
    known = {id(y.module) for y in layers_of(model)}
    with modes.calibration_mode(model), torch.no_grad(), left_as_is(model):
        for name, (args, kwargs) in calls.items():
            told = [y for y in inside[name] if id(y.module) in known]
            for some in (inside[name], told):
                try:
                    if name not in found and some and _hands_on(blocks[name], some, args, kwargs):
                        found[name] = some
                except Exception as error:  # the block's own, of a call by itself
                    failed[name] = f"called by itself it fails ({type(error).__name__}: {error})"
    return found, failed


def _kept(values: Iterable[Any]) -> tuple[Any, ...]:
    """A call's arguments as they are now, whatever the model does with them later."""
    return tuple(v.clone() if isinstance(v, Tensor) else private(v) for v in values)


def _hands_on(
    block: nn.Module, layers: Sequence[Layer], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether a block whose layers are zero gives what it gets. Only torch's own hooks see it."""
    with modes.without_hooks(block):
        zeros = _zeros(block, layers)
        made = first_of(torch.func.functional_call(block, zeros, _kept(args), kwargs))
    given = given_to(args, kwargs)
    return given is not None and isinstance(made, Tensor) and torch.equal(given, made)


def _zeros(block: nn.Module, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Zeros for some of a block's tensors, by the names under which its modules hold them."""
    own = {id(original_of(y.module, y.tensor)) for y in layers}
    named = block.named_parameters()
    return {name: torch.zeros_like(p.detach()) for name, p in named if id(p) in own}


@contextmanager
def skipped(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let blocks hand on their input."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        given = given_to(args, kwargs)
        return (given, *out[1:]) if isinstance(out, tuple) else given

    with ExitStack() as stack:
        for block in blocks:
            handle = block.register_forward_hook(hook, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        yield


# -- choosing --------------------------------------------------------------------------------------


def _by_cosine(
    model: nn.Module,
    blocks: dict[str, nn.Module],
    batches: Sequence[Batch],
    spec: LayerSpec,
    run: RunRecord,
    bar: Any,
) -> dict[str, str]:
    """The blocks whose output is most like their input, with the reason as a note."""
    turned = dict.fromkeys(blocks, 0.0)
    tokens = dict.fromkeys(blocks, 0)
    padding, current, shadow = Padding(model, batches), 0, False

    def hook(name: str) -> Callable[..., None]:
        def seen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            one, two = given_to(args, kwargs), first_of(out)
            if one is None or not isinstance(two, Tensor) or one.shape != two.shape:
                return
            rows = one.reshape(-1, one.shape[-1])
            visit = padding.visit(current, name, shadow=shadow)
            if shadow:
                padding.note(current, name, visit, [rows])
                return
            (keep,) = padding.tokens(current, name, visit, [rows], name, loose=False)
            apart = 1 - torch.cosine_similarity(one.float(), two.float(), dim=-1).flatten()
            apart = apart if keep is None else apart[keep]
            turned[name] += float(apart.sum())
            tokens[name] += apart.numel()

        return seen

    with modes.calibration_mode(model), torch.no_grad(), ExitStack() as stack:
        for name, block in blocks.items():
            handle = block.register_forward_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        shadowed = set(padding.shadowed())
        for current, batch in enumerate(batches):
            if current in shadowed:
                shadow = True
                padding.run_shadow(current, lambda other: other.run(model))
                shadow = False
            batch.run(model)
            padding.forget(current)
            bar.update()
    run.notes += padding.notes()
    mean = {name: turned[name] / tokens[name] for name in blocks if tokens[name]}
    order = sorted(mean, key=lambda name: mean[name])
    chosen = _leaving_one(order, lengths_of(model, blocks), spec.drop)
    return {name: f"it turned its input by 1 - cos = {mean[name]:.4g}" for name in chosen}


def _leaving_one(order: Sequence[str], left: dict[str, int], count: int) -> list[str]:
    chosen: list[str] = []
    for name in order:
        parent = name.rpartition(".")[0]
        if len(chosen) < count and left[parent] > 1:
            chosen.append(name)
            left[parent] -= 1
    return chosen


def _by_loss(
    model: nn.Module,
    blocks: dict[str, nn.Module],
    batches: Sequence[Batch],
    spec: LayerSpec,
    run: RunRecord,
    bar: Any,
) -> dict[str, str]:
    """One by one the block whose absence costs least, with the loss as a note."""
    loss = spec.loss or default_loss
    bar.reset(total=sum(len(blocks) - i for i in range(spec.drop)))
    bar.unit = "trial"
    chosen: dict[str, str] = {}
    while len(chosen) < spec.drop:
        trials: dict[str, float] = {}
        for name in _droppable(model, blocks, chosen):
            with skipped([blocks[n] for n in (*chosen, name)]), modes.calibration_mode(model):
                trials[name] = _mean_loss(model, batches, loss)
            bar.update()
        best = min(trials, key=lambda name: trials[name])
        chosen[best] = f"loss {trials[best]:.4g} without it and those chosen before"
    return chosen


def lengths_of(model: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, int]:
    """How many blocks are in each list that holds some of these, by its name."""
    return {own[0].rpartition(".")[0]: size for own, size in _lists(model, blocks)}


def _droppable(model: nn.Module, blocks: dict[str, nn.Module], chosen: dict[str, str]) -> list[str]:
    left = lengths_of(model, blocks)
    for name in chosen:
        left[name.rpartition(".")[0]] -= 1
    rest = (name for name in blocks if name not in chosen)
    return [name for name in rest if left[name.rpartition(".")[0]] > 1]


def _mean_loss(
    model: nn.Module, batches: Sequence[Batch], loss: Callable[[nn.Module, Any], Tensor]
) -> float:
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            total += float(loss_on(model, batch, loss))
    if not total < float("inf"):
        raise CalibrationError(f"the loss on the data is {total}")
    return total / len(batches)
