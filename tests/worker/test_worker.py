"""The worker between the server and the engine: whose job it is, when it is refused, how it ends."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import jax
import pytest

from orcd_jax.checkpoint.progress import Progress
from orcd_jax.config import WorkerConfig
from orcd_jax.engine.request import Ended, Failed, FinishReason, Tokens
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.worker import worker as worker_module
from orcd_jax.worker.lifecycle import State
from orcd_jax.worker.loader import ResidentModel, engine_shape, load_model
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

    def until_end_is_unread(self, job_id: str, owner: str = "o") -> None:
        """Returns when the job's terminal event waits in its stream."""

        async def wait() -> None:
            live = self.worker._jobs.find(owner, job_id)
            while live is not None and not live.stream.closed:
                await asyncio.sleep(0.001)

        self.run(wait())

    def close(self) -> bool:
        in_order = self.run(self.worker.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_S)
        self.loop.close()
        return in_order


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
        """Reads to the terminal event and past it."""
        self._running.run(self._until(Ended, Failed))
        self.abandon()
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


@pytest.mark.requirement("WORKER-4254")
def test_a_client_that_goes_away_after_the_end_but_before_reading_it_leaves_nothing_behind(running: Running) -> None:
    """As many of them as there are slots would otherwise close the worker for good."""
    for n in range(SLOTS + 1):
        held = LongJob(running, long_job(f"o{n}", max_tokens=5))
        running.until_end_is_unread(f"o{n}")
        held.abandon()
    assert running.worker.status().slots_used == 0
    assert running.worker.lifecycle.state is State.READY


@pytest.mark.requirement("WORKER-4250")
def test_after_an_acknowledged_cancel_only_the_error_comes_even_when_the_end_was_on_its_way(running: Running) -> None:
    held = LongJob(running, long_job("p", max_tokens=5))
    running.until_end_is_unread("p")
    read = len(held.events)
    assert running.run(running.worker.cancel("p", "o"))
    ended = held.end()
    assert isinstance(ended, Failed)
    assert ended.error.code is ErrorCode.CANCELLED
    assert len(held.events) == read + 1


@pytest.mark.requirement("WORKER-4254")
def test_a_cancel_while_the_prompt_is_tokenised_refuses_the_job(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenising, go_on = threading.Event(), threading.Event()
    real = Worker._tokenize_prompt

    def slowly(model: ResidentModel, prompt: str | ChatPrompt) -> tuple[int, ...]:
        tokenising.set()
        assert go_on.wait(WAIT_S)
        return real(model, prompt)

    monkeypatch.setattr(Worker, "_tokenize_prompt", staticmethod(slowly))
    refused = running.begin(outcome(running.worker, job("q")))
    assert tokenising.wait(WAIT_S)
    assert running.worker.status().slots_used == 1  # a slot is taken before anything is done for a job
    assert running.run(running.worker.cancel("q", "o"))
    assert running.worker.status().slots_used == 0
    go_on.set()
    assert refused.result(WAIT_S) is ErrorCode.CANCELLED


@pytest.mark.requirement("WORKER-4240")
def test_metrics_come_two_times_a_second_while_a_job_runs(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "METRICS_INTERVAL_S", 0.0)
    events = running.run(events_of(running.worker, long_job("r", max_tokens=50)))
    metrics = [event for event in events if isinstance(event, Metrics)]
    assert metrics
    assert [m.tokens_out for m in metrics] == sorted(m.tokens_out for m in metrics)
    assert metrics[-1].tokens_out <= 50
    assert isinstance(events[-1], Ended)


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


class BrokenDecode:
    """The worker's programs, whose decode fails, or never answers, once it is told to."""

    def __init__(self, running: Running, monkeypatch: pytest.MonkeyPatch, failure: Exception | None = None) -> None:
        engine = running.worker._engine
        assert engine is not None
        self.failing, self.answer = threading.Event(), threading.Event()
        real = engine._programs.decode

        def decode(*arguments: object) -> object:
            if self.failing.is_set():
                if failure is not None:
                    raise failure
                assert self.answer.wait(WAIT_S)
            return real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(engine._programs, "decode", decode)


@pytest.fixture
def fresh(tiny_checkpoint: Path) -> Iterator[Running]:
    started = Running(config_of(tiny_checkpoint))
    started.run(started.worker.start())
    yield started
    if started.loop.is_running():
        started.close()


@pytest.mark.requirement("WORKER-4032")
def test_a_device_error_fails_every_live_job_stops_the_worker_and_says_why(
    fresh: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = BrokenDecode(fresh, monkeypatch, jax.errors.JaxRuntimeError("INTERNAL: an illegal address at 0xdeadbeef"))
    held = [LongJob(fresh, long_job(f"a{n}")) for n in range(SLOTS)]
    broken.failing.set()
    error = fresh.run(fresh.worker.wait_failed())
    assert error.code is ErrorCode.CUDA_ERROR
    assert "deadbeef" not in error.message
    for one in held:
        ended = one.end()
        assert isinstance(ended, Failed)
        assert ended.error.code is ErrorCode.CUDA_ERROR
    assert fresh.worker.lifecycle.state is State.STOPPED
    assert refusal(fresh, job("b")).code is ErrorCode.NOT_READY


def test_running_out_of_memory_fails_the_jobs_and_the_next_one_succeeds(
    fresh: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = BrokenDecode(fresh, monkeypatch, jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    held = LongJob(fresh, long_job("a"))
    broken.failing.set()
    ended = held.end()
    assert isinstance(ended, Failed)
    assert ended.error.code is ErrorCode.VRAM_OOM
    broken.failing.clear()
    assert isinstance(fresh.run(events_of(fresh.worker, job("b")))[-1], Ended)
    assert fresh.worker.lifecycle.state is State.READY


@pytest.mark.requirement("WORKER-4970")
def test_a_device_that_hangs_is_no_clean_stop_and_its_jobs_are_told(
    fresh: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "STOP_TIMEOUT_S", 0.2)
    broken = BrokenDecode(fresh, monkeypatch)
    held = LongJob(fresh, long_job("a"))
    broken.failing.set()
    stopped = fresh.begin(fresh.worker.stop())
    ended = held.end()
    assert isinstance(ended, Failed)
    assert ended.error.code is ErrorCode.CUDA_ERROR
    assert stopped.result(WAIT_S) is False
    broken.answer.set()


def test_a_worker_that_is_stopped_while_it_loads_never_becomes_ready(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def slowly(config: WorkerConfig, progress: Callable[[Progress], None]) -> ResidentModel:
        loading.set()
        assert go_on.wait(WAIT_S)
        return load_model(config, progress)

    monkeypatch.setattr(worker_module, "load_model", slowly)
    stopped = Running(config_of(tiny_checkpoint))
    started = stopped.begin(stopped.worker.start())
    assert loading.wait(WAIT_S)
    stopped.run(stopped.worker.stop())
    go_on.set()
    with pytest.raises(OrcdError, match="stopped while it loaded"):
        started.result(WAIT_S)
    assert stopped.states[-1] is State.STOPPED
    assert State.READY not in stopped.states
    stopped.close()


def test_the_context_is_exactly_what_was_asked_for(tiny_checkpoint: Path) -> None:
    """Pages hold 64 tokens each, but a job may not use what its last page has left over."""
    assert engine_shape(config_of(tiny_checkpoint, max_context="100"), 512).max_context == 100
    assert engine_shape(config_of(tiny_checkpoint), 200).max_context == 200
