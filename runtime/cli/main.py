"""The command line: `llamac COMMAND ...`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence

from ..backend import BackendUnavailableError
from ..bundle.inspect import describe_bundle, print_bundle
from ..bundle.manifest import open_bundle
from ..sampling import SamplingParams
from ..scheduler import Request, check_prompt
from ..text.chat_template import ChatTemplate
from ..text.tokenizer_files import load_tokenizer
from .commands import (
    INTERRUPTED,
    Session,
    chat,
    generate_texts,
    sampling_request,
    score_text,
)
from .doctor import describe_diagnosis, examine, format_diagnosis, without_torch
from .input_text import read_prompts, read_text, typed_lines
from .options import build_parser
from .terminal import progress_bar, status

__all__ = ["main"]

_PIPE_CLOSED = 141

_EXTRAS = {
    "torch": "torch",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "cpu",
    "transformers": "dev",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The words after `llamac`; None takes the process's own.

    Returns:
        0, 1 for a failed verification, 2 for bad input, 130 after Ctrl-C, 141 when nobody reads
        the output any more.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    commands = {
        "generate": _generate,
        "chat": _chat,
        "score": _score,
        "export": _export,
        "run": _run,
        "inspect": _inspect,
        "verify": _verify,
        "doctor": _doctor,
        "init": _init,
        "bench": _bench,
    }
    try:
        args = build_parser(commands).parse_args(argv)
        exit_code = args.run(args)
        sys.stdout.flush()
        return exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return _PIPE_CLOSED
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _refuse(f"{error.name} is not installed; pip install 'llamac[{extra}]'")
    except (ValueError, OSError, BackendUnavailableError) as error:
        return _refuse(str(error))


def _refuse(message: str) -> int:
    print(f"llamac: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _load(
    args: argparse.Namespace, *, prompts: Sequence[str] = (), all_logits: bool = False
) -> Session:
    """Loads the torch backend that the options ask for, once the prompts are known to fit."""
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads is {args.threads}; it must be at least 1")

    from ...model.checkpoint import open_checkpoint
    from ...model.load import DEMO_FOLDER, load_backend, static_shape

    source = args.model or DEMO_FOLDER
    checkpoint = open_checkpoint(source)
    tokenizer = load_tokenizer(checkpoint.folder)
    shape = static_shape(
        checkpoint.config,
        batch_size=max(1, min(len(prompts), 8)) if args.batch_size is None else args.batch_size,
        max_seq_len=args.max_seq_len,
        prefill_len=args.prefill_len,
    )
    for prompt in prompts:
        check_prompt(tokenizer.encode(prompt), shape)

    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with status() as progress:
        loaded = load_backend(
            source,
            compile=args.backend == "compile",
            device=args.device,
            dtype=args.dtype,
            batch_size=shape.batch_size,
            max_seq_len=shape.max_seq_len,
            prefill_len=shape.prefill_len,
            all_logits=all_logits,
            announce=lambda text: print(text, file=sys.stderr),
            progress=progress,
        )
    startup = loaded.backend.startup
    return Session(
        backend=loaded.backend,
        tokenizer=tokenizer,
        name=f"torch-{args.backend}/{args.device}",
        startup={
            "load_s": loaded.load_s,
            "compile_s": startup.compile_s if startup.cache_hit is not None else None,
            "compile_cache_hit": startup.cache_hit,
            "warmup_s": startup.warmup_s,
        },
    )


def _request_maker(args: argparse.Namespace) -> Callable[[tuple[int, ...]], Request]:
    """From prompt ids to a Request; bad options are refused before anything is loaded."""
    sampling = SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )
    logprobs = getattr(args, "logprobs", None)
    if logprobs is not None and not args.json:
        raise ValueError("--logprobs is printed as JSON only; add --json")
    make_request = sampling_request(
        sampling,
        max_new_tokens=args.max_new_tokens,
        stop=tuple(args.stop),
        stop_ids=tuple(args.stop_id),
        logprobs=logprobs,
    )
    make_request((0,))
    return make_request


def _generate(args: argparse.Namespace) -> int:
    make_request = _request_maker(args)
    prompts = read_prompts(args.prompt, args.prompt_file)
    return _continue(args, _load(args, prompts=prompts), prompts, make_request)


def _continue(
    args: argparse.Namespace,
    session: Session,
    prompts: Sequence[str],
    make_request: Callable[[tuple[int, ...]], Request],
) -> int:
    return generate_texts(
        session,
        prompts,
        make_request=make_request,
        limit_policy=args.limit,
        eos_ids=() if args.ignore_eos else None,
        as_json=args.json,
    )


def _chat(args: argparse.Namespace) -> int:
    from ...model.checkpoint import open_checkpoint
    from ...model.load import DEMO_FOLDER

    make_request = _request_maker(args)
    folder = open_checkpoint(args.model or DEMO_FOLDER).folder
    template = ChatTemplate.load(folder, args.chat_template)
    return chat(
        _load(args),
        template,
        typed_lines(),
        system=args.system,
        make_request=make_request,
        limit_policy=args.limit,
    )


def _score(args: argparse.Namespace) -> int:
    text = read_text(args.text_file)
    return score_text(_load(args, all_logits=True), text, as_json=args.json)


def _export(args: argparse.Namespace) -> int:
    from ...export import export_bundle
    from ...model.checkpoint import open_checkpoint

    with status() as progress:
        manifest = export_bundle(
            open_checkpoint(args.checkpoint),
            args.bundle,
            targets=args.target or ["cpu"],
            batch_size=args.batch_size,
            prefill_len=args.prefill_len,
            max_seq_len=args.max_seq_len,
            dtype=args.dtype,
            progress=progress,
        )
    print_bundle(manifest)
    return 0


def _run(args: argparse.Namespace) -> int:
    make_request = _request_maker(args)
    prompts = read_prompts(args.prompt, args.prompt_file)
    manifest = open_bundle(args.bundle, check=args.check)
    tokenizer = load_tokenizer(manifest.folder)
    for prompt in prompts:
        check_prompt(tokenizer.encode(prompt), manifest.shape)

    from ..ort.ort_backend import OrtBackend

    with status() as progress:
        backend = OrtBackend(
            manifest,
            provider=args.provider,
            target=args.target,
            threads=args.threads,
            engine_cache=args.engine_cache,
            prepack=args.prepack,
            progress=progress,
        )
    session = Session(
        backend=backend,
        tokenizer=tokenizer,
        name=f"ort-{args.provider}/{backend.target}",
        startup={"load_s": backend.load_s},
    )
    return _continue(args, session, prompts, make_request)


def _inspect(args: argparse.Namespace) -> int:
    manifest = open_bundle(args.bundle, check=args.check)
    if args.json:
        print(json.dumps(describe_bundle(manifest)))
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
    print(verification_json(result) if args.json else format_verification(result))
    print(f"report: {write_report(result, manifest.folder)}", file=sys.stderr)
    return 0 if result.passed else 1


def _doctor(args: argparse.Namespace) -> int:
    try:
        from ...model.doctor import torch_findings
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        found = without_torch()
    else:
        found = torch_findings()
    diagnosis = examine(found)
    print(json.dumps(describe_diagnosis(diagnosis)) if args.json else format_diagnosis(diagnosis))
    return 0


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
