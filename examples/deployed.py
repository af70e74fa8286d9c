"""A pruned language model in the forms that ship: bytes on disk, tokens a second on this CPU."""

import copy
from dataclasses import dataclass
from pathlib import Path

import calm  # noqa: F401  (before transformers)
import decoding
from torch import Tensor
from transformers import PreTrainedModel

import torchprune
from torchprune import export


@dataclass(frozen=True)
class Form:
    """One line of the table.

    Attributes:
        megabytes: the file or directory that ships; relative to the dense one.
        speed: tokens a second; relative to the dense model in transformers.
        note: what is written and what runs it.
    """

    name: str
    megabytes: float
    relative_size: float
    tokens_per_second: float
    relative_speed: float
    note: str


def weight_bytes(path: Path) -> int:
    """Bytes of a file, or of the weights' files in a directory."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def compare(
    dense: PreTrainedModel,
    dense_directory: Path,
    pruned_directory: Path,
    folded_directory: Path,
    artifacts: Path,
    context: Tensor,
    tokens: int,
) -> tuple[list[Form], export.ExportReport]:
    """Write what is not written yet, and let all forms decode in turns.

    Args:
        dense: the model before pruning; `dense_directory` is where it lies.
        pruned_directory: of `torchprune.save`; `folded_directory`: of `to_hf`.
        artifacts: where the ONNX file goes.
        context: (1, length) tokens that all have read when they begin.
        tokens: how many each decodes.
    """
    pruned = torchprune.load(pruned_directory)
    folded = torchprune.fold(pruned)
    lowered = torchprune.lower(copy.deepcopy(folded), "bitmask")
    written = export.to_onnx(folded, artifacts / "packed.onnx", context[:, :4], with_cache=True)
    forms = [
        ("dense", dense_directory, decoding.InTorch(dense, context), "transformers"),
        (
            "folded",
            folded_directory,
            decoding.InTorch(folded, context),
            "transformers",
        ),
        ("bitmask", pruned_directory, decoding.InTorch(lowered, context), "torchprune"),
        ("ONNX packed", written.path, decoding.InRuntime(written.path, context), "ONNX Runtime"),
    ]
    seconds = decoding.race([runs for _, _, runs, _ in forms], tokens)
    sizes = [weight_bytes(path) for _, path, _, _ in forms]
    return [
        Form(name, size / 1e6, size / sizes[0], 1 / now, seconds[0] / now, note)
        for (name, _, _, note), size, now in zip(forms, sizes, seconds, strict=True)
    ], written
