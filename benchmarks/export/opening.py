"""What opening an ONNX file costs: dense, packed, unpacked all at once, and with our kernels.

    python benchmarks/export/opening.py [--model smollm2|layers] [--layers 40] [--rounds 3]
                               [--keep FOLDER]

The dense file and that of our kernels are written by `to_onnx`, or found in FOLDER, and the others
are packed from the first. Each is opened by ONNX Runtime in a process of its own, in turn; medians
of the rounds. The peak is the process's largest resident memory less what it had before; "kept" is
what it holds afterwards.
"smollm2" is SmolLM2-135M at 50 % (embeddings and head dense), "layers" so many products with
random 1232 x 1232 weights, half of them zero.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx_ir
import torch
from torch import Tensor, nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.export import to_onnx, unpacking_stages
from torchprune.export.onnx_model import library_of
from torchprune.export.packing_pass import pack_initializers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

OPEN = """
import json, sys, time, onnxruntime
def held(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1e6 for line in lines if line.startswith(key))
before = held("VmRSS")
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
if sys.argv[2]:
    options.register_custom_ops_library(sys.argv[2])
wall, processor = time.perf_counter(), time.process_time()
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
found = {
    "peak, GB": held("VmHWM") - before,
    "kept, GB": held("VmRSS") - before,
    "processor s": time.process_time() - processor,
    "s": time.perf_counter() - wall,
}
print(json.dumps(found))
"""


def model_and_example(name: str, layers: int) -> tuple[nn.Module, Tensor, bool]:
    """The model pruned, an example, and whether it has a cache."""
    if name == "layers":
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(*(nn.Linear(1232, 1232) for _ in range(layers)))
    else:
        import smollm2

        model = smollm2.load_model().float()
    torchprune.sparsify(model, MagnitudeSpec(), progress=False)
    if name == "layers":
        return model, torch.randn(2, 1232), False
    return model, torch.ones(2, 8, dtype=torch.int64), True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["smollm2", "layers"], default="smollm2")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="a folder for the files")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as other:
        home = asked.keep or Path(other)
        dense, kernels = home / f"{asked.model}.onnx", home / f"{asked.model}.kernels.onnx"
        if not (dense.exists() and kernels.exists()):
            home.mkdir(exist_ok=True)
            model, example, cache = model_and_example(asked.model, asked.layers)
            for path, weights in ((dense, "dense"), (kernels, "kernels")):
                to_onnx(model, path, example, weights=weights, with_cache=cache)
        paths = {"dense": dense, "kernels": kernels}
        for name, count in (("packed", unpacking_stages.STAGES), ("packed, at once", 1)):
            paths[name] = home / f"{asked.model}.{count}.onnx"
            pack(dense, paths[name], count)
        rounds = [{name: opened(path) for name, path in paths.items()} for _ in range(asked.rounds)]
        for name, path in paths.items():
            size = sum(file.stat().st_size for file in home.glob(f"{path.name}*")) / 1e6
            cells = {
                key: statistics.median(r[name][key] for r in rounds) for key in rounds[0][name]
            }
            told = ", ".join(f"{key} {value:.2f}" for key, value in cells.items())
            print(f"{name}: {size:.1f} MB, {told}")


def pack(dense: Path, packed: Path, stages: int) -> None:
    """Write a graph packed, to unpack in so many stages; its numbers beside it where they were."""
    graph = onnx_ir.load(dense)
    before, unpacking_stages.STAGES = unpacking_stages.STAGES, stages
    try:
        pack_initializers(graph, 0.25)
    finally:
        unpacking_stages.STAGES = before
    beside = Path(f"{dense}.data").exists()
    onnx_ir.save(graph, packed, external_data=f"{packed.name}.data" if beside else None)


def opened(path: Path) -> dict[str, float]:
    """What opening it took."""
    library = library_of(path)
    code = [sys.executable, "-c", OPEN, str(path), str(library) if library.exists() else ""]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
