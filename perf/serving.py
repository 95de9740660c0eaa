"""The server's tokens and delays, beside the same requests in one process."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.backend import BackendUnavailableError
from ..runtime.bundle.manifest import MANIFEST_NAME
from ..runtime.cli.options import OneLineParser
from ..runtime.cli.text_table import format_table
from ..runtime.language_model import LanguageModel
from ..runtime.load import load
from ..runtime.text.constraint import Grammar
from .http_load import StreamTimes, run_closed, run_poisson
from .machine import describe_machine, find_commit, package_versions
from .servers import PEER_SERVERS, RunningServer, peer_server, run_server
from .soak import run_soak

__all__ = ["main"]

_PROMPTS = (
    "Once upon a time",
    "The little dog",
    "Lily went to the park and",
    "Tom had a red ball. One day",
)
_SCHEMA = {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 30}
_POISSON_SHARE = 0.7  # of the rate that llamac's busiest run reached


def main(words: Sequence[str]) -> int:
    """Runs the benchmark.

    Args:
        words: After `llamac bench`.

    Returns:
        0, or 1 if a stream of llamac's was cut or refused, or a soak found something.

    Raises:
        ValueError: An option is refused, or a server doesn't start.
    """
    args = _parser().parse_args(words)
    if min(args.requests, args.max_tokens, args.batch_size, *args.concurrency) < 1:
        raise ValueError("--requests, --max-tokens, --batch-size and --concurrency are above 0")
    run: dict[str, Any] = {
        "command": ["llamac", "bench", *words],
        "commit": find_commit(),
        "machine": describe_machine(),
        "versions": package_versions(),
    }
    if args.soak is not None:
        with run_server(_server_words(args)) as server:
            run["soak"] = run_soak(server, minutes=args.soak)
        print(json.dumps(run["soak"], indent=1))
        is_wrong = bool(run["soak"]["problems"])
    else:
        run["rows"] = _measure(args)
        print(_table(run["rows"]))
        own = [row for row in run["rows"] if row["system"] == "llamac"]
        is_wrong = any(row.get("num_failed") for row in own)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(run, indent=1) + "\n")
        if "rows" in run:
            _draw(run, args.json.with_suffix(".png"))
    return int(is_wrong)


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
    parser.add_argument(
        "--peer",
        type=_peer,
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="also a peer's server, and the model in the form it reads: llama-server=FILE.gguf, "
        "llama.cpp=FILE.gguf (llama-cpp-python's), transformers=FOLDER; the requests then may end "
        "before --max-tokens",
    )
    parser.add_argument(
        "--soak",
        type=float,
        metavar="MINUTES",
        help="instead: so long under clients that leave, the engine killed every minute",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keeps the run, and a chart beside it"
    )
    return parser


def _peer(text: str) -> tuple[str, str]:
    name, _, source = text.partition("=")
    if name not in PEER_SERVERS or not source:
        raise argparse.ArgumentTypeError(
            f"{text} is not NAME=SOURCE with NAME {', '.join(PEER_SERVERS)}"
        )
    return name, source


def _measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    bodies = [
        {"prompt": _PROMPTS[i % len(_PROMPTS)], "seed": i, "temperature": 0.8}
        | {"max_tokens": args.max_tokens}
        | ({} if args.peer else {"ignore_eos": True})
        for i in range(args.requests)
    ]
    rows = _in_process(args, bodies)
    with run_server(_server_words(args)) as server:
        rows += _served(args, bodies, server, "llamac", rate=None)
    rate = rows[-1]["requests_per_s"]
    for name, source in args.peer:
        named = [{**body, "model": source} for body in bodies]
        try:
            with peer_server(
                name, source, threads=args.threads, batch_size=args.batch_size
            ) as server:
                rows += _served(args, named, server, name, rate=rate)
        except BackendUnavailableError as error:
            print(f"{name}: skipped: {error}", file=sys.stderr)
    return rows


def _served(
    args: argparse.Namespace,
    bodies: Sequence[dict[str, Any]],
    server: RunningServer,
    system: str,
    *,
    rate: float | None,
) -> list[dict[str, Any]]:
    """The scenarios on one server; without a rate, Poisson's is one that it can keep up with."""
    rows = []

    def measure(name: str, run: Callable[[], tuple[list[StreamTimes], float]]) -> float:
        before_s = server.cpu_s()
        times, elapsed_s = run()
        spent_s = server.cpu_s() - before_s
        rows.append({"system": system, "name": name} | _figures(times, elapsed_s, spent_s))
        return len(times) / elapsed_s

    run_closed(server.port, bodies[:4], num_clients=4)  # warms up
    reached = [
        measure(
            f"{count} clients",
            lambda count=count: run_closed(server.port, bodies, num_clients=count),
        )
        for count in args.concurrency
    ]
    rate = _POISSON_SHARE * max(reached) if rate is None else rate
    name = f"Poisson, {rate:.3g} requests/s"
    measure(name, lambda: run_poisson(server.port, bodies, requests_per_s=rate))
    rows[-1]["requests_per_s"] = rate
    return rows


def _in_process(args: argparse.Namespace, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same requests through the scheduler in this process, and texts that must be JSON."""
    options: dict[str, Any] = {"threads": args.threads}
    if args.backend:
        options["backend"] = args.backend
    if not _is_bundle(args.model):
        options["batch_size"] = args.batch_size
    model = load(args.model, **options)
    prompts = [body["prompt"] for body in bodies]
    asked: dict[str, Any] = {"max_new_tokens": args.max_tokens, "temperature": 0.8}
    if not args.peer:
        asked["eos_ids"] = ()
    grammar = Grammar(kind="json_schema", text=json.dumps(_SCHEMA))
    rows = [{"system": "llamac", "name": "in process"} | _generated(model, prompts, asked)]
    try:
        figures = _generated(model, prompts, {**asked, "grammar": grammar})
    except ModuleNotFoundError as error:
        print(f"JSON: skipped: pip install {error.name}", file=sys.stderr)
    else:
        rows.append({"system": "llamac", "name": "in process, JSON"} | figures)
    return rows


def _generated(
    model: LanguageModel, prompts: Sequence[str], asked: dict[str, Any]
) -> dict[str, float]:
    model.generate(*prompts[:4], **asked)
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    done = model.generate(*prompts, **asked)
    elapsed_s = time.perf_counter() - begin_s
    num_tokens = sum(len(completion.ids) for completion in done)
    return {
        "tokens_per_s": num_tokens / elapsed_s,
        "cpu_s_per_token": (time.process_time() - begin_cpu_s) / num_tokens,
    }


def _server_words(args: argparse.Namespace) -> list[str]:
    words = ["--threads", str(args.threads), "--max-queue", "100000"]
    if args.model:
        words = [args.model, *words]
    if args.backend:
        words += ["--backend", args.backend]
    if not _is_bundle(args.model):
        words += ["--batch-size", str(args.batch_size)]
    return words


def _is_bundle(source: str | None) -> bool:
    return source is not None and (Path(source) / MANIFEST_NAME).exists()


def _figures(times: Sequence[StreamTimes], elapsed_s: float, front_s: float) -> dict[str, Any]:
    num_tokens = sum(one.num_tokens for one in times)
    ttft_s = [one.ttft_s for one in times if one.ttft_s is not None]
    gaps_s = [gap for one in times for gap in one.gaps_s]
    return {
        "num_requests": len(times),
        "num_failed": sum(not one.is_finished for one in times),
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
    lines = [
        (
            "",
            "",
            "failed",
            "tokens/s",
            "of in process",
            "TTFT p50, p99",
            "between tokens",
            "CPU a token",
        )
    ]
    for row in rows:
        share = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        lines.append(
            (
                row["system"],
                row["name"],
                str(row.get("num_failed", "-")),
                f"{row['tokens_per_s']:.0f}",
                f"{share:.0%}",
                _milliseconds(row.get("ttft_s")),
                _milliseconds(row.get("inter_token_s")),
                f"{1e6 * row['cpu_s_per_token']:.0f} us",
            )
        )
    note = "CPU a token: of the process, which for llamac's server is the front alone"
    return f"{format_table(lines)}\n{note}"


def _milliseconds(percentiles: dict[str, float] | None) -> str:
    if percentiles is None:
        return "-"
    return f"{1e3 * percentiles['p50']:.1f}, {1e3 * percentiles['p99']:.1f} ms"


def _draw(run: dict[str, Any], path: Path) -> None:
    try:
        from .serving_chart import draw_serving
    except ModuleNotFoundError as error:
        print(f"no chart: pip install {error.name}", file=sys.stderr)
    else:
        draw_serving(run, path)
