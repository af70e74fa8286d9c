"""Two processes that work together over gloo, started once for all tests."""

from __future__ import annotations

import atexit
import datetime
import importlib
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

SECONDS = 120.0  # on a machine that does much else


class Pair:
    """Both processes run the functions of a test's module that they are told to."""

    def __init__(self, directory: Path) -> None:
        spawn: Any = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(2):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_work, args=(rank, str(directory), there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, module: str, name: str, *args: Any) -> list[Any]:
        """What `module.name(rank, *args)` gives in each process."""
        for pipe in self._pipes:
            pipe.send((module, name, args))
        found = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(SECONDS):
                self.stop()
                raise TimeoutError(f"{name}: process {rank} does not answer")
            found.append(pipe.recv())
        failed = [(rank, text) for rank, (well, text) in enumerate(found) if not well]
        if failed:
            self.stop()  # the processes may wait for each other
            raise AssertionError("\n".join(f"{name}, process {r}:\n{text}" for r, text in failed))
        return [value for _, value in found]

    @property
    def stopped(self) -> bool:
        return not all(process.is_alive() for process in self._processes)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _work(rank: int, directory: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of torch, about meshes of CPUs
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}  # asked for, not used
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=SECONDS / 2),
    )
    while True:
        module, name, args = pipe.recv()
        try:
            torch.manual_seed(0)
            answer = True, getattr(importlib.import_module(module), name)(rank, *args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)


class Pairs:
    """A pair of processes, and another one after a test that failed."""

    def __init__(self) -> None:
        self._pair: Pair | None = None

    def run(self, module: str, name: str, *args: Any) -> list[Any]:
        if self._pair is None or self._pair.stopped:
            self._pair = Pair(Path(tempfile.mkdtemp()))
            atexit.register(self._pair.stop)
        return self._pair.run(module, name, *args)


_PAIRS = Pairs()


def both(function: Callable[..., Any], *args: Any) -> list[Any]:
    """What a function of a test's module, `function(rank, *args)`, gives in two processes."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    return _PAIRS.run(function.__module__, function.__name__, *args)
