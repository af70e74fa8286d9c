"""`torchprune build-kernels`: the CPU kernels compiled ahead, for images without a compiler."""

from __future__ import annotations

import platform
from typing import Annotated

from torchprune.cli.console import OutputOption, Speech, one_line, print_json, typer
from torchprune.errors import InputError


def build_kernels(
    output: OutputOption = None,
    machine: Annotated[
        str,
        typer.Option(
            "--machine",
            help="The kind of machine they are for, as `uname -m` says; for another than this one "
            "CXX names a compiler that makes code for it.",
        ),
    ] = platform.machine(),
    onnxruntime: Annotated[
        bool,
        typer.Option(
            "--onnxruntime",
            help="Those that `torchprune export --to onnx --kernels` writes beside its files.",
        ),
    ] = False,
    speech: Speech = Speech(),
) -> None:
    """Compile the CPU kernels now, for where there is no compiler.

    They go into the user's cache, or into the directory that --output names; where that is another,
    TORCHPRUNE_KERNELS names it to torchprune. One file serves every processor of a machine's kind
    (each takes the fastest form it knows) and every torch from 2.10 on.

    [bold]Examples[/bold]

      torchprune build-kernels

      torchprune build-kernels --output /opt/kernels

      torchprune build-kernels --onnxruntime --output /opt/kernels
    """
    with one_line(speech.debug):
        from torchprune.lowering.kernels.build import BuildError, library, onnx_library

        try:
            path = (onnx_library if onnxruntime else library)(output, machine)
        except BuildError as error:
            raise InputError(str(error)) from error
        told = {"path": str(path), "bytes": path.stat().st_size, "machine": machine}
        if speech.as_json:
            print_json(told)
        elif not speech.quiet:
            typer.echo(f"{path}: {told['bytes']:,} bytes, for {machine}")
