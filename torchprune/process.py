"""What this process is: somebody's program, or our command line."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path


def is_the_command() -> bool:
    """Whether this is `python -m torchprune` or the installed script `torchprune`.

    Its help and its complaints come at once, without torch; so the package leaves its public names
    out there, and the commands import what they run. Wherever this is in doubt it is no command:
    everything is imported as ever, and help takes the seconds that torch takes.
    """
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    if program == "-m":  # while Python looks for the module to run
        module = sys.orig_argv.index("-m") + 1 if "-m" in sys.orig_argv else 0
        return sys.orig_argv[module : module + 1] == ["torchprune"]
    path = Path(program)
    if path.stem != "torchprune":
        return False
    return path.resolve().parent == Path(sysconfig.get_path("scripts")).resolve()
