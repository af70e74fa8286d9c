"""`peft_ready`: a pruned model made ready for peft, whether its zeros are masks or only zeros."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor, nn

from torchprune.errors import MaskError, MissingExtraError
from torchprune.masking.adapters import adapter_parameters
from torchprune.masking.mask import (
    Record,
    attach,
    beside,
    mask_of,
    masked_layers,
    obstacle,
    original_of,
)
from torchprune.masking.matrices import View, view_of
from torchprune.masking.ordinary_tensors import on_ordinary_tensors
from torchprune.masking.selection import Layer, layers_of, output_head, tied_to
from torchprune.specs.patterns import NM
from torchprune.training.peft_lessons import check_ready, teach_peft

Model = TypeVar("Model", bound=nn.Module)

FEW = 0.01
"""A smaller share of zeros is taken for chance: bfloat16 weights underflow here and there."""

_PATTERNS = (NM(1, 4), NM(2, 4), NM(4, 8))


@on_ordinary_tensors
def peft_ready(model: Model, *, zeros: bool = False) -> Model:
    """Make a pruned model, in place, one that peft's adapters can be put on, merged and reloaded.

    What it does for the user: it sees that there are masks (or makes them from the zeros that the
    weights hold), that peft is at hand, and that the adapters on the model, if there are some
    already, can keep the zeros. Call it before or after `get_peft_model`.

    From then on, and on every masked model, LoRA, rsLoRA and DoRA (Hu et al., arXiv 2106.09685; Liu
    et al., arXiv 2402.09353) compute W + s * M (.) (B A), so that `merge_adapter` and
    `merge_and_unload` change no output bit and keep the zeros. Other adapters work beside the
    masked layers, and are refused when a merge would fill zeros.

    Args:
        model: masked by `sparsify` or `load`; or folded, with `zeros=True`.
        zeros: put masks where weights without one are exactly zero: on the prunable layers of which
            at least 1 % are, but for the output head. The report names their pattern. A pruned
            place is then one that is zero now.

    Returns:
        the same model.

    Raises:
        MaskError: nothing is masked and `zeros` is not asked for, nothing is zero, or an adapter
            stands on a masked layer that cannot be merged into its zeros. Nothing is changed then.
        MissingExtraError: peft is absent.
    """
    if find_spec("peft") is None:
        raise MissingExtraError("peft", "peft", "peft_ready")
    teach_peft()
    found = list(_with_zeros(model)) if zeros else []
    if not found and next(masked_layers(model), None) is None:
        raise MaskError(
            "peft_ready: no prunable layer here has zeros" + f" (at least {FEW:.0%})"
            if zeros
            else "peft_ready: this model carries no masks; sparsify it, load it with "
            "torchprune.load, or, if it is folded, peft_ready(model, zeros=True) makes masks of "
            "the zeros it has"
        )
    check_ready(model, {id(layer.module) for layer, _ in found})
    for layer, keep in found:
        attach(layer.module, layer.tensor, keep, _record(layer, keep), reversible=False)
    return model


def _with_zeros(model: nn.Module) -> list[tuple[Layer, Tensor]]:
    """The layers without a mask that hold zeros, and what is none."""
    ties, head, own = tied_to(model), output_head(model), adapter_parameters(model)
    found = []
    for layer in layers_of(model):
        weight = original_of(layer.module, layer.tensor)
        if layer.module is head or id(weight) in own or obstacle(layer, ties):
            continue
        if mask_of(layer.module, layer.tensor) is not None or beside(layer.module, layer.tensor):
            continue
        keep = weight.detach() != 0
        if int((~keep).sum()) >= max(1, FEW * keep.numel()):
            found.append((layer, keep))
    return found


def _record(layer: Layer, keep: Tensor) -> Record:
    return Record("zeros", _pattern(view_of(layer.module, keep.shape), keep))


def _pattern(view: View, keep: Tensor) -> str:
    """The tightest n:m pattern that zeros follow, or their share."""
    matrix = view.to_matrix(keep)
    for pattern in _PATTERNS:
        if view.axis % pattern.m == 0:
            most = int(matrix.reshape(-1, pattern.m).sum(dim=-1).max())
            if most <= pattern.n:
                return str(pattern)
    return f"unstructured {1 - float(torch.count_nonzero(keep)) / keep.numel():.4g}"
