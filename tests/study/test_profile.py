"""Profiles of small models: what is counted, refused, missing, and left as it was."""

from __future__ import annotations

import copy
import json
import sys
from itertools import count

import pytest
import torch
from torch import nn

import torchprune
from torchprune import MagnitudeSpec
from torchprune.calibration.batches import Batch
from torchprune.study.speed.forms import FORMS, copied
from torchprune.study.speed.layer_work import flops_of, held_bytes, read_bytes
from torchprune.study.speed.peak_memory import highest, peak_of
from torchprune.study.speed.profile import profile
from torchprune.study.speed.profile_records import ProfileError
from torchprune.study.speed.prospects import kernels_for_cpu, layers_to_change, shapes_of
from torchprune.study.speed.row_batches import row_batches
from torchprune.study.speed.speed_verdicts import HALVED


def steady():
    """A clock by which everything takes a tenth of a second."""
    ticks = count()
    return lambda: next(ticks) / 10


def stack(width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 8)).eval()


def pruned(model: nn.Module, **options) -> nn.Module:
    return torchprune.sparsify(copy.deepcopy(model), MagnitudeSpec(**options), progress=False)


def quick(model, inputs, **options):
    given = {"seconds": 0.01, "progress": False, "prospects": False, "clock": steady()}
    return profile(model, inputs, **(given | options))


class Convolved(nn.Module):
    """Images (batch, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class Tokens(nn.Module):
    """A language model without attention: (batch, length) ids to logits."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.up, self.head = nn.Linear(16, 32), nn.Linear(32, 50)
        if tied:
            self.up, self.head = nn.Linear(16, 16), nn.Linear(16, 50, bias=False)
            self.head.weight = self.table.weight

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.up(self.table(input_ids)).relu())


# -- what is measured ------------------------------------------------------------------------------


def test_contenders_cells_and_counts():
    dense = stack()
    found = quick(
        pruned(dense),
        torch.randn(3, 64),
        against=dense,
        rows=(8, 1),
        forms=("bitmask", "eager", "masked", "bitmask_int8"),
    )
    assert [c.name for c in found.contenders] == [
        "dense",
        "masked",
        "eager",
        "bitmask",
        "bitmask_int8",
    ]
    assert found.rows == [1, 8]
    assert (found.unit, found.base) == ("row", "dense")
    assert len(found.cells) == 10
    for cell in found.cells:
        assert cell.latency is not None, cell.missing
        assert cell.latency.rounds == 5
        assert cell.latency.median == pytest.approx(0.1)
        assert (cell.ratio is None) == (cell.contender == "dense")
        assert cell.throughput == pytest.approx(cell.rows / 0.1)
    weights = 64 * 128 + 128 * 8
    assert found.zeros == weights // 2
    assert found.parameters == weights + 136
    for flops in found.flops:
        assert flops.total == 2 * weights * flops.rows
        assert flops.by_zeros == flops.total // 2
    sizes = {c.name: c.held for c in found.contenders}
    assert sizes["dense"] == sizes["eager"] == 4 * (weights + 136)
    assert sizes["masked"] > sizes["dense"]  # the masks
    assert sizes["bitmask_int8"] < sizes["bitmask"] < sizes["dense"]
    assert {v.kind for v in found.verdicts if v.contender == "eager"} == {"same"}
    assert {"processor", "threads", "torch", "date", "instruction sets"} <= set(found.machine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype(dtype):
    model = pruned(stack().to(dtype))
    found = quick(model, torch.randn(2, 64, dtype=dtype), rows=2, forms=("eager", "bitmask"))
    assert found.base == "eager"
    assert [c.missing for c in found.cells] == ["", ""]


def test_images_without_a_dense_model():
    found = quick(
        pruned(Convolved()), torch.randn(2, 3, 8, 8), rows=(1, 4), forms=("eager", "bitmask")
    )
    conv, head = 2 * 4 * 27 * 64, 2 * 4 * 5
    assert [f.total for f in found.flops] == [conv + head, 4 * (conv + head)]
    assert found.flops[0].by_zeros == found.flops[0].total // 2
    assert found.cell("bitmask", 4).latency is not None


def test_layers_by_name_in_every_form_that_runs_layer_by_layer():
    dense = stack()
    found = quick(
        pruned(dense),
        torch.randn(1, 64),
        against=dense,
        rows=(1, 2),
        forms=("eager", "bitmask"),
        per_layer=True,
    )
    assert {(y.layer, y.contender, y.rows) for y in found.layers} == {
        (layer, one, rows)
        for layer in ("0", "2")
        for one in ("dense", "eager", "bitmask")
        for rows in (1, 2)
    }
    kinds = {(y.contender, y.kind) for y in found.layers}
    assert kinds == {("dense", "Linear"), ("eager", "Linear"), ("bitmask", "BitmaskLinear")}
    assert {y.flops for y in found.layers if y.layer == "0"} == {2 * 64 * 128, 4 * 64 * 128}
    heat, _ = next(s for s in found.page().sections if s.title == "Layer by layer").pieces
    assert heat.rows == ["0", "2"]


def test_prospects_come_from_kernels_of_the_layers_shapes():
    found = quick(pruned(stack()), torch.randn(1, 64), rows=1, forms=("eager",), prospects=True)
    kernels = [k.name for k in kernels_for_cpu()][1:]
    assert HALVED in kernels
    assert [p.kernel for p in found.prospects] == kernels
    for prospect in found.prospects:
        assert prospect.layers == 2
        assert prospect.ratio.value == pytest.approx(1)  # by this clock all kernels are alike
    sizes = {p.kernel: p.bytes for p in found.prospects}
    assert sizes["bitmask 80 %"] < sizes["bitmask 70 %"] < sizes["bitmask 50 %"] < 1
    assert sizes["bitmask int8 50 %"] < sizes["bitmask 50 %"]
    assert sizes["half of the outputs removed"] == 0.5
    assert [v.kind for v in found.verdicts if v.rows == 1][-1] == "nothing"


def test_kernels_compute_what_they_stand_for():
    weight, x = torch.randn(12, 70), torch.randn(3, 70)
    expected = x @ weight.T
    for kernel in kernels_for_cpu():
        got = kernel.product(x, kernel.pack(weight), 70)
        if kernel.name in ("dense", "bitmask int8 0 %"):
            torch.testing.assert_close(got, expected, rtol=0.05, atol=0.2)
        elif kernel.name == "half of the outputs removed":
            torch.testing.assert_close(got, expected[:, :6])
        else:
            assert got.shape == expected.shape
            assert not torch.allclose(got, expected)


def test_shapes_are_those_that_a_call_computes():
    model = Tokens()
    assert layers_to_change(model) == ["up", "head"]
    assert layers_to_change(torchprune.fold(pruned(model, targets="up"))) == ["up"]
    found = shapes_of(model, ["up", "head"], Batch((torch.ones(2, 3, dtype=torch.int64),), {}))
    assert {(s.outputs, s.inputs, s.rows): n for s, n in found.items()} == {
        (32, 16, 6): 1,
        (50, 32, 6): 1,
    }


# -- counts by hand --------------------------------------------------------------------------------


def test_flops_by_zeros_are_those_of_layers_with_zeros():
    model = stack()
    with torch.no_grad():
        model[2].weight[:2] = 0.0  # a quarter of its outputs
    found = flops_of(model, Batch((torch.randn(5, 64),), {}))
    assert found.total == 5 * 2 * (64 * 128 + 128 * 8)
    assert found.by_zeros == 5 * 2 * 128 * 2
    assert found.layers == {"0": 5 * 2 * 64 * 128, "2": 5 * 2 * 128 * 8}
    alone = nn.Linear(4, 2)
    assert flops_of(alone, Batch((torch.randn(3, 4),), {})).layers == {"": 3 * 2 * 8}


def test_a_layer_used_twice_counts_twice():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    with torch.no_grad():
        shared.weight[:4] = 0.0
    found = flops_of(model, Batch((torch.randn(1, 8),), {}))
    assert (found.total, found.by_zeros) == (256, 128)


def test_tables_of_embeddings_are_held_and_not_read_unless_tied():
    free = Tokens()
    table = 4 * 50 * 16
    assert held_bytes(free) - read_bytes(free) == table
    tied = Tokens(tied=True)
    assert held_bytes(tied) == read_bytes(tied) == 4 * (16 * 16 + 16) + table


def test_the_peak_of_a_known_allocation():
    size = 1 << 20

    def run():
        a = torch.empty(size, dtype=torch.uint8)
        b = torch.empty(2 * size, dtype=torch.uint8)
        del a
        return torch.empty(size // 2, dtype=torch.uint8), b

    assert peak_of(run, torch.device("cpu")) == 3 * size
    assert peak_of(lambda: None, torch.device("cpu")) == 0
    assert peak_of(run, torch.device("meta")) is None
    assert highest([]) == 0


def test_the_peak_of_a_model_is_its_widest_place():
    found = quick(stack(), torch.randn(1, 64), rows=64, forms=("eager",))
    # The wide layer's output, and the ReLU's beside it.
    assert found.cell("eager", 64).peak == 2 * 64 * 128 * 4


# -- rows ------------------------------------------------------------------------------------------


def test_rows_of_items_begin_anew():
    x, y = torch.arange(6).view(3, 2).float(), torch.arange(3).float()
    made = row_batches(nn.Linear(2, 2), (x, y, 7), (1, 5))
    assert made.unit == "row"
    one, five = made.batches[1], made.batches[5]
    assert one.args[0].tolist() == [[0, 1]]
    assert five.args[0][:, 0].tolist() == [0, 2, 4, 0, 2]
    assert five.args[1].tolist() == [0, 1, 2, 0, 1]
    assert five.args[2] == 7


def test_rows_of_a_language_model_are_tokens_in_texts_of_its_context():
    model = Tokens()
    model.config = type("Config", (), {"max_position_embeddings": 8})()
    ids = torch.tensor([[1, 2, 3]])
    given = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0]])}
    made = row_batches(model, given, (4, 16, 9))
    assert made.unit == "token"
    assert made.batches[4].kwargs["input_ids"].tolist() == [[1, 2, 3, 1]]
    assert made.batches[4].kwargs["attention_mask"].tolist() == [[1, 1, 1, 1]]
    assert made.batches[16].kwargs["input_ids"].shape == (2, 8)
    assert made.missing == {9: "9 tokens are no whole texts of the model's context, 8"}
    positional = row_batches(model, ids, (2,))
    assert positional.batches[2].args[0].tolist() == [[1, 2]]


def test_batches_that_are_given_are_taken_as_they_are():
    batches = {2: torch.zeros(2, 64), 7: torch.ones(7, 64)}
    made = row_batches(stack(), batches, None)
    assert list(made.batches) == [2, 7]
    assert torch.equal(made.batches[7].args[0], batches[7])


@pytest.mark.parametrize(
    ("inputs", "rows", "says"),
    [
        ({2: torch.zeros(2, 64)}, (1, 2), "batches of 2 rows, and none of 1"),
        (torch.zeros(1, 64), (0,), r"rows must be whole numbers of 1 and more.*got \(0,\)"),
        (torch.zeros(1, 64), (), "rows must be"),
        (torch.zeros(1, 64), (1.5,), "rows must be"),
        ((3, 4), (1,), "no tensor with a first axis"),
        ("a text", (1,), "inputs cannot be used"),
    ],
)
def test_inputs_that_cannot_be_used_are_refused(inputs, rows, says):
    with pytest.raises(ProfileError, match=says):
        row_batches(stack(), inputs, rows)


def test_a_language_model_with_more_than_tokens_wants_batches():
    class Placed(Tokens):
        def forward(self, input_ids, position_ids):
            return super().forward(input_ids)

    ids = torch.ones(1, 2, dtype=torch.int64)
    with pytest.raises(ProfileError, match=r"an example with position_ids; give batches"):
        row_batches(Placed(), {"input_ids": ids, "position_ids": ids}, (1,))


# -- missing and refused ---------------------------------------------------------------------------


def test_forms_that_cannot_be_had_are_lines_with_the_reason(monkeypatch):
    for package in ("torchao.quantization", "onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    forms = ("masked", "bitmask", "semi_structured", "int8", "onnx", "openvino")
    found = quick(stack(), torch.randn(1, 64), rows=(1, 2), forms=forms)
    why = {c.name: c.missing for c in found.contenders}
    assert why.pop("eager") == ""
    assert why["masked"] == "it carries no masks"
    assert why["bitmask"].startswith("nothing to lower to 'bitmask'")
    assert "CUDA devices, and the model is on cpu" in why["semi_structured"]
    assert why["int8"].endswith("pip install 'torchprune[quant]'")
    assert why["onnx"].endswith("pip install 'torchprune[onnx]'")
    assert why["openvino"].endswith("pip install 'torchprune[openvino]'")
    assert {c.missing for c in found.cells if c.contender == "onnx"} == {why["onnx"]}
    assert len(found.page().warnings) == 6
    assert found.to_markdown().count(why["onnx"]) == 1
    assert "onnx" in str(found)
    grid = found.page().sections[2].pieces[0]
    assert len(grid.raw) == len(grid.rows) == 2 + 6
    assert json.loads(found.to_json())["cells"]


class OfOneSize(nn.Module):
    """Takes four rows and no others."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(4, 4)

    def forward(self, x):
        return self.weight(x.view(4, 4))


def test_rows_that_the_model_does_not_take_are_lines_too():
    found = quick(OfOneSize(), torch.randn(4, 4), rows=(1, 4), forms="eager")
    assert "RuntimeError: shape '[4, 4]' is invalid" in found.cell("eager", 1).missing
    assert found.cell("eager", 4).latency is not None
    with pytest.raises(ProfileError, match=r"eager does not run: RuntimeError: shape '\[4, 4\]'"):
        quick(OfOneSize(), torch.randn(4, 4), rows=(1, 2), forms="eager")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"forms": ("eagre",)}, "there is no form 'eagre' .did you mean 'eager'"),
        ({"forms": ()}, "forms is empty; there are 'masked'"),
        ({"against_forms": "x", "against": nn.Linear(4, 4)}, "there is no form 'x'"),
        ({"against": 3}, "against must be a Module, got int"),
        ({"seconds": 0}, "seconds must be above 0, got 0"),
        ({"seconds": float("nan")}, "seconds must be above 0"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"against": nn.Linear(4, 4, device="meta")}, "model is on cpu and against on meta"),
    ],
)
def test_refusals(options, says):
    with pytest.raises(ProfileError, match=says):
        quick(nn.Linear(4, 4), torch.randn(1, 4), **options)


def test_a_model_that_is_none_or_cannot_be_copied_is_refused():
    with pytest.raises(ProfileError, match="model must be a Module, got str"):
        quick("model", torch.randn(1, 4))
    model = nn.Linear(4, 4)
    model.handle = (n for n in range(3))
    with pytest.raises(ProfileError, match="Linear cannot be copied"):
        quick(model, torch.randn(1, 4))


# -- left as it was --------------------------------------------------------------------------------


class Counts(nn.Module):
    """Changes a buffer and a weight in every call, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        with torch.no_grad():
            self.linear.bias += torch.rand(8)
        return self.linear(x)


def state(model: nn.Module) -> dict[str, bytes]:
    kept = {k: v.detach().clone().numpy().tobytes() for k, v in model.state_dict().items()}
    return kept | {"training": bytes(m.training for m in model.modules())}


@pytest.mark.parametrize("fails", [False, True])
def test_models_threads_and_random_numbers_are_as_before(fails, monkeypatch):
    dense = nn.Sequential(Counts(), nn.Dropout(0.5)).train()
    model = pruned(dense)
    model.train()
    before, threads, x = (state(dense), state(model)), torch.get_num_threads(), torch.ones(2, 8)
    torch.manual_seed(5)
    random = torch.rand(3)
    torch.manual_seed(5)
    options = {"forms": ("masked", "eager", "bitmask"), "threads": 2, "per_layer": True}
    if fails:

        def stop(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("torchprune.study.speed.profile.watch_layers", stop)
        with pytest.raises(KeyboardInterrupt):
            quick(model, x, against=dense, rows=2, **options)
    else:
        found = quick(model, x, against=dense, rows=2, **options)
        assert found.machine["threads"] == "2"
    assert (state(dense), state(model)) == before
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.rand(3), random)
    assert torchprune.masks(model)


def test_a_copy_has_no_caches_and_is_in_eval_mode():
    model = Tokens()
    model.config = type("Config", (), {})()
    model.config.use_cache = True
    made = copied(model.train())
    assert not made.training
    assert made.config.use_cache is False
    assert model.training
    assert model.config.use_cache is True


# -- other runtimes --------------------------------------------------------------------------------


def test_other_runtimes_compute_the_same(monkeypatch):
    """Every form that there is here, on a model that changes nothing in them but rounding."""
    model, x = pruned(stack()), torch.randn(3, 64)
    batch = Batch((x,), {})
    expected = model(x).detach()
    for name in ("masked", "eager", "bitmask", "bitmask_int8", "int8", "int8_dynamic", "onnx"):
        ready = FORMS[name].make(copied(model), batch)
        got = ready.bind(batch)()
        got = torch.from_numpy(got[0]) if isinstance(got, list) else got
        atol = 0.05 if "int8" in name else 1e-5
        torch.testing.assert_close(got, expected, rtol=0, atol=atol)
        assert ready.held > 0


def test_runtimes_take_bfloat16_as_float32_and_say_so():
    found = quick(
        pruned(stack().bfloat16()), torch.randn(1, 64).bfloat16(), rows=(1, 3), forms="onnx"
    )
    cell = found.cell("onnx", 3)
    assert cell.latency is not None, cell.missing
    assert cell.peak is None
    assert found.contender("onnx").note == "in float32"


def test_the_public_name():
    assert torchprune.profile is profile
