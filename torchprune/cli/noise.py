"""Lines of other libraries that tell a user of the command line nothing."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
"""Warnings for those who write code, which a user of a command cannot change."""

_HARMLESS: dict[str, tuple[str, ...]] = {
    # torchao tries all its GPU libraries when transformers imports it.
    "torchao": ("Failed to load ",),
    # And it registers enums with torch in the old way.
    "torch.utils._pytree": ("%s is an Enum subclass and is now natively supported",),
    # A data set of the cache is what we ask for first, and not for want of a hub.
    "datasets.load": ("Using the latest cached version of the dataset",),
    "datasets.packaged_modules.cache.cache": ("Found the latest cached dataset configuration",),
}
"""Logger to how its harmless messages begin."""


class _Harmless(logging.Filter):
    """Drops messages that begin in known ways; all others go their way."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginnings)


def hush() -> None:
    """Have the loggers of other libraries leave out what is known to be harmless."""
    for name, beginnings in _HARMLESS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Harmless) for known in logger.filters):
            logger.addFilter(_Harmless(beginnings))


_RUNTIMES = (
    b"[cpuinfo_utils.cpp",  # ExecuTorch looks at the processor
    b"INFO: Created TensorFlow Lite",  # LiteRT, and that it uses what is no longer to be used
    b"ERROR: Subgraph reshaping is enabled by default",
    b"WARNING: All log messages before absl::InitializeLog",
    b"I0000 ",
)
"""How lines begin that runtimes write, past Python, which say nothing of the model."""


@contextmanager
def without_runtime_lines() -> Iterator[None]:
    """Leave those lines out of standard error; all others come when the block ends."""
    try:
        sys.stderr.flush()
        before = os.dup(2)
    except OSError:  # closed: nothing is written there
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            held.seek(0)
            for line in held:
                if not line.startswith(_RUNTIMES):
                    os.write(2, line)
