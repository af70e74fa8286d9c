"""Export: what other programs read. `import torchprune` never imports this package."""

from torchprune.export.aoti import to_aoti
from torchprune.export.coreml_model import to_coreml
from torchprune.export.executorch_program import to_executorch
from torchprune.export.hf import to_hf
from torchprune.export.litert_model import to_litert
from torchprune.export.onnx_model import to_onnx
from torchprune.export.openvino_model import to_openvino
from torchprune.export.pt2 import load_pt2, to_pt2
from torchprune.export.written import ExportReport

__all__ = [
    "ExportReport",
    "load_pt2",
    "to_aoti",
    "to_coreml",
    "to_executorch",
    "to_hf",
    "to_litert",
    "to_onnx",
    "to_openvino",
    "to_pt2",
]
