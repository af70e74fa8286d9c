"""A model made ready to be exported, and the call that shows what it takes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from torchprune.errors import ExportError
from torchprune.export import written
from torchprune.export.bfloat16 import holds_bfloat16, in_float32, inputs_in_float32
from torchprune.export.cached import PAST, CachedModel
from torchprune.export.graph_names import output_names
from torchprune.export.hf import folded_copy
from torchprune.export.promises import promised, reason_of
from torchprune.export.sizes import Shapes, asked_of, measure, varies
from torchprune.export.written import tensors_of
from torchprune.lowering.lower import TARGETS, lift_forms

T = TypeVar("T")

_UNUSUAL, _CHECKED = ((5, 7, 11), (2, 3, 4)), ((1, 0, 1), (3, 9, 1), (2, 0, 5))
"""Batch, past and new tokens of a step: to export with (the first that works), to check at."""


@dataclass(frozen=True)
class Sample:
    """Inputs of a call, and the tensors that the model gives for them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the inputs, flat."""
        return tensors_of((self.args, self.kwargs))


@dataclass(frozen=True)
class Call:
    """A plain module, inputs to export it with, which of their sizes vary, and inputs to check at.

    Attributes:
        samples: the user's example first; the others have other sizes.
        inputs: names of the tensors among the inputs, flat.
        wanted: for each of them the axes that were to vary.
        names: those of the graph's inputs and outputs, where the format has names.
        size_names: for each input what its axes count, where formats have usual names for it.
        retreat: the same call with all sizes fixed, for when it does not hold at others.
        note: why it is that one, if it is.
        widened: module and inputs are a bfloat16 model's in float32.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any
    samples: list[Sample]
    inputs: list[str]
    wanted: list[set[int]]
    names: tuple[list[str] | None, list[str] | None] = (None, None)
    size_names: list[dict[int, str]] = field(default_factory=list)
    retreat: Call | None = None
    note: str = ""
    widened: bool = False


def prepare(
    model: nn.Module,
    example_inputs: Any,
    *,
    with_cache: bool,
    dynamic_shapes: Any,
    vary: bool,
    packed: bool = False,
    accept: Callable[[nn.Module], object] = lambda _: None,
    wide: bool = False,
) -> Call:
    """Fold a copy of the model and read the example; see `to_onnx` for the arguments.

    Args:
        packed: keep layers that are lowered to bitmasks; else they are dense again.
        accept: is given the copy before anything runs, and raises what speaks against it.
        wide: a model with bfloat16 parameters is computed in float32, from then on.
        vary: let sizes vary where `dynamic_shapes` says nothing; else all are as in the example.

    Raises:
        ExportError: the example is no call, or does not fit `with_cache`.
    """
    plain = plain_of(model, packed=packed)
    args, kwargs = _contiguous(as_call(example_inputs))
    accept(plain)
    if not (wide and holds_bfloat16(plain)):
        return _call_of(plain, args, kwargs, with_cache, dynamic_shapes, vary)
    args, kwargs = inputs_in_float32((args, kwargs))
    call = _call_of(
        in_float32(plain), args, kwargs, with_cache, dynamic_shapes, vary, " in float32"
    )
    return replace(call, widened=True)


def _call_of(
    plain: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    with_cache: bool,
    dynamic_shapes: Any,
    vary: bool,
    how: str = "",
) -> Call:
    """The call of a module that is ready; see `prepare`.

    Args:
        how: what an error says of the way in which it is called.
    """
    if with_cache:
        tokens = _tokens_of(args, kwargs)
        with promised(f"with_cache: a {type(plain).__name__} cannot take steps with a cache{how}"):
            return _cached(CachedModel(plain), tokens, dynamic_shapes, vary)
    _without_cache(plain)
    with promised(f"the model cannot be called with the example{how}"):
        outputs = _outputs(plain, args, kwargs)
    if dynamic_shapes is not None:
        asked = _as_asked(plain, args, kwargs, dynamic_shapes)
    else:
        asked = [_usual(leaf) if vary else {} for leaf in pytree.tree_leaves((args, kwargs))]
    call = _measured(plain, args, kwargs, outputs, asked)
    return replace(call, retreat=None) if dynamic_shapes is not None else call


def prepare_program(program: ExportedProgram, example_inputs: Any) -> Call:
    """The call that shows what an exported program takes, at the sizes that it lets vary.

    Raises:
        ExportError: the example is no call, or not of this program.
    """
    args, kwargs = _contiguous(as_call(example_inputs))
    module = program.module()
    with promised("the program cannot be called with the example"):
        outputs = _outputs(module, args, kwargs)
    shapes = iter([value.shape for value in written.input_values(program)])
    asked = [
        {
            axis: torch.export.Dim.AUTO
            for axis, size in enumerate(next(shapes) if isinstance(leaf, Tensor) else ())
            if not isinstance(size, int)
        }
        for leaf in pytree.tree_leaves((args, kwargs))
    ]
    call = _measured(module, args, kwargs, outputs, asked)
    return replace(call, args=args, kwargs=kwargs, dynamic_shapes=None, retreat=None)


def _measured(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any, asked: Shapes
) -> Call:
    """A call in which the sizes vary that are asked for and that the module runs at.

    Args:
        outputs: of the module, for the example.
        asked: for every input, flat.
    """
    leaves, tree = pytree.tree_flatten((args, kwargs))
    tensors = [isinstance(leaf, Tensor) for leaf in leaves]
    fixed = Call(
        module,
        args,
        kwargs,
        None,
        samples=[Sample(args, kwargs, tensors_of(outputs))],
        inputs=[n for n, t in zip(_names(module, args, kwargs), tensors, strict=True) if t],
        wanted=[set(dims) for dims, t in zip(asked, tensors, strict=True) if t],
        names=(None, output_names(outputs)),
    )
    if not any(asked):
        return fixed
    sizes = measure(lambda made: run(module, *pytree.tree_unflatten(made, tree)), leaves, asked)
    new_args, new_kwargs = pytree.tree_unflatten(sizes.leaves, tree)
    shapes = pytree.tree_unflatten([dims or None for dims in sizes.shapes], tree)
    given = [(pytree.tree_unflatten(check.leaves, tree), check) for check in sizes.checks]
    checks = [Sample(some[0], some[1], check.outputs) for some, check in given]
    return replace(
        fixed,
        args=new_args,
        kwargs=new_kwargs,
        dynamic_shapes=shapes[1] or shapes[0],
        samples=[*fixed.samples, *checks],
        retreat=fixed if any(sizes.shapes) else None,
    )


def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a model gives; the inputs and its buffers stay as they were."""
    return tensors_of(_outputs(module, args, kwargs))


def _outputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a model returns; the inputs and its buffers stay as they were."""
    kept = [
        (owner, key, buffer, buffer.clone())
        for owner in module.modules()
        for key, buffer in owner._buffers.items()
        if buffer is not None
    ]
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
    try:
        with torch.no_grad():
            return module(*args, **kwargs)
    finally:
        for owner, key, buffer, old in kept:
            owner._buffers[key] = buffer
            if not torch.equal(buffer, old):
                with torch.no_grad():
                    buffer.copy_(old)


def _cached(cached: CachedModel, tokens: Tensor, dynamic_shapes: Any, vary: bool) -> Call:
    """Steps of a model with its cache; the example has a past of a few tokens."""
    usual = tokens.shape[0], PAST, tokens.shape[1]
    names = cached.names()

    def at(size: tuple[int, int, int]) -> Sample:
        args = cached.example(tokens, *size)
        return Sample(args, {}, run(cached, args, {}))

    first = at(usual)
    nothing: list[set[int]] = [set() for _ in names[0]]
    call = Call(cached, first.args, {}, None, [first], names[0], nothing, names)
    if dynamic_shapes is None and not vary:
        return call
    shapes = cached.dynamic_shapes(dynamic_shapes)
    made: Sample | None = None
    for wish in _UNUSUAL:
        try:
            made = at(cached.sizes(shapes, usual, wish))
            break
        except Exception as error:  # longer than the model's texts may be
            reason = error
    if made is None:
        raise ExportError(f"with_cache: the model cannot take a step: {reason_of(reason)}")
    checks = []
    for wish in _CHECKED:
        try:
            checks.append(at(cached.sizes(shapes, usual, wish)))
        except Exception:  # no size of this model
            continue
    return replace(
        call,
        args=made.args,
        dynamic_shapes=shapes,
        samples=[first, *checks],
        wanted=[
            {axis for axis in range(t.dim()) if varies(asked_of(dims, axis))}
            for t, dims in zip(made.tensors, cached.flat(shapes), strict=True)
        ],
        size_names=cached.size_names(),
    )


def folder_of(target: Path) -> Path:
    """The directory that a file goes to, made if need be.

    Raises:
        ExportError: the target is a directory itself.
    """
    if target.is_dir():
        raise ExportError(f"{target} is a directory, and a file is to be written")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent


def file_bytes(*files: str | os.PathLike[str] | None) -> int:
    """Bytes of some files together."""
    return sum(Path(file).stat().st_size for file in files if file is not None)


def plain_of(model: nn.Module, *, packed: bool = False) -> nn.Module:
    """A copy with masks folded, weights dense and nothing that exporters cannot read.

    Args:
        packed: layers that are lowered to a bitmask stay so.
    """
    forms = [form for form in TARGETS if form != "bitmask" or not packed]
    return _exportable(lift_forms(folded_copy(model), forms).eval())


def as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, Sequence) and not isinstance(example, str):
        return tuple(example), {}
    raise ExportError(
        "example_inputs must be a tensor, a tuple of positional or a mapping of keyword inputs, "
        f"got {type(example).__name__}"
    )


def _contiguous(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """The inputs as runtimes are given them: in row-major order, however the example lies."""
    return pytree.tree_map_only(Tensor, lambda t: t.contiguous(), call)


def _exportable(model: nn.Module) -> nn.Module:
    """Routed experts by batched products, which ONNX has, where transformers offers the choice."""
    choose = getattr(model, "set_experts_implementation", None)
    if callable(choose):
        choose("batched_mm")
    return model


def _without_cache(model: nn.Module) -> None:
    """No key-value caches among the outputs of a transformers model."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False


def _tokens_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        raise ExportError("with_cache needs token ids (batch, length) as the example")
    return tokens


def _usual(leaf: Any) -> dict[int, Any]:
    """Sizes that vary unless a user says otherwise: batches, and lengths of token sequences."""
    if not isinstance(leaf, Tensor) or leaf.dim() == 0:
        return {}
    tokens = leaf.dim() > 1 and not leaf.is_floating_point()
    return dict.fromkeys(range(1 + tokens), torch.export.Dim.AUTO)


def _as_asked(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> Shapes:
    """What a user's `dynamic_shapes` ask of every input, flat.

    Raises:
        ExportError: they are not built as the inputs are.
    """
    found: Shapes = []
    names = [*list(inspect.signature(module.forward).parameters)[: len(args)], *kwargs]
    try:
        parts = [shapes[name] for name in names] if isinstance(shapes, Mapping) else list(shapes)
        for value, dims in zip((*args, *kwargs.values()), parts, strict=True):
            found += _collected(value, dims)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise ExportError(
            "dynamic_shapes must be built as the inputs are, with {axis: Dim} for every tensor and "
            f"None for what is fixed: {reason_of(error)}"
        ) from error
    return found


def _collected(value: Any, dims: Any) -> Shapes:
    if isinstance(value, Tensor):
        every = ((axis, asked_of(dims, axis)) for axis in range(value.dim()))
        return [{axis: dim for axis, dim in every if varies(dim)}]
    if dims is None or not isinstance(value, Mapping | Sequence) or isinstance(value, str):
        return [{} for _ in pytree.tree_leaves(value)]
    pairs = (
        [(value[key], dims[key]) for key in value]
        if isinstance(value, Mapping)
        else zip(value, dims, strict=True)
    )
    return [leaf for pair in pairs for leaf in _collected(*pair)]


def _names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Names of a call's inputs, flat: of parameters, and of the place in what they hold."""
    parameters = list(inspect.signature(module.forward).parameters)
    paths: list[Any] = [path for path, _ in pytree.tree_flatten_with_path((args, kwargs))[0]]
    names = []
    for which, first, *rest in paths:
        if which.idx:
            name = first.key
        else:
            name = parameters[first.idx] if first.idx < len(parameters) else f"input {first.idx}"
        names.append(f"{name}{pytree.keystr(tuple(rest))}")
    return names
