"""`torchprune eval`: perplexity, tasks, both, beside the dense model, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import pytest
from commands import call, complaint, make_home, worked
from transformers import AutoTokenizer

from torchprune.study.tasks.task_results import Evaluation

TASKS = Path(__file__).parents[1] / "study" / "tasks"
LOCAL = ("--task-path", TASKS, "--limit", "5")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = make_home(tmp_path_factory.mktemp("home"))
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    tokenizer.eos_token = "<unk>"  # the word that a text without context comes after
    tokenizer.save_pretrained(home / "model")
    worked(
        *("prune", home / "model", "--method", "magnitude", "--sparsity", "0.7"),
        *("--output", home / "pruned", "-q"),
    )
    return home


def test_tasks_alone(home):
    said = worked("eval", home / "pruned", "--tasks", "tiny_next_word,tiny_rolling", *LOCAL, "-q")
    assert "tiny_next_word" in said
    assert "word_perplexity" in said
    assert "one standard error" in said
    assert "dense" not in said


def test_both_beside_the_dense_model(home, tmp_path):
    text = ("--text", home / "text.txt", "--seqlen", "16")
    out = tmp_path / "found.json"
    asked = ("eval", home / "pruned", *text, "--tasks", "tiny_next_word", *LOCAL, "--seed", "3")
    result = call(*asked, "--against", home / "model", "--output", out, "--json")
    assert (result.exit_code, result.stderr) == (0, f"wrote {out}\n")
    said = result.stdout
    found = Evaluation.from_json(said)
    assert Evaluation.from_json(out.read_text("utf-8")) == found
    first = found.rows[0]
    assert (first.task, first.metric) == ("text.txt", "perplexity")
    alone = json.loads(worked("eval", home / "pruned", *text, "--json"))
    assert first.value == pytest.approx(alone["perplexity"])
    assert first.n == alone["windows"]
    assert first.p is not None
    assert first.low < first.difference < first.high
    assert found.command.startswith(f"torchprune eval {home / 'pruned'} --text ")
    assert found.command.endswith("--seed 3")
    dense = tmp_path / "dense.json"
    worked("eval", home / "model", *asked[2:], "--output", dense, "-q")
    again = Evaluation.from_json(worked(*asked, "--against", dense, "--json"))
    assert again.rows == found.rows


def test_a_perplexity_has_an_error_bar(home):
    said = worked("eval", home / "model", "--text", home / "text.txt", "--seqlen", "16", "-q")
    assert " ± " in said.split("(")[0]


def test_what_is_refused(home, tmp_path, monkeypatch):
    model = home / "model"
    assert call("eval", model).exit_code == 2
    assert "Missing option: --text, --tasks or both" in complaint("eval", model, code=2)
    assert "no such directory of tasks: absent" in complaint(
        *("eval", model, "--tasks", "tiny_writing", "--task-path", "absent")
    )
    assert "did you mean 'tiny_writing'" in complaint(
        "eval", model, "--tasks", "tiny_writin", *LOCAL
    )
    assert "has no chat template" in complaint(
        "eval", model, "--tasks", "tiny_writing", *LOCAL, "--chat-template"
    )
    assert "saved as one of" in complaint(
        "eval", model, "--tasks", "tiny_writing", *LOCAL, "--output", tmp_path / "found.txt"
    )
    assert "no such file" in complaint(
        "eval", model, "--tasks", "tiny_writing", *LOCAL, "--against", tmp_path / "no.json"
    )
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "torchprune[eval]" in complaint("eval", model, "--tasks", "tiny_writing", *LOCAL)
