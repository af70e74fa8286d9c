"""Every family of transformers that can be built tiny obeys the laws; today's sample in CI.

`make families` runs all. `make test` runs a few that change every day, and prints which; of another
day by `TORCHPRUNE_DAY=2026-11-29 make test`.
"""

from __future__ import annotations

import datetime
import os
import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from family_laws import broken, by_layer
from unbuilt import UNBUILT
from zoo import UnbuiltError, build, classes

import torchprune

A_DAY = 3


def today() -> datetime.date:
    """The day whose sample `make test` runs."""
    given = os.environ.get("TORCHPRUNE_DAY")
    return (
        datetime.date.fromisoformat(given) if given else datetime.datetime.now(datetime.UTC).date()
    )


def cases() -> list[Any]:
    """All families that can be built, of which those of today are not marked."""
    kinds = [kind for kind in classes() if kind not in UNBUILT]
    drawn = set(random.Random(today().toordinal()).sample(kinds, A_DAY))
    return [k if k in drawn else pytest.param(k, marks=pytest.mark.family) for k in kinds]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what single families' own code warns of
        yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


@pytest.mark.parametrize("kind", cases())
def test_every_law_holds(kind: str) -> None:
    print(f"of {today()}: {kind}")
    found = broken(build(kind))
    assert not found, "\n".join([kind, *(f"{name}: {why}" for name, why in found.items())])


@pytest.mark.family
@pytest.mark.parametrize("kind", UNBUILT)
def test_what_can_be_built_is_not_listed(kind: str) -> None:
    with pytest.raises(UnbuiltError):
        build(kind)


def test_the_families_are_many_and_the_list_names_only_such() -> None:
    assert len(cases()) >= 300
    assert set(UNBUILT) <= set(classes())


# -- the oracle can fail --------------------------------------------------------------------------


def test_the_oracle_sees_a_layer_that_is_pruned_by_other_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built, real = build("llama"), torchprune.sparsify

    def other(model: Any, spec: Any, data: Any, **options: Any) -> Any:
        noise = torch.Generator().manual_seed(9)
        table = model.get_input_embeddings().weight
        before = table.detach().clone()
        with torch.no_grad():
            table[::2] *= 1 + torch.rand(table.shape[1], generator=noise)
        real(model, spec, data, **options)
        with torch.no_grad():
            table.copy_(before)
        return model

    assert by_layer(built) == ""
    monkeypatch.setattr(torchprune, "sparsify", other)
    assert "keep the wrong weights" in by_layer(built)


@pytest.mark.parametrize("changed", ["swapped", "counted"])
def test_the_oracle_sees_one_wrong_weight(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built, real = build("gpt2"), torchprune.masks

    def wrong(model: Any) -> dict[str, torch.Tensor]:
        found = real(model)
        mask = next(iter(found.values())).clone()
        column = mask[:, 0]  # (in, out): one output
        column[column.nonzero()[0]] = False
        if changed == "swapped":
            column[(~column).nonzero()[-1]] = True
        return {**found, next(iter(found)): mask}

    monkeypatch.setattr(torchprune, "masks", wrong)
    assert by_layer(built).startswith("1 of ")
