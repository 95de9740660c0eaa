"""How a GPU's kernels begin while the ones before them end (programmatic dependent launch).

Such a kernel asks for its weights, which nobody writes, and then waits before it reads or writes
anything else. As each waits for the end of the one before it, what an earlier one wrote is there,
too, and what an earlier one still reads isn't overwritten.

Triton comes with the CUDA builds of torch alone, so this module is imported where it is needed.
"""

# Triton's own types don't know how a kernel is called.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

__all__ = ["begin_next", "overlap", "wait_for_inputs"]


@functools.cache
def overlap(device: torch.device) -> dict[str, bool]:
    """Whether kernels overlap there, as a kernel's and Triton's options: on Hopper and later."""
    overlaps = (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )
    return {"OVERLAPS": True, "launch_pdl": True} if overlaps else {"OVERLAPS": False}


@triton.jit
def wait_for_inputs(OVERLAPS: tl.constexpr):
    """Lets the next kernel begin, then waits until the one before has ended."""
    begin_next(OVERLAPS)
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()


@triton.jit
def begin_next(OVERLAPS: tl.constexpr):
    """Lets the next kernel begin, once all programs of this one have."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
