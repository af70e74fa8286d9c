"""Batches of a loader's data, read without touching the loader that somebody trains on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sized
from typing import Any

import torch

from torchprune.errors import CalibrationError


class LoaderBatches:
    """Batches of a `DataLoader`'s dataset, made by its own `collate_fn`; as often as asked for.

    Items of a dataset that can be indexed are drawn at random, the same ones every time; where
    several processes train together each takes its own. Others are read from the start.

    Args:
        loader: a `DataLoader`, as it is or as accelerate prepared it.
        count: how many batches.
        seed: of the draw.
    """

    def __init__(self, loader: Any, count: int, seed: int) -> None:
        self._loader, self._count, self._seed = loader, count, seed

    def __iter__(self) -> Iterator[Any]:
        dataset = getattr(self._loader, "dataset", None)
        collate = getattr(self._loader, "collate_fn", None)
        if dataset is None or collate is None:
            raise CalibrationError(
                "the trainer's loader shows no dataset to calibrate on; give data= to the callback"
            )
        size = int(getattr(self._loader, "batch_size", None) or 1)
        items = self._drawn(dataset, size) if _can_be_indexed(dataset) else iter(dataset)
        for _ in range(self._count):
            some = list(itertools.islice(items, size))
            if not some:
                return
            yield collate(some)

    def _drawn(self, dataset: Any, size: int) -> Iterator[Any]:
        draw = torch.Generator().manual_seed(self._seed)
        order = torch.randperm(len(dataset), generator=draw).tolist()
        rank, ranks = _place()
        for index in order[rank::ranks] or order:
            yield dataset[index]


def _can_be_indexed(dataset: Any) -> bool:
    return isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")


def _place() -> tuple[int, int]:
    """This process among those that train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
