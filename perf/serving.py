"""The server's tokens and delays, beside the same requests in one process."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..runtime.bundle.manifest import MANIFEST_NAME
from ..runtime.cli.options import OneLineParser
from ..runtime.cli.text_table import format_table
from ..runtime.load import load
from .http_load import StreamTimes, run_closed, run_poisson
from .machine import describe_machine, find_commit, package_versions

__all__ = ["main"]

_PROMPTS = (
    "Once upon a time",
    "The little dog",
    "Lily went to the park and",
    "Tom had a red ball. One day",
)
_POISSON_SHARE = 0.7  # of the rate that the busiest run reached
_STOP_S = 60.0


def main(words: Sequence[str]) -> int:
    """Runs the benchmark.

    Args:
        words: After `llamac bench`.

    Returns:
        0, or 1 if a stream was cut or refused.

    Raises:
        ValueError: An option is refused, or the server doesn't start.
    """
    args = _parser().parse_args(words)
    if min(args.requests, args.max_tokens, args.batch_size, *args.concurrency) < 1:
        raise ValueError("--requests, --max-tokens, --batch-size and --concurrency are above 0")
    bodies = [
        {"prompt": _PROMPTS[i % len(_PROMPTS)], "seed": i, "temperature": 0.8, "ignore_eos": True}
        | {"max_tokens": args.max_tokens}
        for i in range(args.requests)
    ]
    rows = [_in_process(args, bodies)]
    with _server(args) as (port, process_id):
        run_closed(port, bodies[:4], num_clients=4)  # warms up
        rates = []
        for num_clients in args.concurrency:
            before_s = _cpu_s(process_id)
            times, elapsed_s = run_closed(port, bodies, num_clients=num_clients)
            rates.append(len(times) / elapsed_s)
            spent_s = _cpu_s(process_id) - before_s
            rows.append(_row(f"{num_clients} clients", times, elapsed_s, spent_s))
        rate = _POISSON_SHARE * max(rates)
        before_s = _cpu_s(process_id)
        times, elapsed_s = run_poisson(port, bodies, requests_per_s=rate)
        name = f"Poisson, {rate:.3g} requests/s"
        rows.append(_row(name, times, elapsed_s, _cpu_s(process_id) - before_s))
    print(_table(rows))
    if args.json:
        run = {
            "command": ["llamac", "bench", *words],
            "commit": find_commit(),
            "machine": describe_machine(),
            "versions": package_versions(),
            "rows": rows,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(run, indent=1) + "\n")
    return int(any(row.get("num_failed") for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="llamac bench --serve", description=__doc__)
    parser.add_argument("--serve", action="store_true", required=True, help="this benchmark")
    parser.add_argument("--model", metavar="SOURCE", help="(default: the demo model)")
    parser.add_argument("--backend", choices=("compile", "eager", "ort"))
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="B", help="of a checkpoint (default: 8)"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="(default: 1)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], metavar="N")
    parser.add_argument("--requests", type=int, default=128, metavar="N", help="(default: 128)")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="(default: 64)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keeps the run")
    return parser


def _in_process(args: argparse.Namespace, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The same requests through the scheduler, in this process."""
    options: dict[str, Any] = {"threads": args.threads}
    if args.backend:
        options["backend"] = args.backend
    if not _is_bundle(args.model):
        options["batch_size"] = args.batch_size
    model = load(args.model, **options)
    prompts = [body["prompt"] for body in bodies]
    asked: dict[str, Any] = {"max_new_tokens": args.max_tokens, "temperature": 0.8, "eos_ids": ()}
    model.generate(*prompts[:4], **asked)
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    done = model.generate(*prompts, **asked)
    elapsed_s = time.perf_counter() - begin_s
    num_tokens = sum(len(completion.ids) for completion in done)
    return {
        "name": "in process",
        "tokens_per_s": num_tokens / elapsed_s,
        "cpu_s_per_token": (time.process_time() - begin_cpu_s) / num_tokens,
    }


@contextlib.contextmanager
def _server(args: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """A server of its own; yields its port and process id."""
    words = ["--port", "0", "--threads", str(args.threads), "--max-queue", "100000"]
    if args.model:
        words = [args.model, *words]
    if args.backend:
        words += ["--backend", args.backend]
    if not _is_bundle(args.model):
        words += ["--batch-size", str(args.batch_size)]
    command = [sys.executable, "-m", "llamac.runtime.cli", "serve", *words]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            while not (found := re.search(r"^serving .*:(\d+)$", _text(log), re.MULTILINE)):
                if process.poll() is not None:
                    raise ValueError(f"the server doesn't start: {_text(log).strip()[-300:]}")
                time.sleep(0.1)
            yield int(found[1]), process.pid
        finally:
            process.terminate()
            process.wait(_STOP_S)


def _text(log: IO[str]) -> str:
    log.seek(0)
    return log.read()


def _is_bundle(source: str | None) -> bool:
    return source is not None and (Path(source) / MANIFEST_NAME).exists()


def _cpu_s(process_id: int) -> float:
    """Processor time of the front so far; the engine is another process."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _row(
    name: str, times: Sequence[StreamTimes], elapsed_s: float, front_s: float
) -> dict[str, Any]:
    num_tokens = sum(one.num_tokens for one in times)
    ttft_s = [one.ttft_s for one in times if one.ttft_s is not None]
    gaps_s = [gap for one in times for gap in one.gaps_s]
    return {
        "name": name,
        "num_requests": len(times),
        "num_failed": sum(not one.is_whole for one in times),
        "tokens_per_s": num_tokens / elapsed_s,
        "ttft_s": _percentiles(ttft_s),
        "inter_token_s": _percentiles(gaps_s),
        "cpu_s_per_token": front_s / max(1, num_tokens),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {f"p{p}": float(np.percentile(values, p)) for p in (50, 99)}


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [("", "tokens/s", "of in process", "TTFT p50, p99", "between tokens", "CPU a token")]
    for row in rows:
        share = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        lines.append(
            (
                row["name"],
                f"{row['tokens_per_s']:.0f}",
                f"{share:.0%}",
                _milliseconds(row.get("ttft_s")),
                _milliseconds(row.get("inter_token_s")),
                f"{1e6 * row['cpu_s_per_token']:.0f} us",
            )
        )
    note = "CPU a token: of the whole process, and of the server's front alone"
    return f"{format_table(lines)}\n{note}"


def _milliseconds(percentiles: dict[str, float] | None) -> str:
    if percentiles is None:
        return "-"
    return f"{1e3 * percentiles['p50']:.1f}, {1e3 * percentiles['p99']:.1f} ms"
