"""Other libraries' functions wrapped: now where they are imported, else when they are."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Lesson = Callable[[ModuleType], None]
"""What is to be done with a module once it is imported."""

_TAUGHT = "_torchprune_taught"


def when_imported(lessons: dict[str, Lesson]) -> None:
    """Give modules, by name, their lessons: at once or as soon as somebody imports them."""
    for name, lesson in list(lessons.items()):
        if (module := sys.modules.get(name)) is not None:
            lesson(module)
            del lessons[name]
    if lessons:
        sys.meta_path.insert(0, _Awaited(lessons))


class _Awaited(MetaPathFinder):
    """Finds no module itself; tells when some have been imported. Whether a module is there may be
    asked any number of times before.
    """

    def __init__(self, waiting: dict[str, Lesson]) -> None:
        self._waiting, self._asked = waiting, set[str]()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self._waiting or name in self._asked:
            return None
        self._asked.add(name)  # the finders below are asked, and this one not again
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asked.discard(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if (lesson := self._waiting.pop(name, None)) is not None:
                lesson(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def wrapped(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put another function in a method's place, once."""
    method = vars(owner).get(name)
    kind = classmethod if isinstance(method, classmethod) else None
    function = method.__func__ if kind else method
    if function is None or hasattr(function, _TAUGHT):
        return
    taught = functools.wraps(function)(make(function))
    setattr(taught, _TAUGHT, True)
    setattr(owner, name, kind(taught) if kind else taught)


Context = Callable[[object], AbstractContextManager[None]]
_EXPORTS: list[Context] = []


def around_exports(context: Context) -> None:
    """Have every `torch.export` of a model run in this context of it, from the first call on."""
    if context in _EXPORTS:
        return
    _EXPORTS.append(context)

    def around(original: Any) -> Any:
        def export(mod: Any, *args: Any, **kwargs: Any) -> Any:
            with context(mod):
                return original(mod, *args, **kwargs)

        return export

    when_imported({"torch.export._trace": lambda module: wrapped(module, "_export", around)})
