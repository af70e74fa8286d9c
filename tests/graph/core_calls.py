"""A call of every core operator of ATen that has a rule of its own: shapes, and the call.

The call asks for sizes as a model's code would, from its tensors, so that it also works when some
indices are gone. Tensors are of float64 in (0, 1), or what a function makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Call = Callable[..., Any]
Given = Sequence[tuple[int, ...] | Callable[[], Tensor]]

IMAGE, CUBE, ROWS = (2, 6, 8, 8), (2, 6, 4, 4, 4), (2, 3, 6)


def whole(count: int, *shape: int) -> Callable[[], Tensor]:
    """Integers below a count."""
    return lambda: torch.randint(0, count, shape)


def true(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.rand(shape) > 0.5


CALLS: dict[str, tuple[Given, Call]] = {
    "_adaptive_avg_pool2d.default": ([IMAGE], lambda f, x: f(x, [2, 2])),
    "_adaptive_avg_pool3d.default": ([CUBE], lambda f, x: f(x, [2, 2, 2])),
    "_cdist_forward.default": ([ROWS, (2, 4, 6)], lambda f, x, y: f(x, y, 2.0, None)),
    "_embedding_bag.default": (
        [(5, 6), whole(5, 7), lambda: torch.tensor([0, 3])],
        lambda f, w, i, o: f(w, i, o),
    ),
    "_fft_c2r.default": (
        [lambda: torch.randn(2, 6, 5, dtype=torch.complex128)],
        lambda f, x: f(x, [2], 0, 8),
    ),
    "_fft_r2c.default": ([ROWS], lambda f, x: f(x, [2], 0, True)),
    "_log_softmax.default": ([ROWS], lambda f, x: f(x, 1, False)),
    "_native_batch_norm_legit.default": (
        [IMAGE, (6,), (6,), (6,), (6,)],
        lambda f, x, w, b, m, v: f(x, w, b, m, v, False, 0.1, 1e-5),
    ),
    "_native_batch_norm_legit.no_stats": (
        [IMAGE, (6,), (6,)],
        lambda f, x, w, b: f(x, w, b, True, 0.1, 1e-5),
    ),
    "_native_batch_norm_legit_no_training.default": (
        [IMAGE, (6,), (6,), (6,), (6,)],
        lambda f, x, w, b, m, v: f(x, w, b, m, v, 0.1, 1e-5),
    ),
    "_softmax.default": ([ROWS], lambda f, x: f(x, 1, False)),
    "_to_copy.default": ([ROWS], lambda f, x: f(x, dtype=torch.float32)),
    "adaptive_avg_pool1d.default": ([(2, 6, 8)], lambda f, x: f(x, [2])),
    "addmm.default": ([(4,), (3, 6), (6, 4)], lambda f, b, x, y: f(b, x, y)),
    "alias.default": ([ROWS], lambda f, x: f(x)),
    "amax.default": ([ROWS], lambda f, x: f(x, [1])),
    "amin.default": ([ROWS], lambda f, x: f(x, [-2], True)),
    "any.default": ([ROWS], lambda f, x: f(x)),
    "any.dim": ([true(*ROWS)], lambda f, x: f(x, 1)),
    "any.dims": ([true(*ROWS)], lambda f, x: f(x, [0, 1])),
    "argmax.default": ([ROWS], lambda f, x: f(x, 1)),
    "argmin.default": ([ROWS], lambda f, x: f(x, -1, True)),
    "avg_pool1d.default": ([(2, 6, 8)], lambda f, x: f(x, [2])),
    "avg_pool2d.default": ([IMAGE], lambda f, x: f(x, [2, 2])),
    "avg_pool3d.default": ([CUBE], lambda f, x: f(x, [2, 2, 2])),
    "bmm.default": ([(2, 3, 6), (2, 6, 4)], lambda f, x, y: f(x, y)),
    "cat.default": ([ROWS, (2, 3, 4)], lambda f, x, y: f([x, y], -1)),
    "clone.default": ([ROWS], lambda f, x: f(x)),
    "col2im.default": ([(2, 24, 49)], lambda f, x: f(x, [8, 8], [2, 2], [1, 1], [0, 0], [1, 1])),
    "constant_pad_nd.default": ([IMAGE], lambda f, x: f(x, [1, 0, 0, 2], 1.0)),
    "convolution.default": (
        [IMAGE, (4, 6, 3, 3), (4,)],
        lambda f, x, w, b: f(x, w, b, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
    ),
    "copy.default": ([ROWS, ROWS], lambda f, x, y: f(x, y)),
    "cumsum.default": ([ROWS], lambda f, x: f(x, 1)),
    "diagonal.default": ([IMAGE], lambda f, x: f(x, 0, 2, 3)),
    "embedding.default": ([(5, 6), whole(5, 2, 3)], lambda f, w, i: f(w, i)),
    "expand.default": ([(2, 1, 6)], lambda f, x: f(x, [4, *x.shape[:1], 3, *x.shape[2:]])),
    "fill.Scalar": ([ROWS], lambda f, x: f(x, 2.0)),
    "flip.default": ([ROWS], lambda f, x: f(x, [0, 2])),
    "gather.default": ([ROWS, whole(3, *ROWS)], lambda f, x, i: f(x, 1, i)),
    "grid_sampler_2d.default": ([IMAGE, (2, 3, 3, 2)], lambda f, x, g: f(x, g, 0, 0, False)),
    "index.Tensor": (
        [IMAGE, whole(8, 3), whole(8, 2, 1)],
        lambda f, x, i, j: f(x, [None, None, i, j]),
    ),
    "index_put.default": (
        [IMAGE, whole(8, 3), (2, 6, 3, 8)],
        lambda f, x, i, y: f(x, [None, None, i], y),
    ),
    "index_select.default": ([ROWS, whole(3, 2)], lambda f, x, i: f(x, 1, i)),
    "max.dim": ([ROWS], lambda f, x: f(x, 1)),
    "max_pool2d_with_indices.default": ([IMAGE], lambda f, x: f(x, [2, 2])),
    "max_pool3d_with_indices.default": ([CUBE], lambda f, x: f(x, [2, 2, 2])),
    "mean.default": ([ROWS], lambda f, x: f(x)),
    "mean.dim": ([ROWS], lambda f, x: f(x, [0, 1], True)),
    "min.dim": ([ROWS], lambda f, x: f(x, -2)),
    "mm.default": ([(3, 6), (6, 4)], lambda f, x, y: f(x, y)),
    "native_dropout.default": ([ROWS], lambda f, x: f(x, 0.0, True)),
    "native_group_norm.default": (
        [IMAGE, (6,), (6,)],
        lambda f, x, w, b: f(x, w, b, *x.shape[:2], 64, x.shape[1] // 2, 1e-5),
    ),
    "native_layer_norm.default": (
        [IMAGE, (8, 8), (8, 8)],
        lambda f, x, w, b: f(x, x.shape[2:], w, b, 1e-5),
    ),
    "permute.default": ([IMAGE], lambda f, x: f(x, [3, 1, 0, -2])),
    "prod.default": ([ROWS], lambda f, x: f(x)),
    "prod.dim_int": ([ROWS], lambda f, x: f(x, 1)),
    "reflection_pad1d.default": ([(2, 6, 8)], lambda f, x: f(x, [1, 2])),
    "reflection_pad2d.default": ([IMAGE], lambda f, x: f(x, [1, 2, 0, 1])),
    "reflection_pad3d.default": ([CUBE], lambda f, x: f(x, [1, 2, 0, 1, 1, 1])),
    "repeat.default": ([ROWS], lambda f, x: f(x, [2, 3, 1, 2])),
    "replication_pad2d.default": ([IMAGE], lambda f, x: f(x, [1, 2, 0, 1])),
    "replication_pad3d.default": ([CUBE], lambda f, x: f(x, [1, 2, 0, 1, 1, 1])),
    "scatter.src": ([ROWS, whole(3, *ROWS), ROWS], lambda f, x, i, y: f(x, 1, i, y)),
    "scatter.value": ([ROWS, whole(3, *ROWS)], lambda f, x, i: f(x, 1, i, 2.0)),
    "scatter_add.default": ([ROWS, whole(3, *ROWS), ROWS], lambda f, x, i, y: f(x, 1, i, y)),
    "scatter_reduce.two": (
        [ROWS, whole(3, *ROWS), ROWS],
        lambda f, x, i, y: f(x, 1, i, y, "amax"),
    ),
    "select.int": ([ROWS], lambda f, x: f(x, 1, -1)),
    "select_scatter.default": ([ROWS, (2, 6)], lambda f, x, y: f(x, y, 1, 0)),
    "slice.Tensor": ([(2, 9, 6)], lambda f, x: f(x, 1, 1, -1, 2)),
    "slice_scatter.default": ([(2, 9, 6), (2, 4, 6)], lambda f, x, y: f(x, y, 1, 1, -1, 2)),
    "sort.default": ([ROWS], lambda f, x: f(x, 1, True)),
    "split_with_sizes.default": (
        [(2, 9, 6)],
        lambda f, x: f(x, [2, x.shape[1] - 2], 1),
    ),
    "squeeze.dim": ([(2, 1, 6)], lambda f, x: f(x, 1)),
    "squeeze.dims": ([(1, 2, 1, 6)], lambda f, x: f(x, [0, -2])),
    "sum.dim_IntList": ([ROWS], lambda f, x: f(x, [1])),
    "topk.default": ([ROWS], lambda f, x: f(x, 2, 1)),
    "unsqueeze.default": ([ROWS], lambda f, x: f(x, -2)),
    "upsample_bilinear2d.vec": ([IMAGE], lambda f, x: f(x, [4, 5], False, None)),
    "upsample_nearest2d.vec": ([IMAGE], lambda f, x: f(x, None, [2.0, 0.5])),
    "var.correction": ([ROWS], lambda f, x: f(x, [1], correction=1)),
    "var.dim": ([ROWS], lambda f, x: f(x, [0, 1])),
    "view.default": ([(2, 12, 3)], lambda f, x: f(x, [x.shape[0], -1, 4, *x.shape[2:]])),
    "where.self": ([true(2, 1, 6), ROWS, (6,)], lambda f, m, x, y: f(m, x, y)),
}
"""Name of the overload -> what it is given, and the call: the operator first."""


CUT: dict[str, dict[int, int]] = {
    "select.int": {0: 1},
    "select_scatter.default": {0: 1},
    "slice.Tensor": {0: 1},
    "slice_scatter.default": {0: 1, 1: 1},
    "split_with_sizes.default": {0: 1},
}
"""Which axes of which tensors the calls cut at numbers of their own: there nothing is taken out."""
