"""Write docs/notes/runtimes.md: what becomes of every family, in every dtype, in every runtime.

    .venv/bin/python tools/runtimes.py

Tiny models of the tests' families, half of their weights pruned, are exported and run. The page is
written after each cell; with `--only NAME ...`, `--to EXPORTER ...` or `--missing` the other cells
stay as they are. A test holds a sample of the page against what exporters say.
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
EXPORTERS = {
    "to_onnx": "onnx",
    "to_openvino": "xml",
    "to_executorch": "pte",
    "to_litert": "tflite",
    "to_coreml": "mlpackage",
    "to_pt2": "pt2",
    "to_aoti": "pt2",
}
NOT_RUN = "not run"
Rows = dict[tuple[str, torch.dtype], dict[str, str]]

HEAD = """# Families in runtimes

A tiny model of each family, half of its weights pruned by magnitude, exported and run there:
`tools/runtimes.py` makes this page. A number is the largest difference from torch, relative to the
largest output; r1, r2 and so on is why there is none, in the words of the `ExportError`. Outputs of
OpenVINO are those of the dtype that it chooses by itself. `to_onnx` and `to_openvino` compute a
bfloat16 model in float32, and are compared with that.

{where} Core ML runs on a Mac alone: what is compared there is the
program's own operators, run in NumPy.

| family | dtype | {heads} |
|---|---|{rule}|
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Export all, or those named, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--to", nargs="+", choices=list(EXPORTERS), default=list(EXPORTERS))
    parser.add_argument("--missing", action="store_true", help="only cells that were not run yet")
    parser.add_argument("--page", type=Path, default=PAGE)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    known = read_page(asked.page.read_text("utf-8")) if asked.page.is_file() else {}
    rows = {(name, dtype): known.get((name, dtype), {}) for name in FAMILIES for dtype in DTYPES}
    for to in asked.to:
        for name in asked.only:
            for dtype in DTYPES:
                if asked.missing and to in rows[name, dtype]:
                    continue
                rows[name, dtype][to] = cell(name, dtype, to)
                print(to, name, dtype, rows[name, dtype][to], flush=True)
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
        told = [cells.get(to, NOT_RUN) for to in EXPORTERS]
        shown = [said if _is_short(said) else _letter(reasons, said) for said in told]
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
    reasons = dict(re.findall(r"^- \*\*(\w+)\*\*: (.*)$", text, re.MULTILINE))
    known = {letter: re.sub(r"\\(.)", r"\1", said) for letter, said in reasons.items()}
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    rows: Rows = {}
    columns: list[str] = []
    for line in text.splitlines():
        name, dtype, *cells = [part.strip() for part in line.strip("|").split("|")] + [""] * 2
        cells = cells[:-2]
        if name == "family":
            columns = [head.strip("`") for head in cells]
        if line.startswith("|") and dtype in dtypes:
            rows[name, dtypes[dtype]] = {
                to: known.get(said, said)
                for to, said in zip(columns, cells, strict=True)
                if said != NOT_RUN
            }
    return rows


def _is_short(said: str) -> bool:
    return said == NOT_RUN or is_number(said)


def is_number(said: str) -> bool:
    """Whether a cell is a difference."""
    try:
        return float(said) >= 0
    except ValueError:
        return False


def _letter(reasons: dict[str, str], said: str) -> str:
    return reasons.setdefault(said, f"r{len(reasons) + 1}")


def _plain(said: str) -> str:
    """A reason as Markdown shows it, no mark-up of its own."""
    return "".join(f"\\{c}" if c in "\\`*_<>[]|" else c for c in said)


if __name__ == "__main__":
    main()
