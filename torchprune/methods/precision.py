"""Whether bfloat16 is worth while on a device, which its instructions alone do not tell."""

from __future__ import annotations

import time
from functools import cache

import torch

_PAYS = 1.2
"""How many times faster products must be: casts of weights and activations come on top."""


def pays_in_bfloat16(device: torch.device) -> bool:
    """Whether training in mixed precision is faster than in float32.

    A processor with AVX-512's bfloat16 but no AMX may multiply half as fast as in float32 (seen on
    an Intel Xeon), or twice as fast (AMD's Zen 4). So there it is tried, for some milliseconds.
    """
    if not has_bfloat16(device):
        return False
    return device.type != "cpu" or _is_faster_here()


@cache
def _is_faster_here() -> bool:
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        tries = []
        for _ in range(4):
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            tries.append(time.perf_counter() - start)
        seconds[dtype] = min(tries)
    return seconds[torch.float32] > _PAYS * seconds[torch.bfloat16]


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 by instructions of its own."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        able: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in 2.10
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return False
