"""A compiled step on disk: a process that finds it there traces nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

__all__ = ["SavedStep"]


class SavedStep:
    """A function for a CPU, compiled once and then loaded from disk.

    What is saved holds no weights. It lies in Inductor's cache folder and is trusted like it.

    Args:
        compiled: Makes what torch.compile returns; not called when the step is loaded.
        name: What the step is; begins the file's name.
        facts: What its code depends on besides torch, Python, the processor and this package's
            sources; told apart by their repr.
    """

    def __init__(self, compiled: Callable[[], Callable[..., Any]], name: str, *facts: object):
        self._compiled = compiled
        self._name = name
        self._facts = facts
        self._step: Any = None

    def load(self) -> bool:
        """Makes the step ready if it was saved before; tells whether it was."""
        from torch._inductor import codecache, utils

        with contextlib.suppress(FileNotFoundError), self._path().open("rb") as file:
            try:
                # Kernels that lie on disk need no header, yet Inductor would preprocess torch's,
                # or compile it if /tmp was emptied. A missing kernel's compilation fails at once.
                no_header = mock.Mock(return_value="no.h")
                with mock.patch.object(codecache, "_precompile_header", no_header):
                    self._step = torch.compiler.load_compiled_function(file)
            except Exception:
                # Whatever is wrong with a saved step, compiling it again mends it.
                utils.clear_caches()  # of failures, too
        return self._step is not None

    def __call__(self, *args: object) -> Any:
        """Calls the step; compiles and saves it first if it isn't ready.

        Args:
            args: Their shapes and dtypes, at the first call, are what the step accepts.

        Returns:
            What the function returns.

        Raises:
            RuntimeError: Other shapes or dtypes than the step's.
        """
        step = self._step
        if step is None:
            # Off by default up to torch 2.11.
            with torch._dynamo.config.patch(enable_aot_compile=True):
                compiled: Any = self._compiled()
                step = self._step = compiled.aot_compile((args, {}))
            step.save_compiled_function(str(self._path()))
            self._path().chmod(0o600)  # torch 2.11 leaves that to the umask
        return step(*args)

    def _path(self) -> Path:
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        return folder / f"{self._name}-{self._digest()}.step"

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for source in sorted(Path(__file__).parents[1].rglob("*.py")):
            digest.update(source.read_bytes())
        machine = (
            torch.__version__,
            platform.python_version(),
            torch.backends.cpu.get_cpu_capability(),
            torch.get_num_threads(),  # the number is in the code
        )
        digest.update(repr((*machine, *self._facts)).encode())
        return digest.hexdigest()[:32]
