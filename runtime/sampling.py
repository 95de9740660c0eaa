"""Draws the next token from a row of logits, the same on every machine, backend and batch."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .draw import draw, top_k, top_p, uniform

__all__ = ["Sampler", "SamplingParams", "log_softmax", "top_logprobs"]

_MAX_KEY = 2**64 - 1  # a Philox key or counter word


class _Space(threading.local):
    """Room for two rows in float64, kept: fresh memory costs more than what is computed in it."""

    def __init__(self) -> None:
        self._rows = np.empty((2, 0))

    def copy(self, row: NDArray[np.float32]) -> NDArray[np.float64]:
        """Widens a row; the last one's room is used again."""
        if self._rows.shape[1] < row.size:
            self._rows = np.empty((2, row.size))
        room = self._rows[0, : row.size]
        np.copyto(room, row)
        return room

    def beside(self, row: NDArray[np.float64]) -> NDArray[np.float64]:
        """Room for as many numbers as a row that `copy` gave, or a part of one."""
        return self._rows[1, : row.size]


_space = _Space()


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a request's tokens are drawn; the filters apply in the order of the fields.

    Attributes:
        repetition_penalty: Divides the positive and multiplies the negative logits of ids seen in
            the prompt or the continuation; 1 is off. The penalties and the bias apply to greedy
            decoding too.
        presence_penalty: Taken off the logits of ids in the continuation.
        frequency_penalty: The same, times how often the id is in it.
        logit_bias: (id, number) pairs; the number is added to the id's logit.
        temperature: Divides the logits; 0 takes the largest logit, whatever the seed.
        top_k: Keeps this many of the largest logits; 0 is off.
        top_p: Keeps the fewest most likely ids whose probabilities reach this sum; 1 is off.
        min_p: Keeps ids at least this probable relative to the most likely one; 0 is off.
        seed: Chooses the random numbers; equal seeds and logits give equal tokens.

    Raises:
        ValueError: A value is out of its range.
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1e-3 <= self.repetition_penalty <= 1e3:  # beyond, logits leave float64's range
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; it must be in [0.001, 1000]"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -100 <= getattr(self, name) <= 100:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [-100, 100]")
        for token_id, bias in self.logit_bias:
            if token_id < 0 or not -100 <= bias <= 100:
                raise ValueError(
                    f"logit_bias of id {token_id} is {bias}; ids are 0 and above, biases in "
                    "[-100, 100]"
                )
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or above and finite")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (off) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be in [0, 1]")
        if not 0 <= self.seed <= _MAX_KEY:
            raise ValueError(f"seed is {self.seed}; it must be in [0, 2**64)")


class Sampler:
    """The sampler of one request.

    A token depends on the logits, the ids seen so far, the seed, the sample index and the token's
    position, and on nothing else: not on earlier draws, the batch, or who calls in which order.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        *,
        allowed_size: int | None = None,
        prompt_ids: Sequence[int] = (),
        sample_index: int = 0,
    ) -> None:
        """Prepares a request's sampler.

        Args:
            params: Filters and seed.
            vocab_size: V, width of the logits.
            allowed_size: The tokenizer's size; ids from here on are never drawn. Default: V.
            prompt_ids: Ids the repetition penalty counts as seen.
            sample_index: Tells several samples of one request with one seed apart.

        Raises:
            ValueError: allowed_size, sample_index or an id of the bias is out of its range.
        """
        allowed_size = vocab_size if allowed_size is None else allowed_size
        if not 1 <= allowed_size <= vocab_size:
            raise ValueError(
                f"allowed_size is {allowed_size}; it must be between 1 and vocab_size, {vocab_size}"
            )
        if not 0 <= sample_index <= _MAX_KEY:
            raise ValueError(f"sample_index is {sample_index}; it must be in [0, 2**64)")
        self._params = params
        changes = (
            params.repetition_penalty != 1,
            params.presence_penalty or params.frequency_penalty,
            params.logit_bias,
            params.temperature,
        )
        self._changes_scores = any(changes)
        self._vocab_size = vocab_size
        self._allowed_size = allowed_size
        self._key = np.array([params.seed, sample_index], dtype=np.uint64)
        self._seen = np.zeros(vocab_size, dtype=np.bool_)
        self._seen[list(prompt_ids)] = True
        self._counts: Counter[int] = Counter()  # of what was drawn
        if any(token_id >= vocab_size for token_id, _ in params.logit_bias):
            raise ValueError(
                f"logit_bias names id {max(params.logit_bias)[0]}; "
                f"allowed are 0 to {vocab_size - 1}"
            )

    def sample(
        self,
        logits: NDArray[np.float32],
        position: int,
        *,
        allowed: NDArray[np.bool_] | None = None,
        banned_ids: Collection[int] = (),
    ) -> int:
        """Draws a token and counts it as seen.

        Args:
            logits: [V] float32 logits of the row before the token.
            position: The drawn token's own absolute position.
            allowed: [V] bool, which ids may be drawn; None allows all.
            banned_ids: Ids that may not, besides.

        Returns:
            The token id; among equals the filters and the argmax prefer the lower id.

        Raises:
            ValueError: The logits have another width, or hold NaN, +inf or nothing finite, or
                nothing may be drawn.
        """
        scores = self._scores(logits, allowed, banned_ids)
        if self._params.temperature == 0:
            token_id = int(np.argmax(scores))  # the lowest of equals
        else:
            ids, weights = self._candidates(scores)
            index = draw(weights, uniform(self._key, position))
            token_id = index if ids is None else int(ids[index])
        self._seen[token_id] = True
        self._counts[token_id] += 1
        return token_id

    def _scores(
        self,
        logits: NDArray[np.float32],
        allowed: NDArray[np.bool_] | None,
        banned_ids: Collection[int],
    ) -> NDArray[Any]:
        """Returns the penalized logits of the tokenizer's ids; -inf is never drawn.

        They are the sampler's own, or, where they are nobody's to change, the logits themselves.
        """
        if logits.shape != (self._vocab_size,):
            raise ValueError(f"logits have shape {logits.shape}; expected ({self._vocab_size},)")
        params = self._params
        scores = logits[: self._allowed_size]
        if self._changes_scores or allowed is not None or banned_ids:
            scores = _space.copy(scores)
        if params.repetition_penalty != 1:
            seen = np.flatnonzero(self._seen[: self._allowed_size])
            hit = scores[seen]
            penalty = params.repetition_penalty
            scores[seen] = np.where(hit > 0, hit / penalty, hit * penalty)
        if params.presence_penalty or params.frequency_penalty:
            for token_id, count in self._counts.items():
                scores[token_id] -= params.presence_penalty + params.frequency_penalty * count
        for token_id, bias in params.logit_bias:
            if token_id < self._allowed_size:
                scores[token_id] += bias
        best = int(np.argmax(scores))  # NaN if there is one, else the lowest of equals
        if not math.isfinite(scores[best]) or math.isnan(logits.max()):
            raise ValueError(
                f"the largest logit is {logits.max()}; sampling needs a finite one, "
                "so the weights or a computation in 16 bits overflowed"
            )
        if allowed is not None or banned_ids:
            if allowed is not None:
                scores[~allowed[: self._allowed_size]] = -np.inf
            scores[[i for i in banned_ids if i < self._allowed_size]] = -np.inf
            if scores.max() == -np.inf:
                raise ValueError("no token may come next; loosen the grammar or min_tokens")
        return scores

    def _candidates(
        self, scores: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64] | None, NDArray[np.float64]]:
        """Returns the ids that pass the filters, ascending, and their weights (largest is 1).

        None are all ids. The scores, which `_space` holds, are overwritten.
        """
        params = self._params
        ids = None
        if 0 < params.top_k < self._allowed_size:
            ids = top_k(scores, params.top_k)
            scores = scores[ids]
        scores -= scores.max()
        with np.errstate(over="ignore"):  # a tiny temperature: -inf is the right answer
            scores /= params.temperature
        weights = np.exp(scores, out=_space.beside(scores))
        if params.top_p < 1:
            kept = top_p(scores, weights, params.top_p)
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        if params.min_p > 0:
            kept = np.flatnonzero(weights >= params.min_p)  # the most likely id's weight is 1
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        return ids, weights


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Takes the log-probabilities of a row of raw logits.

    Args:
        logits: [V] float32 logits, before any filter.

    Returns:
        [V] float64 natural logarithms of the probabilities.
    """
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    return shifted - np.log(np.exp(shifted).sum())


def top_logprobs(logprobs: NDArray[np.float64], k: int) -> tuple[tuple[int, float], ...]:
    """Picks the most likely ids.

    Args:
        logprobs: [V] float64 log-probabilities.
        k: How many; all of them if there are fewer.

    Returns:
        (id, logprob) pairs, the most likely first, equals by the lower id.
    """
    if k < 1:
        return ()
    ids = top_k(logprobs, k) if k < logprobs.size else np.arange(logprobs.size)
    ids = ids[np.argsort(-logprobs[ids], kind="stable")]
    return tuple((int(i), float(logprobs[i])) for i in ids)
