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
    """A spec's selectors and goals.

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
    def of(cls, spec: Spec) -> Request:
        """What a spec asks for."""
        goals = {key: spec.override_goal(key) for key in spec.overrides}
        return cls(as_selectors(spec.targets), as_selectors(spec.ignore), goals, spec.goal)

    def check(self, model: nn.Module, layers: list[Layer]) -> None:
        """Raise TargetError if a selector fits none of the layers."""
        asked = {"targets": self.targets, "ignore": self.ignore, "overrides": tuple(self.goals)}
        for what, selectors in asked.items():
            for selector in selectors:
                check_used(what, selector, model, layers)

    def asks_for(self, layer: Layer) -> bool:
        """Whether a selector is a layer's own name, or its module's type."""
        return self.named(layer) is not None or any(
            isinstance(s, type) and s is not nn.Module and matches(s, layer) for s in self.targets
        )

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

    def leaves_out(self, tensor: Layer) -> bool:
        """Whether a tensor that is no layer to choose stays dense by the spec's own words.

        Callables are not asked, since they may expect one.
        """
        ignore = [s for s in self.ignore if isinstance(s, str | type)]
        return bool(self.targets) or any(matches(s, tensor) for s in ignore)
