"""A packed weight unpacked to be read: writing to it would change nothing, and raises."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchprune.errors import LoweringError
from torchprune.masking.adapters import FIRST_LIFT


class Unpacked(Tensor):
    """A copy of a packed weight, and views of that copy. What is computed from it is a Tensor."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    def set_(self, *given: Any, **named: Any) -> Any:
        """Refused here: torch tells no class of it."""
        raise refusal("of set_ ")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Unpacked)]
        with torch._C.DisableTorchFunctionSubclass():
            before = [_mark(tensor) for tensor in given]
            result = func(*args, **kwargs)
            if before != [_mark(tensor) for tensor in given]:
                raise refusal(f"of {getattr(func, '__name__', func)} ")
            if func is Tensor.numpy:
                result.setflags(write=False)
            homes = {_storage(tensor) for tensor in given}
            return pytree.tree_map_only(Tensor, lambda found: _as_it_is(found, homes), result)


def refusal(what: str = "") -> LoweringError:
    """What a write to a packed weight raises."""
    return LoweringError(
        f"the weight of a lowered layer is packed, and a write {what}to what is unpacked of it "
        f"would be lost: {FIRST_LIFT}; `weight.clone()` is a copy of your own"
    )


def _mark(tensor: Tensor) -> tuple[int, int]:
    """What differs after a write."""
    return tensor._version, _storage(tensor)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _as_it_is(found: Tensor, homes: set[int]) -> Tensor:
    """Views of the copy are guarded as it is."""
    if type(found) not in (Tensor, Unpacked) or found.layout != torch.strided:
        return found
    return found.as_subclass(Unpacked if _storage(found) in homes else Tensor)
