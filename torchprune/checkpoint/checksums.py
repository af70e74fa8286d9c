"""Checksums of what is written, so that damage is noticed when it is read.

CRC-32 as in zip and gzip files: it finds every flipped bit and every run of damage of up to 32
bits, and misses other damage once in four thousand million times. A processor does some 4 GB of it
in a second. It is no protection against somebody who means harm: what files say is checked besides.
"""

from __future__ import annotations

import ctypes
import json
import zlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def checksum(parts: Iterable[bytes | memoryview]) -> str:
    """Eight hexadecimal digits for these bytes in this order."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return f"{value:08x}"


def of_tensors(tensors: Iterable[Tensor]) -> str:
    """The checksum of the values of contiguous tensors on the CPU, one after the other."""
    return checksum(memory_of(tensor) for tensor in tensors)


def of_content(data: dict[str, Any]) -> str:
    """The checksum of a JSON object's content, however it is spaced and ordered in its file."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return checksum([text.encode()])


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, in place: good while the tensor lives."""
    if tensor.numel() == 0:
        return memoryview(b"")
    buffer = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(buffer).cast("B")
