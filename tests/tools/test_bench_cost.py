"""What a figure of the scrub bench claims: its arithmetic, its bounds and its words."""

from __future__ import annotations

import math

import pytest

from tests.tools.windows import cost, window
from tools.bench_cost import HEADER
from tools.bench_figures import CONFIDENCE, LEAST_ROUNDS, costs, median_bounds, percentile
from tools.bench_scrub import verdict_of

# -- the arithmetic ----------------------------------------------------------------------------------------------------


def test_a_drift_that_is_even_costs_nothing() -> None:
    drifting = [1.0, 1.1, 1.2, 1.3]
    assert costs(drifting, [1.05, 1.15, 1.25], 0.5) == pytest.approx([0, 0, 0])
    assert costs(drifting, [1.0 + 0.1 / 4, 1.1 + 0.1 / 4, 1.2 + 0.1 / 4], 0.25) == pytest.approx([0, 0, 0])


def test_a_cost_is_the_share_of_throughput_lost() -> None:
    assert costs([1.0, 1.0, 1.0], [1.25, 1.0], 0.5) == [pytest.approx(0.2), 0]
    assert costs([1.0, 1.0], [0.8], 0.5) == [pytest.approx(-0.25)]
    with pytest.raises(ValueError, match="2 turns need one more without, not 2"):
        costs([1.0, 1.0], [1.0, 1.0], 0.5)


@pytest.mark.parametrize("n", [*range(1, 60), 200])
def test_a_bound_of_the_median_is_wrong_as_seldom_as_it_says_and_no_further_out(n: int) -> None:
    """Below the k-th smallest lies the median only if fewer than k of n values are below it: n fair coins."""

    def wrong(k: int) -> float:
        return sum(math.comb(n, heads) for heads in range(k)) / float(2**n)

    bounds = median_bounds([float(value) for value in reversed(range(1, n + 1))])
    if bounds is None:
        assert wrong(1) > 1 - CONFIDENCE
        return
    k = round(bounds[0])
    assert list(bounds) == [k, n + 1 - k]
    assert wrong(k) <= 1 - CONFIDENCE
    assert wrong(k + 1) > 1 - CONFIDENCE


def test_five_rounds_are_the_fewest_that_say_anything() -> None:
    assert LEAST_ROUNDS == 5
    assert median_bounds([3.0, 1.0, 5.0, 2.0, 4.0]) == (1, 5)


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, p) for p in (0, 1, 50, 95, 99, 100)] == [1, 1, 50, 95, 99, 100]
    assert percentile([7.0], 99) == 7


# -- a figure ----------------------------------------------------------------------------------------------------------


def test_a_figure_says_what_was_measured() -> None:
    figure = cost([0.01, 0.012, 0.008, 0.011, 0.009], late=1).figure()
    expected = {
        "rounds": 5,
        "steps_a_window": 100,
        "window_s": 2.0,
        "tokens_s_off": 100.0,
        "tokens_s_on": 99.0,
        "cost_percent": 1.0,
        "cost_low_percent": 0.8,
        "cost_high_percent": 1.2,
        "floor_percent": 100 * 4 / 600,
        "ratio": 4 / 600 / 0.01,
        "expected_percent": 1.0,
        "alone_gb_s": 400.0,
        "due_gb_s": 4.0,
        "proved_gb_s": 4.0,
        "detection_bound_s": 5.0,
        "oldest_proof_s": 4.2,
        "late": 5,
        "limit_percent": 2.0,
    }
    assert {name: figure[name] for name in expected} == pytest.approx(expected)
    assert figure["costs_percent"] == pytest.approx([1.0, 1.2, 0.8, 1.1, 0.9])
    off = figure["step_ms_off"]
    assert off == pytest.approx({"p50": 2e3 / 101, "p95": 2e3 / 101, "p99": 2e3 / 101})
    assert figure["verdict"] == "pass"


def test_the_slowest_steps_are_in_the_last_percent() -> None:
    steps = sorted(window(0.01).steps_s)
    assert len(steps) == 100
    assert percentile(steps, 100) == pytest.approx(2 * percentile(steps, 99))


@pytest.mark.parametrize(
    ("lost", "pace", "limit", "verdict"),
    [
        ([0.010, 0.012, 0.008, 0.011, 0.009], 1.0, 0.02, "pass"),
        ([0.010, 0.012, 0.008, 0.011, 0.021], 1.0, 0.02, "unclear"),
        ([0.030, 0.032, 0.028, 0.031, 0.019], 1.0, 0.02, "unclear"),
        ([0.030, 0.032, 0.028, 0.031, 0.021], 1.0, 0.02, "fail"),
        ([0.010, 0.012, 0.008, 0.011], 1.0, 0.02, "unclear"),
        ([0.090, 0.092, 0.088, 0.091], 1.0, 0.02, "unclear"),
        ([0.000, 0.001, -0.001, 0.000, 0.001], 0.5, 0.02, "fail"),
        ([0.000, 0.001, -0.001, 0.000, 0.001], 0.0, 0.02, "fail"),
        ([0.010, 0.012, 0.008, 0.011, 0.009], 1.0, None, "no claim"),
        ([0.010, 0.012, 0.008, 0.011, 0.021, 0.010, 0.010, 0.010], 1.0, 0.02, "pass"),
    ],
    ids=[
        "within the limit",
        "one round above it",
        "one round below it",
        "above it",
        "too few rounds",
        "too few rounds even so",
        "behind its pace",
        "nothing proved",
        "no claim",
        "one of eight above it",
    ],
)
@pytest.mark.requirement("WORKER-4121")
def test_a_claim_is_shown_only_by_its_bounds_and_at_full_pace(
    lost: list[float], pace: float, limit: float | None, verdict: str
) -> None:
    found = cost(lost, pace=pace, limit=limit)
    assert found.verdict == found.figure()["verdict"] == verdict
    assert found.row().splitlines()[0].endswith(f"  {verdict}")


def test_a_row_stands_below_its_heads() -> None:
    line, below = cost([0.01, 0.012, 0.008, 0.011, 0.009]).row().splitlines()
    assert line.split() == ["8b", "2", "5.00", "5", "100.0", "99.0", "1.00", "0.80", "1.20", "0.67", "0.67", "pass"]
    assert line.index("pass") == HEADER.index("verdict")
    assert "oldest proof 4.20 s, late 0 times" in below


def test_no_cost_has_no_ratio() -> None:
    assert cost([0.0] * 5).figure()["ratio"] is None


def test_the_word_for_all_is_that_of_the_worst() -> None:
    good, bad, between = cost([0.01] * 5), cost([0.03] * 5), cost([0.01, 0.03, 0.01, 0.03, 0.01])
    assert verdict_of([good, good], 2.0, failed=False)[0] == "pass"
    assert verdict_of([good, between], 2.0, failed=False)[0] == "unclear"
    word, sentence = verdict_of([good, bad, between], 2.0, failed=False)
    assert word == "fail"
    assert "at most 3.00 % (8b, 2 streams); 2 % are allowed" in sentence
    assert verdict_of([good], 2.0, failed=True)[0] == "fail"
    assert verdict_of([cost([0.5] * 5, limit=None)], 2.0, failed=False)[0] == "no claim"
