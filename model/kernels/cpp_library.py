"""Libraries in C++ that the machine which runs them compiles, once."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ...runtime.cache_folder import cache_folder
from ..toolchain import compiler_name, compiler_version, instruction_set

__all__ = ["load_library"]

logger = logging.getLogger(__name__)

# Without the traps and errno that nobody asks for, loops with conditions become vectors.
_FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fPIC", "-fno-trapping-math", "-fno-math-errno")
_DIGEST_BYTES = 32


def load_library(sources: tuple[Path, ...], *options: str) -> ctypes.CDLL | None:
    """Compiles a library, or finds it in the user's cache.

    The file ends in the SHA-256 of what is before, which a loader passes over. It is written under
    another name and renamed, so that processes may do so at the same time.

    Args:
        sources: Files in C++; all headers beside them count as theirs.
        options: Of the compiler; none is what this processor has.

    Returns:
        The library, or None, which is logged, where the compiler is missing or fails, or the folder
        can't be written.
    """
    version = compiler_version()
    if version is None:
        logger.info("%s: no library, the compiler %s is missing", sources[0].name, compiler_name())
        return None
    options = options or ("-march=native",)
    facts = (version, instruction_set(), _FLAGS, options, torch.__version__)
    digest = hashlib.sha256(repr(facts).encode())
    for source in (*sources, *sorted(sources[0].parent.glob("*.h"))):
        digest.update(source.read_bytes())
    try:
        folder = cache_folder("kernels")
        path = folder / f"{sources[0].stem}-{digest.hexdigest()[:32]}.so"
        if not _is_intact(path):
            _compile(sources, path, options)
        return ctypes.CDLL(str(path))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        logger.info("%s: no library, %s", sources[0].name, said.strip())
        return None


def _is_intact(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    if hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]:
        return True
    logger.info("%s is damaged; compiling it again", path)
    return False


def _compile(sources: tuple[Path, ...], path: Path, options: tuple[str, ...]) -> None:
    """Compiles the files side by side, then links them."""
    libraries = [option for option in options if option.startswith(("-L", "-l"))]
    rest = [option for option in options if option not in libraries]
    with tempfile.TemporaryDirectory(dir=path.parent) as work, ThreadPoolExecutor() as pool:
        objects = [str(Path(work, f"{source.stem}.o")) for source in sources]
        commands = [
            (*_FLAGS, *rest, "-c", "-o", made, str(source))
            for source, made in zip(sources, objects, strict=True)
        ]
        _ = [*pool.map(_run_compiler, commands)]
        made = Path(work, path.name)
        _run_compiler((*_FLAGS, *rest, "-shared", "-o", str(made), *objects, *libraries))
        with made.open("r+b") as file:
            file.write(hashlib.sha256(file.read()).digest())
        os.replace(made, path)


def _run_compiler(arguments: tuple[str, ...]) -> None:
    subprocess.run([compiler_name(), *arguments], capture_output=True, text=True, check=True)
