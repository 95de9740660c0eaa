"""The pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")  # files only; no display is looked for
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_charts", "draw_cold_start"]

_OURS, _PEER, _LIMIT = "#1f6f8b", "#b8b8b8", "#c0392b"
_PEERS = ("transformers", "transformers-static", "genai", "llama.cpp")
_PHASE_COLORS = ("#9aa5b1", "#c9d1d9", "#5b8fb9", "#1f6f8b", "#e0a458", "#d17b49", "#a8577e")


def draw_charts(run: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Draws what a run holds.

    Args:
        run: After report.summarize.
        folder: Where the files go.
        stem: What their names begin with.

    Returns:
        The files.
    """
    written = []
    cases = {
        (result["batch_size"], case["prompt_len"], case["num_new"])
        for result in run["systems"]
        for case in result.get("cases", [])
    }
    for batch_size, prompt_len, num_new in sorted(cases):
        suffix = f"-b{batch_size}-{prompt_len}+{num_new}" if len(cases) > 1 else ""
        path = folder / f"{stem}-speed{suffix}.png"
        _draw_speed(run, (batch_size, prompt_len, num_new), path)
        written.append(path)
    if any(result["sweep"] for results in run.get("sweeps", {}).values() for result in results):
        path = folder / f"{stem}-sweep.png"
        _draw_sweep(run, path)
        written.append(path)
    return written


def draw_cold_start(
    results: list[dict[str, Any]], phases: dict[str, str], title: str, path: Path
) -> None:
    """Draws the seconds to the first token as one bar of phases a system.

    Args:
        results: With `name` and `phases`, seconds by key of `phases`.
        phases: Key to label, in the order they happen.
        title: What was measured.
        path: The file.
    """
    used = {
        key: label
        for key, label in phases.items()
        if any(result["phases"].get(key, 0) > 0 for result in results)
    }
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.5 * len(results)), layout="constrained")
    rows = range(len(results))
    left = [0.0] * len(results)
    for (key, label), color in zip(used.items(), _PHASE_COLORS * 2, strict=False):
        widths = [result["phases"].get(key, 0.0) for result in results]
        axes.barh(rows, widths, left=left, color=color, label=label, height=0.65)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, total in zip(rows, left, strict=True):
        axes.text(total, row, f" {total:.1f} s", va="center")
    _name_rows(axes, [result["name"] for result in results])
    axes.set_xlim(0, 1.12 * max(left))
    axes.set_xlabel("seconds from starting the process")
    figure.suptitle(title, fontsize=11)
    figure.legend(loc="outside lower center", ncols=len(used), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_speed(run: dict[str, Any], which: tuple[int, int, int], path: Path) -> None:
    """Bars of tokens a second; a line across each marks what its precision allows here."""
    chosen = [
        (result, case)
        for result in run["systems"]
        for case in result.get("cases", [])
        if (result["batch_size"], case["prompt_len"], case["num_new"]) == which
        and "decode_tokens_per_s" in case
    ]
    if not chosen:
        return
    batch_size, prompt_len, num_new = which
    figure, panels = plt.subplots(
        1, 2, figsize=(11, 1.9 + 0.5 * len(chosen)), layout="constrained", sharey=True
    )
    for axes, kind in zip(panels, ("decode", "prefill"), strict=True):
        tokens = batch_size * (prompt_len if kind == "prefill" else 1)
        speeds = [case[f"{kind}_tokens_per_s"] for _, case in chosen]
        ceilings = [tokens / case[f"{kind}_limit_s"] for _, case in chosen]
        colors = [_PEER if result["name"] in _PEERS else _OURS for result, _ in chosen]
        axes.barh(range(len(chosen)), speeds, color=colors, height=0.65)
        for row, (speed, ceiling) in enumerate(zip(speeds, ceilings, strict=True)):
            label = "limit measured on this machine" if row == 0 else None
            axes.plot([ceiling, ceiling], [row - 0.4, row + 0.4], color=_LIMIT, lw=2, label=label)
            axes.text(speed, row, f" {speed:.3g}  ({speed / ceiling:.0%})", va="center", fontsize=9)
        axes.set_xlim(0, 1.25 * max(*speeds, *ceilings))
        axes.set_xlabel(f"{kind}, tokens per second (share of the limit)")
    names = [f"{result['name']}\n{result['precision']}" for result, _ in chosen]
    _name_rows(panels[0], names)
    _name_rows(panels[1], names)
    machine = run["machine"]["gpu"] if run["options"]["device"] == "cuda" else run["machine"]["cpu"]
    figure.suptitle(
        f"{run['model']['name']}, prompt {prompt_len}, {num_new} new, batch {batch_size}\n"
        f"{machine}, {run['options']['threads']} threads",
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
    sweeps = run["sweeps"]
    names = [result["name"] for result in next(iter(sweeps.values())) if result["sweep"]]
    figure, grid = plt.subplots(
        1, len(names), figsize=(1.5 + 3.6 * len(names), 4.2), layout="constrained", sharey=True,
        squeeze=False,
    )  # fmt: skip
    for axes, name in zip(grid[0], names, strict=True):
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
        axes.set_xlabel("live tokens")
        axes.grid(alpha=0.3)
    grid[0][0].set_ylim(bottom=0)
    grid[0][0].set_ylabel("milliseconds a step")
    figure.suptitle(f"{run['model']['name']}: step time against live context", fontsize=11)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _name_rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
