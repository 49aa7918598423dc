"""Counts how often a worker ended abnormally, and keeps one that cannot live from being started over and over.

    ledger = RestartLedger(state.restarts, max_restarts=config.max_restarts)
    ledger.start()          # refuses after too many
    …
    ledger.end(exit_code)

The pool manager restarts, the worker counts (WORKER-4021, 4963). A start leaves a mark that only ``end`` takes away, so
one that finds it knows that the life before was killed, whatever killed it.

An end is abnormal when the worker, its device or its model failed. That includes a model that does not load: reading
and hashing it again takes minutes of the machine and ends the same way, and the exit code was seen each time before.
It is not abnormal when somebody asked for it, when it was refused before anything was touched, or when something
outside failed while the worker was in order (the callback, the audit disk).

Ages are measured by the clock that runs from boot, which nobody sets. Only entries of an earlier boot are dated by the
wall clock, because no other survives. Each start dates the entries anew by its own clocks, and one from the future
counts as of now: no clock jump shuts a worker out for longer than the window, and none within a boot forgets an end.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orcd_jax.errors import ErrorCode, ExitCode, OrcdError
from orcd_jax.telemetry import log, narration

WINDOW_S = 300.0
ABNORMAL = frozenset({ExitCode.NO_DEVICE, ExitCode.MODEL, ExitCode.DEVICE, ExitCode.SEAL, ExitCode.INTERNAL})
_MAX_ENDS = 1000  # as many as --max_restarts can ask for
_MAX_BYTES = 1 << 20

_Seconds = Annotated[float, Field(ge=-1e12, le=1e12, allow_inf_nan=False)]


class Moment(BaseModel):
    """One point in time by both clocks.

    Attributes:
      boot_id: which boot of the machine ``boottime_s`` belongs to; empty where that cannot be known.
      boottime_s: since boot, time asleep included; negative for a moment before it.
      wall_s: since 1970.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    boot_id: Annotated[str, Field(max_length=64)]
    boottime_s: _Seconds
    wall_s: _Seconds

    def age_s(self, now: Moment) -> float:
        """Seconds from here to ``now``, never negative."""
        same_boot = bool(self.boot_id) and self.boot_id == now.boot_id
        return max(0.0, now.boottime_s - self.boottime_s if same_boot else now.wall_s - self.wall_s)

    def before(self, seconds: float) -> Moment:
        """The moment that was ``seconds`` ago, by the clocks of this one."""
        return Moment(boot_id=self.boot_id, boottime_s=self.boottime_s - seconds, wall_s=self.wall_s - seconds)


class End(BaseModel):
    """One abnormal end: the exit code, or None for a life that was killed, dated when that was noticed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: Moment
    exit_code: Annotated[int, Field(ge=0, le=255)] | None


class _File(BaseModel):
    """What the ledger's file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    running: bool
    ends: Annotated[tuple[End, ...], Field(max_length=_MAX_ENDS)]


def read_clocks() -> Moment:
    """Now."""
    boot_id, clock = "", getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    with contextlib.suppress(OSError):  # not Linux: then only the wall clock tells times apart
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return Moment(boot_id=boot_id, boottime_s=time.clock_gettime(clock), wall_s=time.time())


class RestartLedger:
    """Owns the file. Its directory is locked by the caller, so that no other process writes it."""

    def __init__(self, path: Path, *, max_restarts: int, clock: Callable[[], Moment] = read_clocks) -> None:
        """A ledger that has counted nothing yet.

        Args:
          path: of the file.
          max_restarts: abnormal ends within the window after which ``start`` refuses; 0: it never does.
          clock: now, by both clocks.
        """
        self._path, self._max, self._clock = path, max_restarts, clock
        self._ends: tuple[End, ...] = ()
        self._running = False

    def start(self) -> int:
        """Counts the life before this one if it was killed, and marks that this one began.

        Returns:
          The number of abnormal ends within the window.

        Raises:
          OrcdError: NOT_READY with ``field="max_restarts"`` after too many, saying when to come again; POLICY_VIOLATION
            when the file cannot be written.
        """
        now = self._clock()
        self._ends = self._read(now)[-_MAX_ENDS:]
        refused = 0 < self._max <= len(self._ends)
        self._running = not refused
        try:
            self._write()
        except OSError as error:
            raise OrcdError(
                ErrorCode.POLICY_VIOLATION,
                f"the restart ledger cannot be written ({error.strerror}): make room, or give another --state_dir",
                field="state_dir",
            ) from None
        if refused:
            wait_s = WINDOW_S - self._ends[-self._max].at.age_s(now)
            raise OrcdError(
                ErrorCode.NOT_READY,
                f"this worker {self._said()}; with --max_restarts={self._max} it does not start: see why, and start it "
                f"again in {narration.duration(wait_s)}",
                field="max_restarts",
                retry_after_ms=max(1, round(wait_s * 1000)),
            )
        if self._ends:
            human = f"This worker {self._said()}."
            log.get_logger().warning(log.EventCode.RESTARTS, human=human, restarts=len(self._ends))
        return len(self._ends)

    def end(self, code: ExitCode) -> None:
        """Marks that this life ends, with ``code``; without this it counts as killed. Only the first call counts."""
        if not self._running:
            return
        self._running = False
        if code in ABNORMAL:
            self._ends = (*self._ends, End(at=self._clock(), exit_code=code))[-_MAX_ENDS:]
        try:
            self._write()
        except OSError as error:
            human = f"The restart ledger cannot be written ({error.strerror}): this end will count as abnormal."
            log.get_logger().error(log.EventCode.RESTARTS, human=human)

    def _read(self, now: Moment) -> tuple[End, ...]:
        """The ends within the window, oldest first, dated by this process's clocks; a killed life is the last."""
        try:
            with self._path.open("rb") as stream:
                data = stream.read(_MAX_BYTES + 1)
            if len(data) > _MAX_BYTES:
                raise ValueError
            found = _File.model_validate_json(data)
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, ValidationError):
            return self._set_aside(now)
        aged = [(end.at.age_s(now), end.exit_code) for end in found.ends]
        if found.running:
            aged.append((0.0, None))
        aged.sort(key=lambda pair: -pair[0])
        return tuple(End(at=now.before(age), exit_code=code) for age, code in aged if age < WINDOW_S)

    def _set_aside(self, now: Moment) -> tuple[End, ...]:
        """A damaged ledger hides what happened: kept to be looked at, counted as one end."""
        aside = self._path.with_suffix(".damaged")
        with contextlib.suppress(OSError):
            self._path.replace(aside)
        human = f"The restart ledger was damaged; it is kept as {aside.name} and counts as one abnormal end."
        log.get_logger().warning(log.EventCode.RESTARTS, human=human)
        return (End(at=now, exit_code=None),)

    def _write(self) -> None:
        """Replaces the file whole: a crash leaves the old one or the new one."""
        new = self._path.with_suffix(".new")
        opened = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(opened, "wb") as stream:
            stream.write(_File(running=self._running, ends=self._ends).model_dump_json().encode())
            stream.flush()
            os.fsync(stream.fileno())
        new.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _said(self) -> str:
        codes = ", ".join("killed" if end.exit_code is None else str(end.exit_code) for end in self._ends[-10:])
        times = narration.count(len(self._ends), "time")
        return f"ended abnormally {times} within five minutes ({codes})"
