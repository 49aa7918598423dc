"""A worker that hangs still ends: the other process, what it decides by, and the judge of the engine's progress."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.telemetry import log
from orcd_jax.worker import watchdog_process
from orcd_jax.worker.watchdog import EngineProgress, Watchdog
from orcd_jax.worker.watchdog_process import BEAT, EXITING, START_S, Vigil
from tests.conftest import PLATFORM

ROOT = Path(__file__).parent.parent.parent
WAIT_S = 120  # generous: two cores, shared


# -- what it decides by ------------------------------------------------------------------------------------------------


class Watching:
    """A vigil with a clock that a test moves, in ticks as the process makes them."""

    def __init__(self, timeout_s: float = 30) -> None:
        self.now_s = 0.0
        self.vigil = Vigil(timeout_s, self.now_s)

    def hear(self, data: bytes = BEAT) -> None:
        self.vigil.hear(data, self.now_s)

    def reason(self, after_s: float) -> str | None:
        """Why the worker is ended by then, if it is."""
        until = self.now_s + after_s
        while self.now_s < until:
            self.now_s = min(until, self.now_s + 0.5)
            if why := self.vigil.overdue(self.now_s):
                return why[0]
        return None


@pytest.mark.requirement("WORKER-4972")
def test_a_worker_without_a_sign_of_life_is_ended_at_the_timeout() -> None:
    watching = Watching(timeout_s=30)
    watching.hear()
    assert watching.reason(29.9) is None
    assert watching.reason(0.1) == "no_heartbeat"


def test_each_heartbeat_begins_the_timeout_anew() -> None:
    watching = Watching(timeout_s=30)
    for _ in range(100):
        watching.hear()
        assert watching.reason(29) is None


def test_before_the_first_heartbeat_a_slow_start_has_time() -> None:
    watching = Watching(timeout_s=5)
    assert watching.reason(START_S - 1) is None
    assert watching.reason(1) == "no_heartbeat"


@pytest.mark.requirement("WORKER-4972")
def test_a_worker_that_ends_has_the_time_it_announced_whatever_its_heartbeats() -> None:
    watching = Watching(timeout_s=5)
    watching.hear(BEAT + EXITING % 60)
    for _ in range(59):
        watching.hear(BEAT + EXITING % 600)  # neither helps
        assert watching.reason(1) is None
    assert watching.reason(1) == "exit_overdue"


def test_of_several_announcements_the_earliest_deadline_holds() -> None:
    watching = Watching(timeout_s=5)
    watching.hear(EXITING % 60)
    assert watching.reason(10) is None
    watching.hear(EXITING % 30)
    assert watching.reason(29) is None
    assert watching.reason(1) == "exit_overdue"


def test_messages_may_come_in_parts() -> None:
    watching = Watching(timeout_s=30)
    for byte in BEAT + EXITING % 40:
        watching.hear(bytes([byte]))
    assert watching.reason(39) is None
    assert watching.reason(1) == "exit_overdue"


@pytest.mark.parametrize("stopped_s", [4, 3600])
def test_time_in_which_it_was_stopped_itself_does_not_count(stopped_s: float) -> None:
    watching = Watching(timeout_s=30)
    watching.hear()
    assert watching.reason(20) is None
    watching.now_s += stopped_s  # Ctrl-Z, or a machine that slept
    assert watching.reason(9) is None
    assert watching.reason(2) == "no_heartbeat"


@given(st.lists(st.binary(max_size=200).filter(lambda data: b"exit " not in data)))
def test_noise_is_no_sign_of_life_and_is_not_kept(parts: list[bytes]) -> None:
    watching = Watching(timeout_s=130)
    for part in parts:
        watching.hear(part.replace(b"beat", b"?"))
    assert watching.reason(130) == "no_heartbeat"


# -- real processes ----------------------------------------------------------------------------------------------------

_PRELUDE = """
import asyncio, ctypes, os, signal, sys, time
from orcd_jax.errors import OrcdError
from orcd_jax.worker.watchdog import Watchdog
watchdog = Watchdog.start(timeout_s=1.0, worker_id="w1", pool_id="p1", style=sys.argv[1])
"""
_BEATING = """
async def main(hang):
    beating = asyncio.create_task(watchdog.keep_beating())
    await asyncio.sleep(0.1)
    hang()
"""


def ended(script: str, style: str = "json") -> subprocess.CompletedProcess[str]:
    """A process with a watchdog, after both have ended: they share the pipe that is read to its end."""
    command = [sys.executable, "-c", _PRELUDE + script, style]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False, cwd=ROOT)


@pytest.mark.requirement("WORKER-4972")
@pytest.mark.parametrize(
    "hang",
    [
        pytest.param("lambda: time.sleep(1000)", id="blocked loop"),
        pytest.param("lambda: ctypes.PyDLL(None).sleep(1000)", id="interpreter lock held"),
        pytest.param("lambda: os.kill(os.getpid(), signal.SIGSTOP)", id="stopped"),
    ],
)
def test_a_process_that_hangs_is_killed_and_the_log_says_so(hang: str) -> None:
    done = ended(f"{_BEATING}\nprint(os.getpid(), flush=True); asyncio.run(main({hang}))")
    assert done.returncode == -signal.SIGKILL
    line = json.loads(done.stderr)
    assert (line["event"], line["level"], line["reason"]) == ("watchdog", "error", "no_heartbeat")
    assert (line["worker_id"], line["pool_id"], line["pid"]) == ("w1", "p1", int(done.stdout))


@pytest.mark.requirement("WORKER-4972")
def test_a_program_that_never_ends_on_the_device_does_not_keep_the_process() -> None:
    done = ended(f"""
os.environ["JAX_PLATFORMS"] = "{PLATFORM}"
import jax, jax.numpy as jnp
forever = jax.jit(lambda x: jax.lax.while_loop(lambda x: x.sum() >= 0, lambda x: x * 0, x))
waiting = forever.lower(jnp.ones((8,))).compile()
watchdog.beat()
jax.block_until_ready(waiting(jnp.ones((8,))))""")
    assert done.returncode == -signal.SIGKILL
    assert json.loads(done.stderr.splitlines()[-1])["reason"] == "no_heartbeat"


@pytest.mark.requirement("WORKER-4972")
def test_an_end_that_takes_longer_than_announced_is_cut_short() -> None:
    done = ended("watchdog.beat(); watchdog.exiting(0.5)\nwhile True: watchdog.beat(); time.sleep(0.1)")
    assert done.returncode == -signal.SIGKILL
    assert json.loads(done.stderr)["reason"] == "exit_overdue"


@pytest.mark.requirement("WORKER-4972")
@pytest.mark.parametrize(
    ("last", "code"),
    [("watchdog.close()", 0), ("os._exit(9)", 9), ("os.kill(os.getpid(), signal.SIGKILL)", -9)],
)
def test_the_watchdog_ends_with_the_worker_however_that_ends_and_says_nothing(last: str, code: int) -> None:
    done = ended(f"watchdog.beat(); watchdog.exiting(1000); {last}")
    assert (done.returncode, done.stderr) == (code, "")


def test_signals_for_the_worker_do_not_end_the_watchdog() -> None:
    done = ended("""
watchdog.beat()
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
    os.kill(watchdog.pid, number)
time.sleep(1000)""")
    assert done.returncode == -signal.SIGKILL
    assert json.loads(done.stderr)["reason"] == "no_heartbeat"


def test_a_full_pipe_that_nobody_reads_does_not_save_a_worker_that_hangs() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, b"x" * 65_536)
    except BlockingIOError:
        os.set_blocking(writing, True)
    script = _PRELUDE + "watchdog.beat(); time.sleep(1000)"
    with subprocess.Popen([sys.executable, "-c", script, "json"], stderr=writing, cwd=ROOT) as process:
        assert process.wait(WAIT_S) == -signal.SIGKILL
    os.close(reading)
    os.close(writing)


def test_only_its_own_parent_is_ever_watched() -> None:
    """A number that belongs to another process, as after a parent that ended and whose number was taken over."""
    script = Path(watchdog_process.__file__)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        command = [sys.executable, "-I", "-S", str(script), str(bystander.pid), "0.1", "json", "w", "p"]
        watchdog = subprocess.run(command, input=BEAT, capture_output=True, timeout=WAIT_S, check=False)
        assert (watchdog.returncode, watchdog.stderr) == (1, b"")
        assert bystander.poll() is None
        bystander.communicate(b"\n")
        assert bystander.returncode == 0


def test_it_imports_nothing_but_the_standard_library() -> None:
    script = Path(watchdog_process.__file__)
    code = f"import runpy, sys; runpy.run_path({str(script)!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    names = {name.split(".")[0] for name in done.stdout.split()}
    assert names <= sys.stdlib_module_names | {"__main__", "sitecustomize"}


# -- the worker's side -------------------------------------------------------------------------------------------------


def test_a_watchdog_that_is_gone_is_an_error_at_the_next_heartbeat_and_none_at_the_end() -> None:
    watchdog = Watchdog.start(timeout_s=600, worker_id="w", pool_id="p")

    async def beat_until_it_is_gone() -> None:
        beating = asyncio.create_task(watchdog.keep_beating())
        await asyncio.sleep(0)
        os.kill(watchdog.pid, signal.SIGKILL)
        await asyncio.wait_for(beating, WAIT_S)

    with pytest.raises(OrcdError, match="a hang would go unnoticed") as caught:
        asyncio.run(beat_until_it_is_gone())
    assert caught.value.code is ErrorCode.INTERNAL
    watchdog.exiting(30)
    watchdog.close()


def test_the_worker_still_takes_its_signals() -> None:
    Watchdog.start(timeout_s=600, worker_id="w", pool_id="p").close()
    assert not {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} & signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_watchdog_that_cannot_be_started_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(OrcdError, match=r"cannot be started \(No such file or directory\)"):
        Watchdog.start(timeout_s=600, worker_id="w", pool_id="p")


def test_a_heartbeat_never_waits_for_a_watchdog_that_is_stopped() -> None:
    watchdog = Watchdog.start(timeout_s=600, worker_id="w", pool_id="p")
    os.kill(watchdog.pid, signal.SIGSTOP)
    for _ in range(70_000 // len(BEAT)):  # more than a pipe holds
        watchdog.beat()
    os.kill(watchdog.pid, signal.SIGCONT)
    watchdog.close()


@pytest.mark.requirement("WORKER-4800")
@pytest.mark.parametrize("style", ["json", "console"])
def test_its_line_is_as_the_worker_s_own_log_writes_it(style: log.Style) -> None:
    written = io.StringIO()
    log.configure(worker_id="w1", pool_id="p1", style=style, stream=written)
    log.get_logger().error(log.EventCode.WATCHDOG, human="It hangs.", pid=7, reason="no_heartbeat")
    ours = watchdog_process.line(style, "w1", "p1", 7, ("no_heartbeat", "It hangs."))
    theirs = written.getvalue()
    if style == "json":
        assert list(json.loads(ours)) == list(json.loads(theirs))
        assert {**json.loads(ours), "ts": ""} == {**json.loads(theirs), "ts": ""}
        assert len(json.loads(ours)["ts"]) == len(json.loads(theirs)["ts"])
    else:
        assert ours[8:] == theirs[8:]
        assert [ours[i] for i in (2, 5)] == [theirs[i] for i in (2, 5)]


# -- the engine's progress ---------------------------------------------------------------------------------------------


class Polled:
    """A judge asked once a second, of an engine that stalls from a given time on."""

    def __init__(self, timeout_s: float) -> None:
        self.now_s = 0.0
        self.progress = EngineProgress(timeout_s, clock=lambda: self.now_s)

    def poll(self, seconds: int, stalled_since_s: float | None) -> OrcdError | None:
        for _ in range(seconds):
            self.now_s += 1
            stalled_s = 0.0 if stalled_since_s is None else self.now_s - stalled_since_s
            if error := self.progress.poll(stalled_s):
                return error
        return None


@pytest.mark.requirement("WORKER-4972")
def test_a_busy_engine_without_a_step_is_a_device_error_at_the_timeout() -> None:
    polled = Polled(timeout_s=30)
    assert polled.poll(100, None) is None
    assert polled.poll(29, 100) is None
    error = polled.poll(1, 100)
    assert error is not None
    assert error.code is ErrorCode.CUDA_ERROR
    assert error.message.startswith("the device made no step for 30 s (--watchdog_timeout=30)")


def test_an_engine_that_waits_or_makes_steps_never_is() -> None:
    polled = Polled(timeout_s=30)
    assert polled.poll(1000, None) is None
    for _ in range(50):
        assert polled.poll(29, polled.now_s) is None


def test_time_in_which_nobody_asked_does_not_count() -> None:
    polled = Polled(timeout_s=30)
    assert polled.poll(10, 0) is None
    polled.now_s += 3600  # this process was stopped, and with it the engine's thread
    assert polled.poll(30, 0) is None
    assert polled.poll(1, 0) is not None
