"""The arithmetic of the benches: medians with honest bounds, and what one way costs against another by turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

REQUIRED_GB_S, GOAL_GB_S = 400.0, 600.0
"""Rates at which a GPU is to prove its weights."""

CONFIDENCE = 0.95
"""With which each bound of :func:`median_bounds` holds by itself."""


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def percentile(values: Sequence[float], percent: float) -> float:
    """The least value that ``percent`` of all values do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def median_bounds(values: Sequence[float]) -> tuple[float, float] | None:
    """Bounds of the median of what the values are drawn from, whatever its distribution; None for too few values.

    The k-th smallest of n values is above the median when fewer than k of n fair coins fall heads. So with 5 to 7
    values these are the least and the greatest; each bound alone is wrong in at most 5 of 100 cases.
    """
    n, wrong, k = len(values), 0.0, 0
    while k < n // 2 and wrong + math.comb(n, k) / 2**n <= 1 - CONFIDENCE:
        wrong += math.comb(n, k) / 2**n
        k += 1
    ordered = sorted(values)
    return None if k == 0 else (ordered[k - 1], ordered[n - k])


LEAST_ROUNDS = next(n for n in range(1, 100) if median_bounds([0.0] * n) is not None)
"""Fewer values have no bounds."""


def costs(off: Sequence[float], on: Sequence[float], place: float) -> list[float]:
    """The share of throughput that each turn of one way loses against the other, measured before and after it.

    Args:
      off: seconds for each token without, one turn more than with: the first, then one after each round.
      on: the same with, a turn in each round.
      place: where between the two turns without it lay, from 0 to 1. A drift that is even in between cancels.

    Returns:
      ``1 - rate with / rate without`` of each round.
    """
    pairs = zip(off, off[1:], on, strict=False)
    if len(off) != len(on) + 1:
        raise ValueError(f"{len(on)} turns need one more without, not {len(off)}")
    return [1 - (before + (after - before) * place) / slow for before, after, slow in pairs]
