"""Calibration written out by hand: the whole model run anew for every group of layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from saved import QUIET as QUIET
from saved import prune as prune
from torch import Tensor, nn

from torchprune import SparseGPTSpec, WandaSpec
from torchprune.calibration.moments import Moments
from torchprune.masking.projection import project
from torchprune.methods.factor import factorise
from torchprune.methods.sparsegpt import sparsegpt
from torchprune.methods.wanda import wanda_score

Spec = WandaSpec | SparseGPTSpec


def second_moment(x: Tensor) -> Tensor:
    """sum of x x^T, rounded once to float32: what the library hands its solvers."""
    return (x.double().T @ x.double()).float()


def moments_of(x: Tensor, dense: Tensor | None = None, **kept: bool) -> Moments:
    """What calibration keeps of one layer's inputs, of a dense run's inputs with them if given."""
    kept = {"gram": True, "cross": dense is not None, **kept}
    moments = Moments.empty(1, x.shape[1], x.device, **kept)
    moments.add([x], dense=None if dense is None else [dense])
    moments.finish()
    return moments


# -- the flow by hand -----------------------------------------------------------------------------


def inputs_of(
    model: nn.Module, names: Iterable[str], data: list[Any], uses: slice = slice(None)
) -> dict[str, list[Tensor]]:
    """Every named layer's inputs, one entry a use, from whole forward passes over all batches."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    for batch in data:
        seen: dict[str, list[Tensor]] = defaultdict(list)
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, into=seen[name]: into.append(args[0].detach().clone())
            )
            for name in names
        ]
        with torch.no_grad():
            model(**batch) if isinstance(batch, dict) else model(batch)
        for handle in handles:
            handle.remove()
        for name, xs in seen.items():
            found[name] += xs[uses]
    return found


def by_hand(
    model: nn.Module,
    spec: Spec,
    data: list[Any],
    groups: list[list[str]],
    uses: slice = slice(None),
) -> dict[str, Tensor]:
    """Prune group after group of Linear layers, running the whole model anew for each."""
    kept = {}
    for group in groups:
        kept |= by_hand_from(model, spec, inputs_of(model, group, data, uses))
    return kept


def by_hand_from(model: nn.Module, spec: Spec, found: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """Prune Linear layers on these inputs; zeros and new weights go straight into the weights."""
    kept = {}
    for name, xs in found.items():
        weight = model.get_submodule(name).weight
        gram = isinstance(spec, SparseGPTSpec)
        moments = Moments.empty(1, weight.shape[1], weight.device, gram=gram)
        for x in xs:
            moments.add([x.clone().reshape(-1, x.shape[-1])])
        moments.finish()
        pattern, share, scope = spec.goal.pattern, spec.goal.sparsity, spec.scope or ""
        if moments.gram is not None:
            factor = factorise(moments.gram[0], moments.rows[0], spec.damping, name)
            (solved,) = sparsegpt([weight], factor, pattern, share, scope, spec.block_size)
            new, keep = solved.weight, solved.keep
        else:
            keep = project(wanda_score(weight, moments.square[0]), pattern, share, scope)
            new = weight.detach()
        weight.data = torch.where(keep, new.to(weight.dtype), 0)
        kept[f"{name}.weight"] = keep
    return kept


def llama_layers(blocks: int = 2) -> list[list[str]]:
    """A Llama's layers in the order they run, a list for each block."""
    attention = [f"self_attn.{p}_proj" for p in "qkvo"]
    mlp = [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    return [[f"model.layers.{i}.{n}" for n in attention + mlp] for i in range(blocks)]


def groups_for(mode: str, layers: list[list[str]]) -> list[list[str]]:
    if mode == "block":
        return layers
    flat = [name for block in layers for name in block]
    return [[name] for name in flat] if mode == "layer" else [flat]


MODES = ["layer", "block", "none"]


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything a failed call must leave as it was."""
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "keys": list(model.state_dict()),
        "parameters": [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        "training": [m.training for m in model.modules()],
        "classes": [type(m).__qualname__ for m in model.modules()],
        "hooks": [
            (len(m._forward_pre_hooks), len(m._forward_hooks), "forward" in vars(m))
            for m in model.modules()
        ],
        "use_cache": getattr(getattr(model, "config", None), "use_cache", None),
        "modes": modes_now(),
    }


def assert_as_it_was(model: nn.Module, before: dict[str, Any]) -> None:
    now = fingerprint(model)
    for key, value in before.pop("state").items():
        assert torch.equal(
            now["state"][key].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)
        ), key
    now.pop("state")
    assert now == before


def modes_now() -> tuple[object, ...]:
    from torch.overrides import _get_current_function_mode_stack

    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_float32_matmul_precision(),
        torch.backends.mha.get_fastpath_enabled(),
        len(_get_current_function_mode_stack()),
    )
