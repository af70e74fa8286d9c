"""Which parameters recovery trains, and what an optimizer is given in their place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchprune.errors import MaskError, SpecError
from torchprune.masking.adapters import adapter_parameters
from torchprune.masking.keeper import Guarded
from torchprune.masking.mask import masked_layers, original_of
from torchprune.masking.selection import is_table

_BAKED = 0.1
"""Share of exact zeros from which a matrix without a mask is taken for a folded one."""


def check_trainable(model: nn.Module) -> None:
    """Refuse a model whose zeros or adapters training would lose.

    Raises:
        MaskError: it carries adapters, its masks are folded, or its tensors are no ordinary ones.
    """
    if adapter_parameters(model):
        raise MaskError(
            "recover: this model carries adapters (peft); recover trains the model's own weights: "
            "merge or remove the adapters first, or train them as you would without masks"
        )
    masked = {id(original_of(layer.module, layer.tensor)) for layer, _ in masked_layers(model)}
    for name, parameter in model.named_parameters():
        if type(parameter) not in (nn.Parameter, Guarded) or type(parameter.detach()) is not Tensor:
            raise MaskError(
                f"recover: {name} is a {type(parameter.detach()).__name__}; recover a model before "
                "it is sharded, quantized or lowered"
            )
        if parameter.is_meta:
            raise MaskError(f"recover: {name} has no values (it is on the meta device)")
        if id(parameter) in masked or parameter.dim() < 2 or not parameter.is_floating_point():
            continue
        zeros = 1 - int(torch.count_nonzero(parameter)) / max(1, parameter.numel())
        if _BAKED <= zeros < 1:
            raise MaskError(
                f"recover: {name} has {zeros:.0%} zeros and no mask, so that training would fill "
                "them: the model was folded. Recover it before fold, or put masks on: "
                "torchprune.apply_masks(model, {name: weight != 0, ...})"
            )


def to_train(model: nn.Module, what: str, *, least: int = 1) -> dict[str, nn.Parameter]:
    """The parameters that "weights" or "norms" name, each once, by name.

    "weights": all that are floating point and not frozen, but for tables that are looked up
    (embeddings, and output layers tied to them). "norms": those with less than two axes.

    Raises:
        SpecError: there are fewer than the least.
    """
    tables = {id(p) for m in model.modules() if is_table(m) for p in m.parameters(recurse=False)}
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.is_floating_point()
        and (parameter.dim() < 2 if what == "norms" else id(parameter) not in tables)
    }
    if len(found) < least:
        frozen = not any(p.requires_grad for p in model.parameters())
        why = "all of its parameters are frozen (requires_grad)" if frozen else "it has none"
        raise SpecError(f"recover: train={what!r} finds nothing to train in this model: {why}")
    return found


@contextmanager
def only_these_learn(model: nn.Module, chosen: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for some parameters and no others; all as before after, without gradients."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    learn = {id(p) for p in chosen}
    try:
        for parameter, _, _ in before:
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(id(parameter) in learn)
            parameter.grad = None
        yield
    finally:
        for parameter, needed, gradient in before:
            parameter.requires_grad_(needed)
            parameter.grad = gradient


@dataclass(frozen=True, eq=False)
class Learning:
    """Parameters, and the float32 values that an optimizer moves in their place.

    A step of a half-precision weight is often less than its last bit, so such a weight has a
    float32 one beside it; a float32 one stands for itself.
    """

    parameters: Sequence[nn.Parameter]
    values: Sequence[Tensor]

    @staticmethod
    def of(parameters: Sequence[nn.Parameter]) -> Learning:
        """What the optimizer is to be given, as `values`."""
        values = [p if p.dtype in _WIDE else p.detach().float() for p in parameters]
        return Learning(parameters, [v.requires_grad_() for v in values])

    def beside(self) -> list[Tensor]:
        """The values that stand beside a parameter."""
        return [value for _, value in self._narrow()]

    def before_step(self) -> None:
        """Hand the gradients over."""
        for parameter, value in self._narrow():
            value.grad = None if parameter.grad is None else parameter.grad.to(value.dtype)

    def after_step(self) -> None:
        """Take what the optimizer made."""
        with torch.no_grad():
            for parameter, value in self._narrow():
                parameter.copy_(value)

    def forget_gradients(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.grad = value.grad = None

    def _narrow(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        pairs = zip(self.parameters, self.values, strict=True)
        return ((p, v) for p, v in pairs if p is not v)


_WIDE = (torch.float32, torch.float64)
