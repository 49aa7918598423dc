"""The life of the process, with a worker and a server that only keep a record."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import Awaitable, Callable

import pytest

from orcd_jax import serving
from orcd_jax.config import WorkerConfig
from orcd_jax.errors import ErrorCode, ExitCode, OrcdError
from orcd_jax.worker import callback, pool_manager
from orcd_jax.worker.callback import Readiness
from tests.configured import parsed

READINESS = Readiness(
    worker_id="w1",
    pool_id="p1",
    model_ref="m",
    handle_id="h",
    digest="0" * 64,
    pinned=False,
    vram_bytes=0,
    emulated=True,
    uri="grpc://x",
    metrics_port=0,
    identity_public_key="1" * 64,
)


class Record:
    """A worker and a server in one that note what was asked of them, in order."""

    def __init__(
        self,
        *,
        start_error: Exception | None = None,
        never_loads: bool = False,
        fails_with: OrcdError | None = None,
        in_order: bool = True,
    ) -> None:
        self._in_order = in_order
        self.calls: list[str] = []
        self.stopping = asyncio.Event()
        self.ready = asyncio.Event()
        self.watched = 0
        self._start_error, self._never_loads, self.fails_with = start_error, never_loads, fails_with
        self.failing = asyncio.Event()
        if fails_with is not None:
            self.failing.set()

    async def listen(self) -> Record:
        self.calls.append("listen")
        return self

    async def start(self) -> None:
        self.calls.append("start")
        if self._never_loads:
            self.stopping.set()
            await asyncio.Event().wait()
        if self._start_error is not None:
            raise self._start_error
        self.ready.set()

    async def wait_ready(self) -> None:
        await self.ready.wait()

    def check_progress(self) -> None:
        self.watched += 1

    async def wait_failed(self) -> OrcdError:
        await self.failing.wait()
        assert self.fails_with is not None
        return self.fails_with

    async def drain(self, timeout_s: float) -> None:
        self.calls.append(f"drain {timeout_s:g}")  # the worker's and the server's

    async def stop(self) -> bool:
        self.calls.append("stop")
        return self._in_order

    def close(self) -> None:
        self.calls.append("close")

    async def wait_closed(self) -> None:
        self.calls.append("closed")

    def readiness(self) -> Readiness:
        self.calls.append("readiness")
        return READINESS


def life(
    config: WorkerConfig,
    record: Record,
    listen: Callable[[], Awaitable[Record]] | None = None,
    beat: Callable[[], None] = lambda: None,
) -> ExitCode:
    async def run() -> ExitCode:
        return await serving.serve(
            config,
            worker=record,
            listen=listen or record.listen,
            readiness=record.readiness,
            pool_manager=pool_manager.PoolManager(config),
            stopping=record.stopping,
            beat=beat,
        )

    return asyncio.run(run())


@pytest.mark.requirement("WORKER-4970")
def test_the_order_of_a_whole_life() -> None:
    record = Record()
    start = record.start

    async def start_then_ask_to_stop() -> None:
        await start()
        asyncio.get_running_loop().call_later(0.01, record.stopping.set)

    record.start = start_then_ask_to_stop  # type: ignore[method-assign]
    assert life(parsed("--standalone", "--drain_timeout_ms=1500"), record) is ExitCode.OK
    assert record.calls == ["listen", "start", "drain 1.5", "stop", "drain 5", "close", "closed"]


def test_a_stop_while_loading_ends_at_once() -> None:
    record = Record(never_loads=True)
    assert life(parsed("--standalone"), record) is ExitCode.OK
    assert record.calls == ["listen", "start"]


def test_a_port_in_use_is_found_before_anything_is_loaded(capfd: pytest.CaptureFixture[str]) -> None:
    record = Record()

    async def taken() -> Record:
        raise OSError(errno.EADDRINUSE, "Address already in use")

    assert life(parsed("--standalone"), record, taken) is ExitCode.ADDRESS
    assert record.calls == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OrcdError(ErrorCode.MODEL_LOAD_FAILED, "no manifest"), ExitCode.MODEL),
        (OrcdError(ErrorCode.CAPABILITY_MISMATCH, "needs yarn"), ExitCode.MODEL),
        (OrcdError(ErrorCode.SEAL_VERIFICATION_FAILED, "embed differs"), ExitCode.MODEL),
        (OrcdError(ErrorCode.MODEL_LOAD_FAILED, "no cuda device", field="platform"), ExitCode.NO_DEVICE),
        (OrcdError(ErrorCode.VRAM_OOM, "out of memory"), ExitCode.DEVICE),
        (OrcdError(ErrorCode.CUDA_ERROR, "the device failed"), ExitCode.DEVICE),
        (RuntimeError("a bug"), ExitCode.INTERNAL),
    ],
)
def test_a_model_that_does_not_load_ends_with_the_code_of_its_reason(error: Exception, code: ExitCode) -> None:
    assert life(parsed("--standalone"), Record(start_error=error)) is code


@pytest.mark.requirement("WORKER-4032")
def test_a_device_that_fails_while_serving_ends_the_process_with_its_code() -> None:
    record = Record(fails_with=OrcdError(ErrorCode.CUDA_ERROR, "the device failed"))
    assert life(parsed("--standalone"), record) is ExitCode.DEVICE


@pytest.mark.requirement("WORKER-4032")
def test_a_device_that_fails_while_draining_is_no_clean_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record()

    async def fail_in_drain(timeout_s: float) -> None:
        if not record.failing.is_set():  # the worker's; the server's comes later
            record.failing.set()
            await asyncio.Event().wait()

    async def loaded() -> None:
        record.stopping.set()

    record.start, record.drain = loaded, fail_in_drain  # type: ignore[method-assign]
    record.fails_with = OrcdError(ErrorCode.CUDA_ERROR, "the device failed")
    assert life(parsed("--standalone"), record) is ExitCode.DEVICE
    assert record.calls == ["listen", "stop", "close", "closed"]


@pytest.mark.requirement("WORKER-4970")
def test_a_device_that_does_not_answer_is_no_clean_stop() -> None:
    record = Record(in_order=False)

    async def loaded() -> None:
        record.stopping.set()

    record.start = loaded  # type: ignore[method-assign]
    assert life(parsed("--standalone"), record) is ExitCode.DEVICE


class PoolManager:
    """Stands in for delivery over the network: notes what would be sent, or refuses it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, record: Record, *, reachable: bool = True) -> None:
        self.sent: list[dict[str, object]] = []

        async def deliver(url: str, message: Readiness | callback.Failure, **_: object) -> int:
            if not reachable:
                raise callback.CallbackUndelivered(ErrorCode.TIMEOUT, "nobody answers")
            self.sent.append(json.loads(message.body()))
            record.calls.append("told")
            record.stopping.set()
            return 1

        monkeypatch.setattr(pool_manager, "deliver", deliver)


@pytest.mark.requirement("WORKER-4023")
def test_the_pool_manager_is_told_after_the_server_listens_and_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = Record()
    PoolManager(monkeypatch, record)
    assert life(parsed("--readiness_callback_url=http://127.0.0.1:9/"), record) is ExitCode.OK
    assert record.calls[:4] == ["listen", "start", "readiness", "told"]


@pytest.mark.requirement("WORKER-4023")
def test_a_worker_nobody_accounts_for_drains_and_exits_with_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record()
    PoolManager(monkeypatch, record, reachable=False)
    assert life(parsed("--readiness_callback_url=http://127.0.0.1:9/"), record) is ExitCode.CALLBACK
    assert record.calls == ["listen", "start", "readiness", "drain 30", "stop", "drain 5", "close", "closed"]


@pytest.mark.requirement("WORKER-4023")
@pytest.mark.requirement("WORKER-4961")
def test_the_pool_manager_is_told_of_a_failure_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(start_error=OrcdError(ErrorCode.MODEL_LOAD_FAILED, "no manifest"))
    pool = PoolManager(monkeypatch, record)
    assert life(parsed("--readiness_callback_url=http://127.0.0.1:9/"), record) is ExitCode.MODEL
    assert [(sent["status"], sent["code"]) for sent in pool.sent] == [("failed", "MODEL_LOAD_FAILED")]


@pytest.mark.requirement("WORKER-4032")
@pytest.mark.requirement("WORKER-4961")
@pytest.mark.parametrize("when", ["serving", "draining", "stopping"])
def test_the_pool_manager_is_told_of_a_device_that_fails_whenever_it_does(
    monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    record = Record(in_order=when != "stopping")
    pool = PoolManager(monkeypatch, record)
    record.fails_with = OrcdError(ErrorCode.CUDA_ERROR, "the device failed")

    async def loaded() -> None:
        (record.failing if when == "serving" else record.stopping).set()

    async def fail_in_drain(timeout_s: float) -> None:
        if when == "draining" and not record.failing.is_set():  # the worker's; the server's comes later
            record.failing.set()
            await asyncio.Event().wait()

    record.start, record.drain = loaded, fail_in_drain  # type: ignore[method-assign]
    assert life(parsed("--readiness_callback_url=http://127.0.0.1:9/"), record) is ExitCode.DEVICE
    assert [(sent["status"], sent["code"], sent["exit_code"]) for sent in pool.sent] == [("failed", "CUDA_ERROR", 9)]


@pytest.mark.requirement("WORKER-4961")
@pytest.mark.parametrize("loading", [True, False])
def test_the_pool_manager_is_told_of_a_watchdog_that_is_gone(monkeypatch: pytest.MonkeyPatch, loading: bool) -> None:
    record = Record()
    pool = PoolManager(monkeypatch, record)

    loads = record.start

    async def start() -> None:
        if loading:
            await asyncio.Event().wait()
        await loads()

    def beat() -> None:
        if loading or record.ready.is_set():
            raise OrcdError(ErrorCode.INTERNAL, "the watchdog has ended")

    async def never() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(serving, "_BEAT_S", 0.01)
    record.start, record.wait_ready = start, never  # type: ignore[method-assign]  # it has not told that it is ready
    assert life(parsed("--readiness_callback_url=http://127.0.0.1:9/"), record, beat=beat) is ExitCode.INTERNAL
    assert [(sent["message"], sent["exit_code"]) for sent in pool.sent] == [("the watchdog has ended", 70)]


@pytest.mark.requirement("WORKER-4961")
def test_the_pool_manager_is_told_of_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record()
    pool = PoolManager(monkeypatch, record)

    async def taken() -> Record:
        raise OSError(errno.EADDRINUSE, "Address already in use")

    assert life(parsed("--readiness_callback_url=http://127.0.0.1:9/"), record, taken) is ExitCode.ADDRESS
    assert [(sent["code"], sent["exit_code"], sent["retriable"]) for sent in pool.sent] == [("BUSY", 5, True)]


def test_an_unexpected_error_is_told_without_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(start_error=RuntimeError("pointer 0x7f00"))
    pool = PoolManager(monkeypatch, record)
    assert life(parsed("--readiness_callback_url=http://127.0.0.1:9/"), record) is ExitCode.INTERNAL
    assert "0x7f00" not in json.dumps(pool.sent)


@pytest.mark.requirement("WORKER-4023")
def test_a_worker_that_awaits_its_model_tells_the_pool_manager_when_it_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record()
    pool = PoolManager(monkeypatch, record)

    async def awaiting() -> None:
        record.calls.append("start")
        asyncio.get_running_loop().call_later(0.05, committed)

    def committed() -> None:
        assert pool.sent == []
        record.calls.append("committed")
        record.ready.set()

    record.start = awaiting  # type: ignore[method-assign]
    assert life(parsed("--readiness_callback_url=http://127.0.0.1:9/"), record) is ExitCode.OK
    assert record.calls[:5] == ["listen", "start", "committed", "readiness", "told"]


@pytest.mark.requirement("WORKER-4122")
@pytest.mark.parametrize("code", [ErrorCode.SEAL_VERIFICATION_FAILED, ErrorCode.POLICY_VIOLATION])
def test_weights_that_change_while_serving_end_the_process_with_a_code_of_their_own(code: ErrorCode) -> None:
    assert life(parsed("--standalone"), Record(fails_with=OrcdError(code, "embed differs"))) is ExitCode.SEAL


@pytest.mark.requirement("WORKER-4970")
def test_a_worker_that_nobody_watches_any_more_ends() -> None:
    record = Record()

    def beat() -> None:
        raise OrcdError(ErrorCode.INTERNAL, "the watchdog has ended")

    assert life(parsed("--standalone"), record, beat=beat) is ExitCode.INTERNAL
