"""The grammar of the demo model's stories: one walk tells a story, the same walk checks one.

A story is consistent by construction: a role (hero, toy, place, ...) is filled where it is first
mentioned and repeated everywhere else, pronouns included. Every word is chosen by the seed alone.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import count
from os.path import commonprefix
from typing import TypeVar

from .story_plots import PLOTS, SHARED
from .story_words import ROLES, Word

__all__ = ["Story", "accepts", "explain", "make_story", "stories"]

_T = TypeVar("_T")

# One in this many combinations of plot, hero and the plot's key word is kept out of training.
_HELD_OUT_SHARE = 10


@dataclass(frozen=True, slots=True)
class Story:
    """A told story.

    Attributes:
        text: The story, one paragraph.
        plot: Name of its plot.
        cast: The word that fills each role it mentions.
        nats: Minus the log-probability that the grammar makes these choices; no model can expect
            to predict stories better than this.
    """

    text: str
    plot: str
    cast: Mapping[str, str]
    nats: float

    @property
    def held_out(self) -> bool:
        """Whether training never sees this plot with this hero and this key word."""
        combination = f"{self.plot}|{self.cast['hero']}|{self.cast[PLOTS[self.plot].key]}"
        return sha256(combination.encode()).digest()[0] % _HELD_OUT_SHARE == 0


def make_story(seed: int) -> Story:
    """Tells a story.

    Args:
        seed: Decides everything; the same on every platform and Python.

    Returns:
        The story.
    """
    rng = random.Random(seed)
    nats = 0.0

    def pick(options: Sequence[_T]) -> _T:
        nonlocal nats
        nats += math.log(len(options))
        return options[int(rng.random() * len(options))]  # the draw that no Python release changes

    plot = pick(tuple(PLOTS))
    nodes, text = _beats(plot), ""
    cast: dict[str, Word] = {}
    while nodes:
        head, nodes = nodes[0], nodes[1:]
        match head:
            case str():
                text += head
            case _Choice(variants):
                nodes = pick(variants) + nodes
            case _Slot(role, form):
                if role not in cast:
                    cast[role] = pick(tuple(_candidates(role, cast)))
                text += _spell(cast[role], form)
    return Story(text, plot, {role: word[""] for role, word in cast.items()}, nats)


def stories(num: int, *, held_out: bool) -> Iterator[Story]:
    """Tells the first `num` stories, by seed from 0, of the training or of the held-out set."""
    for seed in count():
        if num <= 0:
            return
        story = make_story(seed)
        if story.held_out == held_out:
            num -= 1
            yield story


def accepts(text: str) -> bool:
    """Whether the grammar can tell exactly this text; see explain."""
    return explain(text) is None


def explain(text: str) -> str | None:
    """Parses a story and checks that it is consistent.

    Args:
        text: A whole story.

    Returns:
        None when the grammar can tell this text: one plot's beats in order, from opening to
        ending, every mention of a role agreeing with its first. Otherwise, where the last
        possible reading broke off.
    """
    furthest, furthest_plot = 0, "any"
    pending: list[tuple[str, tuple[_Node, ...], int, dict[str, Word]]]
    pending = [(plot, _beats(plot), 0, {}) for plot in PLOTS]
    while pending:
        plot, nodes, position, cast = pending.pop()
        if position > furthest:
            furthest, furthest_plot = position, plot
        if not nodes:
            if position == len(text):
                return None
            continue
        head, nodes = nodes[0], nodes[1:]
        match head:
            case str():
                if text.startswith(head, position):
                    pending.append((plot, nodes, position + len(head), cast))
                    continue
                shared = len(commonprefix((head, text[position : position + len(head)])))
                if position + shared > furthest:
                    furthest, furthest_plot = position + shared, plot
            case _Choice(variants):
                pending += [(plot, variant + nodes, position, cast) for variant in variants]
            case _Slot(role, form):
                for word in [cast[role]] if role in cast else _candidates(role, cast):
                    spelled = _spell(word, form)
                    if text.startswith(spelled, position):
                        extended = cast if role in cast else {**cast, role: word}
                        pending.append((plot, nodes, position + len(spelled), extended))
    return (
        f"no story of plot {furthest_plot!r} goes on with {text[furthest : furthest + 40]!r} "
        f"at character {furthest}, after {text[max(0, furthest - 40) : furthest]!r}"
    )


@dataclass(frozen=True, slots=True)
class _Slot:
    role: str
    form: str


@dataclass(frozen=True, slots=True)
class _Choice:
    variants: tuple[tuple[_Node, ...], ...]


_Node = str | _Slot | _Choice


def _candidates(role: str, cast: Mapping[str, Word]) -> Iterator[Word]:
    """The words that may fill a role, given the roles filled before it."""
    rule = ROLES[role]
    other, host = cast.get(rule.unlike), cast.get(rule.fits)
    for word in rule.words:
        if word != other and (host is None or host["kind"] == word["kinds"]):
            yield word


def _spell(word: Word, form: str) -> str:
    """Writes a word in a form: "animal.A" is its form "animal" with an article, capitalized."""
    text = word[""]
    for part in filter(None, form.split(".")):
        name = part.lower()
        if name == "a":
            text = f"an {text}" if text[0] in "aeiou" else f"a {text}"
        elif name != "cap":
            text = word[name]
        if part[0].isupper():
            text = text[0].upper() + text[1:]
    return text


@lru_cache
def _beats(plot: str) -> tuple[_Node, ...]:
    """Parses a plot's text: a choice of variants for each beat, a space between beats."""
    text = re.sub(
        r"^@(\w+)$", lambda match: SHARED[match[1]].strip(), PLOTS[plot].beats, flags=re.M
    )
    nodes: list[_Node] = []
    for beat in text.strip().split("\n\n"):
        variants = re.sub(r"\n +", " ", beat).removeprefix("- ").split("\n- ")
        nodes += [" "] if nodes else []
        nodes.append(_Choice(tuple(_parse(variant) for variant in variants)))
    return tuple(nodes)


def _parse(variant: str) -> tuple[_Node, ...]:
    """Parses one variant; choices do not nest."""
    nodes: list[_Node] = []
    for piece in re.split(r"(\{[\w.]+\}|\[[^]]*\])", variant):
        if piece.startswith("{"):
            nodes.append(_Slot(*piece[1:-1].partition(".")[::2]))
        elif piece.startswith("["):
            nodes.append(_Choice(tuple(_parse(option) for option in piece[1:-1].split("|"))))
        elif piece:
            nodes.append(piece)
    return tuple(nodes)
