"""Wherever a batch has its mask of padding, and whatever is padded, it is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import VOCABULARY, bert, llama, t5, tokens
from padded import (
    CASES,
    REAL,
    Attention,
    Small,
    agreeing,
    assert_nothing_leaks,
    counted,
    padded,
    pairs,
    pruned,
    seq2seq,
)
from torch import Tensor, nn

import torchprune
from torchprune import WandaSpec

# -- where the mask is ---------------------------------------------------------------------------


class Wrapped(nn.Module):
    """Passes on what it gets, in some form of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


class Anything(Wrapped):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class InADict(Wrapped):
    def forward(self, batch: Any) -> Any:
        return self.module(**batch)


class TwoDicts(Wrapped):
    def forward(self, source: Any, target: Any) -> Any:
        return self.module(**source, **{f"decoder_{k}": v for k, v in target.items()})


class OtherNames(Wrapped):
    def forward(self, words: Tensor, valid: Tensor) -> Any:
        return self.module(input_ids=words, attention_mask=valid)


class Inverted(Wrapped):
    def forward(self, words: Tensor, key_padding_mask: Tensor) -> Any:
        return self.module(input_ids=words, attention_mask=(~key_padding_mask).long())


def _four(batch: dict[str, Tensor], *, additive: bool) -> dict[str, Tensor]:
    mask = batch["attention_mask"].bool()
    length = mask.shape[1]
    seen = mask[:, None, None, :] & torch.ones(length, length, dtype=torch.bool).tril()
    least = torch.finfo(torch.float32).min
    bias = torch.zeros(seen.shape).masked_fill(~seen, least)
    return {"input_ids": batch["input_ids"], "attention_mask": bias if additive else seen}


def _types(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    types = torch.zeros_like(batch["input_ids"])
    types[:, 3:] = 1
    return {**batch, "token_type_ids": types}


def _encoding(batch: dict[str, Tensor]) -> Any:
    from transformers import BatchEncoding

    return BatchEncoding(batch)


def _labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "labels": labels}


FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[dict[str, Tensor]], Any]]] = {
    "positional": (llama, lambda b: tuple(b.values())),
    "positional, unnamed": (lambda: Anything(llama()), lambda b: tuple(b.values())),
    "wrapped": (lambda: Anything(llama()), dict),
    "in a dict": (lambda: InADict(llama()), lambda b: (b,)),
    "in an encoding": (lambda: InADict(llama()), lambda b: {"batch": _encoding(b)}),
    "beside kinds": (bert, _types),
    "beside kinds, in a dict": (lambda: InADict(bert()), lambda b: (_types(b),)),
    "beside labels": (llama, _labels),
    "by another name": (lambda: OtherNames(llama()), lambda b: tuple(b.values())),
    "bool": (llama, lambda b: {**b, "attention_mask": b["attention_mask"].bool()}),
    "true at padding": (
        lambda: Inverted(bert()),
        lambda b: {"words": b["input_ids"], "key_padding_mask": ~b["attention_mask"].bool()},
    ),
    "true at padding, looking back": (
        lambda: Inverted(llama()),
        lambda b: {"words": b["input_ids"], "key_padding_mask": ~b["attention_mask"].bool()},
    ),
    "of four axes": (llama, lambda b: _four(b, additive=False)),
    "added": (llama, lambda b: _four(b, additive=True)),
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("form", FORMS)
def test_wherever_the_mask_is(form: str, side: str) -> None:
    build, made_of = FORMS[form]
    made = assert_nothing_leaks(build().eval(), [made_of(padded(side))], WandaSpec())
    assert set(counted(made).values()) == {REAL}


def _two_dicts(side: str) -> tuple[Any, Any]:
    return padded(side), padded(side, seed=9, lengths=(3, 12, 6))


@pytest.mark.parametrize("side", ["right", "left"])
def test_encoder_decoders_in_wrappers(side: str) -> None:
    both = pairs(side, (3, 12, 6))
    for model, batch in (
        (Anything(t5()), both),
        (TwoDicts(seq2seq("Bart")), _two_dicts(side)),
    ):
        made = assert_nothing_leaks(model.eval(), [batch], WandaSpec())
        assert set(counted(made).values()) == {REAL, 21}


def test_a_decoder_without_a_mask_keeps_all_its_tokens() -> None:
    batch = {**padded(), "decoder_input_ids": tokens(3, 1, rows=3, length=12)[0]}
    made = assert_nothing_leaks(seq2seq("Bart").eval(), [batch], WandaSpec())
    for name, count in counted(made).items():
        encoder = name.startswith("encoder") or name.endswith(
            ("encoder_attn.k_proj", "encoder_attn.v_proj")
        )
        assert count == (REAL if encoder else 36), name


def test_a_decoder_fed_with_labels() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(**seq2seq("Bart").config.to_diff_dict())
    model = BartForConditionalGeneration(config).eval()
    target = padded(seed=9, lengths=(3, 12, 6))
    labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
    for batch in (
        {**padded(), "labels": labels},
        {"input_ids": padded()["input_ids"], "labels": labels},
    ):
        made = pruned(model, [batch], WandaSpec())
        read = counted(made)
        assert {n for name, n in read.items() if ".decoder" in name and "fc1" in name} == {21}


class Batched(nn.Module):
    """torch's own encoder, sequence first or batch first."""

    def __init__(self, *, batch_first: bool, causal: bool) -> None:
        super().__init__()
        self.embed, self.causal = nn.Embedding(VOCABULARY, 16), causal
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, src: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        later = torch.ones(12, 12, dtype=torch.bool).triu(1) if self.causal else None
        x = self.embed(src)
        return self.encoder(x, mask=later, src_key_padding_mask=src_key_padding_mask)


@pytest.mark.filterwarnings("ignore:.*out_proj.*no calibration batch reached it")
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_torchs_own_encoder(batch_first: bool, causal: bool, side: str) -> None:
    model = Batched(batch_first=batch_first, causal=causal).eval()
    batch = padded(side)
    ids = batch["input_ids"] if batch_first else batch["input_ids"].T
    data = [{"src": ids, "src_key_padding_mask": batch["attention_mask"] == 0}]
    read = counted(assert_nothing_leaks(model, data, WandaSpec()))
    assert {n for name, n in read.items() if "linear" in name} == {REAL}


# -- sounds and images -----------------------------------------------------------------------------


def test_images_beside_text_all_count() -> None:
    import transformers

    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=8, projection_dim=32,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=60, vision_feature_layer=-1
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for length in (24, 22, 17 + 5):  # 17 patches with the class's own
        batch = padded(lengths=(length, length - 5))
        ids = batch["input_ids"].clamp_max(59)
        ids[:, 1:17] = 60
        batch = {**batch, "input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32)}
        made = assert_nothing_leaks(model, [batch], WandaSpec())
        for name, count in counted(made).items():
            assert count == (34 if "vision" in name else 2 * length - 5), name


class Beside(nn.Module):
    """Text and something else of the same length, which is not masked."""

    def __init__(self, *, merged: bool) -> None:
        super().__init__()
        self.text, self.image, self.merged = Small(nn.Identity), nn.Linear(8, 16), merged
        self.last = nn.Linear(16, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, patches: Tensor) -> Tensor:
        seen = self.image(patches)
        seen = seen if self.merged else seen.mean(1, keepdim=True)
        result: Tensor = self.last(self.text(input_ids, attention_mask) + seen)
        return result


@pytest.mark.parametrize("merged", [False, True])
def test_patches_as_many_as_the_padded_text_is_long(merged: bool) -> None:
    batch = {**padded(), "patches": torch.randn(3, 12, 8)}
    spec = WandaSpec(targets=[nn.Linear])
    read = counted(assert_nothing_leaks(Beside(merged=merged).eval(), [batch], spec))
    assert read.pop("image") == (REAL if merged else 36)
    assert set(read.values()) == {REAL}


class Patches(nn.Module):
    """Cuts images to patches, of which those of padding are not attended to."""

    def __init__(self) -> None:
        super().__init__()
        self.cut, self.attend = nn.Conv2d(3, 16, 4, stride=4), Attention(16)
        self.out = nn.Linear(16, 16)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> Tensor:
        x = self.cut(pixel_values).flatten(2).mT
        seen = -nn.functional.max_pool2d(-pixel_mask[:, None].float(), 4).flatten(1)
        result: Tensor = self.out(x + self.attend(x, seen))
        return result


@pytest.mark.parametrize("kind", [torch.long, torch.bool])
def test_images_of_several_sizes(kind: torch.dtype) -> None:
    images = torch.randn(2, 3, 16, 16)
    mask = torch.ones(2, 16, 16).to(kind)
    mask[1, 8:], mask[1, :, 10:] = 0, 0
    found = []
    model = Patches().eval()
    for filling in (0.0, 3.0):
        filled = torch.where(mask[:, None] == 1, images, filling)
        data = [{"pixel_values": filled, "pixel_mask": mask}]
        found.append(pruned(model, data, WandaSpec(targets=[nn.Linear, nn.Conv2d])))
    assert agreeing(*found) == 1.0
    assert set(counted(found[0]).values()) == {16 + 2 * 2}  # a patch half of padding is none
    parts = {"pixel_values": images, "pixel_mask": (torch.rand(2, 16, 16) > 0.5).to(kind)}
    made = pruned(model, [parts], WandaSpec(targets=[nn.Conv2d]))
    assert set(counted(made).values()) == {32}  # an object's outline is no padding


def sound(norm: str) -> nn.Module:
    import transformers

    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer", vocab_size=20,
    )  # fmt: skip
    model: nn.Module = transformers.Wav2Vec2Model(config)
    return model.eval()


def _sounds(filling: float) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 600, generator=generator)
    mask = torch.ones(3, 600, dtype=torch.long)
    mask[1, 400:], mask[2, 200:] = 0, 0
    noise = filling * torch.randn(3, 600, generator=generator)
    return [{"input_values": torch.where(mask == 1, x, noise), "attention_mask": mask}]


def test_sounds_longer_than_what_is_made_of_them() -> None:
    model = sound("layer")
    one, two = (pruned(model, _sounds(filling), WandaSpec()) for filling in (0.0, 1.0))
    assert agreeing(one, two) == 1.0
    read = counted(one)
    # 600, 400 and 200 numbers make 119, 79 and 39 windows of ten, five apart
    assert read["feature_extractor.conv_layers.0.conv"] == 119 + 79 + 39


def test_padding_that_reaches_tokens_is_said() -> None:
    one, two = (pruned(sound("group"), _sounds(filling), WandaSpec()) for filling in (0.0, 1.0))
    read = counted(one)
    assert read == counted(two)
    assert 0 < (read["feature_extractor.conv_layers.1.conv"] or 0) < 3 * 28
    (note,) = torchprune.report(one).notes
    assert "conv_layers.1.conv" in note
    assert "padding reaches what they read of tokens" in note


def test_padding_in_reach_of_a_convolution_does_not_count() -> None:
    (case,) = (case for case in CASES if case.name == "convolved wide")
    made = pruned(case.make(), case.data("right"), WandaSpec())
    assert counted(made)["mix.0.up"] == REAL - 2  # the last token of the two shorter texts
