"""The one-way walk: who may import whom, what the public surface is, what is never used."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torchprune
import torchprune.testing

ROOT = Path(torchprune.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if "__pycache__" not in path.parts)
EXPORT = Path(str(importlib.util.find_spec("torchprune.export").origin)).parent  # type: ignore[union-attr]
HOUSE = {*FILES, *EXPORT.rglob("*.py")}
"""The library with its deployment half, which lies beside it."""

ARROWS = {
    "__main__": "cli",
    "cli": "__init__ study study.costs study.speed study.proofs study.tasks training"
    " sparsify export checkpoint structure reports lowering.kernels calibration masking specs"
    " errors",
    "__init__": "study study.costs study.speed study.tasks training sparsify checkpoint"
    " structure methods reports lowering lowering.kernels calibration masking"
    " specs errors process",
    "testing": "sparsify structure graph methods calibration masking specs modes errors",
    "study": "study.tasks sparsify checkpoint structure reports calibration specs modes errors",
    "study.costs": "allocation checkpoint structure methods reports calibration masking"
    " specs modes errors",
    "study.speed": "export checkpoint reports lowering lowering.kernels calibration masking errors",
    "study.proofs": "export checkpoint structure methods reports lowering lowering.kernels masking"
    " specs errors",
    "study.tasks": "training checkpoint reports calibration specs modes errors",
    "training": "sparsify checkpoint structure methods reports calibration masking specs modes"
    " errors",
    "sparsify": "allocation checkpoint structure passes methods reports calibration masking specs"
    " modes errors",
    "export": "checkpoint structure passes reports lowering lowering.kernels masking errors",
    "allocation": "checkpoint structure methods calibration masking specs modes errors",
    "checkpoint": "structure methods reports lowering masking specs errors",
    "structure": "passes graph methods reports calibration masking specs modes errors",
    "passes": "methods lowering calibration masking specs modes errors",
    "graph": "calibration masking modes errors",
    "methods": "calibration masking specs modes errors",
    "reports": "calibration masking specs errors",
    "lowering": "lowering.kernels masking specs errors",
    "lowering.kernels": "masking",
    "calibration": "masking specs modes errors",
    "masking": "specs modes errors",
    "specs": "errors",
    "modes": "",
    "errors": "",
    "process": "",
}
"""From the top floor down: each room, and the rooms that its files import, in functions too."""

FOR_TYPES: dict[tuple[str, str], str] = {}
"""Arrows that only a type checker follows, and why."""

SAME_NAME = {
    "compare": "the verb, and its command",
    "documents": "texts read as calibration data, and the command line's options that name them",
    "pieces": "what a graph's nodes hold of its parameters, and what a page shows",
    "recover": "the verb, and its command",
    "shrink": "the verb, and its command",
    "spec": "the base of all specs, and the command line's options that become one",
}
"""Names that two files of the library share, and why."""

PUBLIC_PACKAGES = {
    "torchprune",
    "torchprune.passes",
    "torchprune.testing",
    "torchprune.training",
    "torchprune.export",
}

PUBLIC = [
    "NM",
    "OWL",
    "PCG",
    "ADMMSpec",
    "BestSpec",
    "Block",
    "BudgetSpec",
    "ChannelSpec",
    "Comparison",
    "HeadSpec",
    "LayerSpec",
    "LeastError",
    "MagnitudeSpec",
    "NeuronSpec",
    "Pruner",
    "RIASpec",
    "Reconstruct",
    "ScoreSpec",
    "Search",
    "Sensitivity",
    "SolverSpec",
    "SparseGPTSpec",
    "Swaps",
    "TorchpruneError",
    "Unstructured",
    "WandaSpec",
    "apply_masks",
    "compare",
    "densify",
    "evaluate",
    "find_ticket",
    "fold",
    "lift",
    "load",
    "load_into",
    "lower",
    "masks",
    "migrate",
    "peft_ready",
    "perplexity",
    "plan_lowering",
    "plan_shrink",
    "profile",
    "prune_iteratively",
    "recover",
    "report",
    "save",
    "sensitivity",
    "shrink",
    "sparsify",
    "text_batches",
]


def module_of(path: Path) -> str:
    if path.is_relative_to(EXPORT):
        parts = ("torchprune", "export", *path.relative_to(EXPORT).with_suffix("").parts)
    else:
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, *, everywhere: bool = True) -> set[str]:
    """Modules a file names in import statements; `everywhere` includes those in functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide who imports whom"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def graph() -> dict[str, set[str]]:
    """Module -> modules of torchprune that it imports."""
    known = {module_of(path) for path in FILES}
    return {
        module_of(path): {m for m in imports_of(path) if m in known} - {module_of(path)}
        for path in FILES
    }


def cycle_in(edges: dict[str, set[str]]) -> list[str]:
    """Some circle of imports, or nothing."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return []
        for other in sorted(edges.get(node, ())):
            if found := visit(other, [*path, node]):
                return found
        done.add(node)
        return []

    for start in sorted(edges):
        if found := visit(start, []):
            return found
    return []


def test_imports_run_one_way() -> None:
    # The package itself re-exports its files, and importing one of them imports it: no cycle.
    edges = {m: others - {"torchprune"} for m, others in graph().items() if m != "torchprune"}
    assert len(edges) > 20
    assert cycle_in(edges) == []


def test_a_circle_of_imports_would_be_found() -> None:
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


# -- rooms -----------------------------------------------------------------------------------------


def room_of(module: str) -> str:
    """The folder of a module, or the module itself where it lies in none."""
    parts = module.split(".")[1:]
    inner = ".".join(parts[:2])
    if inner in ARROWS:
        return inner
    return parts[0] if parts else "__init__"


def modules_named(tree: ast.AST, known: set[str]) -> set[str]:
    """Modules among those known that a tree imports, by statements and by `import_module`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names = inner & known
            found |= names if names == inner else {str(node.module), *names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return found & known


def arrows_of(files: set[Path]) -> dict[tuple[str, str], list[str]]:
    """(room, room it imports) -> the modules that do, type checkers' imports left out if listed."""
    known = {module_of(path) for path in files}
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(files):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        module, for_types = module_of(path), _taken_out(tree)
        room = room_of(module)
        typed = {room_of(m) for part in for_types for m in modules_named(part, known)}
        rooms = {other for other in typed if (room, other) not in FOR_TYPES}
        for other in (rooms | {room_of(m) for m in modules_named(tree, known)}) - {room}:
            found.setdefault((room, other), []).append(module)
    return found


def _taken_out(tree: ast.Module) -> list[ast.stmt]:
    """The statements under `if TYPE_CHECKING`, which the tree then has no more."""
    taken = []
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            taken += node.body
            node.body = [ast.Pass()]
    return taken


def new_arrows(found: dict[tuple[str, str], list[str]]) -> dict[str, list[str]]:
    allowed = {(room, other) for room, others in ARROWS.items() for other in others.split()}
    return {f"{a} -> {b}": files for (a, b), files in found.items() if (a, b) not in allowed}


def test_rooms_import_only_what_the_table_allows() -> None:
    found = arrows_of(HOUSE)
    assert len(found) > 90
    assert new_arrows(found) == {}, "move the code down, or argue for the arrow and add it"


def test_every_arrow_of_the_table_runs_down() -> None:
    floors = list(ARROWS)
    for room, others in ARROWS.items():
        for other in others.split():
            assert floors.index(room) < floors.index(other), f"{room} -> {other}"


def test_an_arrow_that_the_table_does_not_hold_would_be_found() -> None:
    known = {"torchprune", "torchprune.export", "torchprune.graph", "torchprune.graph.trace"}
    source = """
from torchprune import graph
def later():
    from torchprune.graph.trace import trace
    return import_module("torchprune.export")
"""
    tree = ast.parse(source)
    assert modules_named(tree, known) == known - {"torchprune"}
    assert modules_named(ast.parse("from torchprune import sparsify"), known) == {"torchprune"}
    found = {("masking", "graph"): ["torchprune.masking.mask"], ("graph", "masking"): ["x"]}
    assert new_arrows(found) == {"masking -> graph": ["torchprune.masking.mask"]}


def test_nothing_imports_the_deployment_half_before_it_is_called() -> None:
    for path in FILES:
        above = {m for m in imports_of(path, everywhere=False) if m.startswith("torchprune.export")}
        assert not above, f"{module_of(path)} imports {above}"


def test_a_room_says_in_one_sentence_what_is_in_it() -> None:
    for path in sorted(path for path in HOUSE if path.name == "__init__.py"):
        if (module := module_of(path)) in PUBLIC_PACKAGES:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        text = ast.get_docstring(tree)
        assert text, f"{module} says nothing"
        assert len(tree.body) == 1, f"{module} holds more than its sentence"
        assert re.fullmatch(r"(?s)([^.!?]|[.!?](?=\S))+\.", text), f"{module}: one sentence, please"


def test_no_two_files_of_the_library_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for path in sorted(HOUSE):
        if path.stem != "__init__":
            places.setdefault(path.stem, []).append(module_of(path))
    twice = {name: found for name, found in places.items() if len(found) > 1}
    assert {n: found for n, found in twice.items() if n not in SAME_NAME} == {}


def test_nothing_but_tests_imports_testing() -> None:
    for module, others in graph().items():
        if not module.startswith("torchprune.testing"):
            assert not any(m.startswith("torchprune.testing") for m in others), module


OPTIONAL = [
    "transformers",
    "datasets",
    "accelerate",
    "rich",
    "typer",
    "hypothesis",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "jinja2",
    "torchao",
    "torchprune.export",
    "torchprune.cli",
    "torchprune.testing",
]


@pytest.mark.parametrize("statement", ["import torchprune", "import torchprune.testing"])
def test_importing_brings_in_no_extra(statement: str) -> None:
    optional = [m for m in OPTIONAL if m not in statement]
    code = f"import sys; {statement}; print([m for m in {optional} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_pruning_needs_torch_alone() -> None:
    code = f"""
import sys
for name in {OPTIONAL[:11]}:
    sys.modules[name] = None  # importing it raises ImportError
import torch, torchprune
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
torchprune.sparsify(model, torchprune.SparseGPTSpec(), [torch.randn(9, 8)], progress=False)
print(str(torchprune.report(model)).splitlines()[0])
from torchprune.testing import assert_sparsity, weights
assert_sparsity(torchprune.fold(model), "unstructured", 0.5)
try:
    weights()
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, error = done.stdout.strip().splitlines()
    assert first == "0: sparsegpt unstructured 0.5, 50.00% zero"
    assert "torchprune.testing.weights needs the package 'hypothesis'" in error
    assert "torchprune[testing]" in error


def test_the_public_surface_is_frozen() -> None:
    assert sorted(torchprune.__all__) == sorted(PUBLIC)
    assert len(torchprune.__all__) <= 51  # what each name is for is in the README
    for name in torchprune.__all__:
        assert getattr(torchprune, name).__doc__, name
    for name in torchprune.testing.__all__:
        assert getattr(torchprune.testing, name).__doc__, name


def test_every_file_says_what_it_is_for() -> None:
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path.name


def calls_of(path: Path) -> set[str]:
    """Dotted names a file calls or refers to, such as `torch.load`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_nothing_is_ever_unpickled(path: Path) -> None:
    names = {m.split(".")[0] for m in imports_of(path)}
    assert not names & {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    assert not calls_of(path) & {"torch.load", "torch.save", "torch.serialization"}
    assert not imports_of(path) & {"torch.load", "torch.save", "torch.serialization"}
