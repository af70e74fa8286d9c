"""Products with weights that are a bitmask and their packed nonzeros, at any sparsity.

Importing this file defines two operators that compile, export and autocast see through:

    torchprune::bitmask_linear(x, bits, values, starts, scales, bias, cols) -> Tensor
    torchprune::bitmask_unpack(bits, values, starts, cols) -> Tensor

`torchprune.lowering.bitmask.Bitmask` makes and explains their arguments. On CPU tensors they run in
C++ for AVX-512 (with VBMI2), AVX2 or any processor, whichever fits best, compiled when first used;
on CUDA tensors in Triton (`launching`). Where that fails, and for other devices, they unpack and
multiply in torch: correct, slower than dense.

On CPUs parts that contradict each other are refused. On CUDA devices, where to look would mean to
wait, nothing is read out of bounds, and rows that are damaged come out as NaN.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchprune.lowering.kernels import launching
from torchprune.lowering.kernels.build import BuildError, library
from torchprune.masking.packing import traced_bits, unpack_bits, unpack_values

_WORD = 64
_SLACK = 64

LIBRARY = torch.library.Library("torchprune", "FRAGMENT")
SCHEMAS = (
    "bitmask_linear(Tensor x, Tensor bits, Tensor values, Tensor starts, Tensor? scales, "
    "Tensor? bias, int cols) -> Tensor",
    "bitmask_unpack(Tensor bits, Tensor values, Tensor starts, int cols) -> Tensor",
)
"""As in `ops.cpp`, where programs without Python find them."""

for _schema in SCHEMAS:
    _name = f"torchprune::{_schema.partition('(')[0]}"
    if not torch._C._jit_get_schemas_for_operator(_name):  # else the compiled kernels came first
        LIBRARY.define(_schema, tags=[torch.Tag.pt2_compliant_tag])


@dataclass(frozen=True)
class Native:
    """The kernels for a device.

    Attributes:
        form: "AVX-512 BF16", "AVX-512", "AVX2" or "portable", on CUDA devices their architecture,
            such as "sm_90"; None if the operators run in torch.
        why: the reason for None, else empty.
        language: what they are written in.
    """

    form: str | None
    why: str = ""
    language: str = "C++"

    def __str__(self) -> str:
        if self.form is None:
            return f"bitmask kernels: slower, in torch, because {self.why}"
        slow = "; slow: this processor has neither AVX2 nor AVX-512 with VBMI2"
        told = f"bitmask kernels: {self.language} for {self.form}"
        return told + (slow if self.form == "portable" else "")


def native(device: torch.device | str = "cpu") -> Native:
    """What the operators run on for a device's tensors. The first call compiles the CPU's kernels.

    Args:
        device: "cpu" by default.
    """
    device = torch.device(device)
    if device.type == "cpu":
        handle, why = _load()
        return Native(None, why) if handle is None else Native(handle.torchprune_form().decode())
    if why := launching.why_not(device):
        return Native(None, why)
    return Native(launching.name_of(device), language="Triton")


def use_form(name: str) -> None:
    """Use another form of the kernels ("AVX-512", "AVX2", "portable"), to test or compare.

    Raises:
        ValueError: it does not run here.
    """
    handle, _ = _load()
    if handle is None or not handle.torchprune_use_form(name.encode()):
        raise ValueError(f"the form {name!r} does not run here; {native()}")


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The compiled kernels, whose operators then take CPU tensors, or why there are none."""
    with _lock:
        if not _loaded:
            try:
                path = str(library())
                os.environ[_DEFINED] = str(os.getpid())  # it defines no operators then
                try:
                    torch.ops.load_library(path)
                finally:
                    del os.environ[_DEFINED]
                handle = ctypes.CDLL(path)
                handle.torchprune_form.restype = ctypes.c_char_p
                _loaded.append((handle, ""))
            except (BuildError, OSError, RuntimeError) as error:  # the last: no home directory
                _loaded.append((None, str(error)))
        return _loaded[0]


def _begin_anew() -> None:
    """In a child that was forked while another thread compiled: nobody is going to finish."""
    global _lock
    _lock = threading.Lock()


_DEFINED = "TORCHPRUNE_OPERATORS_DEFINED_IN"
_lock = threading.Lock()
os.register_at_fork(after_in_child=_begin_anew)
_loaded: list[tuple[ctypes.CDLL | None, str]] = []


# -- the operators in torch: for other devices, without a compiler, and to compile on first use ----


def _check_sizes(bits: Tensor, values: Tensor, starts: Tensor, cols: int) -> None:
    """As far as one can see without their data."""
    torch._check(
        bits.dtype == torch.int64 and bits.dim() == 2 and bits.shape[1] == -(-cols // _WORD),
        lambda: "torchprune: bits must be int64, (rows, ceil(cols / 64))",
    )
    torch._check(
        starts.dtype == torch.int32 and starts.dim() == 1 and len(starts) == len(bits) + 1,
        lambda: "torchprune: starts must be int32, (rows + 1,)",
    )
    torch._check(values.dim() == 1, lambda: "torchprune: values must be (nonzeros + slack,)")
    torch._check(
        bits.device == values.device == starts.device,
        lambda: "torchprune: bits, values and starts must be on one device",
    )


def _check_product(x: Tensor, bits: Tensor, values: Tensor, starts: Tensor, cols: int) -> None:
    torch._check(x.shape[-1] == cols, lambda: f"the input's last size must be {cols}")
    _check_sizes(bits, values, starts, cols)
    torch._check(
        x.device == bits.device,
        lambda: f"the input is on {x.device}, the packed weight on {bits.device}",
    )


def unpack_in_torch(bits: Tensor, values: Tensor, starts: Tensor, cols: int) -> Tensor:
    """What `bitmask_unpack` gives, for values of any dtype on any device.

    Raises:
        RuntimeError: the parts do not fit together.
    """
    _check_sizes(bits, values, starts, cols)
    flat = bits.contiguous().view(torch.uint8).reshape(-1)
    wide = unpack_bits(flat, (len(bits), _WORD * bits.shape[1]))
    ends = starts[1:].long()
    total = int(starts[-1])
    if (
        int(starts[0]) != 0
        or len(values) - total < _SLACK
        or not torch.equal(wide.sum(1).cumsum(0), ends)
        or bool(wide[:, cols:].any())
    ):
        raise RuntimeError(
            "torchprune: bits, values and starts of a packed weight contradict each other: they "
            "are parts of different weights, or damaged. Load or copy all of its parts together"
        )
    return unpack_values(values[:total], wide[:, :cols].contiguous())


def unpack_unseen(bits: Tensor, values: Tensor, starts: Tensor, cols: int) -> Tensor:
    """What `unpack_in_torch` gives, without a look at the data, for which a device would be waited.

    Rows whose bits and starts contradict each other come out as NaN, or as 0 in whole numbers.
    """
    _check_sizes(bits, values, starts, cols)
    flat = bits.contiguous().view(torch.uint8).reshape(-1)
    wide = traced_bits(flat, (len(bits), _WORD * bits.shape[1]))[:, :cols]
    count = wide.cumsum(1, dtype=torch.int32)
    first, end = starts[:-1, None], starts[1:, None]
    total = count[:, -1:] if cols else torch.zeros_like(first)
    broken = (first < 0) | (end > len(values)) | (end - first != total)
    place = (first + count - 1).clamp_(0, max(0, len(values) - 1)).reshape(-1)
    found = values.index_select(0, place).view(wide.shape)
    zero = values.new_zeros(())
    lost = values.new_full((), torch.nan) if values.is_floating_point() else zero
    return torch.where(broken, lost, torch.where(wide, found, zero))


def _unpack(bits: Tensor, values: Tensor, starts: Tensor, cols: int) -> Tensor:
    if bits.device.type == "cpu" and not _loaded and _load()[0]:
        found: Tensor = torch.ops.torchprune.bitmask_unpack(bits, values, starts, cols)
        return found
    return unpack_in_torch(bits, values, starts, cols)


def unpack_on_cuda(bits: Tensor, values: Tensor, starts: Tensor, cols: int) -> Tensor:
    """`bitmask_unpack` for CUDA tensors."""
    _check_sizes(bits, values, starts, cols)
    if launching.why_not(bits.device) or not launching.can_take(torch.float32, values, cols):
        return unpack_unseen(bits, values, starts, cols)
    return launching.unpacked(bits, values, starts, cols)


def _linear(
    x: Tensor,
    bits: Tensor,
    values: Tensor,
    starts: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    cols: int,
) -> Tensor:
    if x.device.type == "cpu" and not _loaded and _load()[0]:
        found: Tensor = torch.ops.torchprune.bitmask_linear(
            x, bits, values, starts, scales, bias, cols
        )
        return found
    return _multiplied(x, unpack_in_torch(bits, values, starts, cols), scales, bias)


def linear_on_cuda(
    x: Tensor,
    bits: Tensor,
    values: Tensor,
    starts: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    cols: int,
) -> Tensor:
    """`bitmask_linear` for CUDA tensors."""
    _check_product(x, bits, values, starts, cols)
    for name, part in (("scales", scales), ("the bias", bias)):
        torch._check(
            part is None or (part.shape == (len(bits),) and part.device == x.device),
            lambda name=name: f"torchprune: {name} must be (rows,), on the input's device",
        )
    if launching.why_not(x.device) or not launching.can_take(x.dtype, values, cols):
        return _multiplied(x, unpack_on_cuda(bits, values, starts, cols), scales, bias)
    return launching.product(x, bits, values, starts, scales, bias, cols)


def _multiplied(x: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None) -> Tensor:
    if scales is not None:
        weight = weight.float() * scales.float()[:, None]
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _fake_linear(
    x: Tensor,
    bits: Tensor,
    values: Tensor,
    starts: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    cols: int,
) -> Tensor:
    _check_product(x, bits, values, starts, cols)
    return x.new_empty((*x.shape[:-1], bits.shape[0]))


def _fake_unpack(bits: Tensor, values: Tensor, starts: Tensor, cols: int) -> Tensor:
    _check_sizes(bits, values, starts, cols)
    return values.new_empty((bits.shape[0], cols))


def _under_autocast(device: str) -> Callable[..., Tensor]:
    """As autocast treats a linear layer: the input is cast, and so the output; weights stay."""
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")
    keys = torch._C.DispatchKeySet(key)

    def run(x: Tensor, *rest: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            if x.is_floating_point() and x.dtype != torch.float64:
                x = x.to(torch.get_autocast_dtype(device))
            return torch.ops.torchprune.bitmask_linear(x, *rest)  # type: ignore[no-any-return]

    return run


LIBRARY.impl("bitmask_linear", _linear, "CompositeExplicitAutograd")
LIBRARY.impl("bitmask_unpack", _unpack, "CompositeExplicitAutograd")
LIBRARY.impl("bitmask_linear", linear_on_cuda, "CUDA")
LIBRARY.impl("bitmask_unpack", unpack_on_cuda, "CUDA")
LIBRARY._register_fake("bitmask_linear", _fake_linear)
LIBRARY._register_fake("bitmask_unpack", _fake_unpack)
for _device in ("cpu", "cuda"):
    LIBRARY.impl("bitmask_linear", _under_autocast(_device), f"Autocast{_device.upper()}")
