"""`torchprune shrink`: the plan first, then a smaller model that stock transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import SMALL, call, complaint, make_home, worked
from transformers import AutoModelForCausalLM, LlamaConfig

import torchprune
from torchprune import HeadSpec, NeuronSpec
from torchprune.calibration.synthesis import synthesise


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = make_home(tmp_path_factory.mktemp("shrink"))
    config = LlamaConfig.from_pretrained(home / "model")
    config.num_attention_heads, config.num_key_value_heads = 4, 4
    torch.manual_seed(1)
    wide = AutoModelForCausalLM.from_config(config)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (home / "wide").mkdir(exist_ok=True)
        (home / "wide" / file).write_bytes((home / "model" / file).read_bytes())
    wide.save_pretrained(home / "wide")
    return home


def test_shrink_removes_what_was_asked_for(home, tmp_path):
    out, plain = tmp_path / "out", tmp_path / "plain"
    said = worked(
        *("shrink", home / "wide", "--neurons", "0.25", "--heads", "0.5", "--data"),
        *(home / "text.txt", *SMALL, "--output", out, "--hf", plain),
    )
    assert "32 -> 24 neurons" in said
    assert "4 -> 2 heads" in said
    ids = torch.arange(20)[None]
    smaller = torchprune.load(out)
    assert smaller.config.intermediate_size == 24
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(plain)(ids).logits
        torch.testing.assert_close(stock, smaller(ids).logits)
    text = ("--text", home / "text.txt", "--json")
    worked("eval", out, *text)
    assert "shrink" in (out / "run.toml").read_text("utf-8")


def test_shrink_is_what_the_library_does(home, tmp_path):
    out = tmp_path / "out"
    worked("shrink", home / "wide", "--neurons", "0.5", "--heads", "0.25", *SMALL, "--output", out)
    model = AutoModelForCausalLM.from_pretrained(home / "wide").eval()
    batches = synthesise(model, sequences=3, length=16, seed=0, progress=False)
    for spec in (HeadSpec(0.25), NeuronSpec(0.5)):
        torchprune.sparsify(model, spec, batches, progress=False)
    torchprune.shrink(model, torchprune.plan_shrink(model, batches[0]))
    found, expected = torchprune.load(out).state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_layers_go_first_and_nothing_else_is_taken_from_them(home, tmp_path):
    out = tmp_path / "out"
    said = worked(
        *("shrink", home / "wide", "--layers", "1", "--neurons", "0.25", "--json"),
        *(*SMALL, "--output", out, "--quiet"),
    )
    plan = json.loads(said)
    (gone,) = plan["blocks"]
    (cut,) = plan["removals"]
    assert not cut["name"].startswith(gone)
    assert (cut["kind"], cut["before"], cut["after"]) == ("neurons", 32, 24)
    assert plan["output"] == str(out)
    model = torchprune.load(out)
    assert model.config.num_hidden_layers == 1
    assert sum(p.numel() for p in model.parameters()) == plan["parameters"]["after"]


def test_one_budget_decides_what_goes(home, tmp_path):
    out = tmp_path / "out"
    said = worked(
        *("shrink", home / "wide", "--parameters", "0.8", "--json", "--quiet"),
        *(*SMALL, "--output", out),
    )
    before, after = json.loads(said)["parameters"].values()
    assert 0.6 * before < after <= 0.8 * before
    assert sum(p.numel() for p in torchprune.load(out).parameters()) == after
    twice = ("shrink", home / "wide", "--parameters", "0.8")
    assert call(*twice, "--flops", "0.5").exit_code == 2
    assert call(*twice, "--layers", "1").exit_code == 2


def test_a_dry_run_shows_the_plan_alone(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = worked("shrink", home / "wide", "--neurons", "0.25", "--dry-run", *SMALL)
    assert "32 -> 24 neurons" in said
    assert "parameters:" in said
    assert list(tmp_path.iterdir()) == []
    said = worked("shrink", home / "wide", "--dry-run", "--json", "--quiet")
    assert json.loads(said)["removals"] == []
    assert call("shrink", home / "wide", "--dry-run", "--output", "x").exit_code == 2


def test_masks_of_a_saved_directory_are_removed(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(home / "wide").eval()
    batches = synthesise(model, sequences=2, length=16, seed=0, progress=False)
    torchprune.sparsify(model, NeuronSpec(0.5), batches, progress=False)
    torchprune.save(model, tmp_path / "masked")
    worked("shrink", "masked")
    assert torchprune.load(tmp_path / "masked-shrunk").config.intermediate_size == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to remove: no unit is all zero; give --heads, --neurons"),
        (("--parameters", "0.01"), "parameters=0.01 cannot be met"),
        (("--flops", "1.0"), "flops must be the share that may stay"),
        (("--heads", "1.0"), "0 <= sparsity < 1"),
        (("--channels", "0.5"), "no channels to prune"),
        (("--neurons", "0.5", "--target", "*.q_prj"), "matches none of the model's"),
        (("--layers", "9"), "blocks"),
        (("--neurons", "0.5", "--data", "absent.txt"), "no such file"),
    ],
)
def test_what_is_wrong_is_one_line_and_writes_nothing(home, tmp_path, options, message):
    out = tmp_path / "out"
    result = call("shrink", home / "wide", *SMALL, *options, "--output", out)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not out.exists()


def test_an_earlier_result_alone_is_replaced(home, tmp_path):
    (tmp_path / "mine.txt").write_text("mine", "utf-8")
    said = complaint("shrink", home / "wide", "--neurons", "0.5", "--output", tmp_path)
    assert "exists and is no empty directory" in said
