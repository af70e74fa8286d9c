"""Exchanges of pruned for kept weights: against brute force, by literal loops, and in models."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from by_hand import (
    QUIET,
    assert_as_it_was,
    fingerprint,
    inputs_of,
    llama_layers,
    prune,
    second_moment,
)
from families import FAMILIES
from hypothesis import find, given, settings
from hypothesis import strategies as st
from programs import exported
from torch import Tensor, nn

import torchprune
from torchprune import (
    NM,
    PCG,
    ADMMSpec,
    Block,
    MagnitudeSpec,
    RIASpec,
    SparseGPTSpec,
    Swaps,
    Unstructured,
    WandaSpec,
)
from torchprune.errors import CalibrationError, SpecError
from torchprune.masking.mask import Mask, masked_layers
from torchprune.masking.projection import project
from torchprune.methods import swaps
from torchprune.methods.swaps import swap
from torchprune.methods.wanda import wanda_score
from torchprune.specs.spec import Spec
from torchprune.testing import assert_sparsity, specs, weights

# -- oracles --------------------------------------------------------------------------------------


def errors(weight: Tensor, gram: Tensor, keep: Tensor) -> Tensor:
    """(rows,) float64: each row's part of tr(D G D^T)."""
    gone = weight.double().masked_fill(keep, 0)
    return ((gone @ gram.double()) * gone).sum(1)


def rounding(weight: Tensor, gram: Tensor) -> Tensor:
    """(rows,) what float32 cannot tell apart in a row's error: a few eps of its terms' sizes."""
    size = weight.double().abs() * gram.double().diagonal().sqrt()
    info = torch.finfo(torch.float32)
    return 16 * info.eps * size.sum(1) ** 2 + info.tiny


def allowed(keep: Tensor, pattern: Unstructured | NM, barred: Tensor) -> list[tuple[int, int]]:
    """All exchanges (pruned, kept) of one row."""
    m = pattern.m if isinstance(pattern, NM) else len(keep)
    places = range(len(keep))
    return [
        (i, j)
        for i, j in itertools.product(places, places)
        if not keep[i] and not barred[i] and keep[j] and i // m == j // m
    ]


def exchanged(keep: Tensor, i: int, j: int) -> Tensor:
    other = keep.clone()
    other[i], other[j] = True, False
    return other


def best_mask(
    weight: Tensor, gram: Tensor, keep: Tensor, pattern: Unstructured | NM, barred: Tensor
) -> float:
    """The least error of one row over all masks with the counts of `keep`."""
    m = pattern.m if isinstance(pattern, NM) else len(keep)
    choices = []
    for at in range(0, len(keep), m):
        free = [c for c in range(at, at + m) if not barred[c]]
        choices.append(itertools.combinations(free, int(keep[at : at + m].sum())))
    some = [list(itertools.chain(*choice)) for choice in itertools.product(*choices)]
    masks = torch.zeros(len(some), len(keep), dtype=torch.bool)
    for mask, kept in zip(masks, some, strict=True):
        mask[kept] = True
    return float(errors(weight.expand(len(masks), -1), gram, masks).min())


def by_loops(
    weight: Tensor, gram: Tensor, keep: Tensor, pattern: Unstructured | NM, rounds: int, few: int
) -> Tensor:
    """The documented search of one row in float64, each change of the error computed anew."""
    w, g, keep = weight.double(), gram.double(), keep.clone()
    none = torch.zeros_like(keep)

    def error(mask: Tensor) -> float:
        gone = w.masked_fill(mask, 0)
        return float(gone @ g @ gone)

    for _ in range(rounds):
        before = error(keep)
        toggled = []
        for c in range(len(w)):
            other = keep.clone()
            other[c] = ~other[c]
            toggled.append(error(other) - before)
        pairs = allowed(keep, pattern, none)
        if isinstance(pattern, NM):
            best: dict[int, tuple[float, tuple[int, int]]] = {}
            for i, j in pairs:
                change = error(exchanged(keep, i, j)) - before
                if i // pattern.m not in best or change < best[i // pattern.m][0]:
                    best[i // pattern.m] = (change, (i, j))
            pairs = [pair for _, pair in sorted(best.values())[:few]]
        else:
            change_of = {(i, j): error(exchanged(keep, i, j)) - before for i, j in pairs}
            cheap = min({j for _, j in pairs}, key=lambda c: toggled[c])
            restored = sorted({i for i, _ in pairs}, key=lambda i: change_of[i, cheap])[:few]
            first = restored[0]
            pruned = sorted({j for _, j in pairs}, key=lambda j: change_of[first, j])[:few]
            pairs = list(itertools.product(restored, pruned))
        start = keep
        while pairs:
            now = error(keep)
            change, (i, j) = min((error(exchanged(keep, *pair)) - now, pair) for pair in pairs)
            if change >= -1e-9 * before:
                break
            keep = exchanged(keep, i, j)
            pairs = [(a, b) for a, b in pairs if a != i and b != j]
        if torch.equal(start, keep):
            break
    return keep


# -- layers to try --------------------------------------------------------------------------------


def inputs(rows: int, cols: int, seed: int) -> Tensor:
    """Correlated inputs of different sizes, one of them dead, two equal."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=g)
    x = torch.randn(rows, cols, generator=g) @ mix * torch.rand(cols, generator=g).exp()
    if cols > 3:
        x[:, seed % cols] = 0
        x[:, (seed + 1) % cols] = x[:, (seed + 2) % cols]
    return x


@st.composite
def layers(draw: st.DrawFn, widest: int) -> dict[str, Any]:
    """Arguments of `swap` with awkward weights, any mask of the pattern, some weights barred."""
    pattern = draw(st.sampled_from([Unstructured(), NM(2, 4), NM(1, 4), NM(3, 8), NM(1, 2)]))
    unit = pattern.m if isinstance(pattern, NM) else 1
    weight = draw(weights(rows=(1, 4), cols=(1, widest), multiple_of=(1, unit)))
    seed = draw(st.integers(0, 10**6))
    g = torch.Generator().manual_seed(seed)
    x = inputs(draw(st.sampled_from([2, 5, 40])), weight.shape[1], seed)
    keep = project(
        torch.rand(weight.shape, generator=g), pattern, draw(st.integers(0, 10)) / 10, "layer"
    )
    barred = (torch.rand(weight.shape, generator=g) < draw(st.sampled_from([0, 0.3]))) & ~keep
    return {
        "weight": weight.masked_fill(barred, 0),
        "gram": second_moment(x),
        "keep": keep,
        "pattern": pattern,
        "barred": barred,
    }


@settings(max_examples=150)
@given(layers(widest=40), st.sampled_from([1, 2, 50]))
def test_the_error_never_rises_and_counts_stay(layer: dict[str, Any], rounds: int) -> None:
    weight, gram, start = layer["weight"], layer["gram"], layer["keep"]
    before = start.clone()
    keep = swap(**layer, rounds=rounds)
    assert keep.dtype == torch.bool
    assert torch.equal(start, before)
    m = layer["pattern"].m if isinstance(layer["pattern"], NM) else weight.shape[1]
    assert torch.equal(keep.unflatten(1, (-1, m)).sum(2), start.unflatten(1, (-1, m)).sum(2))
    assert not bool((keep & layer["barred"]).any())
    exact = 1e-8 * rounding(weight, gram)
    assert bool((errors(weight, gram, keep) <= errors(weight, gram, start) + exact).all())


@settings(max_examples=60)
@given(layers(widest=9))
def test_in_the_end_no_exchange_helps_and_the_best_mask_bounds_it(layer: dict[str, Any]) -> None:
    weight, gram, pattern = layer["weight"], layer["gram"], layer["pattern"]
    keep = swap(**layer, rounds=1000)
    found, tolerance = errors(weight, gram, keep), rounding(weight, gram)
    for row in range(len(weight)):
        w, barred = weight[row], layer["barred"][row]
        for i, j in allowed(keep[row], pattern, barred):
            other = errors(w[None], gram, exchanged(keep[row], i, j)[None])
            assert float(other) >= float(found[row] - tolerance[row])
        best = best_mask(w, gram, keep[row], pattern, barred)
        assert best <= float(found[row]) + float(tolerance[row]) * 1e-6


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(5, 8)], ids=str)
def test_in_wide_rows_of_groups_too_no_exchange_helps(pattern: NM) -> None:
    g = torch.Generator().manual_seed(3)
    weight, gram = torch.randn(2, 96, generator=g), second_moment(inputs(300, 96, 5))
    keep = project(weight.abs(), pattern, 0.5, "row")
    keep = swap(weight, gram, keep, pattern, 1000)
    found, tolerance = errors(weight, gram, keep), rounding(weight, gram)
    for row in range(len(weight)):
        for i, j in allowed(keep[row], pattern, torch.zeros(96, dtype=torch.bool)):
            other = errors(weight[row, None], gram, exchanged(keep[row], i, j)[None])
            assert float(other) >= float(found[row] - tolerance[row])


@pytest.mark.parametrize("few", [1, 3, 16])
@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), NM(3, 8)], ids=str)
def test_the_search_is_the_documented_one(
    pattern: Unstructured | NM, rounds: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swaps, "_CANDIDATES", few)
    g = torch.Generator().manual_seed(few)
    weight = torch.randn(4, 40, generator=g)
    gram = second_moment(torch.randn(90, 40, generator=g) @ torch.randn(40, 40, generator=g))
    start = project(wanda_score(weight, gram.diagonal()), pattern, 0.5, "row")
    keep = swap(weight, gram, start, pattern, rounds)
    for w, before, after in zip(weight, start, keep, strict=True):
        assert torch.equal(after, by_loops(w, gram, before, pattern, rounds, few))
    assert bool((keep != start).any(1).all())


def test_weights_that_cancel_are_pruned_together() -> None:
    # Two equal inputs: the weights 1 and -1 on them do nothing together.
    gram = torch.eye(4)
    gram[0, 1] = gram[1, 0] = 1.0
    weight = torch.tensor([[1.0, -1.0, 0.5, 2.0]])
    wanda = project(wanda_score(weight, gram.diagonal()), Unstructured(), 0.5, "row")
    assert wanda.tolist() == [[False, True, False, True]]
    assert errors(weight, gram, wanda).tolist() == [1.25]
    keep = swap(weight, gram, wanda, Unstructured(), 1)
    assert keep.tolist() == [[False, False, True, True]]
    assert errors(weight, gram, keep).tolist() == [0.0]


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([Unstructured(), NM(2, 4), NM(1, 8)]))
def test_on_uncorrelated_inputs_the_end_is_wandas_mask(
    seed: int, pattern: Unstructured | NM
) -> None:
    g = torch.Generator().manual_seed(seed)
    weight, square = torch.randn(5, 64, generator=g), torch.rand(64, generator=g) + 0.1
    random = project(torch.rand(5, 64, generator=g), pattern, 0.5, "row")
    wanda = project(wanda_score(weight, square), pattern, 0.5, "row")
    found = swap(weight, square.diag(), random, pattern, 1000)
    # Scores that differ by less than rounding may change places.
    assert torch.allclose(
        errors(weight, square.diag(), found), errors(weight, square.diag(), wanda), rtol=1e-3
    )
    assert torch.equal(swap(weight, square.diag(), wanda, pattern, 1000), wanda)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)], ids=str)
def test_ties_and_dead_layers_change_nothing(pattern: Unstructured | NM) -> None:
    keep = project(torch.rand(3, 24), pattern, 0.5, "row")
    ones, zeros = torch.ones(3, 24), torch.zeros(24, 24)
    assert torch.equal(swap(ones, torch.eye(24), keep, pattern, 10), keep)
    assert torch.equal(swap(ones, torch.ones(24, 24), keep, pattern, 10), keep)
    assert torch.equal(swap(torch.randn(3, 24), zeros, keep, pattern, 10), keep)
    assert torch.equal(swap(torch.zeros(3, 24), torch.eye(24), keep, pattern, 10), keep)
    for full in (torch.ones_like(keep), torch.zeros_like(keep)):
        assert torch.equal(swap(torch.randn(3, 24), torch.eye(24), full, pattern, 10), full)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)], ids=str)
def test_no_round_raises_an_error_that_is_rounding_itself(pattern: Unstructured | NM) -> None:
    # Nearly one input, weights of both signs: what a row loses is far below its terms' rounding.
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 1, generator=g) + 1e-4 * torch.randn(300, 64, generator=g)
    weight, gram = torch.randn(64, 64, generator=g).sign(), second_moment(x)
    keep = project(torch.rand(64, 64, generator=g), pattern, 0.5, "row")
    for _ in range(12):
        better = swap(weight, gram, keep, pattern, 1)
        assert bool((errors(weight, gram, better) <= errors(weight, gram, keep)).all())
        keep = better


def test_weights_on_dead_inputs_go_first() -> None:
    gram = torch.eye(8)
    gram[2, 2] = gram[5, 5] = 0
    keep = torch.tensor([[True] * 6 + [False] * 2])
    found = swap(torch.full((1, 8), 3.0), gram, keep, Unstructured(), 10)
    assert (~found).nonzero()[:, 1].tolist() == [2, 5]


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)], ids=str)
def test_rows_taken_in_parts_give_the_same_mask(
    pattern: Unstructured | NM, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    weight, gram = torch.randn(23, 48, generator=g), second_moment(inputs(200, 48, 1))
    barred = torch.rand(23, 48, generator=g) < 0.1
    start = project(weight.abs().masked_fill(barred, -1), pattern, 0.5, "row") & ~barred
    whole = swap(weight, gram, start, pattern, 50, barred)
    monkeypatch.setattr(swaps, "_AT_ONCE", 5 * 4 * 16**2)
    assert torch.equal(swap(weight, gram, start, pattern, 50, barred), whole)
    order = torch.randperm(23, generator=g)
    turned = swap(weight[order], gram, start[order], pattern, 50, barred[order])
    assert torch.equal(turned, whole[order])
    assert not torch.equal(whole, start)


def test_a_common_factor_and_a_channels_scale_change_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    weight, gram = torch.randn(6, 48, generator=g), second_moment(inputs(200, 48, 1))
    start = project(wanda_score(weight, gram.diagonal()), Unstructured(), 0.5, "row")
    found = swap(weight, gram, start, Unstructured(), 50)
    scale = 2.0 ** torch.randint(-3, 4, (48,), generator=g)
    scaled = 4 * gram * scale * scale[:, None]
    assert torch.equal(swap(weight / scale, scaled, start, Unstructured(), 50), found)


# -- through sparsify -----------------------------------------------------------------------------


def masks_and_records(model: nn.Module) -> dict[str, Mask]:
    return {layer.key: mask for layer, mask in masked_layers(model)}


def relative_errors(weight: Tensor, xs: list[Tensor], keep: Tensor) -> float:
    x = torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]).double()
    gone = weight.double().masked_fill(keep, 0)
    return float((x @ gone.T).square().sum() / (x @ weight.double().T).square().sum())


SPECS: list[type[Spec]] = [MagnitudeSpec, WandaSpec, RIASpec]


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("kind", SPECS)
def test_llama_keeps_its_bits_and_loses_less(kind: type[Spec], pattern: str) -> None:
    family = FAMILIES["llama"]
    dense, data = family.make(), family.data()
    dense_pass: dict[str, Any] = {"sequential": "none"}
    plain = prune(
        family.make(),
        kind(pattern=pattern, **(dense_pass if kind is not MagnitudeSpec else {})),
        data,
    )
    model = prune(family.make(), kind(pattern=pattern, refine="swaps", **dense_pass), data)
    names = [name for block in llama_layers() for name in block]
    found = inputs_of(dense, names, data)
    before, after = masks_and_records(plain), masks_and_records(model)
    assert list(after) == [f"{name}.weight" for name in names]
    original = dense.state_dict()
    for name, xs in found.items():
        key = f"{name}.weight"
        weight, mask = original[key], after[key]
        kept = model.get_submodule(name).weight.detach()
        assert torch.equal(kept, torch.where(mask.mask, weight, 0))
        assert torch.equal(mask.mask.sum(1), before[key].mask.sum(1))
        assert not mask.record.updates_weights
        lost = relative_errors(weight, xs, mask.mask)
        assert mask.record.error == pytest.approx(lost, rel=1e-4)
        assert lost < relative_errors(weight, xs, before[key].mask)
    assert_sparsity(model, pattern, 0.5, scope=kind.scopes[0])
    torchprune.densify(model)
    assert all(torch.equal(v, original[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)], ids=str)
def test_a_layer_gets_the_mask_of_its_second_moment(pattern: Unstructured | NM) -> None:
    layer, x = nn.Linear(48, 10), inputs(400, 48, 1)
    weight, gram = layer.weight.detach().clone(), second_moment(x)
    start = project(wanda_score(weight, gram.diagonal()), pattern, 0.5, "row")
    prune(layer, WandaSpec(pattern=pattern, refine=Swaps(2)), list(x.split(100)))
    dead = (gram.diagonal() == 0).expand_as(start)  # what is pruned of it stays so
    assert bool(dead.any())
    better = swap(weight, gram, start, pattern, 2, dead)
    assert torch.equal(torchprune.masks(layer)["weight"], better)


def test_every_layer_sees_the_layers_before_it_pruned() -> None:
    model, data = FAMILIES["mlp"].make(), FAMILIES["mlp"].data()
    one = prune(copy.deepcopy(model), WandaSpec(refine=Swaps(7)), data)
    for name in ("0", "2", "4"):
        # The others as they came out: what this layer read.
        alone = torchprune.fold(copy.deepcopy(one))
        alone.get_submodule(name).weight.data = model.get_submodule(name).weight.data.clone()
        prune(alone, WandaSpec(refine=Swaps(7), targets=name), data)
        mask = masks_and_records(alone)[f"{name}.weight"]
        assert torch.equal(mask.mask, masks_and_records(one)[f"{name}.weight"].mask)


@pytest.mark.parametrize("kind", [MagnitudeSpec, WandaSpec])
def test_a_global_budget_stays_as_it_was_given_to_rows(kind: type[Spec]) -> None:
    model, data = FAMILIES["mlp"].make(), FAMILIES["mlp"].data()
    plain = prune(copy.deepcopy(model), kind(scope="global", sparsity=0.6), data)
    prune(model, kind(scope="global", sparsity=0.6, refine="swaps"), data)
    assert_sparsity(model, "unstructured", 0.6, scope="global")
    before, after = masks_and_records(plain), masks_and_records(model)
    assert all(torch.equal(m.mask.sum(1), before[k].mask.sum(1)) for k, m in after.items())
    assert any(not torch.equal(m.mask, before[k].mask) for k, m in after.items())


@pytest.mark.parametrize("pattern", ["unstructured", "1:4"])
def test_what_was_pruned_before_stays_pruned(pattern: str) -> None:
    model, data = FAMILIES["mlp"].make(), FAMILIES["mlp"].data()
    state = copy.deepcopy(model.state_dict())
    prune(model, MagnitudeSpec(sparsity=0.25, scope="row"))
    earlier = {k: m.mask.clone() for k, m in masks_and_records(model).items()}
    prune(model, WandaSpec(pattern=pattern, refine="swaps"), data)
    for key, mask in masks_and_records(model).items():
        assert not bool((mask.mask & ~earlier[key]).any())
    assert_sparsity(model, pattern, exact=False)
    torchprune.densify(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_convolutions_and_experts() -> None:
    model, data = FAMILIES["resnet"].make(), FAMILIES["resnet"].data(count=1)
    prune(model, WandaSpec(pattern="2:4", refine="swaps"), data)
    assert_sparsity(model, "2:4")
    model = FAMILIES["mixtral"].make()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        prune(model, WandaSpec(refine="swaps"), [torch.tensor([[5]])])  # two experts of four
    assert any("pruned by magnitude" in str(w.message) for w in found)
    assert_sparsity(model, "unstructured", 0.5, scope="row")
    assert not any(m.record.updates_weights for m in masks_and_records(model).values())


def test_half_precision_keeps_its_bits() -> None:
    family = FAMILIES["mlp"]
    model, data = family.make(torch.bfloat16), family.data(torch.bfloat16)
    state = copy.deepcopy(model.state_dict())
    prune(model, WandaSpec(refine="swaps"), data)
    for key, mask in masks_and_records(model).items():
        weight = model.get_submodule(key.removesuffix(".weight")).weight
        assert torch.equal(weight, torch.where(mask.mask, state[key], 0))


def test_reconstruction_trains_what_the_swaps_kept() -> None:
    model, data = FAMILIES["mlp"].make(), FAMILIES["mlp"].data()
    only = prune(copy.deepcopy(model), WandaSpec(refine="swaps", targets="0"), data)
    spec = WandaSpec(
        refine="swaps", targets="0", reconstruct=torchprune.Reconstruct(epochs=2, alpha=0.0)
    )
    prune(model, spec, data)
    mask, other = masks_and_records(model)["0.weight"], masks_and_records(only)["0.weight"]
    assert torch.equal(mask.mask, other.mask)
    assert mask.record.updates_weights
    assert not other.record.updates_weights


@pytest.mark.filterwarnings("ignore")  # of torch.export
@pytest.mark.parametrize("kind", [MagnitudeSpec, WandaSpec])
def test_programs_get_the_masks_of_the_model(kind: type[Spec]) -> None:
    model, data = FAMILIES["mlp"].make(), FAMILIES["mlp"].data()
    program = torchprune.sparsify(exported(model, data[0]), kind(refine="swaps"), data, **QUIET)
    prune(model, kind(refine="swaps"), data)
    with torch.no_grad():
        assert torch.equal(program.module()(data[0]), model(data[0]))
    with pytest.raises(CalibrationError, match="needs calibration data"):
        torchprune.sparsify(exported(model, data[0]), kind(refine="swaps"), **QUIET)


# -- the option -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPECS)
def test_swaps_leave_weights_unchanged_and_need_the_second_moment(kind: type[Spec]) -> None:
    spec = kind(refine="swaps")
    assert spec.refine == Swaps() == Swaps(rounds=50)
    assert spec.needs_data
    assert spec.needs_gram
    assert not spec.changes_weights
    assert kind(refine="swaps", reconstruct=True).changes_weights
    assert kind(refine="pcg").changes_weights


@pytest.mark.parametrize("refine", ["swaps", Swaps(3)], ids=str)
@pytest.mark.parametrize("kind", [SparseGPTSpec, ADMMSpec])
def test_methods_that_change_weights_refuse_swaps(kind: type[Spec], refine: Any) -> None:
    with pytest.raises(SpecError, match=rf"^{kind.__name__}: Swaps .* {kind.method} changes them"):
        kind(refine=refine)


@pytest.mark.parametrize(
    "options",
    [{"pattern": "block:2x2"}, {"overrides": {"0": Block(1, 4)}}],
    ids=["pattern", "override"],
)
def test_blocks_refuse_swaps(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"^WandaSpec: Swaps exchanges single weights, and block:"):
        WandaSpec(refine="swaps", **options)
    assert WandaSpec(refine="pcg", **options).refine == PCG()


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(SpecError, match=r'alpha .* wanda changes none; use refine="pcg"'):
        WandaSpec(refine="swaps", alpha=0.5)
    with pytest.raises(SpecError, match=r'"pcg", a PCG\(...\), "swaps", a Swaps\(...\) or None'):
        WandaSpec(refine="swap")
    with pytest.raises(SpecError, match=r"Swaps: rounds must be a whole number above 0, got 0"):
        Swaps(rounds=0)
    with pytest.raises(SpecError, match=r"Swaps has no option 'round'.*rounds"):
        Swaps(round=3)  # type: ignore[call-arg]


def test_a_refused_call_leaves_the_model() -> None:
    model, data = FAMILIES["mlp"].make(), FAMILIES["mlp"].data()
    before = fingerprint(model)
    with pytest.raises(CalibrationError, match="MagnitudeSpec needs calibration data"):
        prune(model, MagnitudeSpec(refine="swaps"))
    assert_as_it_was(model, before)
    model.get_submodule("2").weight.data[1, 1] = float("inf")
    before = fingerprint(model)
    with pytest.raises(SpecError, match=r"^2: its weight holds inf or NaN"):
        prune(model, WandaSpec(refine="swaps"), data)
    assert_as_it_was(model, before)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria"])
def test_strategies_draw_swaps(method: str) -> None:
    found = find(
        specs(methods=[method]),
        lambda spec: isinstance(spec.refine, Swaps),
        settings=settings(max_examples=1000, database=None),
    )
    assert not found.changes_weights
