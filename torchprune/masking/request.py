"""Which layers a spec asks for, in its own words: targets, ignore and overrides."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from torchprune.masking.selection import Layer, as_selectors, check_used, is_exact, matches
from torchprune.specs.goals import Goal
from torchprune.specs.spec import Selector, Spec


@dataclass(frozen=True, eq=False)
class Request:
    """A spec's selectors, each of which fits some of a model's layers.

    Attributes:
        targets: what picks layers; all are picked if there is none.
        ignore: what leaves layers out.
        goals: selector -> the goal of what it fits, None for dense. The first that fits decides.
        goal: of all other layers.
    """

    targets: tuple[Selector, ...]
    ignore: tuple[Selector, ...]
    goals: Mapping[str, Goal | None]
    goal: Goal

    @classmethod
    def read(cls, spec: Spec, model: nn.Module, layers: list[Layer]) -> Request:
        """A spec's selectors, checked.

        Raises:
            TargetError: one fits none of the layers.
        """
        targets, ignore = as_selectors(spec.targets), as_selectors(spec.ignore)
        goals = {}
        for what, selectors in (("targets", targets), ("ignore", ignore)):
            for selector in selectors:
                check_used(what, selector, model, layers)
        for key in spec.overrides:
            check_used("overrides", key, model, layers)
            goals[key] = spec.override_goal(key)
        return cls(targets, ignore, goals, spec.goal)

    def picks(self, layer: Layer) -> bool:
        """Whether `targets` has a layer, or leaves the choice open."""
        return not self.targets or any(matches(s, layer) for s in self.targets)

    def ignores(self, layer: Layer) -> bool:
        """Whether `ignore` has a layer."""
        return any(matches(s, layer) for s in self.ignore)

    def override(self, layer: Layer) -> str | None:
        """The key of `overrides` that decides about a layer."""
        return next((key for key in self.goals if matches(key, layer)), None)

    def goal_of(self, layer: Layer) -> Goal | None:
        """What a layer is to become; None is dense."""
        key = self.override(layer)
        return self.goal if key is None else self.goals[key]

    def named(self, layer: Layer) -> str | None:
        """Where a layer's own full name stands: "targets", "overrides" or nowhere."""
        if any(is_exact(s, layer) for s in self.targets):
            return "targets"
        return "overrides" if any(is_exact(key, layer) for key in self.goals) else None

    def means(self, layer: Layer, layers: Sequence[Layer], dense: Container[str]) -> bool:
        """Whether a layer that is dense by default is asked for: by its name, or by a selector
        that picks nothing else than such layers (keys)."""
        return self.named(layer) is not None or any(
            matches(s, layer) and all(y.key in dense for y in layers if matches(s, y))
            for s in self.targets
        )

    def cannot_mean(self, tensor: Layer) -> bool:
        """Whether the spec's words leave out a tensor that is no prunable layer.

        Callables are not asked, since they may expect one.
        """
        ignore = [s for s in self.ignore if isinstance(s, str | type)]
        return bool(self.targets) or any(matches(s, tensor) for s in ignore)
