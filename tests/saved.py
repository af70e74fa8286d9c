"""What tests of saved models compare."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.checkpoint.checksums import checksum, of_content
from torchprune.reports.report import runs_of

QUIET: dict[str, Any] = {"progress": False}
HUGGING = [f for f in FAMILIES.values() if f.name not in ("mlp", "torch_encoder")]


# -- what is compared ------------------------------------------------------------------------------


def bits(tensor: Tensor) -> tuple[str, tuple[int, ...], list[int]]:
    """A tensor as its dtype, shape and bytes."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).tolist()


def plain(model: nn.Module) -> nn.Module:
    return torchprune.fold(copy.deepcopy(model))


def ties(model: nn.Module) -> set[frozenset[str]]:
    names: dict[int, set[str]] = {}
    for name, parameter in plain(model).named_parameters(remove_duplicate=False):
        names.setdefault(parameter.data_ptr(), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def state(model: nn.Module) -> dict[str, Any]:
    """All that a save must bring back, in a form that compares."""
    folded = plain(model)
    return {
        "weights": {k: bits(v) for k, v in folded.state_dict().items()},
        "buffers": {k: bits(v) for k, v in folded.named_buffers()},
        "masks": {k: bits(v) for k, v in torchprune.masks(model).items()},
        "report": torchprune.report(model).to_dict(),
        "specs": [str(run.spec) for run in runs_of(model)],
        "ties": ties(model),
    }


def raw(model: nn.Module) -> dict[str, Any]:
    """A model as it is, masked values and all."""
    return {
        **{k: bits(v) for k, v in model.state_dict().items()},
        "identity": [id(p) for p in model.parameters()],
        "report": torchprune.report(model).to_dict(),
    }


def output(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        out = model(**batch) if isinstance(batch, dict) else model(batch)
    return next(iter(out.values())) if isinstance(out, dict) else out


def prune(model: nn.Module, spec: Any = None, data: Any = None, **options: Any) -> nn.Module:
    return torchprune.sparsify(model, spec or MagnitudeSpec(), data, **{**QUIET, **options})


def pruned(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A family's model, masked by magnitude."""
    return prune(FAMILIES[name].make(), MagnitudeSpec(**options)).to(dtype)


class Net(nn.Module):
    """Convolutions, running statistics, a tie, a shared module, a table outside the state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.embed = nn.Embedding(8, 8)
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(8.0), persistent=False)
        self.register_buffer("empty", torch.zeros(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.norm(self.conv(x))).mean((2, 3))
        return self.head(self.again(torch.relu(self.first(x))) + self.table)


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Net()
        with torch.no_grad():
            model.train()(torch.randn(2, 3, 8, 8))  # running statistics of their own
    return model.eval()


class Box(nn.Module):
    """Any tensors at all."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        for i, tensor in enumerate(held):
            if i % 2 and tensor.is_floating_point():
                self.register_parameter(f"p{i}", nn.Parameter(tensor))
            else:
                self.register_buffer(f"b{i}", tensor)


# -- what breaks -----------------------------------------------------------------------------------


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


class Crash(BaseException):
    """Not an Exception, as a keyboard interrupt is none."""


def crash(*_: object, **__: object) -> None:
    raise Crash


# -- files that are changed on purpose -------------------------------------------------------------


def reseal(directory: Path) -> None:
    """Give a directory the checksums of what is in it now: what is wrong with it is no damage."""
    path, weights = directory / "manifest.json", directory / "weights.safetensors"
    try:
        manifest = json.loads(path.read_text())
        tensors = manifest["tensors"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    content = weights.read_bytes() if weights.is_file() else b""
    length = int.from_bytes(content[:8], "little")
    manifest["header"] = checksum([content[: 8 + length]])
    with suppress(KeyError, TypeError, ValueError):  # a flipped byte made it none, or its name
        for name in manifest["settings"]:
            if (directory / name).is_file():
                manifest["settings"][name] = checksum([(directory / name).read_bytes()])
    with suppress(AttributeError, KeyError, TypeError, ValueError):
        header = json.loads(content[8 : 8 + length])
        spans = {blob: header[blob]["data_offsets"] for blob in header if blob != "__metadata__"}
        for key, entry in tensors.items():
            blobs = [b for b in (f"{key}.bits", f"{key}.values", key, f"{key}.dense") if b in spans]
            parts = [content[8 + length + a : 8 + length + b] for a, b in map(spans.get, blobs)]
            entry["checksum"] = None if entry["encoding"] == "tied" else checksum(parts)
    path.write_text(json.dumps(sealed(manifest)))


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with the checksum of its own content."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return {**content, "checksum": of_content(content)}


def as_version_1(directory: Path) -> None:
    """Make a directory what it would have been before there were checksums."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["version"] = 1
    for name in ("checksum", "header", "settings"):
        del manifest[name]
    for entry in manifest["tensors"].values():
        entry.pop("checksum", None)
    path.write_text(json.dumps(manifest, indent=1))
