"""Convolutional networks of the shapes that coupling is hard in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Module:
    pad = kernel // 2
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, pad, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Inverted(nn.Module):
    """MobileNetV2's block: expand, depthwise, project, add."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = 4 * inputs
        self.same = stride == 1 and inputs == outputs
        self.expand, self.depth = conv_bn(inputs, inner, 1), conv_bn(inner, inner, 3, stride, inner)
        self.project = conv_bn(inner, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(F.relu6(self.depth(F.relu6(self.expand(x)))))
        return x + y if self.same else y


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, 3, 2)
        self.blocks = nn.Sequential(Inverted(8, 8, 1), Inverted(8, 12, 2), Inverted(12, 12, 1))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(F.relu6(self.stem(x)))
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


class DenseNet(nn.Module):
    """Every layer reads all earlier ones, laid end to end; norms before convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        widths = [8, 14, 20]
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths)
        self.convs = nn.ModuleList(nn.Conv2d(w, 6, 3, padding=1) for w in widths)
        self.squeeze = nn.Conv2d(26, 10, 1)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], dim=1)
        return self.head(F.relu(self.squeeze(x)).mean((2, 3)))


class UNet(nn.Module):
    """Skips by concatenation, pooling, transposed convolution, resampling, group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.norm = nn.GroupNorm(4, 12)
        self.three = nn.Conv2d(12, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.four = nn.Conv2d(24, 8, 3, padding=1)
        self.five = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.one(x))
        two = F.relu(self.norm(self.two(F.max_pool2d(one, 2))))
        three = F.relu(self.three(F.max_pool2d(two, 2)))
        four = F.relu(self.four(torch.cat([self.up(three), two], 1)))
        wide = F.interpolate(four, scale_factor=2.0, mode="nearest")
        return self.five(torch.cat([wide, one], 1))


class Grouped(nn.Module):
    """ResNeXt's block, squeeze-and-excitation, and features flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, 3, 2)
        self.reduce, self.group = conv_bn(8, 16, 1), conv_bn(16, 16, 3, 1, 4)
        self.expand = conv_bn(16, 8, 1)
        self.squeeze, self.excite = nn.Linear(8, 6), nn.Linear(6, 8)
        self.head = nn.Sequential(nn.Linear(8 * 4 * 4, 20), nn.PReLU(20), nn.Linear(20, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.expand(F.relu(self.group(F.relu(self.reduce(x)))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3))))))
        x = F.relu(x + y * gate[:, :, None, None])
        return self.head(F.adaptive_avg_pool2d(x, 4).flatten(1))


def image_batches(seed: int = 1, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 16, 16, generator=generator) for _ in range(count)]


def awake(model: nn.Module) -> nn.Module:
    """In evaluation mode, with norms' statistics that are not their neutral ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


CNNS = {"mobilenet": MobileNet, "densenet": DenseNet, "unet": UNet, "grouped": Grouped}
