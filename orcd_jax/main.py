"""``orcd-worker``: flags to a validated configuration, the environment for XLA, then the worker's life.

JAX reads its environment when it is imported, so nothing here imports it, directly or not, before that is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from orcd_jax import __version__
from orcd_jax.command_line import parse
from orcd_jax.config import ConfigError, WorkerConfig
from orcd_jax.errors import ErrorCode, ExitCode, OrcdError
from orcd_jax.telemetry import log, narration
from orcd_jax.worker.callback import Failure, Readiness, deliver

if TYPE_CHECKING:
    from orcd_jax.worker.worker import Worker

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


def run() -> NoReturn:
    """The ``orcd-worker`` command."""
    try:
        code = main(sys.argv)
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    # Not sys.exit: a load that was interrupted, or a thread stuck in a device call, must not hold the process.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


def main(argv: Sequence[str]) -> ExitCode:
    """Runs a worker until it is told to stop.

    Args:
      argv: program name, then flags.

    Returns:
      How it ended; the documented codes of :class:`ExitCode`.
    """
    try:
        config = parse(argv)
        if config is None:
            return ExitCode.OK
        refuse_root(config, os.geteuid())
        set_environment(config, os.environ)
    except ConfigError as error:
        for problem in error.problems:
            print(f"orcd-worker: {problem}", file=sys.stderr)  # noqa: T201 - before the log exists
        return ExitCode.USAGE
    except OrcdError as error:
        print(f"orcd-worker: {error.message}", file=sys.stderr)  # noqa: T201 - before the log exists
        return ExitCode.USAGE
    log.configure(worker_id=config.worker_id, pool_id=config.pool_id, style=config.log_format, level=config.log_level)
    loop = asyncio.new_event_loop()
    try:
        code = loop.run_until_complete(_serve_model(config))
    except Exception as error:  # the last line of defence: one line, one code, no traceback with data in it
        code = report(error)
    log.get_logger().info(log.EventCode.SHUTDOWN, human=narration.shutdown(exit_code=code), exit_code=int(code))
    return code


def refuse_root(config: WorkerConfig, user: int) -> None:
    """Raises POLICY_VIOLATION when the process runs as root and was not told to (WORKER-4900)."""
    if user == 0 and not config.allow_root:
        raise OrcdError(
            ErrorCode.POLICY_VIOLATION,
            "this worker refuses to run as root: start it as another user, or add --allow_root (in a container, say)",
            field="allow_root",
        )


def set_environment(config: WorkerConfig, environment: MutableMapping[str, str]) -> None:
    """Fixes the platform, the device mask and every setting of JAX before it is imported (WORKER-4020).

    Raises:
      ConfigError: CUDA_VISIBLE_DEVICES is set and shows fewer GPUs than --gpu_device needs; or the directory of the
        compile cache is not private.
    """
    # JAX reads settings that change the bits (matmul precision, the random generator) or the code that is run (its own
    # compile cache) from the environment: the same request would not give the same tokens.
    for name in [name for name in environment if name.startswith("JAX_")]:
        del environment[name]
    environment["JAX_PLATFORMS"] = config.platform
    if config.compile_cache_dir is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(private_directory(config.compile_cache_dir))
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's banners; its errors still show
    if config.platform == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = device_mask(config.gpu_device, environment)
        # Indices as nvidia-smi counts them, unless a mask was made by another order.
        environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def private_directory(path: Path) -> Path:
    """Makes the directory of the compile cache, or checks that it is ours alone."""
    flag = "--compile_cache_dir"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise ConfigError(
            [f"{flag}: it cannot be made ({error.strerror}): choose another, or check permissions"]
        ) from None
    if status.st_mode & 0o077:
        raise ConfigError([f"{flag}: others can use it (mode {status.st_mode & 0o777:04o}): run `chmod 700` on it"])
    if status.st_uid != os.geteuid():
        raise ConfigError([f"{flag}: it belongs to another user: choose one of your own"])
    return path.resolve()


def device_mask(index: int, environment: Mapping[str, str]) -> str:
    """The value of CUDA_VISIBLE_DEVICES that shows one GPU: the ``index``-th of those visible now."""
    outer = environment.get("CUDA_VISIBLE_DEVICES")
    if outer is None:
        return str(index)
    visible = [name.strip() for name in outer.split(",") if name.strip() and name.strip() != "-1"]
    if index >= len(visible):
        raise ConfigError(
            [
                (
                    f"--gpu_device: {index} is not allowed: CUDA_VISIBLE_DEVICES shows "
                    f"{narration.count(len(visible), 'GPU')}; use an index below that, or unset it"
                )
            ]
        )
    return visible[index]


class Serving(Protocol):
    """What the start-up needs of a worker; ``worker.worker.Worker`` is one."""

    async def start(self) -> None:
        """Loads the model; returns when it takes jobs. Raises OrcdError."""

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
) -> ExitCode:
    """Listens, loads, tells the pool manager, and serves. Server first, callback second (WORKER-4023).

    Args:
      config: what was asked for.
      worker: owns the model and the jobs.
      listen: starts the server; raises OSError when the address cannot be bound.
      readiness: what the pool manager is told, once the model is loaded.
      callback_token: bearer token for the callback; empty: none.
      stopping: set when the process is asked to end.

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
    loading = asyncio.create_task(worker.start())
    await _first(stop, loading)
    if not loading.done():
        return ExitCode.OK  # what was loaded so far goes with the process
    if (refusal := loading.exception()) is not None:
        return await _fail(config, refusal, stop, callback_token)

    failing = asyncio.create_task(worker.wait_failed())
    telling = asyncio.create_task(_undelivered(config, readiness, callback_token))
    await _first(stop, failing, telling)
    code = ExitCode.OK
    if not failing.done():
        if telling.done():
            report(telling.exception() or telling.result())
            code = ExitCode.CALLBACK  # it holds memory that nobody accounts for
        await _first(asyncio.create_task(worker.drain(config.drain_timeout_ms / 1000)), failing)
    in_order = await worker.stop()
    if failing.done():  # serving or draining: a device that fails is never a clean stop
        code = await _fail(config, failing.exception() or failing.result(), stop, callback_token)
    elif not in_order:
        hung = OrcdError(ErrorCode.CUDA_ERROR, "the device did not answer: it may need a reset before the next start")
        code = await _fail(config, hung, stop, callback_token)
    server.close()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(server.wait_closed(), _CLOSE_TIMEOUT_S)
    return code


async def _fail(config: WorkerConfig, error: BaseException, stop: asyncio.Task[bool], token: str) -> ExitCode:
    """Tells the log and the pool manager why the worker cannot go on; the exit code for it."""
    code = report(error)
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


async def _undelivered(config: WorkerConfig, readiness: Callable[[], Readiness], token: str) -> OrcdError:
    """Returns only when there is a pool manager and it could not be told in time."""
    try:
        if config.readiness_callback_url:
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


async def _serve_model(config: WorkerConfig) -> ExitCode:
    """Wires the real worker and server. After the environment is set: these import JAX."""
    stopping = _stop_signal(asyncio.get_running_loop())  # first: the imports take a second or two
    from orcd_jax.server.auth import load_tokens
    from orcd_jax.server.grpc_server import start_server
    from orcd_jax.worker.worker import Worker

    tokens = load_tokens(config.api_token_file)
    callback_token = "" if config.callback_token_file is None else config.callback_token_file.read_text().strip()
    worker = Worker(config)
    return await serve(
        config,
        worker=worker,
        listen=lambda: start_server(
            worker, host=config.bind_address, port=config.rpc_port, tokens=tokens, on_shutdown=stopping.set
        ),
        readiness=lambda: _readiness(config, worker),
        callback_token=callback_token,
        stopping=stopping,
    )


def _readiness(config: WorkerConfig, worker: Worker) -> Readiness:
    """What the pool manager is told of a worker that is ready."""
    info = worker.ready()
    (handle,) = info.handles
    return Readiness(
        worker_id=config.worker_id,
        pool_id=config.pool_id,
        model_ref=handle.model_ref,
        digest=handle.digest,
        vram_bytes=handle.vram_bytes,
        emulated=handle.emulated,
        uri=f"grpc://{config.address}",
        capabilities=asdict(info.capabilities),
    )


def _stop_signal(loop: asyncio.AbstractEventLoop) -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets. The second ends the process at once (WORKER-4970)."""
    asked, signals = asyncio.Event(), itertools.count()

    def on_signal() -> None:
        if next(signals):  # not whether it was asked: the RPC Shutdown asks too
            os._exit(ExitCode.INTERRUPTED)
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        # One that the parent ignores (a shell's background job, nohup) is not ours to take.
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, on_signal)
    return asked


def report(error: BaseException) -> ExitCode:
    """Logs an error that ends the process, and says by which code."""
    logger = log.get_logger()
    if isinstance(error, OrcdError):
        logger.error(log.EventCode.ERROR, human=error.message, code=error.code.value, field=error.field)
        return exit_code_of(error)
    human = f"An internal error ({type(error).__name__}): please report it with this line."
    logger.error(log.EventCode.ERROR, human=human, code=ErrorCode.INTERNAL.value, where=log.where(error))
    return ExitCode.INTERNAL


def exit_code_of(error: OrcdError) -> ExitCode:
    """The documented exit code for an error that ends the process."""
    if error.field == "platform":
        return ExitCode.NO_DEVICE
    return _EXIT_OF_ERROR.get(error.code, ExitCode.INTERNAL)
