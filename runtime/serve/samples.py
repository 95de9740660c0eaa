"""Collects the events of a request's samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..request import Completion, TopLogprobs
from .messages import EngineEvent
from .openai_request import Asked

__all__ = ["Sample", "choose_best", "usage"]


@dataclass(slots=True, kw_only=True)
class Sample:
    """What has come of one sample.

    Attributes:
        ids: Its tokens.
        text: Its text.
        logprobs: Of each token, if asked for.
        top_logprobs: The alternatives of each token, if asked for.
        finish_reason: None before the end.
        completion: What the last event told.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    completion: Completion | None = None

    def take(self, event: EngineEvent) -> None:
        """Adds an event."""
        self.text += event.text
        self.finish_reason, self.completion = event.finish_reason, event.completion
        if event.token_id is not None:
            self.ids.append(event.token_id)
            if event.logprob is not None and event.top_logprobs is not None:
                self.logprobs.append(event.logprob)
                self.top_logprobs.append(event.top_logprobs)

    @property
    def mean_logprob(self) -> float:
        """What best_of goes by."""
        return sum(self.logprobs) / max(1, len(self.logprobs))


def choose_best(asked: Asked, samples: Sequence[Sample]) -> list[Sample]:
    """Of each prompt's samples the most likely ones, as many as are given, in their order."""
    chosen = []
    for begin in range(0, len(samples), asked.num_samples):
        group = samples[begin : begin + asked.num_samples]
        best = sorted(group, key=lambda sample: -sample.mean_logprob)[: asked.num_choices]
        chosen += [sample for sample in group if any(sample is other for other in best)]
    return chosen


def usage(asked: Asked, samples: Sequence[Sample]) -> dict[str, Any]:
    """How many tokens went in and came out; a prompt counts once, however many samples it has."""
    num_prompt = asked.num_prompt_tokens
    num_new = 0 if asked.max_tokens == 0 else sum(len(sample.ids) for sample in samples)
    firsts = [sample.completion for sample in samples[:: asked.num_samples]]
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": sum(c.num_reused for c in firsts if c)},
    }
