"""Export: what other programs read. `import torchprune` never imports this package."""

from torchprune.export.hf import to_hf
from torchprune.export.onnx_model import to_onnx
from torchprune.export.written import ExportReport

__all__ = ["ExportReport", "to_hf", "to_onnx"]
