"""What the front and an engine process say to each other; everything is pickled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..backend import StaticShape
from ..language_model import RequestOptions
from ..load import LoadOptions
from ..request import Completion, FinishReason, Request, TopLogprobs

__all__ = ["Batch", "Cancel", "EngineEvent", "EngineSetup", "Failed", "Ready", "Submit", "Told"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetup:
    """What an engine loads.

    Attributes:
        source: See load.
        options: See load.
        generation_config: Whether the checkpoint's own sampling settings are the defaults.
        exact: Whether a text's logits may depend on nothing that runs beside it or ran before, not
            even in a rounding.
        default_batch: B, where neither options nor a bundle name one.
        environment: Variables set for the process, besides the front's own.
    """

    source: str | None
    options: LoadOptions
    generation_config: bool
    exact: bool
    default_batch: int
    environment: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """An engine has loaded its model.

    Attributes:
        shape: The backend's sizes.
        folder: Where the tokenizer's files are.
        backend: Backend and device.
        defaults: Options of requests that name none.
    """

    shape: StaticShape
    folder: Path
    backend: str
    defaults: RequestOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """An engine can't load its model; the process ends."""

    problem: str


class Told(NamedTuple):
    """What an engine that loads is doing, in a few words."""

    text: str


class Submit(NamedTuple):
    """Runs a request, known by `key` from here on."""

    key: int
    request: Request


class Cancel(NamedTuple):
    """Ends a request; its last event still comes, unless it came before."""

    key: int


class EngineEvent(NamedTuple):
    """See Event; the completion comes with the last one, without what the events told before."""

    key: int
    token_id: int | None = None
    text: str = ""
    logprob: float | None = None
    top_logprobs: TopLogprobs | None = None
    finish_reason: FinishReason | None = None
    completion: Completion | None = None
    error: str | None = None


class Batch(NamedTuple):
    """The events of one step, and how many requests have a slot and wait for one."""

    events: list[EngineEvent]
    num_running: int
    num_waiting: int
