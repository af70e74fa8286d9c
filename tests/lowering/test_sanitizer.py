"""The kernels' own tests again, compiled with the address and undefined behaviour sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SANITIZE = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
CHOSEN = "every_output or unpacking or int8_products or does_not_know"
HOSTILE = "operators_refuse or random_parts or no_columns"


def runtime(name: str) -> Path | None:
    """The sanitizer's library, which must be loaded before all others."""
    compiler = shutil.which("g++")
    if compiler is None:
        return None
    command = [compiler, f"-print-file-name={name}"]
    found = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return found if found.is_absolute() and found.exists() else None


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def sanitized(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    libraries = [runtime("libasan.so"), runtime("libubsan.so")]
    if None in libraries:
        pytest.skip("g++ with libasan and libubsan is not here")
    environment = {
        **os.environ,
        "TORCHPRUNE_KERNELS": str(cache),
        "TORCHPRUNE_CXXFLAGS": SANITIZE,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch leave much to the end of the process
        "LD_PRELOAD": ":".join(map(str, libraries)),
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_kernels_read_and_write_only_what_is_theirs(cache: Path) -> None:
    run = sanitized(
        cache, "-m", "pytest", "-q", "-x", "tests/lowering/test_kernels.py", "-k", CHOSEN
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    assert " passed" in run.stdout


def test_parts_that_contradict_each_other_are_read_no_further(cache: Path) -> None:
    run = sanitized(
        cache, "-m", "pytest", "-q", "-x", "tests/lowering/test_contradictions.py", "-k", HOSTILE
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    assert " passed" in run.stdout


BEYOND = """
import ctypes, torch
from torchprune.lowering.kernels import operators as kernels
from torchprune.lowering.bitmask import Bitmask
packed = Bitmask.pack(torch.ones(4, 64))
kernels.native()
place = ctypes.CDLL(None).malloc
place.restype = ctypes.c_void_p
claimed = packed.values.nbytes  # of which half is there
storage = torch._C._construct_storage_from_data_pointer(
    place(claimed // 2), torch.device("cpu"), claimed
)
values = torch.empty(0).set_(storage, 0, packed.values.shape)
torch.ops.torchprune.bitmask_unpack(packed.bits, values, packed.starts, 64)
"""


def test_the_sanitizer_would_notice(cache: Path) -> None:
    run = sanitized(cache, "-c", BEYOND)
    assert run.returncode != 0
    assert "AddressSanitizer" in run.stderr, run.stderr[-2000:]
