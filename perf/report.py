"""A run's raw times into the numbers people quote: JSON, a Markdown table, charts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..model.config import LlamaConfig
from ..runtime.memory import format_bytes
from .roofline import Limits, best_limits, decode_work, prefill_work
from .setup import ITEM_BYTES

__all__ = ["summarize", "to_markdown", "write_run"]

# What a start costs, in the order it happens.
PHASES = {
    "python_s": "Python",
    "harness_s": "harness",
    "import_s": "imports",
    "load_s": "weights",
    "compile_s": "compile",
    "first_call_s": "first call",
    "warmup_s": "warm-up",
    "first_chunk_s": "first chunk",
}


def summarize(run: dict[str, Any]) -> None:
    """Adds to a run the machine's limits and, to every case, its statistics.

    Medians, p10 and p90 of a step's time are over all steps of all trials.

    Args:
        run: What bench.main collected.
    """
    limits = best_limits(run["limit_samples"])
    run["limits"] = {
        "read_bytes_per_s": limits.read_bytes_per_s,
        "flops_per_s": dict(limits.flops_per_s),
    }
    config = LlamaConfig.from_dict(run["model"]["config"])
    for result in run["systems"]:
        for case in result.get("cases", []):
            case |= _case_statistics(case, result, config, limits, run["options"]["max_seq_len"])
    for max_seq_len, results in run.get("sweeps", {}).items():
        for result in results:
            result["sweep"] = [
                _sweep_point(int(context), times, result, config, limits, int(max_seq_len))
                for context, times in result.get("sweep", {}).items()
            ]


def to_markdown(run: dict[str, Any]) -> str:
    """Writes a run as tables.

    Args:
        run: After summarize.

    Returns:
        Markdown.
    """
    machine, limits, options = run["machine"], run["limits"], run["options"]
    rates = ", ".join(
        f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in limits["flops_per_s"].items()
    )
    lines = [
        f"### {run['model']['name']}, {options['device']}, {options['threads']} threads",
        "",
        f"`{' '.join(run['command'])}`",
        "",
        f"{machine['cpu']}, {machine['cores']} cores"
        + (f", {machine['gpu']}" if machine["gpu"] and options["device"] == "cuda" else "")
        + f"; {run['date'][:10]}, commit {run['commit'] or 'unknown'}; measured limits: "
        f"reads {limits['read_bytes_per_s'] / 1e9:.1f} GB/s, {rates}",
        "",
    ]
    lines += _speed_table(run["systems"])
    lines += _startup_table(run["systems"])
    for max_seq_len, results in run.get("sweeps", {}).items():
        lines += _sweep_table(max_seq_len, results)
    return "\n".join(lines)


def write_run(run: dict[str, Any], folder: Path, *, charts: bool = True) -> list[Path]:
    """Writes a run's files.

    Args:
        run: After summarize.
        folder: Made if it isn't there; a run of the same second is replaced.
        charts: Whether to draw, where matplotlib is installed.

    Returns:
        What was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    day, _, time = run["date"].partition("T")
    stem = f"{run['model']['name'].replace('/', '_')}-{run['options']['device']}-"
    stem += f"{run['options']['dtype']}-{day}-{time[:8].replace(':', '')}"
    data, table = folder / f"{stem}.json", folder / f"{stem}.md"
    data.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    table.write_text(to_markdown(run), encoding="utf-8")
    written = [data, table]
    if charts:
        try:
            from .charts import draw_charts
        except ModuleNotFoundError as error:
            print(f"no charts: {error.name} is not installed; pip install 'llamac[perf]'")
        else:
            written += draw_charts(run, folder, stem)
    return written


def _case_statistics(
    case: dict[str, Any],
    result: dict[str, Any],
    config: LlamaConfig,
    limits: Limits,
    max_seq_len: int,
) -> dict[str, Any]:
    precision, batch_size = result["precision"], result["batch_size"]
    sizes = {
        "item_bytes": ITEM_BYTES[precision],
        "batch_size": batch_size,
        "max_seq_len": max_seq_len,
    }
    num_tokens = case["prompt_len"]
    prefill_s = float(np.median(case["prefill_s"]))
    prompt = prefill_work(config, num_tokens=num_tokens, **sizes)
    statistics: dict[str, Any] = {
        "ttft_s": prefill_s,
        "prefill_tokens_per_s": batch_size * num_tokens / prefill_s,
        "prefill_limit_s": limits.least_s(prompt, precision),
        "prefill_share": limits.least_s(prompt, precision) / prefill_s,
    }
    steps = np.concatenate(case["step_s"])
    if len(steps):
        tpot_s = float(np.median(steps))
        step = decode_work(config, context=num_tokens + case["num_new"] // 2, **sizes)
        least_s = limits.least_s(step, precision)
        statistics |= {
            "tpot_s": {"median": tpot_s} | _percentiles(steps),
            "decode_tokens_per_s": batch_size / tpot_s,
            "decode_limit_s": least_s,
            "decode_share": least_s / tpot_s,
            "decode_bytes": step.needed_bytes,
            "wasted_kv_bytes": step.wasted_kv_bytes,
        }
    return statistics


def _sweep_point(
    context: int,
    times: list[float],
    result: dict[str, Any],
    config: LlamaConfig,
    limits: Limits,
    max_seq_len: int,
) -> dict[str, Any]:
    work = decode_work(
        config,
        item_bytes=ITEM_BYTES[result["precision"]],
        batch_size=result["batch_size"],
        context=context,
        max_seq_len=max_seq_len,
    )
    median = float(np.median(times))
    return {
        "context": context,
        "step_s": {"median": median} | _percentiles(np.array(times)),
        "limit_s": limits.least_s(work, result["precision"]),
        "raw_step_s": times,
    }


def _percentiles(times: np.ndarray) -> dict[str, float]:
    p10, p90 = np.percentile(times, [10, 90])
    return {"p10": float(p10), "p90": float(p90)}


def _speed_table(results: list[dict[str, Any]]) -> list[str]:
    if not results:
        return []
    head = (
        "system",
        "precision",
        "batch",
        "prompt + new",
        "TTFT s",
        "prefill tok/s",
        "of limit",
        "TPOT ms (p10 - p90)",
        "decode tok/s",
        "of limit",
        "peak memory",
    )
    rows = []
    for result in results:
        if result["status"] != "ok":
            rows.append([result["name"], f"**{result['status']}**: {result['message']}"])
            continue
        for case in result["cases"]:
            tpot = case.get("tpot_s")
            memory = result["memory"]
            size = memory.get("device_bytes") or memory["peak_rss_bytes"]
            decode = ("-", "-", "-")
            if tpot is not None:
                spread = f"{1e3 * tpot['p10']:.4g} - {1e3 * tpot['p90']:.4g}"
                decode = (
                    f"{1e3 * tpot['median']:.4g} ({spread})",
                    f"{case['decode_tokens_per_s']:.4g}",
                    f"{case['decode_share']:.0%}",
                )
            rows.append(
                [
                    result["name"],
                    result["precision"],
                    str(result["batch_size"]),
                    f"{case['prompt_len']} + {case['num_new']}",
                    f"{case['ttft_s']:.3g}",
                    f"{case['prefill_tokens_per_s']:.4g}",
                    f"{case['prefill_share']:.0%}",
                    *decode,
                    format_bytes(size),
                ]
            )
    return _table(head, rows)


def _startup_table(results: list[dict[str, Any]]) -> list[str]:
    """Getting ready: what is built once, the first start, and a start from the cache."""
    rows = []
    for result in results:
        if result["status"] != "ok":
            continue
        cold, warm = result.get("cold_phases", {}), result["phases"]
        rows.append(
            [
                result["name"],
                _seconds(result.get("build_s")),
                _seconds(cold.get("compile_s")),
                _seconds(warm.get("compile_s")),
                _seconds(warm.get("load_s")),
                _seconds(warm.get("warmup_s")),
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
    return _table(head, rows) if rows else []


def _sweep_table(max_seq_len: str, results: list[dict[str, Any]]) -> list[str]:
    contexts = sorted({point["context"] for result in results for point in result["sweep"]})
    rows = []
    for result in results:
        if result["status"] != "ok":
            rows.append([result["name"], f"**{result['status']}**: {result['message']}"])
            continue
        times = {point["context"]: point["step_s"]["median"] for point in result["sweep"]}
        rows.append([result["name"], *(f"{1e3 * times[c]:.4g}" for c in contexts)])
    head = (f"step ms, S = {max_seq_len}, live tokens:", *map(str, contexts))
    return _table(head, rows)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _table(head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """A Markdown table, short rows filled up."""
    filled = [row + [""] * (len(head) - len(row)) for row in rows]
    body = [f"| {' | '.join(row)} |" for row in (list(head), ["---"] * len(head), *filled)]
    return [*body, ""]
