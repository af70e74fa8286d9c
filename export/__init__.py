"""Export: what other programs read. `import torchprune` never imports this package."""

from torchprune.export.hf import to_hf

__all__ = ["to_hf"]
