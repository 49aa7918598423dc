"""Windows of a measured engine, and figures made of them, without an engine."""

from __future__ import annotations

from collections.abc import Sequence

from tools.bench_cost import Cost
from tools.bench_streams import Window


def window(token_s: float, *, proved_bytes: int = 0, late: int = 0, steps: int = 100, streams: int = 2) -> Window:
    """Steps of equal length, but the last takes twice as long."""
    step_s = token_s * steps * streams / (steps + 1)
    stamps = [at * step_s for at in range(steps)]
    return Window(
        stamps_s=(*stamps, stamps[-1] + 2 * step_s), tokens=steps * streams, proved_bytes=proved_bytes, late=late
    )


def cost(lost: Sequence[float], *, pace: float = 1.0, limit: float | None = 0.02, late: int = 0) -> Cost:
    """A figure of 16 GB and a bound of 5 s: 4 GB are due in a second, 0.67 % of it at 600 GB/s."""
    on = []
    for share in lost:
        seconds = window(0.01 / (1 - share)).seconds
        on.append(window(0.01 / (1 - share), proved_bytes=round(pace * 4e9 * seconds), late=late))
    return Cost(
        model="8b",
        streams=2,
        seal_max_age_s=5.0,
        bound_s=5.0,
        weight_bytes=16 * 10**9,
        off=[window(0.01)] * (len(on) + 1),
        on=on,
        place=0.5,
        alone_s=0.04,
        oldest_s=4.2,
        limit=limit,
    )
