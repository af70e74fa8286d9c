"""Evaluations of functions: verdicts, tables, files, pages, and all that is refused."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from torchprune import evaluate, perplexity
from torchprune.errors import InputError
from torchprune.reports.pieces import Bars, Grid
from torchprune.study.tasks.evaluation import EvaluationError
from torchprune.study.tasks.paired import holm
from torchprune.study.tasks.score_rows import Scores
from torchprune.study.tasks.task_results import Evaluation
from torchprune.study.tasks.verdicts import in_unit


class Known(nn.Module):
    """A model that is a list of scores."""

    def __init__(self, *scores):
        super().__init__()
        self.scores = scores


def scores_of(model):
    return list(model.scores)


def draws(seed, share, size=200):
    draw = random.Random(seed)
    return [float(draw.random() < share) for _ in range(size)]


def compared(own, dense, name="task", **options):
    options = {"progress": False, **options}
    return evaluate(Known(*own), {name: scores_of}, against=Known(*dense), **options)


def test_a_difference_is_told_with_its_interval():
    dense = [1.0] * 150 + [0.0] * 50
    own = [1.0] * 120 + [0.0] * 75 + [1.0] * 5  # 30 lost, 5 gained
    (row,) = compared(own, dense).rows
    assert (row.value, row.dense, row.n) == (0.625, 0.75, 200)
    assert row.difference == -0.125
    assert row.p == pytest.approx(2.2e-5, rel=0.05)
    assert row.verdict.startswith("lower by 12.5 points (-18.")
    assert row.low < -0.125 < row.high < 0
    assert row.stderr == pytest.approx(math.sqrt(0.625 * 0.375 / 199))


def test_no_difference_says_what_would_have_shown():
    same = draws(0, 0.6)
    (row,) = compared(same, same).rows
    assert row.verdict == "the same on all 200 examples (would show ≥ 3.0 points)"
    own = [1 - x if i in (3, 50, 90) else x for i, x in enumerate(same)]
    (row,) = compared(own, same).rows
    assert row.verdict.startswith(
        "no difference that these 200 examples could show (would show ≥ 3"
    )


def test_a_handful_of_examples_can_show_nothing():
    (row,) = compared([1.0, 0.0, 1.0], [1.0, 1.0, 0.0]).rows
    assert row.verdict == ("no difference that these 3 examples could show (too few to show any)")
    (row,) = compared([2.5], [1.5]).rows
    assert row.verdict.endswith("(too few to show any)")


def test_several_tests_are_corrected():
    own, dense = draws(1, 0.62), draws(2, 0.72)

    def both(model):
        values = torch.tensor(model.scores)
        return {"first": values, "second": values[:50], "third": values * 2.5}

    found = evaluate(Known(*own), {"t": both}, against=Known(*dense), progress=False)
    ps = [row.p for row in found.rows]
    assert [row.adjusted for row in found.rows] == holm(ps)
    assert min(row.adjusted for row in found.rows) == pytest.approx(3 * min(ps))
    alone = compared(own, dense)
    assert found.rows[0].shows > alone.rows[0].shows
    assert "3 tests were made together" in str(found)
    assert "tests were made" not in str(alone)


def test_directions_are_told_where_they_are_known():
    own, dense = [2.0 + i / 50 for i in range(20)], [1.0 + i / 50 for i in range(20)]
    ids = tuple(map(str, range(20)))
    common = Scores("t", "m", tuple(own), (1.0,) * 20, ids, higher_is_better=False)
    pair = [replace(common, totals=tuple(dense))]
    told = [
        Evaluation([replace(common, higher_is_better=b)], pair).rows[0].verdict.split()[0]
        for b in (True, False, None)
    ]
    assert told == ["better", "worse", "higher"]


def test_functions_give_numbers_of_many_kinds():
    def number(model):
        return 3

    def metrics(model):
        return {"a": torch.tensor(0.5), "b": [True, False, True], "c": (1.5, 2.5)}

    found = evaluate(Known(), [number, metrics], progress=False)
    assert [(s.task, s.metric, s.value) for s in found.scores] == [
        ("number", "value", 3.0),
        ("metrics", "a", 0.5),
        ("metrics", "b", 2 / 3),
        ("metrics", "c", 2.0),
    ]
    assert found.score("metrics", "b") == 2 / 3
    assert found.score("metrics") == 0.5
    with pytest.raises(EvaluationError, match="did you mean 'metrics'"):
        found.score("metric")
    assert "62.5 %" in in_unit(0.625, math.nan, True)
    assert [row.verdict for row in found.rows] == [""] * 4
    both = evaluate(Known(), [number], against=Known(), progress=False)
    assert both.rows[0].verdict == "not tested: no score of each example"
    assert both.rows[0].difference == 0


def test_functions_see_the_model_in_eval_mode_without_gradients():
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).train()

    def flags(read):
        return {"training": read.training, "gradients": torch.is_grad_enabled()}

    found = evaluate(model, flags, progress=False)
    assert [s.value for s in found.scores] == [0.0, 0.0]
    assert all(m.training for m in model.modules())


class Bigram(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(9, 9)

    def forward(self, ids):
        return self.table(ids)


def test_perplexities_are_compared_window_by_window():
    tokens = torch.randint(9, (300,))

    def text(model):
        return perplexity(model, tokens, seqlen=10)

    own, dense = Bigram(0), Bigram(1)
    found = evaluate(own, text, against=dense, progress=False)
    (row,) = found.rows
    measured = [perplexity(m, tokens, seqlen=10) for m in (own, dense)]
    assert row.metric == "perplexity"
    assert row.n == 30
    assert (row.value, row.dense) == pytest.approx(tuple(map(float, measured)))
    assert row.stderr == pytest.approx(measured[0].stderr)
    assert f"± {measured[0].stderr:.2g} (" in str(measured[0])
    assert sum(measured[0].window_nats) / 270 == pytest.approx(measured[0].nats_per_token)
    other = evaluate(
        dense, {"text": lambda m: perplexity(m, tokens + 0, seqlen=10)}, progress=False
    )
    assert evaluate(own, text, against=other, progress=False).rows == found.rows
    elsewhere = torch.randint(9, (300,))
    other = evaluate(dense, {"text": lambda m: perplexity(m, elsewhere, seqlen=10)}, progress=False)
    with pytest.raises(EvaluationError, match=r"30 of the 30 examples are not among the 30"):
        evaluate(own, text, against=other, progress=False)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (lambda model: "good", "must give a number"),
        (lambda model: [], "finite numbers by example"),
        (lambda model: [1.0, math.nan], "finite numbers by example"),
        (lambda model: None, "must give a number"),
        (lambda model: {"a": {"b": 1}}, "must give a number"),
        (3, "a task is a name, a path or a function"),
        ([], "there are no tasks"),
    ],
)
def test_what_is_no_task_or_no_number_is_refused(task, message):
    with pytest.raises(EvaluationError, match=message):
        evaluate(Known(), task, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit must be"),
        ({"limit": 0.5}, "limit must be"),
        ({"level": 1.0}, "level must be"),
        ({"num_fewshot": -1}, "num_fewshot must be"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(EvaluationError, match=message):
        evaluate(Known(1.0), scores_of, progress=False, **options)


def test_two_tasks_of_one_name_and_other_numbers_of_examples_are_refused():
    with pytest.raises(EvaluationError, match="two tasks are called 'scores_of'"):
        evaluate(Known(1.0), [scores_of, scores_of], progress=False)
    with pytest.raises(EvaluationError, match="1 of the 3 examples are not among the 2"):
        compared([1.0, 0.0, 1.0], [1.0, 0.0])


@pytest.fixture(scope="module")
def found():
    own, dense = draws(3, 0.5, 40), draws(4, 0.9, 40)
    return compared(own, dense, "quiz")


def test_json_holds_every_example(found, tmp_path):
    again = Evaluation.from_json(found.to_json())
    assert again == found
    assert again.rows == found.rows
    found.save(tmp_path / "found.json")
    assert Evaluation.from_json((tmp_path / "found.json").read_text("utf-8")) == found
    odd = replace(found, scores=[Scores("t", "m", figure=math.inf)], dense_scores=None)
    assert Evaluation.from_json(odd.to_json()).scores[0].value == math.inf
    dense = replace(found, scores=found.dense_scores, dense_scores=None)
    dense.save(tmp_path / "dense.json")
    own = Known(*found.scores[0].totals)
    against = evaluate(own, {"quiz": scores_of}, against=tmp_path / "dense.json", progress=False)
    assert against.rows == found.rows
    with pytest.raises(InputError, match="no such file"):
        evaluate(own, scores_of, against=tmp_path / "no.json", progress=False)


def test_damaged_json_is_refused(found):
    record = json.loads(found.to_json())

    def broken(**changes):
        return json.dumps({**record, **changes})

    first = record["scores"][0]
    for text, message in [
        ("{", "not JSON"),
        ("[]", "no evaluation"),
        (broken(format="torchprune comparison 1"), "no evaluation"),
        (broken(scores=[{**first, "link": "log"}]), "'log' is none of"),
        (broken(scores=[{**first, "weights": []}]), "40 totals, 0 weights"),
        (broken(scores=[{**first, "totals": ["a"]}]), "damaged"),
        (broken(scores=[{k: v for k, v in first.items() if k != "ids"}]), "'ids' is absent"),
        (broken(settings=[]), "damaged"),
    ]:
        with pytest.raises(EvaluationError, match=message):
            Evaluation.from_json(text)


def test_the_table_is_text_and_markdown(found, tmp_path):
    text = str(found)
    assert "quiz" in text
    assert "lower by" in text.replace("\n", " ") or "points" in text
    found.save(tmp_path / "found.md")
    table = (tmp_path / "found.md").read_text("utf-8")
    assert table.startswith("| task | metric | n | dense | pruned |")
    assert found.rows[0].verdict in table


def test_the_page_shows_both_models_with_error_bars(found):
    page = found.page()
    scores, table = page.sections
    (chart,) = scores.pieces
    assert isinstance(chart, Bars)
    dense, own = chart.bars
    assert (dense.kind, own.kind) == ("dense", "pruned")
    row = found.rows[0]
    assert (own.value, dense.value) == (row.value, row.dense)
    assert own.high - own.value == pytest.approx(1.96 * row.stderr)
    (grid,) = table.pieces
    assert isinstance(grid, Grid)
    assert [len(line) for line in (*grid.rows, *grid.raw)] == [len(grid.columns)] * 2
    assert page.data == json.loads(found.to_json())
    assert row.verdict in page.lead
    alone = replace(found, dense_scores=None, settings={"limit": 9}).page()
    assert len(alone.sections[0].pieces[0].bars) == 1
    assert "first 9 examples" in alone.warnings[0]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_figure(found, tmp_path, suffix):
    found.save(tmp_path / f"found{suffix}")
    assert (tmp_path / f"found{suffix}").stat().st_size > 1000
    with pytest.raises(EvaluationError, match="nothing to draw"):
        replace(found, dense_scores=None).figure()
    with pytest.raises(EvaluationError, match="is saved as"):
        found.save(tmp_path / "found.txt")
