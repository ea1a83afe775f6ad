"""Who may know whom: read from the source, nothing is run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sam_kernels"


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module: str, *, top_only: bool = False) -> set[str]:
    """Return every module of the repository that one imports, except for type checking."""
    path = FILES[module]
    tree = ast.parse(path.read_text())
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if top_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add(whole if whole in FILES else base)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found - {module}


def below(module: str, *folders: str) -> bool:
    return any(module == f"sam_kernels.{f}" or module.startswith(f"sam_kernels.{f}.") for f in folders)


def layer(name: str) -> list[str]:
    return [module for module in FILES if below(module, name)]


def known(module: str) -> set[str]:
    return {m for m in imports_of(module) if m.split(".")[0] == "sam_kernels"}


def test_the_package_was_found():
    assert {"sam_kernels.optimizer", "sam_kernels.recipe", "sam_kernels.policies.metric"} <= set(FILES)


@pytest.mark.parametrize("module", layer("policies"))
def test_policies_know_policies_only(module):
    assert {m for m in known(module) if not below(m, "policies")} <= {"sam_kernels"} - {"sam_kernels"}


@pytest.mark.parametrize("module", layer("policies") + layer("recipe") + layer("recipes"))
def test_descriptions_never_touch_operators(module):
    assert not re.search(r"torch\s*\.\s*ops|torch\.library|_foreach_", FILES[module].read_text())


def test_recipe_knows_policies_only():
    assert all(below(m, "policies", "schedules") for m in known("sam_kernels.recipe"))


def test_recipes_know_recipe_and_policies_only():
    # `table` counts what steps cost, and asks for it when it is called.
    assert all(below(m, "recipe", "policies", "costs") for m in known("sam_kernels.recipes"))


@pytest.mark.parametrize("module", layer("backends"))
def test_backends_know_no_optimizer_and_no_recipe(module):
    assert not {
        m for m in known(module) if below(m, "optimizer", "recipe", "recipes", "ops", "state", "compat")
    }


def test_ops_know_no_optimizer_and_no_recipe():
    if "sam_kernels.ops" not in FILES:
        pytest.skip("there are no functional passes in this tree")
    assert not {m for m in known("sam_kernels.ops") if below(m, "optimizer", "recipe", "recipes", "compat")}


def test_optimizer_reaches_backends_through_ops():
    assert not {m for m in known("sam_kernels.optimizer") if below(m, "backends")}


@pytest.mark.parametrize("module", FILES)
def test_trainers_are_known_to_nobody_and_import_no_library(module):
    libraries = {"accelerate", "composer", "deepspeed", "lightning", "pytorch_lightning", "transformers"}
    if below(module, "trainers"):
        assert not {m for m in imports_of(module, top_only=True) if m.split(".")[0] in libraries}
    else:
        assert not {m for m in known(module) if below(m, "trainers")}


@pytest.mark.parametrize("module", layer("sharpness"))
def test_sharpness_is_of_any_model_and_knows_no_optimizer(module):
    assert not {m for m in known(module) if below(m, "optimizer", "steps", "recipe", "recipes", "backends")}


@pytest.mark.parametrize("module", FILES)
def test_experiments_are_known_to_the_command_alone(module):
    if not below(module, "experiments") and module != "sam_kernels.__main__":
        assert not {m for m in known(module) if below(m, "experiments")}


# Optional libraries: what needs one imports it when it is called.
OPTIONAL = {"matplotlib", "rich", "scipy", "sklearn", "torchvision", "PIL"}


@pytest.mark.parametrize("module", FILES)
def test_importing_takes_torch_and_numpy_alone(module):
    assert not {m for m in imports_of(module, top_only=True) if m.split(".")[0] in OPTIONAL}


@pytest.mark.parametrize("module", FILES)
def test_nothing_imports_tests_bench_or_examples(module):
    assert not {
        m for m in imports_of(module) if m.split(".")[0] in {"tests", "bench", "examples", "oracles", "cases"}
    }


@pytest.mark.parametrize("module", FILES)
def test_import_does_not_start_cuda_or_print(module):
    tree = ast.parse(FILES[module].read_text())
    if module.rpartition(".")[2] == "__main__":
        return
    for node in tree.body:
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            continue
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)):
            assert not re.search(r"cuda\.(is_available|init|current)|\bprint\(", ast.unparse(node))


def test_there_are_no_import_cycles():
    graph = {m: {i for i in imports_of(m, top_only=True) if i in FILES and i != "sam_kernels"} for m in FILES}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                walk(other, (*path, module))
            done.add(module)

    for module in graph:
        walk(module, ())


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "oracles").glob("*.py")), ids=lambda p: p.stem)
def test_oracles_know_nothing_of_the_package(path):
    assert not re.search(r"^\s*(from|import)\s+sam_kernels", path.read_text(), re.M)


CSRC = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]


def included(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


@pytest.mark.parametrize("path", CSRC, ids=lambda p: str(p.relative_to(ROOT)))
def test_compiled_code_includes_no_torch_header(path):
    assert not [h for h in included(path) if re.match(r"(torch|ATen|c10|caffe2)/", h)]


@pytest.mark.parametrize(
    ("folder", "never"), [("core", "math|engine|ops"), ("math", "engine|ops"), ("engine", "math|ops")]
)
def test_compiled_layers_point_one_way(folder, never):
    wrong = [
        (str(path.relative_to(ROOT)), header)
        for path in CSRC
        if path.relative_to(ROOT).parts[1] == folder
        for header in included(path)
        if re.search(rf"(^|/)({never})/", header)
    ]
    assert not wrong
