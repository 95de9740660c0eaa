"""Where the time of a compiled decode step goes: its kernels, which add up to it."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch._C._autograd import DeviceType
from torch._inductor import config
from torch.profiler import ProfilerActivity, profile

from ..model.config import DTYPES
from ..model.load import load_backend
from ..runtime.cache_folder import cache_folder
from ..runtime.cli.options import OneLineParser
from ..runtime.cli.text_table import format_table
from .artifacts import find_model
from .machine import describe_machine

__all__ = ["KernelTime", "main", "own_times", "time_kernels"]

_WARM_UP = 3  # steps
_LEAST_SHARE = 0.003  # of the step, for a line of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """One kernel in a step.

    Attributes:
        name: What torch's profiler calls it.
        calls: In a step.
        step_s: Of all of them, without what they call.
    """

    name: str
    calls: float
    step_s: float


def main(words: Sequence[str]) -> int:
    """Measures and prints the table.

    Args:
        words: After `llamac bench`.

    Returns:
        0.

    Raises:
        ValueError: An option is refused.
        FileNotFoundError: There is no such checkpoint.
        BackendUnavailableError: Nothing can be compiled here.
    """
    args = _parser().parse_args(words)
    if min(args.batch_size, args.context, args.steps) < 1:
        raise ValueError("--batch-size, --context and --steps are above 0")
    model = find_model(
        args.model, dtype=args.dtype or "bfloat16", cache=cache_folder("bench"), announce=print
    )
    if model.bundle is not None:
        raise ValueError(f"{args.model} is a bundle; the kernels are those of a checkpoint")
    with _telling_kernels():
        backend = load_backend(
            model.folder,
            device=args.device,
            dtype=args.dtype,
            batch_size=args.batch_size,
            max_seq_len=args.context + 1,
            prefill_len=min(16, args.context),
            threads=args.threads,
        ).backend
    ids = np.zeros(args.batch_size, np.int64)
    positions = np.full(args.batch_size, args.context, np.int64)
    plain_s, profiled_s, kernels = time_kernels(
        lambda: backend.decode(ids, positions), num_steps=args.steps, device=args.device
    )
    machine = describe_machine()
    print(f"{model.name}, batch {args.batch_size}, {args.context} live rows, {machine['cpu']}")
    print(f"a step takes {1e3 * plain_s:.3f} ms, {1e3 * profiled_s:.3f} under the profiler")
    print(_table(kernels, profiled_s, model.config.num_hidden_layers))
    return 0


def time_kernels(
    step: Callable[[], object], *, num_steps: int, device: str = "cpu"
) -> tuple[float, float, list[KernelTime]]:
    """Times a step as it is, then under torch's profiler.

    Args:
        step: Runs it to its end.
        num_steps: How often.
        device: Whose kernels: "cpu" or "cuda".

    Returns:
        The median step's seconds, the mean under the profiler, and the kernels, the longest first;
        what no kernel accounts for is not among them.
    """
    for _ in range(_WARM_UP):
        step()
    plain_s = []
    for _ in range(num_steps):
        begin_s = time.perf_counter()
        step()
        plain_s.append(time.perf_counter() - begin_s)
    on_gpu = device == "cuda"
    with profile(
        activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    ) as profiler:
        begin_s = time.perf_counter()
        for _ in range(num_steps):
            step()
        profiled_s = (time.perf_counter() - begin_s) / num_steps
    if on_gpu:
        spans = [
            (event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events() or ()
            if event.device_type == DeviceType.CUDA
        ]
        totals = own_times(spans)
    else:
        events = profiler.key_averages()
        totals = {event.key: (event.count, event.self_cpu_time_total) for event in events}
    kernels = [
        KernelTime(name=name, calls=calls / num_steps, step_s=own_us / num_steps / 1e6)
        for name, (calls, own_us) in totals.items()
    ]
    kernels.sort(key=lambda kernel: -kernel.step_s)
    return statistics.median(plain_s), profiled_s, kernels


def own_times(spans: Iterable[tuple[str, float, float]]) -> dict[str, tuple[int, float]]:
    """Adds up kernels that may overlap: each has the time by which it ends after all before it.

    Args:
        spans: Name, begin and end of each call, in any unit.

    Returns:
        Of each name its calls and their time.
    """
    totals: dict[str, tuple[int, float]] = {}
    last_end = -math.inf
    for name, begin, end in sorted(spans, key=lambda span: span[2]):
        calls, own = totals.get(name, (0, 0.0))
        totals[name] = calls + 1, own + end - max(begin, last_end)
        last_end = end
    return totals


@contextlib.contextmanager
def _telling_kernels() -> Iterator[None]:
    """Has what is compiled tell the profiler of itself, and kept apart from what others compile."""
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory() as folder, config.patch({"cpp.enable_kernel_profile": True}):
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            yield
        finally:
            del os.environ["XDG_CACHE_HOME"]
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before


def _table(kernels: Sequence[KernelTime], step_s: float, num_layers: int) -> str:
    lines = [("kernel", "calls", "us a call", "us a layer", "us a step", "share")]
    shown = [kernel for kernel in kernels if kernel.step_s >= _LEAST_SHARE * step_s]
    for kernel in shown:
        per_layer = kernel.calls / num_layers
        lines.append(
            (
                kernel.name,
                f"{kernel.calls:g}",
                f"{1e6 * kernel.step_s / kernel.calls:.1f}",
                f"{1e6 * kernel.step_s / num_layers:.1f}" if per_layer >= 1 else "",
                f"{1e6 * kernel.step_s:.0f}",
                f"{kernel.step_s / step_s:.1%}",
            )
        )
    others_s = sum(kernel.step_s for kernel in kernels) - sum(kernel.step_s for kernel in shown)
    between_s = step_s - sum(kernel.step_s for kernel in kernels)
    for name, seconds in (("others", others_s), ("between", between_s), ("all", step_s)):
        lines.append((name, "", "", "", f"{1e6 * seconds:.0f}", f"{seconds / step_s:.1%}"))
    return format_table(lines)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="llamac bench --kernels", description=__doc__)
    parser.add_argument("--kernels", action="store_true", required=True, help="this table")
    parser.add_argument(
        "--model",
        metavar="PATH|NAME",
        help="checkpoint, quantized or not, `small` or a preset (default: the built-in demo model)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    parser.add_argument("--batch-size", type=int, default=1, metavar="B")
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's number")
    parser.add_argument(
        "--context", type=int, default=128, metavar="N", help="live rows (default: 128)"
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="(default: 20)")
    return parser
