"""CPU products with weights that are a bitmask and their packed nonzeros, at any sparsity.

Importing this file defines two operators that compile, export and autocast see through:

    torchprune::bitmask_linear(x, bits, values, starts, scales, bias, cols) -> Tensor
    torchprune::bitmask_unpack(bits, values, starts, cols) -> Tensor

`torchprune.lowering.bitmask.Bitmask` makes and explains their arguments. On CPU tensors they run in
C++ for AVX-512 (with VBMI2), AVX2 or any processor, whichever fits best, compiled when first used.
Where that fails, and for other devices, they unpack and multiply in torch: correct, slower than
dense.
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

from torchprune.lowering.kernels.build import BuildError, library
from torchprune.masking.packing import unpack_bits, unpack_values

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
    """The kernels on this machine.

    Attributes:
        form: "AVX-512", "AVX2" or "portable"; None if the operators run in torch.
        why: the reason for None, else empty.
    """

    form: str | None
    why: str = ""

    def __str__(self) -> str:
        if self.form is None:
            return f"bitmask kernels: slower, in torch, because {self.why}"
        slow = "; slow: this processor has neither AVX2 nor AVX-512 with VBMI2"
        return f"bitmask kernels: C++ for {self.form}" + (slow if self.form == "portable" else "")


def native() -> Native:
    """What the operators run on for CPU tensors. The first call compiles the kernels."""
    handle, why = _load()
    return Native(None, why) if handle is None else Native(handle.torchprune_form().decode())


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


def _unpack(bits: Tensor, values: Tensor, starts: Tensor, cols: int) -> Tensor:
    if bits.device.type == "cpu" and not _loaded and _load()[0]:
        found: Tensor = torch.ops.torchprune.bitmask_unpack(bits, values, starts, cols)
        return found
    return unpack_in_torch(bits, values, starts, cols)


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
    weight = unpack_in_torch(bits, values, starts, cols)
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
    torch._check(x.shape[-1] == cols, lambda: f"the input's last size must be {cols}")
    _check_sizes(bits, values, starts, cols)
    torch._check(
        x.device == bits.device,
        lambda: f"the input is on {x.device}, the packed weight on {bits.device}",
    )
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
LIBRARY._register_fake("bitmask_linear", _fake_linear)
LIBRARY._register_fake("bitmask_unpack", _fake_unpack)
for _device in ("cpu", "cuda"):
    LIBRARY.impl("bitmask_linear", _under_autocast(_device), f"Autocast{_device.upper()}")
