"""Tickets: exact counts and rewinding, what they are held against, intervals, resuming."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import torchprune
from torchprune.errors import CheckpointError, SpecError, TargetError
from torchprune.masking.mask import masked_layers
from torchprune.training import Interval, RunError, Tickets, Trial
from torchprune.training.student_intervals import interval_of, t_quantile
from torchprune.training.tickets import shuffled

X = torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
Y = (X[:, :4] * X[:, 4:8]).argmax(1)


def make() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 4)
    )


def fit(model: nn.Module, batches: int = 3) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for batch in torch.randperm(48).split(48 // batches):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[batch]), Y[batch]).backward()
        optimizer.step()


@torch.no_grad()
def loss(model: nn.Module) -> float:
    model.eval()
    return float(nn.functional.cross_entropy(model(X), Y))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Effective tensors by their plain names."""
    found = {k: v for k, v in model.named_buffers() if "parametrizations" not in k}
    for name, module in model.named_modules():
        if "parametrizations" not in name:
            for tensor in ("weight", "bias"):
                if getattr(module, tensor, None) is not None:
                    found[f"{name}.{tensor}"] = getattr(module, tensor)
    return {k: v.detach().clone() for k, v in found.items()}


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit."""
    views = [t.contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*views)


class Seen:
    """What each training began with and ended with, beside an ordinary one."""

    def __init__(self, function: Any = fit) -> None:
        self.function = function
        self.begun: list[dict[str, Tensor]] = []
        self.masks: list[dict[str, Tensor]] = []
        self.ended: list[dict[str, Tensor]] = []

    def __call__(self, model: nn.Module) -> None:
        assert all(module.training for module in model.modules())
        self.begun.append(state_of(model))
        self.masks.append(torchprune.masks(model))
        self.function(model)
        self.ended.append(state_of(model))


def find(train: Any = fit, spec: Any = None, **options: Any) -> Tickets:
    spec = spec or torchprune.MagnitudeSpec(0.75)
    usual = {"evaluate": loss, "higher_is_better": False, "progress": False, "rounds": 2}
    return torchprune.find_ticket(
        options.pop("make_model", make), train, spec, **{**usual, "seeds": 1, **options}
    )


def told(found: Tickets) -> list[Any]:
    """Trials without their seconds."""
    return [replace(trial, training=0.0, evaluating=0.0) for trial in found.trials]


# -- what is trained -------------------------------------------------------------------------------


@given(
    st.integers(1, 3),
    st.integers(30, 97),
    st.sampled_from(["layer", "row", "global"]),
    st.sampled_from([0, 2]),
)
@settings(max_examples=8)
def test_tickets_begin_with_the_rewound_bits_and_exact_counts(rounds, percent, scope, rewind):
    early: list[dict[str, Tensor]] = []

    def train(model: nn.Module) -> None:
        if not early and rewind:
            hook = register_optimizer_step_post_hook(lambda *_: early.append(state_of(model)))
        fit(model)
        if rewind and len(seen.begun) == 1:
            hook.remove()

    seen = Seen(train)
    spec = torchprune.MagnitudeSpec(percent / 100, scope=scope)
    found = find(seen, spec, rounds=rounds, rewind=rewind)
    arms = [trial.arm for trial in found.trials]
    assert arms == ["dense", *["ticket", "reinit", "random"] * rounds]
    start = early[rewind - 1] if rewind else seen.begun[0]
    assert found.rewound_to == rewind
    before: dict[str, Tensor] = {}
    for arm, begun, masks, ended, trial in zip(
        arms, seen.begun, seen.masks, seen.ended, found.trials, strict=True
    ):
        if arm == "dense":
            assert masks == {}
            continue
        share = 1 - (1 - percent / 100) ** (trial.round / rounds)
        gone = {key: int((~mask).sum()) for key, mask in masks.items()}
        exact = {"0.weight": 384, "4.weight": 96}
        if scope == "layer":
            assert gone == {k: math.floor(round(n * share, 9)) for k, n in exact.items()}
        elif scope == "global":
            assert sum(gone.values()) == math.floor(round(480 * share, 9))
        else:
            assert ((~masks["0.weight"]).sum(1) == math.floor(round(16 * share, 9))).all()
        for key, mask in masks.items():
            assert (begun[key][~mask] == 0).all()
            assert (ended[key][~mask] == 0).all()
            assert not torch.signbit(begun[key][~mask]).any()
        kept = [
            same(begun[k][masks[k]], start[k][masks[k]]) if k in masks else same(begun[k], start[k])
            for k in start
        ]
        if arm == "reinit":
            assert not same(begun["0.weight"], start["0.weight"] * masks["0.weight"])
            assert all(torch.equal(mask, before[key]) for key, mask in masks.items())
            continue
        assert all(kept)  # buffers and biases too
        if arm == "random":
            for key, mask in masks.items():
                assert int(mask.sum()) == int(before[key].sum())
                if scope == "row":
                    assert torch.equal(mask.sum(1), before[key].sum(1))
        else:
            assert all(not (mask & ~before.get(key, mask)).any() for key, mask in masks.items())
            before = masks
    assert found.trials[-1].sparsity == found.trials[-3].sparsity


def test_random_masks_are_other_masks():
    seen = Seen()
    find(seen, torchprune.MagnitudeSpec(0.9), rounds=1, seeds=2)
    ticket, random = seen.masks[1], seen.masks[3]
    overlap = (ticket["0.weight"] & random["0.weight"]).sum() / ticket["0.weight"].sum()
    assert overlap < 0.35
    assert not torch.equal(random["0.weight"], seen.masks[7]["0.weight"])


def test_a_ticket_is_what_was_trained_and_its_mask_takes_the_smallest():
    seen = Seen()
    found = find(seen, seeds=[4, 9], rounds=[0.5, 0.75], baselines=())
    assert [(t.seed, t.round) for t in found.trials] == [(s, r) for s in (4, 9) for r in range(3)]
    for at, (seed, round) in enumerate([(4, 1), (4, 2), (9, 1), (9, 2)]):
        at += 1 + at // 2
        model = found.model(seed, round)
        begun = state_of(model)
        assert all(same(begun[k], v) for k, v in seen.begun[at].items())
        assert found.masks(seed, round).keys() == {"0.weight", "4.weight"}
        trained = seen.ended[at - 1]["0.weight"].abs()
        keep = seen.masks[at]["0.weight"]
        assert trained[keep].min() >= trained[~keep].max()
        fit(model)
        assert torchprune.report(model).sparsity == (0.5 if round == 1 else 0.75)
        first = seen.begun[0 if seed == 4 else 3]
        dense = torchprune.densify(found.model(seed, round))
        assert all(same(v, first[k]) for k, v in state_of(dense).items())
    assert torchprune.report(found.model()).sparsity == 0.75
    with pytest.raises(RunError, match="no ticket of seed 5 and round 1"):
        found.model(5, 1)
    with pytest.raises(RunError, match="no ticket"):
        found.model(4, 3)


def test_all_arms_of_a_round_train_in_one_order_and_each_round_and_seed_in_another():
    drawn: list[float] = []

    def train(model: nn.Module) -> None:
        drawn.append(float(torch.rand(())))

    before = torch.get_rng_state()
    find(train, seeds=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(drawn)) == 6
    for at in (1, 4, 8, 11):
        assert len(set(drawn[at : at + 3])) == 1
    again = list(drawn)
    drawn.clear()
    find(train, seeds=2)
    assert drawn == again


def test_the_same_call_finds_the_same():
    assert told(find(seeds=2)) == told(find(seeds=2))


# -- rewinding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewind", "step"), [(0, 0), (0.0, 0), (1, 1), (4, 4), (0.5, 6), (0.25, 3)]
)
def test_rewinding_counts_the_optimizers_steps(rewind, step):
    trainings = 0

    def train(model: nn.Module) -> None:
        nonlocal trainings
        trainings += 1
        fit(model, batches=12)

    found = find(train, rewind=rewind, rounds=1, seeds=2, baselines=())
    assert found.rewound_to == step
    assert trainings == 4 + (isinstance(rewind, float) and rewind > 0)


def test_a_train_with_a_start_is_told_where_it_begins():
    starts: list[int] = []

    def train(model: nn.Module, start: int) -> None:
        starts.append(start)
        fit(model)

    find(train, rewind=2, rounds=1)
    assert starts == [0, 2, 0, 2]  # dense, ticket, reinit, random


def test_optimizers_that_share_a_model_count_once_and_later_ones_go_on():
    def two(model: nn.Module) -> None:
        for _ in range(2):
            some = list(model.parameters())
            optimizers = [torch.optim.SGD(some[:2], lr=0.1), torch.optim.Adam(some[2:], lr=0.1)]
            other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
            for _ in range(3):
                model(X).square().mean().backward()
                for optimizer in (*optimizers, other):
                    optimizer.step()

    assert find(two, rewind=0.5, rounds=1, baselines=()).rewound_to == 3
    with pytest.raises(RunError, match="after step 7, and train took only 6 steps"):
        find(two, rewind=7, rounds=1)


# -- other specs -----------------------------------------------------------------------------------


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(["2:4", "1:4", "block:2x4 0.5", "unstructured 0.5", ""]),
    st.integers(0, 2**31),
)
def test_shuffled_masks_keep_counts_and_pattern(groups, rows, cols, pattern, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(groups, 2 * rows, 4 * cols, generator=generator) < 0.5
    if pattern.startswith("block"):
        mask = mask[:, ::2, ::4].repeat_interleave(2, 1).repeat_interleave(4, 2)
    found = shuffled(mask, pattern, generator)
    assert found.shape == mask.shape
    assert found.dtype == torch.bool
    assert torch.equal(found.sum((1, 2)), mask.sum((1, 2)))
    if ":4" in pattern:
        assert torch.equal(found.reshape(-1, 4).sum(1), mask.reshape(-1, 4).sum(1))
    if pattern.startswith("block"):
        assert torch.equal(
            found[:, ::2, ::4].repeat_interleave(2, 1).repeat_interleave(4, 2), found
        )
    even = torch.arange(mask[0].numel()).view(mask[0].shape).expand_as(mask) % 2 == 0
    assert (shuffled(even, "", generator).sum(2) == even.sum(2)).all()


def test_patterns_are_rounds_too():
    seen = Seen()
    found = find(seen, torchprune.MagnitudeSpec(pattern="2:4"), rounds=["3:4", "2:4", "1:4"])
    assert [one.asked for one in found.rounds] == ["3:4", "2:4", "1:4"]
    for trial, masks in zip(found.trials, seen.masks, strict=True):
        for mask in masks.values():
            assert (mask.view(-1, 4).sum(1) == 4 - trial.round).all()


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.one(x)))
        return self.head(torch.relu(self.two(x)).mean((2, 3)))


@pytest.mark.parametrize(
    "spec",
    [
        torchprune.ChannelSpec(0.75, round_to=1),
        torchprune.MagnitudeSpec(0.75, pattern="block:4x1"),
        torchprune.WandaSpec(0.75),
        torchprune.SparseGPTSpec(0.75),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_units_tiles_and_data_driven_masks_have_tickets(spec):
    x = torch.randn(6, 1, 6, 6)
    seen = Seen(lambda m: [torch.optim.SGD(m.parameters(), 0.1), m(x).square().mean().backward()])
    found = find(
        seen, spec, make_model=Cnn, data=[x], evaluate=lambda m: m(x).detach().square().mean()
    )
    counts = [{k: int(v.sum()) for k, v in masks.items()} for masks in seen.masks]
    for at in (1, 4):
        assert counts[at] == counts[at + 1] == counts[at + 2]
        assert counts[at]
    start = seen.begun[0]
    for at in (1, 3, 4, 6):
        for key, value in seen.begun[at].items():
            keep = seen.masks[at].get(key, torch.ones_like(value, dtype=torch.bool))
            assert same(value[keep], start[key][keep])
    assert 0.6 < found.trials[-1].sparsity < 0.95


# -- refusals --------------------------------------------------------------------------------------


def fixed() -> nn.Module:
    torch.manual_seed(0)
    return make()


ONE = make()


def masked() -> nn.Module:
    return torchprune.sparsify(make(), torchprune.MagnitudeSpec(), progress=False)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"spec": torchprune.LayerSpec()}, "LayerSpec drops whole blocks"),
        ({"spec": "magnitude"}, "spec must be a spec"),
        ({"spec": torchprune.WandaSpec(pattern="2:4", permute=True), "data": [X]}, "moves weights"),
        ({"spec": torchprune.MagnitudeSpec(pattern="2:4")}, "give the levels"),
        ({"spec": torchprune.MagnitudeSpec(targets="nowhere")}, "nowhere"),
        ({"spec": torchprune.NeuronSpec(0.5, allocation="global")}, 'allocation="global"'),
        ({"spec": torchprune.MagnitudeSpec(0.0)}, "must prune"),
        ({"rounds": 0}, "rounds"),
        ({"rounds": [0.5, 0.4]}, "ascend"),
        ({"rounds": [0, 0.4]}, "must prune"),
        ({"rewind": -1}, "rewind must be"),
        ({"rewind": 1.0}, "rewind must be"),
        ({"rewind": True}, "rewind must be"),
        ({"rewind": "early"}, "rewind must be"),
        ({"seeds": 0}, "seeds must be"),
        ({"seeds": [1, 1]}, "seeds must be"),
        ({"seeds": 2.0}, "seeds must be"),
        ({"baselines": "reinit"}, "baselines must be"),
        ({"baselines": ("dense",)}, "a baseline is"),
        ({"confidence": 1}, "confidence"),
        ({"evaluate": None}, "evaluate must be a function"),
        ({"make_model": lambda: ONE}, "same model twice"),
        ({"make_model": lambda: 3}, "must make a Module"),
        ({"make_model": masked}, "must make a dense model"),
        ({"make_model": fixed}, "same weights whatever"),
    ],
)
def test_calls_that_cannot_be_are_refused_before_anything_is_trained(options, error):
    def never(model: nn.Module) -> None:
        raise AssertionError

    with pytest.raises((SpecError, TargetError, RunError), match=error):
        find(never, **options)


def test_one_initialisation_will_do_without_that_baseline():
    found = find(make_model=fixed, baselines=("random",), rounds=1)
    assert found.baselines == ["random"]
    with pytest.raises(RunError, match="evaluate must give a number"):
        find(evaluate=lambda model: None)
    with pytest.raises(RunError, match="several metrics"):
        find(evaluate=lambda model: {"a": 1, "b": 2})


# -- what follows ----------------------------------------------------------------------------------


def test_quantiles_are_those_of_the_books_and_of_scipy():
    from scipy import stats

    for confidence in (0.5, 0.8, 0.9, 0.95, 0.99, 0.999):
        for freedom in (1, 2, 3, 4, 5, 8, 9, 29, 30, 200):
            expected = stats.t.ppf((1 + confidence) / 2, freedom)
            assert t_quantile(confidence, freedom) == pytest.approx(expected, rel=1e-9)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9), st.floats(0.5, 0.99))
def test_intervals_are_student_s(draws, confidence):
    from scipy import stats

    found = interval_of(draws, confidence)
    assert found.low <= found.mean <= found.high
    spread = torch.tensor(draws, dtype=torch.float64).std()
    half = stats.t.ppf((1 + confidence) / 2, len(draws) - 1) * float(spread) / len(draws) ** 0.5
    assert found.half == pytest.approx(half, rel=1e-6, abs=1e-9)


def test_intervals_of_one_draw_and_of_nan_say_nothing():
    assert interval_of([2.0], 0.9).half == math.inf
    assert str(interval_of([2.0], 0.9)) == "2"
    assert math.isnan(interval_of([2.0, math.nan], 0.9).half)
    assert str(Interval(0.96314, 0.01662)) == "0.963 ± 0.017"
    assert str(Interval(123.4, 25.0)) == "123 ± 25"
    assert str(Interval(1.0, 0.0)) == "1"


def results(higher: bool = True, **arms: list[float]) -> Tickets:
    """One round of made-up metrics, by arm and seed."""
    sign = 1 if higher else -1
    trials = [
        Trial(seed, 0 if arm == "dense" else 1, arm, "0.9", 0.9, {"m": sign * value}, 1.0, 1.0)
        for arm, values in arms.items()
        for seed, value in enumerate(values)
    ]
    return Tickets(tuple(trials), "m", higher)


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize(
    ("verdict", "arms"),
    [
        ("wins", {"ticket": [9, 8, 7], "reinit": [6, 5.1, 4], "random": [5, 4, 3.1]}),
        (
            "below dense, above reinit and random",
            {"ticket": [7, 6, 5.1], "reinit": [6, 5.1, 4], "random": [5, 4, 3.1]},
        ),
        (
            "as good as dense, above random, not above reinit",
            {"ticket": [9, 8, 7], "reinit": [9, 7, 8], "random": [5, 4, 3.1]},
        ),
        (
            "below dense, not above reinit or random",
            {"ticket": [2, 1.1, 0], "reinit": [6, 5.1, 4], "random": [5, 4, 3.1]},
        ),
        ("wins", {"ticket": [11, 10, 9.1]}),
        ("not finite", {"ticket": [9, math.nan, 7]}),
    ],
)
def test_verdicts_follow_from_the_paired_differences(verdict, arms, higher):
    found = results(higher, dense=[9, 8, 7.1], **arms)
    (one,) = found.rounds
    assert one.verdict == verdict
    assert one.wins == (verdict == "wins")
    assert (found.winner is None) == (verdict != "wins")
    if "reinit" in arms:
        lead = one.leads["reinit"]
        expected = interval_of([a - b for a, b in zip(*list(arms.values())[:2], strict=True)], 0.95)
        assert (lead.mean, lead.half) == pytest.approx((expected.mean, expected.half))
    assert verdict.split(",")[0] in str(found)


def test_one_seed_tells_nothing():
    (one,) = results(dense=[9], ticket=[9], reinit=[1], random=[1]).rounds
    assert one.verdict == "one seed tells nothing"


def test_results_are_a_table_a_figure_and_files(tmp_path):
    found = find(seeds=2, path=tmp_path / "run")
    assert "over 2 seeds, rewound to initial weights" in str(found)
    assert found.to_markdown().count("\n") == 4
    found.save(tmp_path / "t.json")
    assert Tickets.load(tmp_path / "t.json") == Tickets.load(tmp_path / "run") == found
    with pytest.raises(RunError, match=r"Tickets.load\(directory, make_model\)"):
        Tickets.load(tmp_path / "run").model()
    loaded = Tickets.load(tmp_path / "run", make).model(1, 2)
    assert all(same(v, state_of(loaded)[k]) for k, v in state_of(found.model(1, 2)).items())
    found.figure(tmp_path / "t.svg")
    assert (tmp_path / "t.svg").stat().st_size > 1000
    with pytest.raises(RunError, match="saved as one of"):
        found.figure(tmp_path / "t.gif")
    alone = find(path=None, seeds=1)
    alone.figure(tmp_path / "one.png")  # without bands


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda d: d.pop("trials"), "'trials' is absent"),
        (lambda d: d.update(format="x"), "expected the format"),
        (lambda d: d.update(confidence=2), "confidence"),
        (lambda d: d.update(metric="other"), "no metric"),
        (lambda d: d["trials"][0].update(arm="thin"), "has an arm"),
        (lambda d: d["trials"][0].update(round=1), "has an arm"),
        (lambda d: d["trials"].append(d["trials"][0]), "two trials"),
        (lambda d: d.update(trials=d["trials"][:1]), "no ticket"),
        (lambda d: d["trials"][0].pop("seed"), "'seed' is absent"),
        (lambda d: d.update(rewound_to="early"), "rewound_to must be a int"),
    ],
)
def test_damaged_results_are_named(change, error):
    data = json.loads(results(dense=[9], ticket=[9]).to_json())
    change(data)
    with pytest.raises(RunError, match=error):
        Tickets.from_json(json.dumps(data))


# -- resuming --------------------------------------------------------------------------------------


class Killed(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("where", ["train", "evaluate", "make_model"])
@pytest.mark.parametrize("rewind", [0, 0.5])
def test_a_search_that_was_interrupted_anywhere_finds_the_same(where, rewind, tmp_path):
    expected = find(rewind=rewind, rounds=2, seeds=1)
    for at in range(0, 9, 2):
        calls = 0

        def dying(function: Any) -> Any:
            def call(*model: nn.Module) -> Any:
                nonlocal calls
                calls += 1
                result = function(*model)
                if calls == at + 1:  # noqa: B023
                    raise Killed
                return result

            return call

        functions = {"train": fit, "evaluate": loss, "make_model": make}
        functions[where] = dying(functions[where])
        path = tmp_path / str(at)
        with suppress(Killed):
            find(rewind=rewind, path=path, **functions)
        torch.manual_seed(at)
        found = find(rewind=rewind, path=path)
        assert told(found) == told(expected)
        for number in (1, 2):
            one, other = (state_of(t.model(0, number)) for t in (found, expected))
            assert all(same(one[key], other[key]) for key in one)
        again = find(of_raising, rewind=rewind, path=path)
        assert again == found


def of_raising(model: nn.Module) -> None:
    raise Killed


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)  # as conftest does: sums are the same then
import test_tickets as t
calls = 0
def train(model):
    global calls
    calls += 1
    t.fit(model)
    if calls == 4:
        os.kill(os.getpid(), signal.SIGKILL)
t.find(train, path={path!r})
"""


def test_a_search_whose_process_was_killed_finds_the_same(tmp_path):
    code = KILLED.format(tests=str(Path(__file__).parent), path=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(json.loads((tmp_path / "run.json").read_text())["trials"]) == 3
    assert told(find(path=tmp_path)) == told(find())


@pytest.fixture
def interrupted(tmp_path) -> Path:
    calls = 0

    def dying(model: nn.Module) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed
        fit(model)

    with pytest.raises(Killed):
        find(dying, path=tmp_path / "run")
    return tmp_path / "run"


def test_a_directory_of_another_search_is_refused(interrupted):
    for name, options in {
        "levels": {"rounds": 3},
        "rewind": {"rewind": 1},
        "seeds": {"seeds": 2},
        "baselines": {"baselines": ()},
        "metric": {"metric": "value"},
        "higher_is_better": {"higher_is_better": True},
    }.items():
        with pytest.raises(RunError, match=f"holds a search with other {name}"):
            find(path=interrupted, **options)
    with pytest.raises(CheckpointError, match=r"[14]\."):
        find(path=interrupted, make_model=lambda: nn.Sequential(nn.Linear(16, 24)))


@pytest.mark.parametrize("what", ["masks-001.safetensors", "masks-001.sum", "rewound", "run.json"])
def test_damaged_files_are_named(what, interrupted):
    files = [p for p in interrupted.rglob("*") if p.is_file() and what in str(p)]
    file = next(p for p in files if p.suffix != ".json" or what == "run.json")
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises((RunError, CheckpointError), match=r"damaged|truncated|not JSON"):
        find(path=interrupted)


def test_masks_stay_on_what_a_search_leaves_open():
    found = find(rounds=1)
    model = found.model()
    assert {layer.key for layer, _ in masked_layers(model)} == {"0.weight", "4.weight"}
