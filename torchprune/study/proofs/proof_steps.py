"""What the proofs of all kinds of directories have in common: checks made law by law."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchprune.errors import InputError
from torchprune.study.proofs.onnx_parity import check_onnx
from torchprune.study.proofs.proof import Check, broken, unchecked
from torchprune.study.proofs.stock_reload import check_reload
from torchprune.study.proofs.stored_runs import check_lower

Dense = nn.Module | Callable[[], nn.Module] | None


class ProofSteps:
    """The checks as they are made.

    Args:
        home: the directory.
        dense: the model from before the pruning, or what loads it.
        graphs: ONNX files of the same model.
        laws: those that are wanted.
        say: told of each law when it comes.

    Attributes:
        checks: so far.
        at: the law that is looked at.
        weights, layers: how many were seen.
    """

    def __init__(
        self,
        home: Path,
        dense: Dense,
        graphs: Sequence[Path],
        laws: set[str],
        say: Callable[[str], Any],
    ) -> None:
        self.home, self.dense, self.graphs, self.laws = home, dense, graphs, laws
        self.checks: list[Check] = []
        self.at, self.weights, self.layers = "files", 0, 0
        self._say = say

    @property
    def name(self) -> str:
        """What errors call the artifact."""
        return self.home.name

    def run(self) -> None:
        """Make all checks, those of one part of the files after the other."""
        raise NotImplementedError

    def _begin(self, law: str) -> bool:
        """Say which law comes now; whether it is wanted."""
        self.at = law
        self._say(law)
        return law in self.laws

    @contextmanager
    def _law(self, law: str) -> Iterator[None]:
        """An error within is that law's, and the next ones go on."""
        self.at = law
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error!s:.300}"
            self.checks.append(broken(law, self.name, "what can be computed", what))

    def _dense_model(self) -> nn.Module | None:
        """The model from before the pruning, loaded once."""
        if self.dense is not None and not isinstance(self.dense, nn.Module):
            self.dense = self.dense()
        return self.dense

    def _elsewhere(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        outputs: list[Tensor],
        *,
        plain: Path | None,
        pruned: Mapping[str, None],
    ) -> None:
        """What stock transformers, ONNX Runtime and lowered forms compute.

        Args:
            plain: the directory, where stock transformers can read it as it is.
            pruned: the keys of pruned tensors.
        """
        if self._begin("reload"):
            with self._law("reload"):
                self.checks.append(check_reload(model, plain, inputs, outputs))
        if self._begin("onnx"):
            with self._law("onnx"):
                self.checks += [check_onnx(model, graph, pruned) for graph in self.graphs] or [
                    unchecked("onnx", "no .onnx file lies beside it, and none was given")
                ]
        if self._begin("lower"):
            with self._law("lower"):
                self.checks.append(check_lower(model, inputs, outputs))
