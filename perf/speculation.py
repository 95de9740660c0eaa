"""Prompt lookup against one token a step: whether tokens are the same, and how much faster.

`python -m llamac.perf.speculation SOURCE TEXT_FILE [DTYPE]`; a bundle must be exported with
`--speculate lookup`. Half of the prompts are pieces of the text to go on with, half a shorter piece
twice and once more begun, which is a task of copying. Each is continued greedily and with a seed,
by both in turns, without ends.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runtime.bundle.manifest import MANIFEST_NAME
from ..runtime.language_model import LanguageModel
from ..runtime.load import LoadOptions, load
from ..runtime.request import Completion

__all__ = ["compare", "main", "make_prompts"]

_NUM_PROMPTS = 100
_PIECE, _PASSAGE, _BEGUN = 48, 40, 8  # ids
_NEW_TOKENS = 48


def make_prompts(ids: Sequence[int], bos: Sequence[int]) -> dict[str, list[list[int]]]:
    """Cuts a text.

    Args:
        ids: Of the text, at least enough for one piece.
        bos: What a prompt begins with.

    Returns:
        "free text" and "copying", half of the prompts each.
    """
    half = _NUM_PROMPTS // 2
    starts = [i * (len(ids) - _PIECE) // half for i in range(half)]
    passages = [list(ids[start : start + _PASSAGE]) for start in starts]
    return {
        "free text": [[*bos, *ids[start : start + _PIECE]] for start in starts],
        "copying": [[*bos, *own, *own, *own[:_BEGUN]] for own in passages],
    }


def compare(models: Sequence[LanguageModel], prompts: Sequence[list[int]], **options: Any) -> str:
    """Continues prompts with two models in turns.

    Args:
        models: Plain, and with guesses.
        prompts: Ids.
        options: Of the requests.

    Returns:
        What came of it.
    """
    ratios, same, guessed, right = [], 0, 0, 0
    for i, prompt in enumerate(prompts):
        done: dict[int, Completion] = {}
        for which in (i % 2, 1 - i % 2):
            (done[which],) = models[which].generate(prompt, max_new_tokens=_NEW_TOKENS, **options)
        plain, quick = done[0], done[1]
        same += plain.ids == quick.ids
        if plain.num_steps:
            ratios.append(plain.decode_s / quick.decode_s)
        guessed, right = guessed + quick.num_guessed, right + quick.num_right
    speed = f"{statistics.median(ratios):.2f} x as fast (median; least {min(ratios):.2f})"
    return (
        f"{same} of {len(prompts)} prompts with the same tokens; {speed}, {right} of {guessed} "
        "guesses right"
    )


def main(words: Sequence[str]) -> None:
    """Prints a line for each kind of prompt and of sampling.

    Args:
        words: Of the command line.
    """
    source, text_file, *dtype = words
    options: LoadOptions = {"threads": 2}
    if not (Path(source) / MANIFEST_NAME).exists():
        options |= {"max_seq_len": 256, "prefill_len": 128}
    if dtype:
        options["dtype"] = dtype[0]
    models = [load(source, **options), load(source, **{**options, "speculate": "lookup"})]
    ids = [*models[0].tokenizer.encode(Path(text_file).read_text())]
    bos = ids[:1] if models[0].tokenizer.bos_id == ids[0] else []
    for kind, prompts in make_prompts(ids[len(bos) :], bos).items():
        for sampling in ({"temperature": 0.0}, {"temperature": 0.8, "seed": 0}):
            name = "greedy" if sampling["temperature"] == 0 else "seeded"
            print(f"{kind}, {name}: {compare(models, prompts, eos_ids=(), **sampling)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
