"""The demo script, with stand-ins for what it starts: what it starts it stops, and each failure says what to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "tools" / "demo"

PYTHON = """#!/usr/bin/env bash
case "$1" in
  */fetch_model.py) mkdir -p "$2"; touch "$2/model.gguf"; echo "$2/model.gguf" ;;
  */convert_gguf.py)
    [[ -z "${STUB_CONVERT_EXIT:-}" ]] || { echo "convert: no space left" >&2; exit "${STUB_CONVERT_EXIT}"; }
    echo converted >>"${STUB}/converted"; mkdir -p "${@: -1}"; echo '{}' >"${@: -1}/manifest.json" ;;
  *) exec REAL_PYTHON "$@" ;;
esac
"""
WORKER = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"${STUB}/worker_arguments"
echo x >>"${STUB}/starts"
[[ -z "${STUB_WORKER_EXIT:-}" ]] || { echo "the reason of the worker" >&2; exit "${STUB_WORKER_EXIT}"; }
for argument; do
  case "${argument}" in --api_token_file=*) stat -c %a "${argument#*=}" >"${STUB}/token_mode" ;; esac
done
trap 'echo stopped >"${STUB}/stopped"; exit "${STUB_STOP_EXIT:-0}"' TERM
echo $$ >"${STUB}/pid"
echo '{"event": "ready"}' >&2
while :; do sleep 0.02; done
"""
CLIENT = """#!/usr/bin/env bash
[[ -e "${STUB}/pid" ]] || exit 6
case "$1" in
  ready) echo '{"ready": true, "handles": [{"digest": "ab12"}], "digest": "ab12"}' ;;
  execute)
    printf '%s\\n' "$@" >"${STUB}/execute_arguments"
    touch "${STUB}/executing"
    while [[ -n "${STUB_ENDLESS:-}" ]]; do sleep 0.02; done
    echo "chips hum in the night"
    exit "${STUB_EXECUTE_EXIT:-0}" ;;
esac
"""


class Machine:
    """A folder in which the demo finds everything set up, with stand-ins for the programs."""

    def __init__(self, folder: Path) -> None:
        self.stub, self.venv, self.cache = folder / "stub", folder / "venv", folder / "cache"
        self.stub.mkdir()
        (self.venv / "bin").mkdir(parents=True)
        for name, text in (("python", PYTHON), ("orcd-worker", WORKER), ("orcd", CLIENT)):
            path = self.venv / "bin" / name
            path.write_text(text.replace("REAL_PYTHON", sys.executable))
            path.chmod(0o755)
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "ORCD_PYTHON": sys.executable,
            "ORCD_VENV": str(self.venv),
            "ORCD_CACHE": str(self.cache),
            "STUB": str(self.stub),
        }
        stamp = self.bash('source tools/env.sh; stamp_of "$(find_python)" runtime').stdout
        (self.venv / "orcd.begun").touch()
        (self.venv / "orcd.runtime").write_text(stamp)

    def bash(self, script: str, **extra: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-c", script]
        environment = {**self.environment, **extra}
        return subprocess.run(
            command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=60, check=False
        )

    def demo(self, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **extra}
        return subprocess.run(
            [str(DEMO), *arguments],
            cwd=self.stub,
            env=environment,
            text=True,
            capture_output=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def noted(self, name: str) -> list[str]:
        path = self.stub / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    for pid in made.noted("pid"):  # a failed test must not leave a process behind
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_answer_and_the_digest_are_all_that_stdout_shows(machine: Machine) -> None:
    done = machine.demo("Hello")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["chips hum in the night", "model digest: ab12"]


def test_the_worker_is_stopped_by_sigterm_and_gone_afterwards(machine: Machine) -> None:
    done = machine.demo("Hello")
    assert machine.noted("stopped") == ["stopped"]
    assert "stopped cleanly" in done.stderr
    assert not is_running(int(machine.noted("pid")[0]))


def test_the_token_is_private_and_gone_afterwards(machine: Machine) -> None:
    machine.demo("Hello")
    assert machine.noted("token_mode") == ["600"]
    assert list(machine.cache.glob("run.*")) == []


def test_the_worker_runs_on_the_cpu_alone_and_on_loopback(machine: Machine) -> None:
    machine.demo("Hello")
    arguments = machine.noted("worker_arguments")
    assert {"--platform=cpu", "--standalone"} <= set(arguments)
    assert not any(argument.startswith("--bind_address") for argument in arguments)


def test_root_is_allowed_only_when_it_is_root_and_then_said(machine: Machine) -> None:
    done = machine.demo("Hello")
    is_root = os.geteuid() == 0
    assert ("--allow_root" in machine.noted("worker_arguments")) == is_root
    assert ("running as root" in done.stderr) == is_root


def test_the_prompt_goes_last_whatever_it_looks_like(machine: Machine) -> None:
    machine.demo("why $HOME; `ls` 'x'?", "--temperature=0.5", "--seed=7")
    arguments = machine.noted("execute_arguments")
    assert arguments[-2:] == ["--", "why $HOME; `ls` 'x'?"]
    assert {"--chat", "--temperature=0.5", "--seed=7"} <= set(arguments)


def test_without_a_prompt_it_asks_for_a_haiku(machine: Machine) -> None:
    machine.demo()
    assert machine.noted("execute_arguments")[-1] == "Write a haiku about GPU computing"


def test_an_empty_prompt_is_refused_before_anything_starts(machine: Machine) -> None:
    done = machine.demo("")
    assert done.returncode == 2
    assert machine.noted("starts") == []


def test_the_model_is_converted_once(machine: Machine) -> None:
    machine.demo("Hello")
    machine.demo("Hello")
    assert machine.noted("converted") == ["converted"]


def test_a_failed_conversion_keeps_its_code_and_says_what_to_do(machine: Machine) -> None:
    done = machine.demo("Hello", STUB_CONVERT_EXIT="4")
    assert done.returncode == 4
    assert "no space left" in done.stderr
    assert "disk space" in done.stderr
    assert machine.noted("starts") == []


@pytest.mark.parametrize(("code", "todo"), [("2", "flags"), ("4", "remove "), ("70", "the lines above")])
def test_a_worker_that_ends_early_shows_its_log_and_what_to_do(machine: Machine, code: str, todo: str) -> None:
    done = machine.demo("Hello", STUB_WORKER_EXIT=code)
    assert done.returncode == int(code)
    assert "the reason of the worker" in done.stderr
    assert todo in done.stderr


def test_a_port_taken_in_between_is_tried_again_elsewhere(machine: Machine) -> None:
    done = machine.demo("Hello", STUB_WORKER_EXIT="5")
    assert done.returncode == 5
    assert len(machine.noted("starts")) == 3
    assert "ORCD_DEMO_PORT" in done.stderr


def test_a_port_that_was_asked_for_is_tried_once(machine: Machine) -> None:
    done = machine.demo("Hello", STUB_WORKER_EXIT="5", ORCD_DEMO_PORT="50999")
    assert done.returncode == 5
    assert len(machine.noted("starts")) == 1


def test_a_job_that_fails_keeps_its_code_and_still_stops_the_worker(machine: Machine) -> None:
    done = machine.demo("Hello", STUB_EXECUTE_EXIT="1")
    assert done.returncode == 1
    assert "model digest" not in done.stdout
    assert machine.noted("stopped") == ["stopped"]


def test_a_worker_that_does_not_end_well_is_not_hidden(machine: Machine) -> None:
    done = machine.demo("Hello", STUB_STOP_EXIT="9")
    assert done.returncode == 1
    assert "exit code 9" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_demo_stops_its_worker(machine: Machine, number: signal.Signals, code: int) -> None:
    demo = subprocess.Popen(
        [str(DEMO), "Hello"],
        env={**machine.environment, "STUB_ENDLESS": "yes"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + 30
    while not (machine.stub / "executing").exists():
        assert time.monotonic() < until, "the demo did not get as far as its job"
        assert demo.poll() is None
        time.sleep(0.02)
    os.killpg(demo.pid, number)  # as a terminal does
    assert demo.wait(timeout=60) == code
    assert not is_running(int(machine.noted("pid")[0]))
    assert list(machine.cache.glob("run.*")) == []


def test_help_starts_nothing(machine: Machine) -> None:
    done = machine.demo("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Answers a prompt")
    assert machine.noted("starts") == []


def test_no_python_says_which_one_is_needed(machine: Machine) -> None:
    done = machine.bash("source tools/env.sh; PATH=/nowhere; ORCD_PYTHON=; find_python")
    assert done.returncode == 1
    assert "3.11" in done.stderr
    assert "ORCD_PYTHON" in done.stderr


def test_a_python_on_the_path_that_does_not_run_is_passed_over(machine: Machine, tmp_path: Path) -> None:
    shims = tmp_path / "shims"
    shims.mkdir()
    for name in ("python3", "python3.13"):
        (shims / name).write_text("#!/bin/sh\necho 'not installed' >&2\nexit 127\n")
        (shims / name).chmod(0o755)
    (shims / "python3.12").symlink_to(sys.executable)
    done = machine.bash("source tools/env.sh; find_python", PATH=f"{shims}:/usr/bin:/bin", ORCD_PYTHON="")
    assert done.stdout.strip() == str(shims / "python3.12")


def test_a_virtual_environment_of_somebody_else_is_left_alone(machine: Machine) -> None:
    (machine.venv / "orcd.begun").unlink()
    (machine.venv / "orcd.runtime").unlink()
    done = machine.demo("Hello")
    assert done.returncode == 1
    assert "was not made by this tool" in done.stderr
    assert (machine.venv / "bin" / "orcd").exists()


@pytest.mark.parametrize("script", ["demo", "test", "check", "lock", "env.sh", "../.ci/run"])
def test_the_scripts_are_valid_bash_that_stops_at_errors(script: str) -> None:
    path = ROOT / "tools" / script
    subprocess.run(["bash", "-n", str(path)], check=True)
    if path.suffix != ".sh":
        assert "set -euo pipefail" in path.read_text(encoding="utf-8")
        assert os.access(path, os.X_OK)
