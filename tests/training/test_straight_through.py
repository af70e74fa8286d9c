"""Masks under which weights go on learning: gradients against float64, files, what folds."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import torchprune
from torchprune import MagnitudeSpec, Pruner
from torchprune.errors import MaskError, SpecError
from torchprune.masking.mask import masked_layers, original_of
from torchprune.training import Constant, OneShot, StraightThrough


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))


def learning(model: nn.Module, decay: float = 2e-4, **schedule: int) -> Pruner:
    spec = MagnitudeSpec(pattern="2:4")
    return Pruner(model, spec, Constant(0.5, **schedule), regrow=StraightThrough(decay))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.integers(0, 99),
)
def test_gradients_pass_the_mask(dtype: torch.dtype, compiled: bool, seed: int) -> None:
    model = net().to(dtype)
    learning(model)
    torch.manual_seed(seed)
    x, out = torch.randn(4, 8).to(dtype), torch.randn(4, 12).to(dtype)
    layer = torch.compile(model[0], backend="eager") if compiled and seed < 5 else model[0]
    layer(x).backward(out)
    keep = torchprune.masks(model)["0.weight"]
    got = dense(model).grad.double()
    wanted = out.double().T @ x.double()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert torch.allclose(got, wanted, rtol=tolerance, atol=4 * tolerance)
    assert bool((got[~keep] != 0).any())


def dense(model: nn.Module) -> torch.Tensor:
    return model[0].parametrizations.weight.original  # type: ignore[no-any-return]


@pytest.mark.parametrize("manner", ["plain", "accumulated", "scaled", "closure", "closure by name"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_pruned_weights_decay_once_a_step(decay: float, manner: str) -> None:
    """Whatever the gradient is the sum of, and whatever it was multiplied by meanwhile."""
    model = net()
    pruner = learning(model, decay)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 8)
    before, keep = dense(model).detach().clone(), torchprune.masks(model)["0.weight"]
    [gradient] = torch.autograd.grad(model(x).square().mean(), [dense(model)])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss  # type: ignore[no-any-return]

    if manner == "closure":
        assert optimizer.step(closure).item() > 0
    elif manner == "closure by name":
        optimizer.step(closure=closure)
    elif manner == "scaled":
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
    else:
        for _ in range(4 if manner == "accumulated" else 1):
            (model(x).square().mean() / (4 if manner == "accumulated" else 1)).backward()
        optimizer.step()
    wanted = before - 0.1 * (gradient + decay * torch.where(keep, 0, before))
    assert torch.allclose(dense(model), wanted, atol=1e-6)
    pruner.step(optimizer)
    assert pruner.steps == 1


def test_masks_follow_the_weights_at_every_step() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    pruner = learning(model)
    first, moved = torchprune.masks(model), 0
    for _ in range(12):
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step(optimizer)
        for layer, mask in masked_layers(model):
            dense = original_of(layer.module, layer.tensor).detach()
            lanes = dense.abs().reshape(-1, 4)
            wanted = torch.zeros_like(lanes, dtype=torch.bool)
            wanted.scatter_(1, lanes.topk(2, dim=1).indices, True)
            assert torch.equal(mask.mask.reshape(-1, 4), wanted)
            used = getattr(layer.module, layer.tensor)
            assert torch.equal(used, torch.where(mask.mask, dense, 0))
            assert bool((dense != 0).all())
            moved += int((mask.mask != first[layer.key]).sum())
    assert moved


def test_what_is_used_is_what_is_folded_saved_and_exported(tmp_path: Path) -> None:
    model = net()
    learning(model)
    x = torch.randn(3, 8)
    wanted = model(x)
    assert torchprune.report(model).sparsity == 0.5
    torchprune.save(model, tmp_path / "saved")
    loaded = torchprune.load_into(net(), tmp_path / "saved")
    assert torch.equal(loaded(x), wanted)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            torchprune.masks(loaded).values(), torchprune.masks(model).values(), strict=True
        )
    )
    program = torch.export.export(model.eval(), (x,))
    assert torch.allclose(program.module()(x), wanted)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), wanted)
    folded = torchprune.fold(twin)
    assert torch.equal(folded(x), wanted)
    assert bool((folded[0].weight.reshape(-1, 4) == 0).sum(1).ge(2).all())
    assert type(folded[0].weight) is nn.Parameter


def test_a_plain_state_holds_the_dense_weights_and_goes_on() -> None:
    model, again = net(), net()
    learning(model)
    learning(again)
    with torch.no_grad():
        model[0].parametrizations.weight.original.mul_(2)
    again.load_state_dict(model.state_dict())
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert bool((again[0].parametrizations.weight.original != 0).all())


def test_densify_gives_all_weights_back() -> None:
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    learning(model)
    torchprune.densify(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_transformers_files_hold_the_zeros(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=16)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    learning(model)
    model.save_pretrained(tmp_path)
    stock = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(stock.eval()(ids).logits, model.eval()(ids).logits)
    assert not any("parametrizations" in key for key in load_file(tmp_path / "model.safetensors"))


def test_others_do_not_prune_what_learns_under_a_mask() -> None:
    model = net()
    learning(model)
    before = copy.deepcopy(model.state_dict())
    for spec, data in ((MagnitudeSpec(0.75), None), (torchprune.WandaSpec(0.75), [x8()])):
        with pytest.raises(MaskError, match=r"0: its weights go on learning .*fold\(model\)"):
            torchprune.sparsify(model, spec, data, progress=False)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    torchprune.sparsify(torchprune.fold(model), MagnitudeSpec(0.75))
    assert torchprune.report(model).sparsity == 0.75


def x8() -> torch.Tensor:
    return torch.randn(3, 8)


@pytest.mark.parametrize("decay", [-1.0, "much", True, float("inf")])
def test_decays_that_are_none_are_refused(decay: object) -> None:
    with pytest.raises(SpecError, match="StraightThrough: decay"):
        StraightThrough(decay)  # type: ignore[arg-type]


def test_once_is_enough_where_masks_are_to_stay() -> None:
    model = net()
    spec = MagnitudeSpec(pattern="2:4")
    pruner = Pruner(model, spec, OneShot(0.5, at=1), regrow=StraightThrough())
    assert pruner.step()
    before = torchprune.masks(model)
    with torch.no_grad():
        model[0].parametrizations.weight.original.copy_(torch.randn(12, 8))
    assert not pruner.step()
    assert torch.equal(torchprune.masks(model)["0.weight"], before["0.weight"])
