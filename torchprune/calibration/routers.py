"""Routers and gates, told by what becomes of a layer's outputs while one batch runs.

A router's outputs are ranked: through bias, noise, softmax or sigmoid they come to `topk`, `sort`,
`argmax` or a draw over the very axis that the layer made. Or a softmax of them mixes the outputs of
all experts. A gate's outputs are numbers that each scale a whole vector. Nothing is asked of names
or shapes of modules, but that there are fewer outputs than inputs: where there are more, a ranking
makes activations sparse and chooses no experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

_DIM = {
    "topk": (2, -1),
    "sort": (1, -1),
    "argsort": (1, -1),
    "kthvalue": (2, -1),
    "argmax": (1, None),
    "max": (1, None),
    "softmax": (1, None),
    "log_softmax": (1, None),
    "gumbel_softmax": (4, -1),
    "multinomial": (9, -1),
}
"""Function -> where its axis stands among the arguments, and which it is by default."""

_RANKING = {"topk", "sort", "argsort", "kthvalue", "argmax", "gumbel_softmax", "multinomial"}
_SOFT = {"softmax", "log_softmax", "sigmoid", "gumbel_softmax"}
_SCALING = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"}
_MIXING = {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "einsum", "addmm", "baddbmm"}
_CONVOLVING = {"conv1d", "conv2d", "conv3d"}
_OPAQUE = {"scaled_dot_product_attention", "multi_head_attention_forward", "bilinear", "embedding"}
"""What a value does not come through as itself, though shapes may agree."""

_FEW = 8
"""A layer of numbers that scale vectors has at least so many inputs to each output."""


@dataclass(frozen=True)
class _Output:
    """A value that is still, number by number, what a product with a parameter gave.

    Attributes:
        parameter: its id.
        axis: which axis of the value the product made, counted from the end.
        rows, cols: outputs and inputs of the product.
        soft: whether a softmax or sigmoid made shares of them.
        pure: whether nothing else of its size had a part in it.
    """

    parameter: int
    axis: int
    rows: int
    cols: int
    soft: bool = False
    pure: bool = True


class Routers:
    """Watches the torch functions of one forward pass.

    Attributes:
        found: id of a parameter -> why it is a router or a gate.
    """

    def __init__(self) -> None:
        self.found: dict[int, str] = {}
        self._outputs: Any = WeakIdKeyDictionary()
        self._weights: Any = WeakIdKeyDictionary()
        self._picks: Any = WeakIdKeyDictionary()
        self._feeders: dict[int, set[_Output]] = {}

    def saw(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """One call, as a `TorchFunctionMode` gets it, and what came of it."""
        name = getattr(func, "__name__", "")
        operands = list(_tensors((*args, *kwargs.values())))
        self._judge_picks(operands)
        if name in _DIM:
            self._judge_ranking(name, args, kwargs, result)
        elif name in _SCALING and isinstance(result, Tensor):
            self._judge_scaling(operands, result)
        product = name == "linear" or name in _CONVOLVING or name in _MIXING
        if product:
            self._judge_mixing(name, args, operands)
        if product and isinstance(result, Tensor):
            self._take_product(name, args, operands, result)
        elif name not in _OPAQUE:
            for tensor in _tensors((result,)):
                self._follow(name, operands, tensor, _axis_of(name, args, kwargs))

    # -- what is found -----------------------------------------------------------------------------

    def _judge_ranking(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        tensor = next(_tensors((*args, *kwargs.values())), None)
        if tensor is None:
            return
        axis = _axis_of(name, args, kwargs)
        for output in self._outputs.get(tensor, ()):
            over = tensor.dim() == 1 if axis is None else _from_end(axis, tensor) == output.axis
            if output.rows >= output.cols:
                continue  # a ranking that makes activations sparse
            if name in _RANKING and (over or (output.soft and axis is not None)):
                self._find(output, f"a router: its {output.rows} outputs are ranked by {name}")
            elif name == "max" and over and isinstance(result, tuple):
                self._picks[result[1]] = output

    def _judge_picks(self, operands: Sequence[Tensor]) -> None:
        """Where a maximum stands is not only given, but asked for: it chooses something."""
        for tensor in operands:
            if (output := self._picks.get(tensor)) is not None:
                self._find(output, f"a router: the largest of its {output.rows} outputs chooses")

    def _judge_scaling(self, operands: Sequence[Tensor], result: Tensor) -> None:
        for tensor in operands:
            if not tensor.dim() or tensor.shape[-1] != 1 or result.shape[-1] == 1:
                continue
            for output in self._outputs.get(tensor, ()):
                if output.rows * _FEW <= max(output.cols, result.shape[-1]):
                    outputs = "output" if output.rows == 1 else f"{output.rows} outputs, each"
                    self._find(output, f"a gate: its {outputs} scales a vector")
                    for feeder in self._feeders.get(output.parameter, ()):
                        self._find(feeder, f"a gate: its {feeder.rows} outputs make another's")

    def _judge_mixing(self, name: str, args: Sequence[Any], operands: Sequence[Tensor]) -> None:
        """A softmax of outputs, multiplied with what is no parameter along their own axis."""
        if name in ("linear", *_CONVOLVING) or any(self._parameter(t) for t in operands):
            return
        for place, tensor in enumerate(operands):
            for output in self._outputs.get(tensor, ()):
                few = output.soft and output.rows < output.cols
                if few and _contracted(name, args, operands, place, output.axis):
                    self._find(output, f"a router: its {output.rows} outputs are shares of a mix")

    def _find(self, output: _Output, why: str) -> None:
        self.found.setdefault(output.parameter, why)

    # -- what is followed --------------------------------------------------------------------------

    def _parameter(self, tensor: Tensor) -> int | None:
        """The parameter that a tensor is, or is a view or cast of."""
        if isinstance(tensor, nn.Parameter):
            return id(tensor)
        found: int | None = self._weights.get(tensor)
        return found

    def _take_product(
        self, name: str, args: Sequence[Any], operands: Sequence[Tensor], result: Tensor
    ) -> None:
        made = _made_by(name, args, operands)
        for place, axis, rows in made:
            weight = operands[place]
            parameter = self._parameter(weight)
            cols = weight.numel() // max(rows, 1)
            if parameter is not None and rows <= cols and result.dim() >= -axis:
                output = _Output(parameter, axis, rows, cols)
                self._outputs[result] = {*self._outputs.get(result, ()), output}
                feeders = self._feeders.setdefault(parameter, set())
                feeders |= {o for t in operands if t is not weight for o in self._feeding(t, cols)}

    def _feeding(self, tensor: Tensor, cols: int) -> Iterator[_Output]:
        """The few outputs of another layer that a product of so many inputs reads, all of them."""
        for output in self._outputs.get(tensor, ()):
            if output.pure and output.rows == cols and output.rows * _FEW <= output.cols:
                yield output

    def _follow(
        self, name: str, operands: Sequence[Tensor], result: Tensor, over: int | None
    ) -> None:
        """Keep track of what is still, number by number, a parameter or a layer's outputs."""
        kept: set[_Output] = set()
        alike = [t for t in operands if t.numel() == result.numel() and not self._parameter(t)]
        for tensor in operands:
            parameter = self._parameter(tensor)
            if parameter is not None and tensor.numel() == result.numel() and result is not tensor:
                self._weights[result] = parameter
            for output in self._outputs.get(tensor, ()):
                axis = _axis_after(tensor, result, output.axis)
                if axis is not None:
                    soft = name == "sigmoid" or (
                        name in _SOFT
                        and over is not None
                        and _from_end(over, tensor) == output.axis
                    )
                    pure = output.pure and len(alike) <= 1
                    kept.add(replace(output, axis=axis, soft=output.soft or soft, pure=pure))
        if kept:
            self._outputs[result] = {*self._outputs.get(result, ()), *kept}


# -- axes ------------------------------------------------------------------------------------------


def _from_end(axis: int, tensor: Tensor) -> int:
    return axis if axis < 0 else axis - tensor.dim()


def _axis_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    if name not in _DIM:
        return None
    place, usual = _DIM[name]
    axis = kwargs.get("dim", args[place] if place < len(args) else usual)
    return axis if type(axis) is int else None


def _axis_after(before: Tensor, after: Tensor, axis: int) -> int | None:
    """Where an axis (from the end) is after a function without sums over it, or None."""
    size = before.shape[axis]
    if _same_memory(before, after) and size > 1:  # a view: the axis has kept its stride
        for place in range(after.dim()):
            if after.shape[place] == size and after.stride(place) == before.stride(axis):
                return place - after.dim()
    aligned = zip(reversed(before.shape), reversed(after.shape), strict=False)
    if before.dim() <= after.dim() and all(b in (1, a) for b, a in aligned):
        return axis
    if before.numel() != after.numel():
        return None
    behind = before.shape[axis + 1 :].numel() if axis < -1 else 1
    for place in range(after.dim()):  # a reshape, perhaps a copy: the axis has kept what is behind
        if after.shape[place] == size and after.shape[place + 1 :].numel() == behind:
            return place - after.dim()
    return None


def _same_memory(one: Tensor, other: Tensor) -> bool:
    try:
        return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # tensors that only wrap others
        return False


# -- products --------------------------------------------------------------------------------------


def _made_by(
    name: str, args: Sequence[Any], operands: Sequence[Tensor]
) -> Iterator[tuple[int, int, int]]:
    """For each operand that could be a weight: its place, the axis of the result that it makes
    (from the end), and how long that is."""
    if name == "linear":
        yield 1, -1, operands[1].shape[0]
    elif name in _CONVOLVING:
        yield 1, 1 - operands[1].dim(), operands[1].shape[0]
    elif name == "einsum":
        for place, labels, out in _labels(args, operands):
            others = {c for p, own, _ in _labels(args, operands) if p != place for c in own}
            for label in out:
                if label in labels and label not in others:
                    axis = out.index(label) - len(out)
                    yield place, axis, operands[place].shape[labels.index(label)]
    elif name in _MIXING:
        left, right = _factors(name, operands)
        if operands[right].dim() > 1:
            yield right, -1, operands[right].shape[-1]
        if operands[left].dim() > 1:
            axis = -2 if operands[right].dim() > 1 else -1
            yield left, axis, operands[left].shape[-2]


def _factors(name: str, operands: Sequence[Tensor]) -> tuple[int, int]:
    """Which operands stand left and right in a product of matrices."""
    left = len(operands) - 2  # addmm and baddbmm have what they add to in front
    return (left + 1, left) if name == "__rmatmul__" else (left, left + 1)


def _labels(args: Sequence[Any], operands: Sequence[Tensor]) -> Iterator[tuple[int, str, str]]:
    """The operands of an einsum with their labels and the result's; none where dots stand for
    axes."""
    equation = args[0] if args and isinstance(args[0], str) else ""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if arrow and "." not in equation and len(parts) == len(operands):
        yield from ((place, labels, out) for place, labels in enumerate(parts))


def _contracted(
    name: str, args: Sequence[Any], operands: Sequence[Tensor], place: int, axis: int
) -> bool:
    """Whether a product sums over an axis (from the end) of one of its operands."""
    if name == "einsum":
        return any(
            p == place and labels[axis] not in out
            for p, labels, out in _labels(args, operands)
            if len(labels) >= -axis
        )
    left, right = _factors(name, operands)
    return (place == left and axis == -1) or (
        place == right and axis == (-2 if operands[right].dim() > 1 else -1)
    )


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
