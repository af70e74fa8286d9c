"""Attention that counts its heads in code: by attributes it follows, else its line is named."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from structures import close, mask_random_units, outputs
from torch import Tensor, nn

import torchprune
from torchprune import HeadSpec, NeuronSpec, plan_shrink, shrink
from torchprune.errors import ShrinkError


class Attention(nn.Module):
    """The common part: 4 heads of 4 on a stream of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def attend(self, heads: int, width: int, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, t, width))


class ByWidth(Attention):
    """The width of a head is computed from two attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.embed_dim = 4, 16

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.num_heads, self.embed_dim, x)


class Checked(Attention):
    """One attribute is the width of the input, and stays; the other that of the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head, self.d_model, self.inner_dim = 4, 16, 16

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_model:
            raise ValueError(f"expected {self.d_model} features")
        return self.attend(self.n_head, self.inner_dim, x)


class ByHead(Attention):
    """A width that is the input's as well, under a name that says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.embed_dim, self.size = 4, 16, 16

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(*x.shape[:2], self.embed_dim)
        return self.attend(self.num_heads, self.size, x)


class Windows(Attention):
    """As in a Swin: windows of an image, a bias for each head, widths of heads from the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.window = 4, 2
        self.table = nn.Parameter(torch.randn(9, 4))
        self.register_buffer("places", torch.randint(0, 9, (16,)))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        s = self.window
        x = x.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        qkv = self.qkv(x).reshape(len(x), s * s, 3, self.num_heads, c // self.num_heads)  # heads
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias = self.table[self.places].view(s * s, s * s, -1).permute(2, 0, 1)
        y = (q @ k.mT + bias).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(len(x), s * s, c))
        y = y.view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5)
        return y.reshape(b, h, w, c)


class Block(nn.Module):
    """Attention and an MLP, with norms and residuals."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), attention
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


def line_of(kind: type, what: str) -> str:
    lines, first = inspect.getsourcelines(kind)
    at = next(i for i, line in enumerate(lines) if line.rstrip().endswith(what))
    return f"test_attention_sizes.py:{first + at}"


@pytest.mark.parametrize("kind", [ByWidth, Checked, ByHead])
def test_attributes_follow_the_heads(kind: type[Attention]) -> None:
    torch.manual_seed(0)
    model, x = Block(kind()).double().eval(), torch.randn(2, 5, 16).double()
    mask_random_units(model, x, alike=True)
    want = outputs(model, x)
    shrink(model, plan_shrink(model, x))
    assert model.attention.qkv.out_features == 24
    assert model.mlp[1].out_features == 16
    assert close(outputs(model, x), want, 1e-12)
    longer = torch.randn(1, 9, 16).double()  # what it computes elsewhere is sound too
    assert outputs(model, longer)[0].shape == (1, 9, 16)


def test_heads_as_wide_as_the_input_are_refused_with_the_line_and_can_be_left() -> None:
    torch.manual_seed(0)
    model, x = Block(Windows()).double().eval(), torch.randn(2, 4, 4, 16).double()
    torchprune.sparsify(model, NeuronSpec(0.5, refit=False), [x], progress=False)
    torchprune.sparsify(model, HeadSpec(0.5, refit=False), [x], progress=False)
    want = outputs(model, x)
    line = line_of(Windows, "# heads")
    with pytest.raises(ShrinkError, match=rf"in attention at {line}.*ignore=\('attention.qkv',\)"):
        shrink(model, plan_shrink(model, x))
    plan = plan_shrink(model, x, on_refusal="ignore")
    assert any(line in note and "4 -> 2 heads" in note for note in plan.notes)
    shrink(model, plan)
    assert model.mlp[1].out_features == 16
    assert model.attention.qkv.out_features == 48
    assert close(outputs(model, x), want, 1e-12)


def test_heads_and_neurons_of_torch_s_own_encoder_go_and_its_fast_path_agrees() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    x = torch.randn(2, 5, 16).double()
    structure = mask_random_units(model, x, alike=True)
    assert {g.kind for g in structure.groups} == {"heads", "neurons"}
    want = outputs(model, x)
    shrink(model, plan_shrink(model, x))
    assert [one.linear1.out_features for one in model.layers] == [16, 16]
    assert close(outputs(model, x), want, 1e-12)
