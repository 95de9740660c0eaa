"""From the words of a command line to what runs."""

from __future__ import annotations

import argparse
import json
import logging
import secrets
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..backend import BackendUnavailableError
from ..bundle.inspect import describe_bundle, print_bundle
from ..bundle.opening import open_bundle
from ..cache_folder import cache_root, cache_sizes, clear_caches
from ..chunks import check_prompt
from ..language_model import RequestOptions, make_request
from ..load import SAMPLING_KEYS, LoadOptions, Source, open_source
from ..memory import format_bytes
from ..session import read_session
from ..speculation import parse_speculate
from ..text.chat_template import ChatTemplate
from ..text.tokenizer import Tokenizer
from ..text.tokenizer_files import load_tokenizer
from .chat import Conversation, chat
from .commands import generate_texts
from .doctor import doctor
from .input_text import checked_text, read_prompts, read_schema, read_text, read_tools, typed_lines
from .options import parse_words
from .ranks import follow_launcher
from .score import score_text
from .serve_command import serve
from .terminal import LineFormatter, emit, progress_bar, say, status
from .text_options import given
from .text_table import format_table

__all__ = ["run"]

_EXTRAS = {
    "torch": "torch",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "cpu",
    "transformers": "dev",
    "starlette": "serve",
    "anyio": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "llguidance": "structured",
}
_MAX_DEFAULT_BATCH = 8
_MAX_SAMPLES = 10_000


def run(words: Sequence[str]) -> int:
    """Parses a command line and runs its command.

    Args:
        words: After `llamac`.

    Returns:
        The exit code; see llamac.runtime.cli.
    """
    args = parse_words(
        words,
        {
            "generate": _generate,
            "run": _generate,
            "chat": _chat,
            "serve": serve,
            "score": _score,
            "export": _export,
            "quantize": _quantize,
            "inspect": _inspect,
            "verify": _verify,
            "doctor": doctor,
            "cache": _cache,
            "init": _init,
            "bench": _bench,
        },
    )
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(verbose=args.verbose))
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.WARNING, handlers=[handler], force=True
    )
    tells_requests = args.run is serve and not args.verbose
    logging.getLogger("llamac").setLevel(logging.INFO if tells_requests else logging.NOTSET)
    try:
        code = follow_launcher(args)
        return args.run(args) if code is None else code
    except BrokenPipeError:
        raise
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        problem = f"{error.name} is not installed; pip install 'llamac[{extra}]'"
    except MemoryError:
        problem = "not enough memory; ask for less, or close other programs"
    except (ValueError, OSError, OverflowError, RecursionError, BackendUnavailableError) as error:
        if args.verbose:
            traceback.print_exc()
        problem = str(error) or type(error).__name__
    say(f"llamac: {problem}")
    return 2


def _cache(args: argparse.Namespace) -> int:
    sizes = cache_sizes()
    if args.clear:
        clear_caches()
    rows = [(name, format_bytes(size)) for name, size in sorted(sizes.items())]
    state = "cleared" if args.clear else "kept"
    emit(format_table([(str(cache_root()), state), *rows]))
    return 0


def _open_source(args: argparse.Namespace) -> Source:
    """Takes the source, the first word unless --model names one, and opens it."""
    source = getattr(args, "model", None)
    if source is None and args.words:
        source = args.words.pop(0)
        if args.command == "generate" and " " in source and not Path(source).exists():
            raise FileNotFoundError(
                f"{source}: no such source; a text for the demo model is given as -p TEXT"
            )
    options = LoadOptions(**given(args, tuple(LoadOptions.__annotations__)))
    if args.command == "run":
        options["backend"] = "ort"
    return open_source(source, **options)


def _request_options(args: argparse.Namespace) -> RequestOptions:
    """What the command line asks of every request; bad options are refused here."""
    sampling = given(args, SAMPLING_KEYS)
    sampling["seed"] = secrets.randbits(32) if args.seed is None else args.seed
    logprobs = getattr(args, "logprobs", None)
    if logprobs is not None and not args.json:
        raise ValueError("--logprobs is printed as JSON only; add --json")
    options: dict[str, Any] = {
        **given(args, ("max_new_tokens", "min_tokens", "presence_penalty", "frequency_penalty")),
        "logit_bias": tuple(args.logit_bias),
        "stop": tuple(args.stop),
        "stop_ids": tuple(args.stop_id),
        "limit_policy": args.limit,
        "eos_ids": () if args.ignore_eos else None,
        "grammar": read_schema(getattr(args, "json_schema", None)),
        "logprobs": logprobs,
    }
    asked = RequestOptions(**options, **sampling)
    make_request((0,), asked)
    return asked


def _generate(args: argparse.Namespace) -> int:
    options = _request_options(args)
    if not 1 <= args.n <= _MAX_SAMPLES:
        raise ValueError(f"-n is {args.n}; it must be between 1 and {_MAX_SAMPLES}")
    source = _open_source(args)
    prompts = read_prompts([*args.words, *args.prompt], args.prompt_file)
    for prompt in prompts:
        make_request((0,), RequestOptions(**{**options, **prompt.options}))
    tokenizer = load_tokenizer(source.folder)
    default_batch = min(len(prompts) * args.n, _MAX_DEFAULT_BATCH)
    shape = source.shape(default_batch=default_batch)
    every_ids = [_encode(tokenizer, prompt.text, special=args.special) for prompt in prompts]
    for ids in every_ids:
        check_prompt(ids, shape)
    with status() as progress:
        model = source.load(
            tokenizer=tokenizer,
            default_batch=default_batch,
            generation_config=not args.ignore_generation_config,
            announce=say,
            progress=progress,
        )
    requests, texts = [], []
    for prompt, ids in zip(prompts, every_ids, strict=True):
        for index in range(args.n):
            own: Any = {**options, "sample_index": index, **prompt.options}
            requests.append(model.request(ids, **own))
            texts.append("" if args.no_display_prompt else prompt.text)
    return generate_texts(model, texts, requests, as_json=args.json)


def _encode(tokenizer: Tokenizer, text: str, *, special: bool) -> list[int]:
    if not special and (found := tokenizer.specials_in(text)):
        first = min(found, key=text.index)
        say(
            f"warning: {first} in the prompt is plain text; with --special it is the token "
            "of that name"
        )
    return tokenizer.encode(text, special=special)


def _chat(args: argparse.Namespace) -> int:
    saved = read_session(args.session) if args.session and args.session.exists() else None
    if saved is not None and args.system is not None:
        raise ValueError(f"--system is {args.session}'s own; leave it out, or name another file")
    if saved is not None and args.seed is None:
        args.seed = saved.seed
    options = _request_options(args)
    system = None if args.system is None else checked_text(args.system, "--system")
    tools = None if args.tools is None else read_tools(args.tools)
    source = _open_source(args)
    template = ChatTemplate.load(source.folder, args.chat_template)
    with status() as progress:
        model = source.load(
            generation_config=not args.ignore_generation_config,
            keep_prefixes=True,
            template=template,
            announce=say,
            progress=progress,
        )
    conversation = Conversation(model, system=system, tools=tools)
    if saved is not None:
        conversation.restore(saved)
    return chat(
        conversation,
        typed_lines(),
        make_request=lambda ids: model.request(ids, **options),
        session_file=args.session,
    )


def _score(args: argparse.Namespace) -> int:
    text = read_text(args.text_file)
    source = _open_source(args)
    with status() as progress:
        options: Any = {"all_logits": True, "generation_config": False, "progress": progress}
        model = source.load(announce=say, **options)
        reference = None
        if args.against is not None:
            reference = _open_reference(args.against, source).load(**options)
    return score_text(model, text, reference=reference, as_json=args.json)


def _open_reference(against: str, source: Source) -> Source:
    """A checkpoint runs eagerly in float32, in the shape of what is compared with it."""
    found = open_source(against)
    if found.manifest is not None:
        return found
    rows = source.shape().max_seq_len
    return open_source(against, backend="eager", dtype="float32", max_seq_len=rows)


def _export(args: argparse.Namespace) -> int:
    from ...export import export_bundle
    from ...model.checkpoint import open_checkpoint

    num_guesses = parse_speculate(args.speculate)  # refused before long work
    with status() as progress:
        checkpoint = open_checkpoint(args.checkpoint, adapter=args.adapter)
        if args.quantize is not None:
            from ...model.quantization import parse_recipe, quantized_copy

            recipe = parse_recipe(args.quantize)
            checkpoint = quantized_copy(checkpoint, recipe, progress=progress)
        manifest = export_bundle(
            checkpoint,
            args.bundle,
            targets=args.target or ["cpu"],
            batch_size=args.batch_size,
            prefill_len=args.prefill_len,
            max_seq_len=args.max_seq_len,
            dtype=args.dtype,
            accuracy_level=args.accuracy_level,
            num_guesses=num_guesses,
            progress=progress,
        )
    print_bundle(manifest)
    return 0


def _quantize(args: argparse.Namespace) -> int:
    from ...model.checkpoint import open_checkpoint
    from ...model.quantization import parse_recipe, quantize_checkpoint

    recipe = parse_recipe(args.recipe)
    text = args.calibration and read_text(args.calibration)
    chosen = {"calibration": text} if text or args.no_calibration else {}
    checkpoint = open_checkpoint(args.checkpoint, adapter=args.adapter)
    with progress_bar("quantizing", unit="weights") as progress:
        kinds = quantize_checkpoint(checkpoint, args.out, recipe, progress=progress, **chosen)
    if args.json:
        emit(json.dumps([asdict(kind) for kind in kinds]))
        return 0
    rows = [
        (k.kind, str(k.count), str(k.form.bits), str(k.form.group_size), f"{k.relative_error:.4f}")
        for k in kinds
    ]
    emit(format_table([("weights", "number", "bits", "group", "relative error"), *rows]))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    manifest = open_bundle(args.bundle, check=args.check)
    if args.json:
        emit(json.dumps(describe_bundle(manifest)))
    else:
        print_bundle(manifest)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from ...export.verification import format_verification, verification_json, write_report
    from ...export.verify import verify_bundle

    text = None if args.text_file is None else read_text(args.text_file)
    manifest = open_bundle(args.bundle, check=args.check)
    with status() as progress:
        result = verify_bundle(
            manifest,
            against=args.against,
            providers=args.provider or (),
            targets=args.target or (),
            text=text,
            engine_build=args.engine_build,
            progress=progress,
        )
    emit(verification_json(result) if args.json else format_verification(result))
    if report := write_report(result, manifest.folder):
        say(f"report: {report}")
    return 0 if result.passed else 1


def _init(args: argparse.Namespace) -> int:
    from ...model.checkpoint.random_weights import write_random_checkpoint

    with progress_bar("writing weights") as progress:
        write_random_checkpoint(
            args.preset,
            args.out,
            dtype=args.dtype,
            seed=args.seed,
            shards=args.shards,
            num_hidden_layers=args.num_hidden_layers,
            progress=progress,
        )
    return 0


def _bench(args: argparse.Namespace) -> int:
    from ...perf.bench import main as bench

    return bench(args.rest)
