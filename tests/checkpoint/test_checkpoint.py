"""Saving and loading: what comes back, and that nothing is left half done."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from any_tensors import tensors
from families import FAMILIES, Family, llama, mixtral, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from saved import HUGGING, Box, Crash, bits, contents, crash, net, output, plain, prune, raw, state
from torch import Tensor, nn

import torchprune
from torchprune import (
    PCG,
    ADMMSpec,
    BestSpec,
    MagnitudeSpec,
    Reconstruct,
    RIASpec,
    SparseGPTSpec,
    WandaSpec,
)
from torchprune.checkpoint import whole_files
from torchprune.checkpoint.manifest import read_manifest
from torchprune.errors import CheckpointError, MaskError
from torchprune.masking.mask import masked_layers
from torchprune.reports.report import runs_of

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
    [
        WandaSpec(pattern="2:4"),
        SparseGPTSpec(0.6),
        MagnitudeSpec(0.25, "block:4x4"),
        MagnitudeSpec(0.25, refine=PCG(3, 0.2)),
        RIASpec(power=0.7),
        ADMMSpec(0.5, alpha=0.5, refine=None, steps=4, ramp=3),
        BestSpec(pattern="2:4", reconstruct=Reconstruct(epochs=1)),
    ],
    ids=lambda s: f"{s.method}-{s.pattern}-{bool(s.refine)}",
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
    bits = {y.key: m.bits.data_ptr() for y, m in masked_layers(other)}
    torchprune.load_into(other, tmp_path)
    assert {y.key: m.bits.data_ptr() for y, m in masked_layers(other)} == bits
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

    with pytest.warns(UserWarning, match="conv: its weight already has another parametrization"):
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
        (doubly_parametrized, r"conv: its weight has another parametrization beside its mask"),
    ],
)
def test_what_cannot_be_saved_is_refused(
    build: Callable[[], nn.Module], match: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=match):
        torchprune.save(build(), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


# -- the directory ---------------------------------------------------------------------------------


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


def half_written(blobs: dict[str, Tensor], path: str) -> None:
    Path(path).write_bytes(b"\x10\0\0\0\0\0\0\0{")
    raise Crash


FAILURES: dict[str, tuple[str, Any]] = {
    "weights": ("torchprune.checkpoint.encoding.save_file", half_written),
    "manifest": ("torchprune.checkpoint.save_load.write_manifest", crash),
    "config": ("torchprune.checkpoint.save_load.write_config", crash),
    "flush": ("torchprune.checkpoint.whole_files.flush", crash),
    "exchange": ("torchprune.checkpoint.whole_files._exchange", crash),
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
            patch.setattr("torchprune.checkpoint.whole_files.shutil.rmtree", lambda *_, **__: None)
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
    exchange = whole_files._exchange

    def watching(*places: Path) -> None:
        seen.append((tmp_path / "saved").exists())
        exchange(*places)

    monkeypatch.setattr(whole_files, "_exchange", watching)
    torchprune.save(net(), tmp_path / "saved")
    assert seen == [False]
