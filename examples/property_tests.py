"""Properties of pruning in a test suite of your own: pytest examples/property_tests.py.

Needs pip install 'torchprune[testing]'.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from torch import nn

import torchprune
from torchprune.testing import SmallModel, assert_sparsity, check_laws, small_models, specs

WIDTH = 16


class Classifier(nn.Module):
    """Stands for the model of your project."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def batches() -> list[torch.Tensor]:
    return [torch.randn(8, WIDTH) for _ in range(2)]


@settings(max_examples=8, deadline=None)
@given(spec=specs(fits=(WIDTH, WIDTH)))
def test_the_classifier_can_be_pruned_by_any_spec(spec: torchprune.WandaSpec) -> None:
    check_laws(Classifier, spec, batches())


def test_the_classifier_becomes_two_of_four_and_keeps_its_head() -> None:
    model = torchprune.sparsify(
        Classifier(), torchprune.WandaSpec(pattern="2:4"), batches(), progress=False
    )
    assert_sparsity(model, "2:4")
    assert_sparsity(torchprune.fold(model), "2:4")
    assert model.head.weight.count_nonzero() == model.head.weight.numel()


@settings(max_examples=5, deadline=None)
@given(model=small_models(kinds=["cnn", "attention"]))
def test_half_of_every_layer_goes(model: SmallModel) -> None:
    pruned = torchprune.sparsify(model.make(), torchprune.WandaSpec(), model.data, progress=False)
    assert_sparsity(pruned, "unstructured", 0.5, scope="row")
