"""The nets of `structure_zoo.py`, with random weights: timm's, torchvision's, transformers', plain.

Each is a function that gives (model in evaluation mode, the arguments of its forward). What is
wide in a transformers model is its MLP, so there it is neurons that go, elsewhere channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Net = tuple[nn.Module, tuple[Any, ...]]

IMAGE = 64
"""Pixels a side, where a net takes any."""

# -- plain modules ---------------------------------------------------------------------------------


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    """With its norm and activation."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """Down twice and up again through transposed convolutions, joined by `cat`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 32), conv(32, 64), conv(64, 128)
        self.up1 = nn.ConvTranspose2d(128, 64, 2, 2)
        self.up2 = nn.ConvTranspose2d(64, 32, 2, 2)
        self.d, self.e = conv(128, 64), conv(64, 32)
        self.out = nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        c = self.c(F.max_pool2d(b, 2))
        d = self.d(torch.cat([self.up1(c), b], 1))
        return self.out(self.e(torch.cat([self.up2(d), a], 1)))


class SplitAttention(nn.Module):
    """Two halves weighed by a gate over them, and summed."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem, self.both = conv(3, width), conv(width, 2 * width)
        self.gate = nn.Conv2d(width, 2 * width, 1)
        self.out = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(self.stem(x))
        n, c, h, w = both.shape
        halves = both.view(n, 2, c // 2, h, w)
        gate = self.gate(halves.sum(1).mean((2, 3), keepdim=True)).view(n, 2, c // 2, 1, 1)
        return self.out((halves * gate.softmax(1)).sum(1).mean((2, 3)))


class Shuffled(nn.Module):
    """A grouped and a shuffled branch, concatenated."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem, self.left = conv(3, width), conv(width, width, groups=4)
        self.right, self.out = conv(width, width, 1), nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([F.channel_shuffle(self.left(x), 4), self.right(x)], 1)
        return self.out(x.mean((2, 3)))


class Recurrent(nn.Module):
    """A linear layer before an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.core = nn.Linear(16, 64), nn.LSTM(64, 64, batch_first=True)
        self.out = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.core(self.inside(x).relu())[0])


def of(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def generator() -> nn.Module:
    """Of images from noise, as DCGAN's."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((64, 128), (128, 64), (64, 32)):
        layers += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return of(*layers, nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh())


def temporal() -> nn.Module:
    """Dilated convolutions over time."""
    layers: list[nn.Module] = []
    for inputs, outputs, step in ((8, 64, 1), (64, 64, 2), (64, 64, 4)):
        layers += [nn.Conv1d(inputs, outputs, 3, padding=step, dilation=step), nn.GELU()]
    return of(*layers, nn.Conv1d(64, 5, 1))


def mixer() -> nn.Module:
    """Perceptrons over places and over channels."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = of(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
            self.channels = of(nn.Linear(48, 192), nn.GELU(), nn.Linear(192, 48))
            self.one, self.two = nn.LayerNorm(48), nn.LayerNorm(48)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.places(self.one(x).transpose(1, 2)).transpose(1, 2)
            return x + self.channels(self.two(x))

    return of(Layer(), Layer(), nn.LayerNorm(48), nn.Linear(48, 10))


def plain(make: Callable[[], nn.Module], *shape: int) -> Net:
    return make().eval(), (torch.randn(shape),)


# -- libraries -------------------------------------------------------------------------------------


def from_timm(name: str, size: int = IMAGE, **options: Any) -> Net:
    import timm

    return timm.create_model(name, **options).eval(), (torch.randn(2, 3, size, size),)


def from_torchvision(name: str, size: int = IMAGE) -> Net:
    import torchvision

    return torchvision.models.get_model(name, weights=None).eval(), (torch.randn(2, 3, size, size),)


def text(config: str, kind: str, **fields: Any) -> Net:
    """A transformers model of this configuration class, of 2 layers and width 64.

    A field that is None is left to the class.
    """
    import transformers

    usual = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "use_cache": False,
        "pad_token_id": 0,
    }
    given = {name: value for name, value in {**usual, **fields}.items() if value is not None}
    made = getattr(transformers, config)(**given)
    model = getattr(transformers, kind)._from_config(made) if kind.startswith("Auto") else None
    model = model or getattr(transformers, kind)(made)
    return model.eval(), (torch.randint(1, 128, (2, 12)),)


def pixels(config: str, kind: str, size: int = 32, **fields: Any) -> Net:
    """A transformers model of images."""
    import transformers

    model = getattr(transformers, kind)(getattr(transformers, config)(**fields))
    return model.eval(), (torch.randn(2, 3, size, size),)


VIT = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}

CHANNELS: dict[str, Callable[[], Net]] = {
    "UNet": partial(plain, UNet, 2, 3, 32, 32),
    "split attention": partial(plain, SplitAttention, 2, 3, 32, 32),
    "channel shuffle": partial(plain, Shuffled, 2, 3, 32, 32),
    "DCGAN generator": partial(plain, generator, 2, 64, 2, 2),
    "temporal CNN": partial(plain, temporal, 2, 8, 40),
    **{
        f"torchvision {name}": partial(from_torchvision, name)
        for name in (
            "resnet18",
            "resnext50_32x4d",
            "vgg11_bn",
            "densenet121",
            "mobilenet_v2",
            "mobilenet_v3_small",
            "shufflenet_v2_x0_5",
            "squeezenet1_1",
            "mnasnet0_5",
            "efficientnet_b0",
            "regnet_y_400mf",
            "googlenet",
            "convnext_tiny",
        )
    },
    "torchvision inception_v3": partial(from_torchvision, "inception_v3", 299),
    **{
        f"timm {name}": partial(from_timm, name)
        for name in (
            "resnet10t",
            "resnest14d",
            "seresnet18",
            "ghostnet_050",
            "repvgg_a0",
            "hardcorenas_a",
            "dla34",
            "selecsls42",
            "cspresnet50",
            "res2net50_26w_4s",
            "hrnet_w18_small",
            "mobileone_s0",
            "tinynet_e",
            "lcnet_050",
            "edgenext_xx_small",
        )
    },
}
"""Half the channels of every convolution go, and half the neurons of their classifiers."""

NEURONS: dict[str, Callable[[], Net]] = {
    "MLP-Mixer": partial(plain, mixer, 2, 16, 48),
    "LSTM and MLP": partial(plain, Recurrent, 2, 9, 16),
    "Llama GQA": partial(text, "LlamaConfig", "LlamaForCausalLM"),
    "Qwen3": partial(text, "Qwen3Config", "Qwen3ForCausalLM"),
    "Gemma 2": partial(text, "Gemma2Config", "Gemma2ForCausalLM"),
    "Phi-3": partial(text, "Phi3Config", "Phi3ForCausalLM"),
    "OLMo 2": partial(text, "Olmo2Config", "Olmo2ForCausalLM"),
    "Mixtral": partial(text, "MixtralConfig", "MixtralForCausalLM"),
    "GPT-2": partial(text, "GPT2Config", "GPT2LMHeadModel", n_embd=64, n_layer=2, n_head=4),
    "GPT-NeoX": partial(text, "GPTNeoXConfig", "GPTNeoXForCausalLM"),
    "OPT": partial(text, "OPTConfig", "OPTForCausalLM", ffn_dim=160, word_embed_proj_dim=64),
    "BLOOM": partial(text, "BloomConfig", "BloomForCausalLM", n_layer=2, n_head=4),
    "Falcon": partial(text, "FalconConfig", "FalconForCausalLM", head_dim=None),
    "BERT": partial(text, "BertConfig", "BertForMaskedLM"),
    "RoBERTa": partial(text, "RobertaConfig", "RobertaForMaskedLM"),
    "ModernBERT": partial(text, "ModernBertConfig", "ModernBertForMaskedLM"),
    "ELECTRA": partial(text, "ElectraConfig", "ElectraForMaskedLM", embedding_size=64),
    "ViT": partial(pixels, "ViTConfig", "ViTForImageClassification", **VIT),
    "BEiT": partial(pixels, "BeitConfig", "BeitForImageClassification", **VIT),
    "DINOv2": partial(pixels, "Dinov2Config", "Dinov2ForImageClassification", **VIT),
}
"""Half the neurons of every MLP go."""
