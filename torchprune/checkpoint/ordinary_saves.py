"""The ways to save and load of transformers and its kin, taught about masks.

`save_pretrained`, which `push_to_hub` and every checkpoint of `Trainer` go through, would write a
masked weight under names that stock `from_pretrained` passes over, and the model would come back
with random weights. As soon as these libraries are imported, with or without a mask in sight, some
of their methods are wrapped, and do for a model without masks what they did before:

- `PreTrainedModel.save_pretrained`, `PyTorchModelHubMixin.save_pretrained` and
  `Accelerator.save_model` write folded plain weights, and the masks beside them;
- `PreTrainedModel.from_pretrained` refuses a checkpoint that holds masks under parametrized names,
  and `safetensors.torch.load_model` refuses them for a model without;
- `Trainer` resumes, and goes back to its best checkpoint, with the masks beside it.

Nothing here imports any of them.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from torchprune.checkpoint.beside import (
    Folded,
    folded_state,
    is_mask_name,
    remove_beside,
    write_beside,
)
from torchprune.checkpoint.manifest import BITS_BESIDE, Manifest, has_masks_beside
from torchprune.checkpoint.save_load import load_into, versions
from torchprune.checkpoint.skeleton import CONFIG, GENERATION
from torchprune.errors import CheckpointError
from torchprune.lowering.modules import BitmaskLinear
from torchprune.masking.awaited import Lesson, when_imported, wrapped
from torchprune.masking.mask import masked_layers
from torchprune.reports.report import runs_of
from torchprune.structure.size_record import resized_of

_RESUMABLE: ContextVar[bool] = ContextVar("resumable", default=False)
"""Whether a checkpoint is being written that training is to go on from."""

_INSTEAD = "Where it was written, save it with torchprune.save, or with"


def teach() -> None:
    """Wrap the libraries' methods: now where they are imported, else when they are."""
    waiting: dict[str, Lesson] = {
        "transformers.modeling_utils": _teach_models,
        "transformers.trainer": _teach_trainer,
        "huggingface_hub.hub_mixin": _teach_mixin,
        "accelerate.accelerator": _teach_accelerator,
        "safetensors.torch": _teach_safetensors,
    }
    when_imported(waiting)


# -- models ----------------------------------------------------------------------------------------


def _teach_models(module: ModuleType) -> None:
    wrapped(module.PreTrainedModel, "save_pretrained", _saving)
    wrapped(module.PreTrainedModel, "from_pretrained", _loading)


def _saving(original: Any) -> Any:
    signature = inspect.signature(original)

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, save_directory, *args, **kwargs)
        call.apply_defaults()
        options, directory = call.arguments, Path(save_directory)
        if getattr(self, "_hf_peft_config_loaded", False) or directory.is_file():
            return original(self, save_directory, *args, **kwargs)
        writes = _writes(self, bool(options.get("is_main_process", True)))
        _check_lifted(self)
        if next(masked_layers(self), None) is None:
            result = original(self, save_directory, *args, **kwargs)
            if writes:
                remove_beside(directory)
            return result
        _check_options(self, options)
        given = options.get("state_dict")
        folded = folded_state(self, self.state_dict() if given is None else given)
        if writes:
            directory.mkdir(parents=True, exist_ok=True)
            # Before the checkpoint, which may be pushed to the hub as soon as it is written.
            _write_masks(self, directory, folded, options.get("variant"))
        options["state_dict"] = folded.state
        return original(*call.args, **call.kwargs)

    return save_pretrained


def _write_masks(model: Any, directory: Path, folded: Folded, variant: str | None = None) -> None:
    models = sys.modules.get("transformers.modeling_utils")
    stock = models is not None and isinstance(model, models.PreTrainedModel)
    manifest = Manifest(
        tensors={},
        runs=runs_of(model),
        architecture=type(model).__name__,
        config=CONFIG if stock else None,
        generation=GENERATION if stock and model.can_generate() else None,
        weights=BITS_BESIDE,
        made_with=versions(),
        resized=resized_of(model),
        variant=variant,
        beside=True,
    )
    write_beside(directory, model, folded, manifest, hidden=_RESUMABLE.get())


def _writes(model: Any, is_main_process: bool) -> bool:
    """Whether this process writes the files."""
    decide = getattr(model, "should_save_on_this_rank", None)
    return bool(decide(is_main_process)) if callable(decide) else is_main_process


def _check_lifted(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, BitmaskLinear):
            raise CheckpointError(
                f"{path or 'the model'} is lowered, and would be saved in a form that no plain "
                "model can read; call torchprune.lift(model) before saving it so"
            )


def _check_options(model: Any, options: dict[str, Any]) -> None:
    if options.get("distributed_checkpoint"):
        raise CheckpointError(
            "a distributed checkpoint cannot hold masks; save_pretrained without "
            "distributed_checkpoint, or torchprune.fold(model) first"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise CheckpointError(
            "this model is also quantized; torchprune.fold(model) before save_pretrained"
        )


def _loading(original: Any) -> Any:
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.pop("output_loading_info", False)
        model, found = original(cls, *args, output_loading_info=True, **kwargs)
        names = set(found["unexpected_keys"])
        for name in sorted(names):
            if is_mask_name(name, names):
                raise CheckpointError(
                    f"this checkpoint is of a masked {cls.__name__} and holds {name!r:.200}: its "
                    f"weights would come back random. {_INSTEAD} model.save_pretrained; or mask "
                    "such a model likewise and read the file with "
                    "safetensors.torch.load_model(model, file)"
                )
        return (model, found) if wanted else model

    return from_pretrained


# -- Trainer ---------------------------------------------------------------------------------------


def _teach_trainer(module: ModuleType) -> None:
    wrapped(module.Trainer, "_save_checkpoint", _checkpointing)
    wrapped(module.Trainer, "_load_from_checkpoint", _resuming)
    wrapped(module.Trainer, "_load_best_model", _going_back)


def _checkpointing(original: Any) -> Any:
    def _save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _RESUMABLE.set(not self.args.save_only_model)
        try:
            return original(self, *args, **kwargs)
        finally:
            _RESUMABLE.reset(token)

    return _save_checkpoint


def _resuming(original: Any) -> Any:
    def _load_from_checkpoint(self: Any, resume_from_checkpoint: Any, model: Any = None) -> Any:
        if not _restored(self, self.model if model is None else model, resume_from_checkpoint):
            return original(self, resume_from_checkpoint, model)
        return None

    return _load_from_checkpoint


def _going_back(original: Any) -> Any:
    def _load_best_model(self: Any) -> Any:
        if not _restored(self, self.model, self.state.best_model_checkpoint):
            return original(self)
        return None

    return _load_best_model


def _restored(trainer: Any, model: Any, directory: str | os.PathLike[str] | None) -> bool:
    """Give a Trainer's model what a checkpoint with masks beside it holds, if it is one."""
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if directory is None or sharded or not has_masks_beside(Path(directory)):
        return False
    load_into(trainer.accelerator.unwrap_model(model, keep_torch_compile=False), directory)
    return True


# -- modules of one's own -------------------------------------------------------------------------


def _teach_mixin(module: ModuleType) -> None:
    wrapped(module.PyTorchModelHubMixin, "_save_pretrained", _saving_mixed)


def _teach_accelerator(module: ModuleType) -> None:
    wrapped(module.Accelerator, "save_model", _saving_by_accelerator)


def _teach_safetensors(module: ModuleType) -> None:
    wrapped(module, "load_model", _reading)


def _reading(original: Any) -> Any:
    def load_model(model: nn.Module, filename: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            with safe_open(str(filename), framework="pt") as file:
                names = set(file.keys())
        except (SafetensorError, OSError):
            names = set()  # the function itself says what is wrong with it
        for name in sorted(name for name in names if is_mask_name(name, names)):
            if name not in model.state_dict():
                raise CheckpointError(
                    f"{filename} is of a masked model and holds {name!r:.200}, which this "
                    f"{type(model).__name__} has not. {_INSTEAD} safetensors.torch.save_model "
                    "after torchprune.fold(model); or mask this model likewise before reading it"
                )
        return original(model, filename, *args, **kwargs)

    return load_model


def _saving_mixed(original: Any) -> Any:
    def _save_pretrained(self: Any, save_directory: Path) -> Any:
        with _folding(self, Path(save_directory), True):
            return original(self, save_directory)

    return _save_pretrained


def _saving_by_accelerator(original: Any) -> Any:
    signature = inspect.signature(original)

    def save_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        model = self.unwrap_model(call.arguments["model"])
        masked = next(masked_layers(model), None) is not None
        if masked and not call.arguments.get("safe_serialization", True):
            raise CheckpointError(
                "masks stand beside safetensors files only; save_model with "
                "safe_serialization=True, or torchprune.fold(model) first"
            )
        directory = Path(call.arguments["save_directory"])
        with _folding(model, directory, bool(self.is_main_process)):
            return original(self, *args, **kwargs)

    return save_model


@contextmanager
def _folding(model: nn.Module, directory: Path, writes: bool) -> Iterator[None]:
    """While a model is saved into a directory its `state_dict` is that of the folded one."""
    _check_lifted(model)
    if next(masked_layers(model), None) is None:
        yield
        if writes:
            remove_beside(directory)
        return
    folded: list[Folded] = []

    def state_dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
        folded.append(folded_state(model, type(model).state_dict(model, *args, **kwargs)))
        return folded[-1].state

    vars(model)["state_dict"] = state_dict
    try:
        yield
    finally:
        del vars(model)["state_dict"]
    if writes and folded:
        _write_masks(model, directory, folded[-1])
