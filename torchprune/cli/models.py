"""What a user names on the command line: a device, a model, its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchprune.calibration.documents import first_line
from torchprune.checkpoint.foreign_files import is_foreign
from torchprune.checkpoint.manifest import is_ours
from torchprune.checkpoint.save_load import load
from torchprune.cli.documents import looks_like_path
from torchprune.cli.hub import fetched
from torchprune.errors import InputError, MissingExtraError


@dataclass(frozen=True)
class Loader:
    """Loads what commands name, in one dtype and onto one device.

    Attributes:
        dtype: None is each checkpoint's own.
        bars: whether transformers may show its progress bars.
    """

    dtype: torch.dtype | None
    device: torch.device
    bars: bool

    def model(self, name: str) -> Any:
        """As `load_model`."""
        return load_model(import_transformers(self.bars), name, self.dtype, self.device)

    def tokenizer(self, name: str, *, required: bool) -> Any:
        """As `load_tokenizer`."""
        return load_tokenizer(import_transformers(self.bars), name, required=required)


def device_of(name: str) -> torch.device:
    """A device that can be used; "auto" is a GPU if there is one."""
    try:
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        )
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used: {first_line(error)}") from error
    return device


def load_model(
    transformers: Any, name: str, dtype: torch.dtype | None, device: torch.device
) -> Any:
    """A torchprune directory, a transformers directory, or a model from the hub.

    Args:
        dtype: to load it in; None is the checkpoint's own.
    """
    if is_ours(Path(name)) or is_foreign(Path(name)):
        model: Any = load(name)
        return model.to(device=device, dtype=dtype)
    _check_name(name)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise InputError(
            f"{name} holds no model: neither torchprune's manifest.json nor the config.json of "
            "transformers"
        )
    try:
        kind = transformers.AutoModelForCausalLM
        options = {"dtype": dtype or "auto", "trust_remote_code": False}
        model = fetched(name, lambda: kind.from_pretrained(name, **options))
    except Exception as error:  # whatever is wrong, it is with what the user named
        raise InputError(
            f"cannot load {name} as a causal language model: {first_line(error)}"
        ) from error
    return model.eval().to(device)


def load_tokenizer(transformers: Any, name: str, *, required: bool) -> Any:
    """The tokenizer beside a model, or None where none is there and none is required."""
    _check_name(name)
    try:
        kind = transformers.AutoTokenizer
        return fetched(name, lambda: kind.from_pretrained(name, trust_remote_code=False))
    except Exception as error:
        if not required:
            return None
        raise InputError(
            f"{name} holds no tokenizer that can be loaded ({first_line(error).rstrip(':')})"
        ) from error


def import_transformers(bars: bool) -> Any:
    """The package, with its own progress bars or without."""
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "cli", "loading a language model") from None
    switch = "enable_progress_bar" if bars else "disable_progress_bar"
    getattr(transformers.utils.logging, switch)()
    return transformers


def _check_name(name: str) -> None:
    if Path(name).is_file():
        raise InputError(f"{name} is a file; name the directory that it lies in")
    if looks_like_path(name) and not Path(name).is_dir():
        raise InputError(f"no such directory: {name}")
