"""A worker on an event loop of its own thread, and jobs for it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import pytest

from orcd_jax.config import WorkerConfig
from orcd_jax.device.gpu_health import GpuProbe
from orcd_jax.engine.request import Ended, Failed, Tokens
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.worker import commits as commits_module
from orcd_jax.worker.loader import ResidentModel, load
from orcd_jax.worker.services import Services
from orcd_jax.worker.types import CommitParams, ExecuteParams, Handle, WorkerEvent
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
        "allow_shared_gpu": PLATFORM == "cuda",  # several processes of the suite use it at once
        **changes,
    }
    return WorkerConfig.from_flags(given)


def services_of(**given: Any) -> Services:
    """A worker's services; on a GPU its driver is asked."""
    if PLATFORM == "cuda":
        given = {"gpu_health": GpuProbe(os.environ.get("CUDA_VISIBLE_DEVICES", "0")).read, **given}
    return Services(**given)


class HeldLoad:
    """Loads begin, and go on when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._begun, self._released = threading.Event(), threading.Event()
        monkeypatch.setattr(commits_module, "load", self._load)

    def _load(self, *arguments: Any, **named: Any) -> ResidentModel:
        self._begun.set()
        assert self._released.wait(WAIT_S)
        return load(*arguments, **named)

    def wait_begun(self) -> None:
        assert self._begun.wait(WAIT_S)

    def go_on(self) -> None:
        self._released.set()


class Running:
    """A started worker on an event loop of its own thread; tests give it coroutines."""

    def __init__(self, config: WorkerConfig, services: Services | None = None) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.worker = self.run(self._made(config, services or services_of()))
        self.states = [self.worker.lifecycle.state]
        self.worker.lifecycle.subscribe(self.states.append)

    async def _made(self, config: WorkerConfig, services: Services) -> Worker:
        return Worker(config, services)

    def begin(self, work: Coroutine[object, object, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Coroutine[object, object, Result]) -> Result:
        return self.begin(work).result(WAIT_S)

    def until_end_is_unread(self, job_id: str, owner: str = "o") -> None:
        """Returns when the job's terminal event waits in its stream."""

        async def wait() -> None:
            live = self.worker.jobs.live.find(owner, job_id)
            while live is not None and not live.stream.closed:
                await asyncio.sleep(0.001)

        self.run(wait())

    def close(self) -> bool:
        in_order = self.run(self.worker.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_S)
        self.loop.close()
        return in_order


def job(job_id: str, **changes: object) -> ExecuteParams:
    values: dict[str, object] = {"job_id": job_id, "prompt": "in the", "max_tokens": 4, "ignore_eos": True, **changes}
    return ExecuteParams(**values)  # type: ignore[arg-type]


async def events_of(worker: Worker, params: ExecuteParams, owner: str = "o") -> list[WorkerEvent]:
    return [event async for event in worker.execute(params, owner)]


async def commit_of(worker: Worker, params: CommitParams) -> Handle:
    """The handle that a Commit ends with."""
    events = [event async for event in worker.commit(params)]
    assert isinstance(events[-1], Handle)
    return events[-1]


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


async def outcome(worker: Worker, params: ExecuteParams) -> ErrorCode | None:
    """How a job failed, before or after its start; None when it did not."""
    try:
        last = (await events_of(worker, params))[-1]
    except OrcdError as error:
        return error.code
    return last.error.code if isinstance(last, Failed) else None


class BrokenDecode:
    """The worker's programs, whose decode fails, or never answers, once it is told to."""

    def __init__(self, running: Running, monkeypatch: pytest.MonkeyPatch, failure: Exception | None = None) -> None:
        sealed = running.worker.sealed
        assert sealed is not None
        engine = sealed.engine
        self.failing, self.answer = threading.Event(), threading.Event()
        real = engine._programs.decode

        def decode(*arguments: object) -> object:
            if self.failing.is_set():
                if failure is not None:
                    raise failure
                assert self.answer.wait(WAIT_S)
            return real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(engine._programs, "decode", decode)
