"""Around every request: its id, the API key, the size of its body, a line in the log."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

__all__ = ["Gate", "body_of", "read_keys"]

logger = logging.getLogger(__name__)

_OPEN_PATHS = {"/", "/health"}
_MAX_ID_LEN = 128


def read_keys(path: Path) -> list[str]:
    """Reads API keys, one a line.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no key.
    """
    keys = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not keys:
        raise ValueError(f"{path} has no API key; write one a line")
    return keys


async def body_of(request: Request, max_bytes: int) -> bytes:
    """Reads a body, up to a limit.

    Raises:
        ApiError: It is longer.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise ApiError(413, f"the body has more than {max_bytes} bytes")
    return bytes(body)


class Gate:
    """Lets those with a key in, names each request, and logs it without what it says.

    Who came in is `scope["state"]["client"]`: the number of the key, or "" where there are none.
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str] = ()) -> None:
        self._app = app
        # Of equal length, so that comparing takes as long whatever is sent.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")[:_MAX_ID_LEN]
        if not request_id.replace(b"-", b"").replace(b"_", b"").isalnum():
            request_id = uuid.uuid4().hex.encode()
        begin_s, status = time.perf_counter(), 500

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            client = self._client(headers.get(b"authorization", b""))
            if client is None and scope["path"] not in _OPEN_PATHS:
                error = ApiError(401, "the API key is missing or unknown", code="invalid_api_key")
                response = JSONResponse(error.body(), error.status)
                await response(scope, receive, send_named)
                return
            scope.setdefault("state", {})["client"] = client or ""
            await self._app(scope, receive, send_named)
        finally:
            elapsed_s = time.perf_counter() - begin_s
            logger.info(
                "%s %s %d %.3f s %s",
                scope["method"],
                scope["path"],
                status,
                elapsed_s,
                request_id.decode(),
            )

    def _client(self, authorization: bytes) -> str | None:
        """The number of the key that was sent, or None."""
        if not self._digests:
            return ""
        digest = hashlib.sha256(authorization.removeprefix(b"Bearer ").strip()).digest()
        same = [hmac.compare_digest(digest, known) for known in self._digests]
        return str(same.index(True)) if any(same) else None
