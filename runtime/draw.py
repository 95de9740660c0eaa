"""Draws from weights, and filters them, without sorting a vocabulary."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["draw", "top_k", "top_p", "uniform"]

_SORTABLE = (256, 4096)  # so few candidates are sorted outright, if these few will do
_NUM_BUCKETS = 1024
_BLOCK = 256  # numbers that are summed, or whose largest is taken, before they are looked at


def uniform(key: NDArray[np.uint64], position: int) -> float:
    """Returns a number in [0, 1): the first of Philox's bits for this key and position.

    Raw bits only: NumPy keeps a bit generator's stream, not what `Generator.random` makes of it.

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
    """
    counter = np.array([position, 0, 0, 0], dtype=np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw()
    return (raw >> 11) * 2.0**-53


def draw(weights: NDArray[np.float64], number: float) -> int:
    """Finds where the CDF of some weights passes a number in [0, 1).

    The CDF runs in id order, so a last-digit difference in a logit moves its edges by as little; in
    order of probability two near-equal ids could change places.
    """
    edges = np.cumsum(np.add.reduceat(weights, np.arange(0, weights.size, _BLOCK)))
    target = number * edges[-1]
    block = int(np.searchsorted(edges, target, side="right"))
    begin = block * _BLOCK
    inside = weights[begin : begin + _BLOCK]
    cdf = np.cumsum(inside) + (edges[block - 1] if block else 0.0)
    # By a rounding the block's own sum may end below what it was.
    last = int(np.flatnonzero(inside)[-1])
    return begin + min(int(np.searchsorted(cdf, target, side="right")), last)


def top_k(scores: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Returns the ids of the k largest scores, ascending; the lower id wins a tie at the edge."""
    ids = _largest(scores, k)
    own = scores[ids]
    edge = own.min()
    above, at_edge = ids[own > edge], ids[own == edge]
    return np.sort(np.concatenate([above, at_edge[: k - above.size]]))


def _largest(scores: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Returns the ids of the k largest scores and of all equal to the last of them, ascending."""
    maxima = np.maximum.reduceat(scores, np.arange(0, scores.size, _BLOCK))
    if k <= maxima.size:  # k blocks have a score that reaches the k-th largest maximum
        ids = np.flatnonzero(scores >= np.partition(maxima, maxima.size - k)[maxima.size - k])
        own = scores[ids]
        return ids[own >= np.partition(own, own.size - k)[own.size - k]]
    return np.flatnonzero(scores >= np.partition(scores, scores.size - k)[scores.size - k])


def top_p(
    scores: NDArray[np.float64], weights: NDArray[np.float64], share: float
) -> NDArray[np.int64]:
    """Finds the fewest largest weights that reach a share of their total.

    Args:
        scores: [n] float64, the logarithms of the weights.
        weights: [n] float64, none negative.
        share: Below 1.

    Returns:
        Indices of what is kept, ascending, at least one; the lower index wins a tie at the edge.
    """
    target = share * weights.sum()
    for few in _SORTABLE:
        largest = np.sort(scores[_largest(scores, min(few, scores.size))])[::-1]
        sums = np.cumsum(np.exp(largest))
        if sums[-1] >= target or few >= scores.size:
            return top_k(scores, min(int(np.searchsorted(sums, target)) + 1, scores.size))
    return _top_p_by_buckets(scores, weights, target)


def _top_p_by_buckets(
    scores: NDArray[np.float64], weights: NDArray[np.float64], target: float
) -> NDArray[np.int64]:
    """Finds the fewest largest weights that reach a sum, without sorting all.

    It sums them in buckets of their score, keeps the buckets above the one in which the sum is
    reached, and looks again inside that one.
    """
    kept = np.zeros(weights.size, dtype=np.bool_)
    kept_sum = 0.0
    # All weights below this floor sum to less than what may be dropped.
    floor = max((weights.sum() - target) / weights.size, math.ulp(0.0))
    edge = np.flatnonzero(weights >= floor)
    while edge.size > _SORTABLE[-1]:
        depth = scores[edge]
        np.subtract(depth.max(), depth, out=depth)  # in place: fresh megabytes cost page faults
        if depth.max() == 0:
            break
        depth /= depth.max()
        depth *= _NUM_BUCKETS
        buckets = depth.astype(np.int64)  # 0 holds the largest
        sums = kept_sum + np.cumsum(np.bincount(buckets, weights=weights[edge]))
        reached = min(int(np.searchsorted(sums, target)), _NUM_BUCKETS)
        if reached > 0:
            kept[edge[np.flatnonzero(buckets < reached)]] = True
            kept_sum = float(sums[reached - 1])
        edge = edge[np.flatnonzero(buckets == reached)]
    edge = edge[np.argsort(-scores[edge], kind="stable")]
    sums = kept_sum + np.cumsum(weights[edge])
    kept[edge[: int(np.searchsorted(sums, target)) + 1]] = True
    return np.flatnonzero(kept)
