"""Our operators in ONNX Runtime against float64, in every form of the kernels that runs here."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchprune.lowering.bitmask import Bitmask
from torchprune.lowering.kernels.build import onnx_library

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

FORMS = ["AVX-512 BF16", "AVX-512", "AVX2", "portable"]
KINDS = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}
VALUES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]
PARTS = ("bits", "values", "starts", "scales", "bias")


@cache
def kernels() -> ctypes.CDLL:
    found = ctypes.CDLL(str(onnx_library()))
    found.torchprune_form.restype = ctypes.c_char_p
    return found


@pytest.fixture(autouse=True)
def best_form_afterwards() -> Iterator[None]:
    best = kernels().torchprune_form()
    yield
    kernels().torchprune_use_form(best)


def use(form: str) -> None:
    if not kernels().torchprune_use_form(form.encode()):
        pytest.skip(f"{form} does not run on this processor")


def constant(name: str, tensor: Tensor) -> Any:
    if tensor.dtype is not torch.bfloat16:
        return numpy_helper.from_array(tensor.numpy(), name)
    found = TensorProto(name=name, data_type=TensorProto.BFLOAT16, dims=tensor.shape)
    found.raw_data = tensor.view(torch.int16).numpy().tobytes()
    return found


def session(
    parts: dict[str, Tensor | None],
    kind: Any,
    cols: int,
    threads: int = 1,
    operator: str = "BitmaskLinear",
) -> Any:
    """One product, or with another operator the matrix in float32."""
    held = {name: tensor for name, tensor in parts.items() if tensor is not None}
    names = [name if name in held else "" for name in PARTS]
    product = operator == "BitmaskLinear"
    inputs, output = (["x", *names], "y") if product else (names[:3], "w")
    options = {"domain": "torchprune", "cols": cols}
    nodes = [helper.make_node(operator, inputs, [output], **options)]
    if not product:  # NumPy has no bfloat16
        nodes.append(helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT))
    ends = [helper.make_tensor_value_info("y", kind or TensorProto.FLOAT, None)]
    given_ = [helper.make_tensor_value_info("x", kind, None)] if product else []
    used = held if product else {name: held[name] for name in names[:3]}
    constants = [constant(name, tensor) for name, tensor in used.items()]
    graph = helper.make_graph(nodes, "product", given_, ends, constants)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("torchprune", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    settings_ = ort.SessionOptions()
    settings_.log_severity_level = 4
    settings_.intra_op_num_threads = threads
    settings_.register_custom_ops_library(str(onnx_library()))
    return ort.InferenceSession(model.SerializeToString(), settings_)


def parts_of(packed: Bitmask, bias: Tensor | None = None) -> dict[str, Tensor | None]:
    return {
        "bits": packed.bits,
        "values": packed.values,
        "starts": packed.starts,
        "scales": packed.scales,
        "bias": bias,
    }


def drawn(rows: int, cols: int, share: float, kind: torch.dtype) -> tuple[Bitmask, Tensor]:
    """A packed matrix, and the same in float64."""
    weight = torch.where(torch.rand(rows, cols) < share, 0.0, torch.randn(rows, cols))
    if kind is not torch.int8:
        return Bitmask.pack(weight.to(kind)), weight.to(kind).double()
    codes, scales = (30 * weight).round().clamp(-127, 127).to(kind), torch.rand(rows) + 0.1
    return Bitmask.pack(codes, scales), codes.double() * scales.double()[:, None]


@settings(deadline=None, max_examples=80, suppress_health_check=list(HealthCheck))
@given(
    form=st.sampled_from(FORMS),
    wide=st.sampled_from(list(KINDS)),
    kind=st.sampled_from(VALUES),
    rows=st.integers(1, 70),
    cols=st.integers(1, 200),
    shape=st.lists(st.sampled_from([0, 1, 2, 3, 9, 70]), max_size=2),
    share=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    biased=st.booleans(),
    threads=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_products_equal_float64(
    form: str,
    wide: torch.dtype,
    kind: torch.dtype,
    rows: int,
    cols: int,
    shape: list[int],
    share: float,
    biased: bool,
    threads: int,
    seed: int,
) -> None:
    if not kernels().torchprune_use_form(form.encode()):
        return
    torch.manual_seed(seed)
    packed, dense = drawn(rows, cols, share, kind)
    bias = torch.randn(rows).to(wide) if biased else None
    x = torch.randn(*shape, cols).to(wide)
    made = session(parts_of(packed, bias), KINDS[wide], cols, threads)
    (found,) = made.run(None, {"x": x.numpy()})
    expected = x.double() @ dense.T
    if bias is not None:
        expected = expected + bias.double()
    assert found.dtype == x.numpy().dtype
    assert found.shape == tuple(expected.shape)
    scale = (x.double().abs() @ dense.abs().T).max().item() + 1 if found.size else 1.0
    allowed = (1e-6 if wide is torch.float32 else 1e-3) * scale
    assert np.abs(found - expected.numpy()).max(initial=0.0) <= allowed


@pytest.mark.parametrize("kind", VALUES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_weights_are_unpacked_to_the_bit(form: str, kind: torch.dtype) -> None:
    use(form)
    for rows, cols, share in ((1, 1, 0.0), (9, 130, 0.5), (70, 64, 0.9), (3, 65, 1.0)):
        packed, dense = drawn(rows, cols, share, kind)
        if packed.scales is not None:
            dense = packed.unpack() / packed.scales[:, None]
        made = session(parts_of(packed), None, cols, operator="BitmaskUnpack")
        (found,) = made.run(None, {})
        assert np.array_equal(found, dense.float().round().numpy() if kind is torch.int8 else dense)
    broken = parts_of(drawn(9, 130, 0.5, kind)[0])
    assert broken["bits"] is not None
    broken["bits"][4, 0] ^= 1
    with pytest.raises(Exception, match="contradict each other"):
        session(broken, None, 130, operator="BitmaskUnpack").run(None, {})


def refused(parts: dict[str, Tensor | None], cols: int = 100, wide: int = 100) -> str:
    with pytest.raises(Exception, match="torchprune: ") as caught:
        session(parts, KINDS[torch.float32], cols).run(None, {"x": np.ones((3, wide), np.float32)})
    return str(caught.value)


def test_parts_that_do_not_fit_are_refused() -> None:
    torch.manual_seed(0)
    packed, _ = drawn(7, 100, 0.5, torch.float32)
    whole = parts_of(packed)
    codes = parts_of(drawn(7, 100, 0.5, torch.int8)[0])
    assert "last size must be 100" in refused(whole, wide=99)
    assert "bits must be int64, (rows, ceil(cols / 64))" in refused(whole, cols=50, wide=50)
    assert "negative" in refused(whole, cols=-1)
    assert "starts must be int32" in refused(whole | {"starts": packed.starts[1:]})
    assert "begin with 0" in refused(whole | {"starts": packed.starts + 1})
    assert "hold 64 more" in refused(whole | {"values": packed.values[1:]})
    assert "int8 values need scales" in refused(codes | {"scales": None})
    assert "scales must be (rows,)" in refused(codes | {"scales": torch.ones(6)})
    assert "bias must be (rows,)" in refused(whole | {"bias": torch.ones(8)})
    assert "values must be float32" in refused(whole | {"values": packed.values.double()})


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(VALUES),
    form=st.sampled_from(FORMS),
    batch=st.sampled_from([1, 3, 20, 70]),
    seed=st.integers(0, 2**31),
)
def test_parts_that_contradict_each_other_are_told(
    kind: torch.dtype, form: str, batch: int, seed: int
) -> None:
    if not kernels().torchprune_use_form(form.encode()):
        return
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    packed, _ = drawn(9, 130, 0.5, kind)
    bits = packed.bits.clone()
    row = int(torch.randint(9, (), generator=generator))
    bits[row, 1] ^= 1 << int(torch.randint(62, (), generator=generator))
    made = session(parts_of(packed) | {"bits": bits}, KINDS[torch.float32], 130)
    with pytest.raises(Exception, match="contradict each other"):
        made.run(None, {"x": np.ones((batch, 130), np.float32)})
    past = packed.bits.clone()
    past[row, 2] |= 1 << 40  # no column
    starts = packed.starts.clone()
    starts[row + 1 :] += 1
    values = torch.cat([packed.values, packed.values.new_zeros(1)])
    made = session(
        parts_of(packed) | {"bits": past, "starts": starts, "values": values},
        KINDS[torch.float32],
        130,
    )
    with pytest.raises(Exception, match="contradict each other"):
        made.run(None, {"x": np.ones((batch, 130), np.float32)})
