"""What the scrub bench claims: the arithmetic of its figures, its turns, and the engine that it measures."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest

from orcd_jax.engine.programs import Programs
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.models.registry import abstract_params
from orcd_jax.residency.bounds import Sizes
from orcd_jax.residency.prover import WeightProver
from orcd_jax.worker.planner import engine_shape
from tests.residency.bitflip import flip_bit
from tests.tiny_checkpoint import tiny_checkpoint
from tools import bench_scrub
from tools.bench_cost import HEADER, Cost
from tools.bench_figures import CONFIDENCE, LEAST_ROUNDS, costs, median_bounds, percentile
from tools.bench_model import model_config, random_model
from tools.bench_scrub import main, take_turns, verdict_of
from tools.bench_streams import BenchGuard, Scrub, Served, Stopwatch, Streams, Unguarded, Window

__all__ = ["tiny_checkpoint"]

WEIGHT_BYTES: int = sum(x.size * x.dtype.itemsize for x in abstract_params(model_config("small", 1)).values())
STREAMS = 2
CONTEXT, PROMPT = 128, 100
AGE_S = 0.4
"""On the CPU all weights of the small model are proved in a few hundredths of a second."""


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


# -- turns -------------------------------------------------------------------------------------------------------------


def test_turns_alternate_and_every_guard_runs_between_two_without(served: Served) -> None:
    scrubs = {5.0: Scrub(served, 5.0), 1.0: Scrub(served, 1.0)}
    names = {id(scrub): f"{age:g}" for age, scrub in scrubs.items()}
    ran: list[str] = []

    def run(guard: BenchGuard) -> Window:
        ran.append(names.get(id(guard), "off"))
        return window(len(ran))

    seen = []
    for turns in take_turns(run, scrubs, lambda rounds: rounds < 3):
        seen.append((len(ran), turns.rounds))
    assert ran == ["off", "5", "1", "off", "5", "1", "off", "5", "1", "off"]
    assert seen == [(4, 1), (7, 2), (10, 3)]
    assert [one.token_s for one in turns.off] == pytest.approx([1, 4, 7, 10])
    assert [one.token_s for one in turns.on[5.0]] == pytest.approx([2, 5, 8])
    assert [one.token_s for one in turns.on[1.0]] == pytest.approx([3, 6, 9])


# -- the engine --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(device: jax.Device) -> Served:
    manifest, params = random_model(model_config("small", 1), device)
    prover = WeightProver(manifest, params, device, slice_bytes=2**20)
    return Served(manifest=manifest, params=params, device=device, prover=prover)


@pytest.fixture(scope="module")
def streams(served: Served) -> Streams:
    sizes = Sizes(slots_total=STREAMS, max_context=CONTEXT, prefill_tokens=128)
    programs = Programs(served.manifest.config, engine_shape(sizes), served.device)
    return Streams(served, programs, prompt_tokens=PROMPT)


def after(steps: int) -> Callable[[int, float], bool]:
    return lambda done, _: done >= steps


def test_every_stream_goes_on_when_its_job_ends_and_every_token_counts(streams: Streams) -> None:
    """A job has 28 tokens: three of them end in the window."""
    found = streams.run(Unguarded(), after(90))
    assert len(found.stamps_s) == 91
    assert 85 * STREAMS <= found.tokens <= 90 * STREAMS
    assert found.seconds == pytest.approx(sum(found.steps_s))
    assert (found.proved_bytes, found.late) == (0, 0)


def test_the_tokens_of_a_window_are_those_after_its_first_step(streams: Streams) -> None:
    """No job ends in so few steps, so each gives a token of every stream."""
    assert streams.run(Unguarded(), after(20)).tokens == 20 * STREAMS


def test_a_window_may_end_by_time(streams: Streams) -> None:
    found = streams.run(Unguarded(), lambda steps, seconds: steps >= 3 and seconds > 0.05)
    assert found.seconds > 0.05


def test_the_same_steps_give_the_same_tokens_with_a_guard_and_without(streams: Streams, served: Served) -> None:
    """So a window's length alone tells them apart."""
    guards: list[BenchGuard] = [Unguarded(), Scrub(served, AGE_S), Unguarded(), Scrub(served, AGE_S)]
    assert len({streams.run(guard, after(60)).tokens for guard in guards}) == 1


@pytest.mark.requirement("WORKER-4121")
def test_every_byte_is_proved_within_the_bound_while_the_streams_run(streams: Streams, served: Served) -> None:
    """Tokens left at the end of the window: so every proof is younger than the bound, and began in the window."""
    scrub = Scrub(served, AGE_S)
    found = streams.run(scrub, lambda _, seconds: seconds > 2 * AGE_S)
    assert served.manifest.weight_bytes <= found.proved_bytes <= scrub.proved_bytes
    assert 0 < scrub.oldest_s < AGE_S + 0.1


def test_what_fails_in_the_engine_is_raised(streams: Streams, served: Served) -> None:
    flip_bit(served.params["embed"], 12345)
    try:
        with pytest.raises(OrcdError) as raised:
            streams.run(Scrub(served, AGE_S), lambda *_: False)
    finally:
        flip_bit(served.params["embed"], 12345)
    assert (raised.value.code, raised.value.field) == (ErrorCode.SEAL_VERIFICATION_FAILED, "embed")


def test_the_clock_of_a_guard_stands_still_between_its_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stopwatch = Stopwatch()
    read = [stopwatch()]
    for step, act in itertools.zip_longest(range(6), [stopwatch.start, None, stopwatch.stop, None, stopwatch.start]):
        now[0] += step
        if act is not None:
            act()
        read.append(stopwatch())
    assert read == [0, 0, 1, 3, 3, 3, 8]


@dataclass
class ScriptedProver:
    """Two slices of a GB; notes what is begun and finished."""

    slices: tuple[Any, ...]
    begun: list[int]
    finished: list[int]

    def begin(self, index: int) -> int:
        self.begun.append(index)
        return index

    def finish(self, pending: int) -> None:
        self.finished.append(pending)


@dataclass(frozen=True)
class Size:
    size_bytes: int


@pytest.fixture
def scripted(served: Served, monkeypatch: pytest.MonkeyPatch) -> tuple[Scrub, ScriptedProver, list[float]]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    prover = ScriptedProver((Size(10**9), Size(10**9)), [], [])
    fields = {"manifest": served.manifest, "params": served.params, "device": served.device}
    return Scrub(Served(prover=prover, **fields), 5.0), prover, now  # type: ignore[arg-type]


STOPPED = OrcdError(ErrorCode.CANCELLED, "the worker stopped before the job ended")


def test_a_guard_goes_on_with_its_pass_in_the_next_engine(
    scripted: tuple[Scrub, ScriptedProver, list[float]],
) -> None:
    """Slices are due every 2 s of the engines' time; what is in flight when one stops is proved and not lost."""
    scrub, prover, now = scripted
    scrub.resume()
    scrub.turn(None)
    scrub.close(STOPPED)
    assert (prover.begun, prover.finished, scrub.proved_bytes) == ([0], [0], 10**9)
    now[0] += 1000
    assert scrub.age_s() == 0
    scrub.resume()
    now[0] += 1.9
    scrub.turn(None)
    assert prover.begun == [0]
    now[0] += 0.2
    scrub.turn(None)
    assert (prover.begun, scrub.proved_bytes) == ([0, 1], 2 * 10**9)
    now[0] += 1.0
    scrub.settle()
    assert scrub.oldest_s == pytest.approx(3.1), "the second slice began 3.1 s ago, in the pass before this one"


def test_a_guard_whose_engine_failed_proves_nothing_more(
    scripted: tuple[Scrub, ScriptedProver, list[float]],
) -> None:
    scrub, prover, _ = scripted
    scrub.resume()
    scrub.turn(None)
    scrub.close(OrcdError(ErrorCode.CUDA_ERROR, "the device failed"))
    assert (prover.begun, prover.finished) == ([0], [])


def test_tokens_that_wait_for_a_proof_are_counted(scripted: tuple[Scrub, ScriptedProver, list[float]]) -> None:
    scrub, prover, now = scripted
    scrub.resume()
    now[0] += 4.9
    scrub.settle()
    assert scrub.late == 0
    now[0] += 0.2
    scrub.settle()
    assert (scrub.late, prover.finished) == (1, [0, 1])


# -- the command -------------------------------------------------------------------------------------------------------

JOBS = ("--context=64", "--prompt_tokens=16", "--window=0.05", "--seconds=280")
SMALL = ("--model=small", "--layers=1", "--streams=2", *JOBS)


def result_of(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
def test_the_bench_measures_every_age_prints_a_table_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], device: jax.Device
) -> None:
    file = tmp_path / "figures.json"
    flags = ["--seal_max_age=0.3,0.2", "--rounds=2", "--slice_mb=1", f"--json={file}"]
    assert main([*SMALL, *flags]) == 0
    result, said = result_of(file), capsys.readouterr()
    assert (result["complete"], result["errors"], result["verdict"]) == (True, [], "no claim")
    assert (result["tool"], result["device"], result["jax"]) == ("bench_scrub", device.device_kind, jax.__version__)
    assert {"python", "jaxlib", "orcd-jax"} <= result["versions"].keys()
    ages = [(figure["seal_max_age_s"], figure["detection_bound_s"]) for figure in result["figures"]]
    assert ages == [(0.3, 0.3), (0.2, 0.2)]
    for figure in result["figures"]:
        assert (figure["streams"], figure["rounds"], figure["verdict"]) == (2, 2, "no claim")
        assert figure["proved_gb_s"] > 0
        assert figure["due_gb_s"] == pytest.approx(figure["expected_percent"] / 100 * figure["alone_gb_s"])
    table = said.out.splitlines()
    assert table[1:2] == HEADER.splitlines()
    assert [line.split()[0] for line in table[2:-1:2]] == ["small", "small"]
    assert table[-1].startswith("no claim: ")
    assert "small, 2 streams: round 2 of at most 2: " in said.err


class Scripted:
    """Stands in for the engine: windows without and with a guard, as told, and no compiling."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lost: Sequence[float]) -> None:
        self.runs: list[str] = []
        self._lost = itertools.cycle(lost)
        monkeypatch.setattr(bench_scrub, "is_gpu", lambda _: True)
        monkeypatch.setattr(bench_scrub, "Programs", lambda *_: type("Compiled", (), {"compiled": {}})())
        monkeypatch.setattr(bench_scrub, "Streams", lambda *_, **__: self)

    def run(self, guard: BenchGuard, _: object) -> Window:
        if isinstance(guard, Unguarded):
            self.runs.append("off")
            return window(0.01)
        self.runs.append("on")
        token_s = 0.01 / (1 - next(self._lost))
        return window(token_s, proved_bytes=round(window(token_s).seconds * WEIGHT_BYTES / 4))


@pytest.mark.parametrize(
    ("lost", "limit", "code", "word"),
    [(0.01, 2, 0, "pass"), (0.03, 2, 1, "fail"), (0.03, 4, 0, "pass")],
)
@pytest.mark.requirement("WORKER-4121")
def test_the_exit_code_says_whether_the_claim_is_shown(
    lost: float, limit: int, code: int, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Scripted(monkeypatch, [lost])
    file = tmp_path / "figures.json"
    assert main([*SMALL, "--rounds=5", f"--limit={limit}", f"--json={file}"]) == code
    assert engine.runs == ["off", *["off", "on"] * 5, "off"], "one to calibrate, then by turns"
    result = result_of(file)
    assert (result["verdict"], result["figures"][0]["verdict"]) == (word, word)
    assert result["figures"][0]["cost_percent"] == pytest.approx(100 * lost)


def test_a_cost_on_both_sides_of_the_limit_shows_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted(monkeypatch, [0.01, 0.03])
    assert main([*SMALL, "--rounds=5"]) == 1
    assert "unclear: proofs cost 1.00 %, at most 3.00 % (small, 2 streams); 2 % are allowed" in capsys.readouterr().out


def test_another_age_than_the_workers_default_is_no_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, [0.5])
    assert main([*SMALL, "--rounds=5", "--seal_max_age=4"]) == 0


def test_a_drift_is_no_cost_of_any_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run is slower than the one before by as much, whatever guards it: its place between those without counts."""
    engine = Scripted(monkeypatch, [])
    runs = itertools.count()
    monkeypatch.setattr(engine, "run", lambda *_: window(0.01 + 0.001 * next(runs), proved_bytes=1))
    file = tmp_path / "figures.json"
    main([*SMALL, "--rounds=5", "--seal_max_age=5,2,1", f"--json={file}"])
    for figure in result_of(file)["figures"]:
        assert figure["costs_percent"] == pytest.approx([0] * 5, abs=1e-9)


def test_rounds_end_with_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run takes 10 s of a clock of the test's own: of 85 s the calibration leaves three rounds and a half."""
    engine = Scripted(monkeypatch, [0.01])
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    real = engine.run

    def slow(guard: BenchGuard, enough: object) -> Window:
        now[0] += 10
        return real(guard, enough)

    monkeypatch.setattr(engine, "run", slow)
    file = tmp_path / "figures.json"
    assert main([*SMALL, "--rounds=8", "--seconds=85", f"--json={file}"]) == 1
    assert engine.runs.count("on") == 3
    assert result_of(file)["verdict"] == "unclear"


def test_what_has_no_time_left_is_an_error_and_not_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, [0.01])
    file = tmp_path / "figures.json"
    assert main([*SMALL, "--seconds=0", f"--json={file}"]) == 1
    result = result_of(file)
    assert result["errors"] == [
        {"section": "small, 2 streams", "error": "there was no time left: raise --seconds"},
    ]
    assert (result["complete"], result["verdict"]) == (True, "fail")


def test_a_case_that_fails_leaves_its_rounds_and_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Scripted(monkeypatch, [0.01])
    real, runs = engine.run, itertools.count()

    def failing(guard: BenchGuard, enough: object) -> Window:
        if next(runs) == 6:
            raise OrcdError(ErrorCode.VRAM_OOM, "the device ran out of memory")
        return real(guard, enough)

    monkeypatch.setattr(engine, "run", failing)
    file = tmp_path / "figures.json"
    assert main([*SMALL, "--streams=1,2", "--rounds=5", f"--json={file}"]) == 1
    result = result_of(file)
    assert result["errors"] == [{"section": "small, 1 stream", "error": "the device ran out of memory"}]
    assert [(figure["streams"], figure["rounds"]) for figure in result["figures"]] == [(1, 2), (2, 5)]
    assert result["verdict"] == "fail"


@pytest.mark.slow
def test_a_checkpoint_is_restored_and_measured_as_a_shape_is(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    flags = [*JOBS, "--streams=1", "--rounds=1", "--seal_max_age=0.2"]
    assert main([f"--model={tiny_checkpoint}", *flags, f"--json={file}"]) == 0
    (figure,) = result_of(file)["figures"]
    assert (figure["model"], figure["streams"]) == (str(tiny_checkpoint), 1)
    assert capsys.readouterr().out.splitlines()[2].split()[0] == "tiny"


def test_a_damaged_checkpoint_is_an_error_and_the_next_model_is_measured(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted(monkeypatch, [0.01])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "manifest.json").write_bytes((tiny_checkpoint / "manifest.json").read_bytes())
    file = tmp_path / "figures.json"
    assert main([*SMALL, f"--model={damaged},small", "--rounds=5", f"--json={file}"]) == 1
    result = result_of(file)
    assert [error["section"] for error in result["errors"]] == [str(damaged)]
    assert [figure["model"] for figure in result["figures"]] == ["small"]


@pytest.mark.parametrize(
    "flag",
    [
        "--model=/nowhere",
        "--model=8b,other",
        "--streams=0",
        "--seal_max_age=0",
        "--seal_max_age=5.1",
        "--seal_max_age=nan",
        "--seal_max_age=1,1",
        "--prompt_tokens=1024",
        "--rounds=0",
        "--json=/nowhere/x.json",
    ],
)
def test_a_bad_flag_is_a_usage_error(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([flag])
    assert caught.value.code == 2
    assert flag.split("=")[0] in capsys.readouterr().err
