"""Whether bfloat16 pays is tried where a processor has it, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from torchprune.methods import precision


def test_bfloat16_is_tried_only_where_there_is_any(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(precision, "_is_faster_here", lambda: bool(tried.append(1)) or True)
    for there in (False, True):
        monkeypatch.setattr(precision, "has_bfloat16", lambda _, there=there: there)
        assert precision.pays_in_bfloat16(torch.device("cpu")) is there
    assert tried == [1]
    assert precision.pays_in_bfloat16(torch.device("cuda"))
    assert tried == [1]


def test_what_is_tried_gives_an_answer() -> None:
    assert precision._is_faster_here() in (True, False)
