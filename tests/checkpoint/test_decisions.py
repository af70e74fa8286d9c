"""`sparsify(path=)`: a run that was killed goes on to the bits of one that was not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import sample
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import torchprune
from torchprune import (
    OWL,
    BestSpec,
    HeadSpec,
    LeastError,
    MagnitudeSpec,
    Search,
    Sensitivity,
    SolverSpec,
    SparseGPTSpec,
    WandaSpec,
)
from torchprune.checkpoint import decisions
from torchprune.checkpoint.decisions import Decisions, forget_decisions
from torchprune.errors import CheckpointError, SpecError, TorchpruneError
from torchprune.masking.mask import masked_layers

BATCHES = [torch.arange(i, i + 12)[None] % 31 for i in range(3)]


def fresh() -> nn.Module:
    """A tiny model, without a trace in torch's random numbers."""
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


class Block(nn.Module):
    """Two layers that read one tensor, or where it is changed between them another, and a third."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.one(x)
        if self.factor != 1:
            x *= self.factor
        return x + self.three(torch.tanh(self.two(x) + y))


class Stack(nn.Module):
    """What its first block shares the last one does not: what was foreseen fails there."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(factor) for factor in (1.0, 1.0, 3.0))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def drawing(weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """A solver that draws its masks from torch's own random numbers."""
    keep = torch.rand(weight.shape).argsort(1).argsort(1) * 2 >= weight.shape[1]
    return weight * keep, keep


def prune(model: nn.Module, spec: Any, data: Any = BATCHES, **options: Any) -> nn.Module:
    return torchprune.sparsify(model, spec, data, progress=False, **options)


class Killed(BaseException):
    pass


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Arms a kill after so many decisions, and counts those that are made."""
    real = Decisions._keep

    def armed(after: int | None, *, before_it_is_kept: bool = False) -> list[str]:
        made: list[str] = []

        def keep(self: Decisions, tensors: Any, facts: Any) -> None:
            made.append(self._asked["kind"])
            if len(made) == after and before_it_is_kept:
                raise Killed
            real(self, tensors, facts)
            if len(made) == after:
                raise Killed

        monkeypatch.setattr(Decisions, "_keep", keep)
        return made

    return armed


def same(one: nn.Module, two: nn.Module) -> bool:
    """All bits, what the masks hide, and all that is told."""
    states = one.state_dict(), two.state_dict()
    equal = states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )
    told = [torchprune.report(m).to_dict() for m in (one, two)]
    hidden = [[mask.hidden for _, mask in masked_layers(m)] for m in (one, two)]
    alike = all(
        (a is None and b is None) or torch.equal(a, b) for a, b in zip(*hidden, strict=True)
    )
    return equal and alike and told[0] == told[1]


SPECS: dict[str, Any] = {
    "wanda": WandaSpec(0.5),
    "wanda, a pattern and others": WandaSpec(
        pattern="2:4", sequential="block", overrides={"*.up_proj": "4:8", "*.v_proj": "dense"}
    ),
    "sparsegpt": SparseGPTSpec(0.6),
    "sparsegpt, all at once": SparseGPTSpec(0.5, sequential="none"),
    "best, fast": BestSpec(0.6, effort="fast"),
    "best, blocks trained": BestSpec(pattern="2:4", effort="balanced"),
    "an order of its own": WandaSpec(pattern="2:4", permute=True),
    "owl": WandaSpec(0.5, allocation=OWL()),
    "least error": SparseGPTSpec(0.5, allocation=LeastError()),
    "search": WandaSpec(0.5, allocation=Search(generations=2, offspring=2, batches=1)),
    "sensitivity": WandaSpec(0.5, allocation=Sensitivity(cost="error")),
    "drawn": SolverSpec(0.5, solve=drawing),
}


def killed_and_resumed(
    make: Callable[[], nn.Module], spec: Any, data: Any, place: Path, arm: Callable[..., list[str]]
) -> list[str]:
    """Kill a run at several places and hold what it comes to against one that is left alone: the
    kinds of its decisions."""
    torch.manual_seed(5)
    whole = prune(make(), spec, data)
    torch.manual_seed(5)
    made = arm(None)
    assert same(whole, prune(make(), spec, data, path=place))
    count, kinds = len(made), list(made)
    forget_decisions(place)
    assert not place.exists()
    model, done = make(), 0
    torch.manual_seed(5)
    for at in sorted({1, count // 2, count - 1}):
        early = at == count // 2
        arm(at - done, before_it_is_kept=early)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(Killed):
            prune(model, spec, data, path=place)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        done = at - early
        assert len([p for p in place.iterdir() if p.name.isdigit()]) == done
        torch.manual_seed(at)  # as another process has others
    made = arm(None)
    model = prune(make(), spec, data, path=place)
    assert made == kinds[done:]
    assert same(whole, model)
    made = arm(None)
    assert same(whole, prune(make(), spec, data, path=place))
    assert made == []
    return kinds


KEPT = ("wanda", "sparsegpt", "best, blocks trained", "least error", "drawn")


@pytest.mark.parametrize("name", sample(SPECS, *KEPT))
def test_killed_anywhere_it_ends_with_the_same_bits(name, tmp_path, arm):
    spec = SPECS[name]
    kinds = killed_and_resumed(fresh, spec, BATCHES, tmp_path / "run", arm)
    assert kinds.count("allocation") == (spec.uneven is not None)
    assert kinds.count("training") == (2 if spec.reconstruct else 0)
    assert kinds.count("changes") >= 4


def test_a_run_that_began_anew_by_itself_goes_on_in_its_second_half(tmp_path, arm):
    def stack() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return Stack()

    data = [torch.randn(5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    kinds = killed_and_resumed(stack, SparseGPTSpec(0.5), data, tmp_path / "run", arm)
    assert len(kinds) > 9  # layers of both attempts
    assert "calibrated twice" in "".join(
        torchprune.report(prune(stack(), SparseGPTSpec(0.5), data)).notes
    )


# -- what is refused -------------------------------------------------------------------------------


@pytest.fixture
def half(tmp_path: Path, arm: Callable[..., list[str]]) -> Path:
    """The place of a run that was killed in the middle."""
    arm(3)
    with pytest.raises(Killed):
        prune(fresh(), SparseGPTSpec(0.5), path=tmp_path / "run")
    arm(None)
    return tmp_path / "run"


def refused(place: Path, match: str, **other: Any) -> None:
    """A call is refused and changes neither the model nor what is kept."""
    model = other.pop("model", None) or fresh()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    files = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    spec, data = other.pop("spec", SparseGPTSpec(0.5)), other.pop("data", BATCHES)
    with pytest.raises(CheckpointError, match=match):
        prune(model, spec, data, path=place, **other)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert files == {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}


def test_another_run_is_refused(half):
    other = fresh()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    for change in (
        {"spec": SparseGPTSpec(0.6)},
        {"spec": WandaSpec(0.5)},
        {"spec": SparseGPTSpec(0.5, ignore=("*.q_proj",))},
        {"data": BATCHES[:2]},
        {"data": [BATCHES[0] + 1, *BATCHES[1:]]},
        {"model": other},
        {"model": prune(fresh(), MagnitudeSpec(0.1))},
        {"hold": torch.bfloat16},
        {"seed": 1},
    ):
        refused(half, "another run", **change)


@pytest.mark.parametrize("name", ["run", "000001", "000002", "000003"])
@pytest.mark.parametrize("file", ["progress.json", "progress.safetensors"])
def test_damage_is_refused_before_anything_runs(half, name, file, monkeypatch):
    monkeypatch.setattr(decisions.Decisions, "begin", None)  # would raise another error
    path = half / name / file
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) * 3 // 4] ^= 4
    for damaged in (whole[: len(whole) // 2], bytes(flipped), b""):
        path.write_bytes(damaged)
        refused(half, "damaged|truncated|not JSON")
    path.unlink()
    refused(half, "holds no|missing")


def test_a_missing_decision_and_one_of_other_layers_are_refused(half):
    (half / "000002").rename(half / "000009")
    refused(half, "000002 is missing")
    (half / "000009").rename(half / "000002")
    (half / "000001").rename(half / "000009")
    (half / "000002").rename(half / "000001")
    (half / "000009").rename(half / "000002")
    refused(half, "does not run as it did|expected changes of")


def test_another_directory_is_refused_and_an_unfinished_file_is_not(half, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine", "utf-8")
    refused(mine, "holds no progress of a pruning run")
    refused(mine / "notes.txt", "holds no progress of a pruning run")
    forget_decisions(mine)
    assert (mine / "notes.txt").exists()
    partial = half / ".000004.0123456789ab.partial"  # as kill -9 leaves it
    partial.mkdir()
    (partial / "progress.json").write_text("{", "utf-8")
    assert same(prune(fresh(), SparseGPTSpec(0.5)), prune(fresh(), SparseGPTSpec(0.5), path=half))
    forget_decisions(half)
    assert not half.exists()


@pytest.mark.parametrize("spec", [MagnitudeSpec(0.5), HeadSpec(0.5)])
def test_what_decides_at_once_keeps_nothing(spec, tmp_path):
    with pytest.raises(SpecError, match=f"{type(spec).__name__} decides .*leave it out"):
        prune(fresh(), spec, path=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_call_that_is_refused_leaves_nothing(tmp_path):
    mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    for spec, data in (
        (WandaSpec(0.5, targets="nothing"), [torch.randn(4, 8)]),
        (WandaSpec(0.5), [torch.full((4, 8), torch.nan)]),
        (WandaSpec(0.5, allocation=Search()), [torch.randn(4, 8)]),  # it gives no loss
        (WandaSpec(0.5), []),
    ):
        with pytest.raises(TorchpruneError):
            prune(mlp, spec, data, path=tmp_path / "run")
        assert list(tmp_path.iterdir()) == []


def test_nothing_is_decided_again_that_was_kept(half, monkeypatch):
    """The solver itself runs for what is left alone."""
    from torchprune.methods import solve

    real, solved = solve.Solver.solve, list[str]()

    def watched(self: Any, *arguments: Any) -> Any:
        solved.extend(arguments[-1])
        return real(self, *arguments)

    monkeypatch.setattr(solve.Solver, "solve", watched)
    prune(fresh(), SparseGPTSpec(0.5), path=half)
    first = [*solved]
    solved.clear()
    prune(fresh(), SparseGPTSpec(0.5))
    assert 0 < len(first) < len(solved) == 14
    assert solved[-len(first) :] == first
