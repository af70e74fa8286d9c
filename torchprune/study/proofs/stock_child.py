"""A process that knows transformers alone: it loads a plain checkpoint and says what it computes.

Run as a script, with the directory of a job; it imports nothing of this package.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any


def main(job: Path) -> None:
    """Load, run, write outputs and a checksum of every tensor."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    asked = json.loads((job / "job.json").read_text("utf-8"))
    torch.set_num_threads(asked["threads"])
    kind: Any = getattr(transformers, asked["class"])
    model, found = kind.from_pretrained(
        asked["directory"], dtype="auto", local_files_only=True, output_loading_info=True
    )
    model.eval()
    inputs = load_file(job / "inputs.safetensors")
    values: list[Any] = []
    if inputs:
        with torch.no_grad():
            out = model(**inputs)
        values = [v for v in out.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    save_file({str(i): v.contiguous().clone() for i, v in enumerate(values)}, job / "outputs")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    told = {
        "sums": {name: checksum(tensor) for name, tensor in tensors},
        "missing": sorted(map(str, found["missing_keys"])),
        "unexpected": sorted(map(str, found["unexpected_keys"])),
        "torchprune": "torchprune" in sys.modules,
        "transformers": transformers.__version__,
    }
    (job / "told.json").write_text(json.dumps(told), "utf-8")


def checksum(tensor: Any) -> str:
    """CRC-32 of a tensor's bytes, row-major."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() == 0:
        return f"{0:08x}"
    return f"{zlib.crc32(flat.view(torch.uint8).numpy().tobytes()):08x}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
