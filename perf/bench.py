"""`llamac bench`: which backend, and how far from the best possible."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from ..model.config import DTYPES
from ..runtime.cache_folder import cache_folder
from ..runtime.manifest import open_bundle
from ..runtime.options import OneLineParser
from .artifacts import find_model
from .machine import describe_machine, find_commit, package_versions
from .measure import Plan, open_group, run_cases, run_sweep, sweep_contexts
from .process import Worker
from .report import summarize, to_markdown, write_run
from .systems import SYSTEMS

__all__ = ["build_parser", "main"]

_PROBE_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}
_MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Args:
        argv: The words after `llamac bench`; None takes the process's own.

    Returns:
        0, or 1 if a system was wrong or broke.

    Raises:
        ValueError: An option is refused.
        FileNotFoundError: There is no such checkpoint.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(words)
    if args.trials < 5:
        raise ValueError(f"--trials is {args.trials}; it must be at least 5")
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
    }
    with _Probe(plan, run["limit_samples"]) as probe:
        for batch_size in args.batch_size:
            with open_group(plan, batch_size=batch_size) as entries:
                cases = list(product(args.prompt_len, args.new_tokens))
                run_cases(plan, entries, cases, probe.sample)
            run["systems"] += [entry.result for entry in entries]
        for max_seq_len in args.sweep:
            with open_group(plan, batch_size=1, max_seq_len=max_seq_len) as entries:
                run_sweep(plan, entries, sweep_contexts(max_seq_len), probe.sample)
            run.setdefault("sweeps", {})[str(max_seq_len)] = [entry.result for entry in entries]
    summarize(run)
    print(to_markdown(run))
    for path in write_run(run, args.json, charts=not args.no_charts):
        print(f"wrote {path}", file=sys.stderr)
    results = [*run["systems"], *(r for rs in run.get("sweeps", {}).values() for r in rs)]
    return int(any(result["status"] == "FAIL" for result in results))


def build_parser() -> argparse.ArgumentParser:
    """The options of `llamac bench`."""
    parser = OneLineParser(prog="llamac bench", description=__doc__)
    parser.add_argument(
        "--model",
        metavar="PATH|NAME",
        help="checkpoint, bundle, `small` or a preset (default: the built-in demo model)",
    )
    parser.add_argument("--layers", type=int, metavar="N", help="of a preset, instead of its own")
    parser.add_argument(
        "--backend", action="append", choices=tuple(SYSTEMS), help="repeatable; peers too"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    parser.add_argument("--prompt-len", type=int, nargs="+", default=[128], metavar="N")
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[32], metavar="N")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1], metavar="B")
    parser.add_argument("--threads", type=int, metavar="N", help="default: the cores there are")
    parser.add_argument("--trials", type=int, default=5, metavar="N", help="at least 5")
    parser.add_argument("--max-seq-len", type=int, metavar="S", help="default: what is needed")
    parser.add_argument("--prefill-len", type=int, metavar="P", help="default: 128, at most S")
    parser.add_argument(
        "--sweep",
        type=int,
        nargs="*",
        default=[],
        metavar="S",
        help="step time against live context, in caches of these lengths",
    )
    parser.add_argument(
        "--cold", action="store_true", help="also start with an empty compile cache"
    )
    parser.add_argument(
        "--prepack", action="store_true", help="ORT on CPUs: a private, faster copy of the weights"
    )
    parser.add_argument(
        "--json", type=Path, default=Path("build/bench"), metavar="DIR", help="results and charts"
    )
    parser.add_argument("--no-charts", action="store_true")
    return parser


def _plan(args: argparse.Namespace) -> Plan:
    """Checks the options and finds the model."""
    cores = len(os.sched_getaffinity(0))
    for name in ("prompt_len", "new_tokens", "batch_size", "sweep"):
        if any(value < 1 for value in getattr(args, name)):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is {getattr(args, name)}; each must be at least 1")
    cache = cache_folder("bench")
    model = find_model(
        args.model,
        dtype=args.dtype or "bfloat16",
        cache=cache,
        layers=args.layers,
        announce=_say,
    )
    needed = max(args.prompt_len) + max(args.new_tokens)
    rows = args.max_seq_len or min(max(needed, 512), model.config.max_position_embeddings)
    chunk = args.prefill_len or min(128, rows)
    if model.bundle is not None:
        shape = open_bundle(model.bundle).shape
        rows, chunk = shape.max_seq_len, shape.prefill_len
        args.batch_size = [shape.batch_size]
    if needed > rows:
        raise ValueError(
            f"--prompt-len and --new-tokens need {needed} cache rows, --max-seq-len is {rows}; "
            "raise it or ask for fewer tokens"
        )
    return Plan(
        model=model,
        systems=tuple(dict.fromkeys(args.backend or ("eager", "compile"))),
        device=args.device,
        dtype=args.dtype or model.config.dtype,
        threads=args.threads or cores,
        max_seq_len=rows,
        prefill_len=chunk,
        trials=args.trials,
        cold=args.cold,
        cache=cache,
        logs=args.json / "logs",
        options={"prepack": "on"} if args.prepack else {},
        say=_say,
    )


class _Probe:
    """Measures the machine's rates once a trial, in a process of its own."""

    def __init__(self, plan: Plan, samples: list[dict[str, Any]]) -> None:
        self._worker = Worker("limits", plan.logs, threads=plan.threads)
        self._samples = samples
        self._request = {
            "device": plan.device,
            "threads": plan.threads,
            "num_bytes": _PROBE_BYTES[plan.device],
            "matrix_size": _MATRIX_SIZE[plan.device],
        }

    def sample(self) -> None:
        reply = self._worker.call("limits", **self._request)
        self._samples.append({key: reply[key] for key in ("read_bytes_per_s", "flops_per_s")})

    def __enter__(self) -> _Probe:
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.close()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
