"""Saves that break no law are proved; one planted violation breaks the laws that it is of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import (
    WEIGHTS,
    Good,
    edit,
    edit_blobs,
    edit_entry,
    first,
    lost,
    remask,
    revived,
    shifted,
    swapped,
    wrote,
)
from saved import reseal
from sweeps import share
from torch import Tensor, nn

import torchprune
from torchprune import (
    OWL,
    LayerSpec,
    MagnitudeSpec,
    NeuronSpec,
    SparseGPTSpec,
    WandaSpec,
)
from torchprune.errors import InputError
from torchprune.specs.quantize import Int4
from torchprune.structure.specs import HeadSpec
from torchprune.study.proofs.proof import Proof
from torchprune.study.proofs.verify import LAWS, verify

HERE = tuple(law for law in LAWS if law not in ("reload", "lower"))
"""Those that need no other process and no kernels; the others are tested beside this file."""

GOODS = {
    "llama rows": Good("llama", WandaSpec(0.5)),
    "llama overrides": Good(
        "llama", MagnitudeSpec(0.3, overrides={"*.mlp.*": 0.7, "*.k_proj": "dense"})
    ),
    "llama uneven": Good("llama", WandaSpec(0.5, allocation=OWL(spread=0.2))),
    "llama changed": Good("llama", SparseGPTSpec(pattern="2:4"), keep_dense=True),
    "llama int4": Good("llama", SparseGPTSpec(0.5, quantize=Int4(group=16))),
    "llama neurons": Good("llama", NeuronSpec(0.5, refit=False)),
    "llama heads": Good("llama", HeadSpec(0.5, score="l2")),
    "llama blocks": Good("llama", LayerSpec(1)),
    "gpt2 n:m": Good("gpt2", WandaSpec(pattern="2:4"), torch.bfloat16),
    "gpt2 layers": Good("gpt2", MagnitudeSpec(0.4, scope="layer"), torch.float16),
    "gpt2 heads": Good("gpt2", HeadSpec(0.5, score="l2", refit=False)),
    "mixtral global": Good("mixtral", MagnitudeSpec(0.5, scope="global")),
    "mixtral n:m": Good("mixtral", WandaSpec(pattern="4:8"), torch.bfloat16),
    "bert tiles": Good("bert", MagnitudeSpec(0.5, pattern="block:4x4")),
    "vit n:m": Good("vit", WandaSpec(pattern="1:4")),
    "resnet layers": Good("resnet", MagnitudeSpec(0.5, scope="layer")),
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each artifact, saved once."""
    home, made = tmp_path_factory.mktemp("shelf"), dict[str, Path]()

    def get(name: str) -> Path:
        if name not in made:
            made[name] = GOODS[name].saved(home / name.replace(":", "of").replace(" ", "-"))
        return made[name]

    return get


@pytest.fixture
def spoil(shelf: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one, to plant something in."""
    return lambda name: Path(shutil.copytree(shelf(name), tmp_path / "spoilt"))


def check(home: Path, dense: nn.Module | None = None, laws: Any = HERE) -> Proof:
    return verify(home, dense=dense, laws=laws, progress=False)


def states(proof: Proof) -> dict[str, str]:
    return {one.law: one.state for one in proof.checks}


# -- what holds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", share(GOODS, 0, 2))
def test_good_artifacts_are_proved(name: str, shelf: Callable[[str], Path]) -> None:
    good = GOODS[name]
    before = {p.name: p.read_bytes() for p in shelf(name).iterdir()}
    proof = check(shelf(name), good.dense())
    assert proof.holds, str(proof)
    found = states(proof)
    assert list(found) == list(HERE)
    for law in ("files", "checksums", "manifest", "support", "count", "round trip", "fold"):
        assert found[law] == "holds", law
    patterned = (
        good.spec.method in ("neurons", "heads", "layers")
        or str(getattr(good.spec, "pattern", "")) != "unstructured"
    )
    assert found["pattern"] == ("holds" if patterned else "not applicable")
    masked = torchprune.masks(torchprune.load(shelf(name)))
    assert proof.layers == len(masked)
    assert proof.weights == sum(mask.numel() for mask in masked.values())
    if good.how:
        assert found["reversal"] == "holds"
    compared = good.spec.method != "sparsegpt" or bool(good.how)
    assert (found["dense"] == "holds") == compared
    assert {p.name: p.read_bytes() for p in shelf(name).iterdir()} == before


def test_modules_of_ones_own(tmp_path: Path) -> None:
    good = Good("mlp", WandaSpec(pattern="2:4"))
    good.saved(tmp_path / "mlp")
    alone, beside = check(tmp_path / "mlp"), check(tmp_path / "mlp", good.dense())
    assert alone.holds
    assert states(alone)["pattern"] == "holds"
    assert states(alone)["fold"] == states(alone)["dense"] == "not applicable"
    assert "no model was given" in str(alone)
    assert beside.holds
    assert states(beside)["fold"] == states(beside)["dense"] == "holds"
    remask(tmp_path / "mlp", "2.weight", good.dense(), revived)
    assert check(tmp_path / "mlp").broken == ["count", "pattern"]


def test_shrunk_models(tmp_path: Path) -> None:
    good = Good("llama", NeuronSpec(0.5, allocation="global", round_to=1))
    large = good.pruned()
    small = torchprune.shrink(large, torchprune.plan_shrink(large, good_inputs()))
    torchprune.sparsify(small, MagnitudeSpec(0.5), progress=False)
    torchprune.save(small, tmp_path / "small")
    proof = check(tmp_path / "small", good.dense())
    assert proof.holds, str(proof)
    found = states(proof)
    assert found["shrink"] == found["count"] == "holds"
    assert found["dense"] == "not applicable"
    edit(
        tmp_path / "small" / "manifest.json",
        lambda m: m["resized"]["drops"].append(["model.nothing"]),
    )
    assert check(tmp_path / "small").broken == ["shrink"]


def good_inputs() -> Tensor:
    return torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))


def test_two_runs_and_the_way_there(tmp_path: Path) -> None:
    model = Good("llama", MagnitudeSpec(0.3, scope="layer")).pruned()
    torchprune.sparsify(model, MagnitudeSpec(0.5), progress=False)
    torchprune.save(model, tmp_path / "twice")
    assert check(tmp_path / "twice").holds
    model = Good("llama", MagnitudeSpec(0.5)).dense()
    pruner = torchprune.Pruner(model, MagnitudeSpec(0.5), lambda step: 0.25)
    pruner.step(at=1)
    torchprune.save(model, tmp_path / "midway")
    proof = check(tmp_path / "midway")
    assert proof.broken == ["count"]
    assert "unstructured 0.5 by the spec of run 1, got unstructured 0.25" in str(proof)


def test_given_masks_are_of_no_count(tmp_path: Path) -> None:
    model = Good("llama", MagnitudeSpec()).dense()
    keep = torch.rand(48, 32) > 0.3
    torchprune.apply_masks(model, {UP: keep})
    torchprune.save(model, tmp_path / "given")
    proof = check(tmp_path / "given")
    assert proof.holds
    assert states(proof)["count"] == "not applicable"


# -- what is broken --------------------------------------------------------------------------------

UP, UP1 = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
NORM = "model.norm.weight"
FC = "transformer.h.1.mlp.c_fc.weight"
EXPERTS = "model.layers.0.mlp.experts.down_proj"
QUERY = "encoder.layer.1.attention.self.query.weight"


@dataclass(frozen=True)
class Plant:
    """One violation: in which artifact, how, the laws it breaks, and what is named.

    Attributes:
        beside: whether the dense model is given.
    """

    good: str
    plant: Callable[[Path, nn.Module], Any]
    laws: tuple[str, ...]
    names: str
    beside: bool = True


def masked_by(key: str, change: Any) -> Callable[[Path, nn.Module], None]:
    return lambda home, dense: remask(home, key, dense, change)


def in_blobs(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path, nn.Module], None]:
    return lambda home, _: edit_blobs(home, change)


def in_manifest(change: Callable[[Any], Any]) -> Callable[[Path, nn.Module], None]:
    return lambda home, _: edit(home / "manifest.json", change)


def in_config(**values: Any) -> Callable[[Path, nn.Module], None]:
    return lambda home, _: edit(home / "config.json", lambda c: c.update(values))


def dropped(home: Path, _: nn.Module) -> None:
    edit(home / "manifest.json", lambda m: m["tensors"].pop(NORM))
    edit_blobs(home, lambda b: b.pop(NORM))


def added(home: Path, _: nn.Module) -> None:
    extra = {"dtype": "float32", "shape": [2], "encoding": "dense", "checksum": ""}
    edit(home / "manifest.json", lambda m: m["tensors"].update(more=extra))
    edit_blobs(home, lambda b: b.update(more=torch.ones(2)))


def whole_row(keep: Tensor, value: Tensor, was: Tensor) -> tuple[Tensor, Tensor]:
    row = first(keep, False)[0]
    keep[row], value[row] = True, was[row]
    return keep, value


def other_row(keep: Tensor, value: Tensor, was: Tensor) -> tuple[Tensor, Tensor]:
    alive = first(keep, True)[0]
    keep, value = whole_row(keep, value, was)
    keep[alive] = False
    return keep, value


def moved(keep: Tensor, value: Tensor, was: Tensor) -> tuple[Tensor, Tensor]:
    """A nonzero goes to a pruned place of its row, as it is."""
    row = keep[0]
    gone, come = int(row.nonzero()[0]), int((~row).nonzero()[0])
    value[0, come] = value[0, gone]
    keep[0, gone], keep[0, come] = False, True
    return keep, value


def unsealed(blob: str) -> Callable[[Path, nn.Module], None]:
    """A bit of one blob's last byte turns, and the checksums stay."""

    def plant(home: Path, _: nn.Module) -> None:
        path = home / WEIGHTS
        content = bytearray(path.read_bytes())
        length = int.from_bytes(content[:8], "little")
        end = json.loads(content[8 : 8 + length])[blob]["data_offsets"][1]
        content[8 + length + end - 1] ^= 1
        path.write_bytes(content)

    return plant


def cut(name: str, share: float) -> Callable[[Path, nn.Module], None]:
    def plant(home: Path, _: nn.Module) -> None:
        content = (home / name).read_bytes()
        (home / name).write_bytes(content[: int(len(content) * share)])
        reseal(home)

    return plant


def overwritten(name: str, content: bytes) -> Callable[[Path, nn.Module], None]:
    def plant(home: Path, _: nn.Module) -> None:
        rest = (home / name).read_bytes()[8:] if name == WEIGHTS else b""
        (home / name).write_bytes(content + rest)

    return plant


def linked(name: str) -> Callable[[Path, nn.Module], None]:
    def plant(home: Path, _: nn.Module) -> None:
        shutil.move(home / name, home.parent / "elsewhere")
        (home / name).symlink_to(home.parent / "elsewhere")

    return plant


def off_grid(keep: Tensor, value: Tensor, was: Tensor) -> tuple[Tensor, Tensor]:
    at = first(keep, True)
    group = value[at[0], at[1] // 16 * 16 : at[1] // 16 * 16 + 16]
    least = torch.where(group == 0, torch.inf, group.abs()).argmin()
    group[least] *= 1.37
    return keep, value


PLANTS = {
    "a kept bit off": Plant("llama rows", masked_by(UP, lost), ("count",), UP),
    "a pruned bit on": Plant("llama rows", masked_by(UP, revived), ("count",), UP),
    "an override": Plant("llama overrides", masked_by(UP, lost), ("count",), UP),
    "an uneven layer": Plant("llama uneven", masked_by(UP, lost), ("count",), UP),
    "a nonzero moved": Plant("llama rows", masked_by(UP, moved), ("dense",), UP),
    "a kept value": Plant("llama rows", masked_by(UP, wrote(0.5)), ("dense",), UP),
    "an unpruned value": Plant("llama rows", in_blobs(lambda b: b[NORM].add_(1)), ("dense",), NORM),
    "two masks swapped": Plant("llama rows", lambda h, _: swapped(h, UP, UP1), ("dense",), UP1),
    "NaN": Plant("llama rows", masked_by(UP, wrote(torch.nan)), ("support",), UP, beside=False),
    "inf": Plant("gpt2 n:m", masked_by(FC, wrote(torch.inf)), ("support",), FC, beside=False),
    "NaN unpruned": Plant(
        "llama rows", in_blobs(lambda b: b[NORM].fill_(torch.nan)), ("support",), NORM, beside=False
    ),
    "a value too few": Plant(
        "llama rows",
        in_blobs(lambda b: b.update({f"{UP}.values": b[f"{UP}.values"][1:].clone()})),
        ("support",),
        UP,
    ),
    "a group shifted": Plant("gpt2 n:m", masked_by(FC, shifted(0)), ("pattern",), FC),
    "a group of three": Plant("gpt2 n:m", masked_by(FC, revived), ("count", "pattern"), FC),
    "a group of one": Plant("gpt2 n:m", masked_by(FC, lost), ("count",), FC),
    "experts' groups": Plant("mixtral n:m", masked_by(EXPERTS, lost), ("count",), EXPERTS),
    "a layer's count": Plant("gpt2 layers", masked_by(FC, revived), ("count",), FC),
    "a budget": Plant("mixtral global", masked_by(EXPERTS, lost), ("count",), "layers of run 1"),
    "a torn tile": Plant("bert tiles", masked_by(QUERY, revived), ("count", "pattern"), QUERY),
    "a weight of a neuron": Plant("llama neurons", masked_by(UP, revived), ("pattern",), UP),
    "a neuron too many": Plant("llama neurons", masked_by(UP, whole_row), ("count",), UP),
    "another neuron": Plant(
        "llama neurons", masked_by(GATE, other_row), ("pattern",), "mlp.up_proj"
    ),
    "a block not gone": Plant(
        "llama blocks",
        lambda h, d: remask(h, next(k for k in (UP, UP1) if gone(h, k)), d, revived),
        ("pattern",),
        "mlp.up_proj",
    ),
    "stored dense values": Plant(
        "llama changed", in_blobs(lambda b: b[f"{UP}.dense"].add_(1)), ("dense",), UP
    ),
    "stored dense NaN": Plant(
        "llama changed",
        in_blobs(lambda b: b[f"{UP}.dense"].fill_(torch.nan)),
        ("reversal",),
        UP,
        beside=False,
    ),
    "off the grid": Plant("llama int4", masked_by(UP, off_grid), ("quantized",), UP),
    "the spec's sparsity": Plant(
        "llama rows",
        in_manifest(lambda m: m["runs"][0]["spec"].update(sparsity=0.6)),
        ("count",),
        UP,
    ),
    "the spec's units": Plant(
        "llama neurons",
        in_manifest(lambda m: m["runs"][0]["spec"].update(sparsity=0.25)),
        ("count",),
        UP,
    ),
    "the spec's blocks": Plant(
        "llama blocks",
        in_manifest(lambda m: m["runs"][0]["spec"].update(drop=2)),
        ("count",),
        "layers",
    ),
    "the spec's scope": Plant(
        "gpt2 layers",
        in_manifest(lambda m: m["runs"][0]["spec"].update(scope="row")),
        ("count",),
        FC,
    ),
    "the record's pattern": Plant(
        "llama rows",
        lambda h, _: edit(
            h / "manifest.json", lambda m: m["tensors"][UP]["record"].update(pattern="2:4")
        ),
        ("count", "pattern"),
        UP,
    ),
    "a tensor less": Plant("llama rows", dropped, ("manifest",), NORM),
    "a tensor more": Plant("llama rows", added, ("manifest",), "more"),
    "a blob more": Plant(
        "llama rows", in_blobs(lambda b: b.update(more=torch.ones(2))), ("manifest",), "more"
    ),
    "another width": Plant("llama rows", in_config(hidden_size=64), ("manifest",), "float32"),
    "absurd width": Plant(
        "llama rows", in_config(vocab_size=10**12), ("manifest",), "1000000000000"
    ),
    "another dtype": Plant(
        "llama rows", lambda h, _: edit_entry(h, UP, dtype="float16"), ("manifest",), UP
    ),
    "absurd shape": Plant(
        "llama rows", lambda h, _: edit_entry(h, UP, shape=[10**9, 10**9]), ("manifest",), UP
    ),
    "a changed blob": Plant(
        "llama rows", unsealed(f"{UP}.values"), ("checksums",), UP, beside=False
    ),
    "a changed setting": Plant(
        "llama rows",
        lambda h, _: (h / "config.json").write_text((h / "config.json").read_text() + "\n"),
        ("checksums",),
        "config.json",
    ),
    "a changed manifest": Plant(
        "llama rows",
        lambda h, _: (h / "manifest.json").write_text(
            (h / "manifest.json").read_text().replace('"batches": 3', '"batches": 4')
        ),
        ("checksums",),
        "manifest.json",
    ),
    "cut weights": Plant("llama rows", cut(WEIGHTS, 0.7), ("files",), WEIGHTS),
    "cut header": Plant("llama rows", cut(WEIGHTS, 0.01), ("files",), WEIGHTS),
    "cut settings": Plant("llama rows", cut("config.json", 0.5), ("files",), "config.json"),
    "cut manifest": Plant("llama rows", cut("manifest.json", 0.5), ("manifest",), "manifest.json"),
    "no manifest": Plant(
        "llama rows", overwritten("manifest.json", b"[]"), ("manifest",), "object"
    ),
    "nested": Plant(
        "llama rows", overwritten("manifest.json", b"[" * 10**5), ("manifest",), "nested"
    ),
    "a long header": Plant(
        "llama rows", overwritten(WEIGHTS, (2**63).to_bytes(8, "little")), ("files",), WEIGHTS
    ),
    "a link outside": Plant("llama rows", linked(WEIGHTS), ("files",), "outside"),
    "a link of the manifest": Plant(
        "llama rows", linked("manifest.json"), ("manifest",), "outside"
    ),
    "no weights": Plant("llama rows", lambda h, _: (h / WEIGHTS).unlink(), ("files",), "missing"),
}


def gone(home: Path, key: str) -> bool:
    return "record" in json.loads((home / "manifest.json").read_text())["tensors"][key]


@pytest.mark.parametrize("name", share(PLANTS, 0, 2))
def test_one_violation_breaks_its_laws_and_names_the_place(
    name: str, spoil: Callable[[str], Path]
) -> None:
    plant = PLANTS[name]
    good = GOODS[plant.good]
    home = spoil(plant.good)
    plant.plant(home, good.dense())
    proof = check(home, good.dense() if plant.beside else None)
    assert tuple(proof.broken) == plant.laws, str(proof)
    for law in plant.laws:
        broken = next(one for one in proof.checks if one.law == law)
        assert broken.breaches
    assert any(plant.names in line for line in proof.wrongs()), proof.wrongs()
    assert not proof.holds


@pytest.mark.parametrize("name", share(GOODS, 1, 4))
def test_a_turned_bit_is_caught_in_every_artifact(name: str, spoil: Callable[[str], Path]) -> None:
    home, dense = spoil(name), GOODS[name].dense()
    masked = [k for k, m in torchprune.masks(torchprune.load(home)).items() if not m.all()]
    key = masked[-1]
    remask(home, key, dense, revived)
    proof = check(home, laws=("count", "pattern"))
    assert proof.broken, str(proof)
    told = proof.wrongs()
    assert any(key in line or "all" in line for line in told), told


# -- what is no artifact ---------------------------------------------------------------------------


def test_nothing_to_prove(tmp_path: Path) -> None:
    proof = check(tmp_path)
    assert proof.broken == ["files"]
    with pytest.raises(InputError, match="no such directory"):
        check(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no law is called 'weight'"):
        check(tmp_path, laws=["weight"])
    with pytest.raises(InputError, match="no such file"):
        verify(tmp_path, onnx=tmp_path / "m.onnx", progress=False)


def test_any_damage_is_told_and_never_raised(spoil: Callable[[str], Path]) -> None:
    home = spoil("llama rows")
    generator = torch.Generator().manual_seed(0)
    for name in ("manifest.json", WEIGHTS, "config.json"):
        content = (home / name).read_bytes()
        for _ in range(12):
            at = int(torch.randint(min(len(content), 3000), (1,), generator=generator))
            damaged = bytearray(content)
            damaged[at] ^= 1 << int(torch.randint(8, (1,), generator=generator))
            (home / name).write_bytes(damaged)
            proof = check(home, laws=("files", "checksums", "manifest", "count"))
            assert proof.broken, f"{name}: byte {at}"
        (home / name).write_bytes(content)
    assert check(home).holds
