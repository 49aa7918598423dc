"""The restart ledger: what it counts, when it refuses, and what clocks and damage do to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orcd_jax.errors import ErrorCode, ExitCode, OrcdError
from orcd_jax.worker.restart_ledger import ABNORMAL, WINDOW_S, Moment, RestartLedger, read_clocks

ROOT = Path(__file__).parent.parent.parent


@dataclass
class Machine:
    """Clocks that a test sets."""

    boot: str = "boot-1"
    up_s: float = 1000.0
    wall_s: float = 1_700_000_000.0

    def __call__(self) -> Moment:
        return Moment(boot_id=self.boot, boottime_s=self.up_s, wall_s=self.wall_s)

    def wait(self, seconds: float) -> None:
        self.up_s += seconds
        self.wall_s += seconds

    def reboot(self, seconds: float = 30) -> None:
        self.boot += "'"
        self.up_s = seconds / 2
        self.wall_s += seconds


@dataclass
class Life:
    """Lives of one worker on one machine."""

    path: Path
    machine: Machine
    max_restarts: int = 5

    def ledger(self) -> RestartLedger:
        return RestartLedger(self.path, max_restarts=self.max_restarts, clock=self.machine)

    def start(self) -> int:
        """A life that ends by being killed, unless somebody ends it."""
        return self.ledger().start()

    def refusal(self) -> OrcdError:
        with pytest.raises(OrcdError) as caught:
            self.start()
        return caught.value

    def run(self, code: ExitCode) -> None:
        ledger = self.ledger()
        ledger.start()
        ledger.end(code)

    def starts(self) -> bool:
        """Whether it starts; if so, it ends in good order at once."""
        ledger = self.ledger()
        try:
            ledger.start()
        except OrcdError:
            return False
        ledger.end(ExitCode.OK)
        return True


@pytest.fixture
def life(tmp_path: Path) -> Life:
    return Life(tmp_path / "restarts.json", Machine())


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk would be most of the time these tests take."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


# -- what counts -------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4962")
def test_five_lives_that_were_killed_are_enough(life: Life) -> None:
    assert [life.start() for _ in range(5)] == [0, 1, 2, 3, 4]
    error = life.refusal()
    assert (error.code, error.field) == (ErrorCode.NOT_READY, "max_restarts")
    assert "5 times within five minutes (killed, killed, killed, killed, killed)" in error.message


@pytest.mark.requirement("WORKER-4962")
@pytest.mark.parametrize(
    "code", [ExitCode.NO_DEVICE, ExitCode.MODEL, ExitCode.DEVICE, ExitCode.SEAL, ExitCode.INTERNAL]
)
def test_a_failure_of_the_worker_its_device_or_its_model_counts(life: Life, code: ExitCode) -> None:
    for _ in range(5):
        life.run(code)
    assert f"({', '.join([str(code.value)] * 5)})" in life.refusal().message


@pytest.mark.requirement("WORKER-4962")
@pytest.mark.parametrize("code", sorted(set(ExitCode) - ABNORMAL))
def test_an_end_that_was_asked_for_or_came_from_outside_does_not_count(life: Life, code: ExitCode) -> None:
    for _ in range(20):
        life.run(code)
    assert life.start() == 0


def test_only_the_first_end_counts(life: Life) -> None:
    ledger = life.ledger()
    ledger.start()
    ledger.end(ExitCode.OK)
    ledger.end(ExitCode.INTERNAL)
    assert life.start() == 0


def test_the_limit_is_the_flag_s_and_zero_is_none(life: Life) -> None:
    life.max_restarts = 2
    life.start()
    life.start()
    assert life.refusal().field == "max_restarts"
    life.max_restarts = 0
    assert life.start() == 2


# -- when it lets go ---------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4963")
def test_it_says_when_to_come_again_and_then_lets_go(life: Life) -> None:
    for _ in range(5):
        life.start()
        life.machine.wait(10)
    error = life.refusal()  # notices the last one now; the first was noticed 40 s ago
    assert error.retry_after_ms == round((WINDOW_S - 40) * 1000)
    assert "start it again in 4 min 20 s" in error.message
    life.machine.wait(error.retry_after_ms / 1000 - 1)
    assert not life.starts()
    life.machine.wait(1)
    assert life.starts()


def test_a_limit_that_was_lowered_waits_until_fewer_are_left(life: Life) -> None:
    life.max_restarts = 0
    for _ in range(3):
        life.start()
        life.machine.wait(100)
    life.max_restarts = 2
    assert life.refusal().retry_after_ms == 200_000  # noticed 200, 100 and 0 s ago: two of them must be over
    life.machine.wait(200)
    assert life.starts()


@pytest.mark.requirement("WORKER-4963")
def test_starts_that_are_refused_do_not_lengthen_it(life: Life) -> None:
    for _ in range(5):
        life.start()
    for _ in range(59):
        assert not life.starts()
        life.machine.wait(5)
    life.machine.wait(5)
    assert life.starts()


def test_ends_further_apart_than_the_window_never_add_up(life: Life) -> None:
    for _ in range(10):
        assert life.start() <= 3
        life.machine.wait(WINDOW_S / 3)


def test_a_long_life_that_is_killed_counts_from_when_that_is_noticed(life: Life) -> None:
    life.start()
    life.machine.wait(86_400)
    assert life.start() == 1


# -- clocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4963")
@pytest.mark.parametrize("jump_s", [-1e9, -3600, 3600, 1e9])
def test_a_wall_clock_that_is_set_neither_forgets_nor_locks_out(life: Life, jump_s: float) -> None:
    for _ in range(5):
        life.start()
    life.machine.wall_s += jump_s
    assert not life.starts()
    life.machine.wait(WINDOW_S)
    assert life.starts()


@pytest.mark.requirement("WORKER-4963")
def test_after_a_reboot_the_wall_clock_dates_what_was_before(life: Life) -> None:
    for _ in range(5):
        life.start()
    life.machine.reboot(seconds=100)
    assert life.refusal().retry_after_ms == pytest.approx(200_000)  # four noticed 100 s ago; the last one only now
    life.machine.wait(200)
    assert life.starts()


@pytest.mark.requirement("WORKER-4963")
def test_ends_of_an_earlier_boot_from_the_future_count_as_of_now_and_no_longer(life: Life) -> None:
    for _ in range(5):
        life.start()
    life.machine.reboot()
    life.machine.wall_s -= 1e8
    assert not life.starts()
    life.machine.wait(WINDOW_S)
    assert life.starts()


@pytest.mark.parametrize("jump_s", [-1e6, 1e6])
def test_without_a_boot_id_the_wall_clock_is_all_there_is_and_still_lets_go(life: Life, jump_s: float) -> None:
    life.machine.boot = ""
    for _ in range(5):
        life.start()
    assert not life.starts()
    life.machine.wall_s += jump_s
    life.starts()
    life.machine.wait(WINDOW_S)
    assert life.starts()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.one_of(
            st.just("kill"),
            st.just("reboot"),
            st.tuples(st.just("wait"), st.floats(0, 400)),
            st.tuples(st.just("set"), st.floats(-1e9, 1e9)),
        ),
        max_size=30,
    )
)
def test_whatever_happens_to_the_machine_it_lets_go_within_the_window(tmp_path: Path, steps: list[Any]) -> None:
    path = tmp_path / "restarts.json"
    path.unlink(missing_ok=True)
    life = Life(path, Machine())
    for step in steps:
        match step:
            case "kill":
                life.starts() and life.start()
            case "reboot":
                life.machine.reboot()
            case ("wait", seconds):
                life.machine.wait(seconds)
            case ("set", seconds):
                life.machine.wall_s += seconds
    life.starts()  # dates everything by the clocks of now
    life.machine.wait(WINDOW_S)
    assert life.starts()


def test_the_machine_s_own_clocks_are_read() -> None:
    first, second = read_clocks(), read_clocks()
    assert first.boot_id == second.boot_id
    assert 0 <= first.age_s(second) < 60
    assert sys.platform != "linux" or len(first.boot_id) == 36


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"{",
        b"[]",
        b"\xff" * 100,
        b'{"version": 2, "running": false, "ends": []}',
        b'{"version": 1, "running": false, "ends": [], "more": 1}',
        b'{"version": 1, "running": false, "ends": [{"at": null, "exit_code": 9}]}',
        b'{"version":1,"running":false,"ends":[{"at":{"boot_id":"b","boottime_s":1e999,"wall_s":0},"exit_code":9}]}',
        b"[" * 100_000,
        b" " * (1 << 21),
    ],
)
def test_a_damaged_file_is_kept_aside_counted_once_and_said(life: Life, damaged: bytes, lines: list[Any]) -> None:
    life.path.write_bytes(damaged)
    assert life.start() == 1
    assert life.path.with_suffix(".damaged").read_bytes() == damaged
    assert [(line["event"], line["log_level"]) for line in lines] == [("restarts", "warning")] * 2
    assert "restarts.damaged" in lines[0]["human"]
    assert life.start() == 2


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_any_file_is_answered(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "restarts.json"
    path.write_bytes(data)
    assert Life(path, Machine()).start() <= 1


def test_the_file_is_private_and_stays_small(life: Life) -> None:
    life.max_restarts = 0
    life.start()
    assert life.path.stat().st_mode & 0o777 == 0o600
    now = life.machine().model_dump()
    full = {"version": 1, "running": True, "ends": [{"at": now, "exit_code": 70}] * 1000}
    life.path.write_text(json.dumps(full))
    assert life.start() == 1000
    assert life.start() == 1000
    assert life.path.stat().st_size < 1 << 20


def test_a_crash_of_the_machine_leaves_the_old_file_or_the_new_one(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    replace = Path.replace

    def replacing(old: Path, new: Path) -> Path:
        done.append("replace")
        return replace(old, new)

    monkeypatch.setattr(os, "fsync", lambda _: done.append("fsync"))
    monkeypatch.setattr(Path, "replace", replacing)
    life.start()
    assert done == ["fsync", "replace", "fsync"]  # what is in the file, the file, its name


def test_a_start_that_cannot_be_recorded_is_refused(life: Life) -> None:
    life.path.with_suffix(".new").mkdir()
    error = life.refusal()
    assert (error.code, error.field) == (ErrorCode.POLICY_VIOLATION, "state_dir")


def test_an_end_that_cannot_be_recorded_is_said_and_counts_as_killed(life: Life, lines: list[Any]) -> None:
    ledger = life.ledger()
    ledger.start()
    life.path.with_suffix(".new").mkdir()
    ledger.end(ExitCode.OK)
    assert [(line["event"], line["log_level"]) for line in lines] == [("restarts", "error")]
    life.path.with_suffix(".new").rmdir()
    assert life.start() == 1


def test_the_log_says_how_often_it_ended(life: Life, lines: list[Any]) -> None:
    life.start()
    assert lines == []
    life.run(ExitCode.DEVICE)
    (line,) = lines
    assert (line["event"], line["restarts"]) == ("restarts", 1)
    assert life.start() == 2
    assert lines[-1]["human"] == "This worker ended abnormally 2 times within five minutes (killed, 9)."


@pytest.mark.requirement("WORKER-4962")
def test_a_process_that_is_killed_counts_and_one_that_ends_does_not(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from orcd_jax.errors import ExitCode\n"
        "from orcd_jax.worker.restart_ledger import RestartLedger; from orcd_jax.telemetry import log\n"
        "log.configure(worker_id='w', pool_id='p')\n"
        "ledger = RestartLedger(Path(sys.argv[1]), max_restarts=5)\n"
        "print(ledger.start(), flush=True)\n"
        "sys.stdin.readline()\n"
        "ledger.end(ExitCode.OK)\n"
    )
    counts = []
    for how in (signal.SIGKILL, None, None):
        command = [sys.executable, "-c", script, str(tmp_path / "restarts.json")]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            counts.append(int(process.stdout.readline()))
            if how is None:
                process.communicate("\n", timeout=60)
            else:
                os.kill(process.pid, how)
    assert counts == [0, 1, 1]
