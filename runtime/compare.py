"""Whether two systems compute the same logits, and how far apart they are.

The bundle's verification and the benchmark ask this of every backend before anyone trusts it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .sampling import log_softmax

__all__ = [
    "TOLERANCE",
    "Comparison",
    "Quality",
    "compare_logits",
    "measure_quality",
    "perplexity",
]

# Largest error of a logit, as a share of the reference's largest logit. float32: sums in another
# order. 16-bit: each layer rounds its activations; the reference computes in float32. int8: each
# product with packed weights rounds what it multiplies to 8 bits, by blocks.
TOLERANCE = {"float32": 1e-3, "bfloat16": 4e-2, "float16": 1e-2, "int8": 1e-1}

_NUM_BEST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How a system's logits differ from the reference's.

    Attributes:
        passed: Whether the system computes what the reference does.
        message: The outcome in words.
        num_predictions: Rows of logits compared.
        num_wrong: Of them, those that rank another id highest although the margin forbids it.
        max_abs_error: Largest error of a logit.
        relative_error: The same, as a share of the reference's largest logit.
        max_kl_nats: Largest KL divergence of a row from the reference's.
        top1_agreement: Share of the rows that rank the reference's best id highest.
        top5_agreement: Share of the reference's five best ids that are among the five best.
        first_divergence: Index of the first row that ranks another id highest, or None: where
            greedy generation would first emit another token.
    """

    passed: bool
    message: str
    num_predictions: int
    num_wrong: int
    max_abs_error: float
    relative_error: float
    max_kl_nats: float
    top1_agreement: float
    top5_agreement: float
    first_divergence: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How well a quantized model predicts a text, measured by the model it was made of.

    Attributes:
        num_predictions: Rows of logits compared.
        mean_kl_nats: Mean KL divergence from the original's predictions.
        top1_agreement: Share of the rows that rank the original's best id highest.
        perplexity_ratio: Perplexity of the text, over the original's.
    """

    num_predictions: int
    mean_kl_nats: float
    top1_agreement: float
    perplexity_ratio: float

    def __str__(self) -> str:
        """As people read it."""
        return (
            f"against the original: KL {self.mean_kl_nats:.2g} nats, top-1 "
            f"{self.top1_agreement:.1%}, perplexity x {self.perplexity_ratio:.4f}, over "
            f"{self.num_predictions} predictions"
        )

    @classmethod
    def of_all(cls, parts: Sequence[Quality]) -> Quality:
        """Joins measurements of parts of a text."""
        counts = np.array([part.num_predictions for part in parts])

        def mean(values: list[float]) -> float:
            return float(np.average(values, weights=counts))

        return cls(
            num_predictions=int(counts.sum()),
            mean_kl_nats=mean([part.mean_kl_nats for part in parts]),
            top1_agreement=mean([part.top1_agreement for part in parts]),
            perplexity_ratio=math.exp(mean([math.log(p.perplexity_ratio) for p in parts])),
        )


def measure_quality(
    original: Iterable[NDArray[np.float32]],
    logits: Iterable[NDArray[np.float32]],
    next_ids: Sequence[int],
) -> Quality:
    """Compares a quantized model's predictions of a text with those of the model it was made of.

    Args:
        original: N rows [V] float32, the original's logits.
        logits: N rows [V] float32.
        next_ids: The N ids that follow.

    Returns:
        The measurement.
    """
    kl = agrees = ratio = 0.0
    for expected_row, row, next_id in zip(original, logits, next_ids, strict=True):
        expected, found = log_softmax(expected_row), log_softmax(row)
        kl += float((np.exp(expected) * (expected - found)).sum())
        agrees += int(expected_row.argmax()) == int(row.argmax())
        ratio += float(expected[next_id] - found[next_id])
    count = len(next_ids)
    return Quality(
        num_predictions=count,
        mean_kl_nats=kl / count,
        top1_agreement=agrees / count,
        perplexity_ratio=math.exp(ratio / count),
    )


def compare_logits(
    reference: NDArray[np.float32],
    logits: NDArray[np.float32],
    precision: str,
    *,
    tolerance: float | None = None,
) -> Comparison:
    """Compares the logits that two systems computed for the same ids.

    In float32 every prediction must be the reference's, so greedy tokens are equal. In 16-bit it
    must be where the reference's two best logits are further apart than the tolerance.

    Args:
        reference: [..., V] of the float32 reference.
        logits: [..., V] of the system.
        precision: Of the system, a key of TOLERANCE.
        tolerance: Of the largest error as a share of the largest logit; None is the precision's.

    Returns:
        The comparison. A NaN agrees with nothing, nor does an array of another shape.
    """
    if reference.shape != logits.shape:
        return _no_comparison(reference.shape, logits.shape)
    expected = reference.reshape(-1, reference.shape[-1])
    found = logits.reshape(expected.shape)
    tolerance = TOLERANCE[precision] if tolerance is None else tolerance
    scale = max(float(np.abs(expected).max()), float(np.finfo(np.float32).tiny))
    with np.errstate(invalid="ignore"):  # what isn't finite fails below
        rows = [_compare_row(*pair) for pair in zip(expected, found, strict=True)]
    differs = np.array([row.margin is not None for row in rows])
    # Where float32 differs it is wrong, however narrow the margin.
    allowed = -1.0 if precision == "float32" else tolerance * scale
    num_wrong = sum(row.margin is not None and not row.margin <= allowed for row in rows)
    max_abs_error = float(np.max([row.error for row in rows]))
    error = max_abs_error / scale
    count = len(rows)
    return Comparison(
        passed=num_wrong == 0 and error <= tolerance,
        message=(
            f"{count - num_wrong} of {count} predictions agree, largest error {error:.1e} of the "
            f"largest logit ({precision} may have {tolerance:.0e})"
        ),
        num_predictions=count,
        num_wrong=num_wrong,
        max_abs_error=max_abs_error,
        relative_error=error,
        max_kl_nats=float(np.max([row.kl_nats for row in rows])),
        top1_agreement=1.0 - float(differs.mean()),
        top5_agreement=float(np.mean([row.shared_best for row in rows])),
        first_divergence=int(differs.argmax()) if differs.any() else None,
    )


def perplexity(logits: NDArray[np.float32], next_ids: NDArray[np.int64]) -> float:
    """Takes the perplexity of ids under the logits before them.

    Args:
        logits: [N, V] float32.
        next_ids: [N] int64, the id that follows each.

    Returns:
        The exponential of the mean negative log-probability.
    """
    logprobs = [log_softmax(row)[next_id] for row, next_id in zip(logits, next_ids, strict=True)]
    return math.exp(-float(np.mean(logprobs)))


def _no_comparison(expected: tuple[int, ...], found: tuple[int, ...]) -> Comparison:
    count = math.prod(expected[:-1])
    return Comparison(
        passed=False,
        message=f"logits are {list(found)}, the reference's {list(expected)}",
        num_predictions=count,
        num_wrong=count,
        max_abs_error=math.inf,
        relative_error=math.inf,
        max_kl_nats=math.inf,
        top1_agreement=0.0,
        top5_agreement=0.0,
        first_divergence=0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One prediction; margin is None where the best id is the reference's."""

    error: float
    kl_nats: float
    margin: float | None
    shared_best: float


def _compare_row(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> _Row:
    expected, found = log_softmax(reference), log_softmax(logits)
    best = int(reference.argmax())
    others = np.delete(reference, best)
    margin = float(reference[best] - others.max()) if others.size else math.inf
    agrees = best == int(logits.argmax()) and not np.isnan(logits).any()
    count = min(_NUM_BEST, reference.size)
    shared = set(_best_ids(reference, count)) & set(_best_ids(logits, count))
    return _Row(
        error=float(np.abs(reference - logits).max()),
        kl_nats=float((np.exp(expected) * (expected - found)).sum()),
        margin=None if agrees else margin,
        shared_best=len(shared) / count,
    )


def _best_ids(logits: NDArray[np.float32], count: int) -> list[int]:
    return np.argpartition(logits, -count)[-count:].tolist()
