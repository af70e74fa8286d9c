"""Export: what other programs read. `import torchprune` never imports this package."""

from torchprune.export.hf import to_hf
from torchprune.export.onnx_model import OnnxReport, to_onnx

__all__ = ["OnnxReport", "to_hf", "to_onnx"]
