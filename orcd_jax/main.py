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
        if config is None:
            return ExitCode.OK
        if problems := problems_of_files(config):
            raise ConfigError(problems)
        refuse_root(config, os.geteuid())
        lock_down(Stage.START)
        set_environment(config, os.environ)
    except ConfigError as error:
        for problem in error.problems:
            _complain(problem)
        return ExitCode.USAGE
    except OrcdError as error:
        _complain(error.message)
        return ExitCode.USAGE
    log.configure(worker_id=config.worker_id, pool_id=config.pool_id, style=config.log_format, level=config.log_level)
    try:
        code = _live(config)
    except _Stopped:
        code = ExitCode.OK
    except Exception as error:  # the last line of defence: one line, one code, no traceback with data in it
        code = report(error)
    log.get_logger().info(log.EventCode.SHUTDOWN, human=narration.shutdown(exit_code=code), exit_code=int(code))
    return code


def _live(config: WorkerConfig) -> ExitCode:
    """One life, from the mark in the restart ledger to the last."""
    try:
        signal.signal(signal.SIGTERM, _stop)  # until the event loop has a handler of its own, seconds later
        state = StateDirectory.open(config.state_dir, config.worker_id, os.environ)
        ledger = RestartLedger(state.restarts, max_restarts=config.max_restarts)
        ledger.start()
    except OrcdError as error:
        report(error)
        if error.field == "max_restarts":
            return ExitCode.RESTARTS
        return ExitCode.USAGE if error.code is ErrorCode.BUSY else exit_code_of(error)
    code = ExitCode.INTERNAL
    try:
        code = _watched(config, state, ledger)
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
        raise
    except _Stopped:
        code = ExitCode.OK
    except Exception as error:
        code = report(error)
    finally:
        ledger.end(code)
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


class _Stopped(BaseException):
    """SIGTERM came before there was anything to drain."""


def _stop(number: int, frame: object) -> NoReturn:
    del number, frame
    raise _Stopped


def _complain(problem: str) -> None:
    print(f"orcd-worker: {problem}", file=sys.stderr)  # noqa: T201 - before the log exists
