"""The packages: who may import whom, and what is installed."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The arrows: checkpoint -> model -> export -> bundle -> runtime -> perf.
MAY_IMPORT = {
    "runtime": set(),
    "model": {"runtime"},
    "export": {"model", "runtime"},
    "perf": {"model", "export", "runtime"},
}
SOURCES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]
MAX_LINES = 350
TORCH_FREE = {"torch", "onnx", "onnx_ir", "onnxscript", "transformers", "onnxruntime"}


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, int, str]]:
    """Every import: its statement, level (dots), and dotted name without the dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, 0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module is None:
                yield from ((node, node.level, alias.name) for alias in node.names)
            else:
                yield node, node.level, node.module


def inside_functions(tree: ast.AST) -> set[ast.AST]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    return {
        inner for node in ast.walk(tree) if isinstance(node, functions) for inner in ast.walk(node)
    }


def inside_type_checking(tree: ast.AST) -> set[ast.AST]:
    return {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }


def problems(name: str, source: str) -> list[str]:
    """What in a file, named by its path in the repository, goes against the arrows."""
    tree = ast.parse(source)
    local, for_types = inside_functions(tree), inside_type_checking(tree)
    rooms = name.split("/")[:-1]
    package = rooms[0]
    # The command line and `load` reach up inside the function that needs it.
    reaches_up = rooms == ["runtime", "cli"] or name == "runtime/load.py"
    found = []
    for statement, level, target in imports(tree):
        where = f"{name}:{statement.lineno}"
        first, *_ = target.split(".")
        if level == 0:
            if first in {"llamac", *MAY_IMPORT}:
                found.append(f"{where}: {target} is not imported relatively")
            if package == "runtime" and first in TORCH_FREE and statement not in local:
                found.append(f"{where}: {target} is imported by the runtime")
        elif level > len(rooms) + 1 or (level == len(rooms) + 1 and first not in MAY_IMPORT):
            found.append(f"{where}: {'.' * level}{target} leaves the packages")
        elif level == len(rooms) + 1 and first not in {package, *MAY_IMPORT[package]}:
            if not (reaches_up and statement in local | for_types):
                found.append(f"{where}: {package} imports {first}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path):
    assert problems(str(path.relative_to(ROOT)), path.read_text()) == []


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("runtime/x.py", "from ..model import Llama", "runtime imports model"),
        ("runtime/x.py", "def f():\n    from ..model.load import load", "runtime imports model"),
        ("runtime/cli/main.py", "from ...perf.bench import main", "runtime imports perf"),
        ("runtime/ort/x.py", "def f():\n    from ...model import Llama", "runtime imports model"),
        ("model/compiled/x.py", "from ...export import graphs", "model imports export"),
        ("runtime/x.py", "import torch.nn", "torch.nn is imported by the runtime"),
        ("runtime/x.py", "from onnxruntime import OrtValue", "onnxruntime is imported by"),
        ("model/x.py", "from ..export import export_bundle", "model imports export"),
        ("export/x.py", "if True:\n    from ..perf import bench", "export imports perf"),
        ("export/x.py", "from .. import perf", "export imports perf"),
        ("model/x.py", "import llamac.runtime", "llamac.runtime is not imported relatively"),
        ("perf/x.py", "from runtime.cli import main", "runtime.cli is not imported relatively"),
        ("perf/x.py", "from ...secrets import key", "...secrets leaves the packages"),
        ("model/compiled/x.py", "from ....secrets import key", "....secrets leaves the packages"),
        ("perf/x.py", "from ..tests import conftest", "..tests leaves the packages"),
    ],
)
def test_what_goes_against_the_arrows_is_found(name: str, source: str, message: str):
    (problem,) = problems(name, source)
    assert message in problem


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("runtime/cli/main.py", "def f():\n    from ...model.load import load_backend"),
        ("runtime/ort/x.py", "from ..backend import Backend"),
        ("model/compiled/x.py", "from ...runtime.backend import StaticShape"),
        ("runtime/x.py", "def f():\n    import onnxruntime"),
        ("export/x.py", "from ..model import Llama\nfrom .graphs import TARGETS"),
        ("model/x.py", "import torch\nfrom .config import LlamaConfig"),
    ],
)
def test_what_follows_the_arrows_is_not(name: str, source: str):
    assert problems(name, source) == []


def test_every_folder_is_installed_and_the_demo_with_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tools = project["tool"]["setuptools"]
    folders = {path.parent for path in SOURCES if path.name == "__init__.py"}
    assert folders == {path.parent for path in SOURCES}
    names = {"llamac." + ".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert {*tools["packages"]} == names
    assert len(tools["packages"]) == len(names)
    assert tools["package-dir"] == {f"llamac.{package}": package for package in MAY_IMPORT}
    assert not (ROOT / "__init__.py").exists()  # llamac is a namespace
    for path in (*(ROOT / "model").rglob("*.cpp"), *(ROOT / "model").rglob("*.h")):
        room = "llamac." + ".".join(path.parent.relative_to(ROOT).parts)
        assert any(path.match(pattern) for pattern in tools["package-data"][room])


def test_no_room_has_less_than_two_tenants_and_no_file_is_long():
    rooms: dict[Path, int] = {}
    for path in SOURCES:
        rooms[path.parent] = rooms.get(path.parent, 0) + (path.name != "__init__.py")
        assert len(path.read_text().splitlines()) <= MAX_LINES, path
    assert min(rooms.values()) >= 2


@pytest.mark.parametrize("package", ["runtime", "model", "export"])
def test_what_a_package_offers_is_there(package: str):
    module = import_module(f"llamac.{package}")
    assert sorted(module.__all__) == module.__all__
    assert all(getattr(module, name) is not None for name in module.__all__)


def test_the_command_is_the_runtimes_and_the_base_is_small():
    (command,) = (
        entry for entry in entry_points(group="console_scripts") if entry.name == "llamac"
    )
    assert command.value == "llamac.runtime.cli:main"
    base = [line for line in requires("llamac") or [] if "extra ==" not in line]
    assert base
    # onnxruntime and onnxruntime-gpu overwrite each other: never in the base.
    assert not [line for line in base if line.startswith(("torch", "onnx", "tensorrt", "nvidia"))]
