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
}
_MINIMAL_TORCH = "0x020a000000000000"  # the stable interface as of 2.10


class BuildError(Exception):
    """The kernels could not be compiled or kept; the message says why."""


def library() -> Path:
    """The compiled kernels, from the cache if they are there.

    `CXX` names another compiler, `TORCHPRUNE_CXXFLAGS` adds flags, `TORCHPRUNE_KERNELS` names
    another directory than the user's cache.

    Raises:
        BuildError: no compiler, one that fails, or no place to keep the result.
    """
    compiler = _compiler()
    extra = shlex.split(os.environ.get("TORCHPRUNE_CXXFLAGS", ""))
    target = _cache() / f"kernels-{_fingerprint(compiler, extra)}.so"
    if not target.exists():
        _compile(compiler, extra, target)
    return target


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


def _cache() -> Path:
    given = os.environ.get("TORCHPRUNE_KERNELS")
    base = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    folder = base if given else base / "torchprune"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"the cache {folder} cannot be made: {error.strerror}") from error
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        raise BuildError(f"the cache {folder} belongs to another user; code is not run from there")
    return folder


def _fingerprint(compiler: list[str], extra: list[str]) -> str:
    """Of all that the result depends on."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    digest = hashlib.sha256(version)
    parts = [*compiler, *extra, platform.machine(), sys.platform, torch.__version__, *_COMMON]
    digest.update(repr((parts, _UNITS, _MINIMAL_TORCH)).encode())
    for source in sorted(_SOURCES.glob("*.[ch]*")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: list[str], extra: list[str], target: Path) -> None:
    root = Path(torch.__file__).resolve().parent
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    units = {name: flags if x86 else [] for name, flags in _UNITS.items()}
    units["ops.cpp"] = [f"-DTORCH_TARGET_VERSION={_MINIMAL_TORCH}", "-isystem", f"{root}/include"]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [f"{folder}/{Path(name).stem}.o" for name in units]
        running = [
            subprocess.Popen(
                [*compiler, *_COMMON, *flags, *extra, "-c", str(_SOURCES / name), "-o", into],
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
        link = [*compiler, "-shared", *objects, *extra, f"-L{root}/lib", "-ltorch_cpu", "-o", made]
        linked = subprocess.run(link, capture_output=True, text=True, check=False)
        _check(linked.returncode, link, linked.stdout + linked.stderr)
        Path(made).replace(target)


def _check(code: int, command: object, output: str) -> None:
    if code:
        words = command if isinstance(command, list) else [str(command)]
        last = "\n".join(output.strip().splitlines()[-12:])
        raise BuildError(f"the compiler failed: {shlex.join(map(str, words))}\n{last}")
