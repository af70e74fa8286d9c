"""What stays dense unless it is named: one rule, the same for every method and every pattern.

What is pruned by default must pay for what it puts at risk. These hold next to no weights, and
every number in them acts on many:

- depthwise kernels: each channel has a filter of its own, of 4 to 49 taps: 0.01 to 0.2 % of a Mamba
  block, 1 % of a ConvNeXt. No n:m pattern fits them, since a group reads one channel.
- routers: 0.02 to 0.7 % of what a token meets in a block. A changed choice sends a token to experts
  that were not trained on its kind.
- gates: one output, or one number for a whole vector.
- vectors, such as norms and per-channel scales: no matrix, whatever their number of axes.
- tiny projections: less than 1/1000 of their block. The smallest projections of attention in large
  models, the single key and value heads of Gemma-2B, hold 1/200, and Mamba's x_proj and dt_proj
  1/50; below 1/1000 are the per-head decays of gated delta nets.

Shares are of a block's prunable weights with every expert of many counted once, since else
attention itself would be tiny beside 512 experts. They are told inside repeated blocks only: across
the depth of a convolutional net, first layers of a thousandth of the weights do as much as others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from torchprune.masking.adapters import adapter_parameters
from torchprune.masking.gates import copies_of, gates_of
from torchprune.masking.mask import original_of
from torchprune.masking.matrices import View
from torchprune.masking.selection import Layer

TINY = 1 / 1000
"""Of its block's prunable weights, each expert of many counted once."""


@dataclass(frozen=True)
class Surroundings:
    """What is known of a layer beside its own shape.

    Attributes:
        gates: id of a parameter -> why it is a router or a gate.
        adapters: the ids of adapters' parameters.
        shares: id of a parameter -> what share of its block it is, for those in repeated blocks.
    """

    gates: Mapping[int, str]
    adapters: set[int]
    shares: Mapping[int, float]


def surroundings_of(
    model: nn.Module,
    layers: Sequence[Layer],
    blocks: Mapping[str, nn.Module],
    views: Mapping[str, View],
    watched: Mapping[int, str] | None = None,
) -> Surroundings:
    """What `why_dense` needs of a model's layers.

    Args:
        views: of those layers that can be pruned, by their keys.
        watched: routers and gates that were seen at work, see `calibration/routers.py`.
    """
    read = {id(original_of(y.module, y.tensor)): views[y.key] for y in layers if y.key in views}
    gates = {**gates_of(model, blocks, read), **(watched or {})}
    shares: dict[int, float] = {}
    for block in blocks.values():
        copies = copies_of(block)
        inside = [y for y in layers if id(y.module) in copies and y.key in views]
        sizes = {
            id(original_of(y.module, y.tensor)): _once(y, views[y.key], copies) for y in inside
        }
        total = sum(sizes.values())
        shares |= {key: size / total for key, size in sizes.items() if total}
    return Surroundings(gates, adapter_parameters(model), shares)


def _once(layer: Layer, view: View, copies: Mapping[int, int]) -> float:
    """A layer's weights, as if there were but one of experts that are many."""
    weight = original_of(layer.module, layer.tensor)
    stacked = view.groups if view.kind != "conv" and weight.dim() > 2 else 1
    return weight.numel() / stacked / copies[id(layer.module)]


def why_dense(layer: Layer, view: View, around: Surroundings) -> str | None:
    """Why a layer stays dense unless it is named, or None."""
    weight = original_of(layer.module, layer.tensor)
    key = id(weight)
    if key in around.adapters:
        return "an adapter, to be merged into the layer beside it"
    if key in around.gates:
        return around.gates[key]
    if view.groups > 1 and view.axis == 1:
        return "a depthwise kernel: its groups read one channel each"
    if key in around.shares:
        if view.groups == view.rows == 1:
            return "a gate: it has one output"
        if sum(size > 1 for size in weight.shape) < 2:
            return "a vector"
        if around.shares[key] < TINY:
            return f"tiny: {around.shares[key]:.2%} of its block's weights"
    return None
