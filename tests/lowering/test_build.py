"""Compiled kernels on the disk: found without a compiler, never loaded damaged, built ahead."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import complaint, worked

from torchprune.lowering.kernels.build import BuildError, library

COMPILER = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
{wait}
printf 'some code' > "$2"
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Has a stand-in compile, or nothing; gives the cache."""

    def use(wait: str = "", *, there: bool = True) -> Path:
        script = tmp_path / "compiler"
        script.write_text(COMPILER.replace("{wait}", wait))
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script) if there else "no-such-compiler")
        monkeypatch.setenv("TORCHPRUNE_KERNELS", str(tmp_path / "cache"))
        return tmp_path / "cache"

    return use


@pytest.mark.parametrize("readable", [True, False], ids=["written by me", "read only"])
def test_what_is_built_is_found_where_there_is_no_compiler(
    compiler: Callable[..., Path], readable: bool
) -> None:
    cache = compiler()
    built = library()
    assert [path.name for path in cache.iterdir()] == [built.name]
    if not readable:
        built.chmod(0o444)
        cache.chmod(0o555)
    compiler(there=False)
    assert library() == built
    cache.chmod(0o755)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda held: held[: len(held) // 2],
    "empty": lambda held: b"",
    "one bit": lambda held: bytes([held[0] ^ 1]) + held[1:],
    "longer": lambda held: held + b"\0",
    "zeros at the end": lambda held: held[:-20] + bytes(20),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_anew_or_refused(compiler: Callable[..., Path], damage: str) -> None:
    compiler()
    built = library()
    whole = built.read_bytes()
    built.write_bytes(DAMAGES[damage](whole))
    compiler(there=False)
    with pytest.raises(BuildError, match=r"is damaged.*CXX names 'no-such-compiler'"):
        library()
    compiler()
    assert library() == built
    assert built.read_bytes() == whole


def test_other_flags_and_other_machines_have_files_of_their_own(
    compiler: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = compiler()
    found = {library(), library(machine="riscv64"), library(machine="RISCV64")}
    monkeypatch.setenv("TORCHPRUNE_CXXFLAGS", "-g")
    found |= {library(), library(cache / "deeper")}
    assert len(found) == 4
    assert {path.parent for path in found} == {cache, cache / "deeper"}


FORKED = """
import os, threading, time
from torchprune.lowering.kernels import operators
threading.Thread(target=operators.native, daemon=True).start()
while not operators._lock.locked():
    time.sleep(0.01)
child = os.fork()
if child == 0:
    os.environ["CXX"] = "no-such-compiler"
    assert "no-such-compiler" in str(operators.native())
    os._exit(7)
until = time.time() + 20
while time.time() < until:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        print("child", os.waitstatus_to_exitcode(status), operators._lock.locked())
        os._exit(0)
    time.sleep(0.05)
os.kill(child, 9)
print("hangs")
os._exit(0)
"""


def test_a_child_forked_while_a_thread_compiles_does_not_wait_for_it(
    compiler: Callable[..., Path],
) -> None:
    compiler("sleep 30")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "child 7 True", done.stderr


LIBRARY_FIRST = """
import glob, torch
path, = glob.glob({pattern!r})
{first}
{second}
x, op = torch.ones(1, 2), torch.ops.torchprune.bitmask_unpack
bits, starts = torch.tensor([[3]]), torch.tensor([0, 2], dtype=torch.int32)
print(op(bits, torch.arange(66.0), starts, 2).tolist(), op.default._schema.name)
"""


@pytest.mark.parametrize(
    "order", [["library"], ["library", "python"], ["python", "library"]], ids=str
)
def test_the_library_defines_its_operators_where_python_does_not(order: list[str]) -> None:
    words = {
        "library": "torch.ops.load_library(path)",
        "python": "import torchprune.lowering.lower",
    }
    words["python"] += "; torchprune.kernels.native()" if order[0] == "python" else ""
    first, second = [words[word] for word in order] + [""] * (2 - len(order))
    code = LIBRARY_FIRST.format(pattern=str(library()), first=first, second=second)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[[0.0, 1.0]] torchprune::bitmask_unpack", done.stderr


def test_the_command_builds_into_a_folder(compiler: Callable[..., Path], tmp_path: Path) -> None:
    compiler()
    folder = tmp_path / "image"
    told = json.loads(worked("build-kernels", "--output", folder, "--machine", "aarch64", "--json"))
    (path,) = folder.iterdir()
    assert told == {"path": str(path), "bytes": path.stat().st_size, "machine": "aarch64"}
    words = ("--output", folder, "--machine", "aarch64", "--onnxruntime", "--json")
    other = Path(json.loads(worked("build-kernels", *words))["path"])
    assert other in folder.iterdir()
    assert other.name.startswith("onnxruntime-aarch64-")
    compiler(there=False)
    said = complaint("build-kernels", "--output", tmp_path / "other")
    assert "CXX names 'no-such-compiler'" in said
    assert not list((tmp_path / "other").iterdir())
