"""Constants of an ML program as a bit mask and the nonzeros, float or int8, and the proof of it.

    before = constexpr_sparse_to_dense(mask, nonzeros)                                    float
    before = constexpr_sparse_to_dense(constexpr_sparse_blockwise_shift_scale(mask, codes, scale))

coremltools' own pass prunes by a threshold; here the mask is what is not zero, whatever its size.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from torchprune.errors import ExportError
from torchprune.export.coreml_file import Constant, MLProgram, constants_of

_HEAD, _LINE = 64, 64
"""Bytes before every constant of the file, and what all of them are multiples of."""

_LEVELS = 127
"""int8 codes on either side of zero."""


def pays(weight: Any, min_sparsity: float, int8: bool) -> bool:
    """Whether a constant has the zeros that are asked for, and is smaller in the sparse form."""
    if weight.ndim < 2 or weight.dtype not in (np.float16, np.float32):
        return False
    kept = int(np.count_nonzero(weight))
    if kept == 0 or kept > (1 - min_sparsity) * weight.size:
        return False
    return sparse_bytes(weight, kept, int8) < _in_file(weight.nbytes)


def sparse_bytes(weight: Any, kept: int, int8: bool) -> int:
    """Bytes of the sparse form in the file."""
    mask = _in_file(-(-weight.size // 8))
    if not int8:
        return mask + _in_file(kept * weight.itemsize)
    return mask + _in_file(kept) + _in_file(weight.shape[0] * weight.itemsize)


def make_sparse(program: Any, min_sparsity: float, int8_of: Mapping[str, bool], wide: bool) -> int:
    """Replace the constants for which it pays, in place.

    Args:
        program: of coremltools ("milinternal").
        int8_of: for the fingerprints of the model's weights whether they are to be rounded to int8;
            all other constants stay.
        wide: the form of iOS 18, a mask of single bits; int8 needs it.

    Returns:
        bytes that the file saves.
    """
    saved = 0
    for function in program.functions.values():
        function._essential_scope_sources = []  # new constants come from no line of the model
        for op in list(function.operations):
            value = op.outputs[0].val if op.op_type == "const" else None
            if not isinstance(value, np.ndarray):
                continue
            int8 = int8_of.get(_digest(value)) if value.ndim > 1 else None
            if int8 is None or not pays(value, min_sparsity, int8):
                continue
            with function:
                made = _sparse_form(op, value, int8, wide)
            function.replace_uses_of_var_after_op(
                anchor_op=op, old_var=op.outputs[0], new_var=made, no_check_var_types=True
            )
            function.remove_ops([op])
            kept = int(np.count_nonzero(value))
            saved += _in_file(value.nbytes) - sparse_bytes(value, kept, int8)
    return saved


def _sparse_form(op: Any, value: Any, int8: bool, wide: bool) -> Any:
    from coremltools.converters.mil.mil import Builder, types

    mask = value != 0
    name = {"before_op": op, "name": f"{op.name}_sparse"}
    if not wide:
        return Builder.constexpr_sparse_to_dense(
            nonzero_data=value[mask],
            mask=np.packbits(mask.reshape(-1), bitorder="little"),
            shape=np.array(value.shape, np.uint32),
            **name,
        )
    bits: Any = mask.astype(types.nptype_from_builtin(types.string_to_builtin("uint1")))
    nonzeros: Any = value[mask]
    if int8:
        scale = scales_of(value)
        bits, nonzeros = Builder.constexpr_sparse_blockwise_shift_scale(
            data_mask=bits, nonzero_data=codes_of(value, scale)[mask], scale=scale, before_op=op
        )
    return Builder.constexpr_sparse_to_dense(nonzero_data=nonzeros, mask=bits, **name)


def scales_of(weight: Any) -> Any:
    """What an int8 step is worth, of the weight's type, one for each of its rows: (R, 1, ...)."""
    largest = np.abs(weight.astype(np.float32)).max(tuple(range(1, weight.ndim)), keepdims=True)
    tiny = np.finfo(weight.dtype).tiny
    return np.maximum(largest / _LEVELS, tiny).astype(weight.dtype)


def codes_of(weight: Any, scale: Any) -> Any:
    """A weight in whole steps of its scale, int8."""
    steps = np.rint(weight.astype(np.float32) / scale.astype(np.float32))
    return np.clip(steps, -_LEVELS, _LEVELS).astype(np.int8)


def chosen(names: Sequence[str], ignore: Sequence[str]) -> list[str]:
    """Those names that no glob fits.

    Raises:
        ExportError: a glob fits none.
    """
    for glob in ignore:
        if not fnmatch.filter(names, glob):
            few = ", ".join(list(names)[:4])
            raise ExportError(f"int8_ignore: {glob!r} fits none of {few}…")
    return [name for name in names if not any(fnmatch.fnmatch(name, glob) for glob in ignore)]


def fingerprints(weight: Any) -> list[str]:
    """What a weight's content is known by, as it is and turned."""
    return [_digest(way) for way in _ways(weight)]


def check_weights(
    program: MLProgram, weights: Sequence[tuple[str, Any]], min_sparsity: float, int8: Sequence[str]
) -> list[str]:
    """Hold the constants of a package that was read back against the weights, bit by bit.

    The law: of every weight the file has a constant with its zeros, and no others, in sparse form
    where that pays; and its values, to the bit, or, rounded to int8, within half a step.

    Args:
        weights: names and arrays of the type that the program computes in.
        int8: names of those that were to be rounded.

    Returns:
        names of those that are sparse.

    Raises:
        ExportError: it does not hold for one.
    """
    found: dict[str, list[Constant]] = {}
    for constant in constants_of(program):
        if constant.array.ndim > 1 and constant.array.dtype in (np.float16, np.float32):
            found.setdefault(_digest(constant.array), []).append(constant)
            if int8 and constant.mask is not None:
                found.setdefault(_digest(constant.mask), []).append(constant)
    packed: list[str] = []
    for name, weight in weights:
        wanted = pays(weight, min_sparsity, name in int8)
        if name in int8 and wanted:
            fits = any(_is_rounded(w, found.get(_digest(w != 0), ())) for w in _ways(weight))
            said = "its zeros, or values within half a step of it"
        else:
            here = [constant for w in _ways(weight) for constant in found.get(_digest(w), ())]
            fits = bool(here) and (not wanted or all(c.mask is not None for c in here))
            said = f"its values{' in sparse form' if wanted else ''}"
        if not fits:
            raise ExportError(
                f"Core ML: {name} is not in the file as it was: no constant has {said}; "
                "nothing was written"
            )
        if wanted and name not in packed:
            packed.append(name)
    return packed


def _is_rounded(weight: Any, constants: Sequence[Constant]) -> bool:
    """Whether one of them is a weight rounded to int8."""
    step = scales_of(weight).astype(np.float64)
    allowed = step * 0.5 + np.abs(weight.astype(np.float64)) * 2**-9  # of the type's own rounding
    return any(
        bool(np.all(np.abs(constant.array.astype(np.float64) - weight) <= allowed))
        for constant in constants
    )


def _ways(weight: Any) -> Iterator[Any]:
    """A weight as it is and turned: converters transpose what they multiply by."""
    yield weight
    if weight.ndim == 2:
        yield np.ascontiguousarray(weight.T)


def _digest(array: Any) -> str:
    """Of type, shape and content; zeros have no sign."""
    whole = np.ascontiguousarray(array)
    if whole.dtype.kind == "f":
        whole = np.where(whole == 0, whole.dtype.type(0), whole)
    return f"{whole.dtype}{whole.shape}{hashlib.sha256(whole.tobytes()).hexdigest()}"


def _in_file(size: int) -> int:
    return _HEAD + -(-size // _LINE) * _LINE
