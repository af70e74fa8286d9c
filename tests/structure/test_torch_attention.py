"""torch's own attention and encoders lose whole heads exactly, however they are called."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from structures import close, mask_random_units, outputs, unit_masks
from torch import Tensor, nn

import torchprune
from torchprune import HeadSpec, plan_shrink, shrink
from torchprune.errors import ShrinkError
from torchprune.graph.groups import structure_of
from torchprune.structure.fewer_heads import FewerHeads

WIDTH, HEADS, LENGTH = 12, 4, 5


class Attention(nn.MultiheadAttention):
    """A user's own, which torch's forward serves."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        out, weights = super().forward(*inputs, **options)
        return out * 2, weights


class Explicit(nn.MultiheadAttention):
    """A user's own, whose code insists on torch's."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return nn.MultiheadAttention.forward(self, *inputs, **options)  # insists


class Net(nn.Module):
    """Attention between linear layers; keys and values of other widths, or the same tensor."""

    def __init__(self, kind: type = nn.MultiheadAttention, call: Any = None, **options: Any):
        super().__init__()
        self.keys = options.get("kdim", WIDTH)
        self.call = {"need_weights": False, **(call or {})}
        self.alone = "kdim" not in options
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.attention = kind(WIDTH, HEADS, **options)
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.inner(x)
        other = x if self.alone else torch.cat([x, x], -1)[..., : self.keys].flip(-2)
        out, _ = self.attention(x, other, other, key_padding_mask=padding, **self.call)
        return self.last(out)


def shrunk(model: nn.Module, x: Any, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """The masked model, and the same without what is masked; its 4 heads can go one by one."""
    structure = mask_random_units(model, x, seed)
    assert {g.count for g in structure.groups if g.kind == "heads"} == {HEADS}
    small = copy.deepcopy(model)
    return model, shrink(small, plan_shrink(small, x))


def biased(model: nn.Module) -> nn.Module:
    """With biases that are not zero, as torch would have them."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return model.double().eval()


@pytest.mark.parametrize("wide", [None, 7, 16])
@pytest.mark.parametrize("what", ["features", "heads"])
def test_what_queries_read_goes_with_heads_or_without(what: str, wide: int | None) -> None:
    """Keys of a part of what queries read: then there are two groups of features."""
    torch.manual_seed(7)
    widths = {} if wide is None else {"kdim": wide, "vdim": wide}
    model = biased(Net(batch_first=True, add_bias_kv=True, add_zero_attn=True, **widths))
    x = torch.randn(2, LENGTH, WIDTH).double()
    structure = structure_of(model, x)
    gone = {
        at: torch.arange(group.count) % 3 == 1
        for at, group in enumerate(structure.groups)
        if (group.kind == "heads") == (what == "heads") and group.name != "attention.out_proj"
    }
    torchprune.apply_masks(model, unit_masks(model, gone, structure))
    want = outputs(model, x)
    shrink(model, plan_shrink(model, x))
    assert close(outputs(model, x), want, 1e-12)
    inner = model.inner.out_features
    assert (inner, model.attention.num_heads) == ((8, 4) if what == "features" else (12, 3))
    assert (model.attention.embed_dim, model.attention.head_dim) == (inner, 3)
    if wide:
        assert model.attention.kdim == model.attention.k_proj_weight.shape[1]


@settings(max_examples=4, deadline=None, phases=[Phase.generate])
@given(
    first=st.booleans(),
    bias=st.booleans(),
    added=st.booleans(),
    zero=st.booleans(),
    wide=st.sampled_from([None, 7, 16]),
    weights=st.booleans(),
    mask=st.sampled_from([None, "bool", "float"]),
    rows=st.sampled_from([None, 2]),
    seed=st.integers(0, 9),
)
def test_heads_go_however_attention_is_made_and_called(
    first: bool,
    bias: bool,
    added: bool,
    zero: bool,
    wide: int | None,
    weights: bool,
    mask: str | None,
    rows: int | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    widths = {} if wide is None else {"kdim": wide, "vdim": wide}
    call: dict[str, Any] = {"need_weights": weights}
    if mask is not None:
        seen = torch.ones(LENGTH, LENGTH).triu(1)
        call["attn_mask"] = seen.bool() if mask == "bool" else -seen.double()
    options = {"batch_first": first, "bias": bias, "add_bias_kv": added, "add_zero_attn": zero}
    model = biased(Net(call=call, **options, **widths))
    shape = [LENGTH, WIDTH] if rows is None else [rows, LENGTH, WIDTH]
    x = torch.randn(shape).double()
    x = x if first or rows is None else x.transpose(0, 1).contiguous()
    masked, small = shrunk(model, x, seed)
    for training in (False, True):
        want, got = outputs(masked.train(training), x), outputs(small.train(training), x)
        assert close(got, want, 1e-12)
    padding = torch.zeros([LENGTH] if rows is None else [rows, LENGTH])
    padding[..., -2:] = 1
    padding = padding.bool() if mask == "bool" else padding.double() * -9
    with torch.no_grad():
        torch.testing.assert_close(small(x, padding), masked(x, padding))


def test_spec_to_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = biased(Net(batch_first=True)), torch.randn(2, LENGTH, WIDTH).double()
    fresh = copy.deepcopy(model)
    torchprune.sparsify(model, HeadSpec(0.5), [x], progress=False)
    want = outputs(model, x)
    shrink(model, plan_shrink(model, x))
    assert type(model.attention) is FewerHeads
    assert model.attention.in_proj_weight.shape == (18, WIDTH)
    assert model.attention.out_proj.weight.shape == (WIDTH, 6)
    assert close(outputs(model, x), want, 1e-12)
    torchprune.save(model, tmp_path)
    assert close(outputs(torchprune.load_into(fresh, tmp_path), x), want, 1e-12)
    torchprune.sparsify(model, HeadSpec(0.5), [x], progress=False)  # once more
    want = outputs(model, x)
    shrink(model, plan_shrink(model, x))
    assert model.attention.num_heads == 1
    assert close(outputs(copy.deepcopy(model), x), want, 1e-12)


def test_shown_weights_keep_the_heads() -> None:
    class Shows(Net):
        def forward(self, x: Tensor, padding: Tensor | None = None) -> Any:
            return self.attention(x, x, x, need_weights=True)  # shows

    model, x = biased(Shows(batch_first=True)), torch.randn(2, LENGTH, WIDTH).double()
    structure = structure_of(model, x)
    assert not [g for g in structure.groups if g.kind == "heads"]
    why = {(f.key, f.axis): f.why for f in structure.frozen}["attention.in_proj_weight", 0]
    assert "mean" in why
    assert "test_torch_attention.py" in why


def test_a_class_of_the_user_s_calls_it_as_its_parent() -> None:
    torch.manual_seed(0)
    model, x = biased(Net(Attention, batch_first=True)), torch.randn(2, LENGTH, WIDTH).double()
    masked, small = shrunk(model, x)
    assert isinstance(small.attention, Attention)
    assert small.attention.num_heads < HEADS
    assert close(outputs(small, x), outputs(masked, x), 1e-12)


def test_one_that_insists_on_torch_s_is_refused_and_left_as_it_was() -> None:
    torch.manual_seed(0)
    model, x = biased(Net(Explicit, batch_first=True)), torch.randn(2, LENGTH, WIDTH).double()
    torchprune.sparsify(model, HeadSpec(0.5, refit=False), [x], progress=False)
    kind, want = type(model.attention), outputs(model, x)
    with pytest.raises(ShrinkError, match=r"attention at test_torch_attention.py:\d+.*ignore="):
        shrink(model, plan_shrink(model, x))
    assert type(model.attention) is kind
    assert close(outputs(model, x), want, 0.0)


class Biased(nn.Module):
    """A mask for each head, (N * heads, L, S), as torch wants it, made for all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        slopes, places = 0.5 ** torch.arange(1, HEADS + 1), torch.arange(length)
        mask = (slopes[:, None, None] * (places - places[:, None])).repeat(rows, 1, 1).to(x.dtype)
        return self.last(self.attention(x, x, x, attn_mask=mask, need_weights=False)[0])


@pytest.mark.parametrize("rows", [1, 2])
def test_masks_for_single_heads_go_on_coming_for_all(rows: int) -> None:
    torch.manual_seed(0)
    model, x = biased(Biased()), torch.randn(rows, LENGTH, WIDTH).double()
    masked, small = shrunk(model, x, 3)
    assert small.attention.num_heads < HEADS
    for other in (x, torch.randn(3, 7, WIDTH).double()):
        assert close(outputs(small, other), outputs(masked, other), 1e-12)


# -- encoders, whose fast path goes around the modules' own forward --------------------------------


class Encoder(nn.Module):
    """What users write: an embedding, torch's encoder, a head."""

    def __init__(self, first: bool = False, activation: str = "relu") -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 20, dropout=0.0, batch_first=True, norm_first=first, activation=activation
        )
        self.inner, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not first)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.last(self.layers(self.inner(x), src_key_padding_mask=padding))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's own path too
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("ignored", [(), ("layers.layers.0.self_attn*",)])
def test_encoders_agree_in_the_fast_path_in_training_and_padded(
    first: bool, ignored: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    model, x = biased(Encoder(first, "gelu")), torch.randn(3, LENGTH, WIDTH).double()
    spec = HeadSpec(0.5, refit=False, ignore=ignored)
    torchprune.sparsify(model, spec, [x], progress=False)
    small = copy.deepcopy(model)
    shrink(small, plan_shrink(small, x))
    counts = [layer.self_attn.num_heads for layer in small.layers.layers]
    assert counts == ([4, 2] if ignored else [2, 2])
    lengths = torch.tensor([5, 2, 4])
    padding = torch.arange(LENGTH) >= lengths[:, None]
    for training in (False, True):
        for given_padding in (None, padding):  # in eval mode sequences become nested tensors
            with torch.no_grad():
                want = model.train(training)(x, given_padding)
                got = small.train(training)(x, given_padding)
            torch.testing.assert_close(got, want)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(small.train()(x).square().sum(), x)
    (want,) = torch.autograd.grad(model.train()(x).square().sum(), x)
    torch.testing.assert_close(grad, want)


def test_decoders_lose_heads_of_both_attentions() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Transformer(WIDTH, HEADS, 1, 1, 20, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
            return self.net(x, x.flip(1), tgt_mask=mask, tgt_is_causal=True)

    torch.manual_seed(0)
    model, x = biased(Both()), torch.randn(2, LENGTH, WIDTH).double()
    masked, small = shrunk(model, x)
    layer = small.net.decoder.layers[0]
    assert isinstance(layer.self_attn, FewerHeads)
    assert isinstance(layer.multihead_attn, FewerHeads)
    assert close(outputs(small, x), outputs(masked, x), 1e-12)
