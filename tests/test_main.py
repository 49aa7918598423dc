"""The worker's command: how it starts, and how each end is reported."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from orcd_jax import main
from orcd_jax.errors import ExitCode


def test_every_problem_is_a_line_on_stderr_and_the_exit_code_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["orcd-worker", "--rpc_port=1"]) is ExitCode.USAGE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line.split(":")[1].strip() for line in shown.err.splitlines()] == [
        "--worker_id",
        "--pool_id",
        "--model_path",
        "--rpc_port",
        "--api_token_file",
        "--readiness_callback_url",
    ]


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text("t" * 40)
    return path


def start(tmp_path: Path, token: Path, *given: str) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end, in a process of its own."""
    command = [sys.executable, "-c", "from orcd_jax.main import run; run()", "--worker_id=w", "--pool_id=p"]
    command += [f"--api_token_file={token}", f"--model_path={tmp_path / 'model'}", "--standalone", *given]
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    environment["STATE_DIRECTORY"] = str(tmp_path / "state")
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def errors_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    return [line for line in lines if line["event"] == "error"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.requirement("WORKER-4621")
def test_no_gpu_is_one_error_that_names_the_way_out(tmp_path: Path, token_file: Path) -> None:
    (tmp_path / "model").mkdir()
    done = start(tmp_path, token_file, "--allow_root", f"--rpc_port={free_port()}")
    assert done.returncode == ExitCode.NO_DEVICE
    (error,) = errors_of(done)
    assert "--platform=cpu" in str(error["human"])


def test_a_folder_that_holds_no_model_is_one_error(tmp_path: Path, token_file: Path) -> None:
    (tmp_path / "model").mkdir()
    done = start(tmp_path, token_file, "--allow_root", "--platform=cpu", f"--rpc_port={free_port()}")
    assert done.returncode == ExitCode.MODEL
    assert len(errors_of(done)) == 1


def test_files_that_are_not_there_are_told_together_before_anything_starts(tmp_path: Path) -> None:
    done = start(tmp_path, tmp_path / "no_token", "--allow_root", "--platform=cpu", f"--rpc_port={free_port()}")
    assert done.returncode == ExitCode.USAGE
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == ["--model_path", "--api_token_file"]


def test_a_port_in_use_is_one_error(tmp_path: Path, token_file: Path) -> None:
    (tmp_path / "model").mkdir()
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = start(tmp_path, token_file, "--allow_root", "--platform=cpu", f"--rpc_port={port}")
    assert done.returncode == ExitCode.ADDRESS
    (error,) = errors_of(done)
    assert str(port) in str(error["human"])


@pytest.mark.requirement("WORKER-4910")
def test_a_token_file_that_others_can_read_is_one_error(tmp_path: Path, token_file: Path) -> None:
    (tmp_path / "model").mkdir()
    token_file.chmod(0o644)
    done = start(tmp_path, token_file, "--allow_root", "--platform=cpu", f"--rpc_port={free_port()}")
    assert done.returncode == ExitCode.USAGE
    (line,) = done.stderr.splitlines()
    assert "600" in line


SIGNALS = """
import asyncio
from orcd_jax.wiring import _stop_signal

async def run():
    stopping = _stop_signal(asyncio.get_running_loop())
    print("up", flush=True)
    await stopping.wait()
    print("asked", flush=True)
    await asyncio.Event().wait()

asyncio.run(run())
"""
# The RPC Shutdown asks by the same event; it is no signal.
ASKED_BY_CALL = SIGNALS.replace('print("up", flush=True)', "stopping.set()")


@pytest.mark.requirement("WORKER-4970")
@pytest.mark.requirement("WORKER-4971")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_aborts(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", SIGNALS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(number)
        assert process.wait(timeout=30) == ExitCode.INTERRUPTED


@pytest.mark.requirement("WORKER-4970")
def test_the_first_signal_after_a_shutdown_call_does_not_abort() -> None:
    with subprocess.Popen([sys.executable, "-c", ASKED_BY_CALL], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1.0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == ExitCode.INTERRUPTED


def test_an_interrupt_that_the_parent_ignores_is_not_taken() -> None:
    script = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{SIGNALS}"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "asked\n"
        assert process.poll() is None
        process.kill()
