"""peft's LoRA on masked layers: unmerged is merged, the zeros stay, and everything comes back."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tokens
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec, WandaSpec
from torchprune.errors import MaskError
from torchprune.masking.mask import mask_of, masked_layers
from torchprune.training.adapted_weight import place_of
from torchprune.training.adapted_weight import run as run_layer

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of peft, which has many
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Convs(nn.Module):
    """Convolutions of every number of axes, one dilated, one of single positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, dilation=2)
        self.third = nn.Conv2d(8, 6, 1, bias=False)
        self.line = nn.Conv1d(6, 8, 3)
        self.volume = nn.Conv3d(1, 4, (3, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.second(self.first(x).relu()).relu())
        return self.volume(self.line(x.flatten(2)).view(len(x), 1, 8, 2, -1))


def convs(dtype: torch.dtype) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Convs().to(dtype).eval(), lambda model: model(x)


def language(family: str) -> Callable[[torch.dtype], tuple[nn.Module, Callable[[Any], Tensor]]]:
    def make(dtype: torch.dtype) -> tuple[nn.Module, Callable[[Any], Tensor]]:
        batch = FAMILIES[family].data(dtype)[0]

        def run(model: Any) -> Tensor:
            out = model(**batch) if isinstance(batch, dict) else model(batch)
            return out.logits if hasattr(out, "logits") else out[0]

        return FAMILIES[family].make(dtype), run

    return make


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (language("llama"), {"target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"]}),
    "gpt2": (language("gpt2"), {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "bert": (language("bert"), {"target_modules": ["query", "dense"]}),
    "t5": (language("t5"), {"target_modules": ["q", "v", "wo"]}),
    "convs": (convs, {"target_modules": ["first", "second", "third", "line", "volume"]}),
    "mixtral": (
        language("mixtral"),
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True, "bias": "lora_only"},
    "pissa": {"init_lora_weights": "pissa"},
}


def masked(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Callable[[Any], Tensor]]:
    model, run = MODELS[name][0](dtype)
    return torchprune.sparsify(model, MagnitudeSpec(), progress=False), run


def config(name: str, **options: Any) -> Any:
    return peft.LoraConfig(r=4, **{**MODELS[name][1], **options})


def stir(model: nn.Module, seed: int = 3, size: float = 0.05) -> Any:
    """As if all that is trained had been."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += (size * noise).to(parameter.dtype)
    return model


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        return {y.name: getattr(y.module, y.tensor).clone() for y, _ in masked_layers(model)}


def check_zeros(model: nn.Module, kept: dict[str, Tensor]) -> None:
    """Every masked tensor is zero exactly where it was pruned, to the bit."""
    found = {y.name: (getattr(y.module, y.tensor), m.mask) for y, m in masked_layers(model)}
    assert found.keys() == kept.keys()
    for name, (weight, mask) in found.items():
        assert torch.equal(mask, kept[name]), name
        words = {2: torch.int16, 4: torch.int32}[weight.itemsize]
        assert not weight.detach().contiguous().view(words)[~mask].any(), name


def kept_in(model: nn.Module) -> dict[str, Tensor]:
    return {layer.name: mask.mask for layer, mask in masked_layers(model)}


def fits(name: str, kind: str) -> bool:
    if name == "mixtral":
        return kind in ("lora", "rslora")
    if name == "convs":
        return kind not in ("pissa", "bias")  # of Linear only; some have no bias
    return kind != "bias" or name in ("gpt2", "bert")


HALVES = [("llama", "lora"), ("llama", "dora"), ("gpt2", "dora"), ("convs", "lora")]
CASES = [
    (name, kind, dtype)
    for name in MODELS
    for kind in KINDS
    for dtype in DTYPES
    if fits(name, kind) and (dtype == torch.float32 or (name, kind) in HALVES)
]


@pytest.mark.parametrize(("name", "kind", "dtype"), CASES)
def test_unmerged_is_merged(name: str, kind: str, dtype: torch.dtype) -> None:
    model, run = masked(name, dtype)
    kept, before = kept_in(model), weights_of(model)
    with torch.no_grad():
        outputs = run(model)  # without a gradient, which attention rounds otherwise
    adapted = peft.get_peft_model(model, config(name, **KINDS[kind])).eval()
    exact = kind in ("lora", "rslora", "bias")
    close = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    with torch.no_grad():
        same = run(adapted)
    if exact:
        assert torch.equal(same, outputs), "changed before it was trained"
    else:
        torch.testing.assert_close(same, outputs, **close)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        run(adapted).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained, base = run(adapted), weights_of(adapted)
    assert not torch.equal(trained, outputs)
    if kind != "pissa":  # which takes its first product out of the base
        assert all(torch.equal(base[key], before[key]) for key in before), "the base was trained"
    adapted.merge_adapter()
    assert torch.equal(run(adapted), trained)
    check_zeros(adapted, kept)
    adapted.unmerge_adapter()
    for key, weight in weights_of(adapted).items():
        torch.testing.assert_close(weight, base[key], **close)
    check_zeros(adapted, kept)
    trained = run(adapted)
    merged = adapted.merge_and_unload(safe_merge=True)
    assert torch.equal(run(merged), trained)
    check_zeros(merged, kept)
    torchprune.fold(merged)
    assert torch.equal(run(merged), trained)


def test_the_loss_that_was_in_silence_is_none() -> None:
    """Stock arithmetic on the same model is wrong by more than a third of the logits."""
    model, run = masked("llama")
    adapted = peft.get_peft_model(model, config("llama", init_lora_weights=False))
    mine = run(adapted)
    layers = [m for m in adapted.modules() if isinstance(m, peft.tuners.lora.layer.Linear)]
    dense = copy.deepcopy(adapted)
    for layer in dense.modules():
        if isinstance(layer, peft.tuners.lora.layer.Linear):
            torchprune.masking.mask.detach(layer.base_layer, "weight")
    stock = run(dense)  # what peft computes: a dense change beside the sparse layer
    assert layers
    merged = run(adapted.merge_and_unload())
    assert torch.equal(mine, merged)
    assert (stock - merged).norm() / merged.norm() > 0.1


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "convs"])
def test_the_plain_formula(name: str, kind: str) -> None:
    """What a layer gives, and its gradients, against W + s * M * (B A) written out."""
    model, _ = masked(name)
    options = {**KINDS[kind], "init_lora_weights": False}
    adapted = stir(peft.get_peft_model(model, config(name, **options)))
    kinds = (peft.tuners.lora.layer.Linear, peft.tuners.lora.layer._ConvNd)
    for layer in (m for m in adapted.modules() if isinstance(m, kinds)):
        base = layer.base_layer
        mask = mask_of(base, "weight")
        assert mask is not None
        a, b = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
        product = b.flatten(1) @ a.flatten(1)
        product = (product.T if getattr(layer, "fan_in_fan_out", False) else product).reshape(
            base.weight.shape
        )
        weight = base.weight + layer.scaling["default"] * torch.where(mask.mask, product, 0)
        if kind == "dora":
            axis = 1 if getattr(layer, "fan_in_fan_out", False) else 0
            others = [i for i in range(weight.dim()) if i != axis]
            norm = weight.detach().square().sum(others, keepdim=True).sqrt()
            magnitude = layer.lora_magnitude_vector["default"].weight
            weight = magnitude.reshape(norm.shape) / norm * weight
        sizes = (5, base.weight.shape[0 if name == "gpt2" else 1])
        x = torch.randn(*sizes, *[4] * (weight.dim() - 2), requires_grad=True)
        x = x if weight.dim() == 2 else torch.randn(*sizes, *[9] * (weight.dim() - 2))
        x = x.detach().requires_grad_()
        mine = layer(x)
        plain = torch.func.functional_call(copy_of(base), {"weight": weight}, (x,))
        torch.testing.assert_close(mine, plain)
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
        push = torch.randn_like(mine)
        for got, wanted in zip(
            torch.autograd.grad(mine, leaves, push),
            torch.autograd.grad(plain, leaves, push),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted)


def copy_of(base: nn.Module) -> nn.Module:
    return torchprune.fold(copy.deepcopy(base))


def test_several_adapters() -> None:
    model, run = masked("llama")
    kept, dense = kept_in(model), run(model)
    adapted = peft.get_peft_model(model, config("llama", init_lora_weights=False), "one")
    adapted.add_adapter("two", config("llama", use_dora=True, init_lora_weights=False))
    stir(adapted).eval()
    one = run(adapted)
    adapted.set_adapter("two")
    two = run(adapted)
    adapted.base_model.set_adapter(["one", "two"])
    both = run(adapted)
    assert len({t.sum().item() for t in (dense, one, two, both)}) == 4
    with adapted.disable_adapter():
        assert torch.equal(run(adapted), dense)
    adapted.merge_adapter()
    assert torch.equal(run(adapted), both)
    with adapted.disable_adapter():  # which unmerges
        torch.testing.assert_close(run(adapted), dense)
    adapted.base_model.set_adapter("one")
    adapted.merge_adapter()
    torch.testing.assert_close(run(adapted), one)
    adapted.merge_adapter(["two"])
    adapted.unmerge_adapter()
    check_zeros(adapted, kept)
    torch.testing.assert_close(run(adapted), one)
    adapted.delete_adapter("one")
    adapted.set_adapter("two")
    torch.testing.assert_close(run(adapted), two)
    torch.testing.assert_close(run(adapted.unload()), dense)


@pytest.mark.parametrize("how", ["cat", "svd", "linear"])
def test_weighted_adapters(how: str) -> None:
    model, run = masked("llama")
    adapted = peft.get_peft_model(model, config("llama", init_lora_weights=False), "one")
    adapted.add_adapter("two", config("llama", init_lora_weights=False))
    rank = {"svd_rank": 8} if how == "svd" else {}
    adapted.add_weighted_adapter(["one", "two"], [0.5, 0.25], "sum", how, **rank)
    adapted.set_adapter("sum")
    mine = run(adapted)
    if how != "linear":  # which is a sum of factors
        adapted.set_adapter("one")
        adapted.base_model.set_adapter(["one", "two"])
        for layer in adapted.modules():
            if isinstance(layer, peft.tuners.lora.layer.Linear):
                layer.set_scale("one", 0.5)
                layer.set_scale("two", 0.25)
        torch.testing.assert_close(mine, run(adapted), rtol=1e-4, atol=1e-5)
        adapted.set_adapter("sum")
    kept = kept_in(adapted)
    merged = adapted.merge_and_unload()
    assert torch.equal(run(merged), mine)
    check_zeros(merged, kept)


def test_batches_of_several_adapters() -> None:
    model, _ = masked("llama")
    adapted = peft.get_peft_model(model, config("llama", init_lora_weights=False), "one")
    adapted.add_adapter("two", config("llama", init_lora_weights=False))
    adapted.eval()
    [ids] = tokens(count=1, rows=4)
    names = ["one", "two", "__base__", "one"]
    mixed = adapted(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            with adapted.disable_adapter():
                alone = adapted(input_ids=ids[row : row + 1]).logits
        else:
            adapted.set_adapter(name)
            alone = adapted(input_ids=ids[row : row + 1]).logits
        torch.testing.assert_close(mixed[row : row + 1], alone)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "convs"])
def test_dropout_is_of_the_adapters_input(name: str, kind: str) -> None:
    model, run = masked(name)
    options = {**KINDS[kind], "init_lora_weights": False, "lora_dropout": 0.5}
    adapted = peft.get_peft_model(model, config(name, **options))
    quiet = run(adapted.eval())
    layers = [m for m in adapted.modules() if hasattr(m, "lora_dropout")]
    for layer in layers:
        layer.train()  # and not the model, which may have a dropout of its own
    first, second = run(adapted), run(adapted)
    assert not torch.equal(first, second)
    first.float().sum().backward()
    assert torch.equal(run(adapted.eval()), quiet)
    for layer in layers:
        layer.train().lora_dropout["default"].p = 1e-9  # drops nothing, by the other way
    torch.testing.assert_close(run(adapted), quiet, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("folded", [False, True])
def test_saved_and_reloaded(tmp_path: Path, kind: str, folded: bool) -> None:
    """The base by torchprune or as a plain folded checkpoint, the adapter by peft."""
    import transformers

    model, run = masked("llama")
    kept = kept_in(model)
    if folded:
        torchprune.fold(copy.deepcopy(model)).save_pretrained(tmp_path / "base")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torchprune.peft_ready(base, zeros=True)
    else:
        torchprune.save(model, tmp_path / "base")
        base = torchprune.load(tmp_path / "base")
    adapted = stir(peft.get_peft_model(model, config("llama", **KINDS[kind]))).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    check_zeros(again, kept)
    assert torch.equal(run(again), run(adapted))
    merged = again.merge_and_unload()
    assert torch.equal(run(merged), run(adapted))
    check_zeros(merged, kept)
    merged.save_pretrained(tmp_path / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(run(plain), run(adapted))
    for name, keep in kept.items():
        assert not plain.get_submodule(name).weight[~keep].any()


def test_transformers_own_adapters(tmp_path: Path) -> None:
    model, run = masked("llama")
    kept, dense = kept_in(model), run(model)
    model.add_adapter(config("llama", init_lora_weights=False))
    model.eval()
    trained = run(model)
    assert not torch.equal(trained, dense)
    model.save_pretrained(tmp_path)
    other, _ = masked("llama")
    other.load_adapter(str(tmp_path))
    other.eval()
    assert torch.equal(run(other), trained)
    model.disable_adapters()
    assert torch.equal(run(model), dense)
    model.enable_adapters()
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.layer.Linear):
            layer.merge()
    assert torch.equal(run(model), trained)
    check_zeros(model, kept)


ODD = ("unstructured", 0.6)


def test_zeros_become_masks_and_the_report_names_their_pattern() -> None:
    model, run = MODELS["llama"][0](torch.float32)
    spec = MagnitudeSpec(pattern="2:4", overrides={"*.q_proj": "1:4", "*.o_proj": ODD})
    torchprune.sparsify(model, spec, progress=False)
    kept, outputs = kept_in(model), run(model)
    torchprune.fold(model)
    assert torchprune.peft_ready(model, zeros=True) is model
    check_zeros(model, kept)
    assert torch.equal(run(model), outputs)
    patterns = {y.name.rpartition(".")[2]: y.pattern for y in torchprune.report(model).layers}
    assert patterns["q_proj"] == "1:4"
    assert patterns["up_proj"] == "2:4"
    assert patterns["o_proj"].startswith("unstructured 0.599")
    assert all(y.method == "zeros" for y in torchprune.report(model).layers)


@pytest.mark.parametrize("when", ["before", "after"])
def test_before_and_after_the_adapter(when: str) -> None:
    model, run = masked("llama")
    kept = kept_in(model)
    torchprune.fold(model)
    if when == "before":
        torchprune.peft_ready(model, zeros=True)
    adapted = peft.get_peft_model(model, config("llama"))
    if when == "after":
        torchprune.peft_ready(adapted, zeros=True)
    check_zeros(adapted, kept)
    trained = run(stir(adapted).eval())
    merged = adapted.merge_and_unload()
    assert torch.equal(run(merged), trained)
    check_zeros(merged, kept)


def test_few_zeros_are_chance() -> None:
    model, _ = MODELS["llama"][0](torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 0
    before = model.state_dict().keys()
    with pytest.raises(MaskError, match="no prunable layer here has zeros"):
        torchprune.peft_ready(model, zeros=True)
    with pytest.raises(MaskError, match="carries no masks"):
        torchprune.peft_ready(model)
    assert model.state_dict().keys() == before


@pytest.mark.parametrize("spec", [MagnitudeSpec(pattern="2:4"), WandaSpec(pattern="2:4")])
def test_a_model_with_an_adapter_is_pruned_trained_and_merged(spec: Any) -> None:
    """Pruned again with the adapter on, too: what is pruned is the base."""
    model, run = MODELS["llama"][0](torch.float32)
    adapted = stir(peft.get_peft_model(model, config("llama")))
    factors = {n: p.detach().clone() for n, p in adapted.named_parameters() if "lora_" in n}
    data = FAMILIES["llama"].data()
    for _ in range(2):
        torchprune.sparsify(adapted, spec, data, progress=False)
        masks = kept_in(adapted)
        assert len(masks) == 14
        assert all(m.float().mean() == 0.5 for m in masks.values())
        now = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
        assert all(torch.equal(now[n], factor) for n, factor in factors.items())
    trained = run(stir(adapted).eval())
    merged = adapted.merge_and_unload()
    assert torch.equal(run(merged), trained)
    check_zeros(merged, masks)


def test_calibration_sees_the_adapted_outputs() -> None:
    """Hooks on the layers under adapters are called, also where they are masked already."""
    model, run = masked("llama")
    adapted = peft.get_peft_model(model, config("llama", init_lora_weights=False)).eval()
    quiet = run(adapted)
    seen = []
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    handle = layer.base_layer.register_forward_hook(lambda m, a, out: seen.append(out))
    assert torch.equal(run(adapted), quiet)
    handle.remove()
    [output] = seen
    assert torch.equal(run(adapted), quiet)
    assert torch.equal(output, layer(adapted_input(adapted, layer, run)))


def adapted_input(model: nn.Module, layer: nn.Module, run: Callable[[Any], Tensor]) -> Tensor:
    seen: list[Tensor] = []
    with layer.register_forward_pre_hook(lambda m, args: seen.append(args[0])):
        run(model)
    return seen[0]


def test_modules_to_save(tmp_path: Path) -> None:
    model, run = masked("llama")
    options = {"target_modules": ["q_proj"], "modules_to_save": ["v_proj", "lm_head"]}
    adapted = peft.get_peft_model(model, config("llama", **options))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    run(adapted).square().mean().backward()
    optimizer.step()
    trained = run(adapted.eval())
    adapted.save_pretrained(tmp_path)
    other, _ = masked("llama")
    again = peft.PeftModel.from_pretrained(other, tmp_path)
    assert torch.equal(run(again), trained)
    kept = kept_in(other)
    merged = adapted.merge_and_unload()
    assert torch.equal(run(merged), trained)
    check_zeros(merged, kept_in(masked("llama")[0]))
    assert kept


def test_copies_compiled_autocast_and_checkpointed() -> None:
    model, run = masked("llama")
    adapted = peft.get_peft_model(model, config("llama", init_lora_weights=False))
    trained = run(adapted)
    twin = copy.deepcopy(adapted)
    stir(adapted)
    assert torch.equal(run(twin), trained)
    layer = twin.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    expected = layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = run(twin)
        rounded.float().sum().backward()
        merged = twin.merge_and_unload()
        assert torch.equal(run(merged), rounded)


def test_other_steps_take_the_mask_off_only_when_the_adapter_is_gone(tmp_path: Path) -> None:
    model, run = masked("llama")
    adapted = peft.get_peft_model(model, config("llama", init_lora_weights=False)).eval()
    trained = run(adapted)
    for step in (torchprune.fold, torchprune.densify, partial(torchprune.lower, target="bitmask")):
        with pytest.raises(MaskError, match="merge_and_unload"):
            step(adapted)
    adapted.merge_adapter()
    with pytest.raises(MaskError, match="merge_and_unload"):
        torchprune.fold(adapted)
    adapted.unmerge_adapter()
    torch.testing.assert_close(run(adapted), trained)
    assert torchprune.report(adapted).sparsity == 0.5
    torchprune.fold(adapted.merge_and_unload())


def test_saved_whole_and_put_back(tmp_path: Path) -> None:
    model, run = masked("llama")
    adapted = peft.get_peft_model(model, config("llama", init_lora_weights=False)).eval()
    trained = run(adapted)
    torchprune.save(adapted, tmp_path / "whole")
    fresh = peft.get_peft_model(MODELS["llama"][0](torch.float32)[0], config("llama")).eval()
    torchprune.load_into(fresh, tmp_path / "whole")
    assert torch.equal(run(fresh), trained)


def test_layers_without_masks_compute_what_peft_does() -> None:
    model, run = MODELS["llama"][0](torch.float32)
    adapted = peft.get_peft_model(model, config("llama", init_lora_weights=False)).eval()
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    assert torch.equal(layer(x), layer.base_layer(x) + b(a(x)) * layer.scaling["default"])
    trained = run(adapted)
    torch.testing.assert_close(run(adapted.merge_and_unload()), trained)


def test_threads_read_an_adapter_each() -> None:
    """Also where hooks have the base layer itself called."""
    model, _ = masked("llama")
    adapted = peft.get_peft_model(model, config("llama", init_lora_weights=False), "one")
    adapted.add_adapter("two", config("llama", init_lora_weights=False))
    adapted.eval()
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    places = [place_of(layer) for _ in range(2)]
    expected = {}
    for name in ("one", "two"):
        adapted.set_adapter(name)
        expected[name] = layer(x)
    meet = threading.Barrier(2)
    found = {}

    def together(*_: Any) -> None:
        meet.wait(10)

    layer.base_layer.register_forward_pre_hook(together)

    def read(name: str, place: Any) -> None:
        with torch.no_grad():
            found[name] = run_layer(place, [name], x, (), {})

    threads = [
        threading.Thread(target=read, args=(name, place))
        for name, place in zip(expected, places, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not [key for key in vars(layer.base_layer) if "instead" in key]


def test_fused_experts_with_an_adapter_are_pruned_again() -> None:
    model, run = masked("mixtral")
    adapted = peft.get_peft_model(model, config("mixtral"))
    stir(adapted).eval()
    spec, data = WandaSpec(pattern="2:4"), FAMILIES["mixtral"].data()
    torchprune.sparsify(adapted, spec, data, progress=False)
    kept, trained = kept_in(adapted), run(adapted)
    merged = adapted.merge_and_unload()
    assert torch.equal(run(merged), trained)
    check_zeros(merged, kept)


def test_a_layer_of_a_masked_ones_class_is_an_ordinary_one() -> None:
    """Adapters make their own so; a copy is still a masked one."""
    conv = nn.Conv2d(4, 8, 3)
    torchprune.sparsify(conv, MagnitudeSpec(), progress=False)
    made = type(conv)(4, 2, 1, bias=False)
    assert type(made) is nn.Conv2d
    assert isinstance(made.weight, nn.Parameter)
    twin = copy.deepcopy(conv)
    assert mask_of(twin, "weight") is not None
    assert torch.equal(twin.weight, conv.weight)


def test_a_row_that_is_pruned_whole_stays_finite_under_dora() -> None:
    model, run = MODELS["llama"][0](torch.float32)
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    keys = [key for key in torchprune.masks(model) if key.endswith("q_proj.weight")]
    keep = {key: torchprune.masks(model)[key] for key in keys}
    for mask in keep.values():
        mask[3] = False
    torchprune.apply_masks(model, keep)
    adapted = peft.get_peft_model(model, config("llama", use_dora=True))
    run(adapted).sum().backward()
    assert all(p.grad.isfinite().all() for p in adapted.parameters() if p.grad is not None)
    trained = run(stir(adapted).eval())
    assert trained.isfinite().all()
    adapted.merge_adapter()
    assert torch.equal(run(adapted), trained)
    adapted.unmerge_adapter()
    torch.testing.assert_close(run(adapted), trained)
