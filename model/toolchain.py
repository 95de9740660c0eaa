"""The C++ compiler and the processor of this machine, on which compiled code depends."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from pathlib import Path

__all__ = ["compiler_name", "compiler_version", "instruction_set", "is_amd"]

_CPU_FACTS = Path("/proc/cpuinfo")


def compiler_name() -> str:
    """The C++ compiler that Inductor calls, too."""
    return os.environ.get("CXX", "g++")


def compiler_version() -> str | None:
    """The first line of what the C++ compiler says of itself; None if it fails."""
    command = [compiler_name(), "--version"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.partition("\n")[0]


def instruction_set() -> str:
    """The processor's flags: torch's own name for it covers several that compile differently."""
    try:
        with _CPU_FACTS.open() as lines:
            return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor()


@functools.cache
def is_amd() -> bool:
    """Whether AMD made the processor."""
    try:
        with _CPU_FACTS.open() as lines:
            return any(line.startswith("vendor_id") and "AuthenticAMD" in line for line in lines)
    except OSError:
        return False
