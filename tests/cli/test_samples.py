"""Several calibration sources and their shares; conversations by a chat template or as text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import SMALL, complaint, make_home, worked
from hypothesis import given
from hypothesis import strategies as st
from tiny_lm import WORDS
from transformers import AutoTokenizer

from torchprune.calibration.text import draw_windows, tokenise
from torchprune.cli.samples import drawn, parted, read_sources, shares

TEMPLATE = "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}"
TALKS = [
    [{"role": "user", "content": f"w{10 + i} w{20 + i}"}, {"role": "assistant", "content": "w9"}]
    for i in range(12)
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = make_home(tmp_path_factory.mktemp("samples"))
    rows = "\n".join(json.dumps({"messages": talk, "id": i}) for i, talk in enumerate(TALKS))
    (home / "chat.jsonl").write_text(rows, "utf-8")
    (home / "low.txt").write_text(" ".join(WORDS[:10] * 20), "utf-8")
    (home / "high.txt").write_text(" ".join(WORDS[50:] * 20), "utf-8")
    return home


def windows(home: Path, *data: object, count: int = 8, chat: bool = True, template: bool = True):
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    tokenizer.chat_template = TEMPLATE if template else None
    said: list[str] = []
    sources = read_sources([str(item) for item in data], "text")
    found = drawn(tokenizer, sources, count, 4, 3, chat=chat, say=said.append)
    assert all(window.shape == (1, 4) for window in found)
    return found, said


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(0, 200))
def test_shares_sum_to_the_count_and_miss_their_due_by_less_than_one(weights, count):
    found = shares(weights, count)
    assert sum(found) == count
    for part, weight in zip(found, weights, strict=True):
        assert abs(part - count * weight / sum(weights)) < 1 + 1e-9


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("notes.txt", ("notes.txt", 1.0)),
        ("notes.txt=0.7", ("notes.txt", 0.7)),
        ("a=b.txt", ("a=b.txt", 1.0)),
        ("allenai/c4:en=2", ("allenai/c4:en", 2.0)),
        ("=3", ("=3", 1.0)),
    ],
)
def test_a_weight_is_a_number_after_the_name(item, expected):
    assert parted(item) == expected


def test_a_file_of_that_very_name_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes=3").write_text("w1", "utf-8")
    assert parted("notes=3") == ("notes=3", 1.0)


def test_sources_have_their_shares(home):
    found, _ = windows(home, f"{home / 'low.txt'}=3", home / "high.txt")
    low = [bool((window <= 10).all()) for window in found]
    assert low == [True] * 6 + [False] * 2
    assert all(bool((window > 50).all()) for window in found[6:])


def test_one_source_gives_the_windows_it_always_gave(home):
    (found, _), tokenizer = (
        windows(home, home / "low.txt"),
        AutoTokenizer.from_pretrained(home / "model"),
    )
    text = (home / "low.txt").read_text("utf-8")
    expected = draw_windows(tokenise(tokenizer, [text[: 8 * 4 * 16]]), 8, 4, 3)
    assert torch.equal(torch.cat(found), expected)


def test_conversations_are_written_by_the_template(home):
    found, said = windows(home, home / "chat.jsonl", count=5)
    assert said == []
    for window in found:  # each begins where a conversation does: w1 = token 2, w2 = token 3
        first, one, two, end = window[0].tolist()
        assert (first, end) == (2, 3)
        assert two == one + 10


def test_without_template_or_wish_they_are_plain(home):
    for options in ({"chat": False}, {"template": False}):
        found, said = windows(home, home / "chat.jsonl", count=5, **options)
        assert not any(bool(((w == 2) | (w == 3)).any()) for w in found)
        assert len(said) == (0 if options.get("template", True) else 1)
    assert "no chat template" in said[0]


def test_rows_of_text_stay_plain(home):
    one, _ = windows(home, home / "text.jsonl")
    two, _ = windows(home, home / "text.jsonl", chat=False)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_prune_takes_several_and_says_so(home, tmp_path):
    out = tmp_path / "out"
    data = ("--data", f"{home / 'text.txt'}=0.7", "--data", f"{home / 'chat.jsonl'}=0.3")
    said = worked("prune", home / "model", *data, *SMALL, "--output", out)
    assert f"{home / 'text.txt'} (0.7) and {home / 'chat.jsonl'} (0.3)" in said
    notes = json.loads(worked("inspect", out, "--json"))["notes"]
    assert any("(0.7) and" in note for note in notes)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"messages": "w1"}', "line 1: expected a list of messages, got 'w1'"),
        ('{"messages": [3]}', "expected a list of messages"),
        ('{"talk": []}', "has no column 'text'"),
        (" ", "holds no text"),
    ],
)
def test_bad_rows_are_refused(home, tmp_path, rows, message):
    (tmp_path / "rows.jsonl").write_text(rows, "utf-8")
    data = ("--data", tmp_path / "rows.jsonl", "--output", tmp_path / "out")
    assert message in complaint("prune", home / "model", *SMALL, *data)


def test_a_weight_of_nothing_is_refused(home, tmp_path):
    data = ("--data", f"{home / 'low.txt'}=0", "--output", tmp_path / "out")
    assert "a weight must be above 0" in complaint("prune", home / "model", *data)
