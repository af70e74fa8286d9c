"""Every weight that multiplies has statistics, however it is read: against inputs by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from saved import prune
from torch import Tensor, nn

import torchprune
from torchprune import SparseGPTSpec, WandaSpec
from torchprune.masking.projection import project
from torchprune.methods.wanda import wanda_score
from torchprune.specs.patterns import Unstructured

D = 8


def data(count: int = 3) -> list[Tensor]:
    return list(torch.randn(count, 2, 5, D, generator=torch.Generator().manual_seed(1)))


class Net(nn.Module):
    """A way to multiply x by weights, and the inputs that the first weight multiplies."""

    def __init__(
        self,
        shape: tuple[int, ...],
        multiply: Callable[[Tensor, Tensor], Tensor],
        matrices: Callable[[Tensor], list[Tensor]],
        inputs: Callable[[Tensor], list[Tensor]],
    ) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        self.multiply, self.matrices, self.inputs = multiply, matrices, inputs

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.w)


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def once(x: Tensor) -> list[Tensor]:
    return [flat(x)]


def split_qkv(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = w.split([8, 4, 4])
    y = x.flip(1)
    return F.linear(x, q).sum() + F.linear(y, k).sum() + (y * 2 @ v.t()).sum()


def one_by_one(x: Tensor, w: Tensor) -> Tensor:
    return sum((F.linear(x * (i + 1), w.view(3, 4, D)[i]).sum() for i in range(3)), x.new_zeros(()))


def patches(x: Tensor) -> list[Tensor]:
    rows = F.unfold(x.unsqueeze(1), 3, padding=1)
    return [rows.transpose(1, 2).reshape(-1, 9)]


WAYS = {
    "linear": ((6, D), F.linear, lambda w: [w], once),
    "linear in another dtype": (
        (6, D),
        lambda x, w: F.linear(x.double(), w.double()),
        lambda w: [w],
        once,
    ),
    "matmul": ((D, 6), lambda x, w: x @ w, lambda w: [w.t()], once),
    "matmul of the transpose": ((6, D), lambda x, w: torch.matmul(x, w.t()), lambda w: [w], once),
    "a copy of the transpose": (
        (6, D),
        lambda x, w: torch.matmul(x, w.t().contiguous()),
        lambda w: [w],
        once,
    ),
    "weight first": ((6, D), lambda x, w: w @ x.mT, lambda w: [w], once),
    "addmm": ((D, 6), lambda x, w: torch.addmm(x.new_ones(6), flat(x), w), lambda w: [w.t()], once),
    "einsum": (
        (2, 3, D),
        lambda x, w: torch.einsum("bnd,hed->bnhe", x, w),
        lambda w: [w.reshape(6, D)],
        once,
    ),
    "einsum of a stack": (
        (2, D, 3),
        lambda x, w: torch.einsum("bnd,bde->bne", x, w),
        lambda w: [w[0].t(), w[1].t()],
        lambda x: [x[0], x[1]],
    ),
    "einsum with dots": (
        (D, 6),
        lambda x, w: torch.einsum("...d,de->...e", x, w),
        lambda w: [w.t()],
        once,
    ),
    "tensordot": ((6, D), lambda x, w: torch.tensordot(x, w, ([2], [1])), lambda w: [w], once),
    "bmm": (
        (2, D, 3),
        torch.bmm,
        lambda w: [w[0].t(), w[1].t()],
        lambda x: [x[0], x[1]],
    ),
    "broadcast": (
        (3, 1, D, 4),
        lambda x, w: x @ w,
        lambda w: [w[i, 0].t() for i in range(3)],
        lambda x: [flat(x)] * 3,
    ),
    "unequal chunks": (
        (16, D),
        split_qkv,
        lambda w: [*w.split(4)],
        lambda x: [flat(x), flat(x), flat(x.flip(1)), flat(x.flip(1) * 2)],
    ),
    "one after the other": (
        (12, D),
        one_by_one,
        lambda w: [*w.split(4)],
        lambda x: [flat(x), flat(x * 2), flat(x * 3)],
    ),
    "columns": (
        (4, D + 4),
        lambda x, w: F.linear(x, w[:, :D]) + F.linear(x[..., :4] * 3, w[:, D:]),
        lambda w: [*w.split(4, 1)],
        lambda x: [flat(x)[:, :4], flat(x)[:, 4:], flat(x)[:, :4] * 3],
    ),
    "convolution": (
        (5, 1, 3, 3),
        lambda x, w: F.conv2d(x.unsqueeze(1), w, padding="same"),
        lambda w: [w.flatten(1)],
        patches,
    ),
    "twice": (
        (D, D),
        lambda x, w: F.linear(torch.tanh(x), w) + F.linear(x, w),
        lambda w: [w],
        lambda x: [torch.cat([flat(torch.tanh(x)), flat(x)])],
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sequential", ["layer", "none"])
def test_wanda_of_a_raw_parameter_is_that_of_its_inputs(way: str, sequential: str) -> None:
    net, spec = Net(*WAYS[way]), WandaSpec(sequential=sequential)
    weight = net.w.detach().clone()
    prune(net, spec, data())
    assert torchprune.report(net).layers[0].error is not None
    groups = [torch.cat(rows) for rows in zip(*(net.inputs(x) for x in data()), strict=True)]
    kept = net.matrices(torchprune.masks(net)["w"].reshape(weight.shape))
    for matrix, rows, keep in zip(net.matrices(weight), groups, kept, strict=True):
        score = wanda_score(matrix, rows.square().sum(0))
        assert torch.equal(keep, project(score, Unstructured(), 0.5, "row"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sequential", ["layer", "none"])
def test_solvers_prune_what_multiplies(way: str, sequential: str) -> None:
    net = Net(*WAYS[way])
    prune(net, SparseGPTSpec(sequential=sequential), data())
    (layer,) = torchprune.report(net).layers
    assert layer.error is not None
    other = Net(*WAYS[way])
    prune(other, WandaSpec(scope="layer"), data())
    assert layer.error <= torchprune.report(other).layers[0].error
    net(data()[0])
    torchprune.fold(net)
    assert isinstance(net.w, nn.Parameter)


# -- modules of torch's own ------------------------------------------------------------------------


class Past(nn.Module):
    """Weights of linear layers that are read past their modules' forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, 6), nn.Linear(6, D), nn.Linear(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(F.linear(x, self.a.weight, self.a.bias))
        z = self.b.weight @ y.mT
        return self.c(z.mT)


def test_weights_read_past_their_modules_forward_have_statistics() -> None:
    model = Past()
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    prune(model, WandaSpec(), data())
    report = torchprune.report(model)
    assert [layer.name for layer in report.layers] == ["a", "b", "c"]
    assert all(layer.error is not None for layer in report.layers)
    masks = torchprune.masks(model)
    w = {k: v * masks.get(k, torch.ones(())) for k, v in dense.items()}
    rows = torch.cat([flat(x) for x in data()])
    inputs = {"a.weight": rows}
    inputs["b.weight"] = torch.tanh(F.linear(rows, w["a.weight"], w["a.bias"]))
    inputs["c.weight"] = F.linear(inputs["b.weight"], w["b.weight"])
    for key, x in inputs.items():
        score = wanda_score(dense[key], x.square().sum(0))
        assert torch.equal(masks[key], project(score, Unstructured(), 0.5, "row")), key


def test_attention_by_torch_is_pruned_as_linear_layers_are() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 2, 12, batch_first=True)
    dense = layer.self_attn.in_proj_weight.detach().clone()
    prune(layer, WandaSpec(), data())
    report = torchprune.report(layer)
    names = {"self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"}
    assert {y.name for y in report.layers} == names
    assert all(y.error is not None and not y.note for y in report.layers)
    rows = torch.cat([flat(x) for x in data()])
    keep = project(wanda_score(dense, rows.square().sum(0)), Unstructured(), 0.5, "row")
    assert torch.equal(torchprune.masks(layer)["self_attn.in_proj_weight"], keep)
    layer.eval()
    x = data()[0]
    with torch.no_grad():
        masked = layer(x)
        torchprune.fold(layer)
        torch.testing.assert_close(layer(x), masked)


def test_attention_to_something_else_has_its_own_statistics_for_queries_and_keys() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(D, 2, batch_first=True)
    dense = attention.in_proj_weight.detach().clone()
    batches = [(x, y * 3, y * 3) for x, y in zip(data(), data(6)[3:], strict=True)]
    batches = [(x, y, y) for x, y, _ in batches]
    prune(attention, WandaSpec(), batches)
    keep = torchprune.masks(attention)["in_proj_weight"]
    queries = torch.cat([flat(x) for x, *_ in batches])
    keys = torch.cat([flat(y) for _, y, _ in batches])
    for part, rows, kept in zip(dense.split(D), (queries, keys, keys), keep.split(D), strict=True):
        score = wanda_score(part, rows.square().sum(0))
        assert torch.equal(kept, project(score, Unstructured(), 0.5, "row"))


ASKED = {
    "bilinear": (nn.Bilinear(D, D, 3), lambda m, x: m(x, x * 2)),
    "transposed convolution": (nn.ConvTranspose1d(2, 4, 3), lambda m, x: m(x[:, :2])),
    "transposed convolution in groups": (
        nn.ConvTranspose1d(2, 4, 3, groups=2),
        lambda m, x: m(x[:, :2]),
    ),
}


class Asked(nn.Module):
    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.other, self.call = nn.Linear(D, D), module, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.other, self.first(x))


@pytest.mark.filterwarnings("ignore:covered .*other.weight")  # told, as nobody left it out
@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("spec", [WandaSpec(targets="other"), SparseGPTSpec(targets="other")])
def test_what_is_pruned_only_where_it_is_asked_for(kind: str, spec: Any) -> None:
    module, call = ASKED[kind]
    model = Asked(copy.deepcopy(module), call)
    with pytest.warns(UserWarning, match="only where it is named"):
        prune(model, WandaSpec(), data())
    assert list(torchprune.masks(model)) == ["first.weight"]
    model = Asked(copy.deepcopy(module), call)
    prune(model, spec, data())
    (layer,) = torchprune.report(model).layers
    assert layer.name == "other"
    assert layer.error is not None
    assert layer.error < 1


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("spec", [WandaSpec(targets="bags"), SparseGPTSpec(targets="bags")])
def test_sums_of_a_tables_rows_count_how_often_each_is_used(mode: str, spec: Any) -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bags = nn.EmbeddingBag(12, 6, mode=mode, padding_idx=3)
            self.last = nn.Linear(6, 6)

        def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
            return self.last(self.bags(ids, offsets))

    sizes = [1, 11] * 10  # where a mean counts, bags are of unlike sizes, and of unlike ids
    offsets = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    ids = []
    for seed in (0, 1):
        drawn = torch.Generator().manual_seed(seed)
        bags = [torch.randint(0, 6, (n,), generator=drawn) + (0 if n == 1 else 6) for n in sizes]
        ids.append((torch.cat(bags), offsets))
    model = Bags()
    dense = model.bags.weight.detach().clone()
    prune(model, spec, ids)
    (layer,) = torchprune.report(model).layers
    assert layer.error is not None
    if isinstance(spec, WandaSpec):
        rows = [row for one, _ in ids for row in one.split(sizes)]
        hot = torch.stack([torch.bincount(row, minlength=12).float() for row in rows])
        hot[:, 3] = 0
        if mode == "mean":
            hot /= hot.sum(1, keepdim=True).clamp_min(1)
        keep = project(wanda_score(dense.t(), hot.square().sum(0)), Unstructured(), 0.5, "row")
        assert torch.equal(torchprune.masks(model)["bags.weight"], keep.t())


def test_a_weight_written_through_a_view_of_its_own_is_pruned_where_it_is_read() -> None:
    """Views made before the weight was pruned are made anew: no dense product goes on."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qk, self.last = nn.Parameter(torch.randn(12, D)), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.qk.chunk(2)
            return self.last(F.linear(x, q) * F.linear(x.flip(1), k))

    model = Views()
    dense = model.last.weight.detach().clone()
    prune(model, WandaSpec(), data())
    with torch.no_grad():
        q, k = model.qk.chunk(2)
        rows = torch.cat([flat(F.linear(x, q) * F.linear(x.flip(1), k)) for x in data()])
    keep = project(wanda_score(dense, rows.square().sum(0)), Unstructured(), 0.5, "row")
    assert torch.equal(torchprune.masks(model)["last.weight"], keep)


def test_a_copy_made_before_its_weight_was_pruned_is_made_anew() -> None:
    class Copied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.raw, self.last = nn.Parameter(torch.randn(48, D)), nn.Linear(48, 24)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.linear(x.double(), self.raw.double()).float())

    model = Copied()
    dense = model.last.weight.detach().clone()
    prune(model, WandaSpec(0.75), data())
    rows = torch.cat([flat(F.linear(x, model.raw.detach())) for x in data()])
    keep = project(wanda_score(dense, rows.square().sum(0)), Unstructured(), 0.75, "row")
    assert torch.equal(torchprune.masks(model)["last.weight"], keep)
