"""`PruningCallback` in transformers' Trainer: schedules, logs, checkpoints, exact resume."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import llama
from saved import bits
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec, WandaSpec
from torchprune.errors import SpecError
from torchprune.masking.mask import masked_layers
from torchprune.training import (
    SET,
    Cubic,
    Linear,
    MagnitudeRegrowth,
    OneShot,
    PruningCallback,
    RigL,
    StraightThrough,
)

SPARSE = 0.75
SCHEDULE = Cubic(0.0, SPARSE, start=2, end=6, every=2)
"""Of eight steps: before, two changes on the way, the last one, and two after it."""


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random ids, the same ones every time."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(3, 61, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def made(seed: int = 0, **changes: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return llama(**changes)


def trainer(
    model: Any, directory: Path | str, callbacks: Any = None, kind: Any = None, **options: Any
) -> Any:
    from transformers import Trainer, TrainingArguments

    own = {key: options.pop(key) for key in ("model_init", "compute_loss_func") if key in options}
    arguments = TrainingArguments(
        str(directory),
        **{
            "max_steps": 8,
            "save_steps": 1,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "logging_steps": 1,
            "seed": 3,
            **options,
        },
    )
    own["callbacks"] = [PruningCallback(MagnitudeSpec(SPARSE), SCHEDULE)]
    if callbacks is not None:
        own["callbacks"] = callbacks
    own |= {"train_dataset": Texts(), "eval_dataset": Texts()}
    return (kind or Trainer)(model, arguments, **own)


def pruner_of(one: Any) -> torchprune.Pruner:
    found = [c for c in one.callback_handler.callbacks if isinstance(c, PruningCallback)]
    assert found[0].pruner is not None
    return found[0].pruner


def exact(model: nn.Module) -> dict[str, Any]:
    """Everything a model holds, values behind masks and all, by name."""
    return {k: bits(v) for k, v in model.state_dict().items()}


def optimizer_state(one: Any) -> list[Any]:
    return [
        {k: bits(v) for k, v in held.items() if isinstance(v, Tensor)}
        for held in one.optimizer.state.values()
    ]


def check_zeros(model: nn.Module, sparsity: float = SPARSE) -> None:
    report = torchprune.report(model)
    assert report.sparsity == pytest.approx(sparsity, abs=0.01)
    for layer, mask in masked_layers(model):
        weight = getattr(layer.module, layer.tensor)
        assert not weight[~mask.mask].any()
        assert weight[mask.mask].all()


def sparsities(one: Any) -> list[float]:
    return [log["sparsity"] for log in one.state.log_history if "loss" in log]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DISABLED", "true")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Eight steps that nothing interrupted, and a checkpoint of each."""
    directory = tmp_path_factory.mktemp("whole")
    one = trainer(made(), directory)
    one.train()
    return one, directory


# -- what happens ----------------------------------------------------------------------------------


def test_the_schedule_counts_global_steps_and_is_logged(whole: tuple[Any, Path]) -> None:
    one, directory = whole
    assert sparsities(one) == [SCHEDULE(step) for step in range(1, 9)]
    assert one.state.log_history[-1]["sparsity"] == SPARSE  # the summary's
    for step in range(1, 9):
        loaded = torchprune.load(directory / f"checkpoint-{step}")
        zeros = torchprune.report(loaded).sparsity
        assert zeros == pytest.approx(SCHEDULE(step), abs=0.01)
    check_zeros(one.model)
    json.dumps(one.state.stateful_callbacks)


@pytest.mark.parametrize("step", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("new", [False, True], ids=["", "model_init"])
def test_resuming_is_as_if_it_had_never_stopped(
    step: int, new: bool, whole: tuple[Any, Path], tmp_path: Path
) -> None:
    one, directory = whole
    options = {"model_init": lambda: made(5)} if new else {}
    again = trainer(None if new else made(5), tmp_path, save_strategy="no", **options)
    again.train(resume_from_checkpoint=str(directory / f"checkpoint-{step}"))
    assert exact(again.model) == exact(one.model)
    assert optimizer_state(again) == optimizer_state(one)
    assert pruner_of(again).state_dict() == pruner_of(one).state_dict()
    assert sparsities(again)[step:] == sparsities(one)[step:]


RECIPES: dict[str, Any] = {
    "Wanda": lambda: PruningCallback(WandaSpec(SPARSE), SCHEDULE, max_batches=2),
    "Wanda's own data": lambda: PruningCallback(
        WandaSpec(SPARSE), SCHEDULE, data=[Texts()[0]["input_ids"][None]], reversible=True
    ),
    "owl": lambda: PruningCallback(WandaSpec(SPARSE, allocation="owl"), SCHEDULE, max_batches=1),
    "RigL": lambda: PruningCallback(MagnitudeSpec(SPARSE), SCHEDULE, regrow=RigL(0.5)),
    "SET": lambda: PruningCallback(MagnitudeSpec(SPARSE), SCHEDULE, regrow=SET(0.5)),
    "magnitude": lambda: PruningCallback(
        MagnitudeSpec(SPARSE), SCHEDULE, regrow=MagnitudeRegrowth()
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_way_of_pruning_resumes(recipe: str, tmp_path: Path) -> None:
    one = trainer(made(), tmp_path, [RECIPES[recipe]()], save_steps=3)
    one.train()
    again = trainer(made(5), tmp_path / "again", [RECIPES[recipe]()], save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert exact(again.model) == exact(one.model)
    assert optimizer_state(again) == optimizer_state(one)
    assert torchprune.report(one.model).sparsity == pytest.approx(SPARSE, abs=0.02)


def test_straight_through_does_not_resume(tmp_path: Path) -> None:
    """The weights that learn under its masks are in no checkpoint of transformers."""

    def learning() -> PruningCallback:
        spec, regrow = MagnitudeSpec(SPARSE), StraightThrough(0.01)
        return PruningCallback(spec, SCHEDULE, regrow=regrow)

    one = trainer(made(), tmp_path, [learning()], save_steps=4)
    one.train()
    assert torchprune.report(one.model).sparsity == pytest.approx(SPARSE, abs=0.02)
    again = trainer(made(), tmp_path / "again", [learning()], save_strategy="no")
    with pytest.raises(SpecError, match="mask of another kind"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_calibration_leaves_the_order_of_training_alone(tmp_path: Path) -> None:
    """Dense up to the last step: what it learnt until then is what it learns without masks."""

    def learnt(*callbacks: Any) -> dict[str, Any]:
        seen: list[Any] = []
        one = trainer(
            made(),
            tmp_path,
            list(callbacks),
            save_strategy="no",
            compute_loss_func=lambda out, labels, **k: (
                seen.append(labels.tolist()) or out.logits.square().mean()
            ),
        )
        one.train()
        return {"labels": seen, "random": torch.rand(3).tolist()}

    calm = PruningCallback(WandaSpec(0.5), OneShot(0.5, at=4), max_batches=3)
    assert learnt(calm)["labels"] == learnt()["labels"]


def test_killed_and_resumed(whole: tuple[Any, Path], tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        assert any(line.startswith(b"saved 4") for line in process.stdout)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    again = trainer(made(5), tmp_path)
    again.train(resume_from_checkpoint=True)
    assert exact(again.model) == exact(whole[0].model)
    assert optimizer_state(again) == optimizer_state(whole[0])


def test_the_best_model_comes_back_with_its_own_masks(tmp_path: Path) -> None:
    best = trainer(
        made(),
        tmp_path,
        learning_rate=0.5,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        max_steps=6,
    )
    losses = iter([1.0, 0.0, 2.0])  # of steps 2, 4 and 6
    evaluate = best.evaluate

    def judged(*args: Any, **options: Any) -> dict[str, float]:
        return evaluate(*args, **options) | {"eval_loss": next(losses)}

    best.evaluate = judged
    best.train()
    assert best.state.best_model_checkpoint.endswith("checkpoint-4")
    check_zeros(best.model, SCHEDULE(4))
    assert pruner_of(best).sparsity == SCHEDULE(4)
    assert all("sparsity" in log for log in best.state.log_history)


# -- in other trainings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"activation_checkpointing": True},
        {"bf16": True},
        {"max_grad_norm": 0.01, "label_smoothing_factor": 0.1},
        {"optim": "adafactor"},
        {"auto_find_batch_size": True},
        {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True},
        {"num_train_epochs": 2, "max_steps": -1},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    one = trainer(made(), tmp_path, save_strategy="no", **options)
    one.train()
    check_zeros(one.model)
    assert sparsities(one) == [SCHEDULE(step) for step in range(1, 9)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    one = trainer(made().to(dtype), tmp_path, save_strategy="no", learning_rate=1e-4)
    one.train()
    assert torchprune.report(one.model).sparsity == pytest.approx(SPARSE, abs=0.01)


def test_a_trainer_of_sequences(tmp_path: Path) -> None:
    from transformers import (
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        T5Config,
        T5ForConditionalGeneration,
    )

    config = T5Config(
        vocab_size=61, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=7, report_to="none", disable_tqdm=True, use_cpu=True,
        save_strategy="no", per_device_train_batch_size=2,
    )  # fmt: skip
    callback = PruningCallback(MagnitudeSpec(SPARSE), SCHEDULE)
    Seq2SeqTrainer(model, arguments, train_dataset=Texts(), callbacks=[callback]).train()
    check_zeros(model)


def test_a_batch_that_does_not_fit_begins_again(tmp_path: Path) -> None:
    failed = itertools.count()

    def loss(outputs: Any, labels: Tensor, **options: Any) -> Tensor:
        if next(failed) == 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return outputs.logits.square().mean()  # type: ignore[no-any-return]

    one = trainer(
        made(), tmp_path, save_strategy="no", auto_find_batch_size=True, compute_loss_func=loss
    )
    one.train()
    check_zeros(one.model)
    assert sparsities(one)[-1] == SPARSE


def test_training_twice_goes_on_with_the_masks(tmp_path: Path) -> None:
    one = trainer(made(), tmp_path, save_strategy="no")
    one.train()
    masks = torchprune.masks(one.model)
    one.train()
    assert sparsities(one) == [SPARSE] * 8
    assert all(torch.equal(m, masks[k]) for k, m in torchprune.masks(one.model).items())


def test_a_new_model_gets_new_masks(tmp_path: Path) -> None:
    one = trainer(None, tmp_path, model_init=lambda: made(), save_strategy="no", max_steps=6)
    models = []
    for _ in range(2):
        one.train()
        models.append(one.model)
        check_zeros(one.model)
    assert models[0] is not models[1]
    assert exact(models[0]) == exact(models[1])
    assert sparsities(one) == [SCHEDULE(step) for step in range(1, 7)]


def test_a_model_that_has_masks(tmp_path: Path) -> None:
    model = torchprune.sparsify(made(), MagnitudeSpec(0.5), progress=False)
    before = torchprune.masks(model)
    schedule = Linear(0.0, SPARSE, start=1, end=8, every=1)  # which asks for fewer zeros at first
    callback = PruningCallback(MagnitudeSpec(SPARSE), schedule)
    one = trainer(model, tmp_path, [callback], save_strategy="no")
    one.train()
    check_zeros(model)
    assert sparsities(one) == [max(0.5, schedule(step)) for step in range(1, 9)]
    assert all(not m[~before[k]].any() for k, m in torchprune.masks(model).items())


def test_two_callbacks_in_one_trainer_are_refused(tmp_path: Path) -> None:
    model = made()
    before = exact(model)
    callbacks = [PruningCallback(MagnitudeSpec(SPARSE), SCHEDULE) for _ in range(2)]
    with pytest.raises(SpecError, match="two PruningCallbacks"):
        trainer(model, tmp_path, callbacks, save_strategy="no").train()
    assert {k.replace("parametrizations.weight.original", "weight") for k in exact(model)} >= set(
        before
    )
    trainer(model, tmp_path, callbacks[:1], save_strategy="no").train()  # a new one may
    check_zeros(model)


def test_a_checkpoint_from_before_the_callback(tmp_path: Path) -> None:
    trainer(made(), tmp_path, []).train()
    again = trainer(made(5), tmp_path / "again", save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    check_zeros(again.model)
    found = [log.get("sparsity") for log in again.state.log_history if "loss" in log]
    assert found == [None] * 4 + [SCHEDULE(step) for step in range(5, 9)]


def test_restoring_other_callbacks(whole: tuple[Any, Path], tmp_path: Path) -> None:
    one, directory = whole
    again = trainer(
        made(5), tmp_path, save_strategy="no", restore_callback_states_from_checkpoint=True
    )
    again.train(resume_from_checkpoint=str(directory / "checkpoint-4"))
    assert exact(again.model) == exact(one.model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
def test_adapters_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted(seed: int = 0) -> Any:
        torch.manual_seed(seed)
        config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2, lora_dropout=0.0)
        return peft.get_peft_model(made(), config)

    one = trainer(adapted(), tmp_path)
    one.train()
    keys = torchprune.masks(one.model)
    assert keys
    assert not any("lora" in key for key in keys)
    check_zeros(one.model)
    again = trainer(adapted(5), tmp_path / "again", save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert exact(again.model) == exact(one.model)


def test_torchprune_imports_no_transformers() -> None:
    code = "import sys, torchprune.training; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from torchprune.errors import MissingExtraError\n"
        "try:\n    from torchprune.training import PruningCallback\n"
        "except MissingExtraError as error:\n    assert 'torchprune[transformers]' in str(error)\n"
        "else:\n    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":  # what `test_killed_and_resumed` kills
    from transformers import TrainerCallback

    class Waits(TrainerCallback):
        """Tells of the fourth checkpoint, and hangs in the middle of the step after it."""

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            if state.global_step == 4:
                print("saved 4", flush=True)
                signal.pause()

    trainer(
        made(), sys.argv[1], [PruningCallback(MagnitudeSpec(SPARSE), SCHEDULE), Waits()]
    ).train()
