"""What every rule gets: the labels, the node's own shapes, and ways to freeze and to keep whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from torchprune.graph.labels import Labels, axes_of
from torchprune.graph.values import Value


@dataclass(frozen=True)
class Product:
    """A contraction: its sizes, and the tags that tell how they shrink.

    Attributes:
        shape: extents of all axes of the product, those summed over included.
        tags: of both factors, broadcast to those axes.
        module: the path of the module whose code multiplies.
    """

    shape: tuple[int, ...]
    tags: tuple[Tensor, ...]
    module: str = ""


@dataclass
class Context:
    """One node being followed.

    Attributes:
        labels: of the whole graph.
        why: what to tell of labels that this node freezes.
        shapes: of the node's results, as on the example inputs.
        module: the path of the module whose code runs it.
        products: filled by every contraction, for counting floating point operations.
        example: the node's arguments with fake tensors, positional and by name; None if unknown.
    """

    labels: Labels
    why: str = ""
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    module: str = ""
    products: list[Product] = field(default_factory=list)
    example: tuple[Any, Any] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[0]

    def freeze(self, *values: Any) -> None:
        """All labels of some values."""
        for value in values:
            if isinstance(value, Value):
                for tag in value.held():
                    self.labels.freeze(tag, self.why)
            elif isinstance(value, list | tuple):
                self.freeze(*value)

    def whole(self, value: Value, axes: Sequence[int], *, keep: bool = False) -> Value:
        """The value after an operator read all of it along some axes.

        Args:
            keep: whether these axes remain; labels that vary on them alone are frozen, and else
                gone.
        """
        fixed = {axis % value.dim for axis in axes}
        tags = []
        for tag in value.tags:
            own = axes_of(tag)
            inner = [axis for axis in own if axis in fixed]
            self.labels.summed(tag, inner)
            if len(inner) == len(own):
                self.labels.freeze(tag, self.why)
                tags += [tag] if keep and own else []
            else:
                tags.append(self.labels.united(tag, inner))
        return replace(value, tags=tuple(tags))


def unknown(ctx: Context, *args: Any) -> Any:
    """An operator without a rule: nothing that it reads can go."""
    ctx.freeze(*args)
    made = tuple(Value(shape) for shape in ctx.shapes)
    return made if len(made) != 1 else made[0]
