"""Steps of an ML program beside coremltools' own evaluation of them, where it has one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from torchprune.errors import ExportError
from torchprune.export.coreml_file import MLProgram, Step
from torchprune.export.mil_run import MILRun

pytest.importorskip("coremltools", reason="the extra coreml is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of coremltools' making

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((2, 3, 4)).astype(np.float32)
Y = RANDOM.standard_normal((2, 3, 4)).astype(np.float32)
P = np.abs(X) + np.float32(0.5)
N = RANDOM.integers(-5, 6, (2, 3, 4)).astype(np.int32)
B = X > 0
I32 = np.int32

ANY = (
    "abs ceil cos erf exp exp2 floor sign sin square tanh atan cosh sinh tan relu sigmoid"
    " softplus softsign"
)
POSITIVE = "sqrt log rsqrt inverse"
PAIRS = "add sub mul maximum minimum floor_div mod"
ORDERS = "equal not_equal less greater_equal"
REDUCED = "mean sum max min l1_norm l2_norm sum_square log_sum_exp prod"

CASES: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"x": X}) for kind in ANY.split()),
    *((kind, {"x": P}) for kind in POSITIVE.split()),
    *((kind, {"x": np.tanh(X)}) for kind in ("acos", "asin", "atanh")),
    *((kind, {"x": X, "y": Y}) for kind in PAIRS.split()),
    *((kind, {"x": N, "y": N[::-1].copy()}) for kind in ORDERS.split()),
    *((kind, {"x": B, "y": ~B}) for kind in ("logical_and", "logical_or", "logical_xor")),
    ("real_div", {"x": X, "y": P}),
    ("pow", {"x": P, "y": Y}),
    ("clip", {"x": X, "alpha": -0.5, "beta": 0.5}),
    ("elu", {"x": X, "alpha": 0.7}),
    ("leaky_relu", {"x": X, "alpha": 0.2}),
    ("clamped_relu", {"x": X, "alpha": 0.1, "beta": 0.6}),
    ("sigmoid_hard", {"x": X, "alpha": 0.3, "beta": 0.4}),
    ("thresholded_relu", {"x": X, "alpha": 0.2}),
    ("scaled_tanh", {"x": X, "alpha": 1.5, "beta": 0.5}),
    ("gelu", {"x": X, "mode": "TANH_APPROXIMATION"}),
    ("gelu", {"x": X, "mode": "SIGMOID_APPROXIMATION"}),
    ("softmax", {"x": X, "axis": 1}),
    ("select", {"cond": B, "a": X, "b": Y}),
    ("linear", {"x": X, "weight": RANDOM.standard_normal((5, 4)).astype(np.float32)}),
    ("matmul", {"x": X, "y": Y, "transpose_y": True}),
    ("matmul", {"x": X, "y": Y, "transpose_x": True}),
    ("layer_norm", {"x": X, "axes": [-1], "epsilon": np.float32(1e-3)}),
    *((f"reduce_{kind}", {"x": X, "axes": [0, -1], "keep_dims": True})
      for kind in REDUCED.split()),
    ("reduce_argmax", {"x": X, "axis": 1}),
    ("reduce_argmin", {"x": X, "axis": -1, "keep_dims": True}),
    ("transpose", {"x": X, "perm": [2, 0, 1]}),
    ("reshape", {"x": X, "shape": [4, -1]}),
    ("expand_dims", {"x": X, "axes": [1, -1]}),
    ("squeeze", {"x": X[:1, :, :1], "axes": [0]}),
    ("tile", {"x": X, "reps": [1, 2, 3]}),
    ("reverse", {"x": X, "axes": [0, 2]}),
    ("concat", {"values": [X, Y], "axis": -2}),
    ("stack", {"values": [X, Y], "axis": 1}),
    ("split", {"x": X, "split_sizes": [1, 3], "axis": -1}),
    ("split", {"x": X, "num_splits": 2, "axis": 2}),
    ("slice_by_index", {"x": X, "begin": [0, -2, 3], "end": [1, 3, 0], "stride": [1, 1, -1]}),
    ("slice_by_index", {"x": X, "begin": [1, 0, 1], "end": [2, 0, 0], "squeeze_mask":
        [True, False, False], "begin_mask": [False, True, False], "end_mask": [False, True, True]}),
    ("slice_by_size", {"x": X, "begin": [0, 1, 1], "size": [2, -1, 2]}),
    ("gather", {"x": X, "indices": np.array([[2, 0], [-1, 1]], I32), "axis": 1}),
    ("gather", {"x": X, "indices": np.array([[2, 0], [1, 1]], I32), "axis": 1, "batch_dims": 1}),
    ("gather", {"x": X, "indices": I32(1), "axis": 0}),
    ("gather_along_axis", {"x": X, "indices": np.abs(N) % 3, "axis": 1}),
    ("cumsum", {"x": X, "axis": 1}),
    ("band_part", {"x": X, "lower": 1, "upper": 0}),
    ("fill", {"shape": [2, 3], "value": np.float32(0.5)}),
    ("range_1d", {"start": I32(2), "end": I32(9), "step": I32(3)}),
    ("pad", {"x": X, "pad": [0, 0, 1, 2, 0, 3], "constant_val": np.float32(2)}),
    ("pad", {"x": X, "pad": [1, 2], "mode": "reflect"}),
    ("non_zero", {"x": N}),
    ("shape", {"x": X}),
]  # fmt: skip


def array(value: Any) -> Any:
    if isinstance(value, str):
        return np.array(value)
    made = np.array(value)
    kind = {"f": np.float32, "i": np.int32}.get(made.dtype.kind)
    return made if kind is None else made.astype(kind)


def ours(kind: str, given: dict[str, Any], dtypes: list[Any]) -> list[torch.Tensor]:
    bound = {
        key: [array(v) for v in value] if key == "values" else [array(value)]
        for key, value in given.items()
    }
    names = [f"y{at}" for at in range(len(dtypes))]
    step = Step(kind, bound, list(zip(names, dtypes, strict=True)))
    return MILRun(MLProgram({}, {}, [step], names, 8))([])


@pytest.mark.parametrize(("kind", "given"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_a_step_gives_what_coremltools_gives(kind: str, given: dict[str, Any]) -> None:
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder, Function, types

    with Function({}, opset_version=ct.target.iOS17):
        made = getattr(Builder, kind)(**given)
    made = list(made) if isinstance(made, list | tuple) else [made]
    assert made[0].val is not None, "coremltools has no value for this step"
    kinds = [types.nptype_from_builtin(v.dtype) for v in made]
    for want, got in zip(made, ours(kind, given, kinds), strict=True):
        expected = torch.from_numpy(np.array(want.val))
        assert got.is_floating_point() == expected.is_floating_point()
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_steps_that_coremltools_does_not_evaluate() -> None:
    a, b = (np.array(v, np.float32) for v in ([[1, 2], [3, 4]], [[5, 6], [7, 8]]))
    for kind, given, expected in (
        ("silu", {"x": a}, a / (1 + np.exp(-a))),
        ("concat", {"values": [a, b], "axis": 0, "interleave": True}, np.stack([a, b], 1)),
        ("gather_nd", {"x": a, "indices": np.array([[1, 0], [0, -1]], I32)}, np.array([3, 2])),
        (
            "one_hot",
            {"indices": np.array([1, 0], I32), "one_hot_vector_size": 2, "on_value": np.float32(3)},
            np.array([[0, 3], [3, 0]]),
        ),
        ("cumsum", {"x": a, "axis": 1, "exclusive": True}, np.array([[0, 1], [0, 3]])),
        ("cumsum", {"x": a, "axis": 1, "reverse": True}, np.array([[3, 2], [7, 4]])),
        ("crop", {"x": a[None, None], "crop_height": [1, 0], "crop_width": [0, 1]}, np.array([3])),
        ("slice_update", {"x": a, "update": b[:1], "begin": [1, 0], "end": [2, 2]},
         np.array([1, 2, 5, 6])),
    ):  # fmt: skip
        (got,) = ours(kind, given, [np.float32])
        assert got.reshape(-1).tolist() == pytest.approx(expected.reshape(-1).tolist()), kind


def test_floats_are_rounded_to_their_type_after_every_step() -> None:
    (half,) = ours("mul", {"x": np.float32(1.0), "y": np.float32(0.1)}, [np.float16])
    assert half.dtype == torch.float16
    assert half.item() == float(np.float16(0.1))


def test_steps_that_are_not_known_or_fail_are_named() -> None:
    with pytest.raises(ExportError, match="cannot be checked here: custom_layer"):
        ours("custom_layer", {"x": X}, [np.float32])
    with pytest.raises(ExportError, match=r"step y0 \(add\) fails"):
        ours("add", {"x": X, "y": np.zeros((5,), np.float32)}, [np.float32])
    with pytest.raises(ExportError, match="takes 0 inputs, and 1 were given"):
        MILRun(MLProgram({}, {}, [], [], 8))([torch.ones(1)])
