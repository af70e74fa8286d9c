"""What torch.onnx says of packages that nobody asked for, kept from being shown."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

_LOGGER = logging.getLogger("torch.onnx._internal.exporter._registration")
_HARMLESS = "torchvision is not installed. Skipping %s"
"""torch.onnx says it of each of torchvision's operators, which no model without torchvision has."""

_lock = threading.Lock()


class _Without(logging.Filter):
    """Drops that message when it comes from the thread that made this filter."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self.thread or record.msg != _HARMLESS


@contextlib.contextmanager
def without_torchvision_notes() -> Iterator[None]:
    """Do not show this thread those messages; all others, and other threads', stay."""
    mine = _Without()
    # Lists are replaced, not changed: another thread may be going through them.
    with _lock:
        _LOGGER.filters = [*_LOGGER.filters, mine]
    try:
        yield
    finally:
        with _lock:
            _LOGGER.filters = [f for f in _LOGGER.filters if f is not mine]
