"""``orcd`` as a process: its exit codes, Ctrl-C, readers that go away, and what it does not import."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from orcd_jax.engine.request import Tokens
from orcd_jax.errors import ErrorCode, ExitCode, OrcdError
from tests.cli.conftest import RUN, Orcd, Start
from tests.server.fake_worker import STARTED, TOKEN, WAIT_S, Served, flood, hang_after, play

ROOT = Path(__file__).parents[2]
EXECUTE = ("execute", "--max_tokens=8", "hello")


def test_the_process_prints_and_exits_as_the_call_does(served: Served, start: Start) -> None:
    with start(served.port, *EXECUTE) as process:
        out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out) == (ExitCode.OK, "abcd\n")
    assert err.endswith("finish: stop\n")


def test_a_failed_job_is_told_by_the_exit_code(served: Served, start: Start) -> None:
    served.worker.script = play(STARTED, OrcdError(ErrorCode.VRAM_OOM, "out of memory"))
    with start(served.port, *EXECUTE) as process:
        _, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, err.count("\n")) == (ExitCode.FAILED, 1)


def test_wrong_flags_are_told_by_the_exit_code(start: Start) -> None:
    with start(1, "execute", "--seed=x", "hello") as process:
        out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out, err.count("\n")) == (ExitCode.USAGE, "", 1)


def test_no_worker_is_told_by_the_exit_code(start: Start) -> None:
    with start(1, "ready") as process:
        out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out, err.count("\n")) == (ExitCode.UNREACHABLE, "", 1)


def test_ctrl_c_cancels_the_job_and_leaves_no_traceback(served: Served, start: Start) -> None:
    served.worker.script = hang_after(STARTED, Tokens(0, (1,), "some"))
    with start(served.port, *EXECUTE) as process:
        assert process.stdout is not None
        assert process.stdout.read(4) == "some"
        assert not served.worker.closed.is_set()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out, err) == (ExitCode.INTERRUPTED, "\n", "interrupted\n")
    assert served.worker.closed.wait(WAIT_S)


def test_ctrl_c_while_modules_are_imported_leaves_no_traceback() -> None:
    interrupted = "import signal, orcd_jax.cli as c; c._main = lambda: signal.raise_signal(signal.SIGINT); c.run()"
    done = subprocess.run([sys.executable, "-c", interrupted], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (ExitCode.INTERRUPTED, b"")


def test_ctrl_c_ends_a_connection_that_is_not_answered(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(WAIT_S)
        with start(listener.getsockname()[1], *EXECUTE) as process:
            taken, _ = listener.accept()
            with taken:
                process.send_signal(signal.SIGINT)
                _, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, err) == (ExitCode.INTERRUPTED, "interrupted\n")


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_a_reader_that_goes_away_cancels_the_job_quietly(served: Served, start: Start, form: tuple[str, ...]) -> None:
    served.worker.script = flood("word ")
    with start(served.port, *EXECUTE, *form) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert served.worker.closed.wait(WAIT_S)
        assert process.stderr.read() == ""
        assert process.wait(WAIT_S) == ExitCode.FAILED


def test_a_full_disk_is_one_line(served: Served, tokens: dict[str, str]) -> None:
    environment = tokens | {"ORCD_ADDRESS": f"127.0.0.1:{served.port}"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", RUN, *EXECUTE],
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            timeout=WAIT_S,
            check=False,
        )
    assert done.returncode == ExitCode.FAILED
    assert done.stderr == "error: the answer cannot be written: No space left on device\n"


def test_json_lines_arrive_one_by_one(served: Served, start: Start) -> None:
    served.worker.script = hang_after(STARTED, Tokens(0, (1,), "some"))
    with start(served.port, *EXECUTE, "--json") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "started"
        assert json.loads(process.stdout.readline())["t"] == "some"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=WAIT_S)
    assert out == ""


def test_an_answer_that_the_terminal_has_no_characters_for_is_shown_with_others(
    served: Served, tokens: dict[str, str]
) -> None:
    served.worker.script = play(STARTED, Tokens(0, (1,), "naïve 日本"), OrcdError(ErrorCode.INTERNAL, "x"))
    environment = tokens | {"ORCD_ADDRESS": f"127.0.0.1:{served.port}", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *EXECUTE],
        env=environment,
        capture_output=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.stdout == b"na?ve ??\n"


def test_the_token_is_never_shown(orcd: Orcd, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError(TOKEN)

    monkeypatch.setattr(served.worker, "ready", fail)
    for command in (("ready",), ("status",), EXECUTE, ("ready", "--address=127.0.0.1:1")):
        shown = orcd(*command)
        assert TOKEN not in shown.out + shown.err
