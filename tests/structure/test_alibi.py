"""Heads of transformers' models with ALiBi go, exactly, wherever the smaller model is used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, tokens
from structures import close, mask_random_units, outputs
from sweeps import sample
from torch import Tensor, nn

import torchprune
from torchprune import HeadSpec, plan_shrink, shrink
from torchprune.errors import CheckpointError
from torchprune.export import to_hf
from torchprune.graph.groups import structure_of
from torchprune.structure.narrowed import record_of

transformers = pytest.importorskip("transformers")

IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def bloom(heads: int = 4) -> Any:
    config = transformers.BloomConfig(**IDS, hidden_size=8 * heads, n_layer=2, n_head=heads)
    return transformers.BloomForCausalLM(config)


def mpt(heads: int = 4) -> Any:
    config = transformers.MptConfig(
        vocab_size=VOCABULARY, d_model=8 * heads, n_layers=2, n_heads=heads, max_seq_len=32
    )
    return transformers.MptForCausalLM(config)


def falcon(**settings: Any) -> Any:
    config = transformers.FalconConfig(
        **{**IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"alibi": True, "multi_query": False, "new_decoder_architecture": False, **settings},
    )
    return transformers.FalconForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "bloom": bloom,
    "bloom-6": partial(bloom, 6),
    "mpt": mpt,
    "mpt-6": partial(mpt, 6),
    "falcon": falcon,
    "falcon-eager": partial(falcon, attn_implementation="eager"),
    "falcon-one-key": partial(falcon, multi_query=True),
    "falcon-groups": partial(falcon, new_decoder_architecture=True, num_kv_heads=2),
}


def lively(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, 0.2)
    return model.to(dtype).eval()


def padded(ids: Tensor, *lengths: int) -> dict[str, Tensor]:
    """The last tokens of each row, as many as are said."""
    places = torch.arange(ids.shape[1]).flip(0)
    return {"input_ids": ids, "attention_mask": (places < torch.tensor(lengths)[:, None]).long()}


CASES = [f"{name} in {dtype}" for name in MODELS for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize("case", sample(CASES, "bloom in float32", "falcon-groups in bfloat16"))
def test_each_layer_loses_heads_of_its_own(case: str, tmp_path: Path) -> None:
    name, _, kind = case.partition(" in ")
    dtype = getattr(torch, kind)
    model = lively(name, dtype)
    (ids,) = tokens(count=1)
    mask_random_units(model, ids, 5)
    masked = copy.deepcopy(model)
    plan = plan_shrink(model, ids)
    units = {r.group.name: r.gone.tolist() for r in plan.removals if r.group.kind == "heads"}
    assert len(units) > 0
    shrink(model, plan)
    assert record_of(model).keys() == units.keys()
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    batches = [
        ids,
        ids[:1, :5],
        padded(ids, 12, 7),
        {"input_ids": tokens(3, 1, 3, 9)[0], "attention_mask": torch.ones(3, 9).long()},
    ]
    torchprune.save(model, tmp_path / "own")
    again, copied = torchprune.load(tmp_path / "own"), copy.deepcopy(model)
    for batch in batches:
        want = outputs(masked, batch)
        assert close(outputs(model, batch), want, tolerance)
        assert close(outputs(again, batch), outputs(model, batch), 0.0)
        assert close(outputs(copied, batch), outputs(model, batch), 0.0)
    if dtype == torch.float32:
        for some in (padded(ids, 12, 7), padded(ids[:1], 12)):
            options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
            assert torch.equal(
                model.generate(**some, **options), masked.generate(**some, **options)
            )
    with pytest.raises(CheckpointError, match=r"picks what belongs to its heads"):
        to_hf(model, tmp_path / "stock", pad_to_max=True)


@pytest.mark.parametrize("name", sample(MODELS, "bloom"))
def test_once_more_and_as_a_program_of_other_sizes(name: str) -> None:
    """One row alone: BLOOM's heads lie on one axis with the rows then, and do not show it."""
    model, (ids,) = lively(name), tokens(count=1, rows=1)
    for _ in range(1 if "groups" in name else 2):
        torchprune.sparsify(model, HeadSpec(0.5), [ids], progress=False)
        masked = copy.deepcopy(model)
        shrink(model, plan_shrink(model, ids))
        for batch in (ids, tokens(2, 1)[0]):
            assert close(outputs(model, batch), outputs(masked, batch), 1e-5)
    assert {said["kept"] for one in record_of(model).values() for said in one.values()} < {1, 2}
    model.config.use_cache = False
    auto = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    given = padded(tokens(count=1)[0], 12, 7)
    shapes = {"input_ids": auto, "attention_mask": auto}
    program = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False)
    for batch in (given, padded(tokens(4, 1, 3, 7)[0], 7, 6, 2)):
        got = program.module()(**batch).logits
        torch.testing.assert_close(got, model(**batch).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # while exporting, of third parties
@pytest.mark.parametrize("name", sample(["bloom", "mpt"], "bloom"))
def test_onnx_runtime_agrees(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx_ir", reason="the extra onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    from torchprune.export import to_onnx

    model, (ids,) = lively(name), tokens(count=1)
    mask_random_units(model, ids, 5)
    shrink(model, plan_shrink(model, ids))
    to_onnx(model, tmp_path / "model.onnx", padded(ids, 12, 7))
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for batch in (padded(ids, 12, 7), padded(tokens(4, 1, 3, 7)[0], 7, 6, 2)):
        got = session.run(None, {key: value.numpy() for key, value in batch.items()})
        assert close([torch.tensor(got[0])], outputs(model, batch)[:1], 1e-4)


def test_a_model_with_rotations_is_exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only heads that meet what is made for all of them are worth another look."""
    from families import llama

    from torchprune.graph import trace

    calls: list[Any] = []
    kept = trace.exported
    monkeypatch.setattr(trace, "exported", lambda *given: calls.append(given) or kept(*given))
    structure_of(llama().eval(), tokens(count=1)[0])
    assert len(calls) == 1
