"""The one-way walk: who may import whom, what the public surface is, what is never used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torchprune
import torchprune.testing

ROOT = Path(torchprune.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if "__pycache__" not in path.parts)

PUBLIC = [
    "NM",
    "OWL",
    "PCG",
    "ADMMSpec",
    "BestSpec",
    "Block",
    "ChannelSpec",
    "Comparison",
    "HeadSpec",
    "LayerSpec",
    "LeastError",
    "MagnitudeSpec",
    "NeuronSpec",
    "RIASpec",
    "Reconstruct",
    "Search",
    "SparseGPTSpec",
    "Swaps",
    "TorchpruneError",
    "Unstructured",
    "WandaSpec",
    "apply_masks",
    "compare",
    "densify",
    "fold",
    "lift",
    "load",
    "load_into",
    "lower",
    "masks",
    "perplexity",
    "plan_lowering",
    "plan_shrink",
    "report",
    "save",
    "shrink",
    "sparsify",
    "text_batches",
]


def module_of(path: Path) -> str:
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


def test_nothing_imports_the_deployment_half() -> None:
    for path in FILES:
        above = {m for m in imports_of(path, everywhere=False) if m.startswith("torchprune.export")}
        assert not above, f"{module_of(path)} imports {above}"
        # A command may reach for it when it is called; the library may not.
        if path.stem not in ("cli", "__main__"):
            inside = {m for m in imports_of(path) if m.startswith("torchprune.export")}
            assert not inside, f"{module_of(path)} imports {inside}"


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
for name in {OPTIONAL[:10]}:
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
    assert len(torchprune.__all__) <= 38  # what each name is for is in the README
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
