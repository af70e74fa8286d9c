"""The same calls on a CUDA device. Skipped, with a reason, where there is none."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES

import torchprune
from torchprune import MagnitudeSpec, SparseGPTSpec, WandaSpec
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
    for rows in (1, 8, 100):
        x = torch.randn(rows, 256, device="cuda", dtype=dtype)
        torch.testing.assert_close(model(x), folded(x), rtol=2e-2, atol=2e-2)
    torchprune.lift(model)
    for name, tensor in folded.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
