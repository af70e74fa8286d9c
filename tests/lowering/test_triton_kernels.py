"""The Triton kernels without a GPU: interpreted, compiled for GPUs, and traced on fake ones.

What a GPU must show is in `tests/test_gpu.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from torchprune.lowering.bitmask import Bitmask
from torchprune.lowering.kernels import launching, operators
from torchprune.lowering.kernels.launching import Tiles

HERE = Path(__file__).parent
OPS = torch.ops.torchprune
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_under_tritons_interpreter_the_kernels_are_right() -> None:
    plain = ("-p", "no:cacheprovider")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(HERE / "interpreted_triton.py"), *plain],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-5000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


# -- compiled for devices that are not here -------------------------------------------------------

INTS = ("batch", "rows", "cols", "per_row", "size", "parts")


def compiled(name: str, capability: int, tiles: Tiles, values: str = "bf16") -> Any:
    """A kernel for a device of a compute capability, as `launching` would have it compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(launching.kernels(), name)
    fixed = {"ROWS": tiles.rows, "WORDS": tiles.words, "BATCH": tiles.batch, "bias_ptr": None}
    fixed["STEPS"] = tiles.steps
    if values != "i8":
        fixed["scales_ptr"] = None
    kinds = {"bits_ptr": "i32", "values_ptr": values, "starts_ptr": "i32", "scales_ptr": "fp32"}
    kinds["parts_ptr"] = "fp32"
    signature, constants, aligned = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in fixed:
            signature[argument], constants[(i,)] = "constexpr", fixed[argument]
        else:
            kind = (
                "fp32"
                if argument == "out_ptr" and name == "by_blocks"
                else kinds.get(argument, "bf16")
            )
            signature[argument] = "i32" if argument in INTS else f"*{kind}"
            if argument not in ("batch", "size"):
                aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": tiles.warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


CASES = {
    "one row": ("sums_apiece", launching.tiles_for(1, 4096, blocks=False), "bf16"),
    "four rows": ("sums_apiece", launching.tiles_for(4, 4096, blocks=False), "bf16"),
    "blocks": ("by_blocks", launching.tiles_for(16, 4096, blocks=True), "bf16"),
    "blocks of int8": ("by_blocks", launching.tiles_for(16, 1024, blocks=True), "i8"),
    "blocks joined": ("joined", Tiles(launching._JOINED, 1, 4), "bf16"),
    "unpacking": ("unpacked", launching.UNPACKING, "bf16"),
}


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles nothing")
@pytest.mark.parametrize(("case", "capability"), [*((case, 90) for case in CASES), ("blocks", 80)])
def test_they_compile_to_what_they_were_written_for(
    case: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name, tiles, values = CASES[case]
    found = compiled(name, capability, tiles, values)
    text = found.asm["ptx"]
    assert ("popc.b32" in text) == (name != "joined")  # counting bits is one instruction
    assert ("mma.sync" in text) == (name == "by_blocks")
    assert found.metadata.shared <= 48 * 1024
    (tmp_path / "it.cubin").write_bytes(found.asm["cubin"])
    import triton

    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(dump), "-res-usage", str(tmp_path / "it.cubin")]
    used = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "STACK:0 " in used.stdout + used.stderr  # no register is spilled


# -- on fake devices ------------------------------------------------------------------------------


def fake(
    rows: int, cols: int, dtype: torch.dtype, device: str = "cuda"
) -> tuple[Tensor, Tensor, Tensor]:
    words = -(-cols // 64)
    bits = torch.empty(rows, words, dtype=torch.int64, device=device)
    values = torch.empty(rows * cols + 64, dtype=dtype, device=device)
    return bits, values, torch.empty(rows + 1, dtype=torch.int32, device=device)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would be launched, without a device and without triton."""
    names: list[str] = []

    class Kernels:
        def __getattr__(self, name: str) -> str:
            return name

    monkeypatch.setattr(launching, "kernels", Kernels)
    monkeypatch.setattr(launching, "_run", lambda name, *given, **fixed: names.append(name))
    monkeypatch.setattr(launching, "why_not", lambda device: "")
    return names


@pytest.mark.parametrize(
    ("batch", "x", "values", "kernel"),
    [
        (1, torch.bfloat16, torch.bfloat16, "sums_apiece"),
        (2, torch.float16, torch.int8, "sums_apiece"),
        (3, torch.bfloat16, torch.bfloat16, "by_blocks joined"),
        (16, torch.float16, torch.int8, "by_blocks joined"),
        (16, torch.bfloat16, torch.float16, "sums_apiece"),
        (16, torch.float32, torch.float32, "sums_apiece"),
        (17, torch.bfloat16, torch.bfloat16, "unpacked"),
        (4, torch.float64, torch.float32, "unpacked"),
    ],
)
def test_rows_and_dtypes_choose_the_kernel_and_nothing_waits(
    batch: int, x: torch.dtype, values: torch.dtype, kernel: str, launched: list[str]
) -> None:
    """Fake tensors have no data, so that whatever looked at some would raise."""
    with FakeTensorMode():
        parts = fake(130, 70, values)
        scales = torch.empty(130, device="cuda") if values == torch.int8 else None
        bias = torch.empty(130, dtype=x, device="cuda")
        found = operators.linear_on_cuda(
            torch.empty(1, batch, 70, dtype=x, device="cuda"), *parts, scales, bias, 70
        )
        assert (found.shape, found.dtype) == ((1, batch, 130), x)
        assert found.device.type == "cuda"
    assert launched == kernel.split()


@pytest.mark.parametrize("values", [torch.bfloat16, torch.int8], ids=str)
def test_without_triton_nothing_waits_either(
    values: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a fake CPU, since a torch without CUDA takes no slices of its fake tensors."""
    monkeypatch.setattr(launching, "why_not", lambda device: "there is none")
    with FakeTensorMode():
        x, scales = torch.empty(3, 70, dtype=torch.bfloat16), torch.empty(130)
        parts = fake(130, 70, values, "cpu")
        some = scales if values == torch.int8 else None
        found = operators.linear_on_cuda(x, *parts, some, None, 70)
        assert (found.shape, found.dtype) == ((3, 130), torch.bfloat16)
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            int(parts[2][-1])  # what a look at the data is


def test_the_operators_stay_whole_on_a_fake_device() -> None:
    """Gradients wait for a real one: torch without CUDA aborts at them."""
    with FakeTensorMode(), torch.no_grad():
        parts = fake(130, 70, torch.bfloat16)
        x = torch.empty(2, 3, 70, dtype=torch.bfloat16, device="cuda")
        found = OPS.bitmask_linear(x, *parts, None, None, 70)
        assert (found.shape, found.device.type) == ((2, 3, 130), "cuda")
        back = OPS.bitmask_unpack(*parts, 70)
        assert (back.shape, back.dtype, back.device.type) == ((130, 70), torch.bfloat16, "cuda")


@pytest.mark.parametrize("part", ["scales", "bias"])
def test_sizes_that_would_be_read_past_are_refused(part: str, launched: list[str]) -> None:
    with FakeTensorMode():
        x, parts = torch.empty(1, 70, device="cuda"), fake(130, 70, torch.float32)
        short = torch.empty(129, device="cuda")
        given = (short, None) if part == "scales" else (None, short)
        with pytest.raises(RuntimeError, match=f"{part} must be"):
            operators.linear_on_cuda(x, *parts, *given, 70)
    assert not launched


# -- without triton, and what is said of it -------------------------------------------------------


def test_the_torch_path_loses_only_what_is_damaged() -> None:
    weight = torch.randn(5, 130) * (torch.rand(5, 130) < 0.5)
    it = Bitmask.pack(weight)
    assert torch.equal(operators.unpack_unseen(it.bits, it.values, it.starts, 130), weight)
    it.bits[2, 0] ^= 1
    found = operators.unpack_unseen(it.bits, it.values, it.starts, 130)
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3, 4]], weight[[0, 1, 3, 4]])


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "no device": ({"torch.cuda.is_available": lambda: False}, "torch finds no CUDA device"),
    "AMD": ({"torch.version.hip": "7.0"}, "not been tried on AMD"),
    "absent": ({"find_spec": lambda name: None}, "triton is not installed: pip install triton"),
    "old": ({"capability": (7, 5)}, "sm_75 is older than what Triton supports"),
    "broken": ({"kernels": lambda: 1 / 0}, "triton does not work: division by zero"),
    "none": ({}, ""),
}


@pytest.mark.parametrize("why", REASONS)
def test_the_reason_for_torch_is_said(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, words = REASONS[why]
    here: dict[str, Any] = {
        "torch.cuda.is_available": lambda: True,
        "torch.version.hip": None,
        "find_spec": lambda name: name,
        "capability": (9, 0),
        "kernels": lambda: None,
        **changes,
    }
    monkeypatch.setattr(torch.cuda, "is_available", here["torch.cuda.is_available"])
    monkeypatch.setattr(torch.version, "hip", here["torch.version.hip"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: here["capability"])
    monkeypatch.setattr(launching, "find_spec", here["find_spec"])
    monkeypatch.setattr(launching, "kernels", here["kernels"])
    launching.why_not.cache_clear()
    try:
        found = operators.native("cuda")
    finally:
        launching.why_not.cache_clear()
    if words:
        assert str(found).startswith("bitmask kernels: slower, in torch, because ")
        assert words in str(found)
        assert found.form is None
    else:
        assert str(found) == "bitmask kernels: Triton for sm_90"
    other = operators.native("meta")
    assert "for CUDA devices, not for meta" in str(other)
