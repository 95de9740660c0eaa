"""The words of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from ..ort.providers import PROVIDERS
from .serve_command import add_serve_options
from .terminal import one_line
from .text_options import add_prompt_options, add_sampling_options

__all__ = ["OneLineParser", "parse_words"]

_DTYPES = ("float32", "float16", "bfloat16")
_RECIPE_HELP = "int4 or int8, with a group size as in int8-g64"
_SOURCE_HELP = "checkpoint, bundle, or name in the Hugging Face cache (default: the demo model)"
_ADAPTER_HELP = "a LoRA that PEFT saved, merged as it is read (default: none)"

Command = Callable[[argparse.Namespace], int]


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose help shows defaults."""

    def __init__(self, *, example: str = "", **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        epilog = f"example:\n  {example}" if example else None
        super().__init__(epilog=epilog, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Prints the message and ends with 2."""
        self.exit(2, f"{self.prog}: {one_line(message)}; see {self.prog} --help\n")


def parse_words(words: Sequence[str], run: Mapping[str, Command]) -> argparse.Namespace:
    """Parses a command line; what is wrong ends the process with one line and code 2.

    Args:
        words: After `llamac`.
        run: Command name to the function that runs it.

    Returns:
        The options, the chosen function as `run`.
    """
    parser, commands = _build_parser(run)
    for word in words:  # argparse would take the value for the end of the options
        if word.startswith("-") and word.endswith("=--"):
            parser.error(f"{word[:-3]} has the value '--'; give another")
    args, rest = parser.parse_known_args(words)
    # argparse gives up on positional words that come after an option.
    more = [word for word in rest if not word.startswith("-")]
    if len(more) < len(rest) or not hasattr(args, "words"):
        if rest:
            wrong = next((word for word in rest if word.startswith("-")), rest[0])
            commands[args.command].error(f"unrecognized arguments: {wrong}")
    elif more:
        args.words += more
    return args


def _build_parser(
    run: Mapping[str, Command],
) -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    parser = OneLineParser(
        prog="llamac",
        description="A compiler for LLaMA checkpoints.",
        example='llamac generate ./Llama-3.2-1B "The sea is"',
    )
    parser.add_argument("--version", action="version", version=f"llamac {version('llamac')}")
    subparsers = parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", dest="command"
    )
    verbose = OneLineParser(add_help=False)
    verbose.add_argument(
        "--verbose", action="store_true", help="show what libraries log, and tracebacks"
    )

    def add(name: str, text: str, example: str) -> argparse.ArgumentParser:
        command = subparsers.add_parser(
            name, help=text, description=text, example=example, parents=[verbose]
        )
        command.set_defaults(run=run[name])
        return command

    _add_text_commands(add)
    _add_bundle_commands(add)
    _add_quantize(add)
    init = add(
        "init", "write a checkpoint with random weights", "llamac init OUT --preset llama-7b"
    )
    init.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    init.add_argument("--preset", required=True, metavar="NAME", help="such as tinyllama-1.1b")
    init.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="(default: bfloat16)")
    init.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    init.add_argument(
        "--shards", type=int, default=1, metavar="N", help="files of weights (default: 1)"
    )
    init.add_argument("--num-hidden-layers", type=int, metavar="N", help="(default: the preset's)")

    doctor = add("doctor", "what each backend needs, and what is here", "llamac doctor")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    cache = add("cache", "how much llamac's caches hold", "llamac cache --clear")
    cache.add_argument("--clear", action="store_true", help="delete what they hold")

    # Its options are its own parser's: here no word is an option, so all of them are passed on.
    bench = subparsers.add_parser(
        "bench", help="time backends and peers", add_help=False, prefix_chars="\0"
    )
    bench.add_argument("rest", nargs=argparse.REMAINDER)
    bench.set_defaults(run=run["bench"], verbose=False)
    return parser, subparsers.choices


def _add_text_commands(add: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    generate = add(
        "generate",
        "continue prompts",
        'llamac generate ./Llama-3.2-1B "The sea is" --max-new-tokens 64 --temperature 0',
    )
    generate.add_argument(
        "words", nargs="*", metavar="SOURCE, PROMPT", help=f"{_SOURCE_HELP}, then texts"
    )
    generate.add_argument("--model", metavar="SOURCE", help="then every word is a prompt")
    infer = add(
        "run", "continue prompts with a bundle, without torch", 'llamac run ./bundle "The sea is"'
    )
    infer.add_argument("words", nargs="+", metavar="BUNDLE, PROMPT", help="a folder, then texts")
    generate.usage = "llamac generate [SOURCE [PROMPT ...]] [options]"
    infer.usage = "llamac run BUNDLE [PROMPT ...] [options]"
    for parser in (generate, infer):
        add_prompt_options(parser)
        add_sampling_options(parser)

    talk = add("chat", "talk with a model", "llamac chat ./vicuna-7b --system 'Be brief.'")
    talk.add_argument("--system", metavar="TEXT", help="system message (default: none)")
    talk.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="jinja (default: the model's own)"
    )
    talk.add_argument(
        "--tools", type=Path, metavar="FILE", help="JSON list of functions (default: none)"
    )
    talk.add_argument(
        "--session", type=Path, metavar="FILE", help="goes on from there, and is kept there"
    )
    add_sampling_options(talk)
    serve = add(
        "serve", "OpenAI's HTTP interface", "llamac serve ./bundle --port 8000 --max-queue 64"
    )
    add_serve_options(serve)
    score = add(
        "score", "perplexity of a text", "llamac score ./Llama-3.2-1B --text-file essay.txt"
    )
    score.add_argument("--text-file", type=Path, required=True, metavar="FILE", help="UTF-8")
    score.add_argument(
        "--against", metavar="SOURCE", help="compare its predictions, of the unquantized model"
    )
    score.add_argument("--json", action="store_true", help="also each token's logprob")
    for parser in (talk, score, serve):
        parser.usage = f"{parser.prog} [SOURCE] [options]"
        parser.add_argument("words", nargs="*", metavar="SOURCE", help=_SOURCE_HELP)
        parser.add_argument("--model", metavar="SOURCE", help="the same")
    for parser in (generate, talk, score, serve):
        _add_torch_options(parser)
    for parser in (generate, infer, talk, score, serve):
        _add_ort_options(parser)


def _add_quantize(add: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    quantize = add(
        "quantize",
        "write a checkpoint of 4 or 8 bit weights",
        "llamac quantize ./Llama-3.2-1B ./Llama-3.2-1B-int4 int4",
    )
    quantize.add_argument("checkpoint", metavar="CHECKPOINT", help="folder, file or name")
    quantize.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    quantize.add_argument("recipe", metavar="RECIPE", help=_RECIPE_HELP)
    quantize.add_argument("--adapter", type=Path, metavar="FOLDER", help=_ADAPTER_HELP)
    text = quantize.add_mutually_exclusive_group()
    text.add_argument(
        "--calibration",
        type=Path,
        metavar="TEXT_FILE",
        help="what the model reads to see which weights matter (default: a text of llamac's own)",
    )
    text.add_argument(
        "--no-calibration", action="store_true", help="round to the nearest values: sooner, worse"
    )
    quantize.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_bundle_commands(add: Callable[[str, str, str], argparse.ArgumentParser]) -> None:
    export = add(
        "export",
        "write a bundle of ONNX graphs",
        "llamac export ./Llama-3.2-1B ./bundle --target cpu --target tensorrt",
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="folder, file or name")
    export.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder to make")
    export.add_argument(
        "--target", action="append", choices=tuple(PROVIDERS), help="repeatable (default: cpu)"
    )
    export.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="of tensorrt and cuda (default: the checkpoint's); cpu is float32",
    )
    export.add_argument(
        "--batch-size", type=int, default=1, metavar="B", help="cache slots (default: 1)"
    )
    export.add_argument("--adapter", type=Path, metavar="FOLDER", help=_ADAPTER_HELP)
    export.add_argument("--quantize", metavar="RECIPE", help=_RECIPE_HELP)
    export.add_argument(
        "--accuracy-level",
        type=int,
        default=4,
        metavar="N",
        help="of products with 4 and 8 bit weights on cpu and cuda: 4 rounds to int8 what is "
        "multiplied with them, 0 doesn't (default: 4)",
    )
    export.add_argument(
        "--speculate",
        metavar="lookup[:K]",
        help="also graphs that check K guesses (default: 4) in a step, for --speculate of run, "
        "serve, chat",
    )
    _add_shape_options(export)

    inspect = add("inspect", "what a bundle holds and needs", "llamac inspect ./bundle")
    verify = add(
        "verify", "a bundle's logits against the eager fp32 model", "llamac verify ./bundle"
    )
    for parser in (inspect, verify):
        parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="a folder")
        parser.add_argument("--check", action="store_true", help="hash the weights too")
        parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    verify.add_argument(
        "--against",
        metavar="CHECKPOINT",
        help="reference (default: the bundle's weights), or of quantized ones the original",
    )
    for name in ("provider", "target"):
        verify.add_argument(
            f"--{name}",
            action="append",
            choices=tuple(PROVIDERS),
            help="repeatable (default: what runs here)",
        )
    verify.add_argument(
        "--text-file", type=Path, metavar="FILE", help="text to compare on (default: a story)"
    )
    verify.add_argument("--engine-build", action="store_true", help="build TensorRT-RTX engines")


def _add_torch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        choices=("compile", "eager", "ort"),
        help="(default: compile for a checkpoint, ort for a bundle)",
    )
    group = parser.add_argument_group("of checkpoints")
    group.add_argument("--device", choices=("cpu", "cuda"), help="(default: cpu)")
    group.add_argument("--dtype", choices=_DTYPES, help="(default: the checkpoint's own)")
    group.add_argument(
        "--kv-dtype",
        choices=("int8",),
        help="of the cache: half of bfloat16's memory, and nearly its texts (default: as --dtype)",
    )
    group.add_argument("--adapter", type=Path, metavar="FOLDER", help=_ADAPTER_HELP)
    group.add_argument("--quantize", metavar="RECIPE", help=f"{_RECIPE_HELP} (default: as it is)")
    group.add_argument(
        "--tensor-parallel",
        type=int,
        metavar="N",
        help="processes that hold the model together (default: 1, or what torchrun started)",
    )
    group.add_argument(
        "--batch-size",
        type=int,
        metavar="B",
        help="cache slots (default: the prompts, at most 8; of serve 8)",
    )
    _add_shape_options(group)


def _add_shape_options(parser: Any) -> None:
    parser.add_argument(
        "--max-seq-len",
        type=int,
        metavar="S",
        help="cache rows (default: max_position_embeddings, at most 2048)",
    )
    parser.add_argument(
        "--prefill-len",
        type=int,
        metavar="P",
        help="tokens of a prefill chunk (default: 16 and 128)",
    )


def _add_ort_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads (default: one per core; of serve one less, shared out)",
    )
    parser.add_argument(
        "--speculate",
        metavar="lookup[:K]",
        help="guess K ids (default: 4, of a bundle as it was exported) from the text so far and "
        "check them in one step: the same tokens, sooner where text repeats",
    )
    group = parser.add_argument_group("of bundles")
    providers = tuple(PROVIDERS)
    group.add_argument("--provider", choices=providers, help="who runs (default: cpu)")
    group.add_argument("--target", choices=providers, help="graphs (default: the provider's)")
    group.add_argument(
        "--prepack",
        action="store_true",
        default=None,
        help="faster steps for a slow start and more memory",
    )
    group.add_argument(
        "--engine-cache", type=Path, metavar="DIR", help="TensorRT engines (default: user's cache)"
    )
    group.add_argument("--device-id", type=int, metavar="N", help="which GPU (default: 0)")
    group.add_argument("--check", action="store_true", default=None, help="hash the weights first")
