"""Answers a request with its job's events: whole, or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from .admission import Job
from .errors import ApiError
from .openai_request import Asked
from .openai_response import Form
from .samples import Sample, choose_best, usage

__all__ = ["answer"]

_PING_S = 15.0  # without an event; proxies give up on a silent connection
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def answer(http: HttpRequest, asked: Asked, form: Form, job: Job) -> Response:
    """Waits for the job and writes its answer, or hands over the stream that does.

    Args:
        http: The request; when its client leaves, the job ends.
        asked: What it asks for.
        form: How the endpoint writes it.
        job: What runs.

    Returns:
        The response.

    Raises:
        ApiError: A completion failed.
    """
    head = {
        "id": f"{form.prefix}-{uuid.uuid4().hex}",
        "object": form.piece if asked.stream else form.whole,
        "created": int(time.time()),
        "model": form.model.name,
    }
    if asked.stream:
        return _JobStream(job, _events(asked, form, job, head))
    with job:
        samples = await _while_connected(http, _collect(asked, job))
    choices = [form.choice(i, sample) for i, sample in enumerate(choose_best(asked, samples))]
    return JSONResponse({**head, "choices": choices, "usage": usage(asked, samples)})


async def _collect(asked: Asked, job: Job) -> list[Sample]:
    samples = [Sample() for _ in asked.requests]
    async for item in job.events():
        if item is not None:
            samples[item[0]].take(item[1])
    return samples


async def _while_connected(http: HttpRequest, work: Any) -> list[Sample]:
    """Waits for the work, as long as the client waits for it."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(http.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client left")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _JobStream(StreamingResponse):
    """A stream whose end, however it comes, ends the job."""

    def __init__(self, job: Job, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_STREAM_HEADERS)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See StreamingResponse."""
        with self._job:
            await super().__call__(scope, receive, send)


async def _events(asked: Asked, form: Form, job: Job, head: dict[str, Any]) -> AsyncIterator[bytes]:
    """The stream: pieces, the usage if asked for, [DONE]; after a failure an error instead."""
    samples = [Sample() for _ in asked.requests]
    # The prompt's log-probabilities come with the last event and belong before the first token.
    is_held = asked.echo is not None and asked.logprobs is not None
    if asked.usage:
        head = {**head, "usage": None}
    try:
        for index in range(len(samples)):
            for choice in [] if is_held else form.opening(index):
                yield _event({**head, "choices": [choice]})
        async for item in job.events(every_s=_PING_S):
            if item is None:
                yield b": ping\n\n"
                continue
            index, event = item
            sample = samples[index]
            sample.take(event)
            choice = None
            if not is_held:
                choice = form.token(index, event)
            elif event.finish_reason is not None:
                choice = {**form.choice(index, sample), "finish_reason": None}
            if choice is not None:
                yield _event({**head, "choices": [choice]})
            if event.finish_reason is not None:
                yield _event({**head, "choices": [form.closing(index, sample)]})
    except ApiError as error:
        yield _event(error.body())
        return
    if asked.usage:
        yield _event({**head, "choices": [], "usage": usage(asked, samples)})
    yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
