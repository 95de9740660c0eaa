"""The words of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from ..ort.providers import PROVIDERS

__all__ = ["OneLineParser", "build_parser"]


_DTYPES = ("float32", "float16", "bfloat16")


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and ends with 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def build_parser(run: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """Builds the parser of all commands.

    Args:
        run: Command name to the function that runs it.

    Returns:
        A parser whose result has the chosen function as `run`; its errors are one line.
    """
    parser = OneLineParser(prog="llamac", description="A compiler for LLaMA checkpoints.")
    parser.add_argument("--version", action="version", version=f"llamac {version('llamac')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue prompts with torch")
    _add_torch_options(generate)
    _add_prompt_options(generate)
    _add_sampling_options(generate)
    generate.set_defaults(run=run["generate"])

    talk = commands.add_parser("chat", help="talk with a model, line by line")
    _add_torch_options(talk)
    _add_sampling_options(talk)
    talk.add_argument("--system", metavar="TEXT", help="system message")
    talk.add_argument("--chat-template", type=Path, metavar="FILE", help="jinja template")
    talk.set_defaults(run=run["chat"])

    score = commands.add_parser("score", help="perplexity of a text")
    _add_torch_options(score)
    score.add_argument("--text-file", type=Path, required=True, metavar="FILE")
    score.add_argument("--json", action="store_true", help="also each token's logprob")
    score.set_defaults(run=run["score"])

    _add_bundle_commands(commands, run)

    init = commands.add_parser("init", help="write a checkpoint with random weights")
    init.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    init.add_argument("--preset", required=True, metavar="NAME", help="such as tinyllama-1.1b")
    init.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    init.add_argument("--seed", type=int, default=0)
    init.add_argument("--shards", type=int, default=1, metavar="N")
    init.add_argument("--num-hidden-layers", type=int, metavar="N", help="fewer layers")
    init.set_defaults(run=run["init"])

    doctor = commands.add_parser("doctor", help="what each backend needs, and what is here")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    doctor.set_defaults(run=run["doctor"])

    # Its options are its own parser's: here no word is an option, so all of them are passed on.
    bench = commands.add_parser(
        "bench", help="time backends and peers", add_help=False, prefix_chars="\0"
    )
    bench.add_argument("rest", nargs=argparse.REMAINDER)
    bench.set_defaults(run=run["bench"])
    return parser


def _add_bundle_commands(
    commands: Any, run: Mapping[str, Callable[[argparse.Namespace], int]]
) -> None:
    export = commands.add_parser("export", help="write a bundle of ONNX graphs")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="folder, file or name")
    export.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder to make")
    export.add_argument(
        "--target", action="append", choices=tuple(PROVIDERS), help="repeatable (default: cpu)"
    )
    export.add_argument("--dtype", choices=_DTYPES, help="of tensorrt and cuda; cpu is float32")
    export.add_argument("--batch-size", type=int, default=1, metavar="B", help="cache slots")
    _add_shape_options(export)
    export.set_defaults(run=run["export"])

    infer = commands.add_parser("run", help="continue prompts with a bundle, without torch")
    _add_bundle_options(infer)
    infer.add_argument("--provider", choices=tuple(PROVIDERS), default="cpu")
    infer.add_argument(
        "--target", choices=tuple(PROVIDERS), help="graphs (default: the provider's)"
    )
    infer.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    infer.add_argument(
        "--prepack", action="store_true", help="faster steps for a slow start and more memory"
    )
    infer.add_argument("--engine-cache", type=Path, metavar="DIR", help="of TensorRT engines")
    _add_prompt_options(infer)
    _add_sampling_options(infer)
    infer.set_defaults(run=run["run"])

    inspect = commands.add_parser("inspect", help="what a bundle holds and needs")
    _add_bundle_options(inspect)
    inspect.add_argument("--json", action="store_true", help="print JSON instead of text")
    inspect.set_defaults(run=run["inspect"])

    verify = commands.add_parser("verify", help="a bundle's logits against the eager fp32 model")
    _add_bundle_options(verify)
    verify.add_argument("--against", metavar="CHECKPOINT", help="default: the bundle's weights")
    verify.add_argument(
        "--provider",
        action="append",
        choices=tuple(PROVIDERS),
        help="repeatable (default: what runs)",
    )
    verify.add_argument(
        "--target",
        action="append",
        choices=tuple(PROVIDERS),
        help="repeatable (default: what runs)",
    )
    verify.add_argument("--text-file", type=Path, metavar="FILE", help="text to compare on")
    verify.add_argument("--engine-build", action="store_true", help="build TensorRT-RTX engines")
    verify.add_argument("--json", action="store_true", help="print JSON instead of a table")
    verify.set_defaults(run=run["verify"])


def _add_bundle_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--check", action="store_true", help="hash the weights too")


def _add_torch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="PATH|NAME", help="checkpoint (default: the built-in demo model)"
    )
    parser.add_argument("--backend", choices=("compile", "eager"), default="compile")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=_DTYPES)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("--batch-size", type=int, metavar="B", help="cache slots")
    _add_shape_options(parser)


def _add_shape_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-seq-len",
        type=int,
        metavar="S",
        help="cache rows (default: max_position_embeddings, at most 2048)",
    )
    parser.add_argument(
        "--prefill-len", type=int, metavar="P", help="tokens of a prefill chunk (default: 128)"
    )


def _add_prompt_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="repeatable; - is stdin"
    )
    parser.add_argument("--prompt-file", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--logprobs", type=int, metavar="N", help="with N alternatives (JSON)")


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, metavar="K")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="repeatable")
    parser.add_argument("--stop-id", action="append", type=int, default=[], metavar="ID")
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument(
        "--limit",
        choices=("stop", "roll"),
        default="stop",
        help="what happens when the cache is full",
    )
