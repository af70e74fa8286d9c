"""Tables by rich: all of them in 140 characters, or in a narrow terminal what tells rows apart."""

from __future__ import annotations

import os
import shutil
import sys

import pytest

from torchprune.reports.tables import Column, by_rich

pytest.importorskip("rich")

COLUMNS = [
    Column("layer"),
    Column("dtype"),
    Column("method"),
    Column("pattern"),
    Column("zeros", right=True),
    Column("note", fold=True),
]
NAMES = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]


def rows(*, pattern: str = "unstructured 0.5", note: str = "") -> list[list[str]]:
    patterns = ["unstructured 0.5", "unstructured 0.5", pattern]
    return [
        [name, "float32", "sparsegpt", one, str(10 + i), note]
        for i, (name, one) in enumerate(zip(NAMES, patterns, strict=True))
    ]


@pytest.fixture
def in_terminal(monkeypatch):
    def be(width: int) -> None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((width, 24)))

    return be


def test_elsewhere_and_in_a_wide_terminal_all_columns_are_there(in_terminal):
    before = by_rich(COLUMNS, rows(), ("total", "", "", "", "33", ""))
    assert before is not None
    assert all(column.head in before for column in COLUMNS)
    in_terminal(300)
    assert by_rich(COLUMNS, rows(), ("total", "", "", "", "33", "")) == before


@pytest.mark.parametrize("width", [80, 66, 50])
def test_in_a_narrow_one_what_rows_have_in_common_is_said_once(in_terminal, width):
    in_terminal(width)
    found = by_rich(COLUMNS, rows(), ("total", "", "", "", "33", ""))
    assert found is not None
    lines = found.splitlines()
    assert max(map(len, lines[:-1])) <= width
    assert lines[-1] == "in all rows: dtype float32, method sparsegpt, pattern unstructured 0.5"
    assert "note" not in found
    assert all(any(name in line for line in lines) for name in NAMES)
    assert any("total" in line and "33" in line for line in lines)


def test_what_tells_rows_apart_stays_and_no_name_is_cut(in_terminal):
    in_terminal(40)
    found = by_rich(COLUMNS, rows(pattern="2:4", note="a remark " * 5))
    assert found is not None
    assert "…" not in found
    assert max(map(len, found.splitlines()[:-1])) <= 40
    assert {"2:4", "12"} <= set(found.split())
    assert "remark" in found.splitlines()[-1]


def test_one_row_has_nothing_in_common(in_terminal):
    in_terminal(80)
    found = by_rich(COLUMNS, rows()[:1])
    assert found is not None
    assert "sparsegpt" in found
    assert "in all rows" not in found


def test_spare_columns_give_way_and_are_named(in_terminal):
    columns = [Column("", fold=True), Column("method", spare=True), Column("ms", right=True)]
    columns += [Column("MiB", right=True, spare=True)]
    lines = [(f"wanda,pattern={i}:8", f"method{i}", f"{i}.25", f"{i}00") for i in range(1, 4)]
    in_terminal(46)
    wide = by_rich(columns, lines)
    assert wide is not None
    assert "no room" not in wide
    in_terminal(38)
    found = by_rich(columns, lines)
    assert found is not None
    assert "no room here for: MiB\n" in found
    in_terminal(26)
    found = by_rich(columns, lines)
    assert found is not None
    assert "no room here for: method, MiB\n" in found
    assert max(map(len, found.splitlines()[:-1])) <= 26
    assert all(f"{i}.25" in found for i in range(1, 4))
