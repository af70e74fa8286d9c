"""Run a model again from one of its blocks on: the blocks before it give what they gave.

The model's own forward runs, any Python; only blocks that come before the first change are not
computed but hand out what was recorded. Whether that gives the very bits of a whole run is tried
(`Suffix.holds`), not assumed: a block that writes into what it is given, or that draws random
numbers, is found there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torchprune.calibration.block_calls import put_on
from torchprune.calibration.nested import mapped, tensors_in

T = TypeVar("T")


class AstrayError(Exception):
    """A run from a block on came to other blocks than the recorded one."""


@dataclass(eq=False)
class Tape:
    """One run of a model, call by call of its blocks.

    Attributes:
        calls: which block was called (its place in the list), and what it gave.
        first: id of a watched module -> at which call it first ran: within it, or after all before.
    """

    calls: list[tuple[int, Any]] = field(default_factory=list)
    first: dict[int, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """What the tape holds."""
        return sum(t.nbytes for _, out in self.calls for _, t in tensors_in(out))


class Suffix:
    """A model whose runs can begin at a block.

    Args:
        blocks: by name; calls of one inside another are not told apart from the outer one.
        watched: modules of which is asked from where on a change of them matters.
    """

    def __init__(
        self, model: nn.Module, blocks: Mapping[str, nn.Module], watched: Sequence[nn.Module]
    ) -> None:
        self.model, self.blocks, self._watched = model, list(blocks.values()), list(watched)
        self._inside: dict[int, set[int]] = {}
        for place, block in enumerate(self.blocks):
            for module in block.modules():
                self._inside.setdefault(id(module), set()).add(place)
        self._tape, self._start, self._at, self._within = Tape(), 0, 0, False

    def record(self, run: Callable[[], T]) -> tuple[T, Tape]:
        """What a run gives, and its tape."""
        with self._on(Tape(), 0) as tape, ExitStack() as stack:
            for module in self._watched:
                handle = module.register_forward_pre_hook(partial(self._note, tape, id(module)))
                stack.callback(handle.remove)
            return run(), tape

    def run_from(self, tape: Tape, start: int, run: Callable[[], T]) -> T:
        """What a run gives whose first `start` block calls are not computed.

        Raises:
            AstrayError: it calls other blocks than the tape's.
        """
        with self._on(tape, start):
            return run()

    def start_of(self, tape: Tape, module: nn.Module) -> int:
        """How many block calls of a tape come before a module has any part in the run."""
        places = self._inside.get(id(module), set())
        found = [at for at, (place, _) in enumerate(tape.calls) if place in places][:1]
        if (first := tape.first.get(id(module))) is not None:
            found.append(first)
        return min(found, default=len(tape.calls) if places else 0)

    def _note(self, tape: Tape, key: int, *_: Any) -> None:
        tape.first.setdefault(key, self._at - self._within)

    @contextmanager
    def _on(self, tape: Tape, start: int) -> Iterator[Tape]:
        self._tape, self._start, self._at, self._within = tape, start, 0, False
        with ExitStack() as stack:
            for place, block in enumerate(self.blocks):
                self._put_on(stack, place, block, record=start == 0 and not tape.calls)
            yield tape

    def _put_on(self, stack: ExitStack, place: int, block: nn.Module, *, record: bool) -> None:
        forward = block.forward

        @put_on(stack, block)
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if self._within:
                return forward(*args, **kwargs)
            at, self._at = self._at, self._at + 1
            if at < self._start:
                if at >= len(self._tape.calls) or self._tape.calls[at][0] != place:
                    raise AstrayError
                return _copied(self._tape.calls[at][1])
            self._within = True
            try:
                out = forward(*args, **kwargs)
            finally:
                self._within = False
            if record:
                self._tape.calls.append((place, _copied(out)))
            return out


def _copied(value: Any) -> Any:
    """With tensors of its own: what comes after may write into them."""
    return mapped(value, lambda _, tensor: tensor.clone())


def same_bits(one: Any, other: Any) -> bool:
    """Whether two values hold equal tensors, bit for bit (NaN beside NaN, but not 0 beside -0)."""
    ours, theirs = list(tensors_in(one)), list(tensors_in(other))
    return len(ours) == len(theirs) and all(
        a == b and x.shape == y.shape and x.dtype == y.dtype and _equal_bits(x, y)
        for (a, x), (b, y) in zip(ours, theirs, strict=True)
    )


def _equal_bits(x: Tensor, y: Tensor) -> bool:
    flat = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (x, y)]
    return torch.equal(*flat)
