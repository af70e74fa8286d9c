"""The laws every pruned model obeys, as one check of a model of your own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from torchprune.calibration.batches import read_batches
from torchprune.calibration.survey import Survey, is_plain, survey
from torchprune.errors import MaskError, TargetError
from torchprune.masking.mask import (
    Mask,
    apply_masks,
    attach,
    densify,
    fold,
    masked_layers,
    masks,
    original_of,
)
from torchprune.masking.selection import Layer
from torchprune.masking.targets import Plan, make_plan
from torchprune.methods.decide import scope_of
from torchprune.methods.magnitude import MagnitudeSpec
from torchprune.sparsify import sparsify
from torchprune.specs.spec import Spec
from torchprune.testing.assertions import assert_sparsity
from torchprune.testing.silenced import Silenced, silenced, wasted
from torchprune.testing.strategies import METHODS


def check_laws(
    model_factory: Callable[[], nn.Module], spec: Spec, data: Iterable[Any] | None = None
) -> None:
    """Assert that pruning this model with this spec obeys every law that applies.

    The laws: *count* (exact zeros in every layer), *support* (kept weights bit-equal for methods
    that only mask, exactly +0.0 elsewhere), *reversal* (`densify` restores every bit), *fold*
    (outputs bit-equal), *training* (zeros survive an optimizer), *round trip* (a `state_dict` makes
    another masked model the same), *copy* (a deepcopy shares nothing), *determinism* (the same call
    gives the same bits), *dead inputs* (where some of a layer's inputs are always zero its counts
    are as exact, what stays of their weights keeps its value and, for methods that look at inputs,
    no live weight goes while one of theirs stays) and *refusal* (an error leaves the model as it
    was).

    Args:
        model_factory: makes a model; each one gets the first one's weights.
        spec: any spec.
        data: calibration batches, read once; `MagnitudeSpec` runs without.

    Raises:
        AssertionError: starting with the law's name.
    """
    batches = None if data is None else list(data)
    subject = _Subject(model_factory, spec, batches)
    # The copy comes early: the laws after it change copies.
    laws = (_count, _support, _copy, _reversal, _fold, _training, _round_trip)
    for law in (*laws, _determinism, _dead_inputs, _refusal):
        name = law.__name__.strip("_").replace("_", " ")
        try:
            law(subject)
        except AssertionError as error:
            raise AssertionError(f"law {name!r}: {error}") from error


class _Subject:
    """A model that can be made again and again, and how it is pruned."""

    def __init__(
        self, factory: Callable[[], nn.Module], spec: Spec, data: Sequence[Any] | None
    ) -> None:
        self.factory, self.spec, self.data = factory, spec, data
        first = factory()
        self.state = {k: v.detach().clone() for k, v in first.state_dict().items()}
        self.dense = {
            layer.layer.key: layer.weight.detach().clone() for layer in self.plan(first).targets
        }
        self.updates = spec.changes_weights

    def fresh(self) -> nn.Module:
        """An unpruned model, always with the same weights, in eval mode."""
        model = self.factory()
        model.load_state_dict(self.state)
        return model.eval()

    def plan(self, model: nn.Module) -> Plan:
        """What pruning does with each layer of a model."""
        seen = Survey()
        if self.data and not is_plain(model):
            seen = survey(model, read_batches(self.data, model, len(self.data)).batches)
        return make_plan(model, self.spec, seen.readings, seen.gates)

    def prune(self, **options: Any) -> nn.Module:
        """A fresh model, pruned."""
        return sparsify(self.fresh(), self.spec, self.data, progress=False, **options)

    @cached_property
    def pruned(self) -> nn.Module:
        """One pruned model, that no law may change."""
        return self.prune()

    def copy(self) -> nn.Module:
        """A copy of it, to do anything with."""
        return copy.deepcopy(self.pruned)

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Every floating tensor the model makes of the first batch."""
        if not self.data:
            return []
        batch = self.data[0]
        if isinstance(batch, Mapping):
            out = model(**batch)
        else:
            out = model(*batch) if isinstance(batch, tuple | list) else model(batch)
        return [t for t in _tensors(out) if t.is_floating_point()]


# -- the laws ------------------------------------------------------------------------------------


def _count(subject: _Subject) -> None:
    _count_of(subject, subject.pruned)
    if subject.spec.uneven is not None:
        _count_in_all(subject)


def _count_of(subject: _Subject, model: nn.Module) -> None:
    spec = subject.spec
    targets = subject.plan(subject.fresh()).targets
    found = {layer.key: (layer, mask) for layer, mask in masked_layers(model)}
    assert found.keys() == {t.layer.key for t in targets}, "not every chosen layer carries a mask"
    if spec.scope == "global":
        assert_sparsity(model, spec.goal.pattern, spec.sparsity, scope="global")
        return
    if spec.uneven is not None:
        return
    for target in targets:
        layer, _ = found[target.layer.key]
        pattern, share = target.goal.pattern, float(target.goal.sparsity)
        matrix = target.view.to_matrix(masks(model)[layer.key])
        try:
            assert_sparsity(matrix, pattern, share, scope=scope_of(spec, target))
        except AssertionError as error:
            raise AssertionError(f"{layer.name}: {error}") from None


def _count_in_all(subject: _Subject) -> None:
    uniform = sparsify(
        subject.fresh(),
        replace(subject.spec, allocation="uniform"),
        subject.data,
        progress=False,
    )
    wanted, got = (
        sum(int(torch.count_nonzero(~mask)) for mask in masks(model).values())
        for model in (uniform, subject.pruned)
    )
    assert got == wanted, f"{got} weights are pruned, uniform allocation prunes {wanted}"
    if subject.spec.scope == "row":
        for target in subject.plan(subject.fresh()).targets:
            mask = target.view.to_matrix(masks(subject.pruned)[target.layer.key])
            rows = mask.sum(2)
            assert bool((rows == rows[0, 0]).all()), f"{target.name}: rows of unlike counts"


def _support(subject: _Subject) -> None:
    for layer, mask, weight in _layers(subject.pruned):
        off = weight[~mask.mask]
        assert not bool(off.any()), f"{layer.name}: weights off the mask are not zero"
        assert not bool(off.signbit().any()), f"{layer.name}: weights off the mask are -0.0"
        dense = subject.dense[layer.key]
        if bool(dense.isfinite().all()):
            assert bool(weight.isfinite().all()), f"{layer.name}: weights are not finite"
        if not subject.updates:
            kept = dense[mask.mask]
            assert _same_bits(weight[mask.mask], kept), f"{layer.name}: kept weights changed"


def _reversal(subject: _Subject) -> None:
    if subject.updates:
        model = subject.copy()
        before = _snapshot(model)
        try:
            densify(model)
        except MaskError:
            _assert_same(_snapshot(model), before, "a refused densify changed the model")
        else:
            raise AssertionError("densify claims to restore weights that were not kept")
    model = densify(subject.prune(keep_dense=True) if subject.updates else subject.copy())
    _assert_same(_snapshot(model), subject.state, "densify did not restore the model")


def _fold(subject: _Subject) -> None:
    model = subject.copy()
    weights = {layer.key: weight.clone() for layer, _, weight in _layers(model)}
    with torch.no_grad():
        masked = subject.outputs(model)
        folded = subject.outputs(fold(model))
    assert not masks(model), "a folded model still carries masks"
    assert list(model.state_dict()) == list(subject.state), "folding changed the state_dict's keys"
    for key, weight in weights.items():
        assert _same_bits(model.state_dict()[key], weight), f"{key}: folding changed the weight"
    for one, two in zip(masked, folded, strict=True):
        assert _same_bits(one, two), "outputs of the folded and the masked model differ"


def _training(subject: _Subject) -> None:
    model = subject.copy()
    kept = {layer.key: mask.mask for layer, mask in masked_layers(model)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        losses = [out.float().square().mean() for out in subject.outputs(model)]
        losses += [weight.float().sum() for _, _, weight in _layers(model, grad=True)]
        torch.stack(losses).sum().backward()
        for layer, mask in masked_layers(model):
            grad = original_of(layer.module, layer.tensor).grad
            assert grad is not None, f"{layer.name}: no gradient reaches the weight"
            some = bool(grad[mask.mask].any()) or not bool(mask.mask.any())
            assert some, f"{layer.name}: no gradient reaches the kept weights"
            assert not bool(grad[~mask.mask].any()), f"{layer.name}: masked weights get a gradient"
        optimizer.step()
    for layer, mask, weight in _layers(model):
        assert torch.equal(mask.mask, kept[layer.key]), f"{layer.name}: training changed the mask"
        assert not bool(weight[~mask.mask].any()), f"{layer.name}: training revived zeros"
    fold(model)
    for key, weight in model.state_dict().items():
        off = weight[~kept[key]] if key in kept else torch.zeros(0)
        assert not bool(off.any()), f"{key}: folding after training revived zeros"


def _round_trip(subject: _Subject) -> None:
    model, other = subject.pruned, subject.fresh()
    apply_masks(other, {key: torch.ones_like(mask) for key, mask in masks(model).items()})
    other.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, strict=True)
    _assert_same(_snapshot(other), _snapshot(model), "a state_dict did not carry over")
    for (layer, _, one), (_, _, two) in zip(_layers(model), _layers(other), strict=True):
        assert _same_bits(one, two), f"{layer.name}: the loaded weight acts otherwise"


def _copy(subject: _Subject) -> None:
    model = subject.prune()
    before = _snapshot(model)
    other = copy.deepcopy(model)
    _assert_same(_snapshot(other), before, "a deepcopy differs")
    for layer, mask in masked_layers(other):
        attach(layer.module, layer.tensor, torch.zeros_like(mask.mask), mask.record)
        original_of(layer.module, layer.tensor).data.fill_(7.0)
    _assert_same(_snapshot(model), before, "writing to a deepcopy changed the model")
    fold(other)
    _assert_same(_snapshot(model), before, "folding a deepcopy changed the model")
    for layer, mask, weight in _layers(model):
        assert not bool(weight[~mask.mask].any()), f"{layer.name}: its mask no longer acts"


def _determinism(subject: _Subject) -> None:
    one, two = subject.pruned, subject.prune()
    _assert_same(_snapshot(one), _snapshot(two), "the same call gave other bits")


def _dead_inputs(subject: _Subject) -> None:
    spec = subject.spec
    if not subject.data or not isinstance(spec, METHODS) or spec.permute:
        return
    for share in (0.25, 0.75):
        model = subject.fresh()
        with silenced(subject.plan(model).targets, share) as layers:
            sparsify(model, spec, subject.data, progress=False)
        _count_of(subject, model)
        total, usual = (
            sum(int(torch.count_nonzero(~mask)) for mask in masks(m).values())
            for m in (model, subject.pruned)
        )
        assert total == usual, f"{total} weights are pruned, without dead inputs {usual}"
        _check_silenced(subject, model, [one for one in layers if one.live is not None])


def _check_silenced(subject: _Subject, model: nn.Module, layers: Sequence[Silenced]) -> None:
    spec, found = subject.spec, masks(model)
    acting = {layer.key: weight for layer, _, weight in _layers(model)}
    went_and_stay = []
    for one in layers:
        key, view = one.target.layer.key, one.target.view
        keep, dense = found[key], subject.dense[key]
        dead = view.from_matrix(one.dead.expand(view.groups, view.rows, -1), keep.shape)
        kept = keep & dead.to(keep.device)
        same = _same_bits(acting[key][kept], dense[kept])
        assert same, f"{one.target.name}: kept weights on dead inputs changed"
        went, stay = wasted(one, keep, dense, one.target.goal.pattern, str(spec.scope))
        went_and_stay.append((one.target.name, went, stay))
    if isinstance(spec, MagnitudeSpec):  # looks at no inputs
        return
    for name, went, stay in went_and_stay:
        if spec.scope == "global":
            stay = torch.stack([other.any() for _, _, other in went_and_stay]).any()
        wrong = bool((went & stay).any())
        assert not wrong, f"{name}: live weights went while weights on dead inputs stayed"


def _refusal(subject: _Subject) -> None:
    model = subject.fresh().train()
    before, around = _snapshot(model), _surroundings(model)
    try:
        nowhere = replace(subject.spec, targets="no layer has this name")
        sparsify(model, nowhere, subject.data, progress=False)
    except TargetError:
        pass
    else:
        raise AssertionError("a selector that matches nothing was accepted")
    _assert_same(_snapshot(model), before, "a refused spec changed the model")
    if not subject.spec.needs_data or not subject.data:
        return
    calls = _run_until(subject, subject.fresh(), None)
    if not calls:  # no chosen layer is called as a module
        return
    assert _run_until(subject, model, calls // 2) > calls // 2, "an error was swallowed"
    _assert_same(_snapshot(model), before, "an error in the middle changed the model")
    assert _surroundings(model) == around, "an error left hooks, flags or settings behind"


# -- helpers -------------------------------------------------------------------------------------


class _BrokenError(Exception):
    """Raised inside a model to see what it leaves behind."""


def _run_until(subject: _Subject, model: nn.Module, stop: int | None) -> int:
    """Prune a model that raises at the call number `stop` of its chosen layers.

    Returns:
        how many calls were made.
    """
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if stop is not None and calls > stop:
            raise _BrokenError

    modules = {id(t.layer.module): t.layer.module for t in subject.plan(model).targets}
    handles = [module.register_forward_pre_hook(count) for module in modules.values()]
    try:
        sparsify(model, subject.spec, subject.data, progress=False)
    except _BrokenError:
        return calls
    finally:
        for handle in handles:
            handle.remove()
    return 0 if stop is not None else calls


def _layers(model: nn.Module, *, grad: bool = False) -> Iterator[tuple[Layer, Mask, Tensor]]:
    """Every masked layer, its mask, and its weight as it acts."""
    for layer, mask in masked_layers(model):
        with torch.set_grad_enabled(grad):
            weight = getattr(layer.module, layer.tensor)
        yield layer, mask, weight if grad else weight.detach()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def _surroundings(model: nn.Module) -> list[tuple[int, int, bool, bool, object]]:
    return [
        (
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            "forward" in vars(module),
            module.training,
            getattr(getattr(module, "config", None), "use_cache", None),
        )
        for module in model.modules()
    ]


def _same_bits(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are equal to the bit, -0.0 and NaN included."""
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    first, second = (t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (one, two))
    return torch.equal(first, second)


def _assert_same(one: Mapping[str, Tensor], two: Mapping[str, Tensor], message: str) -> None:
    assert list(one) == list(two), f"{message}: the state_dict's keys or their order differ"
    for key, value in one.items():
        assert _same_bits(value, two[key]), f"{message}: {key}"
