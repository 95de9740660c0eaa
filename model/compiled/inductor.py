"""torch's compiler and Triton here: what they need, where their files are, how they fail."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import shutil
import subprocess
import sysconfig
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from ...runtime.backend import BackendUnavailableError
from ...runtime.cache_folder import cache_folder
from ..toolchain import compiler_name, compiler_version

__all__ = [
    "cache_misses",
    "compiler",
    "compiler_problem",
    "import_compiler",
    "kernel_compiler",
]

logger = logging.getLogger(__name__)

_FOLDER_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_KERNEL_VARIABLE = "TRITON_CACHE_DIR"
_ROOM = "free space on its disk, or set XDG_CACHE_HOME to a folder that can be written"


def compiler_problem() -> str | None:
    """What torch.compile lacks on this machine's CPU, in a few words, or None."""
    name = compiler_name()
    if shutil.which(name) is None:
        return (
            f"no C++ compiler ({name}) found, which torch.compile needs on CPU; install it, or set "
            "CXX to the name of one, without options"
        )
    if compiler_version() is None:
        return f"the C++ compiler ({name}) does not run, which torch.compile needs on CPU; set CXX"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return f"{header} not found, which torch.compile needs on CPU; install python3-dev"
    return None


def cache_misses() -> int:
    """Graphs that this process compiled because no cache had them."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["fxgraph_cache_miss"]


@contextlib.contextmanager
def compiler() -> Iterator[Path]:
    """Prepares for torch's compiler, with its files in a folder of the user's; imports none of it.

    Yields:
        The folder: the one TORCHINDUCTOR_CACHE_DIR names, or else below the user's cache.

    Raises:
        BackendUnavailableError: The folder can't be written, the compiler or its disk fails.
    """
    with _no_collection(), _failures_in_one_line(), warnings.catch_warnings():
        # float32 was asked for; that TF32 would be faster is no news.
        warnings.filterwarnings("ignore", "TensorFloat32")
        # Packed weights' scales are float16 in many files, whatever is computed in.
        warnings.filterwarnings("ignore", "bf16 and fp16 are mixed")
        given = os.environ.get(_FOLDER_VARIABLE)
        folder = cache_folder("inductor") if given is None or _is_default(given) else Path(given)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[_FOLDER_VARIABLE] = str(folder)
        try:
            yield folder
        finally:
            del os.environ[_FOLDER_VARIABLE]
            if given is not None:
                os.environ[_FOLDER_VARIABLE] = given


@contextlib.contextmanager
def kernel_compiler() -> Iterator[Path]:
    """Prepares for Triton, with its files in a folder of the user's.

    Yields:
        The folder: the one TRITON_CACHE_DIR names, or else below the user's cache.

    Raises:
        BackendUnavailableError: The folder can't be written, or the C compiler that Triton needs is
            missing or fails.
    """
    given = os.environ.get(_KERNEL_VARIABLE)
    folder = cache_folder("triton") if given is None else Path(given)
    os.environ[_KERNEL_VARIABLE] = str(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except (OSError, subprocess.CalledProcessError) as error:
        raise _unavailable(error, f"a kernel can't be compiled: {error}", _ROOM) from error
    except RuntimeError as error:
        if "C compiler" not in str(error):
            raise
        what = "no C compiler found, which Triton needs"
        raise _unavailable(error, what, "install gcc, or set CC") from error
    finally:
        del os.environ[_KERNEL_VARIABLE]
        if given is not None:
            os.environ[_KERNEL_VARIABLE] = given


def import_compiler() -> None:
    """Imports Dynamo, and lets Inductor try out the processor's vector instructions meanwhile.

    That waits for programs of its own, and must be through before anything is compiled: the probe
    changes the compiler flags that it shares with every kernel, so a second one at the same time
    leaves other flags behind, and kernels that no later process finds on disk.

    Raises:
        OSError: The probe's files can't be written.
        RuntimeError: The C++ compiler fails.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    failures: list[Exception] = []

    def pick() -> None:
        try:
            pick_vec_isa()
        except (OSError, RuntimeError) as error:
            failures.append(error)

    probe = threading.Thread(target=pick)
    probe.start()
    importlib.import_module("torch._dynamo")
    probe.join()
    if failures:
        raise failures[0]


def _is_default(folder: str) -> bool:
    """Whether Inductor chose it, in this process or the one before, and not the user."""
    path = Path(folder)
    return path.parent == Path(tempfile.gettempdir()) and path.name.startswith("torchinductor_")


@contextlib.contextmanager
def _failures_in_one_line() -> Iterator[None]:
    """Names what failed and what to do; torch's own account goes to the log."""
    try:
        yield
    except OSError as error:
        raise _unavailable(error, _fault(error), _ROOM) from error
    except RuntimeError as error:
        from torch._dynamo.exc import BackendCompilerFailed
        from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

        cause = getattr(error, "inner_exception", error)
        if isinstance(cause, CppCompileError):
            words = ("error", "failed", "No space")
            lines = cause.output.splitlines() or ["no output"]
            fault = next((line for line in lines if any(word in line for word in words)), lines[-1])
            what = f"the C++ compiler failed: {fault.strip()}"
            raise _unavailable(error, what, "free space on its disk, or set CXX") from error
        if isinstance(error, BackendCompilerFailed | InvalidCxxCompiler):
            raise _unavailable(error, _fault(cause), _ROOM) from error
        raise


def _fault(error: BaseException) -> str:
    return f"torch.compile failed: {' '.join(str(error).split())[:300]}"


def _unavailable(error: BaseException, what: str, remedy: str) -> BackendUnavailableError:
    logger.debug("compiling failed", exc_info=error)
    return BackendUnavailableError(f"{what}; {remedy}, or use --backend eager")


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A third faster imports, a tenth faster compilation: what they make would be walked often."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
