"""What a model's own code refuses: named with module and line, gone around, or left as it is."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from structures import close, mask_random_units, outputs
from torch import Tensor, nn

import torchprune
from torchprune import NeuronSpec, plan_shrink, shrink
from torchprune.errors import ShrinkError
from torchprune.structure import shrink as shrinking


class Stubborn(nn.Module):
    """Heads by a number that no attribute holds."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(2, 5, 3, 4, 4).permute(2, 0, 3, 1, 4)  # asks for heads
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(2, 5, -1))


class Counting(nn.Module):
    """Its outputs depend on how many neurons there are, and nothing fails."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 12), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        return self.down(hidden) * hidden.shape[-1]  # asks for neurons


class Free(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def line_of(kind: type, what: str) -> str:
    lines, first = inspect.getsourcelines(kind)
    at = next(i for i, line in enumerate(lines) if line.rstrip().endswith(what))
    return f"test_refusals.py:{first + at}"


HEADS, NEURONS = line_of(Stubborn, "# asks for heads"), line_of(Counting, "# asks for neurons")


class Residual(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + part(x)
        return x


def masked(*parts: nn.Module) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Residual(*parts).double().eval(), torch.randn(2, 5, 16).double()
    mask_random_units(model, x, alike=True)
    return model, x


def test_an_error_names_module_and_line_and_the_way_around() -> None:
    model, x = masked(Free(), Stubborn(), Free())
    want, before = outputs(model, x), model.state_dict()
    with pytest.raises(ShrinkError) as caught:
        shrink(model, plan_shrink(model, x))
    message = str(caught.value)
    assert "fails with RuntimeError: shape '[2, 5, 3, 4, 4]' is invalid" in message
    assert f" in parts.1 at {HEADS}. " in message
    assert f"parts.1 (4 -> 2 heads), since the code of parts.1 at {HEADS} works with 4, " in message
    assert "ignore=('parts.1.qkv',)" in message
    assert 'on_refusal="ignore"' in message
    assert close(outputs(model, x), want, 0)
    assert model.state_dict().keys() == before.keys()


def test_what_the_error_advises_goes() -> None:
    torch.manual_seed(0)
    model, x = Residual(Free(), Counting()).double().eval(), torch.randn(2, 5, 16).double()
    spec = NeuronSpec(0.5, score="l2", refit=False, round_to=1)
    torchprune.sparsify(model, spec, [x], progress=False)
    with pytest.raises(ShrinkError) as caught:
        shrink(model, plan_shrink(model, x))
    since = f"since the code of parts.1 at {NEURONS} works with 12, which would become 6"
    assert f"parts.1 (12 -> 6 neurons), {since}" in str(caught.value)
    advice = re.search(r"ignore=\('([^']+)',\)", str(caught.value))
    assert advice is not None
    torchprune.densify(model)
    spec = NeuronSpec(0.5, score="l2", refit=False, round_to=1, ignore=(advice[1],))
    torchprune.sparsify(model, spec, [x], progress=False)
    want = outputs(model, x)
    shrink(model, plan_shrink(model, x))
    assert model.parts[0].up.out_features == 12
    assert close(outputs(model, x), want, 1e-12)


def test_what_is_refused_can_be_left_and_the_rest_goes() -> None:
    model, x = masked(Counting(), Free(), Stubborn(), Free(), Stubborn())
    want = outputs(model, x)
    plan = plan_shrink(model, x, on_refusal="ignore")
    assert close(outputs(model, x), want, 0)
    assert [r.group.name for r in plan.removals] == ["parts.1", "parts.3"]
    left = [note for note in plan.notes if note.startswith("left as it is: ")]
    assert [note.split()[4] for note in left] == ["parts.0", "parts.2", "parts.4"]
    assert NEURONS in left[0]
    assert HEADS in left[1]
    assert all(note in str(plan) for note in left)
    assert plan.parameters[1] < plan.parameters[0]
    shrink(model, plan)
    assert plan.parameters[1] == sum(p.numel() for p in model.parameters())
    assert model.parts[1].up.out_features == 12
    assert model.parts[2].qkv.out_features == 48
    assert close(outputs(model, x), want, 1e-12)


def test_of_many_alike_not_each_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = masked(*(Stubborn() for _ in range(18)), Free())
    tries: list[Any] = []
    tried = shrinking._tried

    def counting(*args: Any, **named: Any) -> Any:
        tries.append(args)
        return tried(*args, **named)

    monkeypatch.setattr(shrinking, "_tried", counting)
    plan = plan_shrink(model, x, on_refusal="ignore")
    assert [r.group.name for r in plan.removals] == ["parts.18"]
    assert sum(note.startswith("left as it is") for note in plan.notes) == 18
    assert len(tries) < 12


def test_where_nothing_is_refused_nothing_is_left() -> None:
    model, x = masked(Free())
    plan = plan_shrink(model, x, on_refusal="ignore")
    assert str(plan) == str(plan_shrink(model, x))


def test_there_is_no_other_way_to_refuse() -> None:
    with pytest.raises(ShrinkError, match='must be "raise" or "ignore", got \'skip\''):
        plan_shrink(Free(), torch.randn(2, 5, 16), on_refusal="skip")  # type: ignore[arg-type]


class Normed(nn.Module):
    """A large layer whose neurons are normed, a small one whose outputs are sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.read = nn.Linear(16, 8), nn.Linear(8, 16)
        self.large, self.norm, self.last = nn.Linear(16, 64), nn.LayerNorm(64), nn.Linear(64, 16)
        self.free = Free()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.read(self.small(x).sort(-1)[0])  # sorts
        return self.last(self.norm(self.large(self.free(x) + x)))  # norms


def test_where_nothing_goes_the_plan_says_what_stood_in_the_way_in_order() -> None:
    plan = plan_shrink(Normed(), torch.randn(2, 5, 16))
    text = str(plan).splitlines()
    assert text[0] == "nothing to remove: no unit is all zero. In the way stood"
    way = [line for line in plan.in_the_way if "parameters: " in line]
    assert len(way) == 5
    sizes = [int(line.split()[0].replace(",", "")) for line in way]
    assert sizes == sorted(sizes, reverse=True)
    norms, sorts = line_of(Normed, "# norms"), line_of(Normed, "# sorts")
    assert any(f"aten.layer_norm.default at {norms} in norm" in line for line in text)
    assert any(f"aten.sort.default at {sorts} (small" in line for line in text)
    assert any("free: none of its 24 neurons is zero" in line for line in text)


def test_where_a_spec_finds_nothing_its_error_says_what_stood_in_the_way() -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.norm(self.up(x)))

    with pytest.raises(torchprune.TorchpruneError, match=r"In the way stood .*aten.layer_norm"):
        torchprune.sparsify(Only(), NeuronSpec(0.5), [torch.randn(2, 5, 16)], progress=False)
