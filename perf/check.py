"""Whether a system computes the reference's logits: asked before it is timed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["TOLERANCE", "Verdict", "compare_logits"]

# Largest error of a logit, as a share of the reference's largest logit. float32: sums in another
# order. 16-bit: each layer rounds its activations; the reference computes in float32.
TOLERANCE = {"float32": 1e-3, "bfloat16": 4e-2, "float16": 1e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome.

    Attributes:
        passed: Whether the system may be timed.
        error: Largest error of a logit, as a share of the reference's largest logit.
        num_choices: Predictions compared.
        num_wrong: Of them, those that rank another id highest although the margin forbids it.
        message: The outcome in words.
    """

    passed: bool
    error: float
    num_choices: int
    num_wrong: int
    message: str


def compare_logits(
    reference: NDArray[np.float32], logits: NDArray[np.float32], precision: str
) -> Verdict:
    """Compares the logits that two systems computed for the same ids.

    In float32 every prediction must be the reference's, so greedy tokens are equal. In 16-bit it
    must be where the reference's two best logits are further apart than the tolerance.

    Args:
        reference: [..., V] of the float32 reference.
        logits: [..., V] of the system.
        precision: Of the system.

    Returns:
        The verdict.
    """
    count = int(np.prod(reference.shape[:-1]))
    if reference.shape != logits.shape:
        message = f"logits are {list(logits.shape)}, the reference's {list(reference.shape)}"
        return Verdict(
            passed=False, error=np.inf, num_choices=count, num_wrong=count, message=message
        )
    scale = float(np.abs(reference).max())
    error = float(np.abs(reference - logits).max()) / scale
    tolerance = TOLERANCE[precision]
    best = np.sort(reference, axis=-1)[..., -2:]
    margin = best[..., 1] - best[..., 0]
    differs = reference.argmax(axis=-1) != logits.argmax(axis=-1)
    if precision != "float32":
        differs &= margin > tolerance * scale
    num_wrong = int(differs.sum())
    passed = num_wrong == 0 and error <= tolerance  # a NaN passes no comparison
    message = (
        f"{count - num_wrong} of {count} predictions agree, "
        f"largest error {error:.1e} of the largest logit ({precision} may have {tolerance:.0e})"
    )
    return Verdict(
        passed=passed, error=error, num_choices=count, num_wrong=num_wrong, message=message
    )
