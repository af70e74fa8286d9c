"""Which layers: selectors matched against a model, its repeated blocks, its tied weights."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchprune.errors import TargetError, did_you_mean
from torchprune.masking.adapters import named_as_plain
from torchprune.masking.matrices import prunable_names
from torchprune.masking.shards import address_of
from torchprune.specs.spec import Selector, Selectors


@dataclass(frozen=True, eq=False)
class Layer:
    """One prunable tensor of one module.

    Attributes:
        name: what selectors match: the module's name, or `module.tensor` for fused experts; of a
            layer with an adapter the name it has without.
        key: the tensor's name in the plain model's `state_dict`.
        module, tensor: where it lives.
    """

    name: str
    key: str
    module: nn.Module
    tensor: str


def layers_of(model: nn.Module, prefix: str = "") -> Iterator[Layer]:
    """Every prunable tensor that its module tells of, in registration order, each module once."""
    for name, plain, module in named_as_plain(model, prefix):
        for tensor in prunable_names(module):
            yield layer_at(name, plain, module, tensor)


def every_layer(model: nn.Module) -> Iterator[Layer]:
    """Every tensor that could be pruned if asked for, in registration order: parameters of two or
    more axes, masked or not."""
    for name, plain, module in named_as_plain(model):
        if isinstance(module, parametrize.ParametrizationList):
            continue
        known = prunable_names(module)
        for tensor in dict.fromkeys((*known, *parameter_names(module))):
            if tensor in known or _axes(module, tensor) >= 2:
                yield layer_at(name, plain, module, tensor)


def parameter_names(module: nn.Module) -> list[str]:
    """A module's own parameters, those behind parametrizations under the names they have."""
    names = [name for name, p in module._parameters.items() if p is not None]
    if parametrize.is_parametrized(module):
        names += list(cast(nn.ModuleDict, module.parametrizations))
    return names


def _axes(module: nn.Module, tensor: str) -> int:
    if parametrize.is_parametrized(module, tensor):
        chain = cast(nn.ModuleDict, module.parametrizations)[tensor]
        return getattr(getattr(chain, "original", None), "ndim", 0)
    return cast(Tensor, module._parameters[tensor]).ndim


def maskable_of(model: nn.Module) -> Iterator[Layer]:
    """Every tensor that may carry a mask: the prunable ones and the biases beside them, and those
    of two or more axes that no module tells of, with the vectors of their modules."""
    for name, plain, module in named_as_plain(model):
        if isinstance(module, parametrize.ParametrizationList):
            continue
        names = list(prunable_names(module))
        if names == ["weight"] and has_bias(module):
            names.append("bias")
        axes = {own: _axes(module, own) for own in parameter_names(module) if own not in names}
        if not is_table(module) and any(count >= 2 for count in axes.values()):
            names += [own for own, count in axes.items() if count]
        for tensor in names:
            yield layer_at(name, plain, module, tensor)


def is_table(module: nn.Module) -> bool:
    """Whether a module's weight is looked up, and multiplies nothing."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def layer_at(name: str, plain: str, module: nn.Module, tensor: str) -> Layer:
    """A module's tensor, by the module's name and by its name in the model without adapters."""
    key = f"{name}.{tensor}" if name else tensor
    if tensor == "weight" and plain:
        return Layer(plain, key, module, tensor)
    return Layer(f"{plain}.{tensor}" if plain else tensor, key, module, tensor)


def has_bias(module: nn.Module) -> bool:
    """Whether a layer adds a bias."""
    return isinstance(getattr(module, "bias", None), Tensor)


def as_selectors(selectors: Selectors | None) -> tuple[Selector, ...]:
    """One selector or several, as a tuple."""
    if selectors is None:
        return ()
    if isinstance(selectors, str | type) or callable(selectors):
        return (selectors,)
    if isinstance(selectors, Iterable):
        return tuple(selectors)
    raise TargetError(f"{selectors!r} is not a selector; {ACCEPTED_SELECTORS}")


ACCEPTED_SELECTORS = (
    'accepted: an exact name, a glob such as "*.q_proj", "re:" and a regular expression, a module '
    "type, or a callable (module, name) -> bool"
)


def matches(selector: Selector, layer: Layer) -> bool:
    """Whether a selector picks a layer. A name also picks everything inside the module it names."""
    if isinstance(selector, str):
        if selector.startswith("re:"):
            return re.fullmatch(_regex(selector), layer.name) is not None
        names = {layer.name, layer.key}  # the same path, but for layers with adapters
        inside = (path for name in names for path in _paths(name))
        return any(fnmatch.fnmatchcase(path, selector) for path in inside)
    if isinstance(selector, type):
        return isinstance(layer.module, selector)
    if callable(selector):
        return bool(selector(layer.module, layer.name))
    raise TargetError(f"{selector!r} is not a selector; {ACCEPTED_SELECTORS}")


def _paths(name: str) -> Iterator[str]:
    """What a dotted name lies in, from the outside in, and the name."""
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def _regex(selector: str) -> str:
    pattern = selector.removeprefix("re:")
    try:
        re.compile(pattern)
    except re.error as error:
        raise TargetError(f"{selector!r} is not a valid regular expression: {error}") from None
    return pattern


def is_exact(selector: Selector, layer: Layer) -> bool:
    """Whether a selector is this layer's own full name."""
    return isinstance(selector, str) and selector in (layer.name, layer.key)


def check_used(what: str, selector: Selector, model: nn.Module, layers: list[Layer]) -> None:
    """Raise TargetError if a selector matches none of the model's prunable layers."""
    if any(matches(selector, layer) for layer in layers):
        return
    modules = dict(model.named_modules())
    if isinstance(selector, str) and selector in modules:
        kind = type(modules[selector]).__name__
        raise TargetError(
            f"{what}: {selector!r} is a {kind}, which holds nothing that can be pruned (Linear, "
            "Conv1d/2d/3d, transformers' Conv1D and fused experts can)"
        )
    hint = did_you_mean(selector, [y.name for y in layers]) if isinstance(selector, str) else ""
    raise TargetError(
        f"{what}: {selector!r} matches none of the model's {len(layers)} prunable layers{hint}"
    )


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The model's outermost repeated blocks, by name: what a depth of layers is made of.

    The children of an `nn.ModuleList`, or of an `nn.Sequential` or `nn.ModuleDict` in which a type
    occurs twice, provided they are themselves made of modules and hold prunable layers; where none
    does, parameters of two or more axes. Of a list of lists, which nobody calls, the blocks are the
    children of the inner ones.
    """
    return _blocks(model, layers_of) or _blocks(model, every_layer)


def _blocks(
    model: nn.Module, layers_in: Callable[[nn.Module], Iterator[Layer]]
) -> dict[str, nn.Module]:
    blocks: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        children = {k: c for k, c in module.named_children() if _made_of_modules(c)}
        kinds = [type(c) for c in children.values()]
        repeats = isinstance(module, nn.ModuleList) or (
            isinstance(module, nn.Sequential | nn.ModuleDict) and len(set(kinds)) < len(kinds)
        )
        called = {k: c for k, c in children.items() if not isinstance(c, _NEVER_CALLED)}
        found = {k for k, c in called.items() if any(layers_in(c))} if repeats else set()
        for key, child in module.named_children():
            path = f"{name}.{key}" if name else key
            if key in found:
                blocks[path] = child
            else:
                visit(path, child)

    visit("", model)
    return blocks


def _made_of_modules(module: nn.Module) -> bool:
    """Whether it has children that it calls; what its tensors are computed by is none."""
    aside = {"parametrizations"} if parametrize.is_parametrized(module) else set()
    return any(name not in aside for name, _ in module.named_children())


_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)


def tied_to(model: nn.Module) -> dict[int, list[str]]:
    """For every storage held by several parameters: its address and the parameters' names.

    A module registered under two names is one module, not a tie.
    """
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                address = address_of(parameter)
                if address:
                    holders.setdefault(address, []).append(f"{name}.{key}" if name else key)
    return {address: names for address, names in holders.items() if len(names) > 1}


def output_head(model: nn.Module) -> nn.Module | None:
    """The output embedding of a transformers model, which stays dense unless named."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None
