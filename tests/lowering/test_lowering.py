"""Lowering and lifting: what is lowered, what it computes, and that it can be undone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from by_hand import assert_as_it_was, fingerprint
from families import FAMILIES, tokens
from saved import output, pruned
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.errors import CheckpointError, LoweringError, TargetError
from torchprune.lowering.modules import BitmaskLinear

GENERATIVE = ["llama", "qwen3", "gemma", "mixtral", "gpt2", "opt"]


def folded_copy(model: nn.Module) -> nn.Module:
    return torchprune.fold(copy.deepcopy(model))


def lowered_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, BitmaskLinear)]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_computes_the_same_and_comes_back(name: str) -> None:
    model = pruned(name)
    batch = FAMILIES[name].data()[0]
    folded = folded_copy(model)
    expected = output(folded, batch)
    plan = torchprune.plan_lowering(model, "bitmask")
    if not plan.layers:
        assert any("no linear layer" in why for why in plan.left.values())  # a CNN
        return
    assert torchprune.lower(model, "bitmask") is model
    assert lowered_names(model) == [y.name for y in plan.layers]
    torch.testing.assert_close(output(model, batch), expected, rtol=1e-4, atol=1e-4)
    assert not torchprune.masks(model)
    torchprune.lift(model)
    assert not lowered_names(model)
    state, like = model.state_dict(), folded.state_dict()
    assert list(state) == list(like)
    assert all(torch.equal(state[key], like[key]) for key in like)
    assert [type(m) for m in model.modules()] == [type(m) for m in folded.modules()]
    assert torch.equal(output(model, batch), expected)


@pytest.mark.parametrize("name", GENERATIVE)
def test_lowered_models_generate(name: str) -> None:
    model = pruned(name)
    folded = folded_copy(model)
    torchprune.lower(model, "bitmask")
    prompt = torch.tensor([[3, 5, 7, 9]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **options), folded.generate(prompt, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4"])
def test_other_dtypes_and_patterns(dtype: torch.dtype, pattern: str) -> None:
    model = pruned("llama", dtype, pattern=pattern)
    folded = folded_copy(model)
    torchprune.lower(model, "bitmask")
    batch = tokens()[0]
    torch.testing.assert_close(
        output(model, batch).float(), output(folded, batch).float(), rtol=0.1, atol=0.1
    )
    layer = model.model.layers[0].mlp.down_proj
    assert isinstance(layer, BitmaskLinear)
    assert layer.values.dtype == dtype


def plain(rows: int = 48, cols: int = 64, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(cols, rows, **options), nn.ReLU(), nn.Linear(rows, 8, **options)
    )
    return torchprune.fold(torchprune.sparsify(model, MagnitudeSpec(), progress=False))


def test_int8_rounds_to_nearest_and_keeps_zeros() -> None:
    model = plain()
    weight = model[0].weight.detach().clone()
    torchprune.lower(model, "bitmask", dtype=torch.int8)
    assert model[0].values.dtype == torch.int8
    assert "int8" in repr(model[0])
    torchprune.lift(model)
    back = model[0].weight
    scale = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((back - weight).abs() <= scale * 0.5001).all())
    assert not back[weight == 0].any()


def test_a_row_of_zeros_is_a_row_of_zeros_in_int8() -> None:
    model = plain()
    with torch.no_grad():
        model[0].weight[3] = 0.0
    torchprune.lower(model, "bitmask", dtype=torch.int8)
    assert torch.equal(model[0](torch.randn(64))[3], model[0].bias[3])


def test_values_may_be_narrower_than_the_weights() -> None:
    model = plain()
    expected = model[0].weight.detach().bfloat16()
    torchprune.lower(model, "bitmask", dtype=torch.bfloat16)
    assert model(torch.randn(3, 64)).dtype == torch.float32
    assert torch.equal(model[0].packed.unpack(), expected)


def test_gradients_reach_the_input_and_the_bias() -> None:
    model = plain()
    x = torch.randn(3, 64, requires_grad=True)
    model(x).square().sum().backward()
    expected, biases = x.grad, [model[i].bias.grad.clone() for i in (0, 2)]
    torchprune.lower(model, "bitmask")
    model.zero_grad()
    y = x.detach().clone().requires_grad_()
    model(y).square().sum().backward()
    torch.testing.assert_close(y.grad, expected, rtol=1e-4, atol=1e-5)
    for i, grad in zip((0, 2), biases, strict=True):
        torch.testing.assert_close(model[i].bias.grad, grad, rtol=1e-4, atol=1e-5)


# -- still modules --------------------------------------------------------------------------------


def test_state_dict_goes_to_another_lowered_model_with_other_zeros() -> None:
    one, other = plain(), plain()
    with torch.no_grad():
        other[0].weight[:4] = 0.0
        other[0].weight[5] = 1.0
    x = torch.randn(3, 64)
    expected = other(x)
    torchprune.lower(one, "bitmask")
    torchprune.lower(other, "bitmask")
    one.load_state_dict(other.state_dict())
    torch.testing.assert_close(one(x), expected, rtol=1e-5, atol=1e-5)
    torchprune.lift(one)
    assert torch.equal(one[0].weight[5], torch.ones(64))


@pytest.mark.parametrize("part", ["bits", "values", "starts"])
def test_a_state_dict_that_contradicts_itself_is_refused(part: str) -> None:
    model = torchprune.lower(plain(), "bitmask")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    key = f"0.{part}"
    state[key] = state[key][:-1] if part == "values" else state[key] + 1
    before = model(torch.ones(1, 64))
    with pytest.raises(LoweringError, match=r"0 of the state dict"):
        model.load_state_dict(state)
    assert torch.equal(model(torch.ones(1, 64)), before)


def test_a_state_dict_of_another_dtype_or_a_plain_one_is_refused() -> None:
    state = torchprune.lower(plain(), "bitmask").state_dict()
    with pytest.raises(LoweringError, match="float32"):
        torchprune.lower(plain(), "bitmask", dtype=torch.bfloat16).load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        torchprune.lower(plain(), "bitmask").load_state_dict(plain().state_dict())


def test_deepcopies_are_their_own() -> None:
    model = torchprune.lower(plain(), "bitmask")
    other = copy.deepcopy(model)
    x = torch.randn(2, 64)
    expected = model(x)
    model[0].values.zero_()
    assert torch.equal(other(x), expected)
    weight = torchprune.lift(other)[0].weight
    assert weight.shape == (48, 64)
    assert isinstance(torchprune.lift(model)[0], nn.Linear)
    assert not model[0].weight.any()


def test_changing_the_dtype_rounds_values_and_leaves_scales_fine() -> None:
    model = torchprune.lower(plain(), "bitmask").to(torch.bfloat16)
    assert model(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16
    assert torch.equal(torchprune.lift(model)[0].weight, plain().bfloat16()[0].weight)
    model = torchprune.lower(plain(), "bitmask", dtype=torch.int8).to(torch.bfloat16)
    assert model[0].scales.dtype == torch.float32
    assert model(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16


def test_training_flags_and_requires_grad_come_back() -> None:
    model = plain()
    model[0].weight.requires_grad_(False)
    model.train()
    torchprune.lower(model, "bitmask")
    model.eval()
    torchprune.lift(model)
    assert [model[0].weight.requires_grad, model[2].weight.requires_grad] == [False, True]
    assert not model[0].training


def test_a_module_under_two_names_stays_one_module() -> None:
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    torchprune.lower(model, "bitmask")
    assert isinstance(model["a"], BitmaskLinear)
    assert model["a"] is model["b"][0]
    torchprune.lift(model)
    assert model["a"] is model["b"][0] is shared


def test_saving_a_lowered_model_is_refused(tmp_path: Any) -> None:
    model = torchprune.lower(plain(), "bitmask")
    with pytest.raises(CheckpointError, match=r"torchprune\.lift"):
        torchprune.save(model, tmp_path / "it")
    torchprune.save(torchprune.lift(model), tmp_path / "it")


def test_lowered_layers_compile_and_export_whole() -> None:
    model = torchprune.lower(plain(), "bitmask").eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names.count("torchprune.bitmask_linear.default") == 2
    for rows in (2, 12, 64):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(program.module()(x), model(x))
    decomposed = program.run_decompositions()
    torch.testing.assert_close(decomposed.module()(x), model(x))


# -- what is left, and why ------------------------------------------------------------------------


class Head(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_the_plan_says_what_is_left_and_why() -> None:
    model = nn.ModuleDict(
        {
            "fine": nn.Linear(32, 16),
            "dense": nn.Linear(32, 16),
            "conv": nn.Conv2d(3, 8, 3),
            "own": Head(32, 16),
            "hooked": nn.Linear(32, 16),
            "wide": nn.Linear(32, 16).double(),
            "infinite": nn.Linear(32, 16),
            "tied": nn.Linear(32, 16),
            "other": nn.Linear(32, 16),
            "ignored": nn.Linear(32, 16),
        }
    )
    for name, module in model.items():
        if name != "dense":
            module.weight.data.flatten()[::2] = 0.0
    model["infinite"].weight.data[0, 1] = torch.inf
    model["other"].weight = model["tied"].weight
    model["hooked"].register_forward_hook(lambda *_: None)
    plan = torchprune.plan_lowering(model, "bitmask", ignore="ignored")
    assert [y.name for y in plan.layers] == ["fine"]
    assert plan.layers[0].zeros == 0.5
    for name, words in {
        "dense": "less than 25% of it is zero",
        "conv": "a Conv2d is no linear layer",
        "own": "a Head may compute otherwise",
        "hooked": "hooks",
        "wide": "float64",
        "infinite": "inf or NaN",
        "tied": "tied to other.weight",
        "ignored": "ignored",
    }.items():
        assert words in plan.left[name], name
    text = str(plan)
    assert "fine  16x32  float32  50.0% zero  2,048 -> " in text
    assert "bitmask: 1 layers" in text
    before = fingerprint(model)
    with pytest.raises(LoweringError, match="nothing to lower") as caught:
        torchprune.lower(model, "bitmask", ignore=["fine", "ignored"])
    assert "Conv2d" in str(caught.value)
    assert_as_it_was(model, before)


def test_the_plan_foretells_the_bytes() -> None:
    for dtype in (None, torch.bfloat16, torch.int8):
        model = plain()
        plan = torchprune.plan_lowering(model, "bitmask", dtype=dtype, targets="0")
        torchprune.lower(model, "bitmask", dtype=dtype, targets="0")
        assert plan.layers[0].before == 48 * 64 * 4
        assert plan.layers[0].after >= model[0].packed.nbytes
        assert plan.layers[0].after - model[0].packed.nbytes <= 48 * 64 * 0.01  # rounded to zero


def test_half_of_the_weights_take_little_more_than_half_of_the_bytes() -> None:
    model = nn.Sequential(nn.Linear(2048, 512, bias=False)).to(torch.bfloat16)
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    plan = torchprune.plan_lowering(model, "bitmask")
    assert plan.layers[0].after <= 0.565 * plan.layers[0].before


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"target": "bitmsk"}, LoweringError, "'bitmask', 'semi_structured', 'dense'"),
        ({"target": "bitmask", "dtype": torch.float64}, LoweringError, "float64"),
        ({"target": "bitmask", "targets": "nope"}, TargetError, "nope"),
        ({"target": "bitmask", "min_sparsity": 0.9}, LoweringError, "less than 90%"),
    ],
)
def test_wrong_calls_leave_the_model_as_it_was(
    arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = plain()
    before = fingerprint(model)
    with pytest.raises(error, match=match):
        torchprune.lower(model, **arguments)
    assert_as_it_was(model, before)


def test_dense_is_folding() -> None:
    model = pruned("llama")
    folded = folded_copy(model)
    assert "14 masks" in str(torchprune.plan_lowering(model, "dense"))
    torchprune.lower(model, "dense")
    assert model.state_dict().keys() == folded.state_dict().keys()
    assert all(torch.equal(a, folded.state_dict()[k]) for k, a in model.state_dict().items())


def test_lifting_a_model_that_was_not_lowered_does_nothing() -> None:
    model = plain()
    before = fingerprint(model)
    assert torchprune.lift(model) is model
    assert_as_it_was(model, before)
