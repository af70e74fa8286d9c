"""Copies of the same channels, weighed one against the other and summed: channels go from all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from structures import close, mask_random_units, outputs
from torch import Tensor, nn

import torchprune
from torchprune.graph.groups import structure_of
from torchprune.graph.labels import Labels

USES = {
    "by_buffer": {"none"},
    "by_gate": {"gate"},
    "by_attention": {"share"},
    "by_one_gate": {"parts"},
    "by_kernels": {"parts", "share"},
}


class Split(nn.Module):
    """Convolutions whose channels lie in copies, which a weight of each brings together."""

    def __init__(self, copies: int, how: str) -> None:
        super().__init__()
        self.copies, self.how = copies, how
        self.last = nn.Conv2d(8, 2, 1)
        uses = USES.get(how, {"gain"})  # what no example reads would keep its sizes
        if how != "by_kernels":
            self.wide = nn.Conv2d(3, 8 * copies, 3, padding=1)
        if "gain" in uses:
            self.gain = nn.Parameter(torch.rand(copies))
        if "gate" in uses:
            self.gate = nn.Linear(3, copies)
        if "share" in uses:
            self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8 * copies, 1)
        if "parts" in uses:
            count = copies if how == "by_kernels" else 1
            self.parts = nn.ModuleList(nn.Conv2d(3, 8, 1) for _ in range(count))
        self.register_buffer("fixed", torch.rand(copies))

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        if self.how == "by_kernels":
            y = torch.stack([part(x) for part in self.parts], 1)
        else:
            y = self.wide(x).view(n, self.copies, -1, h, w)
        return self.last(getattr(self, self.how)(y, x))

    def by_parameter(self, y: Tensor, x: Tensor) -> Tensor:
        return (y * self.gain.view(1, -1, 1, 1, 1)).sum(1)

    def by_buffer(self, y: Tensor, x: Tensor) -> Tensor:
        return (self.fixed.view(1, -1, 1, 1, 1) * y).mean(1)

    def by_gate(self, y: Tensor, x: Tensor) -> Tensor:
        gate = self.gate(x.mean((2, 3))).softmax(-1)
        return (y * gate[:, :, None, None, None]).sum(1)

    def by_einsum(self, y: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("nrchw,r->nchw", y, self.gain)

    def by_loop(self, y: Tensor, x: Tensor) -> Tensor:
        halves = [part * gain for part, gain in zip(y.unbind(1), self.gain.unbind(), strict=True)]
        return torch.stack(halves).sum(0)

    def by_attention(self, y: Tensor, x: Tensor) -> Tensor:
        """ResNeSt: every channel of every copy has its own share."""
        share = self.up(self.down(y.sum(1).mean((2, 3), keepdim=True)).relu())
        share = share.view(len(x), 1, self.copies, -1).transpose(1, 2).softmax(1)
        return (y * share.reshape(len(x), self.copies, -1, 1, 1)).sum(1)

    def by_one_gate(self, y: Tensor, x: Tensor) -> Tensor:
        """One gate for the channels of all copies, before these are summed."""
        gate = self.parts[0](x).sigmoid()
        return (y * gate[:, None] * self.fixed.view(1, -1, 1, 1, 1)).sum(1)

    def by_kernels(self, y: Tensor, x: Tensor) -> Tensor:
        """Selective kernels: copies from layers of their own."""
        share = self.up(self.down(y.sum(1).mean((2, 3), keepdim=True)).relu())
        return (y * share.view(len(x), self.copies, -1, 1, 1).softmax(1)).sum(1)


WAYS = [name for name in vars(Split) if name.startswith("by_")]


@pytest.mark.parametrize("how", WAYS)
def test_channels_go_from_all_copies(how: str) -> None:
    torch.manual_seed(0)
    net = Split(3 if how == "by_gate" else 2, how).double().eval()
    x = torch.randn(2, 3, 6, 6).double()
    key = "parts.0.weight" if how == "by_kernels" else "wide.weight"
    structure = mask_random_units(net, x)
    (group,) = [g for g in structure.groups if any(m.key == key for m in g.members)]
    assert (group.count, group.kind) == (8, "channels")
    want = outputs(net, x)
    torchprune.shrink(net, torchprune.plan_shrink(net, x))
    assert net.last.in_channels < 8
    assert close(outputs(net, x), want, 1e-12)


class Heads(nn.Module):
    """Attention whose heads have a gain each, and whose queries share one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 48), nn.Linear(16, 8)
        self.gain, self.norm = nn.Parameter(torch.rand(4)), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, -1, 4).permute(2, 0, 3, 1, 4)
        y = (self.norm(q) @ k.mT).softmax(-1) @ v * self.gain.view(1, -1, 1, 1)
        return self.out(y.transpose(1, 2).reshape(b, t, -1))


def test_heads_with_a_gain_each_stay_heads() -> None:
    net, x = Heads().double().eval(), torch.randn(2, 5, 8).double()
    (group,) = [g for g in structure_of(net, x).groups if g.kind == "heads"]
    assert (group.count, len(group.members)) == (4, 4)
    assert any(m.key == "gain" for m in group.members)


@pytest.mark.parametrize("summed", [True, False])
def test_a_choice_is_regretted_where_copies_are_summed(summed: bool) -> None:
    """Without a sum over them copies stay what may go, as heads do."""

    def walk(turned: Callable[[], set[object]] | None = None) -> Labels:
        labels = Labels(turned() if turned else ())  # type: ignore[arg-type]
        labels.at("here")
        many, each = labels.new(6).reshape(2, 3), labels.new(2).reshape(2, 1)
        (left,) = labels.merged([many, each], "a test")
        if summed:
            labels.summed(left, [axis for axis in (0, 1) if left.shape[axis] == 2])
        labels.kept = left  # type: ignore[attr-defined]
        return labels

    first = walk()
    assert first.kept.shape == (2, 1)  # type: ignore[attr-defined]
    regretted = first.regretted(first.resolve())
    assert bool(regretted) == summed
    if summed:
        assert walk(lambda: set(regretted)).kept.shape == (1, 3)  # type: ignore[attr-defined]
