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
from orcd_jax.worker.callback import Readiness
from orcd_jax.worker.pool_manager import PoolManager

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
    pool_manager: PoolManager,
    stopping: asyncio.Event,
    beat: Callable[[], None] = lambda: None,
) -> ExitCode:
    """Listens, loads, tells the pool manager, and serves. Server first, callback second (WORKER-4023).

    Args:
      config: what was asked for.
      worker: owns the model and the jobs.
      listen: starts the server; raises OSError when the address cannot be bound.
      readiness: what the pool manager is told, once the model is loaded.
      pool_manager: is told so, or why the worker ends.
      stopping: set when the process is asked to end.
      beat: called every second, to show that the event loop lives.

    Returns:
      OK after an orderly end; else why it ended. Errors are logged here.
    """
    stop = asyncio.create_task(stopping.wait())

    async def fail(error: BaseException, *, code: ExitCode | None = None, loaded: bool = False) -> ExitCode:
        """Tells the log and the pool manager why the worker cannot go on; the exit code for it."""
        known = report(error, loaded=loaded)
        code = known if code is None else code
        await pool_manager.tell_failure(error, code, stop=stop)
        return code

    try:
        server = await listen()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        problem = f"cannot listen at {config.address} ({reason}): stop what uses the port, or choose another --rpc_port"
        return await fail(OrcdError(ErrorCode.BUSY, problem), code=ExitCode.ADDRESS)
    logger = log.get_logger(platform=config.platform)
    said = narration.startup(version=__version__, platform=config.platform, address=config.address)
    logger.info(log.EventCode.STARTUP, human=said, address=config.address, version=__version__)

    watching = asyncio.create_task(_keep_watch(worker, beat))
    loading = asyncio.create_task(worker.start())
    await _first(stop, loading, watching)
    if watching.done():
        return await fail(_reason_of(watching))
    if not loading.done():
        return ExitCode.OK  # what was loaded so far goes with the process
    if (refusal := loading.exception()) is not None:
        return await fail(refusal)

    failing = asyncio.create_task(worker.wait_failed())
    telling = asyncio.create_task(_undelivered(worker, readiness, pool_manager))
    await _first(stop, failing, telling, watching)
    if not telling.done():
        telling.cancel()  # a worker that ends is not ready any more
    code = ExitCode.OK
    if not failing.done():
        if telling.done() and not telling.cancelled():
            report(telling.exception() or telling.result())
            code = ExitCode.CALLBACK  # it holds memory that nobody accounts for
        elif watching.done():
            code = await fail(_reason_of(watching))
        await _first(asyncio.create_task(worker.drain(config.drain_timeout_ms / 1000)), failing)
    in_order = await worker.stop()
    if failing.done():  # serving or draining: a device that fails is never a clean stop
        code = await fail(failing.exception() or failing.result(), loaded=True)
    elif not in_order:
        hung = OrcdError(ErrorCode.CUDA_ERROR, "the device did not answer: it may need a reset before the next start")
        code = await fail(hung)
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


def _reason_of(watching: asyncio.Task[None]) -> BaseException:
    """Why nobody watches the worker any more."""
    return watching.exception() or OrcdError(ErrorCode.INTERNAL, "nobody watches the worker any more")


async def _undelivered(worker: Serving, readiness: Callable[[], Readiness], pool_manager: PoolManager) -> OrcdError:
    """Returns only when there is a pool manager and it could not be told in time."""
    try:
        if pool_manager.there:
            await worker.wait_ready()
            await pool_manager.tell_ready(readiness())
    except OrcdError as error:
        return error
    await asyncio.Event().wait()
    raise AssertionError  # nothing sets the event


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
