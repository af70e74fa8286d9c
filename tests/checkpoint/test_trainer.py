"""transformers' Trainer over masked models: its checkpoints resume with their masks, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import llama, mixtral
from saved import bits, output, prune, state
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.errors import CheckpointError


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random ids, the same ones every time."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(3, 61, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def trainer(model: nn.Module, directory: Path, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(directory),
        **{
            "max_steps": 4,
            "save_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "logging_strategy": "no",
            **options,
        },
    )
    return Trainer(model, arguments, train_dataset=Texts(), eval_dataset=Texts())


def exact(model: nn.Module) -> dict[str, Any]:
    """Everything a model holds, values behind masks and all, by name."""
    return {k: bits(v) for k, v in model.state_dict().items()}


def masked(seed: int = 0, sparsity: float = 0.5, **changes: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return prune(llama(**changes), MagnitudeSpec(sparsity))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A model after four steps, and its checkpoints after two and four."""
    directory = tmp_path_factory.mktemp("trained")
    model = masked()
    trainer(model, directory).train()
    return model, directory


def test_a_checkpoint_is_a_plain_one_and_one_of_ours(trained: tuple[nn.Module, Path]) -> None:
    from transformers import LlamaForCausalLM

    model, directory = trained
    last = directory / "checkpoint-4"
    ids = Texts()[0]["input_ids"][None]
    stock, found = LlamaForCausalLM.from_pretrained(last, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert torch.equal(output(stock, ids), output(model.eval(), ids))
    loaded = torchprune.load(last)
    assert state(loaded) == state(model)
    assert exact(loaded) == exact(model)


@pytest.mark.parametrize(
    "start",
    [
        lambda: masked(),
        lambda: masked(seed=1, sparsity=0.7),
        lambda: masked(seed=1, sparsity=0.2),
        lambda: prune(llama(), MagnitudeSpec(targets="lm_head")),
        llama,
    ],
    ids=["as before", "sparser", "denser", "elsewhere", "dense"],
)
def test_resuming_is_as_if_it_had_never_stopped(
    start: Any, trained: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    model, directory = trained
    resumed = start()
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(directory / "checkpoint-2"))
    assert exact(resumed) == exact(model)
    assert state(resumed)["masks"] == state(model)["masks"]
    torchprune.densify(resumed)  # a mask-only method: what it pruned is still there


def test_resuming_in_shards_and_with_adafactor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained
    monkeypatch.setattr(
        PreTrainedModel, "save_pretrained", lambda *a, **k: save(*a, **k, max_shard_size="8KB")
    )
    model = masked(tie_word_embeddings=True)
    trainer(model, tmp_path, optim="adafactor").train()
    assert len(list((tmp_path / "checkpoint-2").glob("*.safetensors"))) > 2
    resumed = masked(seed=2, tie_word_embeddings=True)
    again = trainer(resumed, tmp_path / "again", optim="adafactor")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert exact(resumed) == exact(model)


def test_experts_that_transformers_writes_apart(tmp_path: Path) -> None:
    def moe(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return prune(mixtral(), MagnitudeSpec(pattern="2:4"))

    model = moe(0)
    trainer(model, tmp_path, max_steps=2, save_steps=1).train()
    resumed = moe(1)
    again = trainer(resumed, tmp_path / "again", max_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert exact(resumed) == exact(model)


@pytest.mark.parametrize("only_model", [False, True])
def test_the_best_model_comes_back_with_its_masks(only_model: bool, tmp_path: Path) -> None:
    model = masked()
    best = trainer(
        model,
        tmp_path,
        learning_rate=0.5,  # so that the first checkpoint is the best
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        save_only_model=only_model,
    )
    best.train()
    assert best.state.best_model_checkpoint.endswith("checkpoint-2")
    loaded = torchprune.load(tmp_path / "checkpoint-2")
    assert state(loaded)["weights"] == state(model)["weights"]
    assert state(loaded)["masks"] == state(model)["masks"]
    weight = model.model.layers[0].mlp.up_proj.parametrizations.weight
    assert weight[0].reversible != only_model
    if only_model:
        with pytest.raises(torchprune.TorchpruneError, match="not saved"):
            torchprune.densify(model)
    best.save_model(str(tmp_path / "final"))
    assert state(torchprune.load(tmp_path / "final"))["masks"] == state(model)["masks"]


def test_checkpoints_from_before_resume_too(tmp_path: Path) -> None:
    model = masked()
    trainer(model, tmp_path).train()
    old = tmp_path / "checkpoint-2"
    from safetensors.torch import save_file

    before = torchprune.load(old)
    for name in ("torchprune_masks.json", "torchprune_masks.data"):
        (old / name).unlink()
    save_file(before.state_dict(), old / "model.safetensors")  # parametrized names
    resumed = masked(seed=1)
    trainer(resumed, tmp_path / "again").train(resume_from_checkpoint=str(old))
    assert exact(resumed) == exact(model)


def test_a_damaged_checkpoint_does_not_resume(tmp_path: Path) -> None:
    trainer(masked(), tmp_path, max_steps=1, save_steps=1).train()
    path = tmp_path / "checkpoint-1" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        trainer(masked(), tmp_path).train(resume_from_checkpoint=str(path.parent))


def test_a_module_of_no_transformers_class_is_saved_as_it_is(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = masked()

        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            return self.inner(input_ids=input_ids, labels=labels)

    model, resumed = Own(), Own()
    trainer(model, tmp_path).train()
    again = trainer(resumed, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert exact(resumed) == exact(model)
