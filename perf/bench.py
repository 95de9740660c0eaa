"""Times every backend beside its peers and this machine's limit."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from ..model.config import DTYPES
from ..model.load import static_shape
from ..runtime.bundle.opening import open_bundle
from ..runtime.cache_folder import cache_folder
from ..runtime.cli.options import OneLineParser
from . import serving, step_kernels
from .artifacts import find_model
from .cold_start import run_cold_start
from .limit_probe import ProbeSize
from .machine import describe_machine, find_commit, package_versions
from .measure import MIN_SWEEP_ROWS, measure_cases, measure_sweeps
from .plan import Plan
from .process import Worker, WorkerError
from .report import summarize, write_run
from .systems import SYSTEMS
from .tables import to_markdown

__all__ = ["build_parser", "main"]

_DEFAULT_SYSTEMS = {
    "cpu": ("eager", "compile", "ort-cpu", "transformers", "genai", "llama.cpp"),
    "cuda": ("eager", "compile", "ort-cuda", "transformers"),
}
_MIN_TRIALS = 5
_COLD_START_CHUNK = 16
_PROBE_SIZES = {
    "cpu": ProbeSize(num_bytes=1 << 30, matrix_size=2048),
    "cuda": ProbeSize(num_bytes=4 << 30, matrix_size=8192),
}


def main(argv: Sequence[str] | None = None, *, probe_size: ProbeSize | None = None) -> int:
    """Runs the benchmark.

    Args:
        argv: The words after `llamac bench`; None takes the process's own.
        probe_size: What the limits are measured with; None is large enough to be true.

    Returns:
        0, or 1 if a system was wrong or broke.

    Raises:
        ValueError: An option is refused.
        FileNotFoundError: There is no such checkpoint.
        BackendUnavailableError: The float32 reference can't run here.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--serve" in words:
        return serving.main(words)
    if "--kernels" in words:
        return step_kernels.main(words)
    args = build_parser().parse_args(words)
    plan = _plan(args)
    run: dict[str, Any] = {
        "command": ["llamac", "bench", *words],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": find_commit(),
        "machine": describe_machine(),
        "versions": package_versions(),
        "model": {"name": plan.model.name, "config": plan.model.config.to_dict()},
        "options": {
            "device": plan.device,
            "dtype": plan.dtype,
            "threads": plan.threads,
            "max_seq_len": plan.max_seq_len,
            "prefill_len": plan.prefill_len,
            "trials": plan.trials,
        },
        "limit_samples": [],
        "systems": [],
        "sweeps": {},
        "cold_start": [],
    }
    try:
        _measure(args, plan, run, probe_size or _PROBE_SIZES[plan.device])
    except WorkerError as error:  # the reference's or the probe's: there is nothing to compare with
        print(f"llamac bench: {error}", file=sys.stderr)
        return 1
    summarize(run)
    print(to_markdown(run))
    for path in write_run(run, args.json, charts=not args.no_charts):
        print(f"wrote {path}", file=sys.stderr)
    sweeps = [result for results in run["sweeps"].values() for result in results]
    results = [*run["systems"], *sweeps, *run["cold_start"]]
    return int(any(result["status"] == "FAIL" for result in results))


def build_parser() -> argparse.ArgumentParser:
    """The options of `llamac bench`."""
    parser = OneLineParser(prog="llamac bench", description=__doc__)
    parser.add_argument(
        "--serve", action="store_true", help="times the server instead; see --serve --help"
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="times the kernels of a decode step instead; see --kernels --help",
    )
    parser.add_argument(
        "--model",
        metavar="PATH|NAME",
        help="checkpoint, `.gguf`, bundle, `small` or a preset (default: the built-in demo model)",
    )
    parser.add_argument("--layers", type=int, metavar="N", help="of a preset, instead of its own")
    parser.add_argument(
        "--backend",
        action="append",
        choices=tuple(SYSTEMS),
        help="repeatable (default: those of --dtype that fit the device; what isn't installed is "
        "skipped)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    parser.add_argument(
        "--prompt-len",
        type=int,
        nargs="+",
        metavar="N",
        help="default: 128, and no prompts are timed beside --sweep or --cold-start",
    )
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[32], metavar="N")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1], metavar="B")
    parser.add_argument("--threads", type=int, metavar="N", help="default: the cores there are")
    parser.add_argument(
        "--trials", type=int, default=_MIN_TRIALS, metavar="N", help=f"at least {_MIN_TRIALS}"
    )
    parser.add_argument("--max-seq-len", type=int, metavar="S", help="default: what is needed")
    parser.add_argument(
        "--prefill-len",
        type=int,
        metavar="P",
        help=f"default: 128, at most S; {_COLD_START_CHUNK} for --cold-start",
    )
    parser.add_argument(
        "--sweep",
        type=int,
        nargs="+",
        default=[],
        metavar="S",
        help="step time against live context, in caches of these lengths",
    )
    parser.add_argument(
        "--cold-start",
        type=int,
        nargs="?",
        const=8,
        metavar="N",
        help="from a new process to its first token, for a prompt of N tokens (default: 8)",
    )
    parser.add_argument(
        "--cold", action="store_true", help="also start with an empty compile cache"
    )
    parser.add_argument(
        "--prepack", action="store_true", help="ORT on CPUs: a private, faster copy of the weights"
    )
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="processes that hold the model together in eager and compile*, which share the "
        "threads (default: 1)",
    )
    parser.add_argument(
        "--json", type=Path, default=Path("build/bench"), metavar="DIR", help="results and charts"
    )
    parser.add_argument("--no-charts", action="store_true")
    return parser


def _measure(
    args: argparse.Namespace, plan: Plan, run: dict[str, Any], probe_size: ProbeSize
) -> None:
    if args.prompt_len or args.sweep:
        with _Probe(plan, run["limit_samples"], probe_size) as probe:
            cases = list(product(args.prompt_len, args.new_tokens))
            for batch_size in args.batch_size if cases else ():
                run["systems"] += measure_cases(
                    plan, batch_size=batch_size, cases=cases, probe=probe.sample
                )
            if args.sweep:  # an empty compile cache is measured once, above
                run["sweeps"] = measure_sweeps(
                    replace(plan, cold=False), lengths=args.sweep, probe=probe.sample
                )
    if args.cold_start is not None:
        chunk = args.prefill_len or min(_COLD_START_CHUNK, plan.max_seq_len)
        if plan.model.bundle is not None:
            chunk = plan.prefill_len
        run["cold_start"] = run_cold_start(
            replace(plan, prefill_len=chunk), prompt_len=args.cold_start
        )


def _plan(args: argparse.Namespace) -> Plan:
    """Checks the options and finds the model."""
    if args.prompt_len is None:
        args.prompt_len = [] if args.sweep or args.cold_start is not None else [128]
    cores = len(os.sched_getaffinity(0))
    _check_options(args)
    model = find_model(
        args.model,
        dtype=args.dtype or "bfloat16",
        cache=cache_folder("bench"),
        layers=args.layers,
        announce=_say,
    )
    needed = args.cold_start or 0
    if args.prompt_len:
        needed = max(needed, max(args.prompt_len) + max(args.new_tokens))
    rows = args.max_seq_len or min(max(needed, 512), model.config.max_position_embeddings)
    chunk = args.prefill_len or min(128, rows)
    if model.bundle is not None:
        shape = open_bundle(model.bundle).shape
        rows, chunk = shape.max_seq_len, shape.prefill_len
        args.batch_size = [shape.batch_size]
        one_row = args.sweep or args.cold_start is not None
        if set(args.sweep) - {rows} or (one_row and shape.batch_size != 1):
            raise ValueError(
                f"the bundle has batch size {shape.batch_size} and max_seq_len {rows}; --sweep "
                "and --cold-start want batch size 1, and --sweep that length: give the checkpoint"
            )
    for batch_size in args.batch_size:
        static_shape(model.config, batch_size=batch_size, max_seq_len=rows, prefill_len=chunk)
    if needed > rows:
        raise ValueError(
            f"prompt and new tokens need {needed} cache rows, --max-seq-len is {rows}; "
            "raise it or ask for fewer tokens"
        )
    return Plan(
        model=model,
        systems=tuple(dict.fromkeys(args.backend or _DEFAULT_SYSTEMS[args.device])),
        device=args.device,
        dtype=args.dtype or model.config.dtype,
        threads=args.threads or cores,
        max_seq_len=rows,
        prefill_len=chunk,
        trials=args.trials,
        cold=args.cold,
        cache=cache_folder("bench"),
        logs=args.json / "logs",
        options=_own_options(args),
        say=_say,
    )


def _own_options(args: argparse.Namespace) -> dict[str, str]:
    """Of the systems that have such an option."""
    options = {"prepack": "on"} if args.prepack else {}
    if args.tensor_parallel > 1:
        options["tensor_parallel"] = str(args.tensor_parallel)
    return options


def _check_options(args: argparse.Namespace) -> None:
    least = {
        "trials": _MIN_TRIALS,
        "sweep": MIN_SWEEP_ROWS,
        **dict.fromkeys(("prompt_len", "new_tokens", "batch_size", "threads", "layers"), 1),
        **dict.fromkeys(("max_seq_len", "prefill_len", "cold_start", "tensor_parallel"), 1),
    }
    for name, smallest in least.items():
        value = getattr(args, name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(value < smallest for value in values):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is {min(values)}; it must be at least {smallest}")


class _Probe:
    """Measures the machine's rates once a trial, in a process of its own."""

    def __init__(self, plan: Plan, samples: list[dict[str, Any]], size: ProbeSize) -> None:
        self._worker = Worker("limits", plan.logs, threads=plan.threads)
        self._samples = samples
        self._request = {"device": plan.device, "threads": plan.threads, "size": asdict(size)}

    def sample(self) -> int:
        """Returns the sample's index."""
        self._samples.append(self._worker.call("limits", **self._request))
        return len(self._samples) - 1

    def __enter__(self) -> _Probe:
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.close()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    from ..runtime.cli import main as run_command

    sys.exit(run_command(["bench", *sys.argv[1:]]))
