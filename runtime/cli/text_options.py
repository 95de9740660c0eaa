"""The options of commands that make text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["add_prompt_options", "add_sampling_options", "given"]


def given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The options among these that the command line names."""
    found = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Adds what generate and run continue."""
    parser.add_argument(
        "-p",
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="repeatable; - is standard input (default: BOS alone)",
    )
    parser.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="a text, or of .jsonl a prompt a line, with options of its own",
    )
    parser.add_argument(
        "--special", action="store_true", help="special tokens' names in prompts are tokens"
    )
    parser.add_argument(
        "-n", type=int, default=1, metavar="N", help="samples of each prompt (default: 1)"
    )
    parser.add_argument(
        "--no-display-prompt", action="store_true", help="print the continuation alone"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--json-schema", type=Path, metavar="FILE", help="what the text must be (default: anything)"
    )
    parser.add_argument("--logprobs", type=int, metavar="N", help="with N alternatives (JSON)")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Adds how texts are drawn and where they end."""
    own = "the model's own, else"
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="(default: 256)")
    group.add_argument("--temperature", type=float, help=f"0 is greedy (default: {own} 0.8)")
    group.add_argument("--top-k", type=int, metavar="K", help=f"(default: {own} 0, off)")
    group.add_argument("--top-p", type=float, metavar="P", help=f"(default: {own} 1, off)")
    group.add_argument("--min-p", type=float, metavar="P", help=f"(default: {own} 0, off)")
    group.add_argument(
        "--repetition-penalty", type=float, metavar="X", help=f"(default: {own} 1, off)"
    )
    for name in ("presence", "frequency"):
        group.add_argument(
            f"--{name}-penalty", type=float, metavar="X", help="of new tokens (default: 0)"
        )
    group.add_argument(
        "--logit-bias",
        action="append",
        type=_bias,
        default=[],
        metavar="ID=X",
        help="added to an id's logit; repeatable",
    )
    group.add_argument("--min-tokens", type=int, metavar="N", help="before an end (default: 0)")
    group.add_argument("--seed", type=int, help="(default: drawn, and shown)")
    group.add_argument(
        "--ignore-generation-config",
        action="store_true",
        help="not the model's own sampling settings",
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends a text; repeatable"
    )
    group.add_argument(
        "--stop-id", action="append", type=int, default=[], metavar="ID", help="repeatable"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on past the end token")
    group.add_argument(
        "--limit",
        choices=("stop", "roll"),
        default="stop",
        help="where the cache is full, stop or overwrite the oldest (default: stop)",
    )


def _bias(word: str) -> tuple[int, float]:
    token_id, _, bias = word.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is not ID=NUMBER") from None
