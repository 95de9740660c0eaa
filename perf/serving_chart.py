"""The picture of a run of servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only; no display is looked for
from matplotlib import pyplot as plt  # noqa: E402

__all__ = ["draw_serving"]

_COLORS = ("#1f6f8b", "#b8b8b8", "#7a7a7a")


def draw_serving(run: dict[str, Any], path: Path) -> None:
    """Draws throughput and the delays that clients see, a group of bars a scenario.

    Args:
        run: What `llamac bench --serve` keeps.
        path: The file.
    """
    rows = [row for row in run["rows"] if "ttft_s" in row]
    systems = list(dict.fromkeys(row["system"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    titles = (
        "tokens per second",
        "first token, ms, p50 and p99",
        "between tokens, ms, p50 and p99",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    width = 0.8 / len(systems)
    for index, system in enumerate(systems):
        own = {row["name"]: row for row in rows if row["system"] == system}
        color = _COLORS[index % len(_COLORS)]
        for place, name in enumerate(names):
            row, x = own[name], place + (index - (len(systems) - 1) / 2) * width
            label = system if place == 0 else None
            panels[0].bar(x, row["tokens_per_s"], width, color=color, label=label)
            for axes, figures in zip(
                panels[1:], (row["ttft_s"], row["inter_token_s"]), strict=True
            ):
                if figures is None:  # no stream had so many tokens
                    continue
                axes.bar(x, 1e3 * figures["p50"], width, color=color)
                axes.plot([x, x], [1e3 * figures["p50"], 1e3 * figures["p99"]], color="black", lw=1)
    for axes in panels[1:]:
        axes.set_yscale("log")
    figure.legend(loc="outside lower center", ncols=len(systems), frameon=False, fontsize=9)
    machine = run["machine"]
    figure.suptitle(
        f"{machine['cpu']}, load {machine['load_average']:.1f} at the start", fontsize=9
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
