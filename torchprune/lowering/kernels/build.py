"""Compile the CPU kernels with the system's compiler, once, and keep them in the user's cache."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

_SOURCES = Path(__file__).resolve().parent
_COMMON = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden"]
_X86 = ["-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vbmi2", *_X86]
_UNITS = {
    "portable.cpp": [],
    "avx2.cpp": ["-mavx2", *_X86],
    "avx512.cpp": _AVX512,
    "avx512_bf16.cpp": [*_AVX512, "-mavx512bf16", "-mavx512vnni"],
    "product.cpp": [],
}
_OPERATORS = {"kernels": "ops.cpp", "onnxruntime": "onnx_ops.cpp"}
"""What a library is called that lets torch, or ONNX Runtime, call the kernels: and by what."""
_HERE = platform.machine().lower()
_SEAL = b"torchprune kernels, sha256: "
_MINIMAL_TORCH = "0x020a000000000000"  # the stable interface as of 2.10


class BuildError(Exception):
    """The kernels could not be compiled or kept; the message says why."""


def library(folder: Path | None = None, machine: str | None = None) -> Path:
    """The compiled kernels, from the cache if they are there: no compiler is needed then.

    One file serves every processor of a machine's kind, and every torch from 2.10 on. `CXX` names
    another compiler, `TORCHPRUNE_CXXFLAGS` adds flags, `TORCHPRUNE_KERNELS` names another directory
    than the user's cache.

    Args:
        folder: in place of the cache; made if it is not there.
        machine: the kind of machine, as `platform.machine()` calls it; this one by default. For
            another `CXX` has to be a compiler that makes code for it.

    Raises:
        BuildError: none is there and it cannot be made: no compiler, one that fails, or no place to
            keep the result.
    """
    return _library("kernels", folder, machine)


def onnx_library(folder: Path | None = None, machine: str | None = None) -> Path:
    """The same kernels as operators of ONNX Runtime, for any from 1.17 on; torch is not in it.

    See `library` for arguments and errors.
    """
    return _library("onnxruntime", folder, machine)


def _library(name: str, folder: Path | None, machine: str | None) -> Path:
    extra = shlex.split(os.environ.get("TORCHPRUNE_CXXFLAGS", ""))
    machine = (machine or platform.machine()).lower()
    target = _cache(folder) / f"{name}-{machine}-{_fingerprint(extra, machine)}.so"
    damage = _damage(target)
    if damage is None:
        return target
    try:
        _compile(_compiler(), extra, target, machine, _OPERATORS[name])
    except BuildError as error:
        raise BuildError(f"{damage}, and {error}" if target.exists() else str(error)) from None
    return target


def is_library(path: Path) -> bool:
    """Whether a file is a library that was made here, whole."""
    return path.is_file() and _damage(path) is None


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise BuildError(f"CXX names {named[0]!r}, which is not there")
        return named
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise BuildError("no C++ compiler was found (c++, g++ or clang++; CXX names another)")


def _cache(folder: Path | None) -> Path:
    given = folder or os.environ.get("TORCHPRUNE_KERNELS")
    base = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    folder = base if given else base / "torchprune"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"the cache {folder} cannot be made: {error.strerror}") from error
    # Root's is as good: who does not trust root has lost, and images are built by it.
    if hasattr(os, "getuid") and folder.stat().st_uid not in (0, os.getuid()):
        raise BuildError(f"the cache {folder} belongs to another user; code is not run from there")
    return folder


def _fingerprint(extra: list[str], machine: str) -> str:
    """Of what the result is to be, whichever compiler makes it."""
    digest = hashlib.sha256(repr((extra, machine, sys.platform)).encode())
    digest.update(repr((_COMMON, _UNITS, _MINIMAL_TORCH)).encode())
    for source in sorted(_SOURCES.glob("*.[ch]*")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _seal(path: Path) -> None:
    """Write a checksum behind a library, where loaders do not look."""
    with path.open("r+b") as file:
        digest = hashlib.sha256(file.read()).digest()
        file.write(_SEAL + digest)
        file.flush()
        os.fsync(file.fileno())


def _damage(path: Path) -> str | None:
    """Why a library is not to be loaded, which would end the process, or None."""
    try:
        held = path.read_bytes()
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    size = len(_SEAL) + hashlib.sha256().digest_size
    body, seal = held[:-size], held[-size:]
    if seal != _SEAL + hashlib.sha256(body).digest():
        return f"{path} is damaged: it is not what was written"
    return None


def _compile(
    compiler: list[str], extra: list[str], target: Path, machine: str, operators: str
) -> None:
    root = Path(torch.__file__).resolve().parent
    x86 = machine in ("x86_64", "amd64")
    units = {name: flags if x86 else [] for name, flags in _UNITS.items()}
    units[operators] = [f"-DTORCH_TARGET_VERSION={_MINIMAL_TORCH}"]
    headers = ["-isystem", f"{root}/include"]
    with _beside(target) as folder:
        objects = [f"{folder}/{Path(name).stem}.o" for name in units]
        running = [
            subprocess.Popen(
                [
                    *compiler,
                    *_COMMON,
                    *headers,
                    *flags,
                    *extra,
                    "-c",
                    str(_SOURCES / name),
                    "-o",
                    into,
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for (name, flags), into in zip(units.items(), objects, strict=True)
        ]
        said = [process.communicate()[0] for process in running]
        for process, output in zip(running, said, strict=True):
            _check(process.returncode, process.args, output)
        made = f"{folder}/{target.name}"
        # Of another machine there is no torch here to link with; whoever loads it has one.
        torch_here = machine == _HERE and operators == _OPERATORS["kernels"]
        libraries = [f"-L{root}/lib", "-ltorch_cpu"] if torch_here else []
        link = [*compiler, "-shared", *objects, *extra, *libraries, "-o", made]
        linked = subprocess.run(link, capture_output=True, text=True, check=False)
        _check(linked.returncode, link, linked.stdout + linked.stderr)
        _seal(Path(made))
        Path(made).replace(target)


def _beside(target: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(dir=target.parent)
    except OSError as error:
        raise BuildError(f"nothing can be written to {target.parent}: {error.strerror}") from error


def _check(code: int, command: object, output: str) -> None:
    if code:
        words = command if isinstance(command, list) else [str(command)]
        last = "\n".join(output.strip().splitlines()[-12:])
        raise BuildError(f"the compiler failed: {shlex.join(map(str, words))}\n{last}")
