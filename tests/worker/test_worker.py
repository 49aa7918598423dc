"""The worker between the server and the engine: whose job it is, when it is refused, how it ends."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import pytest

from orcd_jax.config import WorkerConfig
from orcd_jax.engine.request import Ended, Failed, FinishReason, Tokens
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.worker.lifecycle import State
from orcd_jax.worker.types import ChatMessage, ChatPrompt, ExecuteParams, Metrics, Started, WorkerEvent
from orcd_jax.worker.worker import Worker
from tests.conftest import PLATFORM

Result = TypeVar("Result")
WAIT_S = 120.0
SLOTS = 2


def config_of(checkpoint: Path, **changes: str | bool) -> WorkerConfig:
    given: dict[str, str | bool] = {
        "worker_id": "w",
        "pool_id": "p",
        "model_path": str(checkpoint),
        "platform": PLATFORM,
        "rpc_port": "50051",
        "api_token_file": "/nowhere/token",
        "standalone": True,
        "slots_total": str(SLOTS),
        **changes,
    }
    return WorkerConfig.from_flags(given)


class Running:
    """A started worker on an event loop of its own thread; tests give it coroutines."""

    def __init__(self, config: WorkerConfig) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.worker = self.run(self._made(config))
        self.states = [self.worker.lifecycle.state]
        self.worker.lifecycle.subscribe(self.states.append)

    async def _made(self, config: WorkerConfig) -> Worker:
        return Worker(config)

    def begin(self, work: Coroutine[object, object, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Coroutine[object, object, Result]) -> Result:
        return self.begin(work).result(WAIT_S)

    def close(self) -> None:
        self.run(self.worker.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_S)
        self.loop.close()


@pytest.fixture(scope="module")
def running(tiny_checkpoint: Path) -> Iterator[Running]:
    started = Running(config_of(tiny_checkpoint))
    started.run(started.worker.start())
    yield started
    started.close()


def job(job_id: str, **changes: object) -> ExecuteParams:
    values: dict[str, object] = {"job_id": job_id, "prompt": "in the", "max_tokens": 4, "ignore_eos": True, **changes}
    return ExecuteParams(**values)  # type: ignore[arg-type]


async def events_of(worker: Worker, params: ExecuteParams, owner: str = "o") -> list[WorkerEvent]:
    return [event async for event in worker.execute(params, owner)]


def ids_of(events: list[WorkerEvent]) -> tuple[int, ...]:
    return tuple(i for event in events if isinstance(event, Tokens) for i in event.ids)


class LongJob:
    """A job that runs until it is told otherwise; ``begun`` after its first token."""

    def __init__(self, running: Running, params: ExecuteParams, owner: str = "o") -> None:
        self.events: list[WorkerEvent] = []
        self._running = running
        self._stream = running.worker.execute(params, owner)
        running.run(self._until(Tokens))

    async def _until(self, *kinds: type) -> None:
        async for event in self._stream:
            self.events.append(event)
            if isinstance(event, kinds):
                return

    def end(self) -> WorkerEvent:
        """Reads to the terminal event."""
        self._running.run(self._until(Ended, Failed))
        return self.events[-1]

    def abandon(self) -> None:
        """Goes away, as a lost client does."""
        self._running.run(self._stream.aclose())  # type: ignore[attr-defined]


def long_job(job_id: str, **changes: object) -> ExecuteParams:
    return job(job_id, **{"max_tokens": 400, **changes})


def refusal(running: Running, params: ExecuteParams, owner: str = "o") -> OrcdError:
    with pytest.raises(OrcdError) as caught:
        running.run(events_of(running.worker, params, owner))
    return caught.value


# -- a job that ends well ----------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4240")
def test_a_job_is_started_then_tokens_then_one_end(running: Running) -> None:
    events = running.run(events_of(running.worker, job("a", seed=7)))
    kinds = [type(event) for event in events if not isinstance(event, Metrics)]
    assert kinds[0] is Started
    assert kinds[-1] is Ended
    assert set(kinds[1:-1]) == {Tokens}
    started, ended = events[0], events[-1]
    assert isinstance(started, Started)
    assert (started.job_id, started.model, started.seed) == ("a", "Tiny-Test", 7)
    assert isinstance(ended, Ended)
    assert (ended.finish_reason, ended.tokens_out, len(ids_of(events))) == (FinishReason.LENGTH, 4, 4)


def test_the_state_follows_the_jobs(running: Running) -> None:
    before = len(running.states)
    running.run(events_of(running.worker, job("b")))
    assert running.states[before:] == [State.EXECUTING, State.READY]


def test_text_token_ids_and_chat_are_the_same_prompt(running: Running) -> None:
    worker = running.worker
    ids = running.run(worker.tokenize("in the", add_special=True))
    chat = ChatPrompt(messages=(ChatMessage(role="user", content="in the"),))  # its template is the content alone
    answers = [
        ids_of(running.run(events_of(worker, job("c", prompt=prompt)))) for prompt in ("in the", tuple(ids), chat)
    ]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.requirement("WORKER-4710")
def test_one_seed_gives_the_same_tokens_and_others_differ(running: Running) -> None:
    def sampled(seed: int) -> tuple[int, ...]:
        return ids_of(running.run(events_of(running.worker, job("d", max_tokens=16, temperature=1.0, seed=seed))))

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in (1, 2, 2**32 + 1, 2**64 - 1)}) == 4


def test_a_job_without_a_seed_says_which_it_got(running: Running) -> None:
    first = running.run(events_of(running.worker, job("e", max_tokens=16, temperature=1.0)))
    assert isinstance(first[0], Started)
    again = running.run(events_of(running.worker, job("e", max_tokens=16, temperature=1.0, seed=first[0].seed)))
    assert ids_of(again) == ids_of(first)


# -- who may do what ---------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4250")
def test_only_the_owner_can_cancel_and_nothing_follows(running: Running) -> None:
    held = LongJob(running, long_job("f"), "mine")
    assert not running.run(running.worker.cancel("f", "theirs"))
    assert running.run(running.worker.cancel("f", "mine"))
    assert not running.run(running.worker.cancel("f", "mine"))
    read = len(held.events)
    ended = held.end()
    assert isinstance(ended, Failed)
    assert ended.error.code is ErrorCode.CANCELLED
    assert len(held.events) == read + 1


@pytest.mark.requirement("WORKER-4250")
def test_the_same_job_id_of_another_owner_is_another_job(running: Running) -> None:
    held = LongJob(running, long_job("g"), "one")
    other = running.run(events_of(running.worker, job("g"), "two"))
    assert isinstance(other[-1], Ended)
    held.abandon()


@pytest.mark.requirement("WORKER-4250")
def test_a_live_duplicate_is_refused_and_leaves_the_first_alone(running: Running) -> None:
    held = LongJob(running, long_job("h", max_tokens=60))
    error = refusal(running, job("h"))
    assert (error.code, error.field) == (ErrorCode.INVALID_PARAMS, "job_id")
    assert isinstance(held.end(), Ended)


@pytest.mark.requirement("WORKER-4500")
def test_beyond_the_slots_a_job_is_refused_with_a_hint_and_runs_when_one_is_free(running: Running) -> None:
    held = [LongJob(running, long_job(f"i{n}")) for n in range(SLOTS)]
    error = refusal(running, job("i"))
    assert error.code is ErrorCode.BUSY
    assert error.retry_after_ms
    held[0].abandon()
    assert isinstance(running.run(events_of(running.worker, job("i")))[-1], Ended)
    held[1].abandon()


@pytest.mark.requirement("WORKER-4254")
def test_a_client_that_goes_away_ends_its_job(running: Running) -> None:
    held = LongJob(running, long_job("j"))
    assert running.worker.status().slots_used == 1
    held.abandon()
    assert running.worker.status().slots_used == 0
    assert running.worker.lifecycle.state is State.READY


# -- what is refused before it starts ----------------------------------------------------------------------------------


def test_a_handle_that_is_not_loaded_is_not_found(running: Running) -> None:
    assert refusal(running, job("k", handle_id="h-other")).code is ErrorCode.NOT_FOUND
    (handle,) = running.worker.ready().handles
    assert isinstance(running.run(events_of(running.worker, job("k", handle_id=handle.handle_id)))[-1], Ended)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": (0, 10_000)}, "prompt_token_ids"),
        ({"prompt": tuple([5] * 500), "max_tokens": 13}, "max_tokens"),
    ],
)
def test_a_job_that_can_never_run_is_refused_with_its_field(
    running: Running, changes: dict[str, object], field: str
) -> None:
    error = refusal(running, job("l", **changes))
    assert (error.code, error.field) == (ErrorCode.INVALID_PARAMS, field)
    assert running.worker.status().slots_used == 0


def test_a_context_that_is_just_full_is_taken(running: Running) -> None:
    events = running.run(events_of(running.worker, job("m", prompt=tuple([5] * 500), max_tokens=12)))
    assert isinstance(events[-1], Ended)
    assert events[-1].tokens_in + events[-1].tokens_out == 512


@pytest.mark.requirement("WORKER-4240")
def test_a_job_past_its_deadline_ends_with_timeout(running: Running) -> None:
    """Refused when it passed before the start, else the terminal event; which of them is the clock's choice."""
    assert running.run(outcome(running.worker, long_job("n", timeout_ms=1))) is ErrorCode.TIMEOUT


async def outcome(worker: Worker, params: ExecuteParams) -> ErrorCode | None:
    """How a job failed, before or after its start; None when it did not."""
    try:
        last = (await events_of(worker, params))[-1]
    except OrcdError as error:
        return error.code
    return last.error.code if isinstance(last, Failed) else None


# -- the life of a worker ----------------------------------------------------------------------------------------------


def test_a_worker_that_has_not_loaded_takes_no_job_and_says_when_to_retry(tiny_checkpoint: Path) -> None:
    idle = Running(config_of(tiny_checkpoint))
    error = refusal(idle, job("a"))
    assert error.code is ErrorCode.NOT_READY
    assert error.retry_after_ms
    assert not idle.worker.ready().ready
    assert idle.worker.status().status == "starting"
    idle.close()


@pytest.mark.requirement("WORKER-4110")
def test_vram_is_claimed_on_a_gpu_and_only_there(running: Running) -> None:
    (handle,) = running.worker.ready().handles
    status, emulated = running.worker.status(), PLATFORM == "cpu"
    assert handle.emulated is status.emulated is emulated
    assert status.resident is not emulated
    for claimed in (handle.vram_bytes, status.vram_used_bytes, running.worker.ready().capabilities.vram_bytes):
        assert (claimed == 0) is emulated


def test_a_handle_says_what_was_proved_and_not_more(running: Running) -> None:
    (handle,) = running.worker.ready().handles
    assert len(handle.digest) == 64
    assert (handle.sealed, handle.pinned, handle.total_shards) == (False, False, 1)


@pytest.mark.requirement("WORKER-4970")
def test_a_drain_refuses_new_jobs_and_lets_running_ones_finish(tiny_checkpoint: Path) -> None:
    draining = Running(config_of(tiny_checkpoint))
    draining.run(draining.worker.start())
    held = LongJob(draining, long_job("a", max_tokens=60))
    draining.run(draining.worker.drain(0.0))  # somebody was impatient; who asks next waits all the same
    drained = draining.begin(draining.worker.drain(WAIT_S))
    draining.run(asyncio.sleep(0))
    assert refusal(draining, job("b")).code is ErrorCode.NOT_READY
    assert not drained.done()
    assert isinstance(held.end(), Ended)
    drained.result(WAIT_S)
    draining.close()
    assert draining.states[-2:] == [State.DRAINING, State.STOPPED]


def test_stopping_ends_what_still_runs(tiny_checkpoint: Path) -> None:
    stopping = Running(config_of(tiny_checkpoint))
    stopping.run(stopping.worker.start())
    held = LongJob(stopping, long_job("a"))
    stopping.run(stopping.worker.drain(0.0))
    stopping.run(stopping.worker.stop())
    ended = held.end()
    assert isinstance(ended, Failed)
    assert ended.error.code is ErrorCode.CANCELLED
    stopping.close()


@pytest.mark.requirement("WORKER-4030")
def test_a_model_that_does_not_load_stops_the_worker(tiny_checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    (broken / "tokenizer.json").unlink()
    failing = Running(config_of(broken))
    with pytest.raises(OrcdError, match=r"tokenizer\.json is missing"):
        failing.run(failing.worker.start())
    assert failing.worker.lifecycle.state is State.STOPPED
    assert failing.worker.status().status == "failed"
    failing.close()
