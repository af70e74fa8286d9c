"""Another library's pruned model, written once more as ours."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch import nn

from torchprune.checkpoint.checked_files import plain_file
from torchprune.checkpoint.foreign_files import is_foreign, load_foreign
from torchprune.checkpoint.save_load import load_into, save
from torchprune.checkpoint.skeleton import CONFIG, GENERATION
from torchprune.errors import CheckpointError

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth")
"""How files of weights end, which are not carried over."""

_OWN = (CONFIG, GENERATION)
"""Files that a save writes anew, without what they say of sparsity."""


def migrate(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
) -> None:
    """Write another library's pruned model as `torchprune.save` would.

    Weights stay as they are bit for bit, pruned ones +0.0, and masks are what the other library's
    were. What its configuration says of sparsity, which stock loaders of today refuse, is left
    out. A tokenizer and other files beside the weights come along; code, hidden files and folders
    do not.

    Args:
        source: a directory with safetensors of compressed-tensors or SparseML (bitmasks, or plain
            weights whose configuration says that they are pruned), torch.nn.utils.prune, ModelOpt
            or torch.ao.pruning. It stays as it is.
        target: a new or empty directory, or one that holds an earlier save, which is replaced.
        model: of the checkpoint's names and shapes, where the directory has no configuration of
            transformers to build it from. Its weights and masks become those of the checkpoint.

    Raises:
        CheckpointError: the source is damaged, is no pruned model of another library (a dense one,
            or one of ours, which needs no migration), or lies in the target.
        MissingExtraError: transformers is absent, and no model is given.
    """
    old, new = Path(source), Path(target)
    if not is_foreign(old):
        raise CheckpointError(
            f"{old} is no pruned model of another library: expected masks or bitmasks beside its "
            "weights, or a configuration that says how they were pruned; torchprune.load reads "
            "what torchprune saved"
        )
    if old.resolve() in (new.resolve(), *new.resolve().parents):
        raise CheckpointError(f"{new} lies in {old}, which stays as it is: name another directory")
    found = load_foreign(old) if model is None else load_into(model, old)
    save(found, new, tokenizer=_Beside(old))


class _Beside:
    """What lies beside a model's weights, saved as a tokenizer is."""

    def __init__(self, source: Path) -> None:
        self._source = source

    def save_pretrained(self, target: str) -> None:
        """Copy the files; see `torchprune.save`."""
        for file in sorted(self._source.iterdir()):
            left = file.name in _OWN or file.name.endswith((*_WEIGHTS, ".py"))
            if left or file.name.startswith(".") or file.is_dir():
                continue
            shutil.copyfile(plain_file(self._source, file.name), Path(target) / file.name)
