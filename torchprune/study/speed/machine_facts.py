"""What was measured on: processor, instructions, threads, versions, the date."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from torchprune.lowering.kernels import operators

_TOLD = ("avx2", "avx512_f", "avx512_vbmi2", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_PACKAGES = ("torch", "torchprune", "torchao", "onnxruntime", "openvino", "transformers")


def machine_facts(device: torch.device) -> dict[str, str]:
    """Facts by name, as text; what cannot be found out is left out."""
    found = {
        "processor": processor_name(),
        "instruction sets": ", ".join(instruction_sets()) or "unknown",
        "torch's kernels": torch.backends.cpu.get_cpu_capability(),
        "torchprune's kernels": str(operators.native()),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "device": str(device),
    }
    if device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(device)
        found["CUDA"] = str(torch.version.cuda)
    if hasattr(os, "getloadavg"):
        found["load before"] = f"{os.getloadavg()[0]:.1f} processes"
    found["system"] = f"{platform.system()} {platform.machine()}"
    found["Python"] = platform.python_version()
    found |= {name: number for name in _PACKAGES if (number := _version(name))}
    found["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return found


def processor_name() -> str:
    """As the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [y.partition(":")[2].strip() for y in lines if y.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine() or "unknown")


def instruction_sets() -> list[str]:
    """Those that products of matrices use, as torch finds them; none where it does not tell."""
    ask: Any = getattr(torch.cpu, "get_capabilities", None)
    known = ask() if callable(ask) else {}
    return [name for name in _TOLD if known.get(name)]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
