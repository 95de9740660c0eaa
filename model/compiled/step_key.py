"""What a compiled step's code depends on, in one digest."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import linear
from ..kernels.many_rows import DTYPES_IN_CPP
from ..toolchain import instruction_set

__all__ = ["step_key"]

_ROOM = Path(__file__).parents[1]
_SOURCES = (_ROOM, _ROOM / "compiled", _ROOM / "kernels")  # not the checkpoints' or the demo's
_KINDS = ("py", "cpp", "h")


def step_key(
    modules: tuple[nn.Module, ...],
    cache: tuple[Tensor, ...],
    *,
    world_size: int = 1,
    **facts: object,
) -> str:
    """Digests everything that shapes a step, so that two steps share it only when they are equal.

    Args:
        modules: What is traced: their modules' classes and plain attributes, and of every
            parameter and buffer its name, shape, dtype and stride.
        cache: The buffers it writes; their shapes, dtypes and strides.
        world_size: Processes that compute it together.
        facts: What else is constant in it, told apart by its repr.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for source in _sources(modules):
        digest.update(source.read_bytes())
    described = [*map(_describe, cache)]
    for module in modules:
        described += _describe_modules(module)
    machine = (
        torch.__version__,
        platform.python_version(),
        torch.backends.cpu.get_cpu_capability(),
        instruction_set(),
        sorted(map(str, linear.STORAGE_DTYPES)),
        sorted(map(str, DTYPES_IN_CPP)),
        torch.get_num_threads(),  # the number is in the code
    )
    digest.update(repr((machine, described, ("world_size", world_size), facts)).encode())
    return digest.hexdigest()[:32]


def _sources(modules: tuple[nn.Module, ...]) -> list[Path]:
    """The files that are traced: the rooms', and those of classes from elsewhere."""
    files = {path for folder in _SOURCES for kind in _KINDS for path in folder.glob(f"*.{kind}")}
    classes = {type(module) for root in modules for module in root.modules()}
    for name in {kind.__module__ for kind in classes}:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None and not name.startswith("torch."):
            files.add(Path(file))
    return sorted(files)


def _describe_modules(root: nn.Module) -> Iterator[tuple[object, ...]]:
    for name, module in root.named_modules(remove_duplicate=False):
        kind = type(module)
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str | torch.dtype)
        }
        yield name, kind.__module__, kind.__qualname__, sorted(plain.items())
    names: dict[int, str] = {}  # a tied weight is one input of the step
    tensors = (*root.named_parameters(remove_duplicate=False), *root.named_buffers())
    for name, tensor in tensors:
        yield name, names.setdefault(id(tensor), name), *_describe(tensor)


def _describe(tensor: Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.stride(), tensor.device.type
