"""The same calls on a CUDA device. Skipped, with a reason, where there is none."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES

import torchprune
from torchprune import MagnitudeSpec, SparseGPTSpec, WandaSpec
from torchprune.errors import LoweringError
from torchprune.lowering import few_rows
from torchprune.lowering.bitmask import Bitmask
from torchprune.specs.spec import Spec

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("method", [MagnitudeSpec, WandaSpec, SparseGPTSpec])
def test_masks_agree_with_the_cpu(method: type[Spec], pattern: str) -> None:
    family = FAMILIES["llama"]
    model, data, spec = family.make(), family.data(), method(pattern=pattern)
    other = copy.deepcopy(model).cuda()
    torchprune.sparsify(model, spec, data, progress=False)
    torchprune.sparsify(other, spec, data, progress=False)  # batches are moved to the model
    found = torchprune.masks(other)
    for name, mask in torchprune.masks(model).items():
        assert found[name].is_cuda
        assert float((found[name].cpu() == mask).float().mean()) > 0.99, name
    assert torchprune.report(other).zeros == torchprune.report(model).zeros


def test_a_failure_leaves_the_model_on_its_device_as_it_was() -> None:
    family = FAMILIES["llama"]
    model = family.make().cuda()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises((TypeError, ValueError)):  # which, is the transformers version's choice
        torchprune.sparsify(model, SparseGPTSpec(), [{"no_such_argument": 1}], progress=False)
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_semi_structured_layers_compute_what_dense_ones_do(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 128)
    )
    model = model.to("cuda", dtype)
    torchprune.fold(torchprune.sparsify(model, MagnitudeSpec(pattern="2:4"), progress=False))
    folded = copy.deepcopy(model)
    torchprune.lower(model, "semi_structured")
    for rows in (1, 8, 15, 16, 100):
        x = torch.randn(rows, 256, device="cuda", dtype=dtype)
        torch.testing.assert_close(model(x), folded(x), rtol=2e-2, atol=2e-2)
    if few_rows.has_kernels(torch.device("cuda")):  # else values do not lie as is expected of them
        assert isinstance(model[0], few_rows.SemiStructuredLinear)
        assert model[0].few_values.data_ptr() == model[0].weight.values().data_ptr()
    torchprune.lift(model)
    for name, tensor in folded.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


# -- bitmask products ------------------------------------------------------------------------------

OPS = torch.ops.torchprune
WIDE = [torch.float32, torch.float16, torch.bfloat16]


def bitmask(rows: int, cols: int, kind: torch.dtype) -> Bitmask:
    weight = torch.randn(rows, cols, device="cuda") * (torch.rand(rows, cols, device="cuda") < 0.5)
    if kind != torch.int8:
        return Bitmask.pack(weight.to(kind))
    scales = torch.rand(rows, device="cuda") + 0.1
    return Bitmask.pack((weight * 40).clamp(-127, 127).to(torch.int8), scales)


def product(x: torch.Tensor, it: Bitmask, bias: torch.Tensor | None = None) -> torch.Tensor:
    found: torch.Tensor = OPS.bitmask_linear(
        x, it.bits, it.values, it.starts, it.scales, bias, it.cols
    )
    return found


def lowered() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model of bitmask layers, and the dense one it was."""
    model = torch.nn.Sequential(
        torch.nn.Linear(320, 512), torch.nn.GELU(), torch.nn.Linear(512, 130)
    )
    model = model.to("cuda", torch.bfloat16)
    torchprune.fold(torchprune.sparsify(model, MagnitudeSpec(), progress=False))
    folded = copy.deepcopy(model)
    return torchprune.lower(model, "bitmask"), folded


def test_the_kernels_run_in_triton() -> None:
    found = torchprune.kernels.native("cuda")
    assert str(found).startswith("bitmask kernels: Triton for sm_"), str(found)


@pytest.mark.parametrize("wide", WIDE, ids=str)
@pytest.mark.parametrize("kind", [*WIDE, torch.int8], ids=str)
def test_bitmask_products_equal_float64(kind: torch.dtype, wide: torch.dtype) -> None:
    for rows, cols in [(1, 1), (67, 200), (300, 1024)]:
        it = bitmask(rows, cols, kind)
        assert torch.equal(it.unpack().cpu(), Bitmask.unpack(to_cpu(it)))
        weight, bias = it.unpack().double(), torch.randn(rows, device="cuda").to(wide)
        for batch in (1, 2, 3, 8, 16, 17, 100):
            x = torch.randn(batch, cols, device="cuda").to(wide)
            expected = x.double() @ weight.T + bias.double()
            size = x.double().abs() @ weight.abs().T + bias.double().abs()
            unit = torch.finfo(wide).eps
            rough = 4 * unit if batch > 16 else 4e-6
            room = expected.abs() * unit + size * rough + torch.finfo(wide).smallest_normal
            found = product(x, it, bias)
            assert found.dtype == wide
            assert bool(((found.double() - expected).abs() <= room).all()), (rows, cols, batch)


def to_cpu(it: Bitmask) -> Bitmask:
    scales = None if it.scales is None else it.scales.cpu()
    return Bitmask(it.bits.cpu(), it.values.cpu(), it.starts.cpu(), scales, it.cols)


@pytest.mark.parametrize("batch", [1, 4, 17])
def test_nothing_waits_for_the_device(batch: int) -> None:
    it, x = bitmask(67, 200, torch.bfloat16), torch.randn(batch, 200, device="cuda").bfloat16()
    product(x, it)
    torch.cuda.set_sync_debug_mode("error")
    try:
        product(x, it)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("batch", [1, 4, 17])
def test_damaged_rows_come_out_as_nan(batch: int) -> None:
    it, x = bitmask(67, 200, torch.bfloat16), torch.randn(batch, 200, device="cuda").bfloat16()
    whole = product(x, it)
    it.bits[5, 0] ^= 1
    it.starts[20] = 2**31 - 1
    found, lost = product(x, it), [5, 19, 20]
    assert bool(found[:, lost].isnan().all())
    found[:, lost] = whole[:, lost] = 0
    torch.testing.assert_close(found, whole)


def test_a_lowered_model_computes_learns_and_comes_back() -> None:
    model, folded = lowered()
    for rows in (1, 4, 40):
        x = torch.randn(rows, 320, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        y = x.detach().requires_grad_()
        model(x).square().sum().backward()
        folded(y).square().sum().backward()
        torch.testing.assert_close(model(x), folded(y), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(x.grad, y.grad, rtol=5e-2, atol=5e-2)
    with torch.autocast("cuda", dtype=torch.float16):
        assert model(x.float()).dtype == torch.float16
    damaged = copy.deepcopy(model)
    damaged[0].bits[0, 0] ^= 1
    with pytest.raises(LoweringError, match="contradict"):
        torchprune.lift(damaged)
    torchprune.lift(model)
    for name, tensor in folded.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_a_lowered_model_compiles_whole_and_is_captured(rows: int) -> None:
    model, _ = lowered()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(rows, 320, device="cuda", dtype=torch.bfloat16)
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(step(x).clone(), model(x), rtol=2e-2, atol=2e-2)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(out, model(x))
    assert torch._dynamo.utils.counters["inductor"].get("cudagraph_skips", 0) == 0
