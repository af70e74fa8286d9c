"""What may go of a model under one budget: units of several kinds, and whole blocks."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torchprune.calibration.batches import Batch
from torchprune.calibration.moments import Moments
from torchprune.errors import TargetError
from torchprune.graph.capture import Call
from torchprune.graph.groups import Group, Structure, read_groups
from torchprune.graph.trace import trace
from torchprune.masking.plain_state import slots_of
from torchprune.masking.selection import Layer
from torchprune.masking.targets import Target
from torchprune.reports.report import RunRecord
from torchprune.structure.blocks import droppable, lengths_of
from torchprune.structure.budget_spec import BudgetSpec
from torchprune.structure.ledger import Account, Ledger, parameters_of, products_of
from torchprune.structure.plan import planned
from torchprune.structure.prune_units import UnitRunner, by_inputs, score_at
from torchprune.structure.shrink_plan import ShrinkPlan
from torchprune.structure.specs import StructuredSpec
from torchprune.structure.unit_choices import Choice, choose, columns_of


@dataclass(frozen=True, eq=False)
class Way:
    """In which order the units of a group go.

    Attributes:
        order: (count,) the units, those first that go first.
        steps: (s,) how many of them are gone after each step, from 0 steps on.
        cost: (s,) float64, what that is predicted to cost.
    """

    order: Tensor
    steps: Tensor
    cost: Tensor

    def gone(self, step: int) -> Tensor:
        """(count,) bool: the units that are gone after so many steps."""
        gone = torch.zeros(len(self.order), dtype=torch.bool)
        gone[self.order[: int(self.steps[step])]] = True
        return gone


@dataclass(frozen=True)
class Decision:
    """What goes: a step for each choice, names of blocks, and notes on how that was decided."""

    steps: tuple[int, ...]
    blocks: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(eq=False)
class Read:
    """How one layer reads the units of a group.

    Attributes:
        columns: (cols,) the unit of each column of the layer's matrix, or -1.
        moments: of its inputs, with the second moment.
        score: (count,) what the units are worth to it, where its inputs say.
    """

    target: Target
    columns: Tensor
    moments: Moments
    score: Tensor | None = None


@dataclass(eq=False)
class Offers:
    """What may go.

    Attributes:
        choices: the groups whose units may.
        blocks: by name, what may go as a whole.
        idle: for each of these the layers that are zero then.
        plan: what would go of the model as it is.
        run: where it is noted what stays, and why.
        structure: of the model, where nothing is captured that no example reads.
    """

    model: nn.Module
    choices: list[Choice]
    blocks: dict[str, nn.Module]
    idle: dict[str, list[Layer]]
    plan: ShrinkPlan
    run: RunRecord
    structure: Structure = field(repr=False)

    def __post_init__(self) -> None:
        self._gone = {id(r.group): r.gone for r in self.plan.removals}
        self.lengths = lengths_of(self.model, self.blocks)

    def already(self, group: Group) -> Tensor:
        """(count,) bool: the units that go anyway."""
        return self._gone.get(id(group), torch.zeros(group.count, dtype=torch.bool))

    def runner(
        self, batches: Sequence[Batch], hold: torch.dtype | None, choices: Sequence[Choice]
    ) -> UnitRunner:
        """What takes the statistics of what reads some choices; what it notes is not kept."""
        run = RunRecord(spec=choices[0].spec)
        return UnitRunner(self.model, batches, list(choices), run, hold)

    def reads(
        self, batches: Sequence[Batch], hold: torch.dtype | None
    ) -> Generator[tuple[Choice, list[Read]], None, None]:
        """From one pass of the dense model each choice, once all that reads it was reached; at the
        end those of which some was."""
        runner = self.runner(batches, hold, self.choices)
        waiting: dict[int, tuple[Choice, list[Read]]] = {}
        with runner.calibration(gram=True) as calibration:
            for stop in calibration.stops():
                for target, moments in stop:
                    for choice, member in runner.read_by(target):
                        _, reads = waiting.setdefault(id(choice), (choice, []))
                        reads.append(Read(target, columns_of(target, member).cpu(), moments))
                        if by_inputs(choice.spec):
                            reads[-1].score = score_at(choice, member, target, moments)
                        if len(reads) == len(choice.readers):
                            yield waiting.pop(id(choice))
        yield from waiting.values()

    def reached(self, ways: Sequence[Way | None]) -> list[Way]:
        """The ways that are known; groups of which none is stay, which is noted."""
        found = []
        for choice, way in zip(list(self.choices), ways, strict=True):
            if way is None:
                self.run.skipped[choice.group.name] = "no calibration batch reached what reads it"
                self.choices.remove(choice)
            else:
                found.append(way)
        return found

    @property
    def groups(self) -> list[Group]:
        """Those of the choices, and behind them all others."""
        own = [choice.group for choice in self.choices]
        return [*own, *(g for g in self.structure.groups if not any(g is o for o in own))]

    def before(self, amount: str) -> int:
        """Of the model as it is, whatever masks say: its parameters or FLOPs."""
        return self.plan.flops[0] if amount == "flops" else self.plan.parameters[0]

    def ledger(self, amount: str) -> Ledger:
        """What the model holds ("parameters") or computes ("flops"), over `groups`."""
        if amount == "flops":
            return products_of(self.structure, self.groups)
        return parameters_of(slots_of(self.model), self.groups)

    def account(self, ledger: Ledger, ways: Sequence[Way]) -> Account:
        """The ledger by steps of the choices, at the model as it is."""
        orders, steps = [way.order for way in ways], [way.steps for way in ways]
        for group in self.groups[len(ways) :]:
            gone = self.already(group)
            orders.append(gone.int().argsort(descending=True, stable=True))
            steps.append(gone.sum().reshape(1))
        return ledger.of(orders, steps)

    def start(self, account: Account, blocks: Collection[str] = ()) -> None:
        """Have an account at no step yet, without some blocks."""
        account.open([0] * len(account.lines), {*self.plan.blocks, *blocks})

    def beyond(self, blocks: Collection[str]) -> list[int]:
        """The choices that some unit of is left for when blocks go."""
        inside = [f"{block}." for block in blocks]
        return [
            at
            for at, choice in enumerate(self.choices)
            if not all(any(m.key.startswith(b) for b in inside) for m in choice.group.members)
        ]


def offers_of(
    model: nn.Module, spec: BudgetSpec, batches: Sequence[Batch], run: RunRecord
) -> Offers:
    """What a budget may be met by; what it may not, and why, is noted.

    Raises:
        ShrinkError: the model cannot be exported.
        TargetError: nothing may go, or a selector matches nothing.
    """
    calls = [Call(batches[0])]
    structure = read_groups(model, trace(model, calls, closed=True))
    plan = planned(model, calls, structure)
    choices = [
        choice
        for one in spec.units
        for choice in choose(model, one, structure, run)
        if not all(_inside(m.key, plan.blocks) for m in choice.group.members)
    ]
    blocks: dict[str, nn.Module] = {}
    idle: dict[str, list[Layer]] = {}
    if spec.layers is not None:
        blocks, idle = droppable(model, spec.layers, batches[0], run)
        blocks = {name: block for name, block in blocks.items() if name not in plan.blocks}
    offers = Offers(model, choices, blocks, idle, plan, run, structure)
    if not choices and not any(offers.lengths.values()):
        there = ", ".join(sorted({g.kind for g in structure.groups})) or "nothing"
        why = "; ".join(f"{k}: {v}" for k, v in list(run.skipped.items())[:3])
        raise TargetError(
            f"BudgetSpec: nothing of this {type(model).__name__} may go for "
            f"{', '.join(type(one).__name__ for one in spec.over)}; it has groups of {there}"
            + (f" ({why})" if why else "")
        )
    return offers


def _inside(key: str, blocks: Collection[str]) -> bool:
    return any(key.startswith(f"{block}.") for block in blocks)


def way_of(
    score: Tensor, spec: StructuredSpec, already: Tensor, width: int = 1
) -> tuple[Tensor, Tensor]:
    """(count,) the order in which units go, what goes anyway first; and (s,) how many are gone
    after each step, such that what stays is a multiple of the spec's.

    Args:
        width: of one unit, in channels.
    """
    order = score.double().masked_fill(already, -torch.inf)
    order = order.argsort(descending=True, stable=True).flip(0)  # of equals the later go
    count, here = len(score), int((~already).sum())
    step = min(spec.multiple(count, width), count)
    kept = [here, *range((here - 1) // step * step, step - 1, -step)]
    return order, torch.tensor([count - n for n in kept])
