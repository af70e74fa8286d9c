"""How long a recovery runs, its rates, and whether bfloat16 is tried."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchprune.training import pace
from torchprune.training.pace import Pace, share_of_rate


@given(st.floats(0, 1))
def test_a_rate_is_a_share_and_ends_at_nothing(progress: float) -> None:
    assert 0 <= share_of_rate(progress) <= 1
    assert share_of_rate(1.0) == 0
    if progress >= 0.05:
        assert share_of_rate(progress) == pytest.approx(1 - progress)
    else:
        assert share_of_rate(progress) <= 1 - progress


def test_steps_and_seconds_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(pace, "clock", lambda: now[0])
    by_steps, by_time = Pace(4, None), Pace(None, 10.0)
    by_time.leave(2.0)
    by_steps.step, now[0] = 3, 104.0
    assert (by_steps.progress(), by_steps.done(), by_steps.total) == (0.75, 3, 4)
    assert (by_time.progress(), by_time.done(), by_time.total) == (0.5, 50, 100)
    now[0] = 200.0
    assert by_steps.progress() == 0.75
    assert by_time.progress() == 1
    by_time.leave(100.0)
    assert by_time.progress() == 1
