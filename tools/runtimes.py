"""Write docs/notes/runtimes.md: what becomes of every family, in every dtype, in every runtime.

    .venv/bin/python tools/runtimes.py

Tiny models of the tests' families, half of their weights pruned, are exported and run. The page is
written after each family and dtype; with `--only NAME ...` the other families' lines stay as they
are. A test holds a sample of the page against what exporters say.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from families import FAMILIES  # noqa: E402

import torchprune  # noqa: E402
from torchprune import MagnitudeSpec, export  # noqa: E402
from torchprune.errors import TorchpruneError  # noqa: E402

PAGE = ROOT / "docs" / "notes" / "runtimes.md"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EXPORTERS = {"to_onnx": "onnx", "to_openvino": "xml", "to_executorch": "pte", "to_pt2": "pt2"}
Rows = dict[tuple[str, torch.dtype], list[str]]

HEAD = """# Families in runtimes

A tiny model of each family, half of its weights pruned by magnitude, exported and run there:
`tools/runtimes.py` makes this page. A number is the largest difference from torch, relative to the
largest output; a letter is why there is none, in the words of the `ExportError`. Outputs of
OpenVINO are those of the dtype that it chooses by itself.

{where} Families that are not here were not run then: `--only NAME` adds them.

| family | dtype | {heads} |
|---|---|{rule}|
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Export all, or those named, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--page", type=Path, default=PAGE)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = read_page(asked.page.read_text("utf-8")) if asked.page.is_file() else {}
    for name in asked.only:
        for dtype in DTYPES:
            rows[name, dtype] = [cell(name, dtype, to) for to in EXPORTERS]
            print(name, dtype, rows[name, dtype], flush=True)
            asked.page.write_text(page(rows), "utf-8")


def cell(name: str, dtype: torch.dtype, to: str) -> str:
    """What an exporter makes of a family's model: a relative difference, or why there is none.

    An error that is no `TorchpruneError` is a fault, and goes through.
    """
    family = FAMILIES[name]
    model = torchprune.sparsify(family.make(dtype), MagnitudeSpec(), progress=False)
    with tempfile.TemporaryDirectory() as home, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # while exporting, of third parties
        try:
            path = Path(home) / f"model.{EXPORTERS[to]}"
            report: Any = getattr(export, to)(model, path, family.data(dtype)[0])
        except TorchpruneError as error:
            return " ".join(str(error).split())
    return f"{report.relative:.0e}"


def page(rows: Rows) -> str:
    """The page: a line for each family and dtype, and the reasons below."""
    reasons: dict[str, str] = {}
    lines = []
    for (name, dtype), cells in rows.items():
        shown = [said if _is_number(said) else _letter(reasons, said) for said in cells]
        lines.append(f"| {name} | {str(dtype).removeprefix('torch.')} | {' | '.join(shown)} |")
    heads = [f"`{to}`" for to in EXPORTERS]
    where = (
        f"Recorded {datetime.now(UTC):%Y-%m-%d} with torch {torch.__version__} on "
        f"{platform.machine()}."
    )
    text = HEAD.format(where=where, heads=" | ".join(heads), rule="|".join("---" for _ in heads))
    told = [f"- **{letter}**: {_plain(said)}" for said, letter in reasons.items()]
    return text + "\n".join([*lines, "", *told]) + "\n"


def read_page(text: str) -> Rows:
    """What `page` was made of."""
    reasons = dict(re.findall(r"^- \*\*(\w)\*\*: (.*)$", text, re.MULTILINE))
    known = {letter: re.sub(r"\\(.)", r"\1", said) for letter, said in reasons.items()}
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    rows: Rows = {}
    for line in text.splitlines():
        name, dtype, *cells = [part.strip() for part in line.strip("|").split("|")] + [""] * 2
        if line.startswith("|") and dtype in dtypes:
            rows[name, dtypes[dtype]] = [known.get(said, said) for said in cells[:-2]]
    return rows


def _is_number(said: str) -> bool:
    try:
        return float(said) >= 0
    except ValueError:
        return False


def _letter(reasons: dict[str, str], said: str) -> str:
    return reasons.setdefault(said, "abcdefghijklmnopqrstuvwxyz"[len(reasons)])


def _plain(said: str) -> str:
    """A reason as Markdown shows it, no mark-up of its own."""
    return "".join(f"\\{c}" if c in "\\`*_<>[]|" else c for c in said)


if __name__ == "__main__":
    main()
