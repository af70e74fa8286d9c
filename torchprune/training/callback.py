"""`PruningCallback`: a `Pruner` inside transformers' `Trainer`."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from torchprune.calibration.token_masks import TokenMask
from torchprune.errors import MissingExtraError, SpecError
from torchprune.masking.awaited import when_imported, wrapped
from torchprune.masking.mask import masked_layers
from torchprune.specs.spec import Spec
from torchprune.training.loader_batches import LoaderBatches
from torchprune.training.pruner import Pruner, plain_of
from torchprune.training.random_state import same_chances
from torchprune.training.regrowth import Regrowth

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtraError("transformers", "transformers", "PruningCallback") from error

_KEY = "torchprune"
"""Under which a checkpoint's `trainer_state.json` holds what the pruner is at."""

_LOG = logging.getLogger(__name__)


class PruningCallback(TrainerCallback):
    """Prunes a model while transformers' `Trainer` trains it.

        trainer = Trainer(model, args, train_dataset=texts, callbacks=[PruningCallback(spec)])

    The schedule counts the trainer's global steps: optimizer steps, whatever is accumulated in each
    and on however many processes. What it asks for is logged as "sparsity". Masks are part of the
    checkpoints, so training that goes on from one is, to the bit, as if it had never stopped, and
    the best model comes back with its own masks. A model that `model_init` makes anew gets new
    masks. Training a second time goes on with the masks that are there: the schedule begins again,
    and nothing changes until it asks for more zeros.

    Args:
        spec: which weights, in which pattern, by which score.
        schedule: global step -> share of zeros: one of `torchprune.training`'s, or any callable.
            By default all at once, before the first step.
        data: for specs that need it, as `torchprune.sparsify` takes it; by default batches of the
            trainer's own training set, drawn apart from those that it trains on.
        regrow, tokenizer, max_batches, token_mask, reversible, progress, seed: as of
            `torchprune.Pruner`.

    Attributes:
        pruner: the `Pruner` of the model that is being trained, None before that.

    Raises:
        MissingExtraError: transformers is not installed.
        SpecError, TargetError: when training begins, as of `Pruner`; or a second callback of this
            kind is in the same trainer.
    """

    def __init__(
        self,
        spec: Spec,
        schedule: Callable[[int], float] | None = None,
        *,
        data: Iterable[Any] | None = None,
        regrow: Regrowth | None = None,
        tokenizer: Any = None,
        max_batches: int = 128,
        token_mask: TokenMask = None,
        reversible: bool = False,
        progress: bool = False,
        seed: int = 0,
    ) -> None:
        self.spec, self.schedule = spec, schedule
        self.pruner: Pruner | None = None
        self._data, self._max_batches, self._seed = data, max_batches, seed
        self._options: dict[str, Any] = {
            "regrow": regrow,
            "tokenizer": tokenizer,
            "token_mask": token_mask,
            "reversible": reversible,
            "progress": progress,
        }
        self._training: weakref.ref[Any] | None = None
        when_imported({"transformers.trainer": _teach})

    # -- what the trainer calls --------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the model masks, and go on from where a checkpoint was."""
        model, step = kwargs["model"], int(state.global_step)
        self._be_alone(state)
        saved = _saved_in(state)
        with same_chances():
            if saved is not None and saved["sparsity"] > 0 and not _has_masks(model):
                _LOG.warning(
                    "the checkpoint holds no masks, as peft's do not: the model is pruned anew"
                )
                saved = {**saved, "step": 0, "sparsity": 0.0}
            if self.pruner is None or self.pruner.model is not plain_of(model):
                at = saved or {"step": 0, "sparsity": _most_zeros(model), "levels": {}}
                self.pruner = self._made(model, kwargs.get("train_dataloader"), at)
                if saved is None and self.pruner.schedule(0) > self.pruner.sparsity:
                    self.pruner._go_to(0)
            elif saved is not None:
                self.pruner.load_state_dict(saved)
            elif step < self.pruner.steps:
                self.pruner.load_state_dict({**self.pruner.state_dict(), "step": step})
            self._follow(step, kwargs.get("optimizer"))
        state.stateful_callbacks[_KEY] = self.pruner.state_dict()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Change masks if they are due."""
        if self.pruner is None:
            return
        with same_chances():
            self._follow(int(state.global_step), kwargs.get("optimizer"))
        state.stateful_callbacks[_KEY] = self.pruner.state_dict()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Know of the masks that the best checkpoint gave back."""
        self._training = None
        best = state.best_model_checkpoint
        if self.pruner is None or not (args.load_best_model_at_end and best):
            return
        saved = _saved_beside(Path(best))
        if saved is not None:
            self.pruner.load_state_dict(saved)

    # -- how ---------------------------------------------------------------------------------------

    def _be_alone(self, state: Any) -> None:
        """Refuse to be two in one trainer: both would change the same masks."""
        for other in list(_ALL):
            if other is not self and other._training is not None and other._training() is state:
                raise SpecError(
                    "this trainer has two PruningCallbacks, and a model one schedule: give layers "
                    "their own sparsities with the spec's overrides, or remove one of them"
                )
        _ALL.add(self)
        self._training = weakref.ref(state)

    def _made(self, model: nn.Module, loader: Any, saved: Any) -> Pruner:
        data = self._data
        if data is None and self.spec.needs_data and loader is not None:
            data = LoaderBatches(loader, self._max_batches, self._seed)
        return Pruner(
            model,
            self.spec,
            self.schedule,
            data=data,
            max_batches=self._max_batches,
            seed=self._seed,
            state=saved,
            **self._options,
        )

    def _follow(self, step: int, optimizer: Any) -> None:
        """Be where the schedule is, unless that were to take zeros back."""
        pruner = cast(Pruner, self.pruner)
        if pruner.regrow is None and float(pruner.schedule(step)) < pruner.sparsity:
            return
        if step > pruner.steps:
            pruner.step(*([] if optimizer is None else [optimizer]), at=step)


_ALL: weakref.WeakSet[PruningCallback] = weakref.WeakSet()


def _has_masks(model: nn.Module) -> bool:
    return next(masked_layers(model), None) is not None


def _most_zeros(model: nn.Module) -> float:
    """The share of zeros of the sparsest mask that a model has; masks lose none by a schedule."""
    shares = (
        1 - int(torch.count_nonzero(mask.mask)) / mask.shape.numel()
        for _, mask in masked_layers(model)
    )
    return max(shares, default=0.0)


def _saved_in(state: Any) -> dict[str, Any] | None:
    """What a checkpoint that training goes on from says of the pruner."""
    found = state.stateful_callbacks.get(_KEY)
    return dict(found) if isinstance(found, dict) else None


def _saved_beside(checkpoint: Path) -> dict[str, Any] | None:
    try:
        read = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        found = read["stateful_callbacks"][_KEY]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(found) if isinstance(found, dict) else None


# -- what the trainer logs -------------------------------------------------------------------------


def _teach(module: Any) -> None:
    """Have every `Trainer.log` say the sparsity: callbacks hear of logs when these are out."""
    wrapped(module.Trainer, "log", _logging)


def _logging(original: Any) -> Any:
    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, PruningCallback) and callback.pruner is not None:
                logs["sparsity"] = callback.pruner.sparsity
        return original(self, logs, *args, **kwargs)

    return log
