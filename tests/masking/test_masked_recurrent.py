"""Masks on recurrent nets, whose forward reads a list of parameters that it keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import torchprune

KINDS = {
    "lstm": lambda: nn.LSTM(5, 6, num_layers=2, bidirectional=True),
    "gru": lambda: nn.GRU(5, 6),
    "rnn": lambda: nn.RNN(5, 6, batch_first=True),
    "projected": lambda: nn.LSTM(5, 6, proj_size=3),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_nets_act_pruned_and_train_so(kind: str) -> None:
    torch.manual_seed(0)
    model = KINDS[kind]()
    dense = copy.deepcopy(model)
    masks = {n: torch.rand_like(p) > 0.5 for n, p in model.named_parameters() if p.dim() == 2}
    torchprune.apply_masks(model, masks)
    reference = copy.deepcopy(dense)
    with torch.no_grad():
        for name, mask in masks.items():
            getattr(reference, name).mul_(mask)
    x = torch.randn(4, 3, 5)
    assert torch.equal(model(x)[0], reference(x)[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model.zero_grad()
        model(x)[0].square().sum().backward()
        optimizer.step()
    for name, mask in masks.items():
        weight = getattr(model, name)
        assert not weight.grad[~mask].any()
        assert not weight[~mask].any()
        assert not torch.equal(weight, getattr(reference, name))
        weight.data.fill_(0.5)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            p.copy_(masks[name] * 0.5 if name in masks else getattr(model, name))
    assert torch.equal(model(x)[0], reference(x)[0])
    other = copy.deepcopy(model).double().float()
    assert torch.equal(other(x)[0], reference(x)[0])
    torchprune.fold(model)
    assert type(model) is type(dense)
    assert torch.equal(model(x)[0], reference(x)[0])
    model.weight_hh_l0.data.zero_()
    assert not torch.equal(model(x)[0], reference(x)[0])


def test_attention_with_one_weight_for_three_is_masked() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    mask = torch.rand(24, 8) > 0.5
    torchprune.apply_masks(layer, {"self_attn.in_proj_weight": mask})
    folded = torchprune.fold(copy.deepcopy(layer))
    assert not folded.self_attn.in_proj_weight[~mask].any()
    x = torch.randn(2, 3, 8)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(layer(x), folded(x))
    layer(x).sum().backward()
    assert not layer.self_attn.in_proj_weight.grad[~mask].any()
