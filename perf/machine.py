"""Where and of what a measurement was made."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = [
    "describe_cpu",
    "describe_machine",
    "device_used_bytes",
    "find_commit",
    "package_versions",
]

_PACKAGES = (
    "llamac",
    "numpy",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "transformers",
    "onnxruntime-genai",
    "llama-cpp-python",
)
_VECTORS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")  # the widest first


def describe_machine() -> dict[str, Any]:
    """Names the processor, its cores, the memory, the GPU if there is one, and the load."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": describe_cpu(Path("/proc/cpuinfo").read_text()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": pages,
        "gpu": _query_gpu("name"),
        "driver": _query_gpu("driver_version"),
        "system": platform.platform(),
        "load_average": os.getloadavg()[0],
    }


def package_versions() -> dict[str, str]:
    """Versions of what is installed among the packages that matter here."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def find_commit() -> str | None:
    """The commit of the source tree, with a + if files differ from it; None outside one."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    # Installed below somebody else's repository, this file isn't one of its own.
    if _run([*git, "ls-files", "--error-unmatch", here.name]) is None:
        return None
    head = _run([*git, "rev-parse", "--short=12", "HEAD"])
    changes = _run([*git, "status", "--porcelain", "--untracked-files=no"])
    return None if head is None else head + ("+" if changes else "")


def device_used_bytes() -> int | None:
    """Memory in use on the first GPU, by anyone; None without one."""
    used = _query_gpu("memory.used")
    return None if used is None else int(used) << 20


def describe_cpu(cpuinfo: str) -> str:
    """Names a processor, with what tells one "AMD EPYC" of a virtual machine from another.

    Args:
        cpuinfo: The text of /proc/cpuinfo.

    Returns:
        The name, the family, the model and the widest vector instructions.
    """
    lines = (line.partition(":") for line in cpuinfo.partition("\n\n")[0].splitlines())
    facts = {key.strip(): value.strip() for key, _, value in lines}
    flags = facts.get("flags", "").split()
    details = [f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    details += [name for name in _VECTORS if name in flags][:1]
    name = facts.get("model name", platform.processor())
    return f"{name} ({', '.join(details)})" if details else name


def _query_gpu(field: str) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    output = _run(query)
    return output.splitlines()[0] if output else None


def _run(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
