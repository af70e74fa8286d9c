"""Take out what a program computes or holds for nothing."""

from __future__ import annotations

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from torchprune.passes.program import Draft, Passed


def strip_dead(program: ExportedProgram) -> Passed:
    """Remove nodes whose results nobody reads, and parameters, buffers and constants likewise.

    Inputs of the user stay. `modified` lists the tensors that are gone.
    """
    draft = Draft(program)
    draft.graph.eliminate_dead_code()
    written = {spec.target for spec in program.graph_signature.output_specs if spec.target}
    gone = []
    kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    for spec, node in draft.held(*kinds):
        if not node.users and spec.target not in written:
            draft.drop(node)
            gone.append(str(spec.target))
    return Passed("strip_dead", draft.finish(), gone)
