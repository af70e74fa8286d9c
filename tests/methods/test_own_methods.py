"""Methods of the user's own: the same bits as ours where they compute the same, and distrust."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from families import FAMILIES
from saved import QUIET, reseal, state
from torch import Tensor, nn

import torchprune
from torchprune import (
    NM,
    ADMMSpec,
    MagnitudeSpec,
    RIASpec,
    ScoreSpec,
    SolverSpec,
    SparseGPTSpec,
    WandaSpec,
)
from torchprune.errors import SpecError
from torchprune.masking.projection import project
from torchprune.methods.custom import plain_share
from torchprune.reports.report import runs_of
from torchprune.specs.functions import FunctionName, described, function_name
from torchprune.specs.method import GroupMoments
from torchprune.specs.patterns import prune_count
from torchprune.specs.spec import Spec
from torchprune.testing import check_laws


def wanda(weight: Tensor, moments: Any) -> Tensor:
    return weight.abs() * moments.square.sqrt()


def magnitude(weight: Tensor, moments: Any) -> Tensor:
    return weight.abs()


def spread_out(weight: Tensor, moments: Any) -> Tensor:
    """By the inputs' deviation, what the mean and the squares are for."""
    variance = moments.square / moments.rows - moments.mean.square()
    return weight.abs() * variance.clamp_min(0).sqrt()


def by_diagonal(weight: Tensor, moments: Any) -> Tensor:
    """Wanda from the whole second moment."""
    return weight.abs() * moments.gram.diagonal().sqrt()


def masked_only(weight: Tensor, moments: Any, pattern: Any, sparsity: float) -> Any:
    """Wanda as a solver, by rows."""
    return weight, project(wanda(weight, moments), pattern, sparsity, "row")


def refitted(weight: Tensor, moments: Any, pattern: Any, sparsity: float) -> Any:
    """Wanda's mask, and for each row what stays refitted exactly."""
    mask = project(wanda(weight, moments), pattern, sparsity, "row")
    gram = moments.gram.double()
    gram.diagonal().add_(0.1 * gram.diagonal().mean() + 1e-6)
    wanted, new = weight.double() @ gram, torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        new[row, kept] = torch.linalg.solve(gram[kept][:, kept], wanted[row, kept]).float()
    return new, mask


def pruned(family: str, spec: Spec, earlier: Spec | None = None) -> nn.Module:
    model, data = FAMILIES[family].make(), FAMILIES[family].data()
    for each in (earlier, spec) if earlier else (spec,):
        torchprune.sparsify(model, each, data, **QUIET)
    return model


def assert_same(one: nn.Module, two: nn.Module) -> None:
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    assert [k for k in first if not torch.equal(first[k], second[k])] == []


# -- a method is one file -------------------------------------------------------------------------


def test_no_file_but_its_own_knows_a_method_by_its_class() -> None:
    root = Path(torchprune.__file__).parent
    public = [getattr(torchprune, name) for name in torchprune.__all__]
    methods = [k for k in public if isinstance(k, type) and issubclass(k, Spec)]
    assert len(methods) >= 8
    names: dict[Path, set[str]] = {}
    for path in root.rglob("*.py"):
        if path not in (root / "__init__.py", root / "testing" / "strategies.py"):
            nodes = ast.walk(ast.parse(path.read_text("utf-8")))
            names[path] = {node.id for node in nodes if isinstance(node, ast.Name)}
    known = {
        (path.relative_to(root).as_posix(), kind.__name__)
        for path, found in names.items()
        for kind in methods
        if kind.__name__ in found and kind.__module__ != f"torchprune.methods.{path.stem}"
    }
    # One method builds on another; `assert_sparsity` reads a goal and the usual choice of layers;
    # the law of dead inputs spares the method that looks at no inputs.
    assert known == {
        ("methods/best.py", "ADMMSpec"),
        ("testing/assertions.py", "MagnitudeSpec"),
        ("testing/laws.py", "MagnitudeSpec"),
    }
    assert all(kind.__module__.startswith("torchprune.methods.") for kind in methods)


def test_the_command_line_offers_every_method_that_has_a_word_for_it() -> None:
    from torchprune.cli.spec import Method, spec_of

    public = [getattr(torchprune, name) for name in torchprune.__all__]
    kinds = {k.method: k for k in public if isinstance(k, type) and issubclass(k, Spec)}
    del kinds["score"], kinds["solver"]  # these take functions
    assert {method.value: spec_of(method) for method in Method} == kinds


@dataclass(frozen=True)
class ColumnSpec(Spec):
    """What a new file would hold: whole inputs go, the quietest first."""

    method: ClassVar[str] = "columns of a test"
    scopes: ClassVar[tuple[str, ...]] = ("row",)

    def scores(self, weight: Tensor, moments: GroupMoments) -> Tensor:
        return moments.square.sqrt().expand(weight.shape)


def test_a_class_of_its_own_is_all_that_a_method_needs(tmp_path: Path) -> None:
    spec = ColumnSpec(sparsity=0.25)
    check_laws(FAMILIES["mlp"].make, spec, FAMILIES["mlp"].data())
    model = pruned("llama", spec)
    mask = next(iter(torchprune.masks(model).values()))
    assert torch.equal(mask, mask[:1].expand(mask.shape))
    torchprune.save(model, tmp_path)
    loaded = torchprune.load(tmp_path)
    assert [run.spec for run in runs_of(loaded)] == [spec]
    assert torchprune.report(loaded).layers[0].method == "columns of a test"


# -- the same bits as ours ------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"sparsity": 0.63},
    {"sparsity": 0.4, "scope": "layer"},
    {"sparsity": 0.4, "scope": "global"},
    {"pattern": "2:4"},
    {"pattern": "block:2x2", "sparsity": 0.4},
    {"pattern": "2:4", "refine": "swaps"},
    {"refine": "pcg", "alpha": 0.5},
    {"allocation": "error"},
    {"overrides": {"*": 0.25}},
]
FAMILY = ["mlp", "resnet", "mixtral", "gpt2", "bert"]


@pytest.mark.parametrize("at", range(len(ROWS)))
def test_a_wanda_of_ones_own_is_ours_to_the_bit(at: int) -> None:
    options = ROWS[at]
    for family in (FAMILY[at % 5], FAMILY[(at + 2) % 5]):
        ours = pruned(family, WandaSpec(**options))
        own = pruned(family, ScoreSpec(score=wanda, **options))
        assert_same(own, ours)
        one, two = torchprune.report(own).to_dict(), torchprune.report(ours).to_dict()
        for layer in one["layers"]:
            assert layer.pop("method") == f"{__name__}.wanda"
        for layer in two["layers"]:
            layer.pop("method")
        assert one["layers"] == two["layers"]


def test_what_is_trained_afterwards_is_the_same_too() -> None:
    options: dict[str, Any] = {"pattern": "2:4", "reconstruct": torchprune.Reconstruct(epochs=1)}
    ours = pruned("mlp", WandaSpec(**options))
    assert_same(pruned("mlp", ScoreSpec(score=wanda, **options)), ours)


@pytest.mark.parametrize("options", [{}, {"pattern": "2:4"}, {"scope": "global"}], ids=str)
def test_a_score_that_needs_nothing_takes_no_data(options: dict[str, Any]) -> None:
    spec = ScoreSpec(score=magnitude, needs="nothing", **{"scope": "layer", **options})
    model = torchprune.sparsify(FAMILIES["mixtral"].make(), spec)
    ours = torchprune.sparsify(
        FAMILIES["mixtral"].make(), MagnitudeSpec(**{"scope": "layer", **options})
    )
    assert_same(model, ours)
    for refine in ("pcg", "swaps"):
        more = replace(spec, refine=refine, sequential=None)
        ours = pruned("mlp", MagnitudeSpec(refine=refine, **{"scope": "layer", **options}))
        assert_same(pruned("mlp", more), ours)


def test_a_score_that_needs_nothing_decides_where_no_token_came_too() -> None:
    def largest_go(weight: Tensor, moments: Any) -> Tensor:
        return 1 / (1 + weight.abs())

    model = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    weight = model["idle"].weight.detach().clone()
    spec = ScoreSpec(score=largest_go, needs="nothing", refine="pcg")
    with pytest.warns(UserWarning, match=r"^idle: no calibration batch .* by .*largest_go$"):
        torchprune.sparsify(model, spec, [torch.randn(9, 8)], **QUIET)
    kept = torchprune.masks(model)["idle.weight"]
    assert float(weight[kept].abs().sum()) < float(weight[~kept].abs().sum())
    assert torchprune.report(model).layers[1].method == spec.label


@pytest.mark.parametrize("family", ["mlp", "mixtral"])
def test_a_score_of_the_second_moment(family: str) -> None:
    spec = ScoreSpec(score=by_diagonal, needs="gram")
    assert_same(pruned(family, spec), pruned(family, WandaSpec()))
    for allocation in ("owl", "error"):  # whose errors are then exact
        model = pruned(family, replace(spec, allocation=allocation))
        assert torchprune.report(model).sparsity == pytest.approx(0.5, abs=0.01)


def test_permuting_goes_by_the_own_score() -> None:
    options: dict[str, Any] = {"pattern": "2:4", "permute": True}
    ours = pruned("mlp", WandaSpec(**options))
    for score, needs in ((wanda, "square"), (by_diagonal, "gram")):
        own = ScoreSpec(score=score, needs=needs, **options)
        assert_same(pruned("mlp", own), ours)
    check_means = ScoreSpec(score=spread_out, **options)
    assert torchprune.report(pruned("mlp", check_means)).sparsity == 0.5


def test_search_goes_by_the_own_score() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(*batch).square().mean()

    search = torchprune.Search(generations=2, offspring=2, loss=loss)
    ours = pruned("mlp", WandaSpec(allocation=search))
    assert_same(pruned("mlp", ScoreSpec(score=wanda, allocation=search)), ours)


def test_masks_grow_by_the_own_score() -> None:
    for options in ({"sparsity": 0.6}, {"pattern": "2:4"}):
        earlier = MagnitudeSpec(0.3, scope="row")
        ours = pruned("resnet", WandaSpec(**options), earlier)
        assert_same(pruned("resnet", ScoreSpec(score=wanda, **options), earlier), ours)


def test_a_solver_that_only_masks_is_wanda() -> None:
    for family, options in (("mlp", {"sparsity": 0.63}), ("mixtral", {"pattern": "2:4"})):
        one = pruned(family, SolverSpec(solve=masked_only, **options))
        two = pruned(family, WandaSpec(**options))
        for key, mask in torchprune.masks(two).items():
            assert torch.equal(torchprune.masks(one)[key], mask), key
    one = pruned("mlp", SolverSpec(solve=masked_only, refine="pcg"))
    assert_same(one, pruned("mlp", WandaSpec(refine="pcg")))  # refitted from the same start


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.6},
        {"pattern": "2:4"},
        {"pattern": "block:2x2"},
        {"refine": "pcg"},
        {"alpha": 0.5},
        {"allocation": "error", "sparsity": 0.3},
        {"pattern": "2:4", "permute": True},
        {"sequential": "block"},
        {"reconstruct": torchprune.Reconstruct(epochs=1)},
    ],
    ids=str,
)
def test_a_solver_loses_less_than_its_mask_alone(options: dict[str, Any]) -> None:
    def lost(spec: Spec) -> float:
        report = torchprune.report(pruned("mlp", spec))
        return sum(layer.error or 0.0 for layer in report.layers)

    own = SolverSpec(solve=refitted, **options)
    plain = {k: v for k, v in options.items() if k not in ("refine", "alpha")}
    assert 0 < lost(own) < lost(WandaSpec(**plain))


def test_a_solver_in_a_program_and_where_no_token_came() -> None:
    data = FAMILIES["mlp"].data()
    program = torch.export.export(FAMILIES["mlp"].make(), (data[0],))
    for own, ours in (
        (ScoreSpec(score=wanda, pattern="2:4"), WandaSpec(pattern="2:4")),
        (ScoreSpec(score=by_diagonal, needs="gram"), WandaSpec()),
        (
            ScoreSpec(score=magnitude, needs="nothing", scope="global"),
            MagnitudeSpec(scope="global"),
        ),
        (SolverSpec(solve=masked_only, refine="pcg"), WandaSpec(refine="pcg")),
    ):
        one, two = (torchprune.sparsify(program, spec, data, **QUIET) for spec in (own, ours))
        for key, value in two.state_dict.items():
            assert torch.equal(one.state_dict[key], value), key
    spec = ScoreSpec(score=spread_out)
    run = torchprune.sparsify(program, spec, data, **QUIET).module()
    assert torch.equal(run(data[0]), pruned("mlp", spec)(data[0]))
    idle = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    idle.forward = lambda x: idle["used"](x)  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="no calibration batch reached it: pruned by magnitude"):
        torchprune.sparsify(idle, SolverSpec(solve=refitted), [torch.randn(9, 8)], **QUIET)
    assert torchprune.report(idle).layers[1].method == "magnitude"


# -- laws -----------------------------------------------------------------------------------------

LAWFUL: list[Spec] = [
    ScoreSpec(score=wanda, sparsity=0.63),
    ScoreSpec(score=spread_out, pattern="2:4", refine="swaps"),
    ScoreSpec(score=by_diagonal, needs="gram", scope="global"),
    ScoreSpec(score=spread_out, allocation="error"),
    SolverSpec(solve=refitted, pattern="block:4x2"),
    SolverSpec(solve=refitted, alpha=0.5, refine="pcg"),
    SolverSpec(solve=refitted, allocation="owl", sparsity=0.3),
]


@pytest.mark.parametrize("spec", LAWFUL, ids=[f"{s.method}{i}" for i, s in enumerate(LAWFUL)])
def test_the_laws_hold_for_methods_of_ones_own(spec: Spec) -> None:
    family = FAMILIES["mlp"]
    check_laws(family.make, spec, family.data())


def test_what_the_function_does_to_its_arguments_stays_with_it() -> None:
    def vandal(weight: Tensor, moments: Any) -> Tensor:
        score = wanda(weight, moments)
        weight.zero_()
        for each in (moments.square, moments.gram, moments.mean):
            each.numpy()[:] = 7  # what no version counter sees
        return score

    model = pruned("mixtral", ScoreSpec(score=vandal, needs="gram"))
    assert_same(model, pruned("mixtral", WandaSpec()))


# -- what is refused ------------------------------------------------------------------------------


def give(value: Callable[[Tensor], Any]) -> ScoreSpec:
    return ScoreSpec(score=lambda weight, moments: value(weight))


def solve(value: Callable[[Tensor, Tensor], Any], **options: Any) -> SolverSpec:
    def solver(weight: Tensor, moments: Any, pattern: Any, sparsity: float) -> Any:
        return value(weight, project(weight.abs(), pattern, sparsity, "row"))

    return SolverSpec(solve=solver, **options)


def toggled(mask: Tensor, *places: tuple[int, int]) -> Tensor:
    for place in places:
        mask[place] = ~mask[place]
    return mask


def uneven(mask: Tensor) -> Tensor:
    mask[3] = torch.arange(len(mask[3])) < 3
    return mask


WRONG: list[tuple[Spec, str]] = [
    (give(lambda w: w.abs().tolist()), "must be a tensor, got list"),
    (give(lambda w: w.abs()[:, 1:]), r"must have the weight's shape \(24, 16\), got \(24, 15\)"),
    (give(lambda w: w.abs().mean(0)), r"got \(16,\)"),
    (give(lambda w: w.abs() > 0), "must be of a floating dtype, got torch.bool"),
    (give(lambda w: w.abs().to("meta")), "must be on cpu, got meta"),
    (give(lambda w: w.abs().log()), "hold negative numbers, down to -"),
    (give(lambda w: w.abs() * torch.nan), "hold NaN at 384 places"),
    (solve(lambda w, k: k), r"must return a pair \(weight, mask\), got Tensor"),
    (solve(lambda w, k: (w.T, k)), r"the weight that .* shape \(24, 16\), got \(16, 24\)"),
    (solve(lambda w, k: (w.long(), k)), "the weight .* must be of a floating dtype, got torch.int"),
    (solve(lambda w, k: (w, k.float())), "the mask .* must be of torch.bool, got torch.float32"),
    (solve(lambda w, k: (w / 0, k)), "keeps weights that are inf or NaN"),
    (solve(lambda w, k: (w, uneven(k))), "keeps 3 weights in row 3, expected 8 .* 1 of 24 places"),
    (solve(lambda w, k: (w, ~k), sparsity=0.25), "keeps 4 weights in row 0, expected 12"),
    (solve(lambda w, k: (w, uneven(k)), scope="layer"), "keeps 187 weights in all, expected 192"),
    (
        solve(lambda w, k: (w, uneven(k)), pattern="2:4"),
        r"keeps 3 weights in row 3, group 0, expected 2 \(2:4",
    ),
    (
        solve(lambda w, k: (w, toggled(k, (0, 0))), pattern="block:2x2"),
        "keeps parts of tiles, and block:2x2 keeps whole ones or none",
    ),
    (
        solve(lambda w, k: (w, ~k), pattern="block:2x2", sparsity=0.25),
        "keeps 2 tiles in row 0, expected 6",
    ),
    (ScoreSpec(score=by_diagonal), r"moments.gram was not collected.*needs='gram'"),
    (ScoreSpec(score=wanda, needs="nothing"), r"moments.square was not collected.*needs='square'"),
]


@pytest.mark.parametrize(("spec", "message"), WRONG, ids=range(len(WRONG)))
def test_what_a_function_gives_is_checked_and_refused(spec: Spec, message: str) -> None:
    model = FAMILIES["mlp"].make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(SpecError, match=message) as error:
        torchprune.sparsify(model, spec, FAMILIES["mlp"].data(), **QUIET)
    assert str(error.value).startswith("0: ")  # the layer
    if "moments" not in message:
        assert spec.label in str(error.value)
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {
        k: v.tolist() for k, v in before.items()
    }


def test_a_solver_may_not_revive_what_an_earlier_mask_pruned() -> None:
    spec = SolverSpec(solve=lambda w, m, p, s: (w, torch.ones_like(w, dtype=torch.bool)))
    with pytest.raises(SpecError, match=r"0: the mask .* keeps 96 weights that an earlier mask"):
        pruned("mlp", spec, MagnitudeSpec(0.25))

    def careful(weight: Tensor, moments: Any, pattern: Any, sparsity: float) -> Any:
        assert bool(((weight == 0).sum(1) == weight.shape[1] // 4).all())
        return refitted(weight, moments, pattern, sparsity)

    for alpha in (0.0, 0.5):
        spec = SolverSpec(solve=careful, alpha=alpha)
        model = pruned("mlp", spec, MagnitudeSpec(0.25, scope="row"))
        assert torchprune.report(model).sparsity == 0.5


def test_a_function_is_told_the_layer_it_is_called_for() -> None:
    met: list[str] = []

    def scored(weight: Tensor, moments: Any) -> Tensor:
        met.append(moments.layer)
        return weight.abs()

    def solved(weight: Tensor, moments: Any, pattern: Any, sparsity: float) -> Any:
        met.append(moments.layer)
        return weight, project(weight.abs(), pattern, sparsity, "row")

    for spec in (ScoreSpec(score=scored), SolverSpec(solve=solved)):
        met.clear()
        model = pruned("llama", spec)  # q, k and v share their moments
        assert sorted(met) == sorted(layer.name for layer in torchprune.report(model).layers)


def test_an_error_inside_a_function_says_where_it_came_up() -> None:
    def broken(weight: Tensor, moments: Any) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError) as error:
        pruned("mlp", ScoreSpec(score=broken))
    assert error.value.__notes__ == [f"raised by {function_name(broken)} on 0"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreSpec(score="wanda"), r"score must be a function \(weight, moments\) -> scor"),
        (lambda: ScoreSpec(score=torch.nn.Linear), "must be a function"),
        (lambda: ScoreSpec(score=refitted), r"takes \(weight: 'Tensor', moments: 'Any', pattern"),
        (lambda: SolverSpec(solve=wanda), "must be a function .*sparsity.* -> .*weight, mask"),
        (lambda: ScoreSpec(score=wanda, needs="squares"), "did you mean 'square'.*'gram'"),
        (lambda: ScoreSpec(score=wanda, needs=["gram"]), "not understood"),
        (lambda: ScoreSpec(scores=wanda), "no option 'scores' .did you mean 'score'"),
        (lambda: SolverSpec(solve=refitted, refine="swaps"), "Swaps betters the mask"),
        (lambda: SolverSpec(solve=refitted, scope="global"), "'global' is not offered"),
        (lambda: ScoreSpec(score=wanda, alpha=0.5), "alpha says what changed weights"),
        (
            lambda: ScoreSpec(score=magnitude, needs="nothing", sequential="layer"),
            "this spec needs none",
        ),
    ],
    ids=range(11),
)
def test_specs_that_cannot_be_are_refused(make: Callable[[], Spec], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


# -- saved by name, stored by code ----------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        ScoreSpec(score=wanda, refine="swaps"),
        ScoreSpec(score=lambda weight, moments: weight.abs(), needs="nothing"),
        ScoreSpec(score=functools.partial(wanda), pattern="2:4"),
        SolverSpec(solve=refitted, pattern="2:4"),
    ],
    ids=["function", "lambda", "partial", "solver"],
)
def test_a_saved_model_knows_the_function_by_name(spec: Spec, tmp_path: Path) -> None:
    model = pruned("llama", spec)
    torchprune.save(model, tmp_path / "one")
    loaded = torchprune.load(tmp_path / "one")
    assert state(loaded)["weights"] == state(model)["weights"]
    assert state(loaded)["masks"] == state(model)["masks"]
    assert str(torchprune.report(loaded)) == str(torchprune.report(model))
    (run,) = runs_of(loaded)
    assert run.spec.label == spec.label
    option = "solve" if isinstance(spec, SolverSpec) else "score"
    named = FunctionName(spec.label)
    assert run.spec == replace(spec, **{option: named})
    with pytest.raises(SpecError, match="only the name was saved"):
        torchprune.sparsify(FAMILIES["llama"].make(), run.spec, FAMILIES["llama"].data(), **QUIET)
    torchprune.save(loaded, tmp_path / "two")
    first, second = (tmp_path / n / "manifest.json" for n in ("one", "two"))
    assert first.read_text() == second.read_text()


def test_functions_of_structured_specs_are_saved_by_name_too(tmp_path: Path) -> None:
    def first(model: nn.Module, group: Any) -> Tensor:
        return torch.arange(group.count, dtype=torch.float32)

    family = FAMILIES["llama"]
    spec = torchprune.NeuronSpec(score=first, refit=False, round_to=1)
    model = torchprune.sparsify(family.make(), spec, family.data(), **QUIET)
    torchprune.save(model, tmp_path)
    (run,) = runs_of(torchprune.load(tmp_path))
    assert run.spec == replace(spec, score=FunctionName(function_name(first)))
    manifest = tmp_path / "manifest.json"  # as earlier versions wrote it
    old = manifest.read_text().replace(
        f'{{\n     "function": "{function_name(first)}"\n    }}', '"<function first at 0x7f01>"'
    )
    assert "0x7f01" in old
    manifest.write_text(old)
    reseal(tmp_path)
    (run,) = runs_of(torchprune.load(tmp_path))
    assert run.spec == replace(spec, score=FunctionName("<function first at 0x7f01>"))


def test_a_subclass_of_a_method_does_not_load_in_its_place(tmp_path: Path) -> None:
    class Mine(WandaSpec):
        """Says no name of its own."""

    torchprune.save(pruned("llama", WandaSpec()), tmp_path)
    (run,) = runs_of(torchprune.load(tmp_path))
    assert type(run.spec) is WandaSpec
    assert issubclass(Mine, WandaSpec)


def power(at: float) -> Callable[[Tensor, Any], Tensor]:
    return lambda weight, moments: weight.abs() * moments.square ** (at / 2)


def test_specs_are_described_by_what_their_functions_do() -> None:
    for spec in (
        WandaSpec(),
        RIASpec(power=0.3),
        SparseGPTSpec(targets=["a", nn.Linear]),
        ADMMSpec(),
    ):
        assert described(spec) == repr(spec)
    one, again, other = (described(ScoreSpec(score=power(at))) for at in (1, 1, 2))
    assert one == again
    assert one != other
    assert "0x" not in one
    assert described(ScoreSpec(score=wanda)) != described(ScoreSpec(score=magnitude))
    partials = [functools.partial(lambda p, w, m: w.abs() ** p, p) for p in (1, 2)]
    first, second = (described(ScoreSpec(score=p)) for p in partials)
    assert first != second

    def itself(weight: Tensor, moments: Any) -> Tensor:
        return weight if weight.dim() else itself(weight, moments)

    assert described(itself) == described(itself)
    held = [torch.zeros(5000).index_fill_(0, torch.tensor(2500), x) for x in (1.0, 2.0)]
    first, second = (described(functools.partial(wanda, x)) for x in held)
    assert first != second


def test_methods_of_ones_own_are_compared(tmp_path: Path) -> None:
    family, calls = FAMILIES["mlp"], list[int]()
    batches = family.data()

    def error(model: nn.Module) -> float:
        calls.append(1)
        return float(model(batches[0]).detach().square().mean())

    def compared(*scores: Any) -> torchprune.Comparison:
        specs = {f"own {i}": ScoreSpec(score=score) for i, score in enumerate(scores)}
        return torchprune.compare(
            family.make, specs, batches, error, path=tmp_path / "rows.json", **QUIET
        )

    found = torchprune.compare(
        family.make,
        [WandaSpec(), ScoreSpec(score=wanda), SolverSpec(solve=refitted, pattern=NM(2, 4))],
        batches,
        error,
        **QUIET,
    )
    assert found.labels == [
        "wanda unstructured 0.5",
        f"{__name__}.wanda unstructured 0.5",
        f"{__name__}.refitted 2:4",
    ]
    assert found.rows[0].metrics == found.rows[1].metrics
    calls.clear()
    scores = [power(1), power(2), power(1), power(2), power(3)]  # alive: all lie elsewhere
    compared(*scores[:2])
    assert len(calls) == 3  # dense, and each
    compared(*scores[2:4])
    assert len(calls) == 3
    compared(scores[2], scores[4])
    assert len(calls) == 4


def test_shares_of_a_budget_become_floats_that_count_the_same() -> None:
    from fractions import Fraction

    for total in (3, 7, 49, 97, 1000):
        for count in range(total):
            share = plain_share(Fraction(count, total))
            assert prune_count(total, share) == count
            assert share == pytest.approx(count / total, abs=1e-12)
    assert plain_share(0.29) == 0.29
