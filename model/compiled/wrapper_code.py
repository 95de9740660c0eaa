"""What Inductor generates for a step, cut down to what runs without Inductor."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from types import SimpleNamespace

import torch

__all__ = ["NAMESPACE", "UnknownCodeError", "cut_down"]

# What a step may find under the names that it imports from Inductor.
NAMESPACE = {
    "extern_kernels": SimpleNamespace(
        mm=torch.mm, addmm=torch.addmm, bmm=torch.bmm, baddbmm=torch.baddbmm
    )
}

_LIBRARY = frozenset({"cmath", "ctypes", "math", "os", "random", "tempfile", "torch"})
_COMPILER = frozenset({"_dynamo", "_inductor"})
# Imported from Inductor and, but for the last, not used by a step on a CPU.
_INDUCTOR_NAMES = frozenset(
    {"AsyncCompile", "align", "extern_kernels", "maybe_profile", "run_intermediate_hooks"}
)
_BENCHMARK = frozenset({"benchmark_compiled_module", "get_args"})
_KERNELS = "async_compile"  # makes a kernel of its source


class UnknownCodeError(ValueError):
    """A step whose code has something that this module doesn't know."""


def cut_down(source: str) -> tuple[str, list[str]]:
    """Takes out what only Inductor needs: its imports, the kernels' sources, a benchmark.

    Args:
        source: The Python module that Inductor generated.

    Returns:
        A module that defines `call`, and the names of its kernels; these and NAMESPACE are what it
        must find in its namespace.

    Raises:
        UnknownCodeError: It has a statement that isn't known, which is named.
    """
    kept: list[ast.stmt] = []
    kernels: list[str] = []
    for node in ast.parse(source).body:
        if (name := _kernel(node)) is not None:
            kernels.append(name)
        elif not _is_needless(node):
            kept.append(node)
    for node in kept:
        for fault in _unknown(node):
            raise UnknownCodeError(f"line {node.lineno} has {fault}")
    return ast.unparse(ast.Module(kept, type_ignores=[])), kernels


def _kernel(node: ast.stmt) -> str | None:
    match node:
        case ast.Assign(
            targets=[ast.Name(id=name)],
            value=ast.Call(func=ast.Attribute(value=ast.Name(id=maker), attr="cpp_pybinding")),
        ) if maker == _KERNELS:
            return name
    return None


def _is_needless(node: ast.stmt) -> bool:
    match node:
        case ast.ImportFrom(module=str(module), names=names) if module.startswith("torch._i"):
            return {name.asname or name.name for name in names} <= _INDUCTOR_NAMES
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.Delete(targets=[ast.Name(id=name)]):
            return name == _KERNELS
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="wait"))):
            return name == _KERNELS
        case ast.FunctionDef(name=name):
            return name in _BENCHMARK
        case ast.If(test=ast.Compare(left=ast.Name(id="__name__"))):
            return True
    return False


def _unknown(statement: ast.stmt) -> Iterator[str]:
    """What a kept statement has that might import Inductor, or isn't of the usual kinds."""
    top = ast.Import, ast.ImportFrom, ast.Assign, ast.FunctionDef, ast.ClassDef
    if not isinstance(statement, top):
        yield f"an unknown {type(statement).__name__}"
    for node in ast.walk(statement):
        match node:
            case ast.Import(names=names):
                modules = {name.name for name in names}
            case ast.ImportFrom(module=module):
                modules = {str(module)}
            case ast.Attribute(value=ast.Name(id="torch"), attr=attr) if attr in _COMPILER:
                modules = {f"torch.{attr}"}
            case ast.Name(id=name) if name == _KERNELS:
                modules = {name}
            case _:
                continue
        if not modules <= _LIBRARY:
            yield f"an unknown use of {', '.join(sorted(modules - _LIBRARY))}"
