"""Every family of models, from end to end: exact zeros, finite outputs, the laws."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from families import FAMILIES, Family
from saved import output

import torchprune
from torchprune import MagnitudeSpec, SparseGPTSpec, WandaSpec
from torchprune.masking.targets import make_plan
from torchprune.specs.patterns import prune_count
from torchprune.specs.spec import Spec
from torchprune.testing import assert_sparsity, check_laws

METHODS = {"wanda": WandaSpec, "sparsegpt": SparseGPTSpec}
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.fixture(autouse=True)
def _unreached() -> Iterator[None]:
    """torch's attention multiplies by its output layer's weight without calling the layer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*out_proj: no calibration batch reached it")
        yield


def check_pruned(family: Family, spec: Spec, dtype: torch.dtype) -> None:
    model, data = family.make(dtype), family.data(dtype)
    chosen = {target.layer.key for target in make_plan(model, spec).targets}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torchprune.sparsify(model, spec, data, progress=False)
    assert set(torchprune.masks(model)) == chosen
    assert_sparsity(model, spec.goal.pattern, spec.goal.sparsity, scope=spec.scope)
    masked = output(model, data[0])
    assert masked.isfinite().all()
    torchprune.fold(model)
    assert_sparsity(
        model, spec.goal.pattern, spec.goal.sparsity, scope=spec.scope, exact=dtype == torch.float32
    )
    assert torch.equal(output(model, data[0]), masked)
    after = model.state_dict()
    assert list(after) == list(before)
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        assert key in chosen or torch.equal(after[key], value), f"{key} is no target but changed"


@families
@methods
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_every_family_prunes_exactly(family: Family, method: type[Spec], pattern: str) -> None:
    check_pruned(family, method(pattern=pattern), torch.float32)


@pytest.mark.parametrize("name", ["llama", "vit", "resnet"])
@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_half_precision_prunes_exactly(
    name: str, method: type[Spec], dtype: torch.dtype, pattern: str
) -> None:
    check_pruned(FAMILIES[name], method(pattern=pattern), dtype)


@families
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_odd_shares_are_met_to_the_weight(family: Family, scope: str) -> None:
    model = family.make()
    torchprune.sparsify(model, MagnitudeSpec(0.37, scope=scope))
    assert_sparsity(model, "unstructured", 0.37, scope=scope)
    report = torchprune.report(model)
    if scope == "global":
        assert report.zeros == prune_count(report.size, 0.37)


@families
@pytest.mark.parametrize("pattern", ["block:4x4", "1:4"])
def test_other_patterns_by_magnitude(family: Family, pattern: str) -> None:
    model = family.make()
    spec = MagnitudeSpec(pattern=pattern, ignore=["re:.*shared_expert_gate"] * moe(family))
    torchprune.sparsify(model, spec)
    assert_sparsity(model, pattern)


def moe(family: Family) -> int:
    """Qwen2-MoE has a layer of a single row, which no tile of four rows fits."""
    return int(family.name == "qwen2_moe")


@pytest.mark.parametrize("name", [f.name for f in FAMILIES.values() if f.generates])
def test_generation_works_masked_and_folded(name: str) -> None:
    family = FAMILIES[name]
    model, data = family.make(), family.data()
    torchprune.sparsify(model, WandaSpec(pattern="2:4"), data, progress=False)
    prompt = data[0]["input_ids"] if isinstance(data[0], dict) else data[0]
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
    }
    masked = model.generate(prompt, **options)
    assert masked.shape[1] >= 6
    assert torch.equal(torchprune.fold(model).generate(prompt, **options), masked)


@families
def test_pruned_weights_make_other_outputs(family: Family) -> None:
    """So that the tests above compare something: calibrated pruning acts, and beats chance."""
    model, data = family.make(), family.data()
    dense = output(model, data[0])
    torchprune.sparsify(model, WandaSpec(0.9), data, progress=False)
    pruned = output(model, data[0])
    assert not torch.equal(dense, pruned)


# -- the laws -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("llama", SparseGPTSpec(pattern="2:4")),
        ("llama", WandaSpec(0.57, scope="global")),
        ("gpt2", WandaSpec(0.6, sequential="block")),
        ("mixtral", WandaSpec(pattern="4:8")),
        ("t5", SparseGPTSpec(0.3, scope="row", sequential="layer")),
        ("vit", MagnitudeSpec(pattern="block:4x4")),
        ("resnet", SparseGPTSpec(0.5, sequential="none")),
        ("torch_encoder", WandaSpec(pattern="2:4")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.method,
)
def test_the_laws_hold(name: str, spec: Spec) -> None:
    family = FAMILIES[name]
    check_laws(family.make, spec, family.data(count=2))
