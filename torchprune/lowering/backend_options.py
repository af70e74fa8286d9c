"""What `torch.compile(backend="torchprune")` may be told, and what of it goes on to the backend
that compiles the rest."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torchprune.errors import LoweringError

LOWERINGS = ("bitmask", "dense")


@dataclass(frozen=True)
class Options:
    """What `torch.compile(..., mode=..., options={...})` may say.

    Attributes:
        lower: "bitmask" packs sparse weights of linear layers on CPUs; "dense" only folds masks.
        min_sparsity: weights with a smaller share of zeros stay dense.
        backend: compiles what is left: a name that torch knows, or a callable.
        further: all other options, and the mode, for that backend.
    """

    lower: str = "bitmask"
    min_sparsity: float = 0.25
    backend: str | Callable[..., Any] = "inductor"
    further: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(given: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Raises `LoweringError` for an unknown lowering."""
        known = {"lower", "min_sparsity", "backend"}
        own = {name: value for name, value in (given or {}).items() if name in known}
        others = {name: value for name, value in (given or {}).items() if name not in known}
        asked = {"mode": mode, "options": others}
        options = Options(**own, further={name: v for name, v in asked.items() if v})
        if options.lower not in LOWERINGS:
            raise LoweringError(
                f"lower must be {' or '.join(map(repr, LOWERINGS))}, got {options.lower!r}"
            )
        return options

    def inner(self) -> Callable[..., Any]:
        """What compiles the rest, as `torch.compile` would call it.

        Raises:
            LoweringError: it does not take the mode, or one of the options.
        """
        from torch._dynamo.backends.registry import lookup_backend

        found = cast(Callable[..., Any], lookup_backend(self.backend))
        options, mode = self.further.get("options", {}), self.further.get("mode")
        if not self.further:
            return found
        if found is lookup_backend("inductor"):
            return functools.partial(found, config_patches=_of_inductor(mode, options))
        refused = _not_taken(found, self.further)
        if not refused:
            return functools.partial(found, **self.further)
        named = str(getattr(found, "__name__", type(found).__name__))
        if "options" in refused:
            raise LoweringError(
                f"the backend has no option {', '.join(map(repr, sorted(options)))}; it takes "
                f"{_OWN_OPTIONS}, and {named} takes none"
            )
        raise LoweringError(f"{named}, which compiles what is left, takes no mode, got {mode!r}")


_OWN_OPTIONS = "backend, lower, min_sparsity"


def _of_inductor(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of inductor that `torch.compile` makes of a mode and options."""
    from torch._inductor import config, list_mode_options

    try:
        patches = dict(list_mode_options(mode)) if mode else {}
    except RuntimeError as error:
        raise LoweringError(f"inductor has no mode {mode!r}: {error}") from error
    known = config.get_config_copy()
    given = {name.replace("-", "_"): value for name, value in options.items()}
    if wrong := sorted(set(given) - set(known)):
        raise LoweringError(
            f"the backend has no option {', '.join(map(repr, wrong))}; it takes {_OWN_OPTIONS}, "
            "and the options of inductor (torch._inductor.list_options())"
        )
    return patches | given


def _not_taken(function: Callable[..., Any], keywords: Mapping[str, Any]) -> list[str]:
    """Those of the keywords that a function does not take, as far as it tells."""
    try:
        takes = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return []
    if any(p.kind == inspect.Parameter.VAR_KEYWORD for p in takes.values()):
        return []
    return [name for name in keywords if name not in takes]
