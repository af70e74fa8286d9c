"""Tasks of lm_eval on live models: against a computation by hand, and against lm_eval's own."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import sys
from pathlib import Path

import datasets
import numpy
import pytest
import torch
from tiny_lm import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import torchprune
from torchprune import HeadSpec, MagnitudeSpec, NeuronSpec, evaluate
from torchprune.errors import MissingExtraError
from torchprune.study.tasks import task_runs
from torchprune.study.tasks.evaluation import EvaluationError
from torchprune.study.tasks.generations import Request, before_stop, texts_written
from torchprune.study.tasks.harness_tasks import load_tasks, shipped_names
from torchprune.study.tasks.language_model import LanguageModel
from torchprune.study.tasks.task_results import Evaluation

TASKS = Path(__file__).parent / "tasks"
ALL = ["tiny_next_word", "tiny_rolling", "tiny_last_word", "tiny_writing"]
CONTEXT = 32


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def words():
    vocabulary = {word: i for i, word in enumerate(["<unk>", *WORDS, "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )


def make(kind: str = "llama") -> nn.Module:
    torch.manual_seed(3)
    common = {"vocab_size": len(WORDS) + 2, "bos_token_id": None, "eos_token_id": None}
    if kind == "gpt2":
        config = GPT2Config(
            n_positions=CONTEXT, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5, **common
        )
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,
        **common,
    )
    return LlamaForCausalLM(config).eval()


def asked(model, words, tasks=ALL, **options):
    options = {"progress": False, "task_path": TASKS, **options}
    return evaluate(model, tasks, tokenizer=words, **options)


def totals(found):
    return {(s.task, s.metric): s.totals or (s.figure,) for s in found.scores}


def nats_by_hand(model, before, after):
    """The likelihood of tokens after others, in float64, one token and one row at a time."""
    nats, greedy = 0.0, True
    for place, token in enumerate(after):
        row = [*before, *after[:place]][-CONTEXT:]
        with torch.no_grad():
            scores = model(torch.tensor([row])).logits[0, -1].double().tolist()
        top = max(scores)
        nats += scores[token] - top - math.log(math.fsum(math.exp(x - top) for x in scores))
        greedy &= max(range(len(scores)), key=scores.__getitem__) == token
    return nats, greedy


def rows_of(name):
    return [json.loads(line) for line in (TASKS / name).read_text("utf-8").splitlines()]


# -- the model, asked ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_likelihoods_are_those_by_hand(words, kind, batch_size):
    model = make(kind)
    asker = LanguageModel(model, words, batch_size=batch_size)
    draw = random.Random(0)
    pairs = []
    for _ in range(9):
        before, after = (" ".join(draw.choices(WORDS, k=draw.randint(1, 7))) for _ in "ab")
        pairs.append((before, " " + after))
    pairs += [("", "w3 w4"), (pairs[0][0], " w9"), (pairs[0][0], " w8"), ("w1 ", "w2")]
    with torch.no_grad():
        found = asker.continuations(pairs)
    for (before, after), (nats, greedy) in zip(pairs, found, strict=True):
        ids = words.encode(before) or [words.eos_token_id]
        by_hand, is_greedy = nats_by_hand(model, ids, words.encode(after))
        assert nats == pytest.approx(by_hand, abs=2e-4)
        assert greedy == is_greedy
    assert found == asker.continuations(pairs)


def test_what_is_greedy_is_seen(words):
    model = make()
    text = LanguageModel(model, words).written([("w1 w2", {"max_gen_toks": 3, "until": []})])[0]
    found = LanguageModel(model, words).continuations([("w1 w2", f" {text}"), ("w1 w2", " w5")])
    assert [greedy for _, greedy in found] == [True, text == "w5"]


def test_a_context_too_long_loses_its_beginning(words):
    model = make()
    before, after = " ".join(WORDS[:50]), " w3 w1 w2"
    with torch.no_grad():
        ((nats, _),) = LanguageModel(model, words).continuations([(before, after)])
        ids = [*words.encode(before), *words.encode(after)][-CONTEXT - 1 :]
        logits = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    expected = sum(float(logits[i, ids[i + 1]]) for i in range(CONTEXT - 3, CONTEXT))
    assert nats == pytest.approx(expected, abs=2e-4)
    with pytest.raises(EvaluationError, match=r"an answer has 33 tokens, .* context is 32"):
        LanguageModel(model, words).continuations([("w1", " " + " ".join(WORDS[:33]))])


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 70])
def test_a_whole_text_is_read_in_pieces(words, length):
    """Each token once: a first piece, then pieces whose last has the full context before it."""
    model = make()
    text = " ".join(random.Random(length).choices(WORDS, k=length))
    ids, expected, start = words.encode(text), 0.0, 0
    whole = [words.eos_token_id, *ids]
    while start < length:
        end = min(start + CONTEXT, length)
        row = whole[max(0, end - CONTEXT) : end]
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
        for place in range(start, end):
            expected += float(logits[place - end, ids[place]])
        start = end
    with torch.no_grad():
        (found,) = LanguageModel(model, words, batch_size=3).whole_texts([text])
    assert found == pytest.approx(expected, abs=1e-3)


class Plain(nn.Module):
    """Logits bare, no configuration, no `generate`."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return self.inner(ids).logits


def test_a_plain_module_writes_what_generate_writes(words):
    model = make()
    model.config.max_position_embeddings = 2048  # a plain module's context is not known
    prompts = [
        (" ".join(WORDS[i : i + 2 + i % 3]), {"until": ["w7", "."], "max_gen_toks": 5})
        for i in range(9)
    ]
    with torch.no_grad():
        expected = LanguageModel(model, words, batch_size=4).written(prompts)
        assert LanguageModel(Plain(model), words, batch_size=2).written(prompts) == expected
    assert len(set(expected)) > 4
    assert any(len(text.split()) == 5 for text in expected)


def test_writing_stops(words):
    model = make()
    with torch.no_grad():
        (whole,) = LanguageModel(model, words).written([("w1", {"max_gen_toks": 6})])
        stop = whole.split()[2]
        (cut,) = LanguageModel(model, words).written([("w1", {"max_gen_toks": 6, "until": stop})])
    assert len(whole.split()) == 6
    assert cut == before_stop(whole, [stop])
    assert cut != whole
    assert before_stop("a b", ["", "c"]) == "a b"


def test_options_of_a_request():
    made = Request.of([1], {"until": ".", "max_tokens": 3, "temperature": 0.0, "top_p": 0.9})
    assert made == Request((1,), (".",), 3, {"do_sample": False})
    made = Request.of([1], {"temperature": 0.7, "num_beams": 1})
    assert made.options == {"temperature": 0.7, "num_beams": 1, "do_sample": True}


def test_what_a_model_cannot_answer(words):
    model = make()
    with pytest.raises(EvaluationError, match=r"256 new tokens, the model's context is 32"):
        LanguageModel(model, words).written([("w1", {})])
    with pytest.raises(EvaluationError, match=r"writes greedily; the task asks for do_sample"):
        LanguageModel(Plain(model), words).written([("w1", {"do_sample": True, "max_tokens": 2})])
    with pytest.raises(EvaluationError, match="has no tokens of its own"):
        LanguageModel(model, words).continuations([("w1", " ")])
    bare = copy.deepcopy(words)
    bare.eos_token = None
    with pytest.raises(EvaluationError, match="bos or eos token"):
        LanguageModel(model, bare).whole_texts(["w1"])
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8))
    with pytest.raises(EvaluationError, match="encoder-decoder"):
        LanguageModel(t5, words)
    with pytest.raises(EvaluationError, match="batch_size"):
        LanguageModel(model, words, batch_size=0)
    with pytest.raises(EvaluationError, match="no tokens"):
        texts_written(
            model,
            words,
            [Request((), new_tokens=2)],
            context=9,
            batch_size=1,
            device=torch.device("cpu"),
            bar=lambda _: pytest.fail("nothing is asked"),
        )


# -- tasks -----------------------------------------------------------------------------------------


def test_scores_are_those_by_hand(words):
    model = make()
    found = asked(model, words)
    right = []
    for row in rows_of("next_word.jsonl"):
        ids = words.encode(row["question"])
        nats = [nats_by_hand(model, ids, words.encode(c))[0] for c in row["choices"]]
        right.append(float(max(range(3), key=nats.__getitem__) == row["answer"]))
    by = {(s.task, s.metric): s for s in found.scores}
    assert by["tiny_next_word", "acc"].totals == tuple(right)
    assert 0 < sum(right) < len(right)
    assert by["tiny_next_word", "acc"].binary
    last = by["tiny_last_word", "perplexity"]
    for row, total in zip(rows_of("texts.jsonl"), last.totals, strict=True):
        ids = words.encode(row["text"])
        assert total == pytest.approx(-nats_by_hand(model, ids[:-1], ids[-1:])[0], abs=1e-3)
    rolling = by["tiny_rolling", "word_perplexity"]
    assert rolling.weights == tuple(float(len(r["text"].split())) for r in rows_of("texts.jsonl"))
    assert rolling.value == pytest.approx(math.exp(sum(rolling.totals) / sum(rolling.weights)))
    assert by["tiny_next_word", "mcc"].totals == ()  # no mean over examples
    assert 0 < abs(by["tiny_next_word", "mcc"].value) < 1


@pytest.mark.parametrize("fewshot", [None, 2])
def test_scores_are_those_of_lm_evals_own_model(words, fewshot):
    from lm_eval.evaluator import evaluate as its_evaluate
    from lm_eval.models.huggingface import HFLM

    from torchprune.study.tasks.harness import prepare
    from torchprune.study.tasks.harness_tasks import quiet
    from torchprune.training.drawn_seeds import seeded

    model = make()
    model.generation_config.eos_token_id = words.eos_token_id  # else it only skips that word
    tasks = load_tasks(ALL, [TASKS])
    for task in tasks.values():
        prepare(task, fewshot, 0)
    with quiet(), seeded(0):
        lm = HFLM(pretrained=model, tokenizer=words, batch_size=4, device="cpu")
        its = its_evaluate(lm, {"tasks": tasks}, bootstrap_iters=0)
    found = asked(model, words, num_fewshot=fewshot)
    for s in found.scores:
        expected = its["results"][s.task][f"{s.metric},none"]
        assert s.value == pytest.approx(expected, rel=1e-5), (s.task, s.metric)
    writing = [s["filtered_resps"][0] for s in its["samples"]["tiny_writing"]]
    prompts = [
        (r["question"], {"until": ["w7"], "max_gen_toks": 4}) for r in rows_of("writing.jsonl")
    ]
    if fewshot is None:
        with torch.no_grad():
            assert LanguageModel(model, words).written(prompts) == writing


def test_masked_folded_lowered_and_shrunk_models(words):
    dense = make()
    expected = totals(asked(dense, words))
    masked = copy.deepcopy(dense)
    torchprune.sparsify(masked, MagnitudeSpec(sparsity=0.5), progress=False)
    scores = totals(asked(masked, words))
    assert scores != expected
    folded = torchprune.fold(copy.deepcopy(masked))
    assert totals(asked(folded, words)) == scores
    lowered = torchprune.lower(folded, "bitmask")
    assert any("Bitmask" in type(m).__name__ for m in lowered.modules())
    for key, values in totals(asked(lowered, words)).items():
        assert values == pytest.approx(scores[key], abs=1e-3), key
    units = copy.deepcopy(dense)
    torchprune.sparsify(units, HeadSpec(sparsity=0.5, score="l2"), progress=False)
    torchprune.sparsify(units, NeuronSpec(sparsity=0.5, score="l2"), progress=False)
    scores = totals(asked(units, words))
    ids = torch.randint(1, len(WORDS), (1, 8))
    small = torchprune.shrink(units, torchprune.plan_shrink(units, ids))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())
    for key, values in totals(asked(small, words)).items():
        assert values == pytest.approx(scores[key], abs=1e-3), key
    assert totals(asked(dense, words)) == expected


def test_a_model_is_unchanged_and_random_numbers_too(words):
    model = make().train()
    model.model.layers[0].eval()
    flags = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    draws = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    asked(model, words, limit=3)
    assert [m.training for m in model.modules()] == flags
    assert model.config.use_cache is True
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    after = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == draws


def test_ways_to_name_tasks(words, tmp_path, monkeypatch):
    model = make()
    by_name = totals(asked(model, words, "tiny_writing"))
    by_file = asked(model, words, TASKS / "writing.yaml", task_path=None)
    assert totals(by_file) == by_name
    named = asked(model, words, {"mine": str(TASKS / "writing.yaml")}, task_path=None)
    assert [s.task for s in named.scores] == ["mine"]
    folder = asked(model, words, [TASKS], task_path=None)
    assert {s.task for s in folder.scores} == set(ALL)
    group = asked(model, words, ["tiny_all"])
    assert [s.task for s in group.scores] == ["tiny_next_word"] * 3 + ["tiny_writing"]
    assert totals(asked(model, words, TASKS / "all.yaml", task_path=None)) == totals(group)
    monkeypatch.chdir(tmp_path)  # data files are found beside the YAML
    assert totals(asked(model, words, "tiny_writing")) == by_name


def test_a_limit_and_shots(words):
    model = make()
    whole = asked(model, words, "tiny_next_word").scores[0]
    few = asked(model, words, "tiny_next_word", limit=7).scores[0]
    assert few.totals == whole.totals[:7]
    assert few.ids == whole.ids[:7]
    shots = [asked(model, words, "tiny_last_word", num_fewshot=0).scores[0].totals]
    shots += [
        asked(model, words, "tiny_next_word", num_fewshot=2, seed=s).scores for s in (0, 0, 1)
    ]
    assert shots[1] == shots[2]


def test_chat_templates(words):
    model, chatty = make(), copy.deepcopy(words)
    chatty.chat_template = (
        "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}w2 {% endif %}"  # answers follow at once
    )
    plain = asked(model, chatty, "tiny_next_word")
    chat = asked(model, chatty, "tiny_next_word", chat=True)
    assert totals(plain) == totals(asked(model, words, "tiny_next_word"))
    right = []
    for row in rows_of("next_word.jsonl"):
        ids = words.encode(f"w1 {row['question']} w2")
        nats = [nats_by_hand(model, ids, words.encode(c))[0] for c in row["choices"]]
        right.append(float(max(range(3), key=nats.__getitem__) == row["answer"]))
    assert chat.scores[0].totals == tuple(right)
    with pytest.raises(EvaluationError, match="no chat template"):
        asked(model, words, "tiny_next_word", chat=True)


def test_sampled_texts_are_drawn_by_the_seed(words, tmp_path):
    text = (TASKS / "writing.yaml").read_text("utf-8")
    text = text.replace("do_sample: false", "do_sample: true\n  temperature: 2.0")
    text = text.replace("test: writing.jsonl", f"test: {TASKS / 'writing.jsonl'}")
    (tmp_path / "sampled.yaml").write_text(text, "utf-8")
    (task,) = load_tasks([tmp_path / "sampled.yaml"]).values()
    assert task.config.generation_kwargs["do_sample"] is True
    model = make()
    before = torch.get_rng_state()
    asked(model, words, tmp_path / "sampled.yaml")
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_tasks_and_files(words, tmp_path):
    model = make()
    with pytest.raises(
        EvaluationError, match=r"no task 'tiny_writin' .did you mean 'tiny_writing'"
    ):
        asked(model, words, "tiny_writin")
    with pytest.raises(EvaluationError, match=r"did you mean 'hellaswag.*give its path"):
        asked(model, words, "hellaswagg", task_path=None)
    with pytest.raises(EvaluationError, match="no such file"):
        asked(model, words, tmp_path / "no.yaml")
    with pytest.raises(EvaluationError, match="no such directory of tasks"):
        asked(model, words, "tiny_writing", task_path=tmp_path / "no")
    with pytest.raises(EvaluationError, match="holds no YAML file of a task"):
        asked(model, words, tmp_path, task_path=None)
    (tmp_path / "odd.yaml").write_text("dataset_path: json\n", "utf-8")
    with pytest.raises(EvaluationError, match="names no task"):
        asked(model, words, tmp_path / "odd.yaml")
    lost = (TASKS / "writing.yaml").read_text("utf-8").replace("writing.jsonl", "lost.jsonl")
    (tmp_path / "lost.yaml").write_text(lost, "utf-8")
    with pytest.raises(EvaluationError, match=r"'.*lost.yaml' cannot be loaded: .*lost.jsonl"):
        asked(model, words, tmp_path / "lost.yaml")
    with pytest.raises(EvaluationError, match=r"asked in text: evaluate\(..., tokenizer=...\)"):
        evaluate(model, "tiny_writing", task_path=TASKS)
    kinds = shipped_names()
    assert kinds["hellaswag"][0] == "task"
    assert kinds["mmlu"][0] == "group"
    assert kinds["ai2_arc"][0] in ("tag", "group")


def test_the_extra_is_named(words, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=re.escape("torchprune[eval]")):
        asked(make(), words, "tiny_writing")


def test_pruned_beside_dense_and_going_on(words, tmp_path, monkeypatch):
    dense, pruned = make(), make()
    torchprune.sparsify(pruned, MagnitudeSpec(sparsity=0.7))
    path = tmp_path / "found.json"
    found = asked(pruned, words, against=dense, path=path)
    assert Evaluation.from_json(path.read_text("utf-8")) == found
    by = {(row.task, row.metric): row for row in found.rows}
    assert by["tiny_rolling", "word_perplexity"].n == 6
    assert by["tiny_next_word", "mcc"].verdict == "not tested: no score of each example"
    assert "examples could show" in by["tiny_next_word", "acc"].verdict
    saved = tmp_path / "dense.json"
    asked(dense, words, path=saved)
    assert asked(pruned, words, against=saved).rows == found.rows
    fewer = asked(pruned, words, "tiny_next_word", against=saved, limit=5)
    assert fewer.rows[0].n == 5
    ran = []
    real = task_runs._Run.scores
    monkeypatch.setattr(
        task_runs._Run, "scores", lambda self, *a: (ran.append(self.name), real(self, *a))[1]
    )
    assert asked(pruned, words, against=dense, path=path) == found
    assert ran == []
    asked(pruned, words, [*ALL[:1], ALL[3]], against=dense, path=path, num_fewshot=1)
    assert ran == [ALL[0], ALL[3]] * 2
    with pytest.raises(EvaluationError, match="another model's results"):
        asked(dense, words, path=path)
    few = asked(dense, words, "tiny_writing")
    with pytest.raises(EvaluationError, match=r"does not hold 'tiny_rolling word_perplexity'"):
        asked(pruned, words, ALL[1], against=few)


CALLS: list[str] = []


def first(model):
    return counted("first")


def second(model):
    return counted("second")


def counted(name):
    CALLS.append(name)
    if len(CALLS) == 4:
        raise KeyboardInterrupt
    return [1.0, 0.0, 1.0]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    pruned, dense = make(), make()
    torchprune.sparsify(pruned, MagnitudeSpec(sparsity=0.5), progress=False)
    path, tasks = tmp_path / "found.json", [first, second]
    with pytest.raises(KeyboardInterrupt):
        evaluate(pruned, tasks, against=dense, path=path, progress=False)
    found = evaluate(pruned, tasks, against=dense, path=path, progress=False)
    assert CALLS == ["first", "second"] * 2 + ["second"]
    assert [row.p for row in found.rows] == [1.0, 1.0]
