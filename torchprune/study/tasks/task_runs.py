"""`evaluate`: a model on tasks, beside the dense model on the same examples."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn

from torchprune.checkpoint.whole_files import write_whole
from torchprune.errors import InputError, did_you_mean
from torchprune.specs.functions import described
from torchprune.study.tasks.evaluation import EvaluationError, Perplexity, evaluating
from torchprune.study.tasks.language_model import LanguageModel
from torchprune.study.tasks.score_rows import Scores
from torchprune.study.tasks.task_results import Evaluation

Task = str | os.PathLike[str] | Callable[[nn.Module], Any]
Tasks = Task | Sequence[Task] | Mapping[str, Task]


def evaluate(
    model: nn.Module,
    tasks: Tasks,
    *,
    tokenizer: Any = None,
    against: nn.Module | Evaluation | str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    chat: bool = False,
    task_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    level: float = 0.05,
    seed: int = 0,
    progress: bool = True,
    path: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Measure a model on tasks, and whether it differs from the dense model on the same examples.

    >>> from torchprune import MagnitudeSpec, evaluate, sparsify
    >>> _ = torch.manual_seed(0)
    >>> dense = nn.Linear(16, 4)
    >>> pruned = nn.Linear(16, 4)
    >>> _ = pruned.load_state_dict(dense.state_dict())
    >>> _ = sparsify(pruned, MagnitudeSpec(sparsity=0.9))
    >>> x, y = torch.randn(200, 16), torch.randint(4, (200,))
    >>> def right(model):
    ...     return (model(x).argmax(1) == y).tolist()
    >>> found = evaluate(pruned, {"accuracy": right}, against=dense)
    >>> found.rows[0].verdict
    'no difference that these 200 examples could show (would show ≥ 10.1 points)'

    Language tasks are those of EleutherAI's lm_eval (extra `eval`), on the model as it is: with
    masks, folded, lowered or shrunk. Scores are kept by example and paired with the dense model's:
    right or wrong by McNemar's exact test, others by a permutation test, and p values corrected
    for all rows together by Holm. The model is in eval mode meanwhile; it is unchanged afterwards.

    Args:
        model: a transformers causal language model, or any module that maps ids (batch, length)
            to logits, bare or as `output.logits`; for functions of your own any module.
        tasks: one or several of: a name that lm_eval or a file in `task_path` knows; a path of
            a task's YAML file, or of a directory for all in it (a YAML file may name Python code
            beside it, which then runs); a function of the model that gives a number, a mapping of
            metric name -> number, or numbers by example (a sequence or a 1-D tensor, in the same
            order each time), for each metric too, or a `Perplexity`. A mapping names them.
        tokenizer: the model's own, for lm_eval's tasks.
        against: the dense model, its evaluation, or the JSON file of that.
        limit: read only the first examples of each task.
        batch_size: rows in a forward pass. It changes results by rounding only.
        num_fewshot: examples shown before each question, where the task leaves it open.
        chat: write questions by the tokenizer's chat template. Published figures of likelihood
            tasks are mostly without, so it is off unless asked for.
        task_path: directories of local YAML files.
        level: a corrected p below it is a difference; intervals hold 1 - level.
        seed: of examples shown, sampled texts and drawn permutations.
        progress: show progress bars.
        path: a JSON file that is written after each task. Tasks that it holds for the same model,
            settings and examples are not run again; functions are told apart by name and code.

    Raises:
        EvaluationError: an unknown task, data that cannot be had, a model that cannot answer, a
            function that gives no numbers, or a dense result of other examples.
        MissingExtraError: lm_eval is absent.
    """
    _check(limit, level, num_fewshot, tokenizer, chat)
    known = _earlier(against) if isinstance(against, str | os.PathLike) else against
    runs = _runs(tasks, _folders(task_path), limit, num_fewshot, seed, tokenizer)
    settings = {
        "limit": limit,
        "num_fewshot": num_fewshot,
        "chat": chat,
        "seed": seed,
        "model": _digest(model) if path is not None else "",
        "dense": _digest(known) if path is not None and isinstance(known, nn.Module) else "",
    }
    store = _Store(path, settings, level)
    asking = _Asking(tokenizer, limit, batch_size, chat, seed, progress)
    own = [s for run in runs for s in store.run(run, model, asking, dense=False)]
    if known is None:
        dense = None
    elif isinstance(known, Evaluation):
        dense = list(known.scores)
    else:
        dense = [s for run in runs for s in store.run(run, known, asking, dense=True)]
    found = Evaluation(tuple(own), None if dense is None else tuple(dense), settings, level)
    _check_dense(found)
    store.keep(found)
    return found


# -- what is asked ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asking:
    """How every task is asked."""

    tokenizer: Any
    limit: int | None
    batch_size: int
    chat: bool
    seed: int
    progress: bool


@dataclass(frozen=True)
class _Run:
    """One task: lm_eval's, or a function; `key` tells it from others by what is asked."""

    name: str
    task: Any
    function: Callable[[nn.Module], Any] | None
    key: str

    def scores(self, model: nn.Module, asking: _Asking) -> list[Scores]:
        if self.function is not None:
            with evaluating(model):
                found = self.function(model)
            return [replace(s, task_id=self.key) for s in _of_function(self.name, found)]
        from torchprune.study.tasks.harness import scores_of

        speaker = LanguageModel(
            model,
            asking.tokenizer,
            batch_size=asking.batch_size,
            progress=asking.progress,
            label=self.name,
        )
        return scores_of(
            self.name,
            self.task,
            speaker,
            limit=asking.limit,
            chat=asking.chat,
            seed=asking.seed,
            task_id=self.key,
        )


def _runs(
    tasks: Any,
    folders: list[Path],
    limit: int | None,
    num_fewshot: int | None,
    seed: int,
    tokenizer: Any,
) -> list[_Run]:
    runs: list[_Run] = []
    for name, task in _named(tasks):
        if callable(task):
            label = name or getattr(task, "__name__", type(task).__name__)
            runs.append(_Run(label, None, task, described(task)))
            continue
        from torchprune.study.tasks.harness import ids_of, prepare
        from torchprune.study.tasks.harness_tasks import load_tasks
        from torchprune.training.drawn_seeds import seeded

        if tokenizer is None:
            raise EvaluationError(
                f"the task {str(task)!r} is asked in text: evaluate(..., tokenizer=...)"
            )
        with seeded(seed):
            loaded = load_tasks([task], folders)
        for found, value in loaded.items():
            prepare(value, num_fewshot, seed)
            label = found if not name else name if len(loaded) == 1 else f"{name} {found}"
            text = repr((found, value.get_config("num_fewshot"), ids_of(value, limit)))
            runs.append(_Run(label, value, None, hashlib.sha256(text.encode()).hexdigest()[:16]))
    twice = {run.name for run in runs if sum(other.name == run.name for other in runs) > 1}
    if twice:
        raise EvaluationError(f"two tasks are called {', '.join(map(repr, sorted(twice)))}")
    if not runs:
        raise EvaluationError("there are no tasks")
    return runs


def _named(tasks: Any) -> list[tuple[str, Any]]:
    """(name or "", task) of each."""
    if isinstance(tasks, Mapping):
        pairs = [(str(name), task) for name, task in tasks.items()]
    elif isinstance(tasks, str | os.PathLike) or callable(tasks):
        pairs = [("", tasks)]
    elif isinstance(tasks, Iterable):
        pairs = [("", task) for task in tasks]
    else:
        pairs = [("", tasks)]
    for _, task in pairs:
        if not isinstance(task, str | os.PathLike) and not callable(task):
            raise EvaluationError(
                f"a task is a name, a path or a function of the model, got {task!r:.80}"
            )
    return pairs


def _folders(task_path: Any) -> list[Path]:
    if task_path is None:
        return []
    given = [task_path] if isinstance(task_path, str | os.PathLike) else list(task_path)
    return [Path(folder) for folder in given]


def _check(
    limit: int | None, level: float, num_fewshot: int | None, tokenizer: Any, chat: bool
) -> None:
    if limit is not None and (type(limit) is not int or limit < 1):
        raise EvaluationError(f"limit must be a whole number of examples, at least 1, got {limit}")
    if num_fewshot is not None and num_fewshot < 0:
        raise EvaluationError(f"num_fewshot must be at least 0, got {num_fewshot}")
    if not 0 < level < 1:
        raise EvaluationError(f"level must be between 0 and 1, got {level}")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise EvaluationError(
            f"the {type(tokenizer).__name__} has no chat template, which chat=True needs"
        )


def _check_dense(found: Evaluation) -> None:
    """Every score has its counterpart, on the same examples."""
    if found.dense_scores is None:
        return
    known = {(d.task, d.metric) for d in found.dense_scores}
    for own in found.scores:
        if (own.task, own.metric) not in known:
            wanted, names = f"{own.task} {own.metric}", [" ".join(pair) for pair in sorted(known)]
            raise EvaluationError(
                f"the dense result does not hold {wanted!r}{did_you_mean(wanted, names)}"
            )
    _ = found.rows  # examples that do not match show here


# -- functions -------------------------------------------------------------------------------------


def _of_function(name: str, found: Any) -> list[Scores]:
    if isinstance(found, Perplexity):
        return [_of_perplexity(name, found)]
    if isinstance(found, Mapping) and found:
        return [_of_numbers(name, str(metric), value) for metric, value in found.items()]
    return [_of_numbers(name, "value", found)]


def _of_perplexity(name: str, found: Perplexity) -> Scores:
    nats = found.window_nats
    return Scores(
        name,
        "perplexity",
        nats,
        (float(found.seqlen - 1),) * len(nats),
        tuple(f"{place}:{name}" for place, name in enumerate(found.window_ids)),
        "exp",
        None if nats else float(found),
        higher_is_better=False,
    )


def _of_numbers(name: str, metric: str, found: Any) -> Scores:
    values = found.detach().tolist() if isinstance(found, Tensor) else found
    if isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping):
        numbers = tuple(_number(name, value) for value in values)
        if not numbers or not all(map(math.isfinite, numbers)):
            raise EvaluationError(
                f"{name}: {metric} must be finite numbers by example, got {found!r:.80}"
            )
        ids = tuple(map(str, range(len(numbers))))
        return Scores(name, metric, numbers, (1.0,) * len(numbers), ids)
    return Scores(name, metric, figure=_number(name, values))


def _number(name: str, value: Any) -> float:
    if isinstance(value, str) or not isinstance(value, SupportsFloat):
        raise EvaluationError(
            f"the function {name!r} must give a number, numbers by example, or a mapping of metric "
            f"name -> these, got {type(value).__name__}"
        )
    return float(value)


# -- keeping ---------------------------------------------------------------------------------------


class _Store:
    """Scores so far, in a file where there is one."""

    def __init__(self, path: Any, settings: Mapping[str, Any], level: float) -> None:
        self._path = None if path is None else Path(path)
        self._settings, self._level = settings, level
        self._kept: dict[bool, list[Scores]] = {False: [], True: []}
        if self._path is None or not self._path.exists():
            return
        earlier = _earlier(self._path)
        if earlier.settings.get("model") != settings["model"]:
            raise EvaluationError(f"{path} holds another model's results; name another file")
        for dense, scores in ((False, earlier.scores), (True, earlier.dense_scores or ())):
            same = ("chat", "seed", "dense") if dense else ("chat", "seed")
            if all(earlier.settings.get(name) == settings[name] for name in same):
                self._kept[dense] = list(scores)

    def run(self, run: _Run, model: nn.Module, asking: _Asking, *, dense: bool) -> list[Scores]:
        """A task's scores, from the file if they are there."""
        kept = self._kept[dense]
        found = [s for s in kept if (s.task, s.task_id) == (run.name, run.key)]
        if not found:
            found = run.scores(model, asking)
            self._kept[dense] = [s for s in kept if s.task != run.name] + found
            own, other = (tuple(self._kept[which]) for which in (False, True))
            self.keep(Evaluation(own, other or None, self._settings, self._level))
        return found

    def keep(self, found: Evaluation) -> None:
        """Write the file, if there is to be one."""
        if self._path is not None:
            write_whole(self._path, found.to_json() + "\n")


def _earlier(path: Any) -> Evaluation:
    try:
        return Evaluation.from_json(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except (EvaluationError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: {error}; name another file") from None


def _digest(model: nn.Module) -> str:
    """Of all that the model's state holds."""
    state = hashlib.sha256()
    for name, value in model.state_dict().items():
        if type(value) in (Tensor, nn.Parameter):
            state.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            state.update(flat.view(torch.uint8).numpy().data)
        else:  # quantized tensors too, which have no bytes of their own
            state.update(f"{name} {value!r};".encode())
    return state.hexdigest()[:16]
