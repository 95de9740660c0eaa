"""What `generate`, `run`, `chat` and `score` do once a backend is loaded."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..backend import Backend
from ..sampling import SamplingParams, log_softmax
from ..scheduler import Completion, Event, LimitPolicy, Request, Scheduler, next_chunk, stream
from ..text.chat_template import ChatTemplate
from ..text.tokenizer import Tokenizer

__all__ = [
    "INTERRUPTED",
    "Session",
    "chat",
    "generate_texts",
    "sampling_request",
    "score_text",
]

INTERRUPTED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A loaded backend and how it came to be.

    Attributes:
        backend: Ready to run.
        tokenizer: The checkpoint's.
        name: Backend and device, such as "torch-compile/cpu".
        startup: Seconds and facts of loading and compiling, keys ending in their unit.
    """

    backend: Backend
    tokenizer: Tokenizer
    name: str
    startup: dict[str, Any]


def generate_texts(
    session: Session,
    prompts: Sequence[str],
    *,
    make_request: Callable[[tuple[int, ...]], Request],
    limit_policy: LimitPolicy,
    eos_ids: tuple[int, ...] | None,
    as_json: bool,
) -> int:
    """Continues prompts, streaming them to stdout in their order, then a speed line to stderr.

    Args:
        session: What runs.
        prompts: Texts; "" is BOS alone.
        make_request: Adds the options to a prompt's ids.
        limit_policy: "stop" or "roll".
        eos_ids: Ids that end a continuation; None is the tokenizer's.
        as_json: Print one JSON value instead of text.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        ValueError: A prompt does not fit.
    """
    requests = [make_request(_encode(session.tokenizer, prompt)) for prompt in prompts]
    scheduler = Scheduler(
        session.backend, session.tokenizer, limit_policy=limit_policy, eos_ids=eos_ids
    )
    request_ids = [scheduler.submit(request) for request in requests]
    pages = deque(_Page(prompt) for prompt in prompts)
    by_id = dict(zip(request_ids, pages, strict=True))
    exit_code = 0
    with _hold_interrupt() as is_interrupted:
        while not scheduler.idle:
            if is_interrupted():
                exit_code = INTERRUPTED
                for request_id in request_ids:
                    scheduler.cancel(request_id)
            for event in scheduler.step():
                by_id[event.request_id].take(event)
            if not as_json:
                _print_pages(pages)
    completions = [by_id[request_id].completion for request_id in request_ids]
    done = [completion for completion in completions if completion is not None]
    if as_json:
        objects = [_to_json(session, completion) for completion in done]
        print(json.dumps(objects[0] if len(prompts) == 1 else objects))
    print(_speed_line(session, done), file=sys.stderr)
    return exit_code


def chat(
    session: Session,
    template: ChatTemplate,
    lines: Iterable[str],
    *,
    system: str | None,
    make_request: Callable[[tuple[int, ...]], Request],
    limit_policy: LimitPolicy,
) -> int:
    """Answers line by line, the whole conversation being each answer's prompt.

    Args:
        session: What runs.
        template: Writes the conversation as a prompt.
        lines: What the user says.
        system: The system message, or None.
        make_request: Adds the options to a prompt's ids.
        limit_policy: "stop" or "roll".

    Returns:
        The exit code: 0 at the end of the input, 130 after Ctrl-C outside an answer.

    Raises:
        ValueError: The conversation no longer fits the cache.
    """
    messages = [{"role": "system", "content": system}] if system else []
    scheduler = Scheduler(session.backend, session.tokenizer, limit_policy=limit_policy)
    try:
        for line in lines:
            messages.append({"role": "user", "content": line.rstrip("\n")})
            ids = session.tokenizer.encode(template.render(messages), bos=False, special=True)
            answer = ""
            events = stream(scheduler, make_request(tuple(ids)))
            try:
                for event in events:
                    answer += event.text
                    print(event.text, end="", flush=True)
            except KeyboardInterrupt:
                events.close()
            print(flush=True)
            messages.append({"role": "assistant", "content": answer})
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def score_text(session: Session, text: str, *, as_json: bool) -> int:
    """Prints the perplexity of a text, and with JSON each token's log-probability.

    A text longer than the cache is scored in windows of max_seq_len - 1 tokens, each after its own
    BOS; without a BOS the first token of a window has no log-probability.

    Args:
        session: What runs; its backend has `score`.
        text: What is scored.
        as_json: Print one JSON object instead of a line.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: The text is one token without a BOS before it, or the cache holds one token.
    """
    tokenizer, shape = session.tokenizer, session.backend.shape
    if shape.max_seq_len < 2:
        raise ValueError(f"max_seq_len is {shape.max_seq_len}; scoring needs at least 2")
    ids = tokenizer.encode(text, bos=False)
    prefix = tokenizer.encode("", bos=True)
    window = shape.max_seq_len - len(prefix)
    scored: list[tuple[int, float]] = []
    for begin in range(0, len(ids), window):
        sequence = prefix + ids[begin : begin + window]
        scored.extend(zip(sequence[1:], _logprobs(session.backend, sequence), strict=True))
    if not scored:
        raise ValueError(f"the text has {len(ids)} tokens; scoring needs at least 2")
    mean = sum(logprob for _, logprob in scored) / len(scored)
    perplexity = math.exp(-mean)
    if as_json:
        result = {
            "perplexity": perplexity,
            "num_tokens": len(scored),
            "ids": [token_id for token_id, _ in scored],
            "logprobs": [logprob for _, logprob in scored],
            "backend": session.name,
        }
        print(json.dumps(result))
    else:
        print(f"perplexity {perplexity:.4f} over {len(scored)} tokens")
    return 0


def sampling_request(
    sampling: SamplingParams, **options: Any
) -> Callable[[tuple[int, ...]], Request]:
    """Binds options to a function from prompt ids to a Request."""
    return lambda ids: Request(prompt_ids=ids, sampling=sampling, **options)


class _Page:
    """One prompt's text, waiting for the prompts before it to be finished."""

    def __init__(self, prompt: str) -> None:
        self.unprinted = prompt
        self.completion: Completion | None = None

    def take(self, event: Event) -> None:
        self.unprinted += event.text
        self.completion = event.completion


def _print_pages(pages: deque[_Page]) -> None:
    """Streams the first unfinished prompt; those behind it wait for their turn."""
    while pages:
        page = pages[0]
        print(page.unprinted, end="", flush=True)
        page.unprinted = ""
        if page.completion is None:
            return
        pages.popleft()
        print("\n" if pages else "", flush=True)


def _logprobs(backend: Any, sequence: list[int]) -> list[float]:
    """Log-probability of every id but the first, each given those before it."""
    result: list[float] = []
    done = 0
    while done < len(sequence):
        start, end = next_chunk(len(sequence), done, backend.shape)
        logits = backend.score(0, sequence[start:end], start)
        for position in range(done, min(end, len(sequence) - 1)):
            result.append(float(log_softmax(logits[position - start])[sequence[position + 1]]))
        done = end
    return result


def _encode(tokenizer: Tokenizer, prompt: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(prompt))


@contextlib.contextmanager
def _hold_interrupt() -> Iterator[Callable[[], bool]]:
    """Makes Ctrl-C a question to ask between steps, so that no token is lost in one.

    A second Ctrl-C interrupts wherever it falls.
    """
    interrupted = False

    def hold(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def _timing(session: Session, completions: Sequence[Completion]) -> dict[str, Any]:
    """Seconds and rates of finished requests; a rate nobody measured is None."""
    prefill_s = sum(c.prefill_s for c in completions)
    decode_s = sum(c.decode_s for c in completions)
    num_prompt = sum(len(c.prompt_ids) for c in completions if c.ttft_s is not None)
    num_steps = sum(c.num_steps for c in completions)
    return {
        **session.startup,
        "ttft_s": next((c.ttft_s for c in completions if c.ttft_s is not None), None),
        "prefill_tokens_per_s": num_prompt / prefill_s if prefill_s else None,
        "decode_tokens_per_s": num_steps / decode_s if decode_s and num_steps else None,
    }


def _to_json(session: Session, completion: Completion) -> dict[str, Any]:
    result: dict[str, Any] = {
        "prompt_ids": list(completion.prompt_ids),
        "ids": completion.ids,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
    }
    if completion.logprobs is not None:
        result["logprobs"] = completion.logprobs
        result["top_logprobs"] = completion.top_logprobs
    return {**result, "timing": _timing(session, [completion]), "backend": session.name}


def _speed_line(session: Session, completions: Sequence[Completion]) -> str:
    timing = _timing(session, completions)
    parts = []
    for key, label, unit in (
        ("load_s", "load", "s"),
        ("compile_s", "compile", "s"),
        ("warmup_s", "warm-up", "s"),
        ("ttft_s", "TTFT", "s"),
        ("prefill_tokens_per_s", "prefill", "tok/s"),
        ("decode_tokens_per_s", "decode", "tok/s"),
    ):
        if timing.get(key) is None:
            continue
        note = " (from cache)" if key == "compile_s" and timing.get("compile_cache_hit") else ""
        digits = 3 if unit == "s" else 1
        parts.append(f"{label} {timing[key]:.{digits}f} {unit}{note}")
    return f"[{session.name}] " + " | ".join(parts)
