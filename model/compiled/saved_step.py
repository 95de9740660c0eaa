"""A compiled step on disk: a process that finds it there traces nothing."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import KVCache
from .frozen_step import FrozenStep, UnknownCodeError, freeze, step_tensors
from .inductor import import_compiler

__all__ = ["SavedStep"]

logger = logging.getLogger(__name__)

# What an intact file can end in where torch or the system around it has changed.
_LOAD_ERRORS = (
    AttributeError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)
_DIGEST_BYTES = 32


class SavedStep:
    """A step for a CPU, compiled once and then loaded from disk.

    The file holds a SHA-256 of the rest, a line of JSON with the SHA-256 of every kernel library
    that the step calls, and its code, without weights. It is trusted like the libraries beside it.
    The code is a FrozenStep, which loads without Dynamo and Inductor; where this torch generates
    something that a FrozenStep doesn't know, it is what torch saves.

    Args:
        compiled: Makes what torch.compile returns, which takes the next three and the step's
            inputs; not called when the step is loaded.
        path: Where it is kept, in the folder of Inductor's cache; the name must tell apart
            everything that its code depends on.
        model: The weights.
        attention: The seam; has none.
        cache: What the step writes.
    """

    def __init__(
        self,
        compiled: Callable[[], Callable[..., Any]],
        path: Path,
        model: nn.Module,
        attention: nn.Module,
        cache: KVCache,
    ) -> None:
        self._compiled = compiled
        self._path = path
        self._constants = model, attention, cache
        self._step: Callable[..., Tensor] | None = None

    def load(self) -> bool:
        """Makes the step ready if it was saved before; tells whether it was."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return False
        except OSError as error:
            logger.warning("a compiled step can't be read, compiling it again: %s", error)
            return False
        payload = content[_DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != content[:_DIGEST_BYTES]:
            logger.info("%s is damaged; compiling it again", self._path)
            return False
        line, _, body = payload.partition(b"\n")
        try:
            header = json.loads(line)
            kernels: dict[str, str] = header["kernels"]
            if not self._has_kernels(kernels):
                return False
            if header["is_frozen"]:
                self._step = self._bind(FrozenStep.from_json(body))
            else:
                self._step = self._load_torchs(body, kernels)
        except _LOAD_ERRORS as error:
            logger.warning("%s does not load, compiling it again: %r", self._path, error)
            return False
        return True

    def forget(self) -> None:
        """Undoes `load`: the next call compiles the step."""
        self._step = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Calls the step; compiles and saves it first if it isn't ready.

        Args:
            inputs: Their shapes and dtypes, at the first call, are what the step accepts.

        Returns:
            The logits.

        Raises:
            RuntimeError: Other shapes or dtypes than the step's, or the compiler fails.
        """
        if self._step is None:
            import_compiler()
            # Off by default up to torch 2.11.
            with torch._dynamo.config.patch(enable_aot_compile=True):
                compiled: Any = self._compiled()
                torchs = compiled.aot_compile(((*self._constants, *inputs), {}))
            frozen = self._freeze(torchs, inputs)
            bound = functools.partial(torchs, *self._constants)
            self._step = bound if frozen is None else self._bind(frozen)
            try:
                self._save(torchs if frozen is None else frozen)
            except OSError as error:
                logger.warning("the next start compiles again, a step can't be saved: %s", error)
        return self._step(*inputs)

    def _freeze(self, torchs: Any, inputs: tuple[Tensor, ...]) -> FrozenStep | None:
        try:
            return freeze(torchs, *self._constants, inputs, folder=self._path.parent)
        except UnknownCodeError as error:
            logger.info("%s will load slowly, with torch's compiler: %s", self._path.name, error)
            return None

    def _bind(self, frozen: FrozenStep) -> Callable[..., Tensor]:
        model, _, cache = self._constants
        return frozen.bind(self._path.parent, step_tensors(model, cache))

    def _save(self, step: Any) -> None:
        """Writes a FrozenStep, or what torch compiled."""
        folder, is_frozen = self._path.parent, isinstance(step, FrozenStep)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            saved, whole = Path(work, "torch"), Path(work, "whole")
            if is_frozen:
                kernels, body = sorted({*step.kernels.values()}), step.to_json()
            else:
                step.save_compiled_function(str(saved))
                kernels, body = _loaded_kernels(folder), saved.read_bytes()
            digests = {path: _digest(folder / path) for path in kernels}
            header = json.dumps({"is_frozen": is_frozen, "kernels": digests})
            payload = header.encode() + b"\n" + body
            whole.write_bytes(hashlib.sha256(payload).digest() + payload)
            whole.chmod(0o600)
            os.replace(whole, self._path)

    def _has_kernels(self, kernels: dict[str, str]) -> bool:
        folder, whole = self._path.parent, True
        for path, digest in kernels.items():
            library = folder / path
            if not library.exists():
                logger.info("%s is gone; compiling %s again", library, self._path.name)
                whole = False
            elif _digest(library) != digest:
                logger.info("%s is damaged; compiling %s again", library, self._path.name)
                library.unlink()  # Inductor takes any file of this name for the library
                whole = False
        return whole

    def _load_torchs(self, body: bytes, kernels: Iterable[str]) -> Callable[..., Tensor]:
        """Hands Inductor the step's libraries first.

        Those it has it doesn't prepare to compile: that would run the preprocessor over torch's
        headers for each, or compile them first.
        """
        import_compiler()
        from torch._inductor import utils
        from torch._inductor.codecache import CppPythonBindingsCodeCache

        for path in kernels:
            key = Path(path).name.partition(".")[0]
            load = functools.partial(
                CppPythonBindingsCodeCache._load_library, str(self._path.parent / path), key
            )
            CppPythonBindingsCodeCache.cache.setdefault(key, load)
        try:
            step = torch.compiler.load_compiled_function(io.BytesIO(body))
        except _LOAD_ERRORS:
            utils.clear_caches()  # of failures, too
            raise
        return functools.partial(step, *self._constants)


def _loaded_kernels(folder: Path) -> list[str]:
    """The kernel libraries that this process has loaded, relative to Inductor's folder."""
    files = (getattr(module, "__file__", None) or "" for module in list(sys.modules.values()))
    return sorted(
        str(Path(file).relative_to(folder))
        for file in files
        if file.startswith(f"{folder}{os.sep}") and file.endswith(".so")
    )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
