"""A compiled step that needs neither Dynamo nor Inductor to be loaded."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import KVCache
from .wrapper_code import NAMESPACE, UnknownCodeError, cut_down

__all__ = ["FrozenStep", "UnknownCodeError", "freeze", "step_tensors"]

_INPUT, _CACHE = "input ", "cache "  # before an index; no module is called so
_ADDRESS = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"  # where kernels look for torch's function
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# What code that this torch doesn't run as it is can end in.
_RUN_ERRORS = (AttributeError, ImportError, NameError, OSError, RuntimeError, TypeError, ValueError)

_Run = Callable[..., Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenStep:
    """The code of one step, and what it is called with.

    Attributes:
        code: Python that defines `call`, see wrapper_code.
        kernels: Name in the code to the library that has it, relative to Inductor's folder.
        arguments: What `call` takes, in its order: names of step_tensors, or inputs by index.
        inputs: Of each input of the step its shape and dtype.
    """

    code: str
    kernels: Mapping[str, str]
    arguments: Sequence[str]
    inputs: Sequence[tuple[Sequence[int], str]]

    @classmethod
    def from_json(cls, text: bytes) -> FrozenStep:
        """Reads what to_json wrote."""
        return cls(**json.loads(text))

    def to_json(self) -> bytes:
        """Writes it down."""
        return json.dumps(asdict(self)).encode()

    def bind(self, folder: Path, tensors: Mapping[str, Tensor]) -> _Run:
        """Makes it callable.

        Args:
            folder: Inductor's.
            tensors: The weights and cache that it uses from now on; see step_tensors.

        Returns:
            From the step's inputs to logits; a RuntimeError for other shapes or dtypes.

        Raises:
            ImportError: A kernel's library can't be loaded.
            KeyError: A tensor is missing.
        """
        namespace: dict[str, Any] = {"__name__": "step", **NAMESPACE}
        for name, path in self.kernels.items():
            namespace[name] = _load_kernel(folder / path)
        exec(compile(self.code, "step", "exec"), namespace)  # noqa: S102 - a step is a program
        call = namespace["call"]
        indices = {f"{_INPUT}{index}": index for index in range(len(self.inputs))}
        fixed = [tensors[name] if name not in indices else None for name in self.arguments]
        varying = [(at, indices[n]) for at, n in enumerate(self.arguments) if n in indices]
        expected = [(tuple(shape), dtype) for shape, dtype in self.inputs]

        def run(*inputs: Tensor) -> Tensor:
            given = [*map(_describe, inputs)]
            if given != expected:
                raise RuntimeError(f"a compiled step takes inputs of {expected}, not {given}")
            arguments: list[Tensor | None] = [*fixed]
            for at, index in varying:
                arguments[at] = inputs[index]
            (logits,) = call(arguments)
            return logits

        return run


def step_tensors(model: nn.Module, cache: KVCache) -> dict[str, Tensor]:
    """What a step uses besides its inputs, by name.

    Args:
        model: Supplies parameters and buffers, which keep their names.
        cache: Supplies its buffers.

    Returns:
        The tensors.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    return named | {f"{_CACHE}{index}": buffer for index, buffer in enumerate(cache.buffers)}


def freeze(
    step: _Run,
    model: nn.Module,
    attention: nn.Module,
    cache: KVCache,
    inputs: Sequence[Tensor],
    *,
    folder: Path,
) -> FrozenStep:
    """Takes a compiled step's code out of torch's hands.

    Both are run on caches of their own, and must agree to the last bit.

    Args:
        step: What torch compiled; takes what is next.
        model: Its model.
        attention: Its attention.
        cache: One of the shapes it writes; neither read nor written.
        inputs: What it is called with.
        folder: Inductor's.

    Returns:
        The frozen step.

    Raises:
        UnknownCodeError: It has something that is not known, or computes something else.
    """
    expected_cache, own_cache = _empty_like(cache), _empty_like(cache)
    with _recorded_calls() as calls:
        expected = step(model, attention, expected_cache, *inputs)
    if len(calls) != 1:
        raise UnknownCodeError(f"it is {len(calls)} pieces of code")
    [(call, arguments)] = calls
    tensors = step_tensors(model, expected_cache)
    tensors |= {f"{_INPUT}{index}": tensor for index, tensor in enumerate(inputs)}
    names = {_place(tensor): name for name, tensor in tensors.items()}
    try:
        code, kernels = cut_down(Path(call.__code__.co_filename).read_text())
        found = call.__globals__
        frozen = FrozenStep(
            code=code,
            kernels={
                name: os.path.relpath(found[name].__self__.__file__, folder) for name in kernels
            },
            arguments=[names[_place(argument)] for argument in arguments],
            inputs=[*map(_describe, inputs)],
        )
        run = FrozenStep.from_json(frozen.to_json()).bind(folder, step_tensors(model, own_cache))
        given = run(*inputs)
    except KeyError as error:
        raise UnknownCodeError(
            f"it takes something that is no tensor of the model: {error}"
        ) from error
    except _RUN_ERRORS as error:
        if isinstance(error, UnknownCodeError):
            raise
        raise UnknownCodeError(f"its code does not run by itself: {error!r}") from error
    pairs = zip((expected, *expected_cache.buffers), (given, *own_cache.buffers), strict=True)
    if not all(_are_same_bits(*pair) for pair in pairs):
        raise UnknownCodeError("its code computes something else by itself")
    return frozen


@contextlib.contextmanager
def _recorded_calls() -> Iterator[list[tuple[Any, tuple[Any, ...]]]]:
    """Notes which generated functions torch calls meanwhile, and with what."""
    from torch._inductor.output_code import CompiledFxGraph

    calls: list[tuple[Any, tuple[Any, ...]]] = []
    original = CompiledFxGraph.__call__

    def record(self: CompiledFxGraph, inputs: Sequence[Any]) -> Any:
        calls.append((self.current_callable, tuple(inputs)))
        return original(self, inputs)

    CompiledFxGraph.__call__ = record
    try:
        yield calls
    finally:
        CompiledFxGraph.__call__ = original


def _load_kernel(path: Path) -> Callable[..., None]:
    torch_c: Any = torch._C  # its stubs lack this part
    os.environ[_ADDRESS] = str(torch_c._dynamo.guards._torchinductor_pyobject_tensor_data_ptr)
    spec = importlib.util.spec_from_file_location(f"{path.name.partition('.')[0]}.kernel", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.kernel


def _empty_like(cache: KVCache) -> KVCache:
    """Zeros that take no memory until they are written."""

    def empty(buffer: Tensor) -> Tensor:
        return torch.frombuffer(mmap.mmap(-1, buffer.nbytes), dtype=buffer.dtype).view(buffer.shape)

    return KVCache(tuple(tuple(map(empty, layer)) for layer in cache.layers))


def _describe(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(tensor.shape), str(tensor.dtype)


def _place(tensor: Tensor) -> tuple[object, ...]:
    """What tells two tensors apart, but for those that are the same memory in the same form."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _are_same_bits(a: Tensor, b: Tensor) -> bool:
    if _describe(a) != _describe(b):
        return False
    number = _SAME_SIZE[a.dtype.itemsize]  # NaN equals itself
    return torch.equal(a.contiguous().view(number), b.contiguous().view(number))
