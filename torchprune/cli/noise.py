"""Lines of other libraries that tell a user of the command line nothing."""

from __future__ import annotations

import logging

FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
"""Warnings for those who write code, which a user of a command cannot change."""

_HARMLESS: dict[str, tuple[str, ...]] = {
    # torchao tries all its GPU libraries when transformers imports it.
    "torchao": ("Failed to load ",),
    # And it registers enums with torch in the old way.
    "torch.utils._pytree": ("%s is an Enum subclass and is now natively supported",),
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
