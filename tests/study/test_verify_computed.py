"""Plain checkpoints, masks beside them, ONNX files, and the laws of what a model computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import Good, edit_blobs, edit_plain, first
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec, SparseGPTSpec, WandaSpec
from torchprune.study.proofs import stock_child, stock_reload, stored_runs
from torchprune.study.proofs.onnx_weights import read_graph, weights_in
from torchprune.study.proofs.proof import Proof
from torchprune.study.proofs.verify import LAWS, verify

HERE = tuple(law for law in LAWS if law not in ("reload", "lower"))
UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
LLAMA = Good("llama", WandaSpec(pattern="2:4"))
KEPT = Good("llama", SparseGPTSpec(pattern="2:4"), keep_dense=True)


def check(home: Path, dense: nn.Module | None = None, laws: Any = HERE, **more: Any) -> Proof:
    return verify(home, dense=dense, laws=laws, progress=False, **more)


def state(proof: Proof, law: str) -> str:
    return next(one.state for one in proof.checks if one.law == law)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same Llama saved, beside its masks, plain with its report, and plain of no history."""
    from torchprune.export import to_hf

    home = tmp_path_factory.mktemp("forms")
    model: Any = LLAMA.pruned()
    torchprune.save(model, home / "saved")
    model.save_pretrained(home / "beside")
    to_hf(model, home / "plain")
    shutil.copytree(home / "plain", home / "bare")
    (home / "bare" / "torchprune.json").unlink()
    return home


@pytest.fixture
def spoil(shelf: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(shelf / name, tmp_path / name))


# -- other forms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["beside", "plain", "bare"])
def test_other_forms_are_proved(form: str, shelf: Path) -> None:
    proof = check(shelf / form, LLAMA.dense())
    assert proof.holds, str(proof)
    assert state(proof, "dense") == ("not applicable" if form == "bare" else "holds")
    assert state(proof, "count") == ("not applicable" if form == "bare" else "holds")
    assert proof.layers == 14
    if form == "bare":
        assert any("14 layers 2:4" in one.said for one in proof.checks)


def test_experts_whose_tensors_have_other_names_in_the_file(tmp_path: Path) -> None:
    good = Good("mixtral", MagnitudeSpec(pattern="2:4"), torch.bfloat16)
    model: Any = good.pruned()
    model.save_pretrained(tmp_path / "beside")
    proof = check(tmp_path / "beside", good.dense())
    assert proof.holds, str(proof)
    assert state(proof, "round trip") == state(proof, "dense") == "holds"


def pruned_place(tensor: Tensor) -> tuple[int, ...]:
    return first(tensor != 0, False)


def put(number: float) -> Callable[[dict[str, Tensor]], None]:
    """A number at a pruned place."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[UP][pruned_place(tensors[UP])] = number

    return change


def kept_changed(tensors: dict[str, Tensor]) -> None:
    tensors[UP][first(tensors[UP] != 0, True)] = 3.0


PLAIN: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], tuple[str, ...], str]] = {
    "-0.0 beside": ("beside", put(-0.0), ("support",), UP),
    "a pruned weight beside": ("beside", put(0.5), ("support",), UP),
    "a tensor less beside": ("beside", lambda t: t.pop(NORM), ("manifest",), NORM),
    "another dtype beside": (
        "beside",
        lambda t: t.update({NORM: t[NORM].half()}),
        ("manifest",),
        NORM,
    ),
    "a kept value beside": ("beside", kept_changed, ("dense",), UP),
    "-0.0 plain": ("plain", put(-0.0), ("support",), UP),
    "a pruned weight plain": ("plain", put(0.5), ("count", "pattern", "dense"), UP),
    "a kept value plain": ("plain", kept_changed, ("dense",), UP),
    "NaN plain": ("plain", lambda t: t[NORM].fill_(torch.nan), ("support", "dense"), NORM),
    "a tensor less plain": ("plain", lambda t: t.pop(NORM), ("manifest",), NORM),
    "a tensor more plain": ("plain", lambda t: t.update(more=torch.ones(2)), ("manifest",), "more"),
    "another shape plain": (
        "plain",
        lambda t: t.update({NORM: torch.ones(64)}),
        ("manifest",),
        NORM,
    ),
    "NaN bare": ("bare", lambda t: t[UP].fill_(torch.nan), ("support",), UP),
}


@pytest.mark.parametrize("name", PLAIN)
def test_one_violation_in_a_plain_checkpoint(name: str, spoil: Callable[[str], Path]) -> None:
    form, change, laws, names = PLAIN[name]
    home = spoil(form)
    edit_plain(home, change)
    proof = check(home, None if form == "bare" else LLAMA.dense())
    assert tuple(proof.broken) == laws, str(proof)
    assert any(names in line for line in proof.wrongs()), proof.wrongs()


FILES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "cut": ("model.safetensors", lambda b: b[: len(b) // 2], "files"),
    "a long header": ("model.safetensors", lambda b: b"\xff" * 8 + b[8:], "files"),
    "settings that are none": ("config.json", lambda _: b"[]", "files"),
    "another width": (
        "config.json",
        lambda b: b.replace(b'"hidden_size": 32', b'"hidden_size": 64'),
        "manifest",
    ),
    "an absurd width": (
        "config.json",
        lambda b: b.replace(b'"vocab_size": 61', b'"vocab_size": 99999999999'),
        "manifest",
    ),
    "another class": ("config.json", lambda b: b.replace(b"LlamaForC", b"Evil"), "manifest"),
    "the report's zeros": (
        "torchprune.json",
        lambda b: b.replace(b'"zeros": 768', b'"zeros": 767'),
        "count",
    ),
    "a report that is none": ("torchprune.json", lambda _: b'{"report": 3}', "files"),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_of_a_plain_checkpoint(name: str, spoil: Callable[[str], Path]) -> None:
    file, change, law = FILES[name]
    home = spoil("plain")
    content = (home / file).read_bytes()
    changed = change(content)
    assert changed != content
    (home / file).write_bytes(changed)
    assert check(home).broken == [law]


# -- what is computed ------------------------------------------------------------------------------


def test_a_process_of_its_own_loads_what_was_saved(shelf: Path, tmp_path: Path) -> None:
    proof = check(shelf / "saved", laws=["reload", "lower"])
    assert [one.state for one in proof.checks] == ["holds", "holds"], str(proof)
    assert "without torchprune: the same tensors and outputs, to the bit" in proof.checks[0].said


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What the other process does, in this one, as if it knew nothing of torchprune."""

    def run(job: Path) -> None:
        stock_child.main(job)
        told = json.loads((job / "told.json").read_text())
        (job / "told.json").write_text(json.dumps({**told, "torchprune": False}))

    monkeypatch.setattr(stock_reload, "_run", run)
    return monkeypatch


def test_rotary_tables_that_a_cast_rounded(child: Any, tmp_path: Path) -> None:
    Good("llama", MagnitudeSpec(), torch.bfloat16).saved(tmp_path / "bf16")
    proof = check(tmp_path / "bf16", laws=["reload"])
    assert proof.holds, str(proof)
    assert "tables are computed anew" in proof.checks[0].said


@pytest.mark.parametrize("family", ["gpt2", "bert", "vit", "t5", "resnet"])
def test_other_families_reload(family: str, child: Any, tmp_path: Path) -> None:
    Good(family, MagnitudeSpec()).saved(tmp_path / family)
    proof = check(tmp_path / family, laws=["fold", "reload"])
    assert [one.state for one in proof.checks] == ["holds", "holds"], str(proof)


def test_what_stock_transformers_reads_otherwise(child: Any, shelf: Path) -> None:
    plain = stock_reload._export

    def spoilt(model: Any, where: Path) -> None:
        plain(model, where)
        edit_plain(where, kept_changed)

    child.setattr(stock_reload, "_export", spoilt)
    proof = check(shelf / "saved", laws=["reload"])
    assert proof.broken == ["reload"]
    assert UP in "".join(proof.wrongs())
    assert "outputs on seeded inputs" in "".join(proof.wrongs())


def test_a_process_that_fails_is_told(child: Any, shelf: Path) -> None:
    child.setattr(stock_reload, "_run", lambda _: "OSError: no such file")
    assert check(shelf / "saved", laws=["reload"]).broken == ["reload"]


def nudged(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        weight = model.get_parameter(UP)
        weight[first(weight != 0, True)] += 1
    return model


FAULTS: dict[str, tuple[Good, str, Callable[..., Any], Callable[..., Any]]] = {
    "fold": (LLAMA, "fold", nudged, torchprune.fold),
    "lower": (LLAMA, "lift", nudged, torchprune.lift),
    "reversal": (KEPT, "densify", nudged, torchprune.densify),
}


@pytest.mark.parametrize("law", FAULTS)
def test_a_library_that_computes_otherwise(
    law: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, name, spoils, does = FAULTS[law]
    home = good.saved(tmp_path / "saved")
    assert check(home, laws=[law]).holds
    monkeypatch.setattr(stored_runs, name, lambda model: spoils(does(model)))
    proof = check(home, laws=[law])
    assert proof.broken == [law], str(proof)
    assert UP in "".join(proof.wrongs())


def test_a_lowered_model_that_answers_otherwise(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: Any, target: str) -> Any:
        model.model.norm.weight.data.mul_(1.01)
        return model

    monkeypatch.setattr(stored_runs, "lower", wrong)
    proof = check(shelf / "saved", laws=["lower"])
    assert proof.broken == ["lower"]
    assert "outputs" in "".join(proof.wrongs())


def test_a_save_that_writes_otherwise(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Any, directory: Path) -> None:
        torchprune.save(model, directory)
        edit_blobs(directory, lambda b: b[f"{UP}.values"].add_(1))

    monkeypatch.setattr(stored_runs, "save", wrong)
    proof = check(shelf / "saved")
    assert proof.broken == ["round trip"]
    assert UP in "".join(proof.wrongs())


# -- ONNX ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The saved Llama with its ONNX file in the directory."""
    from torchprune.export import to_onnx

    home = Path(shutil.copytree(shelf / "saved", tmp_path_factory.mktemp("graph") / "saved"))
    inputs = {"input_ids": torch.randint(3, 60, (2, 8))}
    to_onnx(torchprune.load(home), home / "model.onnx", inputs)
    return home


def test_an_onnx_file_beside_is_proved(graph: Path, shelf: Path) -> None:
    proof = check(graph, laws=["onnx"])
    assert proof.holds, str(proof)
    (one,) = proof.checks
    assert one.numbers["packed"] > 4
    assert one.numbers["pruned_found"] == 14
    assert 0 < one.numbers["difference"] < 1e-4
    assert check(shelf / "saved", laws=["onnx"], onnx=graph / "model.onnx").holds
    assert state(check(shelf / "saved", laws=["onnx"]), "onnx") == "not applicable"


def in_graph(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change a graph's constants, given as arrays by name."""

    def plant(path: Path) -> None:
        import onnx
        from onnx import numpy_helper

        model = onnx.load(path)
        arrays = {t.name: numpy_helper.to_array(t).copy() for t in model.graph.initializer}
        change(arrays)
        for tensor in model.graph.initializer:
            tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))
        onnx.save(model, path)

    return plant


def revive(arrays: dict[str, Any]) -> None:
    """A bit more and a value more."""
    import numpy as np

    bits, values = arrays[f"{UP}.bits"], arrays[f"{UP}.values"]
    lane = next(i for i in range(8) if not bits[0] >> i & 1)
    before = sum(int(bits[0]) >> i & 1 for i in range(lane))
    bits[0] |= 1 << lane
    arrays[f"{UP}.values"] = np.insert(values, 1 + before, np.float32(0.25))


def add_one(name: str) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        arrays[name].reshape(-1)[-1] += 1

    return change


def first_value(arrays: dict[str, Any]) -> None:
    arrays[f"{UP}.values"][0] = 0.1


def one_bit_more(arrays: dict[str, Any]) -> None:
    arrays[f"{UP}.bits"][:] = 255


GRAPHS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a pruned weight": (in_graph(revive), f"{UP}: expected zeros in the graph"),
    "a kept value": (in_graph(add_one(f"{UP}.values")), f"{UP}: expected the folded weight"),
    "a zero that is none": (in_graph(first_value), UP),
    "bits without values": (in_graph(one_bit_more), UP),
    "no ONNX": (lambda path: path.write_bytes(b"\x08" * 99), "model.onnx"),
    "cut": (
        lambda p: p.write_bytes(p.read_bytes()[:-999]) and None,
        "model.onnx",
    ),
    "empty": (lambda path: path.write_bytes(b""), "model.onnx"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_one_violation_in_an_onnx_file(name: str, graph: Path, tmp_path: Path) -> None:
    plant, names = GRAPHS[name]
    home = Path(shutil.copytree(graph, tmp_path / "saved"))
    plant(home / "model.onnx")
    proof = check(home)
    assert proof.broken == ["onnx"], str(proof)
    assert any(names in line for line in proof.wrongs()), proof.wrongs()


def test_packed_weights_are_read_as_the_graph_makes_them(graph: Path) -> None:
    folded = torchprune.fold(torchprune.load(graph)).state_dict()
    found = {w.name: w.value for w in weights_in(read_graph(graph / "model.onnx")) if w.packed}
    assert UP in found
    for name, value in found.items():
        assert any(torch.equal(value, way) for way in (folded[name], folded[name].T)), name
