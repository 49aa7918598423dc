"""The wall clock is set while a worker runs: nothing that has a bound is decided by it."""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import grpc
import pytest

from orcd_jax.errors import ExitCode
from orcd_jax.telemetry.audit import verify_audit
from tests.server.peer import bearer, message
from tests.test_architecture import modules, name_of
from tests.tiny_checkpoint import tiny_checkpoint
from tests.worker_process import SLOW, Worker

__all__ = ["tiny_checkpoint"]

HOUR_S = 3600.0

# Who asks what time it is, and what for. Whoever else must decide by a clock that nobody sets: time.monotonic.
ASKS = {
    "orcd_jax.cli.lifecycle": "whether an attestation of another machine is recent",
    "orcd_jax.residency.recorded": "what a killed process left of a plan; to remove it early does no harm",
    "orcd_jax.server.tls": "whether a certificate is valid, which is a matter of dates",
    "orcd_jax.telemetry.audit": "the time of a record, and its day",
    "orcd_jax.worker.jobs": "when a job began, to tell",
    "orcd_jax.worker.loader": "when a handle was sealed, to tell",
    "orcd_jax.worker.restart_ledger": "how old an end is that was before this boot",
    "orcd_jax.worker.watchdog_process": "the time of a line of the log",
    "orcd_jax.worker.worker": "when an attestation began, to tell",
}
WALL_CLOCK = {
    "time": {"time", "time_ns", "gmtime", "localtime", "ctime", "asctime", "CLOCK_REALTIME"},
    "datetime": {"now", "utcnow", "today"},
    "date": {"today"},
}


def asks(path: Path) -> bool:
    """Whether a module names the wall clock in any way that its syntax shows."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            of = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if node.attr in WALL_CLOCK.get(of, ()):
                return True
        if isinstance(node, ast.ImportFrom) and WALL_CLOCK.get(node.module or "", set()) & {a.name for a in node.names}:
            return True
    return False


@pytest.mark.requirement("WORKER-4963")
def test_only_who_has_a_reason_asks_what_time_it_is() -> None:
    assert {name_of(path) for path in modules() if asks(path)} == set(ASKS)


# -- a process ---------------------------------------------------------------------------------------------------------

SHIFTED = """
import datetime, pathlib, time
read, file = time.time_ns, pathlib.Path({file!r})
def time_ns():
    return read() + int(file.read_text() or 0) * 10**9
class Shifted(datetime.datetime):
    __slots__ = ()
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time_ns() / 1e9, tz)
time.time_ns, time.time = time_ns, lambda: time_ns() / 1e9
datetime.datetime = Shifted
"""


class Shifting:
    """A worker, and the wall clock that it sees."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self._file = folder / "offset"
        self.set(0)
        flags = ("--slots_total=2", "--log_level=debug")
        self.worker = Worker(checkpoint, folder, *flags, prelude=SHIFTED.format(file=str(self._file)) + SLOW)

    def set(self, seconds: float) -> None:
        """Sets the clock, against the true one."""
        new = self._file.with_suffix(".new")
        new.write_text(str(int(seconds)))
        new.replace(self._file)

    @contextlib.contextmanager
    def jumping(self) -> Iterator[None]:
        """Sets the clock an hour on, two hours back, and so on, all the time."""
        over = threading.Event()

        def jump() -> None:
            for offset_s in itertools.cycle((HOUR_S, -HOUR_S)):
                self.set(offset_s)
                if over.wait(0.002):
                    return

        thread = threading.Thread(target=jump)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.set(0)


@pytest.fixture(scope="module")
def shifting(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shifting]:
    """One worker, whose life the tests below share."""
    made = Shifting(tiny_checkpoint, tmp_path_factory.mktemp("shifting"))
    try:
        made.worker.wait_for("ready")
        yield made
    finally:
        made.worker.end()


JUMPS = pytest.mark.parametrize("to_s", [HOUR_S, -HOUR_S, 0.0], ids=["an hour on", "two hours back", "as it was"])


@pytest.mark.slow
@pytest.mark.requirement("WORKER-4242")
def test_a_job_has_its_time_whatever_the_clock_does_meanwhile(shifting: Shifting) -> None:
    call = shifting.worker.execute(job_id="a", max_tokens=100, deadline_ms=60_000)
    next(event for event in call if event.WhichOneof("event") == "token")
    with shifting.jumping():
        events = list(call)
    assert events[-1].WhichOneof("event") == "end"
    assert events[-1].end.tokens_out == 100
    assert 0 < events[-1].end.decode_time_ms < 60_000


@pytest.mark.slow
@pytest.mark.requirement("WORKER-4121")
@JUMPS
def test_the_age_of_the_proof_and_the_uptime_are_those_that_passed(shifting: Shifting, to_s: float) -> None:
    before = shifting.worker.control("GetStatus")
    began = time.monotonic()
    shifting.set(to_s)
    after = shifting.worker.control("GetStatus")
    passed_ms = (time.monotonic() - began) * 1e3
    assert 0 <= after.seal_age_ms <= before.detection_bound_ms
    assert 0 <= after.uptime_ms - before.uptime_ms <= passed_ms + 1000
    list(shifting.worker.execute(job_id="b", max_tokens=4))


@pytest.mark.slow
@pytest.mark.requirement("WORKER-4255")
def test_an_attestation_takes_the_time_that_passed(shifting: Shifting) -> None:
    with shifting.jumping():
        for _ in range(20):
            answer = shifting.worker.control("Attest", message("AttestRequest", nonce=bytes(range(16))))
            assert 0 <= answer.digest_ended_at_ms - answer.digest_began_at_ms < 60_000


@pytest.mark.slow
@pytest.mark.requirement("WORKER-4423")
def test_who_guesses_tokens_gets_no_more_tries_by_the_clock(shifting: Shifting) -> None:
    path, wrong = "/orcd.worker.v1.Worker/Ready", bearer("x" * 32)
    codes = [shifting.worker.peer.refusal_of(path, metadata=wrong).code() for _ in range(12)]
    assert codes[-1] is grpc.StatusCode.RESOURCE_EXHAUSTED
    shifting.set(HOUR_S)
    assert shifting.worker.peer.refusal_of(path, metadata=wrong).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    shifting.set(0)


@pytest.mark.slow
@pytest.mark.requirement("WORKER-4970")
@pytest.mark.requirement("WORKER-4162")
def test_it_drains_and_ends_well_and_all_it_wrote_is_whole(shifting: Shifting) -> None:
    """Runs last: it ends the worker."""
    shifting.set(-HOUR_S)
    worker = shifting.worker
    assert worker.end() == ExitCode.OK
    events = {line.partition('"event": "')[2].partition('"')[0] for line in worker.lines}
    assert not events & {"watchdog", "seal_at_risk", "seal_broken", "error"}
    folder = next(worker.state.glob("*/audit"))
    assert verify_audit(folder).broken is None
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    times = [datetime.fromisoformat(json.loads(line)["ts"]) for line in lines]
    assert max(times) - min(times) > timedelta(hours=1.9), "nobody saw the clock jump"
