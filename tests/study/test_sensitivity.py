"""`sensitivity`: exact against the whole model pruned by hand, cheap against float64, its file."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from by_hand import assert_as_it_was, fingerprint
from families import FAMILIES, llama, tokens
from torch import Tensor, nn

import torchprune
from torchprune import (
    MagnitudeSpec,
    SparseGPTSpec,
    WandaSpec,
    sensitivity,
)
from torchprune.errors import CalibrationError, SpecError, TargetError
from torchprune.study.costs import sensitivity as home
from torchprune.study.costs.costs import Cost, SensitivityError
from torchprune.study.costs.damage import Judge
from torchprune.study.costs.sensitivities import SensitivityResult

QUIET: dict[str, Any] = {"progress": False}
LOSSES = ("llama", "gpt2", "t5", "mixtral")


def exact(model: nn.Module, data: Any, spec: Any, **options: Any) -> SensitivityResult:
    return sensitivity(model, data, spec, mode="exact", **{"levels": (0.5,), **QUIET, **options})


def outputs_of(model: nn.Module, batch: Any) -> Any:
    with torch.no_grad():
        return model(**batch) if isinstance(batch, dict) else model(batch)


def loss_by_hand(model: nn.Module, batch: Any) -> float:
    given = dict(batch) if isinstance(batch, dict) else {"input_ids": batch}
    given["labels"] = given.get("decoder_input_ids", given["input_ids"])
    with torch.no_grad():
        return float(model(**given, use_cache=False).loss)


def kl_by_hand(dense: Any, pruned: Any) -> float:
    p, q = dense.logits.double().log_softmax(-1), pruned.logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def change_by_hand(dense: Any, pruned: Any) -> float:
    found = [[y] if isinstance(y, Tensor) else list(y.values()) for y in (dense, pruned)]
    lost = sum((a.double() - b.double()).square().sum() for a, b in zip(*found, strict=True))
    return float(lost / sum(a.double().square().sum() for a in found[0]))


def pruned_alone(model: nn.Module, data: list[Any], spec: Any, name: str) -> nn.Module:
    """A copy in which only this layer is pruned, all else dense."""
    other = copy.deepcopy(model)
    torchprune.sparsify(other, replace(spec, targets=name), data, progress=False)
    return torchprune.fold(other)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "vit", "mixtral", "resnet"])
def test_exact_is_the_layer_pruned_alone_and_the_whole_model_run(name, monkeypatch):
    family = FAMILIES[name]
    model, data = family.make(), family.data(count=2)
    before, spec = fingerprint(model), WandaSpec()
    found = exact(model, data, spec)
    assert not [note for note in found.notes if "whole model" in note]
    assert_as_it_was(model, before)
    monkeypatch.setattr(Judge, "_holds", lambda *_: False)
    whole = exact(model, data, spec)
    assert [note for note in whole.notes if "whole model" in note]
    assert whole.rows == found.rows  # bit for bit

    dense = [outputs_of(model, batch) for batch in data]
    for row in (found.rows[0], found.rows[len(found.rows) // 2], found.rows[-1]):
        other = pruned_alone(model, data, spec, row.name)
        changed = [outputs_of(other, batch) for batch in data]
        own = dict(other.named_parameters())
        weight = own.get(f"{row.name}.weight", own.get(row.name))
        assert weight is not None
        assert row.zeros == int((weight == 0).sum())
        if name in LOSSES:
            losses = [loss_by_hand(other, b) - loss_by_hand(model, b) for b in data]
            assert row.loss is not None
            assert row.loss.mean == sum(losses) / 2
        if row.kl is not None:
            by_hand = [kl_by_hand(a, b) for a, b in zip(dense, changed, strict=True)]
            assert row.kl.mean == pytest.approx(sum(by_hand) / 2, rel=0.02, abs=1e-7)
            spread = abs(by_hand[0] - by_hand[1]) / 2  # deviation / sqrt(2), of two windows
            assert row.kl.error == pytest.approx(spread, rel=0.1, abs=1e-7)
        else:
            assert row.change is not None
            by_hand = [change_by_hand(a, b) for a, b in zip(dense, changed, strict=True)]
            assert row.change.mean == pytest.approx(sum(by_hand) / 2, rel=1e-3)


def test_what_comes_before_a_layer_is_not_computed_again():
    model, data = llama(num_hidden_layers=4).eval(), tokens(count=2)
    calls = [0] * 4
    for at in range(4):
        model.get_submodule(f"model.layers.{at}.mlp.up_proj").register_forward_hook(
            lambda *_, at=at: calls.__setitem__(at, calls[at] + 1)
        )
    exact(model, data, MagnitudeSpec(targets="*.q_proj"))
    # calibration 2, whether there is a loss 1, dense 2, the trial of runs from all blocks on, and
    # of the four trials those of this block and the blocks before it
    assert [n - 2 - 1 - 2 for n in calls] == [1 + (at + 1) + 2 * (at + 1) for at in range(4)]


class InPlace(nn.Module):
    """Its blocks write into what they are given, and others read that."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Adds() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for block in self.blocks:
            block(x)
        return x


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.down(self.up(x).relu()))


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x + torch.randn_like(x)).relu()


class Noisy(nn.Module):
    """Its blocks draw random numbers, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Draws() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("kind", [InPlace, Noisy])
def test_models_that_cannot_begin_in_the_middle_run_whole(kind):
    torch.manual_seed(0)
    model, data = kind().eval(), [torch.randn(6, 8) for _ in range(2)]
    found = exact(model, data, MagnitudeSpec())
    assert found.notes == (
        "every trial ran the whole model: from the middle on it gives other bits",
    )
    assert exact(model, data, MagnitudeSpec()).rows == found.rows
    other = pruned_alone(model, data, MagnitudeSpec(), found.rows[-1].name)
    changes = []
    for batch in data:
        runs = []
        for each in (model, other):
            torch.manual_seed(0)
            runs.append(outputs_of(each, batch))
        changes.append(change_by_hand(*runs))
    assert found.rows[-1].change.mean == pytest.approx(sum(changes) / 2, rel=1e-5)


def test_methods_that_change_weights_are_tried_as_they_solve():
    model, data = llama(), tokens(count=2)
    spec = SparseGPTSpec(targets=["*.0.mlp.*"])
    solved, masks = (exact(model, data, spec, solve=solve) for solve in (True, False))
    assert "as it solves each layer alone" in solved.notes[0]
    assert "by masks alone" in masks.notes[0]
    for one, other in zip(solved.rows, masks.rows, strict=True):
        assert one.error < other.error
    down = solved.rows[-1]
    alone = pruned_alone(model, data, SparseGPTSpec(), down.name)
    losses = [loss_by_hand(alone, b) - loss_by_hand(model, b) for b in data]
    assert down.loss.mean == pytest.approx(sum(losses) / 2, abs=1e-5)


# -- cheap -----------------------------------------------------------------------------------------


def test_the_layers_error_is_that_of_float64():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    data = [torch.randn(40, 16) * torch.rand(16) * 3 for _ in range(2)]
    found = sensitivity(model, data, WandaSpec(), probes=0, **QUIET)
    assert found.metric == "error"
    inputs = {"0": torch.cat(data), "2": model[:2](torch.cat(data)).detach()}
    for row in found.rows:
        spec = WandaSpec(float(row.level))
        weight = model.get_submodule(row.name).weight.detach().double()
        other = pruned_alone(model, data, spec, row.name).get_submodule(row.name)
        pruned = other.weight.detach().double()
        x = inputs[row.name].double()
        lost, total = (x @ (weight - pruned).T).square().sum(), (x @ weight.T).square().sum()
        assert row.error == pytest.approx(float(lost / total), rel=1e-5)
        assert row.squared == pytest.approx(float(lost) / 2, rel=1e-5)
        assert row.zeros == int((pruned == 0).sum())


def test_what_gradients_predict_of_the_last_layer_is_its_change():
    """There outputs are linear in the weights, so the mean over probes is the change itself."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8, bias=False))
    data = [torch.randn(40, 16)]
    found = sensitivity(model, data, WandaSpec(), probes=300, **QUIET)
    assert found.metric == "predicted"
    for row in found.rows:
        if row.name == "2":
            assert row.predicted == pytest.approx(row.error, rel=0.15)


def test_predicted_and_exact_kl_agree_where_little_goes():
    family = FAMILIES["gpt2"]
    model, data = family.make(), family.data(count=2)
    cheap = sensitivity(model, data, MagnitudeSpec(), levels=(0.2,), probes=40, **QUIET)
    for row, true in zip(cheap.rows, exact(model, data, MagnitudeSpec(), levels=(0.2,)).rows,
                         strict=True):  # fmt: skip
        assert row.predicted == pytest.approx(true.kl.mean, rel=0.5, abs=2e-8), row.name


def test_padding_is_no_row():
    model = llama().eval()
    ids = tokens(count=1)[0]
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    padded = [{"input_ids": ids, "attention_mask": mask}]
    rest = [{"input_ids": ids[:, :8], "attention_mask": mask[:, :8]}]
    spec = MagnitudeSpec(targets="*.down_proj")
    one, other = exact(model, padded, spec), exact(model, rest, spec)
    for a, b in zip(one.rows, other.rows, strict=True):
        assert a.kl.mean == pytest.approx(b.kl.mean, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("mode", ["cheap", "exact"])
def test_a_layer_that_matters_little_is_found(mode):
    model, data = llama().eval(), tokens(count=2)
    model.model.layers[1].mlp.down_proj.weight.data *= 1e-3
    found = sensitivity(model, data, WandaSpec(targets=["*.mlp.*", "*.o_proj"]), mode=mode, **QUIET)
    name = "model.layers.1.mlp.down_proj"
    costs = {row.name: row.value(found.metric).mean for row in found.rows if row.level == "0.5"}
    quiet = [n for n in costs if n.startswith("model.layers.1.mlp")]  # what feeds it, too
    assert max(costs[n] for n in quiet) < min(costs[n] for n in costs if n not in quiet)
    assert found.overrides(0.5, spread=0.2)[name] == max(found.overrides(0.5, spread=0.2).values())


def test_levels_may_be_patterns_and_shapes_that_cannot_hold_them_are_told():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 8))
    found = sensitivity(model, [torch.randn(9, 8)], WandaSpec(), levels=(0.5, "2:4"), **QUIET)
    assert [(row.name, row.level) for row in found.rows] == [
        ("0", "0.5"),
        ("0", "2:4"),
        ("2", "0.5"),
    ]
    assert found.rows[1].zeros == 40
    assert found.notes == ("the shape of 2 cannot hold 2:4: not tried",)
    by_pattern = sensitivity(model[0], [torch.randn(9, 8)], WandaSpec(pattern="2:4"), **QUIET)
    assert by_pattern.levels == ("2:4",)


# -- the file --------------------------------------------------------------------------------------


def interrupting(after: int, error: type[BaseException]) -> Any:
    calls = [0]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls[0] += 1
        if calls[0] > after:
            raise error
        return model(*batch).square().mean()

    return loss


def small() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)), [torch.randn(9, 8)] * 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_model_is_as_it_was_after_an_error_and_the_file_goes_on(tmp_path, error, monkeypatch):
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(*batch).square().mean()

    model, data = small()
    before, path = fingerprint(model), tmp_path / "found.json"
    options: dict[str, Any] = {"levels": None, "loss": loss}
    whole = exact(model, data, WandaSpec(), path=tmp_path / "whole.json", **options)
    assert_as_it_was(model, before)
    before = fingerprint(model)
    monkeypatch.setattr(home, "problem_of", lambda *_: whole.problem)  # whatever the loss
    with pytest.raises(error):
        exact(model, data, WandaSpec(), path=path, levels=None, loss=interrupting(9, error))
    assert_as_it_was(model, before)
    known = json.loads(path.read_text())["rows"]
    assert 0 < len(known) < len(whole.rows)
    assert exact(model, data, WandaSpec(), path=path, **options) == whole
    assert path.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_finished_file_is_not_run_again(tmp_path):
    model, data = small()
    for mode in ("cheap", "exact"):
        path = tmp_path / f"{mode}.json"
        found = sensitivity(model, data, WandaSpec(), mode=mode, path=path, **QUIET)
        written = path.stat().st_mtime_ns
        assert sensitivity(model, data, WandaSpec(), mode=mode, path=path, **QUIET) == found
        assert path.stat().st_mtime_ns == written


def test_another_model_spec_or_data_is_refused(tmp_path):
    model, data = small()
    path = tmp_path / "found.json"
    sensitivity(model, data, WandaSpec(), path=path, **QUIET)
    written = path.read_bytes()
    other = copy.deepcopy(model)
    other[2].bias.data[0] += 1
    for call in (
        lambda: sensitivity(other, data, WandaSpec(), path=path, **QUIET),
        lambda: sensitivity(model, data[:1], WandaSpec(), path=path, **QUIET),
        lambda: sensitivity(model, data, WandaSpec(scope="layer"), path=path, **QUIET),
        lambda: sensitivity(model, data, WandaSpec(), path=path, levels=(0.5,), **QUIET),
        lambda: sensitivity(model, data, WandaSpec(), path=path, seed=1, **QUIET),
        lambda: exact(model, data, WandaSpec(), path=path, levels=None),
    ):
        with pytest.raises(SensitivityError, match="another model, spec, data"):
            call()
    assert path.read_bytes() == written
    path.write_text("{", "utf-8")
    with pytest.raises(SensitivityError, match="damaged"):
        sensitivity(model, data, WandaSpec(), path=path, **QUIET)


def test_the_same_seed_gives_the_same_bits():
    model, data = llama(), tokens(count=2)
    torch.manual_seed(5)
    one = sensitivity(model, data, WandaSpec(targets="*.o_proj"), **QUIET)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)  # nobody's random numbers were used
    assert sensitivity(model, data, WandaSpec(targets="*.o_proj"), **QUIET) == one
    other = sensitivity(model, data, WandaSpec(targets="*.o_proj"), seed=1, **QUIET)
    assert other.rows[0].predicted != one.rows[0].predicted


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"mode": "both"}, SpecError, '"cheap" or "exact"'),
        ({"metric": "size"}, SpecError, "metric must be one of"),
        ({"metric": "kl"}, SensitivityError, "there is predicted, error, squared"),
        ({"levels": ()}, SpecError, "levels must be"),
        ({"levels": 0.5}, SpecError, "levels must be"),
        ({"levels": ("dense",)}, SpecError, "prunes nothing"),
        ({"levels": (1.5,)}, SpecError, "0 <= sparsity < 1"),
        ({"levels": ("3:5",)}, CalibrationError, "nothing is left to try: .* cannot hold 3:5"),
        ({"probes": -1}, SpecError, "probes must be"),
        ({"max_windows": 0}, SpecError, "max_windows must be"),
        ({"spec": "wanda"}, SpecError, "spec must be a spec"),
        ({"spec": WandaSpec(targets="nothing")}, TargetError, "matches none"),
        ({"spec": torchprune.HeadSpec(), "levels": (0.5,)}, SpecError, "heads go one by one"),
        ({"spec": torchprune.NeuronSpec(), "levels": ("2:4",)}, SpecError, "no share of units"),
        ({"mode": "exact", "loss": lambda m, b: m(*b).mean() / 0}, CalibrationError, "loss on the"),
    ],
)
def test_what_cannot_be_is_refused(options, error, said):
    model, data = small()
    before = fingerprint(model)
    spec = options.pop("spec", WandaSpec())
    with pytest.raises(error, match=said):
        sensitivity(model, data, spec, **{**QUIET, **options})
    assert_as_it_was(model, before)


def test_only_modules_are_measured():
    with pytest.raises(SpecError, match="is for modules"):
        sensitivity("model", [], WandaSpec())


def test_a_row_knows_its_sparsity():
    row = Cost("a", "a", None, "0.5", 3, 4, kl=None)
    assert row.sparsity == 0.75
    assert row.value("error") is None
