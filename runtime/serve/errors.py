"""What a request is refused with, in the form OpenAI's clients read."""

from __future__ import annotations

from typing import Any

__all__ = ["ApiError"]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A refusal or a failure.

    Attributes:
        status: Of HTTP.
        headers: Of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Says what is wrong.

        Args:
            status: Of HTTP.
            message: One line: what was got, what is allowed, what to do.
            param: The request's field that it is about.
            code: A word for programs.
            headers: Of the answer.
        """
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self._param, self._code = param, code

    def body(self) -> dict[str, Any]:
        """What the client gets, as an answer or as an event of a stream."""
        kind = _TYPES.get(self.status, "server_error")
        about = {"message": str(self), "type": kind, "param": self._param, "code": self._code}
        return {"error": about}
