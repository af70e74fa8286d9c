"""Functions that users give with a spec: how reports, files and stored results tell them apart."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import CodeType, FunctionType
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from torchprune.errors import SpecError
from torchprune.specs.options import Checked


@dataclass(frozen=True)
class FunctionName:
    """Stands for the function that pruned a saved model: its name is all that was saved."""

    name: str

    def __call__(self, *_: object) -> NoReturn:
        raise SpecError(
            f"of {self.name} only the name was saved with the model that it pruned; to prune by it "
            "again, put the function itself into the spec (dataclasses.replace)"
        )


def function_name(function: Callable[..., Any]) -> str:
    """Its qualified name, such as `package.module.function`; of a callable object its class's."""
    if isinstance(function, FunctionName):
        return function.name
    if isinstance(function, functools.partial):
        return f"partial({function_name(function.func)})"
    owner = function if hasattr(function, "__qualname__") else type(function)
    return f"{owner.__module__ or 'builtins'}.{owner.__qualname__}"


def check_function(where: str, option: str, function: object, form: str) -> None:
    """Refuse what cannot be called as `form`, such as "(weight, moments) -> scores", says.

    Raises:
        SpecError: it is no function, or takes other arguments.
    """
    if not callable(function) or isinstance(function, type):
        raise SpecError(f"{where}: {option} must be a function {form}, got {function!r}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # builtins have none
        return
    try:
        signature.bind(*form[1 : form.index(")")].split(", "))
    except TypeError:
        raise SpecError(
            f"{where}: {option} must be a function {form}, and {function_name(function)} takes "
            f"{signature}"
        ) from None


def described(value: Any) -> str:
    """`repr`, but with functions told by their name and code and not by where they lie in memory.

    So the same spec reads the same in another process, and another after its function changed. What
    that function calls by global names is not looked at.
    """
    return _described(value, ())


def _described(value: Any, inside: tuple[int, ...]) -> str:
    if id(value) in inside:  # a function that its own closure holds
        return "..."
    inside = (*inside, id(value))
    if isinstance(value, Checked):
        parts = [
            f"{f.name}={_described(getattr(value, f.name), inside)}"
            for f in fields(cast(Any, value))
            if f.repr
        ]
        return f"{type(value).__qualname__}({', '.join(parts)})"
    if isinstance(value, list):
        return f"[{', '.join(_described(v, inside) for v in value)}]"
    if isinstance(value, tuple):
        parts = [_described(v, inside) for v in value]
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {_described(v, inside)}' for k, v in value.items())}}}"
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return f"<tensor {value.dtype} {tuple(value.shape)} {_digest(bytes(raw.numpy()))}>"
    if isinstance(value, functools.partial):
        given = _described((value.args, value.keywords), inside)
        return f"<partial {_described(value.func, inside)} {given}>"
    if isinstance(value, FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        made = (value.__defaults__, value.__kwdefaults__, held)
        text = f"{_code(value.__code__)} {_described(made, inside)}"
        return f"<function {function_name(value)} {_digest(text.encode())}>"
    return repr(value)


def _code(code: CodeType) -> str:
    """What a function does, without where it is written."""
    values = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return repr((code.co_code, values, code.co_names, code.co_varnames, code.co_freevars))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
