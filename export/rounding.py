"""How far a model of half precision is from itself in float32: what a difference can mean."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchprune.export import written
from torchprune.export.call import Call, Sample, run

_TIMES = 3
"""Two programs that round otherwise are each as far from float32, and some samples are worse."""


def rounding_of(call: Call) -> Callable[[Sample, list[Tensor]], float]:
    """What a program's outputs may differ by from a model's if it only rounds in another order.

    Relative to the largest output: three times what the model's own dtype makes of it. So far may
    the program be from float32 too: then nothing is asked of how far it is from the model. 0 where
    that cannot be told, because the model is not of half precision or does not run in float32.
    """
    kinds = {t.dtype for t in (*call.module.parameters(), *call.module.buffers())}
    half = bool(kinds & {torch.float16, torch.bfloat16})

    def allowed(sample: Sample, outputs: list[Tensor]) -> float:
        if not half:
            return 0.0
        try:
            wide = copy.deepcopy(call.module).float()
            args, kwargs = pytree.tree_map_only(Tensor, _widened, (sample.args, sample.kwargs))
            exact = run(wide, args, kwargs)
            own, theirs = (
                written.compare(exact, found, float("inf"))[1]
                for found in (sample.outputs, outputs)
            )
            return float("inf") if theirs <= _TIMES * own else _TIMES * own
        except Exception:  # whatever a model raises that computes in one dtype alone
            return 0.0

    return allowed


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
