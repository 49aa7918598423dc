"""What the proofs between the steps cost: windows without and with them, compared by turns, and what that shows."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orcd_jax.residency.guard import PACE
from orcd_jax.telemetry.narration import count
from tools.bench_figures import CONFIDENCE, GOAL_GB_S, costs, median_bounds, percentile
from tools.bench_streams import Window

PACE_KEPT = 0.75
"""A guard that proved a smaller share of what was due costs less than it should. (A window may just miss a slice.)"""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one age of proofs costs with so many streams.

    Attributes:
      off, on: windows without and with the guard, as they followed each other: one more without.
      place: of a window with, between the two without, from 0 to 1.
      bound_s: within which the guard finds a changed bit.
      alone_s: a whole proof of the weights takes with nothing beside it.
      oldest_s: age of the oldest proof of any byte when tokens left.
      limit: share of throughput that it may cost; None where nothing is claimed.
    """

    model: str
    streams: int
    seal_max_age_s: float
    bound_s: float
    weight_bytes: int
    off: Sequence[Window]
    on: Sequence[Window]
    place: float
    alone_s: float
    oldest_s: float
    limit: float | None

    @property
    def title(self) -> str:
        """The case it was measured in."""
        return case_title(self.model, self.streams)

    @functools.cached_property
    def rounds(self) -> list[float]:
        """The share of throughput lost in each."""
        return costs([window.token_s for window in self.off], [window.token_s for window in self.on], self.place)

    @property
    def cost(self) -> float:
        """Share of throughput that the guard costs."""
        return statistics.median(self.rounds)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Of the cost; None for too few rounds."""
        return median_bounds(self.rounds)

    @property
    def due_gb_s(self) -> float:
        """The rate at which the guard must prove."""
        return self.weight_bytes / (PACE * self.bound_s) / 1e9

    @property
    def proved_gb_s(self) -> float:
        """The rate at which it did, between the steps."""
        return sum(window.proved_bytes for window in self.on) / sum(window.seconds for window in self.on) / 1e9

    @property
    def alone_gb_s(self) -> float:
        """The rate of a whole proof with nothing beside it."""
        return self.weight_bytes / self.alone_s / 1e9

    @property
    def floor(self) -> float:
        """The share of time that the proofs due take at the goal's rate."""
        return self.due_gb_s / GOAL_GB_S

    @property
    def ratio(self) -> float | None:
        """Of floor and cost; None where no cost was found."""
        return self.floor / self.cost if self.cost > 0 else None

    @property
    def verdict(self) -> str:
        """``pass``, ``fail``, ``unclear``, or ``no claim``."""
        if self.limit is None:
            return "no claim"
        if self.proved_gb_s < PACE_KEPT * self.due_gb_s:
            return "fail"
        if self.bounds is None or self.bounds[0] <= self.limit < self.bounds[1]:
            return "unclear"
        return "pass" if self.bounds[1] <= self.limit else "fail"

    def figure(self) -> dict[str, object]:
        """Everything, for JSON."""
        low, high = self.bounds or (None, None)
        return {
            "model": self.model,
            "streams": self.streams,
            "seal_max_age_s": self.seal_max_age_s,
            "detection_bound_s": self.bound_s,
            "rounds": len(self.on),
            "steps_a_window": len(self.off[0].stamps_s) - 1,
            "window_s": statistics.median(window.seconds for window in self.off),
            "tokens_s_off": _rate(self.off),
            "tokens_s_on": _rate(self.on),
            "cost_percent": 100 * self.cost,
            "cost_low_percent": None if low is None else 100 * low,
            "cost_high_percent": None if high is None else 100 * high,
            "confidence_of_each_bound": CONFIDENCE,
            "costs_percent": [100 * cost for cost in self.rounds],
            "floor_percent": 100 * self.floor,
            "ratio": self.ratio,
            "expected_percent": 100 * self.due_gb_s / self.alone_gb_s,
            "step_ms_off": _steps_ms(self.off),
            "step_ms_on": _steps_ms(self.on),
            "alone_gb_s": self.alone_gb_s,
            "due_gb_s": self.due_gb_s,
            "proved_gb_s": self.proved_gb_s,
            "oldest_proof_s": self.oldest_s,
            "late": sum(window.late for window in self.on),
            "limit_percent": None if self.limit is None else 100 * self.limit,
            "verdict": self.verdict,
        }

    def row(self) -> str:
        """Two lines of the table: the cost, and below it what it is made of."""
        low, high = (f"{100 * bound:.2f}" for bound in self.bounds) if self.bounds else ("–", "–")
        ratio = "–" if self.ratio is None else f"{self.ratio:.2f}"
        without, with_ = (
            "/".join(f"{ms:.2f}" for ms in _steps_ms(windows).values()) for windows in (self.off, self.on)
        )
        return (
            f"{Path(self.model).name:<16.15}{self.streams:>7}{self.bound_s:>8.2f}{len(self.on):>7}"
            f"{_rate(self.off):>10.1f}{_rate(self.on):>11.1f}{100 * self.cost:>8.2f}{low:>8}{high:>8}"
            f"{100 * self.floor:>9.2f}{ratio:>7}  {self.verdict}\n"
            f"  ms a step, p50/p95/p99: {without} without, {with_} with; GB/s proved: {self.alone_gb_s:.1f} alone, "
            f"{self.proved_gb_s:.2f} between steps of {self.due_gb_s:.2f} due; oldest proof {self.oldest_s:.2f} s, "
            f"late {sum(window.late for window in self.on)} times"
        )


HEADER = (
    f"{'model':<16}{'streams':>7}{'bound s':>8}{'rounds':>7}{'tokens/s':>10}{'with':>11}"
    f"{'cost %':>8}{'low':>8}{'high':>8}{'floor %':>9}{'ratio':>7}  verdict"
)


def case_title(model: str, streams: int) -> str:
    """A model and a number of streams, for people."""
    return f"{model}, {count(streams, 'stream')}"


def _rate(windows: Sequence[Window]) -> float:
    return 1 / statistics.median(window.token_s for window in windows)


def _steps_ms(windows: Sequence[Window]) -> dict[str, float]:
    steps = [step for window in windows for step in window.steps_s]
    return {f"p{percent}": 1e3 * percentile(steps, percent) for percent in (50, 95, 99)}
