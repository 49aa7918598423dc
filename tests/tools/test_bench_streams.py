"""The engine that the scrub bench measures, by turns without a guard and with it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import pytest

from orcd_jax.engine.programs import Programs
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.residency.bounds import Sizes
from orcd_jax.residency.prover import WeightProver
from orcd_jax.worker.planner import engine_shape
from tests.residency.bitflip import flip_bit
from tests.tools.windows import window
from tools.bench_model import model_config, random_model
from tools.bench_scrub import take_turns
from tools.bench_streams import BenchGuard, Scrub, Served, Stopwatch, Streams, Unguarded, Window

STREAMS = 2
CONTEXT, PROMPT = 128, 100
AGE_S = 0.4
"""On the CPU all weights of the small model are proved in a few hundredths of a second."""

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
