"""Every operator that stands between two layers: what goes through it is exact, or stays."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from structures import close, mask_random_units, outputs
from sweeps import share
from torch import Tensor, nn

import torchprune
from torchprune.errors import ShrinkError
from torchprune.graph.groups import structure_of

Function = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, between: Function, inner: int, outer: int, space: int) -> None:
        super().__init__()
        self.between = between
        if space:
            kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[space - 1]
            self.first, self.last = kind(3, inner, 3, padding=1), kind(outer, 4, 1)
        else:
            self.first, self.last = nn.Linear(3, inner), nn.Linear(outer, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


def example(space: int) -> Tensor:
    return torch.randn(*((2, 5, 3), (2, 3, 8), (2, 3, 8, 8), (2, 3, 4, 4, 4))[space])


def _shifted(t: Tensor) -> Tensor:
    out = torch.zeros_like(t)
    out[:, :, 1:] = t[:, :, :-1]
    return out


def _shifted_channels(t: Tensor) -> Tensor:
    out = torch.zeros_like(t)
    out[:, 1:] = t[:, :-1]
    return out


def _rows_cleared(t: Tensor) -> Tensor:
    out = t.clone()
    out[:, :, torch.tensor([0, 2])] = 0
    return out


def _first_row_raised(t: Tensor) -> Tensor:
    out = t * 1
    out[:, :, 0] += 1
    return out


def _halves_filled(t: Tensor) -> Tensor:
    out = t.new_empty(t.shape)
    out[:, :, :4], out[:, :, 4:] = t[:, :, 4:], t[:, :, :4]
    return out


def _every_second(t: Tensor) -> Tensor:
    out = torch.empty_like(t).copy_(t)
    out[:, :, ::2] = -t[:, :, 1::2]
    return out


def _raised_where_positive(t: Tensor) -> Tensor:
    out = t.clone()
    out[out > 0] += 1
    return out


def _doubled_where_negative(t: Tensor) -> Tensor:
    out = t.clone()
    out[t < 0] = t[t < 0] * 2 - 1
    return out


def _filled_in_place(t: Tensor) -> Tensor:
    return t.clone().masked_fill_(t < 0, 0.5)


def _set_where(t: Tensor) -> Tensor:
    out = t.clone()
    out[out.abs() < 0.1] = 3.0
    return out


def _masked_rows(t: Tensor) -> Tensor:
    out = t.clone()
    out[:, :, torch.arange(8) > 3] = 0.0
    return out


def _put_at_two(t: Tensor) -> Tensor:
    out = t.clone()
    out[:, :, torch.tensor([0, 2]), torch.tensor([1, 1])] = 1.0
    return out


def _scattered_back(t: Tensor) -> Tensor:
    mask = t > 0
    return t.masked_scatter(mask, t.masked_select(mask).exp())


def _shuffled_picks(t: Tensor) -> Tensor:
    out = t.clone()
    out[t > 0] = t[t > 0].flip(0)
    return out


def _of_another_mask(t: Tensor) -> Tensor:
    out = t.clone()
    out[t > 0] = (t + 0)[t * 1 > 0]
    return out


def _unpooled(t: Tensor) -> Tensor:
    pooled, places = F.max_pool2d(t, 2, return_indices=True)
    return F.max_unpool2d(pooled, places, 2)


def _warped(t: Tensor) -> Tensor:
    grid = F.affine_grid(torch.eye(2, 3).expand(2, 2, 3), (2, 1, 8, 8), align_corners=False)
    return F.grid_sample(t, grid, align_corners=False)


def pointwise(function: Function) -> tuple[int, int, Function]:
    return 2, 16, function


NAMED = [
    *("hardswish", "hardsigmoid", "relu6", "hardtanh", "silu", "mish", "selu", "celu", "elu"),
    *("gelu", "logsigmoid", "softplus", "softsign", "tanhshrink", "softshrink", "hardshrink"),
    *("leaky_relu", "rrelu", "relu"),
]

GO: dict[str, tuple[int, int, Function]] = {
    # name: axes of space, channels that the function makes of 16, the function
    **{name: pointwise(getattr(F, name)) for name in NAMED},
    "threshold": pointwise(lambda t: F.threshold(t, 0.1, 0.0)),
    "addcmul": pointwise(lambda t: torch.addcmul(t, t, t)),
    "lerp": pointwise(lambda t: torch.lerp(t, t * 2, 0.3)),
    "hypot": pointwise(lambda t: torch.hypot(t, t)),
    "heaviside": pointwise(lambda t: torch.heaviside(t, torch.tensor(1.0))),
    "bucketize": pointwise(lambda t: t * torch.bucketize(t, torch.tensor([0.0, 1.0]))),
    "complex": pointwise(lambda t: torch.view_as_real(torch.complex(t, t)).sum(-1)),
    "instance norm": pointwise(F.instance_norm),
    "pixel shuffle": (2, 4, lambda t: F.pixel_shuffle(t, 2)),
    "pixel unshuffle": (2, 64, lambda t: F.pixel_unshuffle(t, 2)),
    "glu": (2, 8, lambda t: F.glu(t, 1)),
    "glu of features": (0, 8, lambda t: F.glu(t, -1)),
    "tile": pointwise(lambda t: t.tile(1, 1, 2, 2)),
    "tile channels": (2, 32, lambda t: t.tile(1, 2, 1, 1)),
    "repeat interleave": (2, 32, lambda t: t.repeat_interleave(2, 1)),
    "hstack": (2, 32, lambda t: torch.hstack([t, t * 2])),
    "vstack": pointwise(lambda t: torch.vstack([t, t])),
    "swapdims": (0, 16, lambda t: t.swapdims(0, 1)),
    "rot90": pointwise(lambda t: torch.rot90(t, 1, [2, 3])),
    "unfold": pointwise(lambda t: t.unfold(2, 3, 1).mean(-1)),
    "patches and back": pointwise(
        lambda t: F.fold(F.unfold(t, 3, padding=1), (8, 8), 3, padding=1)
    ),
    "diagonal": pointwise(lambda t: t.diagonal(0, 2, 3)[..., None]),
    "tril": pointwise(torch.tril),
    "trilinear": (3, 16, lambda t: F.interpolate(t, scale_factor=2, mode="trilinear")),
    "nearest exact": pointwise(lambda t: F.interpolate(t, scale_factor=2, mode="nearest-exact")),
    "bilinear, antialiased": pointwise(
        lambda t: F.interpolate(t, scale_factor=0.5, mode="bilinear", antialias=True)
    ),
    "bicubic, antialiased": pointwise(
        lambda t: F.interpolate(t, scale_factor=0.5, mode="bicubic", antialias=True)
    ),
    "area": pointwise(lambda t: F.interpolate(t, scale_factor=0.5, mode="area")),
    "grid sample": pointwise(_warped),
    "max unpool": pointwise(_unpooled),
    "adaptive max pool 3d": (3, 16, lambda t: F.adaptive_max_pool3d(t, 2)),
    "lp pool": pointwise(lambda t: F.lp_pool2d(t.abs() + 1, 2, 2)),
    "index select": pointwise(lambda t: t.index_select(2, torch.tensor([0, 1]))),
    "index add": pointwise(lambda t: t.index_add(2, torch.tensor([0]), t[:, :, :1])),
    "sort": pointwise(lambda t: t.sort(2)[0]),
    "argsort": pointwise(lambda t: t * t.argsort(2)),
    "gather of a sort": pointwise(lambda t: t.gather(2, t.argsort(2))),
    "topk": pointwise(lambda t: t.topk(3, 2)[0]),
    "median": pointwise(lambda t: t.median(2, keepdim=True)[0]),
    "kthvalue": pointwise(lambda t: t.kthvalue(2, 2, keepdim=True)[0]),
    "cummax": pointwise(lambda t: t.cummax(2)[0]),
    "cumprod": pointwise(lambda t: t.cumprod(2)),
    "diff": pointwise(lambda t: t.diff(dim=2)),
    "quantile": pointwise(lambda t: t.quantile(0.5, 2, keepdim=True)),
    "aminmax": pointwise(lambda t: t.aminmax(dim=2, keepdim=True)[0]),
    "nansum": pointwise(lambda t: t.nansum(2, keepdim=True)),
    "count nonzero": pointwise(lambda t: t * t.count_nonzero(2)[:, :, None]),
    "std and mean": pointwise(lambda t: sum(torch.std_mean(t, 2, keepdim=True))),
    "trapezoid": pointwise(lambda t: torch.trapezoid(t, dim=2)[:, :, None]),
    "cosine of rows": pointwise(lambda t: t * F.cosine_similarity(t, t + 1, dim=2)[:, :, None]),
    "cross": (1, 16, lambda t: torch.linalg.cross(t[..., :3], t[..., 3:6], dim=2)),
    "fft": pointwise(lambda t: torch.fft.rfft2(t).real),
    "einsum with dots": pointwise(lambda t: torch.einsum("...hw,hk->...kw", t, torch.ones(8, 8))),
    "einsum of three": pointwise(
        lambda t: torch.einsum("bchw,hk,wl->bckl", t, torch.ones(8, 8), torch.ones(8, 8))
    ),
    "einsum of one": pointwise(lambda t: torch.einsum("bchw->bcwh", t)),
    "einsum that sums one": pointwise(lambda t: torch.einsum("bchw->bcw", t)[:, :, None]),
    "kron": (0, 16, lambda t: torch.kron(t, torch.ones(1, 2, 1))),
    "written slice": pointwise(_shifted),
    "written slice of channels": pointwise(_shifted_channels),
    "written rows": pointwise(_rows_cleared),
    "added to a view": pointwise(_first_row_raised),
    "filled by halves": pointwise(_halves_filled),
    "every second written": pointwise(_every_second),
    "raised under a mask": pointwise(_raised_where_positive),
    "written under a mask": pointwise(_doubled_where_negative),
    "filled under a mask": pointwise(_filled_in_place),
    "set under a mask": pointwise(_set_where),
    "multiplied by a mask": pointwise(lambda t: t.clone().mul_(t > 0)),
    "written back where picked": pointwise(_scattered_back),
    "rows under a mask": pointwise(_masked_rows),
    "two indices": pointwise(lambda t: t[:, :, [0, 2], [1, 1]][..., None]),
    "written at two indices": pointwise(_put_at_two),
    "mirrored channels": pointwise(lambda t: t.flip(1)),
    "reflected": pointwise(lambda t: F.pad(t, (1, 1, 1, 1), mode="reflect")),
    "copied": pointwise(lambda t: torch.empty_like(t).copy_(t)),
}

STAY: dict[str, tuple[int, int, Function]] = {
    "across channels": pointwise(lambda t: F.local_response_norm(t, 3)),
    "mean of all": pointwise(lambda t: t - t.mean()),
    "chosen channels": (2, 4, lambda t: t[:, torch.tensor([0, 2, 4, 6])]),
    "a product with a constant": (0, 16, lambda t: torch.tensordot(t, torch.ones(16, 16), 1)),
    "products of activations": (0, 16, lambda t: torch.einsum("bij,bkj->bik", t, t) @ t),
    "random": pointwise(lambda t: t * (1 + 0 * torch.randn_like(t))),
    "picked and shuffled": pointwise(_shuffled_picks),
    "picked elsewhere": pointwise(_of_another_mask),
    "picked and summed": pointwise(lambda t: t + t[t > 0].sum()),
    "picked by count": pointwise(lambda t: t * torch.nonzero(t > 0).sum()),
    "rolled whole": pointwise(lambda t: t.roll(3)),
    "taken in a row": pointwise(lambda t: t.masked_scatter(t > 0, t * 2)),
    "distances": (0, 16, lambda t: torch.cdist(t, t) @ t),
}


def made(case: tuple[int, int, Function]) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    space, outer, between = case
    return Net(between, 16, outer, space).eval(), example(space)


@pytest.mark.parametrize("name", share(GO, 0, 3))
def test_what_goes_through_an_operator_is_exact(name: str) -> None:
    net, x = made(GO[name])
    structure = mask_random_units(net, x, share=0.5)
    own = [g for g in structure.groups if any(m.key == "first.weight" for m in g.members)]
    assert own, structure
    want = outputs(net, x)
    before = net.first.weight.shape[0]
    plan = torchprune.plan_shrink(net, x)
    torchprune.shrink(net, plan)
    assert net.first.weight.shape[0] < before, plan
    assert close(outputs(net, x), want, 1e-5)


@pytest.mark.parametrize("name", STAY)
def test_what_an_operator_reads_as_a_whole_stays_with_a_reason(name: str) -> None:
    net, x = made(STAY[name])
    structure = structure_of(net, x)
    stays = {(f.key, f.axis): f.why for f in structure.frozen}
    own = [g for g in structure.groups if any(m.key == "first.weight" for m in g.members)]
    unread = [g for g in own if not any(m.reads for m in g.members)]
    assert ("first.weight", 0) in stays or any(g.kind == "heads" for g in own) or unread
    if ("first.weight", 0) in stays:
        assert "aten." in stays["first.weight", 0] or "no other tensor" in stays["first.weight", 0]


def _branching_on_a_count(t: Tensor) -> Tensor:
    return t * 2 if len(t[t > 0]) > 4 else t  # the line


def test_code_that_asks_how_much_a_mask_picked_is_refused_with_its_line() -> None:
    line = inspect.getsourcelines(_branching_on_a_count)[1] + 1
    net, x = made(pointwise(_branching_on_a_count))
    with pytest.raises(ShrinkError, match=rf"at test_operators\.py:{line}: "):
        structure_of(net, x)


def test_operators_of_ones_own_freeze() -> None:
    @torch.library.custom_op("torchprune_tests::odd", mutates_args=())
    def odd(x: Tensor) -> Tensor:
        return x * x.mean(1, keepdim=True)

    @odd.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    net, x = made(pointwise(odd))
    stays: dict[Any, str] = {(f.key, f.axis): f.why for f in structure_of(net, x).frozen}
    assert "torchprune_tests.odd" in stays["first.weight", 0]


def test_pooled_neurons_are_no_heads() -> None:
    net, x = made((0, 16, lambda t: t.new_ones(2, 3, 5).softmax(-1) @ t))
    groups = structure_of(net, x).groups
    (group,) = [g for g in groups if any(m.key == "first.weight" for m in g.members)]
    assert (group.kind, group.count) == ("neurons", 16)


class Attention(nn.Module):
    def __init__(self, how: str, keys: int = 4) -> None:
        super().__init__()
        self.how, self.keys = how, keys
        self.q, self.k, self.v = nn.Linear(3, 32), nn.Linear(3, 8 * keys), nn.Linear(3, 8 * keys)
        self.o = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, -1, 8).transpose(1, 2)
        k, v = (y(x).view(b, t, -1, 8).transpose(1, 2) for y in (self.k, self.v))
        if self.how == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
            out = torch.einsum("bhqk,bhkd->bhqd", scores, v)
        elif self.how == "matmul":
            out = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.keys != 4)
        return self.o(out.transpose(1, 2).reshape(b, t, -1))


@pytest.mark.parametrize(
    ("how", "keys"),
    [("einsum", 4), ("matmul", 4), ("sdpa", 4), ("sdpa", 2), ("matmul", 1), ("sdpa", 1)],
)
def test_heads_are_what_products_keep_apart(how: str, keys: int) -> None:
    net = Attention(how, keys).eval()
    groups = structure_of(net, torch.randn(2, 5, 3)).groups
    (group,) = [g for g in groups if any(m.key == "o.weight" and m.axis == 1 for m in g.members)]
    assert (group.kind, group.count) == ("heads", 4 if keys == 1 else keys)
