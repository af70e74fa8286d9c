"""What tells a long run from others, so that none goes on with what another has left."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from torchprune.calibration.batches import Batch
from torchprune.calibration.nested import tensors_in


def problem_of(model: nn.Module, batches: Sequence[Sequence[Batch]], asked: str) -> str:
    """What tells a measurement from others: the model's bits, all batches, and what was asked."""
    state = hashlib.sha256(asked.encode())
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            _add(state, name, tensor)
    for some in batches:
        state.update(b"batches;")
        for batch in some:
            for path, tensor in tensors_in((batch.args, batch.kwargs, (batch.tokens,))):
                _add(state, repr(path), tensor)
    return state.hexdigest()


def _add(state: hashlib._Hash, name: str, tensor: torch.Tensor) -> None:
    state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
    if tensor.device.type != "meta":
        whole = tensor.detach().cpu().contiguous().reshape(-1)
        state.update(whole.view(torch.uint8).numpy().data)
