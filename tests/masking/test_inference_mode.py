"""Models made under `torch.inference_mode`, and calls made under it: all can be trained after."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import llama, tokens
from saved import bits, prune, state
from torch import Tensor, nn

import torchprune
from torchprune import (
    BestSpec,
    HeadSpec,
    LayerSpec,
    MagnitudeSpec,
    NeuronSpec,
    Reconstruct,
    SparseGPTSpec,
    WandaSpec,
)
from torchprune.errors import SpecError, TorchpruneError

UP = "model.layers.0.mlp.up_proj.weight"


def built(under: bool) -> Any:
    """A Llama with tied embeddings, made under inference mode or not."""
    with torch.inference_mode(under), torch.random.fork_rng():
        torch.manual_seed(3)
        return llama(tie_word_embeddings=True).eval()


def masked(under: bool, spec: Any = None) -> Any:
    """Such a model that is masked already: its masks come from there too."""
    with torch.inference_mode(under):
        model = built(under)
        data = None if spec is None else tokens()
        prune(model, spec or MagnitudeSpec(), data)
        if under:
            for module in model.modules():
                module._buffers.update({k: b.clone() for k, b in module.named_buffers("", False)})
    return model


def trained(model: nn.Module) -> None:
    """Take a step with every parameter, by an optimizer."""
    with torch.inference_mode(False):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        ids = tokens()[0]
        before = {k: bits(v) for k, v in model.named_parameters()}
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        assert {k: bits(v) for k, v in model.named_parameters()} != before
        assert not any(t.is_inference() for t in (*model.parameters(), *model.buffers()))


def sparsified(spec: Any) -> Callable[[bool, Path], Any]:
    return lambda under, _: prune(built(under), spec, tokens() if spec.needs_data else None)


def structured(spec: Any) -> Callable[[bool, Path], Any]:
    return lambda under, _: prune(built(under), spec, tokens())


def shrunk(under: bool, _: Path) -> Any:
    model = masked(under, NeuronSpec(0.5))
    return torchprune.shrink(model, torchprune.plan_shrink(model, tokens()[0]))


def given(under: bool, _: Path) -> Any:
    mask = torch.arange(48 * 32).view(48, 32) % 2 == 0
    return torchprune.apply_masks(built(under), {UP: mask})


CALLS: dict[str, Callable[[bool, Path], Any]] = {
    "magnitude": sparsified(MagnitudeSpec()),
    "again": lambda under, _: prune(masked(under), MagnitudeSpec(0.75)),
    "sparsegpt": sparsified(SparseGPTSpec()),
    "permuted": sparsified(WandaSpec(pattern="2:4", permute=True)),
    "reconstructed": sparsified(BestSpec(pattern="2:4", reconstruct=Reconstruct(epochs=1))),
    "heads": structured(HeadSpec(0.5)),
    "layers": structured(LayerSpec(1)),
    "shrunk": shrunk,
    "given": given,
    "folded": lambda under, _: torchprune.fold(masked(under)),
    "densified": lambda under, _: torchprune.densify(masked(under)),
    "lifted": lambda under, _: torchprune.lift(torchprune.lower(masked(under), "bitmask")),
    "loaded": lambda under, path: torchprune.load(path),
    "loaded into": lambda under, path: torchprune.load_into(built(under), path),
    "loaded beside": lambda under, path: torchprune.load(path / "plain"),
}


SLOW = ("permuted", "heads", "shrunk")
"""What exports the model: tried in one way only."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inference")
    model = masked(False)
    torchprune.save(model, directory / "own")
    model.save_pretrained(directory / "own" / "plain")
    return directory / "own"


def found(model: nn.Module) -> dict[str, Any]:
    """What a model is; copies of inference data are held besides while it is calibrated."""
    told = state(model)
    told["report"].pop("peak_held_bytes")
    return told


@pytest.mark.parametrize("name", CALLS)
def test_what_a_call_leaves_is_as_without_the_mode(name: str, saved: Path) -> None:
    call = CALLS[name]
    expected = found(call(False, saved))
    cases = [(True, True), (True, False), (False, True)]
    for made, called in cases[:1] if name in SLOW else cases:
        with torch.inference_mode(called):
            model = call(made, saved)
        assert found(model) == expected, (made, called)
        trained(model)


def test_tensors_stay_the_same_objects_and_tied() -> None:
    model = built(True)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    parameters[UP].note = "mine"
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = {k: bits(v) for k, v in model.state_dict().items()}
    prune(model, MagnitudeSpec(targets="*.0.mlp.up_proj"))
    torchprune.densify(model)
    assert {k: bits(v) for k, v in model.state_dict().items()} == before
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert after[UP].note == "mine"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokens()[0]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()  # made before, of tensors that it could not have written
    assert {k: bits(v) for k, v in model.state_dict().items()} != before


def test_layouts_and_memory_that_is_shared_stay() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.randn(4, 6)
            self.linear = nn.Linear(4, 6)
            self.linear.weight = nn.Parameter(whole.T)
            self.register_buffer("row", whole[1])
            self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
            self.register_buffer("wide", torch.zeros(1).expand(5))

    with torch.inference_mode():
        model = Views()
    strides = {k: v.stride() for k, v in model.state_dict().items()}
    values = {k: v.clone() for k, v in model.state_dict().items()}
    prune(model, MagnitudeSpec(targets="conv"))
    torchprune.densify(model)
    held = model.state_dict()
    assert {k: v.stride() for k, v in held.items()} == strides
    assert all(torch.equal(held[k], v) for k, v in values.items())
    with torch.no_grad():
        model.row += 1
    assert torch.equal(model.linear.weight[:, 1], model.row)


def test_a_refused_call_changes_no_value() -> None:
    model = built(True)
    before = {k: bits(v) for k, v in model.state_dict().items()}
    with pytest.raises(SpecError):
        prune(model, MagnitudeSpec(pattern="5:7"))
    assert {k: bits(v) for k, v in model.state_dict().items()} == before


def test_tensors_that_are_held_weakly_are_refused_by_name() -> None:
    model = built(True)
    held = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    tensors: list[Tensor] = [*model.parameters()]
    with pytest.raises(TorchpruneError, match=rf"{UP} was made under torch.inference_mode"):
        prune(model, MagnitudeSpec())
    assert held() is not None
    assert all(t.is_inference() for t in tensors)
    assert not torchprune.masks(model)
