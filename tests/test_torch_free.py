"""What runs where torch, the exporters or even ONNX Runtime are not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_run_cli import export_tiny

RUNTIME = Path(__file__).parents[1] / "runtime"
MODULES = sorted(
    ".".join(path.relative_to(RUNTIME).with_suffix("").parts)
    for path in RUNTIME.rglob("*.py")
    if path.name != "__main__.py"
)
EXPORTERS = ("torch", "onnx", "onnx_ir", "onnxscript", "transformers")


def run_python(code: str, *argv: str | Path, blocked: tuple[str, ...]):
    """Runs code in a process that can't import what is blocked, nor anything below it."""
    block = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {set(blocked)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
"""
    return subprocess.run(
        [sys.executable, "-c", block + code, *map(str, argv)],
        capture_output=True,
        text=True,
        check=False,
    )


def run_llamac(*argv: str | Path, blocked: tuple[str, ...]):
    code = """
from llamac.runtime.cli import main
code = main()
print(sorted(sys.modules.keys() & {*"torch onnx onnxscript onnxruntime".split()}), file=sys.stderr)
raise SystemExit(code)
"""
    return run_python(code, *argv, blocked=blocked)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("torch free")).folder


def test_run_needs_neither_torch_nor_the_exporters(bundle: Path):
    words = ("run", bundle, "--prompt", "ab", "--seed", "4", "--json", "--max-new-tokens", "9")
    free = run_llamac(*words, blocked=EXPORTERS)
    assert free.returncode == 0, free.stderr
    assert free.stderr.endswith("['onnxruntime']\n")
    ids = json.loads(free.stdout)["ids"]
    assert len(ids) == 9
    # Nothing blocked: the same tokens, and torch isn't loaded where it could be either.
    usual = run_llamac(*words, blocked=())
    assert json.loads(usual.stdout)["ids"] == ids
    assert usual.stderr.endswith("['onnxruntime']\n")


def test_without_onnxruntime_one_line_says_what_to_install(bundle: Path):
    done = run_llamac("run", bundle, blocked=(*EXPORTERS, "onnxruntime"))
    line, _ = done.stderr.splitlines()
    assert line == (
        "llamac: --provider cpu: onnxruntime is not installed; pip install 'llamac[cpu]'"
    )
    assert (done.returncode, done.stdout) == (2, "")


def test_inspect_needs_no_onnxruntime(bundle: Path):
    done = run_llamac("inspect", bundle, "--check", blocked=(*EXPORTERS, "onnxruntime"))
    assert done.returncode == 0
    assert "target cpu: float32" in done.stdout
    assert done.stderr == "[]\n"


def test_every_module_of_the_runtime_is_imported_without_torch_and_onnxruntime():
    names = ["llamac.runtime", *(f"llamac.runtime.{module}" for module in MODULES[1:])]
    assert MODULES[0] == "__init__"
    assert "llamac.runtime.ort.ort_backend" in names
    code = f"import importlib\nfor name in {names}: importlib.import_module(name)\nprint('done')"
    done = run_python(code, blocked=(*EXPORTERS, "onnxruntime"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_the_block_works():
    for name in ("llamac.model", "llamac.export", "torch.nn", "onnxruntime"):
        done = run_python(f"import {name}", blocked=(*EXPORTERS, "onnxruntime"))
        assert "ModuleNotFoundError" in done.stderr
