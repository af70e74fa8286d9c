"""What a layer's inputs leave behind: sums of squares, or the whole second moment.

All sums are float32 whatever the model's dtype, products in full precision (no TF32).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprune.specs.method import GroupMoments

SAMPLE_ROWS = 256
"""Input rows kept per group to measure the output error where no second moment is collected."""

WIDEST = 32_768
"""Columns up to which a second moment is collected where rows can do its work: 4.3 GB."""

WIDE_ROWS = 4096
"""Input rows kept per group of a wider layer."""

_CHUNK = 8192
_PANELS = 8


@dataclass(eq=False)
class Moments:
    """Statistics of one layer's inputs, a slice per group of its `weights.View`.

    Attributes:
        square: (groups, cols) float32, sum over input rows of x_j^2.
        gram: (groups, cols, cols) float32, sum of x x^T; only the upper triangle is filled until
            `finish`. None where the method does not need it.
        rows: input rows seen by each group.
        batches: batches that reached the layer.
        sample: per group, up to SAMPLE_ROWS input rows spread over the batches; WIDE_ROWS, where
            they stand for a second moment that would be too large.
        total: (groups, cols) float32, sum of x, where it was asked for.
        cross: (groups, cols, cols) float32, sum of x_d x^T with x_d what the dense model reads
            there, where it was asked for. Rows without a counterpart count as their own.
        cap: input rows longer than so many times their batch's median length are scaled down to
            that, or None.
    """

    square: Tensor
    gram: Tensor | None
    rows: list[int]
    sample: list[list[Tensor]]
    batches: int = 0
    finished: bool = False
    total: Tensor | None = None
    cross: Tensor | None = None
    cap: float | None = None

    @staticmethod
    def empty(
        groups: int,
        cols: int,
        device: torch.device,
        *,
        gram: bool,
        total: bool = False,
        cross: bool = False,
        cap: float | None = None,
    ) -> Moments:
        """Zero statistics."""
        return Moments(
            square=torch.zeros(groups, cols, device=device),
            gram=torch.zeros(groups, cols, cols, device=device) if gram else None,
            rows=[0] * groups,
            sample=[[] for _ in range(groups)],
            total=torch.zeros(groups, cols, device=device) if total else None,
            cross=torch.zeros(groups, cols, cols, device=device) if cross else None,
            cap=cap,
        )

    def add(
        self,
        inputs: Sequence[Tensor],
        sample_rows: int = 0,
        dense: Sequence[Tensor] | None = None,
    ) -> None:
        """Add one batch: per group a (rows, cols) matrix, of any floating dtype.

        Args:
            dense: what the dense model reads in place of `inputs`, None where that is unknown.
        """
        self.batches += 1
        if self.cap is not None:
            shares = [_shares(x, self.cap) for x in inputs]
            inputs = _scaled(inputs, shares)
            dense = dense if dense is None else _scaled(dense, shares)
        if self.cross is not None:
            self._add_cross(inputs, dense)
        for group, x in enumerate(inputs):
            if not x.shape[0]:
                continue
            self.rows[group] += x.shape[0]
            if sample_rows:
                step = max(1, x.shape[0] // sample_rows)
                rows = x.detach()[::step][:sample_rows]
                # A copy: a view would keep the whole activation, and whatever watches it, alive.
                self.sample[group].append(rows.to(torch.float32, copy=True))
            for chunk in x.split(_CHUNK):
                wide = chunk.float()
                if self.total is not None:
                    self.total[group] += wide.sum(0)
                if self.gram is not None:
                    _add_gram(self.gram[group], wide)
                else:
                    self.square[group] += wide.square().sum(0)

    def _add_cross(self, inputs: Sequence[Tensor], dense: Sequence[Tensor] | None) -> None:
        assert self.cross is not None
        for group, x in enumerate(inputs):
            other = x if dense is None or dense[group].shape != x.shape else dense[group]
            for mine, theirs in zip(x.split(_CHUNK), other.split(_CHUNK), strict=True):
                self.cross[group].addmm_(theirs.float().T, mine.float())

    def finish(self) -> None:
        """Complete the second moment's lower triangle and read the squares off its diagonal."""
        if self.gram is not None and not self.finished:
            self.finished = True
            for gram in self.gram:
                _mirror(gram)
            self.square = self.gram.diagonal(dim1=1, dim2=2).clone()

    def is_finite(self) -> bool:
        """Whether no statistic is inf or NaN (a gram is finite if its diagonal is)."""
        return bool(self.square.isfinite().all())

    def of(self, group: int, layer: str) -> GroupMoments:
        """One group's statistics, as methods read them: views, by name; the mean where its sum was
        asked for and a row was seen.

        Args:
            layer: the name of the layer that asks.
        """
        rows, found = self.rows[group], {"square": self.square[group]}
        for name, stack in (("gram", self.gram), ("cross", self.cross)):
            if stack is not None:
                found[name] = stack[group]
        if self.total is not None and rows:
            found["mean"] = self.total[group] / rows
        return GroupMoments(layer, rows, found)

    def samples(self, group: int) -> Tensor | None:
        """(rows, cols) float32 sampled inputs of a group, or None."""
        return torch.cat(self.sample[group]) if self.sample[group] else None


def panels(cols: int, count: int) -> Iterator[tuple[int, int]]:
    """Starts and stops of about so many equal runs of columns, none of them very narrow."""
    width = max(64, -(-cols // count))
    return ((start, min(start + width, cols)) for start in range(0, cols, width))


def _shares(x: Tensor, cap: float) -> Tensor:
    """(rows,) float32, what each row is scaled by so that none is longer than the cap allows."""
    if not len(x):
        return torch.ones(0, device=x.device)
    length = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
    limit = cap * length.median()
    return torch.where((length > limit) & (limit > 0), limit / length, 1)


def _scaled(inputs: Sequence[Tensor], shares: Sequence[Tensor]) -> list[Tensor]:
    """Rows times their shares, float32; as they were where they are not the same rows."""
    return [
        x.float() * share.unsqueeze(1) if len(x) == len(share) else x
        for x, share in zip(inputs, shares, strict=True)
    ]


def _add_gram(gram: Tensor, x: Tensor) -> None:
    """gram += x^T x on and above the diagonal: a few panels do little more than half the work."""
    for start, stop in panels(x.shape[1], _PANELS):
        gram[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])


def _mirror(gram: Tensor) -> None:
    """Copy what is above the diagonal below it."""
    for start, stop in panels(len(gram), _PANELS):
        square = gram[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
        gram[stop:, start:stop] = gram[start:stop, stop:].T
