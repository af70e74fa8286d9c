"""Batches in the forms that users have: rows of tables, ids as lists, columns of no model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, tokens
from padded import agreeing, padded, pruned
from torch import Tensor, nn

import torchprune
from torchprune import WandaSpec
from torchprune.calibration.batches import read_batches
from torchprune.errors import CalibrationError


def _rows(count: int = 4) -> list[list[int]]:
    return [tokens(seed, 1, rows=1, length=12 - seed)[0][0].tolist() for seed in range(count)]


def _table(**more: list[Any]) -> Any:
    datasets = pytest.importorskip("datasets")
    rows = _rows()
    masks = [[1] * len(row) for row in rows]
    return datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": masks, **more})


def _encodings() -> list[Any]:
    from transformers import BatchEncoding

    return [BatchEncoding({"input_ids": row, "attention_mask": [1] * len(row)}) for row in _rows()]


FORMS: dict[str, Callable[[], Any]] = {
    "table of tensors": lambda: _table().with_format("torch"),
    "table of lists": _table,
    "table of arrays": lambda: _table().with_format("numpy"),
    "streamed table": lambda: _table().to_iterable_dataset(),
    "table with labels": lambda: _table(labels=_rows()).with_format("torch"),
    "rows of a table": lambda: list(_table().with_format("torch")),
    "vectors": lambda: [torch.tensor(row) for row in _rows()],
    "lists": _rows,
    "lists of one": lambda: [[row] for row in _rows()],
    "dicts of lists": lambda: [{"input_ids": row} for row in _rows()],
    "dicts of batches of lists": lambda: [{"input_ids": [row]} for row in _rows()],
    "arrays": lambda: [{"input_ids": np.array([row])} for row in _rows()],
    "encodings": _encodings,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_batches(form: str) -> None:
    model = FAMILIES["llama"].make()
    plain = pruned(model, [torch.tensor([row]) for row in _rows()], WandaSpec())
    other = pruned(model, FORMS[form](), WandaSpec())
    assert agreeing(plain, other) == 1.0
    assert torchprune.report(other).notes == []


def test_columns_that_the_model_does_not_take_are_left_out() -> None:
    data = _table(text=["a", "b", "c", "d"], length=[1, 2, 3, 4], idx=[0, 1, 2, 3])
    model = FAMILIES["llama"].make()
    made = pruned(model, data, WandaSpec())
    assert agreeing(made, pruned(model, _rows(), WandaSpec())) == 1.0
    (note,) = torchprune.report(made).notes
    assert note == (
        "left out of the batches, since a LlamaForCausalLM does not take them: text, length, idx"
    )


class Sorts(nn.Module):
    """Of images, a class each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        assert image.dim() == 4
        result: Tensor = self.out(self.conv(image).relu().mean((2, 3)))
        return result


def test_rows_of_images() -> None:
    datasets = pytest.importorskip("datasets")
    images = torch.randn(3, 3, 8, 8)
    table = datasets.Dataset.from_dict({"image": images.tolist(), "label": [0, 1, 2]})
    model = Sorts()
    spec = WandaSpec(targets=[nn.Linear, nn.Conv2d])
    made = pruned(model, table.with_format("torch"), spec)
    plain = pruned(model, [image[None] for image in images], spec)
    assert agreeing(made, plain) == 1.0


class Rates(nn.Module):
    """Takes vectors of ids that are a batch, as recommenders do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, users: Tensor, **more: Any) -> Tensor:
        assert users.dim() == 1
        assert set(more) <= {"weight"}
        result: Tensor = self.out(self.embed(users))
        return result


def test_vectors_stay_vectors_for_other_models() -> None:
    users = torch.arange(10)
    spec = WandaSpec(targets=[nn.Linear])
    for data in ([users], [{"users": users}], [{"users": users, "weight": users, "name": "who"}]):
        made = pruned(Rates(), data, spec)
        assert {y.tokens for y in torchprune.report(made).layers} == {10}


def test_columns_none_of_which_the_model_takes_are_its_own_error() -> None:
    with pytest.raises(TypeError, match="ids"):
        pruned(Sorts(), [{"ids": torch.ones(2, 3).long()}], WandaSpec())


def test_tables_of_text_ask_for_a_tokenizer() -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["one", "two"]})
    with pytest.raises(CalibrationError, match="texts need the model's tokenizer"):
        pruned(FAMILIES["llama"].make(), table, WandaSpec())


def test_labels_do_not_matter() -> None:
    model, batch = FAMILIES["llama"].make(), padded()
    none = torch.full_like(batch["input_ids"], -100)
    some = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    some[:, :3] = -100
    plain = pruned(model, [batch], WandaSpec())
    for labels in (none, some, batch["input_ids"]):
        assert agreeing(plain, pruned(model, [{**batch, "labels": labels}], WandaSpec())) == 1.0


def test_nested_tensors_move_to_the_models_device() -> None:
    model = nn.Linear(2, 2, device="meta")
    (batch,) = read_batches([({"x": torch.ones(2), "more": [torch.ones(1)]},)], model, 1).batches
    assert all(tensor.is_meta for tensor in batch.tensors())
    assert len(list(batch.tensors())) == 2
