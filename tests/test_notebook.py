"""The notebook runs from its first cell to its last, and lies in git as it was written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "torchprune_tour.ipynb"


def said_by(cell: Any) -> str:
    """What a cell printed, without the warnings of libraries."""
    return "".join(out["text"] for out in cell["outputs"] if out.get("name") == "stdout")


@pytest.mark.filterwarnings("ignore")  # jupyter's own, in this process; the cells run in another
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    import nbclient
    import nbformat

    book = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources=place).execute()
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    said = "\n".join(map(said_by, cells))
    dense, pruned = (float(x) for x in re.findall(r"perplexity ([\d.]+)$", said, re.MULTILINE))
    assert dense < pruned
    assert "saved, loaded and exported: the same logits" in said
    assert any("image/png" in out.get("data", {}) for cell in cells for out in cell["outputs"])


def left_over(book: dict[str, Any]) -> list[str]:
    """What a run left in a notebook, and what names somebody's machine."""
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    found = [cell["id"] for cell in cells if cell["outputs"] or cell["execution_count"]]
    found += [cell["id"] for cell in book["cells"] if cell["metadata"]]
    found += sorted(set(book["metadata"]) - {"kernelspec", "language_info"})
    paths = r"[\"'\s=(](/(?:home|root|Users|work|tmp|usr|opt|mnt|content)\b[^\s\"']*|[A-Z]:\\\\\w*)"
    return found + re.findall(paths, json.dumps(book))


def test_the_notebook_is_kept_without_outputs_and_paths() -> None:
    book = json.loads(NOTEBOOK.read_text("utf-8"))
    assert left_over(book) == []
    first, *_ = (cell for cell in book["cells"] if cell["cell_type"] == "code")
    assert re.search(r"find_spec.*is None:.*\n +%pip install", "".join(first["source"]))


def test_what_a_run_leaves_would_be_found() -> None:
    book = json.loads(NOTEBOOK.read_text("utf-8"))
    cell = next(cell for cell in book["cells"] if cell["cell_type"] == "code")
    cell["execution_count"] = 1
    cell["source"] = ["open('/home/me/notes.txt')"]
    book["metadata"]["colab"] = {}
    assert left_over(book) == [cell["id"], "colab", "/home/me/notes.txt"]
