"""A hung device still exits (WORKER-4972): the worker's side of the watchdog, and the judge of the engine's progress.

    watchdog = Watchdog.start(timeout_s=config.watchdog_timeout, …)    # before JAX is imported
    beating = asyncio.create_task(watchdog.keep_beating())             # raises when there is no watchdog any more
    …
    watchdog.exiting(deadline_s=drain_s + 30)                          # first thing when the worker begins to end
    …
    watchdog.close()

Two things can hang. A device call on the engine thread: the event loop lives, sees no progress, and ends the worker
with an error and an exit code. The event loop itself, or whoever holds the interpreter's lock: no heartbeat leaves, and
the other process kills this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Literal, NoReturn

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.worker import watchdog_process

BEAT_S = 1.0
_LONGEST_GAP_S = 3.0
# They ask the worker to end, and the other process ends with it. Ctrl-Z, which stops both, is for both.
_NOT_FOR_IT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Watchdog:
    """Owns the other process and the pipe to it. Closing, or the end of this process, ends that one."""

    def __init__(self, process: subprocess.Popen[bytes], pipe: int) -> None:
        """Takes over what ``start`` made."""
        self._process, self._pipe = process, pipe

    @classmethod
    def start(
        cls, *, timeout_s: float, worker_id: str, pool_id: str, style: Literal["json", "console"] = "json"
    ) -> Watchdog:
        """Starts the other process.

        Args:
          timeout_s: seconds without a heartbeat after which it kills this one; counted from the first heartbeat.
          worker_id: for the line it logs then.
          pool_id: likewise.
          style: of that line, as the log's.

        Raises:
          OrcdError: INTERNAL, when it cannot be started.
        """
        # -I and -S: no module of the worker's folder, the user or the environment can take the place of the library's.
        command = [sys.executable, "-I", "-S", watchdog_process.__file__]
        command += [str(os.getpid()), repr(timeout_s), style, worker_id, pool_id]
        reading, writing = os.pipe()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_IT)  # which it inherits, from its first instruction
        try:
            process = subprocess.Popen(command, stdin=reading, stdout=subprocess.DEVNULL, cwd="/")
        except OSError as error:
            os.close(writing)
            raise OrcdError(ErrorCode.INTERNAL, f"the watchdog cannot be started ({error.strerror})") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(reading)
        os.set_blocking(writing, False)
        return cls(process, writing)

    @property
    def pid(self) -> int:
        """Of the other process."""
        return self._process.pid

    def beat(self) -> None:
        """Says that the event loop lives.

        Raises:
          OrcdError: INTERNAL, when the other process has ended: nobody would notice a hang any more.
        """
        self._send(watchdog_process.BEAT)

    async def keep_beating(self) -> NoReturn:
        """Beats once a second until cancelled. Raises what ``beat`` raises."""
        while True:
            self.beat()
            await asyncio.sleep(BEAT_S)

    def exiting(self, deadline_s: float) -> None:
        """Says that this process begins to end: it is killed if it is still there ``deadline_s`` seconds from now.

        Heartbeats no longer help. Of several announcements the earliest deadline holds.
        """
        with contextlib.suppress(OrcdError):  # it ends: that nobody watches it is no news
            self._send(watchdog_process.EXITING % deadline_s)

    def close(self) -> None:
        """Ends the other process in good order and waits for it."""
        os.close(self._pipe)
        self._process.wait()

    def _send(self, message: bytes) -> None:
        try:
            os.write(self._pipe, message)
        except BlockingIOError:
            pass  # it is stopped, and when it goes on it finds a pipe full of heartbeats
        except BrokenPipeError:
            raise OrcdError(
                ErrorCode.INTERNAL,
                "the watchdog process has ended, so a hang would go unnoticed: start the worker anew",
            ) from None


class EngineProgress:
    """Judges whether a busy engine still makes steps. Lives on the event loop, which asks once a second or so.

    Only time in which it was asked counts: after this process was stopped, or the loop blocked, the engine gets the
    whole timeout again.
    """

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Begins with the first ``poll``."""
        self._timeout_s, self._clock = timeout_s, clock
        self._since: float | None = None  # of an unbroken row of polls
        self._polled = 0.0

    def poll(self, stalled_s: float) -> OrcdError | None:
        """The error that ends the worker, when the device hangs.

        Args:
          stalled_s: seconds since a busy engine last made progress; 0 while it waits for work.
        """
        now = self._clock()
        if self._since is None or now - self._polled > _LONGEST_GAP_S:
            self._since = now
        self._polled = now
        if min(stalled_s, now - self._since) < self._timeout_s:
            return None
        return OrcdError(
            ErrorCode.CUDA_ERROR,
            f"the device made no step for {stalled_s:.0f} s (--watchdog_timeout={self._timeout_s:.0f}): it hangs and "
            "may need a reset",
        )
