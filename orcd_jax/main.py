"""``orcd-worker``: flags to a validated configuration, the environment for XLA, then the worker's life.

JAX reads its environment when it is imported, and privileges are dropped by one thread for itself alone: so nothing
here imports JAX, or starts a thread, directly or not, before both are done.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from orcd_jax.command_line import parse
from orcd_jax.config import ConfigError, WorkerConfig
from orcd_jax.config_files import problems_of_files
from orcd_jax.device.privileges import Stage, lock_down
from orcd_jax.environment import refuse_root, set_environment
from orcd_jax.errors import ErrorCode, ExitCode, OrcdError
from orcd_jax.serving import exit_code_of, report
from orcd_jax.telemetry import log, narration
from orcd_jax.worker.pool_manager import PoolManager
from orcd_jax.worker.restart_ledger import RestartLedger
from orcd_jax.worker.state_directory import StateDirectory
from orcd_jax.worker.watchdog import Watchdog


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
        config = parse(argv, os.environ)
    except ConfigError as error:  # there is nobody to tell: not even the address is sure
        return _complain(error)
    if config is None:
        return ExitCode.OK
    log.configure(worker_id=config.worker_id, pool_id=config.pool_id, style=config.log_format, level=config.log_level)
    try:
        if problems := problems_of_files(config):
            raise ConfigError(problems)
        refuse_root(config, os.geteuid())
        lock_down(Stage.START)
        set_environment(config, os.environ)
    except OrcdError as error:
        code = _complain(error)
        _tell(config, error, code)
        return code
    except Exception as error:
        code = report(error)
        _tell(config, error, code)
        return code
    try:
        code = _live(config)
    except _Stopped:
        code = ExitCode.OK
    except Exception as error:  # the last line of defence: one line, one code, no traceback with data in it
        code = report(error)
        _tell(config, error, code)
    log.get_logger().info(log.EventCode.SHUTDOWN, human=narration.shutdown(exit_code=code), exit_code=int(code))
    return code


def _live(config: WorkerConfig) -> ExitCode:
    """One life, from the mark in the restart ledger to the last."""
    try:
        signal.signal(signal.SIGTERM, _stop)  # until the event loop has a handler of its own, seconds later
        _survive_hangups()
        state = StateDirectory.open(config.state_dir, config.worker_id, os.environ)
        ledger = RestartLedger(state.restarts, max_restarts=config.max_restarts)
        ledger.start()
    except OrcdError as error:
        report(error)
        if error.code is ErrorCode.BUSY:  # what is told under this name would be taken for the other process's word
            return ExitCode.USAGE
        code = ExitCode.RESTARTS if error.field == "max_restarts" else exit_code_of(error)
        _tell(config, error, code)
        return code
    code = ExitCode.INTERNAL
    untold: Exception | None = None
    try:
        code = _watched(config, state, ledger)
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
        raise
    except _Stopped:
        code = ExitCode.OK
    except Exception as error:
        code, untold = report(error), error
    finally:
        ledger.end(code)
        if untold is not None:  # what ended it while it served, it has told itself
            _tell(config, untold, code)
        state.close()
    return code


def _watched(config: WorkerConfig, state: StateDirectory, ledger: RestartLedger) -> ExitCode:
    """Runs the worker with another process that ends it when it hangs."""
    watchdog = Watchdog.start(
        timeout_s=config.watchdog_timeout, worker_id=config.worker_id, pool_id=config.pool_id, style=config.log_format
    )
    try:
        from orcd_jax.wiring import run_worker

        return asyncio.new_event_loop().run_until_complete(run_worker(config, state, watchdog, ledger))
    finally:
        watchdog.close()


def _tell(config: WorkerConfig, error: Exception, code: ExitCode) -> None:
    """Tells the pool manager why this process ends, before it has served. SIGTERM ends the telling."""
    with contextlib.suppress(_Stopped):
        asyncio.run(PoolManager(config).tell_failure(error, code))


class _Stopped(BaseException):
    """SIGTERM came before there was anything to drain."""


def _stop(number: int, frame: object) -> NoReturn:
    del number, frame
    raise _Stopped


def _survive_hangups() -> None:
    """SIGHUP asks to read files again; before that has a handler of its own, it must not end the process."""
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda number, frame: None)


def _complain(error: OrcdError) -> ExitCode:
    """Says what is wrong with the settings, one line each, to whoever gave them."""
    for problem in error.problems if isinstance(error, ConfigError) else (error.message,):
        print(f"orcd-worker: {problem}", file=sys.stderr)  # noqa: T201 - for a person, before the worker lives
    return ExitCode.USAGE
