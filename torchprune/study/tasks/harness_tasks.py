"""Finding tasks of EleutherAI's lm_eval: by name, as a YAML file, or all of a directory."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from torchprune.calibration.documents import first_line
from torchprune.errors import MissingExtraError, TorchpruneError, did_you_mean
from torchprune.study.tasks.evaluation import EvaluationError

_YAML = (".yaml", ".yml")


def import_harness() -> Any:
    """The package lm_eval.

    Raises:
        MissingExtraError: it is absent.
    """
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.tasks
    except ImportError:
        raise MissingExtraError("lm_eval", "eval", "evaluating on tasks") from None
    return lm_eval


def load_tasks(names: Sequence[str | Path], directories: Sequence[Path] = ()) -> dict[str, Any]:
    """Task name -> lm_eval's task, in the order asked for; groups and tags give all of theirs.

    Nothing is fetched for tasks whose YAML names local files; these are looked for beside the YAML
    where the working directory does not hold them.

    Args:
        names: known to lm_eval or to a YAML file in `directories`, or a path of a YAML file, or of
            a directory for all tasks in it.
        directories: of local YAML files, looked through before lm_eval's own.

    Raises:
        EvaluationError: no such task, or its data cannot be had.
        MissingExtraError: lm_eval is absent.
    """
    import_harness()
    found: dict[str, Any] = {}
    with quiet():
        local = _manager([_checked(folder) for folder in directories])
        for name in names:
            try:
                tasks = _load(str(name), local)
            except TorchpruneError:
                raise
            except Exception as error:  # whatever is wrong, it is with the named task
                raise EvaluationError(
                    f"the task {str(name)!r} cannot be loaded: {type(error).__name__}: "
                    f"{first_line(error)}"
                ) from error
            found |= tasks
    return found


def check_names(names: Sequence[str], directories: Sequence[Path] = ()) -> None:
    """That there are such tasks, without reading their data.

    Raises:
        EvaluationError: one is unknown.
        MissingExtraError: lm_eval is absent.
    """
    import_harness()
    with quiet():
        local = _manager([_checked(folder) for folder in directories])
        for name in names:
            path = Path(name).expanduser()
            if name not in local.task_index and not path.is_dir() and path.suffix not in _YAML:
                _kind_of(name, local)


@contextmanager
def quiet() -> Iterator[None]:
    """Without lm_eval's own log lines and bars, and those of datasets, for a while."""
    import lm_eval.api.task as home
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger, shown = logging.getLogger("lm_eval"), not are_progress_bars_disabled()
    level, bar = logger.level, home.tqdm
    try:
        logger.setLevel(logging.ERROR)
        disable_progress_bars()
        home.tqdm = partial(tqdm, disable=True)
        yield
    finally:
        home.tqdm = bar
        logger.setLevel(level)
        if shown:
            enable_progress_bars()


def _load(name: str, local: Any) -> dict[str, Any]:
    path = Path(name).expanduser()
    if path.is_dir() and name not in local.task_index:
        inside = _manager([path])
        if not inside.all_subtasks:
            raise EvaluationError(f"{name} holds no YAML file of a task")
        return dict(inside.load(list(inside.all_subtasks))["tasks"])
    if path.suffix in _YAML:
        return _from_file(path)
    if name in local.task_index:
        return dict(local.load([name])["tasks"])
    return dict(_shipped(name, local).load([name])["tasks"])


def _from_file(path: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    if not path.is_file():
        raise EvaluationError(f"no such file: {path}")
    config = load_yaml(path)
    if "group" in config:
        return dict(_manager([path.parent]).load([config["group"]])["tasks"])
    if "task" not in config:
        raise EvaluationError(f"{path} names no task: it has no line `task: NAME`")
    return dict(_manager([]).load([_beside(config, path.parent)])["tasks"])


def _manager(folders: Sequence[Path]) -> Any:
    """An index of the YAML files of these folders, relative data files made absolute."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    manager = TaskManager(include_path=list(map(str, folders)), include_defaults=False)
    for entry in manager.task_index.values():
        data = (entry.cfg or {}).get("dataset_kwargs")
        if entry.yaml_path is not None and data:
            config = load_yaml(entry.yaml_path)
            moved = _beside(config, Path(entry.yaml_path).parent)
            if moved != config:
                entry.cfg, entry.yaml_path = moved, None  # it would be read anew from there
    return manager


def _beside(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A task's configuration with the data files that lie beside its YAML named in full."""
    options = config.get("dataset_kwargs")
    if not isinstance(options, Mapping):
        return dict(config)
    here = {k: _in_full(options[k], folder) for k in ("data_files", "data_dir") if k in options}
    return {**config, "dataset_kwargs": {**options, **here}}


def _in_full(files: Any, folder: Path) -> Any:
    if isinstance(files, Mapping):
        return {split: _in_full(file, folder) for split, file in files.items()}
    if isinstance(files, list):
        return [_in_full(file, folder) for file in files]
    if isinstance(files, str) and not Path(files).exists() and (folder / files).exists():
        return str((folder / files).resolve())
    return files


def _shipped(name: str, local: Any) -> Any:
    """An index that holds one of lm_eval's own tasks.

    All of its 14,000 files take long to parse, so a single task's folder is read alone.
    """
    from lm_eval.tasks import TaskManager

    kind, folder = _kind_of(name, local)
    if kind == "task":
        return TaskManager(include_path=[str(folder)], include_defaults=False)
    return TaskManager()


def _kind_of(name: str, local: Any) -> tuple[str, Path]:
    kinds = shipped_names()
    if name not in kinds:
        known = [*local.task_index, *kinds]
        raise EvaluationError(
            f"there is no task {name!r}{did_you_mean(name, known)}; a task of your own is a YAML "
            "file: give its path, or the directory it is in as the task path"
        )
    return kinds[name]


@cache
def shipped_names() -> dict[str, tuple[str, Path]]:
    """Name -> "task", "group" or "tag", and the folder of the YAML file, of what lm_eval brings."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    found: dict[str, tuple[str, Path]] = {}
    for path in sorted(root.rglob("*.yaml")):
        text = path.read_text("utf-8", errors="replace")
        for kind, name in re.findall(r"""^(task|group|tag):[ \t]*["']?([\w.-]+)""", text, re.M):
            found.setdefault(name, (kind, path.parent))
        if listed := re.search(r"^tag:[ \t]*\n((?:[ \t]*-[ \t]*\S+\n?)+)", text, re.M):
            for name in re.findall(r"-[ \t]*([\w.-]+)", listed[1]):
                found.setdefault(name, ("tag", path.parent))
    return found


def _checked(folder: Path) -> Path:
    if not folder.expanduser().is_dir():
        raise EvaluationError(f"no such directory of tasks: {folder}")
    return folder.expanduser()
