"""The life of the process between its first line and its last: listen, load, tell the pool manager, serve, end."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from orcd_jax import __version__
from orcd_jax.config import WorkerConfig
from orcd_jax.errors import ErrorCode, ExitCode, OrcdError
from orcd_jax.telemetry import log, narration
from orcd_jax.worker.callback import Failure, Readiness, deliver

_EXIT_OF_ERROR = {
    ErrorCode.INVALID_PARAMS: ExitCode.USAGE,
    ErrorCode.AUTH_FAILED: ExitCode.USAGE,  # the token file
    ErrorCode.POLICY_VIOLATION: ExitCode.USAGE,
    ErrorCode.MODEL_LOAD_FAILED: ExitCode.MODEL,
    ErrorCode.CAPABILITY_MISMATCH: ExitCode.MODEL,
    ErrorCode.SEAL_VERIFICATION_FAILED: ExitCode.MODEL,
    ErrorCode.INSUFFICIENT_VRAM: ExitCode.MODEL,
    ErrorCode.VRAM_OOM: ExitCode.DEVICE,
    ErrorCode.HOST_OOM: ExitCode.DEVICE,
    ErrorCode.CUDA_ERROR: ExitCode.DEVICE,
}
_CLOSE_TIMEOUT_S = 5.0
_LAST_WORD_TIMEOUT_S = 5.0
_BEAT_S = 1.0


class Serving(Protocol):
    """What the start-up needs of a worker; ``worker.worker.Worker`` is one."""

    async def start(self) -> None:
        """Opens the device and loads the model, unless that is to be asked for. Raises OrcdError."""

    async def wait_ready(self) -> None:
        """Returns when it takes jobs."""

    def check_progress(self) -> None:
        """Called every second: fails the worker when its device hangs."""

    async def wait_failed(self) -> OrcdError:
        """Returns when the worker cannot go on, with the reason."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Refuses new jobs; returns when the running ones ended, at the latest after ``timeout_s``."""

    async def stop(self) -> bool:
        """Ends the engine and frees the device. False when the device did not answer."""
        ...


class Listening(Protocol):
    """A server that was started."""

    async def drain(self, timeout_s: float) -> None:
        """Takes no more calls and says so; returns when the last one ended, at the latest after ``timeout_s``."""

    def close(self) -> None:
        """Takes no more connections."""

    async def wait_closed(self) -> None:
        """Returns when the last connection ended."""


async def serve(
    config: WorkerConfig,
    *,
    worker: Serving,
    listen: Callable[[], Awaitable[Listening]],
    readiness: Callable[[], Readiness],
    callback_token: str,
    stopping: asyncio.Event,
    beat: Callable[[], None] = lambda: None,
) -> ExitCode:
    """Listens, loads, tells the pool manager, and serves. Server first, callback second (WORKER-4023).

    Args:
      config: what was asked for.
      worker: owns the model and the jobs.
      listen: starts the server; raises OSError when the address cannot be bound.
      readiness: what the pool manager is told, once the model is loaded.
      callback_token: bearer token for the callback; empty: none.
      stopping: set when the process is asked to end.
      beat: called every second, to show that the event loop lives.

    Returns:
      OK after an orderly end; else why it ended. Errors are logged here.
    """
    try:
        server = await listen()
    except OSError as error:
        reason = (
            f"cannot listen at {config.address} ({os.strerror(error.errno) if error.errno else type(error).__name__})"
        )
        report(OrcdError(ErrorCode.BUSY, f"{reason}: stop what uses the port, or choose another --rpc_port"))
        return ExitCode.ADDRESS
    logger = log.get_logger(platform=config.platform)
    said = narration.startup(version=__version__, platform=config.platform, address=config.address)
    logger.info(log.EventCode.STARTUP, human=said, address=config.address, version=__version__)

    stop = asyncio.create_task(stopping.wait())
    watching = asyncio.create_task(_keep_watch(worker, beat))
    loading = asyncio.create_task(worker.start())
    await _first(stop, loading, watching)
    if watching.done():
        return report(watching.exception() or OrcdError(ErrorCode.INTERNAL, "nobody watches the worker any more"))
    if not loading.done():
        return ExitCode.OK  # what was loaded so far goes with the process
    if (refusal := loading.exception()) is not None:
        return await _fail(config, refusal, stop, callback_token)

    failing = asyncio.create_task(worker.wait_failed())
    telling = asyncio.create_task(_undelivered(config, worker, readiness, callback_token))
    await _first(stop, failing, telling, watching)
    if not telling.done():
        telling.cancel()  # a worker that ends is not ready any more
    code = ExitCode.OK
    if not failing.done():
        if telling.done() and not telling.cancelled():
            report(telling.exception() or telling.result())
            code = ExitCode.CALLBACK  # it holds memory that nobody accounts for
        elif watching.done():
            code = report(watching.exception() or OrcdError(ErrorCode.INTERNAL, "nobody watches the worker any more"))
        await _first(asyncio.create_task(worker.drain(config.drain_timeout_ms / 1000)), failing)
    in_order = await worker.stop()
    if failing.done():  # serving or draining: a device that fails is never a clean stop
        code = await _fail(config, failing.exception() or failing.result(), stop, callback_token, loaded=True)
    elif not in_order:
        hung = OrcdError(ErrorCode.CUDA_ERROR, "the device did not answer: it may need a reset before the next start")
        code = await _fail(config, hung, stop, callback_token)
    await server.drain(_CLOSE_TIMEOUT_S)
    server.close()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(server.wait_closed(), _CLOSE_TIMEOUT_S)
    return code


async def _keep_watch(worker: Serving, beat: Callable[[], None]) -> None:
    """Ends only by an exception: nobody would notice a hang any more."""
    while True:
        beat()
        worker.check_progress()
        await asyncio.sleep(_BEAT_S)


async def _fail(
    config: WorkerConfig, error: BaseException, stop: asyncio.Task[bool], token: str, *, loaded: bool = False
) -> ExitCode:
    """Tells the log and the pool manager why the worker cannot go on; the exit code for it."""
    code = report(error, loaded=loaded)
    if config.readiness_callback_url:
        known = error if isinstance(error, OrcdError) else OrcdError(ErrorCode.INTERNAL, "an internal error")
        failure = Failure(
            worker_id=config.worker_id,
            pool_id=config.pool_id,
            code=known.code.value,
            message=known.message,
            retriable=known.spec.retriable,
        )
        telling = asyncio.create_task(_deliver(config, failure, token))
        if stop.done():  # no time to insist
            await asyncio.wait([telling], timeout=_LAST_WORD_TIMEOUT_S)
        else:
            await _first(stop, telling)
        if telling.done() and (undelivered := telling.exception()) is not None:
            report(undelivered)
    return code


async def _undelivered(
    config: WorkerConfig, worker: Serving, readiness: Callable[[], Readiness], token: str
) -> OrcdError:
    """Returns only when there is a pool manager and it could not be told in time."""
    try:
        if config.readiness_callback_url:
            await worker.wait_ready()
            await _deliver(config, readiness(), token)
    except OrcdError as error:
        return error
    await asyncio.Event().wait()
    raise AssertionError  # nothing sets the event


async def _deliver(config: WorkerConfig, message: Readiness | Failure, token: str) -> None:
    """Tells the pool manager, and the log how that goes."""
    logger = log.get_logger()

    def on_retry(attempt: int, reason: str, wait_s: float) -> None:
        said = narration.callback_retry(attempt=attempt, reason=reason, wait_s=wait_s)
        logger.warning(log.EventCode.CALLBACK, human=said, attempt=attempt)

    attempts = await deliver(
        config.readiness_callback_url, message, deadline_s=config.callback_deadline, token=token, on_retry=on_retry
    )
    logger.info(log.EventCode.CALLBACK, human=narration.callback_delivered(attempts=attempts), attempt=attempts)


async def _first(*futures: asyncio.Future[Any]) -> None:
    """Waits until one of them is done."""
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def report(error: BaseException, *, loaded: bool = False) -> ExitCode:
    """Logs an error that ends the process, and says by which code."""
    logger = log.get_logger()
    if isinstance(error, OrcdError):
        logger.error(log.EventCode.ERROR, human=error.message, code=error.code.value, field=error.field)
        return exit_code_of(error, loaded=loaded)
    human = f"An internal error ({type(error).__name__}): please report it with this line."
    logger.error(log.EventCode.ERROR, human=human, code=ErrorCode.INTERNAL.value, where=log.where(error))
    return ExitCode.INTERNAL


def exit_code_of(error: OrcdError, *, loaded: bool = False) -> ExitCode:
    """The documented exit code for an error that ends the process; ``loaded``: after a model was sealed."""
    if error.field == "platform":
        return ExitCode.NO_DEVICE
    if loaded and error.code in (ErrorCode.SEAL_VERIFICATION_FAILED, ErrorCode.POLICY_VIOLATION):
        return ExitCode.SEAL
    return _EXIT_OF_ERROR.get(error.code, ExitCode.INTERNAL)
