"""A backend with its tokenizer: the short Python API."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .backend import Backend
from .sampling import SamplingParams
from .scheduler import Completion, LimitPolicy, Request, Scheduler, generate, stream
from .text.tokenizer import Tokenizer

__all__ = ["LanguageModel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModel:
    """Turns text into text.

    Attributes:
        backend: Any backend.
        tokenizer: The checkpoint's.
    """

    backend: Backend
    tokenizer: Tokenizer

    def generate(
        self,
        *prompts: str,
        max_new_tokens: int = 256,
        stop: tuple[str, ...] = (),
        limit_policy: LimitPolicy = "stop",
        **sampling: float,
    ) -> list[Completion]:
        """Continues prompts, as many at once as the backend has slots.

        Args:
            prompts: Texts; "" is BOS alone.
            max_new_tokens: Most tokens of a continuation.
            stop: Texts that end it.
            limit_policy: "stop" or "roll" where the cache is full.
            sampling: Fields of SamplingParams, such as temperature, top_p and seed.

        Returns:
            One completion a prompt.

        Raises:
            ValueError: An option is out of its range, or a prompt does not fit.
        """
        requests = [self.request(p, max_new_tokens, stop, **sampling) for p in prompts]
        return generate(self.backend, self.tokenizer, requests, limit_policy=limit_policy)

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 256,
        stop: tuple[str, ...] = (),
        limit_policy: LimitPolicy = "stop",
        **sampling: float,
    ) -> Iterator[str]:
        """Like generate for one prompt, yielding pieces of text as they are made."""
        scheduler = Scheduler(self.backend, self.tokenizer, limit_policy=limit_policy)
        request = self.request(prompt, max_new_tokens, stop, **sampling)
        for event in stream(scheduler, request):
            if event.text:
                yield event.text

    def request(
        self, prompt: str, max_new_tokens: int, stop: tuple[str, ...], **sampling: float
    ) -> Request:
        """Encodes a prompt into what the Scheduler takes."""
        return Request(
            prompt_ids=tuple(self.tokenizer.encode(prompt)),
            max_new_tokens=max_new_tokens,
            stop=stop,
            sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
        )
