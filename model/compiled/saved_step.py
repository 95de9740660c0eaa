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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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
    """A function for a CPU, compiled once and then loaded from disk.

    The file holds a SHA-256 of the rest, a line of JSON with the SHA-256 of every kernel library
    that the step calls, and what torch saves, which holds no weights. It is trusted like the
    libraries beside it.

    Args:
        compiled: Makes what torch.compile returns; not called when the step is loaded.
        path: Where it is kept, in the folder of Inductor's cache; the name must tell apart
            everything that its code depends on.
    """

    def __init__(self, compiled: Callable[[], Callable[..., Any]], path: Path) -> None:
        self._compiled = compiled
        self._path = path
        self._step: Any = None

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
        header, _, body = payload.partition(b"\n")
        kernels: dict[str, str] = json.loads(header)
        if not self._use_kernels(kernels):
            return False
        try:
            self._step = torch.compiler.load_compiled_function(io.BytesIO(body))
        except _LOAD_ERRORS as error:
            from torch._inductor import utils

            logger.warning("%s does not load, compiling it again: %r", self._path, error)
            utils.clear_caches()  # of failures, too
            return False
        return True

    def __call__(self, *args: object) -> Any:
        """Calls the step; compiles and saves it first if it isn't ready.

        Args:
            args: Their shapes and dtypes, at the first call, are what the step accepts.

        Returns:
            What the function returns.

        Raises:
            RuntimeError: Other shapes or dtypes than the step's, or the compiler fails.
        """
        if self._step is None:
            # Off by default up to torch 2.11.
            with torch._dynamo.config.patch(enable_aot_compile=True):
                compiled: Any = self._compiled()
                self._step = compiled.aot_compile((args, {}))
            try:
                self._save()
            except OSError as error:
                logger.warning("the next start compiles again, a step can't be saved: %s", error)
        return self._step(*args)

    def _save(self) -> None:
        folder = self._path.parent
        header = json.dumps({path: _digest(folder / path) for path in _loaded_kernels(folder)})
        with tempfile.TemporaryDirectory(dir=folder) as work:
            saved, whole = Path(work, "torch"), Path(work, "whole")
            self._step.save_compiled_function(str(saved))
            payload = header.encode() + b"\n" + saved.read_bytes()
            whole.write_bytes(hashlib.sha256(payload).digest() + payload)
            whole.chmod(0o600)
            os.replace(whole, self._path)

    def _use_kernels(self, kernels: dict[str, str]) -> bool:
        """Hands Inductor the step's libraries, if all are there.

        Those it has it doesn't prepare to compile: that would run the preprocessor over torch's
        headers for each, or compile them first.
        """
        from torch._inductor.codecache import CppPythonBindingsCodeCache

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
        if not whole:
            return False
        for path in kernels:
            key = Path(path).name.partition(".")[0]
            load = functools.partial(
                CppPythonBindingsCodeCache._load_library, str(folder / path), key
            )
            CppPythonBindingsCodeCache.cache.setdefault(key, load)
        return True


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
