"""Watching a forward's products: every torch function it calls, and the weights among the operands.

A torch function mode sees calls where Python makes them, before autocast and below all modules, so
a weight is found however it is read: in its module's forward or past it, whole or a view of a part.
torch's own Python functions that hide products, such as attention's, are run with the mode on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchprune.calibration import recurrent
from torchprune.calibration.operations import READERS, Product, part_of
from torchprune.masking.parts import Axis, Part

_COPIES = frozenset(
    getattr(torch.Tensor, name)
    for name in (
        *("to", "type", "type_as", "float", "half", "bfloat16", "double"),
        *("contiguous", "clone", "reshape", "flatten", "cuda", "cpu", "detach", "requires_grad_"),
    )
)
_TELLING = _COPIES.union(READERS, recurrent.OPERATORS)
"""What is looked at, apart from Python functions; the rest only passes."""

_KEPT_COPIES = 2
_HIDING = ("torch.nn.functional", "torch.functional")


@dataclass(frozen=True, eq=False)
class Operand:
    """An operand that is (a part of) a parameter.

    Attributes:
        parameter: which.
        part: its axes, from the parameter's own beginning.
        again: makes the operand anew from the parameter as it is then.
    """

    parameter: Tensor
    part: Part
    again: Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class _Copy:
    """A copy of a part of a parameter, which has the same values in another dtype or layout."""

    made: Tensor
    source: Tensor
    parameter: Tensor


Reached = Callable[[Product, Operand], bool]
"""Told of a product that is about to be computed; whether the weight may have changed since."""

Saw = Callable[[Any, tuple[Any, ...], Mapping[str, Any], Any], None]
"""Told of a call and its result."""


class Weights:
    """The parameters that are watched, by where they live.

    Args:
        parameters: dense tensors with values.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._own: dict[int, Tensor] = {id(p): p for p in parameters}
        self._by_storage: dict[int, list[Tensor]] = {}
        self.find(self._own.values())

    def find(self, parameters: Iterable[Tensor]) -> None:
        """Note where these live now: their data may have been exchanged."""
        for parameter in parameters:
            self._by_storage.setdefault(_storage(parameter), []).append(parameter)

    def parameter_of(self, tensor: Tensor) -> Tensor | None:
        """The parameter that a tensor is, or is a view of."""
        if id(tensor) in self._own:
            return tensor
        place = _storage(tensor)
        for parameter in self._by_storage.get(place, ()):
            # where a parameter lived before its data were exchanged, something else may live now
            if _storage(parameter) != place or tensor.dtype != parameter.dtype:
                continue
            start = tensor.storage_offset() - parameter.storage_offset()
            if 0 <= start < max(1, parameter.numel()):
                return parameter
        return None


class Watch(TorchFunctionMode):
    """Tells of every product with a watched weight, while one forward runs under it.

    Args:
        weights: what is watched.
        reached: told before each product.
        saw: told of every call after it, or None.
    """

    def __init__(self, weights: Weights, reached: Reached, saw: Saw | None = None) -> None:
        super().__init__()
        self._weights, self._reached, self._saw = weights, reached, saw
        self._copies: deque[_Copy] = deque(maxlen=_KEPT_COPIES)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self._saw is None and type(func) is not FunctionType and func not in _TELLING:
            return func(*args, **kwargs) if kwargs else func(*args)  # most calls: views, sums
        return self._look(func, args, kwargs or {})

    def _look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if recurrent.is_recurrent(func):
            return self._recurrent(func, args, kwargs)
        reader = READERS.get(func)
        if reader is not None:
            for product in reader(args, kwargs, self._is_weight):
                operand = self._operand(product)
                if operand is not None and self._reached(product, operand):
                    args, kwargs = _exchanged(args, kwargs, product.weight, operand.again)
        elif _hides(func) and any(map(self._is_weight, (*args, *kwargs.values()))):
            with self:
                return _body(func)(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _COPIES and isinstance(args[0], Tensor):
            self._note_copy(args[0], result)
        if self._saw is not None:
            self._saw(func, args, kwargs, result)
        return result

    def _recurrent(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A call with many weights, each of which may change before it is used."""
        if not any(map(self._is_weight, recurrent.weights_in(func, args, kwargs))):
            return func(*args, **kwargs)

        def reach(weight: Tensor, rows: Callable[[], Tensor]) -> Tensor | None:
            if not self._is_weight(weight):
                return None
            product = Product(weight, part_of(weight, "rc"), None, lambda: [rows()], "recurrent")
            operand = self._operand(product)
            if operand is None or not self._reached(product, operand):
                return None
            # As it is now: the parameter may change again before the call's other weights are.
            return operand.again().detach().clone()

        return recurrent.watched(func, args, kwargs, reach)

    def _is_weight(self, value: Any) -> bool:
        return isinstance(value, Tensor) and (
            self._weights.parameter_of(value) is not None or self._copy_of(value) is not None
        )

    def _copy_of(self, tensor: Tensor) -> _Copy | None:
        if not self._copies:
            return None
        place = _storage(tensor)
        return next((c for c in self._copies if _storage(c.made) == place), None)

    def _note_copy(self, source: Tensor, made: Any) -> None:
        if not isinstance(made, Tensor) or not source.is_floating_point():
            return
        parameter = self._weights.parameter_of(source)
        if parameter is None or _storage(made) == _storage(source):
            return
        if made.is_contiguous() and made.is_floating_point() and made.numel() == source.numel():
            self._copies.append(_Copy(made, source, parameter))

    def _operand(self, product: Product) -> Operand | None:
        weight, part = product.weight, product.part
        parameter = self._weights.parameter_of(weight)
        if parameter is not None:
            if weight is parameter and parameter.is_contiguous():
                whole = Part(0, part.axes, part.inner)  # nothing to find out
                return Operand(parameter, whole, lambda: parameter)
            within = _relaid(part, parameter, _steps(parameter.shape))
            return None if within is None else Operand(parameter, within, _maker(weight, parameter))
        copy = self._copy_of(weight)
        copied = None if copy is None else _part_of_source(part, copy)
        if copy is None or copied is None:
            return None
        return Operand(copy.parameter, copied, _copier(weight, copy))


def _steps(shape: Sequence[int]) -> list[int]:
    """The steps of a contiguous tensor's axes."""
    steps = [1]
    for size in reversed(shape[1:]):
        steps.insert(0, steps[0] * size)
    return steps[: len(shape)]


def _relaid(part: Part, tensor: Tensor, steps: Sequence[int]) -> Part | None:
    """A part of a tensor's storage as it is where the tensor's axes have other steps, from its
    beginning; None if the part is not made of its axes, or of ranges of them."""
    own = [
        (size, old, new)
        for size, old, new in zip(tensor.shape, tensor.stride(), steps, strict=True)
        if size > 1
    ]
    within = part.offset - int(tensor.storage_offset())
    start = 0
    for _, old, new in sorted(own, key=lambda axis: -axis[1]):
        if old <= 0:
            return None
        digit, within = divmod(within, old)
        start += digit * new
    if [old for _, old, _ in own] == [new for *_, new in own]:  # nothing to find out
        return Part(start, part.axes, part.inner)
    axes = []
    for axis in part.axes:
        step = next(
            (
                new * (axis.step // old)
                for size, old, new in own
                if axis.step % old == 0 and axis.step * axis.size <= old * size
            ),
            None,
        )
        if step is None and axis.size > 1:
            return None
        axes.append(Axis(axis.size, step or 1, axis.role))
    return Part(start, tuple(axes), part.inner)


def _part_of_source(part: Part, copy: _Copy) -> Part | None:
    """What a part of a copy is in the parameter that was copied."""
    made, source = copy.made, copy.source
    if made.shape != source.shape:
        if not source.is_contiguous():
            return None
        source = source.as_strided(made.shape, made.stride(), source.storage_offset())
    found = _relaid(part, made, source.stride())
    if found is None:
        return None
    start = found.offset + int(source.storage_offset())
    moved = Part(start, found.axes, found.inner)
    return _relaid(moved, copy.parameter, _steps(copy.parameter.shape))


def _copier(weight: Tensor, copy: _Copy) -> Callable[[], Tensor]:
    shape, steps, start = weight.shape, weight.stride(), int(weight.storage_offset())
    source, parameter = copy.source, copy.parameter
    offset = int(source.storage_offset()) - int(parameter.storage_offset())

    def again() -> Tensor:
        own = parameter.detach().as_strided(
            source.shape, source.stride(), int(parameter.storage_offset()) + offset
        )
        made = torch.empty_strided(copy.made.shape, copy.made.stride(), dtype=copy.made.dtype)
        made = made.to(copy.made.device).copy_(own.reshape(copy.made.shape))
        return made.as_strided(shape, steps, start - int(copy.made.storage_offset()))

    return again


def _maker(weight: Tensor, parameter: Tensor) -> Callable[[], Tensor]:
    if weight is parameter:
        return lambda: parameter
    start = int(weight.storage_offset()) - int(parameter.storage_offset())
    shape, steps = weight.shape, weight.stride()

    def again() -> Tensor:
        return parameter.detach().as_strided(shape, steps, int(parameter.storage_offset()) + start)

    return again


def _exchanged(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], old: Tensor, again: Callable[[], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with an operand made anew, since its parameter was changed meanwhile."""
    new = again()

    def other(value: Any) -> Any:
        if value is old:
            return new
        if isinstance(value, list | tuple):
            return type(value)(map(other, value))
        return value

    if new is old:
        return args, dict(kwargs)
    return tuple(map(other, args)), {key: other(value) for key, value in kwargs.items()}


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # a tensor that only wraps others
        return -1


# -- torch's own Python functions ----------------------------------------------------------------

_bodies: dict[Any, Callable[..., Any]] = {}


def _hides(func: Any) -> bool:
    """Whether a function is one of torch's in Python, which calls others inside."""
    return isinstance(func, FunctionType) and func.__module__ in _HIDING


def _body(func: Any) -> Callable[..., Any]:
    """A torch function as it runs without modes, so that a mode sees what it calls.

    It first asks whether any argument or mode wants to have the call; here nobody does.
    """
    if func not in _bodies:
        nobody = dict.fromkeys(
            ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"),
            lambda *_: False,
        )
        made = FunctionType(
            func.__code__,
            {**func.__globals__, **nobody},
            func.__name__,
            func.__defaults__,
            func.__closure__,
        )
        made.__kwdefaults__ = func.__kwdefaults__
        _bodies[func] = made
    return _bodies[func]
