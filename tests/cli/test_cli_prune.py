"""How `torchprune prune` words a spec: each option reaches it, and mistakes are one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SMALL, call, complaint, make_home, worked
from transformers import AutoModelForCausalLM

import torchprune
from torchprune import (
    OWL,
    PCG,
    ADMMSpec,
    BestSpec,
    LeastError,
    MagnitudeSpec,
    Reconstruct,
    RIASpec,
    Search,
    SparseGPTSpec,
    Swaps,
    WandaSpec,
)
from torchprune.calibration.synthesis import synthesise
from torchprune.reports.report import runs_of
from torchprune.specs.quantize import Int4, Int8


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("cli"))


SPECS: dict[str, Any] = {
    "--method magnitude": MagnitudeSpec(),
    "": WandaSpec(),
    "--method ria": RIASpec(),
    "--method sparsegpt": SparseGPTSpec(),
    "--method admm": ADMMSpec(refine=PCG(15)),
    "--method best": BestSpec(alpha=0.0, reconstruct=Reconstruct(epochs=4)),
    "--method best --effort fast": BestSpec(effort="fast", alpha=0.25, reconstruct=False),
    "--method best --effort balanced": BestSpec(),
    "--method best --effort max": BestSpec(effort="max", reconstruct=Reconstruct(epochs=4)),
    "--method best --effort max --reconstruct": BestSpec(effort="max"),
    "--method best --effort fast --alpha 0.5": BestSpec(effort="fast", alpha=0.5),
    "--refine pcg": WandaSpec(refine=PCG()),
    "--refine pcg --alpha 0.5": WandaSpec(refine=PCG(), alpha=0.5),
    "--refine swaps --pattern 2:4": WandaSpec(pattern="2:4", refine=Swaps()),
    "--method magnitude --refine swaps": MagnitudeSpec(refine=Swaps()),
    "--method sparsegpt --alpha 1": SparseGPTSpec(alpha=1.0),
    "--method sparsegpt --quantize int8": SparseGPTSpec(quantize=Int8()),
    "--method sparsegpt --quantize int4 --pattern 2:4": SparseGPTSpec(
        pattern="2:4", quantize=Int4()
    ),
    "--method ria --reconstruct": RIASpec(reconstruct=Reconstruct()),
    "--permute --pattern 2:4": WandaSpec(pattern="2:4", permute=True),
    "--allocation uniform": WandaSpec(),
    "--allocation owl": WandaSpec(allocation=OWL()),
    "--allocation error": WandaSpec(allocation=LeastError()),
    "--allocation search --target *.down_proj": WandaSpec(
        allocation=Search(), targets=("*.down_proj",)
    ),
}


@pytest.mark.parametrize("options", SPECS)
def test_the_saved_run_is_of_the_spec_that_was_asked_for(home, tmp_path, options):
    out = ("--data", home / "text.txt", "--output", tmp_path / "out")
    worked("prune", home / "model", *SMALL, *out, *options.split())
    (run,) = runs_of(torchprune.load(tmp_path / "out"))
    assert type(run.spec) is type(SPECS[options])
    assert run.spec == SPECS[options]


def test_the_saved_weights_are_those_that_the_spec_makes(home, tmp_path):
    """What the command line adds to the library is nothing that changes a number."""
    model = AutoModelForCausalLM.from_pretrained(home / "model").eval()
    spec = ADMMSpec(pattern="2:4", alpha=0.5, permute=True)
    batches = synthesise(model, sequences=3, length=16, seed=0, progress=False)
    torchprune.sparsify(model, spec, batches, progress=False, max_batches=3, seed=0)
    out = ("--output", tmp_path / "out")
    options = ("--method", "admm", "--alpha", "0.5", "--permute", "--pattern", "2:4")
    worked("prune", home / "model", *SMALL, *out, *options)
    saved = torchprune.load(tmp_path / "out")
    expected, found = (torchprune.fold(m).state_dict() for m in (model, saved))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_magnitude_reads_data_where_an_option_needs_them(home, tmp_path):
    swaps = ("--method", "magnitude", "--refine", "swaps", "--output", tmp_path / "out")
    data = ("--data", tmp_path / "absent.txt")
    assert "no such file" in complaint("prune", home / "model", *swaps, *data)


# -- the default directory -------------------------------------------------------------------------


def test_the_default_directory_tells_options_apart(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options in (
        "--method best --effort fast --pattern 2:4 --permute",
        "--method sparsegpt --alpha 0.5 --reconstruct",
        "--refine swaps --allocation owl",
    ):
        worked("prune", home / "model", *SMALL, *options.split())
    assert {path.name for path in tmp_path.iterdir()} == {
        "model-best-effort-fast-permute-2of4",
        "model-sparsegpt-alpha-0.5-reconstruct-unstructured-0.5",
        "model-wanda-refine-swaps-allocation-owl-unstructured-0.5",
    }


def test_the_default_directory_is_a_new_one(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    magnitude = ("prune", home / "model", "--method", "magnitude")
    worked(*magnitude)
    written = (tmp_path / "model-magnitude-unstructured-0.5" / "manifest.json").read_bytes()
    said = complaint(*magnitude, "--scope", "row")  # which the name does not tell
    assert "model-magnitude-unstructured-0.5 exists; name one with --output" in said
    assert (tmp_path / "model-magnitude-unstructured-0.5" / "manifest.json").read_bytes() == written
    worked(*magnitude, "--scope", "row", "--output", "model-magnitude-unstructured-0.5")
    (run,) = runs_of(torchprune.load(tmp_path / "model-magnitude-unstructured-0.5"))
    assert run.spec == MagnitudeSpec(scope="row")


# -- what is wrong: one line, and the work not begun -----------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--alpha 0.5", "alpha says what changed weights should reach, and wanda changes none"),
        ("--method admm --alpha 2", "ADMMSpec: alpha must be from 0 to 1, got 2.0"),
        ("--method admm --refine swaps", "Swaps betters the mask of weights that stay as they are"),
        ("--refine swaps --pattern block:4x4", "Swaps exchanges single weights"),
        ("--permute", 'pattern "unstructured" has no groups'),
        ("--allocation owl --pattern 2:4", "allocation shares zeros unevenly, but pattern 2:4"),
        ("--allocation owl --scope global", 'scope "global" shares one budget'),
    ],
)
def test_what_the_spec_refuses_is_one_line(home, tmp_path, options, message):
    out = tmp_path / "out"
    assert message in complaint("prune", home / "model", "--output", out, *options.split())
    assert not out.exists()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "sparsegpt", "admm"])
def test_an_effort_is_for_the_best_method(home, method):
    said = complaint("prune", home / "model", "--method", method, "--effort", "fast", code=2)
    assert f"the method is {method}; add --method best, or leave --effort out" in said


def test_a_grid_is_for_sparsegpt(home):
    said = complaint("prune", home / "model", "--quantize", "int4", code=2)
    assert "the method is wanda; add --method sparsegpt, or leave --quantize out" in said


def test_a_malformed_override_is_one_line():
    assert "'*.q_proj' is not NAME=VALUE" in complaint(
        "prune", "model", "--override", "*.q_proj", code=2
    )


@pytest.mark.parametrize(
    "options",
    ["--effort most", "--refine both", "--alpha half", "--allocation even", "--reconstruct=2"],
)
def test_wrong_usage(options):
    assert call("prune", "model", *options.split()).exit_code == 2


def test_the_options_of_beginners_come_first():
    simple, _, better = worked("prune", "--help").partition("Better quality")
    better, _, _ = better.partition("Options in a file")
    first, then = (set(re.findall(r"^\W{1,4}--(\w+)", s, re.MULTILINE)) for s in (simple, better))
    assert then == {
        *("effort", "refine", "alpha", "reconstruct", "permute", "allocation", "quantize")
    }
    assert {"method", "pattern", "sparsity", "data", "output"} <= first
