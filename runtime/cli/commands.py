"""What `generate` and `run` do once a model is loaded."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from typing import Any

from ..interrupt import hold_interrupt
from ..language_model import LanguageModel
from ..request import Completion, Event, Request
from .terminal import emit, say

__all__ = ["INTERRUPTED", "generate_texts"]

INTERRUPTED = 130
FAILED = 1


def generate_texts(
    model: LanguageModel, texts: Sequence[str], requests: Sequence[Request], *, as_json: bool
) -> int:
    """Runs requests, streaming their texts to stdout in order, then a speed line to stderr.

    Args:
        model: What runs.
        texts: What is printed before each continuation, its prompt or "".
        requests: One for each text.
        as_json: Print one JSON value instead of text: an object, or a list of several.

    Returns:
        The exit code: 0, 1 if a request failed, or 130 after Ctrl-C.

    Raises:
        ValueError: A prompt does not fit.
    """
    pages = deque(_Page(text) for text in texts)
    every = list(pages)
    scheduler = model.scheduler
    request_ids = [
        scheduler.submit(request, sink=page.take)
        for request, page in zip(requests, pages, strict=True)
    ]
    exit_code = 0
    with hold_interrupt() as is_interrupted:  # between steps, so that no token is lost in one
        while not all(page.completion for page in every):
            if is_interrupted():
                exit_code = INTERRUPTED
                for request_id in request_ids:
                    scheduler.cancel(request_id)
            scheduler.step()
            if not as_json:
                _print_pages(pages)
    done = [page.completion for page in every if page.completion is not None]
    if as_json:
        pairs = zip(done, requests, strict=True)
        objects = [_to_json(model, completion, request) for completion, request in pairs]
        emit(json.dumps(objects[0] if len(objects) == 1 else objects))
    say(_speed_line(model, done, requests))
    for completion in done:
        if completion.error is not None:
            say(f"llamac: {completion.error}")
            exit_code = exit_code or FAILED
    return exit_code


class _Page:
    """One continuation, waiting for those before it to be finished."""

    def __init__(self, text: str) -> None:
        self.unprinted = text
        self.completion: Completion | None = None

    def take(self, event: Event) -> None:
        self.unprinted += event.text
        self.completion = event.completion


def _print_pages(pages: deque[_Page]) -> None:
    """Streams the first unfinished page; those behind it wait for their turn."""
    while pages:
        page = pages[0]
        emit(page.unprinted, end="")
        page.unprinted = ""
        if page.completion is None:
            return
        pages.popleft()
        emit("\n" if pages else "")


def _timing(model: LanguageModel, completions: Sequence[Completion]) -> dict[str, Any]:
    """Seconds and rates of finished requests; a rate nobody measured is None."""
    prefill_s = sum(c.prefill_s for c in completions)
    decode_s = sum(c.decode_s for c in completions)
    num_prompt = sum(len(c.prompt_ids) for c in completions if c.ttft_s is not None)
    num_steps = sum(c.num_steps for c in completions)
    num_guessed = sum(c.num_guessed for c in completions)
    guesses = {"num_guessed": num_guessed, "num_right": sum(c.num_right for c in completions)}
    return {
        **model.startup,
        "ttft_s": next((c.ttft_s for c in completions if c.ttft_s is not None), None),
        "prefill_tokens_per_s": num_prompt / prefill_s if prefill_s else None,
        "decode_tokens_per_s": num_steps / decode_s if decode_s and num_steps else None,
        **(guesses if num_guessed else {}),
    }


def _to_json(model: LanguageModel, completion: Completion, request: Request) -> dict[str, Any]:
    result: dict[str, Any] = {
        "prompt_ids": list(completion.prompt_ids),
        "ids": completion.ids,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "seed": request.sampling.seed,
    }
    if completion.error is not None:
        result["error"] = completion.error
    if completion.logprobs is not None:
        result["logprobs"] = completion.logprobs
        result["top_logprobs"] = completion.top_logprobs
    return {**result, "timing": _timing(model, [completion]), "backend": model.name}


def _speed_line(
    model: LanguageModel, completions: Sequence[Completion], requests: Sequence[Request]
) -> str:
    timing = _timing(model, completions)
    if len(completions) > 1 and timing["decode_tokens_per_s"]:
        # Of one text; all together are as many as ran side by side.
        ends = [(c.ttft_s or 0.0) + c.decode_s for c in completions]
        timing["total_tokens_per_s"] = sum(len(c.ids) for c in completions) / max(ends)
    parts = []
    if any(request.sampling.temperature > 0 for request in requests):
        parts.append(f"seed {requests[0].sampling.seed}")
    for key, label, unit in (
        ("load_s", "load", "s"),
        ("compile_s", "compile", "s"),
        ("warmup_s", "warm-up", "s"),
        ("ttft_s", "TTFT", "s"),
        ("prefill_tokens_per_s", "prefill", "tok/s"),
        ("decode_tokens_per_s", "decode", "tok/s"),
        ("total_tokens_per_s", "all texts", "tok/s"),
    ):
        if timing.get(key) is None:
            continue
        note = " (from cache)" if key == "compile_s" and timing.get("compile_cache_hit") else ""
        digits = 3 if unit == "s" else 1
        parts.append(f"{label} {timing[key]:.{digits}f} {unit}{note}")
    if "num_guessed" in timing:
        parts.append(f"guesses {timing['num_right']} of {timing['num_guessed']} right")
    return f"[{model.name}] " + " | ".join(parts)
