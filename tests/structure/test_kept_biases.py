"""What a module keeps of its tensors between calls is not older than they are after shrinking."""

from __future__ import annotations

import pytest
import torch
from structures import close, outputs
from torch import Tensor, nn

import torchprune
from torchprune import HeadSpec, plan_shrink, shrink
from torchprune.errors import ShrinkError


class Keeps(nn.Module):
    """Biases of 4 heads, gathered once in eval mode; a change of mode may let go of them."""

    def __init__(self, lets_go: bool) -> None:
        super().__init__()
        self.lets_go, self.kept = lets_go, dict[str, Tensor]()
        self.num_heads, self.size = 4, 3
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.biases = nn.Parameter(torch.randn(4, 9))
        self.register_buffer("places", torch.randint(0, 9, (5, 5)))

    def train(self, mode: bool = True) -> Keeps:
        if self.lets_go:
            self.kept = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if "here" not in self.kept or self.training:
            self.kept["here"] = self.biases[:, self.places]
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.num_heads, self.size).permute(2, 0, 3, 1, 4)
        y = (q @ k.mT + self.kept["here"]).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


def pruned(lets_go: bool) -> tuple[nn.Module, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(Keeps(lets_go)).double().eval()
    x = torch.randn(2, 5, 12).double()
    torchprune.sparsify(model, HeadSpec(0.5, refit=False), [x], progress=False)
    return model, x, outputs(model, x)  # which keeps what it gathered


def test_what_a_change_of_mode_lets_go_of_is_made_anew() -> None:
    model, x, want = pruned(lets_go=True)
    shrink(model, plan_shrink(model, x))
    assert model[0].qkv.out_features == 18
    assert close(outputs(model, x), want, 1e-12)


def test_what_is_kept_for_good_is_in_the_way() -> None:
    model, x, want = pruned(lets_go=False)
    plan = plan_shrink(model, x)
    assert not plan
    assert any("test_kept_biases.py" in line for line in plan.in_the_way)
    model[0].kept.clear()
    plan = plan_shrink(model, x)
    outputs(model, x)
    with pytest.raises(ShrinkError, match=r"test_kept_biases\.py"):
        shrink(model, plan)
    assert close(outputs(model, x), want, 0.0)
