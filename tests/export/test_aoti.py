"""AOTInductor's packages: what they compute in Python and in C++, what is beside them, refusals."""

from __future__ import annotations

import inspect
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import assert_as_it_was, fingerprint
from commands import make_home, worked
from families import FAMILIES
from saved import net, prune, pruned
from sweeps import sample
from torch import Tensor, nn
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler
from transformers import AutoModelForCausalLM

import torchprune
from torchprune import MagnitudeSpec, export
from torchprune.errors import CheckpointError, ExportError
from torchprune.export import ExportReport, aoti
from torchprune.export.written import tensors_of
from torchprune.lowering.kernels.build import BuildError

pytestmark = pytest.mark.filterwarnings("ignore")  # while exporting, of third parties
EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8)).eval()
    return torchprune.sparsify(model, MagnitudeSpec(), progress=False)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """Of a packed package of `plain`, that no test changes."""
    return export.to_aoti(plain(), tmp_path_factory.mktemp("p") / "half.pt2", torch.ones(3, 256))


def ran(code: str, *arguments: object) -> list[str]:
    """The lines that another process prints."""
    words = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def compiled(report: ExportReport) -> Any:
    return torch._inductor.aoti_load_package(str(report.path))


# -- what a package computes -----------------------------------------------------------------------


def test_a_packed_package_is_whole_and_smaller(report: ExportReport) -> None:
    assert report.packed == ["0.weight", "2.weight"]
    assert report.relative < 1e-5
    assert report.library == report.path.with_name("half.kernels.so")
    assert {report.path, report.library} == set(report.path.parent.iterdir())
    assert report.bytes == sum(f.stat().st_size for f in report.path.parent.iterdir())
    weights = sum(m.weight.nbytes for m in plain()[::2])
    own = report.path.stat().st_size
    assert report.dense_bytes - own == pytest.approx(0.47 * weights, rel=0.02)
    assert own < 1_000_000
    with zipfile.ZipFile(report.path) as package:
        (code,) = [package.read(n) for n in package.namelist() if n.endswith(".kernel.cpp")]
    assert b"#pragma omp parallel\n" in code  # with as many threads as there will be
    said = str(report)
    assert f"load {report.library} before it" in said
    assert "machine code for processors like this one (" in said
    assert "load only what you trust" in said


@pytest.mark.parametrize("rows", [1, 2, 17])
def test_any_number_of_rows_is_computed(report: ExportReport, rows: int) -> None:
    x = torch.randn(rows, 256)
    with torch.no_grad():
        torch.testing.assert_close(compiled(report)(x), plain()(x), rtol=1e-4, atol=1e-5)


ELSEWHERE = """
import os, sys
import torch
os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"
package, library, copy, order = sys.argv[1:]
try:
    torch._inductor.aoti_load_package(package)
except RuntimeError as error:
    print(error)
for word in order.split():
    if word == "python":
        import torchprune
    else:
        torch.ops.load_library(word)
print(torch._C._dispatch_has_kernel_for_dispatch_key("torchprune::bitmask_linear", "CPU"))
compiled = torch._inductor.aoti_load_package(package)
print(compiled(torch.ones(1, 256)).tolist())
print("torchprune" in sys.modules)
try:
    compiled(torch.ones(2, 3, 256))
except RuntimeError as error:
    print(error)
"""


def test_the_library_is_all_that_another_process_needs(
    report: ExportReport, tmp_path: Path
) -> None:
    copy = shutil.copy(report.library, tmp_path / "other.kernels.so")
    expected = plain()(torch.ones(1, 256))
    for order in (f"{report.library} {copy}", f"python {copy}"):
        missing, has, found, python, *wrong = ran(
            ELSEWHERE, report.path, report.library, copy, order
        )
        assert missing == "Could not find schema for torchprune::bitmask_linear."
        assert has == "True"
        assert python == str(order.startswith("python"))
        assert "unmatched dim value at 1, expected: 256, but got: 3" in "".join(wrong)
        torch.testing.assert_close(torch.tensor(json.loads(found)), expected, rtol=1e-4, atol=1e-5)


def cmake() -> str | None:
    """The one beside this Python, where `pip install cmake` puts it, or on the path."""
    return shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")


def test_the_example_in_cpp_runs_it_without_python(report: ExportReport, tmp_path: Path) -> None:
    tool = cmake()
    if tool is None:
        pytest.skip("cmake is not installed")
    build, prefix = tmp_path / "build", torch.utils.cmake_prefix_path
    # What others in this process set for compilers of theirs is not for this one.
    foreign = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    for words in (
        [tool, "-S", EXAMPLE, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}"],
        [tool, "--build", build],
    ):
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    x = torch.randn(3, 256)
    given, found = tmp_path / "input.f32", tmp_path / "output.f32"
    x.numpy().tofile(given)

    def run(package: Path, *sizes: int) -> subprocess.CompletedProcess[str]:
        words = [build / "run_package", package, given, found, *map(str, sizes)]
        return subprocess.run(words, capture_output=True, text=True, check=False, env={})

    done = run(report.path, 3, 256)
    assert (done.stdout, done.stderr) == ("output [3, 8] float\n", "")
    expected = plain()(x).detach().numpy()
    np.testing.assert_allclose(
        np.fromfile(found, np.float32).reshape(3, 8), expected, rtol=0, atol=1e-5
    )
    done = run(report.path, 4, 256)
    assert done.returncode == 1
    assert "does not hold that many float32 numbers" in done.stderr
    alone = shutil.copy(report.path, tmp_path / "alone.pt2")
    done = run(Path(alone), 3, 256)
    assert done.returncode == 1
    assert done.stderr == "error: Could not find schema for torchprune::bitmask_linear.\n"


@pytest.mark.parametrize("name", sample(["bert", "llama", "gpt2", "vit", "resnet"], "bert"))
def test_families_in_half_precision(name: str, tmp_path: Path) -> None:
    model = pruned(name, torch.bfloat16)
    batch = FAMILIES[name].data(torch.bfloat16)[0]
    before = fingerprint(model)
    report = export.to_aoti(model, tmp_path / "m.pt2", batch)
    assert report.packed or name == "resnet"
    assert report.relative < 3e-2
    assert all("a" in sizes for sizes in report.sizes.values())
    assert_as_it_was(model, before)


@pytest.mark.sweep
def test_convolutions_are_compiled_dense(tmp_path: Path) -> None:
    model, x = prune(net()), torch.randn(2, 3, 8, 8)
    report = export.to_aoti(model, tmp_path / "m.pt2", x, weights="dense")
    assert report.relative < 1e-5
    assert report.library is None
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]
    assert report.bytes == report.dense_bytes
    assert "neither smaller nor faster" in str(report)


def test_int8_values_of_a_loaded_program_are_compiled(tmp_path: Path) -> None:
    model = torchprune.lower(torchprune.fold(plain()), "bitmask", dtype=torch.int8)
    example = torch.ones(3, 256)
    archive = export.to_pt2(model, tmp_path / "m.pt2", example)
    assert archive.packed == ["0.weight", "2.weight"]
    assert archive.relative == 0
    weights = 4 * (256 * 256 + 8 * 256)
    assert archive.dense_bytes - archive.bytes == pytest.approx(0.84 * weights, rel=0.02)
    program = export.load_pt2(archive.path)
    report = export.to_aoti(program, tmp_path / "c.pt2", example, weights="packed")
    assert program.example_inputs is None
    assert report.sizes == {"input": ("a", 256)}
    assert report.library is not None
    assert report.relative < 1e-6
    for rows in (1, 9):
        x = torch.randn(rows, 256)
        with torch.no_grad():
            torch.testing.assert_close(compiled(report)(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.sweep
def test_the_command_compiles_a_decoder_that_writes_the_same_text(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_home(tmp_path) / "model")
    torchprune.save(prune(model), tmp_path / "pruned")
    path = tmp_path / "m.pt2"
    said = worked("export", tmp_path / "pruned", "--to", "aoti", "--output", path, "--json")
    figures = json.loads(said)
    assert figures["relative"] < 1e-4
    assert figures["library"] == str(tmp_path / "m.kernels.so")
    assert len(figures["packed"]) == 10  # those that are smaller so
    package = torch._inductor.aoti_load_package(str(path))
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    text, past = tokens, [torch.zeros(1, 1, 0, 8) for _ in range(4)]
    with torch.no_grad():
        for _ in range(6):
            at = torch.arange(text.shape[1] - tokens.shape[1], text.shape[1])[None]
            logits, *past = tensors_of(package(tokens, torch.ones_like(text), [at], past))
            tokens = logits[:, -1:].argmax(-1)
            text = torch.cat([text, tokens], 1)
        expected = model.generate(text[:, :5], max_new_tokens=6, do_sample=False)
    assert text.tolist() == expected.tolist()


# -- refusals --------------------------------------------------------------------------------------


@pytest.fixture
def instead(report: ExportReport, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Has inductor raise an error, or give the package of `plain` for whatever it is given."""

    def use(error: Exception | None) -> None:
        def compile_nothing(_: Any, *, package_path: str, inductor_configs: Any) -> str:
            if error is not None:
                raise error
            return str(shutil.copyfile(report.path, package_path))

        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_nothing)

    return use


def test_a_package_that_computes_otherwise_is_not_written(
    instead: Callable[[Any], None], tmp_path: Path
) -> None:
    instead(None)
    other = plain()
    torchprune.fold(other)[0].weight.data.mul_(1.1)
    with pytest.raises(ExportError, match="computes otherwise than torch"):
        export.to_aoti(other, tmp_path / "m.pt2", torch.ones(3, 256))
    assert not list(tmp_path.iterdir())


def test_a_library_of_an_older_package_goes_and_what_is_mine_stays(
    instead: Callable[[Any], None], tmp_path: Path
) -> None:
    instead(None)
    beside = tmp_path / "m.kernels.so"
    for weights in ("packed", "dense"):
        export.to_aoti(plain(), tmp_path / "m.pt2", torch.ones(3, 256), weights=weights)
        assert beside.is_file() is (weights == "packed")
    beside.write_text("mine")
    export.to_aoti(plain(), tmp_path / "m.pt2", torch.ones(3, 256), weights="dense")
    assert beside.read_text() == "mine"


@pytest.mark.sweep
def test_sizes_are_fixed_where_inductor_takes_no_others(
    report: ExportReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the place of a package for one size stands that for all."""

    def picky(program: Any, *, package_path: str, inductor_configs: Any) -> str:
        if program.range_constraints:
            raise ValueError("sizes must be numbers")
        return str(shutil.copyfile(report.path, package_path))

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", picky)
    found = export.to_aoti(plain(), tmp_path / "m.pt2", torch.ones(3, 256))
    assert found.sizes == {"input": (3, 256)}
    assert "AOTInductor could not compile this model: ValueError: sizes must be" in str(found)


def test_without_kernels_the_error_says_what_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Path:
        raise BuildError("the compiler failed")

    monkeypatch.setattr(aoti, "library", fail)
    with pytest.raises(ExportError, match='the compiler failed; weights="dense" needs none'):
        export.to_aoti(plain(), tmp_path / "m.pt2", torch.ones(3, 256))
    assert not list(tmp_path.iterdir())


def within(error: Exception) -> Exception:
    """As inductor raises it."""
    return InductorError(error, inspect.currentframe())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            within(
                CppCompileError(["g++"], "In file a.cpp\na.cpp:3: error: expected ';'\nand more")
            ),
            r"the C\+\+ compiler failed: a.cpp:3: error: expected ';'; nothing was written",
        ),
        (within(CppCompileError(["g++"], "")), "compiler failed: it said nothing; nothing was"),
        (
            within(InvalidCxxCompiler()),
            "compiles C.., and found no compiler: No working C.. compiler .*CXX names another",
        ),
        (ValueError("no such lowering\nand more"), "this model: ValueError: no such lowering; not"),
        (AssertionError(), "this model: AssertionError: no reason given; nothing was written"),
    ],
    ids=["compiler", "silent", "no compiler", "inductor", "nothing"],
)
def test_what_inductor_raises_is_an_export_error(
    error: Exception, said: str, instead: Callable[[Any], None], tmp_path: Path
) -> None:
    instead(error)
    with pytest.raises(ExportError, match=said):
        export.to_aoti(plain(), tmp_path / "m.pt2", torch.ones(3, 256))
    assert not list(tmp_path.iterdir())


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_wrong_models_and_choices_are_refused(tmp_path: Path) -> None:
    path, x = tmp_path / "m.pt2", torch.ones(3, 256)
    with pytest.raises(ExportError, match="torch could not export this model"):
        export.to_aoti(Branches(), path, x)
    with pytest.raises(ExportError, match=r"end in \.pt2"):
        export.to_aoti(plain(), tmp_path / "m.so", x)
    with pytest.raises(ExportError, match="weights must be"):
        export.to_aoti(plain(), path, x, weights="thin")
    program = torch.export.export(plain(), (x,))
    with pytest.raises(ExportError, match="a program has the inputs and the sizes"):
        export.to_aoti(program, path, x, with_cache=True)
    with pytest.raises(ExportError, match="the program cannot be called with the example"):
        export.to_aoti(program, path, torch.ones(3, 255))
    assert not list(tmp_path.iterdir())


# -- files that are no archive of a program --------------------------------------------------------


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def joined(path: Path, program: Path, *others: dict[str, bytes]) -> Path:
    """An archive with the files of a program, and others in its folder or outside of it."""
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        for files in others:
            for name, content in files.items():
                new.writestr(name, content)
    return path


def test_compiled_code_is_not_loaded_as_an_archive(report: ExportReport, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it holds compiled code, an AOTInductor package"):
        export.load_pt2(report.path)
    torch.export.save(torch.export.export(plain(), (torch.ones(3, 256),)), tmp_path / "m.pt2")
    with zipfile.ZipFile(report.path) as package:
        code = {
            f"m/{name.partition('/')[2]}": package.read(name)
            for name in package.namelist()
            if "aotinductor" in name
        }
    both = joined(tmp_path / "both.pt2", tmp_path / "m.pt2", code)
    with pytest.raises(CheckpointError, match="it holds compiled code"):
        export.load_pt2(both)


def test_archives_of_the_older_form_are_not_unpickled(tmp_path: Path) -> None:
    from torch._export.serde.schema import SCHEMA_VERSION
    from torch._export.serde.serialize import serialize

    program = torch.export.export(nn.Linear(2, 2), (torch.ones(3, 2),))
    parts, evil, bomb = serialize(program), tmp_path / "evil", io.BytesIO()
    torch.save(Touches(evil), bomb)
    with zipfile.ZipFile(tmp_path / "m.pt2", "w") as archive:
        archive.writestr("m/archive_format", "pt2")
        archive.writestr("m/models/model.json", "{")
        archive.writestr("version", ".".join(map(str, SCHEMA_VERSION)))
        archive.writestr("serialized_exported_program.json", parts.exported_program)
        archive.writestr("serialized_state_dict.pt", bomb.getvalue())
        archive.writestr("serialized_constants.pt", parts.constants)
        archive.writestr("serialized_example_inputs.pt", parts.example_inputs)
    with pytest.raises(CheckpointError, match="it holds files outside of its folder"):
        export.load_pt2(tmp_path / "m.pt2")
    assert not evil.exists()
