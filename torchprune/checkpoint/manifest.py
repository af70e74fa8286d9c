"""The manifest of a saved directory: what each tensor is, how it became so. Read with distrust.

Everything that a manifest says is checked for form here, and against the weights file and the
model later, before anything of a claimed size is made.
"""

from __future__ import annotations

import functools
import json
import math
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import torch
from torch import nn

from torchprune.errors import CheckpointError, TorchpruneError
from torchprune.masking.mask import Record
from torchprune.masking.plain_state import Kind
from torchprune.masking.selection import as_selectors, layers_of, matches
from torchprune.reports.report import RunRecord
from torchprune.specs.functions import FunctionName, function_name
from torchprune.specs.options import Checked
from torchprune.specs.patterns import NM, Block, Unstructured
from torchprune.structure.size_record import Resized

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
FORMAT = "torchprune"
VERSION = 1

MAX_JSON = 32 << 20
"""Bytes of the largest JSON file that is read."""

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
    """

    dtype: str
    shape: tuple[int, ...]
    encoding: str
    kind: Kind = "parameter"
    to: str | None = None
    dense: bool = False
    record: Record | None = None

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
    """

    tensors: dict[str, Entry]
    runs: list[RunRecord] = field(default_factory=list)
    architecture: str = ""
    config: str | None = None
    generation: str | None = None
    weights: str = WEIGHTS
    made_with: dict[str, str] = field(default_factory=dict)
    resized: Resized | None = None


# -- writing ---------------------------------------------------------------------------------------


def write_manifest(directory: Path, manifest: Manifest, model: nn.Module) -> None:
    """Write `manifest.json`. The model tells which layers a spec's callables and types chose."""
    data = {
        "format": FORMAT,
        "version": VERSION,
        "made_with": manifest.made_with,
        "architecture": manifest.architecture,
        "weights": manifest.weights,
        "config": manifest.config,
        "generation": manifest.generation,
        **({} if manifest.resized is None else {"resized": asdict(manifest.resized)}),
        "runs": [_run_data(run, model) for run in manifest.runs],
        "tensors": {key: _entry_data(entry) for key, entry in manifest.tensors.items()},
    }
    text = json.dumps(data, indent=1)
    if len(text) > MAX_JSON:
        raise CheckpointError(f"the manifest would have {len(text)} bytes, limit {MAX_JSON}")
    (directory / MANIFEST).write_text(text, "utf-8")


def _entry_data(entry: Entry) -> dict[str, Any]:
    data = asdict(entry)
    default = {f.name: f.default for f in fields(Entry) if f.default is not MISSING}
    return {k: v for k, v in data.items() if k not in default or v != default[k]}


def _run_data(run: RunRecord, model: nn.Module) -> dict[str, Any]:
    data = {f.name: getattr(run, f.name) for f in fields(run)}
    chosen: Any = run.spec
    spec = {f.name: _plain(getattr(chosen, f.name)) for f in fields(chosen)}
    for name in ("targets", "ignore"):
        spec[name] = _selector_data(getattr(chosen, name), model)
    return {**data, "spec": {"method": chosen.method, **spec}}


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


def plain_file(directory: Path, name: object) -> Path:
    """The regular file of that plain name inside a directory.

    Raises:
        CheckpointError: the name is no plain name, leads outside, or no regular file has it.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}", name):
        raise CheckpointError(f"{directory}: {name!r:.80} is not the plain name of a file in it")
    path, home = (directory / name).resolve(), directory.resolve()
    if path.parent != home:
        raise CheckpointError(f"{directory / name} is a link that leads outside its directory")
    if not path.is_file():
        raise CheckpointError(f"{directory / name} is missing, or no regular file")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of bounded size.

    Raises:
        CheckpointError: it is too large, no JSON, nested too deeply, or not an object.
    """
    with path.open("rb") as file:
        raw = file.read(MAX_JSON + 1)
    if len(raw) > MAX_JSON:
        raise CheckpointError(f"{path}: larger than {MAX_JSON >> 20} MiB, which no such file is")
    try:
        data = json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise CheckpointError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged or truncated, not JSON ({error!s:.200})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(data).__name__}")
    return data


def is_saved(directory: Path) -> bool:
    """Whether a directory holds a manifest of ours, of whatever version."""
    try:
        return read_json(plain_file(directory, MANIFEST)).get("format") == FORMAT
    except (CheckpointError, OSError):
        return False


def read_manifest(directory: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        CheckpointError: it is absent, damaged, of another format or version, or malformed.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory")
    if not (directory / MANIFEST).exists():
        raise CheckpointError(f"{directory} holds no {MANIFEST}: torchprune.save did not write it")
    path = plain_file(directory, MANIFEST)
    data = read_json(path)
    try:
        return _manifest(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _manifest(data: dict[str, Any]) -> Manifest:
    if data.pop("format", None) != FORMAT:
        raise CheckpointError(f'not of torchprune (its "format" is not {FORMAT!r})')
    version = data.pop("version", None)
    if version != VERSION or isinstance(version, bool):
        raise CheckpointError(
            f"format version {version!r:.40}, but this torchprune reads version {VERSION}"
        )
    tensors, runs = data.get("tensors"), data.get("runs")
    if not isinstance(tensors, dict) or not isinstance(runs, list):
        raise CheckpointError('"tensors" must be an object and "runs" a list')
    entries = {key: _entry(entry, f"tensors[{key!r:.200}]") for key, entry in tensors.items()}
    for key, entry in entries.items():
        _check_tie(key, entry, entries)
    data["tensors"], data["runs"] = entries, [_run(run, f"runs[{i}]") for i, run in enumerate(runs)]
    if data.get("resized") is not None:
        data["resized"] = _typed(Resized, data["resized"], "resized")
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
        values["record"] = _typed(Record, data["record"], f"{where}.record")
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


def _check_encoding(entry: Entry, where: str) -> None:
    masked = entry.encoding == "masked"
    if masked != (entry.record is not None) or (entry.dense and not masked):
        raise CheckpointError(f'{where}: "record" and "dense" belong to masked tensors alone')
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


def _is_extent(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 1 << 48


def _run(data: object, where: str) -> RunRecord:
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: expected an object, got {type(data).__name__}")
    spec = _spec(data.get("spec"), f"{where}.spec")
    return _typed(RunRecord, {**data, "spec": spec}, where, checked=("spec",))


def _spec(data: object, where: str) -> Checked:
    known = dict[str, Any]()
    for kind in _spec_classes(Checked):
        if hasattr(kind, "method"):
            known.setdefault(kind.method, kind)  # a user's subclass does not stand for its parent
    method = data.get("method") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(method, str) or method not in known:
        raise CheckpointError(f"{where}: expected an object with a method: {', '.join(known)}")
    options = {k: v for k, v in data.items() if k != "method"}
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
    try:
        for name, value in options.items():
            if name != "overrides" and isinstance(value, dict):
                options[name] = _option(value)
            elif isinstance(value, str) and _FUNCTION.fullmatch(value):
                options[name] = FunctionName(value)
        spec: Checked = known[method](**options)
        return spec
    except (TorchpruneError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{where}: {error!s:.300}") from None


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
