"""Layers that stay dense, why, and what the user must know of those that he did not leave out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from torch import nn
from torch.nn.utils import parametrize

from torchprune.errors import SpecError, TargetError, TorchpruneError
from torchprune.masking.coverage import Coverage, percent, warning_of
from torchprune.masking.mask import obstacle, original_of
from torchprune.masking.matrices import is_asked_for
from torchprune.masking.request import Request
from torchprune.masking.selection import Layer


@dataclass(frozen=True, eq=False)
class Left:
    """A layer that stays dense, and why: by the user's "choice", by the "rule" of defaults, as the
    pattern is a "misfit", or for an "obstacle" to masks."""

    layer: Layer
    kind: Literal["choice", "rule", "misfit", "obstacle"]
    why: str


def lost_of(left: Sequence[Left], *, kept: int) -> str | None:
    """What to say of the layers that should be pruned and cannot carry a mask.

    Tied weights are not lost: what they are tied to was to stay dense.

    Args:
        kept: how many weights are to be pruned.

    Raises:
        TargetError: the lost ones are more than half of what should be.
    """
    found = [x for x in left if x.kind == "obstacle" and obstacle(x.layer, {})]
    size = sum(_size(x.layer) for x in found)
    if not size:
        return None
    share = size / (size + kept)
    layers = "1 layer" if len(found) == 1 else f"{len(found)} layers"
    reasons = "; ".join(f"{x.layer.name}: {x.why}" for x in found[:3])
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    text = f"{layers} with {percent(share)} of the weights to prune cannot carry a mask: {reasons}"
    if share > 0.5:
        raise TargetError(
            f"{text}{more}; load the model whole and unquantized, and remove what computes its "
            "weights, or leave these layers out with ignore to prune the others"
        )
    return text + more


def _size(layer: Layer) -> int:
    """How many weights a layer holds, whatever computes them."""
    if not parametrize.is_parametrized(layer.module, layer.tensor):
        return original_of(layer.module, layer.tensor).numel()
    chain = cast(nn.ModuleDict, layer.module.parametrizations)[layer.tensor]
    return max((p.numel() for p in chain.parameters()), default=0)


def unknown_of(
    model: nn.Module, request: Request, left: Sequence[Left], coverage: Coverage
) -> dict[Layer, str]:
    """The tensors without masks that were no layers to choose among, and why they were not."""
    known = {x.layer.key for x in left}
    return {
        tensor: _why_unknown(tensor, request)
        for tensor in coverage.bare
        if tensor.key not in known and not request.targets
    }


def _why_unknown(tensor: Layer, request: Request) -> str:
    if request.leaves_out(tensor):
        return "ignored"
    if is_asked_for(tensor.module):
        return "it is pruned only where it is named"
    return "nothing is known of how it multiplies"


def uncovered_of(
    request: Request, left: Sequence[Left], coverage: Coverage, unknown: Mapping[Layer, str]
) -> str | None:
    """What to say of weights that stay dense by the rule, or are no layer that can be pruned.

    Args:
        unknown: those without masks that were no layers to choose among.
    """
    known = {x.layer.key: x for x in left}
    reasons = {tensor: why for tensor, why in unknown.items() if not request.leaves_out(tensor)}
    for tensor in coverage.bare:
        one = known.get(tensor.key)
        if one is not None and (one.kind in ("rule", "misfit") or _is_tied(one)):
            reasons[tensor] = one.why
    return warning_of(coverage, reasons)


def _is_tied(left: Left) -> bool:
    """Whether nothing but a tie keeps a layer from carrying a mask."""
    return left.kind == "obstacle" and obstacle(left.layer, {}) is None


def nothing_left(model: nn.Module, left: Sequence[Left]) -> TorchpruneError:
    """The error that no layer is to be pruned."""
    kind = type(model).__name__
    why = "; ".join(f"{x.layer.name}: {x.why}" for x in left[:5])
    if any(x.kind == "misfit" for x in left):
        return SpecError(f"{why}; nothing is left to prune in this {kind}")
    hint = "; name it in targets to prune it" if any(x.kind == "rule" for x in left) else ""
    there = why or "it holds no Linear, Conv or fused expert weights"
    return TargetError(f"nothing to prune in this {kind}: {there}{hint}")
