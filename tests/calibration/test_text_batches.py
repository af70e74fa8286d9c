"""Texts made batches: every kind of source, what is refused, and the whole road with a model."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from tiny_lm import ARTICLES, WORDS, save_tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer, BertTokenizerFast

import torchprune
from torchprune import text_batches
from torchprune.calibration.text import draw_windows, some_documents, tokenise
from torchprune.errors import CalibrationError, InputError, TorchpruneError
from torchprune.study.tasks.evaluation import EvaluationError

SMALL = {"samples": 5, "length": 16}
TEMPLATE = "{% for m in messages %} w58 {{ m['role'] }} {{ m['content'] }} w59{% endfor %}"
"""Of a conversation of words, in which each message is four tokens and more."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("texts")
    save_tiny_lm(directory)
    return directory


@pytest.fixture
def tokenizer(home: Path) -> Any:
    return AutoTokenizer.from_pretrained(home)


def letters(text: str) -> dict[str, list[int]]:
    """A tokenizer of the user's own: as many tokens as characters."""
    return {"input_ids": [ord(c) for c in text]}


def ids(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([batch["input_ids"] for batch in batches])


def same(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> bool:
    return torch.equal(ids(one), ids(other))


# -- what comes out --------------------------------------------------------------------------------


def test_windows_are_full_and_of_the_text(tokenizer: Any) -> None:
    batches = text_batches(tokenizer, ARTICLES, **SMALL)
    assert [list(b) for b in batches] == [["input_ids"]] * 5
    assert {(b["input_ids"].shape, b["input_ids"].dtype) for b in batches} == {
        ((1, 16), torch.int64)
    }
    order = random.Random(0).sample(ARTICLES, len(ARTICLES))
    whole = " ".join(order)
    for window in ids(batches):
        assert " ".join(WORDS[i - 1] for i in window.tolist()) in whole


def test_the_command_line_cuts_the_same_windows(tokenizer: Any) -> None:
    texts = some_documents(ARTICLES, 5 * 16 * 16, seed=3)
    drawn = draw_windows(tokenise(tokenizer, texts), 5, 16, seed=3)
    assert torch.equal(ids(text_batches(tokenizer, ARTICLES, seed=3, **SMALL)), drawn)


def test_the_seed_decides(tokenizer: Any) -> None:
    state = torch.random.get_rng_state()
    one, two = (text_batches(tokenizer, ARTICLES, seed=7, **SMALL) for _ in range(2))
    assert same(one, two)
    assert not same(one, text_batches(tokenizer, ARTICLES, seed=8, **SMALL))
    assert torch.equal(torch.random.get_rng_state(), state)


# -- what goes in ----------------------------------------------------------------------------------


def test_the_same_texts_in_any_container_give_the_same_bits(tokenizer: Any, tmp_path: Path) -> None:
    texts = [*ARTICLES[:4], "", " \n", *ARTICLES[4:]]
    expected = text_batches(tokenizer, texts, **SMALL)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts), "utf-8")
    alone = Dataset.from_dict({"body": texts})
    several = Dataset.from_dict({"title": ["w1"] * len(texts), "text": texts})
    for source in (
        tuple(texts),
        alone,
        alone["body"],
        several,
        [{"text": text, "n": 1} for text in texts],
        several.to_pandas()["text"],
        several.to_pandas()["text"].to_numpy(),
        tmp_path / "rows.jsonl",
        str(tmp_path / "rows.jsonl"),
    ):
        assert same(text_batches(tokenizer, source, **SMALL), expected), type(source)
    streams = (several.to_iterable_dataset(), (text for text in texts), iter(texts))
    found = [text_batches(tokenizer, stream, **SMALL) for stream in streams]
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_a_file_is_one_text(tokenizer: Any, tmp_path: Path) -> None:
    text = "\n\n".join(ARTICLES)
    (tmp_path / "notes.txt").write_text(text, "utf-8")
    found = text_batches(tokenizer, tmp_path / "notes.txt", **SMALL)
    assert same(found, text_batches(tokenizer, [text], **SMALL))


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_is_read_no_further_than_needed(tokenizer: Any, chat: bool) -> None:
    tokenizer.chat_template = TEMPLATE
    read = 0

    def endless() -> Iterator[dict[str, Any]]:
        nonlocal read
        for i in itertools.count():
            read = i + 1
            text = ARTICLES[i % 9]
            yield {"messages": talk(text)} if chat else {"text": text, "url": "w1"}

    batches = text_batches(tokenizer, endless(), chat=chat, **SMALL)
    assert ids(batches).shape == (5, 16)
    assert read < (12 if chat else 6)


def test_a_stream_of_a_dataset_is_read_no_further_than_needed(tokenizer: Any) -> None:
    read = []

    def rows() -> Iterator[dict[str, str]]:
        for i in range(10_000):
            read.append(i)
            yield {"text": ARTICLES[i % 9]}

    from datasets import IterableDataset

    assert len(text_batches(tokenizer, IterableDataset.from_generator(rows), **SMALL)) == 5
    assert len(read) < 50


def test_much_text_of_few_tokens_is_read_on() -> None:
    """A tokenizer for which a token is more than the characters that are read at first."""

    def sparse(text: str) -> dict[str, list[int]]:
        return {"input_ids": [1] * (len(text) // 100)}

    assert ids(
        text_batches(sparse, ("x" * 50 for _ in itertools.count()), samples=1, length=8)
    ).shape


def test_a_large_source_is_taken_in_runs_of_neighbours() -> None:
    """Paragraphs of one article are rows that follow each other."""
    rows = [chr(1000 + i) for i in range(20_000)]
    stream = letters("".join(some_documents(rows, 256, seed=0)))["input_ids"]
    steps = [b - a for a, b in itertools.pairwise(stream)]
    assert steps.count(1) == 256 - 4  # four runs of 64
    assert len(set(stream)) == 256


# -- conversations ---------------------------------------------------------------------------------


def talk(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text}]


def test_conversations_go_through_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    talks = [talk(text) for text in ARTICLES]
    found = text_batches(tokenizer, talks, chat=True, **SMALL)
    written = [
        tokenizer(tokenizer.apply_chat_template(t, tokenize=False), add_special_tokens=False)
        for t in talks
    ]
    beginnings = [row["input_ids"][:16] for row in written]
    assert all(window.tolist() in beginnings for window in ids(found))
    assert len({tuple(window.tolist()) for window in ids(found)}) == 5

    sharegpt = [
        [
            {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
            for m in t
        ]
        for t in talks
    ]
    for source in (
        [{"messages": t} for t in talks],
        Dataset.from_dict({"id": ["w1"] * 9, "messages": talks}),
        Dataset.from_dict({"talk": talks}),
        [{"id": 3, "conversations": t} for t in sharegpt],
    ):
        assert same(text_batches(tokenizer, source, chat=True, **SMALL), found)


def test_conversations_are_not_given_twice(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    talks = [talk(ARTICLES[1]), [], talk(ARTICLES[2])]
    with pytest.warns(UserWarning, match="2 different windows of 16 tokens, not 5"):
        found = text_batches(tokenizer, talks, chat=True, **SMALL)
    assert len({tuple(window.tolist()) for window in ids(found)}) == len(found) == 2


def test_special_tokens_are_the_templates_own(home: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(home)
    tokenizer.chat_template = TEMPLATE

    class Adding(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: str, **options: Any) -> Any:
            assert options["add_special_tokens"] is False
            return super().__call__(text, **options)

    tokenizer.__class__ = Adding
    assert text_batches(tokenizer, [talk(t) for t in ARTICLES], chat=True, **SMALL)


# -- too little ------------------------------------------------------------------------------------


def test_less_text_than_a_window_is_one_shorter_window(tokenizer: Any) -> None:
    with pytest.warns(
        UserWarning, match="the texts have 5 tokens: one window of these, none of 16"
    ):
        found = text_batches(tokenizer, ["w1 w2", "w3 w4 w5"], **SMALL)
    assert sorted(ids(found)[0].tolist()) == [2, 3, 4, 5, 6]


def test_no_window_comes_twice_from_a_short_text(tokenizer: Any) -> None:
    text = " ".join(WORDS[:18])
    with pytest.warns(UserWarning, match="3 different windows of 16 tokens, not 5"):
        found = text_batches(tokenizer, [text], **SMALL)
    assert ids(found)[:, 0].tolist() == [1, 2, 3]


def test_windows_are_cut_to_what_the_tokenizer_knows(tokenizer: Any) -> None:
    tokenizer.model_max_length = 8
    with pytest.warns(UserWarning, match="model_max_length is 8: windows have so many.*not 16"):
        assert ids(text_batches(tokenizer, ARTICLES, **SMALL)).shape == (5, 8)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("some text of mine", r"no such file: 'some text of mine'.*\[text\]"),
        ("word " * 2000, r"no such file: 'word .*\.\.\.'.*\[text\]"),
        ("Salesforce/wikitext", "a dataset as a split"),
        (Path("absent.txt"), "no such file: 'absent.txt'"),
        ([], "holds no text"),
        (["", " \n"], "holds no text"),
        (iter(()), "holds no text"),
        (b"bytes", "source is a bytes; expected a list of strings"),
        (7, "source is a int"),
        ({"w1", "w2"}, "source is a set"),
        (DatasetDict(train=Dataset.from_dict({"a": ["w1"]})), r"of 'train'; .*\['train'\]"),
        (Dataset.from_dict({"title": ["w1"], "body": ["w2"]}), "no column 'text'; it has 'title'"),
        ([{"texts": "w1", "n": 1}], "did you mean 'texts'"),
        ([{"text": None}], "row 0 of the source is a NoneType, not text"),
        (["w1", 3], "row 1 of the source is a int, not text"),
        ([torch.ones(1, 4)], "row 0 of the source is a Tensor, not text; batches need no"),
        ([talk("w1")], "row 0 of the source is a conversation: .*chat=True"),
    ],
)  # fmt: skip
def test_sources_that_are_none(tokenizer: Any, source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        text_batches(tokenizer, source, **SMALL)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (ARTICLES, "is a str; chat=True expects conversations"),
        (talk("w1"), r"is one message; give a list of conversations: \[conversation\]"),
        ([{"id": 1, "text": "w1"}], "no column 'messages'; it has 'id', 'text'"),
        ([[{"role": "user", "content": "w1"}, "w2"]], "is a list; chat=True expects"),
        ([[{"role": "user", "content": "w1"}] * 2], "row 0 .*the template refuses it: .*twice"),
        ([[]], "holds no text"),
    ],
)  # fmt: skip
def test_conversations_that_are_none(tokenizer: Any, source: Any, message: str) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}"
        "{{ raise_exception(m.role ~ ' speaks twice') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(InputError, match=message):
        text_batches(tokenizer, source, chat=True, **SMALL)


def test_tokenizers_without_a_template_are_named(tokenizer: Any) -> None:
    for one in (tokenizer, letters):
        with pytest.raises(InputError, match=f"{type(one).__name__} has no chat template"):
            text_batches(one, [talk("w1")], chat=True)


def test_numbers_and_tokenizers_are_checked(tokenizer: Any) -> None:
    for option in ("samples", "length"):
        with pytest.raises(InputError, match=f"{option} must be at least 1, got 0"):
            text_batches(tokenizer, ARTICLES, **SMALL | {option: 0})
    with pytest.raises(InputError, match="tokenizer is a str"):
        text_batches("gpt2", ARTICLES)
    for wrong in ([1, 2], {"ids": [1]}, {"input_ids": ["a"]}, {"input_ids": [[1], [2]]}):
        with pytest.raises(InputError, match="the tokenizer gave"):
            text_batches(lambda text, found=wrong: found, ARTICLES, **SMALL)


def test_a_row_of_ids_in_any_form_is_understood() -> None:
    expected = ids(text_batches(letters, ARTICLES, **SMALL))
    for form in (torch.tensor, lambda x: [x], lambda x: torch.tensor([x], dtype=torch.int32)):
        found = text_batches(
            lambda t, f=form: {"input_ids": f(letters(t)["input_ids"])}, ARTICLES, **SMALL
        )
        assert torch.equal(ids(found), expected)


# -- the road --------------------------------------------------------------------------------------


def test_texts_prune_a_pretrained_model(home: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(home)
    texts, held_out = ARTICLES[:6], text_batches(tokenizer, ARTICLES[6:], samples=4, length=32)
    before = torchprune.perplexity(model, held_out)
    assert (before.windows, before.seqlen) == (4, 32)
    torchprune.sparsify(
        model, torchprune.SparseGPTSpec(), texts, tokenizer=tokenizer, max_batches=6, progress=False
    )
    after = torchprune.perplexity(model, held_out)
    assert after != before
    report = torchprune.report(model)
    assert report.sparsity == 0.5
    assert "calibrated on 6 windows of 32 tokens of the given texts" in report.notes
    torchprune.save(model, tmp_path / "pruned", tokenizer=tokenizer)
    assert torchprune.perplexity(torchprune.load(tmp_path / "pruned"), held_out) == after

    by_hand = AutoModelForCausalLM.from_pretrained(home)
    batches = text_batches(tokenizer, texts, samples=6, length=32)
    torchprune.sparsify(by_hand, torchprune.SparseGPTSpec(), batches, progress=False)
    assert torchprune.perplexity(by_hand, held_out) == after


def test_every_source_prunes_and_none_without_a_tokenizer(
    home: Path, tokenizer: Any, tmp_path: Path
) -> None:
    wanda, neurons = torchprune.WandaSpec(), torchprune.NeuronSpec(sparsity=0.25)
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join(ARTICLES), "utf-8")
    rows = Dataset.from_dict({"text": ARTICLES, "title": ARTICLES})
    streams = rows.to_iterable_dataset(), iter(ARTICLES)
    for source in (ARTICLES, path, str(path), rows, *streams):
        spec = neurons if source is path else wanda
        model = AutoModelForCausalLM.from_pretrained(home)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        if not isinstance(source, Iterator):
            both = r"sparsify\(model, spec, texts, tokenizer=tokenizer\).*text_batches"
            with pytest.raises(CalibrationError, match=both):
                torchprune.sparsify(model, spec, source, progress=False)
            assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
        options = {"tokenizer": tokenizer, "max_batches": 3, "progress": False}
        torchprune.sparsify(model, spec, source, **options)
        assert torchprune.masks(model)


def test_batches_with_a_tokenizer_and_programs_with_one_are_refused(
    home: Path, tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(home)
    with pytest.raises(TorchpruneError, match="batches need no tokenizer"):
        torchprune.sparsify(
            model, torchprune.WandaSpec(), [torch.ones(1, 4).long()], tokenizer=tokenizer
        )
    program = torch.export.export(torch.nn.Sequential(torch.nn.Linear(4, 4)), (torch.ones(1, 4),))
    with pytest.raises(CalibrationError, match="give a program batches"):
        torchprune.sparsify(program, torchprune.WandaSpec(), ARTICLES, tokenizer=tokenizer)


def test_a_models_context_and_the_tokenizers_bound_the_windows(home: Path, tokenizer: Any) -> None:
    for most in (32, 20):
        tokenizer.model_max_length = most if most == 20 else int(1e30)
        model = AutoModelForCausalLM.from_pretrained(home)
        options = {"tokenizer": tokenizer, "max_batches": 2, "progress": False}
        torchprune.sparsify(model, torchprune.WandaSpec(), ARTICLES, **options)
        assert f"2 windows of {most} tokens" in " ".join(torchprune.report(model).notes)


def test_perplexity_takes_batches_of_one_length(home: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(home)
    batches = text_batches(tokenizer, ARTICLES, samples=3, length=16)
    flat = torch.cat([b["input_ids"][0] for b in batches])
    assert torchprune.perplexity(model, batches) == torchprune.perplexity(model, flat, seqlen=16)
    with pytest.raises(EvaluationError, match=r"seqlen is 8, and the batches are of \[16\] tokens"):
        torchprune.perplexity(model, batches, seqlen=8)


def test_a_tokenizer_that_adds_tokens_at_the_ends_is_asked_once(tmp_path: Path) -> None:
    vocabulary = {
        w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    }
    bert = BertTokenizerFast(vocab=vocabulary)
    found = ids(text_batches(bert, ["w1 w2", "w3"], samples=1, length=5))
    assert found.tolist()[0][0] == 2
    assert found.tolist()[0][-1] == 3
