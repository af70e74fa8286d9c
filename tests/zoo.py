"""Tiny random models of transformers' families, from the library's own mappings: no downloads.

Every model type that the library maps to a class is a family. Its configuration is shrunk field by
field, by what the fields of transformers' configurations are called; where a class refuses the
sizes, or its forward fails, the next variant of them is tried. What cannot be built at all is
listed, with the reason, in `unbuilt.py`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, INNER, HEADS, EXPERTS, LABELS = 61, 32, 48, 4, 5, 7
LENGTH = 12
FIRST_WORD = 20
"""Ids below are special: padding, begin, end, places of images."""

_MAPPINGS = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_CTC_MAPPING",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
)

_MOST = 3_000_000
"""Parameters of a tiny model at most."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """Sizes to try."""

    layers: int = 2
    width: int = WIDTH
    inner: int = INNER
    heads: int = HEADS
    keys: int = 2
    head: int = 8
    experts: int = EXPERTS
    image: int = 32
    patch: int = 8
    rope: dict[str, Any] | None = None
    frames_first: bool = False


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

VARIANTS = (
    Variant(),
    Variant(layers=4),
    Variant(rope=_ROPE),
    Variant(rope={**_ROPE, "mrope_section": [2, 1, 1]}),
    Variant(rope={**_ROPE, "mrope_section": [1, 1]}),
    Variant(head=16),
    Variant(keys=HEADS),
    Variant(experts=4, layers=4),
    Variant(head=16, width=64, inner=96),
    Variant(head=16, width=64, inner=96, keys=HEADS, layers=4, experts=4),
    Variant(image=64, patch=16),
    Variant(frames_first=True),
    Variant(layers=6, experts=8, head=32, width=128, inner=128),
)


_SWIN = {"image_size": 64, "patch_size": 8, "window_size": 4, "depths": [1, 1], "num_heads": [2, 2]}

# What no rule for names can know.
_GIVEN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 5, "num_experts_per_tok": 2,
              "first_k_dense_replace": 1},
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 32},
    "esm": {"vocab_size": VOCABULARY},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"],
                 "num_hidden_layers": 4},
    "longcat_flash": {"zero_expert_num": 2},  # 256 of them would leave no token to the others
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"layer_types": ["linear_attention", "full_attention"]},
    "reformer": {"hash_seed": 0},
    "swin": _SWIN,
    "donut-swin": _SWIN,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}},
    "wav2vec2-bert": {"vocab_size": VOCABULARY},
    "wav2vec2-conformer": {"vocab_size": VOCABULARY},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}  # fmt: skip


def _ring(*values: tuple[str, Any]) -> list[tuple[re.Pattern[str], Any]]:
    return [(re.compile(pattern), value) for pattern, value in values]


# The first that matches a field's name says its size, if that is smaller than the default.
_RULES = _ring(
    (r".*(token_id|_id|_ids|_index)", None),
    (r"first_k_dense_replace|num_dense_layers|.*num_dense.*", lambda v: 1),
    (r"num_kv_shared_layers", lambda v: 0),
    (r"rotary_dim", lambda v: 4),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", lambda v: 1),
    (r"(n|num)_(expert_)?groups?|topk_group|n_group|moe_n_group|num_expert_group", lambda v: 1),
    (r".*experts_per_tok(en)?|.*top_?k(_experts)?|num_selected_experts|moe_k", lambda v: 2),
    (r".*(shared_expert|expert).*(size|dim)", lambda v: v.inner),
    (r".*(experts|num_experts_.*|n_experts)", lambda v: v.experts),
    (r".*(vocab).*|num_tokens|.*codebook_size", lambda v: VOCABULARY),
    (r".*(kv|key_value)(_.*)?heads?|multi_query_group_num|.*n_kv_heads?", lambda v: v.keys),
    (r"(.*_)?(head_dim|d_kv|d_head|kv_channels|head_size|dim_head|attention_head_size)", "head"),
    (r".*head_dim", "head"),
    (r".*(heads?|n_head)", lambda v: v.heads),
    (
        r"(num|n)_(\w+_)?(layers?|blocks?)|\w+_layers|depth|layers|(\w+_)?num_layers|\w*n_layers?"
        r"|\w+_depth",
        "layers",
    ),
    (r".*(lora_rank|_rank|_rank_\w+)", lambda v: 8),
    (
        r".*(intermediate|ffn|d_ff|n_inner|mlp_dim|mlp_hidden|feed_?forward|ff_dim|dim_ff).*",
        "inner",
    ),
    (r".*(position|n_positions|n_ctx|max_seq|context|max_length|source_len|target_len).*", None),
    (r".*(state_size|d_state|state_dim)", lambda v: 8),
    (r".*(chunk_size|chunk_length)", lambda v: 4),
    (r"sliding_window|attention_window|window", lambda v: 8),
    (
        r".*(hidden_size|d_model|n_embd|embed_dim|embedding_size|embd|_dim|width|_channels"
        r"|d_embed|embed_size|hidden_dim|projection_dim|d_inner|_size_per_layer_input|lru_width"
        r"|embedding_dim|output_size|num_features|conv_dim|hidden_channels|hidden_act_size)",
        "width",
    ),
    (r"dim", "width"),
    (r".*image_size|.*img_size|input_size", "image"),
    (r".*patch_size", "patch"),
    (r"num_labels", lambda v: LABELS),
    (r"num_queries|num_query_tokens|num_object_queries|num_latents", lambda v: 6),
)

_KEPT = re.compile(
    r"num_channels|in_chans|in_channels|.*mel_bins|feature_size|num_codebooks|"
    r"num_conv_pos.*|.*kernel.*|.*stride.*|conv_width|d_conv|.*temporal_patch_size|"
    r"spatial_merge_size|.*_every.*|.*dropout.*|n_mels|input_feat_per_channel"
)


def _shrunk_number(name: str, value: int, v: Variant) -> int:
    if _KEPT.fullmatch(name):
        return value
    for pattern, rule in _RULES:
        if pattern.fullmatch(name):
            if rule is None:
                break
            wanted = getattr(v, rule) if isinstance(rule, str) else rule(v)
            return min(value, wanted)
    if re.fullmatch(r".*(position|n_positions|n_ctx|max_seq|context).*", name):
        return min(value, 64)
    return value


def _shrunk_list(name: str, value: list[Any], v: Variant) -> list[Any]:
    """Lists of sizes keep their proportions, lists of depths become ones."""
    if not value or not all(type(x) is int for x in value) or _KEPT.fullmatch(name):
        return value
    if re.fullmatch(r".*(depths?|layers|blocks)", name):
        return [min(x, 2 if i == 0 else 1) for i, x in enumerate(value)]
    if re.fullmatch(
        r".*(hidden_sizes|embed_dims?|dims?|neck_hidden_sizes|widths|encoder_hidden.*"
        r"|out_channels|hidden_dims|conv_dim)",
        name,
    ):
        smallest = min(value)
        return [min(x, max(16, 16 * x // smallest)) for x in value] if max(value) > 64 else value
    if re.fullmatch(r".*(heads)", name):
        return [min(x, 2) for x in value]
    return value


def _special(name: str, value: Any) -> int:
    known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    if name in known:
        return known[name]
    if type(value) is int and value >= FIRST_WORD:
        return 3 + sum(map(ord, name)) % (FIRST_WORD - 3)
    return value


def shrunk(kind: type, v: Variant, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Arguments for a configuration class, by which it says tiny sizes."""
    found: dict[str, Any] = {}
    given = dict(given or {})
    for field in dataclasses.fields(kind):
        name, value = field.name, field.default
        if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        value = given.get(name, value)
        if name in kind.sub_configs or name in ("id2label", "label2id", "transformers_version"):
            continue
        if name.endswith(("token_id", "token_index")):
            if value is not None or name == "pad_token_id":
                found[name] = _special(name, value)
        elif type(value) is int:
            if (new := _shrunk_number(name, value, v)) != value or name in given:
                found[name] = new
        elif isinstance(value, list | tuple):
            if (new := _shrunk_list(name, list(value), v)) != list(value):
                found[name] = type(value)(new)
        elif name == "rope_parameters" and v.rope is not None:
            found[name] = dict(v.rope)
    heads = [found.get(n, 0) for n in ("num_attention_heads", "n_heads", "num_heads")]
    for name in ("num_key_value_heads",):
        default = {f.name: f.default for f in dataclasses.fields(kind)}
        if name in default and default[name] is not None:
            alike = next(
                (
                    default[n]
                    for n in ("num_attention_heads", "n_heads", "num_heads")
                    if isinstance(default.get(n), int)
                ),
                None,
            )
            if alike == default[name] and any(heads):
                found[name] = v.heads
    if kind.sub_configs:
        whole = None
        for name, sub in kind.sub_configs.items():
            if not dataclasses.is_dataclass(sub):  # which one it is says an instance
                whole = kind() if whole is None else whole
                sub = type(getattr(whole, name))
                if dataclasses.is_dataclass(sub):
                    found[name] = sub(**shrunk(sub, v))
            else:
                found[name] = shrunk(sub, v)
    return {**found, **_GIVEN.get(kind.model_type, {})}


# -- families -------------------------------------------------------------------------------------


@functools.cache
def classes() -> dict[str, type]:
    """Model type -> the class of the family that is tried, in the order of the names."""
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    found: dict[str, Any] = {}
    for mapping in _MAPPINGS:
        names = getattr(auto, mapping + "_NAMES")
        for kind, name in names.items():
            if kind in CONFIG_MAPPING_NAMES:
                found.setdefault(kind, name if isinstance(name, str) else name[0])
    return {kind: found[kind] for kind in sorted(found)}


def model_class(kind: str) -> Any:
    import transformers

    return getattr(transformers, classes()[kind])


class UnbuiltError(Exception):
    """No variant of a family can be built and run."""


@dataclasses.dataclass(frozen=True, eq=False)
class Built:
    """A tiny model in eval mode, and how it is called."""

    kind: str
    model: nn.Module
    variant: Variant

    def data(self, count: int = 2, seed: int = 1) -> list[dict[str, Tensor]]:
        """Batches without padding."""
        frames_first = self.variant.frames_first
        return [inputs(self.model, seed + i, frames_first=frames_first) for i in range(count)]


def build(kind: str) -> Built:
    """The first variant of a family that runs.

    Raises:
        UnbuiltError: none does; says why.
    """
    problem = ""
    for variant in VARIANTS:
        try:
            return built_as(kind, variant)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            problem = problem or f"{type(error).__name__}: {lines[-1].strip()[:150]}"
    raise UnbuiltError(problem)


def built_as(kind: str, variant: Variant) -> Built:
    """A family's tiny model of certain sizes.

    Raises:
        Exception: its class or its forward refuses them.
    """
    owner = model_class(kind)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = owner.config_class(**shrunk(owner.config_class, variant))
        config._attn_implementation = "eager"
        _check_size(owner, config)
        model = owner(config).eval()
        _spread(model)
        built = Built(kind, model, variant)
        with torch.no_grad():
            one, two = (next(floats(model(**built.data(1)[0])), None) for _ in range(2))
        if one is None or two is None or not bool(one.isfinite().all()):
            raise ValueError("its outputs are not finite")
        if not torch.allclose(one, two, rtol=1e-4, atol=1e-6):
            raise ValueError("its forward is random")
        return built


def _check_size(owner: Any, config: Any) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in owner(copy.deepcopy(config)).parameters())
    if count > _MOST:
        raise ValueError(f"too large: {count / 1e6:.0f} million parameters")


def _spread(model: nn.Module) -> None:
    """Weights that are all alike at birth (zeros, ones) are no test: make them differ."""
    for parameter in model.parameters():
        with torch.no_grad():
            if parameter.dim() >= 2 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.normal_(0, 0.02)


def leaves(out: Any) -> Iterator[Tensor]:
    """The tensors of an output, in order."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, Mapping):
        for value in out.values():
            yield from leaves(value)
    elif isinstance(out, list | tuple):
        for value in out:
            yield from leaves(value)


def floats(out: Any) -> Iterator[Tensor]:
    """The floating tensors of an output, in order."""
    return (t for t in leaves(out) if t.is_floating_point())


# -- inputs ---------------------------------------------------------------------------------------


def inputs(
    model: Any, seed: int, rows: int = 2, length: int = LENGTH, *, frames_first: bool = False
) -> dict[str, Tensor]:
    """A batch by the names of the arguments that the model's forward takes."""
    generator = torch.Generator().manual_seed(seed)
    names = list(inspect.signature(model.forward).parameters)
    main, batch = model.main_input_name, {}

    def ids(n: int) -> Tensor:
        return torch.randint(FIRST_WORD, VOCABULARY, (rows, n), generator=generator)

    if "input_ids" in names and main in ("input_ids", "pixel_values"):
        batch["input_ids"] = ids(length)
    if main == "pixel_values" or ("pixel_values" in names and "input_ids" not in names):
        config = getattr(model.config, "vision_config", model.config)
        size = getattr(config, "image_size", None) or 64
        size = tuple(size) if isinstance(size, list | tuple) else (size, size)
        channels = getattr(config, "num_channels", 3)
        batch["pixel_values"] = torch.randn(rows, channels, *size, generator=generator)
    waves = hasattr(model.config, "conv_stride") or not hasattr(model.config, "num_mel_bins")
    if main == "input_values" and waves:
        batch["input_values"] = torch.randn(rows, 1600, generator=generator)
    elif main in ("input_values", "input_features"):
        bins, frames = _spectrum(model.config)
        shape = (frames, bins) if frames_first else (bins, frames)
        batch[main] = torch.randn(rows, *shape, generator=generator)
    if "decoder_input_ids" in names and getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids(7)
    if not batch:
        raise ValueError(f"no inputs known for {names[:6]}")
    return batch


def _spectrum(config: Any) -> tuple[int, int]:
    """How many frequencies and frames a model of sound reads."""
    inner = getattr(config, "encoder_config", None) or config
    names = ("num_mel_bins", "input_feat_per_channel", "feature_size")
    bins = next((n for n in (getattr(inner, name, None) for name in names) if n), 80)
    return bins, getattr(config, "max_length", None) or 2 * getattr(
        config, "max_source_positions", 32
    )
