"""Tasks of EleutherAI's lm_eval on a live model: their requests, answered, and their scores."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torchprune.study.tasks.evaluation import EvaluationError, evaluating
from torchprune.study.tasks.harness_tasks import import_harness, quiet
from torchprune.study.tasks.language_model import LanguageModel
from torchprune.study.tasks.paired import Link
from torchprune.study.tasks.score_rows import Scores
from torchprune.training.drawn_seeds import seeded

_MEANS = ("mean", "nanmean")
_RATES: dict[str, Link] = {
    "perplexity": "exp",
    "weighted_perplexity": "exp",
    "bits_per_byte": "bits",
}
"""lm_eval's aggregations that are of a sum of log-likelihoods over a sum of weights."""


def prepare(task: Any, num_fewshot: int | None, seed: int) -> None:
    """Set how many examples are shown before each question, and which.

    A task that says 0 itself is left at 0, as lm_eval does.
    """
    told = task.get_config("num_fewshot")
    if num_fewshot is not None and told != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif told is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=seed)


def ids_of(task: Any, limit: int | None) -> tuple[str, ...]:
    """What tells a task's examples apart: their place and a digest of their text."""
    documents = task.doc_iterator(rank=0, limit=limit, world_size=1)
    return tuple(f"{place}:{_digest(doc)}" for place, doc in documents)


def scores_of(
    name: str,
    task: Any,
    language_model: LanguageModel,
    *,
    limit: int | None,
    chat: bool,
    seed: int,
    task_id: str,
) -> list[Scores]:
    """Ask a model a task's questions: every metric's scores, example by example.

    Raises:
        EvaluationError: the task runs code, wants pictures, or asks what the model cannot answer.
    """
    harness = import_harness()
    loaded = {"tasks": {name: task}, "groups": {}, "group_map": {}}
    try:
        with quiet(), seeded(seed), evaluating(language_model.model):
            found = harness.evaluator.evaluate(
                _adapter(language_model),
                loaded,
                limit=limit,
                bootstrap_iters=0,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
    except ValueError as error:  # ours, and what lm_eval refuses
        raise EvaluationError(f"{name}: {error}") from error
    samples = found["samples"][name]
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    scores = []
    for chosen in filters:
        of_filter = [sample for sample in samples if sample["filter"] == chosen]
        for metric in dict.fromkeys(m for sample in of_filter for m in sample["metrics"]):
            label = metric if len(filters) == 1 else f"{metric},{chosen}"
            items = [(s["doc_id"], s["doc"], s[metric]) for s in of_filter if metric in s]
            figure = float(found["results"][name][f"{metric},{chosen}"])
            scores.append(_scores(name, label, metric, task, items, figure, task_id))
    return scores


def _adapter(language_model: LanguageModel) -> Any:
    from lm_eval.api.model import LM

    class Adapter(LM):  # type: ignore[misc]  # lm_eval is not typed
        """lm_eval's interface to our model."""

        @property
        def tokenizer_name(self) -> str:
            return str(getattr(language_model.tokenizer, "name_or_path", ""))

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return language_model.continuations([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return language_model.whole_texts([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return language_model.written([request.args for request in requests])

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return language_model.chat(chat_history, add_generation_prompt)

    return Adapter()


def _scores(
    name: str,
    label: str,
    metric: str,
    task: Any,
    items: Sequence[tuple[int, Any, Any]],
    figure: float,
    task_id: str,
) -> Scores:
    rule = getattr(task.aggregation().get(metric), "__name__", "mean")
    better = task.higher_is_better().get(metric)
    common: dict[str, Any] = {
        "task": name,
        "metric": label,
        "higher_is_better": better if isinstance(better, bool) else None,
        "task_id": task_id,
    }
    parts = [_part(rule, value) for _, _, value in items]
    if any(part is None for part in parts):
        return Scores(**common, figure=figure)
    kept = [
        (f"{place}:{_digest(doc)}", *part)
        for (place, doc, _), part in zip(items, parts, strict=True)
        if part is not None and not math.isnan(part[0])
    ]
    if not kept:
        return Scores(**common, figure=figure)
    ids, totals, weights = zip(*kept, strict=True)
    return Scores(**common, totals=totals, weights=weights, ids=ids, link=_RATES.get(rule, "mean"))


def _part(rule: str, value: Any) -> tuple[float, float] | None:
    """An example's total and weight; None where the metric is no mean of numbers."""
    if rule in _MEANS and _is_number(value):
        return float(value), 1.0
    if rule == "perplexity" and _is_number(value):
        return -float(value), 1.0
    pair = rule in _RATES and isinstance(value, tuple | list) and len(value) == 2
    if pair and all(map(_is_number, value)):
        return -float(value[0]), float(value[1])
    return None


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, str)


def _digest(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
