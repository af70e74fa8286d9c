"""Rewound weights and masks of tickets in files, and models made from them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from torchprune.checkpoint.save_load import load_into, save
from torchprune.errors import CheckpointError
from torchprune.masking.mask import apply_masks, masked_layers, original_of, parameters_of
from torchprune.masking.packing import packed_size, unpack_bits
from torchprune.training.drawn_seeds import drawn_seed, seeded
from torchprune.training.run_records import RunError
from torchprune.training.sealed_files import read_sealed, write_sealed


class TicketStates:
    """A directory: of each seed the rewound state, and of each of its rounds the masks."""

    def __init__(self, home: Path, make_model: Callable[[], nn.Module]) -> None:
        self.home, self._make = home, make_model
        self._made: list[weakref.ref[nn.Module]] = []

    def fresh(self, *draw: int | str) -> nn.Module:
        """A new model whose weights these parts determine.

        Raises:
            RunError: make_model gives no module, or the same one again.
        """
        with seeded(drawn_seed("model", *draw)):
            model = self._make()
        if not isinstance(model, nn.Module):
            raise RunError(f"make_model must make a Module, got {type(model).__name__}")
        if any(made() is model for made in self._made):
            raise RunError(
                "make_model gave the same model twice, and it is trained by now; make a new one in "
                "each call"
            )
        if any(masked_layers(model)):
            raise RunError("make_model must make a dense model; this one carries masks")
        self._made = [made for made in self._made if made() is not None]
        self._made.append(weakref.ref(model))
        return model

    def keep_rewound(self, seed: int, model: nn.Module) -> None:
        """Note what a seed's tickets begin with."""
        save(model, self._rewound(seed))

    def rewound(self, seed: int) -> nn.Module:
        """A new model in that state."""
        return load_into(self.fresh(seed), self._rewound(seed))

    def keep_masks(self, seed: int, number: int, model: nn.Module) -> None:
        """Note the masks of a model as a round's."""
        found = list(masked_layers(model))
        bits = {layer.key: mask.bits for layer, mask in found}
        kinds = {layer.key: [mask.record.pattern, mask.record.view] for layer, mask in found}
        path = self._masks(seed, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(path, bits, kinds)

    def masks(self, seed: int, number: int, model: nn.Module) -> dict[str, Tensor]:
        """A round's masks, of the shapes that a model has.

        Raises:
            CheckpointError: they are damaged, or of another model.
        """
        path = self._masks(seed, number)
        bits, _ = read_sealed(path)
        shapes: Mapping[str, tuple[int, ...]] = {
            layer.key: tuple(original_of(layer.module, layer.tensor).shape)
            for layer in parameters_of(model)
        }
        found = {}
        for key, some in bits.items():
            shape = shapes.get(key)
            if shape is None or some.shape != (packed_size(math.prod(shape)),):
                raise CheckpointError(
                    f"{path}: it is of another model than the {type(model).__name__}: {key} has "
                    f"{some.numel()} bytes of bits there, and here "
                    + ("it is no tensor" if shape is None else f"the shape {shape}")
                )
            found[key] = unpack_bits(some, shape)
        return found

    def kinds(self, seed: int, number: int) -> dict[str, tuple[str, str]]:
        """The pattern of each of a round's masks, and how its weight reads as matrices."""
        _, kinds = read_sealed(self._masks(seed, number))
        return {key: (pattern, view) for key, (pattern, view) in kinds.items()}

    def ticket(self, seed: int, number: int) -> nn.Module:
        """A round's ticket: rewound and masked."""
        model = self.rewound(seed)
        return apply_masks(model, self.masks(seed, number, model))

    def _rewound(self, seed: int) -> Path:
        return self.home / f"seed-{seed}" / "rewound"

    def _masks(self, seed: int, number: int) -> Path:
        return self.home / f"seed-{seed}" / f"masks-{number:03d}.safetensors"
