"""A run's raw times into the numbers people quote, and its files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..model.config import LlamaConfig
from ..runtime.bundle.manifest import ITEM_BYTES
from .roofline import Limits, bits_per_weight, decode_work, prefill_work
from .tables import to_markdown
from .weight_sizes import WeightSizes

__all__ = ["summarize", "write_run"]


def summarize(run: dict[str, Any]) -> None:
    """Adds the machine's limits to a run, and to each of its results the statistics.

    Medians, p10 and p90 of a step's time are over all steps of all trials. A share of the limit
    is taken trial by trial, over the rates of the same trial, and is then the median: what others
    take of a shared machine drifts within minutes. A cold start's phases are those of the start
    with the median total, so that they add up.

    Args:
        run: What bench.main collected.
    """
    for result in run["cold_start"]:
        if result["status"] == "ok":
            result |= _cold_start_statistics(result)
    if not run["limit_samples"]:
        return
    samples = [Limits.of(sample) for sample in run["limit_samples"]]
    run["limits"] = {
        "read_bytes_per_s": _spread([limits.read_bytes_per_s for limits in samples]),
        "flops_per_s": {
            dtype: _spread([limits.flops_per_s[dtype] for limits in samples])
            for dtype in ITEM_BYTES
        },
    }
    config = LlamaConfig.from_dict(run["model"]["config"])
    for result in run["systems"]:
        if weights := WeightSizes.of_facts(_facts(result)):
            result["bits_per_weight"] = bits_per_weight(config, weights)
        for case in result.get("cases", []):
            limits = [samples[index] for index in case["limits"]]
            case |= _case_statistics(case, result, config, limits, run["options"]["max_seq_len"])
            if "sampled" in case:
                case["sampled"] |= _sampled_statistics(case, result["batch_size"])
    for max_seq_len, results in run["sweeps"].items():
        for result in results:
            limits = [samples[index] for index in result.get("limits", [])]
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
    limits: list[Limits],
    max_seq_len: int,
) -> dict[str, Any]:
    """Statistics of one case; `limits` are those of its trials."""
    precision, batch_size = result["precision"], result["batch_size"]
    sizes = {
        "item_bytes": _item_bytes(result),
        "weights": WeightSizes.of_facts(_facts(result)),
        "batch_size": batch_size,
        "max_seq_len": max_seq_len,
    }
    num_tokens = case["prompt_len"]
    prefill_s = float(np.median(case["prefill_s"]))
    prompt = prefill_work(config, num_tokens=num_tokens, **sizes)
    prompt_s = np.array([rates.least_s(prompt, precision) for rates in limits])
    statistics: dict[str, Any] = {
        "ttft_s": prefill_s,
        "prefill_tokens_per_s": batch_size * num_tokens / prefill_s,
        "prefill_limit_s": float(np.median(prompt_s)),
        "prefill_share": float(np.median(prompt_s / case["prefill_s"])),
    }
    steps = np.concatenate(case["step_s"])
    if len(steps):
        tpot_s = float(np.median(steps))
        # Of num_new - 1 steps; the one in the middle.
        step = decode_work(config, context=num_tokens + case["num_new"] // 2 - 1, **sizes)
        least_s = np.array([rates.least_s(step, precision) for rates in limits])
        trial_s = np.median(case["step_s"], axis=1)
        statistics |= {
            "tpot_s": {"median": tpot_s} | _percentiles(steps),
            "decode_tokens_per_s": batch_size / tpot_s,
            "decode_limit_s": float(np.median(least_s)),
            "decode_share": float(np.median(least_s / trial_s)),
            "decode_bytes": step.needed_bytes,
            "wasted_kv_bytes": step.wasted_kv_bytes,
        }
    return statistics


def _sampled_statistics(case: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Rates of runs from end to end: of the decodes alone, and prompts included."""
    trials = case["sampled"]["trials"]
    total_s = float(np.median([trial["total_s"] for trial in trials]))
    statistics: dict[str, Any] = {
        "ttft_s": float(np.median([trial["ttft_s"] for trial in trials])),
        "tokens_per_s": batch_size * case["num_new"] / total_s,
    }
    steps = np.concatenate([trial["step_s"] for trial in trials])
    if len(steps):
        tpot_s = float(np.median(steps))
        statistics |= {
            "tpot_s": {"median": tpot_s} | _percentiles(steps),
            "decode_tokens_per_s": batch_size / tpot_s,
        }
    return statistics


def _sweep_point(
    context: int,
    times: list[list[float]],
    result: dict[str, Any],
    config: LlamaConfig,
    limits: list[Limits],
    max_seq_len: int,
) -> dict[str, Any]:
    work = decode_work(
        config,
        item_bytes=_item_bytes(result),
        weights=WeightSizes.of_facts(_facts(result)),
        batch_size=result["batch_size"],
        context=context,
        max_seq_len=max_seq_len,
    )
    least_s = [rates.least_s(work, result["precision"]) for rates in limits]
    return {
        "context": context,
        "step_s": {"median": float(np.median(times))} | _percentiles(np.array(times)),
        "limit_s": float(np.median(least_s)),
        "raw_step_s": times,
    }


def _facts(result: dict[str, Any]) -> dict[str, Any]:
    return result.get("facts", {})  # none of what never ran


def _item_bytes(result: dict[str, Any]) -> int:
    """Of the cache."""
    return ITEM_BYTES[_facts(result).get("cache_dtype", result["precision"])]


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "least": min(values), "most": max(values)}


def _percentiles(times: np.ndarray) -> dict[str, float]:
    p10, p90 = np.percentile(times, [10, 90])
    return {"p10": float(p10), "p90": float(p90)}
