"""Ship a pruned net as ONNX with packed weights, and as an archive of torch.export.

    python examples/export_onnx.py    # seconds

Needs pip install 'torchprune[onnx]'. A language model with its cache: onnx_generate.py.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import nn

import torchprune
from torchprune import WandaSpec
from torchprune.export import load_pt2, to_onnx, to_pt2


def main(arguments: list[str] | None = None) -> None:
    """Prune, write both, and run them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="a directory to keep the files in")
    parser.add_argument("--tiny", action="store_true", help="a narrower net")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    wide = 256 if options.tiny else 2048
    net = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, wide)).eval()
    data = [torch.randn(32, wide) for _ in range(4)]
    torchprune.sparsify(net, WandaSpec(), data, progress=False)
    x = data[0][:2]
    with torch.no_grad():
        expected = net(x)

    with tempfile.TemporaryDirectory() as scratch:
        home = options.output or Path(scratch)
        home.mkdir(parents=True, exist_ok=True)
        for weights in ("dense", "packed"):  # each is compared with torch before it appears
            report = to_onnx(net, home / f"{weights}.onnx", x, weights=weights)
            print(f"{weights}: {report.path.stat().st_size / 1e6:.2f} MB")
        session = onnxruntime.InferenceSession(
            home / "packed.onnx", providers=["CPUExecutionProvider"]
        )
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)
        print(to_pt2(net, home / "net.pt2", x))
        with torch.no_grad():
            again = load_pt2(home / "net.pt2").module()(x)
        torch.testing.assert_close(again, expected, rtol=1e-3, atol=1e-4)
    print("both give the pruned net's outputs")


if __name__ == "__main__":
    main()
