"""A run's raw times into the numbers people quote, and its files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..model.config import LlamaConfig
from .roofline import Limits, best_limits, decode_work, prefill_work
from .setup import ITEM_BYTES
from .tables import to_markdown

__all__ = ["summarize", "write_run"]


def summarize(run: dict[str, Any]) -> None:
    """Adds the machine's limits to a run, and to each of its results the statistics.

    Medians, p10 and p90 of a step's time are over all steps of all trials. A cold start's phases
    are those of the start with the median total, so that they add up.

    Args:
        run: What bench.main collected.
    """
    for result in run["cold_start"]:
        if result["status"] == "ok":
            result |= _cold_start_statistics(result)
    if not run["limit_samples"]:
        return
    limits = best_limits(run["limit_samples"])
    run["limits"] = {
        "read_bytes_per_s": limits.read_bytes_per_s,
        "flops_per_s": dict(limits.flops_per_s),
    }
    config = LlamaConfig.from_dict(run["model"]["config"])
    for result in run["systems"]:
        for case in result.get("cases", []):
            case |= _case_statistics(case, result, config, limits, run["options"]["max_seq_len"])
    for max_seq_len, results in run["sweeps"].items():
        for result in results:
            result["sweep"] = [
                _sweep_point(int(context), times, result, config, limits, int(max_seq_len))
                for context, times in result.get("sweep", {}).items()
            ]


def write_run(run: dict[str, Any], folder: Path, *, charts: bool = True) -> list[Path]:
    """Writes a run's files: JSON, the tables, and charts where matplotlib is installed.

    Args:
        run: After summarize.
        folder: Made if it isn't there; a run of the same second is replaced.
        charts: Whether to draw.

    Returns:
        What was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    day, _, time = run["date"].partition("T")
    # A model's name may be a path.
    name, options = Path(run["model"]["name"]).name, run["options"]
    stem = f"{name}-{options['device']}-{options['dtype']}-{day}-{time[:8].replace(':', '')}"
    data, table = folder / f"{stem}.json", folder / f"{stem}.md"
    data.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    table.write_text(to_markdown(run), encoding="utf-8")
    written = [data, table]
    if charts:
        try:
            from .charts import draw_charts
        except ModuleNotFoundError as error:
            print(
                f"no charts: {error.name} is not installed; pip install 'llamac[perf]'",
                file=sys.stderr,
            )
        else:
            written += draw_charts(run, folder, stem)
    return written


def _cold_start_statistics(result: dict[str, Any]) -> dict[str, Any]:
    starts = sorted(result["starts"], key=lambda start: start["total_s"])
    middle = starts[(len(starts) - 1) // 2]
    return {
        "phases": middle["phases"],
        "total_s": middle["total_s"],
        "peak_rss_bytes": max(start["peak_rss_bytes"] for start in starts),
        "first_total_s": result["first_start"]["total_s"],
    }


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
    prompt_s = limits.least_s(prefill_work(config, num_tokens=num_tokens, **sizes), precision)
    statistics: dict[str, Any] = {
        "ttft_s": prefill_s,
        "prefill_tokens_per_s": batch_size * num_tokens / prefill_s,
        "prefill_limit_s": prompt_s,
        "prefill_share": prompt_s / prefill_s,
    }
    steps = np.concatenate(case["step_s"])
    if len(steps):
        tpot_s = float(np.median(steps))
        # Of num_new - 1 steps; the one in the middle.
        step = decode_work(config, context=num_tokens + case["num_new"] // 2 - 1, **sizes)
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
    return {
        "context": context,
        "step_s": {"median": float(np.median(times))} | _percentiles(np.array(times)),
        "limit_s": limits.least_s(work, result["precision"]),
        "raw_step_s": times,
    }


def _percentiles(times: np.ndarray) -> dict[str, float]:
    p10, p90 = np.percentile(times, [10, 90])
    return {"p10": float(p10), "p90": float(p90)}
