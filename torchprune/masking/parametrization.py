"""The parametrization that a mask is: its bits, what they hide, and the weight it gives.

The law: while a mask is attached the effective weight is `where(mask, original, 0)`, bit-equal to
what was written where kept and exactly `+0.0` elsewhere, whatever was written there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from torchprune.masking.keeper import Guarded, Keeper, is_ordinary, keeper_of
from torchprune.masking.packing import (
    cleared,
    masked,
    pack_bits,
    pack_values,
    put_values,
    traced_bits,
    unpack_bits,
)
from torchprune.masking.passing import passing
from torchprune.masking.shards import (
    Part,
    clear_part,
    is_shard,
    local_of,
    spread_like,
    whole_of,
    write,
)


@dataclass(frozen=True)
class Record:
    """How a mask came about: what `report` shows beside what it counts.

    Attributes:
        method: "magnitude", "wanda", "sparsegpt" and so on, the qualified name of a user's own
            function, or "given" (by `apply_masks`).
        pattern: the pattern's name, with the asked sparsity where the pattern implies none.
        updates_weights: whether the method changed kept weights.
        error: relative squared error of the layer's output on calibration inputs,
            ||X (W - W')^T||^2 / ||X W^T||^2, or None without data.
        tokens: calibration rows that reached the layer.
        note: anything the user should know.
        view: how the weight reads as matrices (`View.text`), where its module does not tell.
    """

    method: str
    pattern: str
    updates_weights: bool = False
    error: float | None = None
    tokens: int | None = None
    note: str = ""
    view: str = ""


class Listener:
    """Adds up gradients of all weights, of those that a mask prunes too, while it is awake.

    Copies of a mask have none.

    Attributes:
        awake: whether what passes is added.
        heard: float32 sum of the gradients since it woke, of the weight's shape, or None.
    """

    def __init__(self) -> None:
        self.awake = False
        self.heard: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def hear(self, gradient: Tensor) -> None:
        """A gradient comes by."""
        if not self.awake:
            return
        with torch.no_grad():
            own = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
            self.heard = own.float().clone() if self.heard is None else self.heard.add_(own)

    def take(self) -> Tensor | None:
        """What was heard, which it forgets."""
        heard, self.heard = self.heard, None
        return heard


class Mask(nn.Module):
    """The parametrization: `weight = where(mask, original, 0)`, where `original` has the zeros.

    So the weight is the original itself as long as nothing is written under the mask; see
    `keeper`. Where it is traced, or stands in for another tensor, it is the product.

    Buffers:
        bits: uint8, one bit a weight, see `packing`; set = kept. Never floating point, so that
            `.to(dtype)` leaves it alone.
        hidden: the values under the zeros, row-major, in the weight's dtype; None where
            they are gone. What `densify` puts back.
        dense: the weight before pruning, only where `keep_dense` was asked for.

    A `state_dict` holds these. One with `mask`, bool of the weight's shape, and the values under
    the zeros in `original` is read too: so it was before there were bits.
    """

    bits: Tensor
    hidden: Tensor | None
    dense: Tensor | None

    learns: ClassVar[bool] = False
    """Whether the weight behind it is dense, and goes on learning where the mask prunes."""

    def __init__(
        self,
        mask: Tensor,
        record: Record,
        dense: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("bits", pack_bits(mask))
        self.register_buffer("hidden", hidden)
        self.register_buffer("dense", dense)
        self.shape = mask.shape
        self.record = record
        self.keeper = Keeper()
        self.listener: Listener | None = None
        self._transparent = self._exported = False

    @property
    def mask(self) -> Tensor:
        """The mask, bool of the weight's shape, True = kept: a copy, for reading."""
        return unpack_bits(self.bits, self.shape)

    @property
    def reversible(self) -> bool:
        """Whether the values under the zeros are kept."""
        return self.hidden is not None

    # -- the weight ----------------------------------------------------------------------------

    def forward(self, weight: Tensor) -> Tensor:
        if self._transparent:
            return weight
        mask = self.whole(weight)
        if torch.is_grad_enabled() and self.listener is not None:
            if weight is self.keeper.param:
                return passing(weight, mask)  # `of_gradient` sees to the gradient
            product = torch.where(mask, weight, 0)
            if product.requires_grad and not torch.compiler.is_compiling():
                product.register_hook(self.listener.hear)
            return product
        exports = torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None
        if torch.is_grad_enabled() or exports or is_shard(weight):
            return torch.where(mask, weight, 0)  # what autograd knows, and graph passes look for
        return masked(weight, mask)  # inductor folds this one where weights are frozen

    def whole(self, weight: Tensor) -> Tensor:
        """The mask in a weight's memory format, as what watches can follow it."""
        if self._exported:
            return cast(Tensor, self._buffers["mask"])
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            mask = traced_bits(self.bits, self.shape)
        else:
            mask = self.mask
        if is_shard(weight):
            return cast(Tensor, spread_like(mask, weight))
        if weight.is_contiguous():
            return mask
        if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
            return mask.contiguous(memory_format=torch.channels_last)
        return laid_out_like(mask, weight)

    def makes_ready(self, weight: Tensor) -> bool:
        """Clean a parameter, if it is one to be handed out, and see that its gradient is masked."""
        keeper = self.keeper
        if self._transparent:
            return True
        if weight is not keeper.param:
            if keeper.param is not None:
                if type(weight) is nn.Parameter or is_shard(weight):  # do not hold the other
                    keeper.forget()
                return False
            if type(weight) is not Guarded or keeper_of(weight) is not None:
                return False
        if not is_ordinary(weight) or torch._C._len_torch_dispatch_stack():
            return False
        if weight is not keeper.param or type(weight) is not Guarded:
            keeper.adopt(weight)
        keeper.clean(self.bits)
        if torch.is_grad_enabled() and weight.requires_grad:
            keeper.hook(self.of_gradient)
        return True

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """A gradient with zeros where the mask prunes."""
        if self._transparent:
            return gradient
        if self.listener is not None:
            self.listener.hear(gradient)
        if gradient.layout == torch.sparse_coo:
            some = gradient.coalesce()
            keep = self.mask[tuple(some.indices())]
            values = torch.where(keep, some.values(), 0)
            return torch.sparse_coo_tensor(some.indices(), values, some.shape, is_coalesced=True)
        plain = type(gradient) is Tensor and gradient.shape == self.shape
        if plain and not torch.is_grad_enabled() and not is_watched():
            return cleared(gradient, self.bits)
        return torch.where(self.whole(gradient), gradient, 0)

    @contextmanager
    def transparent(self) -> Iterator[None]:
        """For a while, give weights as they are: somebody else sees to the zeros."""
        self._transparent = self.keeper.touched = True
        try:
            yield
        finally:
            self._transparent, self.keeper.touched = False, True

    @contextmanager
    def exported(self, weight: Tensor) -> Iterator[None]:
        """For a while, hold the mask as one bool buffer, which a program's graph then reads."""
        own = dict(self._buffers)
        mask = laid_out_like(self.mask, weight)
        self._buffers.clear()
        self._buffers["mask"], self._exported = mask, True
        try:
            yield
        finally:
            self._exported = False
            self._buffers.clear()
            self._buffers.update(own)

    def clean_part(self, shard: Tensor) -> bool:
        """Make zero what the mask prunes of this process's part of a sharded parameter.

        Returns:
            whether the zeros are there now.
        """
        keeper = self.keeper
        if self._transparent or type(local_of(shard)) is not Tensor:
            return self._transparent
        if keeper.part is None or not keeper.part.fits(self.bits, shard):
            keeper.part = Part.of(self.bits, self.shape, shard)
        clear_part(shard, keeper.part.own)
        return True

    # -- what reversal needs -------------------------------------------------------------------

    def put_on(self, weight: Tensor) -> None:
        """Have the zeros in this parameter from now on, and in no other."""
        if self.keeper.param is not weight:
            self.keeper.free()
        if is_shard(weight):
            self.clean_part(weight)
        elif is_ordinary(weight):
            self.keeper.adopt(weight)
            self.keeper.clean(self.bits)
            if weight.requires_grad:
                self.keeper.hook(self.of_gradient)

    def restored(self, weight: Tensor) -> Tensor:
        """A copy of the weight with the values under the zeros, if they are kept.

        Of a shard every process must ask at once.
        """
        whole = whole_of(weight).detach()
        values = whole if is_shard(weight) else whole.clone()
        self.fill(values)
        return values

    def fill(self, values: Tensor) -> None:
        """Put the hidden values where they were, in place."""
        if self.hidden is not None:
            put_values(values, ~self.mask, self.hidden)

    def change(self, weight: Tensor, mask: Tensor, record: Record, *, reversible: bool) -> None:
        """Become another mask on the same weight; what is pruned no more has its value again."""
        whole = self.restored(weight)
        self.hidden = pack_values(whole, ~mask) if reversible else None
        write(weight, whole)
        self.bits.copy_(pack_bits(mask))  # in place: compiled models see it without recompiling
        self.record = record
        self.keeper.touched = True
        self.put_on(weight)

    def resize(self, change: Callable[[Tensor], Tensor], weight: Tensor) -> None:
        """Become a mask on another parameter: `change` gives what stays of the old one's shape."""
        if self.hidden is not None:
            whole = torch.zeros(self.shape, dtype=self.hidden.dtype, device=self.hidden.device)
            self.fill(whole)
            self.hidden = pack_values(change(whole), ~change(self.mask))
        mask = change(self.mask)
        self.bits, self.shape = pack_bits(mask), mask.shape
        if self.dense is not None:
            self.dense = change(self.dense)
        self.put_on(weight)

    def snapshot(self) -> tuple[Tensor, Record, Tensor | None, Tensor | None]:
        """What `restore` needs to make this mask what it is now."""
        return self.bits.clone(), self.record, self.hidden, self.dense

    def restore(self, snapshot: tuple[Tensor, Record, Tensor | None, Tensor | None]) -> None:
        """Become what the mask was when the snapshot was taken."""
        bits, self.record, self.hidden, self.dense = snapshot
        self.bits.copy_(bits)
        self.keeper.touched = True

    def right_inverse(self, weight: Tensor) -> Tensor:
        # Identity: what is assigned is written into the original, and cleaned like any write.
        return weight

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {k: v for k, v in state_dict.items() if k.startswith(prefix)}
        bits, hidden = (given.pop(f"{prefix}{name}", None) for name in ("bits", "hidden"))
        if bits is None:
            if strict:
                missing_keys.append(f"{prefix}bits")
        elif bits.shape != self.bits.shape or bits.dtype != torch.uint8:
            error_msgs.append(mismatch(f"{prefix}bits", bits, torch.uint8, self.bits.shape))
        else:
            if self.bits.is_meta or local_metadata.get("assign_to_params_buffers", False):
                self.bits = bits
            else:
                self.bits.copy_(bits)
            self.hidden = None if hidden is None else hidden.to(self.bits.device, copy=True)
        own = {name: self._buffers.pop(name) for name in ("bits", "hidden")}
        try:  # what is left: the dense weight
            super()._load_from_state_dict(
                given,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        finally:
            self._buffers = {**own, **self._buffers}


def mismatch(key: str, got: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> str:
    """What `load_state_dict` says of a tensor that does not fit."""
    return (
        f"size mismatch for {key}: expected {dtype} {tuple(shape)}, got {got.dtype} "
        f"{tuple(got.shape)}"
    )


def is_watched() -> bool:
    """Whether something follows what is computed: a transform, a tracer, a compiler."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def laid_out_like(mask: Tensor, weight: Tensor) -> Tensor:
    """The mask in the weight's memory format, so that masking does not undo `channels_last`."""
    if mask.stride() == weight.stride():
        return mask
    return torch.empty_like(weight, dtype=torch.bool).copy_(mask)
