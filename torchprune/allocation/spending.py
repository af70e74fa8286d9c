"""One budget spent on the units of many groups: what costs least for what it saves goes first."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from torch import Tensor

from torchprune.structure.ledger import Account

Move = tuple[float, int, int]
"""Cost for what is saved, the group, and the step it goes to."""


def spent(account: Account, costs: Sequence[Tensor], budget: float) -> bool:
    """Move groups along their steps until an account is at most the budget.

    A group always goes on to that step to which what it costs for what it saves is least, so that
    several steps go together where the first of them is dear. Whatever turns out not to be needed
    comes back, the dearest first: afterwards no group can be a step back.

    Args:
        costs: (s,) float64 a group, at each of its steps; the account's other groups stay.

    Returns:
        whether the budget is met; otherwise every group is at its last step.
    """
    heap = [move for at in range(len(costs)) if (move := _best(account, costs, at))]
    heapq.heapify(heap)
    while heap and account.total > budget:
        known = heapq.heappop(heap)
        move = _best(account, costs, known[1])
        if move is None:
            continue
        if move[0] <= known[0] * (1 + 1e-9):
            account.go(move[1], move[2])
            move = _best(account, costs, move[1])
        if move is not None:
            heapq.heappush(heap, move)
    if account.total > budget:
        for at, cost in enumerate(costs):
            account.go(at, len(cost) - 1)
        return account.total <= budget
    _take_back(account, costs, budget)
    return True


def _best(account: Account, costs: Sequence[Tensor], at: int) -> Move | None:
    """The step that a group goes to next, of equal ones the nearest; None at its end.

    What saves nothing goes last: it may come to save something once others are gone.
    """
    now = account.now[at]
    if now + 1 >= len(costs[at]):
        return None
    worth = account.along(at)
    saved = (worth[now] - worth[now + 1 :]).clamp_min(0)
    cost = (costs[at][now + 1 :] - costs[at][now]).clamp_min(0)
    ratio = (cost / saved).nan_to_num(math.inf, math.inf).tolist()
    least = min(range(len(ratio)), key=ratio.__getitem__)
    return ratio[least], at, now + 1 + least


def _take_back(account: Account, costs: Sequence[Tensor], budget: float) -> None:
    """Undo what can be undone within the budget, the step that costs most first."""
    while True:
        spare = budget - account.total
        found = []
        for at, cost in enumerate(costs):
            now = account.now[at]
            if now > 0:
                worth = account.along(at)
                if float(worth[now - 1] - worth[now]) <= spare:
                    found.append((float(cost[now - 1] - cost[now]), at, now - 1))
        if not found:
            return
        _, at, step = min(found)
        account.go(at, step)
