"""What the operators of an ML program that move, choose and gather elements compute, in torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchprune.export.mil_steps import STEPS, Given, ints, step


def _axes(g: Given) -> tuple[int, ...]:
    return tuple(ints(g["axes"])) if "axes" in g else tuple(range(g["x"].dim()))


for _name, _reduce in {
    "reduce_mean": torch.mean,
    "reduce_sum": torch.sum,
    "reduce_max": torch.amax,
    "reduce_min": torch.amin,
    "reduce_log_sum_exp": torch.logsumexp,
    "reduce_l1_norm": lambda x, a, k: x.abs().sum(a, k),
    "reduce_l2_norm": lambda x, a, k: x.square().sum(a, k).sqrt(),
    "reduce_sum_square": lambda x, a, k: x.square().sum(a, k),
    "reduce_log_sum": lambda x, a, k: x.sum(a, k).log(),
}.items():
    STEPS[_name] = lambda g, _reduce=_reduce: _reduce(  # type: ignore[misc]
        g["x"], _axes(g), bool(g.get("keep_dims", False))
    )


@step("reduce_prod")
def _reduce_prod(g: Given) -> Tensor:
    keep, x = bool(g.get("keep_dims", False)), g["x"]
    for axis in sorted((a % x.dim() for a in _axes(g)), reverse=True):
        x = x.prod(axis, keep)
    return x


STEPS["reduce_argmax"] = lambda g: g["x"].argmax(
    int(g.get("axis", -1)), bool(g.get("keep_dims", False))
)
STEPS["reduce_argmin"] = lambda g: g["x"].argmin(
    int(g.get("axis", -1)), bool(g.get("keep_dims", False))
)
STEPS["transpose"] = lambda g: g["x"].permute(ints(g["perm"]))
STEPS["tile"] = lambda g: g["x"].repeat(ints(g["reps"]))
STEPS["stack"] = lambda g: torch.stack(g["values"], int(g["axis"]))
STEPS["shape"] = lambda g: torch.tensor(list(g["x"].shape))
STEPS["fill"] = lambda g: torch.full(ints(g["shape"]), g.get("value", torch.tensor(0.0)).item())
STEPS["fill_like"] = lambda g: torch.full(
    list(g["ref_tensor"].shape), g.get("value", torch.tensor(0.0)).item()
)
STEPS["range_1d"] = lambda g: torch.arange(
    g["start"].item(), g["end"].item(), g["step"].item(), dtype=g["end"].dtype
)
STEPS["reverse"] = lambda g: g["x"].flip(_axes(g))
STEPS["non_zero"] = lambda g: torch.nonzero(g["x"])
STEPS["gather_along_axis"] = lambda g: torch.take_along_dim(
    g["x"], _wrapped(g["indices"], g["x"].shape[int(g.get("axis", 0))]), int(g.get("axis", 0))
)
STEPS["pixel_shuffle"] = lambda g: F.pixel_shuffle(g["x"], int(g["upscale_factor"]))
STEPS["pixel_unshuffle"] = lambda g: F.pixel_unshuffle(g["x"], int(g["downscale_factor"]))


@step("reshape")
def _reshape(g: Given) -> Tensor:
    x, shape = g["x"], ints(g["shape"])
    return x.reshape([x.shape[at] if size == 0 else size for at, size in enumerate(shape)])


@step("expand_dims")
def _expand_dims(g: Given) -> Tensor:
    x, axes = g["x"], ints(g["axes"])
    for axis in sorted(a % (x.dim() + len(axes)) for a in axes):
        x = x.unsqueeze(axis)
    return x


@step("squeeze")
def _squeeze(g: Given) -> Tensor:
    return g["x"].squeeze(tuple(ints(g["axes"]))) if "axes" in g else g["x"].squeeze()


@step("concat")
def _concat(g: Given) -> Tensor:
    values = [torch.atleast_1d(value) for value in g["values"]]
    axis = int(g["axis"]) % values[0].dim()
    if bool(g.get("interleave", False)):
        return torch.stack(values, axis + 1).flatten(axis, axis + 1)
    return torch.cat(values, axis)


@step("split")
def _split(g: Given) -> list[Tensor]:
    axis = int(g["axis"])
    if "split_sizes" in g:
        return list(g["x"].split(ints(g["split_sizes"]), axis))
    return list(g["x"].chunk(int(g["num_splits"]), axis))


@step("pad")
def _pad(g: Given) -> Tensor:
    pairs = ints(g["pad"])
    turned = [p for at in range(len(pairs) - 2, -1, -2) for p in pairs[at : at + 2]]
    mode = {"reflect": "reflect", "replicate": "replicate"}.get(str(g.get("mode", "constant")))
    if mode is None:
        value = g.get("constant_val", torch.tensor(0.0)).item()
        return F.pad(g["x"], turned, value=value)
    while len(turned) > 2 and turned[-2:] == [0, 0]:
        turned = turned[:-2]
    return F.pad(g["x"], turned, mode=mode)


def cuts(g: Given, shape: torch.Size) -> tuple[Any, ...]:
    """Slices, or single places, of every axis, from `begin`, `end` and their masks."""
    rank = len(shape)
    begin, end = ints(g["begin"]), ints(g["end"])
    stride = ints(g["stride"]) if "stride" in g else [1] * rank
    whole = [
        [bool(v) for v in ints(g[key])] if key in g else [False] * rank
        for key in ("begin_mask", "end_mask", "squeeze_mask")
    ]
    made: list[Any] = []
    for axis in range(rank):
        if whole[2][axis]:
            made.append(begin[axis] % shape[axis])
        else:
            first = None if whole[0][axis] else begin[axis]
            made.append(slice(first, None if whole[1][axis] else end[axis], stride[axis]))
    return tuple(made)


@step("slice_by_index")
def _slice_by_index(g: Given) -> Tensor:
    x, flipped = g["x"], []
    made = list(cuts(g, x.shape))
    for axis, cut in enumerate(made):
        if isinstance(cut, slice) and cut.step < 0:  # torch has no steps back
            made[axis] = torch.arange(*cut.indices(x.shape[axis]))
            flipped.append(axis)
    for axis in flipped:
        x, made[axis] = x.index_select(axis, made[axis]), slice(None)
    return x[tuple(made)]


@step("slice_by_size")
def _slice_by_size(g: Given) -> Tensor:
    begin, size = ints(g["begin"]), ints(g["size"])
    return g["x"][
        tuple(slice(b, None if n == -1 else b + n) for b, n in zip(begin, size, strict=True))
    ]


@step("slice_update")
def _slice_update(g: Given) -> Tensor:
    made = g["x"].clone()
    made[cuts(g, made.shape)] = g["update"]
    return made


def _wrapped(indices: Tensor, size: int) -> Tensor:
    return torch.where(indices < 0, indices + size, indices)


@step("gather")
def _gather(g: Given) -> Tensor:
    x, axis, batch = g["x"], int(g.get("axis", 0)), int(g.get("batch_dims", 0))
    axis, indices = axis % x.dim(), _wrapped(g["indices"], x.shape[axis])
    if batch == 0:
        taken = x.index_select(axis, indices.reshape(-1))
        return taken.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])
    rows = zip(x.flatten(0, batch - 1), indices.flatten(0, batch - 1), strict=True)
    made = [
        _gather({"x": row, "indices": at, "axis": torch.tensor(axis - batch)}) for row, at in rows
    ]
    return torch.stack(made).reshape(*x.shape[:batch], *made[0].shape)


@step("gather_nd")
def _gather_nd(g: Given) -> Tensor:
    x, indices, batch = g["x"], g["indices"], int(g.get("batch_dims", 0))
    if batch == 0:
        parts = indices.unbind(-1)
        return x[tuple(_wrapped(p, x.shape[a]) for a, p in enumerate(parts))]
    rows = zip(x.flatten(0, batch - 1), indices.flatten(0, batch - 1), strict=True)
    made = [_gather_nd({"x": row, "indices": at}) for row, at in rows]
    return torch.stack(made).reshape(*x.shape[:batch], *made[0].shape)


@step("one_hot")
def _one_hot(g: Given) -> Tensor:
    count, axis = int(g["one_hot_vector_size"]), int(g.get("axis", -1))
    on, off = g.get("on_value", torch.tensor(1)), g.get("off_value", torch.tensor(0))
    hot = (g["indices"].unsqueeze(-1) == torch.arange(count)).movedim(-1, axis)
    return torch.where(hot, on, off)


@step("crop")
def _crop(g: Given) -> Tensor:
    (top, bottom), (left, right) = ints(g["crop_height"]), ints(g["crop_width"])
    high, wide = g["x"].shape[-2:]
    return g["x"][..., top : high - bottom, left : wide - right]


@step("cumsum")
def _cumsum(g: Given) -> Tensor:
    axis, x = int(g.get("axis", 0)), g["x"]
    back = bool(g.get("reverse", False))
    x = x.flip(axis) if back else x
    made = x.cumsum(axis)
    made = made - x if bool(g.get("exclusive", False)) else made
    return made.flip(axis) if back else made


@step("topk")
def _topk(g: Given) -> list[Tensor]:
    least = bool(g.get("ascending", False))
    return list(torch.topk(g["x"], int(g.get("k", 1)), int(g.get("axis", -1)), not least))


@step("band_part")
def _band_part(g: Given) -> Tensor:
    lower, upper = int(g.get("lower", -1)), int(g.get("upper", -1))
    x = g["x"] if lower < 0 else g["x"].triu(-lower)
    return x if upper < 0 else x.tril(upper)


@step("upsample_nearest_neighbor")
def _nearest(g: Given) -> Tensor:
    high, wide = (float(g.get(f"scale_factor_{key}", 1)) for key in ("height", "width"))
    return F.interpolate(g["x"], scale_factor=(high, wide), mode="nearest")


@step("upsample_bilinear")
def _bilinear(g: Given) -> Tensor:
    high, wide = (float(g.get(f"scale_factor_{key}", 1)) for key in ("height", "width"))
    corners = bool(g.get("align_corners", True))
    return F.interpolate(g["x"], scale_factor=(high, wide), mode="bilinear", align_corners=corners)
