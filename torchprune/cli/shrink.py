"""`torchprune shrink`: whole heads, neurons, channels and blocks, chosen and physically removed."""

from __future__ import annotations

import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from torchprune.cli.console import (
    IgnoreOption,
    ModelOption,
    Speech,
    TargetOption,
    one_line,
    print_json,
    show,
    typer,
)
from torchprune.cli.loading import Loading
from torchprune.cli.samples import Calibration
from torchprune.cli.saving import Destination
from torchprune.cli.spec import ReconstructOption
from torchprune.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from torchprune.structure.shrink_plan import ShrinkPlan

_AMOUNTS = "What goes"


class UnitScore(StrEnum):
    """What a unit is worth."""

    flap = "flap"
    activation = "activation"
    l2 = "l2"
    taylor = "taylor"
    random = "random"


def _share(what: str) -> Any:
    return typer.Option(
        min=0.0,
        max=1.0,
        help=f"Remove this share of {what}, 0 <= x < 1.",
        show_default=False,
        rich_help_panel=_AMOUNTS,
    )


def _stays(what: str) -> Any:
    return typer.Option(
        min=0.0,
        max=1.0,
        help=f"Keep at most this share of all {what}, 0 < x < 1: which neurons, heads and blocks "
        "go is found out. Instead of the amounts above.",
        show_default=False,
        rich_help_panel=_AMOUNTS,
    )


def shrink(
    model: ModelOption,
    heads: Annotated[
        float | None, _share("each block's attention heads (with grouped queries, whole groups)")
    ] = None,
    neurons: Annotated[float | None, _share("each MLP's neurons")] = None,
    channels: Annotated[float | None, _share("each convolution's channels")] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Remove so many whole blocks, those that change their input least.",
            show_default=False,
            rich_help_panel=_AMOUNTS,
        ),
    ] = None,
    parameters: Annotated[float | None, _stays("parameters")] = None,
    flops: Annotated[float | None, _stays("floating point operations")] = None,
    score: Annotated[
        UnitScore,
        typer.Option(
            help="What a head, neuron or channel is worth: flap and activation by the inputs of "
            "what reads it, l2 by its weights, taylor by the loss.",
        ),
    ] = UnitScore.flap,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit/--no-refit",
            help="Fit the layers that read what goes to what stays, by least squares.",
        ),
    ] = True,
    reconstruct: ReconstructOption = False,
    calibration: Calibration = Calibration(),
    target: TargetOption = None,
    ignore: IgnoreOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, and remove and write nothing.")
    ] = False,
    destination: Destination = Destination(),
    loading: Loading = Loading(),
    speech: Speech = Speech(),
) -> None:
    """Remove whole units, so that a plain, smaller model is left. The plan is printed first.

    Without amounts, what the masks of a saved directory already silence is removed. What is left
    computes what the masked model did, or nothing is written. Without --output and --hf the
    directory is a new one, named after the model and the amounts.

    [bold]Examples[/bold]

      torchprune shrink HuggingFaceTB/SmolLM2-135M --neurons 0.2 --dry-run

      torchprune shrink HuggingFaceTB/SmolLM2-135M --neurons 0.2 --heads 0.34 --data notes.txt

      torchprune shrink ./model --layers 4 --hf ./shallow

      torchprune shrink ./model --parameters 0.8 --data notes.txt

      torchprune shrink ./masked --output ./small
    """
    with one_line(speech.debug):
        say, bars = speech.say, speech.bars
        amounts = {"heads": heads, "neurons": neurons, "channels": channels, "layers": layers}
        budget = {"parameters": parameters, "flops": flops}
        asked = {name: amount for name, amount in amounts.items() if amount}
        stays = {name: share for name, share in budget.items() if share is not None}
        if len(stays) > 1 or (stays and asked):
            several = " and ".join(f"--{name}" for name in (*stays, *asked))
            raise typer.BadParameter(f"one budget decides what goes, got {several}")
        if dry_run and destination.named:
            raise typer.BadParameter(
                "--dry-run writes nothing; leave --output and --hf out", param_hint="--dry-run"
            )

        # Usage is right: what follows needs torch, which takes seconds to import.
        from torchprune.structure.plan import plan_shrink
        from torchprune.structure.shrink import shrink as remove

        for name, amount in asked.items():
            _unit_spec(name, amount, {})  # refused here, if it is
        if stays:
            _budget_spec(stays, {}, {})
        loader = loading.loader(bars)
        if not dry_run:
            words = [f"{name}-{amount}" for name, amount in (asked | stays).items()]
            destination = destination.or_new([Path(model).resolve().name, *(words or ["shrunk"])])
            destination.check_free()
        sources = calibration.sources(bars)
        say(f"loading {model}")
        net = loader.model(model)
        tokenizer = loader.tokenizer(model, required=bool(sources))
        if asked or stays or sources:
            batches, _ = calibration.windows(net, tokenizer, sources, say=say, progress=bars)
        else:
            batches = [net.dummy_inputs["input_ids"] % net.config.get_text_config().vocab_size]
        if not batches:
            raise InputError(f"{model} writes no text itself; give some with --data")
        options = {
            "score": score.value,
            "refit": refit,
            "reconstruct": reconstruct,
            "seed": calibration.seed,
        }
        choice = {"targets": target or None, "ignore": tuple(ignore or ())}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=__name__)  # sparsify's own are in the report
            if stays:
                _mask_to_budget(net, _budget_spec(stays, options, choice), batches, bars, say)
            _mask_units(net, asked, options, choice, batches, bars)
        plan = plan_shrink(net, batches[0])
        if not speech.as_json:
            show(str(plan))
        saved: dict[str, str] = {}
        if not dry_run:
            if not plan:
                raise InputError(
                    "nothing to remove: no unit is all zero; give --heads, --neurons, --channels, "
                    "--layers, --parameters or --flops. In the way stood "
                    f"{'; '.join(plan.in_the_way)}"
                )
            remove(net, plan)
            saved = destination.save(net, tokenizer, model, say)
        if speech.as_json:
            print_json({**_told(plan), **saved, "dry_run": dry_run})


def _mask_units(
    net: Any,
    asked: dict[str, float],
    options: dict[str, Any],
    choice: dict[str, Any],
    batches: Sequence[Tensor],
    progress: bool,
) -> None:
    """Mask what is asked for, blocks first; what lies in those is left alone by the others."""
    from torchprune.sparsify import sparsify
    from torchprune.structure.plan import plan_shrink

    for name in sorted(asked, key=lambda name: name != "layers"):
        given = choice if name == "layers" else {**options, **choice}
        sparsify(net, _unit_spec(name, asked[name], given), batches, progress=progress)
        if name == "layers":
            gone = plan_shrink(net, batches[0]).blocks
            choice = {**choice, "ignore": (*choice["ignore"], *gone)}


def _mask_to_budget(
    net: Any, spec: Any, batches: Sequence[Tensor], progress: bool, say: Callable[[str], None]
) -> None:
    """Mask what a budget decides on, and say how."""
    from torchprune.reports.report import runs_of
    from torchprune.sparsify import sparsify

    sparsify(net, spec, batches, progress=progress)
    for note in runs_of(net)[-1].notes:
        say(note)


def _budget_spec(stays: dict[str, Any], options: dict[str, Any], choice: dict[str, Any]) -> Any:
    from torchprune.structure.budget_spec import BudgetSpec
    from torchprune.structure.specs import HeadSpec, LayerSpec, NeuronSpec

    units = [kind(**options, **choice) for kind in (NeuronSpec, HeadSpec)]
    return BudgetSpec(**stays, over=(*units, LayerSpec(**choice)))


def _unit_spec(name: str, amount: float, options: dict[str, Any]) -> Any:
    from torchprune.cli.spec_texts import made

    return made(name, {"drop" if name == "layers" else "sparsity": amount, **options})


def _told(plan: ShrinkPlan) -> dict[str, Any]:
    """The plan as JSON has it."""
    return {
        "removals": [
            {"name": r.group.name, "kind": r.group.kind, "before": r.before, "after": r.after}
            for r in plan.removals
        ],
        "blocks": list(plan.blocks),
        "parameters": dict(zip(("before", "after"), plan.parameters, strict=True)),
        "flops": dict(zip(("before", "after"), plan.flops, strict=True)),
        "notes": list(plan.notes),
    }
