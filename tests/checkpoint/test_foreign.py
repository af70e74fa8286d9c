"""Pruned models of other libraries, written by code of our own, become masked ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file, save_file
from saved import bits, contents
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import torchprune
from torchprune.errors import CheckpointError

Parts = dict[str, Tensor]


# -- how others write ------------------------------------------------------------------------------


def bitmask(name: str, weight: Tensor, mask: Tensor) -> Parts:
    stem = name.removesuffix(".weight")
    packed = torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    return {
        f"{stem}.compressed": weight[mask],
        f"{stem}.bitmask": packed,
        f"{stem}.shape": torch.tensor(weight.shape),
        f"{stem}.row_offsets": mask.sum(-1).cumsum(0) - mask.sum(-1),
    }


def early_bitmask(name: str, weight: Tensor, mask: Tensor) -> Parts:
    made = bitmask(name, weight, mask)
    return {key.replace(name.removesuffix(".weight"), name, 1): made[key] for key in made}


def bitmask_24(name: str, weight: Tensor, mask: Tensor) -> Parts:
    made = bitmask(name, weight, mask)
    stem = name.removesuffix(".weight")
    del made[f"{stem}.row_offsets"]
    made[f"{stem}.shape"] = made[f"{stem}.shape"].reshape(-1, 1)
    made[f"{stem}.compressed"] = made[f"{stem}.compressed"].reshape(len(weight), -1)
    return made


def orig_and_mask(name: str, weight: Tensor, mask: Tensor) -> Parts:
    return {f"{name}_orig": weight, f"{name}_mask": mask.to(weight.dtype)}


def modelopt(name: str, weight: Tensor, mask: Tensor) -> Parts:
    return {name: weight, f"{name.removesuffix('weight')}_weight_mask": mask}


def parametrized(name: str, weight: Tensor, mask: Tensor) -> Parts:
    stem = f"{name.removesuffix('weight')}parametrizations.weight"
    return {f"{stem}.original": weight, f"{stem}.0.mask": mask.float()}


def plain(name: str, weight: Tensor, mask: Tensor) -> Parts:
    return {name: weight * mask}  # with -0.0 where it was negative


FORMS: dict[str, Callable[[str, Tensor, Tensor], Parts]] = {
    "sparse-bitmask": bitmask,
    "early sparse-bitmask": early_bitmask,
    "sparse-24-bitmask": bitmask_24,
    "torch.nn.utils.prune": orig_and_mask,
    "modelopt": modelopt,
    "torch.ao.pruning": parametrized,
    "dense": plain,
}


def two_of_four(weight: Tensor) -> Tensor:
    kept = weight.abs().reshape(-1, 4).topk(2, 1).indices
    mask = torch.zeros(weight.numel() // 4, 4, dtype=torch.bool).scatter_(1, kept, True)
    return mask.reshape(weight.shape)


def write(directory: Path, form: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Parts]:
    """A tiny Llama's linear layers in a form: the dense model, and the masks."""
    model = FAMILIES["llama"].make(dtype)
    masks = {
        f"{name}.weight": two_of_four(module.weight.detach())
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    tensors: Parts = {}
    for name, tensor in model.state_dict().items():
        known = name in masks
        tensors |= FORMS[form](name, tensor, masks[name]) if known else {name: tensor}
    directory.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "model.safetensors")
    config = json.loads(model.config.to_json_string()) | {"architectures": ["LlamaForCausalLM"]}
    if form in ("sparse-bitmask", "sparse-24-bitmask", "dense"):
        said = {"format": form, "global_sparsity": 0.5, "sparsity_structure": "2:4"}
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "sparsity_config": said,
        }
    (directory / "config.json").write_text(json.dumps(config))
    return model, masks


# -- how they come home ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_masks_and_weights_come_home_bit_for_bit(form: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if form == "sparse-24-bitmask" else torch.float32
    dense, masks = write(tmp_path / "theirs", form, dtype)
    before = contents(tmp_path / "theirs")
    model = torchprune.load(tmp_path / "theirs")
    assert contents(tmp_path / "theirs") == before
    found = torchprune.masks(model)
    assert found.keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(found[name], mask)
        weight = dense.state_dict()[name]
        kept = torch.where(mask, weight, torch.zeros((), dtype=dtype))
        module, _, attribute = name.rpartition(".")
        assert bits(getattr(model.get_submodule(module), attribute)) == bits(kept)
    assert "sparsity_config" not in model.config.to_json_string()
    torchprune.save(model, tmp_path / "ours")
    again = torchprune.load(tmp_path / "ours")
    tokens = FAMILIES["llama"].data()[0]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("form", FORMS)
def test_a_directory_of_theirs_becomes_one_of_ours(form: str, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    write(theirs, form)
    beside = {"tokenizer.json": b"{}", "chat_template.jinja": b"hello", "vocab.txt": b"a"}
    for name, held in (beside | {"modeling_own.py": b"raise SystemExit", ".lock": b""}).items():
        (theirs / name).write_bytes(held)
    (theirs / "original").mkdir()
    before, model = contents(theirs), torchprune.load(theirs)
    torchprune.migrate(theirs, ours)
    assert contents(theirs) == before
    found = contents(ours)
    assert {name: found[name] for name in beside} == beside
    assert not {"modeling_own.py", ".lock", "original"} & set(found)
    assert not any("sparsity_config" in held.decode("latin-1") for held in found.values())
    again = torchprune.load(ours)
    assert torchprune.masks(again).keys() == torchprune.masks(model).keys()
    for name, value in again.state_dict().items():
        assert bits(value) == bits(model.state_dict()[name]), name
    torchprune.migrate(theirs, ours)  # once more, over it
    assert contents(ours) == found


def test_modules_of_ones_own_are_migrated(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    torch_prune.l1_unstructured(net[0], "weight", 0.5)
    (tmp_path / "theirs").mkdir()
    save_file(net.state_dict(), tmp_path / "theirs" / "any.safetensors")
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    torchprune.migrate(tmp_path / "theirs", tmp_path / "ours", model=plain)
    again = torchprune.load_into(copy.deepcopy(torchprune.fold(plain)), tmp_path / "ours")
    assert torch.equal(again(torch.ones(1, 8)), net(torch.ones(1, 8)))
    assert set(torchprune.masks(again)) == {"0.weight"}


def test_what_needs_no_migration_and_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model, _ = write(tmp_path / "theirs", "torch.nn.utils.prune")
    torchprune.migrate(tmp_path / "theirs", tmp_path / "ours")
    model.save_pretrained(tmp_path / "dense")
    for name in ("ours", "dense", "nowhere"):
        with pytest.raises(CheckpointError, match="no pruned model of another library"):
            torchprune.migrate(tmp_path / name, tmp_path / "new")
    for place in (tmp_path / "theirs", tmp_path / "theirs" / "new"):
        with pytest.raises(CheckpointError, match="name another directory"):
            torchprune.migrate(tmp_path / "theirs", place)
    (tmp_path / "theirs" / "secret.txt").symlink_to(tmp_path / "dense" / "config.json")
    with pytest.raises(CheckpointError, match="leads outside"):
        torchprune.migrate(tmp_path / "theirs", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_modules_of_ones_own_are_filled_and_stay_as_they_were_after_an_error(
    tmp_path: Path,
) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))

    theirs = net()
    torch_prune.l1_unstructured(theirs[0], "weight", 0.5)
    torch_prune.l1_unstructured(theirs[2], "bias", 0.5)
    save_file(theirs.state_dict(), tmp_path / "any.safetensors")
    ours = torchprune.load_into(net(), tmp_path)
    x = torch.randn(2, 3, 3, 3)
    assert torch.equal(ours(x), theirs(x))
    assert set(torchprune.masks(ours)) == {"0.weight", "2.bias"}
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 5))
    held = {k: bits(v) for k, v in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"2\.bias: expected .*\(5,\), got .*\(4,\)"):
        torchprune.load_into(other, tmp_path)
    with pytest.raises(CheckpointError, match=r"differ in 1\.weight"):
        torchprune.load_into(nn.Sequential(net()[0], nn.Linear(2, 2, bias=False)), tmp_path)
    assert {k: bits(v) for k, v in other.state_dict().items()} == held


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    _, masks = write(tmp_path, "torch.nn.utils.prune")
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)  # an orig and its mask in different files
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    save_file({"of.another.program": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torchprune.masks(torchprune.load(tmp_path)).keys() == masks.keys()
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not the plain name of a file"):
        torchprune.load(tmp_path)


def test_damaged_parts_are_named(tmp_path: Path) -> None:
    write(tmp_path, "sparse-bitmask")
    path, stem = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj"
    tensors = load_file(path)
    ones = torch.full_like(tensors[f"{stem}.bitmask"], 255)
    for said, change in {
        "values for": {"bitmask": ones},
        "is uint8 ": {"bitmask": ones[:, :-1].contiguous()},
        "two sizes is needed": {"shape": torch.tensor([4])},
        "row_offsets are not those": {"row_offsets": tensors[f"{stem}.row_offsets"] + 1},
        "its shape is missing": {"shape": None},
        "once more without a mask": {"weight": torch.zeros(48, 32)},
    }.items():
        made = tensors | {f"{stem}.{part}": value for part, value in change.items()}
        save_file({k: v for k, v in made.items() if v is not None}, path)
        with pytest.raises(CheckpointError, match=f"{stem}.weight.*{said}"):
            torchprune.load(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError):
        torchprune.load(tmp_path)


def test_quantized_and_unpruned_checkpoints_are_not_taken_for_pruned(tmp_path: Path) -> None:
    for form in ("sparse-bitmask", "dense"):
        write(tmp_path, form)
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"]["config_groups"] = {"group_0": {"weights": {"num_bits": 8}}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="quantized too"):
            torchprune.load(tmp_path)
    FAMILIES["llama"].make().save_pretrained(tmp_path / "stock")
    with pytest.raises(CheckpointError, match=r"holds no manifest\.json"):
        torchprune.load(tmp_path / "stock")


def test_masks_of_other_shapes_or_values_are_refused(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4)
    for said, mask in {
        "its mask is": torch.ones(2, 4),
        "more than zeros": torch.full((4, 4), 0.5),
    }.items():
        save_file({"weight_orig": layer.weight.detach(), "weight_mask": mask,
                   "bias": layer.bias.detach()}, tmp_path / "m.safetensors")  # fmt: skip
        with pytest.raises(CheckpointError, match=f"weight: .*{said}"):
            torchprune.load_into(nn.Linear(4, 4), tmp_path)
