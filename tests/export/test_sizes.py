"""Sizes of exported inputs: what varies is measured, checked in the runtime, and told."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import torchprune
from torchprune import MagnitudeSpec, export
from torchprune.errors import ExportError
from torchprune.export import call as calls
from torchprune.export.quiet import without_torchvision_notes
from torchprune.export.sizes import Sizes, measure
from torchprune.export.written import ExportReport

AUTO = Dim.AUTO


@pytest.fixture(autouse=True)
def _quiet(recwarn: pytest.WarningsRecorder) -> None:
    """Third-party warnings while exporting are not ours to fail on."""


# -- what varies, measured on plain functions -----------------------------------------------------


def measured(function: Callable[..., Tensor], *leaves: Tensor, asked: Any = None) -> Sizes:
    asked = asked or [dict.fromkeys(range(leaf.dim()), AUTO) for leaf in leaves]
    sizes = measure(lambda made: [function(*made)], list(leaves), asked)
    for inputs in (sizes.leaves, *(check.leaves for check in sizes.checks)):
        function(*inputs)  # whatever is proposed runs
    return sizes


def varying(sizes: Sizes) -> list[list[int]]:
    return [sorted(dims) for dims in sizes.shapes]


WEIGHT = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (lambda x, y: x + y, [(1, 6), (1, 6)], [[0, 1], [0, 1]]),
        (lambda x, y: x + y, [(4, 6), (1, 6)], [[0, 1], [1]]),  # broadcast: the 1 is a 1
        (lambda x: x @ WEIGHT, [(1, 4)], [[0]]),
        (lambda x, y: x @ WEIGHT + y, [(4, 4), (3,)], [[0], []]),  # of four rows by chance
        (lambda x, y: x @ y, [(5, 5), (5, 5)], [[0, 1], [0, 1]]),
        (lambda x, y: x.repeat_interleave(2, 0) + y, [(2, 3), (4, 3)], [[0, 1], [0, 1]]),
        (lambda x: x.view(2, -1) @ WEIGHT, [(2, 4)], [[]]),
        (lambda x: x.view(2, -1, 4) @ WEIGHT, [(2, 4)], [[0, 1]]),  # even numbers
        (lambda x: x[:7].sum(), [(0, 3)], [[1]]),
    ],
)  # fmt: skip
def test_what_the_model_runs_at_varies(
    function: Callable[..., Tensor], shapes: list[tuple[int, ...]], expected: list[list[int]]
) -> None:
    sizes = measured(function, *(torch.ones(shape) for shape in shapes))
    assert varying(sizes) == expected
    for leaf, axes in zip(sizes.leaves, expected, strict=True):
        assert all(leaf.shape[axis] > 1 for axis in axes)
    assert len(sizes.checks) == (2 if any(expected) else 0)


def test_exported_and_checked_sizes_differ_and_begin_at_one() -> None:
    sizes = measured(lambda x: x * 2, torch.ones(1, 4))
    shapes = [
        tuple(leaves[0].shape) for leaves in (sizes.leaves, *(c.leaves for c in sizes.checks))
    ]
    assert shapes[1:] == [(1, 1), (3, 3)]
    assert len({1, 3, 4, *shapes[0]}) == 5


def test_rows_come_round_again_and_masks_with_them() -> None:
    ids, mask = torch.tensor([[0, 7], [8, 9]]), torch.tensor([[0, 1], [1, 1]])
    made = measured(lambda i, m: i * m, ids, mask).leaves
    assert torch.equal(made[0] != 0, made[1] != 0)


def test_names_bind_and_bound_sizes() -> None:
    batch = Dim("batch", min=2, max=6)
    asked = [{0: batch}, {0: 2 * batch}]
    sizes = measured(
        lambda x, y: x.repeat_interleave(2, 0) + y, torch.ones(3, 2), torch.ones(6, 2), asked=asked
    )
    assert sizes.shapes == asked
    for leaves in (sizes.leaves, *(check.leaves for check in sizes.checks)):
        assert 2 <= len(leaves[0]) <= 6
        assert len(leaves[1]) == 2 * len(leaves[0])


# -- models in their runtimes ---------------------------------------------------------------------


class Row(nn.Module):
    """What models do to a single row, and what a graph for many would get wrong."""

    def forward(self, x: Tensor) -> Tensor:
        return x if len(x) > 1 else x.reshape(1, -1)


class Pair(nn.Module):
    """Two inputs that share their rows and tokens, and an image of one size."""

    def __init__(self, *after: nn.Module) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 64), nn.Linear(64, 5)
        self.look = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 64), *after)

    def forward(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        seen = self.look(image)[:, None]
        return self.head((self.embed(ids) + seen) * mask[..., None])

    @staticmethod
    def inputs(rows: int, length: int) -> dict[str, Tensor]:
        ids = torch.randint(20, (rows, length))
        return {"ids": ids, "mask": (ids > 3).long(), "image": torch.randn(rows, 3, 8, 8)}


class Folded(nn.Module):
    """Two rows, whatever comes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.view(2, -1))


def pruned(model: nn.Module) -> nn.Module:
    return torchprune.sparsify(model, MagnitudeSpec(), progress=False).eval()


def in_onnx(path: Path, given: dict[str, Tensor]) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in given.items()})[0])


def in_openvino(path: Path, given: dict[str, Tensor]) -> Tensor:
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return torch.from_numpy(compiled({k: v.numpy() for k, v in given.items()})[0].copy())


def in_pt2(path: Path, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return export.load_pt2(path).module()(**given)


RUNTIMES: dict[str, tuple[Any, str, Any, list[str]]] = {
    "onnx": (export.to_onnx, "m.onnx", in_onnx, ["onnxruntime", "onnxscript"]),
    "openvino": (export.to_openvino, "m.xml", in_openvino, ["openvino", "onnxscript"]),
    "pt2": (export.to_pt2, "m.pt2", in_pt2, []),
}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_example_of_one_row_and_token_bakes_no_one_in(runtime: str, tmp_path: Path) -> None:
    to, name, compute, needs = RUNTIMES[runtime]
    for package in needs:
        pytest.importorskip(package)
    torch.manual_seed(0)
    model = pruned(Pair() if runtime == "pt2" else Pair(Row()))  # `len` fixes it there
    report = to(model, tmp_path / name, Pair.inputs(1, 1))
    for rows, length in ((1, 1), (3, 9), (2, 1), (1, 4)):
        given = Pair.inputs(rows, length)
        with torch.no_grad():
            expected = model(**given)
        found = compute(tmp_path / name, given)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert report.sizes == {"ids": ("a", "b"), "mask": ("a", "b"), "image": ("a", 3, 8, 8)}
    assert not report.unmoved
    assert "image (a, 3, 8, 8)" in str(report)


@pytest.mark.parametrize("runtime", ["onnx", "pt2"])
def test_where_a_size_cannot_vary_the_report_says_so(runtime: str, tmp_path: Path) -> None:
    to, name, compute, needs = RUNTIMES[runtime]
    for package in needs:
        pytest.importorskip(package)
    if runtime == "pt2":  # `len` makes a number of a size
        branching = pruned(nn.Sequential(nn.Linear(64, 8), Row()))
        assert export.to_pt2(branching, tmp_path / "r.pt2", torch.randn(1, 64)).unmoved
    model, x = pruned(Folded()), torch.randn(2, 64)
    report = to(model, tmp_path / name, x)
    assert report.sizes == {"x": (2, 64)}
    assert report.unmoved == ["x axis 0 at 2"]
    assert "x axis 0 at 2" in str(report)
    if runtime == "onnx":
        torch.testing.assert_close(compute(tmp_path / name, {"x": x}), model(x).detach())


def test_executorch_is_fixed_and_says_so_unless_bounded(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    model, x = pruned(nn.Sequential(nn.Linear(64, 8), nn.ReLU())), torch.randn(1, 64)
    fixed = export.to_executorch(model, tmp_path / "m.pte", x)
    assert fixed.sizes == {"input": (1, 64)}
    shapes = ({0: Dim("rows", max=9)},)
    bounded = export.to_executorch(model, tmp_path / "b.pte", x, dynamic_shapes=shapes)
    assert bounded.sizes == {"input": ("a", 64)}
    assert bounded.bounds == {"a": (0, 9)}
    assert "a is at most 9" in str(bounded)


def test_a_user_who_asks_for_names_gets_them_or_an_error(tmp_path: Path) -> None:
    model, shapes = pruned(Pair()), {"ids": {0: Dim("rows")}, "mask": {0: Dim("rows")}}
    shapes["image"] = {0: Dim("rows")}
    report = export.to_pt2(model, tmp_path / "m.pt2", Pair.inputs(1, 4), dynamic_shapes=shapes)
    assert report.sizes["ids"] == ("a", 4)
    with pytest.raises(ExportError, match="built as the inputs are"):
        export.to_pt2(
            model, tmp_path / "n.pt2", Pair.inputs(1, 4), dynamic_shapes={"ids": {0: AUTO}}
        )
    with pytest.raises(ExportError, match="could not export"):
        export.to_pt2(
            pruned(Folded()),
            tmp_path / "n.pt2",
            torch.ones(2, 64),
            dynamic_shapes=[{0: Dim("rows")}],
        )
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]


def test_what_holds_at_the_example_alone_is_fixed_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = calls.written.compare

    def strict(expected: list[Tensor], found: list[Tensor], allowed: float) -> Any:
        return real(expected, [f + (len(f) != 2) for f in found], allowed)

    monkeypatch.setattr(calls.written, "compare", strict)
    model = pruned(nn.Linear(64, 8))
    report = export.to_pt2(model, tmp_path / "m.pt2", torch.randn(2, 64))
    assert report.sizes == {"input": (2, 64)}
    assert report.unmoved == ["input axis 0 at 2"]
    assert "computes otherwise" in report.note
    assert report.note in str(report)
    with pytest.raises(ExportError, match=r"computes otherwise.* for input \(1, 64\)"):
        export.to_pt2(
            model, tmp_path / "n.pt2", torch.randn(2, 64), dynamic_shapes=[{0: Dim.DYNAMIC}]
        )
    assert not (tmp_path / "n.pt2").exists()


def test_measuring_leaves_inputs_and_buffers_as_they_were(tmp_path: Path) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x.mul_(2)
            return self.linear(x) + self.calls

    x = torch.randn(1, 64)
    before = x.clone()
    call = calls.prepare(Counts(), x, with_cache=False, dynamic_shapes=None, vary=True)
    assert torch.equal(x, before)
    assert call.module.get_buffer("calls").item() == 0
    first, *others = call.samples
    assert len(others) == 2
    torch.testing.assert_close(first.outputs[0], call.module(x.clone()).detach())


def test_reports_show_a_few_inputs_of_many() -> None:
    sizes: dict[str, tuple[int | str, ...]] = {f"x{i}": ("a", i) for i in range(9)}
    report = ExportReport(Path("m"), None, "it", 1, 1, [], 0.0, 0.0, 0.0, "nothing", sizes=sizes)
    assert "x5 (a, 5) and 3 more" in str(report)


# -- what is not shown ----------------------------------------------------------------------------


def test_notes_on_torchvision_are_dropped_in_the_exporting_thread_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = list(logger.filters)
    note = "torchvision is not installed. Skipping %s"

    def say(who: str) -> None:
        logger.warning(note, who)

    with caplog.at_level(logging.WARNING, logger=logger.name):
        with without_torchvision_notes():
            say("mine")
            logger.warning("another warning")
            other = threading.Thread(target=say, args=("another thread's",))
            other.start()
            other.join()
            with pytest.raises(KeyError), without_torchvision_notes():
                raise KeyError
            say("still mine")
        say("later")
    assert [record.getMessage().split()[-1] for record in caplog.records] == [
        "warning", "thread's", "later",
    ]  # fmt: skip
    assert logger.filters == before
