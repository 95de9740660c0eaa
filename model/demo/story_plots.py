"""The plots of the demo stories: data that `stories.py` tells and checks.

They stand in story_plots.txt. A section begins with `== NAME KEY`: a plot and the role that, with
the hero, decides whether a story is held out of training; or with `== NAME`: beats that plots
share. Beats have a blank line between them. A beat is a list of variants, each beginning with
"- ". Within a variant, `[a|b]` is a choice and `{role.form}` is a word: the first mention of a
role picks its word, and every later one repeats it. `@name` inserts shared beats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PLOTS", "SHARED", "Plot"]


@dataclass(frozen=True, slots=True)
class Plot:
    """A story line.

    Attributes:
        key: The role that decides what is held out.
        beats: Its text.
    """

    key: str
    beats: str


def _read_plots(path: Path) -> tuple[Mapping[str, str], Mapping[str, Plot]]:
    shared: dict[str, str] = {}
    plots: dict[str, Plot] = {}
    for section in path.read_text(encoding="utf-8").split("\n== ")[1:]:
        head, _, beats = section.partition("\n")
        name, _, key = head.partition(" ")
        if key:
            plots[name] = Plot(key, beats)
        else:
            shared[name] = beats
    return shared, plots


SHARED, PLOTS = _read_plots(Path(__file__).with_suffix(".txt"))
