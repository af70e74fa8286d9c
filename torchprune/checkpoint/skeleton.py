"""A transformers model from its config, without weights, however hostile the config is.

Only classes of the transformers package itself are built; nothing is fetched or imported from
elsewhere. A config can ask for any number of layers, so the build is stopped when it registers more
than a checkpoint of so many tensors can need.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registry

from torchprune.checkpoint.checked_files import read_json
from torchprune.errors import CheckpointError, MissingExtraError
from torchprune.masking.plain_state import slots_of
from torchprune.structure.size_record import resized_of
from torchprune.structure.stock import parameters_on_meta

CONFIG = "config.json"
GENERATION = "generation_config.json"

_KERNELS = {
    "attn_implementation": ("eager", "sdpa"),
    "experts_implementation": ("eager", "batched_mm", "grouped_mm"),
}
"""Settings that choose how a model computes, and the values that name transformers' own code."""

_FOREIGN = ("auto_map", "_attn_implementation", "_experts_implementation", "_commit_hash")
_COUNTS = ("layer", "depth", "block", "label", "stage")
"""Parts of the names of settings that count things which a config or a model lists one by one."""


# -- writing ---------------------------------------------------------------------------------------


def write_config(model: nn.Module, directory: Path) -> tuple[str | None, str | None]:
    """Write what rebuilds a transformers model; other models get nothing.

    Returns:
        the names of the config's file and of the generation settings' file, None where not written.
    """
    if not _is_stock(model):
        return None, None
    config: Any = model.config
    data = json.loads(config.to_json_string())
    if (resized := resized_of(model)) is not None:
        data |= resized.original  # transformers would refuse what it became
    data["architectures"] = [type(model).__name__]
    data["dtype"] = str(model.dtype).removeprefix("torch.")
    for name, known in _KERNELS.items():
        if (chosen := getattr(config, f"_{name}", None)) in known and _throughout(config, name):
            data[name] = chosen
    text = json.dumps(data, indent=2, sort_keys=True)
    (directory / CONFIG).write_text(text + "\n", "utf-8")
    generation: Any = getattr(model, "generation_config", None)
    if generation is None:
        return CONFIG, None
    (directory / GENERATION).write_text(generation.to_json_string(), "utf-8")
    return CONFIG, GENERATION


def _throughout(config: Any, name: str) -> bool:
    """Whether a choice is that of the configurations inside too: read from the file it would be
    theirs, also where a part refuses it, as a tower without experts does one for experts."""
    inner = [getattr(config, sub, None) for sub in getattr(config, "sub_configs", {})]
    chosen = getattr(config, f"_{name}", None)
    return all(getattr(sub, f"_{name}", chosen) == chosen for sub in inner if sub is not None)


def _is_stock(model: nn.Module) -> bool:
    """Whether a model is of a class that transformers exports under the class's own name."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return False
    return getattr(transformers, type(model).__name__, None) is type(model)


# -- building --------------------------------------------------------------------------------------


class Skeleton:
    """A transformers model that can be built without weights.

    Args:
        config: the config's file.
        generation: the generation settings' file, or None.
        tensors: how many tensors the model may have.
        largest: the largest extent of any of them.
        held: bytes of all of them.
        adjust: called on every model that is built, before anything else sees it.
        settings: of the configuration, instead of what the file says.

    Raises:
        CheckpointError: the files do not describe a model of the transformers package.
        MissingExtraError: transformers is absent.
    """

    def __init__(
        self,
        config: Path,
        generation: Path | None,
        *,
        tensors: int,
        largest: int,
        held: int,
        adjust: Callable[[nn.Module], None] = lambda _: None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._adjust = adjust
        self._path, self._budget, self._held = config, 100 * tensors + 1000, held
        self._data = _understood(read_json(config)) | dict(settings or {})
        self._class = _class_of(self._data, config)
        _check_counts(self._data, max(self._budget, largest), config)
        self._generation = read_json(generation) if generation is not None else None

    def on_meta(self) -> nn.Module:
        """The model on the meta device, to compare its tensors with a file's.

        Raises:
            CheckpointError: transformers refuses the config, or it needs more than it may.
        """
        with torch.device("meta"):
            model = self._build()
        transient = [s.tensor for s in slots_of(model).values() if s.kind == "transient"]
        needed = sum(t.numel() * t.itemsize for t in transient)
        if needed > 4 * self._held + (1 << 28):
            raise CheckpointError(
                f"{self._path} asks for {needed} bytes of tables beside {self._held} of weights"
            )
        return model

    def with_buffers(self) -> nn.Module:
        """The model with its buffers as computed, its parameters on the meta device.

        Call it only when `on_meta` fitted the file.
        """
        with parameters_on_meta():
            model: Any = self._build()
        if self._generation is not None:
            from transformers import GenerationConfig

            with self._explained():
                model.generation_config = GenerationConfig.from_dict(self._generation)
        return model  # type: ignore[no-any-return]

    def converted(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """A checkpoint's tensors as the model names and joins them. Call it as `with_buffers`.

        Raises:
            CheckpointError: transformers cannot make the model's tensors from these.
        """
        with self._explained():
            config = self._class.config_class.from_dict(dict(self._data))
            return converted_by(self._class, config, tensors, dtype)

    def read_plain(self, directory: Path) -> tuple[nn.Module, dict[str, Any]]:
        """The model as stock `from_pretrained` reads it, and what that says of missing, unexpected
        and mismatched tensors. Call it as `with_buffers`.

        Raises:
            CheckpointError: transformers cannot.
        """
        with self._explained():
            model, found = self._class.from_pretrained(
                str(directory),
                config=self._class.config_class.from_dict(dict(self._data)),
                dtype="auto",
                local_files_only=True,
                output_loading_info=True,
            )
        return model.eval(), dict(found)

    def _build(self) -> nn.Module:
        with self._explained(), torch.random.fork_rng(devices=[]), _budgeted(self._budget):
            model: nn.Module = self._class(self._class.config_class.from_dict(dict(self._data)))
            self._adjust(model)
        return model

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Whatever transformers makes of a bad config is an error of the file."""
        try:
            yield
        except CheckpointError as error:
            raise CheckpointError(f"{self._path}: {error}") from None
        except Exception as error:
            raise CheckpointError(
                f"{self._path}: transformers cannot build a {self._class.__name__} from it "
                f"({type(error).__name__}: {error!s:.300})"
            ) from error


def converted_by(
    kind: Any, config: Any, tensors: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """A checkpoint's tensors as a class of transformers names and joins them.

    Args:
        dtype: what floating point tensors are cast to on the way.

    Raises:
        CheckpointError: some of the model's tensors cannot be made from these.
    """
    model, found = kind.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(f"the checkpoint lacks {', '.join(missing)!s:.300}")
    return {key: slot.tensor.detach() for key, slot in slots_of(model).items()}


def _class_of(data: dict[str, Any], path: Path) -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "transformers", "torchprune.load") from None
    names = data.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    found = (
        getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    )
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointError(f"{path}: architectures {names!r:.80} names no model of transformers")
    if found.config_class is None:
        raise CheckpointError(f"{path}: {name} cannot be built by itself")
    return found


def _understood(data: Any) -> Any:
    """A config's JSON as its class takes it, less settings that fetch or import from elsewhere."""
    if isinstance(data, list):
        return [_understood(value) for value in data]
    if not isinstance(data, dict):
        return data
    if data.keys() == {"__float__"} and data["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(data["__float__"])  # how transformers writes them
    return {
        key: _understood(value)
        for key, value in data.items()
        if not key.startswith(_FOREIGN)
        and (key not in _KERNELS or value in _KERNELS[key])
        # the name of a backbone is looked up on the hub, unless it is one of timm's
        and (key != "backbone" or data.get("model_type") == "timm_backbone")
    }


def _check_counts(data: Any, most: int, path: Path, key: str = "") -> None:
    """Refuse a count that no checkpoint of this size can have, before anything is listed by it."""
    if isinstance(data, dict):
        for name, value in data.items():
            _check_counts(value, most, path, str(name))
    elif isinstance(data, list):
        for value in data:
            _check_counts(value, most, path, key)
    elif isinstance(data, int) and data > most and any(part in key for part in _COUNTS):
        raise CheckpointError(
            f"{path}: {key} is {data}, far more than the checkpoint's tensors can make up"
        )


@contextmanager
def _budgeted(most: int) -> Iterator[None]:
    """Stop this thread from registering more than so many modules and tensors."""
    thread, count = threading.get_ident(), 0

    def registered(*_: object) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > most:
            raise CheckpointError("asks for far more layers than the checkpoint's tensors make up")

    with ExitStack() as hooks:
        for register in (
            registry.register_module_module_registration_hook,
            registry.register_module_parameter_registration_hook,
            registry.register_module_buffer_registration_hook,
        ):
            hooks.callback(register(registered).remove)
        yield
