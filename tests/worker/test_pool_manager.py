"""Whom the worker tells, and with which token."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from orcd_jax.config import WorkerConfig
from orcd_jax.errors import ErrorCode, ExitCode, OrcdError
from orcd_jax.worker import pool_manager
from orcd_jax.worker.pool_manager import PoolManager
from tests.configured import parsed
from tests.worker.test_callback import READY, pool
from tests.worker.test_callback import PoolManager as Listener

__all__ = ["pool"]

FAILED = OrcdError(ErrorCode.CUDA_ERROR, "the device failed")


def config(url: str, *flags: str) -> WorkerConfig:
    return parsed(f"--readiness_callback_url={url}", *flags)


def token_file(path: Path, token: str, mode: int = 0o600) -> Path:
    path.write_text(token + "\n")
    path.chmod(mode)
    return path


def sent_tokens(listener: Listener) -> list[str | None]:
    return [headers.get("Authorization") for _, headers, _ in listener.received]


@pytest.mark.requirement("WORKER-4961")
def test_a_failure_is_told_with_its_code_its_exit_code_and_when_to_come_again(pool: Listener) -> None:
    refused = OrcdError(ErrorCode.NOT_READY, "too often", retry_after_ms=1500)
    asyncio.run(PoolManager(config(pool.url)).tell_failure(refused, ExitCode.RESTARTS))
    sent = json.loads(pool.received[0][2])
    assert (sent["code"], sent["message"], sent["retriable"]) == ("NOT_READY", "too often", True)
    assert (sent["exit_code"], sent["retry_after_ms"]) == (11, 1500)


@pytest.mark.requirement("WORKER-4961")
def test_of_a_bug_nothing_is_told_but_that_it_is_one(pool: Listener) -> None:
    asyncio.run(PoolManager(config(pool.url)).tell_failure(RuntimeError("pointer 0x7f00"), ExitCode.INTERNAL))
    sent = json.loads(pool.received[0][2])
    assert (sent["code"], sent["message"]) == ("INTERNAL", "an internal error")


def test_a_standalone_worker_tells_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async def deliver(*_: object, **__: object) -> int:
        raise AssertionError("somebody was told")

    monkeypatch.setattr(pool_manager, "deliver", deliver)
    alone = PoolManager(parsed("--standalone"))
    assert not alone.there
    asyncio.run(alone.tell_failure(FAILED, ExitCode.DEVICE))
    asyncio.run(alone.tell_ready(READY))


@pytest.mark.requirement("WORKER-4023")
def test_the_token_is_read_anew_each_time(pool: Listener, tmp_path: Path) -> None:
    """Between a worker's first word and its last, weeks may pass."""
    file = token_file(tmp_path / "token", "a" * 32)
    manager = PoolManager(config(pool.url, f"--callback_token_file={file}"))
    asyncio.run(manager.tell_ready(READY))
    token_file(file, "b" * 32)
    asyncio.run(manager.tell_failure(FAILED, ExitCode.DEVICE))
    file.unlink()
    asyncio.run(manager.tell_failure(FAILED, ExitCode.DEVICE))
    assert sent_tokens(pool) == [f"Bearer {'a' * 32}", f"Bearer {'b' * 32}", f"Bearer {'b' * 32}"]


@pytest.mark.requirement("WORKER-4911")
def test_a_token_that_others_can_read_is_not_sent_and_the_failure_is_told_all_the_same(
    pool: Listener, tmp_path: Path
) -> None:
    file = token_file(tmp_path / "token", "a" * 32, 0o644)
    manager = PoolManager(config(pool.url, f"--callback_token_file={file}"))
    with pytest.raises(OrcdError) as caught:
        manager.read_token()
    assert caught.value.field == "callback_token_file"
    asyncio.run(manager.tell_failure(FAILED, ExitCode.USAGE))
    assert sent_tokens(pool) == [None]


@pytest.mark.requirement("WORKER-4961")
@pytest.mark.parametrize("asked", ["before", "meanwhile"])
def test_a_worker_that_is_asked_to_end_does_not_insist(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setattr(pool_manager, "URGENT_S", 0.05)

    async def deliver(*_: object, **__: object) -> int:
        telling.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def tell() -> None:
        stop: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if asked == "before":
            stop.set_result(True)
        manager = PoolManager(config("http://127.0.0.1:9/"))
        ending = asyncio.create_task(manager.tell_failure(FAILED, ExitCode.DEVICE, stop=stop))
        await telling.wait()
        if asked == "meanwhile":
            assert not ending.done()
            stop.set_result(True)
        await asyncio.wait_for(ending, 10)

    monkeypatch.setattr(pool_manager, "deliver", deliver)
    telling = asyncio.Event()
    asyncio.run(tell())


@pytest.mark.requirement("WORKER-4961")
@pytest.mark.parametrize(("given", "lasts_s"), [(60, 10), (3, 3)])
def test_the_last_word_has_a_deadline_of_its_own_and_no_longer_one_than_the_first(
    monkeypatch: pytest.MonkeyPatch, given: int, lasts_s: float
) -> None:
    deadlines: list[float] = []

    async def deliver(*_: object, deadline_s: float, **__: object) -> int:
        deadlines.append(deadline_s)
        return 1

    monkeypatch.setattr(pool_manager, "deliver", deliver)
    manager = PoolManager(config("http://127.0.0.1:9/", f"--callback_deadline={given}"))
    asyncio.run(manager.tell_ready(READY))
    asyncio.run(manager.tell_failure(FAILED, ExitCode.DEVICE))
    assert deadlines == [given, lasts_s]
