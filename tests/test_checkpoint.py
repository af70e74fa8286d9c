"""Saving and loading: what comes back, what is refused, and that nothing is left half done."""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, llama, mixtral, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_packing import tensors
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec, SparseGPTSpec, WandaSpec, staging
from torchprune.errors import CheckpointError, MaskError, MissingExtraError
from torchprune.manifest import MAX_JSON, read_manifest
from torchprune.report import runs_of

QUIET: dict[str, Any] = {"progress": False}
HUGGING = [f for f in FAMILIES.values() if f.name not in ("mlp", "torch_encoder")]


# -- what is compared ------------------------------------------------------------------------------


def bits(tensor: Tensor) -> tuple[str, tuple[int, ...], list[int]]:
    """A tensor as its dtype, shape and bytes."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).tolist()


def plain(model: nn.Module) -> nn.Module:
    return torchprune.fold(copy.deepcopy(model))


def ties(model: nn.Module) -> set[frozenset[str]]:
    names: dict[int, set[str]] = {}
    for name, parameter in plain(model).named_parameters(remove_duplicate=False):
        names.setdefault(parameter.data_ptr(), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def state(model: nn.Module) -> dict[str, Any]:
    """All that a save must bring back, in a form that compares."""
    folded = plain(model)
    return {
        "weights": {k: bits(v) for k, v in folded.state_dict().items()},
        "buffers": {k: bits(v) for k, v in folded.named_buffers()},
        "masks": {k: bits(v) for k, v in torchprune.masks(model).items()},
        "report": torchprune.report(model).to_dict(),
        "specs": [str(run.spec) for run in runs_of(model)],
        "ties": ties(model),
    }


def raw(model: nn.Module) -> dict[str, Any]:
    """A model as it is, masked values and all."""
    return {
        **{k: bits(v) for k, v in model.state_dict().items()},
        "identity": [id(p) for p in model.parameters()],
        "report": torchprune.report(model).to_dict(),
    }


def output(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        out = model(**batch) if isinstance(batch, dict) else model(batch)
    return next(iter(out.values())) if isinstance(out, dict) else out


def prune(model: nn.Module, spec: Any = None, data: Any = None, **options: Any) -> nn.Module:
    return torchprune.sparsify(model, spec or MagnitudeSpec(), data, **{**QUIET, **options})


# -- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", HUGGING, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_load_brings_back_every_family(family: Family, dtype: torch.dtype, tmp_path: Path) -> None:
    model = prune(family.make(dtype))
    before, batch = state(model), family.data(dtype)[0]
    torchprune.save(model, tmp_path / "saved")
    assert state(model) == before
    loaded = torchprune.load(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved")  # the loaded tensors are its own
    assert type(loaded) is type(model)
    assert state(loaded) == before
    assert torch.equal(output(loaded, batch), output(model, batch))
    assert not any(module.training for module in loaded.modules())
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_and_ties(tie: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = prune(llama(tie_word_embeddings=tie).to(dtype).eval())
    torchprune.save(model, tmp_path)
    loaded = torchprune.load(tmp_path)
    assert state(loaded) == state(model)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tie
    stored = load_file(tmp_path / "weights.safetensors")
    assert ("lm_head.weight" in stored) != tie
    assert torch.equal(output(loaded, tokens()[0]), output(model, tokens()[0]))


@pytest.mark.parametrize(
    "spec",
    [WandaSpec(pattern="2:4"), SparseGPTSpec(0.6), MagnitudeSpec(0.25, "block:4x4")],
    ids=lambda s: s.method,
)
def test_methods_come_back_with_their_records(spec: Any, tmp_path: Path) -> None:
    model = prune(mixtral().eval(), spec, tokens() if spec.needs_data else None)
    torchprune.save(model, tmp_path)
    loaded = torchprune.load(tmp_path)
    assert state(loaded) == state(model)
    layers = torchprune.report(loaded).layers
    assert {layer.method for layer in layers} >= {spec.method}
    assert any(layer.tokens for layer in layers) == spec.needs_data
    assert [run.spec for run in runs_of(loaded)] == [spec]


def test_fused_experts_are_masked_in_three_dimensions(tmp_path: Path) -> None:
    model = prune(mixtral().eval(), MagnitudeSpec(pattern="2:4"))
    torchprune.save(model, tmp_path)
    key = "model.layers.0.mlp.experts.gate_up_proj"
    assert read_manifest(tmp_path).tensors[key].encoding == "masked"
    assert torchprune.masks(torchprune.load(tmp_path))[key].dim() == 3


def test_keep_dense_can_be_densified_after_loading(tmp_path: Path) -> None:
    model = llama().eval()
    dense = {k: bits(v) for k, v in model.state_dict().items()}
    prune(model, SparseGPTSpec(), tokens(), keep_dense=True)
    torchprune.save(model, tmp_path)
    loaded = torchprune.load(tmp_path)
    assert state(loaded) == state(model)
    torchprune.densify(loaded)
    assert {k: bits(v) for k, v in loaded.state_dict().items()} == dense


@pytest.mark.parametrize("spec", [MagnitudeSpec(), SparseGPTSpec()], ids=lambda s: s.method)
def test_without_keep_dense_it_cannot(spec: Any, tmp_path: Path) -> None:
    model = prune(llama().eval(), spec, tokens())
    torchprune.save(model, tmp_path)
    loaded = torchprune.load(tmp_path)
    before = raw(loaded)
    with pytest.raises(MaskError, match="not saved"):
        torchprune.densify(loaded)
    assert raw(loaded) == before


def test_a_folded_model_is_plain_and_packed(tmp_path: Path) -> None:
    model = torchprune.fold(prune(llama().eval(), MagnitudeSpec(0.7)))
    torchprune.save(model, tmp_path)
    encodings = {k: e.encoding for k, e in read_manifest(tmp_path).tensors.items()}
    assert encodings["model.layers.0.mlp.up_proj.weight"] == "packed"
    assert encodings["model.embed_tokens.weight"] == "dense"
    loaded = torchprune.load(tmp_path)
    assert state(loaded) == state(model)
    assert not torchprune.masks(loaded)
    assert list(loaded.state_dict()) == list(model.state_dict())


def test_loading_twice_is_loading_once(tmp_path: Path) -> None:
    model = prune(llama().eval())
    torchprune.save(model, tmp_path / "one")
    torchprune.save(torchprune.load(tmp_path / "one"), tmp_path / "two")
    for name in ("weights.safetensors", "manifest.json", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_strange_values_survive(tmp_path: Path) -> None:
    model = prune(llama().eval())
    weight = model.model.layers[0].mlp.up_proj
    mask = torchprune.masks(model)["model.layers.0.mlp.up_proj.weight"]
    original = weight.parametrizations.weight.original.data
    words = original.view(torch.int32)
    places = mask.reshape(-1).nonzero().view(-1)[:5]
    nan = torch.tensor(float("nan")).view(torch.int32) | 77
    strange = [float("inf"), float("-inf"), -0.0, 1e-45]
    original.view(-1)[places[:4]] = torch.tensor(strange)
    words.view(-1)[places[4]] = nan
    original[~mask] = float("nan")  # hidden by the mask
    torchprune.save(model, tmp_path)
    loaded = torchprune.load(tmp_path)
    assert state(loaded) == state(model)
    back = plain(loaded).model.layers[0].mlp.up_proj.weight.detach().view(torch.int32)
    assert int(back.view(-1)[places[4]]) == int(nan)


def test_report_prints_the_same(tmp_path: Path) -> None:
    data = [{"input_ids": t} for t in tokens()]
    spec = WandaSpec(0.5, ignore="*.q_proj", overrides={"*.k_proj": "dense", "*.v_proj": 0.25})
    model = prune(llama().eval(), spec, data, max_batches=2)
    torchprune.save(model, tmp_path)
    loaded = torchprune.load(tmp_path)
    assert str(torchprune.report(loaded)) == str(torchprune.report(model))
    skipped = torchprune.report(loaded).skipped
    assert skipped["model.layers.0.self_attn.q_proj"] == "ignored"
    assert "overrides" in skipped["model.layers.1.self_attn.k_proj"]
    assert any("max_batches" in note for note in torchprune.report(loaded).notes)
    assert [run.spec for run in runs_of(loaded)] == [spec]


def test_types_and_callables_become_the_names_they_chose(tmp_path: Path) -> None:
    spec = MagnitudeSpec(targets=[nn.Linear, "*.experts.*"], ignore=lambda m, name: "0" in name)
    model = prune(mixtral().eval(), spec)
    torchprune.save(model, tmp_path)
    (run,) = runs_of(torchprune.load(tmp_path))
    assert "model.layers.1.self_attn.q_proj" in run.spec.targets
    assert "*.experts.*" in run.spec.targets
    assert run.spec.ignore
    assert all("0" in name for name in run.spec.ignore)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_settings_come_back(kind: str, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM._from_config(llama().config, attn_implementation=kind).eval()
    model.generation_config.max_new_tokens = 7
    before = model.config.to_dict()
    torchprune.save(model, tmp_path)
    assert model.config.to_dict() == before
    loaded = torchprune.load(tmp_path)
    assert loaded.config._attn_implementation == kind
    assert loaded.generation_config.max_new_tokens == 7
    assert torch.equal(output(loaded, tokens()[0]), output(model, tokens()[0]))


def test_loading_takes_no_random_numbers(tmp_path: Path) -> None:
    torchprune.save(FAMILIES["vit"].make(), tmp_path)  # its class token is drawn when it is built
    random = torch.get_rng_state()
    torchprune.load(tmp_path)
    assert torch.equal(random, torch.get_rng_state())


def test_defaults_of_the_process_do_not_matter(tmp_path: Path) -> None:
    model = prune(llama().eval())
    torchprune.save(model, tmp_path)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            loaded = torchprune.load(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert state(loaded) == state(model)


def test_loaded_tensors_are_apart_from_the_file_and_each_other(tmp_path: Path) -> None:
    torchprune.save(prune(llama(tie_word_embeddings=False)), tmp_path)
    loaded = torchprune.load(tmp_path)
    before = state(loaded)
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    path = tmp_path / "weights.safetensors"
    with path.open("rb+") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * (path.stat().st_size // 2))
    assert state(loaded) == before


def test_a_tokenizer_is_saved_along(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, directory: str) -> None:
            (Path(directory) / "tokenizer.json").write_text("{}")

    torchprune.save(llama(), tmp_path, tokenizer=Tokenizer())
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.57), (torch.float32, 0.535)])
@pytest.mark.parametrize("folded", [False, True])
def test_half_pruned_takes_little_more_than_half(
    dtype: torch.dtype, most: float, folded: bool, tmp_path: Path
) -> None:
    model = nn.Sequential(*(nn.Linear(384, 384) for _ in range(4))).to(dtype)
    prune(model, MagnitudeSpec(0.5))
    save_file(plain(model).state_dict(), tmp_path / "dense")
    torchprune.save(torchprune.fold(model) if folded else model, tmp_path / "saved")
    size = sum(f.stat().st_size for f in (tmp_path / "saved").iterdir())
    assert size <= most * (tmp_path / "dense").stat().st_size


# -- models that are not of transformers -----------------------------------------------------------


class Net(nn.Module):
    """Convolutions, running statistics, a tie, a shared module, a table outside the state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.embed = nn.Embedding(8, 8)
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(8.0), persistent=False)
        self.register_buffer("empty", torch.zeros(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.norm(self.conv(x))).mean((2, 3))
        return self.head(self.again(torch.relu(self.first(x))) + self.table)


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Net()
        with torch.no_grad():
            model.train()(torch.randn(2, 3, 8, 8))  # running statistics of their own
    return model.eval()


def test_other_models_are_filled(tmp_path: Path) -> None:
    model = prune(net())
    model.table.add_(0.5)
    torchprune.save(model, tmp_path)
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(CheckpointError, match=r"Net, .*load_into"):
        torchprune.load(tmp_path)
    fresh = net(seed=1)
    parameters = {id(p) for p in fresh.parameters()}
    assert torchprune.load_into(fresh, tmp_path) is fresh
    assert state(fresh) == state(model)
    assert {id(p) for p in fresh.parameters()} == parameters
    assert fresh.first is fresh.again
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(fresh(image), model(image))


def test_masked_models_are_filled_in_place(tmp_path: Path) -> None:
    model = prune(net(), MagnitudeSpec(0.75))
    torchprune.save(model, tmp_path)
    other = prune(net(seed=1), MagnitudeSpec(0.25)).train()
    masks = {k: m.data_ptr() for k, m in torchprune.masks(other).items()}
    torchprune.load_into(other, tmp_path)
    assert {k: m.data_ptr() for k, m in torchprune.masks(other).items()} == masks
    assert other.training
    assert other.conv.training
    other.eval()
    assert state(other) == state(model)
    with pytest.raises(MaskError, match="not saved"):
        torchprune.densify(other)


def test_a_model_keeps_its_layout(tmp_path: Path) -> None:
    model = prune(net())
    torchprune.save(model, tmp_path)
    fresh = net(seed=1).to(memory_format=torch.channels_last)
    torchprune.load_into(fresh, tmp_path)
    assert state(fresh) == state(model)
    kernel = fresh.conv.parametrizations.weight.original
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    torchprune.save(fresh, tmp_path)  # and it is saved in any
    torchprune.load_into(net(seed=2), tmp_path)


def test_other_parametrizations_are_left_as_they_are(tmp_path: Path) -> None:
    def build(seed: int) -> nn.Module:
        model = net(seed)
        nn.utils.parametrizations.weight_norm(model.conv)
        return model

    model = prune(build(0))
    torchprune.save(model, tmp_path)
    fresh = build(1)
    torchprune.load_into(fresh, tmp_path)
    assert state(fresh) == state(model)
    assert "conv.weight" not in torchprune.masks(fresh)
    assert torch.equal(fresh.conv.weight, model.conv.weight)


def test_a_mask_that_the_file_lacks_goes(tmp_path: Path) -> None:
    model = net()
    torchprune.save(model, tmp_path)
    other = prune(net(seed=1))
    torchprune.load_into(other, tmp_path)
    assert not torchprune.masks(other)
    assert state(other) == state(model)
    assert torchprune.report(other).skipped == {}


def test_training_goes_on_after_load_into(tmp_path: Path) -> None:
    model = prune(net())
    torchprune.save(model, tmp_path)
    fresh = net(seed=1).train()
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=0.1)
    torchprune.load_into(fresh, tmp_path)
    before = {k: v.clone() for k, v in plain(fresh).state_dict().items()}
    fresh(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    after = plain(fresh).state_dict()
    assert not torch.equal(after["conv.weight"], before["conv.weight"])
    kept = torchprune.masks(fresh)["conv.weight"]
    assert not after["conv.weight"][~kept].any()


def test_ties_are_made_again(tmp_path: Path) -> None:
    torchprune.save(net(), tmp_path)
    fresh = net(seed=1)
    fresh.head.weight = nn.Parameter(torch.zeros(8, 8))
    torchprune.load_into(fresh, tmp_path)
    assert fresh.head.weight is fresh.embed.weight


def test_transformers_models_can_be_filled_too(tmp_path: Path) -> None:
    model = prune(llama().eval())
    torchprune.save(model, tmp_path)
    fresh = llama().eval()
    torchprune.load_into(fresh, tmp_path)
    assert state(fresh) == state(model)


class Box(nn.Module):
    """Any tensors at all."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        for i, tensor in enumerate(held):
            if i % 2 and tensor.is_floating_point():
                self.register_parameter(f"p{i}", nn.Parameter(tensor))
            else:
                self.register_buffer(f"b{i}", tensor)


@settings(max_examples=40)
@given(st.lists(tensors(), max_size=5))
def test_any_tensors_come_back(held: list[Tensor]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        torchprune.save(Box(held), directory)
        box = Box([torch.zeros_like(t) for t in held])
        torchprune.load_into(box, directory)
    for i, tensor in enumerate(held):
        back = getattr(box, f"p{i}", None)
        assert bits(getattr(box, f"b{i}") if back is None else back) == bits(tensor)


# -- what cannot be saved --------------------------------------------------------------------------


class Extra(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"step": 3}


def tied_and_masked() -> nn.Module:
    model = prune(net())
    model.embed.weight = model.conv.parametrizations.weight.original
    model.head.weight = model.embed.weight
    return model


def doubly_parametrized() -> nn.Module:
    model = prune(net())
    nn.utils.parametrize.register_parametrization(model.conv, "weight", nn.Identity())
    return model


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: nn.Sequential(Extra(4, 4)), r"^0 has extra state"),
        (lambda: nn.Linear(4, 4, device="meta"), r"^weight is on the meta device"),
        (lambda: nn.Linear(4, 4, dtype=torch.complex128), r"weight is torch.complex128"),
        (lambda: Box([torch.eye(3).to_sparse()]), r"b0 is a Tensor of layout torch.sparse_coo"),
        (tied_and_masked, r"embed.weight is tied to conv.weight, and masked"),
        (doubly_parametrized, r"conv.weight has another parametrization beside its mask"),
    ],
)
def test_what_cannot_be_saved_is_refused(
    build: Callable[[], nn.Module], match: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=match):
        torchprune.save(build(), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


# -- the directory ---------------------------------------------------------------------------------


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def test_an_earlier_save_is_replaced_whole(tmp_path: Path) -> None:
    torchprune.save(llama(), tmp_path / "saved")
    torchprune.save(net(), tmp_path / "saved")
    assert set(contents(tmp_path)) == {"saved/manifest.json", "saved/weights.safetensors"}


def test_parents_are_made_and_links_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    torchprune.save(net(), tmp_path / "link")
    torchprune.save(net(), tmp_path / "a" / "b")
    assert (tmp_path / "link").is_symlink()
    assert set(contents(tmp_path / "real")) == set(contents(tmp_path / "a" / "b"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "link", "real"]


@pytest.mark.parametrize("manifest", [None, '{"format": "other"}', "{", "[1]"])
def test_other_directories_are_refused(manifest: str | None, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="something other than a torchprune save"):
        torchprune.save(net(), tmp_path)
    assert contents(tmp_path) == before


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        torchprune.save(net(), tmp_path / "file")
    assert contents(tmp_path) == {"file": b"mine"}


class Crash(BaseException):
    """Not an Exception, as a keyboard interrupt is none."""


def crash(*_: object, **__: object) -> None:
    raise Crash


def half_written(blobs: dict[str, Tensor], path: str) -> None:
    Path(path).write_bytes(b"\x10\0\0\0\0\0\0\0{")
    raise Crash


FAILURES: dict[str, tuple[str, Any]] = {
    "weights": ("torchprune.encoding.save_file", half_written),
    "manifest": ("torchprune.checkpoint.write_manifest", crash),
    "config": ("torchprune.checkpoint.write_config", crash),
    "flush": ("torchprune.staging._flush", crash),
    "exchange": ("torchprune.staging._exchange", crash),
}


@pytest.mark.parametrize("where", FAILURES)
@pytest.mark.parametrize("cleaned", [True, False])
def test_a_failure_midway_leaves_the_old_one(
    where: str, cleaned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "saved"
    torchprune.save(prune(net()), old)
    before = contents(old)
    with monkeypatch.context() as patch:
        patch.setattr(*FAILURES[where])
        if not cleaned:  # as when the process dies: nothing can tidy up
            patch.setattr("torchprune.staging.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(Crash):
            torchprune.save(net(seed=1), old)
    assert contents(old) == before
    assert len(list(tmp_path.iterdir())) == (1 if cleaned else 2)
    torchprune.load_into(net(), old)
    torchprune.save(net(seed=1), old)
    assert contents(old) != before


def test_a_failed_rename_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchprune.save(net(), tmp_path / "saved")
    before, rename = contents(tmp_path), Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError("disk on fire")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk on fire"):
        torchprune.save(net(seed=1), tmp_path / "saved")
    assert contents(tmp_path) == before


def test_nothing_shows_before_all_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    exchange = staging._exchange

    def watching(*places: Path) -> None:
        seen.append((tmp_path / "saved").exists())
        exchange(*places)

    monkeypatch.setattr(staging, "_exchange", watching)
    torchprune.save(net(), tmp_path / "saved")
    assert seen == [False]


# -- what cannot be loaded -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama with tensors of every encoding, one of them masked with its dense values."""
    directory = tmp_path_factory.mktemp("good") / "saved"
    model = prune(llama(tie_word_embeddings=True).eval(), MagnitudeSpec(targets="*.layers.0"))
    prune(model, SparseGPTSpec(targets="*.1.mlp.up_proj"), tokens(), keep_dense=True)
    with torch.no_grad():
        model.model.embed_tokens.weight[:30] = 0
    torchprune.save(model, directory)
    found = {e.encoding for e in read_manifest(directory).tensors.values()}
    assert found == {"tied", "masked", "packed", "dense"}
    return directory


@pytest.fixture
def bad(good: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(good, tmp_path / "bad"))


@contextmanager
def cheap() -> Iterator[None]:
    """Refusals take no time and no memory."""
    scale = 1 if sys.platform == "darwin" else 1024
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale, time.process_time()
    yield
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale - peak < 256 << 20


def refused(directory: Path, match: str, *, into: bool = True) -> None:
    """`load` raises the error, and so does `load_into`, which leaves the model alone."""
    with cheap(), pytest.raises(CheckpointError, match=match):
        torchprune.load(directory)
    if into:
        model = prune(llama(tie_word_embeddings=True).eval(), MagnitudeSpec(0.25))
        before = raw(model)
        with cheap(), pytest.raises(CheckpointError, match=match):
            torchprune.load_into(model, directory)
        assert raw(model) == before


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_blobs(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    blobs = load_file(directory / "weights.safetensors")
    change(blobs)
    save_file(blobs, directory / "weights.safetensors")


def edit_header(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what the weights file claims, and leave its data."""
    path = directory / "weights.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


MASKED = "model.layers.0.mlp.up_proj.weight"
DENSE = "model.layers.1.mlp.down_proj.weight"
KEPT = "model.layers.1.mlp.up_proj.weight"
PACKED = "model.embed_tokens.weight"
TIED = "lm_head.weight"


def test_the_good_one_loads(good: Path) -> None:
    loaded = torchprune.load(good)
    fresh = torchprune.load_into(llama(tie_word_embeddings=True).eval(), good)
    assert state(fresh) == state(loaded)


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "weights.safetensors"])
@pytest.mark.parametrize("share", [0, 0.02, 0.3, 0.7, 0.999])
def test_truncated_files(name: str, share: float, bad: Path) -> None:
    content = (bad / name).read_bytes().rstrip()
    (bad / name).write_bytes(content[: int(len(content) * share)])
    refused(bad, "damaged or truncated|truncated, or no safetensors", into=name != "config.json")


@pytest.mark.parametrize("cut", [1, 7, 8, 9, "header", "first byte", "last byte"])
def test_weights_truncated_at_every_kind_of_place(cut: int | str, bad: Path) -> None:
    path = bad / "weights.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    ends = {"header": header, "first byte": header + 1, "last byte": len(content) - 1}
    path.write_bytes(content[: ends[cut] if isinstance(cut, str) else cut])
    refused(bad, "truncated")


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "weights.safetensors"])
def test_missing_files(name: str, bad: Path) -> None:
    (bad / name).unlink()
    refused(bad, name, into=name != "config.json")


def test_missing_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no directory")


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b" " * (MAX_JSON + 1), "larger than 32 MiB"),
        (b"[]", "expected an object"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"version": ' + b"9" * 10_000 + b"}", "not JSON"),
    ],
    ids=["lists", "objects", "huge", "list", "bytes", "digits"],
)
def test_hostile_json(name: str, content: bytes, match: str, bad: Path) -> None:
    (bad / name).write_bytes(content)
    refused(bad, match, into=name == "manifest.json")


@pytest.mark.parametrize("name", ["weights", "config", "generation"])
@pytest.mark.parametrize(
    "value", ["../secret", "/etc/passwd", "..", "", ".hidden", "a\\b", "a\0", 5]
)
def test_hostile_names(name: str, value: Any, bad: Path) -> None:
    (bad.parent / "secret").write_text("{}")
    edit(bad / "manifest.json", lambda m: m.update({name: value}))
    refused(bad, "plain name|must be", into=name == "weights")


def test_links_that_lead_outside(bad: Path) -> None:
    shutil.move(bad / "weights.safetensors", bad.parent / "secret")
    (bad / "weights.safetensors").symlink_to(bad.parent / "secret")
    refused(bad, "leads outside")


def test_links_that_stay_inside(bad: Path) -> None:
    (bad / "weights.safetensors").rename(bad / "blob")
    (bad / "weights.safetensors").symlink_to("blob")
    torchprune.load(bad)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors"])
def test_a_pipe_does_not_hang(name: str, bad: Path) -> None:
    (bad / name).unlink()
    os.mkfifo(bad / name)
    refused(bad, "no regular file")


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.5, 10**30])
def test_other_versions(version: Any, bad: Path) -> None:
    edit(bad / "manifest.json", lambda m: m.update(version=version))
    refused(bad, "format version .* reads version 1")


def test_other_formats(bad: Path) -> None:
    edit(bad / "manifest.json", lambda m: m.update(format="pytorch"))
    refused(bad, "not of torchprune")


SHAPES: list[Any] = [
    [10**9, 10**9],
    [10**30, 1],
    [-48, 32],
    [48.0, 32],
    [True, 32],
    ["48", 32],
    [1] * 100,
    None,
    {},
    48,
    [],
    [48],
    [32, 48],
    [0, 32],
]


@pytest.mark.parametrize("key", [MASKED, DENSE, PACKED, TIED])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_absurd_shapes(key: str, shape: Any, bad: Path) -> None:
    if list(read_manifest(bad).tensors[key].shape) == shape:
        pytest.skip("the right value: nothing to refuse")
    edit(bad / "manifest.json", lambda m: m["tensors"][key].update(shape=shape))
    refused(bad, "shape|expected|another")


def test_a_shape_of_true_is_no_one(tmp_path: Path) -> None:
    torchprune.save(Box([torch.zeros(1, 3)]), tmp_path)
    edit(tmp_path / "manifest.json", lambda m: m["tensors"]["b0"].update(shape=[True, 3]))
    with pytest.raises(CheckpointError, match="whole numbers"):
        torchprune.load_into(Box([torch.zeros(1, 3)]), tmp_path)


@pytest.mark.parametrize("key", [MASKED, DENSE, PACKED, TIED])
@pytest.mark.parametrize("dtype", ["float16", "int32", "complex64", "object", "nn", 32, None, []])
def test_wrong_dtypes(key: str, dtype: Any, bad: Path) -> None:
    edit(bad / "manifest.json", lambda m: m["tensors"][key].update(dtype=dtype))
    refused(bad, "dtype|expected|mask belongs")


@pytest.mark.parametrize("key", [MASKED, DENSE, PACKED, TIED])
@pytest.mark.parametrize("encoding", ["dense", "packed", "masked", "tied", "pickle", 3, None])
def test_wrong_encodings(key: str, encoding: Any, bad: Path) -> None:
    if read_manifest(bad).tensors[key].encoding == encoding:
        pytest.skip("the right value: nothing to refuse")
    edit(bad / "manifest.json", lambda m: m["tensors"][key].update(encoding=encoding))
    refused(bad, "encoding|belong|missing|not in the manifest")


def test_a_ring_of_ties(bad: Path) -> None:
    def ring(m: Any) -> None:
        m["tensors"][PACKED].update(encoding="tied", to=TIED)

    edit(bad / "manifest.json", ring)
    refused(bad, "tied to .* absent")


@pytest.mark.parametrize("to", ["nothing", TIED, DENSE, 3, None])
def test_wrong_ties(to: Any, bad: Path) -> None:
    edit(bad / "manifest.json", lambda m: m["tensors"][TIED].update(to=to))
    refused(bad, "tied to|belongs to tied|to must be")


def test_a_tie_to_a_masked_tensor_of_another_module(bad: Path) -> None:
    def retie(m: Any) -> None:
        entry = m["tensors"]["model.layers.1.mlp.gate_proj.weight"]
        entry.update(encoding="tied", to=MASKED)

    edit(bad / "manifest.json", retie)
    edit_blobs(bad, lambda b: b.pop("model.layers.1.mlp.gate_proj.weight"))
    refused(bad, "expected one module")


def test_missing_tensors_in_both_files(bad: Path) -> None:
    edit(bad / "manifest.json", lambda m: m["tensors"].pop(DENSE))
    edit_blobs(bad, lambda b: b.pop(DENSE))
    refused(bad, f"{DENSE}: expected by the LlamaForCausalLM, absent")


def test_extra_tensors_in_both_files(bad: Path) -> None:
    extra = {"dtype": "float32", "shape": [2], "encoding": "dense"}
    edit(bad / "manifest.json", lambda m: m["tensors"].update(more=extra))
    edit_blobs(bad, lambda b: b.update(more=torch.zeros(2)))
    refused(bad, "more: in the saved model, but the LlamaForCausalLM has no such")


@pytest.mark.parametrize("blob", [DENSE, f"{MASKED}.bits", f"{MASKED}.values", f"{KEPT}.dense"])
def test_missing_and_extra_blobs(blob: str, bad: Path) -> None:
    edit_blobs(bad, lambda b: b.update({f"{blob}2": b.pop(blob)}))
    refused(bad, "is missing|not in the manifest")


@pytest.mark.parametrize(
    ("blob", "make"),
    [
        (f"{MASKED}.bits", lambda t: t[:-1]),
        (f"{MASKED}.bits", lambda t: t.view(torch.int8)),
        (f"{MASKED}.bits", lambda t: t.view(2, -1)),
        (f"{MASKED}.values", lambda t: t.to(torch.bfloat16)),
        (f"{MASKED}.values", lambda t: t.view(1, -1)),
        (f"{KEPT}.dense", lambda t: t[:-1]),
        (DENSE, lambda t: t.T.contiguous()),
        (DENSE, lambda t: t.to(torch.float64)),
    ],
)
def test_blobs_of_another_form(blob: str, make: Callable[[Tensor], Tensor], bad: Path) -> None:
    edit_blobs(bad, lambda b: b.update({blob: make(b[blob]).clone()}))
    refused(bad, f"{blob}: expected")


@pytest.mark.parametrize(
    "make", [lambda t: t[:-1], lambda t: torch.cat([t, t[:1]]), lambda t: t[:0]]
)
@pytest.mark.parametrize("key", [MASKED, PACKED])
def test_bits_and_values_that_disagree(
    key: str, make: Callable[[Tensor], Tensor], bad: Path
) -> None:
    edit_blobs(bad, lambda b: b.update({f"{key}.values": make(b[f"{key}.values"]).clone()}))
    refused(bad, "bits set but")


def test_bits_past_the_end(tmp_path: Path) -> None:
    model = prune(nn.Sequential(nn.Linear(5, 3)))
    torchprune.save(model, tmp_path)
    edit_blobs(tmp_path, lambda b: b["0.weight.bits"][-1:].bitwise_or_(128))
    with pytest.raises(CheckpointError, match="past its last weight"):
        torchprune.load_into(nn.Sequential(nn.Linear(5, 3)), tmp_path)


def test_bytes_that_are_no_bool(tmp_path: Path) -> None:
    torchprune.save(Box([torch.tensor([True, False, True])]), tmp_path)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(CheckpointError, match="no bool"):
        torchprune.load_into(Box([torch.zeros(3, dtype=torch.bool)]), tmp_path)


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "shape beyond the data": lambda h: h[DENSE].update(shape=[10**9, 10**9]),
    "shape overflow": lambda h: h[DENSE].update(shape=[2**62, 8]),
    "negative shape": lambda h: h[DENSE].update(shape=[-32, 48]),
    "offsets past the end": lambda h: h[DENSE].update(data_offsets=[0, 2**50]),
    "offsets backwards": lambda h: h[DENSE]["data_offsets"].reverse(),
    "overlap": lambda h: h[DENSE].update(data_offsets=h[PACKED + ".values"]["data_offsets"]),
    "a hole": lambda h: h.pop(DENSE),
    "unknown dtype": lambda h: h[DENSE].update(dtype="Q7"),
    "another dtype": lambda h: h[DENSE].update(dtype="I32"),
    "no dtype": lambda h: h[DENSE].pop("dtype"),
    "metadata": lambda h: h.update(__metadata__={"a": 5}),
    "list": lambda h: h.update({DENSE: []}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_lying_headers(case: str, bad: Path) -> None:
    edit_header(bad, HEADERS[case])
    refused(bad, "damaged or truncated|expected F32")


@pytest.mark.parametrize("claim", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_lying_header_lengths(claim: int, bad: Path) -> None:
    path = bad / "weights.safetensors"
    path.write_bytes(claim.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(bad, "truncated")


def test_a_header_of_absurd_length(bad: Path) -> None:
    with (bad / "weights.safetensors").open("wb") as file:
        file.write((1 << 34).to_bytes(8, "little"))
        file.truncate(1 << 35)  # sparse: it takes no disk
    refused(bad, "which no header has")


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_hidden_layers": 10**6}, "far more"),
    "layers to list": ({"num_hidden_layers": 10**8}, "far more"),
    "layers to build": ({"num_hidden_layers": 3000}, "far more"),
    "more layers": ({"num_hidden_layers": 3}, r"layers\.2\..* absent"),
    "fewer layers": ({"num_hidden_layers": 1}, r"layers\.1\..* no such tensor"),
    "no layers": ({"num_hidden_layers": -1}, "no such tensor"),
    "width": ({"hidden_size": 64}, "expected parameter float32"),
    "absurd width": ({"hidden_size": 10**12}, "expected|cannot build"),
    "heads": ({"num_attention_heads": 0}, "cannot build"),
    "vocabulary": ({"vocab_size": 10**12}, r"expected parameter float32 \(1000000000000, 32\)"),
    "labels": ({"num_labels": 4 * 10**6}, "far more"),
    "word": ({"hidden_size": "wide"}, "cannot build"),
    "rope": ({"rope_parameters": {"rope_type": "none"}}, "cannot build"),
    "none": ({"architectures": None}, "names no model"),
    "two": ({"architectures": ["LlamaModel", "LlamaForCausalLM"]}, "names no model"),
    "auto": ({"architectures": ["AutoModelForCausalLM"]}, "names no model"),
    "module": ({"architectures": ["modeling_utils"]}, "names no model"),
    "dunder": ({"architectures": ["__class__"]}, "names no model"),
    "dotted": ({"architectures": ["os.system"]}, "names no model"),
    "base": ({"architectures": ["PreTrainedModel"]}, "cannot be built by itself"),
    "other": ({"architectures": ["GPT2LMHeadModel"]}, "expected by the GPT2LMHeadModel"),
    "foreign": ({"architectures": ["Evil"], "auto_map": {"AutoModel": "evil.Evil"}}, "names no"),
    "methods": ({"to_dict": 3, "get_text_config": 4}, "cannot build"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_hostile_configs(case: str, bad: Path) -> None:
    change, match = CONFIGS[case]
    edit(bad / "config.json", lambda c: c.update(change))
    refused(bad, match, into=False)


def test_large_tables_are_not_made(tmp_path: Path) -> None:
    torchprune.save(FAMILIES["bert"].make(), tmp_path)
    # BERT's position_ids are a table as long as the config says, outside the state_dict.
    edit(tmp_path / "config.json", lambda c: c.update(max_position_embeddings=10**11))
    refused(tmp_path, "asks for 16[0-9]* bytes of tables", into=False)


def test_foreign_code_is_neither_kept_nor_fetched(bad: Path) -> None:
    def poison(config: Any) -> None:
        config["auto_map"] = {"AutoModelForCausalLM": "evil--evil.Evil"}
        config["attn_implementation"] = "evil/attention"
        config["_attn_implementation"] = "evil/attention"
        config["experts_implementation"] = {"": "evil"}

    edit(bad / "config.json", poison)
    loaded = torchprune.load(bad)
    assert not hasattr(loaded.config, "auto_map")
    assert loaded.config._attn_implementation == "sdpa"


def test_without_transformers_the_extra_is_named(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"torchprune\[transformers\]"):
        torchprune.load(good)


HOSTILE: list[Any] = [None, -1, True, 2**70, 1e308, "x", "", [], {}, [[1]], {"a": {}}, "../x"]


def paths(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    if at:
        yield at
    for key in (
        data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else []
    ):
        yield from paths(data[key], (*at, key))


def value_at(data: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        data = data[key]
    return data


def with_value(data: Any, at: tuple[Any, ...], value: Any) -> Any:
    data = copy.deepcopy(data)
    value_at(data, at[:-1])[at[-1]] = value
    return data


def loads_or_says_why(load: Callable[[], Any]) -> bool:
    """Whether a load succeeds; no other error than CheckpointError, nor a long one, is let pass."""
    with cheap():
        try:
            load()
        except CheckpointError as error:
            if len(str(error)) > 800:
                raise
            return False
    return True


def test_no_value_anywhere_in_the_manifest_breaks_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
    prune(model, SparseGPTSpec(targets="0"), [torch.randn(9, 6)], keep_dense=True)
    torchprune.save(model, tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    fresh = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
    before, loads = raw(fresh), 0
    for at in paths(manifest):
        for value in HOSTILE:
            path.write_text(json.dumps(with_value(manifest, at, value)))
            if loads_or_says_why(lambda: torchprune.load_into(copy.deepcopy(fresh), tmp_path)):
                loads += 1
                free = ("runs", "made_with", "architecture", "config", "generation")
                assert at[0] in free or "record" in at or value_at(manifest, at) == value, at
    assert loads > 20  # notes and errors may say what they like
    assert raw(fresh) == before


def test_no_value_in_the_config_breaks_it(bad: Path) -> None:
    path = bad / "config.json"
    config = json.loads(path.read_text())
    for at in paths(config):
        for value in (None, -1, 2**70, "x", []):
            path.write_text(json.dumps(with_value(config, at, value)))
            loads_or_says_why(lambda: torchprune.load(bad))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small") / "saved"
    torchprune.save(prune(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))), directory)
    return directory


@settings(max_examples=150)
@given(st.data())
def test_flipped_bytes_are_damage_or_data(small: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(small, directory, dirs_exist_ok=True)
        name = data.draw(st.sampled_from(["manifest.json", "weights.safetensors"]))
        path = Path(directory) / name
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(content) - 1))
            content[at] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        fresh = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
        before = raw(fresh)
        if not loads_or_says_why(lambda: torchprune.load_into(fresh, directory)):
            assert raw(fresh) == before


# -- models that do not fit ------------------------------------------------------------------------


def narrower() -> nn.Module:
    model = net()
    model.conv = nn.Conv2d(3, 8, 5)
    return model


def shorter() -> nn.Module:
    model = net()
    del model.grouped
    return model


def longer() -> nn.Module:
    model = net()
    model.more = nn.Linear(2, 2)
    return model


def parametrized() -> nn.Module:
    model = net()
    nn.utils.parametrize.register_parametrization(model.conv, "weight", nn.Identity())
    return model


def on_meta() -> nn.Module:
    return net().to("meta")


def unshared() -> nn.Module:
    model = net()
    model.again = nn.Linear(8, 8)
    return model


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (narrower, r"conv.weight: expected parameter float32 \(8, 3, 5, 5\).*got .*\(8, 3, 3, 3\)"),
        (shorter, r"grouped.weight: in the saved model, but the Net has no such"),
        (longer, r"more.weight: expected by the Net, absent"),
        (lambda: net().half(), r"expected \w+ float16 .* got \w+ float32"),
        (parametrized, r"conv.parametrizations.weight.original: expected by the Net"),
        (on_meta, r"expected a plain tensor in the model, but it is on the meta device"),
        (unshared, r"again.weight: expected one module with first.weight, got two"),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_a_model_that_differs_is_left_alone(
    build: Callable[[], nn.Module], match: str, masked: bool, tmp_path: Path
) -> None:
    torchprune.save(prune(net()), tmp_path)
    model = build()
    if masked and build is not on_meta:
        prune(model, MagnitudeSpec(0.25, targets="first"))
    before = model.state_dict() if build is on_meta else raw(model)
    with pytest.raises(CheckpointError, match=match):
        torchprune.load_into(model, tmp_path)
    assert build is on_meta or raw(model) == before


def test_a_tie_that_the_file_lacks_is_refused(tmp_path: Path) -> None:
    model = net()
    model.head.weight = nn.Parameter(torch.zeros(8, 8))
    torchprune.save(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"head.weight: expected two tensors.*got one tied"):
        torchprune.load_into(net(), tmp_path)


def test_shrunk_transformers_models_are_refused_by_load(tmp_path: Path) -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 24, bias=False)
    torchprune.save(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"up_proj.weight: expected .*\(48, 32\).*\(24, 32\)"):
        torchprune.load(tmp_path)


def test_no_pickle_anywhere(good: Path) -> None:
    assert {p.suffix for p in good.iterdir()} == {".json", ".safetensors"}


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_every_file_is_as_readable_as_the_umask_lets_files_be(tmp_path: Path) -> None:
    torchprune.save(Box([torch.zeros(1, 3)]), tmp_path / "saved")
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    modes = {path.stat().st_mode for path in (tmp_path / "saved").iterdir()}
    assert modes == {ordinary.stat().st_mode}
