"""The script for a GPU machine, with a stand-in for Python: each section runs once, whatever became of the others."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_checks.sh"
SECTIONS = ["digest", "scrub-8b", "scrub-small", "kernels", "worker"]
WAIT_S = 60.0

# Notes what it is called with; fails, hangs or leaves a child as it is told, in the section that has the word STUB_AT.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"${STUB}/calls"
echo "${JAX_PLATFORMS} ${REQUIRE_REAL_GPU} ${PYTHONPATH%%:*} ${PWD}" >>"${STUB}/environment"
for argument; do
  case "${argument}" in --json=*) echo '{}' >"${argument#*=}" ;; esac
done
if [[ -n "${STUB_AT:-}" && "$*" == *"${STUB_AT}"* ]]; then
  echo "in trouble"
  if [[ -n "${STUB_HANGS:-}" ]]; then
    sleep 180 &
    echo "$!" >"${STUB}/child"
    wait
  fi
  exit 3
fi
echo "the last line of $#"
"""


class Machine:
    """A folder with the stand-in and a place for results."""

    def __init__(self, folder: Path) -> None:
        self.stub, self.out = folder / "stub", folder / "results"
        self.stub.mkdir()
        python = self.stub / "python"
        python.write_text(PYTHON)
        python.chmod(0o755)
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHON": str(python),
            "OUT": str(self.out),
            "STUB": str(self.stub),
        }
        self.folder = folder

    def start(self, *arguments: str, **extra: str) -> subprocess.Popen[str]:
        environment = {**self.environment, **extra}
        pipe = subprocess.PIPE
        command = [str(SCRIPT), *arguments]
        return subprocess.Popen(command, cwd=self.folder, env=environment, text=True, stdout=pipe, stderr=pipe)

    def run(self, *arguments: str, **extra: str) -> tuple[int, str]:
        """Exit code, and all it said."""
        return self.end(self.start(*arguments, **extra))

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """The same, of one that was started."""
        with process:
            try:
                out, err = process.communicate(timeout=WAIT_S)
            finally:
                process.kill()
        return process.returncode, out + err

    def calls(self) -> list[str]:
        return (self.stub / "calls").read_text().splitlines()

    def summary(self) -> dict[str, str]:
        """Each section's line, by its name."""
        lines = (self.out / "summary.txt").read_text().splitlines()
        assert lines[0].split() == ["section", "result", "s", "last", "line"]
        return {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[1:-1]}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_all_sections_run_in_order_each_in_one_process(machine: Machine) -> None:
    code, said = machine.run()
    assert code == 0, said
    digest, large, small, kernels, worker = machine.calls()
    assert digest == f"tools/bench_digest.py --json={machine.out}/digest.json"
    assert large.startswith("tools/bench_scrub.py --model=8b --streams=1,8,64 ")
    assert small.startswith("tools/bench_scrub.py --model=small ")
    assert kernels.startswith("-m pytest ")
    assert kernels.endswith(" -m gpu tests/residency tests/kernels/test_sha256.py tests/device")
    assert worker.endswith(" -m gpu or not gpu tests/worker/test_sealed_gpu.py tests/worker/test_bit_flips.py")
    for line in (machine.stub / "environment").read_text().splitlines():
        assert line == f"cuda 1 {ROOT} {ROOT}"
    assert list(machine.summary()) == SECTIONS
    assert all(line.startswith("passed ") for line in machine.summary().values())
    assert "0 of 5 sections did not pass" in said


def test_what_a_section_said_and_measured_is_in_the_folder(machine: Machine) -> None:
    machine.run()
    logs = {"digest.log", "scrub.log", "kernels.log", "worker.log"}
    assert {path.name for path in machine.out.iterdir()} == {
        *logs,
        "digest.json",
        "scrub-8b.json",
        "scrub-small.json",
        "summary.txt",
    }
    for log in logs:
        text = (machine.out / log).read_text()
        assert text.count("the last line of") == (2 if log == "scrub.log" else 1)


def test_a_failure_is_said_and_the_next_sections_still_run(machine: Machine) -> None:
    code, said = machine.run(STUB_AT="--model=8b")
    assert code == 1
    assert len(machine.calls()) == len(SECTIONS)
    summary = machine.summary()
    words = summary.pop("scrub-8b").split()
    assert (words[:2], words[3:]) == (["FAILED", "(3)"], ["in", "trouble"])
    assert all(line.startswith("passed ") for line in summary.values())
    assert "1 of 5 sections did not pass" in said


@pytest.mark.parametrize(
    ("arguments", "ran"),
    [
        (["kernels"], ["kernels"]),
        (["worker", "digest"], ["worker", "digest"]),
        (["scrub"], ["scrub-8b", "scrub-small"]),
        (["scrub-small"], ["scrub-small"]),
        (["all"], SECTIONS),
    ],
)
def test_arguments_choose_sections(machine: Machine, arguments: list[str], ran: list[str]) -> None:
    assert machine.run(*arguments)[0] == 0
    assert list(machine.summary()) == ran
    assert len(machine.calls()) == len(ran)


def test_results_of_before_are_not_taken_for_new_ones(machine: Machine) -> None:
    machine.run()
    (machine.stub / "python").write_text("#!/bin/sh\nexit 3\n")
    assert machine.run("digest")[0] == 1
    assert not (machine.out / "digest.json").exists()
    assert "the last line" not in (machine.out / "digest.log").read_text()
    assert (machine.out / "scrub-8b.json").exists()


def test_a_section_that_hangs_ends_with_its_time_and_with_all_it_started(machine: Machine) -> None:
    code, _ = machine.run("digest", "kernels", STUB_AT="bench_digest", STUB_HANGS="1", LIMIT_S="1")
    assert code == 1
    assert machine.summary()["digest"].startswith("TIMED OUT ")
    assert machine.summary()["kernels"].startswith("passed ")
    assert_ended(int((machine.stub / "child").read_text()))


def test_an_interrupted_script_ends_its_section_and_says_what_there_is(machine: Machine) -> None:
    process = machine.start("kernels", "digest", "worker", STUB_AT="bench_digest", STUB_HANGS="1")
    child, until = machine.stub / "child", time.monotonic() + WAIT_S
    while not (child.exists() and child.read_text()) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    code, said = machine.end(process)
    assert code == 143
    assert list(machine.summary()) == ["kernels"]
    assert "2 of 3 sections did not pass" in said
    assert_ended(int((machine.stub / "child").read_text()))


def assert_ended(pid: int) -> None:
    """Within the time that a signal takes."""
    until = time.monotonic() + WAIT_S
    while runs(pid):
        assert time.monotonic() < until, f"{pid} still runs"
        time.sleep(0.01)


def runs(pid: int) -> bool:
    """What has ended, and nobody has waited for yet, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("arguments", "extra", "message"),
    [
        (["kernel"], {}, "there is no section kernel"),
        (["digest"], {"PYTHON": "/nowhere/python"}, "/nowhere/python is not there"),
        (["digest"], {"OUT": "/proc/nowhere"}, "/proc/nowhere cannot be made"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is(
    machine: Machine, arguments: list[str], extra: dict[str, str], message: str
) -> None:
    code, said = machine.run(*arguments, **extra)
    assert code != 0
    assert f"error: {message}" in said
    assert not (machine.stub / "calls").exists()


def test_help_names_every_section(machine: Machine) -> None:
    code, said = machine.run("--help")
    assert code == 0
    assert all(name in said for name in SECTIONS)
    assert "Exit code" in said
