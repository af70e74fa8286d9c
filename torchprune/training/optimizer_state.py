"""What optimizers remember of single weights, and how they are made to forget some of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as optimizers


def forget(optimizer: torch.optim.Optimizer, parameter: Tensor, stays: Tensor) -> None:
    """Make an optimizer forget what it keeps of each weight of a parameter, but for some.

    That is every tensor of the parameter's shape in its state: momentum, moments, their maxima are
    zeroed, Rprop's step sizes are its rate again. What is factored or counts steps (Adafactor's
    rows and columns, `step`) is of many weights, and stays.

    Args:
        stays: bool of the parameter's shape, True where what is remembered stays.
    """
    for name, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
            fresh = 0.0
            if name == "step_size" and isinstance(optimizer, torch.optim.Rprop):
                fresh = float(_group_of(optimizer, parameter)["lr"])
            _reset(value, stays, fresh)


def _group_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    groups = optimizer.param_groups
    return next(group for group in groups if any(p is parameter for p in group["params"]))


@torch.no_grad()
def _reset(value: Any, stays: Tensor, fresh: float) -> None:
    """Put a fresh value in a tensor wherever nothing stays."""
    if hasattr(value, "to_local") and hasattr(value, "placements"):  # a shard
        from torch.distributed.tensor import distribute_tensor

        part: Any = distribute_tensor(stays, value.device_mesh, value.placements)
        _reset(value.to_local(), part.to_local(), fresh)
    elif type(value) in (Tensor, torch.nn.Parameter):
        if value.is_floating_point():
            value.masked_fill_(~stays.to(value.device), fresh)
    elif hasattr(value, "dequantize"):  # codes with scales, as eight-bit optimizers have
        value.copy_(value.dequantize().masked_fill(~stays.to(value.device), fresh))


class Steps:
    """Sees the steps of all optimizers that train some parameters. Compiled steps it does not see.

    Args:
        parameters: gives those that there are now.
        before: what is done when an optimizer has its gradients and has not stepped yet.

    Attributes:
        count: of those steps.
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[Tensor]],
        before: Callable[[torch.optim.Optimizer], None] | None = None,
    ) -> None:
        self.count = 0
        self._parameters, self._before = parameters, before
        self._seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        own = weakref.ref(self)

        def stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            steps = own()
            if steps is not None and not torch.compiler.is_compiling():
                steps._stepped(optimizer)

        def steps_now(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
            steps = own()
            if steps is None or torch.compiler.is_compiling() or not steps._trains(optimizer):
                return None
            return steps._prepared(optimizer, args, kwargs)

        handles = [optimizers.register_optimizer_step_post_hook(stepped)]
        if before is not None:
            handles.append(optimizers.register_optimizer_step_pre_hook(steps_now))
        for handle in handles:
            weakref.finalize(self, handle.remove)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those that have stepped, or were given."""
        return list(self._seen)

    def know(self, optimizer: torch.optim.Optimizer) -> None:
        """This one trains them, too."""
        self._seen.add(optimizer)

    def _trains(self, optimizer: torch.optim.Optimizer) -> bool:
        if optimizer not in self._seen:
            own = {id(p) for p in self._parameters()}
            if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
                return False
            self._seen.add(optimizer)
        return True

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        self.count += self._trains(optimizer)

    def _prepared(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """Do what comes before a step: now, or once its closure has made the gradients."""
        assert self._before is not None
        before, closure = self._before, kwargs.get("closure") or next(iter(args[1:]), None)
        if not callable(closure):
            before(optimizer)
            return None

        def closed() -> Any:
            result = closure()
            before(optimizer)
            return result

        return args[:1], {**kwargs, "closure": closed}
