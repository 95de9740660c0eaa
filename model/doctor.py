"""What the torch backends need, and what of it is here."""

from __future__ import annotations

import torch

from ..runtime.cli.doctor import Finding, torch_finding
from .compiled.inductor import compiler_problem
from .toolchain import compiler_version

__all__ = ["torch_findings"]


def torch_findings() -> list[Finding]:
    """Looks for a compiler and a GPU.

    Returns:
        One finding for each way to run in torch.
    """
    found = f"torch {torch.__version__}"
    problem = compiler_problem()
    compiler = found if problem else f"{found}, {compiler_version()}"
    return [
        torch_finding("torch-eager", found, None),
        torch_finding("torch-compile", compiler, problem),
        torch_finding("torch-cuda", _cuda_version(), _cuda_problem()),
    ]


def _cuda_version() -> str:
    built = f"torch {torch.__version__}"
    return f"{built}, CUDA {torch.version.cuda}" if torch.version.cuda else built


def _cuda_problem() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return f"{_cuda_version()} finds no GPU; see nvidia-smi"
    return None
