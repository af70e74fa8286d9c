"""`torchprune export`: a pruned model for other runtimes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from enum import StrEnum
from importlib import import_module
from pathlib import Path
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
from torchprune.cli.noise import without_runtime_lines
from torchprune.cli.places import check_place
from torchprune.cli.result_files import check_form
from torchprune.cli.samples import Calibration
from torchprune.cli.saving import check_free_for_hf, with_memory
from torchprune.errors import InputError


class Format(StrEnum):
    """What `torchprune export` writes."""

    onnx = "onnx"
    pt2 = "pt2"
    hf = "hf"
    openvino = "openvino"
    executorch = "executorch"
    coreml = "coreml"
    litert = "litert"
    aoti = "aoti"


_TOKENS = 512
"""Most tokens of a Core ML program: in its state, or with no cache in a text."""

_SUFFIXES = {
    Format.onnx: ".onnx",
    Format.pt2: ".pt2",
    Format.openvino: ".xml",
    Format.executorch: ".pte",
    Format.coreml: ".mlpackage",
    Format.litert: ".tflite",
    Format.aoti: ".pt2",
}
"""Of the files; hf is a directory."""


def export(
    model: ModelOption,
    to: Annotated[
        Format,
        typer.Option(
            help="ONNX, torch's archive of an exported program, a plain transformers directory, "
            "OpenVINO, ExecuTorch, Core ML, LiteRT, AOTInductor's compiled package."
        ),
    ],
    output: NeededOutput,
    packed: Annotated[
        bool,
        typer.Option(
            "--packed/--dense",
            help="onnx, pt2, aoti, coreml, litert: weights as bits and nonzeros, or as they are.",
        ),
    ] = True,
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="onnx: packed weights are multiplied by our kernels, in a library of operators "
            "that is written beside the file, and not unpacked.",
        ),
    ] = False,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="With the key-value cache in and out.")
    ] = True,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="onnx, openvino: quantize products, weights and activations (openvino within the "
            "ranges that it sees on --data). coreml, and onnx with --kernels: round the nonzeros.",
        ),
    ] = False,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help='With --int8: weights that are not rounded, as "*.down_proj.*". May be repeated.',
            show_default=False,
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Also write the model with its zeros filled, run both in turns, and tell what "
            "zeros bring: bytes, milliseconds, and which kernels leave them out.",
        ),
    ] = False,
    calibration: Calibration = Calibration(samples=8, length=256),
    dtype: DtypeOption = Dtype.auto,
    speech: Speech = Speech(),
) -> None:
    """Write a pruned model for another runtime, masks folded, and compare it with torch.

    ONNX Runtime unpacks packed weights when it loads the file and runs at dense speed: sparsity
    makes the file smaller, not the runtime faster; with --kernels it is faster too, and takes no
    more memory than the file, where the library beside it is registered. A packed pt2 is smaller
    and faster, and needs torchprune where it runs. So is a packed aoti package, compiled code for
    processors like this one, which runs without Python too, with the library that is written beside
    it. OpenVINO gains from zeros with --int8 alone, on processors with AMX, and ExecuTorch nothing.
    It plans its memory beforehand: its program takes 2 rows of 4 tokens, with the cache after 3
    others, and no other sizes; bounds for others are given in Python. Core ML stores bits and
    nonzeros as it runs them: its program takes one token at a time, with the last 512 as state, or
    without a cache texts of up to 512 tokens. LiteRT stores nonzeros and their places; its program
    takes what ExecuTorch's does. --output is a file (.onnx, .pt2 for pt2 and aoti, OpenVINO's .xml,
    ExecuTorch's .pte, LiteRT's .tflite), and for hf and coreml (.mlpackage) a directory; so it is
    for an encoder-decoder's graphs of ONNX.

    [bold]Examples[/bold]

      torchprune export smol-2of4 --to onnx --output smol.onnx

      torchprune export smol-2of4 --to onnx --kernels --measure --output smol.onnx

      torchprune export smol-2of4 --to pt2 --measure --output smol.pt2

      torchprune export smol-2of4 --to openvino --int8 --data notes.txt --output smol.xml

      torchprune export smol-2of4 --to hf --output smol-folded
    """
    with one_line(speech.debug):
        if (int8 or keep_float) and to not in (Format.onnx, Format.openvino, Format.coreml):
            raise typer.BadParameter(
                f"--int8 and --keep-float are for --to onnx, openvino and coreml, not {to.value}"
            )
        if keep_float and not int8:
            raise typer.BadParameter(
                "--keep-float says what --int8 leaves; add --int8, or leave it out",
                param_hint="--keep-float",
            )
        if kernels and not (to is Format.onnx and packed):
            raise typer.BadParameter(
                "--kernels is for --to onnx, and not with --dense; pt2 and aoti use them anyway",
                param_hint="--kernels",
            )
        ranged = int8 and to is Format.openvino
        if calibration.data and not ranged:
            raise typer.BadParameter(
                "--data is what --to openvino --int8 reads ranges from", param_hint="--data"
            )
        if measure and to is Format.hf:
            raise typer.BadParameter(
                "--measure is for files that a runtime reads, and --to hf writes plain weights: "
                "`torchprune profile` measures a model in torch",
                param_hint="--measure",
            )
        if to is Format.onnx and cache and not output.suffix:  # several graphs, of some models
            check_place(output, directory=True)
        elif to in _SUFFIXES:
            package = to is Format.coreml
            check_form(output, [_SUFFIXES[to]], f"what {to.value} reads", directory=package)
        else:
            check_free_for_hf(output)

        # Usage is right: what follows needs torch, which takes seconds to import.
        loader = Loading(dtype, "cpu").loader(speech.bars)
        sources = calibration.sources(speech.bars)
        net = loader.model(model)
        writers = import_module("torchprune.export")
        if to is Format.onnx:
            _check_several(output, several=cache and _is_encoder_decoder(net))
        if to is Format.hf:
            tokenizer = loader.tokenizer(model, required=False)
            writers.to_hf(net, output, tokenizer=with_memory(tokenizer, model))
            told, figures = f"wrote {output}", dict[str, Any](path=str(output))
        else:
            tokens = _example(net, cache)
            options: dict[str, Any] = {"with_cache": cache}
            if to is Format.coreml:
                tokens, sizes = _for_coreml(net, tokens, cache)
                options |= sizes
            if to in (Format.onnx, Format.pt2, Format.aoti, Format.coreml, Format.litert):
                options["weights"] = "kernels" if kernels else "packed" if packed else "dense"
            if int8:
                options |= {"int8": True, "int8_ignore": keep_float or ()}
            if ranged and _is_text(tokens):
                tokenizer = loader.tokenizer(model, required=bool(sources))
                options["data"], _ = calibration.windows(
                    net, tokenizer, sources, say=speech.say, progress=speech.bars
                )
            write = getattr(writers, f"to_{to.value}")
            loud = to in (Format.executorch, Format.litert)
            with without_runtime_lines() if loud else nullcontext():
                report = write(net, output, tokens, **options)
                gains = _measured(write, net, report, tokens, options) if measure else None
            told = str(report) if gains is None else f"{report}\n{gains}"
            figures = asdict(report) | ({} if gains is None else {"measured": asdict(gains)})
        if speech.as_json:
            print_json(figures)
        elif not speech.quiet:
            show(told)


def _is_encoder_decoder(net: Any) -> bool:
    found: bool = import_module("torchprune.export.encoder_decoder").is_encoder_decoder(net)
    return found


def _check_several(output: Path, *, several: bool) -> None:
    """
    Raises:
        InputError: a file is named for several graphs, or a directory for one.
    """
    if several and output.suffix:
        raise InputError(
            f"{output}: an encoder-decoder with its cache is two graphs in a directory; name it "
            f"without {output.suffix}, or export with --no-cache"
        )
    if not several and not output.suffix:
        raise InputError(f"{output}: what onnx reads is saved as one of .onnx")


def _example(net: Any, cache: bool) -> Any:
    """What the model reads: a few tokens, or features as its class makes them up; and what a
    decoder reads beside its encoder, if both are in one graph."""
    given, few = net.dummy_inputs, slice(0, 4)
    name = "input_ids" if "input_ids" in given else net.main_input_name
    read = given[name][:2, few] % net.config.vocab_size if name == "input_ids" else given[name]
    if cache or not _is_encoder_decoder(net):
        return read
    written = given.get("decoder_input_ids", given.get("input_ids"))
    return {name: read, "decoder_input_ids": written[: len(read), few] % net.config.vocab_size}


def _is_text(example: Any) -> bool:
    """Whether a model reads tokens alone."""
    floating = getattr(example, "is_floating_point", None)
    return floating is not None and not floating()


def _measured(write: Any, net: Any, report: Any, tokens: Any, options: dict[str, Any]) -> Any:
    file_gains = import_module("torchprune.study.speed.file_gains").file_gains
    return file_gains(write, net, report, tokens, **options)


def _for_coreml(net: Any, tokens: Any, cache: bool) -> tuple[Any, dict[str, Any]]:
    """An example and the sizes of a program for one row of tokens, which Core ML wants bounded."""
    most = min(_TOKENS, getattr(net.config, "max_position_embeddings", None) or _TOKENS)
    if cache:
        return tokens[:1, :1], {"state": most - 1}
    from torch.export import Dim

    return tokens[:1], {"dynamic_shapes": ({1: Dim("length", max=most)},)}
