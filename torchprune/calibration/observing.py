"""Where batches read targets' weights: at their products, or where their modules are called.

A weight is found by its products wherever they are. Fused experts run expert by expert; and of a
layer whose products read something made from its weight, what its module is given is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from torch import Tensor, nn

from torchprune.calibration import experts
from torchprune.calibration.operations import Product
from torchprune.calibration.sources import Read
from torchprune.calibration.watch import Operand, Watch, Weights
from torchprune.masking.matrices import geometry, input_rows, is_fused_experts, is_stock
from torchprune.masking.parts import Covered, Part, covered
from torchprune.masking.targets import Target


class Observer:
    """Tells of every read of a target's weight. Targets go by their numbers.

    Args:
        targets: the layers.
        batch: gives the number of the batch that runs.
        reached: told of a read before it happens; gives whether the weight may have changed since
            the operand was made.
        strange: told of a target of which something is read that is none of its groups.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        batch: Callable[[], int],
        reached: Callable[[int, Read], bool],
        strange: Callable[[int], None],
    ) -> None:
        self._targets, self._batch = targets, batch
        self._reached, self._strange = reached, strange
        self._watched: dict[int, int] = {}  # parameter -> target, of those found by their products
        self._weights = Weights(())
        self._covered: dict[tuple[int, Part], list[Covered] | None] = {}

    def put_on(self, stack: ExitStack) -> None:
        """Observe what is not found by products; until the stack is closed."""
        for index, target in enumerate(self._targets):
            module, reading = target.layer.module, target.reading
            if is_fused_experts(module):
                if "forward" not in vars(module):  # once for all the weights of the module
                    self._at_experts(stack, module)
            elif not is_stock(module) if reading is None else reading.hooked:
                self._at_calls(stack, index, module)
            else:
                self._watched[id(target.weight)] = index
        self._weights = Weights(self._targets[i].weight for i in self._watched.values())

    def watching(self) -> AbstractContextManager[Any]:
        """The context of one forward."""
        return Watch(self._weights, self._met) if self._watched else nullcontext()

    def find_again(self, changed: Iterable[int]) -> None:
        """Look where the weights of targets that were changed live now."""
        weights = (self._targets[i].weight for i in changed)
        self._weights.find(w for w in weights if id(w) in self._watched)

    def _at_experts(self, stack: ExitStack, module: nn.Module) -> None:
        own = {
            target.layer.tensor: index
            for index, target in enumerate(self._targets)
            if target.layer.module is module
        }

        def reach(tensor: str, inputs: list[Tensor]) -> None:
            if tensor in own:
                self._reached(own[tensor], Read(self._batch(), None, lambda: inputs))

        stack.enter_context(experts.observed(module, reach))

    def _at_calls(self, stack: ExitStack, index: int, module: nn.Module) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            if x is not None:
                rows = lambda: input_rows(module, x)  # noqa: E731
                self._reached(index, Read(self._batch(), x, rows, geometry(module)))

        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        stack.callback(handle.remove)

    def _met(self, product: Product, operand: Operand) -> bool:
        """A product with a watched weight is about to be computed; whether the weight changed."""
        index = self._watched[id(operand.parameter)]
        read = self._read_of(index, product, operand.part)
        if read is None:
            self._strange(index)
            return True
        return self._reached(index, read)

    def _read_of(self, index: int, product: Product, part: Part) -> Read | None:
        """What a product reads, as the groups of its target, or None if it is none of them."""
        view, at = self._targets[index].view, (index, part)
        if at not in self._covered:
            self._covered[at] = covered(view, part)
        found = self._covered[at]
        if found is None:
            return None
        if view.groups == 1:
            return Read(self._batch(), product.x, product.rows, product.geometry)

        def rows() -> list[Tensor]:
            mine = product.rows()
            stack = [mine[0].new_empty(0, view.cols)] * view.groups
            for one in found:
                stack[one.group] = mine[one.own][:, one.start : one.start + view.cols]
            return stack

        alike = product.geometry, view.groups, view.cols, tuple(found)
        return Read(self._batch(), product.x, rows, alike)
