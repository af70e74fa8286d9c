"""Routers and gates of a program, seen while one batch runs through its graph."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.fx import Interpreter

from torchprune.calibration.batches import Batch
from torchprune.calibration.routers import Routers


def gates_in(program: ExportedProgram, batch: Batch) -> dict[str, str]:
    """A parameter's name -> why it is a router or a gate."""
    watch = _Watch(program.graph_module)
    with torch.no_grad():
        watch.run(*program._graph_module_flat_inputs(batch.args, batch.kwargs))
    names = {id(tensor): name for name, tensor in program.state_dict.items()}
    return {names[key]: why for key, why in watch.routers.found.items() if key in names}


class _Watch(Interpreter):
    """Tells `Routers` of operators under the names that torch's functions have."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.routers = Routers()

    def call_function(
        self, target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = super().call_function(target, args, kwargs)
        if isinstance(target, torch._ops.OpOverload):
            name = target._schema.name.partition("::")[2].removeprefix("_")
            self.routers.saw(cast(Any, SimpleNamespace(__name__=name)), args, kwargs, result)
        return result
