"""The story grammar: what it tells it accepts, and nothing that is inconsistent."""

from __future__ import annotations

import re
from hashlib import sha256
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamac.model.demo.stories import accepts, explain, make_story, stories
from llamac.model.demo.story_plots import PLOTS

# Seed 1 tells: Beside a winding river, there lived a clever girl named Olive. ...
STUCK = make_story(1)


def test_every_told_story_is_accepted() -> None:
    refused = [explain(make_story(seed).text) for seed in range(500)]
    assert refused == [None] * 500


def test_every_plot_is_told() -> None:
    assert {make_story(seed).plot for seed in range(500)} == set(PLOTS)


def test_stories_never_change() -> None:
    text = "\n".join(make_story(seed).text for seed in range(100))
    assert (
        sha256(text.encode()).hexdigest()
        == "0b39043c97ade5d06a6706d8ec9c5dc385d57b96b7426e5e23e8fc649ac26ca6"
    )


def test_a_known_story() -> None:
    assert STUCK.plot == "stuck"
    assert STUCK.text.startswith("Beside a winding river, there lived a clever girl named Oliv")
    assert STUCK.cast["hero"] == "Olive"


@given(st.integers(min_value=0, max_value=2**64))
def test_stories_are_tidy(seed: int) -> None:
    story = make_story(seed)
    assert re.fullmatch(r'[A-Za-z ,.:?!\'"]+', story.text)
    assert "  " not in story.text
    assert " ." not in story.text
    assert story.text[-1] in '.!"'
    assert 60 <= len(story.text.split()) <= 190
    assert story.nats > 10


@pytest.mark.parametrize("seed", range(60))
def test_a_dropped_sentence_is_refused(seed: int) -> None:
    sentences = make_story(seed).text.split(". ")
    middle = len(sentences) // 2
    assert not accepts(". ".join(sentences[:middle] + sentences[middle + 1 :]))


@pytest.mark.parametrize("seed", range(60))
def test_an_unfinished_story_is_refused(seed: int) -> None:
    text = make_story(seed).text
    assert not accepts(text[: text.rindex(" ")])
    assert not accepts(text + " The end.")
    assert not accepts(text + " ")


def _replace_last(text: str, old: str, new: str) -> str:
    """Replaces the last mention of a word."""
    start = [match.start() for match in re.finditer(rf"\b{re.escape(old)}\b", text)][-1]
    return text[:start] + new + text[start + len(old) :]


@pytest.mark.parametrize(
    ("plot", "role", "others"),
    [
        ("stuck", "hero", ("Ben", "Mia")),
        ("lost", "friend", ("Ben", "Mia")),
        ("lost", "toy", ("drum", "scarf")),
        ("lost", "colour", ("red", "blue")),
        ("stuck", "climber", ("crow", "cat")),
        ("race", "goal", ("bridge", "castle")),
        ("noise", "noise", ("squeaking", "hooting")),
        ("truth", "number", ("two", "six")),
        ("fear", "fear", ("dark", "thunder")),
    ],
)
def test_a_word_that_changes_in_mid_story_is_refused(
    plot: str, role: str, others: tuple[str, str]
) -> None:
    num_changed = 0
    for story in islice((s for s in stories(500, held_out=False) if s.plot == plot), 10):
        word = story.cast[role]
        other = others[1] if word == others[0] else others[0]
        if len(re.findall(rf"\b{word}\b", story.text)) > 1:
            assert not accepts(_replace_last(story.text, word, other))
            num_changed += 1
    assert num_changed > 2


def test_a_wrong_pronoun_is_refused() -> None:
    num_changed = 0
    for text in (make_story(seed).text for seed in range(60)):
        for right, wrong in (("she", "he"), ("he", "she"), ("her", "his"), ("his", "her")):
            if re.search(rf"\b{right}\b", text):
                assert not accepts(_replace_last(text, right, wrong))
                num_changed += 1
    assert num_changed > 60


def test_a_spot_of_another_place_is_refused() -> None:
    beach = next(
        s for s in stories(2000, held_out=False) if s.plot == "lost" and s.cast["place"] == "beach"
    )
    moved = beach.text.replace("the beach", "the meadow")
    assert not accepts(moved)


def test_a_friend_who_is_the_hero_is_refused() -> None:
    story = next(s for s in stories(500, held_out=False) if s.plot == "lost")
    twin = story.text.replace(story.cast["friend"], story.cast["hero"])
    assert not accepts(twin)


def test_the_opening_of_another_story_is_refused() -> None:
    num_changed = 0
    for seed in range(100):
        story, other = make_story(seed), make_story(seed + 100)
        if story.cast["hero"] != other.cast["hero"]:
            opening, _, _ = other.text.partition(". ")
            _, _, rest = story.text.partition(". ")
            assert not accepts(f"{opening}. {rest}")
            num_changed += 1
    assert num_changed > 50


def test_any_one_name_that_is_mixed_up_is_refused() -> None:
    num_changed = 0
    for story in (s for s in map(make_story, range(100)) if "friend" in s.cast):
        hero, friend = story.cast["hero"], story.cast["friend"]
        for match in re.finditer(rf"\b({hero}|{friend})\b", story.text):
            wrong = friend if match[0] == hero else hero
            text = f"{story.text[: match.start()]}{wrong}{story.text[match.end() :]}"
            assert not accepts(text), text
            num_changed += 1
    assert num_changed > 500


def test_the_reason_says_where_the_reading_broke_off() -> None:
    text = STUCK.text.replace("raced up", "walked around")
    assert text != STUCK.text
    reason = explain(text)
    assert reason is not None
    assert "plot 'stuck'" in reason
    assert "goes on with 'walked around" in reason


@pytest.mark.parametrize("text", ["", "Once upon a time", "Hello, world!", "\x00", "Mia " * 1000])
def test_other_texts_are_refused(text: str) -> None:
    assert not accepts(text)


def test_the_sets_share_no_combination() -> None:
    def combinations(held_out: bool) -> set[tuple[str, str, str]]:
        told = stories(1000, held_out=held_out)
        return {(s.plot, s.cast["hero"], s.cast[PLOTS[s.plot].key]) for s in told}

    assert not combinations(held_out=True) & combinations(held_out=False)


def test_about_a_tenth_is_held_out() -> None:
    assert 150 <= sum(make_story(seed).held_out for seed in range(2000)) <= 250
