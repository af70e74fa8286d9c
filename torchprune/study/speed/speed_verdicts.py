"""What the numbers of a profile say, in words: pure functions of cells, ratios and FLOPs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from torchprune.study.speed.profile_records import Cell, Contender, Measured, Prospect, Verdict
from torchprune.study.speed.spreads import Ratio

T = TypeVar("T", bound=Measured)

HALVED = "half of the outputs removed"
"""The kernel of `prospects` that stands for structured pruning."""

ALIKE = 0.03
"""A difference of less than this is none that anybody would notice."""

_KINDS = ("faster", "slower", "same", "unclear")


def judged(profile: T) -> T:
    """The profile with its verdicts."""
    found = [
        *_of_cells(profile),
        *_of_zeros(profile),
        *_of_bounds(profile),
        *_of_memory(profile),
        *_of_prospects(profile),
    ]
    return replace(profile, verdicts=tuple(found))


def standing(ratio: Ratio) -> str:
    """ "faster" or "slower" where the whole interval is on one side of 1 and the ratio is more than
    `ALIKE` off; "same" where the whole interval is within `ALIKE` of 1; "unclear" otherwise.
    """
    if ratio.high < 1 and ratio.value < 1 - ALIKE:
        return "faster"
    if ratio.low > 1 and ratio.value > 1 + ALIKE:
        return "slower"
    if ratio.low >= 1 - ALIKE and ratio.high <= 1 + ALIKE:
        return "same"
    return "unclear"


def times_as(ratio: Ratio) -> str:
    """How much faster or slower, with the interval the same way round.

    >>> times_as(Ratio(0.5, 0.4, 0.625))
    '2.00 times as fast (1.60 to 2.50)'
    >>> times_as(Ratio(1.3, 1.25, 1.4))
    '1.30 times slower (1.25 to 1.40)'
    """
    if ratio.value < 1:
        fast = (1 / ratio.value, 1 / ratio.high, 1 / ratio.low)
        return f"{fast[0]:.2f} times as fast ({fast[1]:.2f} to {fast[2]:.2f})"
    return f"{ratio.value:.2f} times slower ({ratio.low:.2f} to {ratio.high:.2f})"


# -- contenders ------------------------------------------------------------------------------------


def _of_cells(profile: Measured) -> Iterator[Verdict]:
    for contender in profile.contenders:
        cells = [c for c in profile.cells if c.contender == contender.name and c.ratio is not None]
        for kind in _KINDS:
            some = [c for c in cells if c.ratio is not None and standing(c.ratio) == kind]
            if kind in ("same", "unclear") and some:
                yield _alike(profile, contender, kind, some)
            elif some:
                yield from (_of_cell(profile, contender, kind, cell) for cell in some)


def _alike(profile: Measured, contender: Contender, kind: str, cells: Sequence[Cell]) -> Verdict:
    each = ", ".join(f"{c.ratio} at {c.rows}" for c in cells)
    said = "is as fast as" if kind == "same" else "cannot be told from"
    text = f"{contender.name} {said} {profile.base} in time: {each} {profile.unit}s"
    if kind == "unclear":
        text += "; the intervals are too wide: measure longer, or on a quieter machine"
    return Verdict(kind, text, contender.name, cells[0].rows if len(cells) == 1 else 0)


def _of_cell(profile: Measured, contender: Contender, kind: str, cell: Cell) -> Verdict:
    assert cell.ratio is not None
    text = f"at {_rows(profile, cell.rows)} {contender.name} is {times_as(cell.ratio)}"
    if why := _why(profile, contender, kind, cell):
        text += f": {why}"
    return Verdict(kind, text, contender.name, cell.rows)


def _why(profile: Measured, contender: Contender, kind: str, cell: Cell) -> str:
    """What is known of the cause: bytes read, and whether time grows with rows."""
    base = profile.contender(profile.base)
    if not contender.skips_zeros:
        smaller = _smaller(profile)
        if contender.form in _AS_IT_IS and kind == "faster":
            if smaller:
                return f"the model is smaller: it reads {smaller:.2f} of the bytes"
            return (
                "it computes what the dense model computes, so take this for what disturbs the "
                "measurement here"
            )
        if kind == "faster" and contender.name.partition(" ")[0] != "dense":
            also = f", and the smaller model's (it reads {smaller:.2f} of the bytes)"
            return (
                f"that is the form's doing{also if smaller else ''}; it multiplies zeros like any "
                f"number{_same_in_dense(profile, contender, cell)}"
            )
        return ""
    share = (contender.read or 0) / base.read if base.read else 0.0
    if kind == "faster":
        return f"it reads {share:.2f} of the bytes" if 0 < share < 1 else ""
    growth = growth_to(profile, cell.rows)
    if growth is not None and growth > 0.5:
        return (
            f"{profile.base}'s time grows with the rows here, so that its products are bound by "
            f"arithmetic, and expanding zeros adds to it; that it reads {share:.2f} of the bytes "
            "brings nothing"
        )
    return "fewer bytes do not pay for expanding them here"


_AS_IT_IS = ("masked", "eager")
"""Forms that compute the model's own code."""


def _smaller(profile: Measured) -> float:
    """What the model itself reads, as a share of the dense one's bytes; 0 if it is no smaller."""
    base = profile.contender(profile.base)
    own = [c for c in profile.contenders if c.name.partition(" ")[0] != "dense"]
    found = [c.read for c in own if c.form in _AS_IT_IS and c.read]
    share = min(found, default=0) / base.read if base.read else 0.0
    return share if share < 1 else 0.0


def _same_in_dense(profile: Measured, contender: Contender, cell: Cell) -> str:
    """What the dense model gets of the same form, where that was measured."""
    for other in profile.cells:
        if (other.contender, other.rows) == (f"dense {contender.form}", cell.rows) and other.ratio:
            return f", and gives the dense model {other.ratio} of its time"
    return ""


def growth_to(profile: Measured, rows: int) -> float | None:
    """How the base's time grows from the next fewer rows: 0 is not at all, 1 in proportion."""
    known = [c for c in profile.cells if c.contender == profile.base and c.latency is not None]
    before = [c for c in known if c.rows < rows]
    here = next((c for c in known if c.rows == rows), None)
    if here is None or not before or here.latency is None:
        return None
    last = max(before, key=lambda c: c.rows)
    assert last.latency is not None
    return (here.latency.median / last.latency.median - 1) / (rows / last.rows - 1)


# -- the model -------------------------------------------------------------------------------------


def _of_zeros(profile: Measured) -> Iterator[Verdict]:
    """Where zeros are multiplied and bring nothing."""
    counted = [f for f in profile.flops if f.total]
    if not counted or not any(f.by_zeros for f in counted):
        if profile.flops:
            yield Verdict("zeros", "no multiplication is by a zero of a weight: nothing to gain")
        return
    share = max(f.by_zeros / f.total for f in counted)
    names = [
        c.name
        for c in profile.contenders
        if not (c.skips_zeros or c.missing or c.name.startswith("dense"))
    ]
    text = f"{share:.0%} of the arithmetic is by zeros"
    if names:
        few = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
        one = "computes" if len(names) == 1 else "compute"
        text += f"; {few} {one} it all the same, so that zeros bring nothing there"
    yield Verdict("zeros", text)


def _of_bounds(profile: Measured) -> Iterator[Verdict]:
    """How fast it could be at best, were the layers free."""
    for inside in profile.inside:
        if inside.share < 0.75:
            yield Verdict(
                "bound",
                f"at {_rows(profile, inside.rows)} {1 - inside.share:.0%} of {profile.base}'s time "
                "is outside of its linear layers and convolutions, which no form of weights "
                f"changes; no form can be more than {1 / (1 - inside.share):.1f} times as fast by "
                "its weights alone",
                rows=inside.rows,
            )


def _of_memory(profile: Measured) -> Iterator[Verdict]:
    base = profile.contender(profile.base)
    for one in profile.contenders:
        if one.held and base.held and one.held < (1 - ALIKE) * base.held:
            yield Verdict(
                "memory",
                f"{one.name} holds {one.held / base.held:.2f} of {profile.base}'s bytes of weights",
                one.name,
            )


def _of_prospects(profile: Measured) -> Iterator[Verdict]:
    """What would bring something, where, by kernels measured here."""
    for rows in profile.rows:
        here = [p for p in profile.prospects if p.rows == rows]
        if not here:
            continue
        helping = [p for p in here if standing(p.ratio) == "faster"]
        where = f"at {_rows(profile, rows)}"
        if helping:
            each = ", ".join(_told(p) for p in sorted(helping, key=lambda p: p.ratio.value))
            text = (
                f"{where}, kernels timed here on the shapes of {helping[0].layers} layers add up "
                f"to this share of {profile.base}'s time: {each}"
            )
            yield Verdict("prospect", text, rows=rows)
        if not any(p.kernel.startswith("bitmask") for p in helping):
            least = min(
                (p for p in here if p.kernel.startswith("bitmask")), key=lambda p: p.ratio.value
            )
            text = (
                f"{where} no bitmask brings anything, the best ({least.kernel}) would take "
                f"{least.ratio} of the time"
            )
            yield Verdict("nothing", text + _instead(profile, rows, helping), rows=rows)


def _instead(profile: Measured, rows: int, helping: Sequence[Prospect]) -> str:
    """Where zeros do pay: with fewer rows, or as whole outputs that are gone, if measured so."""
    fewer = [p.rows for p in profile.prospects if p.rows < rows and p.kernel.startswith("bitmask")]
    good = [
        n
        for n in sorted(set(fewer))
        if any(
            standing(p.ratio) == "faster"
            for p in profile.prospects
            if p.rows == n and p.kernel.startswith("bitmask")
        )
    ]
    found = [f"it does at {_rows(profile, good[-1])}"] if good else []
    for prospect in helping:
        if prospect.kernel == HALVED:
            found.append(
                f"half of the outputs removed, as `shrink` does, would take {prospect.ratio}"
            )
    return f"; {', and '.join(found)}" if found else ""


def _told(prospect: Prospect) -> str:
    return f"{prospect.ratio} {prospect.kernel}"


def _rows(profile: Measured, rows: int) -> str:
    return f"{rows} {profile.unit}{'s' * (rows != 1)}"
