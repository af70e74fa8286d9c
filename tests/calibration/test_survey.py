"""What a batch does not read is looked for in others; what none reads is said to stay dense."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec, WandaSpec
from torchprune.calibration.batches import read_batches
from torchprune.calibration.survey import MOST_BATCHES, survey
from torchprune.masking.projection import project
from torchprune.methods.wanda import wanda_score
from torchprune.specs.patterns import Unstructured

WIDTH, EXPERTS = 16, 6


class Routed(nn.Module):
    """Experts under no known name, some of which do nothing, chosen by what the caller says."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.stack = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))
        self.turned = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.table = nn.Parameter(torch.randn(1, 8, WIDTH))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        x = self.before(x + self.table[:, : x.shape[1]])
        if expert < EXPERTS:
            x = F.linear(x, self.stack[expert]) @ self.turned
        return self.after(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Routed() for _ in range(2))

    def forward(self, x: Tensor, experts: tuple[int, int]) -> Tensor:
        for block, expert in zip(self.blocks, experts, strict=True):
            x = block(x, expert)
        return x


def data(*experts: tuple[int, int]) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(2, 8, WIDTH, generator=generator), "experts": e} for e in experts]


pytestmark = pytest.mark.filterwarnings("ignore:blocks.*no tokens reached groups")

NOBODY = EXPERTS
"""The choice of no expert."""


@pytest.mark.parametrize("sequential", ["layer", "block"])
@pytest.mark.parametrize("late", [1, 3])
def test_what_a_later_batch_reads_first_is_pruned_on_it(late: int, sequential: str) -> None:
    model, batches = Net(), data(*[(0, NOBODY)] * late, (1, 2))
    dense = model.blocks[1].stack.detach().clone()
    spec = WandaSpec(targets=["*.stack", "*.turned"], sequential=sequential)
    torchprune.sparsify(model, spec, batches, progress=False)
    masks = torchprune.masks(model)
    assert set(masks) == {f"blocks.{b}.{name}" for b in (0, 1) for name in ("stack", "turned")}
    read: list[Tensor] = []
    model.blocks[1].before.register_forward_hook(lambda m, args, out: read.append(out))
    with torch.no_grad():
        model(**batches[-1])
    score = wanda_score(dense[2], read[0].reshape(-1, WIDTH).square().sum(0))
    assert torch.equal(masks["blocks.1.stack"][2], project(score, Unstructured(), 0.5, "row"))


@pytest.mark.parametrize("spec", [WandaSpec(), MagnitudeSpec()], ids=["wanda", "magnitude"])
def test_what_no_batch_reads_is_said_to_stay_dense(spec: WandaSpec | MagnitudeSpec) -> None:
    model = Net()
    everything = {
        name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() > 1
    }
    with pytest.warns(UserWarning, match="covered .*blocks.1.stack"):
        torchprune.sparsify(model, spec, data((0, NOBODY), (3, NOBODY)), progress=False)
    report = torchprune.report(model)
    unread = {"blocks.0.table", "blocks.1.table", "blocks.1.stack", "blocks.1.turned"}
    assert set(report.skipped) == unread
    assert {layer.name for layer in report.layers} == everything - unread
    assert "how it multiplies" in report.skipped["blocks.1.stack"]


@pytest.mark.filterwarnings("ignore:covered")
def test_what_is_ignored_is_said_to_be() -> None:
    model = Net()
    spec = WandaSpec(ignore="*.stack")
    torchprune.sparsify(model, spec, data((0, 1)), progress=False)
    skipped = torchprune.report(model).skipped
    assert skipped["blocks.0.stack"] == "ignored"
    assert "how it multiplies" in skipped["blocks.0.table"]


def test_batches_are_watched_while_a_tensor_is_untouched() -> None:
    """Tables that are added need no more looks, and experts of every batch are enough."""
    seen: list[int] = []
    for experts in [[(0, 1)] * 4, [(0, NOBODY)] * 3 + [(1, 2)] * 3, [(0, NOBODY)] * 12]:
        model, count = Net(), [0]
        model.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        survey(model, read_batches(data(*experts), model, 20).batches)
        seen.append(count[0])
    assert seen == [1, 4, MOST_BATCHES]


def test_a_survey_leaves_caches_as_they_were_given() -> None:
    """Mixtral is watched before it is pruned; what that run appends is nobody's."""
    model, ids = FAMILIES["mixtral"].make(), torch.randint(1, 60, (2, 6))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    batch = {"input_ids": ids[:, :1], "past_key_values": cache, "use_cache": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few tokens reach few experts
        torchprune.sparsify(model, WandaSpec(), [batch], progress=False)
    assert cache.get_seq_length() == 6
