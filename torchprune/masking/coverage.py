"""How much of a model's blocks carries masks, and what stands there without.

Counted is what multiplies: the parameters with two or more axes in the repeated blocks, or in the
whole model where nothing repeats. Vectors (norms, biases), tables that are looked up, the output
head, adapters and the scales of eight-bit weights do not count: no method is meant for them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from torchprune.masking.adapters import adapter_parameters
from torchprune.masking.mask import masked_layers, original_of
from torchprune.masking.scales import scales_of
from torchprune.masking.selection import Layer, is_table, output_head, repeated_blocks

WORTH_A_WARNING = 0.05
"""Of what is counted, left without a mask by no one's choice."""


@dataclass(frozen=True, eq=False)
class Coverage:
    """How many weights count, and where those without a mask are.

    Attributes:
        size: the weights that count.
        bare: the tensors that count and have no mask, prunable or not, and their weights.
        where: "the blocks' weights" or "the model's weights".
    """

    size: int
    bare: Mapping[Layer, int]
    where: str

    @property
    def share(self) -> float:
        """Share of the counted weights that are masked; 0.0 if nothing counts."""
        return 1 - sum(self.bare.values()) / self.size if self.size else 0.0

    def __str__(self) -> str:
        return f"covered {percent(self.share)} of {self.where}"


def coverage_of(model: nn.Module, masked: Collection[int] | None = None) -> Coverage:
    """How much of a model is masked: as it is now, or where these parameters (by id) are."""
    if masked is None:
        masked = {id(original_of(y.module, y.tensor)) for y, _ in masked_layers(model)}
    blocks = repeated_blocks(model)
    tables = {id(p) for m in model.modules() if is_table(m) for p in m.parameters()}
    aside = tables | adapter_parameters(model)
    if (head := output_head(model)) is not None:
        aside |= {id(p) for p in head.parameters()}
    aside -= set(masked)
    size, bare = 0, {}
    for prefix, root in (blocks or {"": model}).items():
        for layer, parameter in _matrices_of(root, prefix):
            if id(parameter) not in aside:
                aside.add(id(parameter))  # a weight in two places counts once
                size += parameter.numel()
                if id(parameter) not in masked:
                    bare[layer] = parameter.numel()
    return Coverage(size, bare, "the blocks' weights" if blocks else "the model's weights")


def _matrices_of(root: nn.Module, prefix: str) -> Iterator[tuple[Layer, nn.Parameter]]:
    """Every parameter with two or more axes, and where it would be a layer."""
    for name, module in root.named_modules(prefix=prefix):
        scales = scales_of(module)
        for own, parameter in module._parameters.items():
            if parameter is None or id(parameter) in scales:
                continue
            if sum(size > 1 for size in parameter.shape) < 2:
                continue
            key = f"{name}.{own}" if name else own
            if isinstance(module, ParametrizationList):  # of x.parametrizations.weight: x.weight
                *path, _, own = name.split(".")
                key = ".".join([*path, own])
            yield Layer(key, key, module, own), parameter


def warning_of(coverage: Coverage, left: Mapping[Layer, str]) -> str | None:
    """What to say if much stays without a mask by no one's choice.

    Args:
        left: of the bare tensors those that nobody left out, and why they stay dense.
    """
    sizes = {layer: size for layer, size in coverage.bare.items() if layer in left}
    total = sum(sizes.values())
    if total <= WORTH_A_WARNING * coverage.size:
        return None
    largest = max(sizes, key=lambda layer: sizes[layer])
    others = f" (and {len(sizes) - 1} more)" if len(sizes) > 1 else ""
    return (
        f"{coverage}: {percent(total / coverage.size)} stay dense though nobody left them out, the "
        f"largest of them {largest.key}{others}: {left[largest]}"
    )


def percent(share: float) -> str:
    """Whole per cents, but never all for what is not."""
    return (
        f"{share:.0%}" if 0.01 <= share <= 0.99 or share in (0, 1) else f"{min(share, 0.9999):.2%}"
    )
