"""Every law of a saved artifact, checked again from its files, and told as a proof.

What breaks a law is told, never raised: files may be damaged or hostile. Nothing of the directory
is changed, nothing is unpickled, nothing is fetched.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from torchprune.errors import InputError, TorchpruneError
from torchprune.study.proofs.artifact import KINDS, kind_of
from torchprune.study.proofs.proof import Check, Proof, State, broken, unchecked
from torchprune.study.proofs.proof_of_plain import PlainProof
from torchprune.study.proofs.proof_of_saved import SavedProof
from torchprune.study.proofs.proof_steps import ProofSteps

LAWS = (
    "files",
    "checksums",
    "manifest",
    "support",
    "count",
    "pattern",
    "quantized",
    "dense",
    "round trip",
    "reversal",
    "fold",
    "shrink",
    "reload",
    "onnx",
    "lower",
)
"""All of them, in the order in which they are told."""


def verify(
    directory: str | os.PathLike[str],
    *,
    dense: nn.Module | Callable[[], nn.Module] | None = None,
    onnx: str | os.PathLike[str] | None = None,
    laws: Collection[str] = LAWS,
    progress: bool = True,
) -> Proof:
    """Check every law of a saved artifact again.

    Memory is about that of one model, or of two where `dense` is given. Models are built from
    their classes in transformers; what is fetched, unpickled or run from the directory is nothing.

    Args:
        directory: of `torchprune.save`, of a masked model's own `save_pretrained`, or a plain
            checkpoint of transformers, such as `torchprune.export.to_hf` writes.
        dense: the model from before the pruning, or what loads it. For a save of a class that is
            not of transformers it is also what the tensors are read into (a copy of it).
        onnx: an ONNX file of the same model; by default every one that lies in the directory.
        laws: the names of those to check; see `LAWS`. What the others need is read anyway.
        progress: show a progress bar.

    Returns:
        the proof; `proof.holds` says whether no law is broken. Print it.

    Raises:
        InputError: there is no such directory or ONNX file, or no law of a name.
    """
    home = Path(directory)
    unknown = sorted(set(laws) - set(LAWS))
    if unknown:
        raise InputError(f"no law is called {unknown[0]!r}; there are {', '.join(LAWS)}")
    if not home.is_dir():
        raise InputError(f"no such directory: {home}")
    if onnx is not None and not Path(onnx).is_file():
        raise InputError(f"no such file: {onnx}")
    start = time.perf_counter()
    graphs = [Path(onnx)] if onnx is not None else sorted(home.glob("*.onnx"))
    kind = kind_of(home)
    if kind is None:
        check = broken(
            "files", str(home), "a save of torchprune or a checkpoint of transformers", "neither"
        )
        return Proof(str(home), "nothing that is known", [check], 0, 0, 0.0)
    wanted = set(laws)
    with _quietly(), _told(progress) as say:
        proof = PlainProof if kind == "plain" else SavedProof
        steps = proof(home, dense, graphs, wanted, say)
        told = _guarded(steps)
    checks = [check for check in told if check.law in wanted]
    order = {law: at for at, law in enumerate(LAWS)}
    checks.sort(key=lambda check: order[check.law])
    seconds = time.perf_counter() - start
    return Proof(str(home), KINDS[kind], checks, steps.weights, steps.layers, seconds)


def _guarded(steps: ProofSteps) -> list[Check]:
    """The checks; an error that nobody foresaw breaks the law at which it was met."""
    try:
        steps.run()
    except InputError:  # what the caller named besides, such as the dense model
        raise
    except TorchpruneError as error:
        steps.checks.append(broken(steps.at, steps.name, "what can be read", error))
    except Exception as error:  # the files are anybody's: whatever they provoke is told
        what = f"{type(error).__name__}: {error!s:.300}"
        steps.checks.append(broken(steps.at, steps.name, "what can be checked", what))
    merged: dict[str, Check] = {}
    for check in steps.checks:
        merged[check.law] = _joined(merged.get(check.law), check)
    wrong = [law for law, check in merged.items() if check.state == "broken"]
    for law in LAWS:
        if law not in merged:
            merged[law] = unchecked(law, f"not reached: {', '.join(wrong) or 'it was not asked'}")
    return list(merged.values())


def _joined(one: Check | None, two: Check) -> Check:
    """Two checks of one law as one: broken if either is."""
    if one is None or one.state == "not applicable":
        return two
    if two.state == "not applicable":
        return one
    state: State = "broken" if "broken" in (one.state, two.state) else "holds"
    said = "; ".join(dict.fromkeys((one.said, two.said)))
    breaches = (*one.breaches, *two.breaches)
    return Check(
        two.law, state, said, {**one.numbers, **two.numbers}, breaches, one.more + two.more
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the bars and remarks of transformers: what is wrong the proof says."""
    try:
        from transformers.utils import logging as told
    except ImportError:
        yield
        return
    logging: Any = told
    bars, loud = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(loud)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _told(progress: bool) -> Iterator[Callable[[str], Any]]:
    """A bar whose text is the law that is looked at."""
    with tqdm(total=len(LAWS), desc="verify", unit="law", disable=not progress) as bar:

        def say(law: str) -> None:
            bar.set_postfix_str(law)
            bar.update()

        yield say
        bar.set_postfix_str("")
        bar.update(len(LAWS) - bar.n)
