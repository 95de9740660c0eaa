"""The pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")  # files only; no display is looked for
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from .systems import PEERS  # noqa: E402
from .tables import PHASES, count_of, format_rate  # noqa: E402
from .weight_sizes import describe_precision  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_charts"]

_OURS, _PEER, _LIMIT = "#1f6f8b", "#b8b8b8", "#c0392b"
_PHASE_COLORS = {
    "python_s": "#9aa5b1",
    "harness_s": "#c9d1d9",
    "import_s": "#5b8fb9",
    "tokenizer_s": "#8fbcbb",
    "load_s": "#1f6f8b",
    "compile_s": "#e0a458",
    "first_call_s": "#ecd08f",
    "warmup_s": "#d17b49",
    "first_chunk_s": "#a8577e",
    "other_s": "#555555",
}


def draw_charts(run: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Draws what a run holds; of the systems, those that are right.

    Args:
        run: After report.summarize.
        folder: Where the files go.
        stem: What their names begin with.

    Returns:
        The files.
    """
    written = []
    timed = [
        (result, case)
        for result in _right(run["systems"])
        for case in result["cases"]
        if "decode_tokens_per_s" in case
    ]
    groups: dict[tuple[int, int, int], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for result, case in timed:
        key = (result["batch_size"], case["prompt_len"], case["num_new"])
        groups.setdefault(key, []).append((result, case))
    for (batch_size, prompt_len, num_new), group in groups.items():
        suffix = f"-b{batch_size}-{prompt_len}+{num_new}" if len(groups) > 1 else ""
        path = folder / f"{stem}-speed{suffix}.png"
        _draw_speed(run, group, path)
        written.append(path)
    if any(_right(results) for results in run["sweeps"].values()):
        path = folder / f"{stem}-sweep.png"
        _draw_sweep(run, path)
        written.append(path)
    if _right(run["cold_start"]):
        path = folder / f"{stem}-cold-start.png"
        _draw_cold_start(run, path)
        written.append(path)
    return written


def _right(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [result for result in results if result["status"] == "ok"]


def _draw_speed(
    run: dict[str, Any], chosen: list[tuple[dict[str, Any], dict[str, Any]]], path: Path
) -> None:
    """Bars of tokens a second; a line across each marks what its precision allows here."""
    first, case = chosen[0]
    batch_size, prompt_len, num_new = first["batch_size"], case["prompt_len"], case["num_new"]
    figure, panels = plt.subplots(
        1, 2, figsize=(11, 1.9 + 0.5 * len(chosen)), layout="constrained", sharey=True
    )
    for axes, kind in zip(panels, ("decode", "prefill"), strict=True):
        tokens = batch_size * (prompt_len if kind == "prefill" else 1)
        speeds = [case[f"{kind}_tokens_per_s"] for _, case in chosen]
        ceilings = [tokens / case[f"{kind}_limit_s"] for _, case in chosen]
        colors = [_PEER if result["name"] in PEERS else _OURS for result, _ in chosen]
        axes.barh(range(len(chosen)), speeds, color=colors, height=0.65)
        shares = [case[f"{kind}_share"] for _, case in chosen]
        for row, (speed, ceiling, share) in enumerate(zip(speeds, ceilings, shares, strict=True)):
            label = "limit measured on this machine" if row == 0 else None
            axes.plot([ceiling, ceiling], [row - 0.4, row + 0.4], color=_LIMIT, lw=2, label=label)
            axes.text(
                speed,
                row,
                f" {format_rate(speed)}  ({share:.0%})",
                va="center",
                fontsize=9,
            )
        axes.set_xlim(0, 1.25 * max(*speeds, *ceilings))
        axes.set_xlabel(f"{kind}, tokens per second (share of the limit)")
    _name_rows(
        panels[0], [f"{result['name']}\n{describe_precision(result)}" for result, _ in chosen]
    )
    panels[1].spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{run['model']['name']}, prompt {prompt_len}, {num_new} new, batch {batch_size}\n"
        f"{_machine(run)}",
        fontsize=11,
    )
    handles, labels = panels[0].get_legend_handles_labels()
    handles += [Rectangle((0, 0), 1, 1, color=color) for color in (_OURS, _PEER)]
    labels += ["llamac", "peer"]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_sweep(run: dict[str, Any], path: Path) -> None:
    """One panel a system, one line a cache length: lines that coincide cost only what is live."""
    sweeps = {rows: _right(results) for rows, results in run["sweeps"].items()}
    names = list(dict.fromkeys(r["name"] for results in sweeps.values() for r in results))
    num_columns = min(len(names), 3)
    num_rows = -(-len(names) // num_columns)
    size = (1.5 + 3.4 * num_columns, 1.2 + 2.9 * num_rows)
    figure, grid = plt.subplots(
        num_rows, num_columns, figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    panels = grid.flatten()
    for axes in panels[len(names) :]:
        axes.axis("off")
    for axes, name in zip(panels, names, strict=False):
        limit: dict[int, float] = {}
        for index, (max_seq_len, results) in enumerate(sweeps.items()):
            points = next((r["sweep"] for r in results if r["name"] == name), [])
            if not points:
                continue
            contexts = [point["context"] for point in points]
            times = [1e3 * point["step_s"]["median"] for point in points]
            color = plt.get_cmap("viridis")(0.1 + 0.75 * index / max(len(sweeps) - 1, 1))
            axes.plot(contexts, times, "o-", ms=4, color=color, label=f"S = {max_seq_len}")
            limit |= {point["context"]: 1e3 * point["limit_s"] for point in points}
        ordered = sorted(limit.items())
        axes.plot(*zip(*ordered, strict=True), "--", color=_LIMIT, lw=1.5, label="limit")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
    for axes in panels[max(len(names) - num_columns, 0) : len(names)]:
        axes.set_xlabel("live tokens")
    for row in grid:
        row[0].set_ylabel("milliseconds a step")
    panels[0].set_ylim(bottom=0)
    figure.suptitle(
        f"{run['model']['name']}: step time against live context\n{_machine(run)}", fontsize=11
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_cold_start(run: dict[str, Any], path: Path) -> None:
    """The seconds to the first token as one bar of phases a system."""
    results = _right(run["cold_start"])
    used = [key for key in PHASES if any(key in result["phases"] for result in results)]
    figure, axes = plt.subplots(figsize=(10, 2.1 + 0.5 * len(results)), layout="constrained")
    left = [0.0] * len(results)
    for key in used:
        widths = [result["phases"].get(key, 0.0) for result in results]
        color = _PHASE_COLORS[key]
        axes.barh(range(len(results)), widths, left=left, color=color, label=PHASES[key])
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    for row, result in enumerate(results):
        axes.text(left[row], row, f" {result['total_s']:.1f} s", va="center", fontsize=9)
    _name_rows(axes, [f"{result['name']}\n{describe_precision(result)}" for result in results])
    axes.set_xlim(0, 1.12 * max(left))
    axes.set_xlabel("seconds from starting the process to its first token")
    figure.suptitle(
        f"{run['model']['name']}, prompt {results[0]['prompt_len']}: a second start, with full "
        f"caches\n{_machine(run)}",
        fontsize=11,
    )
    figure.legend(loc="outside lower center", ncols=min(len(used), 5), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _machine(run: dict[str, Any]) -> str:
    name = run["machine"]["gpu"] if run["options"]["device"] == "cuda" else run["machine"]["cpu"]
    return f"{name}, {count_of(run['options']['threads'], 'thread')}"


def _name_rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
