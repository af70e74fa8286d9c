"""What the inputs of a model's program are: parameters and buffers by name, numbers in the code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from torchprune.graph.values import Constant, sizes_of
from torchprune.masking.mask import mask_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def sources_of(model: nn.Module, program: ExportedProgram) -> dict[str, str]:
    """The parameters and buffers of a model's program: placeholder -> name in the plain
    `state_dict`; what belongs to a mask answers to the name of the weight under it.
    """
    from torch.export.graph_signature import InputKind  # torch.export takes a while to import

    masked = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in getattr(module, "parametrizations", ())
        if mask_of(module, name) is not None
    }

    def plain(name: str) -> str:
        owner, _, inner = name.rpartition("parametrizations.")
        key = owner + inner.partition(".")[0]
        return key if key in masked else name

    return {
        cast(Any, spec.arg).name: plain(str(spec.target))
        for spec in program.graph_signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)
    }


def constants_of(program: ExportedProgram) -> dict[str, Tensor]:
    """The tensors that a program's code makes of numbers: placeholder -> tensor."""
    from torch.export.graph_signature import InputKind  # as above

    found = {
        cast(Any, spec.arg).name: program.constants.get(str(spec.target))
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.CONSTANT_TENSOR
    }
    return {name: data for name, data in found.items() if isinstance(data, Tensor)}


def written(data: Tensor) -> Constant:
    """What is known of such a tensor."""
    return Constant(sizes_of(data), weight=True, data=data)
