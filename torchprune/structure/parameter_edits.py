"""Parameters changed in place while batches pass: for good, or only until they have passed."""

from __future__ import annotations

from torch import Tensor

from torchprune import modes
from torchprune.masking.mask import mask_of, original_of
from torchprune.masking.selection import Layer
from torchprune.masking.targets import Target
from torchprune.masking.undo_file import Spool


class Edits:
    """Weights written while batches pass; all are put back unless the block ends well."""

    def __init__(self, *, keep_dense: bool) -> None:
        self._spool, self._keep_dense = Spool(), keep_dense
        self._places: list[tuple[Tensor, int, bool]] = []
        self.dense: dict[int, Tensor] = {}
        """What a changed parameter held before, by its id, where that is kept."""
        self.biases: list[Layer] = []

    def __enter__(self) -> Edits:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with self._spool:
            if kind is not None:
                self.undo()

    def undo(self) -> None:
        """Put back all that was written."""
        with modes.exact():
            for tensor, place, _ in reversed(self._places):
                self._spool.fetch(place, tensor.data)
        self._places = []

    def write(self, target: Target, matrices: Tensor, *, kept: bool = False) -> None:
        """Give a layer other values; unless they are `kept`, only until `settle`."""
        new = target.view.from_matrix(matrices, target.weight.shape)
        self._put(target.layer, new, kept=kept)

    def shift(self, layer: Layer, shift: Tensor) -> None:
        """Add to a layer's bias."""
        bias = original_of(layer.module, "bias")
        key = f"{layer.key.removesuffix(layer.tensor)}bias"
        self.biases.append(Layer(key, key, layer.module, "bias"))
        self._put(self.biases[-1], (bias.detach().float() + shift).to(bias.dtype), kept=True)

    def touch(self, layer: Layer) -> None:
        """A layer's tensor is about to be changed, for good."""
        self._remember(layer, kept=True)

    def _put(self, layer: Layer, new: Tensor, *, kept: bool) -> None:
        self._remember(layer, kept=kept)
        original_of(layer.module, layer.tensor).data.copy_(new)

    def _remember(self, layer: Layer, *, kept: bool) -> None:
        tensor, mask = original_of(layer.module, layer.tensor), mask_of(layer.module, layer.tensor)
        self._places.append((tensor, self._spool.put(tensor.data), kept))
        if not kept or not self._keep_dense or id(tensor) in self.dense:
            return
        if mask is None:
            self.dense[id(tensor)] = tensor.data.clone()
        elif mask.reversible:
            self.dense[id(tensor)] = mask.restored(tensor)

    def settle(self) -> None:
        """The batches have passed: what was written for them alone gets its own values again."""
        for tensor, place, kept in reversed(self._places):
            if not kept:
                self._spool.fetch(place, tensor.data)
        self._places = [(t, p, k) for t, p, k in self._places if k]
