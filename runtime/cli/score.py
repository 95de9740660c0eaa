"""What `score` does once a model is loaded."""

from __future__ import annotations

import json
import math
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..chunks import next_chunk
from ..compare import Quality, measure_quality
from ..language_model import LanguageModel
from ..sampling import log_softmax
from .terminal import emit

__all__ = ["score_text"]


def score_text(
    model: LanguageModel, text: str, *, reference: LanguageModel | None = None, as_json: bool
) -> int:
    """Prints the perplexity of a text, and with JSON each token's log-probability.

    A text longer than the cache is scored in windows of max_seq_len - 1 tokens, each after its own
    BOS; without a BOS the first token of a window has no log-probability.

    Args:
        model: What runs.
        text: What is scored.
        reference: What the model's predictions are compared with, or None.
        as_json: Print one JSON object instead of a line.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: The text is one token without a BOS before it, the cache holds one token, or the
            reference has other sizes.
    """
    tokenizer, shape = model.tokenizer, model.backend.shape
    if shape.max_seq_len < 2:
        raise ValueError(f"max_seq_len is {shape.max_seq_len}; scoring needs at least 2")
    if reference is not None:
        _check_sizes(model, reference)
    ids = tokenizer.encode(text, bos=False)
    prefix = tokenizer.encode("", bos=True)
    window = shape.max_seq_len - len(prefix)
    scored: list[tuple[int, float]] = []
    compared: list[Quality] = []
    for begin in range(0, len(ids), window):
        sequence = prefix + ids[begin : begin + window]
        if len(sequence) < 2:
            continue
        rows = _noted(_logits(model.backend, sequence), sequence[1:], scored)
        if reference is None:
            deque(rows, maxlen=0)
        else:
            expected = _logits(reference.backend, sequence)
            compared.append(measure_quality(expected, rows, sequence[1:]))
    if not scored:
        raise ValueError(f"the text has {len(ids)} tokens; scoring needs at least 2")
    mean = sum(logprob for _, logprob in scored) / len(scored)
    if -mean > math.log(sys.float_info.max):
        raise ValueError(f"the text's mean logprob is {mean:.4g}; the weights may be damaged")
    quality = Quality.of_all(compared) if compared else None
    _print(scored, math.exp(-mean), quality, model.name, as_json=as_json)
    return 0


def _print(
    scored: list[tuple[int, float]],
    perplexity: float,
    quality: Quality | None,
    name: str,
    *,
    as_json: bool,
) -> None:
    if as_json:
        result: dict[str, Any] = {
            "perplexity": perplexity,
            "num_tokens": len(scored),
            "ids": [token_id for token_id, _ in scored],
            "logprobs": [logprob for _, logprob in scored],
            "backend": name,
        }
        if quality is not None:
            result["quality"] = asdict(quality)
        emit(json.dumps(result))
        return
    emit(f"perplexity {perplexity:.4f} over {len(scored)} tokens")
    if quality is not None:
        emit(str(quality))


def _check_sizes(model: LanguageModel, reference: LanguageModel) -> None:
    for name in ("vocab_size", "max_seq_len"):
        ours, other = (getattr(one.backend.shape, name) for one in (model, reference))
        if ours != other:
            raise ValueError(f"{name} is {ours}, of --against {other}; compare models of one shape")


def _noted(
    rows: Iterator[NDArray[np.float32]], ids: list[int], scored: list[tuple[int, float]]
) -> Iterator[NDArray[np.float32]]:
    """Passes rows on, one in memory at a time, noting the log-probability of each one's id."""
    for row, token_id in zip(rows, ids, strict=True):
        scored.append((token_id, float(log_softmax(row)[token_id])))
        yield row


def _logits(backend: Any, sequence: list[int]) -> Iterator[NDArray[np.float32]]:
    """The [V] logits after every id but the last."""
    if not hasattr(backend, "score"):  # a bundle's prefill gives one row: a token a step, then
        batch = backend.shape.batch_size
        for position, token_id in enumerate(sequence[:-1]):
            ids, positions = np.full(batch, token_id), np.full(batch, position)
            yield backend.decode(ids, positions)[0].copy()
        return
    done = 0
    while done < len(sequence):
        start, end = next_chunk(len(sequence), done, backend.shape)
        logits = backend.score(0, sequence[start:end], start)
        yield from islice(logits, done - start, min(end, len(sequence) - 1) - start)
        done = end
