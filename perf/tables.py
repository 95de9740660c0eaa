"""A run as Markdown that can also be read on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..runtime.memory import format_bytes
from .systems import PEERS, TEMPERATURE
from .weight_sizes import describe_precision, weights_of

__all__ = ["PHASES", "count_of", "format_rate", "to_markdown"]

# What a start costs, in the order it happens.
PHASES = {
    "python_s": "Python",
    "harness_s": "harness",
    "import_s": "imports",
    "tokenizer_s": "tokenizer",
    "load_s": "weights",
    "compile_s": "compile",
    "first_call_s": "first call",
    "warmup_s": "warm-up",
    "first_chunk_s": "first chunk",
    "other_s": "other",
}

_BUSY = 0.05  # of a core, or of a load average


def to_markdown(run: dict[str, Any]) -> str:
    """Writes a run as tables.

    Args:
        run: After report.summarize.

    Returns:
        Markdown.
    """
    options = run["options"]
    threads = count_of(options["threads"], "thread")
    lines = [
        f"### {run['model']['name']}, {options['device']}, {threads}",
        "",
        f"`{' '.join(run['command'])}`",
        "",
        f"{_machine(run)}; {run['date'][:10]}, commit {run['commit'] or 'unknown'}{_limits(run)}",
        "",
    ]
    lines += _speed_table(run["systems"])
    lines += _sampled_table(run["systems"])
    lines += _ratio_table(run["systems"])
    lines += _startup_table(run["systems"])
    for max_seq_len, results in run["sweeps"].items():
        lines += _sweep_table(max_seq_len, results)
    lines += _cold_start_table(run["cold_start"])
    lines += _remarks(run)
    return "\n".join(lines).rstrip() + "\n"


def count_of(count: int, noun: str) -> str:
    """Writes "1 core" or "2 cores"."""
    return f"{count} {noun}" + ("s" if count != 1 else "")


def format_rate(value: float) -> str:
    """Writes tokens per second without an exponent.

    Args:
        value: Tokens per second.

    Returns:
        Four digits, or all that lie before the point.
    """
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _machine(run: dict[str, Any]) -> str:
    machine = run["machine"]
    gpu = f", {machine['gpu']}" if run["options"]["device"] == "cuda" else ""
    return f"{machine['cpu']}, {count_of(machine['cores'], 'core')}{gpu}"


def _limits(run: dict[str, Any]) -> str:
    if "limits" not in run:
        return ""
    limits = run["limits"]
    texts = [f"reads {_spread(limits['read_bytes_per_s'], '.1f')} GB/s"]
    texts += [
        f"{dtype} {_spread(rate, '.0f')} GFLOP/s" for dtype, rate in limits["flops_per_s"].items()
    ]
    return f"; measured limits, median of the trials (least - most): {', '.join(texts)}"


def _spread(rates: dict[str, float], digits: str) -> str:
    median, least, most = (
        format(rates[name] / 1e9, digits) for name in ("median", "least", "most")
    )
    return f"{median} ({least} - {most})"


def _speed_table(results: list[dict[str, Any]]) -> list[str]:
    head = (
        "system",
        "precision",
        "bits per weight",
        "batch",
        "prompt + new",
        "TTFT s",
        "prefill tok/s",
        "of limit",
        "TPOT ms (p10 - p90)",
        "decode tok/s",
        "GB/s",
        "of limit",
        "peak memory",
    )
    rows = []
    for result in results:
        if result["status"] != "ok":
            rows.append([result["name"], result["status"]])
            continue
        memory = result["memory"]
        for case in result["cases"]:
            rows.append(
                [
                    result["name"],
                    describe_precision(result),
                    f"{result['bits_per_weight']:.2f}" if "bits_per_weight" in result else "-",
                    str(result["batch_size"]),
                    f"{case['prompt_len']} + {case['num_new']}",
                    f"{case['ttft_s']:.3g}",
                    format_rate(case["prefill_tokens_per_s"]),
                    f"{case['prefill_share']:.0%}",
                    *_decode_cells(case, result["batch_size"]),
                    format_bytes(memory.get("device_bytes") or memory["peak_rss_bytes"]),
                ]
            )
    return _table(head, rows)


def _decode_cells(case: dict[str, Any], batch_size: int) -> tuple[str, ...]:
    if "tpot_s" not in case:
        return ("-",) * 4
    return (
        *_token_cells(case, batch_size),
        f"{case['decode_bytes'] / case['tpot_s']['median'] / 1e9:.3g}",
        f"{case['decode_share']:.0%}",
    )


def _token_cells(times: dict[str, Any], batch_size: int) -> tuple[str, str]:
    """A step's time, and tokens a second: of all sequences, and of each if there are several."""
    tpot = {name: 1e3 * value for name, value in times["tpot_s"].items()}
    rate = times["decode_tokens_per_s"]
    each = f" ({batch_size} x {format_rate(rate / batch_size)})" if batch_size > 1 else ""
    return (
        f"{tpot['median']:.4g} ({tpot['p10']:.4g} - {tpot['p90']:.4g})",
        format_rate(rate) + each,
    )


def _sampled_table(results: list[dict[str, Any]]) -> list[str]:
    """What a user gets: the scheduler, the sampler and the text of each token are in it."""
    rows = []
    for result in results:
        for case in result.get("cases", []) if result["status"] == "ok" else []:
            if (sampled := case.get("sampled")) is None:
                continue
            batch_size = result["batch_size"]
            decode = _token_cells(sampled, batch_size) if "tpot_s" in sampled else ("-", "-")
            rows.append(
                [
                    result["name"],
                    describe_precision(result),
                    str(batch_size),
                    f"{case['prompt_len']} + {case['num_new']}",
                    f"{sampled['ttft_s']:.3g}",
                    *decode,
                    format_rate(sampled["tokens_per_s"]),
                ]
            )
    head = (
        f"end to end, temperature {TEMPERATURE}",
        "precision",
        "batch",
        "prompt + new",
        "TTFT s",
        "TPOT ms (p10 - p90)",
        "decode tok/s",
        "tok/s, prompts included",
    )
    return _table(head, rows)


def _ratio_table(results: list[dict[str, Any]]) -> list[str]:
    """Ratios of medians, each of our systems over each peer whose weights are as precise."""
    timed = [
        (result, case) for result in results if result["status"] == "ok" for case in result["cases"]
    ]
    rows = []
    for ours, case in timed:
        for peer, other in timed:
            if (
                ours["name"] in PEERS
                or peer["name"] not in PEERS
                or _sizes(ours, case) != _sizes(peer, other)
            ):
                continue
            ratios = [
                f"{case[key] / other[key]:.2f}" if key in case else "-"
                for key in ("decode_tokens_per_s", "prefill_tokens_per_s")
            ]
            sizes = [str(size) for size in _sizes(ours, case)]
            rows.append([f"{ours['name']} / {peer['name']}", *sizes, *ratios])
    return _table(
        ("ratio of medians", "precision", "batch", "prompt", "new", "decode", "prefill"), rows
    )


def _sizes(result: dict[str, Any], case: dict[str, Any]) -> tuple[str, int, int, int]:
    return weights_of(result), result["batch_size"], case["prompt_len"], case["num_new"]


def _startup_table(results: list[dict[str, Any]]) -> list[str]:
    """Getting ready: what is built once, the first start, and a start from the cache."""
    rows = []
    for result in results:
        if result["status"] != "ok":
            continue
        first, phases = result.get("cold_phases", {}), result["phases"]
        cached = {None: "", True: " (cached)", False: " (not cached)"}[
            result["facts"].get("cache_hit")
        ]
        rows.append(
            [
                result["name"],
                _seconds(result.get("build_s")),
                _seconds(first.get("compile_s")),
                _seconds(phases.get("compile_s")) + cached,
                _seconds(phases.get("load_s")),
                _seconds(phases.get("warmup_s")),
                result["check"]["message"],
            ]
        )
    head = (
        "system",
        "export or convert s",
        "compile s, empty cache",
        "compile s",
        "load s",
        "warm-up s",
        "check against eager float32",
    )
    return _table(head, rows)


def _sweep_table(max_seq_len: str, results: list[dict[str, Any]]) -> list[str]:
    right = [result for result in results if result["status"] == "ok"]
    contexts = sorted({point["context"] for result in right for point in result["sweep"]})
    rows = []
    for result in results:
        if result["status"] != "ok":
            rows.append([result["name"], result["status"]])
            continue
        times = {point["context"]: point["step_s"]["median"] for point in result["sweep"]}
        rows.append(
            [
                result["name"],
                describe_precision(result),
                *(f"{1e3 * times[c]:.4g}" for c in contexts),
            ]
        )
    head = (f"step ms, S = {max_seq_len}, live tokens:", "precision", *map(str, contexts))
    return _table(head, rows)


def _cold_start_table(results: list[dict[str, Any]]) -> list[str]:
    right = [result for result in results if result["status"] == "ok"]
    used = [key for key in PHASES if any(key in result["phases"] for result in right)]
    rows = []
    for result in results:
        if result["status"] != "ok":
            rows.append([result["name"], result["status"]])
            continue
        rows.append(
            [
                result["name"],
                describe_precision(result),
                f"{result['total_s']:.2f}",
                *(_seconds(result["phases"].get(key)) for key in used),
                format_bytes(result["peak_rss_bytes"]),
                f"{result['first_total_s']:.2f}",
            ]
        )
    head = (
        "process start to first token",
        "precision",
        "total s",
        *(f"{PHASES[key]} s" for key in used),
        "peak RSS",
        "very first start s",
    )
    return _table(head, rows)


def _remarks(run: dict[str, Any]) -> list[str]:
    """What a reader has to know about the numbers above."""
    lines = []
    for result in _results(run):
        if replays := result.get("facts", {}).get("graph_replays"):
            lines.append(
                f"- {result['name']}, batch {result['batch_size']}: {replays} steps, each the "
                "replay of one graph; nothing was compiled after warm-up"
            )
        if result["status"] != "ok":
            lines.append(f"- **{result['name']}: {result['status']}**: {result['message']}")
        if (share := result.get("idle_cpu_share", 0.0)) > _BUSY:
            lines.append(
                f"- {result['name']} took {share:.0%} of a core while the others were timed"
            )
    if (load := run["machine"]["load_average"]) > _BUSY:
        lines.append(f"- the load average was {load:.2f} before the run")
    return list(dict.fromkeys(lines))


def _results(run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from run["systems"]
    for results in run["sweeps"].values():
        yield from results
    yield from run["cold_start"]


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _table(head: Sequence[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table in aligned columns, short rows filled up; nothing without rows."""
    if not rows:
        return []
    filled = [list(head), *(row + [""] * (len(head) - len(row)) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*filled, strict=True)]
    filled.insert(1, ["-" * width for width in widths])
    lines = (
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in filled
    )
    return [*(f"| {line} |" for line in lines), ""]
