"""Parameters of which each process holds a part: those of `fully_shard` and of tensor parallelism.

A mask's bits, and the values that it hides, are whole on every process: what a process needs for
its own part it cuts out without a word to the others. Zeros live in the part, as they do in an
ordinary parameter, and every optimizer's step is followed by a look at them. Where `fully_shard`
hands out a gathered weight, that is multiplied by the mask.

`fully_shard` remembers where each parameter stands. A mask moves it, so it is told.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as optimizers

from torchprune.masking.keeper import values_of
from torchprune.masking.packing import clear, pack_bits, unpack_bits

_LOCK = threading.RLock()
_HOMES: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""What stands in the place of each masked tensor: the parametrizations that hold its parameter."""

# -- parts and wholes ------------------------------------------------------------------------------


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    known = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return known is not None and isinstance(tensor, known)


def sharded_in(model: nn.Module) -> str | None:
    """The name of a parameter that is spread over processes, or None."""
    return next((name for name, p in model.named_parameters() if is_shard(p)), None)


def whole_of(tensor: Tensor) -> Tensor:
    """A parameter's values, all of them: of an ordinary one its own memory, of a shard a copy.

    Of a shard every process must ask at once.
    """
    if not is_shard(tensor):
        return values_of(tensor)
    shard: Any = tensor
    with torch.no_grad():
        whole: Tensor = shard.detach().full_tensor()
        local = shard.to_local()
        return whole.clone() if whole.untyped_storage()._cdata == _storage_of(local) else whole


def _storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def local_of(tensor: Tensor) -> Tensor:
    """The memory that this process holds of a parameter: of an ordinary one all of it."""
    if not is_shard(tensor):
        return values_of(tensor)
    shard: Any = tensor
    with torch.no_grad():
        local: Tensor = shard.detach().to_local()
        return local


def spread_like(whole: Tensor, shard: Tensor) -> Any:
    """A tensor that every process has whole, as a `DTensor` laid out like a shard."""
    from torch.distributed.tensor import distribute_tensor  # torch without it has no shards

    like: Any = shard
    whole = whole.detach().to(like.to_local().device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def part_of(whole: Tensor, parameter: Tensor) -> Tensor:
    """What this process holds of a tensor that is laid out like a parameter."""
    if not is_shard(parameter):
        return whole
    part: Tensor = spread_like(whole, parameter).to_local()
    return part


def write(parameter: Tensor, whole: Tensor) -> None:
    """Overwrite a parameter with values that every process has whole, in place."""
    local_of(parameter).copy_(part_of(whole, parameter))


def address_of(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 for one that only wraps others (quantized, sparse)."""
    try:
        return (local_of(tensor) if is_shard(tensor) else tensor).untyped_storage().data_ptr()
    except RuntimeError:
        return 0


@dataclass(frozen=True, eq=False)
class Part:
    """This process's part of a mask's bits, and what it was cut for."""

    bits: Tensor
    own: Tensor
    version: int
    mesh: object
    placements: object

    @staticmethod
    def of(bits: Tensor, shape: torch.Size, shard: Any) -> Part:
        keep = part_of(unpack_bits(bits, shape), shard)
        return Part(bits, pack_bits(keep), bits._version, shard.device_mesh, shard.placements)

    def fits(self, bits: Tensor, shard: Any) -> bool:
        """Whether it was cut from these bits, as they are, for a shard laid out like this one."""
        return (
            self.bits is bits
            and self.version == bits._version
            and self.mesh is shard.device_mesh
            and self.placements == shard.placements
        )


def clear_part(shard: Tensor, own: Tensor) -> None:
    """Make zero what this process's bits do not keep of its part."""
    with torch.inference_mode(False), torch.no_grad():
        local = local_of(shard)
        if local.numel():
            clear(local, own.to(local.device))


# -- after each step -------------------------------------------------------------------------------

_WATCHED: list[object] = []


def settle_at(home: nn.Module) -> None:
    """Have the part that stands here cleaned after every optimizer's step, if one ever does."""
    with _LOCK:
        _HOMES.add(home)
        if not _WATCHED:
            _WATCHED.append(optimizers.register_optimizer_step_post_hook(_stepped))


def _stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    steps = (p for group in optimizer.param_groups for p in group["params"] if is_shard(p))
    masks: dict[int, Any] | None = None
    for shard in steps:
        masks = _masks_by_shard() if masks is None else masks
        if (mask := masks.get(id(shard))) is not None:
            mask.clean_part(shard)


def _masks_by_shard() -> dict[int, Any]:
    with _LOCK:
        homes = list(_HOMES)
    found = ((home, home._parameters.get("original")) for home in homes)
    return {id(p): home._modules["0"] for home, p in found if p is not None and is_shard(p)}


# -- fully_shard -----------------------------------------------------------------------------------


def _fully_sharded() -> Iterator[tuple[nn.Module, Any]]:
    """Every parameter that `fully_shard` manages, with a module that can gather and free it.

    torch has no public way to tell of them.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return
    known = sys.modules.get("torch.distributed._composable_state")
    for module, held in list(getattr(known, "_module_state_mapping", {}).items()):
        state = held() if isinstance(held, weakref.ref) else held
        for group in getattr(state, "_fsdp_param_groups", None) or [
            getattr(state, "_fsdp_param_group", None)
        ]:
            for managed in getattr(group, "fsdp_params", ()):
                yield module, managed


def _places_of(managed: Any) -> list[tuple[nn.Module, str]]:
    info = managed._module_info
    shared = zip(info.shared_modules, info.shared_param_names, strict=True)
    return [(info.module, info.param_name), *shared]


def is_managed(module: nn.Module) -> bool:
    """Whether `fully_shard` shards a module's parameters."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def why_immovable(module: nn.Module, tensor: str) -> str | None:
    """Why a sharded parameter cannot be moved behind a mask, or None."""
    if not is_managed(module):
        return None  # of tensor parallelism: nobody else knows where it stands
    try:
        if any((module, tensor) in _places_of(managed) for _, managed in _fully_sharded()):
            return None
    except AttributeError:
        pass
    return (
        f"its {tensor} is sharded by fully_shard, which this torch ({torch.__version__}) cannot be "
        "told of a mask; put masks on first (torchprune.apply_masks), then fully_shard"
    )


def moved(old: tuple[nn.Module, str], new: tuple[nn.Module, str]) -> None:
    """Tell `fully_shard` that a parameter of its own stands elsewhere now."""
    for name in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
        if hasattr(old[0], name):
            setattr(new[0], name, getattr(old[0], name))
    for _, managed in _fully_sharded():
        places = _places_of(managed)
        if old not in places:
            continue
        (module, name), *shared = [new if place == old else place for place in places]
        info = managed._module_info
        info.module, info.param_name = module, name
        info.shared_modules[:] = [m for m, _ in shared]
        info.shared_param_names[:] = [n for _, n in shared]
        handle = getattr(managed, "_post_load_hook_handle", None)
        if handle is not None:
            handle.remove()
            managed._post_load_hook_handle = module.register_load_state_dict_post_hook(
                _Reset(managed)
            )


class _Reset:
    """A hook: a shard that was loaded may be another tensor now."""

    def __init__(self, managed: Any) -> None:
        self.managed = managed

    def __call__(self, module: nn.Module, incompatible_keys: object) -> None:
        self.managed.reset_sharded_param()


def free_gathered(model: nn.Module) -> None:
    """Have shards stand where `fully_shard` left gathered parameters after a forward.

    What is written to those is lost.
    """
    inside: set[nn.Module] | None = None
    gathered: dict[int, Any] = {}
    for module, managed in _fully_sharded():
        if getattr(getattr(managed, "sharded_state", None), "name", "SHARDED") != "SHARDED":
            inside = set(model.modules()) if inside is None else inside
            if any(place in inside for place, _ in _places_of(managed)):
                gathered[id(module)] = module
    for module in gathered.values():
        module.reshard()
