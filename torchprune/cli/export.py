"""`torchprune export`: a pruned model for other runtimes."""

from __future__ import annotations

from contextlib import nullcontext
from enum import StrEnum
from importlib import import_module
from typing import Annotated, Any

from torchprune.cli.console import (
    Dtype,
    DtypeOption,
    ModelOption,
    NeededOutput,
    Speech,
    one_line,
    print_json,
    show,
    typer,
)
from torchprune.cli.loading import Loading
from torchprune.cli.noise import without_cpuinfo
from torchprune.cli.result_files import check_form
from torchprune.cli.saving import check_free_for_hf, with_memory


class Format(StrEnum):
    """What `torchprune export` writes."""

    onnx = "onnx"
    pt2 = "pt2"
    hf = "hf"
    openvino = "openvino"
    executorch = "executorch"


_SUFFIXES = {
    Format.onnx: ".onnx",
    Format.pt2: ".pt2",
    Format.openvino: ".xml",
    Format.executorch: ".pte",
}
"""Of the files; hf is a directory."""


def export(
    model: ModelOption,
    to: Annotated[
        Format,
        typer.Option(
            help="ONNX, torch's archive of an exported program, a plain transformers directory, "
            "OpenVINO, ExecuTorch."
        ),
    ],
    output: NeededOutput,
    packed: Annotated[
        bool,
        typer.Option(
            "--packed/--dense", help="onnx, pt2: weights as bits and nonzeros, or as they are."
        ),
    ] = True,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="With the key-value cache in and out.")
    ] = True,
    int8: Annotated[
        bool, typer.Option("--int8", help="onnx: quantize products, weights and activations.")
    ] = False,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help='With --int8: weights that stay float32, as "*.down_proj.*". May be repeated.',
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    speech: Speech = Speech(),
) -> None:
    """Write a pruned model for another runtime, masks folded, and compare it with torch.

    ONNX Runtime unpacks packed weights when it loads the file and runs at dense speed: sparsity
    makes the file smaller, not the runtime faster. A packed pt2 is smaller and faster, and needs
    torchprune where it runs. OpenVINO and ExecuTorch gain nothing from zeros. ExecuTorch plans its
    memory beforehand: its program takes 2 rows of 4 tokens, with the cache after 3 others, and no
    other sizes; bounds for others are given in Python. --output is a file (.onnx, .pt2, OpenVINO's
    .xml, ExecuTorch's .pte), and for hf a directory.

    [bold]Examples[/bold]

      torchprune export smol-2of4 --to onnx --dtype float32 --output smol.onnx

      torchprune export smol-2of4 --to pt2 --output smol.pt2

      torchprune export smol-2of4 --to hf --output smol-folded
    """
    with one_line(speech.debug):
        if (int8 or keep_float) and to is not Format.onnx:
            raise typer.BadParameter(f"--int8 and --keep-float are for --to onnx, not {to.value}")
        if keep_float and not int8:
            raise typer.BadParameter(
                "--keep-float says what --int8 leaves; add --int8, or leave it out",
                param_hint="--keep-float",
            )
        if to in _SUFFIXES:
            check_form(output, [_SUFFIXES[to]], f"what {to.value} reads")
        else:
            check_free_for_hf(output)

        # Usage is right: what follows needs torch, which takes seconds to import.
        loader = Loading(dtype, "cpu").loader(speech.bars)
        net = loader.model(model)
        writers = import_module("torchprune.export")
        if to is Format.hf:
            tokenizer = loader.tokenizer(model, required=False)
            writers.to_hf(net, output, tokenizer=with_memory(tokenizer, model))
            told, figures = f"wrote {output}", dict[str, Any](path=str(output))
        else:
            tokens = net.dummy_inputs["input_ids"][:2, :4] % net.config.vocab_size
            options: dict[str, Any] = {"with_cache": cache}
            if to in (Format.onnx, Format.pt2):
                options["weights"] = "packed" if packed else "dense"
            if int8:
                options |= {"int8": True, "int8_ignore": keep_float or ()}
            with without_cpuinfo() if to is Format.executorch else nullcontext():
                report = getattr(writers, f"to_{to.value}")(net, output, tokens, **options)
            told = str(report)
            figures = dict(vars(report))
        if speech.as_json:
            print_json(figures)
        elif not speech.quiet:
            show(told)
