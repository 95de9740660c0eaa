"""What each backend needs, and what of it is here.

Works with nothing but the base dependencies: what isn't installed is what it is asked about.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..cache_folder import cache_root, cache_sizes
from ..memory import available_bytes, format_bytes
from ..ort.gpu_libraries import Gpu, find_gpu
from ..ort.providers import (
    ORT_PACKAGES,
    TENSORRT_PACKAGES,
    installed_versions,
    provider_problem,
)
from .terminal import emit
from .text_table import format_table

__all__ = [
    "Diagnosis",
    "Finding",
    "describe_diagnosis",
    "doctor",
    "examine",
    "format_diagnosis",
    "torch_finding",
    "without_torch",
]

_EXPORT_MODULES = ("torch", "onnx", "onnxscript")
_CHECK_MODULES = ("onnxruntime_ep_nv_tensorrt_rtx", "tensorrt_rtx_bindings")
_CHECK_PACKAGES = ("onnxruntime-ep-nv-tensorrt-rtx", "tensorrt-rtx-cu13-bindings")

_TORCH_NEEDS = {
    "torch-eager": "torch",
    "torch-compile": "torch, a C++ compiler, Python.h",
    "torch-cuda": "torch for CUDA, a GPU",
}
_PROVIDER_NEEDS = {
    "cpu": "onnxruntime",
    "cuda": "onnxruntime-gpu, CUDA, cuDNN 9, a GPU",
    "tensorrt": "onnxruntime-gpu, CUDA, TensorRT 10, a GPU",
}


def doctor(args: argparse.Namespace) -> int:
    """Prints what is here, as a table or as JSON; the exit code is 0."""
    try:
        from ...model.doctor import torch_findings
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        found = without_torch()
    else:
        found = torch_findings()
    diagnosis = examine(found)
    emit(json.dumps(describe_diagnosis(diagnosis)) if args.json else format_diagnosis(diagnosis))
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One backend, or one thing that llamac can do.

    Attributes:
        name: Such as "torch-compile" or "ort-cuda".
        needs: In a few words.
        found: The versions that are here, "" if there are none.
        problem: One line: what is missing and what mends it; None if nothing is.
    """

    name: str
    needs: str
    found: str
    problem: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The machine, and a finding for every backend.

    Attributes:
        llamac: Its version.
        python: Its version.
        platform: The operating system.
        num_cpus: Logical processors.
        available_bytes: Memory that a new allocation can take.
        total_bytes: Memory of the machine.
        gpu: The first one, or None.
        cache_folder: Where compiled code and engines are kept.
        cache_bytes: How much each cache holds.
        findings: One a backend.
    """

    llamac: str
    python: str
    platform: str
    num_cpus: int
    available_bytes: int
    total_bytes: int
    gpu: Gpu | None
    cache_folder: Path
    cache_bytes: dict[str, int]
    findings: tuple[Finding, ...]


def examine(torch_findings: Sequence[Finding]) -> Diagnosis:
    """Looks at this machine.

    Args:
        torch_findings: Of the torch backends: llamac.model.doctor's, or without_torch's.

    Returns:
        The diagnosis.
    """
    export = Finding(
        name="export",
        needs=", ".join(_EXPORT_MODULES),
        found=installed_versions(_EXPORT_MODULES),
        problem=_import_problem(_EXPORT_MODULES, "export"),
    )
    providers = [
        Finding(
            name=f"ort-{provider}",
            needs=needs,
            found=installed_versions(
                (*ORT_PACKAGES, *(TENSORRT_PACKAGES if provider == "tensorrt" else ()))
            ),
            problem=provider_problem(provider),
        )
        for provider, needs in _PROVIDER_NEEDS.items()
    ]
    check = Finding(
        name="tensorrt-check",
        needs="TensorRT for RTX and its bindings",
        found=installed_versions(_CHECK_PACKAGES),
        problem=_spec_problem(_CHECK_MODULES, "tensorrt-check"),
    )
    return Diagnosis(
        llamac=version("llamac"),
        python=platform.python_version(),
        platform=platform.platform(),
        num_cpus=os.cpu_count() or 1,
        available_bytes=available_bytes(),
        total_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        gpu=find_gpu(),
        cache_folder=cache_root(),
        cache_bytes=cache_sizes(),
        findings=(*torch_findings, export, *providers, check),
    )


def torch_finding(name: str, found: str, problem: str | None) -> Finding:
    """Makes the finding of a torch backend.

    Args:
        name: "torch-eager", "torch-compile" or "torch-cuda".
        found: See Finding.
        problem: See Finding.

    Returns:
        The finding.
    """
    return Finding(name=name, needs=_TORCH_NEEDS[name], found=found, problem=problem)


def without_torch() -> list[Finding]:
    """The findings of the torch backends where torch is not installed."""
    problem = "torch is not installed; pip install 'llamac[torch]'"
    return [torch_finding(name, "", problem) for name in _TORCH_NEEDS]


def describe_diagnosis(diagnosis: Diagnosis) -> dict[str, Any]:
    """Turns a diagnosis into what `llamac doctor --json` prints.

    Args:
        diagnosis: What examine returned.

    Returns:
        Values that JSON takes; sizes are in bytes.
    """
    about = asdict(diagnosis)
    about["cache_folder"] = str(diagnosis.cache_folder)
    about["findings"] = {
        finding.name: {
            "ready": finding.problem is None,
            "needs": finding.needs,
            "found": finding.found,
            "problem": finding.problem,
        }
        for finding in diagnosis.findings
    }
    return about


def format_diagnosis(diagnosis: Diagnosis) -> str:
    """Writes a diagnosis as people read it.

    Args:
        diagnosis: What examine returned.

    Returns:
        Two tables: the machine, the backends.
    """
    gpu = diagnosis.gpu
    machine = [
        ("llamac", f"{diagnosis.llamac}, Python {diagnosis.python}, {diagnosis.platform}"),
        ("processors", str(diagnosis.num_cpus)),
        (
            "memory",
            f"{format_bytes(diagnosis.available_bytes)} free of "
            f"{format_bytes(diagnosis.total_bytes)}",
        ),
        (
            "GPU",
            f"{gpu.name}, compute capability {gpu.compute_capability}, driver for CUDA "
            f"{gpu.driver_cuda}"
            if gpu
            else "none",
        ),
        ("cache", f"{diagnosis.cache_folder}: {_format_sizes(diagnosis.cache_bytes)}"),
    ]
    backends = [("backend", "", "needs", "here"), *map(_row, diagnosis.findings)]
    return f"{format_table(machine)}\n\n{format_table(backends)}"


def _format_sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items()) or "empty"


def _row(finding: Finding) -> tuple[str, str, str, str]:
    if finding.problem is None:
        return finding.name, "ready", finding.needs, finding.found
    return finding.name, "missing", finding.needs, finding.problem


def _import_problem(modules: Sequence[str], extra: str) -> str | None:
    try:
        for module in modules:
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed; pip install 'llamac[{extra}]'"
    return None


def _spec_problem(modules: Sequence[str], extra: str) -> str | None:
    """Like _import_problem for modules that can't be imported by themselves."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return f"{missing[0]} is not installed; pip install 'llamac[{extra}]'" if missing else None
