"""The forms in which a model can run: each a way to get from a model to something to call."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchprune.calibration.batches import Batch
from torchprune.calibration.nested import tensors_in
from torchprune.errors import MissingExtraError, TorchpruneError, did_you_mean
from torchprune.lowering.lower import lift, lower
from torchprune.masking.mask import fold, masked_layers
from torchprune.study.speed.layer_work import held_bytes, read_bytes
from torchprune.study.speed.profile_records import ProfileError
from torchprune.study.speed.turns import reason_of


class NotHereError(Exception):
    """A form that this model, device or installation does not have; the message says why."""


@dataclass(frozen=True)
class Ready:
    """A model in one form.

    Attributes:
        bind: a batch -> a function that computes it.
        held: bytes of weights in this form, and of masks where it carries them.
        read: those that a call reads whole, which leaves out tables of embeddings.
        module: what hooks can watch layer by layer, or None.
        note: what else is to be said.
    """

    bind: Callable[[Batch], Callable[[], object]]
    held: int
    read: int | None
    module: nn.Module | None = None
    note: str = ""


@dataclass(frozen=True)
class Form:
    """A way to run a model.

    Attributes:
        what: in words.
        skips_zeros: whether its products leave zeros out; else they cost what any number costs.
        make: a model (its own copy, in eval mode) and an example -> the model in this form.
    """

    name: str
    what: str
    skips_zeros: bool
    make: Callable[[nn.Module, Batch], Ready]


def copied(model: nn.Module) -> nn.Module:
    """A copy that shares nothing, in eval mode and without key-value caches.

    Raises:
        ProfileError: the model cannot be copied.
    """
    try:
        made = copy.deepcopy(model).eval()
    except Exception as error:
        raise ProfileError(
            f"this {type(model).__name__} cannot be copied ({reason_of(error)}), and what is given "
            "is not changed; profile a model without such tensors or handles on it"
        ) from error
    for module in made.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", None) is True:
            config.use_cache = False
    return made


def made_ready(form: Form, model: nn.Module, example: Batch) -> Ready | str:
    """A model in a form, made from a copy of it; or why there is none."""
    given = copied(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other libraries' making
            return form.make(given, example)
    except (NotHereError, TorchpruneError) as error:
        return " ".join(str(error).split())
    except Exception as error:
        return reason_of(error)


def in_torch(model: nn.Module, run: Callable[..., object] | None = None, note: str = "") -> Ready:
    """A module, called as it is or by `run`."""
    call = model if run is None else run

    def bind(batch: Batch) -> Callable[[], object]:
        def once() -> object:
            with torch.no_grad():
                return batch.run(call)

        return once

    module = model if run is None else None
    return Ready(bind, held_bytes(model), read_bytes(model), module, note)


# -- one by one ------------------------------------------------------------------------------------


def _masked(model: nn.Module, _: Batch) -> Ready:
    if not any(True for _ in masked_layers(model)):
        raise NotHereError("it carries no masks")
    return in_torch(model)


def _eager(model: nn.Module, _: Batch) -> Ready:
    return in_torch(plain(model))


def _compiled(model: nn.Module, _: Batch) -> Ready:
    folded = plain(model)
    return in_torch(folded, torch.compile(folded, dynamic=True))


def _bitmask(dtype: torch.dtype | None) -> Callable[[nn.Module, Batch], Ready]:
    def make(model: nn.Module, _: Batch) -> Ready:
        return in_torch(lower(lift(model), "bitmask", dtype=dtype))

    return make


def _semi_structured(model: nn.Module, _: Batch) -> Ready:
    device = device_of(model)
    if device.type != "cuda":
        raise NotHereError(f"2:4 products are of CUDA devices, and the model is on {device}")
    return in_torch(lower(lift(model), "semi_structured"))


def _torchao(config: str) -> Callable[[nn.Module, Batch], Ready]:
    def make(model: nn.Module, _: Batch) -> Ready:
        try:
            quantization: Any = import_module("torchao.quantization")
        except ImportError:
            raise MissingExtraError("torchao", "quant", "the int8 form") from None
        folded = plain(model)
        quantization.quantize_(folded, getattr(quantization, config)())
        return in_torch(folded)

    return make


def _onnx(model: nn.Module, example: Batch) -> Ready:
    _need("onnxruntime", "onnx", "the onnx form")
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        report, note = _written("to_onnx", model, Path(folder) / "m.onnx", example, weights="dense")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        # Threads that spin while they wait would slow the others.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(
            str(report.path), options, providers=["CPUExecutionProvider"]
        )
    names = [given.name for given in session.get_inputs()]

    def bind(batch: Batch) -> Callable[[], object]:
        given = dict(zip(names, _arrays(batch), strict=True))
        return lambda: session.run(None, given)

    return Ready(bind, report.bytes, None, note=note)


def _openvino(model: nn.Module, example: Batch) -> Ready:
    _need("openvino", "openvino", "the openvino form")
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        report, note = _written("to_openvino", model, Path(folder) / "m.xml", example)
        hints = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = openvino.Core().compile_model(str(report.path), "CPU", hints)

    def bind(batch: Batch) -> Callable[[], object]:
        given = _arrays(batch)
        return lambda: compiled(given)

    return Ready(bind, report.bytes, None, note=note)


FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form("masked", "the model as it is, masks on", False, _masked),
        Form("eager", "masks folded into plain modules", False, _eager),
        Form("compile", "folded, by torch.compile", False, _compiled),
        Form("bitmask", 'lower(model, "bitmask")', True, _bitmask(None)),
        Form(
            "bitmask_int8", 'lower(model, "bitmask", dtype=torch.int8)', True, _bitmask(torch.int8)
        ),
        Form("int8", "torchao, weights in int8", False, _torchao("Int8WeightOnlyConfig")),
        Form(
            "int8_dynamic",
            "torchao, weights and activations in int8",
            False,
            _torchao("Int8DynamicActivationInt8WeightConfig"),
        ),
        Form("semi_structured", 'lower(model, "semi_structured")', True, _semi_structured),
        Form("onnx", "ONNX Runtime, folded", False, _onnx),
        Form("openvino", "OpenVINO, folded", False, _openvino),
    )
}
"""By name, in the order in which they are shown."""


def chosen_forms(names: Sequence[str] | str | None) -> list[Form]:
    """The forms asked for, in the order of `FORMS`; None is all of them.

    Raises:
        ProfileError: an unknown name, or none.
    """
    if names is None:
        return list(FORMS.values())
    some = [names] if isinstance(names, str) else list(names)
    for name in some:
        if name not in FORMS:
            raise ProfileError(
                f"there is no form {name!r}{did_you_mean(str(name), FORMS)}; there are "
                + ", ".join(map(repr, FORMS))
            )
    if not some:
        raise ProfileError("forms is empty; there are " + ", ".join(map(repr, FORMS)))
    return [form for name, form in FORMS.items() if name in some]


def plain(model: nn.Module) -> nn.Module:
    """A model of one's own, without masks and packed weights."""
    return fold(lift(model))


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is; the CPU if it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _written(
    writer: str, model: nn.Module, path: Path, example: Batch, **options: Any
) -> tuple[Any, str]:
    """A file for another runtime, from the room below that is imported when it is needed."""
    if device_of(model).type != "cpu":
        raise NotHereError(
            f"these runtimes are measured on the CPU, the model is on {device_of(model)}"
        )
    folded, note = plain(model), ""
    kinds = {p.dtype for p in folded.parameters() if p.is_floating_point()}
    if kinds != {torch.float32}:
        folded, note = folded.float(), "in float32"
        example = Batch(*(_in_float(part) for part in (example.args, example.kwargs)))
    given: Any = example.kwargs if example.kwargs else example.args
    if example.args and example.kwargs:
        raise NotHereError("the export takes positional inputs or keywords, and these are both")
    given = {k: v for k, v in given.items() if v is not None} if example.kwargs else given
    exporting = import_module("torchprune.export")
    return getattr(exporting, writer)(folded, path, given, **options), note


def _in_float(value: Any) -> Any:
    from torchprune.calibration.nested import mapped

    return mapped(value, lambda _, t: t.float() if t.is_floating_point() else t)


def _arrays(batch: Batch) -> list[Any]:
    tensors = [tensor for _, tensor in tensors_in((batch.args, batch.kwargs))]
    return [_in_float(tensor).detach().cpu().numpy() for tensor in tensors]


def _need(package: str, extra: str, purpose: str) -> None:
    try:
        import_module(package)
    except ImportError:
        raise MissingExtraError(package, extra, purpose) from None
