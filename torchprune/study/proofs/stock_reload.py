"""The law of reload: stock transformers, in a process of its own, computes the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from torchprune.checkpoint.checksums import of_tensors
from torchprune.errors import CheckpointError, MissingExtraError
from torchprune.study.proofs import stock_child
from torchprune.study.proofs.proof import Breaches, Check, broken, unchecked
from torchprune.study.proofs.stored_runs import ALLOWED, compare_bits, relative

PATIENCE = 900
"""Seconds that the other process may take."""


def check_reload(
    model: nn.Module, plain: Path | None, inputs: Mapping[str, Tensor], expected: list[Tensor]
) -> Check:
    """Have another process load a folded model, and compare tensors and outputs.

    Args:
        model: folded.
        plain: the directory of a plain checkpoint, or None to write one for the while.
        expected: its outputs on the inputs.
    """
    name = type(model).__name__
    transformers = sys.modules.get("transformers")
    if transformers is None or getattr(transformers, name, None) is not type(model):
        return unchecked("reload", f"a {name} is no class of transformers")
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(dtypes) > 1:
        return unchecked(
            "reload", "it holds several floating dtypes, which from_pretrained casts to one"
        )
    with tempfile.TemporaryDirectory(prefix="torchprune-verify-") as made:
        job, where, known = Path(made), plain, name
        if where is None:
            where = job / "plain"
            try:
                _export(model, where)
            except (CheckpointError, MissingExtraError) as error:
                return unchecked("reload", f"{error!s:.300}")
            architectures = json.loads((where / "config.json").read_text("utf-8"))["architectures"]
            known = architectures[0]
        save_file({k: v.contiguous() for k, v in inputs.items()}, job / "inputs.safetensors")
        threads = torch.get_num_threads()
        asked = {"directory": str(where.resolve()), "class": known, "threads": threads}
        (job / "job.json").write_text(json.dumps(asked), "utf-8")
        if why := _run(job):
            return broken("reload", "stock transformers", f"a {known} that loads and runs", why)
        told = json.loads((job / "told.json").read_text("utf-8"))
        values = load_file(job / "outputs")
    outputs = [values[str(i)] for i in range(len(values))]
    return _judge(model, told, outputs, expected)


def _export(model: Any, where: Path) -> None:
    import_module("torchprune.export.hf").to_hf(model, where)


def _run(job: Path) -> str | None:
    """Why the other process failed, or None."""
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-P", str(Path(stock_child.__file__)), str(job)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            env={**os.environ, **quiet},
            cwd=job,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {PATIENCE} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit code {done.returncode}"
    return None


def _judge(
    model: nn.Module, told: dict[str, Any], outputs: list[Tensor], expected: list[Tensor]
) -> Check:
    found = Breaches()
    if told["torchprune"]:
        found.add("the other process", "transformers alone", "torchprune imported")
    for what in ("missing", "unexpected"):
        for key in told[what]:
            found.add(key, f"no {what} tensor", what)
    sums, computed = told["sums"], []
    lasting = model.state_dict().keys()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        mine = of_tensors([tensor.detach().cpu().contiguous()])
        if name in sums and sums[name] != mine:
            if name in lasting:
                found.add(name, f"the checksum {mine}", sums[name])
            else:
                computed.append(name)
    said = "loaded by stock transformers in a process without torchprune: the same tensors"
    worst = 0.0
    if computed:
        # Of them `save` keeps the rounding, and a class that computes them anew has none.
        for at, (one, two) in enumerate(zip(expected, outputs, strict=True)):
            worst = max(worst, off := relative(one, two))
            allowed = ALLOWED.get(one.dtype, 1e-4)
            if not off <= allowed:
                found.add(f"outputs ({at})", f"within {allowed:g} of the largest", f"{off:.3g}")
        said += f", outputs within rounding ({len(computed)} tables are computed anew, unrounded)"
    elif expected:
        compare_bits("outputs on seeded inputs", expected, outputs, found)
        said += " and outputs, to the bit"
    return found.judge("reload", said, tensors=len(sums), difference=worst)
