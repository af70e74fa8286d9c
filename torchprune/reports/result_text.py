"""A result's JSON text, read back as an object of the format that it says it has."""

from __future__ import annotations

import json
from typing import Any

from torchprune.errors import TorchpruneError


def result_of(text: str, form: str, what: str, kind: type[TorchpruneError]) -> dict[str, Any]:
    """The JSON object of that format in a text.

    Args:
        what: the result, as an error calls it.
        kind: the error to raise.

    Raises:
        kind: it is damaged, or something else.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise kind(f"not JSON ({error!s:.200}): damaged, or no {what}") from None
    if not isinstance(found, dict) or found.get("format") != form:
        got = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise kind(f"no {what}: expected the format {form!r}, got {got!r:.80}")
    return found
