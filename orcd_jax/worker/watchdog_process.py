"""The watchdog's own process: it hears heartbeats on a pipe and ends its parent when they stop (WORKER-4972).

A process, because a thread would wait for the interpreter's lock, which is what a hung call may hold. It is run as a
script with nothing but the standard library: it starts in milliseconds and depends on nothing the worker may break.

It measures by its own ticks: when it was itself stopped, with its whole process group or machine, that time does not
count. A worker that alone is stopped does count: it holds a GPU and serves nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from datetime import UTC, datetime

BEAT = b"beat\n"
EXITING = b"exit %f\n"

# Before the first heartbeat the worker imports its libraries, which a cold disk makes slow.
START_S = 120.0
_TICK_S = 0.5
_LONGEST_TICK_S = 3.0  # past that, this process was stopped too
_LONGEST_LINE = 64


class Vigil:
    """Decides when the worker hangs. Knows times and messages, no process."""

    def __init__(self, timeout_s: float, now: float) -> None:
        """Waits for the first heartbeat."""
        self._timeout_s = timeout_s
        self._deadline = now + max(timeout_s, START_S)
        self._exit_s: float | None = None  # what it announced
        self._ticked, self._unread = now, b""

    def hear(self, data: bytes, now: float) -> None:
        """Takes bytes from the worker: whole messages or parts of them."""
        *lines, self._unread = (self._unread + data).split(b"\n")
        self._unread = self._unread[-_LONGEST_LINE:]
        for line in lines:
            if line == b"beat" and self._exit_s is None:
                self._deadline = now + self._timeout_s
            elif line.startswith(b"exit "):
                seconds = float(line[5:])
                if self._exit_s is None or now + seconds < self._deadline:
                    self._exit_s, self._deadline = seconds, now + seconds

    def overdue(self, now: float) -> tuple[str, str] | None:
        """Why the worker must be ended now, as a word and a sentence; None while it need not. Called at every tick."""
        if now - self._ticked > _LONGEST_TICK_S:
            self._deadline += now - self._ticked
        self._ticked = now
        if now < self._deadline:
            return None
        if self._exit_s is not None:
            return "exit_overdue", (
                f"The worker was to end within {self._exit_s:.0f} s and did not: it is killed. What it holds of the "
                "device goes with it, unless the driver hangs too."
            )
        return "no_heartbeat", (
            f"The worker gave no sign of life for {self._timeout_s:.0f} s: it hangs and is killed. Look at the device "
            "before the next start."
        )


class Parent:
    """Owns the means to kill the one process that started this one, and never another that took over its number."""

    def __init__(self, pid: int) -> None:
        """Takes hold of it. Raises ProcessLookupError when ``pid`` is not the parent, or no longer."""
        self.pid, self._handle = pid, None
        if hasattr(os, "pidfd_open"):
            try:
                self._handle = os.pidfd_open(pid)
            except ProcessLookupError:
                raise
            except OSError:  # a sandbox without this call
                pass
        if os.getppid() != pid:  # asked after the handle was taken: so the handle is the parent's
            raise ProcessLookupError

    def kill(self) -> None:
        """SIGKILL, which even a stopped process and one in a device call obey, the latter when the driver returns."""
        with contextlib.suppress(ProcessLookupError):
            if self._handle is not None:
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            elif os.getppid() == self.pid:
                os.kill(self.pid, signal.SIGKILL)


def watch(parent: Parent, vigil: Vigil, source: int) -> tuple[str, str] | None:
    """Listens until the worker ends by itself (None) or hangs (why)."""
    poller = select.poll()
    poller.register(source, select.POLLIN)
    while True:
        ready = poller.poll(_TICK_S * 1000)
        now = time.monotonic()
        if ready:
            data = os.read(source, 65_536)
            if not data:
                return None
            vigil.hear(data, now)
        if why := vigil.overdue(now):
            return why


def line(style: str, worker_id: str, pool_id: str, pid: int, why: tuple[str, str]) -> str:
    """One line as the worker's log writes it."""
    reason, human = why
    now = datetime.now(UTC)
    if style == "console":
        return f"{now:%H:%M:%S} error   watchdog: {human} (pid={pid} reason={reason})\n"
    stamp = now.isoformat().replace("+00:00", "Z")
    said = {"ts": stamp, "level": "error", "event": "watchdog", "human": human, "worker_id": worker_id}
    return json.dumps({**said, "pool_id": pool_id, "pid": pid, "reason": reason}) + "\n"


def say(text: str) -> None:
    """Writes to stderr if that takes it at once: a full pipe that nobody reads must not save a hung worker."""
    poller = select.poll()
    poller.register(2, select.POLLOUT)
    with contextlib.suppress(OSError):
        if any(event & select.POLLOUT for _, event in poller.poll(0)):
            os.write(2, text.encode())


def main(arguments: list[str]) -> int:
    """``watchdog_process.py PARENT TIMEOUT STYLE WORKER_ID POOL_ID``, with the pipe as standard input."""
    pid, timeout_s, style, worker_id, pool_id = arguments
    try:
        parent = Parent(int(pid))
    except ProcessLookupError:
        return 1
    why = watch(parent, Vigil(float(timeout_s), time.monotonic()), 0)
    if why is not None:
        say(line(style, worker_id, pool_id, parent.pid, why))
        parent.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
