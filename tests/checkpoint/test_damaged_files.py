"""Damaged, hostile and unfitting files: each a named error, quickly, and nothing changed."""

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
from families import FAMILIES, llama, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from saved import Box, net, prune, raw, reseal, sealed, state
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec, SparseGPTSpec
from torchprune.checkpoint.checked_files import MAX_JSON
from torchprune.checkpoint.manifest import read_manifest
from torchprune.errors import CheckpointError, MissingExtraError

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
    reseal(path.parent)


def edit_blobs(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    blobs = load_file(directory / "weights.safetensors")
    change(blobs)
    save_file(blobs, directory / "weights.safetensors")
    reseal(directory)


def edit_header(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what the weights file claims, and leave its data."""
    path = directory / "weights.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    reseal(directory)


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
    reseal(bad)
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
    reseal(bad)
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


@pytest.mark.parametrize("version", [0, 3, "1", None, True, 1.5, 10**30])
def test_other_versions(version: Any, bad: Path) -> None:
    edit(bad / "manifest.json", lambda m: m.update(version=version))
    refused(bad, "format version .* reads versions 1 to 2")


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
    reseal(tmp_path)
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
    reseal(bad)
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
            path.write_text(json.dumps(sealed(with_value(manifest, at, value))))
            if loads_or_says_why(lambda: torchprune.load_into(copy.deepcopy(fresh), tmp_path)):
                loads += 1
                free = ("runs", "made_with", "architecture", "config", "generation", "settings")
                assert (
                    at[0] in (*free, "checksum")
                    or "record" in at
                    or value_at(manifest, at) == value
                ), at
    assert loads > 20  # notes and errors may say what they like
    assert raw(fresh) == before


def test_no_value_in_the_config_breaks_it(bad: Path) -> None:
    path = bad / "config.json"
    config = json.loads(path.read_text())
    for at in paths(config):
        for value in (None, -1, 2**70, "x", []):
            path.write_text(json.dumps(with_value(config, at, value)))
            reseal(bad)
            loads_or_says_why(lambda: torchprune.load(bad))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small") / "saved"
    torchprune.save(prune(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))), directory)
    return directory


@settings(max_examples=150)
@given(st.data())
def test_flipped_bytes_under_right_checksums(small: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(small, directory, dirs_exist_ok=True)
        name = data.draw(st.sampled_from(["manifest.json", "weights.safetensors"]))
        path = Path(directory) / name
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(content) - 1))
            content[at] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        reseal(Path(directory))
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


@pytest.mark.parametrize(
    "view", ["linear", "a|8,4|0|1||4", "a|x|0||1|4", "a|2,2||0|1|2", "a|0||||1"]
)
def test_views_that_are_none_or_not_of_the_tensor(view: str, bad: Path) -> None:
    edit(bad / "manifest.json", lambda m: m["tensors"][MASKED]["record"].update(view=view))
    refused(bad, "record.view")
