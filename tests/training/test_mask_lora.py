"""MaskLoRA: nothing changes before training, zeros stay meanwhile, merging loses nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.errors import CheckpointError, MaskError, SpecError, TargetError
from torchprune.masking.mask import masked_layers, original_of
from torchprune.masking.matrices import view_of
from torchprune.training import MaskLoRA, add_mask_lora, merge_mask_lora, remove_mask_lora
from torchprune.training.masked_sum import Sum, masked_sum

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The effective weights of all masked tensors."""
    with torch.no_grad():
        return {
            y.key: getattr(y.module, y.tensor).detach().clone() for y, _ in masked_layers(model)
        }


def stir(factors: list[nn.Parameter], seed: int = 3) -> None:
    """As if they had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in factors:
            factor += 0.05 * torch.randn(factor.shape, generator=generator, dtype=factor.dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(
        {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    )


class TwoConvs(nn.Module):
    """A convolution, a grouped one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, groups=2)
        self.line = nn.Conv1d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(self.second(self.first(x).relu()).flatten(2))


class Packed(nn.Module):
    """Attention with its packed projections."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LSTM(16, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[0]


Make = Callable[[torch.dtype], tuple[nn.Module, Callable[[nn.Module], Tensor]]]


def language(family: str) -> Make:
    def make(dtype: torch.dtype) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        model = FAMILIES[family].make(dtype)
        batch = FAMILIES[family].data(dtype)[0]

        def run(model: Any) -> Tensor:
            out = model(**batch) if isinstance(batch, dict) else model(batch)
            return out[0] if isinstance(out[0], Tensor) else out.logits

        return model, run

    return make


def plain(kind: type[nn.Module], *shape: int) -> Make:
    def make(dtype: torch.dtype) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return kind().to(dtype), lambda model: model(x)

    return make


MODELS: dict[str, Make] = {
    "llama": language("llama"),
    "gpt2": language("gpt2"),
    "mixtral": language("mixtral"),
    "convs": plain(TwoConvs, 2, 3, 8, 8),
    "packed": plain(Packed, 2, 5, 16),
    "recurrent": plain(Recurrent, 2, 5, 16),
}


def masked(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Callable[[Any], Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, run = MODELS[name](dtype)
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    return model, run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_from_the_first_step_to_the_merge(name: str, dtype: torch.dtype) -> None:
    model, run = masked(name, dtype)
    kept, before, outputs = torchprune.masks(model), weights_of(model), run(model)
    factors = add_mask_lora(model, MaskLoRA(rank=3))
    assert len(factors) == 2 * len(kept)
    assert all(factor.dtype == torch.float32 for factor in factors)
    assert torch.equal(run(model), outputs), "changed before it was trained"
    optimizer = torch.optim.AdamW(factors, lr=0.02)
    for _ in range(3):
        loss = run(model).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained, weights = run(model), weights_of(model)
    assert not torch.equal(trained, outputs)
    for key, mask in kept.items():
        assert not bits(weights[key])[~mask].any(), f"{key}: not +0.0 under the mask"
        assert not torch.equal(weights[key], before[key])
    merge_mask_lora(model)
    assert torch.equal(run(model), trained)
    after = torchprune.masks(model)
    assert all(torch.equal(after[key], mask) for key, mask in kept.items())
    assert all(torch.equal(w, weights[key]) for key, w in weights_of(model).items())
    torchprune.fold(model)
    assert torch.equal(run(model), trained)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_taken_off_without_merging(name: str, dtype: torch.dtype) -> None:
    model, run = masked(name, dtype)
    names = list(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before, outputs = weights_of(model), run(model)
    stir(add_mask_lora(model, MaskLoRA(rank=2)))
    assert not torch.equal(run(model), outputs)
    remove_mask_lora(model)
    assert torch.equal(run(model), outputs)
    assert all(torch.equal(bits(w), bits(before[k])) for k, w in weights_of(model).items())
    assert list(model.state_dict()) == names
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    rank=st.integers(1, 4),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    seed=st.integers(0, 2**16),
    trained=st.booleans(),
)
def test_the_sum_and_its_gradients(
    shape: tuple[int, int], rank: int, dtype: torch.dtype, seed: int, trained: bool
) -> None:
    """Against the plain formula, whose operations torch differentiates itself."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(shape[1], shape[0]).to(dtype)
    keep = torch.rand(shape, generator=generator) < 0.5
    torchprune.apply_masks(layer, {"weight": keep})
    [(_, mask)] = masked_layers(layer)
    wide = torch.promote_types(dtype, torch.float32)
    up = torch.randn(shape[0], rank, generator=generator, dtype=wide)
    down = torch.randn(rank, shape[1], generator=generator, dtype=wide)
    weight = layer.weight.detach().clone().requires_grad_(trained)
    push = torch.randn(shape, generator=generator, dtype=dtype)
    leaves = [up.clone().requires_grad_(), down.clone().requires_grad_()]
    mine = masked_sum(weight, *leaves, 0.7, Sum(view_of(layer, shape), mask))
    mine.backward(push)
    twin = weight.detach().clone().requires_grad_(trained)
    others = [up.clone().requires_grad_(), down.clone().requires_grad_()]
    plain = torch.where(keep, (twin.to(wide) + 0.7 * (others[0] @ others[1])).to(dtype), 0)
    plain.backward(push)
    torch.testing.assert_close(mine, plain)
    assert not bits(mine.detach())[~keep].any()
    for leaf, other in zip(leaves, others, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, other.grad)
    if trained:
        torch.testing.assert_close(weight.grad, twin.grad)
    else:
        assert weight.grad is None


def test_second_derivatives() -> None:
    layer = nn.Linear(4, 3).double()
    torchprune.apply_masks(layer, {"weight": torch.rand(3, 4) < 0.6})
    [(_, mask)] = masked_layers(layer)
    to = Sum(view_of(layer, (3, 4)), mask)
    weight = layer.weight.detach().requires_grad_()
    up, down = (torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((3, 2), (2, 4)))
    torch.autograd.gradcheck(lambda *a: masked_sum(*a, 0.5, to), (weight, up, down))
    torch.autograd.gradgradcheck(lambda *a: masked_sum(*a, 0.5, to), (weight, up, down))


def small() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    torchprune.sparsify(model, MagnitudeSpec(pattern="2:4"), progress=False)
    return model


def test_only_what_is_meant_is_trained() -> None:
    model = small()
    factors = add_mask_lora(model)
    model(torch.randn(3, 16)).sum().backward()
    with_gradients = {id(p) for p in model.parameters() if p.grad is not None}
    biases = {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    assert with_gradients == {id(f) for f in factors} | biases


@pytest.mark.parametrize("shape", [(2, 16), (1, 3, 16)])
def test_transforms_see_the_same(shape: tuple[int, ...]) -> None:
    model, x = small(), torch.randn(*shape)
    stir(add_mask_lora(model))
    expected = model(x)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    torch.testing.assert_close(torch.func.functional_call(model, state, (x,)), expected)
    torch.testing.assert_close(torch.vmap(model)(x), expected)
    wrt = {k: v for k, v in state.items() if k.endswith(".B")}

    def loss(some: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, {**state, **some}, (x,)).square().sum()

    found = torch.func.grad(loss)(wrt)
    model(x).square().sum().backward()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(key).grad)


def test_compiled_and_exported() -> None:
    model, x = small(), torch.randn(3, 16)
    factors = add_mask_lora(model, MaskLoRA(rank=2))
    stir(factors)
    expected = model(x)
    expected.square().sum().backward()
    gradients = [f.grad for f in factors]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = compiled(x)
        out.square().sum().backward()
    torch.testing.assert_close(out, expected)
    for factor, gradient in zip(factors, gradients, strict=True):
        torch.testing.assert_close(factor.grad, gradient)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected)


def test_autocast_rounds_products_only() -> None:
    model, x = small(), torch.randn(3, 16)
    factors = add_mask_lora(model)
    stir(factors)
    weight = model[0].weight.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model[0].weight, weight)
        out = model(x)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(f.grad is not None and f.grad.dtype == torch.float32 for f in factors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merge_mask_lora(model)
        assert torch.equal(model(x), out)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model: Any = FAMILIES["llama"].make()
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    factors, ids = add_mask_lora(model), tokens()[0]
    stir(factors)
    model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append([f.grad.clone() for f in factors if f.grad is not None])
    assert len(found[0]) == len(factors)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_copies_and_states() -> None:
    model, other, x = small(), small(), torch.randn(3, 16)
    factors = add_mask_lora(model)
    stir(factors)
    expected = model(x)
    twin = copy.deepcopy(model)
    stir(factors, seed=5)
    assert torch.equal(twin(x), expected)
    assert not torch.equal(model(x), expected)
    add_mask_lora(other)
    other.load_state_dict(twin.state_dict())
    assert torch.equal(other(x), expected)
    merge_mask_lora(twin)
    assert torch.equal(twin(x), expected)
    assert torch.equal(other(x), expected)
    with pytest.raises(RuntimeError, match="Missing key"):
        small().load_state_dict({})


def test_written_weights_keep_their_zeros() -> None:
    model, x = small(), torch.randn(3, 16)
    stir(add_mask_lora(model))
    keep = torchprune.masks(model)["0.weight"]
    with torch.no_grad():
        original_of(model[0], "weight").fill_(1.0)
    assert torch.equal(model[0].weight != 0, keep)
    original_of(model[0], "weight").data.fill_(2.0)
    assert torch.equal(model[0].weight != 0, keep)
    assert model(x).isfinite().all()


def test_masks_that_change_meanwhile() -> None:
    model = small()
    stir(add_mask_lora(model))
    [(layer, mask), *_] = masked_layers(model)
    other = ~mask.mask
    mask.change(original_of(layer.module, "weight"), other, mask.record, reversible=True)
    assert torch.equal(layer.module.weight != 0, other)


def test_layers_without_masks() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(3, 16)
    names, expected = list(model.state_dict()), model(x)
    factors = add_mask_lora(model, MaskLoRA(targets=["0", "2"]))
    assert len(factors) == 4
    assert torch.equal(model(x), expected)
    stir(factors)
    trained = model(x)
    twin = copy.deepcopy(model)
    merge_mask_lora(model)
    assert torch.equal(model(x), trained)
    assert list(model.state_dict()) == names
    assert type(model[0]) is nn.Linear
    remove_mask_lora(twin)
    assert torch.equal(twin(x), expected)


def test_chosen_layers() -> None:
    model = small()
    assert len(add_mask_lora(model, MaskLoRA(targets="2"))) == 2
    assert not isinstance(original_of(model[0], "weight"), type(None))
    assert original_of(model[0], "weight").requires_grad
    assert not original_of(model[2], "weight").requires_grad


def test_the_factors_are_the_seeds() -> None:
    one, other = (add_mask_lora(small(), MaskLoRA(seed=s)) for s in (1, 1))
    third = add_mask_lora(small(), MaskLoRA(seed=2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], third[0])


def test_a_report_tells_of_the_same_zeros() -> None:
    model = small()
    before = torchprune.report(model).zeros
    stir(add_mask_lora(model))
    assert torchprune.report(model).zeros == before


REFUSED: dict[str, Callable[[nn.Module, Path], Any]] = {
    "fold": lambda model, _: torchprune.fold(model),
    "densify": lambda model, _: torchprune.densify(model),
    "save": lambda model, path: torchprune.save(model, path / "saved"),
    "lower": lambda model, _: torchprune.lower(model, "bitmask"),
    "apply_masks": lambda model, _: torchprune.apply_masks(model, torchprune.masks(model)),
    "sparsify": lambda model, _: torchprune.sparsify(
        model, MagnitudeSpec(0.7, targets=["0", "2"]), progress=False
    ),
    "add": lambda model, _: add_mask_lora(model),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_knows_no_factors_refuses_and_tells_what_to_call(what: str, tmp_path: Path) -> None:
    model, x = small(), torch.randn(3, 16)
    stir(add_mask_lora(model))
    before = model(x)
    with pytest.raises((MaskError, CheckpointError, TargetError), match="merge_mask_lora"):
        REFUSED[what](model, tmp_path)
    assert torch.equal(model(x), before)
    assert not (tmp_path / "saved").exists()


def test_transformers_saves_refuse(tmp_path: Path) -> None:
    model: Any = FAMILIES["llama"].make()
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    add_mask_lora(model)
    with pytest.raises(CheckpointError, match="merge_mask_lora"):
        model.save_pretrained(tmp_path)


def test_what_cannot_be() -> None:
    with pytest.raises(MaskError, match="no masks"):
        add_mask_lora(nn.Linear(4, 4))
    with pytest.raises(TargetError, match="'nowhere' matches nothing"):
        add_mask_lora(small(), MaskLoRA(targets="nowhere"))
    for function in (merge_mask_lora, remove_mask_lora):
        with pytest.raises(MaskError, match="no factors"):
            function(small())
    with pytest.raises(SpecError, match="did you mean 'rank'"):
        MaskLoRA(rang=3)  # type: ignore[call-arg]
    with pytest.raises(SpecError, match="rank must be a whole number"):
        MaskLoRA(rank=0)
