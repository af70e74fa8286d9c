"""Programs whose weights belong to no Linear: masks are those of the module itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from programs import exported, masks_of, outputs
from saved import QUIET
from sweeps import sample
from torch import Tensor, nn

import torchprune
from torchprune import SparseGPTSpec, WandaSpec, passes
from torchprune.specs.spec import Spec

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.export


class Fused(nn.Module):
    """Queries, keys and values in one weight, cut by rows, of which values read something else."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 32, bias=False), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv.weight.split([16, 8, 8])
        scores = F.linear(x, q).unflatten(-1, (2, 8)) @ F.linear(x, k)[..., None, :, :].mT
        return self.out(scores.softmax(-1).mean(-2) @ F.linear(x * torch.arange(8.0), v))


class Experts(nn.Module):
    """A stack read with bmm, one by index, one by an einsum, and one stored turned."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 8, 12) / 3)
        self.down = nn.Parameter(torch.randn(4, 6, 12) / 3)
        self.mix = nn.Parameter(torch.randn(6, 10) / 3)

    def forward(self, x: Tensor) -> Tensor:
        stack = x.reshape(1, -1, 8) * torch.arange(1.0, 5.0)[:, None, None]
        hidden = torch.bmm(stack, self.up).relu()
        parts = [hidden[i] @ self.down[i].T for i in range(2)]
        parts += list(torch.einsum("eti,eoi->eto", hidden[2:], self.down[2:]))
        return torch.stack(parts) @ self.mix


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module] = nn.LSTM, **options: Any) -> None:
        super().__init__()
        self.net = kind(8, 6, 2, batch_first=True, **options)
        self.head = nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x)[0])


class Crossing(nn.Module):
    """Attention to another sequence: two products with one packed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        memory = x.roll(1, 1) * torch.arange(8.0)
        return self.last(self.attention(x, memory, memory, need_weights=False)[0])


NETS: dict[str, Callable[[], nn.Module]] = {
    "fused": Fused,
    "experts": Experts,
    "crossing": Crossing,
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2
    ),
    "lstm": Recurrent,
    "gru": lambda: Recurrent(nn.GRU, bidirectional=True),
    "convolutions": lambda: nn.Sequential(nn.Conv1d(6, 8, 3, groups=2), nn.Conv1d(8, 4, 2)),
}


def made(name: str) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model, data = NETS[name]().eval(), list(torch.randn(3, 2, 6, 8))
    with torch.no_grad():
        model(data[0])
    return model, data


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    "spec", [WandaSpec(), SparseGPTSpec(sequential="layer")], ids=["wanda", "gpt"]
)
def test_masks_are_those_of_the_module(name: str, spec: Spec) -> None:
    model, data = made(name)
    program = exported(copy.deepcopy(model), data[0])
    torchprune.sparsify(model, spec, data, **QUIET)
    expected = torchprune.masks(model)
    found = torchprune.sparsify(program, spec, data, **QUIET)
    masks = masks_of(found)
    assert (
        masks.keys() == expected.keys() == {n for n, p in program.named_parameters() if p.dim() > 1}
    )
    for key, mask in expected.items():
        assert torch.equal(masks[key], mask), key
    folded = passes.fold_masks(found)
    assert set(folded.modified) == set(masks)
    torchprune.fold(model)
    for key, mask in masks.items():
        assert torch.equal(folded.program.state_dict[key] != 0, mask), key
        torch.testing.assert_close(folded.program.state_dict[key], model.get_parameter(key))
    (before,), (after,) = outputs(found, data[0]), outputs(folded.program, data[0])
    # torch multiplies by parameters another way than by results of `where`.
    torch.testing.assert_close(before, after)
    with torch.no_grad():
        torch.testing.assert_close(after, model(data[0]))


def test_a_file_and_new_data_after_it(tmp_path: Path) -> None:
    model, data = made("lstm")
    program = torchprune.sparsify(exported(model, data[0]), WandaSpec(), data, **QUIET)
    torch.export.save(program, tmp_path / "it.pt2")
    again = torch.export.load(tmp_path / "it.pt2")
    assert masks_of(again).keys() == masks_of(program).keys()
    x = torch.randn(5, 6, 8)
    assert torch.equal(*outputs(again, x), *outputs(program, x))


def test_loaded_programs_are_pruned_alike(tmp_path: Path) -> None:
    model, data = made("fused")
    program = exported(model, data[0])
    torch.export.save(program, tmp_path / "it.pt2")
    found = [
        masks_of(torchprune.sparsify(p, WandaSpec(), data, **QUIET))
        for p in (program, torch.export.load(tmp_path / "it.pt2"))
    ]
    for key, mask in found[0].items():
        assert torch.equal(found[1][key], mask), key


def test_what_is_pruned_only_by_name_is_so_in_a_program() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(6, 4, 3, stride=2), nn.Conv1d(4, 4, 2)).eval()
    data = list(torch.randn(3, 2, 6, 8))
    program = exported(copy.deepcopy(model), data[0])
    assert masks_of(torchprune.sparsify(program, WandaSpec(), data, **QUIET)).keys() == {"1.weight"}
    spec = WandaSpec(targets=["0", "1"])
    found = masks_of(torchprune.sparsify(program, spec, data, **QUIET))
    torchprune.sparsify(model, spec, data, **QUIET)
    expected = torchprune.masks(model)
    assert found.keys() == expected.keys() == {"0.weight", "1.weight"}
    for key, mask in expected.items():
        assert torch.equal(found[key], mask), key


def test_parts_that_nothing_reads_are_pruned_by_magnitude_and_said_so() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w[:4])

    data = list(torch.randn(3, 2, 6, 8))
    model = Half()
    with pytest.warns(UserWarning, match="no tokens reached groups 1: pruned by magnitude"):
        found = torchprune.sparsify(exported(model, data[0]), WandaSpec(), data, **QUIET)
    mask, size = masks_of(found)["w"], model.w.detach().abs()
    assert (mask.sum(1) == 4).all()
    assert (
        size[4:].masked_fill(~mask[4:], 9).amin(1) >= size[4:].masked_fill(mask[4:], 0).amax(1)
    ).all()


def test_experts_that_no_product_reads_are_told_of_and_their_router_stays_dense() -> None:
    """transformers' experts are gathered by index before they are multiplied."""
    model, data = FAMILIES["mixtral"].make(), FAMILIES["mixtral"].data()
    program = exported(model, data[0])
    with pytest.warns(UserWarning, match="stay dense"):
        found = masks_of(torchprune.sparsify(program, WandaSpec(), data, **QUIET))
    assert any("q_proj" in name for name in found)
    assert not any("gate.weight" in name or "experts" in name for name in found)
    spec = WandaSpec(targets="model.layers.0.mlp.experts.down_proj")
    with pytest.warns(UserWarning, match="no calibration batch reached it"):
        found = masks_of(torchprune.sparsify(program, spec, data, **QUIET))
    assert list(found) == ["model.layers.0.mlp.experts.down_proj"]


@pytest.mark.parametrize("name", sample(NETS, "fused", "crossing"))
def test_decomposed_programs_are_pruned_alike(name: str) -> None:
    model, data = made(name)
    program = exported(model, data[0]).run_decompositions()
    found = masks_of(torchprune.sparsify(program, WandaSpec(), data, **QUIET))
    torchprune.sparsify(model, WandaSpec(), data, **QUIET)
    expected = torchprune.masks(model)
    assert found.keys() == expected.keys()
    for key, mask in expected.items():
        if "hh" not in key and not ("l1" in key or "head" in key):  # unrolled: a product a step
            assert torch.equal(found[key], mask), key
