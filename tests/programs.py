"""Exported programs, what they compute and hold, for the tests of passes and of `sparsify`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree


def exported(model: nn.Module, batch: Any, *, dynamic: bool = True) -> ExportedProgram:
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # routed experts as torch.export can see
    args, kwargs = ((), batch) if isinstance(batch, dict) else ((batch,), {})
    inputs = kwargs or args
    shapes = pytree.tree_map(lambda _: {0: Dim.AUTO} if dynamic else None, inputs)
    with torch.no_grad():
        return torch.export.export(model.eval(), args, kwargs, dynamic_shapes=shapes)


def outputs(program: ExportedProgram, batch: Any) -> list[Tensor]:
    args, kwargs = ((), batch) if isinstance(batch, dict) else ((batch,), {})
    with torch.no_grad():
        y = program.module()(*args, **kwargs)
    return [leaf for leaf in pytree.tree_leaves(y) if isinstance(leaf, Tensor)]


def operators(program: ExportedProgram) -> Counter[str]:
    return Counter(
        str(n.target) for n in program.graph_module.graph.nodes if n.op == "call_function"
    )


def state_of(program: ExportedProgram) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in program.state_dict.items()}


def assert_untouched(program: ExportedProgram, state: dict[str, Tensor], ops: Any) -> None:
    assert program.state_dict.keys() == state.keys()
    assert all(torch.equal(program.state_dict[name], t) for name, t in state.items())
    assert operators(program) == ops
    program.validate()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


def masks_of(program: ExportedProgram) -> dict[str, Tensor]:
    """The masks that a program carries, by their parameters' names."""
    ending = "_mask"
    return {k.removesuffix(ending): v for k, v in program.state_dict.items() if k.endswith(ending)}


def parameters_of(program: ExportedProgram) -> dict[Node, str]:
    """The placeholders of parameters, by what these are called in the state_dict."""
    names = {
        spec.arg.name: str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind == InputKind.PARAMETER
    }
    return {n: names[n.name] for n in program.graph_module.graph.nodes if n.name in names}


def values_of(program: ExportedProgram, *args: Any) -> dict[Node, Any]:
    """What every node of a program's graph gives."""
    nodes = [n for n in program.graph_module.graph.nodes if n.op != "output"]
    given = iter(program._graph_module_flat_inputs(args, {}))
    runner = Interpreter(program.graph_module, garbage_collect_values=False)
    with torch.no_grad():
        for node in nodes:
            runner.env[node] = next(given) if node.op == "placeholder" else runner.run_node(node)
    return runner.env
