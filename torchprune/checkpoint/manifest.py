"""The manifest of a saved directory: what each tensor is, how it became so. Read with distrust.

Everything that a manifest says is checked for form here, and against the weights file and the
model later, before anything of a claimed size is made.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import pkgutil
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import torch
from torch import nn

from torchprune import methods
from torchprune.checkpoint.checked_files import MAX_JSON, plain_file, read_json
from torchprune.checkpoint.checksums import of_content
from torchprune.checkpoint.whole_files import write_whole
from torchprune.errors import CheckpointError, TorchpruneError
from torchprune.masking.mask import Record
from torchprune.masking.matrices import View
from torchprune.masking.plain_state import Kind
from torchprune.masking.selection import as_selectors, layers_of, matches
from torchprune.reports.report import RunRecord
from torchprune.specs.functions import FunctionName, function_name
from torchprune.specs.options import Checked
from torchprune.specs.patterns import NM, Block, Unstructured
from torchprune.specs.recovery import RecoverySpec  # noqa: F401  (likewise)
from torchprune.structure.budget_spec import BudgetSpec
from torchprune.structure.size_record import Resized
from torchprune.structure.specs import ChannelSpec, HeadSpec, LayerSpec, NeuronSpec

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
FORMAT = "torchprune"

MANIFEST_BESIDE = "torchprune_masks.json"
BITS_BESIDE = "torchprune_masks.data"
"""A safetensors file; other programs take every file so called for weights."""
FORMAT_BESIDE = "torchprune-masks"
VERSION = 2
"""What is written. Version 1, which is read too, is the same without checksums."""

SKIP = "verify=False reads it without looking at checksums"
"""What every error about a checksum adds."""

_FUNCTION = re.compile(r"<.{1,200} at 0x[0-9a-fA-F]+>")
"""How earlier versions wrote down a function."""

ENCODINGS = ("dense", "packed", "masked", "tied")

CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
"""The dtypes that can be stored, and what safetensors calls them."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the saved model.

    Attributes:
        dtype: a key of `CODES`.
        kind: "parameter", "buffer", or "transient" (a buffer outside the `state_dict`).
        encoding: how the weights file holds it: "dense" whole; "packed" as bits and the values
            whose bits are not all zero; "masked" as a mask's bits and the values it keeps; "tied"
            not at all, since it is the tensor `to`.
        to: the key of the tensor it is tied to.
        dense: whether the weights from before the pruning are there too (masked tensors only).
        record: how the mask came about (masked tensors only).
        checksum: of its blobs in the order bits, values, dense; None if tied, or in version 1.
            Beside a plain checkpoint: of the plain values, then of bits, hidden, dense.
        hidden, reversible: beside a plain checkpoint, whether the values behind the mask's zeros
            are there too, and whether they are those from before the pruning (masked tensors only).
    """

    dtype: str
    shape: tuple[int, ...]
    encoding: str
    kind: Kind = "parameter"
    to: str | None = None
    dense: bool = False
    record: Record | None = None
    checksum: str | None = None
    hidden: bool = False
    reversible: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """All that a saved directory says about itself.

    Attributes:
        tensors: by their names in the plain model's `state_dict`.
        runs: one for every call of `sparsify`.
        architecture: the model's class, for messages.
        config: the file that rebuilds the model (a transformers config), or None.
        generation: the file with its generation settings, or None.
        weights: the file with the tensors.
        made_with: versions of torchprune, torch and transformers.
        resized: how a shrunk model differs from what its class and config make, or None.
        header: checksum of the weights file's header; None in version 1, which has no checksums.
        settings: checksums of the config's and the generation settings' files, by name.
        variant: in the names of the plain checkpoint's files, beside one.
        beside: whether plain values are in a checkpoint of transformers beside this.
    """

    tensors: dict[str, Entry]
    runs: list[RunRecord] = field(default_factory=list)
    architecture: str = ""
    config: str | None = None
    generation: str | None = None
    weights: str = WEIGHTS
    made_with: dict[str, str] = field(default_factory=dict)
    resized: Resized | None = None
    header: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    variant: str | None = None
    beside: bool = False


# -- writing ---------------------------------------------------------------------------------------


def write_manifest(directory: Path, manifest: Manifest, model: nn.Module) -> None:
    """Write the manifest. The model tells which layers a spec's callables and types chose."""
    data = {
        "format": FORMAT_BESIDE if manifest.beside else FORMAT,
        "version": VERSION,
        "made_with": manifest.made_with,
        "architecture": manifest.architecture,
        "weights": manifest.weights,
        "config": manifest.config,
        "generation": manifest.generation,
        "header": manifest.header,
        "settings": manifest.settings,
        **({} if manifest.resized is None else {"resized": _resized_data(manifest.resized)}),
        **({} if manifest.variant is None else {"variant": manifest.variant}),
        "runs": [_run_data(run, model) for run in manifest.runs],
        "tensors": {key: _entry_data(entry) for key, entry in manifest.tensors.items()},
    }
    as_read = json.loads(json.dumps(data))
    text = json.dumps({**data, "checksum": of_content(as_read)}, indent=1)
    if len(text) > MAX_JSON:
        raise CheckpointError(f"the manifest would have {len(text)} bytes, limit {MAX_JSON}")
    write_whole(directory / (MANIFEST_BESIDE if manifest.beside else MANIFEST), text)


def _resized_data(resized: Resized) -> dict[str, Any]:
    """What every version can read, and what only some models have."""
    data = asdict(resized)
    return data if resized.narrowed else {k: v for k, v in data.items() if k != "narrowed"}


def _entry_data(entry: Entry) -> dict[str, Any]:
    data = asdict(entry)
    default = {f.name: f.default for f in fields(Entry) if f.default is not MISSING}
    return {k: v for k, v in data.items() if k not in default or v != default[k]}


def _run_data(run: RunRecord, model: nn.Module) -> dict[str, Any]:
    data = {f.name: getattr(run, f.name) for f in fields(run)}
    chosen: Any = run.spec
    return {**data, "spec": {"method": chosen.method, **_spec_data(chosen, model)}}


def _spec_data(chosen: Any, model: nn.Module) -> dict[str, Any]:
    """A spec's options; of a budget over others also theirs."""
    spec = {f.name: _plain(getattr(chosen, f.name)) for f in fields(chosen)}
    if isinstance(chosen, BudgetSpec):
        over = cast(Any, chosen.over)
        return {**spec, "over": [{type(one).__name__: _spec_data(one, model)} for one in over]}
    for name in ("targets", "ignore"):
        spec[name] = _selector_data(getattr(chosen, name), model)
    return spec


def _selector_data(selectors: Any, model: nn.Module) -> Any:
    """Selectors as strings; what is none (a type, a callable) as the names it chooses."""
    if selectors is None or isinstance(selectors, str):
        return selectors
    names: list[str] = []
    for selector in as_selectors(selectors):
        if isinstance(selector, str):
            names.append(selector)
        else:
            names += [layer.name for layer in layers_of(model) if matches(selector, layer)]
    return names


def _plain(value: Any) -> Any:
    """A spec's value as JSON has it: patterns as the strings that name them, values made of options
    as an object of one key, the class's name; functions as their names alone."""
    if isinstance(value, Unstructured | NM | Block):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, Checked):
        saved = [f.name for f in fields(cast(Any, value)) if f.metadata.get("saved", True)]
        return {type(value).__name__: {name: _plain(getattr(value, name)) for name in saved}}
    if callable(value) and not isinstance(value, type):
        return {"function": function_name(value)}
    return value if isinstance(value, str | int | float | None) else str(value)


# -- reading ---------------------------------------------------------------------------------------


def is_saved(directory: Path) -> bool:
    """Whether a directory holds a manifest of ours, of whatever version."""
    return _holds(directory, MANIFEST, FORMAT)


def has_masks_beside(directory: Path) -> bool:
    """Whether a directory holds masks of ours beside a checkpoint of transformers."""
    return _holds(directory, MANIFEST_BESIDE, FORMAT_BESIDE)


def is_ours(directory: Path) -> bool:
    """Whether a directory can only be ours, sound or damaged: to be read as that or refused, and
    never as the dense model whose files lie in it, too."""
    whole = directory / MANIFEST, directory / WEIGHTS
    beside = directory / MANIFEST_BESIDE
    return is_saved(directory) or beside.is_file() or all(file.is_file() for file in whole)


def _holds(directory: Path, name: str, kind: str) -> bool:
    try:
        return read_json(plain_file(directory, name)).get("format") == kind
    except (CheckpointError, OSError):
        return False


def read_manifest(directory: Path, *, verify: bool = True) -> Manifest:
    """Read and check the manifest in a directory, of a whole save or of masks beside a checkpoint.

    Args:
        verify: compare its checksum with its content.

    Raises:
        CheckpointError: it is absent, damaged, of another format or version, or malformed.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory")
    beside = not (directory / MANIFEST).exists()
    if beside and not (directory / MANIFEST_BESIDE).exists():
        raise CheckpointError(
            f"{directory} holds no {MANIFEST}: torchprune.save did not write it; nor has it masks "
            f"beside a checkpoint of transformers ({MANIFEST_BESIDE})"
        )
    path = plain_file(directory, MANIFEST_BESIDE if beside else MANIFEST)
    data = read_json(path)
    try:
        return _manifest(data, verify, beside)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _manifest(data: dict[str, Any], verify: bool, beside: bool) -> Manifest:
    claimed, found = data.pop("checksum", None), of_content(data)
    kind = FORMAT_BESIDE if beside else FORMAT
    if data.pop("format", None) != kind:
        raise CheckpointError(f'not of torchprune (its "format" is not {kind!r})')
    version = data.pop("version", None)
    if version not in (2 if beside else 1, VERSION) or isinstance(version, bool):
        raise CheckpointError(
            f"format version {version!r:.40}, but this torchprune reads versions 1 to {VERSION}"
        )
    if verify and version == VERSION and claimed != found:
        raise CheckpointError(
            f"damaged: its content has the checksum {found}, but it claims {claimed!r:.80} ({SKIP})"
        )
    tensors, runs = data.get("tensors"), data.get("runs")
    if not isinstance(tensors, dict) or not isinstance(runs, list):
        raise CheckpointError('"tensors" must be an object and "runs" a list')
    entries = {key: _entry(entry, f"tensors[{key!r:.200}]") for key, entry in tensors.items()}
    for key, entry in entries.items():
        _check_tie(key, entry, entries)
        _check_sum(key, entry, version)
        _check_place(key, entry, beside)
    if (data.get("header") is None) != (version == 1):
        raise CheckpointError("a checksum of the weights' header belongs to version 2")
    data["tensors"], data["runs"] = entries, [_run(run, f"runs[{i}]") for i, run in enumerate(runs)]
    if data.get("resized") is not None:
        data["resized"] = _typed(Resized, data["resized"], "resized")
    if "beside" in data:
        raise CheckpointError("the top level: 'beside' is unknown")
    data["beside"] = beside
    return _typed(Manifest, data, "the top level", checked=("tensors", "runs", "resized"))


def _entry(data: object, where: str) -> Entry:
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: expected an object, got {type(data).__name__}")
    shape = data.get("shape")
    if not (isinstance(shape, list) and len(shape) <= 64 and all(_is_extent(n) for n in shape)):
        raise CheckpointError(
            f"{where}: shape must be a list of whole numbers from 0 to 2^48, got {shape!r:.80}"
        )
    values = {**data, "shape": tuple(shape)}
    if data.get("record") is not None:
        values["record"] = record = _typed(Record, data["record"], f"{where}.record")
        _check_view(record.view, math.prod(shape), where)
    entry = _typed(Entry, values, where, checked=("shape", "record", "kind"))
    for name, value, known in (
        ("dtype", entry.dtype, tuple(CODES)),
        ("kind", entry.kind, get_args(Kind)),
        ("encoding", entry.encoding, ENCODINGS),
    ):
        if value not in known:
            raise CheckpointError(
                f"{where}: {name} {value!r:.80} is unknown; known: {', '.join(known)}"
            )
    _check_encoding(entry, where)
    return entry


def _check_view(text: str, size: int, where: str) -> None:
    if not text:
        return
    try:
        view = View.read(text)
    except ValueError as error:
        raise CheckpointError(f"{where}.record.view: {error}") from None
    if math.prod(view.shape) != size or view.axis < 1 or view.cols % view.axis:
        raise CheckpointError(f"{where}.record.view: {text!r:.80} is not of this tensor's shape")


def _check_encoding(entry: Entry, where: str) -> None:
    masked = entry.encoding == "masked"
    beside = entry.dense or entry.hidden or entry.reversible
    if masked != (entry.record is not None) or (beside and not masked):
        raise CheckpointError(
            f'{where}: "record", "dense", "hidden", "reversible" belong to masked tensors alone'
        )
    if (entry.encoding == "tied") != (entry.to is not None):
        raise CheckpointError(f'{where}: "to" belongs to tied tensors alone')
    if masked and not (entry.kind == "parameter" and entry.torch_dtype.is_floating_point):
        raise CheckpointError(
            f"{where}: a mask belongs on a floating point parameter, not on a {entry.dtype} "
            f"{entry.kind}"
        )


def _check_tie(key: str, entry: Entry, entries: dict[str, Entry]) -> None:
    if entry.to is None:
        return
    owner = entries.get(entry.to)
    if owner is None or owner.encoding == "tied":
        raise CheckpointError(f"tensors[{key!r:.200}]: tied to {entry.to!r:.200}, which is absent")
    if (owner.dtype, owner.shape, owner.kind) != (entry.dtype, entry.shape, entry.kind):
        raise CheckpointError(
            f"tensors[{key!r:.200}]: tied to {entry.to!r:.200} of another dtype, shape or kind"
        )


def _check_sum(key: str, entry: Entry, version: int) -> None:
    if (entry.checksum is None) != (version == 1 or entry.encoding == "tied"):
        raise CheckpointError(
            f"tensors[{key!r:.200}]: a checksum belongs to what is not tied, in version 2"
        )


def _check_place(key: str, entry: Entry, beside: bool) -> None:
    if (entry.encoding == "packed" and beside) or ((entry.hidden or entry.reversible) > beside):
        what = "packed" if beside else "hidden"
        raise CheckpointError(f"tensors[{key!r:.200}]: {what} values do not belong in this file")


def _is_extent(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 1 << 48


def _run(data: object, where: str) -> RunRecord:
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: expected an object, got {type(data).__name__}")
    spec = _spec(data.get("spec"), f"{where}.spec")
    return _typed(RunRecord, {**data, "spec": spec}, where, checked=("spec",))


def _spec(data: object, where: str) -> Checked:
    known = dict[str, Any]()
    for file in pkgutil.iter_modules(methods.__path__, f"{methods.__name__}."):
        importlib.import_module(file.name)  # a command has imported only what it runs
    for kind in _spec_classes(Checked):
        if hasattr(kind, "method"):
            known.setdefault(kind.method, kind)  # a user's subclass does not stand for its parent
    method = data.get("method") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(method, str) or method not in known:
        raise CheckpointError(f"{where}: expected an object with a method: {', '.join(known)}")
    options = {k: v for k, v in data.items() if k != "method"}
    try:
        if known[method] is BudgetSpec:
            options["over"] = _over(options.get("over"), where)
        spec: Checked = known[method](**_options(options, where))
        return spec
    except (TorchpruneError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{where}: {error!s:.300}") from None


def _over(data: object, where: str) -> tuple[Checked, ...]:
    """The specs that a budget is over, each an object of one key, its class's name."""
    kinds = {kind.__name__: kind for kind in (HeadSpec, NeuronSpec, ChannelSpec, LayerSpec)}
    found: list[Checked] = []
    for one in data if isinstance(data, list) else [data]:
        (name, options), *more = one.items() if isinstance(one, dict) and one else [("", None)]
        if more or name not in kinds or not isinstance(options, dict):
            raise ValueError(f"over: {one!r:.80} is none of {', '.join(kinds)}")
        found.append(kinds[name](**_options(options, where)))
    return tuple(found)


def _options(options: dict[str, Any], where: str) -> dict[str, Any]:
    """A spec's options as Python has them."""
    options = dict(options)
    for name in ("targets", "ignore"):
        value = options.get(name)
        if not (value is None or isinstance(value, str) or _fits(value, list[str])):
            raise CheckpointError(f"{where}: {name} must be a string or strings")
        if isinstance(value, list):
            options[name] = tuple(value)
    if isinstance(options.get("overrides"), dict):
        options["overrides"] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in options["overrides"].items()
        }
    for name, value in options.items():
        if name != "overrides" and isinstance(value, dict):
            options[name] = _option(value)
        elif isinstance(value, str) and _FUNCTION.fullmatch(value):
            options[name] = FunctionName(value)
    return options


def _option(data: dict[str, Any]) -> Checked | FunctionName:
    """A value such as PCG(...) or OWL(...), from {"OWL": {...}}; a function's name, as no more than
    that, from {"function": "..."}."""
    if list(data) == ["function"] and isinstance(data["function"], str):
        return FunctionName(data["function"])
    known = {kind.__name__: kind for kind in _spec_classes(Checked)[1:] if not _is_spec(kind)}
    (name, values), *more = data.items() or [("", None)]
    if more or name not in known or not isinstance(values, dict):
        raise ValueError(f"{data!r:.80} is none of {', '.join(known)}")
    option: Checked = known[name](**values)
    return option


def _is_spec(kind: Any) -> bool:
    return any("method" in vars(base).get("__annotations__", {}) for base in kind.__mro__)


def _spec_classes(base: Any) -> list[Any]:
    return [base, *(y for x in base.__subclasses__() for y in _spec_classes(x))]


T = TypeVar("T")


def _typed(kind: type[T], data: object, where: str, checked: tuple[str, ...] = ()) -> T:
    """A dataclass from a JSON object, every field of the type it declares.

    Args:
        checked: fields that are made and checked already.
    """
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: expected an object, got {type(data).__name__}")
    hints = _hints(cast(Any, kind))
    for name, value in data.items():
        if name not in hints:
            raise CheckpointError(f"{where}: {name!r:.80} is unknown")
        if name not in checked and not _fits(value, hints[name]):
            expected = getattr(hints[name], "__name__", hints[name])
            raise CheckpointError(f"{where}: {name} must be {expected}, got {value!r:.80}")
    try:
        return kind(**data)
    except TypeError as error:
        raise CheckpointError(f"{where}: incomplete ({error!s:.200})") from None


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: object, hint: Any) -> bool:
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(v, get_args(hint)[0]) for v in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_fits(v, get_args(hint)[1]) for v in value.values())
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)
