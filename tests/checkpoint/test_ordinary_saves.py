"""Masked transformers models saved the ordinary way: stock loading is right, masks come back."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from families import FAMILIES, Family, llama, tokens
from saved import HUGGING, bits, output, prune, raw, state
from torch import Tensor, nn

import torchprune
from torchprune import HeadSpec, MagnitudeSpec, SparseGPTSpec
from torchprune.errors import CheckpointError, MaskError

MASKS = ("torchprune_masks.json", "torchprune_masks.data")


def stock(model: nn.Module, directory: Path, **options: Any) -> nn.Module:
    """The checkpoint as transformers reads it, which must miss nothing."""
    loaded, found = type(model).from_pretrained(directory, output_loading_info=True, **options)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    return loaded


def masked_llama(**changes: Any) -> Any:
    return prune(llama(**changes).eval(), MagnitudeSpec())


def same_masks(one: nn.Module, other: nn.Module) -> bool:
    return state(one)["masks"] == state(other)["masks"] != {}


# -- save_pretrained -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", HUGGING, ids=str)
def test_save_pretrained_of_every_family(family: Family, tmp_path: Path) -> None:
    model = prune(family.make(), MagnitudeSpec())
    before, batch = raw(model), family.data()[0]
    model.save_pretrained(tmp_path)
    assert raw(model) == before
    assert torch.equal(output(stock(model, tmp_path), batch), output(model, batch))
    loaded = torchprune.load(tmp_path)
    assert state(loaded) == state(model)
    assert torch.equal(output(loaded, batch), output(model, batch))
    assert state(torchprune.load_into(family.make(seed=1), tmp_path)) == state(model)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_in_other_dtypes_shards_and_variants(family: str, tmp_path: Path) -> None:
    model = prune(FAMILIES[family].make(torch.bfloat16), MagnitudeSpec(pattern="2:4"))
    model.save_pretrained(tmp_path, max_shard_size="8KB", variant="half")
    assert len(list(tmp_path.glob("model.half-*.safetensors"))) > 2
    again = stock(model, tmp_path, variant="half")
    assert {k: bits(v) for k, v in again.state_dict().items()} == state(model)["weights"]
    assert state(torchprune.load(tmp_path)) == state(model)


@pytest.mark.parametrize("tie", [True, False])
def test_ties_and_kept_dense_weights(tie: bool, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=tie).eval()
    dense = {k: bits(v) for k, v in model.state_dict().items()}
    prune(model, SparseGPTSpec(), tokens(), keep_dense=True)
    model.save_pretrained(tmp_path)
    loaded = torchprune.load(tmp_path)
    assert state(loaded) == state(model)
    torchprune.densify(loaded)
    assert {k: bits(v) for k, v in loaded.state_dict().items()} == dense


def test_commands_take_such_a_directory(tmp_path: Path) -> None:
    import transformers

    from torchprune.cli.models import load_model

    model = masked_llama()
    model.save_pretrained(tmp_path)
    named = load_model(transformers, str(tmp_path), torch.bfloat16, torch.device("cpu"))
    assert same_masks(named, model)
    assert named.dtype == torch.bfloat16


def test_pruned_values_are_not_given_away(tmp_path: Path) -> None:
    model = masked_llama()
    model.save_pretrained(tmp_path)
    with pytest.raises(MaskError, match="not saved"):
        torchprune.densify(torchprune.load(tmp_path))
    masks = torchprune.masks(model).values()
    assert (tmp_path / MASKS[1]).stat().st_size < sum(m.numel() for m in masks) / 8 + 10_000


def test_masks_on_a_module_inside(tmp_path: Path) -> None:
    model = llama().eval()
    prune(model.model.layers[0].mlp, MagnitudeSpec())
    model.save_pretrained(tmp_path)
    assert torch.equal(output(stock(model, tmp_path), tokens()[0]), output(model, tokens()[0]))
    assert same_masks(torchprune.load(tmp_path), model)


def test_a_model_inside_another_module(tmp_path: Path) -> None:
    outer = nn.ModuleDict({"inner": llama().eval()})
    prune(outer, MagnitudeSpec(targets="*.mlp.*"))
    outer["inner"].save_pretrained(tmp_path)
    stock(outer["inner"], tmp_path)
    assert same_masks(torchprune.load(tmp_path), outer["inner"])


def test_copies_and_models_without_masks_again(tmp_path: Path) -> None:
    model = masked_llama()
    twin = copy.deepcopy(model)
    twin.save_pretrained(tmp_path / "twin")
    assert same_masks(torchprune.load(tmp_path / "twin"), model)
    torchprune.fold(twin).save_pretrained(tmp_path / "twin")  # the masks there are of no use now
    assert not any((tmp_path / "twin" / name).exists() for name in MASKS)
    model.save_pretrained(tmp_path / "model")
    assert same_masks(torchprune.load(tmp_path / "model"), model)
    torchprune.densify(model).save_pretrained(tmp_path / "model")
    assert not any((tmp_path / "model" / name).exists() for name in MASKS)


def test_a_state_given_by_hand(tmp_path: Path) -> None:
    model = masked_llama()
    wanted = state(model)
    for name, given in (
        ("masked", model.state_dict()),
        ("plain", torchprune.fold(copy.deepcopy(model)).state_dict()),
    ):
        model.save_pretrained(tmp_path / name, state_dict=given)
        stock(model, tmp_path / name)
        assert state(torchprune.load(tmp_path / name)) == wanted


def test_a_state_of_a_wrapper_is_refused(tmp_path: Path) -> None:
    model = masked_llama()
    given = nn.ModuleDict({"module": model}).state_dict()
    with pytest.raises(CheckpointError, match=r"module\..*0\.bits.*without what wraps it"):
        model.save_pretrained(tmp_path, state_dict=given)
    assert not (tmp_path / "model.safetensors").exists()


def test_part_of_a_state_has_no_masks_beside(tmp_path: Path) -> None:
    model = masked_llama()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, state_dict={"lm_head.weight": model.lm_head.weight})
    assert not any((tmp_path / name).exists() for name in MASKS)


def test_another_rank_writes_nothing(tmp_path: Path) -> None:
    masked_llama().save_pretrained(tmp_path, is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_made_right_is_refused(tmp_path: Path) -> None:
    model = masked_llama()
    with pytest.raises(CheckpointError, match="distributed checkpoint"):
        model.save_pretrained(tmp_path, distributed_checkpoint=True)
    lowered = torchprune.lower(masked_llama(), "bitmask")
    with pytest.raises(CheckpointError, match=r"lowered.*torchprune.lift"):
        lowered.save_pretrained(tmp_path)
    tied = masked_llama()
    first, second = tied.model.layers[0].mlp, tied.model.layers[1].mlp
    second.up_proj.parametrizations.weight.original = first.up_proj.parametrizations.weight.original
    with pytest.raises(CheckpointError, match="is tied to"):
        tied.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_class_of_ones_own(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    class Mine(LlamaForCausalLM):
        def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
            super().save_pretrained(*args, **kwargs)

    model = prune(Mine(llama().config).eval(), MagnitudeSpec())
    model.save_pretrained(tmp_path)
    assert torch.equal(output(stock(model, tmp_path), tokens()[0]), output(model, tokens()[0]))
    with pytest.raises(CheckpointError, match="names no model of transformers"):
        torchprune.load(tmp_path)
    assert state(torchprune.load_into(Mine(llama().config).eval(), tmp_path)) == state(model)


def test_push_to_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel
    from transformers.utils import hub

    class Api:
        def create_repo(self, name: str, **_: Any) -> Any:
            return type("Repo", (), {"repo_id": name})

    pushed: list[Path] = []

    def upload(_: Any, directory: str, *args: Any, **kwargs: Any) -> None:
        pushed.append(Path(shutil.copytree(directory, tmp_path / f"hub{len(pushed)}")))

    import transformers.modeling_utils as models

    card = type("Card", (), {"save": lambda self, path: None})()
    for module in (hub, models):
        monkeypatch.setattr(module, "hf_api", Api, raising=False)
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *a, **k: card)
    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
    model = masked_llama()
    model.push_to_hub("me/model")
    model.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="me/model")
    for directory in pushed:
        stock(model, directory)
        assert same_masks(torchprune.load(directory), model)
    assert len(pushed) == 2


# -- damage ----------------------------------------------------------------------------------------


def test_masks_of_another_save_and_damage_are_refused(tmp_path: Path) -> None:
    model = masked_llama()
    model.save_pretrained(tmp_path)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("model.safetensors", *MASKS):
        content = bytearray(whole[name])
        content[len(content) * 3 // 4] ^= 4
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            torchprune.load(tmp_path)
        before = raw(fresh := llama().eval())
        with pytest.raises(CheckpointError, match="damaged"):
            torchprune.load_into(fresh, tmp_path)
        assert raw(fresh) == before
        (tmp_path / name).write_bytes(whole[name])
    torchprune.load(tmp_path)
    other = llama(hidden_act="silu").eval()  # written by a process that knows no masks
    safetensors.torch.save_file(other.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors.*damaged"):
        torchprune.load(tmp_path)
    (tmp_path / MASKS[1]).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        torchprune.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", *MASKS])
def test_no_flipped_bit_beside_a_checkpoint_loads_as_something_else(
    name: str, tmp_path: Path
) -> None:
    small = llama(hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    prune(small.eval(), MagnitudeSpec()).save_pretrained(tmp_path)
    content = (tmp_path / name).read_bytes()
    expected, draw = state(small), random.Random(name)
    end = 8 + int.from_bytes(content[:8], "little")
    for trial in range(12):
        header = trial % 3 == 0 and not name.endswith(".json")
        at = draw.randrange(8 * min(end, len(content)) if header else 8 * len(content))
        spoilt = bytearray(content)
        spoilt[at // 8] ^= 1 << at % 8
        (tmp_path / name).write_bytes(spoilt)
        said = refusal(tmp_path)
        assert name in said if isinstance(said, str) else state(said) == expected


def refusal(directory: Path) -> str | nn.Module:
    """What `load` says against a directory, or what it makes of it."""
    try:
        return torchprune.load(directory)
    except CheckpointError as error:
        return str(error)


def test_hostile_entries_beside_a_checkpoint(tmp_path: Path) -> None:
    masked_llama().save_pretrained(tmp_path)
    path = tmp_path / MASKS[0]
    manifest = json.loads(path.read_text())
    key = "model.layers.0.mlp.up_proj.weight"
    for change in (
        {"shape": [10**9, 10**9]},
        {"encoding": "packed", "record": None},
        {"dtype": "float16"},
        {"hidden": True},
        {"hidden": 3},
        {"encoding": "dense", "record": None},
    ):
        spoilt = copy.deepcopy(manifest)
        spoilt["tensors"][key].update(change)
        path.write_text(json.dumps(spoilt))
        with pytest.raises(CheckpointError):
            torchprune.load(tmp_path, verify=False)
    for change in (
        {"beside": False},
        {"variant": "../.."},
        {"version": 1},
        {"format": "torchprune"},
    ):
        path.write_text(json.dumps({**manifest, **change}))
        with pytest.raises(CheckpointError):
            torchprune.load(tmp_path, verify=False)


# -- other ways ------------------------------------------------------------------------------------


def test_save_model_of_safetensors_comes_back_masked_or_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = masked_llama()
    model.config.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_model(model, str(path))
    masked = prune(llama().eval(), MagnitudeSpec(0.25))
    safetensors.torch.load_model(masked, str(path))
    assert state(masked)["weights"] == state(model)["weights"]
    assert same_masks(masked, model)
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"of a masked model.*torchprune.fold"):
            safetensors.torch.load_model(llama(), str(path), strict=strict)
    with pytest.raises(CheckpointError, match=r"would come back random.*save_pretrained"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_accelerate_keeps_a_state(tmp_path: Path) -> None:
    from accelerate import Accelerator

    model = masked_llama()
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    step(prepared, optimizer)
    before = raw(model)
    accelerator.save_state(str(tmp_path / "state"))
    step(prepared, optimizer)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.parametrizations.weight[0].bits.bitwise_not_()
    assert raw(model) != before
    accelerator.load_state(str(tmp_path / "state"))
    assert raw(model) == before


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    ids = tokens()[0]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@pytest.mark.parametrize("size", ["10GB", "8KB"])
def test_accelerate_saves_a_model(size: str, tmp_path: Path) -> None:
    from accelerate import Accelerator, load_checkpoint_in_model

    model, accelerator = masked_llama(), Accelerator(cpu=True)
    before = raw(model)
    accelerator.save_model(model, str(tmp_path), max_shard_size=size)
    assert raw(model) == before
    plain = llama().eval()
    load_checkpoint_in_model(plain, str(tmp_path))
    assert torch.equal(output(plain, tokens()[0]), output(model, tokens()[0]))
    assert state(torchprune.load_into(llama().eval(), tmp_path)) == state(model)
    with pytest.raises(CheckpointError, match="safe_serialization=True"):
        accelerator.save_model(model, str(tmp_path), safe_serialization=False)
    accelerator.save_model(torchprune.fold(model), str(tmp_path), max_shard_size=size)
    assert not any((tmp_path / name).exists() for name in MASKS)


def test_modules_with_the_mixin_of_the_hub(tmp_path: Path) -> None:
    from huggingface_hub import PyTorchModelHubMixin

    class Own(nn.Module, PyTorchModelHubMixin):
        def __init__(self, width: int = 6) -> None:
            super().__init__()
            self.linear = nn.Linear(width, 4)

    model = prune(Own(8), MagnitudeSpec())
    model.save_pretrained(tmp_path)
    plain = Own.from_pretrained(tmp_path, strict=True)
    x = torch.randn(3, 8)
    assert torch.equal(plain.linear(x), model.linear(x))
    assert state(torchprune.load_into(Own(8), tmp_path)) == state(model)
    with pytest.raises(CheckpointError, match=r"no class of transformers.*load_into"):
        torchprune.load(tmp_path)


@pytest.mark.parametrize("shrink", [False, True])
def test_masks_of_whole_units_and_shrunk_models(shrink: bool, tmp_path: Path) -> None:
    model = prune(llama(attention_bias=True, mlp_bias=True).eval(), HeadSpec(0.5), tokens())
    if shrink:
        torchprune.shrink(model, torchprune.plan_shrink(model, tokens()[0]))
        prune(model, MagnitudeSpec())
    model.save_pretrained(tmp_path)
    assert torch.equal(output(stock(model, tmp_path), tokens()[0]), output(model, tokens()[0]))
    assert state(torchprune.load(tmp_path)) == state(model)


FAKE = {
    "__init__.py": "",
    "modeling_utils.py": """
        class PreTrainedModel:
            def save_pretrained(self, save_directory, is_main_process=True, state_dict=None):
                return "saved"
            @classmethod
            def from_pretrained(cls, name, **options):
                return cls(), {"unexpected_keys": []}
    """,
    "trainer.py": """
        import os
        if os.environ.pop("FAIL_ONCE", None):
            raise ImportError("not yet")
        class Trainer:
            def _load_best_model(self):
                pass
    """,
}


@pytest.mark.parametrize("first", ["torchprune", "transformers.modeling_utils"])
def test_it_does_not_matter_what_is_imported_first(first: str, tmp_path: Path) -> None:
    package = tmp_path / "transformers"
    package.mkdir()
    for name, text in FAKE.items():
        (package / name).write_text(textwrap.dedent(text))
    code = f"""
import {first}, torchprune, sys
if {first!r} == "torchprune":
    assert "transformers" not in sys.modules
import transformers.modeling_utils as models
assert hasattr(models.PreTrainedModel.save_pretrained, "_torchprune_taught")
model = models.PreTrainedModel.from_pretrained("x")
try:
    import transformers.trainer
except ImportError:
    import transformers.trainer
assert hasattr(transformers.trainer.Trainer._load_best_model, "_torchprune_taught")
taught = models.PreTrainedModel.save_pretrained
torchprune.checkpoint.ordinary_saves.teach()
assert models.PreTrainedModel.save_pretrained is taught
"""
    path = os.pathsep.join([str(tmp_path), str(Path(torchprune.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "FAIL_ONCE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
